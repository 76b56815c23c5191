"""`export_gguf`: a model, perhaps with an adapter merged in, as a GGUF file for llama.cpp and ollama."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from .. import __version__, values
from ..config import Config
from ..engine import plan
from ..engine.machine import room
from ..errors import CheckpointError, OptionError, Phi3Error, TokenizerError
from ..evaluation.quality import Comparison
from ..option import arguments
from ..paths import expanded
from ..sizes import size_text
from ..store import hub
from ..store.atomic import check_file
from ..text.tokenizer import Tokenizer, read_tokenizer
from ..threads import refuse_fork
from .comparing import compare_sources
from .directory import DirectorySource
from .exact import ExactSource
from .fuse import open_merge
from .gguf.file import library
from .gguf.measurement import awaited_metadata, put_measurement
from .gguf.metadata import architecture, model_metadata
from .gguf.model import GgufModel
from .gguf.naming import Naming, choose_name
from .gguf.sink import GgufSink
from .gguf.source import GgufSource
from .gguf.vocabulary import unnamed_stops, vocabulary_metadata
from .gguf.words import CUT_AT_MARKS
from .importance import input_importance
from .modelfile import has_template, modelfile_text, write_modelfile
from .opening import REVISION_KEY, find_source, open_source
from .options import ExportOptions
from .report import memory_needed
from .sinks import Progress, staged
from .sources import OpenedSource
from .texts import bundled

_BESIDE = 10**8  # bytes that an export takes beside the tensor that it reads: pieces of it, and the vocabulary


@dataclass(frozen=True)
class Exported:
    """What `export_gguf` has made.

    `files`: the GGUF file, or its parts in order. `name` is its `general.name`. `kinds` gives how many matrices have
    which type; `kept` names those whose packed values went over as they are, `rounded_again` those that were
    dequantized and rounded a second time, `fallen_back` those whose rows the blocks of their type do not divide, with
    that type.
    `different_ids` are the sample texts that llama.cpp gives other ids; `comparison` is of the model with the file on a
    text, where that was made, and its figures are in the file. `notes` are sentences that the caller should see.
    `modelfile` is ollama's, if it was asked for.
    """

    files: tuple[Path, ...]
    bytes: int
    bits_per_weight: float
    name: str
    kinds: Mapping[str, int]
    kept: tuple[str, ...]
    rounded_again: tuple[str, ...]
    fallen_back: Mapping[str, str]
    different_ids: tuple[str, ...]
    comparison: Comparison | None
    notes: tuple[str, ...]
    modelfile: Path | None


def export_gguf(
    model: str | Path | None,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    type: str | None = None,
    name: str | None = None,
    longrope: Literal["short", "long"] = ExportOptions.longrope,
    modelfile: bool = ExportOptions.modelfile,
    importance: bool = ExportOptions.importance,
    calibration: str | None = None,
    report: bool | None = None,
    text: str | None = None,
    split_max_size: int | str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Exported:
    """Write `output`, a GGUF file that llama.cpp and ollama run.

    `model`: a name, directory or repository (as in `load`), or a GGUF file; packed or not. With an `adapter`, which is
    merged in on the way, None is what that was trained on. `type` is llama.cpp's name of a file's type, "q8_0" or
    "q4_k_m" (`ExportOptions` has all); norms and routers stay in float32. Without it each weight gets the type that
    holds it as it is stored, if there is one. What is packed goes over without a second rounding where the type has a
    place for it.

    K types let errors count by the mean squares that a text, `calibration`, sends through the weights, unless
    `importance` is False. `report` compares the file with the model on `text`, by default where packed weights are
    rounded a second time; if that fails, a note says so. Both read the model layer by layer.

    `modelfile` writes NAME.Modelfile beside NAME.gguf, of which `ollama create` makes a model. `longrope` says for
    which of LongRoPE's factors: its context is the original length, or beyond it.

    The file appears when it is complete; beside a piece of it one tensor is in memory at a time. `split_max_size`
    (bytes, or "4GB") writes parts, `output` with numbers in its name. `progress` is called after every tensor.

    Raises OptionError, ModelNotFoundError, AdapterError, CheckpointError (files missing or damaged, no library, no room
    on the disk), ConfigError (Phi-3-small, which llama.cpp does not have), TokenizerError, MemoryLimitError, OSError.
    """
    return export_as(model, output, ExportOptions(**arguments(ExportOptions, locals())), progress)


def export_as(
    model: str | Path | None,
    output: str | Path,
    options: ExportOptions,
    progress: Callable[[Progress], None] | None = None,
) -> Exported:
    """`export_gguf`, with all options at once."""
    refuse_fork()
    model = values.optional(values.path, model, "model")
    destination = expanded(values.path(output, "output"))
    values.check_function(progress, "progress")
    check_place(destination, options.force, modelfile=options.modelfile)
    gguf = library(destination)
    source, called = _source(model, options)
    if downloaded := hub.snapshot_of(Path(source.name)):
        called = downloaded[0]
    if any(os.path.samefile(file, source.name) for file in _exported_as(destination)):
        raise OptionError(f"output {str(destination)!r} is the model itself; name another file")
    kind = architecture(source.config, called)
    made = GgufModel(gguf, source, options.type)
    if not options.force:
        _check_room(source, called, options)
    compares, why_none = _compares(options, made)
    tokenizer, vocabulary = _vocabulary(source, called)
    if options.modelfile:
        modelfile_text(destination, tokenizer, source.config, longrope=options.longrope)  # may refuse
    usual = source.metadata_name if isinstance(source, GgufSource) and source.metadata_name else _short_name(called)
    naming = choose_name(tokenizer, usual, options.name)
    metadata = {
        **_general(naming, called, source, made, options),
        **(awaited_metadata("a text of its maker's" if options.text else "the bundled sample") if compares else {}),
        **model_metadata(source.config, options.longrope),
        **vocabulary,
    }
    sink = GgufSink(gguf, destination, options.split_bytes)
    sink.check_space(sum(entry.nbytes for entry in made.entries))  # measuring takes minutes, and this is known now
    importance: Mapping[str, mx.array] = {}
    if options.reads_calibration:
        ids = tokenizer.encode(bundled("calibration") if options.calibration is None else options.calibration)
        importance = input_importance(source, ids, staged(progress, "measuring", "layers"))
    files = sink.write(kind, metadata, made.entries, made.encoder(importance), progress)
    if options.force:
        for left in {*_exported_as(Path(os.path.realpath(destination)))} - {*files}:
            left.unlink(missing_ok=True)  # the whole file that parts replace, or parts of another number
    comparison, failed = _compared(files, source, tokenizer, options, progress) if compares else (None, ())
    modelfile = (
        write_modelfile(files[0], tokenizer, source.config, longrope=options.longrope) if options.modelfile else None
    )
    told = (*why_none, *failed, *_about_words(vocabulary))
    return _exported(files, naming, made, tokenizer, options, comparison, told, modelfile)


def _compares(options: ExportOptions, made: GgufModel) -> tuple[bool, tuple[str, ...]]:
    """Whether what rounding costs is measured: a second rounding without being asked, where there is the memory.

    Where there is not, a sentence says so.
    """
    if options.is_to_report is not None:
        return options.is_to_report, ()
    if not any(carried.rounded_again for carried in made.carried.values()):
        return False, ()
    if (needed := 2 * memory_needed(made.source, 0)) <= (free := room()):
        return True, ()
    why = f"it takes about {size_text(needed)} of memory, and {size_text(free)} are free"
    return False, (f"what this cost was not measured: {why}; report=True does it anyway",)


def _check_room(source: OpenedSource, called: str, options: ExportOptions) -> None:
    """MemoryLimitError unless a tensor, and layers where a text is read, fit in memory."""
    compares = options.is_to_report is True
    largest = max(tensor.nbytes for tensor in source.tensors.values())
    layers = (2 if compares else 1) * memory_needed(source, 0) if options.reads_calibration or compares else 0
    parts = {"a tensor at a time": 2 * largest, "the rest": _BESIDE, "layers and a text": layers}
    ways = [*(["importance=False"] if options.reads_calibration else []), *(["report=False"] if compares else [])]
    way_out = f"take {' and '.join(ways)}" if ways else "close other programs"
    plan.check_room(f"exporting {called}", parts, way_out)


def _compared(
    files: list[Path],
    source: OpenedSource,
    tokenizer: Tokenizer,
    options: ExportOptions,
    progress: Callable[[Progress], None] | None,
) -> tuple[Comparison | None, tuple[str, ...]]:
    """How far the file's model is from the source's, which the file says from then on.

    Where nobody asked and it fails, None and a sentence that says why. What is raised says that the file is there.
    """
    text = bundled("sample") if options.text is None else options.text
    step = staged(progress, "comparing", "layers")
    try:
        comparison = compare_sources(source, GgufSource(files[0]), tokenizer, text, progress=step)
    except Exception as error:  # of any kind, such as MLX's when memory runs out: hours of writing are not lost by it
        why = " ".join(str(error).split()) or type(error).__name__
        stands = f"{files[0]} is complete, but it could not be compared with the model: {why}"
        if not options.is_to_report:
            return None, (stands,)
        if not isinstance(error, Phi3Error):
            raise CheckpointError(stands) from error
        error.args = (stands,)
        raise
    if comparison.kl is not None and comparison.top1 is not None:
        put_measurement(files[0], comparison.kl, comparison.top1)
    return comparison, ()


def check_place(destination: Path, force: bool, *, modelfile: bool = False) -> None:
    """Raise OptionError, CheckpointError or OSError unless a GGUF file, or its parts, may be written there.

    So may a Modelfile beside it.
    """
    if destination.suffix != ".gguf":
        raise OptionError(f"output {str(destination)!r} does not end in .gguf, by which llama.cpp knows its files")
    beside = [destination.with_suffix(".Modelfile")] if modelfile else []
    for place in [destination, *_exported_as(destination), *beside]:
        if place.exists() and not force:
            check_file(place)
            raise CheckpointError(f"{place} exists already; name another file, or replace it with force=True")
        if destination.parent.exists():
            check_file(place)


def _exported_as(destination: Path) -> list[Path]:
    """What an export to `destination` has left there: the file, or its parts, of whatever number."""
    part = re.compile(re.escape(destination.stem) + r"-\d{5}-of-\d{5}\.gguf")
    files = [file for file in destination.parent.glob("*.gguf") if file.exists()]
    return sorted(file for file in files if file.name == destination.name or part.fullmatch(file.name))


def _source(model: str | Path | None, options: ExportOptions) -> tuple[OpenedSource, str]:
    """What is exported, and what it is called."""
    if options.adapter is not None:
        folder = expanded(options.adapter)
        merge = open_merge(folder, None if model is None else str(model), options.revision)
        return ExactSource(merge.source, merge.adapters, merge.replaced), merge.base.name
    if model is None:
        raise OptionError("model is missing; give a model, or an adapter, which names its own")
    opened = open_source(find_source(model, options.revision))
    if isinstance(opened, DirectorySource):
        return ExactSource(opened), str(model)
    assert isinstance(opened, GgufSource)
    return opened, str(model)


def _vocabulary(source: OpenedSource, called: str) -> tuple[Tokenizer, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source.write_extras(Path(folder))
        try:
            tokenizer = read_tokenizer(Path(folder))
            return tokenizer, vocabulary_metadata(Path(folder), tokenizer, source.config.vocab_size)
        except TokenizerError as error:  # of the copies, whose place nobody knows
            raise TokenizerError(str(error).replace(folder, called)) from error


def _short_name(called: str) -> str:
    """A model's name without its owner or directory."""
    return Path(os.path.abspath(expanded(hub.repository_of(called)))).name.removesuffix(".gguf")


