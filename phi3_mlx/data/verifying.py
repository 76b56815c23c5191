"""Whether a record that a model made is one to keep, by rules of its text and by a second look of the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import OptionError
from ..generation.answering import answer_each
from ..generation.answers import encode_prompt
from ..generation.request import Request
from ..generation.scoring import batch_score
from ..models.decoder import Model
from .kinds import Parts, Subject, SynthesisKind
from .quality import REPEATS, RULES, TextParts
from .shingles import words_in
from .synthesis_options import SynthesisOptions

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_AGAIN = '{asked}\n\nAnswer in a few words, with JSON that has the key "answer".'
_FIGURE_DIGITS = 4  # of figures in records


class Verdict(NamedTuple):
    """Why a record is refused ("": it is kept), what was found out about it, and how many tokens that took."""

    reason: str
    facts: dict[str, Any]
    tokens: int = 0


def check_of(kind: SynthesisKind, options: SynthesisOptions) -> str:
    """How records are verified. Raises OptionError for a way that the kind has not."""
    check = options.verify or kind.checks[0]
    if check not in kind.checks:
        raise OptionError(f"verify {check!r} is not for {options.kind}; give {' or '.join(kind.checks)}")
    return check


def over_bounds(kind: SynthesisKind, options: SynthesisOptions, made: Parts) -> Verdict | None:
    """The first text beyond its bound, which the schema may have ended within a sentence; None if there is none.

    `made`: the texts with the white space around them, as they were made.
    """
    for key, bound in kind.bounds(options).items():
        if len(made[key]) > bound:
            return Verdict("longer than max_characters", {"part": key, "bound": f"at most {bound}"})
    return None


def broken_rule(kind: SynthesisKind, options: SynthesisOptions, parts: Parts) -> Verdict | None:
    """The first rule that texts break: of emptiness, length, repetition; None if they break none."""
    for key, text in parts.items():
        if not text:
            return Verdict(f"empty {key}", {})
    if "rejected" in parts and words_in(parts["chosen"]) == words_in(parts["rejected"]):
        return Verdict("equal answers", {})
    least = kind.least_words if options.min_words is None else options.min_words
    most = RULES["words"].most if options.max_words is None else options.max_words
    rules = {"words": replace(RULES["words"], least=least, most=most), **(REPEATS if kind.no_repeats else {})}
    body = TextParts(parts[kind.body])
    for name, rule in rules.items():
        if not rule.holds(value := rule.measure(body)):
            return Verdict(name, {"value": round(value, _FIGURE_DIGITS), "bound": rule.said})
    return None


class Verifier:
    """The model's second look at what it made."""

    def __init__(self, model: Model, tokenizer: Tokenizer, kind: SynthesisKind, options: SynthesisOptions):
        self._model, self._tokenizer = model, tokenizer
        self._kind, self._options = kind, options
        self._check = check_of(kind, options)
        schema = kind.schema(options)
        schema |= {"required": ["answer"], "properties": {"answer": schema["properties"].get("answer", {})}}
        self._again = Request(max_tokens=options.max_tokens, schema=json.dumps(schema), lookup=0)

    def verdicts(self, made: Sequence[tuple[Parts, Subject]]) -> list[Verdict]:
        """One for each record, in their order. Raises MemoryLimitError."""
        if self._check == "none" or not made:
            return [Verdict("", {}) for _ in made]
        asked = [self._kind.asked(parts, subject) for parts, subject in made]
        check = self._recomputed if self._check == "recompute" else self._scored
        return check(asked, [parts for parts, _ in made])

    def _recomputed(self, asked: Sequence[str], made: Sequence[Parts]) -> list[Verdict]:
        """The answer given again at temperature 0, by a model that does not see the first."""
        prompts = [encode_prompt(self._tokenizer, _AGAIN.format(asked=question)) for question in asked]
        verdicts = [Verdict("too long to verify", {}) for _ in made]
        fitting = [n for n, ids in enumerate(prompts) if fits(self._model, len(ids), self._options)]
        answers = answer_each(self._model, self._tokenizer, [(prompts[n], self._again) for n in fitting])
        for place, answer in answers:
            number = fitting[place]
            second = "" if answer.finish_reason == "length" else json.loads(answer.text)["answer"].strip()
            second = second.encode("utf-8", "replace").decode()  # half a character may have been escaped
            share = round(words_in_common(made[number]["answer"], second), _FIGURE_DIGITS)
            reason = "" if share >= self._options.agreement else "another answer"
            verdicts[number] = Verdict(reason, {"second_answer": second, "agreement": share}, answer.tokens)
        return verdicts

    def _scored(self, asked: Sequence[str], made: Sequence[Parts]) -> list[Verdict]:
        """The mean log-probability of a token of each answer behind its prompt."""
        keys = ("chosen", "rejected") if "rejected" in self._kind.parts else (self._kind.body,)
        verdicts = [Verdict("too long to verify", {}) for _ in made]
        lengths = [len(encode_prompt(self._tokenizer, prompt)) for prompt in asked]
        longest = [max(len(self._tokenizer.encode(parts[key])) for key in keys) for parts in made]
        fitting = [n for n in range(len(made)) if lengths[n] + longest[n] < self._model.config.max_position_embeddings]
        scores = batch_score(
            self._model,
            self._tokenizer,
            [(asked[n], [made[n][key] for key in keys]) for n in fitting],
        )
        for number, of_answers in zip(fitting, scores, strict=True):
            means = [round(score.total / len(score.tokens), _FIGURE_DIGITS) for score in of_answers]
            facts = {f"{key}_logprob": mean for key, mean in zip(keys, means, strict=True)}
            if len(means) == 2:
                reason = "" if means[0] > means[1] else "the rejected answer is likelier"
            else:
                reason = "" if means[0] >= self._options.min_logprob else "unlikely answer"
            verdicts[number] = Verdict(reason, facts)
        return verdicts


def fits(model: Model, prompt: int, options: SynthesisOptions) -> bool:
    """Whether a prompt of `prompt` tokens and the longest answer are within the model's context."""
    return prompt + options.max_tokens <= model.config.max_position_embeddings


def words_in_common(first: str, second: str) -> float:
    """F1 of the words of two texts: 1 for the same words, 0 for none in common."""
    counts = [Counter(words_in(text)) for text in (first, second)]
    common = (counts[0] & counts[1]).total()
    return 2 * common / max(counts[0].total() + counts[1].total(), 1)
