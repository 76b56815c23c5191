"""Answers of a given form: valid whenever they end by themselves, and those that a naive mask gives."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import quote

import jsonschema
import mlx.core as mx
import numpy as np
import pydantic
import pytest
from conftest import ROOT, long_after
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rails import MaskAlone

import phi3_mlx
from phi3_mlx.cli import main
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.processors import Constraint
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import OptionError, Phi3Error
from phi3_mlx.generation.request import Request
from phi3_mlx.text.grammar import matchers
from phi3_mlx.text.schemas import schema_of, schema_text

pytest.importorskip("llguidance")
LIST = {"$ref": "#/$defs/list", "$defs": {"list": {"anyOf": [{"type": "null"}, {
    "type": "object", "properties": {"next": {"$ref": "#/$defs/list"}}, "required": ["next"],
    "additionalProperties": False}]}}}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    return phi3_mlx.load("tiny")


# ------------------------------------------------------------------------------------- hundreds of schemas

numbers = st.integers(-300, 300)
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, numbers, st.integers(0, 99)),
    st.builds(lambda a, b: {"type": "integer", "exclusiveMinimum": a, "exclusiveMaximum": a + b}, numbers,
              st.integers(2, 99)),
    st.builds(lambda a, b: {"type": "number", "minimum": a / 8, "maximum": (a + b) / 8}, numbers, st.integers(0, 99)),
    st.builds(lambda n: {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": n}, st.integers(1, 20)),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 3),
              st.integers(0, 5)),
    st.sampled_from(["^[a-c]{1,3}$", "^(é|日本|x){2}$", r"^\d{3}-\d{2}$", "^a|b$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 9}),
    st.sampled_from(["date", "ipv4", "time", "date-time"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.sampled_from([None, True, 3, -1.5, "", "a", 'q"\\\n', "日本", [], {}, {"é": [1]}]), min_size=1,
             max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    st.sampled_from([None, False, 0, "ü", [1, "a"], {"k": {"é": None}}, {}]).map(lambda value: {"const": value}),
)  # fmt: skip
KEYS = ["a", "name", "é", "日本 語", 'quo"ted', "", "$ref", "a/b~c"]


def objects(inner):
    def made(properties, required, closed):
        closing = {"additionalProperties": closed}
        return {"type": "object", "properties": properties, "required": [*properties][:required], **closing}

    return st.builds(
        made,
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
        st.integers(0, 3),
        st.sampled_from([False, False, {"type": "boolean"}]),
    )


def arrays(inner):
    listed = st.builds(
        lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b},
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    pairs = st.lists(inner, min_size=1, max_size=3).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    return listed | pairs


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches}),
        inner.map(
            lambda schema: {"$ref": "#/$defs/é x", "$defs": {"é x": schema}} if "$defs" not in schema else schema
        ),
    ),
    max_leaves=5,
)


def nested_definitions(schema):
    """A schema whose definitions stand at its top, where references look for them."""
    found = {}

    def visit(value):
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("$ref") == "#/$defs/é x" and "$defs" in value:
            name = f"d {len(found)} é"  # a reference spells it in percents
            found[name] = None
            found[name] = visit(value["$defs"]["é x"])
            return {"$ref": f"#/$defs/{quote(name)}"}
        return {key: visit(item) for key, item in value.items()}

    schema = visit(schema)
    return {**schema, "$defs": found} if found else schema


CHECKED = jsonschema.Draft202012Validator.FORMAT_CHECKER


def validate(text, schema):
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema, format_checker=CHECKED).validate(value)
    assert json.dumps(value, ensure_ascii=False, separators=(",", ":")).count("\n") == text.count("\n")
    return value


RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=RELAXED)
@given(schemas.map(nested_definitions), st.integers(0, 2**32))
def check_an_answer_at_random(tokenizer, ended, schema, seed):
    text = drawn_at_random(tokenizer, Request(schema=schema), np.random.default_rng(seed))
    ended.append(text is not None)
    if text is not None:
        validate(text, schema)


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=RELAXED)
@given(schemas.map(nested_definitions), st.floats(0, 3), st.integers(0, 2**32))
def check_an_answer_of_the_model(loaded, ended, schema, temperature, seed):
    model, tokenizer = loaded
    chunks = [*phi3_mlx.stream_generate(
        model, tokenizer, "A duck.", schema=schema, temperature=temperature, seed=seed, max_tokens=80)]  # fmt: skip
    ended.append(chunks[-1].finish_reason == "stop")
    if ended[-1]:
        validate("".join(chunk.text for chunk in chunks), schema)
    else:
        assert len(chunks) == 80


def test_whoever_draws_among_the_tokens_that_are_allowed_keeps_the_schema(loaded):
    ended = []
    check_an_answer_at_random(loaded[1], ended)
    assert sum(ended) > 0.7 * len(ended)


@pytest.mark.long
def test_the_bundled_model_keeps_schemas_at_random_temperatures(loaded):
    ended = []
    check_an_answer_of_the_model(loaded, ended)
    assert sum(ended) > 0.7 * len(ended)


NAMED = [
    {},
    {"type": "object"},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 1},
    {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "additionalProperties": False,
        "required": ["b", "a"],
        "minProperties": 2,
    },
    {"type": "object", "patternProperties": {"^[ab]$": {"type": "integer"}}, "additionalProperties": False},
    {"type": ["integer", "null"]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}, "maximum": 3, "minimum": 1},
    {"type": "string", "enum": ["a", "b", "c"], "minLength": 1},
    {"const": 1.0},
    LIST,
]


@pytest.mark.parametrize("schema", NAMED, ids=json.dumps)
@pytest.mark.parametrize("weights", ["bundled", "random"])
def test_each_kind_of_schema_is_kept(loaded, schema, weights):
    model, tokenizer = loaded
    rng, ended = np.random.default_rng(0), 0
    for seed in range(2 if weights == "bundled" else 12):
        if weights == "bundled":
            *_, last = chunks = [*phi3_mlx.stream_generate(
                model, tokenizer, "A duck.", schema=schema, temperature=1.0, seed=seed, max_tokens=60)]  # fmt: skip
            text = "".join(chunk.text for chunk in chunks) if last.finish_reason == "stop" else None
        else:
            text = drawn_at_random(tokenizer, Request(schema=schema), rng)
        if text is not None:
            validate(text, schema)
            ended += 1
    assert ended or weights == "bundled"


def allows(tokenizer, schema, text):
    """Whether it may be a whole answer; spelled in byte tokens."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    mask = matchers(Request(schema=schema).form, tokenizer, 1)[0].allowed(ids)
    return mask is not None and bool(mask[min(tokenizer.stop_ids)])


