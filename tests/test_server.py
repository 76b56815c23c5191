"""The server's addresses, with an engine that needs no model."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import chat_body, events, serving


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served


def test_a_chat_is_answered(served):
    status, _, reply = served.chat()
    assert status == 200
    assert reply["object"] == "chat.completion"
    choice = reply["choices"][0]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "one two three ", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["completion_tokens"] == 3


def test_a_stream_has_the_role_first_then_the_text_the_reason_the_counts_and_done(served):
    status, headers, text = served.chat(stream=True, stream_options={"include_usage": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, counts, done = events(text)[0]
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two three "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert counts["choices"] == []
    assert counts["usage"]["total_tokens"] == 6
    assert {chunk["id"] for chunk in [*chunks, counts]} == {counts["id"]}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/echo", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
def test_what_is_not_there_is_an_error_in_openais_form(served, method, path, status, code):
    given, headers, reply = served.request(method, path)
    assert given == status
    assert {*reply} == {"error"}
    assert {*reply["error"]} == {"message", "type", "param", "code"}
    assert (reply["error"]["type"], reply["error"]["code"]) == ("invalid_request_error", code)
    assert ("allow" in headers) == (status == 405)


def test_models_are_listed_and_told_one_by_one(served):
    _, _, reply = served.request("GET", "/v1/models")
    assert [model["id"] for model in reply["data"]] == ["echo"]
    assert served.request("GET", "/v1/models/echo")[2] == reply["data"][0]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": []}, "missing_required_parameter", "model"),
        ({"model": "echo"}, "missing_required_parameter", "messages"),
        (chat_body(messages=[]), "invalid_value", "messages"),
        (chat_body(messages="hello"), "invalid_type", "messages"),
        (chat_body(messages=[{"role": "poet", "content": "a"}]), "invalid_value", "messages[0].role"),
        (chat_body(messages=[{"role": "user"}]), "missing_required_parameter", "messages[0].content"),
        (chat_body(messages=[{"role": "user", "content": 3}]), "invalid_type", "messages[0].content"),
        (chat_body(messages=[{"role": "user", "content": "a", "mood": "b"}]), "unknown_parameter", "messages[0].mood"),
        (
            chat_body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (chat_body(temperature="hot"), "invalid_type", "temperature"),
        (chat_body(temperature=-1), "invalid_value", "temperature"),
        (chat_body(temperature=True), "invalid_type", "temperature"),
        (chat_body(max_tokens=0), "invalid_value", "max_tokens"),
        (chat_body(max_tokens=3, max_completion_tokens=4), "invalid_value", "max_completion_tokens"),
        (chat_body(n=0), "invalid_value", "n"),
        (chat_body(n=129), "invalid_value", "n"),
        (chat_body(top_logprobs=2), "invalid_value", "top_logprobs"),
        (chat_body(logprobs=True, top_logprobs=21), "invalid_value", "top_logprobs"),
        (chat_body(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
        (chat_body(stream=True, stream_options={"every": 2}), "unknown_parameter", "stream_options.every"),
        (chat_body(temprature=0.5), "unknown_parameter", "temprature"),
        (chat_body(reasoning_effort="high"), "unsupported_value", "reasoning_effort"),
        (chat_body(verbosity="low"), "unsupported_value", "verbosity"),
        (chat_body(modalities=["text", "audio"]), "unsupported_value", "modalities"),
        (chat_body(audio={}), "unsupported_parameter", "audio"),
        (chat_body(prediction={}), "unsupported_parameter", "prediction"),
        (chat_body(web_search_options={}), "unsupported_parameter", "web_search_options"),
        (chat_body(longrope="long"), "unsupported_value", "longrope"),
        (chat_body(logit_bias={"a": 1}), "invalid_type", "logit_bias"),
        (chat_body(logit_bias={"3": 101}), "invalid_value", "logit_bias"),
        (chat_body(logit_bias={"3": 1, "03": 2}), "invalid_type", "logit_bias"),
        (chat_body(logit_bias={str(n): 1 for n in range(20_001)}), "invalid_value", "logit_bias"),
        (chat_body(presence_penalty="high"), "invalid_type", "presence_penalty"),
        (chat_body(store=True), "unsupported_value", "store"),
        (chat_body(store=0), "unsupported_value", "store"),
        (chat_body(response_format={"type": "yaml"}), "invalid_value", "response_format.type"),
        (
            chat_body(response_format={"type": "json_schema"}),
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            chat_body(response_format={"type": "json_schema", "json_schema": {"schema": {}, "lax": 1}}),
            "unknown_parameter",
            "response_format.json_schema.lax",
        ),
        (chat_body(response_format={"type": "text", "more": 1}), "unknown_parameter", "response_format.more"),
        (chat_body(stop=["a"] * 65), "invalid_value", "stop"),
        (chat_body(stop="a" * 10_001), "invalid_value", "stop"),
        (chat_body(choices=[str(n) for n in range(129)]), "invalid_value", "choices"),
        (chat_body(choices=["a" * 5_000, "b" * 5_001]), "invalid_value", "choices"),
        (chat_body(seed=2**64), "invalid_type", "seed"),
        (
            chat_body(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}),
            "invalid_value",
            "response_format",
        ),
        (chat_body(regex="a", grammar="start: /b/"), "invalid_value", "regex"),
        (chat_body(regex="ab("), "invalid_value", "regex"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(served, body, code, param):
    status, _, reply = served.request("POST", "/v1/chat/completions", body)
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, code, param)
    if param != "response_format":
        assert param in reply["error"]["message"]


def test_a_field_with_a_name_of_a_megabyte_is_named_shortly(served):
    status, _, reply = served.chat(**{"x" * 1_000_000: 1})
    assert (status, reply["error"]["code"]) == (400, "unknown_parameter")
    assert len(str(reply)) < 400


def test_neutral_values_and_bookkeeping_are_accepted(served):
    status, _, _ = served.chat(
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        service_tier="auto",
        store=False,
        modalities=["text"],
        reasoning_effort=None,
        user="u",
        metadata={"a": "b"},
        safety_identifier="s",
        prompt_cache_key="k",
        stop=None,
        logprobs=False,
        longrope="auto",
        stream=False,
        seed=2**64 - 1,
    )
    assert status == 200


def test_messages_reach_the_engine_as_templates_take_them(served):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": []},
        {"role": "user", "content": "c", "name": None},
    ]
    assert served.request("POST", "/v1/chat/completions", {"model": "echo", "messages": messages})[0] == 200
    assert served.engine.tickets[-1].work.prompt == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "c"},
    ]


def test_absent_fields_take_the_servers_options():
    from phi3_mlx.generation.request import Request

    with serving(base=Request(temperature=0.7, max_tokens=2, kv_bits=8), longrope="long") as served:
        reply = served.chat(top_k=5, longrope="long")[2]
        assert served.chat(longrope="auto")[2]["error"]["param"] == "longrope"  # not what the server does
        reply = served.chat(top_k=5)[2]
        assert reply["choices"][0]["finish_reason"] == "length"
        request = served.engine.tickets[-1].work.request
        assert (request.temperature, request.top_k, request.max_tokens, request.kv_bits) == (0.7, 5, 2, (8, 8))


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_and_log_probabilities_are_told(served, stream):
    reply = served.chat("a b", n=2, logprobs=True, top_logprobs=1, stream=stream)[2]
    if not stream:
        assert [choice["index"] for choice in reply["choices"]] == [0, 1]
        first = reply["choices"][1]["logprobs"]["content"][0]
        assert reply["usage"] | {"total_tokens": 6, "prompt_tokens": 2} == reply["usage"]
    else:
        chunks = events(reply)[0][:-1]
        assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}
        first = next(chunk for chunk in chunks if chunk["choices"][0]["logprobs"])["choices"][0]["logprobs"]["content"][
            0
        ]
    assert first["token"] == "a "
    assert first["bytes"] == [97, 32]
    assert first["logprob"] == -0.5
    assert first["top_logprobs"][1] == {"token": "other", "logprob": -1.5, "bytes": [*b"other"]}


def test_an_unknown_model_is_a_404(served):
    status, _, reply = served.chat(model="gpt-4")
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (404, "model_not_found", "model")
