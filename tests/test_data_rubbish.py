"""Files and arguments that are rubbish: each is refused in one line that says what was given, and nothing is left."""

import json
import os
import re

import numpy as np
import pytest

from phi3_mlx import (
    data_stats,
    decontaminate_data,
    dedupe_data,
    filter_data,
    mix_data,
    split_data,
    train_filter,
)
from phi3_mlx.cli import main
from phi3_mlx.data.formats import data_files
from phi3_mlx.errors import DataError, OptionError

ROWS = [{"text": f"a text of many words about the number {n}", "good": n % 2 == 0} for n in range(20)]
STEPS = {
    "stats": lambda files, out, **more: data_stats(files, out, **more),
    "dedupe": lambda files, out, **more: dedupe_data(files, out, exact=True, **more),
    "filter": lambda files, out, **more: filter_data(files, out, rules="length", min_words=1, **more),
    "decontaminate": lambda files, out, **more: decontaminate_data(files, out, "asked.jsonl", **more),
    "split": lambda files, out, **more: split_data(files, out, **more),
    "train-filter": lambda files, out, **more: train_filter(files, out, label="good", **more),
    "mix": lambda files, out, **more: mix_data(dict.fromkeys(files, 1), out, **more),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", ROWS)
    write("asked.jsonl", [{"text": "what is asked here has eight words, or more"}])
    return tmp_path


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def run(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["data", *words])
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize("step", STEPS)
def test_what_names_no_files_is_refused(step, here):
    before = sorted(os.listdir())
    if step != "mix":
        for given in (None, 5, True, b"a.jsonl", {"a.jsonl": 1}, object()):
            with pytest.raises(OptionError, match=r"inputs is .*; expected names of files or folders"):
                STEPS[step](given, "out")
    for given in ([5], ["a.jsonl", None], [""], [b"a.jsonl"]):
        with pytest.raises(OptionError, match=r"inputs (holds|is) .*; expected (names of files|a path)"):
            STEPS[step](given, "out")
    for given in ("a\0.jsonl", "\ud800.jsonl", "a" * 300):
        with pytest.raises(OptionError, match=r"inputs is .*expected a path"):
            STEPS[step]([given], "out")
    for output in (5, True, b"out", ["out"], "", "a\0", "a" * 300):
        with pytest.raises(OptionError, match=r"output is .*(expected a path|name a directory)"):
            STEPS[step](["a.jsonl"], output)
    with pytest.raises(OptionError, match="progress is 5; expected a function"):
        STEPS[step](["a.jsonl"], "out", progress=5)
    assert sorted(os.listdir()) == before


def test_other_arguments_of_another_type_are_refused():
    for part in (5, None, True):
        with pytest.raises(OptionError, match=r"part is .*; expected a list of texts"):
            split_data("a.jsonl", "out", part=part)
    with pytest.raises(DataError, match="no record has the label 'fine'; there are none"):
        train_filter("a.jsonl", "out", label="good", good="fine")  # not its letters
    for good in (5, None):
        with pytest.raises(OptionError, match=r"good is .*; expected a list of texts"):
            train_filter("a.jsonl", "out", label="good", good=good)
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match=r"threshold .* is outside its range; give a finite number"):
            train_filter("a.jsonl", "out", threshold=threshold)
    for tokenizer in ("tiny", 5):
        with pytest.raises(OptionError, match=r"tokenizer is .*; expected the one that load"):
            data_stats("a.jsonl", tokenizer=tokenizer)
    for against in (5, [None], ""):
        with pytest.raises(OptionError, match=r"against (is|holds) .*; expected names of files or folders"):
            decontaminate_data("a.jsonl", "out", against)
    for shares in (5, "a.jsonl", ["a.jsonl"], None):
        with pytest.raises(OptionError, match=r"inputs is .*; expected a mapping of files to their shares"):
            mix_data(shares, "out")
    with pytest.raises(OptionError, match="inputs is 5; expected a path"):
        mix_data({5: 1}, "out")
    assert sorted(os.listdir()) == ["a.jsonl", "asked.jsonl"]
    parts = split_data("a.jsonl", "out", part={"a": np.float32(0.5), "b": np.float64(0.5)})["outputs"]
    assert sum(part["records"] for part in parts.values()) == 20


@pytest.mark.parametrize("step", ["filter", "decontaminate", "split"])
def test_an_empty_file_may_come_first(step):
    write("0.jsonl", [])
    assert STEPS[step](["0.jsonl", "a.jsonl"], "out")["kept"] == 20
    with pytest.raises(DataError, match=re.escape("0.jsonl: no records; give one a line")):
        STEPS[step](["0.jsonl"], "none")
    assert sorted(os.listdir()) == ["0.jsonl", "a.jsonl", "asked.jsonl", "out"]  # no shards of nothing


