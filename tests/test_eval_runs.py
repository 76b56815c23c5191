"""Evaluations that are interrupted, compared and written down: the journal, two models' flips, files and pictures."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from phi3_mlx import convert, evaluate, load, tune
from phi3_mlx.cli import main
from phi3_mlx.cli.progress import QuestionProgress
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.evaluation import paired
from phi3_mlx.evaluation.journal import ANSWERS, opened
from phi3_mlx.evaluation.paired import (
    PairedFigure,
    bits,
    difference_interval,
    document_error,
    mcnemar,
    mean_kl,
    perplexities,
    resampled,
    smallest_visible,
)

pytest.importorskip("lm_eval")

from phi3_mlx.evaluation.figures import figures_of
from phi3_mlx.evaluation.pictures import bins, calibration_error

NAMES = ("Max", "Lily", "Tom", "Mia")
THINGS = ("key", "ball", "dog", "red box", "cat", "frog", "hen", "owl")


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """The bundled model in two bits."""
    return load(convert("tiny", tmp_path_factory.mktemp("coarse") / "model", bits=2, report=False).path)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def choosing(count):
    """Questions with choices of different lengths."""
    draw = random.Random(7)
    for number in range(count):
        who, what = draw.choice(NAMES), draw.choice(THINGS)
        text = f"{who} has the {what}. {'Then they go home. ' * draw.randrange(3)}Number {number}: who has the {what}?"
        yield {"question": text, "choices": draw.sample(NAMES, 4), "answer": who}


SAYING = [{"question": f"Who has the {thing}?", "answer": name} for thing, name in zip(THINGS, NAMES * 2, strict=True)]
TEXTS = ["Once upon a time there was a little dog.", "Max — naïve, “happy” 犬 — ran home.\n\nThe end.", "The cat sat."]


@pytest.fixture
def questions(tmp_path):
    return [write_lines(tmp_path / "who.jsonl", choosing(40)), write_lines(tmp_path / "say.jsonl", SAYING)]


# ------------------------------------------------------------------------------------------ statistics


def test_mcnemars_p_is_the_binomials():
    assert mcnemar(5, 0) == pytest.approx(0.0625)
    assert mcnemar(0, 6) == pytest.approx(0.03125)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 7) == 1.0
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for lost in range(0, 40, 3):
        for won in range(0, 40, 4):
            expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
            assert mcnemar(lost, won) == pytest.approx(expected)
    assert mcnemar(3000, 2500) == pytest.approx(binomtest(3000, 5500).pvalue)


@pytest.mark.parametrize(
    ("questions", "points"), [(500, (2.8, 4.0, 5.6)), (1319, (1.7, 2.4, 3.5)), (14042, (0.5, 0.8, 1.1))]
)
def test_the_smallest_visible_difference_is_that_of_the_power_formula(questions, points):
    shares = (0.05, 0.1, 0.2)
    found = [100 * smallest_visible(questions, round(share * questions)) for share in shares]
    assert found == pytest.approx(points, abs=0.06)


def test_the_smallest_visible_difference_is_seen_in_four_of_five_draws():
    n, flips = 1000, 100
    difference, generator = smallest_visible(n, flips), np.random.default_rng(1)
    lost, won = (flips / n - difference) / 2, (flips / n + difference) / 2
    drawn = generator.multinomial(n, [lost, won, 1 - lost - won], size=4000)
    seen = np.mean([mcnemar(int(a), int(b)) < 0.05 for a, b, _ in drawn])
    assert 0.74 < seen < 0.82  # the exact test is a little more careful than the formula


def test_few_questions_show_no_difference():
    assert smallest_visible(3, 1) == 1.0
    assert smallest_visible(100, 0) >= 0.06  # six flips one way
    assert smallest_visible(500, 0) == smallest_visible(500, 6)  # fewer flips than six show nothing more


def test_the_interval_of_a_difference_covers_the_truth_and_has_a_width_without_flips():
    low, high = difference_interval(1000, 30, 20)
    plain = 1.96 * np.sqrt(50 - 100 / 1000) / 1000
    assert (low + high) / 2 == pytest.approx(-0.01, abs=1e-4)
    assert (high - low) / 2 == pytest.approx(plain, rel=0.02)
    # Half a question in each of four cells: 5.5 and 12.5 of 102; the variance of a difference of shares.
    share, middle = (5.5 + 12.5) / 102, (12.5 - 5.5) / 102
    half = 1.959964 * np.sqrt((share - middle**2) / 102)
    assert difference_interval(100, 5, 12) == pytest.approx((middle - half, middle + half), abs=1e-12)
    low, high = difference_interval(100, 0, 0)
    assert low == -high
    assert high > 0.01
    generator, covered = np.random.default_rng(2), 0
    for lost, won, _ in generator.multinomial(60, [0.08, 0.03, 0.89], size=2000):
        low, high = difference_interval(60, int(lost), int(won))
        covered += low <= -0.05 <= high
    assert covered / 2000 > 0.93


def test_the_bootstrap_draws_the_same_questions_of_both_models():
    generator = np.random.default_rng(3)
    before = generator.normal(size=400)
    interval = resampled(before, before + 0.25, lambda rows: rows.mean(axis=-1))
    assert interval == pytest.approx((0.25, 0.25))
    after = before + generator.normal(0.1, 1, size=400)
    low, high = resampled(before, after, lambda rows: rows.mean(axis=-1))
    expected = 1.96 * (after - before).std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(expected, rel=0.08)
    assert resampled(before[:1], after[:1], lambda rows: rows.mean(axis=-1)) is None


def test_few_numbers_are_drawn_at_a_time(monkeypatch):
    whole = np.concatenate(list(paired.draws(50)))
    monkeypatch.setattr(paired, "_DRAWN_AT_ONCE", 1000)
    parts = list(paired.draws(50))
    assert len(parts) == 100
    assert (np.concatenate(parts) == whole).all()


def test_perplexity_and_its_error_are_of_documents():
    rows = np.array([[-20.0, 10], [-60.0, 20]])
    assert perplexities(rows) == pytest.approx(np.exp(80 / 30))
    assert bits(rows) == pytest.approx(80 / 30 / np.log(2))
    generator = np.random.default_rng(4)
    rows = np.stack([-generator.normal(30, 4, 500), np.full(500, 10.0)], axis=-1)
    error = rows[:, 0].std(ddof=1) / 10 / np.sqrt(500)
    assert document_error(rows, "bits_per_byte") == pytest.approx(error / np.log(2), rel=0.08)
    assert document_error(rows, "word_perplexity") == pytest.approx(error * perplexities(rows), rel=0.08)


def chosen(*logprobs):
    return {"resps": [[[value, False]] for value in logprobs], "metrics": ["acc"]}


def test_kl_is_of_the_distributions_over_the_choices():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    expected = (p * np.log(p / q)).sum()
    scaled = chosen(*(np.log(q) - 7))  # what the choices have of all probability does not matter
    assert mean_kl([chosen(*np.log(p))], [scaled]) == pytest.approx(expected)
    assert mean_kl([chosen(*np.log(p))] * 2, [scaled, chosen(*np.log(p))]) == pytest.approx(expected / 2)
    assert mean_kl([chosen(-1.0)], [chosen(-1.0)]) is None
    assert mean_kl([chosen(-1e4, 0.0)], [chosen(0.0, -1e4)]) == pytest.approx(1e4)
    assert mean_kl([chosen(-np.inf, 0.0)], [chosen(0.0, -1.0)]) is None
    generated = {"resps": [["a text"]], "metrics": ["exact_match"]}
    assert mean_kl([generated], [generated]) is None


def test_what_can_be_said_of_a_difference():
    pair = PairedFigure("mmlu", "acc", "none", 500, 0.7, 0.69, (-0.03, 0.01), (("mmlu", 1),), (), 0.6, 0.01, 0.028)
    said = "no difference can be seen with 500 questions (the smallest visible one is about 2.8 points)"
    assert pair.verdict() == said
    assert replace(pair, chance=0.02).verdict() == "the difference is more than chance (p = 0.020)"
    assert replace(pair, chance=1e-9).verdict() == "the difference is more than chance (p < 0.001)"
    assert not replace(pair, chance=mcnemar(5, 0)).is_visible  # .0625
    few = replace(pair, questions=1, smallest=1.0)
    assert few.verdict() == "no difference can be seen with 1 question, which are too few for any"
    unweighted = replace(pair, lost=None, won=None, chance=None, smallest=None)
    assert not unweighted.is_visible
    assert replace(unweighted, interval=(-0.03, -0.01)).is_visible
    assert replace(unweighted, interval=None).verdict() == "of one document nothing can be said"


def test_calibration_is_binned_by_tenths():
    sure, right = np.array([0.95, 1.0, 0.31, 0.39]), np.array([1.0, 0.0, 1.0, 1.0])
    assert bins(sure, right) == [(0.35, 1.0, 2), (0.975, 0.5, 2)]
    assert calibration_error(sure, right) == pytest.approx((0.65 + 0.475) / 2)


# ------------------------------------------------------------------------------------------ against


@pytest.mark.long
def test_two_models_are_compared_question_by_question(tiny, coarse, questions):
    before, after = (evaluate(*model, questions) for model in (tiny, coarse))
    pairs = {(pair.task, pair.metric): pair for pair in paired.compare_results(before, after)}
    who = pairs["who", "acc"]
    ours, theirs = ([sample["acc"] for sample in results["samples"]["who"]] for results in (after, before))
    lost = [n for n, (old, new) in enumerate(zip(theirs, ours, strict=True)) if old > new]
    won = [n for n, (old, new) in enumerate(zip(theirs, ours, strict=True)) if old < new]
    assert lost or won
    assert [doc for _, doc in who.lost] == lost
    assert [doc for _, doc in who.won] == won
    assert who.chance == mcnemar(len(lost), len(won))
    assert who.difference == pytest.approx((len(won) - len(lost)) / 40)
    assert who.kl > 0
    assert pairs["say", "contains"].kl is None
    same = {pair.metric: pair for pair in paired.compare_results(before, before)}["acc"]
    assert (same.kl, same.difference, same.chance) == (0.0, 0.0, 1.0)
    assert "no difference can be seen with 40 questions" in same.verdict()


def test_models_that_were_asked_other_questions_are_not_compared(tiny, tmp_path):
    ask = lambda lines: evaluate(*tiny, write_lines(tmp_path / "who.jsonl", lines))  # noqa: E731
    lines = [*choosing(4)]
    before = ask(lines)
    for others in (lines[:3], [*lines[:3], {**lines[3], "answer": 0}]):
        with pytest.raises(DataError, match="who was not asked with the same questions of both models"):
            paired.compare_results(before, ask(others))


def test_another_way_of_asking_is_refused_before_anything_is_asked(tiny, questions):
    before, asked = evaluate(*tiny, questions[0], limit=2), []
    for given, said in (
        ({"limit": 3}, "against was asked with limit=2, and this model would be with limit=3; ask both the same"),
        ({"chat": True}, "against was asked with chat=False"),
        ({"num_fewshot": 1}, "against was asked with num_fewshot=None"),
        ({"system": "Be kind."}, "against was asked with system=None"),
        ({"seed": 2}, "against was asked with seed=1234"),
        ({"tasks": questions}, "against has no answers to say; ask both models the same tasks"),
    ):
        with pytest.raises(OptionError, match=said):
            evaluate(
                *tiny,
                **{"tasks": questions[0], "limit": 2, **given},
                against=before,
                progress=lambda *done: asked.append(done),
            )
    assert asked == []
    assert evaluate(*tiny, questions[0], limit=2, max_length=2000, against=before)["against"][0].difference == 0


def test_what_lm_eval_prints_of_its_draws_is_not_heard(tiny, tmp_path, capfd):
    """Where --json is asked for, standard output has one JSON object."""
    lines = [{"before": "Once upon a", "after": " time"}, {"before": "The cat", "after": " sat"}]
    write_lines(tmp_path / "words.jsonl", lines)
    (tmp_path / "words.yaml").write_text(
        f"""
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "words.jsonl"}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{ before }}}}"
doc_to_target: "{{{{ after }}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
    )
    figures = evaluate(*tiny, "words", include_path=tmp_path)["results"]["words"]
    assert figures["perplexity_stderr,none"] > 0
    assert capfd.readouterr() == ("", "")


