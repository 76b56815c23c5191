"""Calls are told apart from text, however an answer is cut, and what cannot be read is never lost."""

import itertools
import json
import random

import pytest
from whole_answers import parse_calls

from phi3_mlx.text.tool_calls import (
    ArgumentsPiece,
    CallBegun,
    CallBroken,
    CallEnded,
    TextPiece,
    ToolCall,
    ToolCallParser,
)

NAN = "it has a number that JSON has no form for"
NAMES = ["f", "get_weather"]


def events_of(pieces):
    """The events of an answer, with pieces of one text joined."""
    ids = map("c{}".format, itertools.count())
    parser = ToolCallParser(NAMES, lambda: next(ids))
    events = []
    for event in [*(event for piece in pieces for event in parser.add(piece)), *parser.finish()]:
        last = events[-1] if events else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            events[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, ArgumentsPiece) and isinstance(last, ArgumentsPiece):
            events[-1] = ArgumentsPiece(event.index, last.text + event.text)
        else:
            events.append(event)
    return events


def short(answer):
    """What an answer says: texts, (name, arguments) of calls, and {text: reason} of what is broken."""
    told = {
        TextPiece: lambda event: event.text,
        CallEnded: lambda event: (event.call.name, event.call.arguments),
        CallBroken: lambda event: {event.text: event.reason},
    }
    return [told[type(event)](event) for event in events_of([answer]) if type(event) in told]


