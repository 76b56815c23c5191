"""Model directories: what others write is read; what is broken is refused, and named."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten

from phi3_mlx.conversion.directory import DirectorySource
from phi3_mlx.conversion.pipeline import convert
from phi3_mlx.errors import CheckpointError, ConfigError, OptionError
from phi3_mlx.models.phi3 import Phi3Model
from phi3_mlx.store import checkpoint
from phi3_mlx.store.checkpoint import model_size, read_model
from phi3_mlx.store.safetensors import INDEX, find_weights, read_header

RAW = {**oracle.BASE, "num_hidden_layers": 2}  # plain rope, no window: what mlx-lm computes right
TIED = {**RAW, "tie_word_embeddings": True}
IDS = oracle.ids_of(24)
MODES = ["affine", "mxfp4", "mxfp8", "nvfp4"]
READERS = [read_model, model_size, DirectorySource]


def write(directory: Path, raw=RAW, change=None, model=None, shards=1) -> Path:
    """A directory of `model` (a random one), after `change(weights)`; written without the code under test."""
    weights = dict(tree_flatten((model or oracle.make_ours(raw)).parameters()))
    if change is not None:
        change(weights)
    directory.mkdir()
    oracle.write_weights(directory, weights, shards)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def packed(how=None, **options):
    """A random model packed by mlx, and its config."""
    model = oracle.make_ours(RAW)
    nn.quantize(model, **options)
    return model, {**RAW, "quantization": how or options}


def refusal(directory: Path, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        read_model(directory)
    return str(caught.value)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = dict(tree_flatten(a.parameters())), dict(tree_flatten(b.parameters()))
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


# Plain weights.


@pytest.mark.parametrize("raw", [RAW, oracle.CONFIGS["phi-4-mini"]], ids=["plain", "tied-longrope"])
def test_reads_a_model(tmp_path, raw):
    model = oracle.make_ours(raw)
    loaded = read_model(write(tmp_path / "model", raw))
    assert same_weights(loaded, model)
    np.testing.assert_array_equal(oracle.logits_of(loaded, IDS), oracle.logits_of(model, IDS))
    assert not loaded.training


def test_reads_shards(tmp_path):
    directory = write(tmp_path / "model", shards=3)
    assert same_weights(read_model(directory), oracle.make_ours(RAW))
    (directory / INDEX).unlink()
    assert same_weights(read_model(directory), oracle.make_ours(RAW))


def test_reads_what_transformers_writes(tmp_path):
    pytest.importorskip("torch")
    theirs = oracle.make_torch(RAW, oracle.make_ours(RAW))
    theirs.save_pretrained(tmp_path / "model", max_shard_size="400KB")
    assert len(find_weights(tmp_path / "model").files) > 1
    ours = oracle.logits_of(read_model(tmp_path / "model"), IDS)
    assert np.abs(ours - oracle.torch_logits(theirs, IDS)).max() < 1e-3


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path, monkeypatch, stored):
    def cast(weights):
        weights.update({name: array.astype(checkpoint.DTYPES[stored]) for name, array in weights.items()})

    directory = write(tmp_path / "model", change=cast)

    def dtypes(**options):
        return {array.dtype for _, array in tree_flatten(read_model(directory, **options).parameters())}

    assert dtypes() == {mx.float32}  # the CPU's rule
    for asked, dtype in checkpoint.DTYPES.items():
        assert dtypes(dtype=asked) == {dtype}
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert dtypes() == {checkpoint.DTYPES[stored]}


def test_options(tmp_path):
    directory = write(tmp_path / "model", oracle.CONFIGS["3.5-mini"])
    assert read_model(directory).model.longrope == "auto"
    assert read_model(directory, longrope="long").model.longrope == "long"
    with pytest.raises(OptionError, match=r"dtype 'int8' is unknown; choose float32, bfloat16, float16"):
        read_model(directory, dtype="int8")
    with pytest.raises(OptionError, match=r"longrope 'medium' is unknown; choose auto, short, long"):
        read_model(directory, longrope="medium")


# Packed weights.


@pytest.mark.parametrize("mode", MODES)
def test_reads_what_mlx_lm_writes(tmp_path, capsys, mode):
    from mlx_lm.models.phi3 import Model, ModelArgs
    from mlx_lm.utils import quantize_model as quantize_theirs
    from mlx_lm.utils import save_config
    from mlx_lm.utils import save_model as save_theirs

    raw = json.loads(json.dumps(RAW))
    theirs = Model(ModelArgs.from_dict(raw))
    theirs.load_weights(tree_flatten(oracle.make_ours(raw).parameters()))

    def recipe(path, _):
        """Layers of every kind: as the rest, not at all, in another width, in another mode."""
        special = {
            "model.layers.0.mlp.down_proj": False,
            "model.layers.0.self_attn.o_proj": {"group_size": 32, "bits": 8},
            "lm_head": {"group_size": 32, "bits": 6, "mode": "affine"},
            "model.layers.1.mlp.gate_up_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        }
        return special.get(path, True)

    theirs, config = quantize_theirs(theirs, raw, None, None, mode, quant_predicate=recipe)
    save_theirs(tmp_path / "model", theirs)
    save_config(config, tmp_path / "model" / "config.json")
    ours = read_model(tmp_path / "model")
    assert same_weights(ours, theirs)
    layers = ours.model.layers
    assert not isinstance(layers[0].mlp.down_proj, nn.QuantizedLinear)
    assert (layers[0].self_attn.o_proj.bits, ours.lm_head.bits) == (8, 6)
    assert (layers[1].mlp.gate_up_proj.mode, layers[1].mlp.down_proj.mode) == ("mxfp4", mode)
    assert np.abs(oracle.logits_of(ours, IDS) - np.array(theirs(mx.array(IDS)))).max() < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_scales_in_float32(tmp_path, bits):
    """Scales stored in bfloat16 become float32 on the CPU, and layers compute what their dequantized weights say."""
    model, config = packed(bits=bits, group_size=64)

    def cast(weights):
        weights |= {n: a.astype(mx.bfloat16) for n, a in weights.items() if mx.issubdtype(a.dtype, mx.floating)}

    write(tmp_path / "model", config, cast, model)
    assert read_header(tmp_path / "model" / "model.safetensors")["lm_head.scales"].dtype == "BF16"
    layer = read_model(tmp_path / "model").model.layers[0].mlp.down_proj
    assert (layer.weight.dtype, layer.scales.dtype, layer.biases.dtype) == (mx.uint32, mx.float32, mx.float32)
    x = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    out = layer(mx.array(x))
    assert out.dtype == mx.float32
    # Dequantized by hand: value = scale * code + bias, codes in `bits` bits from the lowest bit up.
    stored = np.array(layer.weight).view(np.uint8)
    codes = np.unpackbits(stored, axis=1, bitorder="little").reshape(192, 256, bits) @ (1 << np.arange(bits))
    scales, biases = (np.repeat(np.array(array), 64, axis=1) for array in (layer.scales, layer.biases))
    np.testing.assert_allclose(np.array(out), x @ (codes * scales + biases).T, atol=2e-4)


def test_shapes_win_over_a_wrong_default(tmp_path):
    """mlx-lm's rule for layers that config.json does not name: how they are packed shows in their shapes."""
    model, config = packed({"group_size": 64, "bits": 4}, bits=8, group_size=32)
    assert same_weights(read_model(write(tmp_path / "model", config, model=model)), model)


