"""Questions on disk are asked as lm-eval asks those of the hub; MMLU in three ways; what is refused."""

import csv
import json
from pathlib import Path

import pytest

from phi3_mlx import evaluate, load
from phi3_mlx.errors import DataError, OptionError

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks

from phi3_mlx.evaluation.figures import figures_of
from phi3_mlx.evaluation.tasks import harness_tasks

GAPS = [
    {"sentence": "Max liked Tom because _ was kind .", "option1": "Max", "option2": "Tom", "answer": "2"},
    {"sentence": "The ball fit the box as the _ was small.", "option1": "ball", "option2": "box", "answer": "1"},
]
SCENES = [
    {
        "activity_label": "Running",
        "ctx_a": "A dog [title] sees a  ball.",
        "ctx_b": b,
        "endings": ["It [step] runs.", "It eats."],
        "label": label,
    }
    for b, label in (("the dog", 1), ("", 0))
]
PAIRS = [
    {"sentence_good": f"Who has {thing}?", "sentence_bad": f"Who {thing} has?", "UID": uid}
    for uid in ("adjunct_island", "wh_island")
    for thing in ("keys", "dogs")
]
SUMS = [
    {"Body": "Max has 3 balls", "sQuestion": "How many has he?", "lSolutions": 3.0},
    {"Body": "Lily has 1,000 keys", "sQuestion": "And half of them?", "lSolutions": 500.5},
]
STEPS = [{"input": f"Turn {way}. Are you back?", "target": "No"} for way in ("left", "right")]
MMLU = [{"question": f" {n} is? ", "choices": ["one", "None", "2", "3"], "answer": n % 4} for n in range(7)]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_mmlu(folder, *, shots=True):
    for subject in ("anatomy", "virology"):
        for split, questions in (("dev", MMLU[:5] if shots else []), ("test", MMLU[5:])):
            (folder / split).mkdir(parents=True, exist_ok=True)
            if questions:
                with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as file:
                    rows = [[each["question"], *each["choices"], "ABCD"[each["answer"]]] for each in questions]
                    csv.writer(file).writerows(rows)


@pytest.fixture
def data(tmp_path):
    write_lines(tmp_path / "winogrande_dev.jsonl", GAPS)
    write_lines(tmp_path / "winogrande" / "train.jsonl", GAPS)
    write_lines(tmp_path / "hellaswag" / "val.jsonl", SCENES)
    write_lines(tmp_path / "blimp.jsonl", PAIRS)
    write_lines(tmp_path / "svamp.jsonl", SUMS)
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "navigate.json").write_text(json.dumps({"canary": "x", "examples": STEPS}))
    write_mmlu(tmp_path / "mmlu")
    return tmp_path


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def tasks_of(made):
    return [task for each in made for task in (each.get_all_tasks() if hasattr(each, "get_all_tasks") else [each])]


def asked(task, shots):
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [request.args for request in task.instances]


def without(lines, *keys):
    return [{key: value for key, value in line.items() if key not in keys} for line in lines]


# What the hub has of the same questions.
HUB = {
    "winogrande": ("winogrande", {"train": GAPS, "validation": GAPS}),
    "hellaswag": (
        "hellaswag",
        {key: [{**x, "label": str(x["label"])} for x in SCENES] for key in ("train", "validation")},
    ),
    "blimp_wh_island": ("blimp", {"train": without(PAIRS[2:], "UID")}),
    "bbh_cot_fewshot_navigate": ("bbh/cot_fewshot", {"test": STEPS}),
    "bbh_cot_zeroshot_navigate": ("bbh/cot_zeroshot", {"test": STEPS}),
    "bbh_fewshot_navigate": ("bbh/fewshot", {"test": STEPS}),
    "bbh_zeroshot_navigate": ("bbh/zeroshot", {"test": STEPS}),
    "mmlu_anatomy": ("mmlu/default", {"test": MMLU[5:], "dev": MMLU[:5]}),
}


