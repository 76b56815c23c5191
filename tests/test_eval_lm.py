"""A model as lm-eval's language model: its numbers, what it reads, what it cuts; lm-eval's own backend beside it."""

import math
import sys
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from oracle import CONFIGS, make_torch_dequantized, slim

from phi3_mlx import generate, load
from phi3_mlx.engine.batch import Batch
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.prefill import common_length
from phi3_mlx.engine.prefixes import PrefixStore
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import ContextLengthError, OptionError, PromptError
from phi3_mlx.evaluation.harness_request import harness_request
from phi3_mlx.evaluation.tasks import harness_tasks
from phi3_mlx.models import build, parse_config
from phi3_mlx.text.chat import SYSTEM_FOLDED, render_chat

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from phi3_mlx.evaluation.lm import HarnessLM

TINY = ROOT / "weights" / "tiny"
SAME = 1e-4  # of a token
PAIRS = [
    ("Who has the ball?", " Max"),
    ("Who has the ball?", " the dog with the key"),
    ("Who has the ball? ", "Max"),
    ("Answer:", " A"),
    ("Answer:", " B"),
    ("Answer:", "C"),
    ("Answer:", " 12"),
    ("", "Who is there?"),
    ("", " Who is there?"),
    ("", "<s>Who is there?"),
    (" \n", "Who is there?"),
    ("<s>Once upon", " a time"),
    ("Once upon a time, there was a little dog", " named Max. He was happy."),
    ("Once upon a time\n\n", "there was"),
]
QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who has the key?"}]
SHOTS = [*QUESTION, {"role": "assistant", "content": "Max has."}, {"role": "user", "content": "And the ball?"}]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture
def read_tokens(monkeypatch):
    """Tokens of prompts that were read."""
    steps, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, *given: steps.append(step(self, *given)) or steps[-1])
    return lambda: sum(each.read_tokens for each in steps)


