"""What a model can be asked to make: the prompt, the JSON of its answer, and the record that training reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import OptionError
from .synthesis_options import SynthesisOptions

Parts = Mapping[str, str]  # the texts of an answer, by their keys
# Characters that a text may go on beyond its bound, so that the bound itself changes no token: where few characters are
# left, only short tokens fit, and the end of the text.
_BEYOND = 32


class Subject(NamedTuple):
    """What a record is about: a topic, or (is_seed) a text that it is made from."""

    source: str  # "file:line"
    text: str
    is_seed: bool


@dataclass(frozen=True)
class SynthesisKind:
    """A kind of record. `parts` are the keys of the answer with the most characters of each, `body` the main one.

    `asked` is what the user says in the record, before the answers; `checks` are the ways to verify, the usual one
    first.
    """

    task: str
    parts: Mapping[str, int]
    body: str
    checks: tuple[str, ...]
    record: Callable[[Parts, Subject], dict[str, Any]]
    asked: Callable[[Parts, Subject], str] = field(default=lambda parts, subject: "")
    least_words: int = 1
    no_repeats: bool = False

    def bounds(self, options: SynthesisOptions) -> dict[str, int]:
        """The most characters of each text of an answer that is kept."""
        most = options.max_characters
        return {key: usual if most is None else most for key, usual in self.parts.items()}

    def schema(self, options: SynthesisOptions) -> dict[str, Any]:
        """The JSON schema of an answer: it ends a text, wherever that is, some characters beyond its bound."""
        longest = {key: bound + _BEYOND for key, bound in self.bounds(options).items()}
        return {
            "type": "object",
            "properties": {key: {"type": "string", "minLength": 1, "maxLength": n} for key, n in longest.items()},
            "required": [*self.parts],
            "additionalProperties": False,
        }

    def template(self, *, seeds: bool) -> str:
        """The usual prompt, with {topic} or {text} where the subject goes."""
        head = "Read this text:\n\n{text}" if seeds else "The topic is: {topic}"
        keys = " and ".join(f'"{key}"' for key in self.parts)
        return f"{head}\n\n{self.task} Answer with JSON that has the keys {keys}."

    def read(self, answer: str) -> dict[str, str]:
        """The texts of a whole answer, as they were made."""
        given = json.loads(answer)
        return {key: given[key] for key in self.parts}


def _questioned(parts: Parts, subject: Subject) -> str:
    return f"{subject.text}\n\n{parts['question']}" if subject.is_seed else parts["question"]


def _turns(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


KINDS = {
    "instructions": SynthesisKind(
        "Write one instruction about it that a person could give to an assistant, complete in itself, and then the "
        "assistant's response.",
        {"instruction": 600, "response": 2000},
        "response",
        ("none", "score"),
        lambda parts, subject: _turns(parts["instruction"], parts["response"]),
        lambda parts, subject: parts["instruction"],
    ),
    "passages": SynthesisKind(
        "Write a passage of a textbook about it, which explains it clearly, step by step and with an example, to a "
        "reader who knows nothing of it.",
        {"title": 120, "passage": 3000},
        "passage",
        ("none",),
        lambda parts, subject: {"text": f"{parts['title']}\n\n{parts['passage']}"},
        least_words=30,
        no_repeats=True,
    ),
    "questions": SynthesisKind(
        "Write one question about it that has one short and certain answer, and then the answer.",
        {"question": 300, "answer": 300},
        "answer",
        ("recompute", "score", "none"),
        lambda parts, subject: _turns(_questioned(parts, subject), parts["answer"]),
        _questioned,
    ),
    "preferences": SynthesisKind(
        "Write one instruction about it that a person could give to an assistant, complete in itself, then a good "
        "response, which is true and helpful, and a poor one.",
        {"instruction": 600, "chosen": 1500, "rejected": 1500},
        "chosen",
        ("score", "none"),
        lambda parts, subject: {
            "prompt": parts["instruction"],
            "chosen": parts["chosen"],
            "rejected": parts["rejected"],
        },
        lambda parts, subject: parts["instruction"],
    ),
}  # fmt: skip


def prompt_of(template: str, subject: Subject) -> str:
    """The template with the subject in its place, once: braces in the subject are only braces."""
    return template.replace(_place(subject.is_seed), subject.text)


def checked_template(template: str, *, seeds: bool) -> str:
    """A template that has a place for the subject. Raises OptionError."""
    place = _place(seeds)
    if place not in template:
        raise OptionError(
            f"prompt has no {place}, where {'the seed text' if seeds else 'the topic'} goes; write it there"
        )
    return template


def _place(seeds: bool) -> str:
    return "{text}" if seeds else "{topic}"
