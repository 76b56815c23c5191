"""phi3-mlx data train-filter: a classifier learns from labels, is measured on others, and filters."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phi3_mlx import filter_data, train_filter
from phi3_mlx.cli import main
from phi3_mlx.data import filter_training
from phi3_mlx.data.area import area_interval, area_under_curve
from phi3_mlx.data.classifier import TextClassifier, features_of, read_classifier
from phi3_mlx.data.options import TrainFilterOptions
from phi3_mlx.errors import DataError, OptionError

TEACHING = "water plant cell energy because measure explain example light number sum heat root science learn".split()
SELLING = "buy cheap click offer free now sale best price deal subscribe win order shipping discount".split()
BOTH = "the a of and to is it we you in on with that this for some many new old good".split()


def texts_of(count, seed=0):
    """Teaching and selling words among those of both, one kind after the other: (text, whether it teaches)."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        kind = TEACHING if n < count // 2 else SELLING
        rows.append(
            (" ".join(rng.choices(BOTH, k=20) + rng.choices(kind, k=3) + rng.choices(BOTH, k=20)), n < count // 2)
        )
    return rows


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Ratings of 0 to 5, of which every tenth is wrong."""
    rng = random.Random(1)
    rows = []
    for n, (text, teaches) in enumerate(texts_of(600)):
        high = teaches != (n % 10 == 0)
        rows.append({"text": text, "rating": rng.uniform(3, 5) if high else rng.uniform(0, 3)})
    return write(tmp_path_factory.mktemp("rated") / "rated.jsonl", rows)


@pytest.fixture(scope="module")
def trained(rated, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "filter"
    return output, train_filter(rated, output, threshold=3)


def test_a_classifier_filters_texts_that_it_has_not_seen(tmp_path, trained):
    output, report = trained
    pool = texts_of(400, seed=9)
    write(tmp_path / "pool.jsonl", [{"text": text, "teaches": teaches} for text, teaches in pool])
    kept = filter_data(tmp_path / "pool.jsonl", tmp_path / "good", classifier=output, at_least=0.5)
    rows = [json.loads(line) for line in (tmp_path / "good" / "data.jsonl").read_text().splitlines()]
    assert sum(row["teaches"] for row in rows) > 170
    assert sum(not row["teaches"] for row in rows) < 30
    removed = [json.loads(line) for line in (tmp_path / "good" / "removed.jsonl").read_text().splitlines()]
    assert {(line["reason"], line["bound"]) for line in removed} == {("classifier", "at least 0.5")}
    assert all(0 <= line["value"] < 0.5 for line in removed)
    assert kept["rules"] == {"classifier": {"bound": "at least 0.5", "records": len(removed)}}
    said = next(row for row in report["bounds"] if row["at_least"] == 0.5)
    assert len(rows) / 400 == pytest.approx(said["kept"], abs=0.12)


def test_the_report_says_what_held_out_texts_say(trained):
    _, report = trained
    assert 0.8 < report["auc"] < 0.99  # a tenth of the labels is wrong
    assert report["auc_95"][0] < report["auc"] < report["auc_95"][1]
    assert report["held_out"]["good"] + report["held_out"]["bad"] == pytest.approx(120, abs=40)
    assert sum(report["learnt"].values()) + sum(report["held_out"].values()) == 600
    kept = [row["kept"] for row in report["bounds"]]
    assert kept == sorted(kept, reverse=True)
    middle = next(row for row in report["bounds"] if row["at_least"] == 0.5)
    assert middle["good_of_kept"] > 0.8
    assert middle["kept_of_good"] > 0.7


def test_area_and_bounds_are_those_of_what_the_classifier_says_of_the_texts_held_out(rated, trained):
    output, report = trained
    judge = read_classifier(output)
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    held_out = [row for row in rows if filter_training._side_of(row["text"]) < TrainFilterOptions.held_out]
    said = np.array([judge.probability(row["text"]) for row in held_out])
    good = np.array([row["rating"] >= 3 for row in held_out])
    assert report["held_out"] == {"good": good.sum(), "bad": (~good).sum()}
    assert report["auc"] == pytest.approx(area_under_curve(said, good), abs=1e-3)
    assert said.mean() == pytest.approx(good.mean(), abs=0.02)  # calibrated
    assert [row["at_least"] for row in report["bounds"]] == pytest.approx([n / 20 for n in range(1, 20)])
    for row in report["bounds"]:
        kept = said >= row["at_least"]
        assert row["kept"] == pytest.approx(kept.mean(), abs=1e-4)
        assert row["kept_of_good"] == pytest.approx(kept[good].mean(), abs=1e-4)
        assert row["good_of_kept"] == (pytest.approx(good[kept].mean(), abs=1e-4) if kept.any() else None)


def test_ten_good_and_ten_bad_texts_on_each_side_are_enough_and_nine_are_not(tmp_path):
    texts = {side: [] for side in ("learnt", "held out")}
    for n in range(200):
        side = "held out" if filter_training._side_of(f"text {n}") < TrainFilterOptions.held_out else "learnt"
        texts[side].append(f"text {n}")
    rows = [{"text": text, "rating": n < 10} for side in texts.values() for n, text in enumerate(side[:20])]
    assert len(rows) == 40
    report = train_filter(write(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert report["learnt"] == report["held_out"] == {"good": 10, "bad": 10}
    for place, missing in (
        (0, "9 good texts are learnt"),
        (19, "9 bad texts are learnt"),
        (20, "9 good texts are held"),
    ):
        path = write(tmp_path / "b.jsonl", rows[:place] + rows[place + 1 :])
        with pytest.raises(DataError, match=missing):
            train_filter(path, tmp_path / "none")


def test_labels_shuffled_among_the_texts_teach_nothing(tmp_path, rated, capsys):
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    ratings = [row["rating"] for row in rows]
    random.Random(3).shuffle(ratings)
    write(tmp_path / "a.jsonl", [row | {"rating": rating} for row, rating in zip(rows, ratings, strict=True)])
    report = train_filter(tmp_path / "a.jsonl", tmp_path / "out", threshold=3)
    assert report["auc_95"][0] < 0.5 < report["auc_95"][1]
    with pytest.raises(SystemExit) as left:
        main(["data", "train-filter", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "said"), "--threshold", "3"])
    assert left.value.code == 0
    assert "do not filter by it" in capsys.readouterr().err


def test_what_is_wrong_of_other_texts_is_not_turned_around(tmp_path, capsys):
    """Words that are in good texts on one side are in bad ones on the other."""
    sides = [(text, teaches, filter_training._side_of(text) < 0.2) for text, teaches in texts_of(600)]
    rows = [{"text": text, "good": teaches != held_out} for text, teaches, held_out in sides]
    path = write(tmp_path / "labels.jsonl", rows)
    report = train_filter(path, tmp_path / "judge", label="good")
    assert report["auc"] < 0.1
    assert report["says_nothing"]
    judge = read_classifier(tmp_path / "judge")
    good = report["held_out"]["good"] / sum(report["held_out"].values())
    assert [judge.probability(row["text"]) for row in rows[:5]] == pytest.approx([good] * 5)
    with pytest.raises(SystemExit) as left:
        main(["data", "train-filter", str(path), "-o", str(tmp_path / "again"), "--label", "good"])
    assert left.value.code == 0
    said = capsys.readouterr().err
    assert "do not score higher than the bad ones, so it gives all the same probability" in said
    assert "name the key with --group" in said
    with pytest.raises(DataError, match="says nothing: it gives every text the same probability"):
        filter_data(path, tmp_path / "kept", classifier=tmp_path / "judge")


def test_texts_of_one_group_are_held_out_together(tmp_path, capsys):
    """Here are two versions of each article, so both sides have as many of either."""
    rows = [
        {"text": f"w{n} {word}", "good": word == "energy", "id": n} for n in range(300) for word in ("energy", "sale")
    ]
    path = write(tmp_path / "labels.jsonl", rows)
    apart = train_filter(path, tmp_path / "apart", label="good")
    together = train_filter(path, tmp_path / "together", label="good", group="id")
    for side in ("learnt", "held_out"):
        assert together[side]["good"] == together[side]["bad"]
        assert apart[side]["good"] != apart[side]["bad"]
    other = [row | {"id": float(row["id"]) if row["good"] else row["id"]} for row in rows]  # 1.0 and 1 are one group
    assert train_filter(write(tmp_path / "b.jsonl", other), tmp_path / "c", label="good", group="id") | {
        "inputs": None
    } == together | {"inputs": None}
    with pytest.raises(SystemExit) as left:
        main(["data", "train-filter", str(path), "-o", str(tmp_path / "said"), "--label", "good", "--group", "id"])
    assert left.value.code == 0
    assert f"AUC {together['auc']:.3f}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, None], r"\.jsonl:2: has no 'id', by which texts are held out together; give it one"),
        ([1, float("nan")], r"\.jsonl:2: 'id' is nan; expected a text or a number, the same for"),
        ([[1], [2]], r"\.jsonl:1: 'id' is a list; expected a text or a number"),
        ([{"a": 1}], r"\.jsonl:1: 'id' is an object; expected"),
        (
            [7],
            r"0 good texts are held out; give records with 10 or more \(.* 1 different values of 'id'\)",
        ),
    ],
)
def test_groups_that_say_nothing_are_refused(tmp_path, values, said):
    """Texts without a title are not one article; one group is on one side."""
    rows = [{"text": f"text {n}", "good": n % 2 == 0, "id": values[n % len(values)]} for n in range(100)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=said):
        train_filter(path, tmp_path / "out", label="good", group="id")
    assert [*tmp_path.iterdir()] == [path]


def test_a_text_without_a_group_is_refused_even_if_it_is_not_drawn(tmp_path):
    rows = [{"text": f"text {n}", "good": n % 2 == 0, "id": n} for n in range(2000)]
    for row in rows[-100:]:
        del row["id"]
    with pytest.raises(DataError, match=r":1901: has no 'id'"):
        train_filter(write(tmp_path / "a.jsonl", rows), tmp_path / "out", label="good", group="id", examples=100)


def test_scores_that_are_chance_are_not_calibrated(tmp_path):
    """Texts without a word are all the same to it, whatever their number of marks: half of the pairs are in order."""
    rows = [{"text": "!? " * n, "good": n % 2 == 0} for n in range(1, 301)]
    report = train_filter(write(tmp_path / "a.jsonl", rows), tmp_path / "out", label="good")
    assert report["auc"] == 0.5
    assert report["says_nothing"]
    good = report["held_out"]["good"] / sum(report["held_out"].values())
    assert read_classifier(tmp_path / "out").probability("a word") == pytest.approx(good)


def test_every_way_to_say_what_is_good_gives_the_same_classifier(tmp_path, rated):
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    share = sum(row["rating"] >= 3 for row in rows) / len(rows)
    ways = {
        "rating": ({}, {"threshold": 3}),
        "top": ({}, {"top": share}),
        "flag": (lambda rating: rating >= 3, {}),
        "number": (lambda rating: int(rating >= 3), {}),
        "text": (lambda rating: "fine" if rating >= 3 else "poor", {"good": ["fine"]}),
    }
    made = []
    for name, (change, given) in ways.items():
        changed = [row | {"rating": change(row["rating"]) if change else row["rating"]} for row in rows]
        path = write(tmp_path / f"{name}.jsonl", changed)
        train_filter(path, tmp_path / name, **given)
        made.append(load_file(tmp_path / name / "classifier.safetensors")["weights"])
    assert all(np.array_equal(made[0], other) for other in made[1:])


def test_equal_texts_are_on_one_side_and_a_draw_bounds_the_memory(tmp_path, rated):
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    write(tmp_path / "twice.jsonl", rows + rows)
    report = train_filter(tmp_path / "twice.jsonl", tmp_path / "twice", threshold=3)
    assert sum(report["held_out"].values()) % 2 == 0
    report = train_filter(rated, tmp_path / "drawn", threshold=3, examples=200)
    assert sum(report["learnt"].values()) + sum(report["held_out"].values()) == 200
    assert report["learnt"]["bad"] + report["held_out"]["bad"] == pytest.approx(100, abs=30)  # of a sorted file
    assert report["read"] == 600


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{"text": "a", "rating": 3.5}], {}, "labels are ratings; say from which threshold"),
        ([{"text": "a", "rating": "x"}], {}, "labels are texts, 'x'; say which of them are good, as good='x'"),
        ([{"text": "a", "rating": "x"}], {"good": ["y"]}, "no record has the label 'y'; there are 'x'"),
        ([{"text": "a"}], {}, "1: has no key 'rating'; name the label's"),
        ([{"text": "a", "rating": [1]}], {}, "'rating' is a list; expected a number"),
        ([{"text": "a", "rating": float("nan")}], {}, "'rating' is nan; expected a number"),
        (
            [{"text": "a", "rating": "x"}, {"text": "b", "rating": 5}],
            {"good": "x"},
            "and numbers, such as 5; give one",
        ),
        ([{"text": f"a {n}", "rating": 1} for n in range(100)], {}, "0 bad texts are learnt; give records with 10"),
    ],
)
def test_labels_that_say_nothing_are_refused(tmp_path, rows, given, said):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=said):
        train_filter(path, tmp_path / "out", **given)
    assert [*tmp_path.iterdir()] == [path]


def test_options_that_contradict_each_other_are_refused(tmp_path, rated, trained):
    with pytest.raises(OptionError, match="top=SHARE and threshold=RATING"):
        train_filter(rated, tmp_path / "out", threshold=1, top=0.1)
    with pytest.raises(OptionError, match=r"at_least .* without a classifier"):
        filter_data(rated, tmp_path / "out", at_least=0.3)
    with pytest.raises(OptionError, match=r"at_least 1\.5"):
        filter_data(rated, tmp_path / "out", classifier=trained[0], at_least=1.5)


def test_what_another_classifier_of_the_same_name_had_filtered_is_filtered_anew(tmp_path, trained):
    judge, out = tmp_path / "judge.safetensors", tmp_path / "out"
    first = read_classifier(trained[0])
    first.write(judge)
    for name, more in (("a", ""), ("b", "{broken\n")):
        texts = texts_of(40, seed=5 + len(more))
        text = "".join(f"{json.dumps({'text': text, 'teaches': teaches})}\n" for text, teaches in texts)
        (tmp_path / f"{name}.jsonl").write_text(text + more + " " * 2**22)  # so that each is a shard
    with pytest.raises(DataError, match=r"b\.jsonl:41: is not JSON"):
        filter_data([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], out, classifier=judge)
    assert len([*tmp_path.glob("out.shards/*/shard.json")]) == 1
    (tmp_path / "b.jsonl").write_text('{"text": "", "teaches": null}\n')
    times = judge.stat()
    replace(first, weights=-first.weights, bias=-first.bias).write(judge)
    os.utime(judge, ns=(times.st_atime_ns, times.st_mtime_ns))
    filter_data([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], out, classifier=judge)
    rows = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    assert sum(row["teaches"] is False for row in rows) > 15
    assert sum(row["teaches"] is True for row in rows) < 5


def test_a_probability_is_the_logistic_function_of_weights_and_bias_slope_and_shift():
    weights = np.zeros(2**18, np.float32)
    row = features_of(["cat"])
    weights[row.indices] = 3 * row.data
    judge = TextClassifier(weights, 0.5, 2.0, -0.25)
    assert judge.probability("cat") == pytest.approx(1 / (1 + np.exp(-(2 * (3 + 0.5) - 0.25))))
    assert judge.probability("dog") == pytest.approx(1 / (1 + np.exp(-0.75)))
    assert replace(judge, bias=-1e6).probability("dog") == 0
    assert replace(judge, bias=-200.0).probability("dog") == pytest.approx(np.exp(-400.25), rel=1e-9, abs=0)
    assert replace(judge, bias=1e6).probability("dog") == 1


def test_a_classifiers_digest_is_of_what_it_says():
    one = TextClassifier(np.arange(4, dtype=np.float32), 0.5, 2.0, 1.0)
    assert one.digest() == replace(one).digest()
    others = [replace(one, weights=-one.weights), *(replace(one, **{name: 3.0}) for name in ("bias", "slope", "shift"))]
    assert len({one.digest(), *(other.digest() for other in others)}) == 5


def test_a_classifier_goes_with_rules(tmp_path, trained):
    rows = [{"text": "Short science."}, {"text": " ".join(TEACHING * 5)}]
    path = write(tmp_path / "a.jsonl", rows)
    report = filter_data(path, tmp_path / "out", classifier=trained[0], rules="length", min_words=10)
    assert {name: rule["records"] for name, rule in report["rules"].items()} == {
        "characters": 0,
        "words": 1,
        "classifier": 0,
    }


def test_a_file_that_is_no_classifier_is_named(tmp_path, rated, trained):
    good = trained[0] / "classifier.safetensors"
    weights = load_file(good)["weights"]
    assert weights.dtype == np.float32
    assert read_classifier(good).probability(" ".join(TEACHING)) > 0.9
    bad = tmp_path / "bad.safetensors"
    save_file({"weights": weights}, bad)
    for content, said in {
        bad.read_bytes(): "holds no classifier",
        good.read_bytes()[:-4]: "holds no classifier: it has .* promises [0-9,]*; name what train-filter",
        b"\x80\x04K\x01.": "holds no classifier",
        good.read_bytes().replace(b'ngrams\\": 2', b'ngrams\\": 3'): "of another version",
        good.read_bytes().replace(b'format\\": 1', b'format\\": 2'): "of another version",
        good.read_bytes().replace(b'characters\\": 10000', b'characters\\": 10001'): "of another version",
        good.read_bytes()[:-4] + b"\xff\xff\xff\x7f": "not all of its weights are numbers",
    }.items():
        bad.write_bytes(content)
        with pytest.raises(DataError, match=said):
            filter_data(rated, tmp_path / "out", classifier=bad)
    head = {"format": 1, "ngrams": 2, "characters": 10_000, "bias": 0.0, "slope": 1.0, "shift": 0.0}
    for tensors, numbers, said in (
        ({"weights": weights}, {"bias": True}, "its bias is no number"),
        ({"weights": weights}, {"slope": "1"}, "its slope is no number"),
        ({"weights": weights}, {"shift": 1e999}, "its shift is no number"),
        ({"weights": weights, "more": weights[:1]}, {}, "holds no classifier"),
        ({"weights": weights[:-1]}, {}, "of another version"),
        ({"weights": weights.astype(np.float16)}, {}, "of another version"),
    ):
        save_file(tensors, bad, metadata={"phi3_mlx_classifier": json.dumps(head | numbers)})
        with pytest.raises(DataError, match=said):
            read_classifier(bad)
    save_file({"weights": weights}, bad, metadata={"phi3_mlx_classifier": json.dumps(head | {"bias": 1})})
    assert read_classifier(bad).bias == 1.0
    with pytest.raises(DataError, match="cannot be read"):
        filter_data(rated, tmp_path / "out", classifier=tmp_path / "none.safetensors")
    assert not (tmp_path / "out").exists()


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, good = rng.integers(0, 20, 300) / 20.0, rng.random(300) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[good] for b in scores[~good]]
    assert area_under_curve(scores, good) == pytest.approx(np.mean(pairs))
    assert np.isnan(area_under_curve(scores, np.ones(300, bool)))


def test_the_interval_holds_the_true_area_nineteen_times_of_twenty():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        scores = np.concatenate([rng.normal(1.0, 1, 40), rng.normal(0, 1, 60)])
        low, high = area_interval(area_under_curve(scores, np.arange(100) < 40), 40, 60)
        held += low <= 0.7602 <= high  # the normal distribution's value at 1 / sqrt(2)
    assert held / 300 == pytest.approx(0.95, abs=0.035)
    low, high = area_interval(1.0, 20, 20)
    assert high == 1.0
    assert 0.8 < low < 0.95


def test_features_look_at_the_beginning_and_are_the_same_everywhere():
    row = features_of(["The cat, the CAT"])
    assert row.nnz == 4  # the, cat, the cat, cat the
    assert np.isclose((row.data**2).sum(), 1)
    assert (features_of(["word " * 5000]) != features_of(["word " * 2000])).nnz == 0


def test_the_commands_train_and_filter(tmp_path, rated, capsys):
    def run(*words):
        with pytest.raises(SystemExit) as left:
            main(["data", *map(str, words)])
        return left.value.code, "".join(capsys.readouterr())

    code, said = run("train-filter", rated, "-o", tmp_path / "f", "--threshold", 3)
    assert code == 0
    assert "AUC 0." in said
    assert "good of kept" in said
    code, said = run("filter", rated, "-o", tmp_path / "g", "--classifier", tmp_path / "f", "--at-least", 0.7)
    assert code == 0
    assert "classifier" in said
    code, said = run("train-filter", rated, "-o", tmp_path / "h")
    assert code == 1
    assert "--top 0.2" in said