def test_a_directory_has_results_samples_report_and_pictures(tiny, coarse, questions, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    asked = [*questions, texts]
    before = evaluate(*tiny, asked, gen_kwargs="max_gen_toks=3")
    folder = tmp_path / "out"
    after = evaluate(
        *coarse, asked, gen_kwargs={"max_gen_toks": 3}, against=before, output=folder, model_args={"pretrained": "a|b`"}
    )
    assert {path.name for path in folder.iterdir()} == {
        *("answers.jsonl", "results.json", "samples.jsonl", "report.md"),
        *("figures.png", "flips.png", "calibration.png"),
    }
    told = json.loads((folder / "results.json").read_text())
    assert told["config"]["model"] == "a|b`"
    assert told["config"]["gen_kwargs"] == {"max_gen_toks": 3}
    assert told["against"][0]["before"] == before["results"]["who"]["acc,none"]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 40 + 8 + 3
    first = lines[0]
    assert {choice["text"] for choice in first["choices"]} == {" A", " B", " C", " D"}
    assert first["choices"][0]["logprob"] == first["resps"][0][0][0]
    assert first["answer"] == max(first["choices"], key=lambda choice: choice["logprob"])["text"]
    assert first["right"] == bool(first["acc"])
    assert 0.25 <= first["confidence"] <= 1
    assert first["prompt_hash"]
    pair = after["against"][0]
    flipped = {line["doc_id"]: line["flip"]["acc"] for line in lines if line["task"] == "who" and "flip" in line}
    assert flipped == {**{doc: "lost" for _, doc in pair.lost}, **{doc: "won" for _, doc in pair.won}}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# `` a\\|b` ``: what it got right\n")
    assert "![Questions lost and won by task](flips.png)" in report
    assert report.count("\n- ") >= len(pair.lost) + len(pair.won)
    assert after["phi3_mlx"]["cut_answers"] > 0
    assert f"{after['phi3_mlx']['cut_answers']} answers were cut by the budget (max_gen_toks)." in report
    for name in ("figures.png", "flips.png", "calibration.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size > 4000


def test_without_matplotlib_the_report_says_so(tiny, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate(*tiny, questions[0], limit=3, output=tmp_path / "out")
    assert 'pip install "phi3-mlx[plot]"' in (tmp_path / "out" / "report.md").read_text()
    assert not [*(tmp_path / "out").glob("*.png")]


# ------------------------------------------------------------------------------------------ perplexity


def test_a_text_is_scored_whole(tiny, tmp_path):
    model, tokenizer = tiny
    path = tmp_path / "book.txt"
    path.write_text(TEXTS[1], encoding="utf-8")
    lines = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    results = evaluate(model, tokenizer, [str(path), lines], max_length=8)
    book, texts = results["results"]["book"], results["results"]["texts"]
    logprob, _ = results["samples"]["book"][0]["word_perplexity"]
    tokens = len(tokenizer.encode(TEXTS[1]))
    assert book["token_perplexity,none"] == pytest.approx(np.exp(-logprob / tokens))
    assert book["word_perplexity,none"] == pytest.approx(np.exp(-logprob / len(TEXTS[1].split())))
    assert book["byte_perplexity,none"] == pytest.approx(np.exp(-logprob / len(TEXTS[1].encode())))
    assert book["bits_per_byte,none"] == pytest.approx(-logprob / len(TEXTS[1].encode()) / np.log(2))
    assert results["samples"]["texts"][1]["word_perplexity"][0] == pytest.approx(logprob, abs=1e-3)
    assert texts["word_perplexity_stderr,none"] > 0
    figures = {(figure.task, figure.metric): figure for figure in figures_of(results)}
    assert figures["book", "word_perplexity"].interval is None  # one document
    assert figures["texts", "word_perplexity"].interval > 0


@pytest.mark.long
def test_perplexities_are_those_of_lm_evals_wikitext(tiny, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.wikitext import preprocess_wikitext as wikitext

    datasets = pytest.importorskip("datasets")
    pages = [text for text in TEXTS if wikitext.wikitext_detokenizer({"page": text}) == text]
    assert len(pages) == 3
    task = ConfigurableTask(
        config={
            "task": "wikitext_here",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([{"page": page} for page in pages])},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": wikitext.wikitext_detokenizer,
            "process_results": wikitext.process_results,
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
    )
    from phi3_mlx import HarnessLM

    theirs = simple_evaluate(model=HarnessLM(*tiny, max_length=16), tasks=[task], verbosity="ERROR")["results"]
    lines = write_lines(tmp_path / "texts.jsonl", [{"text": page} for page in pages])
    ours = evaluate(*tiny, lines, max_length=16)["results"]["texts"]
    for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert ours[metric] == pytest.approx(theirs["wikitext_here"][metric], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", " \n", r"empty\.txt holds no text"),
        ("empty.jsonl", "", r"empty\.jsonl holds no questions"),
        ("some.jsonl", '{"text": "a b"}\n{"text": 3}', r"some\.jsonl:2: text is a number; expected a text"),
        ("none.txt", None, r"none\.txt cannot be read"),
        ("bytes.txt", b"\xff\xfe\xfd", r"bytes\.txt "),
    ],
)
def test_a_file_without_text_is_refused(tiny, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        evaluate(*tiny, str(tmp_path / name))


# ------------------------------------------------------------------------------------------ tasks of the user's own


def test_tasks_that_a_directory_defines_are_asked(tiny, tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", [{"q": "Who is Max?", "a": "A dog"}])
    definition = f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {lines}}}}}\n"
    definition += 'output_type: generate_until\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
    definition += "generation_kwargs: {max_gen_toks: 2}\nmetric_list: [{metric: exact_match}]\n"
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "mine.yaml").write_text(definition)
    (folder / "unsafe.yaml").write_text(definition.replace("mine", "unsafe") + "unsafe_code: true\n")
    results = evaluate(*tiny, "mine", include_path=folder)
    assert results["results"]["mine"]["exact_match,none"] in (0.0, 1.0)
    with pytest.raises(OptionError, match=r"task unsafe runs code .* allow_code=True lets it"):
        evaluate(*tiny, "unsafe", include_path=folder)
    with pytest.raises(OptionError, match=r"include_path .* is no directory"):
        evaluate(*tiny, "mine", include_path=tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gen_kwargs": "max_gen_toks"}, "gen_kwargs is 'max_gen_toks'; expected names and values"),
        ({"gen_kwargs": "{]"}, "gen_kwargs is no JSON"),
        ({"gen_kwargs": "num_beams=4"}, "generation_kwargs has num_beams=4, which has no meaning here"),
        ({"gen_kwargs": 3}, "gen_kwargs is 3"),
        ({"gen_kwargs": {"until": {3}}}, "gen_kwargs holds what JSON cannot"),
        ({"gen_kwargs": {3: 4}}, "gen_kwargs is a dict; expected names and values"),
        ({"output": 3}, "output is 3"),
        ({"include_path": 3}, "include_path is 3"),
        ({"against": 3}, "against is 3"),
        ({"progress": 3}, "progress is 3"),
        ({"tasks": ["a.jsonl", "b/a.jsonl"]}, "tasks has a twice"),
    ],
)
def test_evaluate_refuses_what_is_none_of_its_options(tiny, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "b" / "a.jsonl"):
        write_lines(path, choosing(1))
    with pytest.raises(OptionError, match=said):
        evaluate(*tiny, **{"tasks": ["a.jsonl"], **given})


