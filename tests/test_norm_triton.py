"""The norm kernels alone: normalisation, activation and pool in all four passes, against float64.

T tasks, N images of a task, C channels.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.func import jvp, vjp, vmap
from torch.nn import functional as F

from maml_fast.ops import GELU, ReLU, Sigmoid, SiLU, Softplus, Tanh
from tests.networks import assert_close

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from maml_fast.kernels import norm  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-6
TASKS, EPS, RATE, RATE_B = 2, 1e-3, 0.3, 0.2
SMALL = norm.Config(rows=16, columns=4, warps=4)  # several tiles each way, none full
SHAPES = {  # images, height, width, channels
    "batch": norm.Shape(2, 3, 5, 6, "batch"),
    "batch of vectors": norm.Shape(5, 1, 1, 3, "batch"),
    "one channel": norm.Shape(2, 4, 3, 1, "batch"),
    "groups": norm.Shape(2, 3, 3, 6, "rows", group_size=3),
    "instances": norm.Shape(2, 3, 4, 3, "rows", group_size=1),
    "rows": norm.Shape(4, 1, 1, 7, "rows", group_size=7),
    "nothing": norm.Shape(2, 4, 5, 3, "none"),
}
BEHIND = {
    "tanh": ([Tanh()], False),
    "pool": ([], True),
    "silu": ([SiLU()], False),
    "silu and pool": ([SiLU()], True),
    "relu and pool": ([ReLU()], True),
    "a chain": ([Softplus(2.0), Tanh()], False),
}


class Case:
    """Tensors in float64 and torch's order, and what torch makes of them."""

    def __init__(self, shape, operations, draw, affine="gamma and beta", moves=True):
        self.operations = operations
        ops = tuple((op.native[0], *op.native[1]) for op in operations)
        self.shape = s = dataclasses.replace(shape, ops=ops)
        size = TASKS, s.images, s.channels, s.height, s.width
        self.x = 2 * draw.normal(*size) + 3 * draw.normal(s.channels, 1, 1)
        self.t_x = draw.normal(*size) if moves else torch.zeros(size, dtype=torch.float64)
        self.moves, self.affine = moves, affine
        self.gamma = 1 + 0.5 * draw.normal(TASKS, s.channels)
        self.beta, self.lam, self.lam_b = (draw.normal(TASKS, s.channels) for _ in range(3))
        if "gamma" not in affine:
            self.gamma, self.lam = torch.ones_like(self.gamma), torch.zeros_like(self.lam)
        if "beta" not in affine:
            self.beta, self.lam_b = torch.zeros_like(self.beta), torch.zeros_like(self.lam_b)
        out = self.y(self.x, self.gamma, self.beta).shape
        self.dy, self.t_dy = draw.normal(*out), draw.normal(*out)

    def y(self, x, gamma, beta):
        def one(x, gamma, beta):
            s = self.shape
            if s.norm == "batch":
                x = F.batch_norm(x, None, None, None, None, training=True, eps=EPS)
            elif s.norm == "rows":
                x = F.group_norm(x, s.groups, None, None, EPS)
            x = x * gamma[:, None, None] + beta[:, None, None]
            for op in self.operations:
                x = op.oracle(x)
            return F.max_pool2d(x, 2) if s.pool else x

        return vmap(one)(x, gamma, beta)

    def pulled(self, x, gamma, beta, dy):
        """Cotangents of x, gamma, beta."""
        return vjp(self.y, x, gamma, beta)[1](dy)

    @property
    def primals(self):
        return self.x, self.gamma, self.beta

    @property
    def tangents(self):
        return self.t_x, RATE * self.lam, RATE_B * self.lam_b

    def wanted(self):
        y, t_y = jvp(self.y, self.primals, self.tangents)
        first, second = jvp(self.pulled, (*self.primals, self.dy), (*self.tangents, self.t_dy))
        found = {"y": images(y), "t_y": images(t_y), "dx": images(first[0])}
        found["t_dx"] = images(second[0])
        for i, name in ((1, "gamma"), (2, "beta")):
            if name in self.affine and self.shape.norm != "none":
                found |= {f"d {name}": first[i], f"t d {name}": second[i]}
        return found

    def check(self, found):
        """Each tensor by name: at most twice the error of torch in float32, or 1e-6."""
        wanted, single = self.wanted(), copy.copy(self)
        for name, tensor in vars(self).items():
            if isinstance(tensor, torch.Tensor):
                setattr(single, name, tensor.float())
        plain = single.wanted()
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            # Sums over pixels may cancel: their error is that of what they sum.
            size = max(tensor.norm().item(), self.dy.norm().item() if "d " in name else 0)
            error, of_torch = ((t - tensor).norm().item() for t in (found[name], plain[name]))
            assert error <= max(BOUND * size, 2 * of_torch), (name, error, size, of_torch)


