"""Records to token ids with their loss mask, and what becomes of those that are too long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import ChatError, DataError, OptionError, PromptError
from ..text.chat import render_training_chat
from .rows import Record

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

TrainOn = Literal["answers", "last", "all"]
Overflow = Literal["drop", "truncate", "split"]


@dataclass(frozen=True)
class Example:
    """One sequence to train on. `trained[i]` says whether the model should learn to say ids[i] after ids[:i].

    The first is never trained (nothing stands before it) and the last always is: what follows it teaches nothing.
    """

    ids: np.ndarray  # int32 (n,)
    trained: np.ndarray  # bool (n,)
    source: str  # "file:line"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What is read of it; an example of a preference has more."""
        return (self,)


@dataclass
class Encoded:
    """The examples, and what was left out or cut and why."""

    examples: list[Any] = field(default_factory=list)  # `Example`, or what the objective has in its place
    lengths: list[int] = field(default_factory=list)  # of all records, in tokens, before anything was cut
    dropped: list[str] = field(default_factory=list)  # sources: too long, or nothing left to learn after a cut
    empty: list[str] = field(default_factory=list)  # of what has nothing to learn, however short
    truncated: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    _noted: dict[str, str] = field(default_factory=dict)  # sentences, and the source that each is about first

    @property
    def notes(self) -> list[str]:
        """Sentences about the data."""
        return [f"{note} (first in {source})" for note, source in self._noted.items()]

    def note(self, sentence: str, source: str) -> None:
        """Keep a sentence about a record, once."""
        self._noted.setdefault(sentence, source)

    @property
    def trained_tokens(self) -> int:
        return sum(int(sequence.trained.sum()) for example in self.examples for sequence in example.sequences)

    def fingerprint(self) -> str:
        """A hash of ids and masks: equal data after equal treatment."""
        digest = hashlib.sha256()
        for example in self.examples:
            for sequence in example.sequences:
                digest.update(len(sequence).to_bytes(8, "little"))
                digest.update(sequence.ids.tobytes())
                digest.update(sequence.trained.tobytes())
            if (label := getattr(example, "desirable", None)) is not None:
                digest.update(bytes([label]))
        return digest.hexdigest()[:32]


def encode_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overflow: Overflow = "drop",
    train_on: TrainOn = "answers",
) -> Encoded:
    """Token ids and loss masks of the records.

    `train_on`: "answers" (every assistant turn), "last" (only the last one) or "all" (every token; a text always is).
    `overflow`, for examples of more than `max_length` tokens: "drop" them, "truncate" their end, or "split" them into
    pieces that overlap by one token, so that every trained token is still predicted once.
    Raises DataError naming the record whose chat cannot be rendered.
    """
    if train_on not in get_args(TrainOn):
        raise OptionError(f"train_on {train_on!r} is unknown; choose {', '.join(get_args(TrainOn))}")
    if overflow not in get_args(Overflow):
        raise OptionError(f"overflow {overflow!r} is unknown; choose {', '.join(get_args(Overflow))}")
    encoded = Encoded()
    for record in records:
        whole = encode_record(record, tokenizer, train_on, partial(encoded.note, source=record.source))
        encoded.lengths.append(len(whole))
        if len(whole) <= max_length:
            pieces = [whole]
        elif overflow == "drop":
            pieces = []
        elif overflow == "truncate":
            pieces = [truncated(whole, max_length)]
        else:
            step = max_length - 1
            pieces = [_cut(whole, first, first + max_length) for first in range(0, len(whole) - 1, step)]
        learnt = [piece for piece in map(_trim, pieces) if len(piece)]
        encoded.examples += learnt
        if not learnt:
            (encoded.dropped if len(whole) > max_length else encoded.empty).append(record.source)
        elif len(whole) > max_length:
            (encoded.truncated if overflow == "truncate" else encoded.split).append(record.source)
    return encoded


def encode_record(record: Record, tokenizer: Tokenizer, train_on: TrainOn, notify: Callable[[str], None]) -> Example:
    """The ids of a record and what of them is trained, of whatever length; see `encode_records`.

    Of a text in which the tokenizer sees nothing, such as zero-width spaces, there are none.
    """
    if record.messages is None:
        ids = tokenizer.encode(record.text or "", special=True)
        if not ids:
            return Example(np.zeros(0, np.int32), np.zeros(0, bool), record.source)
        if tokenizer.add_bos_token:
            ids = tokenizer.with_bos(ids)
        eos = tokenizer.eos_token_id
        # A text teaches where it ends too, unless it says so itself.
        if eos is not None and ids[-1] not in tokenizer.stop_ids:
            ids.append(eos)
        return Example(np.array(ids, np.int32), np.ones(len(ids), bool), record.source)
    ends = tuple(end for i in tokenizer.stop_ids if (end := tokenizer.id_to_token(i)))
    for message in record.messages:
        if message["role"] == "assistant" and ends and message["content"].rstrip().endswith(ends):
            notify("an answer ends in the text of a control token, which is learnt as text: the template adds its own")
    try:
        ids, turns = render_training_chat(tokenizer, record.messages, tools=record.tools, notify=notify)
    except (ChatError, PromptError) as error:
        raise DataError(f"{record.source}: {error}") from error
    turn = np.array(turns)
    trained = np.ones(len(ids), bool) if train_on == "all" else turn > 0
    if train_on == "last":
        trained &= turn == turn.max()
    trained &= ~np.isin(turn, [*record.unlearnt])
    return _trim(Example(np.array(ids, np.int32), trained, record.source))


def truncated(example: Example, max_length: int) -> Example:
    """Its first tokens, at most `max_length`; empty if none of them is trained."""
    return _trim(_cut(example, 0, max_length))


def _cut(example: Example, first: int, end: int) -> Example:
    return Example(example.ids[first:end], example.trained[first:end], example.source)


def _trim(example: Example) -> Example:
    """Without what follows the last trained token, and with the first one never trained; empty if nothing is left."""
    trained = example.trained.copy()
    trained[:1] = False
    places = np.flatnonzero(trained)
    end = int(places[-1]) + 1 if len(places) else 0
    return Example(example.ids[:end], trained[:end], example.source)


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Counts of lengths in ranges whose ends are powers of two: (first, last, count), without empty ends."""
    if not lengths:
        return []
    powers = [0 if n < 1 else (n - 1).bit_length() for n in lengths]
    return [(1 if p == 0 else 2 ** (p - 1) + 1, 2**p, powers.count(p)) for p in range(min(powers), max(powers) + 1)]
