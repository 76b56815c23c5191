"""phi3-mlx data synthesize: what a model makes is what training reads, says where it is from, and can be made again."""

import gzip
import inspect
import io
import json
import os
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import ROOT

from phi3_mlx import data_stats, generate, load, score, synthesize_data
from phi3_mlx.cli import main
from phi3_mlx.data import attempts, verifying
from phi3_mlx.data.kinds import KINDS, Subject, checked_template, prompt_of
from phi3_mlx.data.options import ReadOptions
from phi3_mlx.data.synthesis import JOURNAL_FILE
from phi3_mlx.data.synthesis_options import SynthesisOptions
from phi3_mlx.data.verifying import broken_rule, words_in_common
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.generation.answering import FinishedAnswer
from phi3_mlx.generation.answers import encode_prompt
from phi3_mlx.generation.scoring import Score
from phi3_mlx.tuning.examples import encode_records
from phi3_mlx.tuning.pairs import encode_pairs, read_pair
from phi3_mlx.tuning.rows import read_row

SMALL = {"max_tokens": 120, "parallel": 2, "min_words": 1, "name": "tiny"}
# Four attempts of a kind by a true model, in two groups; all that training can read is kept.
TRUE = {"attempts": 4, "max_characters": 60, "threshold": 1.0, **SMALL}
VERIFIED = {
    "instructions": {"verify": "score", "min_logprob": -100.0},
    "questions": {"verify": "none"},
    "preferences": {"verify": "none"},
}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def load_brief():
    """The bundled model, which soon ends a text in quotation marks: by itself it goes on for hundreds of tokens."""
    model, tokenizer = load("tiny")
    raised = mx.array([4.0 * (b'"' in tokenizer.token_bytes(n)) for n in range(model.config.vocab_size)])
    usual = model.logits
    model.logits = lambda hidden, places=None: usual(hidden, places) + raised
    return model, tokenizer


@pytest.fixture(scope="module")
def brief():
    return load_brief()


def write_topics(folder):
    path = folder / "topics.txt"
    path.write_text("a dog\nthe moon\n\nrain\n", encoding="utf-8")
    return path


@pytest.fixture
def topics(tmp_path):
    return write_topics(tmp_path)


@pytest.fixture(scope="module")
def made(brief, tmp_path_factory):
    """(topics, folder, report) of a run of each kind, which is made when a test first asks for it."""
    folder, runs = tmp_path_factory.mktemp("made"), {}
    shared = write_topics(folder)

    def of_kind(kind):
        if kind not in runs:
            out = folder / kind
            report = synthesize_data(*brief, out, topics=shared, kind=kind, **VERIFIED.get(kind, {}), **TRUE)
            runs[kind] = shared, out, report
        return runs[kind]

    return of_kind


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*words):
    with pytest.raises(SystemExit) as left:
        main(["data", "synthesize", *map(str, words)])
    return left.value.code


@pytest.fixture
def said(monkeypatch):
    """Answers in place of the model's: `said` makes each of the number of the attempt; it counts what was asked."""
    asked = []

    class Said:
        parts = staticmethod(lambda n: {"instruction": f"Tell me of number {n}.", "response": f"It is the {n}. one."})
        reason = "stop"

    def answer_each(model, tokenizer, prompts, **_):
        for place, (_, request) in enumerate(prompts):
            n = next(n for n in range(10_000) if attempts.seed_of(0, n) == request.seed)
            asked.append(n)
            yield place, FinishedAnswer(json.dumps(Said.parts(n)), Said.reason, tokens=10)

    monkeypatch.setattr(attempts, "answer_each", answer_each)
    Said.asked = asked
    return Said


