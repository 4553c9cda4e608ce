"""``lora-ext analyze`` on tiny models: against whole matrices, after interruptions, and with mistaken arguments."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import bert, gpt2, llama
from offline_files import EVERY_LAYER, EveryLayer, merged_by_peft, peft_adapter, save_checkpoint, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_ext import LoraConfig, cli, inject, save_adapter
from lora_ext.tasks import TaskError, analyze
from lora_ext.tasks.analysis_layers import places
from lora_ext.tasks.analyze import AnalysisSettings
from lora_ext.tasks.journal import Journal


def own_adapter(model: nn.Module, directory: Path, seed: int, **settings: Any) -> Path:
    """A copy of ``model`` injected, changed and saved by lora_ext."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(model, directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and ``four`` and ``six``, adapters of it with other ranks and seeds."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "base", max_shard_size="8KB")
    own_adapter(model, folder / "four", 1)
    own_adapter(model, folder / "six", 2, r=6, target_modules=["q_proj", "v_proj", "up_proj"])
    return folder


def run(out: Path, *adapters: Path, base: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Without pictures, which take longer than all the rest."""
    chosen = AnalysisSettings(tuple(map(str, adapters)), base=None if base is None else str(base), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze.analysis_report, "draw", lambda analysis, out: [])
        return analyze.analyze(chosen, out, say=lambda _: None)


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
    """The measurements of one adapter in one layer against matrices in full."""
    (U, S, Vh), own = np.linalg.svd(delta, full_matrices=False), np.linalg.svd(weight, compute_uv=False)
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
        assert table["weight"][k] == pytest.approx(np.linalg.norm(own[:rank]), **approx)
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
        A, B = ([one.get(f"base_model.model.{layer['name']}.lora_{side}.weight") for one in factors] for side in "AB")
        for number in range(2):
            if A[number] is None:
                assert layer["adapters"][number] is None and layer["name"].endswith("v_proj") and number == 0
                continue
            delta = scalings[number] * (B[number].double() @ A[number].double()).numpy()
            # One of the two has no more directions than the layer has outputs.
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
    assert [one["layers"] for one in summary["adapters"]] == [4, 6]
    for number, one in enumerate(summary["adapters"]):
        own = [layer for layer in layers if layer["adapters"][number]]
        norms = np.array([layer["adapters"][number]["norm"] for layer in own])
        weights = np.array([layer["weight_norm"] for layer in own])
        assert one["norm"] == pytest.approx(np.linalg.norm(norms), rel=1e-5)
        assert one["relative_change"] == pytest.approx(np.linalg.norm(norms) / np.linalg.norm(weights), rel=1e-5)
        changes = [layer["adapters"][number]["relative_change"] for layer in own]
        assert [item["change"] for item in one["most_changed"]] == sorted(changes, reverse=True)
        q = [layer["adapters"][number] for layer in own if layer["name"].endswith("q_proj")]
        means = one["kinds"]["self_attn.q_proj"]
        assert means["layers"] == 2
        assert means["effective_rank"] == pytest.approx(np.mean([one["effective_rank"] for one in q]), rel=1e-5)
        amplifications = [one["projection"]["amplification"][-1] for one in q]
        assert means["amplification"] == pytest.approx(np.mean(amplifications), rel=1e-5)
    (pair,) = summary["similarity"]
    both = [layer["similarity"][0] for layer in layers if layer["similarity"]]
    assert (pair["of"], pair["layers"], len(both)) == ([0, 1], 4, 4)
    for side in "AB":
        assert pair[side]["layers"] == 4
        np.testing.assert_allclose(pair[side]["phi"], np.mean([one[side]["phi"] for one in both], 0), rtol=1e-5)
        assert pair[side]["random_mean"][0][0] == pytest.approx(
            np.mean([1 / one[side]["dimension"] for one in both]), rel=1e-5
        )


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
    """A tensor's matrices as ``[out, in]``, or its transposed where it lies so: norms and spectra are the same."""
    delta = delta.double()
    if key.startswith("experts"):
        return [one.numpy() for one in delta]
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
        found = [own for own, norm in layers if norm == pytest.approx(np.linalg.norm(weight), rel=1e-5)]
        assert len(found) == 1, (key, index)
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        assert found[0]["singular_values"][:2] == pytest.approx(S[:2].tolist(), rel=1e-4)
        projected = np.linalg.norm(U[:, :2].T @ weight @ Vh[:2].T)
        assert found[0]["projection"]["delta"][-1] == pytest.approx(projected, rel=1e-3)


def test_a_conv1d_lies_the_other_way_and_a_tied_head_has_its_embedding(tmp_path):
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
        own = analysis["layers"][0]["adapters"][0]
        assert own["norm"] == own["effective_rank"] == own["numerical_rank"] == 0
        assert own["projection"]["ranks"] == own["projection"]["amplification"] == []
        assert analysis["summary"]["adapters"][0]["kinds"]["self_attn.q_proj"]["amplification"] is None
        assert analysis["summary"]["similarity"][0]["B"] is None
        if len(adapters) == 1:  # pictures of nothing
            assert len(analyze.analysis_report.draw(analysis, tmp_path)) == len(list(tmp_path.glob("*.png"))) == 3


# --- the options ------------------------------------------------------------------------------------------------------


def test_layers_seeds_and_directions(files, tmp_path):
    everything = run(tmp_path / "all", files / "four", files / "six", base=files / "base")
    some = run(tmp_path / "some", files / "four", files / "six", base=files / "base", layers=r"\.1\..*q_proj$")
    (layer,) = some["layers"]
    assert layer["name"] == "model.layers.1.self_attn.q_proj"
    assert layer in everything["layers"]  # the random directions included
    other = run(tmp_path / "seed", files / "four", files / "six", base=files / "base", layers="q_proj", seed=1)
    theirs = next(one for one in other["layers"] if one["name"] == layer["name"])
    assert theirs["similarity"] == layer["similarity"]
    for ours, own in zip(layer["adapters"], theirs["adapters"], strict=True):
        assert ours["projection"]["random"] != own["projection"]["random"]
    few = run(tmp_path / "few", files / "four", files / "six", directions=3, use_base=False)
    for layer, own in zip(few["layers"], everything["layers"], strict=True):
        for pair, whole in zip(layer["similarity"], own["similarity"], strict=True):
            np.testing.assert_array_equal(pair["A"]["phi"], np.array(whole["A"]["phi"])[:3, :3])


def test_without_a_base_the_rest_is_measured_and_it_is_said(files, tmp_path):
    analysis = run(tmp_path / "none", files / "four")
    assert analysis["base"] is None
    assert analysis["notes"] == [
        "What needs the base's weights is left out: relative changes and the projection table: the adapters name no "
        "base model, and --base is not given."
    ]
    assert analysis["layers"][0]["adapters"][0]["projection"] is None
    assert analysis["summary"]["adapters"][0]["relative_change"] is None
    assert analysis["summary"]["adapters"][0]["most_changed"][0]["change"] > 0
    assert analysis["notes"][0] in (tmp_path / "none" / "analysis.md").read_text()


def name_base(adapter: Path, copied: Path, name: str) -> Path:
    copied.mkdir(parents=True)
    for file in adapter.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return copied


def test_the_base_that_the_adapter_names(files, tmp_path, monkeypatch):
    local = name_base(files / "four", tmp_path / "local", str(files / "base"))
    assert run(tmp_path / "1", local)["base"] == str(files / "base")

    # An id: as the hub's library lays out what it downloaded.
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
    assert analysis["base"] is None and "someone/other is no directory with a checkpoint" in analysis["notes"][0]
    with pytest.raises(FileNotFoundError, match="someone/other is no directory with a checkpoint, and no id"):
        run(tmp_path / "5", files / "four", base=Path("someone/other"))
    with pytest.raises(TaskError, match="name different base models .*someone/other; .*give --base, or --no-base"):
        run(tmp_path / "5", unknown, files / "six")
    assert not (tmp_path / "5").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def command(files: Path, out: Path, *more: str) -> list[str]:
    adapters = [str(files / name) for name in ("four", "six")]
    return ["analyze", "--adapter", *adapters, "--base", str(files / "base"), "--out", str(out), *more]


def test_the_command_writes_json_markdown_and_pictures(files, tmp_path, capsys, monkeypatch):
    arguments = command(files, tmp_path / "out", "--seed", "3")
    monkeypatch.setattr(sys, "argv", ["lora-ext", *arguments])
    assert cli.main(arguments) == 0
    assert f"{tmp_path / 'out'}: 6 layers; analysis.md, analysis.json, similarity_1_2.png" in capsys.readouterr().out
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(analysis) == [
        *("command", "date", "machine", "settings", "adapters", "base", "notes", "layers", "summary")
    ]
    assert analysis["command"] == ["lora-ext", *arguments]
    assert analysis["machine"]["torch"] == torch.__version__
    assert [(one["path"], one["r"], one["layers"]) for one in analysis["adapters"]] == [
        (str(files / "four"), [4], 4),
        (str(files / "six"), [6], 6),
    ]
    text = (tmp_path / "out" / "analysis.md").read_text()
    most = analysis["summary"]["adapters"][1]["most_changed"][0]
    assert f"| 2 | {most['name']} | {most['change']:.4g} |" in text
    every_layer = text.partition("## Every layer")[2]
    assert every_layer.count("| model.layers.0.self_attn.q_proj |") == 2
    for name in ("similarity_1_2.png", "spectrum.png", "change.png"):
        assert f"![{name}]({name})" in text
        with Image.open(tmp_path / "out" / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def comparable(out: Path) -> dict[str, bytes]:
    """All that a run leaves, without its date."""
    found = snapshot(out)
    date = json.loads(found["analysis.json"])["date"].encode()
    return {name: content.replace(date, b"") for name, content in found.items()}


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that is not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        patch.setattr(sys, "argv", ["lora-ext", *command(files, Path("out"))])
        assert cli.main(command(files, Path("out"))) == 0
        return comparable(Path("out"))


@pytest.mark.parametrize("finished", [0, 4])
def test_an_interrupted_run_is_continued_to_the_same_files(files, whole, tmp_path, monkeypatch, capsys, finished):
    measured, measure = [], analyze.measure

    def counted(layer, *arguments, **options):
        measured.append(layer.name)
        return measure(layer, *arguments, **options)

    def interrupted(layer, *arguments, **options):
        if len(measured) == finished:
            raise KeyboardInterrupt
        return counted(layer, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", ["lora-ext", *command(files, Path("out"))])
    assert cli.main(command(files, Path("out"))) == 130
    assert "to continue: lora-ext analyze --resume --out out" in capsys.readouterr().err
    assert sorted(snapshot(Path("out"))) == ["analysis_settings.json", "layers.jsonl"]
    with open("out/layers.jsonl", "ab") as file:
        file.write(b'{"name": "model.layers.1.mlp.up_proj", "sha')  # cut off by a kill

    monkeypatch.setattr(analyze, "measure", counted)
    monkeypatch.setattr(sys, "argv", ["lora-ext", "analyze", "--resume", "--out", "out"])
    assert cli.main(["analyze", "--resume", "--out", "out"]) == 0
    assert measured == [json.loads(line)["name"] for line in whole["layers.jsonl"].splitlines()]  # none twice
    assert comparable(Path("out")) == whole


def test_a_resumed_run_keeps_its_settings_and_its_files(files, tmp_path, capsys):
    adapter = name_base(files / "four", tmp_path / "adapter", str(files / "base"))
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["analyze", "--adapter", str(adapter), "--layers", "q_proj", "--no-base", *out]) == 0
    before = snapshot(tmp_path / "out")
    for more, message in (
        (["--layers", "v_proj"], "was started with --layers q_proj, now v_proj"),
        (["--adapter", str(files / "six")], "was started with --adapter"),
        (["--overwrite"], "--resume continues the run in --out and --overwrite replaces it"),
    ):
        assert cli.main(["analyze", "--resume", *more, *out]) == 2
        assert message in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert cli.main(["analyze", "--resume", *out]) == 2
    error = capsys.readouterr().err
    assert f"not what it was when the run in {tmp_path / 'out'} was started: {adapter / 'adapter_config.json'}" in error
    assert snapshot(tmp_path / "out") == before


def test_whose_directory_it_is(files, tmp_path, capsys):
    arguments = ["analyze", "--adapter", str(files / "four"), "--no-base", "--layers", "q_proj"]
    out = tmp_path / "out"
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert cli.main([*arguments, "--out", str(out)]) == 2
    assert "holds a run already; --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    (out / "mine.txt").write_text("mine")
    both = ["analyze", "--adapter", str(files / "four"), str(files / "six"), "--no-base", "--overwrite"]
    assert cli.main([*both, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir() if path.suffix in (".png", ".txt")) == [
        *("change.png", "mine.txt", "similarity_1_2.png", "spectrum.png")
    ]
    assert cli.main([*arguments, "--out", str(files / "base"), "--overwrite"]) == 2
    assert "holds files that are not of an analysis; choose another directory" in capsys.readouterr().err
    assert cli.main(["analyze", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "holds no analysis to continue" in capsys.readouterr().err


def test_two_runs_do_not_write_one_file(tmp_path):
    with Journal(tmp_path / "file") as journal:
        journal.add({"a": 1})
        with pytest.raises(TaskError, match="another process is writing"):
            Journal(tmp_path / "file")
    with Journal(tmp_path / "file") as journal:
        assert journal.entries == [{"a": 1}]


def test_a_picture_has_so_many_panels_as_can_be_looked_at(files, tmp_path, monkeypatch):
    analysis = run(tmp_path / "out", files / "four", files / "six", base=files / "base")
    report, drawn = analyze.analysis_report, {}
    for name in ("plot_similarity", "plot_spectra", "plot_changes"):
        monkeypatch.setattr(report, name, lambda *arguments, name=name: drawn.update({name: arguments}))
    report.draw(analysis, tmp_path)
    assert set(drawn["plot_changes"][1]) == {"mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"}
    assert drawn["plot_changes"][4] == "|dW| / |W|, by kind of layer"
    sizes = {
        kind: max(size for own in bars.values() for _, size in own) for kind, bars in drawn["plot_changes"][1].items()
    }
    monkeypatch.setattr(report, "_MOST_PANELS", 2)
    report.draw(analysis, tmp_path)
    assert list(drawn["plot_changes"][1]) == sorted(sizes, key=sizes.get, reverse=True)[:2]
    assert drawn["plot_changes"][4].endswith(": the 2 of 3 kinds with the largest")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no adapter is given; name one or more with --adapter"),
        (["--adapter", "nowhere"], "nowhere/adapter_config.json is missing"),
        (["--adapter", "{four}", "--base", "{four}"], "has no model.safetensors"),
        (["--adapter", "{four}", "--base", "{base}", "--no-base"], "exclude each other; give one of them"),
        (["--adapter", "{four}", "--layers", "("], "--layers '(' is no regular expression"),
        (["--adapter", "{four}", "--layers", "k_proj"], "--layers 'k_proj' is found in none of the 4 names, as model."),
        (["--adapter", "{four}", "--directions", "0"], "--directions is 0, want at least 1"),
        (["--adapter", "{four}", "--seed", "-1"], "--seed is -1, want at least 0"),
        (["--adapter", "{four}", "{four}"], "has one of them twice"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(files, tmp_path, capsys, arguments, message):
    names = {name: str(files / name) for name in ("base", "four", "six")}
    arguments = [argument.format(**names) for argument in arguments]
    assert cli.main(["analyze", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ext: error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_are_told_so(files, tmp_path, capsys):
    torch.manual_seed(3)
    bert().save_pretrained(tmp_path / "bert")
    own_adapter(bert(), tmp_path / "query", 0, target_modules=["query"])
    wide = nn.Module()
    wide.model = nn.Module()
    wide.model.layers = nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(24, 16)})})])
    own_adapter(wide, tmp_path / "wide", 0, target_modules=["q_proj"])
    four, out = str(files / "four"), ["--out", str(tmp_path / "out")]
    for arguments, messages in (
        (
            ["--adapter", four, "--base", str(tmp_path / "bert")],
            ["does not fit", "not in the base: model.layers.0", "--no-base"],
        ),
        (["--adapter", four, str(tmp_path / "query")], ["have no layer in common: nothing to compare"]),
        (
            ["--adapter", four, str(tmp_path / "wide")],
            ["not of one model", "model.layers.0.self_attn.q_proj is [16, 16] in one adapter and [16, 24] in another"],
        ),
    ):
        assert cli.main(["analyze", *arguments, *out]) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
        assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_named(files, tmp_path, capsys):
    broken = name_base(files / "four", tmp_path / "broken", str(files / "base"))
    values = load_file(broken / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    values[key][0, 0] = torch.nan
    save_file(values, broken / "adapter_model.safetensors")
    assert cli.main(["analyze", "--adapter", str(broken), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj in " in error and "lora_A or lora_B is not finite" in error

    weights = {key: value.clone() for key, value in llama().state_dict().items()}
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    save_checkpoint(weights, tmp_path / "base")
    arguments = ["--adapter", str(files / "four"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "other")]
    assert cli.main(["analyze", *arguments]) == 2
    assert "model.layers.0.mlp.up_proj.weight of " in capsys.readouterr().err


def test_matplotlib_is_named_where_it_is_missing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["analyze", "--adapter", str(files / "four"), "--out", str(tmp_path / "out")]) == 2
    assert "analyze needs matplotlib: pip install 'lora_ext[analyze]'" in capsys.readouterr().err


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
