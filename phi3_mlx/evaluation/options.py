"""What `compare` and `evaluate` can be told. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import OptionError
from ..fields import parse
from ..option import Range, option, settle
from ..values import choice, listed, plain, refusal, texts, whole

_GEN_KWARGS = "names and values, such as max_gen_toks=1024,temperature=0.7"


def _gen_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Options of an answer by name, of a mapping, of JSON, or of `name=value,...`."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse(value)
        except ValueError as error:
            raise OptionError(f"{name} is no JSON: {error}") from None
    elif isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        if not all(key.strip() and equals for key, equals, _ in parts):
            raise refusal(value, name, _GEN_KWARGS)
        value = {key.strip(): _plain(given.strip()) for key, _, given in parts}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refusal(value, name, _GEN_KWARGS)
    given = {key: plain(part) for key, part in value.items()}
    try:
        json.dumps(given)  # as the results will have it
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} holds what JSON cannot: {error}; expected {_GEN_KWARGS}") from None
    return given


def _plain(text: str) -> Any:
    """A value of JSON, such as a number or true; anything else is a text."""
    try:
        return parse(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return text


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` can be told. Raises OptionError for a value of the wrong type."""

    window: int = option(512, "Tokens read together; each window starts with an empty context.")
    force: bool = option(False, "Go on where there is too little memory.")

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class EvalOptions:
    """What `evaluate` can be told. Raises OptionError for a value of another type or outside its range."""

    limit: int | None = option(
        None, "Ask the first N questions of each task alone.", Range(lambda n: n >= 1, "1 or more"), metavar="N"
    )
    num_fewshot: int | None = option(
        None,
        "Examples with answers before each question.",
        Range(lambda n: n >= 0, "0 or more"),
        metavar="N",
        shown_default="the task's",
    )
    chat: bool = option(False, "Put questions into the model's chat template.")
    fewshot_as_multiturn: bool = option(
        False, "Examples are turns of the chat, and not text before the question; implies --chat."
    )
    system: str | None = option(None, "A system message, or the text that all prompts begin with.", metavar="TEXT")
    gen_kwargs: Mapping[str, Any] | str | None = option(
        None,
        "How answers are generated, in place of what the task says: max_gen_toks=1024,temperature=0.7, or JSON.",
        read=_gen_kwargs,
        metavar="K=V,...",
    )
    max_length: int | None = option(
        None,
        "Tokens of a question with its answer; a longer one loses its beginning.",
        Range(lambda n: n >= 2, "2 or more"),
        metavar="N",
        shown_default="the model's context",
    )
    seed: int = option(
        1234, "Which examples precede a question, and what is drawn.", Range(lambda n: 0 <= n < 2**32, "0 to 2**32 - 1")
    )
    allow_code: bool = option(False, "Let tasks run code that the model writes on this machine.")
    force: bool = option(False, "Go on where there is too little memory.")

    def __post_init__(self) -> None:
        settle(self)

    @property
    def generation(self) -> dict[str, Any]:
        """The options of answers by name."""
        return dict(self.gen_kwargs) if isinstance(self.gen_kwargs, Mapping) else {}


