"""Objectives that learn which of two answers is better, or whether one is good, and not what to say.

With log p(y) the sum of an answer's log-probabilities under the model that is trained, and r(y) = log p(y) - log
p_ref(y) (the reference: the model before the first step), the loss of a pair with a better answer c and a worse one w
is, as TRL has it,

    DPO    -log sigmoid(beta (r(c) - r(w)))                                   arXiv 2305.18290
    IPO    (r(c) / |c| - r(w) / |w| - 1 / (2 beta))^2                         2310.12036
    ORPO   NLL(c) - beta log sigmoid(log odds(c) - log odds(w))               2403.07691
    SimPO  -log sigmoid(beta (log p(c) / |c| - log p(w) / |w|) - gamma)       2405.14734

and of one labelled answer

    KTO    weight (1 - sigmoid(+-beta (r(y) - KL)))                           2402.01306

|y| counts tokens; odds are those of p = exp(log p(y) / |y|); NLL is a token's mean over prompt and answer. KL is the
mean of r over a batch's prompts with answers to others, never below 0 and without a gradient. Label smoothing e (DPO)
takes (1 - e) of the loss and e of that with the answers exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .batches import Part, make_part
from .examples import Encoded
from .loss import log_probs
from .objective import SFT, Objective, Scored
from .pairs import (
    Labelled,
    LabelledRecord,
    PairRecord,
    PreferencePair,
    encode_labelled,
    encode_pairs,
    read_labelled,
    read_pair,
)

if TYPE_CHECKING:
    from ..models.decoder import Model
    from ..text.tokenizer import Tokenizer
    from .settings import Settings

_MOST_CERTAIN = -1e-6  # log p a token, above which odds are taken as no larger; at 0 they would be infinite


@dataclass(frozen=True)
class PreferencePart(Part):
    """A part whose trained tokens belong to answers: token n to that of number `answer[n]`, of `answers` in all.

    `references` (answers,) are the sums of log p under the reference, and `sizes` (answers,) counts of tokens.
    """

    answer: mx.array
    sizes: mx.array
    references: mx.array
    labels: mx.array  # (examples,) 1 for a desirable one; of labelled answers alone
    shared: float
    prompts: mx.array | None  # (N,) 1 for the tokens of a prompt that is trained with its answer

    def sums(self, by_token: mx.array) -> mx.array:
        """Sums over the tokens of each answer, (answers,)."""
        return mx.zeros(self.sizes.shape).at[self.answer].add(by_token)


class _Preference(Objective):
    """What objectives over answers share."""

    usual_beta: ClassVar[float] = 0.1

    def __init__(self, settings: Settings):
        self._settings = settings
        self.beta = self.usual_beta if settings.beta is None else settings.beta

    def part(self, examples: Sequence[Any], references: Sequence[Sequence[float]], shared: float) -> PreferencePart:
        sequences = [sequence for example in examples for sequence in example.sequences]
        known = [value for row, example in zip(references, examples, strict=True)
                 for value in row[: len(example.sequences)]]  # fmt: skip
        part = make_part(sequences)
        counts = [int(sequence.trained.sum()) for sequence in sequences]
        prompts = [np.zeros(count, np.float32) for count in counts]
        for n, sequence in enumerate(sequences):
            if isinstance(example := examples[n // len(examples[0].sequences)], PreferencePair):
                prompts[n][: int(sequence.trained[: example.prompt].sum())] = 1
        sizes = [count - int(mask.sum()) for count, mask in zip(counts, prompts, strict=True)]
        return PreferencePart(
            part.ids,
            part.lengths,
            part.places,
            part.targets,
            mx.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts)),
            mx.array(sizes, mx.float32),
            mx.array(known, mx.float32),
            mx.array([float(getattr(example, "desirable", 1)) for example in examples]),
            shared,
            mx.array(np.concatenate(prompts)) if any(mask.any() for mask in prompts) else None,
        )


class Paired(_Preference):
    """Losses of pairs of answers; `pair_losses` says which."""

    figures: ClassVar[tuple[str, ...]] = (
        *("reward_chosen", "reward_rejected", "margin", "accuracy"),
        *("tokens_chosen", "tokens_rejected"),
    )
    learns_prompts: ClassVar[bool] = False  # the chosen answer is learnt as text too, with the prompt before it

    def read(self, value: Any, source: str, unused: dict[str, str]) -> PairRecord:
        return read_pair(value, source, unused)

    def encode(self, records: Iterable[PairRecord], tokenizer: Tokenizer, settings: Settings) -> Encoded:
        return encode_pairs(
            records,
            tokenizer,
            max_length=settings.max_length,  # type: ignore[arg-type]
            overflow=settings.overflow,  # type: ignore[arg-type]
            whole=self.learns_prompts,
        )

    def loss(
        self, model: Model, part: PreferencePart, *, checkpoint: bool = False, keys: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        by_token = log_probs(model, part, checkpoint=checkpoint, keys=keys)
        sums = part.sums(by_token if part.prompts is None else by_token * (1 - part.prompts)).reshape(-1, 2)
        rewards, losses = self.pair_losses(sums, part)
        total = mx.sum(losses)
        if self.learns_prompts:
            total = total - part.shared * mx.sum(by_token * (part.answer % 2 == 0))
        measured = self._figures(mx.stop_gradient(rewards), mx.stop_gradient(sums), part)
        sums = mx.stack([mx.sum(figure) for figure in measured])
        return total, mx.stack([sums, mx.full(sums.shape, len(losses))])

    def pair_losses(self, sums: mx.array, part: PreferencePart) -> tuple[mx.array, mx.array]:
        """(rewards (pairs, 2), losses (pairs,)) of sums of log p (pairs, 2): chosen, rejected."""
        raise NotImplementedError

    def _figures(self, rewards: mx.array, sums: mx.array, part: PreferencePart) -> list[mx.array]:
        """In the order of `figures`, each (pairs,)."""
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        sizes = part.sizes.reshape(-1, 2)
        return [chosen, rejected, chosen - rejected, chosen > rejected, sizes[:, 0], sizes[:, 1]]


class DPO(Paired):
    """Direct preference optimization, with label smoothing, and IPO's loss in its place."""

    figures: ClassVar[tuple[str, ...]] = (*Paired.figures, "kl")
    reads_reference: ClassVar[bool] = True

    def pair_losses(self, sums: mx.array, part: PreferencePart) -> tuple[mx.array, mx.array]:
        ratios = sums - part.references.reshape(-1, 2)
        rewards = self.beta * ratios
        if self._settings.dpo_loss == "ipo":
            each = ratios / part.sizes.reshape(-1, 2)
            return rewards, mx.square(each[:, 0] - each[:, 1] - 1 / (2 * self.beta))
        margins, smoothing = rewards[:, 0] - rewards[:, 1], self._settings.label_smoothing
        losses = -nn.log_sigmoid(margins) * (1 - smoothing)
        return rewards, losses - smoothing * nn.log_sigmoid(-margins) if smoothing else losses

    def _figures(self, rewards: mx.array, sums: mx.array, part: PreferencePart) -> list[mx.array]:
        ratios = sums - part.references.reshape(-1, 2)
        return [*super()._figures(rewards, sums, part), mx.mean(mx.square(ratios), axis=1) / 2]


