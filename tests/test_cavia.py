"""CAVIA's sinusoid, where a context adapts and all else is meta-learned: network, runs, errors."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from maml_fast import MAML
from maml_fast.checkpoint import load_checkpoint
from maml_fast.config import ConfigError
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.evaluate import evaluate_sinusoid, paper_for
from maml_fast.kinds import load_trained
from maml_fast.models import CONTEXT, ContextInput, cavia_sinusoid
from maml_fast.run_sinusoid import SinusoidRun
from maml_fast.tasks import SinusoidTasks
from tests.command import error, run

SMALL = "--iterations 4 --tasks 2 --shots 3 --query-shots 4 --hidden 6 5 --threads 1"
PAPERS = {"method": "cavia", "inner_lr": 1.0, "context_size": 5}


def train(output, *arguments):
    return run("train", "sinusoid", "--output", output, *arguments)


def predict(layers, x, context):
    """The network without maml_fast's modules. layers: pairs of weight and bias; x: [N, 1]."""
    x = torch.cat([x, context.repeat(len(x), 1)], dim=1)
    for weight, bias in layers[:-1]:
        x = (x @ weight.T + bias).relu()
    weight, bias = layers[-1]
    return x @ weight.T + bias


def adapted(layers, x, y, steps, rate, create_graph):
    """The context after gradient steps from 0 on one task."""
    context = torch.zeros(layers[0][0].shape[1] - 1, dtype=x.dtype, requires_grad=True)
    for _ in range(steps):
        loss = (predict(layers, x, context) - y).square().mean()
        (gradient,) = torch.autograd.grad(loss, context, create_graph=create_graph)
        context = context - rate * gradient
        if not create_graph:
            context = context.detach().requires_grad_()
    return context


def split(model):
    """The layers of a `cavia_sinusoid`, as `predict` takes them; leaves that require grad."""
    flat = [p.detach().clone().requires_grad_() for p in list(model.parameters())[1:]]
    return list(zip(flat[::2], flat[1::2], strict=True))


