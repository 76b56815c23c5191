"""Adapters as GGUF files: what is in them, against the formula that llama.cpp computes; then everything refused."""

import json

import moe_models
import numpy as np
import pytest
import small_models
from test_tuning_adapters import make_adapter
from test_tuning_peft import SETTINGS, draw, write
from tuning_models import make_directory

gguf = pytest.importorskip("gguf")

from phi3_mlx import export_adapter  # noqa: E402
from phi3_mlx.adapters.folder import make_adapters, read_adapter  # noqa: E402
from phi3_mlx.adapters.peft import import_peft  # noqa: E402
from phi3_mlx.cli import main  # noqa: E402
from phi3_mlx.errors import AdapterError, CheckpointError, ConfigError, OptionError  # noqa: E402
from phi3_mlx.models.hooks import get_layer  # noqa: E402
from phi3_mlx.store.checkpoint import read_model  # noqa: E402

NAMES = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=2)


def changes(file):
    """What a file adds to each weight, (outputs, inputs), by llama.cpp's formula: adapter_scale * alpha / rank."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    arrays = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    stems = {name.removesuffix(".lora_a") for name in arrays if name.endswith(".lora_a")}
    assert set(arrays) == {f"{stem}.{leaf}" for stem in stems for leaf in ("lora_a", "lora_b")}
    factors = {stem: (arrays[f"{stem}.lora_a"], arrays[f"{stem}.lora_b"]) for stem in stems}
    return {stem: b @ a * np.float32(alpha / a.shape[0]) for stem, (a, b) in factors.items()}


def expected(folder, directory):
    """The changes of an adapter folder by llama.cpp's names, from what our own layers compute."""
    model = read_model(directory)
    result = {}
    for path, adapter in make_adapters(folder, *read_adapter(folder), model).items():
        weight = np.array(adapter.changed_weight(get_layer(model, path)) - get_layer(model, path).weight)
        _, _, layer, name = path.split(".", 3)
        result[f"blk.{layer}.{NAMES[name]}.weight"] = weight
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "rank": 5},
        {"targets": ("q_proj", "v_proj", "up_proj")},
        {"targets": ("down_proj",), "layers": "1"},
    ],
)
def test_a_file_holds_what_the_adapter_changes(options, base, tmp_path):
    make_adapter(base, tmp_path / "adapter", **options)
    done = export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    found, wanted = changes(done.path), expected(tmp_path / "adapter", base)
    assert found.keys() == wanted.keys()
    assert len(found) == done.layers
    for name, change in wanted.items():
        np.testing.assert_allclose(found[name], change, atol=1e-5 * np.abs(change).max(), err_msg=name)


def test_the_file_says_what_it_is(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    path = export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf").path
    fields = gguf.GGUFReader(path).fields
    said = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "phi3"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 6
    assert said["general.name"] == "adapter"
    assert said["general.base_model.0.name"] == "base"
    trained_on = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model"]
    assert said["phi3_mlx.base_fingerprint"] == trained_on["fingerprint"]


@pytest.mark.parametrize(("kind", "step"), [("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_half_types_round_once(kind, step, base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", type=kind)
    tensors, _ = read_adapter(tmp_path / "adapter")
    for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors:
        assert tensor.tensor_type.name == kind.upper()
    a = next(t for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors if t.name == "blk.0.attn_qkv.weight.lora_a")
    whole = np.array(tensors["model.layers.0.self_attn.qkv_proj.lora_a"]).T
    np.testing.assert_allclose(gguf.dequantize(a.data, a.tensor_type), whole, rtol=step, atol=1e-7)


def test_projections_that_peft_has_apart_become_blocks_of_the_fused_one(base, tmp_path):
    tensors = {
        f"{LAYER}.self_attn.q_proj.lora_A": draw(2, 64),
        f"{LAYER}.self_attn.q_proj.lora_B": draw(64, 2, seed=1),
        f"{LAYER}.self_attn.v_proj.lora_A": draw(3, 64, seed=2),
        f"{LAYER}.self_attn.v_proj.lora_B": draw(32, 3, seed=3),
        f"{LAYER}.mlp.down_proj.lora_A": draw(2, 96, seed=4),
        f"{LAYER}.mlp.down_proj.lora_B": draw(64, 2, seed=5),
    }
    folder = write(tmp_path / "peft", tensors, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 12})
    done = export_adapter(folder, tmp_path / "adapter.gguf", model=str(base))
    found = changes(done.path)
    scale = SETTINGS["lora_alpha"] / SETTINGS["r"]
    q = scale * tensors[f"{LAYER}.self_attn.q_proj.lora_B"] @ tensors[f"{LAYER}.self_attn.q_proj.lora_A"]
    v = 12 / 3 * tensors[f"{LAYER}.self_attn.v_proj.lora_B"] @ tensors[f"{LAYER}.self_attn.v_proj.lora_A"]
    down = scale * tensors[f"{LAYER}.mlp.down_proj.lora_B"] @ tensors[f"{LAYER}.mlp.down_proj.lora_A"]
    assert found.keys() == {"blk.1.attn_qkv.weight", "blk.1.ffn_down.weight"}  # of 5 and of 2 components
    np.testing.assert_allclose(found["blk.1.attn_qkv.weight"], np.concatenate([q, np.zeros((32, 64)), v]), atol=1e-6)
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], down, atol=1e-6)
    import_peft(folder, tmp_path / "imported", str(base))  # the way over a folder of ours
    export_adapter(tmp_path / "imported", tmp_path / "again.gguf")
    again = changes(tmp_path / "again.gguf")
    for name, change in found.items():
        np.testing.assert_allclose(again[name], change, atol=1e-6)