CALL = '{"name": "f", "arguments": {"a": 1}}'
ANSWERS = {
    "": [],
    "A duck.": ["A duck."],
    # Phi-4-mini's own form
    f"<|tool_call|>[{CALL}]<|/tool_call|>": [("f", {"a": 1})],
    f"Let me look.\n<|tool_call|>[{CALL}]<|/tool_call|> Done.": ["Let me look.\n", ("f", {"a": 1}), " Done."],
    f'<|tool_call|>[{CALL}, {{"name": "g", "arguments": {{}}}}]<|/tool_call|>': [("f", {"a": 1}), ("g", {})],
    f"<|tool_call|>[{CALL}]<|/tool_call|>or<|tool_call|>[{CALL}]": [("f", {"a": 1}), "or", ("f", {"a": 1})],
    f"<|tool_call|>{CALL}<|/tool_call|>": [("f", {"a": 1})],
    f"<|tool_call|>[{CALL}]": [("f", {"a": 1})],
    f"<|tool_call|>\n[\n  {CALL}\n]\n<|/tool_call|>": [("f", {"a": 1})],
    # lists and objects within the arguments
    '<|tool_call|>[{"name": "f", "arguments": {"tags": ["a", "b]"], "at": {"x": [{}, "}"]}}}]<|/tool_call|>': [
        ("f", {"tags": ["a", "b]"], "at": {"x": [{}, "}"]}})
    ],
    r'<|tool_call|>[{"name": "f", "arguments": {"text": "a \"}]\\"}}]<|/tool_call|>': [("f", {"text": 'a "}]\\'})],
    # other spellings of a call
    '<|tool_call|>[{"name": "f", "parameters": {"a": 1}}]<|/tool_call|>': [("f", {"a": 1})],
    '<|tool_call|>[{"arguments": {"a": 1}, "name": "f"}]<|/tool_call|>': [("f", {"a": 1})],
    '<|tool_call|>[{"name": "f", "arguments": {"a": 1}, "id": "x"}]<|/tool_call|>': [("f", {"a": 1})],
    '<|tool_call|>[{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]<|/tool_call|>': [
        ("f", {"a": 1})
    ],
    '<|tool_call|>[{"name": "f"}]<|/tool_call|>': [("f", {})],
    '<|tool_call|>[{"name": "f", "arguments": null}]<|/tool_call|>': [("f", {})],
    # prompts that ask for functools[...]
    'functools[{"name": "f", "arguments": {"tags": ["a", "b"]}}] Bye.': [("f", {"tags": ["a", "b"]}), " Bye."],
    f"So: functools[{CALL}, {CALL}]": ["So: ", ("f", {"a": 1}), ("f", {"a": 1})],
    "import functools": ["import functools"],
    # the plain form
    f'{{"tool_calls": [{CALL}]}}': [("f", {"a": 1})],
    f'I look. {{ "tool_calls" : [ {CALL} , {CALL} ] }} So.': ["I look. ", ("f", {"a": 1}), ("f", {"a": 1}), " So."],
    f'Here:\n```json\n{{"tool_calls": [{CALL}]}}\n```\nDone.': ["Here:\n", ("f", {"a": 1}), "\nDone."],
    f'```\n{{"tool_calls": [{CALL}]}}': [("f", {"a": 1})],
    # no mark at all, at the beginning of the answer
    f"[{CALL}]": [("f", {"a": 1})],
    f"\n{CALL}": ["\n", ("f", {"a": 1})],
    f"```json\n[{CALL}]\n```": [("f", {"a": 1})],
    f"{CALL} So.": [("f", {"a": 1}), " So."],
    f"See {CALL}": [f"See {CALL}"],
    '{"name": "unknown", "arguments": {}}': ['{"name": "unknown", "arguments": {}}'],
    '{"name": "f", "age": 3}': ['{"name": "f", "age": 3}'],
    # text that only looks like the beginning of a mark
    "a <|tool_cal": ["a <|tool_cal"],
    "<|tool|>": ["<|tool|>"],
    'x {"tool_call': ['x {"tool_call'],
    "```python\nprint()\n```": ["```python\nprint()\n```"],
    "  ": ["  "],
    # no calls
    "functools[]": ["functools[]"],
    '{"tool_calls": []}': ['{"tool_calls": []}'],
    # broken
    '<|tool_call|>[{"name": "f", "arguments": {"a": nothing}}]<|/tool_call|> Bye.': [
        {'<|tool_call|>[{"name": "f", "arguments": {"a": nothing}}]<|/tool_call|>':
         "its arguments are no JSON: Expecting value: line 1 column 7 (char 6)"},
        " Bye.",
    ],
    "<|tool_call|>f(a=1)<|/tool_call|>!": [{"<|tool_call|>f(a=1)<|/tool_call|>": "it is no list of calls"}, "!"],
    f"<|tool_call|>f()<|/tool_call|>{CALL}": [{"<|tool_call|>f()<|/tool_call|>": "it is no list of calls"}, CALL],
    '<|tool_call|>[{"name": "f", "argu': [{'<|tool_call|>[{"name": "f", "argu': "the answer ends within it"}],
    'So: ```json\n{"tool_calls": [ {"name': ["So: ", {'```json\n{"tool_calls": [ {"name': "the answer ends within it"}],
    '{"tool_calls": [{"name": "f", "arguments": {"a": [1, 2': [
        {'{"tool_calls": [{"name": "f", "arguments": {"a": [1, 2': "the answer ends within it"}
    ],
    f'<|tool_call|>[{CALL}, {{"name": "g", "a': [("f", {"a": 1}), {'{"name": "g", "a': "the answer ends within it"}],
    f'<|tool_call|>[{CALL}, {{"name": 3}}]<|/tool_call|> So <|tool_call|>[{CALL}]': [
        ("f", {"a": 1}), {'{"name": 3}]': "it has no name"}, " So ", ("f", {"a": 1}),
    ],
    "<|tool_call|>": [{"<|tool_call|>": "the answer ends within it"}],
    '<|tool_call|>[{"arguments": {}}]<|/tool_call|>': [
        {'<|tool_call|>[{"arguments": {}}]<|/tool_call|>': "it has no name"}
    ],
    '<|tool_call|>[{"name": "f", "arguments": [1]}]<|/tool_call|>': [
        {'<|tool_call|>[{"name": "f", "arguments": [1]}]<|/tool_call|>': "its arguments are a list, not an object"}
    ],
    'functools[{"name": "f", "arguments": {"a": NaN}}] and on': [
        {'functools[{"name": "f", "arguments": {"a": NaN}}] and on': f"its arguments are no JSON: {NAN}"}
    ],
    f"functools[{CALL}; more": [("f", {"a": 1}), {"; more": "it is no list of calls"}],
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_says_texts_and_calls(answer):
    assert short(answer) == ANSWERS[answer]


@pytest.mark.parametrize("answer", ANSWERS)
def test_it_says_the_same_wherever_it_is_cut(answer):
    whole = events_of([answer])
    assert events_of(answer) == whole  # a character at a time
    for cut in range(len(answer)):
        assert events_of([answer[:cut], answer[cut:]]) == whole, answer[cut:]


def test_answers_of_any_parts_say_the_same_wherever_they_are_cut():
    rng = random.Random(0)
    parts = [
        *ANSWERS,
        CALL,
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        "<|tool_call|>",
        "<|/tool_call|>",
        "```",
        " ",
        "\v",
        "f",
    ]
    for _ in range(400):
        answer = "".join(rng.choices(parts, k=rng.randint(1, 5)))
        whole = events_of([answer])
        assert events_of(answer) == whole, answer
        cuts = sorted(rng.choices(range(len(answer) + 1), k=3))
        pieces = [answer[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(answer)])]
        assert events_of(pieces) == whole, (answer, pieces)


