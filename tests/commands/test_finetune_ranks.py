"""finetune by torchrun, or in forks with its variables: two processes give what one gives; FSDP; one process prints."""

from __future__ import annotations

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_classifier, tiny_decoder
from support.command_lines import metrics_of
from support.processes import Forked, run_python

pytestmark = [pytest.mark.cpu_only("processes with gloo"), pytest.mark.full]


def torchrun(*arguments: object) -> list[tuple[int, str, str]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lora_ext"]
    done = run_python(*launcher, *arguments, OMP_NUM_THREADS="1")
    return [(done.returncode, done.stdout, done.stderr)]


def forked(*arguments: object) -> list[tuple[int, str, str]]:
    """Returns exit status, output and errors of two processes that need not import what takes longer than the rest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    processes = [
        Forked("-m", "lora_ext", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **common, **ranks)
        for ranks in ({"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"})
    ]
    with ThreadPoolExecutor() as pool:  # none may wait for a full pipe of the other
        said = list(pool.map(Forked.communicate, processes))
    return [(process.returncode, *streams) for process, streams in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    top = tmp_path_factory.mktemp("inputs")
    model = tiny_classifier.save_model(top / "model", **tiny_classifier.NO_DROPOUT)
    data = tiny_classifier.save_reviews(top / "reviews.csv", tiny_classifier.reviews(60))
    words = ["--max_length", "32", "--lora_dropout", "0", "--lora_targets", "all-linear", "--lora_r", "2"]
    words += ["--lora_plus_ratio", "4"]
    return ["--model", str(model), "--data", str(data), *words, "--learning_rate", "0.01"]


@pytest.mark.parametrize("launcher", ["forks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(options, tmp_path, launcher):
    from lora_ext.commands import main

    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--ema_decay", "0.5", "--train_sampling_strategy", "sequential", "--logging_steps", "1"]
    batch = "--per_device_train_batch_size"
    assert main(["finetune", *options, *more, batch, "8", "--output_dir", str(one)]) == 0
    run = {"forks": forked, "torchrun": torchrun}[launcher]
    done = run("finetune", *options, *more, batch, "4", "--output_dir", two)
    assert {status for status, *_ in done} == {0}, done
    assert "".join(said for _, said, _ in done).count("test accuracy") == 1
    assert metrics_of(two)["processes"] == 2 and metrics_of(two)["global_batch_size"] == 8
    losses = [[row["loss"] for row in metrics_of(out)["history"] if "loss" in row] for out in (one, two)]
    # Batches that the processes share have the same texts in another order, and the last one may be padded.
    assert losses[1][:8] == pytest.approx(losses[0][:8], rel=0.02)
    weights = [load_file(out / "adapter/adapter_model.safetensors") for out in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], atol=5e-3, rtol=5e-2)


def test_a_language_model_trains_in_two_processes(tmp_path):
    tiny_decoder.save(tmp_path / "model")
    data = tiny_decoder.save_rows(tmp_path / "chats.jsonl", tiny_decoder.chats(tiny_decoder.questions(60)))
    words = ["--task", "causal-lm", "--model", tmp_path / "model", "--data", data, "--packing", "--max_length", "128"]
    words += ["--max_steps", "4", "--answers", "5", "--max_new_tokens", "4", "--learning_rate", "1e-2"]
    done = forked("finetune", *words, "--output_dir", tmp_path / "run")
    assert [status for status, *_ in done] == [0, 0], done
    metrics = metrics_of(tmp_path / "run")
    assert metrics["processes"] == 2 and metrics["test"]["perplexity"] < metrics["before"]["perplexity"]
    assert len((tmp_path / "run/predictions.jsonl").read_text().splitlines()) == 5


def test_fsdp_shards_and_writes_a_whole_adapter(options, tmp_path):
    config = tmp_path / "fsdp.yaml"
    config.write_text("fsdp: full_shard\nfsdp_config: {version: 2, auto_wrap_policy: TRANSFORMER_BASED_WRAP}\n")
    words = ["--config", config, "--ema_decay", "0", "--save_strategy", "no", "--max_steps", "4"]
    done = forked("finetune", *options, *words, "--output_dir", tmp_path / "run")
    assert [status for status, *_ in done] == [0, 0], done
    values = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert sum(value.numel() for value in values.values()) == metrics_of(tmp_path / "run")["trainable_parameters"]


def test_a_mistake_is_told_once(options, tmp_path):
    done = forked("finetune", *options, "--max_length", "99", "--output_dir", tmp_path / "run")
    assert all(status != 0 for status, *_ in done)
    assert [errors.count("--max_length is 99, but") for *_, errors in done] == [1, 0]
