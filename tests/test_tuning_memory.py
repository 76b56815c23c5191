"""What adapters take of memory: fusing is planned before anything is read, import and export read no model."""

import gc

import mlx.core as mx
import pytest
from click.testing import CliRunner
from conftest import long_after
from peaks import peak_of
from test_tuning_adapters import make_adapter
from tuning_models import make_directory

from phi3_mlx import convert, memory_limit
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.cli import cli
from phi3_mlx.conversion import effect
from phi3_mlx.conversion import fuse as fusing
from phi3_mlx.conversion.adapted import AdaptedSource
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.engine import plan
from phi3_mlx.errors import MemoryLimitError, PromptError

SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {bits: make_directory(folder / str(bits), bits=bits, **SHAPE) for bits in (None, 4)}
    convert(made[None], folder / "half", dequantize=True, dtype="bfloat16")
    return {**made, "bfloat16": folder / "half"}


def planned_over_peak(monkeypatch, work):
    """What the first plan of `work(attempt)` counts, over what it takes at most, and least, in four attempts."""
    planned, check_room = [], plan.check_room

    def watch(what, parts, way_out):
        planned.append(sum(parts.values()))
        check_room(what, parts, way_out)

    monkeypatch.setattr(plan, "check_room", watch)
    peaks = [peak_of(lambda attempt=attempt: work(attempt)) for attempt in range(4)]
    return planned[0] / max(peaks), planned[0] / min(peaks)


@pytest.mark.parametrize(
    ("base", "options", "adapter"),
    [
        (None, {"dtype": "bfloat16"}, {"dora": True}),
        ("bfloat16", {}, {}),
        (4, {"dequantize": True, "dtype": "bfloat16"}, {"targets": ("down_proj",)}),  # the embedding takes most
        *long_after(
            0,
            [
                (None, {"dtype": "float32"}, {}),
                (None, {"dtype": "bfloat16"}, {}),
                ("bfloat16", {}, {"dora": True}),
                ("bfloat16", {"dtype": "float32"}, {}),
                (4, {}, {}),
                (4, {"bits": 8}, {"dora": True}),
                (4, {"dequantize": True, "dtype": "float32"}, {}),
            ],
        ),
    ],
)
def test_a_fusion_is_planned_as_it_turns_out(base, options, adapter, models, tmp_path, monkeypatch):
    make_adapter(models[base], tmp_path / "a", **adapter)
    least, most = planned_over_peak(monkeypatch, lambda i: fuse(tmp_path / "a", tmp_path / f"m{i}", **options))
    assert most > 0.9
    assert least < 1.35


@pytest.mark.parametrize("targets", [("qkv_proj",), ("gate_up_proj", "down_proj")], ids=["small", "large"])
@pytest.mark.parametrize("mode", long_after(2, ["affine", "mxfp4", "mxfp8", "nvfp4"]))
def test_what_is_quantized_again_is_planned_without_the_measurement_too(mode, targets, models, tmp_path, monkeypatch):
    """In which the model's memory hides that of a matrix, and slices in other modes than affine that of a small one.

    Half of a small matrix's memory are slices on their way, which a thread that keeps up never holds at once.
    """
    base = tmp_path / "base"
    convert(models[None], base, mode=mode, report=False)
    make_adapter(base, tmp_path / "a", targets=targets)
    monkeypatch.setattr(AdaptedSource, "rounds_adapters", False)
    least, most = planned_over_peak(monkeypatch, lambda i: fuse(tmp_path / "a", tmp_path / f"m{i}"))
    assert most > 0.95
    assert least < (1.4 if "down_proj" in targets else 2.2)


def test_a_fusion_that_does_not_fit_is_refused_before_the_model_is_read(models, tmp_path, monkeypatch):
    """In Python and at the terminal, each in its words; in floats it needs little; `force` tries all the same."""
    make_adapter(models[4], tmp_path / "a")
    gc.collect()
    held = mx.get_active_memory() // 1000  # kB of other tests' models, which a limit counts too
    much, little = f"{held + 40_000}kB", f"{held + 1000}kB"
    monkeypatch.setattr(effect, "read_model", lambda *a, **k: pytest.fail("was loaded"))
    refused = pytest.raises(
        MemoryLimitError,
        match=r"measuring what is left of .* needs .* \(weights .*, work .*\), and .* may be used: dequantize=True "
        r"measures nothing and needs .*, and force=True tries",
    )
    with memory_limit(much), refused:
        fuse(tmp_path / "a", tmp_path / "m")
    words = ["fuse", "--adapter", str(tmp_path / "a"), "-o", str(tmp_path / "m"), "--memory", much]
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, MemoryLimitError)
    with memory_limit(little), pytest.raises(MemoryLimitError, match=r"fusing .* needs .*a matrix at a time"):
        fuse(tmp_path / "a", tmp_path / "m", dequantize=True)
    assert not (tmp_path / "m").exists()
    with memory_limit(much):
        fuse(tmp_path / "a", tmp_path / "m", dequantize=True)
    monkeypatch.undo()
    with memory_limit(little):
        assert fuse(tmp_path / "a", tmp_path / "m", force=True).survived is not None


def test_what_the_measurement_keeps_is_counted_while_the_model_is_made(models, tmp_path, monkeypatch):
    """The text's log-probabilities: beside GPTQ, the text that the model writes, and the training."""
    make_adapter(models[4], tmp_path / "a")
    planned, held = {}, []

    def watch(what, parts, way_out):
        planned[what.split()[0]] = parts

    def made(*given):
        gc.collect()
        mx.clear_cache()
        held.append(mx.get_active_memory() - before)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "check_room", watch)
    monkeypatch.setattr(fusing, "_rounder", made)
    gc.collect()
    before = mx.get_active_memory()
    with pytest.raises(KeyboardInterrupt):
        fuse(tmp_path / "a", tmp_path / "m", method="distill", calibration="self")
    assert [*planned] == ["measuring", "letting", "training"]
    for parts in planned.values():
        kept = parts["a text's log-probabilities"]
        assert kept > 10**6
        assert 0.9 * kept < held[0] < 1.1 * (kept + parts["the adapter"]) + 10**5


def test_a_text_too_short_to_train_on_is_refused_before_the_model_is_read(models, tmp_path, monkeypatch):
    make_adapter(models[4], tmp_path / "a")
    monkeypatch.setattr(effect, "read_model", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(
        PromptError, match=r"the calibration text has .* tokens, and distilling needs 1,024; give a longer one"
    ):
        fuse(tmp_path / "a", tmp_path / "m", method="distill", calibration="Once upon a time.")
    assert not [*tmp_path.glob("m*")]


def test_import_and_export_read_no_more_than_a_matrix(models, tmp_path):
    """Of DoRA and PiSSA too, which need the base's weights."""
    whole = sum(array.nbytes for array in mx.load(str(models[None] / "model.safetensors")).values())
    largest = 2 * SHAPE["intermediate_size"] * SHAPE["hidden_size"] * 4
    make_adapter(models[None], tmp_path / "a", dora=True, rank=1)
    assert peak_of(lambda: export_peft(tmp_path / "a", tmp_path / "peft")) < 0.1 * whole
    peak = peak_of(lambda: import_peft(tmp_path / "peft", tmp_path / "b", str(models[None])))
    assert peak < 4 * largest < 0.8 * whole
