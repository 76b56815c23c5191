"""What a conversion cost: REPORT.md, report.json and a plot beside the new model, and the same as a table.

Source and result run through a text together, layer by layer in float32, so that the memory is that of the result,
one layer of the source, and the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import OptionError
from ..evaluation.quality import LOGITS_AT_ONCE, Comparison, Difference, blocks, chunks
from ..files import json_text
from ..models.hooks import get_layer
from ..models.linear import matrices, plain_weight
from ..store import hub
from ..store.atomic import new_files, replace_file
from ..store.checkpoint import read_model
from ..store.safetensors import Tensor, find_weights
from ..text.tokenizer import read_tokenizer
from .layerwise import EMBEDDING, LayerStream, layer_of
from .opening import open_source
from .sources import weights_of
from .texts import REPORT_WINDOW, bundled

if TYPE_CHECKING:
    from rich.table import Table

    from ..models.decoder import Model
    from ..models.layer import DecoderLayer
    from .sources import Source

REPORT, FIGURES, PLOT = "REPORT.md", "report.json", "report.png"
FITTED_TO_IT = "Bits or rounding were fitted to this text, so other texts will lose more."
INSTALL_PLOT = 'no plot, because matplotlib is not installed: pip install "phi3-mlx[plot]"'
_WORST = 3  # tensors shown on a terminal
_TOKENS = 16_384  # of the text that are read; all activations are in memory at once


@dataclass(frozen=True)
class TensorReport:
    """One matrix: how it is packed (`bits` and `group_size` None: not at all), and what that does.

    `relative_error` is ‖W'x − Wx‖ / ‖Wx‖ over the inputs x that the source gives it on the text; for the embedding,
    over the rows that the text looks up. A tied embedding is listed once, and as the head that it also is.
    """

    path: str
    bits: int | None
    group_size: int | None
    bytes: int
    relative_error: float


@dataclass(frozen=True)
class Report:
    """A conversion's cost, or how far one model is from another. `text` says what was read.

    Bytes and bits per weight are of all tensors, the source's as if dequantized; `notes` qualify the figures.
    """

    source: str
    text: str
    window: int
    comparison: Comparison
    source_bytes: int
    source_bits_per_weight: float
    bytes: int
    bits_per_weight: float
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...] = ()
    result: str | None = None  # its name, where the report does not lie beside it
    revision: str | None = None  # the source's commit, if it is a repository of the hub

    def figures(self) -> dict[str, Any]:
        """What report.json holds."""
        c = self.comparison
        return {
            "source": self.source,
            "revision": self.revision,
            "text": self.text,
            "window": self.window,
            "tokens": c.a.tokens,
            "characters": c.a.characters,
            "perplexity": {"source": c.a.perplexity, "result": c.b.perplexity},
            "perplexity_per_character": {
                "source": c.a.perplexity_per_character,
                "result": c.b.perplexity_per_character,
            },
            "kl": c.kl,
            "top1": c.top1,
            "bytes": {"source": self.source_bytes, "result": self.bytes},
            "bits_per_weight": {"source": self.source_bits_per_weight, "result": self.bits_per_weight},
            "notes": list(self.notes),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def write_report(
    directory: Path,
    source: Source,
    *,
    text: str | None = None,
    text_name: str | None = None,
    fitted: bool = False,
    window: int = REPORT_WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare the model in `directory` with the `source` it was made from, and `save` the report beside it.

    `text` (called `text_name`) is read up to 16,384 tokens; by default a bundled sample is. `fitted` says that bits or
    rounding were fitted to this very text. `progress` counts layers. Raises PromptError for a text of fewer than two
    tokens, OptionError for a source of other shapes.
    """
    report = make_report(
        directory, source, text=text, text_name=text_name, fitted=fitted, window=window, progress=progress
    )
    return save(report, directory)


def save(report: Report, directory: Path) -> Report:
    """Write REPORT.md, report.json and report.png; without matplotlib no plot, and a note that says what to install."""
    with new_files(directory, last=REPORT) as folder:
        plotted = plot(report.tensors, folder / PLOT)
        if not plotted:
            report = replace(report, notes=(*report.notes, f"{INSTALL_PLOT[0].upper()}{INSTALL_PLOT[1:]}."))
        (folder / FIGURES).write_text(json_text(report.figures(), indent=1) + "\n", encoding="utf-8")
        (folder / REPORT).write_text(markdown(report, PLOT if plotted else None), encoding="utf-8")
    return report


