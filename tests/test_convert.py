"""Conversion: the same tensors as mlx-lm's, in one tensor's memory, whole or not at all; and what bad input gets."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from tuning_models import make_directory

import phi3_mlx
from phi3_mlx.cli import main
from phi3_mlx.conversion import pipeline, sensitivity, writer
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.pipeline import convert
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.errors import CheckpointError, ConfigError, ModelNotFoundError, OptionError, Phi3Error, TokenizerError
from phi3_mlx.store import atomic, hub
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.finite import is_finite
from phi3_mlx.store.safetensors import INDEX, find_weights, read_header

RAW = {**oracle.BASE, "num_hidden_layers": 2}  # plain rope, no window: what mlx-lm computes right
TIED = {**RAW, "tie_word_embeddings": True}
IDS = oracle.ids_of(12)[0]
MODES = ["affine", "mxfp4", "mxfp8", "nvfp4"]
TINY = ROOT / "weights" / "tiny"
DOWN = "model.layers.1.mlp.down_proj"


def weights_of(raw=RAW, dtype=mx.float32) -> dict[str, mx.array]:
    return {name: array.astype(dtype) for name, array in tree_flatten(oracle.make_ours(raw).parameters())}


def write(directory: Path, raw=RAW, change=None, dtype=mx.float32, shards=1, tokenizer=False) -> Path:
    """A Hugging Face directory of a random model, after `change(weights)`; written without the code under test."""
    weights = weights_of(raw, dtype)
    if change is not None:
        change(weights)
    directory.mkdir(parents=True)
    oracle.write_weights(directory, weights, shards)
    (directory / "config.json").write_text(json.dumps(raw))
    if tokenizer:
        for file in TINY.glob("tokenizer*"):
            shutil.copy(file, directory)
    return directory


def read(directory: Path) -> dict[str, mx.array]:
    """Everything in a directory's safetensors files, by mlx."""
    found: dict[str, mx.array] = {}
    for file in directory.glob("*.safetensors"):
        found |= mx.load(str(file))
    return found


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    """Names, shapes, dtypes and every value."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]) for n in a)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def refusal(error, source, destination, **options) -> str:
    with pytest.raises(error) as caught:
        convert(source, destination, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "source")


# ------------------------------------------------------------------------------------- the same as mlx-lm's


def convert_theirs(source: Path, destination: Path, **options) -> None:
    from mlx_lm.convert import convert as convert_mlx_lm

    convert_mlx_lm(str(source), str(destination), **options)


@pytest.mark.parametrize(
    ("raw", "dtype", "options"),
    [
        (RAW, mx.float32, {"mode": "affine"}),
        ({**RAW, "torch_dtype": "bfloat16"}, mx.bfloat16, {"bits": 3, "group_size": 32}),
        ({**TIED, "torch_dtype": "bfloat16"}, mx.float32, {"bits": 8, "group_size": 128}),
        ({**TIED, "torch_dtype": "float16"}, mx.float16, {"mode": "mxfp4"}),
        ({**RAW, "torch_dtype": "bfloat16"}, mx.bfloat16, {"mode": "nvfp4"}),
        (RAW, mx.float32, {"mode": "mxfp8", "dtype": "bfloat16"}),
    ],
    ids=["plain", "3 bits", "tied, stored in float32", "tied, mxfp4", "nvfp4", "mxfp8, dtype"],
)
def test_the_tensors_are_those_of_mlx_lm(tmp_path, capsys, raw, dtype, options):
    source = write(tmp_path / "source", raw, dtype=dtype, tokenizer=True)
    renamed = {"bits": "q_bits", "group_size": "q_group_size", "mode": "q_mode"}
    convert_theirs(source, tmp_path / "theirs", quantize=True, **{renamed.get(k, k): v for k, v in options.items()})
    convert(source, tmp_path / "ours", report=False, **options)
    assert same(read(tmp_path / "ours"), read(tmp_path / "theirs"))
    assert config_of(tmp_path / "ours")["quantization"] == config_of(tmp_path / "theirs")["quantization"]


def test_token_for_token_both_ways(tmp_path, capsys):
    """mlx-lm's own loop over what we write, and ours over what it writes."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model as load_theirs

    source = write(tmp_path / "source", tokenizer=True)
    convert_theirs(source, tmp_path / "theirs", quantize=True)
    convert(source, tmp_path / "ours", report=False)

    def tokens(model):
        return [token for token, _ in generate_step(mx.array(IDS), model, max_tokens=24)]

    expected = tokens(load_theirs(tmp_path / "theirs")[0])
    assert len(set(expected)) > 5  # not one token again and again
    assert tokens(load_theirs(tmp_path / "ours")[0]) == expected
    assert oracle.generate(read_model(tmp_path / "ours"), IDS, 24) == expected
    assert oracle.generate(read_model(tmp_path / "theirs"), IDS, 24) == expected