# What is made
@pytest.mark.parametrize("kind", KINDS)
def test_records_are_those_that_training_reads_and_their_provenance_makes_them_again(brief, made, kind):
    topics, out, report = made(kind)
    rows = rows_of(out / "data.jsonl")
    assert len(rows) == report["kept"] >= 2
    assert (report["ended_by"], report["attempts"]) == ("attempts", 4)
    stats = data_stats(out, tokenizer=brief[1])  # the journal and removed.jsonl are passed over
    assert stats["tune"]["objectives"] == {"dpo" if kind == "preferences" else "sft": len(rows)}
    assert stats["tune"]["learnt_tokens"] > 0
    if kind == "preferences":
        examples = encode_pairs([read_pair(row, "", {}) for row in rows], brief[1], max_length=1000).examples
    else:
        records = [read_row(row, "", {}) for row in rows]
        examples = encode_records(records, brief[1], max_length=1000).examples
        assert all((record.text is not None) == (kind == "passages") for record in records)
    assert len(examples) == len(rows)
    assert len({row["provenance"]["fingerprint"] for row in rows}) == 1
    assert report["model"] == {"name": "tiny", "fingerprint": rows[0]["provenance"]["fingerprint"]}
    seeds = [attempts.seed_of(0, number) for number in range(4)]
    for row in rows[-2:]:
        known = row.pop("provenance")
        assert known["subject"] == f"{topics}:{[1, 2, 4][seeds.index(known['seed']) % 3]}"
        assert (known["model"], known["kind"], known["version"]) == ("tiny", kind, report["version"])
        again = generate(
            *brief, known["prompt"], seed=known["seed"], temperature=known["temperature"], top_p=known["top_p"],
            max_tokens=120, schema=KINDS[kind].schema(SynthesisOptions(kind=kind, max_characters=60)), lookup=0,
        )  # fmt: skip
        parts = KINDS[kind].read(again)
        assert all(len(text) <= 60 for text in parts.values())
        stripped = {key: text.strip() for key, text in parts.items()}
        assert KINDS[kind].record(stripped, Subject("", "", False)) == row


def test_seed_texts_are_in_the_prompt_and_before_the_question(tiny, tmp_path, said):
    said.parts = lambda n: {"question": "Who sat?", "answer": "a frog"}
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"body": "A frog {text} sat."}\n')
    options = {"seeds": seeds, "field": "body", "kind": "questions", "verify": "none", "records": 1}
    synthesize_data(*tiny, tmp_path / "out", **options, **SMALL)
    (row,) = rows_of(tmp_path / "out" / "data.jsonl")
    assert row["provenance"]["prompt"].startswith("Read this text:\n\nA frog {text} sat.\n\nWrite one question")
    assert [turn["content"] for turn in row["messages"]] == ["A frog {text} sat.\n\nWho sat?", "a frog"]


def test_a_template_of_ones_own_is_asked_with(tiny, topics, tmp_path, said):
    synthesize_data(*tiny, tmp_path / "out", topics=topics, prompt="Say {it}: {topic}", records=3, **SMALL)
    prompts = [row["provenance"]["prompt"] for row in rows_of(tmp_path / "out" / "data.jsonl")]
    assert prompts == ["Say {it}: a dog", "Say {it}: the moon", "Say {it}: rain"]
    assert prompt_of("{text} and {topic}", Subject("", "{text}", True)) == "{text} and {topic}"
    for template, seeds, place in (("Say it", False, "{topic}"), ("Say {topic}", True, "{text}")):
        with pytest.raises(OptionError, match=f"prompt has no {place}"):
            checked_template(template, seeds=seeds)


# Going on
def journal_lines(out):
    return (out / JOURNAL_FILE).read_bytes().splitlines(keepends=True)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(brief, made, tmp_path):
    topics, whole, _ = made("instructions")
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import test_data_synthesis as t\n"
        "usual = t.attempts.Maker.group\n"
        "def group(self, first):\n"
        "    if first == 2: print('in the middle', flush=True); time.sleep(100)\n"
        "    return usual(self, first)\n"
        "t.attempts.Maker.group = group\n"
        "options = {'kind': 'instructions', **t.VERIFIED['instructions'], **t.TRUE}\n"
        "t.synthesize_data(*t.load_brief(), sys.argv[3], topics=sys.argv[2], **options)"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(ROOT / "tests"), str(topics), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
    assert [path.name for path in out.iterdir() if path.suffix == ".jsonl"] == [JOURNAL_FILE]
    assert journal_lines(out) == journal_lines(whole)[:2]
    synthesize_data(*brief, out, topics=topics, kind="instructions", **VERIFIED["instructions"], **TRUE)
    for name in ("data.jsonl", "removed.jsonl", "report.json", JOURNAL_FILE):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("torn", [b"", b'{"attempts": [{"num'])
