"""Phi-3.5-MoE as a GGUF file, ours and others', read back: the weights, the config, and so the logits."""

from pathlib import Path

import mlx.core as mx
import moe_models
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf_models import vocabulary  # noqa: E402
from gguf_samples import TYPES, metadata_of, write_gguf  # noqa: E402
from released import PHI_3_5_MOE  # noqa: E402

from phi3_mlx import convert, export_gguf, load  # noqa: E402
from phi3_mlx.conversion.gguf.source import GgufSource  # noqa: E402
from phi3_mlx.errors import CheckpointError, ConfigError  # noqa: E402
from phi3_mlx.models import build, parse_config  # noqa: E402

ROWS = 4032  # of the embedding; the bundled tokenizer has 4,011 tokens
CONFIGS = {name: {**raw, "vocab_size": ROWS} for name, raw in moe_models.CONFIGS.items()}
# llama.cpp's names, written down from its converter's.
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.switch_mlp.gate_proj": "ffn_gate_exps",
    "block_sparse_moe.switch_mlp.up_proj": "ffn_up_exps",
    "block_sparse_moe.switch_mlp.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def theirs(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if path in TOP:
        return f"{TOP[path]}.{leaf}"
    _, _, layer, inner = path.split(".", 3)
    return f"blk.{layer}.{IN_LAYER[inner]}.{leaf}"


def directory(folder: Path, raw: dict) -> Path:
    weights = moe_models.hugging_face(moe_models.random_weights(raw))
    return moe_models.write(folder / "moe", raw, weights, tokenizer=True)


def others(path: Path, raw: dict, types: dict | None = None, **changed) -> Path:
    """The same model as llama.cpp's converter writes it."""
    tensors = {theirs(name): np.array(array) for name, array in moe_models.random_weights(raw).items()}
    for kind in ("long", "short") if raw["rope_scaling"] else ():
        tensors[f"rope_factors_{kind}.weight"] = np.array(raw["rope_scaling"][f"{kind}_factor"], np.float32)
    known = {key.replace("phi3.", "phimoe."): value for key, value in metadata_of(raw, "phi3").items()}
    known |= {"phimoe.expert_count": 8, "phimoe.expert_used_count": 2, "general.name": "phi-3 of random experts"}
    known |= {f"phimoe.{key.replace('__', '.')}": value for key, value in changed.items()}
    return write_gguf(path, "phimoe", {**known, **vocabulary(ROWS)}, tensors, types)


def logits(model, length: int) -> np.ndarray:
    ids = np.random.default_rng(length).integers(3, 4000, (1, length))
    return np.array(model(mx.array(ids)).astype(mx.float32))


def loaded(path: Path, folder: Path):
    """The model that `convert` makes of a GGUF file, in float32."""
    convert(path, folder, dequantize=True, dtype="float32", report=False)
    return load(str(folder))[0]


def rounded(raw: dict, path: Path):
    """The model of `raw` with each matrix as the gguf library rounds it to the type that it has in the file."""
    kinds = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    model, weights = build(parse_config(raw)), moe_models.random_weights(raw)
    for name, array in weights.items():
        stored = kinds[theirs(name)]
        if stored.tensor_type == TYPES.Q6_K:  # which the library reads alone
            values = gguf.dequantize(stored.data, stored.tensor_type)
        else:
            values = gguf.dequantize(gguf.quantize(np.array(array), stored.tensor_type), stored.tensor_type)
        weights[name] = mx.array(values.reshape(array.shape).astype(np.float32))
    model.load_weights(list(weights.items()))
    return model


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_what_is_exported_comes_back_with_the_same_logits(tmp_path: Path, raw: dict, kind: str):
    made = export_gguf(directory(tmp_path, raw), tmp_path / "moe.gguf", type=kind)
    assert {kind.upper()} <= {*made.kinds} <= {kind.upper(), "F32", "Q6_K"}
    expected, model = rounded(raw, tmp_path / "moe.gguf"), loaded(tmp_path / "moe.gguf", tmp_path / "back")
    for length in (20, moe_models.ORIGINAL + 20):  # LongRoPE's two regimes
        wanted, got = logits(expected, length), logits(model, length)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_the_config_comes_back(tmp_path: Path, raw: dict):
    export_gguf(directory(tmp_path, raw), tmp_path / "moe.gguf", type="f16")
    back, original = GgufSource(tmp_path / "moe.gguf"), parse_config(raw)
    for name in ("num_local_experts", "router_jitter_noise", "layer_norm_eps", "sliding_window", "head_dim",
                 "max_position_embeddings", "original_max_position_embeddings", "rope_theta"):  # fmt: skip
        assert getattr(back.config, name) == getattr(original, name), name
    assert back.raw_config["torch_dtype"] == "float16"
    assert back.config.attention_bias
    assert back.config.lm_head_bias
    if original.longrope is not None:
        for name in ("short_factor", "long_factor", "short_mscale", "long_mscale"):
            assert getattr(back.config.longrope, name) == pytest.approx(getattr(original.longrope, name), rel=1e-7)


