"""The experiment's fixed numbers, as its README has them, and the small ones of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

FIRST = ("raw", "filtered")  # the primary contrast's
ARMS = (*FIRST, "filtered and synthetic", "random", "shuffled")
NOISE = "noise"  # after all others
PRIMARY = "picture books"  # the measure
# What each hypothesis compares: (name, arm, the arm that it is compared with).
CONTRASTS = (
    ("H1", "filtered", "raw"),
    ("H2", "filtered and synthetic", "filtered"),
    ("H3", "filtered", "random"),
    ("H4", "shuffled", "random"),
    ("C", NOISE, "raw"),
)


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    tokens: int = 1 << 18  # that a run reads
    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (0.001, 0.003)
    rate_seed: int = 100
    row: int = 256  # tokens
    rows: int = 2  # a step
    hours: float = 3.0  # of the processor, for all runs
    questions: int = 100
    pairs: int = 30  # of each paradigm of BLiMP
    rated: int = 200  # passages
    draws: int = 2000  # of the bootstrap
    vocabulary: int = 4096
    shape: dict[str, Any] = field(
        default_factory=lambda: {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
                                 "num_attention_heads": 4, "num_key_value_heads": 4}
    )  # fmt: skip

    @property
    def chosen(self) -> int:
        """Tokens of a filtered pool: a run reads it three times."""
        return self.tokens // 3


FULL = Plan()
SMOKE = replace(
    FULL,
    tokens=1 << 11,
    seeds=(1, 2),
    rates=(0.003, 0.01),
    row=64,
    questions=8,
    pairs=2,
    rated=4,
    draws=50,
    vocabulary=512,
    shape={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_key_value_heads": 2},
)  # fmt: skip
