"""The benches: the group knows them all, each runs by either name, and what they write has the one form."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from datetime import date
from importlib import import_module
from types import SimpleNamespace

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from mlx.utils import tree_flatten
from quality_models import RandomSource
from test_plan import random_model

from bench import kvquality, longcontext, methods, published, quantization, record, tables
from bench.__main__ import _BENCHES, _FULL, _QUICK, main, run
from bench.answers import answers, flips
from bench.contenders import alike, apart
from bench.eval import make_data
from bench.theirs import in_floats
from phi3_mlx import blas, load, load_tokenizer
from phi3_mlx.store import hub

SHARED = {
    "agreement", "answers", "arms", "bundled", "contenders", "exported", "judges", "methods", "models", "plots",
    "published", "record", "spared", "tables", "theirs",
}  # fmt: skip
# feelings makes data, dequantizing measures for a constant
NOT_BENCHES = {"__init__", "__main__", "dequantizing", "feelings", "notebooks", "terminal", *SHARED}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["bench/__main__.py", "somebench", "--option", "two words"])
    return tmp_path / "results"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a random model with the bundled tokenizer, small enough for every test here."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    for file in hub.resolve("tiny").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "phi3", **shape, "num_key_value_heads": 1, "vocab_size": 4032}
    config |= {"max_position_embeddings": 8192, "torch_dtype": "float32", "eos_token_id": 4000, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    model = random_model(128, 64, 1, 2, 1, vocab=4032)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def invoke(command, *args):
    return CliRunner().invoke(command, list(args), catch_exceptions=False)


def check(folder, name):
    """A result has its passport and rows of plain facts."""
    (file,) = folder.glob("*.json")
    content = json.loads(file.read_text())
    assert content["machine"] == record.machine()
    written = content["results"][name]
    assert list(written)[:3] == ["command", "date", "versions"]
    assert written["command"].startswith("python -m bench ")
    assert date.fromisoformat(written["date"])
    assert {"python", "mlx"} <= set(written["versions"])
    assert all(isinstance(row, dict) for row in written["rows"])
    assert written["rows"]
    return written


def test_a_machine_has_one_file_and_the_newest_of_like_machines_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    mac = "M9, 10 cores, Darwin arm64"
    for machine, names in (("A 1.5GHz, Linux x86_64", ["b", "a", "b"]), ("C, Linux x86_64", ["a"]), (mac, ["a", "b"])):
        monkeypatch.setattr(record, "machine", lambda machine=machine: machine)
        for i, name in enumerate(names):
            record.write(name, [{"row": i}], "mlx")
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["a-1-5ghz-linux-x86-64.json", "c-linux-x86-64.json", "m9-10-cores-darwin-arm64.json"]
    older = json.loads((tmp_path / files[0]).read_text())
    older["results"]["a"]["date"] = "2020-01-01"
    (tmp_path / files[0]).write_text(json.dumps(older))
    read = record.read()
    assert list(read) == ["a", "b"]
    assert (read["b"]["rows"], read["b"]["machine"]) == ([{"row": 2}], "A 1.5GHz, Linux x86_64")
    assert (read["a"]["rows"], read["a"]["machine"]) == ([{"row": 0}], "C, Linux x86_64")
    assert record.read(tmp_path / "none") == {}


def test_a_gpu_is_a_system_of_its_own_and_has_its_own_table(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "PUBLISHED", tmp_path)
    speed = {"tokens_per_second": record.spread([3.0]), "peak_memory": record.spread([2e6]), "ratio": 1.5}
    rows = [{"case": "tiny", "model": "tiny", "package": name, **speed} for name in ("phi3-mlx", "mlx-lm")]
    long = {"tokens": 9, "read": 9, "peak": 5e6, "seconds": 3.0, "planned": 6e6}
    facts = {"layers": 32, "bits": 4, "full": True, "ratio": 0.5}
    names = {"A, 2 cores, Linux x86_64": ("decode", "prefill", "batch"), "G9, Linux x86_64 with CUDA": ("decode",)}
    for machine, benches in names.items():
        monkeypatch.setattr(record, "machine", lambda machine=machine: machine)
        for name in benches:
            record.write(name, rows, "mlx")
    sides = [{"package": "phi3-mlx", **long}, {"package": "mlx-lm", **long, "read": 2, "peak": 1e7}]
    decoded = {"decode": {"tokens_per_second": 4.0}, "decode_mlx_lm": {"error": "no kernel"}}
    record.write("longcontext-x", sides, "mlx", **facts, **decoded)
    assert list(record.read_systems()) == ["Linux x86_64", "Linux x86_64 with CUDA"]
    assert list(record.read()) == ["batch", "decode", "prefill"]
    published.systems.cache_clear()
    table = tables.gpu()
    published.systems.cache_clear()
    assert "| decode, tiny | 3.00 tok/s | 3.00 tok/s | 1.50× |" in table
    assert "| decode, tiny, peak without weights | 2.00 MB | 2.00 MB | 1.00× |" in table
    assert "peak without weights | 5 MB (6 planned) | 10 MB after 2 | 0.50× |" in table
    assert "| reading them | 3 tok/s | | |" in table
    assert "| decoding behind them | 4.00 tok/s | fails | |" in table
    assert "G9, Linux x86_64 with CUDA; python" in table
    assert "A, 2 cores" not in table


def test_a_decoder_that_fails_is_in_the_result(results, monkeypatch):
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr(longcontext, "HEADS", 8)
    calls = []

    def decode(logits, *_):
        calls.append(logits)
        if len(calls) == 2:
            raise RuntimeError("no kernel")
        return {"tokens": 1, "tokens_per_second": 1.0, "peak": 1}

    monkeypatch.setattr(longcontext, "decode", decode)
    options = ["--tokens", "512", "--chunk", "256", "--layers", "1", "--once", "--decode", "1", "--packed"]
    assert "mlx-lm fails: no kernel" in invoke(longcontext.main, *options).output
    written = check(results, "longcontext")
    assert written["decode_mlx_lm"] == {"error": "no kernel"}
    assert [row["package"] for row in written["rows"]] == ["phi3-mlx", "mlx-lm"]


def test_the_share_that_is_alike_ends_at_the_first_difference():
    assert alike([[1, 2, 3], [4]], [[1, 2, 3], [4]]) == 1
    assert alike([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == 0.5


def test_the_group_lists_every_bench():
    files = {path.stem for path in (ROOT / "bench").glob("*.py")} - NOT_BENCHES
    files |= {path.parent.name for path in (ROOT / "bench").glob("*/__init__.py")}
    assert set(_BENCHES) == files
    assert set(_QUICK) == files
    assert set(_FULL) <= files


def test_what_benches_share_is_no_bench_and_tables_measure_nothing():
    def imports_of(name):
        folder = ROOT / "bench" / name
        files, up = ([*folder.glob("*.py")], 2) if folder.is_dir() else ([folder.with_suffix(".py")], 1)
        nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == up):
            yield from [node.module] if node.module else (alias.name for alias in node.names)

    for name in _BENCHES:
        assert set(imports_of(name)) <= {*SHARED, "feelings"}, name
    for name in SHARED:
        assert set(imports_of(name)) <= SHARED, name
    code = "import sys, bench.record; before = {*sys.modules}; import bench.tables; print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith(("bench.", "mlx", "torch", "transformers"))}
    assert loaded == {"bench.agreement", "bench.published", "bench.tables"}


def test_pytorch_is_measured_in_a_process_without_our_blas():
    before = dict(os.environ)
    assert apart(os.getenv, blas.VARIABLE) == "off"
    assert apart(os.getpid) != os.getpid()
    assert dict(os.environ) == before
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "one")


def test_without_a_command_there_is_help_and_nothing_is_imported():
    code = (
        "import sys; from bench.__main__ import main; main([], standalone_mode=False); "
        "assert not any(m.startswith(('mlx', 'bench.decode', 'bench.models')) for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in _BENCHES:
        assert re.search(rf"^  {name} ", done.stdout, re.M)


@pytest.mark.parametrize("name", _BENCHES)
def test_every_bench_is_a_command_whose_quick_options_it_knows(name):
    if name == "parity":
        pytest.importorskip("torch")
    command = import_module(f"bench.{name}").main
    assert isinstance(command, click.Command)
    assert main.get_command(click.Context(main), name) is command
    for options in (_QUICK[name], _FULL.get(name, "")):
        if options or name != "quantization":
            command.make_context(name, options.split())


@pytest.mark.parametrize("words", [["bench", "kvquality"], ["bench.kvquality"]], ids=str)
def test_either_name_runs_a_bench(words, small, tmp_path):
    options = ["--model", str(small), "--tokens", "40", "--bits", "4", "--group-size", "32"]
    done = subprocess.run(
        [sys.executable, "-m", *words, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, record.ELSEWHERE: str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    written = check(tmp_path, "kvquality-small")
    assert written["command"].startswith("python -m bench kvquality --model ")


def test_fewer_bits_differ_more_and_the_record_says_so(small, results):
    assert (
        invoke(
            kvquality.main, "--model", str(small), "--tokens", "80", "--window", "80", "--group-size", "64"
        ).exit_code
        == 0
    )
    written = check(results, "kvquality-small")
    assert written["command"] == "python -m bench somebench --option 'two words'"
    rows = {(row["keys"], row["values"]): row for row in written["rows"]}
    assert list(rows) == [(8, 8), (6, 6), (4, 4), (3, 3), (2, 2), (8, 4), (4, 8)]
    kl = [rows[bits, bits]["kl"] for bits in (8, 6, 4, 3, 2)]
    assert 0 < kl[0] < kl[1] < kl[2] < kl[3] < kl[4]
    assert rows[8, 8]["size"] == pytest.approx((8 + 2 * 16 / 64) / 16)
    assert rows[4, 4]["same_choice"] <= 1


def test_bits_that_cannot_be_are_a_usage_fault(results):
    assert invoke(kvquality.main, "--bits", "5").exit_code == 2
    assert invoke(kvquality.main, "--bits", "8,x").exit_code == 2
    assert not results.exists()


def test_reading_only_the_last_chunks_has_the_peak_of_reading_all(results, monkeypatch):
    monkeypatch.setattr(longcontext, "HEADS", 8)

    def peak(*more):
        options = ["--tokens", "1024", "--chunk", "256", "--layers", "2", "--alone", *more]
        assert invoke(longcontext.main, *options).exit_code == 0
        rows = check(results, "longcontext")["rows"]
        assert [row["tokens"] for row in rows] == [256, 512, 1024]
        assert [row["read"] for row in rows] == ([256, 512, 512] if more else [256, 512, 1024])
        return rows[-1]["peak"]

    assert peak() == pytest.approx(peak("--last"), rel=0.05)


def test_without_llama_cpp_the_bench_of_exports_says_so_and_measures_nothing(results, monkeypatch):
    from bench import export

    monkeypatch.setattr(export.llama_cpp, "MISSING", "no llama.cpp here: `make llama-cpp` installs it")
    done = invoke(export.main)
    assert done.exit_code == 0
    assert "nothing was measured: no llama.cpp here: `make llama-cpp` installs it" in done.output
    assert not results.exists()


def test_the_distance_of_distributions_is_that_of_the_formula():
    from bench import export

    p, q = np.array([[0.5, 0.5], [0.9, 0.1]], np.float32), np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)
    found = export.distances(p, q)
    assert found["kl"] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2)
    assert found["largest_difference"] == pytest.approx(0.25)
    assert found["same_choice"] == 0.5
    assert export.distances(p, p)["kl"] == pytest.approx(0, abs=1e-9)
    assert [export.alike([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [9, 2, 3])] == [3, 1, 0]


def test_exports_are_measured_where_llama_cpp_is(results):
    from bench import export

    if export.llama_cpp.MISSING:
        pytest.skip(export.llama_cpp.MISSING)
    assert invoke(export.main, "--type", "f32", "--type", "q4_0", "--tokens", "32", "--longer", "640").exit_code == 0
    floats, packed = check(results, "export")["rows"]
    assert floats["kl"] < 1e-9 < 1e-4 < packed["kl"]
    near, far, *_ = check(results, "export-longrope")["rows"]
    assert near["kl"] < 1e-8 < far["kl"]
    assert check(results, "export-moe")["rows"][-1]["kl"] < 1e-9


@pytest.mark.long
def test_a_file_is_read_in_memory_that_mlx_lm_exceeds(results):
    pytest.importorskip("mlx_lm")
    from bench import document

    assert invoke(document.main, "--tokens", "1000").exit_code == 0
    written = check(results, "document")
    ours, theirs = written["rows"]
    assert ours["read"] == pytest.approx(1000, abs=3)
    assert ours["peak"] <= ours["planned"] * 1.1 <= written["limit"] < theirs["peak"]
    assert "--kv-bits" in written["refusal"]


def test_prompts_of_a_text_show_once_how_to_quote():
    from bench import lookup

    sentences = [
        f"The {i} mice of the mill ran up a hill to look for the missing cheese of the {i} rats." for i in range(60)
    ]
    text = "\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, 56, 8))
    kinds = lookup.prompts_of_text(text, "a text")
    assert {kind: len(prompts) for kind, prompts in kinds.items()} == {"edit": 4, "quote": 4}
    for question, answer, asked in kinds["quote"]:
        assert answer["content"] == " ".join(sentences[:3])
        assert answer["content"] in question["content"] not in asked["content"]
    with pytest.raises(click.UsageError, match="a text has fewer than 5"):
        lookup.prompts_of_text(text[:1500], "a text")


@pytest.mark.long
def test_prefix_counts_what_is_read_and_the_least_that_could_be(results, monkeypatch):
    from bench import prefix

    assert prefix.least_of([[1, 2, 3], [1, 2, 3], [1, 2, 4, 5], [9]]) == 3 + 1 + 2 + 1
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--tokens", "100", "--questions", "4", "--plain", "2", "--turns", "2"]
    assert invoke(prefix.main, *options).exit_code == 0
    questions, conversations = check(results, "prefix")["rows"]
    assert (questions["prompts"], conversations["prompts"]) == (4, 8)
    assert questions["least_tokens"] <= questions["read_tokens"] <= 1.05 * questions["least_tokens"]
    assert conversations["read_tokens"] < conversations["least_tokens"]
    answer = {"said": "a", "read": 1, "prompt": 1, "seconds": 1.0}
    with pytest.raises(click.ClickException, match="an answer is another than without a store"):
        prefix.row_of("questions", [answer], [answer | {"said": "b"}], 1)
    with pytest.raises(click.ClickException, match="turn 2 reads 2 tokens, and 1 without a store"):
        prefix.check_turns([answer, answer | {"read": 2}], [answer, answer])


def test_faults_of_a_user_are_one_line(capfd):
    with pytest.raises(SystemExit) as done:
        main(["lookup", "--model", "./nowhere"])
    assert done.value.code == 1
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_decode_writes_both_packages_side_by_side(results):
    pytest.importorskip("mlx_lm")
    from bench import decode

    assert invoke(decode.main, "--only", "tiny", "--runs", "1", "--tokens", "1").exit_code == 0
    ours, theirs = check(results, "decode")["rows"]
    assert (ours["package"], theirs["package"]) == ("phi3-mlx", "mlx-lm")
    assert 0 < ours["peak_memory"]["median"] < 1e9
    assert ours["ratio"] == pytest.approx(ours["tokens_per_second"]["median"] / theirs["tokens_per_second"]["median"])


def test_all_benches_run_before_a_failure_is_told(capfd):
    with pytest.raises(click.ClickException, match="failed: nonsense"):
        run({"nonsense": "", "readme": "--help"}, {})
    assert "README" in capfd.readouterr().out


def test_requests_that_arrive_are_answered_by_both_and_the_table_shows_them(results, monkeypatch):
    pytest.importorskip("mlx_lm")
    from bench import traffic

    options = [
        "--only",
        "unpacked",
        "--only",
        "newcomer",
        "--layers",
        "1",
        "--requests",
        "3",
        "--shorter",
        "32",
        "--runs",
        "1",
        "--long",
        "80",
    ]
    assert invoke(traffic.main, *options).exit_code == 0
    written = check(results, "traffic")
    assert [row["package"] for row in written["rows"]] == ["phi3-mlx", "mlx-lm"]
    for row in written["rows"]:
        assert row["last_first_token"]["median"] > 0
        assert row["tokens_per_second"]["median"] > 0
    newcomers = check(results, "newcomer")["rows"]
    assert [row["package"] for row in newcomers] == ["phi3-mlx", "mlx-lm"]
    for row in newcomers:
        assert row["tokens"] == 80
        assert row["gap"]["median"] <= row["chunk"]["median"] + 2 * row["beside"]["median"]
        assert row["late"]["median"] == pytest.approx(row["beside"]["median"] / row["alone"]["median"])
    monkeypatch.setattr(record, "PUBLISHED", results)
    published.systems.cache_clear()
    table = tables.traffic()
    published.systems.cache_clear()
    assert "| float32, 1 layer of 512 numbers | 1/32 |" in table
    assert "| a newcomer of 80 tokens |" in table


def test_places_are_measured_against_code_without_them(results):
    from bench import inside
    from phi3_mlx import trace
    from phi3_mlx.models import build, parse_config

    assert invoke(inside.main, "--layers", "1", "--tokens", "4", "--pairs", "1", "--repeats", "1").exit_code == 0
    written = check(results, "inside")
    assert [row["case"] for row in written["rows"]] == ["prompt", "prompt and 9 steps"]
    assert all(row["off"]["median"] > 0 and row["all"]["median"] > 0 for row in written["rows"])
    model, ids = build(parse_config({**inside.RAW, "num_hidden_layers": 1})), mx.array([[1, 2, 3]])
    with trace(model, keep="embed") as seen:
        expected = model(ids)
        assert seen.rows == 1
        with inside.never():
            assert mx.array_equal(model(ids), expected)
            assert seen.rows == 1
        model(ids)
        assert seen.rows == 2


def test_texts_to_judge_share_nothing_with_those_that_are_learnt(tmp_path):
    from bench import data

    stories = data.disorder(120)
    assert [sum(row.good for row in half) for half in (stories.learnt, stories.unseen)] == [60, 60]
    names = [{name for name in "Mia Lily Jack Nora".split() for row in half if name in row.text.split()} for half in
             (stories.learnt, stories.unseen)]  # fmt: skip
    assert names == [{"Mia", "Lily"}, {"Jack", "Nora"}]
    levels = ("elementary", "intermediate", "advanced")
    articles = [
        {"title": f"T{n}", "level": level, "text": f"{level} article-{n} " * 90} for n in range(30) for level in levels
    ]
    lines = "".join(json.dumps(row) + "\n" for row in [*articles, {"title": "U", "level": "advanced", "text": "x"}])
    (tmp_path / "onestop_english.jsonl").write_text(lines)
    task = data.onestop(tmp_path, 20)
    titles = [{row.text.split()[1] for row in half} for half in (task.learnt, task.unseen)]
    assert [len(half) for half in titles] == [10, 10]
    assert not titles[0] & titles[1]
    assert all(row.title == f"T{row.text.split()[1].removeprefix('article-')}" for row in task.learnt)
    for row in [*task.learnt, *task.unseen]:
        assert row.text.split()[0] == ("advanced" if row.good else "elementary")
        assert len(row.text.split()) == 120
    with pytest.raises(click.UsageError, match="has no onestop_english"):
        data.onestop(tmp_path / "none", 20)


@pytest.mark.long
def test_ratings_and_filters_are_judged_by_labels_that_are_known(results, monkeypatch):
    from bench import data

    task = data.disorder(120)
    monkeypatch.setattr(data, "disorder", lambda count: dataclasses.replace(task, unseen=task.unseen[: count // 3]))
    fit, groups = data.train_filter, []
    monkeypatch.setattr(data, "train_filter", lambda *a, **how: (groups.append(how["group"]), fit(*a, **how))[1])
    assert invoke(data.main, "--texts", "120", "--train", "1").exit_code == 0
    assert groups == ["title"] * 3
    written = check(results, "data")
    assert written["texts"] == {"disorder": {"learnt": 120, "unseen": 40}}
    rows = {(row["judge"], row["by"]): row for row in written["rows"]}
    assert list(rows) == [
        ("tiny", "rating"),
        ("tiny", "likelihood"),
        ("filter by tiny", "probability"),
        ("tiny, taught", "rating"),
        ("tiny, taught", "likelihood"),
        ("filter by tiny, taught", "probability"),
        ("filter by labels", "probability"),
    ]
    for row in rows.values():
        assert row["low"] <= row["auc"] <= row["high"]
        assert (row["good"], row["bad"]) == (20, 20)
        assert row["texts_per_second"] > 0
    assert rows["tiny", "likelihood"]["auc"] > 0.95
    assert rows["filter by labels", "probability"]["auc"] > 0.95


def test_the_host_of_a_step_is_measured_beside_mlx_lms(results, monkeypatch):
    from bench import host

    options = ["--rows", "1", "--rows", "2", "--bits", "0", "--layers", "1", "--steps", "2", "--runs", "1"]
    assert invoke(host.main, *options).exit_code == 0
    written = check(results, "host")
    assert [(row["rows"], row["package"]) for row in written["rows"]] == [
        (1, "phi3-mlx"),
        (1, "mlx-lm"),
        (2, "phi3-mlx"),
        (2, "mlx-lm"),
    ]
    assert all(0 < row["build"]["median"] <= row["host"]["median"] for row in written["rows"])
    monkeypatch.setattr(record, "PUBLISHED", results)
    published.systems.cache_clear()
    table = tables.host()
    published.systems.cache_clear()
    assert "| float32, 2 | " in table


def test_requests_are_drawn_alike_and_arrive_in_turn():
    from bench import traffic

    some, again, shorter = (traffic.make_requests(16, n) for n in (1, 1, 8))
    assert some == again
    lengths = [len(request.prompt) for request in some]
    assert 50 <= min(lengths) < max(lengths) <= 2000
    assert all(20 <= request.answer <= 300 for request in some)
    assert [request.arrival for request in some] == [i / 2 for i in range(16)]
    assert [len(request.prompt) for request in shorter] == [length // 8 for length in lengths]


@pytest.mark.long
def test_each_method_of_quantization_has_its_costs_beside_mlx_lms(small, results, monkeypatch):
    pytest.importorskip("mlx_lm")
    options = ["--bits", "3", "--tokens", "64", "--calibration-tokens", "1024", "--dtype", "bfloat16", "--beside"]
    done = invoke(quantization.main, str(small), "--method", "uniform", "--method", "distill", *options)
    assert done.exit_code == 0, done.output
    written = check(results, "quantization-small")
    rows = {row["method"]: row for row in written["rows"]}
    ours, theirs = ["uniform", "gptq", "distill"], ["uniform", "gptq", "awq", "dynamic", "dwq"]
    assert list(rows) == [*ours, *(f"mlx-lm {method}" for method in theirs)]
    measured = {method: row for method, row in rows.items() if "refused" not in row}
    assert {*rows} - {*measured} == {"mlx-lm gptq", "mlx-lm awq"}
    assert all(row["peak_memory"] > 1e6 for row in measured.values())
    assert rows["distill"]["cpu_seconds"] > rows["gptq"]["cpu_seconds"] > rows["uniform"]["cpu_seconds"] > 0
    assert rows["distill"]["peak_memory"] >= rows["gptq"]["peak_memory"]
    assert rows["mlx-lm uniform"]["kl"] == pytest.approx(rows["uniform"]["kl"], rel=1e-3)
    sizes = {method: row["bits_per_weight"] for method, row in measured.items()}
    assert max(abs(size - sizes["uniform"]) for size in sizes.values()) < 0.1, sizes
    assert rows["gptq"]["bits_per_weight"] == rows["distill"]["bits_per_weight"] == rows["uniform"]["bits_per_weight"]
    monkeypatch.setattr(published, "systems", lambda: {"here": record.read(results)})
    table = methods.methods()
    assert "| small | distill | 1,024 | 3." in table
    assert "mlx-lm awq: mlx-lm's AWQ has no phi3" in table


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_layers_in_floats_have_the_loss_and_gradients_of_packed_ones(bits):
    layers = nn.Embedding(96, 64), nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
    model, ids = nn.Sequential(*layers), mx.arange(50)[None]
    nn.quantize(model, 64, bits)
    model.freeze().apply_to_modules(lambda _, part: "scales" in part and part.unfreeze(keys=["scales", "biases"]))

    def loss(model):
        return (model.layers[0].as_linear(mx.tanh(model(ids))) ** 2).mean()

    of_packed, by_packed = nn.value_and_grad(model, loss)(model)
    in_floats(model)
    of_floats, by_floats = nn.value_and_grad(model, loss)(model)
    assert of_floats.item() == pytest.approx(of_packed.item(), rel=1e-5)
    expected, found = dict(tree_flatten(by_packed)), dict(tree_flatten(by_floats))
    assert len(expected) == 6  # scales and biases of three layers
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        assert mx.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def test_what_gptq_takes_ends_where_the_model_is_packed(tmp_path, monkeypatch):
    """The source's distributions come after it, and are of distillation; measuring the packed model is of neither."""
    now, rows = [0], []

    class Clock:
        held = 0

        def __init__(self, held=None):
            self.start = now[0]

        def read(self):
            return dict.fromkeys(("seconds", "cpu_seconds", "peak_memory"), now[0] - self.start)

    def distilled(source, layout, ids, folder, *, progress):
        (folder / quantization.PACKED).mkdir()
        for stage, done, time in (("packing", 1, 1), ("packing", 2, 2), ("distilling", 0, 10), ("distilling", 2, 1030)):
            now[0] = time
            progress(quantization.Progress(stage, "steps", done, 2))
        return None, (), SimpleNamespace(held_before=0.2, held_after=0.1)

    def add(self, method, directory, costs, **facts):
        rows.append((method, dict(costs)))
        now[0] += 1000 if method == "gptq" else 0

    monkeypatch.setattr(quantization, "Meter", Clock)
    monkeypatch.setattr(quantization, "distilled", distilled)
    monkeypatch.setattr(quantization, "write", lambda *_: None)
    monkeypatch.setattr(quantization.Points, "_add", add)
    source = RandomSource("BF16", vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=32)
    points = quantization.Points(source, None, "", [], tmp_path, rows.append)
    points.distill(quantization.uniform(4, 32))
    assert [(method, costs["cpu_seconds"], costs["peak_memory"]) for method, costs in rows] == [
        ("gptq", 2, 2),
        ("distill", 30, 20),
    ]


