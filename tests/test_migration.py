"""What docs/migration shows runs, and its meta-gradients are the peers'; and what it says of them
besides."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from maml_fast import MAML
from tests import migration
from tests.migration import PAGES, TOLERANCE

ROOT = Path(__file__).parent.parent
PEERS = {  # by page, and whether it is run in this process
    "learn2learn": True,
    "higher": True,
    "torchopt": True,
    "torch_func": True,
    "jax": False,  # double precision is an option of the whole process there
}
HERE = [
    (page, section)
    for page, in_process in PEERS.items()
    if in_process
    for section in migration.pairs(PAGES / f"{page}.md")
]


def need(page: str) -> None:
    """All peers come with the extra "test", but for one."""
    if page == "learn2learn" and not importlib.util.find_spec("learn2learn"):
        pytest.skip(
            "learn2learn is not installed: version 0.2.0 needs Python 3.10 or older (its generated "
            "C includes longintrepr.h) and NumPy 1 (by way of qpth)"
        )


@pytest.mark.parametrize(("page", "section"), HERE)
def test_the_meta_gradients_are_the_same(page, section):
    need(page)
    found = migration.errors(*migration.run(PAGES / f"{page}.md", section))
    assert max(found.values()) < TOLERANCE, found


def test_the_meta_gradients_of_jax_are_the_same():
    command = [sys.executable, "-m", "tests.migration", str(PAGES / "jax.md")]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == migration.pairs(PAGES / "jax.md").keys()
    for section, errors in found.items():
        assert max(errors.values()) < TOLERANCE, (section, errors)


@pytest.mark.parametrize("page", PEERS)
def test_each_page_has_the_pairs_that_all_have(page):
    sections = migration.pairs(PAGES / f"{page}.md")
    assert {"Several steps, second order", "First order"} <= sections.keys()
    assert len(sections) >= 4


def test_all_pages_are_run():
    assert {page.stem for page in PAGES.glob("*.md")} == {*PEERS, "index"}
    assert [block.title for block in migration.blocks(PAGES / "index.md")] == ["setup"]


def test_links_lead_to_pages():
    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (PAGES / target.split("#")[0]).is_file(), (page.name, target)


def test_a_wrong_gradient_would_be_seen():
    theirs, ours = migration.run(PAGES / "torch_func.md", "Several steps, second order")
    first, _ = migration.run(PAGES / "torch_func.md", "First order")
    assert min(migration.errors(theirs, first).values()) > 1e-3
    off = {**ours, "2.bias": ours["2.bias"] * (1 + 2e-9)}
    assert max(migration.errors(theirs, off).values()) > TOLERANCE
    for wrong in ({}, {**ours, "more": ours["2.bias"]}, {**ours, "2.bias": ours["0.bias"]}):
        with pytest.raises(ValueError, match="ours"):
            migration.errors(theirs, wrong)
    with pytest.raises(ValueError, match="all but 0"):
        migration.errors({"p": torch.zeros(2).double()}, {"p": torch.zeros(2).double()})


def test_code_that_is_not_compared_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('## A\n\n```python title="higher"\ntheirs = {}\n```\n')
    with pytest.raises(ValueError, match=r"section 'A' has blocks \['higher'\]"):
        migration.pairs(page)
    page.write_text("## A\n\n```python\ntheirs = {}\n```\n")
    with pytest.raises(ValueError, match="without a title"):
        migration.pairs(page)


# What the pages say besides


@pytest.fixture
def shared() -> dict:
    """What index.md sets up."""
    scope: dict = {}
    for block in migration.blocks(PAGES / "index.md"):
        exec(compile(block.code, block.title, "exec", dont_inherit=True), scope)
    return scope


def one_task(shared: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return shared["support_images"][0], shared["support_y"][0, :5]


def test_running_statistics(shared):
    import higher
    import torchopt

    x, y = one_task(shared)

    def left(use) -> float:
        model = shared["image_network"]()
        before = model[1].running_mean.clone()
        use(model)
        return float((model[1].running_mean - before).abs().max())

    def of_ours(model):
        data = shared["support_images"], shared["support_y"][:, :5]
        MAML(model, loss="cross_entropy")(*data, *data).loss.backward()

    def of_higher(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, steps):
            steps.step(cross_entropy(fast(x), y))

    def of_torchopt(model, **options):
        start = torchopt.extract_state_dict(model, **options)
        torchopt.MetaSGD(model, lr=0.4).step(cross_entropy(model(x), y))
        torchopt.recover_state_dict(model, start)

    assert left(of_ours) == 0
    assert left(of_higher) == 0
    assert left(of_torchopt) > 0
    assert left(lambda model: of_torchopt(model, detach_buffers=True)) == 0


def test_parameters_that_the_forward_leaves_out(shared):
    import higher

    def network():
        model = shared["network"]()
        model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
        return model

    x, y = shared["support_x"], shared["support_y"]
    model = network()
    MAML(model, loss="cross_entropy")(x, y, x, y).loss.backward()
    assert model.unused.grad.tolist() == [0, 0]

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, steps):
        steps.step(cross_entropy(fast(x[0]), y[0]))
        cross_entropy(fast(x[0]), y[0]).backward()
    assert model.unused.grad is None


def test_higher_by_its_defaults_learns_nothing(shared):
    import higher

    model, x, y = shared["network"](), shared["support_x"][0], shared["support_y"][0]
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.4)) as (fast, steps):
        steps.step(cross_entropy(fast(x), y))
        cross_entropy(fast(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_torchopt_refuses_frozen_parameters(shared):
    import torchopt

    model, x, y = shared["network"](), shared["support_x"], shared["support_y"]
    model[0].weight.requires_grad_(False)
    MAML(model, loss="cross_entropy")(x, y, x, y).loss.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="does not require grad"):
        torchopt.MetaSGD(model, lr=0.4).step(cross_entropy(model(x[0]), y[0]))


def test_vmap_and_batch_norm():
    """The page warns of both. When torch has mended the second, the warning can go."""
    page, section = PAGES / "torch_func.md", "Convolutions and batch norm"
    setup, (theirs, _) = migration.pairs(page)[section][:-2], migration.pairs(page)[section][-2:]

    def run(code: str) -> dict:
        scope: dict = {}
        for block in (*setup, theirs._replace(code=code)):
            exec(compile(block.code, block.title, "exec", dont_inherit=True), scope)
        return scope["theirs"]

    tracked = theirs.code.replace(
        "replace_all_batch_norm_modules_(image_network())", "image_network()"
    )
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        run(tracked)

    inside = "by_task = vmap(grad(task_loss), in_dims=(None, 0, 0, 0, 0))("
    outside = "theirs = grad(lambda *a: vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(*a).mean())("
    last = theirs.code.strip().splitlines()[-1]
    assert inside in theirs.code
    wrong = run(theirs.code.replace(inside, outside).replace(last, ""))
    assert migration.errors(run(theirs.code), wrong)["0.weight"] > 1e-2


def test_learn2learn_besides(shared, capsys):
    need("learn2learn")
    import learn2learn as l2l

    model = shared["image_network"]()
    before = model[1].running_mean.clone()
    learner, (x, y) = l2l.algorithms.MAML(model, lr=0.4).clone(), one_task(shared)
    learner.adapt(cross_entropy(learner(x), y))
    assert (model[1].running_mean - before).abs().max() > 0

    model[1].weight.requires_grad_(False)
    learner = l2l.algorithms.MAML(model, lr=0.4).clone()
    with pytest.raises(UnboundLocalError):
        learner.adapt(cross_entropy(learner(x), y))
    assert "allow_nograd=True" in capsys.readouterr().out
    learner.adapt(cross_entropy(learner(x), y), allow_nograd=True)

    assert all((rate == 1).all() for rate in l2l.algorithms.MetaSGD(shared["network"]()).lrs)
