"""One door for the settings of a run: Python, the command line, YAML and a run's own file give the same settings."""

import dataclasses
import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx.cli import main
from phi3_mlx.errors import MemoryLimitError, OptionError, TrainingError
from phi3_mlx.tuning import Settings, tune
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.checkpoints import newest_checkpoint
from phi3_mlx.tuning.settings import from_stored
from phi3_mlx.tuning.settings_file import read_settings

SMALL = {"batch_size": 4, "steps": 1, "rank": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "facts.jsonl", facts(20))


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)


def call(capsys, *words):
    """(exit code, stderr)"""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code, capsys.readouterr().err


def test_values_become_plain_ones_of_their_fields_types(tmp_path):
    settings = Settings.of(
        {
            "model": tmp_path,
            "data": tmp_path / "a.jsonl",
            "output": tmp_path / "out",
            "rank": np.int64(4),
            "alpha": np.float32(16),
            "rslora": np.True_,
            "layers": 3,
            "targets": "q_proj",
            "samples": (one for one in ("Hello", "Bye")),
            "memory": 8_000_000_000,
            "epochs": None,
            "seed": 2**32 - 1,
        }
    )
    assert settings.targets == ("q_proj",)
    assert settings.samples == ("Hello", "Bye")
    assert (settings.rank, settings.alpha, settings.rslora, settings.layers) == (4, 16.0, True, "3")
    assert (settings.memory, settings.epochs) == (8_000_000_000, 3.0)
    stored = json.loads(json.dumps(settings.as_dict()))
    assert from_stored(stored, "run.json") == settings
    for name, value in stored.items():
        assert type(value) in (str, int, float, bool, list, type(None)), name


def test_what_is_not_given_has_its_usual_value():
    settings = Settings.of({"model": "tiny", "data": "a", "output": "b", "rank": None, "sample_tokens": None})
    usual = {"method": "lora", "rank": 8, "alpha": 16.0, "rslora": False, "dropout": 0.0, "targets": (), "layers": None}
    usual |= {"epochs": 3.0, "steps": None, "weight_decay": 0.01, "holdout": 0.05, "samples": (), "sample_tokens": 64}
    usual |= {"learning_rate": 2e-4, "batch_size": 8, "clip": 1.0, "seed": 0, "from_adapter": None}
    assert {name: getattr(settings, name) for name in usual} == usual