def test_bits_for_gptq_are_chosen_by_its_own_errors(monkeypatch):
    """Here plain rounding loses most in the embedding, and GPTQ in the head."""
    source, made = RandomSource("BF16", vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=32), {}

    def measured(source, ids, *, group_size, rounds=False):
        most = "lm_head.weight" if rounds else "model.embed_tokens.weight"
        names = quantization.sizes_of(source, group_size, quantization.BITS)[0]
        return {
            name: {bits: 4.0**-bits * (1000 if name == most else 1) for bits in quantization.BITS} for name in names
        }

    def make(method, recipe, gptq=None):
        packings = quantization.Layout.of(source, recipe).packings
        made[method] = packings["model.embed_tokens.weight"]["bits"], packings["lm_head.weight"]["bits"], gptq

    monkeypatch.setattr(quantization, "measure", measured)
    points = SimpleNamespace(source=source, ids=[], make=make)
    quantization.mixed(points, [4], [4], 32)
    (of_plain, few, no_steps), (less, of_gptq, steps) = made["mixed"], made["mixed + gptq"]
    assert of_plain > few
    assert of_gptq > less
    assert no_steps is None
    assert steps == quantization.GptqSteps()


def test_bits_by_layer_are_distilled_too(monkeypatch):
    source, made = RandomSource("BF16", vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=32), []
    costs = {
        name: {bits: 4.0**-bits for bits in quantization.BITS} for name in quantization.sizes_of(source, 32, [4])[0]
    }
    monkeypatch.setattr(quantization, "measure", lambda *_, **__: costs)
    points = SimpleNamespace(source=source, ids=[], make=lambda *_: None, distill=lambda _, kind: made.append(kind))
    quantization.mixed(points, [4], [4], 32, distill=True)
    assert made == ["mixed + "]


