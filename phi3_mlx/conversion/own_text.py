"""A calibration text that the model to be packed writes itself, from its chat template or from its first token.

At temperature 1 a model says what it thinks likely, which is what a packed one is to keep. A model that chats writes
both sides: its template begins the user's turn, the model asks, and then it answers. The text is there before anything
is packed, and then the model is gone.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..config import read_json
from ..engine.generation import Generation
from ..engine.jobs import Job
from ..engine.sampling import Sampling
from ..engine.scheduler import Scheduler
from ..errors import ChatError, PromptError
from ..files import json_text
from ..models import build
from ..models.decoder import Model
from ..store.atomic import replace_file
from ..store.checkpoint import target_dtype
from ..text.chat import chat_text, render_chat, template_source
from ..text.messages import unused
from ..text.tokenizer import Tokenizer
from .sources import Source, source_digest
from .unfinished import OWN_TEXT_FILE, other_run

OWN_TOKENS = 24_576
OWN_LENGTH = 512  # tokens of one of its texts at most
TEMPERATURE = 1.0
_QUESTION = 128  # tokens of a user's turn at most
_TOGETHER = 32  # texts that are written at once
_TICK = 64  # tokens between two calls of `progress`


@dataclass(frozen=True)
class Beginning:
    """What all texts begin with: token ids, and whether they begin a user's turn."""

    ids: list[int]
    chat: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Beginning:
        """The chat template up to where the user's words stand, else BOS or, without one, EOS.

        PromptError for a model that has none of them.
        """
        bos = tokenizer.bos_token_id
        try:
            mark = unused(template_source(tokenizer))
            messages = [{"role": "user", "content": mark}]
            head, content, _ = chat_text(tokenizer, messages).partition(mark)
            ids = tokenizer.encode(head, special=True)
            if bos is not None and render_chat(tokenizer, messages)[0] == bos != next(iter(ids), None):
                ids.insert(0, bos)
            if content and ids:
                return cls(ids, chat=True)
        except ChatError:
            pass
        first = tokenizer.eos_token_id if bos is None else bos
        if first is None:
            raise PromptError("the model has no chat template and no token that begins a text; give calibration=FILE")
        return cls([first], chat=False)


def write_own_text(
    source: Source,
    tokenizer: Tokenizer,
    seed: int,
    folder: Path | None,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """`OWN_TOKENS` ids that the model of `source` writes; the same seed gives the same ones.

    `folder` keeps them for a run that goes on. OptionError for those of another run, unless `force`. `progress` counts
    tokens.
    """
    if folder is None:
        return _written(source, tokenizer, seed, force, progress)
    path = folder / OWN_TEXT_FILE
    key = source_digest(source, [__version__, OWN_TOKENS, OWN_LENGTH, TEMPERATURE, seed])
    if path.exists():
        kept = read_json(path)
        if kept.get("key") == key:
            return list(kept["ids"])
        if not force:
            raise other_run(folder)
    ids = _written(source, tokenizer, seed, force, progress)
    replace_file(path, json_text({"key": key, "ids": ids}).encode())
    return ids


def about_own_text(tokenizer: Tokenizer, seed: int, shared: float | None) -> dict[str, Any]:
    """What can be said of such a text later. `shared`: of the evaluation's text, as `shared_runs` counts."""
    return {
        "made_by": "the source itself",
        "from": "its chat template" if Beginning.of(tokenizer).chat else "its first token",
        "tokens": OWN_TOKENS,
        "temperature": TEMPERATURE,
        "seed": seed,
        "in_evaluation_text": shared,
        "phi3_mlx": __version__,
    }


def own_text_markdown(facts: Mapping[str, Any]) -> str:
    """A section for REPORT.md."""
    shared = facts["in_evaluation_text"]
    beside = "" if shared is None else f" {shared:.1%} of the runs of eight words in this report's text occur in it."
    return (
        "## The text that bits and weights were fitted to\n\n"
        f"{facts['tokens']:,} tokens that the source wrote itself, each text from {facts['from']} on, at temperature "
        f"{facts['temperature']:g} with seed {facts['seed']}.{beside}\n"
    )


def _written(
    source: Source, tokenizer: Tokenizer, seed: int, force: bool, progress: Callable[[int, int], None] | None
) -> list[int]:
    writer = _Writer(_model_of(source), tokenizer, seed, force, progress)
    while len(writer.ids) < OWN_TOKENS:
        writer.go_on()
    ids = writer.ids[:OWN_TOKENS]
    del writer
    gc.collect()
    mx.clear_cache()
    return ids


def _model_of(source: Source) -> Model:
    """The source's model in floats, in the dtype that this machine computes in."""
    model, dtype = build(source.config), target_dtype(None)
    for name in source.tensors:
        weight = source.read(name)
        weight = weight if dtype is None else weight.astype(dtype)
        mx.eval(weight)
        model.load_weights([(name, weight)], strict=False)
    model.eval()
    return model


class _Writer:
    """Adds texts to `ids`, some at once. Each has a seed of its own, so what it says depends on no other."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        seed: int,
        force: bool,
        progress: Callable[[int, int], None] | None,
    ):
        self.ids: list[int] = []
        self._model, self._tokenizer, self._force, self._progress = model, tokenizer, force, progress
        self._begin = Beginning.of(tokenizer)
        self._seeds = ((seed << 32 | n) % 2**64 for n in count())
        self._texts = self._drawn = 0

    def go_on(self) -> None:
        """Write some texts at once: as many as are missing, if they are as long as those before."""
        length = len(self.ids) / self._texts if self._texts else OWN_LENGTH
        rows = min(_TOGETHER, math.ceil((OWN_TOKENS - len(self.ids)) / length))
        texts = [list(self._begin.ids) for _ in range(rows)]
        if self._begin.chat:
            self._go_on_with(texts, _QUESTION)
            texts = [self._asked(text) for text in texts]
        self._go_on_with(texts, OWN_LENGTH)
        for text in texts:
            self.ids += text
        self._texts += rows

    def _asked(self, text: list[int]) -> list[int]:
        """The prompt for an answer to the user's turn that `text` is; of an empty turn nothing can be asked."""
        stops = self._tokenizer.stop_ids
        question = self._tokenizer.decode([i for i in text[len(self._begin.ids) :] if i not in stops])
        return render_chat(self._tokenizer, [{"role": "user", "content": question}]) if question.strip() else text

    def _go_on_with(self, texts: Sequence[list[int]], length: int) -> None:
        """Let the model add to each text, up to `length` tokens in all."""
        longest = min(length, self._model.config.max_position_embeddings)
        going = [text for text in texts if len(text) < longest]
        stops = self._tokenizer.stop_ids
        jobs = [
            Job(text, longest - len(text), Sampling(temperature=TEMPERATURE, seed=next(self._seeds)), stops)
            for text in map(tuple, going)
        ]
        if not jobs:
            return
        for token in Generation.of_jobs(Scheduler(self._model, force=self._force), jobs):
            going[token.row].append(token.id)
            self._drawn += 1
            if self._progress is not None and self._drawn % _TICK == 0:
                self._progress(min(self._drawn, OWN_TOKENS), OWN_TOKENS)
