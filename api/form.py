"""The upload form: multipart/form-data, read as it arrives, its files straight into the store."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import aiohttp
from aiohttp import hdrs, web
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

import jobs
from api.errors import BadRequest, ClientStalled, UploadTooLarge
from api.parameters import idempotency_key_of, integer_from, service_from, user_id_from
from config import LONGEST_TIMEOUT, MAX_UPLOAD_BYTES, ServiceLimits, Settings
from records import JobRequest
from store import Upload

_MAX_FIELD_BYTES = 4096
_MAX_BOUNDARY_CHARACTERS = 256
# of a part: a file name of the largest length, every byte of it escaped
_MAX_PART_HEADER_BYTES = 16 * 1024
_MAX_PART_HEADERS = 8
_MAX_PRIORITY = 100
_MAX_NAME_CHARACTERS = 200
_MAX_TAGS = 32
_TAG_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_TAG_VALUE_CHARACTERS = 256
_RESOURCES = ("cpus", "memory", "gpus")
_SINGLE_FIELDS = frozenset({"user_id", "service", "name", "priority", "timeout", *_RESOURCES})
_TRANSFER_ENCODINGS = frozenset({"binary", "8bit", "7bit"})

Admit: TypeAlias = Callable[[int], None]
"""Told the user as soon as the form has said it; raises if that user may not upload now."""


@dataclass(slots=True)
class _Form:
    """What the form has said so far, beside the files' bytes."""

    max_files: int
    admit: Admit
    files: set[str] = field(default_factory=set)
    file_name_bytes: int = 0
    user_id: int | None = None
    fields: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def _ask_for_body(request: web.Request) -> None:
    """Let the client send the body if it asked whether to (RFC 9110, 10.1.1)."""
    if hdrs.EXPECT in request.headers and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def read_form(
    request: web.Request, upload: Upload, settings: Settings, admit: Admit
) -> JobRequest:
    """Read the whole request, its files into ``upload``; raises :class:`BadRequest`."""
    key = idempotency_key_of(request)
    boundary = _boundary_of(request)
    _ask_for_body(request)
    form = _Form(settings.max_files, admit)
    try:
        async with _progress_demanded(request, settings.upload_idle):
            await _read_body(request, boundary, _PartReader(form, upload))
    except TimeoutError:
        raise ClientStalled(f"nothing came for {settings.upload_idle:g} s") from None
    except MultipartError:
        raise BadRequest("the body is not well-formed multipart/form-data") from None
    except (aiohttp.ClientPayloadError, web.RequestPayloadError):
        raise BadRequest("the body ended before its announced length") from None
    return _job_request(form, key, settings.services)


async def _read_body(request: web.Request, boundary: str, reader: _PartReader) -> None:
    parser = PushMultipartParser(
        boundary,
        max_header_size=_MAX_PART_HEADER_BYTES,
        max_header_count=_MAX_PART_HEADERS,
    )
    while data := await request.content.readany():
        # counts what was received: the length may be unannounced
        if request.content.total_bytes > MAX_UPLOAD_BYTES:
            raise UploadTooLarge
        for event in parser.parse(data):
            match event:
                case None:
                    await reader.end()
                case MultipartSegment():
                    reader.begin(event)
                case _:
                    await reader.add(event)
    parser.close()  # raises if the last boundary is missing


def _boundary_of(request: web.Request) -> str:
    _, options = parse_options_header(request.headers[hdrs.CONTENT_TYPE])
    boundary: str = options.get("boundary", "")
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_CHARACTERS or not boundary.isascii():
        raise BadRequest("Content-Type: without a well-formed boundary")
    return boundary


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


# --- parts ------------------------------------------------------------------------


