"""What the tests of quality, sensitivity and GPTQ share: sources, texts, and models written to disk."""

import dataclasses
import json
import math
import shutil

import mlx.core as mx
import numpy as np
import oracle
from conftest import ROOT
from mlx.utils import tree_flatten

from phi3_mlx.conversion.layout import Layout
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.conversion.sources import tensor_of
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.conversion.writer import DirectorySink
from phi3_mlx.evaluation.quality import compare
from phi3_mlx.models import parse_config
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

TRAINED = ROOT / "weights" / "tiny-8bit"


class RandomSource:
    """A source of small random weights in the memory of one tensor; `reads` counts how often each is asked for."""

    quantization = None

    def __init__(self, dtype="F32", scale=0.05, base=oracle.BASE, **changes):
        self.name, self.blocks = "random", {}
        self.raw_config = {**base, **changes}
        self.config = parse_config(self.raw_config)
        shapes = {name: a.shape for name, a in tree_flatten(oracle.make_ours(self.raw_config).parameters())}
        order = ["model.embed_tokens", "model.layers", "model.norm", "model.final_layernorm", "lm_head"]
        names = sorted(shapes, key=lambda name: next(i for i, start in enumerate(order) if name.startswith(start)))
        self.tensors = {name: tensor_of(dtype, shapes[name]) for name in names}
        self._dtype, self._scale = {"F32": mx.float32, "BF16": mx.bfloat16}[dtype], scale
        self.reads = dict.fromkeys(names, 0)

    def read(self, name):
        self.reads[name] += 1
        shape = self.tensors[name].shape
        key = mx.random.key(list(self.tensors).index(name))
        noise = mx.random.normal(shape, key=key)
        return (noise * self._scale + (len(shape) == 1)).astype(self._dtype)

    def write_extras(self, directory):
        pass

    @property
    def layer_bytes(self):
        return 4 * sum(math.prod(t.shape) for name, t in self.tensors.items() if name.startswith("model.layers.0."))

    @property
    def float_bytes(self):
        return 4 * sum(math.prod(tensor.shape) for tensor in self.tensors.values())


class Shallow:
    """The first layers of a source, which are soon fitted to a text."""

    quantization = None

    def __init__(self, source, layers):
        self.name, self.blocks, self.read, self.write_extras = source.name, {}, source.read, source.write_extras
        self.raw_config = {**source.raw_config, "num_hidden_layers": layers}
        self.config = parse_config(self.raw_config)
        left_out = tuple(f"model.layers.{i}." for i in range(layers, source.config.num_hidden_layers))
        self.tensors = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(left_out)}


def trained():
    """(source, tokenizer) of the bundled weights."""
    return open_source(TRAINED), read_tokenizer(TRAINED)


def stories(kind):
    """The children's stories of a bundled text: what the bundled model can read."""
    start, end = {"sample": ("Once upon", "Why does"), "calibration": ("Once upon", "How does")}[kind]
    text = bundled(kind)
    return text[text.index(start) : text.index(end)]


def random_ids(count, size=oracle.BASE["vocab_size"], seed=0):
    return np.random.default_rng(seed).integers(0, size, count).tolist()


def arrays_of(layout, rounder):
    """What a rounder makes of a layout, by name."""
    return {name: array for entry in layout.entries for name, array in zip(entry.stored, rounder(entry), strict=True)}


def write_model(directory, source, recipe, rounder):
    """A model directory of what `rounder` makes of the layout that `recipe` gives the source."""
    directory.mkdir()
    DirectorySink(directory).write(Layout.of(source, recipe), rounder)
    source.write_extras(directory)
    config = source.raw_config if recipe is None else {**source.raw_config, "quantization": recipe}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def small_directory(directory, dtype="BF16"):
    """A model of two narrow layers and random weights with the bundled tokenizer and chat template."""
    base = {k: v for k, v in json.loads((TRAINED / "config.json").read_text()).items() if not k.startswith("quantiz")}
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    source = RandomSource(dtype, 0.1, base, num_hidden_layers=2, **narrow)
    write_model(directory, source, None, rounded(source))
    for pattern in ("tokenizer*", "generation_config.json"):
        for file in TRAINED.glob(pattern):
            shutil.copy(file, directory)
    return directory


def divergence(reference, directory, tokenizer, text):
    """KL(reference || model in `directory`) on `text`, in nats a token."""
    return compare(reference, tokenizer, read_model(directory), tokenizer, text, window=128).kl


@Tokenizer.register
@dataclasses.dataclass
class Letters:
    """A tokenizer of one id a character."""

    add_bos_token: bool = False
    bos_token_id: int | None = 1
    shift: int = 0

    def encode(self, text):
        return [(ord(letter) + self.shift) % 150 for letter in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)