def test_no_word_of_an_answer_is_lost():
    """Each word, of a text, in a call or in what is broken, is told; marks and the rest of a call's JSON are not."""
    rng = random.Random(1)
    call = '{"name": "f", "arguments": {"a": "w"}}'
    parts = [
        "w",
        call,
        "<|tool_call|>[",
        "]<|/tool_call|>",
        "functools[",
        '{"tool_calls": [',
        "]}",
        ", ",
        '"',
        "{",
        "}",
    ]
    for _ in range(400):
        chosen = rng.choices(parts, k=rng.randint(1, 8))
        count = itertools.count()
        answer = "".join(part.replace("w", f" w{next(count)} ") for part in chosen)
        events = events_of([answer])
        told = " ".join(event.text for event in events if isinstance(event, TextPiece | ArgumentsPiece | CallBroken))
        for number in range(next(count)):
            assert f" w{number} " in told or f"w{number} " not in answer, (answer, events)


def test_a_call_streams_its_name_first_then_its_arguments():
    parser = ToolCallParser(["f"], lambda: "id")
    events = [parser.add(piece) for piece in ('<|tool_call|>[{"name": "f", ', '"arguments": {"a', '": [1', "]}", "}]")]
    assert events == [
        [],
        [CallBegun(0, "id", "f"), ArgumentsPiece(0, '{"a')],
        [ArgumentsPiece(0, '": [1')],
        [ArgumentsPiece(0, "]}")],
        [CallEnded(0, ToolCall("id", "f", '{"a": [1]}'))],
    ]


def test_text_comes_at_once_unless_a_mark_may_begin_in_it():
    parser = ToolCallParser()
    assert parser.add("A duck") == [TextPiece("A duck")]
    assert parser.add(" and a <") == [TextPiece(" and a ")]
    assert parser.add("b>") == [TextPiece("<b>")]


def test_arguments_are_told_as_they_were_written():
    (call,) = parse_calls('<|tool_call|>[{"name": "f", "arguments": {"n":12345678901234567890, "x": 1.0}}]').calls
    assert call.text == '{"n":12345678901234567890, "x": 1.0}'
    assert call.json == {"id": call.id, "type": "function", "function": {"name": "f", "arguments": call.text}}
    assert call.id.startswith("call_")


def test_calls_have_different_ids():
    calls = parse_calls(f"functools[{', '.join([CALL] * 20)}]").calls
    assert len({call.id for call in calls}) == 20


def test_a_whole_answer_is_parsed_at_once():
    parsed = parse_calls(f"One. <|tool_call|>[{CALL}, 3]<|/tool_call|> Two.")
    assert parsed.text == "One.  Two."
    assert [json.loads(call.text) for call in parsed.calls] == [{"a": 1}]
    assert [broken.text for broken in parsed.broken] == ["3]"]
