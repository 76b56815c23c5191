"""Arguments of the public functions and options of the commands: of a wrong type or without effect, they are named."""

import click
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

import phi3_mlx
from phi3_mlx.cli import cli, main
from phi3_mlx.cli.options import as_typed, in_options
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import OptionError, Phi3Error, PromptError
from phi3_mlx.models.cache import KVBits, make_kv_bits

TINY = str(ROOT / "weights" / "tiny")


@pytest.fixture(scope="module")
def loaded():
    return phi3_mlx.load("tiny")


def call(capsys, *words):
    """(exit code, stderr)"""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code, capsys.readouterr().err


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "10"),
        ("max_tokens", 10.0),
        ("max_tokens", True),
        ("max_tokens", None),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", float("nan")),
        ("top_p", [0.5]),
        ("top_k", 4.0),
        ("min_p", "0.1"),
        ("repetition_penalty", None),
        ("seed", "7"),
        ("seed", 0.5),
        ("seed", True),
        ("seed", -1),
        ("stop", 3),
        ("stop", [None]),
        ("stop", b"end"),
        ("raw", "no"),
        ("force", 1),
        ("kv_bits", True),
        ("kv_bits", "8"),
        ("kv_bits", 4.0),
        ("kv_bits", (8, "4")),
        ("kv_bits", (8,)),
        ("kv_group_size", 32),
        ("lookup", "many"),
        ("prompt_cache", "a.cache"),
    ],
)
def test_generate_refuses_values_of_another_type_at_the_call(loaded, name, value):
    model, tokenizer = loaded
    for function in (phi3_mlx.generate, phi3_mlx.stream_generate):
        with pytest.raises(OptionError) as caught:
            function(model, tokenizer, "Hi", **{name: value})
        assert one_line(caught).startswith(name)


def test_generate_takes_numbers_of_array_libraries(loaded):
    model, tokenizer = loaded
    right = phi3_mlx.generate(model, tokenizer, "Hi", max_tokens=3, temperature=0.5, top_k=5, seed=3, kv_bits=(8, 4))
    numbers = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "top_k": mx.array(5), "seed": np.uint8(3)}
    assert phi3_mlx.generate(model, tokenizer, "Hi", **numbers, kv_bits=[np.int8(8), 4]) == right
    assert Sampling(seed=np.int64(3), top_k=np.int32(2)) == Sampling(seed=3, top_k=2)
    assert type(Sampling(seed=np.int64(3)).seed) is int


