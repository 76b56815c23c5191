"""The dense model against transformers' Phi3ForCausalLM: every head shape, factor list and window of the family.

Arrays that transformers computed are kept in `golden/`, so most of this runs where torch is missing.
"""

import functools
import warnings

import mlx.core as mx
import naive
import numpy as np
import oracle
import pytest
from make_golden import GOLDEN, LENGTHS, PROMPT, STEPS
from mlx.utils import tree_map
from oracle import CONFIGS, ORIGINAL, WINDOW, ids_of, last_logits, slim

from phi3_mlx.models import parse_config
from phi3_mlx.models.rope import Rope

TOLERANCE = 1e-3  # the promise; measured: 1e-5 to 1.3e-4
NAMES = list(CONFIGS)
MIXED = ["mini-4k", "3.5-mini", "phi-4-mini", "long-and-window"]  # window, regimes, partial rotary + GQA + tied, both


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)).max())


@functools.cache
def ours(name: str):
    return oracle.make_ours(CONFIGS[name])


@functools.cache
def theirs(name: str):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return oracle.make_torch(CONFIGS[name], ours(name))


@functools.cache
def slim_model(name: str):
    return oracle.make_ours(slim(CONFIGS[name]))


@functools.cache
def our_logits(name: str, length: int) -> np.ndarray:
    return np.array(ours(name)(mx.array(ids_of(length))))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


# Whole passes


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_golden(name, golden):
    for length in LENGTHS:
        assert off(our_logits(name, length)[0, -1], golden[f"{name}/{length}"]) < TOLERANCE, length


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_at_every_position(name):
    for length in (1, 2, *LENGTHS):
        expected = oracle.torch_logits(theirs(name), ids_of(length))
        assert expected.std() > 0.5  # logits that say nothing would agree with anything
        assert off(our_logits(name, length), expected) < TOLERANCE, length


@pytest.mark.parametrize("name", NAMES)
def test_golden_is_what_transformers_says(name, golden):
    for length in (ORIGINAL, ORIGINAL + 1):
        expected = oracle.torch_logits(theirs(name), ids_of(length))[0, -1]
        assert off(expected, golden[f"{name}/{length}"]) < 1e-4, "rerun tests/make_golden.py"


@pytest.mark.parametrize("name", NAMES)
def test_naive_oracle_equals_golden(name, golden):
    """The other slow oracle, in float64: it and transformers share no code."""
    raw, weights = CONFIGS[name], naive.weights_of(ours(name))
    for length in (WINDOW + 1, ORIGINAL, ORIGINAL + 1):
        assert off(naive.logits(raw, weights, ids_of(length)[0])[-1], golden[f"{name}/{length}"]) < 1e-3, length


@pytest.mark.parametrize("name", ["mini-128k-april", "mini-128k-june", "3.5-mini", "phi-4-mini"])
def test_the_two_factor_lists_differ_enough_to_be_seen(name):
    """What the parity tests above would miss if it were not so."""
    model, ids = ours(name), ids_of(ORIGINAL)
    short = last_logits(model, ids)
    model.model.longrope = "long"
    try:
        assert off(last_logits(model, ids), short) > 100 * TOLERANCE
    finally:
        model.model.longrope = "auto"


def test_window_is_crossed_enough_to_be_seen():
    model, ids = ours("mini-4k"), ids_of(60)
    wide = oracle.make_ours({**CONFIGS["mini-4k"], "sliding_window": None})
    assert off(last_logits(model, ids[:, :WINDOW]), last_logits(wide, ids[:, :WINDOW])) < 1e-5
    assert off(last_logits(model, ids[:, : WINDOW + 1]), last_logits(wide, ids[:, : WINDOW + 1])) > TOLERANCE


def test_a_batch_of_equal_lengths_is_its_rows():
    model, ids = ours("3.5-mini"), ids_of(ORIGINAL + 1, rows=3)
    alone = np.concatenate([last_logits(model, ids[i : i + 1]) for i in range(3)])
    assert off(last_logits(model, ids), alone) < 1e-4
    cache = model.make_cache()
    last_logits(model, ids[:, :ORIGINAL], cache)
    assert off(last_logits(model, ids[:, ORIGINAL:], cache), alone) < 1e-4


# Prefill in chunks


