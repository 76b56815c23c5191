"""Rows that share arrays against the same rows alone: as they come, go, are cut, cross boundaries, and break off."""

import copy
import gc
import pickle
import random
from contextlib import contextmanager

import mlx.core as mx
import pytest
import small_models
from oracle import CONFIGS, ORIGINAL, WINDOW, make_ours, slim

from phi3_mlx.models import slots
from phi3_mlx.models.cache import KVBits, KVCache, fork
from phi3_mlx.models.decoder import Decoder
from phi3_mlx.models.shared_cache import SharedKVCache
from phi3_mlx.models.slots import LIKE, take_out, units_of

pytestmark = pytest.mark.usefixtures("sharing_at_once")
NAMES = ("3.5-mini", "mini-4k", "long-and-window", "phi-4-mini")
MODELS = {name: make_ours(slim(CONFIGS[name])) for name in NAMES}
TOLERANCE = 1e-5  # of logits of several units


def ids_of(length, seed):
    return [2 + (i * 7 + seed * 31 + i * i) % 90 for i in range(length)]


def read(model, length, seed=0, bits=None):
    """The cache of a row that has read a prompt."""
    cache = model.make_cache(bits=bits)
    mx.eval(model(mx.array([ids_of(length, seed)]), cache), [layer.state for layer in cache])
    return cache


def step(model, caches, token=5):
    """Logits (rows, vocab_size) of a token for each row, whose ids differ."""
    ids = mx.array([[token + 3 * row for row in range(len(caches))]])
    return model.logits(model.model.together(ids, [1] * len(caches), caches)[0])


def rows_of(model, lengths):
    """Rows that have read prompts, and a fork of each, to be stepped alone."""
    caches = [read(model, length, seed) for seed, length in enumerate(lengths)]
    return caches, [fork(cache) for cache in caches]


def alone(model, caches, token=5):
    """What `step` gives, one row after the other and without arrays that are shared."""
    return mx.concatenate([model(mx.array([[token + 3 * row]]), cache)[:, -1] for row, cache in enumerate(caches)])


def near(some, others):
    return mx.abs(some - others).max().item() < TOLERANCE * mx.abs(others).max().item()


def shares(cache):
    return all(isinstance(layer, SharedKVCache) for layer in cache)


def same_cache(cache, other):
    """Whether both have read the same, and see it."""
    for layer, its in zip(cache, other, strict=True):
        assert layer.state  # which takes it out
        assert type(layer) is KVCache
        assert layer.offset == its.offset
        assert layer.first_visible == its.first_visible
        assert not layer.lost
        first, end = max(layer.start, its.start), layer.offset
        assert first <= layer.first_visible
        for mine, theirs in zip(layer.copy_tokens(first, end), its.copy_tokens(first, end), strict=True):
            if not near(mine, theirs):
                return False
    return cache[0].sequence.ids.tolist() == other[0].sequence.ids.tolist()


