"""The server as real clients see it: OpenAI's SDK and curl, with an engine that needs no model."""

import importlib
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
from conftest import ROOT
from served import FakeEngine, events, serving, token

from phi3_mlx.errors import Phi3Error
from phi3_mlx.server.chat import CHAT_FIELDS
from phi3_mlx.server.completions import COMPLETION_FIELDS
from phi3_mlx.server.responses import RESPONSE_FIELDS
from phi3_mlx.server.work import Begun, Ended, Piece


@pytest.fixture(scope="module")
def served():
    with serving(key="key") as served:
        yield served


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="key", max_retries=0) as client:
        yield client


MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.mark.parametrize(
    ("module", "kind", "table"),
    [
        ("chat.completion_create_params", "CompletionCreateParamsNonStreaming", CHAT_FIELDS),
        ("completion_create_params", "CompletionCreateParamsNonStreaming", COMPLETION_FIELDS),
        ("responses.response_create_params", "ResponseCreateParamsNonStreaming", RESPONSE_FIELDS),
    ],
)
def test_every_field_that_openais_client_can_send_is_in_the_table(module, kind, table):
    fields = getattr(importlib.import_module(f"openai.types.{module}"), kind).__annotations__
    assert len(fields) > 15
    assert {*fields} - {*table} == set()


def test_openai_chats(client):
    reply = client.chat.completions.create(model="echo", messages=MESSAGES, max_completion_tokens=2)
    assert reply.choices[0].message.content == "one two "
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == 5


def test_the_pages_example_runs(served, capsys):
    code, *_ = re.findall(r"^```py\n(.*?)```", (ROOT / "docs" / "server.md").read_text(encoding="utf-8"), re.S | re.M)
    code = code.replace("http://127.0.0.1:8080", served.url).replace("phi-3.5-mini-4bit", "echo")
    names = {}
    exec(code.replace('"none"', '"key"'), names)
    names["client"].close()
    assert capsys.readouterr().out == "Why is the sky blue? \n"


def test_openai_streams(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(model="echo", messages=MESSAGES, stream=True, stream_options=options)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three "
    assert chunks[-1].usage.completion_tokens == 3


def test_openai_tells_errors_apart(client, served):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="echo", messages=MESSAGES, reasoning_effort="high")
    assert error.value.param == "reasoning_effort"
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_parses_an_answer_with_pydantic():
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")

    class Duck(pydantic.BaseModel):
        name: str
        age: int

    def script(ticket, tell):
        schema = json.loads(ticket.work.request.schema)
        assert schema["required"] == ["name", "age"]
        tell(Begun(1, 0))
        tell(Piece(0, '{"name":"Ducky","age":3}', ()))
        tell(Ended(0, "stop", 9))

    with (
        serving(FakeEngine(script)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client,
    ):
        reply = client.chat.completions.parse(model="echo", messages=MESSAGES, response_format=Duck)
        assert reply.choices[0].message.parsed == Duck(name="Ducky", age=3)
        response = client.responses.parse(model="echo", input="A duck.", text_format=Duck)
        assert response.output_parsed == Duck(name="Ducky", age=3)


def test_openai_lists_models(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "phi3-mlx"


def test_openai_completes(client):
    reply = client.completions.create(model="echo", prompt=["a b", "c"], n=2, echo=True, logprobs=1, max_tokens=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == ["a ba ", "a ba ", "cc ", "cc "]
    logprobs = reply.choices[0].logprobs
    assert logprobs.tokens == ["a ", "b ", "a "]
    assert logprobs.token_logprobs == [None, -0.5, -0.5]
    assert logprobs.text_offset == [0, 0, 3]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"b ": -0.5, "other": -1.5}
    assert reply.usage.prompt_tokens == 3
    assert reply.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "n": 2}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_a_completion_cannot_honour_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "echo", "prompt": "a", **fields})
    assert error.value.param == param


def test_openai_streams_completions(client):
    stream = client.completions.create(model="echo", prompt=[[1, 2], [3]], stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "[1, 2] ", 1: "[3] "}


def test_openai_asks_for_a_response(client):
    response = client.responses.create(model="echo", input="one two", instructions="Be short.", metadata={"a": "b"})
    assert response.output_text == "one two "
    assert response.status == "completed"
    assert response.instructions == "Be short."
    assert response.metadata == {"a": "b"}
    assert response.usage.total_tokens == 4


def test_a_response_that_is_cut_is_incomplete(client):
    response = client.responses.create(model="echo", input="one two three", max_output_tokens=1)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


def test_openai_streams_a_response(client):
    with client.responses.stream(model="echo", input="one two") as stream:
        told = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in told] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in told] == list(range(10))
    assert final.output_text == "one two "
    assert final.usage.output_tokens == 2


def test_a_response_has_log_probabilities_where_they_are_asked_for(client):
    response = client.responses.create(
        model="echo", input="one", include=["message.output_text.logprobs"], top_logprobs=2
    )
    (told,) = response.output[0].content[0].logprobs
    assert (told.token, told.logprob, told.top_logprobs[1].token) == ("one ", -0.5, "other")


def test_items_of_a_response_become_messages(client, served):
    client.responses.create(
        model="echo",
        input=[
            {"role": "developer", "content": "a"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
            {"type": "message", "id": "m", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
            {"role": "user", "content": "d"},
        ],
    )  # fmt: skip
    assert [(m["role"], m["content"]) for m in served.engine.tickets[-1].work.prompt] == [
        ("system", "a"),
        ("user", "b"),
        ("assistant", "c"),
        ("user", "d"),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ],
)
def test_what_a_response_cannot_honour_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{"model": "echo", "input": "a", **fields})
    assert error.value.param == param


def test_an_error_in_a_stream_reaches_openais_client():
    def script(ticket, tell):
        tell(Begun(1, 0))
        tell(Piece(0, "a", (token("a", 0),)))
        raise Phi3Error("the logits are NaN")

    with (
        serving(FakeEngine(script)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client,
    ):
        with pytest.raises(openai.APIError, match="NaN"):
            list(client.chat.completions.create(model="echo", messages=MESSAGES, stream=True))
        told = list(client.responses.create(model="echo", input="a", stream=True))
        assert [event.type for event in told[-2:]] == ["error", "response.failed"]
        assert told[-1].response.error.message == "the logits are NaN"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_reads_a_stream_line_by_line(served):
    body = json.dumps({"model": "echo", "messages": MESSAGES, "stream": True})
    command = ["curl", "-sN", f"{served.url}/v1/chat/completions", "-H", "Authorization: Bearer key", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    data, _ = events(done.stdout)
    assert data[-1] == "[DONE]"
    assert len(data) == 6
