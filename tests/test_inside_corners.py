"""What notebooks do to `trace`: functions that write in place, wrong indexes and shapes, models run inside edits."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import long_after
from oracle import ids_of
from test_inside import MODELS, dense, off

from phi3_mlx import (
    Keep,
    PromptCache,
    change,
    generate,
    inspect,
    load,
    patch,
    steer,
    stream_generate,
    switch_off,
    trace,
)
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import CacheError, MemoryLimitError, OptionError, PromptError

PROMPT = "Tell me a story about a duck and a frog."
WIDTH = 192  # of the dense models


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


# Functions


@pytest.mark.parametrize("options", [{}, {"positions": [2, -1]}, {"heads": [1]}, {"heads": [0, 1], "positions": 4}])
@pytest.mark.parametrize("place", ["q", "pattern", "z", "head_out"])
@pytest.mark.parametrize("name", ["mini-4k", "small"])
def test_a_function_may_write_into_what_it_gets(name, place, options):
    model, ids = MODELS[name](), mx.array(ids_of(9))

    def in_place(x):
        x[..., 0] = 0.5
        return x

    def apart(x):
        return mx.where(mx.arange(x.shape[-1]) == 0, 0.5, x)

    found = []
    for function in (in_place, apart):
        with trace(model, keep=place, edits=change(place, function, layers=1, **options)) as inside:
            found.append((model(ids), inside[place, 1]))
    assert mx.array_equal(found[0][0], found[1][0])
    assert mx.array_equal(found[0][1], found[1][1])
    assert off(found[0][0], model(ids)) > 1e-3


def test_a_function_that_returns_nothing_is_told():
    model, ids = dense("mini-4k"), mx.array(ids_of(9))
    for result, message in ((None, "an edit of z gives None"), (1.0, "an edit of z gives 1.0"), ("x", "gives 'x'")):
        with (
            trace(model, edits=change("z", lambda x, result=result: result)),
            pytest.raises(OptionError, match=message),
        ):
            model(ids)
    with trace(model, edits=change("z", lambda x: x[:1, :2])), pytest.raises(OptionError, match="must keep the shape"):
        model(ids)


def test_an_edit_may_run_another_model_and_parts_of_its_own():
    model, other, ids = dense("mini-4k"), dense("phi-4-mini"), mx.array(ids_of(12))
    expected = model(ids)
    with trace(model, keep=["resid_post", "gate"]) as plain:
        model(ids)

    def beside(x):
        assert off(other(ids), elsewhere) < 1e-6
        model.layers[1].mlp(x)
        return x

    elsewhere = other(ids)
    with trace(model, keep=["resid_post", "gate"], edits=change("mlp_in", beside, layers=[0, 1])) as inside:
        assert mx.array_equal(model(ids), expected)
    for place in ("resid_post", "gate"):
        for layer in range(3):
            assert inside.positions(place, layer) == [*range(12)]
            assert mx.array_equal(inside[place, layer], plain[place, layer])


def test_an_error_in_an_edit_leaves_the_model_and_its_caches_usable(tiny):
    model, tokenizer = tiny
    plain = generate(model, tokenizer, PROMPT, max_tokens=8)
    calls, cache = [], PromptCache(model)

    def fails_once(x):
        calls.append(len(calls))
        if len(calls) == 3:
            raise ZeroDivisionError("mine")
        return x

    edits = [change("resid_post", fails_once, layers=2)]
    with pytest.raises(ZeroDivisionError, match="mine"), trace(model, edits=edits):
        generate(model, tokenizer, PROMPT, max_tokens=8, prompt_cache=cache)
    assert generate(model, tokenizer, PROMPT, max_tokens=8) == plain
    with pytest.raises(CacheError):
        generate(model, tokenizer, PROMPT, max_tokens=8, prompt_cache=cache)
    with trace(model, edits=edits):
        assert generate(model, tokenizer, PROMPT, max_tokens=8, prompt_cache=cache) == plain


def test_inner_traces_edit_last_and_outer_ones_keep_what_comes_of_it():
    model, ids = dense("mini-4k"), mx.array(ids_of(9))
    double, add = change("resid_mid", lambda x: 2 * x, layers=0), steer(mx.ones(WIDTH), place="resid_mid", layers=[0])
    with trace(model, keep="resid_mid") as plain:
        model(ids)
    with trace(model, keep="resid_mid", edits=double) as outer, trace(model, keep="resid_mid", edits=add) as inner:
        model(ids)
    with trace(model, keep="resid_mid", edits=[add, double]) as other:
        model(ids)
    assert off(inner["resid_mid", 0], 2 * plain["resid_mid", 0] + 1) < 1e-5
    assert off(other["resid_mid", 0], 2 * (plain["resid_mid", 0] + 1)) < 1e-5
    assert mx.array_equal(outer["resid_mid", 2], inner["resid_mid", 2])


# Indexes


def test_rows_and_layers_count_from_the_end_and_wrap_nowhere():
    model, ids = dense("mini-4k"), ids_of(9, rows=3)
    together = inspect(model, ids.tolist(), ["resid_post", "embed"])  # a cache: each row by itself
    with trace(model, keep=["resid_post", "embed"]) as at_once:
        model(mx.array(ids))
    for inside in (together, at_once):
        for row in range(3):
            assert inside["resid_post", 1, row].shape == (1, 9, WIDTH)
            assert mx.array_equal(inside["resid_post", 1, row], inside["resid_post", 1][row : row + 1])
            assert mx.array_equal(inside["resid_post", -2, row - 3], inside["resid_post", 1, row])
            assert inside.positions("resid_post", 1, row - 3) == [*range(9)]
        for key, message in [
            (("resid_post", 3), "layer 3 is not there; the model has 3"),
            (("resid_post", -4), "layer -4 is not there"),
            (("resid_post", 0, 3), "row 3 is not there; 3 were read"),
            (("resid_post", 0, -4), "row -4 is not there"),
            (("resid_post", slice(None)), "layer is a slice"),
            (("resid_post", 0, 0, 0), "was not kept"),
            ("resid_post", r"is in layers; give one of them, inside\['resid_post', 0\]"),
            (("embed", 0), r"is in no layer; take inside\['embed'\]"),
            ("residual", "residual was not kept; kept are resid_post, embed"),
        ]:
            with pytest.raises(OptionError, match=message):
                inside[key]
    with pytest.raises(OptionError, match="in no layer"):
        together.stack("embed")
    with pytest.raises(OptionError, match="was not kept"):
        together.stack("pattern")
    with trace(model, keep="embed") as inside, pytest.raises(OptionError, match="nothing of embed was read yet"):
        inside["embed"]


def test_a_layer_or_head_given_twice_is_refused():
    model = dense("mini-4k")
    for edit in (
        steer(mx.ones(WIDTH), layers=[1, 1]),
        steer(mx.ones(WIDTH), layers=[1, -2]),
        switch_off(0, [0, -2]),
    ):
        with pytest.raises(OptionError, match="is given twice"), trace(model, edits=edit):
            raise AssertionError
    with pytest.raises(OptionError, match=r"layer is 1\.5"), trace(model, keep=Keep("z", layers=1.5)):
        raise AssertionError


def test_options_of_no_kind_are_told_by_name():
    model = dense("mini-4k")
    with pytest.raises(OptionError, match="keep is 3; expected names of places"):
        inspect(model, [1], 3)
    with pytest.raises(OptionError, match="edits is 3; expected a list"), trace(model, edits=3):
        raise AssertionError
    with pytest.raises(OptionError, match="strength is '2'"):
        steer(mx.ones(WIDTH), strength="2")
    with pytest.raises(OptionError, match="count layers from 0"):
        steer({-1: mx.ones(WIDTH)})
    with pytest.raises(OptionError, match="vector is a list"):
        steer({0: [1.0]})
    with pytest.raises(OptionError, match=r"a vector of shape \(1,\) cannot be added at resid_post, which is 192 wide"):
        inspect(model, [1], "embed", steer(mx.ones(1)))
    with pytest.raises(OptionError, match=r"a patch of z is \(1, 1, 3, 5\), which does not fit"):
        inspect(model, [1], "embed", patch("z", mx.ones((3, 5))))
    for ids in (5, None, [2**70]):
        with pytest.raises(PromptError, match=r"ids is|id 1180591620717411303424 is outside"):
            inspect(model, ids, "embed")


@pytest.mark.parametrize("kind", [np.array, mx.array, lambda ids: [*map(tuple, ids)]])
def test_ids_may_be_arrays(kind):
    ids = ids_of(9, rows=2)
    assert inspect(dense("mini-4k"), kind(ids), "embed")["embed"].shape == (2, 9, WIDTH)
    assert inspect(dense("mini-4k"), kind(ids)[0], "embed")["embed"].shape == (1, 9, WIDTH)


def test_numpys_arrays_and_scalars_serve_as_mlxs():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    vector, value = np.arange(192.0) / 100, np.ones((9, 2, 96), np.float32)
    one = np.int64(1)
    for edit, same in [
        (steer(vector, layers=one, positions=np.array([2, 4])), steer(mx.array(vector), layers=1, positions=[2, 4])),
        (steer({1: vector}, strength=np.float32(2)), steer(mx.array(vector), layers=1, strength=2)),
        (patch("z", value, layers=np.array([0, 2])), patch("z", mx.array(value), layers=[0, 2])),
        (patch("z", np.float32(0.5), heads=one, positions=one), patch("z", 0.5, heads=1, positions=1)),
        (switch_off(one, np.array([0]), positions=mx.array([-1])), switch_off(1, 0, positions=-1)),
    ]:
        assert repr(edit).replace("64", "32") == repr(same).replace("64", "32")
        assert mx.array_equal(
            inspect(model, ids, "logits", edit)["logits"], inspect(model, ids, "logits", same)["logits"]
        )
    keep = Keep("z", layers=np.array([0, 2]), heads=one, positions=np.array([3, -1]))
    assert inspect(model, ids, keep).positions("z", 2) == [3, 8]
    for wrong in ({1, 2}, "1", 1.5, [1.5], [[1]], np.ones((1, 1)), (position for position in range(2))):
        with pytest.raises(OptionError, match="positions is"):
            steer(vector, positions=wrong)
    for wrong in ([1.0], "text", None):
        with pytest.raises(OptionError, match=r"expected an array of MLX or numpy|expected what inspect"):
            steer(wrong) if wrong != "text" else patch("z", wrong)


# Patches


@pytest.mark.parametrize("name", ["mini-4k", "small"])
def test_a_pattern_of_another_run_fits_chunks_and_shorter_prompts(name):
    model, ids = MODELS[name](), ids_of(12)
    other = inspect(model, ids_of(20, seed=3)[0].tolist(), "pattern")
    edit = patch("pattern", other)
    with trace(model, edits=edit, keep="pattern") as inside:
        whole = model(mx.array(ids))
    assert off(inside["pattern", 1], other["pattern", 1][:, :, :12, :12]) < 1e-6
    assert off(whole, model(mx.array(ids))) > 0.01
    with trace(model, edits=edit):
        cache = model.make_cache()
        parts = [model(mx.array(ids[:, first : first + 5]), cache) for first in range(0, 12, 5)]
    assert off(mx.concatenate(parts, axis=1), whole) < 1e-4
    with trace(model, edits=patch("pattern", other["pattern", 1], layers=1), keep="pattern") as inside:
        model(mx.array(ids))
    assert off(inside["pattern", 1], other["pattern", 1][:, :, :12, :12]) < 1e-6


def test_an_array_without_rows_is_cut_to_the_chunks_that_are_read():
    model, ids = dense("mini-4k"), ids_of(12)
    value = mx.random.normal((12, WIDTH), key=mx.random.key(0))
    edit = patch("resid_post", value, layers=0)
    with trace(model, edits=edit, keep="resid_post") as inside:
        whole = model(mx.array(ids))
        cache = model.make_cache()
        parts = [model(mx.array(ids[:, first : first + 6]), cache) for first in range(0, 12, 6)]
    assert mx.array_equal(inside["resid_post", 0, 1][0], value)
    assert off(mx.concatenate(parts, axis=1), whole) < 1e-4
    with trace(model, edits=patch("resid_post", value[:6], layers=0)):
        cache = model.make_cache()
        model(mx.array(ids[:, :6]), cache)
        with pytest.raises(OptionError, match="has 6 positions, and number 11"):
            model(mx.array(ids[:, 6:]), cache)


# Generation


class Wrong:
    """Guesses that hold for a while, and then never."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, row, length):
        known = len(row.answer)
        right = self.tokens[known : known + 2]
        return [*right, *((token + 1) % 100 for token in self.tokens[known + 2 :])][:length]


