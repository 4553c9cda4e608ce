"""Operations on a model's adapters in any order: it computes what the definition says and loses no bit."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("hypothesis", reason="hypothesis is not installed; make test installs it")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
CONFIGS = (
    {"r": 2, "target_modules": ["lin", "out"]},
    {"r": 3, "target_modules": ["embed", "lin"], "lora_alpha": 4},
    {"r": 2, "target_modules": "all-linear", "use_rslora": True},
    {"r": 1, "target_modules": ["conv", "out"], "rank_pattern": {"out": 3}},
    {"r": 2, "target_modules": ["conv", "lin"], "lora_bias": True},
)
NEW = st.sampled_from("abcd")  # names that may be taken
Deltas = dict[str, Tensor]
"""The update of each weight and bias, float64."""


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


@dataclass
class Saved:
    """An adapter on disk."""

    directory: Path
    config: dict
    deltas: Deltas


class Life(RuleBasedStateMachine):
    """A model, and its expected state in plain tensors.

    Attributes:
        base: the weights without adapters, by path.
        deltas: by adapter name, the updates.
        merged: by adapter name, the merged updates.
        active: names, in order.
        trainable: names of adapters that train while they are active.
        done: how often each operation was carried out, or refused, in all lives.
    """

    files = Bundle("files")
    done: ClassVar[Counter[str]] = Counter()

    @initialize(seed=st.integers(0, 99), config=st.sampled_from(CONFIGS))
    def begin(self, seed: int, config: dict) -> None:
        torch.manual_seed(seed)
        self.directory = tempfile.TemporaryDirectory()
        self.bare = Every().eval().requires_grad_(False)
        self.model = copy.deepcopy(self.bare)
        self.base = {path: tensor.clone() for path, tensor in self.bare.state_dict().items()}
        self.wide, self.ids = copy.deepcopy(self.bare).double(), torch.randint(9, (2, 5))
        self.deltas: dict[str, Deltas] = {}
        self.merged: dict[str, Deltas] = {}
        self.active: tuple[str, ...] = ()
        self.configs: dict[str, dict] = {}
        self.trainable: set[str] = set()
        self.add("a", config)

    def teardown(self) -> None:
        self.directory.cleanup()

    # --- the expected state -------------------------------------------------------------------------------------------

    @invariant()
    def computes_the_definition(self) -> None:
        assert adapter_names(self.model) == list(self.deltas)
        self.assert_computes(self.model, self.active)
        if not self.merged:
            self.assert_pristine(self.model)
        assert all(len(layer.adapters) for _, layer in lora_modules(self.model))
        trained = {
            path.split(".adapters.")[1].split(".")[0] for path, p in self.model.named_parameters() if p.requires_grad
        }
        assert trained == {*self.active} & self.trainable

    def assert_computes(self, model: nn.Module, names: Iterable[str]) -> None:
        """Checks the results: all merged updates are in effect, and those of ``names``."""
        weights = {path: tensor.double() for path, tensor in self.base.items()}
        for update in [*self.merged.values(), *(self.deltas[name] for name in names if name not in self.merged)]:
            for path, delta in update.items():
                weights[path] = weights[path] + delta
        with torch.no_grad():
            expected = torch.func.functional_call(self.wide, weights, (self.ids,))
            torch.testing.assert_close(model(self.ids).double(), expected, rtol=1e-4, atol=1e-4)

    def assert_pristine(self, model: nn.Module) -> None:
        plain = {path.replace("base_layer.", ""): tensor for path, tensor in model.state_dict().items()}
        for path, tensor in self.base.items():
            torch.testing.assert_close(plain[path], tensor, rtol=0, atol=0, msg=lambda m, path=path: f"{path}: {m}")

    def read(self, name: str) -> Deltas:
        """The updates of an adapter, from its present factors."""
        deltas = {}
        for path, layer in lora_modules(self.model):
            if name in layer.adapters:
                for key, (A, B, scaling) in layer.factors(name).items():
                    matrix = scaling * B.detach().double() @ A.detach().double()
                    deltas[f"{path}.{key}"] = matrix.reshape(self.base[f"{path}.{key}"].shape)
        return deltas

    def took(self, name: str, config: dict) -> None:
        """Records an added adapter."""
        self.deltas[name], self.configs[name] = self.read(name), config

    def one(self, data: st.DataObject) -> str:
        """Draws the name of an adapter, or occasionally an unknown one."""
        return data.draw(st.sampled_from(["x", *self.deltas, *self.deltas]))

    def some(self, data: st.DataObject, allowed: Iterable[str]) -> list[str]:
        """Draws names, mostly of those ``allowed``."""
        names = [*allowed] * data.draw(st.sampled_from([1, 1, 1, 0])) or [*self.deltas, "x"]
        return data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))

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

    # --- operations ---------------------------------------------------------------------------------------------------

    @rule(name=NEW, config=st.sampled_from(CONFIGS))
    def add(self, name: str, config: dict) -> None:
        error = ValueError if name in self.deltas else RuntimeError if self.merged else None
        adapter = LoraConfig(**config, init_lora_weights=False)
        if self.attempt("inject", lambda: inject(self.model, adapter, name), error):
            self.took(name, config)
            self.trainable.add(name)
            self.active = (name,)  # load and combine leave it

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        names = self.some(data, self.deltas)
        error = KeyError if {*names} - self.deltas.keys() else None
        if self.attempt("set_adapter", lambda: set_adapter(self.model, names), error):
            self.active = tuple(names)

    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        names = self.some(data, [name for name in self.deltas if name not in self.merged])
        error = KeyError if {*names} - self.deltas.keys() else RuntimeError if {*names} & self.merged.keys() else None
        if self.attempt("merge", lambda: merge(self.model, names), error):
            self.merged |= {name: self.deltas[name] for name in names}

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def unmerge(self, data: st.DataObject) -> None:
        names = self.some(data, self.merged)
        if data.draw(st.booleans()):
            unmerge(self.model)
            self.merged.clear()
            return
        error = KeyError if {*names} - self.deltas.keys() else RuntimeError if {*names} - self.merged.keys() else None
        if self.attempt("unmerge", lambda: unmerge(self.model, names), error):
            for name in names:
                del self.merged[name]

    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        """Changes an adapter's values; merged weights keep the old values."""
        name = data.draw(st.sampled_from([*(self.merged or self.deltas)]))
        with torch.no_grad():
            for _, layer in lora_modules(self.model):
                for parameter in layer.adapters[name].parameters() if name in layer.adapters else ():
                    parameter.normal_()
        self.deltas[name] = self.read(name)

    @rule(data=st.data(), new=NEW)
    def rename(self, data: st.DataObject, new: str) -> None:
        old = self.one(data)
        error = None if old in self.deltas else KeyError
        if old != new and error is None:
            error = ValueError if new in self.deltas else RuntimeError if old in self.merged else None
        if self.attempt("rename", lambda: rename_adapter(self.model, old, new), error):
            for held in (self.deltas, self.configs):
                entries = {new if name == old else name: value for name, value in held.items()}
                held.clear()
                held.update(entries)
            self.active = tuple(new if name == old else name for name in self.active)
            self.trainable = {new if name == old else name for name in self.trainable}

    @precondition(lambda self: len(self.deltas) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.one(data)
        error = RuntimeError if name in self.active or name in self.merged else None
        error = error if name in self.deltas else KeyError
        if self.attempt("delete", lambda: delete_adapter(self.model, name), error):
            del self.deltas[name], self.configs[name]
            self.trainable.discard(name)

    @rule(target=files, data=st.data())
    def save(self, data: st.DataObject) -> Saved:
        name = self.one(data)
        directory = Path(tempfile.mkdtemp(dir=self.directory.name), "adapter")
        error = None if name in self.deltas else KeyError
        if self.attempt("save", lambda: save_adapter(self.model, directory, name), error):
            return Saved(directory, self.configs[name], self.deltas[name])
        return multiple()

    @rule(name=NEW, file=files)
    def load(self, name: str, file: Saved) -> None:
        error = ValueError if self.configs.get(name, file.config) is not file.config else None
        error = RuntimeError if self.merged else error
        replaces = name in self.deltas
        if self.attempt("load", lambda: load_adapter(self.model, file.directory, adapter_name=name), error):
            if replaces:
                self.deltas[name] = self.read(name)
            else:
                self.took(name, file.config)
            torch.testing.assert_close(self.deltas[name], file.deltas)

    @rule(data=st.data(), file=files)
    def swap(self, data: st.DataObject, file: Saved) -> None:
        name = self.one(data)
        if self.configs.get(name, file.config) is not file.config:
            return  # other layers or ranks: tests/adapters/test_hotswap.py
        error = RuntimeError if name in self.merged else None if name in self.deltas else KeyError
        if self.attempt("hotswap", lambda: hotswap_adapter(self.model, file.directory, name), error):
            self.deltas[name] = self.read(name)
            torch.testing.assert_close(self.deltas[name], file.deltas)

    @precondition(lambda self: len(self.deltas) > 1 and not self.merged)
    @rule(data=st.data(), weight=st.sampled_from([0.5, -1.0, 2.0]), name=NEW)
    def combine(self, data: st.DataObject, weight: float, name: str) -> None:
        first, second = self.one(data), data.draw(st.sampled_from([*self.deltas]))
        if first == second:
            return
        error = KeyError if {first, second} - self.deltas.keys() else None
        error = error or (ValueError if name in self.deltas else None)

        def change() -> None:
            add_weighted_adapter(self.model, [first, second], [weight, 1.0], name, "cat")

        if self.attempt("combine", change, error):
            expected = {path: weight * delta for path, delta in self.deltas[first].items()}
            for path, delta in self.deltas[second].items():
                expected[path] = expected.get(path, 0) + delta
            self.took(name, {"combined": name})
            torch.testing.assert_close(self.deltas[name], expected, rtol=1e-4, atol=1e-4)

    @rule(
        copied=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), None]), data=st.data()
    )
    def go_on_with_a_copy(self, data: st.DataObject, copied: Callable[[nn.Module], nn.Module] | None) -> None:
        """Or looks at the model without adapters, and with some of them for good."""
        if copied:
            self.model = copied(self.model)
            return

        def disable() -> None:
            with disable_adapters(self.model):
                self.assert_computes(self.model, [])

        error = RuntimeError if self.merged else None
        self.attempt("disable", disable, error)
        if self.attempt("unload", lambda: unload(copy.deepcopy(self.model)), error):
            self.assert_pristine(unload(copy.deepcopy(self.model)))
        names = data.draw(st.sampled_from([None, *([name] for name in self.deltas)]))
        plain = merge_and_unload(copy.deepcopy(self.model), names)
        assert [type(module) for module in plain.modules()] == [type(module) for module in self.bare.modules()]
        self.assert_computes(plain, names or self.active)


@pytest.fixture
def one_thread():
    """Uses one thread: for such small layers, synchronising threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_any_order_of_operations(request):
    Life.done.clear()
    lives = settings(
        max_examples=request.config.getoption("--lives"),
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Life, settings=lives)
    done = {"inject", "set_adapter", "merge", "unmerge", "rename", "delete", "save", "load", "hotswap", "combine"}
    missing = (done | {f"{operation} refused" for operation in done}) - Life.done.keys()
    print(sum(Life.done.values()), "operations", dict(Life.done))
    assert not missing, Life.done
