"""Which jobs are meant: numbers, ranges, ``last``, ``@tag:value``, and ``-`` for standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator_client.client import Client
from orchestrator_client.operations import JobFilter

_NUMBER = re.compile(r"[0-9]{1,19}")
_RANGE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")
_TAG = re.compile(r"@([A-Za-z0-9._-]{1,64}):(.*)", re.DOTALL)
_LONGEST_RANGE = 100_000


class UsageError(Exception):
    """The command line can't be understood; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Number:
    """The job of this id."""

    job_id: int


@dataclass(frozen=True, slots=True)
class Range:
    """All jobs whose ids are from ``first`` to ``last``."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Last:
    """The job that the user submitted last."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """All jobs of the user that have a tag."""

    key: str
    value: str


Identifier = Number | Range | Last | Tagged


def parse_identifiers(words: Sequence[str]) -> list[Identifier]:
    """Return what the words mean, those of standard input for ``-``. Raises UsageError."""
    return [_parse(word) for word in _words(words)]


def _words(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word == "-":
            yield from sys.stdin.read().split()
        else:
            yield word


def _parse(word: str) -> Identifier:
    if _NUMBER.fullmatch(word):
        return Number(int(word))
    if match := _RANGE.fullmatch(word):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise UsageError(f"{word}: the range ends before it begins")
        if last - first >= _LONGEST_RANGE:
            raise UsageError(f"{word}: a range has at most {_LONGEST_RANGE} ids")
        return Range(first, last)
    if word == "last":
        return Last()
    if match := _TAG.fullmatch(word):
        return Tagged(match[1], match[2])
    raise UsageError(
        f"{word!r} names no job; use 7, 3-7, last, @tag:value, or - for standard input"
    )


def resolve(client: Client, words: Sequence[str], user_id: int) -> list[int]:
    """Return the ids of the jobs that the words name, each once, in this order.

    Tags and ``last`` mean jobs of the user; of a range those that there are. Raises
    :class:`UsageError` for what names none.
    """
    found: dict[int, None] = {}
    for identifier in parse_identifiers(words):
        found |= dict.fromkeys(_resolve(client, identifier, user_id))
    return list(found)


def _resolve(client: Client, identifier: Identifier, user_id: int) -> list[int]:
    match identifier:
        case Number(job_id):
            return [job_id]
        case Range(first, last):
            ids = [job.id for job in client.find(JobFilter(ids=range(first, last + 1)))]
            if not ids:
                raise UsageError(f"there are no jobs from {first} to {last}")
        case Last():
            ids = [job.id for job in client.find(JobFilter(user_id=user_id), limit=1)]
            if not ids:
                raise UsageError(f"user {user_id} has no jobs")
        case Tagged(key, value):
            wanted = JobFilter(user_id=user_id, tags={key: value})
            ids = [job.id for job in client.find(wanted)]
            if not ids:
                raise UsageError(f"user {user_id} has no jobs with the tag {key}:{value}")
    return sorted(ids)
