"""Chat messages to prompt ids, and to ids with a loss mask, through the model's own Jinja template.

Only the template makes control tokens. Before it sees a message, strings such as `<|end|>` in the message are broken by
a *guard*, a private-use character that occurs nowhere else. The rendered text is cut at the unbroken strings, and the
guard is removed from the text between. Which strings are broken depends on who speaks: `added_tokens` has the rule.
Where the model's text begins and ends is found with a second such character around it: around what the template marks
(`{% generation %}`), else around each assistant message's content.
"""

import bisect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..errors import ChatError
from .messages import (
    MEANINGFUL,
    Message,
    checked,
    checked_tools,
    fold,
    unused,
    with_texts,
    with_tools,
    with_tools_as_text,
    without,
)
from .spans import Span, encode_spans
from .tokenizer import Tokenizer

SYSTEM_FOLDED = "this model's chat template has no place for a system message, so it was put before the user's text"

# Templates for models whose files have none.
_TURNS = "{{% for message in messages %}}{}{{% endfor %}}{{% if add_generation_prompt %}}{}{{% endif %}}"
_LINES = _TURNS.format(
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}",
    "{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}",
)
_PHI3_SMALL = "{{ bos_token }}" + _LINES
_PHI4 = _TURNS.format(
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}",
    "{{ '<|im_start|>assistant<|im_sep|>' }}",
)
_PHI4_MINI = _TURNS.format(
    "{{ '<|' + message['role'] + '|>' + message['content'] }}{% if message['role'] == 'system' and message['tools'] %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}",
    "{{ '<|assistant|>' }}{% else %}{{ eos_token }}",
)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    notify: Callable[[str], None] | None = None,
) -> list[int]:
    """The ids of `messages`, a list of {"role": ..., "content": ...}, rendered by the model's chat template.

    The template must read every other key of a message (`tools` of a system message, `name`). `tools` are descriptions
    of functions as JSON data; a template without a place for them gets them in the system message. With
    `add_generation_prompt` the ids end where the model's answer begins. A BOS token is put in front if the tokenizer
    asks for one and the template has not written it. A system message that the template would drop goes to the front of
    the next user message, and `notify` is called with a sentence that says so.

    Raises ChatError for malformed messages, for keys that the template does not read, and for templates that fail or
    would drop a message.
    """
    chat = _prepare(tokenizer, messages, tools, add_generation_prompt)
    for (_, key), number in chat.unread.items():
        if number:
            raise ChatError(_unread(number, key))
    if notify and chat.moved:
        notify(SYSTEM_FOLDED)
    text = chat.text(chat.messages)
    if chat.plain:
        ids = tokenizer.encode(text, special=True)
    else:
        pieces = tokenizer.split_special(text)
        ids = tokenizer.encode_pieces(p if isinstance(p, int) else p.replace(chat.guard, "") for p in pieces)
    if _lacks_bos(tokenizer, ids):
        ids.insert(0, tokenizer.bos_token_id)  # type: ignore[arg-type]
    return ids


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    continued: bool = False,
    notify: Callable[[str], None] | None = None,
) -> str:
    """The text of `render_chat`, for who encodes it later: `tokenizer.encode(text, special=True)`.

    As text nothing tells a control token of the template from the same string in a message: both become the token.
    `continued`: the last message is the beginning of what the assistant says, and the text ends where it does.
    Raises ChatError as `render_chat` does, and if a template changes what is to be continued.
    """
    chat = _prepare(tokenizer, messages, None, not continued)
    for (_, key), number in chat.unread.items():
        if number:
            raise ChatError(_unread(number, key))
    if notify and chat.moved:
        notify(SYSTEM_FOLDED)
    if not continued:
        return chat.text(chat.messages).replace(chat.guard, "")
    if chat.messages[-1]["role"] != "assistant":
        raise ChatError("what is to be continued is an assistant message, and the last of these is another")
    text, spans = _content_spans(chat)
    return text[: spans[-1][1]].replace(chat.guard, "")


def render_training_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[list[int], list[int]]:
    """The ids of a whole conversation, and for each the number of its assistant turn, from 1 (0: of none).

    A turn's ids are those that the model would generate: what the template marks (`{% generation %}`), else the content
    and the token that ends the turn, but not its header, which a prompt already has. The ids are those of `render_chat`
    without a generation prompt.

    Raises ChatError as that does, and if the template changes what the assistant said, or if it reads other keys of an
    assistant message and does not mark what is generated. A key that the template does not read and that says nothing
    about the conversation (an "id") is left out, and `notify` gets a sentence.
    """
    chat = _prepare(tokenizer, messages, tools, False)
    for (_, key), number in chat.unread.items():
        if number and key in MEANINGFUL:
            raise ChatError(_unread(number, key))
        if number and notify:
            notify(f"the chat template does not read {key!r} of a message, so it was left out")
    if notify and chat.moved:
        notify(SYSTEM_FOLDED)
    if _GENERATION.search(chat.source):
        text, spans = _marked_spans(chat)
        ids, turns = encode_spans(tokenizer, chat.guard, text, spans, whole=True)
    else:
        _check_content_is_all(chat)
        text, spans = _content_spans(chat)
        ids, turns = encode_spans(tokenizer, chat.guard, text, spans, whole=False)
    if _lacks_bos(tokenizer, ids):
        ids.insert(0, tokenizer.bos_token_id)  # type: ignore[arg-type]
        turns.insert(0, 0)
    return ids, turns


