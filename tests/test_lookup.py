"""Drafts from earlier text change how many steps a run takes, and nothing else."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from conftest import long_after
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CONFIGS, ORIGINAL, slim

from phi3_mlx.engine import drafts
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.lookup import LookupDrafter, accepted_of
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.models.decoder import Decoder

NAMES = ["mini-4k", "3.5-mini", "long-and-window"]
MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in NAMES}
PHRASE = [11, 52, 93, 14, 75, 36, 87]


def run(model, prompt, max_tokens=40, sampling=None, **options):
    generation = Generation(
        model, [prompt], max_tokens=max_tokens, sampling=sampling or Sampling(), room=math.inf, **options
    )
    return [(token.id, token.finish_reason) for token in generation], generation


def always(monkeypatch):
    """Draft whatever agrees, whatever the clock says, so that tests do not depend on the machine."""
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)


def prophecy(monkeypatch, answer, seed=0):
    """Drafts of the right tokens, one of them wrong now and then: every number of accepted tokens comes up."""
    random = np.random.default_rng(seed)

    class Prophet(LookupDrafter):
        def __init__(self, ids, most, times):
            super().__init__([], most, times)

        def draft(self, most):
            place = len(self._ids)
            right = answer[place : place + int(random.integers(0, min(most, self.most) + 1))]
            if right and random.random() < 0.6:
                right[random.integers(len(right))] ^= 1
            return right

    monkeypatch.setattr(drafts, "LookupDrafter", Prophet)


@pytest.mark.parametrize("length", [20, ORIGINAL - 9, ORIGINAL - 1, ORIGINAL + 5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(repetition_penalty=1.1), Sampling(0.7, top_p=0.9, repetition_penalty=1.05, seed=3)],
    ids=["greedy", "penalty", "draws"],
)
def test_the_tokens_are_those_of_plain_decoding(name, length, sampling, monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    model, prompt = MODELS[name], (PHRASE * 20)[:length]
    plain, before = run(model, prompt, sampling=sampling)
    prophecy(monkeypatch, [token for token, _ in plain])
    drafted, after = run(model, prompt, sampling=sampling, lookup=9)
    assert drafted == plain
    statistics = after.statistics
    assert statistics.drafted_tokens > statistics.accepted_tokens > 5
    assert statistics.generated_tokens == before.statistics.generated_tokens == 40
    assert statistics.decode_steps + statistics.accepted_tokens == 39
    assert after.cache[0].offset <= length + 40


def test_a_loop_is_decoded_in_fewer_steps(monkeypatch):
    """An answer that repeats itself is drafted from itself: with 8 at a time, far fewer steps than tokens."""
    always(monkeypatch)

    class Loop:
        """Says the phrase forever; stands in for a model where only the drafts are under test."""

        config, dtype, of_family = MODELS["mini-4k"].config, mx.float32, True

        def __init__(self):
            self.model = self.Body()

        class Body:
            def __call__(self, ids, cache):
                cache[0].offset += ids.shape[1]
                return mx.array(ids)[..., None].astype(mx.float32)

            def together(self, ids, lengths, caches, newest=False):
                hidden = self(ids, caches[0])
                return hidden[:, -1:] if newest else hidden

            def is_long(self, total):
                return False

        def parameters(self):
            return {}

        def make_cache(self, *_):
            cache = KVCache()
            cache.trim = lambda n: setattr(cache, "offset", cache.offset - n)
            return [cache]

        def logits(self, hidden, places=None):
            ids = hidden[..., 0].astype(mx.int32)
            following = mx.zeros((200,), mx.int32)
            for here, there in zip(PHRASE, PHRASE[1:] + PHRASE[:1], strict=True):
                following[here] = there
            return (mx.arange(96) == following[ids][..., None]).astype(mx.float32) * 50

    tokens, generation = run(Loop(), PHRASE * 2, 41, lookup=8)
    assert [token for token, _ in tokens] == (PHRASE * 9)[:41]
    statistics = generation.statistics
    assert statistics.accepted_tokens == statistics.drafted_tokens
    assert statistics.decode_steps == math.ceil(40 / 9)
    assert statistics.decoded_tokens == 40


def test_a_stop_id_inside_a_draft_ends_the_answer_there(monkeypatch):
    model = MODELS["mini-4k"]
    prompt = PHRASE * 6
    plain, _ = run(model, prompt, 30)
    prophecy(monkeypatch, [token for token, _ in plain])
    stop = plain[17][0]
    expected, _ = run(model, prompt, 30, stop_ids={stop})
    drafted, _ = run(model, prompt, 30, stop_ids={stop}, lookup=9)
    assert drafted == expected
    assert drafted[-1] == (stop, "stop")


@pytest.mark.parametrize("bits", [None, KVBits(4, 4)], ids=["plain cache", "4-bit cache"])
@pytest.mark.parametrize("packed", [False, True], ids=["float32", "4-bit weights"])
def test_packed_caches_and_weights_give_the_same_tokens_too(bits, packed, monkeypatch):
    """A step that verifies a draft reads packed keys, and multiplies packed weights, in other ways than one token."""
    model = oracle.make_ours(slim(CONFIGS["mini-4k"]))
    if packed:
        nn.quantize(
            model,
            group_size=32,
            bits=4,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
        )
    for seed in range(3):
        prompt = (np.random.default_rng(seed).integers(1, 90, 7).tolist()) * 5
        plain, _ = run(model, prompt, 30, kv_bits=bits)
        prophecy(monkeypatch, [token for token, _ in plain], seed)
        drafted, generation = run(model, prompt, 30, kv_bits=bits, lookup=9)
        assert drafted == plain
        assert generation.statistics.accepted_tokens > 5


def test_a_stop_string_inside_a_draft_ends_the_answer_there(monkeypatch):
    """The reader of the tokens finishes the row; what the step has verified behind that is not said."""
    model = MODELS["mini-4k"]
    prompt = PHRASE * 6
    plain, _ = run(model, prompt, 30)
    prophecy(monkeypatch, [token for token, _ in plain])
    generation = Generation(model, [prompt], max_tokens=30, sampling=Sampling(), lookup=9, room=math.inf)
    said = []
    for token in generation:
        said.append(token.id)
        if len(said) == 17:
            generation.finish(0)
    assert said == [token for token, _ in plain[:17]]
    assert generation.statistics.accepted_tokens > 17 - generation.statistics.decode_steps  # it was inside a draft


def test_no_step_is_begun_behind_the_last_token():
    _, generation = run(MODELS["mini-4k"], PHRASE, 5, lookup=9)
    assert generation.statistics.generated_tokens == 5
    assert generation.cache[0].offset == len(PHRASE) + 4  # the last token is said, and not read


def test_guesses_that_never_hold_do_not_go_on_untimed():
    drafter = LookupDrafter([1, 2, 3] * 20, 16)
    lengths = []
    for _ in range(40):
        draft = drafter.draft(8)
        lengths.append(len(draft))
        if not draft:
            break
        drafter.saw_draft(len(draft), 0, 1.0)
    assert lengths[-1] == 0


def test_no_draft_reads_over_the_boundary(monkeypatch):
    """Were one to, the tokens before the boundary would get the long factors, and the cache be recomputed each time."""
    model, prompt = MODELS["3.5-mini"], (PHRASE * 20)[: ORIGINAL - 12]
    prophecy(monkeypatch, [token for token, _ in run(model, prompt)[0]])
    totals = []
    call = Decoder.__call__

    def counting(self, ids, cache=None):
        totals.append((cache[0].offset, cache[0].offset + ids.shape[1]))
        return call(self, ids, cache)

    monkeypatch.setattr(Decoder, "__call__", counting)
    _, generation = run(model, prompt, lookup=9)
    assert generation.statistics.accepted_tokens > 5
    assert max(last - first for first, last in totals[1:]) > 3
    assert not [first for first, last in totals if first < ORIGINAL < last]


def test_trims_of_drafts_never_cost_a_window(monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    model, prompt = MODELS["mini-4k"], PHRASE * 12
    prophecy(monkeypatch, [token for token, _ in run(model, prompt, 60)[0]])
    work = []
    monkeypatch.setattr(KVCache, "forget", lambda self: work.append(self))
    _, generation = run(model, prompt, 60, lookup=16)
    assert generation.statistics.drafted_tokens - generation.statistics.accepted_tokens > 10
    assert not work


@pytest.mark.parametrize("top_k", long_after(1, [3, 0]))
def test_the_distribution_is_the_models(top_k, monkeypatch):
    """400 draws of two tokens, drafted and plain, against the model's own probabilities (chi-squared)."""
    model, prompt = MODELS["mini-4k"], PHRASE * 5
    sampling = Sampling(temperature=0.4, top_k=top_k)

    def probabilities(ids):
        scores = np.array(model(mx.array([ids]))[0, -1], dtype=np.float64) / 0.4
        if top_k:
            scores[scores < np.sort(scores)[-top_k]] = -np.inf
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    first = probabilities(prompt)
    likely = np.argsort(-first)[:3]
    prophecy(monkeypatch, [int(likely[0]), int(likely[0]) ^ 1, int(likely[1])])
    seen: dict[int, list[int]] = {int(token): [] for token in likely}
    drafted = accepted = 0
    counts = np.zeros(len(first))
    for seed in range(400):
        tokens, generation = run(model, prompt, 3, Sampling(sampling.temperature, top_k=top_k, seed=seed), lookup=4)
        drafted += generation.statistics.drafted_tokens
        accepted += generation.statistics.accepted_tokens
        counts[tokens[0][0]] += 1
        if tokens[0][0] in seen:
            seen[tokens[0][0]].append(tokens[1][0])
    assert drafted > accepted > 0
    assert chi_squared(counts, first) < 4
    for token, nexts in seen.items():
        if len(nexts) > 60:
            assert chi_squared(np.bincount(nexts, minlength=len(first)), probabilities([*prompt, token])) < 4