@pytest.mark.parametrize("stop", [None, 7, 8])
def test_guesses_that_were_wrong_are_not_kept(stop, monkeypatch):
    from phi3_mlx.engine import drafts
    from phi3_mlx.engine.lookup import LookupDrafter

    model, ids = dense("mini-4k"), ids_of(20)[0].tolist()

    def run(**options):
        with trace(model, keep=["resid_post", "pattern"]) as inside:
            generation = Generation(
                model, [ids], max_tokens=14, sampling=Sampling(temperature=0.0), stop_ids=stops, **options
            )
            tokens = [token.id for token in generation]
        return tokens, inside, generation

    stops: list[int] = []
    tokens, _, _ = run()
    stops = [] if stop is None else [tokens[stop]]
    plain, _, _ = run()
    guess = Wrong(tokens)
    monkeypatch.setattr(LookupDrafter, "draft", lambda self, most: guess(drafter[0].row, min(most, 5)))
    drafter: list[drafts.Drafter] = []
    init = drafts.Drafter.__init__

    def noted(self, *arguments):
        init(self, *arguments)
        drafter.append(self)

    monkeypatch.setattr(drafts.Drafter, "__init__", noted)
    drafted, inside, generation = run(lookup=8)
    assert drafted == plain
    assert generation.statistics.drafted_tokens > generation.statistics.accepted_tokens > 0
    cache = generation.cache[0]  # behind a stop it has the guesses that held
    read: list[int] = cache.sequence.ids[0, : cache.offset].tolist()
    assert read[: len(ids) + len(plain) - 1] == [*ids, *plain[:-1]]
    assert inside.positions("resid_post", 0) == [*range(len(read))]
    for place in ("resid_post", "pattern"):
        assert off(inside[place, 1], inspect(model, read, place)[place, 1]) < 1e-3


