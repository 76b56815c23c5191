"""phi3-mlx data score: what a model says of each text, read together, kept as it comes."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from phi3_mlx import load, score, score_data, tune
from phi3_mlx.cli import main
from phi3_mlx.cli.options import ModelOptions
from phi3_mlx.data import rating, step
from phi3_mlx.data.rubric import EDUCATIONAL, make_rubric
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.models import decoder

RUBRIC = "Is the story about the sea? Answer yes or no.\n{text}\nAnswer:"
NAMES, PLACES = ("Mia", "Tom", "Ben", "Lily", "Sue"), ("park", "garden", "house", "sea", "forest")
FEELINGS = ("happy", "sad", "glad", "scared")
TEXTS = [
    f"One day, {name} went to the {place}. There was a big dog. {name} was happy to see it."
    for place in PLACES
    for name in NAMES
]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(f'{{"text": {json.dumps(text)},  "x": 1.50}}\n' for text in TEXTS))
    return path


def rows_of(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def scored(tiny, path, output, **more):
    return score_data(*tiny, path, output, **{"rubric": RUBRIC, "scale": "no=0,yes=2", **more})


def auc(good, bad):
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / len(good) / len(bad)


def test_a_rating_is_what_the_choices_of_one_text_alone_are_expected_to_say(tmp_path, tiny, stories):
    report = scored(tiny, stories, tmp_path / "out", perplexity=True)
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == TEXTS
    for row in rows[::6]:
        question = [{"role": "user", "content": RUBRIC.replace("{text}", row["text"])}]
        no, yes = (math.exp(each.total) for each in score(*tiny, question, ["no", "yes"]))
        assert row["rating"] == pytest.approx(2 * yes / (no + yes), abs=1e-3)
        assert row["rating_mass"] == pytest.approx(no + yes, abs=1e-4)
        (alone,) = score(*tiny, "", [row["text"]], raw=True)
        assert row["nats_per_token"] == pytest.approx(-alone.total / len(alone.tokens), abs=1e-3)
        bits = -alone.total / math.log(2) / len(row["text"])
        assert row["bits_per_character"] == pytest.approx(bits, abs=1e-3)
        assert row["cut"] is False
    assert len({row["rating"] for row in rows}) > 20
    mean = report["scores"]["rating"]["mean"]
    assert mean == pytest.approx(sum(row["rating"] for row in rows) / 25)
    assert sum(part["records"] for part in report["scores"]["rating"]["histogram"]) == 25
    ordered = sorted(rows, key=lambda row: row["rating"])
    assert [row["rating"] for row in report["lowest"]] == [row["rating"] for row in ordered[:5]]
    assert [row["rating"] for row in report["highest"]] == [row["rating"] for row in ordered[:-6:-1]]
    assert report["highest"][0]["text"] == ordered[-1]["text"]


def test_a_record_is_written_as_it_was_read_with_the_keys_behind(tmp_path, tiny, stories):
    scored(tiny, stories, tmp_path / "out")
    before, after = (path.read_text().splitlines() for path in (stories, tmp_path / "out" / "data.jsonl"))
    for old, new in zip(before, after, strict=True):
        assert new.startswith(old.removesuffix("}") + ', "rating": ')


def test_the_rubric_is_read_once_for_all_texts(tmp_path, tiny, stories, monkeypatch):
    read = []
    passes = decoder.Decoder.__call__

    def counted(self, ids, *more, **named):
        read.append(ids.size)
        return passes(self, ids, *more, **named)

    monkeypatch.setattr(decoder.Decoder, "__call__", counted)
    long = "Rate this story. " + "A good story has a beginning and an end. " * 10
    scored(tiny, stories, tmp_path / "out", rubric=long + "{text}\nAnswer:")
    tokenizer = tiny[1]
    rubric, texts = len(tokenizer.encode(long)), sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert rubric > 80
    assert sum(read) < texts + 2 * rubric + 12 * len(TEXTS)  # a text's end, the template and the choices beside it


def test_shuffled_words_are_less_likely_than_the_story(tmp_path, tiny):
    rng = random.Random(0)
    path = tmp_path / "both.jsonl"
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in TEXTS]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS + shuffled))
    report = score_data(*tiny, path, tmp_path / "out", rating=False, perplexity=True)
    nats = [row["nats_per_token"] for row in rows_of(tmp_path / "out")]
    assert auc(nats[25:], nats[:25]) > 0.95
    assert "rating" not in rows_of(tmp_path / "out")[0]
    assert set(report["scores"]) == {"nats_per_token", "bits_per_character"}


@pytest.mark.long
def test_a_model_that_was_trained_for_it_rates_unseen_stories_above_their_words_in_disorder(tmp_path, tiny):
    rng = random.Random(0)
    rubric = "Rate the text from 0 (words in disorder) to 5 (good).\n{text}\nRating:"

    def rows(names, places, count):
        for n in range(count):
            name, thing, feeling = rng.choice(names), rng.choice(["dog", "cat", "ball", "tree"]), rng.choice(FEELINGS)
            text = f"One day, {name} went to the {rng.choice(places)}. There was a big {thing}. {name} was {feeling}."
            shuffled = " ".join(rng.sample(text.split(), len(text.split())))
            yield {"text": shuffled if n % 2 else text, "good": n % 2 == 0}

    def area(model, output):
        score_data(*model, tmp_path / "unseen.jsonl", output, rubric=rubric)
        sides = [[row["rating"] for row in rows_of(output) if row["good"] is good] for good in (True, False)]
        return auc(*sides)

    taught = [
        {"prompt": rubric.replace("{text}", row["text"]), "completion": "5" if row["good"] else "0"}
        for row in rows(NAMES, PLACES, 240)
    ]
    for name, lines in {"taught": taught, "unseen": rows(("Max", "Anna", "Sam"), ("shop", "farm", "lake"), 60)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert area(tiny, tmp_path / "before") < 0.7
    tune("tiny", tmp_path / "taught.jsonl", tmp_path / "judge", steps=25, batch_size=8, learning_rate=2e-3)
    assert area(load("tiny", adapter=tmp_path / "judge"), tmp_path / "after") >= 0.8


@pytest.mark.parametrize("torn", ["", '{"text": "12', "x" * 5000])
def test_a_run_that_was_stopped_goes_on_and_writes_what_an_unbroken_one_does(
    tmp_path, tiny, stories, monkeypatch, torn
):
    monkeypatch.setattr(rating, "_TEXTS_AT_ONCE", 4)
    scored(tiny, stories, tmp_path / "whole")
    known = rating.batch_score
    asked = []

    def broken_off(model, tokenizer, prompts, **more):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return known(model, tokenizer, prompts, **more)

    monkeypatch.setattr(rating, "batch_score", broken_off)
    with pytest.raises(KeyboardInterrupt):
        scored(tiny, stories, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    journal = tmp_path / "out.unfinished" / "scores.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 12
    with journal.open("a") as file:
        file.write(torn)
    with pytest.raises(DataError, match=r"out\.unfinished was begun with another rubric"):
        scored(tiny, stories, tmp_path / "out", rubric="Another?")
    asked[:] = [0, 0]
    with pytest.raises(KeyboardInterrupt):  # stopped again, before what was torn is written over
        scored(tiny, stories, tmp_path / "out")
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 16
    journal.write_text("".join(lines[:-2]))  # as if it had been killed while it wrote what it knew
    monkeypatch.setattr(
        rating, "batch_score", lambda *given, **more: asked.append(len(given[2])) or known(*given, **more)
    )
    asked.clear()
    scored(tiny, stories, tmp_path / "out")
    assert sum(asked) == 25 - 12
    for name in ("data.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not journal.parent.exists()


def test_a_run_that_was_killed_goes_on_and_writes_the_same_bytes(tmp_path, tiny, stories):
    script = (
        "import sys, time; from phi3_mlx import load, score_data; from phi3_mlx.data import rating\n"
        "rating._TEXTS_AT_ONCE = 4; usual, calls = rating.batch_score, []\n"
        "def slow(*given, **more):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: print('in the middle', flush=True); time.sleep(100)\n"
        "    return usual(*given, **more)\n"
        "rating.batch_score = slow\n"
        "score_data(*load('tiny'), sys.argv[1], sys.argv[2], rubric=sys.argv[3], scale='no=0,yes=2', perplexity=True)"
    )
    command = [sys.executable, "-c", script, str(stories), str(tmp_path / "out"), RUBRIC]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len((tmp_path / "out.unfinished" / "scores.jsonl").read_text().splitlines()) == 1 + 4  # two calls a batch
    for name in ("out", "whole"):
        scored(tiny, stories, tmp_path / name, perplexity=True)
    for name in ("data.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.jsonl", "whole"]


def test_scores_outlive_a_disk_that_is_full_when_the_report_is_written(tmp_path, tiny, stories, monkeypatch):
    """Hours of a model's work go when the folder is in its place, and not before."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as at_the_end:
        at_the_end.setattr(step, "report_head", full)
        with pytest.raises(DataError, match="No space left on device"):
            scored(tiny, stories, tmp_path / "out")
    assert len((tmp_path / "out.unfinished" / "scores.jsonl").read_text().splitlines()) == 1 + len(TEXTS)
    monkeypatch.setattr(rating, "batch_score", lambda *given, **more: pytest.fail("was asked again"))
    assert scored(tiny, stories, tmp_path / "out")["kept"] == len(TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.jsonl"]


def test_where_nothing_can_be_written_is_said_before_a_text_is_scored(tmp_path, tiny, stories, monkeypatch):
    monkeypatch.setattr(rating, "batch_score", lambda *given, **more: pytest.fail("was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").touch()
    for output, said in ((".", "which is read"), ("/", "which is read"), ("there", "exists already")):
        with pytest.raises(DataError, match=said):
            scored(tiny, stories, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories.jsonl", "there"]


def test_other_records_are_not_taken_for_those_that_were_scored(tmp_path, tiny, stories, monkeypatch):
    monkeypatch.setattr(rating, "_TEXTS_AT_ONCE", 4)
    bad = stories.read_text() + "no JSON\n"
    stories.write_text(bad)
    with pytest.raises(DataError, match=r"jsonl:26: is not JSON"):
        scored(tiny, stories, tmp_path / "out")
    lines = bad.splitlines()
    stories.write_text("\n".join([lines[1], lines[0], *lines[2:-1]]))
    with pytest.raises(DataError, match=r"was begun with other records \(line 2\)"):
        scored(tiny, stories, tmp_path / "out")
    journal = tmp_path / "out.unfinished" / "scores.jsonl"
    head = json.loads(journal.read_text().splitlines()[0])
    for content, why in {
        "[]": "line 1 is no JSON object",
        "{}": "its first line is of another kind",
        json.dumps(head | {"format": 0}): "its first line is of another kind",
        json.dumps(head | {"phi3_mlx": "attempts"}): "its first line is of another kind",
    }.items():
        journal.write_text(content + "\n")
        with pytest.raises(DataError, match=f"scores.jsonl is damaged: {why}"):
            scored(tiny, stories, tmp_path / "out")
    journal.write_text(json.dumps(head | {"raw": True, "more": 1}) + "\n")
    with pytest.raises(
        DataError, match=r"with another raw \(it was True\) and more \(it was 1\); give the same again, or"
    ):
        scored(tiny, stories, tmp_path / "out")


@pytest.mark.parametrize(
    "score",
    [None, {}, {"rating": 1.0, "cut": False}, {"rating": "x"}, {"rating": math.inf}, {"rating": 1.0, "other": 2.0}],
    ids=str,
)
def test_a_kept_score_that_is_none_is_named(tmp_path, tiny, stories, monkeypatch, score):
    monkeypatch.setattr(rating, "_TEXTS_AT_ONCE", 2)
    stories.write_text("".join(stories.read_text().splitlines(keepends=True)[:2]) + "no JSON\n")
    with pytest.raises(DataError, match="is not JSON"):
        scored(tiny, stories, tmp_path / "out")
    journal = tmp_path / "out.unfinished" / "scores.jsonl"
    head, _, line = map(json.loads, journal.read_text().splitlines())
    usual = {"rating": 1.0, "rating_mass": 0.5, "cut": False}
    line["score"] = score if score is None or len(score) != 1 else usual | score
    journal.write_text("".join(json.dumps(part) + "\n" for part in (head, _, line)))
    with pytest.raises(DataError, match=r"scores.jsonl is damaged: line 3 holds no score"):
        scored(tiny, stories, tmp_path / "out")


def test_a_text_that_is_next_to_impossible_has_one_bin_of_its_own(tmp_path, tiny, stories, monkeypatch):
    usual = rating._perplexity
    monkeypatch.setattr(
        rating, "_perplexity", lambda score, n: usual(score, n) | ({"nats_per_token": 1e12} if n % 2 else {})
    )
    report = scored(tiny, stories, tmp_path / "out", rating=False, perplexity=True)
    assert len(report["scores"]["nats_per_token"]["histogram"]) < 20
    assert report["scores"]["nats_per_token"]["histogram"][-1]["to"] == 1e12 + 0.5


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path, tiny, stories):
    stories.write_text('{"body": 1}\n')
    with pytest.raises(DataError):
        scored(tiny, stories, tmp_path / "out")
    assert [*tmp_path.iterdir()] == [stories]


@pytest.mark.long
def test_long_texts_are_cut_and_counted_and_empty_ones_have_no_perplexity(tmp_path, tiny):
    path = tmp_path / "a.jsonl"
    texts = ["", TEXTS[0], TEXTS[0] + " The end." * 200, "A" * 100_000]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = scored(tiny, path, tmp_path / "out", max_length=30, perplexity=True)
    rows = rows_of(tmp_path / "out")
    assert report["cut"] == 2
    assert [row["cut"] for row in rows] == [False, False, True, True]
    assert [row["text"] for row in rows] == texts
    assert rows[0]["nats_per_token"] is None
    assert 0 < rows[3]["rating"] < 2
    scored(tiny, path, tmp_path / "long", max_length=10**6)  # as the model has


def test_keys_that_records_have_are_not_written_over(tmp_path, tiny, stories):
    scored(tiny, stories, tmp_path / "out")
    again = tmp_path / "out" / "data.jsonl"
    with pytest.raises(DataError, match=r"data\.jsonl:1: has a key 'rating' already; name the new ones"):
        scored(tiny, again, tmp_path / "again")
    scored(tiny, again, tmp_path / "again", name="second")
    assert [row["second_rating"] for row in rows_of(tmp_path / "again")] == [
        row["rating"] for row in rows_of(tmp_path / "out")
    ]


def test_an_expected_rating_weighs_the_values_by_the_probabilities():
    rubric = make_rubric("Good?", ["no=-1", "yes=1", "a=b=3"])
    assert (rubric.before, rubric.after, rubric.choices) == ("Good?\n\n", "", ("no", "yes", "a=b"))
    value, mass = rubric.expected([math.log(0.1), math.log(0.2), math.log(0.1)])
    assert value == pytest.approx((-0.1 + 0.2 + 0.3) / 0.4)
    assert mass == pytest.approx(0.4)
    assert rubric.expected([-2000.0, -1000.0, -3000.0]) == (1.0, 0.0)
    assert make_rubric(EDUCATIONAL, list("012345")).values == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("rubric", "scale", "said"),
    [
        (" ", "0,1", "the rubric is empty"),
        ("{text} {text}", "0,1", "several times"),
        ("Good?", "0", "fewer than two values"),
        ("Good?", "no,yes", "scale has 'no'; give numbers"),
        ("Good?", "no=nan,yes=1", "scale has 'no=nan'"),
        ("Good?", "=1,yes=2", "names no answer"),
        ("Good?", "1,1", "twice"),
        ("Good? " * 5000, "0,1", "leaves none for a text"),
    ],
)
def test_a_rubric_that_is_none_is_refused(tmp_path, tiny, stories, rubric, scale, said):
    with pytest.raises(OptionError, match=said):
        scored(tiny, stories, tmp_path / "out", rubric=rubric, scale=scale)
    assert [*tmp_path.iterdir()] == [stories]


def test_the_command_rates_and_says_what_it_did(tmp_path, stories, capsys):
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    given = [
        "data",
        "score",
        stories,
        "-o",
        tmp_path / "out",
        "--rubric",
        tmp_path / "rubric.txt",
        "--scale",
        "no=0,yes=2",
    ]
    with pytest.raises(SystemExit) as left:
        main([*map(str, given), "--max-length", "20"])
    assert left.value.code == 0
    said = capsys.readouterr().err
    assert "25 records" in said
    assert "rating: mean" in said
    assert "longer than --max-length, and cut: 25 texts" in said
    with pytest.raises(SystemExit) as left:
        main([*map(str, given[:5]), "--no-rating"])
    assert left.value.code == 2
    assert "leaves nothing to say; add --perplexity" in capsys.readouterr().err


def test_what_is_wrong_with_files_is_told_before_a_model_is_loaded(tmp_path, stories, monkeypatch, capsys):
    monkeypatch.setattr(ModelOptions, "load_model", lambda *given: pytest.fail("was loaded"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").touch()
    for file, output, said in (("none.jsonl", "out", "No such file"), (str(stories), "there", "exists already")):
        with pytest.raises(SystemExit):
            main(["data", "score", file, "-o", str(tmp_path / output)])
        assert said in capsys.readouterr().err


def test_a_command_that_ends_early_says_what_is_kept_and_a_refusal_not_that_the_same_goes_on(
    tmp_path, stories, monkeypatch, capsys
):
    monkeypatch.setattr(rating, "_TEXTS_AT_ONCE", 4)
    given = ["data", "score", str(stories), "-o", str(tmp_path / "out")]
    known, asked = rating.batch_score, []

    def broken_off(*some, **more):
        if asked:
            raise KeyboardInterrupt
        asked.append(some)
        return known(*some, **more)

    monkeypatch.setattr(rating, "batch_score", broken_off)
    kept = f"{tmp_path / 'out.unfinished'} keeps what was scored"
    with pytest.raises(SystemExit) as left:
        main(given)
    assert left.value.code == 130
    assert f"{kept}; the same command goes on from there\n" in capsys.readouterr().err
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    with pytest.raises(SystemExit) as left:
        main([*given, "--rubric", str(tmp_path / "rubric.txt"), "--scale", "no=0,yes=2"])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "was begun with another scale" in said
    assert f"{kept}\n" in said