def test_a_key_has_one_spelling_so_that_none_escapes_its_schema(loaded):
    tokenizer, schema = loaded[1], {"type": "object", "properties": {"a": {"type": "integer"}, "b/": {"const": "/\n"}}}
    for text in ('{"a":1}', '{"b/":"/\\n"}', '{"c":"x"}', '{"\\n\\"":{"a":"x"}}'):
        assert allows(tokenizer, schema, text)
        validate(text, schema)
    for text in (
        '{"a":"x"}',
        '{"\\u0061":"x"}',
        '{"b\\/":"x"}',
        '{"c":1,"a":"x"}',
        '{"a":1.0}',
        '{"a": 1}',
        '{"a":1} ',
    ):
        assert not allows(tokenizer, schema, text)


@pytest.mark.parametrize("place", [lambda s: s, lambda s: {"properties": {"const": s}}, lambda s: {"anyOf": [s]}])
def test_a_count_of_properties_that_may_come_twice_is_refused(place):
    counted = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}
    with pytest.raises(OptionError, match=r'^schema has "minProperties" above the number of required properties'):
        Request(schema=place(counted))
    Request(schema=place({**counted, "required": ["a", "b"]}))
    Request(schema={"const": counted, "description": "minProperties"})


def drawn_at_random(tokenizer, request, rng, most=300):
    """What a model that knows nothing says; None if it came to no end. It ends every other time that it may."""
    matcher, answer = matchers(request.form, tokenizer, 1)[0], []
    while len(answer) < most:
        ids = matcher.allowed(answer).nonzero()[0]
        stops = [token for token in ids if token in tokenizer.stop_ids]
        # The shortest tokens close what is open more often than others.
        token = int(stops[0] if stops and rng.random() < 0.5 else rng.choice(ids))
        if token in tokenizer.stop_ids:
            return tokenizer.decode(answer)
        answer.append(token)
    return None


