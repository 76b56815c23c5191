"""Steps over shards: the same bytes however many processes there are, and what a killed run had finished is kept."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tokenizer_samples import TINY, blind, tiktoken_ranks

from phi3_mlx import data_stats, decontaminate_data, filter_data, load_tokenizer, split_data, tokenize_data
from phi3_mlx.data import shards
from phi3_mlx.data.options import ReadOptions, WriteOptions
from phi3_mlx.data.records import DataRecord, Records
from phi3_mlx.data.shards import ShardStep, run_shards
from phi3_mlx.data.step import Samples
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.store.atomic import hold
from phi3_mlx.text.tokenizer import read_tokenizer

NAMES = [f"part{n}.jsonl" for n in range(6)]


@pytest.fixture(autouse=True)
def a_shard_a_file(monkeypatch):
    monkeypatch.setattr(shards, "_SMALL_BYTES", 1)


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    source = random.Random(0)
    for name in NAMES:
        lines = []
        for n in range(60):
            text = f"{name} {n}: the dog ran to the river and met a duck" + " and ran" * source.randrange(6)
            text = "" if (name, n) == ("part5.jsonl", 8) else text
            lines.append(json.dumps({"text": text + (" call me@example.org" if n % 7 == 0 else ""), "n": n}))
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "part2.jsonl").write_text("\n\n")  # one without records
    (folder / "part3.jsonl").write_text((folder / "part3.jsonl").read_text() + "{broken\n")
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


STEPS = {
    "filter": lambda files, out, **more: filter_data(files, out, rules="gopher,pii", min_words=10, **more),
    "split": lambda files, out, **more: split_data(files, out, part={"a": 0.5, "b": 0.3}, **more),
    "decontaminate": lambda files, out, **more: decontaminate_data(
        files, out, files.parent / "asked.jsonl", ngram=13, **more
    ),
    "tokenize": lambda files, out, compress, **more: tokenize_data(files, out, load_tokenizer("tiny"), **more),
}


@pytest.mark.parametrize(
    ("step", "compress"), [("filter", "gz"), ("split", "zst"), ("decontaminate", None), ("tokenize", None)]
)
def test_output_and_report_are_the_same_bytes_for_any_number_of_processes_and_shards(
    pages, tmp_path, monkeypatch, step, compress
):
    asked = "part1.jsonl 5: the dog ran to the river and met a duck"
    (tmp_path / "asked.jsonl").write_text(json.dumps({"text": asked}) + "\n")
    told = []
    options = {"skip_broken": True, "compress": compress}
    one = STEPS[step](pages, tmp_path / "one", progress=told.append, **options)
    two = STEPS[step](pages, tmp_path / "two", processes=2, **options)
    monkeypatch.setattr(shards, "_SMALL_BYTES", 10**9)
    whole = STEPS[step](pages, tmp_path / "whole", **options)
    assert one == two == whole
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "whole")
    assert one["read"] == 300 + (step == "decontaminate")
    assert one["broken"]["records"] == 1
    assert 0 < one["kept"] < 300
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".shards", ".partial"))]
    assert (told[-1].done, told[-1].records) == (told[-1].total, 300)
    done = [now.done for now in told if now.stage == told[-1].stage]
    assert done == sorted(done)
    assert len({*done}) > 4


@pytest.mark.parametrize(
    ("call", "files"),
    [
        ("split_data({given})", ["train.jsonl", "valid.jsonl"]),
        (
            "tokenize_data({given}, tokenizer=load_tokenizer('tiny'))",
            ["tokens-00000.bin", "documents.bin", "tokens.json"],
        ),
    ],
    ids=["split", "tokenize"],
)
def test_what_was_finished_before_a_kill_is_not_done_again(pages, tmp_path, monkeypatch, call, files):
    fifo, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(fifo)
    call = call.format(given="given, out, skip_broken=True")
    script = (
        "import sys; from phi3_mlx.data import shards; shards._SMALL_BYTES = 1\n"
        f"from phi3_mlx import *; out, *given = sys.argv[1:]; {call}"
    )
    given = [str(pages), str(fifo)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kept = tmp_path / "out.shards"
    with subprocess.Popen([sys.executable, "-c", script, str(out), *given], env=environment) as process:
        until = time.monotonic() + 240
        while len([*kept.glob("*/shard.json")]) < 6:  # all but that of the pipe, for which it waits
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    done = []
    usual = shards._Shard.do
    monkeypatch.setattr(shards._Shard, "do", lambda self, *given: done.append(self.files) or usual(self, *given))
    writer = threading.Thread(target=lambda: fifo.write_bytes(b'{"text": "from the pipe"}\n'))
    writer.start()

    def run(given, out):
        return eval(call, {**globals(), "given": given, "out": out})

    report = run(given, out)
    writer.join()
    assert [[file.path for file in files] for files in done] == [[str(fifo)]]
    (tmp_path / "pipe.jsonl").write_text('{"text": "from the pipe"}\n')
    run([pages, tmp_path / "pipe.jsonl"], tmp_path / "whole")
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert report["read"] == 301
    assert not kept.exists()


@pytest.mark.parametrize("call", ["split_data({given})", "tokenize_data({given}, tokenizer=load_tokenizer('tiny'))"])
def test_a_file_that_was_cut_goes_on_from_the_portion_at_which_it_was(pages, tmp_path, monkeypatch, call):
    """kill -9 within one large file: report and files are those of a run that was never stopped."""
    call = call.format(given="given, out, skip_broken=True")
    lines = [line for name in NAMES for line in (pages / name).read_text().splitlines()]
    file, out = tmp_path / "one.jsonl", tmp_path / "out"
    file.write_text("\n".join(["{broken", *lines[:70], "[]", *lines[70:], "{"]) + "\n")
    script = (
        "import os, signal, sys; from phi3_mlx.data import shards; from phi3_mlx import *\n"
        "shards._PORTION_BYTES, made, usual = 2000, [], shards.new_directory\n"
        "def counted(place, **more):\n"
        "    made.append(place); len(made) == 5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return usual(place, **more)\n"
        f"shards.new_directory = counted; given, out = sys.argv[1:]; {call}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script, str(file), str(out)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len([*(tmp_path / "out.shards").glob("*/shard.json")]) == 4
    worked = []
    monkeypatch.setattr(Samples, "add", _told(Samples.add, worked))
    again = eval(call, {**globals(), "given": file, "out": out})
    assert 0 < len(worked) < 290
    whole = eval(call, {**globals(), "given": file, "out": tmp_path / "whole"})
    assert len(worked) > 290 + 200
    assert again == whole
    assert whole["broken"]["records"] == 4
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.shards").exists()


def _told(usual, worked):
    return lambda self, record, **more: worked.append(record.source) or usual(self, record, **more)


def test_portions_of_any_size_give_the_same_bytes(pages, tmp_path, monkeypatch):
    usual = filter_data(pages, tmp_path / "usual", min_words=10, skip_broken=True)
    for size in (400, 5000):
        monkeypatch.setattr(shards, "_PORTION_BYTES", size)
        assert filter_data(pages, tmp_path / f"{size}", min_words=10, skip_broken=True) == usual
        assert files_of(tmp_path / f"{size}") == files_of(tmp_path / "usual")


def test_after_a_broken_line_only_its_file_and_those_behind_it_are_done(pages, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"part3\.jsonl:61: is not JSON"):
        split_data(pages, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.shards", "pages"]
    good = (pages / "part3.jsonl").read_text().replace("{broken\n", "")
    (pages / "part3.jsonl").write_text(good)
    done = []
    usual = shards._Shard.do
    monkeypatch.setattr(
        shards._Shard, "do", lambda self, *given: done.append(self.files[0].path[-11:]) or usual(self, *given)
    )
    split_data(pages, tmp_path / "out")
    assert done == NAMES[3:]
    done.clear()
    split_data(pages, tmp_path / "out", force=True, seed=1)  # nothing is taken of other options or an older run
    assert done == NAMES


@pytest.mark.parametrize("processes", [1, 2])
def test_faults_are_the_same_in_several_processes_and_leave_no_output(pages, tmp_path, processes):
    (pages / "part4.jsonl.gz").write_bytes(gzip.compress((pages / "part1.jsonl").read_bytes())[:-10])
    (pages / "part3.jsonl").unlink()
    with pytest.raises(DataError, match=r"part4\.jsonl\.gz is damaged"):
        split_data(pages, tmp_path / "out", processes=processes)
    with pytest.raises(DataError, match=r"part0\.jsonl:1: has no key 'body'"):
        split_data(pages / "part0.jsonl", tmp_path / "out", field="body", processes=processes)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="processes 0 is outside its range"):
        split_data(pages, tmp_path / "out", processes=0)


def test_files_without_records_together_are_named_and_leave_nothing(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"a\.jsonl, .*b\.jsonl: no records"):
        split_data([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_whose_records_all_are_broken_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    report = split_data(tmp_path / "a.jsonl", tmp_path / "out", skip_broken=True)
    assert (report["read"], report["kept"], report["broken"]["records"]) == (0, 0, 1)


@pytest.mark.parametrize(("processes", "files", "started"), [(2, 6, [2]), (9, 6, [6]), (1, 6, []), (2, 1, [])])
def test_as_many_processes_are_started_as_are_asked_for_and_have_a_file(
    pages, tmp_path, monkeypatch, processes, files, started
):
    class Here:
        def __init__(self, step, count):
            self.step, counts[len(counts) :] = step, [count]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def do(self, some, told):
            for shard in some:
                shard.do(self.step, lambda now: None)

    counts = []
    monkeypatch.setattr(shards, "_Workers", Here)
    inputs = [pages / name for name in NAMES[:files]]
    split_data(inputs, tmp_path / "out", skip_broken=True, processes=processes)
    assert counts == started


class Dies(ShardStep):
    def work(self, records, step):
        if any("part1" in file.path for file in records.files):
            os._exit(9)
        for record in records:
            step.keep(record)


def test_a_process_that_is_killed_is_told_and_the_others_end(pages, tmp_path):
    step = Dies("dies", "dying", ReadOptions(skip_broken=True), ReadOptions())
    with pytest.raises(DataError, match=r"part1\.jsonl: the process that worked on it ended"):
        run_shards(step, pages, tmp_path / "out", WriteOptions(), processes=2, progress=None)
    assert not (tmp_path / "out").exists()
    import multiprocessing

    assert not multiprocessing.active_children()


class Waits(ShardStep):
    def work(self, records, step):
        Path(records.files[0].path + ".begun").touch()
        time.sleep(60)


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_all_processes(pages, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_data_shards as t; from phi3_mlx.data import shards\n"
        "shards._SMALL_BYTES = 1; step = t.Waits('waits', 'waiting', t.ReadOptions(), t.ReadOptions())\n"
        "t.run_shards(step, sys.argv[2], sys.argv[3], t.WriteOptions(), processes=2, progress=None)"
    )
    command = [sys.executable, "-c", script, str(ROOT / "tests"), str(pages), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 240
        while len([*pages.glob("*.begun")]) < 2:
            assert time.monotonic() < until
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) != 0
        assert process.stderr.read().decode().rstrip().endswith("KeyboardInterrupt")
    assert len(children.stdout.split()) >= 2
    while [pid for pid in children.stdout.split() if lives(int(pid))]:  # Python's resource tracker ends a little later
        assert time.monotonic() < until
        time.sleep(0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages"]


@pytest.mark.parametrize("name", ["thesis.txt", "0" * 31, "shards"])
def test_a_folder_of_somebodys_is_not_taken_for_shards(pages, tmp_path, name):
    (tmp_path / "out.shards" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="holds something else than shards"):
        split_data(pages, tmp_path / "out", skip_broken=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.shards", "pages"]
    assert [path.name for path in (tmp_path / "out.shards").iterdir()] == [name]


def test_what_was_finished_goes_while_its_run_still_holds_it(pages, tmp_path, monkeypatch):
    """Else it might be what another run, which began in between, has finished."""
    usual, held = shutil.rmtree, []

    def watched(place, **more):
        if Path(place) == tmp_path / "out.shards":
            with hold(place) as mine:
                held.append(not mine)
            assert (tmp_path / "out" / "report.json").is_file()
        usual(place, **more)

    monkeypatch.setattr(shards.shutil, "rmtree", watched)
    split_data(pages, tmp_path / "out", skip_broken=True)
    assert held == [True]
    assert not (tmp_path / "out.shards").exists()


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_other_vocabularies_go_to_other_processes(pages, tmp_path, kind):
    place = TINY if kind == "sentencepiece" else tiktoken_ranks(tmp_path / "ranks")
    tokenizer = read_tokenizer(place, backend=kind)
    one, two = (tokenize_data(pages, tmp_path / f"{n}", tokenizer, skip_broken=True, processes=n) for n in (1, 2))
    assert one == two
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert one["outputs"]["tokens"]["tokens"] > 1000


def test_texts_of_which_the_tokenizer_makes_nothing_are_counted(tmp_path):
    tokenizer = read_tokenizer(blind(tmp_path / "blind"))
    texts = ["the rabbit", "\u200b\u200b", "", "the end"]
    for name, some in (("a", texts), ("b", ["\u200b"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    report = tokenize_data([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", tokenizer)
    assert (report["kept"], report["removed"]) == (2, 3)
    assert {reason: removed["records"] for reason, removed in report["reasons"].items()} == {"empty": 1, "no tokens": 2}
    sources = [sample["source"] for sample in report["reasons"]["no tokens"]["samples"]]
    assert sources == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1"]
    with pytest.raises(DataError, match="no text in these records, of which no tokens come"):
        tokenize_data(tmp_path / "b.jsonl", tmp_path / "none", tokenizer)
    assert data_stats(tmp_path / "a.jsonl", tokenizer=tokenizer)["tokens"]["shortest"] == 0


def test_tokens_are_made_of_what_was_named_and_a_folder_only_replaced_where_that_was_said(tmp_path):
    tokenizer, out = load_tokenizer("tiny"), tmp_path / "out"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the end", "body": "a duck"}) + "\n")
    (tmp_path / "a.txt").write_text("the dog\n\nran\n")
    report = tokenize_data(tmp_path / "a.jsonl", out, tokenizer, field="body")
    tokens = report["outputs"]["tokens"]
    assert (report["kept"], report["removed"], report["reasons"]) == (1, 0, {})
    assert [sample["text"] for sample in tokens["samples"]] == ["a duck"]
    assert (tokens["records"], tokens["characters"]) == (1, 6)
    with pytest.raises(DataError, match="exists"):
        tokenize_data(tmp_path / "a.txt", out, tokenizer)
    assert tokenize_data(tmp_path / "a.txt", out, tokenizer, force=True)["kept"] == 1
    assert tokenize_data(tmp_path / "a.txt", out, tokenizer, lines=True, force=True)["kept"] == 2


def test_what_was_finished_with_another_tokenizer_is_made_anew(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text('{"text": "the dog ran to the end"}\n')
    files[1].write_text("{broken\n")
    with pytest.raises(DataError, match="is not JSON"):
        tokenize_data(files, tmp_path / "out", load_tokenizer("tiny"))
    assert (tmp_path / "out.shards").exists()
    files[1].write_text('{"text": "and met a rabbit"}\n')
    other = read_tokenizer(tiktoken_ranks(tmp_path / "ranks"), backend="tiktoken")
    for name in ("out", "whole"):
        tokenize_data(files, tmp_path / name, other)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_tokenizer_without_an_end_of_texts_makes_no_shards(pages, tmp_path):
    with pytest.raises(OptionError, match="this tokenizer has no token that ends a text"):
        tokenize_data(pages, tmp_path / "out", SimpleNamespace(eos_token_id=None))
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_share_shards(pages, tmp_path):
    from phi3_mlx.store.line_file import alone_in

    with alone_in(tmp_path / "out.shards"), pytest.raises(DataError, match="another process writes into"):
        split_data(pages, tmp_path / "out", skip_broken=True)


def test_small_files_share_a_shard_and_a_pipe_has_its_own(pages, tmp_path, monkeypatch):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    monkeypatch.setattr(shards, "_SMALL_BYTES", 2 * (pages / "part0.jsonl").stat().st_size + 100)
    shutil.copy(pages / "part0.jsonl", tmp_path / "again.jsonl")
    files = Records([pages, fifo, tmp_path / "again.jsonl"], ReadOptions(), "", None).files
    assert [len(shard) for shard in shards._shared(files)] == [3, 2, 1, 1, 1]


def test_samples_of_parts_are_those_of_the_whole():
    records = [DataRecord(f"file:{n}", {}, f"text {n}", b"") for n in range(400)]
    whole = Samples()
    for record in records:
        whole.add(record)
    for cuts in ([1], [3, 4, 390], [*range(0, 400, 7)]):
        together = Samples()
        for first, last in zip([0, *cuts], [*cuts, 400], strict=True):
            part = Samples()
            for record in records[first:last]:
                part.add(record)
            together.take(json.loads(json.dumps(part.state())))
        assert (together.count, together.shown) == (400, whole.shown)
    assert len({sample["source"] for sample in whole.shown}) == 5
    assert [sample["source"] for sample in whole.shown] == sorted(
        (sample["source"] for sample in whole.shown), key=lambda source: int(source[5:])
    )
