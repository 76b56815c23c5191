"""adapter_config.json as mlx-lm and `tune` write it: which keys are read and which ignored; others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..errors import AdapterError
from ..fields import Fields, shorten

CONFIG = "adapter_config.json"
WEAKEST, STRONGEST = 1e-6, 65504.0  # scales: below the first nothing is learnt; the second is float16's largest number
Kind = Literal["lora", "dora", "full"]
_READ_KEYS = {"fine_tune_type", "use_dora", "lora_parameters", "model", "base_model", "phi3_mlx"}
# How it was trained: all options of mlx-lm's trainer, old versions' too. Which layers, the tensors say.
_IGNORED = {
    *("train", "test", "data", "hf_dataset", "mask_prompt", "max_seq_length", "batch_size", "iters", "seed", "config"),
    *("num_layers", "lora_layers", "optimizer", "optimizer_config", "learning_rate", "lr_schedule", "grad_checkpoint"),
    *("grad_accumulation_steps", "clear_cache_threshold", "val_batches", "test_batches", "steps_per_report"),
    *("steps_per_eval", "save_every", "adapter_path", "adapter_file", "resume_adapter_file", "report_to"),
    *("project_name", "wandb", "trust_remote_code", "prompt", "max_tokens", "temp"),
}
_PARAMETERS = {"rank", "scale", "dropout", "keys", "alpha"}


def check_config(directory: Path, config: Mapping[str, Any]) -> None:
    """AdapterError, naming the key, for a setting that is unknown here and may change the numbers."""
    parameters = _fields(directory, config).fields("lora_parameters").raw
    unknown = {key: value for key, value in config.items() if key not in _READ_KEYS | _IGNORED}
    unknown |= {f"lora_parameters.{key}": value for key, value in parameters.items() if key not in _PARAMETERS}
    for key, value in unknown.items():
        if not is_neutral(value):
            raise AdapterError(
                f"{directory} cannot be used: {shorten(key, quote=False)} is {shorten(value)}, which is not known "
                "here; if it matters in training alone, take it out of adapter_config.json"
            )
    adapter_kind(directory, config)


def is_neutral(value: Any) -> bool:
    """Whether the value of an unknown setting switches nothing on: null, false, or empty."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def adapter_kind(directory: Path, config: Mapping[str, Any]) -> Kind:
    """What a folder holds: LoRA's matrices, DoRA's with magnitudes, or whole weights ("full"). Raises AdapterError."""
    fields = _fields(directory, config)
    kind = fields.text("fine_tune_type", "lora")
    if kind not in get_args(Kind):
        fields.fail("fine_tune_type", "lora, dora or full")
    return "dora" if kind == "lora" and fields.flag("use_dora", False) else cast(Kind, kind)


def scale_in(directory: Path, config: Mapping[str, Any]) -> float:
    """The scale s of s * (x @ lora_a) @ lora_b. Raises AdapterError."""
    parameters = _fields(directory, config).fields("lora_parameters")
    scale = parameters.number("scale", least=-STRONGEST, most=STRONGEST)
    alpha = parameters.number("alpha", 0.0)
    if alpha and alpha != parameters.number("rank"):
        raise AdapterError(
            f"{directory} cannot be used: lora_parameters.alpha is {alpha:g} beside scale {scale:g}; mlx-lm multiplied "
            f"by scale * alpha / rank until 2024 and by scale since; write what it was trained with as scale, and take "
            "alpha out"
        )
    return scale


def is_rslora(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether `tune` computed the scale by rsLoRA's rule. Version 0.1.0 wrote the flag as a text."""
    settings = _fields(directory, config).fields("phi3_mlx")
    return settings.raw.get("rslora") == "True" or settings.flag("rslora", False)


def _fields(directory: Path, config: Mapping[str, Any]) -> Fields:
    return Fields(config, directory / CONFIG, AdapterError)
