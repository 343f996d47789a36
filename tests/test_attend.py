"""The attend kernel alone: each pass's sums and activation against float64."""

import dataclasses

import pytest
import torch

from tests.networks import assert_close

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from maml_fast.kernels.attend import (  # noqa: E402
    Config,
    Segment,
    Sizes,
    Terms,
    attend,
    default_config,
    describe,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-6
SMALL = Config(rows=16, keys=16, features=16, width=16, warps=4, stages=1)


@pytest.mark.parametrize("kind", ["forward", "backward", "tangent", "tangent_backward"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7, 1, 1), (2, 9, 3, 17, 33, 18)])
def test_attend(kind, shape, draw):
    """T, N, M, rows, F, O: both sums of a pass, from scratch."""
    tasks, n, m, rows, f, o = shape
    steps, step = 3, 1
    a, t_a = draw.normal(steps, tasks, n, f), draw.normal(steps, tasks, n, f)
    d, t_d = draw.normal(steps, tasks, n, o), draw.normal(steps, tasks, n, o)
    a_query, d_query = draw.normal(tasks, m, f), draw.normal(tasks, m, o)
    x, lam_x, base = (draw.normal(tasks, rows, size) for size in (f, f, o))
    bias, rates = draw.normal(o), draw.normal(2, steps)
    moved = x @ a[0].mT * -rates[0, 0] - (rates[1, 0] if kind == "forward" else 0)
    wanted = base + bias + moved @ d[0]
    pairs = [(1, a_query, d_query, True), (-1, a[2], t_d[2], True), (-1, t_a[2], d[2], False)]
    for sign, right, left, moves_bias in pairs:
        gram = lam_x @ right.mT * rates[0, step]
        gram += rates[1, step] if moves_bias and kind == "tangent" else 0
        wanted += sign * gram @ left
    ops, z = (("tanh",),), draw.normal(tasks, rows, o)
    y, t_z, dx, add = z.tanh(), draw.normal(tasks, rows, o), None, draw.normal(tasks, rows, o)
    given, slope = {}, 1 - y**2
    before = wanted
    if kind == "forward":
        wanted = wanted.tanh()
    else:
        given["kept"], wanted = y, wanted * slope
    if kind == "tangent_backward":
        dx = draw.normal(tasks, rows, o)
        given |= dict(t_z=t_z, dx=dx, add=add)
        wanted = wanted - 2 * y * slope * t_z * dx + add

    def here(tensor):
        return tensor.to(DEVICE, torch.float32).contiguous()

    right = here(torch.cat([a.flatten(), a_query.flatten(), t_a.flatten()]))
    left = here(torch.cat([t_d.flatten(), d_query.flatten(), d.flatten()]))
    terms = Terms(
        here(base),
        here(bias),
        Segment(here(x), right, here(d), step * n),
        Segment(here(lam_x), right, left, m + 2 * n),
        here(rates),
        step,
        first=(step + 1) * n,
        step_rows=n,
        query_rows=m,
        support_keys=steps * n,
    )
    out = torch.empty(tasks, rows, o, device=DEVICE)
    extra = torch.empty_like(out)
    given = {name: here(tensor) for name, tensor in given.items()}
    attend(kind, terms, ops, out, "tf32x3", extra=extra, config=SMALL, **given)
    found = {"out": out.cpu().double(), "extra": extra.cpu().double()}
    assert_close(found, {"out": wanted, "extra": before}, BOUND)


def test_the_launch_says_what_runs():
    """Arguments that are absent, ones, and multiples of 16 make kernels of their own."""
    sizes = Sizes(tasks=100, rows=70, features=1, width=300, keys=5)
    given = frozenset({"base", "out"})
    launch = describe("forward", (("relu",),), given, sizes, "tf32x3", SMALL)
    assert launch.grid == (100 * 5 * 19,)
    assert launch.signature["base"] == launch.signature["out"] == "*fp32"
    assert launch.constants["bias"] is None
    assert launch.constants["features"] == 1
    assert launch.signature["width"] == "i32"
    assert set(launch.signature) == set(launch.kernel.arg_names)
    wider = dataclasses.replace(sizes, width=320)
    launch = describe("forward", (("relu",),), given, wider, "tf32x3", SMALL)
    assert launch.signature["width"] == "i32:16"


@pytest.mark.parametrize("width", [1, 5, 64, 300])
def test_an_activation_alone(width, draw):
    """No sums: any number of tasks and rows, a bias, and wide rows in several blocks."""
    base, bias = draw.normal(3, 7, width), draw.normal(width)
    sizes = Sizes(tasks=1, rows=21, features=1, width=width, keys=0)
    assert default_config(sizes).rows * default_config(sizes).width == 2048
    terms = Terms(*(t.to(DEVICE, torch.float32) for t in (base, bias)))
    out = torch.empty(3, 7, width, device=DEVICE)
    attend("forward", terms, (("relu",),), out, "tf32x3")
    assert_close({"out": out.cpu().double()}, {"out": (base + bias).relu()}, BOUND)