class SimPO(Paired):
    """Simple preference optimization: means a token instead of a reference."""

    usual_beta = 2.0

    def pair_losses(self, sums: mx.array, part: PreferencePart) -> tuple[mx.array, mx.array]:
        rewards = self.beta * sums / part.sizes.reshape(-1, 2)
        return rewards, -nn.log_sigmoid(rewards[:, 0] - rewards[:, 1] - self._settings.simpo_gamma)


class ORPO(Paired):
    """Odds-ratio preference optimization: likelihood of the better answer, and odds against the worse, no reference."""

    learns_prompts = True

    def shared(self, batch: Sequence[PreferencePair], references: Sequence[Sequence[float]], score: Scored) -> float:
        """What a token's log p weighs: pairs over tokens, so that the likelihood is a mean over the batch's tokens."""
        return len(batch) / sum(int(pair.chosen.trained.sum()) for pair in batch)

    def pair_losses(self, sums: mx.array, part: PreferencePart) -> tuple[mx.array, mx.array]:
        means = sums / part.sizes.reshape(-1, 2)
        certain = mx.minimum(means, _MOST_CERTAIN)
        odds = means - mx.log(-mx.expm1(certain))
        return self.beta * means, -self.beta * nn.log_sigmoid(odds[:, 0] - odds[:, 1])


class KTO(_Preference):
    """Kahneman-Tversky optimization: answers alone, each desirable or not."""

    figures = ("reward_chosen", "reward_rejected", "kl", "tokens_chosen", "tokens_rejected")
    reads_reference: ClassVar[bool] = True

    def read(self, value: Any, source: str, unused: dict[str, str]) -> LabelledRecord:
        return read_labelled(value, source, unused)

    def encode(self, records: Iterable[LabelledRecord], tokenizer: Tokenizer, settings: Settings) -> Encoded:
        return encode_labelled(
            records,
            tokenizer,
            max_length=settings.max_length,  # type: ignore[arg-type]
            overflow=settings.overflow,  # type: ignore[arg-type]
            batch_size=settings.batch_size,
        )

    def shared(self, batch: Sequence[Labelled], references: Sequence[Sequence[float]], score: Scored) -> float:
        """The KL from the reference, as prompts with answers to others estimate it."""
        policy = score([example.other for example in batch])
        reference = [row[1] for row in references]
        return max(0.0, sum(p - r for p, r in zip(policy, reference, strict=True)) / len(batch))

    def loss(
        self, model: Model, part: PreferencePart, *, checkpoint: bool = False, keys: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        sums = part.sums(log_probs(model, part, checkpoint=checkpoint, keys=keys))
        rewards = self.beta * (sums - part.references)
        good, bad = part.labels, 1 - part.labels
        against = rewards - self.beta * part.shared
        settings = self._settings
        losses = good * settings.desirable_weight * mx.sigmoid(-against)
        losses = losses + bad * settings.undesirable_weight * mx.sigmoid(against)
        told, each = mx.stop_gradient(rewards), mx.ones_like(good)
        kinds = (good, bad, each, good, bad)
        values = (told, told, each * part.shared, part.sizes, part.sizes)
        measured = [[mx.sum(kind * value) for kind, value in zip(kinds, values, strict=True)], [*map(mx.sum, kinds)]]
        return mx.sum(losses), mx.stack([mx.stack(row) for row in measured])


_MADE_BY_NAME: dict[str, Callable[[Settings], Objective]] = {
    "sft": lambda settings: SFT(),
    "dpo": DPO,
    "orpo": ORPO,
    "simpo": SimPO,
    "kto": KTO,
}


def make_objective(settings: Settings) -> Objective:
    """The objective that settings name."""
    return _MADE_BY_NAME[settings.objective](settings)
