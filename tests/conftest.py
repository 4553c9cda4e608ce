"""Options and fixtures of all tests. ``pytest --device cuda`` makes the tests' tensors on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Two threads, also on larger machines: tests run side by side, and results must not depend on the machine's size.
torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch.use_deterministic_algorithms asks for on CUDA


def pytest_addoption(parser: pytest.Parser) -> None:
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
