"""The rounder that follows a text through the source and the packed model at once, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx

from .. import __version__
from ..errors import OptionError
from ..models.hooks import get_layer
from .fitted_steps import FittedSteps
from .gptq import DAMPING, SWEEPS, better_rows, dequantized_matrix, gptq, hessian_of, refit
from .layerwise import EMBEDDING, Inputs, LayerStream, Passage, layer_of
from .layout import Entry, Layout, Scheme
from .rounding import pack
from .sources import Blocks, Source, source_digest, to_mlx
from .targets import HELD_OUT, Moments, moments_of, rounding_damping, target_of
from .texts import windows
from .unfinished import FITTED, claim

GPTQ_WINDOW = 256
_LOOKUP = 0.1  # weight of a tied embedding's looking up beside making logits
ENOUGH_TOKENS = 0.25  # tokens for each input of an expert; the statistics of all experts make up for fewer


@dataclass(frozen=True)
class GptqSteps:
    """What GPTQ does beside rounding columns: `targets` that keep the source's outputs, where these are added to the
    `stream` the sum, a `damping` that is chosen on text held out, and `sweeps` that refit."""

    targets: bool = True
    stream: bool = True
    damping: bool = True
    sweeps: int = SWEEPS


@dataclass(frozen=True)
class MatrixFit:
    """What rounding a matrix to a text did. `damping`: of its target, None where that is the source's own values, and
    `rounding`: of the rounding.

    Errors are |Wx - Vx'| / |Wx| on the quarter of the text that chose the damping: of the source's matrix V = W with
    the packed inputs, of the target, of W rounded to the `nearest` values, of the target rounded by `columns`, and of
    what is written. Where outputs are added to the residual stream, they are the sum's. `few`: how many experts had too
    few tokens. Of experts dampings and errors are means.
    """

    path: str
    damping: float | None
    rounding: float
    inherited: float
    target: float
    nearest: float
    columns: float
    rounded: float
    few: int = 0


@dataclass(frozen=True)
class Stored:
    """What is packed already, by name: tensors that are `kept` to the bit, and others that were changed, whose
    refitting may also `start` from what they were before."""

    kept: Mapping[str, Blocks] = field(default_factory=dict)
    start: Mapping[str, Blocks] = field(default_factory=dict)


def calibrated(
    source: Source,
    layout: Layout,
    ids: Sequence[int],
    *,
    window: int = GPTQ_WINDOW,
    steps: GptqSteps | None = None,
    stored: Stored | None = None,
    folder: Path | None = None,
) -> Calibration:
    """The rounder of `source` whose errors change its outputs on a text least.

    `ids`: the token ids of the text, read in windows of `window`. The more of it, and the more like what the model will
    read, the better; every fourth window chooses how far matrices follow the text. `stored`: what is packed already, as
    `layout` says. `folder` keeps what is done, layer by layer, and the same call goes on from there. In memory: a layer
    of the source and of the packed model in float32, the text's activations in both, and for a layer of n inputs eight
    matrices of n x n. An embedding that is also the head is rounded for both tasks, for which the model in floats runs
    first. For an embedding that is only looked up, each group gets the grid of least error.

    Raises OptionError for a layout that is not affine throughout, PromptError for a text shorter than one window, and
    while it runs CheckpointError for weights or activations that are not finite.
    """
    check_grids(layout)
    kept = None if folder is None else FittedSteps(folder)
    rows, stream = windows(ids, window), LayerStream(source)
    return Calibration(stream, layout, rows, steps or GptqSteps(), stored or Stored(), kept)


def calibrated_in(
    work: Path,
    source: Source,
    layout: Layout,
    ids: Sequence[int],
    *,
    stored: Stored | None = None,
    force: bool = False,
) -> Calibration:
    """`calibrated`, which keeps what is done in the folder `work` and goes on from there.

    OptionError for a folder of a run with other arguments, unless `force`.
    """
    claim(work, source_digest(source, [__version__, "gptq", list(ids), layout.recipe]), force)
    return calibrated(source, layout, ids, stored=stored, folder=work / FITTED)


def check_grids(layout: Layout) -> None:
    """OptionError for a layout that is not affine throughout."""
    mode = next((packing["mode"] for packing in layout.packings.values() if packing["mode"] != "affine"), None)
    if mode is not None:
        raise OptionError(f"methods gptq and distill round to affine grids, not {mode}; leave out one of the two")


class Calibration:
    """A rounder; the whole layer is packed when its first tensor is asked for. `fits`: of the matrices so far.

    `kept`: the steps that are done already, and where the next are kept.
    """

    def __init__(
        self,
        stream: LayerStream,
        layout: Layout,
        ids: mx.array,
        steps: GptqSteps,
        stored: Stored,
        kept: FittedSteps | None,
    ):
        self._kept = kept
        self._stream, self._packings, self._steps, self._stored = stream, layout.packings, steps, stored
        rows = mx.arange(len(ids))
        held_out = rows % HELD_OUT == HELD_OUT - 1
        self._ids = ids[mx.argsort(held_out)]
        self._fitted = len(ids) - int(held_out.sum())  # rows of the text; those after them are held out
        self._layer = -1
        # The rows fitted and those held out, before the next layer, in the source and packed.
        self._before: list[mx.array] = []
        self._hidden: list[mx.array] = []
        if kept is not None and (text := kept.text()) is not None:
            self._before, self._hidden = text
        self._made: dict[str, list[mx.array]] = {}  # of this layer, not yet asked for
        self.fits: list[MatrixFit] = []

    @property
    def text(self) -> tuple[mx.array, int]:
        """The ids that are read (rows, length), and how many of the rows are fitted; those after them are held out."""
        return self._ids, self._fitted

    @property
    def source_hidden(self) -> mx.array:
        """The text in the source (rows, length, hidden_size) after the layers packed so far."""
        return mx.concatenate(self._before)

    def __call__(self, entry: Entry) -> list[mx.array]:
        layer = layer_of(entry.name)
        if layer is not None and layer != self._layer:
            self._layer = layer
            self._step(f"layer-{layer}", lambda: self._pack_layer(layer))
        elif layer is None and (entry.packing is not None or entry.path == EMBEDDING):
            self._step(entry.path, lambda: self._pack_end(entry))
        return self._made.pop(entry.name) if entry.name in self._made else [self._stream.source.read(entry.name)]

    def _step(self, name: str, pack: Callable[[], None]) -> None:
        """What `pack` makes and notes, or what was kept of it."""
        if self._kept is None:
            pack()
        elif (done := self._kept.of(name)) is not None:
            self._made, fits = done
            self.fits += [MatrixFit(**fit) for fit in fits]
        else:
            noted = len(self.fits)
            pack()
            fits = [asdict(fit) for fit in self.fits[noted:]]
            self._kept.keep(name, self._made, fits, self._before, self._hidden)

    def _pack_end(self, entry: Entry) -> None:
        """Makes the arrays of the embedding, packed or not, or of a packed head."""
        stream, weight = self._stream, self._stream.source.read(entry.name)
        if entry.path == EMBEDDING:
            self._before = [stream.embedded(weight[ids]) for ids in self._halves()]
        if entry.packing is None:
            parts = [weight]
        elif entry.name in self._stored.kept:
            parts = self._stored.kept[entry.name].read()
        elif entry.path == EMBEDDING:
            hessian = hessian_of_embedding(stream, self.source_hidden)
            parts = gptq(weight, hessian, entry.packing, to_mlx(entry.tensor.dtype), self._steps.sweeps)
        else:
            ends = zip(self._before, self._hidden, strict=True)
            pairs = [Inputs(stream.norm(a).flatten(0, -2), stream.norm(b).flatten(0, -2)) for a, b in ends]
            floats = weight.astype(mx.float32)
            fitted, held_out = (moments_of([[pair]], [floats])[0] for pair in pairs)
            dtype = to_mlx(entry.tensor.dtype)
            start = self._start(entry.name)
            parts, fit = self._packed(entry.path, entry.packing, dtype, floats, fitted, held_out, held_out, start)
            self.fits.append(fit)
        if entry.path == EMBEDDING:
            floats = dequantized_matrix(parts, entry.packing)
            self._hidden = [stream.embedded(floats[ids]) for ids in self._halves()]
        self._made = {entry.name: parts}

    def _halves(self) -> tuple[mx.array, mx.array]:
        """The ids of the rows that matrices are fitted to, and of those that judge."""
        return self._ids[: self._fitted], self._ids[self._fitted :]

    def _pack_layer(self, i: int) -> None:
        """Packs the linear layers of layer `i`, and takes the activations through it and through the source's."""
        stream, original = self._stream, self._stream.layer(i)
        layer = stream.twin(original, i)
        passages = [
            (Passage(original, before), Passage(layer, hidden))
            for before, hidden in zip(self._before, self._hidden, strict=True)
        ]
        self._made = {}
        for path in stream.linears:
            name = f"model.layers.{i}.{path}.weight"
            if name not in self._packings:
                continue
            packing, dtype = self._packings[name], to_mlx(stream.source.tensors[name].dtype)
            weight = get_layer(original, path).weight
            if name in self._stored.kept:
                self._made[name] = self._stored.kept[name].read()
                continue

            matrices = [weight] if weight.ndim == 2 else list(weight)
            used, judging = (self._inputs(path, *passage) for passage in passages)
            fitted, held_out = moments_of(used), moments_of(judging, matrices)
            halves = [fitted, held_out] if held_out else [fitted]
            held_out = held_out or [0.0 * moments for moments in fitted]
            few, judges = 0, held_out  # what is written is judged by a matrix's own tokens alone
            if weight.ndim == 3:
                few = sum(any(map(_lacks, of_expert)) for of_expert in zip(*halves, strict=True))
                fitted, held_out = _pooled(fitted), _pooled(held_out)
            start = self._start(name)
            starts = [start] * len(matrices) if start is None or weight.ndim == 2 else list(zip(*start, strict=True))
            pieces, fits = zip(
                *(
                    self._packed(name.removesuffix(".weight"), packing, dtype, *matrix)
                    for matrix in zip(matrices, fitted, held_out, judges, starts, strict=True)
                ),
                strict=True,
            )
            made = list(pieces[0])
            if weight.ndim == 3:
                made = [mx.stack(list(kind)) for kind in zip(*pieces, strict=True)]
            self.fits.append(_mean(fits, few))
            get_layer(layer, path).weight = dequantized_matrix(made, packing)
            self._made[name] = made
            mx.eval(layer.parameters())
            mx.clear_cache()
        self._before, self._hidden = (list(map(stream.after, both)) for both in zip(*passages, strict=True))

    def _inputs(self, path: str, source: Passage, packed: Passage) -> Iterator[Sequence[Inputs]]:
        """The inputs of `path` in both layers."""
        for inputs in self._stream.pairs(source, packed, path):
            yield inputs if self._steps.stream else [each._replace(stream=None) for each in inputs]

    def _start(self, name: str) -> Sequence[mx.array] | None:
        """What the tensor was before it was changed, if that is known."""
        blocks = self._stored.start.get(name)
        return None if blocks is None else blocks.read()

    def _packed(
        self,
        path: str,
        packing: Scheme,
        dtype: mx.Dtype,
        weight: mx.array,
        fitted: Moments,
        held_out: Moments,
        judges: Moments,
        start: Sequence[mx.array] | None,
    ) -> tuple[list[mx.array], MatrixFit]:
        """A matrix (outputs, inputs) packed for these inputs, and what that did to those that judge.

        `start`: what its refitting may also begin from.
        """
        target, damping, rounding = weight, None, DAMPING
        if self._steps.targets and held_out.tokens:
            desired = target_of(weight, fitted, held_out)
            target, damping = desired.weight, desired.damping
        if self._steps.damping:
            rounding = rounding_damping(weight, target, fitted, held_out, packing, dtype)
        hessian, how = fitted.hessian + held_out.hessian, (packing, self._steps.sweeps, rounding)
        columns = gptq(target, hessian, packing, dtype, 0, rounding)
        parts = refit(target, hessian, columns, *how)
        if start is not None:
            parts = better_rows(target, hessian, parts, refit(target, hessian, start, *how), packing, rounding)
        nearest = pack(weight.astype(dtype), packing)
        inherited, wanted = (judges.error(weight, other) for other in (weight, target))
        near, by_columns, written = (
            judges.error(weight, dequantized_matrix(made, packing)) for made in (nearest, columns, parts)
        )
        return parts, MatrixFit(path, damping, rounding, inherited, wanted, near, by_columns, written)