def test_a_run_that_does_not_fit_under_a_trace_says_so_before_it_reads(tiny, monkeypatch):
    from phi3_mlx import memory_limit
    from phi3_mlx.engine import machine

    model, tokenizer = tiny
    monkeypatch.setattr(machine, "_of_machine", lambda: 1 << 40)
    text = PROMPT * 60
    with memory_limit(mx.get_active_memory() + (90 << 20)):
        generate(model, tokenizer, text, max_tokens=2)
        with trace(model, keep=["pattern", "head_out", "act", "gate", "up", "logits"]) as inside:
            with pytest.raises(MemoryLimitError, match="without what the trace keeps"):
                generate(model, tokenizer, text, max_tokens=2)
            with pytest.raises(MemoryLimitError):
                next(stream_generate(model, tokenizer, text, max_tokens=2))
            assert inside.rows == 0
            assert generate(model, tokenizer, text, max_tokens=1, force=True)
            assert inside.rows == 1
            inside.clear()
        assert generate(model, tokenizer, text, max_tokens=1)


def test_positions_of_a_long_prompt_take_no_time_for_each_other():
    """One look at each of them, not at all of them for each."""
    from phi3_mlx.interpret.selecting import Tokens
    from phi3_mlx.models.hooks import Segment

    n = 100_000
    places, ordinals = Tokens([*range(1, n, 2), -1]).among(Segment(None, 1, 0, n, n))
    assert len(places) == n // 2
    assert ordinals[:3] == [0, 1, 2]
    assert places[-1] == n - 1


