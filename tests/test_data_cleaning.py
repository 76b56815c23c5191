"""phi3-mlx data dedupe and decontaminate: against sets of words in a row, as a slow reader would count them."""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict

import pytest
from conftest import ROOT
from peaks import OWN_PEAK
from test_data_steps import rows_of, run, write

from phi3_mlx import decontaminate_data, dedupe_data
from phi3_mlx.data import near
from phi3_mlx.data.near import BandTable, bands
from phi3_mlx.data.shingles import jaccard, shingle_set, words_in
from phi3_mlx.errors import DataError, OptionError

VOCABULARY = [f"word{n}" for n in range(3000)]


def runs_of(text, length=5):
    """The oracle: runs of words as tuples."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + length]) for n in range(len(words) - length + 1)}


def share_of(first, second):
    a, b = runs_of(first), runs_of(second)
    return len(a & b) / len(a | b)


def alike(source, text, low, high):
    """Another text whose true similarity lies in [low, high)."""
    while True:
        words = text.split()
        while (share := share_of(text, " ".join(words))) >= high:
            words[source.randrange(len(words))] = source.choice(VOCABULARY)
        if share >= low:
            return " ".join(words)


# dedupe
def test_planted_duplicates_at_the_threshold_are_removed_and_their_neighbours_below_it_kept(tmp_path):
    source = random.Random(7)
    originals = [" ".join(source.choices(VOCABULARY, k=source.randrange(120, 400))) for _ in range(300)]
    rows = [{"text": text, "kind": "original"} for text in originals]
    rows += [{"text": alike(source, text, 0.8, 0.83), "kind": "twin"} for text in originals[:200]]
    rows += [{"text": alike(source, text, 0.72, 0.79), "kind": "cousin"} for text in originals[200:]]
    path = write(tmp_path / "a.jsonl", rows)
    report = dedupe_data(path, tmp_path / "out")
    removed = rows_of(tmp_path / "out" / "removed.jsonl")
    numbers = [int(line["source"].rpartition(":")[2]) - 1 for line in removed]
    twins = sum(rows[n]["kind"] == "twin" for n in numbers)
    assert twins / 200 >= 0.95  # recall
    assert twins / len(numbers) >= 0.95  # precision
    assert report["removed"] == len(numbers)
    for line, n in zip(removed, numbers, strict=True):
        first = int(line["duplicate_of"].rpartition(":")[2]) - 1
        assert line["jaccard"] == pytest.approx(share_of(rows[n]["text"], rows[first]["text"]), abs=1e-4)
        assert line["reason"] == "near duplicate"


def test_equal_texts_are_removed_and_named_with_the_first(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"text": text} for text in ("A dog ran.", "A cat sat.", "A dog ran.", "a DOG ran!")]
    )
    report = dedupe_data(path, tmp_path / "near")
    removed = rows_of(tmp_path / "near" / "removed.jsonl")
    assert removed == [
        {"source": f"{path}:3", "reason": "exact duplicate", "duplicate_of": f"{path}:1"},
        {"source": f"{path}:4", "reason": "near duplicate", "duplicate_of": f"{path}:1", "jaccard": 1.0},
    ]
    assert {reason: facts["records"] for reason, facts in report["reasons"].items()} == {
        "exact duplicate": 1, "near duplicate": 1,
    }  # fmt: skip
    assert [row["text"] for row in rows_of(tmp_path / "near" / "data.jsonl")] == ["A dog ran.", "A cat sat."]
    assert dedupe_data(path, tmp_path / "exact", exact=True)["removed"] == 1


def test_a_long_text_is_hashed_piece_by_piece_to_the_same_end(tmp_path, monkeypatch):
    text = " ".join(random.Random(1).choices(VOCABULARY, k=2000))
    path = write(tmp_path / "a.jsonl", [{"text": text}, {"text": f"{text} end"}, {"text": text[: len(text) // 2]}])
    monkeypatch.setattr(near, "_HASHED_AT_ONCE", 100)
    assert [line["source"][-2:] for line in _removed(path, tmp_path)] == [":2"]


def _removed(path, folder):
    dedupe_data(path, folder / "out")
    return rows_of(folder / "out" / "removed.jsonl")


@pytest.mark.long
@pytest.mark.parametrize(("words", "kept_bytes"), [(32, 2000), (4000, 10_000)], ids=["short", "long"])
def test_a_hundred_megabytes_take_ten_minutes_and_two_gigabytes(tmp_path, words, kept_bytes):
    source, path = random.Random(words), tmp_path / "a.jsonl"
    rows = planted = 0
    with path.open("w") as file:
        while file.tell() < 100e6:
            text = source.choices(VOCABULARY, k=words)
            file.write(f'{{"text": "{" ".join(text)}"}}\n')
            rows += 1
            if source.random() < 0.05:  # a word less at the end: 0.97 alike, and more
                file.write(f'{{"text": "{" ".join(text[:-1])}"}}\n')
                planted += 1
    script = (
        f"{OWN_PEAK}\nimport json, sys; from phi3_mlx import dedupe_data\n"
        "report = dedupe_data(sys.argv[1], sys.argv[2]); used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([report['kept'], report['removed'], used.ru_utime + used.ru_stime, own_peak()]))"
    )
    command = [sys.executable, "-c", script, path, tmp_path / "out"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    kept, removed, seconds, memory = json.loads(done.stdout)
    print(f"{rows + planted:,} records: {seconds:.0f} s of CPU, {memory / 1e9:.2f} GB")
    assert kept + removed == rows + planted
    assert removed == pytest.approx(planted, rel=0.01)
    assert seconds < 600
    assert memory < min(2e9, 3e8 + kept_bytes * kept)


def test_the_table_of_bands_finds_what_a_dictionary_does():
    source = random.Random(4)
    for count, values in ((1, 2**64), (4, 50), (21, 3000)):
        table, known, added = BandTable(count), defaultdict(set), 0
        for _ in range(700):
            keys = [source.randrange(values) * (2**64 // values) for _ in range(count)]
            assert table.find(keys) == sorted(set().union(*(known[key] for key in keys)))
            if source.random() < 0.8:
                table.add(keys)
                for key in keys:
                    known[key].add(added)
                added += 1


def test_the_bands_part_texts_as_those_of_datasketch_do(tmp_path):
    datasketch = pytest.importorskip("datasketch")
    source = random.Random(5)
    texts = []
    for _ in range(80):
        texts.append(" ".join(source.choices(VOCABULARY, k=source.randrange(20, 90))))
        texts += [alike(source, texts[-1], low, low + 0.25) for low in (0.15, 0.4, 0.65)]
    for threshold in (0.2, 0.5, 0.8):
        index, kept = datasketch.MinHashLSH(num_perm=128, params=bands(threshold)), []
        with tempfile.TemporaryFile() as file:
            found = near.NearTexts(threshold, 5, file, "")
            for n, text in enumerate(texts):
                hashes = shingle_set(text, 5)
                signature = datasketch.MinHash(128, hashfunc=int)
                signature.update_batch((hashes >> 32).tolist())
                shares = [(kept[m], jaccard(hashes, shingle_set(texts[kept[m]], 5))) for m in index.query(signature)]
                twin = min(((str(m), share) for m, share in sorted(shares) if share >= threshold), default=None,
                           key=lambda pair: int(pair[0]))  # fmt: skip
                assert found.find_or_add(text, str(n)) == twin
                if twin is None:
                    index.insert(len(kept), signature)
                    kept.append(n)
        assert len(kept) < 300


def test_a_text_that_is_as_alike_as_the_threshold_is_near_and_the_first_of_several_is_named(tmp_path):
    texts = ["red cow sits", "old red pig", "red cow runs", "red cow sits now here", "cow red"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    report = dedupe_data(path, tmp_path / "out", threshold=0.5, ngram=1)
    removed = rows_of(tmp_path / "out" / "removed.jsonl")
    assert [(line["source"][-2:], line["duplicate_of"][-2:], line["jaccard"]) for line in removed] == [
        (":3", ":1", 0.5), (":4", ":1", 0.6), (":5", ":1", 0.6667),
    ]  # fmt: skip
    assert report["kept"] == 2


def test_texts_of_few_or_no_words_are_compared_as_they_are(tmp_path):
    texts = ["Yes", "no", "YES", "...", "!!!", "", "a b c d", "a b c d e"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert [line["source"][-2:] for line in _removed(path, tmp_path)] == [":3"]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_miss_few_pairs_at_the_threshold(threshold):
    count, rows = bands(threshold)
    assert 2 <= count * rows <= 128
    assert (1 - threshold**rows) ** count <= 0.002
    assert rows == 64 or (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 0.002  # longer ones would miss more


def test_the_similarity_of_texts_is_that_of_their_sets_of_words():
    source = random.Random(3)
    text = " ".join(source.choices(VOCABULARY[:30], k=200))
    for low in (0.2, 0.5, 0.8):
        other = alike(source, text, low, low + 0.1)
        assert jaccard(shingle_set(text, 5), shingle_set(other, 5)) == share_of(text, other)
    assert jaccard(shingle_set("a b c d e f", 5), shingle_set("b a c d e f", 5)) == 0  # the order counts
    assert words_in("Ｆｕｌｌ width, ﬁne; 東京へ") == ["full", "width", "fine", "東", "京", "へ"]


def test_dedupe_says_what_it_needs(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    for threshold in (0, 1.1, "half"):
        with pytest.raises(OptionError):
            dedupe_data(path, tmp_path / "out", threshold=threshold)
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(OptionError, match=r"need the package datasketch: pip install .*exact=True does not"):
        dedupe_data(path, tmp_path / "out")
    assert dedupe_data(path, tmp_path / "out", exact=True)["kept"] == 1


# decontaminate
QUESTION = "Which of the following animals is able to live for a whole year without any water at all?"


def test_records_that_hold_a_question_are_removed_with_where_it_is_asked(tmp_path):
    asked = write(tmp_path / "test.jsonl", [{"question": "Who?", "choices": ["a", "b"]}, {"deep": [{"q": QUESTION}]}])
    texts = [
        "Nothing of the kind.",
        f"Page 7. {QUESTION.upper().replace(' ', '  ')} Answer: B",
        " ".join(QUESTION.split()[:12]),  # a word less than are looked for
        " ".join(QUESTION.split()[2:15]),
        " ".join(reversed(QUESTION.split())),
        "",
    ]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    report = decontaminate_data(path, tmp_path / "out", asked)
    removed = rows_of(tmp_path / "out" / "removed.jsonl")
    assert [line["source"] for line in removed] == [f"{path}:2", f"{path}:4"]
    assert {line["asked_in"] for line in removed} == {f"{asked}:2"}
    assert removed[1]["words"] == " ".join(words_in(QUESTION)[2:15])
    assert [line["runs"] for line in removed] == [len(QUESTION.split()) - 12, 1]
    assert report["against"] == {"inputs": [str(asked)], "records": 2, "texts": 4, "too_short": 3}
    assert report["kept"] == 4


def test_a_short_question_is_looked_for_as_a_whole(tmp_path):
    asked = write(tmp_path / "test.jsonl", [{"q": "one two three four five six seven eight"}, {"q": "one two three"}])
    texts = ["so one two three four five six seven eight nine", "one two three four five six seven", "one two three"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    report = decontaminate_data(path, tmp_path / "out", [asked])
    assert [row["text"] for row in rows_of(tmp_path / "out" / "data.jsonl")] == texts[1:]
    assert report["against"]["too_short"] == 1
    assert decontaminate_data(path, tmp_path / "three", [asked], ngram=3)["kept"] == 0


def test_only_a_named_key_is_looked_for(tmp_path):
    asked = write(tmp_path / "test.jsonl", [{"q": QUESTION, "context": "c " * 20}])
    path = write(tmp_path / "a.jsonl", [{"text": "c " * 20}, {"text": QUESTION}])
    assert decontaminate_data(path, tmp_path / "all", asked)["removed"] == 2
    assert decontaminate_data(path, tmp_path / "q", asked, against_field="q")["removed"] == 1
    with pytest.raises(DataError, match=r"test\.jsonl:1: has no key 'answer'"):
        decontaminate_data(path, tmp_path / "out", asked, against_field="answer")


def test_an_evaluation_with_nothing_to_look_for_is_refused(tmp_path):
    asked = write(tmp_path / "test.jsonl", [{"q": "Who?"}])
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="no text of 8 words or more"):
        decontaminate_data(path, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_the_commands_say_what_they_removed(tmp_path, capsys):
    asked = write(tmp_path / "test.jsonl", [{"q": QUESTION}])
    path = write(tmp_path / "a.jsonl", [{"text": QUESTION}, {"text": "fine"}, {"text": "fine"}])
    assert run("dedupe", path, "-o", tmp_path / "unique") == 0
    assert "removed 1: exact duplicate" in capsys.readouterr().err
    assert run("decontaminate", tmp_path / "unique", "-o", tmp_path / "clean", "--against", asked) == 0
    assert "removed 1: asked by an evaluation" in capsys.readouterr().err
    assert rows_of(tmp_path / "clean" / "data.jsonl") == [{"text": "fine"}]
    assert json.loads((tmp_path / "clean" / "report.json").read_text())["inputs"][0]["file"].endswith(
        "unique/data.jsonl"
    )
    assert run("dedupe", path, "-o", tmp_path / "x", "--threshold", "7") == 2
    assert "--threshold 7.0 is outside its range" in capsys.readouterr().err
