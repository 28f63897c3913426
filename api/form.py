"""The upload form: multipart/form-data, read as it arrives, its files straight into the store."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import aiohttp
from aiohttp import BodyPartReader, MultipartReader, hdrs, web

import jobs
from api.answers import BadRequest, ClientStalled, UploadTooLarge
from config import LONGEST_TIMEOUT, MAX_UPLOAD_BYTES, ServiceLimits, Settings
from records import JobRequest
from store import Upload

# more than aiohttp ever holds back for us: what it has comes as it came, not cut and joined
_READ_BYTES = 1024 * 1024
_FIELD_BYTES = 4096
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_LARGEST_INTEGER = 2**63 - 1
_HIGHEST_PRIORITY = 100
_NAME_CHARACTERS = 200
_KEY_CHARACTERS = 255
_MAX_TAGS = 32
_TAG_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TAG_VALUE_CHARACTERS = 256
_MAX_PASSED_OVER = 100
_SINGLE_FIELDS = frozenset({"user_id", "service", "name", "priority", "timeout"})

Admit: TypeAlias = Callable[[int], None]
"""Told the user as soon as the form has said it; raises if that user may not upload now."""


@dataclass(slots=True)
class _Form:
    """What the form has said so far, beside the files' bytes."""

    max_files: int
    admit: Admit
    files: set[str] = field(default_factory=set)
    user_id: int | None = None
    fields: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0


async def ask_for_body(request: web.Request) -> web.StreamResponse | None:
    """Ask for the body only if it may come (RFC 9110, 10.1.1); the handler refuses the rest."""
    is_short_enough = (request.content_length or 0) <= MAX_UPLOAD_BYTES
    if is_short_enough and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


async def read_form(
    request: web.Request, upload: Upload, settings: Settings, admit: Admit
) -> JobRequest:
    """Read the whole request, its files into ``upload``; raises :class:`BadRequest`."""
    key = idempotency_key(request)
    form = _Form(settings.max_files, admit)
    try:
        async with _progress_demanded(request, settings.upload_idle):
            await _read_body(request, form, upload)
    except TimeoutError:
        raise ClientStalled(f"nothing came for {settings.upload_idle:g} s") from None
    except (ValueError, AssertionError, RuntimeError, aiohttp.http_exceptions.HttpProcessingError):
        # what aiohttp's multipart reader raises for input that is not multipart
        raise BadRequest("the body is not well-formed multipart/form-data") from None
    except aiohttp.ClientPayloadError:
        raise BadRequest("the body ended before its announced length") from None
    return _job_request(form, key, settings.services)


async def _read_body(request: web.Request, form: _Form, upload: Upload) -> None:
    reader = await request.multipart()
    while (part := await reader.next()) is not None:
        await _read_part(request, part, form, upload)
    if not reader.at_eof():
        raise BadRequest("the form ends too early")
    while await request.content.read(_READ_BYTES):
        _check_length(request)


@asynccontextmanager
async def _progress_demanded(request: web.Request, seconds: float) -> AsyncIterator[None]:
    """Raise :class:`TimeoutError` in the block once no byte has come for so long.

    aiohttp limits the time between the requests of a connection, but none within a request.
    """
    if request.content.is_eof():  # all of it has come already
        yield
        return
    loop = asyncio.get_running_loop()

    async def look(limit: asyncio.Timeout) -> None:
        seen = 0
        while True:
            await asyncio.sleep(seconds / 4)
            if request.content.total_bytes > seen:
                seen = request.content.total_bytes
                limit.reschedule(loop.time() + seconds)

    async with asyncio.timeout(seconds) as limit:
        looking = asyncio.create_task(look(limit), name="look at an upload")
        try:
            yield
        finally:
            looking.cancel()


def _job_request(form: _Form, key: str | None, services: Mapping[str, ServiceLimits]) -> JobRequest:
    service = form.fields.get("service")
    if service is None:
        raise BadRequest("service: missing")
    limits = checked_service(service, services)
    if form.user_id is None:
        raise BadRequest("user_id: missing")
    _check_files(form.files)
    return JobRequest(
        user_id=form.user_id,
        service=service,
        name=_checked_text("name", form.fields.get("name", ""), _NAME_CHARACTERS),
        priority=_checked_priority(form.fields.get("priority", "0")),
        timeout=_checked_timeout(form.fields.get("timeout"), limits),
        tags=tuple(sorted(form.tags.items())),
        idempotency_key=key,
    )


