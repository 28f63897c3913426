"""The public HTTP API put together: every route with its role, and what stands before them."""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web
from aiohttp_swagger3 import SwaggerFile, SwaggerUiSettings

from api.access_log import note_route
from api.agent_channel import AgentChannelHandlers
from api.dashboard import DashboardHandlers
from api.errors import answer_errors, note_beginning
from api.events import EventHandlers
from api.files import FileHandlers
from api.filters import FILTERS
from api.guard import add_security_headers, refuse_expectations, refuse_strangers
from api.jobs import JobHandlers
from api.many import ManyJobsHandlers
from api.operations import OperationHandlers
from api.output import OutputHandlers
from api.parameters import refuse_unknown
from api.routes import Policy, Route
from api.statistics import StatisticsHandlers
from api.token_list import TokenListHandlers
from api.tokens import TokenGate
from api.uploads import SubmitHandlers
from config import SettingsInForce
from dispatch import Dispatcher
from records import Role
from runtime import data_file
from store import READERS, Store
from telemetry.instruments import Instruments

_LONG_READS = READERS - 1
_NONE: frozenset[str] = frozenset()
_LAST_EVENT = frozenset({"last_event_id"})
_LOG_PARAMETERS = frozenset({"stream", "follow", "offset"})


def make_application(
    store: Store,
    dispatcher: Dispatcher,
    settings: SettingsInForce,
    agent_digests: frozenset[str],
    instruments: Instruments | None = None,
) -> web.Application:
    """Put the API together.

    ``agent_digests`` are of the tokens that agents may present, ``instruments`` are those of this
    server (new ones if there are none).
    """
    table = routes(store, dispatcher, settings, agent_digests, instruments or Instruments())
    policy = Policy(table)
    gate = TokenGate(store, policy, settings)
    guards = [
        *(refuse_strangers(settings), gate.middleware()),
        *(refuse_unknown(policy), refuse_expectations),
    ]
    application = web.Application(middlewares=[note_route, answer_errors, *guards])
    application.on_cleanup.append(gate.close)
    application.on_response_prepare.append(note_beginning)
    application.on_response_prepare.append(add_security_headers)
    swagger = SwaggerFile(
        application,
        spec_file=str(data_file("openapi.yaml")),
        # requests are checked by our own code, in our own words
        validate=False,
        # the default validator is a public web site; the page must not need the network
        swagger_ui_settings=SwaggerUiSettings(path="/swagger-ui/", validatorUrl=None),
    )
    for route in table:
        methods = (
            {route.method, hdrs.METH_HEAD} if route.method == hdrs.METH_GET else {route.method}
        )
        for method in methods:
            swagger.add_route(
                method, route.path, route.handler, expect_handler=_ask_for_nothing_yet
            )
    return application


def routes(
    store: Store,
    dispatcher: Dispatcher,
    settings: SettingsInForce,
    agent_digests: frozenset[str],
    instruments: Instruments,
) -> tuple[Route, ...]:
    """Return all routes: who answers, and who may ask."""
    # replays and searches of archives are many reads in a row; others come in between
    long_reads = asyncio.Semaphore(_LONG_READS)
    files = FileHandlers(store, dispatcher, long_reads)
    submit = SubmitHandlers(store, dispatcher, settings)
    operations = OperationHandlers(store, dispatcher, settings, instruments)
    jobs = JobHandlers(store, dispatcher)
    many = ManyJobsHandlers(store, dispatcher, settings)
    output = OutputHandlers(store)
    events = EventHandlers(store, long_reads)
    statistics = StatisticsHandlers(store)
    tokens = TokenListHandlers(store)
    dashboard = DashboardHandlers()
    agents = AgentChannelHandlers(dispatcher, agent_digests)
    read, submitting, admin = Role.READ, Role.SUBMIT, Role.ADMIN
    return (
        Route("GET", "/", dashboard.ping, None),
        # files that ship with the program, no data
        Route("GET", "/ui", dashboard.enter, None),
        Route("GET", "/ui/", dashboard.page, None),
        Route("GET", "/ui/{path:.+}", dashboard.file, None),
        Route("GET", "/health", operations.health, None),
        # agents have a token of their own
        Route("GET", "/agent", agents.serve, None),
        Route("POST", "/upload", submit.upload, submitting, _NONE, True),
        Route("GET", "/download/{id}", files.download, read, frozenset({"wait"})),
        Route("GET", "/download_partial/{id}", files.download_partial, read),
        Route("POST", "/terminate/{id}", jobs.terminate, submitting),
        Route("GET", "/jobs", jobs.find, read, FILTERS | {"limit", "cursor"}, True),
        Route("GET", "/jobs/counts", jobs.counts, read, FILTERS, True),
        Route("POST", "/jobs/terminate", many.terminate, submitting, FILTERS, True),
        Route("POST", "/jobs/rerun", many.rerun, submitting, FILTERS, True),
        Route("POST", "/jobs/delete", many.delete, submitting, FILTERS, True),
        Route("GET", "/jobs/{id}", jobs.show, read),
        Route("DELETE", "/jobs/{id}", jobs.delete, submitting),
        Route("GET", "/jobs/{id}/history", jobs.history, read),
        Route("GET", "/jobs/{id}/events", events.of_job, read, _LAST_EVENT),
        Route("GET", "/jobs/{id}/logs", output.logs, read, _LOG_PARAMETERS),
        Route("GET", "/jobs/{id}/files", files.list_files, read, frozenset({"cursor"})),
        Route("GET", "/jobs/{id}/files/{path:.+}", files.get_file, read),
        Route("POST", "/jobs/{id}/rerun", submit.rerun, submitting),
        Route("GET", "/events", events.of_all, read, _LAST_EVENT | {"user_id", "service"}, True),
        Route("GET", "/agents", operations.agents, read, _NONE, True),
        Route("POST", "/agents/{name}/drain", operations.drain_agent, admin),
        Route("POST", "/agents/{name}/resume", operations.resume_agent, admin),
        Route("GET", "/services", operations.services, read, _NONE, True),
        Route("GET", "/metrics", operations.metrics, read, _NONE, True),
        Route("GET", "/stats", statistics.show, read, frozenset({"period", "service"}), True),
        Route("GET", "/token", tokens.show_own, read, _NONE, True),
        Route("GET", "/tokens", tokens.list_all, admin),
    )


async def _ask_for_nothing_yet(_: web.Request) -> None:
    """For aiohttp, which asks for a body before anybody has looked at the token."""