@pytest.mark.parametrize("name", HUB)
def test_questions_on_disk_are_asked_as_lm_eval_asks_those_of_the_hub(data, monkeypatch, name):
    folder, splits = HUB[name]
    hub = datasets.DatasetDict({split: datasets.Dataset.from_list(lines) for split, lines in splits.items()})
    (ours,) = tasks_of(harness_tasks([name], data=data))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    where = Path(lm_eval.tasks.__file__).parent / folder
    theirs = lm_eval.tasks.TaskManager(include_path=str(where), include_defaults=False).load([name])["tasks"][name]
    shots = {"winogrande": [0, 1], "mmlu_anatomy": [0, 5]}.get(name, [ours.get_config("num_fewshot") or 0])
    for count in shots:
        assert asked(ours, count) == asked(theirs, count)
    for kept in ("output_type", "metric_list", "filter_list", "generation_kwargs"):
        assert ours.get_config(kept) == theirs.get_config(kept)


def test_a_family_has_the_parts_that_are_there(data):
    for name, parts in (("blimp", ["adjunct_island", "wh_island"]), ("bbh_zeroshot", ["navigate"])):
        (group,) = harness_tasks([name], data=data)
        assert sorted(task.task_name for task in group.get_all_tasks()) == [f"{name}_{part}" for part in parts]
    assert {task.task_name for task in tasks_of(harness_tasks(["mmlu_other"], data=data))} == {"mmlu_virology"}
    with pytest.raises(DataError, match=r"has no questions of mmlu_humanities; it has those of anatomy, virology"):
        harness_tasks(["mmlu_humanities"], data=data)


def test_blimp_may_lie_in_a_file_for_each_kind(data):
    whole = asked(*tasks_of(harness_tasks(["blimp_wh_island"], data=data)), 0)
    (data / "blimp.jsonl").unlink()
    write_lines(data / "blimp" / "wh_island.jsonl", PAIRS[2:])
    assert asked(*tasks_of(harness_tasks(["blimp_wh_island"], data=data)), 0) == whole
    assert whole[0] == ("", " Who has keys?")


def test_the_last_number_of_an_answer_to_svamp_counts(data):
    (task,) = harness_tasks(["svamp"], data=data)
    assert asked(task, 0)[0][0] == "Question: Max has 3 balls How many has he?\nAnswer:"
    assert asked(task, 1)[0][0].startswith(
        "Question: Lily has 1,000 keys And half of them?\nAnswer: 500.5\n\nQuestion: "
    )
    three, half = task.test_docs()
    for question, answer, right in (
        (three, "It was 5, now 3.", 1),
        (three, "3.0 balls", 1),
        (three, "3 of 5", 0),
        (three, "none", 0),
        (half, "That is $1,000 / 2 = 500.50.", 1),
        (half, "-500.5", 0),
        (half, "500.4", 0),
    ):
        assert task.process_results(question, [answer]) == {"exact_match": right}, answer


@pytest.mark.parametrize(
    ("file", "line", "name", "said"),
    [
        ("winogrande_dev.jsonl", {**GAPS[0], "sentence": "no gap"}, "winogrande", "expected one gap, written _"),
        ("winogrande_dev.jsonl", {**GAPS[0], "answer": 3}, "winogrande", "answer is 3; expected 1 or 2"),
        ("winogrande_dev.jsonl", {**GAPS[0], "option2": " "}, "winogrande", "option2 is ' '; expected a text"),
        ("hellaswag/val.jsonl", {**SCENES[0], "label": 2}, "hellaswag", "label is 2; expected 0 to 1"),
        ("hellaswag/val.jsonl", {**SCENES[0], "endings": "x"}, "hellaswag", "expected a list of texts"),
        ("hellaswag/val.jsonl", {**SCENES[0], "ctx_b": None}, "hellaswag", "ctx_b is null"),
        ("svamp.jsonl", {**SUMS[0], "lSolutions": True}, "svamp", "lSolutions is true or false; expected a number"),
        ("blimp.jsonl", without(PAIRS[:1], "UID")[0], "blimp", "UID is None; expected a text"),
        ("blimp.jsonl", {**PAIRS[0], "UID": "cooking"}, "blimp", "'cooking', which blimp does not have"),
        ("bbh/navigate.json", {"examples": []}, "bbh_fewshot", "expected an object whose examples"),
        ("bbh/navigate.json", {"examples": [{"input": 1}]}, "bbh_fewshot", "example 1: input is 1; expected a text"),
    ],
)
def test_a_faulty_question_is_refused_with_its_place(data, file, line, name, said):
    write_lines(data / file, [line])
    with pytest.raises(DataError, match=said) as error:
        harness_tasks([name], data=data)
    assert str(data) in str(error.value)


