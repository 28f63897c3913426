"""Results and their parts over HTTP: ranges, conditions, single files, asked with curl."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio

from archive import reader as zip_members
from tests.harness import Server, curl, run, running_server

SCRIPT = """
mkdir 'a dir' && echo inner > 'a dir/in & out.txt' && ln -s /etc/passwd link
echo '<script>' > page.html
printf 'umlaut' > 'gr\u00fc\u00dfe 100%.txt'
head -c 3000000 /dev/urandom > random.bin
head -c 50000000 /dev/zero > zeros.bin
chmod 600 page.html
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Server, int]]:
    async with running_server(tmp_path_factory.mktemp("server"), "--slots", "2") as server:
        job_id = await server.upload(SCRIPT, {"input.pdb": b"ATOM\n"})
        await server.wait(job_id, "Completed")
        yield server, job_id


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def headed(*arguments: str) -> tuple[int, dict[str, str], bytes]:
    """Ask with curl and return status, fields in lower case, and body."""
    code, output = await run("curl", "-sS", "-i", *arguments)
    assert code == 0, output
    head, _, body = output.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, value in fields.items()}, body


async def test_a_broken_download_is_resumed_by_curl(
    shared: tuple[Server, int], tmp_path: Path
) -> None:
    server, job_id = shared
    whole = (await server.download(job_id)).body
    partial = tmp_path / "results.zip"
    for cut in (1, 262_144, 1_000_001, len(whole) - 1):
        partial.write_bytes(whole[:cut])
        code, output = await run(
            "curl", "-sS", "-C", "-", "-o", str(partial), f"{server.url}/download/{job_id}"
        )
        assert (code, partial.read_bytes() == whole) == (0, True), (cut, output)


async def test_ranges_and_conditions_are_obeyed_as_rfc_9110_says(
    shared: tuple[Server, int],
) -> None:
    server, job_id = shared
    url = f"{server.url}/download/{job_id}"
    status, fields, whole = await headed(url)
    size, tag = len(whole), fields["etag"]
    assert (status, fields["accept-ranges"], int(fields["content-length"])) == (200, "bytes", size)
    parts = {
        "bytes=0-": (206, 0, size),
        "bytes=5-9": (206, 5, 10),
        "Bytes = 600000-700000": (206, 600_000, 700_001),
        f"bytes={size - 1}-{size * 2}": (206, size - 1, size),
        "bytes=-7": (206, size - 7, size),
        f"bytes=-{size * 2}": (206, 0, size),
        "bytes=9-5": (200, 0, size),
        "bytes=0-1,5-6": (200, 0, size),
        "bytes=-": (200, 0, size),
        "lines=0-1": (200, 0, size),
    }
    for asked, (expected, start, end) in parts.items():
        status, fields, body = await headed(url, "-H", f"Range: {asked}")
        assert (status, body == whole[start:end]) == (expected, True), asked
        if expected == 206:
            assert fields["content-range"] == f"bytes {start}-{end - 1}/{size}"
            assert fields["etag"] == tag
    for asked in (f"bytes={size}-", "bytes=-0"):
        status, fields, body = await headed(url, "-H", f"Range: {asked}")
        assert (status, fields["content-range"]) == (416, f"bytes */{size}")
        assert json.loads(body)["status"] == "Unknown"
    conditions = {
        (f"If-None-Match: {tag}",): 304,
        (f"If-None-Match: W/{tag}",): 304,
        ("If-None-Match: *",): 304,
        ('If-None-Match: "other"',): 200,
        (f"If-Match: {tag}",): 200,
        ('If-Match: "other"',): 412,
        (f"If-Range: {tag}", "Range: bytes=0-0"): 206,
        ('If-Range: "other"', "Range: bytes=0-0"): 200,
        (f"If-Range: W/{tag}", "Range: bytes=0-0"): 200,
    }
    for asked_fields, expected in conditions.items():
        options = [word for field in asked_fields for word in ("-H", field)]
        status, fields, body = await headed(url, *options)
        assert status == expected, asked_fields
        if expected == 304:
            assert (fields["etag"], body) == (tag, b"")


async def test_head_tells_the_same_and_sends_nothing(shared: tuple[Server, int]) -> None:
    server, job_id = shared
    for path in (f"download/{job_id}", f"jobs/{job_id}/files/random.bin"):
        _, fields, body = await headed(f"{server.url}/{path}")
        # HEAD has no ranges (RFC 9110, 14.2)
        answer = await headed("-I", "-H", "Range: bytes=0-1", f"{server.url}/{path}")
        for name in ("date", "etag", "content-length", "content-type", "content-disposition"):
            assert name == "date" or answer[1][name] == fields[name]
        assert (answer[0], answer[2], int(fields["content-length"])) == (200, b"", len(body))


async def test_a_little_result_is_sent_as_a_large_one_is(shared: tuple[Server, int]) -> None:
    server, large_id = shared
    little_id = await server.upload("echo little\n")
    await server.wait(little_id, "Completed")
    url = f"{server.url}/download/{little_id}"
    _, fields_of_large, _ = await headed("-I", f"{server.url}/download/{large_id}")
    status, fields, whole = await headed(url)
    size = len(whole)
    assert fields.keys() == fields_of_large.keys()
    assert (status, fields["content-type"], int(fields["content-length"])) == (
        *(200, "application/zip", size),
    )
    assert size < 65536, "it is not read in pieces"
    assert b"little" in zipfile.ZipFile(io.BytesIO(whole)).read("stdout.log")
    for asked, part in {"bytes=5-9": whole[5:10], "bytes=-7": whole[-7:]}.items():
        status, fields, body = await headed(url, "-H", f"Range: {asked}")
        assert (status, body) == (206, part)
        assert fields["content-range"].endswith(f"/{size}")
    assert (await headed(url, "-H", f"Range: bytes={size}-"))[0] == 416
    assert (await headed(url, "-H", f"If-None-Match: {fields['etag']}"))[0] == 304
    answer = await headed("-I", url)
    assert (int(answer[1]["content-length"]), answer[2]) == (size, b"")