@pytest.mark.parametrize("name", MIXED)
def test_every_chunk_size_gives_the_one_shot_logits(name):
    """Chunks of 1, 2, ... up to the whole; window and boundary fall inside, at an edge and between chunks."""
    model, raw = slim_model(name), slim(CONFIGS[name])
    ids = ids_of(ORIGINAL + 5 if raw["rope_scaling"] else WINDOW + 9)
    expected = oracle.reference_steps(raw, model, ids[0])[-1]
    assert off(last_logits(model, ids), expected) < TOLERANCE
    for chunk in range(1, ids.shape[1] + 1):
        cache = model.make_cache()
        for first in range(0, ids.shape[1], chunk):
            hidden = model.model(mx.array(ids[:, first : first + chunk]), cache)
            mx.eval(hidden)
        assert cache[0].offset == ids.shape[1]
        assert off(model.logits(hidden[:, -1]), expected) < TOLERANCE, chunk


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_every_step_equals_transformers(name):
    """Each step's logits, through the window and over the boundary, are those of a whole pass of that length."""
    model, raw = slim_model(name), slim(CONFIGS[name])
    ids = ids_of(ORIGINAL + 8)
    expected = oracle.reference_steps(raw, model, ids[0])
    cache = model.make_cache()
    for t in range(ids.shape[1]):
        assert off(last_logits(model, ids[:, t : t + 1], cache), expected[t]) < TOLERANCE, t


# Greedy generation over window and boundary


@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_golden(name, golden):
    assert PROMPT < WINDOW
    assert PROMPT + STEPS > ORIGINAL + 16
    assert STEPS >= 64
    tokens = golden[f"{name}/tokens"].tolist()
    assert oracle.generate(ours(name), ids_of(PROMPT)[0], STEPS) == tokens


@pytest.mark.parametrize("name", NAMES)
def test_golden_generation_is_what_transformers_says(name, golden):
    assert oracle.torch_generate(theirs(name), ids_of(PROMPT)[0], STEPS) == golden[f"{name}/tokens"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_golden_generation_is_what_the_naive_oracle_says(name, golden):
    """Every golden token is the naive oracle's first choice after those before it."""
    raw, weights = CONFIGS[name], naive.weights_of(ours(name))
    tokens = golden[f"{name}/tokens"].tolist()
    ids = np.array([*ids_of(PROMPT)[0], *tokens[:-1]])
    steps = oracle.every_step(raw, lambda part: naive.logits(raw, weights, part), ids)
    assert steps[PROMPT - 1 :].argmax(axis=-1).tolist() == tokens


def test_naive_greedy_decode_equals_ours():
    """The naive loop itself, from scratch for every token, on a model small enough for it."""
    raw = slim(CONFIGS["3.5-mini"])
    model, ids = oracle.make_ours(raw), ids_of(ORIGINAL - 6)[0]
    assert naive.greedy(raw, naive.weights_of(model), ids, 16) == oracle.generate(model, ids, 16)


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("name", ["mini-4k", "3.5-mini", "phi-4-mini", "long-and-window"])
def test_mlx_lm_generate_step_gives_the_same_tokens(name, chunk, golden):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports'
        generate_step = pytest.importorskip("mlx_lm.generate").generate_step
    prompt = mx.array(ids_of(PROMPT)[0])
    stream = generate_step(prompt, ours(name), max_tokens=STEPS, prefill_step_size=chunk)
    assert [token for token, _ in stream] == golden[f"{name}/tokens"].tolist()


@pytest.mark.parametrize("chunk", [16, 512])
def test_mlx_lm_generate_step_starts_past_the_boundary(chunk):
    """generate_step reads all but the last prompt token, then that one: the boundary may fall between the two."""
    generate_step = pytest.importorskip("mlx_lm.generate").generate_step
    for length in (ORIGINAL, ORIGINAL + 1, ORIGINAL + 2):
        ids = ids_of(length)[0]
        stream = generate_step(mx.array(ids), ours("3.5-mini"), max_tokens=8, prefill_step_size=chunk)
        assert [token for token, _ in stream] == oracle.generate(ours("3.5-mini"), ids, 8), length


# Ragged batches


@pytest.mark.parametrize("chunk", [9, 64])
@pytest.mark.parametrize("name", MIXED)
def test_ragged_rows_equal_their_single_results(name, chunk):
    """Rows cross the boundary in prefill, early and late in decode: for a while they are in different regimes."""
    model, raw = slim_model(name), slim(CONFIGS[name])
    lengths, steps = (ORIGINAL + 4, 2, 23, ORIGINAL - 3), 48
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    rows = [ids_of(n + steps, seed=i)[0] for i, n in enumerate(lengths)]
    assert min(lengths) + steps > ORIGINAL, "every row ends long"
    expected = [oracle.reference_steps(raw, model, row) for row in rows]
    batch = np.stack([np.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)])

    cache = model.make_cache(left_padding=padding)
    for first in range(0, longest, chunk):
        last = last_logits(model, batch[:, first : min(first + chunk, longest)], cache)
    regimes = set()
    for t in range(longest, longest + steps):
        for i, pad in enumerate(padding):
            assert off(last[i], expected[i][t - pad - 1]) < TOLERANCE, (t, i)
        last = last_logits(model, batch[:, t : t + 1], cache)
        regimes.add(cache[0].sequence.long)
    if raw["rope_scaling"]:
        assert len(regimes) == 4, "the rows crossed one after another"


