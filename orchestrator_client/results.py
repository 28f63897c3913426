"""Results: downloaded and unpacked in one go."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from orchestrator_client.downloads import fetch
from orchestrator_client.extraction import Extraction, existing_parent, extract
from orchestrator_client.retries import Sender
from orchestrator_client.uploads import Progress


async def unpack(
    sender: Sender,
    path: str,
    directory: str | os.PathLike[str],
    progress: Progress | None,
    unpack_progress: Progress | None,
) -> Extraction:
    """Download a ZIP and unpack it into a directory; raises what those two raise."""
    target = Path(os.path.realpath(directory))
    with await sender.transport.run(lambda: _archive_beside(target)) as archive:
        await fetch(sender, path, archive, progress)
        return await sender.transport.run(lambda: extract(archive, target, unpack_progress))


def _archive_beside(directory: Path) -> IO[bytes]:
    """Open a file without a name, on the disk that the result goes to: /tmp may be memory."""
    return tempfile.TemporaryFile(dir=existing_parent(directory))
