"""The public HTTP API: parse, call, answer; one error shape, made in one place."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import hdrs, web
from aiohttp_swagger3 import SwaggerFile, SwaggerUiSettings

from api import form as api_form
from api.access_log import note_route
from api.answers import (
    UnknownJob,
    answer_errors,
    error_answer,
    job_answer,
    job_id_of,
)
from api.events import EventHandlers
from api.files import FileHandlers
from api.guard import is_loopback, refuse_strangers
from api.jobs import JobHandlers
from api.operations import OperationHandlers
from api.output import OutputHandlers
from api.tokens import TokenGate
from api.uploads import SubmitHandlers
from config import SettingsInForce
from dispatch import Dispatcher
from runtime import data_file
from store import Store
from telemetry.instruments import Instruments
from wire.codec import MAX_TEXT_BYTES

log = logging.getLogger("orchestrator.api")


def make_application(
    store: Store,
    dispatcher: Dispatcher,
    settings: SettingsInForce,
    agent_token: str,
    instruments: Instruments | None = None,
) -> web.Application:
    """Put the API together.

    ``agent_token`` is what agents must present, ``instruments`` are those of this server (new
    ones if there are none).
    """
    api = _Api(store, dispatcher, settings, agent_token)
    files = FileHandlers(store, dispatcher)
    submit = SubmitHandlers(store, dispatcher, settings)
    operations = OperationHandlers(store, dispatcher, settings, instruments or Instruments())
    jobs = JobHandlers(store, dispatcher)
    output = OutputHandlers(store)
    events = EventHandlers(store)
    gate = TokenGate(store)
    guards = [refuse_strangers(settings), gate.middleware()]
    application = web.Application(middlewares=[note_route, answer_errors, *guards])
    application.on_cleanup.append(gate.close)
    application.on_response_prepare.append(_add_security_headers)
    swagger = SwaggerFile(
        application,
        spec_file=str(data_file("openapi.yaml")),
        # the default validator is a public web site; the page must not need the network
        swagger_ui_settings=SwaggerUiSettings(path="/swagger-ui/", validatorUrl=None),
    )
    swagger.add_get("/", api.ping)
    swagger.add_get("/health", operations.health)
    swagger.add_get("/agents", operations.agents)
    swagger.add_post("/agents/{name}/drain", operations.drain_agent, validate=False)
    swagger.add_post("/agents/{name}/resume", operations.resume_agent, validate=False)
    swagger.add_get("/services", operations.services)
    swagger.add_get("/metrics", operations.metrics)
    swagger.add_post("/upload", submit.upload, validate=False, expect_handler=api_form.ask_for_body)
    swagger.add_get("/download/{id}", files.download, validate=False)
    swagger.add_post("/jobs/{id}/rerun", submit.rerun, validate=False)
    swagger.add_get("/download_partial/{id}", files.download_partial, validate=False)
    swagger.add_get("/jobs/{id}/logs", output.logs, validate=False)
    swagger.add_get("/jobs/{id}/files", files.list_files, validate=False)
    swagger.add_get("/jobs/{id}/files/{path:.+}", files.get_file, validate=False)
    swagger.add_post("/terminate/{id}", api.terminate, validate=False)
    swagger.add_get("/jobs", jobs.find, validate=False)
    swagger.add_get("/jobs/{id}", jobs.show, validate=False)
    swagger.add_get("/jobs/{id}/history", jobs.history, validate=False)
    swagger.add_get("/jobs/{id}/events", events.of_job, validate=False)
    swagger.add_get("/events", events.of_all, validate=False)
    swagger.add_get("/agent", api.agent, validate=False)
    _add_missing_heads(application)
    return application


async def _add_security_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Content-Type-Options"] = "nosniff"


def _add_missing_heads(application: web.Application) -> None:
    """Allow HEAD where GET is (RFC 9110, 9.3.2), on the documentation's own routes too."""
    for resource in application.router.resources():
        handlers = {route.method: route.handler for route in resource}
        if "GET" in handlers and "HEAD" not in handlers and isinstance(resource, web.Resource):
            resource.add_route("HEAD", handlers["GET"])


# --- handlers ---------------------------------------------------------------------


class _Api:
    def __init__(
        self, store: Store, dispatcher: Dispatcher, settings: SettingsInForce, agent_token: str
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._agent_token = agent_token
        self._agent_token_needed = not is_loopback(settings.current.host)

    async def ping(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="Orchestrator is running\n")

    async def terminate(self, request: web.Request) -> web.StreamResponse:
        job_id = job_id_of(request)
        # a client that goes away does not take back what it asked for
        job = await asyncio.shield(self._dispatcher.terminate(job_id))
        if job is None:
            raise UnknownJob
        return job_answer(job)

    async def agent(self, request: web.Request) -> web.StreamResponse:
        if not self._is_agent_allowed(request):
            log.warning("event=agent_token_refused address=%s", request.remote)
            return error_answer(401, "a valid agent token is needed here")
        channel = _AgentSocket(
            heartbeat=None, compress=False, max_msg_size=MAX_TEXT_BYTES, timeout=1.0
        )
        if not channel.can_prepare(request):
            return error_answer(400, "this path is for agents, which open a WebSocket here")
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


class _AgentSocket(web.WebSocketResponse):
    """aiohttp's WebSocket, read as text and bytes only."""

    async def frames(self) -> AsyncIterator[str | bytes]:
        async for message in self:
            if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                yield message.data
