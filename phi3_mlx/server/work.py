"""What a client asks for, and what it is told while its answers are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..engine.tokens import FinishReason
from ..generation.answers import Prompt
from ..generation.request import Request
from ..text.tools import Tool, ToolChoice

MAX_TOP_LOGPROBS = 20  # alternatives of a token that can be told


@dataclass(frozen=True)
class Work:
    """A request of one of the server's models.

    - `model`: a name that `Models.listed` has.
    - `prompt`: messages, a text (in the chat template unless `request.raw`) or token ids.
    - `n`: how many answers; the prompt is read once for all. Answer `i` draws with the seed `request.seed + i`.
      0: nothing is answered, as for a prompt that is only to be scored; that ends with `Ended(0, "length", 0)`.
    - `top_logprobs`: None: tokens are told without log-probabilities; k: with them, and the k likeliest in each place.
    - `echo`: the prompt's tokens are told too, scored where `top_logprobs` is not None.
    - `tools`: what the answers may call, as `tool_choice` and `parallel_tool_calls` say (`text/tool_use.py`). Calls are
      part of the text that pieces have.
    """

    model: str
    prompt: Prompt
    request: Request
    n: int = 1
    top_logprobs: int | None = None
    echo: bool = False
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood in a place: its id, its bytes, and its natural log-probability there."""

    id: int
    text: bytes
    logprob: float


@dataclass(frozen=True)
class TokenInfo:
    """A token: its id and bytes, and the character of the answer's (or the echoed prompt's) text where it begins.

    `logprob` is natural, under the model itself, whatever the sampling; None where none is told, and for the first
    token of a prompt. `top`: the likeliest tokens in its place, best first.
    """

    id: int
    text: bytes
    offset: int
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Reading:
    """`done` of `total` tokens of the prompt are read."""

    done: int
    total: int


@dataclass(frozen=True)
class Begun:
    """The prompt is read: told once, before the first `Piece`. `cached_tokens` of its tokens did not need reading.

    `echo` and `text`: its tokens and the text that they are, where the request asks for them.
    """

    prompt_tokens: int
    cached_tokens: int
    echo: tuple[TokenInfo, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Piece:
    """More of the answer `index`: text that is certain ("" while a character is incomplete), and tokens."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class Ended:
    """The answer `index` has ended, with that many tokens. Told once for each answer."""

    index: int
    reason: FinishReason
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The whole work has ended with an error, instead of what else would have been told."""

    error: Exception


Event = Reading | Begun | Piece | Ended | Failed
EventListener = Callable[[Event], None]  # called in the engine thread: returns at once; if it raises, its work ends


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked for. `created`: seconds since 1970; `about`: what it is, in a few words."""

    name: str
    created: int
    context: int
    about: str


@dataclass(frozen=True)
class Figures:
    """What the engine's thread is doing. Tokens are counts since it began, memory is in bytes.

    `running` and `waiting` are requests. `read_tokens` were computed of prompts, `reused_tokens` were not because they
    had been read before, `made_tokens` are of answers. `memory` is what MLX holds now, `memory_limit` what it may.
    """

    running: int
    waiting: int
    read_tokens: int
    reused_tokens: int
    made_tokens: int
    memory: int
    memory_limit: int | None
    prefix_memory: int
    loaded: tuple[str, ...]