async def test_the_files_of_a_result_are_listed_and_got_one_by_one(
    shared: tuple[Server, int],
) -> None:
    server, job_id = shared
    archive = await server.result(job_id)
    listed = (await curl(f"{server.url}/jobs/{job_id}/files")).json()
    assert (listed["id"], listed["source"], listed["next_cursor"]) == (job_id, "result", None)
    files = {file["path"]: file for file in listed["files"]}
    assert {name: file["size"] for name, file in files.items()} == {
        info.filename: info.file_size for info in archive.infolist()
    }
    assert files["page.html"]["mode"] == "0600"
    assert files["page.html"]["modified"].endswith("Z")
    assert (files["a dir/"]["type"], files["link"]["type"]) == ("directory", "link")
    for name, file in files.items():
        answer = await curl(f"{server.url}/jobs/{job_id}/files/{quote(name, safe='')}")
        if file["type"] == "file":
            assert (answer.status, answer.body == archive.read(name)) == (200, True), name
        else:
            assert answer.status == 404, name
    for name in ("nothing", "a%20dir", "../run.sh", "%2e%2e/run.sh", "%FF", "a%20dir//in"):
        answer = await curl("--path-as-is", f"{server.url}/jobs/{job_id}/files/{name}")
        assert (answer.status, answer.json()["status"]) == (404, "Unknown"), name


async def test_a_file_that_a_job_made_never_runs_in_the_browser(
    shared: tuple[Server, int],
) -> None:
    server, job_id = shared
    base = f"{server.url}/jobs/{job_id}/files"
    _, fields, _ = await headed(f"{base}/page.html")
    assert fields["content-type"] == "application/octet-stream"
    assert fields["content-disposition"] == 'attachment; filename="page.html"'
    assert fields["x-content-type-options"] == "nosniff"
    _, fields, _ = await headed(f"{base}/gr%C3%BC%C3%9Fe%20100%25.txt")
    assert fields["content-type"] == "text/plain; charset=utf-8"
    assert fields["content-disposition"] == (
        "attachment; filename*=UTF-8''gr%C3%BC%C3%9Fe%20100%25.txt"
    )
    status, _, _ = await headed(f"{base}/page.html", "-H", "If-None-Match: *")
    assert status == 304


async def test_before_a_result_the_files_are_the_uploaded_ones(tmp_path: Path) -> None:
    async with running_server(tmp_path / "idle", "--no-agent") as idle:
        job_id = await idle.upload("true", {"input.pdb": b"ATOM 1\n"})
        listed = (await curl(f"{idle.url}/jobs/{job_id}/files")).json()
        assert listed["source"] == "input"
        assert [file["path"] for file in listed["files"]] == ["run.sh", "input.pdb"]
        assert len(listed["files"][0]["sha256"]) == 64
        url = f"{idle.url}/jobs/{job_id}/files"
        assert (await curl("-H", "Range: bytes=5-", f"{url}/input.pdb")).body == b"1\n"
        assert (await curl(f"{url}/other")).status == 404
        assert (await curl(f"{idle.url}/jobs/99/files")).status == 404
        assert (await curl(f"{url}?cursor=x")).status == 400


# --- the ZIP reader ---------------------------------------------------------------


def archive_of(data: bytes) -> zip_members.Archive:
    async def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    return zip_members.Archive(read, len(data))


def zip_of(members: dict[str, bytes], method: int, *, large: bool = False) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=large) as member:
                member.write(content)
        archive.comment = b"a comment"
    return target.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
async def test_members_are_read_as_zipfile_reads_them(method: int) -> None:
    members = {f"{number:04}/{'n' * 200}": os.urandom(number % 7) for number in range(5000)}
    members |= {
        "large": os.urandom(700_000),
        "empty": b"",
        "runs": bytes(3_000_000),
        "\u00fc": b"1",
    }
    archive = archive_of(zip_of(members, method, large=True))
    found: list[zip_members.Member] = [member async for member in archive.members()]
    assert [member.name for member in found] == list(members)
    for member in (found[0], found[6], *found[-4:]):
        pieces = [piece async for piece in archive.content(member)]
        assert b"".join(pieces) == members[member.name]
        assert max(map(len, pieces), default=0) <= 256 * 1024
    # from any member on, as a cursor does
    middle = found[3210]
    assert [member async for member in archive.members(middle.start)] == found[3210:]
    assert await archive.find("\u00fc") == found[-1]
    assert await archive.find("no such") is None


async def test_a_damaged_archive_is_said_to_be_damaged() -> None:
    whole = zip_of({"a": os.urandom(500).hex().encode()}, zipfile.ZIP_DEFLATED)
    start = whole.rfind(b"PK\x01\x02")
    damaged: list[Any] = [b"", b"no zip at all", whole[:-20], whole[start:]]
    damaged.append(whole[:start].replace(b"PK\x03\x04", b"PK\x03\x05") + whole[start:])
    damaged.append(whole[:50] + b"\xff" * 100 + whole[150:])
    for data in damaged:
        archive = archive_of(data)
        with pytest.raises(zip_members.DamagedArchive):
            async for member in archive.members():
                async for _ in archive.content(member):
                    pass
