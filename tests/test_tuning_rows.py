"""What a line of training data may be: forms, empty columns, tools, and which turns are learnt."""

import json
from pathlib import Path

import pytest
from test_chat import JUNE, MEDIUM, with_template
from test_chat_keys import PHI4_MINI
from tuning_models import facts, write_jsonl

from phi3_mlx.errors import DataError
from phi3_mlx.text.chat import render_chat
from phi3_mlx.tuning.data import Splits, read_data
from phi3_mlx.tuning.examples import Encoded, encode_records
from phi3_mlx.tuning.settings import Settings

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TALK = [ASK, ANSWER]


def read(tmp_path: Path, *rows: object) -> Splits:
    return read_data(write_jsonl(tmp_path / "my.jsonl", list(rows)))


def encoded(tmp_path: Path, *rows: object, template: str = JUNE, train_on: str = "answers") -> tuple[str, str, Encoded]:
    """The text of the last row's example, what of it is learnt, and all that is known of them."""
    tokenizer = with_template(template)
    made = encode_records(read(tmp_path, *rows).train, tokenizer, max_length=999, train_on=train_on)  # type: ignore[arg-type]
    example = made.examples[-1]
    show = lambda ids: tokenizer.decode(ids.tolist(), skip_special=False)  # noqa: E731
    return show(example.ids), show(example.ids[example.trained]).strip(), made


def fault(tmp_path: Path, row: object) -> str:
    with pytest.raises(DataError, match=r"my\.jsonl:2: ") as caught:
        read(tmp_path, {"messages": TALK}, row)
    said = str(caught.value)
    assert "\n" not in said
    return said.split("my.jsonl:2: ")[1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": "Hi", "prompt_id": "1", "messages": TALK},
        {"prompt": " Hi\n", "messages": TALK},
        {"messages": TALK, "text": None, "prompt": None, "completion": None, "system": None, "tools": None},
        {"text": None, "prompt": "Hi", "completion": "Yo", "messages": None},
        {"system": "", "prompt": "Hi", "completion": "Yo", "tools": []},
        {"messages": [{"role": "system", "content": ""}, *TALK], "system": ""},
        {"messages": [{"role": "system", "content": None}, *TALK]},
        {"messages": [{**ASK, "name": None, "tool_calls": None}, {**ANSWER, "tool_calls": []}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"conversations": [{"from": "system", "value": ""}, {"from": "user", "value": "Hi"}, ANSWER]},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"messages": [{**ASK, "weight": 0}, {**ANSWER, "weight": 1}]},
        {"messages": [{**ASK, "train": False}, {**ANSWER, "train": True, "weight": 1.0}]},
    ],
)
def test_every_form_of_the_same_conversation_is_the_same_example(row: dict, tmp_path: Path):
    text, learnt, made = encoded(tmp_path, row)
    assert text == "<|user|> Hi<|end|><|assistant|> Yo<|end|>"
    assert learnt == "Yo<|end|>"
    assert made.notes == []