# ------------------------------------------------------------------------------------------ the journal


def comparable(folder):
    """What a finished run left, without its times and log-probabilities, and these."""
    told = json.loads((folder / "results.json").read_text())
    for key in ("date", "config"):  # of the command's config is more known than of a loaded model's
        del told[key]
    del told["phi3_mlx"]["seconds"]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    logprobs = []
    for line in lines:
        for key in ("confidence", "choices"):
            line.pop(key, None)
        for key in ("resps", "filtered_resps"):
            if "acc" in line:
                logprobs.append([parts[-1][0] if key == "resps" else parts[0] for parts in line.pop(key)])
    return told, lines, logprobs


def assert_same(folder, other):
    """Two runs with the same figures; log-probabilities may be rounded as other questions are read beside them."""
    ours, theirs = comparable(folder), comparable(other)
    assert ours[:2] == theirs[:2]
    for one, another in zip(ours[2], theirs[2], strict=True):
        assert one == pytest.approx(another, abs=1e-4)


def test_a_run_that_is_killed_goes_on_to_the_same_figures(tiny, questions, tmp_path):
    command = [sys.executable, "-m", "phi3_mlx", "eval", "--tasks", ",".join(questions), "--chat", "-o"]

    def start(folder):
        return subprocess.Popen([*command, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    evaluate(*tiny, questions, chat=True, output=whole)
    draw, lines = random.Random(), []
    for most in (60, 150):
        wanted, run = draw.randrange(len(lines) + 2, most), start(folder)
        while run.poll() is None:
            lines = (folder / ANSWERS).read_bytes().splitlines() if (folder / ANSWERS).exists() else []
            if len(lines) >= wanted:
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        run.communicate()
        assert run.returncode == -signal.SIGKILL, lines
        assert not (folder / "results.json").exists()
        lines = (folder / ANSWERS).read_bytes().splitlines()
    last = start(folder)
    _, notes = last.communicate()
    assert last.returncode == 0, notes
    assert b"has answers of an earlier run, which goes on from there" in notes
    assert (folder / ANSWERS).read_bytes().splitlines()[: len(lines) - 1] == lines[:-1]
    assert_same(folder, whole)


@pytest.mark.long
def test_ctrl_c_keeps_the_answers_that_there_are(tiny, questions, tmp_path):
    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    whole = evaluate(*tiny, questions, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny, questions, output=tmp_path / "out", progress=stop)
    seen = []
    results = evaluate(*tiny, questions, output=tmp_path / "out", progress=lambda *count: seen.append(count))
    assert seen[0] == (8, 40)
    assert results["results"] == whole["results"]
    assert_same(tmp_path / "out", tmp_path / "whole")
    seen.clear()
    evaluate(*tiny, questions, output=tmp_path / "out", progress=lambda *count: seen.append(count))
    assert seen == []


def test_drawn_answers_are_the_same_where_a_run_goes_on(tiny, questions, tmp_path):
    drawn = {"gen_kwargs": "temperature=1,do_sample=true,max_gen_toks=6", "output": tmp_path / "out"}
    whole = evaluate(*tiny, questions[1], gen_kwargs=drawn["gen_kwargs"])
    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny, questions[1], **drawn, progress=interrupt)
    resumed = evaluate(*tiny, questions[1], **drawn)
    assert resumed["samples"]["say"] == whole["samples"]["say"]
    assert resumed["phi3_mlx"]["cut_answers"] == whole["phi3_mlx"]["cut_answers"] > 0


def interrupt(done, total):
    raise KeyboardInterrupt


def test_another_evaluation_is_not_gone_on_with(tiny, coarse, questions, tmp_path):
    folder = tmp_path / "out"
    evaluate(*tiny, questions[0], limit=4, output=folder)
    before = (folder / ANSWERS).read_bytes()
    changed = [
        (
            {"limit": 5},
            r"out was begun with another limit \(it was 4\); give the same again, or name another directory with",
        ),
        ({"chat": True}, r"another chat \(it was False\)"),
        ({"num_fewshot": 1}, r"another num_fewshot \(it was None\)"),
        ({"tasks": questions}, r"another tasks \(it was \['"),
    ]
    for given, said in changed:
        with pytest.raises(DataError, match=said):
            evaluate(*tiny, **{"tasks": questions[0], "limit": 4, "output": folder, **given})
    with pytest.raises(DataError, match="out was begun with another model; give"):
        evaluate(*coarse, questions[0], limit=4, output=folder)
    write_lines(tmp_path / "who.jsonl", [{**line, "choices": line["choices"][:2], "answer": 0} for line in choosing(9)])
    with pytest.raises(DataError, match="was begun with other questions, examples or prompts"):
        evaluate(*tiny, questions[0], limit=4, output=folder)
    assert (folder / ANSWERS).read_bytes() == before


def test_a_line_that_was_being_written_is_asked_again(tiny, questions, tmp_path):
    folder = tmp_path / "out"
    evaluate(*tiny, questions[0], limit=6, output=folder)
    results, path = (folder / "results.json").read_text(), folder / ANSWERS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    evaluate(*tiny, questions[0], limit=6, output=folder)
    assert json.loads((folder / "results.json").read_text())["results"] == json.loads(results)["results"]
    assert len(path.read_bytes().splitlines()) == len(whole.splitlines())


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish",
        b"[1]",
        b'{"kind": "loglikelihood", "place": -1, "result": [1.0, true]}',
        b'{"kind": "loglikelihood", "place": 0, "result": [1.0]}',
        b'{"kind": "loglikelihood", "place": 0, "result": ["a", true]}',
        b'{"kind": "loglikelihood", "place": 999, "result": [-1.0, true]}',
        b'{"kind": "generate_until", "place": 0, "result": ["a", "stop"]}',
        b'{"kind": "songs", "place": 0}',
        b'{"kind": [], "place": 0}',
        b"\xff",
    ],
)
def test_a_damaged_file_of_answers_is_refused(tiny, questions, tmp_path, line):
    folder = tmp_path / "out"
    evaluate(*tiny, questions[0], limit=2, output=folder)
    with open(folder / ANSWERS, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=r"answers\.jsonl is damaged: .*; remove that line, or the file to begin anew"):
        evaluate(*tiny, questions[0], limit=2, output=folder)


