"""Change the package in small ways, one at a time, and see whether the tests notice.

    python tests/mutate.py MODULE... [--mutants 40] [--seed 0] [-o survivors.json]

MODULE is a name of `TESTS`: which tests guard it. A mutant is one changed operator, constant, condition, call or
statement, drawn at random, in a copy of the tree; its tests run in a process of their own, because MLX does not survive
a fork. Those that no test notices are printed, with their line, and written to the file. A mutant may survive because
it computes the same: such changes are listed in `tests/survivors.md`, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Module -> the test files that must notice, the most telling first.
TESTS = {
    "engine/batch": ["test_jobs", "test_engine", "test_generation", "test_lookup", "test_traffic"],
    "conversion/calibrating": ["test_gptq_steps", "test_gptq", "test_tuning_adapters"],
    "conversion/choosing": ["test_gguf", "test_convert"],
    "conversion/endtoend": ["test_endtoend", "test_distill"],
    "conversion/fitted_text": ["test_own_text"],
    "conversion/fitted_steps": ["test_unfinished"],
    "conversion/gptq": ["test_gptq", "test_gptq_steps"],
    "conversion/measured": ["test_sensitivity"],
    "conversion/layout": ["test_layout", "test_split", "test_convert"],
    "conversion/own_text": ["test_own_text", "test_distill"],
    "conversion/sinks": ["test_terminal", "test_ways", "test_convert"],
    "conversion/rounding": ["test_gptq", "test_quality", "test_convert"],
    "conversion/refit": ["test_gptq_steps", "test_gptq"],
    "conversion/targets": ["test_gptq_steps", "test_gptq"],
    "conversion/teacher": ["test_distill"],
    "conversion/trained": ["test_endtoend", "test_distill"],
    "conversion/unfinished": ["test_distill", "test_own_text", "test_unfinished"],
    "conversion/export": ["test_export", "test_modelfile"],
    "conversion/export_adapter": ["test_gguf_adapter"],
    "conversion/gguf/carrying": ["test_export"],
    "conversion/gguf/kblocks": ["test_kquants"],
    "conversion/gguf/kquants": ["test_kquants"],
    "conversion/gguf/measurement": ["test_export", "test_publish"],
    "conversion/gguf/model": ["test_export"],
    "conversion/gguf/naming": ["test_export_tokenizer"],
    "conversion/gguf/sink": ["test_export"],
    "conversion/gguf/source": ["test_gguf_experts", "test_gguf"],
    "conversion/gguf/types": ["test_kquants"],
    "conversion/gguf/vocabulary": ["test_export_tokenizer"],
    "conversion/modelfile": ["test_modelfile", "test_gguf_adapter"],
    "data/attempts": ["test_data_synthesis"],
    "data/classifier": ["test_data_classifier"],
    "data/filter_training": ["test_data_classifier"],
    "data/near": ["test_data_cleaning"],
    "data/rating": ["test_data_score"],
    "data/score_journal": ["test_data_score"],
    "data/shards": ["test_data_shards"],
    "data/verifying": ["test_data_synthesis"],
    "display": ["test_display"],
    "engine/choices": ["test_choices"],
    "engine/draft_model": ["test_draft_model"],
    "engine/drafts": ["test_draft_model", "test_jobs", "test_lookup", "test_engine", "test_generation"],
    "engine/fitting": ["test_fitting", "test_traffic", "test_memory_first"],
    "engine/background": ["test_prefix_files"],
    "engine/cache_file": ["test_cache_file", "test_prefix_files", "test_prompt_cache"],
    "engine/identity": ["test_prompt_cache", "test_prefix_identity", "test_prefixes"],
    "engine/prefixes": ["test_prefixes", "test_prefix_files"],
    "engine/prefix_files": ["test_prefix_files", "test_prefix_identity"],
    "engine/prefix_tree": ["test_prefixes", "test_prefix_files"],
    "engine/prefill": ["test_engine", "test_generation", "test_memory"],
    "models/hooks": ["test_inside_positions", "test_inside_corners", "test_inside_edits", "test_inside"],
    "cli/steering": ["test_steering"],
    "conversion/control_vector": ["test_steering_files", "test_steering_llama", "test_steering"],
    "interpret/attribution": ["test_circuits"],
    "interpret/directions": ["test_circuits"],
    "interpret/edits": ["test_inside_shown", "test_inside_corners", "test_inside_edits"],
    "interpret/grids": ["test_circuits"],
    "interpret/head_scores": ["test_circuits"],
    "interpret/keeping": ["test_inside_positions", "test_inside_corners", "test_inside", "test_inside_edits"],
    "interpret/lens": ["test_circuits"],
    "interpret/paths": ["test_circuits"],
    "interpret/probing": ["test_steering"],
    "interpret/selecting": ["test_inside_positions", "test_inside_corners", "test_inside", "test_inside_edits"],
    "interpret/table": ["test_inside_shown", "test_inside_corners", "test_inside_memory", "test_inside"],
    "interpret/tracing": ["test_inside_positions", "test_inside_memory", "test_inside_corners", "test_inside_edits"],
    "interpret/vectors": ["test_steering"],
    "engine/rows": ["test_jobs", "test_traffic", "test_engine", "test_generation"],
    "engine/processors": ["test_forced", "test_grammar", "test_jobs"],
    "engine/payoff": ["test_lookup", "test_draft_model"],
    "engine/passes": ["test_forced", "test_jobs", "test_traffic", "test_engine", "test_lookup"],
    "engine/row_cache": ["test_fitting", "test_jobs", "test_draft_model"],
    "engine/scheduler": ["test_jobs", "test_traffic", "test_requests", "test_fitting", "test_engine"],
    "engine/sampler": ["test_jobs", "test_engine", "test_traffic"],
    "engine/sampling": ["test_request", "test_engine"],
    "evaluation/tasks": ["test_eval_tasks"],
    "generation/request": ["test_request"],
    "models/attention": ["test_attention", "test_blocksparse", "test_model"],
    "models/cache": ["test_cache", "test_model", "test_prompt_cache"],
    "models/shared_cache": ["test_slots"],
    "models/slots": ["test_slots", "test_requests"],
    "models/step": ["test_step", "test_slots"],
    "models/workspace": ["test_workspace", "test_plan"],
    "models/rope": ["test_phi_moe", "test_model"],
    "text/grammar": ["test_grammar", "test_tool_calls", "test_schemas"],
    "text/schema_limits": ["test_schema_limits", "test_schemas"],
    "text/schemas": ["test_grammar", "test_schemas"],
    "text/stops": ["test_stops"],
    "text/tool_calls": ["test_tool_calls"],
    "text/chat": ["test_chat_keys", "test_chat", "test_tuning_data"],
    "data/tokens": ["test_data_shards", "test_pretraining"],
    "pretraining/corpus": ["test_pretraining"],
    "pretraining/dryrun": ["test_pretraining_dryrun"],
    "pretraining/mixture": ["test_pretraining"],
    "pretraining/next_token": ["test_pretraining"],
    "pretraining/optimizer": ["test_pretraining"],
    "pretraining/rows": ["test_pretraining"],
    "pretraining/run": ["test_pretraining", "test_pretraining_dryrun"],
    "pretraining/settings": ["test_pretraining_dryrun", "test_pretraining"],
    "pretraining/shards": ["test_pretraining", "test_data_shards"],
    "pretraining/weights": ["test_pretraining"],
    "store/companions": ["test_links", "test_pretraining"],
    "tuning/batches": ["test_tuning_dropout", "test_tuning_gradients", "test_tuning_plan"],
    "tuning/checks": ["test_tuning_run", "test_tuning_settings", "test_hostile_runs"],
    "tuning/course": ["test_pretraining_dryrun", "test_tuning_gradients", "test_tuning_run"],
    "tuning/execution": ["test_tuning_folder", "test_tuning_run", "test_pretraining"],
    "tuning/optimizers": ["test_tuning_gradients", "test_pretraining"],
    "tuning/run_settings": ["test_tuning_settings", "test_pretraining_dryrun"],
    "tuning/loss": ["test_tuning_precision", "test_tuning_gradients"],
    "tuning/stored": ["test_tuning_run", "test_tuning_cli", "test_tuning_folder"],
    "tuning/trainer": ["test_tuning_dropout", "test_tuning_gradients", "test_tuning_folder", "test_tuning_run"],
    "option": ["test_option", "test_request", "test_tuning_settings"],
    "cli/declare": ["test_option", "test_request"],
    "conversion/options": ["test_option", "test_arguments", "test_convert"],
    "values": ["test_values", "test_arguments"],
    "tuning/settings": ["test_tuning_settings"],
    "tuning/onward": ["test_tuning_onward"],
    "tuning/checkpoints": ["test_hostile_runs", "test_tuning_run", "test_tuning_folder"],
    "tuning/folder": ["test_tuning_folder", "test_tuning_run"],
    "tuning/log": ["test_tuning_folder", "test_tuning_run"],
    "tuning/signals": ["test_tuning_folder"],
    "store/atomic": ["test_atomic", "test_convert", "test_tuning_folder"],
}
_SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SECONDS = 300  # a mutant may loop forever, which the tests then have noticed


def mutants(source: str) -> list[tuple[ast.AST, ast.AST]]:
    """Pairs of a node of `source` and what may stand in its place."""
    found: list[tuple[ast.AST, ast.AST]] = []
    for node in _walk(ast.parse(source)):
        found += [(node, other) for other in _variants(node)]
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that do something: no docstrings, annotations, error messages or imports for type checkers."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, (ast.JoinedStr, ast.Raise)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            ):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.keyword) and child.arg == "axis":  # the last one is mostly the second as well
                continue
            yield child
            yield from _walk(child)


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    changed = copy.deepcopy(node)
    if isinstance(changed, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(changed.op) in _SWAPS:
        changed.op = _SWAPS[type(changed.op)]()  # type: ignore[assignment]
        yield changed
    elif isinstance(changed, ast.Compare) and len(changed.ops) == 1:
        changed.ops = [_SWAPS[type(changed.ops[0])]()]  # type: ignore[list-item]
        yield changed
    elif isinstance(changed, ast.UnaryOp) and isinstance(changed.op, (ast.Not, ast.USub)):
        yield changed.operand
    elif isinstance(changed, ast.Constant) and isinstance(changed.value, (bool, int, float)):
        value = changed.value
        changed.value = not value if isinstance(value, bool) else value * 2 if value % 1 else value + 1
        yield changed
    elif isinstance(changed, ast.Call) and isinstance(changed.func, ast.Name) and changed.func.id in _NAMES:
        changed.func.id = _NAMES[changed.func.id]
        yield changed
    elif isinstance(changed, (ast.If, ast.While, ast.IfExp)):
        yield ast.UnaryOp(ast.Not(), changed.test)  # in place of the condition
    elif isinstance(changed, ast.Break):
        yield ast.Continue()
    elif isinstance(changed, ast.Continue):
        yield ast.Break()
    if isinstance(node, (ast.AugAssign, ast.Delete)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


def apply(source: str, node: ast.AST, other: ast.AST) -> str:
    """`source` with `other` where `node` is."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        node = node.test
    lines = source.encode().splitlines(keepends=True)  # columns count bytes
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    text = ast.unparse(ast.fix_missing_locations(other))
    new = text if isinstance(other, ast.stmt) else f"({text})"
    tail = lines[last][node.end_col_offset :]  # type: ignore[attr-defined]
    lines[first : last + 1] = [lines[first][: node.col_offset] + new.encode() + tail]  # type: ignore[attr-defined]
    return b"".join(lines).decode()


