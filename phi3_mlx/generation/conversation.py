"""A chat that keeps its cache: every turn reads only what is new."""

from __future__ import annotations

import html
import itertools
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import values
from ..engine.prefixes import PrefixStore, check_store
from ..errors import CacheError, OptionError, PromptError
from ..option import arguments
from ..store.other import check_other
from ..text.tool_calls import ToolCall
from ..text.tool_use import ToolUse
from ..text.tools import ToolChoice
from .answers import Answers, Tools, encode_prompt, use_of
from .chunks import Chunk, told_apart
from .loading import check_loaded, check_tokenizer
from .prompt_cache import PromptCache
from .request import CHAT_TOKENS, Request
from .tool_turns import TOOL_ROUNDS, ToolCaller, ToolTurn

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.schemas import Schema
    from ..text.tokenizer import Tokenizer

_OF_THE_CONVERSATION = ("raw", "kv_bits", "kv_group_size", "force")  # not of one message


class Conversation:
    """Messages with a model, and the cache of what it has read of them.

        conversation = Conversation(model, tokenizer, system="Answer in one sentence.")
        for chunk in conversation.send("Who are you?"):
            print(chunk.text, end="", flush=True)

    `kv_bits`, `kv_group_size` and `force` are `generate`'s. With `prefixes` what it has read is kept there, beside that
    of other conversations. Without, it has a cache of its own, which grows in place: a store would copy all of it for
    each answer, and hold it twice meanwhile.
    An answer that is broken off (the iterator closed, Ctrl-C, a further message) is kept up to that point. Any thread
    may send a message, but one answer is read at a time: a further message, or a reset, ends the one before, and who
    reads on in that gets a CacheError.
    `notify` gets a sentence if the model's template has no place for the system message.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int | None = None,
        prefixes: PrefixStore | None = None,
        force: bool = False,
        notify: Callable[[str], None] | None = None,
    ):
        check_loaded(model)
        check_tokenizer(tokenizer)
        values.check_function(notify, "notify")
        check_store(prefixes)
        if not model.of_family:
            check_other({"kv_bits": kv_bits, "prefixes": prefixes})
        self._model, self._tokenizer, self._notify, self._prefixes = model, tokenizer, notify, prefixes
        self._memory = Request(kv_bits=kv_bits, kv_group_size=kv_group_size, force=force)
        self.messages: list[dict[str, Any]] = []
        # The last answer, which may not have been read to its end, and the number of it.
        self._open: Generator[Chunk, None, None] | None = None
        self._number = 0
        self._changing = threading.RLock()
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Start over, with this system message or none."""
        system = values.optional(values.text, system, "system")
        with self._changing:
            self._end_answer()
            self.messages = [{"role": "system", "content": system}] if system else []
            memory = self._memory
            self._cache = PromptCache(self._model, kv_bits=memory.kv_bits, kv_group_size=memory.kv_group_size)
            # The prompt of the last turn as the template renders it, the same with the answers' own token ids, and
            # the last answer's ids. An answer's text may tokenize differently from how it was made; what the cache
            # has read is how it was made.
            self._rendered: list[int] = []
            self._actual: list[int] = []
            self._answer: list[int] = []

    def __repr__(self) -> str:
        return f"<Conversation: {len(self.messages)} messages, {self.cached_tokens:,} tokens read>"

    def _repr_html_(self) -> str:
        return conversation_html(self.messages)

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the conversation are read and kept."""
        if self._prefixes is None:
            return len(self._cache.ids)
        return self._prefixes.shared(self._model, [*self._actual, *self._answer], self._memory.cache_bits())

    def send(
        self,
        text: str,
        *,
        max_tokens: int = CHAT_TOKENS,
        temperature: float = Request.temperature,
        top_p: float = Request.top_p,
        top_k: int = Request.top_k,
        min_p: float = Request.min_p,
        repetition_penalty: float = Request.repetition_penalty,
        presence_penalty: float = Request.presence_penalty,
        frequency_penalty: float = Request.frequency_penalty,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logit_bias: Mapping[int, float] | Sequence[str] | None = None,
        lookup: int = Request.lookup,
        draft: tuple[Model, Tokenizer] | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | str | None = None,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        run_tool: ToolCaller | None = None,
        tool_rounds: int = TOOL_ROUNDS,
    ) -> Generator[Chunk, None, None]:
        """Ask; yields the answer's chunks. The arguments are `generate`'s, and faults are raised at the call.

        `tools` are functions that the model may call: Python functions with type hints, or OpenAI's JSON form. The
        arguments of a call fit the tool's schema. Its function is called, or `run_tool` with the `ToolCall`, the model
        is told the result, or the error, and goes on; after `tool_rounds` rounds of calls it must answer in text.
        Chunks have the text beside the calls, and each call in the `calls` of the chunk that completes it. A call of a
        tool without a function ends the turn, unless there is `run_tool`. `tool_choice` is "auto", "none", "required"
        or a tool's name, which the first answer is held to; with `parallel_tool_calls=False` an answer has one call at
        most.
        """
        request = Request(**arguments(Request, locals(), without=_OF_THE_CONVERSATION))
        use = use_of(self._tokenizer, tools, tool_choice, parallel_tool_calls)
        turn = ToolTurn(use, run_tool, tool_rounds, self._notify) if use else None
        return self.ask(text, request, draft=draft, tools=turn)

    def ask(
        self,
        text: str,
        request: Request,
        *,
        draft: tuple[Model, Tokenizer] | None = None,
        tools: ToolTurn | None = None,
    ) -> Generator[Chunk, None, None]:
        """`send`, with all options at once.

        The cache's bits are the conversation's: others in the request are an OptionError. So is `raw`, since a message
        needs the chat template. `force` holds if the request has it or the conversation.
        """
        if request.raw:
            raise OptionError("raw=True has no effect on a message, which needs the chat template; leave it out")
        request = replace(request, force=request.force or self._memory.force)
        with self._changing:
            self._end_answer()
            if not values.text(text, "the message").strip():
                raise PromptError("the message is empty; give some text")
            if self._prefixes is not None:
                request = replace(request, kv_bits=self._memory.kv_bits, kv_group_size=self._memory.kv_group_size)
            if tools:
                tools.forms(request.form)  # refused before a call is made, not behind it
            begin = partial(self._begun, request=request, draft=draft, number=self._number)
            messages = [*self.messages, {"role": "user", "content": text}]
            answer = begin(messages, tools.use_in(0) if tools else None)
            self._open = answer if tools is None else self._with_calls(answer, begin, tools, self._number)
            return self._read(self._open, self._number)

    def _begun(
        self,
        messages: list[dict[str, Any]],
        use: ToolUse | None,
        *,
        request: Request,
        draft: tuple[Model, Tokenizer] | None,
        number: int,
    ) -> Generator[Chunk, None, None]:
        """The next answer to the messages."""
        notify = self._notify if len(messages) <= 2 else None
        rendered = encode_prompt(self._tokenizer, messages, notify=notify, tools=use.tools if use else None)
        actual = self._with_own_answers(rendered)
        answers = Answers(
            self._model,
            self._tokenizer,
            [actual],
            request,
            draft=draft,
            prompt_cache=self._cache if self._prefixes is None else None,
            prefixes=self._prefixes,
            use=use,
        )
        return self._answered(answers, messages, rendered, actual, number)

    def _with_calls(
        self,
        answer: Generator[Chunk, None, None],
        begin: Callable[[list[dict[str, Any]], ToolUse], Generator[Chunk, None, None]],
        tools: ToolTurn,
        number: int,
    ) -> Generator[Chunk, None, None]:
        """The chunks of an answer, of the calls in it, and of the answers to their results."""
        for round_ in itertools.count(1):
            calls = yield from self._told_apart(answer, tools, number)
            if calls is None:
                return
            results = [tools.result(call) for call in calls]
            with self._changing:
                if number != self._number:
                    return
                answer = begin([*self.messages, *results], tools.use_in(round_))

    def _told_apart(
        self, answer: Generator[Chunk, None, None], tools: ToolTurn, number: int
    ) -> Generator[Chunk, None, list[ToolCall] | None]:
        """The chunks of an answer with its text alone, and the calls to run; None if the turn ends with it."""
        text, run = "", False
        calls: list[ToolCall] = []
        with closing(told_apart(answer, tools.use.parser())) as chunks:
            for chunk in chunks:
                text, calls = text + chunk.text, [*calls, *chunk.calls]
                whole = chunk.finish_reason == "stop" and bool(calls)  # a cut answer stays as the model wrote it
                run = whole and tools.runs(calls)
                if whole:
                    self._note_calls(text, calls, number)
                yield replace(chunk, finish_reason=None if run else chunk.finish_reason)
        return calls if run else None

    def _note_calls(self, text: str, calls: Sequence[ToolCall], number: int) -> None:
        """Give the last message its calls, apart from its text."""
        with self._changing:
            if number == self._number:
                self.messages[-1].update(content=text, tool_calls=[call.json for call in calls])

    def _end_answer(self) -> None:
        """End an answer that was not read to its end, and what it holds."""
        self._number += 1
        answer, self._open = self._open, None
        if answer is not None:
            with suppress(ValueError):  # another thread computes its next token, and will see the number
                answer.close()

    def _read(self, answer: Generator[Chunk, None, None], number: int) -> Generator[Chunk, None, None]:
        """The chunks of an answer; CacheError if it was ended before its end."""
        ended = False
        with closing(answer):
            for chunk in answer:
                ended = chunk.finish_reason is not None
                yield chunk
        if not ended and number != self._number:
            raise CacheError(
                "a further message was sent in this conversation, or it was reset, before this answer was read to its "
                "end; use one Conversation for each stream"
            )

    def _with_own_answers(self, rendered: list[int]) -> list[int]:
        """`rendered` with the answers so far in the ids the model made, where the template only appends."""
        before = len(self._rendered)
        if not before or rendered[:before] != self._rendered:
            return rendered
        decode, stop_ids = self._tokenizer.decode, self._tokenizer.stop_ids
        end = next((i for i in range(before, len(rendered)) if rendered[i] in stop_ids), None)
        # Only where both are the same text: `messages` may have been edited, and a template may rewrite old answers.
        if end is None or decode(rendered[before:end]).strip() != decode(self._answer).strip():
            return rendered
        return [*self._actual, *self._answer, *rendered[end:]]

    def _answered(
        self, answers: Answers, messages: list[dict[str, Any]], rendered: list[int], actual: list[int], number: int
    ) -> Generator[Chunk, None, None]:
        """The chunks of an answer, noted as they come."""
        ids: list[int] = []
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        with self._changing:
            if number != self._number:
                return
            self._rendered, self._actual, self._answer = rendered, actual, ids
            self.messages = [*messages, answer]
        for chunk in answers.chunks():
            with self._changing:
                if number != self._number:
                    return
                answer["content"] += chunk.text
                if chunk.token not in answers.stop_ids:
                    ids.append(chunk.token)
                    if chunk.finish_reason == "stop":
                        ids.clear()  # a stop string was cut off the answer, so these are not its ids
            yield chunk


_COLORS = {"system": "#8d99ae", "user": "#2a6f97", "assistant": "#c8553d"}


def conversation_html(messages: Sequence[Mapping[str, Any]]) -> str:
    """A chat, a block a message."""
    blocks = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        lines = [message["content"].strip(), *(f"→ {call['name']} {call['arguments']}" for call in calls)]
        role, content = message["role"], html.escape("\n".join(filter(None, lines))).replace("\n", "<br>")
        color = _COLORS.get(role, "#8d99ae")
        blocks.append(
            f'<div style="border-left: 4px solid {color}; padding: 0 0 0 0.8em; margin: 0.6em 0; max-width: 50em">'
            f'<b style="color: {color}">{html.escape(role)}</b><br>{content}</div>'
        )
    return "\n".join(blocks)
