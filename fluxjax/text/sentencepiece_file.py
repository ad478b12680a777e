"""SentencePiece models, read without protobuf; and whether their character maps are whole."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def check_charsmap(data: bytes) -> None:
    """Raises ValueError for a character map in which the Rust library would look outside.

    Its form is a Darts-clone double array (the size in bytes, then 4-byte units) and the
    replacements, each ended by a zero byte. https://github.com/s-yata/darts-clone
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or not 4 <= size <= len(data) - 4:
        raise ValueError("its character map is cut short")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    bytes(texts).decode("utf-8")
    offsets = (units >> 10) << ((units & 512) >> 6)
    seen = np.zeros(len(units), bool)
    places = offsets[:1]
    while places.size:
        if (places | 255).max() >= len(units):
            raise ValueError("its character map leads outside of itself")
        seen[places] = True
        nodes = (places[:, None] ^ np.arange(1, 256)).ravel()
        nodes = nodes[(units[nodes] & 0x800000FF) == np.tile(np.arange(1, 256), len(places))]
        places = np.unique(nodes ^ offsets[nodes])
        if places.size and places.max() >= len(units):
            raise ValueError("its character map leads outside of itself")
        leaves = (nodes ^ offsets[nodes])[(units[nodes] & 256) > 0]
        starts = units[leaves] & 0x7FFFFFFF
        if starts.size and (starts.max() >= len(texts) or (texts[starts] & 0xC0 == 0x80).any()):
            raise ValueError("its character map has replacements outside of its texts")
        places = places[~seen[places]]


def read_sentencepiece(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores, and the precompiled character map, of a SentencePiece model.

    Reads the few protobuf fields that are needed (sentencepiece_model.proto: pieces = 1 with
    piece = 1 and score = 2; normalizer_spec = 3 with precompiled_charsmap = 2), so that protobuf
    need not be installed.
    """
    pieces: list[tuple[str, float]] = []
    charsmap = None  # of a file that ends before what is said of it behind the pieces
    try:
        for number, value in _protobuf_fields(path.read_bytes()):
            if number == 1:
                piece = dict(_protobuf_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece[1].decode("utf-8"), score))
            elif number == 3:
                charsmap = dict(_protobuf_fields(value)).get(2, b"")
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        pieces = []
    if not pieces or charsmap is None:
        raise ValueError(f"{path} is not a SentencePiece model, or it is damaged")
    return pieces, charsmap


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, raw value) of one protobuf message; varints as int, the rest as bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, position = _varint(data, position)
        if size is None or position + size > len(data):
            raise IndexError
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:  # a number of 64 bits has ten bytes
            raise IndexError
        if byte < 0x80:
            return value, position
