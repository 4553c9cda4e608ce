"""Name and text of the figures of ``metrics.json`` that all kinds of training have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameters_trained(metrics: Mapping[str, Any]) -> tuple[str, str]:
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    return "parameters trained", f"{trained:,} of {total:,} ({trained / total:.2%})"


def costs(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Time, memory and disk space of a run."""
    at_once = metrics.get("runs_at_once", 1)
    shared = f"; up to {at_once} runs shared the machine" if at_once > 1 else ""
    rows = [
        ("training", f"{metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s{shared}"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    if "adapter_bytes" in metrics:
        adapter, full = metrics["adapter_bytes"], metrics["full_checkpoint_bytes"]
        rows.append(("on disk", f"adapter {adapter / 1e6:.2f} MB, full checkpoint {full / 1e6:.2f} MB"))
    return rows


def latencies(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    latency = metrics.get("latency", {}) | (metrics.get("merged") or {})
    names = {"base_seconds": "base model", "adapted_seconds": "adapted", "merged_seconds": "merged"}
    shown = [f"{name} {1e3 * latency[key]:.1f} ms" for key, name in names.items() if key in latency]
    return [("a batch's forward", ", ".join(shown))] if shown else []
