"""Finds the calls of ``lora_linear`` in a graph that read one tensor, and makes one call of each group of them.

Dynamo's graphs have the forward only, before autograd: ``lora_linear_siblings`` brings the shared backward with it. The
bodies of activation checkpoints are graphs within the graph, and are changed in the same way.

The calls of a group are those of layers (:class:`SharesInputs`) of one module, as in uncompiled models. They are
computed where the first one is, with its dropout seed: the seeds of the others are not drawn. That is possible if
nothing between the first and another one changes a tensor that the latter reads, or autocast, or the gradient mode.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_ext._ops.registration import op_named
from lora_ext.compiling.changed_tensors import may_change
from lora_ext.nn.input_groups import InputGroup
from lora_ext.nn.operands import Operands
from lora_ext.nn.shared_inputs import LARGEST, SharesInputs

_SINGLE, _SIBLINGS = op_named("lora_linear"), op_named("lora_linear_siblings")
_TARGETS = (_SINGLE, _SINGLE.overloadpacket)
_NAMES = [argument.name for argument in _SINGLE._schema.arguments]
_DEFAULTS = {a.name: a.default_value for a in _SINGLE._schema.arguments if a.has_default_value()}
# How layers compute operands from their parameters.
_MOVABLE = (operator.add, operator.mul, operator.neg, torch.cat, "to", "item")


def share(graph: fx.GraphModule) -> list[InputGroup]:
    """Changes a graph of Dynamo's and the graphs within it. Returns the layers that read one tensor."""
    found = []
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            groups = list(_groups(module.graph))
            for group in groups:
                if len(group.calls) > 1:
                    _replace(group)
            found += [InputGroup(tuple(map(_shown, group.calls)), group.reason) for group in groups]
            module.recompile()
    return found


class _Call:
    """A call of ``lora_linear`` by a layer. Its arguments are read from the graph, which changes.

    Attributes:
        path: the layer's path, with Dynamo's name of the compiled module.
        moved: nodes after the group's first call that compute the arguments, in order.
    """

    def __init__(self, node: fx.Node, path: str) -> None:
        self.node, self.path = node, path
        self.moved: list[fx.Node] = []

    def __getattr__(self, name: str) -> Any:
        node = self.__dict__["node"]
        arguments = dict(zip(_NAMES, node.args, strict=False))
        return (_DEFAULTS | arguments | node.kwargs)[name]

    @property
    def ys(self) -> list[fx.Node]:
        return [user for user in self.node.users if user.args[1] == 0]

    def operands(self) -> Operands | None:
        """Returns the operands without values; None: the graph does not tell them, or they are not plain tensors."""
        nodes = self.weight, self.bias, self.lora_A, self.lora_B
        tensors = [None if node is None else node.meta.get("example_value") for node in nodes]
        weight, _, lora_A, lora_B = tensors
        if weight is None or lora_A is None or lora_B is None or any(map(is_traceable_wrapper_subclass, tensors)):
            return None
        return Operands(*tensors, None, self.scaling, self.dropout_p)

    def has_seed_like(self, other: _Call) -> bool:
        """Returns whether both masks may come from one seed: they do already, or each call draws a seed for itself."""
        return self.seed is other.seed or (_draws(self) is not None and _draws(other) is not None)


@dataclasses.dataclass
class _Group:
    calls: list[_Call]
    reason: str = ""

    def why_not(self, call: _Call) -> str:
        """Returns why ``call`` cannot be computed along with the group, or "" and notes which nodes move."""
        first = self.calls[0]
        if len(self.calls) == LARGEST:
            return f"{LARGEST} others are computed together already"
        # A layer that is in the model under two names has two paths and the same factors.
        if any(call.path == other.path or call.lora_A is other.lora_A for other in self.calls):
            return "it is called again with the same tensor"
        mine, theirs = call.operands(), first.operands()
        if mine is None or theirs is None:
            return "the graph does not tell the dtypes of its tensors, or they are not plain"
        if why := mine.why_apart(theirs):
            return why
        if not call.has_seed_like(first):
            return "its dropout seed was given"
        moved = _nodes_to_move(call, first.node)
        if moved is None:
            return "its parameters are computed after the others are called"
        read = {node for node in call.node.all_input_nodes if node is not call.seed}
        read.update(moved, *(node.all_input_nodes for node in moved))
        node = first.node
        while (node := node.next) is not call.node:
            if may_change(node, read):
                return (
                    f"{node.name} may change its input or parameters, or how it computes, after the others are called"
                )
        call.moved = moved
        return ""


