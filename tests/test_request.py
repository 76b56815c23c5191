"""What an answer can be asked for with stands in one place, from which functions, options and tables are made."""

import inspect
import io
import subprocess
import sys
from dataclasses import fields, replace

import click
import numpy as np
import pytest
from conftest import ROOT

import phi3_mlx
from phi3_mlx.cli import cli
from phi3_mlx.engine import plan
from phi3_mlx.engine.cache_file import Document
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.errors import OptionError
from phi3_mlx.generation import answers, conversation
from phi3_mlx.generation.prompt_cache import document_ids
from phi3_mlx.generation.request import CHAT_TOKENS, Request
from phi3_mlx.models.cache import KVBits, KVCache

sys.path.insert(0, str(ROOT / "docs"))
from _options import table, with_tables

FIELDS = {field.name: field for field in fields(Request)}
OF_THE_CACHE = {"kv_bits", "kv_group_size", "force"}
# What a function takes of the fields; the others are said in the comment.
FUNCTIONS = {
    phi3_mlx.generate: {*FIELDS},
    phi3_mlx.stream_generate: {*FIELDS},
    phi3_mlx.batch_generate: {*FIELDS} - {"lookup"},  # drafts are for one row
    phi3_mlx.score: {*OF_THE_CACHE, "raw"},  # nothing is answered
    phi3_mlx.batch_score: {*OF_THE_CACHE, "raw"},
    phi3_mlx.Conversation: OF_THE_CACHE,
    phi3_mlx.Conversation.send: {*FIELDS} - OF_THE_CACHE - {"raw"},  # a conversation has a cache and a template
}
COMMANDS = {
    "generate": {*FIELDS},
    "chat": {*FIELDS} - {"raw"},  # a conversation has a template
    "cache build": OF_THE_CACHE,  # nothing is answered
}
# One value of each field, other than its default.
OTHERS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": -0.2,
    "seed": 3,
    "max_tokens": 5,
    "stop": ("end", "<|user|>"),
    "logit_bias": {5: 1.5, 42: -100},
    "raw": True,
    "kv_bits": (8, 4),
    "kv_group_size": 64,
    "lookup": 2,
    "schema": '{"type": "integer"}',
    "regex": "a+",
    "grammar": 'start: "a"',
    "choices": ("yes", "no"),
    "force": True,
}


def given_with(name):
    """The field's other value, and what it needs beside it."""
    return {name: OTHERS[name]} | ({"kv_bits": (8, 4)} if name == "kv_group_size" else {})


def command_of(name):
    command = cli
    for part in name.split():
        command = command.get_command(click.Context(command), part)
    return command


@pytest.fixture(scope="module")
def loaded():
    return phi3_mlx.load("tiny")


@pytest.fixture
def asked(monkeypatch):
    """The requests that reach the engine's door, where the answer ends."""
    seen = []

    class Asked(Exception):
        pass

    def ask(model, tokenizer, prompts, request, **_):
        seen.append(request)
        raise Asked

    monkeypatch.setattr(answers, "Answers", ask)
    monkeypatch.setattr(conversation, "Answers", ask)

    def request_of(call):
        with pytest.raises(Asked):
            call()
        return seen.pop()

    return request_of


@pytest.mark.parametrize("of_conversation", [False, True])
@pytest.mark.parametrize("of_request", [False, True])
def test_a_conversation_forces_an_answer_if_it_or_the_request_says_so(loaded, asked, of_conversation, of_request):
    chat = phi3_mlx.Conversation(*loaded, force=of_conversation)
    assert asked(lambda: chat.ask("Hi", Request(force=of_request))).force == (of_conversation or of_request)
    assert asked(lambda: chat.send("Hi")).force == of_conversation


