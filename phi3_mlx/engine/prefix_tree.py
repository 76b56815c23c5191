"""Keys and values by the ids that were read: sequences that begin alike keep what they have in common once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import mlx.core as mx

from .cache_file import Slots
from .prefill import common_length

Layers = list[list[mx.array]]  # of each layer what `KVCache.copy_tokens` gives


class Node:
    """Some ids behind those of its parents, with the keys and values of these tokens in `layers`.

    `layers` is None where a window had left the tokens before they were given; `nbytes` are those of its layers, which
    are counted once, as a store asks for them at every step. `used` is when it was last asked for.
    `queued`: whether a file of what ends here is to be written, `saved`: whether it was, or is not worth it.
    """

    def __init__(self, ids: list[int], layers: Layers | None, parent: Node | None = None, used: int = 0):
        self.ids, self.layers, self.used = ids, layers, used
        self.nbytes = _bytes_of(layers)
        self.queued = self.saved = False
        self.parent = parent
        self.children: dict[int, Node] = {}  # by their first ids, which differ

    @property
    def parent(self) -> Node | None:
        return None if self._parent is None else self._parent()

    @parent.setter
    def parent(self, parent: Node | None) -> None:
        # Weak: a circle would keep keys and values until Python looks for circles.
        self._parent = None if parent is None else weakref.ref(parent)

    def add(self, ids: list[int], layers: Layers | None, used: int) -> Node:
        """Append a child, and return it."""
        child = self.children[ids[0]] = Node(ids, layers, self, used)
        return child

    def remove(self) -> None:
        """Leave the tree, with all that stands behind."""
        if self.parent is not None:
            del self.parent.children[self.ids[0]]

    def split(self, at: int) -> Node:
        """Move the first `at` ids to a new node between the parent and this one; returns the new one."""
        parent, layers = self.parent, self.layers
        assert parent is not None
        first: Layers = []
        rest: Layers = []
        self.remove()  # a split that is interrupted costs what is here, and leaves a tree that is right
        while layers:  # layer after layer: two copies of all need not exist
            layer = layers.pop(0)
            first.append([mx.contiguous(array[..., :at, :]) for array in layer])
            rest.append([mx.contiguous(array[..., at:, :]) for array in layer])
            mx.eval(first[-1], rest[-1])
        front = parent.add(self.ids[:at], None if layers is None else first, self.used)
        front.saved = self.saved
        self.ids, self.layers, self.parent = self.ids[at:], None if layers is None else rest, front
        self.nbytes = _bytes_of(self.layers)
        front.children[self.ids[0]] = self
        return front


def _bytes_of(layers: Layers | None) -> int:
    return sum(array.nbytes for layer in layers or () for array in layer)


def nodes_along(root: Node, ids: list[int]) -> list[tuple[Node, int]]:
    """The nodes below `root` that `ids` go through, each with how many of its ids: all, but perhaps for the last."""
    path: list[tuple[Node, int]] = []
    node, at = root, 0
    while at < len(ids) and ids[at] in node.children:
        node = node.children[ids[at]]
        shared = common_length(node.ids, ids[at : at + len(node.ids)])
        path.append((node, shared))
        at += shared
        if shared < len(node.ids):
            break
    return path


def path_to(node: Node) -> list[tuple[Node, int]]:
    """The nodes that the ids up to the end of `node` go through, as `nodes_along` gives them."""
    path = [(node, len(node.ids))]
    while (parent := path[-1][0].parent) is not None and parent.parent is not None:
        path.append((parent, len(parent.ids)))
    return path[::-1]


def readable(path: list[tuple[Node, int]], window: int | None) -> tuple[int, int]:
    """The positions `first` to `last` of the longest beginning that a cache can go on from.

    It holds every token, or those that the next query sees in its window.
    """
    longest, first, last = (0, 0), 0, 0
    for node, shared in path:
        last += shared
        if node.layers is None:
            first = last
        elif first <= (0 if window is None else max(0, last - (window - 1))):
            longest = first, last
    return longest


def runs_of(path: list[tuple[Node, int]], layer: int, first: int, last: int) -> list[Slots]:
    """What a layer has of the positions `first` to `last`."""
    runs, start = [], 0
    for node, shared in path:
        begin, end = max(first - start, 0), min(last - start, shared)
        if node.layers is not None and begin < end:
            runs.append(Slots(node.layers[layer], begin, end))
        start += shared
    return runs


def below(node: Node) -> Iterator[Node]:
    """All nodes of the tree but its root."""
    waiting = [*node.children.values()]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()
