"""Text in, text out: load a model, generate, stream, batch, chat."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..engine.batch import FinishReason, Generation, Statistics, Token, check_length
from ..engine.lookup import MAX_DRAFT
from ..engine.sampling import Sampling
from ..errors import OptionError, Phi3Error, PromptError
from ..models.cache import KVCache
from ..models.decoder import Model
from ..text.chat import render_chat
from ..text.stops import Stops
from ..values import check_function, flag, listed, number, path, refusal, shown, texts, token_ids, whole

if TYPE_CHECKING:
    from ..engine.plan import Run
    from ..models.cache import KVBits
    from ..models.decoder import LongRopeRule
    from ..text.tokenizer import Tokenizer
    from .prompt_cache import PromptCache

Message = Mapping[str, str]
_MOST_LOOKUP = KVCache.spare  # a longer draft could not be taken back from a windowed cache
_PROMPT_KINDS = "a prompt is a text, a list of {'role', 'content'} messages, or a list of token ids"
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """One generated token and the text it made certain ("" while a character or a stop string is incomplete).

    `finish_reason` is None until the last chunk: "stop" (the model ended its answer or a stop string came) or
    "length". The other figures are those of the run so far: tokens (`prefilled_tokens` are those of the prompt that no
    cache held), tokens a second, peak bytes.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    prompt_tokens: int
    prefilled_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: int


def load(
    name: str | Path,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    adapter: str | Path | Mapping[str, float] | None = None,
    force: bool = False,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer.

    `name`: "tiny" (bundled), an alias of `phi3-mlx models`, a local directory, or a Hugging Face repository id, then
    with an optional `revision`. `dtype`: "float32", "bfloat16" or "float16" instead of the device's best.
    `adapter`: a folder of `phi3-mlx tune` or mlx-lm, or several with their weights, {"one": 1.0, "other": 0.5}.
    A model that the memory at hand cannot hold is refused before it is read, unless `force`.
    Raises ModelNotFoundError, CheckpointError, ConfigError, TokenizerError, AdapterError, OptionError or
    MemoryLimitError.
    """
    from ..store import hub
    from ..text import tokenizer

    folder = "an adapter's folder, or several with their weights"
    given = list(adapter.items()) if isinstance(adapter, Mapping) else [] if adapter is None else [(adapter, 1.0)]
    weights = {path(one, "adapter", folder): number(weight, "an adapter's weight") for one, weight in given}
    directory = hub.resolve(name, revision)
    words = tokenizer.load_tokenizer(directory)  # first: it reads little and fails fast
    plan_loading(directory, str(name), dtype=dtype, adapters=weights, force=force)
    return load_adapted(directory, str(name), revision, dtype=dtype, longrope=longrope, adapters=weights), words


def load_adapted(
    directory: Path,
    name: str,
    revision: str | None = None,
    *,
    dtype: str | None,
    longrope: LongRopeRule,
    adapters: Mapping[str, float],
) -> Model:
    """The model of `directory`, which was asked for by `name`, with the adapters of these folders in use."""
    from ..store import checkpoint

    model = checkpoint.load_model(directory, dtype=dtype, longrope=longrope)
    if adapters:
        from ..adapters.folder import apply, base_of

        apply(model, base_of(directory, name, revision), adapters)
    return model


def load_model(
    name: str | Path,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    force: bool = False,
) -> Model:
    """The model of `load` alone."""
    from ..store import checkpoint, hub

    directory = hub.resolve(name, revision)
    plan_loading(directory, str(name), dtype=dtype, force=force)
    return checkpoint.load_model(directory, dtype=dtype, longrope=longrope)


def load_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of `load` alone."""
    from ..store import hub
    from ..text import tokenizer

    return tokenizer.load_tokenizer(hub.resolve(name, revision))


def plan_loading(
    directory: Path, name: str, *, dtype: str | None = None, adapters: Iterable[str] = (), force: bool = False
) -> None:
    """Raise MemoryLimitError if the weights of `directory`, asked for by `name`, do not fit (and not `force`).

    With those of the folders `adapters`. A run is planned when it begins, with its cache and work.
    """
    from ..engine import plan
    from ..store import checkpoint

    if flag(force, "force"):
        return
    weights, cast = checkpoint.weight_bytes(directory, dtype), checkpoint.cast_bytes(directory, dtype)
    weights += sum(
        file.stat().st_size for folder in adapters for file in Path(folder).expanduser().glob("*.safetensors")
    )
    parts = {"weights": weights, "one of them as it is stored": cast}
    plan.check_room(f"loading {name}", parts, "take a model of fewer bits")


def plan_run(
    directory: Path,
    prompt: int,
    max_tokens: int,
    *,
    dtype: str | None = None,
    longrope: LongRopeRule = "auto",
    kv_bits: KVBits | None = None,
    kept: bool = False,
    force: bool = False,
) -> None:
    """Raise MemoryLimitError if the model of `directory`, a prompt of so many tokens and its answer do not fit.

    Only headers are read, so a run that cannot work is refused before anything is loaded. `kept`: the cache outlives
    the run. `force` refuses nothing. Raises PromptError for a prompt that the model's context cannot hold.
    """
    from ..engine import plan

    run = run_of(directory, prompt + max_tokens, dtype=dtype, kv_bits=kv_bits)
    check_length(run.config, prompt)
    if longrope == "auto" and prompt <= run.config.original_max_position_embeddings:
        run = replace(run, rereads=plan.reread_at_boundary(run.config))
    plan.check_fits(run, math.inf if force else plan.room(), prompt=prompt, kept=kept)


def run_of(directory: Path, length: int, *, dtype: str | None = None, kv_bits: KVBits | None = None) -> Run:
    """What memory depends on, of the model of `directory` on this machine; only headers are read."""
    from ..engine import plan
    from ..models import read_config
    from ..models.attention import fused_attention
    from ..store import checkpoint

    config = read_config(directory)
    return plan.Run(
        config,
        checkpoint.weight_bytes(directory, dtype),
        min(length, config.max_position_embeddings),
        bits=kv_bits,
        itemsize=checkpoint.computed_size(config, dtype),
        fused=fused_attention(),
    )


def unload(model: Model) -> None:
    """Give the model's memory back, in a notebook say; the model cannot be used afterwards."""
    _check_model(model)
    model.clear()
    gc.collect()
    mx.clear_cache()


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    lookup: int = MAX_DRAFT,
    prompt_cache: PromptCache | None = None,
    force: bool = False,
) -> str:
    """The model's answer to `prompt`.

    `prompt`: a text (put into the model's chat template unless `raw`), a list of {"role", "content"} messages, or a
    list of token ids (sent as they are). `stop`: texts that end the answer and are not part of it; control tokens too
    ("<|user|>"). The sampling options are those of `phi3_mlx.engine.sampling.Sampling`. `kv_bits` (2, 3, 4, 6 or 8; two
    numbers: of keys and of values) packs the cache, `kv_group_size` numbers (32, or 64) to a scale. `lookup`: how many
    tokens may be guessed from earlier text and verified at once (0: none), which changes the speed alone.
    `prompt_cache` keeps what is read for the next prompt that begins alike; it has bits of its own, and others in
    `kv_bits` are refused. A run that the memory at hand cannot hold is refused unless `force`.
    Raises PromptError, ChatError, OptionError, CacheError or MemoryLimitError.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    bits = make_kv_bits(kv_bits, kv_group_size)
    run = _Run(
        model,
        tokenizer,
        [prompt],
        max_tokens,
        sampling,
        stop,
        raw,
        kv_bits=bits,
        lookup=lookup,
        prompt_cache=prompt_cache,
        force=force,
    )
    return "".join(text for _, text, _ in run)


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    lookup: int = MAX_DRAFT,
    prompt_cache: PromptCache | None = None,
    force: bool = False,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generator[Chunk, None, None]:
    """As `generate`, but yields a `Chunk` a token while the answer is made.

    Faults in the arguments are raised at the call, before anything is computed. `on_prefill(done, total)` is
    called while a long prompt is read.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    bits = make_kv_bits(kv_bits, kv_group_size)
    run = _Run(
        model,
        tokenizer,
        [prompt],
        max_tokens,
        sampling,
        stop,
        raw,
        kv_bits=bits,
        lookup=lookup,
        prompt_cache=prompt_cache,
        force=force,
        on_prefill=on_prefill,
    )
    return run.chunks()


