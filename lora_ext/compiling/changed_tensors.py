"""Finds the tensors that a node of Dynamo's graph may change. These graphs have in-place operations and views."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

# operator.iadd, ..., setitem
_IN_PLACE = {getattr(operator, n) for n in dir(operator) if n.startswith("i") and hasattr(operator, n[1:])}
_IN_PLACE |= {operator.setitem, operator.delitem}
_CHANGE_STATISTICS = (F.batch_norm, F.instance_norm)
_RENORMALISE = (F.embedding, F.embedding_bag)  # the weight, with max_norm, their fourth argument
_KNOWN = ("torch", "_operator", "operator", "math", "builtins")  # packages whose functions change what their names say


def may_change(node: fx.Node, tensors: Iterable[fx.Node]) -> bool:
    """Returns whether ``node`` may change one of ``tensors``, or how later nodes compute (autocast, gradient mode)."""
    changed = _changed_arguments(node)
    if changed is None:
        return False
    if not changed:
        return not isinstance(node.meta.get("example_value"), Tensor)  # a random tensor changes nothing else
    storages, others = _storages(changed), _storages(tensors)
    return storages is None or others is None or not storages.isdisjoint(others)


def _changed_arguments(node: fx.Node) -> list[fx.Node] | None:
    """Returns the arguments that ``node`` may change, [] if it changes something else, or None if it changes nothing.

    If it is not known which arguments change, all are returned.
    """
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if node.op == "call_method":
        return node.all_input_nodes if target.endswith("_") else None
    if isinstance(target, OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload) and target._schema.is_mutable:
        arguments = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
        arguments |= node.kwargs
        written = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        leaves = pytree.tree_leaves([arguments.get(name) for name in written])
        return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    if node.op == "call_module" or isinstance(target, HigherOrderOperator):
        return node.all_input_nodes
    return node.all_input_nodes if node.is_impure(impure_random=False) or _is_in_place(node) else None


def _is_in_place(node: fx.Node) -> bool:
    """Returns whether a function that is not an op changes an argument, according to its name and the arguments."""
    if isinstance(node.target, OpOverload):
        return False
    if any(value is True for value in (*node.args, node.kwargs.get("inplace"))):  # F.dropout(x, 0.1, True, True)
        return True
    if node.target in _CHANGE_STATISTICS:
        return True
    if node.target in _RENORMALISE:
        return (node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")) is not None
    if (getattr(node.target, "__module__", None) or "torch").partition(".")[0] not in _KNOWN:
        return True  # a function of torch.compiler.allow_in_graph
    name = getattr(node.target, "__name__", "_")  # what has no name may do anything
    return node.target in _IN_PLACE or name.endswith("_") or "out" in node.kwargs


def _storages(nodes: Iterable[fx.Node]) -> set[int] | None:
    """Returns the storages of the tensors of ``nodes``, or None if the graph does not tell."""
    storages = set()
    for node in nodes:
        if "example_value" not in node.meta:
            return None
        for value in pytree.tree_leaves(node.meta["example_value"]):
            if isinstance(value, Tensor):
                try:
                    storages.add(value.untyped_storage()._cdata)
                except (NotImplementedError, RuntimeError):  # sparse, nested and wrapped tensors
                    return None
    return storages
