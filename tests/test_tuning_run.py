"""Runs from data to adapter: what they leave, what stops them, and that an interrupted one ends as any other."""

import dataclasses
import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx import load
from phi3_mlx.cli import main
from phi3_mlx.errors import DataError, MemoryLimitError, OptionError, TrainingError
from phi3_mlx.store import atomic
from phi3_mlx.tuning import Settings, tune
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.batches import within
from phi3_mlx.tuning.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint
from phi3_mlx.tuning.events import Listener
from phi3_mlx.tuning.log import read_metrics
from phi3_mlx.tuning.trainer import Trainer

SMALL = {"rank": 2, "batch_size": 4, "learning_rate": 1e-2, "holdout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "packed", bits=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "facts.jsonl", facts(40))


@pytest.fixture(autouse=True)
def no_plot(request, monkeypatch):
    """Drawing takes as long as a small run: only the test that looks for the plot has it drawn."""
    if request.function is not test_a_run_learns_and_leaves_its_files:
        monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)


def weights(folder):
    return {name: np.array(array) for name, array in mx.load(str(folder / "adapters.safetensors")).items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_buffers_are_bounded_while_a_run_lasts(base, data, tmp_path):
    limits = []

    def limit(*_):
        limits.append(mx.set_cache_limit(0))
        mx.set_cache_limit(limits[-1])

    before = mx.set_cache_limit(1 << 40)
    try:
        tune(str(base), data, tmp_path / "out", **SMALL, steps=1, on_step=limit)
        limit()
    finally:
        mx.set_cache_limit(before)
    assert limits == [1 << 30, 1 << 40]


def test_a_run_learns_and_leaves_its_files(packed, data, tmp_path):
    reports, validations, notes = [], [], []
    result = tune(
        str(packed),
        data,
        tmp_path / "out",
        **SMALL,
        epochs=4,
        validate_every=9,
        samples=("Mia has a ball. Who has it?",),
        sample_tokens=4,
        tensorboard=True,
        on_step=reports.append,
        on_validation=lambda *v: validations.append(v),
        notify=notes.append,
    )
    assert result.finished
    assert not result.interrupted
    assert result.step == 36 == len(reports)
    assert reports[-1].loss < reports[0].loss - 1
    assert [step for step, _, _ in validations] == [9, 18, 27, 36]
    assert result.best_loss == min(loss for _, loss, _ in validations)
    assert "4 of 40 examples were held out" in notes[0]
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {"adapters.safetensors", "adapter_config.json", "last", "checkpoints", "metrics.jsonl", "run.json"}
    assert names >= {"samples.jsonl", "tensorboard"}
    assert len(json.loads((out / "samples.jsonl").read_text().splitlines()[-1])["answer"]) > 0
    lines = read_metrics(out)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 37))
    assert sum(line["tokens"] for line in lines if line["kind"] == "train") == result.tokens
    pytest.importorskip("matplotlib")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "checkpoints").iterdir())) == 1
    # The adapter in use gives the validation loss that was reported.
    model, _ = load(str(packed), adapter=out)
    prepared = runs.prepare(Settings(model=str(packed), data=str(data), output=str(out), **SMALL))
    trainer = Trainer(model, prepared.train.examples, prepared.valid.examples, prepared.settings, tmp_path, {})
    assert trainer.validation_loss() == pytest.approx(result.best_loss, abs=1e-5)


