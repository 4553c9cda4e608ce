"""``lora-ext analyze`` on tiny models: its figures against whole matrices, the base, its files, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.analyzed import factors, name_base, own_adapter
from support.checkpoint_files import peft_adapter, tensors_of
from support.models import bert, gpt2, llama, snapshot
from support.optional import Image, matplotlib  # noqa: F401
from torch import Tensor

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.analysis import (
    Svd,
    effective_rank,
    factored_svd,
    numerical_rank,
    projection_table,
    singular_basis,
    stable_rank,
    subspace_similarity,
)
from lora_ext.commands import analyze, main

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


@pytest.fixture(scope="module")
def both(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The analysis of both adapters."""
    with mock.patch.object(analyze, "figures", lambda result: {}):
        return run(tmp_path_factory.mktemp("both") / "out", files / "four", files / "six", base=files / "base")


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


def assert_update(found: dict[str, Any], svd: Svd, weight: Tensor) -> None:
    """Checks the measurements of one adapter in one layer; tests/analysis has those of matrices."""
    near, norm = {"rel": 2e-4, "abs": 1e-6}, svd.S.norm().item()
    table = projection_table(weight.contiguous(), svd, seed=0)
    assert (found["norm"], found["relative_change"]) == pytest.approx((norm, norm / weight.norm().item()), **near)
    rank = numerical_rank(svd.S)
    assert found["numerical_rank"] == rank and found["singular_values"][:rank] == pytest.approx(svd.S[:rank], **near)
    assert found["stable_rank"] == pytest.approx(stable_rank(svd.S), **near)
    assert found["effective_rank"] == pytest.approx(effective_rank(svd.S), **near)
    assert [row["rank"] for row in found["projections"]] == table.ranks
    for key in ("delta", "weight", "amplification"):
        assert [row[key] for row in found["projections"]] == pytest.approx(getattr(table, key), rel=1e-3)
    for key in ("delta", "weight", "random", "amplification"):
        assert found[key] == found["projections"][-1][key]


# --- the figures ------------------------------------------------------------------------------------------------------


def test_two_adapters_against_whole_matrices(files, both):
    weights, scalings = tensors_of(files / "base"), (6 / 4, 6 / 6)
    modules = [("self_attn.q_proj", 1), ("mlp.up_proj", 1)]
    modules += [("self_attn.q_proj", 2), ("self_attn.v_proj", 2), ("mlp.up_proj", 2)]
    expected = sorted((f"model.layers.{i}.{module}", adapter) for i in range(2) for module, adapter in modules)
    assert sorted((update["layer"], update["adapter"]) for update in both["updates"]) == expected
    for update in both["updates"]:
        number = update["adapter"] - 1
        A, B = factors(files / ("four", "six")[number], update["layer"])
        assert_update(update, factored_svd(A, B, scalings[number]), weights[f"{update['layer']}.weight"])

    shared = [update["layer"] for update in both["updates"] if update["adapter"] == 1]
    assert [row["factor"] for row in both["similarity"]] == ["lora_A", "lora_B"]
    for side, row in enumerate(both["similarity"]):
        assert (row["adapters"], row["layers"]) == ([1, 2], 4)
        grids = []
        for name in shared:
            one, other = (factors(files / adapter, name)[side] for adapter in ("four", "six"))
            grids.append(
                subspace_similarity(*(singular_basis(matrix.T if side else matrix) for matrix in (one, other)))
            )
        torch.testing.assert_close(torch.tensor(row["phi"]).double(), sum(grids) / len(grids), rtol=1e-4, atol=1e-7)
        sizes = [weights[f"{name}.weight"].shape[0 if side else 1] for name in shared]
        for i, j in ((1, 1), (2, 1), (4, 6)):  # random subspaces: max(i, j) / n
            assert row["random"][i - 1][j - 1] == pytest.approx(np.mean([max(i, j) / n for n in sizes]), rel=1e-4)


def test_summaries_are_of_the_layers(files, both):
    assert both["paths"] == [str(files / "four"), str(files / "six")]
    for number, adapter in enumerate(both["adapters"], 1):
        updates = [update for update in both["updates"] if update["adapter"] == number]
        assert (adapter["adapter"], adapter["r"], adapter["layers"]) == [(1, 4, 4), (2, 6, 6)][number - 1]
        of_queries = [update for update in updates if update["layer"].endswith("q_proj")]
        kind = number, "model.layers.*.self_attn.q_proj"
        (queries,) = [row for row in both["kinds"] if (row["adapter"], row["kind"]) == kind]
        for means, rows in ((adapter, updates), (queries, of_queries)):
            for key in ("effective_rank", "stable_rank", "norm", "delta", "weight", "random", "amplification"):
                assert means[key] == pytest.approx(np.mean([row[key] for row in rows]), rel=1e-5)
        table = [row for row in both["by_rank"] if row["adapter"] == number]
        assert [row["rank"] for row in table] == [[1, 2, 4], [1, 2, 4, 6]][number - 1]
        first = [update["projections"][0]["amplification"] for update in updates]
        assert table[0]["amplification"] == pytest.approx(np.mean(first), rel=1e-5)


