"""Keys and values of PEFT's ``adapter_config.json`` that :class:`LoraConfig` has no field for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_ext._common.printable import escaped, shown

# PEFT keys that never change what an adapter computes here: notes, PEFT's runtime settings, and details of an
# initialisation or variant that another key enables. Any other key without a field must be off.
_INFORMATIONAL = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# Names for remarks and bookkeeping of people and tools. None is an option of PEFT 0.21.
_REMARKS = re.compile(
    r"_.*"
    r"|(.*_)?(note|comment|description|author|license|tag|date|timestamp|commit|commit_hash|url|uuid|uid)s?"
    r"|(created|updated|saved|trained)_(at|by|on|with)"
    r"|(accelerate|axolotl|datasets|diffusers|library|python|safetensors|torch|transformers|trl|unsloth)_version"
)
# Options of PEFT 0.21 that this package does not have.
_PEFT_ONLY = frozenset(
    {
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "monteclora_config",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
)
_CHANGES_THE_BASE = re.compile("pissa(_niter_[0-9]+)?|olora|corda|lora_ga|loftq")


def check_other_keys(values: Mapping[str, Any]) -> None:
    """Checks the keys of a config that have no field. ValueError: a key asks for an unsupported feature."""
    # Not `if value`: 0 is falsy too, but a valid layer index.
    unsupported = {
        key: value
        for key, value in values.items()
        if not (key in _INFORMATIONAL or _REMARKS.fullmatch(key) or value is None or value is False)
        and value not in ([], {}, "")
    }
    if unsupported:
        settings = ", ".join(f"{escaped(key)}={shown(value)}" for key, value in unsupported.items())
        settings = settings if len(settings) <= 2000 else f"{settings[:2000]}... ({len(unsupported)} keys)"
        raise ValueError(
            f"LoraConfig: {settings} not supported; it would change what the adapter computes. "
            + (
                "Use PEFT for it, with lora_ext.integrations.peft.accelerate; an adapter that PEFT has merged "
                "(merge_and_unload), or converted to plain LoRA (peft.save_as_lora), can be used here"
                if unsupported.keys() <= _PEFT_ONLY
                else "If it is only a remark, remove it from the config"
            )
        )


def initialisation(value: Any) -> Any:
    """Returns PEFT's ``init_lora_weights`` as :class:`LoraConfig` spells it: PEFT ignores case, and None is False."""
    return False if value is None else value.lower() if isinstance(value, str) else value


def initialisation_of_file(value: Any) -> Any:
    """Returns the ``init_lora_weights`` for a file whose config has ``value``.

    Raises:
        ValueError: the initialisation has changed the base weights.
    """
    value = initialisation(value)
    if value in ("eva", "mica"):  # one factor from data or from the weight, the other zero: the base weights stay
        return True
    if isinstance(value, str) and _CHANGES_THE_BASE.fullmatch(value):
        raise ValueError(
            f"LoraConfig: init_lora_weights is {value!r}, which has changed the base weights: the adapter fits only "
            "the changed ones. Save it with PEFT as a plain adapter (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), where the method has it); or, if the base model is the "
            'changed one, set "init_lora_weights": true in the config'
        )
    return value
