"""``lora-ext analyze``: what adapters have learnt, as in section 7 of the LoRA paper (arXiv 2106.09685)."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import statistics
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext import analysis
from lora_ext._common.progress import Progress
from lora_ext.checkpoints import INDEX_FILE, SINGLE_FILE, AdapterContents, Checkpoint, Layer, find_layers, open_adapter
from lora_ext.commands.options import CommandError, Parser, check_installed, refusing
from lora_ext.commands.results import made_by, markdown, measured_on, save_figure, tell, write_json, write_text

_DIRECTIONS = 64  # the most that are compared of a factor
_MEASURES = ("r", "norm", "relative_change", "numerical_rank", "effective_rank", "stable_rank")
_TABLE_7 = ("delta", "weight", "random", "amplification")
_HEADINGS = {"norm": "|dW|", "relative_change": "|dW| / |W|", "delta": "|UᵀWV|: of dW", "weight": "of W"}
READING = (
    "The effective rank is the exponential of the entropy of the singular values (Roy and Vetterli, 2007), the stable "
    "rank is |dW|² / |dW|₂². |UᵀWV| is the part of the weight W in the directions of the update dW, in the leading "
    "ones of W and in random ones (table 7 of the LoRA paper), the amplification is |dW| / |UᵀWV|. phi(i, j) compares "
    "the leading i directions of one adapter's lora_A (right singular vectors) or lora_B (left) with the leading j of "
    "another's: 1: one subspace holds the other, 0: they are orthogonal, max(i, j) / n: random ones of n dimensions."
)


def main(argv: list[str]) -> None:
    args = _parse(argv)
    check_installed("report", "matplotlib")
    updates: list[dict[str, Any]] = []
    similar: _Similar = {}
    with refusing(""):
        adapters = [open_adapter(path, caller="analyze") for path in args.adapter]
        base, note = _base(args, adapters)
        layers = _layers(args, adapters, base)
        with Progress("analyze", len(layers), unit="layer") as shown:
            for layer in layers:
                shown.note(layer.name)
                updates += _measure(layer, args.adapter, similar)
                shown.advance(1)
    steps = [step | {"adapter": update["adapter"]} for update in updates for step in update["projections"]]
    result = made_by("analyze", argv) | {
        "base": None if base is None else str(base.directory),
        "note": note,
        "paths": [str(path) for path in args.adapter],
        "adapters": _means(updates, ("adapter",), (*_MEASURES, *_TABLE_7)),
        "kinds": _means(updates, ("kind", "adapter"), (*_MEASURES, *_TABLE_7)),
        "by_rank": _means(steps, ("adapter", "rank"), _TABLE_7),
        "similarity": [_mean_similarity(of, grids) for of, grids in similar.items()],
        "updates": updates,
    }
    drawn = figures(result)
    write_text(args.out / "analysis.md", _markdown(result, drawn))
    for name, figure in drawn.items():
        save_figure(args.out / f"{name}.png", figure)
    for name in {"similarity", "amplification"} - {*drawn}:  # of an earlier analysis
        (args.out / f"{name}.png").unlink(missing_ok=True)
    write_json(args.out / "analysis.json", result)
    tell(f"{note}\n{args.out}: {len(layers)} layers; analysis.md, analysis.json and pictures".strip())


# --- options ----------------------------------------------------------------------------------------------------------


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="lora-ext analyze",
        description="Analyses adapters as section 7 of the LoRA paper does: similarity of subspaces, singular values "
        "and ranks of the updates, amplification of the base's weights. Holds one weight in memory at a time.",
    )
    add, base = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    text = "in PEFT's format; two or more are compared with each other, layer by layer"
    add("--adapter", required=True, type=Path, nargs="+", action="extend", metavar="DIR", help=text)
    base("--base", metavar="PATH_OR_ID", help="base model in safetensors; default: the one that the adapters name")
    base("--no-base", action="store_true", help="leave out results that need the base's weights")
    add("--layers", default="", metavar="REGEX", help=r"only layers whose name contains a match: 'layers\.0\.|q_proj'")
    text = "layout of square weights that no other weight decides: [in, out] as in Conv1D, or [out, in]"
    add("--fan-in-fan-out", action=argparse.BooleanOptionalAction, help=text)
    add("--out", type=Path, required=True, metavar="DIR", help="for analysis.json, analysis.md and pictures")
    add("--overwrite", action="store_true", help="replace the analysis in --out")
    args = parser.parse_args(argv)
    with refusing(f"--layers {args.layers!r} is no regular expression", re.error):
        re.compile(args.layers)
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out {args.out} is a file; choose a directory")
    if (args.out / "analysis.json").exists() and not args.overwrite:
        raise CommandError(f"--out {args.out} holds an analysis already; --overwrite replaces it")
    return args


def _base(args: argparse.Namespace, adapters: Sequence[AdapterContents]) -> tuple[Checkpoint | None, str]:
    """Opens the base's checkpoint; without one, returns None and a note that says why."""
    without = "No relative changes and no projections without the base's weights"
    if args.no_base:
        return None, f"{without}."
    if args.base is not None:
        return _open_base(args.base), ""
    name, *others = dict.fromkeys(adapter.file.config.get("base_model_name_or_path") for adapter in adapters)
    if others:
        raise CommandError(f"the adapters name different base models, {name} and {others[0]}; give --base or --no-base")
    if not name:
        return None, f"{without}: the adapters name no base model, and --base is not given."
    try:
        return _open_base(name, adapters[0].file.config.get("revision")), ""
    except FileNotFoundError as error:
        return None, f"{without}: {error}."


