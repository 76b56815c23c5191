"""MT-bench: answers of both turns, a judge that misbehaves, FastChat's files, resumption, scores."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from judges import PLACES, fault, judging, reply, slow, write_bench, write_prompts

from phi3_mlx import encode_prompt, generate, load, mt_bench
from phi3_mlx.errors import DataError, JudgeError, OptionError
from phi3_mlx.evaluation.mtbench import scores
from phi3_mlx.evaluation.mtbench.questions import TEMPERATURES, BenchQuestion, find_files, read_questions
from phi3_mlx.evaluation.mtbench.ratings import rating_of, verdict_of
from phi3_mlx.evaluation.mtbench.rubric import ask_pair, ask_single, read_rubric
from phi3_mlx.evaluation.options import MtBenchOptions
from phi3_mlx.store.line_file import LineFile, alone_in

pytest.importorskip("openai")
SHORT = 6  # tokens of a turn


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def bench(tmp_path):
    return write_bench(tmp_path / "mt_bench")


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """A folder with the answers to one question of each category."""
    folder = tmp_path_factory.mktemp("answers")
    bench = write_bench(folder / "mt_bench")
    mt_bench(*tiny, folder / "out", name="tiny", data=bench, turn_tokens=SHORT, limit=1)
    return folder / "out"


@pytest.fixture
def out(answers, tmp_path):
    return shutil.copytree(answers, tmp_path / "out")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(tiny, output, data, server, **more):
    more = {"name": "tiny", "turn_tokens": SHORT, "limit": 1, "judge_retries": 2, **more}
    return mt_bench(*tiny, output, data=data, judge=server.url, judge_model="judge", **more)


# Answers.


def test_both_turns_are_what_generate_says_at_the_categorys_temperature(tiny, bench, tmp_path):
    results = mt_bench(*tiny, tmp_path / "out", name="tiny", data=bench, turn_tokens=SHORT)
    lines = lines_of(tmp_path / "out" / "model_answer" / "tiny.jsonl")
    assert [line["question_id"] for line in lines] == [81, 82, 83, 84, 85, 86]
    assert results["answers"]["turns"] == 12
    for line, question in zip(lines, lines_of(bench / "question.jsonl"), strict=True):
        assert [*line] == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        first, second = line["choices"][0]["turns"]
        said = {"temperature": TEMPERATURES[question["category"]], "seed": 0, "max_tokens": SHORT}
        asked = [{"role": "user", "content": question["turns"][0]}]
        assert first == generate(*tiny, asked, **said).strip()
        asked += [{"role": "assistant", "content": first}, {"role": "user", "content": question["turns"][1]}]
        assert second == generate(*tiny, asked, **said).strip()


def test_the_seed_is_the_number_of_the_choice(tiny, bench, tmp_path):
    mt_bench(*tiny, tmp_path / "out", name="tiny", data=bench, turn_tokens=SHORT, num_choices=2, limit=1)
    (line, *_) = lines_of(tmp_path / "out" / "model_answer" / "tiny.jsonl")
    assert [choice["index"] for choice in line["choices"]] == [0, 1]
    prompt = [{"role": "user", "content": "Tell me about duck 0."}]
    for choice in line["choices"]:
        said = generate(*tiny, prompt, temperature=0.7, seed=choice["index"], max_tokens=SHORT)
        assert choice["turns"][0] == said.strip()
    assert line["choices"][0]["turns"] != line["choices"][1]["turns"]


def test_answers_that_their_budget_ended_are_counted(tiny, bench, tmp_path):
    assert mt_bench(*tiny, tmp_path / "out", name="t", data=bench, turn_tokens=2, limit=1)["answers"]["cut"] == 6


def test_a_second_run_answers_nothing_again_and_more_questions_only_what_is_new(tiny, bench, tmp_path, monkeypatch):
    counts = []
    for limit in (1, 1, 2):
        seen = []
        mt_bench(
            *tiny,
            tmp_path / "out",
            name="tiny",
            data=bench,
            turn_tokens=SHORT,
            limit=limit,
            progress=lambda stage, done, total, seen=seen: seen.append((stage, done, total)),
        )
        counts.append(len(seen))
        assert not seen or seen[-1] == ("answering", 6 * limit, 6 * limit)
    assert counts == [6, 0, 6]


def test_another_model_or_budget_is_refused_under_the_same_name(tiny, bench, tmp_path):
    out = tmp_path / "out"
    mt_bench(*tiny, out, name="tiny", data=bench, turn_tokens=SHORT, limit=1)
    with pytest.raises(
        DataError, match=rf"journal was begun with another turn_tokens \(it was {SHORT}\); give the same again"
    ):
        mt_bench(*tiny, out, name="tiny", data=bench, turn_tokens=SHORT + 1, limit=1)
    other = load("tiny", longrope="long")
    with pytest.raises(
        DataError, match="journal was begun with another model; give the same again, or name another directory"
    ):
        mt_bench(*other, out, name="tiny", data=bench, turn_tokens=SHORT, limit=1)


def test_a_changed_question_is_asked_anew(tiny, bench, tmp_path):
    out = tmp_path / "out"
    mt_bench(*tiny, out, name="tiny", data=bench, turn_tokens=SHORT, limit=1)
    before = lines_of(out / "model_answer" / "tiny.jsonl")
    text = (bench / "question.jsonl").read_text().replace("duck 2", "big bear")
    (bench / "question.jsonl").write_text(text)
    mt_bench(*tiny, out, name="tiny", data=bench, turn_tokens=SHORT, limit=1)
    after = lines_of(out / "model_answer" / "tiny.jsonl")
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_an_empty_answer_does_not_end_the_bench(tiny, bench, tmp_path, monkeypatch):
    from phi3_mlx.evaluation.mtbench import answers
    from phi3_mlx.generation.answering import FinishedAnswer

    def silent(model, tokenizer, asked, **_):
        return ((place, FinishedAnswer(" ", "stop")) for place in range(len(asked)))

    monkeypatch.setattr(answers, "answer_each", silent)
    mt_bench(*tiny, tmp_path / "out", name="tiny", data=bench, limit=1)
    (line, *_) = lines_of(tmp_path / "out" / "model_answer" / "tiny.jsonl")
    assert line["choices"] == [{"index": 0, "turns": ["", ""]}]


# What the judge is asked, and what becomes of what it says.


def test_the_judge_gets_fastchats_prompts_filled_and_its_ratings_are_fastchats_records(tiny, bench, tmp_path, out):
    write_prompts(tmp_path)  # beside the folder mt_bench, as FastChat has it
    with judging(lambda number, body: f"Fine. [[{number + 1}.5]]") as server:
        results = judged(tiny, out, bench, server, judge_parallel=1, judge_key="TEST_JUDGE_KEY")
    assert results["judge"]["prompts"] == str(tmp_path / "judge_prompts.jsonl")
    assert {*server.keys} == {"Bearer sesame"}
    answers = {line["question_id"]: line["choices"][0]["turns"] for line in lines_of(out / "model_answer/tiny.jsonl")}
    body = server.bodies[0]
    assert body["temperature"] == 0
    assert body["max_tokens"] == 2048
    assert body["model"] == "judge"
    assert body["messages"] == [
        {"role": "system", "content": "You are single-v1."},
        {"role": "user", "content": f"Q Tell me about duck 0. A {answers[81][0]} {{x}}"},
    ]
    records = lines_of(out / "model_judgment" / "judge_single.jsonl")
    assert len(records) == len(server.bodies) == 6
    assert [*records[0]] == "question_id model judge user_prompt judgment score turn tstamp".split()
    by_place = {(record["question_id"], record["turn"]): record for record in records}
    assert by_place[83, 1]["judge"] == ["judge", "single-math-v1"]
    assert by_place[83, 1]["user_prompt"] == f"Q Tell me about duck 2. R It is 1. A {answers[83][0]}"
    second = f"Tell me about duck 2. It is 1. And frog 2? It is 2. {answers[83][0]} {answers[83][1]}"
    assert by_place[83, 2]["user_prompt"] == second
    assert by_place[85, 2]["judge"] == ["judge", "single-v1-multi-turn"]
    assert by_place[81, 1]["score"] == 1.5
    assert results["score"]["all"]["value"] == pytest.approx(4.0)
    assert results["score"]["categories"]["math"]["value"] == pytest.approx(4.0)
    assert results["score"]["turns"]["2"]["value"] == pytest.approx(4.5)
    assert results["score"]["all"]["low"] <= 4.0 <= results["score"]["all"]["high"]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", "sesame")


def test_without_fastchats_prompts_our_own_are_asked_and_the_result_says_so(tiny, bench, tmp_path, out):
    with judging(lambda number, body: "Rating: [[5]]") as server:
        results = judged(tiny, out, bench, server)
    assert results["judge"]["prompts"] == "phi3-mlx"
    names = {record["judge"][1] for record in lines_of(out / "model_judgment" / "judge_single.jsonl")}
    assert names == {f"phi3-mlx-single{kind}-v1{turn}" for kind in ("", "-math") for turn in ("", "-multi-turn")}
    assert not any("{" in body["messages"][1]["content"] for body in server.bodies)
    assert {*server.keys} == {"Bearer none"}


def test_judgments_without_a_rating_are_dropped_and_counted(tiny, bench, tmp_path, out):
    said = ["no number", "[[85]]", "I say [7]", "[[3]] or [[9]]", "[[ 4 ]]", "[[2.25]]"]
    with judging(lambda number, body: said[number]) as server:
        results = judged(tiny, out, bench, server, judge_parallel=1)
    assert results["score"]["dropped"] == 3
    assert results["score"]["all"]["judgments"] == 3
    assert results["score"]["all"]["value"] == pytest.approx((7 + 3 + 2.25) / 3)


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("[[7.5]] then [[2]]", 7.5),
        ("[3] then [[9]]", 9),
        ("[3] of [10]", 3),
        ("[[8.]]", 8),
        ("[[10]]", 10),
        ("5", -1),
        ("[[five]]", -1),
        ("[[-5]]", -1),
        ("", -1),
    ],
)
def test_a_rating_is_the_first_in_double_brackets_else_the_first_in_single_ones(said, rating):
    assert rating_of(said) == rating


def test_a_verdict_is_a_before_b_before_a_tie():
    assert [verdict_of(text) for text in ("[[A]]", "so [[B]].", "[[C]]", "[[C]] [[B]] [[A]]", "A", "[A]")] == [
        "A",
        "B",
        "tie",
        "A",
        "error",
        "error",
    ]


# A judge that misbehaves.


def test_a_busy_and_a_failing_judge_are_asked_again(tiny, bench, tmp_path, out):
    def script(number, body):
        return {0: fault(429), 1: fault(500), 2: fault(503)}.get(number, "[[6]]")

    with judging(script) as server:
        results = judged(tiny, out, bench, server, judge_parallel=1, judge_retries=3)
    assert results["score"]["all"]["value"] == 6
    assert len(server.bodies) == 6 + 3
    assert results["failed"] == []


@pytest.mark.parametrize(
    "odd",
    [
        (200, b'{"id": "1", "choi', {"Content-Length": "500"}),  # cut
        (200, b"<html>busy</html>", {}),
        (200, {"id": "1", "choices": []}, {}),
        (200, reply(None), {}),
        (200, reply("  "), {}),
        (200, [], {}),
        (400, {"error": {"message": "too long"}}, {}),
        fault(502),
    ],
)
def test_a_judgment_that_is_not_given_is_counted_and_asked_for_by_the_next_run(tiny, bench, tmp_path, odd, out):
    whole = {}

    def script(number, body):
        return odd if "duck 2" in body["messages"][-1]["content"] and not whole else "[[6]]"

    with judging(script) as server:
        results = judged(tiny, out, bench, server, judge_parallel=1)
        assert len(results["failed"]) == 2
        assert results["score"]["all"]["judgments"] == 4
        whole[0], before = True, len(server.bodies)
        results = judged(tiny, out, bench, server)
        assert results["failed"] == []
        assert results["score"]["all"]["judgments"] == 6
        assert len(server.bodies) - before == 2


def test_a_judge_that_takes_too_long_is_given_up(tiny, bench, tmp_path, out):
    def script(number, body):
        return slow(60) if "duck 0" in body["messages"][-1]["content"] else "[[6]]"

    with judging(script) as server:
        results = judged(tiny, out, bench, server, judge_timeout=2, judge_retries=0)
    assert results["failed"] == ["it took too long"] * 2
    assert results["score"]["all"]["judgments"] == 4


def test_a_judge_that_always_fails_ends_it_and_what_was_answered_is_kept(tiny, bench, tmp_path, out):
    with judging(lambda number, body: (400, {"error": {"message": "never"}}, {})) as server:
        with pytest.raises(JudgeError, match=r"8 times in a row: .*never"):
            judged(tiny, out, bench, server, limit=2)
        assert len(lines_of(out / "model_answer" / "tiny.jsonl")) == 6


def test_a_wrong_key_a_model_that_is_not_there_and_no_server_are_said_in_a_line(tiny, bench, tmp_path, out):
    for status, words in ((401, "judge_key=VARIABLE"), (403, "refuses the key"), (404, "end with /v1")):
        with judging(lambda number, body, status=status: fault(status)) as server, pytest.raises(JudgeError) as error:
            judged(tiny, out, bench, server)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    with judging(lambda number, body: fault(429, "quota")) as server, pytest.raises(JudgeError, match="quota"):
        judged(tiny, out, bench, server)
    with pytest.raises(JudgeError, match="cannot be reached"):
        judged(tiny, out, bench, server)  # it is gone


def test_what_the_judge_said_before_it_went_is_not_asked_for_again(tiny, bench, tmp_path, out):
    with judging(lambda number, body: "[[4]]" if number < 3 else fault(401)) as server:
        with pytest.raises(JudgeError):
            judged(tiny, out, bench, server, judge_parallel=1)
        assert len(lines_of(out / "model_judgment" / "judge_single.jsonl")) == 3
    with judging(lambda number, body: "[[8]]") as server:
        results = judged(tiny, out, bench, server)
        assert len(server.bodies) == 3
    assert results["score"]["all"]["value"] == 6


def test_options_that_say_nothing_or_no_sense_are_refused(tiny, bench, tmp_path, monkeypatch):
    for given, words in (
        ({"judge": "http://x/v1"}, "judge says nothing without judge_model"),
        ({"judge_model": "x"}, "judge_model says nothing without judge"),
        ({"judge_key": "X"}, "judge_key has no effect"),
        ({"judge_parallel": 8}, "judge_parallel has no effect"),
        ({"judge_timeout": 0}, "outside its range"),
        ({"turn_tokens": 0}, "outside its range"),
    ):
        with pytest.raises(OptionError, match=words):
            MtBenchOptions(**given)
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="no URL"):
        mt_bench(*tiny, out, name="t", data=bench, judge="localhost:80", judge_model="x", turn_tokens=2, limit=1)
    with pytest.raises(OptionError, match="export NO_SUCH_KEY"):
        mt_bench(*tiny, out, name="t", data=bench, judge="http://x", judge_model="x", judge_key="NO_SUCH_KEY")
    with pytest.raises(OptionError, match="against has no effect without judge=URL"):
        mt_bench(*tiny, out, name="t", data=bench, against="other")
    assert not out.exists()  # before anything is answered
    with pytest.raises(OptionError, match="names no file"):
        mt_bench(*tiny, out, name=" / ", data=bench)


# Pairs.


def test_a_win_needs_both_orders_and_an_order_without_a_verdict_drops_the_pair(tiny, bench, tmp_path, out):
    old = out / "model_answer" / "old.jsonl"
    lines = [{"question_id": n, "choices": [{"index": 0, "turns": ["OLD", "OLD"]}]} for n in (81, 83, 85)]
    old.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def script(number, body):
        text = body["messages"][-1]["content"]
        if "double brackets: [[A]]" not in body["messages"][0]["content"]:
            return "[[6]]"
        if "duck 0" in text:  # the one that stands first, whoever it is
            return "[[A]]"
        if "duck 2" in text:
            return "[[C]]" if "frog" in text else "no idea"
        return "[[B]]" if text.index("OLD") < text.index("== Assistant B") else "[[A]]"

    with judging(script) as server:
        results = judged(tiny, out, bench, server, name="new", against="old")
    pairs = results["against"]["pairs"]
    assert (pairs["win"], pairs["tie"], pairs["loss"], pairs["dropped"], pairs["turned"]) == (2, 3, 0, 1, 2)
    assert pairs["adjusted_win_rate"]["value"] == pytest.approx((2 + 3 / 2) / 5)
    records = lines_of(out / "model_judgment" / "judge_pair.jsonl")
    assert [*records[0]] == (
        "question_id model_1 model_2 g1_winner g2_winner judge g1_user_prompt g1_judgment g2_user_prompt g2_judgment "
        "turn tstamp"
    ).split()
    by_question = {(record["question_id"], record["turn"]): record for record in records}
    assert (by_question[85, 1]["g1_winner"], by_question[85, 1]["g2_winner"]) == ("model_1", "model_1")
    assert (by_question[81, 1]["g1_winner"], by_question[81, 1]["g2_winner"]) == ("model_1", "model_2")
    assert (by_question[83, 1]["g1_winner"], by_question[83, 2]["g2_winner"]) == ("error", "tie")
    assert by_question[85, 1]["judge"] == ["judge", "phi3-mlx-pair-v2"]
    assert results["against"]["difference"]["value"] == 0
    # Both models' ratings are in one file, and those of a model that is not rated now stay.
    assert {record["model"] for record in lines_of(out / "model_judgment" / "judge_single.jsonl")} == {"old", "new"}


def test_a_file_of_fastchats_answers_is_compared_with_too(tiny, bench, tmp_path, out):
    lines = [{"question_id": 81, "choices": [{"index": 0, "turns": ["Ducks swim.", "Frogs hop."]}]}]
    (tmp_path / "gpt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with judging(lambda number, body: "[[B]] [[5]]") as server:
        results = judged(tiny, out, bench, server, against=tmp_path / "gpt.jsonl")
    assert results["against"]["pairs"]["tie"] == results["against"]["pairs"]["turned"] == 2
    assert results["against"]["score"]["all"]["judgments"] == 2
    with pytest.raises(DataError, match="no answers of nobody"), judging(None) as server:
        judged(tiny, out, bench, server, against="nobody")
    with pytest.raises(DataError, match="itself"), judging(None) as server:
        judged(tiny, out, bench, server, against="tiny")


# Prompts and questions that are broken.


def test_each_prompt_of_ours_shows_what_the_judge_needs():
    rubric = read_rubric(None)
    plain = BenchQuestion(1, "stem", ("Q-one", "Q-two"))
    math = BenchQuestion(2, "math", ("Q-one", "Q-two"), ("R-one", "R-two"))
    for question in (plain, math):
        for turn in (1, 2):
            single = ask_single(rubric, question, ("A-one {question}", "A-two"), turn)[1]
            pair = ask_pair(rubric, question, ("A-one", "A-two"), ("B-one", "B-two"), turn)[1]
            for text in (single, pair):
                assert "Q-one" in text
                assert "A-one" in text
                assert ("R-one" in text) == (question is math)
                assert ("Q-two" in text) == ("A-two" in text) == (turn == 2)
                assert ("R-two" in text) == (turn == 2 and question is math)
            assert "{question}" in single  # of the answer: it is no place
            assert pair.index("A-one") < pair.index("B-one")
    unreferenced = BenchQuestion(3, "math", ("Q", "Q"))
    assert ask_single(rubric, unreferenced, ("a", "b"), 1)[0].name == "phi3-mlx-single-v1"


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({**PLACES, "single-v1": "{answer} {secret}"}, "{secret}"),
        ({**PLACES, "single-v1": "{answer.__class__}"}, "nothing fills"),
        ({**PLACES, "single-v1": "{answer!r}"}, "nothing fills"),
        ({**PLACES, "single-v1": "{answer"}, "stray brace"),
        ({**PLACES, "pair-v2": "{answer}"}, "nothing fills"),
        ({"single-v1": PLACES["single-v1"]}, "lacks the prompt single-v1-multi-turn"),
    ],
)
def test_prompts_that_nothing_can_fill_are_refused(tmp_path, places, words):
    with pytest.raises(DataError) as error:
        read_rubric(write_prompts(tmp_path, places))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no question"),
        ("{", "question.jsonl:1: is not JSON"),
        ("[1]\n", "expected an object"),
        ('{"question_id": 1, "category": "stem", "turns": ["a"]}', "2 texts"),
        ('{"question_id": 1, "category": "stem", "turns": "ab"}', "a list of texts"),
        ('{"question_id": "1", "category": "stem", "turns": ["a", "b"]}', "a whole number"),
        ('{"question_id": 1, "turns": ["a", "b"]}', "category is missing"),
        ('{"question_id": 1, "category": "stem", "turns": ["a", "b"]}\n' * 2, "given twice"),
        ('{"question_id": 1, "category": "stem", "turns": ["a", "b"], "reference": ["c"]}', "no reference for each"),
        (b"\xff\xfe\xff", "save it as UTF-8"),
    ],
)
def test_a_broken_file_of_questions_is_refused_by_its_line(tmp_path, text, words):
    (tmp_path / "question.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        read_questions(find_files(tmp_path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_without_questions_and_no_network_are_said(tmp_path, monkeypatch, caplog):
    with pytest.raises(DataError, match=r"looked for question\.jsonl"):
        find_files(tmp_path)
    import huggingface_hub

    def offline(*_, **__):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match=r"cannot be downloaded \(no route\)"):
        find_files(None)
    assert caplog.records == []


# Figures.


def test_the_interval_draws_questions_with_all_their_turns():
    values = {n: [float(n % 3), float(n % 5)] for n in range(40)}
    found = scores.interval(values)
    everything = [value for several in values.values() for value in several]
    assert found["value"] == pytest.approx(np.mean(everything))
    # By the formula for the mean of 40 questions' means; draws of single turns would give a narrower one.
    means = [np.mean(several) for several in values.values()]
    half = 1.96 * np.std(means, ddof=1) / np.sqrt(len(means))
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)
    assert scores.interval({})["value"] is None
    assert scores.interval({1: [7.0, 8.0]}) == {"value": 7.5, "low": None, "high": None, "questions": 1, "judgments": 2}
    assert scores.interval(values) == found


def test_a_rating_from_0_to_10_counts_and_another_is_dropped():
    question = BenchQuestion(81, "stem", ("a", "b"))
    records = [{"question_id": 81, "turn": 1, "score": score} for score in (-1.0, 0.0, 10.0, 11.0)]
    found = scores.score_figures([question], records)
    assert (found["all"]["value"], found["all"]["judgments"], found["dropped"]) == (5.0, 2, 2)


def test_the_difference_counts_turns_that_both_were_rated_for():
    first = [{"question_id": n, "turn": 1, "score": 5.0 + n} for n in range(3)]
    second = [{"question_id": n, "turn": 1, "score": 4.0 + n} for n in (1, 2)] + [
        {"question_id": 0, "turn": 1, "score": -1.0}
    ]
    found = scores.score_difference(first, second)
    assert (found["value"], found["low"], found["high"], found["judgments"]) == (1.0, None, None, 2)


# The journal: kill -9, full disks, two processes.


def test_a_line_that_a_killed_writer_left_half_is_written_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "text": "ha')
    journal = LineFile(path)
    assert journal.lines == [{"a": 1}]
    journal.add({"a": 3})
    assert lines_of(path) == [{"a": 1}, {"a": 3}]
    path.write_bytes(b'{"a": 1}\nhalf\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 2 is no JSON"):
        LineFile(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_said_in_a_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(DataError, match="what was found before is kept"):
        LineFile(path).add({"a": 1})


def test_half_a_line_that_a_full_disk_left_is_written_over(tmp_path):
    resource = pytest.importorskip("resource")
    file = LineFile(tmp_path / "lines.jsonl")
    file.add({"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 4, hard))
    try:
        with pytest.raises(DataError, match=r"lines\.jsonl: File too large; what was found before is kept"):
            file.add({"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert LineFile(file.path).lines == file.lines == [{"a": 1}]
    file.add({"a": 3})
    assert lines_of(file.path) == [{"a": 1}, {"a": 3}]


def test_two_processes_do_not_write_into_one_folder(tmp_path, tiny, bench):
    with alone_in(tmp_path / "out"), pytest.raises(DataError, match="another process writes into"):
        mt_bench(*tiny, tmp_path / "out", name="tiny", data=bench)


_KILLED = """
import sys
from phi3_mlx import load, mt_bench
mt_bench(*load("tiny"), sys.argv[1], name="tiny", data=sys.argv[2], turn_tokens=40,
         progress=lambda *now: print(*now, flush=True))
