"""The cache under whatever a caller does to it: the next logits are those of one pass over the ids that survive."""

import copy

import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import CONFIGS, ORIGINAL, WINDOW, ids_of, last_logits, slim

from phi3_mlx.models.cache import KVBits, KVCache, fork, kv_bytes
from phi3_mlx.models.layer import DecoderLayer

SAME = 3e-4  # float32 sums in another order
NAMES = ["mini-4k", "3.5-mini", "phi-4-mini", "long-and-window"]
MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in NAMES}
IDS = ids_of(400)


@pytest.fixture(params=NAMES)
def model(request):
    return MODELS[request.param]


@pytest.fixture
def small_step(monkeypatch):
    """Caches that grow and drop four slots at a time, so that short tests meet what long runs meet."""
    monkeypatch.setattr(KVCache, "step", 4)


@pytest.fixture
def work(monkeypatch):
    """Counts tokens x layers that go into a cache, whoever asked for them."""
    counted = []
    plain = KVCache.update_and_fetch

    def counting(self, keys, values):
        counted.append(keys.shape[0] * keys.shape[2])
        return plain(self, keys, values)

    monkeypatch.setattr(KVCache, "update_and_fetch", counting)
    return counted


def tokens_read(model, counted: list[int]) -> int:
    tokens = sum(counted) // len(model.layers)
    counted.clear()
    return tokens


def feed(model, cache, ids, chunk: int = 512) -> np.ndarray:
    for first in range(0, ids.shape[1], chunk):
        last = last_logits(model, ids[:, first : first + chunk], cache)
    return last


def trim(cache, n: int) -> None:
    assert {layer.trim(n) for layer in cache} == {n}


def assert_same(model, last: np.ndarray, ids: np.ndarray) -> None:
    """`last` is what the reference gives for `ids` from scratch (tests/test_model.py ties a fresh pass to it)."""
    assert np.abs(last - last_logits(model, ids)).max() < SAME


# The prompt's length, told in advance


@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL])
@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_a_declared_prompt_is_read_once(chunk, length, work):
    model = MODELS["3.5-mini"]
    ids = IDS[:, :length]
    last = feed(model, model.make_cache(prompt_length=length), ids, chunk)
    assert tokens_read(model, work) == length
    assert_same(model, last, ids)


def test_an_undeclared_prompt_is_read_again_once(work):
    model, length = MODELS["3.5-mini"], ORIGINAL + 30
    cache = model.make_cache()
    feed(model, cache, IDS[:, :length], 10)
    assert tokens_read(model, work) == length + ORIGINAL // 10 * 10
    feed(model, cache, IDS[:, length : length + 5], 1)
    assert tokens_read(model, work) == 5


def test_a_model_without_regimes_reads_nothing_twice(work):
    model = MODELS["mini-4k"]
    feed(model, model.make_cache(), IDS[:, :100], 7)
    assert tokens_read(model, work) == 100


def test_crossing_in_decode_reads_the_prompt_again_once(work):
    model = MODELS["phi-4-mini"]
    cache = model.make_cache(prompt_length=ORIGINAL)
    feed(model, cache, IDS[:, :ORIGINAL])
    tokens_read(model, work)
    for t in range(ORIGINAL, ORIGINAL + 4):
        assert_same(model, last_logits(model, IDS[:, t : t + 1], cache), IDS[:, : t + 1])
        assert tokens_read(model, work) == (1 + ORIGINAL if t == ORIGINAL else 1)


def test_declared_lengths_of_a_ragged_batch(work):
    model, lengths = MODELS["3.5-mini"], (ORIGINAL + 6, ORIGINAL - 8, 3)
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    rows = [ids_of(n, seed=n) for n in lengths]
    batch = np.concatenate([np.pad(row, ((0, 0), (pad, 0))) for row, pad in zip(rows, padding, strict=True)])
    cache = model.make_cache(prompt_length=lengths, left_padding=padding)
    last = feed(model, cache, batch, 11)
    assert tokens_read(model, work) == 3 * longest
    for i, row in enumerate(rows):
        assert_same(model, last[i : i + 1], row)


