"""Run, quantize and fine-tune Microsoft's Phi-3 models with MLX.

from phi3_mlx import load, generate

model, tokenizer = load("tiny")
print(generate(model, tokenizer, "Tell me a story about a duck and a frog."))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import blas as _blas

__version__ = "0.1.0"

_blas.preload()  # before anything imports MLX

# Every public name and the module it lives in: imported when first used, so `import phi3_mlx` costs nothing.
_PUBLIC = {
    "Chunk": "generation.answers",
    "Conversation": "generation.conversation",
    "Generation": "engine.generation",
    "HarnessLM": "evaluation.lm",
    "Job": "engine.jobs",
    "KVBits": "models.cache",
    "Phi3Error": "errors",
    "Plan": "engine.plan",
    "PrefixStore": "engine.prefixes",
    "ProgressBar": "display",
    "PromptCache": "generation.prompt_cache",
    "Sampling": "engine.sampling",
    "Scheduler": "engine.scheduler",
    "Score": "generation.scoring",
    "Statistics": "engine.tokens",
    "Step": "engine.batch",
    "Token": "engine.tokens",
    "Tool": "text.tools",
    "ToolCall": "text.tool_calls",
    "batch_generate": "generation.answers",
    "batch_score": "generation.scoring",
    "compare": "evaluation.quality",
    "convert": "conversion.pipeline",
    "encode_prompt": "generation.answers",
    "evaluate": "evaluation.harness",
    "export_peft": "adapters.peft",
    "fuse": "conversion.fuse",
    "generate": "generation.answers",
    "import_peft": "adapters.peft",
    "load": "generation.loading",
    "load_model": "generation.loading",
    "load_tokenizer": "generation.loading",
    "longest_context": "engine.capacity",
    "mac_working_set": "engine.machine",
    "memory_limit": "engine.machine",
    "memory_plan": "engine.capacity",
    "resolve": "store.hub",
    "score": "generation.scoring",
    "stream_generate": "generation.answers",
    "tune": "tuning",
    "unload": "generation.loading",
}

if TYPE_CHECKING:
    from .adapters.peft import export_peft as export_peft
    from .adapters.peft import import_peft as import_peft
    from .conversion.fuse import fuse as fuse
    from .conversion.pipeline import convert as convert
    from .display import ProgressBar as ProgressBar
    from .engine.batch import Step as Step
    from .engine.capacity import longest_context as longest_context
    from .engine.capacity import memory_plan as memory_plan
    from .engine.generation import Generation as Generation
    from .engine.jobs import Job as Job
    from .engine.machine import mac_working_set as mac_working_set
    from .engine.machine import memory_limit as memory_limit
    from .engine.plan import Plan as Plan
    from .engine.prefixes import PrefixStore as PrefixStore
    from .engine.sampling import Sampling as Sampling
    from .engine.scheduler import Scheduler as Scheduler
    from .engine.tokens import Statistics as Statistics
    from .engine.tokens import Token as Token
    from .errors import Phi3Error as Phi3Error
    from .evaluation.harness import evaluate as evaluate
    from .evaluation.lm import HarnessLM as HarnessLM
    from .evaluation.quality import compare as compare
    from .generation.answers import Chunk as Chunk
    from .generation.answers import batch_generate as batch_generate
    from .generation.answers import encode_prompt as encode_prompt
    from .generation.answers import generate as generate
    from .generation.answers import stream_generate as stream_generate
    from .generation.conversation import Conversation as Conversation
    from .generation.loading import load as load
    from .generation.loading import load_model as load_model
    from .generation.loading import load_tokenizer as load_tokenizer
    from .generation.loading import unload as unload
    from .generation.prompt_cache import PromptCache as PromptCache
    from .generation.scoring import Score as Score
    from .generation.scoring import batch_score as batch_score
    from .generation.scoring import score as score
    from .models.cache import KVBits as KVBits
    from .store.hub import resolve as resolve
    from .text.tool_calls import ToolCall as ToolCall
    from .text.tools import Tool as Tool
    from .tuning import tune as tune

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'phi3_mlx' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