"""


def test_a_killed_run_goes_on_to_the_same_answers(tiny, bench, tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    run = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(out), str(bench)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    with run:
        assert run.stdout.readline().startswith("answering")
        assert run.stdout.readline().startswith("answering")
        os.kill(run.pid, signal.SIGKILL)
    kept = [line for line in lines_of(out / "journal" / "answers-tiny.jsonl") if "turn" in line]
    assert len(kept) >= 2
    for folder in (out, whole):
        seen = []
        note = lambda *now, seen=seen: seen.append(now)  # noqa: E731
        mt_bench(*tiny, folder, name="tiny", data=bench, turn_tokens=40, progress=note)
        assert len(seen) == 12 - (len(kept) if folder == out else 0)
    answers = [
        [line["choices"] for line in lines_of(folder / "model_answer" / "tiny.jsonl")] for folder in (out, whole)
    ]
    assert answers[0] == answers[1]


def test_a_run_that_is_interrupted_keeps_its_answers_and_does_not_wait_for_the_judge(tiny, bench, tmp_path, out):
    started = []

    def stop(stage, done, total):
        if (stage, done) == ("judging", 2):
            started.append(time.monotonic())
            raise KeyboardInterrupt

    with judging(lambda number, body: "[[6]]" if number < 2 else slow(60)) as server:
        with pytest.raises(KeyboardInterrupt):
            judged(tiny, out, bench, server, progress=stop, judge_parallel=2)
        assert time.monotonic() - started[0] < 40
        assert len(lines_of(out / "model_judgment" / "judge_single.jsonl")) == 2


def test_a_question_with_a_system_message_is_what_generate_is_sent(tiny, bench, tmp_path):
    results = mt_bench(
        *tiny, tmp_path / "out", name="tiny", data=bench, limit=1, turn_tokens=SHORT, system="Speak of ducks."
    )
    assert results["system"] == "Speak of ducks."
    asked = [{"role": "system", "content": "Speak of ducks."}, {"role": "user", "content": "Tell me about duck 4."}]
    lines = lines_of(tmp_path / "out" / "model_answer" / "tiny.jsonl")
    said = generate(*tiny, encode_prompt(tiny[1], asked), temperature=0.1, seed=0, max_tokens=SHORT)
    assert lines[2]["choices"][0]["turns"][0] == said.strip()


def test_our_own_server_can_be_the_judge(tiny, bench, out, monkeypatch):
    """The bundled model gives no ratings, so each judgment is dropped; what is tested is that it is asked and told."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from served import serving

    from phi3_mlx.evaluation.mtbench import judge
    from phi3_mlx.server.models import Models
    from phi3_mlx.server.worker import Worker

    monkeypatch.setattr(judge, "JUDGE_TOKENS", 16)
    models = Models(["tiny"])
    worker = Worker(models)
    try:
        with serving(worker, listed=models.listed) as served:
            results = mt_bench(
                *tiny,
                out,
                name="tiny",
                data=bench,
                turn_tokens=SHORT,
                limit=1,
                judge=f"{served.url}/v1",
                judge_model="tiny",
            )
    finally:
        worker.close(wait=False)
    (records,) = [lines_of(out / "model_judgment" / "tiny_single.jsonl")]
    assert results["failed"] == []
    assert len(records) == 6
    assert all(record["judgment"] for record in records)
    assert results["score"]["dropped"] + results["score"]["all"]["judgments"] == 6


def test_a_file_in_the_way_of_the_folder_is_said(tiny, bench, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(DataError, match="where a folder is needed"):
            mt_bench(*tiny, place, name="tiny", data=bench)
