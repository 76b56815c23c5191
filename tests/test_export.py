"""GGUF files that are exported: against the gguf library, read back bit for bit; and everything refused."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import moe_models
import numpy as np
import oracle
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from peaks import OWN_PEAK

gguf = pytest.importorskip("gguf")

from gguf_samples import TOY_TOKENS, TYPES, metadata_of, phi3_tensors, weights_of, write_gguf  # noqa: E402
from test_convert import write  # noqa: E402

from phi3_mlx import convert, export_gguf  # noqa: E402
from phi3_mlx.cli import main  # noqa: E402
from phi3_mlx.conversion import export  # noqa: E402
from phi3_mlx.conversion.directory import DirectorySource  # noqa: E402
from phi3_mlx.conversion.exact import ExactSource  # noqa: E402
from phi3_mlx.conversion.gguf.metadata import model_metadata  # noqa: E402
from phi3_mlx.conversion.gguf.source import GgufSource  # noqa: E402
from phi3_mlx.conversion.opening import about_gguf  # noqa: E402
from phi3_mlx.errors import CheckpointError, ConfigError, OptionError, Phi3Error, PromptError  # noqa: E402
from phi3_mlx.models import parse_config  # noqa: E402

TINY = ROOT / "weights" / "tiny"
# The bundled tokenizer has 4,011 tokens.
RAW = {**oracle.slim(oracle.CONFIGS["long-and-window"]), "vocab_size": 4032, "num_hidden_layers": 2}
TIED = {**RAW, "tie_word_embeddings": True, "rope_scaling": None, "sliding_window": 7}
TIED["original_max_position_embeddings"] = TIED["max_position_embeddings"]
CONFIGS = {"longrope": RAW, "tied, windowed": TIED}
FACTORS = ("short_factor", "long_factor")
BLOCKS = {"q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_1": "Q4_1", "q4_0": "Q4_0"}


def model(folder: Path, raw=RAW, dtype=mx.float32) -> Path:
    raw = {**raw, "torch_dtype": str(dtype).removeprefix("mlx.core.")}
    return write(folder / "model", raw, dtype=dtype, tokenizer=True)


def values(source, name: str) -> np.ndarray:
    return np.array(source.read(name).astype(mx.float32))


def same_values(a, b) -> bool:
    return [*a.tensors] == [*b.tensors] and all(np.array_equal(values(a, name), values(b, name)) for name in a.tensors)


def in_float32(config):
    """The config with LongRoPE's factors as GGUF has them."""
    rope = config.longrope
    lists = {} if rope is None else {key: tuple(map(np.float32, getattr(rope, key))) for key in FACTORS}
    return replace(config, longrope=rope and replace(rope, **lists, short_mscale=0, long_mscale=0))


