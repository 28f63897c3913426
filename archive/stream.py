"""A ZIP of stored files, made while it is sent: nothing of it is kept."""

from __future__ import annotations

import time
import zipfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

_LARGE_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Source:
    """A file to be put in: name, length in bytes, and what yields its bytes in pieces."""

    name: str
    size: int
    pieces: Callable[[], AsyncGenerator[bytes, None]]


class _Sink:
    """Takes what zipfile writes. It can't seek, so that zipfile never wants to go back."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def flush(self) -> None:
        """For zipfile, which calls it."""

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


async def zip_of(sources: Sequence[Source], modified: float) -> AsyncGenerator[bytes, None]:
    """Yield the ZIP, uncompressed; ``modified`` in Unix seconds is the time of all files."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:  # type: ignore[call-overload]  # all it needs
        for source in sources:
            info = zipfile.ZipInfo(source.name, time.gmtime(modified)[:6])
            info.create_system = 3  # Unix: the high half of external_attr is the mode
            info.external_attr = 0o100644 << 16
            is_large = source.size >= _LARGE_BYTES
            async with aclosing(source.pieces()) as pieces:
                with archive.open(info, "w", force_zip64=is_large) as member:
                    async for piece in pieces:
                        member.write(piece)
                        yield sink.take()
    yield sink.take()
