"""The bundled model: 4 bits, with its tokenizer beside it, from trained checkpoints or from the same weights in 8 bits.

    python weights/training/build.py --checkpoint RUN/checkpoint --tokenizer RUN --corpus DIR --out weights/tiny
    python weights/training/build.py --source weights/tiny-8bit --corpus DIR --out weights/tiny --before OLD

Several checkpoints are averaged. Scales and biases are fitted to stories of the training data; the report is of
held-out ones, and says how far from the source the model OLD is.
"""

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import phi3_mlx  # noqa: F401  (before MLX, which then multiplies with a fast BLAS on a CPU)

# isort: split
import data
import mlx.core as mx
import vocab

from phi3_mlx import compare, convert, load
from phi3_mlx.config import read_json

CALIBRATION = 400  # stories
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def config_for_everyone(raw: dict) -> dict:
    """The config in the spelling of the released Phi-3 models, which older readers and mlx-lm understand too."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope["rope_theta"]
    raw["rope_scaling"] = {
        "type": "longrope",
        "short_factor": rope["short_factor"],
        "long_factor": rope["long_factor"],
    }
    raw["torch_dtype"] = raw.pop("dtype", "bfloat16")
    raw["use_cache"] = True
    return raw


def mean_of(checkpoints: list[Path], tokenizer: Path, folder: Path) -> None:
    """Write the mean of checkpoints in bfloat16, as a model directory."""
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [vocab.ENDOFTEXT, vocab.ASSISTANT, vocab.END],
        "pad_token_id": vocab.ENDOFTEXT,
    }
    folder.mkdir()
    several = [mx.load(str(path / "model.safetensors")) for path in checkpoints]
    mean = {
        name: (sum(one[name].astype(mx.float32) for one in several) / len(several)).astype(mx.bfloat16)
        for name in several[0]
    }
    mx.save_safetensors(str(folder / "model.safetensors"), mean, {"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    config = config_for_everyone(read_json(checkpoints[0] / "config.json"))
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def before_and_now(before: Path, text: str, source: str, now: Path) -> str:
    """A section of the report: how far two models are from the source on all of the text."""
    lines = ["## Beside the model before", ""]
    lines += [f"What was read above is the beginning of the held-out stories. On all of them, from `{source}`:", ""]
    lines += ["| model | KL, nats a token | same likeliest token | perplexity |", "|---|--:|--:|--:|"]
    original = load(source)
    for name, path in (("before", before), ("this model", now)):
        found = compare(*original, *load(path), text)
        lines += [f"| {name} | {found.kl:.4f} | {found.top1:.1%} | {found.b.perplexity:.3f} |"]
    lines += [f"| its source | 0 | 100.0% | {found.a.perplexity:.3f} |"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--checkpoint", type=Path, nargs="+")
    of.add_argument("--source", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    args = parser.parse_args()
    if args.checkpoint and not args.tokenizer:
        parser.error("--checkpoint needs --tokenizer, the folder of its tokenizer")
    train, held_out = data.split_stories(args.corpus)
    text = "\n\n".join(held_out)
    with tempfile.TemporaryDirectory() as temporary:
        source = args.source or Path(temporary, "the-trained-checkpoint")
        if args.checkpoint:
            mean_of(args.checkpoint, args.tokenizer, source)
        convert(
            source,
            args.out,
            bits=args.bits,
            group_size=args.group_size,
            dtype="bfloat16",
            method="distill",
            calibration="\n\n".join(train[:CALIBRATION]),
            text=text,
            report=True,
            force=True,
            measure=partial(before_and_now, args.before, text) if args.before else None,
        )


if __name__ == "__main__":
    main()
