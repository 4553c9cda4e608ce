"""Hostile contents of ``adapter_model.safetensors``, with headers of about a megabyte: they cost time, or confuse."""

from __future__ import annotations

import json
import struct
from typing import Any

from .configs import MEGABYTE, WIDTH

KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def nothing(shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    """Header entry of a tensor without elements."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}


def of_zeros(size: int, dtype: str) -> bytes:
    """Makes a file with one factor of ``size`` bytes."""
    return safetensors({KEY: {"dtype": dtype, "shape": [2, WIDTH], "data_offsets": [0, size]}}, bytes(size))


def with_note(note: Any) -> bytes:
    """Makes a file with metadata of packed projections."""
    text = note if isinstance(note, str) else json.dumps(note)
    return safetensors({"__metadata__": {"lora_ext": text}, KEY: nothing([0])})


CONFIG_NOTE = {"enable_lora": None, "rank_pattern": {}, "alpha_pattern": {}}


def weights() -> dict[str, tuple[bytes, str]]:
    """Returns a file's bytes and words of the error, by kind of attack."""
    many = {f"base_model.model.n{i:06}": nothing([0]) for i in range(MEGABYTE // 90)}
    factors = {f"base_model.model.n{i:06}.lora_A.weight": nothing([0, 0]) for i in range(MEGABYTE // 105)}
    tokens = {f"n{i:06}.trainable_tokens_delta": nothing([0, 0]) for i in range(MEGABYTE // 100)}
    return {
        "keys": (safetensors(many), "unexpected key"),
        "factors": (safetensors(factors), "unexpected key"),
        "rows": (safetensors(tokens), "unexpected key"),
        "one long key": (safetensors({"x" * MEGABYTE: nothing([0])}), "characters, want at most 500"),
        "terminal": (safetensors({"\x1b[2J": nothing([0])}), "characters that cannot be printed"),
        "lines": (safetensors({"a\nb": nothing([0])}), "characters that cannot be printed"),
        "dimensions": (safetensors({KEY: nothing([0] + [1] * (MEGABYTE // 3))}), "a shape that PyTorch cannot hold"),
        "sizes": (safetensors({KEY: nothing([0] + [2**62] * (MEGABYTE // 21))}), "a shape that PyTorch cannot"),
        "one size": (safetensors({KEY: nothing([0, 2**62])}), "a shape that PyTorch cannot hold"),
        "other shape": (safetensors({KEY: nothing([0, WIDTH])}), "shape of base_model"),
        "integers": (of_zeros(2 * WIDTH, "U8"), "dtype of base_model"),
        "complex": (of_zeros(16 * WIDTH, "C64"), "dtype of base_model"),
        "half bytes": (of_zeros(WIDTH, "F4"), "has a dtype that torch"),
        "unknown dtype": (of_zeros(2 * WIDTH, "F9"), "not a safetensors file"),
        "deep": (safetensors(b'{"a":' + b"[" * (MEGABYTE // 2)), "not a safetensors file"),
        "length": (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
        "short": (b"\0" * 7, "not a safetensors file"),
        "empty": (b"", "not a safetensors file"),
        "deep note": (with_note('{"a":' * (MEGABYTE // 6) + "1" + "}" * (MEGABYTE // 6)), "levels"),
        "list as note": (with_note([]), "holds a list"),
        "note of others": (with_note({"blocks": [], "config": {}}), "blocks or config are missing"),
        "blocks": (
            with_note({"blocks": {f"n{i}": [True] for i in range(MEGABYTE // 18)}, "config": CONFIG_NOTE}),
            "the file has no tensor 'n0'",
        ),
        "parts of a block": (
            with_note({"blocks": {KEY: [True] * (MEGABYTE // 6)}, "config": CONFIG_NOTE}),
            "has shape [0], which does not divide into blocks",
        ),
        "numbers as parts": (with_note({"blocks": {KEY: [1, 2]}, "config": CONFIG_NOTE}), "want bools"),
        "text as parts": (with_note({"blocks": {KEY: "abc"}, "config": CONFIG_NOTE}), "want bools"),
        "wrong config in the note": (
            with_note({"blocks": {}, "config": CONFIG_NOTE | {"rank_pattern": "x"}}),
            "rank_pattern is 'x'",
        ),
    }