def _general(
    naming: Naming, called: str, source: OpenedSource, made: GgufModel, options: ExportOptions
) -> dict[str, Any]:
    """What the file says of itself. Where the source lies on this disk is nobody's business."""
    downloaded = hub.snapshot_of(Path(source.name))
    about: dict[str, Any] = {
        "general.type": "model",
        "general.name": naming.name,
        "general.file_type": made.file_number,
        "phi3_mlx.version": __version__,
        "phi3_mlx.source": hub.repository_of(called) if hub.is_repository(called) else _short_name(called),
    }
    if hub.is_repository(called):
        about["general.source.url"] = f"https://huggingface.co/{hub.repository_of(called)}"
    if downloaded is not None:
        about[REVISION_KEY] = downloaded[1]
    if options.adapter is not None:
        about["phi3_mlx.adapter"] = expanded(options.adapter).resolve().name
    return about


def _exported(
    files: list[Path],
    naming: Naming,
    made: GgufModel,
    tokenizer: Tokenizer,
    options: ExportOptions,
    comparison: Comparison | None,
    told: tuple[str, ...],
    modelfile: Path | None,
) -> Exported:
    again = tuple(name for name, carried in made.carried.items() if carried.rounded_again)
    kept = tuple(name for name, carried in made.carried.items() if not carried.rounded_again)
    return Exported(
        tuple(files),
        sum(file.stat().st_size for file in files),
        made.bits_per_weight,
        naming.name,
        Counter(entry.kind for entry in made.matrices),
        kept,
        again,
        dict(made.fallen_back),
        naming.different,
        comparison,
        (
            *naming.notes,
            *_about_packed(made),
            *told,
            *_about_stops(tokenizer),
            *_about_template(tokenizer, modelfile),
            *_about_llama_cpp(made.config, options.longrope),
        ),
        modelfile,
    )


