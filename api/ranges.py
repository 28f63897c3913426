"""Which part of a file a request asks for: conditions and ranges (RFC 9110, 13 and 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.helpers import ETag

_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]{0,20})\s*-\s*([0-9]{0,20})\s*", re.IGNORECASE)


class RangeNotSatisfiable(Exception):
    """Nothing of the file lies in the range that was asked for (RFC 9110, 15.5.17)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes from ``start`` up to, not including, ``end`` of a file of ``size`` bytes."""

    start: int
    end: int
    size: int

    @property
    def content_range(self) -> str:
        """The field value that says which part it is (RFC 9110, 14.4)."""
        return f"bytes {self.start}-{self.end - 1}/{self.size}"


def failed_condition(request: web.Request, tag: str) -> int | None:
    """Return 304 or 412 if a condition of the request says so, for a file of that strong tag.

    In the order of RFC 9110, 13.2.2. Files here have no Last-Modified, so that conditions on
    dates are ignored.
    """
    if request.if_match is not None and not _matches_strongly(request.if_match, tag):
        return 412
    if request.if_none_match is not None and _matches_weakly(request.if_none_match, tag):
        return 304
    return None


def requested_part(request: web.Request, tag: str, size: int) -> Part | None:
    """Return the part that is asked for, None for all. Raises :class:`RangeNotSatisfiable`.

    All is answered to other methods than GET and where a range may be ignored
    (RFC 9110, 14.2): unknown units, what is not well-formed, several ranges at once, and
    a range of another version of the file (13.1.5).
    """
    match = _RANGE.fullmatch(request.headers.get(hdrs.RANGE, ""))
    if match is None or request.method != hdrs.METH_GET:
        return None
    if request.headers.get(hdrs.IF_RANGE, f'"{tag}"').strip() != f'"{tag}"':
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        part = Part(max(0, size - int(last)), size, size)
    elif last and int(last) < int(first):
        return None
    else:
        part = Part(int(first), min(int(last) + 1, size) if last else size, size)
    if part.start >= part.end:
        raise RangeNotSatisfiable
    return part


def _matches_strongly(tags: tuple[ETag, ...], tag: str) -> bool:
    return any(other.value in ("*", tag) and not other.is_weak for other in tags)


def _matches_weakly(tags: tuple[ETag, ...], tag: str) -> bool:
    return any(other.value in ("*", tag) for other in tags)
