"""Learning from preferences: rows, masks, losses, the reference, runs that go on, settings that mean nothing."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from conftest import long_after
from mlx.utils import tree_flatten
from tokenizer_samples import blind
from tuning_models import make_directory, write_jsonl

from phi3_mlx import tune
from phi3_mlx.errors import DataError, OptionError, TrainingError
from phi3_mlx.store.checkpoint import model_size
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.tuning import loss as losses
from phi3_mlx.tuning import pairs
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.data import read_data
from phi3_mlx.tuning.dryrun import describe_run
from phi3_mlx.tuning.events import Listener
from phi3_mlx.tuning.examples import Encoded, Example
from phi3_mlx.tuning.pairs import Labelled, PreferencePair, encode_labelled, encode_pairs, read_labelled, read_pair
from phi3_mlx.tuning.plan import plan_memory, training_dtype
from phi3_mlx.tuning.preferences import make_objective
from phi3_mlx.tuning.reference import REFERENCE, sequence_scores
from phi3_mlx.tuning.rows import read_row
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.trainer import Trainer

RAW = oracle.slim(oracle.CONFIGS["mini-4k"])
ROW = {"prompt": "What does a cow say?", "chosen": "Moo.", "rejected": "It says many things, as animals do."}


def settings(**changes):
    return Settings(**{"model": "tiny", "data": "d", "output": "o", "dtype": "float32", **changes})


def drawn(count: int = 6, seed: int = 0, whole: bool = False) -> list[PreferencePair]:
    """Pairs of random ids, of several lengths."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        prompt = rng.integers(2, 96, rng.integers(2, 9))
        answers = [rng.integers(2, 96, rng.integers(1, 12)) for _ in range(2)]
        both = []
        for k, answer in enumerate(answers):
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            first = 1 if whole and k == 0 else len(prompt)
            both.append(Example(ids, np.arange(len(ids)) >= first, f"memory:{n}"))
        made.append(PreferencePair(*both, len(prompt)))
    return made


def labelled(count: int = 6) -> list[Labelled]:
    return [Labelled(pair.chosen, n % 3 != 1, pair.rejected) for n, pair in enumerate(drawn(count))]


def model_of(seed: int = 0):
    model = oracle.make_ours(RAW, seed)
    model.unfreeze()
    return model


def naive_sums(model, sequence: Example, first: int) -> mx.array:
    """The sum of log p of ids[first:], of logits that are all kept."""
    logits = model(mx.array(sequence.ids[None, :-1]))[0].astype(mx.float32)
    values = nn.log_softmax(logits, axis=-1)[mx.arange(len(sequence) - 1), mx.array(sequence.ids[1:])]
    return mx.sum(values[first - 1 :])


def naive_loss(name: str, model, examples, references, given: Settings) -> mx.array:
    """The sum of the losses by the papers' formulas, one example after another."""
    beta = {"simpo": 2.0}.get(name, 0.1) if given.beta is None else given.beta
    total = mx.array(0.0)
    if name == "kto":
        kl = sum(
            naive_sums(model, e.other, int(np.flatnonzero(e.other.trained)[0])) - r[1]
            for e, r in zip(examples, references, strict=True)
        )
        kl = mx.stop_gradient(mx.maximum(kl / len(examples), 0.0))
        for e, r in zip(examples, references, strict=True):
            ratio = naive_sums(model, e.answer, int(np.flatnonzero(e.answer.trained)[0])) - r[0]
            sign = 1 if e.desirable else -1
            weight = given.desirable_weight if e.desirable else given.undesirable_weight
            total = total + weight * (1 - mx.sigmoid(sign * beta * (ratio - kl)))
        return total
    tokens = sum(len(pair.chosen) - 1 for pair in examples)
    for pair, (r_chosen, r_rejected) in zip(examples, references, strict=True):
        chosen, rejected = (naive_sums(model, s, pair.prompt) for s in pair.sequences)
        sizes = [len(s) - pair.prompt for s in pair.sequences]
        if name == "dpo":
            a, b = chosen - r_chosen, rejected - r_rejected
            if given.dpo_loss == "ipo":
                total = total + (a / sizes[0] - b / sizes[1] - 1 / (2 * beta)) ** 2
            else:
                e = given.label_smoothing
                total = total - (1 - e) * nn.log_sigmoid(beta * (a - b)) - e * nn.log_sigmoid(beta * (b - a))
        elif name == "simpo":
            margin = chosen / sizes[0] - rejected / sizes[1]
            total = total - nn.log_sigmoid(beta * margin - given.simpo_gamma)
        else:
            a, b = mx.exp(chosen / sizes[0]), mx.exp(rejected / sizes[1])
            odds = mx.log(a / (1 - a)) - mx.log(b / (1 - b))
            total = total - beta * nn.log_sigmoid(odds)
            total = total - naive_sums(model, pair.chosen, 1) * len(examples) / tokens
    return total


