"""Whose request it is, and whose jobs it may see or make."""

from __future__ import annotations

from aiohttp import web

from api.errors import Forbidden
from api.parameters import user_id_from
from records import Role, Token

_CALLER = "caller"


def note_caller(request: web.Request, token: Token) -> None:
    """Remember the token that a request came with."""
    request[_CALLER] = token


def token_of(request: web.BaseRequest) -> Token | None:
    """Return the caller's token, None if none was needed."""
    token: Token | None = request.get(_CALLER)
    return token


def caller_name(request: web.BaseRequest) -> str:
    """Return the name of the caller's token, a dash if none was needed."""
    token = token_of(request)
    return "-" if token is None else token.name


def may_administrate(request: web.Request) -> bool:
    """Say whether the caller is an admin; all are where no tokens are demanded."""
    token = token_of(request)
    return token is None or token.role is Role.ADMIN


def user_restriction(request: web.Request) -> int | None:
    """Return the only user whose jobs the caller may see, None if it may see all."""
    token = token_of(request)
    return None if token is None else token.user_id


def check_user(request: web.Request, user_id: int) -> None:
    """Raise :class:`Forbidden` if the caller may not act for this user."""
    if user_restriction(request) not in (None, user_id):
        raise Forbidden(f"this token is not for user {user_id}")


def user_asked_for(request: web.Request) -> int | None:
    """Return the user whose jobs alone are asked for, or may be shown; None for all.

    The one place that decides it for lists and streams. Raises :class:`BadRequest`, and
    :class:`Forbidden` if the caller's token is bound to another user.
    """
    if "user_id" not in request.query:
        return user_restriction(request)
    user_id = user_id_from(request.query["user_id"])
    check_user(request, user_id)
    return user_id