def test_what_load_gives_is_told_from_its_parts(loaded):
    model, tokenizer = loaded
    with pytest.raises(Phi3Error, match=r"take it apart first: model, tokenizer = load\(...\)") as caught:
        phi3_mlx.generate(loaded, tokenizer, "Hi")
    one_line(caught)
    for wrong in ("tiny", None, model, loaded):
        for function in (
            lambda wrong: phi3_mlx.generate(model, wrong, "Hi"),
            lambda wrong: phi3_mlx.Conversation(model, wrong),
            lambda wrong: phi3_mlx.compare(model, wrong, model, tokenizer, "a text"),
        ):
            with pytest.raises(OptionError, match=r"tokenizer is .*; expected the one that load") as caught:
                function(wrong)
            one_line(caught)
    for wrong in (loaded, "tiny", None, tokenizer):
        for function in (
            phi3_mlx.unload,
            phi3_mlx.PromptCache,
            lambda wrong: phi3_mlx.generate(wrong, tokenizer, "Hi"),
            lambda wrong: phi3_mlx.compare(wrong, tokenizer, model, tokenizer, "a text"),
        ):
            with pytest.raises(Phi3Error, match="load") as caught:
                function(wrong)
            one_line(caught)
    for wrong in (loaded, None, 3, ["tiny"]):
        for function in (phi3_mlx.load, phi3_mlx.load_model, phi3_mlx.load_tokenizer):
            with pytest.raises(OptionError, match=r"model is .*; expected the name or directory of a model") as caught:
                function(wrong)
            one_line(caught)
    for options in ({"dtype": mx.float16}, {"dtype": ["float16"]}, {"adapter": {"a": "0.5"}}, {"adapter": 3}):
        with pytest.raises(OptionError) as caught:
            phi3_mlx.load("tiny", **options)
        one_line(caught)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": True},
        {"group_size": "64"},
        {"mode": 4},
        {"dtype": np.float16},
        {"dequantize": "yes"},
        {"target_bpw": "4.5"},
        {"target_size": [1]},
        {"recipe": 3},
        {"method": 4},
        {"calibration": b"a text", "method": "gptq"},
        {"text": 3},
        {"report": 1},
        {"force": "no"},
        {"allow_nan": 0},
        {"progress": "bar"},
        {"revision": 3},
        {"source": ("a model", "a tokenizer")},
        {"destination": None},
        {"text": "a text", "report": False},
        {"text": "a text", "dequantize": True},
    ],
)
def test_convert_refuses_values_of_another_type_and_without_effect(tmp_path, options):
    arguments = {"source": TINY, "destination": tmp_path / "new", **options}
    with pytest.raises(OptionError) as caught:
        phi3_mlx.convert(arguments.pop("source"), arguments.pop("destination"), **arguments)
    one_line(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"bits": "8"}, {"bits": True}, {"dequantize": 1}, {"dtype": 16}, {"text": b"a"}, {"force": None}, {"output": 3}],
)
def test_fuse_refuses_values_of_another_type(tmp_path, options):
    arguments = {"adapter": tmp_path / "adapter", "output": tmp_path / "new", **options}
    with pytest.raises(OptionError) as caught:
        phi3_mlx.fuse(arguments.pop("adapter"), arguments.pop("output"), **arguments)
    one_line(caught)


@pytest.mark.parametrize(
    "options", [{"window": "512"}, {"window": 1.5}, {"window": 0}, {"text": None}, {"progress": 1}]
)
def test_compare_refuses_values_of_another_type(loaded, options):
    with pytest.raises(OptionError) as caught:
        phi3_mlx.compare(*loaded, *loaded, **{"text": "a text", **options})
    one_line(caught)


