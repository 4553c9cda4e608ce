"""Hostile contents of ``adapter_config.json``, of about a megabyte: they cost time or memory, or confuse."""

from __future__ import annotations

import json
from typing import Any

MEGABYTE = 1_000_000
WIDTH = 12  # of the model, which has BERT-base's names
SMALL = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
"""Adapts the queries of BERT."""

CATASTROPHIC = {  # none ends with a single character, which regex would search for first
    "nested": r"(\w+\.?)+[!?]",
    "alternatives in a repeat": r"((\w|[a-z])+\.?)+(?:$(?<=!)|!)",
    "nested dots": r"(.*a*)*$[!?]",
    "alternatives": r"(a|b|[a-z]|\w|\.)*[!?]",
    "wildcards": ".*" * 40 + "[!?]",
    "in a lookahead": r"(?=(.+)+[!?]).*",
    "in a lookbehind": r"(.+)+(?<=[!?])",
    "counted": r"(?:(?:(?:.{0,9}){0,9}){0,9})[!?]",
    "optional": "(.?){60}[!?]",
    "written out": r"((((a|b){99}){99}){99}){99}",
    "a large count": "a{99999999999999999999}",
    "reference": r"(\w+\s?)+\1[!?]",
    "ignoring case": "(?i)(" + "|".join(f"(.*{letter})*[!?]" for letter in "abcdefghijklmnopqrstuvwxyz") + ")*",
    "wide classes": "(?i)" + "".join(f"[\x00-{chr(0x10000 + i)}]*" for i in range(500)) + "[!?]",
    "many classes": "".join(f"[\x00-{chr(0x100 + i)}]*" for i in range(1000)) + "[!?]",
    "long": "|".join(["(a.*)*"] * 1000),
    "deep": "(" * 300 + "a" + ")*" * 300,
    "fuzzy": r"(?:(?:encoder|layer|query).*){e<=30}",
}
EXPRESSION_KEYS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")


