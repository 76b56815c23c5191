"""A run's corpus: shards opened, documents held out, phases laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, OptionError
from ..tuning.run_settings import no_effect
from .mixture import MixedBatches, Phase, tokens_a_row
from .rows import Rows, Sources
from .settings import PretrainSettings, shares
from .shards import TokenShards, tokenizer_fingerprint

if TYPE_CHECKING:
    from ..config import Config
    from ..text.tokenizer import Tokenizer

MAX_LENGTH = 512  # tokens of a row where nothing is said


@dataclass(frozen=True)
class Corpus:
    """The rows to train and to validate on. `tokens_per_character`: of what is validated on."""

    train: Sources
    valid: Sources
    batches: MixedBatches
    fingerprint: dict[str, Any]
    tokens_per_character: float
    notes: tuple[str, ...]


def read_corpus(settings: PretrainSettings, config: Config, tokenizer: Tokenizer) -> Corpus:
    """Open the shards, hold documents out, and lay out the phases."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    first, second = shares(settings.data), shares(settings.phase2_data)
    folders = [*dict.fromkeys([*first, *second])]
    opened = {folder: _open(folder, fingerprint) for folder in folders}
    valid = None if settings.valid is None else _open(settings.valid, fingerprint)
    for folder, shards in opened.items():
        if valid is not None and shards.fingerprint == valid.fingerprint:
            raise DataError(f"{folder} is both trained and validated on; give others, or leave valid out")
    length, rng = settings.max_length or MAX_LENGTH, np.random.default_rng(settings.seed)
    rows, held, held_counts = [], [], np.zeros(2)
    for n, folder in enumerate(folders):
        shards = opened[folder]
        order = rng.permutation(len(shards)).astype(np.int32)
        count = 0 if valid is not None else round(len(shards) * settings.holdout)
        rows.append(Rows(shards, np.sort(order[count:]), length, settings.seed + n, config.vocab_size))
        if not len(rows[-1]):
            raise DataError(f"{folder} has no document to train on of two tokens or more; give more text")
        if count:
            held.append(Rows(shards, np.sort(order[:count]), length, settings.seed + n, config.vocab_size))
            held_counts += _counts(shards, order[:count], tokenizer)
    notes: tuple[str, ...] = ()
    if valid is not None:
        everything = np.arange(len(valid), dtype=np.int32)
        held = [Rows(valid, everything, length, 0, config.vocab_size)]
        held_counts = _counts(valid, everything, tokenizer)
    elif held:
        total = sum(map(len, opened.values()))
        count = sum(round(len(shards) * settings.holdout) for shards in opened.values())
        notes = (f"{count:,} of {total:,} documents were held out to validate on",)
    elif settings.holdout:
        notes = (f"too few documents to hold out {settings.holdout:.1%}: nothing is validated",)
    if not any(map(len, held)):
        _check_unvalidated(settings)
    train = Sources(rows)
    identity = {
        "shards": [opened[folder].fingerprint for folder in folders],
        "valid": None if valid is None else valid.fingerprint,
        "shares": [[shares_.get(folder, 0.0) for folder in folders] for shares_ in (first, second)],
    }
    mixes = [tuple(mix.get(folder, 0.0) for folder in folders) for mix in (first, second or first)]
    batches = _batches(settings, rows, mixes)
    return Corpus(
        train,
        Sources(held) if held else _nothing(opened[folders[0]], config),
        batches,
        identity,
        float(held_counts[0] / held_counts[1]) if held_counts[1] else 0.0,
        notes,
    )


def _check_unvalidated(settings: PretrainSettings) -> None:
    """DataError or OptionError if a run that has no rows to validate on was to have some."""
    if settings.valid is not None:
        raise DataError(f"{settings.valid} has no document to validate on of two tokens or more; give more text")
    for name in ("patience", "samples"):
        if value := getattr(settings, name):
            raise no_effect(name, value, "without validation: too few documents to hold out, so give valid=DIR")


def _nothing(shards: TokenShards, config: Config) -> Sources:
    return Sources([Rows(shards, np.zeros(0, np.int32), 1, 0, config.vocab_size)])


def _batches(settings: PretrainSettings, rows: list[Rows], mixes: list[tuple[float, ...]]) -> MixedBatches:
    counts, tokens = [len(source) for source in rows], [int(source.lengths.sum()) for source in rows]
    batch = settings.batch_size
    if settings.steps is not None:
        steps = settings.steps
    elif settings.tokens is not None:
        start = settings.phase2_from if settings.phase2_data else 1.0
        mean = sum(
            share * tokens_a_row(mix, counts, tokens) for share, mix in zip((start, 1 - start), mixes, strict=True)
        )
        steps = max(1, round(settings.tokens / (mean * batch)))
    else:
        steps = max(1, round(settings.epochs * sum(counts) / batch))
    if (settings.phase2_data or settings.phase2_rate is not None) and not 0 < settings.phase2_step(steps) < steps:
        raise OptionError(
            f"phase2_from {settings.phase2_from:g} of {steps} steps leaves one of the two phases none; give a share "
            "between, or more steps"
        )
    phases = [Phase(0, mixes[0])]
    if settings.phase2_data:
        phases.append(Phase(settings.phase2_step(steps), mixes[1]))
    return MixedBatches(counts, tokens, phases, batch_size=batch, steps=steps, seed=settings.seed)


def _counts(shards: TokenShards, documents: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """(tokens that are predicted, characters that they say) of documents of two tokens or more.

    A document's first token is predicted by nothing. It is BOS, or says some characters, which do not count.
    """
    documents = documents[shards.lengths[documents] > 1]
    firsts, times = np.unique(shards.first_ids(documents), return_counts=True)
    given = sum(
        len(tokenizer.decode([token])) * count for token, count in zip(firsts.tolist(), times.tolist(), strict=True)
    )
    sums = [int(sizes[documents].sum(dtype=np.int64)) for sizes in (shards.lengths, shards.characters)]
    return np.array([sums[0] - len(documents), sums[1] - given], float)


def _open(folder: str, fingerprint: str) -> TokenShards:
    shards = TokenShards(folder)
    if shards.tokenizer != fingerprint:
        raise DataError(
            f"{folder} was made with another tokenizer than the model's; name that with tokenizer=NAME, or make the "
            "shards again"
        )
    return shards