def make_report(
    directory: Path,
    source: Source,
    *,
    text: str | None,
    text_name: str | None,
    fitted: bool,
    window: int,
    progress: Callable[[int, int], None] | None,
) -> Report:
    """The report of `write_report`, not written."""
    shapes = {name: tensor.shape for name, tensor in open_source(directory).tensors.items()}
    for name, tensor in source.tensors.items():
        if shapes.get(name) != tensor.shape:
            raise OptionError(
                f"{name} is {tensor.shape} in {source.name} and {shapes.get(name, 'not')} in {directory}: layers can "
                "be compared of models of one shape alone"
            )
    name = (text_name or "the given text") if text is not None else "the bundled sample"
    tokenizer = read_tokenizer(directory)
    text = bundled("sample") if text is None else text
    ids = tokenizer.encode(text)
    notes = [FITTED_TO_IT] if fitted else []
    if len(ids) > _TOKENS:
        ids = ids[:_TOKENS]
        text = tokenizer.decode(ids)
        name += f", its first {_TOKENS:,} tokens"
    bos = tokenizer.bos_token_id if tokenizer.add_bos_token else None
    model = read_model(directory, dtype="float32")
    window = min(window, model.config.max_position_embeddings)
    comparison = _Comparison(source, model, list(blocks(ids, window, bos)))
    comparison.run(progress)
    characters = len(text) if bos is not None else max(1, len(text) - len(tokenizer.decode(ids[:1])))
    stored = find_weights(directory).tensors
    weights = weights_of(source)
    total = sum(tensor.nbytes for tensor in stored.values())
    before = sum(tensor.nbytes for tensor in source.tensors.values())
    tensors = tuple(_tensor(path, error, model, stored) for path, error in comparison.errors.items())
    # Reports are published beside models: where the source lies on this disk is nobody's business.
    place = Path(source.name)
    called, revision = hub.snapshot_of(place) or (place.name if place.is_absolute() else source.name, None)
    return Report(
        source=called,
        text=name,
        window=window,
        comparison=comparison.difference.result(characters),
        source_bytes=before,
        source_bits_per_weight=8 * before / weights,
        bytes=total,
        bits_per_weight=8 * total / weights,
        tensors=tensors,
        notes=tuple(notes),
        revision=revision,
    )


def memory_needed(source: Source, size: int) -> int:
    """About the bytes that `write_report` takes: the result's `size`, a layer of the source, a matrix, the text."""
    first = [tensor.shape for name, tensor in source.tensors.items() if layer_of(name) == 0]
    layer, matrix = sum(map(math.prod, first)), max(math.prod(shape[-2:]) for shape in first)
    rows, width = source.tensors[f"{EMBEDDING}.weight"].shape
    floats = max(layer + 2 * matrix, 2 * rows * width) + 2 * _TOKENS * width + 4 * LOGITS_AT_ONCE
    return size + 4 * floats


