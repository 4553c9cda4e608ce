"""The code follows the table "Who may use whom" in docs/architecture.md."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_ext"
DOCUMENT = ROOT / "docs" / "architecture.md"
EVERYWHERE = {*sys.stdlib_module_names, "torch"}
CALLS_OPS = ("_ops/", "functional.py", "merging/")
SEE = 'see the table "Who may use whom" in docs/architecture.md'


def table() -> dict[str, tuple[set[str], set[str]]]:
    """The rows: part -> the parts it imports from, other packages."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Who may use whom")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    names = re.compile(r"`([^`]+)`")
    return {part.strip(" `"): (set(names.findall(uses)), set(others.split())) for part, _, uses, others in rows}


ROWS = table()


def part_of(file: str) -> str:
    """The row's name for a file of the package: its folder at the top, or the file next to the folders."""
    folder, slash, _ = file.partition("/")
    return folder + slash


def files_of(module: str, names: list[str]) -> Iterator[str]:
    """The files of the package behind ``from module import names``."""
    path = module.removeprefix("lora_ext").strip(".").replace(".", "/")
    for name in names:
        longer = f"{path}/{name}".strip("/")
        candidates = (f"{longer}.py", f"{longer}/__init__.py", f"{path}.py", f"{path}/__init__.py".strip("/"))
        file = next((candidate for candidate in candidates if (PACKAGE / candidate).is_file()), None)
        if file is not None:
            yield file


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Returns ``(module, names)`` for every import that runs, at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, [""]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module or "", [alias.name for alias in node.names]
        yield from imports(node)


def violations(file: str, source: str) -> list[str]:
    """Returns the imports of ``file`` that the table does not allow."""
    part, tree = part_of(file), ast.parse(source)
    if part not in ROWS:
        return [f"{file}: {part} has no row"]
    uses, others = ROWS[part]
    found = []
    for module, names in imports(tree):
        package = module.split(".")[0]
        used = [part_of(used) for used in files_of(module, names)] if package == "lora_ext" else []
        if not {*used} <= {part, *uses} or (package != "lora_ext" and package not in EVERYWHERE | others):
            found.append(f"{file}: {module}")
    return found


def sources() -> dict[str, str]:
    """The package's files that hold more than a docstring."""
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    return {file: source for file, source in sorted(files.items()) if len(ast.parse(source).body) > 1}


SOURCES = sources()


def test_the_table_has_one_row_for_each_part_of_this_tree():
    assert len(SOURCES) > 100
    assert {part_of(file) for file in SOURCES} == ROWS.keys(), (
        f"give each folder and each file next to them a row; {SEE}"
    )


def test_every_part_is_below_those_that_it_uses():
    """So no imports form a circle: the next test checks them by these rows."""
    above: set[str] = set()
    for part, (uses, _) in ROWS.items():
        assert uses <= above, f"{part} uses {sorted(uses - above)}, which have no rows above it"
        above.add(part)


def test_imports_are_those_of_the_table():
    found = [violation for file, source in SOURCES.items() for violation in violations(file, source)]
    assert not found, f"imports that the row of the importing part does not list; {SEE}"


def test_no_files_import_each_other():
    """No circles inside a part either; imports inside functions count."""
    uses = {
        file: {
            used
            for module, names in imports(ast.parse(source))
            if module.split(".")[0] == "lora_ext"
            for used in files_of(module, names)
        }
        for file, source in SOURCES.items()
    }
    assert sum(map(len, uses.values())) > len(uses)
    graphlib.TopologicalSorter(uses).prepare()  # CycleError names the circle


def test_ops_are_called_at_the_bottom():
    callers = [file for file, source in SOURCES.items() if re.search(r"torch\.ops\.lora_ext\.\w", source)]
    others = [file for file in callers if part_of(file) not in CALLS_OPS]
    assert not others, "call the function of lora_ext/functional.py instead of torch.ops.lora_ext"
    assert {part_of(file) for file in callers} == set(CALLS_OPS)


def test_kernels_include_no_torch_header():
    torch_header = re.compile(r'#include [<"](torch|ATen|c10)/')
    folders = {
        path.relative_to(ROOT / "csrc").parts[0]
        for path in (ROOT / "csrc").rglob("*.*")
        if path.is_file() and torch_header.search(path.read_text(encoding="utf-8"))
    }
    assert folders == {"bindings", "library.cpp"}
