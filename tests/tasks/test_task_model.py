"""Tests finetune on other models than its other tests: which are loaded, and which are refused and why."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import tiny_classifier
from support.processes import run_python
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lora_ext.cli import main
from lora_ext.methods import apply_method, new_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison import pools
from lora_ext.tasks.comparison.many_runs import Run, run_all
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings

_SIZES = {"vocab_size": len(tiny_classifier.VOCABULARY), "eos_token_id": 3, "bos_token_id": 2}
DECODERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **_SIZES)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            **_SIZES,
        )
    ),
}


_METHODS = ["full", "lora", "adapter-h", "prefix-embed", "prefix-layer", "lora+prefix-layer"]
CLASSIFIERS = [*(("llama", method) for method in _METHODS), ("gpt2", "lora"), ("gpt2", "prefix-layer")]


def saved(directory: Path, make: Any, **tokenizer: Any) -> Path:
    tiny_classifier.save_tokenizer(directory, **tokenizer)
    torch.manual_seed(0)
    model: PreTrainedModel = make()
    model.save_pretrained(directory)
    return directory


def settings_for(model: Path, tmp_path: Path, rows: int = 300, **options: Any) -> Settings:
    data = tiny_classifier.save_reviews(tmp_path / "reviews.csv", tiny_classifier.reviews(rows))
    given = {"max_length": 32, "epochs": 4, "learning_rate": 2e-2, **options}
    return Settings(model=str(model), data=str(data), **given)


@pytest.mark.full
@pytest.mark.parametrize(("family", "method"), CLASSIFIERS)
def test_decoders_learn_though_their_tokenizers_have_no_padding(tmp_path: Path, family: str, method: str):
    model = saved(tmp_path / "model", DECODERS[family], pad_token=None, eos_token="[SEP]")
    rate = 5e-3 if method == "full" else 2e-2
    metrics = finetune(settings_for(model, tmp_path, method=method, learning_rate=rate), tmp_path / "out")
    assert metrics["after"]["accuracy"] > 0.6


def test_weights_that_the_checkpoint_has_not_are_trained_or_refused(tmp_path: Path):
    """The checkpoint has one layer, and its config says two. Masked language models have no pooler: test_pooling.py."""
    model = saved(tmp_path / "model", lambda: BertForMaskedLM(tiny_classifier.config(num_hidden_layers=1)))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    message = r"has no values for bert\.encoder\.layer\.1\.attention\.output\.LayerNorm, .*, or --method full"
    for method in ("lora", "bitfit", "head-only"):
        with pytest.raises(TaskError, match=message):
            finetune(settings_for(model, tmp_path, method=method), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for options in ({"modules_to_save": "encoder.layer.1"}, {"method": "full"}):
        out = tmp_path / options.get("method", "lora")
        finetune(settings_for(model, tmp_path, rows=60, epochs=1, **options), out)


def test_a_head_of_two_parts_is_trained_whole():
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 20, "max_position_embeddings": 32}
    for method in ("bitfit", "head-only"):
        model = DistilBertForSequenceClassification(DistilBertConfig(**sizes))
        apply_method(model, new_method(method))
        assert model.pre_classifier.weight.requires_grad and model.classifier.weight.requires_grad


@pytest.mark.full
@pytest.mark.parametrize("was", [{"num_labels": 5}, {"problem_type": "multi_label_classification"}])
def test_previous_classes_of_a_checkpoint_do_not_matter(tmp_path: Path, was: dict[str, Any]):
    model = saved(tmp_path / "model", lambda: BertForSequenceClassification(tiny_classifier.config(**was)))
    metrics = finetune(settings_for(model, tmp_path, method="full", learning_rate=5e-3), tmp_path / "out")
    assert metrics["after"]["accuracy"] > 0.6


SCORES = {"accuracy", "macro_f1", "weighted_f1", "classes", "confusion"}


def test_the_logits_are_taken_from_a_models_outputs(tmp_path: Path):
    make = lambda: BertForSequenceClassification(tiny_classifier.config(output_hidden_states=True))  # noqa: E731
    settings = settings_for(saved(tmp_path / "model", make), tmp_path, rows=60, epochs=1)
    assert set(finetune(settings, tmp_path / "out")["after"]) == SCORES


def test_texts_that_are_longer_than_the_model_can_read(tmp_path: Path):
    """The model limits the length if the tokenizer does not."""
    make = lambda: BertForSequenceClassification(tiny_classifier.config())  # noqa: E731
    model = saved(tmp_path / "model", make, model_max_length=10**30)
    rows = [*tiny_classifier.reviews(60), (" ".join(["good"] * 40), "pos")]
    data = tiny_classifier.save_reviews(tmp_path / "reviews.csv", rows)
    settings = Settings(model=str(model), data=str(data), max_length=64)
    with pytest.raises(TaskError, match="a text has 42 tokens, but the model has 32 positions; want --max-length 32"):
        finetune(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overwriting_does_not_remove_inputs(tmp_path: Path):
    model = saved(tmp_path / "model", lambda: BertForSequenceClassification(tiny_classifier.config()))
    out = tmp_path / "out"
    finetune(settings_for(model, tmp_path, rows=60, epochs=1, method="full"), out)
    settings = settings_for(out / "model", tmp_path, rows=60, epochs=1)
    with pytest.raises(TaskError, match=r"--overwrite would remove .*out/model, which the run reads"):
        finetune(settings, out, overwrite=True)
    assert (out / "model" / "model.safetensors").is_file() and (out / "metrics.json").is_file()


def test_an_adapter_that_cannot_be_merged_leaves_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(model: Any, **how: Any) -> None:
        raise ValueError("a value is not finite")

    monkeypatch.setattr("lora_ext.tasks.finetune.task_model.merge_and_unload", refuse)
    lines: list[str] = []
    model = saved(tmp_path / "model", lambda: BertForSequenceClassification(tiny_classifier.config()))
    metrics = finetune(settings_for(model, tmp_path, rows=60, epochs=1), tmp_path / "out", say=lines.append)
    assert "latency" in metrics and "merged" not in metrics
    assert "the adapter cannot be merged: a value is not finite" in lines
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_a_run_that_diverged_says_so_and_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NaN logits have an argmax: the first class would be the answer to every text, and could win."""
    model = saved(tmp_path / "model", lambda: BertForSequenceClassification(tiny_classifier.config()))
    settings = settings_for(model, tmp_path, rows=60, epochs=1, learning_rate=1e30)
    lines: list[str] = []
    metrics = finetune(settings, tmp_path / "out", measure=False, say=lines.append)
    texts = metrics["examples"]["test"]
    assert metrics["diverged"] == texts > 0
    words = f"no finite outputs on {texts} of {texts} test texts; lower --learning-rate"
    assert any("training diverged" in line and words in line for line in lines)

    def here(function: Any, *args: Any, log: Path, threads: int, device: None, ending: object, **how: Any) -> Any:
        return function(*args, **how)

    monkeypatch.setattr(pools, "in_process", here)
    run = Run("lora", settings, metrics["data_sha256"])
    for _ in range(2):  # when it ends, and as a finished run that is resumed
        with pytest.raises(TaskError, match=f"1 of 1 runs failed; .*: training diverged: {words}"):
            run_all([run], tmp_path / "many", "compare")


def hub_command(tmp_path: Path, endpoint: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "", **more}
    return run_python("-m", "lora_ext", *arguments, **variables)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers but knows no model."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.full
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # without a server
        result = hub_command(tmp_path, endpoint, "plan", "--model", "nobody/nothing")
    assert result.returncode == 2 and "Retrying" not in result.stderr
    assert f"there is no such directory, the hub ({endpoint}) does not answer, and its cache (" in result.stderr
    assert "name a directory with its files, or run `hf download nobody/nothing`" in result.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", "--model", "./nothing"]) == 2
    said = capsys.readouterr().err
    assert "is not asked (HF_HUB_OFFLINE)" in said and "hf download" not in said


@pytest.mark.full
def test_a_hub_that_answers_is_asked_for_the_model(tmp_path: Path):
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        result = hub_command(tmp_path, f"http://127.0.0.1:{server.server_port}", "plan", "--model", "nobody/nothing")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert result.returncode == 2 and "does not answer" not in result.stderr
    assert any("nobody/nothing" in path for path in Hub.asked)
