"""The launches that ``python -m tests.compiled`` compiles, and the few that the tests do.

They are those of the plans of the benchmark cases, with all tiles that may be chosen, the layer
kernels' (`compiled_layers`, `compiled_images`), and bare products, which show what each precision
becomes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from maml_fast.kernels.fused_program import Network
    from maml_fast.kernels.launch import Launch
    from maml_fast.plan import Plan

# Of each kind, in little time.
SOME = (
    "dot-ieee-16x16x16-1",
    "dot-tf32-16x64x64-4",
    "dot-tf32x3-16x64x64-4",
    "dot-bf16-64x64x64-4",
    "fused sinusoid 16x16x32x32-1 tf32x3",
    "fused sinusoid 16x64x64x64-8 tf32x3",
    "fused policy 16x16x64x64-4 tf32x3",
    "fused scale+sine mse 111",
    "attend backward [m_query+m_key] [base+kept] [relu] 5x5x64x128 tf32x3",
    "attend tangent [m_query+m_key+a_query+a_key] [base+kept] [relu] 5x20x256x128 tf32x3",
    "sum_rows",
    "conv forward [x+weight+partials] 3x3/1+1 5x14x14 64-64 tf32x3",
    "conv outer [x+d+x2+d2+base+bias+bias_out] 3x3/1+1 5x14x14 64-64 tf32x3",
    "norm apply forward batch [relu+pool] [x+code+gamma+beta+stats+out] 5x28x28x64",
    "norm total forward [partials+totals] 64",
)


def launches() -> list[Launch]:
    """All of them. Imports Triton, which is why nothing is imported above: whether it interprets
    is settled by then."""
    from tests import compiled_images, compiled_layers

    found = _products() + _fused() + _variants() + _layers() + compiled_layers.launches()
    found += compiled_images.launches()
    # Sizes that are numbers at run time make no machine code of their own.
    different = {repr(replace(launch, name="", grid=())): launch for launch in reversed(found)}
    return list(reversed({launch.name: launch for launch in different.values()}.values()))


def _products() -> list[Launch]:
    from maml_fast.kernels.launch import Launch
    from tests.compiled_kernels import product

    shapes = [((16, 16, 16), (1,)), ((16, 64, 64), (1, 4, 8)), ((64, 64, 64), (4,))]
    return [
        Launch(
            name=f"dot-{precision}-{'x'.join(map(str, shape))}-{num_warps}",
            kernel=product,
            signature={"a": "*fp32", "b": "*fp32", "c": "*fp32"},
            constants={"SHAPE": shape, "PRECISION": precision},
            num_warps=num_warps,
        )
        for shape, warps in shapes
        for num_warps in warps
        for precision in ("tf32x3", "ieee", "tf32", "bf16")
    ]


def _fused() -> list[Launch]:
    """All tiles that may be chosen; those of the plan in every precision."""
    from maml_fast import triton_plan
    from maml_fast.kernels import fused_program

    found = []
    for case in _perceptrons():
        plan = _plan(case)
        if plan.triton.kernels != "fused":
            continue
        network = _fused_network(plan, case)
        pairs = [(tiles, plan.triton.precision) for tiles in triton_plan.candidates(network)]
        pairs += [(plan.triton.tiles, precision) for precision in triton_plan.PRECISIONS.values()]
        for tiles, precision in pairs:
            cut = f"{tiles.rows}x{tiles.inner}x{tiles.outer}x{tiles.tall}-{tiles.num_warps}"
            name = f"{case.network.name} {cut} {precision}"
            found += fused_program.launches(network, tiles, precision, name)
    return found


def _fused_network(plan: Plan, case: Case) -> Network:
    """What the fused kernel runs."""
    from maml_fast import triton_plan
    from maml_fast.layers import Variant

    adapting = [name for name, _ in case.network.build().named_parameters()]
    variant = Variant.planned(plan.asked, plan.shapes, adapting)
    return triton_plan.network_of(plan.layers, variant, {}, 0)


def _plan(case: Case) -> Plan:
    """The case's plan, for the GPU there is or, without one, an H200."""
    import torch

    from maml_fast import triton_plan
    from maml_fast.layers import Asked, Shapes, plan_layers
    from maml_fast.plan import Plan

    model, row = case.network.build(), case.network.row
    adapting = tuple(name for name, _ in model.named_parameters())
    names = dict(adapting=adapting, learned=adapting)
    asked = Asked(case.network.loss, case.S, False, "triton", "auto", None, **names)
    rows = (case.N, *row), (case.M, *row)
    shapes = Shapes(case.T, *rows, torch.float32, torch.device("cpu"))
    parts, refusals = plan_layers(model, asked, shapes)
    assert not refusals
    layers, triton = triton_plan.plan_for_triton(parts.above, asked, shapes, adapting)
    output = (case.M, *_output(case.network))
    return Plan(
        "triton", "", asked, shapes, output, case.T, layers, moving=list(adapting), triton=triton
    )


