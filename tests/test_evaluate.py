"""Evaluation: its numbers against a plain recomputation, and what goes into its JSON."""

import inspect
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from maml_fast.checkpoint import load_checkpoint
from maml_fast.cli import main
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.evaluate import (
    PAPER_MAML,
    PAPER_PRETRAINED,
    Evaluation,
    StepErrors,
    evaluate_sinusoid,
    fit_sinusoid,
)
from maml_fast.kinds import load_trained
from maml_fast.models import sinusoid_mlp
from maml_fast.tasks import SinusoidTasks
from maml_fast.train import train


@pytest.fixture
def model():
    """Larger weights than the paper's, so that a gradient step shows."""
    return sinusoid_mlp(hidden=(8, 8), activation="tanh", std=0.5, seed=1, dtype=torch.float64)


def adapted(model, inner_lr, steps, x, y):
    """One task's parameters after plain gradient descent."""
    fast = {name: value.detach() for name, value in model.named_parameters()}
    for _ in range(steps):
        for value in fast.values():
            value.requires_grad_(True)
        loss = (functional_call(model, fast, x) - y).square().mean()
        gradients = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            name: (value - inner_lr * gradient).detach()
            for (name, value), gradient in zip(fast.items(), gradients, strict=True)
        }
    return fast


def test_errors_and_intervals_are_those_of_plain_gradient_descent(model):
    found = evaluate_sinusoid(
        model, 0.05, shots=3, steps=(0, 1, 4), tasks=6, query_shots=7, seed=11
    )
    episodes = SinusoidTasks(seed=11, dtype=torch.float64).sample(6, 3, 7)
    for position, steps in enumerate((0, 1, 4)):
        errors = []
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            fast = adapted(model, 0.05, steps, support_x, support_y)
            with torch.no_grad():
                difference = functional_call(model, fast, query_x) - query_y
            errors.append(sum(value**2 for value in difference.flatten().tolist()) / 7)
        mean = sum(errors) / 6
        variance = sum((error - mean) ** 2 for error in errors) / 5
        row = found.errors[position]
        assert row.steps == steps
        assert row.mse == row.mse_others == pytest.approx(mean, rel=1e-12)
        ci95 = pytest.approx(1.96 * math.sqrt(variance / 6), rel=1e-10)
        assert row.ci95 == row.ci95_others == ci95
        assert row.median == pytest.approx(sorted(errors)[2], rel=1e-12)  # the lower of two
        assert row.diverged == 0
    assert found.errors[2].mse != pytest.approx(found.errors[1].mse, rel=1e-3)


