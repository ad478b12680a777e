"""GGUF files made by hand from the format's description, good and hostile ones."""

import struct


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def info(name, shape, kind, offset) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(tensors, keys=(), alignment=32, version=3) -> bytes:
    """`tensors`: name -> (type's number, shape, bytes). `keys`: what `key` gives."""
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        infos += info(name, shape, kind, len(data))
        data += content + bytes(-len(content) % alignment)
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    start += b"".join(keys) + infos
    return start + bytes(-len(start) % alignment) + data
