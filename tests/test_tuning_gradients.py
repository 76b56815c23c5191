"""Losses and gradients: against finite differences, PyTorch with peft, and the plain way of computing the same."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import naive
import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from oracle import CONFIGS, ORIGINAL, slim
from tuning_models import examples, randomize

from phi3_mlx.adapters.lora import AdaptedLinear, attach
from phi3_mlx.adapters.targets import find_targets, names_of
from phi3_mlx.errors import OptionError
from phi3_mlx.models.decoder import Model
from phi3_mlx.models.end_to_end import EndToEnd
from phi3_mlx.models.hooks import set_layer
from phi3_mlx.tuning.batches import Schedule, make_part, split_parts
from phi3_mlx.tuning.loss import part_loss
from phi3_mlx.tuning.optimizers import make_optimizer
from phi3_mlx.tuning.settings import Settings

LENGTHS = (7, 2, ORIGINAL + 9, 23, ORIGINAL, ORIGINAL + 1, ORIGINAL + 2)  # read: one fewer, so short and long ones
RUN = {"data": "x", "output": "y"}


def detach(model):
    """Take all adapters off again, for the next test of this model."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, AdaptedLinear):
            set_layer(model, path, layer.linear)


def make(name="3.5-mini", **options):
    """A small model with adapters that change something, the same in whatever order the tests run."""
    mx.random.seed(0)
    model = oracle.make_ours(slim(CONFIGS[name]))
    names = options.pop("targets", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    adapters = attach(model, find_targets(model.config, names, options.pop("layers", None)), 3, 6.0, **options)
    randomize(adapters)
    model.train()
    return model, adapters


def plain_loss(model, data):
    """Sequence by sequence, all logits, the mean over trained tokens."""
    total, count = mx.array(0.0), 0
    for example in data:
        logits = model(mx.array(example.ids[:-1])[None])[0]
        losses = nn.losses.cross_entropy(logits, mx.array(example.ids[1:]))
        mask = mx.array(example.trained[1:])
        total, count = total + mx.sum(mx.where(mask, losses, 0.0)), count + int(example.trained[1:].sum())
    return total / count


def loss_and_gradients(model, function):
    value, gradients = nn.value_and_grad(model, function)()
    mx.eval(value, gradients)
    return float(value.item()), dict(tree_flatten(gradients))


def count(data):
    return sum(int(example.trained.sum()) for example in data)


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    assert max(float(mx.abs(array).max()) for array in theirs.values()) > 1e-3, "gradients that say something"
    for name, array in theirs.items():
        scale = float(mx.abs(array).max()) + 1e-3
        assert float(mx.abs(ours[name] - array).max()) < tolerance * max(1, scale), name


@pytest.mark.parametrize("name", ["mini-4k", "3.5-mini", "phi-4-mini", "long-and-window"])
def test_a_batch_end_to_end_equals_sequences_alone(name):
    """One row without padding: block-diagonal attention, positions from 0, each sequence in its own regime."""
    model, _ = make(name)
    data = examples(LENGTHS)
    together, ours = loss_and_gradients(model, lambda: part_loss(model, make_part(data)) / count(data))
    alone, theirs = loss_and_gradients(model, lambda: plain_loss(model, data))
    assert together == pytest.approx(alone, abs=1e-5)
    assert_close(ours, theirs)


def test_loss_equals_the_float64_oracle():
    raw = slim(CONFIGS["3.5-mini"])
    model, data = oracle.make_ours(raw), examples((9, ORIGINAL + 4))
    weights, total = naive.weights_of(model), 0.0
    for example in data:
        logits = naive.logits(raw, weights, example.ids[:-1])
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= logs[np.arange(len(example) - 1), example.ids[1:]][example.trained[1:]].sum()
    assert float(part_loss(model, make_part(data)).item()) == pytest.approx(total, rel=1e-5)


def test_a_neighbour_in_the_row_is_never_seen():
    model, _ = make()
    one, other = examples((12, 30), seed=1), examples((12, 30), seed=2)
    lengths = [11, 29]
    alone = model.model(mx.array(one[1].ids[:-1])[None])
    for first in (one[0], other[0]):
        row = mx.array(np.concatenate([first.ids[:-1], one[1].ids[:-1]]))[None]
        assert mx.allclose(model.model.end_to_end(row, lengths)[:, 11:], alone, atol=1e-5)


def test_blocks_hold_every_token_once_and_little_padding():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 300, 40)]
    joined = EndToEnd(lengths, [False] * 40, None)
    row = mx.arange(sum(lengths)).astype(mx.float32)[None, :, None]
    assert mx.array_equal(joined.scatter([block.gather(row) for block in joined.blocks]), row)
    places = sum(block.gather(row).size for block in joined.blocks)
    assert places < 1.3 * sum(lengths)
    assert len(joined.blocks) < 12