def test_bits_to_fit_that_are_not_measured_are_refused(small, results):
    for given, idle in (("5", "5"), ("4,5,8", "5, 8")):
        done = invoke(quantization.main, str(small), "--bits", "3,4", "--gptq-bits", given)
        assert done.exit_code == 2
        assert f"--gptq-bits has {idle}, which --bits 3,4 has not" in done.output
    assert not results.exists()


def test_other_groups_and_formats_are_measured_and_told_by_size(small, results, monkeypatch):
    some = ["--bits", "3,4", "--gptq-bits", "4", "--tokens", "32", "--calibration-tokens", "1024"]
    done = invoke(quantization.main, str(small), *some, "--dtype", "bfloat16", "--method", "uniform", "--formats")
    assert done.exit_code == 0, done.output
    sizes = {}
    for row in check(results, "quantization-small")["rows"]:
        sizes.setdefault(row["method"], []).append(row["bits_per_weight"])
    assert sizes == {
        "uniform": pytest.approx([3.5, 4.5], abs=0.03),
        "uniform, groups of 32": pytest.approx([4.0, 5.0], abs=0.03),
        "gptq, groups of 32": pytest.approx([5.0], abs=0.03),
        "mxfp4": pytest.approx([4.25], abs=0.03),
        "nvfp4": pytest.approx([4.5], abs=0.03),
        "mxfp8": pytest.approx([8.25], abs=0.03),
    }
    monkeypatch.setattr(published, "systems", lambda: {"here": record.read(results)})
    told = [line.split(" | ")[1:3] for line in methods.formats().splitlines() if line.startswith("| small")]
    assert len(told) == sum(map(len, sizes.values()))
    assert [size for _, size in told] == sorted((size for _, size in told), key=float)
    with pytest.raises(click.ClickException, match="not measured yet"):
        methods.methods()


