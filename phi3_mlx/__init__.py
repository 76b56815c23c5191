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
    "AnswerText": "generation.chunks",
    "Attribution": "interpret.attribution",
    "Chunk": "generation.chunks",
    "Conversation": "generation.conversation",
    "Generation": "engine.generation",
    "Edit": "interpret.edits",
    "HarnessLM": "evaluation.lm",
    "HeadScores": "interpret.head_scores",
    "Inside": "interpret.keeping",
    "Job": "engine.jobs",
    "KVBits": "models.cache",
    "Keep": "interpret.keeping",
    "Lens": "interpret.lens",
    "PatchGrid": "interpret.grids",
    "Phi3Error": "errors",
    "Plan": "engine.plan",
    "PrefixStore": "engine.prefixes",
    "Probe": "interpret.probing",
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
    "activations": "interpret.vectors",
    "attribute": "interpret.attribution",
    "batch_generate": "generation.answers",
    "batch_score": "generation.scoring",
    "change": "interpret.edits",
    "colour_tokens": "interpret.coloured",
    "compare": "evaluation.quality",
    "convert": "conversion.pipeline",
    "data_stats": "data.statistics",
    "decontaminate_data": "data.contamination",
    "dedupe_data": "data.duplicates",
    "draw_attention": "interpret.pictures",
    "draw_grid": "interpret.pictures",
    "encode_prompt": "generation.answers",
    "evaluate": "evaluation.harness",
    "export_adapter": "conversion.export_adapter",
    "export_gguf": "conversion.export",
    "export_peft": "adapters.peft",
    "filter_data": "data.filtering",
    "fuse": "conversion.fuse",
    "generate": "generation.answers",
    "import_peft": "adapters.peft",
    "inspect": "interpret.tracing",
    "linear_probe": "interpret.probing",
    "load": "generation.loading",
    "load_model": "generation.loading",
    "load_steering": "conversion.control_vector",
    "load_tokenizer": "generation.loading",
    "logit_difference": "interpret.side_by_side",
    "logit_lens": "interpret.lens",
    "longest_context": "engine.capacity",
    "mac_working_set": "engine.machine",
    "measure_edits": "interpret.side_by_side",
    "memory_limit": "engine.machine",
    "memory_plan": "engine.capacity",
    "mix_data": "data.sharing",
    "mt_bench": "evaluation.multiturn",
    "patch": "interpret.edits",
    "patch_heads": "interpret.grids",
    "patch_paths": "interpret.paths",
    "patch_positions": "interpret.grids",
    "places": "interpret.table",
    "pretrain": "pretraining",
    "publish": "publishing.upload",
    "resolve": "store.hub",
    "ruler": "evaluation.retrieval",
    "save_steering": "conversion.control_vector",
    "score": "generation.scoring",
    "score_data": "data.rating",
    "score_heads": "interpret.head_scores",
    "split_data": "data.sharing",
    "steer": "interpret.edits",
    "steering_vectors": "interpret.vectors",
    "stream_generate": "generation.answers",
    "switch_off": "interpret.edits",
    "synthesize_data": "data.synthesis",
    "token_texts": "interpret.coloured",
    "tokenize_data": "data.tokens",
    "trace": "interpret.tracing",
    "train_filter": "data.filter_training",
    "tune": "tuning",
    "unload": "generation.loading",
}

if TYPE_CHECKING:
    from .adapters.peft import export_peft as export_peft
    from .adapters.peft import import_peft as import_peft
    from .conversion.control_vector import load_steering as load_steering
    from .conversion.control_vector import save_steering as save_steering
    from .conversion.export import export_gguf as export_gguf
    from .conversion.export_adapter import export_adapter as export_adapter
    from .conversion.fuse import fuse as fuse
    from .conversion.pipeline import convert as convert
    from .data.contamination import decontaminate_data as decontaminate_data
    from .data.duplicates import dedupe_data as dedupe_data
    from .data.filter_training import train_filter as train_filter
    from .data.filtering import filter_data as filter_data
    from .data.rating import score_data as score_data
    from .data.sharing import mix_data as mix_data
    from .data.sharing import split_data as split_data
    from .data.statistics import data_stats as data_stats
    from .data.synthesis import synthesize_data as synthesize_data
    from .data.tokens import tokenize_data as tokenize_data
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
    from .evaluation.multiturn import mt_bench as mt_bench
    from .evaluation.quality import compare as compare
    from .evaluation.retrieval import ruler as ruler
    from .generation.answers import batch_generate as batch_generate
    from .generation.answers import encode_prompt as encode_prompt
    from .generation.answers import generate as generate
    from .generation.answers import stream_generate as stream_generate
    from .generation.chunks import AnswerText as AnswerText
    from .generation.chunks import Chunk as Chunk
    from .generation.conversation import Conversation as Conversation
    from .generation.loading import load as load
    from .generation.loading import load_model as load_model
    from .generation.loading import load_tokenizer as load_tokenizer
    from .generation.loading import unload as unload
    from .generation.prompt_cache import PromptCache as PromptCache
    from .generation.scoring import Score as Score
    from .generation.scoring import batch_score as batch_score
    from .generation.scoring import score as score
    from .interpret.attribution import Attribution as Attribution
    from .interpret.attribution import attribute as attribute
    from .interpret.coloured import colour_tokens as colour_tokens
    from .interpret.coloured import token_texts as token_texts
    from .interpret.edits import Edit as Edit
    from .interpret.edits import change as change
    from .interpret.edits import patch as patch
    from .interpret.edits import steer as steer
    from .interpret.edits import switch_off as switch_off
    from .interpret.grids import PatchGrid as PatchGrid
    from .interpret.grids import patch_heads as patch_heads
    from .interpret.grids import patch_positions as patch_positions
    from .interpret.head_scores import HeadScores as HeadScores
    from .interpret.head_scores import score_heads as score_heads
    from .interpret.keeping import Inside as Inside
    from .interpret.keeping import Keep as Keep
    from .interpret.lens import Lens as Lens
    from .interpret.lens import logit_lens as logit_lens
    from .interpret.paths import patch_paths as patch_paths
    from .interpret.pictures import draw_attention as draw_attention
    from .interpret.pictures import draw_grid as draw_grid
    from .interpret.probing import Probe as Probe
    from .interpret.probing import linear_probe as linear_probe
    from .interpret.side_by_side import logit_difference as logit_difference
    from .interpret.side_by_side import measure_edits as measure_edits
    from .interpret.table import places as places
    from .interpret.tracing import inspect as inspect
    from .interpret.tracing import trace as trace
    from .interpret.vectors import activations as activations
    from .interpret.vectors import steering_vectors as steering_vectors
    from .models.cache import KVBits as KVBits
    from .pretraining import pretrain as pretrain
    from .publishing.upload import publish as publish
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
