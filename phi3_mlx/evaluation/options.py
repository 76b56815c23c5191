"""What `compare` and `evaluate` can be told. Imports no MLX, so that the command line can show it at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..option import Range, option, settle


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
