"""Tokens with their log-probabilities, as clients read them, and the counts of a request."""

from __future__ import annotations

from typing import Any

from .work import Begun, TokenInfo

LEAST_LOGPROB = -9999.0  # OpenAI's number for a token that is impossible: JSON has no infinity


def finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else logprob


def token_text(token: bytes) -> str:
    """The text of a token; half a character is shown as U+FFFD."""
    return token.decode("utf-8", "replace")


def chat_logprobs(token: TokenInfo) -> dict[str, Any]:
    """A token in the form of chat completions and responses."""
    return {
        **_said(token.text, token.logprob),
        "top_logprobs": [_said(other.text, other.logprob) for other in token.top],
    }


def _said(text: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token_text(text), "logprob": finite(logprob), "bytes": [*text]}


class Usage:
    """Counts the tokens of a request: of each work's prompt once, and of all answers."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.made = 0

    def begin(self, begun: Begun) -> None:
        self.prompt += begun.prompt_tokens
        self.cached += begun.cached_tokens

    def completion(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": self.prompt + self.made,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def response(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.made,
        }
