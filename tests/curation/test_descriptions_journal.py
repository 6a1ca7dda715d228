"""The journal: what is in it stays, whatever a kill leaves of its last line."""

from pathlib import Path

import pytest

from lego_pipeline.curation.descriptions_journal import Journal, read_journal
from lego_pipeline.curation.descriptions_server import Asked


def outcome(row_id: str, description: str | None = "I take the cup, « slowly »\n.") -> Asked:
    return Asked(row_id, "key", description, None, True, ("no",), 2, 10, 5)


def keep(path: Path, *outcomes: Asked) -> None:
    journal = Journal(path)
    for item in outcomes:
        journal.keep(item)
    journal.close()


def test_outcomes_come_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    assert read_journal(path) == []
    keep(path, outcome("a", None), outcome("b"))
    keep(path, outcome("a"))
    assert read_journal(path) == [outcome("a", None), outcome("b"), outcome("a")]


@pytest.mark.parametrize("cut", [1, 2, 30, 60])
def test_a_line_that_was_cut_off_costs_that_row_alone(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    keep(path, outcome("a"), outcome("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read_journal(path) == [outcome("a")]  # also where the line break alone is missing: `Journal` cuts it off
    keep(path, outcome("c"))
    assert read_journal(path) == [outcome("a"), outcome("c")]
    assert path.read_bytes().startswith(whole[: whole.index(b"\n") + 1])


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    keep(path, outcome("a"), outcome("b"))
    path.write_text("rubbish\n" + path.read_text())
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1: must be an outcome"):
        read_journal(path)