def chi_squared(counts, expected):
    """(statistic - degrees) / sqrt(2 degrees): about standard normal; rare outcomes are lumped together."""
    total = counts.sum()
    common = expected * total >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common] * total, max(expected[~common].sum() * total, 1e-9))
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    degrees = max(len(observed) - 1, 1)
    return (((observed - wanted) ** 2 / wanted).sum() - degrees) / math.sqrt(2 * degrees)


def test_several_rows_are_decoded_plainly():
    generation = Generation(
        MODELS["mini-4k"], [PHRASE * 4, PHRASE * 3], max_tokens=12, sampling=Sampling(), lookup=8, room=math.inf
    )
    list(generation)
    assert generation.statistics.drafted_tokens == 0


# The drafter alone


def test_the_longest_agreement_wins_then_the_latest():
    ids = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 1, 2, 3, 4]
    assert LookupDrafter(ids).draft(1) == [50]
    ids = [7, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 5, 2, 3, 4]
    assert LookupDrafter(ids).draft(1) == [60]
    assert LookupDrafter([1, 2, 3, 4, 5]).draft(4) == []
    assert LookupDrafter([1, 2]).draft(4) == []


def test_a_draft_ends_where_the_text_does():
    assert LookupDrafter([5, 6, 7, 5, 6, 7], most=16).draft(16) in ([5, 6, 7], [5, 6], [5])