# ------------------------------------------------------------------------------------- the naive oracle

TEXTS = ["yes", "yes, the duck", "no", "no frog", "the duck and the frog played", "Once upon a time there was a duck"]


def naive_answer(model, tokenizer, prompt, texts, penalty=1.0, end=None):
    """The likeliest token of those that begin one of the texts, again and again, without a cache."""
    ids, answer = phi3_mlx.encode_prompt(tokenizer, prompt), []
    while end is None or end not in tokenizer.decode(answer):
        logits = np.array(model(mx.array([[*ids, *answer]]))[0, -1].astype(mx.float32))
        seen = [*{*ids, *answer}]
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        for token in np.argsort(-logits, kind="stable"):
            text = tokenizer.decode([*answer, token])
            if token in tokenizer.stop_ids and tokenizer.decode(answer) in texts:
                return tokenizer.decode(answer)
            grows = bool(tokenizer.token_bytes(int(token)).strip()) or text != tokenizer.decode(answer) or not answer
            known = token not in tokenizer.special_ids and token < tokenizer.vocab_size
            if known and grows and any(whole.startswith(text) for whole in texts):
                answer.append(int(token))
                break
    return tokenizer.decode(answer).split(end)[0]


PROMPTS = ["Tell me a story about a duck.", "Is the duck a frog?", "yes, the duck yes, the duck yes, the"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_what_masking_every_step_by_a_naive_oracle_gives(loaded, prompt):
    model, tokenizer = loaded
    right = naive_answer(model, tokenizer, prompt, TEXTS)
    assert right in TEXTS
    pattern = "|".join(re.escape(text) for text in TEXTS)
    for lookup in (0, 4, 16):
        assert phi3_mlx.generate(model, tokenizer, prompt, regex=pattern, lookup=lookup) == right
    penalized = naive_answer(model, tokenizer, prompt, TEXTS, penalty=1.5)
    assert phi3_mlx.generate(model, tokenizer, prompt, choices=TEXTS, repetition_penalty=1.5) == penalized
    stopped = naive_answer(model, tokenizer, prompt, TEXTS, end=right[2:4])
    assert stopped == right.split(right[2:4])[0]
    assert phi3_mlx.generate(model, tokenizer, prompt, regex=pattern, stop=right[2:4]) == stopped


STORY = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "friends": {
    "type": "array", "items": {"enum": ["duck", "frog", "owl"]}, "maxItems": 4}}, "required": ["name", "friends"],
    "additionalProperties": False}  # fmt: skip


@pytest.mark.parametrize("sampled", long_after(1, [{"temperature": 1.0, "seed": 5}, {}]), ids=["sampled", "greedy"])
def test_the_answer_is_the_same_with_drafts_in_a_batch_and_with_any_cache(loaded, sampled):
    model, tokenizer = loaded
    prompts = ['{"name":"duck","friends":["duck","frog","duck","frog"]} {"name":"duck","friends":["duck",', "A frog."]
    alone = [phi3_mlx.generate(model, tokenizer, p, schema=STORY, lookup=0, **sampled) for p in prompts]
    for text in alone:
        validate(text, STORY)
    drafted = [phi3_mlx.generate(model, tokenizer, p, schema=STORY, lookup=16, **sampled) for p in prompts]
    assert drafted == alone
    assert phi3_mlx.batch_generate(model, tokenizer, prompts, schema=STORY, **sampled) == alone
    cache = phi3_mlx.PromptCache(model)
    for _ in range(2):
        cached = phi3_mlx.generate(model, tokenizer, prompts[0], schema=STORY, prompt_cache=cache, **sampled)
        assert cached == alone[0]
    packed = phi3_mlx.generate(model, tokenizer, prompts[0], schema=STORY, kv_bits=4, lookup=0, **sampled)
    validate(packed, STORY)
    assert phi3_mlx.generate(model, tokenizer, prompts[0], schema=STORY, kv_bits=4, **sampled) == packed
    assert phi3_mlx.generate(model, tokenizer, prompts[0], raw=True, lookup=0, **sampled) == phi3_mlx.generate(
        model, tokenizer, prompts[0], raw=True, **sampled
    )


