"""PEFT's adapter_config.json: which settings are honoured and which ignored; others are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import AdapterError
from ..fields import Fields, shorten
from .config import CONFIG, STRONGEST, is_neutral
from .lora import scale_of

# Settings that the tensors tell as well, or that matter in training alone.
_IGNORED = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "velora_config"),
    # Settings of initializations; `init_lora_weights` chooses one.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # ms-swift's own.
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
}
# Features that adapters here do not have. An unknown setting is refused too, in other words.
_LACKING = {
    *("peft_type", "bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("fan_in_fan_out", "layer_replication", "megatron_config", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config"),
}
_REPETITIONS, _GROUPS = 3, 4  # repetitions (*, +, ?, {}) and groups that a pattern may have
_HONOURED = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_MUST_BE: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA", None), "bias": ("none", None)}
# How A and B were initialized. Some ways subtract from the base a part that the file does not hold.
_BASE_UNCHANGED = (None, "gaussian", "orthogonal", "eva", "mica")
_PRINCIPAL = ("pissa", "olora")  # ways whose part can be computed from the base


@dataclass(frozen=True)
class PeftConfig:
    """The settings of PEFT's LoRA or DoRA adapters that are honoured.

    `principal` is "pissa" or "olora" if A and B were initialized with a part of the base that was subtracted from it.
    """

    source: Path
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    principal: str | None

    @classmethod
    def of(cls, raw: Mapping[str, Any], source: Path) -> PeftConfig:
        """Raises AdapterError, naming the setting, for one that cannot be honoured."""
        for key, value in raw.items():
            if key not in _IGNORED | _HONOURED and not _is_neutral(key, value):
                why = "which is not known here; if it matters in training alone, take it out of adapter_config.json"
                lacking = "which adapters here do not have"
                named = f"{shorten(key, quote=False)} is {shorten(value)}"
                refuse(source, f"{named}, {lacking if key in _LACKING else why}")
        fields = Fields(raw, source / CONFIG, AdapterError)
        ranks, alphas = fields.fields("rank_pattern"), fields.fields("alpha_pattern")
        return cls(
            source=source,
            rank=fields.whole("r", 8, least=1),
            alpha=_alpha(fields, "lora_alpha", 8.0),
            rslora=fields.flag("use_rslora", False),
            dora=fields.flag("use_dora", False),
            ranks={key: ranks.whole(key, least=1) for key in _patterns(ranks)},
            alphas={key: _alpha(alphas, key) for key in _patterns(alphas)},
            principal=_principal(raw.get("init_lora_weights"), source),
        )

    def rank_of(self, path: str) -> int:
        """The rank of the layer `path`: that of the first pattern that matches, as in PEFT."""
        return int(_matched(self.ranks, path, self.rank))

    def scale_of(self, path: str) -> float:
        """What PEFT multiplies B A by in the layer `path`. Raises AdapterError if that is above `STRONGEST`."""
        alpha, rank = _matched(self.alphas, path, self.alpha), self.rank_of(path)
        scale = scale_of(alpha, rank, self.rslora)
        if scale > STRONGEST:
            refuse(self.source, f"lora_alpha {alpha:g} of {rank} components makes a scale of {scale:g} in {path}")
        return scale


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a setting that is not honoured, known or unknown, switches nothing on."""
    return value in _MUST_BE[key] if key in _MUST_BE else is_neutral(value)


def _principal(init: Any, source: Path) -> str | None:
    if isinstance(init, str) and init.lower() in _PRINCIPAL:
        return init.lower()
    if not isinstance(init, bool) and init not in _BASE_UNCHANGED:
        refuse(
            source,
            f"init_lora_weights is {shorten(init)}, which takes a part out of the base that follows neither from the "
            "file nor from the base; convert it where it was trained: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or merge it into the model and convert that",
        )
    return None


def _alpha(fields: Fields, key: str, default: float | None = None) -> float:
    return fields.number(key, default, least=1e-6)


def _patterns(table: Fields) -> list[str]:
    """The keys, regular expressions that layers are matched with."""
    for pattern in table.raw:
        # Matching may take exponential time if a group is repeated, or if there are many repetitions or groups.
        repeated, groups = re.findall(r"(?<![(*+?}])[*+?{]", pattern), pattern.count("(")  # `.*?` repeats once
        if len(repeated) > _REPETITIONS or groups > _GROUPS or re.search(r"\)[*+{]", pattern):
            table.fail(pattern, "the name of a layer, or a pattern that repeats little")
        try:
            _compiled(pattern)
        except (re.error, OverflowError):
            table.fail(pattern, "the name of a layer, or a regular expression that matches it")
    return list(table.raw)


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as PEFT matches it with the paths of layers."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _matched(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((value for key, value in patterns.items() if _compiled(key).match(path)), default)


def exactly(path: str) -> str:
    """A pattern of PEFT that matches this layer alone."""
    return f"^{re.escape(path)}"


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The `lora_alpha` that gives a scale; an int, as in PEFT, if it is one up to rounding."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def refuse(source: Path, why: str) -> NoReturn:
    raise AdapterError(f"{source} cannot be imported: {why}")
