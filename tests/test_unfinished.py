"""Fitting that was cut goes on layer by layer, and ends with the same bytes as a run that was not."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import weakref
from functools import partial

import mlx.core as mx
import moe_models
import oracle
import pytest
from conftest import ROOT, long_after
from quality_models import RandomSource, arrays_of, random_ids, small_directory
from test_tuning_adapters import make_adapter

from phi3_mlx import convert, fuse
from phi3_mlx.cli import main
from phi3_mlx.conversion import calibrating, endtoend, own_text, planning, sensitivity
from phi3_mlx.conversion.calibrating import Calibration, GptqSteps, calibrated, calibrated_in
from phi3_mlx.conversion.distillation import distilled
from phi3_mlx.conversion.fitted_steps import FittedSteps
from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.recipes import left_alone, uniform
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.conversion.unfinished import FITTED, DiskUse, claim, left_to_keep
from phi3_mlx.conversion.writer import DirectorySink
from phi3_mlx.errors import CheckpointError, OptionError

IDS = random_ids(4 * 256, 64)
NARROW = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32}
SOURCES = {
    "head": {**oracle.BASE, **NARROW},
    "tied": {**oracle.BASE, **NARROW, "tie_word_embeddings": True},
    "experts": {**moe_models.RAW, **NARROW, "num_local_experts": 2, "rope_scaling": None},
}


@pytest.fixture
def quick(monkeypatch):
    """Fitting without what takes most of its time: the search for a damping, and further sweeps."""
    monkeypatch.setattr(calibrating, "GptqSteps", partial(GptqSteps, damping=False, sweeps=1))


class Cut(Exception):
    pass


def parts_of(name):
    source = RandomSource("BF16", **SOURCES[name])
    return source, Layout.of(source, uniform(4, 32) | left_alone(source.config))


def count_steps(monkeypatch):
    """The steps that are really made, by name."""
    made, step = [], FittedSteps.keep
    monkeypatch.setattr(
        FittedSteps, "keep", lambda self, name, *given: (made.append(name), step(self, name, *given))[1]
    )
    return made


@pytest.mark.parametrize("name", SOURCES)
def test_each_step_is_made_once_whatever_is_cut(name, tmp_path, quick, monkeypatch):
    """Cut behind each step's own file, before the text behind it is kept: that step alone is made anew."""
    source, layout = parts_of(name)
    whole = calibrated(source, layout, IDS)
    expected = arrays_of(layout, whole)
    write = FittedSteps._write
    made = count_steps(monkeypatch)
    steps = ["model.embed_tokens", "layer-0", "layer-1", *([] if name == "tied" else ["lm_head"])]

    def cut(self, file, *given):
        if file == "text" and made[-1] not in met:
            met.add(made[-1])
            raise Cut
        write(self, file, *given)

    met = set()
    monkeypatch.setattr(FittedSteps, "_write", cut)
    for step in steps:
        with pytest.raises(Cut):
            arrays_of(layout, calibrated_in(tmp_path, source, layout, IDS))
        assert made[-1] == step
    calibration = calibrated_in(tmp_path, source, layout, IDS)
    found = arrays_of(layout, calibration)
    assert made == [step for step in steps for _ in range(2)]
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    assert calibration.fits == whole.fits
    assert mx.array_equal(calibration.source_hidden, whole.source_hidden)


def test_a_text_with_nothing_held_out_is_kept_too(tmp_path, quick, monkeypatch):
    source, layout = parts_of("head")
    expected = arrays_of(layout, calibrated(source, layout, IDS[:256]))
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_pack_layer", cut_at(1))
        with pytest.raises(Cut):
            arrays_of(layout, calibrated_in(tmp_path, source, layout, IDS[:256]))
    found = arrays_of(layout, calibrated_in(tmp_path, source, layout, IDS[:256]))
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def cut_at(layer, error=Cut):
    """`Calibration._pack_layer` that raises at a layer."""
    pack = Calibration._pack_layer

    def packed(self, i):
        if i == layer:
            raise error
        pack(self, i)

    return packed


def test_a_distillation_that_is_cut_while_it_packs_goes_on_at_that_layer(tmp_path, quick, monkeypatch):
    source, layout = parts_of("head")
    (tmp_path / "work").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_pack_layer", cut_at(1))
        with pytest.raises(Cut):
            distilled(source, layout, IDS, tmp_path / "work")
    made = count_steps(monkeypatch)
    rounder, fits, gain = distilled(source, layout, IDS, tmp_path / "work")
    assert made == ["layer-1", "lm_head"]
    assert not (tmp_path / "work" / "fitted").exists()  # it is in the packed model
    (tmp_path / "whole").mkdir()
    whole, whole_fits, whole_gain = distilled(source, layout, IDS, tmp_path / "whole")
    assert (fits, gain) == (whole_fits, whole_gain)
    found, expected = arrays_of(layout, rounder), arrays_of(layout, whole)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


