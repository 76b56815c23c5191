"""What a notebook shows of a trace's objects: short, with shapes."""

import mlx.core as mx
import pytest
from oracle import ids_of
from test_inside import MODELS, dense

from phi3_mlx import (
    Keep,
    attribute,
    change,
    inspect,
    linear_probe,
    logit_difference,
    logit_lens,
    patch,
    patch_positions,
    places,
    score_heads,
    steer,
    switch_off,
    trace,
)

VECTOR = mx.ones(192)


def named(x):
    return x


def test_what_was_kept_is_told_with_its_shapes():
    model = dense("mini-4k")
    keep = ["embed", "resid_post", Keep("pattern", layers=[0, 2], heads=1, positions=-1), Keep("z", layers=1)]
    with trace(model, keep=keep) as inside:
        assert repr(inside).startswith("<Inside: nothing was read yet\n  embed: (B, L, d)")
        model(mx.array(ids_of(9)))
        lines = repr(inside).splitlines()
        assert lines == [
            "<Inside: 1 row of 9 tokens",
            "  embed: (1, 9, 192)",
            "  resid_post of layers 0 to 2: (1, 9, 192)",
            "  pattern of layers 0, 2: (1, 1, 1, 9)",
            "  z of layer 1: (1, 9, 2, 96)>",
        ]
        model(mx.array(ids_of(5, rows=2)))
    assert repr(inside).splitlines()[:2] == ["<Inside: 3 rows of 9 and 5 tokens", "  embed: (B, L, d)"]


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (steer(VECTOR, layers=[1, 2], strength=-0.5), "resid_post + -0.5 x (192,), layers 1, 2"),
        (steer({3: VECTOR}, when="decode"), "resid_post of answers + 1 x (192,), layers 3"),
        (steer({0: VECTOR, 1: VECTOR}), "resid_post + 1 x (192,), layers 0, 1"),
        (steer(VECTOR, strength=mx.array(2.0), place="embed"), "embed + array x (192,)"),
        (switch_off(0, [1], positions=-1), "z at positions -1 = 0.0, layers 0, heads 1"),
        (patch("q", mx.ones((3, 4)), when="prefill"), "q of prompts = array (3, 4)"),
        (change("act", named, positions=slice(1, 3)), "act at positions slice(1, 3, None) changed by named"),
        (
            change("act", mx.abs, layers=range(32), positions=range(9)),
            "act at positions 0, 1, 2, 3, 4, 5, 6, 7, ... changed by abs, layers 0 to 31",
        ),
    ],
)
def test_an_edit_says_what_it_does_and_where(edit, shown):
    assert repr(edit) == f"<Edit: {shown}>"


def test_a_patch_from_a_run_does_not_show_the_run():
    inside = inspect(dense("mini-4k"), [1, 2, 3], "z")
    assert repr(patch("z", inside, layers=1)) == "<Edit: z = another run's, layers 1>"


@pytest.mark.parametrize("name", MODELS)
def test_places_are_a_table_with_the_models_sizes(name):
    model = MODELS[name]()
    listed = places(model)
    head, *lines = repr(listed).splitlines()
    assert f"d {model.config.hidden_size:,}, H {model.config.num_attention_heads}, " in head
    assert ("E " in head) == ("router" in listed)
    assert [line.split()[0] for line in lines] == [*listed]
    for line, place in zip(lines, listed.values(), strict=True):
        assert place.shape in line
        assert line.endswith(place.what if place.per_layer else f"{place.what}, once")


@pytest.mark.parametrize("name", MODELS)
def test_places_stand_in_the_order_in_which_they_are_computed(name):
    model = MODELS[name]()
    names = [place for place in places(model) if place != "blocks"]
    computed = []

    def note(place):
        def function(x):
            computed.append(place)
            return x

        return function

    with trace(model, edits=[change(place, note(place)) for place in names]):
        model(mx.array(ids_of(9)))
    first = [*dict.fromkeys(computed)]
    assert sorted(first) == sorted(names)
    # Queries, keys and values are split at once, and so are the halves of the feed-forward part.
    alike = {"k": "q", "v": "q", "up": "gate", "expert_weights": "experts"}
    order = [place for place in names if place not in alike]
    assert [place for place in first if place not in alike] == order


def test_tables_of_tools_are_one_line():
    model, ids, other = dense("mini-4k"), ids_of(9)[0].tolist(), ids_of(9, seed=1)[0].tolist()
    grid = patch_positions(model, ids, other, logit_difference(3, 5), layers=[0, 1], positions=[1, [2, 3]])
    assert repr(grid) == f"<PatchGrid: 2 layers x 2 columns, clean {grid.clean:.3f}, corrupted {grid.corrupted:.3f}>"
    parts = attribute(model, [ids, other], 3)
    logits = ", ".join(f"{logit:.3f}" for logit in parts.logit.tolist())
    assert repr(parts) == f"<Attribution: 2 rows, 3 layers x 2 heads, logit {logits}>"
    assert repr(attribute(model, [ids] * 5, 3)).endswith(", ...>")
    assert repr(logit_lens(model, [ids, other], positions=[2, -1])) == "<Lens: layers 0 to 2, 2 rows, 2 positions>"
    scores = score_heads(model, length=5, rows=1)
    layer, head = divmod(int(mx.argmax(scores.copying)), 2)
    assert repr(scores).startswith("<HeadScores: 3 layers x 2 heads, most previous 0.")
    assert repr(scores).endswith(f"most copying {scores.copying.max().item():.2f} (layer {layer}, head {head})>")
    probe = linear_probe(mx.array([[1.0, 0.0], [0.0, 1.0]] * 4), [1, 0] * 4, folds=2)
    assert repr(probe) == "<Probe: 2 weights, accuracy 100%, chance 50%>"
