"""A cheap judge of texts: hashed n-grams of words and a logistic regression, in a file that runs no code.

The file is a safetensors file: the weights, and in its head how texts become features.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, DataError, OptionError
from ..fields import parse
from ..paths import expanded
from ..store.safetensors import read_header, read_metadata
from .shingles import words_in

CLASSIFIER_FILE = "classifier.safetensors"
_CLASSIFIER_FORMAT = 1
_FEATURES, _LONGEST_NGRAM = 2**18, 2
_LOOKED_AT = 10_000  # characters of a text: so much says what it is like, and bounds memory
_CLASSIFIER_WEIGHTS = "weights"


@dataclass(frozen=True)
class TextClassifier:
    """Says of texts how probable it is that they are good.

    `weights`: float32 (2**18,), of each hashed n-gram. The logit is `slope` x (weights . features + bias) + `shift`.
    """

    weights: np.ndarray
    bias: float
    slope: float = 1.0
    shift: float = 0.0

    def probability(self, text: str) -> float:
        """How probable it is that a text is good, 0 to 1. OptionError where scikit-learn is not installed."""
        row = features_of([text])
        logit = self.slope * (float(row.data @ self.weights[row.indices]) + self.bias) + self.shift
        return 1 / (1 + math.exp(-logit)) if logit > -500 else 0.0

    def digest(self) -> str:
        """The same for classifiers that say the same."""
        numbers = np.array([self.bias, self.slope, self.shift])
        return hashlib.sha256(self.weights.tobytes() + numbers.tobytes()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it as one file."""
        from safetensors.numpy import save_file

        head = {
            "format": _CLASSIFIER_FORMAT,
            "ngrams": _LONGEST_NGRAM,
            "characters": _LOOKED_AT,
            "bias": self.bias,
            "slope": self.slope,
            "shift": self.shift,
        }
        save_file({_CLASSIFIER_WEIGHTS: self.weights}, path, metadata={"phi3_mlx_classifier": json.dumps(head)})


def read_classifier(path: str | os.PathLike[str]) -> TextClassifier:
    """The classifier in a file, or in a folder of `train-filter`. Raises DataError."""
    place = expanded(path)
    place = place / CLASSIFIER_FILE if place.is_dir() else place
    try:
        tensors = read_header(place)
        head = parse(read_metadata(place).get("phi3_mlx_classifier", "null"))
    except (CheckpointError, ValueError) as error:
        why = str(error).removeprefix(f"{place} ").removesuffix("; download it again")
        raise DataError(f"{place} holds no classifier: it {why}; name what train-filter wrote") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}; name what train-filter wrote") from error
    if not isinstance(head, dict) or set(tensors) != {_CLASSIFIER_WEIGHTS}:
        raise DataError(f"{place} holds no classifier; name what train-filter wrote")
    known = {"format": _CLASSIFIER_FORMAT, "ngrams": _LONGEST_NGRAM, "characters": _LOOKED_AT}
    tensor = tensors[_CLASSIFIER_WEIGHTS]
    if {name: head.get(name) for name in known} != known or (tensor.dtype, tensor.shape) != ("F32", (_FEATURES,)):
        raise DataError(f"{place} is a classifier of another version; train it again")
    numbers = [_finite(head, name, place) for name in ("bias", "slope", "shift")]
    weights = np.fromfile(place, "<f4", _FEATURES, offset=os.path.getsize(place) - 4 * _FEATURES)
    if not np.isfinite(weights).all():
        raise DataError(f"{place} is damaged: not all of its weights are numbers; train it again")
    return TextClassifier(weights, *numbers)


def _finite(head: Mapping[str, Any], name: str, place: Path) -> float:
    value = head.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{place} is damaged: its {name} is no number; train it again")
    return float(value)


def features_of(texts: Sequence[str]) -> Any:
    """Hashed words and pairs of words, of length 1: a sparse matrix in float32 (number of texts, 2**18)."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError as error:
        raise OptionError('classifiers need the package scikit-learn: pip install "phi3-mlx[data]"') from error
    hashing = HashingVectorizer(
        tokenizer=words_in,
        token_pattern=None,
        lowercase=False,
        ngram_range=(1, _LONGEST_NGRAM),
        n_features=_FEATURES,
        dtype=np.float32,
    )
    return hashing.transform([text[:_LOOKED_AT] for text in texts])
