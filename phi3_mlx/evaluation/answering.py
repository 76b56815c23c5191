"""Many prompts answered, some at a time: each by its own request, with what they begin with read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.machine import bounded_run
from ..engine.prefixes import PrefixStore
from ..engine.rows import Row
from ..engine.scheduler import Scheduler
from ..engine.tokens import FinishReason
from ..errors import OptionError
from ..generation.answer import Answer, begin_answers
from ..generation.request import Request
from ..models.decoder import Model

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_ANSWERS_AT_ONCE = 16  # answers: weights are read once for all of them, and each holds a cache
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What tasks say of searches and backends that we have not, with the value that changes nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}


@dataclass(frozen=True)
class FinishedAnswer:
    """An answer, without what ended it, and why it ended ("length": its budget was used up)."""

    text: str
    finish_reason: FinishReason


def harness_request(given: Mapping[str, Any], *, max_tokens: int, seed: int | None = None) -> Request:
    """What a task of lm-eval asks an answer with (`generation_kwargs`) as a request of ours.

    `max_tokens` is the longest answer of a task that names none. Without `do_sample` a temperature above 0 draws.
    Raises OptionError for a key that would change the answers and has no meaning here.
    """
    options = {key: value for key, value in given.items() if value is not None}
    lengths = [options.pop(name) for name in _LENGTHS if name in options]
    until = options.pop("until", ())
    draws = options.pop("do_sample", None)
    taken = {name: options.pop(name) for name in _TAKEN if name in options}
    if draws is not None:
        taken["temperature"] = taken.get("temperature", 1.0) if draws else 0.0
    for name, value in options.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise OptionError(f"generation_kwargs has {name}={value!r}, which has no meaning here; leave it out")
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    length = int(lengths[0]) if lengths else max_tokens
    return Request(**taken, seed=seed, max_tokens=length, stop=stops or None, raw=True, lookup=0)


def answer_each(
    model: Model,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Sequence[int], Request]],
    *,
    prefixes: PrefixStore | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, FinishedAnswer]]:
    """The answers to prompts of token ids, each with its place, as they end.

    Each is what `generate` gives for it alone. `progress(done, total)` counts them.
    Raises PromptError, OptionError and MemoryLimitError as `generate`.
    """
    waiting = deque(enumerate(_begun(tokenizer, asked)))
    running: dict[int, _Begun] = {}
    runs = Scheduler(model, force=force, prefixes=prefixes)
    done = 0

    def let_join() -> None:
        while waiting and len(running) < _ANSWERS_AT_ONCE:
            place, answer = waiting.popleft()
            row = runs.submit(answer.job)
            running[row.index] = _Begun(place, row, answer)

    let_join()
    _raise_first(runs.admit())
    try:
        with bounded_run(runs.spare):
            while running:
                step = runs.step()
                _raise_first(step.failed)
                for token in step.tokens:
                    if token.row in running and running[token.row].take(token):
                        ended = running.pop(token.row)
                        done += 1
                        yield ended.place, ended.answered
                        if progress is not None:
                            progress(done, len(asked))
                for row in step.ended:
                    row.let_go()
                let_join()
    finally:
        runs.end()


class _Begun:
    """An answer that is being made, at its place among all."""

    def __init__(self, place: int, row: Row, answer: Answer):
        self.place, self._row, self._answer = place, row, answer
        self._pieces: list[str] = []
        self._reason: FinishReason | None = None

    def take(self, token: Any) -> bool:
        """Add a token; whether it was the last."""
        text, self._reason = self._answer.take(token)
        self._pieces.append(text)
        if self._reason is not None:
            self._row.finish()
        return self._reason is not None

    @property
    def answered(self) -> FinishedAnswer:
        assert self._reason is not None
        return FinishedAnswer("".join(self._pieces), self._reason)


def _begun(tokenizer: Tokenizer, asked: Sequence[tuple[Sequence[int], Request]]) -> list[Answer]:
    """An answer to begin for each prompt; those of one request have their stops in common."""
    places: dict[Request, list[int]] = {}
    for place, (_, request) in enumerate(asked):
        places.setdefault(request, []).append(place)
    answers: dict[int, Answer] = {}
    for request, alike in places.items():
        prompts = [asked[place][0] for place in alike]
        answers.update(zip(alike, begin_answers(tokenizer, prompts, request), strict=True))
    return [answers[place] for place in range(len(asked))]


def _raise_first(failed: Iterable[Row]) -> None:
    for row in failed:
        assert row.error is not None
        raise row.error
