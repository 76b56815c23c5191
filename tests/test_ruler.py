"""RULER-like tasks: their lengths and depths in tokens, what they hide, how they are scored, curves, resumption."""

import json
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from test_added_tokens import phi4_mini
from tokenizer_samples import tiktoken_ranks

from phi3_mlx import load, load_tokenizer, ruler
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.evaluation import retrieval
from phi3_mlx.evaluation.haystack import curves, material
from phi3_mlx.evaluation.haystack.curves import Setting, figures_over_length
from phi3_mlx.evaluation.haystack.fitting import Fitter, most_units, nearest
from phi3_mlx.evaluation.haystack.tasks import ALL_TASKS, RULER_TASKS, Puzzle, Seeds
from phi3_mlx.evaluation.options import RulerOptions

LINES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A SentencePiece one, one of tiktoken's ranks, and two of byte-level BPE."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": load_tokenizer("tiny"),
        "tiktoken": load_tokenizer(tiktoken_ranks(folder / "ranks", chat_template=LINES)),
        "phi-4-mini": phi4_mini(folder / "phi4"),
    }


def puzzle_of(name, length=4096, number=0, seed=1234):
    return ALL_TASKS[name](Seeds(seed, length, number), material.essay)


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "phi-4-mini"])
@pytest.mark.parametrize("name", ALL_TASKS)
def test_a_prompt_with_its_answer_has_the_length_asked_for_and_never_more(tokenizers, kind, name):
    fitter = Fitter(tokenizers[kind])
    for length in (3000, 8192):
        puzzle = puzzle_of(name, length)
        total = len(fitter.fit(puzzle, length, name).ids) + puzzle.max_tokens
        # What is left is less than another sentence, and with a shared haystack than a longer question.
        assert length - (150 if kind == "sentencepiece" else 400) <= total <= length


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "phi-4-mini"])
@pytest.mark.parametrize("name", [name for name in ALL_TASKS if name not in ("cwe", "fwe")])
def test_a_needle_stands_within_a_hundredth_of_its_depth(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    length = 24_000 if kind == "tiktoken" else 8192
    for number in range(2):
        puzzle = puzzle_of(name, length, number)
        text = Fitter(tokenizer).fit(puzzle, length, name).text
        hay = text.removeprefix(puzzle.before + puzzle.joint).removesuffix(f"\n{puzzle.after}")
        for needle in puzzle.needles:  # the haystack is what is left without the needles
            hay = hay.replace(needle.sentence, "", 1)
        everything = len(tokenizer.encode(hay))
        for needle in puzzle.needles:
            before = text[len(puzzle.before) : text.index(needle.sentence, len(puzzle.before))]
            for other in puzzle.needles:
                before = before.replace(other.sentence, "")
            assert abs(len(tokenizer.encode(before)) / everything - needle.depth) <= 0.01


def test_the_seed_alone_decides(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    for name in ALL_TASKS:
        prompts = [
            Fitter(tokenizer).fit(puzzle_of(name, 2500, number, seed), 2500, name).text
            for seed, number in ((1, 0), (1, 0), (2, 0), (1, 1))
        ]
        assert prompts[0] == prompts[1]
        assert len({*prompts}) == 3
    known = puzzle_of("niah_single_1", 4096, 0, 1234)  # on every machine and Python
    assert known.references == ("8290502",)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_answer_is_in_the_text_and_scores_one(tokenizers, name):
    for number in range(3):
        puzzle = puzzle_of(name, 4096, number)
        text = Fitter(tokenizers["sentencepiece"]).fit(puzzle, 4096, name).text
        assert all(reference in text for reference in puzzle.references)
        assert puzzle.score(f"They are {', '.join(puzzle.references).upper()}.") == 1
        assert puzzle.score("I do not know.") == 0
        assert puzzle.score("") == 0
    if len(puzzle.references) > 1:
        assert puzzle.score(puzzle.references[0]) == pytest.approx(1 / len(puzzle.references))


def test_what_each_needle_task_hides():
    four = puzzle_of("niah_multikey_1")
    assert len(four.needles) == 4
    assert len(four.references) == 1
    assert {len(puzzle_of("niah_multivalue").references), len(puzzle_of("niah_multiquery").references)} == {4}
    assert re.fullmatch(r"[0-9]{7}", four.references[0])
    for name in ("niah_single_3", "niah_multikey_3"):
        assert re.fullmatch(
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", puzzle_of(name).references[0]
        )
    noise = puzzle_of("niah_single_1").hay(10)
    assert noise == [*material.NOISE] * 2
    for name in ("niah_multikey_2", "niah_multikey_3"):
        puzzle = puzzle_of(name)
        others = puzzle.hay(8000)  # needles of other keys, none twice
        assert len({sentence.rpartition(" is ")[0] for sentence in [*others, puzzle.needles[0].sentence]}) == 8001
        assert puzzle.hay(5) == others[:5]


def test_a_chain_of_variables_stands_in_order():
    puzzle = puzzle_of("vt")
    depths = [needle.depth for needle in puzzle.needles]
    assert depths == sorted(depths)
    assert len(puzzle.references) == 5
    value = re.search(r"value (\d{5})\?", puzzle.after)[1]
    assert puzzle.needles[0].sentence == f"VAR {puzzle.references[0]} = {value}."
    for before, after, needle in zip(puzzle.references, puzzle.references[1:], puzzle.needles[1:], strict=False):
        assert needle.sentence == f"VAR {after} = VAR {before}."


@pytest.mark.parametrize(("length", "times", "others"), [(8192, 30, 3), (2048, 6, 1)])
def test_common_words_are_as_common_as_rulers(length, times, others):
    puzzle = puzzle_of("cwe", length)
    counts = Counter(item.split(". ")[1] for item in puzzle.hay(200))
    assert {counts[word] for word in puzzle.references} == {times}
    rest = [word for word in counts if word not in puzzle.references]
    assert {counts[word] for word in rest} == {others}
    assert not any(common in word for common in puzzle.references for word in rest)
    assert [item.split(". ")[0] for item in puzzle.hay(3)[:3]] == ["1", "2", "3"]


def test_coded_words_follow_zetas_law_and_the_first_is_dots():
    puzzle = puzzle_of("fwe")
    counts = Counter(puzzle.hay(3000))
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked == ["...", *puzzle.references]
    assert [counts[word] / counts["..."] for word in ranked] == pytest.approx([1, 1 / 4, 1 / 9, 1 / 16], rel=0.02)
    few = Counter(puzzle.hay(puzzle.least))
    assert len({few[word] for word in ["...", *puzzle.references]}) == 4


def test_documents_answer_in_one_step_and_in_two():
    for name, asked in (("qa_1", "Where was"), ("qa_2", "In which region")):
        puzzle = puzzle_of(name)
        assert puzzle.any_of
        assert puzzle.after.startswith(asked)
        assert puzzle.references[0] in puzzle.needles[0 if name == "qa_1" else 1].sentence


def test_tasks_of_one_haystack_share_nearly_all_of_their_prompt(tokenizers):
    fitter = Fitter(tokenizers["sentencepiece"])
    for pair in (("niah_multikey_1", "niah_multiquery"), ("qa_1", "qa_2")):
        first, second = (fitter.fit(puzzle_of(name), 4096, name).ids for name in pair)
        shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        assert shared > 3700


def test_a_search_finds_the_most_units_with_few_prompts():
    for a_unit, start, room in ((1, 0, 10_000), (37, 90, 4096), (3.7, 11, 131_072), (500, 1, 600), (20, 5, 5)):
        asked = []

        def tokens(units, a_unit=a_unit, start=start, asked=asked):
            asked.append(units)
            return int(start + a_unit * units)

        most = most_units(tokens, 0, room)
        assert tokens(most) <= room < tokens(most + 1)
        assert len({*asked}) <= 12
    assert [nearest([0, 10, 20], target) for target in (-1, 4, 5, 6, 99)] == [0, 0, 0, 1, 2]


def test_a_text_of_ones_own_is_cut_into_sentences_that_a_needle_fits_between():
    text = "One two. Three four! " + "word " * 45 + "end."
    sentences = material.sentences_of(text)
    assert sentences[:2] == ["One two.", "Three four!"]
    assert max(len(sentence.split()) for sentence in sentences) == 20
    assert list(islice(material.repeated(["a", "b"], 1), 4)) == ["b", "a", "b", "a"]


# On the bundled model.


@pytest.mark.long
def test_the_bundled_model_finds_words_beyond_the_original_length_and_other_rules_cost_some(tiny, tmp_path):
    counted = []
    results = ruler(
        *tiny,
        "niah_word",
        lengths=(400, 1500),
        rules="auto,short",
        limit=4,
        output=tmp_path / "out",
        progress=lambda *now: counted.append(now),
    )
    rows = {(row["rule"], row["length"]): row for row in results["curve"]}
    assert rows["auto", 400]["value"] >= 0.5
    assert rows["auto", 1500]["value"] >= 0.5
    assert rows["short", 400]["value"] == rows["auto", 400]["value"]
    assert rows["short", 1500]["cost"]["value"] == pytest.approx(
        rows["auto", 1500]["value"] - rows["short", 1500]["value"]
    )
    assert counted[-1] == (16, 16)
    assert tiny[0].model.longrope == "auto"
    # The same again reads nothing, and gives the same figures.
    again = ruler(*tiny, "niah_word", lengths=(400, 1500), rules="auto,short", limit=4, output=tmp_path / "out")
    assert again["curve"] == results["curve"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 16
    assert json.loads((tmp_path / "out" / "ruler.json").read_text())["curve"] == results["curve"]
    picture = pytest.importorskip("matplotlib")
    assert picture
    assert (tmp_path / "out" / "ruler.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_from_the_samples_that_were_answered(tiny, tmp_path, monkeypatch):
    out, options = tmp_path / "out", {"lengths": 300, "limit": 3}

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ruler(*tiny, "niah_word", output=out, progress=stop, **options)
    asked = []
    true = retrieval.answer_each
    monkeypatch.setattr(
        retrieval, "answer_each", lambda *given, **more: asked.append(len(given[2])) or true(*given, **more)
    )
    results = ruler(*tiny, "niah_word", output=out, **options)
    assert asked == [1]
    assert results["curve"] == ruler(*tiny, "niah_word", **options)["curve"]


def test_a_folder_of_another_seed_model_or_text_is_refused(tiny, tmp_path):
    out = tmp_path / "out"
    ruler(*tiny, "niah_word", lengths=300, limit=1, output=out)
    with pytest.raises(DataError, match="another seed"):
        ruler(*tiny, "niah_word", lengths=300, limit=1, output=out, seed=7)
    (tmp_path / "text.txt").write_text("The duck ran. The frog sat. " * 5)
    with pytest.raises(DataError, match="another haystack"):
        ruler(*tiny, "niah_word", lengths=300, limit=1, output=out, haystack=str(tmp_path / "text.txt"))
    results = ruler(*tiny, "niah_word", lengths=300, limit=1, haystack=str(tmp_path / "text.txt"))
    assert results["curve"][0]["samples"] == 1


def test_what_a_shared_haystack_has_is_read_once(tiny, monkeypatch):
    reused = []

    class Counting(retrieval.PrefixStore):
        def cache_for(self, *given, **more):
            cache = super().cache_for(*given, **more)
            reused.append(0 if cache is None else cache[0].offset)
            return cache

    monkeypatch.setattr(retrieval, "PrefixStore", Counting)
    shared = ruler(*tiny, ["qa_1", "qa_2"], lengths=700, limit=1)
    assert len(reused) >= 2
    assert sum(reused) > 500
    monkeypatch.setattr(retrieval, "LEAST", 10**9)  # without a store: the same answers
    assert ruler(*tiny, ["qa_1", "qa_2"], lengths=700, limit=1)["curve"] == shared["curve"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tasks": "niah_single_9"}, "there is no task niah_single_9"),
        ({"tasks": []}, "tasks is empty"),
        ({"lengths": 5000}, "more than the model's context of 4,096"),
        ({"lengths": 100}, "too few tokens for niah_single_1"),
        ({"lengths": "4x"}, "expected a whole number"),
        ({"lengths": 0}, "numbers of tokens"),
        ({"caches": "8,5"}, "kv_bits"),
        ({"caches": "8/4/2"}, "numbers of bits"),
        ({"rules": "auto,other"}, "choose auto, short, long"),
        ({"limit": 0}, "outside its range"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(tiny, given, words):
    with pytest.raises(OptionError) as error:
        ruler(*tiny, **{"tasks": "niah_single_1", "lengths": 400, "limit": 1, **given})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_length_that_is_too_short_is_refused_before_longer_texts_are_read(tiny):
    read = []
    with pytest.raises(OptionError, match="lengths has 100, too few tokens for niah_single_1"):
        ruler(*tiny, "niah_single_1", lengths=(400, 100), limit=1, progress=lambda *done: read.append(done))
    assert read == []


def test_a_haystack_that_is_none_is_refused(tiny, tmp_path):
    for content, words in (
        (b"  \n", "has no sentence"),
        (b"\xff\xff\xff", "no text in UTF-8"),
        (None, "cannot be read"),
    ):
        path = tmp_path / "text.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            ruler(*tiny, "niah_word", lengths=300, haystack=str(path))


def test_options_are_read_as_people_write_them():
    options = RulerOptions(lengths="4k, 8K,100", caches="0,8,8/4", rules="auto,long,auto")
    assert options.lengths == (4096, 8192, 100)
    assert options.caches == (None, (8, 8), (8, 4))
    assert options.rules == ("auto", "long")
    assert RulerOptions(caches=[None, 4, (8, 4)]).caches == (None, (4, 4), (8, 4))


# Figures.


def test_a_curve_is_the_mean_of_tasks_and_what_a_setting_costs_is_paired():
    plain, packed = Setting("auto", "0"), Setting("auto", "4")
    rng = np.random.default_rng(0)
    scores = {}
    for task, count in (("a", 10), ("b", 50)):
        scores[plain, 4096, task] = list(rng.integers(0, 2, count).astype(float))
        scores[packed, 4096, task] = [max(value - 0.5, 0) for value in scores[plain, 4096, task]]
    first, second = figures_over_length(scores)
    means = [np.mean(scores[plain, 4096, task]) for task in "ab"]
    assert first["value"] == pytest.approx(np.mean(means))  # each task counts the same
    assert first["low"] < first["value"] < first["high"]
    assert first["tasks"]["b"]["value"] == pytest.approx(means[1])
    assert "cost" not in first
    assert second["cost"]["value"] == pytest.approx(first["value"] - second["value"])
    assert second["cost"]["value"] == pytest.approx(0.5 * first["value"])
    same = figures_over_length({**scores, **{(packed, 4096, t): scores[plain, 4096, t] for t in "ab"}})[1]["cost"]
    assert (same["value"], same["low"], same["high"]) == (0, None, None)  # no width, which is no certainty
    tasks = first["tasks"].values()  # drawn apart, so their variances add
    half = np.sqrt(sum((task["high"] - task["low"]) ** 2 for task in tasks)) / 2
    assert first["high"] - first["low"] == pytest.approx(half, rel=0.1)
    (alike,) = figures_over_length({(plain, 512, "a"): [1.0] * 4, (plain, 512, "b"): [0.0] * 4})
    (split,) = figures_over_length({(plain, 512, "a"): [1.0, 0.0]})
    assert (alike["low"], alike["value"], alike["high"]) == (None, 0.5, None)
    assert (split["low"], split["value"], split["high"]) == (0, 0.5, 1)


def test_curves_are_drawn_with_and_without_intervals(tmp_path):
    pytest.importorskip("matplotlib")
    scores = {(Setting("auto", "0"), 512, "a"): [1.0] * 4, (Setting("auto", "0"), 1024, "a"): [1.0, 0.0]}
    assert curves.draw_curves(figures_over_length(scores), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_thirteen_tasks_are_rulers():
    assert len(RULER_TASKS) == 13
    assert {name: make(Seeds(1, 4096, 0), material.essay).max_tokens for name, make in RULER_TASKS.items()} == {
        **{name: 128 for name in RULER_TASKS if name.startswith("niah")},
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }
    assert Puzzle("", lambda n: [], (), "", "", ("a", "b"), 1, any_of=True).score("B") == 1
