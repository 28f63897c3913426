"""What a job needs: amounts as people write and read them, and what fits where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import NO_RESOURCES, Resources, memory_text, parse_count, parse_memory

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 2**20), ("512M", 2**29), ("8G", 2**33), ("8g", 2**33), ("2TiB", 2**41)],
)
def test_memory_is_read_in_bytes_or_with_a_unit(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "12Q", "-1", "1.5G", "0", "100", "G", "9" * 25, "2000T", "٣M"]
)
def test_what_is_no_amount_of_memory_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "65", "٣", "two"])
def test_what_is_no_number_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(ValueError, match="from 1 to 64"):
        parse_count(text, 1, 64)


def test_amounts_are_written_for_a_reader() -> None:
    assert [memory_text(size) for size in (100, 2**29, 2**33, int(9.1 * 2**30))] == [
        "100 B",
        "512 MB",
        "8 GB",
        "9.1 GB",
    ]


_RESOURCES = st.builds(Resources, *(st.integers(0, 4) for _ in range(3)))


@given(_RESOURCES, _RESOURCES)
def test_what_fits_leaves_nothing_negative(needed: Resources, room: Resources) -> None:
    left = room - needed
    assert needed.fits(room) == (min(left.cpus, left.memory, left.gpus) >= 0)
    assert left + needed == room
    assert NO_RESOURCES.fits(room)
