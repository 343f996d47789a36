"""The smallest kernels around the tile functions of maml_fast.kernels, and tensors through them.

Where there is no GPU they run in Triton's interpreter, or the importing tests are skipped.
"""

import pytest
import torch

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from maml_fast.kernels import losses, pointwise  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _activation(x, y, slope, curve, count, OPS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    z = tl.load(x + at, mask=at < count, other=0.0)
    value = pointwise.value(z, OPS)
    tl.store(y + at, value, mask=at < count)
    kept = value
    if pointwise.keeps_input(OPS):
        kept = z
    tl.store(slope + at, pointwise.slope(kept, OPS), mask=at < count)
    if pointwise.is_curved(OPS):
        tl.store(curve + at, pointwise.curve(kept, OPS), mask=at < count)


def activation(ops, x):
    """f, f', f'' at x, float32; f'' is zero where the kernels do not ask for it."""
    given = x.to(DEVICE, torch.float32).contiguous()
    y, slope = torch.empty_like(given), torch.empty_like(given)
    curve = torch.empty_like(given) if pointwise.is_curved(ops) else torch.zeros_like(given)
    grid = (triton.cdiv(given.numel(), 1024),)
    _activation[grid](given, y, slope, curve, given.numel(), ops, 1024)
    return y.to(x.device), slope.to(x.device), curve.to(x.device)


@triton.jit
def _loss(
    z, y, t_z, row_losses, D, t_D, rows, features,
    LOSS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, C)[None, :]
    mask = (row < rows) & (column < features)
    inside = row * features + column
    # Outside the mask stands what would be seen.
    z_tile = tl.load(z + inside, mask=mask, other=1e6)
    t_tile = tl.load(t_z + inside, mask=mask, other=float("nan"))
    if LOSS == "cross_entropy":
        y_tile = tl.load(y + row, mask=row < rows, other=0)
    else:
        y_tile = tl.load(y + inside, mask=mask, other=3.0)
    # The results are whole tiles, so that what stands outside the mask is seen too.
    found = losses.row_losses(z_tile, y_tile, mask, LOSS)
    tl.store(row_losses + tl.arange(0, R), found)
    whole = row * C + column
    tl.store(D + whole, losses.cotangent(z_tile, y_tile, mask, LOSS))
    tl.store(t_D + whole, losses.tangent(z_tile, y_tile, t_tile, mask, LOSS))


def loss_rules(loss, z, y, t_z, size=None):
    """Losses [R], D and t_D [R, C] of z, t_z [rows, features], with y; padded to size (R, C)."""
    rows, features = z.shape
    R, C = size or (triton.next_power_of_2(rows), triton.next_power_of_2(features))
    z, t_z = z.to(DEVICE, torch.float32), t_z.to(DEVICE, torch.float32)
    y = y.to(DEVICE) if loss == "cross_entropy" else y.to(DEVICE, torch.float32)
    shapes = ((R,), (R, C), (R, C))
    found = [torch.empty(shape, dtype=torch.float32, device=DEVICE) for shape in shapes]
    _loss[(1,)](z, y, t_z, *found, rows, features, loss, R, C)
    return [tensor.cpu() for tensor in found]
