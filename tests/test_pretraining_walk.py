"""docs/pretraining.md, executed line by line."""

import json
import re

import pytest
from conftest import ROOT
from walks import walk

PAGE = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_walk_from_texts_to_a_pretrained_model_runs_line_by_line(tmp_path, monkeypatch):
    said = walk("pretraining.md", tmp_path, monkeypatch, {"json": "config.json", "yaml": "run.yaml"})
    assert len(said) == 10
    dry, mixed = (text for line, text in said.items() if "--dry-run" in line)
    dry = dry.replace(f"{tmp_path}/", "")
    for line in re.search(r"^```\n(Model .*?)^```", PAGE, re.M | re.S)[1].splitlines():
        if line.startswith("Memory"):  # a GPU's plan is another
            assert "Memory    about " in dry
        else:
            assert f"{line}\n" in dry, line
    assert re.search(r"facts: \d+ rows, 5\d\.\d% of the tokens", mixed)
    for name in ("model", "mixed"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert losses[-1] < losses[0] - 2
        assert any("bits_per_character" in line for line in lines)
    settings = json.loads((tmp_path / "mixed" / "run.json").read_text())["settings"]
    assert (settings["optimizer"], settings["phase2_from"], settings["batch_size"]) == ("muon", 0.7, 8)
    assert all(text.strip() for line, text in said.items() if " generate " in line)