def test_rejected_drafts_grow_short_and_accepted_ones_long():
    drafter = LookupDrafter(PHRASE * 8, most=16)
    drafter.times.saw_plain(1.0)
    for _ in range(6):
        drafter.saw_draft(8, 8, 1.8)
    long = len(drafter.draft(16))
    for _ in range(6):
        drafter.saw_draft(8, 0, 1.8)
    assert long == 7  # to the end of the text: the last 16 agree with the 16 one phrase back
    assert len(drafter.draft(16)) <= 1


def test_a_draft_is_short_until_one_was_timed():
    """Where each token costs as much as a step, a first draft of 16 would cost 16 of them."""
    drafter = LookupDrafter([*range(40), *range(20)], most=16)
    drafter.times.saw_plain(1.0)
    assert len(drafter.draft(16)) == 4
    drafter.saw_draft(4, 4, 1.04)
    assert len(drafter.draft(16)) == 16


def test_a_step_that_costs_as_much_as_its_tokens_is_not_drafted():
    drafter = LookupDrafter(PHRASE * 8, most=16)
    drafter.times.saw_plain(1.0)
    for _ in range(6):
        drafter.saw_draft(8, 6, 9.0)
    assert drafter.draft(16) == []


def test_after_failures_a_cheap_draft_is_tried_again():
    drafter = LookupDrafter(PHRASE * 8, most=16)
    drafter.times.saw_plain(1.0)
    for _ in range(20):
        drafter.saw_draft(4, 0, 1.2)
    lengths = [len(drafter.draft(16)) for _ in range(40)]
    assert lengths[0] == 0
    assert max(lengths) > 0


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
@settings(deadline=None)
def test_a_draft_is_a_continuation_that_stood_there(ids, most):
    draft = LookupDrafter(ids).draft(most)
    assert len(draft) <= most
    if draft:
        key = ids[-3:]
        places = [i for i in range(3, len(ids)) if ids[i - 3 : i] == key]
        assert any(ids[place : place + len(draft)] == draft for place in places)


def test_accepted_tokens_are_counted_up_to_the_first_wrong_one():
    assert accepted_of([1, 2, 3], [1, 2, 3, 4]) == 3
    assert accepted_of([1, 2, 3], [1, 9, 3, 4]) == 1
    assert accepted_of([1], [2, 1]) == 0
