"""How to install an extra of this package, of an installation from a checkout as of one from an index."""

from __future__ import annotations

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["install_hint"]


def install_hint(extra: str) -> str:
    """Returns the command that installs ``extra``, and what it brings."""
    try:
        installed = metadata.distribution("lora_ext")
    except metadata.PackageNotFoundError:
        installed = None
    brings = [] if installed is None else _brought(installed, extra)
    more = f" (it brings {', '.join(brings)})" if brings else ""
    requirement = _requirement(installed, extra)
    editable = (
        "--editable " if installed is not None and (_noted(installed).get("dir_info") or {}).get("editable") else ""
    )
    return f"pip install {editable}{shlex.quote(requirement)}{more}"


def _requirement(installed: metadata.Distribution | None, extra: str) -> str:
    """What pip is to install: the place that this installation is from, with the extra."""
    source = None if installed is None else _source(installed)
    if source is not None and not source.startswith("file:"):
        return f"lora_ext[{extra}] @ {source}"
    places = [Path(unquote(urlsplit(source).path))] if source is not None else []
    checkout = Path(__file__).resolve().parents[2]
    places += [checkout] if (checkout / "pyproject.toml").is_file() else []  # run without an installation
    return next((f"{place}[{extra}]" for place in places if place.exists()), f"lora_ext[{extra}]")


def _source(installed: metadata.Distribution) -> str | None:
    """The URL that it was installed from; None: an index."""
    noted = _noted(installed)
    try:
        if version_control := noted.get("vcs_info"):
            return f"{version_control['vcs']}+{noted['url']}@{version_control['commit_id']}"
    except (KeyError, TypeError):
        return None
    return noted.get("url")


def _noted(installed: metadata.Distribution) -> dict[str, Any]:
    """What pip noted about where it is from (PEP 610); {}: nothing, as of what is from an index."""
    try:
        noted = json.loads(installed.read_text("direct_url.json") or "{}")
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) and isinstance(noted.get("url", ""), str) else {}


def _brought(installed: metadata.Distribution, extra: str) -> list[str]:
    """Names of the packages of ``extra``, those of extras in it, too."""
    names: list[str] = []
    for requirement in installed.requires or ():
        name, _, marker = requirement.partition(";")
        if not re.search(rf"""extra\s*==\s*["']{re.escape(extra)}["']""", marker):
            continue
        plain, inner = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", name).groups()
        if plain.replace("-", "_").lower() == "lora_ext":
            for each in (inner or "").split(","):
                names += _brought(installed, each.strip())
        else:
            names.append(plain)
    return list(dict.fromkeys(names))
