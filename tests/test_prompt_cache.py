"""Caches that outlive a run: the next answer is the one it would be without, or the cache is refused."""

import json
import os
import re

import mlx.core as mx
import oracle
import pytest
from oracle import CONFIGS, ORIGINAL, slim
from tuning_models import make_directory

from phi3_mlx import Phi3Error, PromptCache, generate, load, sizes, stream_generate
from phi3_mlx.adapters.lora import AdaptedLinear, Adapter
from phi3_mlx.cli import main
from phi3_mlx.cli.progress import Pulse
from phi3_mlx.engine import identity, machine, plan
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.plan import Workload
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import CacheError, MemoryLimitError, OptionError, PromptError
from phi3_mlx.generation.prompt_cache import read_document
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.store import hub

NAMES = ["mini-4k", "3.5-mini", "long-and-window"]
MODELS = {name: oracle.make_ours(slim(CONFIGS[name])) for name in NAMES}


def prompt_of(length, seed=0):
    return oracle.ids_of(length, seed=seed)[0].tolist()


def packed_cache(model, bits):
    return PromptCache(model, kv_bits=bits and (bits.keys, bits.values))


def answer(model, prompt, cache=None, bits=None, n=12):
    layers = cache.layers_for(model) if cache else None
    bits = cache.bits if cache else bits
    generation = Generation(model, [prompt], max_tokens=n, sampling=Sampling(), cache=layers, kv_bits=bits)
    if cache:
        cache.keep(generation.cache)
    return [token.id for token in generation], generation.statistics


@pytest.mark.parametrize("bits", [None, KVBits(8, 8)], ids=["plain", "8 bits"])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_begin_alike_are_answered_alike_and_read_once(name, bits, monkeypatch):
    """Longer and shorter, over the boundary and back, out of the window and back."""
    monkeypatch.setattr(KVCache, "step", 4)
    model = MODELS[name]
    cache = packed_cache(model, bits)
    common = prompt_of(ORIGINAL - 10)
    for tail in (5, 20, 3, 40, 1):
        prompt = common + prompt_of(tail, seed=tail)
        tokens, statistics = answer(model, prompt, cache)
        assert tokens == answer(model, prompt, bits=bits)[0]
        assert statistics.prompt_tokens == len(prompt)
        if tail != 5:
            assert statistics.prefilled_tokens <= tail
    assert answer(model, prompt_of(9, seed=99), cache)[0] == answer(model, prompt_of(9, seed=99), bits=bits)[0]


@pytest.mark.parametrize("bits", [None, KVBits(4, 8)], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [ORIGINAL - 9, ORIGINAL + 9])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_back_what_was_read(name, length, bits, tmp_path):
    model, file = MODELS[name], tmp_path / "a.cache"
    cache = packed_cache(model, bits)
    cache.read(prompt_of(length))
    cache.save(file)
    again = PromptCache.load(file, model)
    assert again.ids == cache.ids == prompt_of(length)
    assert again.bits == bits
    prompt = prompt_of(length) + prompt_of(6, seed=1)
    tokens, statistics = answer(model, prompt, again)
    assert tokens == answer(model, prompt, cache)[0] == answer(model, prompt, bits=bits)[0]
    assert statistics.prefilled_tokens == 6
    assert list(tmp_path.iterdir()) == [file]


def test_another_model_is_refused_in_memory_and_from_a_file(tmp_path):
    model, file = MODELS["3.5-mini"], tmp_path / "a.cache"
    cache = PromptCache(model)
    cache.read(prompt_of(20))
    cache.save(file)
    with pytest.raises(CacheError, match="another model"):
        cache.layers_for(MODELS["mini-4k"])
    twin = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    PromptCache.load(file, twin)  # the same weights, loaded a second time
    weight = twin.model.layers[1].mlp.down_proj.weight
    weight[5, 7] = weight[5, 7] * 1.001  # one number of all
    with pytest.raises(CacheError, match="other weights"):
        PromptCache.load(file, twin)
    pinned = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    pinned.model.longrope = "long"
    with pytest.raises(CacheError, match="made with longrope=auto, and this model has longrope=long"):
        PromptCache.load(file, pinned)
    half = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    half.set_dtype(mx.bfloat16)
    with pytest.raises(CacheError, match="load it with dtype=float32"):
        PromptCache.load(file, half)


