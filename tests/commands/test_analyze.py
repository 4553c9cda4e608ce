"""``lora-ext analyze`` on tiny models: its figures against whole matrices, the base, its files, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.analyzed import (
    assert_update,
    factors,
    matrices,
    name_base,
    own_adapter,
    phi,
    right_directions,
    save_files,
    save_misfits,
    tensors,
)
from support.checkpoint_files import EVERY_LAYER, EveryLayer, merged_by_peft, peft_adapter, save_checkpoint, snapshot
from support.models import bert, gpt2, llama
from support.optional import Image, matplotlib  # noqa: F401

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.commands import analyze, main

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def misfits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_misfits(Path(tmp_path_factory.mktemp("files") / "misfits"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the rest."""
    monkeypatch.setattr(analyze, "figures", lambda result: {})


def run(out: Path, *adapters: Path, **options: Any) -> dict[str, Any]:
    """Runs the command and returns analysis.json."""
    more = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not True]
    flags = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is True]
    assert main(["analyze", "--adapter", *map(str, adapters), f"--out={out}", *more, *flags]) == 0
    return json.loads((out / "analysis.json").read_text(), parse_constant=pytest.fail)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_two_adapters_against_whole_matrices(files, tmp_path, no_pictures):
    result = run(tmp_path / "out", files / "four", files / "six", base=files / "base")
    weights, scalings, ranks = tensors(files / "base"), (6 / 4, 6 / 6), (4, 6)
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    assert sorted(layer["name"] for layer in result["layers"]) == sorted(
        f"model.layers.{i}.{module}" for i in range(2) for module in modules
    )
    grids, changes = {}, {}
    for layer in result["layers"]:
        weight = weights[f"{layer['name']}.weight"].double().numpy()
        assert layer["shape"] == list(weight.shape)
        assert layer["weight_norm"] == pytest.approx(np.linalg.norm(weight), rel=1e-5)
        if layer["name"].endswith("v_proj"):
            assert layer["adapters"][0] is None
        else:
            (A, B), (other_A, other_B) = (factors(files / name, layer["name"]) for name in ("four", "six"))
            grids[layer["name"]] = {
                "A": phi(right_directions(A), right_directions(other_A)),
                "B": phi(right_directions(B.T), right_directions(other_B.T)),
            }
            changes[layer["name"]] = np.linalg.norm(scalings[0] * (B @ A).numpy()) / np.linalg.norm(weight)
        for number, name in enumerate(("four", "six")):
            if layer["adapters"][number] is not None:
                A, B = factors(files / name, layer["name"])
                delta = scalings[number] * (B @ A).numpy()
                # An update has no more directions than the layer has outputs.
                assert_update(layer["adapters"][number], delta, weight, min(ranks[number], *weight.shape))

    (pair,) = result["similarity"]
    assert (pair["of"], pair["layers"]) == ([1, 2], 4)
    most, least = max(changes, key=changes.get), min(changes, key=changes.get)
    mean, *single = pair["grids"]
    assert mean["what"] == "mean of 4 layers"
    assert [row["what"] for row in single] == [f"changed most: {most}", f"changed least: {least}"]
    sizes = {"A": [weights[f"{name}.weight"].shape[1] for name in grids]}
    sizes["B"] = [weights[f"{name}.weight"].shape[0] for name in grids]
    for side in "AB":
        expected = np.mean([grid[side] for grid in grids.values()], axis=0)
        np.testing.assert_allclose(mean[side]["phi"], expected, rtol=1e-4, atol=1e-7)
        for row, name in zip(single, (most, least), strict=True):
            np.testing.assert_allclose(row[side]["phi"], grids[name][side], rtol=1e-4, atol=1e-7)
        for i, j in ((1, 1), (2, 1), (4, 6)):  # random subspaces: max(i, j) / n
            expected = np.mean([max(i, j) / size for size in sizes[side]])
            assert mean[side]["random"][i - 1][j - 1] == pytest.approx(expected, rel=1e-4)


