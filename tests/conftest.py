"""Options and fixtures of all tests. ``pytest --device cuda`` creates the tests' tensors on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Two threads on any machine: tests run in parallel, and results must not depend on the machine's size.
torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch.use_deterministic_algorithms needs it on CUDA

# What `make test-quick` leaves out (the mark "full"), by parts of a test's name. A test that is not here is in.
FULL = (
    *(f"tests/{name}/" for name in ("benchmarks", "building", "cpp", "faults", "fuzz", "hostile", "sanitize", "simt")),
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
    "tests/ops/test_lora_linear_siblings.py::test_values_and_gradients",
    "tests/ops/test_lora_merge.py::test_instruction_sets_and_threads_agree_to_the_bit",
    "tests/ops/test_memory_claims.py",
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
    "tests/tasks/test_resume.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests create their tensors")
    parser.addoption("--lives", type=int, default=60, help="number of models that go through random operations")


def no_cuda_reason() -> str:
    """Returns why nothing can run on a GPU here, or ""."""
    from lora_ext import _load

    if not torch.cuda.is_available():
        return "no GPU" if torch.version.cuda else f"torch {torch.__version__} is a build without CUDA"
    return _load.cuda_unavailable_reason


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "full: left out by -m 'not full' (make test-quick); tests/conftest.py lists them"
    )
    config.addinivalue_line("markers", "slow: takes minutes; skipped without --slow (make test-full)")
    config.addinivalue_line("markers", "cpu_only(reason): skipped under --device cuda")
    if config.getoption("--device") == "cuda":
        if reason := no_cuda_reason():
            raise pytest.UsageError(f"--device cuda: {reason}")
        torch.set_default_device("cuda")  # before modules that create tensors are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") or any(part in item.nodeid for part in FULL):
            item.add_marker(pytest.mark.full)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: --slow (make test-full) runs it")
    if item.config.getoption("--device") != "cuda":
        return
    if marker := item.get_closest_marker("cpu_only"):
        pytest.skip(f"not on CUDA: {marker.args[0]}")


@pytest.fixture
def gpu() -> torch.device:
    """Returns the current GPU; skips the test if there is none."""
    if reason := no_cuda_reason():
        pytest.skip(f"needs a GPU: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds each test case, so that cases have different inputs and every run repeats them."""
    torch.manual_seed(int.from_bytes(request.node.nodeid.encode()[-6:], "big"))
