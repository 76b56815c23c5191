"""What was read is read once, and every answer is the one that it would be without."""

import functools
import gc
import math
import random
import threading

import mlx.core as mx
import moe_models
import oracle
import pytest
import small_models
from conftest import long_after
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CONFIGS, ORIGINAL, WINDOW, slim
from test_threads import elsewhere

from phi3_mlx import Conversation, PrefixStore, PromptCache, batch_generate, generate, load, score, stream_generate
from phi3_mlx.adapters.lora import AdaptedLinear, Adapter
from phi3_mlx.engine import identity, machine, scheduler
from phi3_mlx.engine.batch import Batch
from phi3_mlx.engine.continuations import Continued, score_together
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.prefill import common_length
from phi3_mlx.engine.prefix_tree import Node, nodes_along, readable, runs_of
from phi3_mlx.engine.prefixes import LEAST
from phi3_mlx.engine.rows import Row
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import OptionError
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.models.slots import SETTLED, SharedKVCache

MODELS = {
    "3.5-mini": oracle.make_ours(slim(CONFIGS["3.5-mini"])),
    "mini-4k": oracle.make_ours(slim(CONFIGS["mini-4k"])),
    "long-and-window": oracle.make_ours(slim(CONFIGS["long-and-window"])),
    "phi3-small": small_models.make({**small_models.RAW, **small_models.LONG}),
    "moe": moe_models.make_ours(moe_models.CONFIGS["gain by regime"]),
}
PLAIN = MODELS["3.5-mini"]


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    """Windows drop old tokens every few tokens, as they do with long texts."""
    patch = pytest.MonkeyPatch()
    patch.setattr(KVCache, "step", 4)
    patch.setattr(KVCache, "spare", 16)
    yield
    patch.undo()


def ids_of(length, seed):
    return [2 + (i * 7 + seed * 31 + i * i) % 90 for i in range(length)]


def answers(model, prompts, prefixes=None, n=8, bits=None, chunk=16, **options):
    """The tokens of each prompt, and how many tokens of prompts were read."""
    runs = Generation(
        model,
        prompts,
        max_tokens=n,
        sampling=Sampling(),
        kv_bits=bits,
        prefill_chunk=chunk,
        prefixes=prefixes,
        **{"room": math.inf, **options},
    )
    said = [[] for _ in prompts]
    for token in runs:
        said[token.row].append(token.id)
        if prefixes is not None:
            assert prefixes.nbytes <= prefixes.budget
    return said, runs.statistics.prefilled_tokens


@functools.cache
def alone(name, prompt, bits):
    return answers(MODELS[name], [prompt], bits=bits)[0][0]


texts = st.lists(
    st.tuples(st.integers(1, 12) | st.integers(ORIGINAL - 14, ORIGINAL + 4), st.integers(0, 2)), min_size=1, max_size=3
).map(lambda parts: tuple(token for length, seed in parts for token in ids_of(length, seed)))


