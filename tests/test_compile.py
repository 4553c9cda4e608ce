"""Adapted models under torch.compile: one graph without breaks for each set of adapters, and none when they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from architectures.table import ARCHITECTURES
from contracts.compare import output
from support.versions import before, needs
from support.ways import PEFT, WAYS, adapted, save_random_adapter
from torch import Tensor, nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import disable_adapters

pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), pytest.mark.full]

ROWS = {row.name: row for row in ARCHITECTURES}
UNET = "UNet (Stable Diffusion)"


class Counting:
    """A compiler that runs the graph as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __deepcopy__(self, memo: dict) -> Counting:
        return self

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def build(tmp_path):
    """Makes ``(base, path of adapters "a" and "b", inputs)`` for a row of the table of architectures."""

    def of(name: str):
        base, inputs = ROWS[name].build(), ROWS[name].inputs()
        for adapter in ("a", "b"):
            save_random_adapter(base, tmp_path / adapter, target_modules="all-linear")
        return base, tmp_path, inputs

    return of


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("Llama", "accelerate"),
        ("Gemma3", "inject"),
        ("BERT", "inject"),
        pytest.param("Llama", "inject", marks=pytest.mark.slow),
        pytest.param("Gemma3", "accelerate", marks=pytest.mark.slow),
        pytest.param("BERT", "accelerate", marks=pytest.mark.slow),
        pytest.param("Qwen2", "inject", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_each_adapter_and_none_on_a_switch(name, way, build):
    (base, directory, inputs), way = build(name), WAYS[way]
    model = adapted(way, base, directory, "a", "b")
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = {}
    for graphs, adapter in enumerate(("a", "b"), start=1):
        way.switch(model, adapter)
        expected[adapter] = logits(model, inputs)
        torch.testing.assert_close(logits(compiled, inputs), expected[adapter])
        assert backend.graphs == graphs
    assert not torch.allclose(expected["a"], expected["b"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in ("a", "b", "b", "a"):
            way.switch(model, adapter)
            torch.testing.assert_close(logits(compiled, inputs), expected[adapter])


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["Mixtral", "LLaVA", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Whisper", "T5", UNET))]
)
def test_other_kinds_of_models_are_one_graph(name, build):
    base, directory, inputs = build(name)
    if before("torch", "2.13") or before("transformers", "5.24"):
        try:
            torch.compile(base.eval(), backend="eager", fullgraph=True)(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            versions = f"torch {torch.__version__} and Transformers {transformers.__version__}"
            pytest.skip(f"{versions} do not compile this model without an adapter: {type(error).__name__}")
        torch._dynamo.reset()
    model = adapted(WAYS["inject"], base, directory, "a").eval()
    expected = output(model, inputs)
    torch.testing.assert_close(output(torch.compile(model, backend=Counting(), fullgraph=True), inputs), expected)
    assert not torch.allclose(output(base, inputs), expected)


def test_sets_of_adapters_and_a_new_adapter(build):
    base, directory, inputs = build("Llama")
    way = WAYS["inject"]
    model = adapted(way, base, directory, "a", "b")
    compiled = torch.compile(model, backend=Counting(), fullgraph=True)
    for names in (["a"], ["a", "b"]):
        way.switch(model, *names)
        logits(compiled, inputs)
    with disable_adapters(model):
        torch.testing.assert_close(logits(compiled, inputs), logits(base, inputs))
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]), "c")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in (["a", "b"], ["a"]):
            way.switch(model, *names)
            torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
        with disable_adapters(model):
            logits(compiled, inputs)


def test_a_compiled_step_is_pefts(way, build):
    base, directory, inputs = build("Llama")
    steps = []
    for library, model in ((PEFT, None), (way, torch.compile)):
        trained = adapted(library, base, directory, "a").train()
        run = trained if model is None else model(trained, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            loss = run(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        steps.append(losses)
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)
    assert abs(steps[0][0] - steps[0][2]) > 1e-4


def test_regions_share_their_graphs_as_those_of_the_bare_model_do(way, build):
    """Accelerate compiles one decoder layer for all of them."""
    base, directory, inputs = build("Llama")
    graphs = []
    for model in (base, adapted(way, base, directory, "a")):
        torch._dynamo.reset()
        backend = Counting()
        compiled = compile_regions(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
        graphs.append(backend.graphs)
    assert graphs[1] <= graphs[0] + 1, graphs


@needs("transformers", "5.15", "generate makes a third graph, of a bare model too")
@torch.no_grad()
@pytest.mark.parametrize(("name", "way"), [("Gemma3", "inject"), ("Llama", "accelerate")])
def test_generate_with_a_static_cache(name, way, build):
    (base, directory, inputs), way = build(name), WAYS[way]
    model = adapted(way, base, directory, "a").eval()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert not torch.equal(expected, base.generate(**inputs, **options))
    backend = Counting()
    host = model if isinstance(model, transformers.PreTrainedModel) else model.get_base_model()
    host.forward = torch.compile(host.forward, backend=backend, fullgraph=True)
    options["cache_implementation"] = "static"
    for graphs, change in ((2, None), (4, way.merge), (4, way.unmerge)):  # the prompt's, and a token's
        if change is not None:
            change(model)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert backend.graphs == graphs
