"""What an agent finds on its disk: of this version, of the one before, damaged, or nobody's."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from agent.attempt_directory import AttemptDirectory, find_all
from agent.records import (
    AttemptRecord,
    Incomplete,
    Unreadable,
    decode_attempt,
    decode_report,
    encode_attempt,
    encode_report,
)
from jobs import FileSpec, Isolation, IsolationKind, JobState, Resources
from tests.harness import AgentProcess, Server, eventually, lines
from wire.messages import Assign, Finished, OutputLimits

ASSIGN = Assign(
    *(5, 7, 2, 3, "Größe", 60, 1.5, OutputLimits(10, 20, 30)),
    (FileSpec("run.sh", 4, "ab" * 32), FileSpec("in/data", 0, "cd" * 32)),
    Resources(2, 8 << 30, 1),
    Isolation(IsolationKind.LANDLOCK, network=False, readable=("/data",)),
    ("--partition=gpu",),
)
REPORT = Finished(7, JobState.FAILED, 3, "run.sh ended with exit code 3", 22, "ef" * 32)

OLD_ATTEMPT = (
    "0f0f-boot\n"
    '{"job_id":5,"attempt_id":7,"number":2,"user_id":3,"service":"Gr\\u00f6\\u00dfe",'
    '"timeout_seconds":60,"grace_seconds":1.5,"output":{"result_bytes":10,"result_files":20,'
    '"log_bytes":30},"files":[{"name":"run.sh","size":4,"sha256":"' + "ab" * 32 + '"}],'
    '"type":"assign"}'
)
OLD_REPORT = (
    '{"attempt_id":7,"state":"Failed","exit_code":3,"message":"run.sh ended with exit code 3",'
    '"result_size":22,"result_sha256":"' + "ef" * 32 + '","type":"finished"}'
)


def test_records_come_back_as_they_were_written() -> None:
    record = AttemptRecord(ASSIGN, "boot", "life", "local")
    assert decode_attempt(encode_attempt(record)) == record
    assert decode_report(encode_report(REPORT)) == REPORT


def test_records_of_the_version_before_are_read() -> None:
    record = decode_attempt(OLD_ATTEMPT)
    assert (record.boot, record.incarnation) == ("0f0f-boot", "")
    assert record.assign == Assign(
        *(5, 7, 2, 3, "Größe", 60, 1.5, OutputLimits(10, 20, 30)),
        (FileSpec("run.sh", 4, "ab" * 32),),
    )
    assert decode_report(OLD_REPORT) == REPORT


def test_a_record_that_does_not_say_its_executor_is_any_executors() -> None:
    fields = json.loads(encode_attempt(AttemptRecord(ASSIGN, "boot", "life", "local")))
    del fields["executor"]
    assert decode_attempt(json.dumps(fields)).executor == ""


def test_a_record_that_was_not_written_to_its_end_is_told_from_one_of_another_format() -> None:
    text = encode_attempt(AttemptRecord(ASSIGN, "boot", "life", "local"))
    for length in range(len(text)):
        with pytest.raises(Incomplete):
            decode_attempt(text[:length])
    later = json.dumps({**json.loads(text), "format": 99})
    for unreadable in (
        later,
        text.replace("run.sh", 'x",7,["'),
        "[]",
        text.replace('"files"', '"f"'),
    ):
        with pytest.raises(Unreadable):
            decode_attempt(unreadable)


def made(root: Path, name: str, text: str, *claims: str) -> Path:
    path = root / name
    (path / "job").mkdir(parents=True)
    (path / "attempt.json").write_text(text)
    for claim in claims:
        (path / claim).symlink_to("local")
    return path


def test_only_what_is_surely_incomplete_and_was_never_claimed_is_removed(tmp_path: Path) -> None:
    text = encode_attempt(AttemptRecord(ASSIGN, "boot", "life", "local"))
    made(tmp_path, "7.life", text)
    half = made(tmp_path, "8.life", text[:40])
    removed = made(tmp_path, "removed-9.life", text, "process")
    kept = {
        made(tmp_path, "10.life", text[:40], "slurm-name"),
        made(tmp_path, "11", text[:40], "process"),
        made(tmp_path, "12.life", json.dumps({**json.loads(text), "format": 99})),
        made(tmp_path, "13.life", text),
    }
    os.replace(tmp_path / "13.life" / "job", tmp_path / "13.life" / "attempt.json.d")
    (tmp_path / "13.life" / "attempt.json").unlink()
    (tmp_path / "13.life" / "attempt.json").mkdir()  # can't be read: EISDIR
    found = find_all(tmp_path)
    assert [attempt.path.name for attempt in found.attempts] == ["7.life"]
    assert set(found.unreadable) == kept
    assert not half.exists()
    assert not removed.exists()


async def test_the_directory_of_another_life_of_the_database_is_not_taken_over(
    tmp_path: Path,
) -> None:
    first = AttemptDirectory(tmp_path / "7.one", ASSIGN, "one")
    await first.create()
    assert find_all(tmp_path).attempts[0].incarnation == "one"
    first.remove()
    assert list(tmp_path.iterdir()) == []


async def test_an_agent_kills_what_an_unreadable_attempt_left_and_keeps_its_files(
    patient_server: Server, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = AgentProcess(patient_server, "upgraded")
    await agent.start()
    script = f"echo $ORCHESTRATOR_ATTEMPT >> {witness}; [ $ORCHESTRATOR_ATTEMPT = 2 ] || sleep 1000"
    job_id = await patient_server.upload(script)
    await patient_server.wait(job_id, "Running")
    await eventually(lambda: lines(witness) == ["1"], "it runs")
    agent.send(signal.SIGKILL)
    record = agent.attempt(1) / "attempt.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))
    await agent.start()
    await patient_server.result(job_id)
    assert lines(witness) == ["1", "2"]
    assert record.exists()
    assert not [process for process in patient_server.processes() if process.name() == "sleep"]


async def test_an_agent_of_this_version_adopts_the_jobs_of_the_version_before(
    patient_server: Server, tmp_path: Path
) -> None:
    """Its records and the link of its supervisor are put in place of ours while the job runs."""
    witness, go = tmp_path / "witness", tmp_path / "go"
    agent = AgentProcess(patient_server, "upgraded")
    await agent.start()
    job_id = await patient_server.upload(
        f"echo runs >> {witness}; until [ -e {go} ]; do sleep 0.05; done; echo kept > file"
    )
    await patient_server.wait(job_id, "Running")
    await agent.kill()
    directory = agent.attempt(1)
    assign = decode_attempt((directory / "attempt.json").read_text()).assign
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    fields = {
        **{name: getattr(assign, name) for name in ("job_id", "attempt_id", "number", "user_id")},
        **{name: getattr(assign, name) for name in ("service", "timeout_seconds", "grace_seconds")},
        "output": {name: getattr(assign.output, name) for name in assign.output.__slots__},
        "files": [{name: getattr(file, name) for name in file.__slots__} for file in assign.files],
        "type": "assign",
    }
    (directory / "attempt.json").write_text(f"{boot}\n{json.dumps(fields)}")
    link = os.readlink(directory / "process")
    (directory / "process").unlink()
    (directory / "process").symlink_to(" ".join(link.split()[:2]))
    directory.rename(directory.with_name("1"))  # that version knew nothing of incarnations
    await agent.start()
    await agent.wait_connected()
    go.touch()
    assert (await patient_server.result(job_id)).read("file") == b"kept\n"
    assert lines(witness) == ["runs"]
