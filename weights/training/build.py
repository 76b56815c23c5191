"""From the trained checkpoint to the bundled model: 4 bits, with its tokenizer beside it.

    python weights/training/build.py --checkpoint RUN/checkpoint --tokenizer RUN --corpus DIR --out weights/tiny

Several checkpoints are averaged. GPTQ reads stories of the training data; the report, held-out ones.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import phi3_mlx  # noqa: F401  (before MLX, which then multiplies with a fast BLAS on a CPU)

# isort: split
import data
import mlx.core as mx
import vocab

from phi3_mlx import convert
from phi3_mlx.config import read_json
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.report import write_report

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, nargs="+")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    args = parser.parse_args()
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [vocab.ENDOFTEXT, vocab.ASSISTANT, vocab.END],
        "pad_token_id": vocab.ENDOFTEXT,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "the-trained-checkpoint")
        folder.mkdir()
        several = [mx.load(str(path / "model.safetensors")) for path in args.checkpoint]
        mean = {
            name: (sum(one[name].astype(mx.float32) for one in several) / len(several)).astype(mx.bfloat16)
            for name in several[0]
        }
        mx.save_safetensors(str(folder / "model.safetensors"), mean, {"format": "pt"})
        for name in TOKENIZER_FILES:
            shutil.copy(args.tokenizer / name, folder)
        config = config_for_everyone(read_json(args.checkpoint[0] / "config.json"))
        Path(folder, "config.json").write_text(json.dumps(config))
        Path(folder, "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        train, held_out = data.split_stories(args.corpus)
        convert(
            folder,
            args.out,
            bits=args.bits,
            group_size=args.group_size,
            dtype="bfloat16",
            method="gptq",
            calibration="\n\n".join(train[:CALIBRATION]),
            report=False,
            force=True,
        )
        write_report(args.out, open_source(folder), text="\n\n".join(held_out), text_name="the held-out stories")


if __name__ == "__main__":
    main()