def test_drafts_of_a_constrained_answer_are_accepted(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)
    ids = tokenizer.encode("one, three, one, three, one, three, one")
    form = Request(regex="( ?(duck|frog|owl|one|two|three|cat|dog|bird),?){12}").form
    texts = []
    for lookup in (0, 8):
        run = phi3_mlx.Generation(
            model, [ids], max_tokens=60, sampling=phi3_mlx.Sampling(), stop_ids=tokenizer.stop_ids, lookup=lookup,
            processors=[[Constraint(matchers(form, tokenizer, 1)[0])]],
        )  # fmt: skip
        texts.append(tokenizer.decode(token.id for token in run))
    assert texts[0] == texts[1]
    assert run.statistics.accepted_tokens > 0


FIELDS = {f"field number {n}": [{"type": "boolean"}, {"enum": ["duck", "frog"]}][n % 2] for n in range(20)}
TWENTY = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}


@pytest.mark.parametrize("sampled", long_after(1, [{"temperature": 1.0, "seed": 5}, {}]), ids=["sampled", "greedy"])
def test_an_object_of_twenty_fields_takes_less_than_half_the_steps_that_masks_alone_do(loaded, sampled):
    model, tokenizer = loaded
    ids, form = phi3_mlx.encode_prompt(tokenizer, "A duck."), Request(schema=TWENTY).form
    told, steps = [], []
    for kind, prompts in ((Constraint, [ids]), (Constraint, [ids, ids[:-1]]), (MaskAlone, [ids])):
        run = phi3_mlx.Generation(
            model, prompts, max_tokens=400, sampling=phi3_mlx.Sampling(**sampled), stop_ids=tokenizer.stop_ids,
            processors=[[kind(matcher)] for matcher in matchers(form, tokenizer, len(prompts))],
        )  # fmt: skip
        tokens = [token for token in run if token.row == 0]
        told.append([token.id for token in tokens])
        steps.append(run.statistics.decode_steps)
        assert tokens[-1].finish_reason == "stop"
        validate(tokenizer.decode(told[-1]), TWENTY)
    assert told == [told[-1]] * 3
    assert max(steps[:2]) <= 0.5 * steps[-1]


def test_log_probabilities_are_those_of_the_model(loaded):
    model, tokenizer = loaded
    chunks = [*phi3_mlx.stream_generate(model, tokenizer, "Hi", choices="yes,no")]
    ids = phi3_mlx.encode_prompt(tokenizer, "Hi")
    logits = model(mx.array([[*ids, *(chunk.token for chunk in chunks)]]))[0].astype(mx.float32)
    right = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for n, chunk in enumerate(chunks):
        assert chunk.logprob == pytest.approx(right[len(ids) - 1 + n, chunk.token].item(), abs=1e-3)


def test_an_answer_that_is_cut_says_so(loaded):
    *_, last = phi3_mlx.stream_generate(*loaded, "Hi", schema=STORY, max_tokens=3)
    assert last.finish_reason == "length"


def test_a_conversation_is_held_to_a_form_message_by_message(loaded):
    chat = phi3_mlx.Conversation(*loaded)
    assert "".join(chunk.text for chunk in chat.send("Is a duck a bird?", choices="maybe so")) == "maybe so"
    assert "".join(chunk.text for chunk in chat.send("How many?", regex="[0-9]{2}", temperature=2.0)).isdecimal()
    assert len("".join(chunk.text for chunk in chat.send("Tell me a story.", max_tokens=20))) > 2


# ------------------------------------------------------------------------------------- where a schema comes from


class Color(enum.Enum):
    RED = "red"
    BLUE = 3


