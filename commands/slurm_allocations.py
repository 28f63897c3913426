"""How many agents should be in allocations of Slurm, and what an allocation runs. Pure."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.executors.slurm_commands import SlurmJob, Standing
from config import ConfigError

AGENT_PREFIX = "slurm-"
"""An agent is named after the number of its allocation."""

_MAX_WAITING = 2  # one that has not started, and one more
_WARNING_SECONDS = 60
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")

_SCRIPT = """\
#!/bin/sh
# An agent of Orchestrator for as long as this allocation lasts, or until nothing is left to do.
work=$(mktemp -d "${{TMPDIR:-/tmp}}/orchestrator-agent.XXXXXXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
{command} --name "{prefix}$SLURM_JOB_ID" --workdir "$work" \\
    --end-time "$(($(date +%s) + {seconds}))" < /dev/null &
agent=$!
trap 'kill -TERM "$agent"' TERM
wait "$agent"
code=$?
# a signal ends wait before its time
while kill -0 "$agent" 2> /dev/null; do
    wait "$agent"
    code=$?
done
exit "$code"
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows: agents at a time, and slots of each."""

    agents: int
    slots: int


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """An agent as the server shows it, as far as it counts here."""

    name: str
    free_slots: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done now, and in words why."""

    submit: int
    withdraw: tuple[int, ...]
    why: str


def plan(
    queued: int, agents: Sequence[AgentSeen], allocations: Iterable[SlurmJob], limits: Limits
) -> Plan:
    """Decide what to submit, and which allocations that have not started to take back.

    ``queued`` jobs wait for a slot, ``agents`` are those connected that could have them.
    """
    names = {agent.name for agent in agents}
    living = [each for each in allocations if each.standing is not Standing.ENDED]
    waiting = [each for each in living if each.standing is Standing.WAITS]
    coming = [each for each in living if f"{AGENT_PREFIX}{each.id}" not in names]
    if not queued:
        return Plan(0, tuple(each.id for each in waiting), "no job is queued")
    free = sum(agent.free_slots for agent in agents)
    if free:
        # they wait for something else than a slot: a quota, or more memory than these have
        return Plan(0, (), f"{queued} queued, {free} slots free")
    missing = math.ceil(queued / limits.slots) - len(coming)
    room = limits.agents - len(living)
    submit = max(0, min(missing, room, _MAX_WAITING - len(waiting)))
    why = (
        f"{queued} queued, no slot free, {len(living)} allocations, {len(waiting)} of them pending"
    )
    return Plan(submit, (), why)


def allocation_key(server: str, services: Sequence[str] | None) -> str:
    """Return by what the allocations of this command are told from those of another."""
    text = "\n".join([server, *(services or ())])
    return f"orchestrator-agent-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is asked of Slurm for an agent. The paths are those on the nodes."""

    name: str
    server: str
    program: Sequence[str]
    token_file: Path
    output: Path
    slots: int
    services: Sequence[str] | None
    seconds: int
    idle_seconds: float
    drain_seconds: float
    options: Sequence[str]

    def arguments(self) -> list[str]:
        """Return the options for sbatch: ours that may be changed, the operator's, then ours."""
        return [
            f"--cpus-per-task={self.slots}",
            *self.options,
            f"--job-name={self.name}",
            f"--output={str(self.output / 'allocation-').replace('%', '%%')}%j.log",
            f"--chdir={self.output}",
            *("--nodes=1", "--ntasks=1", "--no-requeue"),
            f"--signal=B:TERM@{_WARNING_SECONDS}",
            f"--time={math.ceil(self.seconds / 60)}",
        ]

    def script(self) -> str:
        """Return the batch script. The token is in a file that the agent reads."""
        command = [
            *self.program,
            *("agent", "--server", self.server, "--slots", str(self.slots)),
            *("--token-file", str(self.token_file)),
            *("--idle-exit", f"{self.idle_seconds:g}"),
            *("--drain-timeout", f"{self.drain_seconds:g}"),
        ]
        if self.services is not None:
            command += ["--services", ",".join(self.services)]
        return _SCRIPT.format(
            command=shlex.join(command), prefix=AGENT_PREFIX, seconds=self.seconds
        )


def seconds_of(text: str) -> int:
    """Parse a time as sbatch takes it: minutes, minutes:seconds, h:m:s, days-hours:m:s.

    Raises :class:`ConfigError`.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"--time: {text!r} is no time like 30, 4:00:00 or 1-12:00:00")
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"] is not None:
        hours, minutes, seconds = int(match["days"]) * 24 + first, second, third
    elif match["third"] is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return (hours * 60 + minutes) * 60 + seconds
