"""Positions that a sequence does not have: an error where no more of it can come, a warning where it did not come."""

import mlx.core as mx
import pytest
from oracle import ORIGINAL, ids_of
from test_inside import dense, off

from phi3_mlx import (
    Keep,
    PromptCache,
    batch_generate,
    change,
    encode_prompt,
    generate,
    inspect,
    load,
    measure_edits,
    patch,
    steer,
    switch_off,
    trace,
)
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import OptionError
from phi3_mlx.interpret.selecting import Tokens

WIDTH = 192  # of the dense models
PROMPT = "Tell me a story about a duck and a frog."


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def answered(model, ids, tokens=4, **options):
    run = Generation(model, [ids], max_tokens=tokens, sampling=Sampling(temperature=0.0), **options)
    return [token.id for token in run]


# Where nothing can follow


@pytest.mark.parametrize("position", [9, -10, [2, 9], [0, -10]])
def test_a_position_outside_is_refused_with_the_length(position):
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    lacking = position if isinstance(position, int) else position[1]
    message = f"position {lacking} of {{}} is outside a sequence of 9 tokens; give -9 to 8"
    edit, keep = switch_off(0, 1, positions=position), Keep("resid_post", positions=position)
    for options, what in [
        ({"edits": edit, "keep": "embed"}, "an edit of z"),
        ({"keep": keep}, "what is kept of resid_post"),
    ]:
        with pytest.raises(OptionError, match=message.format(what)):
            inspect(model, ids, **options)
        with trace(model, **options) as inside, pytest.raises(OptionError, match=message.format(what)):
            model(mx.array([ids]))
        assert inside.rows == 0
    for inner in (8, -9, [0, 8]):
        assert inspect(model, ids, Keep("resid_post", positions=inner))["resid_post", 0].shape[0] == 1


def test_each_of_several_sequences_must_have_it():
    model = dense("mini-4k")
    rows = [ids_of(length)[0].tolist() for length in (12, 5, 30)]
    for position in (5, -6):
        with pytest.raises(
            OptionError, match=f"position {position} of an edit of resid_mid is outside a sequence of 5"
        ):
            inspect(model, rows, "embed", patch("resid_mid", 0.0, positions=[0, position]))
    inside = inspect(model, rows, Keep("resid_mid", positions=[4, -5]))
    assert [inside.positions("resid_mid", 0, row) for row in range(3)] == [[4, 7], [0, 4], [4, 25]]


def test_a_slice_takes_what_is_there_unless_nothing_is():
    model = dense("mini-4k")
    rows = [ids_of(length)[0].tolist() for length in (12, 5)]
    inside = inspect(model, rows, Keep("embed", positions=slice(3, 99)))
    assert [inside.positions("embed", None, row) for row in range(2)] == [[*range(3, 12)], [3, 4]]
    far = slice(12, None)
    with pytest.raises(
        OptionError, match=r"an edit of z at positions slice\(12, None, None\): a prompt of 12 tokens has"
    ):
        inspect(model, rows, "embed", switch_off(0, 1, positions=far))
    with (
        pytest.warns(
            UserWarning, match=r"what is kept of z at positions slice\(12, None, None\): no such token was read"
        ),
        trace(model, keep=Keep("z", positions=far)),
    ):
        model(mx.array(ids_of(12)))


def test_an_edit_of_answers_is_refused_where_there_is_none():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    edit = steer(mx.ones(WIDTH), layers=[1], when="decode")
    with pytest.raises(OptionError, match="an edit of resid_post of answers: a prompt of 9 tokens has no such token"):
        inspect(model, ids, "embed", edit)
    with pytest.raises(OptionError, match="of answers"):
        measure_edits(model, ids, [[], [edit]], lambda logits: logits[:, 0])


def test_no_positions_are_no_mistake():
    model, ids = dense("mini-4k"), ids_of(9)
    for nothing in ([], (), range(3, 3)):
        with trace(model, keep="embed", edits=patch("embed", 0.0, positions=nothing)) as inside:
            expected = model(mx.array(ids))
        assert mx.array_equal(expected, model(mx.array(ids)))
        assert mx.array_equal(
            inspect(model, ids, "embed", patch("embed", 0.0, positions=nothing))["embed"], inside["embed"]
        )


