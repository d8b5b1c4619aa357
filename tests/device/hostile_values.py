"""Mutations of bytes and of JSON values, drawn by hypothesis."""

import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[Any], Any]


def mutate_bytes(draw: Draw, data: bytes, most: int = 4) -> bytes:
    """Flip, cut, insert, repeat and overwrite."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut", "number"]))
        length = draw(st.integers(1, 32))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[place : place + 1] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))])
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=length))
        elif kind == "delete":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length] * draw(st.integers(1, 8))
        elif kind == "cut":
            del content[place:]
        else:
            form = draw(st.sampled_from(["<i", "<q", ">i", "<H"]))
            largest = (1 << (8 * struct.calcsize(form) - 1)) - 1
            value = draw(
                st.sampled_from([0, 1, largest, largest // 2 if form == "<H" else -1 if form != "<H" else 0])
            )
            packed = struct.pack(form, value)
            content[place : place + len(packed)] = packed
    return bytes(content)


ODD_VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, -0.0, "", [], {}]
    ),
    st.sampled_from(
        ["N", "float32", "../x", "/etc/passwd", "lance", "bp", "graphs/predict.onnx", "weights.npz"]
    ),
    st.text(max_size=8),
    st.integers(-10, 100_000),
    st.lists(st.integers(-1, 2**40), max_size=5),
)


def mutate_json(draw: Draw, value: Any) -> Any:
    """A few places of a JSON value, replaced, removed or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = {"root": value}
        key: Any = "root"
        while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 7)):
            parent, key = parent[key], draw(st.sampled_from(_keys(parent[key])))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"]))
        if kind == "remove" and key != "root":
            del parent[key]
        elif kind == "double" and isinstance(parent, list):
            parent.append(parent[key])
        elif key != "root":
            parent[key] = draw(ODD_VALUES)
        else:
            value = draw(ODD_VALUES) if draw(st.booleans()) else value
    return value


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))
