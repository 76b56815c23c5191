"""Files changed a little, as accidents and strangers change them: strategies for hypothesis."""

import copy
import json
import struct

from hypothesis import strategies as st

VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 2**32, 2**63, 10**18, 10**30, -(10**30), 1e30, 1e308, -1.5, 0.5,
    float("nan"), float("inf"), float("-inf"), "", "x", "phi3", "\x1b[31mred", "../../etc/passwd", "a" * 5000, [], {},
    [[]], {"a": {"b": {}}}, [1, 2, 3], ["x"], "float32", "NaN", "\ud800", "\udc80", [None], [-1], [10**20],
    {"weight": 1},
]  # fmt: skip
KEYS = ["zzz", "__class__", "\x1b]0;x\x07", "a/b", "\ud800", ""]
ODD = [
    b"", b" ", b"null", b"[]", b"1", b'"x"', b"{}", b"{" * 1000, b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b"\xff\xfe", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a":1e999}', b'{"a":' + b"9" * 5000 + b"}", b'{"a":NaN}',
    b'{"a":1,"a":2}', b"\x00" * 64, b'{"a":"\\ud800"}', b"{}{}",
]  # fmt: skip
NUMBERS = [0, 1, 2**32, 10**12, 2**63, 2**64 - 1]
DTYPES = ["F8_E4M3", "F64", "I32", "U8", "BOOL", "F4", "C64", "XX", "F16", ""]


def _ways(value, way=()):
    """The ways to everything in a value, lists' first forty entries."""
    if way:
        yield way
    if isinstance(value, dict):
        for key in value:
            yield from _ways(value[key], (*way, key))
    elif isinstance(value, list):
        for n in range(min(len(value), 40)):
            yield from _ways(value[n], (*way, n))


def json_values(value):
    """The value with one or two of its parts taken out, put in or replaced."""
    ways = [way for way in _ways(value) if len(way) <= 4]

    @st.composite
    def changed(draw):
        result = copy.deepcopy(value)
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            way = draw(st.sampled_from(ways))
            kind = draw(st.sampled_from(["set", "set", "set", "out", "in"]))
            odd = copy.deepcopy(draw(st.sampled_from(VALUES)))  # the second change may be within the first
            try:
                inner = result
                for key in way[:-1]:
                    inner = inner[key]
                if kind == "set":
                    inner[way[-1]] = odd
                elif kind == "out":
                    del inner[way[-1]]
                elif isinstance(inner, dict):
                    inner[draw(st.sampled_from(KEYS))] = odd
            except (KeyError, IndexError, TypeError):
                pass  # the first change took the place of the second away
        return result

    return changed()


def json_files(content):
    """A JSON file, its value or its bytes changed, or another file in its place."""
    value, content = json.loads(content), content.encode() if isinstance(content, str) else content
    as_bytes = json_values(value).map(lambda changed: json.dumps(changed).encode())
    return st.one_of(as_bytes, as_bytes, as_bytes, byte_files(content), st.sampled_from(ODD))


def byte_files(content, limit=None):
    """A file with some of its bytes (of its first `limit`) changed, taken out or put in, or cut short."""

    @st.composite
    def changed(draw):
        data = bytearray(content)
        for _ in range(draw(st.sampled_from([1, 1, 2, 4, 16]))):
            at = draw(st.integers(0, max(0, min(limit or len(data), len(data)) - 1)))
            kind = draw(st.sampled_from(["byte", "byte", "bit", "out", "in", "number", "cut"]))
            if kind == "byte" and at < len(data):
                data[at] = draw(st.integers(0, 255))
            elif kind == "bit" and at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            elif kind == "out":
                del data[at : at + draw(st.sampled_from([1, 2, 8, 64]))]
            elif kind == "in":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            elif kind == "number":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
            elif kind == "cut":
                del data[at + 1 :]
        return bytes(data)

    return changed()


def safetensors_files(content):
    """A safetensors file: its header's values, its bytes, or an entry of it that lies."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def joined(text, claimed=None):
        return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data

    @st.composite
    def lies(draw):
        changed, name = copy.deepcopy(header), draw(st.sampled_from(names))
        entry = changed[name]
        kind = draw(st.sampled_from(["length", "overlap", "turned", "more", "dtype", "metadata", "twice", "huge"]))
        if kind == "length":
            return joined(json.dumps(header).encode(), draw(st.sampled_from([*NUMBERS, 10**8 + 1])))
        if kind == "overlap":
            entry["data_offsets"][0] -= draw(st.sampled_from([1, 4, 8]))
        elif kind == "turned":
            entry["shape"] = entry["shape"][::-1]
        elif kind == "more":
            entry["shape"] = [*entry["shape"], 1]
        elif kind == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif kind == "metadata":
            changed["__metadata__"] = draw(st.sampled_from(VALUES[:-1]))
        elif kind == "twice":
            other = json.dumps(header[draw(st.sampled_from(names))])
            return joined(f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {other}}}".encode())
        else:
            shape = [0, draw(st.sampled_from([3, 2**31, 2**40, 2**63]))]
            changed["model.more"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data)] * 2}
        return joined(json.dumps(changed).encode())

    as_bytes = json_values(header).map(lambda changed: joined(json.dumps(changed).encode()))
    return st.one_of(as_bytes, lies(), byte_files(content, 8 + length), byte_files(content))
