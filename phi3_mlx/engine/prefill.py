"""Reading prompts into a cache, chunk by chunk, and what a cache that has read something spares of it."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.cache import KVBits, KVCache
from ..models.decoder import Model


def common_length(a: list[int], b: list[int]) -> int:
    """How many of the first ids are the same. Slices are compared, because Python does that a hundred times faster."""
    shared, most = 0, min(len(a), len(b))
    while shared < most:
        middle = (shared + most + 1) // 2
        if a[shared:middle] == b[shared:middle]:
            shared = middle
        else:
            most = middle - 1
    return shared


def shared_length(cache: list[KVCache], prompt: Sequence[int]) -> int:
    """How many tokens of the prompt `cache` has read already. Not the last: its logits begin the answer."""
    if not cache[0].offset:
        return 0
    sequence = cache[0].sequence
    if any(edit.by_prompt for edit in sequence.edits) and sequence.prompt_of(0) != len(prompt):
        return 0  # it was changed as another prompt's
    read: list[int] = sequence.ids[0, : cache[0].offset].tolist()  # type: ignore[assignment]
    return common_length(read, list(prompt[:-1]))


def cache_for(
    model: Model, length: int, *, given: list[KVCache] | None, shared: int, bits: KVBits | None
) -> list[KVCache]:
    """The cache to read a prompt into: `given`, cut to the `shared` first tokens, or a new one where there are none.

    `length`: tokens that the sequence counts as having, which decides its LongRoPE regime.
    A run that reads with `given` now hears of it at its next step, whichever is returned. `bits` pack a new one.
    """
    if given is not None:
        _cut(given, shared)
    if given is None or not shared:
        return model.make_cache([length], None, bits)
    given[0].sequence.prompt_length = (length,)
    return given


def _cut(cache: list[KVCache], length: int) -> None:
    """Take the cache from its run, and leave the first `length` tokens in it."""
    cache[0].sequence.reader = None
    for layer in cache:
        layer.trim(layer.offset - length)
        layer.shrink()
