"""What a run tells people: event files, the report, the progress bar, silence; and clipping."""

import base64
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

from maml_fast import event_files
from maml_fast.checkpoint import CheckpointError
from maml_fast.config import ConfigError
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.kinds import load_trained
from maml_fast.plots_run import as_svg, loss_figure, rates_figure, skipped_figure, validation_figure
from maml_fast.run import FlatParameters
from maml_fast.run_report import write_report
from maml_fast.starts import read_starts, record_start
from maml_fast.train import train
from tests.command import error, run
from tests.image_runs import folder_run, read_history


@pytest.fixture
def config(tmp_path):
    return SinusoidConfig(
        iterations=6,
        tasks=2,
        shots=3,
        query_shots=3,
        hidden=(4,),
        learn_inner_lr=True,
        threads=1,
        log_every=1,
        checkpoint_every=2,
        tensorboard=True,
        output=tmp_path / "run",
    )


# --- event files


def scalars(folder):
    """{tag: [(step, value)]} as TensorBoard shows it."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def same_figures(found, history):
    assert found.keys() == {name for line in history for name in line} - {"iteration"}
    for name, events in found.items():
        wanted = [(line["iteration"], line[name]) for line in history if name in line]
        assert [step for step, _ in events] == [step for step, _ in wanted]
        assert [value for _, value in events] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_event_files_have_what_the_history_has(config):
    train(config)
    same_figures(scalars(config.output / "tensorboard"), read_history(config))


def test_a_killed_run_has_each_point_once(config, monkeypatch):
    """Points behind the checkpoint, written before the kill, are forgotten and written again."""
    save = event_files.EventFiles.sync

    def die(events):
        save(events)
        if len(read_history(config)) == 4:
            raise KeyboardInterrupt  # between the event files and the checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(event_files.EventFiles, "sync", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(scalars(config.output / "tensorboard")["loss"]) == 4
    train(config, resume=True)
    assert len(list((config.output / "tensorboard").iterdir())) == 2
    same_figures(scalars(config.output / "tensorboard"), read_history(config))
    train(dataclasses.replace(config, iterations=3), overwrite=True)
    same_figures(scalars(config.output / "tensorboard"), read_history(config))


def test_event_files_may_begin_late_and_change_no_bit(config, tmp_path):
    plain = dataclasses.replace(config, tensorboard=False, iterations=3)
    train(plain)
    assert not (config.output / "tensorboard").exists()
    late = train(config, resume=True)
    steps = [step for step, _ in scalars(config.output / "tensorboard")["loss"]]
    assert steps == [4, 5, 6]
    whole = train(dataclasses.replace(config, output=tmp_path / "whole"))
    found, wanted = (load_trained(r.checkpoint).model.state_dict() for r in (late, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_its_package_event_files_are_refused_before_anything_is_done(config, monkeypatch):
    monkeypatch.setattr(event_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "maml_fast\[tensorboard\]"'):
        train(config)
    assert not config.output.exists()
    assert train(dataclasses.replace(config, tensorboard=False)).iteration == 6


def test_the_new_options_come_from_a_file_and_from_the_run_to_resume(tmp_path, output, capsys):
    file = tmp_path / "run.toml"
    file.write_text("iterations = 2\nclip_norm = 0.5\nquiet = true\nthreads = 1\nhidden = [4]\n")
    where = "--output", output
    assert run("train", "sinusoid", "--config", file, *where) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("trained 2 iterations")
    assert run("train", "sinusoid", "--resume", "--iterations", 3, *where) == 0
    assert capsys.readouterr().err == ""
    loud = "--no-quiet", "--tensorboard"
    assert run("train", "sinusoid", "--resume", "--iterations", 4, *loud, *where) == 0
    assert "4/4" in capsys.readouterr().err
    assert (output / "tensorboard").is_dir()
    assert run("train", "sinusoid", "--resume", "--clip-norm", 1, *where) == 2
    assert "clip_norm is 1.0, but the run to resume has 0.5" in error(capsys)
    assert run("train", "sinusoid", "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--clip-norm", "--quiet", "--tensorboard", "--previous"):
        assert flag in text


# --- progress


def test_a_pipe_gets_no_control_codes_and_with_quiet_nothing(config):
    program = """
