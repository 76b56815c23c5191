"""Tools as OpenAI's JSON and as Python functions: how they are described, called, and refused."""

import dataclasses
import enum
import functools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Optional, TypedDict

import jsonschema
import pydantic
import pytest

from phi3_mlx.errors import OptionError
from phi3_mlx.text.functions import docstring
from phi3_mlx.text.python_values import as_result
from phi3_mlx.text.tools import Tool, read_choice, read_tools


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


@dataclasses.dataclass
class Place:
    name: str
    floor: int = 0


class Range(TypedDict, total=False):
    low: float
    high: float


class Point(pydantic.BaseModel):
    x: int
    y: int = 0


def weather(city: str, days: list[int], unit: Unit = Unit.CELSIUS, detail: Literal["short", "long"] = "short") -> str:
    """Tells the weather
    of a city.

    It asks nobody.

    Args:
        city: The city's name,
            in English.
        days (list of int): Which days: 0 is today.
        unit: Of the temperature.

    Returns:
        A sentence.
    """
    return f"{city} {days} {unit.name} {detail}"


def test_a_function_is_described_by_its_hints_and_its_docstring():
    tool = Tool.of(weather)
    assert tool.json == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of a city.\n\nIt asks nobody.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city's name, in English."},
                    "days": {"type": "array", "items": {"type": "integer"}, "description": "Which days: 0 is today."},
                    "unit": {"enum": ["c", "f"], "description": "Of the temperature."},
                    "detail": {"enum": ["short", "long"], "default": "short"},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }


def parameter(hint, **default):
    def tool(value):
        return value

    tool.__annotations__ = {"value": hint}
    tool.__defaults__ = tuple(default.values()) or None
    return Tool.of(tool)


HINTS = {
    "str": (str, ["a", ""], [1, None]),
    "int": (int, [1, -3], [1.5, "1", True]),
    "float": (float, [1.5, 2], ["1", True]),
    "bool": (bool, [True], [0, "true"]),
    "None": (None, [None], [0]),
    "Any": (Any, [None, [1], {"a": 1}], []),
    "list": (list, [[], [1, "a"]], [{}]),
    "list[int]": (list[int], [[], [1]], [["a"]]),
    "Sequence": (Sequence[str], [["a"]], ["a"]),
    "dict": (dict[str, int], [{"a": 1}, {}], [{"a": "b"}, []]),
    "Literal": (Literal["a", 1, None], ["a", 1, None], ["b", 2, True]),
    "Optional": (Optional[int], [1, None], ["a"]),  # noqa: UP045 - as older code has it
    "union": (int | str | list[bool], [1, "a", [True]], [1.5, [1]]),
    "Annotated": (Annotated[int, "How many."], [1], ["a"]),
    "nested": (dict[str, list[int | None]], [{"a": [1, None]}], [{"a": ["b"]}]),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_has_a_schema_that_takes_its_values_alone(name):
    hint, right, wrong = HINTS[name]
    tool = parameter(hint)
    validator = jsonschema.Draft202012Validator(tool.parameters)
    for value in right:
        validator.validate({"value": value})
        assert tool.call({"value": value}) == value
    for value in wrong:
        assert not validator.is_valid({"value": value}), value
        with pytest.raises(ValueError, match=r"is (no|none of|of none of) "):
            tool.call({"value": value})


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (Unit, "f", Unit.FAHRENHEIT),
        (list[Unit], ["c"], [Unit.CELSIUS]),
        (Place, {"name": "hall"}, Place("hall")),
        (Place | None, {"name": "hall", "floor": 2}, Place("hall", 2)),
        (dict[str, Place], {"a": {"name": "b"}}, {"a": Place("b")}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple[int, ...], [1, 2], (1, 2)),
        (Range, {"low": 1}, {"low": 1.0}),
        (Point, {"x": 1}, Point(x=1)),
        (list[Point], [{"x": 1, "y": 2}], [Point(x=1, y=2)]),
        (float, 3, 3.0),
    ],
)
def test_arguments_become_what_the_hints_say(hint, value, expected):
    tool = parameter(hint)
    jsonschema.Draft202012Validator(tool.parameters).validate({"value": value})
    given = tool.call({"value": value})
    assert given == expected
    assert type(given) is type(expected)


def test_what_annotated_says_describes_a_parameter():
    def f(n: Annotated[int, "How many.", 3], m: int = 4):
        """Counts.

        Args:
            n: not this
            m: How much.
        """

    properties = Tool.of(f).parameters["properties"]
    assert properties == {
        "n": {"type": "integer", "description": "How many."},
        "m": {"type": "integer", "description": "How much.", "default": 4},
    }