@pytest.mark.parametrize(("inner_lr", "overflows"), [(2.0, False), (1e200, True)])
def test_tasks_that_diverge_are_counted_and_told_apart(model, inner_lr, overflows):
    found = evaluate_sinusoid(model, inner_lr, steps=(0, 3), tasks=50, query_shots=4)
    before, after = found.errors
    assert before.diverged == 0
    assert before.mse == before.mse_others < 100
    assert 0 < after.diverged <= 50
    if overflows:
        assert math.isinf(after.mse)
        assert math.isinf(after.ci95)
        assert found.to_dict()["errors"][1]["mse"] is None
    else:
        assert after.diverged < 49
        assert after.mse_others < 100 < after.mse
        assert after.ci95_others < after.ci95
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_evaluation_leaves_the_model_as_it_was(model):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    evaluate_sinusoid(model, tasks=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_fixes_the_numbers(model):
    one, two = (evaluate_sinusoid(model, tasks=4, seed=seed) for seed in (5, 5))
    assert one == two
    assert evaluate_sinusoid(model, tasks=4, seed=6).errors != one.errors


def test_defaults_and_the_papers_numbers():
    assert PAPER_MAML == {1: 0.67, 5: 0.38, 10: 0.35}
    assert PAPER_PRETRAINED == {1: 2.41, 5: 2.23, 10: 2.19}
    defaults = inspect.signature(evaluate_sinusoid).parameters
    assert (defaults["shots"].default, defaults["tasks"].default) == (5, 600)
    assert (defaults["steps"].default, defaults["inner_lr"].default) == ((0, 1, 5, 10), 0.01)


def test_json_has_plain_values():
    errors = StepErrors(10, 3.0, 0.5, 2.0, 1, 2.5, 0.25)
    evaluation = Evaluation(5, 600, 100, 4, 0.01, (errors,))
    assert json.loads(json.dumps(evaluation.to_dict())) == {
        "shots": 5,
        "tasks": 600,
        "query_shots": 100,
        "seed": 4,
        "inner_lr": 0.01,
        "errors": [
            {
                "steps": 10,
                "mse": 3.0,
                "ci95": 0.5,
                "median": 2.0,
                "diverged": 1,
                "mse_others": 2.5,
                "ci95_others": 0.25,
            }
        ],
    }


def test_fits_are_the_curve_its_points_and_the_adapted_predictions(model):
    fits = fit_sinusoid(model, 0.05, shots=3, steps=(0, 2), tasks=2, points=11, seed=7)
    sampler = SinusoidTasks(seed=7, dtype=torch.float64)
    waves = sampler.waves(2)
    episodes = sampler.episodes(waves, shots=3, query_shots=1)
    assert fits.x.tolist() == pytest.approx([-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5])
    assert list(fits.predictions) == [0, 2]
    for task in range(2):
        amplitude, phase = waves.amplitude[task].item(), waves.phase[task].item()
        truth = [amplitude * math.sin(x - phase) for x in fits.x.tolist()]
        assert fits.truth[task].tolist() == pytest.approx(truth)
        assert torch.equal(fits.support_x[task], episodes.support_x[task, :, 0])
        assert torch.equal(fits.support_y[task], episodes.support_y[task, :, 0])
        for steps, predictions in fits.predictions.items():
            fast = adapted(model, 0.05, steps, episodes.support_x[task], episodes.support_y[task])
            wanted = functional_call(model, fast, fits.x.reshape(-1, 1)).detach()[:, 0]
            torch.testing.assert_close(predictions[task], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 1}, "tasks is 1; wanted are at least 2"),
        ({"steps": ()}, r"steps is \(\); wanted"),
        ({"steps": (1, -1)}, r"steps is \(1, -1\); wanted"),
        ({"shots": 0}, "shots is 0; wanted"),
        ({"query_shots": 0}, "query_shots is 0; wanted"),
        ({"seed": -1}, "seed is -1; wanted"),
        ({"inner_lr": math.nan}, "inner_lr is"),
        ({"backend": "fast"}, "backend is 'fast'; wanted is one of"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_sinusoid(sinusoid_mlp(), **options)


def a_checkpoint(folder, learn_inner_lr=False):
    """A hardly trained one, of the run's default file name."""
    config = SinusoidConfig(
        iterations=3,
        tasks=2,
        hidden=(4, 4),
        threads=1,
        learn_inner_lr=learn_inner_lr,
        output=folder / "run",
    )
    return train(config).checkpoint


def test_the_command_writes_json_table_and_plots(tmp_path, capsys):
    checkpoint = a_checkpoint(tmp_path)
    file, plots = tmp_path / "evaluation.json", tmp_path / "plots"
    flags = "--shots 5 10 --steps 0 1 --tasks 8 --query-shots 20 --seed 3 --threads 1"
    outputs = f"--json {file} --plot-dir {plots}"
    assert main(f"evaluate {checkpoint} {flags} {outputs}".split()) == 0
    document = json.loads(file.read_text())
    assert document.keys() == {"checkpoint", "iteration", "config", "paper", "evaluations"}
    assert (document["checkpoint"], document["iteration"]) == (str(checkpoint), 3)
    assert document["config"] == load_checkpoint(checkpoint).config
    assert document["paper"] == {
        "shots": 5,
        "maml": {"1": 0.67, "5": 0.38, "10": 0.35},
        "pretrained": {"1": 2.41, "5": 2.23, "10": 2.19},
    }
    model = load_trained(checkpoint).model
    wanted = [
        evaluate_sinusoid(model, shots=shots, steps=(0, 1), tasks=8, query_shots=20, seed=3)
        for shots in (5, 10)
    ]
    assert document["evaluations"] == [evaluation.to_dict() for evaluation in wanted]
    table = capsys.readouterr().out
    for evaluation in wanted:
        for row in evaluation.errors:
            assert f"{row.mse:.3f} ± {row.ci95:.3f}" in table
            assert f" {row.median:.3f} " in table
    assert table.count("0.67") == table.count("2.41") == 1  # beside 5 shots and 1 step only
    assert sorted(path.name for path in plots.iterdir()) == ["adaptation.png", "fits.png"]


def test_the_command_prints_json_alone_and_uses_a_learned_rate(tmp_path, capsys):
    checkpoint = a_checkpoint(tmp_path, learn_inner_lr=True)
    capsys.readouterr()
    assert main(f"evaluate {checkpoint} --tasks 4 --threads 1 --json -".split()) == 0
    captured = capsys.readouterr()
    (evaluation,) = json.loads(captured.out)["evaluations"]
    assert [row["steps"] for row in evaluation["errors"]] == [0, 1, 5, 10]
    assert "Mean squared error" in captured.err
    assert evaluation["inner_lr"] == load_file(checkpoint)["rates/inner_lr"].item()
    assert evaluation["inner_lr"] != 0.01
    assert main(f"evaluate {checkpoint} --tasks 4 --inner-lr 0.5 --json -".split()) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"][0]["inner_lr"] == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks 1", "tasks is 1; wanted are at least 2"),
        ("--steps -1", "steps is (-1,); wanted"),
        ("--shots 0", "shots is 0; wanted"),
        ("--shots 1.5", "--shots is 1.5; wanted is a whole number"),
        ("--threads 0", "threads is 0; wanted is a whole number"),
        ("--backend fast", "backend is 'fast'; wanted is one of"),
        ("--device nowhere", "device is 'nowhere', which cannot be used here"),
    ],
)
def test_the_command_refuses_bad_options_in_one_line(tmp_path, capsys, flags, message):
    checkpoint = a_checkpoint(tmp_path)
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("maml-fast: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