@pytest.mark.parametrize("backend", ["reference", "functional", "auto"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_meta_step_is_that_of_a_plain_loop(backend, first_order, inner_steps):
    model = cavia_sinusoid(seed=2, dtype=torch.float64)
    episodes = SinusoidTasks(seed=4, dtype=torch.float64).sample(5, 10, 10)
    maml = MAML(
        model,
        inner_lr=1.0,
        inner_steps=inner_steps,
        first_order=first_order,
        backend=backend,
        inner_params=CONTEXT,
    )
    result = maml(*episodes)
    result.loss.backward()

    layers = split(model)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        context = adapted(layers, support_x, support_y, inner_steps, 1.0, not first_order)
        losses.append((predict(layers, query_x, context) - query_y).square().mean())
    torch.testing.assert_close(result.task_losses, torch.stack(losses), rtol=1e-12, atol=1e-12)
    torch.stack(losses).mean().backward()
    leaves = [leaf for pair in layers for leaf in pair]
    for ours, leaf in zip(list(model.parameters())[1:], leaves, strict=True):
        scale = leaf.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours.grad, leaf.grad, rtol=0, atol=1e-12 * max(scale, 1))
    # The context adapted, yet is no one's meta-parameter.
    context = model[0].context
    assert context.grad is None
    assert torch.equal(context, torch.zeros(5, dtype=torch.float64))
    fast = maml.adapt(*episodes[:2]).parameters()["0.context"]
    assert fast.shape == (5, 5)
    assert fast.abs().min() > 0
    assert not torch.equal(fast[0], fast[1])


def test_the_planned_backends_refuse_it_and_auto_does_without_them():
    x = torch.zeros(2, 3, 1)
    plan = MAML(cavia_sinusoid(), inner_params=CONTEXT).plan(x, x)
    assert plan.backend == "functional"
    assert "'cat'" in str(plan)
    with pytest.raises(ValueError, match="'cat'"):
        MAML(cavia_sinusoid(), inner_params=CONTEXT, backend="cpu").plan(x, x)


def test_the_network_is_drawn_as_the_papers():
    before = torch.get_rng_state()
    model = cavia_sinusoid(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "0.context": [5],
        "1.weight": [40, 6],
        "1.bias": [40],
        "3.weight": [40, 40],
        "3.bias": [40],
        "5.weight": [1, 40],
        "5.bias": [1],
    }
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.context"]
    for layer in (model[1], model[3], model[5]):  # as nn.Linear draws itself
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        assert layer.bias.abs().min() > 0
    assert model[1].weight.var().item() == pytest.approx(1 / 18, rel=0.15)  # of the uniform one
    again, other = cavia_sinusoid(seed=1), cavia_sinusoid(seed=2)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not torch.equal(model[1].weight, other[1].weight)


def test_the_context_goes_behind_each_row():
    layer = ContextInput(2)
    with torch.no_grad():
        layer.context.copy_(torch.tensor([7.0, 8.0]))
    x = torch.arange(12.0).reshape(2, 3, 2)
    found = layer(x)
    assert found.shape == (2, 3, 4)
    assert torch.equal(found[..., :2], x)
    assert torch.equal(found[..., 2:], torch.tensor([7.0, 8.0]).expand(2, 3, 2))
    assert torch.equal(layer(x[0]), found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_size": 0}, "context_size is 0; wanted is a whole number of at least 1"),
        ({"context_size": 2.5}, "context_size is 2.5; wanted"),
        ({"hidden": (0,)}, r"hidden is \(0,\); wanted are sizes"),
        ({"activation": "swish"}, "activation is 'swish'; wanted is one of"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cavia_sinusoid(**options)
    with pytest.raises(ValueError, match="^size is True; wanted"):
        ContextInput(True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "anil"}, "method is 'anil'; wanted is one of ['maml', 'cavia']"),
        ({"context_size": 5}, "context_size is 5, but method maml has no context"),
        (PAPERS | {"context_size": 0}, "context_size is 0; wanted"),
        (PAPERS | {"backend": "cpu"}, "backend is 'cpu', which has no layer for the context"),
    ],
)
def test_a_bad_configuration_is_refused_by_the_fields_name(values, message):
    with pytest.raises(ConfigError) as caught:
        SinusoidConfig(**values)
    assert str(caught.value).startswith(message)


def test_the_defaults_follow_the_method(tmp_path):
    """As far as the published code has them: regression/arguments.py of lmzintgraf/cavia."""
    for name, method in (("maml", ["--method", "maml"]), ("none", []), ("cavia", None)):
        flags = ["--method", "cavia"] if method is None else method
        assert train(tmp_path / name, "--iterations", 0, "--threads", 1, *flags) == 0
    maml, none, cavia = (
        load_checkpoint(tmp_path / name / "checkpoint.safetensors").config | {"output": ""}
        for name in ("maml", "none", "cavia")
    )
    assert maml == none
    changed = {name: value for name, value in cavia.items() if value != maml[name]}
    assert changed == PAPERS | {"clip_gradient": 10.0}
    assert SinusoidConfig(method="cavia").context_size == 5
    assert SinusoidConfig.recipe({"method": "cavia"})["iterations"] == 50_000
    kept = ("tasks", "shots", "query_shots", "inner_steps", "meta_lr", "hidden", "activation")
    assert [cavia[name] for name in kept] == [25, 10, 10, 1, 1e-3, [40, 40], "relu"]


