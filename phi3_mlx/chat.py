"""Chat messages to prompt ids, and to ids with a loss mask, through the model's own Jinja template.

Only the template makes control tokens. Strings such as `<|end|>` inside a message are broken by a guard, a private-use
character that occurs nowhere else, before the template sees them; the rendered text is then cut at the unbroken ones,
and the guard taken out of the text between. Which strings these are depends on who speaks: `added_tokens` has the rule.
Where the assistant's own words begin and end is found in the same way, by a second such character around them.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ChatError
from .tokenizer import Tokenizer

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant", "tool")

# Unicode's private-use characters: no text of the world needs one, and few use any.
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

SYSTEM_FOLDED = "this model's chat template has no place for a system message, so it was put before the user's text"

# Templates for models whose files have none, by the form of their turns.
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
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}",
    "{{ '<|assistant|>' }}{% else %}{{ eos_token }}",
)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    notify: Callable[[str], None] | None = None,
) -> list[int]:
    """The ids of `messages`, a list of {"role": ..., "content": ...}, as the model's chat template lays them out.

    With `add_generation_prompt` they end where the model's answer begins. A BOS token is put in front where the
    tokenizer asks for one and the template has not written it. Where the template would drop a system message, that
    goes to the front of the next user message instead, and `notify` is called with one sentence that says so.

    Raises ChatError for messages of another shape and for templates that fail or would drop a message.
    """
    messages, render, private = _prepare(tokenizer, messages, add_generation_prompt, notify)
    ids = _encode(tokenizer, render, messages, private)
    if _lacks_bos(tokenizer, ids):
        ids.insert(0, tokenizer.bos_token_id)  # type: ignore[arg-type]
    return ids


def render_training_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, notify: Callable[[str], None] | None = None
) -> tuple[list[int], list[int]]:
    """The ids of a whole conversation, and for each the number of the assistant turn it belongs to (0: to none).

    Turns count from 1. A turn's ids are those that the model would generate: its words and the token that ends it, but
    not the header before them, which a prompt already has. The ids are those of `render_chat` without a generation
    prompt. Raises ChatError as that does, and where the template changes what the assistant said.
    """
    messages, render, private = _prepare(tokenizer, messages, False, notify)
    edge = _unused(messages, tokenizer.chat_template or "", private)
    guarded = [_guard(tokenizer, message, private) for message in messages]
    marked = [
        {**message, "content": _between_edges(message["content"], edge)} if message["role"] == "assistant" else message
        for message in guarded
    ]
    text = render(marked)
    answers = sum(message["role"] == "assistant" for message in messages)
    if text.count(edge) != 2 * answers or text.replace(edge, "") != render(guarded):
        raise ChatError("the model's chat template changes what the assistant said, so it cannot be trained on")
    ids: list[int] = []
    turns: list[int] = []
    edges = 0  # met so far: an odd number says that we are inside an answer
    said: int | None = None  # where the last answer's words ended, while the token that ends its turn may follow
    for piece in tokenizer.split_special(text):
        if isinstance(piece, int):
            if said is not None and piece in tokenizer.stop_ids:
                turns[said:] = [edges // 2] * (len(turns) - said + 1)  # white space before it is generated too
            else:
                turns.append((edges + 1) // 2 if edges % 2 else 0)
            ids.append(piece)
            said = None
            continue
        spans = piece.replace(private, "").split(edge)
        words = _encode_after(tokenizer, ids, "".join(spans))
        starts = [0]  # of the spans, in tokens: a span begins where what stands before it stops being encoded alike
        for n in range(1, len(spans)):
            starts.append(max(starts[-1], _common(_encode_after(tokenizer, ids, "".join(spans[:n])), words)))
        for n, (start, end) in enumerate(zip(starts, [*starts[1:], len(words)], strict=True)):
            edges += n > 0
            if n and edges % 2 == 0:
                said = len(turns)
            turns += [(edges + 1) // 2 if edges % 2 else 0] * (end - start)
        ids += words
    if _lacks_bos(tokenizer, ids):
        ids.insert(0, tokenizer.bos_token_id)  # type: ignore[arg-type]
        turns.insert(0, 0)
    return ids, turns


def _prepare(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    notify: Callable[[str], None] | None,
) -> tuple[list[Message], Callable[[Sequence[Message]], str], str]:
    """The messages checked and folded, the function that renders them, and a guard that fits them."""
    template = _template(tokenizer)
    messages = [_checked(message, number) for number, message in enumerate(messages, 1)]
    if not messages:
        raise ChatError("the list of messages is empty: give at least one user message")
    render = functools.partial(_render, template, tokenizer, add_generation_prompt)
    private = _unused(messages, tokenizer.chat_template or "")
    dropped = _dropped(render, messages, private)
    if notify and any(messages[n]["content"] for n in dropped):
        notify(SYSTEM_FOLDED)
    return _fold(messages, dropped), render, private


def _lacks_bos(tokenizer: Tokenizer, ids: list[int]) -> bool:
    return tokenizer.add_bos_token and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]


def _between_edges(text: str, edge: str) -> str:
    """`text` with an edge before and after it, inside the white space at its ends, which templates may strip."""
    words = text.strip()
    before = len(text) - len(text.lstrip())
    return f"{text[:before]}{edge}{words}{edge}{text[before + len(words) :]}"


def _encode_after(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    """Ids of ordinary text that stands after `ids`."""
    if not text:
        return []
    return tokenizer.encode_pieces([ids[-1], text])[1:] if ids else tokenizer.encode_pieces([text])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _checked(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise ChatError(f'message {number} is {message!r}: a message is {{"role": "user", "content": "text"}}')
    for key in ("role", "content"):
        if key not in message:
            raise ChatError(f'message {number} has no {key!r}: a message is {{"role": "user", "content": "text"}}')
    for key, value in message.items():
        if not isinstance(value, str):
            raise ChatError(f"message {number} has {key!r} of type {type(value).__name__}: it must be text")
    if message["role"] not in ROLES:
        raise ChatError(f"message {number} has the role {message['role']!r}: roles are {', '.join(ROLES)}")
    return message


def _unused(messages: Sequence[Message], *others: str) -> str:
    """A private-use character that occurs neither in the messages nor in the other texts."""
    used = set().union(*others, *(value for message in messages for value in message.values()))
    for code in itertools.chain(*_PRIVATE_USE):
        if chr(code) not in used:
            return chr(code)
    raise ChatError("the messages hold every private-use character of Unicode, and one is needed; leave one out")


def _dropped(render: Callable[[Sequence[Message]], str], messages: Sequence[Message], private: str) -> set[int]:
    """Indexes of the system messages whose text the template leaves out, found by rendering probes in its place."""
    probes = [f"{private}{n}." for n in range(len(messages))]
    rendered = render([{**message, "content": probe} for message, probe in zip(messages, probes, strict=True)])
    lost = {n for n, probe in enumerate(probes) if probe not in rendered}
    for n in lost:
        if messages[n]["role"] != "system":
            raise ChatError(f"the model's chat template leaves out message {n + 1}, role {messages[n]['role']!r}")
    return lost


def _fold(messages: Sequence[Message], dropped: set[int]) -> list[Message]:
    """The messages without the dropped ones, whose text is put before that of the next user message."""
    folded: list[Message] = []
    waiting: list[str] = []
    for n, message in enumerate(messages):
        if n in dropped:
            waiting += [message["content"]] if message["content"] else []
        elif waiting and message["role"] == "user":
            folded.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    if waiting:
        raise ChatError("the model's chat template has no place for a system message and no user message follows it")
    return folded


def _encode(
    tokenizer: Tokenizer, render: Callable[[Sequence[Message]], str], messages: Sequence[Message], private: str
) -> list[int]:
    guarded = [_guard(tokenizer, message, private) for message in messages]
    if guarded == messages:
        return tokenizer.encode(render(messages), special=True)
    pieces = tokenizer.split_special(render(guarded))
    return tokenizer.encode_pieces(piece if isinstance(piece, int) else piece.replace(private, "") for piece in pieces)


def _guard(tokenizer: Tokenizer, message: Message, private: str) -> Message:
    """The message with `private` inside every string that would turn into a token its writer has no right to."""
    kept = tokenizer.kept_from("assistant" if message["role"] == "assistant" else "anyone")
    return {key: kept.break_up(value, private) for key, value in message.items()}


def _template(tokenizer: Tokenizer) -> str:
    """The template's source: the model's own, else one that fits the control tokens of the vocabulary."""
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


def _render(source: str, tokenizer: Tokenizer, add_generation_prompt: bool, messages: Sequence[Message]) -> str:
    from . import template  # brings jinja2

    names = {**tokenizer.special_tokens, "add_generation_prompt": add_generation_prompt}
    return template.render(source, messages, names)
