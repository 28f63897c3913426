"""What a job prints, made harmless for a terminal: colours stay, what steers it is taken out."""

from __future__ import annotations

import re

# text attributes (SGR) and "erase in line", which progress bars use
_HARMLESS = re.compile(rb"\x1b\[[0-9;:]*[mK]")
_SEQUENCE = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    rb"|\x1b[\]PX^_].*?(?:\x07|\x1b\\)"  # OSC, DCS, SOS, PM, APC with their texts
    rb"|\x1b[ -/]*[0-~]",  # all others (ECMA-48, 5.3)
    re.DOTALL,
)
_CONTROLS = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]")
_LONGEST_SEQUENCE_BYTES = 4096


class TerminalFilter:
    """Takes what comes in pieces; a sequence may be cut in two by them."""

    def __init__(self) -> None:
        self._open = b""

    def feed(self, data: bytes) -> bytes:
        """Return what may be written to a terminal now."""
        data = self._open + data
        start = data.rfind(b"\x1b")
        self._open = b""
        is_open = start >= 0 and not _SEQUENCE.match(data, start)
        if is_open and len(data) - start <= _LONGEST_SEQUENCE_BYTES:
            data, self._open = data[:start], data[start:]
        kept = _SEQUENCE.sub(_keep_if_harmless, data)
        return _CONTROLS.sub(b"", _BARE_ESCAPE.sub(b"^[", kept))


_BARE_ESCAPE = re.compile(rb"\x1b(?!\[[0-9;:]*[mK])")


def _keep_if_harmless(match: re.Match[bytes]) -> bytes:
    return match[0] if _HARMLESS.fullmatch(match[0]) else b""
