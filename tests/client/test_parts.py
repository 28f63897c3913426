"""The client's parts alone, without a server."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_client import errors
from orchestrator_client.address import parse_address
from orchestrator_client.arguments import duration_seconds
from orchestrator_client.errors import SettingsError, UnsafeArchive, UnusableFile
from orchestrator_client.extraction import extract
from orchestrator_client.job_output import Position, read_output
from orchestrator_client.lockstep import iterate, run
from orchestrator_client.output import printable
from orchestrator_client.retries import Retry, Sender
from orchestrator_client.settings import load
from orchestrator_client.terminal import TerminalFilter
from orchestrator_client.transport import (
    Answer,
    ConnectionBroken,
    ConnectionFailed,
    Request,
)
from orchestrator_client.uploads import Form, sources_of
from tests.harness import PROJECT

pytestmark = pytest.mark.quick


# --- what is uploaded -------------------------------------------------------------


def test_directories_are_uploaded_with_their_paths(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "x.pdb").write_text("x")
    (tmp_path / "run.sh").write_text("y")
    (tmp_path / "data" / "round").symlink_to(tmp_path)
    names = [source.name for source in sources_of([tmp_path / "run.sh", str(tmp_path / "data")])]
    assert names == ["run.sh", "data/deep/x.pdb"]


@pytest.mark.parametrize(
    "name", ["", "../x", "/x", "a//b", "a/./b", "a\\b", "a\nb", "x" * 5000, "bad\udc80"]
)
def test_names_that_no_server_takes_are_refused_here(name: str) -> None:
    with pytest.raises(UnusableFile):
        sources_of([(name, b"")])


def test_names_that_can_not_stand_side_by_side(tmp_path: Path) -> None:
    for names in (("a", "a"), ("a", "a/b"), ("\u00e4", "a\u0308")):
        with pytest.raises(UnusableFile):
            sources_of([(name, b"") for name in names])


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("before")
    form = Form([], sources_of([path]))
    path.write_text("after it")
    with pytest.raises(UnusableFile, match="changed"):
        list(form.pieces())


def test_a_form_is_as_long_as_it_says_and_can_be_read_again() -> None:
    stream = io.BytesIO(b"skipped" + b"y" * 300_000)
    stream.seek(7)
    form = Form([("user_id", "1")], sources_of([('q"uote', b"x" * 200_000), ("s", stream)]))
    first, second = b"".join(form.pieces()), b"".join(form.pieces())
    assert first == second and len(first) == form.length
    assert b'filename="q%22uote"' in first and b"skipped" not in first


# --- what comes back --------------------------------------------------------------


def _zip(*members: tuple[str, bytes, int]) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    file.seek(0)
    return file


_FILE, _LINK, _FIFO = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", b"x", _FILE)],
        [("/evil", b"x", _FILE)],
        [("a/../../evil", b"x", _FILE)],
        [("a//evil", b"x", _FILE)],
        [("link", b"/tmp", _LINK), ("link/evil", b"x", _FILE)],
        [("a", b"x", _FILE), ("a/b", b"x", _FILE)],
        [("a", b"x", _FILE), ("a/", b"", stat.S_IFDIR | 0o755)],
        [("a", b"x", _FILE), ("a", b"y", _FILE)],
    ],
)
def test_a_hostile_archive_changes_nothing(tmp_path: Path, members: list[Any]) -> None:
    place = tmp_path / "deep" / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of a name that is there twice
        archive = _zip(*members)
    with pytest.raises(UnsafeArchive):
        extract(archive, place)
    assert [path for path in tmp_path.rglob("*") if path.name != "deep"] == []


def test_links_that_lead_out_are_left_out_and_others_made(tmp_path: Path) -> None:
    archive = _zip(
        ("data/x", b"x", _FILE),
        ("good", b"data/x", _LINK),
        ("data/up", b"../good", _LINK),
        ("out", b"../../etc/passwd", _LINK),
        ("absolute", b"/etc/passwd", _LINK),
        ("through", b"good/../../..", _LINK),
        ("pipe", b"", _FIFO),
    )
    done = extract(archive, tmp_path / "out")
    assert set(done.left_out) == {"out", "absolute", "through", "pipe"}
    assert os.readlink(tmp_path / "out" / "good") == "data/x"
    assert (tmp_path / "out" / "data" / "up").read_text() == "x"
    assert not (tmp_path / "out" / "out").is_symlink()


def test_what_is_there_is_replaced_but_no_link_followed(tmp_path: Path) -> None:
    place, other = tmp_path / "out", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    (other / "keep").write_text("old")
    (place / "file").symlink_to(other / "keep")
    extract(_zip(("file", b"new", _FILE), ("dir/x", b"x", _FILE)), place)
    assert (place / "file").read_text() == "new" and (other / "keep").read_text() == "old"
    (place / "dir" / "x").unlink()
    (place / "dir").rmdir()
    (place / "dir").symlink_to(other)
    with pytest.raises(UnsafeArchive):
        extract(_zip(("a", b"1", _FILE), ("dir/x", b"x", _FILE)), place)
    assert os.listdir(other) == ["keep"]
    assert sorted(os.listdir(place)) == ["dir", "file"]


def test_a_damaged_archive_leaves_nothing(tmp_path: Path) -> None:
    content = bytearray(_zip(("a", b"x" * 1000, _FILE), ("b", b"y" * 1000, _FILE)).getvalue())
    content[1100] ^= 1
    with pytest.raises(errors.DamagedDownload):
        extract(io.BytesIO(bytes(content)), tmp_path / "out")
    with pytest.raises(errors.DamagedDownload):
        extract(io.BytesIO(b"no archive"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_times_and_rights_are_kept_but_no_setuid(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("tool")
        info.external_attr = (stat.S_IFREG | 0o4755) << 16
        info.extra = struct.pack("<HHBi", 0x5455, 5, 1, 1_600_000_000)
        archive.writestr(info, b"x")
    file.seek(0)
    extract(file, tmp_path / "out")
    status = (tmp_path / "out" / "tool").stat()
    assert status.st_mtime == 1_600_000_000
    assert stat.S_IMODE(status.st_mode) & 0o6000 == 0 and status.st_mode & 0o100


@given(st.data())
def test_positions_do_not_depend_on_how_the_stream_is_cut(data: st.DataObject) -> None:
    """Whatever the pieces, what a mark says is counted and the mark itself is not."""
    parts = data.draw(
        st.lists(
            st.sampled_from([b"text", b"\n", b"\n[", b"\n[... 7 bytes left out ...]\n", b"[..."]),
            max_size=12,
        )
    )
    text = b"".join(parts)
    whole = Position(0)
    whole.pass_over(text)
    cut = Position(0)
    start = 0
    while start < len(text):
        end = start + data.draw(st.integers(1, 9))
        cut.pass_over(text[start:end])
        start = end
    assert cut.offset == whole.offset
    marks = text.count(b"\n[... 7 bytes left out ...]\n")
    assert whole.offset == len(text) - marks * len(b"\n[... 7 bytes left out ...]\n") + marks * 7


def test_a_new_attempt_begins_at_the_start() -> None:
    position = Position(100)
    position.pass_over(b"more\n[... attempt 2 ...]\nnew")
    assert (position.attempt, position.offset) == (2, 3)


# --- what is printed --------------------------------------------------------------


@given(st.text())
def test_nothing_printable_steers(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or ord(c) == 0x202E for c in shown)
    shown.encode()


@given(st.lists(st.binary(max_size=20)))
def test_the_filter_lets_only_colours_through(pieces: list[bytes]) -> None:
    terminal = TerminalFilter()
    shown = b"".join(terminal.feed(b"\x1b" + piece) for piece in pieces)
    rest = shown
    while b"\x1b" in rest:
        rest = rest.partition(b"\x1b[")[2]
        parameters = rest.lstrip(b"0123456789;:")
        assert parameters[:1] in (b"m", b"K"), shown
        rest = parameters


def test_durations() -> None:
    assert [duration_seconds(t) for t in ("90", "90s", "5m", "2h", "1d12h", "0.5")] == [
        *(90, 90, 300, 7200, 129600, 0.5)
    ]


# --- settings ---------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Callable[[str], dict[str, str]]]:
    """Writes a settings file; gives the environment in which it counts."""

    def write(text: str) -> dict[str, str]:
        file = tmp_path / "orchestrator" / "config.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o600)
        return {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}

    yield write


_LAB = '[profiles.lab]\nurl = "https://lab:1"\ntoken = "secret"\nuser = 7\nservice = "fold"\n'


def test_what_counts_more(home: Callable[[str], dict[str, str]]) -> None:
    environment = home('url = "http://top:1"\n' + _LAB)
    assert load({}, environment).url == "http://top:1"
    assert load({}, {"HOME": "/nowhere"}).url == "http://localhost:5000"
    assert load({}, {"HOME": "/nowhere"}).user_id == os.getuid()
    lab = load({"profile": "lab"}, environment)
    assert (lab.url, lab.token, lab.user_id, lab.service) == ("https://lab:1", "secret", 7, "fold")
    both = {**environment, "ORCHESTRATOR_URL": "http://env:1"}
    assert load({}, both).url == "http://env:1"
    assert load({"profile": "lab"}, both).url == "https://lab:1"
    assert load({"profile": "lab", "url": "http://x:1"}, both).url == "http://x:1"


def test_a_token_goes_to_no_other_server(home: Callable[[str], dict[str, str]]) -> None:
    environment = home(_LAB)
    assert load({"profile": "lab", "url": "http://other:1"}, environment).token is None
    assert load({"profile": "lab", "url": "https://lab:1"}, environment).token == "secret"
    given_for_it = {**environment, "ORCHESTRATOR_TOKEN": "mine"}
    assert load({"url": "http://other:1"}, given_for_it).token == "mine"


def test_a_token_that_others_can_read_is_refused(
    home: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    environment = home(_LAB)
    (tmp_path / "orchestrator" / "config.toml").chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        load({}, environment)
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        load({"token_file": str(token)}, {"HOME": "/nowhere"})
    token.chmod(0o600)
    assert load({"token_file": str(token)}, {"HOME": "/nowhere"}).token == "secret"


@pytest.mark.parametrize("text", ["urll = 1", "[profiles]\nlab = 1", "url = [", "url = []"])
def test_a_file_with_a_mistake_is_refused(home: Callable[[str], dict[str, str]], text: str) -> None:
    with pytest.raises(SettingsError, match=r"config\.toml"):
        load({}, home(text))


@pytest.mark.parametrize(
    "url", ["", "localhost:5000", "ftp://x", "http://", "http://a b", "http://u:p@x", "http://x/?q"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(SettingsError):
        parse_address(url)


def test_addresses() -> None:
    assert parse_address("http://[::1]:5000/").url == "http://[::1]:5000"
    assert parse_address("https://lab/orchestrator/").url == "https://lab/orchestrator"


# --- trying again -----------------------------------------------------------------


class _Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self._headers = headers
        self._body = [body]

    def header(self, name: str) -> str | None:
        """Return a header field."""
        return self._headers.get(name)

    async def read(self, size: int, silence: float | None = None) -> bytes:
        """Return all of it."""
        return self._body.pop() if self._body else b""

    async def close(self) -> None:
        """Nothing to do."""


class _CutAnswer(_Answer):
    async def read(self, size: int, silence: float | None = None) -> bytes:
        """Break off."""
        raise ConnectionBroken("cut")


class _Script:
    """A transport that answers as it is told, and whose time passes when it sleeps."""

    def __init__(self, *answers: Exception | tuple[int, dict[str, str], bytes]) -> None:
        self._answers = list(answers)
        self.sent: list[Request] = []
        self.slept: list[float] = []

    async def send(self, request: Request) -> Answer:
        """Answer as told; the last answer again and again."""
        self.sent.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return _Answer(*answer)

    async def sleep(self, seconds: float) -> None:
        """Count it."""
        self.slept.append(seconds)

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call it."""
        return function()

    async def close(self) -> None:
        """Nothing to do."""


