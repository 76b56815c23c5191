"""A hit is exact or it is no hit, whatever was done to the model, its adapters, the files and the folder before."""

import itertools
import tempfile
from pathlib import Path

import mlx.core as mx
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CONFIGS, ORIGINAL, slim
from test_prefixes import answers, ids_of

from phi3_mlx import PrefixStore
from phi3_mlx.adapters.lora import AdaptedLinear, Adapter
from phi3_mlx.engine import prefix_files
from phi3_mlx.models.cache import KVBits

SHORT, LONG = ids_of(ORIGINAL - 12, 0), ids_of(ORIGINAL + 40, 1)
OTHER_CONFIGS = {
    "window": {"sliding_window": 30},
    "window, wider": {"sliding_window": 31},
    "rotation": {"rope_theta": 9999.0},
    "norm": {"rms_norm_eps": 1e-3},
}


class Subject:
    """A model that is changed in many ways; `state` tells apart in which it was, and knows nothing of the store."""

    def __init__(self):
        self.versions = itertools.count(1)
        self.state = {"weights": 0, "adapter": None, "longrope": "auto", "bits": None, "config": None}
        self.model = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
        self.bits = None

    def projection(self):
        return self.model.model.layers[0].self_attn

    def change(self, how):
        getattr(self, how.split(":")[0])(*how.split(":")[1:])

    def nothing(self):
        pass

    def other_weights(self):
        self.state |= {"weights": (seed := next(self.versions)), "adapter": None, "longrope": "auto", "config": None}
        self.model = oracle.make_ours(slim(CONFIGS["3.5-mini"]), seed=seed + 10)

    def scale_a_weight(self):
        layer = self.model.model.layers[0].mlp.down_proj
        layer.weight = layer.weight * 1.5
        self.state["weights"] = (self.state["weights"], "scaled", next(self.versions))

    def write_into_a_weight(self):
        weight = self.model.model.layers[1].mlp.down_proj.weight
        weight[0] = weight[0] + 0.5
        self.state["weights"] = (self.state["weights"], "written", next(self.versions))

    def load_an_adapter(self):
        attention, number = self.projection(), next(self.versions)
        plain = attention.o_proj
        if isinstance(plain, AdaptedLinear):
            plain = plain.linear
        outputs, inputs = plain.weight.shape
        a = mx.random.normal((inputs, 4), key=mx.random.key(number))
        attention.o_proj = AdaptedLinear(plain, {"mine": Adapter(a, mx.ones((4, outputs)), 0.5)})
        attention.o_proj.use({"mine": 1.0})
        self.state["adapter"] = (number, 1.0)

    def weigh_the_adapter(self, weight):
        layer = self.projection().o_proj
        if isinstance(layer, AdaptedLinear):
            layer.use({"mine": float(weight)} if float(weight) else {})
            self.state["adapter"] = (self.state["adapter"][0], float(weight))

    def longrope(self, rule):
        self.model.model.longrope = self.state["longrope"] = rule

    def pack(self, bits):
        self.bits = KVBits(int(bits), int(bits)) if bits != "0" else None
        self.state["bits"] = self.bits

    def config(self, name):
        """A twin with the same weights and another config."""
        raw = slim(CONFIGS["3.5-mini"]) | OTHER_CONFIGS[name]
        self.model = oracle.make_ours(raw)
        self.state |= {"weights": 0, "adapter": None, "longrope": "auto", "config": name}

    def key(self, text):
        return repr((sorted(self.state.items()), text is LONG, self.model.model.is_long(len(text) + 2)))


CHANGES = (
    ["nothing", "other_weights", "scale_a_weight", "write_into_a_weight", "load_an_adapter"]
    + [f"weigh_the_adapter:{weight}" for weight in (0, 0.5, 1)]
    + [f"longrope:{rule}" for rule in ("auto", "short", "long")]
    + [f"pack:{bits}" for bits in (0, 4, 8)]
    + [f"config:{name}" for name in OTHER_CONFIGS]
)


@pytest.fixture(autouse=True, scope="module")
def short_texts_have_files_too():
    patch = pytest.MonkeyPatch()
    patch.setattr(prefix_files, "_READ_AT_LEAST", 16)
    yield
    patch.undo()


@settings(max_examples=12, deadline=None)
@given(changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=6), files=st.booleans())
def test_whatever_changes_a_hit_is_exact_or_it_is_no_hit(changes, files):
    """Asked of a store that stays, or each time of a new one on the same folder, as another process would be."""
    with tempfile.TemporaryDirectory() as folder:
        subject, seen, stays = Subject(), set(), PrefixStore("1GB")
        for i, how in enumerate(["nothing", *changes]):
            subject.change(how)
            for text in (SHORT, LONG):
                prompt = [*text, 91, 92 + i % 3]
                said, read = answers(
                    subject.model,
                    [prompt],
                    PrefixStore("1GB", directory=folder) if files else stays,
                    n=3,
                    bits=subject.bits,
                )
                assert said == answers(subject.model, [prompt], n=3, bits=subject.bits)[0]
                if subject.key(text) not in seen:
                    assert read == len(prompt)
                elif subject.state["config"] is None:
                    assert read <= 2
                seen.add(subject.key(text))


@settings(max_examples=12, deadline=None)
@given(
    damages=st.lists(
        st.tuples(st.sampled_from(["flip", "cut", "lengthen", "older version"]), st.floats(0, 1, exclude_max=True)),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_damaged_a_hit_is_exact_or_it_is_no_hit(damages):
    model = MODEL
    with tempfile.TemporaryDirectory() as folder:
        answers(model, [LONG], PrefixStore("1GB", directory=folder), n=1)
        for i, (damage, place) in enumerate(damages):
            for file in Path(folder).glob("*.cache"):
                file.write_bytes(damaged(file.read_bytes(), damage, place))
            prompt = [*LONG, 91 + i]
            said, _ = answers(model, [prompt], PrefixStore("1GB", directory=folder), n=3)
            assert said == expected(prompt[-1])


def damaged(content, damage, place):
    at = int(place * len(content))
    if damage == "flip":
        return content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
    if damage == "cut":
        return content[:at]
    if damage == "lengthen":
        return content + content[at : at + 100]
    return content.replace(b"phi3-mlx prompt cache 4", b"phi3-mlx prompt cache 3")


MODEL = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
_EXPECTED = {}


def expected(last):
    if last not in _EXPECTED:
        _EXPECTED[last] = answers(MODEL, [[*LONG, last]], n=3)[0]
    return _EXPECTED[last]