def test_one_declared_length_serves_every_row_of_an_even_batch():
    model, ids = MODELS["3.5-mini"], ids_of(ORIGINAL + 6, rows=2)
    assert_same(model, feed(model, model.make_cache(prompt_length=ORIGINAL + 6), ids, 20), ids)


def test_a_declaration_does_not_outlive_a_trim():
    """A prompt that was given up half way leaves a cache that tells the truth about the next one."""
    model = MODELS["3.5-mini"]
    cache = model.make_cache(prompt_length=ORIGINAL + 20)
    feed(model, cache, IDS[:, :10])
    trim(cache, 10)
    assert_same(model, feed(model, cache, IDS[:, :20]), IDS[:, :20])


# Trimming


@pytest.mark.parametrize("chunk", [1, 512])
def test_trim_back_over_the_boundary_and_forth_again(model, chunk, small_step):
    cache = model.make_cache()
    feed(model, cache, IDS[:, : ORIGINAL + 9], 20)
    trim(cache, 15)  # to ORIGINAL - 6: short again
    assert_same(model, feed(model, cache, IDS[:, ORIGINAL - 6 : ORIGINAL - 3], chunk), IDS[:, : ORIGINAL - 3])
    other = ids_of(20, seed=5)
    expected = np.concatenate([IDS[:, : ORIGINAL - 3], other], axis=1)
    assert_same(model, feed(model, cache, other, chunk), expected)


def test_trim_to_exactly_the_boundary(model):
    cache = model.make_cache()
    feed(model, cache, IDS[:, : ORIGINAL + 2])
    trim(cache, 3)  # next total: ORIGINAL, the last short one
    assert_same(model, feed(model, cache, IDS[:, ORIGINAL - 1 : ORIGINAL]), IDS[:, :ORIGINAL])
    assert_same(model, feed(model, cache, IDS[:, ORIGINAL : ORIGINAL + 1]), IDS[:, : ORIGINAL + 1])


@pytest.mark.parametrize("keep", [1, WINDOW - 1, WINDOW, 60, 299, 330])
@pytest.mark.parametrize("name", ["mini-4k", "long-and-window"])
def test_trim_into_what_the_window_dropped(name, keep):
    model = MODELS[name]
    cache = model.make_cache()
    feed(model, cache, IDS[:, :340], 50)
    assert cache[0].start > 0, "the window dropped nothing"
    trim(cache, 340 - keep)
    assert_same(model, feed(model, cache, IDS[:, keep : keep + 1]), IDS[:, : keep + 1])
    assert_same(model, feed(model, cache, IDS[:, keep + 1 : keep + 8], 3), IDS[:, : keep + 8])


@pytest.mark.parametrize("lost", [False, True])
def test_a_trim_reads_again_from_the_first_length_whose_window_is_gone(lost):
    model = MODELS["mini-4k"]
    cache = model.make_cache()
    feed(model, cache, IDS[:, :340], 50)
    keep = cache[0].start + WINDOW - 1 - lost  # the next token sees itself and WINDOW - 1 before it
    assert cache[0].start > 0
    assert [cache[0].lost_at(keep), cache[0].lost_at(keep - 1), cache[0].lost_at(0)] == [lost, True, True]
    trim(cache, 340 - keep)
    assert_same(model, feed(model, cache, IDS[:, keep : keep + 1]), IDS[:, : keep + 1])


def test_trim_after_a_crossing_sees_no_key_of_the_old_regime(monkeypatch):
    """Slots older than the window, kept by the bulk drop, come back into sight by a trim."""
    monkeypatch.setattr(KVCache, "step", 12)
    raw = {**slim(CONFIGS["long-and-window"]), "sliding_window": 8}
    model = oracle.make_ours(raw)
    for before in range(ORIGINAL - 14, ORIGINAL):
        cache = model.make_cache()
        feed(model, cache, IDS[:, :before])
        feed(model, cache, IDS[:, before : ORIGINAL + 1], 1)
        trim(cache, 6)
        assert_same(model, feed(model, cache, IDS[:, ORIGINAL - 5 : ORIGINAL + 2]), IDS[:, : ORIGINAL + 2])