def asked(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def in_one_pass(model, ids, first):
    """The log-probability of the tokens of `ids` from `first` on, and whether each is the likeliest."""
    logits = np.array(model(mx.array([ids[:-1]]))[0].astype(mx.float32)).astype(np.float64)[first - 1 :]
    logits -= logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logs[np.arange(len(ids) - first), ids[first:]].sum(), (logs.argmax(axis=-1) == ids[first:]).all()


# ------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("pair", PAIRS)
def test_a_continuation_has_the_log_probability_of_one_pass(tiny, pair):
    model, tokenizer = tiny
    (total, greedy), *_ = HarnessLM(*tiny).loglikelihood(asked("loglikelihood", pair))
    context, continuation = pair
    if not context.strip():
        whole, first = [1, *tokenizer.encode(context + continuation.removeprefix("<s>"))], 1
    else:
        whole = tokenizer.encode(context + continuation, special=True)
        first = len(tokenizer.encode(context.rstrip(), special=True))
    expected, likeliest = in_one_pass(model, whole, first)
    assert abs(total - expected) < SAME * len(whole)
    assert greedy == likeliest


def test_what_the_model_would_say_is_greedy(tiny):
    said = generate(*tiny, "Once upon a time", raw=True, max_tokens=4)
    results = HarnessLM(*tiny).loglikelihood(
        asked("loglikelihood", ("Once upon a time", said), ("Once upon a time", " frog"))
    )
    assert [greedy for _, greedy in results] == [True, False]


def test_results_come_in_the_order_of_the_requests(tiny):
    together = HarnessLM(*tiny).loglikelihood(asked("loglikelihood", *PAIRS))
    lm = HarnessLM(*tiny)
    alone = [lm.loglikelihood(asked("loglikelihood", pair))[0] for pair in PAIRS]
    for (ours, greedy), (theirs, same) in zip(together, alone, strict=True):
        assert abs(ours - theirs) < SAME
        assert greedy == same


def test_the_choices_of_a_question_share_its_reading(tiny, read_tokens):
    context = "Max has a red ball, and Lily has a key. " * 4 + "Who has the key?\nAnswer:"
    tokens = len(tiny[1].encode(context))
    HarnessLM(*tiny).loglikelihood(asked("loglikelihood", *[(context, f" {letter}") for letter in "ABCD"]))
    assert read_tokens() == tokens


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_texts_with_nothing_before_them_are_told_one_by_one(tiny, kind):
    texts = ["Max has a ball.", "Once upon a time there was a duck.", "The owl sleeps."] * 8
    requests = [
        Instance(kind, {}, ("", text) if kind == "loglikelihood" else (text,), 0, metadata=("blimp", number, 1))
        for number, text in enumerate(texts)
    ]
    told = []

    class Told:
        def begin(self, kind, asked):
            return {3: (-1.0, True)}

        def add(self, kind, place, result):
            told.append(place)

    counts = []
    lm = HarnessLM(*tiny, journal=Told(), progress=lambda *count: counts.append((*count, len(told))))
    getattr(lm, kind)(requests)
    assert told == [place for place in range(24) if place != 3]
    assert counts == [(done, 24, done - 1) for done in range(2, 25)]  # each is written down before the next is told


def test_the_shots_of_questions_are_read_once(tiny, read_tokens):
    shots = "Max has a red ball, and Lily has a key. " * 6
    questions = [f"{shots}Where is the {thing}?\nAnswer:" for thing in ("dog", "cat", "frog", "owl")]
    HarnessLM(*tiny).loglikelihood(asked("loglikelihood", *[(question, " A") for question in questions]))
    tokens = [len(tiny[1].encode(text)) for text in (shots, *questions)]
    assert read_tokens() < sum(tokens[1:]) - 2.5 * tokens[0]


def test_a_store_keeps_what_is_shared_and_nothing_of_what_is_not(tiny, monkeypatch):
    kept, give = [], PrefixStore.give
    monkeypatch.setattr(PrefixStore, "give", lambda *given, **named: kept.append(1) or give(*given, **named))
    shots = "Max has a red ball, and Lily has a key. " * 2
    alike = [f"{shots}Where is the {thing}?" for thing in ("dog", "cat")]
    apart = [
        "Max has a red ball, and Lily has a key, and the dog runs home.",
        "Once upon a time there was a little girl.",
    ]
    for contexts, keeps in ((apart, False), (alike, True)):
        for lm, expected in ((HarnessLM(*tiny), keeps), (HarnessLM(*tiny, prefixes=PrefixStore()), True)):
            lm.loglikelihood(asked("loglikelihood", *[(context, " A") for context in contexts]))
            assert bool(kept) == expected
            kept.clear()
            lm.generate_until(asked("generate_until", *[(context, {"max_gen_toks": 2}) for context in contexts]))
            assert bool(kept) == expected
            kept.clear()


def test_a_choice_without_tokens_is_refused(tiny):
    with pytest.raises(PromptError, match="a choice has no tokens of its own behind its question"):
        HarnessLM(*tiny).loglikelihood(asked("loglikelihood", ("Who?", "")))


# ------------------------------------------------------------------------------------------ what is too long


def test_a_long_context_loses_its_beginning_and_is_counted(tiny):
    model, tokenizer = tiny
    context, choice = "Max has a red ball, and Lily has a key. Max has a red ball.", " the dog"
    ids = tokenizer.encode(context + choice)
    lm = HarnessLM(*tiny, max_length=16)
    (total, _), _ = lm.loglikelihood(asked("loglikelihood", (context, choice), ("Max", " has")))
    expected, _ = in_one_pass(model, ids[-17:], 17 - len(ids) + len(tokenizer.encode(context)))
    assert len(ids) > 17
    assert abs(total - expected) < SAME
    assert lm.cut_prompts == 1
    with pytest.raises(PromptError, match="a choice has 3 tokens, and max_length is 2"):
        HarnessLM(*tiny, max_length=2).loglikelihood(asked("loglikelihood", ("Max", " the dog Lily")))


def test_a_question_that_fills_max_length_is_not_cut(tiny):
    context, choice = "Max has a red ball and", " a key"
    tokens = len(tiny[1].encode(context + choice))
    lm = HarnessLM(*tiny, max_length=tokens - 1)  # the last token is not read
    whole = HarnessLM(*tiny).loglikelihood(asked("loglikelihood", (context, choice)))
    assert lm.loglikelihood(asked("loglikelihood", (context, choice))) == whole
    assert lm.cut_prompts == 0
    lm = HarnessLM(*tiny, max_length=tokens - 2)
    assert lm.loglikelihood(asked("loglikelihood", (context, choice))) != whole
    assert lm.cut_prompts == 1


@pytest.mark.parametrize("length", [1, 4097])
def test_max_length_is_within_the_models_context(tiny, length):
    with pytest.raises(OptionError, match=f"max_length {length} is outside its range; give 2 to 4096"):
        HarnessLM(*tiny, max_length=length)


def test_a_128k_model_has_all_of_its_context_unless_told(tiny):
    raw = {**slim(CONFIGS["3.5-mini"]), "max_position_embeddings": 131072}
    model = build(parse_config({**raw, "original_max_position_embeddings": 4096}))
    assert HarnessLM(model, tiny[1]).max_length == 131072
    assert HarnessLM(model, tiny[1], max_length=4096).max_length == 4096


def test_what_is_only_read_may_fill_the_context(tiny):
    model, _ = tiny
    context = model.config.max_position_embeddings
    runs = Scheduler(model)
    runs.submit(Job([5] * context, 0, candidates=[7]))
    for job in (Job([5] * (context + 1), 0, candidates=[7]), Job([5] * context, 1)):
        with pytest.raises(ContextLengthError):
            runs.submit(job)


# ------------------------------------------------------------------------------------------ whole texts


@pytest.mark.parametrize("length", [4, 7, 4096])
def test_every_token_of_a_text_is_scored_once_with_all_that_its_window_has(tiny, length):
    model, tokenizer = tiny
    text = "Max loved to run in the park with his friend Lily."
    ids, expected, begin = tokenizer.encode(text), 0.0, 0
    while begin < len(ids):
        end = min(begin + length, len(ids))
        window = [1, *ids][max(end - length, 0) : end + 1]
        expected += in_one_pass(model, window, len(window) - (end - begin))[0]
        begin = end
    for given in (text, f"<s>{text}"):
        (total,) = HarnessLM(*tiny, max_length=length).loglikelihood_rolling(asked("loglikelihood_rolling", (given,)))
        assert abs(total - expected) < SAME * len(ids)


def test_a_tokenizer_that_adds_bos_never_gives_two(tiny, monkeypatch):
    model, tokenizer = tiny
    plain = HarnessLM(*tiny).loglikelihood_rolling(asked("loglikelihood_rolling", ("Max ran.",)))
    behind = HarnessLM(*tiny).loglikelihood(asked("loglikelihood", ("<s>Max", " ran.")))
    monkeypatch.setattr(tokenizer, "add_bos_token", True)
    lm = HarnessLM(model, tokenizer)
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("Max ran.",))) == plain
    for context in ("Max", "<s>Max"):
        assert lm.tok_encode(context)[:2].count(1) == 1
        assert lm.loglikelihood(asked("loglikelihood", (context, " ran."))) == behind


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_is_that_of_generate_without_its_stop(tiny):
    prompts = ["Once upon a time", "The cat", "Max has"]
    lm = HarnessLM(*tiny)
    ours = lm.generate_until(
        asked("generate_until", *[(prompt, {"until": [".", ""], "max_gen_toks": 30}) for prompt in prompts])
    )
    assert ours == [generate(*tiny, prompt, raw=True, max_tokens=30, stop=".") for prompt in prompts]
    assert lm.cut_answers == 0
    assert lm.generate_until(asked("generate_until", ("The cat", {"max_gen_toks": 3, "until": "."}))) == [
        generate(*tiny, "The cat", raw=True, max_tokens=3)
    ]
    assert lm.cut_answers == 1


