"""Pictures of what tools over traces found: tokens in colours as HTML, and grids by matplotlib."""

import html
import re
import sys

import matplotlib
import mlx.core as mx
import numpy as np
import pytest

from phi3_mlx import colour_tokens, draw_attention, draw_grid, load_tokenizer, logit_lens, token_texts
from phi3_mlx.errors import OptionError

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def text_of(page: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", page))


def test_tokens_have_their_texts_spaces_and_names(tokenizer):
    ids = tokenizer.encode("The owl is here.\n")
    assert "".join(token_texts(tokenizer, ids)).strip() == "The owl is here."
    end = next(iter(tokenizer.stop_ids))
    assert token_texts(tokenizer, [end]) == [tokenizer.id_to_token(end)]
    assert token_texts(tokenizer, [10**6, -1]) == ["", ""]


def test_html_shows_a_text_as_it_is_and_runs_none_of_it(tokenizer):
    hostile = '<script>alert("1 & 2")</script> <b>owl</b>'
    ids = tokenizer.encode(hostile)
    page = colour_tokens(tokenizer, ids, range(len(ids)))._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert text_of(page).strip() == hostile


def test_the_largest_value_has_the_full_colour_and_its_sign_the_kind(tokenizer):
    ids = tokenizer.encode("owl duck frog")
    values = [0.0] * len(ids)
    values[0], values[1] = -2.0, 1.0
    coloured = colour_tokens(tokenizer, ids, mx.array(values, dtype=mx.bfloat16))
    colours = re.findall(r"rgba\((\d+),\d+,(\d+),([\d.]+)\)", coloured._repr_html_())
    assert [float(alpha) for *_, alpha in colours[:3]] == [0.75, 0.375, 0]
    assert int(colours[0][0]) > int(colours[0][1])  # red below 0
    assert int(colours[1][0]) < int(colours[1][1])  # blue above
    assert repr(coloured).splitlines()[0].split()[0] == "-2.000"
    assert "rgba" in colour_tokens(tokenizer, ids, [0.0] * len(ids))._repr_html_()  # no division by 0


def test_values_that_do_not_fit_have_no_colours(tokenizer):
    for values in ([1.0], [[1.0, 2.0]], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(OptionError, match="values"):
            colour_tokens(tokenizer, [500, 501], values)


def test_a_lens_shows_a_table_of_layers_and_positions(tokenizer):
    from test_circuits import tiny

    model, _ = tiny()
    lens = logit_lens(model, tokenizer.encode('The owl said, "I am'), positions=[-2, -1])
    table = lens.table(tokenizer)
    page = table._repr_html_()
    assert page.count("<tr>") == 1 + model.config.num_hidden_layers
    assert page.count("<td") == 2 * model.config.num_hidden_layers
    likeliest = token_texts(tokenizer, lens.top(1)[0][-1, 0, :, 0].tolist())
    assert text_of(page).endswith("".join(likeliest))
    assert [repr(text) for text in likeliest] == repr(table).splitlines()[-1].split("  ")[-2:]


def test_a_grid_is_drawn_as_it_is_with_0_in_the_middle():
    values = np.array([[1.0, -4.0, 0.0], [2.0, 0.5, 0.0]])
    axes = draw_grid(mx.array(values, dtype=mx.bfloat16), rows=["a", "b"], columns=["$x", "y\n", "<z>"], label="nats")
    (image,) = axes.images
    assert np.array_equal(image.get_array(), values)
    assert image.get_clim() == (-4, 4)
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"\$x", "y↵", "<z>"]
    axes.figure.canvas.draw()  # a formula that is none would fail here
    assert draw_grid(np.ones((2, 2)), largest=3, axes=axes) is axes
    assert axes.images[-1].get_clim() == (-3, 3)
    draw_grid(np.zeros((2, 2))).figure.canvas.draw()


def test_a_pattern_is_drawn_with_the_tokens_beside_it():
    pattern = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    axes = draw_attention(pattern[2:], list("abcd"))
    assert np.array_equal(axes.images[0].get_array(), pattern[2:])
    assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "d"]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcd")
    assert len(draw_attention(np.ones((1, 1000)), ["token"] * 1000).get_xticks()) <= 40


def test_what_is_no_grid_is_not_drawn():
    for draw in (draw_grid, draw_attention):
        for values in (np.ones(3), np.ones((1, 2, 3)), np.ones((0, 2))):
            with pytest.raises(OptionError, match="shape"):
                draw(values)
    with pytest.raises(OptionError, match="1 names are given for 2 rows"):
        draw_grid(np.ones((2, 3)), rows=["a"])
    with pytest.raises(OptionError, match="2 tokens are given for 3 keys"):
        draw_attention(np.ones((2, 3)), ["a", "b"])


def test_without_matplotlib_a_picture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(OptionError, match=r"phi3-mlx\[plot\]"):
        draw_grid(np.ones((2, 2)))