def test_overrides_by_hand(tmp_path):
    model, config = packed(bits=4, group_size=64)
    directory = write(tmp_path / "model", config, model=model)

    def override(path, value):
        quantization = {**config["quantization"], path: value}
        (directory / "config.json").write_text(json.dumps({**RAW, "quantization": quantization}))

    def refused(path, value, error=CheckpointError):
        override(path, value)
        return refusal(directory, error)

    text = refused("lm_head", False)
    assert "(2 unexpected, 1 of another shape, 1 of another dtype)" in text
    assert "lm_head.weight: shape (160, 24), expected (160, 192)" in text
    assert "lm_head.weight: dtype U32, expected BF16 or F16 or F32" in text
    assert "lm_head.scales: shape (160, 3), expected (160, 6)" in refused("lm_head", {"group_size": 32, "bits": 4})
    for wrong in ({"group_size": 48}, {"group_size": 0}, {"group_size": "64"}, {"bits": 7}, {"mode": "fp4"}):
        assert "quantization of lm_head cannot be honoured" in refused("lm_head", wrong, ConfigError)
    assert "quantization of lm_head is 4, expected" in refused("lm_head", 4, ConfigError)
    assert "quantization of lm_head" in refused("lm_head", {"bits": 4, "global_scale": True}, ConfigError)
    (directory / "config.json").write_text(
        json.dumps({**RAW, "quantization": {**config["quantization"], "lm_head": True}})
    )
    assert same_weights(read_model(directory), model)
    (directory / "config.json").write_text(json.dumps(RAW))
    assert "holds packed weights (lm_head.scales), but its config.json has no quantization" in refusal(directory)


