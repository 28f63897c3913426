"""An image for jobs in containers: this machine's bash and its libraries, nothing is fetched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.processes import IMAGE

_SECONDS = 120.0


@contextmanager
def made_in(directory: Path) -> Iterator[None]:
    """Make the image, and remove it in the end; does nothing where there is no podman."""
    if shutil.which("podman") is None:
        yield
        return
    root = directory / "image"
    for path in _program_and_libraries("bash"):
        target = root / path.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(path), target)
    archive = shutil.make_archive(str(directory / "image"), "tar", root)
    _podman("import", archive, IMAGE)
    try:
        yield
    finally:
        _podman("image", "rm", "--force", IMAGE)


def _program_and_libraries(name: str) -> list[str]:
    program = shutil.which(name)
    assert program is not None
    listing = subprocess.run(["ldd", program], capture_output=True, check=True, text=True).stdout
    # "libc.so.6 => /lib/libc.so.6 (0x...)", or a path alone for the loader
    return ["/bin/bash", program, *re.findall(r"(/\S+) \(0x", listing)]


def _podman(*arguments: str) -> None:
    subprocess.run(["podman", *arguments], capture_output=True, check=True, timeout=_SECONDS)
