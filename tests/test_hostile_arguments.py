"""What is given to the package's functions and is of no use to them: one line says what it is and what was expected."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from phi3_mlx import (
    Conversation,
    Phi3Error,
    PromptCache,
    batch_generate,
    batch_score,
    compare,
    convert,
    dedupe_data,
    evaluate,
    export_gguf,
    fuse,
    generate,
    import_peft,
    load,
    load_model,
    load_steering,
    load_tokenizer,
    memory_limit,
    score,
    stream_generate,
    tune,
    unload,
)
from phi3_mlx.adapters.folder import trained_on

MODEL, TOKENIZER = load("tiny")
USER = {"role": "user", "content": "x"}
RING: list = []
RING.append(RING)
DEEP: list = []
for _ in range(3000):
    DEEP = [DEEP]

# Nothing of these is a prompt, a model, a name, a path or token ids.
RUBBISH = [
    None,
    True,
    -1,
    10**30,
    10**5000,
    1.5,
    float("nan"),
    "\ud800",
    b"x",
    bytearray(b"x"),
    memoryview(b"x"),
    [[]],
    [None],
    [True],
    [1.5],
    [-1],
    [10**9],
    [10**30],
    ["x"],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": "\ud800"}],
    [{"role": ["user"], "content": "x"}],
    [USER, 5],
    [5, USER],
    USER,
    {},
    {1, 2},
    frozenset([1]),
    [1, 2, [3]],
    RING,
    DEEP,
    np.array([1.5]),
    np.array([[1, 2]]),
    np.array(5),
    [np.float32(2)],
    [np.bool_(True)],
    mx.array([[1, 2]]),
    mx.array(3),
    object(),
    [object()],
    1 + 2j,
    ValueError("x"),
    type,
]


def prompts(value):
    return generate(MODEL, TOKENIZER, value, max_tokens=1)


CALLS = {
    "generate.prompt": prompts,
    "generate.raw prompt": lambda value: generate(MODEL, TOKENIZER, value, max_tokens=1, raw=True),
    "generate.model": lambda value: generate(value, TOKENIZER, "x", max_tokens=1),
    "generate.tokenizer": lambda value: generate(MODEL, value, "x", max_tokens=1),
    "generate.temperature": lambda value: generate(MODEL, TOKENIZER, "x", max_tokens=1, temperature=[value]),
    "generate.seed": lambda value: generate(MODEL, TOKENIZER, "x", max_tokens=1, seed=[value]),
    "generate.stop": lambda value: generate(MODEL, TOKENIZER, "x", max_tokens=1, stop=[[value]]),
    "generate.kv_bits": lambda value: generate(MODEL, TOKENIZER, "x", max_tokens=1, kv_bits=[value]),
    "generate.prompt_cache": lambda value: generate(MODEL, TOKENIZER, "x", max_tokens=1, prompt_cache=[value]),
    "stream_generate.on_prefill": lambda value: stream_generate(MODEL, TOKENIZER, "x", on_prefill=[value]),
    "batch_generate.prompts": lambda value: batch_generate(MODEL, TOKENIZER, [value], max_tokens=1),
    "score.prompt": lambda value: score(MODEL, TOKENIZER, value, ["x"]),
    "score.raw prompt": lambda value: score(MODEL, TOKENIZER, value, ["x"], raw=True),
    "score.model": lambda value: score(value, TOKENIZER, "x", ["x"]),
    "score.continuations": lambda value: score(MODEL, TOKENIZER, "x", [value, ""]),
    "score.kv_bits": lambda value: score(MODEL, TOKENIZER, "x", ["x"], kv_bits=[value]),
    "batch_score.prompts": lambda value: batch_score(MODEL, TOKENIZER, [value]),
    "load": load,
    "load.adapter": lambda value: load("tiny", adapter=[value]),
    "load.revision": lambda value: load("tiny", [value]),
    "load_model": load_model,
    "load_tokenizer": load_tokenizer,
    "memory_limit": lambda value: memory_limit([value]).__enter__(),
    "unload": unload,
    "convert.mode": lambda value: convert("tiny", "/nowhere/out", mode=value),
    "convert.target_size": lambda value: convert("tiny", "/nowhere/out", target_size=[value]),
    "convert.recipe": lambda value: convert("tiny", "/nowhere/out", recipe=[value]),
    "trained_on.revision": lambda value: trained_on(Path("a"), {"model": "tiny"}, [value]),
    "compare": lambda value: compare(MODEL, TOKENIZER, value, TOKENIZER, "some text"),
    "Conversation": lambda value: Conversation(value, TOKENIZER),
    "PromptCache": PromptCache,
    "PromptCache.read": lambda value: PromptCache(MODEL).read(value),
    "PromptCache.load": lambda value: PromptCache.load(value, MODEL),
}


@pytest.mark.parametrize("name", CALLS)
def test_rubbish_is_refused_in_one_line(name):
    for value in RUBBISH:
        with pytest.raises(Phi3Error) as caught:
            CALLS[name](value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_several_prompts_are_a_list():
    for wrong in (None, False, 0, {}, USER, "x", b"x", 1.5, object(), np.array(5)):
        with pytest.raises(Phi3Error, match="list of prompts"):
            batch_generate(MODEL, TOKENIZER, wrong, max_tokens=1)
    assert batch_generate(MODEL, TOKENIZER, [], max_tokens=1) == []
    both = batch_generate(MODEL, TOKENIZER, ["Hi.", "Who are you?"], max_tokens=3)
    assert batch_generate(MODEL, TOKENIZER, (one for one in ("Hi.", "Who are you?")), max_tokens=3) == both


def test_ids_of_an_array_are_a_prompt():
    answer = generate(MODEL, TOKENIZER, [5, 40, 7], max_tokens=3)
    for ids in (np.array([5, 40, 7]), mx.array([5, 40, 7]), (5, 40, 7), [np.int64(5), 40, mx.array(7)]):
        assert generate(MODEL, TOKENIZER, ids, max_tokens=3) == answer
        cache = PromptCache(MODEL)
        cache.read(ids)
        assert cache.ids == [5, 40, 7]


def test_a_tokenizer_takes_texts_and_ids_alone():
    for wrong in (None, 5, True, b"x", ["x"], "\ud800", object()):
        with pytest.raises(Phi3Error):
            TOKENIZER.encode(wrong)
    for wrong in (None, 5, "x", b"x", [True], [1.5], [None], ["x"], {1: 2}, object()):
        with pytest.raises(Phi3Error, match="give a list of token ids"):
            TOKENIZER.decode(wrong)
    ids = TOKENIZER.encode("Tom had a dog.")
    assert TOKENIZER.decode(np.array([*ids, -1, 10**9, 2**40])) == TOKENIZER.decode(ids)


def test_names_that_no_file_can_have_are_refused(tmp_path):
    cache = PromptCache(MODEL)
    cache.read([5, 6])
    for wrong in (None, 5, True, b"x", "a\0b", "\ud800", "a" * 300, ["x"], object()):
        for use in (load, load_model, load_tokenizer, cache.save, lambda name: PromptCache.load(name, MODEL)):
            with pytest.raises(Phi3Error) as caught:
                use(wrong)
            assert "\n" not in str(caught.value)
    with pytest.raises(Phi3Error):
        load("tiny", adapter="a" * 5000)
    with pytest.raises(Phi3Error):
        load("tiny", adapter={5: 1.0})
    assert not list(Path(tmp_path).iterdir())


NOBODYS = "~nobody-has-this-name/x"  # pathlib raises RuntimeError for it


@pytest.mark.parametrize(
    "use",
    [
        lambda: load(NOBODYS),
        lambda: load("tiny", adapter=NOBODYS),
        lambda: load_tokenizer(NOBODYS),
        lambda: convert(NOBODYS, "out"),
        lambda: convert("tiny", "out", bits=8, recipe=NOBODYS),
        lambda: fuse(NOBODYS, "out"),
        lambda: import_peft(NOBODYS, "out", model="tiny"),
        lambda: export_gguf("tiny", "out.gguf", adapter=NOBODYS),
        lambda: load_steering(f"{NOBODYS}.gguf"),
        lambda: tune("tiny", NOBODYS, "out"),
        lambda: tune("tiny", "data.jsonl", "out", from_adapter=NOBODYS),
        lambda: evaluate(MODEL, TOKENIZER, f"{NOBODYS}.jsonl"),
        lambda: evaluate(MODEL, TOKENIZER, "mmlu", data=NOBODYS),
        lambda: dedupe_data(NOBODYS, "out"),
        lambda: PromptCache.load(NOBODYS, MODEL),
    ],
)
def test_the_home_of_nobody_is_a_path_that_there_is_not(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Phi3Error) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