CASES = {
    "dpo": {},
    "dpo, smoothed": {"label_smoothing": 0.2, "beta": 0.3},
    "ipo": {"dpo_loss": "ipo"},
    "orpo": {},
    "simpo": {"simpo_gamma": 0.8},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
}


def case(name):
    objective = {"ipo": "dpo"}.get(name, name.split(",")[0])
    given = settings(objective=objective, **CASES[name])
    examples = labelled() if objective == "kto" else drawn(whole=objective == "orpo")
    rng = np.random.default_rng(3)
    references = [[-float(v) for v in rng.uniform(5, 60, 2)] for _ in examples]
    return objective, given, examples, references


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradients_are_the_papers(name, monkeypatch):
    monkeypatch.setattr(losses, "places_at_once", lambda vocab_size: 5)  # several pieces of the output layer
    objective, given, examples, references = case(name)
    model = model_of()
    made = make_objective(given)

    def ours():
        score = lambda sequences: sequence_scores(model, sequences, limit=64)  # noqa: E731
        shared = made.shared(examples, references, score)
        return made.loss(model, made.part(examples, references, shared))[0]

    value, gradients = nn.value_and_grad(model, ours)()
    expected, slopes = nn.value_and_grad(model, lambda: naive_loss(objective, model, examples, references, given))()
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    ours_flat, theirs = dict(tree_flatten(gradients)), dict(tree_flatten(slopes))
    largest = max(float(mx.abs(a).max()) for a in theirs.values())
    for key, array in theirs.items():
        np.testing.assert_allclose(np.array(ours_flat[key]), np.array(array), atol=1e-5 * largest, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_add_up_to_the_whole(name):
    _, given, examples, references = case(name)
    model, made = model_of(), make_objective(given)
    shared = made.shared(examples, references, lambda sequences: sequence_scores(model, sequences, limit=64))
    whole, figures = made.loss(model, made.part(examples, references, shared))
    pieces = [made.loss(model, made.part([e], [r], shared)) for e, r in zip(examples, references, strict=True)]
    assert sum(float(piece) for piece, _ in pieces) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(np.array(sum(told for _, told in pieces)), np.array(figures), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_figures_are_means_over_the_answers_that_they_are_of(name):
    _, given, examples, references = case(name)
    model, made = model_of(), make_objective(given)
    shared = made.shared(examples, references, lambda sequences: sequence_scores(model, sequences, limit=64))
    _, told = made.loss(model, made.part(examples, references, shared))
    means = dict(zip(made.figures, (told[0] / told[1]).tolist(), strict=True))
    if name == "kto":
        kinds = [
            [(e.answer, r[0]) for e, r in zip(examples, references, strict=True) if e.desirable is kind]
            for kind in (True, False)
        ]
        firsts = [[int(np.flatnonzero(answer.trained)[0]) for answer, _ in of_kind] for of_kind in kinds]
    else:
        kinds = [[(pair.sequences[k], r[k]) for pair, r in zip(examples, references, strict=True)] for k in range(2)]
        firsts = [[pair.prompt for pair in examples]] * 2
    expected = {}
    for kind, of_kind, starts in zip(("chosen", "rejected"), kinds, firsts, strict=True):
        sizes = np.array([len(answer) - start for (answer, _), start in zip(of_kind, starts, strict=True)])
        sums = np.array([float(naive_sums(model, answer, n)) for (answer, _), n in zip(of_kind, starts, strict=True)])
        of_each = sums / sizes if name == "orpo" else sums - np.array([reference for _, reference in of_kind])
        expected |= {f"reward_{kind}": of_each * 0.1, f"tokens_{kind}": sizes}
    for figure, values in expected.items():
        assert means[figure] == pytest.approx(values.mean(), rel=1e-3), figure
    if name != "kto":
        margins = expected["reward_chosen"] - expected["reward_rejected"]
        assert means["margin"] == pytest.approx(margins.mean(), rel=1e-3)
        assert means["accuracy"] == pytest.approx((margins > 0).mean())
    if name == "dpo":
        ratios = np.concatenate([expected["reward_chosen"], expected["reward_rejected"]]) / 0.1
        assert means["kl"] == pytest.approx((ratios**2).mean() / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "first"),
    [({"objective": "dpo"}, np.log(2)), ({"objective": "dpo", "dpo_loss": "ipo", "beta": 0.25}, 4.0),
     ({"objective": "kto"}, 0.5)],
)  # fmt: skip
def test_the_first_loss_is_the_one_of_a_model_that_is_its_reference(tmp_path, given, first):
    examples = labelled() if given["objective"] == "kto" else drawn()
    reports = []
    trainer = Trainer(
        model_of(), examples, [], settings(method="full", steps=1, batch_size=6, **given), tmp_path, {},
        Listener(step=reports.append),
    )  # fmt: skip
    assert trainer.run()
    assert reports[0].loss == pytest.approx(first, rel=1e-5)
    assert reports[0].figures["kl"] == pytest.approx(0, abs=1e-5)


def test_odds_of_an_answer_that_is_nearly_certain_are_right_and_of_a_certain_one_finite():
    orpo, part = make_objective(settings(objective="orpo")), SimpleNamespace(sizes=mx.array([2.0, 2.0]))

    def loss(chosen):
        return float(orpo.pair_losses(mx.array([[chosen, -6.0]]), part)[1])

    odds = [mean - np.log(-np.expm1(mean)) for mean in (-0.005, -3.0)]
    assert loss(-0.01) == pytest.approx(0.1 * np.log1p(np.exp(odds[1] - odds[0])), rel=1e-3)
    assert 0 < loss(0.0) < loss(-0.01)


def test_scores_do_not_depend_on_how_many_are_read_at_once():
    model = model_of()
    sequences = [sequence for pair in drawn(9) for sequence in pair.sequences]
    alone = sequence_scores(model, sequences, limit=1)
    np.testing.assert_allclose(sequence_scores(model, sequences, limit=1000), alone, atol=1e-4)
    first = int(np.flatnonzero(sequences[4].trained)[0])
    assert alone[4] == pytest.approx(float(naive_sums(model, sequences[4], first)), abs=1e-4)


# Rows and masks


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ROW["prompt"]}
SAID = {"role": "assistant", "content": ROW["chosen"]}