import sys
from maml_fast.cli import main
flags = "train sinusoid --iterations 30 --threads 1 --output".split()
main([*flags, sys.argv[1]])
print("---", flush=True)
print("---", file=sys.stderr, flush=True)
main([*flags, sys.argv[2], "--quiet"])
"""
    known = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, config.output, config.output / "quiet"],
        capture_output=True,
        text=True,
        env=known | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"},
    )
    assert done.returncode == 0
    assert not set(done.stderr + done.stdout) & {"\x1b", "\r", "\b"}
    loud, quiet = done.stderr.split("---\n")
    assert "30/30" in loud
    assert loud.count("\n") == 1
    assert quiet == ""
    for printed in done.stdout.split("---\n"):
        assert printed.startswith("trained 30 iterations")


# --- clipping


@pytest.mark.parametrize("limit", [1e-3, 0.7, 1e3])
def test_the_norm_is_clipped_as_torch_does_it(limit):
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), (), (1, 4)]
    separate = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    viewed = [torch.nn.Parameter(p.detach().clone()) for p in separate]
    flat = FlatParameters(viewed)
    for parameter, view in zip(separate, viewed, strict=True):
        gradient = torch.randn(parameter.shape, generator=draw)
        parameter.grad = gradient.clone()
        view.grad.copy_(gradient)
    torch.nn.utils.clip_grad_norm_(separate, limit)
    flat.clip_norm(limit)
    for parameter, view in zip(separate, viewed, strict=True):
        torch.testing.assert_close(view.grad, parameter.grad, rtol=1e-6, atol=0)
    norm = torch.cat([view.grad.reshape(-1) for view in viewed]).norm().item()
    assert norm <= limit * (1 + 1e-6)


def test_what_is_clipped_is_the_gradient_that_adam_sees(config, monkeypatch):
    clipped = []
    plain = FlatParameters.clip_norm

    def watch(flat, limit):
        plain(flat, limit)
        clipped.append((limit, flat.flat.grad.norm().item()))

    monkeypatch.setattr(FlatParameters, "clip_norm", watch)
    train(config)
    assert not clipped  # 0 leaves it out
    train(dataclasses.replace(config, clip_norm=0.01), overwrite=True)
    assert [limit for limit, _ in clipped] == [0.01] * 6
    assert [norm for _, norm in clipped] == pytest.approx([0.01] * 6, rel=1e-3)


def test_a_gradient_that_is_not_finite_stays_so():
    flat = FlatParameters([torch.nn.Parameter(torch.zeros(3))])
    flat.flat.grad[1] = torch.nan
    flat.clip_norm(1.0)
    assert flat.flat.grad.isnan().any()


# --- the report


def svgs(page):
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    return [ET.fromstring(base64.b64decode(text)) for text in found]


def test_the_report_of_a_run_with_validation(tmp_path, capsys):
    config = dataclasses.replace(folder_run(tmp_path), learn_inner_lr=True, log_every=1)
    train(config)
    train(dataclasses.replace(config, iterations=8), resume=True)
    capsys.readouterr()
    assert run("report", config.output) == 0
    path = config.output / "report.html"
    assert capsys.readouterr().out == f"report in {path}\n"
    page = path.read_text()
    assert len(svgs(page)) == 3  # loss, validation, rates
    assert page.count("<h2>") == 3 + 2
    cells = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page)
    shown = dict(cells)
    assert shown["trained"] == "8 of 8 iterations"
    assert shown["filters"] == "4"
    assert (shown["classes trained on"], shown["classes held out"]) == ("6", "3")
    rate = load_trained(config.output / "checkpoint.safetensors").inner_lr
    assert float(shown["learned inner_lr"]) == pytest.approx(rate, rel=1e-3)
    best = max(line.get("validation_accuracy", 0) for line in read_history(config))
    assert shown["best validation"].startswith(f"{best:.2%} at iteration ")
    assert torch.__version__ in page
    assert [start["iteration"] for start in read_starts(config.output / "starts.jsonl")] == [0, 6]
    # Nothing is loaded from elsewhere; the SVGs have names of XML only.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    again = tmp_path / "again.html"
    assert run("report", config.output, "--output", again) == 0
    assert again.read_text() == page


def test_what_comes_from_a_run_is_escaped(config):
    config = dataclasses.replace(
        config, tensorboard=False, output=config.output / "<script>alert(1)</script>&"
    )
    train(config)
    page = write_report(config.output).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page


def test_a_report_of_a_run_without_figures_and_of_none(config, tmp_path, capsys):
    train(dataclasses.replace(config, iterations=0, tensorboard=False))
    (config.output / "starts.jsonl").unlink()  # as of a run from before there were any
    page = write_report(config.output).read_text()
    assert "There are no figures yet" in page
    assert "Not recorded" in page
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        write_report(tmp_path)
    capsys.readouterr()
    assert run("report", tmp_path / "nowhere") == 2
    assert "checkpoint.safetensors: no such checkpoint" in error(capsys)


@pytest.mark.parametrize(
    "line",
    [b'{"iteration": 1, "loss": null}', b'{"iteration": 1, "loss": "x"}', b"[" * 10**5, b"[]"],
)
def test_a_history_that_is_none_is_named(config, line):
    train(config)
    path = config.output / "history.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=f"{path}: line 1 is no loss record"):
        write_report(config.output)
    with pytest.raises(ValueError, match=f"{path}: line 1 is no loss record"):
        train(config, resume=True)


def test_a_start_that_is_none_stops_nothing(config):
    train(config)
    path = config.output / "starts.jsonl"
    path.write_bytes(b"[" * 10**5 + b"\n" + path.read_bytes())
    train(config, resume=True)
    assert len(read_starts(path)) == 2


@pytest.mark.parametrize("act", ["add_scalar", "flush", "close"])
def test_an_event_file_that_cannot_be_written_is_named(config, monkeypatch, act):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, act, full)
    with pytest.raises(OSError, match="No space left.*tensorboard"):
        train(dataclasses.replace(config, tensorboard=True))


def test_curves_show_what_the_history_has():
    history = [
        {"iteration": 5, "loss": 2.0, "inner_lr": 0.1, "skipped_tasks": 0},
        {"iteration": 5, "validation_accuracy": 0.25, "validation_ci95": 0.05},
        {"iteration": 10, "loss": 0.5, "inner_lr": 0.2, "skipped_tasks": 3},
    ]
    for draw, x, y in (
        (loss_figure, [5, 10], [2.0, 0.5]),
        (rates_figure, [5, 10], [0.1, 0.2]),
        (skipped_figure, [5, 10], [0, 3]),
        (validation_figure, [5], [25.0]),
    ):
        figure = draw(history)
        (line,) = figure.axes[0].lines
        assert list(line.get_xdata()) == x
        assert list(line.get_ydata()) == y
        assert as_svg(figure) == as_svg(draw(history))
    assert skipped_figure(history[:2]) is None
    assert validation_figure(history[:1]) is None
    assert loss_figure([]) is None
    assert rates_figure([{"iteration": 1, "loss": 1.0}]) is None


def test_starts_are_added_and_torn_lines_dropped(tmp_path):
    path = tmp_path / "starts.jsonl"
    record_start(path, 0, "cpu")
    path.write_text(path.read_text() + '{"iteration": 4, "ti')
    record_start(path, 7, "cpu")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 7]
    assert {"time", "device", "hardware", "threads", "maml_fast", "torch"} <= lines[1].keys()
