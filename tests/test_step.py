"""The compiled step of decoding against the plain path, on every member of the family."""

import copy
import threading

import mlx.core as mx
import mlx.nn as nn
import moe_models
import oracle
import pytest
import small_models
from oracle import ids_of

from phi3_mlx import blas
from phi3_mlx.adapters.lora import AdaptedLinear, Adapter
from phi3_mlx.models import step
from phi3_mlx.models.cache import KVBits
from phi3_mlx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("sharing_at_once")
FAMILY = {
    **{name: (oracle.make_ours, raw) for name, raw in oracle.CONFIGS.items()},
    "small": (small_models.make, small_models.RAW),
    "small, long": (small_models.make, small_models.RAW | small_models.LONG),
    **{f"moe, {name}": (moe_models.make_ours, raw) for name, raw in moe_models.CONFIGS.items()},
}
PACKED = ("mini-4k", "phi-4-mini", "moe, released")
CASES = [*((name, None) for name in FAMILY), *((name, KVBits(8, 4)) for name in PACKED)]
STEPS = 7  # behind prompts of which some end before a boundary or a window, and some behind it
TOLERANCE = 1e-5  # of logits of several units


def make(name):
    build, raw = FAMILY[name]
    return build(raw)


def decode(model, prompts, steps, bits=None):
    """Logits of each row (steps, vocab_size), whose tokens do not depend on them; a row of one goes in by itself."""
    caches = [model.make_cache(bits=bits) for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        mx.eval(model(mx.array(prompt), cache))
    found = []
    for i in range(steps):
        ids = mx.array([[1 + (7 * i + row) % 80 for row in range(len(prompts))]])
        if len(prompts) == 1:
            hidden = model.model(ids, caches[0])
        else:
            hidden = model.model.together(ids, [1] * len(prompts), caches)
        found.append(model.logits(hidden[0]))
    return mx.stack(found, axis=1)


def off(some, others):
    return mx.abs(some - others).max().item() / mx.abs(others).max().item()


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function with every step on the plain path."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "_step", lambda *_: None)
            return function(*arguments)

    return call


@pytest.fixture
def counted(monkeypatch):
    """The steps that were compiled and taken."""
    taken, begin = [], step.Steps.begin

    def noted(*arguments):
        taken.append(begin(*arguments))
        return taken[-1]

    monkeypatch.setattr(step.Steps, "begin", noted)
    return lambda: [one is not None for one in taken]


@pytest.mark.parametrize("lengths", [[45], [46, 3, 20, 60]], ids=["one row", "rows"])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *((name, None) for name in FAMILY),
        *((name, KVBits(8, 4)) for name in ("mini-4k", "phi-4-mini", "moe, released")),
    ],
)
def test_a_compiled_step_is_the_plain_one_across_boundary_and_window(name, bits, lengths, plainly, counted):
    model, prompts = make(name), [ids_of(length, seed=length) % 90 for length in lengths]
    compiled = decode(model, prompts, STEPS, bits)
    assert all(counted())
    assert off(compiled, plainly(decode, model, prompts, STEPS, bits)) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["3.5-mini", "small", "moe, released"])
def test_quantization_in_between_is_seen(name, bits, rows, plainly, counted):
    model, prompts = make(name), [ids_of(5, seed=row) % 90 for row in range(rows)]
    before = decode(model, prompts, 2)
    nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, module: _divides(module))
    after = decode(model, prompts, 2)
    assert all(counted())
    assert off(after, plainly(decode, model, prompts, 2)) < TOLERANCE
    assert off(after, before) > 100 * TOLERANCE


