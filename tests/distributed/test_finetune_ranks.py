"""finetune in several processes equals one process, and a run resumes with another number of them."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from support import tiny_classifier, tiny_decoder
from support.processes import run_python
from torch import Tensor

from lora_ext.cli import main
from lora_ext.tasks import WriteError
from lora_ext.tasks.causal_lm import evaluating
from lora_ext.tasks.causal_lm import run as causal_run
from lora_ext.tasks.finetune import run_checkpoints
from lora_ext.tasks.shared import team

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("processes with gloo")]

OPTIONS = ["--epochs", "2", "--accumulation-steps", "2", "--batch-size", "4", "--max-length", "32", "--rank", "2"]
OPTIONS += ["--lora-dropout", "0", "--ema-decay", "0.5", "--learning-rate", "0.01", "--no-measure"]
OPTIONS += ["--target-modules", "all-linear,embeddings"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    top = tmp_path_factory.mktemp("inputs")
    model = tiny_classifier.save_model(top / "model", **tiny_classifier.NO_DROPOUT)
    data = tiny_classifier.save_reviews(top / "reviews.csv", tiny_classifier.reviews(40))  # 32 to train on: 4 steps
    return ["--model", str(model), "--data", str(data)]


def _finetune(rank: int, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Runs the command as torchrun does. Returns its status and its messages."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    number = torch.distributed.get_world_size()
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)} | variables
    with (
        mock.patch.dict(os.environ, variables | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}),
        mock.patch.multiple(run_checkpoints, SECONDS=0.0, _SHARE=0.0, _KEPT=100),
        redirect_stderr(io.StringIO()) as messages,
    ):
        try:
            return main(["finetune", *arguments, "--threads", "1"]), messages.getvalue()
        except SystemExit as error:  # raised by argparse
            return error.code, messages.getvalue()


def _run(ranks, number: int, out: Path, inputs: list[str], *more: str, **variables: str) -> None:
    for status, messages in ranks(number, _finetune, ["--out", str(out), *inputs, *OPTIONS, *more], variables):
        assert status == 0, messages


def _results(out: Path) -> tuple[dict[str, Tensor], dict, list[dict]]:
    state = json.loads(max(out.glob("checkpoints/*/trainer_state.json"), key=lambda path: path.parent.name).read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    return load_file(out / "adapter" / "adapter_model.safetensors"), metrics, state["log_history"]


def _assert_equal(first: Path, second: Path, exact: bool) -> None:
    """Compares weights, scores and logged losses."""
    weights, metrics, logs = zip(*map(_results, (first, second)), strict=True)
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value) if exact else torch.allclose(weights[1][key], value, atol=1e-5), key
    assert metrics[0]["after"] == metrics[1]["after"]  # of 4 texts, so that no rounding shows
    for key in ("validation", "examples"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-5), key
    assert len(logs[0]) == len(logs[1]) == 10  # 8 steps and two evaluations
    for one, other in zip(*logs, strict=True):
        assert one["step"] == other["step"]
        for key in {"loss", "eval_loss", "eval_accuracy"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


@pytest.fixture(scope="module")
def runs(ranks, inputs, tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("runs")
    for number in (1, 2):
        _run(ranks, number, top / str(number), inputs)
    return top


def test_two_processes_equal_one(runs):
    _assert_equal(runs / "1", runs / "2", exact=False)
    files = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in (runs / "1", runs / "2")]
    assert [name.replace("rng_state_0", "rng_state") for name in files[1]] == files[0]
    assert _results(runs / "2")[1]["processes"] == 2


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
def test_all_processes_take_the_best_checkpoint(ranks, inputs, tmp_path, resumed):
    """Only the first one's directory has it."""
    best = ["--best-metric", "loss", "--early-stopping", "1", "--learning-rate", "1.0", "--epochs", "4"]
    for number in (1, 2):
        _run(ranks, number, tmp_path / str(number), inputs, *best)
        if resumed:  # after the last step
            (tmp_path / str(number) / "metrics.json").unlink()
            _run(ranks, number, tmp_path / str(number), inputs, *best, "--resume")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in "12"]
    assert metrics[0]["after"] == metrics[1]["after"]
    assert metrics[0]["best"]["step"] == metrics[1]["best"]["step"] < 16


def _cut(runs: Path, out: Path, step: int = 3) -> None:
    """Copies the run of two processes as it was after a step."""
    shutil.copytree(runs / "2", out)
    for path in list(out.glob("checkpoints/*")):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    for name in ("metrics.json", "loss_curve.png", "predictions.jsonl"):
        (out / name).unlink()
    shutil.rmtree(out / "adapter")


@pytest.mark.parametrize("number", [1, 2, 4])
def test_resumes_with_another_number_of_processes(ranks, runs, inputs, tmp_path, number):
    _cut(runs, tmp_path / "out")
    _run(ranks, number, tmp_path / "out", inputs, "--resume")
    _assert_equal(runs / "2", tmp_path / "out", exact=number == 2)


def test_a_restart_by_torchrun_resumes(ranks, runs, inputs, tmp_path):
    _cut(runs, tmp_path / "out")
    (tmp_path / "out/checkpoints/.checkpoint-4.unfinished").mkdir()  # killed in a save
    _run(ranks, 2, tmp_path / "out", inputs, "--overwrite", TORCHELASTIC_RESTART_COUNT="1")
    _assert_equal(runs / "2", tmp_path / "out", exact=True)