def test_flags_and_files_beat_the_methods_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('method = "cavia"\ninner_lr = 0.5\ncontext_size = 3\niterations = 0\n')
    assert train(tmp_path / "a", "--config", file, "--context-size", 4) == 0
    config = load_checkpoint(tmp_path / "a" / "checkpoint.safetensors").config
    found = [config[name] for name in ("method", "inner_lr", "context_size", "clip_gradient")]
    assert found == ["cavia", 0.5, 4, 10.0]
    file.write_text('method = "cavia"\niterations = 0\n')
    assert train(tmp_path / "c", "--config", file) == 0
    found = load_checkpoint(tmp_path / "c" / "checkpoint.safetensors").config
    assert (found["context_size"], found["inner_lr"]) == (5, 1.0)
    file.write_text("context_size = 3\niterations = 0\n")  # good where the flag says the method
    assert train(tmp_path / "b", "--config", file, "--method", "cavia") == 0
    found = load_checkpoint(tmp_path / "b" / "checkpoint.safetensors").config
    assert (found["context_size"], found["inner_lr"]) == (3, 1.0)


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        ("--context-size 5", "", "context_size is 5, but method maml has no context"),
        ("--method maml --context-size 5", "", "context_size is 5, but method maml has"),
        ("--method anil", "", 'Invalid value "anil" for --method'),
        ("--method cavia --context-size 0", "", "context_size is 0; wanted"),
        ("--method cavia --context-size 2.5", "", "--context-size is 2.5; wanted is a whole"),
        ("--method cavia --backend triton", "", "backend is 'triton', which has no layer"),
        ("", "context_size = 3", "run.toml: context_size is 3, but method maml has no"),
        ("--method maml", 'method = "cavia"\ncontext_size = 3', "context_size is 3, but method"),
        ("", 'method = "anil"', "run.toml: method is 'anil'; wanted is one of"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, capsys, flags, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert train(tmp_path / "run", "--config", file, *flags.split()) == 2
    assert message in error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", ["", "--learn-inner-lr --inner-steps 2 --first-order"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, capsys, more):
    flags = ["--method", "cavia", *SMALL.split()[2:], *more.split(), "--log-every", "1"]
    assert train(tmp_path / "whole", *flags, "--iterations", "4") == 0
    assert train(tmp_path / "parts", *flags, "--iterations", "2") == 0
    assert train(tmp_path / "parts", "--resume", "--iterations", "4") == 0
    found, wanted = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("parts", "whole")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(wanted["model/0.context"], torch.zeros(5))
    # 6 x 6 + 6, 5 x 6 + 5, 5 + 1 numbers of Adam's, the context not among them
    assert wanted["optimizer/exp_avg"].numel() == 83 + ("learn" in more)
    histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("parts", "whole")]
    assert histories[0] == histories[1]
    assert histories[0].count("\n") == 4

    capsys.readouterr()
    changes = {"--context-size 4": "context_size is 4", "--method maml": "method is 'maml'"}
    for change, message in changes.items():
        assert train(tmp_path / "parts", "--resume", *change.split()) == 2
        assert f"{message}, but the run to resume has" in error(capsys)


def test_a_run_of_maml_is_not_resumed_as_cavia(tmp_path, capsys):
    assert train(tmp_path / "run", *SMALL.split()) == 0
    capsys.readouterr()
    assert train(tmp_path / "run", "--resume", "--method", "cavia") == 2
    assert "method is 'cavia', but the run to resume has 'maml'" in error(capsys)


def test_a_configuration_from_before_there_were_methods_is_mamls():
    values = SinusoidConfig(iterations=7).to_dict()
    del values["method"], values["context_size"]
    assert SinusoidConfig.from_run(values, "here") == SinusoidConfig(iterations=7)
    values = SinusoidConfig(**PAPERS).to_dict()
    assert SinusoidConfig.from_run(json.loads(json.dumps(values)), "here").context_size == 5


def test_training_is_adam_on_all_but_the_context():
    config = SinusoidConfig(**PAPERS, tasks=3, hidden=(6, 5), activation="tanh", meta_lr=0.01)
    first = SinusoidRun(config)
    before = [p.detach().clone() for p in first.model.parameters()]
    first.step()
    moved = [(a - b).abs() for a, b in zip(before, first.model.parameters(), strict=True)]
    assert torch.equal(moved[0], torch.zeros(5))
    for move in moved[1:]:  # Adam's first step is the rate itself
        torch.testing.assert_close(move, torch.full_like(move, 0.01), rtol=1e-2, atol=0)


