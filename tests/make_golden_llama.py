"""Writes tests/golden/llama_cpp.npz: what llama.cpp made of the bundled model, for machines without it.

python tests/make_golden_llama.py, after `make llama-cpp`.
"""

import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from conftest import ROOT
from hard_texts import hard_texts

from phi3_mlx import export_gguf, load_tokenizer

GOLDEN = ROOT / "tests" / "golden" / "llama_cpp.npz"


def prompt_ids() -> list[int]:
    """A text within the bundled model's original length, with room to go on."""
    text = (ROOT / "notebooks" / "secrets.txt").read_text(encoding="utf-8")
    return load_tokenizer("tiny").encode(text)[:440]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = export_gguf("tiny", Path(folder) / "tiny.gguf", type="f32").files[0]
        prompt = llama_cpp.Prompt(prompt_ids(), greedy=64)
        answer = llama_cpp.ask(file, texts=hard_texts(), prompts=[prompt], context=512)
    best = np.sort(answer.probabilities[0], axis=-1)[:, ::-1][:, :8]
    np.savez_compressed(
        GOLDEN,
        prompt=np.array(prompt.ids, np.uint16),
        ids=np.concatenate([np.array(ids, np.uint16) for ids in answer.texts]),
        lengths=np.array([len(ids) for ids in answer.texts], np.uint16),
        greedy=np.array(answer.greedy[0], np.uint16),
        best=best.astype(np.float32),
    )


if __name__ == "__main__":
    main()