_OK: tuple[int, dict[str, str], bytes] = (200, {}, b'{"x": 1}')
_GET = Request("GET", "/x")


def test_what_is_tried_again() -> None:
    script = _Script(
        ConnectionFailed("refused"),
        (503, {"Retry-After": "7"}, b"{}"),
        (502, {}, b"<html>"),
        ConnectionBroken("reset"),
        _OK,
    )
    said: list[Retry] = []
    sender = Sender(script, "http://x", None, 60, said.append)
    assert run(sender.json(_GET)) == {"x": 1}
    assert len(script.sent) == 5 and script.slept[1] == 7.0 and len(said) == 4


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, errors.BadRequest), (401, errors.Unauthorized), (403, errors.Forbidden)),
        *((404, errors.NotFound), (409, errors.Conflict), (413, errors.TooLarge)),
        *((500, errors.ServerError), (507, errors.StorageFull), (405, errors.BadRequest)),
    ],
)
def test_what_is_not_tried_again(status: int, kind: type[Exception]) -> None:
    script = _Script((status, {}, b'{"id": 0, "status": "Unknown", "message": "why"}'))
    with pytest.raises(kind, match="why"):
        run(Sender(script, "http://x", None).json(_GET))
    assert script.slept == []


def test_patience_ends() -> None:
    full = (429, {"Retry-After": "30"}, b'{"message": "full"}')
    with pytest.raises(errors.QuotaExceeded, match="full"):
        run(Sender(_Script(full), "http://x", None, 10).json(_GET))
    with pytest.raises(errors.ServerUnavailable):
        run(Sender(_Script(ConnectionFailed("refused")), "http://x", None, 0).json(_GET))
    with pytest.raises(errors.ServerUnavailable):
        hopeless = ConnectionFailed("no such name", is_final=True)
        run(Sender(_Script(hopeless), "http://x", None).json(_GET))


