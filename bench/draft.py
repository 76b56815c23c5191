"""What a draft model saves, against how often its guesses hold: tokens a second with it and without.

    python -m bench draft [--layers N] [--width N] [--tokens N] [--runs N]

Both models are stand-ins with random weights in float32. The draft model is the first two layers of the model, with
its embedding, last norm and output layer. What the model's further layers add is scaled by a factor: at 0 the two
agree in every token, and the larger the factor, the less they do. So models of one size and speed show every
acceptance rate. Real pairs agree as their training has made them; this says what an acceptance rate is worth, not
which one Phi-3-mini has for Phi-3-medium. Tokens are drawn at temperature 1, without prompt lookup. On a CPU the run
fails if a token changes.
"""

from __future__ import annotations

from typing import Any

import click
import mlx.core as mx

from phi3_mlx import Generation, Sampling, Statistics
from phi3_mlx.models import build, parse_config
from phi3_mlx.models.decoder import Model

from . import record
from .contenders import alike
from .models import PHI_3_MINI

DRAFT_LAYERS = 2
FACTORS = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
_SHAPE = {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 8, "torch_dtype": "float32"}


def pair(layers: int, width: int, factor: float) -> tuple[Model, Model]:
    """A model, whose layers behind the first two count by `factor`, and the draft model that those two are."""
    mx.random.seed(0)
    shape = {**PHI_3_MINI, **_SHAPE, "hidden_size": width, "intermediate_size": 8 * width // 3}
    model, draft = (build(parse_config({**shape, "num_hidden_layers": n})) for n in (layers, DRAFT_LAYERS))
    model.lm_head.weight = model.lm_head.weight * 4  # or every token would be about as likely
    for layer in model.layers[DRAFT_LAYERS:]:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight = linear.weight * factor
    draft.model.embed_tokens, draft.model.norm, draft.lm_head = (
        model.model.embed_tokens,
        model.model.norm,
        model.lm_head,
    )
    draft.model.layers = model.layers[:DRAFT_LAYERS]
    mx.eval(model.parameters(), draft.parameters())
    return model, draft


def answer(model: Model, draft: Model | None, tokens: int) -> tuple[list[int], Statistics]:
    prompt = [3 + i * i % 8000 for i in range(64)]
    generation = Generation(model, [prompt], max_tokens=tokens, sampling=Sampling(1.0, seed=1), draft=draft)
    return [token.id for token in generation], generation.statistics


def measure(model: Model, draft: Model, tokens: int, runs: int) -> dict[str, Any]:
    """A row of the result. ClickException if the draft model changed a token on a CPU."""
    speeds: dict[str, list[float]] = {"plain": [], "draft": []}
    for run in range(runs + 1):  # the first warms up
        plain, alone = answer(model, None, tokens)
        drafted, both = answer(model, draft, tokens)
        same = alike([plain], [drafted])
        if same < 1 and not record.on_gpu():
            raise click.ClickException("the draft model changed a token")
        if run:
            speeds["plain"].append(alone.decode_tps)
            speeds["draft"].append(both.decode_tps)
    ratios = [drafting / plain for plain, drafting in zip(speeds["plain"], speeds["draft"], strict=True)]
    return {
        "accepted": both.accepted_tokens / both.drafted_tokens if both.drafted_tokens else None,
        "drafted": both.drafted_tokens,
        "tokens_per_step": both.decoded_tokens / both.decode_steps,
        "plain_tokens_per_second": record.spread(speeds["plain"]),
        "draft_tokens_per_second": record.spread(speeds["draft"]),
        "ratio": record.spread(ratios),
        "alike": same,
    }


@click.command(help=__doc__)
@click.option("--layers", default=24, show_default=True, help=f"Of the model; the draft model has {DRAFT_LAYERS}.")
@click.option("--width", default=768, show_default=True)
@click.option("--tokens", default=150, show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(layers: int, width: int, tokens: int, runs: int) -> None:
    rows = []
    for factor in FACTORS:
        row = {"factor": factor, **measure(*pair(layers, width, factor), tokens, runs)}
        held = "nothing drafted" if row["accepted"] is None else f"{row['accepted']:.0%} of {row['drafted']} held"
        click.echo(
            f"factor {factor:4}: {held}, {row['tokens_per_step']:.2f} tokens a step, {row['ratio']['median']:.2f}x"
        )
        rows.append(row)
    record.write("draft", rows, "mlx", layers=layers, draft_layers=DRAFT_LAYERS, width=width, tokens=tokens)


if __name__ == "__main__":
    main()
