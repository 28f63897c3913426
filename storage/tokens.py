"""Who may do what: roles, tokens, and the role that each path needs. Pure, without I/O."""

from __future__ import annotations

import enum
import hashlib
import secrets
from dataclasses import dataclass

_SECRET_BYTES = 32


class Role(enum.StrEnum):
    """What a token allows; each role includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        """Whether this role allows what ``other`` does."""
        roles = list(Role)
        return roles.index(self) >= roles.index(other)


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of an API token: whose jobs it reaches (None: everybody's), and how far.

    ``created_at`` in Unix seconds. The secret itself is nowhere.
    """

    name: str
    role: Role
    user_id: int | None
    created_at: float


def new_secret() -> str:
    """Return a new secret that can't be guessed."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def digest_of(secret: str) -> str:
    """Return what is stored of a secret: its SHA-256, in hex.

    A slow, salted hash protects passwords, which can be guessed. Nobody guesses 256 random
    bits, so it would protect nothing here, and cost every request its time. Looking a digest
    up tells by its timing nothing of use: who asks can't choose the digest.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


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