@dataclasses.dataclass
class Leaf:
    color: Color
    size: float
    tags: dict[str, int]


@dataclasses.dataclass
class Tree:
    name: str
    leaves: list[Leaf]
    pair: tuple[int, bool]
    kind: Literal["oak", 7]
    parent: Tree | None = None
    notes: list[Any] = dataclasses.field(default_factory=list)
    hidden: int = dataclasses.field(default=3, init=False)


class Duck(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=9)
    age: int = pydantic.Field(ge=0, lt=20)
    friends: list[Duck] = pydantic.Field(max_length=1)


def test_a_dataclass_is_a_schema(loaded):
    schema = json.loads(schema_text(Tree, "schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    right = {"name": "a", "leaves": [{"color": 3, "size": 1.5, "tags": {"a": 1}}], "pair": [1, True], "kind": 7}
    jsonschema.validate({**right, "parent": right, "notes": [1, {}]}, schema)
    for wrong in (
        {"name": 3}, {"leaves": [{}]}, {"pair": [1]}, {"pair": [1, True, 2]}, {"kind": 8}, {"other": 1}, {"hidden": 3},
    ):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**right, **wrong}, schema)
    assert set(right) == set(schema["$defs"][schema["$ref"].removeprefix("#/$defs/")]["required"])
    drawn = [drawn_at_random(loaded[1], Request(schema=Leaf), np.random.default_rng(seed)) for seed in range(8)]
    assert all(Leaf(**json.loads(answer)) for answer in drawn if answer)
    assert any(drawn)


def test_a_pydantic_model_is_a_schema(loaded):
    drawn = [drawn_at_random(loaded[1], Request(schema=Duck), np.random.default_rng(seed)) for seed in range(8)]
    assert all(Duck.model_validate_json(answer) for answer in drawn if answer)
    assert any(drawn)


