"""Log-probabilities keep float32's digits, however large the vocabulary."""

import mlx.core as mx
import numpy as np
import pytest

from phi3_mlx.models.normalizer import log_normalizer


def exact(logits):
    largest = logits.max(axis=-1, keepdims=True).astype(np.float64)
    return np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]


@pytest.mark.parametrize("size", [1, 7, 512, 32_011, 32_064, 49_152, 200_064])
def test_a_normalizer_has_float32s_digits(size):
    logits = (3 * np.random.default_rng(0).normal(size=(2, 3, size))).astype(np.float32)
    found = np.array(log_normalizer(mx.array(logits)))
    assert found.shape == (2, 3)
    assert np.abs(found - exact(logits)).max() < 5e-6


def test_tokens_that_cannot_come_count_nothing():
    logits = np.full((2, 4096), -np.inf, dtype=np.float32)
    logits[0, 5], logits[1, 4000] = 1.5, -2.0
    assert np.array(log_normalizer(mx.array(logits))).tolist() == [1.5, -2.0]


def test_a_number_that_is_none_is_not_hidden():
    logits = mx.zeros((1, 64))
    logits[0, 9] = mx.nan
    assert np.isnan(np.array(log_normalizer(logits))).all()
