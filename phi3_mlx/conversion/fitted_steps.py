"""What fitting a model to a text has done so far, kept in a folder: what a step made, and the text behind the last one.

    FOLDER/   model.embed_tokens.safetensors   layer-0.safetensors   layer-1.safetensors   ...   text.safetensors

`text.safetensors` comes after a step's own file and names the steps that are done, so what a kill leaves half done is
done again. The text is kept as it was computed: reading it anew could end in other bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from ..errors import CheckpointError
from ..store.atomic import new_file

_TEXT_BEHIND = "text"
_BOTH_MODELS = ("source", "packed")
_STEP_FITS = "fits"  # in a step's metadata

Halves: TypeAlias = list[mx.array]  # of a text (rows, length, hidden_size): rows that are fitted, and held out


class FittedSteps:
    """The steps that are done in `folder`, which is made by the first that is kept.

    Raises CheckpointError for a file that cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._done: list[str] = []
        if self._path(_TEXT_BEHIND).exists():
            _, metadata = self._read(_TEXT_BEHIND)
            self._done = json.loads(metadata["steps"])

    def text(self) -> tuple[Halves, Halves] | None:
        """The text behind the last step that is done, in the source and in the packed model; None before the first.

        It is read anew each time and not kept here: it may be large.
        """
        if not self._done:
            return None
        arrays, _ = self._read(_TEXT_BEHIND)
        mx.eval(arrays)  # before the file is replaced
        source, packed = ([arrays[f"{kind}.{half}"] for half in range(2)] for kind in _BOTH_MODELS)
        return source, packed

    def of(self, step: str) -> tuple[dict[str, list[mx.array]], list[dict[str, Any]]] | None:
        """The parts of each tensor that a step packed, read when they are evaluated, and what it noted; or None."""
        if step not in self._done:
            return None
        arrays, metadata = self._read(step)
        made: dict[str, list[mx.array]] = {}
        for key in sorted(arrays):  # of a tensor's parts by their number
            name, _, _ = key.rpartition(".")
            made.setdefault(name, []).append(arrays[key])
        return made, json.loads(metadata[_STEP_FITS])

    def keep(
        self,
        step: str,
        made: Mapping[str, Sequence[mx.array]],
        fits: Sequence[Mapping[str, Any]],
        source: Halves,
        packed: Halves,
    ) -> None:
        """Keep a step: the parts of each tensor that it packed, what it noted, and the text behind it. Raises OSError.

        An empty half of a text is kept by its shape.
        """
        self._folder.mkdir(exist_ok=True)
        parts = {f"{name}.{i}": part for name, several in made.items() for i, part in enumerate(several)}
        self._write(step, parts, {_STEP_FITS: json.dumps(list(fits))})
        self._done.append(step)
        texts = {
            f"{kind}.{i}": half
            for kind, text in zip(_BOTH_MODELS, (source, packed), strict=True)
            for i, half in enumerate(text)
        }
        self._write(_TEXT_BEHIND, texts, {"steps": json.dumps(self._done)})

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}.safetensors"

    def _write(self, step: str, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
        with new_file(self._path(step)) as file:
            mx.save_safetensors(file, dict(arrays), metadata=dict(metadata))

    def _read(self, step: str) -> tuple[dict[str, mx.array], dict[str, str]]:
        path = self._path(step)
        try:
            loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); remove {self._folder}") from error
        return loaded
