"""Train the bundled model: transformers' Phi3ForCausalLM in PyTorch, from scratch, by the clock.

    python weights/training/train.py --corpus DIR --out DIR --minutes 100

The learning rate follows the elapsed time, so the run ends where it should on a slow or a busy machine.
A checkpoint is written every ten minutes; --resume continues one. Needs torch, transformers, sentencepiece.
"""

import argparse
import json
import math
import time
from pathlib import Path

import data
import sentencepiece as spm
import torch
import torch.nn.functional as F
import vocab
from transformers import Phi3Config, Phi3ForCausalLM

ORIGINAL, LONGEST = 512, 4096
HALF = 32  # rotary dimensions / 2
# Short: mild, as Phi-3.5's. Long: untouched where a period is seen often within 512 tokens, stretched up to
# 10 times where it is not (wavelength of dimension k: 2 pi 10000^(k/32)).
SHORT = [round(1 + 0.9 * (k / (HALF - 1)) ** 2, 2) for k in range(HALF)]
LONG = [round(1.02 * math.exp(math.log(10) * min(max((k - 5) / 14, 0), 1)), 2) for k in range(HALF)]


def make_config(dropout: float = 0.0) -> Phi3Config:
    return Phi3Config(
        resid_pdrop=dropout,
        vocab_size=4032,  # 4,011 tokens and padding rows, as in the family
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": ORIGINAL,
        },
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=vocab.ENDOFTEXT,
        pad_token_id=vocab.ENDOFTEXT,
        use_cache=False,
    )


def mean_of(checkpoints: list[Path], **config) -> Phi3ForCausalLM:
    """The mean of several checkpoints' weights, in float32; of none: the weights a training begins with."""
    several = [Phi3ForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in checkpoints]
    model = Phi3ForCausalLM._from_config(make_config(**config), attn_implementation="sdpa")
    if several:
        model.load_state_dict({name: sum(one[name] for one in several) / len(several) for name in several[0]})
    return model


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz (Jordan et al. 2024), for the 2-D weights."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: the quintic iteration of the Muon paper."""
    x = g if g.shape[0] <= g.shape[1] else g.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


