"""Names the folder of a machine's results, for example ``benchmarks/results/amd_epyc_9b45``."""

from __future__ import annotations

import re


def machine_folder(model: str) -> str:
    """Returns a processor's or GPU's name in snake case, without trademarks, core count and clock rate."""
    name = re.sub(r"\((r|tm)\)|\b\d+-core\b|\b(processor|cpu)\b|@.*", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")
