"""Continuous batching of Transformers, for requests that name adapters.

``generate_batch(prompts, adapter_names=[...])``, and ``manager.add_request(ids, adapter_name=...)`` for a manager of
``init_continuous_batching`` or ``continuous_batching_context_manager``.

Transformers packs the tokens of many requests into one row. A request's name travels with its
``logit_processor_kwargs``, which Transformers keeps when it forks, restarts or moves a request; the objects below wrap
methods of the manager and of its parts. Requests without a name use the active adapter, as before.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_ext._common.changes import one_at_a_time
from lora_ext.model.adapter_set import AdapterSet, adapter_set
from lora_ext.model.rows.arguments import NAMES
from lora_ext.model.rows.batching_support import (
    ENDS,
    NAME,
    check_one_device,
    check_runs_layers,
    fail,
    is_supported,
    remedies,
    uncaptured,
)
from lora_ext.model.rows.calls import invocations_of
from lora_ext.model.rows.choose_adapters import check_list, choice_of
from lora_ext.model.rows.invocations import last_occurrences
from lora_ext.model.rows.replaced_method import ReplacedMethod
from lora_ext.nn.rows.choice import BASE, RowChoice
from lora_ext.nn.rows.in_force import choosing

if TYPE_CHECKING:
    from transformers import ContinuousBatchingManager
    from transformers.generation.continuous_batching import RequestState
    from transformers.generation.continuous_batching.requests import FutureRequestState

_REQUESTS = "_lora_ext_requests"  # the attribute of a manager that holds its NamedRequests
_MOST_NUMBERS = 100_000  # 20 MB; forgetting them loses shared prefixes only


class InitContinuousBatching(ReplacedMethod):
    """The ``init_continuous_batching`` of an injected model, whose managers take names."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        manager = self.original(*args, **kwargs)
        if _REQUESTS not in vars(manager) and is_supported():  # the manager may be that of an earlier call
            setattr(manager, _REQUESTS, NamedRequests(self.model, self.adapters, manager))
        return manager


class GenerateBatch(ReplacedMethod):
    """The ``generate_batch`` of an injected model, which takes ``adapter_names``, a name (or None) for each prompt."""

    name = "generate_batch"

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        names = kwargs.pop(NAMES, None)
        if names is None:
            return self.original(*args, **kwargs)
        if not is_supported():
            raise ValueError(
                f"{self.caller}: adapter_names: this version of Transformers has another continuous batching; install "
                "5.24, or use generate"
            )
        call = inspect.signature(self.original).bind(*args, **kwargs)
        arguments = call.arguments
        inputs = _named(arguments["inputs"], names, self.caller)
        for name in dict.fromkeys(names):
            check_name(self.model, self.adapters, name, self.caller)
        if (kept := getattr(self.model, "_cached_continuous_batching_manager", None)) is not None:
            check_runs_layers(kept, self.caller)
        mesh = getattr(self.model, "_device_mesh", None)
        check_one_device(1 if mesh is None else mesh.size(), self.caller)
        config = arguments.get("continuous_batching_config")
        arguments |= {"inputs": inputs, "continuous_batching_config": uncaptured(config, self.caller)}
        return self.original(*call.args, **call.kwargs)


class _NamedPrompt(list):
    """A prompt's tokens, and the name of its adapter."""

    name: str | None = None


def _named(prompts: Sequence[Sequence[int]], names: Any, caller: str) -> list[_NamedPrompt]:
    check_list(names, caller, "prompt")
    if len(names) != len(prompts):
        raise ValueError(
            f"{caller}: adapter_names has {len(names)} names, but there are {len(prompts)} prompts; pass a name, or "
            "None, for each prompt"
        )
    named = [_NamedPrompt(prompt) for prompt in prompts]
    for prompt, name in zip(named, names, strict=True):
        prompt.name = name
    return named


def check_name(root: nn.Module, adapters: AdapterSet, name: str | None, caller: str) -> None:
    """Checks that a request can name the adapter. Errors as in :func:`lora_ext.adapters.choose_adapters`."""
    active = adapters.active
    if name is None:
        return
    if len(active.names) > 1:
        raise ValueError(
            f"{caller}: the active adapters are {list(active.names)}; requests that name none use their sum, which "
            "cannot be in a batch with other requests; activate one, or none (set_adapter)"
        )
    choice_of(root, adapters, [name], caller, [1])


