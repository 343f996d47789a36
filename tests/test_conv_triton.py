"""The convolution kernels alone: each product, of one pair and of two, against float64.

T tasks, N images of a task, C/K in and out channels.
"""

import pytest
import torch
from torch.func import jvp, vjp, vmap
from torch.nn import functional as F

from tests.networks import assert_close

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from maml_fast.kernels import conv  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-6
TASKS = 2
GEOMETRIES = [  # images, height, width, C, K, kernel, stride, padding
    conv.Geometry(2, 5, 4, 1, 3, 3, 1, 1),  # all taps in one block
    conv.Geometry(1, 5, 6, 3, 20, 3, 2, 1),
    conv.Geometry(2, 4, 5, 2, 1, 3, 1, 0),
    conv.Geometry(1, 4, 6, 18, 17, 3, 2, 0),  # several blocks of channels each way, none full
    conv.Geometry(1, 5, 4, 16, 5, 1, 2, 0),  # pixels that no tap reaches
    conv.Geometry(3, 3, 3, 5, 16, 1, 1, 1),
    conv.Geometry(1, 2, 1, 2, 2, 3, 2, 1),
]
# Several tiles each way
SMALL = conv.Config(rows=16, columns=16, summed=16, warps=4, stages=1)


CUTS = [(geometry, None) for geometry in GEOMETRIES]
CUTS += [(geometry, SMALL) for geometry in GEOMETRIES if geometry.images == 1]


class Case:
    """Tensors in torch's order and float64; `here` has them as the kernels do."""

    def __init__(self, geometry, draw):
        self.geometry = g = geometry
        before, behind = (
            (g.channels, g.height, g.width),
            (g.out_channels, g.out_height, g.out_width),
        )
        self.x, self.t_x = (draw.normal(TASKS, g.images, *before) for _ in range(2))
        self.d, self.t_d = (draw.normal(TASKS, g.images, *behind) for _ in range(2))
        shape = TASKS, g.out_channels, g.channels, g.kernel, g.kernel
        self.weight, self.t_weight = draw.normal(*shape), draw.normal(*shape)
        self.bias, self.t_bias = (draw.normal(TASKS, g.out_channels) for _ in range(2))

    def convolve(self, x, weight, bias=None):
        """Of each task"""

        def one(x, weight):
            return F.conv2d(x, weight, None, self.geometry.stride, self.geometry.padding)

        z = vmap(one)(x, weight)
        return z if bias is None else z + bias[:, None, :, None, None]

    def pulled(self, d):
        """Of x and the weight, from a cotangent."""
        return vjp(self.convolve, self.x, self.weight)[1](d)


def images(x):
    """[T, N, C, height, width] -> [T, N * height * width, C]"""
    return here(x.permute(0, 1, 3, 4, 2).flatten(1, 3))


def weights(w):
    """[.., K, C, kernel, kernel] -> [.., taps, C, K]"""
    return here(w.flatten(-2).movedim(-1, -3).mT)


def here(x):
    return x.to(DEVICE, torch.float32).contiguous()


def empty(like):
    return torch.empty_like(here(like))


def check(found, wanted):
    found = {name: tensor.cpu().double() for name, tensor in found.items()}
    assert_close(found, {name: tensor.double().cpu() for name, tensor in wanted.items()}, BOUND)


