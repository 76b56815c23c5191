"""In Python, as on the command line, nothing large is read before it is sure to fit."""

import gc
import re

import mlx.core as mx
import pytest
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx import compare, convert, generate, load, load_model, memory_limit, tune
from phi3_mlx.cli import main
from phi3_mlx.errors import MemoryLimitError
from phi3_mlx.store.checkpoint import model_size

BIG = {
    "num_hidden_layers": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT = {"calibration": "A cat sat on a mat and looked at the sun. " * 40}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("memory") / "base", **BIG)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def limit(extra):
    """A bound of this many bytes beside what tests before have left in memory."""
    gc.collect()
    return memory_limit(mx.get_active_memory() + extra)


def test_a_model_that_does_not_fit_is_not_read(base):
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for call in (load, load_model):
        with limit(10**6), pytest.raises(MemoryLimitError, match=r"loading .* needs .* \(weights .*force=True"):
            call(base)
    assert mx.get_peak_memory() < before + 10**6
    with limit(10**6):
        model, _ = load(base, force=True)
        assert load_model(base, force=True).config == model.config


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_takes_what_was_planned(stored, tmp_path, base):
    model = tmp_path / "model"
    convert(base, model, dequantize=True, dtype=stored)
    weights = model_size(model).weights
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_model(model)
    taken = mx.get_peak_memory() - before
    del loaded
    assert weights <= taken
    words = "as it is stored" if stored == "bfloat16" else "weights"
    with limit(taken - 10**5), pytest.raises(MemoryLimitError, match=words):
        load_model(model)
    with limit(int(taken * 1.25)):  # the largest may be read when not all others are there yet
        load_model(model)


def test_an_adapter_counts_with_its_model(base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", facts(10))
    tune(str(base), data, tmp_path / "adapter", steps=1, batch_size=1, rank=64)
    needed = model_size(base).weights
    assert (tmp_path / "adapter" / "adapters.safetensors").stat().st_size > 200_000
    with limit(needed + 100_000):
        load(base)
        with pytest.raises(MemoryLimitError):
            load(base, adapter=tmp_path / "adapter")
        load(base, adapter=tmp_path / "adapter", force=True)


def test_models_are_compared_where_there_is_room(tiny):
    arguments = (*tiny, *tiny, "A cat sat on a mat and looked at the sun.")
    with limit(10**6):
        with pytest.raises(MemoryLimitError, match=r"comparing them needs .*force=True"):
            compare(*arguments, window=16)
        found = compare(*arguments, window=16, force=True)
    assert found.kl == pytest.approx(0, abs=1e-6)
    with pytest.raises(MemoryLimitError), memory_limit(1):
        generate(*tiny, "Hello")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"dequantize": True, "dtype": "float16"},
        {"method": "gptq", **TEXT},
        {"target_bpw": 4.5, **TEXT},
        pytest.param({"target_bpw": 4.5, "method": "gptq", **TEXT}, marks=pytest.mark.long),
    ],
    ids=["rounded", "cast", "gptq", "measured", "measured by GPTQ"],
)
def test_conversions_take_what_was_planned(options, base, tmp_path):
    output = tmp_path / "out"
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(base, output, report=False, **options)
    taken = mx.get_peak_memory() - before
    with pytest.raises(MemoryLimitError, match=r"converting .* needs .*force=True") as refused, limit(taken // 2):
        convert(base, tmp_path / "refused", report=False, **options)
    assert not list(tmp_path.glob("*refused*"))
    amount, unit = re.search(r"needs ([\d.]+) (MB|kB)", str(refused.value)).groups()
    assert 0.95 * taken < float(amount) * {"MB": 1e6, "kB": 1e3}[unit] < 4 * taken
    with limit(taken // 2):
        convert(base, output, report=False, force=True, **options)


def test_the_command_line_says_it_with_its_options(base, tmp_path, capsys):
    with limit(10**6), pytest.raises(SystemExit) as done:
        main(["convert", str(base), "-o", str(tmp_path / "out"), "--method", "gptq"])
    assert done.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "take --method round" in error
    assert error.rstrip().endswith("and --force tries all the same")
