"""The memory plan of a run against what the run takes: measured peaks of many shapes and settings."""

import dataclasses
import gc

import mlx.core as mx
import numpy as np
import pytest
from conftest import long_after
from peaks import peak_of
from tuning_models import examples, make_directory, write_jsonl

from phi3_mlx.store.checkpoint import model_size
from phi3_mlx.tuning import Settings
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.batches import Schedule
from phi3_mlx.tuning.plan import plan_memory, training_dtype
from phi3_mlx.tuning.trainer import Trainer

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 1024,
}
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDER = {**WIDE, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}  # matrices of many slices
CHECKPOINTED = {"gradient_checkpointing": True}
# (what differs in the model, lengths, share of the tokens trained, settings)
GRID = {
    "plain": ({}, [120] * 6, 0.05, {}),
    "all tokens trained": ({}, [120] * 6, 1.0, {}),
    "checkpointed": ({}, [120] * 6, 0.05, CHECKPOINTED),
    "accumulated": ({}, [120] * 6, 1.0, {"accumulate": 3}),
    "checkpointed and accumulated": ({}, [120] * 6, 1.0, {"accumulate": 3, **CHECKPOINTED}),
    "long": ({}, [700], 0.05, {}),
    "long, checkpointed": ({}, [700], 0.05, CHECKPOINTED),
    "lengths differ": ({}, [30, 200, 60, 90, 400, 20], 0.3, {}),
    "deep, checkpointed": ({"num_hidden_layers": 8}, [120] * 6, 0.05, CHECKPOINTED),
    "4 bits": ({"bits": 4}, [120] * 6, 0.05, {}),
    "wide, 4 bits, checkpointed": ({"bits": 4, **WIDE}, [60] * 4, 0.1, CHECKPOINTED),
    "wider, 4 bits": ({"bits": 4, **WIDER}, [60] * 2, 0.1, {}),
    "wider, 4 bits, checkpointed": ({"bits": 4, **WIDER}, [60] * 2, 0.1, CHECKPOINTED),
    "wide, full": (WIDE, [60] * 2, 0.1, {"method": "full"}),
    "dora": ({}, [120] * 6, 0.05, {"method": "dora"}),
    "dropout": ({}, [120] * 6, 0.05, {"dropout": 0.1}),
    "large vocabulary": ({"vocab_size": 32064}, [60] * 4, 1.0, {}),
    "large vocabulary, checkpointed": ({"vocab_size": 32064}, [120] * 4, 0.3, CHECKPOINTED),
}


def ratio(folder, changes, lengths, trained, options) -> float:
    """The planned over the measured peak of two steps."""
    directory = make_directory(folder / "model", **{**SHAPE, **changes})
    settings = Settings(data="-", output="-", batch_size=len(lengths), steps=2, **options)
    size, data = model_size(directory, training_dtype(settings)), examples(lengths, trained=trained)
    counts = [int(example.trained.sum()) for example in data]
    planned = plan_memory(size, settings, [len(example) - 1 for example in data], counts).total
    gc.collect()  # what earlier tests have left
    mx.clear_cache()
    before = mx.get_active_memory()
    prepared = type("Prepared", (), {"settings": settings, "checkpoint": directory})
    model, _ = runs.load_for_training(prepared)
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    Trainer(model, data, [], settings, folder / "checkpoints", {}).run()
    return planned / (mx.get_peak_memory() - before)


def test_plans_are_what_runs_take(tmp_path_factory):
    ratios = {name: ratio(tmp_path_factory.mktemp("plan"), *case) for name, case in GRID.items()}
    assert all(0.85 < value < 1.2 for value in ratios.values()), ratios
    assert np.mean(np.abs(np.log(list(ratios.values())))) < 0.08, ratios


def test_dropout_is_planned_without_its_inputs_a_second_time(tmp_path):
    """What is dropped takes the place of what it is dropped from, and the choice is a byte."""
    assert 0.9 < ratio(tmp_path, *GRID["dropout"]) < 1.1


@pytest.mark.parametrize("optimizer", long_after(1, ["adafactor", "muon"]))
def test_a_plan_counts_what_an_optimizer_keeps(optimizer, tmp_path):
    """A row and a column of each matrix, or its momentum; what it computes on the way comes beside them."""
    changes, lengths, trained, options = GRID["wide, full"]
    assert 0.92 < ratio(tmp_path, changes, lengths, trained, {**options, "optimizer": optimizer}) < 1.2


