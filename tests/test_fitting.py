"""Which room a run has: what is free, and what it holds already and uses or lets go of."""

import dataclasses

import pytest
from oracle import CONFIGS, ids_of, make_ours

from phi3_mlx.engine import fitting, machine
from phi3_mlx.engine.fitting import workload_of
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.plan import Workload
from phi3_mlx.engine.rows import Row
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import MemoryLimitError

MODEL = make_ours(CONFIGS["mini-4k"])
PROMPT = ids_of(400)[0].tolist()
WORKLOAD = workload_of(dataclasses.replace(Workload.of_model(MODEL, 0), chunk=64), Row(0, Job(PROMPT, 20), MODEL))
PLAN = WORKLOAD.plan(0)


def cache_of(length):
    generation = Generation(MODEL, [PROMPT[:length]], max_tokens=1, sampling=Sampling())
    list(generation)
    return generation.cache


def scheduled(cache=None, prompt=PROMPT, **options):
    scheduler = Scheduler(MODEL, chunk=64, **options)
    scheduler.submit(Job(prompt, 20, cache=cache))
    return scheduler


def least_room(cache, prompt=PROMPT):
    """Bytes below which the run is refused."""
    low, high = 0, PLAN.total
    while low < high:
        room = (low + high) // 2
        try:
            scheduled(cache, prompt, room=room)
            high = room
        except MemoryLimitError:
            low = room + 1
    return low


def test_a_new_run_needs_room_for_all_but_the_weights():
    assert least_room(None) == PLAN.total - WORKLOAD.weights
    scheduler = scheduled(room=PLAN.total - WORKLOAD.weights + 7)
    scheduler.admit()
    assert scheduler.spare == 7


def test_a_cache_that_is_used_needs_no_room_again():
    cache = cache_of(30)
    held = sum(layer.nbytes for layer in cache)
    assert 0 < held <= WORKLOAD.cache_bytes()
    assert least_room(cache) == PLAN.total - WORKLOAD.weights - held


def test_a_cache_larger_than_the_run_counts_as_far_as_it_is_used_and_whole_where_it_is_let_go_of():
    cache = cache_of(30)
    for layer in cache:
        layer.state = [array.astype(array.dtype)[..., [0] * 4096, :] for array in layer.state]
    held = sum(layer.nbytes for layer in cache)
    assert held > WORKLOAD.cache_bytes()
    assert least_room(cache) == PLAN.total - WORKLOAD.weights - WORKLOAD.cache_bytes()
    other = [PROMPT[0] ^ 1, *PROMPT[1:]]
    assert least_room(cache, other) == max(PLAN.total - WORKLOAD.weights - held, 0)


def test_a_refusal_offers_another_cache_where_one_is_given():
    room = PLAN.total - WORKLOAD.weights - WORKLOAD.cache_bytes() // 3
    with pytest.raises(MemoryLimitError, match=r": kv_bits=\d needs"):
        scheduled(room=room)
    cache = cache_of(30)
    with pytest.raises(MemoryLimitError, match="a cache made with kv_bits"):
        scheduled(cache, room=room - sum(layer.nbytes for layer in cache))


def test_force_takes_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(machine, "room", lambda: PLAN.total + 100)
    scheduler = scheduled(room=0, force=True)
    scheduler.admit()
    assert scheduler.spare == WORKLOAD.weights + 100
    monkeypatch.setattr(machine, "room", lambda: 0)
    scheduler = scheduled(force=True)
    scheduler.admit()
    assert scheduler.spare == 0


def test_what_may_be_recomputed_is_a_row_at_the_boundary_and_what_a_cache_has_of_another_regime():
    model = make_ours(CONFIGS["3.5-mini"])
    boundary = model.config.original_max_position_embeddings
    ids = ids_of(boundary + 8)[0].tolist()

    def rule(length, cache=None, model=model, ids=ids):
        row = Row(0, Job(ids[:length], 4, cache=cache), model)
        return fitting._recomputed(row, row.main)

    assert rule(boundary - 4) == 0  # ends at the boundary
    assert rule(boundary - 3) == boundary + 1
    assert rule(boundary + 1) == 0  # long from its beginning
    cache = Generation(model, [ids[:20]], max_tokens=1, sampling=Sampling())
    list(cache)
    assert rule(30, cache.cache) == 0
    assert rule(boundary + 1, cache.cache) == 20  # its keys are of the short regime
    assert rule(boundary - 3, cache.cache) == boundary + 1
    cache = cache_of(300)
    cache[0].start = 200  # as where a window has moved on
    kept = 200 + cache[0].window - 1
    lengths = [kept - 1, kept]  # of what the prompt shares with the cache
    prompts = [[*PROMPT[:length], PROMPT[length] ^ 1, 1] for length in lengths]
    assert [rule(99999, cache, MODEL, prompt) for prompt in prompts] == [kept - 1, 0]


def test_the_weights_are_counted_once_for_all_jobs(monkeypatch):
    counted, of_model = [], Workload.of_model
    monkeypatch.setattr(Workload, "of_model", lambda *args, **options: counted.append(args) or of_model(*args))
    scheduler = Scheduler(MODEL, room=10 * PLAN.total)
    for _ in range(3):
        scheduler.submit(Job(PROMPT, 2))
    while scheduler.busy:
        scheduler.step()
    assert len(counted) == 1
