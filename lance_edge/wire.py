"""Protocol buffers on the wire, just enough to look into an ONNX file without a library for it.

A message is a row of fields: a tag (`number << 3 | wire type`), then a varint, 4 or 8 bytes, or a length and so
many bytes (protobuf.dev/programming-guides/encoding).  Nothing is copied and nothing is ever larger than the
message, so the time to read one is in proportion to its bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10


class WireError(ValueError):
    """The bytes are no message."""


@dataclass(frozen=True)
class Field:
    """One field; `value` is what a varint holds, `data` the bytes of every other kind."""

    number: int
    wire: int
    value: int
    data: memoryview


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        WireError: at the first byte that belongs to no field.
    """
    position, nothing = 0, message[:0]
    while position < len(message):
        tag, position = read_varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, position = read_varint(message, position)
            yield Field(number, wire, value, nothing)
            continue
        if wire == BYTES:
            length, position = read_varint(message, position)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise WireError(f"field {number} has the wire type {wire}")
        if number == 0 or length > len(message) - position:
            raise WireError(f"field {number} is cut off")
        yield Field(number, wire, 0, message[position : position + length])
        position += length


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number and the position behind it; at most 64 bits, as protobuf has it.

    Raises:
        WireError: if it does not end.
    """
    value = 0
    for count, byte in enumerate(data[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + count + 1
    raise WireError("a number does not end")


def packed_varints(field: Field) -> Iterator[int]:
    """The numbers of a repeated integer field: one, or many that are packed."""
    if field.wire != BYTES:
        yield field.value
        return
    position = 0
    while position < len(field.data):
        value, position = read_varint(field.data, position)
        yield value