@pytest.mark.parametrize(("inputs", "divided"), [(128, True), (192, False)])
def test_groups_that_leave_matrices_in_floats_are_no_point(inputs, divided):
    source, made = RandomSource("BF16", vocab_size=64, hidden_size=128, intermediate_size=inputs), []
    points = SimpleNamespace(source=source, make=lambda method, *_: made.append(method))
    quantization.formats(points, [4], [4], 64)
    assert [method for method in made if "128" in method] == divided * ["uniform, groups of 128", "gptq, groups of 128"]
    assert {"uniform, groups of 32", "gptq, groups of 32", "mxfp4", "nvfp4", "mxfp8"} <= {*made}


def test_what_each_model_answers_is_beside_its_figures(tmp_path, monkeypatch):
    """The source is asked once, before them."""
    found = SimpleNamespace(perplexity=2.0)
    asked, kept = [], []
    monkeypatch.setattr(quantization, "compare", lambda *_: SimpleNamespace(kl=0.1, top1=0.5, a=found, b=found))
    monkeypatch.setattr(quantization, "read_model", lambda directory: directory.name)
    monkeypatch.setattr(quantization, "answers", lambda model, *_: asked.append(model) or model)
    monkeypatch.setattr(quantization, "flips", lambda *both: both)
    source = RandomSource("BF16", vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=32)
    for questions in (tmp_path, None):
        folder = tmp_path / f"{bool(questions)}"
        folder.mkdir()
        points = quantization.Points(source, None, "", [], folder, kept.append, questions)
        for bits in (3, 4):
            points.make("uniform", quantization.uniform(bits, 32))
    assert [row.get("answers") for row in kept[1]] == [("reference", "model-0"), ("reference", "model-1")]
    assert not any("answers" in row for row in kept[-1])
    assert asked == ["reference", "model-0", "model-1"]


