"""Whatever a field holds, it is honoured, neutral or refused in OpenAI's form: nothing else comes out."""

import json

import pytest

from phi3_mlx.generation.request import Request
from phi3_mlx.server.asked import Asked, Defaults
from phi3_mlx.server.chat import CHAT_FIELDS, read_chat
from phi3_mlx.server.completions import COMPLETION_FIELDS, read_completions
from phi3_mlx.server.faults import ApiError
from phi3_mlx.server.limits import Limits
from phi3_mlx.server.responses import RESPONSE_FIELDS, read_response

DEFAULTS = Defaults(Request(), "auto", Limits())
ODD = [
    True, False, 0, 1, -1, 2.5, 10**19, 1e300, "", "x", "\0", [], [0], ["x"], [[]], [[0]], [{}], [None], {}, {"x": 1},
    {"type": "x"}, {"type": "function"}, {"type": "function", "function": {"name": 3}},
    [{"type": "function", "name": []}], [{"role": []}], [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "tool_calls": [3]}],
    [{"role": "user", "content": [{"type": "text", "text": 3}]}], [{"type": "function_call", "call_id": 3}],
    {"format": 3}, {"format": {"type": "json_schema", "schema": 3}}, {"type": "json_schema", "json_schema": []},
    {"include_usage": 3}, {"1": "x"}, {"99999999999": 1}, {"effort": "none"},
]  # fmt: skip
ADDRESSES = {
    "chat": (read_chat, CHAT_FIELDS, {"model": "m", "messages": [{"role": "user", "content": "a"}]}),
    "completions": (read_completions, COMPLETION_FIELDS, {"model": "m", "prompt": "a"}),
    "responses": (read_response, RESPONSE_FIELDS, {"model": "m", "input": "a"}),
}


def outcome(read, body):
    """What a body asks for, or the error that it is answered with."""
    try:
        return read(body, DEFAULTS)
    except ApiError as error:
        return error


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_odd_value_of_any_field_is_taken_or_refused_by_name(address):
    read, table, plain = ADDRESSES[address]
    outcomes = [outcome(read, {**plain, name: value}) for name in table for value in ODD]
    errors = [error for error in outcomes if not isinstance(error, Asked)]
    for error in errors:
        assert error.status == 400
        assert error.code
        assert error.param is None or error.param.split(".")[0].split("[")[0] in table
        assert json.dumps(error.body())
        assert "\n" not in str(error)
    assert 10 * len(table) < len(errors) < len(outcomes)


@pytest.mark.parametrize("address", ADDRESSES)
def test_null_is_a_field_that_was_left_out(address):
    read, table, plain = ADDRESSES[address]
    nothing = {name: None for name in table if name not in plain}
    (alone,), (beside,) = read(plain, DEFAULTS).works, read({**nothing, **plain}, DEFAULTS).works
    assert alone == beside


@pytest.mark.parametrize("address", ADDRESSES)
def test_neutral_values_change_nothing_and_refused_fields_never_pass(address):
    read, table, plain = ADDRESSES[address]
    (alone,) = read(plain, DEFAULTS).works
    for field in table.values():
        if field.treatment == "neutral":
            for value in field.neutral:
                assert read({**plain, field.name: value}, DEFAULTS).works == [alone]
        elif field.treatment == "noted":
            assert read({**plain, field.name: {"any": ["thing"]}}, DEFAULTS).works == [alone]
        elif field.treatment == "refused":
            with pytest.raises(ApiError) as error:
                read({**plain, field.name: {}}, DEFAULTS)
            assert (error.value.code, error.value.param) == ("unsupported_parameter", field.name)