def stored(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def refusal(error: type[Phi3Error], *given, **options) -> str:
    with pytest.raises(error) as caught:
        export_gguf(*given, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------- floats, bit for bit


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_model_comes_back_as_it_was(tmp_path: Path, raw, dtype):
    directory = model(tmp_path, raw, dtype)
    made = export_gguf(directory, tmp_path / "model.gguf")
    back, original = GgufSource(tmp_path / "model.gguf"), DirectorySource(directory)
    assert same_values(back, original)
    assert in_float32(back.config) == in_float32(original.config)
    assert {*made.kinds} == {{mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}[dtype]}
    assert made.files == (tmp_path / "model.gguf",)
    assert made.bytes == (tmp_path / "model.gguf").stat().st_size


def test_the_library_reads_names_shapes_and_values(tmp_path: Path):
    directory = model(tmp_path)
    export_gguf(directory, tmp_path / "model.gguf", type="f32")
    weights = {name: np.array(array) for name, array in mx.load(str(directory / "model.safetensors")).items()}
    expected = phi3_tensors(RAW, weights)
    found = stored(tmp_path / "model.gguf")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert tuple(found[name].shape[::-1]) == array.shape
        assert np.array_equal(found[name].data.reshape(array.shape), array)
        assert found[name].data_offset % 32 == 0


def test_norms_stay_in_float32_whatever_the_type(tmp_path: Path):
    export_gguf(model(tmp_path), tmp_path / "model.gguf", type="q4_0")
    for name, tensor in stored(tmp_path / "model.gguf").items():
        flat = "norm" in name or "factors" in name
        head = TYPES.Q8_0 if name == "output.weight" else TYPES.Q4_0  # Q6_K's blocks do not divide its rows
        assert tensor.tensor_type == (TYPES.F32 if flat else head), name


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_librarys(tmp_path: Path, kind: str):
    directory = model(tmp_path)
    export_gguf(directory, tmp_path / "model.gguf", type=kind)
    weights = mx.load(str(directory / "model.safetensors"))
    found = stored(tmp_path / "model.gguf")
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.1.mlp.gate_up_proj", "blk.1.ffn_up")):
        rounded = gguf.quantize(np.array(weights[f"{ours}.weight"]), TYPES[BLOCKS[kind]])
        assert np.array_equal(found[f"{theirs}.weight"].data, rounded)


def test_a_tensor_larger_than_a_piece_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from phi3_mlx.conversion.gguf import rounding

    directory = model(tmp_path)
    export_gguf(directory, tmp_path / "one.gguf", type="q8_0")
    monkeypatch.setattr(rounding, "_VALUES_A_CHUNK", 1000)
    export_gguf(directory, tmp_path / "many.gguf", type="q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_rows_that_blocks_do_not_divide_are_written_in_float16_and_said(tmp_path: Path):
    odd = {**RAW, "intermediate_size": 48}
    made = export_gguf(model(tmp_path, odd), tmp_path / "model.gguf", type="q4_0")
    down = {f"blk.{i}.ffn_down.weight": "Q4_0" for i in range(2)}
    assert made.fallen_back == down | {"output.weight": "Q6_K"}
    assert "2 of ffn_down: F16 in place of Q4_0, whose blocks do not divide its rows" in made.notes
    assert "output: Q4_0 in place of Q6_K, whose blocks do not divide its rows" not in made.notes
    assert stored(tmp_path / "model.gguf")["blk.0.ffn_down.weight"].tensor_type == TYPES.F16


def test_what_a_type_cannot_hold_is_refused_with_a_type_that_can(tmp_path: Path):
    def large(weights):
        weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6

    directory = write(tmp_path / "large", RAW, large, tokenizer=True)
    message = refusal(CheckpointError, directory, tmp_path / "model.gguf", type="f16")
    assert "model.layers.0.mlp.down_proj.weight has values beyond what float16 holds (1e+06)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    export_gguf(directory, tmp_path / "model.gguf", type="bf16")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    def broken(weights):
        weights["model.layers.0.mlp.down_proj.weight"][3, 3] = mx.nan

    directory = write(tmp_path / "broken", RAW, broken, tokenizer=True)
    assert "is not finite" in refusal(CheckpointError, directory, tmp_path / "model.gguf", type="q8_0")


# --------------------------------------------------------------------------------- packed, without a second rounding


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("kind", [None, "q4_1", "q5_1"])
def test_packed_weights_keep_their_values_in_a_type_with_an_offset(tmp_path: Path, bits, group_size, kind):
    raw = {**TIED, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}
    convert(model(tmp_path, raw), tmp_path / "packed", bits=bits, group_size=group_size, dtype="float16", report=False)
    made = export_gguf(tmp_path / "packed", tmp_path / "model.gguf", type=kind)
    assert same_values(GgufSource(tmp_path / "model.gguf"), ExactSource(DirectorySource(tmp_path / "packed")))
    assert {*made.kinds} == {"Q5_1" if kind == "q5_1" else "Q4_1"}
    assert len(made.kept) == sum(made.kinds.values())
    assert made.rounded_again == ()


def test_five_bits_go_into_q5_1_and_eight_are_rounded_again_and_said(tmp_path: Path):
    convert(model(tmp_path), tmp_path / "five", bits=5, group_size=32, dtype="float16", report=False)
    assert {*export_gguf(tmp_path / "five", tmp_path / "five.gguf").kinds} == {"Q5_1"}
    assert same_values(GgufSource(tmp_path / "five.gguf"), ExactSource(DirectorySource(tmp_path / "five")))
    convert(model(tmp_path / "again"), tmp_path / "eight", bits=8, group_size=32, report=False)
    made = export_gguf(tmp_path / "eight", tmp_path / "eight.gguf")
    assert {*made.kinds} == {"Q8_0"}
    assert len(made.rounded_again) == sum(made.kinds.values())
    assert any("rounded a second time (token_embd.weight, ...)" in note for note in made.notes)


def test_other_modes_of_packing_are_rounded_again_and_said(tmp_path: Path):
    convert(model(tmp_path), tmp_path / "packed", mode="mxfp4", report=False)
    made = export_gguf(tmp_path / "packed", tmp_path / "model.gguf", report=False)
    assert {*made.kinds} == {"Q8_0"}
    assert len(made.rounded_again) == sum(made.kinds.values())
    back, original = GgufSource(tmp_path / "model.gguf"), ExactSource(DirectorySource(tmp_path / "packed"))
    for name in original.tensors:
        off, whole = values(back, name) - values(original, name), values(original, name)
        assert np.linalg.norm(off) <= 0.01 * np.linalg.norm(whole), name


def test_scales_that_are_no_float16_numbers_are_counted(tmp_path: Path):
    convert(model(tmp_path), tmp_path / "packed", bits=4, group_size=32, dtype="float32", report=False)
    made = export_gguf(tmp_path / "packed", tmp_path / "model.gguf")
    assert {*made.kinds} == {"Q4_1"}
    assert any("of their scales were rounded to float16" in note for note in made.notes)
    original = ExactSource(DirectorySource(tmp_path / "packed"))
    back = GgufSource(tmp_path / "model.gguf")
    for name in original.tensors:
        assert np.allclose(values(back, name), values(original, name), rtol=0, atol=4e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("way", ["converted", "at once"])
def test_blocks_out_of_a_gguf_file_go_back_with_the_same_bits(tmp_path: Path, kind: str, way: str):
    raw = {**oracle.slim(oracle.CONFIGS["phi-4"]), "hidden_size": 256, "intermediate_size": 256}
    tensors = phi3_tensors(raw, weights_of(raw))
    kinds = {name: TYPES[kind] for name, array in tensors.items() if array.ndim == 2}
    given = write_gguf(tmp_path / "given.gguf", "phi3", {**metadata_of(raw, "phi3"), **TOY_TOKENS}, tensors, kinds)
    source = given
    if way == "converted":
        convert(given, source := tmp_path / "directory", report=False)
    made = export_gguf(source, tmp_path / "model.gguf")
    before, after = stored(given), stored(tmp_path / "model.gguf")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].data, after[name].data) for name in kinds)
    assert {*made.kinds} == {kind}


def test_an_adapter_is_merged_on_the_way(tmp_path: Path):
    import phi3_mlx

    lines = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho " * 8}]}] * 8
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    phi3_mlx.tune("tiny", tmp_path / "data.jsonl", tmp_path / "adapter", steps=2)
    phi3_mlx.fuse(tmp_path / "adapter", tmp_path / "fused", dequantize=True, dtype="float32")
    made = export_gguf(None, tmp_path / "model.gguf", adapter=tmp_path / "adapter", type="f32")
    assert same_values(GgufSource(tmp_path / "model.gguf"), DirectorySource(tmp_path / "fused"))
    assert made.files[0].name == "model.gguf"
    made = export_gguf("tiny", tmp_path / "packed.gguf", adapter=tmp_path / "adapter")
    assert {*made.rounded_again}.isdisjoint(made.kept)
    assert "token_embd.weight" in made.kept
    assert made.rounded_again


# --------------------------------------------------------------------------------------------- K types

WIDE = {**TIED, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 704}
WIDE = {**WIDE, "tie_word_embeddings": False}


def test_a_mix_is_written_with_what_takes_the_place_of_types_that_do_not_fit(tmp_path: Path):
    made = export_gguf(model(tmp_path, WIDE), tmp_path / "model.gguf", type="q4_k_m", importance=False)
    found = {name: tensor.tensor_type.name for name, tensor in stored(tmp_path / "model.gguf").items()}
    assert found["blk.0.attn_qkv.weight"] == "Q5_K"
    assert found["blk.0.ffn_up.weight"] == found["token_embd.weight"] == "Q4_K"
    assert found["output.weight"] == "Q6_K"
    assert {found[f"blk.{i}.ffn_down.weight"] for i in range(2)} == {"Q5_0", "Q8_0"}
    assert {*made.fallen_back} == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.file_type"].contents() == 15
    back, original = GgufSource(tmp_path / "model.gguf"), DirectorySource(tmp_path / "model")
    for name in original.tensors:
        off, whole = values(back, name) - values(original, name), values(original, name)
        assert np.linalg.norm(off) <= 0.08 * np.linalg.norm(whole), name


@pytest.mark.long
def test_importance_from_the_calibration_text_makes_the_outputs_nearer(tmp_path: Path):
    """Of inputs that differ much, errors of those that count are smaller."""

    def spread(weights):
        scale = mx.array(np.exp(2 * np.random.default_rng(0).standard_normal(256)).astype(np.float32))
        for i in range(2):
            weights[f"model.layers.{i}.post_attention_layernorm.weight"] *= scale

    directory = write(tmp_path / "spread", {**WIDE, "torch_dtype": "float32"}, spread, tokenizer=True)
    with_it = export_gguf(directory, tmp_path / "with.gguf", type="q4_k_s", report=True)
    without = export_gguf(directory, tmp_path / "without.gguf", type="q4_k_s", report=True, importance=False)
    other = export_gguf(directory, tmp_path / "other.gguf", type="q4_k_s", calibration="A fox. " * 99, report=False)
    assert with_it.comparison.kl < 0.8 * without.comparison.kl
    assert other.comparison is None
    assert (tmp_path / "other.gguf").read_bytes() != (tmp_path / "with.gguf").read_bytes()


@pytest.mark.long
def test_the_report_is_the_difference_from_the_model(tmp_path: Path):
    directory = model(tmp_path, WIDE)
    assert export_gguf(directory, tmp_path / "f32.gguf", type="f32", report=True).comparison.kl < 1e-9
    rounded = export_gguf(directory, tmp_path / "q8.gguf", type="q8_0", report=True).comparison
    worse = export_gguf(directory, tmp_path / "q4.gguf", type="q4_0", report=True, text="Once upon a time. " * 9)
    assert 1e-9 < rounded.kl < worse.comparison.kl
    assert export_gguf(directory, tmp_path / "quiet.gguf", type="q8_0").comparison is None


def test_what_rounding_cost_is_in_the_file(tmp_path: Path):
    text = {"text": "Once upon a time. " * 9}
    made = export_gguf(model(tmp_path, WIDE), tmp_path / "q4.gguf", type="q4_0", split_max_size="1MB", **text)
    assert len(made.files) > 1
    fields = gguf.GGUFReader(made.files[0]).fields
    said = {name: fields[f"phi3_mlx.{name}"].contents() for name in ("kl", "top1", "measured_on")}
    assert said["kl"] == pytest.approx(made.comparison.kl, rel=1e-6)
    assert said["top1"] == pytest.approx(made.comparison.top1, rel=1e-6)
    assert said["measured_on"] == "a text of its maker's"
    plain = export_gguf(tmp_path / "model", tmp_path / "plain.gguf", type="q4_0")
    assert not any(name.startswith("phi3_mlx.kl") for name in gguf.GGUFReader(plain.files[0]).fields)
    back = GgufSource(made.files[0])
    assert same_values(back, GgufSource(plain.files[0]))  # and nothing else of the file has changed


def test_a_comparison_that_was_stopped_leaves_a_file_that_says_no_figures(tmp_path: Path):
    def stop(progress):
        if progress.stage == "comparing":
            raise KeyboardInterrupt

    directory = model(tmp_path, WIDE)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(directory, tmp_path / "q4.gguf", type="q4_0", report=True, progress=stop)
    about = about_gguf(tmp_path / "q4.gguf")
    assert (about.type, about.measured) == ("Q4_0", None)


def test_a_second_rounding_is_measured_without_asking(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert(model(tmp_path, WIDE), tmp_path / "packed", bits=8, report=False)
    assert export_gguf(tmp_path / "packed", tmp_path / "again.gguf").comparison.kl > 0
    assert export_gguf(tmp_path / "packed", tmp_path / "no.gguf", report=False).comparison is None
    with pytest.raises(SystemExit):
        main(["export", "-m", str(tmp_path / "packed"), "-o", str(tmp_path / "said.gguf")])
    assert "beside the model: KL" in capsys.readouterr().err


def out_of_memory(*given, **options):
    raise RuntimeError("[malloc] Unable to allocate\n4 bytes.")


def not_finite(*given, **options):
    raise CheckpointError("the outputs are not finite")


def test_a_comparison_that_nobody_asked_for_and_that_fails_is_a_note(tmp_path: Path, capsys, monkeypatch):
    convert(model(tmp_path, WIDE), tmp_path / "packed", bits=8, report=False)
    monkeypatch.setattr(export, "compare_sources", out_of_memory)
    output = tmp_path / "again.gguf"
    with pytest.raises(SystemExit) as done:
        main(["export", "-m", str(tmp_path / "packed"), "-o", str(output), "--modelfile"])
    assert done.value.code == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "complete" in line]
    why = f"{output} is complete, but it could not be compared with the model: [malloc] Unable to allocate 4 bytes."
    assert len(said) == 1
    assert said[0].endswith(why)
    assert output.with_suffix(".Modelfile").exists()
    assert about_gguf(output).measured is None


@pytest.mark.parametrize("fails", [out_of_memory, not_finite])
def test_a_comparison_that_was_asked_for_and_fails_says_that_the_file_is_there(tmp_path: Path, fails, monkeypatch):
    directory, output = model(tmp_path), tmp_path / "model.gguf"
    monkeypatch.setattr(export, "compare_sources", fails)
    message = refusal(CheckpointError, directory, output, type="q8_0", report=True)
    assert message.startswith(f"{output} is complete, but it could not be compared with the model: ")
    assert [*GgufSource(output).tensors] == [*DirectorySource(directory).tensors]


def test_an_empty_calibration_text_is_refused_and_nothing_is_written(tmp_path: Path):
    directory = model(tmp_path, WIDE)
    message = refusal(PromptError, directory, tmp_path / "model.gguf", type="q4_k_m", calibration="")
    assert "is empty; give another, or importance=False" in message
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": "A text."}, "calibration has no effect without a K type"),
        ({"calibration": "A text.", "type": "q4_k_m", "importance": False}, "calibration has no effect"),
        ({"importance": False}, "importance=False has no effect without a K type"),
        ({"importance": False, "type": "q8_0"}, "importance=False has no effect without a K type"),
        ({"text": "A text.", "report": False}, "text has no effect"),
        ({"text": " \n"}, "text is empty; give some"),
        (
            {"modelfile": True, "split_max_size": "1GB"},
            "for ollama, which takes no parts; leave out split_max_size=1GB",
        ),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options, said):
    assert said in refusal(OptionError, "tiny", tmp_path / "model.gguf", **options)


