"""``lora-ext analyze``: what adapters have learnt, as in section 7 of the LoRA paper (arXiv 2106.09685)."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shlex
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext import analysis
from lora_ext._common.progress import progress
from lora_ext.checkpoints import (
    INDEX_FILE,
    SINGLE_FILE,
    AdapterContents,
    Checkpoint,
    Layer,
    LayerWeight,
    find_layers,
    open_adapter,
)
from lora_ext.commands import pictures
from lora_ext.commands.options import CommandError, Parser, refusing
from lora_ext.commands.results import made_by, markdown, measured_on, save_figure, tell, write_json, write_text

_DIGITS = 6  # significant digits of analysis.json: less than single precision has
_MOST_CHANGED = 10
_MOST_PANELS = 24  # more are unreadable in one picture
# The columns of tables: keys of analysis.json, and their headings.
_MEASURES = {
    "r": "r",
    "norm": "|dW|",
    "relative_change": "|dW| / |W|",
    "numerical_rank": "numerical rank",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "rank_of_90_percent": "rank of 90 %",
}
_TABLE_7 = {"delta": "UᵀWV: of dW", "weight": "of W", "random": "random", "amplification": "amplification"}


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    with refusing(""):
        adapters = [open_adapter(path, allow_pickle=args.allow_pickle, caller="analyze") for path in args.adapter]
        base, notes = _base(args, adapters)
        layers = _layers(args, adapters, base)
        measured, grids = [], {}
        with progress("analyze", sum(layer.nbytes for layer in layers), show=True) as shown:
            for layer in layers:
                shown.note(layer.name)
                values, grids[layer.name] = _measure(layer, len(adapters), args)
                measured.append(values)
                shown.advance(layer.nbytes)
    result = made_by("analyze", argv) | {
        "settings": {"layers": args.layers, "directions": args.directions, "seed": args.seed},
        "base": None if base is None else str(base.directory),
        "notes": notes,
        "adapters": [_summary(measured, number, str(path)) for number, path in enumerate(args.adapter)],
        "kinds": [row for number in range(len(adapters)) for row in _by_kind(measured, number)],
        "by_rank": [row for number in range(len(adapters)) for row in _by_rank(measured, number)],
        "similarity": _similarity(measured, grids),
        "layers": measured,
    }
    result = _rounded(result)
    drawn = figures(result)
    write_text(args.out / "analysis.md", _markdown(result, list(drawn)))
    for name, figure in drawn.items():
        save_figure(args.out / name, figure)
    write_json(args.out / "analysis.json", result)
    for old in args.out.glob("similarity_*.png") if args.overwrite else ():
        if old.name not in drawn:  # of an analysis of other adapters
            old.unlink()
    tell("\n".join([*notes, f"{args.out}: {len(measured)} layers; analysis.md, analysis.json, {', '.join(drawn)}"]))


# --- options ----------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="lora-ext analyze",
        description=(
            "Analyses adapters as section 7 of the LoRA paper does: similarity of subspaces, singular values and "
            "effective ranks of the updates, and their projection onto the base's weights. Works on the factors, and "
            "holds one weight in memory at a time."
        ),
    )
    add = parser.add_argument
    add(
        "--adapter",
        required=True,
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="in PEFT's format; two or more are compared with each other, layer by layer",
    )
    add(
        "--base",
        metavar="PATH_OR_ID",
        help="safetensors of the base model; default: the one that the adapters name, if found",
    )
    add("--no-base", action="store_true", help="leave out results that need the base's weights")
    add("--layers", metavar="REGEX", help=r"only layers whose name contains a match: 'layers\.0\.|q_proj'")
    add("--directions", type=int, default=64, metavar="N", help="most directions to compare for each factor")
    add(
        "--fan-in-fan-out",
        action=argparse.BooleanOptionalAction,
        help="layout of square weights that no other weight decides: [in, out] as in Conv1D, or [out, in]",
    )
    add("--allow-pickle", action="store_true", help="read adapter_model.bin, if it holds only tensors")
    add("--seed", type=int, default=0, help="seed of the random directions")
    add("--out", type=Path, required=True, metavar="DIR", help="for analysis.json, analysis.md and pictures")
    add("--overwrite", action="store_true", help="replace the analysis in --out")
    return parser


def _check(args: argparse.Namespace) -> None:
    if len({path.resolve() for path in args.adapter}) < len(args.adapter):
        raise CommandError(f"--adapter: {', '.join(map(str, args.adapter))} names one of them twice")
    if args.base is not None and args.no_base:
        raise CommandError(f"--base {args.base} and --no-base exclude each other; give one of them")
    if args.directions < 1:
        raise CommandError(f"--directions is {args.directions}, want at least 1")
    if args.seed < 0:
        raise CommandError(f"--seed is {args.seed}, want at least 0")
    try:
        re.compile(args.layers or "")
    except re.error as error:
        raise CommandError(f"--layers {args.layers!r} is not a regular expression: {error}") from error
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out {args.out} is a file; choose a directory")
    if (args.out / "analysis.json").exists() and not args.overwrite:
        raise CommandError(f"--out {args.out} holds an analysis already; --overwrite replaces it")


def _base(args: argparse.Namespace, adapters: Sequence[AdapterContents]) -> tuple[Checkpoint | None, list[str]]:
    """Opens the base's checkpoint; without one, returns None and a note that says why."""
    without = "No relative changes and no projections without the base's weights"
    if args.no_base:
        return None, [f"{without} (--no-base)."]
    if args.base is not None:
        return _open_base(args.base), []
    named: dict[str | None, AdapterContents] = {}
    for adapter in adapters:
        name = adapter.file.config.get("base_model_name_or_path") or None
        named.setdefault(str(Path(name).resolve()) if name and Path(name).exists() else name, adapter)
    if len(named) > 1:
        pairs = "; ".join(f"{adapter.file.directory}: {name or 'none'}" for name, adapter in named.items())
        raise CommandError(f"the adapters name different base models ({pairs}); give --base, or --no-base")
    ((name, adapter),) = named.items()
    if name is None:
        return None, [f"{without}: the adapters name no base model, and --base is not given."]
    try:
        return _open_base(name, adapter.file.config.get("revision")), []
    except FileNotFoundError as error:
        return None, [f"{without}: {error}."]


