"""Erasing: doomed blobs and output go in small steps, and their pages go back to the disk."""

from __future__ import annotations

import asyncio
import logging

from records import StoreFull, StoreUnavailable
from storage.blobs import Blobs
from storage.database import checkpoint, vacuum_some
from storage.file import DatabaseFile
from storage.output import erase_some_output
from telemetry.logs import event

log = logging.getLogger("orchestrator.store")

_RETRY_SECONDS = 1.0


class Eraser:
    """The store's background work: run :meth:`run`."""

    def __init__(self, file: DatabaseFile, blobs: Blobs) -> None:
        self._file = file
        self._blobs = blobs
        self._may_shrink = True  # a crash may have come between erasing and vacuum
        file.when_short_of_room = self._give_room

    async def run(self) -> None:
        """Erase whenever something was doomed; ends by cancellation only."""
        while True:
            await self._blobs.to_erase.wait()
            self._blobs.to_erase.clear()
            try:
                await self._erase_all()
            except (StoreFull, StoreUnavailable) as error:
                event(
                    log,
                    "erase_failed",
                    level=logging.WARNING,
                    error=str(error),
                    retry_s=_RETRY_SECONDS,
                )
                self._may_shrink = True
            if self._may_shrink:
                await asyncio.sleep(_RETRY_SECONDS)
                self._blobs.to_erase.set()

    def _give_room(self) -> None:
        # what takes the room may be a WAL that is carried over but not emptied, and if
        # nothing is written, nothing else will empty it
        self._may_shrink = True
        self._blobs.to_erase.set()

    async def _erase_all(self) -> None:
        await self._blobs.doom_abandoned()
        erased = 0
        while await self._file.write(self._blobs.erase_some, 1):
            erased += 1
        while await self._file.write(erase_some_output, 1):
            erased += 1
        if erased or self._may_shrink:
            self._may_shrink = False
            while await self._file.write(vacuum_some, 1):
                pass
            if not await self._file.write_outside_transaction(checkpoint):
                self._may_shrink = True
