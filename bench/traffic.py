"""Requests that arrive one after another: all their tokens per second, and how long the last one and a long one wait.

    python -m bench traffic [--only CASE] [--layers N] [--shorter N] [--runs N] [--long N]

Sixteen requests, prompts of 50 to 2,000 tokens and answers of 20 to 300, are drawn from a seed, and one arrives every
half second; mlx-lm's `BatchGenerator` gets the same ones on the same weights, in turn. `--shorter` divides lengths and
times, because on a CPU mlx-lm reads prompts with packed weights so slowly that whole ones would take an hour. Models
are random weights of a middling shape, not packed, in 4 bits with float32 scales and with bfloat16 scales, and the
bundled model.

The last case, `newcomer`, is of `--long` tokens and the model that is not packed, which reads them alone and while
another answers: how long the first token takes, and the longest time between two tokens of the other, beside the
longest step in which a chunk is read and a step without. A chunk may be computed in the step after the one that queues
it, so that step counts too.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import mlx.core as mx

from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.scheduler import Scheduler

from . import record
from .models import MIDDLING, loaded

# Of each case, by how much lengths and times are divided on a CPU, so that mlx-lm takes a minute or two.
SHORTER = {"unpacked": 4, "float32": 8, "bfloat16": 16, "tiny": 8}
NEWCOMER = "newcomer"
REQUESTS, PROMPTS, ANSWERS, EVERY = 16, (50, 2000), (20, 300), 0.5
STREAM = 4000  # tokens at most of the answer that goes on while a newcomer is read


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens answer it, and when it arrives, in seconds."""

    prompt: list[int]
    answer: int
    arrival: float = 0.0


class Ours:
    """The scheduler, driven as a server does."""

    def __init__(self, model: Any):
        self._scheduler = Scheduler(model)

    def add(self, request: Request) -> None:
        self._scheduler.submit(Job(request.prompt, request.answer))

    def step(self) -> tuple[list[int], bool]:
        """Of which requests a token came, and whether a part of a prompt was read."""
        step = self._scheduler.step()
        if step.failed:
            raise click.ClickException(f"a request failed: {step.failed[0].error}")
        return [token.row for token in step.tokens], bool(step.read)


class Theirs:
    """The same of mlx-lm."""

    def __init__(self, model: Any):
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(model)

    def add(self, request: Request) -> None:
        self._generator.insert([request.prompt], [request.answer])

    def step(self) -> tuple[list[int], bool]:
        read, said = self._generator.next()
        return [response.uid for response in said], bool(read)


Engine = Ours | Theirs
Make = Callable[[], Engine]
ENGINES: dict[str, Callable[[Any], Engine]] = {"phi3-mlx": Ours, "mlx-lm": Theirs}