def _around(owner: Any, method: str, wrapper: Callable[..., Any]) -> None:
    """Puts ``wrapper`` in the place of a method; it gets the method, and the arguments of the call."""
    setattr(owner, method, functools.partial(wrapper, getattr(owner, method)))


class NamedRequests:
    """The adapters of a manager's requests.

    Slots of a pool: a request waits until its adapter has one, in the order of arrival, and keeps it while it runs.

    Prefixes: Transformers shares blocks of the cache between requests whose prompts begin with the same tokens. The
    blocks depend on the adapter, too, so the first token of a request, named or not, counts as another number whenever
    something else differs: the adapter, the place of its invocation (aLoRA), a change of the model's adapters, or a
    reading of a pool's files.

    Changes of the adapters: requests whose adapters are deleted, renamed or merged end with an error, whenever that
    happens; the others go on.

    Attributes:
        held: the pool of each adapter that has a slot for running requests.
    """

    def __init__(self, root: nn.Module, adapters: AdapterSet, manager: ContinuousBatchingManager) -> None:
        self.root, self._adapters, self.manager = root, adapters, manager
        self.held: dict[str, Any] = {}
        self._is_used, self._checked = False, -1
        # For the batch in progress: the adapter that each name stands for, and the errors of names that lost theirs.
        self._meant: dict[str | None, str] = {}
        self._lost: dict[str | None, Exception] = {}
        self._choice: RowChoice | None = None
        self._before = -1  # the adapters' changes when the choice was made
        self._processor: Callable[[], Any] = lambda: None  # a weak reference: a processor has all memory of the cache
        self._numbers: dict[tuple[Any, int], int] = {}
        self._unused = itertools.count(1)
        manager.logit_processor.supported_keys[NAME] = str
        _around(manager, "add_request", self._add_request)
        _around(manager, "add_requests", self._add_requests)
        _around(manager, "_create_batch_processor", self._create_batch_processor)
        _around(manager, "_run_generation_loop", self._run_generation_loop)

    @property
    def adapters(self) -> AdapterSet:
        """The model's adapters. If it has none any more, those that it had, until it is injected again."""
        found = adapter_set(self.root)
        if found is not None and found is not self._adapters:
            self._adapters, self._checked = found, -1
            self._numbers.clear()
        return self._adapters

    # --- what users call ---------------------------------------------------------------------------------------------

    def _add_request(self, original: Callable, input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
        name = kwargs.pop(NAME, input_ids.name if isinstance(input_ids, _NamedPrompt) else None)
        if name is not None:
            caller = "add_request"
            check_name(self.root, self.adapters, name, caller)
            check_runs_layers(self.manager, caller)
            kwargs[NAME], self._is_used = name, True
        return original(input_ids, *args, **kwargs)

    def _add_requests(self, original: Callable, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
        if (names := kwargs.pop(NAMES, None)) is not None:
            inputs = _named(inputs, names, "add_requests")
            for name in dict.fromkeys(names):
                check_name(self.root, self.adapters, name, "add_requests")
        return original(inputs, *args, **kwargs)

    # --- the loop of the manager's thread ----------------------------------------------------------------------------

    def _run_generation_loop(self, original: Callable, **kwargs: Any) -> None:
        try:
            original(**kwargs)
        finally:  # an error may have come before the ends of the requests
            self._release(())

    def _create_batch_processor(self, original: Callable) -> Any:
        processor = original()
        if processor is not self._processor():
            self._processor = weakref.ref(processor)
            _around(processor, "_generation_step", self._generation_step)
            _around(processor.inputs_and_outputs, "prepare_batch_update", self._prepare_batch_update)
            _around(processor.scheduler, "schedule_batch", self._schedule_batch)
            _around(processor.scheduler, "_get_waiting_candidates", self._get_waiting_candidates)
            for method in ENDS:
                _around(processor.scheduler, method, self._then_release)
            _around(processor.cache, "search_prefix_match", self._search_prefix_match)
            for allocator in processor.cache.cache_allocators.values():
                _around(allocator, "mark_complete_blocks", self._mark_complete_blocks)
        return processor

    def _generation_step(self, original: Callable, model: nn.Module) -> None:
        """Computes a batch; each of its tokens uses the adapter of its request."""
        batch = self._processor().inputs_and_outputs
        requests = getattr(batch, "requests_in_batch", ())
        names = [_name_of(request.state) for request in requests]
        lengths = [request.query_length for request in requests]
        self._choice = self._choice_of_batch(names, lengths, batch.num_q_tokens) if requests else None
        if self._choice is None:
            return original(model) if not requests or self._lost.keys() < set(names) else None
        with choosing(self._choice):
            if invocations_of(self._choice):
                self._choice.before = [*map(self._before_invocation, requests), 0]
            return original(model)

    @one_at_a_time  # an adapter that is found is there when the choice is made
    def _choice_of_batch(self, names: list[str | None], lengths: list[int], tokens: int) -> RowChoice | None:
        """Returns the choice of a batch; None: the active adapters compute it, or no request is left."""
        active, self._lost = self.adapters.active, {}
        is_plain = not active.invoked or len(active.names) > 1 or remedies(self.manager.continuous_batching_config)
        self._meant = {name: name for name in names if name is not None}
        self._note_lost()
        if not is_plain or self._meant.keys() - self._lost.keys():
            self._meant |= {None: active.names[0] if active.names else BASE} if None in names else {}
            self._note_lost()
        if not self._meant.keys() - self._lost.keys():
            return None
        names = [BASE if name in self._lost else self._meant[name] for name in names]
        lengths = [*lengths, tokens - sum(lengths)]  # the last ones are padding
        choice = choice_of(self.root, self.adapters, [*names, BASE], "generate_batch", lengths)
        choice.may_lose = True  # the other requests of the batch go on: see _prepare_batch_update
        self._before = active.changes
        return choice

    def _note_lost(self) -> None:
        """Notes which names of the batch's requests mean adapters that cannot be chosen any more."""
        for name, adapter in self._meant.items():
            try:
                check_name(self.root, self.adapters, adapter, "generate_batch")
            except (KeyError, ValueError) as error:
                self._lost[name] = error

    def _before_invocation(self, request: FutureRequestState) -> int:
        """Returns on how many tokens of a request in a batch its adapter does not act yet."""
        n, start = request.query_length, self._start(request.state, self._meant[_name_of(request.state)])
        return n if start is None else min(max(start - request.state.position_offset + n, 0), n)

    def _prepare_batch_update(
        self, original: Callable
    ) -> tuple[list[FutureRequestState], list[int], list[float] | None]:
        """Returns the requests of a batch and their tokens, without those whose adapters are lost, which fail."""
        requests, tokens, logprobs = original()
        if self._choice is not None and self._before != self.adapters.active.changes:
            self._note_lost()
            for name, adapter in self._meant.items():
                if adapter in self._choice.lost:  # another one may have its name by now
                    error = KeyError(f"generate_batch: {adapter!r} was deleted or renamed while a request used it")
                    self._lost.setdefault(name, error)
        kept = [_name_of(request.state) not in self._lost for request in requests]
        for request, is_kept in zip(requests, kept, strict=True):
            if not is_kept:
                self._fail(request.state, self._lost[_name_of(request.state)])
        of_tokens = [is_kept for request, is_kept in zip(requests, kept, strict=True) if request.has_new_token]
        tokens, logprobs = (x and list(itertools.compress(x, of_tokens)) for x in (tokens, logprobs))
        return list(itertools.compress(requests, kept)), tokens, logprobs

    def _schedule_batch(self, original: Callable, *args: Any) -> Any:
        self._fail_those_without_adapter()
        return self._then_release(original, *args)

    def _get_waiting_candidates(self, original: Callable) -> list[RequestState]:
        """Returns the waiting requests that may run. Those after one that waits for a slot wait, too."""
        states, able = original(), []
        if not self._is_used:
            return states
        for state in states:
            try:
                if not self._hold(_name_of(state)):
                    return able
            except Exception as error:  # of the adapter's files
                self._fail(state, error)
            else:
                able.append(state)
        return able

    def _then_release(self, original: Callable, *args: Any) -> Any:
        result = original(*args)
        self._release(self._processor().scheduler.active_requests.values())
        return result

    def _hold(self, name: str | None) -> bool:
        """Gives an adapter of the pool a slot. False: none is idle now. Raises what loading raises."""
        if name is None or name == BASE or name in self.adapters.configs or name in self.held:
            return True
        pool = self.adapters.pool
        if pool is None:
            raise KeyError(f"generate_batch: there is no adapter {name!r} any more")
        if not pool.try_acquire(name):
            return False
        if self.root.device.type == "cuda":  # the batches run on another stream than loading
            torch.cuda.current_stream(self.root.device).synchronize()
        self.held[name] = pool
        return True

    def _release(self, running: Iterable[RequestState]) -> None:
        """Frees the slots that no running request uses."""
        if self.held:
            for name in self.held.keys() - set(map(_name_of, running)):
                self.held.pop(name).release((name,))

    def _fail_those_without_adapter(self) -> None:
        """Ends the requests whose adapters were deleted or merged while they ran or waited."""
        changes = self.adapters.active.changes
        if not self._is_used or changes == self._checked:
            return
        self._checked, scheduler = changes, self._processor().scheduler
        states = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
        for name in set(map(_name_of, states)):
            try:
                check_name(self.root, self.adapters, name, "generate_batch")
            except (KeyError, ValueError) as error:
                for state in states:
                    if _name_of(state) == name:
                        self._fail(state, error)

    def _fail(self, state: RequestState, error: Exception) -> None:
        fail(self._processor(), state, error)

    # --- shared prefixes ---------------------------------------------------------------------------------------------

    def _search_prefix_match(self, original: Callable, request_id: str, prompt_ids: list[int]) -> int:
        state = self._state(request_id)
        number = self._number(state, prompt_ids)
        state._lora_ext_number = number  # the last search is in the step that begins the request
        return original(request_id, [number, *prompt_ids[1:]])

    def _mark_complete_blocks(self, original: Callable, request_id: str, token_ids: list[int], *args: Any) -> None:
        state = self._state(request_id)
        if state is None:  # cancelled
            return original(request_id, token_ids, *args)
        number = self._number(state, token_ids)
        if number != vars(state).get("_lora_ext_number"):  # the adapters changed while the request ran
            number = -next(self._unused)
        original(request_id, [number, *token_ids[1:]], *args)

    def _state(self, request_id: str) -> RequestState | None:
        scheduler = self._processor().scheduler
        return scheduler.active_requests.get(request_id) or scheduler.waiting_requests.get(request_id)

    def _number(self, state: RequestState, tokens: list[int]) -> int:
        """Stands for the first token of a request; no request with another adapter has this number."""
        key = self._space(state), *tokens[:1]
        if key not in self._numbers:
            if len(self._numbers) > _MOST_NUMBERS:
                self._numbers.clear()
            self._numbers[key] = -next(self._unused)
        return self._numbers[key]

    def _space(self, state: RequestState) -> tuple[Any, ...]:
        """Returns all that decides the keys and values of a request, except its tokens."""
        name, active = _name_of(state), self.adapters.active
        used = active.names if name is None else (name,)
        content = self.held[name].content(name) if name in self.held else None
        start = self._start(state, used[0]) if len(used) == 1 else 0
        return used, name is None, content, active.changes, start

    def _start(self, state: RequestState, name: str) -> int | None:
        """Returns where a request's adapter begins to act. None: the prompt has no invocation. 0: not an aLoRA."""
        tokens = self.adapters.active.invocations.get(name)
        if name in self.held:
            tokens = self.held[name].invocations((name,)).get(name)
        if tokens is None:
            return 0
        found = vars(state).get("_lora_ext_start")
        if found is None:
            prompt = state.initial_tokens[: state._true_initial_tokens or None]
            found = state._lora_ext_start = tuple(last_occurrences(torch.tensor([prompt]), tokens))
        return found[0]


def _name_of(state: RequestState) -> str | None:
    return state.logit_processor_kwargs.get(NAME)