@pytest.mark.parametrize("lengths", [[30, 30], [45, 3, 20, 60], [WINDOW - 2, WINDOW + 40, 1]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_share_arrays_are_what_they_are_alone(name, lengths):
    model = MODELS[name]
    caches, others = rows_of(model, lengths)
    for i in range(8):
        assert near(step(model, caches, i), alone(model, others, i))
        assert all(map(shares, caches)) or ORIGINAL in [cache[0].offset for cache in caches]
    assert all(same_cache(cache, other) for cache, other in zip(caches, others, strict=True))


@pytest.mark.parametrize("plainly", [False, True], ids=["compiled", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_come_go_and_change_places_between_any_two_steps(name, plainly, monkeypatch):
    model, draws = MODELS[name], random.Random(3)
    if plainly:
        monkeypatch.setattr(Decoder, "_step", lambda *_: None)
    lengths = [25, 40, 47, 3, 70, 300, 310, 600]
    caches, others = rows_of(model, lengths)
    for i in range(24):
        rows = draws.sample(range(len(lengths)), draws.randint(1, len(lengths)))
        found = step(model, [caches[row] for row in rows], i)
        assert near(found, alone(model, [others[row] for row in rows], i))
    assert all(same_cache(cache, other) for cache, other in zip(caches, others, strict=True))


def test_a_prompt_is_read_beside_rows_that_share_arrays():
    model, prompt = MODELS["3.5-mini"], ids_of(20, 9)
    caches, others = rows_of(model, [30, 10, 44])
    step(model, caches), alone(model, others)
    shared = caches[0][0].slots
    for i in range(3):
        newcomer, its = model.make_cache(), model.make_cache()
        order = [caches[2], caches[0], caches[1], newcomer]
        ids = mx.array([[5, 6, 7, *prompt]])
        hidden = model.model.together(ids, [1, 1, 1, len(prompt)], order, newest=bool(i % 2))[0]
        expected = [model(mx.array([[token]]), others[row])[0, -1] for token, row in ((5, 2), (6, 0), (7, 1))]
        last = model(mx.array([prompt]), its)[0, -1]
        logits = model.logits(hidden)
        assert near(mx.concatenate([logits[:3], logits[-1:]]), mx.stack([*expected, last]))
    assert not shares(newcomer)
    assert caches[0][0].slots is shared  # nobody was moved


def test_rows_share_once_they_have_brought_some_tokens_one_by_one(monkeypatch):
    monkeypatch.setattr(slots, "SETTLED", 3)
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30])
    seen = []
    for i in range(7):
        assert near(step(model, caches, i), alone(model, others, i))
        seen.append([shares(cache) for cache in caches])
        if i == 3:
            for cache in (caches[1], others[1]):
                model(mx.array([[7, 8]]), cache)
    one, two = [True, False, True], [True, True, True]
    assert seen == [[False] * 3, [False] * 3, two, two, one, one, two]


def test_only_rows_of_like_length_share_and_none_alone():
    model = MODELS["mini-4k"]
    caches = [read(model, length, seed) for seed, length in enumerate((10, 20, 20 + LIKE, 31 + LIKE, 900))]
    step(model, caches)
    assert [shares(cache) for cache in caches] == [True, True, True, True, False]
    assert caches[0][0].slots is caches[1][0].slots
    assert caches[2][0].slots is caches[3][0].slots is not caches[0][0].slots
    step(model, caches[1:])
    assert [type(cache[0]) is KVCache for cache in caches] == [True, True, False, False, True]


def test_packed_rows_and_block_patterns_keep_arrays_of_their_own():
    model = MODELS["phi-4-mini"]
    caches = [read(model, 10, seed, KVBits(8, 8)) for seed in range(2)]
    step(model, caches)
    assert not any(map(shares, caches))
    model = small_models.make(small_models.RAW)
    caches = [read(model, 10, seed) for seed in range(2)]
    step(model, caches)
    assert not any(map(shares, caches))


def copies(layer):
    layer.copy_tokens(3, 9)


def forks(layer):
    layer.fork(layer.sequence)


CHANGES = {
    "trim": lambda cache: [layer.trim(3) for layer in cache],
    "trim all": lambda cache: [layer.trim(99) for layer in cache],
    "fork": lambda cache: fork(cache),
    "state": lambda cache: [layer.state for layer in cache],
    "narrow": lambda cache: [layer.narrow() for layer in cache],
    "shrink": lambda cache: [layer.shrink() for layer in cache],
    "let go": lambda cache: [setattr(layer, "state", layer.state) for layer in cache],
    "copy": lambda cache: [copy.copy(layer) for layer in cache],
    "deepcopy": lambda cache: copy.deepcopy(cache),
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "read on alone": lambda cache: MODELS["mini-4k"](mx.array([ids_of(7, 1)]), cache),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_a_row_takes_it_out_whole_and_leaves_the_others(change):
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30])
    for i in range(3):
        step(model, caches, i), alone(model, others, i)
    before = mx.array(caches[0][-1].tokens[0]), mx.array(caches[2][-1].tokens[1])
    for row in (caches[1], others[1]):
        CHANGES[change](row)
    assert [shares(cache) for cache in caches] == [True, False, True]
    assert mx.array_equal(before[0], caches[0][-1].tokens[0])
    assert mx.array_equal(before[1], caches[2][-1].tokens[1])
    assert near(step(model, caches), alone(model, others))
    assert shares(caches[1]) != (change == "trim all")
    assert all(same_cache(cache, other) for cache, other in zip(caches, others, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_row_goes_its_own_way(copied):
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30])
    step(model, caches), alone(model, others)
    row, its = copied(caches[1]), fork(others[1])
    assert same_cache(row, its)
    assert near(step(model, [row], 7), alone(model, [its], 7))
    assert near(step(model, caches), alone(model, others))
    assert all(same_cache(cache, other) for cache, other in zip([*caches, row], [*others, its], strict=True))


def test_rows_that_are_taken_out_hold_no_arrays_of_others():
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30, 500, 501])
    step(model, caches), alone(model, others)
    take_out([caches[0], caches[1], caches[3]])
    assert [shares(cache) for cache in caches] == [False, False, False, False, False]
    take_out(caches)
    assert near(step(model, caches), alone(model, others))
    slots = caches[2][0].slots
    take_out([caches[0], caches[4]])
    assert [shares(cache) for cache in caches] == [False, True, True, False, False]
    assert caches[2][0].slots is not slots
    assert [len(layer.kept[0]) for layer in (caches[0][0], caches[1][0])] == [1, 2]
    assert all(same_cache(cache, other) for cache, other in zip(caches, others, strict=True))


