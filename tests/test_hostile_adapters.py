"""Adapter folders and PEFT's, whose numbers are of the wrong type, out of every range, or NaN."""

import json
import time

import mlx.core as mx
import pytest
from test_tuning_adapters import make_adapter
from tuning_models import make_directory

from phi3_mlx import load
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.errors import AdapterError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def adapter(base, tmp_path):
    make_adapter(base, tmp_path / "adapter", targets=("o_proj",))
    return tmp_path / "adapter"


@pytest.fixture
def foreign(adapter, tmp_path):
    export_peft(adapter, tmp_path / "peft")
    return tmp_path / "peft"


def set_in(folder, *way, value):
    """Change one value of an adapter_config.json."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    inner = config
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), 1e5, -1e30, 10**30, True, "2", None, [2.0]], ids=lambda scale: repr(scale)
)
def test_a_scale_that_no_float16_holds_is_refused(base, adapter, scale):
    set_in(adapter, "lora_parameters", "scale", value=scale)
    with pytest.raises(AdapterError, match=r"adapter_config.json: lora_parameters.scale is "):
        load(str(base), adapter=adapter)


@pytest.mark.parametrize("parameters", [-1, "x", [1], True])
def test_parameters_that_are_no_object_are_refused(base, adapter, parameters):
    set_in(adapter, "lora_parameters", value=parameters)
    with pytest.raises(AdapterError, match=r"lora_parameters is .*, expected an object"):
        load(str(base), adapter=adapter)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: a * mx.nan, "not all finite floats"),
        (lambda a: a * mx.inf, "not all finite floats"),
        (lambda a: a.astype(mx.int32), "not all finite floats"),
        (lambda a: a.astype(mx.complex64), "not all finite floats|cannot be read"),
        (lambda a: a[None], "the layer turns"),
        (lambda a: a[0], "the layer turns"),
    ],
)
def test_arrays_that_are_no_weights_are_refused(base, adapter, foreign, tmp_path, change, why):
    for folder, name in ((adapter, "adapters.safetensors"), (foreign, "adapter_model.safetensors")):
        arrays = mx.load(str(folder / name))
        first = sorted(arrays)[0]
        arrays[first] = change(arrays[first])
        mx.save_safetensors(str(folder / name), arrays)
    with pytest.raises(AdapterError, match=why):
        load(str(base), adapter=adapter)
    with pytest.raises(AdapterError, match=f"{why}|lora_A|lora_B"):
        import_peft(foreign, tmp_path / "out", str(base))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "x"),
        ("lora_alpha", [None]),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e308),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("r", 0),
        ("r", -1.5),
        ("r", "8"),
        ("r", 10**30),
        ("use_rslora", "yes"),
        ("rank_pattern", 5),
        ("rank_pattern", {"o_proj": 0}),
        ("alpha_pattern", {"o_proj": "x"}),
        ("alpha_pattern", {"o_proj": float("inf")}),
        ("alpha_pattern", {"(": 8}),
    ],
)
def test_settings_of_peft_of_another_type_are_refused_by_name(base, foreign, tmp_path, key, value):
    set_in(foreign, key, value=value)
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {key}.* is .*, expected "):
        import_peft(foreign, tmp_path / "out", str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pattern",
    [
        *("(.*)*x", "(.|.)*x", "(a|aa)+$", "((.+)+)+x", ".*.*.*.*.*.*x", r"(\w{1,9}){1,9}x"),
        *(".?" * 30 + "x", "(.|.)" * 30 + "x", "(" * 2000 + "x" + ")" * 2000),
    ],
)
def test_a_pattern_that_takes_for_ever_is_refused_at_once(base, foreign, tmp_path, pattern):
    set_in(foreign, "alpha_pattern", value={pattern: 8})
    started = time.perf_counter()
    with pytest.raises(AdapterError, match="a pattern that repeats little"):
        import_peft(foreign, tmp_path / "out", str(base))
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    "pattern",
    [
        *("o_proj", r".*\.(o|q)_proj", r"model\.layers\.\d+\..*_proj", "^model.layers.[01].self"),
        r"model\.layers\.(\d|[12]\d?)\.(?:self_attn|mlp)\.(o|down)_(proj)",
        "model.*?layers.*?self_attn.+?o_proj",
    ],
)
def test_patterns_as_peft_writes_them_are_matched(base, foreign, tmp_path, pattern):
    scales = []
    for n, alpha in enumerate((3.0, 6.0)):
        set_in(foreign, "alpha_pattern", value={pattern: alpha})
        import_peft(foreign, tmp_path / f"out{n}", str(base))
        config = json.loads((tmp_path / f"out{n}" / "adapter_config.json").read_text())
        scales.append(config["lora_parameters"]["scale"])
    matched = pattern != "^model.layers.[01].self"  # a whole name is asked for
    assert scales == ([1.0, 2.0] if matched else [2.0, 2.0])


def test_an_export_reads_its_settings_by_type(adapter, tmp_path):
    for way, value in ((("phi3_mlx", "rslora"), "yes"), (("lora_parameters", "dropout"), 7)):
        before = (adapter / "adapter_config.json").read_text()
        set_in(adapter, *way, value=value)
        with pytest.raises(AdapterError, match=rf"{'.'.join(way)} is "):
            export_peft(adapter, tmp_path / "out")
        (adapter / "adapter_config.json").write_text(before)