def test_more_answers_than_run_at_once_come_in_their_order(tiny):
    prompts = [
        f"{name} has a {thing} and" for name in ("Max", "Lily", "Tom") for thing in "dog cat key ball frog owl".split()
    ]
    ours = HarnessLM(*tiny).generate_until(asked("generate_until", *[(each, {"max_gen_toks": 5}) for each in prompts]))
    assert ours == [generate(*tiny, prompt, raw=True, max_tokens=5) for prompt in prompts]


def test_a_prompt_that_leaves_no_room_loses_its_beginning_and_is_counted(tiny):
    _, tokenizer = tiny
    prompt = "Max has a red ball, and Lily has a key."
    lm = HarnessLM(*tiny, max_length=16)
    (ours,) = lm.generate_until(asked("generate_until", (prompt, {"max_gen_toks": 10})))
    assert ours == generate(*tiny, tokenizer.encode(prompt)[-6:], max_tokens=10)
    assert lm.cut_prompts == 1
    with pytest.raises(OptionError, match="answers of 16 tokens leave no room for a question in 16; set max_gen_toks"):
        lm.generate_until(asked("generate_until", (prompt, {"max_gen_toks": 16})))


def test_drawn_answers_repeat_with_their_seed_and_differ_among_each_other(tiny):
    several = asked("generate_until", *[("Once", {"do_sample": True, "max_gen_toks": 12})] * 3)
    first, again, other = (HarnessLM(*tiny, seed=seed).generate_until(several) for seed in (3, 3, 40))
    assert first == again != other
    assert len({*first}) == 3


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"until": None}, {}),
        ({"until": "Q"}, {"stop": ("Q",)}),
        ({"until": ["Q", ""]}, {"stop": ("Q",)}),
        ({"max_new_tokens": 9, "max_tokens": 8}, {"max_tokens": 9}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"num_beams": 1}, {}),
    ],
)
def test_what_a_task_asks_with_is_a_request(given, changed):
    request = harness_request(given, max_tokens=256, seed=1)
    neutral = {"stop": None, "max_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 1, "lookup": 0, "raw": True}
    assert {name: getattr(request, name) for name in neutral} == {**neutral, **changed}


@pytest.mark.parametrize("given", [{"num_beams": 4}, {"presence": 1}, {"max_length": 90}])
def test_what_would_change_the_answers_and_has_no_meaning_is_refused(given):
    with pytest.raises(OptionError, match=f"generation_kwargs has {next(iter(given))}="):
        harness_request(given, max_tokens=256)


# ------------------------------------------------------------------------------------------ chats


@pytest.mark.parametrize(
    "given", [{"max_gen_toks": "many"}, {"max_new_tokens": 1.5}, {"until": 5}, {"until": ["Q", 5]}]
)
def test_values_of_another_type_are_refused_in_a_line(given):
    with pytest.raises(OptionError) as error:
        harness_request(given, max_tokens=256)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", [QUESTION, SHOTS, QUESTION[1:]])
def test_a_chat_has_the_ids_that_generate_sends(tiny, messages):
    lm = HarnessLM(*tiny)
    assert lm.tok_encode(lm.apply_chat_template(messages)) == render_chat(tiny[1], messages)


def test_a_chat_may_end_in_the_beginning_of_the_answer(tiny):
    lm = HarnessLM(*tiny)
    begun = [*QUESTION, {"role": "assistant", "content": "The best answer is "}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert text == lm.apply_chat_template(QUESTION) + "The best answer is"


def test_a_system_message_that_the_template_drops_is_moved_and_said_once(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages if m.role != 'system' %}{{ m.content }}<|end|>{% endfor %}",
    )
    said = []
    lm = HarnessLM(model, tokenizer, notify=said.append)
    for _ in range(2):
        assert lm.apply_chat_template(QUESTION).startswith("Be kind.")
    assert said == [SYSTEM_FOLDED]


def test_a_template_has_a_name_by_its_text(tiny, monkeypatch):
    lm = HarnessLM(*tiny)
    name = lm.tokenizer_name
    assert lm.chat_template(True) == tiny[1].chat_template
    assert lm.chat_template(False) is None
    with pytest.raises(OptionError, match="a chat template is not chosen by name"):
        lm.chat_template("tool_use")
    monkeypatch.setattr(tiny[1], "chat_template", "{{ messages[0].content }}")
    assert HarnessLM(*tiny).tokenizer_name != name


# ------------------------------------------------------------------------------------------ the harness


def task(name, docs, **config):
    import datasets

    data = {"test": datasets.Dataset.from_list(docs)}
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "fewshot_split": "test",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            **config,
        }
    )