def _open_base(name: str, revision: str | None = None) -> Checkpoint:
    """Opens a directory, a file, or an id in the cache of ``from_pretrained``. Downloads nothing."""
    if Path(name).exists():
        return Checkpoint.open(name)
    with suppress(ImportError, ValueError):  # huggingface_hub is not installed; the name cannot be an id
        from huggingface_hub import try_to_load_from_cache

        for file in (INDEX_FILE, SINGLE_FILE):
            if isinstance(path := try_to_load_from_cache(name, file, revision=revision), str):
                return Checkpoint.open(Path(path).parent)
    what = "neither a checkpoint directory nor an id with safetensors in the Hugging Face cache"
    raise FileNotFoundError(f"{name} is {what}; `hf download {name}` fetches an id")


def _layers(args: argparse.Namespace, adapters: Sequence[AdapterContents], base: Checkpoint | None) -> list[Layer]:
    try:
        layers = find_layers(adapters, base, fan_in_fan_out=args.fan_in_fan_out)
    except ValueError as error:
        remedy = "" if base is None else "\n--base names another checkpoint, and --no-base goes without one"
        raise ValueError(f"{error}{remedy}") from error
    chosen = [layer for layer in layers if re.search(args.layers, layer.name)]
    if not chosen:
        names = ", ".join(layer.name for layer in layers[:3])
        raise CommandError(f"--layers {args.layers!r} matches none of the {len(layers)} layers: {names}, ...")
    if len(adapters) > 1 and not any(len(layer.factors) > 1 for layer in chosen):
        raise CommandError("--adapter: the adapters have no layer in common; analyze each by itself")
    return chosen


# --- measuring --------------------------------------------------------------------------------------------------------

# Pair of adapters, and factor -> of each layer, phi and what random subspaces have on average: [2, i, j].
_Similar = dict[tuple[int, int, str], list[Tensor]]


def _measure(layer: Layer, paths: Sequence[Path], similar: _Similar) -> list[dict[str, Any]]:
    """Reads a layer's factors and weight. Returns an entry of ``updates`` per adapter, and adds to ``similar``."""
    factors = {number: (stored.lora_A, stored.lora_B) for number, stored in layer.factors.items()}
    svds = {}
    for number, (A, B) in factors.items():
        with refusing(f"{layer.name} in {paths[number]}"):
            svds[number] = analysis.factored_svd(A, B, layer.factors[number].update.scaling)
    tables = _projections(layer, svds)
    if len(factors) > 1:
        _compare(factors, similar)
    return [_update(layer, number, svds[number], tables.get(number)) for number in factors]


def _projections(layer: Layer, svds: Mapping[int, analysis.Svd]) -> dict[int, analysis.ProjectionTable]:
    """Returns each update's table 7 by the adapter's number; reads and decomposes the weight once."""
    if (weight := layer.weight) is None:
        return {}
    matrix = weight.read()
    # Transposing everything keeps the norms of projections, so the weight stays as stored.
    stored = {n: analysis.Svd(svd.V, svd.S, svd.U) if weight.transposed else svd for n, svd in svds.items()}
    count = max(analysis.numerical_rank(svd.S) for svd in svds.values())
    seed = zlib.crc32(layer.name.encode())  # so random directions do not depend on which other layers are measured
    with refusing(f"{weight.key} of {weight.checkpoint.directory}"):
        leading = analysis.block_krylov_svd(matrix, count, seed=seed) if count else None
        return {n: analysis.projection_table(matrix, svd, seed=seed, weight_svd=leading) for n, svd in stored.items()}


def _compare(factors: Mapping[int, tuple[Tensor, Tensor]], similar: _Similar) -> None:
    """Adds the similarity of each pair of adapters, unless a factor is zero and has no directions."""
    for place, name in enumerate(("lora_A", "lora_B")):
        matrices = {number: pair[0] if place == 0 else pair[1].T for number, pair in factors.items()}
        bases = {number: analysis.singular_basis(matrix)[:, :_DIRECTIONS] for number, matrix in matrices.items()}
        for i, j in itertools.combinations(bases, 2):
            phi = analysis.subspace_similarity(bases[i], bases[j])
            if phi.numel():
                random = analysis.expected_random_similarity(*phi.shape, len(bases[i]))
                similar.setdefault((i + 1, j + 1, name), []).append(torch.stack([phi, random]))