KILLED = """
import os, signal, sys
from phi3_mlx import convert
from phi3_mlx.conversion import own_text
from phi3_mlx.conversion.calibrating import Calibration

own_text.OWN_TOKENS = 1024
pack = Calibration._pack_layer

def packed(self, i):
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    pack(self, i)

Calibration._pack_layer = packed
convert(sys.argv[1], sys.argv[2], bits=3, method=sys.argv[3], report=False, calibration="self")
"""


@pytest.mark.parametrize("method", long_after(1, ["distill", "gptq"]))
def test_a_conversion_that_was_killed_goes_on_and_ends_with_the_same_bytes(method, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "OWN_TOKENS", 1024)
    small = small_directory(tmp_path / "source")
    options = {"method": method, "report": False, "calibration": "self"}
    arguments = [sys.executable, "-c", KILLED, str(small), str(tmp_path / "killed"), method]
    run = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    work = tmp_path / "killed.unfinished"
    assert {path.name for path in work.iterdir()} >= {"fitted", "own_text.json"}
    with pytest.raises(OptionError, match="other arguments"):
        convert(small, tmp_path / "killed", bits=4, **options)
    made = count_steps(monkeypatch)
    convert(small, tmp_path / "killed", bits=3, **options)
    assert made[0] == "layer-1"
    assert not work.exists()
    convert(small, tmp_path / "whole", bits=3, **options)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_that_was_killed_before_its_first_step_is_in_nobodys_way(tmp_path):
    claim(tmp_path, "one", False)
    claim(tmp_path, "two", False)
    (tmp_path / FITTED).mkdir()
    claim(tmp_path, "two", False)
    with pytest.raises(OptionError, match="other arguments"):
        claim(tmp_path, "one", False)
    assert (tmp_path / FITTED).exists()
    claim(tmp_path, "one", True)
    assert not (tmp_path / FITTED).exists()


@pytest.mark.parametrize(("method", "kept"), [("gptq", True), ("round", False)])
def test_ctrl_c_says_where_what_is_done_is_kept(method, kept, tmp_path, quick, monkeypatch, capsys):
    small = small_directory(tmp_path / "source")
    (tmp_path / "made.unfinished").mkdir()  # which a run that rounds leaves alone
    monkeypatch.setattr(Calibration, "_pack_layer", cut_at(1, KeyboardInterrupt))
    if not kept:
        monkeypatch.setattr(DirectorySink, "write", lambda *_: cut())
    with pytest.raises(SystemExit) as done:
        main(["convert", str(small), "-o", str(tmp_path / "made"), "--method", method, "--no-report"])
    assert done.value.code == 130
    note = f"{tmp_path / 'made.unfinished'} keeps what is done; the same command goes on from there"
    assert (note in capsys.readouterr().err) == kept


def cut():
    raise KeyboardInterrupt


def test_a_fusion_goes_on_at_the_layer_where_it_was_cut(tmp_path, quick, monkeypatch):
    packed = convert(small_directory(tmp_path / "source"), tmp_path / "packed", report=False).path
    make_adapter(packed, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_pack_layer", cut_at(1))
        with pytest.raises(Cut):
            fuse(tmp_path / "adapter", tmp_path / "made", method="gptq")
    made = count_steps(monkeypatch)
    fuse(tmp_path / "adapter", tmp_path / "made", method="gptq")
    assert made[0] == "layer-1"
    fuse(tmp_path / "adapter", tmp_path / "whole", method="gptq")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "whole"))
    assert a == b


def test_the_text_behind_what_is_done_is_not_held_twice(tmp_path):
    """Only the calibration has it, which replaces it layer by layer."""
    halves = [mx.ones((3, 8, 4)), mx.ones((1, 8, 4))]
    FittedSteps(tmp_path / "fitted").keep("layer-0", {}, [], halves, halves)
    kept = FittedSteps(tmp_path / "fitted")
    text = kept.text()
    assert all(mx.array_equal(half, one) for both in text for half, one in zip(both, halves, strict=True))
    held = [weakref.ref(half) for both in text for half in both]
    del text
    gc.collect()
    assert [half() for half in held] == [None] * 4


