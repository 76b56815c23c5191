"""Lines and examples of preferences: two answers to one prompt, or one answer and whether it is a good one.

A line is a JSON object of one of these forms; answers are texts or lists of messages, as the prompt is:

    {"prompt" | "messages", "chosen", "rejected"}
    {"chosen", "rejected"}                     whole conversations; the prompt is what both begin with, and a "prompt"
                                               or "messages" beside them only repeats it, as UltraFeedback has it
    {"prompt" | "messages", "completion", "label"}     for KTO: true or 1 for an answer as it should be

"system" and "tools" may stand beside them, as in all training data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import DataError
from ..fields import kind_of, shorten
from .examples import Encoded, Example, encode_record, truncated
from .rows import SPEAKERS, Record, for_another_objective, read_row

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

Fit = Literal["drop", "truncate"]
_PAIRED = 'expected "prompt" (or "messages"), "chosen" and "rejected"'
_LABELLED = 'expected "prompt" (or "messages"), "completion" and "label"'
_PROMPT_KEYS = {"prompt", "messages", "conversations"}
_ASKING = ("user", "system")


@dataclass(frozen=True)
class PairRecord:
    """One line: a conversation that ends in the better answer, and the same with the worse one."""

    source: str
    chosen: Record
    rejected: Record


@dataclass(frozen=True)
class LabelledRecord:
    """One line: a conversation, and whether its answer is one to give."""

    source: str
    answer: Record
    desirable: bool


@dataclass(frozen=True)
class PreferencePair:
    """Two sequences that begin with the same `prompt` tokens; what is trained of each is its answer, behind them.

    ORPO trains the prompt of `chosen` too, but for its first token.
    """

    chosen: Example
    rejected: Example
    prompt: int

    @property
    def source(self) -> str:
        return self.chosen.source

    @property
    def sequences(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected

    @property
    def scored(self) -> tuple[Example, ...]:
        """The sequences whose log-probabilities under the reference an objective may ask for."""
        return self.sequences


@dataclass(frozen=True)
class Labelled:
    """An answer and its label; `other` is the prompt with the answer to another one, by which KTO estimates the KL."""

    answer: Example
    desirable: bool
    other: Example

    @property
    def source(self) -> str:
        return self.answer.source

    @property
    def sequences(self) -> tuple[Example, ...]:
        return (self.answer,)

    @property
    def scored(self) -> tuple[Example, ...]:
        return self.answer, self.other


def read_pair(value: Any, source: str, unused: dict[str, str]) -> PairRecord:
    """The pair that a line's value is. Raises DataError that names the key, without the source; see `read_row`."""
    row = _row(value, ("chosen", "rejected"), _PAIRED)
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    if type(chosen) is not type(rejected):
        raise DataError(f"'chosen' is {kind_of(chosen)} and 'rejected' {kind_of(rejected)}; expected two of a kind")
    if not _PROMPT_KEYS & row.keys() or (isinstance(chosen, list) and _speaker(chosen[:1]) in _ASKING):
        prompt, chosen, rejected = _without_prompt(chosen, rejected)
        row = {**_unless_said(row, prompt + chosen), "messages": prompt}
    records = [_conversation(row, answer, name, source, unused) for answer, name in
               ((chosen, "chosen"), (rejected, "rejected"))]  # fmt: skip
    if records[0] == records[1]:
        raise DataError("'chosen' and 'rejected' say the same; expected two answers that differ")
    return PairRecord(source, *records)


def read_labelled(value: Any, source: str, unused: dict[str, str]) -> LabelledRecord:
    """The labelled answer that a line's value is. Raises DataError as `read_pair` does."""
    row = _row(value, ("completion", "label"), _LABELLED)
    label, answer = row.pop("label"), row.pop("completion")
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise DataError(f"'label' is {shorten(label)}; expected true or false")
    if not _PROMPT_KEYS & row.keys():
        raise DataError(f"'prompt' is missing; {_LABELLED}")
    return LabelledRecord(source, _conversation(row, answer, "completion", source, unused), bool(label))


def _row(value: Any, needed: tuple[str, ...], expected: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"is {kind_of(value)}; expected a JSON object")
    row = {key: part for key, part in value.items() if part is not None}
    for key in needed:
        if key not in row:
            missing = "null" if key in value else "missing"
            raise DataError(f"{key!r} is {missing}; {expected}{for_another_objective(row)}")
    if "text" in row or ("completion" in row and "completion" not in needed):
        other = "text" if "text" in row else "completion"
        raise DataError(f"has {other!r} beside {needed[0]!r}; {expected}")
    return row