def test_checkpointed_gradients_are_the_same():
    model, _ = make(dora=True)
    part = make_part(examples(LENGTHS))
    plain, expected = loss_and_gradients(model, lambda: part_loss(model, part) / 5)
    again, found = loss_and_gradients(model, lambda: part_loss(model, part, checkpoint=True) / 5)
    assert again == pytest.approx(plain, abs=1e-6)
    assert_close(found, expected, 1e-6)


def test_there_are_no_more_parts_than_examples():
    parts = split_parts([4, 7, 2], list(range(10)), 10**9)
    assert parts == [[7], [4], [2]]


def test_parts_add_up_to_the_batch():
    """Weighted by tokens: parts with few trained tokens must not count as much as parts with many."""
    model, _ = make()
    data = [*examples((40, 9), trained=0.9), *examples((40, 9, 20), seed=3, trained=0.05)]
    total = count(data)
    whole, expected = loss_and_gradients(model, lambda: part_loss(model, make_part(data)) / total)
    parts = split_parts(range(5), [len(example) - 1 for example in data], 3)
    assert sorted(i for part in parts for i in part) == list(range(5))
    value, summed = 0.0, None
    for part in parts:
        chosen = make_part([data[i] for i in part])
        one, gradients = loss_and_gradients(model, lambda chosen=chosen: part_loss(model, chosen) / total)
        value += one
        summed = gradients if summed is None else {name: summed[name] + gradients[name] for name in summed}
    assert value == pytest.approx(whole, abs=1e-5)
    assert_close(summed, expected)


def test_the_output_layer_runs_on_trained_places_alone(monkeypatch):
    """And a few hundred at a time, with the same loss."""
    from phi3_mlx.tuning import loss

    model, _ = make()
    data = examples((30, 41, 12), trained=0.2)
    seen = []
    forward = Model.logits

    def watched(model, hidden):
        seen.append(hidden.shape[0])
        return forward(model, hidden)

    monkeypatch.setattr(Model, "logits", watched)
    whole = float(part_loss(model, make_part(data)).item())
    assert set(seen) == {count(data)}
    seen.clear()
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * 96)
    monkeypatch.setattr(loss, "_ROWS", 1)
    assert float(part_loss(model, make_part(data)).item()) == pytest.approx(whole, rel=1e-6)
    assert max(seen) == 4


@pytest.mark.parametrize("name", ["mini-4k", "phi-4-mini"])
def test_pieces_have_the_gradients_of_the_whole(name, monkeypatch):
    """Of hidden states and of the output layer, its own or the embedding's, whose gradient has two sources then."""
    from phi3_mlx.tuning import loss

    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * 96)
    monkeypatch.setattr(loss, "_ROWS", 1)
    model, _ = make(name)
    detach(model)
    model.unfreeze()
    model.train()
    data = examples((30, 41, 12))
    pieces, ours = loss_and_gradients(model, lambda: part_loss(model, make_part(data)) / count(data))
    whole, theirs = loss_and_gradients(model, lambda: plain_loss(model, data))
    assert pieces == pytest.approx(whole, abs=1e-5)
    assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_equal_finite_differences(method):
    """Along random directions, in steps that float32 can tell."""
    model, _ = make("phi-4-mini")
    if method == "full":
        detach(model)
        model.unfreeze()
    part = make_part(examples((9, ORIGINAL + 5)))
    function = lambda: part_loss(model, part) / part.targets.size  # noqa: E731
    _, gradients = loss_and_gradients(model, function)
    start = dict(tree_flatten(model.trainable_parameters()))
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = {n: mx.array(rng.standard_normal(a.shape).astype(np.float32)) for n, a in start.items()}
        slope = float(sum(mx.sum(gradients[name] * direction[name]) for name in direction).item())
        length = np.sqrt(sum(float(mx.sum(mx.square(a)).item()) for a in direction.values()))
        step, values = 0.02 / length, []
        for sign in (1, -1):
            model.update(tree_unflatten([(n, start[n] + sign * step * d) for n, d in direction.items()]))
            values.append(float(function().item()))
        model.update(tree_unflatten(list(start.items())))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=0.02 * length / 20)