def noticed(tree: Path, files: list[str]) -> str | None:
    """What the first test said that failed, None if none did."""
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    for file in files:
        try:
            done = subprocess.run(
                [*command, f"tests/{file}.py"],
                cwd=tree,
                env=environment,
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{file} took more than {_SECONDS} seconds"
        if done.returncode:
            return done.stdout.decode()[-2000:]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=TESTS, metavar="MODULE")
    parser.add_argument("--mutants", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    survivors = []
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "site", "dist"))
        for module in given.modules:
            file = tree / "phi3_mlx" / f"{module}.py"
            source, started = file.read_text(), time.monotonic()
            if said := noticed(tree, TESTS[module]):
                sys.exit(f"the tests of {module} fail without a mutant:\n{said}")
            found = mutants(source)
            drawn = random.Random(f"{given.seed} {module}").sample(found, min(given.mutants, len(found)))
            alive = 0
            for node, other in drawn:
                mutant = apply(source, node, other)
                compile(mutant, str(file), "exec")
                file.write_text(mutant)
                if noticed(tree, TESTS[module]) is None:
                    alive += 1
                    lines = list(difflib.unified_diff(source.splitlines(), mutant.splitlines(), "", "", "", "", 0))[2:]
                    survivors.append({"module": module, "change": lines})
                    print("\n".join([f"SURVIVED {module}", *lines]), flush=True)
            file.write_text(source)
            print(f"{module}: {alive} of {len(drawn)} survived, {time.monotonic() - started:.0f} s", flush=True)
    if given.output:
        given.output.write_text(json.dumps({"seed": given.seed, "survivors": survivors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
