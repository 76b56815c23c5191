"""Phi-3.5-MoE converted, tuned and planned: experts and router treated apart, in the memory of one stack of experts."""

import dataclasses
import gc
import json
import math
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import moe_models
import numpy as np
import pytest
from mlx.utils import tree_flatten
from moe_models import EXPERTS, RAW
from oracle import ids_of, logits_of
from peaks import fair_peak
from tuning_models import examples, randomize, write_jsonl

from phi3_mlx import convert, load, tune
from phi3_mlx.adapters.folder import adapter_files, base_of, write_adapter
from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.adapters.targets import find_targets
from phi3_mlx.conversion.adapted import AdaptedSource
from phi3_mlx.conversion.directory import DirectorySource
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.conversion.gptq import gptq
from phi3_mlx.conversion.rounding import pack
from phi3_mlx.conversion.sensitivity import measure
from phi3_mlx.engine import machine
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.plan import Workload
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import AdapterError, OptionError
from phi3_mlx.models import build, decoder, experts, linear, parse_config
from phi3_mlx.models.cache import KVBits
from phi3_mlx.store.checkpoint import model_size, read_model
from phi3_mlx.store.safetensors import find_weights
from phi3_mlx.tuning import Settings
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.plan import plan_memory
from phi3_mlx.tuning.trainer import Trainer