def test_a_modelfile_beside_it_names_the_base_and_the_adapter(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    done = export_adapter(tmp_path / "adapter", tmp_path / "a b.gguf", modelfile=True)
    assert done.modelfile == tmp_path / "a b.Modelfile"
    assert 'FROM "./base.gguf"\nADAPTER "./a b.gguf"\n' in done.modelfile.read_text()
    with pytest.raises(OptionError, match="longrope='long' is for models with LongRoPE"):
        export_adapter(tmp_path / "adapter", tmp_path / "b.gguf", modelfile=True, longrope="long")
    assert not (tmp_path / "b.gguf").exists()


def test_a_name_with_blanks_and_a_folder_that_is_to_be_made(base, tmp_path):
    make_adapter(base, tmp_path / "my adapter")
    done = export_adapter(tmp_path / "my adapter", tmp_path / "new folder" / "my adapter.gguf")
    assert [path.name for path in done.path.parent.iterdir()] == ["my adapter.gguf"]
    assert changes(done.path)


def folder_of(base, tmp_path, **config):
    make_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return tmp_path / "adapter"


def test_dora_whole_weights_and_a_scale_of_nothing_are_refused_with_the_way_out(base, tmp_path):
    make_adapter(base, tmp_path / "dora", dora=True)
    with pytest.raises(AdapterError, match=r"it is a DoRA adapter.*without --adapter-only"):
        export_adapter(tmp_path / "dora", tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match=r"whole weights.*without --adapter-only"):
        export_adapter(folder_of(base, tmp_path, fine_tune_type="full"), tmp_path / "a.gguf")
    parameters = {"rank": 3, "scale": 0.0, "dropout": 0.0}
    with pytest.raises(AdapterError, match="scale is 0"):
        export_adapter(folder_of(base, tmp_path, lora_parameters=parameters), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save is \[.*\].*merge_and_unload"),
        ({"use_dora": True}, r"use_dora is true.*merge_and_unload"),
        ({"bias": "all"}, r"bias is .all.*merge_and_unload"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is .*merge_and_unload"),
    ],
)
def test_what_only_peft_has_is_refused_by_name_with_the_way_out(setting, match, base, tmp_path):
    tensors = {f"{LAYER}.mlp.down_proj.lora_A": draw(2, 96), f"{LAYER}.mlp.down_proj.lora_B": draw(64, 2)}
    if setting.get("use_dora"):
        tensors[f"{LAYER}.mlp.down_proj.lora_magnitude_vector"] = draw(64)
    with pytest.raises(AdapterError, match=match):
        export_adapter(write(tmp_path / "peft", tensors, **setting), tmp_path / "a.gguf", model=str(base))


def test_refusals_of_arguments(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    tensors = {f"{LAYER}.mlp.down_proj.lora_A": draw(2, 96), f"{LAYER}.mlp.down_proj.lora_B": draw(64, 2)}
    with pytest.raises(AdapterError, match="model=NAME"):
        export_adapter(write(tmp_path / "peft", tensors), tmp_path / "a.gguf")
    with pytest.raises(OptionError, match=r"type 'q4_k'.*f32, f16, bf16"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", type="q4_k")
    with pytest.raises(OptionError, match=r"does not end in \.gguf"):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        export_adapter(tmp_path, tmp_path / "a.gguf")
    other = make_directory(tmp_path / "other", seed=1, num_hidden_layers=2)
    with pytest.raises(AdapterError, match="was trained on"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=str(other))
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(OSError, match="directory"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"exists already.*force=True"):
        export_adapter(tmp_path / "adapter", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == b"mine"
    export_adapter(tmp_path / "adapter", tmp_path / "b.gguf", force=True)
    assert changes(tmp_path / "b.gguf")


def test_numbers_that_float16_does_not_hold_are_refused(base, tmp_path):
    make_adapter(base, tmp_path / "adapter", strength=1e6)
    with pytest.raises(CheckpointError, match=r"beyond what float16 holds.*'f32'"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", type="f16")
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", type="bf16")


def test_a_model_that_llama_cpp_does_not_have_is_refused(tmp_path):
    (tmp_path / "small").mkdir()
    small_models.write(tmp_path / "small")
    tensors = {
        "model.layers.0.self_attn.dense.lora_A": draw(2, 64),
        "model.layers.0.self_attn.dense.lora_B": draw(64, 2),
    }
    with pytest.raises(ConfigError, match=r"phi3small, .* llama\.cpp does not have"):
        export_adapter(write(tmp_path / "peft", tensors), tmp_path / "a.gguf", model=str(tmp_path / "small"))


def test_experts_have_their_projections_apart(tmp_path):
    weights = moe_models.hugging_face(moe_models.random_weights(moe_models.RAW))
    moe_models.write(tmp_path / "moe", moe_models.RAW, weights)
    width = moe_models.RAW["hidden_size"]
    tensors = {f"{LAYER}.self_attn.q_proj.lora_A": draw(2, width)}
    tensors[f"{LAYER}.self_attn.q_proj.lora_B"] = draw(width, 2, seed=1)
    export_adapter(write(tmp_path / "peft", tensors), tmp_path / "a.gguf", model=str(tmp_path / "moe"))
    found = changes(tmp_path / "a.gguf")
    a, b = tensors.values()
    np.testing.assert_allclose(found.pop("blk.1.attn_q.weight"), 3 * b @ a, atol=1e-6)
    assert not found
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["general.architecture"].contents() == "phimoe"


def test_the_command_writes_the_adapter_and_the_modelfile(base, tmp_path, capsys):
    make_adapter(base, tmp_path / "adapter")
    arguments = ["export", "--adapter", str(tmp_path / "adapter"), "--adapter-only"]
    output = ["-o", str(tmp_path / "a.gguf")]
    with pytest.raises(SystemExit) as done:
        main([*arguments, *output, "--type", "f16", "--modelfile"])
    assert done.value.code == 0
    assert "8 layers changed; a.Modelfile lies beside it" in capsys.readouterr().err
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {"F16"}
    for wrong, why in (
        ([*arguments[:1], *arguments[3:], *output], "needs --adapter DIR"),
        ([*arguments, *output, "--name", "x"], "--name is of whole models"),
        ([*arguments, *output, "--type", "q4_k_m", "--no-importance"], "--no-importance is of whole models"),
        ([*arguments, *output, "--modelfile"], "a.gguf exists already; name another file"),
        ([*arguments, "-o", str(tmp_path / 'b"c.gguf'), "--modelfile"], "cannot stand in a Modelfile"),
        ([*arguments, *output, "--type", "q8_0", "--force"], "type 'q8_0' is unknown"),
    ):
        with pytest.raises(SystemExit) as done:
            main(wrong)
        assert done.value.code in (1, 2)
        assert why in capsys.readouterr().err
    assert not [*tmp_path.glob("b*")]