@pytest.mark.parametrize("name", ["winogrande", "hellaswag", "blimp", "bbh_cot_fewshot", "svamp", "mmlu_three_ways"])
def test_questions_that_are_not_there_are_refused_with_where_they_were_looked_for(tmp_path, name):
    with pytest.raises(DataError, match=rf"{tmp_path} has no .*looked for"):
        harness_tasks([name], data=tmp_path, apply_chat_template=str)


@pytest.mark.parametrize("name", ["winogrande", "blimp_wh_island"])
def test_whole_sentences_are_refused_in_a_chat(tiny, data, name):
    assert evaluate(*tiny, name, data=data, limit=1)["results"]
    for option in ("chat", "fewshot_as_multiturn"):
        with pytest.raises(OptionError, match=rf"{name} scores whole sentences, which are no answers in a chat"):
            evaluate(*tiny, name, data=data, limit=1, **{option: True})


# ------------------------------------------------------------------------------------------ MMLU in three ways


def test_mmlu_is_asked_in_three_ways_in_one_run(tiny, data):
    said = []
    results = evaluate(*tiny, "mmlu_three_ways", data=data, limit=1, notify=said.append)
    assert [sentence for sentence in said if "not the report's own shots" in sentence] == results["phi3_mlx"]["notes"]
    figures = {figure.task: figure for figure in figures_of(results)}
    for name in ("mmlu_report_layout", "mmlu", "mmlu_chat"):
        assert figures[name].questions == 2
        assert figures[f"{name}_anatomy"].shots == 5
        assert len(results["phi3_mlx"]["prompt_hashes"][f"{name}_anatomy"]) == 64
    first = {
        name: results["samples"][f"{name}_anatomy"][0]["arguments"] for name in figures if f"{name}_anatomy" in figures
    }
    prompt, choice = first["mmlu_report_layout"][0]
    assert prompt.startswith("Question:\n0 is?\nOptions:\nA. one\nB. None\nC. 2\nD. 3\nAnswer: A\n\nQuestion:\n1 is?")
    assert prompt.endswith("Question:\n5 is?\nOptions:\nA. one\nB. None\nC. 2\nD. 3\nAnswer:")
    assert choice == " A"
    plain = asked(*tasks_of(harness_tasks(["mmlu_anatomy"], data=data)), 5)
    assert [tuple(pair) for pair in first["mmlu"]] == plain[:4]
    prompt, choice = first["mmlu_chat"][0]
    assert prompt.startswith("<|system|>\nThe following are multiple choice questions (with answers) about anatomy.")
    assert prompt.count("<|user|>") == 6
    assert choice == "A"
    again = evaluate(*tiny, "mmlu_three_ways", data=data, limit=1)["phi3_mlx"]["prompt_hashes"]
    fewer = evaluate(*tiny, "mmlu_three_ways", data=data, limit=1, num_fewshot=1)["phi3_mlx"]["prompt_hashes"]
    assert again == results["phi3_mlx"]["prompt_hashes"]
    assert not {*again.values()} & {*fewer.values()}


def test_three_ways_are_refused_where_they_cannot_be_asked(tiny, tmp_path):
    write_mmlu(tmp_path, shots=False)
    for given, error, match in (
        ({}, OptionError, "mmlu_three_ways takes MMLU's own files from data"),
        ({"data": tmp_path}, DataError, r"has no examples for anatomy \(dev/anatomy_dev.csv\); give num_fewshot=0"),
        ({"data": tmp_path, "chat": True}, OptionError, "asks in a chat and without one"),
    ):
        with pytest.raises(error, match=match):
            evaluate(*tiny, "mmlu_three_ways", **given)
    assert evaluate(*tiny, "mmlu_three_ways", data=tmp_path, num_fewshot=0, limit=1)["groups"]