# Names, shapes and types.


def test_all_mismatches_at_once_before_anything_is_loaded(tmp_path, monkeypatch):
    def change(weights):
        del weights["model.layers.1.mlp.down_proj.weight"]
        weights["model.layers.2.mlp.down_proj.weight"] = mx.zeros((192, 256))
        weights["model.norm.weight"] = mx.ones((100,))
        weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.int32)

    directory = write(tmp_path / "model", change=change)
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert refusal(directory).splitlines() == [
        f"{directory}: the weights do not fit config.json (1 missing, 1 unexpected, 1 of another shape, "
        "1 of another dtype).",
        "missing model.layers.1.mlp.down_proj.weight",
        "unexpected model.layers.2.mlp.down_proj.weight",
        "model.norm.weight: shape (100,), expected (192,)",
        "lm_head.weight: dtype I32, expected BF16 or F16 or F32",
    ]


def test_a_long_list_is_cut(tmp_path):
    directory = write(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({**RAW, "num_hidden_layers": 10}))
    lines = refusal(directory).splitlines()
    assert f"({8 * 6} missing)" in lines[0]
    assert len(lines) == 22
    assert lines[-1] == f"… and {8 * 6 - 20} more"


@pytest.mark.parametrize("layers", [20, 9_000, 100_000, 10**15])
def test_many_layers_are_refused_by_every_reader_before_any_is_made(tmp_path, monkeypatch, layers):
    directory = write(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({**RAW, "num_hidden_layers": layers}))
    monkeypatch.setattr(Phi3Model, "make_layer", lambda *_: pytest.fail("a layer was made"))
    for reader in READERS:
        with pytest.raises((CheckpointError, ConfigError), match="num_hidden_layers"):
            reader(directory)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_quantization_that_a_tool_left_when_it_dequantized_says_nothing(tmp_path, key):
    """mlx-lm packs the layers that have scales."""
    directory = write(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({**RAW, key: {"group_size": 64, "bits": 4}}))
    loaded = read_model(directory, dtype="float32")
    assert same_weights(loaded, oracle.make_ours(RAW))
    assert loaded.config.quantization is None
    convert(directory, tmp_path / "packed", bits=4, report=False)
    convert(directory, tmp_path / "floats", dequantize=True, report=False)
    assert not {"quantization", "quantization_config"} & set(json.loads((tmp_path / "floats/config.json").read_text()))
    assert read_model(tmp_path / "packed").config.quantization["bits"] == 4