WRONG = [
    ("rank", True),
    ("rank", 4.0),
    ("rank", "4"),
    ("rank", np.array([4, 4])),
    ("rank", 0),
    ("rank", -1),
    ("rank", 10**400),
    ("batch_size", 2**31),
    ("warmup", -1),
    ("clip", float("-inf")),
    ("max_length", 10**30),
    ("epochs", 10**400),
    ("alpha", "16"),
    ("alpha", float("nan")),
    ("alpha", 1e39),  # infinite in float32
    ("rslora", 1),
    ("rslora", "True"),
    ("dropout", 1),
    ("dropout", Fraction(1, 2)),
    ("epochs", "3"),
    ("epochs", True),
    ("seed", 2**32),
    ("seed", -1),
    ("seed", 0.5),
    ("layers", range(2, 4)),
    ("layers", [2, 3]),
    ("targets", 3),
    ("targets", {"q_proj": 1}),
    ("samples", ["Hello", 3]),
    ("samples", ["Hello", " "]),
    ("samples", ["half a character \ud800"]),
    ("memory", True),
    ("memory", "12"),
    ("memory", 16),
    ("memory", float("inf")),
    ("method", "qlora"),
    ("method", 3),
    ("optimizer", np.float32),
    ("dtype", np.float16),
    ("data", [{"text": "a"}]),
    ("data", (one for one in [{"text": "a"}])),
    ("data", None),
    ("data", "a\0b"),
    ("output", None),
    ("output", 3),
    ("model", None),
    ("model", ("a model", "a tokenizer")),
    ("model", ""),
    ("revision", 3),
    ("valid", [{"text": "a"}]),
    ("valid", ""),
    ("revision", ""),
    ("layers", ""),
    ("from_adapter", ""),
    ("from_adapter", ["a"]),
    ("tensorboard", "no"),
    ("max_length", 1),
    ("resume", "no"),
    ("force", 1),
    ("notify", "print"),
    ("on_step", []),
    ("on_validation", 3),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{n}" for n, (name, _) in enumerate(WRONG)])
def test_python_refuses_wrong_values_before_anything_is_read(tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(runs, "read_data", lambda *_: pytest.fail("was read"))
    arguments = {"model": "tiny", "data": "a.jsonl", "output": tmp_path / "out", name: value}
    with pytest.raises(OptionError) as caught:
        tune(**arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not (tmp_path / "out").exists()


IDLE = [
    ({"method": "full", "rank": 8}, "rank 8 has no effect with method='full'"),
    ({"method": "full", "alpha": 16.0}, "alpha 16.0 has no effect"),
    ({"method": "full", "rslora": True}, "rslora True has no effect"),
    ({"method": "full", "dropout": 0.1}, "dropout 0.1 has no effect"),
    ({"method": "full", "targets": ["qkv_proj"]}, "targets has no effect"),
    ({"method": "full", "layers": "0"}, "layers '0' has no effect"),
    ({"optimizer": "adam", "weight_decay": 0.01}, "weight_decay 0.01 has no effect with optimizer='adam'"),
    ({"optimizer": "adafactor", "weight_decay": 0.1}, "weight_decay 0.1 has no effect"),
    ({"muon_rate": 0.02}, "muon_rate 0.02 has no effect with optimizer='adamw'"),
    ({"optimizer": "muon", "muon_rate": 0.02}, "muon_rate 0.02 has no effect with method='lora'"),
    ({"steps": 5, "epochs": 3.0}, "epochs 3.0 has no effect with steps=5"),
    ({"sample_tokens": 64}, "sample_tokens 64 has no effect without a prompt in samples"),
    ({"valid": "v.jsonl", "holdout": 0.05}, "holdout 0.05 has no effect where valid data are given"),
]


@pytest.mark.parametrize(("options", "said"), IDLE, ids=[said.split()[0] + f"-{n}" for n, (_, said) in enumerate(IDLE)])
def test_settings_that_would_do_nothing_are_refused_everywhere(tmp_path, capsys, options, said):
    """The usual values too, where they are given; in Python, in YAML and on the command line."""
    with pytest.raises(OptionError) as caught:
        tune("tiny", "a.jsonl", tmp_path / "out", **options)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("; leave it out")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"data": "a.jsonl", "output": str(tmp_path / "out"), **options}))
    assert call(capsys, "tune", "-c", file)[0] == 2
    words = []
    for name, value in options.items():
        option = {"targets": "--target"}.get(name, f"--{name.replace('_', '-')}")
        words += [option] if value is True else [option, value[0] if isinstance(value, list) else value]
    code, err = call(capsys, "tune", "-d", "a.jsonl", "-o", tmp_path / "out", *words)
    assert code == 2
    name = said.split()[0]
    assert err.startswith(f"phi3-mlx: --{name.removesuffix('s').replace('_', '-')}")
    assert "='" not in err


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ({"epochs": 3.0}, ["--steps", 2]),
        ({"weight_decay": 0.1}, ["--optimizer", "adam"]),
        ({"rank": 4, "targets": ["o_proj"]}, ["--method", "full"]),
        ({"holdout": 0.2}, ["--valid", "DATA"]),
    ],
)
def test_options_overrule_what_a_file_says_of_other_settings(base, data, tmp_path, capsys, file, options):
    words = ["tune", "-c", tmp_path / "run.yaml", "--dry-run", *(data if word == "DATA" else word for word in options)]
    usual = {"model": str(base), "data": str(data), "max_length": 64}
    (tmp_path / "run.yaml").write_text(json.dumps(usual | file))
    code, err = call(capsys, *words)
    assert code == 0, err
    (tmp_path / "run.yaml").write_text(json.dumps(usual | file | {"steps": 2, "epochs": 1.0}))
    code, err = call(capsys, *words)
    assert (code, "has no effect with --steps 2" in err) == (2, True)  # for want of sense in the file alone


def test_settings_that_say_what_happens_anyway_are_let_be(tmp_path):
    quiet = {"data": "a", "output": "b"}
    Settings.of({**quiet, "method": "full", "rslora": False, "dropout": 0.0, "targets": []})
    Settings.of({**quiet, "optimizer": "adam", "weight_decay": 0.0})
    Settings.of({**quiet, "valid": "v.jsonl", "holdout": 0})