def images(x):
    """[T, N, C, height, width] -> [T, pixels, C]"""
    return x.permute(0, 1, 3, 4, 2).flatten(1, 3)


def here(x):
    return x.to(DEVICE, torch.float32).contiguous()


class Passes:
    """All four passes, one after the other, as a network's stage runs them."""

    def __init__(self, case, config=None):
        self.case, self.shape, self.config = case, case.shape, config
        self.by_row = self.shape.norm == "rows"
        own = {}
        if "gamma" in case.affine:
            own |= dict(gamma=here(case.gamma), lam=here(case.lam), rate=RATE)
        if "beta" in case.affine:
            own |= dict(beta=here(case.beta), lam_b=here(case.lam_b), rate_b=RATE_B)
        self.affine = norm.Affine(**own)
        self.x = here(images(case.x))
        self.t_x = here(images(case.t_x)) if case.moves else None
        self.dy, self.t_dy = here(images(case.dy)), here(images(case.t_dy))

    def total(self, kind, factor=1.0, by_group=False, **tensors):
        options = dict(config=self.config, **tensors)
        partials = norm.sums(kind, self.shape, TASKS, self.affine, by_group, **options)
        count, split = self.shape.count, self.shape.count if by_group else norm.SPLIT
        eps = EPS if kind == "forward" else None
        return norm.total(partials, count, split, eps, factor)

    def run(self):
        s, case, config = self.shape, self.case, self.config
        normal, by_row, share = s.norm != "none", self.by_row, 1 / s.count
        pixels, out_pixels = (torch.empty(TASKS, n, s.channels) for n in (s.pixels, s.out_pixels))
        found = {"y": out_pixels, "t_y": out_pixels.clone(), "dx": pixels, "t_dx": pixels.clone()}
        found = {name: tensor.to(DEVICE) for name, tensor in found.items()}
        known = dict(x=self.x)
        if normal:
            known["stats"] = self.total("forward", by_group=by_row, **known)
        code = norm.new_code(s, TASKS, self.x)
        norm.apply("forward", s, found["y"], self.affine, config, **known, code=code)
        known["code"] = code

        known["dy"], sums = self.dy, None
        if normal:
            gradients = sums = self.total("backward", **known)
            if by_row:
                sums = self.total("backward", share, True, **known)
        norm.apply("backward", s, found["dx"], self.affine, config, **known, sums=sums)

        known["t_x"] = self.t_x
        if normal and case.moves:
            t = dict(x=self.x, t_x=self.t_x, stats=known["stats"])
            known["t_stats"] = self.total("tangent", share, by_row, **t)
        t = {name: tensor for name, tensor in known.items() if name != "dy"}
        norm.apply("tangent", s, found["t_y"], self.affine, config, **t)

        known["t_dy"], t_sums = self.t_dy, None
        if normal:
            t_gradients = t_sums = self.total("tangent_backward", **known)
            if by_row:
                t_sums = self.total("tangent_backward", share, True, **known)
            for i, name in ((1, "gamma"), (0, "beta")):
                if name in case.affine:
                    found |= {f"d {name}": gradients[i], f"t d {name}": t_gradients[i]}
        known |= dict(sums=sums, t_sums=t_sums)
        norm.apply("tangent_backward", s, found["t_dx"], self.affine, config, **known)
        return {name: tensor.cpu().double() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("kind", "behind"),
    [("batch", behind) for behind in ("tanh", "pool", "relu and pool", "a chain")]
    + [(kind, "silu" if "of" in kind or kind == "rows" else "silu and pool") for kind in SHAPES],
)
def test_passes(kind, behind, draw):
    shape, (operations, pool) = SHAPES[kind], BEHIND[behind]
    affine = "" if kind == "nothing" else "gamma and beta"
    case = Case(dataclasses.replace(shape, pool=pool), operations, draw, affine)
    case.check(Passes(case, SMALL).run())


