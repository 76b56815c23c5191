"""What a trace takes is planned: kept values, and what is computed to change some; against what MLX then takes."""

import gc
import math
from dataclasses import replace

import mlx.core as mx
import pytest
from oracle import ids_of
from peaks import fair_peak
from test_plan import random_model

from phi3_mlx import Keep, change, generate, inspect, load, memory_limit, patch, steer, trace
from phi3_mlx.engine import machine, scheduler
from phi3_mlx.engine.plan import CHUNKS, Workload
from phi3_mlx.errors import MemoryLimitError

LENGTH = 320
IDS = ids_of(LENGTH)[0].tolist()
FEW = {"keep": "final_in"}
CASES = {
    "a pattern": {**FEW, "edits": change("pattern", lambda x: x + 0)},
    "a head's pattern": {**FEW, "edits": patch("pattern", 0.0, layers=1, heads=1, positions=-1)},
    "heads' outputs": {**FEW, "edits": change("head_out", lambda x: x + 0)},
    "neurons": {**FEW, "edits": change("act", lambda x: x + 0)},
    "kept patterns": {"keep": "pattern"},
    "kept heads' outputs": {"keep": "head_out"},
    "kept logits": {"keep": "logits"},
}


@pytest.fixture(scope="module")
def model():
    model = random_model(256, 704, 2, 8, 8)
    mx.eval(model.parameters())
    return model


def planned(model, *, rows=1, chunk=None, **options) -> int:
    """Bytes beside the weights."""
    with trace(model, **options):
        plan = replace(Workload.of_model(model, LENGTH, rows), chunk=chunk).plan(math.inf)
    return plan.total - plan.weights


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_and_changed_is_planned(case, model):
    expected = planned(model, **CASES[case])
    fits = lambda taken: taken / 1.05 < expected < 2.2 * taken  # noqa: E731
    taken = fair_peak(lambda: inspect(model, IDS, **CASES[case]), fits)
    assert fits(taken), (taken, expected)


def test_the_plan_grows_with_what_is_changed_and_rows(model):
    plain, one = planned(model, **FEW), planned(model, **CASES["a pattern"])
    scores = 8 * LENGTH * LENGTH * 4
    assert one - plain == 5 * scores
    assert planned(model, rows=3, **CASES["a pattern"]) - planned(model, rows=3, **FEW) == 3 * 5 * scores
    assert planned(model, **CASES["heads' outputs"]) - plain == 3 * 8 * LENGTH * 256 * 4
    assert planned(model, keep="final_in", edits=steer(mx.ones(256))) - plain == LENGTH * 256 * 4
    half = [Keep("pattern", layers=0, heads=[1, 5], positions=range(10))]
    assert planned(model, keep=half) - planned(model, keep=()) == 2 * (2 * 10 * LENGTH * 4)
    assert planned(model, keep=Keep("z", positions=range(2 * LENGTH))) == planned(model, keep="z")


def test_a_change_that_does_not_fit_is_refused_and_a_smaller_one_is_not(model, monkeypatch):
    monkeypatch.setattr(machine, "_of_machine", lambda: 1 << 40)
    gc.collect()
    mx.clear_cache()
    smallest = CHUNKS[-1]
    room = sum(planned(model, chunk=smallest, **CASES[case]) for case in ("neurons", "a pattern")) // 2
    with memory_limit(mx.get_active_memory() + room):
        with pytest.raises(MemoryLimitError, match="without what the trace keeps and changes it needs"):
            inspect(model, IDS, **CASES["a pattern"])
        inspect(model, IDS, **CASES["neurons"])
        with (
            trace(model, **CASES["a pattern"]),
            pytest.raises(MemoryLimitError, match="keeps and changes in this pass"),
        ):
            model(mx.array([IDS]))
        with trace(model, force=True, **CASES["a pattern"]):
            model(mx.array([IDS]))


def test_kept_logits_are_those_of_the_answer(monkeypatch):
    model, tokenizer = load("tiny")
    row, seen = model.config.vocab_size * model.dtype.size, []
    with trace(model, keep="logits"):
        workload = replace(Workload.of_model(model, 500), prompt=491)
    plain = replace(workload, watchers=())
    assert workload.row_bytes() - plain.row_bytes() == 10 * row
    assert replace(workload, scores=True).row_bytes() - plain.row_bytes() == 500 * row
    assert replace(workload, prompt=0).row_bytes() - plain.row_bytes() == 500 * row
    assert replace(workload, length=400).row_bytes() - replace(plain, length=400).row_bytes() == row
    with trace(model, keep=Keep("logits", positions=[-1])):
        one = replace(Workload.of_model(model, 500), prompt=491)
    assert one.row_bytes() - plain.row_bytes() == row

    check = scheduler.check_fits
    monkeypatch.setattr(
        scheduler, "check_fits", lambda work, *more, **named: seen.append(work) or check(work, *more, **named)
    )
    with trace(model, keep="logits") as inside:
        generate(model, tokenizer, "Tell me a story about a duck." * 20, max_tokens=4)
    assert seen[0].row_bytes() - replace(seen[0], watchers=()).row_bytes() == (4 + 1) * row
    assert inside["logits"].nbytes == 4 * row
