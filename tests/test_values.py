"""What a user gives becomes the type that it stands for, or one line says what was expected."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from phi3_mlx.errors import OptionError
from phi3_mlx.values import flag, number, optional, path, shown, text, texts, token_ids, whole


def test_scalars_of_array_libraries_are_the_numbers_they_hold():
    for read, given, right in (
        (whole, np.int64(4), 4),
        (whole, np.array(4), 4),
        (whole, mx.array(4), 4),
        (number, np.float32(0.5), 0.5),
        (number, mx.array(0.5), 0.5),
        (number, 3, 3.0),
        (flag, np.bool_(True), True),
        (flag, np.array(False), False),
        (text, np.str_("a"), "a"),
        (path, Path("a/b"), "a/b"),
    ):
        found = read(given, "it")
        assert (found, type(found)) == (right, type(right))
    assert optional(whole, None, "it") is None
    assert optional(whole, np.int8(1), "it") == 1


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        (whole, [True, np.True_, 1.0, "1", None, [1], np.array([1]), b"1", 1j, 2**64, -(10**30), 10**5000]),
        (number, [True, "0.5", None, [0.5], 10**400, b"1", 1j, np.ones(2)]),
        (flag, [0, 1, "True", None, [], np.int64(1)]),
        (text, [None, 3, b"a", Path("a"), ["a"], "half \ud800"]),
        (
            texts,
            [
                None,
                True,
                3,
                2.5,
                np.nan,
                [1],
                b"ab",
                {"a": 1},
                ["a", 3],
                ["a", None],
                ["half \ud800"],
                np.array(5),
                mx.array(3),
            ],
        ),
        (path, [None, 3, b"a", ["a"], "a\0b", True, object(), "half \ud800", "a" * 300, "a/" * 3000]),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_short_line(read, wrong):
    for value in wrong:
        with pytest.raises(OptionError) as caught:
            read(value, "rank")
        message = str(caught.value)
        assert message.startswith("rank ")
        assert "\n" not in message
        assert len(message) < 160


def test_several_texts_come_one_by_one_and_a_text_alone_is_one():
    assert texts("Hello", "it") == ("Hello",)
    assert texts(["a", "b"], "it") == ("a", "b") == texts((one for one in "ab"), "it")
    assert texts({"b", "c", "a"}, "it") == ("a", "b", "c")  # a set's own order changes from run to run
    assert texts([], "it") == ()
    assert optional(texts, None, "it") is None


def test_a_path_may_be_long_and_of_bytes_that_are_not_utf8():
    for name in ("a" * 255, "/".join(["a" * 200] * 15), b"caf\xe9".decode("utf-8", "surrogateescape")):
        assert path(name, "it") == name


def test_token_ids_come_from_lists_and_arrays_of_whole_numbers_alone():
    arrays = (np.array([1, 2]), mx.array([1, 2]), [np.int64(1), np.int8(2)], [mx.array(1), 2], (1, 2), range(1, 3))
    for given in arrays:
        ids = token_ids(given)
        assert ids == [1, 2]
        assert all(type(token) is int for token in ids)
    assert token_ids([]) == [] == token_ids(np.array([]))
    for wrong in (None, 5, "12", b"12", bytearray(b"1"), memoryview(b"1"), {1: 2}, {1, 2}, [True], [1.0], ["1"], [[1]]):
        assert token_ids(wrong) is None
    for array in (np.array([[1]]), np.array([1.0]), np.array([True]), np.array(1), mx.array([[1]]), mx.array(1)):
        assert token_ids(array) is None


def test_a_value_is_shown_shortly():
    assert shown("many\nlines") == repr("many\nlines")
    assert len(shown("x" * 1000)) == 60
    assert shown([1] * 1000) == "a list"
    assert shown(np.ones(3)) == "a ndarray"
    assert shown(10**5000) == "a number of thousands of digits"
    assert shown(one for one in "ab") == "a generator"
