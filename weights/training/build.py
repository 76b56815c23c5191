"""From the trained checkpoint to the bundled model: 4 bits, with its tokenizer beside it.

python weights/training/build.py --checkpoint DIR/checkpoint --tokenizer DIR --out weights/tiny
"""

import argparse
import json
import tempfile
from pathlib import Path

import vocab

from phi3_mlx.checkpoint import load_model, save_model
from phi3_mlx.config import read_json
from phi3_mlx.quantize import quantize_model

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
    parser.add_argument("--checkpoint", type=Path, required=True)
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
    model = load_model(args.checkpoint, dtype="bfloat16")
    config = config_for_everyone(read_json(args.checkpoint / "config.json"))
    config = quantize_model(model, config, bits=args.bits, group_size=args.group_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "generation_config.json")
        path.write_text(json.dumps(generation, indent=2) + "\n")
        save_model(args.out, model, config, files=[path, *(args.tokenizer / name for name in TOKENIZER_FILES)])


if __name__ == "__main__":
    main()
