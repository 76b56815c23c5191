"""A layout says what is written before it is made, and the sink asks for it in that order, one tensor in memory."""

import json

import mlx.core as mx
import pytest
from quality_models import RandomSource, arrays_of
from test_tuning_adapters import make_adapter
from tuning_models import make_directory

from phi3_mlx import convert
from phi3_mlx.adapters.lora import Adapter
from phi3_mlx.conversion.adapted import AdaptedSource
from phi3_mlx.conversion.checked import CheckedSource
from phi3_mlx.conversion.directory import DirectorySource
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.recipes import uniform
from phi3_mlx.conversion.rounding import pack, rounded
from phi3_mlx.conversion.sources import to_mlx
from phi3_mlx.conversion.writer import DirectorySink
from phi3_mlx.errors import OptionError
from phi3_mlx.models import parse_config
from phi3_mlx.store.safetensors import find_weights

QKV, DOWN = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"


def change_of(shape):
    return Adapter(mx.ones((shape[1], 1)) * 0.1, mx.ones((1, shape[0])) * 0.1, 1.0)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_what_is_made_has_the_names_shapes_and_types_of_the_layout(mode):
    source = RandomSource("BF16", num_hidden_layers=1)
    layout = Layout.of(source, uniform(mode=mode))
    made = arrays_of(layout, rounded(source))
    assert list(made) == list(layout.stored)
    for name, tensor in layout.stored.items():
        assert (made[name].shape, made[name].dtype, made[name].nbytes) == (
            tensor.shape,
            to_mlx(tensor.dtype),
            tensor.nbytes,
        ), name
    assert layout.nbytes == sum(array.nbytes for array in made.values())


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_packing_takes_little_memory_beside_the_matrix_in_any_mode(mode):
    """MLX's CPU backend makes twenty copies in some modes: the rows are packed a few at a time, to the same bits."""
    weight = mx.random.normal((4096, 1024), key=mx.random.key(0))
    whole = mx.quantize(weight, **uniform(mode=mode))
    mx.eval(weight, whole)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    parts = pack(weight, uniform(mode=mode))
    assert mx.get_peak_memory() - before < 3 * weight.nbytes
    assert all(mx.array_equal(part, expected) for part, expected in zip(parts, whole, strict=True))


def test_a_recipe_that_packs_nothing_is_refused_and_none_is_not():
    source = RandomSource(num_hidden_layers=1)
    off = {f"{name.removesuffix('.weight')}": False for name, t in source.tensors.items() if len(t.shape) > 1}
    with pytest.raises(OptionError, match="mine: groups of 64 divide no layer's width"):
        Layout.of(source, uniform() | off, "mine")
    assert Layout.of(source, None).packings == {}


def test_an_entry_of_a_recipe_may_say_that_a_layer_is_packed_as_usual_or_not_at_all():
    source = RandomSource(num_hidden_layers=1)
    usual = Layout.of(source, uniform()).packings
    assert Layout.of(source, uniform() | {QKV: True}).packings == usual
    assert {*usual} - {*Layout.of(source, uniform() | {QKV: False}).packings} == {f"{QKV}.weight"}


def test_a_sink_asks_for_each_entry_once_in_order_and_writes_what_the_header_says(tmp_path):
    source = RandomSource(num_hidden_layers=1)
    layout = Layout.of(source, uniform())
    asked = []

    def watched(entry):
        asked.append(entry.name)
        return rounded(source)(entry)

    sink = DirectorySink(tmp_path)
    sink.write(layout, watched)
    sink.write_config({"model_type": "phi3"}, layout)
    assert asked == list(source.tensors)
    assert find_weights(tmp_path).tensors == layout.stored
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == layout.recipe


def test_an_array_that_is_not_the_layouts_ends_the_writing(tmp_path):
    source = RandomSource(num_hidden_layers=1)
    with pytest.raises(AssertionError, match=r"embed_tokens.weight is .* and the header says"):
        DirectorySink(tmp_path).write(Layout.of(source, None), lambda entry: [source.read(entry.name)[:1]])


def test_a_fusion_dequantizes_the_layers_it_changes_and_no_others(tmp_path):
    directory = make_directory(tmp_path / "base", bits=4)
    base = DirectorySource(directory)
    source = AdaptedSource(base, adapters={QKV: change_of(base.dequantized[f"{QKV}.weight"].shape)}, bits=8)
    layout = source.layout()
    assert layout.packings[f"{QKV}.weight"]["bits"] == layout.recipe[QKV]["bits"] == 8
    assert layout.packings[f"{DOWN}.weight"]["bits"] == layout.recipe["bits"] == 4
    dequantized = []
    source.read = lambda name: dequantized.append(name) or AdaptedSource.read(source, name)
    made = arrays_of(layout, rounded(source))
    packed = [name for name in dequantized if name in base.packings]
    assert packed == [f"{QKV}.weight"]
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(made[f"{DOWN}.{part}"], base.load(f"{DOWN}.{part}"))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_sources_config_is_what_its_keys_say(bits, tmp_path):
    base = DirectorySource(make_directory(tmp_path / "base", bits=bits))
    sources = [
        base,
        CheckedSource(base),
        CheckedSource(base, dtype="float16"),
        AdaptedSource(base),
        AdaptedSource(base, dequantize=True),
        AdaptedSource(base, dequantize=True, dtype="bfloat16"),
    ]
    for source in sources:
        assert source.config == parse_config(source.raw_config)
    assert [source.config.dtype for source in sources] == [
        "float32",
        "float32",
        "float16",
        *["float32"] * 2,
        "bfloat16",
    ]


def test_of_two_dtypes_in_a_config_the_newer_key_counts(tmp_path):
    """As in transformers."""
    directory = make_directory(tmp_path / "base")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "torch_dtype": "float16", "dtype": "bfloat16"}))
    convert(directory, tmp_path / "new", dequantize=True)
    assert {tensor.dtype for tensor in find_weights(tmp_path / "new").tensors.values()} == {"BF16"}


def test_bits_of_a_fusion_are_for_the_changed_layers_that_are_packed(tmp_path):
    """Groups of 64 do not divide 96 inputs: a layer of so many is in floats, and stays so."""
    convert(make_directory(tmp_path / "plain"), tmp_path / "base", bits=4, group_size=64, report=False)
    make_adapter(tmp_path / "base", tmp_path / "a")
    fuse(tmp_path / "a", tmp_path / "fused", bits=8)
    quantization = json.loads((tmp_path / "fused" / "config.json").read_text())["quantization"]
    assert quantization[QKV]["bits"] == 8
    assert DOWN not in quantization
    stored = find_weights(tmp_path / "fused").tensors
    assert (stored[f"{QKV}.weight"].dtype, stored[f"{DOWN}.weight"].dtype) == ("U32", "F32")
    before, after = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("base", "fused"))
    assert not mx.array_equal(before[f"{DOWN}.weight"], after[f"{DOWN}.weight"])


def test_a_fusion_keeps_the_names_and_the_order_of_the_bases_files(tmp_path):
    base = make_directory(tmp_path / "base", bits=4)
    make_adapter(base, tmp_path / "a")
    fuse(tmp_path / "a", tmp_path / "fused")
    before, after = (find_weights(path).tensors for path in (base, tmp_path / "fused"))
    weights = [name for name in before if not name.endswith((".scales", ".biases"))]
    assert [name for name in after if name in weights] == weights
    assert after == before
