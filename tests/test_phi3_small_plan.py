"""What a run of Phi-3-small will need, against what MLX then takes."""

import gc
import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
import small_models
import test_tuning_plan
from mlx.utils import tree_flatten
from peaks import fair_peak
from test_tuning_plan import CHECKPOINTED

from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.plan import Workload, plan_together
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.models import build, decoder, linear, parse_config
from phi3_mlx.models.cache import KVBits
from phi3_mlx.store.family import MEMBERS

PATTERN = {"blocksparse_block_size": 16, "blocksparse_num_local_blocks": 4, "blocksparse_vert_stride": 8}
ALL_SPARSE = {"dense_attention_every_n_layers": None, "blocksparse_block_size": 32, "blocksparse_num_local_blocks": 8}


@pytest.mark.parametrize(
    ("shape", "changes", "chunk", "length", "bits", "rows", "pays"),
    [  # hidden size, MLP's width, layers, heads, kv heads
        ((256, 704, 4, 4, 2), {}, 256, 900, None, 1, None),
        ((256, 704, 4, 4, 2), {}, 256, 900, 8, 1, None),
        ((256, 704, 3, 8, 8), {}, 128, 700, None, 3, None),
        ((256, 704, 4, 8, 2), {}, 128, 700, None, 3, 1),
        ((512, 704, 4, 16, 4), ALL_SPARSE, 512, 2000, None, 1, 1),
        ((512, 704, 4, 16, 4), ALL_SPARSE, 256, 2000, 4, 1, None),
    ],
    ids=str,
)
def test_the_prediction_is_what_mlx_takes_within_a_tenth(shape, changes, chunk, length, bits, rows, pays, monkeypatch):
    for module in (linear, decoder):
        monkeypatch.setattr(module, "dequantizing_pays", lambda *_: pays)
    names = ("hidden_size", "ff_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    packed = {"group_size": 32, "bits": 8} if pays else None
    raw = {**small_models.RAW, **PATTERN, **changes, **dict(zip(names, shape, strict=True))}
    model = build(parse_config({**raw, "vocab_size": 500, "max_position_embeddings": 8192, "quantization": packed}))
    if packed:
        nn.quantize(model, **packed)
    mx.eval(model.parameters())
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    kv_bits = KVBits(bits, bits) if bits else None
    workload = Workload(model.config, weights, length, bits=kv_bits, itemsize=4, fused_kernel=False, chunk=chunk)
    predicted = plan_together([workload] * rows, math.inf).total
    answer = 4 if rows == 1 else 60  # so long that all rows are there together: one is read after another
    prompts = [[1 + i % 400 for i in range(length - answer)]] * rows

    def run(model=model):
        generation = Generation(
            model, prompts, max_tokens=answer, sampling=Sampling(), kv_bits=kv_bits, prefill_chunk=chunk, room=math.inf
        )
        list(generation)
        if rows == 1:  # several rows let go of theirs as they end
            assert workload.cache_bytes() == sum(layer.nbytes for layer in generation.cache)

    def fits(peak):  # which is smaller where MLX's threads keep in step, as on a machine with much else to do
        return 0.9 * (weights + peak) < predicted < (1.1 if rows == 1 else 1.25) * (weights + peak)

    peak = fair_peak(run, fits)
    del model, run
    gc.collect()  # other tests count what MLX holds
    assert fits(peak), (predicted, weights + peak)


TRAINING = {"plain": ([120] * 6, {}), "checkpointed": ([120] * 6, CHECKPOINTED), "long": ([700], {})}


@pytest.mark.parametrize("case", TRAINING)
def test_a_training_plan_is_what_the_run_takes(case, tmp_path, monkeypatch):
    shape = {"vocab_size": 4032, "hidden_size": 128, "ff_intermediate_size": 352, "max_position_embeddings": 1024}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    made = partial(small_models.write, **shape, **PATTERN)
    monkeypatch.setattr(test_tuning_plan, "make_directory", lambda folder, **_: made(folder))
    lengths, settings = TRAINING[case]
    assert 0.85 < test_tuning_plan.ratio(tmp_path, {}, lengths, 0.05, settings) < 1.18


def test_keys_and_values_of_the_released_models():
    """131,072 bytes a token in 16 bits: 32 layers of 8 keys and values of 128."""
    assert Workload(MEMBERS["phi-3-small-8k"].shape, 0, 8192).cache_bytes() == 131_072 * 8192
    assert Workload(MEMBERS["phi-3-small-128k"].shape, 0, 131_072).cache_bytes() == 131_072 * 131_072
