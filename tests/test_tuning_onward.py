"""Training on from an adapter: it begins where the adapter ended, keeps its form, and refuses to be another."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx.adapters.peft import export_peft
from phi3_mlx.cli import main
from phi3_mlx.errors import AdapterError, MemoryLimitError, OptionError, TrainingError
from phi3_mlx.tuning import Settings, tune
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.onward import decided_by, kept_apart
from phi3_mlx.tuning.trainer import Trainer

SMALL = {"batch_size": 4, "learning_rate": 1e-2, "holdout": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "facts.jsonl", facts(12))


@pytest.fixture(scope="module")
def adapter(base, data, tmp_path_factory):
    """An adapter of rank 2 with rsLoRA's scale, on parts of fused layers and on a whole one."""
    folder = tmp_path_factory.mktemp("adapter") / "first"
    options = {"rank": 2, "alpha": 6.0, "rslora": True, "dropout": 0.1, "targets": ("q_proj", "v_proj", "down_proj")}
    tune(base, data, folder, **SMALL, **options, steps=4)
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_plot():
    """Drawing takes as long as a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)
        yield


def weights(folder):
    return {name: np.array(array) for name, array in mx.load(str(folder / "adapters.safetensors")).items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def call(capsys, *words):
    """(exit code, stderr)"""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "targets": ("q_proj", "v_proj", "o_proj")},
        {"rank": 3, "method": "dora", "layers": "1"},
        {"method": "full"},
    ],
)
def test_a_run_begins_where_the_adapter_ended(base, data, tmp_path, options):
    """The loss before its first step is the adapter's own; form and settings are the adapter's."""
    one = tmp_path / "one"
    tune(base, data, one, **SMALL | {"learning_rate": 1e-3}, **options, steps=6)
    given = dict(model=str(base), data=str(data), output=str(tmp_path / "two"), **SMALL)
    prepared = runs.prepare(Settings.of(given | {"from_adapter": one}))
    model, adapters = runs.load_for_training(prepared)
    assert bool(adapters) == (options.get("method") != "full")
    examples = prepared.train.examples
    trainer = Trainer(model, examples, examples, prepared.settings, tmp_path, {})
    loaded = weights(one)
    found = {name.replace(".adapters.default", ""): np.array(array) for name, array in trainer.weights().items()}
    assert same(found, loaded)
    before = trainer.validation_loss()
    fresh, _ = runs.load_for_training(runs.prepare(Settings.of(given)))
    assert Trainer(fresh, examples, examples, prepared.settings, tmp_path, {}).validation_loss() > before + 0.05
    tune(base, data, tmp_path / "two", **SMALL | {"learning_rate": 1e-3}, from_adapter=one, steps=6)
    after = weights(tmp_path / "two")
    assert {name: array.shape for name, array in after.items()} == {n: a.shape for n, a in loaded.items()}
    assert not same(after, loaded)
    for name, array in after.items():  # parts that the adapter left alone are left alone again
        assert not array[loaded[name] == 0].any() or not name.endswith("lora_b"), name
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]
    again = runs.prepare(Settings.of(given | {"from_adapter": tmp_path / "two"}))
    model, _ = runs.load_for_training(again)
    assert Trainer(model, examples, examples, again.settings, tmp_path, {}).validation_loss() < before


def test_an_adapter_in_the_place_of_the_model_is_told_where_it_belongs(data, adapter, tmp_path, capsys):
    with pytest.raises(OptionError, match=r"first is an adapter; to train on from it give from_adapter='.*first', and"):
        tune(adapter, data, tmp_path / "out", **SMALL)
    code, err = call(capsys, "tune", "-m", adapter, "-d", data, "-o", tmp_path / "out")
    assert (code, f"give --from-adapter {adapter}, and the model" in err) == (2, True), err


def test_the_run_says_what_it_began_with_and_can_be_resumed(base, data, adapter, tmp_path, capsys):
    options = {**SMALL, "from_adapter": adapter, "steps": 6, "save_every": 2}
    tune(base, data, tmp_path / "whole", **options)
    stored = json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]
    assert stored["from_adapter"] == str(adapter)
    assert (stored["method"], stored["rank"], stored["alpha"]) == ("lora", 2, 6.0)
    assert (stored["rslora"], stored["dropout"]) == (True, 0.1)

    def stop(report):
        if report.step == 3:
            raise RuntimeError("the machine goes away")

    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    with pytest.raises(RuntimeError):
        tune(base, data, tmp_path / "parts", **options | {"from_adapter": moved}, on_step=stop)
    shutil.rmtree(moved)
    with pytest.raises(AdapterError, match=r"moved has no adapter_config\.json"):
        tune(base, data, tmp_path / "parts", **options | {"from_adapter": moved}, resume=True)
    with pytest.raises(TrainingError, match=r"another setting|another adapter to begin with"):
        tune(base, data, tmp_path / "parts", **{**options, "from_adapter": None}, resume=True)
    same_form = {"rank": 2, "alpha": 6.0, "rslora": True, "dropout": 0.1, "targets": None}
    with pytest.raises(TrainingError, match="another adapter to begin with"):
        tune(base, data, tmp_path / "parts", **{**options, "from_adapter": None} | same_form, resume=True)
    with pytest.raises(TrainingError, match="another adapter to begin with"):
        tune(base, data, tmp_path / "parts", **options | {"from_adapter": tmp_path / "whole"}, resume=True)
    assert tune(base, data, tmp_path / "parts", **options, resume=True).finished
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert call(capsys, "tune", "--resume", "-o", tmp_path / "whole")[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 8}, "rank 8 is not that of {}, 2; leave it out"),
        ({"alpha": 16.0}, "alpha 16.0 is not that of {}, 6.0"),
        ({"rslora": False}, "rslora False is not that of {}, True"),
        ({"method": "dora"}, "method 'dora' is not that of {}, 'lora'"),
        ({"method": "full"}, "method 'full' is not that of {}, 'lora'"),
        ({"targets": "q_proj"}, "targets ('q_proj',) are not the layers that {} changes"),
        ({"layers": 0}, "layers 0 are not the layers that {} changes"),
    ],
)
def test_what_the_adapter_decides_is_not_to_be_chosen_again(base, data, adapter, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("phi3_mlx.store.checkpoint.read_model", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(OptionError) as caught:
        tune(base, data, tmp_path / "out", **SMALL, from_adapter=adapter, **options)
    assert str(caught.value).startswith(said.format(adapter))
    assert not (tmp_path / "out").exists()


def test_what_agrees_with_the_adapter_may_be_said(base, data, adapter, tmp_path):
    options = {"rank": np.int64(2), "alpha": 6, "rslora": True, "method": "lora", "dropout": 0.3}
    options |= {"targets": ["down_proj", "q_proj", "v_proj"], "layers": "0-1", "steps": 1}
    assert tune(base, data, tmp_path / "out", **SMALL, from_adapter=adapter, **options).finished
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["dropout"] == 0.3


def test_an_adapter_of_another_model_or_none_is_refused(base, data, adapter, tmp_path):
    other = make_directory(tmp_path / "other", seed=1, num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"was trained on .*base .*this is .*other"):
        tune(other, data, tmp_path / "out", **SMALL, from_adapter=adapter)
    with pytest.raises(AdapterError, match="so it is no adapter folder"):
        tune(base, data, tmp_path / "out", **SMALL, from_adapter=tmp_path / "none")
    with pytest.raises(OptionError, match="from_adapter is a list; expected a path"):
        tune(base, data, tmp_path / "out", **SMALL, from_adapter=[adapter])
    full = tmp_path / "full"
    tune(base, data, full, **SMALL, method="full", steps=1)
    with pytest.raises(OptionError, match="rank 8 has no effect with method='full'"):
        tune(base, data, tmp_path / "out", **SMALL, from_adapter=full, rank=8)
    with pytest.raises(MemoryLimitError):
        tune(base, data, tmp_path / "out", **SMALL, from_adapter=adapter, memory="100kB")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_mlx_lm_says_rank_and_scale_alone(base, data, adapter, tmp_path):
    """Its layers are those of its arrays, the last ones say."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    arrays = {
        name: array for name, array in mx.load(str(adapter / "adapters.safetensors")).items() if "layers.1" in name
    }
    mx.save_safetensors(str(theirs / "adapters.safetensors"), arrays)
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    decided = {"method": "lora", "rank": 4, "alpha": 80.0, "rslora": False, "dropout": 0.0}
    assert decided_by(theirs) == decided
    tune(base, data, tmp_path / "out", **SMALL, from_adapter=theirs, steps=1)
    assert weights(tmp_path / "out").keys() == arrays.keys()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 20.0
    for damage in ({"lora_parameters": {"rank": 4}}, {"lora_parameters": {"scale": 20.0}}, {"fine_tune_type": "ia3"}):
        (theirs / "adapter_config.json").write_text(json.dumps(config | damage))
        with pytest.raises(AdapterError, match=r"adapter_config\.json: .* expected"):
            decided_by(theirs)
    # As 0.1.0 wrote a flag of its command line.
    facts = {"phi3_mlx": {"rank": 4, "alpha": 40.0, "rslora": "True"}}
    (theirs / "adapter_config.json").write_text(json.dumps(config | facts))
    assert decided_by(theirs) == decided | {"alpha": 40.0, "rslora": True}
    export_peft(theirs, tmp_path / "peft", model=str(base))
    exported = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (exported["use_rslora"], exported["lora_alpha"] / exported["r"] ** 0.5) == (True, 20.0)