def _without_prompt(chosen: Any, rejected: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages that two conversations begin with, and what each goes on with."""
    if not isinstance(chosen, list):
        raise DataError(f"'prompt' is missing; {_PAIRED}, or whole conversations as lists of messages")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    # An answer that begins as the other does is the model's as well.
    while same and _speaker(chosen[same - 1 :]) == "assistant":
        same -= 1
    answers = chosen[same:], rejected[same:]
    if not same or any(_speaker(answer) in _ASKING for answer in answers):
        raise DataError(
            "'chosen' and 'rejected' have no prompt in common; expected the same messages before both answers"
        )
    return chosen[:same], *answers


def _unless_said(row: Mapping[str, Any], conversation: list[Any]) -> dict[str, Any]:
    """A row without the prompts that whole conversations have beside them, which must repeat what is said there."""
    said = [message.get("content", message.get("value")) for message in conversation if isinstance(message, Mapping)]
    for form in _PROMPT_KEYS & row.keys():
        prompt = row[form]
        if isinstance(prompt, str):
            repeats = prompt.strip() in [text.strip() for text in said if isinstance(text, str)]
        else:
            repeats = isinstance(prompt, list) and prompt == conversation[: len(prompt)]
        if not repeats:
            raise DataError(f"{form!r} is not how the conversation in 'chosen' begins; leave one of them out")
    return {key: part for key, part in row.items() if key not in _PROMPT_KEYS}


def _speaker(messages: list[Any]) -> str | None:
    """The role of the first message, if it has one."""
    first = messages[0] if messages else None
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return SPEAKERS.get(role) if isinstance(role, str) else None


def _conversation(row: Mapping[str, Any], answer: Any, name: str, source: str, unused: dict[str, str]) -> Record:
    """The prompt of a row and an answer to it, of which only the answer is learnt."""
    form, *others = sorted(_PROMPT_KEYS & row.keys())
    if others:
        raise DataError(f"has both {form!r} and {others[0]!r}; expected one of them, to know what is answered")
    prompt = row[form]
    rest = {key: part for key, part in row.items() if key != form}
    if not isinstance(answer, (str, list)):
        raise DataError(f"{name!r} is {kind_of(answer)}; expected a text or a list of messages")
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise DataError(f"{name!r} is empty; expected an answer")
    turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    said = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not said:
        raise DataError(f"{form!r} is an empty list; expected the messages that are answered")
    try:
        return read_row({"prompt": said, "completion": turns, **rest}, source, unused)
    except DataError as error:
        told = str(error).replace("'completion'", repr(name)).replace("completion[", f"{name}[")
        raise DataError(told.replace("'prompt'", repr(form)).replace("prompt[", f"{form}[")) from None


def encode_pairs(
    records: Iterable[PairRecord], tokenizer: Tokenizer, *, max_length: int, overflow: Fit = "drop", whole: bool = False
) -> Encoded:
    """Token ids and masks of both answers of each record.

    `whole`: the prompt before the chosen answer is trained too. `overflow`, for pairs of which an answer ends behind
    `max_length` tokens: "drop" them, or "truncate" both answers. Raises DataError naming the record.
    """
    encoded = Encoded()

    def encode(record: PairRecord) -> tuple[list[Example], PreferencePair | None]:
        chosen, rejected = (encode_record(r, tokenizer, "answers", partial(encoded.note, source=record.source))
                            for r in (record.chosen, record.rejected))  # fmt: skip
        prompt = _first_trained(chosen)
        if prompt != _first_trained(rejected) or not np.array_equal(chosen.ids[:prompt], rejected.ids[:prompt]):
            raise DataError(f"{record.source}: the prompt is not the same before both answers, once they are tokens")
        if np.array_equal(chosen.ids, rejected.ids):
            raise DataError(f"{record.source}: 'chosen' and 'rejected' are the same, once they are tokens")
        better, worse = truncated(chosen, max_length), truncated(rejected, max_length)
        if not len(better) or not len(worse) or np.array_equal(better.ids, worse.ids):
            return [chosen, rejected], None
        if whole:
            places = np.arange(len(better))
            better = dataclasses.replace(better, trained=better.trained | ((places > 0) & (places < prompt)))
        return [chosen, rejected], PreferencePair(better, worse, prompt)

    for record in records:
        _take(encoded, record.source, *encode(record), max_length=max_length, overflow=overflow)
    return encoded


def encode_labelled(
    records: Iterable[LabelledRecord], tokenizer: Tokenizer, *, max_length: int, batch_size: int, overflow: Fit = "drop"
) -> Encoded:
    """Token ids and masks of the answers, and each prompt with the answer of another record.

    That is the answer of the record before it among each `batch_size`; the first of them has the last one's, as in TRL.
    `overflow`: see `encode_pairs`.
    """
    encoded = Encoded()
    for record in records:
        whole = encode_record(record.answer, tokenizer, "answers", partial(encoded.note, source=record.source))
        fitting = truncated(whole, max_length)
        made = Labelled(fitting, record.desirable, fitting) if len(fitting) else None
        _take(encoded, record.source, [whole], made, max_length=max_length, overflow=overflow)
    kept: list[Labelled] = encoded.examples
    for first in range(0, len(kept), batch_size):
        group = kept[first : first + batch_size]
        for n, example in enumerate(group):
            other = _answered(example.answer, group[n - 1].answer, max_length)
            kept[first + n] = dataclasses.replace(example, other=other)
    return encoded


def _take(
    encoded: Encoded, source: str, whole: list[Example], made: Any | None, *, max_length: int, overflow: Fit
) -> None:
    longest = max(map(len, whole))
    encoded.lengths.append(longest)
    cut = longest > max_length
    if made is None or (cut and overflow == "drop"):
        (encoded.dropped if cut else encoded.empty).append(source)
        return
    encoded.examples.append(made)
    if cut:
        encoded.truncated.append(source)


def _first_trained(example: Example) -> int:
    """The place of the first token that is learnt. DataError for an answer of which the tokenizer makes none."""
    places = np.flatnonzero(example.trained)
    if not len(places):
        raise DataError(f"{example.source}: an answer has no tokens to learn; give one with text")
    return int(places[0])


def _answered(question: Example, answer: Example, max_length: int) -> Example:
    """The prompt of one example with the answer of another; at least one token of it, whatever `max_length` says."""
    prompt, first = _first_trained(question), _first_trained(answer)
    end = max(prompt + 1, min(max_length, prompt + len(answer) - first))
    ids = np.concatenate([question.ids[:prompt], answer.ids[first:]])[:end]
    trained = np.concatenate([question.trained[:prompt], answer.trained[first:]])[:end]
    return Example(ids, trained, question.source)
