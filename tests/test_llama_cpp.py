"""GGUF files in the real llama.cpp: its ids, probabilities and greedy tokens are ours, with and without adapters."""

import shutil

import llama_cpp
import mlx.core as mx
import moe_models
import numpy as np
import oracle
import pytest
from llama_cpp import LlamaCppError, Prompt
from make_golden_llama import prompt_ids
from test_tuning_adapters import make_adapter
from test_tuning_peft import draw, write
from tuning_models import make_directory

pytest.importorskip("gguf")

from gguf import GGUFReader
from gguf_models import hand_written
from hard_texts import BLANK_OF_UNICODE, hard_texts
from test_convert import write as write_model

from bench import export as export_bench
from phi3_mlx import export_adapter, export_gguf, load, load_tokenizer
from phi3_mlx.adapters.peft import import_peft

pytestmark = pytest.mark.skipif(bool(llama_cpp.MISSING), reason=llama_cpp.MISSING)
IDS = np.random.default_rng(0).integers(3, 3900, 100).tolist()
GREEDY = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(directory, GGUF file) of a small random model."""
    directory = make_directory(tmp_path_factory.mktemp("model") / "base")
    return directory, hand_written(directory, directory.parent / "base.gguf")


def probabilities(directory, ids, adapter=None):
    model, _ = load(str(directory), adapter=adapter)
    return np.array(mx.softmax(model(mx.array([ids]))[0].astype(mx.float32), axis=-1))


def greedy(directory, ids, count, adapter=None):
    model, _ = load(str(directory), adapter=adapter)
    cache, tokens, read = model.make_cache(), [], list(ids)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([read]), cache=cache)[0, -1]).item()))
        read = tokens[-1:]
    return tokens


@pytest.mark.parametrize("weight", [None, 1.0, 0.5])
def test_an_adapter_changes_in_llama_cpp_what_it_changes_here(weight, base, tmp_path):
    directory, file = base
    loras, chosen = None, None
    if weight is not None:
        make_adapter(directory, tmp_path / "adapter", strength=0.3)
        loras = {export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf").path: weight}
        chosen = {str(tmp_path / "adapter"): weight}
    answer = llama_cpp.ask(file, prompts=[Prompt(IDS, greedy=GREEDY)], context=256, loras=loras)
    wanted = probabilities(directory, IDS, chosen)
    np.testing.assert_allclose(np.log(answer.probabilities[0]), np.log(wanted), atol=1e-4)
    assert answer.greedy[0] == greedy(directory, IDS, GREEDY, chosen)
    if weight is not None:  # the comparison would notice an adapter that is not there
        assert np.abs(wanted - probabilities(directory, IDS)).max() > 0.002


def test_projections_that_peft_has_apart_are_one_adapter_of_the_fused_layer(base, tmp_path):
    directory, file = base
    layer = "model.layers.1.self_attn"
    tensors = {f"{layer}.q_proj.lora_A": draw(2, 64), f"{layer}.q_proj.lora_B": draw(64, 2, seed=1)}
    tensors |= {f"{layer}.v_proj.lora_A": draw(2, 64, seed=2), f"{layer}.v_proj.lora_B": draw(32, 2, seed=3)}
    folder = write(tmp_path / "peft", tensors)
    lora = export_adapter(folder, tmp_path / "adapter.gguf", model=str(directory)).path
    import_peft(folder, tmp_path / "adapter", str(directory))
    answer = llama_cpp.ask(file, prompts=[Prompt(IDS)], context=256, loras={lora: 1.0})
    wanted = probabilities(directory, IDS, str(tmp_path / "adapter"))
    np.testing.assert_allclose(np.log(answer.probabilities[0]), np.log(wanted), atol=1e-4)


def test_an_adapter_of_another_shape_is_refused_by_llama_cpp(base, tmp_path):
    other = make_directory(tmp_path / "other", intermediate_size=128)
    make_adapter(other, tmp_path / "adapter")
    lora = export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf").path
    with pytest.raises(LlamaCppError):
        llama_cpp.ask(base[1], prompts=[Prompt(IDS)], context=256, loras={lora: 1.0})


def test_the_ids_of_a_thousand_texts_are_the_bundled_tokenizers(tmp_path):
    file = export_gguf("tiny", tmp_path / "tiny.gguf").files[0]
    tokenizer, texts = load_tokenizer("tiny"), hard_texts()
    assert len(texts) == 1000
    answer = llama_cpp.ask(file, texts=texts)
    different = [
        text
        for text, ids in zip(texts, answer.texts, strict=True)
        if ids != tokenizer.encode(text, special=True) and not BLANK_OF_UNICODE.search(text)
    ]
    assert different == []
    assert sum(map(len, answer.texts)) > 20_000


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3-mini-april-2024"])
def test_the_ids_of_a_thousand_texts_are_the_released_tokenizers(name, shared, tmp_path):
    """June's, whose control tokens take white space, and April's, whose tokens keep it."""
    directory = write_model(tmp_path / name, {**oracle.slim(oracle.CONFIGS["mini-4k"]), "vocab_size": 32064})
    for file in (shared / "tokenizers" / name).iterdir():
        shutil.copy(file, directory)
    file = export_gguf(directory, tmp_path / "model.gguf").files[0]
    tokenizer, texts = load_tokenizer(str(directory)), hard_texts()
    answer = llama_cpp.ask(file, texts=texts, plain=texts)
    assert answer.plain == [tokenizer.encode(text) for text in texts]
    pairs = zip(texts, answer.texts, strict=True)
    different = [text for text, ids in pairs if ids != tokenizer.encode(text, special=True)]
    assert [text for text in different if not BLANK_OF_UNICODE.search(text)] == []
    assert len(different) < 3


def test_a_prompt_as_long_as_the_window_has_our_probabilities_and_a_longer_one_has_not(tmp_path):
    lengths = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    directory = make_directory(tmp_path / "model", **lengths, sliding_window=2047)
    file = export_gguf(directory, tmp_path / "model.gguf", type="f32").files[0]
    ids = np.random.default_rng(1).integers(3, 3900, 2100).tolist()
    answer = llama_cpp.ask(file, prompts=[Prompt(ids[:2047]), Prompt(ids, everywhere=False)], context=4096)
    np.testing.assert_allclose(answer.probabilities[0], probabilities(directory, ids[:2047]), atol=1e-4)
    assert np.abs(answer.probabilities[1][-1] - probabilities(directory, ids)[-1]).max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "off", "divergence"),
    [
        ("f32", 1e-3, 1e-6),
        ("f16", 2e-3, 1e-6),  # llama.cpp rounds activations to float16 as well
        ("q8_0", None, 1e-3),
        (None, None, 1e-3),
        ("q4_k_m", None, 5e-3),  # Q4_K, Q5_K and Q6_K
        ("q3_k_m", None, 0.05),
        ("q2_k", None, 0.3),
    ],
)
def test_probabilities_at_every_position_are_ours(kind, off, divergence, tmp_path):
    """The bundled model within its original length, in floats, and in blocks, whose KL divergence is bounded."""
    file = export_gguf("tiny", tmp_path / "tiny.gguf", type=kind, report=False).files[0]
    model, _ = load("tiny")
    ids = prompt_ids()
    answer = llama_cpp.ask(file, prompts=[Prompt(ids, greedy=GREEDY if kind == "f32" else 0)], context=512)
    wanted = np.array(mx.softmax(model(mx.array([ids]))[0].astype(mx.float32), axis=-1)).astype(np.float64)
    wanted /= wanted.sum(-1, keepdims=True)
    found = answer.probabilities[0].astype(np.float64)
    found /= found.sum(-1, keepdims=True)
    kl = float((wanted * (np.log(wanted + 1e-30) - np.log(found + 1e-30))).sum(-1).mean())
    print(f"{kind or 'as stored'}: at most {np.abs(found - wanted).max():.1e} off, KL {kl:.1e}")
    assert kl < divergence
    if off is not None:
        assert np.abs(found - wanted).max() < off
    if kind == "f32":
        assert answer.greedy[0] == greedy("tiny", ids, GREEDY)


@pytest.mark.parametrize(("longrope", "factor", "tokens"), [("short", 1.1, 200), ("long", 1.3, 600)])
def test_each_regime_of_a_model_with_two_attention_factors_has_its_own_file(longrope, factor, tokens, tmp_path):
    """In parts as well. Computed here as llama.cpp computes experts, our probabilities are its own."""
    directory = write_experts(tmp_path / "moe", **moe_models.MSCALES)
    ids = np.random.default_rng(2).integers(3, 3900, tokens).tolist()
    context = 512 if longrope == "short" else 1024
    options = {"type": "f32", "longrope": longrope}
    whole = export_gguf(directory, tmp_path / "moe.gguf", **options)
    parts = export_gguf(directory, tmp_path / "parts.gguf", **options, split_max_size="2MB")
    assert len(parts.files) > 2
    assert any(("more than 512" if longrope == "long" else "up to 512") in note for note in whole.notes)
    model, _ = load(str(directory))
    export_bench.with_rms_norms(model)
    with export_bench.routed(export_bench.softmax_of_two):
        wanted = export_bench.probabilities(model, ids)
    for file in (whole.files[0], parts.files[0]):
        answer = llama_cpp.ask(file, prompts=[Prompt(ids)], context=context)
        np.testing.assert_allclose(answer.probabilities[0], wanted, atol=1e-5)
    assert GGUFReader(whole.files[0]).fields["phimoe.rope.scaling.attn_factor"].contents() == pytest.approx(factor)


def test_parts_of_a_dense_model_are_one_model_to_llama_cpp(tmp_path):
    files = export_gguf("tiny", tmp_path / "parts.gguf", type="f32", split_max_size="3MB").files
    assert len(files) > 3
    answer = llama_cpp.ask(files[0], prompts=[Prompt(IDS, greedy=GREEDY)])
    np.testing.assert_allclose(answer.probabilities[0], probabilities("tiny", IDS), atol=1e-4)
    assert answer.greedy[0] == greedy("tiny", IDS, GREEDY)


def write_experts(folder, **factors):
    """A small random model with experts, whose original length is 512."""
    scaling = {**moe_models.RAW["rope_scaling"], **factors, "original_max_position_embeddings": 512}
    lengths = {"max_position_embeddings": 4096, "original_max_position_embeddings": 512}
    raw = {**moe_models.RAW, **lengths, "rope_scaling": scaling, "vocab_size": 4032, "sliding_window": 4096}
    weights = moe_models.hugging_face(moe_models.random_weights(raw))
    return moe_models.write(folder, raw, weights, tokenizer=True)


def test_a_mixture_of_experts_loads_and_has_our_ids_and_other_answers(tmp_path):
    """llama.cpp computes its norms and its experts' weights otherwise, as export says; so answers differ."""
    write_experts(tmp_path / "moe")
    done = export_gguf(str(tmp_path / "moe"), tmp_path / "moe.gguf", type="f32")
    assert any("other norms and other weights of experts" in note for note in done.notes)
    model, tokenizer = load(str(tmp_path / "moe"))
    texts = hard_texts(300)
    answer = llama_cpp.ask(done.files[0], texts=texts, prompts=[Prompt(IDS[:20])])
    assert answer.texts == [tokenizer.encode(text, special=True) for text in texts]
    wanted = np.array(mx.softmax(model(mx.array([IDS[:20]]))[0].astype(mx.float32), axis=-1))
    kl = float((wanted * np.log(wanted / answer.probabilities[0])).sum(-1).mean())
    assert 0.01 < kl < 1  # once it is 0, the note is wrong