def test_summaries_are_of_the_layers(files, tmp_path, no_pictures):
    result = run(tmp_path / "out", files / "four", files / "six", base=files / "base")
    for number, adapter in enumerate(result["adapters"]):
        adapted = [layer for layer in result["layers"] if layer["adapters"][number]]
        updates = {layer["name"]: layer["adapters"][number] for layer in adapted}
        assert (adapter["r"], adapter["layers"], len(updates)) == ([[4], [6]][number], [4, 6][number], [4, 6][number])
        norm = np.linalg.norm([update["norm"] for update in updates.values()])
        assert adapter["norm"] == pytest.approx(norm, rel=1e-5)
        weights = np.linalg.norm([layer["weight_norm"] for layer in adapted])
        assert adapter["relative_change"] == pytest.approx(norm / weights, rel=1e-5)
        changes = sorted((update["relative_change"] for update in updates.values()), reverse=True)
        assert [item["change"] for item in adapter["most_changed"]] == changes
        kind = number + 1, "model.layers.*.self_attn.q_proj"
        (means,) = [row for row in result["kinds"] if (row["adapter"], row["kind"]) == kind]
        for key in ("effective_rank", "stable_rank", "norm", "delta", "weight", "random", "amplification"):
            values = [update[key] for name, update in updates.items() if name.endswith("q_proj")]
            assert means[key] == pytest.approx(np.mean(values), rel=1e-5)
        table = [row for row in result["by_rank"] if row["adapter"] == number + 1]
        assert [row["rank"] for row in table] == [[1, 2, 4], [1, 2, 4, 6]][number]
        first = [update["projections"]["amplification"][0] for update in updates.values()]
        assert table[0]["amplification"] == pytest.approx(np.mean(first), rel=1e-5)


def test_one_adapter_against_its_own_update(files, tmp_path, no_pictures):
    result = run(tmp_path / "out", files / "four", base=files / "base", layers=r"\.1\..*q_proj$")
    (layer,) = result["layers"]
    A, B = factors(files / "four", layer["name"])
    ((row,),) = (pair["grids"] for pair in result["similarity"])
    assert row["what"] == layer["name"] == "model.layers.1.self_attn.q_proj"
    for side, factor, update in (("A", A, B @ A), ("B", B.T, (B @ A).T)):
        expected = phi(right_directions(factor), right_directions(update)[:, :4])
        np.testing.assert_allclose(row[side]["phi"], expected, rtol=1e-4, atol=1e-7)
        assert row[side]["phi"][-1][-1] == 1  # the same rows


def test_every_kind_of_layer(tmp_path, no_pictures):
    model = EveryLayer()
    adapted = peft_adapter(model, tmp_path / "adapter", **EVERY_LAYER)
    save_checkpoint(dict(model.state_dict()), tmp_path / "base")
    result = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    merged, base = merged_by_peft(adapted), model.state_dict()
    expected = {}
    for key, weight in base.items():
        if not key.startswith(("head", "norm")) and not torch.equal(merged[key], weight):
            pairs = zip(matrices(merged[key] - weight, key), matrices(weight, key), strict=True)
            expected |= {(key, index): pair for index, pair in enumerate(pairs)}
    layers = [(layer["adapters"][0], layer["weight_norm"]) for layer in result["layers"]]
    assert len(layers) == len(expected)
    names = {layer["name"] for layer in result["layers"]}
    assert {"embed", "conv2d", "attn", "attn.out_proj", "single", "experts[2]", "experts.base_layer[0]"} <= names
    for (key, index), (delta, weight) in expected.items():
        found = [update for update, norm in layers if norm == pytest.approx(np.linalg.norm(weight), rel=1e-5)]
        assert len(found) == 1, (key, index)
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        assert found[0]["singular_values"][:2] == pytest.approx(S[:2].tolist(), rel=1e-4)
        assert found[0]["delta"] == pytest.approx(np.linalg.norm(U[:, :2].T @ weight @ Vh[:2].T), rel=1e-3)


def test_a_conv1d_is_stored_transposed_and_a_tied_head_has_its_embedding(tmp_path, no_pictures):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    modules = ["c_attn", "c_proj", "lm_head"]
    peft_adapter(model, tmp_path / "adapter", target_modules=modules, r=3)
    result = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    assert {layer["name"].rpartition(".")[2] for layer in result["layers"]} == {*modules}
    for layer in result["layers"]:
        A, B = factors(tmp_path / "adapter", layer["name"])
        weight = model.state_dict()[f"{layer['name']}.weight"].double()
        weight = weight if layer["name"].startswith("lm_head") else weight.T
        assert_update(layer["adapters"][0], (5 / 3 * B @ A).numpy(), weight.numpy(), 3)


