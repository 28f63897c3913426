"""Which role each path needs. Pure, without I/O."""

from __future__ import annotations

from records import Role

_OPEN_PATHS = frozenset(
    {
        *("/", "/health"),
        # has a token of its own
        "/agent",
        # the documentation: a page and a description that ship with the program, no data
        *("/swagger-ui", "/swagger-ui/", "/swagger-ui/swagger.json"),
        "/swagger-ui/swagger_ui_static",
    }
)

_SUBMIT_PATHS = frozenset({"/upload", "/terminate/{id}", "/jobs/{id}/rerun"})

_READING = frozenset({"GET", "HEAD"})

_PATHS_FOR_BOUND_TOKENS = frozenset(
    {
        # their handlers ask whose jobs they may show or make
        *("/upload", "/jobs", "/events"),
        # nobody's jobs
        *("/agents", "/services", "/metrics"),
    }
)


def needed_role(method: str, path: str | None) -> Role | None:
    """Return the role that a route needs, None if it is open to all.

    ``path`` is the route's, with its variables in braces; None for what is not there, of
    which only who has a token hears. What this module does not know only admins may do.
    """
    if path in _OPEN_PATHS:
        return None
    if path is None or method in _READING:
        return Role.READ
    return Role.SUBMIT if path in _SUBMIT_PATHS else Role.ADMIN


def is_for_bound_tokens(path: str | None) -> bool:
    """Whether a route without a job in its path is safe for tokens that are bound to a user."""
    return path is None or path in _PATHS_FOR_BOUND_TOKENS