@pytest.mark.parametrize("kind", ["batch", "groups"])
@pytest.mark.parametrize(
    ("affine", "moves"), [("", True), ("", False), ("beta", True), ("gamma", False)]
)
def test_weights_that_are_absent(affine, moves, kind, draw):
    """And an input that stands still, as of the first layer that adapts."""
    case = Case(dataclasses.replace(SHAPES[kind], pool=True), [GELU()], draw, affine, moves)
    found = Passes(case).run()
    if not affine and not moves:
        assert not found["t_y"].any()
    case.check(found)


def test_parts_of_a_sum(monkeypatch, draw):
    """Several of them, the last not full, and means far from zero."""
    monkeypatch.setattr(norm, "SPLIT", 8)
    case = Case(norm.Shape(5, 3, 6, 3, "batch"), [Sigmoid()], draw)
    assert case.shape.parts == 12
    case.x = (case.x + 100).float().double()
    case.check(Passes(case).run())


def test_a_total_takes_a_step(draw):
    """Weights that all tasks share and ones of each task's own, no totals, and neither."""
    sums = here(draw.normal(TASKS, 3, 2, 5))
    gamma, beta = here(draw.normal(5)), here(draw.normal(TASKS, 5))
    wanted = {"w": gamma - 0.3 * sums[:, :, 1].sum(1), "b": beta + 0.2 * sums[:, :, 0].sum(1)}
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    nothing = norm.total(
        sums, 1, totals=False, w=gamma, w_out=found["w"], scale=-0.3,
        b=beta, b_out=found["b"], scale_b=0.2,
    )  # fmt: skip
    assert nothing is None
    assert_close(found, wanted, BOUND)
    norm.total(sums, 1, totals=False, w_out=found["w"])
    assert_close({"w": found["w"]}, {"w": sums[:, :, 1].sum(1)}, BOUND)


def test_the_first_of_equal_numbers_is_the_largest_and_nan_is_larger(draw):
    """As torch has it, of all orders of three values in four places."""
    nan = float("nan")
    windows = torch.tensor(list(itertools.product([0.0, 1.0, nan], repeat=4)))
    x = windows.view(len(windows), 1, 2, 2)
    y, places = F.max_pool2d(x, 2, return_indices=True)
    shape = norm.Shape(len(windows), 2, 2, 1, "none", pool=True)
    out = torch.empty(1, len(windows), 1, device=DEVICE)
    code = norm.new_code(shape, 1, out)
    x = x.view(1, -1, 1).to(DEVICE)
    norm.apply("forward", shape, out, norm.Affine(), x=x, code=code)
    assert torch.equal(code.cpu().flatten(), places.flatten().to(torch.int8))
    torch.testing.assert_close(out.cpu().flatten(), y.flatten(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_launch_says_what_runs(kind):
    shape = SHAPES[kind]
    for kernel, last in (("sum", "partials"), ("apply", "out")):
        launch = norm.describe(kernel, "forward", frozenset(("x", last)), TASKS, shape)
        assert set(launch.signature) == set(launch.kernel.arg_names)
        assert launch.constants["stats"] is None
    launch = norm.describe_total(True, frozenset(("partials", "totals")), TASKS, 40)
    assert set(launch.signature) == set(launch.kernel.arg_names)
