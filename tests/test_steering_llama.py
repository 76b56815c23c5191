"""Files of steering vectors in the real llama.cpp: its layers add what `steer` adds, in the same layers."""

import llama_cpp
import llama_steering
import mlx.core as mx
import numpy as np
import pytest
from llama_steering import CASES, steered, vectors

from phi3_mlx import encode_prompt, export_gguf, load, save_steering, steer, trace

NEAR = 0.02  # of logits that a vector changes by 1 to 5; llama.cpp keeps keys and values in 16 bits


def ours(model, ids, case) -> np.ndarray:
    edits = []
    if case:
        strength, layers = case
        first, last = layers or (1, 5)
        chosen = {layer: vector for layer, vector in vectors().items() if first <= layer <= last}
        edits = [steer(chosen, strength=strength)]
    with trace(model, edits=edits):
        return np.array(model(mx.array([ids]))[0, -1].astype(mx.float32))


def test_steered_logits_are_those_that_llama_cpp_once_gave():
    model, golden = load("tiny")[0], np.load(llama_steering.GOLDEN)
    ids = golden["ids"].tolist()
    plain = ours(model, ids, None)[::7]
    for case, logits in zip(CASES, golden["logits"], strict=True):
        assert np.abs(ours(model, ids, case)[::7] - logits).max() < NEAR, case
        assert not case or np.abs(logits - plain).max() > 1


@pytest.mark.skipif(bool(llama_steering.MISSING), reason=llama_steering.MISSING)
def test_llama_cpp_reads_our_file_and_steers_alike(tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = load("tiny")
    exported = export_gguf("tiny", tmp_path / "tiny.gguf", type="f32").files[0]
    ids = encode_prompt(tokenizer, "Why is the owl sad?")
    file = save_steering(vectors(), tmp_path / "my vectors.gguf")
    for case in CASES:
        theirs = steered(exported, ids, file, *case) if case else steered(exported, ids, None)
        assert np.abs(ours(model, ids, case) - theirs).max() < NEAR, case
    with pytest.raises(llama_cpp.LlamaCppError, match="refuses the file"):
        steered(exported, ids, exported)
