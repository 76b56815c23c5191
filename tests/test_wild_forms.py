"""Forms as a stranger may send them, most of them odd: each is followed, or refused in one line that says why."""

import json
import random

import pytest
from tokenizer_samples import TINY

from phi3_mlx.errors import Phi3Error
from phi3_mlx.generation.request import Request
from phi3_mlx.text.grammar import matchers
from phi3_mlx.text.tokenizer import read_tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

VALIDATOR = jsonschema.Draft202012Validator
NAMES = ["a", "é", "日本", "a b", "", '"q"', "\\", "\n", "$ref", "😀", "__proto__", "type", "\u200b", "A/B~1"]
LIMITS = [0, 1, -1, 2, 5, 0.5, -3.25, 1e3, 1e-3, 10**15, -(10**17), 1e20]
FORMATS = "date date-time time email uuid ipv4 ipv6 uri hostname duration regex unknown".split()
PATTERNS = ["^[a-z]{1,4}$", "a|b", "^é+$", "^(ab)*$", r"\d{2}", "^(?=a)", "(", r"^\w{1,3}$", r"\bword\b"]
VALUES = [1, "a", "é", None, True, 1.5, [1], {"a": 1}, '"', "\\", 1e300, "\x01", "\u2028", {"é": [1, 2]}, [], {}, 0.1]
REFERENCES = ["#", "#/$defs/A", "#/$defs/B", "#/$defs/é", "#/$defs/nothing", "http://x/y"]
REFUSED = ["not", "if", "contains", "propertyNames", "dependentRequired", "unevaluatedProperties"]


def schema(rng, depth):
    """A schema, perhaps one that nothing fits, or that is none."""
    simple = [
        lambda: rng.choice([True, {}, {"type": "null"}, {"type": "boolean"}, {"type": "strange"}, {"type": []}]),
        lambda: {"type": rng.choice(["integer", "number"]), **limits(rng)},
        lambda: {"type": "string", "minLength": rng.randrange(4), "maxLength": rng.randrange(8)},
        lambda: {"type": "string", "format": rng.choice(FORMATS)},
        lambda: {"type": "string", "pattern": rng.choice(PATTERNS)},
        lambda: {"enum": rng.choices(VALUES, k=rng.randrange(1, 4))},
        lambda: {"const": rng.choice(VALUES)},
        lambda: {"$ref": rng.choice(REFERENCES)},
        lambda: {"type": ["string", "null"], "maxLength": 3},
    ]
    nested = [lambda: an_object(rng, depth)] * 4 + [
        lambda: {"type": "array", "items": schema(rng, depth - 1), "maxItems": rng.randrange(4)},
        lambda: {"prefixItems": several(rng, depth), "items": schema(rng, depth - 1), "maxItems": 3},
        lambda: {rng.choice(["anyOf", "oneOf", "allOf"]): several(rng, depth)},
        lambda: {**an_object(rng, depth), rng.choice(["anyOf", "allOf"]): several(rng, depth)},
        lambda: {"type": "object", rng.choice(REFUSED): schema(rng, depth - 1)},
    ]
    return rng.choice(simple + nested * 2 if depth else simple)()


def several(rng, depth):
    return [schema(rng, depth - 1) for _ in range(rng.randrange(4))]


def limits(rng):
    names = rng.sample(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"], rng.randrange(3))
    multiple = {"multipleOf": rng.choice([1, 2, 3, 0.5, 0.01, 7, 12])} if rng.random() < 0.3 else {}
    return {**{name: rng.choice(LIMITS) for name in names}, **multiple}


def an_object(rng, depth):
    names = rng.sample(NAMES, rng.randrange(4))
    others = rng.choice([False, False, True, {"type": "integer", "minimum": 0, "maximum": 9}])
    made = {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": others,
    }
    if rng.random() < 0.2:
        made["patternProperties"] = {rng.choice(["^x", "[0-9]", "^é"]): schema(rng, depth - 1)}
    if rng.random() < 0.2:
        made[rng.choice(["minProperties", "maxProperties"])] = rng.randrange(3)
    return made


def answered(form, tokenizer, rng, most):
    """An answer drawn at random that comes to its end, or None. Raises Phi3Error where the form is refused."""
    (matcher,), ids = matchers(form, tokenizer, 1), []
    while len(ids) < most:
        allowed = [int(token) for token in matcher.allowed(ids).nonzero()[0]]
        assert allowed
        stops = [token for token in allowed if token in tokenizer.stop_ids]
        if stops and rng.random() < 0.6:
            return tokenizer.decode(ids)
        ids.append(rng.choice([token for token in allowed if token not in tokenizer.stop_ids] or stops))
        if ids[-1] in tokenizer.stop_ids:
            return tokenizer.decode(ids[:-1])
    return None


def test_hundreds_of_odd_schemas_are_followed_or_refused_in_a_line():
    tokenizer, valid, refused = read_tokenizer(TINY), 0, []
    for seed in range(300):
        rng = random.Random(seed)
        made = schema(rng, 3)
        made = {**(made if isinstance(made, dict) else {}), "$defs": {"A": schema(rng, 1), "B": schema(rng, 1)}}
        try:
            answer = answered(Request(schema=made).form, tokenizer, rng, 100)
        except Phi3Error as error:
            refused.append(str(error))
            continue
        if answer is None:
            continue
        try:
            VALIDATOR(made, format_checker=VALIDATOR.FORMAT_CHECKER).validate(json.loads(answer))
        except jsonschema.ValidationError as error:
            raise AssertionError(f"{seed}: {answer} does not fit {json.dumps(made)}") from error
        valid += 1
    assert valid > 80
    assert len(refused) > 60
    assert [text for text in refused if "\n" in text or len(text) > 300] == []


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "(((a{1,99}){1,99}){1,99}){1,99}"},
        {"regex": "(a?){500}a{500}"},
        {"regex": ".{1,100000}"},
        {"regex": "((a|b)*c|(a|d)*e){50}"},
        {"regex": ""},
        {"grammar": 'start: "x"{99999999}'},
        {"grammar": "start: a\na: b\nb: a"},
        {"grammar": 'start: start "a" | "b"'},
        {"grammar": "start:"},
        {"grammar": ""},
        {"grammar": "start: %json {"},
        {"grammar": "start: @other"},
        {"choices": ["a", "ab", "abc", "a"]},
        {"choices": [" a", "a ", "a\n"]},
        {"choices": ["é", "e\u0301", "<|end|>", "\u2028"]},
        {"choices": ["a" * 9000, "a" * 8999 + "b"]},
    ],
    ids=lambda given: repr(given)[:40],
)
def test_odd_forms_of_other_kinds_are_followed_or_refused_in_a_line(given):
    told, answer = "", None
    try:
        answer = answered(Request(**given).form, read_tokenizer(TINY), random.Random(0), 60)
    except Phi3Error as error:
        told = str(error)
    assert "\n" not in told
    assert answer is None or answer in given.get("choices", [answer])


@pytest.mark.parametrize("regex", ["\\", "a\\", "ab\\\\\\"])
def test_a_regular_expression_that_ends_within_an_escape_is_refused(regex):
    with pytest.raises(Phi3Error, match=rf"incomplete escape sequence, at character {len(regex)}$"):
        Request(regex=regex)
    assert Request(regex=f"{regex}\\").regex == f"{regex}\\"
