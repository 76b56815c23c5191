"""JSON of strangers: what is read, what is refused, and that every refusal is one line that names the place."""

import json
import math

import pytest

from phi3_mlx.errors import CheckpointError
from phi3_mlx.fields import DEEPEST, Fields, kind_of, parse, shorten
from phi3_mlx.files import json_text


@pytest.mark.parametrize(
    "value", [None, True, 0, -7, 1.5, "a", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), [], {}]
)
def test_ordinary_json_is_read_as_python_reads_it(value):
    nested = {"a": [value, {"b": value}], "": value}
    assert parse(json.dumps(nested)) == nested
    assert parse(json.dumps(nested, ensure_ascii=False)) == nested


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ('{"a":' * 2_000 + "1" + "}" * 2_000, "nested deeper than 64 levels"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper than 64 levels"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' is given twice, with different values"),
        ('["\\ud83d"]', "half a character"),
        ('{"\\uDE00": 1}', "half a character"),
    ],
)
def test_what_is_refused_has_a_reason_on_one_line(text, why):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_files_name_that_is_not_utf8_comes_back():
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    for text in (json.dumps({"name": name, "n": 1}), json_text({"name": name, "n": 1})):
        fields = Fields(parse(text), "x.json", CheckpointError)
        assert fields.path("name") == name
        with pytest.raises(CheckpointError, match=r"name is .*, expected a text without half a character"):
            fields.text("name")


def test_what_is_odd_and_has_one_meaning_is_read():
    assert parse("[" * DEEPEST + "]" * DEEPEST) is not None
    assert parse('{"a": 1, "a": 1}') == {"a": 1}
    assert parse('"\\\\ud83d"') == "\\ud83d"  # a backslash, and letters
    assert parse(str(2**62)) == 2**62
    assert type(parse(str(2**64 - 1))) is int
    assert type(parse(str(2**64))) is float


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "-1.5E400", "9" * 400, "9" * 5_000, '"\\udc80"'])
def test_what_cannot_be_written_again_is_refused_where_that_matters(text, strict):
    if not strict:
        parse(text)
        return
    with pytest.raises(ValueError, match=r"no number of JSON|too large|half a character") as caught:
        parse(text, strict=True)
    assert len(str(caught.value)) < 100


def test_numbers_are_the_same_where_all_can_be_written_again():
    text = f"[0, -0, 1.5, -2e3, 1E5, {2**64 - 1}, {2**64}]"
    assert repr(parse(text, strict=True)) == repr(parse(text))


@pytest.mark.parametrize("digits", [20, 400, 5_000, 100_000])
def test_a_number_of_many_digits_is_a_float_that_no_one_takes_for_a_count(digits):
    fields = Fields({"n": parse("9" * digits)}, "x.json", CheckpointError)
    with pytest.raises(CheckpointError, match=r"n is .*, expected a whole number"):
        fields.whole("n")


FIELDS = Fields(
    {
        "number": 2.5,
        "whole": 3,
        "flag": False,
        "text": "a",
        "object": {"inner": {"n": "x"}},
        "null": None,
    },
    "x.json",
    CheckpointError,
    "restore it",
)


def test_values_of_the_asked_type_are_given():
    assert FIELDS.number("number") == 2.5
    assert FIELDS.number("whole") == 3.0
    assert FIELDS.whole("whole", most=3) == 3
    assert FIELDS.flag("flag") is False
    assert FIELDS.text("text") == "a"
    assert FIELDS.fields("object").raw == {"inner": {"n": "x"}}


def test_what_is_null_or_absent_is_the_default():
    for key in ("null", "absent"):
        assert FIELDS.number(key, 1.0) == 1.0
        assert FIELDS.whole(key, 1) == 1
        assert FIELDS.flag(key, True) is True
        assert FIELDS.text(key, "b") == "b"
        assert FIELDS.fields(key).raw == {}
        with pytest.raises(CheckpointError, match=rf"x.json: {key} is missing, expected a text; restore it"):
            FIELDS.text(key)


@pytest.mark.parametrize("value", [None, True, 1, 2.5, "a", [1], ["a"], {"a": 1}, math.nan, math.inf, -1, 2**31, 1e39])
def test_a_value_of_another_type_is_refused_by_name(value):
    fields = Fields({"key": value}, "x.json", CheckpointError)
    takes = {
        "number": lambda: fields.number("key"),
        "whole": lambda: fields.whole("key"),
        "flag": lambda: fields.flag("key"),
        "text": lambda: fields.text("key"),
        "object": lambda: fields.fields("key"),
    }
    right = {
        "number": type(value) in (int, float) and abs(value) < 3e38,
        "whole": value == 1 and type(value) is int,
        "flag": type(value) is bool,
        "text": type(value) is str,
        "object": value is None or type(value) is dict,
    }
    for name, take in takes.items():
        if right[name]:
            take()
        else:
            with pytest.raises(CheckpointError, match=r"x.json: key is .*, expected "):
                take()


def test_a_refusal_names_the_whole_way_to_a_key():
    with pytest.raises(CheckpointError, match=r"x.json: object.inner.n is 'x', expected a number; restore it"):
        FIELDS.fields("object").fields("inner").number("n")
    with pytest.raises(CheckpointError, match="expected a number from 3 to 3e"):
        FIELDS.number("number", least=3)


@pytest.mark.parametrize(
    "value", ["a" * 5000, 10**4000, [10**5000], list(range(5000)), {"a" * 500: "b" * 500}, "\x1b[31m\n", 1e308]
)
def test_a_value_is_shown_on_one_short_line(value):
    for text in (shorten(value), shorten(value, quote=False)):
        assert len(text) <= 120
        assert text.isprintable()


def test_types_have_the_names_of_json():
    named = {"null": None, "true or false": True, "a number": 1, "a text": "", "an empty list": [], "an object": {1: 2}}
    assert {name: kind_of(value) for name, value in named.items()} == {name: name for name in named}


def test_numbers_at_the_ends_of_what_is_usual():
    fields = Fields({"none": 0, "most": 2**31 - 1, "more": 2**31, "large": 4e38}, "x.json", CheckpointError)
    assert [fields.whole("none"), fields.whole("most"), fields.number("most")] == [0, 2**31 - 1, 2.0**31 - 1]
    for take in (lambda: fields.whole("more"), lambda: fields.number("large")):  # float32 ends at 3.4e38
        with pytest.raises(CheckpointError, match="expected a"):
            take()