@dataclass(frozen=True)
class _Chat:
    """A conversation, ready to be rendered."""

    source: str  # the template
    names: Mapping[str, Any]  # its variables other than the messages
    messages: list[Message]  # guarded
    guard: str
    plain: bool  # no text needed the guard
    moved: bool  # a system message's text moved into a user message
    unread: Mapping[tuple[str, str], int]  # roles and keys that the template does not read; see `_find_unread`
    now: datetime  # the same for all renderings, which are compared

    def text(self, messages: Sequence[Message], mark: str = "") -> str:
        from . import template  # brings jinja2

        return template.render(self.source, messages, self.names, mark=mark, guard=self.guard, now=self.now)


_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def _prepare(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> _Chat:
    """The messages checked, with their tools in place, folded and guarded."""
    given: list[Message] = [*checked(messages)]
    described = checked_tools(tools)
    source = _template(tokenizer, described is not None)
    names = {**tokenizer.special_tokens, "tools": described, "add_generation_prompt": add_generation_prompt}
    guard = unused(given, described, source)
    chat = _Chat(source, names, given, guard, True, False, {}, datetime.now())
    if described is not None or any("tools" in message for message in given):
        chat = _with_tools_in_place(chat)
    unread = _find_unread(chat, given)
    dropped = _dropped(chat)
    moved = any(chat.messages[n]["content"] for n in dropped)
    folded = fold(chat.messages, dropped)

    def guarded(value: Any, role: str) -> Any:
        """`value` with the guard in every string of a token that `role` may not write."""
        kept = tokenizer.kept_from("assistant" if role == "assistant" else "anyone")
        return with_texts(value, lambda text: kept.break_up(text, guard))

    safe = [guarded(message, message["role"]) for message in folded]
    names = {**chat.names, "tools": guarded(chat.names["tools"], "system")}
    plain = safe == folded and names["tools"] == chat.names["tools"]
    return _Chat(source, names, safe, guard, plain, moved, unread, chat.now)


def _with_tools_in_place(chat: _Chat) -> _Chat:
    """The chat with its tools where the template reads them: in its variable `tools`, or in a system message."""
    as_text = replace(chat, messages=with_tools_as_text(chat.messages))
    if _text_or_none(chat) is None and _text_or_none(as_text) is not None:
        chat = as_text
    tools = chat.names["tools"]
    apart = replace(chat, names={**chat.names, "tools": None})
    if tools is None or _text_or_none(chat) != _text_or_none(apart):
        return chat
    placed = replace(apart, messages=with_tools(chat.messages, tools))
    bare = replace(apart, messages=without(placed.messages, "system", "tools"))
    if placed.text(placed.messages) == _text_or_none(bare):
        raise ChatError("the model's chat template has no place for tools: describe them in the system message")
    return placed


def _text_or_none(chat: _Chat) -> str | None:
    try:
        return chat.text(chat.messages)
    except ChatError:
        return None


def _find_unread(chat: _Chat, given: Sequence[Message]) -> dict[tuple[str, str], int]:
    """(role, key) of the keys, other than role and content, that change nothing in the rendered text.

    The values are the number of the first message in which the key is not empty (`"tool_calls": []` is), 0 for none.
    """
    beside = [(m["role"], key) for m in given for key in m if key not in ("role", "content")]
    places = dict.fromkeys(beside, 0)
    whole = chat.text(chat.messages) if places else ""
    for role, key in [*places]:
        if _text_or_none(replace(chat, messages=without(chat.messages, role, key))) != whole:
            del places[role, key]
    for number, message in reversed([*enumerate(given, 1)]):
        for key in message:
            if (message["role"], key) in places and message[key] not in ("", [], {}):
                places[message["role"], key] = number
    return places


def _unread(number: int, key: str) -> str:
    return (
        f"message {number} has {key!r}, which the model's chat template does not read: remove it, or write what it "
        "says into the content"
    )


def _dropped(chat: _Chat) -> set[int]:
    """Indexes of the system messages that the template leaves out, found by rendering probes in place of all texts."""
    messages = chat.messages
    probes = [f"{chat.guard}{n}." for n in range(len(messages))]
    rendered = chat.text([{**message, "content": probe} for message, probe in zip(messages, probes, strict=True)])
    lost = {n for n, probe in enumerate(probes) if probe not in rendered}
    for n in lost:
        if messages[n]["role"] != "system" and messages[n]["content"]:
            raise ChatError(f"the model's chat template leaves out message {n + 1}, role {messages[n]['role']!r}")
    return {n for n in lost if messages[n]["role"] == "system"}


# ----------------------------------------------------------------------------------------- what is generated


def _check_content_is_all(chat: _Chat) -> None:
    """ChatError if the template writes more of an assistant message than its content."""
    for message in chat.messages:
        for key in message if message["role"] == "assistant" else ():
            if key not in ("role", "content") and ("assistant", key) not in chat.unread:
                raise ChatError(
                    f"an assistant message has {key!r}, and the model's chat template does not mark what the model "
                    "generates ({% generation %}), so what is to be learnt is not known: write it into the content"
                )


def _content_spans(chat: _Chat) -> tuple[str, list[Span]]:
    """The rendered text, and the span of each assistant message's content in it."""
    edge = unused(chat.messages, chat.names["tools"], chat.source, chat.guard)
    text, edges = _lift(chat.text(_with_edges(chat.messages, edge)), edge)
    answers = sum(message["role"] == "assistant" for message in chat.messages)
    if len(edges) != 2 * answers or text != chat.text(chat.messages):
        raise ChatError("the model's chat template changes what the assistant said, so it cannot be trained on")
    return text, [(edges[n], edges[n + 1], n // 2 + 1) for n in range(0, len(edges), 2)]


def _marked_spans(chat: _Chat) -> tuple[str, list[Span]]:
    """The rendered text, and the spans of it that the template marks as generated."""
    mark = unused(chat.messages, chat.names["tools"], chat.source, chat.guard)
    text, marks = _lift(chat.text(chat.messages, mark), mark)
    if len(marks) % 2 or text != chat.text(chat.messages):
        raise ChatError("the model's chat template changes what it marks as generated, so it cannot be trained on")
    pairs = [(marks[n], marks[n + 1]) for n in range(0, len(marks), 2)]
    if len(pairs) == sum(message["role"] == "assistant" for message in chat.messages):
        return text, [(first, end, turn) for turn, (first, end) in enumerate(pairs, 1)]
    # A turn has several spans, or none: a span belongs to the turn whose content began last before its end.
    same, contents = _content_spans(chat) if pairs else (text, [])
    firsts = [first for first, _, _ in contents]
    return same, [(first, end, max(1, bisect.bisect_left(firsts, end))) for first, end in pairs]


def _with_edges(messages: Sequence[Message], edge: str) -> list[Message]:
    """The messages with the character `edge` around each assistant message's content."""
    return [
        {**message, "content": _between_edges(message["content"], edge)} if message["role"] == "assistant" else message
        for message in messages
    ]


def _between_edges(text: str, edge: str) -> str:
    """`text` with an edge at both ends, inside the white space there, which templates may strip."""
    stripped = text.strip()
    before = len(text) - len(text.lstrip())
    return f"{text[:before]}{edge}{stripped}{edge}{text[before + len(stripped) :]}"


def _lift(text: str, mark: str) -> tuple[str, list[int]]:
    """The text without the marks, and the places in it where they stood."""
    places: list[int] = []
    parts = text.split(mark)
    for part in parts[:-1]:
        places.append((places[-1] if places else 0) + len(part))
    return "".join(parts), places


def _lacks_bos(tokenizer: Tokenizer, ids: list[int]) -> bool:
    wanted = tokenizer.add_bos_token and tokenizer.chat_begins_with_bos
    return wanted and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]


def template_source(tokenizer: Tokenizer) -> str:
    """The source of the template that chats without tools are rendered with. Raises ChatError if there is none."""
    return _template(tokenizer, False)


def _template(tokenizer: Tokenizer, tools: bool) -> str:
    """The template's source: the model's own, else one that fits the vocabulary's control tokens. Raises ChatError."""
    if tools and "tool_use" in tokenizer.named_templates:
        return tokenizer.named_templates["tool_use"]
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if tokenizer.named_templates:
        names = ", ".join(sorted(tokenizer.named_templates))
        raise ChatError(f"the model has chat templates named {names}, and none named default: send raw text")
    known = tokenizer.added_tokens
    if "<|im_sep|>" in known:
        return _PHI4
    if "<|user|>" in known and "<|end|>" in known:
        if "<|tool|>" in known:
            return _PHI4_MINI
        return _LINES if "<s>" in known else _PHI3_SMALL
    raise ChatError("the model has no chat template, and its tokens are not those of a Phi chat model: send raw text")
