"""Translates a plan into options of finetune, and warns where LoRA may fall behind full fine-tuning.

The warnings follow "LoRA Without Regret" (J. Schulman and Thinking Machines Lab 2025, doi 10.64434/tml.20250929).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import NamedTuple

from lora_ext.planner import WEIGHT_DTYPES, Setup
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.causal_lm.settings import option_list as causal_options
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.settings import DTYPES, Settings, option_list

MOST_TEXTS_PER_STEP = 32
"""Texts in a step beyond which LoRA lags behind full fine-tuning, in the reading of TRL's guide to that article."""

_OPTIMIZERS = {
    "adamw": "",
    "adamw8bit": "optim=adamw_bnb_8bit",
    "adafactor": "optim=adafactor",
    "sgd": "optim=sgd",
}
_SHOWN = ("batch_size", "accumulation_steps", "max_length", "dtype", "gradient_checkpointing")


def finetune_options(
    settings: Settings, setup: Setup, texts_per_step: int, is_classifier: bool = True
) -> list[str] | None:
    """Returns the options of finetune that train with ``setup``; None if finetune cannot.

    Options that set the memory are always among them, others if they differ from their defaults.

    Args:
        settings: with the model, unless it is the demo's.
        texts_per_step: texts of an optimizer step, which smaller batches are accumulated to.
        is_classifier: False: a language model's, which not all methods are for.
    """
    if setup.optimizer not in _OPTIMIZERS:
        return None
    quantized = WEIGHT_DTYPES[setup.dtype].linear_bytes is not None
    dtype = WEIGHT_DTYPES[setup.dtype].compute_name
    if dtype not in DTYPES:
        return None
    kind = settings.gradient_checkpointing if settings.gradient_checkpointing != "no" else "non-reentrant"
    changed = {
        "batch_size": setup.batch_size,
        "accumulation_steps": -(-texts_per_step // setup.batch_size),
        "max_length": setup.seq_len,
        "dtype": dtype,
        "gradient_checkpointing": kind if setup.gradient_checkpointing else "no",
        "quantize": setup.dtype if quantized else None,
        "set": extra_arguments.merged(settings.set, *extra_arguments.items(_OPTIMIZERS[setup.optimizer])),
    }
    try:
        if is_classifier:
            options = asdict(Settings(**{**asdict(settings), **changed}))
        else:  # the rest has other defaults
            options = asdict(CausalSettings(**{**settings.given(), **changed, "method": settings.method}))
    except TaskError:
        return None
    shown = [part for name in _SHOWN for part in (f"--{name.replace('_', '-')}", str(changed[name]))]
    others = {name: value for name, value in options.items() if name not in _SHOWN}
    return [*shown, *(option_list if is_classifier else causal_options)(others)]


class Adapter(NamedTuple):
    """Holds the sizes of an adapter that :func:`warnings` compares with the data.

    Attributes:
        parameters: their number.
        full_rank: the smaller side of the layer where that is largest: no update has a higher rank.
    """

    parameters: int
    full_rank: int


def warnings(
    settings: Settings,
    texts_per_step: int,
    adapter: Adapter,
    seq_len: int,
    texts: int | None,
    num_labels: int | None,
) -> list[str]:
    """Returns warnings for a run with LoRA; none for other methods.

    A text of a language model carries about one bit for each token that is learned, a label at most ``log2`` of their
    number. Tinker's documentation wants as many parameters in the adapter as tokens that are learned.

    Args:
        texts: number of training texts; None: not known.
        num_labels: a classifier's number of labels; None: a language model.
    """
    if "lora" not in settings.method.split("+"):
        return []
    found = []
    if texts_per_step > MOST_TEXTS_PER_STEP:
        found.append(
            f"a step has {texts_per_step:,} texts: with large batches LoRA falls behind full fine-tuning, at any rank; "
            f"{MOST_TEXTS_PER_STEP} or fewer are advised"
        )
    if texts is None:
        return found
    bits = texts * (seq_len if num_labels is None else math.log2(max(num_labels, 2)))
    if adapter.parameters < bits:
        what = f"{texts * seq_len:,} tokens" if num_labels is None else f"{texts:,} labels ({bits:,.0f} bits)"
        rank = math.ceil(settings.r * bits / adapter.parameters)
        if rank <= adapter.full_rank:
            remedy = f"as many parameters need --r {rank}"
        else:
            remedy = (
                f"no rank up to the largest layer's, {adapter.full_rank}, has as many parameters: try --method full"
            )
        all_linear = "all-linear" in settings.target_modules.split(",")
        found.append(
            f"the adapter has {adapter.parameters:,} parameters for {what}: where the data hold more than the "
            f"adapter, LoRA learns less than full fine-tuning; {remedy}"
            + ("" if all_linear else ", or a smaller rank with --target-modules all-linear")
        )
    return found