def pair_of(row):
    return read_pair(row, "f:1", {})


def test_forms_of_a_pair_are_the_same_conversations():
    talk = [{"role": "user", "content": ROW["prompt"]}]
    say = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    forms = [
        ROW,
        {**ROW, "prompt": talk},
        {"messages": talk, "chosen": [say(ROW["chosen"])], "rejected": [say(ROW["rejected"])]},
        {"chosen": [*talk, say(ROW["chosen"])], "rejected": [*talk, say(ROW["rejected"])]},
        {**ROW, "prompt": [{"from": "human", "value": ROW["prompt"]}]},
    ]
    # UltraFeedback has the prompt three times.
    whole = forms[3]
    forms += [{**whole, "prompt": ROW["prompt"]}, {**whole, "prompt": ROW["prompt"], "messages": whole["chosen"]}]
    assert len({json.dumps([pair_of(form).chosen.messages, pair_of(form).rejected.messages]) for form in forms}) == 1
    with_system = pair_of({**ROW, "system": "Be brief."})
    assert with_system.rejected.messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ROW, "rejected": "Moo."}, "'chosen' and 'rejected' say the same"),
        ({**ROW, "chosen": " "}, "'chosen' is empty"),
        ({**ROW, "rejected": []}, "'chosen' is a text and 'rejected' an empty list"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is null"),
        ({"chosen": "b", "rejected": "c"}, "'prompt' is missing"),
        ({**ROW, "prompt": 3}, "prompt[0] 'content' is"),
        ({**ROW, "prompt": []}, "'prompt' is an empty list"),
        ({**ROW, "completion": "Moo."}, "has 'completion' beside 'chosen'"),
        ({**ROW, "chosen": 3, "rejected": 4}, "'chosen' is a"),
        ({**ROW, "images": ["a.png"]}, "'images' beside"),
        (["a"], "is a list; expected a JSON object"),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            "have no prompt in common",
        ),
        ({"chosen": [SYSTEM, USER, SAID], "rejected": [SYSTEM, {**USER, "content": "Hm?"}, SAID]}, "have no prompt in"),
        ({**ROW, "messages": [USER], "prompt": "What?"}, "has both 'messages' and 'prompt'"),
        (
            {"prompt": "Why?", "chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "Oink."}]},
            "'prompt' is not how the conversation in 'chosen' begins",
        ),
        ({**ROW, "chosen": [{**SAID, "train": False}], "rejected": [SAID]}, "'chosen' has no assistant turn to learn"),
        ({"prompt": "a", "chosen": [3], "rejected": [4]}, "chosen[0] is a number"),
        ({"prompt": "a", "completion": "b", "label": True}, "'completion' and 'label' are for objective='kto'"),
    ],
)
def test_a_row_that_is_no_pair_is_told_by_its_key(row, said):
    with pytest.raises(DataError) as raised:
        pair_of(row)
    assert said in str(raised.value)


