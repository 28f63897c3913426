"""Which isolation this machine can give, and which a job gets: never weaker than asked.

Everything is tried out with a tiny job before it is offered. What can't be given is not
offered, with a sentence that says why; what is given and does not hold in every respect says
in which.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agent.isolation import bubblewrap, landlock, podman, wrapper
from agent.isolation.base import (
    Allotment,
    CannotIsolate,
    Confinement,
    Enclosure,
    JobUser,
    Place,
)
from agent.isolation.job_user import JobUsers, closed_to, hand_over, open_to_pass, owner_of
from agent.isolation.reach import Reach, survey
from agent.isolation.trial import problem_of, trial_place
from jobs import Isolation, IsolationKind, IsolationOffer
from telemetry.logs import event

log = logging.getLogger("orchestrator.isolation")

_ROOT = (
    "jobs run as root here, against which no isolation holds: start the agent with --job-user,"
    " or accept it with --allow-root-jobs"
)
_ROOT_NOTE = "jobs run as root, which can undo it: start the agent with --job-user"
_NO_ISOLATION = "jobs can read and write what the agent's user can"
_PODMAN_SECONDS = 60.0
_HAD_CONTAINERS = "had-containers"
_SOME_LIMITS = Allotment(cpus=1, memory=256 * 1024 * 1024)
_TRIED_AT_START = (IsolationKind.LANDLOCK, IsolationKind.BUBBLEWRAP)
_PROBLEMS: Mapping[IsolationKind, Callable[[], str | None]] = {
    IsolationKind.LANDLOCK: landlock.problem,
    IsolationKind.BUBBLEWRAP: bubblewrap.problem,
    IsolationKind.PODMAN: podman.problem,
}
_GAPS: Mapping[IsolationKind, Callable[[], list[str]]] = {
    IsolationKind.LANDLOCK: landlock.gaps,
    IsolationKind.BUBBLEWRAP: bubblewrap.gaps,
    IsolationKind.PODMAN: podman.gaps,
}


@dataclass(frozen=True, slots=True)
class IsolationSettings:
    """What an agent is told of isolation.

    ``default`` is what ``auto`` means here, itself ``auto`` for Landlock where the kernel has it.
    ``secrets`` are files that no job may see. ``users`` is for an agent that is root.
    """

    default: IsolationKind = IsolationKind.AUTO
    users: JobUsers | None = None
    are_root_jobs_allowed: bool = False
    secrets: tuple[Path, ...] = ()


class Isolator:
    """Confines the jobs of one agent. :meth:`try_out` comes first."""

    def __init__(
        self, workdir: Path, settings: IsolationSettings, environment: Mapping[str, str]
    ) -> None:
        """``environment`` is what all jobs inherit."""
        self._workdir = workdir
        self._settings = settings
        self._environment = environment
        self._reach = Reach((), (), ())
        self._default = settings.default
        self._problems: dict[IsolationKind, str] = {}
        self._network_problems: dict[IsolationKind, str] = {}
        self._image_problems: dict[Isolation, str | None] = {}
        self._podman_way = podman.WAYS[0]
        self._given_out: set[int] = set()
        self._trying = threading.Lock()  # one at a time has the place for trials

    # --- what can be given

    def try_out(self) -> None:
        """Find out what holds on this machine; takes some ten milliseconds.

        Raises :class:`CannotIsolate` if what the agent was told by name can't be given.
        """
        users = self._settings.users
        some_user = None if users is None else users.some()
        if some_user is not None:
            open_to_pass(self._workdir)
            if closed := closed_to(some_user, self._workdir):
                raise CannotIsolate(
                    f"job users can't get to the work directory {self._workdir}: {closed} is closed"
                    " to them; choose another place with --workdir"
                )
        self._reach = survey(self._workdir, self._settings.secrets, some_user)
        for kind in _TRIED_AT_START:
            # what holds without the network holds with it: one trial is enough, as a rule
            if problem := self._problem_without_network(kind):
                self._network_problems[kind] = problem
                if problem := self._problem_of_kind(kind):
                    self._problems[kind] = problem
        if problem := podman.problem():
            self._problems[IsolationKind.PODMAN] = problem
        self._choose_default()
        self._log()

    def offers(self) -> tuple[IsolationOffer, ...]:
        """Return what there is to say about each kind."""
        found: list[IsolationOffer] = []
        for kind, gaps in _GAPS.items():
            if problem := self._problems.get(kind):
                found.append(IsolationOffer(kind, False, (problem,)))
                continue
            notes = gaps()
            if problem := self._network_problems.get(kind):
                notes.append(f"the network can't be taken away: {problem}")
            if self._are_jobs_root():
                notes.append(_ROOT_NOTE)
            found.append(IsolationOffer(kind, True, tuple(notes)))
        return tuple(found)

    @property
    def default(self) -> IsolationKind:
        """What ``auto`` means here."""
        return self._default

    def problem_with(self, isolation: Isolation) -> str | None:
        """Say why this agent can't give what a service asks for, or None if it can.

        May try out an image, which takes seconds.
        """
        if problem := isolation.problem():
            return problem
        if isolation.kind is IsolationKind.NONE:
            return None
        if isolation.kind is not IsolationKind.AUTO and self._is_refused_as_root():
            return f"{isolation.kind}: {_ROOT}"
        isolation = self._resolved(isolation)
        kind = isolation.kind
        if kind is IsolationKind.NONE:
            return None if isolation.network else "without an isolation the network stays open"
        problem = self._problems.get(kind) or (
            None if isolation.network else self._network_problems.get(kind)
        )
        problem = problem or self._reach.problem_with(isolation)
        if problem is None and kind is IsolationKind.WRAPPER:
            problem = wrapper.problem_with(isolation.wrapper)
        if problem is None and kind is IsolationKind.PODMAN:
            problem = self._problem_with_image(isolation)
        return None if problem is None else f"{kind}: {problem}"

    # --- what a job gets

    def enclose(
        self,
        isolation: Isolation,
        place: Place,
        argv: Sequence[str],
        variables: Mapping[str, str],
        allotment: Allotment | None = None,
    ) -> Enclosure:
        """Make a job's place ready and say how it is started, before it was.

        Raises :class:`CannotIsolate`, and :class:`OSError` if the disk does not take it.
        """
        if problem := self.problem_with(isolation):
            raise CannotIsolate(problem)
        user = self._user_of(place)
        resolved = self._resolved(isolation)
        if user is not None or resolved.kind is not IsolationKind.NONE:
            place.temporary.mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            hand_over(place, user)
        confinement = Confinement(
            resolved,
            place,
            tuple(argv),
            user,
            allotment or Allotment(),
            {**variables, **_variables_of(user, place)},
        )
        return self._enclose(confinement)

    def release(self, place: Place) -> None:
        """An attempt's directory is about to be removed: its user id is free again."""
        if self._given_out and (uid := owner_of(place)) is not None:
            self._given_out.discard(uid)

    def adopt(self, place: Place) -> None:
        """Take note of an attempt that an earlier process of the agent may have left."""
        users = self._settings.users
        if users is not None and (uid := owner_of(place)) is not None and users.covers(uid):
            self._given_out.add(uid)

    def clean_up(self, isolation: Isolation, place: Place) -> None:
        """Remove what a job that was ended has left outside of its directory."""
        if isolation.kind is IsolationKind.PODMAN:
            _run_podman(podman.removal(podman.container_name(place)))

    def sweep(self) -> None:
        """Remove the containers of attempts that are no longer here."""
        if not (self._workdir / _HAD_CONTAINERS).exists():
            return
        attempts = self._workdir / "attempts"
        for name in _run_podman(podman.listing(attempts)).split():
            if not (attempts / name.rpartition("-")[2]).exists():
                event(log, "container_removed", name=name)
                _run_podman(podman.removal(name))

    # --- parts

    def _enclose(self, confinement: Confinement) -> Enclosure:
        match confinement.isolation.kind:
            case IsolationKind.LANDLOCK:
                return landlock.enclose(confinement, self._reach)
            case IsolationKind.BUBBLEWRAP:
                return bubblewrap.enclose(confinement, self._reach)
            case IsolationKind.PODMAN:
                (self._workdir / _HAD_CONTAINERS).touch()
                return podman.enclose(confinement, self._podman_way)
            case IsolationKind.WRAPPER:
                return wrapper.enclose(confinement)
            case _:
                return _without(confinement)

    def _resolved(self, isolation: Isolation) -> Isolation:
        if isolation.kind is IsolationKind.AUTO:
            return replace(isolation, kind=self._default)
        return isolation

    def _are_jobs_root(self) -> bool:
        return os.geteuid() == 0 and self._settings.users is None

    def _is_refused_as_root(self) -> bool:
        return self._are_jobs_root() and not self._settings.are_root_jobs_allowed

    def _user_of(self, place: Place) -> JobUser | None:
        """Return whom a job runs as: the one it was handed over to before, or a free one."""
        users = self._settings.users
        if users is None:
            return None
        before = owner_of(place)
        if before is not None and users.has_range and users.covers(before):
            return JobUser(before, before)
        user = users.free(self._given_out)
        if users.has_range:
            self._given_out.add(user.uid)
        return user

    def _problem_of_kind(self, kind: IsolationKind) -> str | None:
        return _PROBLEMS[kind]() or self._tried(Isolation(kind))

    def _problem_without_network(self, kind: IsolationKind) -> str | None:
        if problem := _PROBLEMS[kind]():
            return problem
        if kind is IsolationKind.LANDLOCK and not landlock.can_take_network():
            return "the kernel's Landlock has no rules for it, or there is no system call filter"
        return self._tried(Isolation(kind, network=False))

    def _tried(self, isolation: Isolation, allotment: Allotment | None = None) -> str | None:
        users = self._settings.users
        user = None if users is None else users.some()
        with self._trying, trial_place(self._workdir, user) as place:
            variables = _variables_of(user, place)
            confinement = Confinement(
                isolation,
                place,
                user=user,
                allotment=allotment or Allotment(),
                variables=variables,
            )
            return problem_of(place, self._enclose(confinement), self._environment)

    def _problem_with_image(self, isolation: Isolation) -> str | None:
        """Try an image out, in each way until one works; the answer is kept if it is good."""
        if self._image_problems.get(isolation, "untried") is None:
            return None
        assert isolation.image is not None
        if not _has_image(isolation.image):
            return (
                f"the image {isolation.image} is not on this machine: podman pull {isolation.image}"
            )
        problem: str | None = None
        for way in dict.fromkeys((self._podman_way, *podman.WAYS)):
            self._podman_way = way
            problem = self._tried(isolation, _SOME_LIMITS)
            if problem is None:
                event(
                    log, "image", image=isolation.image, runtime=way.runtime, limits=way.has_limits
                )
                break
        self._image_problems[isolation] = problem
        return problem

    def _choose_default(self) -> None:
        asked = self._settings.default
        if asked is IsolationKind.AUTO:
            has_landlock = IsolationKind.LANDLOCK not in self._problems
            self._default = IsolationKind.LANDLOCK if has_landlock else IsolationKind.NONE
        elif problem := self.problem_with(Isolation(asked)):
            raise CannotIsolate(f"--isolation {problem}")

    def _log(self) -> None:
        for offer in self.offers():
            event(
                log,
                "isolation",
                kind=offer.kind,
                given=offer.is_given,
                notes="; ".join(offer.notes),
            )
        if self._default is IsolationKind.NONE:
            event(log, "no_isolation", level=logging.WARNING, advice=_NO_ISOLATION)
        if self._are_jobs_root():
            event(log, "jobs_run_as_root", level=logging.WARNING, advice=_ROOT_NOTE)


def _variables_of(user: JobUser | None, place: Place) -> dict[str, str]:
    if user is None:
        return {}
    name = user.name or str(user.uid)
    return {"HOME": user.home or str(place.temporary), "USER": name, "LOGNAME": name}


def _without(confinement: Confinement) -> Enclosure:
    user = confinement.user
    if user is None:
        return Enclosure(confinement.argv, confinement.variables)
    return Enclosure(
        confinement.argv,
        {**confinement.variables, "TMPDIR": str(confinement.place.temporary)},
        {"own": {"user": user.ids(), "new_privileges": False}},
    )


def _has_image(image: str) -> bool:
    found = subprocess.run(
        ["podman", "image", "exists", image],
        capture_output=True,
        check=False,
        timeout=_PODMAN_SECONDS,
    )
    return found.returncode == 0


def _run_podman(command: Sequence[str]) -> str:
    """Run a command that tidies up, and return what it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=_PODMAN_SECONDS, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        event(log, "podman_failed", level=logging.WARNING, error=str(error))
        return ""
    return done.stdout
