"""Compares bottleneck adapters with AdapterHub's ``adapters``: parameter counts, hidden states and gradients.

``adapters`` is pinned to one release of transformers, so the two cannot share an environment:

    python scripts/adapterhub_conformance.py export DIR   # in an environment with `adapters`
    python scripts/adapterhub_conformance.py check DIR    # in an environment with lora_ext

``make adapterhub-conformance`` makes the first environment and runs both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
BERT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 40, "pad_token_id": 1}
CONFIGS = {
    "bert": BERT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": BERT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"vocab_size": 40, "n_positions": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 24}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": BERT | {"num_key_value_heads": 1},
}
BOTTLENECK = 4
# our method -> AdapterHub's config, its options, and its names of the places within a layer, in our order
METHODS = {
    "adapter-h": ("double_seq_bn", {}, ("mh_adapter", "output_adapter")),
    "adapter-p": ("seq_bn", {}, ("output_adapter",)),
    "adapter-drop": ("seq_bn", {"leave_out": [0]}, ("output_adapter",)),
}


def base_model(family: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(family, **CONFIGS[family]), attn_implementation="eager")
    return model.double().eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def loss_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    given = inputs()
    hidden = model(**given).last_hidden_state * given["attention_mask"][..., None]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    return hidden, (hidden * weights).sum()


def save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def export(directory: Path) -> None:
    """Runs AdapterHub: writes the base model, the adapters, the hidden states and the adapters' gradients."""
    import adapters
    from adapters import AdapterConfig

    directory.mkdir(parents=True, exist_ok=True)
    for family in CONFIGS:
        for method, (name, options, places) in METHODS.items():
            torch.manual_seed(0)
            model = base_model(family)
            save(model.state_dict(), directory / f"{family}.safetensors")
            adapters.init(model)
            config = AdapterConfig.load(name, reduction_factor=16 / BOTTLENECK, **options)
            model.add_adapter("a", config=config)
            model.train_adapter("a")
            model.double().eval()
            trained = {path: parameter for path, parameter in model.named_parameters() if ".adapters.a." in path}
            for parameter in trained.values():  # as if trained: nothing is zero
                nn.init.normal_(parameter, std=0.3)
            hidden, loss = loss_of(model)
            loss.backward()
            tensors = {"hidden": hidden.detach()}
            for path, parameter in trained.items():
                layer = next(int(part) for part in path.split(".") if part.isdecimal())
                place = places.index("mh_adapter" if ".attention" in path else "output_adapter")
                kind = "down" if "adapter_down" in path else "up"
                key = f"{layer}.{place}.{kind}.{path.rpartition('.')[2]}"
                tensors |= {key: parameter.detach(), f"grad.{key}": parameter.grad}
            save(tensors, directory / f"{family}.{method}.safetensors")
    (directory / "versions.json").write_text(json.dumps({"adapters": adapters.__version__}))


def check(directory: Path) -> int:
    """Computes the same with lora_ext; returns the number of differences."""
    from lora_ext.methods import apply_method, new_method
    from lora_ext.methods.bottleneck import Bottleneck

    failures = 0
    for family in CONFIGS:
        for method in METHODS:
            theirs = load_file(directory / f"{family}.{method}.safetensors")
            model = base_model(family)
            model.load_state_dict(load_file(directory / f"{family}.safetensors"))
            options = {"drop_layers": 1} if method == "adapter-drop" else {}
            adapted = new_method(method, bottleneck_size=BOTTLENECK, **options)
            count = adapted.count(model)
            apply_method(model, adapted).eval()
            keys = [key for key in theirs if key != "hidden" and not key.startswith("grad.")]
            found = [module for module in model.modules() if isinstance(module, Bottleneck)]
            per_layer = len(METHODS[method][2])
            first = 1 if method == "adapter-drop" else 0
            parameters = {
                f"{first + index // per_layer}.{index % per_layer}.{name}": parameter
                for index, bottleneck in enumerate(found)
                for name, parameter in bottleneck.named_parameters()
            }
            problems = []
            if sorted(parameters) != sorted(keys):
                problems.append(f"adapters at {sorted(parameters)}, theirs at {sorted(keys)}")
            elif count != sum(theirs[key].numel() for key in keys):
                problems.append(f"count {count}, theirs {sum(theirs[key].numel() for key in keys)}")
            else:
                with torch.no_grad():
                    for key, parameter in parameters.items():
                        parameter.copy_(theirs[key])
                hidden, loss = loss_of(model)
                loss.backward()
                pairs = {"hidden": (hidden.detach(), theirs["hidden"])}
                pairs |= {key: (parameter.grad, theirs[f"grad.{key}"]) for key, parameter in parameters.items()}
                for key, (ours, other) in pairs.items():
                    error = (ours - other).abs().max().item()
                    if not error <= 1e-12 * max(other.abs().max().item(), 1.0):
                        problems.append(f"{key} differs by {error:.1e}")
            failures += len(problems)
            print(f"{family:8} {method:13} {count:6,} parameters  {'; '.join(problems) or 'equal'}")
    print(f"adapters {json.loads((directory / 'versions.json').read_text())['adapters']}, torch {torch.__version__}")
    return failures


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("export", "check"):
        sys.exit(__doc__)
    sys.exit(min(check(Path(sys.argv[2])), 1) if sys.argv[1] == "check" else export(Path(sys.argv[2])))
