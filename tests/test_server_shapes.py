"""What programs send that speak OpenAI's API, field by field: none is refused needlessly, and none ignored in silence.

The shapes are those of Open WebUI's backend, of Continue's and Zed's providers for servers of this kind, and of two
common libraries.
"""

import json

import pytest

from phi3_mlx import load_tokenizer
from phi3_mlx.generation.request import Request
from phi3_mlx.server.asked import Defaults
from phi3_mlx.server.chat import read_chat
from phi3_mlx.server.completions import read_completions
from phi3_mlx.server.faults import ApiError
from phi3_mlx.server.limits import Limits
from phi3_mlx.server.prompts import prompt_and_form
from phi3_mlx.server.responses import read_response

DEFAULTS = Defaults(Request(), "auto", Limits())
READERS = {"chat": read_chat, "completions": read_completions, "responses": read_response}
USER = {"role": "user", "content": "Hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is in"}, {"type": "text", "text": "main.rs?"}]}


def tool(name, parameters, **more):
    function = {"name": name, "description": "Does it.", "parameters": parameters, **more}
    return {"type": "function", "function": function}


# As editors derive them from their types: marks of the dialect, titles, defaults, formats of machine numbers, unions.
READ_FILE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "ReadFileToolInput",
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "The relative path."},
        "start_line": {"type": ["integer", "null"], "format": "uint32", "minimum": 0, "default": None},
        "end_line": {"anyOf": [{"type": "integer", "format": "uint32", "minimum": 0}, {"type": "null"}]},
        "mode": {"$ref": "#/$defs/Mode"},
    },
    "required": ["path"],
    "$defs": {"Mode": {"description": "How.", "type": "string", "enum": ["read", "outline"]}},
}
ANY_OBJECT = {"type": "object", "properties": {}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "main.rs"}'}}
SENT = {
    "Open WebUI: a chat": ("chat", {
        "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be kind."}, USER],
        "temperature": 0.8, "top_p": 0.9, "max_tokens": 128, "frequency_penalty": 0, "seed": 0, "stop": ["END"],
        "logit_bias": {}, "metadata": {"chat_id": "1", "features": {}}, "user": "someone",
    }),
    "Open WebUI: a title": ("chat", {"messages": [USER], "stream": False, "max_completion_tokens": 1000}),
    "Open WebUI: a chat of a browser": ("chat", {
        "stream": True, "messages": [USER], "chat_id": "1", "session_id": "2", "features": {}, "metadata": {},
    }),
    "Open WebUI: a tool's result": ("chat", {
        "stream": True, "tools": [tool("read_file", {**ANY_OBJECT, "required": []})],
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "call_1", "content": "fn main() {}"}],
    }),
    "Continue: a chat": ("chat", {
        "messages": [PARTS], "max_tokens": 4096, "temperature": 0.5, "top_p": 1, "frequency_penalty": 0,
        "presence_penalty": 0, "stream": True, "stream_options": {"include_usage": True},
        "stop": ["<|end|>", "<|user|>", "<|assistant|>"],
    }),
    "Continue: an agent": ("chat", {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     {"role": "tool", "content": "fn main() {}", "tool_call_id": "call_1"}],
        "tools": [tool("read_file", READ_FILE, strict=False)], "tool_choice": "auto", "parallel_tool_calls": False,
        "max_tokens": 2048, "stream": True,
    }),
    "Continue: an edit": ("completions", {
        "prompt": "<|user|>\nfn", "max_tokens": 1024, "temperature": 0.01, "stream": True, "stop": ["```", "\n\n"],
        "suffix": None,
    }),
    "Zed: a thread": ("chat", {
        "messages": [{"role": "system", "content": "You are an engineer."}, PARTS,
                     {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
                     {"role": "tool", "content": [{"type": "text", "text": "fn main() {}"}], "tool_call_id": "call_1"}],
        "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 2048, "stop": [],
        "temperature": 1.0, "tool_choice": "auto", "parallel_tool_calls": False,
        "tools": [tool("read_file", READ_FILE), tool("now", ANY_OBJECT)],
    }),
    "Zed: a summary": ("chat", {"messages": [USER], "stream": True, "stop": [], "temperature": 1.0, "tools": []}),
    "instructor: asked again": ("chat", {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "call_1", "name": "read_file", "content": "Validation Error"}],
        "tools": [tool("read_file", ANY_OBJECT)],
        "tool_choice": {"type": "function", "function": {"name": "read_file"}},
    }),
    "instructor: responses": ("responses", {
        "input": [USER], "tool_choice": {"type": "function", "name": "read_file"},
        "tools": [{"type": "function", "name": "read_file", "parameters": ANY_OBJECT}],
        "text": {"format": {"type": "json_schema", "name": "read_file", "strict": True, "schema": ANY_OBJECT}},
    }),
    "LangChain": ("chat", {"messages": [USER], "n": 1, "temperature": 0.7, "stream": False, "logprobs": False}),
    "the openai package": ("responses", {"input": "Hi", "stream": True, "store": False, "tools": [], "include": []}),
}  # fmt: skip
REFUSED = {
    "Open WebUI: the web is to be searched": ("chat", {"features": {"web_search": True}}, "features"),
    "Open WebUI: a picture": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "messages[0].content[0].type",
    ),
    "Continue: a predicted edit": ("chat", {"prediction": {"type": "content", "content": "fn"}}, "prediction"),
    "Continue: filling in": ("completions", {"prompt": "fn", "suffix": "}"}, "suffix"),
    "Zed: effort": ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
}


@pytest.mark.parametrize("name", SENT)
def test_what_clients_send_is_taken(name):
    address, body = SENT[name]
    asked = READERS[address](json.loads(json.dumps({"model": "tiny", **body})), DEFAULTS)
    tokenizer = load_tokenizer("tiny")
    for work in asked.works:
        ids, form = prompt_and_form(work, tokenizer)
        assert ids
        assert (form is not None) == bool(body.get("tools"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_clients_send_that_would_change_the_answer_is_refused_by_name(name):
    address, fields, param = REFUSED[name]
    plain = {"model": "tiny", "prompt": "a"} if address == "completions" else {"model": "tiny", "messages": [USER]}
    with pytest.raises(ApiError) as refused:
        READERS[address]({**plain, **fields}, DEFAULTS)
    assert refused.value.param == param
    assert refused.value.status == 400
