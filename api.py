"""The public HTTP API: parse, call, answer; one error shape, made in one place."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from aiohttp import BodyPartReader, MultipartReader, hdrs, web
from aiohttp.typedefs import Middleware
from aiohttp_swagger3 import SwaggerFile, SwaggerUiSettings

import protocol
from config import MAX_FILES, MAX_UPLOAD_BYTES, Settings
from dispatch import AlreadyFinal, Dispatcher
from protocol import JobState
from store import JobStatus, Store, StoredResult, StoreError, StoreFull, Upload

log = logging.getLogger("orchestrator.api")

_READ_BYTES = 256 * 1024
_FIELD_BYTES = 4096
_HEALTH_SECONDS = 5.0
_DIGITS = re.compile(r"[0-9]{1,19}")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_LARGEST_INTEGER = 2**63 - 1
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class BadUpload(Exception):
    """The request can't become a job; the message names the field."""


class UploadTooLarge(Exception):
    """The request is longer than the limit."""


def data_file(name: str) -> Path:
    """Return a file that ships with the program, beside the code or where pip puts data."""
    beside = Path(__file__).with_name(name)
    return beside if beside.exists() else Path(sys.prefix) / "share" / "orchestrator" / name


def make_application(
    store: Store, dispatcher: Dispatcher, settings: Settings, agent_token: str
) -> web.Application:
    """Put the API together. ``agent_token`` is what agents must present."""
    api = _Api(store, dispatcher, settings, agent_token)
    application = web.Application(middlewares=[_errors, _guard(settings)])
    application.on_response_prepare.append(_add_security_headers)
    swagger = SwaggerFile(
        application,
        spec_file=str(data_file("openapi.yaml")),
        # the default validator is a public web site; the page must not need the network
        swagger_ui_settings=SwaggerUiSettings(path="/swagger-ui/", validatorUrl=None),
    )
    swagger.add_get("/", api.ping)
    swagger.add_get("/health", api.health)
    swagger.add_post("/upload", api.upload, validate=False, expect_handler=_expect)
    swagger.add_get("/download/{id}", api.download, validate=False)
    swagger.add_post("/terminate/{id}", api.terminate, validate=False)
    swagger.add_get("/agent", api.agent, validate=False)
    _add_missing_heads(application)
    return application


def _add_missing_heads(application: web.Application) -> None:
    """Allow HEAD where GET is (RFC 9110, 9.3.2), on the documentation's own routes too."""
    for resource in application.router.resources():
        handlers = {route.method: route.handler for route in resource}
        if "GET" in handlers and "HEAD" not in handlers and isinstance(resource, web.Resource):
            resource.add_route("HEAD", handlers["GET"])


# --- answers ----------------------------------------------------------------------


def _error(status: int, message: str, job_id: int = 0) -> web.Response:
    body = {"id": job_id, "status": "Unknown", "message": message}
    return web.json_response(body, status=status)


def _job(job: JobStatus, status: int = 200) -> web.Response:
    body = {"id": job.id, "status": job.state.value, "message": job.message}
    return web.json_response(body, status=status)


async def _add_security_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Content-Type-Options"] = "nosniff"


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in the error shape; the one place where errors become statuses."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _of_http_exception(request, error)
    except BadUpload as error:
        return _error(400, str(error))
    except UploadTooLarge:
        limit = MAX_UPLOAD_BYTES // (1024 * 1024)
        return _error(413, f"the request is larger than {limit} MB")
    except AlreadyFinal as error:
        return _error(409, str(error), _job_id(request))
    except StoreFull as error:
        return _error(507, str(error))
    except StoreError as error:
        log.error("event=store_error path=%s error=%r", request.path, str(error))
        return _error(500, str(error))
    except ConnectionError:
        raise  # the client is gone, there is nobody to answer
    except Exception:
        log.exception("event=internal_error method=%s path=%s", request.method, request.path)
        return _error(500, "internal error; see the server's log")