def test_what_a_pass_keeps_is_counted_with_all_keys_that_it_sees(monkeypatch):
    from phi3_mlx.interpret import tracing

    model, ids, counted = dense("mini-4k"), mx.array(ids_of(30)), []
    monkeypatch.setattr(tracing, "check_room", lambda what, parts, ways: counted.append(parts["kept"]))
    keep = [Keep("pattern", layers=[0, 2], heads=1), Keep("act", positions=slice(20, None)), Keep("z", positions=[3])]
    with trace(model, keep=keep) as inside:
        cache, held = model.make_cache(), 0
        for first in range(0, 30, 10):
            model(ids[:, first : first + 10], cache)
            kept = sum(
                piece.array.nbytes for group in inside._groups for pieces in group.pieces.values() for piece in pieces
            )
            assert counted.pop() == kept - held > 0
            held = kept


@pytest.mark.parametrize("when", long_after(1, ["decode", "always"]))
def test_a_draft_model_that_is_not_edited_guesses_for_a_run_that_is(when, monkeypatch):
    import oracle

    from phi3_mlx.engine import drafts
    from phi3_mlx.engine.payoff import StepTimes

    monkeypatch.setattr(drafts, "StepTimes", lambda: StepTimes(1e9, 0.0))  # draft whatever the clock says
    monkeypatch.setattr(StepTimes, "saw_plain", lambda self, seconds: None)
    model, draft, ids = dense("mini-4k"), oracle.make_ours(oracle.CONFIGS["mini-4k"]), ids_of(20)[0].tolist()
    vector = 0.4 * mx.random.normal((WIDTH,), key=mx.random.key(2))

    def run(edits, **options):
        with trace(model, edits=edits, keep="resid_post") as inside, trace(draft, keep="embed") as guesses:
            generation = Generation(model, [ids], max_tokens=24, sampling=Sampling(temperature=0.0), **options)
            return [token.id for token in generation], generation, inside, guesses

    edits = [steer(vector, layers=[1], when=when)]
    expected, plain = run(edits)[0], run([])[0]
    assert expected != plain
    for stop in expected[-8:]:  # some end behind a wrong guess
        drafted, generation, inside, guesses = run(edits, draft=draft, stop_ids=[stop])
        assert drafted == expected[: expected.index(stop) + 1]
        assert generation.statistics.drafted_tokens > 0
        assert inside.positions("resid_post", 0) == [*range(generation.cache[0].offset)]
        assert guesses.positions("embed") == [*range(generation.draft_cache[0].offset)]
    assert run([], draft=draft)[0] == plain