class _PartReader:
    """Takes the parts of a form one after the other: fields are noted, files are uploaded."""

    def __init__(self, form: _Form, upload: Upload) -> None:
        self._form = form
        self._upload = upload
        self._field = ""
        self._value: bytearray | None = None  # of a field; None while a file comes

    def begin(self, part: MultipartSegment) -> None:
        """Begin a part; raises :class:`BadRequest` for what no form of ours has."""
        headers = dict(part.headerlist)
        if (part.content_type or "").startswith("multipart/"):
            raise BadRequest("a part of the form is itself multipart")
        if headers.get("Content-Transfer-Encoding", "binary") not in _TRANSFER_ENCODINGS:
            raise BadRequest("Content-Transfer-Encoding is not allowed in forms (RFC 7578, 4.7)")
        self._field = part.name or ""
        if self._field == "file":
            self._begin_file(part.filename)
        elif part.filename is not None:
            raise BadRequest(f"{self._field!r:.80}: files must be sent in the field 'file'")
        elif self._field in _SINGLE_FIELDS or self._field == "tag":
            if self._field in self._form.fields:
                raise BadRequest(f"{self._field}: given more than once")
            self._value = bytearray()
        else:
            raise BadRequest(f"{self._field!r:.80}: there is no such field")

    async def add(self, data: bytes | bytearray) -> None:
        """Take bytes of the part."""
        if self._value is None:
            await self._upload.write(bytes(data))
            return
        self._value += data
        if len(self._value) > _MAX_FIELD_BYTES:
            raise BadRequest(f"{self._field}: is too long")

    async def end(self) -> None:
        """End the part; raises :class:`BadRequest` for a value that can't be."""
        if self._value is None:
            await self._upload.finish_file()
            return
        try:
            value = self._value.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadRequest(f"{self._field}: is not UTF-8") from None
        self._value = None
        if self._field == "tag":
            _add_tag(self._form, value)
            return
        self._form.fields[self._field] = value
        if self._field == "user_id":
            self._form.user_id = user_id_from(value)
            self._form.admit(self._form.user_id)

    def _begin_file(self, name: str | None) -> None:
        form = self._form
        if name is None:
            raise BadRequest("file: must be sent as a file, with a file name")
        if problem := jobs.file_name_problem(name):
            raise BadRequest(f"file: the name {name!r:.300} {problem}")
        if name in form.files:
            raise BadRequest(f"file: the name {name!r:.300} is given more than once")
        if len(form.files) == form.max_files:
            raise BadRequest(
                f"file: there are more than {form.max_files} files; send them as an archive"
            )
        form.file_name_bytes += len(name.encode())
        if form.file_name_bytes > jobs.MAX_PATHS_BYTES:  # before they take so much memory
            raise BadRequest(
                f"file: the names are longer than {jobs.MAX_PATHS_BYTES} bytes together"
            )
        form.files.add(name)
        self._upload.start_file(name)


# --- fields -----------------------------------------------------------------------


def _job_request(form: _Form, key: str | None, services: Mapping[str, ServiceLimits]) -> JobRequest:
    service = form.fields.get("service")
    if service is None:
        raise BadRequest("service: missing")
    limits = service_from(service, services)
    if form.user_id is None:
        raise BadRequest("user_id: missing")
    _check_files(form.files)
    cpus, memory, gpus = _checked_resources(form.fields, limits)
    return JobRequest(
        user_id=form.user_id,
        service=service,
        name=_checked_text("name", form.fields.get("name", ""), _MAX_NAME_CHARACTERS),
        priority=_checked_priority(form.fields.get("priority", "0")),
        timeout=_checked_timeout(form.fields.get("timeout"), limits),
        tags=tuple(sorted(form.tags.items())),
        idempotency_key=key,
        cpus=cpus,
        memory=memory,
        gpus=gpus,
    )


def _checked_priority(text: str) -> int:
    priority = integer_from("priority", text)
    if not -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
        raise BadRequest(f"priority: must be from -{_MAX_PRIORITY} to {_MAX_PRIORITY}")
    return priority


def _checked_timeout(text: str | None, limits: ServiceLimits) -> int | None:
    if text is None:
        return None
    timeout = integer_from("timeout", text)
    longest = LONGEST_TIMEOUT if limits.timeout is None else limits.timeout
    if not 1 <= timeout <= longest:
        raise BadRequest(f"timeout: must be from 1 to {longest} seconds in this service")
    return timeout


def _checked_resources(
    fields: Mapping[str, str], limits: ServiceLimits
) -> tuple[int | None, int | None, int | None]:
    """Return what is asked for of cores, memory and GPUs; None where nothing is."""
    cpus = _parsed("cpus", fields, lambda text: jobs.parse_count(text, 1, jobs.MAX_CPUS))
    memory = _parsed("memory", fields, jobs.parse_memory)
    gpus = _parsed("gpus", fields, lambda text: jobs.parse_count(text, 0, jobs.MAX_GPUS))
    largest = limits.largest()
    if cpus is not None and cpus > largest.cpus:
        raise BadRequest(f"cpus: {cpus} is more than {largest.cpus}, the maximum of this service")
    if memory is not None and memory > largest.memory:
        asked, most = jobs.memory_text(memory), jobs.memory_text(largest.memory)
        raise BadRequest(f"memory: {asked} is more than {most}, the maximum of this service")
    if gpus is not None and gpus > largest.gpus:
        raise BadRequest(f"gpus: {gpus} is more than {largest.gpus}, the maximum of this service")
    return cpus, memory, gpus


def _parsed(name: str, fields: Mapping[str, str], parse: Callable[[str], int]) -> int | None:
    if name not in fields:
        return None
    try:
        return parse(fields[name])
    except ValueError as error:  # with a sentence for users
        raise BadRequest(f"{name}: {error}") from None


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
        raise BadRequest(f"tag: {key} is given more than once")
    if len(form.tags) == _MAX_TAGS:
        raise BadRequest(f"tag: there are more than {_MAX_TAGS}")
    form.tags[key] = _checked_text("tag", value, _MAX_TAG_VALUE_CHARACTERS)


def _check_files(names: set[str]) -> None:
    if not names:
        raise BadRequest("file: missing, at least one file is needed")
    if problem := jobs.file_names_problem(names):
        raise BadRequest(f"file: {problem}")
    if jobs.RUN_SCRIPT not in names:
        raise BadRequest(f"file: none of the files is named {jobs.RUN_SCRIPT}")
