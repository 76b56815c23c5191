"""Models, caches, conversations and tuning in several threads, and in forked processes."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time

import mlx.core as mx
import oracle
import pytest
from oracle import CONFIGS, ORIGINAL, slim
from quality_models import small_directory
from tuning_models import facts, make_directory, write_jsonl

from phi3_mlx import Conversation, PromptCache, batch_generate, generate, load, stream_generate, tune
from phi3_mlx.engine import machine
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import CacheError
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.models.decoder import Decoder
from phi3_mlx.threads import turn

ASK = "Write a story about a rabbit who finds a key."


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def elsewhere(function, *args, **options):
    """What a function gives, or raises, in a thread that ends with it."""
    results = []

    def work():
        try:
            results.append((function(*args, **options), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    (result, error) = results[0]
    if error is not None:
        raise error
    return result


def at_once(*functions):
    """The same of several functions that run at the same time; an error in the place of a result."""
    results = [None] * len(functions)

    def work(n, function):
        try:
            results[n] = function()
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=work, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def prompt_of(length, seed=0):
    return oracle.ids_of(length, seed=seed)[0].tolist()


# ------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("bits", [None, KVBits(4, 4)], ids=["plain", "4 bits"])
@pytest.mark.parametrize("name", ["mini-4k", "3.5-mini", "long-and-window"])
def test_a_cache_that_one_thread_filled_serves_in_another(name, bits, monkeypatch):
    """In every regime, out of the window, with drafts that were taken back."""
    monkeypatch.setattr(KVCache, "step", 4)
    model = oracle.make_ours(slim(CONFIGS[name]))

    def answer(prompt, cache=None, lookup=0):
        layers = cache and cache.layers_for(model)
        generation = Generation(
            model, [prompt], max_tokens=9, sampling=Sampling(), cache=layers, kv_bits=bits, lookup=lookup
        )
        if cache:
            cache.keep(generation.cache)
        return [token.id for token in generation]

    common = prompt_of(ORIGINAL - 10)
    prompts = [common + prompt_of(tail, seed=tail) for tail in (5, 20, 3, 40, 1)]
    prompts += [prompt_of(7) * 5, prompt_of(7) * 6]  # whose text repeats, so that there are drafts
    alone = [answer(prompt, lookup=4) for prompt in prompts]
    cache = PromptCache(model, kv_bits=bits and (bits.keys, bits.values))
    assert [elsewhere(answer, prompt, cache, lookup=4) for prompt in prompts] == alone


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_cache_of_a_run_that_was_broken_off_serves_in_another_thread(at, monkeypatch):
    """In the midst of a step: before the first layer, between two, and in the step after."""
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    prompt, cache = prompt_of(30), PromptCache(model)
    alone = [t.id for t in Generation(model, [[*prompt, 7]], max_tokens=5, sampling=Sampling())]

    def broken():
        generation = Generation(model, [prompt], max_tokens=9, sampling=Sampling())
        cache.keep(generation.cache)
        stream = iter(generation)
        next(stream)
        calls = []
        update = KVCache.update_and_fetch

        def interrupted(layer, keys, values):
            calls.append(layer)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            return update(layer, keys, values)

        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "update_and_fetch", interrupted)
            list(stream)

    with pytest.raises(KeyboardInterrupt):
        elsewhere(broken)
    assert len(cache.ids) >= len(prompt)
    generation = Generation(model, [[*prompt, 7]], max_tokens=5, sampling=Sampling(), cache=cache.layers_for(model))
    assert [t.id for t in generation] == alone
    assert generation.statistics.prefilled_tokens == 1


def test_a_cache_read_in_one_thread_is_written_by_another(tmp_path):
    model = oracle.make_ours(slim(CONFIGS["mini-4k"]))
    cache = PromptCache(model)
    elsewhere(cache.read, prompt_of(40))
    cache.save(tmp_path / "c.cache")
    assert elsewhere(PromptCache.load, tmp_path / "c.cache", model).ids == cache.ids == prompt_of(40)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "lookup": 0},
        {"temperature": 0.01, "seed": 3, "lookup": 16},
        {"lookup": 16},
    ],
    ids=["drawn", "drafts", "likeliest"],
)
def test_every_token_may_be_taken_by_another_thread(tiny, options):
    prompt = "Say this again and again: a cat and a dog, a cat and a dog, a cat and a dog."
    alone = generate(*tiny, prompt, max_tokens=40, **options)
    stream = elsewhere(stream_generate, *tiny, prompt, max_tokens=40, **options)
    texts = []
    while (chunk := elsewhere(next, stream, None)) is not None:
        texts.append(chunk.text)
    assert "".join(texts) == alone


@pytest.mark.parametrize("kind", ["rows", "drafts"])
def test_rows_that_end_early_and_drafts_may_be_read_by_several_threads(kind, monkeypatch):
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)  # drafts whether they pay or not
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    prompts = [prompt_of(length, seed=length) for length in (30, 47, 9)] if kind == "rows" else [prompt_of(3) * 4]
    sampling = Sampling(temperature=0.02, seed=5, repetition_penalty=1.01)

    def run(take):
        generation = Generation(model, prompts, max_tokens=30, sampling=sampling, lookup=4)
        stream, tokens = iter(generation), []
        while (token := take(next, stream, None)) is not None:
            tokens.append(token[:2])
            if token.row == 1:
                generation.finish(1)
        assert generation.statistics.drafted_tokens or kind == "rows"
        return tokens

    assert run(elsewhere) == run(lambda function, *args: function(*args))


def test_a_conversation_goes_on_in_another_thread(tiny):
    def say(conversation, text):
        return "".join(chunk.text for chunk in conversation.send(text, max_tokens=12))

    here, there = Conversation(*tiny), Conversation(*tiny)
    for text in (ASK, "Go on.", "And then?"):
        assert elsewhere(say, there, text) == say(here, text)
    assert there.messages == here.messages


def test_what_a_thread_loaded_and_trained_serves_in_others(tmp_path):
    base = make_directory(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", facts(12))
    options = {
        "steps": 2,
        "batch_size": 2,
        "validate_every": 1,
        "rank": 2,
        "samples": ("Hello",),
        "sample_tokens": 3,
        "holdout": 0.25,
    }
    result = elsewhere(tune, str(base), data, tmp_path / "adapter", **options)
    assert result.finished
    elsewhere(tune, str(base), data, tmp_path / "again", **options)
    model, tokenizer = elsewhere(load, base, adapter=tmp_path / "adapter")
    again, _ = load(base, adapter=tmp_path / "again")
    answer = generate(model, tokenizer, "Who has the ball?", max_tokens=6)
    assert answer == generate(again, tokenizer, "Who has the ball?", max_tokens=6)


# ------------------------------------------------------------------------------------------ at the same time


def test_threads_take_turns_with_a_model_and_each_gets_its_own_answer(tiny, monkeypatch):
    questions = [f"Tell me about a {thing}." for thing in ("king", "cat", "tree")]
    alone = [generate(*tiny, text, max_tokens=25) for text in questions]
    inside, most, order = [], [], []
    read = Decoder.__call__

    def watched(self, *args):
        inside.append(threading.get_ident())
        most.append(len(inside))
        order.append(inside[-1])
        try:
            return read(self, *args)
        finally:
            inside.pop()

    monkeypatch.setattr(Decoder, "__call__", watched)
    assert at_once(*(lambda text=text: generate(*tiny, text, max_tokens=25) for text in questions)) == alone
    assert max(most) == 1
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > len(order) / 3  # nobody waits until another is at its end


def test_a_thread_that_lets_go_does_not_take_the_next_turn_before_one_that_waits():
    for _ in range(20):
        order = []

        def other(order=order):
            with turn():
                order.append("other")

        thread = threading.Thread(target=other)
        with turn():
            thread.start()
            time.sleep(0.01)
        with turn():
            order.append("this")
        thread.join(60)
        assert order == ["other", "this"]


def test_a_turn_may_be_taken_within_a_turn_while_others_wait():
    waiting, done = threading.Event(), []

    def other():
        waiting.set()
        with turn():
            done.append("other")

    with turn():
        thread = threading.Thread(target=other)
        thread.start()
        waiting.wait(60)
        for _ in range(100):
            with turn():
                pass
        done.append("this")
    thread.join(60)
    assert done == ["this", "other"]


def test_a_cache_goes_to_the_newest_run_of_any_thread_and_the_other_hears_of_it(tiny):
    model, tokenizer = tiny
    cache = PromptCache(model)
    older = stream_generate(model, tokenizer, ASK, max_tokens=20, prompt_cache=cache)
    next(older)
    newer = elsewhere(generate, model, tokenizer, "Tell me about a cat.", max_tokens=8, prompt_cache=cache)
    assert newer == generate(model, tokenizer, "Tell me about a cat.", max_tokens=8)
    with pytest.raises(CacheError, match="one cache for each stream"):
        list(older)


def test_one_cache_in_many_threads_gives_right_answers_or_says_so(tiny):
    model, tokenizer = tiny
    questions = [f"{ASK} It has {n} friends." for n in range(4)]
    alone = [generate(model, tokenizer, text, max_tokens=15) for text in questions]
    cache = PromptCache(model)
    options = {"max_tokens": 15, "prompt_cache": cache}
    results = at_once(*(lambda text=text: generate(model, tokenizer, text, **options) for text in questions))
    assert any(result in alone for result in results)
    for result, right in zip(results, alone, strict=True):
        assert result == right or isinstance(result, CacheError)
    assert generate(model, tokenizer, ASK, **options) == generate(model, tokenizer, ASK, max_tokens=15)


def test_a_message_of_another_thread_ends_the_answer_that_is_open(tiny):
    conversation = Conversation(*tiny)
    open_answer = conversation.send(ASK, max_tokens=30)
    begun = next(open_answer).text
    text = elsewhere(lambda: "".join(chunk.text for chunk in conversation.send("Go on.", max_tokens=5)))
    with pytest.raises(CacheError, match="use one Conversation for each stream"):
        next(open_answer)
    assert [m["content"] for m in conversation.messages] == [ASK, begun, "Go on.", text]


def test_an_answer_that_came_to_its_end_is_none_that_was_ended(tiny):
    conversation = Conversation(*tiny)
    answer = conversation.send(ASK, max_tokens=3)
    assert [next(answer).finish_reason for _ in range(3)] == [None, None, "length"]
    list(conversation.send("Go on.", max_tokens=3))
    assert list(answer) == []


def test_messages_at_once_leave_a_conversation_that_can_go_on(tiny):
    conversation = Conversation(*tiny)

    def say(text):
        return "".join(chunk.text for chunk in conversation.send(text, max_tokens=15))

    results = at_once(*(lambda text=text: say(text) for text in ("One.", "Two.", "Three.")))
    assert all(isinstance(result, str | CacheError) for result in results)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * (len(conversation.messages) // 2)
    say("And now?")
    assert conversation.messages[-2] == {"role": "user", "content": "And now?"}


def test_a_stream_that_nobody_reads_on_ends_in_whatever_thread_finds_it(tiny):
    model, tokenizer = tiny
    before = mx.set_cache_limit(123_456_789)
    try:
        cache = PromptCache(model)
        streams = [stream_generate(model, tokenizer, ASK, max_tokens=20, prompt_cache=cache)]
        next(streams[0])
        assert machine._runs
        streams.append(streams)  # a circle, which only the collector finds
        streams = None
        elsewhere(gc.collect)
        assert not machine._runs
        assert mx.set_cache_limit(123_456_789) == 123_456_789
        again = generate(model, tokenizer, ASK, max_tokens=8, prompt_cache=cache)
        assert again == generate(model, tokenizer, ASK, max_tokens=8)
    finally:
        mx.set_cache_limit(before)


def test_many_rows_and_tuning_take_turns_as_well(tiny, tmp_path):
    base = make_directory(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", facts(12))
    texts = ["Hello.", "Tell me about a cat."]
    alone = batch_generate(*tiny, texts, max_tokens=12)
    tuned, answers = at_once(
        lambda: tune(str(base), data, tmp_path / "a", steps=3, batch_size=2, rank=2),
        lambda: batch_generate(*tiny, texts, max_tokens=12),
    )
    assert tuned.finished
    assert answers == alone
    one = tune(str(base), data, tmp_path / "b", steps=3, batch_size=2, rank=2)
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == (one.output / "adapters.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------ fork

_FORK = """
import os, signal, sys
from phi3_mlx import (
    Conversation, PromptCache, Phi3Error, compare, convert, export_adapter, export_gguf, generate, load, tune
)
if "before" in sys.argv:
    model, tokenizer = load("tiny")
    cache, stream = PromptCache(model), Conversation(model, tokenizer).send("Hello", max_tokens=3)
    generate(model, tokenizer, "Hello", max_tokens=2, prompt_cache=cache)
    next(stream)
