"""RULER-like tasks: what a model finds in long texts, over their length, and what packing the cache costs there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from ..engine.identity import model_fingerprint
from ..engine.prefill import common_length
from ..engine.prefixes import LEAST, PrefixStore
from ..errors import DataError, OptionError
from ..files import json_text, read_text
from ..generation.answering import answer_each
from ..generation.loading import check_loaded, check_tokenizer
from ..generation.request import Request
from ..models.decoder import Model
from ..option import arguments
from ..paths import expanded
from ..store.atomic import replace_file
from ..store.line_file import LineFile, alone_in, disk_faults, head_of
from ..values import optional, texts
from ..values import path as as_path
from .haystack import material
from .haystack.curves import Setting, draw_curves, figures_over_length
from .haystack.fitting import Fitted, Fitter
from .haystack.tasks import ALL_TASKS, EASIEST, RULER_TASKS, Haystack, Puzzle, Seeds
from .options import EvalOptions, RulerOptions

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

GROUP = "ruler"  # all of RULER's tasks
_SAMPLES = 20  # of a task and length, where no limit says otherwise; RULER has 500
_SAMPLES_FORMAT = 1
_IN_FOLDER = "ruler.json", "ruler.png", "samples.jsonl"


def ruler(
    model: Model,
    tokenizer: Tokenizer,
    tasks: str | Sequence[str] = GROUP,
    *,
    lengths: Sequence[int] | str = RulerOptions.lengths,
    caches: Sequence[int | tuple[int, int] | None] | str = RulerOptions.caches,
    rules: Sequence[str] | str | None = RulerOptions.rules,
    haystack: str | None = RulerOptions.haystack,
    output: str | os.PathLike[str] | None = None,
    limit: int | None = EvalOptions.limit,
    seed: int = EvalOptions.seed,
    force: bool = EvalOptions.force,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How much a model finds in texts of some lengths: RULER's task types, in our own words and texts.

        results = ruler(*load("phi-3.5-mini-4bit"), lengths="4k,8k,16k", caches=(None, 8, 4), limit=50, output="curve")
        [(row["length"], row["cache"], row["value"]) for row in results["curve"]]

    `tasks`: "ruler" for all 13, or some of them by name; "niah_word" is an easy one for small models, and not among the
    13. `lengths` are those of a prompt with the longest answer, in tokens. Each of `rules` (LongRoPE's) is read with
    each of `caches` (bits of keys and values; None: not quantized), all with the same prompts; without `rules` as the
    model was loaded. `haystack`: a text file that needles hide in; None: simple sentences made from `seed`. `limit`:
    samples of each task and length, 20 without. `output`: a folder for `samples.jsonl`, `ruler.json` and, with
    matplotlib, `ruler.png`; the same call again goes on from the samples there.

    Raises OptionError (an unknown task, a length that the model or a task cannot have, a rule without LongRoPE),
    DataError, and what `generate` raises.
    """
    options = RulerOptions(**arguments(RulerOptions, locals()))
    check_loaded(model)
    check_tokenizer(tokenizer)
    names = ruler_tasks(texts([tasks] if isinstance(tasks, str) else tasks, "tasks"))
    limits = EvalOptions(limit=limit, seed=seed, force=force)
    _check(model, options)
    rules = tuple(map(str, options.rules or (model.model.longrope,)))
    essay, digest = _haystack(options.haystack)
    asked = _Samples(tokenizer, essay, limits.seed, limits.limit or _SAMPLES)
    folder = optional(as_path, output, "output")
    started = time.time()
    with ExitStack() as stack:
        kept = None
        if folder is not None:
            directory = expanded(folder)
            stack.enter_context(alone_in(directory))
            kept = LineFile(directory / _IN_FOLDER[2])
            identity = {"model": model_fingerprint(model), "seed": limits.seed, "haystack": digest}
            kept.begin(head_of(GROUP, _SAMPLES_FORMAT, identity), "name another directory with output=DIR")
        scores: dict[tuple[Setting, int, str], list[float]] = {}
        cut = 0
        reading = _Reading(model, tokenizer, kept, limits.force, progress)
        reading.total = len(rules) * len(options.caches) * len(options.lengths) * len(names) * asked.count
        for length in sorted(map(int, options.lengths)):  # one that is too short for a task is refused before all work
            samples = list(asked.make(names, length))
            for rule in rules:
                with _under(model, rule):
                    for bits in options.caches:
                        setting = Setting(rule, _cache_name(bits))
                        for sample, line in reading.read(samples, setting, bits):
                            scores.setdefault((setting, sample.length, sample.task), []).append(line["score"])
                            cut += line["finish_reason"] == "length"
        curve = figures_over_length(_ordered(scores, rules, options.caches))
        results = {
            "like": "RULER's task types; our own words and texts, so not RULER's figures",
            "tasks": names,
            "samples_each": asked.count,
            "seed": limits.seed,
            "haystack": options.haystack,
            "curve": curve,
            "cut": cut,
            "seconds": round(time.time() - started, 1),
            "phi3_mlx_version": version("phi3-mlx"),
        }
        if folder is not None:
            path = directory / _IN_FOLDER[0]
            with disk_faults(path):
                replace_file(path, (json_text(results, indent=2) + "\n").encode())
                draw_curves(curve, directory / _IN_FOLDER[1])
    return results


def is_ruler_task(name: str) -> bool:
    """Whether `ruler` knows a task of this name."""
    return name == GROUP or name in ALL_TASKS