def _open_base(name: str, revision: str | None = None) -> Checkpoint:
    """Opens a directory, a file, or an id in the cache of ``from_pretrained``. Downloads nothing."""
    if Path(name).exists():
        return Checkpoint.open(name)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(name, file, revision=revision) for file in (INDEX_FILE, SINGLE_FILE)]
    except (ImportError, ValueError):  # it is not installed; the name cannot be an id
        found = []
    for path in found:
        if isinstance(path, str):
            return Checkpoint.open(Path(path).parent)
    raise FileNotFoundError(
        f"{name} is neither a checkpoint directory nor an id with safetensors in the Hugging Face cache; "
        f"`hf download {name}` fetches an id"
    )


def _layers(args: argparse.Namespace, adapters: Sequence[AdapterContents], base: Checkpoint | None) -> list[Layer]:
    paths = ", ".join(map(str, args.adapter))
    try:
        layers = find_layers(adapters, base, fan_in_fan_out=args.fan_in_fan_out)
    except ValueError as error:
        remedy = "" if base is None else "\n--base names another checkpoint, and --no-base goes without one"
        raise ValueError(f"{error}{remedy}") from error
    if not layers:
        raise CommandError(f"{paths}: no layer has low-rank factors; nothing to analyse")
    chosen = [layer for layer in layers if re.search(args.layers or "", layer.name)]
    if not chosen:
        raise CommandError(
            f"--layers {args.layers!r} matches none of the {len(layers)} names, such as {layers[0].name}"
        )
    if len(adapters) > 1 and not any(len(layer.factors) > 1 for layer in chosen):
        raise CommandError(f"{paths} have no layer in common: nothing to compare")
    return chosen


# --- measuring --------------------------------------------------------------------------------------------------------

_Grids = dict[tuple[int, int], dict[str, tuple[Tensor, int]]]  # pair of adapters -> "A", "B" -> phi, and its dimension


