"""What prompt lookup saves: tokens a step, and tokens a second with it and without, on prompts that repeat and do not.

    python -m bench lookup [--model NAME] [--text FILE ...] [--runs N]

The model is real. The bundled one is asked to repeat and to edit stories that it wrote itself before; others are asked
to correct, to quote and to change passages and code of the text that comes with this package, or passages of your own
files (paragraphs of 500 to 800 characters, four from all over each). A small model quotes only if it is shown how: the
quotes are the second turn of a conversation whose first has the answer, the true one, about another passage.
Answers are greedy there.
The last kind of prompt asks for something new, drawn at temperature 1, because small models that are greedy repeat
themselves: it shows what lookup costs where there is nothing to find. Both ways must give the same tokens; on a CPU the
run fails if they do not, and on a GPU, where a step of several tokens rounds differently from one of a single token,
the share that is alike is in the result. mlx-lm answers the same prompts from the same weights in its plain way; its
seconds are put to as many tokens as ours has. The result is `lookup`, for other models `lookup-NAME`, with texts
`lookup-NAME-books`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import mlx.core as mx

from phi3_mlx import Generation, Sampling, Statistics, encode_prompt, generate, load, resolve
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.engine.lookup import MAX_DRAFT
from phi3_mlx.generation.answers import Prompt

from . import record
from .contenders import alike

# The published figures are those of these stories.
SUBJECTS = ("a rabbit who finds a key", "a girl named Mia who loses a hat", "an owl and a boat", "a dog and a bear")
_QUOTED = 3  # sentences
NEW = "something new"


def prompts_of_stories(stories: list[str]) -> dict[str, list[Prompt]]:
    """Kind of prompt -> prompts. Passages are the first sentences of the stories."""
    passages = [". ".join(story.replace("\n", " ").split(". ")[:5]) + "." for story in stories]
    return {
        "repeat": [f"Repeat this text: {passage}" for passage in passages],
        "edit": [f"Replace {passage.split()[-2].strip('.,')} with kite: {passage}" for passage in passages],
    }


def prompts_of_text(text: str, name: str) -> dict[str, list[Prompt]]:
    """The same from a text with paragraphs, and of the function that it has, if it has one. `name`: of the text."""
    parts = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    passages = [part for part in parts if 500 < len(part) < 800 and len(_sentences(part)) >= _QUOTED]
    if len(passages) < 5:
        raise click.UsageError(f"{name} has fewer than 5 paragraphs of 500 to 800 characters; give a longer text")
    shown, *passages = passages[:: (len(passages) - 1) // 4][:5]
    kinds: dict[str, list[Prompt]] = {
        "edit": [f"Correct the spelling of this text and write it out again.\n\n{passage}" for passage in passages],
        "quote": [_quoting(shown, passage) for passage in passages],
    }
    for code in [part for part in parts if part.startswith("def ")][:1]:
        function = code[4 : code.index("(")]
        change = "Write the whole code.\n\n```python\n" + code + "\n```"
        kinds["code change"] = [
            f"Rename the function {function} to running_mean. {change}",
            f"Add a comment to the function {function}. {change}",
            f"Add type hints to the function {function}. {change}",
        ]
    return kinds


def _quoting(shown: str, passage: str) -> Prompt:
    """A conversation in which the first sentences of one passage were quoted, and those of another are asked for."""
    first, second = (f"{text}\n\nQuote the first three sentences, word for word." for text in (shown, passage))
    answer = " ".join(_sentences(shown)[:_QUOTED])
    contents = (("user", first), ("assistant", answer), ("user", second))
    return [{"role": role, "content": content} for role, content in contents]


def _sentences(passage: str) -> list[str]:
    return re.findall(r"\S.*?[.!?]['\")]*(?=\s|$)", passage, re.DOTALL)


class Answer(NamedTuple):
    """What a contender said, and the seconds from its first token to its last."""

    ids: list[int]
    seconds: float
    statistics: Statistics | None = None


def ours(model: Any, lookup: int, stop_ids: set[int], most: int, ids: list[int], sampling: Sampling) -> Answer:
    generation = Generation(model, [ids], max_tokens=most, sampling=sampling, stop_ids=stop_ids, lookup=lookup)
    said = [token.id for token in generation]
    return Answer(said, generation.statistics.decode_seconds, generation.statistics)


def theirs(model: Any, stop_ids: set[int], most: int, ids: list[int], sampling: Sampling) -> Answer:
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler

    said: list[int] = []
    started = 0.0
    for token, _ in generate_step(mx.array(ids), model, max_tokens=most, sampler=make_sampler(sampling.temperature)):
        started = started or time.perf_counter()
        said.append(int(token))
        if said[-1] in stop_ids:
            break
    return Answer(said, time.perf_counter() - started)


def measure(
    contenders: Mapping[str, Callable[[list[int], Sampling], Answer]],
    prompts: list[list[int]],
    sampling: Sampling,
    runs: int,
) -> dict[str, list[list[Answer]]]:
    """Contender -> its answers to the prompts, run by run, in turn; a first round warms up and is left out."""
    rounds: dict[str, list[list[Answer]]] = {name: [] for name in contenders}
    for n in range(runs + 1):
        for name, contender in contenders.items():
            answers = [contender(ids, sampling) for ids in prompts]
            if n:
                rounds[name].append(answers)
    return rounds


def summary(kind: str, rounds: dict[str, list[list[Answer]]]) -> dict[str, Any]:
    """A row of the result. ClickException if lookup changed an answer on a CPU."""
    said = [[answer.ids for answers in rounds[name] for answer in answers] for name in ("lookup", "plain")]
    same = alike(*said)
    if same < 1 and not record.on_gpu():
        raise click.ClickException(f"lookup changed an answer to a prompt of the kind: {kind}")
    tokens = sum(len(answer.ids) - 1 for answer in rounds["lookup"][0])

    def seconds(name: str) -> dict[str, float]:
        """Of as many tokens as ours."""
        said = [sum(len(answer.ids) - 1 for answer in answers) for answers in rounds[name]]
        totals = [sum(answer.seconds for answer in answers) for answers in rounds[name]]
        return record.spread([total / count * tokens for total, count in zip(totals, said, strict=True)])

    counts = [answer.statistics for answers in rounds["lookup"] for answer in answers if answer.statistics]
    drafted = sum(count.drafted_tokens for count in counts)
    plain, drafting = seconds("plain"), seconds("lookup")
    row: dict[str, Any] = {
        "prompts": kind,
        "tokens": tokens,
        "tokens_per_step": sum(count.decoded_tokens for count in counts) / sum(count.decode_steps for count in counts),
        "accepted": sum(count.accepted_tokens for count in counts) / drafted if drafted else None,
        "plain_seconds": plain,
        "lookup_seconds": drafting,
        "mlx_lm_seconds": seconds("mlx-lm"),
        "peak_memory": {
            name: max(answer.statistics.peak_memory for run in rounds[name] for answer in run if answer.statistics)
            for name in ("plain", "lookup")
        },
        "ratio": plain["median"] / drafting["median"],
        "alike": same,
    }
    held = f"{row['accepted']:.0%} of drafts held" if drafted else "nothing drafted"
    click.echo(
        f"{kind:13} {tokens:5} tokens, {row['tokens_per_step']:5.2f} a step, {held}; plain {plain['median']:.2f} s, "
        f"lookup {drafting['median']:.2f} s, {row['ratio']:.2f}x; mlx-lm {row['mlx_lm_seconds']['median']:.2f} s"
    )
    return row


@click.command(help=__doc__)
@click.option("--model", "name", default="tiny", show_default=True)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Passages come from it, and nothing else is asked (UTF-8; repeatable); not for the bundled model.",
)
@click.option("--runs", default=3, show_default=True)
@click.option("--max-tokens", default=200, show_default=True)
@click.option("--prompts", "most", type=click.IntRange(min=1), help="Of each kind at most.")
def main(name: str, texts: Sequence[Path], runs: int, max_tokens: int, most: int | None) -> None:
    from mlx_lm.utils import load_model as load_mlx_lm

    if texts and name == "tiny":
        raise click.UsageError("the bundled model knows its own stories only; give --model with --text")
    model, tokenizer = load(name)
    directory = resolve(name)
    kinds: dict[str, list[Prompt]] = {}
    if name == "tiny":
        asked = [f"Write a story about {subject}." for subject in SUBJECTS]
        kinds = prompts_of_stories([generate(model, tokenizer, prompt, max_tokens=300) for prompt in asked])
    elif not texts:
        kinds = prompts_of_text(bundled("sample"), "the sample")
    for text in texts:
        for kind, prompts in prompts_of_text(text.read_text(encoding="utf-8"), str(text)).items():
            kinds[kind] = [*kinds.get(kind, []), *prompts]
    if not texts:
        kinds[NEW] = [f"Tell me a story about {subject}." for subject in SUBJECTS]
    other, stop_ids = load_mlx_lm(directory)[0], set(tokenizer.stop_ids)
    contenders = {
        "plain": partial(ours, model, 0, stop_ids, max_tokens),
        "lookup": partial(ours, model, MAX_DRAFT, stop_ids, max_tokens),
        "mlx-lm": partial(theirs, other, stop_ids, max_tokens),
    }
    rows: list[dict[str, Any]] = []
    for kind, prompts in kinds.items():
        sampling = Sampling(temperature=1.0, seed=1) if kind == NEW else Sampling()
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts[:most]]
        rows.append(summary(kind, measure(contenders, encoded, sampling, runs)))
    parts = ["lookup"] + ([] if name == "tiny" else [directory.name]) + (["books"] if texts else [])
    facts = {"model": directory.name, "texts": [text.stem for text in texts], "max_tokens": max_tokens}
    record.write("-".join(parts), rows, "mlx", "mlx-lm", **facts)


if __name__ == "__main__":
    main()
