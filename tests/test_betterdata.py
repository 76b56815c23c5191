"""The experiment with better data: texts, arms, measures, statistics, and all of it on a corpus made by program."""

import itertools
import json
from dataclasses import replace

import click
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from mlx.utils import tree_map

from bench import arms, betterdata, published, record
from bench.__main__ import main
from bench.betterdata import experiment, filtering, measures, statistics, texts, training
from bench.betterdata.plan import ARMS, CONTRASTS, FULL, NOISE, SMOKE
from bench.betterdata.smoke import write_corpus

ONE = replace(SMOKE, seeds=(1,), rates=(0.003,), tokens=512, draws=10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("betterdata") / "corpus")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """An experiment up to its filter; a rater that knows nothing, so that the editors' levels are the labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtering, "ratings", lambda passages: [3.0] * len(passages))
        work = tmp_path_factory.mktemp("work")
        return experiment.Experiment(corpus, work, corpus / "blimp.jsonl", replace(ONE, seeds=(1, 2), tokens=8192))


@pytest.mark.long
def test_the_whole_experiment_runs_and_its_record_has_every_arm_and_contrast(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(betterdata, "FULL", SMOKE)
    options = ["--corpus", str(corpus), "--work", str(tmp_path / "work"), "--blimp", str(corpus / "blimp.jsonl")]
    done = CliRunner().invoke(main, ["betterdata", *options, "--tokens", str(SMOKE.tokens)], catch_exceptions=False)
    assert done.exit_code == 0
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())["results"]["betterdata"]
    figures = {(row["measure"], row["arm"]): row for row in result["rows"] if "hypothesis" not in row}
    assert set(figures) == {(measure, arm) for measure in measures.MEASURES for arm in (*ARMS, NOISE)}
    contrasts = {(row["measure"], row["hypothesis"]): row for row in result["rows"] if "hypothesis" in row}
    assert set(contrasts) == {(measure, name) for measure in measures.MEASURES for name, _, _ in CONTRASTS}
    for (measure, _), row in contrasts.items():
        one, other = (np.array(figures[measure, row[side]]["seeds"]) for side in ("arm", "against"))
        assert len(one) == len(SMOKE.seeds)
        assert row["difference"] == pytest.approx((one - other).mean())
        assert row["by_seeds"][0] <= row["difference"] <= row["by_seeds"][1]
    assert result["learning_rate"]["rate"] in SMOKE.rates
    assert result["filter"]["labels"] in ("the rater's", "the editors'")
    assert {*result["pools"]} == {*ARMS, NOISE}
    assert_tables_show(result, monkeypatch)


def assert_tables_show(result, monkeypatch):
    monkeypatch.setattr(arms, "main_system", lambda: {"betterdata": {"machine": "a machine", **result}})
    table = arms.betterdata_arms().split("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[0] for line in table] == [f"| {arm}" for arm in (*ARMS, NOISE)]
    said = arms.betterdata_said().splitlines()
    books = [row for row in result["rows"] if "hypothesis" in row and row["measure"] == "picture books"]
    assert len(said) == len(CONTRASTS)
    for line, row in zip(said, books, strict=True):
        assert f"**{row['hypothesis']} " in line
        assert row["verdict"] in line
        assert f"{row['difference']:+.3f} bits" in line
        assert "{:+.3f} to {:+.3f} over seeds".format(*row["by_seeds"]) in line
    contrasts = arms.betterdata_contrasts().splitlines()[2:]
    assert len(contrasts) == len(CONTRASTS) * len(measures.MEASURES)
    assert all(row["verdict"] in line for row, line in zip(books, contrasts[:: len(measures.MEASURES)], strict=True))
    pools = arms.betterdata_pools().splitlines()
    part = [row for row in result["rows"] if row.get("hypothesis") in (None, "H1")]
    monkeypatch.setattr(arms, "main_system", lambda: {"betterdata": {**result, "machine": "a machine", "rows": part}})
    assert arms.betterdata_said().splitlines()[1:] == [
        "- Not measured, because the budget ended before their arms had all seeds: H2, H3, H4, C."
    ]
    for line in pools[2:]:
        assert sum(int(cell.strip().rstrip("%")) for cell in line.split("|")[2:-1]) == pytest.approx(100, abs=3)
    assert pools[2].startswith("| raw |")
    monkeypatch.setattr(arms, "main_system", dict)
    tables = (arms.betterdata_arms, arms.betterdata_said, arms.betterdata_contrasts, arms.betterdata_pools)
    assert {table()[:16] for table in tables} == {"Not measured yet"}


def test_a_trial_goes_through_everything_and_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(betterdata, "SMOKE", replace(ONE, seeds=(1, 2)))
    done = CliRunner().invoke(main, ["betterdata", "--smoke"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "a trial" in done.output
    assert [*tmp_path.iterdir()] == []


def test_without_texts_it_says_so_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    done = CliRunner().invoke(main, ["betterdata"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "--corpus" in done.output
    assert [*tmp_path.iterdir()] == []


def test_what_the_page_says_in_words_is_what_was_measured():
    page = " ".join((ROOT / "docs" / "better-data.md").read_text(encoding="utf-8").split())
    result = published.main_system()["betterdata"]
    verdicts = {row["hypothesis"]: row["verdict"] for row in result["rows"]
                if "hypothesis" in row and row["measure"] == "picture books"}  # fmt: skip
    assert "on picture books neither H1 nor H2 held" in page
    assert "held" not in (verdicts["H1"], verdicts["H2"])
    assert "a random part of the pool taught more than the filtered part" in page
    assert verdicts["H3"] == "contradicted"
    assert "On answers and on BLiMP every arm is within three points of chance" in page
    figures = [row for row in result["rows"] if "hypothesis" not in row]
    for measure, chance in (("answers", 0.25), ("BLiMP", 0.5)):
        means = [row["mean"] for row in figures if row["measure"] == measure]
        assert len(means) >= len(ARMS)
        assert means == pytest.approx([chance] * len(means), abs=0.03)
    assert f"A run reads {result['tokens']:,} tokens, an eightieth of the usual 20 tokens a weight" in page
    assert result["tokens"] * 80 == pytest.approx(20 * 1.1e6, rel=0.1)
    assert "The bundled model cannot rate: its AUC was that of a coin" in page
    assert result["filter"]["rater_auc"] == pytest.approx(0.5, abs=0.05)
    assert f"its budget of {FULL.hours:g} hours" in page
    assert result["cpu_hours"] < FULL.hours


def test_the_plan_says_the_numbers_that_are_used():
    readme = " ".join((ROOT / "bench" / "betterdata" / "README.md").read_text(encoding="utf-8").split())
    for said in (
        f"T is 2^18 = {FULL.tokens:,}",
        f"**Seeds** {', '.join(map(str, FULL.seeds))}:",
        f"{' and '.join(map(str, FULL.rates))}",
        f"seed {FULL.rate_seed}",
        f"The budget is {FULL.hours:g} hours",
        f"rows of {FULL.row} tokens",
        f"{FULL.questions} questions",
        f"{FULL.rows} rows a step",
        f"a run has {FULL.tokens // FULL.row // FULL.rows} steps",
        f"first {FULL.pairs} pairs",
        f"{FULL.vocabulary:,} tokens of one byte-level BPE",
        f"rates {FULL.rated} of these passages",
        f"{FULL.draws:,} draws",
        f"Differences below {statistics.NEGLIGIBLE} bits per character",
        f"up to {texts.LONGEST:,} characters; shorter ones than {texts.SHORTEST}",
        f"AUC is {filtering.TRUSTED} or more",
    ):
        assert said in readme, said
    for name, arm, against in CONTRASTS:
        assert f"| {name}" in readme
        assert f"{arm} − {against}" in readme
    parameters = sum(array.size for _, array in training.tree_flatten(training.fresh_model(FULL, 0).parameters()))
    assert f"{parameters / 1e6:.1f} million weights" in readme


# Texts


def test_passages_are_whole_sentences_and_lose_nothing_but_what_is_short_or_long():
    sentences = [f"“Number {n}” ran _off_." + " And on." * (n % 9) for n in range(200)]
    whole = [*texts.passages("\n".join(sentences) + "\n\nThe end.")]
    assert all(texts.SHORTEST <= len(passage) <= texts.LONGEST for passage in whole)
    assert " ".join(whole) == texts.plain("\n".join(sentences) + " The end.")
    assert '"Number 7" ran off.' in whole[0]
    assert all(passage.endswith(".") for passage in whole)
    after = "Here it goes on. " * 20
    assert [*texts.passages("Short. " + "long " * 300 + "end. " + after)] == [after.strip()]
    assert [*texts.passages("")] == []


def test_no_pool_has_anything_of_an_evaluation_or_of_the_filters_articles(corpus, tmp_path):
    held = texts.read_lines(corpus / "bookdash.jsonl")[0]["text"]
    path = corpus / "african_storybook.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"text": held}) + "\n")  # the same book from another publisher
    try:
        removed = texts.prepare(corpus, tmp_path)
    finally:
        path.write_text(before)
    assert removed["raw"]["of an evaluation"] >= 1
    found = texts.load(tmp_path)

    def runs(passages):
        for passage in passages:
            words = passage.lower().replace(".", "").split()
            yield from (tuple(words[i : i + 13]) for i in range(len(words) - 12))

    evaluated = {*runs([*found.books, *found.tales, *found.stories, *(r["text"] for r in found.labelled)])}
    pools = [*found.raw, *found.kept, *found.synthetic]
    assert len(evaluated) > 100
    assert not evaluated & {*runs(record["text"] for record in pools)}
    assert not {r["text"] for r in found.kept} & {r["text"] for r in found.raw}
    assert {r["source"] for r in found.synthetic} == {"TinyStories"}
    assert "Gutenberg" in {r["source"] for r in found.raw}
    assert not {r["text"] for r in found.labelled} & {r["text"] for r in found.tested}


# The filter and the arms


def test_the_filter_takes_the_easy_passages_and_those_of_shuffled_labels_take_others(prepared):
    sources = [record["source"] for record in prepared.texts.raw]
    easy = {i for i, source in enumerate(sources) if source in ("African Storybook", "OneStop, elementary")}
    filtered = prepared.facts["filtered"]
    assert prepared.facts["filter_auc"] > 0.9
    assert prepared.facts["labels"] == "the editors'"
    assert len(filtered) > 5
    assert not {*filtered} - easy
    assert prepared.facts["shuffled"]["1"] != prepared.facts["shuffled"]["2"]
    assert all({*prepared.facts["shuffled"][seed]} != {*filtered} for seed in ("1", "2"))


def test_a_rater_that_tells_the_levels_apart_is_believed(monkeypatch):
    lines = [{"text": f"{level} {n}", "level": level} for n in range(20) for level in ("elementary", "advanced")]
    monkeypatch.setattr(filtering, "ratings", lambda passages: [float(text.startswith("adv")) for text in passages])
    _, good, facts = filtering.labels(lines, lines, 10)
    assert (facts["rater_auc"], facts["labels"]) == (0.0, "the editors'")
    assert good == [line["level"] == "elementary" for line in lines]
    # One that likes the first ten of the elementary ones best, and any of them better than the others.
    rate = {line["text"]: (line["level"] == "elementary") * (1 + (n < 20)) for n, line in enumerate(lines)}
    monkeypatch.setattr(filtering, "ratings", lambda passages: [float(rate[text]) for text in passages])
    _, good, facts = filtering.labels(lines, lines, 10)
    assert (facts["rater_auc"], facts["labels"]) == (1.0, "the rater's")
    assert good == [rate[line["text"]] > 0.5 for line in lines]


def test_arms_have_the_size_that_the_plan_says_and_what_is_drawn_is_drawn_with_the_seed(prepared):
    chosen = prepared.plan.chosen
    for arm in ("filtered", "random", "shuffled"):
        pool, sizes = prepared.pool(arm, 1)
        assert chosen <= sum(map(len, pool)) < chosen + max(map(len, prepared.ids))
        assert "TinyStories" not in sizes
    both, sizes = prepared.pool("filtered and synthetic", 1)
    assert sum(map(len, both)) >= 2 * chosen
    assert sizes["TinyStories"] > 0
    raw = prepared.pool("raw", 1)[0]
    assert len(raw) == len(prepared.texts.raw)

    def alike(arm):
        one, other = prepared.pool(arm, 1)[0], prepared.pool(arm, 2)[0]
        return [ids.tolist() for ids in one] == [ids.tolist() for ids in other]

    assert {arm for arm in (*ARMS, NOISE) if alike(arm)} == {*ARMS, NOISE} - {"random", "shuffled"}
    noise = prepared.pool(NOISE, 1)[0]
    assert len(noise) == len(raw)
    assert np.array_equal(noise[0], raw[0])
    decoded = [prepared.tokenizer.decode(ids.tolist()) for ids in (noise[1], raw[1])]
    assert decoded[0] != decoded[1]
    assert sorted(decoded[0].split()) == sorted(decoded[1].split())


def test_every_run_reads_as_many_tokens_and_a_small_pool_again_in_another_order():
    pool = [np.full(20 + n, n + 1, np.int32) for n in range(10)]
    rows = training.rows(pool, SMOKE, 1024, seed=3)
    assert sum(len(row) - 1 for row in rows) == 1024
    assert {len(row) for row in rows} == {SMOKE.row + 1}
    assert all(before.ids[-1] == after.ids[0] for before, after in itertools.pairwise(rows))
    assert all(row.trained[1:].all() and not row.trained[0] for row in rows)
    stream = np.concatenate([row.ids[:-1] for row in rows])
    starts = stream[np.flatnonzero(stream == training.END)[:-1] + 1].tolist()
    assert sorted(starts[:10]) == sorted(starts[10:20]) == [*range(1, 11)]
    assert starts[:10] != starts[10:20]
    again = training.rows(pool, SMOKE, 1024, seed=3)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(rows, again, strict=True))
    other = training.rows(pool, SMOKE, 1024, seed=4)
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(rows, other, strict=True))


# The runs


def test_a_run_that_was_ended_goes_on_to_the_same_weights(prepared, tmp_path, monkeypatch):
    rows = training.rows(prepared.ids, SMOKE, 2048, seed=1)
    whole = training.learn(SMOKE, rows, 0.003, 1, tmp_path / "whole", "whole")
    step = training.Trainer._step

    def ended(self):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(training.Trainer, "_step", ended)
    with pytest.raises(KeyboardInterrupt):
        training.learn(SMOKE, rows, 0.003, 1, tmp_path / "part", "whole")
    monkeypatch.setattr(training.Trainer, "_step", step)
    again = training.learn(SMOKE, rows, 0.003, 1, tmp_path / "part", "whole")
    kept = training.learnt(SMOKE, tmp_path / "part")
    for model in (again, kept):
        pairs = zip(training.tree_flatten(whole.parameters()), training.tree_flatten(model.parameters()), strict=True)
        for (name, one), (_, other) in pairs:
            assert mx.array_equal(one, other), name


def test_runs_stop_at_the_budget_and_go_on_with_a_larger_one(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filtering, "ratings", lambda passages: [3.0] * len(passages))
    asked = []
    for what in ("learn", "choose"):
        monkeypatch.setattr(
            experiment.Experiment,
            what,
            lambda self, arm, seed, *_, what=what: asked.append((what, arm, seed)) or {"items": {what: arm}},
        )

    def start(hours):
        return experiment.Experiment(corpus, tmp_path, None, replace(ONE, hours=hours))

    none = start(0.0)
    assert none.runs() == {}
    assert "budget" in capsys.readouterr().out
    with pytest.raises(click.ClickException, match="all its seeds"):
        experiment.rows({}, ONE)
    done = start(9.0).runs()
    assert set(done) == {(arm, 1) for arm in (*ARMS, NOISE)}
    assert all(run["items"] == {"learn": arm, "choose": arm} for (arm, _), run in done.items())
    assert asked == [*start(9.0).order()]  # in this order, and none twice
    assert start(0.0).runs() == done
    assert len(asked) == 2 * len(ARMS) + 2
    with pytest.raises(click.ClickException, match="another plan"):
        experiment.Experiment(corpus, tmp_path, None, replace(ONE, tokens=1024))


def test_the_primary_contrasts_arms_learn_first_and_noise_last(prepared):
    order = [*prepared.order()]
    learnt, chosen = ([(arm, seed) for what, arm, seed in order if what == name] for name in ("learn", "choose"))
    assert learnt[:4] == [("raw", 1), ("filtered", 1), ("raw", 2), ("filtered", 2)]
    assert sorted(learnt) == sorted(chosen) == sorted((arm, seed) for arm in (*ARMS, NOISE) for seed in (1, 2))
    assert [what for what, _, _ in order] == ["learn"] * 10 + ["choose"] * 10 + ["learn"] * 2 + ["choose"] * 2
    assert [arm for _, arm, _ in order[-4:]] == [NOISE] * 4


def test_an_arm_without_all_its_seeds_is_not_reported():
    def run(value):
        return {"items": {"picture books": [[value, 10], [2 * value, 20]]}}

    plan = replace(FULL, draws=20)
    done = {("raw", seed): run(20 + seed) for seed in (1, 2, 3)} | {
        ("filtered", seed): run(18 + seed) for seed in (1, 2)
    }
    assert [row["arm"] for row in experiment.rows(done, plan)] == ["raw"]
    done["filtered", 3] = run(21)
    figures = [row for row in experiment.rows(done, plan) if "hypothesis" not in row]
    (contrast,) = [row for row in experiment.rows(done, plan) if "hypothesis" in row]
    assert [row["arm"] for row in figures] == ["raw", "filtered"]
    assert figures[0]["seeds"] == pytest.approx([2.1, 2.2, 2.3])
    assert (contrast["hypothesis"], contrast["verdict"]) == ("H1", "held")
    assert contrast["difference"] == pytest.approx(-0.2)
    assert contrast["by_seeds"] == pytest.approx((-0.2, -0.2))
    assert contrast["by_texts"] == pytest.approx((-0.2, -0.2))
    done["filtered", 2]["items"]["answers"] = [[1.0, 1]]  # a measure that was not taken of all
    assert {row["measure"] for row in experiment.rows(done, plan)} == {"picture books"}


# Measures


def test_a_model_that_knows_nothing_needs_the_bits_of_the_vocabulary(prepared):
    model = training.fresh_model(SMOKE, 0)
    model.update(tree_map(mx.zeros_like, model.parameters()))
    held = [prepared.texts.books[0], prepared.texts.books[1][:40]]
    for text, (bits, characters) in zip(held, measures.bits(model, prepared.tokenizer, held, SMOKE.row), strict=True):
        assert characters == len(text)
        assert bits == pytest.approx(9 * len(training.encode(prepared.tokenizer, [text])[0]), rel=1e-5)


def test_what_is_read_beside_a_text_changes_nothing(prepared):
    model = training.fresh_model(SMOKE, 0)
    sequences = [
        np.concatenate([[training.END], ids[:n]]).astype(np.int32) for n, ids in enumerate(prepared.ids[:40], 2)
    ]
    together = measures.nats(model, sequences)
    for ids, losses in zip(sequences, together, strict=True):
        (alone,) = measures.nats(model, [ids])
        assert len(losses) == len(ids) - 1
        np.testing.assert_allclose(losses, alone, rtol=1e-4, atol=1e-5)


def test_an_answer_is_right_if_the_passage_makes_it_likelier_by_most(prepared, monkeypatch):
    asked = [["A cat ran.", "the cat", "a dog", "some mice", "who knows"]] * 2

    def told(model, sequences):
        # With and without what stands before, by turns; the second question's third candidate gains most.
        gains = [5, 1, 1, 1, 1, 1, 9, 1]
        made = []
        for n, ids in enumerate(sequences):
            loss = 20.0 - (gains[n // 2] if n % 2 == 0 else 0)
            made.append(np.concatenate([np.full(len(ids) - 2, 100.0 if n % 2 == 0 else 0.0), [loss]]))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(
            measures, "encode", lambda tokenizer, given: [np.array([1] if g[0] == " " else [1, 2]) for g in given]
        )
        patch.setattr(measures, "nats", told)
        assert measures.answers(None, None, asked) == [True, False]


def test_foils_answer_other_questions_about_the_same_tale_and_all_fits(prepared):
    asked = measures.questions(prepared.texts, prepared.tokenizer, SMOKE)
    assert len(asked) == SMOKE.questions
    for before, right, *foils in asked:
        assert len({right, *foils}) == 4
        tale = right.split(" of ")[1]
        assert all(foil.endswith(tale) for foil in foils)
        assert len(training.encode(prepared.tokenizer, [f"{before} {right}"])[0]) <= SMOKE.row


def test_a_model_prefers_what_it_was_trained_on(prepared):
    pairs = measures.sentence_pairs(prepared.blimp, 2)
    assert len(pairs) == 4
    ids = training.encode(prepared.tokenizer, [good for good, _ in pairs])
    model = training.learn(SMOKE, training.rows(ids, SMOKE, 4096, 0), 0.01, 0, prepared.work / "good", "good")
    assert measures.likelier(model, prepared.tokenizer, pairs) == [True] * 4
    assert measures.likelier(model, prepared.tokenizer, [(bad, good) for good, bad in pairs]) == [False] * 4


# Statistics


def test_the_interval_over_seeds_is_students():
    low, high = statistics.by_seeds([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # t of 0.975 with two degrees of freedom, a standard deviation of 1
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_the_interval_over_texts_is_of_texts_that_are_the_same_for_both():
    rng = np.random.default_rng(0)
    characters = rng.integers(100, 1000, 300)
    noise = rng.normal(2.5, 0.5, 300)
    one = [np.stack([characters * (noise + step), characters], 1) for step in (0.1, 0.12)]
    other = [np.stack([characters * noise, characters], 1)] * 2
    low, high = statistics.by_texts(one, other, 500)
    assert 0.1 < low <= 0.11 + 1e-9
    assert 0.11 - 1e-9 <= high < 0.12  # although single texts vary by 0.5
    mixed = [np.stack([characters * rng.normal(2.5, 0.5, 300), characters], 1)] * 2
    low, high = statistics.by_texts(mixed, other, 500)
    assert 0.03 < high - low < 0.3


@pytest.mark.parametrize(
    ("mean", "intervals", "expected", "says"),
    [
        (-0.1, [(-0.2, -0.05), (-0.15, -0.01)], -1, "held"),
        (-0.1, [(-0.2, -0.05), (-0.15, 0.01)], -1, "undecided"),
        (0.1, [(0.05, 0.2), (0.01, 0.2)], -1, "contradicted"),
        (-0.1, [(-0.2, 0.05), (-0.15, 0.01)], -1, "undecided"),
        (-0.005, [(-0.007, -0.002), (-0.007, -0.002)], -1, "negligible"),
        (0.1, [(-0.2, 0.3), (-0.1, 0.3)], 0, "held"),
        (0.1, [(0.05, 0.2), (0.01, 0.2)], 0, "contradicted"),
        (0.1, [(0.05, 0.2), (-0.01, 0.2)], 0, "undecided"),
        (0.005, [(0.001, 0.02), (0.001, 0.02)], 0, "held"),
    ],
)
def test_a_hypothesis_is_held_where_both_intervals_are_on_its_side(mean, intervals, expected, says):
    assert statistics.verdict(mean, intervals, expected, statistics.NEGLIGIBLE) == says