GOOGLE = """Adds.

Args:
    a (int, optional): The first,
        which is long.
    b: The second: a number.

Raises:
    ValueError: never
"""
NUMPY = """Adds.

Parameters
----------
a : int, optional
    The first,
    which is long.
b
    The second: a number.

Returns
-------
int
    The sum.
"""
SPHINX = """Adds.

:param int a: The first,
    which is long.
:type a: int
:param b: The second: a number.
:returns: the sum
    of both
"""


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_docstrings_of_three_kinds_say_the_same(text):
    assert docstring(text) == ("Adds.", {"a": "The first, which is long.", "b": "The second: a number."})


def test_a_plain_docstring_describes_the_function_alone():
    assert docstring("") == ("", {})
    assert docstring("Adds: two numbers.\n\nArgs of any size.") == ("Adds: two numbers.\n\nArgs of any size.", {})
    assert docstring("Adds.\n\nArgs:\n    a: One.\n\nBut: not that.") == ("Adds.", {"a": "One."})
    assert docstring("Adds.\n\nArgs:\n") == ("Adds.", {})


def test_methods_partials_and_objects_that_can_be_called_are_tools():
    class Shop:
        def price(self, item: str) -> int:
            "The price."
            return len(item)

        def __call__(self, item: str) -> str:
            return item

    tools = read_tools([Shop().price, functools.partial(weather, "Rome"), Shop()])
    assert [tool.name for tool in tools] == ["price", "weather", "Shop"]
    assert [[*tool.parameters["properties"]] for tool in tools] == [
        ["item"],
        ["days", "unit", "detail"],
        ["item"],
    ]
    assert tools[0].call({"item": "tea"}) == 3


async def later(x: int) -> int:
    return x


async def steps_later(x: int):
    yield x


def steps(x: int):
    yield x


class Later:
    async def __call__(self, x: int) -> int:
        return x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, "a tool has the name '<lambda>'|x has no type hint"),
        (later, "tool later is a coroutine function; give a function that returns its result"),
        (steps_later, "tool steps_later is a generator function; give a function that returns its result"),
        (steps, "tool steps is a generator function; give a function that returns its result"),
        (Later(), "tool Later is a coroutine function; give a function that returns its result"),
        (functools.partial(later, 1), "tool later is a coroutine function"),
        (len, "tool len: "),
        (3, "3 is no function"),
    ],
)
def test_what_cannot_be_described_is_refused(function, message):
    with pytest.raises(OptionError, match=message):
        Tool.of(function)


def test_a_wrapper_that_waits_for_a_coroutine_is_a_function():
    @functools.wraps(later)
    def now(x: int) -> int:
        return x

    assert Tool.of(now).call({"x": 3}) == 3


def test_models_of_one_name_keep_their_own_fields():
    inner = [pydantic.create_model("Inner", x=(kind, ...)) for kind in (int, str)]
    first, second = (pydantic.create_model("Outer", inner=(kind, ...)) for kind in inner)

    def both(a: first, b: second, again: first) -> str:
        return f"{a.inner.x + 1}{b.inner.x.upper()}"

    tool = Tool.of(both)
    value = {"a": {"inner": {"x": 1}}, "b": {"inner": {"x": "s"}}, "again": {"inner": {"x": 2}}}
    jsonschema.validate(value, tool.parameters)
    for wrong in ({"a": value["b"]}, {"b": value["a"]}, {"again": value["b"]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**value, **wrong}, tool.parameters)
    assert tool.call(value) == "2S"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Corner(enum.Enum):
    LEFT = (0, 1)


def test_what_annotated_limits_is_refused_by_name():
    def described(x: Annotated[int, pydantic.Field(description="How many.")]): ...
    def limited(x: Annotated[int, pydantic.Field(ge=3)]): ...

    assert Tool.of(described).parameters["properties"] == {"x": {"type": "integer", "description": "How many."}}
    with pytest.raises(OptionError, match=r"^tool limited: x has the limits FieldInfo.*; give one$"):
        Tool.of(limited)
    (limit,) = pydantic.Field(ge=3).metadata
    limited.__annotations__["x"] = Annotated[int, limit]
    with pytest.raises(OptionError, match=r"^tool limited: x has the limits Ge\(ge=3\)"):
        Tool.of(limited)


def test_members_of_enums_are_told_by_their_values():
    def to(level: Level, least: Literal[Level.LOW, "none"]) -> str:
        return f"{level.name} {least!r}"

    tool = Tool.of(to)
    assert tool.parameters["properties"] == {"level": {"enum": [1, 2]}, "least": {"enum": [1, "none"]}}
    assert tool.call({"level": 2, "least": 1}) == f"HIGH {Level.LOW!r}"
    assert tool.call({"level": 1, "least": "none"}) == "LOW 'none'"

    def at(corner: Corner): ...

    with pytest.raises(OptionError, match=r"^tool at: corner has <enum 'Corner'>, whose values are not all texts"):
        Tool.of(at)


