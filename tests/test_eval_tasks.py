"""Questions on disk as lm-eval's tasks, `evaluate`, and the command: what is asked, counted, written and refused."""

import csv
import json
import logging
import os
import random
import shutil
import sys

import pytest
from conftest import ROOT

from phi3_mlx import ProgressBar, evaluate, load
from phi3_mlx.cli import main
from phi3_mlx.errors import DataError, OptionError
from phi3_mlx.evaluation.questions import arc_question, mmlu_subjects, own_question, own_questions

pytest.importorskip("lm_eval")

from test_display import Terminal

from phi3_mlx.evaluation.figures import figures_of
from phi3_mlx.evaluation.paired import compare_results
from phi3_mlx.evaluation.report import write_results
from phi3_mlx.evaluation.tasks import harness_tasks

CHOOSING = [
    {"question": "Who has the key?", "choices": ["Max", "Lily", "Tom"], "answer": 1},
    {"question": "Who has the ball?", "choices": ["Max", "Lily"], "answer": "Max"},
    {"question": "What is red?", "choices": ["the ball", "None", "the key", "the dog"], "answer": "D"},
]
SAYING = [{"question": "Who has the key?", "answer": "Lily"}, {"question": "What is 2 + 2?", "answer": 4}]
SUBJECTS = ("anatomy", "astronomy", "world_religions")


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def data(tmp_path):
    """A directory with MMLU's layout and lines of ARC and GSM8K."""
    for subject in SUBJECTS:
        for split, count in (("dev", 5), ("test", 3)):
            path = tmp_path / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as file:
                rows = [
                    [f"{split} {subject} {n}?", "None", 'a "b", c', f"{n}", "d\ne", "ABCD"[n % 4]] for n in range(count)
                ]
                csv.writer(file).writerows(rows)
    arc = [{"question": f"Which {n}?", "choices": ["x", "y", "z"], "answer": n % 3} for n in range(4)]
    write_lines(tmp_path / "arc_easy_test.jsonl", arc)
    write_lines(tmp_path / "arc_easy_train.jsonl", arc)
    write_lines(tmp_path / "arc_challenge" / "test.jsonl", arc)
    gsm8k = [{"question": f"How many {n}?", "answer": f"It is <<{n}={n}>>{n}.\n#### {n}"} for n in range(4)]
    write_lines(tmp_path / "gsm8k_test.jsonl", gsm8k)
    return tmp_path


# ------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"answer": "x"}, "question is null; expected a text"),
        ({"question": " ", "answer": "x"}, "question is a text; expected a text"),
        ({"question": "Q", "answer": True}, "answer is true or false; expected a text"),
        ({"question": "Q", "answer": " "}, "answer is a text; expected a text"),
        ({"question": "Q", "choices": "ab", "answer": 0}, "choices is 'ab'; expected a list of texts"),
        ({"question": "Q", "choices": ["a", 1], "answer": 0}, "expected a list of texts"),
        ({"question": "Q", "choices": ["a"], "answer": 0}, "has 1 choices; give 2 to 26"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer is 2; expected the right choice"),
        ({"question": "Q", "choices": ["a", "b"], "answer": True}, "answer is True; expected the right choice"),
        ({"question": "Q", "choices": ["a", "b"], "answer": "C"}, "answer is 'C'; expected the right choice"),
    ],
)
def test_a_line_that_is_no_question_is_refused_with_its_place(tmp_path, line, said):
    path = write_lines(tmp_path / "own.jsonl", [CHOOSING[0], line])
    with pytest.raises(DataError, match=r"own\.jsonl:2: ") as error:
        own_questions(path)
    assert said in str(error.value)