def test_a_run_goes_on_wherever_it_ended(tiny, topics, tmp_path, said, torn):
    said.parts = lambda n: {"instruction": f"Tell me of number {n % 5}.", "response": f"It is the {n % 5}. one."}

    def make(out):
        return synthesize_data(*tiny, out, topics=topics, attempts=9, **SMALL)

    whole = make(tmp_path / "whole")
    assert (whole["kept"], whole["removed"]) == (5, 4)  # what an earlier run kept is known to the next
    lines = journal_lines(tmp_path / "whole")
    assert len(lines) == 1 + 5  # groups of two
    for kept in range(len(lines) + 1):
        out = tmp_path / f"{kept}"
        out.mkdir()
        (out / JOURNAL_FILE).write_bytes(b"".join(lines[:kept]) + torn)
        said.asked.clear()
        assert make(out) == whole
        assert (out / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()
        assert len(said.asked) == 10 - 2 * max(0, min(kept, len(lines)) - 1)


def test_a_larger_budget_goes_on_as_if_it_had_been_given_at_once(tiny, topics, tmp_path, said):
    whole = synthesize_data(*tiny, tmp_path / "whole", topics=topics, records=8, **SMALL)
    for records in (1, 3, 8):
        report = synthesize_data(*tiny, tmp_path / "out", topics=topics, records=records, **SMALL)
        assert report["kept"] == records
    assert report == whole
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()
    assert sorted(said.asked) == sorted([*range(8), *range(8)])  # nothing twice
    smaller = synthesize_data(*tiny, tmp_path / "out", topics=topics, records=2, **SMALL)
    assert smaller["kept"] == len(rows_of(tmp_path / "out" / "data.jsonl")) == 2


def test_another_synthesis_is_refused_by_name_and_force_begins_anew(tiny, topics, tmp_path, said):
    out = tmp_path / "out"
    synthesize_data(*tiny, out, topics=topics, records=2, **SMALL)
    with pytest.raises(DataError, match=r"begun with another temperature \(it was 1.0\); .*force=True"):
        synthesize_data(*tiny, out, topics=topics, records=2, temperature=0.5, **SMALL)
    topics.write_text("the sun\n")
    with pytest.raises(DataError, match=r"another topics or seeds and ngram \(it was 3\); give"):
        synthesize_data(*tiny, out, topics=topics, records=2, ngram=2, **SMALL)
    report = synthesize_data(*tiny, out, topics=topics, records=2, force=True, **SMALL)
    assert {row["provenance"]["prompt"].split("\n")[0] for row in rows_of(out / "data.jsonl")} == {
        "The topic is: the sun"
    }
    assert report["attempts"] == 2


def test_a_journal_without_attempts_binds_nothing(tiny, topics, tmp_path, said):
    out = tmp_path / "out"
    synthesize_data(*tiny, out, topics=topics, records=2, **SMALL)
    (out / JOURNAL_FILE).write_bytes(journal_lines(out)[0])
    assert synthesize_data(*tiny, out, topics=topics, records=2, temperature=0.5, **SMALL)["kept"] == 2


_THIRD = {
    "number": 2,
    "seed": 1,
    "parts": {"instruction": "a", "response": "b"},
    "reason": "",
    "facts": {},
    "tokens": 3,
}


@pytest.mark.parametrize(
    "line",
    [b"{}", b'{"attempts": [{}]}', b'{"attempts": 3}', b"[1]", b"x"]
    + [
        json.dumps({"attempts": [_THIRD | wrong]}).encode()
        for wrong in (
            {"number": 3},
            {"number": "2"},
            {"seed": None},
            {"parts": {"instruction": "a", "response": 1}},
            {"parts": {}},
            {"parts": {"instruction": "a"}, "reason": "words"},
            {"tokens": 1.5},
            {"facts": 0},
            {"reason": None},
            {"parts": []},
            {"more": 1},
        )
    ],
)
def test_a_damaged_journal_is_named(tiny, topics, tmp_path, said, line):
    out = tmp_path / "out"
    synthesize_data(*tiny, out, topics=topics, records=2, **SMALL)
    with (out / JOURNAL_FILE).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=r"\.journal\.jsonl is damaged"):
        synthesize_data(*tiny, out, topics=topics, records=9, **SMALL)