# ------------------------------------------------------------------------------------------------ memory

LARGE = {**RAW, "vocab_size": 32064, "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32,
         "intermediate_size": 8192, "num_hidden_layers": 1, "rope_scaling": None}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "q4_k_m"])
def test_a_file_of_phi_3_minis_shapes_takes_the_memory_of_its_largest_tensor(tmp_path: Path, kind: str):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    code = f"""
{OWN_PEAK}
import json
import phi3_mlx
from phi3_mlx.conversion.gguf.sink import GgufSink
from phi3_mlx.conversion.gguf.model import GgufModel
from phi3_mlx.conversion.sources import tensor_of
from phi3_mlx.models import parse_config, shapes
from pathlib import Path
import gguf, mlx.core as mx
class Random:
    name, quantization, blocks = "random", None, {{}}
    config = parse_config(json.load(open("config.json")))
    tensors = {{name: tensor_of("BF16", shape) for name, shape in shapes(config).items()}}
    def float_type(self, name):
        return "BF16"
    def read(self, name):
        array = mx.random.normal(self.tensors[name].shape, dtype=mx.bfloat16)
        mx.eval(array)
        return array
made = GgufModel(gguf, Random(), {kind!r})
GgufSink(gguf, Path("model.gguf")).write("phi3", {{}}, made.entries, made.encoder({{}}))
print(own_peak())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1.2 * 4 * 32064 * 3072 + 300e6, f"{int(done.stdout) / 1e6:.0f} MB"


# --------------------------------------------------------------------------------------------- metadata


def test_metadata_says_what_llama_cpp_asks_for(tmp_path: Path):
    export_gguf(model(tmp_path), tmp_path / "model.gguf")
    found = GgufSource(tmp_path / "model.gguf")._file.metadata
    expected = metadata_of(RAW, "phi3")
    for key in expected.keys() - {"general.name"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key
    assert found["general.architecture"] == "phi3"
    assert found["general.file_type"] == 0
    assert found["phi3_mlx.source"] == "model"
    assert not any(str(tmp_path) in str(value) for value in found.values())


def test_metadata_of_each_regime_of_partial_rotation_and_of_experts():
    experts = parse_config(moe_models.CONFIGS["gain by regime"])
    assert model_metadata(experts, "short")["phimoe.rope.scaling.attn_factor"] == 1.1
    assert model_metadata(experts, "long")["phimoe.rope.scaling.attn_factor"] == 1.3
    for name in ("layer_norm_epsilon", "layer_norm_rms_epsilon"):
        assert model_metadata(experts, "short")[f"phimoe.attention.{name}"] == 1e-5
    partial = parse_config(oracle.CONFIGS["phi-4-mini"])
    values = model_metadata(partial, "short")
    assert values["phi3.rope.dimension_count"] == partial.rotary_dim < partial.head_dim
    assert "phi3.attention.key_length" not in values
    wide = replace(partial, head_dim=2 * partial.head_dim)
    values = model_metadata(wide, "short")
    assert values["phi3.attention.key_length"] == values["phi3.attention.value_length"] == wide.head_dim


def test_a_model_without_a_window_says_zero(tmp_path: Path):
    export_gguf(model(tmp_path, {**RAW, "sliding_window": None}), tmp_path / "model.gguf")
    assert GgufSource(tmp_path / "model.gguf")._file.metadata["phi3.attention.sliding_window"] == 0


def test_notes_say_where_llama_cpp_computes_otherwise(tmp_path: Path):
    made = export_gguf(model(tmp_path), tmp_path / "model.gguf")
    original = RAW["original_max_position_embeddings"]
    assert any(f"start it with a context up to {original:,} (-c {original})" in note for note in made.notes)
    made = export_gguf(model(tmp_path / "two", TIED), tmp_path / "tied.gguf")
    assert any("its answers differ after 7 tokens" in note for note in made.notes)


def test_experts_are_stacked_as_llama_cpp_wants_them(tmp_path: Path):
    raw = {**moe_models.RAW, "vocab_size": 4032}
    weights = moe_models.random_weights(raw)
    directory = moe_models.write(tmp_path / "moe", raw, moe_models.hugging_face(weights), tokenizer=True)
    made = export_gguf(directory, tmp_path / "moe.gguf", type="f32")
    found = stored(tmp_path / "moe.gguf")
    for ours, theirs in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
        array = np.array(weights[f"model.layers.1.block_sparse_moe.switch_mlp.{ours}.weight"])
        assert np.array_equal(found[f"blk.1.ffn_{theirs}_exps.weight"].data, array)
    assert np.array_equal(found["output.bias"].data, np.array(weights["lm_head.bias"]))
    assert np.array_equal(found["blk.0.attn_norm.bias"].data, np.array(weights["model.layers.0.input_layernorm.bias"]))
    fields = gguf.GGUFReader(tmp_path / "moe.gguf").fields
    assert fields["phimoe.expert_count"].contents() == 8
    assert fields["phimoe.expert_used_count"].contents() == 2
    assert any("weights of experts" in note for note in made.notes)


def test_biases_that_a_mixture_leaves_out_are_zeros(tmp_path: Path):
    raw = {**moe_models.CONFIGS["plain"], "vocab_size": 4032, "tie_word_embeddings": True}
    weights = dict(tree_flatten(moe_models.make_ours(raw).parameters()))
    directory = moe_models.write(tmp_path / "moe", raw, weights, tokenizer=True)
    export_gguf(directory, tmp_path / "moe.gguf", type="f16")
    found = stored(tmp_path / "moe.gguf")
    assert not found["blk.1.attn_k.bias"].data.any()
    assert len(found["output.bias"].data) == 4032
    assert np.array_equal(found["output.weight"].data, found["token_embd.weight"].data)
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type == TYPES.F32


def test_phi_3_small_is_refused_with_the_reason(tmp_path: Path):
    import small_models

    directory = small_models.write(tmp_path / "small")
    message = refusal(ConfigError, directory, tmp_path / "model.gguf")
    assert "phi3small" in message
    assert "llama.cpp does not have" in message


# ------------------------------------------------------------------------------------------ files and refusals


def test_parts_hold_the_tensors_once_and_are_of_the_size_that_was_asked_for(tmp_path: Path):
    directory = model(tmp_path)
    export_gguf(directory, tmp_path / "whole.gguf", type="f32")
    made = export_gguf(directory, tmp_path / "parts.gguf", type="f32", split_max_size="300kB")
    assert [file.name for file in made.files] == sorted(path.name for path in tmp_path.glob("parts-*"))
    whole = stored(tmp_path / "whole.gguf")
    seen = [tensor for file in made.files for tensor in gguf.GGUFReader(file).tensors]
    assert [tensor.name for tensor in seen] == [*whole]
    assert all(np.array_equal(tensor.data, whole[tensor.name].data) for tensor in seen)
    for file in made.files:
        tensors = gguf.GGUFReader(file).tensors
        assert len(tensors) == 1 or sum(tensor.n_bytes for tensor in tensors) <= 300_000
    assert gguf.GGUFReader(made.files[1]).fields["split.no"].contents() == 1


PARTS = {"split_max_size": "300kB", "type": "f32"}


def test_parts_come_back_as_one_model(tmp_path: Path):
    directory = model(tmp_path)
    made = export_gguf(directory, tmp_path / "parts.gguf", **PARTS, report=True)
    assert len(made.files) > 2
    assert made.comparison.kl < 1e-9
    assert same_values(GgufSource(made.files[0]), DirectorySource(directory))
    export_gguf(made.files[0], tmp_path / "whole.gguf")
    convert(made.files[0], tmp_path / "back", dequantize=True, dtype="float32", report=False)
    assert same_values(GgufSource(tmp_path / "whole.gguf"), DirectorySource(tmp_path / "back"))


def test_parts_that_are_not_the_first_or_not_all_there_are_refused_by_name(tmp_path: Path):
    made = export_gguf(model(tmp_path), tmp_path / "parts.gguf", **PARTS)
    first, second, *_, last = made.files
    with pytest.raises(CheckpointError, match=rf"{second.name} is one of {len(made.files)} parts; name the first"):
        GgufSource(second)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed.gguf is one of .* parts; name the first, whose name ends in"):
        GgufSource(tmp_path / "renamed.gguf")
    (tmp_path / "renamed.gguf").rename(first)
    contents = {part: part.read_bytes() for part in (second, last)}
    last.write_bytes(contents[second])
    with pytest.raises(CheckpointError, match=rf"{last.name} is no part of it; download them again"):
        GgufSource(first)
    last.write_bytes(contents[last])
    second.write_bytes(contents[second].replace(b"blk.0.", b"blk.1."))
    with pytest.raises(CheckpointError, match=r"has blk\.1\..* in two of its parts"):
        GgufSource(first)
    second.write_bytes(contents[second])
    head = first.read_bytes()
    place = head.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    first.write_bytes(head[:place] + (99).to_bytes(4, "little") + head[place + 4 :])
    with pytest.raises(CheckpointError, match=r"should have 99 tensors in its parts, which have \d+"):
        GgufSource(first)
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"{last.name} cannot be read: No such file"):
        GgufSource(first)


def test_a_file_that_exists_is_replaced_only_with_force(tmp_path: Path):
    directory, output = model(tmp_path), tmp_path / "model.gguf"
    output.write_bytes(b"mine")
    assert "exists already; name another file" in refusal(CheckpointError, directory, output)
    assert output.read_bytes() == b"mine"
    export_gguf(directory, output, force=True)
    assert output.read_bytes()[:4] == b"GGUF"


def test_what_is_left_of_an_export_before_goes_with_force(tmp_path: Path):
    """A whole file and its parts, or parts of two numbers, would be two models under one name."""
    directory, output = model(tmp_path), tmp_path / "a.gguf"
    for name in ("a-b-00001-of-00002.gguf", "a-00001-of-0002.gguf", "a-00001-of-00002.bin"):
        (tmp_path / name).write_bytes(b"another's")
    others = {*tmp_path.iterdir()}
    for sizes in ("300kB", None, "1MB", "300kB", None):
        made = export_gguf(directory, output, type="f32", split_max_size=sizes, force=True)
        assert {*tmp_path.iterdir()} - others == {*made.files}
        assert same_values(GgufSource(made.files[0]), DirectorySource(directory))
        assert "exists already; name another file" in refusal(CheckpointError, directory, output)
        assert "exists already; name another file" in refusal(CheckpointError, directory, output, **PARTS)
    assert (tmp_path / "a-b-00001-of-00002.gguf").read_bytes() == b"another's"


def test_a_file_is_not_exported_onto_itself(tmp_path: Path):
    made = export_gguf(model(tmp_path), tmp_path / "model.gguf", type="f32")
    before = made.files[0].read_bytes()
    said = refusal(OptionError, made.files[0], tmp_path / "model.gguf", type="q8_0", force=True)
    assert "is the model itself; name another file" in said
    assert made.files[0].read_bytes() == before


def test_parts_and_a_modelfile_that_exist_are_replaced_only_with_force(tmp_path: Path):
    directory = model(tmp_path)
    options = {"split_max_size": "300kB", "type": "f32"}
    first = export_gguf(directory, tmp_path / "parts [1].gguf", **options).files[0]
    assert f"{first} exists already" in refusal(CheckpointError, directory, tmp_path / "parts [1].gguf", **options)
    export_gguf(directory, tmp_path / "parts [1].gguf", **options, force=True)
    (tmp_path / "model.Modelfile").write_text("mine")
    said = refusal(CheckpointError, directory, tmp_path / "model.gguf", modelfile=True)
    assert "model.Modelfile exists already; name another file" in said
    assert (tmp_path / "model.Modelfile").read_text() == "mine"
    assert not (tmp_path / "model.gguf").exists()


def test_what_cannot_stand_in_a_modelfile_is_refused_before_anything_is_written(tmp_path: Path):
    directory = model(tmp_path)
    assert "cannot stand in a Modelfile" in refusal(OptionError, directory, tmp_path / 'a"b.gguf', modelfile=True)
    assert not [*tmp_path.glob("*.gguf")]


def test_places_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path: Path):
    directory = model(tmp_path)
    assert "does not end in .gguf" in refusal(OptionError, directory, tmp_path / "model.bin")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(OSError, match="a named pipe is there"):
        export_gguf(directory, tmp_path / "pipe.gguf", force=True)
    export_gguf(directory, tmp_path / "new" / "folder" / "model.gguf")
    assert (tmp_path / "new" / "folder" / "model.gguf").is_file()


def test_a_disk_that_is_too_small_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from phi3_mlx.conversion.gguf import sink

    usage = sink.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sink.shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    message = refusal(CheckpointError, model(tmp_path), tmp_path / "model.gguf")
    assert "on a disk with 1.0 MB free" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path):
    def stop(now):
        if now.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(model(tmp_path), tmp_path / "model.gguf", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_export_leaves_no_file_of_that_name_and_the_next_one_sweeps(tmp_path: Path):
    directory = model(tmp_path)
    code = f"""
