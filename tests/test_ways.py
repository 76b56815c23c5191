"""The ways that the pages draw, of a prompt, of an example and of a tensor, against what calls what."""

import re
import sys

import pytest
from conftest import ROOT
from tuning_models import facts, write_jsonl

from phi3_mlx.cli import main

PACKAGE = ROOT / "phi3_mlx"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DRAWINGS = re.findall(
    r"```text\nphi3-mlx (\w+) .*\n((?: {2}\S.*\n)+)```", (ROOT / "docs/how-it-works.md").read_text("utf-8")
)
# The function of each module that does what the drawing says of it.
DOES = {
    "generate": {
        "cli/generate": "_prompt",
        "store/hub": "resolve",
        "text/tokenizer": "read_tokenizer",
        "text/chat": "render_chat",
        "engine/plan": "plan_run",
        "store/checkpoint": "read_model",
        "engine/scheduler": "admit",
        "engine/batch": "_step",
        "text/streaming": "add",
        "text/stops": "add",
    },
    "convert": {
        "conversion/sources": "tensor_of",
        "conversion/layout": "of",
        "conversion/rounding": "pack",
        "conversion/writer": "_bytes",
    },
    "tune": {
        "tuning/settings": "check",
        "tuning/data": "read_data",
        "store/hub": "resolve",
        "text/chat": "render_training_chat",
        "tuning/plan": "plan_memory",
        "tuning/batches": "make_part",
        "tuning/loss": "part_loss",
        "tuning/trainer": "_step",
        "tuning/checkpoints": "save_checkpoint",
    },
}
LAST = "save_checkpoint"  # of which a run makes one before its first step too
ONCE = {"resolve", "read_tokenizer", "render_chat", "plan_run", "read_model", "read_data", "plan_memory", "of"}


def modules_of(drawing):
    """The modules that the lines of a drawing name: `text/tokenizer, chat  TEXT -> token ids`."""
    names = []
    for line in drawing.splitlines():
        room, _, modules = line.strip().split("  ")[0].partition("/")
        names += [f"{room}/{module}" for module in modules.split(", ")]
    return names


def returns_of(words, wanted):
    """The modules of `wanted` in the order in which their functions first returned, and how often each was called.

    The function `LAST` counts where it returned last.
    """
    functions = {(str(PACKAGE / f"{module}.py"), name): module for module, name in wanted.items()}
    finished, calls = [], dict.fromkeys(wanted, 0)

    def watch(frame, event, _):
        module = functions.get((frame.f_code.co_filename, frame.f_code.co_name))
        if module is not None and event == "call":
            calls[module] += 1
        if module is not None and event == "return":
            if module in finished and wanted[module] == LAST:
                finished.remove(module)
            if module not in finished:
                finished.append(module)

    sys.setprofile(watch)
    try:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
    finally:
        sys.setprofile(None)
    assert ended.value.code == 0
    return finished, calls


def command_of(name, tmp_path):
    if name == "generate":
        return ["generate", "-p", "Tell me a story about a duck.", "--max-tokens", 8]
    if name == "convert":
        return ["convert", ROOT / "weights" / "tiny-8bit", "-o", tmp_path / "new", "--bits", 3, "--no-report"]
    data = write_jsonl(tmp_path / "my.jsonl", facts(12))
    return ["tune", "-d", data, "-o", tmp_path / "adapter", "--steps", 1, "--rank", 1]


def test_three_ways_are_drawn():
    assert {name for name, _ in DRAWINGS} == {*DOES}


@pytest.mark.parametrize(("name", "drawing"), DRAWINGS)
def test_a_way_is_gone_as_it_is_drawn(tmp_path, name, drawing):
    drawn = modules_of(drawing)
    finished, calls = returns_of(command_of(name, tmp_path), {module: DOES[name][module] for module in drawn})
    assert finished == drawn
    assert {module: count for module, count in calls.items() if DOES[name][module] in ONCE and count != 1} == {}


# Of modules that CONTRIBUTING names beside them.
ALSO = {
    "generate": {},
    "convert": {"conversion/opening": "open_source", "conversion/sinks": "write_model"},
    "tune": {"tuning/rows": "read_row", "tuning/examples": "encode_record", "tuning/folder": "_write"},
}


@pytest.mark.parametrize(("name", "what"), [("generate", "prompt"), ("tune", "example"), ("convert", "tensor")])
def test_the_same_way_is_told_in_contributing_stage_by_stage(tmp_path, name, what):
    """What an arrow leads to returns later than what is before it."""
    way = re.split(rf"- \*\*An? {what}\.\*\*", CONTRIBUTING)[1].split("- **")[0]
    does = {**DOES[name], **ALSO[name]}
    stages = [[module for module in re.findall(r"`(\w+/\w+)`", stage) if module in does] for stage in way.split("→")]
    told = [module for stage in stages for module in stage]
    assert {*ALSO[name]} <= {*told}
    assert len(told) == len({*told}) >= {"generate": 8, "tune": 9, "convert": 6}[name]
    finished, _ = returns_of(command_of(name, tmp_path), {module: does[module] for module in told})
    assert finished == [module for stage in stages for module in sorted(stage, key=finished.index)]


def test_ways_name_modules_that_there_are():
    ways = CONTRIBUTING.split("Three things pass through the house")[1].split("| where is |")[0]
    names = re.findall(r"`(\w+/\w+)`", ways)
    assert len(names) > 20
    assert [name for name in names if not (PACKAGE / f"{name}.py").is_file()] == []
