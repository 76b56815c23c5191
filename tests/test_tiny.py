"""The bundled model: what it is, that its numbers are the reference's, and that it does what its README says."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from oracle import make_torch_dequantized, torch_logits

from phi3_mlx import generate, load, stream_generate
from phi3_mlx.generation.answers import encode_prompt
from phi3_mlx.models import read_config

TINY = ROOT / "weights" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def test_its_report_is_of_these_weights():
    report = json.loads((TINY / "report.json").read_text())
    arrays = mx.load(str(TINY / "model.safetensors"))
    assert report["bytes"]["result"] == sum(array.nbytes for array in arrays.values())
    packed = {name.removesuffix(".scales") for name in arrays if name.endswith(".scales")}
    assert {tensor["path"] for tensor in report["tensors"]} == packed
    for tensor in report["tensors"]:
        parts = [array.nbytes for name, array in arrays.items() if name.rpartition(".")[0] == tensor["path"]]
        assert tensor["bytes"] == sum(parts)


def test_it_has_every_part_of_phi3s_structure():
    config = read_config(TINY)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.longrope is not None
    assert config.longrope.short_factor != config.longrope.long_factor
    assert min(config.longrope.long_factor) >= 1
    assert config.original_max_position_embeddings < config.max_position_embeddings
    assert config.quantization["bits"] == 4
    for name in ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (TINY / name).is_file(), name


def test_it_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in TINY.parent.rglob("*") if file.is_file()) <= 12e6


def test_its_special_tokens_are_phi3s(tiny):
    _, tokenizer = tiny
    end, assistant, user, system = (tokenizer.token_to_id(f"<|{n}|>") for n in ("end", "assistant", "user", "system"))
    assert {end, assistant, tokenizer.token_to_id("<|endoftext|>")} == tokenizer.stop_ids
    from phi3_mlx.text.chat import render_chat

    messages = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hello"}]
    ids = render_chat(tokenizer, messages)
    assert [i for i in ids if i in tokenizer.special_ids] == [system, end, user, end, assistant]


@pytest.fixture(scope="module")
def reference(tiny):
    """transformers' model with the bundled weights, dequantized."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return make_torch_dequantized(TINY, tiny[0])


STORY = """Once upon a time, there was a little dog named Max. Max loved to run in the park with his friend Lily.
One day Max found a shiny red ball under a big tree. "Look, Lily!" he barked. Lily smiled
and said, "Let's play with it!" """


@pytest.mark.parametrize("length", [60, 511, 512, 513, 700])
def test_trained_weights_give_the_references_logits(tiny, reference, length):
    model, tokenizer = tiny
    ids = np.array([(tokenizer.encode(STORY) * 12)[:length]], dtype=np.int32)
    assert ids.shape[1] == length
    ours = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.abs(ours - torch_logits(reference, ids)).max() <= 1e-3


def test_the_reference_generates_the_same_story(tiny, reference):
    import torch

    model, tokenizer = tiny
    prompt = encode_prompt(tokenizer, "Write a story about a rabbit who finds a key.")
    theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=80, do_sample=False, eos_token_id=None)
    ours = [chunk.token for chunk in stream_generate(model, tokenizer, prompt, max_tokens=80)]
    assert ours == theirs[0, len(prompt) :].tolist()[: len(ours)]


def test_the_demo_is_a_story_about_what_was_asked_and_ends_by_itself(tiny):
    chunks = list(stream_generate(*tiny, "Write a story about a rabbit who finds a key.", max_tokens=500))
    text = "".join(chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert len(text.split()) > 60
    assert re.search(r"\brabbit\b", text, re.I)
    assert re.search(r"\bkey\b", text, re.I)


FACTS = [("fox", "lantern"), ("owl", "castle"), ("bear", "ribbon"), ("frog", "garden")]


def planted(tokenizer, length, owner, word):
    """A prompt of about `length` tokens with one fact in the middle of a story, and the fact."""
    fact = f"The secret word of the {owner} is {word}."
    filler = [sentence.strip() for sentence in STORY.replace("\n", " ").split(". ") if sentence.strip()]
    sentences: list[str] = []
    while len(tokenizer.encode(" ".join(sentences))) < length - 45:
        sentences.append(filler[len(sentences) % len(filler)] + ".")
    sentences.insert(len(sentences) // 2, fact)
    return f"Read this text. {' '.join(sentences)}\nWhat is the secret word of the {owner}?", fact


def found(tiny, length, facts):
    """How many of the facts come back word for word, each in a text of its own."""
    model, tokenizer = tiny
    pairs = [planted(tokenizer, length, owner, word) for owner, word in facts]
    return sum(generate(model, tokenizer, prompt, max_tokens=20).strip() == fact for prompt, fact in pairs)


@pytest.mark.parametrize("length", [490, 1000])
def test_planted_facts_are_found_at_the_original_length_and_beyond(tiny, length):
    """By chance a word of about eighty is right, so three of four are no accident."""
    assert found(tiny, length, FACTS[:4]) >= 3


def test_far_beyond_it_the_long_factors_are_needed(tiny):
    """By the log-probability of a planted fact as the answer."""
    tokenizer = tiny[1]
    prompt, fact = planted(tokenizer, 3000, "owl", "castle")
    asked, answer = encode_prompt(tokenizer, prompt), tokenizer.encode(fact)
    assert len(asked) > 2900

    def certainty(model):
        scores = model(mx.array([asked + answer]))[0, len(asked) - 1 : -1]
        odds = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        return mx.take_along_axis(odds, mx.array(answer)[:, None], axis=-1).sum().item()

    assert certainty(tiny[0]) > -0.1
    assert certainty(load("tiny", longrope="short")[0]) < -1


def test_its_evaluation_is_that_of_these_weights(tiny):
    samples = json.loads((TINY / "evaluation.json").read_text())["samples"]
    short = {prompt: answer for prompt, answer in samples.items() if len(answer) < 60}
    assert len(short) >= 2
    assert {prompt: generate(*tiny, prompt, max_tokens=40).strip() for prompt in short} == short
