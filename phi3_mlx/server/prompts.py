"""What a work's prompt is in token ids, and what its answers must look like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import ContextLengthError
from ..generation.answers import encode_prompt
from ..text.grammar import Form
from ..text.tool_use import use_tools
from .work import Work

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


def check_size(work: Work, tokenizer: Tokenizer, context: int) -> None:
    """ContextLengthError for a prompt that is too long by its bytes alone: encoding 16 MB takes a minute."""
    size = sum(len(text.strip().encode()) for text in _texts(work))
    least = len(_messages(work.prompt)) - (-size // _longest_token(tokenizer))  # each message has a role too
    if least >= context:
        raise ContextLengthError(
            f"the prompt has {size:,} bytes, {least:,} tokens or more, and the model's context is {context:,}; "
            "shorten it or use a model with a longer context",
            least,
            context,
        )


def prompt_and_form(work: Work, tokenizer: Tokenizer) -> tuple[list[int], Form | None]:
    """The ids, and with tools what the answers must be in place of what the request says.

    Raises PromptError, ChatError, and OptionError for a form that has no place beside the tools.
    """
    ids = encode_prompt(tokenizer, work.prompt, raw=work.request.raw, tools=work.tools)
    if not work.tools:
        return ids, None
    use = use_tools(tokenizer, work.tools, work.tool_choice, work.parallel_tool_calls)
    return ids, use.form(work.request.form)


def _messages(prompt: Any) -> Sequence[Mapping[str, Any]]:
    """The prompt if it is messages; nothing for a text or ids."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return prompt if is_list and prompt and isinstance(prompt[0], Mapping) else ()


def _texts(work: Work) -> Iterator[str]:
    """The texts that stand in the prompt."""
    if isinstance(work.prompt, str):
        yield work.prompt
    for message in _messages(work.prompt):
        yield message["content"]
    for tool in work.tools:
        yield json.dumps(tool.listing, ensure_ascii=False)


@lru_cache(maxsize=8)
def _longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token."""
    known = (len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
    return max(*known, *(len(token.encode()) for token in tokenizer.added_tokens), 1)
