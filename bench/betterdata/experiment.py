"""The steps of the experiment in their order. Each leaves its result in the work folder, and is not done twice."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from phi3_mlx.store.atomic import replace_file

from . import filtering, measures, statistics, texts, training
from .plan import ARMS, CONTRASTS, FIRST, NOISE, Plan


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in a file of JSON; it is made, with the seconds of the processor that this took, unless it is there."""
    if not path.is_file():
        started = time.process_time()
        made = make()
        made["cpu_seconds"] = round(time.process_time() - started, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(made).encode())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def shuffled_words(passage: str, rng: np.random.Generator) -> str:
    """Noise made by program: the words of a passage in random order."""
    words = passage.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


class Experiment:
    """Texts, tokenizer, filter and rate in the folder `work`; then the runs."""

    def __init__(self, corpus: Path, work: Path, blimp: Path | None, plan: Plan):
        self.work, self.blimp, self.plan = work, blimp, plan
        work.mkdir(parents=True, exist_ok=True)
        # A work folder is one plan's. The hours may grow: they say when to stop, and change no run.
        said = json.loads(json.dumps({**asdict(plan), "hours": None, "blimp": blimp is not None}))
        before = kept(work / "plan.json", lambda: dict(said))
        before.pop("cpu_seconds")
        if before != said:
            raise click.ClickException(f"{work} has runs of another plan; name another folder with --work")
        self.removed = kept(work / "texts.json", lambda: texts.prepare(corpus, work))
        self.texts = texts.load(work)
        path = work / "tokenizer.json"
        if not path.is_file():
            size = sum(len(record["text"]) for record in self.texts.raw)
            training.train_tokenizer([*self._raw(), *_up_to(self._synthetic(), size, len)], plan.vocabulary, path)
        self.tokenizer = training.read_tokenizer(path)
        self.ids = training.encode(self.tokenizer, self._raw())
        self.facts = kept(work / "filter.json", self._filter)

    def _raw(self) -> list[str]:
        return [record["text"] for record in self.texts.raw]

    def _synthetic(self) -> list[str]:
        return [record["text"] for record in self.texts.synthetic]

    # The filter

    def _filter(self) -> dict[str, Any]:
        """Which passages the filter takes, those of filters with shuffled labels by seed, and how good it is."""
        learnt, good, facts = filtering.labels(self.texts.labelled, self.texts.tested, self.plan.rated)
        facts["fitted_to"], facts["tested_on"] = len(learnt), len(self.texts.tested)
        fitted = filtering.Filter(learnt, good)
        levels = [record["level"] == filtering.GOOD for record in self.texts.tested]
        facts["filter_auc"] = filtering.auc(levels, fitted.scores([record["text"] for record in self.texts.tested]))
        facts["filtered"] = self._best(fitted)
        facts["shuffled"] = {}
        for seed in self.plan.seeds:
            wrong = np.random.default_rng(seed).permutation(good)
            facts["shuffled"][str(seed)] = self._best(filtering.Filter(learnt, wrong.tolist()))
        return facts

    def _best(self, fitted: filtering.Filter) -> list[int]:
        """Indexes of the passages that a filter likes best, as many as a filtered pool has."""
        return self._chosen(np.argsort(-fitted.scores(self._raw()), kind="stable"))

    def _chosen(self, order: np.ndarray) -> list[int]:
        """The first passages of an order, as many as a filtered pool has."""
        return _up_to(order.tolist(), self.plan.chosen, lambda i: len(self.ids[i]))

    # The arms

    def pool(self, arm: str, seed: int) -> tuple[list[np.ndarray], dict[str, int]]:
        """The ids of an arm's passages, and how many characters each source has in it."""
        if arm == NOISE:
            return self._noise(), self._sizes(range(len(self.ids)))
        if arm in ("raw", "random", "shuffled"):
            members = {
                "raw": lambda: list(range(len(self.ids))),
                "random": lambda: self._chosen(np.random.default_rng(seed).permutation(len(self.ids))),
                "shuffled": lambda: self.facts["shuffled"][str(seed)],
            }[arm]()
            return [self.ids[i] for i in members], self._sizes(members)
        members = self.facts["filtered"]
        pool, sizes = [self.ids[i] for i in members], self._sizes(members)
        if arm == "filtered and synthetic":
            drawn = [self._synthetic()[i] for i in np.random.default_rng(0).permutation(len(self.texts.synthetic))]
            encoded = training.encode(self.tokenizer, drawn)
            stories = _up_to(range(len(drawn)), self.plan.chosen, lambda i: len(encoded[i]))
            pool += [encoded[i] for i in stories]
            sizes["TinyStories"] = sum(len(drawn[i]) for i in stories)
        return pool, sizes

    def _sizes(self, members: Sequence[int]) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for i in members:
            sizes[self.texts.raw[i]["source"]] += len(self.texts.raw[i]["text"])
        return dict(sizes)

    def _noise(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        passages = [shuffled_words(text, rng) if i % 2 else text for i, text in enumerate(self._raw())]
        return training.encode(self.tokenizer, passages)

    # The runs

    def rate(self) -> dict[str, Any]:
        """The learning rate of all arms, and the loss of each that was tried, in nats a token."""

        def tried(rate: float) -> dict[str, Any]:
            tokens = self.plan.tokens // 2
            rows = training.rows(self.ids, self.plan, tokens, self.plan.rate_seed)
            folder = self.work / f"rate-{rate:g}"
            model = training.learn(self.plan, rows, rate, self.plan.rate_seed, folder, f"rate {rate:g}")
            kept_ids = training.encode(self.tokenizer, [record["text"] for record in self.texts.kept])
            windows = [row.ids for row in training.rows(kept_ids, self.plan, sum(map(len, kept_ids)), 0)]
            return {"loss": float(np.mean(np.concatenate(measures.nats(model, windows))))}

        losses = {rate: kept(self.work / f"rate-{rate:g}.json", lambda rate=rate: tried(rate))["loss"]  # type: ignore[misc]
                  for rate in self.plan.rates}  # fmt: skip
        return {"rate": min(losses, key=lambda rate: losses[rate]), "losses": losses}

    def order(self) -> Iterator[tuple[str, str, int]]:
        """(what, arm, seed) in turn: the primary contrast's arms learn, the others do, all choose; noise last."""
        seeds, others = self.plan.seeds, ARMS[len(FIRST) :]
        for what, arms in (
            ("learn", FIRST),
            ("learn", others),
            ("choose", ARMS),
            ("learn", (NOISE,)),
            ("choose", (NOISE,)),
        ):
            yield from ((what, arm, seed) for seed in seeds for arm in arms)

    def learn(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """An arm trained with a seed, and the bits of what it reads then."""
        pool, sizes = self.pool(arm, seed)
        rows = training.rows(pool, self.plan, self.plan.tokens, seed)
        model = training.learn(self.plan, rows, rate, seed, self.work / f"{arm}-{seed}", f"{arm}, seed {seed}")
        items = measures.read(model, self.tokenizer, self.texts, self.plan)
        return {"items": items, "passages": len(pool), "tokens_in_pool": sum(map(len, pool)), "characters": sizes}

    def choose(self, arm: str, seed: int) -> dict[str, Any]:
        """The choices of a trained arm."""
        model = training.learnt(self.plan, self.work / f"{arm}-{seed}")
        return {"items": measures.choose(model, self.tokenizer, self.texts, self.blimp, self.plan)}

    def runs(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What each run measured; that which the budget did not last for is not there."""
        rate = self.rate()["rate"]
        done: dict[tuple[str, int], dict[str, Any]] = {}
        for what, arm, seed in self.order():
            path = self.work / f"{arm}-{seed}-{what}.json"
            if not path.is_file() and self.spent() >= 3600 * self.plan.hours:
                print(
                    f"the budget of {self.plan.hours:g} hours is spent: {arm}, seed {seed} does not {what}", flush=True
                )
                break
            if what == "learn":
                done[arm, seed] = kept(path, lambda arm=arm, seed=seed: self.learn(arm, seed, rate))  # type: ignore[misc]
            else:
                found = kept(path, lambda arm=arm, seed=seed: self.choose(arm, seed))  # type: ignore[misc]
                done[arm, seed]["items"] |= found["items"]
        return done

    def spent(self) -> float:
        """Seconds of the processor for all steps that ended."""
        files = [path for path in self.work.glob("*.json") if path.stem not in ("tokenizer", "plan")]
        return sum(json.loads(path.read_text(encoding="utf-8")).get("cpu_seconds", 0.0) for path in files)


def _up_to(items: Sequence[Any], size: int, measured: Callable[[Any], int]) -> list[Any]:
    """The first items, until they have this size together."""
    taken, total = [], 0
    for item in items:
        if total >= size:
            break
        taken.append(item)
        total += measured(item)
    return taken


def rows(done: dict[tuple[str, int], dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """By measure, figures of every arm that has it of all seeds, and contrasts of those that both do."""
    found: list[dict[str, Any]] = []
    for measure in measures.MEASURES:
        items = {
            arm: [np.array(done[arm, seed]["items"][measure]) for seed in plan.seeds]
            for arm in (*ARMS, NOISE)
            if all((arm, seed) in done and measure in done[arm, seed]["items"] for seed in plan.seeds)
        }
        for arm, by_seed in items.items():
            values = [statistics.share(each) for each in by_seed]
            found.append({"measure": measure, "arm": arm, "mean": float(np.mean(values)), "seeds": values})
        for name, arm, against in CONTRASTS:
            if arm in items and against in items:
                contrast = _contrast(name, items[arm], items[against], measure, plan)
                found.append({"measure": measure, "hypothesis": name, "arm": arm, "against": against, **contrast})
    if not found:
        raise click.ClickException("no arm has all its seeds yet; run the command again to go on")
    return found


def _contrast(name: str, one: list[np.ndarray], other: list[np.ndarray], measure: str, plan: Plan) -> dict[str, Any]:
    """The difference of two arms, its intervals, and what they say."""
    differences = [statistics.share(a) - statistics.share(b) for a, b in zip(one, other, strict=True)]
    mean = float(np.mean(differences))
    intervals = [statistics.by_seeds(differences), statistics.by_texts(one, other, plan.draws)]
    in_bits = measures.MEASURES[measure].startswith("bits")
    better = -1 if in_bits else 1
    expected = {"H4": 0, "C": -better}.get(name, better)
    negligible = statistics.NEGLIGIBLE if in_bits else 0.0
    return {"difference": mean, "by_seeds": intervals[0], "by_texts": intervals[1],
            "verdict": statistics.verdict(mean, intervals, expected, negligible)}  # fmt: skip
