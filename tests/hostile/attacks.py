"""One table of damaged and hostile files of adapters and checkpoints; many have a megabyte, and cost time or memory.

Each function returns contents and words of the error, by kind of attack; "": the file loads; None: either is fine.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.checkpoint_files import INDEX, SHARD, add_tensor

MEGABYTE = 1_000_000
WIDTH = 12  # of the model, which has BERT-base's names
SMALL = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
"""Adapts the queries of BERT."""
KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"

CATASTROPHIC = {  # none ends with a single character, which regex would search for first
    "nested": r"(\w+\.?)+[!?]",
    "alternatives": r"(a|b|[a-z]|\w|\.)*[!?]",
    "alternatives in a repeat": r"((\w|[a-z])+\.?)+(?:$(?<=!)|!)",
    "wildcards": ".*" * 40 + "[!?]",
    "in a lookahead": r"(?=(.+)+[!?]).*",
    "in a lookbehind": r"(.+)+(?<=[!?])",
    "counted": r"(?:(?:(?:.{0,9}){0,9}){0,9})[!?]",
    "a large count": "a{99999999999999999999}",
    "reference": r"(\w+\s?)+\1[!?]",
    "ignoring case": "(?i)(" + "|".join(f"(.*{letter})*[!?]" for letter in "abcdefghijklmnopqrstuvwxyz") + ")*",
    "wide classes": "(?i)" + "".join(f"[\x00-{chr(0x10000 + i)}]*" for i in range(500)) + "[!?]",
    "long": "|".join(["(a.*)*"] * 1000),
    "deep": "(" * 300 + "a" + ")*" * 300,
    "fuzzy": r"(?:(?:encoder|layer|query).*){e<=30}",
}
_EXPRESSION_KEYS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")


def _names(prefix: str = "") -> list[str]:
    return [f"{prefix}n{i:06}" for i in range(MEGABYTE // (len(prefix) + 11))]


def dotted() -> list[str]:
    """Names of equal length with dots at different places."""
    return ["".join("." if n >> i & 1 else "attentionquerykey"[i] for i in range(16)) for n in range(2**15)]


def _texts(found: dict[str, tuple[Any, str | None]]) -> dict[str, tuple[str | bytes, str | None]]:
    return {k: (v if isinstance(v, str | bytes) else json.dumps(v), words) for k, (v, words) in found.items()}


def _expressions() -> dict[str, tuple[Any, None]]:
    """Each expression under one of the keys, in turn: they share what bounds their time."""
    found = {}
    for i, (name, expression) in enumerate(CATASTROPHIC.items()):
        key = _EXPRESSION_KEYS[i % len(_EXPRESSION_KEYS)]
        value = {expression: 4} if key in ("rank_pattern", "alpha_pattern") else expression
        more = {"layers_to_transform": [1]} if key == "layers_pattern" else {}
        found[f"{key}, {name}"] = SMALL | more | {key: value}, None
    return found


def configs() -> dict[str, tuple[str | bytes, str | None]]:
    """``adapter_config.json``."""
    numbers = list(range(100_000, 100_000 + MEGABYTE // 8))
    slow = CATASTROPHIC["alternatives"]
    small: dict[str, tuple[dict[str, Any], str]] = {  # what SMALL has in addition
        "every expression": ({key: {".*a*b*c*!": 4} for key in _EXPRESSION_KEYS[2:4]}, ""),
        "r": ({"r": 10**8}, "shape of "),
        "larger r": ({"r": 10**99}, "r is 1"),
        "r of a layer": ({"rank_pattern": {"layer.1.attention.self.query": 10**8}}, "shape of "),
        "targets": ({"target_modules": _names()}, "target_modules ["),
        "targets and more": ({"target_modules": ["query", *_names()]}, ""),
        "one long target": ({"target_modules": ["a." * (MEGABYTE // 2) + "b"]}, "target_modules ["),
        "exclusions": ({"exclude_modules": _names()}, ""),
        "names in an expression": ({"target_modules": "|".join(_names("a."))}, "target_modules ["),
        "names in a group": ({"target_modules": f"({'|'.join(_names('a.'))})"}, "too many or too long"),
        "rank keys": ({"rank_pattern": dict.fromkeys(_names(), 2)}, ""),
        "keys with dots": ({"rank_pattern": dict.fromkeys(dotted(), 2)}, ""),
        "expressions": ({"rank_pattern": dict.fromkeys(_names(".*"), 2)}, "too many or too long"),
        "fewer expressions": ({"rank_pattern": {rf"{slow}{i}": 2 for i in range(300)}}, "takes too long"),
        "slow expressions": ({key: {f"{slow}|{key}": 4} for key in _EXPRESSION_KEYS[2:4]}, "takes too long"),
        "modules to save": ({"modules_to_save": _names()}, "modules_to_save ["),
        "all modules to save": ({"modules_to_save": list("abcdefghijklmnopqrstuvwxyz0123456789")}, "left to"),
        "the encoder to save": ({"target_modules": ["pooler.dense"], "modules_to_save": ["encoder"]}, "missing"),
        "layers": ({"layers_to_transform": numbers}, "nothing is left to adapt"),
        "lists": ({"layers_to_transform": [1], "layers_pattern": _names()}, "too many or too long"),
        "tokens": ({"trainable_token_indices": numbers}, "trainable_token_indices names the tokens ["),
        "all tokens": ({"trainable_token_indices": list(range(30522))}, "missing key"),
        "one token twice": ({"trainable_token_indices": [7] * (MEGABYTE // 3)}, "[7] more than once"),
        "embeddings": ({"trainable_token_indices": {name: [1] for name in _names()}}, "token_indices ["),
        "parts": ({"enable_lora": {name: [True] for name in _names()}}, ""),
        "many parts": ({"enable_lora": {"query": [True] * (MEGABYTE // 6)}}, "enable_lora"),
        "parameters": ({"target_parameters": [*_names(), "bias"]}, "target_parameters"),
        "unknown settings": (dict.fromkeys(_names(), 1), "not supported"),
        "one unknown setting": ({"x" * MEGABYTE: 1}, "if it is only a remark, remove it from the config"),
        "other type": ({"peft_type": "x" * MEGABYTE}, "peft_type is 'xxx"),
        "bias": ({"bias": _names()}, "bias is ["),
        "notes": ({"auto_mapping": [[]] * (MEGABYTE // 4)}, ""),
        "64 levels": ({"auto_mapping": json.loads("[" * 63 + "]" * 63)}, ""),
        "NUL": ({"target_modules": ["quer\0y"]}, r"target_modules ['quer\x00y'] matches"),
        "terminal": ({"\x1b[2J": "\x1b[2J"}, r"\x1b[2J='\x1b[2J' not supported"),
        "empty name": ({"target_modules": [""]}, "want non-empty strings"),
        "object of targets": ({"target_modules": {"query": 1}}, "want a list of non-empty strings"),
        "list as r": ({"r": [2]}, "r is [2] of type list"),
        "text as r": ({"r": "8"}, "r is '8' of type str"),
        "another type": ({"peft_type": None}, "peft_type is None, want 'LORA'"),
        "no such layer": ({"layers_to_transform": [12]}, "layers_to_transform"),
        "everything excluded": ({"exclude_modules": ["query"]}, "exclude_modules"),
        "negative alpha": ({"alpha_pattern": {"query": -3}}, "alpha_pattern['query'] is -3, want a positive finite"),
        "ties": ({"ensure_weight_tying": True}, "lora_ext.integrations.peft.accelerate"),
        **{key: ({key: "x"}, f"{key}='x' not supp") for key in ("lora_magnitude", "use_later_variant", "tagged_l")},
    }
    whole: dict[str, tuple[str | bytes, str]] = {
        "digits": ('{"peft_type": "LORA", "r": ' + "9" * MEGABYTE + "}", "digits"),
        "5000 digits": ('{"r": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        "infinite alpha": (json.dumps(SMALL).replace('_alpha": 2', '_alpha": 1e400'), "lora_alpha is inf"),
        "deep lists": ('{"auto_mapping": ' + "[" * (MEGABYTE // 2) + "]" * (MEGABYTE // 2) + "}", "levels"),
        "deep objects": ('{"a":' * (MEGABYTE // 6) + "1" + "}" * (MEGABYTE // 6), "levels"),
        "65 lists": ('{"auto_mapping": ' + "[" * 64 + "]" * 64 + "}", "more than 64 levels"),
        "65 objects": ('{"a": ' * 65 + "1" + "}" * 65, "more than 64 levels"),
        "half a character": ('{"peft_type": "LORA", "target_modules": ["\\ud800"]}', "surrogates not allowed"),
        "half a character as a key": ('{"\\udfff": 1}', "surrogates not allowed"),
        "no text": (b'{"a": "\xed\xa0\x80"}', "is not JSON"),
        "a line in a text": ('{"a": "\n"}', "is not JSON"),
        "empty": ("", "is not JSON"),
        "half": ("{", "is not JSON"),
        "number": ("1", "holds a int, want an object"),
        "null": ("null", "holds a NoneType, want an object"),
        "list": ("[]", "holds a list"),
        "BOM": ("\ufeff" + json.dumps(SMALL), "is not JSON"),
        "UTF-16": (json.dumps(SMALL).encode("utf-16"), "is not JSON"),
        "16 MiB": (json.dumps(SMALL).ljust(16 << 20), ""),
        "a byte more": (json.dumps(SMALL).ljust((16 << 20) + 1), "is larger than 16777216 bytes"),
    }
    return _texts(_expressions() | {k: (SMALL | v, words) for k, (v, words) in small.items()} | whole)


def methods() -> dict[str, tuple[str | bytes, str | None]]:
    """``method.json``."""
    sizes = {"adapter-h": "bottleneck_size", "prefix-embed": "prefix_length", "prefix-layer": "prefix_length"}
    found: dict[str, tuple[Any, str]] = {
        f"{name}, {option}={value:.0e}": (_of(name, **{option: value}), f"parameters with [{{'{option}'")
        for name, option in sizes.items()
        for value in (10**6, 10**99)
    }
    twice = {"methods": [{"name": "bitfit", "options": {}}] * 2}
    many = {"methods": twice["methods"] * (MEGABYTE // 72)}
    return _texts(
        found
        | {
            "no file of tensors": (_of("adapter-p", bottleneck_size=1), "but method.safetensors holds 0"),
            "methods": (many, "want a list of at least one"),
            "one method of many": (_of("+".join(["bitfit"] * (MEGABYTE // 8))), "want a name (one of full"),
            "a method twice": (twice, "want each method once"),
            "options": (_of("bitfit", **dict.fromkeys(_names()[:70_000], 1)), "has no option 'n000000'"),
            "one long option": (_of("bitfit", **{"x" * (MEGABYTE - 100): 1}), "has no option 'xxx"),
            "long activation": (_of("adapter-p", activation="x" * (MEGABYTE - 100)), "activation is 'xxx"),
            "no options": ({"methods": [{"name": "bitfit"}]}, "and options"),
            "no name": ({"methods": [{"name": ["bitfit"], "options": {}}]}, "want a name"),
            "no methods": ({}, "methods is None"),
            "none of the methods": ({"methods": []}, "methods is []"),
            "a number": ({"methods": [1]}, "want a name"),
            "another order": (_of("adapter-p+lora"), "want a name (one of full"),
            "pooling": ({"methods": twice["methods"][:1], "pooling": "max"}, "pooling is 'max', want one of cls, mean"),
            "list": ([], "holds a list"),
            "deep": ('{"methods": ' + "[" * 400_000 + "]" * 400_000 + "}", "levels"),
            "large": (" " * (2 << 20), "larger than"),
            "low-rank": (_of("lora"), "adapter_config.json is missing"),
        }
    )


def _of(name: str, **options: Any) -> dict[str, Any]:
    return {"methods": [{"name": name, "options": options}]}


def _file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _nothing(shape: list[int]) -> dict[str, Any]:
    """Header entry of a tensor without elements."""
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


def _of_zeros(size: int, dtype: str) -> bytes:
    """Makes a file with one factor of ``size`` bytes."""
    return _file({KEY: {"dtype": dtype, "shape": [2, WIDTH], "data_offsets": [0, size]}}, bytes(size))


def _with_note(note: Any) -> bytes:
    """Makes a file with metadata of packed projections."""
    text = note if isinstance(note, str) else json.dumps(note)
    return _file({"__metadata__": {"lora_ext": text}, KEY: _nothing([0])})


def weights() -> dict[str, tuple[bytes, str]]:
    """``adapter_model.safetensors``, with headers of about a megabyte."""
    config = {"enable_lora": None, "rank_pattern": {}, "alpha_pattern": {}}
    tokens = {f"n{i:06}.trainable_tokens_delta": _nothing([0, 0]) for i in range(MEGABYTE // 100)}
    cannot, wrong = "a shape that PyTorch cannot hold", "not a safetensors file"
    return {
        "factors": (_file({f"{KEY}{i:06}": _nothing([0, 0]) for i in range(MEGABYTE // 130)}), "unexpected key"),
        "rows": (_file(tokens), "unexpected key"),
        "one long key": (_file({"x" * MEGABYTE: _nothing([0])}), "characters, want at most 500"),
        "501 letters": (_file({"x" * 501: _nothing([0])}), "a name of 501 characters, want at most 500"),
        "terminal": (_file({"\x1b[2J": _nothing([0])}), "characters that cannot be printed"),
        "lines": (_file({"a\nb": _nothing([0])}), "characters that cannot be printed"),
        "dimensions": (_file({KEY: _nothing([0] + [1] * (MEGABYTE // 3))}), cannot),
        "sizes": (_file({KEY: _nothing([0] + [2**62] * (MEGABYTE // 21))}), cannot),
        "one size": (_file({KEY: _nothing([0, 2**59 + 1])}), cannot),
        "65 dimensions": (_file({KEY: _nothing([0] + [1] * 64)}), cannot),
        "other shape": (_file({KEY: _nothing([0, WIDTH])}), "shape of base_model"),
        "integers": (_of_zeros(2 * WIDTH, "U8"), "dtype of base_model"),
        "complex": (_of_zeros(16 * WIDTH, "C64"), "dtype of base_model"),
        "half bytes": (_of_zeros(WIDTH, "F4"), "the dtype F4, which PyTorch cannot hold"),
        "unknown dtype": (_of_zeros(2 * WIDTH, "F9"), wrong),
        "deep": (_file(b'{"a":' + b"[" * (MEGABYTE // 2)), wrong),
        "length": (struct.pack("<Q", 2**63) + b"{}", wrong),
        "short": (b"\0" * 7, wrong),
        "cut": (_of_zeros(8 * WIDTH, "F32")[:-1], wrong),
        "deep note": (_with_note('{"a":' * (MEGABYTE // 6) + "1" + "}" * (MEGABYTE // 6)), "levels"),
        "list as note": (_with_note([]), "holds a list"),
        "note of others": (_with_note({"config": {"x": "x" * MEGABYTE}}), "holds the config {'x'"),
        "config in the note": (_with_note({"config": config | {"rank_pattern": "x"}}), "rank_pattern is 'x'"),
    }


# --- random changes ---------------------------------------------------------------------------------------------------

WORDS = ["-0", "1E2", "01", "1e999", "NaN", str(2**63), "9" * 5000, "null", "[]", "{}", '""', '"F32"', '"\\ud800"']
WORDS += ['"\\u0000"', '"\n"', "'a'", "[0, 8]", '{"a": 1, "a": 2}', '"../x"', "[" * 100 + "]" * 100, "2", "[3, 3]"]


def changed(content: bytes, seed: int) -> bytes:
    """Changes words of a file's JSON, the header of its tensors included, or its bytes, in one to three places."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        is_text = content[:1] == b"{"
        start, end = (0, len(content)) if is_text else (8, 8 + int.from_bytes(content[:8], "little"))
        words = list(re.finditer(rb'"[^"]*"|\d+|[{}\[\],:]', content[start:end]))
        if words and rng.random() < 0.7:
            word = rng.choice(words)
            text = content[start + word.start() : start + word.end()]
            text = rng.choice((rng.choice(WORDS).encode(), b"", text + text, text[:-1], b'"' + text + b'"'))
            header = content[start : start + word.start()] + text + content[start + word.end() : end]
            content = (b"" if is_text else struct.pack("<Q", len(header))) + header + content[end:]
            continue
        at = rng.randrange(len(content) + 1)
        part, rest = content[at : at + rng.choice((1, 8, 300))], content[at:]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part)
        content = content[:at] + rng.choice((b"", rest[len(part) :], part + rest, flipped + rest[len(part) :]))
    return content


