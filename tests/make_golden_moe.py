"""Writes tests/golden/phimoe.npz: what transformers computes for the models of moe_models.py.

    python tests/make_golden_moe.py

Run it when these change. Where torch is missing, the tests compare with these arrays instead.
"""

from pathlib import Path

import moe_models
import numpy as np
import oracle

GOLDEN = Path(__file__).resolve().parent / "golden" / "phimoe.npz"
LENGTHS = (5, oracle.ORIGINAL - 1, oracle.ORIGINAL, oracle.ORIGINAL + 1, 100)
PROMPT, STEPS = 36, 32  # tokens before a generation that crosses the original length, and of it


def main() -> None:
    arrays = {}
    for name, raw in moe_models.CONFIGS.items():
        logits = moe_models.reference(raw, moe_models.random_weights(raw))
        for length in LENGTHS:
            arrays[f"{name}/{length}"] = logits(oracle.ids_of(length)[0])[-1]
        tokens = oracle.ids_of(PROMPT)[0].tolist()
        for _ in range(STEPS):
            tokens.append(int(logits(np.array(tokens))[-1].argmax()))
        arrays[f"{name}/tokens"] = np.array(tokens[PROMPT:], dtype=np.int32)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