def test_missing_head(tmp_path):
    assert "missing lm_head.weight" in refusal(write(tmp_path / "model", RAW, lambda w: w.pop("lm_head.weight")))


def test_inert_leftovers(tmp_path):
    def change(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((48,))
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    loaded = read_model(write(tmp_path / "model", TIED, change))
    assert same_weights(loaded, oracle.make_ours(TIED))


def test_a_head_that_is_not_the_tied_one(tmp_path):
    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(write(tmp_path / "model", TIED, change))


def test_split_projections(tmp_path):
    def change(weights):
        q, k, v = mx.split(weights.pop("model.layers.0.self_attn.qkv_proj.weight"), 3)
        for name, part in zip("qkv", (q, k, v), strict=True):
            weights[f"model.layers.0.self_attn.{name}_proj.weight"] = part

    text = refusal(write(tmp_path / "model", change=change))
    assert text.endswith(f"phi3 needs them fused; type `phi3-mlx convert {tmp_path / 'model'} -o NEW_DIRECTORY`")


# Files.


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pytorch_model.bin"], "has only pickle weights (pytorch_model.bin), and pickle is never read"),
        (["consolidated.00.pth"], "has only pickle weights (consolidated.00.pth)"),
        ([], "has no weights: looked for model.safetensors.index.json and model*.safetensors"),
        (["adapter.safetensors"], "has no weights: looked for"),
    ],
)
def test_no_weights(tmp_path, names, expected):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    for name in names:
        (tmp_path / name).touch()
    assert expected in refusal(tmp_path)


def test_no_model_directory(tmp_path):
    assert "is not a directory" in refusal(tmp_path / "absent")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(tmp_path)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write(tmp_path / "model", shards=3)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_is_missing(sharded, indexed):
    if not indexed:  # then the names of the others tell
        (sharded / INDEX).unlink()
    files = sorted(sharded.glob("*.safetensors"))
    files[1].unlink()
    said = f"{sharded} lacks {files[1].name} of its weights; download the model again"
    assert refusal(sharded) == said
    for reader in READERS:
        with pytest.raises(CheckpointError, match=re.escape(said)):
            reader(sharded)
    files[0].unlink()
    assert f"{files[0].name} and 1 more files of its weights" in refusal(sharded)
    files[2].unlink()
    assert f"{files[0].name} and 2 more files" in refusal(sharded) if indexed else "has no weights" in refusal(sharded)


def test_an_index_that_cannot_be_read(sharded):
    def refused(weight_map) -> str:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refusal(sharded)

    assert "names '../model.safetensors', which is not a file beside" in refused({"a": "../model.safetensors"})
    assert "names pytorch_model.bin, which is not a safetensors" in refused({"a": "pytorch_model.bin"})
    assert "names 3, which is not a file" in refused({"a": 3})
    assert "has no weight_map" in refused({})


def test_a_tensor_in_two_files(tmp_path):
    directory = write(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    shutil.copy(directory / "model-1.safetensors", directory / "model-2.safetensors")
    assert "model-1.safetensors and model-2.safetensors both hold model.norm.weight" in refusal(directory)


def older(path: Path) -> None:
    """The same tensors from another run."""
    arrays = {name: array + 1 for name, array in mx.load(str(path)).items()}
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)


def whole_beside_older_shards(folder: Path) -> None:
    """What save_pretrained, which does not remove other people's files, leaves of a model that was in shards."""
    whole = {name: a for file in folder.glob("*.safetensors") for name, a in mx.load(str(file)).items()}
    mx.eval(whole)
    for file in folder.glob("*.safetensors"):
        older(file)
    mx.save_safetensors(str(folder / "model.safetensors"), whole)


def whole_beside_an_older_index(folder: Path) -> None:
    whole_beside_older_shards(folder)
    for file in folder.glob("model-*.safetensors"):
        file.unlink()


