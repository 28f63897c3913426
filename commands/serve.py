"""The server's life: start, serve, stop, with its embedded agent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import gc
import logging
import signal
import sys
from collections.abc import Callable

from aiohttp import web

import config
import runtime
from api import access_log, connection
from api.application import make_application
from commands.embedded_agent import keep_agent
from commands.retention import keep_retention
from config import ConfigError, Settings, SettingsInForce
from dispatch import Dispatcher
from records import KnownTokens, digest_of
from store import Store
from telemetry.instruments import Instruments
from telemetry.logs import event

log = logging.getLogger("orchestrator")

_STOP_REQUESTS_SECONDS = 3.0
_REMEMBERED_JOBS = 2000  # of all services, for their medians
# of a request: its first line, one header field, and how many of them there may be
_LINE_BYTES = 24 * 1024  # a thousand ids
_FIELD_BYTES = 8190
_FIELDS = 128
_DESCRIPTORS_FOR_OTHERS = 128  # the database, pipes, log files


class StartError(Exception):
    """The server can't start; the message says what to do."""


async def serve(
    settings: SettingsInForce, read_settings: Callable[[], Settings], with_agent: bool
) -> None:
    """Run a server until SIGTERM or SIGINT; SIGHUP has the settings read again.

    Raises :class:`StartError` or a store's error.
    """
    runtime.hide_variable(config.AGENT_TOKEN_VARIABLE)
    runtime.raise_descriptor_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    had_terminal = sys.stdin is not None and sys.stdin.isatty()

    def on_hang_up() -> None:
        if had_terminal and not sys.stdin.isatty():
            stop.set()  # its terminal was closed
        else:
            reload_settings(settings, read_settings)

    loop.add_signal_handler(signal.SIGHUP, on_hang_up)
    store = await Store.open(settings.current.db_path)
    try:
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(store.run(), name="store")]
            try:
                await _serve_store(store, settings, with_agent, stop, tasks, background)
            finally:
                for task in reversed(background):
                    task.cancel()
    finally:
        await store.close()
    event(log, "stopped")


def reload_settings(settings: SettingsInForce, read_settings: Callable[[], Settings]) -> None:
    """Read the settings again and put in force what can change; keep the old if they are bad."""
    try:
        change = settings.replace(read_settings())
    except ConfigError as error:
        event(log, "settings_refused", level=logging.ERROR, error=str(error), kept="old")
        return
    event(log, "settings_reloaded", changed=",".join(change.changed))
    if change.needing_restart:
        names = ",".join(change.needing_restart)
        event(log, "settings_need_restart", level=logging.WARNING, names=names)


async def _serve_store(
    store: Store,
    settings: SettingsInForce,
    with_agent: bool,
    stop: asyncio.Event,
    tasks: asyncio.TaskGroup,
    background: list[asyncio.Task[None]],
) -> None:
    instruments = Instruments()
    instruments.jobs.begin(await store.jobs.times_of_last(_REMEMBERED_JOBS))
    store.feed.follow(instruments.jobs.follow)
    background.append(tasks.create_task(instruments.watch_loop(), name="loop lag"))
    if given := settings.current.agent_token:
        token, digests = given, frozenset({digest_of(given)})
    else:
        token, digests = await store.tokens.agent_token(), await store.tokens.agent_digests()
    dispatcher = Dispatcher(store, settings)
    background.append(tasks.create_task(dispatcher.run(), name="dispatcher"))
    background.append(tasks.create_task(keep_retention(store, settings), name="retention"))
    runner = connection.ConnectionRunner(
        make_application(store, dispatcher, settings, digests, instruments),
        access_log=logging.getLogger("orchestrator.access"),
        access_log_class=access_log.access_logger(settings, instruments.http),
        logger=access_log.connection_logger(),
        shutdown_timeout=_STOP_REQUESTS_SECONDS,
        max_line_size=_LINE_BYTES,
        max_field_size=_FIELD_BYTES,
        max_headers=_FIELDS,
        limits=_connection_limits(),
    )
    await runner.setup()
    _settle_memory()
    await dispatcher.wait_loaded()
    agent: asyncio.Task[None] | None = None
    try:
        url = await _listen(runner, settings.current)
        if with_agent:
            agent = tasks.create_task(
                keep_agent(url, settings.current, token), name="embedded agent"
            )
        _announce(url)
        _say_who_may_use_it(settings.current, await store.tokens.known())
        await stop.wait()
        event(log, "stopping")
        _announce_stop(len(await store.attempts.active()))
    finally:
        store.feed.close()  # whoever waits for something to happen is answered now
        if agent is not None:
            agent.cancel()
            await asyncio.wait([agent])
        await dispatcher.close()
        await runner.cleanup()


def _connection_limits() -> connection.ConnectionLimits:
    """Return the usual limits, with fewer connections where there are fewer descriptors."""
    limits = connection.ConnectionLimits()
    room = runtime.descriptor_limit() - _DESCRIPTORS_FOR_OTHERS - limits.reserve
    return dataclasses.replace(limits, connections=max(1, min(limits.connections, room)))


def _settle_memory() -> None:
    """Hand back what building the application took, and keep the collector off what stays.

    glibc keeps what is freed for itself until malloc_trim(3) is called; another libc may not
    have that function, and then nothing is lost but memory.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def _listen(runner: web.AppRunner, settings: Settings) -> str:
    site = web.TCPSite(runner, settings.host, settings.port)
    try:
        await site.start()
    except OSError as error:
        raise StartError(
            f"can't listen on {settings.host} port {settings.port}: {_why_not_bound(error)}"
        ) from None
    host, port = runner.addresses[0][:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _why_not_bound(error: OSError) -> str:
    """Say in words what is wrong with an address to listen on, and what to do about it."""
    match error.errno:
        case errno.EADDRINUSE:
            return "another program listens there; end it, or choose another with --port"
        case errno.EACCES:
            return "ports below 1024 need rights of their own; choose another with --port"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address; choose another with --host"
    # of the resolver, whose codes are not errno's
    return f"{error.strerror}; choose another with --host or --port"


def _announce(url: str) -> None:
    sys.stdout.write(
        f"Orchestrator is ready at {url} - try:"
        f" curl -X POST {url}/upload -F file=@run.sh -F user_id=1 -F service=example\n"
    )
    sys.stdout.flush()


def _say_who_may_use_it(settings: Settings, tokens: KnownTokens) -> None:
    """Say it where it may surprise: everybody, or nobody yet."""
    if settings.are_tokens_required() or tokens.were_made:
        if tokens.by_digest:
            return
        who = "Nobody may use it yet: make a token with 'orchestrator token create'"
    elif config.is_loopback(settings.host):
        who = "Everybody on this machine may use it, and all who come through a proxy here"
    else:
        who = "Everybody who reaches this machine may use it, as any user (TOKENS=optional)"
    event(log, "open_to", who=who)
    sys.stdout.write(f"{who}.\n")
    sys.stdout.flush()


def _announce_stop(active: int) -> None:
    if active:
        sys.stdout.write(
            f"{active} running jobs are not ended: they go on, and the next start with this"
            " database reports them\n"
        )
        sys.stdout.flush()
