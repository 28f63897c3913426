"""Which jobs are asked for, in lists, in counts, and where something is done to many."""

from __future__ import annotations

from aiohttp import web

from api.callers import user_asked_for
from api.errors import BadRequest
from api.parameters import id_from, state_from, tag_from, time_from
from records import JobFilter

FILTERS = frozenset({"id", "user_id", "service", "status", "agent", "since", "text", "tag"})
"""The names of the parameters that filter jobs."""

_MAX_IDS = 1000


def filter_of(request: web.Request) -> JobFilter:
    """Return which jobs are asked for; raises :class:`BadRequest`."""
    query = request.query
    ids = query.getall("id", [])
    if len(ids) > _MAX_IDS:
        raise BadRequest(f"id: there are more than {_MAX_IDS}")
    return JobFilter(
        user_id=user_asked_for(request),
        service=query.get("service"),
        states=frozenset(
            state_from(word) for text in query.getall("status", []) for word in text.split(",")
        ),
        ids=frozenset(id_from(text) for text in ids),
        agent=query.get("agent"),
        since=time_from(query["since"]) if "since" in query else None,
        text=query.get("text"),
        tags=tuple(tag_from(text) for text in query.getall("tag", [])),
    )


def demanded_filter_of(request: web.Request) -> JobFilter:
    """Return the same, but refuse a request without any: nobody means all jobs by chance."""
    if not FILTERS & request.query.keys():
        raise BadRequest(f"a filter is needed, at least one of {', '.join(sorted(FILTERS))}")
    return filter_of(request)