@dataclass(frozen=True)
class MtBenchOptions:
    """What `mt_bench` can be told beside the model. Raises OptionError as `EvalOptions` does."""

    judge: str | None = option(
        None, "mt_bench: the URL of the judge's API, OpenAI's or one like it (http://127.0.0.1:8080/v1).", metavar="URL"
    )
    judge_model: str | None = option(None, "mt_bench: which model judges.", metavar="NAME")
    judge_key: str | None = option(
        None, "mt_bench: the environment variable that holds the judge's key.", metavar="VARIABLE"
    )
    judge_timeout: float = option(
        120.0,
        "mt_bench: seconds that a try of a judgment may take.",
        Range(lambda s: 0 < s < 86400, "above 0, in seconds"),
    )
    judge_retries: int = option(
        6,
        "mt_bench: tries after the first, where the judge is busy or fails.",
        Range(lambda n: 0 <= n <= 100, "0 to 100"),
    )
    judge_parallel: int = option(
        4, "mt_bench: judgments asked for at a time.", Range(lambda n: 1 <= n <= 64, "1 to 64")
    )
    num_choices: int = option(
        1, "mt_bench: answers to each question, drawn apart.", Range(lambda n: 1 <= n <= 100, "1 to 100")
    )
    turn_tokens: int = option(1024, "mt_bench: longest answer of a turn.", Range(lambda n: n >= 1, "1 or more"))

    def __post_init__(self) -> None:
        settle(self)
        if (self.judge is None) != (self.judge_model is None):
            lacking, given = "judge=URL", "judge_model"
            if self.judge_model is None:
                lacking, given = "judge_model=NAME", "judge"
            raise OptionError(f"{given} says nothing without {lacking}; give both, or neither to answer alone")
        for field in fields(self):
            changed = field.name.startswith("judge_") and getattr(self, field.name) != field.default
            if changed and self.judge is None:
                raise OptionError(f"{field.name} has no effect without judge=URL; leave it out")


def _lengths(value: Any, name: str) -> tuple[int, ...]:
    """Numbers of tokens, of a list or a text such as 4k,8k; k counts 1,024."""
    parts = value.split(",") if isinstance(value, str) else listed(value)
    if parts is None:
        parts = [value]
    lengths = []
    for part in parts:
        match = re.fullmatch(r"(\d{1,9})\s*([kK]?)", part.strip()) if isinstance(part, str) else None
        lengths.append(int(match[1]) * (1024 if match[2] else 1) if match else whole(part, name))
    if not lengths or min(lengths) < 1:
        raise refusal(value, name, "numbers of tokens, such as 4k,8k")
    return tuple(dict.fromkeys(lengths))


def _several_bits(value: Any, name: str) -> tuple[tuple[int, int] | None, ...]:
    """How caches are quantized, of a list or a text such as 0,8,4 or 8/4 (keys and values); 0: not at all."""
    from ..models.cache import make_kv_bits

    parts = value.split(",") if isinstance(value, str) else listed(value)
    if parts is None:
        parts = [value]
    several: dict[tuple[int, int] | None, None] = {}
    for part in parts:
        if isinstance(part, str):
            numbers = [piece.strip() for piece in part.split("/")]
            if not all(piece.isdecimal() for piece in numbers) or len(numbers) > 2:
                raise refusal(value, name, "numbers of bits, such as 0,8,4, or 8/4 for keys and values")
            part = tuple(map(int, numbers)) if len(numbers) == 2 else int(numbers[0])
        bits = None if part in (0, None) else make_kv_bits(part)
        several[None if bits is None else (bits.keys, bits.values)] = None
    if not several:
        raise refusal(value, name, "numbers of bits, such as 0,8,4")
    return tuple(several)


def _rules(value: Any, name: str) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else texts(value, name)
    return tuple(dict.fromkeys(choice(part.strip(), name, ("auto", "short", "long")) for part in parts))


@dataclass(frozen=True)
class RulerOptions:
    """What `ruler` can be told beside the model. Raises OptionError as `EvalOptions` does."""

    lengths: Sequence[int] | str = option(
        "4k", "ruler: tokens of a prompt with its answer; k counts 1,024.", read=_lengths, metavar="4k,8k,..."
    )
    caches: Sequence[Any] | str = option(
        "0",
        "ruler: bits of keys and values, a curve for each; 0: not quantized, 8/4: keys and values.",
        read=_several_bits,
        metavar="0,8,4,...",
    )
    rules: Sequence[str] | str | None = option(
        None,
        "ruler: LongRoPE's rules, a curve for each.",
        read=_rules,
        metavar="auto,short,...",
        shown_default="the model's",
    )
    haystack: str | None = option(None, "ruler: hide needles in this text instead of one that is made.", metavar="FILE")

    def __post_init__(self) -> None:
        settle(self)
