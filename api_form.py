"""The upload form: multipart/form-data, read as it arrives, its files straight into the store."""

from __future__ import annotations

import re
from dataclasses import dataclass

import aiohttp
from aiohttp import BodyPartReader, MultipartReader, hdrs, web

import protocol
from api_answers import BadRequest, UploadTooLarge
from config import MAX_FILES, MAX_UPLOAD_BYTES
from store import Upload

_READ_BYTES = 256 * 1024
_FIELD_BYTES = 4096
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_LARGEST_INTEGER = 2**63 - 1


@dataclass(slots=True)
class UploadForm:
    """What the form said beside the files' bytes: their names, and the fields as they came."""

    files: set[str]
    user_id: str | None = None
    service: str | None = None


async def ask_for_body(request: web.Request) -> web.StreamResponse | None:
    """Ask for the body only if it may come (RFC 9110, 10.1.1); the handler refuses the rest."""
    is_short_enough = (request.content_length or 0) <= MAX_UPLOAD_BYTES
    if is_short_enough and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


async def read_form(request: web.Request, upload: Upload) -> UploadForm:
    """Read the whole form, its files into ``upload``."""
    form = UploadForm(files=set())
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            await _read_part(request, part, form, upload)
        if not reader.at_eof():
            raise BadRequest("the form ends too early")
        while await request.content.read(_READ_BYTES):
            _check_length(request)
    except (ValueError, AssertionError, RuntimeError, aiohttp.http_exceptions.HttpProcessingError):
        # what aiohttp's multipart reader raises for input that is not multipart
        raise BadRequest("the body is not well-formed multipart/form-data") from None
    except aiohttp.ClientPayloadError:
        raise BadRequest("the body ended before its announced length") from None
    return form


async def _read_part(
    request: web.Request, part: BodyPartReader | MultipartReader, form: UploadForm, upload: Upload
) -> None:
    if isinstance(part, MultipartReader):
        raise BadRequest("a part of the form is itself multipart")
    if part.headers.get("Content-Transfer-Encoding", "binary") not in ("binary", "8bit", "7bit"):
        raise BadRequest("Content-Transfer-Encoding is not allowed in forms (RFC 7578, 4.7)")
    name, file_name = _names_of(part)
    if file_name is not None and name != "file":
        raise BadRequest(f"{name!r:.80}: files must be sent in the field 'file'")
    match name:
        case "file":
            await _read_file(request, part, file_name, form, upload)
        case "user_id":
            form.user_id = await _read_field(request, part, "user_id", form.user_id)
        case "service":
            form.service = await _read_field(request, part, "service", form.service)
        case _:
            while await part.read_chunk(_READ_BYTES):
                _check_length(request)


async def _read_file(
    request: web.Request,
    part: BodyPartReader,
    name: str | None,
    form: UploadForm,
    upload: Upload,
) -> None:
    if name is None:
        raise BadRequest("file: must be sent as a file, with a file name")
    if problem := protocol.file_name_problem(name):
        raise BadRequest(f"file: the name {name[:80]!r} {problem}")
    if name in form.files:
        raise BadRequest(f"file: the name {name!r} is there twice")
    if len(form.files) == MAX_FILES:
        raise BadRequest(f"file: there are more than {MAX_FILES} files; send them as an archive")
    form.files.add(name)
    upload.start_file(name)
    while data := await part.read_chunk(_READ_BYTES):
        _check_length(request)
        await upload.write(data)
    await upload.finish_file()


async def _read_field(
    request: web.Request, part: BodyPartReader, name: str, present: str | None
) -> str:
    if present is not None:
        raise BadRequest(f"{name}: is there twice")
    value = bytearray()
    while data := await part.read_chunk(_FIELD_BYTES):
        _check_length(request)
        value += data
        if len(value) > _FIELD_BYTES:
            raise BadRequest(f"{name}: is too long")
    try:
        return value.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadRequest(f"{name}: is not UTF-8") from None


def _check_length(request: web.Request) -> None:
    """Refuse a body of unannounced length once it is too long; counts what was received."""
    if request.content.total_bytes > MAX_UPLOAD_BYTES:
        raise UploadTooLarge


_PARAMETER = re.compile(r';\s*(?P<key>[\w*]+)=(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^;\s]*))')


def _names_of(part: BodyPartReader) -> tuple[str | None, str | None]:
    """Return field name and file name as browsers and curl write them.

    The HTML standard escapes only CR, LF and the quotation mark, as ``%0D``, ``%0A`` and
    ``%22`` (older clients use a backslash), and sends everything else as it is. aiohttp
    decodes all percent escapes, which would change a file called ``100%25.txt``.
    """
    values: dict[str, str] = {}
    for match in _PARAMETER.finditer(part.headers.get(hdrs.CONTENT_DISPOSITION, "")):
        quoted, plain = match["quoted"], match["plain"]
        value = plain if quoted is None else re.sub(r'\\(["\\])', r"\1", quoted)
        for escape, character in (("%0D", "\r"), ("%0A", "\n"), ("%22", '"')):
            value = value.replace(escape, character)
        values[match["key"].lower()] = value
    return values.get("name"), values.get("filename")


def checked_user_id(text: str | None) -> int:
    if text is None:
        raise BadRequest("user_id: missing")
    if not _INTEGER.fullmatch(text):
        raise BadRequest("user_id: must be an integer")
    if not -_LARGEST_INTEGER - 1 <= int(text) <= _LARGEST_INTEGER:
        raise BadRequest("user_id: does not fit into 64 bits")
    return int(text)


def check_files(names: set[str]) -> None:
    if not names:
        raise BadRequest("file: missing, at least one file is needed")
    if protocol.RUN_SCRIPT not in names:
        raise BadRequest(f"file: none of the files is named {protocol.RUN_SCRIPT}")