def batch_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    kv_bits: int | tuple[int, int] | None = None,
    kv_group_size: int | None = None,
    force: bool = False,
) -> list[str]:
    """The answers to several prompts, computed together; each is what `generate` gives for that prompt alone."""
    if isinstance(prompts, str):
        raise PromptError("batch_generate takes a list of prompts, and this is one text; give [text], or call generate")
    several = listed(prompts)
    if several is None:
        raise PromptError(f"prompts is {shown(prompts)}; give a list of prompts")
    if not several:
        return []
    prompts = several
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    bits = make_kv_bits(kv_bits, kv_group_size)
    run = _Run(model, tokenizer, prompts, max_tokens, sampling, stop, raw, kv_bits=bits, force=force)
    texts: list[list[str]] = [[] for _ in prompts]
    for token, text, _ in run:
        texts[token.row].append(text)
    return ["".join(parts) for parts in texts]


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, *, raw: bool = False, notify: Callable[[str], None] | None = None
) -> list[int]:
    """The token ids of a prompt, as `generate` sends them. `notify` gets a sentence if a system message was moved."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text")
        if not raw:
            return render_chat(tokenizer, [{"role": "user", "content": prompt}], notify=notify)
        bos = tokenizer.bos_token_id if tokenizer.add_bos_token else None
        ids = tokenizer.encode(prompt, special=True)
        return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids
    items = listed(prompt)
    if items and isinstance(items[0], Mapping):
        if raw:
            raise PromptError("raw=True has no effect on messages, which need the chat template; leave it out")
        return render_chat(tokenizer, items, notify=notify)
    sent = None if items is None else token_ids(items)
    if sent is None or isinstance(prompt, set | frozenset):
        odd = [item for item in items or () if token_ids([item]) is None]
        raise PromptError(f"the prompt {f'holds {shown(odd[0])}' if odd else f'is {shown(prompt)}'}; {_PROMPT_KINDS}")
    return sent


def check_limits(max_tokens: int, stop: str | Sequence[str] | None, lookup: int = 0) -> tuple[int, list[str], int]:
    """The arguments, typed, the stop strings as a list; OptionError for another type, an empty string, or a number
    outside its range."""
    max_tokens, lookup = whole(max_tokens, "max_tokens"), whole(lookup, "lookup")
    stops = [] if stop is None else list(texts(stop, "stop"))
    if not 0 <= lookup <= _MOST_LOOKUP:
        raise OptionError(f"lookup {lookup} is outside its range; give 0 (off) to {_MOST_LOOKUP}")
    if max_tokens < 1:
        raise OptionError(f"max_tokens {max_tokens} is outside its range; give 1 or more")
    if not all(stops):
        raise OptionError("a stop string is empty; give at least one character")
    return max_tokens, stops, lookup


def check_loaded(model: Model) -> None:
    """Phi3Error unless it is a model, and one that was not unloaded."""
    _check_model(model)
    if not model:
        raise Phi3Error("this model was unloaded; load() it again")


def _check_model(model: Model) -> None:
    if isinstance(model, str | Path):
        name = shown(str(model))
        raise Phi3Error(f"{name} is a model's name; give the model of: model, tokenizer = load({name})")
    if isinstance(model, tuple):
        raise Phi3Error("this is all that load() gives; take it apart first: model, tokenizer = load(...)")
    if not hasattr(model, "parameters"):
        raise refusal(model, "model", "the one that load() gives")


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """OptionError unless it is a tokenizer of this package."""
    from ..text.tokenizer import Tokenizer as Ours

    if not isinstance(tokenizer, Ours):
        raise refusal(tokenizer, "tokenizer", "the one that load() gives beside the model")


def make_kv_bits(kv_bits: int | Sequence[int] | None, kv_group_size: int | None = None) -> KVBits | None:
    """How to pack a cache: `kv_bits` of keys and values alike or of each, None for not at all. Raises OptionError."""
    from ..models.cache import KVBits

    if kv_bits is None:
        if kv_group_size is not None:
            raise OptionError(f"kv_group_size {shown(kv_group_size)} has no effect without kv_bits=BITS; leave it out")
        return None
    each = kv_bits if isinstance(kv_bits, tuple | list) else (kv_bits, kv_bits)
    if len(each) != 2:
        raise OptionError(f"kv_bits has {len(each)} numbers; give one such as 4, or (8, 4) of keys and values")
    keys, values = (whole(bits, "kv_bits") for bits in each)
    return (
        KVBits(keys, values) if kv_group_size is None else KVBits(keys, values, whole(kv_group_size, "kv_group_size"))
    )


class _Run:
    """One or more prompts through the engine, and their text out of it: (token, text, finish reason) a token."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        max_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str] | None,
        raw: bool,
        kv_bits: KVBits | None = None,
        lookup: int = 0,
        prompt_cache: PromptCache | None = None,
        force: bool = False,
        on_prefill: Callable[[int, int], None] | None = None,
    ):
        check_loaded(model)
        check_tokenizer(tokenizer)
        max_tokens, stops, lookup = check_limits(max_tokens, stop, lookup)
        raw, force = flag(raw, "raw"), flag(force, "force")
        check_function(on_prefill, "on_prefill")
        if prompt_cache is not None and not hasattr(prompt_cache, "layers_for"):
            raise refusal(prompt_cache, "prompt_cache", "a PromptCache")
        if prompt_cache is not None and kv_bits not in (None, prompt_cache.bits):
            raise OptionError("kv_bits has no effect beside a prompt_cache, which has bits of its own; leave it out")
        self._decoders = [tokenizer.stream() for _ in prompts]
        self._stops = Stops(tokenizer, stops)
        self._finders = [self._stops.finder() for _ in prompts]
        rows = [encode_prompt(tokenizer, prompt, raw=raw) for prompt in prompts]
        self.generation = Generation(
            model,
            rows,
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=self._stops.ids,
            cache=None if prompt_cache is None else prompt_cache.layers_for(model),
            kv_bits=kv_bits if prompt_cache is None else prompt_cache.bits,
            lookup=lookup,
            force=force,
            kept=prompt_cache is not None,
            on_prefill=on_prefill,
        )
        if prompt_cache is not None:
            prompt_cache.keep(self.generation.cache)  # it grows in place

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stops.ids

    def __iter__(self) -> Iterator[tuple[Token, str, FinishReason | None]]:
        for token in self.generation:
            decoder, finder, reason = self._decoders[token.row], self._finders[token.row], token.finish_reason
            hidden = self._stops.hidden.get(token.id, "")
            text = "" if token.id in self._stops.ids else decoder.add(token.id)
            if reason or hidden:
                text += decoder.finish()
            text, hit = finder.add(text, hidden)
            if hit:
                reason = "stop"
                self.generation.finish(token.row)
            elif reason:
                text += finder.finish()
            yield token, text, reason

    def chunks(self) -> Generator[Chunk, None, None]:
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
            )
