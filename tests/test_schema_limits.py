"""What the library would take another way: refused by name, or said so that answers are valid."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from tokenizer_samples import TINY, tiktoken_ranks

from phi3_mlx import fields
from phi3_mlx.errors import OptionError
from phi3_mlx.generation.request import Request
from phi3_mlx.server import shared_fields
from phi3_mlx.text import grammar, schema_limits, spelling, tool_grammar
from phi3_mlx.text.grammar import check_form, matchers
from phi3_mlx.text.schema_limits import as_followed
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.text.tool_use import use_tools

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(TINY)


def allows(tokenizer, schema, text):
    """Whether it may be a whole answer; spelled in byte tokens."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    mask = matchers(Request(schema=schema).form, tokenizer, 1)[0].allowed(ids)
    return mask is not None and bool(mask[min(tokenizer.stop_ids)])


def only_answer(tokenizer, schema):
    """What a schema that leaves one value is answered with."""
    matcher, answer = matchers(Request(schema=schema).form, tokenizer, 1)[0], []
    while ids := [int(token) for token in matcher.allowed(answer).nonzero()[0] if token not in tokenizer.stop_ids]:
        answer.append(max(ids, key=lambda token: len(tokenizer.token_bytes(token))))
    return tokenizer.decode(answer)


# -2**63 crashes the library; the others would be written as another value.
CHANGED = [-(2**63), -(2**63) + 1000, 2**53 + 1, 12345678901234567890, 250174995.22950518, 1e23, 5e-324, "a\0b", "\x7f"]


@pytest.mark.parametrize("value", CHANGED)
@pytest.mark.parametrize(
    "place",
    [
        lambda value: {"const": value},
        lambda value: {"enum": [3, value]},
        lambda value: {"properties": {"const": {"const": [{"a": value}]}}},
        lambda value: {"$defs": {"d": {"enum": [value]}}, "$ref": "#/$defs/d"},
    ],
)
def test_a_value_that_would_be_written_as_another_is_refused_by_name(value, place):
    schema = place(value)
    with pytest.raises(OptionError, match=r'^schema has "(const|enum)" with .*, which cannot be constrained exactly'):
        Request(schema=schema)
    with pytest.raises(OptionError, match=r'^grammar has "(const|enum)" with '):
        Request(grammar=f"start: %json {json.dumps(schema)}")
    tool = {"name": "t", "parameters": {"type": "object", "properties": {"a": schema}}}
    with pytest.raises(OptionError, match=r'^tools t: parameters has "(const|enum)" with '):
        check_form(use_tools(read_tokenizer(TINY), [tool]).form())


def test_what_crashes_the_library_does_not_reach_it():
    code = "from phi3_mlx.generation.request import Request; Request(schema={'anyOf': [{'const': -2**63}]})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("phi3_mlx.errors.OptionError: schema has")


EXACT = [
    2**53,
    -(2**53),
    0.1,
    3.141592653589793,
    1e22,
    1.5e-10,
    -0.0,
    1.0,
    "\b\f\n\r\t",
    "/\u2028\ufffe",
    "😀",
    [1, {"a": "é"}],
]


@pytest.mark.parametrize("value", EXACT)
def test_all_other_values_are_written_as_they_are(tokenizer, value):
    assert json.loads(only_answer(tokenizer, {"const": value})) == value


def test_numbers_of_any_length_are_written_as_they_are_or_refused(tokenizer):
    rng, kept = np.random.default_rng(0), 0
    for _ in range(60):
        value = round(float(rng.normal() * 10.0 ** rng.integers(-5, 12)), int(rng.integers(0, 12)))
        try:
            answer = only_answer(tokenizer, {"const": value})
        except OptionError:
            assert len(repr(value).strip("-0.")) > 15
            continue
        assert json.loads(answer) == value
        kept += 1
    assert kept > 30


def test_days_and_seconds_are_those_of_a_calendar_and_a_clock(tokenizer):
    for year in (1, 4, 100, 400, 1900, 1999, 2000, 2023, 2024, 9999):
        leaps = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        for day, exists in (("02-28", True), ("02-29", leaps), ("04-31", False), ("12-31", True), ("03-30", True)):
            date = f"{year:04}-{day}"
            assert allows(tokenizer, {"type": "string", "format": "date"}, f'"{date}"') is exists
            assert allows(tokenizer, {"format": "date-time"}, f'"{date}T09:00:59Z"') is exists
            if exists:
                datetime.date.fromisoformat(date)
    assert not allows(tokenizer, {"format": "date"}, '"0000-01-01"')
    assert not allows(tokenizer, {"format": "date-time"}, '"2024-01-01T09:00:60Z"')
    assert not allows(tokenizer, {"format": "time"}, '"09:00:60Z"')
    assert allows(tokenizer, {"format": "time"}, '"09:00:59Z"')
    with_pattern = {"anyOf": [{"format": "date", "pattern": "^2", "allOf": [{"pattern": "1$"}]}, {"type": "null"}]}
    for text, valid in (('"2023-03-31"', True), ('"2023-03-30"', False), ('"1999-03-31"', False), ("null", True)):
        assert allows(tokenizer, with_pattern, text) is valid


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, ["0", "-1", "8999999999999999999"], ["9223372036854775808"]),
        ({"minimum": 0, "maximum": 2**64 - 1}, ["0", "8999999999999999999"], ["-1", "18446744073709551616"]),
        ({"minimum": 2**53 + 1}, ["9007199254740994"], ["9007199254740992"]),
        ({"exclusiveMaximum": -(2**53) - 1}, ["-9007199254740996"], ["-9007199254740993", "-9007199254740992"]),
        ({"minimum": -3, "exclusiveMaximum": 4}, ["-3", "3"], ["-4", "4"]),
    ],
)
def test_limits_of_64_bits_are_followed_and_none_is_passed(tokenizer, limits, inside, outside):
    schema = {"type": "integer", **limits}
    assert [text for text in inside + outside if allows(tokenizer, schema, text)] == inside


