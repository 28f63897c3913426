"""Routes: each stands once, with who answers, who may ask, and what may be asked."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from aiohttp import hdrs, web

from records import Role

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_DIGITS = re.compile(r"[0-9]{1,19}")
_MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. HEAD is allowed where GET is.

    ``role`` is what a token must allow, None for what is open to all. A path with ``{id}`` is about
    one job, and a token of one user reaches those of its user. Other paths are closed to such
    tokens unless ``is_for_bound_tokens``: the handler asks whose jobs it may show or make, or
    shows nobody's. ``query`` names the parameters that are understood; others are refused.
    """

    method: str
    path: str
    handler: Handler
    role: Role | None
    query: frozenset[str] = frozenset()
    is_for_bound_tokens: bool = False

    @property
    def canonical(self) -> str:
        """The path as the router calls it: variables without their patterns."""
        return re.sub(r"{(\w+):[^}]*}", r"{\1}", self.path)

    @property
    def is_about_a_job(self) -> bool:
        """Whether the path names a job."""
        return "{id}" in self.path


@dataclass(frozen=True, slots=True)
class Access:
    """What a request to some path needs; ``query`` None: its parameters are not ours."""

    role: Role | None
    is_about_a_job: bool
    is_for_bound_tokens: bool
    query: frozenset[str] | None


_OPEN = Access(None, False, True, None)
_NOT_THERE = Access(Role.READ, False, True, None)
_UNKNOWN = Access(Role.ADMIN, False, False, None)
_DOCUMENTATION = frozenset(
    {
        "/swagger-ui",
        "/swagger-ui/",
        "/swagger-ui/swagger.json",
        "/swagger-ui/swagger_ui_static",
    }
)
"""Routed by the documentation's library: a page and a description that ship with the program."""


class Policy:
    """Says what each request needs, from the table of routes."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._known: Mapping[tuple[str, str], Access] = {
            (route.method, route.canonical): Access(
                route.role, route.is_about_a_job, route.is_for_bound_tokens, route.query
            )
            for route in routes
        }

    def access_of(self, request: web.Request) -> Access:
        """Return what a request needs."""
        resource = request.match_info.route.resource
        return self.access(request.method, None if resource is None else resource.canonical)

    def access(self, method: str, path: str | None) -> Access:
        """Return what a method of a path needs; the path has its variables in braces.

        Of what is not there (None) only who has a token hears. What is there, but not in the
        table, only admins may do.
        """
        if path is None:
            return _NOT_THERE
        if path in _DOCUMENTATION:
            return _OPEN
        known = hdrs.METH_GET if method == hdrs.METH_HEAD else method
        return self._known.get((known, path), _UNKNOWN)


def job_id_of(request: web.Request) -> int:
    """Return the job id of the path; -1, which no job has, for what can't be one."""
    text = request.match_info["id"]
    job_id = int(text) if _DIGITS.fullmatch(text) else -1
    return job_id if job_id <= _MAX_INTEGER else -1
