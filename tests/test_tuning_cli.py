"""`phi3-mlx tune`, `fuse` and `adapter` at the command line; run.yaml; two processes under mlx.launch."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, long_after
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx.cli import main
from phi3_mlx.cli.progress import Pulse
from phi3_mlx.cli.training import summarize
from phi3_mlx.display import duration_text
from phi3_mlx.errors import OptionError
from phi3_mlx.tuning import dryrun
from phi3_mlx.tuning.batches import Schedule, tokens_read
from phi3_mlx.tuning.dryrun import describe_run
from phi3_mlx.tuning.examples import Example
from phi3_mlx.tuning.execution import Result
from phi3_mlx.tuning.log import read_metrics
from phi3_mlx.tuning.pairs import Labelled, PreferencePair
from phi3_mlx.tuning.run import prepare
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.settings_file import read_settings


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "packed", bits=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "facts.jsonl", facts(40))


def call(capsys, *words):
    """(exit code, stdout, stderr)"""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_a_whole_walk(packed, data, tmp_path, capsys):
    """Tune, use, export, import, fuse, use."""
    adapter = tmp_path / "adapter"
    code, out, err = call(
        capsys,
        *f"tune -m {packed} -d {data} -o {adapter} --rank 2 --steps 4 --target q_proj --target down_proj".split(),
    )
    assert (code, out) == (0, ""), err
    assert "4 steps, best validation loss" in err
    assert f"the adapter is in {adapter}" in err
    ask = ["generate", "-m", packed, "-p", "Hi", "--max-tokens", "3"]
    assert call(capsys, *ask, "--adapter", adapter)[0] == 0
    assert call(capsys, *ask, "--adapter", f"{adapter}=0.5")[0] == 0
    code, _, err = call(capsys, *ask[:2], "tiny", *ask[3:], "--adapter", adapter)
    assert code == 1
    assert err.startswith(f"phi3-mlx: {adapter} was trained on {packed}")
    code, _, err = call(capsys, "adapter", "export", adapter, "-o", tmp_path / "peft")
    assert code == 0, err
    code, _, err = call(capsys, "adapter", "import", tmp_path / "peft", "-m", packed, "-o", tmp_path / "again")
    assert code == 0, err
    code, _, err = call(capsys, "fuse", "--adapter", tmp_path / "again", "-o", tmp_path / "fused")
    assert code == 0, err
    assert "survived quantization" in err
    assert "--dequantize" in err  # four steps are a small change
    assert call(capsys, *ask[:2], tmp_path / "fused", *ask[3:])[0] == 0


def test_resume_takes_the_settings_of_the_run(packed, data, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert call(capsys, "tune", "-m", packed, "-d", data, "-o", out, "--steps", 2, "--rank", 2)[0] == 0
    code, _, err = call(capsys, "tune", "--resume", "-o", out)
    assert code == 0, err  # there is nothing left to do
    assert "tok/s" not in err
    code, _, err = call(capsys, "tune", "--resume", "-o", out, "--rank", 4)
    assert code == 2
    assert "rank was 2" in err
    assert call(capsys, "tune", "--resume", "-o", out, "--rank", 2)[0] == 0
    code, _, err = call(capsys, "tune", "-m", packed, "-d", data, "-o", out)
    assert code == 1
    assert "exists already; --resume goes on with it" in err
    code, _, err = call(capsys, "tune", "--resume", "-o", tmp_path / "none")
    assert code == 1
    assert "none holds no run to go on with; begin one without --resume" in err
    code, _, err = call(capsys, "tune", "-m", packed, "-d", data, "-o", packed)
    assert code == 1
    assert "holds no run to go on with, so name another folder with --output DIR" in err


def test_dry_run_shows_what_would_be_done(packed, tmp_path, capsys):
    lines = [*facts(20), {"prompt": "ball " * 80, "completion": "Yes."}]
    path = write_jsonl(tmp_path / "my.jsonl", lines)
    code, out, err = call(capsys, "tune", "-m", packed, "-d", path, "--dry-run", "--max-length", 60, "--holdout", 0)
    assert (code, err) == (0, "")
    for part in (
        "21 training examples",
        "tokens an epoch",
        "65-128",
        "1 is longer than 60",
        "my.jsonl:21",
        "were left out",
    ):
        assert part in out, part
    assert out.count("Example ") == 3
    first = lines[0]
    assert f"<|assistant|>⟦ {first['completion']}<|end|>⟧" in out.replace(
        "⟦" + first["completion"], "⟦ " + first["completion"]
    )
    assert "fits in" in out
    assert "of training" in out
    assert "tok/s" in out
    assert [p.name for p in tmp_path.iterdir()] == ["my.jsonl"]
    code, out, _ = call(capsys, "tune", "-m", packed, "-d", path, "--dry-run", "--memory", "100kB")
    assert code == 0
    assert "does NOT fit in 100 kB; even with --gradient-checkpointing" in out  # what the run itself would say
    assert "Time" not in out  # for which it would have been loaded


@pytest.mark.parametrize("steps", [2, 6, 8], ids=["part of an epoch", "two epochs", "two and a part"])
def test_a_dry_runs_time_is_that_of_all_it_reads(packed, tmp_path, monkeypatch, steps):
    path = write_jsonl(tmp_path / "my.jsonl", [{"prompt": "ball " * n, "completion": "No."} for n in range(2, 16)])
    settings = Settings.of({"model": str(packed), "data": str(path), "output": "o", "holdout": 0.0, "batch_size": 5})
    prepared = prepare(dataclasses.replace(settings, steps=steps))
    monkeypatch.setattr(dryrun, "load_for_training", lambda prepared: (None, None))
    monkeypatch.setattr(dryrun, "time_line", lambda *given: f"{given[-1]} tokens")
    lengths = [*map(tokens_read, prepared.train.examples)]
    schedule = Schedule.of(lengths, prepared.settings)
    read = sum(lengths[i] for step in range(steps) for i in schedule.batch(step))
    shown = describe_run(prepared)
    assert shown.splitlines()[-1] == f"{read} tokens"
    learnt = sum(int(example.trained.sum()) for example in prepared.train.examples)
    assert f"{sum(lengths):,} tokens an epoch, {learnt:,} of them learnt" in shown
    assert 0 < learnt < sum(lengths)
    assert f"; {steps} steps, 3 an epoch" in shown
    does_not_fit = dataclasses.replace(prepared, way_out="take a smaller one")
    assert "Memory" in describe_run(does_not_fit).splitlines()[-2]
    assert describe_run(does_not_fit, force=True).splitlines()[-1] == f"{read} tokens"
    assert describe_run(prepared, measure=False).splitlines()[-1].strip().startswith("fits in")


def test_a_batch_of_middle_size_is_timed_once_it_was_read(monkeypatch):
    clock, read = iter([0.0, 90.0, 92.0]), []  # the first time is slow
    monkeypatch.setattr(dryrun, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(dryrun, "Gradients", lambda *_, **__: SimpleNamespace(of=lambda part: (None, {}, None)))
    lengths = np.array([10, 400, 30, 20, 60])
    batches = SimpleNamespace(steps=9, steps_per_epoch=5, batch=lambda step: [step])
    course = SimpleNamespace(
        batches=batches,
        objective=SimpleNamespace(part=lambda chosen, *_: read.append(chosen)),
        optimizer=SimpleNamespace(init=lambda _: None, update=lambda *_: None, state={}),
    )
    model = SimpleNamespace(train=lambda: None, trainable_parameters=dict)
    settings = SimpleNamespace(accumulate=1, gradient_checkpointing=False)
    assert dryrun.time_line(model, course, settings, "abcde", lengths, 1800.0) == (
        f"Time      about {duration_text(120)} of training; 15 tok/s in one batch"
    )
    assert read == [["c"], ["c"]]


@pytest.mark.parametrize(("color", "begin", "end"), [(False, "⟦", "⟧"), (True, "\033[1;32m", "\033[0m")])
def test_a_dry_run_marks_what_is_learnt_and_counts_what_it_does_not_show(color, begin, end):
    decoder = SimpleNamespace(decode=lambda ids, skip_special: f"{ids[0]}-{ids[-1]}")

    def shown(length):
        return dryrun._rendered(Example(np.arange(length), np.arange(length) >= 5, "a:1"), decoder, color)

    assert shown(130) == f"0-4{begin}5-119{end} … 10 more tokens"
    assert shown(120) == f"0-4{begin}5-119{end}"


def test_a_dry_runs_lengths_have_a_bar_each():
    lengths = [3] * 100 + [9]
    assert dryrun._bars(lengths, 9) == [
        f"          3-4              100  {'#' * 30}",
        "          5-8                0  ",
        "          9-16               1  #",
    ]
    assert dryrun._bars(lengths, 8)[3:] == ["          1 is longer than 8"]
    assert dryrun._bars(lengths, 2)[3:] == ["          101 are longer than 2"]


@pytest.mark.parametrize("desirable", [True, False])
def test_a_dry_run_names_the_label_of_an_answer(desirable):
    answer = Example(np.arange(3), np.ones(3, bool), "a:1")
    assert dryrun._names(Labelled(answer, desirable, answer)) == ("desirable" if desirable else "undesirable",)
    assert dryrun._names(PreferencePair(answer, answer, 1)) == ("chosen", "rejected")
    assert dryrun._names(answer) == ("",)


def test_a_log_says_how_far_a_long_run_is(packed, data, tmp_path, capsys, monkeypatch):
    options = ["tune", "-m", packed, "-d", data, "--steps", 2, "--rank", 1]
    _, _, err = call(capsys, *options, "-o", tmp_path / "short")
    assert "validation loss" in err
    assert "step 1/2" not in err
    monkeypatch.setattr(Pulse, "SECONDS", 0.0)
    _, out, err = call(capsys, *options, "-o", tmp_path / "long")
    assert out == ""
    assert "step 1/2" in err
    assert "left" in err
    assert "\r" not in err


def test_settings_file(packed, data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {packed}\ndata: {data}\nlearning_rate: 1e-3\ntargets: [o_proj]\nsteps: 3\nlayers: 1\n")
    read = read_settings(file)
    assert (read["learning_rate"], read["targets"], read["steps"], read["layers"]) == (1e-3, ("o_proj",), 3, "1")
    assert call(capsys, "tune", "-c", file, "-o", tmp_path / "out", "--steps", 1)[0] == 0
    stored = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (stored["steps"], stored["learning_rate"], stored["targets"]) == (1, 1e-3, ["o_proj"])
    for text, match in (
        ("lerning_rate: 1", r"unknown setting 'lerning_rate'; did you mean learning_rate\?"),
        ("zzz: 1", "unknown setting 'zzz'; known are model"),
        ("rank: many", "rank is 'many'; expected a whole number"),
        ("rank: 1.5", "expected a whole number"),
        ("rslora: 1", "expected true or false"),
        ("targets: 3", "expected a list of texts"),
        ("learning_rate: fast", "expected a number"),
        ("- a", "holds no settings"),
        ("a: [", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(OptionError, match=match) as caught:
            read_settings(file)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


def test_the_speed_in_a_summary_is_that_of_this_command_and_not_of_the_steps_before_it_was_resumed(tmp_path, capsys):
    result = Result(tmp_path, True, False, 100, None, None, tokens=10**6, seconds=2.0)
    summarize(result, 500, "tune")
    assert capsys.readouterr().err == f"100 steps, 250 tok/s; the adapter is in {tmp_path}\n"
    summarize(dataclasses.replace(result, step=1), 0, "tune")
    assert capsys.readouterr().err == f"1 step; the adapter is in {tmp_path}\n"


def test_usage_faults_are_one_line(packed, data, tmp_path, capsys):
    for words in (
        ["tune"],
        ["tune", "-d", data],
        ["tune", "--resume"],
        ["tune", "-d", data, "-o", "x", "--rank", "many"],
        ["tune", "-d", data, "-o", "x", "--target", "w_pack"],
        ["tune", "-d", data, "-o", "x", "--no-such"],
        ["fuse"],
        ["adapter", "import", "x"],
    ):
        code, out, err = call(capsys, *words)
        assert (code, out) == (2, ""), words
        assert err.startswith("phi3-mlx: ")
        assert err.count("\n") == 1
    code, _, err = call(capsys, "tune", "-d", tmp_path / "none.jsonl", "-o", tmp_path / "x")
    assert code == 1
    assert "none.jsonl cannot be read" in err


def test_watchdog_is_relaxed_before_mlx_starts():
    """On macOS, unless the user has set it; nowhere else."""
    script = (
        "import os, sys; sys.platform = {platform!r}\n"
        "from phi3_mlx.cli.training import relax_watchdog\n"
        "from phi3_mlx.cli.tune import tune\n"
        "assert 'mlx' not in sys.modules and 'mlx.core' not in sys.modules\n"
        "print(relax_watchdog(), os.environ.get('AGX_RELAX_CDM_CTXSTORE_TIMEOUT'))"
    )
    environment = {key: v for key, v in os.environ.items() if not key.startswith("AGX_")} | {"PYTHONPATH": str(ROOT)}
    for platform, more, expected in (
        ("darwin", {}, "True 1"),
        ("linux", {}, "False None"),
        ("darwin", {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "0"}, "False 0"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script.format(platform=platform)],
            env={**environment, **more},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == expected, done.stderr


def rows_for(objective):
    """Facts as the objective takes them."""
    if objective == "sft":
        return facts(40)
    lines = [(fact["prompt"], fact["completion"], "Nobody has it, I think.") for fact in facts(40)]
    if objective == "dpo":
        return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in lines]
    return [
        {"prompt": prompt, "completion": bad if n % 3 == 0 else good, "label": n % 3 != 0}
        for n, (prompt, good, bad) in enumerate(lines)
    ]


@pytest.mark.parametrize("objective", long_after(1, ["dpo", "sft", "kto"]))
def test_two_processes_give_the_losses_of_one(packed, tmp_path, objective):
    """`mlx.launch -n 2`, ring backend: the same global batches; rank 0 alone writes and prints."""
    launch = shutil.which("mlx.launch", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if launch is None or not mx.distributed.is_available():
        pytest.skip("MLX's launcher is not here")
    program = tmp_path / "phi3.py"
    program.write_text("from phi3_mlx.cli import main\nmain()\n")
    data = write_jsonl(tmp_path / "data.jsonl", rows_for(objective))
    words = f"tune -m {packed} -d {data} --rank 2 --steps 5 --batch-size 5 --learning-rate 1e-2 --validate-every 2"
    words = [*words.split(), "--objective", objective]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    one = [sys.executable, str(program), *words, "-o", str(tmp_path / "one")]
    assert subprocess.run(one, env=environment, capture_output=True).returncode == 0
    two = [launch, "-n", "2", "--python", sys.executable, "--backend", "ring", str(program)]
    two += [*words, "-o", str(tmp_path / "two")]
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("the adapter is in") == 1
    alone, together = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [(line["kind"], line["step"]) for line in alone] == [(line["kind"], line["step"]) for line in together]
    # Not how many pairs are right: at the first step, where the model is its reference, rounding says that.
    told = {"sft": (), "dpo": ("margin", "kl"), "kto": ("reward_chosen", "reward_rejected", "kl")}
    for figure in ("loss", *told[objective]):
        values = [[line[figure] for line in lines if figure in line] for lines in (alone, together)]
        assert np.allclose(*values, atol=1e-4 if figure == "loss" else 1e-3), figure
        assert len(values[0]) > 5, figure
    weights = [mx.load(str(tmp_path / name / "last" / "adapters.safetensors")) for name in ("one", "two")]
    assert all(mx.allclose(weights[0][name], weights[1][name], atol=2e-3) for name in weights[0])
