"""Whether stored rows are what was stored: damage is seen before it is served.

CRC-32 finds damage, not forgery: who can write the file can write its checksums. A row written
by a version before has none (NULL) and is taken as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from jobs import JobState
from records import StoreDamaged


def checksum_of_bytes(place: int, data: bytes | memoryview) -> int:
    """Return the checksum of bytes that stand at ``place``, so that none stand at another's."""
    return zlib.crc32(data, place & 0xFFFFFFFF)


def checksum_of_row(values: Sequence[object]) -> int:
    """Return the checksum of a row's values: numbers, text and None."""
    text = "\x1f".join("" if value is None else repr(value) for value in map(_plain, values))
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _plain(value: object) -> object:
    """Return text as it comes back from the database, where an enum becomes a string."""
    return str(value) if isinstance(value, str) else value


def stored_state(text: str) -> JobState:
    """Return the state that a row names; raises :class:`StoreDamaged` if there is none such."""
    try:
        return JobState(text)
    except ValueError:
        raise StoreDamaged(f"a state is damaged: {text!r}") from None
