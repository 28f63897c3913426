"""A member of an archive that is larger than 32 bits can say; it takes 20 s to read again."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from archive import writer as archive
from tests.agent.test_archive import assert_valid

_MIB = 1024 * 1024


class _Large:
    """The state of a file of more bytes than fit into 32 bits."""

    st_mode, st_mtime, st_size = 0o100644, 1e9, 2**32 + 2**20


@pytest.mark.soak
async def test_a_member_of_more_than_four_gigabytes_fits(tmp_path: Path) -> None:
    piece = bytes(_MIB)
    with archive.new_zip(tmp_path / "out.zip") as writer:
        writer.add("large", _Large, (piece for _ in range(4097)))  # type: ignore[arg-type]
        writer.add("small", os.stat(tmp_path), [b"x"])
    with zipfile.ZipFile(tmp_path / "out.zip") as read:
        assert read.getinfo("large").file_size == 4097 * _MIB
    await assert_valid(tmp_path / "out.zip")
