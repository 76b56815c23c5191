"""What llama.cpp made of the bundled model, as `make_golden_llama.py` kept it: ids, probabilities, greedy tokens."""

import mlx.core as mx
import numpy as np
import pytest
from hard_texts import BLANK_OF_UNICODE, hard_texts
from make_golden_llama import GOLDEN

from phi3_mlx import load


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def test_our_ids_of_a_thousand_hard_texts_are_llama_cpps(golden):
    _, tokenizer = load("tiny")
    texts, lengths = hard_texts(), golden["lengths"]
    known = np.split(golden["ids"], np.cumsum(lengths)[:-1])
    assert len(texts) == len(known) == 1000
    differ = [
        text for text, ids in zip(texts, known, strict=True) if ids.tolist() != tokenizer.encode(text, special=True)
    ]
    assert [text for text in differ if not BLANK_OF_UNICODE.search(text)] == []
    assert len(differ) < 5


def test_our_probabilities_and_greedy_tokens_are_llama_cpps(golden):
    model, _ = load("tiny")
    ids, cache = golden["prompt"].tolist(), model.make_cache()
    logits = model(mx.array([ids]), cache=cache)[0].astype(mx.float32)
    best = np.sort(np.array(mx.softmax(logits, axis=-1)), axis=-1)[:, ::-1][:, :8]
    np.testing.assert_allclose(best, golden["best"], atol=1e-3)
    tokens = [int(mx.argmax(logits[-1]).item())]
    while len(tokens) < 64:
        tokens.append(int(mx.argmax(model(mx.array([tokens[-1:]]), cache=cache)[0, -1]).item()))
    assert tokens == golden["greedy"].tolist()