def test_what_only_looks_takes_nobody_out():
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25])
    step(model, caches), alone(model, others)
    for layer, its in zip(caches[0], others[0], strict=True):
        assert (layer.offset, layer.size(), layer.start, layer.empty(), layer.lost) == (13, 13, 0, False, False)
        assert layer.awaited
        assert layer.nbytes > 0
        assert layer.kept[0].shape[0] == 2
        assert layer.trim(0) == 0
        for mine, theirs in zip(layer.copy_tokens(3, 9), its.copy_tokens(3, 9), strict=True):
            assert near(mine, theirs)
    assert all(map(shares, caches))


def test_a_start_that_changes_takes_a_row_out_and_the_same_one_does_not():
    model = MODELS["mini-4k"]
    caches = [read(model, length, length) for length in (12, 25)]
    step(model, caches)
    layer = caches[1][0]
    layer.start = layer.start
    assert all(map(shares, caches))
    layer.start = 1
    assert not any(map(shares, caches))
    assert layer.start == 1


def test_a_row_that_crosses_the_boundary_is_recomputed_alone_and_comes_back():
    model = MODELS["long-and-window"]
    caches, others = rows_of(model, [ORIGINAL - 2, ORIGINAL + 5, 9])
    for i in range(4):
        assert near(step(model, caches, i), alone(model, others, i))
    assert [cache[0].sequence.long for cache in caches] == [(True,), (True,), (False,)]
    assert all(map(shares, caches))