pid = os.fork()
if pid:
    sys.exit(os.waitpid(pid, 0)[1])
signal.alarm(30)
if "before" in sys.argv:
    calls = [
        lambda: load("tiny"),
        lambda: generate(model, tokenizer, "Hello", max_tokens=2),
        lambda: next(stream),
        lambda: cache.save("nothing"),
        lambda: convert("tiny", "nothing", bits=4),
        lambda: compare(model, tokenizer, model, tokenizer, "A text."),
        lambda: tune("tiny", "nothing.jsonl", "nothing"),
        lambda: export_gguf("tiny", "nothing.gguf"),
        lambda: export_adapter("nothing", "nothing.gguf"),
    ]
    for call in calls:
        try:
            call()
        except Phi3Error as error:
            assert "forked" in str(error) and "spawn" in str(error), error
        else:
            os._exit(3)
else:
    print(generate(*load("tiny"), "Hello", max_tokens=2))
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_process_is_told_so_where_it_would_hang_and_works_where_it_would_not(when, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK, when], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_with_the_thread_that_computed_ends_well():
    code = (
        "import threading, phi3_mlx as p; model, tokenizer = p.load('tiny'); "
        "thread = threading.Thread(target=lambda: print(p.generate(model, tokenizer, 'Who?', max_tokens=3))); "
        "thread.start(); thread.join()"
    )
    for _ in range(3):  # without a wait the process was aborted every other time
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_a_process_that_ends_with_the_thread_that_converted_ends_well(method, tmp_path):
    """Nothing is compared here, so nothing takes turns."""
    source = small_directory(tmp_path / "source")
    read = {"calibration": "Once upon a time there was a duck who liked a frog. " * 60} if method == "gptq" else {}
    code = (
        "import sys, threading, phi3_mlx as p; "
        f"given = dict(method={method!r}, report=False, **{read!r}); "
        "thread = threading.Thread(target=lambda: p.convert(*sys.argv[1:], **given)); thread.start(); thread.join()"
    )
    for number in range(3):  # without a wait the process was aborted in 8 of 12 runs
        target = tmp_path / f"made-{number}"
        done = subprocess.run([sys.executable, "-c", code, source, target], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert target.exists()