def make_prompt(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [100 + draw.randrange(3000) for _ in range(length)]


def make_requests(count: int, shorter: int) -> list[Request]:
    draw = random.Random(0)
    lengths = [[max(2, draw.randint(*ends) // shorter) for ends in (PROMPTS, ANSWERS)] for _ in range(count)]
    return [Request(make_prompt(prompt, i), answer, i * EVERY / shorter) for i, (prompt, answer) in enumerate(lengths)]


def serve(make: Make, requests: list[Request]) -> dict[str, float]:
    """Let each request in when it has arrived, until all are answered: what that took."""
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    engine, waiting, said, firsts = make(), list(requests), 0, [0.0] * len(requests)
    started, worked = time.perf_counter(), time.process_time()
    while said < sum(request.answer for request in requests):
        now = time.perf_counter() - started
        while waiting and (waiting[0].arrival <= now or said == _wanted(requests, waiting)):
            engine.add(waiting.pop(0))  # nobody waits for a clock where all others are answered
        rows, _ = engine.step()
        said += len(rows)
        for row in rows:
            firsts[row] = firsts[row] or time.perf_counter() - started
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": said / seconds,
        "tokens_per_processor_second": said / (time.process_time() - worked),
        "last_first_token": firsts[-1] - requests[-1].arrival,
        "peak_memory": mx.get_peak_memory() - held,
    }


def _wanted(requests: list[Request], waiting: list[Request]) -> int:
    """Tokens of the answers to those that do not wait any more."""
    return sum(request.answer for request in requests[: len(requests) - len(waiting)])


def newcomer(make: Make, length: int) -> dict[str, float]:
    """A newcomer of `length` tokens, alone and beside an answer: seconds until its first token and between others'."""
    alone, _, _ = _read_newcomer(make(), length, 0)
    engine, steps = make(), list[float]()
    engine.add(Request(make_prompt(50, 0), STREAM))
    while len(steps) < 20:
        started = time.perf_counter()
        if engine.step()[0]:
            steps.append(time.perf_counter() - started)
    beside, chunk, gap = _read_newcomer(engine, length, 1)
    step = statistics.median(steps)
    return {"alone": alone, "beside": beside, "late": beside / alone, "gap": gap, "chunk": chunk, "step": step}


def _read_newcomer(engine: Engine, length: int, index: int) -> tuple[float, float, float]:
    """Its first token, the longest step that reads some of it, and the longest time between tokens of request 0."""
    arrived = said = time.perf_counter()
    engine.add(Request(make_prompt(length, 1), 1))
    chunk = gap = 0.0
    queued = False  # a chunk, in the step before
    rows: list[int] = []
    while index not in rows:
        started = time.perf_counter()
        rows, read = engine.step()
        now = time.perf_counter()
        if read or queued:
            chunk = max(chunk, now - started)
        queued = read
        if 0 in rows:
            gap, said = max(gap, now - said), now
    return now - arrived, chunk, gap


def in_turn(
    models: list[Any], measure: Callable[[Make], dict[str, float]], runs: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Each package's figures on its model, the packages one after the other."""
    measured: dict[str, list[dict[str, float]]] = {package: [] for package in ENGINES}
    for _ in range(runs):
        for (package, engine), model in zip(ENGINES.items(), models, strict=True):
            measured[package].append(measure(partial(engine, model)))
    return {
        package: {name: record.spread([run[name] for run in figures]) for name in figures[0]}
        for package, figures in measured.items()
    }


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice([*SHORTER, NEWCOMER]), help="Some cases (repeatable).")
@click.option("--layers", default=4, show_default=True, help="Of the middling shape.")
@click.option("--shorter", type=int, help="Divide lengths and times by it; on a CPU 4 to 16 if it is not said.")
@click.option("--requests", "count", default=REQUESTS, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--long", default=8192, show_default=True, help="Tokens of the newcomer.")
def main(only: tuple[str, ...], layers: int, shorter: int | None, count: int, runs: int, long: int) -> None:
    cases = only or (*SHORTER, NEWCOMER)
    rows: list[dict[str, Any]] = []
    for case in [case for case in cases if case != NEWCOMER]:
        divided = shorter or (1 if record.on_gpu() else SHORTER[case])
        with loaded(case, layers, MIDDLING) as (ours, theirs, name):
            in_turn([ours, theirs], partial(serve, requests=make_requests(2, 32)), 1)  # warms up
            figures = in_turn([ours, theirs], partial(serve, requests=make_requests(count, divided)), runs)
            _tell(f"{name}, lengths divided by {divided}", figures)
            rows += _rows({"case": case, "model": name, "shorter": divided}, figures)
    if rows:
        record.write("traffic", rows, "mlx", "mlx-lm", requests=count)
    if NEWCOMER in cases:
        with loaded("unpacked", layers, MIDDLING) as (ours, theirs, name):
            in_turn([ours, theirs], partial(serve, requests=make_requests(2, 32)), 1)
            figures = in_turn([ours, theirs], partial(newcomer, length=long), runs)
        _tell(f"{name}, a newcomer of {long:,} tokens", figures)
        record.write(NEWCOMER, _rows({"model": name, "tokens": long}, figures), "mlx", "mlx-lm")


def _rows(facts: dict[str, Any], figures: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    return [{**facts, "package": package, **measured} for package, measured in figures.items()]


def _tell(what: str, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    click.echo(what)
    for package, measured in figures.items():
        cells = (f"{name.replace('_', ' ')} {figure['median']:,.3f}" for name, figure in measured.items())
        click.echo(f"  {package:9} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
