"""Dropout: what it hides is the same whenever a step is computed again, in other parts, or by other processes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from oracle import CONFIGS, ORIGINAL, slim
from tuning_models import examples, facts, make_directory, randomize, write_jsonl

from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.targets import Target, find_targets
from phi3_mlx.models.dropout import Draws, dropped, token_keys
from phi3_mlx.tuning import Settings, loss, tune
from phi3_mlx.tuning import run as runs
from phi3_mlx.tuning.batches import make_part
from phi3_mlx.tuning.events import Listener
from phi3_mlx.tuning.loss import part_loss
from phi3_mlx.tuning.trainer import Trainer

LENGTHS = (7, 2, ORIGINAL + 9, 23)


def make(names=(), **options):
    """A small model with adapters that change something, half of whose inputs are hidden from them."""
    mx.random.seed(0)
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    randomize(attach(model, find_targets(model.config, names), 3, 6.0, dropout=0.5, **options))
    model.train()
    return model


def gradients_of(model, part, **options):
    value, found = nn.value_and_grad(model, lambda: part_loss(model, part, **options))()
    mx.eval(value, found)
    return float(value.item()), dict(tree_flatten(found))


def off(ours, theirs):
    """|difference| / |theirs| over all arrays."""
    difference = sum(float(mx.sum(mx.square(ours[name] - theirs[name])).item()) for name in theirs)
    return (difference / sum(float(mx.sum(mx.square(array)).item()) for array in theirs.values())) ** 0.5


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"names": ("q_proj", "up_proj", "o_proj")}])
def test_checkpointing_hides_the_same_numbers_twice(options):
    """Of given keys and of MLX's random state; the slope is that of the loss itself, by finite differences."""
    model = make(**options)
    data = examples(LENGTHS)
    part = make_part(data)
    keys = token_keys(3, 1, range(4), part.lengths)
    plain, expected = gradients_of(model, part, keys=keys)
    again, found = gradients_of(model, part, keys=keys, checkpoint=True)
    assert again == pytest.approx(plain, rel=1e-6)
    assert off(found, expected) < 1e-5

    mx.random.seed(7)
    plain, expected = gradients_of(model, part)
    mx.random.seed(7)
    again, found = gradients_of(model, part, checkpoint=True)
    assert again == pytest.approx(plain, rel=1e-6)
    assert off(found, expected) < 1e-5

    if "dora" in options:  # whose gradient takes lengths for constants, so that it is not the slope
        return
    start = dict(tree_flatten(model.trainable_parameters()))
    rng = np.random.default_rng(0)
    direction = {n: mx.array(rng.standard_normal(a.shape).astype(np.float32)) for n, a in start.items()}
    _, found = gradients_of(model, part, keys=keys, checkpoint=True)
    slope = float(sum(mx.sum(found[name] * direction[name]) for name in start).item())
    step, values = 2e-4, []
    for sign in (1, -1):
        model.update(tree_unflatten([(n, start[n] + sign * step * d) for n, d in direction.items()]))
        values.append(float(part_loss(model, part, keys=keys, checkpoint=True).item()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_the_output_layers_adapter_hides_the_same_for_loss_and_gradient(monkeypatch):
    """Its logits are computed twice, piece by piece: once for the loss, once for the gradient, taken at once."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 8 * 96)
    monkeypatch.setattr(loss, "_ROWS", 1)
    model = oracle.make_ours(slim(CONFIGS["mini-4k"]))
    model.freeze()
    target = Target("lm_head", "lm_head", 96, model.config.hidden_size, (("lm_head", 0, 96),))
    randomize(attach(model, [target], 3, 6.0, dropout=0.5))
    model.train()
    part = make_part(examples((30, 41), trained=1.0))
    keys = token_keys(3, 1, range(2), part.lengths)
    _, found = gradients_of(model, part, keys=keys)

    def plain():
        """The same masks, the loss of all places at once, and MLX's own gradient of it."""
        hidden = model.model.end_to_end(part.ids, part.lengths, keys=keys)[0][part.places]
        logits = []
        for i in range(0, len(part.places), 8):
            with Draws(keys[part.places[i : i + 8]]).within(model.config.num_hidden_layers):
                logits.append(model.logits(hidden[i : i + 8]))
        return nn.losses.cross_entropy(mx.concatenate(logits), part.targets, reduction="sum")

    expected = dict(tree_flatten(nn.value_and_grad(model, plain)()[1]))
    assert off(found, expected) < 1e-5
    mx.random.seed(1)
    one = gradients_of(model, part)[1]
    mx.random.seed(2)
    assert off(gradients_of(model, part)[1], one) > 0.05


def test_the_mask_is_the_one_that_the_keys_say():
    """Against the same pass with masks made one token at a time, of one layer alone."""
    keys, x = token_keys(5, 2, [4, 9], [3, 2]), mx.array(np.random.default_rng(0).standard_normal((1, 5, 64)))
    draws = Draws(keys)
    with draws.within(6):
        first, second = dropped(x, 0.25), dropped(x, 0.25)
    with draws.within(6):
        again = dropped(x, 0.25)
    with draws.within(7):
        other = dropped(x, 0.25)
    assert mx.array_equal(first, again)
    masks = [np.array(one[0] == 0) for one in (first, second, other)]
    assert all(0.15 < mask.mean() < 0.35 for mask in masks)
    for i, one in enumerate(masks):
        assert all((one == mask).mean() < 0.75 for mask in masks[i + 1 :]), "modules and layers draw apart"
        rows = [(one[a] == one[b]).mean() for a in range(5) for b in range(a)]
        assert max(rows) < 0.85, "tokens draw apart"
    for token, words in enumerate(np.array(keys)):
        own = mx.array(words ^ np.random.SeedSequence([6, 0]).generate_state(2))
        kept = mx.random.bernoulli(0.75, (64,), key=own)
        assert mx.allclose(first[0, token], mx.where(kept, x[0, token] / 0.75, 0.0))
    assert mx.array_equal(token_keys(5, 2, [9], [2]), keys[3:]), "whatever else is in the batch"
    for seed, step in ((6, 2), (5, 3), (2**40 + 5, 2)):
        assert not mx.any(token_keys(seed, step, [4, 9], [3, 2]) == keys)


def test_a_batch_in_parts_hides_what_the_whole_hides():
    model, data = make(), examples((*LENGTHS, 40))
    order, lengths = [3, 0, 4, 1, 2], [len(example) - 1 for example in data]
    keys = lambda chosen: token_keys(0, 8, chosen, [lengths[i] for i in chosen])  # noqa: E731
    whole, expected = gradients_of(model, make_part([data[i] for i in order]), keys=keys(order))
    total, summed = 0.0, {name: mx.zeros_like(array) for name, array in expected.items()}
    for chosen in ([4], [0, 2], [1, 3]):
        one, found = gradients_of(model, make_part([data[i] for i in chosen]), keys=keys(chosen))
        total, summed = total + one, {name: summed[name] + found[name] for name in summed}
    assert total == pytest.approx(whole, rel=1e-5)
    assert off(summed, expected) < 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "facts.jsonl", facts(24))


OPTIONS = {
    "rank": 2,
    "batch_size": 6,
    "learning_rate": 1e-2,
    "dropout": 0.4,
    "steps": 3,
    "holdout": 0.0,
    "seed": 3 << 30,
}


def run(base, data, folder, monkeypatch, **options):
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)
    reports = []
    tune(str(base), data, folder, **{**OPTIONS, **options}, on_step=reports.append)
    return [(report.loss, report.gradient_norm) for report in reports]


