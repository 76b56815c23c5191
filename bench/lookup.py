"""What prompt lookup saves: tokens a step, and tokens a second with it and without, on prompts that repeat and do not.

    python -m bench.lookup [--model NAME] [--runs N]

The model is real: with the bundled one, it is asked to repeat and to edit stories that it wrote itself before, and to
write a new one. Greedy, so both ways must give the same tokens; the run fails if they do not.
"""

from __future__ import annotations

from typing import Any

import click

from phi3_mlx import generate, load
from phi3_mlx.engine import Generation, Statistics
from phi3_mlx.generation import encode_prompt
from phi3_mlx.lookup import MAX_DRAFT
from phi3_mlx.sampling import Sampling

from . import record

SUBJECTS = ("a rabbit who finds a key", "a girl named Mia who loses a hat", "an owl and a boat", "a dog and a bear")


def prompts(stories: list[str]) -> dict[str, list[str]]:
    """Kind of prompt -> prompts. Passages are the first sentences of the stories."""
    passages = [". ".join(story.replace("\n", " ").split(". ")[:5]) + "." for story in stories]
    return {
        "repeat": [f"Repeat this text: {passage}" for passage in passages],
        "edit": [f"Replace {passage.split()[-2].strip('.,')} with kite: {passage}" for passage in passages],
        "new story": [f"Tell me a story about {subject}." for subject in SUBJECTS],
    }


@click.command(help=__doc__)
@click.option("--model", "name", default="tiny", show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--max-tokens", default=200, show_default=True)
def main(name: str, runs: int, max_tokens: int) -> None:
    model, tokenizer = load(name)
    stories = [generate(model, tokenizer, f"Write a story about {subject}.", max_tokens=300) for subject in SUBJECTS]

    def run(ids: list[int], lookup: int) -> tuple[list[int], Statistics]:
        generation = Generation(
            model, [ids], max_tokens=max_tokens, sampling=Sampling(), stop_ids=tokenizer.stop_ids, lookup=lookup
        )
        return [token.id for token in generation], generation.statistics

    rows: list[dict[str, Any]] = []
    for kind, texts in prompts(stories).items():
        speeds: dict[int, list[float]] = {0: [], MAX_DRAFT: []}
        steps = tokens = drafted = accepted = 0
        encoded = [encode_prompt(tokenizer, text) for text in texts]
        for n in range(runs + 1):
            answers: dict[int, list[list[int]]] = {}
            for lookup in speeds:
                seen = [run(ids, lookup) for ids in encoded]
                answers[lookup] = [ids for ids, _ in seen]
                statistics = [s for _, s in seen]
                if n:  # the first warms up
                    seconds = sum(s.decode_seconds for s in statistics)
                    speeds[lookup].append(sum(s.decoded_tokens for s in statistics) / seconds)
                    if lookup:
                        steps += sum(s.decode_steps for s in statistics)
                        tokens += sum(s.decoded_tokens for s in statistics)
                        drafted += sum(s.drafted_tokens for s in statistics)
                        accepted += sum(s.accepted_tokens for s in statistics)
            if answers[0] != answers[MAX_DRAFT]:
                raise click.ClickException(f"lookup changed an answer to a {kind} prompt")
        plain, drafting = record.spread(speeds[0]), record.spread(speeds[MAX_DRAFT])
        row = {
            "prompts": kind,
            "tokens_per_step": tokens / steps,
            "accepted": accepted / drafted if drafted else None,
            "plain": plain,
            "lookup": drafting,
            "ratio": drafting["median"] / plain["median"],
        }
        rows.append(row)
        held = f"{accepted / drafted:.0%} of drafts held" if drafted else "nothing drafted"
        click.echo(
            f"{kind:10} {tokens / steps:5.2f} tokens a step, {held}; {plain['median']:.0f} -> {drafting['median']:.0f} "
            f"tok/s, {row['ratio']:.2f}x"
        )
    record.write(record.RESULTS / "lookup.json", rows, "mlx", model=name)


if __name__ == "__main__":
    main()
