"""What a file looks like, for the message that refuses it."""

from __future__ import annotations

from typing import Final

from thermocline.files.mapped import MappedFile

_SIGNATURES: Final = (
    (b"GGUF", "it looks like a GGUF file"),
    (b"FUGG", "it looks like a big-endian GGUF file, which is not readable"),
    (b"PWRI", "it looks like a PowerInfer model or GPU index"),
    (b"lmgg", "it looks like a GGML file of before 2023-08: convert the original model to GGUF"),
    (b"fmgg", "it looks like a GGMF file of before 2023-08: convert the original model to GGUF"),
    (b"tjgg", "it looks like a GGJT file of before 2023-08: convert the original model to GGUF"),
    (b"algg", "it looks like a GGLA adapter, not a model"),
    (b"PK\x03\x04", "it looks like a zip or PyTorch archive, which is never opened: convert it to safetensors or GGUF"),
    (b"\x80\x02", "it looks like a pickle, which is never opened: convert it to safetensors or GGUF"),
    (b"\x80\x03", "it looks like a pickle, which is never opened: convert it to safetensors or GGUF"),
    (b"\x80\x04", "it looks like a pickle, which is never opened: convert it to safetensors or GGUF"),
    (b"\x80\x05", "it looks like a pickle, which is never opened: convert it to safetensors or GGUF"),
    (b"\x1f\x8b", "it looks like a gzip archive: unpack it"),
    (b"7z\xbc\xaf", "it looks like a 7z archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "it looks like a zstd archive: unpack it"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"<!DOCTYPE", "it looks like a web page, not the file that was to be downloaded"),
    (b"<html", "it looks like a web page, not the file that was to be downloaded"),
)


def looks_like(file: MappedFile) -> str:
    """One clause that says what the file's first bytes suggest."""
    head = bytes(file.buffer[:64])
    for magic, meaning in _SIGNATURES:
        if head.startswith(magic):
            return meaning
    if b'"thermocline.sidecar"' in head:
        return "it looks like an activity, an order or a predictor, which goes with a model"
    if 2 <= int.from_bytes(head[:8], "little") <= file.size and head[8:9] == b"{":
        return "it looks like a single safetensors file: name the folder that also holds its config.json"
    if not head.strip(b"\0"):
        return "it begins with zeros: incomplete download?"
    text = all(byte in b"\t\n\r" or byte >= 32 for byte in head)
    return "it looks like a text file" if text else f"it begins with the bytes {head[:4].hex(' ')}"