ATTENTION = {"num_attention_heads": 16, "head_dim": 64, "num_key_value_heads": 2, "intermediate_size": 256}
ODD = {  # proportions that no released model has, and 16 bits
    "wide attention": (ATTENTION, [120] * 4, 0.1, {}),
    "wide attention, checkpointed": (ATTENTION, [120] * 4, 0.1, CHECKPOINTED),
    "wide attention, lengths differ": (ATTENTION, [30, 200, 60, 90, 300, 20], 0.3, {}),
    "wide attention, 16 bits": (ATTENTION, [60] * 2, 0.1, {"dtype": "bfloat16"}),
    "wide inside": ({"intermediate_size": 1536}, [120] * 4, 0.1, {}),
    "wide inside, checkpointed": ({"intermediate_size": 1536}, [120] * 4, 0.1, CHECKPOINTED),
    "16 bits, checkpointed": ({}, [100] * 3, 0.1, {"dtype": "bfloat16", **CHECKPOINTED}),
    "a window, lengths differ": ({"sliding_window": 50}, [30, 200, 60, 90, 300, 20], 0.3, {}),
}


@pytest.mark.parametrize("name", ODD)
def test_no_plan_is_short_where_one_part_is_much_wider_than_others(name, tmp_path):
    changes, *case = ODD[name]
    planned = ratio(tmp_path, {"num_hidden_layers": 2, **changes}, *case)
    assert 0.95 < planned < 2


def test_the_suggested_flags_do_fit(tmp_path):
    """And take less memory than the run that was refused: measured."""
    base = make_directory(tmp_path / "base")
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a hat and a ball " * 30}] * 8)
    peaks, plans = [], []
    for n, more in enumerate(({}, {"gradient_checkpointing": True, "accumulate": 8})):
        settings = Settings(
            model=str(base), data=str(path), output=str(tmp_path / str(n)), batch_size=8, steps=1, holdout=0.0
        )
        prepared = runs.prepare(dataclasses.replace(settings, **more))
        plans.append(prepared.plan.total)
        peaks.append(peak_of(lambda settings=prepared.settings: runs.start(settings)))
    assert peaks[1] < 0.2 * peaks[0]
    assert plans == pytest.approx(peaks, rel=0.2)


def test_shorter_examples_are_planned_as_they_would_be_cut(tmp_path):
    """What a refusal proposes with --max-length is the plan of a run with it."""
    base = make_directory(tmp_path / "base")
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a hat and a ball " * 30}] * 4)
    settings = Settings(model=str(base), data=str(path), output=str(tmp_path / "out"), steps=1, holdout=0.0)
    whole = runs.prepare(settings)
    short = dataclasses.replace(whole.settings, max_length=40, overflow="truncate")
    planned = plan_memory(model_size(base), short, *runs.sizes(whole.train, short))
    assert planned == runs.prepare(short).plan
    assert planned.total < 0.5 * whole.plan.total


def test_the_largest_part_is_found_over_whole_epochs():
    """Not guessed from a mean."""
    data = examples([10] * 30 + [400])
    lengths, trained = [len(example) - 1 for example in data], [int(example.trained.sum()) for example in data]
    schedule = Schedule(lengths, 4, steps=None, epochs=2, order="shuffle", seed=0)
    assert schedule.largest_part(1, [0] * 30 + [200]) == (399 + 3 * 9, 399**2 + 3 * 9**2, 200)
    assert schedule.largest_part(4, trained)[:2] == (399, 399**2)


def test_weights_are_trained_in_float32_when_all_of_them_are():
    one = Settings(data="-", output="-")
    for settings, dtype in (
        (one, None),
        (dataclasses.replace(one, method="full"), "float32"),
        (dataclasses.replace(one, method="full", dtype="bfloat16"), "bfloat16"),
    ):
        assert training_dtype(settings) == dtype


def test_the_largest_part_is_one_that_the_run_reads(monkeypatch):
    lengths = [10] * 8 + [100]
    short = next(seed for seed in range(20) if 8 not in schedule_of(lengths, steps=2, seed=seed).batch(0))
    assert schedule_of(lengths, steps=1, seed=short).largest_part(1, lengths).tokens == 20
    assert schedule_of(lengths, steps=5, seed=short).largest_part(1, lengths).tokens == 110
    seen = []
    batch = Schedule.batch
    monkeypatch.setattr(Schedule, "batch", lambda self, step: seen.append(step) or batch(self, step))
    schedule_of(lengths, steps=1000).largest_part(1, lengths)
    assert seen == list(range(15))  # three epochs: a long run is not gone through


def schedule_of(lengths, *, steps, seed=0):
    return Schedule(lengths, 2, steps=steps, epochs=1, order="shuffle", seed=seed)