def test_a_conversation_refuses_what_is_not_of_a_message(loaded):
    chat = phi3_mlx.Conversation(*loaded)
    with pytest.raises(OptionError, match=r"^raw=True has no effect on a message"):
        chat.ask("Hi", Request(raw=True))
    with pytest.raises(OptionError, match=r"^kv_bits has no effect beside a prompt_cache"):
        chat.ask("Hi", Request(kv_bits=8))
    assert chat.messages == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_functions_take_the_fields_with_their_defaults(function):
    parameters = inspect.signature(function).parameters
    taken = {name: parameters[name].default for name in parameters if name in FIELDS}
    defaults = {name: FIELDS[name].default for name in FUNCTIONS[function]}
    if function is phi3_mlx.Conversation.send:
        defaults["max_tokens"] = CHAT_TOKENS
        assert CHAT_TOKENS == 1024
    assert taken == defaults
    types = {name: parameters[name].annotation for name in taken}
    assert types == {name: FIELDS[name].type for name in taken}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_the_fields_with_their_defaults_and_help(name):
    command = command_of(name)
    options = {param.name: param for param in command.params if param.name in FIELDS}
    assert {*options} == COMMANDS[name]
    for field, option in options.items():
        assert option.opts == [f"--{field.replace('_', '-')}"]
        assert option.help.removesuffix("  [default: 32]") == FIELDS[field].metadata["help"]
        empty = click.Context(command)
        default = CHAT_TOKENS if field == "max_tokens" else FIELDS[field].default
        assert (option.get_default(empty) or None) == (default or None), field
        typed = {"int": int, "float": float, "bool": bool}.get(FIELDS[field].type.removesuffix(" | None"))
        if typed and default is not None:
            assert type(option.type_cast_value(empty, str(default))) is typed


# Options that mean something of their own in one command, and those that only say it in other words.
_DATA = {
    "data stats",
    "data split",
    "data mix",
    "data dedupe",
    "data decontaminate",
    "data filter",
    "data score",
    "data train-filter",
}
THEIR_OWN = {
    "against": {"data decontaminate"},
    "adapter": {"fuse", "export"},
    "bits": {"convert", "fuse"},
    "calibration": {"export", "fuse"},
    "dequantize": {"convert", "fuse"},
    "dtype": {"convert", "fuse", "tune"},
    "force": {"convert", "fuse", "export", "data synthesize", *_DATA},  # replaces DST too
    "as_json": {"generate", "eval", "data stats"},
    "data": {"eval"},
    "draft_model": {"plan"},
    "dry_run": {"publish", "data synthesize"},
    "longrope": {"export"},
    "max_length": {"eval", "data score"},
    "memory": {"plan"},
    "method": {"convert", "tune"},
    "model": {"tune", "fuse", "export", "adapter export", "adapter import", "plan", "data stats"},
    "output": {
        *("convert", "compare", "tune", "fuse", "export", "eval"),
        *("adapter export", "adapter import", "cache build"),
        "data synthesize",
        *_DATA,
    },
    "name": {"data score"},
    "raw": {"data score"},
    "report": {"export"},
    "rules": {"data filter"},
    "seed": {"convert", "fuse", "tune", "eval", "data mix", "data split", "data train-filter", "data synthesize"},
    "stats": {"generate", "chat"},
    "system": {"cache build", "eval"},
    "tasks": {"eval"},
    "text": {"convert", "compare", "fuse"},
    "epochs": {"data mix"},
    "file": {"cache build"},
    "ngram": {"data dedupe", "data synthesize"},
    "threshold": {"data synthesize", "data train-filter"},
    **{name: {"data synthesize"} for name in ("temperature", "top_p", "max_tokens", "prompt", "records")},
    **{name: {"data synthesize"} for name in ("max_characters", "min_words", "max_words")},
}
# Pretraining has settings of its own under the names that others have for theirs.
for _name in (
    *("data", "valid", "holdout", "max_length", "batch_size", "epochs", "tokens", "optimizer", "learning_rate"),
    *("muon_rate", "schedule", "warmup", "weight_decay", "dropout", "resume", "dtype", "seed", "output"),
):
    THEIR_OWN[_name] = {*THEIR_OWN.get(_name, ()), "pretrain"}
for _name in ("model", "force", "output"):
    THEIR_OWN[_name] = {*THEIR_OWN[_name], "data tokenize"}


def test_an_option_means_the_same_in_every_command():
    meanings = {}

    def visit(command, name):
        context = click.Context(command, help_option_names=["-h", "--help"])
        for below in getattr(command, "list_commands", lambda _: [])(context):
            visit(command.get_command(context, below), f"{name} {below}".strip())
        for option in command.get_params(context):
            if isinstance(option, click.Option) and name not in THEIR_OWN.get(option.name, ()):
                meanings.setdefault(option.name, {}).setdefault((option.help, repr(option.type)), []).append(name)

    visit(cli, "")
    assert {name: several for name, several in meanings.items() if len(several) > 1} == {}
    assert sum(len(commands) for several in meanings.values() for commands in several.values()) > 100


