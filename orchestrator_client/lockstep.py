"""Run coroutines to their end without an event loop, on a transport that never suspends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns; it must not wait for an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine of the synchronous client waits for an event loop")


def iterate(generator: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield what an asynchronous generator yields, and close it in any case."""
    try:
        while True:
            try:
                item = run(_next_of(generator))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(_close(generator))


async def _next_of(generator: AsyncGenerator[T, None]) -> T:
    return await anext(generator)


async def _close(generator: AsyncGenerator[T, None]) -> None:
    await generator.aclose()