def _mean(fits: Sequence[MatrixFit], few: int) -> MatrixFit:
    """What rounding the experts of a layer did; that of a single matrix is its own mean."""

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(numbers)

    dampings = [fit.damping for fit in fits if fit.damping is not None]
    return MatrixFit(
        fits[0].path,
        mean(dampings) if dampings else None,
        mean([fit.rounding for fit in fits]),
        mean([fit.inherited for fit in fits]),
        mean([fit.target for fit in fits]),
        mean([fit.nearest for fit in fits]),
        mean([fit.columns for fit in fits]),
        mean([fit.rounded for fit in fits]),
        few,
    )


def lacking_tokens(inputs: int, tokens: int) -> float:
    """How many tokens an expert of that many inputs has too few of, when it saw `tokens`."""
    return max(0.0, ENOUGH_TOKENS * inputs - tokens)


def _lacks(moments: Moments) -> float:
    return lacking_tokens(len(moments.hessian), moments.tokens)


def _pooled(experts: Sequence[Moments]) -> list[Moments]:
    """The moments of each expert; those of few tokens are filled up with the mean of all experts' tokens.

    An expert that the text never reaches is rounded for what the others get. If none gets any, grids have least error.
    """
    total = experts[0]
    for other in experts[1:]:
        total = total + other
    return [moments + _lacks(moments) / max(total.tokens, 1) * total for moments in experts]


def hessian_of_embedding(stream: LayerStream, hidden: mx.array) -> mx.array:
    """Rows that are looked up weigh alike. A tied embedding also makes logits, which have most of the weight.

    Looking up loses less by rounding, and what is good for logits is not bad for it.

    `hidden`: the text before the source's first layer.
    """
    same = mx.eye(stream.config.hidden_size)
    if not stream.config.tie_word_embeddings:
        return same
    for i in range(stream.config.num_hidden_layers):
        hidden = stream.run(stream.layer(i), hidden)
        mx.clear_cache()
    hessian = hessian_of([stream.norm(hidden).flatten(0, -2)])
    return hessian + _LOOKUP * mx.diag(hessian).mean() * same
