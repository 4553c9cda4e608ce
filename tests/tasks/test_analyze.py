"""Tests ``lora-ext analyze`` on tiny models: its figures against whole matrices, and how it finds the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.analyzed import name_base, own_adapter, run, save_files
from support.checkpoint_files import EVERY_LAYER, EveryLayer, merged_by_peft, peft_adapter, save_checkpoint
from support.models import bert, gpt2, llama
from torch import Tensor

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.tasks import TaskError
from lora_ext.tasks.analyze import run as analyze
from lora_ext.tasks.analyze.places import places

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"))


def tensors(directory: Path, adapter: bool = False) -> dict[str, Tensor]:
    names = directory.glob("adapter_model.safetensors" if adapter else "model*.safetensors")
    return {key: value for name in sorted(names) for key, value in load_file(name).items()}


def right_directions(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy(), full_matrices=False)[2].T


def grid(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    phi = np.empty((U.shape[1], V.shape[1]))
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            phi[i - 1, j - 1] = np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
    return phi


def assert_update(found: dict[str, Any], delta: np.ndarray, weight: np.ndarray, r: int) -> None:
    """Checks the measurements of one adapter in one layer against full matrices."""
    U, S, Vh = np.linalg.svd(delta, full_matrices=False)
    weight_values = np.linalg.svd(weight, compute_uv=False)
    approx = {"rel": 2e-4, "abs": 1e-6}
    assert found["norm"] == pytest.approx(np.linalg.norm(delta), **approx)
    assert found["relative_change"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), **approx)
    assert found["singular_values"][:r] == pytest.approx(S[:r].tolist(), **approx)
    assert found["stable_rank"] == pytest.approx(np.sum(S**2) / S[0] ** 2, **approx)
    parts = S[:r] / S[:r].sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-np.sum(parts * np.log(parts))), **approx)
    table = found["projection"]
    assert table["ranks"][-1] == r
    for k, rank in enumerate(table["ranks"]):
        projected = np.linalg.norm(U[:, :rank].T @ weight @ Vh[:rank].T)
        assert table["delta"][k] == pytest.approx(projected, **approx)
        assert table["weight"][k] == pytest.approx(np.linalg.norm(weight_values[:rank]), **approx)
        assert table["amplification"][k] == pytest.approx(np.linalg.norm(S[:rank]) / projected, rel=1e-3)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_two_adapters_against_whole_matrices(files, tmp_path):
    analysis = run(tmp_path / "out", files / "four", files / "six", base=files / "base")
    weights = tensors(files / "base")
    factors = [tensors(files / name, adapter=True) for name in ("four", "six")]
    scalings, ranks = (6 / 4, 6 / 6), (4, 6)
    names = [layer["name"] for layer in analysis["layers"]]
    assert sorted(names) == sorted(
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    )
    for layer in analysis["layers"]:
        weight = weights[f"{layer['name']}.weight"].double().numpy()
        assert layer["shape"] == list(weight.shape)
        assert layer["weight_norm"] == pytest.approx(np.linalg.norm(weight), rel=1e-5)
        key = f"base_model.model.{layer['name']}"
        A, B = ([adapter.get(f"{key}.lora_{side}.weight") for adapter in factors] for side in "AB")
        for number in range(2):
            if A[number] is None:
                assert layer["adapters"][number] is None and layer["name"].endswith("v_proj") and number == 0
                continue
            delta = scalings[number] * (B[number].double() @ A[number].double()).numpy()
            # An update has no more directions than the layer has outputs.
            assert_update(layer["adapters"][number], delta, weight, min(ranks[number], *weight.shape))
        if A[0] is None:
            assert layer["similarity"] == []
            continue
        (pair,) = layer["similarity"]
        assert pair["of"] == [0, 1]
        for side, ours, theirs in (("A", A[0], A[1]), ("B", B[0].T, B[1].T)):
            expected = grid(right_directions(ours), right_directions(theirs))
            np.testing.assert_allclose(pair[side]["phi"], expected, rtol=1e-5, atol=1e-8)
            assert pair[side]["last"] == pair[side]["phi"][-1][-1]
            assert pair[side]["dimension"] == ours.shape[1]
            assert pair[side]["random_mean"] == pytest.approx(6 / ours.shape[1], rel=1e-5)
            assert pair[side]["random_std"] > 0


def test_the_summary_is_of_the_layers(files, tmp_path):
    analysis = run(tmp_path / "out", files / "four", files / "six", base=files / "base")
    layers, summary = analysis["layers"], analysis["summary"]
    assert [adapter["layers"] for adapter in summary["adapters"]] == [4, 6]
    for number, adapter in enumerate(summary["adapters"]):
        adapted = [layer for layer in layers if layer["adapters"][number]]
        norms = np.array([layer["adapters"][number]["norm"] for layer in adapted])
        weights = np.array([layer["weight_norm"] for layer in adapted])
        assert adapter["norm"] == pytest.approx(np.linalg.norm(norms), rel=1e-5)
        assert adapter["relative_change"] == pytest.approx(np.linalg.norm(norms) / np.linalg.norm(weights), rel=1e-5)
        changes = [layer["adapters"][number]["relative_change"] for layer in adapted]
        assert [item["change"] for item in adapter["most_changed"]] == sorted(changes, reverse=True)
        q = [layer["adapters"][number] for layer in adapted if layer["name"].endswith("q_proj")]
        means = adapter["kinds"]["self_attn.q_proj"]
        assert means["layers"] == 2
        assert means["effective_rank"] == pytest.approx(np.mean([update["effective_rank"] for update in q]), rel=1e-5)
        amplifications = [update["projection"]["amplification"][-1] for update in q]
        assert means["amplification"] == pytest.approx(np.mean(amplifications), rel=1e-5)
    (pair,) = summary["similarity"]
    both = [layer["similarity"][0] for layer in layers if layer["similarity"]]
    assert (pair["of"], pair["layers"], len(both)) == ([0, 1], 4, 4)
    for side in "AB":
        assert pair[side]["layers"] == 4
        np.testing.assert_allclose(pair[side]["phi"], np.mean([entry[side]["phi"] for entry in both], 0), rtol=1e-5)
        expected = np.mean([1 / entry[side]["dimension"] for entry in both])
        assert pair[side]["random_mean"][0][0] == pytest.approx(expected, rel=1e-5)


def test_one_adapter_against_its_own_update(files, tmp_path):
    analysis = run(tmp_path / "out", files / "four", base=files / "base")
    factors = tensors(files / "four", adapter=True)
    for layer in analysis["layers"]:
        A, B = (factors[f"base_model.model.{layer['name']}.lora_{side}.weight"] for side in "AB")
        ((found,), delta) = layer["similarity"], B.double() @ A.double()
        for side, factor, update in (("A", A, delta), ("B", B.T, delta.T)):
            expected = grid(right_directions(factor), right_directions(update)[:, :4])
            np.testing.assert_allclose(found[side]["phi"], expected, rtol=1e-4, atol=1e-7)
            assert found[side]["last"] == 1  # the same rows


def matrices(delta: Tensor, key: str) -> list[np.ndarray]:
    """Returns a tensor's matrices, ``[out, in]`` or transposed: norms and spectra are the same."""
    delta = delta.double()
    if key.startswith("experts"):
        return [matrix.numpy() for matrix in delta]
    return [delta.flatten(1).numpy()]


