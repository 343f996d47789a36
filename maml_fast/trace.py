"""nn.Module -> chain of operations, by torch.fx; what cannot be planned is named with its reason.

A chain is a straight line from the one input to the one output: every value is used once.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from maml_fast.ops import OPERATIONS, WEIGHTED, Operation, Weighted
from maml_fast.ops.base import NameOf
from maml_fast.ops.norm import runs_on_statistics
from maml_fast.ops.reshape import Reshape
from maml_fast.refusals import at_random, draws, label
from maml_fast.signature import HOOKS

MODULES = {module: build for op in OPERATIONS for module, build in op.modules.items()}
CALLS = {call: build for op in OPERATIONS for call, build in op.calls.items()}
WEIGHTED_MODULES = {module: build for op in WEIGHTED for module, build in op.modules.items()}
WEIGHTED_CALLS = {call: build for op in WEIGHTED for call, build in op.calls.items()}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
GLOBAL_HOOKS = tuple("_global" + hooks for hooks in HOOKS)
RESHAPES = ("view", "reshape", torch.reshape)
_TRACING = threading.RLock()  # a model's own code may hold a `MAML`, and plan it


@dataclass
class Link:
    """One operation of a chain, and the layer it came from."""

    name: str
    op: Operation | Weighted


@dataclass
class Chain:
    """The operations in order; `refusals` says what stood in the way, and then the rest is void."""

    links: list[Link] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


class _Refused(Exception):
    pass


class _Tracer(fx.Tracer):
    """Leaves are the modules that operations stand for, and torch's own.

    While it traces, torch.fx has every module's call and parameters go by way of the tracer, those
    of other threads too, which are let be here. And two tracers at once would end in the wrong
    order, the one's way left in place for ever: `_TRACING` lets one in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in MODULES or type(m) in WEIGHTED_MODULES
        return known or super().is_leaf_module(m, module_qualified_name)


def register(kind: type[Operation]) -> None:
    """Make an operation without weights known to the planner, from outside of the package.

    It runs on backend "torch"; the compiled ones know it if its `native` name is one of theirs.
    Plans that were made before do not change. Raises TypeError for what is no Operation, and
    ValueError where one of its modules or calls has an operation already.
    """
    if not (isinstance(kind, type) and issubclass(kind, Operation)):
        raise TypeError(f"kind is {kind!r}; wanted is a class derived from maml_fast.ops.Operation")
    taken = [*(MODULES.keys() & kind.modules.keys()), *(CALLS.keys() & kind.calls.keys())]
    if taken:
        names = sorted(getattr(thing, "__name__", str(thing)) for thing in taken)
        raise ValueError(f"{kind.__name__} stands for {', '.join(names)}, which is planned already")
    OPERATIONS.append(kind)
    MODULES.update(kind.modules)
    CALLS.update(kind.calls)


def trace(model: nn.Module) -> Chain:
    """The chain of operations that `model` computes from its first argument."""
    chain = Chain()
    for name, module in model.named_modules():
        layer = label(name, module)
        if _hooks(module):
            chain.refusals.append(f"{layer}: has hooks, which would not run")
        if "forward" in vars(module):
            chain.refusals.append(f"{layer}: has a forward of its own, beside its class's")
    if any(getattr(torch.nn.modules.module, hooks) for hooks in GLOBAL_HOOKS):
        chain.refusals.append("hooks on all modules are set, which would not run")
    if chain.refusals:
        return chain
    try:
        with _TRACING:
            graph = _Tracer().trace(model, concrete_args=_defaults(model))
    except Exception as error:  # the model's own code runs under the tracer: anything may come
        chain.refusals.append(f"{type(model).__name__}: torch.fx cannot trace it: {error}")
        return chain
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    used: dict[str, str] = {}
    previous: fx.Node | None = None
    for node in _spine(graph, chain):
        if node.op == "output":
            if node.args[0] is not previous:
                chain.refusals.append("the output is not the last operation's one tensor")
            break
        if previous is not None:
            try:
                op = _recognise(node, previous, model, names)
                for parameter in op.parameters if isinstance(op, Weighted) else ():
                    if used.get(parameter) == _label(node):
                        raise _Refused("is used twice")
                    if parameter in used:
                        raise _Refused(f"shares '{parameter}' with layer '{used[parameter]}'")
                    used[parameter] = _label(node)
                if op is not None:
                    chain.links.append(Link(_label(node), op))
            except (_Refused, ValueError, TypeError) as reason:
                chain.refusals.append(f"layer '{_label(node)}' ({_kind(node, model)}): {reason}")
        previous = node
    return chain


