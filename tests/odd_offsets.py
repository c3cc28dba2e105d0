"""safetensors files whose weights begin where no allocator would put them, as a file's mapping may leave any weight."""

from __future__ import annotations

from pathlib import Path

OFFSETS = (28, 60)  # bytes beyond a multiple of 64; float32 needs a multiple of 4
HEADER = 8  # bytes that hold the length of the JSON


def shift_weights(path: Path, offset: int) -> None:
    """Let a file's first weight begin `offset` bytes beyond a multiple of 64; weights of whole cache lines follow it."""
    raw = path.read_bytes()
    end = HEADER + int.from_bytes(raw[:HEADER], "little")
    header = raw[HEADER:end] + b" " * ((offset - end) % 64)
    path.write_bytes(len(header).to_bytes(HEADER, "little") + header + raw[end:])


def shift_folder(folder: Path, offset: int) -> None:
    """Shift every safetensors file in a folder and those inside it."""
    for path in sorted(folder.rglob("*.safetensors")):
        shift_weights(path, offset)