def ruler_tasks(names: Sequence[str]) -> list[str]:
    """The tasks that some names stand for. Raises OptionError for an unknown one."""
    tasks: dict[str, None] = {}
    for name in names:
        if not is_ruler_task(name):
            raise OptionError(f"there is no task {name} like RULER's; choose {GROUP} or some of {', '.join(ALL_TASKS)}")
        tasks |= dict.fromkeys(RULER_TASKS if name == GROUP else [name])
    if not tasks:
        raise OptionError(f"tasks is empty; name {GROUP}, or {EASIEST} for a small model")
    return list(tasks)


class _Sample(NamedTuple):
    task: str
    length: int
    number: int
    puzzle: Puzzle
    prompt: Fitted

    @property
    def digest(self) -> str:
        return sha256(repr(self.prompt.ids).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Samples:
    """Makes the samples of tasks at a length."""

    tokenizer: Tokenizer
    essay: Haystack
    seed: int
    count: int

    def make(self, names: Sequence[str], length: int) -> Iterator[_Sample]:
        fitter = Fitter(self.tokenizer)
        for name in names:
            for number in range(self.count):
                puzzle = ALL_TASKS[name](Seeds(self.seed, length, number), self.essay)
                yield _Sample(name, length, number, puzzle, fitter.fit(puzzle, length, name))


class _Reading:
    """Lets the model answer samples; those that were answered before are taken from the file."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        kept: LineFile | None,
        force: bool,
        progress: Callable[[int, int], None] | None,
    ):
        self._model, self._tokenizer, self._kept, self._force, self._progress = model, tokenizer, kept, force, progress
        self._done, self.total = 0, 0
        lines = [] if kept is None else [line for line in kept.lines if "task" in line]
        self._known = {(line["rule"], line["cache"], line["prompt_hash"]): line for line in lines}

    def read(self, samples: Sequence[_Sample], setting: Setting, bits: Any) -> list[tuple[_Sample, dict[str, Any]]]:
        """The line of each sample. Those of one haystack are read in turn, and what they begin with once.

        `bits`: of keys and values; None: the cache is not quantized.
        """
        lines = {sample: self._known.get((*setting, sample.digest)) for sample in samples}
        new = sorted((sample for sample in samples if lines[sample] is None), key=lambda sample: sample.prompt.ids)
        self._count(len(samples) - len(new))
        alike = any(common_length([*a.prompt.ids], [*b.prompt.ids]) >= LEAST for a, b in pairwise(new))
        asked = [
            (
                sample.prompt.ids,
                Request(max_tokens=sample.puzzle.max_tokens, kv_bits=bits, lookup=0, force=self._force),
            )
            for sample in new
        ]
        for place, answer in answer_each(
            self._model, self._tokenizer, asked, prefixes=PrefixStore() if alike else None, force=self._force
        ):
            sample = new[place]
            line = {
                **setting._asdict(),
                "length": sample.length,
                "task": sample.task,
                "number": sample.number,
                "tokens": len(sample.prompt.ids),
                "depths": [round(needle.depth, 4) for needle in sample.puzzle.needles],
                "references": list(sample.puzzle.references),
                "answer": answer.text,
                "score": sample.puzzle.score(answer.text),
                "finish_reason": answer.finish_reason,
                "prompt_hash": sample.digest,
            }
            if self._kept is not None:
                self._kept.add(line)
            lines[sample] = line
            self._count(1)
        return [(sample, line) for sample, line in lines.items() if line is not None]

    def _count(self, more: int) -> None:
        self._done += more
        if self._progress is not None and more:
            self._progress(self._done, self.total)


@contextmanager
def _under(model: Model, rule: Any) -> Iterator[None]:
    """With LongRoPE's factors chosen by this rule."""
    before = model.model.longrope
    model.model.longrope = rule
    try:
        yield
    finally:
        model.model.longrope = before


def _check(model: Model, options: RulerOptions) -> None:
    context = model.config.max_position_embeddings
    for length in options.lengths:
        if int(length) > context:
            raise OptionError(f"lengths has {int(length):,}, more than the model's context of {context:,} tokens")
    if model.config.longrope is None and options.rules is not None:
        raise OptionError("rules has no effect: this model has no LongRoPE; leave it out")


def _haystack(source: str | None) -> tuple[Haystack, str]:
    """What essays are made of, and what tells it from another."""
    if source is None:
        return material.essay, "made from the seed"
    try:
        sentences = material.sentences_of(read_text(expanded(source)))
    except UnicodeDecodeError as error:
        raise DataError(f"haystack={source!r} is no text in UTF-8") from error
    except OSError as error:
        raise DataError(f"haystack={source!r} cannot be read: {error.strerror}") from error
    if not sentences:
        raise DataError(f"haystack={source!r} has no sentence; give a text")

    def part(rng: Random) -> Iterator[str]:
        return material.repeated(sentences, rng.randrange(len(sentences)))

    return part, sha256(repr(sentences).encode()).hexdigest()[:16]


def _cache_name(bits: Any) -> str:
    if bits is None:
        return "0"
    keys, values = bits
    return str(keys) if keys == values else f"{keys}/{values}"


def _ordered(
    scores: dict[tuple[Setting, int, str], list[float]], rules: Sequence[str], caches: Sequence[Any]
) -> dict[tuple[Setting, int, str], list[float]]:
    """By rule and cache, in the order in which they were asked for, and then by length."""
    settings = [Setting(rule, _cache_name(bits)) for rule in rules for bits in caches]
    return {key: scores[key] for setting in settings for key in scores if key[0] == setting}
