"""A conversation in which the model calls tools: they run, it is told their results, and it answers."""

from __future__ import annotations

import enum
import json
import re
from typing import Literal

import pytest
from conftest import ROOT

from phi3_mlx import Conversation, load
from phi3_mlx.errors import CacheError, OptionError
from phi3_mlx.generation.tool_turns import ToolTurn
from phi3_mlx.text.tool_use import use_tools

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


@pytest.fixture
def conversation(loaded):
    return Conversation(*loaded)


def answer(chunks):
    return "".join(chunk.text for chunk in chunks)


def roles(conversation):
    return [message["role"] for message in conversation.messages]


def clock():
    made = []

    def now(late: bool) -> dict[str, list[int]]:
        "The time."
        made.append(late)
        return {"time": [12, 0]}

    return now, made


def test_a_call_runs_and_the_model_answers_to_its_result(conversation):
    now, made = clock()
    chunks = [*conversation.send("What time is it?", tools=[now], tool_choice="now", max_tokens=60)]
    assert len(made) == 1
    assert roles(conversation) == ["user", "assistant", "tool", "assistant"]
    asked, result, last = conversation.messages[1:]
    (call,) = [call for chunk in chunks for call in chunk.calls]
    assert asked["tool_calls"] == [call.json]
    assert call.arguments == {"late": made[0]}
    assert result == {"role": "tool", "tool_call_id": call.id, "name": "now", "content": '{"time": [12, 0]}'}
    assert answer(chunks) == last["content"]
    assert "tool_calls" not in last
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [chunks[-1].finish_reason]


def test_a_turn_reads_only_what_is_new_though_calls_and_results_stand_between(conversation):
    now, _ = clock()
    asked = {"tools": [now], "max_tokens": 60}
    first = [*conversation.send("What time is it?", tool_choice="now", **asked)]
    second = [*conversation.send("And now?", **asked)]
    assert first[0].prefilled_tokens == first[0].prompt_tokens > 150
    result = [chunk.prefilled_tokens for chunk in first if chunk.prompt_tokens > first[0].prompt_tokens]
    assert 0 < result[0] < 60
    assert second[0].prompt_tokens > first[-1].prompt_tokens
    assert 0 < second[0].prefilled_tokens < 20


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


def test_arguments_have_the_types_of_the_hints_at_any_temperature(loaded):
    seen = []

    def mix(count: Literal[1, 2], color: Color, wild: bool, other: Color | None = None) -> None:
        seen.append((count, color, wild, other))

    for seed in range(3):
        conversation = Conversation(*loaded)
        chunks = [*conversation.send("Mix.", tools=[mix], tool_choice="mix", temperature=seed, seed=seed,
                                     max_tokens=100, tool_rounds=1)]  # fmt: skip
        assert sum(len(chunk.calls) for chunk in chunks) == len(seen) - seed == 1
    for count, color, wild, other in seen:
        assert count in (1, 2)
        assert type(color) is Color
        assert type(wild) is bool
        assert other is None or type(other) is Color


def test_a_function_that_raises_tells_the_model_and_the_caller(loaded):
    def lift() -> int:
        raise ValueError("too\nheavy")

    told = []
    conversation = Conversation(*loaded, notify=told.append)
    [*conversation.send("Lift!", tools=[lift], tool_choice="lift", max_tokens=80)]
    assert json.loads(conversation.messages[2]["content"]) == {"error": "ValueError: too\nheavy"}
    assert told[-1] == "the tool lift failed, which the model was told: ValueError: too heavy"
    assert roles(conversation)[-1] == "assistant"


def test_a_result_without_a_form_in_json_is_an_error_that_the_model_is_told(conversation):
    [*conversation.send("Go!", tools=[{"name": "go"}], tool_choice="go", run_tool=lambda call: object(), max_tokens=80)]
    assert json.loads(conversation.messages[2]["content"])["error"].endswith("a object has no form in JSON")