# One part at a time


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("offset", [0, 37])
def test_rotated_scores_equal_the_naive_ones(name, long, offset):
    """Scores q.k * scale of one head: angles, pairing, attention factor and the dims that pass through."""
    raw = CONFIGS[name]
    dim, length = raw["hidden_size"] // raw["num_attention_heads"], 5
    total = raw["original_max_position_embeddings"] + int(long)
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, length, dim)).astype(np.float32)
    cos, sin = (table[offset:] for table in naive.rope_table(raw, offset + length, total))
    expected = naive.rotate(q, cos, sin) @ naive.rotate(k, cos, sin).T / np.sqrt(dim)
    rope = Rope(parse_config(raw))
    turned = rope.rotate(mx.array(np.stack([q, k]))[None], offset, long)
    ours_q, ours_k = np.array(rope.gain(turned[:, :1], long))[0, 0], np.array(turned)[0, 1]
    assert off(ours_q @ ours_k.T * rope.scale, expected) < 1e-4


@pytest.mark.parametrize("name", ["mini-4k", "mini-128k-june", "3.5-mini", "phi-4", "phi-4-mini"])
@pytest.mark.parametrize("offset", [4090, 131_000])
def test_far_positions_are_turned_by_the_references_angles(name, offset):
    """A frequency one float32 bit off is 5e-4 rad at position 4,096 and 2e-2 at 131,072: too far for 1e-3."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    raw = CONFIGS[name]
    rotary, rope = theirs(name).model.rotary_emb, Rope(parse_config(raw))
    x = np.random.default_rng(2).standard_normal((1, 1, 6, raw["hidden_size"] // raw["num_attention_heads"]))
    x = x.astype(np.float32)
    cos, sin = rotary(torch.tensor(x), torch.arange(offset, offset + 6)[None])
    cos, sin = cos / rotary.attention_scaling, sin / rotary.attention_scaling  # ours is in the scale
    expected = reference.apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin)[1].numpy()
    long = raw["rope_scaling"] is not None
    assert off(rope.rotate(mx.array(x), offset, long), expected) < (1e-4 if offset < 10_000 else 2e-3)


def test_unrotated_dims_pass_through_unscaled():
    """Of Phi-4-mini's 128 dims the last 32 are neither turned nor multiplied by the attention factor."""
    rope = Rope(parse_config(CONFIGS["phi-4-mini"]))
    x = mx.random.normal((2, 3, 7, 128), key=mx.random.key(0))
    for long in (False, True, (False, True)):
        keys = rope.rotate(x, 5, long)
        for turned in (keys, rope.gain(keys, long)):
            assert mx.array_equal(turned[..., 96:], x[..., 96:])
            assert not mx.allclose(turned[..., :96], x[..., :96])
    assert rope.scale == pytest.approx(128**-0.5)


@pytest.mark.parametrize("name", ["3.5-mini", "phi-4-mini"])
def test_attention_factor_counts_at_short_length(name):
    """Leaving it out of a 10-token prompt would be seen; one given in the config is used as it is."""
    raw = slim(CONFIGS[name])
    automatic, ids = oracle.make_ours(raw), ids_of(10)
    for key, value in (("attention_factor", 1.0), ("attention_factor", 1.3), ("factor", 4.0)):
        changed = {**raw, "rope_scaling": {**raw["rope_scaling"], key: value}}
        model = oracle.make_ours(changed)
        assert off(last_logits(model, ids), last_logits(automatic, ids)) > 10 * TOLERANCE
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        expected = oracle.torch_logits(oracle.make_torch(changed, model), ids)[:, -1]
        assert off(last_logits(model, ids), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["3.5-mini", "phi-4-mini"])
def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(name):
    torch = pytest.importorskip("torch")
    reference = theirs(name)
    rounded = oracle.make_torch(CONFIGS[name], ours(name)).to(torch.bfloat16)
    model = oracle.make_ours(CONFIGS[name])
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    for length in (20, ORIGINAL + 1):
        ids = ids_of(length)
        exact = oracle.torch_logits(reference, ids)
        logits = model(mx.array(ids))
        assert logits.dtype == mx.bfloat16
        logits = np.array(logits.astype(mx.float32))
        with torch.no_grad():
            half = rounded(torch.tensor(ids.astype(np.int64)), use_cache=False).logits.float().numpy()
        # Measured: 0.8 to 1.02 of transformers' mean error (we rotate in float32, it in bfloat16).
        assert np.abs(logits - exact).mean() < 1.2 * np.abs(half - exact).mean()
        cache = model.make_cache()
        model(mx.array(ids[:, :-1]), cache)
        step = model(mx.array(ids[:, -1:]), cache)
        assert cache[0].state[0].dtype == mx.bfloat16
        assert off(step.astype(mx.float32), logits[:, -1:]) < 0.1
