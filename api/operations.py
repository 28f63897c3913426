"""What operators ask: is it well, what does it do, and the numbers for their monitoring."""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aiohttp import web

from api.answers import resources_body, rfc3339
from api.callers import may_administrate, user_restriction
from api.errors import NotFound
from config import VERSION, ServiceLimits, SettingsInForce
from dispatch import Dispatcher
from fleet.agent import AgentStatus
from jobs import JobState
from records import StoreError
from store import SQLITE_VERSION, Store
from telemetry import metrics
from telemetry.instruments import Instruments
from telemetry.metrics import Family

_HEALTH_SECONDS = 5.0


class OperationHandlers:
    """The handlers for operators."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        settings: SettingsInForce,
        instruments: Instruments,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._settings = settings
        self._instruments = instruments

    async def health(self, request: web.Request) -> web.StreamResponse:
        """``GET /health``: healthy is a server that can store jobs."""
        problem = await self._problem()
        body: dict[str, Any] = {
            "status": "healthy" if problem is None else "unhealthy",
            "version": VERSION,
            "database_writable": problem is None,
            "agents_connected": sum(agent.is_connected for agent in self._dispatcher.agents()),
            "uptime": round(self._instruments.uptime(), 3),
        }
        if problem is None:
            return web.json_response(body)
        return web.json_response({**body, "message": problem}, status=500)

    async def _problem(self) -> str | None:
        try:
            await asyncio.wait_for(self._store.probe(), _HEALTH_SECONDS)
        except StoreError as error:
            return str(error)
        except TimeoutError:
            return f"the store did not answer within {_HEALTH_SECONDS:g} s"
        return None

    # --- agents

    async def agents(self, request: web.Request) -> web.StreamResponse:
        """``GET /agents``: those that are connected, hold jobs, or are drained."""
        agents = sorted(self._dispatcher.agents(), key=lambda agent: (agent.name, agent.id))
        return web.json_response({"agents": [_agent_body(agent, request) for agent in agents]})

    async def drain_agent(self, request: web.Request) -> web.StreamResponse:
        """``POST /agents/{name}/drain``: what it holds it finishes, it gets nothing new."""
        drain = self._dispatcher.drain(request.match_info["name"])
        return _agent_answer(request, await asyncio.shield(drain))

    async def resume_agent(self, request: web.Request) -> web.StreamResponse:
        """``POST /agents/{name}/resume``: it may get jobs again."""
        resume = self._dispatcher.resume(request.match_info["name"])
        return _agent_answer(request, await asyncio.shield(resume))

    # --- services

    async def services(self, request: web.Request) -> web.StreamResponse:
        """``GET /services``: those that are configured, and those that have jobs all the same."""
        configured = self._settings.current.services
        agents = self._dispatcher.agents()
        bodies = [self._service_body(name, configured, agents) for name in self._service_names()]
        return web.json_response({"services": bodies})

    def _service_body(
        self,
        name: str,
        configured: Mapping[str, ServiceLimits],
        agents: list[AgentStatus],
    ) -> dict[str, Any]:
        limits = configured.get(name)
        counts = self._dispatcher.counts_of_service(name)
        jobs = self._instruments.jobs
        return {
            "name": name,
            "is_configured": limits is not None,
            "runs_per_user": None if limits is None else limits.runs_per_user,
            "max_runs": None if limits is None else limits.max_runs,
            "timeout": None if limits is None else limits.timeout,
            "resources": None if limits is None else resources_body(limits.needs(None, None, None)),
            "max_resources": None if limits is None else resources_body(limits.largest()),
            "active": counts.active,
            "queued": counts.waiting,
            "agents": sorted(
                {
                    a.name
                    for a in agents
                    if a.is_connected and (a.services is None or name in a.services)
                }
            ),
            "median_wait": _rounded(jobs.median_wait(name)),
            "median_run": _rounded(jobs.median_run(name)),
            "median_cpu": _rounded(jobs.median_cpu(name)),
            "median_memory": _whole(jobs.median_memory(name)),
        }

    # --- metrics

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """``GET /metrics``: the numbers, as Prometheus takes them."""
        text = metrics.exposition(self._families())
        headers = {"Content-Type": metrics.CONTENT_TYPE}
        return web.Response(body=text.encode(), headers=headers)

    def _families(self) -> Iterator[Family]:
        build: tuple[str, ...] = (VERSION, platform.python_version(), SQLITE_VERSION)
        yield metrics.labelled_gauge(
            "orchestrator_build_info", "What runs.", ("version", "python", "sqlite"), {build: 1}
        )
        yield metrics.gauge(
            "orchestrator_uptime_seconds", "Since the server started.", self._instruments.uptime()
        )
        yield self._jobs_family()
        yield from _agent_families(self._dispatcher.agents())
        yield from self._instruments.families()
        yield from self._store.families()
        yield from metrics.process_families()

    def _jobs_family(self) -> Family:
        jobs: Counter[tuple[str, ...]] = Counter()
        for service in self._service_names():
            waiting = self._dispatcher.counts_of_service(service).waiting
            jobs[service, JobState.QUEUED.value] = waiting
        jobs.update((service, state.value) for service, state in self._dispatcher.active_jobs())
        return metrics.labelled_gauge(
            "orchestrator_jobs",
            "Jobs that have not ended, by state.",
            ("service", "state"),
            jobs,
        )

    def _service_names(self) -> list[str]:
        """Return the configured services, and those that have jobs all the same."""
        return sorted({*self._settings.current.services, *self._dispatcher.services_with_jobs()})


def _agent_families(agents: list[AgentStatus]) -> Iterator[Family]:
    connected = [agent for agent in agents if agent.is_connected]
    yield metrics.gauge("orchestrator_agents_connected", "Agents.", len(connected))
    yield metrics.gauge(
        "orchestrator_agents_away",
        "Agents that are not connected, but hold jobs or are drained.",
        len(agents) - len(connected),
    )
    yield metrics.gauge(
        "orchestrator_agents_drained",
        "Agents that get no jobs because an operator said so.",
        sum(agent.is_drained for agent in agents),
    )
    yield metrics.gauge(
        "orchestrator_agents_set_aside",
        "Agents that get one job on trial now and then, since they lost the last ones.",
        sum(agent.set_aside is not None for agent in agents),
    )
    yield metrics.gauge(
        "orchestrator_slots", "Slots of connected agents.", sum(agent.slots for agent in connected)
    )
    yield metrics.gauge(
        "orchestrator_slots_busy", "Slots in use.", sum(agent.busy for agent in connected)
    )


def _agent_answer(request: web.Request, agents: list[AgentStatus]) -> web.Response:
    if not agents:
        raise NotFound(f"there is no agent {request.match_info['name']!r:.80}")
    return web.json_response(_agent_body(agents[0], request))


def _agent_body(agent: AgentStatus, request: web.Request) -> dict[str, Any]:
    """Return what the caller may see of an agent: of its jobs their own, its id as an admin."""
    user_id = user_restriction(request)
    return {
        "name": agent.name,
        "id": agent.id if may_administrate(request) else None,
        "version": agent.version,
        "services": None if agent.services is None else list(agent.services),
        "slots": agent.slots,
        "busy": agent.busy,
        "resources": {
            "total": resources_body(agent.resources),
            "free": resources_body(agent.resources - agent.used),
        },
        "jobs": sorted(job.id for job in agent.jobs if user_id in (None, job.user_id)),
        "is_connected": agent.is_connected,
        "is_drained": agent.is_drained,
        "heartbeat_age": _rounded(agent.heartbeat_age),
        "load": agent.load,
        "problem": agent.problem,
        "connected_since": rfc3339(agent.connected_since),
        "address": agent.address,
        "lease_left": _rounded(agent.lease_left),
        "set_aside": agent.set_aside,
        "services_set_aside": _reasons(agent.services_set_aside),
        "isolation": {
            "default": agent.default_isolation,
            "kinds": [
                {"kind": offer.kind, "is_given": offer.is_given, "notes": list(offer.notes)}
                for offer in agent.isolation
            ],
            "not_offered": _reasons(agent.problems),
        },
    }


def _reasons(services: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"service": service, "reason": reason} for service, reason in services]


def _whole(amount: float | None) -> int | None:
    return None if amount is None else round(amount)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