def test_system_messages_come_from_beside_the_messages_as_well(tmp_path: Path):
    wanted = "<|system|> Be.<|end|><|user|> Hi<|end|><|assistant|> Yo<|end|>"
    system = {"role": "system", "content": "Be."}
    for row in (
        {"messages": [system, *TALK]},
        {"system": "Be.", "messages": TALK},
        {"system": "Be.", "messages": [system, *TALK]},
        {"system": "Be.", "prompt": "Hi", "completion": "Yo"},
        {"system": "Be.", "prompt": [ASK], "completion": [ANSWER]},
        {"system": "Be.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    ):
        assert encoded(tmp_path, row)[0] == wanted
    assert "has both 'system' and a system message" in fault(
        tmp_path, {"system": "Be kind.", "messages": [system, *TALK]}
    )
    assert fault(tmp_path, {"system": 3, "messages": TALK}) == "'system' is a number; expected a text"


@pytest.mark.parametrize("tools", [[{"name": "look"}], '[{"name": "look"}]'])
def test_tools_are_read_as_a_prompt_reads_them(tools: object, tmp_path: Path):
    """Beside the messages or in the system message, as a list or as JSON text."""
    system = {"role": "system", "content": "Be."}
    tokenizer = with_template(PHI4_MINI)
    prompt = tokenizer.decode(render_chat(tokenizer, [system, ASK], tools=[{"name": "look"}]), skip_special=False)
    assert '<|tool|>[{"name": "look"}]<|/tool|>' in prompt
    for row in (
        {"messages": [{**system, "tools": tools}, *TALK]},
        {"messages": [system, *TALK], "tools": tools},
        {"system": "Be.", "prompt": "Hi", "completion": "Yo", "tools": tools},
    ):
        text, learnt, _ = encoded(tmp_path, row, template=PHI4_MINI)
        assert text == f"{prompt} Yo<|end|>"
        assert learnt == "Yo<|end|>"
    with pytest.raises(DataError, match=r"my\.jsonl:1: the model's chat template has no place for tools"):
        encoded(tmp_path, {"messages": TALK, "tools": tools})
    with pytest.raises(DataError, match=r"my\.jsonl:1: message 1 has 'tools', which .* does not read"):
        encoded(tmp_path, {"messages": [{**system, "tools": tools}, *TALK]})
    with pytest.raises(DataError, match=r"my\.jsonl:1: message 1 has 'tools', which .* does not read"):
        encoded(tmp_path, {"messages": [{**system, "tools": tools}, *TALK]}, template=MEDIUM)


@pytest.mark.parametrize("key", ["name", "tool_calls", "tool_call_id", "reasoning_content", "function_call"])
def test_what_carries_meaning_and_is_not_read_is_refused_with_the_line(key: str, tmp_path: Path):
    row = {"messages": [ASK, {**ANSWER, key: "x"}]}
    with pytest.raises(DataError, match=rf"my\.jsonl:2: message 2 has '{key}', which .* does not read"):
        encoded(tmp_path, {"messages": TALK}, row)


def test_what_carries_none_is_left_out_and_noted_with_the_line(tmp_path: Path):
    rows = [
        {"messages": TALK},
        {"messages": [{**ASK, "id": 7}, {**ANSWER, "id": 8}]},
        {"messages": [{**ASK, "id": 9}, ANSWER]},
    ]
    text, _, made = encoded(tmp_path, *rows)
    assert text == "<|user|> Hi<|end|><|assistant|> Yo<|end|>"
    assert made.notes == [
        f"the chat template does not read 'id' of a message, so it was left out (first in {tmp_path}/my.jsonl:2)"
    ]
    rows = [
        {"messages": TALK, "id": 1},
        {"messages": TALK, "id": 2, "source": "x"},
        {"prompt": "a", "completion": "b", "n": 0},
    ]
    assert read(tmp_path, *rows).notes == (
        f"keys that are not used, and the lines that have them first: 'id' ({tmp_path}/my.jsonl:1), "
        f"'source' ({tmp_path}/my.jsonl:2), 'n' ({tmp_path}/my.jsonl:3)",
    )
    assert read(tmp_path, {"prompt": "Hi", "messages": TALK}).notes == ()


def test_notes_about_keys_reach_whoever_trains(tmp_path: Path):
    from phi3_mlx.tuning.run import prepare

    data = write_jsonl(tmp_path / "my.jsonl", [row | {"n": 1} for row in facts(20)])
    said: list[str] = []
    notes = prepare(Settings(data=str(data), output=str(tmp_path / "out"), steps=1), said.append).notes
    assert any(note.startswith("keys that are not used") for note in notes)
    assert any("held out" in note for note in notes)
    assert said == list(notes)


def test_turns_of_weight_0_are_read_and_not_learnt(tmp_path: Path):
    bad = {"role": "assistant", "content": "Bad"}
    for marks in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}):
        row = {"messages": [ASK, {**bad, **marks}, ASK, ANSWER]}
        text, learnt, _ = encoded(tmp_path, row)
        assert text.count("Bad") == 1
        assert learnt == "Yo<|end|>"
        learnt = encoded(tmp_path, row, train_on="all")[1]
        assert "Bad" not in learnt
        assert "Hi" in learnt
    # In the prompt of a conversation that is told in two lists as well
    assert encoded(tmp_path, {"prompt": [ASK, bad, ASK], "completion": [ANSWER]})[1] == "Yo<|end|>"
    row = {"messages": [ASK, ANSWER, ASK, {**bad, "weight": 0}]}
    assert encoded(tmp_path, row)[1] == "Yo<|end|>"
    tokenizer = with_template(JUNE)
    made = encode_records(read(tmp_path, row).train, tokenizer, max_length=99, train_on="last")
    assert made.examples == []
    assert (made.empty, made.dropped) == ([f"{tmp_path}/my.jsonl:1"], [])


