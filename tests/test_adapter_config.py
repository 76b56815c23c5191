"""What an adapter's folder says: settings that are read, let be or refused by name, numbers that fit, and the base."""

import json
import math
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx import load
from phi3_mlx.adapters.config import check_config
from phi3_mlx.adapters.folder import Adapters, base_of, trained_on
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.cli import cli
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.errors import AdapterError, OptionError, TrainingError
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.tuning import Settings, tune

DOWN = "model.layers.1.mlp.down_proj"  # (64, 96)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=2)


def draw(*shape, seed=0):
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def write(folder, changes=None, parameters=None, **settings):
    """A folder as mlx-lm writes one; `changes` are made to its tensors."""
    folder.mkdir()
    tensors = {f"{DOWN}.lora_a": draw(96, 2), f"{DOWN}.lora_b": draw(2, 64, seed=1), **(changes or {})}
    mx.save_safetensors(str(folder / "adapters.safetensors"), {name: mx.array(a) for name, a in tensors.items()})
    own = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.down_proj"], **(parameters or {})}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": own, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(directory, folder):
    """What an adapter adds to the weight of its layer."""
    adapter = load(str(directory), adapter=folder)[0].layers[1].mlp.down_proj.adapters["adapter 0"]
    a, b = adapter.product()
    return np.array(a @ b)


# Settings