@pytest.mark.parametrize("change", [{"phi3_mlx": "scores"}, {"format": 2}, {"another": 1}])
def test_a_journal_of_another_kind_is_not_gone_on_with(tiny, topics, tmp_path, said, change):
    out = tmp_path / "out"
    synthesize_data(*tiny, out, topics=topics, records=2, **SMALL)
    head, *lines = journal_lines(out)
    (out / JOURNAL_FILE).write_bytes(b"".join([json.dumps(json.loads(head) | change).encode() + b"\n", *lines]))
    why = "begun with another another" if "another" in change else "its first line is of another kind"
    with pytest.raises(DataError, match=why):
        synthesize_data(*tiny, out, topics=topics, records=2, **SMALL)


# When it is enough
def test_each_budget_ends_it(tiny, topics, tmp_path, said):
    def ended(name, **budget):
        report = synthesize_data(*tiny, tmp_path / name, topics=topics, **budget, **SMALL)
        return report["ended_by"], report["kept"], report["attempts"], report["tokens"]

    assert ended("a", records=3) == ("records", 3, 3, 30)
    assert ended("b", tokens=45) == ("tokens", 5, 5, 50)
    assert ended("c", attempts=5, tokens=10**6) == ("attempts", 5, 5, 50)
    assert ended("d", time=1e-9) == ("time", 2, 2, 20)
    assert ended("d", time=1e-9) == ("time", 2, 2, 20)
    assert ended("e", tokens=10**6, records=4) == ("records", 4, 4, 40)
    said.parts = lambda n: {"instruction": "Always", "response": "the same."}
    assert ended("f", records=2)[:3] == ("attempts", 1, 20)
    assert SynthesisOptions().wanted == 100
    assert SynthesisOptions(time="90m").time == 5400
    assert SynthesisOptions(time="2h").wanted is None


# What is refused
def test_near_duplicates_of_what_was_made_and_of_other_files_are_refused(tiny, topics, tmp_path, said):
    told = [
        ("Name the dogs that live on the moon.", "They are Rex and Bo and Lu."),
        ("Name the dogs that live on the moon!", "they are Rex and Bo and Lu"),
        ("Say why ducks swim in the rain.", "The rain is water, and so they swim."),
        ("Count from one to five for me.", "One, two, three, four, five."),
    ]
    said.parts = lambda n: dict(zip(("instruction", "response"), told[n % 4], strict=True))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": told[2][0], "completion": told[2][1]}) + "\n")
    report = synthesize_data(*tiny, tmp_path / "out", topics=topics, unlike=other, attempts=5, **SMALL)
    assert report["kept"] == 2
    removed = {line["source"]: line for line in rows_of(tmp_path / "out" / "removed.jsonl")}
    assert {source: (line["reason"], line["duplicate_of"]) for source, line in removed.items()} == {
        "attempt 1": ("near duplicate", "attempt 0"),
        "attempt 2": ("near duplicate", f"{other}:1"),
        "attempt 4": ("near duplicate", "attempt 0"),
    }
    assert report["reasons"]["near duplicate"]["records"] == 3
    assert report["reasons"]["near duplicate"]["samples"][0]["made"]["response"] == told[1][1]
    assert report["inputs"][1]["file"] == str(other)
    other.write_text('{"text": "something else"}\n')
    with pytest.raises(DataError, match="another unlike"):
        synthesize_data(*tiny, tmp_path / "out", topics=topics, unlike=other, attempts=5, **SMALL)


@pytest.mark.parametrize(
    ("kind", "parts", "reason"),
    [
        ("instructions", {"instruction": "", "response": "x"}, "empty instruction"),
        ("passages", {"title": "T", "passage": "too short"}, "words"),
        ("passages", {"title": "T", "passage": "the frog sat down and " * 20}, "top-2-gram"),
        ("preferences", {"instruction": "a", "chosen": "It is so.", "rejected": "it IS so"}, "equal answers"),
    ],
)
def test_rules_refuse_what_no_model_need_look_at(kind, parts, reason):
    assert broken_rule(KINDS[kind], SynthesisOptions(kind=kind), parts).reason == reason


