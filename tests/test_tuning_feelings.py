"""A real result: the bundled 4-bit model learns a task that it cannot do, and still can once the adapter is fused."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.tuning import tune

pytest.importorskip("bench.feelings", reason="bench/ lies beside the package in a checkout")
from bench import preferences
from bench.feelings import accuracy, write

TINY = str(ROOT / "weights" / "tiny")


@pytest.mark.long
def test_held_out_accuracy_before_after_and_fused(tmp_path: Path):
    """One of five words, said alone; no story of the test was in the training data."""
    task = tmp_path / "task"
    write(task, {"train": 400, "valid": 16, "test": 40})
    assert accuracy(task, TINY) <= 0.4
    result = tune(TINY, task, tmp_path / "adapter", batch_size=16, learning_rate=2e-3, epochs=2)
    assert result.finished
    learnt = accuracy(task, TINY, str(tmp_path / "adapter"))
    assert learnt >= 0.9
    fused = fuse(tmp_path / "adapter", tmp_path / "fused", dequantize=True, dtype="bfloat16")
    assert abs(accuracy(task, str(fused.path)) - learnt) <= 0.02


def test_a_folder_without_the_task_says_how_to_make_it(tmp_path):
    with pytest.raises(click.ClickException, match=r"has no test\.jsonl; write it with python -m bench\.feelings"):
        accuracy(tmp_path, "tiny")


@pytest.mark.long
def test_preferring_short_true_answers_to_long_wrong_ones_makes_more_answers_right():
    options = "--small --layers 2 --length 32 --steps 1 --questions 60 --train 30"
    done = CliRunner().invoke(preferences.main, options.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    before, after = map(float, re.findall(r"(\d+\.\d)% of 60", done.output))
    assert before < 25 < 35 < after, done.output
    assert re.search(r"^phi3-mlx +peak \d\.\d+ GB, 0\.\d+ of the weights", done.output, re.MULTILINE), done.output
