"""What a layer's fast weights are made from, out of a problem."""

from __future__ import annotations

from maml_fast.fast_weights import LayerSpec, LinearSpec
from maml_fast.inner import SGD
from maml_fast.ops import Linear, Weighted
from maml_fast.problem import Problem


def spec_of(op: Weighted, problem: Problem, tasks: int) -> LayerSpec:
    """The layer's parameters, its rates and the rule."""
    assert isinstance(problem.rule, SGD)  # the plan refuses others
    parameters, rates = problem.parameters, problem.rates
    weight, bias = (None if name is None else parameters[name] for name in (op.weight, op.bias))
    weight_rates, bias_rates = (rates.values.get(name or "") for name in (op.weight, op.bias))
    learns = not rates.learning.isdisjoint(op.parameters)
    rest = weight_rates, bias_rates, learns, tasks, problem.inner_steps, problem.rule
    if isinstance(op, Linear):
        assert weight is not None
        return LinearSpec(op, weight, bias, *rest)
    return LayerSpec(op, weight, bias, *rest)