def test_dequantized_like_mlx_lm(tmp_path, capsys):
    """From mlx-lm's packed directory, layers of several kinds in it, back to plain weights."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    source = write(tmp_path / "source", tokenizer=True)
    from mlx_lm.models.phi3 import Model, ModelArgs

    theirs = Model(ModelArgs.from_dict(json.loads(json.dumps(RAW))))
    theirs.load_weights(list(weights_of().items()))
    special = {"lm_head": False, DOWN: {"group_size": 32, "bits": 6, "mode": "affine"}}
    theirs, config = quantize_model(theirs, {**RAW}, 64, 4, quant_predicate=lambda path, _: special.get(path, True))
    save_model(tmp_path / "packed", theirs)
    save_config(config, tmp_path / "packed" / "config.json")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "packed")
    convert_theirs(tmp_path / "packed", tmp_path / "theirs", dequantize=True)
    done = convert(tmp_path / "packed", tmp_path / "ours", dequantize=True, report=False)
    assert same(read(tmp_path / "ours"), read(tmp_path / "theirs"))
    assert done.recipe is None
    assert done.notes == ()
    assert done.bits_per_weight == 32
    assert not {"quantization", "quantization_config"} & set(config_of(tmp_path / "ours"))


# ------------------------------------------------------------------------------------- bits, groups, recipes


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (5, 32), (6, 64), (8, 32)])
def test_every_width(tmp_path, source, bits, group_size):
    done = convert(source, tmp_path / "new", bits=bits, group_size=group_size, report=False)
    assert done.recipe == {"group_size": group_size, "bits": bits, "mode": "affine"}
    assert config_of(tmp_path / "new") == {**RAW, "quantization": done.recipe, "quantization_config": done.recipe}
    found, kept = read(tmp_path / "new"), []
    for name, array in weights_of().items():
        path = name.removesuffix(".weight")
        if array.ndim < 2 or array.shape[-1] % group_size:
            assert mx.array_equal(found.pop(name), array)
            kept += [name] if array.ndim == 2 else []
            continue
        for part, expected in zip(("weight", "scales", "biases"), mx.quantize(array, group_size, bits), strict=True):
            assert mx.array_equal(found.pop(f"{path}.{part}"), expected)
    assert not found
    assert list(done.kept) == kept
    assert bool(kept) == (group_size == 128)  # the hidden size is 192
    assert done.bytes == sum(tensor.nbytes for tensor in find_weights(tmp_path / "new").tensors.values())
    count = sum(array.size for array in weights_of().values())
    assert done.bits_per_weight == pytest.approx(8 * done.bytes / count)
    assert np.isfinite(oracle.logits_of(read_model(tmp_path / "new"), IDS[None])).all()


def test_a_size_that_was_asked_for_is_kept_to_and_its_recipe_makes_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOKENS", sensitivity.SENSITIVITY_WINDOW)  # a shorter text than otherwise
    packed = make_directory(tmp_path / "packed", bits=8)
    done = convert(packed, tmp_path / "a", target_size="0.4MB", report=False)
    assert 390_000 < done.bytes <= 400_000
    assert len({own["bits"] for path, own in done.recipe.items() if isinstance(own, dict)}) > 1
    convert(packed, tmp_path / "b", recipe=tmp_path / "a" / "recipe.json", report=False)
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "choose_recipe", lambda *_, **__: pytest.fail("measured"))

    def full(sink, needed, beside):
        raise CheckpointError(f"{needed} bytes are too many")

    monkeypatch.setattr(writer.DirectorySink, "check_space", full)
    with pytest.raises(CheckpointError, match="2600000 bytes"):
        convert(ROOT / "weights" / "tiny-8bit", tmp_path / "a", target_size="2.6MB")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_followed_and_reproduces_itself(tmp_path, source):
    recipe = {
        "group_size": 64,
        "bits": 3,
        "mode": "affine",
        "lm_head": False,
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
        DOWN: {"group_size": 128, "bits": 2},
    }
    done = convert(source, tmp_path / "a", recipe=recipe, report=False)
    header = read_header(tmp_path / "a" / "model.safetensors")
    assert header[f"{DOWN}.weight"].shape == (192, 256 * 2 // 32)
    assert header["model.embed_tokens.weight"].shape == (160, 192 * 8 // 32)
    assert header["model.layers.0.self_attn.o_proj.weight"].shape == (192, 192 * 3 // 32)
    assert header["lm_head.weight"].shape == (160, 192)
    assert done.kept == ()  # what the recipe itself leaves out is no news
    assert json.loads((tmp_path / "a" / "recipe.json").read_text()) == recipe
    for again in (tmp_path / "a" / "recipe.json", tmp_path / "a" / "config.json"):
        convert(source, tmp_path / again.stem, recipe=again, report=False)
        assert (tmp_path / again.stem / "model.safetensors").read_bytes() == (
            tmp_path / "a" / "model.safetensors"
        ).read_bytes()
    assert isinstance(read_model(tmp_path / "a").lm_head.weight, mx.array)


def test_a_recipes_file_that_is_none_is_not_to_be_downloaded(tmp_path, source):
    (tmp_path / "text").write_text("bits=4")
    for name in ("text", "nowhere", "source"):
        said = refusal(CheckpointError, source, tmp_path / "new", recipe=tmp_path / name)
        assert said.endswith("give recipe.json of an earlier run, or a config.json")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"bits": 4}, "a recipe is a JSON object with group_size, bits"),
        (
            {"bits": 4, "group_size": 64, "model.layers.9.mlp.down_proj": False},
            "model.layers.9.mlp.down_proj is no lay",
        ),
        ({"bits": 4, "group_size": 64, "lm_head": 3}, "the entry of lm_head is 3, expected false or"),
        ({"bits": 4, "group_size": 64, "lm_head": {"bits": 7}}, "no such quantization for lm_head"),
        ({"bits": 7, "group_size": 64}, "no such quantization"),
        ({"bits": 4, "group_size": 64, DOWN: False, "lm_head": {"group_size": 128, "bits": 4}}, "lm_head is 192 wide"),
    ],
)
def test_recipes_that_do_not_fit(tmp_path, source, recipe, words):
    assert words in refusal(OptionError, source, tmp_path / "new", recipe=recipe)
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert words in refusal(OptionError, source, tmp_path / "new", recipe=tmp_path / "r.json")
    assert sorted(os.listdir(tmp_path)) == ["r.json", "source"]


def test_tied_split_and_odd_leftovers(tmp_path):
    def change(weights):
        for layer in range(2):
            block = f"model.layers.{layer}."
            for name, part in zip("qkv", mx.split(weights.pop(f"{block}self_attn.qkv_proj.weight"), 3), strict=True):
                weights[f"{block}self_attn.{name}_proj.weight"] = part
            for name, part in zip(
                ("gate", "up"), mx.split(weights.pop(f"{block}mlp.gate_up_proj.weight"), 2), strict=True
            ):
                weights[f"{block}mlp.{name}_proj.weight"] = part
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((48,))
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    split = write(tmp_path / "split", TIED, change, shards=3)
    convert(split, tmp_path / "new", dequantize=True, report=False)
    assert same(read(tmp_path / "new"), weights_of(TIED))
    # The same split projections, packed one by one.
    convert(write(tmp_path / "fused", TIED), tmp_path / "packed", report=False)
    packed = read(tmp_path / "packed")
    for name in list(packed):
        if ".qkv_proj." in name:
            for one, part in zip("qkv", mx.split(packed.pop(name), 3), strict=True):
                packed[name.replace("qkv", one)] = part
    (tmp_path / "packed" / "model.safetensors").unlink()
    mx.save_safetensors(str(tmp_path / "packed" / "model.safetensors"), packed)
    convert(tmp_path / "packed", tmp_path / "fused again", dequantize=True, report=False)
    convert(tmp_path / "fused", tmp_path / "p", report=False)
    convert(tmp_path / "p", tmp_path / "q", dequantize=True, report=False)
    assert same(read(tmp_path / "fused again"), read(tmp_path / "q"))


def test_a_head_that_is_not_the_tied_one(tmp_path):
    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    text = refusal(CheckpointError, write(tmp_path / "model", TIED, change), tmp_path / "new")
    assert "lm_head.weight differs from model.embed_tokens.weight" in text


# ------------------------------------------------------------------------------------- dtypes, packed sources, NaN


def test_dtypes(tmp_path, source):
    convert(source, tmp_path / "a", dtype="bfloat16", report=False)
    tensors = find_weights(tmp_path / "a").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16", "U32"}
    assert config_of(tmp_path / "a")["torch_dtype"] == "bfloat16"
    modern = write(tmp_path / "modern", {**RAW, "dtype": "float32"})
    convert(modern, tmp_path / "b", dtype="float16", dequantize=True, report=False)
    assert config_of(tmp_path / "b") == {**RAW, "dtype": "float16"}
    assert same(read(tmp_path / "b"), weights_of(dtype=mx.float16))


def test_float16_overflows_by_name(tmp_path):
    def change(weights):
        weights[f"{DOWN}.weight"][3, 5] = 1e6

    source = write(tmp_path / "source", change=change, dtype=mx.bfloat16)
    text = refusal(CheckpointError, source, tmp_path / "new", dtype="float16", report=False)
    assert f"{DOWN}.weight has values beyond what float16 holds; dtype='bfloat16'" in text
    convert(source, tmp_path / "new", dtype="bfloat16", report=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(tmp_path, value):
    def change(weights):
        weights[f"{DOWN}.weight"][-1, -1] = value

    source = write(tmp_path / "source", change=change)
    text = refusal(CheckpointError, source, tmp_path / "new", report=False)
    assert text == f"{DOWN}.weight is not finite in {source} (NaN or infinity); allow_nan=True converts it as it is"
    assert os.listdir(tmp_path) == ["source"]
    convert(source, tmp_path / "new", dequantize=True, allow_nan=True, report=False)
    np.testing.assert_equal(read(tmp_path / "new")[f"{DOWN}.weight"][-1, -1].item(), value)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.float64])
def test_finite_is_told_from_the_bits(dtype):
    with mx.stream(mx.cpu):  # which alone has float64
        check_finite(dtype)


def check_finite(dtype):
    good = mx.array([0.0, -0.0, 1.0, -1.0, mx.finfo(dtype).max, mx.finfo(dtype).min, 1e-7], dtype)
    assert is_finite(good)
    assert is_finite(mx.zeros((0, 3), dtype))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in range(len(good)):
            broken = mx.array(good)
            broken[place] = bad
            assert not is_finite(broken)


def test_a_packed_source_is_rounded_again_only_when_asked(tmp_path, source):
    convert(source, tmp_path / "packed", bits=8, group_size=32, report=False)
    text = refusal(OptionError, tmp_path / "packed", tmp_path / "new")
    assert (
        "is 8-bit already; dequantize=True writes it in floats, bits=N dequantizes it and rounds a second time" in text
    )
    done = convert(tmp_path / "packed", tmp_path / "again", bits=4, report=False)
    assert "is 8-bit already: it was dequantized and rounded a second time" in done.notes[0]
    convert(tmp_path / "packed", tmp_path / "plain", dequantize=True, report=False)
    convert(tmp_path / "plain", tmp_path / "by steps", bits=4, report=False)
    assert same(read(tmp_path / "again"), read(tmp_path / "by steps"))


@pytest.mark.parametrize("mode", MODES)
def test_packed_in_every_mode_and_dequantized(tmp_path, mode):
    source = write(tmp_path / "source", {**RAW, "torch_dtype": "bfloat16"}, dtype=mx.bfloat16)
    convert(source, tmp_path / "packed", mode=mode, report=False)
    convert(tmp_path / "packed", tmp_path / "plain", dequantize=True, report=False)
    packed, plain = read_model(tmp_path / "packed"), read_model(tmp_path / "plain")
    difference = np.abs(oracle.logits_of(packed, IDS[None]) - oracle.logits_of(plain, IDS[None])).max()
    assert difference < 0.1  # bfloat16 rounds what is dequantized
    assert {tensor.dtype for tensor in find_weights(tmp_path / "plain").tensors.values()} == {"BF16"}


def test_damaged_packed_sources(tmp_path, source):
    convert(source, tmp_path / "packed", report=False)
    weights, config = read(tmp_path / "packed"), config_of(tmp_path / "packed")

    def broken(change=None, **keys) -> str:
        changed = dict(weights)
        if change is not None:
            change(changed)
        directory = tmp_path / f"broken {len(os.listdir(tmp_path))}"
        directory.mkdir()
        mx.save_safetensors(str(directory / "model.safetensors"), changed)
        (directory / "config.json").write_text(json.dumps({**config, **keys}))
        return refusal((CheckpointError, ConfigError), directory, tmp_path / "new", dequantize=True)

    assert "holds packed weights" in broken(quantization=None, quantization_config=None)
    assert "holds packed weights" in broken(quantization=None)
    assert "quantization is 4, expected an object" in broken(quantization=4)
    assert f"but {DOWN}.biases is missing" in broken(lambda w: w.pop(f"{DOWN}.biases"))
    assert f"config.json says {DOWN} is not packed" in broken(quantization={**config["quantization"], DOWN: False})
    eight = {**config["quantization"], DOWN: {"group_size": 64, "bits": 8}}
    assert f"{DOWN} is packed as weight U32 (192, 32) with" in broken(quantization=eight)
    assert "quantization of lm_head cannot be honoured" in broken(
        quantization={**config["quantization"], "lm_head": {"bits": 7}}
    )


# ------------------------------------------------------------------------------------- files


def test_sharded_in_sharded_out(tmp_path, monkeypatch):
    limit = 100_000  # the embedding, packed, has 15,360 bytes of weights; down_proj in floats is larger
    source = write(tmp_path / "source", shards=4)
    convert(source, tmp_path / "one", report=False)
    assert not (tmp_path / "one" / INDEX).exists()
    monkeypatch.setattr(writer, "_SHARD_BYTES", limit)
    convert(source, tmp_path / "several", report=False)
    convert(source, tmp_path / "plain", dequantize=True, report=False)
    assert same(read(tmp_path / "several"), read(tmp_path / "one"))
    assert same(read(tmp_path / "plain"), weights_of())
    for directory in (tmp_path / "several", tmp_path / "plain"):
        files = sorted(file.name for file in directory.glob("*.safetensors"))
        assert len(files) > 2
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        headers = {file: read_header(directory / file) for file in files}
        sizes = {file: [tensor.nbytes for tensor in header.values()] for file, header in headers.items()}
        assert all(len(each) == 1 or sum(each) <= limit for each in sizes.values())
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
        assert index["weight_map"] == {name: file for file, header in headers.items() for name in header}
        read_model(directory)


def test_the_safetensors_library_reads_it(tmp_path, source):
    safe_open = pytest.importorskip("safetensors").safe_open
    convert(source, tmp_path / "new", mode="nvfp4", report=False)
    expected = read(tmp_path / "new")
    with safe_open(tmp_path / "new" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(file.get_tensor(name), np.array(expected[name]))
    data = (tmp_path / "new" / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_what_goes_along(tmp_path):
    source = write(tmp_path / "source", {**RAW, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}})
    along = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    for name in along | {"modeling_phi3.py", "pytorch_model.bin", "training_args.pt", "README.md", "optimizer.json"}:
        (source / name).write_text(name)
    (source / "tokenizer.d.json").mkdir()
    convert(source, tmp_path / "new", report=False)
    assert set(os.listdir(tmp_path / "new")) == along | {"config.json", "model.safetensors"}
    assert all((tmp_path / "new" / name).read_text() == name for name in along)
    assert "auto_map" not in config_of(tmp_path / "new")


def test_progress_counts_tensors_and_bytes(tmp_path, source):
    seen = []
    done = convert(source, tmp_path / "new", report=False, progress=seen.append)
    header = find_weights(tmp_path / "new").tensors
    assert [each.done for each in seen] == list(range(len(header) + 1))
    assert {(each.stage, each.unit, each.total, each.all_bytes) for each in seen} == {
        ("writing", "tensors", len(header), done.bytes)
    }
    assert seen[-1].bytes == done.bytes
    assert all(a.bytes < b.bytes for a, b in itertools.pairwise(seen))


def test_memory_follows_the_largest_tensor(tmp_path):
    def peak(layers: int) -> int:
        raw = {**RAW, "hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": layers}
        source = write(tmp_path / f"source {layers}", raw)
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        convert(source, tmp_path / f"new {layers}", report=False)
        return mx.get_peak_memory() - held

    largest = 2 * 768 * 384 * 4
    few, many = peak(1), peak(12)
    assert few < 2 * largest
    assert many < 1.1 * few + 1e5


# ------------------------------------------------------------------------------------- whole or not at all

# Runs a conversion that SIGKILLs itself at a moment.
KILLED = """
import os, signal, sys
from phi3_mlx.store import atomic
from phi3_mlx.conversion.pipeline import convert

