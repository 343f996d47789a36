"""`profile`: where a meta-step's time and memory go, layer by layer and pass by pass."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from maml_fast.layers import LayerPlan
from maml_fast.live_memory import LiveMemory
from maml_fast.maml import MAML
from maml_fast.options import check_count
from maml_fast.plan import Plan
from maml_fast.profiled import LayerProfile, PartProfile, Profile
from maml_fast.recorder import OUTSIDE, PASSES, Key, Recorder
from maml_fast.results import MetaStepResult

SECONDS, LEAST, MOST = 1.0, 6, 400  # that are spent unless told otherwise, and how many meta-steps

UNTOLD = {
    "reference": "layers are not told apart: the adjoint is autograd's way back through one graph "
    "of all layers and steps; the way back through the query counts as adjoint",
    "functional": "layers are not told apart: torch.func runs a pass as one function under vmap "
    "and grad, where a module is called once for values and never for derivatives",
    "fused": "neither layers nor passes are told apart: all of it is one launch of a kernel",
    "triton": "layers are not told apart: a launch stands for several of them, or parts of one",
}


def profile(
    maml: MAML,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    support_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    repeats: int | None = None,
) -> Profile:
    """Run the meta-step of a batch of tasks some times and measure where its time goes.

    The data are those of `MAML.forward`. repeats: meta-steps that are measured, in turns with as
    many that are not; None: about a second's. Results have the same bits as without measuring;
    gradients in `.grad` are not touched.
    Raises TypeError for what is no MAML, and else as `MAML.forward` does.
    """
    if not isinstance(maml, MAML):
        raise TypeError(f"maml is {type(maml).__name__}; wanted is a maml_fast.MAML")
    if repeats is not None:
        check_count("repeats", repeats, least=1)
    data = support_x, support_y, query_x, query_y, support_weight, query_weight
    _run(maml, data)  # what does not fit is told here; and kernels are compiled, tiles chosen
    plan = maml._prepare(maml._batch(*data), maml.inner_steps)[0].plan
    device = plan.shapes.device
    took = _timed(maml, data, device)[1]
    count = min(max(int(SECONDS / 2 / max(took, 1e-9)), LEAST), MOST)
    loss, plain, measured = 0.0, [], []
    for _ in range(count if repeats is None else repeats):
        plain.append(_timed(maml, data, device)[1])
        with recording(plan) as recorder:
            result, took = _timed(maml, data, device)
        loss = result.loss.item()
        measured.append((took, recorder))
    measured.sort(key=lambda pair: pair[0])
    best = measured[: (len(measured) + 1) // 2]
    plain = sorted(plain)[: len(best)]
    peak, alive = _memory(maml, data, plan)
    engine = best[0][1]
    arenas = engine.arena_bytes + engine.other_arena_bytes
    total_ms = 1e3 * sum(took for took, _ in best) / len(best)
    cells = _mean([recorder for _, recorder in best])
    return Profile(
        backend=plan.backend,
        about=_about(plan),
        loss=loss,
        repeats=len(measured),
        total_ms=total_ms,
        plain_ms=1e3 * sum(plain) / len(plain),
        threads=engine.threads or (1 if device.type == "cuda" else torch.get_num_threads()),
        layers=tuple(_layers(plan, cells, engine, alive)),
        parts=tuple(_parts(cells, engine)),
        arena_bytes=engine.arena_bytes,
        sum_bytes=engine.sum_bytes,
        peak_bytes=peak + engine.threads * arenas + engine.sum_bytes,
        notes=(*_notes(plan), *_more_arenas(engine)),
    )


@contextmanager
def recording(plan: Plan) -> Iterator[Recorder]:
    """Within, this thread's meta-steps by the plan are measured."""
    recorder = Recorder(plan.shapes.device)
    plan.recorder = recorder
    try:
        yield recorder
    finally:
        plan.recorder = None
        recorder.finish()


