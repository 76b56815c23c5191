"""One answer: the job that the engine makes its tokens of, and the text that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.jobs import Job
from ..engine.processors import Bias, Constraint, Processor
from ..engine.tokens import FinishReason, Token
from ..errors import OptionError
from ..text.grammar import AnswerMatcher, Form, matchers
from ..text.spans import encode_after
from ..text.stops import Stops
from .request import Request

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


class Answer:
    """One answer while it is made: `job` is what the engine is asked to do, `take` turns its tokens into text.

    `stops` end it, and are shared by the answers of a request.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job, stops: Stops):
        self.job = job
        self._decoder, self._finder, self._stops = tokenizer.stream(), stops.finder(), stops

    def follow(self, prompt: Sequence[int]) -> None:
        """Let the text be one that stands right after the prompt's: a space between the two is kept."""
        for token in prompt:
            self._decoder.add(token)
        self._decoder.finish()

    def take(self, token: Token) -> tuple[str, FinishReason | None]:
        """The text that one more token makes certain, and why the answer ends with it, if it does.

        Where a stop string ends it the engine does not know, so its row must be finished.
        """
        reason = token.finish_reason
        hidden = self._stops.hidden.get(token.id, "")
        text = "" if token.id in self._stops.ids else self._decoder.add(token.id)
        if reason or hidden:
            text += self._decoder.finish()
        text, hit = self._finder.add(text, hidden)
        if hit:
            return text, "stop"
        return text + (self._finder.finish() if reason else ""), reason


def begin_answers(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], request: Request, form: Form | None = None
) -> list[Answer]:
    """An answer to begin for each prompt, a list of token ids; all that they have in common is made once.

    `form`: what the answers must be, in place of what the request says.
    Raises OptionError for a form that cannot be followed, and for a bias of ids outside the vocabulary.
    """
    stops, bias = Stops(tokenizer, request.stop or ()), _bias(tokenizer, request)
    as_wholes = request.sampling().takes_likeliest and not bias and form in (None, request.form)
    scored = request.choices if as_wholes else None
    form = form or request.form
    forms: Sequence[AnswerMatcher | None] = [None] * len(prompts)
    if form is not None and scored is None:
        forms = matchers(form, tokenizer, len(prompts))
    answers = []
    for ids, matcher in zip(prompts, forms, strict=True):
        processors: list[Processor] = bias if matcher is None else [*bias, Constraint(matcher)]
        job = Job(
            ids,
            request.max_tokens,
            request.sampling(),
            stops.ids,
            kv_bits=request.cache_bits(),
            lookup=request.lookup,
            processors=processors,
            choices=[encode_after(tokenizer, ids, choice) for choice in scored or ()],
        )
        answers.append(Answer(tokenizer, job, stops))
    return answers


def _bias(tokenizer: Tokenizer, request: Request) -> list[Processor]:
    """The processor of `logit_bias`, none without it. OptionError for ids outside the vocabulary."""
    biases = request.biases()
    if not biases:
        return []
    if max(biases) >= tokenizer.vocab_size:
        raise OptionError(
            f"logit_bias has token id {max(biases)}, outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )
    return [Bias(biases)]