def test_a_file_of_an_adapter_at_another_weight_is_refused(tmp_path):
    model, file = oracle.make_ours(slim(CONFIGS["3.5-mini"])), tmp_path / "a.cache"
    attention = model.model.layers[0].self_attn
    outputs, inputs = attention.o_proj.weight.shape
    attention.o_proj = AdaptedLinear(
        attention.o_proj, {"mine": Adapter(mx.ones((inputs, 2)), mx.ones((2, outputs)), 0.5)}
    )
    cache = PromptCache(model)
    cache.read(prompt_of(20))
    cache.save(file)
    PromptCache.load(file, model)
    attention.o_proj.use({"mine": 0.5})
    with pytest.raises(CacheError, match="other weights"):
        PromptCache.load(file, model)


def test_a_fingerprint_is_the_same_however_many_numbers_are_summed_at_once(monkeypatch):
    whole = identity.model_fingerprint(MODELS["3.5-mini"])
    monkeypatch.setattr(identity, "_SUMMED", 1000)
    assert identity.model_fingerprint(MODELS["3.5-mini"]) == whole


@pytest.mark.parametrize("shared", [3, 40, 60, 90])
def test_a_windowed_cache_goes_back_behind_its_window(shared, monkeypatch):
    """To where nothing is kept of what the window has left, and the free slots are most of all."""
    monkeypatch.setattr(KVCache, "step", 4)
    monkeypatch.setattr(KVCache, "spare", 2)
    model = MODELS["mini-4k"]
    assert model.config.sliding_window < 60
    cache = PromptCache(model)
    cache.read(prompt_of(120))
    prompt = [*prompt_of(120)[:shared], *prompt_of(9, seed=3)]
    assert answer(model, prompt, cache)[0] == answer(model, prompt)[0]


def test_a_run_that_is_refused_leaves_the_cache_as_it_was(monkeypatch):
    model, tokenizer = load("tiny")
    cache = PromptCache(model, kv_bits=8)
    generate(model, tokenizer, "Once there was a dog. " * 30, max_tokens=1, prompt_cache=cache)
    held = cache.ids
    with monkeypatch.context() as scarce:
        scarce.setattr(machine, "room", lambda: 0)
        with pytest.raises(MemoryLimitError) as refusal:
            generate(model, tokenizer, "Who are you? " * 90, max_tokens=1, prompt_cache=cache)
    assert "a cache made with kv_bits=" in str(refusal.value) or "kv_bits" not in str(refusal.value)
    assert cache.ids == held
    assert len(held) > 100


def test_writing_a_cache_takes_no_second_one(tmp_path):
    cache = PromptCache(MODELS["3.5-mini"])
    cache.read([1 + i % 90 for i in range(1500)])
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    cache.save(tmp_path / "a.cache")
    assert cache.nbytes > 2_000_000
    assert mx.get_peak_memory() - held < cache.nbytes / 4


def test_bits_are_given_as_to_generate():
    model, tokenizer = load("tiny")
    for bits, group_size in ((8, 32), ((8, 4), 32)):
        cache = PromptCache(model, kv_bits=bits, kv_group_size=group_size)
        text = generate(model, tokenizer, "Who are you?", max_tokens=8, prompt_cache=cache)
        assert text == generate(model, tokenizer, "Who are you?", max_tokens=8, kv_bits=bits)
        assert repr(cache) == f"<PromptCache: {len(cache.ids):,} tokens read, {sizes.size_text(cache.nbytes)}>"
    for wrong in (5, (4,), "8,4"):
        with pytest.raises(OptionError, match="kv_bits"):
            PromptCache(model, kv_bits=wrong)
    with pytest.raises(Phi3Error, match="load\\('tiny'\\)"):
        PromptCache("tiny")


def test_a_stream_whose_cache_was_given_to_another_ends_with_an_error():
    model, tokenizer = load("tiny")
    cache = PromptCache(model)
    stream = stream_generate(model, tokenizer, "Tell me a story.", max_tokens=40, prompt_cache=cache, lookup=0)
    for _ in range(3):
        next(stream)
    other = generate(model, tokenizer, "Who are you?", max_tokens=20, prompt_cache=cache)
    with pytest.raises(CacheError, match="one cache for each stream"):
        list(stream)
    assert generate(model, tokenizer, "Who are you?", max_tokens=20, prompt_cache=cache) == other
    stream = stream_generate(model, tokenizer, [9, 10, 11], max_tokens=40, prompt_cache=cache, lookup=0)
    next(stream)
    generate(model, tokenizer, [12, 13], max_tokens=5, prompt_cache=cache)  # begins with nothing that was read
    with pytest.raises(CacheError, match="one cache for each stream"):
        list(stream)


def test_a_prompt_that_shares_little_gives_the_memory_back(monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)
    model = MODELS["3.5-mini"]
    cache = PromptCache(model)
    cache.read(prompt_of(90))
    full = cache.nbytes
    short = [*prompt_of(90)[:1], *prompt_of(8, seed=5)]
    tokens, _ = answer(model, short, cache)
    assert cache.nbytes < full / 2
    assert tokens == answer(model, short)[0]