def test_simple_evaluate_takes_it(tiny):
    names = ["Max", "Lily", "Tom", "Bob"]
    docs = [{"question": f"{name} has a ball. Who has it?", "answer": name, "choices": names} for name in names]
    choosing = task("who", docs, output_type="multiple_choice", doc_to_choice="choices", doc_to_target="answer")
    choosing.config.doc_to_target = lambda doc: names.index(doc["answer"])
    saying = task(
        "say",
        docs,
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 5},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    results = simple_evaluate(
        model=HarnessLM(*tiny),
        tasks=[choosing, saying],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=1,
        limit=3,
        bootstrap_iters=0,
        apply_chat_template=True,
        system_instruction="Be kind.",
    )
    assert results["n-samples"]["who"]["effective"] == 3
    prompt, choice = results["samples"]["who"][0]["arguments"][0]
    assert prompt.count("<|user|>") == 2
    assert prompt.count("<|system|>") == 1
    assert choice == "Max"
    assert 0 <= results["results"]["who"]["acc,none"] <= 1
    assert 0 <= results["results"]["say"]["exact_match,none"] <= 1


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "phi3_mlx.evaluation.lm")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(OptionError, match=r'lm-eval is not installed: pip install "phi3-mlx\[eval\]"'):
        import phi3_mlx.evaluation.lm  # noqa: F401