def test_every_kind_of_layer(tmp_path):
    model = EveryLayer()
    adapted = peft_adapter(model, tmp_path / "adapter", **EVERY_LAYER)
    save_checkpoint(dict(model.state_dict()), tmp_path / "base")
    analysis = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    merged, base = merged_by_peft(adapted), model.state_dict()
    expected = {}
    for key, weight in base.items():
        if key.startswith(("head", "norm")) or torch.equal(merged[key], weight):
            continue
        pairs = zip(matrices(merged[key] - weight, key), matrices(weight, key), strict=True)
        expected |= {(key, index): pair for index, pair in enumerate(pairs)}
    layers = [(layer["adapters"][0], layer["weight_norm"]) for layer in analysis["layers"]]
    assert len(layers) == len(expected)
    names = {layer["name"] for layer in analysis["layers"]}
    assert {"embed", "conv2d", "attn", "attn.out_proj", "single", "experts[2]", "experts.base_layer[0]"} <= names
    for (key, index), (delta, weight) in expected.items():
        found = [update for update, norm in layers if norm == pytest.approx(np.linalg.norm(weight), rel=1e-5)]
        assert len(found) == 1, (key, index)
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        assert found[0]["singular_values"][:2] == pytest.approx(S[:2].tolist(), rel=1e-4)
        projected = np.linalg.norm(U[:, :2].T @ weight @ Vh[:2].T)
        assert found[0]["projection"]["delta"][-1] == pytest.approx(projected, rel=1e-3)