def test_answers_that_break_again_and_again_come_to_an_end() -> None:
    class Broken(_Script):
        async def send(self, request: Request) -> Answer:
            """Answer with a head and no body."""
            self.sent.append(request)
            return _CutAnswer(200, {}, b"")

    script = Broken()
    pieces = read_output(Sender(script, "http://x", None, 0), 1, "stdout")
    with pytest.raises(errors.ServerUnavailable, match="again and again"):
        list(iterate(pieces))
    assert 1 <= len(script.sent) <= 3


def test_what_may_have_been_done_is_not_done_twice() -> None:
    script = _Script(ConnectionBroken("reset"), _OK)
    once = Request("POST", "/jobs/rerun", is_repeatable=False)
    with pytest.raises(errors.ServerUnavailable, match="not known"):
        run(Sender(script, "http://x", None).json(once))
    assert len(script.sent) == 1


def test_a_redirection_is_not_followed_with_the_token() -> None:
    script = _Script((302, {"Location": "http://evil"}, b""))
    with pytest.raises(errors.UnexpectedAnswer, match="http://evil"):
        run(Sender(script, "http://x", "secret").json(_GET))
    with pytest.raises(errors.UnexpectedAnswer):
        run(Sender(_Script((200, {}, b"<html>")), "http://x", None).json(_GET))


# --- the package ------------------------------------------------------------------


def test_the_light_path_imports_nothing_heavy() -> None:
    """``ls`` in a pipe, a client and its errors load neither aiohttp nor rich nor asyncio."""
    code = (
        "import sys, orchestrator_client.main\n"
        "from orchestrator_client import Client, JobFilter, OrchestratorError, session\n"
        "from orchestrator_client.commands import looking\n"
        "print(sorted({'aiohttp', 'rich', 'asyncio', 'zipfile'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_package_is_there() -> None:
    import orchestrator_client  # noqa: PLC0415

    for name in orchestrator_client.__all__:
        assert getattr(orchestrator_client, name).__doc__, name
