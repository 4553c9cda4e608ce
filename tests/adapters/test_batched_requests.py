"""Continuous batching: a request that names its adapter gets what ``generate`` computes for it alone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from support.alora import TOKENS, with_three
from support.batched import NAMES, NEW, alone, asked, config, generated, generation, prompts, running, with_abc
from support.models import VOCABULARY, llama, refused, shaken
from support.versions import needs
from torch import nn
from transformers import CompileConfig
from transformers.generation.continuous_batching import continuous_api

from lora_ext import LoraConfig, inject, merge, set_adapter
from lora_ext.adapters import delete_adapter, disable_adapters, rename_adapter, unload
from lora_ext.model.rows import continuous_batching
from lora_ext.nn.rows.in_force import _current

pytestmark = pytest.mark.usefixtures("no_collections")


def of_batch(model: nn.Module, inputs: list[list[int]], names: list[str | None], **options) -> Iterable:
    """The results of the requests, computed in one batch; ``options`` as in :func:`generation`."""
    batching = config(max_batch_tokens=64)
    return model.generate_batch(inputs, generation(**options), batching, adapter_names=names).values()


@pytest.mark.parametrize(
    ("attention", "batch"), [("sdpa", 8), pytest.param("eager", 8, marks=pytest.mark.full), ("sdpa", 64)]
)
def test_requests_equal_generate(attention, batch):
    model, inputs = with_abc(), prompts()
    model.set_attn_implementation(attention)
    expected = alone(model, inputs, NAMES)
    assert expected != alone(model, inputs, ["a", "b", "b", "a", "a", "b"])
    assert generated(model, inputs, NAMES, max_batch_tokens=batch) == expected
    assert _current.get() is None and model._lora_adapters.active.row_calls == 0


def test_a_prefix_is_shared_by_requests_with_one_adapter_only():
    """The same prompt for two adapters, one after the other and again: blocks are found, but those of the adapter."""
    model, inputs = with_abc(), prompts((13,)) * 6
    names = ["a", "b", "a", None, "__base__", "b"]
    set_adapter(model, "c")
    computed, sizes = [], []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True)
    with running(model) as manager:
        for prompt, name in zip(inputs, names, strict=True):
            calls = []
            computed.append(asked(manager, prompt, name))
            sizes.append(sum(calls))
    assert sizes == [17, 17, 5, 17, 17, 5]  # the third and the last find the blocks of the first and the second
    assert computed == alone(model, inputs, ["a", "b", "a", "c", "__base__", "b"])


def test_requests_without_a_name_use_the_active_adapter():
    model, inputs = with_abc(), prompts()
    expected = alone(model, inputs, ["a"] * 6)
    mixed = alone(model, inputs, ["a", "b", "a", "__base__", "a", "c"])
    set_adapter(model, "a")
    assert generated(model, inputs, None) == expected
    assert generated(model, inputs, [None] * 6) == expected
    assert generated(model, inputs, [None, "b", None, "__base__", "a", "c"]) == mixed
    with disable_adapters(model):
        assert generated(model, inputs, ["b"] * 6) == generated(model, inputs, None)


@pytest.mark.full
@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_it(other):
    model, inputs = with_abc(), prompts()[:2]
    expected = alone(model, inputs, ["a", "b"])
    assert generated(other(model), inputs, ["a", "b"]) == expected
    plain = unload(model)
    assert not {"generate_batch", "init_continuous_batching", "generate"} & vars(plain).keys()


def test_heads_trained_in_full_and_several_sequences():
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "a")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}), "b")
    for name in "ab":
        shaken(set_adapter(model.eval(), name), 1.0)
    inputs, names = [[5, 6, 7, 5, 9], [5, 6, 7, 5, 9], [6], [6]], ["a", "b", "b", "a"]
    expected = alone(model, inputs, names)
    assert generated(model, inputs, names) == expected
    results = model.generate_batch(
        inputs[:2],
        generation_config=generation(num_return_sequences=3, do_sample=True, top_k=1),
        continuous_batching_config=config(),
        adapter_names=names[:2],
    )
    assert [result.generated_tokens for result in results.values()] == [expected[0]] * 3 + [expected[1]] * 3


def test_a_cache_without_room_for_all():
    """Requests give up their cache and begin again, with the tokens that they have generated in their prompt."""
    model, inputs = with_abc(), prompts((9, 10, 11, 9, 10, 11))
    assert generated(model, inputs, NAMES, num_blocks=8, max_batch_tokens=64) == alone(model, inputs, NAMES)


@needs("transformers", "5.19", "such a call ends in a ValueError about the attention")
def test_calls_in_a_pause():
    """Without a pause, Transformers itself mixes the threads: a call sets config.is_causal for its time."""
    model, inputs = with_abc(), prompts()
    expected, ids = alone(model, inputs, NAMES), torch.randint(VOCABULARY, (3, 6))
    with torch.no_grad():
        y = model(ids, adapter_names=["c", "a", "__base__"]).logits
        with running(model) as manager:
            requests = manager.add_requests(inputs, adapter_names=NAMES)
            for _ in range(3):
                with manager.pause():
                    assert torch.equal(model(ids, adapter_names=["c", "a", "__base__"]).logits, y)
            results = {result.request_id: result for result in (manager.get_result(timeout=60) for _ in NAMES)}
    assert [results[request].generated_tokens for request in requests] == expected


def test_a_stopped_manager_frees_its_cache():
    model = with_abc()
    with running(model) as manager:
        manager.add_request([5, 6, 7], adapter_name="a")
        assert manager.get_result(timeout=60).error is None
        cache = weakref.ref(manager.batch_processor.cache)
    gc.collect()  # as Transformers does
    assert cache() is None


def test_disabled_adapters_leave_no_prefix():
    model, (prompt,) = with_abc(), prompts((13,))
    expected = alone(model, [prompt] * 2, ["__base__", "a"])
    with running(model) as manager:
        with disable_adapters(model):
            base = asked(manager, prompt, "a")
        assert [base, asked(manager, prompt, "a")] == expected


# --- the adapters change while a manager runs -------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["b", [], ["a", "b"]], ids=str)
def test_another_active_adapter_leaves_no_prefix(then):
    model, (prompt,) = set_adapter(with_abc(), "a"), prompts((13,))
    computed = []
    with running(model) as manager:
        for names in ("a", then):
            set_adapter(model, names)
            computed.append(asked(manager, prompt))
    ids = torch.tensor([prompt])
    expected = model.generate(ids, generation_config=generation(), attention_mask=ids > -1)[0, 13:].tolist()
    assert computed[1] == expected != computed[0]


def test_a_block_that_two_adapters_computed_is_not_shared():
    """The first block of the cache has four tokens: three of the prompt for a, and one that comes after a change."""
    model, (prompt,) = with_abc(), prompts((3,))
    set_adapter(model, "a")
    calls = []

    def change(*_) -> None:
        calls.append(0)
        if len(calls) == 2:
            set_adapter(model, "b")

    with running(model) as manager:
        model.register_forward_pre_hook(change)
        longer = [*prompt, asked(manager, prompt)[0], 7, 8]
        computed = asked(manager, longer)
    assert [computed] == alone(model, [longer], ["b"])


def test_a_kept_manager_of_a_model_that_is_injected_again():
    options = {"generation_config": generation(), "continuous_batching_config": config(), "persistent_manager": True}
    model, inputs = set_adapter(with_abc(), "a"), prompts((13,))

    def of_kept(names: list[str] | None) -> list[list[int]]:
        return [
            result.generated_tokens for result in model.generate_batch(inputs, adapter_names=names, **options).values()
        ]

    assert of_kept(["b"]) != of_kept(None) == alone(model, inputs, ["a"])
    unload(model)
    bare = [result.generated_tokens for result in model.generate_batch(inputs, **options).values()]
    ids = torch.tensor(inputs)
    expected = model.generate(ids, generation_config=generation(), attention_mask=ids > -1)[0, 13:].tolist()
    assert bare == [expected]
    for name in "ab":
        inject(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), name)
        shaken(set_adapter(model, name))
    assert of_kept(["a"]) == alone(model, inputs, ["a"])
    assert of_kept(None) == alone(model, inputs, ["a"]) != of_kept(["b"]) == alone(model, inputs, ["b"])
    model.destroy_cached_continuous_batching_manager()


def test_requests_wait_no_longer_than_for_those_that_failed():
    """A full cache holds back new requests until another one ends, which may be by an error."""
    model, inputs = set_adapter(with_abc(), "a"), prompts((9, 10, 5))
    with running(model, num_blocks=8, max_batch_tokens=64) as manager:

        def delete(*_) -> None:
            if manager.batch_processor.scheduler.block_new_requests and "c" in model._lora_adapters.configs:
                delete_adapter(model, "c")

        hook = model.register_forward_pre_hook(delete)
        for prompt, name in zip(inputs, "cca", strict=True):
            manager.add_request(prompt, adapter_name=name, max_new_tokens=5 if name == "a" else 20)
        results = {result.request_id: result for _ in range(3) if (result := manager.get_result(timeout=20))}
        manager.stop(hard_stop=True)  # without a wait for requests that hang
        hook.remove()
    assert "c" not in model._lora_adapters.configs
    assert "there is no adapter 'c'" in results["req_0"].error and "no adapter 'c'" in results["req_1"].error
    assert [results["req_2"].generated_tokens] == alone(model, inputs[2:], ["a"])


def at_step(monkeypatch, model: nn.Module, step: int, moment: str, change: Callable[[], object]) -> None:
    """Calls ``change`` once: when the requests of a batch are scheduled, or while the model computes it."""
    schedule, batches = continuous_api.ContinuousBatchProcessor.prepare_next_batch, []

    def prepare(processor) -> bool:
        if is_any := schedule(processor):
            batches.append(0)
            if moment == "scheduled":
                changed()
        return is_any

    def changed(*_) -> None:
        if len(batches) == step:
            batches.append(0)
            change()

    monkeypatch.setattr(continuous_api.ContinuousBatchProcessor, "prepare_next_batch", prepare)
    if moment == "computed":
        model.model.layers[1].register_forward_pre_hook(changed)


@pytest.mark.parametrize("moment", ["scheduled", "computed"])
@pytest.mark.parametrize("step", [1, 3, NEW])
def test_requests_of_an_adapter_that_goes_end_alone(monkeypatch, moment, step):
    model, inputs = with_abc(), prompts((9, 9, 9))
    names = ["a", "c", "b"]
    expected = alone(model, inputs, names)
    set_adapter(model, "a")
    at_step(monkeypatch, model, step, moment, lambda: delete_adapter(model, "c"))
    results = list(of_batch(model, inputs, names))
    assert "there is no adapter 'c'" in results[1].error and results[1].generated_tokens == expected[1][: step - 1]
    assert [result.generated_tokens for result in results[::2]] == expected[::2]
    assert results[0].error is results[2].error is None


@pytest.mark.parametrize("moment", ["scheduled", "computed"])
def test_requests_of_a_merged_or_renamed_adapter_end_alone(monkeypatch, moment):
    model, inputs = with_abc(), prompts((9, 9, 9))
    expected = alone(model, inputs, ["a", "b", "a"])
    set_adapter(model, "a")
    with monkeypatch.context() as patch:
        at_step(patch, model, 2, moment, lambda: rename_adapter(model, "b", "d"))
        plain, renamed, named = of_batch(model, inputs, [None, "b", "a"])
    assert [plain.generated_tokens, named.generated_tokens] == [expected[0], expected[2]]
    assert "no adapter 'b'" in renamed.error and renamed.generated_tokens == expected[1][:1]
    at_step(monkeypatch, model, 2, "scheduled", lambda: merge(model, "a"))
    plain, named, other = of_batch(model, inputs, [None, "d", "a"])
    assert plain.generated_tokens == expected[0] and plain.error is None
    assert "'a' is merged into" in named.error and "'a' is merged into" in other.error


def test_every_sequence_of_a_prompt_fails(monkeypatch):
    """generate_batch waits for all of them."""
    model, inputs = set_adapter(with_abc(), "a"), prompts((9, 9))
    at_step(monkeypatch, model, 1, "computed", lambda: delete_adapter(model, "c"))
    results = list(of_batch(model, inputs, ["c", "b"], num_return_sequences=3, do_sample=True))
    assert ["no adapter 'c'" in (result.error or "") for result in results] == [True] * 3 + [False] * 3


# --- aLoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_named", [True, False])
def test_adapters_that_act_from_their_invocation_on(is_named):
    model, ids = with_three(), torch.randint(10, VOCABULARY, (12,)).tolist()
    late = [*ids[:8], *TOKENS, ids[8]]
    early = [*ids[:1], *TOKENS, *ids[3:8], ids[9]]
    inputs, names = [late, ids, early, [*early[:6], *TOKENS, 11], early], ["alora", "alora", "alora", "alora", "plain"]
    if not is_named:
        names = ["alora"] * 5
    expected = alone(model, inputs, names)
    set_adapter(model, "alora")
    for _ in range(2):
        assert generated(model, inputs, names if is_named else None) == expected
    assert generated(model, inputs[::-1], names[::-1] if is_named else None) == expected[::-1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_names():
    model, inputs = with_abc(), prompts()
    options = {"generation_config": generation(), "continuous_batching_config": config()}
    with refused(
        model, KeyError, "LlamaForCausalLM.generate_batch: there is no adapter 'x'; the adapters are ['a', 'b'"
    ):
        model.generate_batch(inputs, adapter_names=["x"] * 6, **options)
    with refused(model, ValueError, "generate_batch: adapter_names has 2 names, but there are 6 prompts"):
        model.generate_batch(inputs, adapter_names=["a", "b"], **options)
    with refused(model, TypeError, "generate_batch: adapter_names is of type str, want a list with a name per"):
        model.generate_batch(inputs, adapter_names="a", **options)
    with refused(model, TypeError, "generate_batch: adapter_names"):
        model.generate_batch(inputs, adapter_names=[5] * 6, **options)
    set_adapter(model, ["a", "b"])
    with refused(model, ValueError, "the active adapters are ['a', 'b']", "activate one, or none (set_adapter)"):
        model.generate_batch(inputs, adapter_names=["a"] * 6, **options)
    set_adapter(model, "a")
    merge(model, "a")
    with refused(model, ValueError, "'a' is merged into", "unmerge(model)"):
        model.generate_batch(inputs, adapter_names=["b"] * 6, **options)


def test_another_version_of_transformers(monkeypatch):
    model, inputs = set_adapter(with_abc(), "a"), prompts()[:2]
    expected = generated(model, inputs, ["a", "a"])
    monkeypatch.setattr(continuous_batching, "is_supported", lambda: False)
    assert generated(model, inputs, None) == expected
    monkeypatch.undo()
    monkeypatch.delattr(continuous_api.ContinuousBatchProcessor, "_generation_step")
    with refused(model, ValueError, "generate_batch: adapter_names: this version of Transformers", "use generate"):
        model.generate_batch(inputs, generation(), config(), adapter_names=["a", "b"])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph=False"),
        ({"use_cuda_graph": (False, True)}, "use_cuda_graph=False"),
        ({"use_async_batching": True}, "use_async_batching=False"),
        ({"default_compile_level": 1}, "default_compile_level=0"),
        ({"varlen_compile_config": CompileConfig()}, "varlen_compile_config=None"),
    ],
    ids=str,
)
def test_batches_that_do_not_run_the_layers(options, remedy):
    model = with_abc()
    with refused(model, ValueError, "captured, compiled and asynchronous batches", remedy):
        model.generate_batch(prompts(), generation(), config(**options), adapter_names=NAMES)


def test_a_manager_refuses_in_the_thread_that_asks():
    model = set_adapter(with_abc(), "a")
    with running(model) as manager:
        with pytest.raises(KeyError, match="add_request: there is no adapter 'x'"):
            manager.add_request([3, 4], adapter_name="x")
        with pytest.raises(ValueError, match="add_requests: adapter_names has 1 names, but there are 2 prompts"):
            manager.add_requests([[3, 4], [5]], adapter_names=["a"])
        manager.add_requests([[3, 4], [5]], adapter_names=["a", "b"], max_new_tokens=3)
        results = [manager.get_result(timeout=60) for _ in range(2)]
        assert {len(result.generated_tokens) for result in results} == {3}
        manager.add_request([5, 6, 7], adapter_name="c", max_new_tokens=200)
        manager.add_request([5, 6], adapter_name="b", max_new_tokens=2)
        assert manager.get_result(timeout=60).request_id == "req_3"
        with manager.pause():
            delete_adapter(model, "c")
        failed = manager.get_result(timeout=60)
        assert "there is no adapter 'c'" in failed.error and 0 < len(failed.generated_tokens) < 200
        manager.add_request([5, 6], adapter_name="b", max_new_tokens=2)
        assert manager.get_result(timeout=60).error is None
