"""What a trained model is asked: bits per character of texts, answers against foils, and pairs of sentences."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from phi3_mlx.models.decoder import Model

from .plan import PRIMARY, Plan
from .texts import Texts, plain, read_lines
from .training import END, encode

_TOKENS = 2048  # that are read together
_FOILS = 3
MEASURES = {
    PRIMARY: "bits per character",
    "fairy tales": "bits per character",
    "TinyStories": "bits per character",
    "answers": "share right, by chance 25 %",
    "BLiMP": "share right, by chance 50 %",
}


def nats(model: Model, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """-log p of every token of each sequence but its first, float64 (n - 1,)."""
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    losses: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    while order:
        longest = len(sequences[order[-1]])
        members = [order.pop() for _ in range(min(len(order), max(1, _TOKENS // longest)))]
        ids = np.full((len(members), longest), END, np.int32)
        for row, i in enumerate(members):
            ids[row, : len(sequences[i])] = sequences[i]
        table = mx.array(ids)
        # What pads a row stands behind all that counts, and nothing looks ahead.
        found = np.array(nn.losses.cross_entropy(model(table[:, :-1]), table[:, 1:]), np.float64)
        for row, i in enumerate(members):
            losses[i] = found[row, : len(sequences[i]) - 1]
    return losses


def bits(model: Model, tokenizer: Any, texts: Sequence[str], row: int) -> list[tuple[float, int]]:
    """(bits, characters) of each text, read in windows of `row` tokens; its end is not counted."""
    windows, owners = [], []
    for n, ids in enumerate(encode(tokenizer, texts)):
        whole = np.concatenate([[END], ids]).astype(np.int32)
        for start in range(0, len(whole) - 1, row):
            windows.append(whole[start : start + row + 1])
            owners.append(n)
    totals = np.zeros(len(texts))
    np.add.at(totals, owners, [losses.sum() / math.log(2) for losses in nats(model, windows)])
    return [(float(total), len(text)) for total, text in zip(totals, texts, strict=True)]


def answers(model: Model, tokenizer: Any, asked: Sequence[Sequence[str]]) -> list[bool]:
    """Whether the right answer gains most by what stands before it; `asked` as `questions` makes them."""
    sequences, begins = [], []
    for before, *candidates in asked:
        (prompt,) = encode(tokenizer, [before])
        for ids in encode(tokenizer, [f" {candidate}" for candidate in candidates]):
            for front in (prompt, prompt[:0]):
                sequences.append(np.concatenate([[END], front, ids]).astype(np.int32))
                begins.append(len(front))
    told = [losses[begin:].sum() for losses, begin in zip(nats(model, sequences), begins, strict=True)]
    gains = np.array(told).reshape(len(asked), -1, 2)
    # Less surprise behind the passage is a gain. A tie is no answer.
    gained = gains[:, :, 1] - gains[:, :, 0]
    return (gained[:, 0] > gained[:, 1:].max(axis=1)).tolist()


def questions(texts: Texts, tokenizer: Any, plan: Plan) -> list[list[str]]:
    """[passage and question, the right answer, foils...] of each question; foils answer others about the same tale."""
    by_tale: dict[str, list[str]] = {}
    for record in texts.questions:
        by_tale.setdefault(record["story"], []).append(record["answer"])
    rng, asked = random.Random(0), []
    for record in texts.questions:
        others = sorted({answer for answer in by_tale[record["story"]] if answer.lower() != record["answer"].lower()})
        if len(others) < _FOILS:
            continue
        candidates = [record["answer"], *rng.sample(others, _FOILS)]
        before = f"{record['context']} {record['question']}"
        longest = max(len(ids) for ids in encode(tokenizer, [f" {candidate}" for candidate in candidates]))
        if len(encode(tokenizer, [before])[0]) + longest < plan.row:
            asked.append([before, *candidates])
    rng.shuffle(asked)
    return asked[: plan.questions]


def sentence_pairs(path: Path, each: int) -> list[tuple[str, str]]:
    """(good, bad) sentences: the first `each` of every paradigm of BLiMP."""
    seen: dict[str, int] = {}
    pairs = []
    for record in read_lines(path):
        seen[record["UID"]] = seen.get(record["UID"], 0) + 1
        if seen[record["UID"]] <= each:
            pairs.append((plain(record["sentence_good"]), plain(record["sentence_bad"])))
    return pairs


def likelier(model: Model, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the good sentence of each pair is the likelier one."""
    texts = [sentence for pair in pairs for sentence in pair]
    sequences = [np.concatenate([[END], ids]).astype(np.int32) for ids in encode(tokenizer, texts)]
    told = np.array([losses.sum() for losses in nats(model, sequences)]).reshape(-1, 2)
    return (told[:, 0] < told[:, 1]).tolist()


def read(model: Model, tokenizer: Any, texts: Texts, plan: Plan) -> dict[str, list[tuple[float, int]]]:
    """(bits, characters) of each text of the three measures in bits per character."""
    held = {PRIMARY: texts.books, "fairy tales": texts.tales, "TinyStories": texts.stories}
    return {name: bits(model, tokenizer, passages, plan.row) for name, passages in held.items()}


def choose(
    model: Model, tokenizer: Any, texts: Texts, blimp: Path | None, plan: Plan
) -> dict[str, list[tuple[float, int]]]:
    """(1 or 0, 1) of each question and pair of sentences, for a right choice or a wrong one."""
    right = {"answers": answers(model, tokenizer, questions(texts, tokenizer, plan))}
    if blimp is not None:
        right["BLiMP"] = likelier(model, tokenizer, sentence_pairs(blimp, plan.pairs))
    return {name: [(float(each), 1) for each in choices] for name, choices in right.items()}
