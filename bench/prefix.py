"""What a store of prefixes spares: tokens of prompts that are read, against the least that they can be.

    python -m bench prefix [--tokens N] [--questions N] [--plain N] [--turns N]

Questions about one text, in a shuffled order: half of them in one process and half in a second one, which starts with
the folder that the first has left. The model has random weights, two layers with 4 heads of Phi-3-mini's size, and the
bundled model's tokenizer. The least that can be read is the text once, and what is new of each question. Then four
conversations of the bundled model take turns under one system message, with one store; their least is what they read
with a cache for each. The first `--plain` questions, and all turns, are answered without a store too, and the run
fails if an answer differs, or if a turn reads more than it does with a cache of its own. Seconds are those until the
first token.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from phi3_mlx import Chunk, Conversation, PrefixStore, encode_prompt, load, load_tokenizer, stream_generate
from phi3_mlx.engine.prefill import common_length

from . import record
from .models import make_model, text_of

ANSWER = 8  # tokens
ASKED = ("Who is it about?", "Where does it begin?", "What is said first?", "How does it end?")
SUBJECTS = ("a duck", "a frog", "an owl and a boat", "a girl named Mia", "a dog and a bear")
CONVERSATIONS, BUDGET = 4, "8GB"
SYSTEM = "You read with care, you answer in one short sentence, and you say so where the text does not say it."


def questions_of(number: int) -> list[str]:
    return [f" {ASKED[i % len(ASKED)]} Name {i + 1} words of it." for i in range(number)]


def answered(chunks: Iterable[Chunk]) -> dict[str, Any]:
    """An answer, the tokens of its prompt, those that were read, and the seconds to the first token."""
    started, first, said = time.perf_counter(), 0.0, ""
    for chunk in chunks:
        first = first or time.perf_counter() - started
        said += chunk.text
    return {"said": said, "prompt": chunk.prompt_tokens, "read": chunk.prefilled_tokens, "seconds": first}


def asked(name: str, text: str, questions: list[str], folder: str | None) -> list[dict[str, Any]]:
    """The answers to questions about a text, with the store of a folder or with none."""
    model, tokenizer = load(name)
    options: dict[str, Any] = {
        "max_tokens": ANSWER,
        "prefixes": PrefixStore(BUDGET, directory=folder) if folder else None,
    }
    return [answered(stream_generate(model, tokenizer, text + question, **options)) for question in questions]


def in_a_process(name: str, text: str, questions: list[str], folder: str | None) -> list[dict[str, Any]]:
    code = "import json, sys; from bench.prefix import asked; print(json.dumps(asked(*json.load(sys.stdin))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([name, text, questions, folder]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def row_of(what: str, stored: list[dict[str, Any]], plain: list[dict[str, Any]], least: int) -> dict[str, Any]:
    """A row of the result. ClickException if an answer is another than without a store."""
    if any(one["said"] != other["said"] for one, other in zip(stored, plain, strict=False)):
        raise click.ClickException(f"{what}: an answer is another than without a store")
    read, prompts = (sum(answer[key] for answer in stored) for key in ("read", "prompt"))
    row = {
        "what": what,
        "prompts": len(stored),
        "prompt_tokens": prompts,
        "read_tokens": read,
        "least_tokens": least,
        "ratio": read / least,
        "seconds": record.spread([answer["seconds"] for answer in stored]),
        "seconds_without": record.spread([answer["seconds"] for answer in plain]),
    }
    click.echo(
        f"{what}: {prompts:,} tokens of prompts, {read:,} read, {row['ratio']:.3f} x {least:,}; first token after "
        f"{row['seconds']['median']:.3f} s, without a store {row['seconds_without']['median']:.3f} s"
    )
    return row


def least_of(prompts: list[list[int]]) -> int:
    """Tokens of prompts, each without what an earlier one begins with; the last of each begins an answer."""
    return sum(
        len(ids) - max((common_length(ids[:-1], earlier) for earlier in prompts[:i]), default=0)
        for i, ids in enumerate(prompts)
    )


def of_questions(name: str, tokens: int, number: int, compared: int) -> dict[str, Any]:
    """The row of questions about a text of so many tokens; `name` is the model's directory."""
    tokenizer = load_tokenizer(name)
    text, questions = text_of(tokenizer, tokens), questions_of(number)
    random.Random(0).shuffle(questions)
    halves = questions[: number // 2], questions[number // 2 :]
    with tempfile.TemporaryDirectory() as folder:
        stored = [answer for half in halves for answer in in_a_process(name, text, half, folder)]
    plain = in_a_process(name, text, questions[:compared], None)
    least = least_of([encode_prompt(tokenizer, text + question) for question in questions])
    return row_of(f"{number} questions about a text, in two processes", stored, plain, least)


def check_turns(stored: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    """Raise ClickException if a turn reads more with a store than with a cache of its conversation."""
    for number, (turn, alone) in enumerate(zip(stored, plain, strict=True), 1):
        if turn["read"] > alone["read"]:
            raise click.ClickException(
                f"turn {number} reads {turn['read']} tokens, and {alone['read']} without a store"
            )


def of_conversations(turns: int) -> dict[str, Any]:
    model, tokenizer = load("tiny")
    answers: list[list[dict[str, Any]]] = []
    for prefixes in (PrefixStore(BUDGET), None):
        chats = [Conversation(model, tokenizer, system=SYSTEM, prefixes=prefixes) for _ in range(CONVERSATIONS)]
        answers.append(
            [
                answered(chat.send(f"Tell me about {SUBJECTS[(turn + i) % len(SUBJECTS)]}.", max_tokens=3 * ANSWER))
                for turn in range(turns)
                for i, chat in enumerate(chats)
            ]
        )
    stored, plain = answers
    check_turns(stored, plain)
    least = sum(answer["read"] for answer in plain)  # each has a cache of its own, and reads what is new to it
    return row_of(f"{CONVERSATIONS} conversations that take turns", stored, plain, least)


@click.command(help=__doc__)
@click.option("--tokens", type=click.IntRange(min=64), default=4096, show_default=True, help="Of the text.")
@click.option("--questions", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--plain", "compared", type=click.IntRange(min=1), default=8, show_default=True, help="Without a store.")
@click.option("--turns", type=click.IntRange(min=1), default=4, show_default=True, help="Of each conversation.")
def main(tokens: int, questions: int, compared: int, turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        row = of_questions(str(Path(folder, "model")), tokens, questions, compared)
    record.write("prefix", [row, of_conversations(turns)], "mlx", tokens=tokens)


if __name__ == "__main__":
    main()
