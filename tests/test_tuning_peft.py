"""What PEFT's adapters say of themselves: honoured, of no consequence, or refused by name; PiSSA and OLoRA computed."""

import json
import warnings

import mlx.core as mx
import numpy as np
import oracle
import pytest
from tuning_models import RAW, copy_of, make_directory

from phi3_mlx import load
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.adapters.peft_config import alpha_of
from phi3_mlx.adapters.principal import taken_out
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.errors import AdapterError
from phi3_mlx.store.checkpoint import read_model

IDS = mx.array([[5, 40, 100, 7, 99, 1000, 3, 17, 2500, 44]])
NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=2)


def logits(model):
    return np.array(model(IDS)[0].astype(mx.float32))


def off(one, other):
    return float(np.abs(one - other).max())


def write(folder, tensors, **settings):
    """A PEFT folder; names without their common beginning."""
    folder.mkdir()
    stems = {f"base_model.model.{name}.weight": mx.array(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stems)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def draw(*shape, seed=0):
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


DOWN = "model.layers.1.mlp.down_proj"  # (64, 96)
TENSORS = {f"{DOWN}.lora_A": draw(2, 96), f"{DOWN}.lora_B": draw(64, 2, seed=1)}


def peft_logits(base, folder, config, scale=0.3):
    """PEFT's own logits of an adapter that it made on `base`, changed as training would, saved and loaded again."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    new = lambda: oracle.make_torch({**RAW, "num_hidden_layers": 2}, read_model(base))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(new(), peft.LoraConfig(**config))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.add_(scale * torch.randn_like(parameter))
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        model.save_pretrained(str(folder))
        again = peft.PeftModel.from_pretrained(new(), str(folder)).eval()
        with torch.no_grad():
            ids = torch.tensor(np.array(IDS).astype(np.int64))
            return again(ids, use_cache=False).logits[0].numpy()


INITS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora, patterns": {
        "init_lora_weights": "olora",
        "rank_pattern": {"down_proj": 5, "layers.0.self_attn.qkv_proj": 7},
        "alpha_pattern": {"o_proj": 3},
    },
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora, more components than rows": {"init_lora_weights": "olora", "r": 70, "target_modules": ["down_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "random": {"init_lora_weights": False},
    "one layer": {"layers_to_transform": [1], "exclude_modules": ["o_proj"], "lora_dropout": 0.3},
    "output layer": {"target_modules": ["lm_head", "o_proj"], "alpha_pattern": {"lm_head": 3}},
}


@pytest.mark.parametrize("name", list(INITS))
def test_an_imported_adapter_is_what_peft_loads(name, base, tmp_path):
    """However it was initialized: what PiSSA and OLoRA take out of the base is computed again."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(NAMES), **INITS[name]}
    expected = peft_logits(base, tmp_path / "peft", config)
    import_peft(tmp_path / "peft", tmp_path / "a", str(base))
    plain = logits(read_model(base))
    assert off(expected, plain) > 0.5
    assert off(logits(load(str(base), adapter=tmp_path / "a")[0]), expected) < 2e-3


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8"])
def test_what_peft_has_converted_is_a_plain_adapter(init, base, tmp_path):
    """`path_initial_model_for_weight_conversion` doubles the rank, which takes out what the base lost."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(NAMES), use_rslora=True, init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(oracle.make_torch({**RAW, "num_hidden_layers": 2}, read_model(base)), config).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "initial"))
        model.peft_config["default"].init_lora_weights = init
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            ids = torch.tensor(np.array(IDS).astype(np.int64))
            expected = model(ids, use_cache=False).logits[0].numpy()
        converted = tmp_path / "converted"
        model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    import_peft(converted, tmp_path / "a", str(base))
    assert off(logits(load(str(base), adapter=tmp_path / "a")[0]), expected) < 2e-3


def test_an_adapter_that_is_none_of_pefts_needs_no_import(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        (folder / name).write_text("{}")
    with pytest.raises(AdapterError, match=r"has no adapter_model.* an adapter that can be used as it is\)"):
        import_peft(folder, tmp_path / "imported", str(base))


def test_untrained_pissa_and_olora_change_nothing(base, tmp_path):
    """The file holds W's own part, which the base then lost: together they are the base."""
    weight = np.array(read_model(base).layers[1].mlp.down_proj.weight)
    for kind in ("pissa", "olora"):
        # s B A with s = 3, as the settings have it
        b, a = taken_out(kind, weight, 2, 3.0)
        tensors = {f"{DOWN}.lora_A": a.astype(np.float32), f"{DOWN}.lora_B": (b / 3).astype(np.float32)}
        folder = write(tmp_path / kind, tensors, init_lora_weights=kind)
        import_peft(folder, tmp_path / f"{kind}-imported", str(base))
        adapter = (
            load(str(base), adapter=tmp_path / f"{kind}-imported")[0].layers[1].mlp.down_proj.adapters["adapter 0"]
        )
        assert adapter.lora_a.shape == (96, 4), "its components, and those of what was taken out"
        first, second = adapter.product()
        assert off(np.array(first @ second), np.zeros((96, 64))) < 1e-5


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_what_is_taken_out_follows_the_papers(shape):
    """PiSSA: the largest singular values. OLoRA: s times the first columns of Q and rows of R."""
    weight = draw(*shape)
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    b, a = taken_out("pissa", weight, 3, 7.0)
    assert b.shape == (shape[0], 3)
    assert a.shape == (3, shape[1])
    assert np.allclose(b @ a, (left[:, :3] * values[:3]) @ right[:3])
    q, r = np.linalg.qr(weight.astype(np.float64))
    b, a = taken_out("olora", weight, 3, 7.0)
    assert np.allclose(b @ a, 7.0 * q[:, :3] @ r[:3])


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"init_lora_weights": "corda"}, r"init_lora_weights is 'corda'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True, which adapters here do not have"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is"),
        ({"monteclora_config": {"n": 1}}, "monteclora_config is"),
        ({"megatron_config": {"tp": 2}}, "megatron_config is"),
        (
            {"a_setting_of_tomorrow": 0.5},
            "a_setting_of_tomorrow is 0.5, which is not known here; if it matters in training",
        ),
        ({"a_setting_of_tomorrow": 0}, "a_setting_of_tomorrow is 0"),
        ({"r": 3}, "down_proj has 2 components, and adapter_config.json says 3"),
        ({"rank_pattern": {"down_proj": 4}}, "has 2 components, and .* says 4"),
        ({"alpha_pattern": {"down_proj": None}}, r"alpha_pattern\.down_proj is missing, expected a number"),
        ({"use_dora": True}, "down_proj has no lora_magnitude_vector"),
    ],
)
def test_a_setting_that_is_not_honoured_is_refused_by_name(setting, match, base, tmp_path):
    folder = write(tmp_path / "peft", TENSORS, **setting)
    with pytest.raises(AdapterError, match=match):
        import_peft(folder, tmp_path / "a", str(base))
    assert not (tmp_path / "a").exists()