def _about_packed(made: GgufModel) -> tuple[str, ...]:
    """What became of packed weights, and of rows that do not fit."""
    kept = [carried for carried in made.carried.values() if not carried.rounded_again]
    again = [name for name, carried in made.carried.items() if carried.rounded_again]
    notes = []
    if kept:
        rounded = sum(carried.rounded_scales for carried in kept)
        but = f", but {rounded:,} of their scales were rounded to float16, GGUF's type for them" if rounded else ""
        notes.append(f"{len(kept)} packed matrices went over without a second rounding{but}")
    if again:
        notes.append(
            f"{len(again)} packed matrices were dequantized and rounded a second time ({again[0]}, ...), which costs "
            "quality; export the original if you can"
        )
    kinds = {entry.name: entry.kind for entry in made.entries}
    instead = Counter((wanted, kinds[name], _part(name)) for name, wanted in made.fallen_back.items())
    for (wanted, kind, part), count in sorted(instead.items()):
        what = f"{count} of {part}" if count > 1 else part
        notes.append(f"{what}: {kind} in place of {wanted}, whose blocks do not divide its rows")
    return tuple(notes)


def _part(name: str) -> str:
    """A tensor's name without the number of its layer and its ending."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _about_words(vocabulary: Mapping[str, Any]) -> tuple[str, ...]:
    if vocabulary.get("tokenizer.ggml.pre") not in CUT_AT_MARKS:
        return ()
    return ("llama.cpp cuts this vocabulary's words at combining marks, so that Hindi, Thai and such get other ids",)


def _about_stops(tokenizer: Tokenizer) -> tuple[str, ...]:
    left = unnamed_stops(tokenizer)
    return (f"a GGUF file has no place for the stop tokens {', '.join(left)}; name them where it runs",) if left else ()


def _about_template(tokenizer: Tokenizer, modelfile: Path | None) -> tuple[str, ...]:
    unknown = modelfile is not None and not has_template(tokenizer)
    return (
        ("the model's chat template is none that is known in ollama's form, so ollama guesses one",) if unknown else ()
    )


def _about_llama_cpp(config: Config, longrope: str) -> tuple[str, ...]:
    """Where llama.cpp computes other numbers with this file than this package does."""
    notes = []
    if config.longrope is not None:
        original = config.original_max_position_embeddings
        regime = f"up to {original:,} (-c {original})" if longrope == "short" else f"of more than {original:,}"
        notes.append(
            f"llama.cpp takes LongRoPE's factors by the context that it is started with, not by the text's length; "
            f"start it with a context {regime}"
        )
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp ignores this model's sliding window: its answers differ after {config.sliding_window:,} tokens"
        )
    if config.model_type == "phimoe":
        notes.append("llama.cpp computes other norms and other weights of experts than Phi-3.5-MoE has: answers differ")
    return tuple(notes)