# PyTorch with peft

LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}


def peft_of(model, adapters, **options):
    """transformers' model under peft with the same base and adapters, in training mode."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    plain = oracle.make_ours(slim(CONFIGS["3.5-mini"]))  # the same seed: the same base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = oracle.make_torch(slim(CONFIGS["3.5-mini"]), plain)
        targets = sorted({path.rpartition(".")[2] for path in adapters})
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options)
        theirs = peft.get_peft_model(theirs, config)
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, adapter in adapters.items():
            stem = f"base_model.model.{path}"
            state[f"{stem}.lora_A.default.weight"].copy_(torch.tensor(np.array(adapter.lora_a.T)))
            state[f"{stem}.lora_B.default.weight"].copy_(torch.tensor(np.array(adapter.lora_b.T)))
            if adapter.is_dora:
                state[f"{stem}.lora_magnitude_vector.default.weight"].copy_(torch.tensor(np.array(adapter.m)))
    return torch, theirs, state


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"rslora": True}, {"use_rslora": True}),
        ({"dora": True}, {"use_dora": True}),
        ({"targets": ("qkv_proj", "down_proj")}, {}),
    ],
)
def test_one_optimizer_step_equals_peft(ours, theirs):
    """The same loss, gradients and AdamW step as torch and peft; sequences on both sides of the original length."""
    model, adapters = make(**ours)
    torch, reference, state = peft_of(model, adapters, **theirs)
    data = examples((9, 20, ORIGINAL + 10))
    optimizer = make_optimizer(Settings(**RUN, learning_rate=1e-2, weight_decay=0.1))
    value, gradients = nn.value_and_grad(model, lambda: part_loss(model, make_part(data)) / count(data))()
    optimizer.update(model, gradients)

    trained = [p for p in reference.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    total = 0.0
    for example in data:
        logits = reference(torch.tensor(example.ids[None, :-1].astype(np.int64)), use_cache=False).logits[0]
        mask = torch.tensor(example.trained[1:])
        targets = torch.tensor(example.ids[1:].astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum")
    (total / count(data)).backward()
    assert float(value.item()) == pytest.approx(float(total.detach()) / count(data), abs=1e-5)
    for path, adapter in adapters.items():
        stem = f"base_model.model.{path}"
        leaf = gradients
        for key in [int(k) if k.isdigit() else k for k in path.split(".")]:
            leaf = leaf[key]
        leaf = leaf["adapters"]["default"]
        for name, key in LEAVES.items():
            if name in adapter:
                slope = state[f"{stem}.{key}.default.weight"].grad.numpy().T
                assert np.abs(np.array(leaf[name]) - slope).max() < 2e-5 * max(2, np.abs(slope).max()), (path, name)
    adamw.step()
    for path, adapter in adapters.items():
        stem = f"base_model.model.{path}"
        # Adam divides by the gradient's size, so elements whose gradient is rounding noise may differ.
        for name, key in LEAVES.items():
            if name in adapter:
                parameter = state[f"{stem}.{key}.default.weight"]
                told = np.abs(parameter.grad.numpy().T) > 1e-4
                assert told.mean() > 0.5
                assert np.abs(np.array(adapter[name]) - parameter.detach().numpy().T)[told].max() < 1e-5, (path, name)


# Layers


def test_a_new_adapter_changes_nothing():
    model = oracle.make_ours(slim(CONFIGS["mini-4k"]))
    ids = mx.array(oracle.ids_of(20))
    before = model(ids)
    for dora in (False, True):
        attach(model, find_targets(model.config), 4, 8.0, dora=dora)
        assert mx.allclose(model(ids), before, atol=1e-4)
        detach(model)
        assert mx.array_equal(model(ids), before)


def test_parts_of_fused_layers_change_their_own_rows_alone():
    model, adapters = make("mini-4k", targets=("q_proj", "v_proj", "up_proj"))
    config = model.config
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for path, adapter in adapters.items():
        a, b = adapter.product()
        change = a @ b
        untouched = change[:, q : q + kv] if "qkv" in path else change[:, : config.intermediate_size]
        assert float(mx.abs(untouched).max()) == 0
        touched = (
            mx.concatenate([change[:, :q], change[:, q + kv :]], axis=1)
            if "qkv" in path
            else change[:, config.intermediate_size :]
        )
        assert float(mx.abs(touched).min()) > 0
        assert a.shape[1] == (6 if "qkv" in path else 3)
    # Components of q never learn to change v.
    part = make_part(examples((20, 9)))
    _, gradients = loss_and_gradients(model, lambda: part_loss(model, part))
    for name, gradient in gradients.items():
        if "qkv_proj" in name and name.endswith("lora_b"):
            assert float(mx.abs(gradient[:3, q:]).max()) == 0
            assert float(mx.abs(gradient[3:, : q + kv]).max()) == 0


def test_targets_are_named_or_refused():
    config = oracle.make_ours(slim(CONFIGS["mini-4k"], layers=4)).config
    with pytest.raises(OptionError, match=r"'q_prj' matches no layer.*qkv_proj.*up_proj"):
        find_targets(config, ("q_prj",))
    with pytest.raises(OptionError, match="part of 'qkv_proj'"):
        find_targets(config, ("qkv_proj", "k_proj"))
    with pytest.raises(OptionError, match=r"outside this model.*0-3"):
        find_targets(config, ("o_proj",), "2-4")
    for bad in ("", "a-b", "3-1", "-", "1-2-3", "-5"):
        with pytest.raises(OptionError):
            find_targets(config, ("o_proj",), bad)
    spans = {"1-2": [1, 2], "2-": [2, 3], "-1": [3], "0": [0], None: [0, 1, 2, 3]}
    for given, layers in spans.items():
        found = find_targets(config, ("o_proj",), given)
        assert [target.path for target in found] == [f"model.layers.{n}.self_attn.o_proj" for n in layers]
    assert all(find_targets(config, (name,)) for name in names_of(config))


def test_dropout_hides_inputs_from_the_change_alone():
    model, _ = make(dropout=0.5)
    ids = mx.array(oracle.ids_of(12))
    model.eval()
    steady = model(ids)
    assert mx.array_equal(model(ids), steady)
    model.train()
    mx.random.seed(1)
    first = model(ids)
    assert not mx.allclose(first, steady, atol=1e-2)
    assert not mx.allclose(model(ids), first, atol=1e-2)
    mx.random.seed(1)
    assert mx.array_equal(model(ids), first)


# Batches


def test_every_epoch_reads_every_example_once_and_repeats_by_seed():
    lengths = list(np.random.default_rng(0).integers(1, 50, 103))
    for order in ("shuffle", "bucket"):
        schedule = Schedule(lengths, 8, steps=None, epochs=3, order=order, seed=5)
        assert (schedule.steps_per_epoch, schedule.steps) == (13, 39)
        epochs = [[schedule.batch(13 * e + n) for n in range(13)] for e in range(3)]
        assert all(sorted(i for batch in epoch for i in batch) == list(range(103)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        again = Schedule(lengths, 8, steps=39, epochs=1, order=order, seed=5)
        assert again.batch(30) == schedule.batch(30)  # without having drawn the steps before
        assert Schedule(lengths, 8, steps=39, epochs=1, order=order, seed=6).batch(0) != schedule.batch(0)


def test_bucketing_puts_like_lengths_together():
    """By tokens, in batches whose order stays random."""
    lengths = list(np.random.default_rng(0).integers(1, 1000, 512))
    waste = {}
    for order in ("shuffle", "bucket"):
        schedule = Schedule(lengths, 8, steps=None, epochs=1, order=order, seed=0)
        batches = [[lengths[i] for i in schedule.batch(n)] for n in range(schedule.steps)]
        waste[order] = sum(max(b) * len(b) for b in batches) / sum(map(sum, batches))
        longest = [max(batch) for batch in batches]
        assert longest != sorted(longest)
    assert waste["bucket"] < 1.06 < 1.5 < waste["shuffle"]