def test_an_answer_that_is_no_number_is_asked_again(tmp_path):
    asked = [[1], [2]]
    with opened(tmp_path, {}) as journal:
        assert journal.begin("loglikelihood", asked) == {}
        journal.add("loglikelihood", 0, (float("nan"), False))
        journal.add("loglikelihood", 1, (-2.0, True))
    with opened(tmp_path, {}) as journal:
        assert journal.earlier == 1
        assert journal.begin("loglikelihood", asked) == {1: [-2.0, True]}
        journal.add("loglikelihood", 2, (-2.0, True))
    with opened(tmp_path, {}) as journal, pytest.raises(DataError, match="answers questions that are not asked"):
        journal.begin("loglikelihood", asked)


def test_one_run_writes_into_a_directory(tiny, questions, tmp_path):
    with (
        opened(tmp_path / "out", {}),
        pytest.raises(DataError, match=r"another process writes into .*out; wait for its end"),
    ):
        evaluate(*tiny, questions[0], output=tmp_path / "out")


def test_a_place_that_is_no_evaluations_is_refused(tiny, questions, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o500)
    for name, said in (
        ("file", "file is not a directory"),
        ("full", "full exists already and holds no evaluation"),
        ("file/out", "leads through a file, where a folder is needed"),
    ):
        with pytest.raises(DataError, match=said):
            evaluate(*tiny, questions[0], limit=1, output=tmp_path / name)
    (tmp_path / "new").mkdir()  # an empty one is taken
    evaluate(*tiny, questions[0], limit=1, output=tmp_path / "new")
    assert (tmp_path / "new" / "report.md").exists()


