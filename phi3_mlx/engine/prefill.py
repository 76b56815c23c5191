"""Reading prompts into a cache, chunk by chunk, and what a cache that has read something spares of it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import mlx.core as mx

from ..models.cache import RECOMPUTE_CHUNK, KVBits, KVCache
from ..models.decoder import Model
from .steps import Stepper

PromptProgress = tuple[int, int]  # how many tokens are read, and of how many

_LONG = 512  # tokens of a prompt's last chunk for which the last layer takes longer than a step of one token
_PAD = 0  # any id: padding is never seen


def common_length(a: Iterable[int], b: Iterable[int]) -> int:
    """How many of the first ids are the same."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def shared_length(cache: list[KVCache], prompt: Sequence[int]) -> int:
    """How many tokens of the prompt `cache` has read already. Not the last: its logits begin the answer."""
    read: list[int] = cache[0].sequence.ids[0, : cache[0].offset].tolist()  # type: ignore[assignment]
    return common_length(read, prompt[:-1])


def cache_for(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    given: list[KVCache] | None,
    shared: int,
    bits: KVBits | None,
    chunk: int,
) -> list[KVCache]:
    """The cache to read the prompts into: `given`, cut to the `shared` first tokens, or a new one where there are none.

    A run that reads with `given` now hears of it at its next step, whichever is returned. `bits` pack a new one.
    `chunk`: how many tokens are read at once.
    """
    lengths = [len(prompt) for prompt in prompts]
    if given is not None:
        _cut(given, shared)
    if given is None or not shared:
        padding = [max(lengths) - length for length in lengths]
        given = model.make_cache(lengths, padding if any(padding) else None, bits)
    sequence = given[0].sequence
    sequence.prompt_length = tuple(lengths)
    sequence.recompute_chunk = min(chunk, RECOMPUTE_CHUNK)
    return given


def _cut(cache: list[KVCache], length: int) -> None:
    """Take the cache from its run, and leave the first `length` tokens in it."""
    cache[0].sequence.reader = None
    for layer in cache:
        layer.trim(layer.offset - length)
        layer.shrink()


def read_prompts(
    stepper: Stepper, prompts: Sequence[Sequence[int]], chunk: int
) -> Generator[PromptProgress, None, mx.array]:
    """Read what the cache has not of the prompts, `chunk` tokens of each row at a time.

    Yields how far it is after every chunk but the last; returns the last tokens' hidden states (B, 1, hidden_size).
    """
    longest = max(map(len, prompts))
    ids = mx.array([[_PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=mx.int32)
    while True:
        done = stepper.offset
        end = _chunk_end(done, chunk, longest)
        hidden = stepper.forward(ids[:, done:end])
        stepper.settle()
        if end == longest:
            return hidden[:, -1:]
        del hidden  # what the last layer did not compute would hold its keys, which would be copied to grow
        mx.clear_cache()
        yield end, longest


def _chunk_end(done: int, chunk: int, longest: int) -> int:
    """Where the chunk that begins at `done` ends."""
    end = min(done + chunk, longest)
    if end == longest and end - done >= _LONG:
        end -= 1  # read alone, the last token spares all others the last layer, of which they need but the keys
    return end
