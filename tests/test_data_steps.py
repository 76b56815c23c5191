"""phi3-mlx data: files of any kind are read whole or named, and stats, split and mix tell the truth about them."""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from conftest import ROOT
from tokenizer_samples import TINY

from phi3_mlx import data_stats, mix_data, split_data
from phi3_mlx.cli import main
from phi3_mlx.data import formats, records, sharing
from phi3_mlx.data.options import ReadOptions
from phi3_mlx.data.records import Records
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.tuning.examples import encode_records
from phi3_mlx.tuning.rows import read_row


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(*inputs, **options):
    return [(record.source, record.text) for record in Records(inputs, ReadOptions(**options), "reading", None)]


def run(*words):
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, words)])
    return left.value.code


STORIES = [{"text": f"Story {n}", "n": n} for n in range(1000)]


@pytest.fixture
def stories(tmp_path):
    return write(tmp_path / "stories.jsonl", STORIES)


# Reading
def test_every_kind_of_file_gives_the_same_records(tmp_path, stories):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    content = stories.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    half = len(content) // 2  # two frames, as `cat` makes them
    frames = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "a.ndjson").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\n").rstrip())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(STORIES), tmp_path / "a.parquet")
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.parquet"):
        records = [*Records(tmp_path / name, ReadOptions(), "reading", None)]
        assert [record.value for record in records] == STORIES, name
        assert [json.loads(record.line) for record in records] == STORIES
    assert texts(tmp_path / "a.parquet")[41] == (f"{tmp_path}/a.parquet:42", "Story 41")


def test_a_text_file_is_one_record_or_each_of_its_lines(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("\ufeff# A\n\nfine day\n", encoding="utf-8")
    assert texts(path) == [(str(path), "# A\n\nfine day\n")]
    assert texts(path, lines=True) == [(f"{path}:1", "# A"), (f"{path}:3", "fine day")]
    path.write_text("Grüße", encoding="utf-16")
    assert texts(path) == [(str(path), "Grüße")]
    with pytest.raises(DataError, match=r"a\.md is UTF-16.* text; save it as UTF-8"):
        texts(path, lines=True)


def test_a_folder_is_its_files_by_name_without_what_steps_removed(tmp_path):
    for name in (
        "b/two.txt",
        "a.txt",
        ".hidden/x.txt",
        "picture.png",
        "b/removed.jsonl",
        "b/report.json",
        "c/removed.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    assert [os.path.relpath(source.partition(":")[0], tmp_path) for source, _ in texts(tmp_path)] == [
        "a.txt", "b/two.txt", "c/removed.jsonl",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no records; put \.jsonl"):
        texts(tmp_path / "empty")


def test_the_text_of_a_training_example_is_what_is_said(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write(
        tmp_path / "a.jsonl", [{"messages": talk}, {"prompt": "Who?", "completion": "Me"}, {"text": "T", "body": "B"}]
    )
    assert [text for _, text in texts(path)] == ["Hi\n\nHello", "Who?\n\nMe", "T"]
    with pytest.raises(DataError, match=r"a.jsonl:1: has no key 'body'; its keys are 'messages'"):
        texts(path, field="body")


BROKEN = {
    b'{"text": "a"': "is not JSON",
    b"[1]": "is a list; expected a JSON object",
    b'{"text": "\xff"}': "is not UTF-8 text",
    b'{"text": 7}': "'text' is a number; expected a text",
    b'{"text": "\\ud800"}': "half a character",
    b'{"body": "a"}': "has only the keys 'body'",
    b'{"text": "a", "text": "b"}': "is not JSON",
    b'{"a":' * 1000 + b"1" + b"}" * 1000: "is not JSON",
}


@pytest.mark.parametrize("line", BROKEN, ids=[*BROKEN.values()])
def test_a_broken_line_is_named_or_left_out_and_counted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*; skip_broken=True leaves such records out") as error:
        split_data(path, tmp_path / "out")
    assert BROKEN[line] in str(error.value)
    assert [*tmp_path.iterdir()] == [path]  # nothing half
    report = split_data(path, tmp_path / "out", skip_broken=True)
    assert report["kept"] == report["read"] == 2
    assert report["broken"]["records"] == 1
    assert report["broken"]["samples"][0]["source"] == f"{path}:3"


def test_a_line_longer_than_memory_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 100)
    path = tmp_path / "a.jsonl"
    fits = b'{"text": "' + b"x" * 87 + b'"}\n'
    assert len(fits) == 100
    path.write_bytes(b'{"text": "a"}\n' + b"x" * 1000 + b"\n" + fits + b"y" * 101)
    records = Records(path, ReadOptions(skip_broken=True), "reading", None)
    assert [record.source for record in records] == [f"{path}:1", f"{path}:3"]
    assert [broken.source for broken in records.broken] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_named(tmp_path, stories, name, damage):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(stories.read_bytes()))
    elif name.endswith("zst"):
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(stories.read_bytes()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(STORIES), path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[4:200] = b"\x00" * 196
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name} (is damaged|cannot be read)|{name}:\\d+: "):
        data_stats(path)


def test_what_is_no_data_is_refused(tmp_path, stories):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "a.pdf").write_text("x")
    for given, said in {
        "empty.jsonl": "no records",
        "a.pdf": "is of no known kind",
        "none.pdf": "does not exist",
        "none.jsonl": "cannot be read: No such file",
    }.items():
        with pytest.raises(DataError, match=said):
            data_stats(tmp_path / given)
    with pytest.raises(DataError, match="is given twice"):
        data_stats([stories, stories])
    with pytest.raises(DataError, match="nothing to read"):
        data_stats([])
    assert data_stats([tmp_path / "empty.jsonl", stories])["read"] == 1000  # an empty one among others