import time
from phi3_mlx import export_gguf
def wait(now):
    if now.done == 3:
        print("there", flush=True)
        time.sleep(60)
export_gguf({str(directory)!r}, {str(tmp_path / "model.gguf")!r}, progress=wait)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "model.gguf").exists()
    export_gguf(directory, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


STOPPED = """
import sys
from phi3_mlx.cli import main
from phi3_mlx.conversion.gguf import sink
write = sink.GgufSink._write_tensors
def waiting(self, writer, entries, encoder, progress):
    def wait(now):
        progress(now)
        if now.done == 3:
            print("there", flush=True)
            time.sleep(60)
    write(self, writer, entries, encoder, wait)
sink.GgufSink._write_tensors = waiting
main(sys.argv[1:])
"""


@pytest.mark.parametrize("sizes", [[], ["--split-max-size", "300kB"]], ids=["whole", "parts"])
@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, None), (signal.SIGKILL, None)])
def test_an_export_that_is_stopped_while_it_replaces_keeps_what_was_there(tmp_path: Path, ending, code, sizes):
    directory, output = model(tmp_path), tmp_path / "model.gguf"
    before = export_gguf(directory, output, type="q8_0", split_max_size=sizes[1] if sizes else None)
    kept = {file: file.read_bytes() for file in before.files}
    arguments = ["export", "-m", str(directory), "-o", str(output), "--type", "f16", "--force", *sizes]
    command = [sys.executable, "-c", f"import time\n{STOPPED}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(ending)
        _, said = process.communicate()
    assert code is None or process.returncode == code, said
    assert b"Traceback" not in said
    assert {file: file.read_bytes() for file in kept} == kept
    if ending == signal.SIGINT:
        assert {*tmp_path.iterdir()} == {directory, *kept}
    made = export_gguf(directory, output, type="f16", force=True)
    assert {*tmp_path.iterdir()} == {directory, *made.files}  # and what a killed one has left is swept


def test_the_command_says_what_it_made_and_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(["export", "-m", str(model(tmp_path)), "-o", str(tmp_path / "model.gguf"), "--type", "q8_0"])
    said = capsys.readouterr()
    assert done.value.code == 0
    assert "matrices: 10 Q8_0" in said.err + said.out
    assert "general.name is 'Phi-3 model'" in said.err


def test_what_the_command_says_to_type_next_is_quoted_for_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "it's.gguf"
    with pytest.raises(SystemExit) as done:
        main(["export", "-m", str(model(tmp_path)), "-o", str(output), "--modelfile"])
    assert done.value.code == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(line) == ["ollama", "create", "NAME", "-f", str(tmp_path / "it's.Modelfile")]
    first = (tmp_path / "it's.Modelfile").read_text().splitlines()[0]
    assert shlex.split(first.removeprefix("# ")) == ["ollama", "create", "it-s", "-f", "it's.Modelfile"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "model.gguf"], "give a model, or an adapter"),
        (["-m", "tiny", "-o", "model.gguf", "--type", "q9"], "'q9' is not one of"),
        (["-m", "tiny", "-o", "model.txt"], "does not end in .gguf"),
        (["-m", "tiny", "-o", "model.gguf", "--split-max-size", "much"], "is not a size"),
        (["-m", "tiny", "-o", "model.gguf", "--revision", "x"], "revision"),
    ],
)
def test_wrong_usage_is_a_line(tmp_path: Path, arguments, said, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["export", *arguments])
    assert done.value.code in (1, 2)
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install "phi3-mlx[gguf]"' in refusal(CheckpointError, "tiny", tmp_path / "model.gguf")


def test_what_does_not_fit_in_memory_is_refused_before_anything_is_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from phi3_mlx.engine import machine
    from phi3_mlx.errors import MemoryLimitError

    directory = model(tmp_path)
    monkeypatch.setattr(machine, "room", lambda: 10**6)
    monkeypatch.setattr(ExactSource, "read", lambda *_: pytest.fail("it reads"))
    for options, way_out in (
        ({}, "close other programs"),
        ({"type": "q6_k"}, "take importance=False"),
        ({"report": True}, "take report=False"),
        ({"type": "q6_k", "report": True}, "take importance=False and report=False"),
    ):
        said = refusal(MemoryLimitError, directory, tmp_path / "model.gguf", **options)
        assert "exporting" in said
        assert way_out in said
