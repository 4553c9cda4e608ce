"""Trainers of Transformers and TRL: the same losses as with PEFT, resumed runs, the best model, references, refusals.

A run is a row of RUNS, a way to adapt the model one of support/ways.py.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support import versions
from support.stock_trainer import Spoil, assert_same, trained
from support.trainers import STEPS, TARGETS, dpo, grpo, logged, of_trl, plain, sft, tiny_chat, tokens
from support.ways import PEFT, WAYS, Way, adapted, save_random_adapter
from torch import nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import unload

# TRL and torchao, which it imports, warn a lot. TRL puts models on the GPU by itself.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]

Start = tuple[nn.Module, Path]
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
PACKED = {"packing": True, "max_length": 32, "assistant_only_loss": True}
OF_PEFT = (dpo, grpo)  # trainers that take no injected model
RUNS: dict[str, tuple[Callable[..., transformers.Trainer], dict[str, Any]]] = {
    "Trainer": (plain, {}),
    "Trainer, compiled": (plain, COMPILED),
    "Trainer, checkpointing": (plain, CHECKPOINTING),
    "Trainer, reentrant checkpointing": (plain, REENTRANT),
    "SFT": (sft, {}),
    "SFT, packed": (sft, PACKED),
    "SFT, aLoRA": (sft, {}),
    "DPO": (dpo, {}),
    "GRPO": (grpo, {}),
}
# The rewards, the lengths and the divergence are the same only if the sampled tokens are.
KEYS = ("loss", "reward", "completions/mean_length", "kl", "rewards/margins")
CASES = [
    (name, way)
    for name, (make, _) in RUNS.items()
    for way in WAYS
    if way != "inject" or (make not in OF_PEFT and "aLoRA" not in name)
]


@functools.cache
def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_chat.model()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[..., Start]:
    """Makes a base model and the directory of an adapter for it, of PEFT's ``options``."""

    @functools.cache
    def of(**options) -> Start:
        directory = tmp_path_factory.mktemp("adapter")
        invoked = options.pop("invoked", False)
        if invoked:
            options |= {"alora_invocation_tokens": [tiny_chat.WORDS.index("<assistant>")], "task_type": "CAUSAL_LM"}
        return base(), save_random_adapter(base(), directory, target_modules=TARGETS, r=4, **options)

    return of


def run(name: str, way: Way, start: Callable[..., Start], directory: Path) -> list[float]:
    make, options = RUNS[name]
    torch._dynamo.reset()
    torch.manual_seed(7)
    trainer = make(adapted(way, *start(invoked="aLoRA" in name)), directory, **options)
    trainer.train()
    return logged(trainer, *KEYS)


@pytest.fixture(scope="module")
def with_peft(start, tmp_path_factory) -> Callable[[str], list[float]]:
    """Returns the losses of PEFT's model for a run; compiled and checkpointed they are the same. Each is done once."""
    once = functools.cache(lambda name: run(name, PEFT, start, tmp_path_factory.mktemp("peft")))
    return lambda name: once("Trainer" if name.startswith("Trainer") else name)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_same_as_with_peft(name, way, start, with_peft, tmp_path):
    expected, found = with_peft(name), run(name, WAYS[way], start, tmp_path)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len(found) >= STEPS and len(set(found)) > 2  # it trains


def test_autocast_to_bfloat16_costs_no_more_than_with_peft(start, tmp_path):
    options = {"max_steps": 8, "learning_rate": 2e-3}
    losses = []
    for library, more in ((PEFT, {}), (PEFT, {"bf16": True}), *((way, {"bf16": True}) for way in WAYS.values())):
        trainer = plain(adapted(library, *start()), tmp_path, **options, **more)
        trainer.train()
        losses.append(torch.tensor(logged(trainer, "loss")))
    exact, theirs, *of_ways = losses
    for ours in of_ways:
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    assert exact[0] - exact[-1] > 0.1