class _Comparison:
    """Source and result on blocks of windows, layer by layer: `errors` by path, `difference` at the output."""

    def __init__(self, source: Source, model: Model, read: Sequence[mx.array]):
        self._stream, self._model = LayerStream(source), model
        self._inputs = [block[:, :-1] for block in read]
        self._targets = [block[:, 1:].flatten() for block in read]
        self.errors: dict[str, float] = {}
        self.difference = Difference()

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        if progress is not None:
            progress(0, len(self._model.layers))
        embedding = self._stream.source.read(f"{EMBEDDING}.weight")
        ours = [self._stream.embedded(embedding[ids]) for ids in self._inputs]
        theirs = [self._model.model.embed(ids) for ids in self._inputs]
        mx.eval(ours, theirs)
        error = sum(_square(b - a) for a, b in zip(ours, theirs, strict=True))
        self.errors[EMBEDDING] = _ratio(error, sum(map(_square, ours)))
        del embedding
        for i, packed in enumerate(self._model.layers):
            layer = self._stream.layer(i)
            ours = self._layer(f"model.layers.{i}", layer, packed, ours)
            theirs = [self._stream.run(packed, hidden) for hidden in theirs]
            mx.clear_cache()
            if progress is not None:
                progress(i + 1, len(self._model.layers))
        path = self._stream.head_path
        weight = self._stream.source.read(f"{path}.weight").astype(mx.float32)
        tied = self._model.config.tie_word_embeddings
        packed_weight = plain_weight(self._model.model.embed_tokens if tied else self._model.lm_head)
        self.errors[path] = self._end(weight, packed_weight, ours, theirs)

    def _layer(
        self, name: str, layer: DecoderLayer, packed: DecoderLayer, hidden: Sequence[mx.array]
    ) -> list[mx.array]:
        """The source's activations after a layer; notes the errors of its linear layers."""
        pairs = {path: (get_layer(layer, path), get_layer(packed, path)) for path in self._stream.linears}
        sums = {path: [0.0, 0.0] for path in pairs}
        result = []
        for block in hidden:
            parts = []
            for inputs, after in self._stream.trace(layer, block):
                parts.append(after)
                for path, by_matrix in inputs.items():
                    for x, weight, other in zip(by_matrix, *map(matrices, pairs[path]), strict=True):
                        sums[path][0] += _square(x @ (other - weight).T)
                        sums[path][1] += _square(x @ weight.T)
            result.append(mx.concatenate(parts))
        self.errors |= {f"{name}.{path}": _ratio(*both) for path, both in sums.items()}
        return result

    def _end(self, weight: mx.array, packed: mx.array, ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
        """Counts the differences of the outputs, and gives the head's own error."""
        change = packed - weight
        error = whole = 0.0
        for a, b, targets in zip(ours, theirs, self._targets, strict=True):
            a, b = self._stream.norm(a).flatten(0, 1), self._model.model.last_norm(b).flatten(0, 1)
            self.difference.add(a, self._stream.head(weight), b, self._stream.head(packed), targets, len(weight))
            for here in chunks(len(a), len(weight)):
                error += _square(a[here] @ change.T)
                whole += _square(a[here] @ weight.T)
        return _ratio(error, whole)


def _square(array: mx.array) -> float:
    return float((array**2).sum())


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0


def _tensor(path: str, error: float, model: Model, stored: Mapping[str, Tensor]) -> TensorReport:
    module: Any = model
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    size = sum(stored[name].nbytes for part in ("weight", "scales", "biases") if (name := f"{path}.{part}") in stored)
    return TensorReport(path, getattr(module, "bits", None), getattr(module, "group_size", None), size, error)


def add_section(directory: Path, section: str) -> None:
    """End REPORT.md with more Markdown; it is made where there is none."""
    path = directory / REPORT
    before = path.read_text(encoding="utf-8") if path.exists() else "# What this conversion cost\n"
    replace_file(path, f"{before}\n{section}".encode())


def markdown(report: Report, plot: str | None) -> str:
    """REPORT.md."""
    title, model = "What this conversion cost", "this model made from it"
    if report.result is not None:
        title, model = f"{report.result} beside {report.source}", f"`{report.result}`"
    lines = [f"# {title}", ""]
    lines += [f"`{report.source}`, and {model}, read {report.text} in windows of {report.window} tokens."]
    lines += ["", f"| measured | source | {report.result or 'this model'} |", "|---|---:|---:|"]
    lines += [f"| {name} | {a} | {b} |" for name, a, b in _summary(report)]
    lines += ["", *(f"{note}\n" for note in report.notes)]
    if plot:
        lines += [f"![Relative output error of each layer]({plot})", ""]
    lines += [
        "Relative output error is ‖W'x − Wx‖ / ‖Wx‖ on the inputs that the source's layers get from the text.",
        "",
    ]
    lines += ["| tensor | bits | group | bytes | relative output error |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(report)]
    return "\n".join(lines) + "\n"


def table(report: Report) -> Table:
    """The summary and the worst of the tensors, for a terminal; print it with a rich console."""
    from rich.table import Table

    grid = Table(title=f"Cost of the conversion on {report.text}", title_justify="left")
    for name in ("", "source", "result"):
        grid.add_column(name, justify="right" if name else "left")
    for row in _summary(report):
        grid.add_row(*row)
    grid.add_section()
    worst = sorted(report.tensors, key=lambda tensor: -tensor.relative_error)[:_WORST]
    for tensor in worst:
        grid.add_row(f"output error of {tensor.path}", "", f"{tensor.relative_error:.2%}")
    return grid


def plot(tensors: Sequence[TensorReport], path: Path) -> bool:
    """Relative output error along the layers, a line for each kind of tensor; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = dict.fromkeys(tensor.path.split(".", 3)[3] for tensor in tensors if layer_of(tensor.path) is not None)
    for kind in kinds:
        points = [tensor.relative_error for tensor in tensors if tensor.path.endswith(kind)]
        axes.plot(range(len(points)), points, marker="o", label=kind)
    for tensor in tensors:
        if not tensor.path.startswith("model.layers."):
            axes.axhline(tensor.relative_error, linestyle="--", linewidth=1, color="gray")
            axes.annotate(tensor.path, (0, tensor.relative_error), fontsize=8, color="gray", va="bottom")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative output error")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _summary(report: Report) -> list[tuple[str, str, str]]:
    c = report.comparison
    assert c.kl is not None
    assert c.top1 is not None
    return [
        ("perplexity", f"{c.a.perplexity:.3f}", f"{c.b.perplexity:.3f}"),
        ("perplexity per character", f"{c.a.perplexity_per_character:.4f}", f"{c.b.perplexity_per_character:.4f}"),
        ("mean KL divergence (nats a token)", "0", f"{c.kl:.5f}"),
        ("same likeliest token", "100 %", f"{c.top1:.2%}".replace("%", " %")),
        ("bits per weight", f"{report.source_bits_per_weight:.3f}", f"{report.bits_per_weight:.3f}"),
        ("bytes", f"{report.source_bytes:,}", f"{report.bytes:,}"),
        ("tokens predicted", f"{c.a.tokens:,}", f"{c.b.tokens:,}"),
    ]


def _rows(report: Report) -> list[tuple[str, ...]]:
    def text(value: int | None) -> str:
        return "" if value is None else str(value)

    return [
        (t.path, text(t.bits), text(t.group_size), f"{t.bytes:,}", f"{t.relative_error:.5f}") for t in report.tensors
    ]