@pytest.mark.parametrize("name", long_after(2, MODELS))
@settings(max_examples=8, deadline=None)
@given(
    rounds=st.lists(st.lists(texts, min_size=1, max_size=3), min_size=2, max_size=5),
    packed=st.booleans(),
    budget=st.sampled_from([1000, 60_000, 200_000, 10**8]),
    chunk=st.sampled_from([5, 16, 64]),
)
def test_random_requests_are_answered_as_without_a_store(name, rounds, packed, budget, chunk):
    """Some go on from an earlier answer, some begin alike, in one batch and in later ones."""
    model = MODELS[name]
    bits = KVBits(8, 8) if packed and model.config.head_dim % 32 == 0 else None
    prefixes, before = PrefixStore(budget), ()
    for i, prompts in enumerate(rounds):
        if i % 2:
            prompts = [before + prompt for prompt in prompts]
        said, _ = answers(model, prompts, prefixes, bits=bits, chunk=chunk)
        assert said == [alone(name, prompt, bits) for prompt in prompts]
        before = (*prompts[0], *said[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_reads_each_of_its_tokens_once(name):
    """Its own answers too, on both sides of LongRoPE's boundary and far out of the window."""
    model, prefixes, ids = MODELS[name], PrefixStore("1GB"), ids_of(20, 0)
    for turn in range(6):
        (said,), read = answers(model, [ids], prefixes, n=6)
        assert read == (9 if turn else 20)  # the last of the answer was said and not read
        ids = ids + said + ids_of(8, turn)


def test_conversations_that_take_turns_do_not_disturb_each_other():
    prefixes, system = PrefixStore("1GB"), ids_of(20, 0)
    chats = [system + ids_of(6, seed) for seed in range(4)]
    for turn in range(3):
        for i, ids in enumerate(chats):
            (said,), read = answers(MODELS["moe"], [ids], prefixes, n=4, chunk=64)
            assert read <= (7 if turn or i else 26)
            chats[i] = ids + said + ids_of(6, 7 + i)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_one_batch_that_begin_alike_read_it_once(name):
    model = MODELS[name]
    text = ids_of(ORIGINAL + 30, 0)
    prompts = [text + ids_of(3 + i, i) for i in range(5)]
    said, read = answers(model, prompts, PrefixStore("1GB"))
    assert read <= len(text) + sum(3 + i for i in range(5))
    assert said == answers(model, prompts)[0]


def test_what_begins_otherwise_does_not_wait():
    text = ids_of(40, 0)
    runs = Scheduler(PLAIN, room=math.inf, chunk=8, prefixes=PrefixStore("1GB"))
    rows = [runs.submit(Job(prompt, 4)) for prompt in (text, [*text, 5], ids_of(40, 1))]
    runs.step()
    assert [row.begun for row in rows] == [True, False, True]
    while runs.busy:
        runs.step()
    assert [row.reused for row in rows] == [0, 40, 0]


def test_newcomers_wait_for_no_few_tokens_that_one_of_them_is_about_to_read():
    text, prefixes = ids_of(ORIGINAL + 30, 0), PrefixStore("1GB")
    answers(PLAIN, [text], prefixes)
    runs = Scheduler(PLAIN, room=math.inf, prefixes=prefixes)
    rows = [runs.submit(Job([*text, *ids_of(LEAST - 1, 1), i], 4)) for i in range(3)]
    runs.step()
    assert [(row.begun, row.reused) for row in rows] == [(True, len(text))] * 3


def test_a_row_that_ends_in_shared_arrays_is_kept_where_it_is(monkeypatch):
    monkeypatch.setattr(SharedKVCache, "leave", lambda layer: pytest.fail("a row moved"))
    prefixes = PrefixStore("1GB")
    prompts = [ids_of(20, seed) for seed in range(3)]
    runs = Scheduler(PLAIN, room=math.inf, prefixes=prefixes)
    rows = [runs.submit(Job(prompt, SETTLED + 4)) for prompt in prompts]
    shared = False
    while runs.busy:
        for row in runs.step().ended:
            row.let_go()
        shared = shared or any(isinstance(layer, SharedKVCache) for row in rows for layer in row.cache)
    assert shared
    for row in rows:
        assert prefixes.shared(PLAIN, [*row.prompt, *row.answer]) == 20 + SETTLED + 3


def test_what_another_has_begun_and_fails_at_is_read_by_the_next():
    class Fails:
        reads_answer = True

        def __call__(self, answer, logits):
            raise RuntimeError("cannot go on")

    text = ids_of(40, 0)
    runs = Scheduler(PLAIN, room=math.inf, chunk=8, prefixes=PrefixStore("1GB"))
    runs.submit(Job(text, 4, processors=(Fails(),)))
    row = runs.submit(Job([*text, 5], 4))
    failed = []
    while runs.busy:
        failed += runs.step().failed
    assert len(failed) == 1
    assert len(row.answer) == 4


def test_a_shorter_prompt_and_one_that_parts_reuse_what_they_share():
    prefixes = PrefixStore("1GB")
    answers(MODELS["moe"], [ids_of(40, 0)], prefixes)
    for shared in (39, 30, 20):
        prompt = [*ids_of(shared, 0), 91, 92]
        said, read = answers(MODELS["moe"], [prompt], prefixes)
        assert read == 2
        assert said == answers(MODELS["moe"], [prompt])[0]
    assert answers(MODELS["moe"], [ids_of(40, 0)], prefixes)[1] == 1  # the parts are still there


def test_a_few_tokens_are_read_and_not_copied():
    prefixes = PrefixStore("1GB")
    answers(PLAIN, [ids_of(30, 0)], prefixes)
    assert answers(PLAIN, [[*ids_of(15, 0), 91]], prefixes)[1] == 16
    assert answers(PLAIN, [[*ids_of(16, 0), 91]], prefixes)[1] == 1


def test_regimes_and_bits_never_mix():
    prefixes, short = PrefixStore("1GB"), ids_of(ORIGINAL - 8, 0)
    answers(PLAIN, [short], prefixes, n=2)
    long = short + ids_of(20, 1)
    assert answers(PLAIN, [long], prefixes, n=2) == answers(PLAIN, [long], n=2)
    assert answers(PLAIN, [[*short, 5]], prefixes, n=2, bits=KVBits(8, 8))[1] == len(short) + 1
    assert answers(PLAIN, [[*short, 5]], prefixes, n=2)[1] == 1
    assert answers(PLAIN, [[*long, 5]], prefixes, n=2)[1] == 1
    assert answers(PLAIN, [[*short, 5]], prefixes, n=2, bits=KVBits(8, 8))[1] == 1
    assert answers(PLAIN, [[*short, 5]], prefixes, n=2, bits=KVBits(8, 4))[1] == len(short) + 1


def test_other_weights_are_another_model():
    prefixes, prompt = PrefixStore("1GB"), ids_of(40, 0)
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]), seed=3)
    answers(model, [prompt], prefixes)
    assert answers(PLAIN, [prompt], prefixes)[1] == 40
    layer = model.model.layers[0].mlp.down_proj
    before = layer.weight
    layer.weight = before * 1.5
    assert answers(model, [prompt], prefixes) == answers(model, [prompt])
    layer.weight = before
    assert answers(model, [prompt], prefixes)[1] == 1
    model.model.longrope = "long"
    assert answers(model, [prompt], prefixes) == answers(model, [prompt])
    held = prefixes.nbytes
    del layer, before, model
    gc.collect()
    answers(PLAIN, [prompt], prefixes)
    assert prefixes.nbytes <= held / 2  # what a model read that is gone goes too