def test_a_pydantic_model_without_a_schema_is_refused_in_one_line():
    model = pydantic.create_model("Model", field=(Callable, ...))
    with pytest.raises(OptionError, match=r"^schema: Model has no JSON schema: ") as caught:
        Request(schema=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hint", [set[int], dict[int, str], complex, "Nowhere"])
def test_a_type_that_json_has_no_form_for_is_refused(hint):
    kind = dataclasses.make_dataclass("Kind", [("field", hint)])
    with pytest.raises(OptionError, match=r"^schema(: the types of Kind| has a field of type)"):
        Request(schema=kind)


def test_a_type_has_the_schema_that_says_it():
    assert schema_of(int | None, "x") == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert schema_of(list, "x") == {"type": "array", "items": {}}
    assert schema_of(tuple[int, ...], "x") == {"type": "array", "items": {"type": "integer"}}
    assert schema_of(dict[str, bool], "x") == {"type": "object", "additionalProperties": {"type": "boolean"}}


def test_an_answer_that_cannot_be_followed_further_fails_alone(loaded):
    model, tokenizer = loaded
    branches = [{"type": "object", "properties": {f"k{n}": {"const": n}}} for n in range(500)]
    with pytest.raises(Phi3Error, match=r"^the constraint cannot be followed further"):
        phi3_mlx.generate(model, tokenizer, "A duck.", schema={"anyOf": branches})
    forms = [Request(schema={"anyOf": branches}).form, Request(schema=STORY).form]
    runs = Scheduler(model)
    ids = phi3_mlx.encode_prompt(tokenizer, "A duck.")
    rows = [
        runs.submit(Job(ids, 80, stop_ids=tokenizer.stop_ids, processors=[Constraint(matchers(form, tokenizer, 1)[0])]))
        for form in forms
    ]
    while runs.busy:
        runs.step()
    assert isinstance(rows[0].error, Phi3Error)
    assert rows[1].error is None
    assert tokenizer.decode(rows[1].answer) == phi3_mlx.generate(model, tokenizer, ids, schema=STORY, max_tokens=80)


# ------------------------------------------------------------------------------------- the command line


def said(capsys, *words):
    code = 0
    try:
        main([*words])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_takes_a_schema_as_text_or_file_and_the_other_forms(capsys, tmp_path):
    schema = {"type": "object", "properties": {"n": {"const": 5}}, "required": ["n"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "grammar.lark").write_text('start: "a" b\nb: "b"+ "c"')
    for given_schema in (json.dumps(schema), str(tmp_path / "schema.json")):
        assert said(capsys, "generate", "-p", "Hi", "--schema", given_schema)[:2] == (0, '{"n":5}\n')
    assert re.fullmatch("ab+c\n", said(capsys, "generate", "-p", "Hi", "--grammar", str(tmp_path / "grammar.lark"))[1])
    assert said(capsys, "generate", "-p", "Hi", "--choices", "maybe,perhaps")[1] in ("maybe\n", "perhaps\n")
    assert said(capsys, "generate", "-p", "Hi", "--regex", "x{3}")[1] == "xxx\n"


def test_an_answer_that_is_cut_before_it_has_its_form_is_told(capsys):
    words = ("generate", "-p", "Hi", "--max-tokens", "3")
    cut = "note: the answer was cut after 3 tokens, and may not have its form; give a larger --max-tokens\n"
    assert said(capsys, *words, "--regex", "x{99}")[2] == cut
    assert said(capsys, *words, "--regex", "x")[2] == said(capsys, *words)[2] == ""


def test_a_file_that_is_no_schema_is_named(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("Dear Ada")
    code, out, err = said(capsys, "generate", "-p", "Hi", "--schema", str(tmp_path / "notes.txt"))
    assert (code, out) == (2, "")
    assert err.startswith(f"phi3-mlx: --schema {tmp_path / 'notes.txt'} is no JSON: Expecting value")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schema", "{a"], "--schema is no JSON: Expecting property name"),
        (["--schema", "nowhere.json"], "nowhere.json cannot be read: No such file or directory"),
        (["--schema", '{"not": {}}'], '--schema has "not", which cannot be constrained; leave it out'),
        (["--regex", "a("], "--regex 'a(' is no regular expression: unclosed group, at character 2"),
        (["--regex", "a", "--choices", "a"], "--regex has no place beside choices: an answer follows one alone"),
    ],
)
def test_a_fault_is_one_line_before_a_model_is_looked_for(capsys, monkeypatch, words, message):
    monkeypatch.setattr("phi3_mlx.store.hub.resolve", lambda *_: pytest.fail("looked for a model"))
    _, out, err = said(capsys, "generate", "-p", "Hi", *words)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"phi3-mlx: {message}")


# ------------------------------------------------------------------------------------- the page


def test_the_examples_of_the_page_run(capsys):
    page = (ROOT / "docs/schemas.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.S | re.M)
    (python,) = [block for kind, block in blocks if kind == "python"]
    module = type(sys)("example")
    sys.modules["example"] = module
    try:
        exec(compile(python, "schemas.md", "exec"), module.__dict__)
    finally:
        del sys.modules["example"]
    animal, choice, frog, friends = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Animal\(kind='(duck|frog|owl)', age=[123], wild=(True|False)\)", animal)
    assert choice in ("yes", "no, a duck is a fish")
    assert re.fullmatch("A frog is (green|brown)( and (small|big))?[.]", frog)
    assert re.fullmatch("The (duck|frog|owl)( and the (duck|frog|owl))? are (friends|happy).", friends)
    import shlex

    lines = itertools.chain.from_iterable(block.splitlines() for kind, block in blocks if kind == "shell")
    commands = [shlex.split(line)[1:] for line in lines]
    assert len(commands) == 3
    answers = [said(capsys, *words)[1].strip() for words in commands]
    assert sorted(json.loads(answers[0])) == ["age", "name"]
    assert re.fullmatch("[0-2][0-9]:[0-5][0-9]", answers[1])
    assert answers[2] in ("yes", "no")


def test_faults_that_the_page_shows_are_those_that_are_said():
    page = (ROOT / "docs/schemas.md").read_text(encoding="utf-8")
    for wrong in ({"regex": "ab("}, {"schema": {"not": {}}}):
        with pytest.raises(OptionError) as caught:
            Request(**wrong)
        assert f"```text\n{caught.value}\n```" in page