def test_an_answer_that_ends_in_its_own_control_token_is_noted(tmp_path: Path):
    rows = [{"messages": TALK}, {"prompt": "Hi", "completion": "Yo<|end|>\n"}]
    _, _, made = encoded(tmp_path, *rows)
    (note,) = made.notes
    assert note.startswith("an answer ends in the text of a control token")
    assert note.endswith("my.jsonl:2)")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": TALK, "conversations": TALK}, "has both 'messages' and 'conversations'; expected one form"),
        ({"messages": TALK, "text": "a"}, "has both 'messages' and 'text'; expected one form"),
        ({"messages": TALK, "completion": "Yo"}, "has both 'messages' and 'completion'; expected one form"),
        ({"text": "a", "prompt": "b"}, "has both 'prompt' and 'text'"),
        ({"messages": TALK, "prompt": "Ho"}, "has both 'messages' and a 'prompt' that no user says there"),
        ({"messages": TALK, "prompt": [ASK]}, "has both 'messages' and a 'prompt'"),
        ({"text": "a", "system": "b"}, "has 'system' beside 'text', which is learnt as it stands"),
        ({"text": "a", "tools": [{}]}, "has 'tools' beside 'text'"),
        ({"messages": None}, "'messages' is null; expected"),
        ({"prompt": "a", "completion": None}, "'completion' is missing; expected"),
        ({"prompt": "a", "response": "b"}, "rename 'response' to 'completion'"),
        ({"instruction": "a", "input": "", "output": "b"}, "rename 'instruction' to 'prompt' and 'output' to"),
        ({"prompt": [ASK], "completion": "Yo"}, "'prompt' is a list; expected a text"),
        ({"prompt": [ASK], "completion": []}, "'completion' is an empty list; expected a list of"),
        ({"messages": TALK, "tools": {"name": "look"}}, "'tools' is an object; expected a list of objects"),
        ({"messages": TALK, "tools": "look"}, "'tools' is a text; expected a list of objects"),
        ({"messages": TALK, "tools": ["look"]}, "'tools' is a list; expected a list of objects"),
        ({"messages": TALK, "images": ["a.png"]}, "'images' beside 'messages' is not honoured"),
        ({"messages": TALK, "functions": [{}]}, "'functions' beside 'messages' is not honoured"),
        ({"messages": TALK, "weight": 0.5}, "'weight' beside 'messages' is not honoured"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "messages[1] 'weight' is 0.5; expected 0 or 1"),
        ({"messages": [ASK, {**ANSWER, "weight": "1"}]}, "messages[1] 'weight' is '1'; expected 0 or 1"),
        ({"messages": [ASK, {**ANSWER, "weight": [1]}]}, "messages[1] 'weight' is [1]; expected 0 or 1"),
        ({"messages": [ASK, {**ANSWER, "train": "no"}]}, "messages[1] 'train' is 'no'; expected true or false"),
        ({"messages": [ASK, {**ANSWER, "train": True, "weight": 0}]}, "messages[1] has 'weight' and 'train', which"),
        ({"messages": [{**ASK, "weight": 1}, ANSWER]}, "messages[0] is to be learnt and has the role 'user'"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "'messages' has no assistant turn to learn"),
        ({"messages": [ASK, {**ANSWER, "loss": False}]}, "messages[1] 'loss' is not honoured; say which turns"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "messages[1] 'content' is null; expected a text"),
        ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "messages[1] 'content' is empty; expected a text"),
        ({"messages": [ASK, {"role": None, "content": "a"}]}, "messages[1] 'role' is null; expected system, user"),
        ({"messages": [{"from": "human", "content": "a"}]}, "messages[0] 'role' is missing"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0] 'from' is 'alien'; expected human"),
        ({"conversations": [{"from": 1, "value": "a"}]}, "conversations[0] 'from' is 1; expected"),
        ({"conversations": [{"from": "human", "value": 1}, ANSWER]}, "conversations[0] 'content' is a number"),
        ({"conversations": "Hi"}, "'conversations' is a text; expected a list"),
        ({"messages": [{"role": "system", "content": ""}]}, "'messages' has no assistant turn; expected at least one"),
        ({"messages": [{"role": "system", "content": ""}], "system": "Be."}, "'messages' has no assistant turn"),
        ({f"k{n}": 0 for n in range(20)}, "'k5', 'k6', 'k7' and 12 more; expected"),
    ],
)  # fmt: skip
def test_a_line_whose_meaning_is_not_clear_is_refused_by_what_it_has(row: dict, said: str, tmp_path: Path):
    assert said in fault(tmp_path, row)


def test_calls_without_words_are_learnt_where_the_template_marks_them(tmp_path: Path):
    marked = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% generation %}{{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endgeneration %}{% endfor %}"
    ).replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}")
    marked = marked.replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}")
    call = [{"function": {"name": "look"}}]
    for content in ({}, {"content": None}, {"content": ""}):
        row = {"messages": [ASK, {"role": "assistant", "tool_calls": call, **content}, ASK, ANSWER]}
        text, learnt, _ = encoded(tmp_path, row, template=marked)
        assert learnt.startswith(json.dumps(call))
        assert text.endswith("Yo<|end|>")
