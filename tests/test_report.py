"""The report of a conversion: its figures are those of the whole models, its files say the same."""

import io
import json
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from quality_models import stories, trained, write_model

from phi3_mlx import load
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.recipes import uniform
from phi3_mlx.conversion.report import memory_needed, table, write_report
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.errors import PromptError
from phi3_mlx.evaluation.quality import compare
from phi3_mlx.store.checkpoint import read_model

TEXT = stories("sample")[:600]
MIXED = {**uniform(4, 64), "model.layers.2.mlp.down_proj": uniform(2, 32), "model.layers.4.self_attn.o_proj": False}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(source, directory, report) of the bundled weights after a conversion."""
    source, _ = trained()
    directory = write_model(tmp_path_factory.mktemp("report") / "model", source, MIXED, rounded(source))
    done = []
    report = write_report(
        directory, source, text=TEXT, text_name="a story", window=64, progress=lambda *n: done.append(n)
    )
    assert done == [(i, 6) for i in range(7)]
    return source, directory, report


def test_it_finds_what_comparing_the_whole_models_finds(converted, tmp_path):
    source, directory, report = converted
    original, tokenizer = read_model(write_model(tmp_path / "a", source, None, rounded(source))), trained()[1]
    found = compare(original, tokenizer, read_model(directory), tokenizer, TEXT, window=64)
    assert report.comparison.a.nats == pytest.approx(found.a.nats, rel=1e-5)
    assert report.comparison.b.nats == pytest.approx(found.b.nats, rel=1e-5)
    assert report.comparison.kl == pytest.approx(found.kl, rel=1e-3)
    assert report.comparison.top1 == pytest.approx(found.top1, abs=0.005)
    assert report.comparison.a.characters == found.a.characters


def test_errors_of_tensors_are_those_of_their_outputs(converted):
    source, directory, report = converted
    errors = {tensor.path: tensor for tensor in report.tensors}
    assert list(errors) == [name.removesuffix(".weight") for name, t in source.tensors.items() if len(t.shape) == 2]
    assert errors["model.layers.4.self_attn.o_proj"].relative_error == 0
    assert errors["model.layers.4.self_attn.o_proj"].bits is None
    assert errors["model.layers.2.mlp.down_proj"].bits == 2
    others = [tensor.relative_error for tensor in report.tensors if tensor.bits == 4]
    assert errors["model.layers.2.mlp.down_proj"].relative_error > 2 * max(others)
    assert all(0.01 < error < 0.3 for error in others)
    # One of them by hand: the first layer's qkv_proj sees the normed embeddings.
    tokenizer = trained()[1]
    ids = tokenizer.encode(TEXT)[:-1]
    rows = np.array(source.read("model.embed_tokens.weight").astype(mx.float32))[ids]
    norm = np.array(source.read("model.layers.0.input_layernorm.weight").astype(mx.float32))
    x = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + source.raw_config["rms_norm_eps"]) * norm
    weight = np.array(source.read("model.layers.0.self_attn.qkv_proj.weight").astype(mx.float32))
    layer = read_model(directory, dtype="float32").layers[0].self_attn.qkv_proj
    packed = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4))
    expected = np.linalg.norm(x @ (packed - weight).T) / np.linalg.norm(x @ weight.T)
    assert errors["model.layers.0.self_attn.qkv_proj"].relative_error == pytest.approx(expected, rel=1e-3)


def test_bytes_are_those_on_disk(converted):
    _, directory, report = converted
    data = (directory / "model.safetensors").stat().st_size - 8
    header = int.from_bytes((directory / "model.safetensors").read_bytes()[:8], "little")
    assert report.bytes == data - header
    assert report.source_bits_per_weight == 16
    assert sum(tensor.bytes for tensor in report.tensors) < report.bytes < report.source_bytes / 3


def test_its_files_say_the_same(converted):
    _, directory, report = converted
    assert json.loads((directory / "report.json").read_text()) == json.loads(json.dumps(report.figures()))
    text = (directory / "REPORT.md").read_text()
    assert f"{report.comparison.kl:.5f}" in text
    assert "a story" in text
    assert "(report.png)" in text
    assert all(f"| {tensor.path} |" in text for tensor in report.tensors)
    assert (directory / "report.png").read_bytes()[:4] == b"\x89PNG"
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(report))
    shown = console.export_text()
    assert f"{report.comparison.kl:.5f}" in shown
    assert "model.layers.2.mlp.down_proj" in shown
    load(str(directory))  # the files beside the weights do not disturb


def test_without_matplotlib_there_is_a_line_in_the_place_of_the_plot(tmp_path, monkeypatch):
    source, _ = trained()
    directory = write_model(tmp_path / "model", source, None, rounded(source))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = write_report(directory, source, text=TEXT[:120], fitted=True)
    assert not (directory / "report.png").exists()
    text = (directory / "REPORT.md").read_text()
    assert 'pip install "phi3-mlx[plot]"' in text
    assert "report.png" not in text
    assert any("fitted" in note for note in report.notes)
    assert report.comparison.kl == 0
    assert all(tensor.relative_error == 0 for tensor in report.tensors)


def test_a_long_text_is_read_up_to_a_limit(converted, monkeypatch):
    source, directory, _ = converted
    monkeypatch.setattr("phi3_mlx.conversion.report._TOKENS", 40)
    report = write_report(directory, source, text=TEXT)
    assert report.comparison.a.tokens == 39
    assert "first 40 tokens" in report.text


def test_a_text_of_one_token_is_refused(converted):
    with pytest.raises(PromptError, match="longer"):
        write_report(converted[1], converted[0], text="a")


def test_the_memory_it_says_it_needs_is_about_right(converted):
    source, directory, report = converted
    needed = memory_needed(source, report.bytes)
    assert report.bytes < needed
    mx.clear_cache()
    mx.reset_peak_memory()
    write_report(directory, source, text=TEXT)
    assert mx.get_peak_memory() < needed


def test_a_report_names_a_downloaded_source_by_its_repository_and_revision(tmp_path):
    tiny, snapshot = ROOT / "weights" / "tiny", tmp_path / "models--me--mine" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny, snapshot)
    shutil.copytree(tiny, tmp_path / "made")
    write_report(tmp_path / "made", open_source(snapshot), text="Once upon a time there was a duck.")
    figures = json.loads((tmp_path / "made" / "report.json").read_text())
    assert (figures["source"], figures["revision"]) == ("me/mine", "a" * 40)
    report = write_report(tmp_path / "made", open_source(tiny), text="Once upon a time there was a duck.")
    assert (report.source, report.revision) == ("tiny", None)