def test_a_file_of_llama_cpps_converter_is_read(tmp_path: Path):
    """It has the attention factor that follows from the lengths, which is not Phi-3.5-MoE's."""
    raw = CONFIGS["released"]
    path = others(tmp_path / "moe.gguf", raw)
    source = GgufSource(path)
    assert source.config.longrope.short_mscale == source.config.longrope.long_mscale == PHI_3_5_MOE["short_mscale"]
    assert source.config.router_jitter_noise == 0.01
    expected = moe_models.make_ours(raw)
    model = loaded(path, tmp_path / "back")
    for length in (20, moe_models.ORIGINAL + 20):
        wanted = logits(expected, length)
        np.testing.assert_allclose(logits(model, length), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_another_factor_of_such_a_file_is_that_of_both_regimes(tmp_path: Path):
    path = others(tmp_path / "moe.gguf", CONFIGS["released"], rope__scaling__attn_factor=1.3)
    rope = GgufSource(path).config.longrope
    assert rope.short_mscale == rope.long_mscale == 1.3


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4)])
def test_packed_experts_keep_their_bits(tmp_path: Path, kind: str, bits: int):
    names = [f"blk.{i}.ffn_{part}_exps.weight" for i in range(2) for part in ("gate", "up", "down")]
    path = others(tmp_path / "moe.gguf", CONFIGS["plain"], dict.fromkeys(names, TYPES[kind]))
    made = convert(path, tmp_path / "packed", dtype="float32", report=False)
    source, stored = GgufSource(path), mx.load(str(tmp_path / "packed" / "model.safetensors"))
    assert made.recipe["bits"] == bits
    packed = [name for name in source.tensors if ".switch_mlp." in name]
    assert len(packed) == 6
    assert {name.removesuffix("scales") for name in stored if name.endswith("scales")} == {
        name.removesuffix("weight") for name in packed
    }  # routers and whatever else is in floats stay in them
    for name in packed:
        stem = name.removesuffix("weight")
        values = mx.dequantize(stored[name], stored[f"{stem}scales"], stored[f"{stem}biases"], 32, bits)
        assert mx.array_equal(values, source.read(name)), name
        expected = gguf.dequantize(gguf.quantize(np.array(moe_models.random_weights(CONFIGS["plain"])[name]),
                                                 TYPES[kind]), TYPES[kind])  # fmt: skip
        assert np.array_equal(np.array(values), expected)


def test_experts_in_floats_stay_in_floats_beside_what_is_packed(tmp_path: Path):
    names = [f"blk.{i}.attn_{part}.weight" for i in range(2) for part in ("q", "k", "v", "output")]
    path = others(tmp_path / "moe.gguf", CONFIGS["plain"], dict.fromkeys(names, TYPES.Q8_0))
    convert(path, tmp_path / "packed", dtype="float32", report=False)
    stored = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    assert {name.split(".")[3] for name in stored if name.endswith("scales")} == {"self_attn"}


def test_the_report_of_an_export_reads_experts(tmp_path: Path):
    folder = directory(tmp_path, CONFIGS["gain by regime"])
    options = {"report": True, "text": "Once upon a time there was a duck. " * 4}
    assert export_gguf(folder, tmp_path / "f32.gguf", type="f32", **options).comparison.kl < 1e-9
    assert export_gguf(folder, tmp_path / "q4.gguf", type="q4_0", **options).comparison.kl > 1e-6


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"expert_count": None}, "has no phimoe.expert_count in its metadata"),
        ({"expert_count": 4}, "blk.0.ffn_gate_inp.weight: shape (8, 256), expected (4, 256)"),
        ({"expert_used_count": 1}, "num_experts_per_tok"),
        ({"expert_shared_count": 1}, "has phimoe.expert_shared_count 1, which is not supported for phimoe"),
        ({"rope__dimension_count": 64}, "partial_rotary_factor"),
    ],
)
def test_experts_that_are_not_read_are_refused(tmp_path: Path, changed: dict, said: str):
    path = others(tmp_path / "moe.gguf", CONFIGS["plain"], **changed)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        GgufSource(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
