"""A prompt cache's file: what was changed in it is refused, whether or not its digest was recomputed."""

import dataclasses
import json
import random

import mlx.core as mx
import oracle
import pytest
from oracle import CONFIGS, ORIGINAL, slim

from phi3_mlx import PromptCache
from phi3_mlx.engine.cache_file import Document, digest_of, metadata_of, read_facts
from phi3_mlx.errors import CacheError
from phi3_mlx.models.cache import KVBits, KVCache

MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in ("mini-4k", "3.5-mini")}
TOKENS = ORIGINAL - 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A cache file of each model, and a packed one."""
    folder = tmp_path_factory.mktemp("caches")
    made = {}
    for name, model in MODELS.items():
        for bits in (None, 4):
            cache = PromptCache(model, kv_bits=bits, document=Document("A text.", "Be brief.", "tiny"))
            cache.read(oracle.ids_of(TOKENS, seed=0)[0].tolist())
            made[name, bits] = folder / f"{name}-{bits}.cache"
            cache.save(made[name, bits])
    return made


def metadata(file):
    return json.loads(mx.load(str(file), format="safetensors", return_metadata=True)[1]["phi3-mlx"])


def written(path, arrays, facts):
    mx.save_safetensors(str(path), arrays, {"phi3-mlx": json.dumps(facts)})
    path.rename(path.with_suffix(".cache"))  # mlx adds a suffix of its own
    return path.with_suffix(".cache")


def edited(file, folder, **facts):
    """The file with other facts, and the digest of the old ones."""
    return written(folder / "edited.safetensors", mx.load(str(file), format="safetensors"), metadata(file) | facts)


def forged(file, folder, change=lambda arrays: None, **changes):
    """The file with other facts or arrays, and the digest that belongs to them."""
    arrays = mx.load(str(file), format="safetensors")
    change(arrays)
    facts = dataclasses.replace(read_facts(file), **changes)
    return written(folder / "forged.safetensors", arrays, json.loads(metadata_of(facts, arrays)["phi3-mlx"]))


def test_a_file_says_what_it_holds(files):
    facts = read_facts(files["3.5-mini", 4])
    assert (facts.tokens, facts.start, facts.long) == (TOKENS, 0, False)
    assert facts.bits == KVBits(4, 4, 32)
    assert facts.document == Document("A text.", "Be brief.", "tiny")
    assert facts.digest == digest_of(facts, mx.load(str(files["3.5-mini", 4]), format="safetensors"))
    assert read_facts(files["3.5-mini", None]).bits is None


OTHER = {
    "tokens": [TOKENS - 1, TOKENS + 1, 1, 0, -3, True, 5.0, "5", None, 10**6, 2**40, 10**30],
    "start": [1, TOKENS, -1, True, 0.0, None, "0", 10**30],
    "long": [True, [False], None, 0, "false"],
    "bits": [{"keys": 4, "values": 4, "group_size": 32}, {"keys": 5, "values": 4, "group_size": 32}, {}, 4, [4, 4]],
    "model": ["0" * 32, None, 7],
    "longrope": ["long", None, []],
    "dtype": ["bfloat16", "float99", None],
    "document": ["A text.", {"text": "Another.", "system": "Be brief.", "model": "tiny"}, {"text": 7}, {}, [], None],
    "digest": ["0" * 64, "", None, 7],
    "format": ["phi3-mlx prompt cache 3", "x", None, 4],
    "later": [None, 1],
}


@pytest.mark.parametrize(("fact", "value"), [(fact, value) for fact, values in OTHER.items() for value in values])
def test_a_changed_fact_is_refused(files, tmp_path, fact, value):
    with pytest.raises(CacheError, match=r"edited.cache") as caught:
        PromptCache.load(edited(files["3.5-mini", None], tmp_path, **{fact: value}), MODELS["3.5-mini"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fact", list(OTHER)[:-1])
def test_a_missing_fact_is_refused(files, tmp_path, fact):
    file = files["3.5-mini", None]
    facts = metadata(file)
    del facts[fact]
    arrays = mx.load(str(file), format="safetensors")
    with pytest.raises(CacheError, match=rf"{fact} is missing"):
        PromptCache.load(written(tmp_path / "less.safetensors", arrays, facts), MODELS["3.5-mini"])


@pytest.mark.parametrize("bits", [None, 4])
def test_a_changed_number_is_refused(files, tmp_path, bits):
    """Wherever it is: a bit of a key changes answers, and nothing else tells."""
    whole = files["3.5-mini", bits].read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "flipped.cache"
    for at in random.Random(3).sample(range(begin, len(whole)), 12):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CacheError, match="not those that were written"):
            PromptCache.load(file, MODELS["3.5-mini"])


def put(**arrays):
    return lambda stored: stored.update({name.strip("_").replace("_", "."): array for name, array in arrays.items()})


FORGED = [
    ({"tokens": TOKENS - 1}, "ids is I32"),
    ({"start": 1}, "slots from position 1 do not hold"),
    ({"bits": KVBits(4, 4, 32)}, "0.0 is F32"),
    (put(ids=mx.arange(TOKENS) + 10**6), "beyond the model's vocabulary"),
    (put(ids=mx.arange(TOKENS) - 1), "beyond the model's vocabulary"),
    (put(ids=mx.arange(TOKENS).astype(mx.float32)), "ids is F32"),
    (put(ids=mx.zeros((1, TOKENS), mx.int32)), "ids is I32"),
    (put(_0_0=mx.zeros((1, 2, 3, 4))), "0.0 is F32"),
    (put(_0_0=mx.zeros(())), "0.0 is F32"),
    (put(_1_1=mx.zeros((1, 1, 256, 8), mx.int32)), "1.1 is I32"),
    (put(_9_0=mx.zeros(1)), "9.0 is none of its arrays"),
    (lambda arrays: arrays.pop("1.1"), "1.1 is missing"),
    (lambda arrays: arrays.pop("ids"), "ids is missing"),
    (lambda arrays: arrays.update({n: a[..., :9, :] for n, a in arrays.items() if n != "ids"}), "9 slots from"),
]


@pytest.mark.parametrize(("change", "why"), FORGED)
def test_facts_and_arrays_that_contradict_each_other_are_refused(files, tmp_path, change, why):
    file = files["3.5-mini", None]
    bad = forged(file, tmp_path, **change) if isinstance(change, dict) else forged(file, tmp_path, change)
    with pytest.raises(CacheError, match=why):
        PromptCache.load(bad, MODELS["3.5-mini"])


def test_a_regime_that_the_model_does_not_have_is_refused(files, tmp_path):
    with pytest.raises(CacheError, match="LongRoPE regime is not that"):
        PromptCache.load(forged(files["mini-4k", None], tmp_path, long=True), MODELS["mini-4k"])


def test_bits_that_do_not_fit_the_model_are_refused(files, tmp_path):
    for bits in (KVBits(8, 4, 32), KVBits(4, 4, 64), None):
        with pytest.raises(CacheError, match="is damaged"):
            PromptCache.load(forged(files["3.5-mini", 4], tmp_path, bits=bits), MODELS["3.5-mini"])


def test_a_window_that_has_moved_is_kept_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    monkeypatch.setattr(KVCache, "spare", 2)
    model, file = MODELS["mini-4k"], tmp_path / "a.cache"
    window = model.config.sliding_window
    cache = PromptCache(model)
    cache.read(oracle.ids_of(3 * window, seed=0)[0].tolist())
    cache.save(file)
    facts = read_facts(file)
    assert 0 < facts.start <= facts.tokens - (window - 1)
    assert PromptCache.load(file, model).ids == cache.ids
    for start in (facts.tokens - (window - 1) + 1, 0):
        with pytest.raises(CacheError, match="do not hold what"):
            PromptCache.load(forged(file, tmp_path, start=start), model)
    cache._layers[0].trim(2 * window)  # as a run that is interrupted before it goes on
    for layer in cache._layers[1:]:
        layer.trim(2 * window)
    assert cache._layers[0].lost
    with pytest.raises(CacheError, match=r"read\(\) again"):
        cache.save(file)