def _update(layer: Layer, number: int, svd: analysis.Svd, table: analysis.ProjectionTable | None) -> dict[str, Any]:
    """Returns the size and the spectrum of one adapter's update, and its projections if the weight is known."""
    S, r = svd.S, layer.factors[number].update.r
    norm = torch.linalg.vector_norm(S).item()
    # Table 7 with the leading 1, 2, 4, ... directions of the update, and with all of them.
    projections = [
        {"rank": rank} | {key: getattr(table, key)[at] for key in _TABLE_7}
        for at, rank in enumerate(table.ranks if table else ())
    ]
    return {
        "layer": layer.name,
        "kind": kind_of(layer.name),
        "adapter": number + 1,
        "r": r,
        "norm": norm,
        "relative_change": norm / table.weight_norm if table and table.weight_norm else None,
        **{measure: getattr(analysis, measure)(S) for measure in ("numerical_rank", "effective_rank", "stable_rank")},
        "singular_values": S.tolist(),
        "projections": projections,
        **(dict.fromkeys(_TABLE_7) if not projections else {key: projections[-1][key] for key in _TABLE_7}),
    }


def kind_of(name: str) -> str:
    """Returns ``layers.*.mlp.up_proj`` for ``layers.3.mlp.up_proj``."""
    return re.sub(r"\b\d+\b", "*", name)


# --- summaries --------------------------------------------------------------------------------------------------------


def _means(rows: Sequence[dict[str, Any]], by: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Averages each column over the rows that are equal in ``by``, of those that have it."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    means = []
    for values, some in sorted(groups.items()):
        known = {key: [row[key] for row in some if row[key] is not None] for key in columns}
        averages = {key: statistics.fmean(found) if found else None for key, found in known.items()}
        means.append(dict(zip(by, values, strict=True)) | {"layers": len(some)} | averages)
    return means


def _mean_similarity(of: tuple[int, int, str], grids: Sequence[Tensor]) -> dict[str, Any]:
    """Averages ``phi``, and its mean for random subspaces, over layers, up to the sizes of the smallest."""
    i, j = (min(grid.shape[axis] for grid in grids) for axis in (1, 2))
    phi, random = torch.stack([grid[:, :i, :j] for grid in grids]).mean(0).tolist()
    return {"adapters": list(of[:2]), "factor": of[2], "layers": len(grids), "phi": phi, "random": random}


# --- what is shown of analysis.json -----------------------------------------------------------------------------------


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Draws the content of analysis.json. Returns the pictures by their names."""
    from lora_ext.commands import pictures

    drawn = {"spectra": pictures.spectra(result["updates"])}
    if result["similarity"]:
        drawn["similarity"] = pictures.similarity(result["similarity"])
    if result["by_rank"]:
        drawn["amplification"] = pictures.amplification(result["by_rank"])
    return drawn


def tables(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Returns the tables of analysis.json: title -> heading and rows."""
    measures = ("adapter", "layers", *_MEASURES, *_TABLE_7)
    ranked = sorted(result["updates"], key=lambda one: (one["relative_change"] or 0, one["norm"]), reverse=True)
    diagonals = [
        row | {"i = j": rank} | {key: row[key][rank - 1][rank - 1] for key in ("phi", "random")}
        for row in result["similarity"]
        for rank in analysis.leading_ranks(min(len(row["phi"]), len(row["phi"][0])))
    ]
    return {
        "Means by adapter": _table(result["adapters"], *measures),
        "Means by kind of layer": _table(result["kinds"], "kind", *measures),
        "Amplification by rank": _table(result["by_rank"], "adapter", "rank", "layers", *_TABLE_7),
        "Similarity of subspaces": _table(diagonals, "adapters", "factor", "layers", "i = j", "phi", "random"),
        "Every layer, largest change first": _table(ranked, "layer", "adapter", *measures[2:]),
    }


def _table(rows: Sequence[Mapping[str, Any]], *keys: str) -> tuple[list[str], list[list[str]]]:
    heading = [_HEADINGS.get(key, key.replace("_", " ")) for key in keys]
    return heading, [[_cell(row[key]) for key in keys] for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(result: Mapping[str, Any], names: Sequence[str]) -> str:
    parts = ["# What the adapters have learnt", f"    {shlex.join(result['command'])}"]
    parts += [f"Adapters: {', '.join(result['paths'])}. Base: {result['base'] or 'none'}. {result['note']}"]
    parts += [measured_on(result), READING]
    for title, (heading, rows) in tables(result).items():
        parts += [f"## {title}", markdown(heading, rows).rstrip()]
    parts += ["## Pictures", *(f"![{name}]({name}.png)" for name in names)]
    return "\n\n".join(parts) + "\n"
