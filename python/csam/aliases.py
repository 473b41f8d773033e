"""Changes in place in a traced network: made such that no operation but one can see them, or refused.

To whoever moves operations, lays tensors out anew or writes steps, every operation gives a value of its own. A model's
`relu_` breaks that where its tensor is read elsewhere too: before or after, by another name, or through a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves


class Aliased(ValueError):
    """A change in place that is seen through a view; says which."""


def settled(traced: fx.GraphModule, probe: Tensor) -> fx.GraphModule:
    """The network with changes only of what nothing else reads; as it came where that is so already.

    What reads a changed tensor afterwards, by whichever name, reads the result of the change; where others have read it
    before, a clone is changed. Who shares memory is seen by running the network on the probe, in its layout.

    Raises:
        Aliased: memory is read after a change, but not as the tensor that was changed.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    made = fx.GraphModule(traced, graph)
    run = _Run(made)
    with torch.inference_mode(False), torch.no_grad():
        run.run(probe.clone(), enable_io_processing=False)
    order: dict[fx.Node, float] = {node: i for i, node in enumerate(made.graph.nodes)}
    touched = False
    for node, memory in run.changes:
        names = [v for v in run.env if order[v] < order[node] and memory & _memory(run.env[v])]
        result = run.env[node]
        for name in names:
            late = [user for user in name.users if order[user] > order[node]]
            if late and not _same(run.env[name], result):
                raise Aliased(f"{node.name} changes in place what {late[0].name} reads as {name.name}")
            touched |= bool(late)
            for user in late:
                user.replace_input_with(name, node)
        if all(user is node or user in names for name in names for user in name.users):
            continue
        changed = next((v for v in node.all_input_nodes if _same(run.env[v], result)), None)
        if changed is None:
            raise Aliased(f"{node.name} changes in place what others have read")
        with made.graph.inserting_before(node):
            clone = made.graph.call_method("clone", (changed,))
        order[clone], touched = order[node] - 0.5, True
        node.replace_input_with(changed, clone)
    made.recompile()
    return made if touched else traced


class _Run(fx.Interpreter):
    """Keeps every value, and which nodes changed memory that was there before."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.changes: list[tuple[fx.Node, set[int]]] = []

    def run_node(self, n: fx.Node) -> Any:
        given = [t for v in n.all_input_nodes for t in _tensors(self.env[v]) if not t.is_inference()]
        before = [t._version for t in given]
        out = super().run_node(n)
        changed = [t for t, version in zip(given, before, strict=True) if t._version != version]
        if changed:
            self.changes.append((n, _memory(changed)))
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _memory(value: Any) -> set[int]:
    """The storages of a node's tensors."""
    return {t.untyped_storage()._cdata for t in _tensors(value)}


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one tensor by two names."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.is_set_to(b)


__all__ = ["Aliased", "settled"]