# ------------------------------------------------------------------------------------------ lm-eval's own backend


@pytest.fixture(scope="module")
def backend(tiny):
    """lm-eval's backend of transformers with the bundled weights; `max_length` as given.

    One by one: transformers takes LongRoPE's factors for a whole batch by its longest row.
    """
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    theirs = make_torch_dequantized(TINY, tiny[0])
    theirs.generation_config = transformers.GenerationConfig.from_pretrained(TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    return lambda length=None: HFLM(
        pretrained=theirs, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=length
    )


def assert_same(pairs, ours, theirs, tokenizer):
    for pair, (total, greedy), (expected, same) in zip(pairs, ours, theirs, strict=True):
        tokens = len(tokenizer.encode(pair[-1])) + 1
        assert math.isclose(total, expected, rel_tol=0, abs_tol=SAME * tokens), pair
        assert greedy == same, pair


@pytest.mark.parametrize("length", [None, 9])
def test_lm_evals_own_backend_gives_the_same_log_probabilities(tiny, backend, length):
    chat = HarnessLM(*tiny).apply_chat_template(SHOTS)
    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # that backend fails on white space alone
    pairs += [(chat, choice) for choice in ("A", " A", "Max has the ball.")]
    ours, theirs = HarnessLM(*tiny, max_length=length), backend(length)
    assert chat == theirs.apply_chat_template(SHOTS)
    found = ours.loglikelihood(asked("loglikelihood", *pairs))
    assert_same(pairs, found, theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True), tiny[1])
    texts = [("Once upon a time there was a dog. " * 3,), ("Max loved to run in the park.",)]
    rolling = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    expected = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert_same(texts, [(total, True) for total in rolling], [(total, True) for total in expected], tiny[1])


@pytest.mark.parametrize("length", [None, 40])
def test_lm_evals_own_backend_gives_the_same_answers(tiny, backend, length):
    lm = HarnessLM(*tiny, max_length=length)
    contexts = [lm.apply_chat_template(messages) for messages in (QUESTION, SHOTS)] + ["Once upon a time", "The cat"]
    options = {"until": ["\n\n", "frog", " and"], "max_gen_toks": 30, "do_sample": False, "temperature": 0.0}
    several = asked("generate_until", *[(context, options) for context in contexts])
    assert lm.generate_until(several) == backend(length).generate_until(several, disable_tqdm=True)


@pytest.mark.long
def test_the_examples_of_a_subject_are_read_once_for_all_of_its_questions(tiny, shared, read_tokens):
    (mmlu,) = harness_tasks(["mmlu"], data=shared / "eval", num_fewshot=5)
    asks = []
    for task in mmlu.get_all_tasks()[:3]:
        task.set_config(key="num_fewshot", value=5)
        task.build_all_requests(limit=6)
        asks += task.instances
    lm = HarnessLM(*tiny)
    prompts = sorted({tuple(lm.tok_encode(ask.args[0])) for ask in asks})
    least = 0
    for long in (False, True):  # nothing that is short for LongRoPE serves what is long
        alike = [[*ids] for ids in prompts if tiny[0].model.is_long(len(ids) + 1) == long]
        least += sum(len(ids) for ids in alike) - sum(common_length(ids[:-1], after) for ids, after in pairwise(alike))
    assert len(prompts) == 18
    lm.loglikelihood(asks)
    assert least <= read_tokens() < 1.05 * least < 0.6 * sum(map(len, prompts))