def test_rules_keep_what_breaks_none():
    passage = {"title": "T", "passage": " ".join(f"word{n}" for n in range(30))}
    assert broken_rule(KINDS["passages"], SynthesisOptions(kind="passages"), passage) is None
    fault = broken_rule(KINDS["passages"], SynthesisOptions(kind="passages", max_words=29), passage)
    assert fault.facts == {"value": 30, "bound": "at least 30 and at most 29"}
    for bounds in ({"max_words": 30}, {"min_words": 30}):
        assert broken_rule(KINDS["passages"], SynthesisOptions(kind="passages", **bounds), passage) is None
    assert broken_rule(KINDS["passages"], SynthesisOptions(kind="passages", min_words=31), passage).reason == "words"


def test_a_text_is_kept_up_to_its_bound_and_one_beyond_it_is_refused_with_the_blanks_around_it(
    tiny, topics, tmp_path, said
):
    told = ["a dog", " a dogs\n", "a dogs  ", "a dogs and a cat"]
    said.parts = lambda n: {"instruction": f"{n}.", "response": told[n]}
    options = {"topics": topics, "attempts": 4, "max_characters": 8, "threshold": 1}
    report = synthesize_data(*tiny, tmp_path / "out", **options, **SMALL)
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    assert [row["messages"][1]["content"] for row in rows] == ["a dog", "a dogs", "a dogs"]
    (removed,) = rows_of(tmp_path / "out" / "removed.jsonl")
    assert (removed["reason"], removed["part"], removed["bound"]) == (
        "longer than max_characters", "response", "at most 8",
    )  # fmt: skip
    assert report["reasons"]["longer than max_characters"]["records"] == 1
    said.parts = lambda n: {"instruction": f"{n}.", "response": "a dogs   " if n else "a dogs"}
    assert synthesize_data(*tiny, tmp_path / "blanks", **{**options, "attempts": 2}, **SMALL)["kept"] == 1


def test_a_models_text_that_its_bound_would_cut_is_refused_and_reaches_beyond_it(tiny, topics, tmp_path):
    report = synthesize_data(*tiny, tmp_path / "out", topics=topics, attempts=2, max_characters=8, **SMALL)
    assert report["reasons"]["longer than max_characters"]["records"] == report["attempts"] == 2
    lengths = [len(text) for line in rows_of(tmp_path / "out" / "removed.jsonl") for text in line["made"].values()]
    assert 8 < max(lengths) <= 8 + 32


def test_cut_answers_long_prompts_and_halves_of_characters_are_refused_and_counted(tiny, tmp_path, said):
    said.parts = lambda n: {"instruction": "\ud800", "response": "x"}
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", "long " * 5000)))
    report = synthesize_data(*tiny, tmp_path / "out", seeds=seeds, attempts=2, **SMALL)
    assert {reason: part["records"] for reason, part in report["reasons"].items()} == {
        "half a character": 1,
        "prompt too long": 1,
    }
    said.reason = "length"
    report = synthesize_data(*tiny, tmp_path / "cut", seeds=seeds, attempts=1, **SMALL)
    assert [*report["reasons"]] == ["cut by max_tokens"]
    assert (tmp_path / "cut" / "data.jsonl").read_bytes() == b""


# The second look
def test_a_question_is_answered_again_without_its_answer_and_must_agree(tiny, topics, tmp_path, said, monkeypatch):
    said.parts = lambda n: {"question": f"What is {n}?", "answer": ["a red fox", "the sea", "nobody"][n]}
    second = {"What is 0?": "A red fox!", "What is 1?": "a lake \ud800", "What is 2?": ""}
    prompts = []

    def again(model, tokenizer, asked, **_):
        for place, (ids, request) in enumerate(asked):
            prompt = tokenizer.decode(ids)
            prompts.append(prompt)
            assert request.temperature == 0
            answer = next(answer for question, answer in second.items() if question in prompt)
            yield place, FinishedAnswer(json.dumps({"answer": answer}), "stop", tokens=7)

    monkeypatch.setattr(verifying, "answer_each", again)
    options = {"topics": topics, "kind": "questions", "threshold": 1, "attempts": 3}
    report = synthesize_data(*tiny, tmp_path / "out", **options, **{**SMALL, "parallel": 3})
    (row,) = rows_of(tmp_path / "out" / "data.jsonl")
    assert (row["provenance"]["second_answer"], row["provenance"]["agreement"]) == ("A red fox!", 1)
    assert report["reasons"]["another answer"]["records"] == 2
    assert report["verify"] == "recompute"
    assert report["tokens"] == 3 * 10 + 3 * 7
    assert not any("fox" in prompt or "sea" in prompt for prompt in prompts)


