"""Where there is a GPU: the kernels of networks of images at the sizes they are for, in all
precisions, and past the numbers that 32 bits can count."""

import gc

import pytest
import torch
from torch.nn import functional as F

from tests import gpu_cases
from tests.gpu_cases import BOUND, LESS_EXACT, PRECISIONS, error_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
pytest.importorskip("triton")
GEOMETRIES = {  # images, height, width, C, K, kernel, stride, padding
    "pooled": (5, 14, 14, 64, 64, 3, 1, 1),
    "small images": (5, 3, 3, 64, 64, 3, 1, 1),
    "strides": (5, 14, 14, 64, 64, 3, 2, 1),
    "32 channels": (3, 21, 21, 32, 32, 3, 1, 1),
    "first": (5, 28, 28, 1, 64, 3, 1, 1),
    "colours": (2, 42, 42, 3, 32, 3, 2, 1),
    "1x1": (5, 7, 7, 128, 256, 1, 1, 0),
    "odd channels": (5, 7, 6, 20, 40, 3, 2, 0),
}
PRODUCTS = ("forward", "backward", "tangent", "tangent_backward", "outer", "outer_tangent")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_convolutions(product, name, precision, draw, monkeypatch):
    from maml_fast.kernels import conv
    from tests import test_conv_triton

    def launch(kind, given, tasks, geometry, _, config):
        return describe(kind, given, tasks, geometry, precision, config)

    describe = conv.describe
    monkeypatch.setattr(conv, "describe", launch)
    # Statistics of a tile are compared with those of its own numbers, whatever their precision.
    bound = LESS_EXACT[precision][1] if precision in LESS_EXACT else BOUND
    monkeypatch.setattr(test_conv_triton, "BOUND", bound)
    geometry = conv.Geometry(*GEOMETRIES[name])
    getattr(test_conv_triton.TestProducts(), f"test_{product}")(geometry, None, draw)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 28, 28, 64, "batch", 1),
        (5, 21, 19, 32, "batch", 1),
        (20, 1, 1, 256, "batch", 1),
        (5, 7, 5, 20, "batch", 1),
        (5, 14, 14, 64, "rows", 16),
        (20, 1, 1, 256, "rows", 256),
        (3, 13, 12, 48, "none", 1),
    ],
    ids=str,
)
def test_norms(sizes, pool, draw):
    from maml_fast.kernels import norm
    from maml_fast.ops import SiLU
    from tests import test_norm_triton

    *sizes, how, group_size = sizes
    pool = pool and min(sizes[1:3]) > 1
    shape = norm.Shape(*sizes, how, pool=pool, group_size=group_size)
    affine = "" if how == "none" else "gamma and beta"
    case = test_norm_triton.Case(shape, [SiLU()], draw, affine)
    case.check(test_norm_triton.Passes(case).run())


class TestPast2To31:
    """Numbers whose place in a tensor no 32 bits can say."""

    tasks, channels, size = 540_000, 16, 16

    @pytest.fixture(autouse=True)
    def memory(self):
        assert self.tasks * self.channels * self.size**2 > 2**31
        if why := gpu_cases.needs_memory(30):
            pytest.skip(why)
        yield
        gc.collect()
        torch.cuda.empty_cache()

    @pytest.fixture
    def normal(self):
        generator = torch.Generator(gpu_cases.DEVICE).manual_seed(0)
        return lambda *shape: torch.randn(*shape, generator=generator, device=gpu_cases.DEVICE)

    @pytest.fixture
    def x(self, normal):
        """[T, pixels, C]"""
        return normal(self.tasks, self.size**2, self.channels)

    @property
    def places(self):
        """Tasks at the beginning, around number 2^31, and at the end."""
        border = 2**31 // (self.channels * self.size**2)
        ends = 20, border + 10, self.tasks
        return [slice(end - 20, end) for end in ends]

    def images(self, x):
        """[20, C, size, size] in float64, of one image a task"""
        return x.double().unflatten(1, (self.size, self.size)).movedim(-1, 1)

    @pytest.mark.parametrize("kind", ["forward", "backward"])
    def test_convolution(self, kind, x, normal):
        from maml_fast.kernels import conv

        c = self.channels
        geometry = conv.Geometry(1, self.size, self.size, c, c, 3, 1, 1)
        weight, out = normal(9, c, c), torch.empty_like(x)
        conv.convolve(kind, geometry, out, "tf32x3", x, weight)
        as_torch = weight.double().permute(2, 1, 0).unflatten(2, (3, 3))
        product = F.conv2d if kind == "forward" else F.conv_transpose2d
        for place in self.places:
            wanted = product(self.images(x[place]), as_torch, padding=1)
            assert error_of(self.images(out[place]), wanted) <= BOUND, place

    def test_weights(self, x, normal):
        from maml_fast.kernels import conv

        c = self.channels
        geometry = conv.Geometry(1, self.size, self.size, c, 1, 1, 1, 0)
        d, out = (
            normal(self.tasks, self.size**2, 1),
            torch.empty(self.tasks, 1, c, 1, device="cuda"),
        )
        conv.outer(geometry, out, "tf32x3", x, d)
        for place in self.places:
            wanted = x[place].double().mT @ d[place].double()
            assert error_of(out[place, 0], wanted) <= 2 * BOUND, place

    def test_norm(self, x):
        from maml_fast.kernels import norm

        shape = norm.Shape(1, self.size, self.size, self.channels, "batch", (("tanh",),))
        partials = norm.sums("forward", shape, self.tasks, norm.Affine(), x=x)
        stats = norm.total(partials, shape.count, eps=1e-5)
        out = torch.empty_like(x)
        norm.apply("forward", shape, out, norm.Affine(), x=x, stats=stats)
        for place in self.places:
            rows = x[place].double()
            apart = rows - rows.mean(1, keepdim=True)
            wanted = (apart / (apart.square().mean(1, keepdim=True) + 1e-5).sqrt()).tanh()
            assert error_of(out[place], wanted) <= BOUND, place
