"""llama.cpp as an oracle for GGUF files: what it makes of texts and ids, in a process of its own.

node-llama-cpp brings it prebuilt. `$PHI3_MLX_LLAMA_CPP` names the folder with its `node_modules`, by default
`.llama-cpp` in the checkout, which `make llama-cpp` fills.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("PHI3_MLX_LLAMA_CPP") or ROOT / ".llama-cpp").absolute()
MISSING = (
    ""
    if shutil.which("node") and (HOME / "node_modules" / "node-llama-cpp").is_dir()
    else "no llama.cpp here: `make llama-cpp` installs it where npm is"
)


@dataclass(frozen=True)
class Prompt:
    """Ids to read: the next token's probabilities are asked for after each (`everywhere`) or the last of them."""

    ids: Sequence[int]
    everywhere: bool = True
    greedy: int = 0


@dataclass(frozen=True)
class Answer:
    """`probabilities[i]` (positions, vocabulary) and `greedy[i]` are of prompt i."""

    texts: list[list[int]]
    plain: list[list[int]]
    probabilities: list[np.ndarray]
    greedy: list[list[int]]


class LlamaCppError(Exception):
    """llama.cpp refused a file, or died of it. The message is what it wrote."""


def ask(
    model: Path,
    *,
    texts: Sequence[str] = (),
    plain: Sequence[str] = (),
    prompts: Sequence[Prompt] = (),
    context: int = 512,
    cache: str = "F32",
    loras: Mapping[Path, float] | None = None,
    timeout: float = 600,
) -> Answer:
    """What llama.cpp makes of `texts` (control tokens recognized), `plain` ones (not), and `prompts`.

    `context` is what it is started with, which decides LongRoPE's factors. `cache`: the type of its keys and values,
    which is "F16" unless it is told. `loras`: adapters, each with its scale.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "model": str(model.absolute()),
            "context": context,
            "cache": cache,
            "loras": [{"filePath": str(path.absolute()), "scale": scale} for path, scale in (loras or {}).items()],
            "texts": list(texts),
            "plain": list(plain),
            "prompts": [{"ids": list(p.ids), "all": p.everywhere, "greedy": p.greedy} for p in prompts],
        }
        (Path(folder) / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            ["node", str(ROOT / "tests" / "llama_cpp.mjs"), folder],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PHI3_MLX_LLAMA_CPP": str(HOME)},
        )
        if done.returncode:
            raise LlamaCppError(done.stderr.strip() or f"llama.cpp ended with {done.returncode}")
        answer = json.loads((Path(folder) / "answer.json").read_text())
        rows = np.fromfile(Path(folder) / "probabilities", np.float32) if prompts else np.zeros(0, np.float32)
    rows = rows.reshape(-1, answer.get("vocabulary", 1))
    sizes = [len(prompt.ids) if prompt.everywhere else 1 for prompt in prompts]
    parts = np.split(rows, np.cumsum(sizes)[:-1]) if prompts else []
    return Answer(answer["texts"], answer["plain"], parts, answer["greedy"])