def test_a_duplicate_is_not_verified(tiny, topics, tmp_path, said, monkeypatch):
    said.parts = lambda n: {"question": "Who is it that sat on the mat?", "answer": "The old grey cat sat there."}
    verified = []

    def again(model, tokenizer, asked, **_):
        verified.append(len(asked))
        for place in range(len(asked)):
            yield place, FinishedAnswer('{"answer": "The old grey cat."}', "stop", tokens=7)

    monkeypatch.setattr(verifying, "answer_each", again)
    report = synthesize_data(*tiny, tmp_path / "out", topics=topics, kind="questions", attempts=6, **SMALL)
    assert (report["kept"], report["reasons"]["near duplicate"]["records"]) == (1, 5)
    assert verified == [2]  # of the first group alone


@pytest.mark.parametrize("check", ["score", "recompute"])
def test_what_is_too_long_to_verify_is_refused_and_the_others_keep_their_verdicts(tiny, monkeypatch, check):
    tokenizer = tiny[1]
    questions, answers = ["Who sat?", f"Who sat{' on the mat' * 20}?", "Who ran?"], ["a dog", "a cat", "a fox"]
    made = [
        ({"question": question, "answer": answer}, Subject("", "", False))
        for question, answer in zip(questions, answers, strict=True)
    ]

    def scores(model, tokenizer, pairs):
        # A mean of -2, and an F1 of 0.5, are just enough.
        return [[Score([1, 2], [-2.0 if "sat" in asked else -2.1] * 2, False)] for asked, _ in pairs]

    def again(model, tokenizer, asked):
        for place, (ids, _) in [*enumerate(asked)][::-1]:
            answer = "a pig" if "sat" in tokenizer.decode(ids) else "nobody"
            yield place, FinishedAnswer(json.dumps({"answer": answer}), "stop", tokens=place)

    monkeypatch.setattr(verifying, "batch_score", scores)
    monkeypatch.setattr(verifying, "answer_each", again)
    options = SynthesisOptions(kind="questions", verify=check, max_tokens=20)
    if check == "score":
        longest = len(encode_prompt(tokenizer, questions[1])) + len(tokenizer.encode("a cat")) + 1
    else:
        longest = len(encode_prompt(tokenizer, verifying._AGAIN.format(asked=questions[1]))) + 20
    refused = "unlikely answer" if check == "score" else "another answer"
    for room, reason in ((longest, ""), (longest - 1, "too long to verify")):
        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=room))
        verdicts = verifying.Verifier(model, tokenizer, KINDS["questions"], options).verdicts(made)
        assert [verdict.reason for verdict in verdicts] == ["", reason, refused]


def test_words_in_common_are_squads_f1():
    assert words_in_common("The red fox", "a red FOX!") == pytest.approx(2 * 2 / 6)
    assert words_in_common("one one", "one") == pytest.approx(2 / 3)
    assert words_in_common("a", "") == words_in_common("", "") == 0


