"""Operations on a model's adapters in random order: it computes what the definition says and loses no bit.

A life draws operations from a seed and keeps the expected state in plain tensors.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import (
    adapter_names,
    add_weighted_adapter,
    delete_adapter,
    disable_adapters,
    hotswap_adapter,
    lora_modules,
    merge_and_unload,
    rename_adapter,
    unload,
)

pytestmark = pytest.mark.full

STEPS = 50
NAMES = ("a", "b", "c", "d")
CONFIGS = (
    {"r": 2, "target_modules": ["lin", "out"]},
    {"r": 3, "target_modules": ["embed", "lin"], "lora_alpha": 4},
    {"r": 2, "target_modules": "all-linear", "use_rslora": True},
    {"r": 1, "target_modules": ["conv", "out"], "rank_pattern": {"out": 3}},
)


class Every(nn.Module):
    """A sequence of one layer of each mergeable kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.lin = nn.Linear(8, 10)
        self.out = nn.Linear(10, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(torch.tanh(self.lin(x)))


class Life:
    """A model and its expected state.

    Attributes:
        base: the weights without adapters, by path.
        deltas: by adapter name, the update of each weight, float64.
        merged: by adapter name, the merged update.
        active: names, in order.
        files: adapters on disk, with their configs and updates.
        done: how often each operation was carried out, or refused.
    """

    def __init__(self, seed: int, directory: Path) -> None:
        torch.manual_seed(seed)
        self.draw, self.directory = random.Random(seed), directory
        self.bare = Every().eval().requires_grad_(False)
        self.model = copy.deepcopy(self.bare)
        self.base = {path: tensor.clone() for path, tensor in self.bare.state_dict().items()}
        self.wide, self.ids = copy.deepcopy(self.bare).double(), torch.randint(9, (2, 5))
        self.deltas: dict[str, dict[str, Tensor]] = {}
        self.merged: dict[str, dict[str, Tensor]] = {}
        self.active: tuple[str, ...] = ()
        self.configs: dict[str, dict] = {}
        self.files: list[tuple[Path, dict, dict[str, Tensor]]] = []
        self.trainable: set[str] = set()  # names of adapters that train while they are active
        self.done: Counter[str] = Counter()

    # --- the expected state -------------------------------------------------------------------------------------------

    def check(self) -> None:
        assert adapter_names(self.model) == list(self.deltas)
        self.assert_computes(self.model, self.in_use())
        if not self.merged:
            self.assert_pristine(self.model)
        assert all(len(layer.adapters) for _, layer in lora_modules(self.model))
        trained = {
            path.split(".adapters.")[1].split(".")[0] for path, p in self.model.named_parameters() if p.requires_grad
        }
        assert trained == {*self.active} & self.trainable

    def in_use(self) -> list[dict[str, Tensor]]:
        """The updates in effect: all merged ones, and the active ones."""
        return [*self.merged.values(), *(self.deltas[name] for name in self.active if name not in self.merged)]

    def assert_computes(self, model: nn.Module, updates: list[dict[str, Tensor]]) -> None:
        weights = {path: tensor.double() for path, tensor in self.base.items()}
        for update in updates:
            for path, delta in update.items():
                weights[path] = weights[path] + delta
        with torch.no_grad():
            expected = torch.func.functional_call(self.wide, weights, (self.ids,))
            torch.testing.assert_close(model(self.ids).double(), expected, rtol=1e-4, atol=1e-4)

    def assert_pristine(self, model: nn.Module) -> None:
        plain = {path.replace("base_layer.", ""): tensor for path, tensor in model.state_dict().items()}
        for path, tensor in self.base.items():
            assert torch.equal(plain[path], tensor), path

    def read(self, name: str) -> dict[str, Tensor]:
        """The updates of an adapter, from its present factors."""
        deltas = {}
        for path, layer in lora_modules(self.model):
            if name in layer.adapters:
                A, B, scaling = layer.factors(name)["weight"]
                matrix = scaling * B.detach().double() @ A.detach().double()
                deltas[f"{path}.weight"] = matrix.reshape(self.base[f"{path}.weight"].shape)
        return deltas

    def took(self, name: str, config: dict) -> None:
        """Records an added adapter."""
        self.deltas[name], self.configs[name] = self.read(name), config

    # --- operations ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        operations = [self.add] if not self.deltas else OPERATIONS
        operation = self.draw.choice(operations)
        operation(self) if operations is OPERATIONS else operation()
        self.check()

    def there(self) -> str:
        """The name of an adapter, or occasionally an unknown name."""
        return self.draw.choice(list(self.deltas)) if self.draw.random() < 0.9 else "x"

    def some_there(self) -> list[str]:
        names = self.draw.sample(list(self.deltas), self.draw.randint(1, len(self.deltas)))
        return [*names, "x"] if self.draw.random() < 0.1 else names

    def file(self) -> tuple[Path, dict, dict[str, Tensor]]:
        if not self.files:
            self.save()
        return self.draw.choice(self.files) if self.files else (self.directory / "none", {}, {})

    def attempt(self, what: str, change: Callable[[], object], error: type[Exception] | None) -> bool:
        """Tries a change; returns whether it was made. If not allowed, it must raise ``error`` and change no bit."""
        self.done[what if error is None else f"{what} refused"] += 1
        if error is None:
            change()
            return True
        before = {path: tensor.clone() for path, tensor in self.model.state_dict().items()}
        with pytest.raises(error):
            change()
        after = self.model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[path], after[path]) for path in before)
        return False

    def add(self) -> None:
        name, config = self.draw.choice(NAMES), self.draw.choice(CONFIGS)
        error = ValueError if name in self.deltas else RuntimeError if self.merged else None
        adapter = LoraConfig(**config, init_lora_weights=False)
        if self.attempt("inject", lambda: inject(self.model, adapter, name), error):
            self.took(name, config)
            self.trainable.add(name)
            self.active = (name,)  # load and combine leave it

    def switch(self) -> None:
        names = self.some_there()
        error = None if "x" not in names else KeyError
        if self.attempt("set_adapter", lambda: set_adapter(self.model, names), error):
            self.active = tuple(names)

    def merge(self) -> None:
        names = self.some_there()
        error = KeyError if "x" in names else RuntimeError if set(names) & self.merged.keys() else None
        if self.attempt("merge", lambda: merge(self.model, names), error):
            self.merged |= {name: self.deltas[name] for name in names}

    def unmerge(self) -> None:
        names = self.some_there()
        if self.merged and self.draw.random() < 0.7:
            names = self.draw.sample(list(self.merged), self.draw.randint(1, len(self.merged)))
        error = KeyError if "x" in names else RuntimeError if set(names) - self.merged.keys() else None
        if self.attempt("unmerge", lambda: unmerge(self.model, names), error):
            for name in names:
                del self.merged[name]

    def unmerge_all(self) -> None:
        if self.attempt("unmerge all", lambda: unmerge(self.model), None if self.merged else RuntimeError):
            self.merged.clear()

    def train(self) -> None:
        """Changes an adapter's values; merged weights keep the old values."""
        name = self.draw.choice(list(self.deltas))
        with torch.no_grad():
            for _, layer in lora_modules(self.model):
                if name in layer.adapters:
                    layer.adapters[name].lora_B.normal_()
        self.deltas[name] = self.read(name)

    def rename(self) -> None:
        old, new = self.there(), self.draw.choice(NAMES)
        error = None
        if old == "x":
            error = KeyError
        elif old != new:
            error = ValueError if new in self.deltas else RuntimeError if old in self.merged else None
        if self.attempt("rename", lambda: rename_adapter(self.model, old, new), error):
            for held in (self.deltas, self.configs):
                entries = {new if name == old else name: value for name, value in held.items()}
                held.clear()
                held.update(entries)
            self.active = tuple(new if name == old else name for name in self.active)
            self.trainable = {new if name == old else name for name in self.trainable}

    def delete(self) -> None:
        name = self.there()
        error = KeyError if name == "x" else RuntimeError if name in self.active or name in self.merged else None
        if self.attempt("delete", lambda: delete_adapter(self.model, name), error):
            del self.deltas[name], self.configs[name]
            self.trainable.discard(name)

    def disable(self) -> None:
        error = RuntimeError if self.merged else None

        def change() -> None:
            with disable_adapters(self.model):
                self.assert_computes(self.model, [])

        self.attempt("disable", change, error)

    def save(self) -> None:
        name, directory = self.there(), self.directory / str(len(self.files))
        if self.attempt("save", lambda: save_adapter(self.model, directory, name), KeyError if name == "x" else None):
            self.files.append((directory, self.configs[name], self.deltas[name]))

    def load(self) -> None:
        (directory, config, deltas), name = self.file(), self.draw.choice(NAMES)
        if not self.files:
            error: type[Exception] | None = FileNotFoundError
        elif self.merged:
            error = RuntimeError
        else:
            error = ValueError if self.configs.get(name, config) is not config else None
        replaces = name in self.deltas
        if self.attempt("load", lambda: load_adapter(self.model, directory, adapter_name=name), error):
            if replaces:
                self.deltas[name] = self.read(name)
            else:
                self.took(name, config)
            torch.testing.assert_close(self.deltas[name], deltas)

    def swap(self) -> None:
        (directory, config, deltas), name = self.file(), self.there()
        if not self.files or (name in self.configs and self.configs[name] is not config):
            return  # other layers or ranks: tests/adapters/test_hotswap.py
        error = KeyError if name == "x" else RuntimeError if name in self.merged else None
        if self.attempt("hotswap", lambda: hotswap_adapter(self.model, directory, name), error):
            self.deltas[name] = self.read(name)
            torch.testing.assert_close(self.deltas[name], deltas)

    def combine(self) -> None:
        name, weight = self.draw.choice(NAMES), self.draw.choice([0.5, -1.0, 2.0])
        first, second = self.there(), self.draw.choice(list(self.deltas))
        if first == second:
            return
        error = ValueError if name in self.deltas else RuntimeError if self.merged else None
        error = KeyError if first == "x" else error

        def change() -> None:
            add_weighted_adapter(self.model, [first, second], [weight, 1.0], name, "cat")

        if self.attempt("combine", change, error):
            expected = {path: weight * delta for path, delta in self.deltas[first].items()}
            for path, delta in self.deltas[second].items():
                expected[path] = expected.get(path, 0) + delta
            self.took(name, {"combined": len(self.done)})
            torch.testing.assert_close(self.deltas[name], expected, rtol=1e-4, atol=1e-4)

    def go_on_with_a_copy(self) -> None:
        self.model = self.draw.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])(self.model)

    def unload_a_copy(self) -> None:
        if self.attempt("unload", lambda: unload(copy.deepcopy(self.model)), RuntimeError if self.merged else None):
            self.assert_pristine(unload(copy.deepcopy(self.model)))

    def merge_a_copy_for_good(self) -> None:
        names = self.draw.choice([list(self.active), self.draw.sample(list(self.deltas), 1)])
        plain = merge_and_unload(copy.deepcopy(self.model), names or None)
        assert [type(module) for module in plain.modules()] == [type(module) for module in self.bare.modules()]
        self.assert_computes(plain, [*self.merged.values(), *(self.deltas[n] for n in names if n not in self.merged)])


OPERATIONS = (
    Life.add,
    Life.switch,
    Life.merge,
    Life.merge,
    Life.unmerge,
    Life.unmerge,
    Life.unmerge_all,
    Life.train,
    Life.rename,
    Life.delete,
    Life.disable,
    Life.save,
    Life.load,
    Life.swap,
    Life.combine,
    Life.go_on_with_a_copy,
    Life.unload_a_copy,
    Life.merge_a_copy_for_good,
)


@pytest.fixture
def one_thread():
    """Uses one thread: for such small layers, synchronising threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_any_order_of_operations(request, tmp_path):
    done: Counter[str] = Counter()
    for seed in range(request.config.getoption("--lives")):
        life = Life(seed, tmp_path / str(seed))
        for step in range(STEPS):
            try:
                life.step()
            except BaseException as error:
                error.add_note(f"life {seed}, step {step}") if hasattr(error, "add_note") else None
                raise
        done += life.done
    expected = {"inject", "set_adapter", "merge", "unmerge", "rename", "delete", "save", "load", "hotswap", "combine"}
    assert expected | {f"{operation} refused" for operation in expected} <= done.keys()
    print(sum(done.values()), "operations", dict(done))