source, destination, moment, force = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at(progress):
    if moment == f"tensor {progress.done}":
        die()

if moment == "complete":
    atomic._put = die
elif moment == "between two renames":
    atomic._exchange = lambda *_: False
    rename, seen = atomic.Path.rename, []
    def counted(self, target):
        rename(self, target)
        die()
    atomic.Path.rename = counted
elif moment == "renamed":
    atomic.shutil.rmtree = die
convert(source, destination, bits=8, report=False, force=force == "force", progress=at)
"""


def killed(source: Path, destination: Path, moment: str, force: bool) -> None:
    command = [sys.executable, "-c", KILLED, str(source), str(destination), moment, "force" if force else ""]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(("name", "meant"), [("phi-4-4bit", "mlx-community/phi-4-4bit"), ("Tiny", "the bundled model")])
def test_a_directory_whose_name_means_another_model_is_said_to_be_hidden(tmp_path, source, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    done = convert(source, name, report=False)
    assert done.notes == (f"the name {name} means {meant}; give this directory as ./{name}",)
    assert hub.resolve(f"./{name}") == tmp_path / name
    for path in ("plain", tmp_path / name / "inside"):
        assert convert(source, path, report=False).notes == ()


@pytest.mark.parametrize("moment", ["tensor 1", "tensor 20", "complete", "renamed"])
def test_killed_at_any_moment(tmp_path, source, moment):
    killed(source, tmp_path / "new", moment, force=False)
    if moment == "renamed":
        assert oracle.logits_of(read_model(tmp_path / "new"), IDS[None]).size
    else:
        assert not (tmp_path / "new").exists()
        assert len(list(tmp_path.glob(".phi3-mlx-*.partial"))) == 1
    convert(source, tmp_path / "new", force=True, report=False)
    assert sorted(os.listdir(tmp_path)) == ["new", "source"]


@pytest.mark.parametrize("moment", ["tensor 20", "complete", "between two renames", "renamed"])
def test_killed_while_replacing(tmp_path, source, moment):
    convert(source, tmp_path / "new", bits=2, report=False)
    killed(source, tmp_path / "new", moment, force=True)
    if moment == "between two renames":  # only where names cannot be swapped: the next run puts the old one back
        assert not (tmp_path / "new").exists()
        atomic._sweep(tmp_path)
    assert config_of(tmp_path / "new")["quantization"]["bits"] == (8 if moment == "renamed" else 2)
    read_model(tmp_path / "new")
    convert(source, tmp_path / "new", force=True, report=False)
    assert sorted(os.listdir(tmp_path)) == ["new", "source"]


def test_ctrl_c_leaves_nothing(tmp_path, source):
    def stop(progress):
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", report=False, progress=stop)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("swap", [True, False])
def test_force_replaces_a_model(tmp_path, source, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    convert(source, tmp_path / "new", bits=2, report=False)
    (tmp_path / "new" / "leftover").touch()
    assert "exists already; name another directory, or replace it with force=True" in refusal(
        CheckpointError, source, tmp_path / "new"
    )
    convert(source, tmp_path / "new", bits=8, report=False, force=True)
    assert config_of(tmp_path / "new")["quantization"]["bits"] == 8
    assert not (tmp_path / "new" / "leftover").exists()
    assert sorted(os.listdir(tmp_path)) == ["new", "source"]


def test_force_replaces_nothing_else(tmp_path, source):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    (tmp_path / "file").touch()
    assert "holds something else than a model" in refusal(CheckpointError, source, tmp_path / "letters", force=True)
    assert "is not a directory" in refusal(CheckpointError, source, tmp_path / "file", force=True)
    assert (tmp_path / "letters" / "a.txt").exists()
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", force=True, report=False)


def test_two_runs_at_once(tmp_path, source):
    """The second must not sweep away what the first is writing, and the first must not replace the second's."""

    def overtaken():
        with atomic.new_directory(tmp_path / "new") as folder:
            (folder / "mine").touch()
            convert(source, tmp_path / "new", report=False)
            assert (folder / "mine").exists()

    with pytest.raises(CheckpointError, match="exists already"):
        overtaken()
    read_model(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "source"]


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "no such quantization"),
        ({"bits": 4, "group_size": 48}, "no such quantization"),
        ({"mode": "mxfp4", "bits": 8}, "no such quantization"),
        ({"mode": "nvfp4", "group_size": 64}, "no such quantization"),
        ({"mode": "int4"}, "mode 'int4' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; choose float32, bfloat16, float16"),
        ({"method": "awq"}, "method 'awq' is unknown; choose round, gptq"),
        ({"dequantize": True, "bits": 4}, "has no use for bits=4"),
        ({"dequantize": True, "mode": "mxfp4"}, "has no use for mode=mxfp4"),
        ({"target_bpw": 4.5, "target_size": "2GB"}, "target_bpw=4.5 and target_size=2GB each decide"),
        ({"target_bpw": 4.5, "bits": 4}, "target_bpw=4.5 decides what bits=4 would"),
        ({"recipe": "r.json", "group_size": 64}, "recipe=r.json decides what group_size=64 would"),
        ({"bits": 4, "calibration": "a text"}, "calibration has no effect without method=gptq"),
        ({"text": ""}, "text is empty; give some"),
        ({"target_size": "2 elephants"}, "'2 elephants' is not a size; give one such as 16GB"),
        ({"target_size": "-2GB"}, "'-2GB' is not a size"),
        ({"group_size": 128, "mode": "affine"}, "groups of 128 divide no layer's width"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    narrow = {**RAW, "hidden_size": 96, "intermediate_size": 96}
    source = write(tmp_path / "source", narrow)
    assert words in refusal(OptionError, source, tmp_path / "new", **options)
    assert os.listdir(tmp_path) == ["source"]


def test_the_disk_has_every_file_before_the_directory_has_its_name(tmp_path, source, monkeypatch):
    fsync, synced = os.fsync, set()

    def noted(descriptor):
        fsync(descriptor)
        if not (tmp_path / "new").exists():
            synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    convert(source, tmp_path / "new", report=False)
    files = list((tmp_path / "new").iterdir())
    assert {"config.json", "model.safetensors"} <= {file.name for file in files}
    assert {file.stat().st_ino for file in files} <= synced


def test_nowhere_to_write(tmp_path, source, monkeypatch):
    (tmp_path / "file").touch()
    text = refusal(CheckpointError, source, tmp_path / "file" / "new")
    assert text.endswith(f"cannot be written: {tmp_path / 'file'} is not a directory; name another place")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**7 + 1000))
    text = refusal(CheckpointError, source, tmp_path / "new")
    assert "is on a disk with 10.0 MB free, and the model takes 10.4 MB; free some space" in text
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path, source):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written: Permission denied" in refusal(CheckpointError, source, tmp_path / "locked" / "new")