def test_what_both_conversations_say_before_they_differ_is_an_answer_from_the_assistants_turn_on():
    for role, content, user, assistant in (("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")):
        talk = [{role: who, content: text} for who, text in
                ((user, "Hi."), (assistant, "Hello."), (user, "Say A."), (assistant, "A."))]  # fmt: skip
        other = [*talk[:2], {role: user, content: "Say B."}, {role: assistant, content: "B."}]
        record = pair_of({"chosen": talk, "rejected": other})
        assert [m["content"] for m in record.chosen.messages] == ["Hi.", "Hello.", "Say A.", "A."]
        assert pair_of({"prompt": talk[:1], "chosen": talk[1:], "rejected": other[1:]}) == record


def test_pairs_are_told_apart_from_other_lines():
    with pytest.raises(DataError, match="'chosen' and 'rejected' are for objective='dpo'"):
        read_row(ROW, "f:1", {})
    with pytest.raises(DataError, match="'chosen' and 'rejected' are for objective='dpo'"):
        read_labelled(ROW, "f:1", {})
    with pytest.raises(DataError, match="'completion' has no assistant turn; expected at least one"):
        read_row({"prompt": [USER], "completion": [USER]}, "f:1", {})


def test_faulty_pairs_are_told_by_line(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [ROW, {**ROW, "rejected": "Moo."}, {**ROW, "chosen": ""}])
    with pytest.raises(
        DataError, match=r"p.jsonl:2: 'chosen' and 'rejected' say the same.*p.jsonl:3: 'chosen' is empty"
    ):
        read_data(path, read=read_pair)


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (False, False), (1, True), (0, False), ("yes", None), (None, None), (2, None)],
)
def test_a_label_is_true_or_false(label, desirable):
    row = {"prompt": "a", "completion": "b", "label": label}
    if desirable is None:
        with pytest.raises(DataError, match="'label' is"):
            read_labelled(row, "f:1", {})
    else:
        assert read_labelled(row, "f:1", {}).desirable is desirable


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def tokenizer(base):
    return read_tokenizer(base)


def learnt(sequence, tokenizer):
    return tokenizer.decode(sequence.ids[sequence.trained].tolist(), skip_special=False)


def test_answers_are_learnt_with_their_end_and_the_prompt_is_not(tokenizer):
    earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    row = {**ROW, "prompt": [*earlier, {"role": "user", "content": ROW["prompt"]}]}
    (pair,) = encode_pairs([pair_of(row)], tokenizer, max_length=200).examples
    assert [learnt(sequence, tokenizer) for sequence in pair.sequences] == ["Moo.<|end|>", f"{ROW['rejected']}<|end|>"]
    assert np.array_equal(pair.chosen.ids[: pair.prompt], pair.rejected.ids[: pair.prompt])
    assert "Hello." in tokenizer.decode(pair.chosen.ids[: pair.prompt].tolist())
    (whole,) = encode_pairs([pair_of(row)], tokenizer, max_length=200, whole=True).examples
    assert whole.chosen.trained[1:].all()
    assert np.array_equal(whole.rejected.trained, pair.rejected.trained)


def test_users_who_speak_within_an_answer_are_no_part_of_it(tokenizer):
    """Not even for ORPO, whose likelihood is of prompt and answer."""
    follow_up = {"role": "user", "content": "Is that all?"}
    wrong = {**SAID, "content": ROW["rejected"]}
    row = {"prompt": [USER], "chosen": [SAID, follow_up, {**SAID, "content": "Yes."}], "rejected": [wrong]}
    (pair,) = encode_pairs([pair_of(row)], tokenizer, max_length=200, whole=True).examples
    part = make_objective(settings(objective="orpo")).part([pair], [[0.0, 0.0]], 1.0)
    of_chosen, in_prompt = np.array(part.answer) == 0, np.array(part.prompts) == 1
    said = np.array(part.targets)[of_chosen & ~in_prompt].tolist()
    assert tokenizer.decode(said, skip_special=False) == "Moo.<|end|> Yes.<|end|>"
    assert (of_chosen & in_prompt).sum() == pair.prompt - 1
    assert part.sizes.tolist() == [len(said), np.sum(~of_chosen)]