def test_a_classifiers_adapter_fits_the_checkpoint_without_its_head(tmp_path, no_pictures):
    model = bert()
    model.bert.save_pretrained(tmp_path / "base")  # keys without "bert."
    own_adapter(model, tmp_path / "adapter", 0, target_modules=["query"], modules_to_save=["classifier"])
    result = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert [layer["name"] for layer in result["layers"] if layer["weight_norm"]] == names


def test_an_adapter_that_was_never_trained(files, tmp_path):
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "new")
    for adapters in ([tmp_path / "new"], [tmp_path / "new", files / "four"]):
        result = run(tmp_path / f"{len(adapters)}", *adapters, base=files / "base")
        update = result["layers"][0]["adapters"][0]
        assert update["norm"] == update["effective_rank"] == update["numerical_rank"] == 0
        assert update["projections"]["ranks"] == [] and update["amplification"] is None
        assert result["kinds"][0]["amplification"] is None
        assert result["similarity"][0]["grids"][0]["B"] is None
        assert len(list((tmp_path / f"{len(adapters)}").glob("*.png"))) == 3  # with empty panels


# --- options and the base ---------------------------------------------------------------------------------------------


def test_layers_seeds_and_directions(files, tmp_path, no_pictures):
    adapters = files / "four", files / "six"
    everything = run(tmp_path / "all", *adapters, base=files / "base")
    (layer,) = run(tmp_path / "some", *adapters, base=files / "base", layers=r"\.1\..*q_proj$")["layers"]
    assert layer["name"] == "model.layers.1.self_attn.q_proj"
    assert layer in everything["layers"]  # with the same random directions
    other = run(tmp_path / "seed", *adapters, base=files / "base", layers=r"\.1\..*q_proj$", seed=1)["layers"][0]
    for ours, theirs in zip(layer["adapters"], other["adapters"], strict=True):
        assert ours["random"] != theirs["random"] and ours["delta"] == theirs["delta"]
    few = run(tmp_path / "few", *adapters, directions=3, no_base=True)["similarity"][0]["grids"][0]
    whole = np.array(everything["similarity"][0]["grids"][0]["A"]["phi"])
    np.testing.assert_array_equal(few["A"]["phi"], whole[:3, :3])


def test_without_a_base_the_rest_is_measured_and_a_note_says_so(files, tmp_path, capsys):
    result = run(tmp_path / "none", files / "four")
    note = (
        "No relative changes and no projections without the base's weights: the adapters name no base model, and "
        "--base is not given."
    )
    assert result["base"] is None and result["notes"] == [note]
    assert note in (tmp_path / "none" / "analysis.md").read_text() and note in capsys.readouterr().out
    assert result["layers"][0]["adapters"][0]["projections"] is None and result["by_rank"] == []
    assert result["adapters"][0]["relative_change"] is None
    assert result["adapters"][0]["most_changed"][0]["change"] > 0


