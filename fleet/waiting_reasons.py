"""Why a job waits, in words: what it needs, and where that is missing."""

from __future__ import annotations

from collections.abc import Iterable

from config import ServiceLimits
from fleet.agent import Agent
from jobs import Resources, memory_text

_ORDER = ("gpus", "memory", "cpus")  # of what is missing, the scarcest is named


def why_waiting(
    agents: Iterable[Agent],
    service: str,
    needed: Resources,
    limits: ServiceLimits | None,
    active_of_user: int,
    active_of_service: int,
) -> str:
    """Say what a queued job waits for; ``limits`` None: its service is not configured."""
    if limits is None:
        return "this service is not configured"
    if reason := _why_no_agent(agents, service, needed):
        return reason
    if active_of_user >= limits.runs_per_user:
        return f"user limit {active_of_user} of {limits.runs_per_user}"
    if active_of_service >= limits.max_runs:
        return f"service limit {active_of_service} of {limits.max_runs}"
    return _why_none_is_free(agents, service, needed) or "next"


def _why_no_agent(agents: Iterable[Agent], service: str, needed: Resources) -> str | None:
    """Say why no agent that is there could ever take the job; None if one could."""
    connected = [agent for agent in agents if agent.connection is not None]
    named = [agent for agent in connected if agent.names(service)]
    offering = [agent for agent in named if agent.offers(service)]
    if not connected:
        return "no agent is connected"
    if not named:
        return "no agent offers this service"
    if not offering:
        reasons = "; ".join(sorted(f"{agent.name}: {agent.unable[service]}" for agent in named))
        return f"no agent can isolate its jobs as it asks ({reasons})"
    able = [agent for agent in offering if needed.fits(agent.total())]
    if not able and not all(agent.takes_nothing_new() for agent in offering):
        return _what_is_too_large(offering, needed)
    if all(agent.takes_nothing_new() for agent in able):
        return "all agents that offer this service are drained"
    return None


def _why_none_is_free(agents: Iterable[Agent], service: str, needed: Resources) -> str | None:
    """Say what is missing on the agents that could take the job; None if one could now."""
    able = [
        agent
        for agent in agents
        if agent.may_get_jobs() and agent.offers(service) and needed.fits(agent.total())
    ]
    if not able:
        return _who_is_set_aside(agents, service)
    if all(agent.withholds(service) for agent in able):
        names_and_reasons = {agent.name: agent.trust.services[service].reason for agent in able}
        name = min(names_and_reasons)
        return f"this service is set aside on agent {name}: {names_and_reasons[name]}"
    able = [agent for agent in able if not agent.withholds(service)]
    with_slot = [agent for agent in able if agent.free_slots() > 0]
    if not with_slot:
        return "all slots busy"
    free = [agent.total() - agent.in_use for agent in with_slot]
    if any(needed.fits(resources) for resources in free):
        return None
    names = sorted(agent.name for agent in with_slot)
    where = names[0] if len(names) == 1 else f"one of {len(names)} agents"
    for name in _ORDER:
        wanted = getattr(needed, name)
        if all(getattr(resources, name) < wanted for resources in free):
            return f"waits for {_amount(name, wanted)} on {where}"
    return f"waits for room on {where}"


def _who_is_set_aside(agents: Iterable[Agent], service: str) -> str:
    for agent in agents:
        if agent.offers(service) and (reason := agent.trust.own.set_aside()):
            return f"agent {agent.name} is set aside: {reason}"
    return "all slots busy"


def _what_is_too_large(agents: Iterable[Agent], needed: Resources) -> str:
    """Name the amount that is above what every agent has, or the whole if it is none alone."""
    totals = [agent.total() for agent in agents if not agent.takes_nothing_new()]
    for name in _ORDER:
        wanted, largest = getattr(needed, name), max(getattr(total, name) for total in totals)
        if wanted > largest:
            has = _amount(name, largest)
            return (
                f"needs {_amount(name, wanted)}; the largest agent that offers this service"
                f" has {has.split()[0] if name != 'memory' else has}"
            )
    return "no agent that offers this service has all that it needs at once"


def _amount(name: str, value: int) -> str:
    match name:
        case "memory":
            return f"{memory_text(value)} of memory"
        case "gpus":
            return "1 GPU" if value == 1 else f"{value} GPUs"
        case _:
            return "1 core" if value == 1 else f"{value} cores"