def test_trim_to_nothing_and_start_over(model):
    cache = model.make_cache()
    feed(model, cache, IDS[:, : ORIGINAL + 20], 30)
    trim(cache, ORIGINAL + 20)
    assert cache[0].empty()
    assert cache[0].offset == cache[0].size() == cache[0].nbytes == 0
    other = ids_of(ORIGINAL + 3, seed=9)
    for first in range(0, ORIGINAL + 3, 17):
        assert_same(model, feed(model, cache, other[:, first : first + 17]), other[:, : first + 17])


def test_trim_more_than_there_is_says_how_many_it_forgot():
    cache = MODELS["3.5-mini"].make_cache()
    feed(MODELS["3.5-mini"], cache, IDS[:, :5])
    assert cache[0].is_trimmable()
    assert cache[0].trim(9) == 5
    assert cache[1].trim(0) == 0
    assert cache[1].offset == 5


def test_rejected_draft_tokens_leave_no_trace_at_the_boundary(model):
    """Speculation: five tokens are tried, two kept, the rest trimmed, wherever the boundary falls."""
    cache, n = model.make_cache(), ORIGINAL - 12
    feed(model, cache, IDS[:, :n])
    while n < ORIGINAL + 8:
        draft = np.concatenate([IDS[:, n : n + 2], ids_of(3, seed=n)], axis=1)
        feed(model, cache, draft)
        trim(cache, 3)
        n += 2
        probe = copy.deepcopy(cache)
        assert_same(model, feed(model, probe, IDS[:, n : n + 1]), IDS[:, : n + 1])


@pytest.mark.parametrize("name", ["mini-4k", "long-and-window"])
def test_an_interrupted_second_reading_is_done_again(name, monkeypatch):
    """Ctrl-C while the cache is recomputed: the next call finds the cache right or recomputes it."""
    model = MODELS[name]
    cache = model.make_cache()
    feed(model, cache, IDS[:, :340], 50)
    trim(cache, 60)
    assert cache[0].lost

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayer, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(model, cache, IDS[:, 280:281])
    assert_same(model, feed(model, cache, IDS[:, 280:281]), IDS[:, :281])


@pytest.mark.parametrize("length", [20, ORIGINAL])
def test_an_interrupted_step_counts_for_no_layer(model, length, monkeypatch):
    """Ctrl-C between two layers must not leave one of them a token ahead of the other."""
    cache = model.make_cache()
    feed(model, cache, IDS[:, :length])
    plain = KVCache.update_and_fetch

    def interrupted(self, *arguments):
        if self is cache[-1]:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(model, cache, IDS[:, length : length + 1])
    assert {layer.offset for layer in cache} == {length}
    assert_same(model, feed(model, cache, IDS[:, length : length + 1]), IDS[:, : length + 1])


def test_trim_inside_a_ragged_batch(model, small_step):
    lengths = (ORIGINAL + 4, 30)
    padding = [0, lengths[0] - 30]
    rows = [ids_of(80, seed=i)[0] for i in range(2)]
    batch = np.stack([np.pad(row, (pad, 0))[:80] for row, pad in zip(rows, padding, strict=True)])
    cache, end = model.make_cache(left_padding=padding), 0
    for add, back in ((lengths[0], 9), (4, 0), (20, 22), (3, 0), (9, 0), (1, 0), (1, 30), (2, 0), (40, 0)):
        last = feed(model, cache, batch[:, end : end + add], 13)
        end = min(end + add, 80)
        for i, pad in enumerate(padding):
            assert_same(model, last[i : i + 1], batch[i : i + 1, pad:end])
        trim(cache, back)
        end -= back


