"""A run's folder: begun, killed, locked, moved, resumed; signals; losses that are not finite; a full disk."""

import contextlib
import errno
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx.adapters.folder import read_adapter
from phi3_mlx.cli import main
from phi3_mlx.errors import OptionError, TrainingError
from phi3_mlx.store import atomic
from phi3_mlx.tuning import Settings, tune
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.checkpoints import newest_checkpoint
from phi3_mlx.tuning.log import StepLines, plot_losses, read_lines, read_metrics
from phi3_mlx.tuning.trainer import Trainer

SMALL = {"rank": 1, "batch_size": 2, "learning_rate": 1e-3, "holdout": 0.1, "targets": ("o_proj",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "facts.jsonl", facts(20))


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)


def strict(path: Path) -> list:
    """The JSON of a file, one value or one a line, as a reader takes it that keeps to JSON."""

    def refuse(constant):
        raise AssertionError(f"{path} has {constant}")

    text = path.read_text(encoding="utf-8")
    texts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(one, parse_constant=refuse) for one in texts]


def call(capsys, *words):
    """(exit code, stderr)"""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code, capsys.readouterr().err


def weights(folder):
    return {name: np.array(array) for name, array in read_adapter(folder)[0].items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@contextlib.contextmanager
def losses_of_validation(*losses):
    coming = iter(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_validation", lambda trainer: (next(coming), {}))
        yield


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_validation_without_a_number_is_never_the_best(base, data, tmp_path, bad):
    """Neither the first nor a later one; patience counts it. All files stay JSON."""
    seen, notes = [], []
    with losses_of_validation(bad, 2.0, bad, 3.0, bad):
        result = tune(
            str(base),
            data,
            tmp_path / "out",
            **SMALL,
            steps=10,
            validate_every=1,
            patience=3,
            on_validation=lambda step, loss, best: seen.append((step, best)),
            notify=notes.append,
        )
    assert seen == [(1, False), (2, True), (3, False), (4, False), (5, False)]
    assert (result.best_step, result.best_loss, result.step) == (2, 2.0, 5)
    assert sum("is not finite" in note for note in notes) == 3
    assert set(notes) <= set(result.notes)
    assert read_adapter(tmp_path / "out")[1]["phi3_mlx"]["step"] == 2
    valid = [line["loss"] for line in strict(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "valid"]
    assert valid == [None, 2.0, None, 3.0, None]
    state = strict(newest_checkpoint(tmp_path / "out" / "checkpoints") / "state.json")[0]
    assert (state["last_loss"], state["best_loss"], state["worse"]) == (None, 2.0, 3)
    strict(tmp_path / "out" / "run.json")


def test_the_example_whose_loss_is_no_number_is_named(base, data, tmp_path):
    """Without `notify` it is a warning, when all is saved. Without any best one the last adapter is kept."""
    broken = shutil.copytree(base, tmp_path / "broken")
    arrays = mx.load(str(broken / "model.safetensors"))
    arrays["lm_head.weight"] = mx.array(arrays["model.embed_tokens.weight"])
    tokenizer = runs.prepare(Settings(model=str(base), data=str(data), output="x")).tokenizer
    known = {i for fact in facts(20) for text in fact.values() for i in tokenizer.encode(text)}
    unknown = next(i for i in tokenizer.encode("zebra xylophone") if i not in known)
    table = arrays["model.embed_tokens.weight"]
    table[unknown] = float("nan")
    arrays["model.embed_tokens.weight"] = table
    mx.save_safetensors(str(broken / "model.safetensors"), arrays)
    valid = write_jsonl(
        tmp_path / "valid.jsonl", [facts(1)[0], {"prompt": "zebra xylophone?", "completion": "Mia has the ball."}]
    )
    options = {name: value for name, value in SMALL.items() if name != "holdout"}
    said = r"validation loss at step 2 is not finite for .*valid\.jsonl:2; it does not"
    with pytest.warns(UserWarning, match=said) as told:
        result = tune(str(broken), data, tmp_path / "out", valid=valid, **options, steps=2)
    assert [warning.filename for warning in told] == [__file__]
    assert (result.finished, result.best_step, result.best_loss) == (True, None, None)
    assert read_adapter(tmp_path / "out")[1]["phi3_mlx"]["step"] == 2


def test_the_best_is_remembered_by_a_run_that_goes_on(base, data, tmp_path):
    """What is worse than the best of before the stop replaces nothing, and patience goes on counting."""

    def stop(report):
        if report.step == 5:
            raise RuntimeError("the machine goes away")

    options = {**SMALL, "steps": 12, "validate_every": 2, "save_every": 1, "patience": 3}
    with losses_of_validation(1.0, 2.0), pytest.raises(RuntimeError):
        tune(str(base), data, tmp_path / "out", **options, on_step=stop)
    best = weights(tmp_path / "out")
    seen = []
    with losses_of_validation(1.5, 1.7, 0.1):
        result = tune(
            str(base),
            data,
            tmp_path / "out",
            **options,
            resume=True,
            on_validation=lambda step, loss, best: seen.append((step, best)),
        )
    assert seen == [(6, False), (8, False)]
    assert (result.best_step, result.best_loss, result.step) == (2, 1.0, 8)
    assert same(weights(tmp_path / "out"), best)
    assert not same(weights(tmp_path / "out" / "last"), best)


def test_weights_that_an_update_spoiled_replace_nothing_good(base, data, tmp_path, monkeypatch):
    """The loss of the next step says so: the checkpoint before stays, and no adapter of NaN is written."""
    load, made = runs.load_for_training, {}

    def loaded(prepared):
        model, made["adapters"] = load(prepared)
        return model, made["adapters"]

    def spoil(report):
        if report.step == 3:
            for adapter in made["adapters"].values():
                adapter.lora_b = adapter.lora_b * float("nan")

    monkeypatch.setattr(runs, "load_for_training", loaded)
    options, out = {**SMALL, "steps": 9, "save_every": 2}, tmp_path / "out"
    with pytest.raises(TrainingError, match=r"at step 4 are not finite.*the state after step 2 is kept in"):
        tune(str(base), data, out, **options, on_step=spoil)
    assert newest_checkpoint(out / "checkpoints").name == "step-00000002"
    assert not (out / "last").exists()
    assert tune(str(base), data, out, **options, resume=True).finished


def test_a_checkpoint_of_weights_that_are_no_numbers_is_not_written(base, data, tmp_path, monkeypatch):
    """Where the last step before it spoiled them, and no later loss could tell."""
    monkeypatch.setattr(Trainer, "is_finite", lambda trainer: trainer.progress.step < 4)
    with pytest.raises(TrainingError, match=r"not finite after step 4; the state after step 2 is kept in .*out"):
        tune(str(base), data, tmp_path / "out", **SMALL, steps=9, save_every=2)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints").name == "step-00000002"


# ------------------------------------------------------------------------------------- samples


def test_a_sample_that_fails_does_not_end_the_run(base, data, tmp_path, monkeypatch):
    from phi3_mlx.generation import answers

    answer, asked = answers.generate, []

    def sometimes(model, tokenizer, prompt, **options):
        asked.append(prompt)
        if prompt == "bad":
            raise RuntimeError("no memory, say")
        return answer(model, tokenizer, prompt, **options)

    monkeypatch.setattr(answers, "generate", sometimes)
    notes = []
    options = {**SMALL, "steps": 4, "validate_every": 2, "sample_tokens": 2}
    result = tune(str(base), data, tmp_path / "out", **options, samples=("bad", "Hi"), notify=notes.append)
    assert result.finished
    assert asked == ["bad", "Hi"] * 2
    assert [(line["step"], line["prompt"]) for line in strict(tmp_path / "out" / "samples.jsonl")] == [
        (2, "bad"),
        (2, "Hi"),
        (4, "bad"),
        (4, "Hi"),
    ]
    assert "'bad' was not answered at step 2: no memory, say" in notes[-2]
    assert "error" in strict(tmp_path / "out" / "samples.jsonl")[0]
    whole = tune(str(base), data, tmp_path / "plain", **{**SMALL, "steps": 4, "validate_every": 2})
    assert whole.finished
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "out"))  # samples change nothing


def test_a_sample_longer_than_the_context_is_refused_before_the_first_step(base, data, tmp_path):
    with pytest.raises(OptionError, match=r"samples: the prompt has .* tokens and the model's context is 512"):
        tune(str(base), data, tmp_path / "out", **SMALL, steps=1, samples=("ball " * 600,))
    assert not (tmp_path / "out").exists()


def test_lines_of_later_steps_are_forgotten_and_half_ones_too(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1, "a": "x"}\n{"step": 3}\n5\n{"a": 1}\n{"step": "2"}\n\n{"step": 2, "b": 1.5}\n{"ste')
    lines = StepLines(path, 2)
    lines.add({"step": 3, "loss": float("nan"), "half": "\udcfc"})
    lines.close()
    assert strict(path) == [{"step": 1, "a": "x"}, {"step": 2, "b": 1.5}, {"step": 3, "loss": None, "half": "\udcfc"}]
    assert read_lines(path) == strict(path)
    assert read_lines(tmp_path / "none") == []


def test_the_plot_leaves_out_what_is_no_number(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "valid", "step": 1, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_losses(tmp_path)
    assert (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize(("kept", "said"), [(2, "validation, best 3 at step 2"), (None, "validation")])
def test_the_plot_marks_what_was_kept_whatever_has_the_least_loss(tmp_path, kept, said, monkeypatch):
    """As with best_by="accuracy"."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *given, **more: (figures.append(self), save(self, *given, **more))
    )
    lines = [{"kind": kind, "step": n, "loss": n + 1.0} for n in (1, 2, 3) for kind in ("train", "valid")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_losses(tmp_path, kept)
    drawn = figures[0].axes[0].lines
    assert drawn[1].get_label() == said
    assert [(*line.get_xdata(), *line.get_ydata()) for line in drawn[2:]] == ([] if kept is None else [(2, 3)])


@pytest.mark.parametrize("with_reference", [True, False])
def test_what_is_told_of_preferences_is_drawn(tmp_path, with_reference, monkeypatch):
    """Under the losses: rewards, the margin and the pairs that are right; lengths of answers and KL."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    monkeypatch.setattr(figure, "savefig", lambda self, *given, **more: figures.append(self))
    told = {"reward_chosen": 3.0, "reward_rejected": 4.0, "margin": 5.0, "accuracy": 0.5, "tokens_chosen": 6.0}
    told |= {"tokens_rejected": 7.0} | ({"kl": 8.0} if with_reference else {})
    lines = [{"kind": kind, "step": n, "loss": 1.0, **told} for n in (1, 2) for kind in ("train", "valid")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_losses(tmp_path)
    drawn = [
        {line.get_label(): line.get_ydata()[-1] for line in axes.lines if len(line.get_ydata())}
        for axes in figures[0].axes
    ]
    named = [{label: y for label, y in of.items() if not label.startswith("_")} for of in drawn]
    assert named[1:] == [
        {"chosen": 3.0, "rejected": 4.0, "margin": 5.0},
        {"chosen": 6.0, "rejected": 7.0},
        {"pairs right": 0.5},
        *([{"KL": 8.0}] if with_reference else []),
    ]


def test_the_plot_gets_the_step_whose_weights_are_kept(base, data, tmp_path, monkeypatch):
    """Not that of the least loss: here the first is the best, as by another figure."""
    kept = []
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda _, step: kept.append(step) or True)
    monkeypatch.setattr(Trainer, "_is_better", lambda self, *_: self.progress.best_step is None)
    tune(str(base), data, tmp_path / "out", **SMALL, steps=3, validate_every=1)
    assert kept == [1]


def test_samples_and_metrics_have_every_step_once_after_a_kill(base, data, tmp_path):
    def stop(report):
        if report.step == 7:
            raise RuntimeError("the machine goes away")

    options = {**SMALL, "steps": 8, "validate_every": 2, "save_every": 5, "samples": ("Hi",), "sample_tokens": 1}
    with pytest.raises(RuntimeError):
        tune(str(base), data, tmp_path / "out", **options, on_step=stop)
    assert [line["step"] for line in read_lines(tmp_path / "out" / "samples.jsonl")] == [2, 4, 6]
    tune(str(base), data, tmp_path / "out", **options, resume=True)
    assert [line["step"] for line in read_lines(tmp_path / "out" / "samples.jsonl")] == [2, 4, 6, 8]
    assert [line["step"] for line in read_metrics(tmp_path / "out") if line["kind"] == "train"] == list(range(1, 9))


# ------------------------------------------------------------------------------------- beginnings

# A run that is killed when it has asked the file system for this many changes in its folder.
KILLED = """
import os, signal, sys
count, limit, watched = 0, int(sys.argv[1]), sys.argv[2]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

def hook(event, arguments):
    global count
    wrote = event == "open" and isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+")
    if event in CHANGES or wrote:
        if any(watched in os.fsdecode(one) for one in arguments if isinstance(one, (str, bytes))):
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)

import phi3_mlx.tuning.folder
from phi3_mlx.cli import main
phi3_mlx.tuning.folder.plot_losses = lambda *_: True
sys.addaudithook(hook)
try:
    main(sys.argv[3:])
finally:
    print(count)
"""


def killed_at(limit, out, *words):
    command = [sys.executable, "-c", KILLED, str(limit), str(out), "tune", *map(str, words)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_a_run_killed_at_any_moment_can_begin_or_go_on(base, data, tmp_path, capsys):
    """It is never stuck, and ends as one that was never killed. Nothing hidden is left."""
    words = ["-m", base, "-d", data, "--steps", "1", "--rank", "1", "--batch-size", "2", "--target", "o_proj"]
    whole = tmp_path / "whole"
    done = killed_at(0, whole, *words, "-o", whole)
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    begun = {}
    for moment in (1, 5, 9, last // 2):  # most before the first checkpoint
        out = tmp_path / str(moment)
        died = killed_at(moment, out, *words, "-o", out)
        assert died.returncode == -signal.SIGKILL, died.stderr
        begun[moment] = newest_checkpoint(out / "checkpoints") is not None
        fresh = tmp_path / f"{moment} fresh"
        if out.exists():
            shutil.copytree(out, fresh)
        code, err = call(capsys, "tune", *words, "-o", fresh)
        assert code == begun[moment], err
        ended = [] if begun[moment] else [fresh]
        if (out / "run.json").is_file():
            code, err = call(capsys, "tune", "--resume", "-o", out)
            assert code == 0, err
            ended.append(out)
        for folder in ended:
            assert same(weights(folder), weights(whole))
            assert same(weights(folder / "last"), weights(whole / "last"))
            assert not list(folder.rglob(".*"))
    assert set(begun.values()) == {False, True}


def test_a_start_that_fails_leaves_no_folder_that_is_in_the_way(base, data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = {**SMALL, "steps": 1}
    out = tmp_path / "out"
    for patched, name in ((mx, "save_safetensors"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, full)
            with pytest.raises(TrainingError, match=r"out.* cannot be written: No space left on device"):
                tune(str(base), data, out, **options)
        assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
        with pytest.raises(OptionError, match="TensorBoard is not installed"):
            tune(str(base), data, out, **options, tensorboard=True)
    with monkeypatch.context() as patch:
        patch.setattr("phi3_mlx.store.checkpoint.read_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(str(base), data, out, **options)
    assert not out.exists()
    (out / "checkpoints").mkdir(parents=True)  # a folder of the user's stays, though the Finder has been there
    for looked_at in (out, out / "checkpoints"):
        (looked_at / ".DS_Store").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError):
            tune(str(base), data, out, **options)
    assert [path.name for path in out.iterdir()] == [".DS_Store"]
    assert tune(str(base), data, out, **options).finished


def test_a_folder_of_something_else_is_let_be(base, data, tmp_path):
    for name, folder in (
        ("letter.txt", False),
        ("checkpoints/epoch-3", True),
        ("metrics.jsonl", False),
        ("run.json", False),
    ):
        out = tmp_path / name.replace("/", " ")
        (out / name).parent.mkdir(parents=True)
        (out / name).mkdir() if folder else (out / name).write_text("mine\n")
        with pytest.raises(TrainingError, match="exists already; it holds no run to go on with"):
            tune(str(base), data, out, **SMALL, steps=1)
        with pytest.raises(TrainingError, match="no checkpoint to go on from"):
            tune(str(base), data, out, **SMALL, steps=1, resume=True)
        assert [str(path.relative_to(out)) for path in out.rglob("*") if path.name != "checkpoints"] == [name]
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="exists already"):
        tune(str(base), data, tmp_path / "file", **SMALL, steps=1)
    with pytest.raises(TrainingError, match=r"new cannot be written: Not a directory; name another"):
        tune(str(base), data, tmp_path / "file" / "new", **SMALL, steps=1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TrainingError, match="exists already"):
        tune(str(base), data, tmp_path / "pipe", **SMALL, steps=1)
    (tmp_path / "link").symlink_to("disk/run")
    assert tune(str(base), data, tmp_path / "link", **SMALL, steps=1).finished
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "run" / "adapters.safetensors").is_file()


def test_two_runs_in_one_folder_are_one_too_many(base, data, tmp_path):
    """Beginning or going on, in this process or another; the first one is not disturbed."""
    options, said = {**SMALL, "steps": 4}, []

    def second(report):
        for resume in (True, False):
            with pytest.raises(TrainingError) as told:
                tune(str(base), data, tmp_path / "out", **options, resume=resume)
            said.append(str(told.value))

    assert tune(str(base), data, tmp_path / "out", **options, on_step=second).finished
    assert said[0] == (
        f"another run is writing into {tmp_path / 'out'}; wait for its end, or name another folder with output=DIR"
    )
    assert "exists already; resume=True goes on" in said[1]
    assert tune(str(base), data, tmp_path / "one", **options).finished
    assert same(weights(tmp_path / "one" / "last"), weights(tmp_path / "out" / "last"))
    with atomic.hold(tmp_path / "new"), pytest.raises(TrainingError, match="another run is writing into"):
        tune(str(base), data, tmp_path / "new", **options)
    assert (tmp_path / "new").is_dir()  # it is the other's
    assert tune(str(base), data, tmp_path / "new", **options).finished


# ------------------------------------------------------------------------------------- going on elsewhere


def test_a_run_that_was_moved_goes_on_where_its_parts_are_now(base, data, tmp_path, capsys):
    """Model, data and validation data are compared by content; run.json and the adapter name the new places."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copytree(base, old / "model")
    shutil.copy(data, old / "data.jsonl")
    write_jsonl(old / "valid.jsonl", facts(3, seed=5))
    parts = ("-m", "model"), ("-d", "data.jsonl"), ("--valid", "valid.jsonl")
    words = ["tune", *(word for option, name in parts for word in (option, old / name)), "--rank", "1", "--steps", "3"]
    words += ["--batch-size", "2"]
    assert call(capsys, *words, "-o", tmp_path / "whole")[0] == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", lambda trainer: False)
        assert call(capsys, *words, "-o", old / "run")[0] == 0
    old.rename(new)
    moved = [(option, new / name) for option, name in parts]
    for use in (("fuse", "--adapter"), ("adapter", "export")):
        code, err = call(capsys, *use, new / "run", "-o", tmp_path / "other")
        assert code == 1
        assert f"was trained on {old / 'model'}, which is not there; say where it is now with --model DIR" in err
    for n, name in enumerate(("model", "data", "valid")):
        given = [word for pair in moved[:n] for word in pair]
        code, err = call(capsys, "tune", "--resume", "-o", new / "run", *given)
        assert code == 1
        assert f"the {name} of this run, is not there; say where it is now with --{name} PATH" in err
    other = write_jsonl(tmp_path / "other.jsonl", facts(20, seed=9))
    code, err = call(capsys, "tune", "--resume", "-o", new / "run", *sum(moved, ()), "-d", other)
    assert (code, "another set of training data" in err) == (1, True)
    code, err = call(capsys, "tune", "--resume", "-o", new / "run", *sum(moved, ()))
    assert code == 0, err
    assert same(weights(new / "run" / "last"), weights(tmp_path / "whole" / "last"))
    stored = json.loads((new / "run" / "run.json").read_text())
    assert stored["settings"]["data"] == str(new / "data.jsonl")
    assert read_adapter(new / "run")[1]["base_model"]["name"] == str(new / "model") == stored["base_model"]["name"]
    assert call(capsys, "tune", "--resume", "-o", new / "run")[0] == 0  # the new places are known now


# ------------------------------------------------------------------------------------- signals


def start(program, *words, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


COMMAND = "from phi3_mlx.cli import main; main()"
SCRIPT = """
import sys, phi3_mlx
model, data, output = sys.argv[1:]
result = phi3_mlx.tune(model, data, output, steps=5000, rank=1, batch_size=2, save_every=5000, validate_every=5000)
print("went on", result.interrupted, result.step, file=sys.stderr)
"""
LONG = "--rank 1 --batch-size 2 --steps 5000 --save-every 5000 --validate-every 5000".split()


def wait_for_step(folder, step, process):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(line["step"] >= step for line in read_metrics(folder)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the run did not get there")


def saved_step(out):
    return int(newest_checkpoint(out / "checkpoints").name.removeprefix("step-"))


@pytest.mark.parametrize(
    ("program", "number"),
    [
        ("command", signal.SIGTERM),
        ("command", signal.SIGHUP),
        ("script", signal.SIGTERM),
        ("script", signal.SIGINT),
    ],
)
def test_a_signal_saves_first_and_then_does_what_it_does(base, data, tmp_path, number, program):
    """kill, a closed terminal, Ctrl-C: for a script the last is no end."""
    out = tmp_path / "my run"
    if program == "command":
        process = start(COMMAND, "tune", "-m", base, "-d", data, "-o", out, *LONG)
    else:
        process = start(SCRIPT, base, data, out)
    wait_for_step(out, 3, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    steps = [line["step"] for line in read_metrics(out)]
    assert saved_step(out) == steps[-1] >= 3
    assert read_adapter(out / "last")[1]["phi3_mlx"]["step"] == steps[-1]
    if number == signal.SIGINT:
        assert process.returncode == (130 if program == "command" else 0), said
        assert program == "command" or f"went on True {steps[-1]}" in said
    else:
        assert process.returncode == -number, said
        assert "went on" not in said
    assert program == "script" or f"continue with: phi3-mlx tune --resume -o {shlex.quote(str(out))}\n" in said
    assert "Traceback" not in said


def test_a_second_ctrl_c_ends_at_once(base, data, tmp_path):
    """Also one that comes while the first is saving. What is on the disk can be gone on from."""
    out = tmp_path / "out"
    process = start(COMMAND, "tune", "-m", base, "-d", data, "-o", out, *LONG)
    wait_for_step(out, 2, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert newest_checkpoint(out / "checkpoints") is not None


def test_a_program_that_handles_signals_itself_is_asked_when_all_is_saved(base, data, tmp_path):
    """Also of one that comes while the end is written."""
    heard = []

    def hear(*_):
        with atomic.hold(tmp_path / "out") as free:
            heard.append((free, (tmp_path / "out" / "last").is_dir()))

    def send(*_):
        signal.raise_signal(signal.SIGTERM)
        return True

    before = signal.signal(signal.SIGTERM, hear)
    try:
        result = tune(str(base), data, tmp_path / "out", **SMALL, steps=3, on_step=send)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("phi3_mlx.tuning.folder.plot_losses", send)
            ended = tune(str(base), data, tmp_path / "out", **SMALL, steps=3, resume=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [(True, True)] * 2
    assert (result.interrupted, result.finished, result.step) == (True, False, 1)
    assert (ended.interrupted, ended.finished, ended.step, saved_step(tmp_path / "out")) == (False, True, 3, 3)


def test_what_is_ignored_stays_ignored(base, data, tmp_path):
    """`nohup phi3-mlx tune`, and a script's `phi3-mlx tune &`, which Ctrl-C is not meant for."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}

    def send(report):
        for number in before:
            signal.raise_signal(number)

    try:
        result = tune(str(base), data, tmp_path / "out", **SMALL, steps=3, on_step=send)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (result.finished, result.interrupted) == (True, False)


def test_a_terminal_that_is_closed_does_not_take_the_run_along(base, data, tmp_path):
    """It sends SIGHUP, and nothing can be printed on it any more."""
    out = tmp_path / "out"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND, "tune", "-m", base, "-d", data, "-o", out, *LONG]
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        end = time.monotonic() + 120
        while not any(line["step"] >= 3 for line in read_metrics(out)):
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 10_000)
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.close(ours)
    process.send_signal(signal.SIGHUP)  # as the system does where the terminal is the process's own
    assert process.wait(timeout=60) == -signal.SIGHUP
    assert saved_step(out) == read_metrics(out)[-1]["step"]
    assert read_adapter(out / "last")[1]["phi3_mlx"]["step"] == saved_step(out)


# ------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize(("validate_every", "file"), [(3, "adapters.safetensors"), (6, "checkpoints/step-00000004")])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_says_how_to_go_on(
    base, data, tmp_path, monkeypatch, validate_every, file
):
    """The file is named; when there is room again, the run goes on to the weights of one that always had it."""
    options, out = {**SMALL, "steps": 6, "save_every": 2, "validate_every": validate_every}, tmp_path / "out"
    tune(str(base), data, tmp_path / "whole", **options)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        fill = lambda report: report.step == 3 and patch.setattr(mx, "save_safetensors", full)  # noqa: E731
        with pytest.raises(TrainingError) as told:
            tune(str(base), data, out, **options, on_step=fill)
    assert str(told.value).startswith(f"{out / file} cannot be written: No space left on device")
    assert str(told.value).endswith("; fix that and continue with resume=True")
    assert newest_checkpoint(out / "checkpoints").name == "step-00000002"
    assert not list(out.rglob(".*"))
    assert tune(str(base), data, out, **options, resume=True).finished
    assert same(weights(out / "last"), weights(tmp_path / "whole" / "last"))


def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(base, data, tmp_path):
    """A process that may write no file longer than a few kilobytes stands in for a full disk."""
    program = (
        "import resource, sys; from phi3_mlx.cli import main\n"
        "import phi3_mlx.tuning.execution as run; start = run.RunFolder.step\n"
        "def step(folder, report):\n"
        "    if report.step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "    start(folder, report)\n"
        "run.RunFolder.step = step\n"
        "main()"
    )
    out = tmp_path / "out"
    process = start(program, "tune", "-m", base, "-d", data, "-o", out, *LONG)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert (
        f"phi3-mlx: {out / 'metrics.jsonl'} cannot be written: File too large; fix that and continue with --resume"
        in said
    )
    assert saved_step(out) == 0