def test_answers_that_are_the_same_tokens_are_told_by_line(tokenizer, monkeypatch):
    rendered = pairs.encode_record
    without_blanks = lambda r, *rest: rendered(  # noqa: E731
        dataclasses.replace(r, messages=tuple({**m, "content": m["content"].strip()} for m in r.messages)), *rest
    )
    monkeypatch.setattr(pairs, "encode_record", without_blanks)  # as some templates write messages
    with pytest.raises(DataError, match="f:1: 'chosen' and 'rejected' are the same, once they are tokens"):
        encode_pairs([pair_of({**ROW, "rejected": "Moo. "})], tokenizer, max_length=99)


def test_answers_without_tokens_are_told_by_line_or_left_out(tmp_path):
    """Where the template writes no end behind an answer, one that the tokenizer does not see has nothing to learn."""
    words = read_tokenizer(blind(tmp_path))
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    unseen = {"prompt": "the rabbit", "chosen": "\u200b", "rejected": "the end"}
    for row in (unseen, {**unseen, "chosen": "the end", "rejected": "\u200b"}):
        with pytest.raises(DataError, match="f:1: an answer has no tokens to learn"):
            encode_pairs([pair_of(row)], words, max_length=99)
    rows = [{"prompt": "the rabbit", "completion": text, "label": True} for text in ("\u200b", "the end")]
    made = encode_labelled([read_labelled(row, "f:1", {}) for row in rows], words, max_length=99, batch_size=2)
    assert (len(made.examples), made.empty, made.dropped) == (1, ["f:1"], [])


def test_long_pairs_are_left_out_or_cut(tokenizer):
    whole = encode_pairs([pair_of(ROW)], tokenizer, max_length=200)
    prompt = whole.examples[0].prompt
    short = prompt + 2
    assert encode_pairs([pair_of(ROW)], tokenizer, max_length=short, overflow="drop").dropped == ["f:1"]
    cut = encode_pairs([pair_of(ROW)], tokenizer, max_length=short, overflow="truncate")
    assert cut.truncated == ["f:1"]
    assert [len(sequence) for sequence in cut.examples[0].sequences] == [short, short]
    assert encode_pairs([pair_of(ROW)], tokenizer, max_length=prompt, overflow="truncate").dropped == ["f:1"]
    same = pair_of({**ROW, "chosen": "It says many cats.", "rejected": "It says many dogs."})
    first = int(np.flatnonzero(encode_pairs([same], tokenizer, max_length=99).examples[0].chosen.trained)[0])
    assert encode_pairs([same], tokenizer, max_length=first + 2, overflow="truncate").dropped == ["f:1"]


def test_answers_to_others_go_round_in_each_batch(tokenizer):
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}.", "label": n % 2} for n in range(5)]
    records = [read_labelled(row, f"f:{n}", {}) for n, row in enumerate(rows)]
    made = encode_labelled(records, tokenizer, max_length=99, batch_size=3).examples
    said = [tokenizer.decode(example.other.ids.tolist(), skip_special=True).split() for example in made]
    asked = [[word for word in words if word.strip(".").isdigit()] for words in said]
    assert asked == [["0.", "2."], ["1.", "0."], ["2.", "1."], ["3.", "4."], ["4.", "3."]]
    assert [learnt(example.other, tokenizer) for example in made][1] == "It is 0.<|end|>"


# Whole runs

SMALL = {"rank": 2, "batch_size": 4, "dtype": "float32", "learning_rate": 3e-3, "holdout": 0.0}


def truths(count: int, seed: int = 0) -> list[dict]:
    """Short true answers beside long wrong ones."""
    rng = np.random.default_rng(seed)
    animals = {"cow": "moo", "cat": "meow", "dog": "woof", "duck": "quack"}
    rows = []
    for _ in range(count):
        animal = str(rng.choice([*animals]))
        wrong = str(rng.choice([sound for name, sound in animals.items() if name != animal]))
        rows.append(
            {
                "prompt": f"What does the {animal} say?",
                "chosen": f"It says {animals[animal]}.",
                "rejected": f"The little {animal} was happy, and it says {wrong}, {wrong} and {wrong}.",
            }
        )
    return rows


