"""TFRecord files of ``tf.train.Example`` messages, read without TensorFlow.

A record is its length (8 bytes), the length's masked CRC-32C, the data and the data's masked CRC-32C, all little-endian. An Example is a
map from names to lists of bytes, floats or integers (protocol buffers, ``tensorflow/core/example/feature.proto``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robot_rl.replay.importers.base import FormatError

Values = list[bytes] | np.ndarray
LARGEST = 1 << 32
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def records(path: Path) -> Iterator[bytes]:
    """Every record of a file, checked against its checksums.

    Raises:
        FormatError: a file that is cut or damaged; the message names the record.
    """
    with open(path, "rb") as file:
        number = 0
        while head := file.read(12):
            where = f"{path}: record {number}"
            if len(head) < 12:
                raise FormatError(f"{where} is cut off")
            (length,) = struct.unpack("<Q", head[:8])
            if _masked(head[:8]) != struct.unpack("<I", head[8:])[0] or length > LARGEST:
                raise FormatError(
                    f"{where}: the checksum of its length does not fit; this is no TFRecord file, or a damaged one"
                )
            data, check = file.read(length), file.read(4)
            if len(data) < length or len(check) < 4:
                raise FormatError(f"{where} is cut off")
            if _masked(data) != struct.unpack("<I", check)[0]:
                raise FormatError(f"{where}: its checksum does not fit")
            yield data
            number += 1


def _masked(data: bytes) -> int:
    try:
        import google_crc32c
    except ImportError:
        raise ImportError("TFRecord files need google-crc32c: pip install google-crc32c (or the extra rlds)") from None
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: bytes, where: str) -> dict[str, Values]:
    """Names to values: a list of bytes, float32 (N,) or int64 (N,).

    Raises:
        FormatError: bytes that are no Example.
    """
    found: dict[str, Values] = {}
    try:
        for field, features in _fields(data):
            if field != 1:
                continue
            for inner, entry in _fields(_bytes(features)):
                if inner == 1:
                    parts = dict(_fields(_bytes(entry)))
                    found[_bytes(parts[1]).decode()] = _values(_bytes(parts.get(2, b"")))
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise FormatError(f"{where} is no tf.train.Example ({type(error).__name__}: {error})") from None
    return found


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _values(feature: bytes) -> Values:
    for kind, content in _fields(feature):
        entries = [value for field, value in _fields(_bytes(content)) if field == 1]
        if kind == 1:
            return [_bytes(e) for e in entries]
        if kind == 2:
            return np.frombuffer(b"".join(_bytes(e) for e in entries), "<f4")
        if kind == 3:
            numbers = [n for e in entries for n in ([e] if isinstance(e, int) else _varints(e))]
            return np.array(numbers, np.uint64).astype(np.int64)
    return []


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: integers as they are, fixed-width numbers and messages as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            length, at = _varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(f"a field of wire type {wire} at byte {at}")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value
