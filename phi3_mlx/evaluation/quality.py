"""Compares two models on a text: perplexity, KL divergence, agreement of the likeliest token.

Memory does not grow with the text: windows are read one after another, and logits exist for a few positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .. import values
from ..engine import plan
from ..engine.plan import Workload
from ..errors import OptionError, PromptError
from ..option import arguments
from ..threads import turn
from .options import CompareOptions

if TYPE_CHECKING:
    from pathlib import Path

    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer

_TOKENS_AT_ONCE = 4096  # that are read in one pass
LOGITS_AT_ONCE = 1 << 24  # numbers, 64 MB in float32


@dataclass(frozen=True)
class Quality:
    """A model's loss on a text: `nats`, summed over the predicted `tokens`, which spell `characters`."""

    tokens: int
    characters: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Perplexity of a token; comparable between models with the same tokenizer only."""
        return math.exp(self.nats / self.tokens)

    @property
    def perplexity_per_character(self) -> float:
        """Perplexity of a character; comparable between any two models."""
        return math.exp(self.nats / self.characters)


@dataclass(frozen=True)
class Comparison:
    """Model A, usually the original, beside model B.

    `kl`: mean KL(A || B) of a position's next-token distributions, in nats. `top1`: share of positions where both
    find the same token likeliest. Both are None where the models do not spell the text with the same ids or have
    other vocabularies; `note` then says so.
    """

    a: Quality
    b: Quality
    kl: float | None
    top1: float | None
    note: str | None = None

    def _repr_markdown_(self) -> str:
        return comparison_markdown(self)


def compare(
    model_a: Model,
    tokenizer_a: Tokenizer,
    model_b: Model,
    tokenizer_b: Tokenizer,
    text: str,
    *,
    window: int = CompareOptions.window,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Read `text` with both models, in windows of `window` tokens, each with an empty context.

    Every token but the first is predicted once. `progress(done, total)` counts positions. What the memory at hand
    cannot hold is refused unless `force`. Raises PromptError for a text of fewer than two tokens, OptionError for a
    window longer than a model's context, MemoryLimitError.
    """
    from ..generation.loading import check_family, check_loaded, check_tokenizer

    options = CompareOptions(**arguments(CompareOptions, locals()))
    text, window = values.text(text, "text"), options.window
    values.check_function(progress, "progress")
    for model, tokenizer in ((model_a, tokenizer_a), (model_b, tokenizer_b)):
        check_loaded(model)
        check_family(model, "compare")
        check_tokenizer(tokenizer)
        check_window(window, model.config.max_position_embeddings)
    if not options.force:
        for model in (model_a, model_b):
            _check_work("comparing them", replace(Workload.of_model(model, window), weights=0))  # which are loaded
    ids_a, ids_b = tokenizer_a.encode(text), tokenizer_b.encode(text)
    sizes = model_a.config.vocab_size, model_b.config.vocab_size
    note = None
    if ids_a != ids_b or _bos(tokenizer_a) != _bos(tokenizer_b):
        note = "the tokenizers spell this text with different ids, so only perplexity per character compares them"
    elif sizes[0] != sizes[1]:
        note = f"the vocabularies have {sizes[0]:,} and {sizes[1]:,} entries, so only perplexities compare the models"
    if note is not None:
        a = _alone(model_a, tokenizer_a, text, ids_a, window)
        return Comparison(a, _alone(model_b, tokenizer_b, text, ids_b, window), None, None, note)
    total = _predicted(tokenizer_a, ids_a)
    difference = Difference()
    for block in blocks(ids_a, window, _bos(tokenizer_a)):
        inputs, targets = block[:, :-1], block[:, 1:].flatten()
        with turn():
            hidden_a, hidden_b = model_a.model(inputs), model_b.model(inputs)
            difference.add(hidden_a, model_a.logits, hidden_b, model_b.logits, targets, sizes[0])
            del hidden_a, hidden_b
        if progress is not None:
            progress(difference.tokens, total)
    return difference.result(_characters(tokenizer_a, text, ids_a))


def check_comparison(directory: Path, name: str, window: int, dtype: str | None = None) -> None:
    """MemoryLimitError unless the model `name` of `directory` can be loaded and read windows. Only headers are read."""
    _check_work(f"comparing {name}", Workload.of_directory(directory, window, dtype=dtype))


