"""Tools over HTTP, as OpenAI's SDK and a reader of the lines see them, with an engine that needs no model."""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
from served import FakeEngine, chat_body, events, serving

from phi3_mlx.server.work import Begun, Ended, Piece

ARGUMENTS = ['{"city": "Ávila", "days": [1, 2]}', "{}"]
ANSWER = (
    f'Let me see. <|tool_call|>[{{"name": "weather", "arguments": {ARGUMENTS[0]}}}, '
    f'{{"name": "now", "arguments": {ARGUMENTS[1]}}}]<|/tool_call|>'
)
WEATHER = {
    "name": "weather",
    "description": "The weather of some days.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now", "strict": True}}]
MESSAGES = [{"role": "user", "content": "How is it?"}]


CUT = {1: 70, 2: 40}  # characters by `max_tokens`: within the arguments of a call, and within its name


def call_tools(ticket, tell):
    """The answer in pieces of three characters."""
    cut = CUT.get(ticket.work.request.max_tokens)
    text = ANSWER[:cut]
    tell(Begun(3, 0))
    for index in range(ticket.work.n):
        for place in range(0, len(text), 3):
            tell(Piece(index, text[place : place + 3], ()))
        tell(Ended(index, "length" if cut else "stop", 9))


@pytest.fixture(scope="module")
def served():
    with serving(FakeEngine(call_tools)) as served:
        yield served


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def called(calls):
    return [(call.function.name, call.function.arguments) for call in calls]


def test_openai_gets_calls_apart_from_the_text(client, served):
    reply = client.chat.completions.create(model="echo", messages=MESSAGES, tools=TOOLS)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    assert called(choice.message.tool_calls) == [("weather", ARGUMENTS[0]), ("now", "{}")]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    work = served.engine.tickets[-1].work
    assert [tool.name for tool in work.tools] == ["weather", "now"]
    assert (work.tool_choice, work.parallel_tool_calls) == ("auto", True)


def test_a_stream_tells_index_id_and_name_of_a_call_and_then_its_arguments(served):
    data, _ = events(served.chat(tools=TOOLS, stream=True)[2])
    deltas = [chunk["choices"][0]["delta"] for chunk in data[:-1]]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    heads = [part for part in parts if "id" in part]
    assert [(part["index"], part["type"], part["function"]) for part in heads] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "now", "arguments": ""}),
    ]
    for index, arguments in enumerate(ARGUMENTS):
        of_call = [part for part in parts if part["index"] == index]
        assert "id" in of_call[0]
        assert "".join(part["function"]["arguments"] for part in of_call) == arguments
        assert not any({"id", "type"} & {*part} for part in of_call[1:])
    assert len(parts) > 8  # they come as they are made
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see. "
    assert data[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_openai_puts_a_streamed_call_together(client):
    with client.chat.completions.stream(model="echo", messages=MESSAGES, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert called(message.tool_calls) == [("weather", ARGUMENTS[0]), ("now", "{}")]


def test_a_call_that_is_cut_ends_for_its_length(client):
    choice = client.chat.completions.create(model="echo", messages=MESSAGES, tools=TOOLS, max_tokens=1).choices[0]
    assert choice.finish_reason == "length"
    ((name, arguments),) = called(choice.message.tool_calls)
    assert name == "weather"
    assert ARGUMENTS[0].startswith(arguments)


def test_what_is_cut_before_it_names_a_tool_is_text_as_the_model_wrote_it(served):
    written = ANSWER[: CUT[2]]
    assert written.endswith('<|tool_call|>[{"name": "weat')
    (choice,) = served.chat(tools=TOOLS, max_tokens=2)[2]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (written, "length")
    assert "tool_calls" not in choice["message"]
    data, _ = events(served.chat(tools=TOOLS, max_tokens=2, stream=True)[2])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data[:-1]) == written


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "function": {"name": "now"}}, "now"),
    ],
)
def test_the_choice_of_a_tool_reaches_the_engine(served, choice, told):
    status, _, reply = served.chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert status == 200
    work = served.engine.tickets[-1].work
    assert (work.tool_choice, work.parallel_tool_calls) == (told, False)
    assert (reply["choices"][0]["message"]["content"] == ANSWER) == (choice == "none")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": "now"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": []}, "functions"),
        ({"messages": [{"role": "assistant", "tool_calls": "now"}]}, "messages[0].tool_calls"),
    ],
)
def test_tools_that_are_none_are_refused(served, fields, param):
    status, _, reply = served.request("POST", "/v1/chat/completions", chat_body(**fields))
    assert (status, reply["error"]["param"]) == (400, param)


def test_calls_and_results_go_back_to_the_engine_as_they_came(served):
    calls = [{"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "noon"}]},
    ]
    assert served.chat(messages=messages, tools=TOOLS)[0] == 200
    assert served.engine.tickets[-1].work.prompt[1:] == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]


def test_a_response_has_calls_as_items_and_takes_their_results(client, served):
    tools = [{"type": "function", **WEATHER, "strict": None}, {"type": "function", "name": "now", "parameters": None}]
    response = client.responses.create(model="echo", input="How is it?", tools=tools)
    message, weather, now = response.output
    assert message.content[0].text == "Let me see. "
    assert (weather.type, weather.name, weather.arguments) == ("function_call", "weather", ARGUMENTS[0])
    assert {item.status for item in response.output} == {"completed"}
    client.responses.create(
        model="echo",
        tools=tools,
        tool_choice={"type": "function", "name": "now"},
        input=[
            {"role": "user", "content": "How is it?"},
            *(item.model_dump(exclude_none=True) for item in response.output),
            {"type": "function_call_output", "call_id": weather.call_id, "output": "rain"},
            {"type": "function_call_output", "call_id": now.call_id, "output": "noon"},
        ],
    )
    prompt = served.engine.tickets[-1].work.prompt
    assert [message["role"] for message in prompt] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in prompt[1]["tool_calls"]] == ["weather", "now"]
    assert prompt[3] == {"role": "tool", "tool_call_id": now.call_id, "content": "noon"}
    assert served.engine.tickets[-1].work.tool_choice == "now"


def test_a_text_behind_a_responses_calls_does_not_part_them_from_their_results(client, served):
    call = {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"}
    client.responses.create(
        model="echo",
        tools=[{"type": "function", "name": "now", "parameters": None, "strict": False}],
        input=[
            {"role": "user", "content": "How late is it?"},
            call,
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call_output", "call_id": "a", "output": "noon"},
        ],
    )
    _, assistant, result = served.engine.tickets[-1].work.prompt
    assert (assistant["content"], assistant["tool_calls"][0]["id"]) == ("I look.", "a")
    assert result == {"role": "tool", "tool_call_id": "a", "content": "noon"}


def test_openai_streams_the_calls_of_a_response(client):
    tools = [{"type": "function", "name": "now", "parameters": None, "strict": False}]
    with client.responses.stream(model="echo", input="How is it?", tools=tools) as stream:
        told = [event.type for event in stream if event.type.split(".")[-1] not in ("delta", "created")]
        final = stream.get_final_response()
    item = ["response.output_item.added", "response.function_call_arguments.done", "response.output_item.done"]
    assert told == [
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        *item,
        *item,
        "response.completed",
    ]
    assert json.loads(final.output[1].arguments) == json.loads(ARGUMENTS[0])