def _run(maml: MAML, data: tuple[Tensor | None, ...]) -> MetaStepResult:
    """The meta-step and its gradients, which go nowhere."""
    result: MetaStepResult = maml(*data)
    if result.loss.requires_grad:
        by_data = [x for x in data if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(result.loss, [*maml.inputs(), *by_data], allow_unused=True)
    return result


def _timed(
    maml: MAML, data: tuple[Tensor | None, ...], device: torch.device
) -> tuple[MetaStepResult, float]:
    """In seconds."""
    _wait_for(device)
    start = time.perf_counter()
    result = _run(maml, data)
    _wait_for(device)
    return result, time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(
    maml: MAML, data: tuple[Tensor | None, ...], plan: Plan
) -> tuple[int, dict[Key | None, int]]:
    """The most bytes of tensors that were alive at once, and then by layer."""
    if plan.backend == "triton":  # kernels take what no operation of torch's is seen to make
        return _on_gpu(maml, data, plan.shapes.device), {}
    with recording(plan) as recorder, LiveMemory(lambda: recorder.current) as live:
        _run(maml, data)
    return live.peak, live.at_peak


def _on_gpu(maml: MAML, data: tuple[Tensor | None, ...], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _run(maml, data)
    torch.cuda.synchronize(device)
    return max(torch.cuda.max_memory_allocated(device) - before, 0)


def _mean(recorders: list[Recorder]) -> dict[tuple[Key, str], float]:
    """Milliseconds, {(key, pass): ms}"""
    found: defaultdict[tuple[Key, str], float] = defaultdict(float)
    for recorder in recorders:
        for cell, seconds in recorder.seconds.items():
            found[cell] += 1e3 * seconds / len(recorders)
    return found


def _by_pass(cells: dict[tuple[Key, str], float], key: Key) -> tuple[float, float, float]:
    inner, query, adjoint = (cells.get((key, name), 0.0) for name in PASSES)
    return inner, query, adjoint


def _layers(
    plan: Plan,
    cells: dict[tuple[Key, str], float],
    engine: Recorder,
    alive: dict[Key | None, int],
) -> Iterator[LayerProfile]:
    """Those that run as one together; what no backend has to do, with no time."""
    layers = [*plan.body, *plan.layers]
    keys = {key for key, _ in cells if not isinstance(key, str)} | {
        key for key in engine.own_bytes if not isinstance(key, str)
    }
    groups = {key[0]: key for key in keys}
    counts = plan.shapes.tasks * (not plan.loops)
    number = 0
    while number < len(layers):
        key = groups.get(number, (number,))
        members = [layers[i] for i in range(number, number + len(key))]
        number += len(key)
        yield LayerProfile(
            layers=tuple(layer.link.name for layer in members),
            operations=tuple(str(layer.link.op) for layer in members),
            forms=tuple(_form(layer) for layer in members),
            milliseconds=_by_pass(cells, key) if plan.backend in ("cpu", "torch") else None,
            flops=counts * sum(layer.cost.flops for layer in members if layer.cost),
            own_bytes=engine.own_bytes.get(key),
            value_bytes=engine.value_bytes.get(key),
            alive_bytes=alive.get(key, 0) if plan.backend == "torch" else None,
            note="in the layers beside it" if key in engine.elsewhere else "",
        )


def _form(layer: LayerPlan) -> str:
    return ("once, " if layer.prelude and layer.form else "") + layer.form


def _parts(cells: dict[tuple[Key, str], float], engine: Recorder) -> Iterator[PartProfile]:
    names = dict.fromkeys(key for key, _ in cells if isinstance(key, str))
    names.update(dict.fromkeys(key for key in engine.own_bytes if isinstance(key, str)))
    for name in names:
        held = engine.own_bytes.get(name, 0) + engine.value_bytes.get(name, 0)
        if not held and not any(key == name for key, _ in cells):
            continue
        yield PartProfile(
            name, _by_pass(cells, name), cells.get((name, OUTSIDE), 0.0), held or None
        )


def _about(plan: Plan) -> str:
    shapes, asked = plan.shapes, plan.asked
    how = f" ({plan.cpu.instruction_set}, {plan.cpu.layout.replace('_', ' ')})" if plan.cpu else ""
    if plan.triton is not None:
        how = f" ({plan.triton.kernels})"
    return (
        f"backend {plan.backend}{how}: {shapes.tasks} tasks, {plan.chunk_size} a pass; "
        f"{shapes.support[0]} support and {shapes.query[0]} query rows; {asked.inner_steps} inner "
        f"steps; {str(shapes.dtype).removeprefix('torch.')} on {shapes.device}"
    )


def _more_arenas(engine: Recorder) -> list[str]:
    if not engine.other_arena_bytes:
        return []
    more = engine.other_arena_bytes / 1024
    return [f"inner loops of other lengths keep {more:.1f} KiB a thread more, counted in the peak"]


def _notes(plan: Plan) -> Iterator[str]:
    fused = plan.triton is not None and plan.triton.kernels == "fused"
    if (reason := UNTOLD.get("fused" if fused else plan.backend)) is not None:
        yield reason
    if plan.cpu is not None and plan.cpu.replays:
        yield "the adjoint computes each inner step's values again, which counts as adjoint"
    if plan.loops:
        yield f"{plan.loops}; so no GFLOP/s are given"
    if plan.backend == "triton" and plan.shapes.device.type != "cuda":
        yield "kernels in Triton's interpreter: their times say nothing of a GPU, nor of memory"