def test_a_disk_that_fills_up(tmp_path, source, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_bytes", full)
    text = refusal(CheckpointError, source, tmp_path / "new", report=False)
    assert (
        text == f"{tmp_path / 'new'} cannot be written: No space left on device; free some space, or name another place"
    )
    assert os.listdir(tmp_path) == ["source"]


def test_the_source_is_not_the_destination(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    for place in (source, source.parent, tmp_path / "link", tmp_path / "x" / ".." / "source"):
        assert "is, or holds, the model that is read" in refusal(OptionError, source, place, force=True)
    done = convert(source, source / "4bit", report=False)  # inside it is no danger
    assert done.path == source / "4bit"


def test_sources_that_cannot_be_read(tmp_path):
    new = tmp_path / "new"
    pickle = write(tmp_path / "pickle")
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    assert "has only pickle weights (pytorch_model.bin)" in refusal(CheckpointError, pickle, new)
    sharded = write(tmp_path / "sharded", shards=3)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    text = refusal(CheckpointError, sharded, new)
    assert text == f"{sharded} lacks model-00002-of-00003.safetensors of its weights; download the model again"
    cut = write(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-7])
    assert "download it again" in refusal(CheckpointError, cut, new)
    integers = write(tmp_path / "integers", change=lambda w: w.update({f"{DOWN}.weight": mx.ones((192, 256), mx.int8)}))
    assert f"{DOWN}.weight is stored as I8, expected BF16 or F16 or F32" in refusal(CheckpointError, integers, new)
    (tmp_path / "nothing").mkdir()
    assert "has no config.json" in refusal(CheckpointError, tmp_path / "nothing", new)
    for keys, words in (
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config {'quant_method': 'gptq'} is not"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ):
        (integers / "config.json").write_text(json.dumps({**RAW, **keys}))
        assert words in refusal(ConfigError, integers, new)
    assert "no such directory" in refusal(ModelNotFoundError, tmp_path / "absent", new)
    (tmp_path / "weights.bin").touch()
    assert "is a file, not a model directory" in refusal(ModelNotFoundError, tmp_path / "weights.bin", new)
    assert "leave it out" in refusal(OptionError, tmp_path / "model.gguf", new, revision="main")
    with pytest.raises(Phi3Error, match="gguf"):
        convert(tmp_path / "absent.gguf", new)
    assert not new.exists()


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(capsys):
    """run(*args) -> (exit code, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call


def test_the_command(tmp_path, run):
    code, out, err = run("convert", "tiny", "-o", tmp_path / "new", "--bits", 8, "--group-size", 32, "--no-report")
    assert code == 0
    assert out == ""
    note, summary = err.splitlines()
    assert note.startswith("note: tiny is 4-bit already")
    assert summary == f"{tmp_path / 'new'}: 6.1 MB, 9.00 bits a weight"
    assert run("generate", "-m", tmp_path / "new", "-p", "Hello", "--max-tokens", 3)[0] == 0
    code, _, err = run("convert", tmp_path / "new", "-o", tmp_path / "plain", "--dequantize", "--no-report")
    assert (code, "note" in err) == (0, False)
    assert {tensor.dtype for tensor in find_weights(tmp_path / "plain").tensors.values()} == {"BF16"}


def test_report_and_recipe(tmp_path, run, monkeypatch):
    """The whole way: plain weights, bits chosen by a target, calibrated, reported; then the same from its recipe."""
    monkeypatch.setattr(sensitivity, "TOKENS", sensitivity.SENSITIVITY_WINDOW)
    raw = {**RAW, "hidden_size": 128, "intermediate_size": 128, "vocab_size": 4032}
    source = write(tmp_path / "source", raw, tokenizer=True)
    convert(source, tmp_path / "plain", dequantize=True)
    assert not (tmp_path / "plain" / "REPORT.md").exists()  # nothing was rounded
    (tmp_path / "some.txt").write_text(bundled("calibration")[:4000])
    arguments = ("--target-bpw", 5.4, "--method", "gptq", "--calibration", tmp_path / "some.txt", "--report")
    code, out, err = run("convert", tmp_path / "plain", "-o", tmp_path / "a", *arguments)
    assert code == 0, err
    assert "mean KL divergence" in out
    figures = json.loads((tmp_path / "a" / "report.json").read_text())
    assert figures["source"] == "plain"
    assert figures["kl"] > 0
    assert 3.9 < figures["bits_per_weight"]["result"] <= 5.4
    report = (tmp_path / "a" / "REPORT.md").read_text()
    assert "relative output error" in report
    assert "## What fitting to a text gave" in report
    assert report.count("| model.layers.0.mlp.down_proj |") == 2
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert recipe == config_of(tmp_path / "a")["quantization"]
    assert len({each["bits"] for each in recipe.values() if isinstance(each, dict)} | {recipe["bits"]}) > 1
    done = convert(tmp_path / "plain", tmp_path / "b", recipe=tmp_path / "a" / "recipe.json", report=False)
    assert {name: tensor.shape for name, tensor in find_weights(done.path).tensors.items()} == {
        name: tensor.shape for name, tensor in find_weights(tmp_path / "a").tensors.items()
    }


def out_of_memory(*_):
    raise RuntimeError("[malloc] Unable to allocate\n4 bytes.")


def test_the_report_is_left_out_where_it_does_not_fit(tmp_path, source, monkeypatch):
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, source)
    monkeypatch.setattr(pipeline, "room", lambda: 10**6)
    done = convert(source, tmp_path / "new")
    assert done.report is None
    assert re.fullmatch(
        r"no report: it takes about [\d.]+ [GM]B of memory, and 1.0 MB are free; report=True .*", done.notes[0]
    )
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_compared", out_of_memory)
        done = convert(source, tmp_path / "no memory")
    assert (done.report, done.notes[0]) == (None, "no report: [malloc] Unable to allocate 4 bytes.")
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError):
        convert(source, tmp_path / "asked for", report=True)
    read_model(tmp_path / "asked for")  # the model is complete anyway


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["tiny"], 2, "-o"),
        (["tiny", "-o", "new", "--bits", "7"], 2, "'7'"),
        (["tiny", "-o", "new", "--mode", "mxfp4", "--bits", "8"], 2, "no such quantization"),
        (["tiny", "-o", "new"], 2, "--dequantize writes it in floats"),
        (["tiny", "-o", "here", "--bits", "8"], 1, "exists already"),
        (["nowhere/at/all", "-o", "new"], 1, "no such directory"),
        (["tiny", "-o", "new", "--bits", "8", "--text", "missing.txt"], 1, "missing.txt"),
        (["tiny", "-o", "new", "--recipe", "missing.json"], 1, "missing.json"),
    ],
)
def test_faults_are_one_line(tmp_path, run, monkeypatch, args, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "something").touch()
    got, out, err = run("convert", *args)
    assert got == code
    assert len(err.splitlines()) == 1
    assert words in err
    assert out == ""
    assert os.listdir(tmp_path) == ["here"]


def test_the_public_name():
    assert phi3_mlx.convert is convert
    assert open_source(TINY).raw_config["model_type"] == "phi3"


@pytest.mark.parametrize("layout", ["phi3", "llama"])
def test_a_split_checkpoint_of_the_bundled_model_tells_the_same_story(layout, tmp_path):
    """Its projections taken apart, as other layouts store them, then converted: the text is the very same."""
    whole, split, again = tmp_path / "whole", tmp_path / "split", tmp_path / "again"
    convert("tiny", whole, dequantize=True, report=False)
    split.mkdir()
    for file in whole.iterdir():
        if file.name.startswith(("tokenizer", "generation")):
            shutil.copy(file, split)
    raw = json.loads((whole / "config.json").read_text())
    if layout == "llama":
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings",
                "original_max_position_embeddings", "tie_word_embeddings", "torch_dtype")  # fmt: skip
        raw = {"model_type": "llama", "hidden_act": "silu", **{key: raw[key] for key in kept}}
    (split / "config.json").write_text(json.dumps(raw))
    arrays = {}
    for name, array in mx.load(str(whole / "model.safetensors")).items():
        if ".qkv_proj." in name:
            kv = raw["num_key_value_heads"] * raw["hidden_size"] // raw["num_attention_heads"]
            parts = zip("qkv", mx.split(array, [raw["hidden_size"], raw["hidden_size"] + kv]), strict=True)
            arrays |= {name.replace("qkv_proj", f"{letter}_proj"): part for letter, part in parts}
        elif ".gate_up_proj." in name:
            parts = zip(("gate", "up"), mx.split(array, 2), strict=True)
            arrays |= {name.replace("gate_up_proj", f"{half}_proj"): part for half, part in parts}
        else:
            arrays[name] = array
    mx.save_safetensors(str(split / "model.safetensors"), arrays)
    convert(split, again, bits=8, report=False)
    convert(whole, tmp_path / "direct", bits=8, report=False)
    told = [
        phi3_mlx.generate(*phi3_mlx.load(str(path)), "Write a story about a rabbit.", max_tokens=60)
        for path in (again, tmp_path / "direct")
    ]
    assert told[0] == told[1]
    assert told[0].startswith(
        phi3_mlx.generate(*phi3_mlx.load("tiny"), "Write a story about a rabbit.", max_tokens=6).strip()[:10]
    )
