"""The command that installs an extra of this package, whether it came from a checkout or from an index."""

from __future__ import annotations

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def install_hint(extra: str) -> str:
    """Returns the command that installs ``extra``, with the packages that it installs."""
    try:
        installed = metadata.distribution("lora_ext")
    except metadata.PackageNotFoundError:
        installed = None
    packages = [] if installed is None else _packages(installed, extra)
    more = f" (it installs {', '.join(packages)})" if packages else ""
    requirement = _requirement(installed, extra)
    is_editable = installed is not None and (_direct_url(installed).get("dir_info") or {}).get("editable")
    return f"pip install {'--editable ' if is_editable else ''}{shlex.quote(requirement)}{more}"


def _requirement(installed: metadata.Distribution | None, extra: str) -> str:
    """The requirement for pip: the source of this installation, with the extra."""
    source = None if installed is None else _source(installed)
    if source is not None and not source.startswith("file:"):
        return f"lora_ext[{extra}] @ {source}"
    places = [Path(unquote(urlsplit(source).path))] if source is not None else []
    checkout = Path(__file__).resolve().parents[2]
    places += [checkout] if (checkout / "pyproject.toml").is_file() else []  # run without an installation
    return next((f"{place}[{extra}]" for place in places if place.exists()), f"lora_ext[{extra}]")


def _source(installed: metadata.Distribution) -> str | None:
    """The URL of the installation's source; None for an index."""
    direct_url = _direct_url(installed)
    try:
        if version_control := direct_url.get("vcs_info"):
            return f"{version_control['vcs']}+{direct_url['url']}@{version_control['commit_id']}"
    except (KeyError, TypeError):
        return None
    return direct_url.get("url")


def _direct_url(installed: metadata.Distribution) -> dict[str, Any]:
    """pip's record of the source (PEP 610); {} for an installation from an index."""
    try:
        record = json.loads(installed.read_text("direct_url.json") or "{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("url", ""), str) else {}


def _packages(installed: metadata.Distribution, extra: str) -> list[str]:
    """Names of the packages in ``extra``, including those of nested extras."""
    names: list[str] = []
    for requirement in installed.requires or ():
        name, _, marker = requirement.partition(";")
        if not re.search(rf"""extra\s*==\s*["']{re.escape(extra)}["']""", marker):
            continue
        plain, inner = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", name).groups()
        if plain.replace("-", "_").lower() == "lora_ext":
            for nested in (inner or "").split(","):
                names += _packages(installed, nested.strip())
        else:
            names.append(plain)
    return list(dict.fromkeys(names))