def _check_work(what: str, window: Workload) -> None:
    """MemoryLimitError unless a run whose `length` is a window fits, with several windows read together."""
    windows = replace(window, rows=max(1, _TOKENS_AT_ONCE // window.length))
    numbers = min(LOGITS_AT_ONCE, windows.rows * windows.length * windows.config.vocab_size)
    logits = 4 * 4 * numbers  # of two models, and copies
    parts = {"weights": windows.weights, "work": windows.workspace(windows.length) + logits}
    plan.check_room(what, parts, "take models of fewer bits")


# Hidden states of some tokens of a pass (n, hidden_size), and which these are -> logits (n, vocab_size).
OutputHead = Callable[[mx.array, Sequence[int]], mx.array]


class Difference:
    """Sums over positions; `result` makes a Comparison of them."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nats_a = self._nats_b = self._kl = 0.0
        self._same = 0

    def add(
        self,
        hidden_a: mx.array,
        head_a: OutputHead,
        hidden_b: mx.array,
        head_b: OutputHead,
        targets: mx.array,
        vocab_size: int,
    ) -> None:
        """Add the positions of `hidden_*` (B, L, hidden_size), whose next tokens are `targets` (B * L)."""
        hidden_a, hidden_b = hidden_a.flatten(0, -2), hidden_b.flatten(0, -2)
        for here in chunks(len(targets), vocab_size):
            places = range(len(targets))[here]
            log_a, log_b = log_softmax(head_a(hidden_a[here], places)), log_softmax(head_b(hidden_b[here], places))
            next_ids = np.array(targets[here])[:, None]
            self._nats_a -= _sum(np.take_along_axis(log_a, next_ids, axis=-1))
            self._nats_b -= _sum(np.take_along_axis(log_b, next_ids, axis=-1))
            self._same += int((log_a.argmax(axis=-1) == log_b.argmax(axis=-1)).sum())
            self._kl += _sum(kl_divergence(log_a, log_b))
        self.tokens += len(targets)

    def result(self, characters: int) -> Comparison:
        a, b = (Quality(self.tokens, characters, nats) for nats in (self._nats_a, self._nats_b))
        return Comparison(a, b, self._kl / self.tokens, self._same / self.tokens)


def log_softmax(logits: mx.array) -> np.ndarray:
    """log_softmax over the last axis in float32; numpy's exponential is many times faster than MLX's on the CPU."""
    logs = np.array(logits.astype(mx.float32))
    logs -= logs.max(axis=-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    return logs


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each position, from log-probabilities (positions, vocab_size)."""
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def divergence_from(log_p: np.ndarray, p: np.ndarray, logits: mx.array) -> np.ndarray:
    """KL(p || q) of each position from q's `logits` (positions, vocab_size) and one `p` = exp(log_p).

    It takes a fifth of `kl_divergence`'s time if many q are compared with one p.

    Let r = logits - log_p, so q = p exp(r) / Z with Z = sum p exp(r). Then KL(p || q) = log Z - E_p[r], and with
    d = r - E_p[r] this is log sum p exp(d) = log1p(sum p expm1(d)): no difference of large numbers where q is near p.
    """
    ratio = np.array(logits.astype(mx.float32))
    ratio -= log_p
    ratio -= (p * ratio).sum(axis=-1, keepdims=True)  # r - E_p[r]; see the docstring
    np.expm1(ratio, out=ratio)
    ratio *= p
    return np.log1p(ratio.sum(axis=-1))


def blocks(ids: Sequence[int], window: int, bos: int | None) -> Iterator[mx.array]:
    """Windows of a text as int32 (B, L + 1): inputs, and one more id to predict. The last one may be shorter.

    Every window begins with `bos`, or without it with the last id of the window before. Raises PromptError for a text
    with nothing to predict.
    """
    if bos is None:
        cut = [list(ids[first : first + window + 1]) for first in range(0, len(ids) - 1, window)]
    else:
        cut = [[bos, *ids[first : first + window]] for first in range(0, len(ids), window)]
    if not cut:
        raise PromptError(f"the text has {len(ids)} tokens, and the first has nothing to predict it; give a longer one")
    full = cut if len(cut[-1]) == len(cut[0]) else cut[:-1]
    rows = max(1, _TOKENS_AT_ONCE // window)
    for first in range(0, len(full), rows):
        yield mx.array(full[first : first + rows], dtype=mx.int32)
    if len(full) < len(cut):
        yield mx.array(cut[-1:], dtype=mx.int32)


def check_window(window: int, context: int) -> None:
    """OptionError unless windows of that many tokens can be read."""
    if not 1 <= window <= context:
        raise OptionError(f"window {window:,} is outside its range; give 1 to {context:,}, the model's context")


def chunks(count: int, vocab_size: int) -> Iterator[slice]:
    """Slices of `count` positions, each with at most `LOGITS_AT_ONCE` logits."""
    step = max(1, LOGITS_AT_ONCE // vocab_size)
    for first in range(0, count, step):
        yield slice(first, first + step)


def _sum(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))


def _alone(model: Model, tokenizer: Tokenizer, text: str, ids: Sequence[int], window: int) -> Quality:
    nats = 0.0
    for block in blocks(ids, window, _bos(tokenizer)):
        with turn():
            hidden, targets = model.model(block[:, :-1]).flatten(0, 1), block[:, 1:].flatten()
            for here in chunks(len(targets), model.config.vocab_size):
                logs = log_softmax(model.logits(hidden[here], range(len(targets))[here]))
                nats -= _sum(np.take_along_axis(logs, np.array(targets[here])[:, None], axis=-1))
    return Quality(_predicted(tokenizer, ids), _characters(tokenizer, text, ids), nats)


def _bos(tokenizer: Tokenizer) -> int | None:
    return tokenizer.bos_token_id if tokenizer.add_bos_token else None


def _predicted(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    return len(ids) - (_bos(tokenizer) is None)


def _characters(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """Characters of the predicted tokens."""
    return len(text) if _bos(tokenizer) is not None else max(1, len(text) - len(tokenizer.decode(ids[:1])))


def comparison_markdown(comparison: Comparison) -> str:
    """Both models' figures as a table."""
    lines = ["| measured | A | B |", "|---|--:|--:|"]
    if comparison.kl is not None:
        lines.append(f"| perplexity | {comparison.a.perplexity:.3f} | {comparison.b.perplexity:.3f} |")
    a, b = comparison.a.perplexity_per_character, comparison.b.perplexity_per_character
    lines.append(f"| perplexity per character | {a:.4f} | {b:.4f} |")
    lines.append(f"| tokens predicted | {comparison.a.tokens:,} | {comparison.b.tokens:,} |")
    if comparison.kl is not None and comparison.top1 is not None:
        lines.append(f"| mean KL(A ‖ B), nats a token | | {comparison.kl:.5f} |")
        lines.append(f"| same likeliest token | | {comparison.top1:.2%} |")
    return "\n".join(lines if comparison.note is None else [*lines, "", comparison.note])
