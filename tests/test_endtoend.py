"""Steps of distillation one by one: the order of rows, rates, means, checkpoints, and grids as they are stored."""

import itertools

import mlx.core as mx
import numpy as np
import oracle
import pytest
from quality_models import RandomSource, arrays_of, random_ids

from phi3_mlx.conversion import endtoend
from phi3_mlx.conversion.endtoend import Student
from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.recipes import uniform
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.conversion.teacher import Teacher
from phi3_mlx.conversion.trained import TrainedEmbedding
from phi3_mlx.errors import CheckpointError

NARROW = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32}


def small_student():
    source = RandomSource("BF16", **{**oracle.BASE, **NARROW})
    layout = Layout.of(source, uniform(4, 32))
    return Student(source.config, arrays_of(layout, rounded(source)), layout.packings)


def small_teacher(rows, fitted):
    """Of random distributions over four tokens."""
    ids = mx.array(random_ids(rows * 8, 64)).reshape(rows, 8)
    tokens = mx.broadcast_to(mx.array([3, 9, 27, 50]), (rows, 8, 4))
    noise = mx.random.normal((rows, 8, 5), key=mx.random.key(0))
    return Teacher(ids, tokens, (noise - mx.logsumexp(noise, axis=-1, keepdims=True))[..., :4], fitted)


def test_an_epoch_has_each_row_once_and_each_epoch_another_order():
    steps = endtoend._order(7)
    epochs = [[*itertools.chain(*steps[first : first + 4])] for first in range(0, 12, 4)]
    assert [sorted(rows) for rows in epochs] == [[*range(7)]] * 3
    assert len({*map(tuple, epochs)}) == 3
    assert {len(rows) for rows in steps} == {1, 2}


def test_the_rate_rises_over_the_first_tenth_and_falls_to_nothing():
    rate = endtoend._schedule(40)
    rates = [float(rate(mx.array(step))) for step in range(41)]
    assert rates[:5] == pytest.approx([1e-3 * step / 4 for step in range(5)], abs=1e-8)
    assert all(later < before for before, later in itertools.pairwise(rates[4:]))
    assert rates[40] == pytest.approx(0, abs=1e-8)


def test_a_mean_over_rows_counts_each_alike_be_they_odd():
    student, teacher = small_student(), small_teacher(6, 3)
    each = [float(student._loss(teacher, mx.array([row]))) for row in range(6)]
    assert max(each) > 1.1 * min(each)
    assert student._divergence(teacher, slice(1, 4)) == pytest.approx(np.mean(each[1:4]), rel=1e-4)


def test_the_text_trained_on_is_measured_on_as_many_rows_as_are_held_out(tmp_path):
    student, teacher = small_student(), small_teacher(5, 3)
    before = [student._divergence(teacher, rows) for rows in (slice(0, 2), slice(3, 5))]
    gain = student.train(teacher, tmp_path / "checkpoint", lambda *_: None)
    assert [gain.before, gain.held_before] == pytest.approx(before, rel=1e-5)


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    teacher, told = small_teacher(4, 3), []
    gain = small_student().train(teacher, tmp_path / "checkpoint", lambda *_: None)
    assert small_student().train(teacher, tmp_path / "checkpoint", lambda *now: told.append(now)) == gain
    assert told == [(6, 6)]


def test_a_checkpoint_that_is_damaged_is_named_with_the_way_out(tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"checkpoint cannot be read .*; remove it"):
        small_student().train(small_teacher(4, 3), tmp_path / "checkpoint", lambda *_: None)


def test_a_bias_makes_up_for_how_its_scale_is_rounded_and_no_more():
    """A gain too small to move a stored scale moves the middle of no group."""
    codes = mx.zeros((2, 8), mx.uint32)
    scales = mx.array([[1.0, 1.25], [1.5, 1.0]], mx.bfloat16)
    packing = {"group_size": 32, "bits": 4, "mode": "affine"}
    layer = TrainedEmbedding([codes, scales, mx.zeros((2, 2), mx.bfloat16)], packing)
    layer.gain = mx.full((2, 2), 1e-3)
    _, made, biases = layer.parts()
    assert mx.array_equal(made, scales)
    assert not mx.any(biases).item()
    layer.gain = mx.full((2, 2), 0.25)
    _, made, biases = layer.parts()
    assert mx.allclose(made, scales * 1.25, rtol=0.01).item()
    assert mx.allclose(biases, -7.5 * (made - scales), rtol=0.01).item()
