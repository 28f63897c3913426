"""The ZIP of a result: readable by others, in bounded memory, whatever the tree is like."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import trees
from archive import writer as archive
from tests.harness import PROJECT, run

pytestmark = pytest.mark.quick

_MIB = 1024 * 1024


def pack(directory: Path, target: Path) -> None:
    with archive.new_zip(target) as writer:
        for entry in trees.walk(directory):
            assert trees.add_entry(writer, entry)


async def assert_valid(path: Path) -> None:
    """Info-ZIP's program, where it is there, and Python's module find nothing wrong."""
    with zipfile.ZipFile(path) as read:
        assert read.testzip() is None
    code, output = await run(
        "bash", "-c", 'command -v unzip > /dev/null || exit 0; unzip -tq "$0"', str(path)
    )
    assert code == 0, output


@given(
    contents=st.dictionaries(
        st.text(
            st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
            min_size=1,
            max_size=60,
        ).filter(lambda name: name not in (".", "..")),
        st.one_of(st.binary(max_size=300), st.integers(0, 3 * _MIB).map(bytes)),
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    place = tmp_path_factory.mktemp("zip")
    status = os.stat(place)
    with archive.new_zip(place / "out.zip") as writer:
        for name, content in contents.items():
            pieces = (content[i : i + _MIB] for i in range(0, len(content), _MIB))
            writer.add(name, status, pieces)
    with zipfile.ZipFile(place / "out.zip") as read:
        assert read.testzip() is None
        assert {info.orig_filename: read.read(info) for info in read.infolist()} == contents


async def test_other_programs_read_it(tmp_path: Path) -> None:
    source = tmp_path / "job"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "random").write_bytes(os.urandom(3 * _MIB))
    (source / "zeros").write_bytes(bytes(3 * _MIB))
    (source / "Müller 中").write_text("text")
    (source / "empty").touch()
    (source / "link").symlink_to("zeros")
    pack(source, tmp_path / "out.zip")
    await assert_valid(tmp_path / "out.zip")
    if shutil.which("unzip") is None:
        pytest.skip("Info-ZIP's unzip is not installed")
    assert (await run("unzip", "-q", "out.zip", "-d", "out", cwd=tmp_path))[0] == 0
    assert (await run("diff", "-r", "--no-dereference", "job", "out", cwd=tmp_path)) == (0, b"")


async def test_offsets_past_four_gigabytes_and_more_than_65535_members_fit(tmp_path: Path) -> None:
    target, status = tmp_path / "out.zip", os.stat(tmp_path)
    with archive.new_zip(target) as writer:
        # a hole stands for what members before would have written
        writer._end = 5 * 1024**3
        writer._target.seek(writer._end)
        for number in range(65_600):
            writer.add(f"{number}", status, ())
    with zipfile.ZipFile(target) as read:
        assert len(read.infolist()) == 65_600
        assert read.infolist()[-1].header_offset > 5 * 1024**3
        assert read.read("65599") == b""
    assert target.stat().st_blocks * 512 < 50 * _MIB


async def test_a_deep_tree_and_many_files_grow_no_memory(tmp_path: Path) -> None:
    script = """if True:
    import os, resource, sys
    from pathlib import Path
    from archive import writer as archive
    from agent import trees
    os.chdir(sys.argv[1]); os.mkdir("tree"); os.chdir("tree")
    for number in range(10000):
        os.close(os.open(f"file-{number}", os.O_CREAT | os.O_WRONLY))
    for number in range(600):
        os.mkdir("d" * 200); os.chdir("d" * 200)
    os.chdir(sys.argv[1])
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, skipped = peak(), 0
    with archive.new_zip(Path("out.zip")) as writer:
        for entry in trees.walk(Path("tree")):
            skipped += not trees.add_entry(writer, entry)
    trees.remove_tree(Path("tree"))
    print(skipped, os.path.exists("tree"), peak() - before)
    """
    code, output = await run(sys.executable, "-c", script, str(tmp_path), cwd=PROJECT)
    assert code == 0, output
    skipped, is_left, grown = output.split()
    # of 600 directories those are left out whose names are longer than ZIP's 65,535 bytes
    assert (int(skipped), is_left) == (600 - 65535 // 201, b"False")
    assert int(grown) < 4 * 1024  # KiB
    with zipfile.ZipFile(tmp_path / "out.zip") as read:
        assert read.testzip() is None


def test_a_link_that_takes_the_place_of_a_file_has_nothing_made_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job changes its file for a link just when the agent finds that it may not read it."""
    secret = tmp_path / "secret"
    secret.write_text("of the agent's user")
    secret.chmod(0o400)
    (tmp_path / "job").mkdir()
    file = tmp_path / "job" / "file"
    file.write_text("own")
    file.chmod(0)
    true_open = os.open

    def open_too_late(path: str, flags: int, *rest: int, **more: int) -> int:
        if path == "file" and not flags & os.O_PATH:
            file.unlink(missing_ok=True)
            file.symlink_to(secret)
            raise PermissionError(13, "its mode forbids")
        return true_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_too_late)
    for entry in trees.walk(tmp_path / "job"):
        with archive.new_zip(tmp_path / "result.zip") as writer:
            assert not trees.add_entry(writer, entry)
    assert secret.stat().st_mode & 0o777 == 0o400
