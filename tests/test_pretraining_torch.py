"""Pretraining against PyTorch: transformers' Phi3ForCausalLM with torch's AdamW and Muon, over the same rows."""

import math

import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten
from tuning_models import write_jsonl

from phi3_mlx import load_tokenizer, tokenize_data
from phi3_mlx.models import parse_config
from phi3_mlx.pretraining.mixture import MixedBatches, Phase
from phi3_mlx.pretraining.next_token import NextToken
from phi3_mlx.pretraining.optimizer import make_pretraining_optimizer, rate_of
from phi3_mlx.pretraining.rows import Rows, Sources
from phi3_mlx.pretraining.settings import PretrainSettings
from phi3_mlx.pretraining.shards import TokenShards
from phi3_mlx.pretraining.weights import fresh_model
from phi3_mlx.tuning.course import Course
from phi3_mlx.tuning.events import Listener
from phi3_mlx.tuning.trainer import Trainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS, PEAK, MUON_PEAK, DECAY, BETA2 = 50, 3e-3, 0.02, 0.1, 0.95
RAW = {
    **oracle.BASE,
    "vocab_size": 4032,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(1)
    words = "the a duck frog hat ball ran saw found and then it was red big happy in on sun moon".split()
    texts = [{"text": " ".join(rng.choice(words, int(rng.integers(2, 70))))} for _ in range(80)]
    tokenize_data(write_jsonl(folder / "t.jsonl", texts), folder / "shards", load_tokenizer("tiny"))
    opened = TokenShards(folder / "shards")
    return Sources([Rows(opened, np.arange(len(opened), dtype=np.int32), 64, 0, 4032)])


def ours(rows, optimizer, tied, folder):
    """Losses of the steps, gradient norms, batches and the weights before and after."""
    given = PretrainSettings(
        config="c", data=("d",), output="o", optimizer=optimizer, learning_rate=PEAK, muon_rate=MUON_PEAK,
        weight_decay=DECAY, beta2=BETA2, warmup=5, batch_size=4, accumulate=2, clip=1.0, save_every=1000,
    )  # fmt: skip
    model = fresh_model(parse_config({**RAW, "tie_word_embeddings": tied}), 0)
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    batches = MixedBatches(
        [len(rows)], [int(rows.lengths.sum())], [Phase(0, (1.0,))], batch_size=4, steps=STEPS, seed=0
    )
    reports = []
    course = Course(NextToken(), batches, make_pretraining_optimizer(given), lambda step: rate_of(given, step, STEPS))
    trainer = Trainer(model, rows, [], given, folder, {}, Listener(step=reports.append), course=course)
    assert trainer.run()
    after = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    return reports, [batches.batch(step) for step in range(STEPS)], before, after


def theirs(rows, batches, before, optimizer, tied):
    """The same run in PyTorch, a document a row; padding stands behind, where no causal query sees it."""
    keys = {key: value for key, value in RAW.items() if key != "rope_scaling"}
    config = transformers.Phi3Config(**{**keys, "tie_word_embeddings": tied}, attn_implementation="eager")
    model = transformers.Phi3ForCausalLM(config).float().train()
    missing = model.load_state_dict({name: torch.tensor(array) for name, array in before.items()}, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    named = dict(model.named_parameters())
    muons = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name and optimizer == "muon"]
    norms = [p for p in named.values() if p.ndim == 1]
    rest = [p for p in named.values() if all(p is not other for other in [*muons, *norms])]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizers = [(torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, BETA2), eps=1e-8), PEAK)]
    if muons:
        optimizers.append((torch.optim.Muon(muons, lr=MUON_PEAK, weight_decay=DECAY, momentum=0.95), MUON_PEAK))
    losses, norms_seen = [], []
    for step, batch in enumerate(batches):
        share = (step + 1) / 6 if step < 5 else (1 + math.cos(math.pi * (step - 5) / (STEPS - 5))) / 2
        documents = [sequence.ids.astype(np.int64) for i in batch for sequence in rows[i].sequences]
        longest = max(map(len, documents))
        ids = np.stack([np.pad(document, (0, longest - len(document))) for document in documents])
        targets = np.full_like(ids, -100)
        for row, document in zip(targets, documents, strict=True):
            row[: len(document)] = document
        logits = model(torch.tensor(ids[:, :-1])).logits.flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets[:, 1:]).flatten())
        loss.backward()
        losses.append(loss.item())
        norms_seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for made, peak in optimizers:
            for group in made.param_groups:
                group["lr"] = peak * share
            made.step()
            made.zero_grad()
    return losses, norms_seen, {name: p.detach().numpy() for name, p in named.items()}


@pytest.mark.parametrize(("optimizer", "tied"), [("adamw", False), ("muon", True)])
def test_fifty_steps_are_pytorchs(rows, optimizer, tied, tmp_path, monkeypatch):
    if optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this PyTorch has no Muon")
        # PyTorch orthogonalizes in bfloat16; both sides are to be compared in float32.
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    reports, batches, before, after = ours(rows, optimizer, tied, tmp_path)
    losses, norms, weights = theirs(rows, batches, before, optimizer, tied)
    assert losses[0] > losses[-1] + 2  # it learns
    assert [report.loss for report in reports] == pytest.approx(losses, rel=2e-4)
    assert [report.loss for report in reports][:5] == pytest.approx(losses[:5], rel=1e-5)
    assert [report.gradient_norm for report in reports] == pytest.approx(norms, rel=5e-3)
    assert max(norms) > 1  # gradients are clipped
    for name, array in after.items():
        moved = np.abs(weights[name] - before[name]).max()
        assert np.abs(array - weights[name]).max() < 0.02 * moved, name
