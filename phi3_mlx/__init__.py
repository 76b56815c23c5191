"""Run, quantize and fine-tune Microsoft's Phi-3 models with MLX.

from phi3_mlx import load, generate

model, tokenizer = load("tiny")
print(generate(model, tokenizer, "Tell me a story about a duck and a frog."))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import blas as _blas

__version__ = "0.1.0"

_blas.load()  # before anything imports MLX

# Every public name and the module it lives in: imported when first used, so `import phi3_mlx` costs nothing.
_PUBLIC = {
    "Chunk": "generation",
    "Conversation": "conversation",
    "Phi3Error": "errors",
    "ProgressBar": "display",
    "PromptCache": "prompt_cache",
    "batch_generate": "generation",
    "compare": "quality",
    "convert": "conversion",
    "export_peft": "tuning.peft",
    "fuse": "tuning.fuse",
    "generate": "generation",
    "import_peft": "tuning.peft",
    "load": "generation",
    "load_model": "generation",
    "load_tokenizer": "generation",
    "memory_limit": "memory",
    "stream_generate": "generation",
    "tune": "tuning",
    "unload": "generation",
}

if TYPE_CHECKING:
    from .conversation import Conversation as Conversation
    from .conversion import convert as convert
    from .display import ProgressBar as ProgressBar
    from .errors import Phi3Error as Phi3Error
    from .generation import Chunk as Chunk
    from .generation import batch_generate as batch_generate
    from .generation import generate as generate
    from .generation import load as load
    from .generation import load_model as load_model
    from .generation import load_tokenizer as load_tokenizer
    from .generation import stream_generate as stream_generate
    from .generation import unload as unload
    from .memory import memory_limit as memory_limit
    from .prompt_cache import PromptCache as PromptCache
    from .quality import compare as compare
    from .tuning import tune as tune
    from .tuning.fuse import fuse as fuse
    from .tuning.peft import export_peft as export_peft
    from .tuning.peft import import_peft as import_peft

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'phi3_mlx' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
