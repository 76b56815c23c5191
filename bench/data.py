"""How well a model's ratings, and a filter that learnt them, tell good texts from bad ones.

    python -m bench data [--model NAME] [--corpus DIR] [--texts N] [--train N]

Whether a text is good is known by how it was made. `disorder`: stories made by program, and such with their words in
another order. `onestop`, with `--corpus`, which has onestop_english.jsonl (records with `text`, `title` and `level`):
the beginnings of articles for advanced readers, which count as good, and of the same for beginners.

A half is learnt from; of the other, which shares no names and no titles with it, the areas under the ROC curve are,
with their 95 % intervals. Judges are the rating of `phi3_mlx.score_data` by a rubric (of the bundled model, and of each
`--model`); how likely the text is to the model; the rating of the bundled model when it was trained for it, on the
labels of the learnt half; a classifier of `phi3_mlx.train_filter` from the model's ratings of that half; and one from
its labels. The result is `data`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from phi3_mlx import load, score_data, train_filter, tune
from phi3_mlx.data.area import area_interval, area_under_curve
from phi3_mlx.data.classifier import read_classifier
from phi3_mlx.data.rubric import EDUCATIONAL, PLACE_OF_TEXT

from . import record

_BUNDLED = "tiny"
_DISORDER = "Rate a text from 0 (its words are in disorder) to 5 (good sentences).\n\n{text}\n\nIts rating is:"
_WORDS = 120  # of an article: elementary ones are shorter as a whole
_HELD_OUT = 0.3  # of what a filter is given; ten of each kind at least
_NAMES = ("Mia Tom Ben Lily Sue Max Anna Sam".split(), "Jack Lucy Tim Sara Leo Amy Bob Nora".split())
_PLACES = ("park garden house sea forest".split(), "shop farm lake school river".split())
_THINGS, _SIZES, _FEELINGS = (
    "dog cat ball bird tree box".split(),
    "big small red old".split(),
    "happy sad glad scared".split(),
)
_BEGINNINGS = (
    "One day, {name} went to the {place} with {other}.",
    "Once upon a time, there was a girl named {name} who lived near the {place}.",
    "{name} and {other} liked to play in the {place}.",
)
_MIDDLES = (
    "There was a {size} {thing}.",
    'They saw a {size} {thing} and said, "Look at the {thing}!"',
    "{other} had a {size} {thing}, and {name} wanted to see it.",
)
_ENDINGS = ("{name} was {feeling} to see it.", "Then {name} was {feeling} and went home.", "{other} was {feeling} too.")


@dataclass(frozen=True)
class Labelled:
    """A text, and whether it is good."""

    text: str
    good: bool
    title: str = ""  # of an article in several versions


@dataclass(frozen=True)
class Task:
    """A question to a model, and texts whose answers are known: to learn from, and unseen."""

    name: str
    rubric: str
    learnt: list[Labelled]
    unseen: list[Labelled]


def disorder(count: int) -> Task:
    """Stories, and others in disorder, `count` in each half."""
    rng = random.Random(0)
    halves = [[_story(rng, half, good=n % 2 == 0) for n in range(count)] for half in (0, 1)]
    return Task("disorder", _DISORDER, *halves)


def _story(rng: random.Random, half: int, *, good: bool) -> Labelled:
    name, other = rng.sample(_NAMES[half], 2)
    facts = {"name": name, "other": other, "place": rng.choice(_PLACES[half]), "thing": rng.choice(_THINGS)}
    facts |= {"size": rng.choice(_SIZES), "feeling": rng.choice(_FEELINGS)}
    text = " ".join(rng.choice(part).format(**facts) for part in (_BEGINNINGS, _MIDDLES, _ENDINGS))
    return Labelled(text if good else " ".join(rng.sample(text.split(), len(text.split()))), good)


def onestop(corpus: Path, count: int) -> Task:
    """Beginnings of articles for advanced readers and for beginners, at most `count` in each half."""
    path = corpus / "onestop_english.jsonl"
    if not path.is_file():
        raise click.UsageError(f"--corpus {corpus} has no {path.name}")
    by_title: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_title.setdefault(row["title"], {})[row["level"]] = " ".join(row["text"].split()[:_WORDS])
    both = [
        (title, levels) for title, levels in sorted(by_title.items()) if {"advanced", "elementary"} <= levels.keys()
    ]
    random.Random(0).shuffle(both)
    halves = [
        [
            Labelled(levels[level], level == "advanced", title)
            for title, levels in part
            for level in ("advanced", "elementary")
        ]
        for part in (both[::2], both[1::2])
    ]
    return Task("onestop", EDUCATIONAL, *(half[:count] for half in halves))


class Judging:
    """The judges of a task, and what they say of its unseen texts. Files go into `folder`."""

    def __init__(self, task: Task, folder: Path):
        self._task, self._folder = task, folder
        self._good = np.array([row.good for row in task.unseen])
        self.rows: list[dict[str, Any]] = []
        for half, rows in (("learnt", task.learnt), ("unseen", task.unseen)):
            lines = (
                json.dumps({"text": row.text, "good": row.good, "title": row.title or row.text}) + "\n" for row in rows
            )
            (folder / f"{half}.jsonl").write_text("".join(lines), encoding="utf-8")

    def model(self, name: str, model: Any, tokenizer: Any) -> None:
        """What a model says, and a filter that learnt it."""

        def said(half: str, key: str, sign: int = 1, **asked: Any) -> list[float]:
            output = self._folder / f"{half} by {name}, {key}"
            score_data(model, tokenizer, self._folder / f"{half}.jsonl", output, rubric=self._task.rubric, **asked)
            lines = (output / "data.jsonl").read_text(encoding="utf-8").splitlines()
            return [sign * json.loads(line)[key] for line in lines]

        self._judge(name, "rating", lambda: said("unseen", "rating"))
        self._judge(name, "likelihood", lambda: said("unseen", "nats_per_token", -1, rating=False, perplexity=True))
        said("learnt", "rating")
        self._filter(f"filter by {name}", self._folder / f"learnt by {name}, rating", top=0.5)

    def taught(self, steps: int) -> None:
        """What the bundled model says when it has learnt the labels."""
        lines = [
            {"prompt": self._task.rubric.replace(PLACE_OF_TEXT, row.text), "completion": "5" if row.good else "0"}
            for row in self._task.learnt
        ]
        data = self._folder / "taught.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        made = tune(_BUNDLED, data, self._folder / "judge", steps=steps, batch_size=8, learning_rate=2e-3)
        self.model(f"{_BUNDLED}, taught", *load(_BUNDLED, adapter=made.output))

    def labels(self) -> None:
        """What a filter says that has learnt the labels."""
        self._filter("filter by labels", self._folder / "learnt.jsonl", label="good")

    def _filter(self, name: str, rated: Path, **how: Any) -> None:
        train_filter(rated, self._folder / name, held_out=_HELD_OUT, group="title", **how)
        judge = read_classifier(self._folder / name)
        self._judge(name, "probability", lambda: [judge.probability(row.text) for row in self._task.unseen])

    def _judge(self, judge: str, by: str, said: Callable[[], Sequence[float]]) -> None:
        started, used = time.perf_counter(), time.process_time()
        scores = np.array(said(), np.float64)
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        area, good = area_under_curve(scores, self._good), int(self._good.sum())
        low, high = area_interval(area, good, len(scores) - good)
        figures = {"auc": area, "low": low, "high": high, "good": good, "bad": len(scores) - good}
        speed = {"texts_per_second": len(scores) / seconds, "processor_seconds": processor}
        self.rows.append({"task": self._task.name, "judge": judge, "by": by, **figures, **speed})
        click.echo(
            f"{self._task.name:9} {judge:28} {by:12} AUC {area:.3f} ({low:.3f} to {high:.3f})  "
            f"{speed['texts_per_second']:8.1f} texts/s"
        )


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, help="Another model to ask; may be given again.")
@click.option(
    "--corpus", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Holds onestop_english.jsonl."
)
@click.option("--texts", type=click.IntRange(min=120), default=400, show_default=True, help="Of each half, at most.")
@click.option("--train", type=click.IntRange(min=1), default=60, show_default=True, help="Steps on the labels.")
def main(models: tuple[str, ...], corpus: Path | None, texts: int, train: int) -> None:
    tasks = [disorder(texts), *([] if corpus is None else [onestop(corpus, texts)])]
    rows = []
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            judging = Judging(task, Path(folder))
            for name in (_BUNDLED, *models):
                judging.model(Path(name).name, *load(name))
            judging.taught(train)
            judging.labels()
        rows += judging.rows
    sizes = {task.name: {"learnt": len(task.learnt), "unseen": len(task.unseen)} for task in tasks}
    record.write("data", rows, "mlx", "scikit-learn", texts=sizes, steps=train)


if __name__ == "__main__":
    main()