@pytest.mark.parametrize(
    ("parameters", "settings", "match"),
    [
        ({}, {"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow is 1, which is not known here"),
        ({"use_qalora": True}, {}, "lora_parameters.use_qalora is True, which is not known here"),
        ({}, {"fine_tune_type": "ia3"}, "fine_tune_type is 'ia3', expected lora, dora or full"),
        ({}, {"fine_tune_type": "dora"}, "fine_tune_type is dora, and .*down_proj has no m"),
        ({}, {"use_dora": True}, "fine_tune_type is dora, and .*down_proj has no m"),
        ({}, {"lora_parameters": [1]}, "lora_parameters is .*expected an object"),
        ({"scale": "2"}, {}, r"lora_parameters\.scale is '2', expected a number"),
        ({"scale": None}, {}, r"lora_parameters\.scale is missing"),
        ({"scale": math.inf}, {}, r"lora_parameters\.scale is inf, expected a number from"),
        (
            {"alpha": 16.0},
            {},
            r"lora_parameters\.alpha is 16 beside scale 2; mlx-lm multiplied by scale \* alpha / rank",
        ),
    ],
)
def test_settings_that_may_change_the_numbers_are_refused_by_name(parameters, settings, match, base, tmp_path):
    folder = write(tmp_path / "a", parameters=parameters, **settings)
    for use in (
        lambda: load(str(base), adapter=folder),
        lambda: fuse(folder, tmp_path / "m", model=str(base)),
        lambda: export_peft(folder, tmp_path / "peft", model=str(base)),
    ):
        with pytest.raises(AdapterError, match=match):
            use()


def test_what_mlx_lm_writes_is_let_be(base, tmp_path):
    """All options of its trainer, those of old versions too; alpha where both readings of it agree."""
    theirs = json.loads("""{
        "model": "x", "train": true, "optimizer": "adam", "optimizer_config": {"adam": {}}, "data": "d", "seed": 0,
        "batch_size": 4, "iters": 1000, "val_batches": 25, "learning_rate": 1e-05, "steps_per_report": 10,
        "steps_per_eval": 200, "resume_adapter_file": null, "adapter_path": "adapters", "save_every": 100,
        "test": false, "test_batches": 500, "max_seq_length": 2048, "config": null, "grad_checkpoint": true,
        "grad_accumulation_steps": 2, "clear_cache_threshold": 0, "lr_schedule": {"name": "cosine_decay"},
        "mask_prompt": true, "report_to": "wandb", "project_name": "p", "trust_remote_code": false, "lora_layers": 16,
        "use_dora": false, "a_setting_of_tomorrow": null, "another": false
    }""")
    expected = product(base, write(tmp_path / "a"))
    assert np.array_equal(product(base, write(tmp_path / "b", **theirs)), expected)
    assert np.array_equal(product(base, write(tmp_path / "c", parameters={"alpha": 2})), expected)


def test_defaults_of_mlx_lm_are_known():
    """Every option that the installed one would write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports'
        lora = pytest.importorskip("mlx_lm.lora")
    config = {key: value or 1 for key, value in lora.CONFIG_DEFAULTS.items()}
    check_config(Path("a"), {**config, "lora_parameters": {}, "fine_tune_type": "lora"})


# Numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("leaf", ["lora_a", "lora_b", "m"])
def test_a_tensor_that_is_not_finite_is_refused_by_name(leaf, value, base, tmp_path):
    shape = {"lora_a": (96, 2), "lora_b": (2, 64), "m": (64,)}[leaf]
    array = np.ones(shape, np.float32)
    array.flat[-1] = value
    magnitudes = {f"{DOWN}.m": np.ones(64, np.float32)} if leaf == "m" else {}
    kind = "dora" if leaf == "m" else "lora"
    folder = write(tmp_path / "a", {**magnitudes, f"{DOWN}.{leaf}": array}, fine_tune_type=kind)
    with pytest.raises(AdapterError, match=rf"{DOWN}\.{leaf}, whose numbers are not all finite"):
        load(str(base), adapter=folder)


def test_whole_weights_that_are_not_finite_are_refused(base, tmp_path):
    """In the type that the model has, too: float16 cannot hold 1e30."""
    name = f"{DOWN}.weight"
    for n, (value, dtype, match) in enumerate(
        (
            (math.nan, None, f"{name}, whose numbers are not all finite"),
            (1e30, "float16", f"{name} has values that are not finite in float16"),
        )
    ):
        folder = write(tmp_path / str(n), fine_tune_type="full")
        mx.save_safetensors(str(folder / "adapters.safetensors"), {name: mx.full((64, 96), value)})
        with pytest.raises(AdapterError, match=match):
            load(str(base), adapter=folder, dtype=dtype)
    assert load(str(base), adapter=tmp_path / "1", dtype="bfloat16")


def test_numbers_beyond_the_models_type_are_refused(base, tmp_path):
    """Whatever makes them: the scale, the tensors, or the weight that the adapter is given."""
    for n, (changes, parameters) in enumerate(
        (
            ({f"{DOWN}.lora_b": 100 * draw(2, 64)}, {"scale": 65000}),
            ({f"{DOWN}.lora_b": 100 * draw(2, 64)}, {"scale": -65000}),
            ({f"{DOWN}.lora_a": 1e6 * draw(96, 2)}, {}),
            ({f"{DOWN}.lora_b": 1e6 * draw(2, 64)}, {}),
        )
    ):
        folder = write(tmp_path / str(n), changes, parameters)
        with pytest.raises(AdapterError, match=r"has numbers beyond what float16 holds, .*larger dtype"):
            load(str(base), adapter=folder, dtype="float16")
        for dtype in ("float32", "bfloat16"):
            assert load(str(base), adapter=folder, dtype=dtype)
    folder = write(tmp_path / "huge", parameters={"scale": 65000}, changes={f"{DOWN}.lora_b": 1e35 * draw(2, 64)})
    with pytest.raises(AdapterError, match="beyond what float32 holds"):
        load(str(base), adapter=folder)

    folder = str(write(tmp_path / "a"))
    for weight, dtype in ((1e30, "float16"), (-1e5, "float16"), (1e39, "float32"), (10**40, "bfloat16")):
        with pytest.raises(OptionError, match=f"the weight of .* beyond what {dtype} holds; give a smaller"):
            load(str(base), adapter={folder: weight}, dtype=dtype)
    for weight in (math.nan, math.inf, -math.inf):
        with pytest.raises(OptionError, match=r"the weight of .*give a finite number"):
            load(str(base), adapter={folder: weight})
    for weight in ("1", True, None, [1.0]):
        with pytest.raises(OptionError, match=r"weight .*expected a number"):
            load(str(base), adapter={folder: weight})
    assert load(str(base), adapter={folder: np.float32(-0.5)}, dtype="float16")


def test_weights_are_checked_at_the_terminal_too(base, tmp_path):
    folder = write(tmp_path / "a")
    for given, match in (
        (f"{folder}=nan", "give a finite number"),
        (f"{folder}=1e39", "beyond what float32 holds"),
        (f"{folder}=much", "is not an adapter's weight"),
        (f"{folder}=0.5 --adapter {folder}=2", "is given twice"),
    ):
        words = ["generate", "-m", str(base), "-p", "hi", "--adapter", *given.split(" ")]
        result = CliRunner().invoke(cli, words)
        assert match in str(result.exception) or match in result.output, given


def test_a_run_is_refused_whose_adapter_would_be(base, tmp_path):
    """At the start, not when what was learnt is to be used; PEFT's alpha may be larger than the scale."""
    for options, scale in (
        ({"alpha": 1e6, "rank": 8}, "125000"),
        ({"alpha": 1e5, "rank": 1, "rslora": True}, "100000"),
        ({"alpha": 1e-8, "rank": 1}, "1e-08"),
    ):
        with pytest.raises(
            OptionError, match=rf"alpha .* with rank .* by {scale}, and an adapter's scale is from 1e-06"
        ):
            Settings(data="x", output="y", **options).check()
    assert Settings(data="x", output="y", alpha=65504.0 * 8, rank=8).check()
    folder = write(tmp_path / "a", parameters={"scale": 65504.0})
    export_peft(folder, tmp_path / "peft", model=str(base))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 2 * 65504
    import_peft(tmp_path / "peft", tmp_path / "b", str(base))
    assert np.allclose(product(base, tmp_path / "b"), product(base, folder))
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3 * 65504}))
    with pytest.raises(
        AdapterError, match=r"lora_alpha 196512 of 2 components makes a scale of 98256 in model.layers.1"
    ):
        import_peft(tmp_path / "peft", tmp_path / "c", str(base))