def _divides(module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize("rows", [7, 9])
def test_rows_of_packed_weights_are_compiled_where_none_is_dequantized(rows, plainly, counted, monkeypatch):
    monkeypatch.setattr(blas, "is_fast", lambda: True)
    packing = {"group_size": 32, "bits": 4}
    prompts = [ids_of(5, seed=row) % 90 for row in range(rows)]
    for changes in ({}, {"hidden_size": 64, "intermediate_size": 96}):
        model = oracle.make_ours({**oracle.BASE, **changes, "quantization": packing})
        nn.quantize(model, **packing)
        assert off(decode(model, prompts, 2), plainly(decode, model, prompts, 2)) < TOLERANCE
    assert counted() == [True] * (4 if rows == 7 else 2)  # 9 rows of the wider model are dequantized


def test_new_weights_and_types_are_seen(plainly, counted):
    model, prompts = make("phi-4-mini"), [ids_of(5) % 90]
    before = decode(model, prompts, 2)
    model.layers[1].mlp.down_proj.weight = model.layers[1].mlp.down_proj.weight * 0.5
    halved = decode(model, prompts, 2)
    assert off(halved, before) > 100 * TOLERANCE
    assert off(halved, plainly(decode, model, prompts, 2)) < TOLERANCE
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        model.set_dtype(dtype)
        found = decode(model, prompts, 2)
        assert found.dtype == dtype
        assert off(found, plainly(decode, model, prompts, 2)) < (TOLERANCE if dtype == mx.float32 else 0.02)
    assert all(counted())


def test_adapters_put_on_and_off_in_between_are_seen(plainly, counted):
    model, prompts = make("3.5-mini"), [ids_of(5) % 90]
    before, attention = decode(model, prompts, 2), model.layers[1].self_attn
    linear = attention.o_proj
    a, b = mx.random.normal((linear.weight.shape[1], 2)), mx.random.normal((2, linear.weight.shape[0]))
    attention.o_proj = AdaptedLinear(linear, {"default": Adapter(a, b, 1.0)})
    adapted = decode(model, prompts, 2)
    assert off(adapted, before) > 100 * TOLERANCE
    assert mx.array_equal(adapted, plainly(decode, model, prompts, 2))
    attention.o_proj = linear
    assert mx.array_equal(decode(model, prompts, 2), before)
    assert counted() == [True] * 2 + [False] * 2 + [True] * 2


def test_a_module_that_is_not_known_takes_the_plain_path(counted):
    class Noting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def __call__(self, x):
            self.calls += 1
            return self.inner(x)

    model = make("3.5-mini")
    noting = model.layers[2].mlp = Noting(model.layers[2].mlp)
    decode(model, [ids_of(5) % 90], 3)
    assert noting.calls == 4  # of the prompt and of every step
    assert counted() == [False] * 3


def test_experts_that_wait_for_the_router_take_the_plain_path(plainly, counted):
    model, prompts = make("moe, released"), [ids_of(2, seed=row) % 90 for row in range(32)]
    assert off(decode(model, prompts, 1), plainly(decode, model, prompts, 1)) < TOLERANCE
    assert counted() == [False]


def test_rows_of_one_padded_cache_take_the_plain_path(counted):
    model = make("3.5-mini")
    cache = model.make_cache(left_padding=[2])
    model(mx.array(ids_of(5)), cache)
    model(mx.array([[5]]), cache)
    assert counted() == [False]


def test_a_copy_of_a_model_has_steps_of_its_own(counted):
    model, prompts = make("3.5-mini"), [ids_of(5) % 90]
    before = decode(model, prompts, 2)
    twin = copy.deepcopy(model)
    twin.layers[0].mlp.down_proj.weight *= 0.5
    assert off(decode(twin, prompts, 2), before) > 100 * TOLERANCE
    assert mx.array_equal(decode(model, prompts, 2), before)
    assert all(counted())


def test_threads_decode_alike_at_once():
    model, prompts = make("3.5-mini"), [ids_of(5) % 90]
    expected = decode(model, prompts, 8)
    mx.eval(expected)
    found = [None] * 4

    def run(i):
        found[i] = decode(model, prompts, 8)
        mx.eval(found[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(array is not None and mx.array_equal(array, expected) for array in found)
