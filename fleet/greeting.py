"""What a server accepts of an agent's first message: every field has a bound."""

from __future__ import annotations

import re

import config
from jobs import MAX_CPUS, MAX_GPUS, MAX_MEMORY_BYTES, NO_RESOURCES, Resources
from wire import messages

MAX_SLOTS = 4096
MAX_ATTEMPTS = 10_000
_MAX_SERVICES = 1000
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_TEXT = re.compile(r"[ -~]{0,64}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{32,128}")
_MOST = Resources(MAX_CPUS, MAX_MEMORY_BYTES, MAX_GPUS)
_MAX_ID = 2**60 - 1  # of an attempt: a transfer's name has three bits more


def hello_problem(hello: messages.Hello) -> str | None:
    """Say in words what is wrong with a hello; None if nothing is."""
    if hello.protocol != messages.PROTOCOL_VERSION:
        return (
            f"agent speaks protocol {hello.protocol}, server {messages.PROTOCOL_VERSION}:"
            " install the same version on both"
        )
    try:
        config.checked_agent_name(hello.name)
    except config.ConfigError as error:
        return str(error)
    if not 0 <= hello.slots <= MAX_SLOTS:
        return f"slots must be from 0 to {MAX_SLOTS}"
    if not _ID.fullmatch(hello.agent_id) or not _TEXT.fullmatch(hello.instance):
        return "agent id or instance has characters that it may not have, or is too long"
    if not _TEXT.fullmatch(hello.version):
        return "the agent's version is not printable ASCII, or is too long"
    if hello.secret is not None and not _SECRET.fullmatch(hello.secret):
        return "the agent's secret must have 32 to 128 letters, digits, dashes and underscores"
    return _problem_of_lists(hello)


def _problem_of_lists(hello: messages.Hello) -> str | None:
    services = hello.services or ()
    if len(services) > _MAX_SERVICES or not all(0 < len(name) <= 64 for name in services):
        return f"an agent offers at most {_MAX_SERVICES} services, with names of up to 64 letters"
    if len(hello.attempts) > MAX_ATTEMPTS:
        return f"an agent holds at most {MAX_ATTEMPTS} attempts"
    for held in hello.attempts:
        is_in_range = 0 < held.attempt_id <= _MAX_ID and 0 < held.job_id <= _MAX_ID
        if not is_in_range or len(held.incarnation) > 64 or held.input_offset < 0:
            return "an attempt that the agent holds has an id or an offset out of range"
    if hello.resources is not None and not (
        NO_RESOURCES.fits(hello.resources) and hello.resources.fits(_MOST)
    ):
        return "the agent's resources are out of range"
    return None