def test_settings_that_ask_for_nothing_are_let_be(base, tmp_path):
    """Defaults of every version, known here or not; and those that the tensors tell already."""
    plain = write(tmp_path / "plain", TENSORS)
    neutral = json.loads("""{
        "bias": "none", "lora_bias": false, "fan_in_fan_out": false, "modules_to_save": null, "use_qalora": false,
        "layer_replication": null, "loftq_config": {}, "eva_config": {"rho": 2.0}, "megatron_core": "megatron.core",
        "task_type": "CAUSAL_LM", "auto_mapping": null, "peft_version": "0.21.2", "inference_mode": true,
        "target_modules": ["down_proj"], "exclude_modules": null, "layers_to_transform": 1, "layers_pattern": null,
        "qalora_group_size": 16, "ensure_weight_tying": true, "rank_pattern": {}, "alpha_pattern": null,
        "lorap_lr_ratio": 16.0, "init_lora_weights": "eva", "r": 2,
        "a_setting_of_tomorrow": null, "another": [], "a_third": false
    }""")
    other = write(tmp_path / "other", TENSORS, **neutral)
    for name, folder in (("a", plain), ("b", other)):
        import_peft(folder, tmp_path / name, str(base))
    one, two = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in "ab")
    assert all(mx.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({**TENSORS, f"{DOWN}.lora_magnitude_vector": np.ones(64, np.float32)}, "and use_dora is false"),
        ({**TENSORS, f"{DOWN}.lora_A": draw(2, 95)}, "the layer reads 96 inputs"),
        ({**TENSORS, f"{DOWN}.lora_A": draw(2)}, "the layer reads 96 inputs"),
        ({**TENSORS, f"{DOWN}.lora_B": draw(63, 2)}, "the layer has 64 rows"),
        ({**TENSORS, "model.embed_tokens.lora_embedding_A": draw(2, 4)}, "adapters of the embedding are not supported"),
        ({**TENSORS, "model.layers.1.mlp.w_pack.lora_A": draw(2, 4)}, "which is of no linear layer of phi3"),
        ({**TENSORS, "lm_head": draw(4032, 64)}, "differs from the base's"),
        ({**TENSORS, "model.embed_tokens.base_layer": draw(4032, 64)}, "differs from the base's"),
        ({**TENSORS, "score": draw(2, 64)}, "is no LoRA or DoRA tensor"),
        ({}, "is empty"),
    ],
)
def test_tensors_that_cannot_be_taken_are_refused_by_name(tensors, match, base, tmp_path):
    folder = write(tmp_path / "peft", tensors)
    with pytest.raises(AdapterError, match=match):
        import_peft(folder, tmp_path / "a", str(base))