def test_every_argument_reaches_the_request(loaded, asked):
    assert OTHERS.keys() == FIELDS.keys()
    model, tokenizer = loaded
    for name in OTHERS:
        given = given_with(name)
        for function in (phi3_mlx.generate, phi3_mlx.stream_generate):
            assert asked(lambda f=function, g=given: f(model, tokenizer, "Hi", **g)) == Request(**given)
        if name != "lookup":
            request = asked(lambda g=given: phi3_mlx.batch_generate(model, tokenizer, ["Hi"], **g))
            assert request == Request(**given, lookup=0)
        if name in FUNCTIONS[phi3_mlx.Conversation.send]:
            request = asked(lambda g=given: phi3_mlx.Conversation(model, tokenizer).send("Hi", **g))
            assert request == Request(**{"max_tokens": CHAT_TOKENS, **given})
    request = asked(lambda: phi3_mlx.Conversation(model, tokenizer, force=True).send("Hi"))
    assert request == Request(max_tokens=CHAT_TOKENS, force=True)


@pytest.mark.parametrize(("name", "words"), [("generate", ["-p", "Hi"]), ("chat", [])])
def test_every_option_reaches_the_request(asked, monkeypatch, tmp_path, name, words):
    (tmp_path / "grammar.lark").write_text(OTHERS["grammar"])
    typed = {
        "stop": ["--stop", "end", "--stop", "<|user|>"],
        "logit_bias": ["--logit-bias", "5=1.5", "--logit-bias", "42=-100"],
        "raw": ["--raw"],
        "kv_bits": ["--kv-bits", "8,4"],
        "kv_group_size": ["--kv-bits", "8,4", "--kv-group-size", "64"],
        "grammar": ["--grammar", str(tmp_path / "grammar.lark")],
        "choices": ["--choices", "yes,no"],
        "force": ["--force"],
    }
    for field in COMMANDS[name]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
        options = typed.get(field, [f"--{field.replace('_', '-')}", str(OTHERS[field])])
        request = asked(lambda o=options: command_of(name).main([*words, *o], standalone_mode=False))
        assert request == Request(**{"max_tokens": CHAT_TOKENS, **given_with(field)})


@pytest.mark.parametrize(
    ("line", "max_tokens", "facts"),
    [
        ("generate -p Hi", CHAT_TOKENS, {}),
        ("generate -p Hi --lookup 32", CHAT_TOKENS, {"verified": 33}),
        ("generate -p Hi --max-tokens 7 --kv-bits 8,4 --force", 7, {"kv_bits": KVBits(8, 4), "force": True}),
        ("generate -p Hi --cache packed.cache", CHAT_TOKENS, {"kv_bits": KVBits(4, 4, 64), "kept": True}),
        ("generate -p Hi --cache plain.cache", CHAT_TOKENS, {"kept": True}),
        ("chat --kv-bits 4 --kv-group-size 64", CHAT_TOKENS, {"kv_bits": KVBits(4, 4, 64)}),
        ("cache build -f text.txt -o new.cache --kv-bits 4", 1, {"kv_bits": KVBits(4, 4)}),
    ],
)
def test_the_plan_before_a_model_is_loaded_is_that_of_the_request(
    loaded, monkeypatch, tmp_path, line, max_tokens, facts
):
    class Planned(Exception):
        pass

    def plan_run(directory, prompt, most, *, dtype, longrope, **given):
        raise Planned(most, given)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A story.")
    for name, bits in (("plain", {}), ("packed", {"kv_bits": 4, "kv_group_size": 64})):
        if name in line:
            prompt_cache = phi3_mlx.PromptCache(loaded[0], document=Document("A story.", None, "tiny"), **bits)
            prompt_cache.read(document_ids(loaded[1], prompt_cache.document))
            prompt_cache.save(f"{name}.cache")
    monkeypatch.setattr(plan, "plan_run", plan_run)
    with pytest.raises(Planned) as caught:
        cli.main(line.split(), standalone_mode=False)
    usual = {"kv_bits": None, "kept": False, "force": False, "draft": None, "verified": 17}
    assert caught.value.args == (max_tokens, usual | facts)