def whole_beside_a_stray_shard(folder: Path) -> None:
    whole_beside_older_shards(folder)
    (folder / INDEX).unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def whole_beside_a_broken_index(folder: Path) -> None:
    whole_beside_older_shards(folder)
    (folder / INDEX).write_text("{")


def shards_beside_those_of_another_run(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00001-of-00002.safetensors")
    older(folder / "model-00001-of-00002.safetensors")


def whole_beside_a_variant(folder: Path) -> None:
    whole_beside_an_older_index(folder)
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    older(folder / "model.fp16.safetensors")


def whole_beside_original_and_consolidated_weights(folder: Path) -> None:
    whole_beside_an_older_index(folder)
    (folder / "original").mkdir()
    for other in (folder / "original" / "model.safetensors", folder / "consolidated.safetensors"):
        shutil.copy(folder / "model.safetensors", other)
        older(other)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def an_index_that_names_other_places(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(places.values()))
    moved = {name: files[(files.index(file) + 1) % 3] for name, file in places.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**moved, "ghost": files[0]}}))


def an_empty_shard(folder: Path) -> None:
    mx.save_safetensors(str(folder / "model-00004-of-00004.safetensors"), {})
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    places["nothing"] = "model-00004-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def links_of_the_hubs_cache(folder: Path) -> None:
    """A snapshot's files are links to blobs, which have no endings."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for n, file in enumerate(sorted(folder.glob("*"))):
        file.rename(blobs / f"{n:064x}")
        file.symlink_to(Path("..", "blobs", f"{n:064x}"))


LIKE_TRANSFORMERS = [
    whole_beside_older_shards,
    whole_beside_an_older_index,
    whole_beside_a_stray_shard,
    whole_beside_a_broken_index,
    shards_beside_those_of_another_run,
    whole_beside_a_variant,
    whole_beside_original_and_consolidated_weights,
    an_index_that_names_other_places,
    links_of_the_hubs_cache,
]


def the_index_of_the_original(folder: Path) -> None:
    """As in a conversion whose shards are others than those of the model it was made of."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}}))


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def a_variant_alone(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(folder / file.name.replace("model-", "model.fp16-"))
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")


@pytest.mark.parametrize(
    "lay_out", [*LIKE_TRANSFORMERS, an_empty_shard, the_index_of_the_original, no_index, a_variant_alone]
)
def test_which_files_hold_the_weights(sharded, lay_out):
    right = oracle.make_ours(RAW)
    size = model_size(sharded, "float32").weights
    lay_out(sharded)
    loaded = read_model(sharded, dtype="float32")
    assert same_weights(loaded, right)
    assert (
        model_size(sharded, "float32").weights
        == size
        == sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    )
    source = DirectorySource(sharded)
    assert mx.array_equal(source.read("model.norm.weight"), right.model.norm.weight)
    assert mx.array_equal(source.read("model.layers.1.mlp.down_proj.weight"), right.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("lay_out", LIKE_TRANSFORMERS)
def test_transformers_reads_the_same_files(sharded, lay_out):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lay_out(sharded)
    index = sharded / INDEX
    if index.exists() and lay_out is not whole_beside_a_broken_index:  # it wants a key that it does not use
        index.write_text(json.dumps({"metadata": {}, **json.loads(index.read_text())}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32).state_dict()
    for name, array in tree_flatten(read_model(sharded, dtype="float32").parameters()):
        assert np.array_equal(np.array(array), theirs[name].numpy()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_bytes_of_weights_are_those_that_are_loaded(tmp_path, dtype, mode):
    model, raw = packed(mode=mode) if mode else (oracle.make_ours(TIED), TIED)

    def change(weights):
        for name, array in weights.items():
            weights[name] = array.astype(mx.bfloat16) if array.dtype == mx.float32 else array
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((48,))  # is not kept

    directory = write(tmp_path / "model", raw, change, model)
    loaded = read_model(directory, dtype=dtype)
    assert model_size(directory, dtype).weights == sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))


def test_a_plan_of_weights_that_do_not_fit_is_refused_as_the_model_is(tmp_path):
    for change in (
        lambda weights: weights.clear() or weights.update(other=mx.ones((3,))),
        lambda weights: weights.pop("model.norm.weight"),
    ):
        directory = write(tmp_path / str(len(list(tmp_path.iterdir()))), change=change)
        with pytest.raises(CheckpointError) as caught:
            model_size(directory)
        assert str(caught.value) == refusal(directory)


def test_a_file_without_tensors_is_no_model(tmp_path):
    directory = write(tmp_path / "model", change=lambda weights: weights.clear())
    assert "model.safetensors holds no tensors" in refusal(directory)


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


BROKEN = {
    "empty": b"",
    "stub": b"\0\0\0",
    "html": b"<html><body>Not found, sorry</body></html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n",
    "cut in the header": safetensors({"a": entry(0, 8)}, bytes(8))[:40],
    "cut in the data": safetensors({"a": entry(0, 8)}, bytes(7)),
    "a byte too many": safetensors({"a": entry(0, 8)}, bytes(9)),
    "header not JSON": safetensors(b"{]"),
    "header with NaN": safetensors({"a": {**entry(0, 8), "more": float("nan")}}, bytes(8)),
    "header not text": safetensors(b"\xff\xfe"),
    "header nested too deep": safetensors(b"[" * 100_000),
    "header a list": safetensors([1]),
    "header too long": safetensors(b"", length=2**40),
    "hole": safetensors({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "overlap": safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "late start": safetensors({"a": entry(4, 12)}, bytes(12)),
    "shape too small": safetensors({"a": entry(0, 8, (1,))}, bytes(8)),
    "shape too large": safetensors({"a": entry(0, 8, (2**70, 2**70))}, bytes(8)),
    "backwards": safetensors({"a": entry(8, 0)}, bytes(8)),
    "negative": safetensors({"a": entry(-8, 0)}, bytes(8)),
    "negative shape": safetensors({"a": entry(0, 8, (-1, -2))}, bytes(8)),
    "fraction": safetensors({"a": entry(0, 8, (2.0,))}, bytes(8)),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "three offsets": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "entry no object": safetensors({"a": 3}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    (tmp_path / "model.safetensors").write_bytes(content)
    text = refusal(tmp_path)
    assert text.startswith(f"{tmp_path / 'model.safetensors'} ")
    assert text.endswith("; download it again")
    assert "\n" not in text


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((3, 2)), "b": mx.ones((5,), mx.bfloat16), "c": mx.array(1)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="download it again"):
            read_header(path)


def test_damaged_headers_are_never_misread(tmp_path):
    """A changed byte in the header: refused, or read as the safetensors library reads it."""
    safe_open = pytest.importorskip("safetensors").safe_open
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((3, 2)), "b": mx.ones((5,), mx.bfloat16), "c": mx.array(1)})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    accepted = 0
    for place in range(8 + length):
        broken = bytearray(whole)
        broken[place] = rng.choice(list(b'0123456789{}[],:" aF'))
        path.write_bytes(broken)
        try:
            ours = read_header(path)
        except CheckpointError:
            continue
        accepted += 1
        if not {tensor.dtype for tensor in ours.values()} <= {"F32", "BF16", "F16", "I32"}:
            continue  # a type of another version's; the comparison with the config refuses it
        with safe_open(path, "np") as theirs:
            assert ours.keys() == set(theirs.keys())
            for name, tensor in ours.items():
                assert list(tensor.shape) == theirs.get_slice(name).get_shape()
    assert 0 < accepted < length / 2


def test_header_of_a_real_file(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {"a": mx.ones((3, 2)), "s": mx.array(1.0), "e": mx.zeros((0, 4)), "p": mx.ones((2,), mx.uint32)}
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    header = read_header(path)
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in header.items()} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    assert header["p"].dtype == "U32"
