"""GGUF files byte by byte, so that each can tell the lie that a test wants."""

import struct

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, payload):
    return string(name) + struct.pack("<I", kind) + payload


def array(kind, n, payload):
    return struct.pack("<IQ", kind, n) + payload


def info(name="w", dims=(4,), kind=0, offset=0):
    """Dimensions from the innermost, as in the file."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, string("llama"))


def file(keys=(), infos=(), data=b"", *, n_keys=None, n_tensors=None, version=3, magic=b"GGUF", alignment=32):
    keys = [ARCHITECTURE, *keys]
    counts = (len(infos) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *infos])
    return header + bytes(-len(header) % alignment) + data