def test_a_conv1d_is_stored_transposed_and_a_tied_head_has_its_embedding(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    modules = ["c_attn", "c_proj", "lm_head"]
    peft_adapter(model, tmp_path / "adapter", target_modules=modules, r=3)
    analysis = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    factors, weights = tensors(tmp_path / "adapter", adapter=True), model.state_dict()
    assert {layer["name"].rpartition(".")[2] for layer in analysis["layers"]} == set(modules)
    for layer in analysis["layers"]:
        A, B = (factors[f"base_model.model.{layer['name']}.lora_{side}.weight"].double() for side in "AB")
        weight = weights[f"{layer['name']}.weight"].double()
        if not layer["name"].startswith("lm_head"):
            weight = weight.T
        assert_update(layer["adapters"][0], (5 / 3 * B @ A).numpy(), weight.numpy(), 3)


def test_a_classifiers_adapter_fits_the_checkpoint_without_its_head(tmp_path):
    model = bert()
    model.bert.save_pretrained(tmp_path / "base")  # keys without "bert."
    own_adapter(model, tmp_path / "adapter", 0, target_modules=["query"], modules_to_save=["classifier"])
    analysis = run(tmp_path / "out", tmp_path / "adapter", base=tmp_path / "base")
    assert [layer["name"] for layer in analysis["layers"]] == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]
    assert all(layer["weight_norm"] for layer in analysis["layers"])


def test_an_adapter_that_was_never_trained(files, tmp_path):
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "new")
    for adapters in ([tmp_path / "new"], [tmp_path / "new", files / "four"]):
        analysis = run(tmp_path / f"{len(adapters)}", *adapters, base=files / "base")
        update = analysis["layers"][0]["adapters"][0]
        assert update["norm"] == update["effective_rank"] == update["numerical_rank"] == 0
        assert update["projection"]["ranks"] == update["projection"]["amplification"] == []
        assert analysis["summary"]["adapters"][0]["kinds"]["self_attn.q_proj"]["amplification"] is None
        assert analysis["summary"]["similarity"][0]["B"] is None
        if len(adapters) == 1:  # empty pictures
            assert len(analyze.results.draw(analysis, tmp_path)) == len(list(tmp_path.glob("*.png"))) == 3


# --- the options ------------------------------------------------------------------------------------------------------


def test_layers_seeds_and_directions(files, tmp_path):
    everything = run(tmp_path / "all", files / "four", files / "six", base=files / "base")
    some = run(tmp_path / "some", files / "four", files / "six", base=files / "base", layers=r"\.1\..*q_proj$")
    (layer,) = some["layers"]
    assert layer["name"] == "model.layers.1.self_attn.q_proj"
    assert layer in everything["layers"]  # with the same random directions
    other = run(tmp_path / "seed", files / "four", files / "six", base=files / "base", layers="q_proj", seed=1)
    same = next(candidate for candidate in other["layers"] if candidate["name"] == layer["name"])
    assert same["similarity"] == layer["similarity"]
    for first, second in zip(layer["adapters"], same["adapters"], strict=True):
        assert first["projection"]["random"] != second["projection"]["random"]
    few = run(tmp_path / "few", files / "four", files / "six", directions=3, use_base=False)
    for layer, all_directions in zip(few["layers"], everything["layers"], strict=True):
        for pair, whole in zip(layer["similarity"], all_directions["similarity"], strict=True):
            np.testing.assert_array_equal(pair["A"]["phi"], np.array(whole["A"]["phi"])[:3, :3])


