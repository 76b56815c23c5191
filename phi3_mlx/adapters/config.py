"""adapter_config.json as mlx-lm writes it and `tune` does: which keys are read, which do not matter, others refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..errors import AdapterError
from ..fields import Fields, shorten

CONFIG = "adapter_config.json"
WEAKEST, STRONGEST = 1e-6, 65504.0  # of scales: below the one nothing is learnt; the other is float16's largest number
Kind = Literal["lora", "dora", "full"]
_READ = {"fine_tune_type", "use_dora", "lora_parameters", "model", "base_model", "phi3_mlx"}
# How it was trained; mlx-lm keeps all options of its trainer here, of older versions too. Tensors tell the layers.
_FREE = {
    *("train", "test", "data", "hf_dataset", "mask_prompt", "max_seq_length", "batch_size", "iters", "seed", "config"),
    *("num_layers", "lora_layers", "optimizer", "optimizer_config", "learning_rate", "lr_schedule", "grad_checkpoint"),
    *("grad_accumulation_steps", "clear_cache_threshold", "val_batches", "test_batches", "steps_per_report"),
    *("steps_per_eval", "save_every", "adapter_path", "adapter_file", "resume_adapter_file", "report_to"),
    *("project_name", "wandb", "trust_remote_code", "prompt", "max_tokens", "temp"),
}
_PARAMETERS = {"rank", "scale", "dropout", "keys", "alpha"}


def check_config(directory: Path, config: Mapping[str, Any]) -> None:
    """AdapterError for a setting that may change the numbers and is not known here, by name."""
    parameters = _fields(directory, config).fields("lora_parameters").raw
    unknown = {key: value for key, value in config.items() if key not in _READ | _FREE}
    unknown |= {f"lora_parameters.{key}": value for key, value in parameters.items() if key not in _PARAMETERS}
    for key, value in unknown.items():
        if not is_neutral(value):
            raise AdapterError(
                f"{directory} cannot be used: {shorten(key, quote=False)} is {shorten(value)}, which is not known "
                "here; if it matters in training alone, take it out of adapter_config.json"
            )
    adapter_kind(directory, config)


def is_neutral(value: Any) -> bool:
    """Whether a setting, whatever it means, asks for nothing."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def adapter_kind(directory: Path, config: Mapping[str, Any]) -> Kind:
    """What a folder holds: low-rank changes without or with magnitudes, or whole weights. Raises AdapterError."""
    fields = _fields(directory, config)
    kind = fields.text("fine_tune_type", "lora")
    if kind not in get_args(Kind):
        fields.fail("fine_tune_type", "lora, dora or full")
    return "dora" if kind == "lora" and fields.flag("use_dora", False) else cast(Kind, kind)


def scale_in(directory: Path, config: Mapping[str, Any]) -> float:
    """What the low-rank products are multiplied by. Raises AdapterError."""
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
    """Whether `tune` made the scale of alpha by rsLoRA's rule; 0.1.0 wrote a flag of its command line as a text."""
    settings = _fields(directory, config).fields("phi3_mlx")
    return settings.raw.get("rslora") == "True" or settings.flag("rslora", False)


def _fields(directory: Path, config: Mapping[str, Any]) -> Fields:
    return Fields(config, directory / CONFIG, AdapterError)
