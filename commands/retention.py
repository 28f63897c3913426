"""Retention's clock: when ended jobs lose their files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from config import SettingsInForce
from records import StoreFull, StoreUnavailable
from store import Store
from telemetry.logs import event

log = logging.getLogger("orchestrator")

_LONGEST_PAUSE_SECONDS = 3600.0  # while the machine sleeps, timers stand still
_RETRY_SECONDS = 60.0


async def keep_retention(store: Store, settings: SettingsInForce) -> None:
    """Clean jobs whose final state is older than the maximum age, when they reach it."""
    is_changed = asyncio.Event()
    settings.on_change(is_changed.set)
    while True:
        is_changed.clear()
        try:
            pause = await _clean_once(store, settings.current.max_age)
        except (StoreFull, StoreUnavailable) as error:
            event(log, "retention_failed", level=logging.WARNING, error=str(error))
            pause = _RETRY_SECONDS
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_changed.wait(), pause)


async def _clean_once(store: Store, max_age: int) -> float:
    while cleaned := await store.retention.clean_some(max_age):
        event(log, "cleaned", jobs=cleaned)
    while await store.retention.forget_old_keys():
        pass
    await store.statistics.fold(time.time())
    oldest = await store.retention.oldest_age()
    # a job that becomes final only now reaches the age no sooner than max_age from now
    due = max_age if oldest is None else max_age - oldest
    return min(max(due, 0.0) + 0.01, max_age, _LONGEST_PAUSE_SECONDS)
