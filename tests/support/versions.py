"""Versions of the packages that a test runs with: ``@needs("transformers", "5.18", "Mamba reads no weight")``."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.version import Version


def before(package: str, version: str) -> bool:
    """Returns whether the installed package is older than ``version``. ``package`` may have a local version (+cpu)."""
    return Version(Version(importlib.metadata.version(package)).public) < Version(version)


def needs(package: str, version: str, why: str) -> pytest.MarkDecorator:
    """Skips a test with older releases; ``why`` says what they lack."""
    installed = importlib.metadata.version(package)
    return pytest.mark.skipif(before(package, version), reason=f"{package} {installed}, needs {version}: {why}")
