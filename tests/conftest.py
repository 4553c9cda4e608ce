"""Options and fixtures of all tests. ``pytest --device cuda`` creates the tests' tensors on the GPU."""

from __future__ import annotations

import collections
import gc
import os
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Two threads on any machine: tests run in parallel, and results must not depend on the machine's size.
torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch.use_deterministic_algorithms needs it on CUDA
# No limit of speed: it ends what hangs, some minutes after faulthandler has printed the stacks (pyproject.toml).
os.environ.setdefault("PYTEST_TIMEOUT", "1800")
# The processes of pytest-xdist inherit it, and so collect in the same order.
os.environ.setdefault("TEST_ORDER", str(random.SystemRandom().randrange(10_000)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="without the files and tests marked full")
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests create their tensors")
    parser.addoption("--lives", type=int, default=40, help="number of models that go through random operations")


def no_cuda_reason() -> str:
    """Returns why nothing can run on a GPU here, or ""."""
    from lora_ext import _load

    if not torch.cuda.is_available():
        return "no GPU" if torch.version.cuda else f"torch {torch.__version__} is a build without CUDA"
    return _load.cuda_unavailable_reason


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full(but): left out by --quick, all but every but-th case")
    config.addinivalue_line("markers", "slow: takes minutes; skipped without --slow (make test-full)")
    config.addinivalue_line("markers", "pairs: on the CPU without --slow, every pair of values, not the product")
    config.addinivalue_line("markers", "large: wants gigabytes of memory; a GPU check runs these one at a time")
    config.addinivalue_line("markers", "cpu_only(reason): skipped under --device cuda")
    if config.pluginmanager.hasplugin("timeout"):  # machines of GPU checks are without it
        config.option.timeout_method = config.option.timeout_method or "thread"  # ends compiled code, too
    if config.getoption("--device") == "cuda":
        if reason := no_cuda_reason():
            raise pytest.UsageError(f"--device cuda: {reason}")
        torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions have the precision of float16
        torch.set_default_device("cuda")  # before modules that create tensors are imported


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"TEST_ORDER={os.environ['TEST_ORDER']} repeats this order of the tests; 0: as written")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Hides what collection makes from later garbage collections.

    Imports and 10,000 tests are 800,000 objects, which cost every ``gc.collect`` half a second; fine-tuning calls it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick, skips the import of files that are marked full, or slow, as a whole."""
    if config.getoption("--quick") and collection_path.suffix == ".py":
        return True if re.search(r"^pytestmark = .*\bmark\.(full|slow)\b", collection_path.read_text(), re.M) else None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    excess: set[pytest.Item] = set()
    if not config.getoption("--slow") and config.getoption("--device") == "cpu":  # GPU checks run all
        excess.update(_beyond_pairs([item for item in items if item.get_closest_marker("pairs")]))
    if config.getoption("--quick"):
        excess.update(_beyond_quick([item for item in items if item not in excess]))
    config.hook.pytest_deselected(items=list(excess))
    items[:] = _shuffled([item for item in items if item not in excess], int(os.environ["TEST_ORDER"]))


def _shuffled(items: list[pytest.Item], seed: int) -> list[pytest.Item]:
    """Shuffles the files, and the tests within each file, which share fixtures and imports. 0: leaves the order."""
    if not seed:
        return items
    rng = random.Random(seed)
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shuffled = [rng.sample(tests, len(tests)) for tests in files.values()]
    rng.shuffle(shuffled)
    return [item for tests in shuffled for item in tests]


def _beyond_pairs(items: list[pytest.Item]) -> list[pytest.Item]:
    """Returns the half of each product of three or more parameters without which every pair of values is left."""
    numbers: dict[tuple[str, int], dict[str, int]] = {}  # of a parameter's values, in order
    found = []
    for item in items:
        function, ids = item.nodeid.partition("[")[0], item.callspec._idlist
        assert len(ids) > 2, f"{function}: the mark pairs is for three or more parameters"
        known = [numbers.setdefault((function, i), {}) for i in range(len(ids))]
        if sum(values.setdefault(name, len(values)) for values, name in zip(known, ids, strict=True)) % 2 == 1:
            found.append(item)
    return found


def _beyond_quick(items: list[pytest.Item]) -> list[pytest.Item]:
    """Returns the items marked full; of functions marked ``full(but=3)`` all but every third."""
    numbers: collections.Counter[str] = collections.Counter()
    found = []
    for item in items:
        if marker := item.get_closest_marker("full"):
            function, but = item.nodeid.partition("[")[0], marker.kwargs.get("but")
            numbers[function] += but is not None
            if but is None or numbers[function] % but != 1:
                found.append(item)
    return found


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


@pytest.fixture
def on_gpu(gpu: torch.device) -> Iterator[None]:
    """Creates new tensors on the GPU."""
    with gpu:
        yield


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds each test case, so that cases have different inputs and every run repeats them."""
    seed = zlib.crc32(request.node.nodeid.encode())
    if request.config.getoption("--device") == "cuda":
        torch.manual_seed(seed)
    else:  # torch.manual_seed also formats the stack for each kind of device that is not in use: 0.3 ms or more
        torch.default_generator.manual_seed(seed)