def test_pipes_are_read(tmp_path, stories, monkeypatch, capsys):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(stories.read_bytes()))
    writer.start()
    assert data_stats(fifo)["read"] == 1000
    writer.join()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stories.read_bytes())))
    assert run("stats", "-", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["read"] == 1000
    assert report["inputs"] == [{"file": "stdin", "bytes": None, "records": 1000}]


# What a step writes
def test_a_folder_is_replaced_only_if_a_step_wrote_it_and_it_is_not_read(tmp_path, stories):
    out = tmp_path / "out"
    split_data(stories, out)
    with pytest.raises(DataError, match="exists already"):
        split_data(stories, out)
    split_data(stories, out, part={"all": 1}, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["all.jsonl", "removed.jsonl", "report.json"]
    for given in (out, out / "all.jsonl"):
        with pytest.raises(DataError, match="which is read"):
            split_data(given, out, force=True)
    with pytest.raises(DataError, match="which is read"):
        data_stats(stories, stories)
    assert len(rows_of(out / "all.jsonl")) == 1000
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"no report\.json"):
        split_data(stories, mine, force=True)


@pytest.mark.parametrize("compress", ["gz", "zst"])
def test_compressed_records_are_those_that_are_not_and_the_same_bytes_each_time(tmp_path, stories, compress):
    for name in ("a", "b"):
        split_data(stories, tmp_path / name, part={"all": 1}, compress=compress)
    first, again = ((tmp_path / name / f"all.jsonl.{compress}") for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    assert len(first.read_bytes()) < stories.stat().st_size / 2
    assert texts(first, lines=False)[-1] == (f"{first}:1000", "Story 999")


def test_lines_are_written_as_they_were_read(tmp_path):
    line = '{"text":"é \\u00e9",   "id": 12345678901234567890123, "x": 1.50}'
    (tmp_path / "a.jsonl").write_text(f"{line}\n", encoding="utf-8")
    split_data(tmp_path / "a.jsonl", tmp_path / "out", part={"all": 1})
    assert (tmp_path / "out" / "all.jsonl").read_text(encoding="utf-8") == f"{line}\n"


def test_ctrl_c_leaves_nothing(tmp_path):
    fifo, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "phi3_mlx", "data", "split", str(fifo), "-o", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        with fifo.open("wb") as pipe:
            pipe.write(b'{"text": "a"}\n' * 1000)
            pipe.flush()
            while not any(path.name.endswith(".partial") for path in tmp_path.iterdir()):
                time.sleep(0.01)
            process.send_signal(2)
            assert process.wait(120) == 130
        assert b"stopped by Ctrl-C" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


# stats
def test_stats_are_those_of_a_slow_count(tmp_path):
    said = ["Hello", "Привет, мир", "Hello", "東京 is far", "a" * 100]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in said])
    report = data_stats(path)
    lengths = sorted(map(len, said))
    assert report["characters"]["total"] == sum(lengths)
    assert (report["characters"]["shortest"], report["characters"]["longest"]) == (5, 100)
    assert report["characters"]["quantiles"]["50"] == lengths[2]
    assert report["characters"]["quantiles"]["99"] == 100
    assert sum(part["records"] for part in report["characters"]["histogram"]) == 5
    assert report["exact_duplicates"]["records"] == 1
    assert report["exact_duplicates"]["samples"][0]["source"] == f"{path}:3"
    assert report["scripts"] == pytest.approx({"Latin": 115 / 126, "Cyrillic": 9 / 126, "CJK": 2 / 126})
    assert report["tokens"] is None


