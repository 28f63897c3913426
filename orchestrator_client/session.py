"""What a command works with: the settings in force, a client, and what to tell of pauses."""

from __future__ import annotations

import argparse
import os
import sys
import time

from orchestrator_client import settings as user_settings
from orchestrator_client.client import Client
from orchestrator_client.identifiers import resolve
from orchestrator_client.output import is_terminal, say
from orchestrator_client.retries import Retry

_REPEAT_SECONDS = 10.0


class Interrupted(Exception):
    """The user ended a wait; the message says what becomes of the jobs."""


class Session:
    """One run of a command."""

    def __init__(self, options: argparse.Namespace, patience: float) -> None:
        given = {name: getattr(options, name, None) for name in ("url", "profile", "token_file")}
        given["user"] = getattr(options, "user", None)
        given["service"] = getattr(options, "service", None)
        self.settings = user_settings.load(given, os.environ)
        if options.patience is not None:
            patience = options.patience
        self.service: str | None = None
        self._said_at = 0.0
        self.client = Client(
            self.settings.url,
            self.settings.token,
            self.settings.user_id,
            patience=patience,
            on_retry=self._tell,
        )

    def ids(self, words: list[str]) -> list[int]:
        """Return the ids of the jobs that the words on the command line name."""
        return resolve(self.client, words, self.settings.user_id)

    def _tell(self, retry: Retry) -> None:
        """Say now and then why nothing seems to happen."""
        now = time.monotonic()
        if now - self._said_at >= _REPEAT_SECONDS and retry.patience_left > 1:
            self._said_at = now
            say(f"orchestrator: {retry.reason}; trying again for {retry.patience_left:.0f} s")


def for_people() -> bool:
    """Whether hints are welcome: both outputs are terminals."""
    return is_terminal(sys.stdout) and is_terminal(sys.stderr)
