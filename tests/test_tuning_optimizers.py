"""Which optimizer moves which weights, at which rate, and what it keeps of them."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tuning_models import RAW, facts, make_directory, write_jsonl

from phi3_mlx import tune
from phi3_mlx.models import build, parse_config
from phi3_mlx.store.checkpoint import ModelSize
from phi3_mlx.store.family import parameter_count
from phi3_mlx.tuning.optimizers import Muon, learning_rate, make_optimizer, optimizer_arrays
from phi3_mlx.tuning.plan import plan_memory
from phi3_mlx.tuning.settings import OPTIMIZERS, Settings

RUN = {"data": "x", "output": "y"}


def test_muon_decays_weights_beside_its_step_and_not_within_it():
    """What is orthogonalized has no size: decay added to the gradient would turn the step and not shrink the weight."""
    given = Settings(**RUN, optimizer="muon", learning_rate=0.1)
    weight, gradient = mx.array([[3.0, 1.0], [0.5, 2.0]]), mx.array([[1.0, 0.2], [0.1, -1.0]])

    def step(decay):
        optimizer = make_optimizer(dataclasses.replace(given, weight_decay=decay))
        return np.array(optimizer.apply_gradients({"w": gradient}, {"w": weight})["w"] - weight)

    np.testing.assert_allclose(step(0.5) - step(0.0), -0.1 * 0.5 * np.array(weight), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_muon_has_the_layers_matrices_of_a_full_fine_tuning_and_adamw_all_else(tied):
    given = Settings(**RUN, method="full", optimizer="muon", learning_rate=0.01, muon_rate=0.03, weight_decay=0.5)
    model = build(parse_config({**RAW, "tie_word_embeddings": tied}))
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    optimizer = make_optimizer(given)
    optimizer.init(model.trainable_parameters())
    optimizer.learning_rate = 0.005  # as the schedule sets it: half of the peak
    keys = iter(mx.random.split(mx.random.key(0), 100))
    gradients = tree_map(lambda a: mx.random.normal(a.shape, key=next(keys)), model.trainable_parameters())
    optimizer.update(model, gradients)
    of_layers, outside = 0, {"model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])}
    for name, array in tree_flatten(model.parameters()):
        rate = 0.015 if name not in outside and array.ndim == 2 else 0.005
        kept = before[name] * (1 if "norm" in name else 1 - rate * 0.5)
        step = np.array(array) - kept
        if rate == 0.005:  # AdamW's first step has the rate's size everywhere
            np.testing.assert_allclose(np.abs(step), 0.005, rtol=0.01, err_msg=name)
        else:  # Muon's is nearly orthogonal
            of_layers += 1
            lengths = np.linalg.svd(step / max(1, step.shape[0] / step.shape[1]) ** 0.5, compute_uv=False) / 0.015
            assert 0.6 < np.median(lengths) <= lengths.max() < 1.3, name
    assert of_layers == 4 * RAW["num_hidden_layers"]
    assert {*before} >= outside


def test_muons_rate_is_adamws_where_none_is_given_and_a_lora_has_muon_alone():
    given = Settings(**RUN, method="full", optimizer="muon", learning_rate=0.01)
    rates = [float(each.learning_rate) for each in make_optimizer(given).optimizers]
    assert rates == pytest.approx([0.01] * 3)
    assert type(make_optimizer(dataclasses.replace(given, method="lora"))) is Muon
    # The magnitudes of DoRA are no matrices.
    dora = make_optimizer(dataclasses.replace(given, method="dora", muon_rate=0.02))
    weights = {"layers": [{"q": {"m": mx.ones(4), "lora_a": mx.eye(4)}}]}
    dora.init({"model": weights})
    moved = dora.apply_gradients({"model": tree_map(mx.ones_like, weights)}, {"model": weights})["model"]
    magnitude = np.array(moved["layers"][0]["q"]["m"])
    np.testing.assert_allclose(magnitude, 1 - 0.01, rtol=1e-5)


def test_a_full_fine_tuning_by_muon_runs_and_goes_on(tmp_path):
    base = make_directory(tmp_path / "base", num_hidden_layers=1)
    data = write_jsonl(tmp_path / "facts.jsonl", facts(12))
    options = {"method": "full", "optimizer": "muon", "muon_rate": 0.01, "batch_size": 4, "holdout": 0, "save_every": 2}
    losses = []
    for name, halts in (("whole", ()), ("cut", (3,))):
        losses.append([])

        def step(report, halts=halts):
            losses[-1].append(report.loss)
            if report.step in halts:
                raise RuntimeError("stop")

        arguments = {"steps": 4, **options, "on_step": step, "notify": lambda _: None}
        if halts:
            with pytest.raises(RuntimeError):
                tune(str(base), data, tmp_path / name, **arguments)
            del losses[-1][:]
            arguments |= {"on_step": lambda report: losses[-1].append(report.loss), "resume": True}
        assert tune(str(base), data, tmp_path / name, **arguments).finished
    assert losses[0][-len(losses[1]) :] == losses[1]
    assert losses[0][-1] < losses[0][0]
    weights = [mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("whole", "cut")]
    assert all(mx.array_equal(array, weights[1][name]) for name, array in weights[0].items())


def test_the_rate_of_a_fine_tuning_rises_over_the_warm_up_and_then_falls_as_its_schedule_says():
    def rates(**given):
        return [learning_rate(Settings(**RUN, learning_rate=1.0, **given), step, 100) for step in range(100)]

    assert rates(schedule="linear", warmup=19)[:19] == pytest.approx([(n + 1) / 20 for n in range(19)])
    assert rates(schedule="linear", warmup=20)[20:] == pytest.approx([1 - n / 80 for n in range(80)])
    falling = [(1 + math.cos(math.pi * n / 80)) / 2 for n in range(80)]
    assert rates(schedule="cosine", warmup=20)[20:] == pytest.approx(falling)
    assert rates(schedule="constant")[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])  # 3 % of the steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_has_what_the_optimizer_keeps(optimizer, tied):
    config = parse_config({**RAW, "tie_word_embeddings": tied})
    numbers = parameter_count(config)
    settings = Settings(**RUN, method="full", optimizer=optimizer, max_length=32)
    plan = plan_memory(ModelSize(config, 4 * numbers, 0, 4, numbers), settings, [20] * 8, [10] * 8)
    model = build(config)
    made = make_optimizer(settings)
    made.init(model.trainable_parameters())
    kept = sum(array.nbytes for array in optimizer_arrays(made).values())
    gradients = 4 * numbers
    if optimizer == "adafactor":  # a row and a column of each matrix, which the plan leaves out
        assert kept < 0.02 * gradients
        assert plan.trained == gradients
    else:
        assert plan.trained - gradients == pytest.approx(kept, rel=0.01)