@pytest.mark.parametrize(("geometry", "cut"), CUTS)
class TestProducts:
    def test_forward(self, geometry, cut, draw):
        """Shared weights and a bias, and the statistics of each tile."""
        case = Case(geometry, draw)
        weight, bias = case.weight[0], case.bias[0]
        wanted = images(case.convolve(case.x, weight.expand_as(case.weight)) + bias[:, None, None])
        out = torch.empty_like(wanted)
        count, rows = conv.tiles_of(geometry, cut)
        partials = torch.empty(TASKS, count, 2, geometry.out_channels, device=DEVICE)
        conv.convolve(
            "forward", geometry, out, "tf32x3", images(case.x), weights(weight),
            bias=here(bias), partials=partials, config=cut,
        )  # fmt: skip
        check({"z": out}, {"z": wanted})
        tiles = out.double().split(rows, 1)
        mean = torch.stack([tile.mean(1) for tile in tiles], 1)
        square = torch.stack([tile.var(1, correction=0) * tile.shape[1] for tile in tiles], 1)
        check({"mean": partials[:, :, 0]}, {"mean": mean})
        if max(tile.shape[1] for tile in tiles) > 1:
            check({"square": partials[:, :, 1]}, {"square": square})

    def test_backward(self, geometry, cut, draw):
        """Weights of each task's own."""
        case = Case(geometry, draw)
        wanted = images(case.pulled(case.d)[0])
        out = torch.empty_like(wanted)
        conv.convolve(
            "backward", geometry, out, "tf32x3", images(case.d), weights(case.weight), config=cut
        )
        check({"dx": out}, {"dx": wanted})

    def test_tangent(self, geometry, cut, draw):
        """Two pairs, the second scaled, as of the rate."""
        case = Case(geometry, draw)
        primals, tangents = (case.x, case.weight, case.bias), (case.t_x, case.t_weight, case.t_bias)
        scaled = tangents[0], 0.3 * tangents[1], 0.2 * tangents[2]
        wanted = images(jvp(case.convolve, primals, scaled)[1])
        out = torch.empty_like(wanted)
        conv.convolve(
            "forward", geometry, out, "tf32x3", images(case.t_x), weights(case.weight),
            images(case.x), weights(case.t_weight), 0.3, here(case.t_bias), 0.2, config=cut,
        )  # fmt: skip
        check({"t_z": out}, {"t_z": wanted})

    def test_tangent_backward(self, geometry, cut, draw):
        case = Case(geometry, draw)

        def backward(d, weight):
            return vjp(case.convolve, case.x, weight)[1](d)[0]

        t_weight = -0.7 * case.t_weight
        wanted = images(jvp(backward, (case.d, case.weight), (case.t_d, t_weight))[1])
        out = torch.empty_like(wanted)
        conv.convolve(
            "backward", geometry, out, "tf32x3", images(case.t_d), weights(case.weight),
            images(case.d), weights(case.t_weight), -0.7, config=cut,
        )  # fmt: skip
        check({"t_dx": out}, {"t_dx": wanted})

    def test_outer(self, geometry, cut, draw):
        """A step down from weights that all tasks share."""
        case = Case(geometry, draw)
        base, bias = case.weight[0], case.bias[0]
        wanted = {
            "weight": weights(base - 0.3 * case.pulled(case.d)[1]),
            "bias": here(bias - 0.2 * case.d.sum((1, 3, 4))),
        }
        found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
        conv.outer(
            geometry, found["weight"], "tf32x3", images(case.x), images(case.d), scale=-0.3,
            base=weights(base), bias_out=found["bias"], bias_scale=-0.2, bias=here(bias),
            config=cut,
        )  # fmt: skip
        check(found, wanted)

    def test_outer_tangent(self, geometry, cut, draw):
        """What a Hessian-vector product takes off each task's adjoint, in place."""
        case = Case(geometry, draw)

        def gradient(x, d):
            return vjp(case.convolve, x, case.weight)[1](d)[1]

        t_gradient = jvp(gradient, (case.x, case.d), (case.t_x, case.t_d))[1]
        wanted = {
            "lam": weights(case.t_weight - t_gradient),
            "lam_b": here(case.t_bias - case.t_d.sum((1, 3, 4))),
        }
        lam, lam_b = weights(case.t_weight), here(case.t_bias)
        conv.outer(
            geometry, lam, "tf32x3", images(case.x), images(case.t_d), images(case.t_x),
            images(case.d), -1.0, lam, lam_b, -1.0, lam_b, config=cut,
        )  # fmt: skip
        check({"lam": lam, "lam_b": lam_b}, wanted)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("ieee", 0, 1e-6), ("tf32", 1e-5, 1e-3), ("bf16", 1e-4, 1e-2)]
)
def test_precisions(precision, least, most, draw):
    case = Case(GEOMETRIES[3], draw)
    wanted = images(case.convolve(case.x, case.weight))
    out = torch.empty_like(wanted)
    conv.convolve("forward", case.geometry, out, precision, images(case.x), weights(case.weight))
    error = ((out - wanted).norm() / wanted.norm()).item()
    assert least <= error <= most


def test_the_first_pair_may_be_absent(draw):
    """Of the first layer, whose input stands still, the tangent is of its weights alone."""
    case = Case(GEOMETRIES[1], draw)
    wanted = images(0.5 * case.convolve(case.x, case.t_weight))
    out = torch.empty_like(wanted)
    conv.convolve(
        "forward", case.geometry, out, "tf32x3", None, None, images(case.x), weights(case.t_weight),
        0.5,
    )  # fmt: skip
    check({"t_z": out}, {"t_z": wanted})


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_launch_says_what_runs(geometry):
    """Arguments that are absent, ones, and multiples of 16 make kernels of their own."""
    given = {"forward": ("x", "weight", "out"), "outer": ("x", "d", "out")}
    given["backward"] = given["forward"]
    for kind, names in given.items():
        launch = conv.describe(kind, frozenset(names), TASKS, geometry, "tf32x3", SMALL)
        assert set(launch.signature) == set(launch.kernel.arg_names)
        channels = geometry.out_channels if kind == "backward" else geometry.channels
        assert launch.constants["FOLD"] == (channels < 16)
        wanted = "constexpr" if channels == 1 else "i32:16" if channels % 16 == 0 else "i32"
        assert launch.signature["channels"] == wanted