def test_the_base_that_the_adapter_names(files, tmp_path, monkeypatch, capsys, no_pictures):
    local = name_base(files / "four", tmp_path / "local", str(files / "base"))
    assert run(tmp_path / "1", local)["base"] == str(files / "base")

    # An id: files laid out as in the download cache.
    repository = tmp_path / "hub" / "models--someone--tiny"
    model = repository / "snapshots" / "0123abc"
    model.mkdir(parents=True)
    for file in (files / "base").iterdir():
        (model / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = name_base(files / "four", tmp_path / "cached", "someone/tiny")
    assert run(tmp_path / "2", cached)["base"] == str(model)
    assert run(tmp_path / "3", files / "four", base="someone/tiny")["base"] == str(model)

    unknown = name_base(files / "four", tmp_path / "unknown", "someone/other")
    result = run(tmp_path / "4", unknown)
    assert result["base"] is None and "someone/other is neither a checkpoint directory" in result["notes"][0]
    out = ["--out", str(tmp_path / "5")]
    assert main(["analyze", "--adapter", str(files / "four"), "--base", "someone/other", *out]) == 2
    assert "someone/other is neither a checkpoint directory nor an id" in capsys.readouterr().err
    assert main(["analyze", "--adapter", str(unknown), str(files / "six"), *out]) == 2
    error = capsys.readouterr().err
    assert "name different base models (" in error and "someone/other; " in error and "give --base, or --no-" in error
    assert not (tmp_path / "5").exists()


def test_places_of_layers():
    assert analyze.place("model.layers.3.mlp.up_proj") == (3, "model.layers.*.mlp.up_proj")
    assert analyze.place("layers.0.experts.7.w1") == (0, "layers.*.experts.*.w1")
    assert analyze.place("experts.gate_up[2]") == (2, "experts.gate_up[*]")
    assert analyze.place("lm_head") == (0, "lm_head")


# --- files ------------------------------------------------------------------------------------------------------------


def test_it_writes_json_markdown_and_pictures_and_replaces_nothing_by_itself(files, tmp_path, capsys):
    adapters, out = [str(files / "four"), str(files / "six")], tmp_path / "out"
    arguments = ["analyze", "--adapter", *adapters, "--base", str(files / "base"), "--out", str(out)]
    assert main(arguments) == 0
    names = ["analysis.json", "analysis.md", "change.png", "similarity_1_2.png", "spectrum.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert f"{out}: 6 layers; analysis.md, analysis.json, similarity_1_2.png, sp" in capsys.readouterr().out
    result = json.loads((out / "analysis.json").read_text())
    assert result["command"] == ["lora-ext", *arguments] and result["machine"]["torch"] == torch.__version__
    text = (out / "analysis.md").read_text()
    most = result["adapters"][1]["most_changed"][0]
    assert f"| {most['layer']} | 2 | {most['change']:.4g} |" in text
    assert text.partition("## Every layer")[2].count("| model.layers.0.self_attn.q_proj |") == 2
    for name in names[2:]:
        assert f"![{name}]({name})" in text
        with Image.open(out / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20

    before = snapshot(out)
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith("holds an analysis already; --overwrite replaces it\n")
    assert main([*arguments, "--overwrite", "--layers", "k_proj"]) == 2
    assert snapshot(out) == before
    (out / "mine.txt").write_text("mine")
    assert main(["analyze", "--adapter", adapters[0], "--no-base", "--out", str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [*names[:3], "mine.txt", "similarity_1.png", "spectrum.png"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --adapter"),
        ("--adapter nowhere", "nowhere/adapter_config.json is missing"),
        ("--adapter four --base four", "has no model.safetensors"),
        ("--adapter four --base base --no-base", "exclude each other; give one of them"),
        ("--adapter four --layers (", "--layers '(' is not a regular expression"),
        ("--adapter four --layers k_proj", "--layers 'k_proj' matches none of the 4 names, such as model.layers.0"),
        ("--adapter four --directions 0", "--directions is 0, want at least 1"),
        ("--adapter four --seed -1", "--seed is -1, want at least 0"),
        ("--adapter four ../misfits/four", "names one of them twice"),
        ("--adapter four --out four/adapter_config.json", "adapter_config.json is a file; choose a directory"),
        ("--adapter four --resume", "there is no option --resume"),
        ("--adapter four --base bert", "not in the base: model.layers.0.mlp.up_proj.weight; not in the base: "),
        ("--adapter four --base bert", "and 1 more; --base names another checkpoint, and --no-base goes without one"),
        ("--adapter four query --no-base", "have no layer in common: nothing to compare"),
        ("--adapter four wide --no-base", "not of one model: model.layers.0.self_attn.q_proj is [16, 16] in one ada"),
        (
            "--adapter broken --no-base",
            "model.layers.1.mlp.up_proj in broken/adapter_model.safetensors: factored_svd: ",
        ),
        ("--adapter four --base infinite", "model.layers.0.mlp.up_proj.weight of infinite: "),
        ("--adapter dora --no-base", "is a DoRA adapter (use_dora), which rescales the weights"),
    ],
)
def test_mistakes(misfits, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(misfits)
    before = snapshot(misfits)
    out = [] if "--out" in arguments else ["--out", "out"]
    assert main(["analyze", *out, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ext analyze: error: ") and error.count("\n") == 1 and message in error, error
    assert snapshot(misfits) == before


def test_matplotlib_is_named_where_it_is_missing(tmp_path):
    from support.processes import run_python

    code = "import sys; sys.modules['matplotlib'] = None; from lora_ext.commands import main; sys.exit(main())"
    done = run_python("-c", code, "analyze", "--adapter", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "lora-ext analyze: error: this needs matplotlib: pip install" in done.stderr and "[report]" in done.stderr