# ------------------------------------------------------------------------------------------ the command


def run(capsys, *args):
    with pytest.raises(SystemExit) as done:
        main(["eval", *map(str, args)])
    return done.value.code, *capsys.readouterr()


def test_the_command_compares_with_the_model_before(questions, tmp_path, capsys):
    convert("tiny", tmp_path / "two", bits=2, report=False)
    out = tmp_path / "out"
    code, table, notes = run(
        capsys, "-m", tmp_path / "two", "--against", "tiny", "--tasks", questions[0], "--limit", 10, "-o", out
    )
    assert code == 0, notes
    assert "\nagainst tiny:\ntask  metric" in table
    assert "who, acc: no difference can be seen with 10 questions (the smallest visible one is about " in table
    assert (out / "against" / "results.json").exists()
    assert f"{out / 'report.md'}\n" in notes
    code, text, _ = run(capsys, "--against", "tiny", "--tasks", questions[0], "--limit", 2, "--json")
    assert code == 0
    assert json.loads(text)["against"][0]["kl"] == 0.0
    code, _, notes = run(
        capsys, "-m", tmp_path / "no", "--against", "tiny", "--tasks", questions[0], "-o", tmp_path / "x"
    )
    assert (code, notes.count("\n"), "no such directory" in notes) == (1, 1, True)
    assert not (tmp_path / "x").exists()  # the other was not asked first
    code, _, notes = run(capsys, "--against-adapter", "x", "--tasks", questions[0])
    assert (code, "needs --against" in notes) == (2, True)


