"""A classifier that learns from rated or labelled texts which are good, and what it is worth on others."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import DataError
from ..fields import kind_of, shorten
from ..files import json_text
from .area import AREA_OF_CHANCE, area_interval, area_under_curve
from .classifier import CLASSIFIER_FILE, TextClassifier, features_of
from .formats import DATA_REPORT
from .options import ReadOptions, TrainFilterOptions, WriteOptions
from .records import DataPath, DataRecord, OnAdvance, Records
from .step import new_folder, report_head

_FEWEST = 10  # of good and of bad texts, among those that are learnt and those that are held out
_STRENGTH = 10.0  # scikit-learn's C: rows have length 1, so that little regularization is enough
_BOUNDS_TOLD = [part / 20 for part in range(1, 20)]
_SHARE_DIGITS = 4  # digits of a share in the report


def train_filter(
    inputs: DataPath | Sequence[DataPath],
    output: DataPath,
    *,
    label: str = TrainFilterOptions.label,
    threshold: float | None = TrainFilterOptions.threshold,
    top: float | None = TrainFilterOptions.top,
    good: Sequence[str] = TrainFilterOptions.good,
    held_out: float = TrainFilterOptions.held_out,
    group: str | None = TrainFilterOptions.group,
    examples: int = TrainFilterOptions.examples,
    seed: int = TrainFilterOptions.seed,
    field: str | None = ReadOptions.field,
    lines: bool = ReadOptions.lines,
    skip_broken: bool = ReadOptions.skip_broken,
    force: bool = WriteOptions.force,
    progress: OnAdvance | None = None,
) -> dict[str, Any]:
    """Fit a classifier (hashed n-grams, logistic regression) to the texts' ratings or labels; the report.

    The folder `output` gets classifier.safetensors, for `filter_data(classifier=...)`, and report.json: the area under
    the ROC curve on texts that were held out, with its 95 % interval, and for each bound `at_least` what share of them
    it keeps, how many of these are good, and how many of the good ones are kept. Probabilities are calibrated on the
    held-out texts (Platt); where the good ones of these do not score higher than the bad ones, `says_nothing` is true,
    and all texts get the same probability.

    `label` is the key of a record's label: true, false, 1 or 0; a rating, good from `threshold` on, or if it is among
    the highest, the share `top`; a text, good if it is among `good`. A text's side depends on the text alone, so equal
    ones are never on both; with `group` on the text or number that the record has under that key, such as the title of
    an article in two versions. `examples` are drawn where there are more; memory grows by up to 40 KB for each. Raises
    DataError, OptionError.
    """
    options = TrainFilterOptions(label, threshold, top, good, held_out, group, examples, seed)  # type: ignore[arg-type]
    records = Records(inputs, ReadOptions(field, lines, skip_broken), "reading", progress)
    with new_folder(output, [records], WriteOptions(force=force)) as folder:
        drawn = _Drawn(records, options)
        is_good, least = _goodness(drawn.labels, options)
        classifier, facts = _fitted(drawn, is_good)
        classifier.write(folder / CLASSIFIER_FILE)
        report = report_head("train-filter", [records], asdict(options)) | {"threshold": least} | facts
        (folder / DATA_REPORT).write_text(json_text(report, indent=1) + "\n", encoding="utf-8")
    return report


class _Drawn:
    """Labelled texts, each as likely where there are more than are wanted: their features, labels and sides."""

    def __init__(self, records: Records, options: TrainFilterOptions):
        draw = random.Random(options.seed)
        self.rows: list[Any] = []  # sparse, (1, features) each
        self.labels: list[float | str] = []
        self.places: list[float] = []  # 0 to 1, of those that are together the same
        self._group, self._share = options.group, options.held_out
        for count, record in enumerate(records):
            label, together = _label(record, options.label), _together(record, options.group)
            place = count if count < options.examples else draw.randrange(count + 1)
            if place < options.examples:
                self.rows[place : place + 1] = [features_of([record.text])]
                self.labels[place : place + 1] = [label]
                self.places[place : place + 1] = [_side_of(together)]

    @property
    def held_out(self) -> np.ndarray:
        return np.array(self.places) < self._share

    def check(self, good: np.ndarray) -> None:
        """DataError unless there are enough good and bad texts on both sides."""
        held_out = self.held_out
        for which, side in (("learnt", good[~held_out]), ("held out", good[held_out])):
            for kind, count in (("good", int(side.sum())), ("bad", len(side) - int(side.sum()))):
                if count < _FEWEST:
                    what = "texts" if self._group is None else f"values of {shorten(self._group)}"
                    raise DataError(
                        f"{count:,} {kind} texts are {which}; give records with {_FEWEST} or more (in all there are "
                        f"{len({*self.places}):,} different {what})"
                    )


def _label(record: DataRecord, key: str) -> float | str:
    if key not in record.value:
        raise DataError(f"{record.source}: has no key {shorten(key)}; name the label's with label='other'")
    value = record.value[key]
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    given = shorten(value) if isinstance(value, float) else kind_of(value)  # NaN, infinity
    raise DataError(f"{record.source}: {shorten(key)} is {given}; expected a number, true, false or a text")


def _together(record: DataRecord, group: str | None) -> str:
    """What a record shares with those that are on the same side."""
    if group is None:
        return record.text
    value = record.value.get(group)
    if value is None:
        raise DataError(f"{record.source}: has no {shorten(group)}, by which texts are held out together; give it one")
    if isinstance(value, str):
        return json_text(value)
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return json_text(int(value) if float(value).is_integer() else value)  # 1.0 is 1
    given = shorten(value) if isinstance(value, float) else kind_of(value)
    raise DataError(
        f"{record.source}: {shorten(group)} is {given}; expected a text or a number, the same for texts that are held "
        "out together"
    )


def _side_of(text: str) -> float:
    """Where a text lies from 0 to 1: as good as random, and always the same."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") / 2**64


