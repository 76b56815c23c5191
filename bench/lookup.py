"""What prompt lookup saves: tokens a step, and tokens a second with it and without, on prompts that repeat and do not.

    python -m bench lookup [--model NAME] [--text FILE] [--runs N]

The model is real. The bundled one is asked to repeat and to edit stories that it wrote itself before; others are asked
to correct, to quote and to change passages and code of the text that comes with this package, or passages of a file of
your own (paragraphs of 500 to 800 characters, four from all over it). Answers are greedy there.
The last kind of prompt asks for something new, drawn at temperature 1, because small models that are greedy repeat
themselves: it shows what lookup costs where there is nothing to find. Both ways must give the same tokens; the run
fails if they do not. The result is `lookup`, for other models `lookup-NAME`, with a text `lookup-NAME-TEXT`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi3_mlx import generate, load
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.engine import Generation, Statistics
from phi3_mlx.generation import encode_prompt
from phi3_mlx.hub import resolve
from phi3_mlx.lookup import MAX_DRAFT
from phi3_mlx.sampling import Sampling

from . import record

SUBJECTS = ("a rabbit who finds a key", "a girl named Mia who loses a hat", "an owl and a boat", "a dog and a bear")


NEW = "something new"


def prompts_of_stories(stories: list[str]) -> dict[str, list[str]]:
    """Kind of prompt -> prompts. Passages are the first sentences of the stories."""
    passages = [". ".join(story.replace("\n", " ").split(". ")[:5]) + "." for story in stories]
    return {
        "repeat": [f"Repeat this text: {passage}" for passage in passages],
        "edit": [f"Replace {passage.split()[-2].strip('.,')} with kite: {passage}" for passage in passages],
    }


def prompts_of_text(text: str) -> dict[str, list[str]]:
    """The same from a text with paragraphs, and of the function that it has, if it has one."""
    passages = [part for part in text.split("\n\n") if 500 < len(part) < 800]
    if len(passages) < 4:
        raise click.UsageError("--text has fewer than 4 paragraphs of 500 to 800 characters; give a longer text")
    passages = passages[:: len(passages) // 4][:4]
    kinds = {
        "edit": [f"Correct the spelling of this text and write it out again.\n\n{passage}" for passage in passages],
        "quote": [f"{passage}\n\nQuote the first three sentences, word for word." for passage in passages],
    }
    for code in [part for part in text.split("\n\n") if part.startswith("def ")][:1]:
        name = code[4 : code.index("(")]
        change = "Write the whole code.\n\n```python\n" + code + "\n```"
        kinds["code change"] = [
            f"Rename the function {name} to running_mean. {change}",
            f"Add a comment to the function {name}. {change}",
            f"Add type hints to the function {name}. {change}",
        ]
    return kinds


@click.command(help=__doc__)
@click.option("--model", "name", default="tiny", show_default=True)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Passages come from it, and nothing else is asked (UTF-8); not for the bundled model.",
)
@click.option("--runs", default=3, show_default=True)
@click.option("--max-tokens", default=200, show_default=True)
def main(name: str, text: Path | None, runs: int, max_tokens: int) -> None:
    if text is not None and name == "tiny":
        raise click.UsageError("the bundled model knows its own stories only; give --model with --text")
    model, tokenizer = load(name)
    if name == "tiny":
        asked = [f"Write a story about {subject}." for subject in SUBJECTS]
        kinds = prompts_of_stories([generate(model, tokenizer, prompt, max_tokens=300) for prompt in asked])
    else:
        kinds = prompts_of_text(bundled("sample") if text is None else text.read_text(encoding="utf-8"))
    if text is None:
        kinds[NEW] = [f"Tell me a story about {subject}." for subject in SUBJECTS]

    def run(ids: list[int], lookup: int, sampling: Sampling) -> tuple[list[int], Statistics]:
        generation = Generation(
            model, [ids], max_tokens=max_tokens, sampling=sampling, stop_ids=tokenizer.stop_ids, lookup=lookup
        )
        return [token.id for token in generation], generation.statistics

    rows: list[dict[str, Any]] = []
    for kind, texts in kinds.items():
        sampling = Sampling(temperature=1.0, seed=1) if kind == NEW else Sampling()
        seconds: dict[int, list[float]] = {0: [], MAX_DRAFT: []}
        totals: list[Statistics] = []
        encoded = [encode_prompt(tokenizer, text) for text in texts]
        for n in range(runs + 1):
            answers: dict[int, list[list[int]]] = {}
            for lookup in seconds:
                seen = [run(ids, lookup, sampling) for ids in encoded]
                answers[lookup] = [ids for ids, _ in seen]
                if n:  # the first warms up
                    seconds[lookup].append(sum(s.decode_seconds for _, s in seen))
                    totals += [s for _, s in seen if lookup]
            if answers[0] != answers[MAX_DRAFT]:
                raise click.ClickException(f"lookup changed an answer to a prompt of the kind: {kind}")
        steps, tokens = sum(s.decode_steps for s in totals), sum(s.decoded_tokens for s in totals)
        drafted, accepted = sum(s.drafted_tokens for s in totals), sum(s.accepted_tokens for s in totals)
        plain, drafting = record.spread(seconds[0]), record.spread(seconds[MAX_DRAFT])
        ratio = plain["median"] / drafting["median"]
        row = {
            "prompts": kind,
            "tokens": tokens // runs,
            "tokens_per_step": tokens / steps,
            "accepted": accepted / drafted if drafted else None,
            "plain_seconds": plain,
            "lookup_seconds": drafting,
            "ratio": ratio,
        }
        rows.append(row)
        held = f"{accepted / drafted:.0%} of drafts held" if drafted else "nothing drafted"
        click.echo(
            f"{kind:13} {tokens // runs:5} tokens, {tokens / steps:5.2f} a step, {held}; {plain['median']:.2f} -> "
            f"{drafting['median']:.2f} s, {ratio:.2f}x"
        )
    directory = resolve(name)
    parts = ["lookup"] + ([] if name == "tiny" else [directory.name]) + ([text.stem] if text else [])
    record.write("-".join(parts), rows, "mlx", model=directory.name, text=text and text.stem, max_tokens=max_tokens)


if __name__ == "__main__":
    main()
