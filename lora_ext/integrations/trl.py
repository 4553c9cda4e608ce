"""Gives an injected model to TRL's trainers: ``DPOTrainer(model=for_trl(model), ...)``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

try:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, PeftType
except ModuleNotFoundError as error:
    from lora_ext._common.install_hint import install_hint

    raise ImportError(f"lora_ext.integrations.trl needs peft ({error}): {install_hint('peft')}") from error

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext._common.arguments import checked
from lora_ext._common.sharded import is_elsewhere, is_fully_sharded
from lora_ext._common.warnings import warn_user
from lora_ext._common.wrapped import KEY_PREFIX, WrapsModel
from lora_ext.adapters import (
    adapter_names,
    add_weighted_adapter,
    delete_adapter,
    disable_adapters,
    lora_modules,
    merge_and_unload,
    unload,
)
from lora_ext.injection.trainers import why_head_unusable
from lora_ext.integrations.trl_status import layer_status, model_status
from lora_ext.model.adapter_set import find_adapters
from lora_ext.model.bare_model import root_module
from lora_ext.model.given_state import with_values

_NAME = "default"  # the adapter that TRL trains


@checked
def for_trl(model: nn.Module) -> PeftModel:
    """Wraps an injected Transformers model for TRL's trainers, which then treat it like a model of PEFT.

    A method that needs a reference model (DPO, KTO, GRPO, RLOO) takes the model itself with a frozen copy of the
    adapter, made when the trainer is made: the reference is the model as it was, and no second model is in memory.
    Checkpoints hold the adapters alone, in PEFT's format. The model itself is trained, and stays usable without the
    wrapper.

    Args:
        model: an injected Transformers model; its active adapter is called ``"default"`` and not merged.

    Raises:
        ValueError: the model is not injected, its active adapter has another name, or its output head has a low-rank
            adapter, whose effect TRL would not see.
        RuntimeError: an adapter is merged.
    """
    if isinstance(model, PeftModel):
        raise ValueError("for_trl: the model is a PeftModel, which TRL takes as it is")
    root = root_module(model)
    active = find_adapters(root, "for_trl").active.names
    if active != (_NAME,):
        raise ValueError(
            f"for_trl: the active adapters are {list(active)}, but TRL trains the one called {_NAME!r}; use "
            f"rename_adapter(model, ..., {_NAME!r}) and set_adapter(model, {_NAME!r})"
        )
    if any(layer.is_merged for _, layer in lora_modules(root)):
        raise RuntimeError("for_trl: an adapter is merged; call unmerge(model) first")
    if (problem := why_head_unusable(root)) is not None:
        raise ValueError(problem.replace("inject:", "for_trl:", 1))
    return InjectedModel(model)


class InjectedModel(WrapsModel, PeftModel):
    """An injected model with the interface of ``peft.PeftModel``; every function of lora_ext takes it, too.

    Calls of PEFT that it cannot serve raise NotImplementedError with the call that can.
    """

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_model = _Tuner(model)
        self.peft_type = PeftType.LORA
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = self._adapters_disabled = False

    @property
    def active_adapter(self) -> str:
        return self.active_adapters[0]

    @property
    def active_adapters(self) -> list[str]:
        return list(find_adapters(self.get_base_model(), "for_trl").active.names)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)

    def add_model_tags(self, tags: list[str] | str) -> None:
        root = root_module(self.get_base_model())
        type(root).add_model_tags(root, tags)  # not the guard of an injected model that TRL gets as it is

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        with disable_adapters(self.get_base_model()):
            yield

    def add_adapter(self, adapter_name: str, peft_config: PeftLoraConfig, **kwargs: Any) -> None:
        """Adds an inactive, frozen adapter; a config of :attr:`peft_config` stands for the config behind it."""
        model, before = self.get_base_model(), self.active_adapters
        held = find_adapters(model, "for_trl").configs
        config = next((held[name] for name, shown in self.peft_config.items() if shown is peft_config), None)
        inject(model, peft_config if config is None else config, adapter_name)
        set_adapter(model, adapter_name, trainable=False)
        set_adapter(model, before)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")  # PEFT's words
        set_adapter(self.get_base_model(), adapter_name, trainable=False if inference_mode else None)

    def delete_adapter(self, adapter_name: str) -> None:
        delete_adapter(self.get_base_model(), adapter_name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves adapters where PEFT does: "default" in the directory, others in subdirectories of their names.

        If adapters are merged, or none is left, it saves the model itself, as the model's ``save_pretrained`` does.
        Adapters named in ``selected_adapters`` are saved as adapters in any case.
        """
        if path_initial_model_for_weight_conversion is not None:
            _refuse("save_pretrained(path_initial_model_for_weight_conversion=...)", "lora_ext has no such adapters")
        model = self.get_base_model()
        if state_dict is not None:
            state_dict = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in state_dict.items()}
        names = adapter_names(model) if selected_adapters is None else selected_adapters
        is_merged = any(layer.is_merged for _, layer in lora_modules(model))
        if selected_adapters is None and (is_merged or not names):
            root_module(model).save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
            return
        if not names:
            raise ValueError(f"for_trl: selected_adapters is empty; the adapters are {adapter_names(model)}")
        elsewhere = any(map(is_fully_sharded, model.modules())) or any(map(is_elsewhere, model.parameters()))
        if state_dict is not None and elsewhere:
            lacking = [name for name in names if not any(f".adapters.{name}." in key for key in state_dict)]
            names = [name for name in names if name not in lacking]
            if lacking and is_main_process:  # Trainer leaves out what is frozen if ZeRO-3 partitions a PeftModel
                warn_user(
                    f"for_trl: save_pretrained: the state_dict lacks the adapters {lacking}, which are not saved; call "
                    "lora_ext.save_adapter(model.get_base_model(), directory, name) on all ranks"
                )
            given = with_values("for_trl: save_pretrained", root_module(model), state_dict)
        else:  # the model has these values
            given = nullcontext()
        with given:
            for name in names if is_main_process else ():
                directory = Path(save_directory) / ("" if name == _NAME else name)
                save_adapter(model, directory, name, save_embedding_layers=save_embedding_layers)

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> None:
        """Loads an adapter, or new values for one, and leaves the active one active."""
        model, before = self.get_base_model(), self.active_adapters
        if _caller_module() == _TRAINER and Path(model_id).name == adapter_name:
            # Before version 5.23, Trainer resumes with the subdirectories of a checkpoint only, if it has any.
            checkpoint = Path(model_id).parent
            if _NAME in adapter_names(model) and (checkpoint / "adapter_config.json").is_file():
                load_adapter(model, checkpoint, _NAME in before, _NAME)
        load_adapter(model, model_id, is_trainable, adapter_name, activate=is_trainable)
        set_adapter(model, before)

    def get_layer_status(self) -> list[Any]:
        return layer_status(self.get_base_model())

    def get_model_status(self) -> Any:
        return model_status(self.get_base_model(), self.base_model)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if _caller_module() == _STATES_OF_PEFT:
            _refuse("get_peft_model_state_dict(model)", "call save_adapter(model, directory) and read its file")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if _caller_module() == _STATES_OF_PEFT:
            _refuse("set_peft_model_state_dict(model, ...)", "call load_adapter(model, directory)")
        return super().load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        if (caller := _caller_module()) in _OPTIMIZERS_OF_PEFT:
            remedy = "let PEFT adapt the model, and call lora_ext.integrations.peft.accelerate(model)"
            _refuse(f"{_OPTIMIZERS_OF_PEFT[caller]}(model, ...)", remedy)
        return super().named_parameters(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("from_pretrained", "call for_trl(load_adapter(model, directory, trainable=True))")


_TRAINER = "transformers.trainer"
_STATES_OF_PEFT = "peft.utils.save_and_load"
_OPTIMIZERS_OF_PEFT = {  # those that find a layer's factors by the names that PEFT's layers give them
    "peft.optimizers.lorafa": "create_lorafa_optimizer",
    "peft.optimizers.riemannian": "create_riemannian_optimizer",
}


def _refuse(call: str, remedy: str) -> NoReturn:
    raise NotImplementedError(f"for_trl: {call} does not know the layers of lora_ext: {remedy}")


def _caller_module() -> str:
    """The module that called the function that calls this one."""
    return sys._getframe(2).f_globals.get("__name__", "")


class _Tuner(nn.Module):
    """Stands for PEFT's tuner, between its model and the base model; it takes missing attributes from the model."""

    prefix = "lora_"  # of the names of an adapter's parameters

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._shown: dict[str, tuple[LoraConfig, PeftLoraConfig]] = {}

    @property
    def peft_config(self) -> dict[str, PeftLoraConfig]:
        """The adapters' configs as PEFT's, the same objects in every call."""
        configs = find_adapters(self.model, "for_trl").configs
        for name, config in configs.items():
            if self._shown.get(name, (None,))[0] is not config:
                values = {key: value for key, value in config.to_dict().items() if key != "peft_type"}
                self._shown[name] = config, PeftLoraConfig(**values)
        return {name: self._shown[name][1] for name in configs}

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merges for good and returns the plain model. Every merge is checked, ``safe_merge`` or not."""
        return merge_and_unload(self.model, adapter_names)

    def unload(self) -> nn.Module:
        return unload(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if _caller_module().startswith("trl."):  # it hands the weights to vLLM, under names for PEFT's models
            raise NotImplementedError("for_trl: merging for vLLM is not supported; set use_vllm=False")
        merge(self.model, adapter_names)

    def unmerge_adapter(self) -> None:
        unmerge(self.model)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds the combination, and leaves the active adapters active. ``svd_full_matrices`` changes no result."""
        add_weighted_adapter(
            self.model,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
        )

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        active = find_adapters(self.model, "for_trl").active.names
        if {*names} != {*active}:
            _refuse(f"set_requires_grad({names})", f"the active adapters are {list(active)}; call set_adapter first")
        set_adapter(self.model, active, trainable=requires_grad)

    def disable_adapter_layers(self) -> NoReturn:
        _refuse("disable_adapter_layers()", "use `with model.disable_adapter():`")

    def enable_adapter_layers(self) -> NoReturn:
        _refuse("enable_adapter_layers()", "use `with model.disable_adapter():` in place of disable_adapter_layers()")

    def supports_lora_conversion(self, adapter_name: str = _NAME) -> bool:
        return False  # the adapters are LoRA

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # before __init__, or in a copy that is being made
                raise
            return getattr(self.model, name)