def test_nothing_is_written_of_an_interrupted_rereading_and_nothing_lost_for_a_prompt_that_is_none(tmp_path):
    cache = PromptCache(MODELS["3.5-mini"])
    cache.read(prompt_of(40))
    with pytest.raises(PromptError):
        cache.read([])
    assert len(cache.ids) == 40
    cache._layers[0].sequence.long = None  # as while rows are recomputed
    with pytest.raises(CacheError, match="nothing to write"):
        cache.save(tmp_path / "a.cache")


def test_damaged_files_are_refused(tmp_path):
    model, file = MODELS["mini-4k"], tmp_path / "a.cache"
    cache = PromptCache(model)
    with pytest.raises(CacheError, match="read nothing"):
        cache.save(file)
    cache.read(prompt_of(20))
    cache.save(file)
    whole = file.read_bytes()
    for damage in (
        whole[:-10],
        whole[:50],
        b"",
        b"not a cache at all",
        whole.replace(b"prompt cache 4", b"prompt cache 9"),
        whole.replace(b'"0.0"', b'"7.0"'),
        whole.replace(b"document", b"docum3nt"),
        whole.replace(b'"F32"', b'"F99"'),
    ):
        assert damage != whole
        file.write_bytes(damage)
        with pytest.raises(CacheError, match=str(file)):
            PromptCache.load(file, model)
    with pytest.raises(CacheError, match="cannot be written"):
        cache.save(tmp_path / "nowhere" / "a.cache")


def test_generate_reads_only_what_is_new():
    model, tokenizer = load("tiny")
    cache = PromptCache(model)
    story = "Tim had a red ball. He went to the park with his dog. " * 6
    first = f"{story}\nWho had a red ball?"
    second = f"{story}\nWhere did Tim go?"
    plain = [generate(model, tokenizer, prompt, max_tokens=12) for prompt in (first, second)]
    assert generate(model, tokenizer, first, max_tokens=12, prompt_cache=cache) == plain[0]
    chunks = list(stream_generate(model, tokenizer, second, max_tokens=12, prompt_cache=cache))
    assert "".join(chunk.text for chunk in chunks) == plain[1]
    assert chunks[-1].prefilled_tokens < 20 < chunks[-1].prompt_tokens


def run(capsys, *args):
    with pytest.raises(SystemExit) as done:
        main(list(args))
    return done.value.code, *capsys.readouterr()