def loop(way: Way, start: Start) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer before may have set the precision
    model, accelerator = adapted(way, *start), Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    loader = torch.utils.data.DataLoader(torch.tensor(tokens()), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(2):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", WAYS)
def test_a_bare_loop_with_accelerate(way, start):
    expected = loop(PEFT, start())
    assert loop(WAYS[way], start()) == pytest.approx(expected, rel=1e-4)
    assert expected[0] - expected[-1] > 0.1


# --- checkpoints ------------------------------------------------------------------------------------------------------

# tests/files/test_trainer_checkpoints.py has the stock Trainer of injected models.
RESUMED = [pytest.param("SFT", way, marks=pytest.mark.slow) for way in WAYS] + [("DPO", "accelerate")]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(("name", "way"), RESUMED)
def test_a_resumed_run_ends_like_an_uninterrupted_one(name, way, start, tmp_path):
    if (name, way) == ("DPO", "accelerate") and versions.before("transformers", "5.23"):
        pytest.skip("Trainer resumes a PeftModel of two adapters without that in the checkpoint's own directory")
    models = [adapted(WAYS[way], *start(lora_dropout=0.1)) for _ in range(2)]
    whole, resumed = (RUNS[name][0](model, tmp_path, **EVERY_STEP) for model in models)
    whole.train()
    before = trained(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(trained(resumed.model), trained(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert any(not torch.equal(value, before[name]) for name, value in trained(resumed.model).items())


@pytest.mark.parametrize(("name", "way"), RESUMED)
def test_the_best_adapter_is_loaded_at_the_end(name, way, start, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **EVERY_STEP}
    trainer = RUNS[name][0](adapted(WAYS[way], *start(lora_dropout=0.1)), tmp_path, **options)
    trainer.add_callback(Spoil())
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in ("checkpoint-1", "checkpoint-2")
    trainer.model.save_pretrained(tmp_path / "end")
    assert_same(*(load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "end", best)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(logged(trainer, "eval_loss")), rel=1e-6)
    assert trained(trainer.model)  # it may be trained further


# --- references and refusals of TRL -----------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path) -> nn.Module:
    """The base model as TRL would load it again."""
    base().save_pretrained(tmp_path / "base")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "key", "first"),
    [
        ("DPO", "loss", math.log(2)),
        ("KTO", "rewards/chosen", 0.0),
        ("GRPO", "kl", 0.0),
        pytest.param("RLOO", "kl", 0.0, marks=pytest.mark.slow),  # which is like GRPO
    ],
)
def test_the_reference_is_the_model_as_it_was(kind, key, first, start, tmp_path):
    """Its adapter is not zero: the base model as the reference would show."""
    model = adapted(WAYS["accelerate"], *start())
    trainer = of_trl(kind, model, tmp_path, max_steps=1)
    assert trainer.ref_model is None and "ref" in model.peft_config
    trainer.train()
    assert logged(trainer, key)[0] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_methods_with_a_reference_name_the_other_door(kind, on_disk, tmp_path):
    """TRL would compare with the checkpoint, without the adapters, and load it next to the model."""
    model = inject(on_disk, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    with pytest.raises(RuntimeError, match=rf"trainer \(trl, {kind.lower()}\).*lora_ext.integrations.peft.accelerate"):
        of_trl(kind, model, tmp_path)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=len)
def test_a_peft_config_is_refused_before_anything_changes(targets, tmp_path):
    """PEFT would train its own adapter on the base layers of ours, in a file that loads nowhere."""
    model = inject(tiny_chat.model(), LoraConfig(r=2, target_modules=TARGETS))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"without peft_config; or .* lora_ext.integrations.peft.accelerate"):
        sft(model, tmp_path, peft_config=peft.LoraConfig(target_modules=targets))
    assert set(model.state_dict()) == before


def test_an_adapted_head_is_refused_because_trl_reads_its_weight(on_disk, tmp_path):
    model = inject(on_disk, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(RuntimeError, match=r"the output head has an adapter.*modules_to_save"):
        sft(model, tmp_path)


def test_the_guard_goes_with_the_last_adapter_and_survives_copies():
    model = inject(tiny_chat.model(), LoraConfig(r=2, target_modules=TARGETS))
    model.add_model_tags(["mine"])
    twin = copy.deepcopy(model)
    assert vars(twin)["add_model_tags"].module is twin
    assert pickle.loads(pickle.dumps(model)).model_tags == ["mine"]
    assert "add_model_tags" not in vars(unload(model))
