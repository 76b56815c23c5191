"""Choices at temperature 0: the answer is the one that is likeliest as a whole, and the prompt is read once."""

import json
import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
import small_models
from conftest import long_after
from oracle import CONFIGS, ORIGINAL, slim

import phi3_mlx
from phi3_mlx.cli import main
from phi3_mlx.engine.choices import totals_of
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import OptionError, PromptError
from phi3_mlx.models.cache import KVBits

pytest.importorskip("llguidance")
MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in ("mini-4k", "3.5-mini", "long-and-window")}
MODELS["phi3-small"] = small_models.make({**small_models.RAW, **small_models.LONG})
TEXTS = ["yes", "yes, the duck", "no", "no frog", "the duck and the frog played", "日本", "a\nb", " two"]
PROMPTS = ["Tell me a story about a duck.", "Is the duck a frog?", "yes, the duck yes, the duck yes, the"]


@pytest.fixture(scope="module")
def loaded():
    return phi3_mlx.load("tiny")


def ids_of(length, seed=0):
    return [2 + (i * 7 + seed * 31 + i * i) % 88 for i in range(length)]


def naive_totals(model, prompt, choices):
    """Each sequence read from its beginning, in one pass."""
    totals = []
    for choice in choices:
        logits = np.array(model(mx.array([[*prompt, *choice]]))[0].astype(mx.float32), dtype=np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        totals.append(sum(logprobs[len(prompt) - 1 + n, token] for n, token in enumerate(choice)))
    return totals


CHOICES = [[5], [9], [5, 7, 11], [5, 7, 12], [*range(20, 32)], [60]]


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_totals_are_those_of_whole_sequences(name, chunk):
    model = MODELS[name]
    for length in (1, 7, ORIGINAL - 4, ORIGINAL):  # the longest choice crosses a boundary of LongRoPE
        prompt = ids_of(length)
        cache = model.make_cache([length])
        mx.eval(model.model(mx.array([prompt]), cache))
        for _ in range(2):  # the cache stays as it is
            totals = totals_of(model, cache, prompt, CHOICES, chunk)
            assert totals == pytest.approx(naive_totals(model, prompt, CHOICES), abs=2e-4)
            assert cache[0].offset == length


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_answers_with_the_likeliest_choice_and_a_stop_id(name):
    model = MODELS[name]
    prompts = [ids_of(length, seed) for seed, length in enumerate((4, 19, ORIGINAL - 4))]
    beyond = model.config.vocab_size  # the tokenizer may know more ids than the model
    jobs = [Job(prompt, 40, stop_ids={90, 91, beyond}, choices=CHOICES) for prompt in prompts]
    for group in (jobs, *([job] for job in jobs)):
        told = [[] for _ in group]
        for token in Generation.of_jobs(Scheduler(model), group):
            told[token.row].append(token)
        for job, tokens in zip(group, told, strict=True):
            totals = naive_totals(model, job.prompt, CHOICES)
            best = CHOICES[int(np.argmax(totals))]
            assert [token.id for token in tokens[:-1]] == best
            assert tokens[-1].id in job.stop_ids
            assert [token.finish_reason for token in tokens] == [None] * len(best) + ["stop"]


def test_a_choice_is_read_in_one_pass():
    run = Generation.of_jobs(
        Scheduler(MODELS["3.5-mini"]), [Job(ids_of(5), 40, stop_ids={90}, choices=[[*range(20, 32)]])]
    )
    assert len([*run]) == 13
    assert run.statistics.decode_steps == 1


def test_the_first_of_equals_is_taken():
    model = MODELS["mini-4k"]
    totals = naive_totals(model, ids_of(5), CHOICES)
    best = int(np.argmax(totals))
    others = [choice for n, choice in enumerate(CHOICES) if n != best]
    runs = Scheduler(model)
    row = runs.submit(Job(ids_of(5), 20, stop_ids={90}, choices=[*others, CHOICES[best], CHOICES[best]]))
    while runs.busy:
        runs.step()
    assert row.answer[:-1] == CHOICES[best]


def test_the_prompt_is_read_once(loaded, monkeypatch):
    model, tokenizer = loaded
    read, forward = [], type(model.model).__call__

    def counted(self, ids, *rest):
        read.append(ids.size)
        return forward(self, ids, *rest)

    monkeypatch.setattr(type(model.model), "__call__", counted)
    ids = tokenizer.encode("Once upon a time there was a duck. " * 20)
    list(phi3_mlx.stream_generate(model, tokenizer, ids, choices=TEXTS))
    assert sum(read) < 1.5 * len(ids)
    letters = read[:]
    read.clear()
    list(phi3_mlx.stream_generate(model, tokenizer, ids, choices="A,B,C,D,E,F"))
    assert sum(read) < sum(letters)


@pytest.mark.parametrize("prompt", long_after(1, PROMPTS))
def test_all_ways_to_ask_give_what_score_finds(loaded, prompt, capsys):
    model, tokenizer = loaded
    scores = phi3_mlx.score(model, tokenizer, prompt, TEXTS)
    best = max(range(len(TEXTS)), key=lambda n: scores[n].total)
    chunks = [*phi3_mlx.stream_generate(model, tokenizer, prompt, choices=TEXTS)]
    assert "".join(chunk.text for chunk in chunks) == TEXTS[best]
    assert [chunk.token for chunk in chunks[:-1]] == scores[best].tokens
    assert [chunk.logprob for chunk in chunks[:-1]] == pytest.approx(scores[best].logprobs, abs=2e-4)
    assert chunks[-1].token in tokenizer.stop_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    for options in ({"lookup": 0}, {"draft": (model, tokenizer)}, {"prefixes": phi3_mlx.PrefixStore(1 << 24)}):
        assert phi3_mlx.generate(model, tokenizer, prompt, choices=TEXTS, **options) == TEXTS[best]
    cache = phi3_mlx.PromptCache(model)
    for _ in range(2):
        assert phi3_mlx.generate(model, tokenizer, prompt, choices=TEXTS, prompt_cache=cache) == TEXTS[best]
    several = [prompt, *PROMPTS]
    texts = phi3_mlx.batch_generate(model, tokenizer, several, choices=TEXTS)
    assert texts == [phi3_mlx.generate(model, tokenizer, each, choices=TEXTS) for each in several]
    assert texts[0] == TEXTS[best]
    chat = phi3_mlx.Conversation(model, tokenizer)
    assert "".join(chunk.text for chunk in chat.send(prompt, choices=TEXTS)) == TEXTS[best]
    assert "".join(chunk.text for chunk in chat.send(prompt, choices=TEXTS)) in TEXTS
    assert chat.messages[1]["content"] == TEXTS[best]
    with pytest.raises(SystemExit):
        main(["generate", "-p", prompt, "--choices", "yes,no,the duck", "--json"])
    said = json.loads(capsys.readouterr().out)
    of_three = phi3_mlx.score(model, tokenizer, prompt, ["yes", "no", "the duck"])
    assert said["text"] == ["yes", "no", "the duck"][int(np.argmax([each.total for each in of_three]))]


def test_an_answer_may_be_cut(loaded):
    model, tokenizer = loaded
    text = "the duck and the frog played"
    *_, last = chunks = [*phi3_mlx.stream_generate(model, tokenizer, "A duck.", choices=[text], max_tokens=2)]
    assert (len(chunks), last.finish_reason) == (2, "length")
    assert phi3_mlx.generate(model, tokenizer, "A duck.", choices=[text], stop=" frog") == "the duck and the"


def test_choices_are_drawn_where_the_likeliest_token_is_not_all(loaded):
    model, tokenizer = loaded
    drawn = {
        phi3_mlx.generate(model, tokenizer, "A duck.", choices="yes,no,frog", temperature=2.0, seed=seed)
        for seed in range(12)
    }
    assert drawn <= {"yes", "no", "frog"}
    assert len(drawn) > 1


def test_a_packed_cache_is_scored_as_it_is_read():
    model = oracle.make_ours(slim(CONFIGS["phi-4-mini"]))
    prompt, bits = ids_of(20), KVBits(8, 8)
    told = [*Generation.of_jobs(Scheduler(model), [Job(prompt, 30, stop_ids={90}, kv_bits=bits, choices=CHOICES)])]
    totals = naive_totals(model, prompt, CHOICES)
    chosen = CHOICES.index([token.id for token in told[:-1]])
    assert totals[chosen] == pytest.approx(max(totals), abs=0.1)


def test_what_cannot_be_a_choice_is_refused_at_once():
    model = MODELS["mini-4k"]
    with pytest.raises(OptionError, match="choices"):
        Job([5], 20, choices=[[5], []])
    with pytest.raises(PromptError, match="outside the model's vocabulary"):
        Scheduler(model).submit(Job([5], 20, choices=[[5], [10**6]]))
    with pytest.raises(PromptError, match="context"):
        Scheduler(model, room=math.inf).submit(Job([5], 20, choices=[[5] * 5000]))


def test_a_row_that_pauses_has_chosen():
    model = MODELS["3.5-mini"]
    job = Job(ids_of(6), 30, Sampling(), stop_ids={90}, choices=CHOICES)
    alone = [token.id for token in Generation.of_jobs(Scheduler(model), [job])]
    for after in range(1, 3):
        runs = Scheduler(model)
        row = runs.submit(job)
        for _ in range(after):
            runs.step()
        runs._batch.remove(row)
        row.pause()
        runs._batch.add(row, 16)
        while runs.busy:
            runs.step()
        assert row.answer == alone
