"""Shows the roles of docstrings (:func:`x`) as code on the site: an extension of griffe, which reads the sources."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":[a-z]+:`~?([^`]+)`", r"``\1``", obj.docstring.value)