def test_bounds_of_slices_and_the_first_position_are_taken_as_they_are():
    for wrong in (slice("a", None), slice(None, 1.5), slice(0, 9, -1)):
        with pytest.raises(OptionError, match="positions"):
            steer(mx.ones(WIDTH), positions=wrong)
    assert not Tokens(0).by_prompt
    assert not Tokens([0, 3]).by_prompt
    assert Tokens([0, -1]).by_prompt
    assert Tokens(slice(-3, None)).by_prompt
    assert not Tokens(slice(0, 3)).by_prompt


# Where more may come


def test_a_position_may_come_while_it_generates():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    plain = answered(model, ids)
    seen = []

    def note(x):
        seen.append(x.shape)
        return x

    edits = [change("z", note, layers=0, positions=11), change("z", note, layers=0, positions=[10], when="decode")]
    with trace(model, keep=Keep("embed", positions=[0, 11]), edits=edits) as inside:
        assert answered(model, ids) == plain
    assert seen == [(1, 1, 2, WIDTH // 2)] * 2
    assert inside.positions("embed") == [0, 11]


def test_a_position_that_never_came_is_told_when_the_trace_ends():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    plain = answered(model, ids)
    for options, message in [
        (
            {"edits": switch_off(0, 1, positions=[2, 12])},
            "position 12 of an edit of z was not among the tokens that were",
        ),
        ({"keep": Keep("z", positions=[12])}, "position 12 of what is kept of z was not .* in a sequence of 12 tokens"),
        ({"edits": switch_off(0, 1, positions=8, when="decode")}, "position 8 of an edit of z was not among"),
        (
            {"edits": switch_off(0, 1, positions=slice(12, None))},
            r"an edit of z at positions slice\(12, None, None\): no",
        ),
    ]:
        with pytest.warns(UserWarning, match=message) as told, trace(model, **options):
            answered(model, ids)
        assert len(told) == 1
        assert told[0].filename == __file__
    with (
        pytest.warns(UserWarning, match="an edit of z of answers: no such token"),
        trace(model, edits=switch_off(0, 1, when="decode")),
    ):
        answered(model, ids, tokens=1)
    assert answered(model, ids) == plain


def test_what_a_prompt_can_never_have_is_refused_at_once():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    for edit, message in [
        (
            switch_off(0, 1, positions=-10),
            "position -10 of an edit of z is outside a prompt of 9 tokens; give -9 or more",
        ),
        (switch_off(0, 1, positions=9, when="prefill"), "position 9 of an edit of z .* 9 tokens; give -9 to 8"),
    ]:
        for chunk in (None, 4):
            with trace(model, edits=edit), pytest.raises(OptionError, match=message):
                answered(model, ids, prefill_chunk=chunk)


def test_a_loop_of_ones_own_says_where_the_prompt_ends():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()

    def read(cache):
        for first in (0, 3, 6):
            model(mx.array([ids[first : first + 3]]), cache)

    with trace(model, keep=Keep("embed", positions=[-7, -1])) as inside:
        read(model.make_cache(9))
    assert inside.positions("embed") == [2, 8]
    with trace(model, keep=Keep("embed", positions=-1)) as inside:
        read(model.make_cache())  # it ends with each call of several tokens
    assert inside.positions("embed") == [2, 5, 8]
    with (
        pytest.warns(UserWarning, match="position -7 of what is kept of embed was not .* a sequence of 9 tokens"),
        trace(model, keep=Keep("embed", positions=-7)),
    ):
        read(model.make_cache())


def test_each_sequence_of_a_batch_counts(tiny):
    model, tokenizer = tiny
    prompts = [PROMPT, "A", "Why is the owl sad?"]
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    position = lengths[0] - 1
    assert max(lengths[1:]) + 2 < position
    with (
        pytest.warns(UserWarning, match=f"position {position} of an edit of z .* in 2 of 3 sequences"),
        trace(model, edits=switch_off(0, 1, positions=position)),
    ):
        batch_generate(model, tokenizer, prompts, max_tokens=2)


def test_what_a_cache_brought_did_not_come(tiny):
    model, tokenizer = tiny
    cache = PromptCache(model)
    generate(model, tokenizer, PROMPT, max_tokens=1, prompt_cache=cache)
    with (
        pytest.warns(UserWarning, match="position 1 of what is kept of embed was not among the tokens that were read"),
        trace(model, keep=Keep("embed", positions=[1, -1])),
    ):
        generate(model, tokenizer, PROMPT, max_tokens=1, prompt_cache=cache)


def test_an_error_is_not_followed_by_a_warning():
    model, ids = dense("mini-4k"), mx.array(ids_of(9))
    with pytest.raises(ZeroDivisionError), trace(model, edits=switch_off(0, 1, when="decode")):
        raise ZeroDivisionError(model(ids).shape)


def test_a_guess_that_was_wrong_did_not_come(monkeypatch):
    from phi3_mlx.engine.lookup import LookupDrafter

    model, ids = dense("mini-4k"), ids_of(20)[0].tolist()
    tokens = answered(model, ids, tokens=12)
    stop = next(n for n in range(2, 12) if tokens[n] not in tokens[:n])  # guesses reach behind it
    wrong = [(token + 1) % 100 for token in tokens]
    monkeypatch.setattr(LookupDrafter, "draft", lambda self, most: wrong[: min(most, 5)])
    read = []
    with (
        pytest.warns(UserWarning, match=f"position {20 + stop + 1} of what is kept of embed was not among"),
        trace(model, keep=Keep("embed", positions=[0, 20 + stop + 1])) as inside,
        trace(model, edits=change("embed", lambda x: read.append(x.shape[1]) or x)),
    ):
        assert answered(model, ids, tokens=12, lookup=5, stop_ids=[tokens[stop]]) == tokens[: stop + 1]
    assert max(read[1:]) > 3
    assert inside.positions("embed") == [0]


def test_a_recomputed_prompt_came_once():
    """Over the boundary, where the model reads all again."""
    model, ids = dense("phi-4-mini"), ids_of(ORIGINAL - 2)[0].tolist()
    with trace(
        model, keep=Keep("embed", positions=[0, -1, ORIGINAL]), edits=patch("z", 0.0, positions=[-1, 3])
    ) as inside:
        answered(model, ids, tokens=6)
    assert inside.positions("embed") == [0, ORIGINAL - 3, ORIGINAL]


# Logits, which are made of some tokens alone


def test_logits_of_some_tokens_of_several_rows_find_their_rows():
    model, ids = dense("mini-4k"), mx.array(ids_of(7, rows=3))
    whole = model(ids)
    some = [1, 2, 7, 8, 20]  # of 3 rows of 7
    with trace(model, keep="logits", edits=patch("logits", mx.arange(3.0)[:, None, None], positions=[2])) as inside:
        hidden = model.model(ids).flatten(0, 1)
        logits = model.logits(hidden[mx.array(some)], some)
    assert [inside.positions("logits", None, row) for row in range(3)] == [[1, 2], [0, 1], [6]]
    for row, positions in enumerate(([1, 2], [0, 1], [6])):
        expected = whole[row : row + 1, mx.array(positions)]
        expected = mx.where(mx.array(positions)[None, :, None] == 2, float(row), expected)
        assert off(inside["logits", None, row], expected) < 1e-5
    assert off(logits[1], 0) == 0
    with pytest.raises(OptionError, match="differ in length"):
        inside["logits"]
    with trace(model, keep="logits") as inside:
        hidden = model.model(ids).flatten(0, 1)
        for first in (0, 5, 10, 15, 20):
            model.logits(hidden[first : first + 5], range(21)[first : first + 5])
    assert off(inside["logits"], whole) < 1e-5
    assert mx.array_equal(inside["logits", None, 1], inside["logits"][1:2])
    with pytest.raises(OptionError, match="of other tokens than the last pass"), trace(model, keep="logits"):
        model.logits(model.model(ids)[:, -1:])


def test_models_are_compared_under_a_trace_of_logits(tiny, monkeypatch):
    """With few positions at a time, so that logits are made of slices of rows."""
    from phi3_mlx import compare
    from phi3_mlx.conversion.texts import bundled
    from phi3_mlx.evaluation import quality

    (model, tokenizer), (other, _) = tiny, load("tiny")
    text = bundled("sample")[:300]
    monkeypatch.setattr(quality, "LOGITS_AT_ONCE", 7 * model.config.vocab_size)
    expected = compare(model, tokenizer, other, tokenizer, text, window=16)
    with trace(model, keep="logits", edits=change("logits", lambda x: 0.5 * x)) as inside:
        told = compare(model, tokenizer, other, tokenizer, text, window=16)
    assert told.b == expected.b
    assert told.a.perplexity != expected.a.perplexity
    monkeypatch.undo()
    with trace(model, edits=change("logits", lambda x: 0.5 * x)):
        whole = compare(model, tokenizer, other, tokenizer, text, window=16)
    assert told.a.perplexity == pytest.approx(whole.a.perplexity, rel=1e-5)
    assert inside.positions("logits", None, 1) == [*range(16)]