def test_a_request_holds_plain_values_of_its_fields_types():
    given = {
        "temperature": np.float32(0.5),
        "max_tokens": np.int64(3),
        "stop": "end",
        "kv_bits": [np.int8(8), 4],
        "kv_group_size": np.int8(64),
        "raw": np.bool_(True),
    }
    right = {"temperature": 0.5, "max_tokens": 3, "stop": ("end",), "kv_bits": (8, 4), "kv_group_size": 64, "raw": True}
    request = Request(**given)
    for name, value in right.items():
        held = getattr(request, name)
        assert held == value
        assert type(held) is type(value)
    assert hash(request) == hash(Request(**right))
    assert request.cache_bits() == KVBits(8, 4, 64)
    assert Request(kv_bits=4).kv_bits == (4, 4)
    assert Request(kv_bits=4).cache_bits() == KVBits(4, 4, 32)
    assert Request().cache_bits() is None
    assert Request(stop=()) == Request()
    assert replace(request, max_tokens=4).max_tokens == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0 is outside its range; give 1 or more"),
        ({"max_tokens": True}, "max_tokens is True; expected a whole number"),
        ({"lookup": 33}, "lookup 33 is outside its range; give 0 (off) to 32"),
        ({"lookup": -1}, "lookup -1 is outside its range; give 0 (off) to 32"),
        ({"stop": ["end", ""]}, "a stop string is empty; give at least one character"),
        ({"stop": ""}, "a stop string is empty; give at least one character"),
        ({"stop": [3]}, "stop holds 3; expected a list of texts"),
        ({"raw": 1}, "raw is 1; expected true or false"),
        ({"force": "no"}, "force is 'no'; expected true or false"),
        ({"temperature": float("inf")}, "temperature inf is outside its range; give 0 or more"),
        ({"top_p": 0}, "top_p 0.0 is outside its range; give above 0 and at most 1"),
        ({"top_k": -1}, "top_k -1 is outside its range; give 0 (off) or more"),
        ({"min_p": 2}, "min_p 2.0 is outside its range; give between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0.0 is outside its range; give above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf is outside its range; give a finite number"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan is outside its range; give a finite number"),
        ({"logit_bias": ["5"]}, "logit_bias holds '5'; expected a token's id and a number, such as 42=-5"),
        ({"logit_bias": ["5=x"]}, "a number of logit_bias is 'x'; expected a number"),
        ({"logit_bias": {"a": 1}}, "an id of logit_bias is 'a'; expected a whole number"),
        ({"logit_bias": {-1: 1}}, "logit_bias holds -1=1.0; expected an id of the vocabulary and a finite number"),
        (
            {"logit_bias": {1: float("nan")}},
            "logit_bias holds 1=nan; expected an id of the vocabulary and a finite number",
        ),
        ({"logit_bias": 5}, "logit_bias is 5; expected ids and numbers, such as {42: -5}"),
        ({"seed": ""}, "seed is ''; expected a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number of at most 64 bits"),
        ({"seed": -1}, "seed -1 is outside its range; give 0 to 2**64 - 1"),
        ({"kv_bits": 5}, "kv_bits 5 is not possible; choose 2, 3, 4, 6, 8"),
        ({"kv_bits": (8,)}, "kv_bits has 1 numbers; give one such as 4, or (8, 4) of keys and values"),
        ({"kv_bits": 4, "kv_group_size": 48}, "kv_group_size 48 is not possible; choose 32 or 64"),
        ({"kv_group_size": 64}, "kv_group_size 64 has no effect without kv_bits=BITS; leave it out"),
    ],
)
def test_a_request_says_what_is_wrong_with_a_value(given, message):
    with pytest.raises(OptionError) as caught:
        Request(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": 1},
        {"lookup": 0},
        {"lookup": 32},
        {"temperature": 0},
        {"top_p": 1e-9},
        {"top_p": 1},
        {"top_k": 0},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 1e-9},
        {"seed": 0},
        {"seed": 2**64 - 1},
    ],
)
def test_the_ends_of_a_range_belong_to_it(given):
    ((name, value),) = given.items()
    assert getattr(Request(**given), name) == value


def test_the_engine_gets_the_options_of_sampling_alone():
    request = Request(**{name: value for name, value in OTHERS.items() if name not in ("schema", "regex", "grammar")})
    assert type(request.sampling()) is Sampling
    assert request.sampling() == Sampling(0.5, 0.9, 7, 0.1, 1.1, 0.3, -0.2, 3)


def test_the_longest_draft_can_be_taken_back_from_a_windowed_cache():
    Request(lookup=KVCache.spare)
    with pytest.raises(OptionError):
        Request(lookup=KVCache.spare + 1)


def test_options_are_known_without_mlx():
    script = "import sys, phi3_mlx.generation.request, phi3_mlx.cli.chat; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_table_of_the_documentation_is_that_of_the_fields():
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert text == with_tables(text), "out of date; run python docs/_options.py"
    rows = table(Request, phi3_mlx.generate)
    assert text.count(rows) == 1
    for name in FIELDS:
        assert f"| `{name}` |" in rows
