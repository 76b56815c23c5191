"""What was kept of the values of some runs, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..config import Config
from ..errors import OptionError
from ..models.hooks import Computed, Segment
from ..values import refusal, shown, whole
from .selecting import Arrivals, HeadIndexes, Here, LayerIndexes, Positions, Tokens
from .table import NamedPlace, heads_of, indexes_of, layers_of, numbers_of, place_of, shortened

Key = tuple[str, int | None]  # a place and its layer


@dataclass(frozen=True)
class Keep:
    """What to keep of a place: of which layers and heads (None: all) and at which positions, as `change` takes them."""

    place: str
    layers: LayerIndexes = None
    heads: HeadIndexes = None
    positions: Positions = None


class Wanted:
    """A `Keep` for a model: the layers and heads that it means."""

    def __init__(self, keep: Keep | str, config: Config):
        keep = Keep(keep) if isinstance(keep, str) else keep
        if not isinstance(keep, Keep):
            raise OptionError(f"keep has {keep!r}; give names of places, or Keep(place, ...)")
        self.place: NamedPlace = place_of(config, keep.place)
        self.layers = layers_of(config, self.place, keep.layers)
        if self.place.name == "blocks":
            sparse = [layer for layer in self.layers if layer is not None and not config.is_dense(layer)]
            if keep.layers is not None and len(sparse) < len(self.layers):
                dense = next(layer for layer in self.layers if layer not in sparse)
                raise OptionError(f"layer {dense} is dense and has no blocks; leave it out, or leave out layers")
            self.layers = [*sparse]
        self.heads = heads_of(config, self.place, keep.heads)
        self.tokens = Tokens(keep.positions)
        self.arrivals = Arrivals(f"what is kept of {self.place.name}", self.tokens)

    def count(self, tokens: int, scored: int) -> int:
        """Of how many of a sequence's tokens it keeps something at most; `scored` of them have logits."""
        return min(self.tokens.count(tokens), scored if self.place.name == "logits" else tokens)

    def bytes(self, config: Config, tokens: int, keys: int, itemsize: int) -> int:
        """Bytes of what is kept of this many of a sequence's tokens, where there are `keys` keys."""
        heads = None if self.heads is None else len(self.heads)
        return len(self.layers) * tokens * numbers_of(config, self.place, heads, keys) * self.place.itemsize(itemsize)


@dataclass(frozen=True)
class _Piece:
    """Values (sequences, positions, ...) of a pass; of one sequence of a row alone where `row` says which."""

    positions: list[int]
    array: mx.array
    row: int | None

    def before(self, length: int) -> _Piece | None:
        """The part at positions below `length`."""
        n = sum(position < length for position in self.positions)
        if n == len(self.positions):
            return self
        return _Piece(self.positions[:n], self.array[:, :n], self.row) if n else None


@dataclass
class _Row:
    """What was kept of `count` sequences that are read side by side. `length`: tokens read."""

    key: object
    count: int
    length: int = 0
    pieces: dict[Key, list[_Piece]] = field(default_factory=dict)

    def cut(self, length: int) -> None:
        """Forget what lies at `length` and behind: it is read anew."""
        if length >= self.length:
            return
        for key, pieces in self.pieces.items():
            self.pieces[key] = [piece for piece in (piece.before(length) for piece in pieces) if piece is not None]

    def of_row(self, key: Key, row: int | None) -> list[_Piece]:
        """The pieces that have a sequence's values, those of all sequences for None."""
        pieces = self.pieces.get(key, [])
        return pieces if row is None else [piece for piece in pieces if piece.row in (None, row)]


