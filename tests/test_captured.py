"""The training step as one graph: with a stand-in for the graph here, and on a GPU where there is
one."""

import pytest
import torch

from maml_fast import MAML, NonFiniteError, captured
from maml_fast.captured import FIRST_STEPS, CapturedStep
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.kinds import make_run
from tests.networks import Draw


@pytest.fixture
def recorded(monkeypatch):
    """Instead of a graph: the work itself, which is done when it is replayed, as a graph's is."""
    made = []

    def record(work, generators):
        made.append(generators)
        return work

    monkeypatch.setattr(captured, "record", record)
    return made


def run_of(tmp_path, capture, **options):
    run = make_run(SinusoidConfig(tasks=3, shots=4, query_shots=4, output=tmp_path, **options))
    run._step = CapturedStep(run._work, [run.tasks.generator], capture)
    return run


def test_a_captured_step_is_the_step(recorded, tmp_path):
    plain, graphed = (run_of(tmp_path, capture) for capture in (False, True))
    for step in range(FIRST_STEPS + 4):
        plain.step()
        graphed.step()
        assert graphed._step.captured == (step >= FIRST_STEPS)
        assert torch.equal(plain.parameters.flat, graphed.parameters.flat)
    assert recorded == [[graphed.tasks.generator]]
    assert plain.close_window() == graphed.close_window()
    assert plain.iteration == graphed.iteration == FIRST_STEPS + 4
    states = [run.tasks.state_dict()["generator"] for run in (plain, graphed)]
    assert torch.equal(*states)


def test_a_captured_step_hears_of_what_is_not_finite_by_the_mean_loss(recorded, tmp_path):
    run = run_of(tmp_path, True)
    for _ in range(FIRST_STEPS + 1):
        run.step()
    run.close_window()
    with torch.no_grad():
        run.parameters.flat[0] = float("nan")
    run.step()
    with pytest.raises(NonFiniteError, match="iterations up to 5 is not finite"):
        run.close_window()


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch, tmp_path):
    run, plain = run_of(tmp_path, True), run_of(tmp_path, False)

    def record(work, generators):
        generators[0].manual_seed(7)  # whatever became of it
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr(captured, "record", record)
    for _ in range(FIRST_STEPS):
        run.step()
    with pytest.warns(RuntimeWarning, match=r"could not be captured.*when stream is capturing$"):
        run.step()
    run.step()
    for _ in range(FIRST_STEPS + 2):
        plain.step()
    assert not run._step.captured
    assert torch.equal(plain.parameters.flat, run.parameters.flat)


def test_a_call_that_does_not_look_gives_the_same_and_raises_nothing():
    draw = Draw(0)
    maml, batch = MAML(draw.mlp((3, 4, 2)), inner_lr=0.1), draw.batch("mse", 3, 4, 4, (3, 4, 2))
    looked, plain = (maml.value_and_grad(*batch[:4], check=check) for check in (True, False))
    assert torch.equal(looked[0].loss, plain[0].loss)
    assert all(torch.equal(g, plain[1][name]) for name, g in looked[1].items())
    batch.query_y[1] = float("nan")
    with pytest.raises(NonFiniteError):
        maml.value_and_grad(*batch[:4])
    assert maml.value_and_grad(*batch[:4], check=False)[0].loss.isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    def test_a_captured_step_has_the_same_bits(self, tmp_path):
        torch.use_deterministic_algorithms(True)
        try:
            plain, graphed = (run_of(tmp_path, capture, device="cuda") for capture in (False, True))
            for _ in range(FIRST_STEPS + 20):
                plain.step()
                graphed.step()
        finally:
            torch.use_deterministic_algorithms(False)
        assert graphed._step.captured
        assert torch.equal(plain.parameters.flat, graphed.parameters.flat)
        states = [run.tasks.state_dict()["generator"] for run in (plain, graphed)]
        assert torch.equal(*states)

    def test_a_meta_step_that_looks_cannot_be_captured(self):
        draw = Draw(0, torch.float32)
        maml = MAML(draw.mlp((3, 4, 2)).cuda(), inner_lr=0.1)
        batch = [t.cuda() for t in draw.batch("mse", 3, 4, 4, (3, 4, 2))[:4]]
        maml(*batch)
        with (
            pytest.raises(RuntimeError, match="check=False"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            maml(*batch)