def batches(args, sp, seed: int):
    """Endless (ids, weights): mostly rows of ORIGINAL tokens, now and then fewer rows of more."""
    train, _ = data.split_stories(args.corpus)
    fables = [t for t in data.read_jsonl(args.corpus / "tinyfabulist.jsonl") if len(t) < 1800]
    docs = data.Documents(train, fables, sp, seed)
    guided = [json.loads(line) for line in args.guided.open(encoding="utf-8")] if args.guided else []
    rng = docs.rng

    def short():
        while True:
            choice = rng.random()
            if choice < 0.02:
                yield docs.fable()
            elif choice < 0.02 + args.exercises:
                yield docs.exercise()
            elif guided and rng.random() < args.guided_share:
                one = rng.choice(guided)
                # Negative: these texts are learnt from themselves also where a teacher gives the rest.
                yield [(ids, -weight) for ids, weight in docs.chat((one["request"], one["story"]), asked=4.0)]
            else:
                yield docs.story()

    def long(length):
        while True:
            yield docs.long(length)

    tokens = args.batch * ORIGINAL
    kinds = [ORIGINAL, 1024, 2048, 4096]
    streams = [data.pack(short(), ORIGINAL, args.batch)]
    streams += [data.pack(long(n), n, max(1, tokens // n)) for n in kinds[1:]]
    while True:
        ids, weights = next(
            rng.choices(streams, [1 - args.long, args.long * 0.5, args.long * 0.35, args.long * 0.15])[0]
        )
        yield torch.tensor(ids), torch.tensor(weights)


def loss_of(model, ids, weights, teacher=None):
    hidden = model.model(ids[:, :-1]).last_hidden_state
    target, w = ids[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    logits = model.lm_head(hidden).flatten(0, 1).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    if teacher is not None:
        with torch.no_grad():
            likely = teacher(ids[:, :-1]).logits.flatten(0, 1).float().softmax(-1)
        losses = torch.where(w < 0, losses, F.cross_entropy(logits, likely, reduction="none"))
    return (losses * w.abs()).sum() / w.abs().sum()


@torch.no_grad()
def quantized(w: torch.Tensor, bits: int = 4, group: int = 32) -> torch.Tensor:
    """The values of a matrix after build.py: bfloat16, then affine quantization in groups, as mlx rounds.

    The end of a group with the larger magnitude is met exactly, and so is zero.
    """
    x = w.bfloat16().float().unflatten(1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    from_low = low.abs() > high.abs()
    scale, edge = torch.where(from_low, scale, -scale), torch.where(from_low, low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps == 0, scale, edge / steps)
    edge = torch.where(steps == 0, 0.0, edge)
    levels = ((x - edge) / scale).round().clamp(0, 2**bits - 1)
    return (levels * scale.bfloat16().float() + edge.bfloat16().float()).flatten(1)


@torch.no_grad()
def bits_per_character(model, sp, texts: list[str]) -> float:
    """Held-out texts one by one, each after <|endoftext|> and with its own <|endoftext|> not counted."""
    nats = chars = 0
    for text in texts:
        ids = torch.tensor([[vocab.ENDOFTEXT, *sp.encode(text.strip())]])
        ids = ids[:, : ORIGINAL + 1].to(model.device)
        logits = model(ids[:, :-1]).logits.float()
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        chars += len(sp.decode(ids[0, 1:].tolist()))
    return nats / math.log(2) / chars


def schedule(progress: float, decay_from: float, warmup: float = 0.01) -> float:
    """Warm-up, constant, then linear to zero over the last part of the time."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    return 1.0 if progress < decay_from else max(0.0, (1 - progress) / (1 - decay_from))


def make_optimizers(model, args) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices unless its rate is 0, AdamW for the rest."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2 and args.muon_lr]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizers = [torch.optim.AdamW(rest, args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if hidden:
        optimizers.insert(0, Muon(hidden, args.muon_lr, weight_decay=args.weight_decay))
    return optimizers


class Run:
    """A training by the clock: weights, optimizers and how far it is; `state.pt` keeps them."""

    def __init__(self, model, optimizers, file: Path):
        self.model, self.optimizers, self.file = model, optimizers, file
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.step, self.tokens, self.spent = 0, 0, 0.0  # spent: seconds
        self.average = None  # of the loss

    def save(self):
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                 "step": self.step, "tokens": self.tokens, "spent": self.spent}  # fmt: skip
        new = self.file.with_suffix(".tmp")
        torch.save(state, new)
        new.rename(self.file)

    def resume(self):
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        self.step, self.tokens, self.spent = state["step"], state["tokens"], state["spent"]

    def learn(self, loss_of_weights, share: float, rounded: bool):
        """A step: rates at this share of their highest, the gradient where the 4-bit weights are if `rounded`."""
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        exact = [(p, p.data) for p in self.model.parameters() if p.ndim == 2 and rounded]
        for p, values in exact:
            p.data = quantized(values)
        loss = loss_of_weights()
        loss.backward()
        for p, values in exact:
            p.data = values
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.average = loss.item() if self.average is None else 0.95 * self.average + 0.05 * loss.item()

    def report(self):
        if self.step % 20 == 0 or self.step < 6:
            line = {"step": self.step, "tokens": self.tokens, "minutes": round(self.spent / 60, 2),
                    "loss": round(self.average, 4)}  # fmt: skip
            print(json.dumps(line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch", type=int, default=12, help="rows of 512 tokens a step")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="0: all weights by AdamW")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--exercises", type=float, default=0.28, help="share of short documents")
    parser.add_argument("--long", type=float, default=0.12, help="share of steps with long rows")
    parser.add_argument("--decay-from", type=float, default=0.35, help="share of the time after which rates fall")
    parser.add_argument("--dropout", type=float, default=0.0, help="of what attention and MLP add")
    parser.add_argument("--quantized-from", type=float, default=0.9,
                        help="share of the time after which the loss is that of the 4-bit weights")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, nargs="+", help="checkpoints whose mean to begin with")
    parser.add_argument("--teacher", type=Path, nargs="+",
                        help="checkpoints whose mean says what follows in all texts but the guided ones")  # fmt: skip
    parser.add_argument("--guided", type=Path, help="what guided.py wrote")
    parser.add_argument("--guided-share", type=float, default=0.5, help="of the short documents that are stories")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    train_texts, held_out = data.split_stories(args.corpus)
    if (args.out / "tokenizer.model").exists():
        sp = spm.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
    else:
        sp = vocab.train([line for t in train_texts for line in t.splitlines() if line], args.out)

    torch.set_float32_matmul_precision("high")
    model = mean_of(args.start or [], dropout=args.dropout).to(args.device).train()
    teacher = mean_of(args.teacher).to(args.device).eval() if args.teacher else None
    run = Run(model, make_optimizers(model, args), args.out / "state.pt")
    if args.resume:
        run.resume()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    objective = torch.compile(loss_of, dynamic=False)

    started, saved = time.time() - run.spent, time.time()
    for ids, weights in batches(args, sp, args.seed + run.step):
        run.spent = time.time() - started
        progress = run.spent / (60 * args.minutes)
        if progress >= 1:
            break
        given = ids.to(args.device), weights.to(args.device)
        # At the end gradients are taken where the bundled model will be, and move the unrounded weights.
        rounded = progress >= args.quantized_from
        run.learn(lambda given=given: objective(model, *given, teacher), schedule(progress, args.decay_from), rounded)
        run.tokens += ids.shape[0] * (ids.shape[1] - 1)
        run.report()
        if time.time() - saved > 600:
            run.save()
            saved = time.time()
    run.spent = time.time() - started
    run.save()
    model = model.to("cpu")
    print(f"{run.tokens:,} tokens in {run.spent / 60:.1f} minutes")
    uncompiled = Phi3ForCausalLM._from_config(make_config(), attn_implementation="sdpa").eval()
    uncompiled.load_state_dict(model.state_dict())
    print(f"bits per character on the held-out stories: {bits_per_character(uncompiled, sp, held_out):.4f}")
    uncompiled.to(torch.bfloat16).save_pretrained(args.out / "checkpoint")


if __name__ == "__main__":
    main()