def test_answers_that_flip_are_counted(tmp_path, small):
    pytest.importorskip("lm_eval")
    tokenizer, asked = load_tokenizer("tiny"), {"mmlu_anatomy": 3, "arc_easy": 5}
    make_data(tmp_path, tokenizer, 4)
    before, after = (answers(load(name)[0], tokenizer, tmp_path, asked) for name in ("tiny", small))
    same, other = flips(before, before), flips(before, after)
    for task, questions in asked.items():
        right, was, lost, won = (other[task][key] for key in ("right", "source_right", "lost", "won"))
        assert right - was == won - lost
        assert same[task] == {"questions": questions, "right": was, "source_right": was, "lost": 0, "won": 0}
    assert any(of["lost"] + of["won"] for of in other.values())


def test_what_flips_is_told_beside_the_source(monkeypatch):
    def row(method, kl, **right):
        answers = {
            task: {"questions": 8, "right": n, "source_right": 6, "lost": 7 - n, "won": 1} for task, n in right.items()
        }
        return {"method": method, "bits_per_weight": 4.5, "kl": kl, "answers": answers}

    rows = [row("gptq", 0.05, arc=6, blimp=5), row("uniform", 0.4, arc=4, blimp=2)]
    refused = {"method": "mlx-lm awq", "bits_per_weight": 4.5, "refused": "no"}
    facts = {"model": "m", "machine": "x", "versions": {"mlx": "1"}, "command": "c", "date": "d"}
    found = {
        "quantization-m": {**facts, "rows": [rows[0], refused, rows[1]]},
        "quantization-other": {**facts, "rows": [refused]},
    }
    monkeypatch.setattr(published, "systems", lambda: {"here": found})
    assert methods.flipped().splitlines()[:5] == [
        "| model | method | bits a weight | KL, nats | arc, 8 | blimp, 8 | lost | won |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        "| m | its source |  | 0 | 75.0% | 75.0% |  |  |",
        "| m | gptq | 4.50 | 0.0500 | 75.0% | 62.5% | 3 | 2 |",
        "| m | uniform | 4.50 | 0.4000 | 50.0% | 25.0% | 8 | 2 |",
    ]


def test_rows_of_a_run_that_was_cut_are_kept(small, results, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization.Points, "distill", cut)
    options = ["--bits", "4", "--tokens", "32", "--calibration-tokens", "1024", "--method", "uniform"]
    assert CliRunner().invoke(quantization.main, [str(small), "--method", "distill", *options]).exit_code != 0
    assert [row["method"] for row in check(results, "quantization-small")["rows"]] == ["uniform"]
