"""Numpy arrays in the messages of the control plane: msgpack extension 1, with description, shape and bytes."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta
from numpy.lib import format as npy

from larpixdaq.errors import ProtocolError

_ARRAY: Final = 1
#: Maximum bytes of an array's description, some 500 fields: numpy's time grows with the square of their number.
MAX_DESCRIPTION: Final = 8 << 10


def pack_other(value: Any) -> Any:
    """A numpy array or scalar for the wire; ProtocolError for anything else, and for arrays of objects."""
    if isinstance(value, np.generic) and not isinstance(value, np.void):
        return value.item()
    if isinstance(value, np.ndarray | np.void):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ProtocolError(f"an array of dtype {array.dtype} cannot travel: it holds Python objects")
        descr = msgspec.Raw(msgspec.msgpack.encode(npy.dtype_to_descr(array.dtype)))
        if len(bytes(descr)) > MAX_DESCRIPTION:
            raise ProtocolError(
                f"an array cannot travel: the description of its {len(array.dtype.names or ())} fields has "
                f"{len(bytes(descr))} bytes, the limit is {MAX_DESCRIPTION}"
            )
        head = [descr, list(array.shape), array.tobytes()]
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode(head))
    raise ProtocolError(f"a value of type {type(value).__name__} cannot travel")


class _Array(msgspec.Struct, array_like=True):
    descr: msgspec.Raw
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=32)]
    data: bytes


_array_decoder: Final = msgspec.msgpack.Decoder(_Array)
_descr_decoder: Final = msgspec.msgpack.Decoder(str | list[Any])


def _descr(entry: Any) -> Any:
    """msgpack has lists only; numpy wants tuples around fields and shapes."""
    if isinstance(entry, list) and entry and all(isinstance(field, list) for field in entry):
        return [(_descr(field[0]), _descr(field[1]), *map(tuple, field[2:])) for field in entry]
    return tuple(_descr(part) for part in entry) if isinstance(entry, list) else entry


def unpack_extension(code: int, data: memoryview) -> Any:
    """The array that stands in a message; ProtocolError for what is none."""
    if code != _ARRAY:
        raise ProtocolError(f"unknown msgpack extension {code}")
    try:
        head = _array_decoder.decode(data)
        if (size := len(bytes(head.descr))) > MAX_DESCRIPTION:
            raise ProtocolError(f"array: its description has {size} bytes, the limit is {MAX_DESCRIPTION}")
        dtype = npy.descr_to_dtype(_descr(_descr_decoder.decode(head.descr)))
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, IndexError, RecursionError, SyntaxError) as error:
        raise ProtocolError(f"array with an impossible description: {error}") from None
    if dtype.hasobject or not dtype.itemsize:
        raise ProtocolError(f"array of dtype {dtype}: it holds Python objects or nothing at all")
    count = 1
    for length in head.shape:
        count *= length
    if count * dtype.itemsize != len(head.data):
        raise ProtocolError(f"array of {count} x {dtype.itemsize} bytes: found {len(head.data)} bytes")
    try:
        return np.frombuffer(bytearray(head.data), dtype, count).reshape(head.shape)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"array of shape {head.shape}: {error}") from None