class Inside:
    """The values that a trace kept: `inside["resid_post", 3]` of layer 3, `inside["embed"]` of a place outside layers.

    They are those of all rows, first axis: the rows of each call and the prompts of each run, in the order in which
    they began; if these differ in length `inside[place, layer, row]` gives those of one. Tokens that a cache brought
    were not read, and are not there: see `positions`.
    """

    def __init__(self, kept: Sequence[Wanted], config: Config):
        self._config = config
        self._kept: dict[Key, Wanted] = {}
        for keep in kept:
            for layer in keep.layers:
                if (keep.place.name, layer) in self._kept:
                    raise OptionError(f"place {keep.place.name} is to be kept twice; join the two")
                self._kept[keep.place.name, layer] = keep
        self._groups: list[_Row] = []

    def __repr__(self) -> str:
        lengths = " and ".join(f"{length:,}" for length in dict.fromkeys(group.length for group in self._groups))
        read = f"{self.rows} row{'s' * (self.rows > 1)} of {lengths} tokens" if self._groups else "nothing was read yet"
        places = [self._told(place) for place in dict.fromkeys(name for name, _ in self._kept)]
        return "\n".join([f"<Inside: {read}", *places]) + ">"

    def _told(self, place: str) -> str:
        """A line that says what there is of a place."""
        layers = self.layers(place)
        first = layers[0] if layers else None
        try:
            shape = str(self[place, first].shape)
        except OptionError:  # rows of several lengths, or nothing yet
            shape = self._kept[place, first].place.shape
        of_layers = f" of layer{'s' * (len(layers) > 1)} {shortened(layers)}" if layers else ""
        return f"  {place}{of_layers}: {shape}"

    @property
    def rows(self) -> int:
        """How many sequences were read."""
        return sum(group.count for group in self._groups)

    def layers(self, place: str) -> list[int]:
        """The layers of which a place was kept."""
        return [layer for name, layer in self._kept if name == place and layer is not None]

    def clear(self) -> None:
        """Forget what was read so far."""
        self._groups = []

    def __getitem__(self, key: str | tuple[str, int | None] | tuple[str, int | None, int]) -> mx.array:
        place, layer, row = self._parsed(key)
        if row is not None:
            group, first = self._group_of(row)
            return self._value(group, (place, layer), row - first)
        values = [self._value(group, (place, layer), None) for group in self._groups]
        return values[0] if place == "blocks" else _joined(values, place, layer)

    def stack(self, place: str) -> mx.array:
        """A place of all layers of which it was kept, in a first axis more."""
        layers = self.layers(place)
        if not layers:
            self._parsed((place, None))
            raise OptionError(f"place {place} is in no layer; take inside[{place!r}]")
        return mx.stack([self[place, layer] for layer in layers])

    def positions(self, place: str, layer: int | None = None, row: int = 0) -> list[int]:
        """The positions of the tokens that a place was kept of."""
        name, layer, row = self._parsed((place, layer, row))  # type: ignore[assignment]
        group, first = self._group_of(row)
        return [position for piece in group.of_row((name, layer), row - first) for position in piece.positions]

    def taken(self, place: str, here: Here) -> mx.array:
        """The values that were kept where another run has those of `here`. Raises OptionError if they were not."""
        key = (place, here.layer)
        if key not in self._kept:
            where = "" if here.layer is None else f" of layer {here.layer}"
            raise OptionError(f"the run to patch from did not keep {place}{where}")
        wanted = [0] if self.rows == 1 else here.rows
        rows = [self._row_taken(key, here, row) for row in wanted]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    def _row_taken(self, key: Key, here: Here, row: int) -> mx.array:
        there = {position: i for i, position in enumerate(self.positions(*key, row))}
        lacking = [position for position in here.positions if position not in there]
        if lacking:
            raise OptionError(f"the run to patch from did not keep {key[0]} at position {lacking[0]}; keep it there")
        value, heads = self[key[0], key[1], row], self._kept[key].heads
        axis = 2 if key[0] == "pattern" else 1
        value = mx.take(value, mx.array([there[position] for position in here.positions]), axis=axis)
        if here.heads is not None or heads is not None:
            known = heads if heads is not None else list(range(value.shape[3 - axis]))
            wanted = here.heads if here.heads is not None else list(range(self._heads_of(key)))
            if not set(wanted) <= set(known):
                raise OptionError(f"the run to patch from did not keep heads {sorted(set(wanted) - set(known))}")
            value = mx.take(value, mx.array([known.index(head) for head in wanted]), axis=3 - axis)
        return value

    def _heads_of(self, key: Key) -> int:
        of_queries = self._kept[key].place.heads == "H"
        return self._config.num_attention_heads if of_queries else self._config.num_key_value_heads

    def _parsed(self, key: object) -> tuple[str, int | None, int | None]:
        place, layer, row, *more = (*key, None, None) if isinstance(key, tuple) else (key, None, None)
        names = list(dict.fromkeys(name for name, _ in self._kept))
        if place not in names or any(each is not None for each in more):
            asked = place if isinstance(place, str) else shown(place)
            raise OptionError(f"{asked} was not kept; kept are {', '.join(names) or 'no places'}")
        if layer is not None:
            (layer,) = indexes_of(whole(layer, "layer"), self._config.num_hidden_layers, "layer")
        layers = self.layers(place)
        if (place, layer) not in self._kept:
            if not layers:
                raise OptionError(f"place {place} is in no layer; take inside[{place!r}]")
            if layer is None:
                raise OptionError(f"place {place} is in layers; give one of them, inside[{place!r}, {layers[0]}]")
            raise OptionError(f"{place} of layer {layer} was not kept; kept are layers {', '.join(map(str, layers))}")
        if not self._groups:
            raise OptionError(f"nothing of {place} was read yet; run the model inside the trace")
        return place, layer, None if row is None else self._numbered(row)

    def _numbered(self, row: int) -> int:
        """A row's number, which may be counted from the end."""
        row, count = whole(row, "row"), self.rows
        if not -count <= row < count:
            raise OptionError(f"row {row} is not there; {count} were read")
        return row % count

    def _group_of(self, row: int) -> tuple[_Row, int]:
        """Where a row is, and the first row there."""
        first = 0
        for group in self._groups:
            if row < first + group.count:
                return group, first
            first += group.count
        raise OptionError(f"row {row} is not there; {self.rows} were read")

    def _value(self, group: _Row, key: Key, row: int | None) -> mx.array:
        """Of all sequences of a group, or of one by its number there."""
        if key[0] == "blocks":
            return self._blocks(group, key)
        pieces = group.of_row(key, row)
        if not pieces:
            raise OptionError(f"nothing of {key[0]} was read yet, or nothing at the positions that are kept")
        if row is None and any(piece.row is not None for piece in pieces):
            return _joined([self._value(group, key, each) for each in range(group.count)], *key)
        arrays = [
            piece.array if row is None or group.count == 1 or piece.row is not None else piece.array[row : row + 1]
            for piece in pieces
        ]
        if key[0] == "pattern":
            arrays = [of_keys(array, group.length) for array in arrays]
        value = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=1)
        return value.swapaxes(1, 2) if key[0] == "pattern" else value

    def _blocks(self, group: _Row, key: Key) -> mx.array:
        pattern, heads = self._config.sparse_layers, self._kept[key].heads
        assert pattern is not None
        blocks = np.arange(-(-group.length // pattern.block_size))
        distance = blocks[:, None] - blocks
        local = distance < pattern.local_blocks
        residues = [pattern.residue(head) for head in range(self._config.num_attention_heads)]
        vertical = blocks % pattern.stride == np.array(residues)[:, None, None]
        seen = (distance >= 0) & (local | vertical)
        return mx.array(seen if heads is None else seen[heads])

    # What the trace tells it.

    def begin(self, segments: Sequence[Segment]) -> None:
        """A pass reads these tokens; what was kept of the same positions before is gone."""
        for segment in segments:
            group = next((group for group in self._groups if group.key == segment.key), None)
            if group is None:
                group = _Row(segment.key, segment.rows)
                self._groups.append(group)
            group.cut(max(segment.first, 0))
            group.length = segment.first + segment.length

    def forget(self, segment: Segment) -> None:
        """The tokens of a sequence from the segment's first on are gone."""
        for group in self._groups:
            if group.key == segment.key:
                group.cut(segment.first)
                group.length = min(group.length, segment.first)

    def rows_of(self, segment: Segment) -> list[int]:
        """The numbers of a segment's rows."""
        first = 0
        for group in self._groups:
            if group.key == segment.key:
                return list(range(first, first + group.count)) if segment.row is None else [first + segment.row]
            first += group.count
        return list(range(segment.rows))

    @property
    def wanted(self) -> list[Key]:
        """The places that are kept, each with its layer."""
        return [*self._kept]

    def keeps(self, place: str, layer: int | None) -> bool:
        return (place, layer) in self._kept

    def keep(self, place: str, layer: int | None, compute: Computed, segment: Segment) -> None:
        """Keep what is wanted of a value."""
        kept = self._kept[place, layer]
        places, _ = kept.tokens.among(segment)
        if not places:
            return
        kept.arrivals.note(segment, places)
        whole = len(places) == segment.length
        array = compute(kept.heads, None if whole else places)
        if place == "pattern":
            array = from_slots(array, segment)
        group = next(group for group in self._groups if group.key == segment.key)
        piece = _Piece([segment.first + place for place in places], array, segment.row)
        group.pieces.setdefault((place, layer), []).append(piece)

    @property
    def unfinished(self) -> list[mx.array]:
        """The arrays that came last, perhaps not computed yet."""
        return [pieces[-1].array for group in self._groups for pieces in group.pieces.values() if pieces]


def _joined(values: Sequence[mx.array], place: str, layer: int | None) -> mx.array:
    """Values of several rows in one array. Raises OptionError if they differ in length."""
    if len({value.shape[1:] for value in values}) > 1:
        raise OptionError(f"rows of {place} differ in length; give one's number, inside[{place!r}, {layer}, row]")
    return values[0] if len(values) == 1 else mx.concatenate([*values])


def of_keys(pattern: mx.array, keys: int) -> mx.array:
    """Probabilities (..., S) for another number of keys: those behind a query are 0, and may be left out or added."""
    lacking = keys - pattern.shape[-1]
    return pattern[..., :keys] if lacking <= 0 else mx.pad(pattern, [(0, 0)] * (pattern.ndim - 1) + [(0, lacking)])


def from_slots(array: mx.array, segment: Segment) -> mx.array:
    """Probabilities (..., slots) of keys by position: without those of padding, with 0 for what the window has left."""
    first = segment.first + segment.length - array.shape[-1]  # position of the first slot
    if first < 0:
        return array[..., -first:]
    return mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(first, 0)]) if first else array


def to_slots(array: mx.array, like: mx.array, segment: Segment) -> mx.array:
    """`from_slots` back, with what `like` has of padding."""
    first = segment.first + segment.length - like.shape[-1]
    if first < 0:
        return mx.concatenate([like[..., :-first], array], axis=-1)
    return array[..., first:]


def kept_of(keep: Iterable[Keep | str] | Keep | str, config: Config) -> list[Wanted]:
    """What to keep, for a model."""
    given = [keep] if isinstance(keep, str | Keep) else keep
    if not isinstance(given, Iterable):
        raise refusal(keep, "keep", "names of places, or Keep(place, ...)")
    return [Wanted(each, config) for each in given]