def _measure(layer: Layer, num_adapters: int, args: argparse.Namespace) -> tuple[dict[str, Any], _Grids]:
    """Reads a layer's factors and weight, and measures them.

    Returns:
        The layer's entry in analysis.json, and the similarity ``phi`` of each pair of adapters that have the layer, on
        the whole grid; for a single adapter, of its factors and its update.
    """
    # The random directions do not depend on which other layers are measured.
    seed = zlib.crc32(f"{args.seed}:{layer.name}".encode())
    factors = {number: stored.read() for number, stored in layer.factors.items()}
    svds: dict[int, analysis.Svd] = {}
    for number, (A, B) in factors.items():
        with refusing(f"{layer.name} in {layer.factors[number].file.path}"):
            svds[number] = analysis.factored_svd(A, B, layer.factors[number].update.scaling)
    tables = {} if layer.weight is None else _projections(layer.weight, svds, seed)
    bases = {n: {"A": analysis.singular_basis(A), "B": analysis.singular_basis(B.T)} for n, (A, B) in factors.items()}
    if num_adapters == 1:
        # A basis compared with itself is 1 everywhere; the update can use a factor's directions in another order.
        U, S, V = svds[0]
        used = analysis.numerical_rank(S)
        pairs = {(0, 0): (bases[0], {"A": V[:, :used], "B": U[:, :used]})}
    else:
        pairs = {(i, j): (bases[i], bases[j]) for i, j in itertools.combinations(factors, 2)}
    grids: _Grids = {pair: {} for pair in pairs}
    for pair, (first, second) in pairs.items():
        for side in "AB":
            phi = analysis.subspace_similarity(first[side][:, : args.directions], second[side][:, : args.directions])
            grids[pair][side] = phi, len(first[side])
    values = {
        "name": layer.name,
        "shape": list(layer.shape),
        "weight_norm": next((table.weight_norm for table in tables.values()), None),
        "adapters": [
            _update(layer, number, svds[number], tables.get(number)) if number in factors else None
            for number in range(num_adapters)
        ],
    }
    layer.release()
    return values, grids


def _projections(
    weight: LayerWeight, svds: Mapping[int, analysis.Svd], seed: int
) -> dict[int, analysis.ProjectionTable]:
    """Returns each update's table 7 by the adapter's number; decomposes the weight once."""
    matrix = weight.read()
    # Transposing everything keeps the norms of projections, so the weight stays as stored.
    stored = {n: analysis.Svd(svd.V, svd.S, svd.U) if weight.transposed else svd for n, svd in svds.items()}
    count = max(analysis.numerical_rank(svd.S) for svd in svds.values())
    with refusing(f"{weight.key} of {weight.checkpoint.directory}"):
        leading = analysis.block_krylov_svd(matrix, count, seed=seed) if count else None
        return {n: analysis.projection_table(matrix, svd, seed=seed, weight_svd=leading) for n, svd in stored.items()}


def _update(layer: Layer, number: int, svd: analysis.Svd, table: analysis.ProjectionTable | None) -> dict[str, Any]:
    """Returns the size and the spectrum of one adapter's update, and its projections if the weight is known."""
    update, S = layer.factors[number].update, svd.S
    norm = torch.linalg.vector_norm(S).item()
    return {
        "r": update.r,
        "scaling": update.scaling,
        "norm": norm,
        "relative_change": norm / table.weight_norm if table and table.weight_norm else None,
        "numerical_rank": analysis.numerical_rank(S),
        "effective_rank": analysis.effective_rank(S),
        "stable_rank": analysis.stable_rank(S),
        "rank_of_90_percent": analysis.energy_rank(S, 0.9),
        "singular_values": S.tolist(),
        # Table 7 with the leading 1, 2, 4, ... directions of the update, and with all of them.
        "projections": {key: getattr(table, key) for key in ("ranks", *_TABLE_7)} if table else None,
    } | {key: (getattr(table, key) or [None])[-1] if table else None for key in _TABLE_7}


# --- summaries --------------------------------------------------------------------------------------------------------


def _updates(layers: Sequence[dict[str, Any]], number: int) -> dict[str, dict[str, Any]]:
    """Returns one adapter's updates by the layer's name."""
    return {layer["name"]: layer["adapters"][number] for layer in layers if layer["adapters"][number] is not None}