def test_a_step_that_breaks_off_leaves_rows_as_they_were(monkeypatch):
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30])
    step(model, caches), alone(model, others)
    attention = type(model.layers[1].self_attn)
    with monkeypatch.context() as patch:
        attend, calls = attention.attend, []

        def breaks(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return attend(*arguments)

        patch.setattr(attention, "attend", breaks)
        with pytest.raises(KeyboardInterrupt):
            step(model, caches)
    assert [cache[0].offset for cache in caches] == [13, 26, 31]
    assert [cache[-1].offset for cache in caches] == [13, 26, 31]
    assert near(step(model, caches), alone(model, others))


@contextmanager
def broken_off(monkeypatch, at):
    """A Ctrl-C at the `at`-th layer or row of a move."""
    with monkeypatch.context() as patch:
        take_over, calls = SharedKVCache.take_over, []

        def breaks(*arguments):
            calls.append(arguments)
            if len(calls) == at:
                raise KeyboardInterrupt
            take_over(*arguments)

        patch.setattr(SharedKVCache, "take_over", staticmethod(breaks))
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("at", range(1, 6))
def test_a_move_that_breaks_off_loses_nothing(at, monkeypatch):
    """Rows come together, one comes later, one leaves: broken off at some layer or row of it."""
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30, 8])
    step(model, caches[:3]), alone(model, others[:3])
    with broken_off(monkeypatch, at):
        step(model, caches[1:])
    assert near(step(model, caches), alone(model, others))
    assert all(same_cache(cache, other) for cache, other in zip(caches, others, strict=True))


def test_not_more_than_a_layer_exists_twice_and_all_is_freed_with_the_rows():
    model = make_ours({**slim(CONFIGS["3.5-mini"]), "num_hidden_layers": 16})
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    caches = [read(model, 200 + row, row) for row in range(6)]
    mx.eval(step(model, caches[:1]))
    held = mx.get_active_memory() - before
    for rows in (caches, caches[1:], caches):
        mx.reset_peak_memory()
        mx.eval(units_of(rows, share=True)[0].layers[0].state)
        assert mx.get_peak_memory() - before < held * (1 + 2.2 / 16)
    assert mx.get_active_memory() - before < 1.02 * held
    gc.disable()  # no cycle keeps them
    try:
        last = caches[2]
        assert last[0].state  # takes it out
        del caches, rows
        assert mx.get_active_memory() - before < 0.2 * held
        del last
        assert mx.get_active_memory() - before < 0.02 * held
    finally:
        gc.enable()


def test_units_serve_every_row_once():
    model, draws = MODELS["mini-4k"], random.Random(1)
    caches = [read(model, draws.randint(1, 700), row) for row in range(9)]
    for _ in range(5):
        draws.shuffle(caches)
        units = units_of(caches, share=True)
        assert sorted(row for unit in units for row in unit.rows) == list(range(9))
        for unit in units:
            assert [caches[row][0].offset for row in unit.rows] == [
                layer.offset for layer in (caches[row][-1] for row in unit.rows)
            ]
    assert all(len(unit.rows) == 1 for unit in units_of(caches, share=False) if not shares(caches[unit.rows[0]]))


