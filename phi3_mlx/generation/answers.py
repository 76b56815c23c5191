"""Text in, text out: load a model, generate, stream, batch, chat."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..engine.generation import Generation
from ..engine.prefixes import PrefixStore, check_store
from ..engine.scheduler import Scheduler
from ..engine.tokens import FinishReason, Statistics, Token
from ..errors import OptionError, PromptError
from ..models.decoder import Model
from ..option import arguments
from ..store.other import check_other
from ..text.chat import render_chat
from ..text.messages import Message
from ..text.tool_use import ToolUse, use_tools
from ..text.tools import Tool, ToolChoice
from ..values import check_function, flag, listed, refusal, shown, token_ids
from .answer import begin_answers
from .chunks import AnswerText, Chunk, told_apart, with_calls
from .loading import check_draft, check_loaded, check_tokenizer
from .request import Request

if TYPE_CHECKING:
    from ..text.schemas import Schema
    from ..text.tokenizer import Tokenizer
    from .prompt_cache import PromptCache

_PROMPT_KINDS = "a prompt is a text, a list of {'role', 'content'} messages, or a list of token ids"
Prompt = str | Sequence[Message] | Sequence[int]
Tools = Sequence[Tool | Callable[..., Any] | Mapping[str, Any]] | str


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = Request.max_tokens,
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
    raw: bool = False,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    lookup: int = Request.lookup,
    draft: tuple[Model, Tokenizer] | None = None,
    schema: Schema | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    choices: Sequence[str] | str | None = None,
    tools: Tools | None = None,
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
    prompt_cache: PromptCache | None = None,
    prefixes: PrefixStore | None = None,
    force: bool = False,
) -> AnswerText:
    """The model's answer to `prompt`: a text, which also says why it ends (`finish_reason`), and calls (`calls`).

    `prompt`: a text (put into the model's chat template unless `raw`), a list of {"role", "content"} messages, or a
    list of token ids (sent as they are). `stop`: texts that end the answer and are not part of it; control tokens too
    ("<|user|>"). `logit_bias`: what the logits of some ids gain, {42: -5.0}. The sampling options are those of
    `Sampling`. `kv_bits` (2, 3, 4, 6 or 8; two numbers: of keys and of values) packs the cache, `kv_group_size` numbers
    (32, or 64) to a scale. `lookup`: how many tokens may be guessed from earlier text and verified at once (0: none),
    which changes the speed alone. So does `draft`, a smaller model of the same vocabulary with its tokenizer, as `load`
    gives them: it guesses tokens where that pays. `prompt_cache` keeps what is read for the next prompt that begins
    alike; it has bits of its own, and others in `kv_bits` are refused. `prefixes` keeps what all prompts read that it
    is given to. A run that the memory at hand cannot hold is refused unless `force`.
    One of `schema` (a JSON schema as a dict or a text, a pydantic model or a dataclass), `regex`, `grammar` (Lark) and
    `choices` (texts) says what the answer must look like: it does so unless `max_tokens` or a stop string cuts it.
    `tools` (Python functions with type hints, OpenAI's JSON form, or `Tool`s) may be asked for by the model, with
    arguments that fit; nothing is called here. `tool_choice` is "auto", "none", "required" or a tool's name; with
    `parallel_tool_calls=False` there is one call at most.
    Raises PromptError, ChatError, OptionError, CacheError or MemoryLimitError.
    """
    request = Request(**arguments(Request, locals()))
    use = use_of(tokenizer, tools, tool_choice, parallel_tool_calls)
    answers = Answers(
        model, tokenizer, [prompt], request, draft=draft, prompt_cache=prompt_cache, prefixes=prefixes, use=use
    )
    return answers.texts()[0]


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = Request.max_tokens,
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
    raw: bool = False,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    lookup: int = Request.lookup,
    draft: tuple[Model, Tokenizer] | None = None,
    schema: Schema | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    choices: Sequence[str] | str | None = None,
    tools: Tools | None = None,
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
    prompt_cache: PromptCache | None = None,
    prefixes: PrefixStore | None = None,
    force: bool = False,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generator[Chunk, None, None]:
    """As `generate`, but yields a `Chunk` a token while the answer is made; the one that completes a call has it.

    Faults in the arguments are raised at the call, before anything is computed. `on_prefill(done, total)` is
    called while a long prompt is read.
    """
    request = Request(**arguments(Request, locals()))
    use = use_of(tokenizer, tools, tool_choice, parallel_tool_calls)
    chunks = Answers(
        model,
        tokenizer,
        [prompt],
        request,
        draft=draft,
        prompt_cache=prompt_cache,
        prefixes=prefixes,
        on_prefill=on_prefill,
        use=use,
    ).chunks()
    return told_apart(chunks, use.parser()) if use else chunks


def batch_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    *,
    max_tokens: int = Request.max_tokens,
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
    raw: bool = False,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    prefixes: PrefixStore | None = None,
    schema: Schema | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    choices: Sequence[str] | str | None = None,
    tools: Tools | None = None,
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
    force: bool = False,
) -> list[AnswerText]:
    """The answers to several prompts, computed together; each is what `generate` gives for that prompt alone.

    With `prefixes` what several of them begin with is read once. The error of one ends all, and says which prompt it is
    (0: the first).
    """
    if isinstance(prompts, str):
        raise PromptError("batch_generate takes a list of prompts, and this is one text; give [text], or call generate")
    several = listed(prompts)
    if several is None:
        raise PromptError(f"prompts is {shown(prompts)}; give a list of prompts")
    if not several:
        return []
    request = Request(**arguments(Request, locals(), without=("lookup",)), lookup=0)
    use = use_of(tokenizer, tools, tool_choice, parallel_tool_calls)
    return Answers(model, tokenizer, several, request, prefixes=prefixes, use=use).texts()


def use_of(tokenizer: Tokenizer, tools: Tools | None, choice: ToolChoice, parallel: bool) -> ToolUse | None:
    """What `generate` is asked of tools; None without any. Raises OptionError."""
    check_tokenizer(tokenizer)
    use = use_tools(tokenizer, tools, choice, flag(parallel, "parallel_tool_calls"))
    return use if use.tools else None


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    raw: bool = False,
    notify: Callable[[str], None] | None = None,
    tools: Tools | None = None,
) -> list[int]:
    """The token ids of a prompt, as `generate` sends them with these `tools`.

    `notify` gets a sentence if a system message was moved. Raises PromptError, ChatError, and OptionError for tools.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text")
        if not raw:
            return _rendered(tokenizer, [{"role": "user", "content": prompt}], notify, tools)
        if tools:
            raise PromptError("raw=True has no place beside tools, which the chat template lists; leave one out")
        ids = tokenizer.encode(prompt, special=True)
        return tokenizer.with_bos(ids) if tokenizer.add_bos_token else ids
    items = listed(prompt)
    if items and isinstance(items[0], Mapping):
        if raw:
            raise PromptError("raw=True has no effect on messages, which need the chat template; leave it out")
        return _rendered(tokenizer, items, notify, tools)
    sent = None if items is None else token_ids(items)
    if sent is None or isinstance(prompt, set | frozenset):
        odd = [item for item in items or () if token_ids([item]) is None]
        raise PromptError(f"the prompt {f'holds {shown(odd[0])}' if odd else f'is {shown(prompt)}'}; {_PROMPT_KINDS}")
    return sent


def _rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    notify: Callable[[str], None] | None,
    tools: Tools | None,
) -> list[int]:
    """The ids of messages; where tools are known, or were called, as the model is told of them."""
    called = (isinstance(message, Mapping) and message.get("tool_calls") for message in messages)
    if tools or any(called):
        return use_tools(tokenizer, tools).render(tokenizer, messages, notify)
    return render_chat(tokenizer, messages, notify=notify)


class Answers:
    """The answers to one or more prompts, computed together: (token, text, finish reason) a token.

    Between them stands the engine, which knows no text: it gets ids and `Sampling`, and its ids become text here. The
    faults of `generate` are raised at once. `use`: the tools that the model may call.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        request: Request,
        *,
        draft: tuple[Model, Tokenizer] | None = None,
        prompt_cache: PromptCache | None = None,
        prefixes: PrefixStore | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        use: ToolUse | None = None,
    ):
        check_loaded(model)
        check_tokenizer(tokenizer)
        if not model.of_family:
            check_other({"kv_bits": request.kv_bits, "draft": draft, "prefixes": prefixes})
        draft_model = None if draft is None else check_draft(draft, tokenizer)
        check_function(on_prefill, "on_prefill")
        bits = request.cache_bits()
        if prompt_cache is not None and not hasattr(prompt_cache, "layers_for"):
            raise refusal(prompt_cache, "prompt_cache", "a PromptCache")
        if prompt_cache is not None and bits not in (None, prompt_cache.bits):
            raise OptionError("kv_bits has no effect beside a prompt_cache, which has bits of its own; leave it out")
        check_store(prefixes)
        if prompt_cache is not None and prefixes is not None:
            raise OptionError("prefixes has no effect beside a prompt_cache; leave out one of the two")
        self._use = use
        tools = use.tools if use else None
        rows = [encode_prompt(tokenizer, prompt, raw=request.raw, tools=tools) for prompt in prompts]
        self._answers = begin_answers(tokenizer, rows, request, use.form(request.form) if use else None)
        jobs = [replace(answer.job, draft=draft_model) for answer in self._answers]
        draft_cache = None
        if prompt_cache is not None:
            layers, draft_layers = prompt_cache.layers_for(model), None
            if draft_model is not None:
                draft_cache = prompt_cache.beside(draft_model)
                draft_layers = draft_cache.layers_for(draft_model)
            jobs = [replace(job, cache=layers, kv_bits=prompt_cache.bits, draft_cache=draft_layers) for job in jobs]
        scheduler = Scheduler(model, force=request.force, kept=prompt_cache is not None, prefixes=prefixes)
        self.generation = Generation.of_jobs(scheduler, jobs, on_prefill=on_prefill)
        if prompt_cache is not None:
            prompt_cache.keep(self.generation.cache)  # it grows in place
        if draft_cache is not None:
            draft_cache.keep(self.generation.draft_cache)

    @property
    def stop_ids(self) -> Collection[int]:
        return self._answers[0].job.stop_ids

    def __iter__(self) -> Iterator[tuple[Token, str, FinishReason | None]]:
        for token in self.generation:
            text, reason = self._answers[token.row].take(token)
            if reason and not token.finish_reason:
                self.generation.finish(token.row)
            yield token, text, reason

    def texts(self) -> list[AnswerText]:
        """The whole answers, their calls apart from their texts."""
        texts: list[list[str]] = [[] for _ in self._answers]
        reasons: dict[int, FinishReason | None] = {}
        for token, text, reason in self:
            texts[token.row].append(text)
            reasons[token.row] = reason
        return [
            with_calls("".join(parts), reasons.get(row), self._use.parser() if self._use else None)
            for row, parts in enumerate(texts)
        ]

    def chunks(self) -> Generator[Chunk, None, None]:
        """The only answer's, its calls in the text."""
        for token, text, reason in self:
            s: Statistics = self.generation.statistics
            yield Chunk(
                text,
                token.id,
                token.logprob,
                reason,
                s.prompt_tokens,
                s.prefilled_tokens,
                s.prompt_tps,
                s.generated_tokens,
                s.decode_tps,
                s.peak_memory,
                s.drafted_tokens,
                s.accepted_tokens,
            )