def test_what_is_idle_for_want_of_validation_is_refused(base, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", facts(5))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", facts(12))
    write_jsonl(folder / "valid.jsonl", facts(3))
    for options in ({"patience": 1}, {"samples": "Hello"}):
        with pytest.raises(OptionError, match=r"has no effect without validation.*valid=FILE"):
            tune(base, few, tmp_path / "out", **SMALL, **options)
        with pytest.raises(OptionError, match="has no effect without validation"):
            tune(base, folder / "train.jsonl", tmp_path / "out", **SMALL, **options, holdout=0)
    with pytest.raises(OptionError, match=r"holdout 0\.2 has no effect since .* has valid\.jsonl"):
        tune(base, folder, tmp_path / "out", **SMALL, holdout=0.2)
    assert not (tmp_path / "out").exists()
    assert tune(base, folder, tmp_path / "out", **SMALL, patience=1, samples="Hello", sample_tokens=1).finished
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text())["prompt"] == "Hello"


@pytest.mark.parametrize("flag", ["--gradient-checkpointing", "--rslora", "--tensorboard"])
def test_a_flag_of_the_command_line_is_true_and_the_run_can_be_resumed(base, data, tmp_path, capsys, flag):
    if flag == "--tensorboard":
        pytest.importorskip("tensorboard")
    words = ["tune", "-o", tmp_path / "out"]
    code, err = call(capsys, *words, "-m", base, "-d", data, "--steps", 1, "--rank", 1, flag)
    assert code == 0, err
    stored = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert stored[flag[2:].replace("-", "_")] is True
    assert call(capsys, *words, "--resume")[0] == 0
    assert call(capsys, *words, "--resume", flag)[0] == 0
    other = "--rslora" if flag != "--rslora" else "--gradient-checkpointing"
    code, err = call(capsys, *words, "--resume", other)
    assert code == 2
    assert f"{other[2:].replace('-', '_')} was False" in err


def test_a_run_of_the_first_version_can_be_resumed(base, data, tmp_path, capsys):
    """It wrote flags as texts, did not know some settings, and kept what does nothing."""
    out = tmp_path / "out"
    tune(base, data, out, **SMALL, gradient_checkpointing=True)

    old = {"gradient_checkpointing": "True", "sample_tokens": 64, "epochs": 3.0}
    run = json.loads((out / "run.json").read_text())
    run["settings"] = run["settings"] | old
    (out / "run.json").write_text(json.dumps(run))
    file = newest_checkpoint(out / "checkpoints") / "state.json"
    state = json.loads(file.read_text())
    state["identity"]["setting"] |= old | {"holdout": 0.05}
    file.write_text(json.dumps(state))
    assert call(capsys, "tune", "--resume", "-o", out)[0] == 0
    assert tune(base, data, out, **SMALL, gradient_checkpointing=True, resume=True).finished
    with pytest.raises(TrainingError, match=r"another setting \(gradient_checkpointing was True\)"):
        tune(base, data, out, **SMALL, resume=True)


@pytest.mark.parametrize("idle", [{"patience": 2}, {"samples": ["Hello"]}, {"holdout": 0.2}], ids=str)
def test_a_run_of_the_first_version_that_was_told_what_does_nothing_can_be_resumed(
    base, data, tmp_path, capsys, monkeypatch, idle
):
    """Its settings cannot be left out any more."""
    given = {"data": str(data), "holdout": 0}
    if "holdout" in idle:
        folder = tmp_path / "data"
        folder.mkdir()
        for name in ("train", "valid"):
            write_jsonl(folder / f"{name}.jsonl", facts(4))
        given["data"] = str(folder)
    settings = Settings(model=str(base), output=str(tmp_path / "out"), **SMALL, **given | idle)
    with monkeypatch.context() as first_version:
        prepare = runs.prepare
        first_version.setattr(runs, "prepare", lambda *a, **more: prepare(*a, **more | {"resume": True}))
        assert runs.start(settings, notify=lambda _: None).finished
    code, err = call(capsys, "tune", "--resume", "-o", tmp_path / "out")
    assert code == 0, err
    code, err = call(capsys, "tune", "--resume", "-o", tmp_path / "out", "--dry-run")
    assert code == 0, err


def test_settings_that_did_nothing_do_not_keep_a_run_from_going_on():
    """Before they were refused, they were written down."""
    before = Settings(data="a", output="b", method="full", rank=4, steps=5, epochs=2).as_dict()
    settings = Settings(data="a", output="b", method="full", steps=5)
    now = settings.as_dict()
    assert settings.changed(before, now, "state.json") is None
    assert settings.changed(before, now | {"clip": 2.0}, "state.json") == "setting (clip was 1.0)"


