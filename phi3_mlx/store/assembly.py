"""How the tensors of a model are read from a checkpoint: as they are, joined from parts, or cut from larger ones."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import Config, Cut
from .safetensors import Tensor

Shape = tuple[int, ...]


def origin(config: Config, target: str, stored: Container[str]) -> tuple[str, ...]:
    """The names of the tensors that `target` is read from, in a checkpoint that has the tensors `stored`."""
    if target in stored:
        return (target,)
    cut = config.cut_from(target)
    return (cut.name,) if cut is not None and cut.name in stored else config.made_of(target)


def part_shapes(config: Config, target: str, shape: Shape, names: Sequence[str]) -> list[Shape]:
    """The shapes that the tensors `names` must have, from which `target` of this `shape` is read."""
    cut = _cut(config, target, names)
    if cut is not None:
        return [(*shape[:-2], cut.rows, shape[-1])]
    if len(names) == 1:
        return [shape]
    if len(shape) == 3:
        return [shape[1:]] * shape[0]
    spans = config.parts[target.split(".")[-2]].values()
    return [(last - first, *shape[1:]) for first, last in spans]


def assemble(
    config: Config, target: str, names: Sequence[str], shape: Shape, read: Callable[[str], mx.array]
) -> mx.array:
    """The tensor `target` of this `shape` from what `read` gives for `names`; evaluated.

    `read` is called once for each name. A stack of matrices is filled one by one, so beside it one matrix is in memory.
    """
    cut = _cut(config, target, names)
    if cut is not None:
        array = mx.contiguous(read(names[0])[..., cut.first : cut.last, :])
    elif len(names) == 1:
        array = read(names[0])
    elif len(shape) == 3:
        array = mx.array(0.0)
        for i, name in enumerate(names):
            matrix = read(name)
            array = array if i else mx.zeros(shape, matrix.dtype)
            array[i] = matrix
            del matrix
            mx.eval(array)
    else:
        array = mx.concatenate([read(name) for name in names])
    mx.eval(array)
    return array


def _cut(config: Config, target: str, names: Sequence[str]) -> Cut | None:
    cut = config.cut_from(target)
    return cut if cut is not None and tuple(names) == (cut.name,) else None


@dataclass(frozen=True)
class View:
    """A checkpoint's tensors as the model names them.

    `tensors`: all of them. `origins`: for those that are joined or cut, the tensors that they are read from. `faults`:
    one line for each of those that is missing or differs from the others.
    """

    tensors: dict[str, Tensor]
    origins: dict[str, tuple[str, ...]]
    faults: tuple[str, ...]


def view(config: Config, shapes: Mapping[str, Shape], stored: Mapping[str, Tensor]) -> View:
    """The view for a model that has these `shapes` before it is quantized.

    It stacks experts that are stored apart, packed or not, and finds tensors that are cut or renamed.
    """
    origins: dict[str, tuple[str, ...]] = {}
    tensors, faults = dict(stored), []
    for weight, shape in shapes.items():
        path, _, leaf = weight.rpartition(".")
        if weight in stored or (len(shape) < 3 and config.cut_from(weight) is None):
            continue
        for kind in (leaf, "scales", "biases"):
            target = f"{path}.{kind}"
            names = origin(config, target, stored)
            sources = [stored[name] for name in names if name in stored]
            if not sources:
                continue
            faults += [f"missing {name}" for name in names if name not in stored]
            faults += [f"{name} is not like {names[0]}" for name in names if stored.get(name, sources[0]) != sources[0]]
            for name in names:
                tensors.pop(name, None)
            tensor = sources[0]
            if _cut(config, target, names) is not None:
                count = 1
                if part_shapes(config, target, shape, names) == [tensor.shape]:
                    tensor = Tensor(tensor.dtype, shape, tensor.nbytes * shape[-2] // tensor.shape[-2])
            else:
                count = len(names)
            whole = tensor.shape if count == 1 else (count, *tensor.shape)
            tensors[target] = Tensor(tensor.dtype, whole, tensor.nbytes * count)
            origins[target] = names
    return View(tensors, origins, tuple(faults))