def test_nothing_in_a_folder_is_passed_over_in_silence(monkeypatch):
    os.makedirs("far/deep")
    write("far/deep/b.jsonl", ROWS[:3])
    os.makedirs("pages/.hidden")
    write("pages/.hidden/c.jsonl", ROWS)
    write("pages/.d.jsonl", ROWS)
    write("pages/e.jsonl", ROWS[3:5])
    os.symlink("../far", "pages/link")
    os.symlink("..", "pages/link/deep/around")  # a circle
    os.symlink(".", "pages/self")
    assert [file.name for file in data_files("pages")] == ["pages/e.jsonl", "pages/link/deep/b.jsonl"]
    assert data_stats("pages")["read"] == 5
    for target, said in (("nowhere", "No such file"), ("f.jsonl", "Too many levels")):
        os.symlink(target, "pages/f.jsonl")
        with pytest.raises(DataError, match=rf"pages/f\.jsonl cannot be read: {said}.*; name a readable file"):
            split_data(["a.jsonl", "pages"], "out")
        os.unlink("pages/f.jsonl")
    listed = os.scandir

    def closed(place):
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"pages/link/deep cannot be read: Permission denied; name readable"):
        data_files("pages")


def test_one_file_by_two_names_is_one_file():
    os.symlink("a.jsonl", "b.jsonl")
    for other in ("./a.jsonl", "b.jsonl"):
        with pytest.raises(DataError, match=rf"{re.escape(other)} is the same file as a\.jsonl; give it once"):
            data_stats(["a.jsonl", other])


def test_parts_that_are_one_file_on_a_mac_are_refused():
    with pytest.raises(OptionError, match="part 'A' is 'a' but for capitals, which is one file on many disks"):
        split_data("a.jsonl", "out", part=["a=0.5", "A=0.5"])
    with pytest.raises(OptionError, match="part 'Removed=1' has no name for a file"):
        split_data("a.jsonl", "out", part=["Removed=1"])


def test_records_that_cannot_be_read_are_skipped_where_the_message_says_so(capsys):
    with open("asked.jsonl", "a") as file:
        file.write("{broken\n")
    words = ["decontaminate", "a.jsonl", "-o", "out", "--against", "asked.jsonl"]
    code, said = run(capsys, *words)
    assert code == 1
    assert "asked.jsonl:2: is not JSON" in said
    assert said.endswith("; --skip-broken leaves such records out\n")
    code, said = run(capsys, *words, "--skip-broken")
    assert code == 0
    assert "records that could not be read: 1; asked.jsonl:2" in said


def test_topics_that_are_left_out_are_told(capsys):
    with open("topics.jsonl", "w") as file:
        file.write('{"text": "a dog"}\n{broken\n')
    words = ["synthesize", "--topics", "topics.jsonl", "--dry-run", "--skip-broken"]
    code, said = run(capsys, *words)
    assert code == 0
    assert "records that could not be read: 1; topics.jsonl:2: is not JSON" in said


def test_what_is_asked_for_is_said_as_it_is_typed(capsys):
    rows = [row | {"rating": "fine" if row["good"] else "poor"} for row in ROWS]
    write("b.jsonl", rows)
    for words, end in (
        (["train-filter", "b.jsonl", "-o", "o"], "say which of them are good, as --good fine\n"),
        (
            ["train-filter", "a.jsonl", "-o", "o", "--top", "0.1", "--threshold", "2"],
            "--top SHARE and --threshold RATING both say which texts are good; give one of them\n",
        ),
        (["filter", "a.jsonl", "-o", "o", "--at-least", "0.5"], "without a classifier; give --classifier FILE\n"),
        (
            ["filter", "a.jsonl", "-o", "o", "--min-words", "5", "--max-words", "3"],
            "which no text is; change --min-words N or --max-words N\n",
        ),
        (["filter", "a.jsonl", "-o", "o", "--classifier", "a.jsonl"], "bytes); name what train-filter wrote\n"),
        (["filter", "a.jsonl", "-o", "o", "--classifier", "~nobody-here/a"], "name what train-filter wrote\n"),
    ):
        code, said = run(capsys, *words)
        assert code in (1, 2)
        assert said.endswith(end)
        assert [line for line in said.splitlines() if not line.startswith("reading: ")] == [said.splitlines()[-1]]
        assert not os.path.exists("o")
