"""Loads a decoder from a directory, a hub id or a GGUF file, and tests that it is one."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
    modeling_gguf_pytorch_utils,
)

from lora_ext._common.install_hint import install_hint
from lora_ext._common.printable import first_of
from lora_ext._common.progress import is_terminal
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.quantize import Quantization, inputs_not_quantised, tame_bitsandbytes
from lora_ext.tasks.finetune.task_model import most_tokens
from lora_ext.tasks.shared.hub import check_no_adapter, loading_options, why_not_loaded

_MAGIC = b"GGUF"
_FEW = 8  # tokens of a text for a test of the model


class Decoder(NamedTuple):
    path: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    @property
    def most_tokens(self) -> int | None:
        """Maximum number of tokens in a text; None if neither the config nor the tokenizer says."""
        limits = [most_tokens(self.model), self.tokenizer.model_max_length]
        return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)


def load_decoder(path: str, dtype: torch.dtype = torch.float32, quantization: Quantization | None = None) -> Decoder:
    """Loads a causal language model and its tokenizer in ``dtype``.

    Args:
        path: a directory in Transformers' format, a hub id, or a ``.gguf`` file, which Transformers dequantises.
        quantization: quantises the weights as they are loaded; not with a ``.gguf`` file.

    Raises:
        TaskError: it cannot be loaded, weights are missing, or the model is not a causal language model.
    """
    logging.set_verbosity_error()
    if not is_terminal():
        logging.disable_progress_bar()
    is_gguf = path.lower().endswith(".gguf")
    if is_gguf:
        if quantization is not None:
            raise TaskError(
                f"--quantize {quantization.name} goes with a directory or an id, and --model {path} is a GGUF file, "
                "which Transformers dequantises; save it as a directory first (docs/language-models.md, Model)"
            )
        name, options = _gguf_options(path)
    else:
        check_no_adapter(path)
        name, options = path, loading_options(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        how = {} if quantization is None else quantization.options(path, AutoModelForCausalLM, options)
        if is_gguf and hasattr(transformers, "GgufConfig"):
            # Otherwise Transformers takes the model for a quantised one, which it neither trains nor saves; next to
            # the package kernels, it keeps some architectures' weights in the file's blocks.
            how = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        with _quiet_conversion():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, **options, **how
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error) if is_gguf else why_not_loaded(path, error)
        raise TaskError(f"--model {path} cannot be loaded: {reason}") from error
    except Exception as error:
        if not is_gguf:  # the reader raises what numpy and struct raise on a damaged file
            raise
        raise TaskError(f"--model {path} is damaged: {type(error).__name__}: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise TaskError(
            f"--model {path}: the checkpoint has no values for {first_of(missing, 1)}, which would stay random; it is "
            "not a checkpoint of a whole language model"
        )
    tame_bitsandbytes(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise TaskError(f"--model {path}: its tokenizer has neither a pad_token nor an eos_token")
    check_causal(model, path)
    return Decoder(path, tokenizer, model)


@contextmanager
def _quiet_conversion() -> Iterator[None]:
    """Shows Transformers' bar of a conversion on a terminal only; no option of Transformers does."""
    bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=not is_terminal())
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def _gguf_options(path: str) -> tuple[str, dict[str, Any]]:
    if importlib.util.find_spec("gguf") is None:
        raise TaskError(f"--model {path}: GGUF files need the package gguf: {install_hint('gguf')}")
    file = Path(path)
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise TaskError(f"--model {path} cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise TaskError(f"--model {path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    return str(file.parent), {"gguf_file": file.name}


@torch.no_grad()
def check_causal(model: PreTrainedModel, path: str) -> None:
    """Raises TaskError if a token changes the outputs of tokens before it, as in an encoder."""
    ids = _some_tokens(model)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % _vocabulary(model)
    with inputs_not_quantised(model):
        logits, others = (model.eval()(input_ids=tokens, use_cache=False).logits[0, :-1] for tokens in (ids, changed))
    if not _close(logits, others):
        raise TaskError(
            f"--model {path}: {type(model).__name__} reads the tokens after a token, too, so it is not a causal "
            "language model; name a decoder"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises TaskError if a text's outputs differ between a pack and a batch of its own."""
    ids = _some_tokens(model)
    second = (ids + 3) % _vocabulary(model)
    packed = torch.cat([ids, second], dim=1)
    positions = torch.arange(_FEW).repeat(2)[None].to(ids.device)
    with inputs_not_quantised(model):
        logits = model.eval()(input_ids=packed, position_ids=positions, use_cache=False).logits[0, _FEW:]
        alone = model(input_ids=second, use_cache=False).logits[0]
    if not _close(logits, alone):
        raise TaskError(
            f"--packing: in {type(model).__name__} (model type {model.config.model_type!r}) a text sees the texts that "
            "are packed before it; leave out --packing"
        )


def _some_tokens(model: PreTrainedModel) -> torch.Tensor:
    return ((torch.arange(_FEW) * 7 + 11) % _vocabulary(model))[None].to(model.device)


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Returns whether two outputs differ by rounding only; another text changes them by far more."""
    tolerance = 1e-4 if first.dtype == torch.float32 else 0.05
    return bool((first - second).abs().max() <= tolerance * second.abs().max())