def test_tensors_of_no_shape_or_no_components_are_refused(base, tmp_path):
    for n, changes in enumerate(
        (
            {f"{DOWN}.lora_a": draw(96, 0), f"{DOWN}.lora_b": draw(0, 64)},
            {f"{DOWN}.lora_b": np.float32(1)},
            {f"{DOWN}.lora_a": np.float32(1)},
            {f"{DOWN}.lora_b": draw(64)},
        )
    ):
        with pytest.raises(AdapterError, match="but the layer turns 96 into 64"):
            load(str(base), adapter=write(tmp_path / str(n), changes))


def test_what_is_no_linear_layer_is_named(base, tmp_path):
    for n, (name, match) in enumerate(
        (
            ("model.embed_tokens", "adapters of the embedding are not supported"),
            ("model.norm", "of what is no linear layer adapters are not supported"),
            ("model.layers.7.mlp.down_proj", "which this model does not have"),
        )
    ):
        folder = write(tmp_path / str(n), {f"{name}.lora_a": draw(4032, 2), f"{name}.lora_b": draw(2, 64)})
        with pytest.raises(AdapterError, match=f"changes {name}, .*{match}"):
            load(str(base), adapter=folder)


# The base

ONE, TWO = "0" * 40, "f" * 40


@pytest.fixture
def cached(base, tmp_path, monkeypatch):
    """Phi-3.5-mini in Hugging Face's cache, in two commits with different weights; main is the first."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("phi3_mlx.store.hub.cache_folder", lambda: tmp_path / "hub")
    folder = tmp_path / "hub" / "models--microsoft--Phi-3.5-mini-instruct"
    for commit in (ONE, TWO):
        shutil.copytree(base, folder / "snapshots" / commit)
    file = str(folder / "snapshots" / TWO / "model.safetensors")
    arrays = mx.load(file)
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 1.01
    mx.eval(arrays)
    mx.save_safetensors(file, arrays, {"format": "mlx"})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(ONE)
    return folder


@pytest.mark.parametrize("name", ["Phi-3.5-Mini", "microsoft/Phi-3.5-mini-instruct"])
def test_an_adapter_stays_with_its_commit_when_the_hub_moves_on(name, cached, tmp_path, monkeypatch):
    """By whatever name it was asked for, the base is a repository at a commit: of fuse, export and the run itself."""
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)
    data = write_jsonl(tmp_path / "facts.jsonl", facts(12))
    tune(name, data, tmp_path / "a", steps=1, batch_size=2, rank=2)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model"]["name"], config["base_model"]["revision"]) == ("microsoft/Phi-3.5-mini-instruct", ONE)
    assert config["model"] == "microsoft/Phi-3.5-mini-instruct"
    (cached / "refs" / "main").write_text(TWO)
    export_peft(tmp_path / "a", tmp_path / "peft")
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (theirs["base_model_name_or_path"], theirs["revision"]) == ("microsoft/Phi-3.5-mini-instruct", ONE)
    assert (theirs["lora_alpha"], type(theirs["lora_alpha"])) == (16, int)
    fuse(tmp_path / "a", tmp_path / "fused")
    fused, expected = read_model(tmp_path / "fused"), read_model(cached / "snapshots" / ONE)
    assert mx.array_equal(fused.model.norm.weight, expected.model.norm.weight)
    with pytest.raises(AdapterError, match=f"trained on microsoft/Phi-3.5-mini-instruct at {ONE}"):
        load(name, adapter=tmp_path / "a")
    assert load(name, ONE, adapter=tmp_path / "a")


def test_a_run_goes_on_with_its_commit_when_the_hub_moves_on(cached, tmp_path, monkeypatch):
    """Neither refused for another base, nor trained on with it; a revision that is named is taken."""
    name = "phi-3.5-mini"
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)
    data = write_jsonl(tmp_path / "facts.jsonl", facts(12))
    options = {"steps": 3, "batch_size": 2, "rank": 2, "save_every": 1}

    def stop(report):
        if report.step == 2:
            raise RuntimeError("the machine goes away")

    with pytest.raises(RuntimeError):
        tune(name, data, tmp_path / "a", **options, on_step=stop)
    (cached / "refs" / "main").write_text(TWO)
    with pytest.raises(TrainingError, match="another base model"):
        tune(name, data, tmp_path / "a", **options, revision=TWO, resume=True)
    assert tune(name, data, tmp_path / "a", **options, resume=True).finished
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model"]["revision"] == ONE


def test_a_folder_with_an_aliass_name_is_not_the_alias(cached, tmp_path, monkeypatch):
    """An alias comes first, in a run too."""
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi-3.5-mini").mkdir()
    data = write_jsonl(tmp_path / "facts.jsonl", facts(12))
    assert tune("phi-3.5-mini", data, tmp_path / "a", steps=1, batch_size=2, rank=2).finished


def test_an_older_adapter_that_names_an_alias_is_found_too(cached, tmp_path):
    """Its commit stood beside the alias, and was not used."""
    folder = tmp_path / "a"
    stored = {"name": "phi-3.5-mini", "revision": ONE, "fingerprint": None}
    assert trained_on(folder, {"base_model": stored}) == ("phi-3.5-mini", ONE)
    assert trained_on(folder, {"base_model": stored}, TWO) == ("phi-3.5-mini", TWO)
    assert trained_on(folder, {"base_model": {"name": "tiny", "revision": ONE}}) == ("tiny", None)
    assert trained_on(folder, {"base_model": {"name": str(cached), "revision": ONE}}) == (str(cached), None)
    assert trained_on(folder, {"base_model": {"name": "owner/name", "revision": 3}}) == ("owner/name", None)


def test_a_directory_is_named_by_its_whole_path(base, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert base_of(base, "base").name == str(base)
    assert base_of(base, "tiny").name == "tiny"
    snapshot = cached / "snapshots" / TWO
    found = base_of(snapshot, str(snapshot))
    assert (found.name, found.revision) == ("microsoft/Phi-3.5-mini-instruct", TWO)


def test_fused_numbers_fit_the_type_they_are_written_in(base, tmp_path):
    """float16 holds 65,504 at most: what is more would be infinite in the file."""
    folder = write(tmp_path / "a", {f"{DOWN}.lora_b": 1e6 * draw(2, 64)})
    with pytest.raises(AdapterError, match=r"beyond what float16 holds.*dtype='bfloat16'"):
        fuse(folder, tmp_path / "half", model=str(base), dtype="float16")
    assert not (tmp_path / "half").exists()
    assert fuse(folder, tmp_path / "brain", model=str(base), dtype="bfloat16").layers == 1


def test_adapters_in_use_are_switched_with_checked_weights(base, tmp_path):
    model = read_model(base, dtype="float16")
    adapters = Adapters(model)
    adapters.load("one", write(tmp_path / "one"))
    with pytest.raises(OptionError, match=r"the weight of .*one is 70000, which makes numbers beyond"):
        adapters.use({"one": 70000})
    adapters.use({"one": 2})