# Copies, lists, rows, pins


def test_a_deep_copy_goes_its_own_way(model, small_step):
    cache = model.make_cache()
    feed(model, cache, IDS[:, : ORIGINAL - 2])
    other = copy.deepcopy(cache)
    assert all(layer.sequence is other[0].sequence for layer in other)
    assert other[0].sequence is not cache[0].sequence
    left, right = ids_of(8, seed=1), ids_of(8, seed=2)
    for first in range(8):
        step = slice(first, first + 1)
        for branch, ids in ((cache, left), (other, right)):
            expected = np.concatenate([IDS[:, : ORIGINAL - 2], ids[:, : first + 1]], axis=1)
            assert_same(model, feed(model, branch, ids[:, step]), expected)
    trim(other, 20)
    feed(model, other, right)
    assert_same(model, feed(model, cache, left), np.concatenate([IDS[:, : ORIGINAL - 2], left, left], axis=1))


@pytest.mark.parametrize("bits", [None, KVBits(8, 8)])
@pytest.mark.parametrize("read", [10, ORIGINAL - 2, ORIGINAL + 40])
def test_a_fork_and_its_origin_go_their_own_ways(model, read, bits, small_step):
    def assert_same_as_alone(last, ids):
        alone = feed(model, model.make_cache(ids.shape[1], bits=bits), ids)
        assert np.abs(last - alone).max() < (SAME if bits is None else 0.05)

    cache = model.make_cache(bits=bits)
    feed(model, cache, IDS[:, :read], 13)
    other, third = fork(cache), fork(cache)
    assert all(layer.sequence is other[0].sequence for layer in other)
    trim(other, 9)  # perhaps out of a regime, or into what the window dropped
    left, right = ids_of(8, seed=1), ids_of(8, seed=2)
    for first in range(8):
        for branch, kept, ids in ((cache, read, left), (other, read - 9, right)):
            expected = np.concatenate([IDS[:, :kept], ids[:, : first + 1]], axis=1)
            assert_same_as_alone(feed(model, branch, ids[:, first : first + 1]), expected)
    assert_same_as_alone(feed(model, third, right), np.concatenate([IDS[:, :read], right], axis=1))


def test_a_fork_belongs_to_no_run_and_keeps_what_was_declared():
    model = MODELS["3.5-mini"]
    cache = model.make_cache(prompt_length=ORIGINAL + 5)
    feed(model, cache, IDS[:, :20])
    cache[0].sequence.reader = object()
    other = fork(cache)
    assert other[0].sequence.reader is None
    trim(cache, 20)
    assert_same(model, feed(model, other, IDS[:, 20 : ORIGINAL + 5]), IDS[:, : ORIGINAL + 5])
    assert other[-1].is_last


@pytest.mark.parametrize("bits", [None, KVBits(4, 4)])
def test_a_fork_takes_memory_when_it_is_written_to(bits):
    model = MODELS["3.5-mini"]
    cache = model.make_cache(bits=bits)
    feed(model, cache, IDS[:, :ORIGINAL])
    mx.eval([layer.state for layer in cache])
    before, size = mx.get_active_memory(), sum(layer.nbytes for layer in cache)
    forks = [fork(cache) for _ in range(20)]
    mx.eval([layer.state for other in forks for layer in other])
    assert mx.get_active_memory() == before
    trim(forks[3], 2)
    feed(model, forks[3], IDS[:, :2])
    mx.eval([layer.state for layer in forks[3]])
    assert size <= mx.get_active_memory() - before < 2 * size  # and ids, in pages
    del forks
    assert mx.get_active_memory() == before


def test_a_plain_list_of_the_layers_is_the_cache(model):
    cache = model.make_cache()
    feed(model, list(cache), IDS[:, :30])
    assert_same(model, feed(model, list(cache), IDS[:, 30 : ORIGINAL + 2], 7), IDS[:, : ORIGINAL + 2])


