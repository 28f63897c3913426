"""Writes that must come about: repeated for as long as the disk has no room for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from records import StoreFull, StoreUnavailable
from telemetry.logs import event

log = logging.getLogger("orchestrator.fleet")

T = TypeVar("T")

STORE_RETRY_SECONDS = 1.0


async def until_stored(write: Callable[[], Awaitable[T]]) -> T:
    """Repeat a write of the store until there is room for it; other errors pass."""
    while True:
        try:
            return await write()
        except (StoreFull, StoreUnavailable) as error:
            event(
                log,
                "store_failed",
                level=logging.WARNING,
                error=str(error),
                retry_s=STORE_RETRY_SECONDS,
            )
            await asyncio.sleep(STORE_RETRY_SECONDS)