def test_the_command_finds_the_model_by_the_adapter(base, data, adapter, tmp_path, capsys):
    code, err = call(capsys, "tune", "--from-adapter", adapter, "-d", data, "-o", tmp_path / "out", "--steps", 1)
    assert code == 0, err
    stored = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert stored["model"] == str(base)
    words = ["tune", "--from-adapter", adapter, "-d", data, "-o", tmp_path / "new"]
    code, err = call(capsys, *words, "--rank", 8)
    assert code == 2
    assert err.startswith(f"phi3-mlx: --rank 8 is not that of {adapter}, 2; leave it out")
    assert call(capsys, *words, "--dry-run", "--steps", 1)[0] == 0


def test_zeros_tell_which_part_of_a_fused_layer_a_component_changes():
    parts = {"q_proj": (0, 4), "k_proj": (4, 6), "v_proj": (6, 8)}
    whole = np.ones((2, 8), np.float32)
    assert kept_apart(whole, parts) is None
    assert kept_apart(np.zeros((2, 8), np.float32), parts) is None  # changes nothing yet
    assert kept_apart(whole, {}) is None
    apart = np.zeros((5, 8), np.float32)
    apart[1, :4] = apart[2, 6:] = 1
    right = np.zeros((5, 8), np.float32)
    right[:2, :4] = right[2:, 6:] = 1
    assert np.array_equal(np.array(kept_apart(apart, parts)), right)
    two = {"gate_proj": (0, 4), "up_proj": (4, 8)}
    assert np.array_equal(np.array(kept_apart(right[2:], two)), np.repeat([[0, 0, 0, 0, 1, 1, 1, 1]], 3, axis=0))
    assert kept_apart(right[2:], {"o_proj": (0, 8)}) is None
    apart[2, 5] = 1
    assert kept_apart(apart, parts) is None