def test_answers_are_scored_by_the_mean_log_probability_behind_the_prompt(tiny, topics, tmp_path, said, monkeypatch):
    asked = []

    def scores(model, tokenizer, pairs, **_):
        asked.extend(pairs)
        return [[Score([1, 2], [len(answer) / -20] * 2, False) for answer in answers] for _, answers in pairs]

    monkeypatch.setattr(verifying, "batch_score", scores)
    said.parts = lambda n: {"instruction": f"Do {n}.", "response": "x" * (10 + 20 * n)}
    report = synthesize_data(*tiny, tmp_path / "a", topics=topics, verify="score", min_logprob=-1, attempts=2, **SMALL)
    assert asked == [("Do 0.", ["x" * 10]), ("Do 1.", ["x" * 30])]
    assert report["kept"] == report["reasons"]["unlikely answer"]["records"] == 1
    assert rows_of(tmp_path / "a" / "data.jsonl")[0]["provenance"]["response_logprob"] == -0.5
    answers = [("short", "much longer"), ("much longer", "short"), ("same", "four")]
    said.parts = lambda n: {"instruction": f"Do {n}.", "chosen": answers[n][0], "rejected": answers[n][1]}
    options = {"kind": "preferences", "attempts": 3, "threshold": 1}
    report = synthesize_data(*tiny, tmp_path / "b", topics=topics, **options, **{**SMALL, "parallel": 3})
    assert [row["chosen"] for row in rows_of(tmp_path / "b" / "data.jsonl")] == ["short"]
    assert report["reasons"]["the rejected answer is likelier"]["records"] == 2


def test_a_models_score_is_the_mean_log_probability_of_its_answer(brief, made):
    _, out, report = made("instructions")
    assert report["verify"] == "score"
    row = rows_of(out / "data.jsonl")[0]
    asked, answer = (turn["content"] for turn in row["messages"])
    (alone,) = score(*brief, asked, [answer])
    assert row["provenance"]["response_logprob"] == pytest.approx(alone.total / len(alone.tokens), abs=2e-3)


def test_a_models_second_answer_is_its_likeliest_to_the_question_alone(brief, topics, tmp_path):
    options = {"topics": topics, "kind": "questions", "agreement": 0.01}
    report = synthesize_data(*brief, tmp_path / "out", **options, **{**TRUE, "attempts": 2})
    assert report["verify"] == "recompute"
    lines = [line for line in rows_of(tmp_path / "out" / "removed.jsonl") if "second_answer" in line]
    told = [(line["made"]["question"], line["second_answer"]) for line in lines]
    rows = rows_of(tmp_path / "out" / "data.jsonl")
    told += [(row["messages"][0]["content"], row["provenance"]["second_answer"]) for row in rows]
    assert told
    form = KINDS["questions"].schema(SynthesisOptions(kind="questions", max_characters=60))
    form = {**form, "required": ["answer"], "properties": {"answer": form["properties"]["answer"]}}
    for question, second in told:
        prompt = f'{question}\n\nAnswer in a few words, with JSON that has the key "answer".'
        assert second == json.loads(generate(*brief, prompt, max_tokens=120, schema=form))["answer"].strip()


