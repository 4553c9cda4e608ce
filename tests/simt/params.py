"""Reads the kernels' parameter structs for ctypes from the C++ headers that define them.

They are plain structs of integers, pointers, flags, enums and arrays of such structs. `layout_check` lets the compiler
check every offset.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from .build import ROOT

HEADERS = [
    "csrc/common/dtype.h",
    "csrc/common/params.h",
    "csrc/common/merge_params.h",
    "csrc/cuda/launch.h",
]
NAMESPACES = ["lora_ext", "lora_ext::cuda"]

INTEGERS = [f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)]
NUMBERS = ["int", "bool", "double", "float", *INTEGERS]
SCALARS = {name: getattr(ctypes, f"c_{name.removesuffix('_t')}") for name in NUMBERS}


def _parse() -> dict[str, type[ctypes.Structure]]:
    structs: dict[str, type[ctypes.Structure]] = {}
    types: dict[str, type] = dict(SCALARS)
    constants: dict[str, int] = {}
    for header in HEADERS:
        text = re.sub(r"//.*", "", (ROOT / header).read_text())
        constants |= {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", text)}
        types |= {name: SCALARS[base or "int"] for name, base in re.findall(r"enum class (\w+)(?: : (\w+))?", text)}
        for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
            structs[name] = type(name, (ctypes.Structure,), {"_fields_": _fields(body, types, constants)})
            types[name] = structs[name]
    return structs


def _fields(body: str, types: dict[str, type], constants: dict[str, int]) -> list[tuple[str, type]]:
    fields = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        match = re.fullmatch(r"(?:const )?(\w+)(\*?) ?(.+)", declaration)
        if not match:
            raise ValueError(f"tests/simt/params.py cannot read the declaration {declaration!r}")
        base, star, names = match.groups()
        for name in names.split(","):
            name, _, count = name.partition("=")[0].strip().partition("[")
            type_ = ctypes.c_void_p if star else types[base]
            if count:
                count = count.rstrip("]")
                type_ = type_ * (constants[count] if count in constants else int(count))
            fields.append((name.lstrip("* "), type_))
    return fields


STRUCTS = _parse()


def __getattr__(name: str) -> type[ctypes.Structure]:
    try:
        return STRUCTS[name]
    except KeyError:
        raise AttributeError(name) from None


def layout_check(path: Path) -> Path:
    """Writes a C++ file that compiles only if every struct has the layout that Python assumes."""
    lines = ["#include <cstddef>", *(f'#include "{ROOT / header}"' for header in HEADERS)]
    lines += [f"using namespace {namespace};" for namespace in NAMESPACES]
    for name, struct in STRUCTS.items():
        lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "size of {name}");')
        for field, _ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f'static_assert(offsetof({name}, {field}) == {offset}, "offset of {name}::{field}");')
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path