def _counted(rank: int, arguments: list[str]) -> list[int]:
    """Runs the command; returns the numbers of batches with which this process has measured the test texts."""
    counts, perplexity = [], causal_run.perplexity

    def counted(forward, batches, *rest, **more):
        counts.append(len(batches))
        return perplexity(forward, batches, *rest, **more)

    with mock.patch.object(causal_run, "perplexity", counted), mock.patch.object(evaluating, "_AT_ONCE", 1):
        status, messages = _finetune(rank, arguments, {})
    assert status == 0, messages
    return counts


def test_a_language_model_counts_its_tokens_on_all_processes(ranks, tmp_path):
    """Texts differ in length, so the mean of the processes' means would be another loss."""
    tiny_decoder.save(tmp_path / "llama")
    data = tiny_decoder.save_rows(tmp_path / "chats.jsonl", tiny_decoder.chats(tiny_decoder.questions(40)))
    options = ["--task", "causal-lm", "--model", str(tmp_path / "llama"), "--data", str(data), "--max-length", "128"]
    options += ["--validation-split", "0.2", "--batch-size", "4", "--epochs", "1", "--rank", "2", "--lora-dropout", "0"]
    options += ["--learning-rate", "0.02", "--answers", "2", "--max-new-tokens", "4", "--no-measure"]
    batches = {}
    for number in (1, 2):
        out = ["--out", str(tmp_path / str(number))]
        batches[number] = ranks(number, _counted, [*options, *out])
    assert batches[1] == [[1, 1]] and batches[2] == [[1, 1], [0, 0]]  # the test texts, before and after training
    weights, metrics, logs = zip(*(_results(tmp_path / name) for name in "12"), strict=True)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
    for one, other in zip(*logs, strict=True):
        for key in {"loss", "eval_loss"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)
    for when in ("before", "after"):
        for key, value in metrics[0][when].items():
            assert metrics[1][when][key] == pytest.approx(value, rel=1e-4), (when, key)
    assert metrics[1]["samples"] == metrics[0]["samples"] and len(metrics[0]["samples"]) == 2


KILLED = """
import os, signal, sys
from lora_ext.cli import main
from lora_ext.tasks.finetune import run_checkpoints, trainer

run_checkpoints.SECONDS = run_checkpoints._SHARE = 0.0
run_checkpoints._KEPT = 100
where, rank = sys.argv[1], int(os.environ["RANK"])
kind, calls = trainer.FinetuneTrainer, []
name = {"step": "training_step", "save": "_save_optimizer_and_scheduler"}[where]
method = getattr(kind, name)

def killed(self, *args, **kwargs):
    calls.append(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == {"step": 1, "save": 0}[where] and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *args, **kwargs)

setattr(kind, name, killed)
sys.exit(main(["finetune", *sys.argv[2:], "--threads", "1"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_killed_process_restarts_all(runs, inputs, tmp_path, where):
    """A rank dies in a step, or the first in a save, under torchrun; the run ends with the same weights."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = run_python(*launch, script, where, "--out", tmp_path / "out", *inputs, *OPTIONS, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr  # torchrun's word about the killed process
    assert done.stdout.count("evaluating on 4 test texts") == 1  # one log
    _assert_equal(runs / "2", tmp_path / "out", exact=True)


def _refused(rank: int, arguments: list[str]) -> tuple[int, str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    with mock.patch.dict(os.environ, variables), redirect_stderr(io.StringIO()) as messages:
        return main(arguments), messages.getvalue()


def test_what_processes_cannot_share_is_refused(ranks, inputs, tmp_path):
    results = ranks(3, _finetune, ["--out", str(tmp_path / "out"), *inputs, *OPTIONS], {})
    assert [status for status, _ in results] == [2, 2, 2]
    assert "--batch-size is 4, which 3 processes cannot share equally; choose a multiple" in results[0][1]
    assert [messages for _, messages in results[1:]] == ["", ""]  # said once
    assert not (tmp_path / "out").exists()
    ((status, messages),) = ranks(1, _refused, ["info"])
    assert status == 2 and "info runs in one process, not in 3; start it without torchrun" in messages


@pytest.mark.parametrize(
    ("option", "message"), [("--epochs=many", "argument --epochs: invalid"), ("--epochs=-1", "--epochs is -1.0, want")]
)
def test_mistakes_in_options_are_said_once(ranks, tmp_path, option, message):
    (first, said), (second, silent) = ranks(2, _finetune, ["--out", str(tmp_path / "out"), option], {})
    assert first == second == 2
    assert message in said and silent == ""


def _ends(rank: int, out: Path, first: str | None) -> tuple[str, bool] | None:
    """The second process ends with a mistake, and the first one with ``first``."""
    text = first if rank == 0 else "TMPDIR is full"
    number = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    with mock.patch.dict(os.environ, number):
        try:
            with team.joined(out, resume=False):
                if text is not None:
                    raise WriteError(text)
        except WriteError as error:
            return str(error), team.is_repeated(error)
    return None


def test_a_mistake_of_one_process_is_said_by_it(ranks, tmp_path):
    assert ranks(2, _ends, tmp_path, None) == [None, ("process 1: TMPDIR is full", False)]
    first, second = ranks(2, _ends, tmp_path, "--out is full")
    assert first == ("--out is full", False) and second == ("process 1: TMPDIR is full", False)
    first, second = ranks(2, _ends, tmp_path, "TMPDIR is full")
    assert first == ("TMPDIR is full", False) and second == ("TMPDIR is full", True)


def _parts(rank: int, number: int) -> list[int]:
    part = team.part_of(range(number))
    assert team.gathered(part) == [*range(number)]
    return part


@pytest.mark.parametrize("number", [0, 1, 5])
def test_parts_are_put_together_in_order(ranks, number):
    parts = ranks(2, _parts, number)
    assert parts == [[*range(number)][rank::2] for rank in range(2)]