def test_limits_go_inward_and_by_no_more_than_they_must():
    assert as_followed({"minimum": 0.30000000000000004}) == {"minimum": 0.300000000000001}
    assert as_followed({"maximum": 0.30000000000000004}) == {"maximum": 0.3}
    same = {"minimum": -0.25, "maximum": 2**53, "exclusiveMinimum": True, "properties": {"minimum": {"maximum": 1e15}}}
    assert as_followed(same) == same
    value = {"const": {"format": "date", "minimum": 2**60 + 1}, "enum": [{"maximum": 2**60 + 1}]}
    assert as_followed(value) == value


def test_half_a_character_is_refused_in_a_line():
    for half in ("\ud800", "\udc80"):
        with pytest.raises(OptionError, match=r"^schema (has|is no JSON: it has) half a character"):
            Request(schema={"properties": {half: {}}})
        with pytest.raises(OptionError, match=r"^schema (has|is no JSON: it has) half a character"):
            Request(schema=json.dumps({"const": half}))
        with pytest.raises(OptionError, match=r"^tool t: parameters has half a character"):
            use_tools(read_tokenizer(TINY), [{"name": "t", "parameters": {"properties": {half: {}}}}])


@pytest.mark.parametrize(
    "given", [{"schema": {"$ref": "#"}}, {"grammar": 'start: start "a"'}, {"schema": {"anyOf": [{"$ref": "#"}]}}]
)
def test_what_no_text_fits_is_refused_before_a_prompt_is_read(tokenizer, given, tmp_path):
    for vocabulary in (tokenizer, read_tokenizer(tiktoken_ranks(tmp_path))):
        with pytest.raises(OptionError, match=r"^the constraint cannot be followed further: no text fits it$"):
            matchers(Request(**given).form, vocabulary, 1)


def test_thousands_of_choices_are_followed(tokenizer):
    choices = [str(n) for n in range(5000)]
    matcher, answer = matchers(Request(choices=choices).form, tokenizer, 1)[0], []
    while not set(ids := [int(token) for token in matcher.allowed(answer).nonzero()[0]]) <= tokenizer.stop_ids:
        answer.append(next(token for token in ids if token not in tokenizer.stop_ids))
    assert tokenizer.decode(answer) in choices


def test_the_page_lists_the_limits_that_hold():
    page = (ROOT / "docs" / "schemas.md").read_text()
    listed = dict(re.findall(r"^\| (.*?) \| ([\d,·^]+)(?:, either way)? \|$", page, re.M))
    characters, power = grammar._MOST_CHARACTERS, "9·10^18"
    assert listed == {
        "characters of a schema": f"{characters['schema']:,}",
        "characters of all tools": f"{characters['tools']:,}",
        "characters of all choices, as JSON": f"{characters['choices']:,}",
        "characters of a regular expression": f"{characters['regex']:,}",
        "characters of a grammar": f"{characters['grammar']:,}",
        "objects and lists within each other, in a schema": f"{fields.DEEPEST}",
        "a limit of a number (`minimum` and the like)": power,
        "a whole number in `const` or `enum`": "2^53",
        "`multipleOf`, without its point and the zeros at its end": f"{schema_limits.LARGEST_MULTIPLE:,}",
        "calls in one answer": f"{tool_grammar.MOST_CALLS}",
        "choices of a request to the server": f"{shared_fields._MOST_CHOICES}",
        "stop strings of a request to the server": f"{shared_fields._MOST_STOPS}",
        "token ids in `logit_bias` of a request to the server": f"{shared_fields._MOST_BIASES:,}",
        "characters of all choices, or all stop strings, of a request to the server": (
            f"{shared_fields._MOST_TEXT_CHARACTERS:,}"
        ),
    }
    assert schema_limits._LARGEST == 9 * 10**18
    assert schema_limits._EXACT == 2**53
    kept = f"{spelling._FORMS_KEPT} of them and {spelling._CHARACTERS_KEPT:,} characters"
    assert kept in page


@pytest.mark.parametrize(
    ("schema", "multiple"),
    [
        ({"type": "integer", "multipleOf": 123457}, "123457"),
        ({"type": "number", "multipleOf": 1.23457e-20}, "123457"),
        ({"type": "integer", "allOf": [{"multipleOf": 251}, {"multipleOf": 257}]}, "64507"),
        ({"type": "number", "multipleOf": 0.0251, "anyOf": [{"multipleOf": 257}]}, "64507"),
        ({"items": {"multipleOf": 10**300 + 1}}, "1000"),
    ],
)
def test_a_multiple_that_would_take_long_to_tell_is_refused(schema, multiple):
    with pytest.raises(OptionError, match=rf'^schema has "multipleOf" of .?{multiple}.*, .* at most 50,000 can be'):
        Request(schema=schema)


@pytest.mark.parametrize("multiple", [49999, 0.01, 2_500_000, 5e4, 0.5])
def test_other_multiples_are_told_in_time(tokenizer, multiple):
    apart = {
        "type": "object",
        "properties": {"a": {"type": "number", "multipleOf": multiple}, "b": {"multipleOf": 9973}},
    }
    began = time.process_time()
    Request(schema=apart)
    matchers(Request(schema={"type": "number", "multipleOf": multiple}).form, tokenizer, 1)
    assert time.process_time() - began < 20  # 123457 takes a minute
