"""What was read is read once: keys and values of prompts and answers, kept for requests that begin alike."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import OptionError
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from ..sizes import parse_size, size_text
from ..threads import turn
from ..values import path as as_path
from ..values import shown
from .identity import ModelState
from .prefix_files import PrefixFiles
from .prefix_tree import Node, below, nodes_along, readable, runs_of

LEAST = 16  # tokens; fewer are read about as fast as they are copied


class PrefixStore:
    """Keeps what models read and said, so that a request which begins alike reads only the rest.

        prefixes = PrefixStore("2GB")
        generate(model, tokenizer, f"{text} Who is Mia?", prefixes=prefixes)
        generate(model, tokenizer, f"{text} Where is the owl?", prefixes=prefixes)  # reads the question alone

    It serves any number of runs at once, of any threads and models, and holds `budget` bytes at most; what was not
    asked for longest goes first, and all of it before a run has too little memory. What is reused was read with the
    same weights and adapters, LongRoPE regime and `kv_bits`, so answers are the same as without it. Only a weight
    that was written into in place (`weight[0] = 1`) goes unnoticed: `clear()` then.

    With a `directory` long texts and answers are also kept in files there, of `disk` bytes at most, for later and for
    other processes, any number of which may use it at once. They have the format of `phi3-mlx cache build`, and files
    of that are used too. A file is written when an answer ends, unless most of it is in another; one that is damaged
    is removed.
    Raises OptionError for a size that is none, and CacheError for a directory that cannot be used.
    """

    def __init__(
        self,
        budget: int | str = "2GB",
        *,
        directory: str | os.PathLike[str] | None = None,
        disk: int | str | None = None,
    ):
        self.budget = parse_size(budget)
        if directory is None and disk is not None:
            raise OptionError(f"disk {shown(disk)} has no effect without a directory; give one, or leave it out")
        limit = parse_size("20GB" if disk is None else disk)
        self._files = None
        if directory is not None:
            self._files = PrefixFiles(Path(as_path(directory, "directory", "the name of a folder")).expanduser(), limit)
        self._kept: list[tuple[ModelState, dict[tuple[KVBits | None, bool], Node]]] = []
        self._clock = 0  # one more for each use

    def __repr__(self) -> str:
        failed = f", no file written: {self._files.error}" if self._files is not None and self._files.error else ""
        return f"<PrefixStore: {size_text(self.nbytes)} of {size_text(self.budget)}{failed}>"

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(node.nbytes for root in self._roots() for node in below(root))

    @turn()
    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._kept = []

    @turn()
    def state_of(self, model: Model) -> ModelState:
        """The state that a model is in: the same object for as long as it does not change."""
        self._kept = [kept for kept in self._kept if not kept[0].gone]
        for state, _ in self._kept:
            if state.is_of(model):
                return state
        self._kept.append((ModelState(model), {}))
        return self._kept[-1][0]

    @turn()
    def shared(self, model: Model, prompt: Sequence[int], bits: KVBits | None = None) -> int:
        """How many tokens of a prompt `cache_for` would take over; they count as used."""
        return self._find(model, list(prompt), bits)[2]

    @turn()
    def cache_for(
        self, model: Model, prompt: Sequence[int], bits: KVBits | None = None, *, lacking: float = 0
    ) -> list[KVCache] | None:
        """A new cache that has read the longest known beginning of a prompt; None if there is none worth it.

        The last token of the prompt is never among them: its logits begin the answer. `lacking` bytes give way, other
        prefixes first; if that is not enough, this one is not copied but moved.
        """
        ids = list(prompt)
        path, first, last = self._find(model, ids, bits)
        left = self.nbytes - lacking
        self._forget(left)
        moves = self.nbytes > left
        if self._files is not None and not moves:
            cache = self._files.find(model, self.state_of(model), ids, bits, last)
            if cache is not None:
                return cache
        if last < LEAST:
            self.give_way(self.nbytes - left)
            return None
        if (window := model.config.sliding_window) is not None:
            first = max(first, last - (window - 1) - KVCache.spare)
        if moves:
            path[0][0].remove()
        cache = model.make_cache([len(ids)], None, bits)
        for i, layer in enumerate(cache):
            layer.begin_with(runs_of(path, i, first, last), first)
            for node, _ in path if moves else ():
                if node.layers is not None:
                    node.layers[i] = []
        sequence = cache[0].sequence
        sequence.read(mx.array([ids[:last]], dtype=mx.int32), 0)
        sequence.long = (model.model.is_long(len(ids)),)
        mx.eval(sequence.kept)
        return cache

    @turn()
    def give(
        self,
        model: Model,
        cache: list[KVCache],
        state: ModelState,
        spare: float = math.inf,
        *,
        release: bool = False,
    ) -> None:
        """Keep copies of what `cache`, of one row, has read and is not here yet, in `spare` bytes more at most.

        `state` is what `state_of` gave before it was read: nothing is kept of a model that has changed since.
        `release` empties `cache`, a layer as soon as it is copied, so that all of it never exists twice.
        """
        sequence, start, end = cache[0].sequence, cache[0].start, cache[0].offset
        if not self._can_keep(model, cache, state) or sequence.long is None:
            return
        ids: list[int] = sequence.ids[0, :end].tolist()  # type: ignore[assignment]
        node = self._root(model, cache[0].bits, sequence.long[0])
        path = nodes_along(node, ids)
        known = sum(shared for _, shared in path)
        first, known_node = max(known, start), path[-1] if path else None
        if first >= end:
            self._touch(path)
            return
        if known_node is not None:
            node, shared = known_node
            if shared < len(node.ids):
                node = node.split(shared)
            path[-1] = node, shared
        self._touch(path)
        token_bytes = sum(array.nbytes // array.shape[2] for layer in cache for array in layer.state)
        limit = min(self.budget, self.nbytes + spare + release * sum(layer.nbytes for layer in cache))
        self._forget(limit - (end - first) * token_bytes)
        end = min(end, first + int((limit - self.nbytes) // token_bytes))
        if end <= first:
            return
        layers = []
        for layer in cache:
            layers.append(layer.copy_tokens(first, end))
            if release:
                layer.state = []
        if first > known:
            node = node.add(ids[known:first], None, self._clock)
        node.add(ids[first:end], layers, self._clock)

    @turn()
    def save(self, model: Model, cache: list[KVCache], state: ModelState) -> None:
        """Keep what a cache has read in a file too, if there is a directory and much of it is new. As for `give`."""
        if self._files is not None and self._can_keep(model, cache, state):
            self._files.write(model, state, cache)

    def _can_keep(self, model: Model, cache: list[KVCache], state: ModelState) -> bool:
        """Whether no call was broken off in a cache, and the model is as it was when it began."""
        end = cache[0].offset
        whole = end > 0 and cache[0].sequence.long is not None and all(layer.offset == end for layer in cache)
        return whole and self.state_of(model) is state

    @turn()
    def give_way(self, nbytes: float) -> None:
        """Forget what was not used longest, so much that `nbytes` are free; all of it if need be."""
        self._clock += 1
        self._forget(self.nbytes - nbytes)

    def _forget(self, limit: float) -> None:
        """Forget what was not used longest until `limit` bytes are left, but nothing of what is in use now."""
        left = self.nbytes
        leaves = [(node.used, id(node), node) for root in self._roots() for node in below(root) if not node.children]
        heapq.heapify(leaves)
        while left > limit and leaves and leaves[0][0] < self._clock:
            _, _, node = heapq.heappop(leaves)
            left -= node.nbytes
            parent = node.parent
            node.remove()
            if parent is not None and parent.parent is not None and not parent.children:
                heapq.heappush(leaves, (parent.used, id(parent), parent))

    def _find(self, model: Model, ids: list[int], bits: KVBits | None) -> tuple[list[tuple[Node, int]], int, int]:
        """The nodes that a prompt goes through, and what of it can be taken over: the positions `first` to `last`."""
        path = nodes_along(self._root(model, bits, model.model.is_long(len(ids))), ids[:-1])
        self._touch(path)
        return path, *readable(path, model.config.sliding_window)

    def _touch(self, path: list[tuple[Node, int]]) -> None:
        self._clock += 1
        for node, _ in path:
            node.used = self._clock

    def _roots(self) -> list[Node]:
        return [root for _, roots in self._kept for root in roots.values()]

    def _root(self, model: Model, bits: KVBits | None, long: bool) -> Node:
        """The tree of what a model has read, packed so and in that LongRoPE regime."""
        state = self.state_of(model)
        roots = next(roots for kept, roots in self._kept if kept is state)
        return roots.setdefault((bits, long), Node([], None))
