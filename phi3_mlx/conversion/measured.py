"""How sensitivity rounds a tensor: as the method will that packs the model.

GPTQ loses far less than plain rounding, and not everywhere as much less, so bits that plain rounding's errors chose are
not the best for it. Its errors are small on the inputs that it was fitted to, and larger on any other: the text is cut
in two, and what one part was rounded for is measured on the other.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import PromptError
from ..models.layer import DecoderLayer
from .calibrating import hessian_of_embedding, lacking_tokens
from .gptq import dequantized_matrix, hessian_of, inverse_factor, refit, round_columns
from .layerwise import LayerStream
from .layout import Scheme
from .rounding import pack
from .targets import usual_damping

FITTED_TOKENS = 4096  # of the text that matrices are fitted to, however few are measured; and less of a short text
_FITTED_WINDOWS = 4  # of a short text for one that is measured
_SWEEPS = 1  # more gain little, and what they gain is alike everywhere
_SAMPLED = 128  # rows of a matrix at least, by whose errors widths are compared


class Nearest:
    """Each weight becomes the nearest value there is, whatever its matrix reads."""

    def measured(self, rows: mx.array, most: int) -> mx.array:
        """Of a text's windows (rows, length) those that are measured, `most` at most."""
        return rows[:most]

    def begin(self) -> None:
        """The embedding is next."""

    def matrix(self, layer: DecoderLayer, path: str) -> None:
        """The linear layer `path` of `layer` is next."""

    def past(self, layer: DecoderLayer) -> None:
        """What follows `layer` is next."""

    def head(self) -> None:
        """What makes logits is next."""

    def sample(self, weight: mx.array) -> mx.array:
        """The rows of a weight (outputs, inputs), or of each expert's, by whose errors widths are compared."""
        return weight

    def rounded(self, weight: mx.array, packing: Scheme, dtype: mx.Dtype) -> mx.array:
        """What stands for a weight (outputs, inputs), or each expert's, or for some of their rows; float32."""
        return dequantized_matrix(pack(weight.astype(dtype), packing), packing)


class Columns(Nearest):
    """GPTQ, fitted to those windows of the text that are not measured.

    In memory: these windows before a layer and behind it, and for each matrix of n inputs two matrices of n x n.
    """

    def __init__(self, stream: LayerStream):
        self._stream = stream
        self._ids = self._text = mx.array(0)  # what is fitted to: its ids, and the text before the next layer
        self._embedding: mx.array | None = None  # the Hessian of its rows
        self._fits: list[_Fit] = []  # of the matrices that are next

    def measured(self, rows: mx.array, most: int) -> mx.array:
        length = rows.shape[1]
        if len(rows) == 1:
            raise PromptError(
                f"the calibration text has fewer than {2 * length:,} tokens, which GPTQ's errors need; give a longer "
                "one"
            )
        count = min(most, max(1, len(rows) // (_FITTED_WINDOWS + 1)))
        used = min(len(rows), count + FITTED_TOKENS // length)
        # From all over the text, which may be of several kinds, and both parts from each of them.
        chosen = [i * len(rows) // used for i in range(used)]
        held_out = [(i + 1) * used // count - 1 for i in range(count)]
        fitted = [i for i in range(used) if i not in held_out]
        self._ids = rows[mx.array([chosen[i] for i in fitted])]
        return rows[mx.array([chosen[i] for i in held_out])]

    def begin(self) -> None:
        self._text = self._stream.embed(self._ids)
        if self._embedding is None:
            self._embedding = hessian_of_embedding(self._stream, self._text)
        self._fits = [_Fit(self._embedding, self._ids.size)]

    def matrix(self, layer: DecoderLayer, path: str) -> None:
        self._fits = []
        hessians: list[mx.array] = []
        tokens: list[int] = []
        for parts in self._stream.inputs(layer, path, self._text):
            added, counts = [hessian_of([part]) for part in parts], [len(part) for part in parts]
            hessians = [a + b for a, b in zip(hessians, added, strict=True)] if hessians else added
            tokens = [a + b for a, b in zip(tokens, counts, strict=True)] if tokens else counts
            mx.eval(hessians)
        if len(hessians) == 1:
            self._fits = [_Fit(hessians[0], tokens[0])]
            return
        # As where a model is packed: experts that saw few tokens are rounded for what all of them get.
        total = mx.zeros_like(hessians[0])
        for hessian in hessians:
            total = total + hessian
        everything = total / max(1, sum(tokens))
        for hessian, seen in zip(hessians, tokens, strict=True):
            lacking = lacking_tokens(len(hessian), seen)
            self._fits.append(_Fit(hessian + lacking * everything, seen + round(lacking)))

    def past(self, layer: DecoderLayer) -> None:
        self._fits = []
        self._text = self._stream.run(layer, self._text)

    def head(self) -> None:
        hessian = self._embedding
        if hessian is None or not self._stream.config.tie_word_embeddings:
            hessian = hessian_of([self._stream.norm(self._text).flatten(0, -2)])
        self._fits = [_Fit(hessian, self._ids.size)]

    def sample(self, weight: mx.array) -> mx.array:
        return weight[..., :: max(1, weight.shape[-2] // _SAMPLED), :]

    def rounded(self, weight: mx.array, packing: Scheme, dtype: mx.Dtype) -> mx.array:
        matrices = [weight] if weight.ndim == 2 else list(weight)
        made = [fit.rounded(matrix, packing, dtype) for fit, matrix in zip(self._fits, matrices, strict=True)]
        return made[0] if weight.ndim == 2 else mx.stack(made)


class _Fit:
    """The Hessian of a matrix's inputs, and its inverse factor, which all widths share."""

    def __init__(self, hessian: mx.array, tokens: int):
        self._hessian, self._damping = hessian, usual_damping(len(hessian), tokens)
        self._factor = inverse_factor(hessian, self._damping)

    def rounded(self, matrix: mx.array, packing: Scheme, dtype: mx.Dtype) -> mx.array:
        parts = round_columns(matrix, self._factor, packing, dtype)
        made = dequantized_matrix(refit(matrix, self._hessian, parts, packing, _SWEEPS, self._damping), packing)
        mx.eval(made)
        return made