def test_the_command_names_its_own_options_for_answers(questions, capsys):
    code, _, notes = run(capsys, "--tasks", questions[1], "--gen-kwargs", "num_beams=2")
    assert code == 2
    assert notes.count("\n") == 1


def test_a_prompt_that_is_cut_counts_once_whatever_its_choices(tiny, questions):
    def lengths(results, task):
        return [len(tiny[1].encode(sample["arguments"][0][0])) for sample in results["samples"][task]]

    whole = evaluate(*tiny, questions, gen_kwargs="max_gen_toks=1")
    assert whole["phi3_mlx"]["cut_prompts"] == 0
    longest = sorted(lengths(whole, "who"))[20]
    results = evaluate(*tiny, questions, max_length=longest, gen_kwargs={"max_gen_toks": longest - 10})
    cut = sum(length > longest for length in lengths(whole, "who"))
    assert 0 < cut < 20
    assert results["phi3_mlx"]["cut_prompts"] == cut + sum(length > 10 for length in lengths(whole, "say"))


def test_a_log_says_how_long_the_rest_takes(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = QuestionProgress("evaluating tiny")
    for done, total, said in (
        (51, 100, ""),  # fifty of an earlier run, and the first
        (61, 100, "evaluating tiny: 61 of 100 questions, about 4 minutes left\n"),
        (1, 40, "evaluating tiny: 1 of 40 questions\n"),
        (3, 40, "evaluating tiny: 3 of 40 questions, about 25 minutes left\n"),
    ):
        now[0] += 6.0 if done == 51 else 60.0
        bar.update(done, total)
        assert capsys.readouterr().err == said
    bar.close()


# ------------------------------------------------------------------------------------------ convert and tune


@pytest.mark.long
def test_a_conversion_is_measured_on_tasks(questions, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["convert", "tiny", "-o", str(tmp_path / "two"), "--bits", "2", "--tasks", questions[0]])
    table, notes = capsys.readouterr()
    assert done.value.code == 0, notes
    assert "\nagainst tiny:\n" in table
    report = (tmp_path / "two" / "REPORT.md").read_text(encoding="utf-8")
    assert report.startswith("# What this conversion cost\n")
    assert "\n## Tasks\n\n| task | metric | before | after |" in report
    assert report.endswith("More is in `evaluation/`.\n")
    assert (tmp_path / "two" / "evaluation" / "against" / "results.json").exists()
    load(tmp_path / "two")


def test_faulty_tasks_are_refused_before_a_model_is_made(tmp_path, capsys):
    write_lines(tmp_path / "bad.jsonl", [{"question": "Q"}])
    for command in (["convert", "tiny", "-o"], ["tune", "-m", "tiny", "-d", str(tmp_path / "data.jsonl"), "-o"]):
        write_lines(tmp_path / "data.jsonl", [{"prompt": "Who?", "completion": "Max."}] * 8)
        with pytest.raises(SystemExit) as done:
            main([*command, str(tmp_path / "made"), "--tasks", str(tmp_path / "bad.jsonl")])
        assert done.value.code == 1
        assert "bad.jsonl:1: answer is null; expected a text" in capsys.readouterr().err
        assert not (tmp_path / "made").exists()


def test_what_measure_returns_ends_the_report_of_a_conversion(tmp_path):
    asked = []

    def measure(source, destination):
        load(destination)
        asked.append((source, destination))
        return "## Mine\n\n犬\n"

    made = convert("tiny", tmp_path / "four", bits=8, report=False, measure=measure)
    assert asked == [("tiny", made.path)]
    assert (made.path / "REPORT.md").read_text(encoding="utf-8") == "# What this conversion cost\n\n## Mine\n\n犬\n"
    with pytest.raises(OptionError, match="what measure returns is 3; expected a text"):
        convert("tiny", tmp_path / "other", bits=8, report=False, measure=lambda *_: 3)
    with pytest.raises(OptionError, match="measure is 3; expected a function"):
        convert("tiny", tmp_path / "more", measure=3)


@pytest.mark.long
def test_a_fine_tuning_is_measured_on_tasks_at_its_end(questions, tmp_path, capsys):
    lines = [{"prompt": f"Who has the {thing}?", "completion": "Lily."} for thing in THINGS * 2]
    data, out = write_lines(tmp_path / "data.jsonl", lines), tmp_path / "adapter"
    command = ["tune", "-m", "tiny", "-d", data, "-o", str(out), "--steps", "4", "--learning-rate", "1e-3"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--holdout", "0", "--tasks", questions[1]])
    table, notes = capsys.readouterr()
    assert done.value.code == 0, notes
    assert "\nagainst tiny:\n" in table
    told = json.loads((out / "evaluation-4" / "results.json").read_text())
    assert told["config"]["model_args"]["adapter"] == [str(out)]
    before = json.loads((out / "evaluation-4" / "against" / "results.json").read_text())
    assert before["config"]["model_args"]["adapter"] == []
    samples = (out / "evaluation-4" / "samples.jsonl").read_text()
    assert samples != (out / "evaluation-4" / "against" / "samples.jsonl").read_text()


def test_measure_gets_the_result_of_a_fine_tuning(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "Who?", "completion": "Max."}] * 8)
    seen = []
    result = tune("tiny", data, tmp_path / "out", steps=1, holdout=0, measure=seen.append)
    assert seen == [result]
    load("tiny", adapter=result.output)


# ------------------------------------------------------------------------------------------ the page's estimates


def test_the_pages_estimates_are_those_of_today(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import _estimates

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert _estimates.with_estimates(page) == page
    assert _estimates.section() in page
    prompt, answer = _estimates.speeds()
    assert prompt == pytest.approx(224.81 * 6.98 / 3.62, rel=0.01)
    assert answer == pytest.approx(20.87 * 4.92 / 2.15, rel=0.01)
    shared, alone = (_estimates.seconds(run) for run in _estimates.RUNS[:2])
    assert shared / alone == pytest.approx(0.155, abs=0.002)  # of the tokens
    needed, room = _estimates.memory()
    assert 2.15e9 < needed < room < 16 * 2**30