@pytest.mark.parametrize("pin", ["short", "long"])
def test_a_pinned_regime_stays(pin):
    raw = slim(CONFIGS["3.5-mini"])
    lists = raw["rope_scaling"]
    pinned_lists = {**lists, "short_factor": lists[f"{pin}_factor"], "long_factor": lists[f"{pin}_factor"]}
    expected = oracle.make_ours({**raw, "rope_scaling": pinned_lists})
    model = oracle.make_ours(raw)
    model.model.longrope = pin
    cache = model.make_cache()
    for first, end in ((0, 20), (20, ORIGINAL), (ORIGINAL, ORIGINAL + 1), (ORIGINAL + 1, 90)):
        last = feed(model, cache, IDS[:, first:end])
        assert np.abs(last - last_logits(expected, IDS[:, :end])).max() < SAME
        assert np.abs(last - last_logits(model, IDS[:, :end])).max() < SAME


def test_a_pin_that_changes_is_obeyed_by_a_full_cache():
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    cache = model.make_cache()
    feed(model, cache, IDS[:, :20])
    for t, pin in enumerate(("long", "long", "auto", "short"), start=20):
        model.model.longrope = pin
        assert_same(model, feed(model, cache, IDS[:, t : t + 1]), IDS[:, : t + 1])


def test_the_window_bounds_what_is_stored():
    model = MODELS["mini-4k"]
    cache = model.make_cache()
    feed(model, cache, IDS[:, :300])
    for t in range(300, 400):
        feed(model, cache, IDS[:, t : t + 1])
        slots = cache[0].state[0].shape[2]
        assert slots <= WINDOW - 1 + 2 * KVCache.step, "as much as the bulk drop needs, no more"
    assert cache[0].offset == 400
    assert cache[0].nbytes == 2 * cache[0].state[0].nbytes


def test_a_window_of_one_sees_itself_alone():
    model = oracle.make_ours({**slim(CONFIGS["mini-4k"]), "sliding_window": 1})
    cache = model.make_cache()
    for t in range(6):
        assert_same(model, feed(model, cache, IDS[:, t : t + 1]), IDS[:, : t + 1])
    assert_same(model, feed(model, cache, IDS[:, 6:12]), IDS[:, 5:12][:, 1:])


# Any schedule


MOVES = st.lists(st.tuples(st.integers(1, 24), st.integers(0, 24)), min_size=2, max_size=7)


@pytest.mark.parametrize("step", [12, 256])
@pytest.mark.parametrize("name", ["3.5-mini", "mini-4k", "long-and-window"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(1, ORIGINAL + 4), moves=MOVES, seed=st.integers(0, 9), declared=st.booleans())
def test_any_schedule_of_appends_and_trims(name, step, start, moves, seed, declared, monkeypatch):
    """After every append the logits are those of one pass over the ids that survive."""
    monkeypatch.setattr(KVCache, "step", step)
    model, rng = MODELS[name], np.random.default_rng(seed)
    cache = model.make_cache(prompt_length=start if declared else None)
    ids = np.zeros((1, 0), dtype=np.int32)
    for n, back in [(start, 0), *moves]:
        new = rng.integers(2, 96, (1, n)).astype(np.int32)
        ids = np.concatenate([ids, new], axis=1)
        assert_same(model, feed(model, cache, new), ids)
        assert cache[0].offset == ids.shape[1]
        back = min(back, ids.shape[1])
        trim(cache, back)
        ids = ids[:, : ids.shape[1] - back]


def test_a_cache_that_is_recomputed_at_the_boundary_holds_no_more_than_the_plan_counts():
    model = MODELS["long-and-window"]
    cache = model.make_cache()
    feed(model, cache, IDS[:, :ORIGINAL])
    feed(model, cache, IDS[:, ORIGINAL : ORIGINAL + 2], 1)
    assert cache[0].start > 0  # the window's tokens alone
    assert sum(layer.nbytes for layer in cache) == len(cache) * kv_bytes(model.config, ORIGINAL + 2, None, 4)
