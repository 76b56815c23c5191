"""docs/notes-to-model.md, executed line by line on the bundled model."""

import json

import pytest
from walks import walk

pytest.importorskip("lm_eval")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_walk_from_notes_to_a_model_runs_line_by_line(tmp_path, monkeypatch):
    said = walk("notes-to-model.md", tmp_path, monkeypatch)
    assert len(said) == 11
    unique = rows_of(tmp_path / "unique" / "data.jsonl")
    assert len(unique) == 4
    assert all("<EMAIL>" in row["text"] and "example.org" not in row["text"] for row in unique)
    assert {row["provenance"]["kind"] for row in rows_of(tmp_path / "asked" / "data.jsonl")} == {"questions"}
    assert (tmp_path / "result" / "report.md").exists()
    assert [*said.values()][-1].strip()