def test_the_right_choice_is_a_place_a_text_or_a_letter():
    assert [own_question(line, "here")["answer"] for line in CHOOSING] == [1, 0, 3]
    named = {"question": "Q", "choices": ["B", "A"], "answer": "A"}
    assert own_question(named, "here")["answer"] == 1  # a text comes before a letter


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no questions"),
        ("{]", ":1: is not JSON"),
        ("[1]", ":1: is a list; expected an object"),
        (json.dumps(CHOOSING[0]) + "\n" + json.dumps(SAYING[0]), "question 2 is of another kind than the first"),
    ],
)
def test_a_file_that_holds_no_questions_of_one_kind_is_refused(tmp_path, content, said):
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        own_questions(tmp_path / "own.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        own_questions(tmp_path / "none.jsonl")


def test_arc_is_read_as_the_hub_and_as_its_makers_write_it():
    ours = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
    hub = {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    choices = [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]
    theirs = {"id": "7", "question": {"stem": "Which?", "choices": choices}, "answerKey": "B"}
    expected = {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    assert [arc_question(line, "here") for line in (ours, hub, theirs)] == [expected] * 3
    for wrong in ({**hub, "answerKey": "3"}, {"question": "Which?", "answer": "x"}, {**theirs, "answerKey": None}):
        with pytest.raises(DataError, match="here: "):
            arc_question(wrong, "here")


def test_mmlus_files_keep_quotes_line_ends_and_the_word_none(data):
    subjects = mmlu_subjects(data)
    assert [*subjects] == [*SUBJECTS] == [*mmlu_subjects(data / "mmlu")]
    assert subjects["anatomy"]["dev"][3] == {
        "question": "dev anatomy 3?",
        "choices": ["None", 'a "b", c', "3", "d\ne"],
        "answer": 3,
    }
    (data / "mmlu" / "test" / "anatomy_test.csv").write_text("a,b,c,d,e,A\na,b,c,d,e,f\n")
    with pytest.raises(DataError, match=r"anatomy_test\.csv: row 2 is"):
        mmlu_subjects(data)


# ------------------------------------------------------------------------------------------ tasks


def prompts(task, shots):
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [request.args for request in task.instances]


def test_mmlu_is_asked_as_lm_eval_asks_it(data):
    (group,) = harness_tasks(["mmlu"], data=data, num_fewshot=2)
    assert {task.task_name for task in group.get_all_tasks()} == {f"mmlu_{subject}" for subject in SUBJECTS}
    assert {each.name for each in group.get_all_groups()} == {"mmlu_stem", "mmlu_humanities"}
    task = next(task for task in group.get_all_tasks() if task.task_name == "mmlu_world_religions")
    first = prompts(task, 2)[:4]
    options = '\nA. None\nB. a "b", c\nC. {}\nD. d\ne\nAnswer:'
    expected = (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        f"dev world_religions 0?{options.format(0)} A\n\ndev world_religions 1?{options.format(1)} B\n\n"
        f"test world_religions 0?{options.format(0)}"
    )
    assert first == [(expected, f" {letter}") for letter in "ABCD"]


def test_arc_and_gsm8k_are_asked_as_lm_eval_asks_them(data):
    easy, hard, sums = harness_tasks(["arc_easy", "arc_challenge", "gsm8k"], data=data, num_fewshot=0)
    for task in (easy, hard):
        assert prompts(task, 0)[:3] == [("Question: Which 0?\nAnswer:", f" {choice}") for choice in "xyz"]
    (prompt, options), *_ = prompts(sums, 0)
    assert prompt == "Question: How many 0?\nAnswer:"
    assert options["until"] == ["Question:", "</s>", "<|im_end|>"]
    assert len(harness_tasks(["arc_easy"], data=data, num_fewshot=2)) == 1


def test_ones_own_questions_are_asked_by_letter_or_answered_freely(tmp_path):
    choosing, saying = harness_tasks(
        [str(write_lines(tmp_path / name, lines)) for name, lines in (("who.jsonl", CHOOSING), ("say.jsonl", SAYING))]
    )
    asked = prompts(choosing, 0)
    assert asked[3:5] == [("Who has the ball?\nA. Max\nB. Lily\nAnswer:", f" {letter}") for letter in "AB"]
    assert len(asked) == 3 + 2 + 4
    assert prompts(saying, 1)[0][0] == "Question: What is 2 + 2?\nAnswer: 4\n\nQuestion: Who has the key?\nAnswer:"
    assert saying.process_results(SAYING[0], [" lily. "]) == {"exact_match": 1.0, "contains": 1.0}
    assert saying.process_results(SAYING[0], ["It is LILY, I think"]) == {"exact_match": 0.0, "contains": 1.0}
    assert saying.process_results(SAYING[0], ["Lilyx"]) == {"exact_match": 0.0, "contains": 0.0}


@pytest.mark.parametrize(
    ("name", "shots", "said"),
    [
        ("gsm8k", None, r"gsm8k begins with 5 examples, and .* has no split 'train' .* give num_fewshot=0"),
        ("arc_challenge", 3, "arc_challenge begins with 3 examples"),
        ("who.jsonl", 3, "who.jsonl has 3 questions; num_fewshot must be less, and is 3"),
        ("none.jsonl", None, "none.jsonl cannot be read"),
    ],
)
def test_examples_that_are_not_there_are_refused(data, monkeypatch, name, shots, said):
    write_lines(data / "who.jsonl", CHOOSING)
    monkeypatch.chdir(data)
    with pytest.raises(DataError, match=said):
        harness_tasks([name], data=data, num_fewshot=shots)


@pytest.mark.parametrize("name", ["mmlu", "arc_easy", "gsm8k"])
def test_questions_that_are_not_there_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"{tmp_path} has no (?i:{name}): looked for"):
        harness_tasks([name], data=tmp_path)


def test_a_subject_that_mmlu_does_not_have_is_refused(data):
    (data / "mmlu" / "test" / "cooking_test.csv").write_text("a,b,c,d,e,A\n")
    with pytest.raises(DataError, match="has a subject 'cooking'"):
        harness_tasks(["mmlu"], data=data)


@pytest.fixture
def few_tasks(monkeypatch):
    """lm-eval knows a folder of its tasks alone: all take ten seconds."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = os.path.dirname(lm_eval.tasks.__file__)
    paths = [os.path.join(folder, name) for name in ("humaneval", "arc")]
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: TaskManager(include_path=paths, include_defaults=False))


def test_a_task_that_runs_code_is_refused_before_anything_is_loaded(few_tasks):
    with pytest.raises(OptionError, match=r"task humaneval runs code .* allow_code=True lets it"):
        harness_tasks(["humaneval"])


def test_an_unknown_task_is_refused_with_the_nearest(few_tasks):
    with pytest.raises(OptionError, match="task 'arc_eazy' is unknown: did you mean arc_easy"):
        harness_tasks(["arc_eazy"])


def test_questions_that_no_network_brings_are_refused_in_a_line(few_tasks, monkeypatch):
    import datasets

    def fail(**_):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    said = r"the questions of arc_easy are not there \(ConnectionError: no network\); "
    with pytest.raises(DataError, match=said + "data=DIR takes those of mmlu, .*, svamp from there$"):
        harness_tasks(["arc_easy"])


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["mmlu_anatomy", "mmlu_stem"], ["mmlu_stem"]),
        (["mmlu_stem", "gsm8k", "mmlu_anatomy"], ["mmlu_stem", "gsm8k"]),
        (["mmlu_anatomy", "mmlu_stem", "mmlu"], ["mmlu"]),
        (["mmlu_stem", "mmlu_world_religions"], ["mmlu_stem", "mmlu_world_religions"]),
        (["gsm8k", "gsm8k"], ["gsm8k"]),
        (["{data}/who.jsonl", "{data}/../{folder}/who.jsonl"], ["who"]),
    ],
)
def test_what_is_named_twice_is_asked_once(data, names, asked):
    write_lines(data / "who.jsonl", CHOOSING)
    named = [name.format(data=data, folder=data.name) for name in names]
    made = harness_tasks(named, data=data, num_fewshot=0)
    assert [getattr(each, "name", None) or each.task_name for each in made] == asked


def test_one_name_for_other_questions_is_refused(data):
    own = str(write_lines(data / "mmlu_anatomy.jsonl", CHOOSING))
    other = str(write_lines(data / "b" / "mmlu_anatomy.jsonl", CHOOSING))
    for names, said in (
        ([own, other], "tasks has mmlu_anatomy twice, with other questions; ask one at a time"),
        ([own, "mmlu_stem"], "tasks has mmlu_anatomy twice, in mmlu_anatomy and in mmlu_stem; ask one at a time"),
        (["mmlu_three_ways", "mmlu"], "tasks has mmlu_anatomy twice, with other questions; ask one at a time"),
    ):
        with pytest.raises(OptionError) as caught:
            harness_tasks(names, data=data, apply_chat_template=lambda messages: "")
        assert str(caught.value) == said


# ------------------------------------------------------------------------------------------ evaluate


def test_the_union_of_tasks_has_each_question_once(tiny, data, capsys):
    results = evaluate(*tiny, ["mmlu_anatomy", "mmlu_stem"], data=data, num_fewshot=0)
    assert {name: len(samples) for name, samples in results["samples"].items()} == {
        "mmlu_anatomy": 3,
        "mmlu_astronomy": 3,
    }
    assert {"mmlu_stem", "mmlu_anatomy"} <= {figure.task for figure in figures_of(results)}
    assert capsys.readouterr().err == ""  # no bars of lm-eval's own


def test_a_bar_follows_an_evaluation(tiny, data, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    evaluate(*tiny, "mmlu_anatomy", data=data, num_fewshot=0, progress=ProgressBar("evaluating"))
    assert terminal.getvalue().endswith("] evaluating 3 of 3\033[K\n")
    assert "it/s" not in terminal.getvalue()


def test_evaluate_asks_tasks_and_files_and_counts_what_was_cut(tiny, data):
    own = write_lines(data / "who.jsonl", CHOOSING)
    say = write_lines(data / "say.jsonl", SAYING)
    state, level, seen = random.getstate(), logging.getLogger("lm_eval").level, []
    results = evaluate(
        *tiny,
        ["mmlu", str(own), str(say)],
        data=data,
        num_fewshot=1,
        limit=2,
        max_length=80,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (random.getstate(), logging.getLogger("lm_eval").level) == (state, level)
    assert seen[-1][0] == seen[-1][1] == 2  # answers, after the choices
    figures = {(figure.task, figure.metric): figure for figure in figures_of(results)}
    assert next(iter(figures)) == ("mmlu", "acc")
    assert figures["mmlu", "acc"].questions == 6
    samples = [sample for name in results["samples"] if name.startswith("mmlu") for sample in results["samples"][name]]
    assert figures["mmlu", "acc"].value == pytest.approx(sum(sample["acc"] for sample in samples) / 6)
    pairs = compare_results(results, results)
    counted = {pair.task: pair.questions for pair in pairs if pair.metric == "acc"}
    assert (pairs[0].task, counted["mmlu"], counted["mmlu_stem"], counted["mmlu_anatomy"]) == ("mmlu", 6, 4, 2)
    grouped = {**results["groups"]["mmlu"], "acc,none": 0.123}  # as if its tasks counted alike, whatever their sizes
    weighted = {**results, "groups": {**results["groups"], "mmlu": grouped}}
    assert "mmlu" not in {pair.task for pair in compare_results(results, weighted)}
    assert figures["who", "acc"].shots == 1
    assert figures["who", "acc"].interval is None  # of two questions none was right
    assert figures["mmlu", "acc"].interval == pytest.approx(1.96 * results["groups"]["mmlu"]["acc_stderr,none"])
    assert {("say", "exact_match"), ("say", "contains")} <= {*figures}
    assert results["phi3_mlx"]["cut_prompts"] > 0
    folder = data / "out"
    folder.mkdir()
    write_results(results, folder)
    told = json.loads((folder / "results.json").read_text())
    assert told["results"]["mmlu"]["acc,none"] == figures["mmlu", "acc"].value
    assert told["n-samples"]["who"] == {"original": 3, "effective": 2}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6 + 2 + 2
    assert {"task", "doc", "resps", "prompt_hash", "arguments", "acc"} <= {*lines[0]}


def test_a_chat_has_the_system_message_and_the_examples_as_turns(tiny, tmp_path):
    own = str(write_lines(tmp_path / "who.jsonl", CHOOSING))
    results = evaluate(*tiny, own, fewshot_as_multiturn=True, num_fewshot=2, system="Be kind.", limit=1)
    prompt, choice = results["samples"]["who"][0]["arguments"][0]
    assert prompt.startswith("<|system|>\nBe kind.<|end|>")
    assert prompt.count("<|user|>") == 3
    assert choice == "A"
    one = evaluate(*tiny, own, chat=True, num_fewshot=2, system="Be kind.", limit=1)
    assert one["samples"]["who"][0]["arguments"][0][0].count("<|user|>") == 1
    plain = evaluate(*tiny, own, limit=1)
    assert plain["samples"]["who"][0]["arguments"][0][0].startswith("Who has the key?")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": [3]}, "tasks holds 3"),
        ({"limit": 0}, "limit 0 is outside its range"),
        ({"num_fewshot": -1}, "num_fewshot -1 is outside its range"),
        ({"max_length": 5000}, "max_length 5000 is outside its range; give 2 to 4096"),
        ({"data": 3}, "data is 3"),
    ],
)
def test_evaluate_refuses_what_is_no_option(tiny, given, said):
    with pytest.raises(OptionError, match=said):
        evaluate(*tiny, **{"tasks": ["mmlu"], **given})


# ------------------------------------------------------------------------------------------ the command


def run(capsys, *args):
    with pytest.raises(SystemExit) as done:
        main(["eval", *map(str, args)])
    return done.value.code, *capsys.readouterr()


def test_the_command_prints_a_table_and_writes_the_results(data, capsys):
    own = write_lines(data / "who.jsonl", CHOOSING)
    out = data / "out"
    code, table, notes = run(capsys, "--tasks", f"mmlu,{own}", "--data", data, "--max-length", 40, "-o", out)
    assert code == 0, notes
    head, first, *_ = table.splitlines()
    assert head.split() == ["task", "metric", "answer", "by", "shots", "questions", "value", "95", "%"]
    assert first.split()[:3] == ["mmlu", "acc", "9"]
    assert "prompts were longer than the context (max_length), and cut at the beginning" in notes
    told = json.loads((out / "results.json").read_text())
    assert told["config"]["model"] == "tiny"
    assert told["config"]["limit"] is None
    assert (out / "samples.jsonl").exists()
    code, _, notes = run(capsys, "--tasks", own, "-o", out)
    assert code == 1
    assert f"phi3-mlx: {out} was begun with another tasks (it was ['" in notes
    code, text, _ = run(capsys, "--tasks", own, "--json", "--limit", 1)
    assert code == 0
    assert json.loads(text)["results"]["who"]["sample_len"] == 1


def test_results_name_the_revision_of_a_model_out_of_the_hubs_cache(tmp_path, capsys):
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123abc"
    shutil.copytree(ROOT / "weights" / "tiny", snapshot)
    own = write_lines(tmp_path / "who.jsonl", CHOOSING)
    code, text, _ = run(capsys, "-m", snapshot, "--tasks", own, "--limit", 1, "--num-fewshot", 1, "--json")
    assert code == 0
    told = json.loads(text)
    assert told["config"]["model_args"]["revision"] == "0123abc"
    assert told["n-shot"]["who"] == 1
    assert len(told["phi3_mlx"]["prompt_hashes"]["who"]) == 64


def test_the_command_names_its_own_options_in_what_it_refuses(data, capsys):
    code, _, notes = run(capsys, "--tasks", "gsm8k", "--data", data, "-o", data / "out")
    assert code == 1
    assert notes.endswith("give --num-fewshot 0\n")
    assert notes.count("\n") == 1
    assert not (data / "out").exists()


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, capsys, data):
    for name in ("phi3_mlx.evaluation.lm", "lm_eval.api.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    code, _, notes = run(capsys, "--tasks", "mmlu", "--data", data)
    assert (code, notes) == (2, 'phi3-mlx: lm-eval is not installed: pip install "phi3-mlx[eval]"\n')
