"""The codec and the transition table, by property."""

from __future__ import annotations

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs
from jobs import ACTIVE_STATES, FINAL_STATES, TRANSITIONS, JobState
from wire import codec, messages
from wire.frames import (
    MAX_FRAME_BYTES,
    Frame,
    Stream,
    decode_frame,
    encode_frame,
    transfer_id,
    transfer_parts,
)
from wire.messages import ProtocolError

pytestmark = pytest.mark.quick

_INTEGERS = st.integers(min_value=-(2**63), max_value=2**63 - 1)
_NUMBERS = st.floats(min_value=-1e11, max_value=1e11)
_TEXT = st.text(st.characters(codec="utf-8"))
for _scalar, _strategy in ((int, _INTEGERS), (float, _NUMBERS), (str, _TEXT)):
    st.register_type_strategy(_scalar, _strategy)
_MESSAGES = st.one_of(*(st.from_type(cls) for cls in typing.get_args(messages.Message)))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(_MESSAGES)
def test_every_message_survives_the_wire(message: messages.Message) -> None:
    assert codec.decode(codec.encode(message)) == message


@given(_MESSAGES, st.data())
def test_a_message_with_a_mutated_field_is_parsed_or_refused(
    message: messages.Message, data: st.DataObject
) -> None:
    fields = json.loads(codec.encode(message))
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(_JSON)
    try:
        decoded = codec.decode(json.dumps(fields))
    except ProtocolError:
        return
    assert isinstance(decoded, (type(message), codec.UnknownMessage)) or name == "type"


@given(st.text() | _JSON.map(json.dumps))
def test_arbitrary_text_is_refused_and_nothing_else(text: str) -> None:
    try:
        decoded = codec.decode(text)
    except ProtocolError:
        return
    assert dataclasses.is_dataclass(decoded)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(ProtocolError):
        codec.decode("[" * 200_000)


def test_unknown_types_and_fields_of_a_newer_peer_are_passed_over() -> None:
    assert codec.decode('{"type": "teleport", "to": 1}') == codec.UnknownMessage("teleport")
    assert codec.decode('{"type": "stored", "attempt_id": 4, "new": []}') == messages.Stored(4)


def test_an_agent_that_knows_no_load_beats_all_the_same() -> None:
    assert codec.decode('{"type":"heartbeat"}') == messages.Heartbeat(load=None)


@given(
    st.integers(0, 2**60 - 1),
    st.sampled_from(Stream),
    st.integers(0, 2**63),
    st.binary(min_size=1, max_size=1000),
)
def test_frames_survive_the_wire(attempt: int, stream: Stream, offset: int, data: bytes) -> None:
    transfer = transfer_id(attempt, stream)
    frame = decode_frame(encode_frame(transfer, offset, data))
    assert frame == Frame(transfer, offset, data)
    assert transfer_parts(frame.transfer) == (attempt, stream)


@pytest.mark.parametrize("length", [0, 15, 16, MAX_FRAME_BYTES + 1])
def test_frames_of_impossible_length_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(bytes(length))


@given(st.lists(st.sampled_from(JobState), max_size=30))
def test_a_walk_through_the_table_ends_in_cleaned_at_most(targets: list[JobState]) -> None:
    state, was_final = JobState.QUEUED, False
    for target in targets:
        if target not in TRANSITIONS[state]:
            continue
        state = target
        assert not was_final or state is JobState.CLEANED, "only retention follows a final state"
        was_final = was_final or state in FINAL_STATES


def test_every_state_has_its_row_and_the_design_rules_hold() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert not TRANSITIONS[JobState.CLEANED]
    for state in FINAL_STATES:
        assert TRANSITIONS[state] == {JobState.CLEANED}
    for state in ACTIVE_STATES:
        assert {JobState.QUEUED, JobState.KILLED} <= TRANSITIONS[state]
    assert JobState.COMPLETED not in TRANSITIONS[JobState.SUBMITTED]


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/etc", "a\\b", "a\0b", "a\nb", "\x7f", "\udc80", "é" * 128),
        *("a/", "a//b", "a/../b", "./a", "a/.", "/".join("a" * 65), "/".join(["é" * 70] * 30)),
    ],
)
def test_unsafe_file_names_have_a_problem(name: str) -> None:
    assert jobs.file_name_problem(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        *("run.sh", "two words.pdb", "ünïcode.txt", ".hidden", "a" * 255),
        *("a/b", "..a/...", "/".join("a" * 64), "/".join(["a" * 255] * 16)),
    ],
)
def test_plain_file_names_have_none(name: str) -> None:
    assert jobs.file_name_problem(name) is None


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a", "a/b"], "'a' is a file and a directory"),
        (["a/b/c", "a0", "a/b"], "'a/b' is a file and a directory"),
        (["é", "e\u0301"], "more than once"),
        ([f"{number}/{'d/' * 60}f" for number in range(200)], "more than 10000 directories"),
        ([f"{number:08}{'x' * 240}" for number in range(20_000)], "longer than 4194304 bytes"),
        (["a", "a.b", "a0", "b/a", "b/c/d", "b/c/e"], None),
    ],
)
def test_names_that_can_not_be_of_one_job_are_found(names: list[str], problem: str | None) -> None:
    found = jobs.file_names_problem(names)
    assert found is None if problem is None else problem in (found or "")
    assert problem is not None or jobs.directories_of(names) == ["b", "b/c"]
