"""The models that can be asked for: loaded on first use, and put away, longest unused first, when memory asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..engine import machine
from ..engine.plan import Plan, Workload
from ..engine.prefixes import PrefixStore
from ..engine.scheduler import Scheduler
from ..errors import MemoryLimitError, ModelNotFoundError, OptionError
from ..generation.loading import (
    load_adapted,
    load_other,
    loading_bytes,
    other_loading_bytes,
    sharing_weights,
    unload,
)
from ..models import read_config
from ..paths import expanded
from ..sizes import parse_size, size_text
from ..store.checkpoint import open_checkpoint
from ..store.other import Place, check_other, find, outline_other
from ..text.tokenizer import read_tokenizer
from .work import ModelCard

if TYPE_CHECKING:
    from ..config import Config
    from ..models.decoder import LongRopeRule, Model
    from ..text.tokenizer import Tokenizer


_SHORTEST = 256  # tokens of a run whose plan is shown


# A prompt is read in steps of about so long, though nobody waits for an answer: newcomers, and who asks whether the
# engine lives, are heard between two.
_STEP_SECONDS = 1.0


@dataclass
class Served:
    """A model that can be asked for by `name`: where its weights are, and the folder of its adapter or None.

    `base`: the name that it was given with its weights, which adapters share.
    """

    name: str
    base: str
    place: Place
    config: Config
    adapter: str | None = None

    def card(self) -> ModelCard:
        """What `GET /v1/models` tells of it."""
        context = self.config.max_position_embeddings
        about = self.base if self.adapter is None else f"{self.base} with the adapter {self.adapter}"
        if self.place.is_other:
            about += ", which runs with mlx-lm's code: exactness is promised for the Phi family alone"
        created = expanded(self.adapter) if self.adapter else self.place.directory / "config.json"
        return ModelCard(self.name, int(created.stat().st_mtime), context, about)


@dataclass
class Loaded:
    """A model in memory and what runs it."""

    served: Served
    model: Model
    scheduler: Scheduler


@dataclass
class _Weights:
    """A model of `nbytes` and what runs it, by name: itself, and others that share its arrays. `used`: when, last."""

    model: Model
    nbytes: int
    models: dict[str, Loaded] = field(default_factory=dict)
    used: int = 0

    @property
    def busy(self) -> bool:
        return any(loaded.scheduler.busy for loaded in self.models.values())


class _Elsewhere:
    """What takes memory beside one of the models."""

    def __init__(self, models: Models, besides: Served):
        self._models, self._besides = models, besides

    @property
    def reserved(self) -> float:
        return self._models.reserved(self._besides)

    @property
    def freeable(self) -> float:
        return self._models.freeable(self._besides)


class Models:
    """Models and adapters by name.

        models = Models(["tiny"], {"tiny-tales": ("tiny", "adapters/tales")}, memory="8GB")

    `names`: what `load` takes. `adapters`: a name for the model of that name with the adapter of that folder; it is a
    model of its own, and shares the weights. `memory`: what all of it may hold: weights, what `prefixes` keeps and
    what runs; without it, what the machine has. `dtype` and `longrope` are `load`'s; `kv_bits`: those that requests
    will have, which models of another family cannot take.
    All but `listed`, `others`, `source`, `config`, `tokenizer` and `plans` is for one thread alone, which loads and
    runs them.

    Raises ModelNotFoundError, CheckpointError, ConfigError, or OptionError for a name that is given twice, or for
    what a model of another family cannot take.
    """

    def __init__(
        self,
        names: Sequence[str],
        adapters: Mapping[str, tuple[str, str]] | None = None,
        *,
        memory: int | str | None = None,
        prefixes: PrefixStore | None = None,
        dtype: str | None = None,
        longrope: LongRopeRule = "auto",
        kv_bits: int | tuple[int, int] | None = None,
    ):
        self.limit = None if memory is None else parse_size(memory)
        self.prefixes = PrefixStore() if prefixes is None else prefixes
        self._dtype, self._longrope = dtype, longrope
        self._sources: dict[str, Served] = {}
        for name in names:
            place = find(name, given={"longrope": longrope, "kv_bits": kv_bits})
            known = outline_other(place.directory, dtype).config if place.is_other else read_config(place.directory)
            self._add(Served(name, name, place, known))
        for name, (base, folder) in (adapters or {}).items():
            source = self.source(base)
            if source.place.is_other:
                check_other({"adapter": folder})
            self._add(replace(source, name=name, adapter=folder))
        self._cards = [source.card() for source in self._sources.values()]
        self._tokenizers: dict[Place, Tokenizer] = {}
        self._workloads: dict[str, Workload] = {}
        self._reading = threading.Lock()
        self._weights: dict[str, _Weights] = {}
        self._uses = 0
        self.loading = False  # which takes as long as it takes

    def _add(self, source: Served) -> None:
        if source.name in self._sources:
            raise OptionError(f"two models are called {source.name!r}; give one of them another name")
        self._sources[source.name] = source

    def listed(self) -> list[ModelCard]:
        """The models that can be asked for."""
        return list(self._cards)

    @property
    def others(self) -> frozenset[str]:
        """Those of other families, by name."""
        return frozenset(name for name, source in self._sources.items() if source.place.is_other)

    def source(self, name: str) -> Served:
        """Raises ModelNotFoundError for a name that is not listed."""
        if name not in self._sources:
            listed = ", ".join(self._sources)
            raise ModelNotFoundError(f"no model is called {name!r} here; ask for one of {listed}")
        return self._sources[name]

    def config(self, name: str) -> Config:
        return self.source(name).config

    def tokenizer(self, name: str) -> Tokenizer:
        """A model's tokenizer, which is read once and without its weights; any thread may ask."""
        place = self.source(name).place
        with self._reading:
            if place not in self._tokenizers:
                self._tokenizers[place] = read_tokenizer(place.directory, of_family=not place.is_other)
            return self._tokenizers[place]

    def plans(self, name: str, tokens: int | None = None) -> tuple[int, dict[int, Plan]]:
        """What may be used of the memory, and what a run of a model takes by its length in tokens; from any thread.

        Of one length, within the model's context, or of doublings up to that. Raises what `load` raises.
        """
        source = self.source(name)
        with self._reading:
            if source.base not in self._workloads:
                self._workloads[source.base] = self._workload(source)
        workload, longest = self._workloads[source.base], source.config.max_position_embeddings
        lengths = [min(tokens, longest)] if tokens is not None else [*_doublings(min(_SHORTEST, longest), longest)]
        limit = machine.room() + mx.get_active_memory() if self.limit is None else self.limit
        return limit, {length: replace(workload, length=length).plan(0) for length in lengths}

    def _workload(self, source: Served) -> Workload:
        directory = source.place.directory
        if source.place.is_other:
            return Workload.of_model(outline_other(directory, self._dtype), 1)
        return Workload.of_directory(directory, 1, dtype=self._dtype).crossing()

    def loaded(self) -> list[Loaded]:
        """What is in memory."""
        return [loaded for weights in self._weights.values() for loaded in weights.models.values()]

    def get(self, name: str) -> Loaded | None:
        """A model in memory. It is loaded if need be; None where that must wait until others have ended.

        Raises what `load` raises, and MemoryLimitError for a model that would not fit alone.
        """
        source = self.source(name)
        weights = self._weights.get(source.base)
        if weights is None or name not in weights.models:
            if not self._make_room(source):
                return None
            self.loading = True
            try:
                weights = self._load(source)
            finally:
                self.loading = False
        self._uses += 1
        weights.used = self._uses
        return weights.models[name]

    def _make_room(self, source: Served) -> bool:
        """Put away what is not used until a model can be loaded; whether it can be now."""
        needed, promised = self._loading_bytes(source), self.reserved()
        # What is computed with now is given back too, and is no more than what runs was promised.
        most = machine.room() + promised + self.freeable() + self.prefixes.nbytes
        if needed > most:
            raise MemoryLimitError(
                f"{source.name} needs {size_text(needed)}, and {size_text(most)} may be used: take a model of fewer "
                "bits, or allow more memory"
            )
        while (lacking := needed + self.reserved() - machine.room()) > 0:
            kept = self.prefixes.nbytes
            self.prefixes.give_way(lacking)
            if self.prefixes.nbytes == kept and not self.put_away(besides=source.base):
                return False
        return True

    def _loading_bytes(self, source: Served) -> int:
        """Bytes that loading a model takes, or the adapter of one that is in memory."""
        directory = source.place.directory
        if source.place.is_other:
            return sum(other_loading_bytes(outline_other(directory, self._dtype)).values())
        shared, folders = source.base in self._weights, [] if source.adapter is None else [source.adapter]
        return sum(loading_bytes(open_checkpoint(directory), self._dtype, folders, shared=shared).values())

    def _load_base(self, source: Served) -> Model:
        """The model whose weights a source has, without its adapter."""
        directory = source.place.directory
        if source.place.is_other:
            return load_other(directory, source.base, dtype=self._dtype, force=True)
        checkpoint = open_checkpoint(directory)
        return load_adapted(checkpoint, source.base, dtype=self._dtype, longrope=self._longrope, adapters={})

    def _load(self, source: Served) -> _Weights:
        """Load a model, or the adapter of one that is in memory."""
        before = mx.get_active_memory()
        weights = self._weights.get(source.base)
        if weights is None:
            model = self._load_base(source)
            mx.eval(model.parameters())
            weights = _Weights(model, 0)
        model = weights.model
        if source.adapter is not None:
            checkpoint = open_checkpoint(source.place.directory)
            model = sharing_weights(model, checkpoint, source.base, {source.adapter: 1.0})
            mx.eval(model.parameters())
        elsewhere = _Elsewhere(self, source)
        scheduler = Scheduler(model, prefixes=self.prefixes, elsewhere=elsewhere, alone_seconds=_STEP_SECONDS)
        weights.models[source.name] = Loaded(source, model, scheduler)
        weights.nbytes += mx.get_active_memory() - before
        self._weights[source.base] = weights
        return weights

    def reserved(self, besides: Served | None = None) -> float:
        """Bytes that what runs was promised and does not hold yet."""
        return sum(loaded.scheduler.reserved for loaded in self.loaded() if loaded.served is not besides)

    def freeable(self, besides: Served | None = None) -> float:
        """Bytes that there were more if nothing ran, and no model were in memory."""
        base = None if besides is None else besides.base
        weights = sum(weights.nbytes for name, weights in self._weights.items() if name != base)
        return weights + sum(loaded.scheduler.held for loaded in self.loaded() if loaded.served is not besides)

    def put_away(self, *, besides: str | None = None) -> bool:
        """Put away the model that was not used longest, if one is idle; whether one was."""
        idle = [name for name, weights in self._weights.items() if name != besides and not weights.busy]
        if idle:
            self.drop(min(idle, key=lambda name: self._weights[name].used))
        return bool(idle)

    def drop(self, base: str) -> None:
        """Forget a model and those that share its weights, and give their memory back."""
        weights = self._weights.pop(base)
        for model in (weights.model, *(loaded.model for loaded in weights.models.values())):
            unload(model)

    def clear(self) -> None:
        """Put everything away."""
        for base in list(self._weights):
            self.drop(base)
        self.prefixes.settle()
        self.prefixes.clear()


def _doublings(first: int, last: int) -> Iterator[int]:
    """first, twice that, and so on; then `last`."""
    while first < last:
        yield first
        first *= 2
    yield last
