"""A small task to fine-tune on, made by program: how somebody in a story feels.

    python -m bench.feelings DIRECTORY                        writes train.jsonl, valid.jsonl and test.jsonl
    python -m bench.feelings DIRECTORY pairs                  the same as preferences: the word, and a long wrong answer
    python -m bench.feelings DIRECTORY -m MODEL [--adapter ADAPTER]   the share of test.jsonl answered right

    It was a sunny day. Mia lost her red hat in the park. How does Mia feel?    ->    sad

One of five words is right: guessing is right once in five, and a model that was not told to answer with one word is
right less often still. No story of the test is in the training data; answers must be the word and nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import click

NAMES = {"her": "Mia Lily Sue Anna Lucy Amy".split(), "his": "Tom Ben Sam Max Tim Jack".split()}
THINGS = "ball hat drum book car doll kite box key cake flower boat bike cup map ring".split()
COLORS = ["", "", "red ", "blue ", "big ", "little ", "new "]
PLACES = "park garden house forest school shop".split()
ANIMALS = "bear wolf lion snake tiger".split()
EVENTS = {
    "happy": ["found a {thing} in the {place}", "got a {thing} from mom", "won a {thing} at the {place}"],
    "sad": ["lost {own} {thing} in the {place}", "broke {own} {thing}", "had to say goodbye to {own} {thing}"],
    "scared": ["saw a {animal} in the {place}", "heard a {animal} at night", "ran away from a {animal}"],
    "angry": ["saw a boy take {own} {thing}", "saw a boy break {own} {thing}", "saw a girl hide {own} {thing}"],
    "tired": ["worked all day in the {place}", "ran all day with {own} {thing}", "did not sleep all night"],
}
BEFORE = ["", "", "It was a sunny day. ", "One day it was cold. ", "Once upon a time there was a {place}. "]
WRONG = ["{name} was a little child, and {name} felt very {wrong} about it.", "I think that {name} is {wrong}."]
SIZES = {"train": 600, "valid": 60, "test": 200}


def example(rng: random.Random) -> tuple[str, str]:
    """(question, answer)"""
    feeling, own = rng.choice(list(EVENTS)), rng.choice(list(NAMES))
    words = {
        "own": own,
        "thing": rng.choice(COLORS) + rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "animal": rng.choice(ANIMALS),
    }
    name = rng.choice(NAMES[own])
    story = f"{rng.choice(BEFORE)}{name} {rng.choice(EVENTS[feeling])}.".format(**words)
    return f"{story} How does {name} feel?", feeling


def make(sizes: Mapping[str, int] = SIZES, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Different examples for every split."""
    rng = random.Random(seed)
    seen: dict[str, str] = {}
    while len(seen) < sum(sizes.values()):
        question, answer = example(rng)
        seen[question] = answer
    pairs = iter(seen.items())
    return {split: [next(pairs) for _ in range(size)] for split, size in sizes.items()}


def write(directory: Path, sizes: Mapping[str, int] = SIZES, *, as_pairs: bool = False, asked: str = "{}") -> None:
    """A .jsonl file of every split; `as_pairs`: of two answers to a question that is `asked` so, but for the test's."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for split, examples in make(sizes).items():
        lines = [json.dumps({"prompt": question, "completion": answer}) for question, answer in examples]
        if as_pairs and split != "test":
            chosen = [pair(rng, question, answer) for question, answer in examples]
            lines = [json.dumps({**line, "prompt": asked.format(line["prompt"])}) for line in chosen]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pair(rng: random.Random, question: str, answer: str) -> dict[str, str]:
    """The short true answer to a question, and a long wrong one."""
    name = question.removesuffix(" feel?").rpartition(" ")[2]
    wrong = rng.choice([feeling for feeling in EVENTS if feeling != answer])
    return {"prompt": question, "chosen": answer, "rejected": rng.choice(WRONG).format(name=name, wrong=wrong)}


def write_questions(directory: Path) -> Path:
    """The test as questions with answers, for `phi3-mlx eval --tasks`; the file's path."""
    lines = [json.loads(line) for line in (directory / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [{"question": line["prompt"], "answer": line["completion"]} for line in lines]
    path = directory / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    return path


def accuracy(directory: Path, model: str, adapter: str | None = None) -> float:
    """The share of test.jsonl whose answer is the right word and nothing else, decoded greedily."""
    from phi3_mlx import batch_generate, load

    if not (directory / "test.jsonl").is_file():
        raise click.ClickException(f"{directory} has no test.jsonl; write it with python -m bench.feelings {directory}")
    lines = [json.loads(line) for line in (directory / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    loaded, tokenizer = load(model, adapter=adapter)
    right = 0
    for first in range(0, len(lines), 20):
        some = lines[first : first + 20]
        answers = batch_generate(loaded, tokenizer, [line["prompt"] for line in some], max_tokens=4)
        right += sum(answer.strip() == line["completion"] for answer, line in zip(answers, some, strict=True))
    return right / len(lines)


@click.command(help=__doc__)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("kind", type=click.Choice(["examples", "pairs"]), default="examples")
@click.option("-m", "--model", help="Ask this model the test's questions instead.")
@click.option("--adapter", help="With this adapter.")
def main(directory: Path, kind: str, model: str | None, adapter: str | None) -> None:
    if model is not None:
        click.echo(f"{accuracy(directory, model, adapter):.1%} right")
        return
    write(directory, as_pairs=kind == "pairs")
    click.echo(f"{', '.join(f'{size} in {split}.jsonl' for split, size in SIZES.items())} in {directory}")


if __name__ == "__main__":
    main()
