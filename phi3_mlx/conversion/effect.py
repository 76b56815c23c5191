"""How much of an adapter is left in a model that it was merged into and that was packed again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..adapters.folder import Adapters, Base
from ..errors import OptionError
from ..models.decoder import Model
from ..models.normalizer import log_normalizer
from ..store.checkpoint import Checkpoint, read_model

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

EFFECT_TOKENS = 512  # of text that are read, at most
EFFECT_LOGITS = 6.6  # copies of the text's logits, float32, that are alive at once, as measured


class Effect:
    """How an adapter changes the log-probabilities of a text, to compare the merged model with.

    Those with the adapter are kept in memory until then.
    """

    def __init__(self, checkpoint: Checkpoint, base: Base, folder: Path, text: str | None):
        from ..text.tokenizer import read_tokenizer

        self._ids = _ids(read_tokenizer(checkpoint.directory), text, checkpoint.config.max_position_embeddings)
        model = read_model(checkpoint)
        adapters = Adapters(model, base)
        before = _log_probabilities(model, self._ids)
        adapters.load("adapter", folder)
        adapters.use("adapter")
        self._adapted = _log_probabilities(model, self._ids)
        self._moved = _distance(self._adapted, before)

    def survived(self, merged: Model) -> float:
        """1 - |merged - adapted|^2 / |adapted - base|^2 over all log-probabilities."""
        lost = _distance(_log_probabilities(merged, self._ids), self._adapted)
        return 1.0 if self._moved == 0 else 1 - lost / self._moved


def _distance(a: mx.array, b: mx.array) -> float:
    return float(mx.sum(mx.square(a - b)))


def _log_probabilities(model: Model, ids: mx.array) -> mx.array:
    """(L, vocab_size) float32."""
    logits = model(ids)[0].astype(mx.float32)
    result = logits - log_normalizer(logits)[:, None]
    mx.eval(result)
    return result


def _ids(tokenizer: Tokenizer, text: str | None, context: int) -> mx.array:
    from . import texts

    ids = tokenizer.encode(texts.bundled("sample") if text is None else text)[: min(EFFECT_TOKENS, context)]
    if not ids:
        raise OptionError("the text to measure with is empty; give some, or leave it out")
    return mx.array(ids)[None]