# What is given
def test_odd_inputs_are_named_before_anything_is_made(tiny, tmp_path, said):
    def fault(**given):
        with pytest.raises((DataError, OptionError)) as caught:
            synthesize_data(*tiny, tmp_path / "out", **{**SMALL, **given})
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    good = tmp_path / "good.txt"
    good.write_text("a dog\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n' * 6 + '{"text": \n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 1000)[:-10])
    assert "one of the two" in fault()
    assert "one of the two" in fault(topics=good, seeds=good)
    assert "no records" in fault(topics=tmp_path / "empty.txt")
    assert "holds empty texts alone" in fault(seeds=tmp_path / "blank.jsonl")
    assert "broken.jsonl:7: is not JSON" in fault(seeds=tmp_path / "broken.jsonl")
    assert "has no key 'body'; its keys are 'text'" in fault(seeds=tmp_path / "broken.jsonl", field="body")
    assert "is damaged" in fault(seeds=tmp_path / "cut.jsonl.gz")
    assert "does not exist" in fault(seeds=tmp_path / "none")
    assert "verify 'recompute' is not for passages; give none" in fault(
        topics=good, kind="passages", verify="recompute"
    )
    assert "min_words 5 is more than max_words 2" in fault(topics=good, min_words=5, max_words=2)
    assert "time is 'soon'; expected seconds" in fault(topics=good, time="soon")
    assert "name is 3" in fault(topics=good, name=3)
    assert "prompt is 3" in fault(topics=good, prompt=3)


def test_a_folder_of_something_else_is_left_alone(tiny, topics, tmp_path, said):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for place, why in (
        ("mine", "holds no synthesis"),
        ("topics.txt", "which is read"),
        ("mine/thesis.txt", "not a dir"),
    ):
        with pytest.raises(DataError, match=why):
            synthesize_data(*tiny, tmp_path / place, topics=topics, force=True, **SMALL)
    with pytest.raises(DataError, match="which is read"):
        synthesize_data(*tiny, tmp_path, topics=topics, **SMALL)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_seeds_may_come_through_a_pipe(monkeypatch, tmp_path, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "One"}\n{"text": "Two"}\n')))
    assert run("--seeds", "-", "-o", tmp_path / "out", "--records", 2, "--parallel", 2) == 0
    prompts = [row["provenance"]["prompt"] for row in rows_of(tmp_path / "out" / "data.jsonl")]
    assert [prompt.split("\n")[2] for prompt in prompts] == ["One", "Two"]


def test_two_runs_do_not_write_into_one_folder(tiny, topics, tmp_path, said):
    from phi3_mlx.store.line_file import alone_in

    with alone_in(tmp_path / "out"), pytest.raises(DataError, match="another process writes into"):
        synthesize_data(*tiny, tmp_path / "out", topics=topics, **SMALL)


def test_ctrl_c_writes_the_records_that_there_are_and_the_next_run_goes_on(tiny, topics, tmp_path, said):
    def interrupted(n):
        if n == 4:
            raise KeyboardInterrupt
        return {"instruction": f"Do the {n}. thing.", "response": f"{n}."}

    said.parts = interrupted
    with pytest.raises(KeyboardInterrupt):
        synthesize_data(*tiny, tmp_path / "out", topics=topics, records=6, **SMALL)
    assert len(rows_of(tmp_path / "out" / "data.jsonl")) == 4
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ended_by"] == "an interruption"
    said.parts = lambda n: {"instruction": f"Do the {n}. thing.", "response": f"{n}."}
    synthesize_data(*tiny, tmp_path / "out", topics=topics, records=6, **SMALL)
    assert [row["messages"][1]["content"] for row in rows_of(tmp_path / "out" / "data.jsonl")] == [
        f"{n}." for n in range(6)
    ]
    assert said.asked == [0, 1, 2, 3, 4, 4, 5]


def test_the_function_takes_the_options_with_their_defaults():
    parameters = inspect.signature(synthesize_data).parameters
    for field in (*fields(SynthesisOptions), *fields(ReadOptions)):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].annotation == field.type


def test_a_dry_run_shows_the_first_prompts_and_makes_nothing(topics, tmp_path, capsys):
    assert run("--topics", topics, "--kind", "passages", "--dry-run", "-o", tmp_path / "out") == 0
    told = capsys.readouterr()
    assert told.out.count("Write a passage of a textbook") == 3
    assert "The topic is: the moon" in told.out
    assert f"{topics}:4" in told.err
    schema = json.loads(told.out.splitlines()[-1])
    assert schema["properties"]["passage"]["maxLength"] == 3000 + 32
    assert not (tmp_path / "out").exists()


def test_the_command_makes_records_and_says_what_it_refused(topics, tmp_path, capsys, said):
    said.parts = lambda n: {"instruction": f"Tell me of {n}.", "response": "It is one." if n % 2 else "x" * 21}
    (tmp_path / "mine.txt").write_text("About {topic}, shortly")
    small = ["--max-characters", 20, "--parallel", 2, "--prompt", tmp_path / "mine.txt"]
    assert run("--topics", topics, "-o", tmp_path / "out", "--records", 2, *small) == 0
    told = capsys.readouterr().err
    assert "refused 2: longer than max_characters" in told
    assert f"{tmp_path}/out/data.jsonl: 2 records" in told
    assert rows_of(tmp_path / "out" / "data.jsonl")[0]["provenance"]["prompt"] == "About the moon, shortly"
    assert run("--topics", topics) == 2
    assert "'--output'" in capsys.readouterr().err
    assert run("-o", tmp_path / "x") == 2
    assert "give --topics FILE or --seeds FILE, one of the two" in capsys.readouterr().err