def test_a_conv1d_is_stored_transposed_and_a_tied_head_has_its_embedding(tmp_path, no_pictures):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    modules = ["c_attn", "c_proj", "lm_head"]
    peft_adapter(model, tmp_path / "adapter", target_modules=modules, r=3)
    result = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    assert {update["layer"].rpartition(".")[2] for update in result["updates"]} == {*modules}
    for update in result["updates"]:
        A, B = factors(tmp_path / "adapter", update["layer"])
        weight = model.state_dict()[f"{update['layer']}.weight"]
        assert_update(update, factored_svd(A, B, 5 / 3), weight if update["layer"].startswith("lm_head") else weight.T)


def test_a_classifiers_adapter_fits_the_checkpoint_without_its_head(tmp_path, no_pictures):
    model = bert()
    model.bert.save_pretrained(tmp_path / "base")  # keys without "bert."
    own_adapter(model, tmp_path / "adapter", 0, target_modules=["query"], modules_to_save=["classifier"])
    result = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert [update["layer"] for update in result["updates"] if update["relative_change"]] == names


def test_an_adapter_that_was_never_trained(files, tmp_path):
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "new")
    result = run(tmp_path / "out", tmp_path / "new", files / "four", base=files / "base")
    update = result["updates"][0]
    assert update["norm"] == update["effective_rank"] == update["numerical_rank"] == 0
    assert update["projections"] == [] and update["amplification"] is None
    assert result["kinds"][1]["kind"].endswith("q_proj") and result["kinds"][1]["amplification"] is None
    assert [row["factor"] for row in result["similarity"]] == ["lora_A"]  # lora_B has no directions
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


# --- options and the base ---------------------------------------------------------------------------------------------


def test_without_a_base_the_rest_is_measured_and_a_note_says_so(files, tmp_path, capsys):
    result = run(tmp_path / "none", files / "four")
    note = (
        "No relative changes and no projections without the base's weights: the adapters name no base model, and "
        "--base is not given."
    )
    assert result["base"] is None and result["note"] == note
    assert note in (tmp_path / "none" / "analysis.md").read_text() and note in capsys.readouterr().out
    assert result["updates"][0]["projections"] == result["by_rank"] == result["similarity"] == []
    assert result["adapters"][0]["relative_change"] is None and result["adapters"][0]["norm"] > 0
    assert [path.name for path in (tmp_path / "none").glob("*.png")] == ["spectra.png"]


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
    assert result["base"] is None and "someone/other is neither a checkpoint directory" in result["note"]
    out = ["--out", str(tmp_path / "5")]
    assert main(["analyze", "--adapter", str(files / "four"), "--base", "someone/other", *out]) == 2
    assert "someone/other is neither a checkpoint directory nor an id" in capsys.readouterr().err
    assert main(["analyze", "--adapter", str(unknown), str(files / "six"), *out]) == 2
    error = capsys.readouterr().err
    assert "name different base models, someone/other and None; give --base or --no-base" in error
    assert not (tmp_path / "5").exists()


def test_it_writes_json_markdown_and_pictures_and_replaces_nothing_by_itself(files, tmp_path, capsys):
    adapters, out = [str(files / "four"), str(files / "six")], tmp_path / "out"
    arguments = ["analyze", "--adapter", *adapters, "--base", str(files / "base"), "--out", str(out)]
    assert main(arguments) == 0
    names = ["amplification.png", "analysis.json", "analysis.md", "similarity.png", "spectra.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert f"{out}: 6 layers; analysis.md, analysis.json and pictures\n" in capsys.readouterr().out
    result = json.loads((out / "analysis.json").read_text())
    assert result["command"] == ["lora-ext", *arguments] and result["machine"]["torch"] == torch.__version__
    text = (out / "analysis.md").read_text()
    most = max(result["updates"], key=lambda update: update["relative_change"])
    assert f"| {most['layer']} | {most['adapter']} | {most['r']} | {most['norm']:.4g} |" in text
    assert text.partition("## Every layer")[2].count("| model.layers.0.self_attn.q_proj |") == 2
    for name in (name for name in names if name.endswith("png")):
        assert f"({name})" in text
        with Image.open(out / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20

    before = snapshot(out)
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith("holds an analysis already; --overwrite replaces it\n")
    assert main([*arguments, "--overwrite", "--layers", "k_proj"]) == 2
    assert snapshot(out) == before
    (out / "mine.txt").write_text("mine")
    assert main(["analyze", "--adapter", adapters[0], "--no-base", "--out", str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [*names[1:3], "mine.txt", "spectra.png"]