def test_room_on_the_disk_is_for_what_is_kept_until_the_model_is_complete_too(tmp_path, monkeypatch):
    small, usage = small_directory(tmp_path / "source"), shutil.disk_usage(tmp_path)
    size = convert(small, tmp_path / "plain", report=False).bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**7 + 3 * size // 2))
    monkeypatch.setattr(calibrating, "calibrated", lambda *_, **__: pytest.fail("it is fitted"))
    for method in ("gptq", "distill"):
        with pytest.raises(CheckpointError, match=r"the model takes .* of it until it is complete; free some space"):
            convert(small, tmp_path / "made", method=method, report=False)
    assert not (tmp_path / "made.unfinished").exists()
    (tmp_path / "work").mkdir()
    assert left_to_keep(tmp_path / "work", DiskUse(100, 0)) == 100
    FittedSteps(tmp_path / "work" / "fitted").keep("layer-0", {}, [], [], [])
    assert 0 < left_to_keep(tmp_path / "work", DiskUse(1000, 0)) < 1000
    assert left_to_keep(tmp_path / "work", DiskUse(20, 0)) == left_to_keep(None, DiskUse(100, 0)) == 0


@pytest.mark.parametrize("method", ["gptq", "distill"])
def test_what_a_run_takes_of_the_disk_is_what_was_planned(method, tmp_path, quick, monkeypatch):
    """Also while a file is replaced by a newer one, with a checkpoint after every step."""
    source = RandomSource("BF16", **{**SOURCES["head"], "hidden_size": 128, "intermediate_size": 256})
    layout = Layout.of(source, uniform(4, 32))
    most, save = 0, mx.save_safetensors

    def saved(file, arrays, **more):
        nonlocal most
        save(file, arrays, **more)
        file.flush()
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))

    monkeypatch.setattr(mx, "save_safetensors", saved)
    monkeypatch.setattr(endtoend, "_CHECKPOINT_EVERY", 0)
    planned = planning.kept_on_disk(source, layout, layout.nbytes, len(IDS), method).most(packed=False)
    if method == "gptq":
        arrays_of(layout, calibrated_in(tmp_path, source, layout, IDS))
    else:
        arrays_of(layout, distilled(source, layout, IDS, tmp_path)[0])
    names = 10**5  # headers, whose size is that of their names
    assert 0.8 * planned < most < planned + names


def test_a_run_with_other_arguments_is_refused_before_anything_is_written_or_measured(tmp_path, quick, monkeypatch):
    """What was asked tells it, not only what hours of work made of it."""
    small, made, text = small_directory(tmp_path / "source"), tmp_path / "made", bundled("calibration")[:4000]
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_pack_layer", cut_at(1))
        with pytest.raises(Cut):
            convert(small, made, method="gptq", calibration=text, report=False)
    for work in ("_written", "write_own_text"):
        monkeypatch.setattr(own_text, work, lambda *_, **__: pytest.fail("a text is written"))
    monkeypatch.setattr(sensitivity, "choose_recipe", lambda *_, **__: pytest.fail("bits are measured"))
    for other in (
        {"method": "gptq", "calibration": "self"},
        {"method": "gptq", "calibration": text, "target_bpw": 4.5},
        {"method": "gptq", "calibration": text[1:]},
        {"method": "gptq", "calibration": text, "bits": 3},
        {"method": "gptq", "calibration": text, "dtype": "float32"},
        {"method": "distill", "calibration": text},
    ):
        with pytest.raises(OptionError, match="is of a run with other arguments"):
            convert(small, made, report=False, **other)
    assert (tmp_path / "made.unfinished" / "fitted" / "layer-0.safetensors").exists()
    steps = count_steps(monkeypatch)
    convert(small, made, method="gptq", calibration=text, report=False, bits=4)  # the same by other words
    assert steps[0] == "layer-1"


def test_what_was_asked_is_kept_beside_the_key_of_the_run(tmp_path):
    claim(tmp_path, "ours", False, name="asked")
    claim(tmp_path, "one", False)
    (tmp_path / FITTED).mkdir()
    claim(tmp_path, "ours", False, name="asked")
    claim(tmp_path, "one", False)
    with pytest.raises(OptionError, match="other arguments"):
        claim(tmp_path, "another's", False, name="asked")
    with pytest.raises(OptionError, match="other arguments"):
        claim(tmp_path, "two", False)
    assert (tmp_path / FITTED).exists()
    claim(tmp_path, "another's", True, name="asked")
    assert not (tmp_path / FITTED).exists()
    claim(tmp_path, "two", False)


def test_a_place_where_nothing_can_be_kept_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    small = small_directory(tmp_path / "source")
    for place in (tmp_path / "file" / "made", tmp_path / "taken"):
        (tmp_path / "taken.unfinished").write_text("")
        with pytest.raises(
            CheckpointError, match=r"made cannot be written: .* to keep what is done\); name another|taken cannot"
        ):
            convert(small, place, method="gptq", report=False)


def test_a_file_that_is_damaged_is_named_with_the_way_out(tmp_path):
    source, layout = parts_of("head")
    arrays_of(layout, calibrated_in(tmp_path, source, layout, IDS[:256]))
    (tmp_path / "fitted" / "layer-0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"layer-0\.safetensors cannot be read .*; remove .*fitted"):
        arrays_of(layout, calibrated_in(tmp_path, source, layout, IDS[:256]))