def test_what_runs_tools_can_be_given(conversation):
    seen = []

    def run(call):
        seen.append(call)
        return f"ran {call.name}"

    chunks = [*conversation.send("Go!", tools=[{"name": "go"}], tool_choice="go", run_tool=run, max_tokens=80)]
    assert [call.name for call in seen] == ["go"]
    assert conversation.messages[2]["content"] == "ran go"
    assert chunks[-1].finish_reason


def test_a_call_that_nobody_runs_ends_the_turn(conversation):
    chunks = [*conversation.send("Go!", tools=[{"name": "go"}], tool_choice="go", max_tokens=80)]
    assert answer(chunks) == ""
    assert chunks[-1].finish_reason == "stop"
    (call,) = [call for chunk in chunks for call in chunk.calls]
    assert conversation.messages[1:] == [{"role": "assistant", "content": "", "tool_calls": [call.json]}]
    assert answer(conversation.send("Well?", max_tokens=10)) == conversation.messages[-1]["content"]  # and goes on
    assert "go {}" in conversation._repr_html_()


def test_rounds_are_limited_and_the_last_has_no_calls(loaded):
    use = use_tools(loaded[1], [{"name": "go"}], "required")
    turn = ToolTurn(use, rounds=3)
    assert [turn.use_in(number).choice for number in range(5)] == ["required", "auto", "auto", "none", "none"]
    silent = ToolTurn(use_tools(loaded[1], [{"name": "go"}], "none"))
    assert silent.use_in(1).choice == "none"


def test_a_cut_call_does_not_run_and_nothing_of_it_is_lost(conversation):
    now, made = clock()
    chunks = [*conversation.send("What time is it?", tools=[now], tool_choice="now", max_tokens=22)]
    assert chunks[-1].finish_reason == "length"
    assert not made
    assert answer(chunks).startswith('{"tool_calls": [{"name')
    assert conversation.messages[-1]["content"] == answer(chunks)


def test_a_message_during_a_turn_ends_it(conversation):
    now, made = clock()
    chunks = conversation.send("What time is it?", tools=[now], tool_choice="now", max_tokens=60)
    next(chunks)
    conversation.reset()
    with pytest.raises(CacheError):
        list(chunks)
    assert not made
    assert conversation.messages == []


def test_a_tool_that_resets_the_conversation_ends_its_turn(conversation):
    def forget() -> str:
        conversation.reset()
        return "done"

    with pytest.raises(CacheError):
        [*conversation.send("Forget!", tools=[forget], tool_choice="forget", max_tokens=80)]
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"tools": [3]}, "3 is no function"),
        ({"tools": [{"name": "f"}], "tool_choice": "g"}, "tool_choice is 'g'; choose auto, none, required, f"),
        ({"tools": [{"name": "f"}], "tool_rounds": 0}, "tool_rounds is 0; expected 1 or more"),
        ({"tools": [{"name": "f"}], "run_tool": 3}, "run_tool is 3; expected a function"),
        ({"tools": [{"name": "f"}], "parallel_tool_calls": 1}, "parallel_tool_calls is 1; expected true or false"),
        ({"tools": [{"name": "f"}], "regex": "a"}, "regex has no place beside tools with a model that was not trained"),
        ({"tools": [{"name": "f", "parameters": {"not": {}}}]}, 'tools f: parameters has "not"'),
    ],
)
def test_faults_are_raised_at_the_call(conversation, given, fault):
    with pytest.raises(OptionError) as caught:
        conversation.send("Go!", **given)
    assert fault in str(caught.value)
    assert conversation.messages == []


def test_the_example_of_the_page_runs(capsys):
    page = (ROOT / "docs/tools.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
    exec(compile(code, "tools.md", "exec"), {"__name__": "tools"})
    written = capsys.readouterr().out
    assert "call: find_animal {'kind': " in written
    assert "\ntool [" in written
    assert 'find_owl({"wild": ' in written
