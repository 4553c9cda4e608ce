"""save_adapter and load_adapter: exchange of files with PEFT, effects, bad files."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import tensors_of
from support.models import ALIVE, Net, adapter_of_net, llama, logits, refused, shaken, token_ids
from torch.optim.swa_utils import AveragedModel

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import lora_modules

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_tied_modules_to_save_round_trip_and_stay_tied(tmp_path):
    base, ids = llama(tied=True).double().eval(), token_ids()
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    ours = shaken(inject(copy.deepcopy(base), LoraConfig(**settings, **ALIVE)))
    save_adapter(ours, tmp_path)
    for read in (load_adapter, peft.PeftModel.from_pretrained):
        torch.testing.assert_close(logits(read(copy.deepcopy(base), tmp_path), ids), logits(ours, ids))
    head = "base_model.model.lm_head.weight"  # PEFT unties them
    save_file(tensors_of(tmp_path) | {head: tensors_of(tmp_path)[head] + 1}, tmp_path / WEIGHTS)
    text = "tied to base_model.model.model.embed_tokens.weight in the model, but they differ in the file"
    with refused(base, ValueError, text):
        load_adapter(base, tmp_path)


# --- effects of loading and saving ------------------------------------------------------------------------------------


def test_requires_grad_after_loading(tmp_path):
    adapter_of_net(tmp_path)
    assert not any(p.requires_grad for p in load_adapter(Net(), tmp_path).parameters())
    model = load_adapter(Net(), tmp_path, trainable=True)
    assert {path.split(".")[-2] for path, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.head.bias.requires_grad_(False)
    before = {path: p.requires_grad for path, p in model.named_parameters()}
    load_adapter(model, tmp_path)  # injected already: flags stay
    assert {path: p.requires_grad for path, p in model.named_parameters()} == before


def test_loading_into_an_injected_model_replaces_values_in_place(tmp_path):
    config = LoraConfig(target_modules=["up"], modules_to_save=["head"], lora_dropout=0.1, **ALIVE)
    source, model = inject(Net().eval(), config), inject(Net().eval(), config)
    save_adapter(source, tmp_path)
    identities, state = [id(p) for p in model.parameters()], source.state_dict()
    assert load_adapter(model, str(tmp_path)) is model
    assert [id(p) for p in model.parameters()] == identities
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) > 4 and all(torch.equal(model.state_dict()[name], state[name]) for name in trained)
    half = load_adapter(Net().half(), tmp_path)  # values are cast to the adapter, which is in float32
    assert {p.dtype for path, p in half.named_parameters() if "lora_" in path} == {torch.float32}
    assert half.head.weight.dtype == torch.float16


def test_what_a_config_says_round_trips(tmp_path):
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"], revision="v2"))
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(Net(), tmp_path / "theirs"), tmp_path / "ours")
    read = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours")]
    assert read[0] == read[1]
    assert read[0]["revision"] == "v2" and read[0]["inference_mode"] is True

    # The first of two patterns counts, so they keep their order; "all-linear" is saved as the matched layers.
    settings = {"rank_pattern": {"blocks.1.up": 3, "blocks..*": 4}, "alpha_pattern": {"up": 5, "blocks.0.up": 6}}
    model = inject(Net(), LoraConfig(target_modules="all-linear", **settings))
    save_adapter(model, tmp_path / "patterns")
    again = load_adapter(Net(), tmp_path / "patterns")
    for (path, ours), (other, layer) in zip(lora_modules(model), lora_modules(again), strict=True):
        assert (path, ours.adapters.default.r) == (other, layer.adapters.default.r)
        assert ours.adapters.default.scaling == layer.adapters.default.scaling
    saved = json.loads((tmp_path / "patterns" / CONFIG).read_text())["target_modules"]
    assert saved == [path for path, _ in lora_modules(model)]


def test_a_wrapper_that_computes_something_else_is_refused(tmp_path):
    average = AveragedModel(inject(Net(), LoraConfig(target_modules=["up"], modules_to_save=["head"])))
    with pytest.raises(ValueError, match="AveragedModel is not injected; .*pass the part"):
        save_adapter(average, tmp_path)
    save_adapter(average.module, tmp_path)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_an_unfrozen_model_is_noticed_through_wrappers(wrap, tmp_path):
    model = inject(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.requires_grad_(True)
    words = r"save_adapter: 'model\.embed_tokens.*belongs to no adapter.*save_embedding_layers=True"
    with pytest.warns(UserWarning, match=words) as caught:
        save_adapter(wrap(model), tmp_path)
    assert [w.filename for w in caught if re.match(words, str(w.message))] == [__file__]  # the user's line


def test_what_the_file_holds_is_not_named(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"], bias="all")
    two = inject(inject(llama(), config), LoraConfig(r=2, target_modules=["v_proj"]), "other")
    model = inject(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_input_embeddings().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(two, tmp_path / "a", "default")
        save_adapter(two, tmp_path / "b", "other")
        save_adapter(model, tmp_path / "d", save_embedding_layers=True)
        again = load_adapter(llama(), tmp_path / "d", trainable=True)
        again.get_input_embeddings().requires_grad_(True)  # came with the adapter, and is saved with it
        save_adapter(again, tmp_path / "e")
        again.save_pretrained(tmp_path / "f")


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bare", "injected"])
def model(request) -> Net:
    net = Net()
    if request.param == "injected":
        inject(net, LoraConfig(target_modules=["up"], modules_to_save=["head"], **ALIVE))
    return net


def test_every_mismatch_is_listed(model, tmp_path):
    adapter_of_net(tmp_path)
    tensors = tensors_of(tmp_path)
    key = "base_model.model.blocks.{}.up.lora_{}.weight".format
    tensors |= {key(0, "A"): torch.zeros(2, 7), key(1, "B"): torch.zeros(3, 2), key(2, "A"): torch.zeros(2, 6)}
    tensors["base_model.model.head.bias"] = torch.zeros(3, dtype=torch.int64)
    del tensors[key(1, "A")]
    save_file(tensors, tmp_path / WEIGHTS)
    with refused(
        model,
        ValueError,
        f"{WEIGHTS} does not fit the model",
        f"missing key: {key(1, 'A')}",
        f"unexpected key: {key(2, 'A')}",
        "blocks.0.up.lora_A.weight: [2, 7] in the file, [2, 6] in the model (and 1 other shapes)",
        "dtype of base_model.model.head.bias: torch.int64 in the file, torch.float32 in the model",
    ):
        load_adapter(model, tmp_path)


def test_missing_files(model, tmp_path):
    with refused(model, FileNotFoundError, f"load_adapter: {tmp_path}/none/{CONFIG} is missing"):
        load_adapter(model, tmp_path / "none")
    adapter_of_net(tmp_path / "run" / "adapter")
    with refused(model, FileNotFoundError, f"PEFT wrote, such as '{tmp_path}/run/adapter'"):
        load_adapter(model, tmp_path / "run")
    weights = adapter_of_net(tmp_path) / WEIGHTS
    for name in ("nothing", "adapter_model.bin", "adapter_model-00001-of-00002.safetensors"):
        weights = weights.rename(tmp_path / name)
        with refused(model, FileNotFoundError, f"{WEIGHTS} is missing; pickles and", "max_shard_size"):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 3}, "has r=3 but the model was injected with r=2"),
        ({"lora_alpha": 5}, "has lora_alpha=5 but the model was injected with lora_alpha=64"),
        ({"use_rslora": True}, "has use_rslora=True but the model was injected with use_rslora=False"),
        ({"target_modules": ["up", "down"]}, "unexpected key: base_model.model.blocks.0.down.lora_A.weight"),
        ({"modules_to_save": None}, "missing key: base_model.model.head.weight"),
    ],
)
def test_an_injected_model_with_another_config(other, message, tmp_path):
    net = inject(Net(), LoraConfig(target_modules=["up"], modules_to_save=["head"], **ALIVE))
    with refused(net, ValueError, message):
        load_adapter(net, adapter_of_net(tmp_path, **other))
