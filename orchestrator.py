"""Command line, assembly, start-up and graceful stop of the server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from aiohttp import web

import access
import api
import api_connection
import api_log
import config
import demo
import event_loop
import logs
from access import Role, Token
from channel import first_failure
from config import AccessLog, ConfigError, LogFormat, Settings, SettingsInForce
from database import StoreError, StoreFull, StoreRefused, StoreUnavailable
from dispatch import Dispatcher
from instruments import Instruments
from store import Store
from store_beside import back_up, check, create_token, list_tokens, read_agent_token, revoke_token

log = logging.getLogger("orchestrator")

_STOP_REQUESTS_SECONDS = 3.0
_STOP_AGENT_SECONDS = 3.0
_AGENT_RESTART_SECONDS = 1.0
_INTERRUPTED = 128 + signal.SIGINT  # as shells tell it
_REMEMBERED_JOBS = 2000  # of all services, for their medians
_RETENTION_LONGEST_PAUSE = 3600.0  # so that a clock that was set is noticed
_RETENTION_RETRY_SECONDS = 60.0
_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_USER_ID = re.compile(r"[+-]?[0-9]{1,19}")
# of a request: its first line, one header field, and how many of them there may be
_LINE_BYTES = 8190
_FIELD_BYTES = 8190
_FIELDS = 128


class StartError(Exception):
    """The server can't start; the message says what to do."""


# --- the server's life ------------------------------------------------------------


async def serve(
    settings: SettingsInForce, read_settings: Callable[[], Settings], with_agent: bool
) -> None:
    """Run a server until SIGTERM or SIGINT; SIGHUP has the settings read again.

    Raises :class:`StartError` or a store's error.
    """
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
    log.info("event=stopped")


def reload_settings(settings: SettingsInForce, read_settings: Callable[[], Settings]) -> None:
    """Read the settings again and put in force what can change; keep the old if they are bad."""
    try:
        change = settings.replace(read_settings())
    except ConfigError as error:
        log.error("event=settings_refused error=%r kept=old", str(error))
        return
    log.info("event=settings_reloaded changed=%r", ",".join(change.changed))
    if change.needing_restart:
        log.warning("event=settings_need_restart names=%r", ",".join(change.needing_restart))


