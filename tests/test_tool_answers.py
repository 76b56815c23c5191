"""Tools in a single answer: `generate`, `stream_generate` and `batch_generate` tell calls apart and call nothing."""

import copy
import json
import pickle
from typing import Literal

import pytest

from phi3_mlx import AnswerText, Conversation, batch_generate, encode_prompt, generate, load, stream_generate
from phi3_mlx.errors import OptionError, PromptError
from phi3_mlx.text.tool_use import use_tools

pytest.importorskip("llguidance")

called = []


def find_animal(kind: Literal["duck", "frog", "owl"], wild: bool) -> list[str]:
    """Names the animals of a kind."""
    called.append(kind)
    return ["Ada"]


JSON_TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
ASKED = {"tools": [find_animal, JSON_TOOL], "tool_choice": "find_animal", "max_tokens": 80}
PROMPTS = ["Which ducks do you know?", "And which frogs?", [{"role": "user", "content": "Owls?"}]]


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


def said(answer):
    """All of an answer but the ids of its calls, which are random."""
    return str(answer), [(call.name, call.text) for call in answer.calls], answer.finish_reason


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_has_its_calls_apart_from_its_text(loaded, temperature):
    answer = generate(*loaded, PROMPTS[0], temperature=temperature, seed=1, **ASKED)
    (call,) = answer.calls
    assert (answer, call.name, answer.finish_reason) == ("", "find_animal", "stop")
    assert call.arguments["kind"] in ("duck", "frog", "owl")
    assert type(call.arguments["wild"]) is bool
    assert {*call.arguments} == {"kind", "wild"}
    assert called == []


def test_streams_batches_and_conversations_have_the_same_calls(loaded):
    alone = [generate(*loaded, prompt, **ASKED) for prompt in PROMPTS]
    together = batch_generate(*loaded, PROMPTS, **ASKED)
    assert [*map(said, together)] == [*map(said, alone)]
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        chunks = [*stream_generate(*loaded, prompt, **ASKED)]
        calls = [call for chunk in chunks for call in chunk.calls]
        streamed = AnswerText("".join(chunk.text for chunk in chunks), calls, chunks[-1].finish_reason)
        assert said(streamed) == said(answer)
        assert [len(chunk.calls) for chunk in chunks if chunk.calls] == [1]
    conversation = Conversation(*loaded)
    chunks = [*conversation.send(PROMPTS[0], **ASKED, run_tool=lambda call: 1, tool_rounds=1)]
    assert [(c.name, c.text) for chunk in chunks for c in chunk.calls] == said(alone[0])[1]


def test_results_go_into_the_next_prompt_with_tools_and_without(loaded):
    first = generate(*loaded, PROMPTS[0], **ASKED)
    messages = [
        {"role": "user", "content": PROMPTS[0]},
        {"role": "assistant", "content": first, "tool_calls": [call.json for call in first.calls]},
        {"role": "tool", "tool_call_id": first.calls[0].id, "content": '["Ada"]'},
    ]
    model, tokenizer = loaded
    listed, unlisted = (use_tools(tokenizer, tools).render(tokenizer, messages) for tools in (ASKED["tools"], None))
    assert encode_prompt(tokenizer, messages, tools=ASKED["tools"]) == listed
    assert encode_prompt(tokenizer, messages) == unlisted != listed
    told = generate(model, tokenizer, messages, tools=ASKED["tools"], tool_choice="none", max_tokens=20)
    assert told == generate(model, tokenizer, listed, tools=ASKED["tools"], tool_choice="none", max_tokens=20)
    without = generate(*loaded, messages, max_tokens=30)
    assert without.calls == ()
    assert without.finish_reason in ("stop", "length")


def test_ids_are_sent_as_they_are_and_may_list_the_tools(loaded):
    ids = encode_prompt(loaded[1], PROMPTS[0], tools=ASKED["tools"])
    assert said(generate(*loaded, ids, **ASKED)) == said(generate(*loaded, PROMPTS[0], **ASKED))


def test_an_answer_is_a_text_that_says_why_it_ends(loaded):
    answer = generate(*loaded, "Tell me a story.", max_tokens=5)
    assert isinstance(answer, str)
    assert (answer.calls, answer.finish_reason) == ((), "length")
    assert json.loads(json.dumps({"answer": answer})) == {"answer": str(answer)}
    cut = generate(*loaded, PROMPTS[0], **{**ASKED, "max_tokens": 25})
    assert (cut.calls, cut.finish_reason) == ((), "length")
    assert cut.startswith('{"tool_calls": [{"name": "find')  # what there is of the call is text
    chunks = stream_generate(*loaded, PROMPTS[0], **{**ASKED, "max_tokens": 25})
    assert "".join(chunk.text for chunk in chunks) == cut
    whole = generate(*loaded, PROMPTS[0], **ASKED)
    for other in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert (said(other), other.calls) == (said(whole), whole.calls)
    assert AnswerText() == ""


def test_with_none_the_answer_is_text(loaded):
    answer = generate(*loaded, PROMPTS[0], tools=[find_animal], tool_choice="none", max_tokens=20)
    assert answer
    assert answer.calls == ()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tools": [find_animal], "tool_choice": "find"}, OptionError, "tool_choice is 'find'; choose auto, none"),
        ({"tool_choice": "required"}, OptionError, "tool_choice is 'required', and there are no tools"),
        ({"tools": [find_animal], "parallel_tool_calls": 2}, OptionError, "parallel_tool_calls is 2"),
        ({"tools": [find_animal], "raw": True}, PromptError, "raw=True has no place beside tools"),
        ({"tools": [find_animal], "regex": "a"}, OptionError, "regex has no place beside tools with a model"),
        ({"tools": [3]}, OptionError, "3 is no function"),
    ],
)
def test_faults_are_raised_at_the_call(loaded, given, error, message):
    model, tokenizer = loaded
    for function in (generate, stream_generate, lambda *a, **k: batch_generate(*a[:2], [a[2]], **k)):
        with pytest.raises(error, match=message):
            function(model, tokenizer, "Hi", **given)