def test_a_strength_that_float32_cannot_hold_is_refused(base, tmp_path):
    tensors = {name: 1e35 * array for name, array in TENSORS.items()}
    with pytest.raises(AdapterError, match="down_proj has numbers beyond what float32 holds"):
        import_peft(write(tmp_path / "peft", tensors, lora_alpha=65000), tmp_path / "a", str(base))


def test_what_was_taken_out_of_floats_is_not_computed_from_packed_weights(base, tmp_path):
    packed = make_directory(tmp_path / "packed", bits=4, num_hidden_layers=2)
    folder = write(tmp_path / "peft", TENSORS, init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="this one is rounded; import it for the model in floats"):
        import_peft(folder, tmp_path / "a", str(packed))


# The output layer


def with_head(base, folder):
    """An adapter of the output layer and of one more, as mlx-lm writes it for `keys: [lm_head, ...]`."""
    folder.mkdir()
    tensors = {"lm_head.lora_a": draw(64, 3), "lm_head.lora_b": draw(3, 4032, seed=1)}
    tensors |= {f"{DOWN}.lora_a": draw(96, 3, seed=2), f"{DOWN}.lora_b": draw(3, 64, seed=3)}
    mx.save_safetensors(str(folder / "adapters.safetensors"), {name: mx.array(a) for name, a in tensors.items()})
    parameters = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": ["lm_head", DOWN]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("split", [False, True])
def test_the_output_layer_goes_to_peft_and_back(split, base, tmp_path):
    folder = with_head(base, tmp_path / "a")
    expected = logits(load(str(base), adapter=folder)[0])
    assert off(expected, logits(read_model(base))) > 0.5
    export_peft(folder, tmp_path / "peft", model=str(base), split=split)
    names = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.lora_A.weight" in names
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", DOWN]
    import_peft(tmp_path / "peft", tmp_path / "b", str(base))
    assert off(logits(load(str(base), adapter=tmp_path / "b")[0]), expected) < 1e-3
    fuse(folder, tmp_path / "fused", model=str(base))
    assert off(logits(read_model(tmp_path / "fused")), expected) < 1e-3


def test_the_output_layers_adapter_is_pefts_and_mlx_lms(base, tmp_path):
    expected = logits(load(str(base), adapter=with_head(base, tmp_path / "a"))[0])
    export_peft(tmp_path / "a", tmp_path / "peft", model=str(base))
    import_peft(tmp_path / "peft", tmp_path / "b", str(base))
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = oracle.make_torch({**RAW, "num_hidden_layers": 2}, read_model(base))
        theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "peft")).eval()
        with torch.no_grad():
            found = theirs(torch.tensor(np.array(IDS).astype(np.int64)), use_cache=False).logits[0].numpy()
    assert off(found, expected) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("mlx_lm.utils")
        from mlx_lm.tuner.utils import load_adapters

        model, _ = utils.load_model(base)
        load_adapters(model, str(tmp_path / "b"))
        model.eval()
    assert off(np.array(model(IDS)[0]), expected) < 1e-3


def test_weights_that_peft_saves_beside_an_adapter_are_the_bases(base, tmp_path):
    """PEFT writes embedding and output layer too where one of them is a target."""
    weights = mx.load(str(base / "model.safetensors"))
    saved = {
        "lm_head.base_layer": weights["lm_head.weight"],
        "model.embed_tokens": weights["model.embed_tokens.weight"].astype(mx.float16),
    }
    folder = write(tmp_path / "peft", {**TENSORS, **saved})
    assert import_peft(folder, tmp_path / "a", str(base)) == 1


def test_alpha_is_a_whole_number_where_peft_has_one():
    for alpha, rank, rslora in ((16, 8, False), (6, 4, True), (7, 3, False), (1, 7, True)):
        found = alpha_of(alpha / (rank**0.5 if rslora else rank), rank, rslora)
        assert (found, type(found)) == (alpha, int)
    assert alpha_of(0.3, 4, False) == pytest.approx(1.2)


def test_a_tied_output_layer_has_no_adapter(tmp_path):
    tied = make_directory(tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    copied = copy_of(tied, tmp_path / "copied")
    folder = write(tmp_path / "peft", {"lm_head.lora_A": draw(2, 64), "lm_head.lora_B": draw(4032, 2)})
    with pytest.raises(AdapterError, match="changes lm_head, which this model does not have: its output layer is"):
        import_peft(folder, tmp_path / "a", str(copied))
    with pytest.raises(AdapterError, match="changes lm_head, which this model does not have: its output layer is"):
        load(str(copied), adapter=with_head(copied, tmp_path / "b"))