def idempotency_key(request: web.Request) -> str | None:
    values = request.headers.getall("Idempotency-Key", [])
    if not values:
        return None
    if len(values) > 1:
        raise BadRequest("Idempotency-Key: is there twice")
    if not 1 <= len(values[0]) <= _KEY_CHARACTERS or not values[0].isprintable():
        raise BadRequest(f"Idempotency-Key: must be 1 to {_KEY_CHARACTERS} printable characters")
    return values[0]


async def _read_part(
    request: web.Request, part: BodyPartReader | MultipartReader, form: _Form, upload: Upload
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
        case "tag":
            _add_tag(form, await _read_field(request, part, "tag"))
        case str() if name in _SINGLE_FIELDS:
            if name in form.fields:
                raise BadRequest(f"{name}: is there twice")
            form.fields[name] = await _read_field(request, part, name)
            if name == "user_id":
                form.user_id = checked_user_id(form.fields[name])
                form.admit(form.user_id)
        case _:
            form.passed_over += 1
            if form.passed_over > _MAX_PASSED_OVER:
                raise BadRequest(f"there are more than {_MAX_PASSED_OVER} fields of other names")
            while await part.read_chunk(_READ_BYTES):
                _check_length(request)


async def _read_file(
    request: web.Request,
    part: BodyPartReader,
    name: str | None,
    form: _Form,
    upload: Upload,
) -> None:
    if name is None:
        raise BadRequest("file: must be sent as a file, with a file name")
    if problem := jobs.file_name_problem(name):
        raise BadRequest(f"file: the name {name[:80]!r} {problem}")
    if name in form.files:
        raise BadRequest(f"file: the name {name!r} is there twice")
    if len(form.files) == form.max_files:
        raise BadRequest(
            f"file: there are more than {form.max_files} files; send them as an archive"
        )
    form.files.add(name)
    upload.start_file(name)
    while data := await part.read_chunk(_READ_BYTES):
        _check_length(request)
        await upload.write(data)
    await upload.finish_file()


async def _read_field(request: web.Request, part: BodyPartReader, name: str) -> str:
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


def checked_service(service: str, services: Mapping[str, ServiceLimits]) -> ServiceLimits:
    """Return the limits of a service; raises :class:`BadRequest` if it is not configured."""
    limits = services.get(service)
    if limits is None:
        raise BadRequest(
            f"service: unknown service {service!r:.80}; GET /services tells which there are"
        )
    return limits


def _checked_integer(name: str, text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise BadRequest(f"{name}: must be an integer")
    return int(text)


def checked_user_id(text: str) -> int:
    """Return a user's id; raises :class:`BadRequest` for what is none."""
    user_id = _checked_integer("user_id", text)
    if not -_LARGEST_INTEGER - 1 <= user_id <= _LARGEST_INTEGER:
        raise BadRequest("user_id: does not fit into 64 bits")
    return user_id


def _checked_priority(text: str) -> int:
    priority = _checked_integer("priority", text)
    if not -_HIGHEST_PRIORITY <= priority <= _HIGHEST_PRIORITY:
        raise BadRequest(f"priority: must be from -{_HIGHEST_PRIORITY} to {_HIGHEST_PRIORITY}")
    return priority


def _checked_timeout(text: str | None, limits: ServiceLimits) -> int | None:
    if text is None:
        return None
    timeout = _checked_integer("timeout", text)
    longest = LONGEST_TIMEOUT if limits.timeout is None else limits.timeout
    if not 1 <= timeout <= longest:
        raise BadRequest(f"timeout: must be from 1 to {longest} seconds in this service")
    return timeout


def _checked_text(name: str, text: str, longest: int) -> str:
    if len(text) > longest:
        raise BadRequest(f"{name}: is longer than {longest} characters")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise BadRequest(f"{name}: contains a control character")
    return text


def _add_tag(form: _Form, text: str) -> None:
    key, colon, value = text.partition(":")
    if not colon or not _TAG_KEY.fullmatch(key):
        raise BadRequest(
            "tag: must be key:value, the key 1 to 64 letters, digits, dots, dashes, underscores"
        )
    if key in form.tags:
        raise BadRequest(f"tag: {key} is there twice")
    if len(form.tags) == _MAX_TAGS:
        raise BadRequest(f"tag: there are more than {_MAX_TAGS}")
    form.tags[key] = _checked_text("tag", value, _TAG_VALUE_CHARACTERS)


def _check_files(names: set[str]) -> None:
    if not names:
        raise BadRequest("file: missing, at least one file is needed")
    if jobs.RUN_SCRIPT not in names:
        raise BadRequest(f"file: none of the files is named {jobs.RUN_SCRIPT}")