def test_the_best_and_the_last_are_kept(base, data, tmp_path, monkeypatch, capsys):
    """With losses that fall and rise the last is not the best; patience ends the run, for good."""
    losses = [3.0, 2.0, 2.5, 1.0, 1.7, 1.5, 0.5]
    coming = iter(losses)
    monkeypatch.setattr(Trainer, "_validation", lambda trainer: (next(coming), {}))
    seen, kept = [], {}

    def validated(step, loss, best):
        seen.append((step, loss, best))
        kept[step] = weights(tmp_path / "out")

    result = tune(
        str(base), data, tmp_path / "out", **SMALL, steps=40, validate_every=2, patience=2, on_validation=validated
    )
    assert not result.finished
    assert not result.interrupted
    assert seen == [(2 * n, loss, loss in (3.0, 2.0, 1.0)) for n, loss in enumerate(losses[:6], 1)]
    assert (result.step, result.best_step, result.best_loss) == (12, 8, 1.0)
    assert same(weights(tmp_path / "out"), kept[8])
    assert not same(kept[4], kept[8])
    last = weights(tmp_path / "out" / "last")
    assert not same(weights(tmp_path / "out"), last)
    with pytest.raises(SystemExit, match="0"):
        main(["tune", "--resume", "-o", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "12 steps, best validation loss 1.0000 at step 8" in err
    assert "because validation no longer improved (--patience)" in err
    assert same(weights(tmp_path / "out" / "last"), last)


def test_the_same_seed_gives_the_same_bits(base, data, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        tune(str(base), data, tmp_path / name, **SMALL, steps=5, dropout=0.1, seed=seed)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "three"))


@pytest.mark.parametrize(
    "options", [{}, {"method": "dora", "optimizer": "adafactor", "order": "bucket"}, {"method": "full"}]
)
def test_a_stopped_run_goes_on_to_the_same_weights(base, data, tmp_path, options, monkeypatch):
    """Optimizer, schedule, dropout and place in the data, in the middle of an epoch; metrics are not doubled."""
    options = {**SMALL, "steps": 14, "accumulate": 2, "save_every": 5, "validate_every": 6, **options}
    if options.get("method") != "full":
        options["dropout"] = 0.1
    else:
        options["learning_rate"] = 1e-3
        del options["rank"]
    tune(str(base), data, tmp_path / "whole", **options)

    def stop(report):
        if report.step == 8:
            raise RuntimeError("the machine goes away, between two checkpoints")

    with pytest.raises(RuntimeError):
        tune(str(base), data, tmp_path / "parts", **options, on_step=stop)
    assert newest_checkpoint(tmp_path / "parts" / "checkpoints").name == "step-00000005"
    result = tune(str(base), data, tmp_path / "parts", **options, resume=True)
    assert result.finished
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert same(weights(tmp_path / "parts" / "last"), weights(tmp_path / "whole" / "last"))
    losses = [[(m["kind"], m["step"], m["loss"]) for m in read_metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1]


def command(*words):
    return [sys.executable, "-c", "from phi3_mlx.cli import main; main()", "tune", *map(str, words)]


def start(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command(*words), env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder, step, process):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(line["step"] >= step for line in read_metrics(folder)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the run did not get there")


def test_kill_and_ctrl_c_lose_nothing(base, data, tmp_path):
    """kill -9 at any moment, then Ctrl-C, then to the end: the weights are those of one run. At the terminal."""
    words = ["-m", base, "-d", data, "--rank", "2", "--batch-size", "4", "--learning-rate", "1e-2", "--dropout", "0.1"]
    words += ["--steps", "60", "--save-every", "7", "--validate-every", "20"]
    whole = start(*words, "-o", tmp_path / "whole")
    out = tmp_path / "out"
    process = start(*words, "-o", out)
    wait_for_step(out, 10, process)
    process.kill()
    process.communicate()
    assert newest_checkpoint(out / "checkpoints") is not None
    process = start("--resume", "-o", out)
    wait_for_step(out, max(line["step"] for line in read_metrics(out)) + 6, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert f"phi3-mlx tune --resume -o {out}" in said
    process = start("--resume", "-o", out)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert whole.wait(timeout=120) == 0, whole.stderr.read()
    process.communicate(), whole.communicate()
    assert same(weights(out), weights(tmp_path / "whole"))
    assert same(weights(out / "last"), weights(tmp_path / "whole" / "last"))


def test_resume_refuses_another_run(base, packed, data, tmp_path):
    options = {**SMALL, "steps": 3}
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match="no checkpoint"):
        tune(str(base), data, out, **options, resume=True)
    tune(str(base), data, out, **options)
    with pytest.raises(TrainingError, match=r"exists already; resume=True"):
        tune(str(base), data, out, **options)
    with pytest.raises(TrainingError, match=r"another setting \(learning_rate was 0\.01\)"):
        tune(str(base), data, out, **{**options, "learning_rate": 0.5}, resume=True)
    with pytest.raises(TrainingError, match="another base model"):
        tune(str(packed), data, out, **options, resume=True)
    other = write_jsonl(tmp_path / "other.jsonl", facts(40, seed=9))
    with pytest.raises(TrainingError, match="another set of training data"):
        tune(str(base), other, out, **options, resume=True)
    damaged = newest_checkpoint(out / "checkpoints") / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(TrainingError, match="damaged"):
        tune(str(base), data, out, **options, resume=True)


# Saves the checkpoint of step 10, and is killed while it writes.
KILLED_SAVING = """
import os, signal, sys
from pathlib import Path
import mlx.core as mx
from phi3_mlx.tuning import checkpoints

os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save_checkpoint(Path(sys.argv[1]), 10, {"a": mx.ones(3)}, {"a": mx.ones(3)}, {})
"""


def test_checkpoints_are_whole_or_not_there(tmp_path):
    """What a run killed while writing leaves is no checkpoint, and goes away with the next."""
    array = {"a": mx.ones(3)}
    save_checkpoint(tmp_path, 5, array, array, {})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED_SAVING, tmp_path], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert newest_checkpoint(tmp_path).name == "step-00000005"
    (tmp_path / "mine").mkdir()
    save_checkpoint(tmp_path, 10, array, array, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step-00000010"]


@pytest.mark.parametrize("step", [5, 10])
def test_older_checkpoints_are_kept_until_the_new_one_is_there(tmp_path, monkeypatch, step):
    """Also one of the same step, which a run leaves that was resumed from before it."""
    array = {"a": mx.ones(3)}
    save_checkpoint(tmp_path, 5, array, array, {})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_put", full)
        with pytest.raises(TrainingError) as told:
            save_checkpoint(tmp_path, step, {"a": mx.zeros(3)}, array, {})
    assert str(told.value) == (
        f"{tmp_path}/step-{step:08d} cannot be written: No space left on device; fix that and continue with resume=True"
    )
    kept, _, state = read_checkpoint(newest_checkpoint(tmp_path))
    assert (state.whole("step"), kept["a"].tolist()) == (5, [1, 1, 1])
    assert os.listdir(tmp_path) == ["step-00000005"]
    save_checkpoint(tmp_path, step, {"a": mx.zeros(3)}, array, {})
    assert read_checkpoint(newest_checkpoint(tmp_path))[0]["a"].tolist() == [0, 0, 0]
    assert len(os.listdir(tmp_path)) == 1


def test_no_number_stops_at_the_last_good_state(base, data, tmp_path):
    """The batch is named, the state before it is kept, and going on from there is possible."""
    prepared = runs.prepare(Settings(model=str(base), data=str(data), output=str(tmp_path / "out"), **SMALL, steps=20))
    model, _ = runs.load_for_training(prepared)
    good = {}

    def poison(report):
        if report.step == 4:
            good.update({name: np.array(array) for name, array in trainer.weights().items()})
            model.model.norm.weight = model.model.norm.weight * float("nan")

    trainer = Trainer(
        model, prepared.train.examples, [], prepared.settings, tmp_path / "checkpoints", {}, Listener(poison)
    )
    batch = [prepared.train.examples[i].source for i in trainer.schedule.batch(4)]
    with pytest.raises(TrainingError, match="at step 5 are not finite") as caught:
        trainer.run()
    assert all(source in str(caught.value) for source in batch)
    kept = mx.load(str(newest_checkpoint(tmp_path / "checkpoints") / "weights.safetensors"))
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000004"
    assert all(np.array_equal(np.array(kept[name]), array) for name, array in good.items())


def test_an_example_that_fills_the_window_is_no_nan(base, tmp_path):
    """A prompt as long as max_length, its answer cut away: nothing to learn, so it is left out and said."""
    lines = [{"prompt": "ball " * 60, "completion": "Yes."}, *facts(12)]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    notes = []
    settings = Settings(
        model=str(base), data=str(path), output=str(tmp_path / "out"), max_length=40, overflow="truncate"
    )
    prepared = runs.prepare(dataclasses.replace(settings, holdout=0.0), notes.append)
    assert len(prepared.train.examples) == 12
    assert any("left out" in note and "data.jsonl:1" in note for note in notes)


def test_accumulated_run_equals_the_large_batch(base, data, tmp_path):
    for name, parts in (("one", 1), ("three", 3)):
        tune(str(base), data, tmp_path / name, **SMALL, steps=4, accumulate=parts, optimizer="sgd")
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert max(np.abs(one[name] - three[name]).max() for name in one) < 1e-5
    assert max(np.abs(array).max() for name, array in one.items() if name.endswith("lora_b")) > 1e-3


def test_padding_and_text_outside_answers_never_count(base, tmp_path):
    """Two runs whose prompts' last tokens differ in what is not learnt: the loss names the answers' tokens alone."""
    path = write_jsonl(tmp_path / "data.jsonl", facts(12))
    prepared = runs.prepare(Settings(model=str(base), data=str(path), output=str(tmp_path / "out"), holdout=0.0))
    tokenizer = prepared.tokenizer
    for example, line in zip(prepared.train.examples, facts(12), strict=True):
        learnt = tokenizer.decode(example.ids[example.trained].tolist(), skip_special=False)
        assert learnt.strip() == line["completion"] + "<|end|>"
        assert example.trained[-1]


def test_too_large_a_run_is_refused_before_loading(base, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a hat and a ball " * 30}] * 64)
    monkeypatch.setattr("phi3_mlx.store.checkpoint.read_model", lambda *a, **k: pytest.fail("was loaded"))
    options = {"batch_size": 64, "steps": 1}
    with pytest.raises(
        MemoryLimitError, match=r"needs about .* MB .*weights.*it would fit with gradient_checkpointing=True"
    ):
        tune(str(base), path, tmp_path / "out", **options, memory="150MB")
    with pytest.raises(MemoryLimitError, match=r"accumulate=(32|64)"):
        tune(str(base), path, tmp_path / "out", **options, memory="60MB")
    with pytest.raises(MemoryLimitError, match="even with"):
        tune(str(base), path, tmp_path / "out", **options, memory="1MB")
    monkeypatch.setattr(runs, "room", lambda: 1_000_000)
    with pytest.raises(MemoryLimitError, match=r"and 1\.0 MB may be used"):  # no setting makes the machine larger
        tune(str(base), path, tmp_path / "out", **options, memory="64GB")
    assert not (tmp_path / "out").exists()


def test_faults_are_found_before_the_first_step(base, packed, data, tmp_path):
    out = tmp_path / "out"
    for options, match in (
        ({"targets": ("w_pack",)}, "matches no layer"),
        ({"layers": "0-9"}, "outside this model"),
        ({"max_length": 4096}, "more than the model's context, 512 tokens"),
        ({"max_length": 5}, "no example .* is left.*max_length="),
        ({"batch_size": 0}, "batch_size 0"),
        ({"optimizer": "adm"}, "optimizer 'adm' is unknown"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"accumulate": 9}, "more than batch_size"),
    ):
        with pytest.raises(OptionError, match=match):
            tune(str(base), data, out, **options)
    with pytest.raises(OptionError, match="packed weights cannot be trained"):
        tune(str(packed), data, out, method="full")
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        tune(str(base), write_jsonl(tmp_path / "bad.jsonl", [facts(1)[0], {"prompt": "x"}]), out)
    assert not out.exists()


def test_the_function_has_the_settings_of_the_command():
    """Same names, same defaults (None: the usual value), in the same order."""
    given = inspect.signature(tune).parameters
    for field in dataclasses.fields(Settings):
        assert field.name in given
        if given[field.name].default not in (None, inspect.Parameter.empty):
            assert given[field.name].default == field.default, field.name
    assert set(given) - {f.name for f in dataclasses.fields(Settings)} == {
        "resume",
        "force",
        "notify",
        "on_step",
        "on_validation",
        "measure",
    }


def test_the_usual_values_that_the_docstring_names_are_the_defaults():
    usual = Settings(data="d", output="o")
    said = " ".join(tune.__doc__.split())
    for words in (
        f'method "{usual.method}" with rank {usual.rank}, alpha {usual.alpha:g} and no dropout on all layers',
        f"{usual.epochs:g} epochs, weight decay {usual.weight_decay}, {usual.holdout:.0%}".replace(
            "%", " % of the examples"
        ),
        f"samples of {usual.sample_tokens} tokens",
    ):
        assert words in said
    assert (usual.dropout, usual.targets, usual.layers, usual.rslora) == (0, (), None, False)


def test_gradient_checkpointing_and_every_optimizer_run(base, data, tmp_path):
    for optimizer in ("adamw", "adam", "sgd", "lion", "adafactor", "muon"):
        options = {**SMALL, "learning_rate": 1e-3, "steps": 2, "gradient_checkpointing": True, "optimizer": optimizer}
        result = tune(str(base), data, tmp_path / optimizer, **options, schedule="linear")
        assert result.finished
        changed = weights(tmp_path / optimizer)
        assert any(array.any() for name, array in changed.items() if name.endswith("lora_b")), optimizer


def test_examples_without_gradients_are_read_in_groups_that_fit():
    assert within(range(5), dict(enumerate([4, 5, 2, 30, 9])), 10) == [[0, 1], [2], [3], [4]]


def test_a_steps_seconds_are_those_it_took(base, data, tmp_path):
    reports, begun = [], time.perf_counter()
    result = tune(str(base), data, tmp_path / "out", **SMALL, on_step=reports.append)
    assert 0 < sum(report.seconds for report in reports) < time.perf_counter() - begun
    assert 0 < result.seconds < time.perf_counter() - begun