def test_a_book_is_read_once_for_many_questions(tmp_path, capsys):
    book, cache = tmp_path / "book.txt", tmp_path / "book.cache"
    book.write_text("Once there was a boy named Tim. The secret word of the cat is kite. " * 8)
    code, out, err = run(capsys, "cache", "build", "-f", str(book), "-o", str(cache))
    assert (code, out) == (0, "")
    assert "keys and values" in err
    asked = ["generate", "-p", "What is the secret word of the cat?", "--max-tokens", "12"]
    _, plain, _ = run(capsys, *asked[:2], f"{book.read_text().strip()}\n\n{asked[2]}", *asked[3:])
    code, out, err = run(capsys, *asked, "--cache", str(cache), "--stats")
    assert (code, out) == (0, plain)
    read = int(err.split("(")[1].split()[0])
    assert read < 20
    code, out, _ = run(capsys, *asked, "--cache", str(cache), "-f", str(book))
    assert (code, out) == (0, plain)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "book.txt").write_text("Tim had a dog. " * 20)
    with pytest.raises(SystemExit):
        main(["cache", "build", "-f", str(folder / "book.txt"), "-o", str(folder / "book.cache")])
    make_directory(folder / "other")
    return folder


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--cache", "BUILT/book.txt", "-p", "Why?"], "no prompt cache"),
        (["--cache", "BUILT/none", "-p", "Why?"], "cannot be read"),
        (["--cache", "BUILT/book.cache", "-f", "BUILT/other.txt", "-p", "Why?"], "does not begin"),
        (["--cache", "BUILT/book.cache", "--system", "Be brief.", "-p", "Why?"], "leave --system out"),
        (["--cache", "BUILT/book.cache", "--kv-bits", "4", "-p", "Why?"], "leave it out"),
        (
            ["--cache", "BUILT/book.cache", "-m", "BUILT/other", "-p", "Why?"],
            "book.cache is of tiny, and this model is another",
        ),
        (["--cache", "BUILT/book.cache", "--longrope", "long", "-p", "Why?"], "load it with --longrope auto"),
        (["--cache", "BUILT/book.cache", "-f", "BUILT/other.txt"], "give that with -p"),
        (["--cache", "BUILT/book.cache", "--raw", "-p", "Why?"], "--raw"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_in_a_line(built, args, words, capsys):
    (built / "other.txt").write_text("Mia had a cat. " * 20)
    code, out, err = run(capsys, "generate", *(arg.replace("BUILT", str(built)) for arg in args))
    assert code in (1, 2)
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_the_model_is_the_one_that_read_the_text(built, capsys, monkeypatch):
    monkeypatch.chdir(built)
    assert run(capsys, "cache", "build", "-m", "other", "-f", "book.txt", "-o", "of-other.cache")[0] == 0
    monkeypatch.chdir("/")  # a directory is found again from anywhere
    asked = ["generate", "--cache", str(built / "of-other.cache"), "-p", "Why?", "--max-tokens", "3", "--json"]
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    assert json.loads(out)["model"] == str(built / "other")
    _, again, _ = run(capsys, *asked, "-m", str(built / "other"))
    assert json.loads(again)["text"] == json.loads(out)["text"]


def test_a_place_that_cannot_be_written_is_said_before_reading(built, capsys, monkeypatch):
    monkeypatch.setattr(PromptCache, "read", lambda *_, **__: pytest.fail("the text was read"))
    code, _, err = run(capsys, "cache", "build", "-f", str(built / "book.txt"), "-o", str(built / "no" / "a.cache"))
    assert code == 1
    assert "cannot be written" in err


def test_a_pipe_or_a_folder_is_not_replaced_by_a_cache(built, capsys, monkeypatch):
    """Nor a device. It is said before the text is read, which may take hours. A link stays, its place is written."""
    places = {"pipe": "a named pipe is there", "folder": "a directory is there"}
    os.mkfifo(built / "pipe")
    (built / "folder").mkdir()
    (built / "link to pipe").symlink_to("pipe")
    (built / "disk").mkdir()
    (built / "link").symlink_to("disk/book.cache")
    build = ["cache", "build", "-f", str(built / "book.txt"), "-o"]
    assert run(capsys, *build, str(built / "link"))[0] == 0
    assert (built / "link").is_symlink()
    assert read_document(built / "disk" / "book.cache")
    cache = PromptCache.load(built / "disk" / "book.cache", load("tiny")[0])
    monkeypatch.setattr(PromptCache, "read", lambda *_, **__: pytest.fail("the text was read"))
    for name, words in {**places, "link to pipe": places["pipe"]}.items():
        code, _, err = run(capsys, *build, str(built / name))
        assert (code, err.count("\n")) == (1, 1)
        assert words in err
        with pytest.raises(CacheError, match=words):
            cache.save(built / name)
    assert (built / "pipe").is_fifo()
    assert not os.listdir(built / "folder")


def test_only_a_cache_is_replaced(built, capsys):
    text = (built / "book.txt").read_text()
    code, _, err = run(capsys, "cache", "build", "-f", str(built / "book.txt"), "-o", str(built / "book.txt"))
    assert code == 1
    assert "is no prompt cache, so it is not replaced" in err
    assert (built / "book.txt").read_text() == text
    assert run(capsys, "cache", "build", "-f", str(built / "book.txt"), "-o", str(built / "book.cache"))[0] == 0
    (built / "empty.txt").write_text("\n")
    code, _, err = run(capsys, "cache", "build", "-f", str(built / "empty.txt"), "-o", str(built / "empty.cache"))
    assert code == 1
    assert "is empty" in err


def test_a_refusal_does_not_offer_bits_that_a_cache_cannot_change(built, capsys, monkeypatch):
    """One tells how to rebuild it; what is allowed is what 8 bits need."""
    needed = Workload.of_directory(hub.resolve("tiny"), 1200, kv_bits=KVBits(8, 8)).crossing()
    monkeypatch.setattr(machine, "room", lambda: needed.plan(0).total)
    code, _, err = run(capsys, "generate", "--cache", str(built / "book.cache"), "-p", "Why?")
    assert code == 1
    assert "a cache made with --kv-bits 8 needs" in err
    assert "--force tries" in err


def test_a_log_says_how_far_a_long_prompt_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pulse, "SECONDS", 0.0)
    monkeypatch.setattr(plan, "CHUNKS", (64,))
    book = tmp_path / "book.txt"
    book.write_text("Once there was a boy named Tim. " * 40)
    code, out, err = run(capsys, "cache", "build", "-f", str(book), "-o", str(tmp_path / "book.cache"))
    assert (code, out) == (0, "")
    assert re.match(r"read 64 of \d+ tokens\n", err)