def test_stats_say_what_tune_would_learn(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Hello there"}, {"text": "A dog."}, {"text": "x", "images": ["a"]}]
    path = write(tmp_path / "a.jsonl", rows)
    tokenizer = read_tokenizer(TINY)
    report = data_stats(path, tokenizer=tokenizer)
    encoded = encode_records([read_row(row, "", {}) for row in rows[:2]], tokenizer, max_length=1000)
    tune = report["tune"]
    assert (tune["examples"], tune["refused"]) == (2, 1)
    assert tune["faults"][0].startswith(f"{path}:3: 'images' beside 'text' is not honoured")
    assert tune["learnt_tokens"] == encoded.trained_tokens > 5
    assert tune["tokens"]["total"] == sum(encoded.lengths)
    said = ("Hi\n\nHello there", "A dog.", "x")
    assert report["tokens"]["total"] == sum(len(tokenizer.encode(text)) for text in said)


def test_stats_name_what_tune_would_refuse(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "a"}, {"text": "ok", "body": "b"}])
    report = data_stats(path, tmp_path / "out", field="body")
    assert report["tune"]["refused"] == 1
    assert report["tune"]["faults"][0].startswith(f"{path}:1: has only the keys 'body'")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


# split
def test_a_split_keeps_every_record_once_in_order_and_about_its_share(tmp_path, stories):
    report = split_data(stories, tmp_path / "out", part=["train=0.8", "valid=0.1", "test=0.1"])
    parts = {name: rows_of(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert sorted(row["n"] for rows in parts.values() for row in rows) == [*range(1000)]
    for name, share in {"train": 800, "valid": 100, "test": 100}.items():
        numbers = [row["n"] for row in parts[name]]
        assert numbers == sorted(numbers)
        assert abs(len(numbers) - share) < 4 * (share * (1 - share / 1000)) ** 0.5
        assert report["outputs"][f"{name}.jsonl"]["records"] == len(numbers)


def test_a_split_puts_equal_texts_on_one_side_and_more_records_move_none(tmp_path, stories):
    split_data(stories, tmp_path / "a", part={"x": 0.5, "y": 0.5})
    more = write(tmp_path / "more.jsonl", [*({"text": f"New {n}", "n": -1} for n in range(500)), *STORIES, *STORIES])
    split_data(more, tmp_path / "b", part={"x": 0.5, "y": 0.5})
    before, after = ({row["n"] for row in rows_of(tmp_path / name / "x.jsonl")} for name in ("a", "b"))
    assert before == after - {-1}
    assert 400 < len(before) < 600
    split_data(stories, tmp_path / "c", part={"x": 0.5, "y": 0.5}, seed=1)
    assert 150 < len(before & {row["n"] for row in rows_of(tmp_path / "c" / "x.jsonl")}) < 350


def test_what_shares_leave_is_removed_and_listed(tmp_path, stories):
    report = split_data(stories, tmp_path / "out", part={"sample": 0.25})
    removed = rows_of(tmp_path / "out" / "removed.jsonl")
    assert report["removed"] == len(removed) == 1000 - report["kept"]
    assert {line["reason"] for line in removed} == {"outside the shares"} == {*report["reasons"]}
    kept = {row["n"] for row in rows_of(tmp_path / "out" / "sample.jsonl")}
    assert kept.isdisjoint(int(line["source"].rpartition(":")[2]) - 1 for line in removed)
    assert len(report["reasons"]["outside the shares"]["samples"]) == 5


def test_thirds_leave_nothing(tmp_path, stories, monkeypatch):
    monkeypatch.setattr(sharing, "_place_of", lambda text, seed: 1 - 2**-53)
    report = split_data(stories, tmp_path / "out", part=dict.fromkeys("abc", 1 / 3 - 1e-17))
    assert report["outputs"]["c.jsonl"]["records"] == 1000


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (["train"], "has no name"),
        (["../x=1"], "has no name"),
        (["removed=1"], "has no name"),
        (["a=1", "a=0.1"], "given twice"),
        (["a=0.9", "b=0.2"], "are 1.1 together"),
        (["a=0"], "greater than 0"),
        (["a=nan"], "greater than 0"),
        (["a=much"], "greater than 0"),
        ([], "are 0 together"),
    ],
)
def test_a_share_that_is_none_is_refused(tmp_path, stories, part, said):
    with pytest.raises(OptionError, match=said):
        split_data(stories, tmp_path / "out", part=part)