@pytest.mark.parametrize("back", [1, 2], ids=["at once", "later"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_waits_for_a_step_is_what_it_is_alone_when_it_comes_back(name, back):
    model = MODELS[name]
    caches, others = rows_of(model, [12, 25, 30])
    step(model, caches), alone(model, others)
    slots = caches[0][0].slots
    for i in range(back):
        assert near(step(model, caches[::2], i), alone(model, others[::2], i))
        if not i:
            assert caches[1][0].slots is caches[0][0].slots is slots  # nobody moved yet
            assert [layer.offset for layer in caches[1]] == [26] * len(caches[1])
    for i in range(3):
        assert near(step(model, caches, i), alone(model, others, i))
    assert all(same_cache(cache, other) for cache, other in zip(caches, others, strict=True))


def test_a_row_that_ends_leaves_its_place_to_the_next_that_comes(monkeypatch):
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [12, 25, 30, 28, 9])
    newcomers = caches[4:]
    del caches[4]
    for i in range(2):
        assert near(step(model, caches, i), alone(model, others[:4], i))
    shared = caches[0][0].slots
    monkeypatch.setattr(slots, "_rearranged", lambda *_: pytest.fail("all rows move"))
    waiting = caches.pop(1)
    assert near(step(model, caches), alone(model, [others[0], *others[2:4]]))  # its last token is not told yet
    del waiting
    assert near(step(model, caches), alone(model, [others[0], *others[2:4]]))
    assert [cache[0].place for cache in caches] == [0, 1, 2]  # the longest stood last
    rows = [*caches, *newcomers]
    for i in range(3):
        assert near(step(model, rows, i), alone(model, [others[0], *others[2:]], i))
    assert [cache[0].place for cache in rows] == [0, 1, 2, 3]
    assert {cache[-1].slots for cache in rows} == {shared}


def test_rows_move_to_other_arrays_where_one_is_longer_or_the_slots_are_full():
    model = MODELS["3.5-mini"]
    caches, others = rows_of(model, [252, 250, 240, 253, 30])
    newcomers, their = caches[3:], others[3:]
    rows, its = caches[:3], others[:3]
    del caches, others
    step(model, rows), alone(model, its)
    shared = rows[0][0].slots
    for row, other in zip(newcomers, their, strict=True):  # one as long as the longest, one far shorter
        rows[2], its[2] = row, other
        assert near(step(model, rows), alone(model, its))
        assert (rows[2][0].slots is shared) == (row is newcomers[0])
        shared = rows[0][0].slots
    for i in range(4):
        assert near(step(model, rows, i), alone(model, its, i))
    assert rows[0][0].slots is not shared  # past 256 slots
    assert len(rows[0][0].kept[0]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_place_is_none_for_a_row_longer_than_all_that_was_written(name):
    model = MODELS[name]
    caches, others = rows_of(model, [60, 50, 40, 90])
    newcomer, rows, its = caches.pop(), caches, [*others[:2], others[3]]
    assert near(step(model, rows), alone(model, others[:3]))
    shared = rows[0][0].slots
    rows[2] = newcomer  # the third has ended
    for i in range(3):
        assert near(step(model, rows, i), alone(model, its, i))
    assert shares(newcomer)
    assert rows[0][0].slots is newcomer[0].slots is not shared


@pytest.mark.parametrize("at", range(1, 5))
def test_a_place_that_is_filled_again_loses_nothing_where_that_breaks_off(at, monkeypatch):
    """The last row takes the place of one that has ended, and a newcomer comes behind: broken off at some layer."""
    model = MODELS["mini-4k"]
    caches, others = rows_of(model, [30, 12, 25, 8, 20])
    newcomer = caches.pop()
    step(model, caches), alone(model, others[:4])
    del caches[3]  # at the first place: the shortest
    its = [*others[:3], others[4]]
    rows = [*caches, newcomer]
    with broken_off(monkeypatch, at):
        step(model, rows)
    assert [cache[0].offset for cache in rows] == [31, 13, 26, 20]
    assert near(step(model, rows), alone(model, its))
    assert all(same_cache(cache, other) for cache, other in zip(rows, its, strict=True))


def test_what_rows_that_ended_leave_is_given_back():
    model = MODELS["3.5-mini"]
    caches, others = rows_of(model, [100, 120, 150, 300])
    step(model, caches), alone(model, others)
    a_row, of_all = sum(layer.nbytes for layer in caches[0]), sum(len(layer.kept) for layer in caches[0])
    assert slots.unused_bytes(caches) == 0
    del caches[3]
    assert near(step(model, caches), alone(model, others[:3]))
    assert slots.unused_bytes(caches) == 4 * a_row - 3 * a_row // 2  # the others need half the slots
    slots.give_back(caches)
    assert slots.unused_bytes(caches) == 0
    assert of_all == 2 * len(caches[0])
    assert [len(layer.kept[0]) for layer in caches[0]] == [3] * len(caches[0])
    assert near(step(model, caches), alone(model, others[:3]))


def test_arrays_have_twice_as_many_places_as_rows_at_most():
    model = MODELS["mini-4k"]
    caches = [read(model, 10 + row, row) for row in range(9)]
    step(model, caches)
    shared = caches[0][0].slots
    while len(caches) > 4:
        caches.pop(0)
        step(model, caches)
        assert (caches[0][0].slots is shared) == (len(caches) > 3)
    caches.pop()
    step(model, caches)
    assert len(caches[0][0].kept[0]) == 3
