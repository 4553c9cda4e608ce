"""Options and fixtures of all tests. ``pytest --device cuda`` makes the tests' tensors on the GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Two threads, also on larger machines: tests run side by side, and results must not depend on the machine's size.
torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch.use_deterministic_algorithms asks for on CUDA

# What `make test-quick` (--quick) leaves out: files, folders, tests. A test that is not here is in.
FULL = (
    *(f"tests/{name}" for name in ("benchmarks", "building", "cpp", "faults", "fuzz", "hostile", "sanitize", "simt")),
    "::test_every_instruction_set",
    "inductor]",
    "tests/adapters/test_adapters_interrupted.py",
    "tests/adapters/test_life_cycle.py",
    "tests/adapters/test_threads.py",
    "tests/analysis/test_analysis.py::test_large_weights_leading_directions",
    "tests/checkpoints/test_checkpoint_interrupted.py",
    "tests/checkpoints/test_matching_costs.py",
    "tests/checkpoints/test_merge_checkpoint.py::test_resident_memory_does_not_grow_with_the_checkpoint",
    "tests/files/test_saved_whole.py",
    "tests/merging/test_merge_interrupted.py",
    "tests/methods/test_methods_prefix.py::test_compiled_in_one_graph",
    "tests/ops/test_lora_delta.py::test_values_and_gradients",
    "tests/ops/test_lora_linear_siblings.py::test_values_and_gradients",
    "tests/ops/test_lora_merge.py::test_instruction_sets_and_threads_agree_to_the_bit",
    "tests/ops/test_memory_claims.py",
    "tests/ops/test_zero_sizes.py::test_siblings",
    "tests/peft/test_peft_conformance.py",
    "tests/planner/test_planner.py::test_a_deep_model_is_what_its_shallow_ones_say",
    "tests/tasks/test_analyze.py",
    "tests/tasks/test_analyze_command.py",
    "tests/tasks/test_cli.py::test_threads_that_wait_sleep_unless_the_user_says_otherwise",
    "tests/tasks/test_compare.py",
    "tests/tasks/test_data.py::test_nothing_depends_on_how_strings_are_hashed",
    "tests/tasks/test_demo.py",
    "tests/tasks/test_finetune.py",
    "tests/tasks/test_moving_average.py",
    "tests/tasks/test_phobert.py",
    "tests/tasks/test_plan.py::test_the_demo_takes_the_memory_that_is_planned",
    "tests/tasks/test_report_browser.py",
    "tests/tasks/test_report_page.py::test_the_page_is_whole_and_asks_nothing_of_others",
    "tests/tasks/test_resume.py",
    "tests/tasks/test_task_model.py::test_a_hub",
    "tests/tasks/test_task_model.py::test_decoders_learn_though_their_tokenizers_have_no_padding",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the part of the suite that takes two minutes")
    parser.addoption("--slow", action="store_true", help="tests marked slow, too")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests make their tensors")
    parser.addoption("--lives", type=int, default=60, help="how many models live through random operations")


def no_cuda_reason() -> str:
    """Why nothing can be run on a GPU here, or ""."""
    from lora_ext import _load

    if not torch.cuda.is_available():
        return "no GPU" if torch.version.cuda else f"torch {torch.__version__} is a build without CUDA"
    return _load.cuda_unavailable_reason


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; left out unless --slow (make test-full)")
    config.addinivalue_line("markers", "cpu_only(reason): skipped under --device cuda")
    if config.getoption("--device") == "cuda":
        if reason := no_cuda_reason():
            raise pytest.UsageError(f"--device cuda: {reason}")
        torch.set_default_device("cuda")  # before modules with tensors of their own are imported


def is_full(name: str) -> bool:
    return any(part in name for part in FULL)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files and folders of FULL are not even imported."""
    if config.getoption("--quick") and collection_path.is_relative_to(config.rootpath):
        return collection_path.relative_to(config.rootpath).as_posix() in FULL or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if is_full(item.nodeid)])
        items[:] = [item for item in items if not is_full(item.nodeid)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: --slow (make test-full) runs it")
    if item.config.getoption("--device") != "cuda":
        return
    if marker := item.get_closest_marker("cpu_only"):
        pytest.skip(f"not on CUDA: {marker.args[0]}")


@pytest.fixture
def gpu() -> torch.device:
    """The current GPU; a test that asks for it skips where there is none."""
    if reason := no_cuda_reason():
        pytest.skip(f"needs a GPU: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Inputs are fresh for every case, and the same for every run of it."""
    torch.manual_seed(int.from_bytes(request.node.nodeid.encode()[-6:], "big"))
