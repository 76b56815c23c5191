"""/v1/completions: raw texts or token ids, continued; their own log-probabilities too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from ..errors import OptionError
from ..generation.answers import Prompt
from ..values import flag, shown, text, whole
from . import protocol
from . import shared_fields as shared
from .asked import Asked, Defaults
from .faults import ApiError
from .limits import Limits
from .protocol import honoured, needed, refused, table_of
from .streams import DONE, StreamEvent
from .tokens import LEAST_LOGPROB, Usage, finite, token_text
from .work import MAX_TOP_LOGPROBS, Begun, Ended, Event, Piece, TokenInfo, Work


def _prompts(value: Any, name: str) -> list[Prompt]:
    """The prompts: a text, several, a list of ids, or several of those."""
    if isinstance(value, str):
        return [text(value, name)]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return [text(item, name) for item in value]
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return [*value]
    raise OptionError(f"{name} is {shown(value)}; expected a text, token ids, or a list of either")


def _max_tokens(value: Any, name: str) -> int:
    """0 is allowed: the prompt is echoed alone."""
    if whole(value, name) < 0:
        raise OptionError(f"{name} {value} is outside its range; give 0 or more")
    return int(value)


COMPLETION_FIELDS = table_of(
    honoured("model", text, "a name that `/v1/models` lists"),
    honoured(
        "prompt", _prompts, "a text, token ids, or several of either; sent as they are, without the chat template"
    ),
    honoured("stream", flag, "the answer as it is made"),
    honoured("stream_options", shared.stream_options, "`include_usage`: a last chunk with the counts of tokens"),
    honoured("max_tokens", _max_tokens, "longest answer; 0 with `echo`: none"),
    *shared.SAMPLING,
    honoured("n", shared.whole_from(1, Limits.answers), "answers to each prompt, which is read once"),
    honoured("best_of", shared.whole_from(1, Limits.answers), "as `n`, and no other number"),
    honoured("logprobs", shared.whole_from(0, MAX_TOP_LOGPROBS), "log-probabilities, and those of the N likeliest"),
    honoured("echo", flag, "the prompt comes first, with its log-probabilities"),
    *shared.FORMS,
    *shared.BOOKKEEPING,
    *refused("suffix", says="no model of the family was trained to fill in"),
)


def read_completions(body: Mapping[str, Any], defaults: Defaults) -> Asked:
    """What a body asks for: a work a prompt. Raises ApiError."""
    values = protocol.honoured_values(COMPLETION_FIELDS, body)
    needed(values, "model", "prompt")
    prompts, n, echo = values["prompt"], values.get("n", 1), values.get("echo", False)
    if values.get("best_of", n) != n:
        raise ApiError(400, "best_of is not supported beside another n", "unsupported_value", "best_of")
    if len(prompts) * n > defaults.limits.answers:
        most = defaults.limits.answers
        message = f"{len(prompts)} prompts times {n} answers are more than {most}; send several requests"
        raise ApiError(400, message, "invalid_value", "n" if n > 1 else "prompt")
    max_tokens = values.get("max_tokens", defaults.request.max_tokens)
    if not max_tokens and (n > 1 or not echo):
        raise ApiError(400, "max_tokens 0 needs echo: true, and no n", "invalid_value", "max_tokens")
    request = protocol.request_of(defaults, COMPLETION_FIELDS, values, max_tokens=max(max_tokens, 1), raw=True)
    if not max_tokens:
        n = 0  # only what the prompts are is told
    works = [
        Work(
            values["model"],
            prompt,
            # Token ids are sent as they are in any case.
            request if isinstance(prompt, str) else replace(request, raw=False),
            n=n,
            top_logprobs=values.get("logprobs"),
            echo=echo,
        )
        for prompt in prompts
    ]
    reply = CompletionReply(works, defaults.fingerprint(values["model"]), usage=shared.wants_usage(values))
    return Asked(works, reply, values.get("stream", False))


class CompletionReply:
    """The answers to some prompts; see `streams.Reply`."""

    last_line = DONE

    def __init__(self, works: list[Work], fingerprint: str, *, usage: bool):
        self._works, self._fingerprint, self._told_usage = works, fingerprint, usage
        self._each = max(works[0].n, 1)  # choices of a prompt
        self._usage = Usage()
        self._id, self._created = f"cmpl-{uuid4().hex}", int(time.time())
        self._choices = [_Choice(index) for index in range(len(works) * self._each)]

    def take(self, number: int, event: Event) -> Iterator[StreamEvent]:
        first = number * self._each
        if isinstance(event, Begun):
            self._usage.begin(event)
            if self._works[number].echo:
                for choice in self._choices[first : first + self._each]:
                    yield from self._more(choice, event.text, event.echo)
                    choice.answer_offset = len(event.text)
        elif isinstance(event, Piece):
            choice = self._choices[first + event.index]
            tokens = [replace(token, offset=token.offset + choice.answer_offset) for token in event.tokens]
            yield from self._more(choice, event.text, tokens)
        elif isinstance(event, Ended):
            choice = self._choices[first + event.index]
            self._usage.made += event.tokens
            choice.reason = event.reason
            yield StreamEvent({**self._head(), "choices": [self._told(choice, "", ())]})

    def end(self) -> Iterator[StreamEvent]:
        if self._told_usage:
            yield StreamEvent({**self._head(), "choices": [], "usage": self._usage.completion()})

    def failed(self, error: ApiError) -> Iterator[StreamEvent]:
        yield StreamEvent(error.body())

    def whole(self) -> dict[str, Any]:
        choices = [self._told(choice, "".join(choice.texts), choice.tokens) for choice in self._choices]
        return {**self._head(), "choices": choices, "usage": self._usage.completion()}

    def _more(self, choice: _Choice, text: str, tokens: Sequence[TokenInfo]) -> Iterator[StreamEvent]:
        choice.texts.append(text)
        choice.tokens += tokens
        scored = self._works[0].top_logprobs is not None and tokens
        if text or scored:
            yield StreamEvent({**self._head(), "choices": [self._told(choice, text, tokens)]})

    def _told(self, choice: _Choice, text: str, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        logprobs = None if self._works[0].top_logprobs is None else _logprobs(tokens)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._works[0].model,
            "system_fingerprint": self._fingerprint,
        }


@dataclass
class _Choice:
    """One answer to one prompt: what is told of it so far."""

    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[TokenInfo] = field(default_factory=list)
    answer_offset: int = 0  # characters of the echoed prompt
    reason: str | None = None


def _logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """Lists of a token's text, number and alternatives, the token itself among them, each as long as the others."""
    return {
        "tokens": [token_text(token.text) for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [None if token.logprob is None else _by_text(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(token: TokenInfo) -> dict[str, float]:
    """Of tokens that look alike the likeliest is told."""
    numbers = {token_text(token.text): finite(token.logprob)}
    for other in token.top:
        text = token_text(other.text)
        numbers[text] = max(finite(other.logprob), numbers.get(text, LEAST_LOGPROB))
    return numbers