def test_threads_trace_one_model_at_once_each_for_itself(tiny):
    import threading

    model, tokenizer = tiny
    vector = 3 * mx.random.normal((256,), key=mx.random.key(1))
    mx.eval(vector)
    plain = generate(model, tokenizer, PROMPT, max_tokens=12)
    with trace(model, edits=steer(vector, layers=[1])):
        steered = generate(model, tokenizer, PROMPT, max_tokens=12)
    texts: dict[str, list[str]] = {}
    rows: dict[str, int] = {}

    def work(name, **options):
        with trace(model, **options) as inside:
            texts[name] = [generate(model, tokenizer, PROMPT, max_tokens=12) for _ in range(2)]
            rows[name] = inside.rows

    kinds = {"edits": {"edits": steer(vector, layers=[1])}, "looks": {"keep": "embed"}, "nothing": {}}
    threads = [threading.Thread(target=work, args=(name,), kwargs=options) for name, options in kinds.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steered != plain
    assert texts == {"edits": [steered] * 2, "looks": [plain] * 2, "nothing": [plain] * 2}
    assert rows["looks"] == 2


def test_a_trace_that_another_thread_closed_is_closed():
    import threading

    model, ids = dense("mini-4k"), mx.array(ids_of(5))
    expected = model(ids)
    opened = trace(model, keep="embed", edits=switch_off(0, None))
    inside = opened.__enter__()
    thread = threading.Thread(target=opened.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert mx.array_equal(model(ids), expected)
    assert inside.rows == 0
