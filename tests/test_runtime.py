"""uvloop is used where it is, and nothing needs it."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys

import pytest

from tests.harness import PROJECT

pytestmark = pytest.mark.quick

ASK = """
import asyncio, sys
sys.modules.update({modules})
import runtime
async def whose():
    return type(asyncio.get_running_loop()).__module__
print(runtime.run(whose()))
"""


def loop_module(modules: dict[str, None]) -> str:
    """Run a coroutine in a new interpreter; ``modules`` of None can't be imported there."""
    command = [sys.executable, "-c", ASK.format(modules=modules)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, check=True).stdout.decode()


def test_without_uvloop_the_loop_is_that_of_asyncio() -> None:
    assert loop_module({"uvloop": None}).startswith(asyncio.__name__)


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is optional")
def test_with_uvloop_the_loop_is_that_of_uvloop() -> None:
    assert loop_module({}).startswith("uvloop")
