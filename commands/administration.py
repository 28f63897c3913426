"""What operators do beside a server: tokens, backup, check."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from records import Role, StoreRefused, Token, digest_of
from storage.backup import back_up
from storage.check import UNSEEN, check
from storage.tokens import create_token, forget_tokens, list_tokens, new_secret, revoke_token

_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_USER_ID = re.compile(r"[+-]?[0-9]{1,19}")


def add_token_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a token and show it, this once")
    create.add_argument("--name", required=True, type=_token_name)
    create.add_argument(
        "--user", required=True, type=_token_user, help="whose jobs it reaches: a user id, or any"
    )
    create.add_argument("--role", required=True, choices=list(Role))
    revoke = actions.add_parser("revoke", help="make a token invalid, within a second")
    revoke.add_argument("name", metavar="NAME")
    forget = actions.add_parser("forget", help="open the API again, after the last was revoked")
    show = actions.add_parser("list", help="show what tokens there are")
    for action in (create, revoke, forget, show):
        action.add_argument("--db", dest="DB_PATH", default=argparse.SUPPRESS, metavar="FILE")


def _token_name(text: str) -> str:
    if not _TOKEN_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("use letters, digits, dot, dash and underscore")
    return text


def _token_user(text: str) -> int | None:
    if text == "any":
        return None
    if not _USER_ID.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError("must be a user id (64 bits), or any")
    return int(text)


def run_token_command(options: argparse.Namespace, path: str) -> None:
    """Make, revoke or list API tokens of a database; prints what was asked for."""
    match options.action:
        case "create":
            role = Role(options.role)
            _create_token(path, Token(options.name, role, options.user, time.time()))
        case "revoke":
            revoke_token(path, options.name)
            if not list_tokens(path):
                sys.stderr.write(
                    "That was the last token: nobody may use the API until you make another;"
                    " 'orchestrator token forget' opens it again, where tokens are optional.\n"
                )
        case "forget":
            forget_tokens(path)
            sys.stderr.write("Open to everybody who reaches it, where tokens are optional.\n")
        case _:
            for token in list_tokens(path):
                user = "any" if token.user_id is None else token.user_id
                created = f"{datetime.fromtimestamp(token.created_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
                sys.stdout.write(f"{token.name} user={user} role={token.role} created={created}\n")


def _create_token(path: str, token: Token) -> None:
    if token.role is Role.ADMIN and token.user_id is not None:
        raise StoreRefused("an admin steers everybody's jobs: use --user any")
    secret = new_secret()
    create_token(path, token, digest_of(secret))
    # the secret alone, so that a script can take it
    sys.stdout.write(f"{secret}\n")
    sys.stderr.write("Keep it: only its hash is stored, so it can't be shown again.\n")


def run_backup(path: str, target: str) -> None:
    """Copy a database and check the copy."""
    with _progress_bar("copied") as progress:
        back_up(path, target, progress)
    sys.stdout.write(f"{target}: whole and checked, {os.path.getsize(target)} bytes\n")


def run_check(path: str) -> int:
    """Print each problem of a database; returns 1 if there are any, else 0."""
    with _progress_bar("checked") as progress:
        problems = check(path, progress)
    for problem in problems:
        sys.stdout.write(f"{path}: {problem}\n")
    sys.stdout.write(f"{path}: {len(problems)} problems; {UNSEEN}\n")
    return 1 if problems else 0


@contextlib.contextmanager
def _progress_bar(word: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal, nothing elsewhere."""
    is_terminal = sys.stderr.isatty()
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 100
        if is_terminal and percent != shown:
            shown = percent
            bar = "#" * (percent * 40 // 100)
            sys.stderr.write(f"\r{word} [{bar:<40}] {percent:3d} %")
            sys.stderr.flush()

    try:
        yield progress
    finally:
        if shown >= 0:
            sys.stderr.write("\n")