def test_parameters_that_cannot_be_described_are_refused_by_name():
    def no_hint(a, b: int): ...
    def rest(*numbers: int): ...
    def options(**more: int): ...
    def by_place(a: int, /): ...
    def raw(data: bytes): ...
    def unknown(a: "Nowhere"): ...  # noqa: F821

    for function, message in {
        no_hint: "tool no_hint: a has no type hint; give one",
        rest: r"tool rest: \*numbers: int cannot be described",
        options: r"tool options: \*\*more: int cannot be described",
        by_place: "tool by_place: a: int cannot be described",
        raw: "tool raw: data has a field of type <class 'bytes'>, which JSON has no form for",
        unknown: "tool unknown: its type hints cannot be read: name 'Nowhere' is not defined",
    }.items():
        with pytest.raises(OptionError, match=message) as caught:
            Tool.of(function)
        assert "\n" not in str(caught.value)


FUNCTION = {"name": "f", "description": "Does.", "parameters": {"type": "object", "properties": {"a": {}}}}


def test_openais_json_is_read_in_its_forms():
    for form in (
        {"type": "function", "function": FUNCTION},
        {"type": "function", "function": {**FUNCTION, "strict": True}},
        {"type": "function", **FUNCTION, "strict": None},  # of Responses
        FUNCTION,
    ):
        (tool,) = read_tools([form])
        assert tool.json == {"type": "function", "function": FUNCTION}
    assert read_tools(json.dumps([FUNCTION])) == read_tools([FUNCTION])
    assert read_tools(None) == read_tools([]) == []
    (bare,) = read_tools([{"name": "f", "description": None}])
    assert bare.json["function"] == {
        "name": "f",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    assert read_tools([bare]) == [bare]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (3, "tools is 3; expected a list of Python functions or of"),
        ("[", "tools is no JSON: "),
        ({"name": "f"}, "tools is a dict; expected a list"),
        ([{"type": "function"}], "a tool has no name; expected"),
        ([{"type": "web_search"}], "a tool has the type 'web_search'; functions alone are supported"),
        ([{"name": "a b"}], "a tool has the name 'a b'; give 1 to 64 letters, digits, '_', '-' or '.'"),
        ([{"name": ""}], "a tool has the name ''"),
        ([{"name": "f", "description": 3}], "tool f: description is 3; expected a text"),
        ([{"name": "f", "parameters": []}], "tool f: parameters is a list; expected the JSON schema of an object"),
        ([{"name": "f", "parameters": {"type": "array"}}], "tool f: parameters has the type 'array'"),
        ([{"name": "f", "parameters": {"a": {1}}}], "tool f: parameters holds what JSON has no form for"),
        ([{"name": "f", "returns": {}}], "tool 'f' has 'returns', which is no part of"),
        ([{"name": "f"}, {"name": "f"}], "tools has two tools named f"),
    ],
)
def test_what_is_no_tool_is_refused_in_a_line(tools, message):
    with pytest.raises(OptionError) as caught:
        read_tools(tools)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_choice_is_a_word_or_the_name_of_a_tool():
    tools = read_tools([FUNCTION])
    for choice in ("auto", "none", "required", "f"):
        assert read_choice(choice, tools) == choice
    assert read_choice({"type": "function", "function": {"name": "f"}}, tools) == "f"
    assert read_choice({"type": "function", "name": "f"}, tools) == "f"
    for wrong in ("g", 3, None, {"type": "function"}, {"name": "f"}, {"type": "function", "function": {"name": "g"}}):
        with pytest.raises(OptionError, match=r"^tool_choice is .*; choose auto, none, required, f$"):
            read_choice(wrong, tools)
    with pytest.raises(OptionError, match="'required', and there are no tools"):
        read_choice("required", [])
    assert read_choice("auto", []) == "auto"


def test_results_of_any_type_become_texts():
    assert as_result("a") == "a"
    assert as_result(None) == "null"
    assert as_result({"é": [1, 2.5, True]}) == '{"é": [1, 2.5, true]}'
    assert as_result([Place("hall"), Unit.CELSIUS, Point(x=1)]) == (
        '[{"name": "hall", "floor": 0}, "c", {"x": 1, "y": 0}]'
    )
    assert as_result({3}) == "[3]"
    with pytest.raises(TypeError, match="object has no form in JSON"):
        as_result(object())
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_result(float("nan"))


def test_a_tool_that_is_json_alone_cannot_be_called():
    (tool,) = read_tools([FUNCTION])
    with pytest.raises(OptionError, match="tool f has no function to call"):
        tool.call({})
