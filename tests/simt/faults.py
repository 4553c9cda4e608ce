"""Finds places for small faults in the kernels' sources, and plants some of them in a copy, each behind a switch.

Works on text: formatted C++ has spaces around binary operators, and none inside template arguments. A fault moves no
line. mutants/faults.h defines what is written.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .build import ROOT, SIMT

STAND_INS = {"ptx.cuh", "launch.cuh", "shared_memory.cuh"}  # tests/simt has its own
NAMES = {"<": "Less", "<=": "LessEqual", ">": "Greater", ">=": "GreaterEqual", "==": "Equal", "!=": "NotEqual"}
NAMES |= {"+": "Plus", "-": "Minus", "*": "Times", "/": "Over", "%": "Modulo", "<<": "ShiftLeft", ">>": "ShiftRight"}
NAMES |= {"&": "And", "|": "Or", "^": "Xor"}

# Kind of fault, what it replaces, and what it writes: {n} is group n, @ the fault's number.
REPLACED = [
    *(("operator", f"(?<= ){re.escape(op)}(?=\\s)", f"{op} simt::{name}{{{{@}}}} {op}") for op, name in NAMES.items()),
    ("constant", r"(?<![\w.{])\d+u?(?![\w.'])", "simt::off_by_one(@, {0})"),
    ("min or max", r"(?<![\w:.])(min|max)\(", "simt::faulty_{1}(@, "),
    ("negation", r"!(?=\w)", "simt::planted(@) != !"),
    (
        "condition true",
        r"(?:(?<=[^<>=!]= )|(?<=[,?:] )|(?<=return )|(?<=\())\w[\w.]*(?= \? )",
        "({0} || simt::planted(@))",
    ),
    ("index", r"(?<=\[)(\w+)(?=\]\[(?!\1\])(\w+)\])", "simt::planted(@) ? {2} : {1}"),
    ("argument", r"(?<=\w\()(\w+)(?=, (?!\1[,)])(\w+)[,)])", "simt::planted(@) ? {2} : {1}"),
]
# Faults of what begins here and ends with its closing bracket, or before an operator that binds less than &&.
WRAPPED = [
    ("condition true", r"\bif \(", "||"),
    ("condition false", r"\bif \(", "&& !"),
    ("condition true", r" && ", "||"),
    ("condition false", r" \|\| ", "&& !"),
]
# Lines without a fault: constants and declarations for the compiler, and labels.
LEFT_OUT = re.compile(
    r"\b(constexpr|static_assert|template|using|alignas|__shared__|throw|case|default|operator|in_global_memory)\b"
)
# Template arguments, the sizes of an array that is declared, and members that are set later.
CONSTANT = re.compile(
    r"(?<=\w)<(?=\S)(?:[^<>;]|<(?=\S)[^<>;]*>)*>"
    r"|^\s*(?:const )?[\w:<>]+ \w+(?:\[[^\]]*\])+|\(&\w+\)(?:\[[^\]]*\])+|\.\w+ = 0\b"
)
CONTROL = re.compile(r"\s*(?:else\s+)?(?:(?:if|for|while)\s*\(|else\s)")
# A call, an assignment, an increment or a jump; with two words at its begin it would be a declaration. Not the value
# that a function returns: the compiler takes its end for unreachable.
DROPPED = re.compile(
    r"(?!return \()"
    r"(\*?[\w:]+(<[^;=()]*>)?(\[[^=]*?\]|\.\w+|->\w+)*\s*(\(|[-+*/&|^]?=|<<=|>>=)|\+\+\w+|--\w+|return$|continue|break)"
)


class Edit(NamedTuple):
    begin: int  # offsets in the file
    end: int
    new: str


@dataclass(frozen=True)
class Fault:
    path: str  # relative to the repository
    line: int
    kind: str
    text: str  # the line, with brackets around what changes
    edits: tuple[Edit, ...]

    @property
    def name(self) -> str:
        """Names the fault as mutants/equivalent.txt does: edits of other lines do not change it."""
        return f"{self.path}: {self.kind}: {self.text}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.text}"


def sources() -> list[Path]:
    """Returns the files whose lines kernels run: the host code that starts them, too."""
    cuda = [path for path in (ROOT / "csrc/cuda").rglob("*.cu*") if path.name not in STAND_INS]
    return sorted([*cuda, *(ROOT / "csrc/common").glob("*.h")])


def choose(count: int, seed: int) -> list[Fault]:
    """Returns faults of random lines, at most one of a line; in a line all kinds are as likely."""
    kinds_of: dict[tuple[str, int], dict[str, list[Fault]]] = {}
    chances: dict[float, tuple[random.Random, tuple[str, int]]] = {}
    for path in sources():
        text = path.read_text().splitlines()
        for fault in faults_of(path):
            place = fault.path, fault.line
            if place not in kinds_of:
                # From the line's text: an edit of other lines changes no choice.
                chance = random.Random(f"{seed} {fault.path} {text[fault.line - 1]} {text[fault.line - 2]}")
                chances[chance.random()] = chance, place
            kinds_of.setdefault(place, {}).setdefault(fault.kind, []).append(fault)
    chosen = [chances[number] for number in sorted(chances)[:count]]
    return [chance.choice(kinds_of[place][chance.choice(sorted(kinds_of[place]))]) for chance, place in chosen]


def plant(faults: list[Fault], folder: Path) -> None:
    """Copies the sources to ``folder`` with these faults. Fault number N is faults[N]."""
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    for path in [*(ROOT / "csrc/cuda").rglob("*.*"), *(ROOT / "csrc/common").glob("*.h")]:
        text, relative = path.read_text(), str(path.relative_to(ROOT))
        edits = [
            edit._replace(new=edit.new.replace("@", str(number)))
            for number, fault in enumerate(faults)
            for edit in fault.edits
            if fault.path == relative
        ]
        for begin, end, new in sorted(edits, reverse=True):
            text = text[:begin] + new + text[end:]
        if edits:
            comment, rest = text.split("\n", 1)
            assert comment.startswith("//"), f"{relative} has no comment in its first line"
            text = f'#include "{SIMT / "mutants/faults.h"}"\n{rest}'
        copy = folder / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)


def faults_of(path: Path) -> Iterator[Fault]:
    text, relative = path.read_text(), str(path.relative_to(ROOT))
    code = _without_comments(text)
    for begin, end in _statements(code, shared=relative.startswith("csrc/common")):
        if re.match(r"\s*break;\s*\}", code[begin:]):  # the last of a switch
            continue
        for kind, *edits in _faults_in(code[begin : end + 1]):
            edits = tuple(Edit(begin + edit.begin, begin + edit.end, edit.new) for edit in edits)
            first, line_end = edits[0].begin, text.find("\n", edits[0].begin)
            last = min(edits[-1].end, line_end)
            line = f"{text[text.rfind(chr(10), 0, first) + 1 : first]}[{text[first:last]}]{text[last:line_end]}"
            yield Fault(relative, text.count("\n", 0, first) + 1, kind, line.strip(), edits)


def _without_comments(text: str) -> str:
    """Blanks comments, strings, preprocessor lines and what only nvcc compiles; nothing moves."""
    blank = r"//[^\n]*|\"[^\"\n]*\"|^#if defined\(__CUDACC__\).*?^#e\w+|^#[^\n]*"
    return re.sub(blank, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL | re.MULTILINE)


def _statements(code: str, shared: bool) -> Iterator[tuple[int, int]]:
    """Yields the places of statements in bodies of functions: what stands between semicolons and braces.

    Left out: functions that only the compiler runs and, in files shared with the CPU, those that are not for devices.
    """
    in_function, depth, begin = [False], 0, 0
    for place, char in enumerate(code):
        depth += (char in "([") - (char in ")]")
        if depth or char not in ";{}":
            continue
        if in_function[-1]:
            yield begin, place
        if char == "{":
            head = code[begin:place].strip()
            is_type = re.match(r"(template\s*<.*>\s*)?(namespace|struct|class|enum|union)\b", head, re.DOTALL)
            is_run = "device" in head.lower() or not (shared or "constexpr" in head)
            in_function.append(in_function[-1] or (not is_type and is_run and head.endswith((")", "const"))))
        elif char == "}" and len(in_function) > 1:
            in_function.pop()
        begin = place + 1


def _faults_in(statement: str) -> Iterator[tuple]:
    """Yields the kind of a fault and its edits; the statement ends with its semicolon or brace."""
    if LEFT_OUT.search(statement):
        return
    shown = CONSTANT.sub(lambda m: "_" * len(m[0]), statement)
    for kind, pattern, new in REPLACED:
        for m in re.finditer(pattern, shown):
            yield kind, Edit(m.start(), m.end(), new.format(statement[m.start() : m.end()], *m.groups()))
    for kind, pattern, unit in WRAPPED:
        for m in re.finditer(pattern, shown):
            end = _expression_end(shown, m.end(), "" if m[0].endswith("(") else "&|?:,;{")
            yield kind, Edit(m.end(), m.end(), "(("), Edit(end, end, f") {unit}simt::planted(@))")
    begin = 0
    while m := CONTROL.match(shown, begin):
        begin = _expression_end(shown, m.end(), "") + 1 if m[0].endswith("(") else m.end()
    begin += len(shown[begin:]) - len(shown[begin:].lstrip())
    if shown.endswith(";") and DROPPED.match(shown[begin:-1]):
        end = len(statement) - 1
        yield "statement", Edit(begin, begin, "if (simt::planted(@)) {} else "), Edit(end, end, "")


def _expression_end(text: str, begin: int, stops: str) -> int:
    """Returns where the expression ends: at one of ``stops`` behind a space, or at the closing bracket."""
    depth = 0
    for at in range(begin, len(text)):
        if depth == 0 and text[at] in ")]}":
            return at
        if depth == 0 and text[at] in stops and (text[at] in ",;" or text[at - 1] == " "):
            return at - (text[at - 1] == " ")
        depth += (text[at] in "([{") - (text[at] in ")]}")
    return len(text) - 1
