"""Options and fixtures of all tests. ``pytest --device cuda`` makes the tests' tensors on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Two threads, also on larger machines: tests run side by side, and results must not depend on the machine's size.
torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch.use_deterministic_algorithms asks for on CUDA

# Under --device cuda all other modules run as they are: PyTorch's default device is the GPU.
CPU_ONLY = {
    "test_analysis": "compares with numpy",
    "test_analyze": "is about files, which hold CPU tensors",
    "test_adapter_file": "is about files, which hold CPU tensors",
    "test_benchmarks": "runs the scripts on the CPU",
    "test_bounded_regex": "has no tensors",
    "test_build": "is about the binary",
    "test_checkpoint": "is about files, which hold CPU tensors",
    "test_cli": "starts processes of its own",
    "test_config": "has no tensors",
    "test_cpp": "tests the CPU kernels",
    "test_cuda_report": "is about the compiler's output",
    "test_data": "has no tensors",
    "test_demo": "is about files",
    "test_finetune": "the Trainer chooses the device",
    "test_fuzz": "starts processes of its own",
    "test_gpu_check": "tests a script's arithmetic",
    "test_hostile_adapters": "is about files, which hold CPU tensors",
    "test_huggingface": "the Trainer chooses the device",
    "test_memory_claims": "reads the CPU allocator's records",
    "test_offline": "is about files, which hold CPU tensors",
    "test_readme": "the README's lines name no device",
    "test_report": "is about files",
    "test_sanitizers": "is about the compiler",
    "test_saved_whole": "is about files, which hold CPU tensors",
    "test_simt": "emulates the CUDA kernels on the CPU",
    "test_safetensors_format": "is about files",
    "test_untrusted_json": "has no tensors",
}


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
    module = item.module.__name__
    reasons = [reason for name, reason in CPU_ONLY.items() if module == name or module.startswith(f"{name}_")]
    reasons += [marker.args[0] for marker in item.iter_markers("cpu_only")]
    if reasons:
        pytest.skip(f"not on CUDA: {reasons[0]}")


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
