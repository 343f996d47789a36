"""What of the MAML family runs on Triton's kernels, fused and layer by layer.

Against the plain loop of backend "reference" in float64.
"""

import copy

import pytest
import torch
from torch import nn

from maml_fast import MAML
from tests.family import everything
from tests.networks import assert_close

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (3, 4, 3, 2)
BOUND = 2e-5

VARIANTS = {
    "losses of all steps": dict(step_weights=[0.2, 0.3, 0.5]),
    "losses of some steps": dict(step_weights=[0.5, 0.7, 0]),
    "losses of all steps, first order": dict(step_weights=[0.2, 0, 0.5], first_order=True),
    "the head adapts": dict(inner_params=["4.*"]),
    "the body adapts": dict(inner_params=["0.*", "2.*"]),
    "the head adapts, losses of all steps": dict(
        inner_params=["4.*"], step_weights=[0.1, 0.2, 0.3]
    ),
}


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned rates"])
@pytest.mark.parametrize("kernels", ["fused", "layers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loop(variant, kernels, learned, draw):
    model, batch = draw.mlp(SIZES), draw.batch("mse", 2, 3, 4, SIZES)
    rate = torch.tensor([0.1, 0.2], dtype=torch.float64)
    given = nn.Parameter(rate) if learned else rate
    wanted = everything(
        MAML(model, "mse", given, 2, backend="reference", **VARIANTS[variant]), batch
    )
    own = copy.deepcopy(model).float().to(DEVICE)
    given = rate.float().to(DEVICE)
    given = nn.Parameter(given) if learned else given
    form = "factored" if kernels == "layers" else "dense"
    options = VARIANTS[variant] | dict(backend="triton", fast_weights=form)
    maml = MAML(own, "mse", given, 2, **options)
    rows = batch.map(lambda x: x.float().to(DEVICE))
    found = {name: x.detach().cpu().double() for name, x in everything(maml, rows).items()}
    assert maml.plan(rows.support_x, rows.query_x).triton.kernels == kernels
    assert_close(found, {name: x.detach() for name, x in wanted.items()}, BOUND)
