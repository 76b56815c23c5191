"""Writes tests/golden/transformers.npz: what transformers computes for the models of oracle.py.

    python tests/make_golden.py

Run it when oracle.py's models change. Where torch is missing, the tests compare with these arrays instead.
"""

from pathlib import Path

import numpy as np
import oracle

GOLDEN = Path(__file__).resolve().parent / "golden" / "transformers.npz"
# One short, the window, and the original length: one less, exactly, one more; then far beyond both.
LENGTHS = (
    5,
    oracle.WINDOW - 1,
    oracle.WINDOW,
    oracle.WINDOW + 1,
    oracle.ORIGINAL - 1,
    oracle.ORIGINAL,
    oracle.ORIGINAL + 1,
    150,
)
PROMPT = 14  # tokens before a generation: it crosses the window and the original length
STEPS = 64


def main() -> None:
    arrays = {}
    for name, raw in oracle.CONFIGS.items():
        theirs = oracle.make_torch(raw, oracle.make_ours(raw))
        for length in LENGTHS:
            # The last position is the one that generates; every position feeds it.
            arrays[f"{name}/{length}"] = oracle.torch_logits(theirs, oracle.ids_of(length))[0, -1]
        tokens = oracle.torch_generate(theirs, oracle.ids_of(PROMPT)[0], STEPS)
        arrays[f"{name}/tokens"] = np.array(tokens, dtype=np.int32)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