def test_a_weight_that_is_written_into_makes_another_model():
    model, prefixes, prompt = oracle.make_ours(slim(CONFIGS["3.5-mini"])), PrefixStore("1GB"), ids_of(40, 0)
    for layer in (model.model.layers[0].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
        answers(model, [prompt], prefixes)
        assert answers(model, [prompt], prefixes)[1] == 1
        layer.weight[0] = layer.weight[1] * 2
        assert answers(model, [prompt], prefixes) == answers(model, [prompt])
    held = prefixes.nbytes
    layer.weight[0] = layer.weight[0] * 2
    assert answers(model, [prompt], prefixes) == answers(model, [prompt])
    assert prefixes.nbytes == held  # what was read before goes, for no model is as it was


def test_on_an_nvidia_gpu_weights_are_not_looked_at_and_clear_helps(monkeypatch):
    monkeypatch.setattr(identity, "on_cuda", lambda: True)
    model, prefixes, prompt = oracle.make_ours(slim(CONFIGS["3.5-mini"])), PrefixStore("1GB"), ids_of(40, 0)
    answers(model, [prompt], prefixes)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight[0] = weight[1] * 2
    assert answers(model, [prompt], prefixes)[1] == 1
    prefixes.clear()
    assert answers(model, [prompt], prefixes) == answers(model, [prompt])


def test_a_store_keeps_no_weights_alive():
    prefixes, prompt = PrefixStore("1GB"), ids_of(100, 0)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    weights = mx.get_active_memory() - before
    answers(model, [prompt], prefixes, chunk=128)
    del model
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() - before < prefixes.nbytes + weights / 4


def test_adapters_put_on_and_off_never_mix():
    model, prefixes, prompt = oracle.make_ours(slim(CONFIGS["3.5-mini"])), PrefixStore("1GB"), ids_of(40, 0)
    attention = model.model.layers[0].self_attn
    plain = attention.o_proj
    outputs, inputs = plain.weight.shape
    adapter = Adapter(mx.random.normal((inputs, 4), key=mx.random.key(0)), mx.ones((4, outputs)), 0.5)
    adapted = AdaptedLinear(plain, {"mine": adapter})
    attention.o_proj = adapted
    for weights in ({}, {"mine": 1.0}, {"mine": 0.5}, {}, {"mine": 1.0}):
        adapted.use(weights)
        first, again = answers(model, [prompt], prefixes), answers(model, [prompt], prefixes)
        assert first[0] == again[0] == answers(model, [prompt])[0]
        assert again[1] == 1
    assert first[1] == 1  # known from before
    attention.o_proj = plain
    assert answers(model, [prompt], prefixes)[0] == answers(model, [prompt])[0]


def test_what_a_model_read_while_it_was_changed_is_not_kept():
    model, prefixes, prompt = oracle.make_ours(slim(CONFIGS["3.5-mini"])), PrefixStore("1GB"), ids_of(30, 0)
    layer = model.model.layers[0].mlp.down_proj
    before, other = layer.weight, layer.weight * 1.5
    tokens = iter(Generation(model, [prompt], max_tokens=10, sampling=Sampling(), room=math.inf, prefixes=prefixes))
    said = [next(tokens).id]
    layer.weight = other
    said += [token.id for token in tokens]
    longer = [prompt + said + [5]]
    assert answers(model, longer, prefixes)[1] == len(longer[0])
    layer.weight = before
    assert answers(model, longer, prefixes) == (answers(model, longer)[0], len(said) + 1)


def test_a_window_that_has_gone_on_is_no_beginning():
    root = Node([], None)
    first = root.add([1, 2, 3, 4], None, 0)  # of these the keys are gone
    second = first.add([5, 6, 7, 8], [[mx.zeros((1, 1, 4, 2))]], 0)
    second.add([9], [[mx.zeros((1, 1, 1, 2))]], 0)
    path = nodes_along(root, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert [(node.ids[0], shared) for node, shared in path] == [(1, 4), (5, 4), (9, 1)]
    assert readable(path, 5) == (4, 9)
    assert readable(path, 6) == (4, 9)
    assert readable(path, 7) == (0, 0)
    assert readable(path, None) == (0, 0)
    assert readable(nodes_along(root, [1, 2, 3, 4, 5, 6, 7]), 4) == (4, 7)
    assert readable(nodes_along(root, [1, 2, 3, 4, 5, 6, 7]), 5) == (0, 0)


def test_a_window_leaves_early_tokens_and_is_taken_over_all_the_same():
    model, prefixes = MODELS["mini-4k"], PrefixStore("1GB")
    prompt = ids_of(30, 0)
    (said,), _ = answers(model, [prompt], prefixes, n=3 * WINDOW)  # the prompt's end has left the window
    longer = prompt + said + [5]
    assert answers(model, [longer], prefixes) == (answers(model, [longer])[0], 2)
    half = [*longer[: len(prompt) + WINDOW // 2], 5]  # its window was not kept
    assert answers(model, [half], prefixes)[0] == answers(model, [half])[0]


def test_of_a_window_no_more_is_copied_than_a_cache_keeps():
    model, prompt = MODELS["mini-4k"], ids_of(WINDOW + 60, 0)
    prefixes = PrefixStore("1GB")
    answers(model, [prompt], prefixes, n=1)
    read = len(prompt)
    (layer, *_) = prefixes.cache_for(model, [*prompt, 5])
    assert layer.offset == read
    assert layer.start == layer.first_kept(read) > 0


def test_what_stands_behind_the_last_readable_token_is_not_taken_over():
    """Of the ids 4 and 5 a window had left the keys and values, and 6 and 7 alone do not fill it."""
    root, array = Node([], None), mx.zeros((1, 1, 3, 4))
    gap = root.add([1, 2, 3], [[array]], 0).add([4, 5], None, 0)
    gap.add([6, 7], [[array[..., :2, :]]], 0)
    path = nodes_along(root, [1, 2, 3, 4, 5, 6, 7])
    assert readable(path, 5) == (0, 3)
    assert [(run.first, run.last) for run in runs_of(path, 0, 0, 3)] == [(0, 3)]


def test_what_is_split_off_counts_as_written_and_used():
    root = Node([], None)
    node = root.add([1, 2, 3], [[mx.zeros((1, 1, 3, 4))]], 7)
    node.saved = True
    front = node.split(2)
    assert (front.ids, front.saved, front.used) == ([1, 2], True, 7)
    assert (node.ids, node.parent, root.children) == ([3], front, {1: front})
    assert (front.nbytes, node.nbytes) == (2 * 16, 16)


def test_what_a_thread_splits_others_read_and_but_a_layer_is_there_twice():
    root, layers = Node([], None), [[mx.full((1, 1, 4, 50_000), float(n))] for n in range(8)]
    mx.eval(layers)
    one = layers[0][0].nbytes
    node = root.add([1, 2, 3, 4], layers, 0)
    del layers
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    front = elsewhere(node.split, 1)
    assert mx.get_peak_memory() - before < 4 * one
    for half, length in ((front, 1), (node, 3)):
        assert [array.shape[2] for layer in half.layers for array in layer] == [length] * 8
        assert [array.max().item() for layer in half.layers for array in layer] == [*range(8)]


def test_common_length_is_the_one_that_counting_gives():
    for n in range(9):
        for m in range(9):
            for cut in range(9):
                a, b = [7] * n, [7] * min(cut, m) + [8] * max(m - cut, 0)
                expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(n, m))
                assert common_length(a, b) == expected


# Memory


def test_the_least_recently_used_goes_first():
    model, prompts = MODELS["moe"], [ids_of(32, seed) for seed in range(4)]
    token = sum(layer.nbytes for layer in read_by(model, prompts[0])) // 32
    prefixes = PrefixStore(token * 70)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        answers(model, [prompt], prefixes, n=1)
    assert [prefixes.shared(model, prompt) for prompt in prompts] == [31, 0, 31, 0]
    assert prefixes.nbytes == 64 * token


def test_what_is_given_takes_the_place_of_what_was_not_used_longest():
    model, prompts = MODELS["moe"], [ids_of(32, seed) for seed in range(3)]
    caches = [read_by(model, prompt) for prompt in prompts]
    token = sum(layer.nbytes for layer in caches[0]) // 32
    prefixes = PrefixStore(token * 70)
    state = prefixes.state_of(model)
    for cache in caches:  # by no run, which would make room before
        prefixes.give(model, cache, state)
    assert [prefixes.shared(model, prompt) for prompt in prompts] == [0, 31, 31]


def test_giving_way_frees_what_is_asked_for_and_no_prefix_more():
    model, prompts = MODELS["moe"], [ids_of(32, seed) for seed in range(4)]
    token = sum(layer.nbytes for layer in read_by(model, prompts[0])) // 32
    prefixes = PrefixStore("1GB")
    for prompt in prompts:
        answers(model, [prompt], prefixes, n=1, chunk=64)
    assert prefixes.nbytes == 4 * 32 * token
    prefixes.give_way(33 * token)
    assert [prefixes.shared(model, prompt) for prompt in prompts] == [0, 0, 31, 31]
    prefixes.give_way(math.inf)
    assert prefixes.nbytes == 0


def read_by(model, prompt):
    cache = model.make_cache(len(prompt))
    mx.eval(model(mx.array([prompt]), cache))
    return cache


def test_a_text_larger_than_the_budget_is_kept_in_part():
    model, prompt = MODELS["moe"], ids_of(64, 0)
    token = sum(layer.nbytes for layer in read_by(model, prompt)) // 64
    prefixes = PrefixStore(token * 40 + 1)
    answers(model, [prompt], prefixes, n=1)
    assert prefixes.nbytes == 40 * token
    assert answers(model, [prompt], prefixes, n=1)[1] == 24


def test_what_it_holds_is_what_it_says():
    """No buffer of a run stays alive behind what was kept of it."""
    prompt = ids_of(601, 0)
    answers(PLAIN, [prompt], n=2)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    prefixes = PrefixStore("1GB")
    answers(PLAIN, [prompt], prefixes, n=2, chunk=512)
    answers(PLAIN, [[*prompt[:333], 5]], prefixes, n=2)
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory() - before
    assert prefixes.nbytes <= held <= prefixes.nbytes * 1.1
    prefixes.clear()
    mx.clear_cache()
    assert mx.get_active_memory() - before < held / 10


def test_a_prefix_is_moved_where_there_is_no_room_for_a_copy_and_else_it_stays():
    prompt, other = ids_of(1201, 0), ids_of(900, 1)
    prefixes = PrefixStore("1GB")
    for text in (prompt, other):
        answers(PLAIN, [text], prefixes, n=1, chunk=512)
    both = prefixes.nbytes
    cache = prefixes.cache_for(PLAIN, [*prompt, 5])
    assert (cache[0].offset, prefixes.nbytes) == (1201, both)  # a copy
    del cache
    cache = prefixes.cache_for(PLAIN, [*prompt, 5], lacking=1)
    assert prefixes.shared(PLAIN, other) < 899  # what was not used longest gives way first
    assert prefixes.shared(PLAIN, [*prompt, 5]) == 1201  # and that is enough
    del cache
    gc.collect()
    mx.clear_cache()
    held, before = prefixes.nbytes, mx.get_active_memory()
    mx.reset_peak_memory()
    cache = prefixes.cache_for(PLAIN, [*prompt, 5], lacking=held)
    assert cache[0].offset == 1201
    assert prefixes.nbytes == prefixes.shared(PLAIN, [*prompt, 5]) == 0
    assert mx.get_peak_memory() - before < 0.2 * held  # a layer at a time, where `other` was
    run = Generation(PLAIN, [[*prompt, 5]], max_tokens=8, sampling=Sampling(), cache=cache, room=math.inf)
    assert [token.id for token in run] == answers(PLAIN, [[*prompt, 5]])[0][0]


def test_the_store_gives_way_before_a_job_waits(monkeypatch):
    monkeypatch.setattr(scheduler, "ANSWER_BLOCK", 8)
    prompts = [ids_of(40, seed) for seed in range(3)]
    lone = Scheduler(PLAIN, room=math.inf, chunk=16)
    lone.submit(Job(prompts[0], 4))
    lone.admit()
    room = lone._plan.total - lone._plan.weights + 80_000
    prefixes = PrefixStore("1GB")
    for prompt in prompts:
        before = prefixes.nbytes
        said, _ = answers(PLAIN, [prompt], prefixes, n=4, room=room)
        assert said == answers(PLAIN, [prompt], n=4)[0]
        assert 0 < prefixes.nbytes <= room
    assert before > 0
    assert prefixes.shared(PLAIN, prompts[2]) == 39
    assert prefixes.shared(PLAIN, prompts[0]) < 39


@pytest.mark.parametrize("times", [1.2, 2.2])
def test_runs_and_the_store_together_stay_within_their_room(times):
    draws = random.Random(1)
    texts = [ids_of(draws.randint(200, 900), seed) for seed in range(6)]
    lone = Scheduler(PLAIN, room=math.inf)
    lone.submit(Job(ids_of(1000, 0), 64))
    lone.admit()
    room = (lone._plan.total - lone._plan.weights) * times
    del lone
    gc.collect()
    mx.clear_cache()
    before, prefixes = mx.get_active_memory(), PrefixStore("1GB")
    mx.reset_peak_memory()
    runs = Scheduler(PLAIN, room=room, prefixes=prefixes)
    rows = [
        runs.submit(Job([*draws.choice(texts), *ids_of(draws.randint(5, 60), i)], draws.choice([10, 30, None])))
        for i in range(12)
    ]
    while runs.busy:
        assert not runs.step().failed
        for row in rows:
            if len(row.answer) >= 40:
                row.finish()
    assert mx.get_peak_memory() - before <= room
    assert prefixes.nbytes > 0
    assert any(row.reused > 100 for row in rows)


@pytest.mark.parametrize(("name", "shares"), [("moe", False), ("3.5-mini", True)], ids=["alone", "sharing"])
def test_a_paused_row_goes_on_from_what_it_had_read(name, shares, monkeypatch):
    monkeypatch.setattr(scheduler, "FORCED", 0)
    monkeypatch.setattr(scheduler, "ANSWER_BLOCK", 8)
    monkeypatch.setattr("phi3_mlx.engine.fitting.ANSWER_BLOCK", 8)
    monkeypatch.setattr("phi3_mlx.models.slots.SETTLED", 0 if shares else math.inf)
    model, prompts = MODELS[name], [ids_of(30, seed) for seed in range(3)]
    expected = answers(model, prompts, n=40)[0]
    wide = Scheduler(model, room=math.inf, chunk=16)
    for prompt in prompts:
        wide.submit(Job(prompt))
    wide.admit()
    room = wide._plan.total - wide._plan.weights + (20_000 if name == "moe" else 60_000)
    prefixes = PrefixStore("1GB")
    runs = Scheduler(model, room=room, chunk=16, prefixes=prefixes)
    rows = [runs.submit(Job(prompt)) for prompt in prompts]
    again, paused, pause = {}, [], Row.pause
    monkeypatch.setattr(Row, "pause", lambda row: paused.append(prefixes.shared(model, row_ids(row))) or pause(row))
    shared = []
    while runs.busy and min(len(row.answer) for row in rows) < 40:
        shared.append(any(isinstance(row.cache[0], SharedKVCache) for row in runs._batch.rows))
        runs.step()
        assert sum(layer.nbytes for row in runs._batch.rows for layer in row.cache) + prefixes.nbytes <= room
        for row in rows:
            if len(row.prompt) > 30 and row.begun:
                again.setdefault(row, row.reused)
            if len(row.answer) >= 60:
                row.finish()
    assert any(shared) == shares
    assert again
    assert max(again.values()) > 30
    assert max(paused) > 30
    assert [row.answer[:40] for row in rows] == expected


def row_ids(row):
    """What a row has read and said, and a token more."""
    return [*row.job.prompt, *row.answer, 0]


def test_two_threads_share_a_store():
    prefixes, text = PrefixStore(400_000), ids_of(40, 0)
    prompts = [text + ids_of(4 + i, i) for i in range(12)]
    expected = [answers(PLAIN, [prompt])[0][0] for prompt in prompts]
    said = {}

    def work(numbers):
        for i in numbers:
            said[i] = answers(PLAIN, [prompts[i]], prefixes)[0][0]

    threads = [threading.Thread(target=work, args=(range(first, 12, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[i] for i in range(12)] == expected


# What people call


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


def test_a_second_question_about_a_text_reads_the_question_alone(loaded):
    prefixes, story = PrefixStore(), "Once there was a dog who had a red ball and a blue hat. " * 5
    for i, owner in enumerate(("dog", "owl")):
        question = f"{story}\nWhat did the {owner} have?"
        chunks = list(stream_generate(*loaded, question, max_tokens=6, prefixes=prefixes))
        assert "".join(chunk.text for chunk in chunks) == generate(*loaded, question, max_tokens=6)
        assert chunks[-1].prefilled_tokens < (15 if i else 1000)
    texts = batch_generate(*loaded, [f"{story}\nWho had the {it}?" for it in ("hat", "ball")], prefixes=prefixes)
    assert texts == batch_generate(*loaded, [f"{story}\nWho had the {it}?" for it in ("hat", "ball")])
    assert repr(prefixes).startswith("<PrefixStore: ")


def test_conversations_share_a_store(loaded):
    prefixes = PrefixStore()
    chats = [
        Conversation(*loaded, system="Answer in one sentence, please, and be kind.", prefixes=p)
        for p in (prefixes, prefixes, None)
    ]
    for text in ("Who are you?", "Tell me about a duck.", "And a frog?"):
        said = []
        for chat in chats:
            chunks = list(chat.send(text, max_tokens=12))
            said.append(("".join(chunk.text for chunk in chunks), chunks[-1].prefilled_tokens))
        assert len({text for text, _ in said}) == 1
        assert said[0][1] <= said[2][1] + 1
        assert said[1][1] == 1  # the first has asked the same
    assert chats[0].cached_tokens >= chats[2].cached_tokens - 2


def test_an_answer_that_is_broken_off_is_kept_up_to_there(loaded):
    prefixes = PrefixStore()
    chat = Conversation(*loaded, prefixes=prefixes)
    answer = chat.send("Tell me a story about a duck and a frog.", max_tokens=60)
    for _ in range(40):
        next(answer)
    answer.close()
    chunks = list(chat.send("Go on.", max_tokens=2))
    assert chunks[-1].prefilled_tokens < 15


@pytest.mark.parametrize("given", ["2GB", 5, True, {}])
def test_another_thing_than_a_store_is_refused_in_one_line(loaded, given):
    with pytest.raises(OptionError, match=r"^prefixes is .+; expected a PrefixStore$"):
        generate(*loaded, "Hi", prefixes=given)
    with pytest.raises(OptionError, match=r"^prefixes is .+; expected a PrefixStore$"):
        Conversation(*loaded, prefixes=given)


@pytest.mark.parametrize("budget", ["much", None, True, [], 0, -1, "0GB"])
def test_a_budget_that_is_no_size_is_refused_in_one_line(budget):
    with pytest.raises(OptionError) as error:
        PrefixStore(budget)
    assert "\n" not in str(error.value)


def test_a_prompt_cache_beside_a_store_is_refused(loaded):
    with pytest.raises(OptionError, match=r"^prefixes has no effect beside a prompt_cache"):
        generate(*loaded, "Hi", prefixes=PrefixStore(), prompt_cache=PromptCache(loaded[0]))


def test_memory_that_runs_out_names_the_numbers_still(monkeypatch):
    monkeypatch.setattr(machine, "room", lambda: 1000)
    with pytest.raises(Exception, match="may be used"):
        answers(PLAIN, [ids_of(40, 0)], PrefixStore("1GB"), room=None)


# Scores


def scored(model, continued, prefixes=None, bits=None):
    (of_prompt,) = score_together(model, [continued], prefixes=prefixes, kv_bits=bits)
    return [[token.logprob for token in tokens] for tokens in of_prompt]


@pytest.mark.parametrize("bits", [None, KVBits(8, 8)], ids=["plain", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_without_a_store_on_both_sides_of_the_boundary(name, bits, read_tokens):
    """Some continuations of the prompt are short, some long; what each regime has read before is not read again."""
    model, prefixes = MODELS[name], PrefixStore("1GB")
    bits = bits if model.config.head_dim % 32 == 0 else None
    text = ids_of(ORIGINAL - 12, 0)
    for seed in range(3):
        prompt = [*text, *ids_of(2, 3 + seed)]
        ends = [ids_of(count, 5 + seed + count) for count in (1, 1, 3, 4, 20, 20, 25)]
        continued = [Continued((*prompt, *end), len(prompt)) for end in ends]
        expected = scored(model, continued, bits=bits)
        read_tokens.clear()
        found = scored(model, continued, prefixes, bits)
        assert max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)) < 1e-4
        if seed and model.config.sliding_window is None:
            regimes = 2 if model.model.is_long(10**6) != model.model.is_long(1) else 1
            assert sum(read_tokens) <= 4 * regimes + sum(map(len, ends))


@pytest.fixture
def read_tokens(monkeypatch):
    """Tokens of prompts that each step has read."""
    read, step = [], Batch.step

    def noted(self, *given, **options):
        done = step(self, *given, **options)
        read.append(done.read_tokens)
        return done

    monkeypatch.setattr(Batch, "step", noted)
    return read


def test_what_an_answer_has_read_is_scored_behind_and_the_other_way_round(read_tokens):
    prefixes, text = PrefixStore("1GB"), ids_of(40, 0)
    (said,), _ = answers(PLAIN, [text], prefixes, n=6)
    continued = [Continued((*text, *said[:4]), len(text))]
    read_tokens.clear()
    found = scored(PLAIN, continued, prefixes)
    assert sum(read_tokens) <= 5
    assert abs(math.fsum(found[0]) - math.fsum(scored(PLAIN, continued)[0])) < 1e-4
    longer = [*text, *ids_of(8, 1)]
    scored(PLAIN, [Continued((*longer, 9, 8), len(longer)), Continued((*longer, 7, 8), len(longer))], prefixes)
    assert answers(PLAIN, [[*longer, 5]], prefixes) == (answers(PLAIN, [[*longer, 5]])[0], 2)


def test_a_token_that_is_scored_is_never_taken_over(read_tokens):
    """Its log-probability comes of the token before it, which is read anew."""
    prefixes, ids = PrefixStore("1GB"), ids_of(50, 0)
    answers(PLAIN, [ids], prefixes)
    for scored_from in (18, 30, 50 - 1):
        continued = [Continued(tuple(ids), scored_from)]
        read_tokens.clear()
        (found,) = scored(PLAIN, continued, prefixes)
        (expected,) = scored(PLAIN, continued)
        assert len(found) == len(ids) - scored_from
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
        assert read_tokens[0] <= len(ids) - scored_from + 1


def test_score_takes_a_store(loaded):
    prefixes, story = PrefixStore(), "Once there was a dog who had a red ball and a blue hat. " * 5
    question = f"{story}\nWhat did the dog have?"
    expected = score(*loaded, question, ["A red ball.", "A duck."])
    for _ in range(2):
        found = score(*loaded, question, ["A red ball.", "A duck."], prefixes=prefixes)
        for one, other in zip(found, expected, strict=True):
            assert abs(one.total - other.total) < 1e-3
    chunks = list(stream_generate(*loaded, question, max_tokens=2, prefixes=prefixes))
    assert chunks[-1].prefilled_tokens < 10
    with pytest.raises(OptionError, match=r"^prefixes is .+; expected a PrefixStore$"):
        score(*loaded, question, ["A duck."], prefixes="2GB")


# Draft models


def test_a_draft_model_reads_only_what_is_new_too():
    prefixes, draft = PrefixStore("1GB"), oracle.make_ours(slim(CONFIGS["3.5-mini"]), seed=4)
    prompt = ids_of(28, 0)
    (said,), _ = answers(PLAIN, [prompt], prefixes, draft=draft)
    assert said == answers(PLAIN, [prompt])[0][0]
    assert prefixes.shared(draft, [*prompt, 5]) >= 27
    runs = Scheduler(PLAIN, room=math.inf, chunk=16, prefixes=prefixes)
    row = runs.submit(Job([*prompt, *said, 5], 4, draft=draft))
    runs.step()
    assert row.draft.reused >= 27
    while runs.busy:
        runs.step()
    assert row.answer == answers(PLAIN, [[*prompt, *said, 5]], n=4)[0][0]
    assert answers(PLAIN, [[*prompt, 9]], prefixes)[1] == 1  # of the two models none takes the other's
    assert answers(draft, [[*prompt, 9]], prefixes) == (answers(draft, [[*prompt, 9]])[0], 1)
