"""Which room a run has: what is free, and what it holds already and uses or lets go of."""

import pytest
from oracle import CONFIGS, ids_of, make_ours

from phi3_mlx.engine import fitting, machine
from phi3_mlx.engine.batch import Generation
from phi3_mlx.engine.fitting import fit, workload_of
from phi3_mlx.engine.rows import Row
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import MemoryLimitError

MODEL = make_ours(CONFIGS["mini-4k"])
PROMPT = ids_of(400)[0].tolist()
ROWS = [Row(0, PROMPT, 20)]
OPTIONS = {"bits": None, "chunk": 64, "force": False, "kept": False}
WORKLOAD = workload_of(MODEL, ROWS, None, 64, 0)
PLAN = WORKLOAD.plan(0)


def cache_of(length):
    generation = Generation(MODEL, [PROMPT[:length]], max_tokens=1, sampling=Sampling())
    list(generation)
    return generation.cache


def least_room(cache, shared):
    """Bytes below which the run is refused."""
    low, high = 0, PLAN.total
    while low < high:
        room = (low + high) // 2
        try:
            fit(MODEL, ROWS, cache=cache, shared=shared, room=room, **OPTIONS)
            high = room
        except MemoryLimitError:
            low = room + 1
    return low


def test_a_new_run_needs_room_for_all_but_the_weights():
    assert least_room(None, 0) == PLAN.total - WORKLOAD.weights
    assert fit(MODEL, ROWS, cache=None, shared=0, room=PLAN.total - WORKLOAD.weights + 7, **OPTIONS).spare == 7


def test_a_cache_that_is_used_needs_no_room_again():
    cache = cache_of(30)
    held = sum(layer.nbytes for layer in cache)
    assert 0 < held <= WORKLOAD.cache_bytes()
    assert least_room(cache, 30) == PLAN.total - WORKLOAD.weights - held


def test_a_cache_larger_than_the_run_counts_as_far_as_it_is_used_and_whole_where_it_is_let_go_of():
    cache = cache_of(30)
    for layer in cache:
        layer.state = [array.astype(array.dtype)[..., [0] * 4096, :] for array in layer.state]
    held = sum(layer.nbytes for layer in cache)
    assert held > WORKLOAD.cache_bytes()
    assert least_room(cache, 30) == PLAN.total - WORKLOAD.weights - WORKLOAD.cache_bytes()
    assert least_room(cache, 0) == max(PLAN.total - WORKLOAD.weights - held, 0)


def test_a_refusal_offers_another_cache_where_one_is_given():
    room = PLAN.total - WORKLOAD.weights - WORKLOAD.cache_bytes() // 3
    with pytest.raises(MemoryLimitError, match=r": kv_bits=\d needs"):
        fit(MODEL, ROWS, cache=None, shared=0, room=room, **OPTIONS)
    cache = cache_of(30)
    with pytest.raises(MemoryLimitError, match="a cache made with kv_bits"):
        fit(MODEL, ROWS, cache=cache, shared=30, room=room - sum(layer.nbytes for layer in cache), **OPTIONS)


def test_force_takes_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(machine, "room", lambda: PLAN.total + 100)
    forced = fit(MODEL, ROWS, cache=None, shared=0, room=0, **{**OPTIONS, "force": True})
    assert (forced.chunk, forced.spare) == (64, WORKLOAD.weights + 100)
    monkeypatch.setattr(machine, "room", lambda: 0)
    assert fit(MODEL, ROWS, cache=None, shared=0, room=None, **{**OPTIONS, "force": True}).spare == 0


def test_only_rows_of_different_lengths_are_padded():
    for lengths, ragged in (((7,), False), ((7, 7), False), ((7, 5), True), ((7, 5, 3), True)):
        rows = [Row(n, PROMPT[:length], 20) for n, length in enumerate(lengths)]
        assert workload_of(MODEL, rows, None, 64, 0).ragged == ragged


def test_what_may_be_recomputed_is_a_row_at_the_boundary_and_what_a_cache_has_of_another_regime():
    model, rule = make_ours(CONFIGS["3.5-mini"]), fitting._recomputed
    boundary = model.config.original_max_position_embeddings
    ids = ids_of(boundary + 8)[0].tolist()

    def rows(*lengths, budget=4):
        return [Row(n, ids[:length], budget) for n, length in enumerate(lengths)]

    assert rule(model, rows(boundary - 4), None, 0) == 0  # ends at the boundary
    assert rule(model, rows(boundary - 3), None, 0) == boundary + 1
    assert rule(model, rows(boundary + 1), None, 0) == 0  # long from its beginning
    assert rule(model, rows(boundary - 30, boundary - 3), None, 0) == boundary + 1
    assert rule(model, rows(boundary + 1, boundary + 2), None, 0) == 0
    cache = Generation(model, [ids[:20]], max_tokens=1, sampling=Sampling())
    list(cache)
    assert rule(model, rows(30), cache.cache, 20) == 0
    assert rule(model, rows(boundary + 1), cache.cache, 20) == 20  # its keys are of the short regime
    assert rule(model, rows(boundary - 3), cache.cache, 20) == boundary + 1
    cache = cache_of(300)
    cache[0].start = 200  # as where a window has moved on
    kept = 200 + cache[0].window - 1
    assert [rule(MODEL, ROWS, cache, length) for length in (kept - 1, kept)] == [kept - 1, 0]