def test_raw_is_for_texts(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(Phi3Error, match="raw=True has no effect on messages"):
        phi3_mlx.generate(model, tokenizer, messages, raw=True)
    ids = tokenizer.encode("Once upon a time")
    options = {"max_tokens": 2, "raw": True}
    assert phi3_mlx.generate(model, tokenizer, ids, **options) == phi3_mlx.generate(
        model, tokenizer, "Once upon a time", **options
    )


def test_a_conversation_is_of_texts(loaded):
    for call in (
        lambda: phi3_mlx.Conversation(*loaded, system=3),
        lambda: phi3_mlx.Conversation(*loaded).reset(b"system"),
        lambda: phi3_mlx.Conversation(*loaded).send(None),
        lambda: phi3_mlx.Conversation(*loaded, notify="print"),
    ):
        with pytest.raises(OptionError, match="expected a") as caught:
            call()
        one_line(caught)


def test_prompts_are_any_that_come_one_by_one(loaded):
    model, tokenizer = loaded
    right = phi3_mlx.batch_generate(model, tokenizer, ["Hi", "Who are you?"], max_tokens=2)
    assert phi3_mlx.batch_generate(model, tokenizer, (one for one in ("Hi", "Who are you?")), max_tokens=2) == right
    for wrong in (None, 3, {"a": 1}, "Hi"):
        with pytest.raises(Phi3Error, match="list of prompts") as caught:
            phi3_mlx.batch_generate(model, tokenizer, wrong)
        one_line(caught)


def test_options_are_not_read_into_names_of_files():
    tune = cli.get_command(click.Context(cli), "tune")
    tune.get_params(click.Context(tune, help_option_names=["-h", "--help"]))
    for text, right in (
        (
            "it would fit with gradient_checkpointing=True and accumulate=4",
            "with --gradient-checkpointing and --accumulate 4",
        ),
        ("take method='lora', or leave it", "take --method lora, or leave it"),
        ("name another folder with output=DIR", "with --output DIR"),
        (
            "/runs/rank=8/last exists already (resume=True goes on)",
            "/runs/rank=8/last exists already (--resume goes on)",
        ),
        ("no_such=8 is nothing", "no_such=8 is nothing"),
    ):
        assert in_options(text, tune).endswith(right)
    export = cli.get_command(click.Context(cli), "export")
    export.get_params(click.Context(export, help_option_names=["-h", "--help"]))
    said = "take importance=False and report=False, not type='q4_k_m' or modelfile=True"
    assert in_options(said, export) == "take --no-importance and --no-report, not --type q4_k_m or --modelfile"
    assert as_typed(OptionError("max_length 1 is too short"), tune) == "--max-length 1 is too short"
    assert as_typed(Phi3Error("rank 8"), tune) == "rank 8"


def test_the_group_of_a_packed_cache_is_nothing_without_its_bits(loaded, capsys):
    model, tokenizer = loaded
    assert make_kv_bits(None) is None
    assert make_kv_bits(4) == KVBits(4, 4, 32)
    assert make_kv_bits((8, 4), 64) == KVBits(8, 4, 64)
    for make in (
        lambda: phi3_mlx.batch_generate(model, tokenizer, ["Hi"], kv_group_size=32),
        lambda: phi3_mlx.Conversation(model, tokenizer, kv_group_size=64),
        lambda: phi3_mlx.PromptCache(model, kv_group_size=64),
    ):
        with pytest.raises(OptionError, match=r"^kv_group_size \d\d has no effect without kv_bits=BITS; leave it out$"):
            make()
    for words in (["generate", "-p", "Hi"], ["chat"], ["cache", "build", "-f", ROOT / "README.md", "-o", "no.cache"]):
        for size in (32, 64):
            code, err = call(capsys, *words, "--kv-group-size", size)
            assert code == 2
            assert err.startswith(f"phi3-mlx: --kv-group-size {size} has no effect without --kv-bits BITS")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (["Hi", "there"], "holds 'Hi'"),
        ([1, 2.0], "holds 2.0"),
        ([[1, 2]], "holds a list"),  # what other tokenizers call a batch
        ([1, True], "holds True"),
        ({1, 2}, "is a set"),
        (3, "is 3"),
        (b"Hi", "is b'Hi'"),
    ],
)
def test_a_prompt_of_another_kind_is_refused_with_what_is_odd_in_it(loaded, prompt, said):
    with pytest.raises(PromptError, match=f"^the prompt {said}; a prompt is a text, a list of "):
        phi3_mlx.generate(*loaded, prompt)


def test_a_prompt_cache_has_bits_of_its_own(loaded):
    model, tokenizer = loaded
    cache = phi3_mlx.PromptCache(model, kv_bits=8)
    options = {"max_tokens": 2, "prompt_cache": cache}
    text = phi3_mlx.generate(model, tokenizer, "Hi", **options)
    assert phi3_mlx.generate(model, tokenizer, "Hi", **options, kv_bits=8) == text
    for bits in (4, (8, 4)):
        with pytest.raises(OptionError, match="kv_bits has no effect beside a prompt_cache"):
            phi3_mlx.generate(model, tokenizer, "Hi", **options, kv_bits=bits)


def test_filters_that_change_nothing_at_temperature_0_are_noted(capsys):
    ask = ["generate", "-p", "Hi", "--max-tokens", 1]
    code, err = call(capsys, *ask, "--top-p", 0.9, "--top-k", 5, "--seed", 1)
    assert code == 0
    assert "note: --top-p changes nothing at --temperature 0" in err
    assert "note: --top-k changes nothing" in err
    assert "seed" not in err
    assert "min-p" not in err
    assert call(capsys, *ask, "--top-p", 0.9, "--temperature", 0.5) == (0, "")