# --- checkpoints ------------------------------------------------------------------------------------------------------

Damage = Callable[[Path], object]
FILE_NAMES = [[], {"a": 1}, 3, "../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", "..\\x", ""]
FILE_NAMES += ["c:x.safetensors", "config.json", ".x.safetensors", "\x1b[31m.safetensors", "a\nb.safetensors"]
FILE_NAMES += ["a\0b.safetensors", "a" * 300 + ".safetensors", "a" * 10**6 + ".safetensors"]


def checkpoints() -> dict[str, tuple[str, Damage, str]]:
    """Damages of a checkpoint in two files with tensors such as ``a.weight``: the file, the damage, words."""

    def index(change: Callable[[dict[str, Any]], object]) -> Damage:
        def damage(directory: Path) -> None:
            content = json.loads((directory / INDEX).read_text())
            change(content)
            (directory / INDEX).write_text(json.dumps(content))

        return damage

    def named(name: object, key: str = "a.weight") -> Damage:
        return index(lambda content: content["weight_map"].update({key: name}))

    def content(name: str, raw: bytes) -> Damage:
        return lambda directory: (directory / name).write_bytes(raw)

    def pipe(name: str) -> Damage:
        return lambda directory: (directory / name).unlink() or os.mkfifo(directory / name)

    config = "config.json"
    found: dict[str, tuple[str, Damage, str]] = {
        "no weight_map": (INDEX, index(lambda c: c.pop("weight_map")), "weight_map is None, want file names"),
        "weight_map empty": (INDEX, index(lambda c: c.update(weight_map={})), "weight_map is {}, want file names"),
        "no object": (INDEX, content(INDEX, b"[]"), "holds a list, want an object"),
        "index pipe": (INDEX, pipe(INDEX), "is a pipe, want a regular file"),
        "file missing": (INDEX, named("x.safetensors"), "names files that are missing"),
        "tensor missing": (INDEX, named(SHARD, "x\x1b\n"), rf"not in {SHARD}: x\x1b\n"),
        "tensor not named": (INDEX, index(lambda c: c["weight_map"].pop("a.weight")), "not in the index: a"),
        "cut": (SHARD, lambda path: os.truncate(path / SHARD, 300), "is corrupted or not a safetensors file: "),
        "shard pipe": (SHARD, pipe(SHARD), "is a pipe, want a regular file"),
        "name newline": (SHARD, lambda path: add_tensor(path, "x\nlora-ext: fake"), r"'x\nlora-ext: fake'"),
        "four bits": (SHARD, lambda path: add_tensor(path, "x", "F4", (2,), 1), "the dtype F4, which PyTorch"),
        "config list": (config, content(config, b"[]"), "holds a list, want an object"),
        "config large": (config, content(config, b'{"a": "' + b"x" * (16 << 20) + b'"}'), "larger than 16777216 bytes"),
        "config numbers": (config, content(config, b'{"architectures": [1]}'), "architectures is [1], want a list of"),
    }
    words = "want a name without a path of up to 255"
    return found | {f"file name {i}": (INDEX, named(name), words) for i, name in enumerate(FILE_NAMES)}