def _changes(updates: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the changes of layers, relative to the weights; the updates' norms if no weight is known."""
    relative = {name: update["relative_change"] for name, update in updates.items()}
    known = {name: change for name, change in relative.items() if change is not None}
    return known or {name: update["norm"] for name, update in updates.items()}


def _summary(layers: Sequence[dict[str, Any]], number: int, path: str) -> dict[str, Any]:
    updates = _updates(layers, number)
    weights = {layer["name"]: layer["weight_norm"] for layer in layers if layer["weight_norm"] is not None}
    weight_norm = math.hypot(*(weights[name] for name in updates if name in weights))
    changed = math.hypot(*(update["norm"] for name, update in updates.items() if name in weights))
    ranking = sorted(_changes(updates).items(), key=lambda item: -item[1])
    return {
        "path": path,
        "r": sorted({update["r"] for update in updates.values()}),
        "layers": len(updates),
        "norm": math.hypot(*(update["norm"] for update in updates.values())),
        "relative_change": changed / weight_norm if weight_norm else None,
        "most_changed": [{"layer": name, "change": change} for name, change in ranking[:_MOST_CHANGED]],
    }


def _by_kind(layers: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Averages over the layers of a kind, such as ``mlp.up_proj``."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, update in _updates(layers, number).items():
        kinds.setdefault(place(name)[1], []).append(update)
    return [
        {"adapter": number + 1, "kind": kind} | _means(rows, (*_MEASURES, *_TABLE_7)) for kind, rows in kinds.items()
    ]


def _by_rank(layers: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Averages table 7 over all layers, for the leading 1, 2, 4, ... directions of the update."""
    by_rank: dict[int, list[dict[str, Any]]] = {}
    for update in _updates(layers, number).values():
        table = update["projections"]
        for at, rank in enumerate(table["ranks"] if table else ()):
            by_rank.setdefault(rank, []).append({key: table[key][at] for key in _TABLE_7})
    return [
        {"adapter": number + 1, "rank": rank} | _means(rows, tuple(_TABLE_7)) for rank, rows in sorted(by_rank.items())
    ]


def _means(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Averages each figure over the rows that have it."""
    known = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {"layers": len(rows)} | {key: statistics.fmean(some) if some else None for key, some in known.items()}


def _similarity(layers: Sequence[dict[str, Any]], grids: Mapping[str, _Grids]) -> list[dict[str, Any]]:
    """Returns ``phi`` of each pair of adapters: the mean over layers, and the layers that changed most and least."""
    found = []
    for pair in dict.fromkeys(pair for of_layer in grids.values() for pair in of_layer):
        sizes = _changes(_updates(layers, pair[0]))
        both = sorted((name for name in grids if pair in grids[name]), key=lambda name: -sizes.get(name, 0.0))
        rows = {f"mean of {len(both)} layers" if len(both) > 1 else both[0]: both}
        if len(both) > 1:
            rows |= {f"changed most: {both[0]}": both[:1], f"changed least: {both[-1]}": both[-1:]}
        shown = [
            {"what": what} | {side: _mean_grid([grids[name][pair][side] for name in names]) for side in "AB"}
            for what, names in rows.items()
        ]
        found.append({"of": [number + 1 for number in pair], "layers": len(both), "grids": shown})
    return found


def _mean_grid(grids: Sequence[tuple[Tensor, int]]) -> dict[str, Any] | None:
    """Averages ``phi``, and its mean for random subspaces, up to the smallest layer's sizes; None: no directions."""
    some = [(phi, dimension) for phi, dimension in grids if phi.numel()]
    if not some:
        return None
    i, j = (min(phi.shape[axis] for phi, _ in some) for axis in (0, 1))
    phi = torch.stack([phi[:i, :j] for phi, _ in some]).mean(0)
    random = torch.stack([analysis.expected_random_similarity(i, j, dimension) for _, dimension in some]).mean(0)
    return {"phi": phi.tolist(), "random": random.tolist()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def place(name: str) -> tuple[int, str]:
    """Returns a layer's block and kind: 3 and ``layers.*.mlp.up_proj`` for ``layers.3.mlp.up_proj``.

    The first number in a path counts the blocks, 0 without one; others, as those of experts, become ``*``, too.
    """
    numbers = re.findall(r"\b\d+\b", name)
    return int(numbers[0]) if numbers else 0, re.sub(r"\b\d+\b", "*", name)


# --- what is shown of analysis.json -----------------------------------------------------------------------------------


def figures(result: Mapping[str, Any]) -> dict[str, pictures.Figure]:
    """Draws the content of analysis.json. Returns the pictures by the names of their files."""
    drawn = {}
    for pair in result["similarity"]:
        drawn[f"similarity_{'_'.join(map(str, dict.fromkeys(pair['of'])))}.png"] = pictures.similarity(pair)
    spectra: dict[str, dict[str, list[list[float]]]] = {}
    changes: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for number in range(len(result["adapters"])):
        label = f"adapter {number + 1}"
        updates = _updates(result["layers"], number)
        for name, update in updates.items():
            spectra.setdefault(label, {}).setdefault(place(name)[1], []).append(update["singular_values"])
        for name, change in _changes(updates).items():
            block, kind = place(name)
            changes.setdefault(kind, {}).setdefault(label, []).append((block, change))
    drawn["spectrum.png"] = pictures.spectra(spectra)
    largest = sorted(changes, key=lambda kind: -max(size for points in changes[kind].values() for _, size in points))
    shown = {kind: points for kind, points in changes.items() if kind in largest[:_MOST_PANELS]}
    drawn["change.png"] = pictures.changes(shown, "|dW|" if result["base"] is None else "|dW| / |W|")
    return drawn


def tables(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Returns the tables of analysis.json: title -> heading and rows."""
    number = {"adapter": "adapter"}
    adapters = [adapter | {"adapter": n} for n, adapter in enumerate(result["adapters"], 1)]
    changed = [row | {"adapter": adapter["adapter"]} for adapter in adapters for row in adapter["most_changed"]]
    layers = [
        update | {"layer": layer["name"], "adapter": n}
        for layer in result["layers"]
        for n, update in enumerate(layer["adapters"], 1)
        if update is not None
    ]
    sizes = {"r": "r", "layers": "layers", "norm": "|dW|", "relative_change": "|dW| / |W|"}
    change = "|dW|" if result["base"] is None else "|dW| / |W|"
    similar = [row for pair in result["similarity"] for row in _similarity_rows(pair)]
    columns = _MEASURES | _TABLE_7
    return {
        "Adapters": _table(adapters, {"path": "directory"} | number | sizes),
        "Means by kind of layer": _table(result["kinds"], {"kind": "kind"} | number | {"layers": "layers"} | columns),
        "Amplification by rank": _table(result["by_rank"], number | {"rank": "rank", "layers": "layers"} | _TABLE_7),
        "Similarity of subspaces": _table(
            similar, {"of": "adapters", "side": "factor", "rank": "i = j", "phi": "phi", "random": "random"}
        ),
        "Layers that changed most": _table(changed, {"layer": "layer"} | number | {"change": change}),
        "Every layer": _table(layers, {"layer": "layer"} | number | columns),
    }


def _similarity_rows(pair: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the diagonal of the mean at 1, 2, 4, ... directions."""
    for side in "AB":
        mean = pair["grids"][0][side] or {"phi": [[]]}
        for rank in analysis.leading_ranks(min(len(mean["phi"]), len(mean["phi"][0]))):
            values = {key: mean[key][rank - 1][rank - 1] for key in ("phi", "random")}
            of = " and ".join(map(str, dict.fromkeys(pair["of"])))
            yield {"of": of, "side": f"lora_{side}", "rank": rank} | values


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    return [*columns.values()], [[_cell(row.get(key)) for key in columns] for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


READING = (
    "The effective rank is the exponential of the entropy of the singular values (Roy and Vetterli, 2007); the stable "
    "rank is |dW|² / |dW|₂²; the rank of 90 % keeps this part of |dW|². |UᵀWV| is the part of the weight W in the "
    "directions of the update dW, in the leading ones of W and in random ones (table 7 of the LoRA paper), and the "
    "amplification is |dW| / |UᵀWV|. phi(i, j) compares the leading i directions of lora_A (right singular vectors) or "
    "lora_B (left) of one adapter with the leading j of another, or with those of its update: 1 where the smaller "
    "subspace lies in the larger, 0 where they are orthogonal. Random subspaces of n dimensions have max(i, j) / n on "
    "average."
)


def _markdown(result: Mapping[str, Any], names: Sequence[str]) -> str:
    parts = ["# What the adapters have learnt", f"    {shlex.join(result['command'])}"]
    parts += [f"Base: {result['base'] or 'none'}. {measured_on(result)}", *result["notes"], READING]
    for title, (heading, rows) in tables(result).items():
        parts += [f"## {title}", markdown(heading, rows)]
    parts += ["## Pictures", *(f"![{name}]({name})" for name in names)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