def names(prefix: str = "") -> list[str]:
    return [f"{prefix}n{i:06}" for i in range(MEGABYTE // (len(prefix) + 11))]


def numbers() -> list[int]:
    return list(range(100_000, 100_000 + MEGABYTE // 8))


def dotted() -> list[str]:
    """Names of equal length with dots at different places."""
    return ["".join("." if number >> i & 1 else "attentionquerykey"[i] for i in range(16)) for number in range(2**15)]


def with_expression(key: str, expression: str) -> dict[str, Any]:
    if key == "layers_pattern":
        return SMALL | {"layers_to_transform": [1], "layers_pattern": expression}
    return SMALL | {key: {expression: 4} if key.endswith("_pattern") else expression}


def configs(every_expression: bool) -> dict[str, tuple[str | bytes, str | None]]:
    """Returns a config's text and words of the error, by kind of attack; "": it loads; None: either is fine.

    Args:
        every_expression: pair each catastrophic expression with every key, instead of one of the five.
    """
    fine = ""
    found: dict[str, tuple[dict[str, Any] | str | bytes, str | None]] = {
        f"{key}, {name}": (with_expression(key, expression), None)
        for i, (name, expression) in enumerate(CATASTROPHIC.items())
        for j, key in enumerate(EXPRESSION_KEYS)
        if every_expression or i % len(EXPRESSION_KEYS) == j
    }
    found |= {
        "every expression": (
            SMALL | {key: {".*a*b*c*!": 4} for key in EXPRESSION_KEYS[2:4]} | {"exclude_modules": ".*a*b*c*!"},
            fine,
        ),
        "r": (SMALL | {"r": 10**8}, "shape of "),
        "largest r": (SMALL | {"r": 2**31 - 1}, "shape of "),
        "larger r": (SMALL | {"r": 10**99}, "r is 1"),
        "r of a layer": (SMALL | {"rank_pattern": {"layer.1.attention.self.query": 10**8}}, "shape of "),
        "digits": ('{"peft_type": "LORA", "r": ' + "9" * MEGABYTE + "}", "digits"),
        "infinite alpha": (json.dumps(SMALL).replace('_alpha": 2', '_alpha": 1e400'), "lora_alpha is inf"),
        "no alpha": (json.dumps(SMALL).replace('_alpha": 2', '_alpha": NaN'), "lora_alpha is nan"),
        "targets": (SMALL | {"target_modules": names()}, "target_modules ["),
        "targets and more": (SMALL | {"target_modules": ["query", *names()]}, fine),
        "one long target": (SMALL | {"target_modules": ["a." * (MEGABYTE // 2) + "b"]}, "target_modules ["),
        "exclusions": (SMALL | {"exclude_modules": names()}, fine),
        "names in an expression": (SMALL | {"target_modules": "|".join(names("a."))}, "target_modules ["),
        "names in a group": (SMALL | {"target_modules": f"({'|'.join(names('a.'))})"}, "too many or too long"),
        "rank keys": (SMALL | {"rank_pattern": dict.fromkeys(names(), 2)}, fine),
        "alpha keys": (SMALL | {"alpha_pattern": dict.fromkeys(names("layer.0."), 2)}, fine),
        "keys with dots": (SMALL | {"rank_pattern": dict.fromkeys(dotted(), 2)}, fine),
        "expressions": (SMALL | {"rank_pattern": dict.fromkeys(names(".*"), 2)}, "too many or too long"),
        "fewer expressions": (
            SMALL | {"rank_pattern": {rf"(a|[a-z]|\w|\.)*[!?]{i}": 2 for i in range(499)}},
            "takes too long",
        ),
        "slow expressions": (
            SMALL | {key: {CATASTROPHIC["alternatives"] + f"|{key}": 4} for key in EXPRESSION_KEYS[2:4]},
            "takes too long",
        ),
        "modules to save": (SMALL | {"modules_to_save": names()}, "modules_to_save ["),
        "all modules to save": (SMALL | {"modules_to_save": list("abcdefghijklmnopqrstuvwxyz0123456789")}, "left to"),
        "the encoder to save": (
            SMALL | {"target_modules": ["pooler.dense"], "modules_to_save": ["encoder"]},
            "missing",
        ),
        "layers": (SMALL | {"layers_to_transform": numbers()}, "layers_to_transform=("),
        "lists": (SMALL | {"layers_to_transform": [1], "layers_pattern": names()}, "too many or too long"),
        "tokens": (SMALL | {"trainable_token_indices": numbers()}, "trainable_token_indices names the tokens ["),
        "all tokens": (SMALL | {"trainable_token_indices": list(range(30522))}, "missing key"),
        "one token twice": (SMALL | {"trainable_token_indices": [7] * (MEGABYTE // 3)}, "[7] more than once"),
        "embeddings": (SMALL | {"trainable_token_indices": {name: [1] for name in names()}}, "token_indices ["),
        "tokens of one letter": (SMALL | {"trainable_token_indices": {"s": numbers()}}, "trainable_token_indices"),
        "parts": (SMALL | {"enable_lora": {name: [True] for name in names()}}, fine),
        "many parts": (SMALL | {"enable_lora": {"query": [True] * (MEGABYTE // 6)}}, "enable_lora"),
        "parameters": (SMALL | {"target_parameters": names("a.")}, fine),
        "parameters of any module": (SMALL | {"target_parameters": [*names(), "bias"]}, "target_parameters"),
        "unknown settings": (SMALL | dict.fromkeys(names(), 1), "not supported"),
        "one unknown setting": (SMALL | {"x" * MEGABYTE: 1}, "not supported"),
        "other type": (SMALL | {"peft_type": "x" * MEGABYTE}, "peft_type is 'xxx"),
        "task": (SMALL | {"task_type": names()}, "task_type is ["),
        "bias": (SMALL | {"bias": names()}, "bias is ["),
        "initialisation": (SMALL | {"init_lora_weights": "x" * MEGABYTE}, "init_lora_weights is 'xx"),
        "notes": (SMALL | {"auto_mapping": names()}, fine),
        "empty lists": (SMALL | {"auto_mapping": [[]] * (MEGABYTE // 4)}, fine),
        "deep lists": ('{"auto_mapping": ' + "[" * (MEGABYTE // 2) + "]" * (MEGABYTE // 2) + "}", "levels"),
        "deep objects": ('{"a":' * (MEGABYTE // 6) + "1" + "}" * (MEGABYTE // 6), "levels"),
        "a key twice": ('{"peft_type": "LORA", "r": 1, "r": 2}', "the key 'r' occurs twice"),
        "half a character": ('{"peft_type": "LORA", "target_modules": ["\\ud800"]}', "not Unicode"),
        "NUL": (SMALL | {"target_modules": ["quer\0y"]}, r"target_modules ['quer\x00y'] matches"),
        "terminal": (SMALL | {"\x1b[2J": "\x1b[2J"}, r"\x1b[2J='\x1b[2J' not supported"),
        "empty name": (SMALL | {"target_modules": [""]}, "want non-empty strings"),
        "empty": ("", "is not JSON"),
        "list": ("[]", "holds a list"),
        "BOM": ("\ufeff" + json.dumps(SMALL), "is not JSON"),
        "UTF-16": (json.dumps(SMALL).encode("utf-16"), "is not JSON"),
        "object of targets": (SMALL | {"target_modules": {"query": 1}}, "want a list of module names"),
        "list of lists": (SMALL | {"target_modules": [["query"]]}, "want non-empty strings"),
        "list as r": (SMALL | {"r": [2]}, "r is [2] of type list"),
        "17 MB": (b" " * (17 << 20), "larger than"),
    }
    return {
        name: (content if isinstance(content, str | bytes) else json.dumps(content), words)
        for name, (content, words) in found.items()
    }