VOCAB = {**RAW, "vocab_size": 4032, "num_hidden_layers": 1}
GATE = "model.layers.0.block_sparse_moe.gate"
STACKS = [f"model.layers.0.block_sparse_moe.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
TEXT = "Once upon a time there was a little girl named Lily. She had a red ball and a big dog. " * 12


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The release's layout in three files, with a tokenizer."""
    tensors = moe_models.hugging_face(moe_models.random_weights(VOCAB, near=0.5))
    return moe_models.write(tmp_path_factory.mktemp("moe") / "source", VOCAB, tensors, shards=3, tokenizer=True)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("moe") / "packed"
    convert(source, directory, group_size=32, bits=4, report=False)
    return directory


# Conversion


def test_experts_are_stacked_and_packed_and_the_router_is_not(source, packed):
    stored = find_weights(packed).tensors
    assert stored[f"{GATE}.weight"].dtype == "F32"
    for path in STACKS:
        rows, width = parse_config(VOCAB).linears[path.split(".", 3)[3]][1:]
        assert (stored[f"{path}.weight"].dtype, stored[f"{path}.weight"].shape) == ("U32", (EXPERTS, rows, width // 8))
        assert stored[f"{path}.scales"].shape == (EXPERTS, rows, width // 32)
    assert json.loads((packed / "config.json").read_text())["quantization"][GATE] is False
    ids = ids_of(70)
    exact, found = (logits_of(read_model(directory), ids) for directory in (source, packed))
    assert 0.05 < np.median(np.abs(found - exact)) / exact.std() < 0.5


def test_mlx_lm_loads_it(packed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports'
        utils = pytest.importorskip("mlx_lm.utils")
        theirs, _ = utils.load_model(packed)
    expected = dict(tree_flatten(read_model(packed).parameters()))
    found = dict(tree_flatten(theirs.parameters()))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert mx.array_equal(array, expected[name]), name


@pytest.mark.parametrize("layout", ["hugging_face", "transformers_5"])
def test_what_is_dequantized_is_the_source(layout, source, tmp_path):
    weights = moe_models.random_weights(VOCAB, near=0.5)
    other = moe_models.write(tmp_path / "other", VOCAB, getattr(moe_models, layout)(weights), tokenizer=True)
    convert(other, tmp_path / "plain", dequantize=True)
    found = dict(tree_flatten(read_model(tmp_path / "plain").parameters()))
    for name, array in weights.items():
        assert mx.array_equal(array, found[name]), name


def test_experts_quantized_one_by_one_are_dequantized_each_by_its_own_packing(tmp_path):
    """In `convert`, which stacks them, and in `fuse`, which leaves them apart."""
    plain = moe_models.hugging_face(moe_models.random_weights(VOCAB, near=0.5))
    other = "model.layers.0.block_sparse_moe.experts.3.w2"
    tensors, expected = {}, {}
    for name, array in plain.items():
        path = name.removesuffix(".weight")
        if ".experts." not in name:
            tensors[name] = expected[name] = array
            continue
        packing = {"group_size": 32, "bits": 8 if path == other else 4}
        parts = mx.quantize(array, **packing)
        tensors |= {f"{path}.{kind}": part for kind, part in zip(("weight", "scales", "biases"), parts, strict=True)}
        expected[name] = mx.dequantize(*parts, **packing)
    quantization = {"group_size": 32, "bits": 4, other: {"group_size": 32, "bits": 8}}
    base = moe_models.write(tmp_path / "base", {**VOCAB, "quantization": quantization}, tensors, tokenizer=True)
    convert(base, tmp_path / "whole", dequantize=True)
    whole = mx.load(str(tmp_path / "whole" / "model.safetensors"))
    for name, array in moe_models.hugging_face(whole).items():
        assert mx.array_equal(array, expected[name]), name
    source = DirectorySource(base)
    apart = AdaptedSource(source, dequantize=True)
    for name, array in expected.items():
        assert mx.array_equal(apart.read(name), array), name
    convert(base, tmp_path / "again", bits=8, group_size=32, report=False)
    stacked = mx.load(str(tmp_path / "again" / "model.safetensors"))
    parts = [stacked[f"{STACKS[2]}.{kind}"][3] for kind in ("weight", "scales", "biases")]
    found = mx.dequantize(*parts, 32, 8)
    assert 0 < mx.abs(found - plain[f"{other}.weight"]).max() < 0.05


def test_a_recipe_names_experts_and_router(source, tmp_path):
    recipe = {"group_size": 32, "bits": 4, GATE: {"group_size": 32, "bits": 8}, "lm_head": False}
    recipe |= {path: {"group_size": 32, "bits": 3} for path in STACKS}
    convert(source, tmp_path / "mixed", recipe=recipe, report=False)
    model = read_model(tmp_path / "mixed")
    block = model.layers[0].block_sparse_moe
    assert (block.gate.bits, block.switch_mlp.up_proj.bits, model.layers[0].self_attn.q_proj.bits) == (8, 3, 4)
    assert isinstance(block.switch_mlp.up_proj, experts.QuantizedSwitchLinear)
    assert type(model.lm_head) is linear.Linear


def test_conversion_holds_one_stack_of_experts(tmp_path):
    """However many layers there are: the largest stack, what it is packed to, and little else."""
    peaks = []
    stack = 2 * EXPERTS * 2048 * RAW["hidden_size"]  # bytes in 16 bits
    for layers in (1, 3):
        raw = {**VOCAB, "intermediate_size": 2048, "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
        tensors = {
            name: array.astype(mx.bfloat16)
            for name, array in moe_models.hugging_face(moe_models.random_weights(raw)).items()
        }
        directory = moe_models.write(tmp_path / f"source {layers}", raw, tensors, tokenizer=True)
        del tensors
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        convert(directory, tmp_path / f"packed {layers}", report=False)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 1.8 * stack, peaks
    assert peaks[1] < 1.02 * peaks[0], peaks


def test_bits_by_sensitivity_count_experts(source, tmp_path):
    made = convert(source, tmp_path / "chosen", target_bpw=5.0, group_size=32, calibration=TEXT, report=False)
    assert made.recipe[GATE] is False
    assert 4.8 < made.bits_per_weight <= 5.0
    assert read_model(tmp_path / "chosen").layers[0].block_sparse_moe.switch_mlp.up_proj.bits in (2, 3, 4, 5, 6, 8)


@pytest.mark.long
def test_what_gptq_loses_in_experts_is_measured(source):
    """Experts that see few of these tokens are rounded for what the others get, as where a model is packed."""
    opened, ids = DirectorySource(source), ids_of(128 * 4)[0].tolist()
    plain, by_gptq = (measure(opened, ids, group_size=32, bits=(2, 4), rounds=rounds) for rounds in (False, True))
    assert list(by_gptq) == list(plain)
    for path in STACKS:
        of = by_gptq[f"{path}.weight"]
        assert 0 < of[4] < of[2] < plain[f"{path}.weight"][2], path


@pytest.mark.long
def test_gptq_mends_each_expert_and_the_report_says_so(source, tmp_path):
    errors = {}
    for method in ("round", "gptq"):
        calibration = TEXT if method == "gptq" else None
        made = convert(
            source, tmp_path / method, bits=3, group_size=32, method=method, calibration=calibration, text=TEXT,
            report=True,
        )  # fmt: skip
        errors[method] = {tensor.path: tensor for tensor in made.report.tensors}
    assert errors["gptq"][GATE].relative_error == 0
    assert errors["gptq"][GATE].bits is None
    for path in STACKS:
        assert errors["gptq"][path].bits == 3
        assert 0.02 < errors["gptq"][path].relative_error < 0.9 * errors["round"][path].relative_error, path


def test_the_reports_error_is_that_of_the_experts_in_use(source, packed, tmp_path):
    """Against the outputs of every row by its expert, computed the plain way."""
    made = convert(source, tmp_path / "again", group_size=32, text=TEXT[:400], report=True)
    reported = {tensor.path: tensor.relative_error for tensor in made.report.tensors}
    assert set(STACKS) < set(reported)
    assert all(0.01 < reported[path] < 0.3 for path in STACKS)


def test_an_expert_that_no_token_reaches_is_still_rounded_well():
    weight = mx.random.normal((16, 64), key=mx.random.key(0))
    packing = {"group_size": 32, "bits": 4, "mode": "affine"}
    found = mx.dequantize(*gptq(weight, mx.zeros((64, 64)), packing, mx.float32), **packing)
    plain = mx.dequantize(*pack(weight, packing), **packing)
    assert float(mx.square(found - weight).sum()) <= 1.01 * float(mx.square(plain - weight).sum())


# Fine-tuning


def test_attention_is_what_adapters_change():
    config = parse_config(VOCAB)
    assert [target.name for target in find_targets(config)] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for name in ("gate", "gate_proj", "down_proj"):
        with pytest.raises(OptionError, match="choose of q_proj, k_proj, v_proj, o_proj"):
            find_targets(config, [name])


def test_a_run_learns_on_packed_experts(packed, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "Tom has a ball and Mia has a hat."}] * 8)
    losses = []
    tune(
        str(packed), data, tmp_path / "adapter", steps=6, batch_size=8, holdout=0, learning_rate=0.02, warmup=0,
        schedule="constant", on_step=lambda report: losses.append(report.loss),
    )  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]
    model, _ = load(str(packed), adapter=tmp_path / "adapter")
    ids = ids_of(20)
    assert np.abs(logits_of(model, ids) - logits_of(read_model(packed), ids)).max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_go_to_peft_and_back_and_into_the_model(source, packed, tmp_path, dora):
    ids = ids_of(30)
    model = read_model(source)
    adapters = attach(model, find_targets(model.config), 3, 6.0, dora=dora)
    randomize(adapters)
    model.eval()
    expected = logits_of(model, ids)
    files = adapter_files(adapters, model.config.num_hidden_layers, base_of(source, str(source)))
    write_adapter(tmp_path / "a", *files)
    assert export_peft(tmp_path / "a", tmp_path / "peft") == 4
    names = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert import_peft(tmp_path / "peft", tmp_path / "back", str(source)) == 4
    assert np.abs(logits_of(load(str(source), adapter=tmp_path / "back")[0], ids) - expected).max() < 1e-3
    fuse(tmp_path / "a", tmp_path / "fused")
    assert np.abs(logits_of(read_model(tmp_path / "fused"), ids) - expected).max() < 1e-3


def test_fusing_leaves_packed_experts_as_they_are(packed, tmp_path):
    model = read_model(packed)
    adapters = attach(model, find_targets(model.config), 3, 6.0)
    randomize(adapters)
    write_adapter(tmp_path / "a", *adapter_files(adapters, 1, base_of(packed, str(packed))))
    made = fuse(tmp_path / "a", tmp_path / "fused", bits=8, text=TEXT)
    assert made.packed
    fused = read_model(tmp_path / "fused")
    assert fused.layers[0].self_attn.q_proj.bits == 8
    for name, array in tree_flatten(fused.layers[0].block_sparse_moe.parameters()):
        own = dict(tree_flatten(model.layers[0].block_sparse_moe.parameters()))[name]
        assert mx.array_equal(array, own), name


def test_an_adapter_of_experts_is_refused(source, tmp_path):
    tensors = {f"{STACKS[0]}.lora_a": mx.zeros((EXPERTS, 2, 256)), f"{STACKS[0]}.lora_b": mx.zeros((EXPERTS, 96, 2))}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    write_adapter(tmp_path / "a", tensors, config)
    with pytest.raises(AdapterError, match="experts") as caught:
        load(str(source), adapter=tmp_path / "a")
    assert "\n" not in str(caught.value)


# Memory


@pytest.mark.parametrize("dequantizing_pays", [1, 10**9])
@pytest.mark.parametrize(
    ("hidden", "inner", "chunk", "length", "bits", "weight_bits"),
    [
        (256, 704, 256, 516, None, 8),
        (256, 1024, 256, 400, None, 4),
        (512, 512, 256, 600, 8, None),
        (1024, 256, 256, 516, None, None),
    ],
)
def test_the_plan_is_what_a_run_takes(hidden, inner, chunk, length, bits, weight_bits, dequantizing_pays, monkeypatch):
    for module in (linear, decoder, experts):
        monkeypatch.setattr(module, "dequantizing_pays", lambda *_: dequantizing_pays)
    quantization = {"group_size": 32, "bits": weight_bits} if weight_bits else None
    raw = {**RAW, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": hidden // 128}
    raw |= {"max_position_embeddings": 8192, "original_max_position_embeddings": 8192, "rope_scaling": None}
    model = build(parse_config({**raw, "sliding_window": None, "quantization": quantization}))
    model.eval()
    if quantization:
        nn.quantize(model, **quantization)
    mx.eval(model.parameters())
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    kv_bits = KVBits(bits, bits) if bits else None
    prompt = np.random.default_rng(0).integers(2, 96, length - 4).tolist()
    options = {"max_tokens": 4, "sampling": Sampling(), "kv_bits": kv_bits, "prefill_chunk": chunk, "room": math.inf}
    workload = Workload(model.config, weights, length, 1, kv_bits, itemsize=4, fused_kernel=False)
    predicted = weights + workload.cache_bytes() + workload.workspace(chunk)

    def fits(peak):
        return 0.88 * (weights + peak) < predicted < 1.12 * (weights + peak)

    peak = fair_peak(lambda: list(Generation(model, [prompt], **options)), fits)
    assert fits(peak), (predicted, weights + peak)


SHAPE = {
    **RAW,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "rope_scaling": None,
    "sliding_window": None,
    "original_max_position_embeddings": 1024,
    "max_position_embeddings": 1024,
}
CHECKPOINTED = {"gradient_checkpointing": True}
GRID = {
    "plain": ({}, [100] * 4, {}),
    "wide inside, checkpointed": ({"intermediate_size": 1024}, [100] * 4, CHECKPOINTED),
    "4 bits, checkpointed": ({"hidden_size": 256, "intermediate_size": 704, "bits": 4}, [60] * 4, CHECKPOINTED),
    "dora": ({}, [100] * 4, {"method": "dora"}),
}


def test_plans_of_training_are_what_runs_take(tmp_path_factory):
    ratios = {}
    for name, (changes, lengths, options) in GRID.items():
        raw = {**SHAPE, **changes}
        bits = raw.pop("bits", None)
        model = build(parse_config(raw))
        if bits:
            raw["quantization"] = {"group_size": 32, "bits": bits}
            nn.quantize(model, 32, bits)
        folder = tmp_path_factory.mktemp("plan")
        directory = moe_models.write(folder / "model", raw, dict(tree_flatten(model.parameters())))
        del model
        settings = Settings(data="-", output="-", batch_size=len(lengths), steps=2, **options)
        data = examples(lengths, trained=0.05)
        counts = [int(example.trained.sum()) for example in data]
        planned = plan_memory(model_size(directory), settings, [n - 1 for n in lengths], counts).total
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        model, _ = runs.load_for_training(type("Prepared", (), {"settings": settings, "checkpoint": directory}))
        mx.eval(model.parameters())
        mx.reset_peak_memory()
        Trainer(model, data, [], settings, folder / "checkpoints", {}).run()
        ratios[name] = planned / (mx.get_peak_memory() - before)
        del model
    # How many dequantized stacks MLX allocates ahead depends on its haste: the plan is for the most.
    assert all(0.85 < value < (1.5 if "4 bits" in name else 1.18) for name, value in ratios.items()), ratios


def test_the_released_model_is_planned():
    from phi3_mlx.store.hub import find_alias

    alias = find_alias("phi-3.5-moe-4bit")
    workload = Workload(alias.shape, alias.bytes, 4096)
    assert 23e9 < alias.bytes < 24e9
    assert workload.cache_bytes() == 4096 * 32 * 2 * 8 * 128 * 2
    assert dataclasses.replace(workload, length=131_072).longest(machine.mac_working_set(64 << 30)) == 131_072
    assert workload.longest(machine.mac_working_set(32 << 30)) == 0