def _hooks(module: nn.Module) -> int:
    return sum(len(getattr(module, hooks)) for hooks in HOOKS)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments of forward beside the data, at their defaults, as a call with one argument has."""
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    return {a.name: a.default for a in arguments if a.default is not a.empty}


def _spine(graph: fx.Graph, chain: Chain) -> Iterator[fx.Node]:
    """The nodes that carry the data: from the input on, without parameters and row counts."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs:
        chain.refusals.append("forward takes no input")
        return
    from_data = {inputs[0]}  # and not from an argument's default, or from nothing
    for node in graph.nodes:
        if not from_data.isdisjoint(node.all_input_nodes):
            from_data.add(node)
        if node.op != "output" and (node not in from_data or _is_row_count(node)):
            continue
        if not node.users and node.op not in ("output", "placeholder"):
            continue  # computed and not used
        carried = [user for user in node.users if not _is_row_count(user)]
        if len(carried) > 1 and node.op != "output":
            chain.refusals.append(
                f"value '{_label(node)}' is used {len(carried)} times; only chains can be planned"
            )
        yield node


def _is_row_count(node: fx.Node) -> bool:
    """x.shape, x.size(), x.shape[0], x.size(0): what a view of all rows is told."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target is operator.getitem and _is_row_count(node.args[0])  # type: ignore[arg-type]


def _recognise(
    node: fx.Node, previous: fx.Node, model: nn.Module, names: dict[int, str]
) -> Operation | Weighted | None:
    """The operation of a node, None where it passes its input on; raises the reason if none."""
    arguments = [*node.args, *node.kwargs.values()]
    tensors = [a for a in arguments if isinstance(a, fx.Node) and not _is_row_count(a)]
    data = [a for a in tensors if a.op != "get_attr"]
    if data != [previous]:
        raise _Refused("joins several values, or is out of line; only chains can be planned")
    if node.op == "call_module":
        return _from_module(model.get_submodule(str(node.target)), model, names)
    computed = [n for n in node.all_input_nodes if n is not previous and n.op != "get_attr"]
    if node.target in WEIGHTED_CALLS:
        if computed:
            raise _Refused("an argument is computed from the data")
        named = {key: _attribute(value, model) for key, value in node.kwargs.items()}
        positional = [_attribute(value, model) for value in node.args]
        return WEIGHTED_CALLS[node.target](_names(names), *positional, **named)
    if len(tensors) > 1:
        raise _Refused("uses a parameter or buffer, which only layers that are planned can")
    if node.target in DROPOUT_CALLS:
        _check_dropout_call(model, *node.args, **node.kwargs)  # type: ignore[arg-type]
        return None
    if node.target in RESHAPES:
        return _from_view(node)
    if node.target not in CALLS:
        raise _Refused("no planned operation")
    if computed:
        raise _Refused("an argument is computed from the data")
    positional = [None if value is previous else value for value in node.args]
    named = {key: None if value is previous else value for key, value in node.kwargs.items()}
    return CALLS[node.target](*positional, **named)


def _from_module(
    module: nn.Module, model: nn.Module, names: dict[int, str]
) -> Operation | Weighted | None:
    if type(module) is nn.Identity:
        return None
    if type(module) in DROPOUTS:
        if draws(module):
            raise _Refused(at_random(model, module.p))  # type: ignore[arg-type]
        return None
    if type(module) in WEIGHTED_MODULES:
        return WEIGHTED_MODULES[type(module)](module, _names(names))
    if type(module) not in MODULES:
        raise _Refused("no planned operation")
    return MODULES[type(module)](module)


def _names(names: dict[int, str]) -> NameOf:
    def name_of(tensor: Any) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in names:
            raise _Refused("a weight or bias of it is not one of the model's parameters")
        return names[id(tensor)]

    return name_of


def _attribute(value: Any, model: nn.Module) -> Any:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return value
    owner: Any = model
    for part in str(value.target).split("."):
        owner = getattr(owner, part)
    return owner


def _check_dropout_call(
    model: nn.Module, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    if training and p > 0:
        by_mode = not any(map(runs_on_statistics, model.modules()))
        advice = "pass training=self.training, call model.eval()" if by_mode else "pass p=0"
        raise _Refused(f"draws at random with p={p}; {advice}")


def _from_view(node: fx.Node) -> Reshape:
    shape = node.args[1:] or (node.kwargs.get("shape"),)
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    rows, rest = shape[0], shape[1:]
    if not (isinstance(rows, fx.Node) and _is_row_count(rows)) and rows != -1:
        raise _Refused(f"its first length is {rows}; x.size(0) keeps the rows of a task")
    if not rest or not all(isinstance(n, int) for n in rest) or (rows == -1 and -1 in rest):
        raise _Refused("its lengths are not numbers, but for the rows and one -1")
    return Reshape(tuple(rest))  # type: ignore[arg-type]


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _kind(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