def _of_http_exception(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if error.status < 400:
        raise error
    messages = {
        404: f"there is nothing at {request.path}",
        405: f"{request.path} does not allow {request.method}",
    }
    response = _error(error.status, messages.get(error.status, error.reason))
    if hdrs.ALLOW in error.headers:
        response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
    return response


# --- who may ask ------------------------------------------------------------------


def _guard(settings: Settings) -> Middleware:
    """Refuse what a web page of another site sends: a foreign Origin or a Host not ours.

    The Host check defeats DNS rebinding, the Origin check forged forms and scripts.
    """
    names = {name.lower() for name in (socket.gethostname(), socket.getfqdn())}
    names |= {settings.host.lower(), "localhost", *settings.allowed_hosts}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = _host_name(f"//{request.headers.get(hdrs.HOST, '')}")
        if host is None or not (host in names or _is_own_address(request, host)):
            return _error(403, "this Host is not a name of this server (see ALLOWED_HOSTS)")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and urlsplit(origin).netloc != request.headers[hdrs.HOST]:
            return _error(403, "requests from pages of another origin are refused")
        if origin is None and _is_cross_site_change(request):
            return _error(403, "requests from pages of another site are refused")
        return await handler(request)

    return guard


def _host_name(url: str) -> str | None:
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return None
    return name.lower() if name else None


def _is_own_address(request: web.Request, host: str) -> bool:
    """Whether ``host`` is the address, as a literal, that this connection came in on."""
    if host in _LOOPBACK_NAMES:
        return True
    if request.transport is None:
        return False
    own = request.transport.get_extra_info("sockname")
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address(own[0])
    except (ValueError, TypeError):
        return False


def _is_cross_site_change(request: web.Request) -> bool:
    site = request.headers.get("Sec-Fetch-Site", "none")
    return request.method not in ("GET", "HEAD") and site not in ("none", "same-origin")


def is_loopback(host: str) -> bool:
    """Whether a listening address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _job_id(request: web.Request) -> int:
    """Return the job id of the path; -1, which no job has, for what can't be one."""
    text = request.match_info["id"]
    job_id = int(text) if _DIGITS.fullmatch(text) else -1
    return job_id if job_id <= _LARGEST_INTEGER else -1


def _unknown_job(request: web.Request) -> web.Response:
    job_id = max(_job_id(request), 0)
    return _error(404, f"there is no job {request.match_info['id']}", job_id)


# --- handlers ---------------------------------------------------------------------


class _Api:
    def __init__(
        self, store: Store, dispatcher: Dispatcher, settings: Settings, agent_token: str
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._services = settings.services
        self._agent_token = agent_token
        self._agent_token_needed = not is_loopback(settings.host)

    async def ping(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="Orchestrator is running\n")

    async def health(self, request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.wait_for(self._store.probe(), _HEALTH_SECONDS)
        except StoreError as error:
            return web.json_response({"status": "unhealthy", "message": str(error)}, status=500)
        except TimeoutError:
            message = f"the store did not answer within {_HEALTH_SECONDS:g} s"
            return web.json_response({"status": "unhealthy", "message": message}, status=500)
        return web.json_response({"status": "healthy"})

    async def upload(self, request: web.Request) -> web.StreamResponse:
        if (request.content_length or 0) > MAX_UPLOAD_BYTES:
            raise UploadTooLarge
        if not request.content_type.startswith("multipart/form-data"):
            raise BadUpload("Content-Type: must be multipart/form-data")
        upload = self._store.new_upload()
        try:
            form = await _read_form(request, upload)
            service = self._checked_service(form.service)
            user_id = _checked_user_id(form.user_id)
            _check_files(form.files)
            message = "Job successfully uploaded"
            job = await upload.commit(user_id, service, message)
            self._dispatcher.enqueue(job)
        finally:
            await asyncio.shield(upload.abandon())
        log.info("event=uploaded job=%d user=%d service=%s", job.id, user_id, service)
        return _job(JobStatus(job.id, JobState.QUEUED, message), status=201)

    async def download(self, request: web.Request) -> web.StreamResponse:
        job_id = _job_id(request)
        job = await self._store.job_status(job_id)
        if job is None:
            return _unknown_job(request)
        if job.state is not JobState.COMPLETED:
            return _job(job)
        result = await self._store.result(job_id)
        if result is None:  # retention came between
            return _job(JobStatus(job_id, JobState.CLEANED, ""))
        return await self._send_result(request, job_id, result)

    async def terminate(self, request: web.Request) -> web.StreamResponse:
        job_id = _job_id(request)
        # a client that goes away does not take back what it asked for
        job = await asyncio.shield(self._dispatcher.terminate(job_id))
        return _unknown_job(request) if job is None else _job(job)

    async def _send_result(
        self, request: web.Request, job_id: int, result: StoredResult
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                hdrs.CONTENT_TYPE: "application/zip",
                hdrs.CONTENT_DISPOSITION: f'attachment; filename="job-{job_id}.zip"',
                hdrs.ETAG: f'"{result.sha256}"',
            }
        )
        response.content_length = result.size
        with self._store.pinned(result.blob_id):
            await response.prepare(request)
            offset = 0 if request.method == hdrs.METH_GET else result.size
            while offset < result.size:
                data = await self._store.read_chunk(result.blob_id, offset)
                await response.write(data)
                offset += len(data)
        await response.write_eof()
        return response

    async def agent(self, request: web.Request) -> web.StreamResponse:
        if not self._is_agent_allowed(request):
            log.warning("event=agent_token_refused address=%s", request.remote)
            return _error(401, "a valid agent token is needed here")
        channel = _AgentSocket(
            heartbeat=None, compress=False, max_msg_size=protocol.MAX_TEXT_BYTES, timeout=1.0
        )
        if not channel.can_prepare(request):
            return _error(400, "this path is for agents, which open a WebSocket here")
        await channel.prepare(request)
        try:
            await self._dispatcher.serve_agent(channel, request.remote or "")
        except Exception:
            # answered here: the connection speaks WebSocket now, an HTTP answer would be noise
            log.exception("event=agent_session_failed address=%s", request.remote)
            await channel.close(code=aiohttp.WSCloseCode.INTERNAL_ERROR, message=b"internal error")
        return channel

    def _is_agent_allowed(self, request: web.Request) -> bool:
        header = request.headers.get(hdrs.AUTHORIZATION)
        if header is None:
            return not self._agent_token_needed
        expected = f"Bearer {self._agent_token}"
        return hmac.compare_digest(
            header.encode("utf-8", "surrogateescape"), expected.encode("utf-8")
        )

    def _checked_service(self, service: str | None) -> str:
        if service is None:
            raise BadUpload("service: missing")
        if service not in self._services:
            raise BadUpload(f"service: unknown service {service!r:.80}")
        return service


class _AgentSocket(web.WebSocketResponse):
    """aiohttp's WebSocket, read as text and bytes only."""

    async def frames(self) -> AsyncIterator[str | bytes]:
        async for message in self:
            if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                yield message.data


# --- the upload form --------------------------------------------------------------


@dataclass(slots=True)
class _Form:
    files: set[str]
    user_id: str | None = None
    service: str | None = None


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Ask for the body only if it may come (RFC 9110, 10.1.1); the handler refuses the rest."""
    is_short_enough = (request.content_length or 0) <= MAX_UPLOAD_BYTES
    if is_short_enough and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


async def _read_form(request: web.Request, upload: Upload) -> _Form:
    """Read the whole form, its files into ``upload``."""
    form = _Form(files=set())
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            await _read_part(request, part, form, upload)
        if not reader.at_eof():
            raise BadUpload("the form ends too early")
        while await request.content.read(_READ_BYTES):
            _check_length(request)
    except (ValueError, AssertionError, RuntimeError, aiohttp.http_exceptions.HttpProcessingError):
        # what aiohttp's multipart reader raises for input that is not multipart
        raise BadUpload("the body is not well-formed multipart/form-data") from None
    except aiohttp.ClientPayloadError:
        raise BadUpload("the body ended before its announced length") from None
    return form


async def _read_part(
    request: web.Request, part: BodyPartReader | MultipartReader, form: _Form, upload: Upload
) -> None:
    if isinstance(part, MultipartReader):
        raise BadUpload("a part of the form is itself multipart")
    if part.headers.get("Content-Transfer-Encoding", "binary") not in ("binary", "8bit", "7bit"):
        raise BadUpload("Content-Transfer-Encoding is not allowed in forms (RFC 7578, 4.7)")
    name, file_name = _names_of(part)
    if file_name is not None and name != "file":
        raise BadUpload(f"{name!r:.80}: files must be sent in the field 'file'")
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
    form: _Form,
    upload: Upload,
) -> None:
    if name is None:
        raise BadUpload("file: must be sent as a file, with a file name")
    if problem := protocol.file_name_problem(name):
        raise BadUpload(f"file: the name {name[:80]!r} {problem}")
    if name in form.files:
        raise BadUpload(f"file: the name {name!r} is there twice")
    if len(form.files) == MAX_FILES:
        raise BadUpload(f"file: there are more than {MAX_FILES} files; send them as an archive")
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
        raise BadUpload(f"{name}: is there twice")
    value = bytearray()
    while data := await part.read_chunk(_FIELD_BYTES):
        _check_length(request)
        value += data
        if len(value) > _FIELD_BYTES:
            raise BadUpload(f"{name}: is too long")
    try:
        return value.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadUpload(f"{name}: is not UTF-8") from None


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


def _checked_user_id(text: str | None) -> int:
    if text is None:
        raise BadUpload("user_id: missing")
    if not _INTEGER.fullmatch(text):
        raise BadUpload("user_id: must be an integer")
    if not -_LARGEST_INTEGER - 1 <= int(text) <= _LARGEST_INTEGER:
        raise BadUpload("user_id: does not fit into 64 bits")
    return int(text)


def _check_files(names: set[str]) -> None:
    if not names:
        raise BadUpload("file: missing, at least one file is needed")
    if protocol.RUN_SCRIPT not in names:
        raise BadUpload(f"file: none of the files is named {protocol.RUN_SCRIPT}")