def test_errors_are_those_of_an_adapted_context():
    model = cavia_sinusoid(3, (8, 8), "relu", seed=1, dtype=torch.float64)
    layers = split(model)
    found = evaluate_sinusoid(
        model, 0.5, shots=4, steps=(0, 1, 3), tasks=6, query_shots=7, seed=11, inner_params=CONTEXT
    )
    episodes = SinusoidTasks(seed=11, dtype=torch.float64).sample(6, 4, 7)
    for row in found.errors:
        errors = []
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            context = adapted(layers, support_x, support_y, row.steps, 0.5, False)
            errors.append((predict(layers, query_x, context) - query_y).square().mean())
        wanted = torch.stack(errors).detach()
        assert row.mse == pytest.approx(wanted.mean().item(), rel=1e-12)
        assert row.ci95 == pytest.approx(1.96 * wanted.std().item() / math.sqrt(6), rel=1e-10)
    assert found.errors[0].mse != pytest.approx(found.errors[1].mse, rel=1e-6)


@pytest.mark.parametrize(
    ("training", "evaluation", "beside"),
    [
        ("", "", True),
        ("", "--shots 10 20 --steps 0 1", True),
        ("", "--inner-lr 0.5", False),
        ("", "--shots 20", None),  # the paper's setting, but no number for these shots
        ("", "--steps 2", None),
        ("--context-size 4", "", False),
        ("--hidden 40", "", False),
        ("--activation tanh", "", False),
        ("--inner-lr 0.5", "--inner-lr 1", False),
        ("--inner-steps 2", "", False),
        ("--shots 5", "", False),
        ("--first-order", "", False),
        ("--learn-inner-lr", "--inner-lr 1", False),
    ],
)
def test_the_papers_number_is_shown_in_its_setting_only(
    tmp_path, capsys, training, evaluation, beside
):
    size = "--method cavia --iterations 1 --tasks 2 --threads 1"
    assert train(tmp_path / "run", *size.split(), *training.split()) == 0
    checkpoint, file = tmp_path / "run" / "checkpoint.safetensors", tmp_path / "found.json"
    capsys.readouterr()
    sizes = f"--tasks 2 --query-shots 3 --threads 1 --json {file}"
    assert run("evaluate", checkpoint, *sizes.split(), *evaluation.split()) == 0
    table = capsys.readouterr().out
    cells = [cell.strip() for line in table.splitlines() for cell in line.split("│")]
    assert cells.count("0.19") == (beside is True)
    assert ("second-hand" in table) == (beside is not False)
    assert "0.67" not in cells  # MAML's
    document = json.loads(file.read_text())
    if beside is False:
        assert document["paper"] is None
        assert "CAVIA" not in table
    else:
        paper = document["paper"]
        assert (paper["shots"], paper["cavia"]) == (10, {"1": 0.19})
        assert "second-hand" in paper["note"]
        assert "paper: CAVIA" in table


def test_the_command_evaluates_and_draws(tmp_path, capsys):
    assert train(tmp_path, "--method", "cavia", *SMALL.split()) == 0
    checkpoint, plots = tmp_path / "checkpoint.safetensors", tmp_path / "plots"
    capsys.readouterr()
    flags = f"--tasks 4 --query-shots 5 --threads 1 --plot-dir {plots} --json -"
    assert run("evaluate", checkpoint, *flags.split()) == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    assert (found["shots"], found["inner_lr"]) == (10, 1.0)
    assert [row["steps"] for row in found["errors"]] == [0, 1, 5, 10]
    trained = load_trained(checkpoint)
    assert trained.config.inner_params == CONTEXT
    wanted = evaluate_sinusoid(
        trained.model, 1.0, shots=10, tasks=4, query_shots=5, inner_params=CONTEXT
    )
    assert found == json.loads(json.dumps(wanted.to_dict()))
    assert sorted(path.name for path in plots.iterdir()) == ["adaptation.png", "fits.png"]
    assert run("evaluate", checkpoint, "--tasks", 4, "--backend", "cpu") == 2
    assert "backend 'cpu' cannot run this model" in error(capsys)


def test_mamls_numbers_stay_beside_maml():
    assert paper_for(SinusoidConfig(), 0.5).source == "Finn et al. 2017"
    assert paper_for(SinusoidConfig(**PAPERS), 1.0).source == "Zintgraf et al. 2019"