async def _serve_store(
    store: Store,
    settings: SettingsInForce,
    with_agent: bool,
    stop: asyncio.Event,
    tasks: asyncio.TaskGroup,
    background: list[asyncio.Task[None]],
) -> None:
    instruments = Instruments()
    instruments.jobs.begin(await store.times_of_last_jobs(_REMEMBERED_JOBS))
    store.feed.follow(instruments.jobs.follow)
    background.append(tasks.create_task(instruments.watch_loop(), name="loop lag"))
    token = settings.current.agent_token or await store.agent_token()
    dispatcher = Dispatcher(store, settings)
    background.append(tasks.create_task(dispatcher.run(), name="dispatcher"))
    background.append(tasks.create_task(keep_retention(store, settings), name="retention"))
    runner = api_connection.ConnectionRunner(
        api.make_application(store, dispatcher, settings, token, instruments),
        access_log=logging.getLogger("orchestrator.access"),
        access_log_class=api_log.access_logger(settings, instruments.http),
        logger=api_log.connection_logger(),
        shutdown_timeout=_STOP_REQUESTS_SECONDS,
        max_line_size=_LINE_BYTES,
        max_field_size=_FIELD_BYTES,
        max_headers=_FIELDS,
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
        await stop.wait()
        log.info("event=stopping")
        _announce_stop(len(await store.active_jobs()))
    finally:
        store.feed.close()  # whoever waits for something to happen is answered now
        if agent is not None:
            agent.cancel()
            await asyncio.wait([agent])
        await dispatcher.close()
        await runner.cleanup()


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


def _announce_stop(active: int) -> None:
    if active:
        sys.stdout.write(
            f"{active} running jobs are not ended: they go on, and the next start with this"
            " database reports them\n"
        )
        sys.stdout.flush()


# --- embedded agent ---------------------------------------------------------------


async def keep_agent(url: str, settings: Settings, token: str) -> None:
    """Keep an agent process on this machine alive for as long as the server runs."""
    while True:
        code = await _run_agent(_local_url(url), settings, token)
        log.warning("event=embedded_agent_ended code=%s restart_s=%g", code, _AGENT_RESTART_SECONDS)
        await asyncio.sleep(_AGENT_RESTART_SECONDS)


def _local_url(url: str) -> str:
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


async def _run_agent(url: str, settings: Settings, token: str) -> int:
    workdir = Path(f"{settings.db_path}.agent").absolute()
    command = [sys.executable, str(Path(__file__).with_name("agent.py")), "--embedded"]
    command += ["--server", url, "--name", "local", "--slots", str(settings.slots)]
    command += ["--workdir", str(workdir), "--log-format", settings.log_format]
    environment = {
        name: value for name, value in os.environ.items() if name != config.AGENT_TOKEN_VARIABLE
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        # whoever reads the server's output must not wait for the agent to end it
        stdout=asyncio.subprocess.DEVNULL,
        env=environment,
        # Ctrl-C in the terminal is for the server, which then stops the agent
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        # The pipe stays open: its end tells the agent that the server is gone, however it went.
        process.stdin.write(f"{token}\n".encode())
        return await process.wait()
    finally:
        await _stop_process(process)


async def _stop_process(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_AGENT_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


# --- retention --------------------------------------------------------------------


async def keep_retention(store: Store, settings: SettingsInForce) -> None:
    """Clean jobs whose final state is older than the maximum age, when they reach it."""
    is_changed = asyncio.Event()
    settings.on_change(is_changed.set)
    while True:
        is_changed.clear()
        try:
            pause = await _clean_once(store, settings.current.max_age)
        except (StoreFull, StoreUnavailable) as error:
            log.warning("event=retention_failed error=%r", str(error))
            pause = _RETENTION_RETRY_SECONDS
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_changed.wait(), pause)


async def _clean_once(store: Store, max_age: int) -> float:
    while cleaned := await store.clean_jobs_final_since(time.time() - max_age):
        log.info("event=cleaned jobs=%d", cleaned)
    while await store.forget_old_keys():
        pass
    oldest = await store.oldest_final_change()
    # a job that becomes final only now reaches the age no sooner than max_age from now
    due = max_age if oldest is None else oldest + max_age - time.time()
    return min(max(due, 0.0) + 0.01, max_age, _RETENTION_LONGEST_PAUSE)


# --- command line -----------------------------------------------------------------


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of ``orchestrator.py``; no command means ``serve``."""
    parser = argparse.ArgumentParser(prog="orchestrator", description="A job server for labs.")
    parser.add_argument("--version", action="version", version=config.VERSION)
    _add_serve_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser("serve", help="run the server (the default)")
    _add_serve_options(serve_parser)
    commands.add_parser("demo", help="run an example job on a throw-away server")
    token_parser = commands.add_parser("agent-token", help="show the token that agents need")
    token_parser.add_argument("--db", default=argparse.SUPPRESS, metavar="FILE")
    _add_token_commands(commands.add_parser("token", help="make, list, revoke tokens of the API"))
    backup_parser = commands.add_parser("backup", help="copy the database, also while it is used")
    backup_parser.add_argument("file", metavar="FILE", help="where to; must not be there yet")
    backup_parser.add_argument("--db", default=argparse.SUPPRESS, metavar="FILE")
    check_parser = commands.add_parser("check", help="look for damage in a database or a backup")
    check_parser.add_argument("file", metavar="FILE")
    return parser.parse_args(arguments)


def _add_token_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a token and show it, this once")
    create.add_argument("--name", required=True, type=_token_name)
    create.add_argument(
        "--user", required=True, type=_token_user, help="whose jobs it reaches: a user id, or any"
    )
    create.add_argument("--role", required=True, choices=list(Role))
    revoke = actions.add_parser("revoke", help="make a token invalid, within a second")
    revoke.add_argument("name", metavar="NAME")
    for action in (create, revoke, actions.add_parser("list", help="show what tokens there are")):
        action.add_argument("--db", default=argparse.SUPPRESS, metavar="FILE")


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


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS: an option that is not given must not hide the environment or the file
    parser.add_argument("--host", default=argparse.SUPPRESS, help="default: 127.0.0.1")
    parser.add_argument("--port", default=argparse.SUPPRESS, help="default: 5000; 0 picks one")
    parser.add_argument("--db", default=argparse.SUPPRESS, metavar="FILE", help="orchestrator.db")
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help="TOML file")
    parser.add_argument("--slots", default=argparse.SUPPRESS, help="slots of the embedded agent")
    parser.add_argument(
        "--log-format", choices=list(LogFormat), default=argparse.SUPPRESS, help="default: text"
    )
    parser.add_argument(
        "--no-access-log",
        dest="access_log",
        action="store_const",
        const=AccessLog.OFF,
        default=argparse.SUPPRESS,
        help="no line in the log for any request",
    )
    parser.add_argument(
        "--no-agent", action="store_true", default=argparse.SUPPRESS, help="no embedded agent"
    )


_SETTING_OF_OPTION = {
    "host": "HOST",
    "port": "PORT",
    "db": "DB_PATH",
    "slots": "SLOTS",
    "log_format": "LOG_FORMAT",
    "access_log": "ACCESS_LOG",
}


def load_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of this command line; raises :class:`config.ConfigError`."""
    given = vars(options)
    arguments = {
        setting: given[option] for option, setting in _SETTING_OF_OPTION.items() if option in given
    }
    file = Path(given["config"]) if "config" in given else None
    return config.load(os.environ, arguments, file)


def _run_command(options: argparse.Namespace) -> int:
    match options.command:
        case "demo":
            return demo.run()
        case "agent-token":
            settings = load_settings(options)
            token = settings.agent_token or read_agent_token(settings.db_path)
            sys.stdout.write(f"{token}\n")
        case "token":
            _run_token_command(options)
        case "backup":
            _back_up(load_settings(options).db_path, options.file)
        case "check":
            return _check(options.file)
        case _:
            settings = load_settings(options)
            logs.configure(settings.log_format)
            server = serve(
                SettingsInForce(settings),
                lambda: load_settings(options),
                with_agent="no_agent" not in options,
            )
            event_loop.run(server)
    return 0


def _run_token_command(options: argparse.Namespace) -> None:
    path = load_settings(options).db_path
    match options.action:
        case "create":
            role = Role(options.role)
            _create_token(path, Token(options.name, role, options.user, time.time()))
        case "revoke":
            revoke_token(path, options.name)
            if not list_tokens(path):
                sys.stderr.write("That was the last token: the API is open to everybody now.\n")
        case _:
            for token in list_tokens(path):
                user = "any" if token.user_id is None else token.user_id
                created = f"{datetime.fromtimestamp(token.created_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
                sys.stdout.write(f"{token.name} user={user} role={token.role} created={created}\n")


def _create_token(path: str, token: Token) -> None:
    if token.role is Role.ADMIN and token.user_id is not None:
        raise StoreRefused("an admin steers everybody's jobs: use --user any")
    secret = access.new_secret()
    create_token(path, token, access.digest_of(secret))
    # the secret alone, so that a script can take it
    sys.stdout.write(f"{secret}\n")
    sys.stderr.write("Keep it: only its hash is stored, so it can't be shown again.\n")


def _back_up(path: str, target: str) -> None:
    with _progress_bar("copied") as progress:
        back_up(path, target, progress)
    sys.stdout.write(f"{target}: whole and checked, {os.path.getsize(target)} bytes\n")


def _check(path: str) -> int:
    with _progress_bar("checked") as progress:
        problems = check(path, progress)
    for problem in problems:
        sys.stdout.write(f"{path}: {problem}\n")
    sys.stdout.write(f"{path}: {len(problems)} problems\n")
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


def main() -> int:
    """Entry point of ``orchestrator.py`` and of ``orchestrator``."""
    options = parse_arguments(sys.argv[1:])
    logs.configure(LogFormat.TEXT)
    try:
        code = _run_command(options)
    except* (ConfigError, StartError, StoreError) as group:
        sys.stderr.write(f"orchestrator: {first_failure(group)}\n")
        code = 2
    except* KeyboardInterrupt:
        # not 0, which would say of a backup or a check that it was done
        sys.stderr.write("orchestrator: interrupted\n")
        code = _INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