def _groups(graph: fx.Graph) -> Iterator[_Group]:
    """Yields groups of calls with one tensor by layers of one module; no group if there is one call of that kind."""
    calls: dict[tuple[fx.Node, str], list[_Call]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TARGETS and (path := _layer_path(node)):
            call = _Call(node, path)
            if isinstance(call.dropout_p, (int, float)) and _only_ys_are_used(node):
                module = path.rpartition(".")[0] or path  # a compiled function's layers have no module
                calls[call.x, module].append(call)
    for candidates in calls.values():
        groups: list[_Group] = []
        for call in candidates:
            reason = ""
            for group in groups:
                why = group.why_not(call)
                if not why:
                    group.calls.append(call)
                    break
                reason = reason or why
            else:
                groups.append(_Group([call], reason))
        if len(candidates) > 1:
            for group in groups:
                if len(group.calls) > 1:
                    group.reason = ""
                elif not group.reason:
                    group.reason = "the other layers of its module are not computed with it"
            yield from groups


def _shown(call: _Call) -> str:
    # Dynamo's L['self'].layers.0.q_proj
    return re.sub(r"^L\['\w+'\](\[\d+\])?\.?", "", call.path) or call.path


def _layer_path(node: fx.Node) -> str:
    """Returns the path of the layer that called the op, or "" if it is not a layer that shares inputs."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    return path if isinstance(kind, type) and issubclass(kind, SharesInputs) else ""


def _only_ys_are_used(node: fx.Node) -> bool:
    return all(
        user.target is operator.getitem and (user.args[1] == 0 or not user.users) and user.args[0] is node
        for user in node.users
    )


def _draws(call: _Call) -> list[fx.Node] | None:
    """Returns the nodes that draw a seed for this call only (``functional.draw_seed``), the last one first; or None."""
    nodes, user, seed = [], call.node, call.seed
    while isinstance(seed, fx.Node) and list(seed.users) == [user]:
        nodes.append(seed)
        if seed.target is torch.randint:
            return nodes
        if seed.target != "bitwise_xor":
            return None
        user, seed = seed, seed.args[0]
    return None


def _nodes_to_move(call: _Call, first: fx.Node) -> list[fx.Node] | None:
    """Returns the nodes after ``first`` that compute the operands of ``call``, in order; None: some cannot move."""
    found: set[fx.Node] = set()
    waiting = [node for node in call.node.all_input_nodes if node is not call.seed]
    while waiting:
        node = waiting.pop()
        if node < first or node in found:
            continue
        if node.op != "get_attr" and (node.op == "placeholder" or node.target not in _MOVABLE):
            return None
        found.add(node)
        waiting += node.all_input_nodes
    return sorted(found)


def _replace(group: _Group) -> None:
    calls, first = group.calls, group.calls[0].node
    graph = first.graph
    for call in calls:
        for node in call.moved:
            if first < node:
                first.prepend(node)

    def of_all(name: str) -> list:
        return [getattr(call, name) for call in calls]

    layers = [of_all(name) for name in ("weight", "bias", "lora_A", "lora_B", "scaling")]
    with graph.inserting_before(first):
        node = graph.call_function(_SIBLINGS, (calls[0].x, *layers, calls[0].dropout_p, calls[0].seed))
        node.meta = {key: first.meta[key] for key in ("stack_trace", "nn_module_stack") if key in first.meta}
        outputs = graph.call_function(operator.getitem, (node, 0))
        outputs.meta = dict(node.meta)
        for i, call in enumerate(calls):
            y = graph.call_function(operator.getitem, (outputs, i))
            for old in call.ys:
                y.meta = dict(old.meta)
                old.replace_all_uses_with(y)
    for call in calls:
        drawn = _draws(call) or []
        for user in [*call.node.users]:
            graph.erase_node(user)
        graph.erase_node(call.node)
        for seed in drawn if call.node is not first else []:
            graph.erase_node(seed)
