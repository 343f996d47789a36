"""The matmul kernel against float64."""

import pytest
import torch

from tests.networks import assert_close

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from maml_fast.kernels.matmul import ENGINES, Tiles, describe, product  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(m=16, n=16, k=16, warps=4, stages=1)


def check(wanted, *tensors, bound=1e-6, **options):
    here = [None if t is None else t.to(DEVICE, torch.float32) for t in tensors]
    for t, own in zip(tensors, here, strict=True):
        assert t is None or t.stride() == own.stride()
    found = product(*here, **options).cpu().double()
    assert_close({"product": found}, {"product": wanted}, bound)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (150, 35, 20)])
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_layouts(engine, shape, transposed, draw):
    m, n, k = shape
    a = draw.normal(k, m).mT if "a" in transposed else draw.normal(m, k)
    b = draw.normal(n, k).mT if "b" in transposed else draw.normal(k, n)
    check(a @ b, a, b, engine=engine, tiles=SMALL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shared", ["", "a", "b"])
def test_batches(engine, shared, draw):
    """With all that may be added; a matrix for all the batch is not copied."""
    a = draw.normal(18, 9) if shared == "a" else draw.normal(3, 18, 9)
    b = draw.normal(9, 17) if shared == "b" else draw.normal(3, 9, 17)
    bias, c = draw.normal(17), draw.normal(3, 18, 17)
    wanted = 0.5 * (a @ b) - 2 * c + bias
    check(wanted, a, b, bias, c, alpha=0.5, beta=-2.0, engine=engine, tiles=SMALL)


def test_the_default_tiles(draw):
    a, b = draw.normal(140, 40), draw.normal(70, 40).mT
    check(a @ b, a, b, engine="triton")


def test_precision_reaches_the_kernel(draw):
    a, b = draw.normal(8, 32), draw.normal(32, 8)
    check(a @ b, a, b, engine="triton", precision="ieee")
    for precision in ("tf32", "bf16"):
        with pytest.raises(AssertionError):
            check(a @ b, a, b, engine="triton", precision=precision, bound=1e-5)
        check(a @ b, a, b, engine="triton", precision=precision, bound=2e-2)


def test_the_launch_says_what_runs():
    strides = (0, 64, 1, 0, 1, 20, 300, 30)
    launch = describe(2, (10, 30, 64), strides, frozenset({"bias"}), "tf32x3", SMALL)
    assert launch.grid == (2 * 1 * 2,)
    assert set(launch.signature) == set(launch.kernel.arg_names)
    assert launch.constants["a_column"] == launch.constants["b_row"] == 1
    assert launch.signature["a_row"] == "i32:16"
    assert launch.signature["b_column"] == "i32"
    assert launch.constants["c"] is None
