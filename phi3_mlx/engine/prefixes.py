"""What was read is read once: keys and values of prompts and answers, kept for requests that begin alike."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..errors import OptionError
from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from ..models.slots import take_out
from ..paths import expanded
from ..sizes import parse_size, size_text
from ..threads import turn
from ..values import path as as_path
from ..values import refusal, shown
from .cache_file import Facts, facts_of, runs_of_cache
from .identity import ModelState
from .prefix_files import PrefixFiles
from .prefix_tree import Layers, Node, below, nodes_along, path_to, readable, runs_of

LEAST = 16  # tokens; fewer are read about as fast as they are copied
_COPIED_AT_ONCE = 1 << 24  # bytes: more layers together wait less, but what is released exists twice for so long


class PrefixStore:
    """Keeps what models read and said, so that a request which begins alike reads only the rest.

        prefixes = PrefixStore("2GB")
        generate(model, tokenizer, f"{text} Who is Mia?", prefixes=prefixes)
        generate(model, tokenizer, f"{text} Where is the owl?", prefixes=prefixes)  # reads the question alone

    It keeps what a draft model read as well. What is reused was read with the same weights and adapters, LongRoPE
    regime and `kv_bits`, so answers are the same as without it. Only on an NVIDIA GPU a weight that was written into in
    place (`weight[0] = 1`) goes unnoticed: `clear()` then.

    It holds `budget` bytes at most; what was not asked for longest goes first, and all of it before a run has too
    little memory. It serves any number of runs at once, of any threads and models: its methods take turns with the
    steps of runs, so a program that answers many people needs one store, and no locks of its own.

    With a `directory` long texts and answers are also kept in files there, of `disk` bytes at most, for later and for
    other processes, any number of which may use it at once. They have the format of `phi3-mlx cache build`, and files
    of that are used too. A file is written when an answer ends, and before something is forgotten that is in none,
    unless most of it is in another; one that is damaged is removed. Another thread writes them while runs go on; a run
    waits for that at its end, and where only what is not written yet could make room for it.
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
            self._files = PrefixFiles(expanded(as_path(directory, "directory", "the name of a folder")), limit)
        self._kept: list[tuple[ModelState, dict[tuple[KVBits | None, bool], _Tree]]] = []
        self._clock = 0  # one more for each use

    def __repr__(self) -> str:
        failed = f", no file written: {self.error}" if self.error else ""
        return f"<PrefixStore: {size_text(self.nbytes)} of {size_text(self.budget)}{failed}>"

    @property
    def error(self) -> Exception | None:
        """The last fault that kept a file from being written; no run fails with it."""
        return None if self._files is None else self._files.error

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(node.nbytes for tree in self._trees() for node in below(tree.root))

    @turn()
    def clear(self) -> None:
        """Forget everything that is in memory. Files stay."""
        self._kept = []

    def settle(self) -> None:
        """Wait until the files are written that are to be."""
        if self._files is not None:
            self._files.settle()

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
        tree = self._tree(model, self.state_of(model), bits, model.model.is_long(len(prompt)))
        return self._find(tree, list(prompt))[2]

    @turn()
    def cache_for(
        self,
        model: Model,
        prompt: Sequence[int],
        bits: KVBits | None = None,
        *,
        length: int | None = None,
        lacking: float = 0,
        state: ModelState | None = None,
    ) -> list[KVCache] | None:
        """A new cache that has read the longest known beginning of a prompt; None if there is none worth it.

        The last token of the prompt is never among them: its logits begin the answer. `length`: tokens that the
        sequence counts as having, where they are more than these; they decide its LongRoPE regime. `lacking` bytes give
        way, other prefixes first; if that is not enough, this one is not copied but moved. `state`: what `state_of`
        gives, if that was just asked.
        """
        ids = list(prompt)
        length = len(ids) if length is None else length
        long = model.model.is_long(length)
        tree = self._tree(model, state or self.state_of(model), bits, long)
        path, first, last = self._find(tree, ids)
        left = self.nbytes - lacking
        self._forget(left)
        moves = self.nbytes > left
        if self._files is not None and not moves:
            assert tree.facts is not None
            cache = self._files.find(model, tree.facts, ids, length, last)
            if cache is not None:
                return cache
        if last < LEAST:
            self.give_way(self.nbytes - left)
            return None
        cache = model.make_cache([length], None, bits)
        first = max(first, cache[0].first_kept(last))
        if moves:
            self.settle()  # or what is being written would be there twice
            path[0][0].remove()
        for i, layer in enumerate(cache):
            layer.begin_with([run.slices for run in runs_of(path, i, first, last)], first)
            for node, _ in path if moves else ():
                if node.layers is not None:
                    node.layers[i] = []
        sequence = cache[0].sequence
        sequence.read(mx.array([ids[:last]], dtype=mx.int32), 0)
        sequence.long = (long,)
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
        save: bool = False,
    ) -> None:
        """Keep copies of what `cache`, of one row, has read and is not here yet, in `spare` bytes more at most.

        `state` is what `state_of` gave before it was read, and gives still: what a changed model has read is not to be
        kept. `release` empties `cache` as it is copied, so that all of it never exists twice; a row that shares arrays
        leaves its place empty if there is memory to spare, or gets arrays of its own before. `save`: a file is to have
        it too, if there is a directory. Without it nothing waits for files.
        """
        sequence, start, end = cache[0].sequence, cache[0].start, cache[0].offset
        if not end or sequence.long is None or any(layer.offset != end for layer in cache):  # a call was broken off
            return
        ids: list[int] = sequence.ids[0, :end].tolist()  # type: ignore[assignment]
        tree = self._tree(model, state, cache[0].bits, sequence.long[0])
        node, path = tree.root, nodes_along(tree.root, ids)
        known = sum(shared for _, shared in path)
        first = max(known, start)
        if path and first < end:
            node, shared = path[-1]
            if shared < len(node.ids):
                node = node.split(shared)
            path[-1] = node, shared
        self._touch(path)
        if first < end:
            if release and spare < sum(layer.nbytes for layer in cache):
                take_out([cache])  # a place among other rows would stay, empty
            token_bytes = sum(array.nbytes // (len(array) * array.shape[2]) for layer in cache for array in layer.kept)
            limit = min(self.budget, self.nbytes + spare + release * sum(layer.freed_bytes for layer in cache))
            self._forget(limit - (end - first) * token_bytes, wait=save)
            kept = min(end, first + int((limit - self.nbytes) // token_bytes))
            if kept < end and save:
                self._write_now(tree, cache, ids)
            if kept <= first:
                return
            layers = _copied(cache, first, kept, release)
            if first > known:
                node = node.add(ids[known:first], None, self._clock)
            path.append((node.add(ids[first:kept], layers, self._clock), kept - first))
        if save:
            self._save(tree, path[-1][0])

    def _write_now(self, tree: _Tree, cache: list[KVCache], ids: list[int]) -> None:
        """Write what a cache has read, which memory does not keep as a whole, before the cache is let go."""
        if self._files is None or tree.facts is None or cache[0].lost:
            return
        facts = replace(tree.facts, tokens=cache[0].offset, start=cache[0].start)
        self._files.write(facts, ids, runs_of_cache(cache))
        self._files.settle()

    def _save(self, tree: _Tree, node: Node) -> None:
        """Let what ends with a node be written to a file, if it was not yet."""
        if self._files is None or tree.facts is None or node.saved or node.queued or node.layers is None:
            return
        path = path_to(node)
        first, last = readable(path, tree.window)
        ids = [token for node, _ in path for token in node.ids][:last]
        runs = [runs_of(path, i, first, last) for i in range(len(node.layers))]

        def done() -> None:
            for node, _ in path:
                node.saved = True

        node.queued, node.saved = True, not last
        if last:
            self._files.write(replace(tree.facts, tokens=last, start=first), ids, runs, done)

    @turn()
    def give_way(self, nbytes: float) -> None:
        """Forget what was not used longest, so much that `nbytes` are free; all of it if need be."""
        self._clock += 1
        self._forget(self.nbytes - nbytes)

    def _forget(self, limit: float, *, wait: bool = True) -> None:
        """Forget what was not used longest until `limit` bytes are left, but nothing of what is in use now.

        What is in no file is written to one first. Without `wait` it stays until then, and later calls find it written.
        """
        left = self.nbytes
        leaves = [
            (node.used, id(node), node, tree)
            for tree in self._trees()
            for node in below(tree.root)
            if not node.children
        ]
        heapq.heapify(leaves)
        while left > limit and leaves and leaves[0][0] < self._clock:
            _, _, node, tree = heapq.heappop(leaves)
            left -= node.nbytes
            self._save(tree, node)
            if node.queued and not node.saved:
                if not wait:
                    continue
                self.settle()
            parent = node.parent
            node.remove()
            if parent is not None and parent.parent is not None and not parent.children:
                heapq.heappush(leaves, (parent.used, id(parent), parent, tree))

    def _find(self, tree: _Tree, ids: list[int]) -> tuple[list[tuple[Node, int]], int, int]:
        """The nodes that a prompt goes through, and what of it can be taken over: the positions `first` to `last`."""
        path = nodes_along(tree.root, ids[:-1])
        self._touch(path)
        return path, *readable(path, tree.window)

    def _touch(self, path: list[tuple[Node, int]]) -> None:
        self._clock += 1
        for node, _ in path:
            node.used = self._clock

    def _trees(self) -> list[_Tree]:
        return [tree for _, trees in self._kept for tree in trees.values()]

    def _tree(self, model: Model, state: ModelState, bits: KVBits | None, long: bool) -> _Tree:
        """What a model has read in the state that it is in, packed so and in that LongRoPE regime."""
        trees = next(trees for kept, trees in self._kept if kept is state)
        if (bits, long) not in trees:
            facts = None if self._files is None else facts_of(model, state.fingerprint(model), bits, long)
            trees[bits, long] = _Tree(Node([], None), model.config.sliding_window, facts)
        return trees[bits, long]


def _copied(cache: list[KVCache], first: int, last: int, release: bool) -> Layers:
    """Copies of the tokens at positions `first` to `last`, of each layer; `release` empties it."""
    layers: Layers = []
    pending: list[mx.array] = []
    for layer in cache:
        layers.append(layer.copy_tokens(first, last))
        pending += layers[-1]
        if release:
            layer.let_go()
        if sum(array.nbytes for array in pending) >= _COPIED_AT_ONCE:
            mx.eval(pending)
            pending = []
    mx.eval(pending)
    return layers


def check_store(prefixes: object) -> None:
    """Raise OptionError for what is neither a store nor None."""
    if prefixes is not None and not isinstance(prefixes, PrefixStore):
        raise refusal(prefixes, "prefixes", "a PrefixStore")


@dataclass(frozen=True, eq=False)
class _Tree:
    """What was read alike, of a model with this window; `facts`: what its files say, where there are files."""

    root: Node
    window: int | None
    facts: Facts | None
