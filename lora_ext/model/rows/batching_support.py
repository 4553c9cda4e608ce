"""Checks that Transformers' continuous batching runs the layers in every batch, so that requests can name adapters."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, ContinuousBatchingManager
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
    from transformers.generation.continuous_batching.requests import RequestState

NAME = "adapter_name"
ENDS = "finish_request", "clear_cancelled_requests"  # methods of the scheduler after which requests run no more


def is_supported() -> bool:
    """Returns whether this version of Transformers has the methods that continuous_batching.py wraps."""
    try:
        from transformers.generation.continuous_batching import (
            cache,
            cache_allocators,
            continuous_api,
            input_outputs,
            scheduler,
        )
    except ImportError:
        return False
    wrapped = {
        continuous_api.ContinuousBatchingManager: (
            *("add_request", "add_requests", "_create_batch_processor", "_run_generation_loop"),
        ),
        continuous_api.ContinuousBatchProcessor: ("_generation_step", "_handle_request_error"),
        continuous_api.ContinuousBatchingLogitsProcessorList: ("check_kwargs",),
        input_outputs.ContinuousBatchingIOs: ("prepare_batch_update",),
        scheduler.Scheduler: ("schedule_batch", "_get_waiting_candidates", *ENDS),
        cache.PagedAttentionCache: ("search_prefix_match",),
        cache_allocators.cache_allocator.CacheAllocator: ("mark_complete_blocks",),
    }
    return all(hasattr(kind, method) for kind, methods in wrapped.items() for method in methods)


def uncaptured(config: ContinuousBatchingConfig | None, caller: str) -> ContinuousBatchingConfig:
    """A config that runs the layers in every batch, by default. ValueError: it asks for something else."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig() if config is None else copy.deepcopy(config)
    config.use_cuda_graph = False if config.use_cuda_graph is None else config.use_cuda_graph
    config.use_async_batching = False if config.use_async_batching is None else config.use_async_batching
    _check_config(config, caller)
    return config


def _check_config(config: ContinuousBatchingConfig, caller: str) -> None:
    if options := remedies(config):
        raise ValueError(
            f"{caller}: {NAME}: captured, compiled and asynchronous batches do not ask which adapters their requests "
            f"name; pass continuous_batching_config=ContinuousBatchingConfig({', '.join(options)})"
        )


def remedies(config: ContinuousBatchingConfig) -> list[str]:
    """The options that make the layers run in every batch; those that ``config`` has already are left out."""
    reasons = {
        "use_cuda_graph=False": any(config.cuda_graph_booleans),
        "use_async_batching=False": config.use_async_batching,
        "default_compile_level=0": config.default_compile_level,
        "varlen_compile_config=None": config.varlen_compile_config is not None,
        "decode_compile_config=None": config.decode_compile_config is not None,
    }
    return [remedy for remedy, is_asked in reasons.items() if is_asked]


def check_runs_layers(manager: ContinuousBatchingManager, caller: str) -> None:
    _check_config(manager.continuous_batching_config, caller)
    check_one_device(manager.distributed_helper.tp_size, caller)


def check_one_device(size: int, caller: str) -> None:
    if size > 1:
        raise ValueError(
            f"{caller}: {NAME}: the model is split over {size} devices; merge an adapter, or use one device"
        )


def fail(processor: ContinuousBatchProcessor, state: RequestState, error: Exception) -> None:
    """Ends a request with an error, whether it runs or waits, and the sequences that were to continue its prompt."""
    scheduler, identity = processor.scheduler, state.request_id
    for i in range(state.num_children):
        child = state.create_equivalent_initial_request()
        child.request_id = f"{identity}__child#{i}"
        processor._handle_request_error(error, child)
    processor._handle_request_error(error, state)
    if state in scheduler._requests_to_fork:
        scheduler._requests_to_fork.remove(state)
    if scheduler.waiting_requests.pop(identity, None) is None:
        scheduler.finish_request(identity)
        scheduler.block_new_requests = False  # as at the end of other requests
    else:
        scheduler.waiting_requests_order.remove(identity)
        processor.offloading_manager.free_request_cpu_cache(state)