def test_how_a_batch_is_computed_does_not_change_a_run(base, data, tmp_path, monkeypatch):
    """Checkpointing and accumulation: the same losses and gradients as without, to rounding."""
    expected = run(base, data, tmp_path / "plain", monkeypatch)
    for n, options in enumerate(({"gradient_checkpointing": True}, {"accumulate": 3}, {"accumulate": 6})):
        found = run(base, data, tmp_path / str(n), monkeypatch, **options)
        assert np.allclose(found, expected, rtol=1e-4), options
    assert not np.allclose(run(base, data, tmp_path / "seed", monkeypatch, seed=1), expected, rtol=1e-3)
    mx.random.seed(99)  # nobody else's draws matter
    assert run(base, data, tmp_path / "again", monkeypatch) == expected


def prepare(base, data, tmp_path, **options):
    options = {**OPTIONS, **options}
    return runs.prepare(Settings(model=str(base), data=str(data), output=str(tmp_path / "out"), **options))


def test_every_step_hides_others(base, data, tmp_path):
    """Of the same examples with the same weights."""
    prepared = prepare(base, data, tmp_path, batch_size=24)
    model, adapters = runs.load_for_training(prepared)
    randomize(adapters)
    model.train()
    trainer = Trainer(model, prepared.train.examples, [], prepared.settings, tmp_path, {})
    losses = [trainer.gradients(step)[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != pytest.approx(losses[2], rel=1e-3)


def test_ranks_hide_what_one_process_hides(base, data, tmp_path, monkeypatch):
    """Two ranks that are run one after the other add up to the batch of one."""

    class Rank:
        def __init__(self, rank, size):
            self.rank, self.size = lambda: rank, lambda: size

    prepared = prepare(base, data, tmp_path)

    def summed(rank, size):
        """(loss, gradients) of a rank's share of the second step."""
        model, adapters = runs.load_for_training(prepared)
        randomize(adapters)
        model.train()
        trainer = Trainer(
            model, prepared.train.examples, [], prepared.settings, tmp_path, {}, Listener(), Rank(rank, size)
        )
        value, found, _ = trainer.gradients(1)
        return value, dict(tree_flatten(found))

    whole, expected = summed(0, 1)
    shares = [summed(rank, 2) for rank in range(2)]
    assert sum(value for value, _ in shares) == pytest.approx(whole, rel=1e-5)
    assert off({name: shares[0][1][name] + shares[1][1][name] for name in expected}, expected) < 1e-4


def test_validation_hides_nothing(base, data, tmp_path):
    """Training hides most inputs from the adapters; the loss that chooses the best adapter is that of using them."""
    prepared = prepare(base, data, tmp_path, holdout=0.5)
    model, adapters = runs.load_for_training(prepared)
    randomize(adapters)
    trainer = Trainer(model, prepared.train.examples, prepared.valid.examples, prepared.settings, tmp_path, {})
    model.train()
    found = trainer.validation_loss()
    total = count = 0.0
    model.eval()
    for example in prepared.valid.examples:
        logits = model(mx.array(example.ids[:-1])[None])[0]
        losses = nn.losses.cross_entropy(logits, mx.array(example.ids[1:]))
        total += float(mx.sum(losses * mx.array(example.trained[1:])).item())
        count += int(example.trained[1:].sum())
    assert found == pytest.approx(total / count, rel=1e-5)
    model.train()
    hidden = part_loss(model, make_part(prepared.valid.examples)).item() / count
    assert abs(hidden - found) > 0.01, "with dropout on it would be another"
