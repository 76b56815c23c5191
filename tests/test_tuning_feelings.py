"""A real result: the bundled 4-bit model learns a task that it cannot do, and still can once the adapter is fused."""

from pathlib import Path

import click
import pytest
from conftest import ROOT

from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.tuning import tune

pytest.importorskip("bench.feelings", reason="bench/ lies beside the package in a checkout")
from bench.feelings import accuracy, write

TINY = str(ROOT / "weights" / "tiny")


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