def test_without_a_base_the_rest_is_measured_and_a_note_says_so(files, tmp_path):
    analysis = run(tmp_path / "none", files / "four")
    assert analysis["base"] is None
    assert analysis["notes"] == [
        "No relative changes and no projection table without the base's weights: the adapters name no "
        "base model, and --base is not given."
    ]
    assert analysis["layers"][0]["adapters"][0]["projection"] is None
    assert analysis["summary"]["adapters"][0]["relative_change"] is None
    assert analysis["summary"]["adapters"][0]["most_changed"][0]["change"] > 0
    assert analysis["notes"][0] in (tmp_path / "none" / "analysis.md").read_text()


def test_the_base_that_the_adapter_names(files, tmp_path, monkeypatch):
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
    assert run(tmp_path / "3", files / "four", base=Path("someone/tiny"))["base"] == str(model)

    unknown = name_base(files / "four", tmp_path / "unknown", "someone/other")
    analysis = run(tmp_path / "4", unknown)
    assert analysis["base"] is None and "someone/other is neither a checkpoint directory" in analysis["notes"][0]
    with pytest.raises(FileNotFoundError, match="someone/other is neither a checkpoint directory nor an id"):
        run(tmp_path / "5", files / "four", base=Path("someone/other"))
    with pytest.raises(TaskError, match="name different base models .*someone/other; .*give --base, or --no-base"):
        run(tmp_path / "5", unknown, files / "six")
    assert not (tmp_path / "5").exists()


def test_a_picture_has_a_limited_number_of_panels(files, tmp_path, monkeypatch):
    analysis = run(tmp_path / "out", files / "four", files / "six", base=files / "base")
    report, drawn = analyze.results, {}
    for name in ("plot_similarity", "plot_spectra", "plot_changes"):
        monkeypatch.setattr(report, name, lambda *arguments, name=name: drawn.update({name: arguments}))
    report.draw(analysis, tmp_path)
    assert set(drawn["plot_changes"][1]) == {"mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"}
    assert drawn["plot_changes"][4] == "|dW| / |W|, by kind of layer"
    sizes = {
        kind: max(size for points in bars.values() for _, size in points)
        for kind, bars in drawn["plot_changes"][1].items()
    }
    monkeypatch.setattr(report, "_MOST_PANELS", 2)
    report.draw(analysis, tmp_path)
    assert list(drawn["plot_changes"][1]) == sorted(sizes, key=sizes.get, reverse=True)[:2]
    assert drawn["plot_changes"][4].endswith(": the 2 of 3 kinds with the largest")


def test_places_of_layers():
    assert places(
        ["model.layers.3.mlp.up_proj", "model.layers.0.mlp.experts.7.w1", "lm_head", "experts.gate_up[2]"]
    ) == {
        "model.layers.3.mlp.up_proj": (3, "mlp.up_proj"),
        "model.layers.0.mlp.experts.7.w1": (0, "mlp.experts.*.w1"),
        "lm_head": (None, "lm_head"),
        "experts.gate_up[2]": (None, "experts.gate_up"),
    }
    assert places(["encoder.block.0.q", "decoder.block.0.q", "decoder.block.1.cross.k", "0"]) == {
        "encoder.block.0.q": (0, "encoder.block.*.q"),
        "decoder.block.0.q": (0, "decoder.block.*.q"),
        "decoder.block.1.cross.k": (1, "cross.k"),
        "0": (0, "*"),
    }
