"""What places cost a model that nobody looks into, and what looking costs.

    python -m bench inside [--layers N] [--tokens N] [--pairs N]

Layers of a tiny width, as many as Phi-3-mini has, where Python's work shows most: a pass over a prompt, and a step of
decoding. `never` is the same code with its places cut out of the source, `off` the code as it is after a trace has come
and gone; the two alternate, and a figure is the median of the pairs' ratios. `stream` keeps the residual stream of all
layers, `all` every place but the contributions of heads. Times are processor time of the process.
"""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType, ModuleType
from typing import Any

import click
import mlx.core as mx

from phi3_mlx import places, trace
from phi3_mlx.models import build, decoder, layer, parse_config, phi3

from . import record

MODULES = (decoder, layer, phi3)
RAW = {
    "model_type": "phi3",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_KEPT = {"at": 1, "at_flat": 1, "at_end": 2}  # which argument the call gives back where nobody looks on
_INSTEAD = {"wanted": False, "beside": None, "watchers_of": None, "check_edits": None}
_NOTES = ("turn_to", "enter_layer")


class _Cut(ast.NodeTransformer):
    """Leaves out the places."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in _KEPT:
            return node.args[_KEPT[name]]
        return ast.copy_location(ast.Constant(_INSTEAD[name]), node) if name in _INSTEAD else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        noted = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _NOTES
        return ast.copy_location(ast.Pass(), node) if noted else self.generic_visit(node)


def without_places(module: ModuleType) -> list[tuple[type, str, Any]]:
    """The methods of a module's classes as they would be without places, each with its class and name."""
    tree = ast.fix_missing_locations(_Cut().visit(ast.parse(inspect.getsource(module))))
    space = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(tree, str(module.__file__), "exec"), space)
    return [
        (kind, name, method)
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__
        for name, method in vars(space[kind.__name__]).items()
        if isinstance(method, FunctionType) and "__class__" not in method.__code__.co_freevars  # no super()
    ]


@contextmanager
def never() -> Iterator[None]:
    """The package without places, until the block ends."""
    methods = [method for module in MODULES for method in without_places(module)]
    before = [(kind, name, vars(kind)[name]) for kind, name, _ in methods]
    try:
        for kind, name, method in methods:
            setattr(kind, name, method)
        yield
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


def seconds(compute: Callable[[], mx.array]) -> float:
    """Processor time of what is computed."""
    mx.synchronize()
    began = time.process_time()
    mx.eval(compute())
    mx.synchronize()
    return time.process_time() - began


def times_of(compute: Callable[[], mx.array], repeats: int) -> float:
    """Of some passes."""
    return sum(seconds(compute) for _ in range(repeats))


def ratios(model: Any, compute: Callable[[], mx.array], pairs: int, repeats: int) -> dict[str, list[float]]:
    """Of each pair the time of `off` over that of `never`, and those of looking over that of `off`."""
    looks = {"stream": ["resid_post"], "all": [name for name in places(model) if name != "head_out"]}
    found: dict[str, list[float]] = {name: [] for name in ("off", *looks)}
    for pair in range(pairs + 1):
        times = {}
        for name in ("off", "never") if pair % 2 else ("never", "off"):
            with never() if name == "never" else nullcontext():
                times[name] = times_of(compute, repeats)
        for name, keep in looks.items():
            with trace(model, keep=keep):
                times[name] = times_of(compute, repeats)
        if pair:  # the first warms up
            found["off"].append(times["off"] / times["never"])
            for name in looks:
                found[name].append(times[name] / times["off"])
    return found


@click.command(help=__doc__)
@click.option("--layers", default=32, show_default=True, help="Phi-3-mini has 32.")
@click.option("--tokens", default=64, show_default=True, help="Of the prompt.")
@click.option("--pairs", default=20, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Passes that a time is of.")
def main(layers: int, tokens: int, pairs: int, repeats: int) -> None:
    model = build(parse_config({**RAW, "num_hidden_layers": layers}))
    mx.eval(model.parameters())
    ids = mx.arange(tokens)[None]

    def step() -> mx.array:
        """One token behind a prompt, whose cache was read in the same way."""
        cache = model.make_cache()
        model(ids, cache)
        for _ in range(8):
            mx.eval(model(ids[:, :1], cache))
        return model(ids[:, :1], cache)

    rows = []
    for name, compute in (("prompt", lambda: model(ids)), ("prompt and 9 steps", step)):
        found = {figure: record.spread(each) for figure, each in ratios(model, compute, pairs, repeats).items()}
        click.echo(
            f"{name}: off / never {found['off']['median']:.3f}, "
            + ", ".join(f"{figure} / off {each['median']:.2f}" for figure, each in found.items() if figure != "off")
        )
        rows.append({"case": name, "tokens": tokens, **found})
    record.write("inside", rows, "mlx", layers=layers, pairs=pairs)


if __name__ == "__main__":
    main()