def _goodness(labels: Sequence[float | str], options: TrainFilterOptions) -> tuple[np.ndarray, float | None]:
    """Which texts are good, and from which rating on. Raises DataError for labels that do not say it."""
    said = {label for label in labels if isinstance(label, str)}
    if options.good:
        if missing := set(options.good) - said:
            raise DataError(f"no record has the label {sorted(missing)[0]!r}; there are {_listed(said)}")
        if others := {label for label in labels if not isinstance(label, str)}:
            raise DataError(f"labels are texts, {_listed(said)}, and numbers, such as {min(others):g}; give one kind")
        return np.array([label in options.good for label in labels]), None
    if said:
        raise DataError(
            f"labels are texts, {_listed(said)}; say which of them are good, as good={shorten(sorted(said)[0])}"
        )
    numbers = np.array(labels, np.float64)
    if options.top is not None:
        least = float(np.quantile(numbers, 1 - options.top, method="higher"))
    elif options.threshold is not None:
        least = options.threshold
    elif set(labels) <= {0.0, 1.0}:
        least = 1.0
    else:
        raise DataError("labels are ratings; say from which threshold on a text is good, or which top=0.2 of them are")
    return numbers >= least, least


def _listed(names: set[str]) -> str:
    return ", ".join(map(shorten, sorted(names)[:5])) or "none that are texts"


def _fitted(drawn: _Drawn, good: np.ndarray) -> tuple[TextClassifier, dict[str, Any]]:
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    drawn.check(good)
    held_out = drawn.held_out
    rows = vstack(drawn.rows, format="csr")
    learnt = LogisticRegression(C=_STRENGTH, max_iter=1000).fit(rows[~held_out], good[~held_out])
    scores, truth = learnt.decision_function(rows[held_out]).astype(np.float64), good[held_out]
    platt = LogisticRegression(max_iter=1000).fit(scores[:, None], truth)
    slope, shift = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    area = area_under_curve(scores, truth)
    if slope <= 0 or area <= AREA_OF_CHANCE:  # what it learnt is wrong of other texts, and its opposite was not learnt
        slope, shift = 0.0, math.log(truth.sum() / (~truth).sum())
    weights, bias = learnt.coef_[0].astype(np.float32), float(learnt.intercept_[0])
    low, high = area_interval(area, int(truth.sum()), int((~truth).sum()))
    facts = {
        "learnt": {"good": int(good[~held_out].sum()), "bad": int((~good[~held_out]).sum())},
        "held_out": {"good": int(truth.sum()), "bad": int((~truth).sum())},
        "auc": area,
        "auc_95": [low, high],
        "says_nothing": slope == 0,
        "bounds": _bounds_table(1 / (1 + np.exp(-(slope * scores + shift))), truth),
    }
    return TextClassifier(weights, bias, slope, shift), facts


def _bounds_table(probabilities: np.ndarray, good: np.ndarray) -> list[dict[str, float | None]]:
    """For each bound what it keeps of texts that were not learnt."""
    table = []
    for bound in _BOUNDS_TOLD:
        kept = probabilities >= bound
        table.append(
            {
                "at_least": bound,
                "kept": round(float(kept.mean()), _SHARE_DIGITS),
                "good_of_kept": round(float(good[kept].mean()), _SHARE_DIGITS) if kept.any() else None,
                "kept_of_good": round(float(kept[good].mean()), _SHARE_DIGITS),
            }
        )
    return table