def _output(network: Network) -> tuple[int, ...]:
    """The shape of a prediction for one row."""
    import torch

    with torch.no_grad():
        return tuple(network.build()(torch.zeros(2, *network.row)).shape[1:])


def _perceptrons() -> list[Case]:
    """The cases of linear layers and activations alone; for others, see `compiled_images`."""
    from benchmarks.cases import CASES
    from maml_fast.ops import Linear, Weighted

    def weighted(case: Case) -> list[Weighted]:
        return [x.link.op for x in _plan(case).layers if isinstance(x.link.op, Weighted)]

    return [case for case in CASES if all(isinstance(op, Linear) for op in weighted(case))]


class _Nowhere:
    """A kernel that is launched without effect."""

    def __getitem__(self, grid):
        return lambda **arguments: None


def _layers() -> list[Launch]:
    """What the layer kernels of the other cases launch, noted while one task goes through them."""
    from unittest import mock

    import torch

    from maml_fast.backends import stepping
    from maml_fast.backends.triton_layers import LayerStepper
    from maml_fast.kernels import attend
    from maml_fast.problem import Problem, RateTable, TaskBatch

    found: dict[str, Launch] = {}
    describe = attend.describe

    def noted(*arguments):
        launch = describe(*arguments)
        found[launch.name] = launch
        return replace(launch, kernel=_Nowhere())

    for case in _perceptrons():
        plan, network = _plan(case), case.network
        if plan.triton.kernels == "fused":
            continue
        parameters = {n: p.detach() for n, p in network.build().named_parameters()}
        rates = RateTable(dict.fromkeys(parameters, (network.inner_lr,) * case.S))
        problem = Problem(None, parameters, network.loss, case.S, False, rates)
        x, q = (torch.zeros(1, rows, *network.row) for rows in (case.N, case.M))
        targets = (
            (x[..., 0].long(), q[..., 0].long())
            if network.loss == "cross_entropy"
            else (rows.new_zeros(*rows.shape[:2], *_output(network)) for rows in (x, q))
        )
        support_y, query_y = targets
        batch = TaskBatch(x, support_y, q, query_y)
        with mock.patch.object(attend, "describe", noted):
            stepper = LayerStepper(problem, batch, plan, True, plan.triton.precision)
            stepping.drive(stepper, problem, gradient=True)
    return list(found.values())


def _variants() -> list[Launch]:
    """The fused kernel with every activation, loss and option, at one network's sizes."""
    from maml_fast.kernels import fused_program
    from maml_fast.ops import OPERATIONS
    from maml_fast.ops.pointwise import Pointwise

    natives = dict.fromkeys(
        op.native
        for kind in OPERATIONS
        for op, _ in kind.examples()
        if issubclass(kind, Pointwise) and op.native is not None
    )
    chains = [((name, *constants),) for name, constants in natives]
    chains.append((("scale", 3.0), ("sine",)))
    losses = ("mse", "cross_entropy", "bce_with_logits", "huber")
    tiles = fused_program.Tiles(16, 64, 64, 64, 8)
    found = []
    for i, chain in enumerate(chains):
        layers = (
            fused_program.Layer(20, 40, chain, 0, 800),
            fused_program.Layer(40, 5, (), 840, 1040),
        )
        loss, options = losses[i % 4], ((True, True, i % 2 == 0), (True, False, True), (False,) * 3)
        gradient, second_order, learns = options[0 if i < 6 else i % 3]
        network = fused_program.Network(
            layers, loss, 2, 5, 20, gradient, second_order, learns, 1045
        )
        kind = "+".join(op[0] for op in chain)
        name = f"{kind} {loss} {gradient:d}{second_order:d}{learns:d}"
        found += fused_program.launches(network, tiles, "tf32x3", name)
    return found