def judged(count: int) -> list[dict]:
    """Both answers of `truths`, each with its label."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in truths(count)
        for name in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", truths(24))
    write_jsonl(folder / "valid.jsonl", truths(12, seed=1))
    return folder


def figures_of(output, kind):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo"])
def test_training_on_pairs_prefers_what_was_chosen_of_others_too(base, pair_file, tmp_path, objective):
    result = tune(str(base), pair_file, tmp_path / "out", objective=objective, steps=24, validate_every=12, **SMALL)
    first, last = figures_of(tmp_path / "out", "train")[0], figures_of(tmp_path / "out", "valid")[-1]
    assert result.finished
    assert last["accuracy"] == 1.0 >= first["accuracy"]
    assert last["margin"] > first["margin"]
    assert last["tokens_chosen"] < last["tokens_rejected"]
    assert (tmp_path / "out" / "checkpoints" / REFERENCE).is_file() == (objective == "dpo")


def test_training_on_labels_tells_good_answers_from_bad(base, tmp_path):
    data = write_jsonl(tmp_path / "kto.jsonl", judged(16))
    tune(str(base), data, tmp_path / "out", objective="kto", steps=24, **SMALL)
    last = figures_of(tmp_path / "out", "train")[-1]
    assert last["reward_chosen"] - last["reward_rejected"] > 0.1
    assert last["kl"] >= 0


RESUMED = {
    "dpo": {},
    "4 bits": {"bits": 4},
    "dora": {"method": "dora"},
    "checkpointed and accumulated": {"gradient_checkpointing": True, "accumulate": 2},
    "ipo": {"dpo_loss": "ipo"},
    "orpo": {"objective": "orpo"},
    "simpo": {"objective": "simpo"},
    "kto": {"objective": "kto"},
    "kto, 4 bits": {"objective": "kto", "bits": 4},
}


@pytest.mark.parametrize("name", long_after(2, RESUMED))
def test_a_run_that_was_stopped_ends_with_the_same_weights(base, pair_file, tmp_path, name):
    options = {**SMALL, "objective": "dpo", "steps": 6, "save_every": 1, **RESUMED[name]}
    bits = options.pop("bits", None)
    model = str(make_directory(tmp_path / "packed", bits=bits, num_hidden_layers=2) if bits else base)
    data = write_jsonl(tmp_path / "kto.jsonl", judged(12)) if options["objective"] == "kto" else pair_file
    tune(model, data, tmp_path / "whole", **options)
    stopped = tune(
        model, data, tmp_path / "cut", **options,
        on_step=lambda report: report.step == 3 and os.kill(os.getpid(), signal.SIGINT),
    )  # fmt: skip
    assert stopped.interrupted
    tune(model, data, tmp_path / "cut", **options, resume=True)
    one, other = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[key], other[key]) for key in one)


def test_whole_weights_are_compared_with_what_they_were_before_the_first_step(base, pair_file, tmp_path):
    options = {"batch_size": 4, "objective": "dpo", "method": "full", "learning_rate": 1e-4, "save_every": 1}
    tune(str(base), pair_file, tmp_path / "whole", steps=4, **options)
    tune(str(base), pair_file, tmp_path / "cut", steps=4, **options,
         on_step=lambda report: report.step == 2 and os.kill(os.getpid(), signal.SIGINT))  # fmt: skip
    tune(str(base), pair_file, tmp_path / "cut", steps=4, **options, resume=True)
    ours, theirs = (figures_of(tmp_path / name, "train") for name in ("whole", "cut"))
    assert [line["margin"] for line in ours] == [line["margin"] for line in theirs]
    assert abs(ours[-1]["margin"]) > 0


def test_a_lost_reference_is_not_made_of_changed_weights(base, pair_file, tmp_path):
    options = {**SMALL, "objective": "dpo", "steps": 4, "save_every": 1}
    tune(str(base), pair_file, tmp_path / "out", **options,
         on_step=lambda report: report.step == 2 and os.kill(os.getpid(), signal.SIGINT))  # fmt: skip
    (tmp_path / "out" / "checkpoints" / REFERENCE).unlink()
    with pytest.raises(TrainingError, match="has not all log-probabilities of the model before this run"):
        tune(str(base), pair_file, tmp_path / "out", **options, resume=True)


def test_a_run_that_is_stopped_while_its_reference_reads_goes_on_there(base, pair_file, tmp_path):
    prepared = runs.prepare(Settings.of({"model": str(base), "data": str(pair_file), "output": str(tmp_path / "o"),
                                         **SMALL, "objective": "dpo", "steps": 2}))  # fmt: skip
    told = []
    stop = lambda: len(told) == 1  # noqa: E731

    def trainer(listener):
        model, _ = runs.load_for_training(prepared)
        return Trainer(
            model, prepared.train.examples, prepared.valid.examples, prepared.settings, tmp_path, {}, listener
        )

    assert not trainer(Listener(scored=lambda done, total: told.append((done, total)), stop=stop)).run()
    known, total = told[0]
    assert 0 < known < total == 2 * (2 * 4 + 12)
    again = []
    assert trainer(Listener(scored=lambda done, total: again.append(done))).run()
    assert again[0] > known
    assert again[-1] == total


def test_the_reference_reads_no_example_that_the_run_does_not(base, pair_file, tmp_path):
    options = {**SMALL, "objective": "dpo", "save_every": 1}
    tune(str(base), pair_file, tmp_path / "short", steps=2, **options)
    tune(str(base), pair_file, tmp_path / "long", steps=7, **options)  # an epoch has 6
    known = {name: ~np.isnan(np.array(mx.load(str(tmp_path / name / "checkpoints" / REFERENCE))["log_probs"]))
             for name in ("short", "long")}  # fmt: skip
    assert known["short"].sum() == 2 * (2 * 4 + 12)
    assert known["long"].all()


def test_the_reference_is_the_adapter_that_a_run_begins_with(base, pair_file, tmp_path):
    taught = write_jsonl(
        tmp_path / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in truths(8)]
    )
    tune(str(base), taught, tmp_path / "sft", steps=6, **{**SMALL, "learning_rate": 2e-2})
    tune(str(base), pair_file, tmp_path / "dpo", from_adapter=tmp_path / "sft", objective="dpo", steps=1,
         **{name: value for name, value in SMALL.items() if name != "rank"})  # fmt: skip
    assert figures_of(tmp_path / "dpo", "train")[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)


def test_the_best_checkpoint_may_be_the_most_accurate(tmp_path):
    given = settings(objective="dpo", best_by="accuracy", steps=3, batch_size=6, method="full", validate_every=1)
    said = []
    trainer = Trainer(model_of(), drawn(), drawn(), given, tmp_path, {},
                      Listener(validated=lambda step, loss, best, figures: said.append(best)))  # fmt: skip
    coming = iter([(0.9, {"accuracy": 0.5}), (0.5, {"accuracy": 0.4}), (0.8, {"accuracy": 0.5})])
    trainer._validation = lambda: next(coming)
    assert trainer.run()
    assert said == [True, False, True]  # the third is as accurate as the first, and has the smaller loss
    assert (trainer.progress.best_step, trainer.progress.best_accuracy) == (3, 0.5)


def test_a_dry_run_shows_both_answers(base, pair_file, tmp_path):
    prepared = runs.prepare(Settings.of({"model": str(base), "data": str(pair_file), "output": "o", **SMALL,
                                         "objective": "dpo"}))  # fmt: skip
    shown = describe_run(prepared)
    chosen = shown.index("          chosen\n")
    assert chosen < shown.index("⟦It says") < shown.index("          rejected\n") < shown.index("⟦The little")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": "ppo"}, "objective 'ppo'"),
        ({"objective": "sft", "beta": 0.1}, "beta 0.1 has no effect with objective='sft'"),
        ({"objective": "orpo", "dpo_loss": "ipo"}, "dpo_loss 'ipo' has no effect with objective='orpo'"),
        ({"objective": "dpo", "dpo_loss": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1 has no effect"),
        ({"objective": "dpo", "train_on": "last"}, "train_on 'last' has no effect"),
        ({"objective": "dpo", "dropout": 0.1}, "dropout 0.1 has no effect"),
        ({"objective": "kto", "best_by": "accuracy"}, "best_by 'accuracy' has no effect"),
        ({"objective": "kto", "batch_size": 1}, "no other answer"),
        ({"objective": "dpo", "overflow": "split"}, "takes answers apart"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing 0.5 is outside"),
        ({"objective": "dpo", "beta": 0}, "beta 0"),
        ({"objective": "simpo", "beta": float("nan")}, "beta"),
    ],
)
def test_what_means_nothing_to_an_objective_is_refused(given, said):
    with pytest.raises(OptionError) as raised:
        Settings.of({"model": "tiny", "data": "d", "output": "o", **given})
    assert said in str(raised.value)


def test_dropout_of_a_file_or_an_adapter_is_none_where_preferences_are_learnt():
    settings = Settings.of({"model": "tiny", "data": "d", "output": "o", "objective": "dpo"}, {"dropout": 0.3})
    assert settings.dropout == 0.0


def test_preferences_learn_more_slowly_unless_told():
    common = {"model": "tiny", "data": "d", "output": "o"}
    assert Settings.of({**common, "objective": "dpo"}).learning_rate == 2e-5
    assert Settings.of({**common, "objective": "dpo", "learning_rate": 1e-4}).learning_rate == 1e-4
    assert Settings.of(common).learning_rate == 2e-4


def test_a_killed_run_resumes_to_the_same_weights(base, pair_file, tmp_path):
    """kill -9 somewhere, in the reference's reading or in a step."""
    command = [sys.executable, "-m", "phi3_mlx", "tune", "-m", str(base), "-d", str(pair_file), "--objective", "dpo",
               "--rank", "2", "--steps", "12", "--save-every", "1", "--dtype", "float32"]  # fmt: skip
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    running = subprocess.Popen([*command, "-o", str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and running.poll() is None:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    running.kill()
    running.communicate()
    again = [sys.executable, "-m", "phi3_mlx", "tune", "--resume", "-o", str(tmp_path / "cut")]
    subprocess.run(again, check=True, capture_output=True)
    one, other = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("whole", "cut"))
    assert all(mx.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_ranks_add_up_to_the_batch_of_one_process(tmp_path, name):
    """Two ranks that are run one after the other."""

    class Rank:
        def __init__(self, rank, size):
            self.rank, self.size = lambda: rank, lambda: size

    _, given, examples, references = case(name)
    given = dataclasses.replace(given, method="full", batch_size=6, steps=2)

    def summed(rank, size):
        trainer = Trainer(model_of(), examples, [], given, tmp_path, {}, Listener(), Rank(rank, size))
        if trainer._reference is not None:
            trainer._reference.train[:] = references
        return trainer.gradients(1)

    whole, expected, figures = summed(0, 1)
    shares = [summed(rank, 2) for rank in range(2)]
    assert sum(share[0] for share in shares) == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(np.array(shares[0][2] + shares[1][2]), np.array(figures), rtol=1e-4, atol=1e-6)
    flat = [dict(tree_flatten(share[1])) for share in shares]
    for key, array in tree_flatten(expected):
        largest = float(mx.abs(array).max())
        np.testing.assert_allclose(np.array(flat[0][key] + flat[1][key]), np.array(array), atol=1e-5 * largest + 1e-7)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"objective": "dpo"}),
        ({}, {"objective": "dpo", "gradient_checkpointing": True}),
        ({}, {"objective": "dpo", "method": "dora"}),
        pytest.param(
            {"hidden_size": 512, "intermediate_size": 1408},
            {"objective": "dpo", "method": "full"},
            marks=pytest.mark.long,
        ),
        ({"vocab_size": 32064}, {"objective": "simpo"}),
        ({"bits": 4}, {"objective": "dpo", "accumulate": 2}),
        ({}, {"objective": "orpo"}),
        ({}, {"objective": "kto"}),
        ({}, {"objective": "kto", "gradient_checkpointing": True}),
        ({"bits": 4, "vocab_size": 32064}, {"objective": "kto"}),
        ({"hidden_size": 512, "intermediate_size": 1408}, {"objective": "kto", "method": "full"}),
    ],
)
def test_the_plan_of_pairs_is_what_a_run_takes(tmp_path, changes, options):
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 4, "max_position_embeddings": 1024}  # fmt: skip
    directory = make_directory(tmp_path / "model", **{**shape, **changes})
    given = Settings(data="-", output="-", batch_size=4, steps=2, **options)
    rng, examples = np.random.default_rng(0), []
    for n in range(4):
        both = [rng.integers(2, 4000, length).astype(np.int32) for length in (120, 100)]
        whole = options["objective"] == "orpo"
        masks = [np.arange(len(ids)) >= (1 if whole and k == 0 else 60) for k, ids in enumerate(both)]
        chosen, rejected = (Example(ids, mask, f"memory:{n}") for ids, mask in zip(both, masks, strict=True))
        of_label = options["objective"] == "kto"
        examples.append(Labelled(chosen, n % 2 == 0, rejected) if of_label else PreferencePair(chosen, rejected, 60))
    size = model_size(directory, training_dtype(given))
    planned = plan_memory(size, given, *runs.sizes(Encoded(examples), given)).total
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model, _ = runs.load_for_training(type("Prepared", (), {"settings": given, "checkpoint": directory}))
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    Trainer(model, examples, [], given, tmp_path / "checkpoints", {}).run()
    ratio = planned / (mx.get_peak_memory() - before)
    assert 0.9 < ratio < 1.1