# mix
@pytest.fixture
def pools(tmp_path):
    long = write(tmp_path / "long.jsonl", [{"text": "x" * 100, "n": n, "pool": "long"} for n in range(300)])
    short = write(tmp_path / "short.jsonl", [{"text": "y" * 10, "n": n, "pool": "short"} for n in range(300)])
    return long, short


def test_a_mix_has_its_shares_all_along_and_ends_where_they_need_more(tmp_path, pools):
    report = mix_data({pools[0]: 3, pools[1]: 1}, tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    assert len(rows) == report["kept"] == 400
    for end in range(1, 401):
        assert abs(sum(row["pool"] == "long" for row in rows[:end]) - 0.75 * end) <= 1
    assert sorted(row["n"] for row in rows if row["pool"] == "long") == [*range(300)]  # each once
    assert [part["ended_the_mix"] for part in report["mix"]] == [True, False]
    assert [part["got"] for part in report["mix"]] == [0.75, 0.25]


def test_a_mix_by_characters_has_shares_of_characters(tmp_path, pools):
    report = mix_data({pools[0]: 0.5, pools[1]: 0.5}, tmp_path / "out", by="characters")
    counts = Counter(row["pool"] for row in rows_of(tmp_path / "out" / "data.jsonl"))
    assert counts["short"] == 300
    assert abs(counts["long"] - 30) <= 1
    assert report["mix"][0]["got"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("shares", "options"),
    [
        ((3, 1), {}),  # the first file ends it
        ((1, 1), {"epochs": 2}),
        ((1, 9), {"epochs": 3, "shuffle": 1}),
        ((1, 1), {"records": 50}),
        ((1, 1), {"by": "characters"}),
    ],
)
def test_a_mix_advances_evenly_though_it_reads_several_files_ahead(tmp_path, pools, shares, options, monkeypatch):
    for module in (records, sharing):
        monkeypatch.setattr(module, "ADVANCE_EVERY", 0)
    told = []
    report = mix_data(dict(zip(pools, shares, strict=True)), tmp_path / "out", **options, progress=told.append)
    assert [now.records for now in told] == [*range(1, report["kept"] + 1), report["kept"]]
    assert {now.stage for now in told} == {"mixing"}
    assert {now.total for now in told} == {sum(file.stat().st_size for file in pools)}
    assert told[-1].done == told[-1].total
    for now in told:
        assert now.done / now.total == pytest.approx(now.records / report["kept"], abs=0.05)


def test_a_mix_repeats_files_as_often_as_it_may(tmp_path, pools):
    report = mix_data({pools[0]: 1, pools[1]: 9}, tmp_path / "out", epochs=2)
    counts = Counter((row["pool"], row["n"]) for row in rows_of(tmp_path / "out" / "data.jsonl"))
    assert {count for (pool, _), count in counts.items() if pool == "short"} == {2}
    assert {count for (pool, _), count in counts.items() if pool == "long"} == {1}
    assert [part["readings"] for part in report["mix"]] == [1, 2]
    assert mix_data({pools[0]: 1, pools[1]: 9}, tmp_path / "few", records=7, epochs=2)["kept"] == 7


def test_a_mix_is_the_same_for_a_seed_and_shuffled_unless_told_not_to(tmp_path, pools):
    def order(name, **options):
        mix_data({pools[0]: 1, pools[1]: 1}, tmp_path / name, **options)
        return [row["n"] for row in rows_of(tmp_path / name / "data.jsonl") if row["pool"] == "long"]

    assert order("a", seed=3) == order("b", seed=3) != order("c", seed=4)
    assert order("d", shuffle=1) == [*range(300)]
    near = order("e", shuffle=10)
    assert near != sorted(near) == [*range(300)]
    assert max(n - place for place, n in enumerate(near)) <= 10  # none is drawn before it was read


def test_a_mix_holds_few_bytes_of_large_records(pools, monkeypatch):
    monkeypatch.setattr(sharing, "_HELD", 1000)  # of lines of 139 bytes or so
    held, read = [], 0

    def counted():
        nonlocal read
        for record in Records(pools[0], ReadOptions(), "mixing", None):
            read += 1
            yield record

    for drawn, _ in enumerate(sharing.shuffled(counted(), 10**6, sharing.random.Random(0))):
        held.append(read - drawn)
    assert len(held) == 300
    assert 5 < max(held) < 10


def test_a_mix_refuses_pipes_that_it_would_have_to_read_twice(tmp_path, pools):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionError, match="pipe can be read only once"):
        mix_data({tmp_path / "pipe": 1, pools[0]: 1}, tmp_path / "out", epochs=2)


# The command line
def test_commands_say_what_they_did_and_what_is_wrong(tmp_path, stories, capsys):
    assert run("split", stories, "-o", tmp_path / "out", "--part", "x=0.5") == 0
    said = capsys.readouterr().err
    assert "outside the shares" in said
    assert "/x.jsonl: " in said
    assert run("mix", f"{stories}=1", tmp_path / "out", "-o", tmp_path / "mixed") == 2
    assert "has no share; write" in capsys.readouterr().err
    assert run("split", stories, "-o", tmp_path / "out") == 1
    assert "or replace it with --force" in capsys.readouterr().err
    assert run("stats", stories, tmp_path / "out", "-m", "tiny") == 0
    shown = capsys.readouterr().out
    assert "exact duplicates" in shown
    assert "tokens to tune" in shown
    with stories.open("a") as file:
        file.write("broken\n")
    assert run("stats", stories) == 1
    assert "stories.jsonl:1001: is not JSON" in (said := capsys.readouterr().err)
    assert "--skip-broken leaves such records out" in said
    assert run("split", stories, "-o", tmp_path / "some", "--skip-broken") == 0
    assert "could not be read: 1; " in capsys.readouterr().err
