"""What an agent is told at its start, and its refusal to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.isolation.choice import IsolationSettings


class AgentRefused(Exception):
    """The server does not want this agent, and trying again won't help."""


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent is told; ``services`` None offers all, ``slots`` is jobs at a time."""

    server: str
    name: str
    slots: int
    services: tuple[str, ...] | None
    workdir: Path
    token: str | None = field(default=None, repr=False)
    isolation: IsolationSettings = field(default_factory=IsolationSettings)