def test_the_setting_that_changed_is_named():
    settings = Settings(data="a", output="b", rank=4)
    before = settings.as_dict()
    assert settings.changed(before, dict(before), "state.json") is None
    assert settings.changed(before, before | {"rank": 8}, "state.json") == "setting (rank was 4)"
    del before["patience"]  # unknown to the version that wrote it
    assert settings.changed(before, before | {"patience": None}, "state.json") is None
    assert settings.changed(before, before | {"patience": 2}, "state.json") == "setting (patience was None)"


def test_yaml_reads_numbers_as_people_write_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nalpha: 1E1\nclip: .5\nweight_decay: 0\nlayers: -8\nseed: 10\ndropout: 1.e-2")
    read = read_settings(file)
    assert (read["learning_rate"], read["alpha"], read["clip"], read["weight_decay"]) == (1e-4, 10.0, 0.5, 0.0)
    assert (read["layers"], read["seed"], read["dropout"]) == ("-8", 10, 0.01)
    for line, match in (
        ('epochs: "3"', "epochs is '3'; expected a number"),
        ("seed: 010", "seed is '010'; expected a whole number"),
        ("seed: 1:30", "seed is '1:30'; expected a whole number"),
        ("seed: 1e3", r"seed is 1000\.0; expected a whole number"),
        ("rank: 4\nrank: 8", "rank is given twice"),
        ("output: 2026-11-29", "output is a date; expected a path"),
        ("data: [a.jsonl]", r"data is a list; expected the path of a \.jsonl file"),
        ("rank: null", "rank is None; expected a whole number"),
        ("[" * 5000, "not valid YAML"),
        ("data: 2024-99-99", "a value is none of the type"),
        ("data: !!bool x", "a value is none of the type"),
        ("data: !!timestamp x", "a value is none of the type"),
        ("rank: !!int ''", "a value is none of the type"),
        ("rank: " + "1" * 5000, "a value is none of the type"),
        ("[1]: 2", "not valid YAML|unknown setting"),
        ("a: &a [*a]", "unknown setting 'a'"),
    ):
        file.write_text(line)
        with pytest.raises(OptionError, match=match) as caught:
            read_settings(file)
        assert "\n" not in str(caught.value)


def test_a_plan_comes_before_loading_and_force_overrides_it(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("phi3_mlx.store.checkpoint.read_model", lambda *a, **k: pytest.fail("was loaded"))
    for memory in (10_000, "10kB"):
        with pytest.raises(MemoryLimitError, match=r"10 kB may be used; even with .*; force=True tries all the same$"):
            tune(base, data, tmp_path / "out", **SMALL, memory=memory)
    words = ["tune", "-m", base, "-d", data, "-o", tmp_path / "out", "--steps", 1, "--memory", "10kB"]
    code, err = call(capsys, *words)
    assert code == 1
    assert "even with --gradient-checkpointing and --accumulate 8 it needs" in err
    assert err.endswith("--force tries all the same\n")
    monkeypatch.undo()
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)
    assert tune(base, data, tmp_path / "out", **SMALL, memory=10_000, force=True).finished


def test_python_warns_of_what_is_left_out_and_the_result_keeps_all_notes(base, tmp_path):
    lines = [*facts(20), {"prompt": "ball " * 80, "completion": "Yes."}]
    path = write_jsonl(tmp_path / "my.jsonl", lines)
    with pytest.warns(UserWarning, match=r"1 .*longer than 60 tokens and were left out: .*my\.jsonl:21") as caught:
        result = tune(base, path, tmp_path / "one", **SMALL, max_length=60, seed=1)
    assert [warning.filename for warning in caught] == [__file__]
    assert len(result.notes) == 2
    assert "1 of 21 examples were held out" in result.notes[0]
    assert all(f"*{note}*" in result._repr_markdown_() for note in result.notes)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = tune(base, path, tmp_path / "two", **SMALL, max_length=60, seed=1, notify=said.append)
    assert tuple(said) == told.notes == result.notes


def test_settings_stay_as_they_are_when_copied():
    settings = Settings(data="a", output="b", targets=["q_proj"])
    assert dataclasses.replace(settings, rank=np.int32(2)).rank == 2
    with pytest.raises(OptionError, match="rank is True"):
        dataclasses.replace(settings, rank=True)
