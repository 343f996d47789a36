"""The figures show the numbers they are given; the files are images of the expected size."""

import errno
import os
import struct

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from maml_fast.evaluate import Evaluation, Fits, StepErrors
from maml_fast.plots import DPI, adaptation_figure, fits_figure, save_png


def evaluation(shots, mse, diverged=0):
    """Three rows; the mean of all tasks is 10 above that of the others where some diverge."""
    ci95 = (0.5, 0.25, 0.125)
    rows = (
        StepErrors(step, mse[step] + 10 * (diverged > 0), ci95[step], 0.1, diverged, mse[step], 0.1)
        for step in range(3)
    )
    return Evaluation(shots, 600, 100, 1, 0.01, tuple(rows))


def fits(tasks):
    x = torch.linspace(-5, 5, 21)
    truth = torch.stack([(task + 1) * x.sin() for task in range(tasks)])
    return Fits(
        x=x,
        truth=truth,
        support_x=torch.arange(5.0).repeat(tasks, 1),
        support_y=torch.arange(5.0).repeat(tasks, 1) + torch.arange(tasks).reshape(-1, 1),
        predictions={0: 0 * truth, 1: 0.5 * truth, 10: 0.9 * truth},
    )


def data(line):
    """A plotted line's (x, y) pairs."""
    return [tuple(pair) for pair in line.get_xydata().tolist()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_adaptation_shows_each_evaluation_its_band_and_the_papers_points():
    figure = adaptation_figure([evaluation(5, (3.0, 1.0, 0.5)), evaluation(10, (3.0, 0.5, 0.25))])
    (axes,) = figure.axes
    five, ten, paper = axes.get_lines()
    assert data(five) == [(0, 3.0), (1, 1.0), (2, 0.5)]
    assert data(ten) == [(0, 3.0), (1, 0.5), (2, 0.25)]
    assert data(paper) == [(1, 0.67), (5, 0.38), (10, 0.35)]
    first, second = (
        {tuple(point) for point in np.asarray(band.get_paths()[0].vertices).tolist()}
        for band in axes.collections
    )
    assert first >= {(0, 2.5), (0, 3.5), (1, 0.75), (1, 1.25), (2, 0.375), (2, 0.625)}
    assert second >= {(1, 0.25), (1, 0.75)}
    assert legend(axes) == ["5 shots", "10 shots", "Finn et al. 2017, 5 shots"]
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gradient steps", "mean squared error")


def test_where_tasks_diverge_the_mean_of_the_others_is_in_the_frame():
    (axes,) = adaptation_figure([evaluation(10, (3.0, 1.0, 0.5), diverged=2)]).axes
    everything, others = axes.get_lines()
    assert data(everything) == [(0, 13.0), (1, 11.0), (2, 10.5)]
    assert data(others) == [(0, 3.0), (1, 1.0), (2, 0.5)]
    assert others.get_linestyle() == ":"
    assert legend(axes) == ["10 shots", "10 shots without 2 diverging of 600"]
    assert axes.get_ylim()[1] == 6.0


def test_the_papers_points_are_left_out_where_the_shots_differ():
    (axes,) = adaptation_figure([evaluation(10, (3.0, 1.0, 0.5))]).axes
    assert len(axes.get_lines()) == 1


@pytest.mark.parametrize("tasks", [1, 3, 4])
def test_fits_show_truth_predictions_and_support_of_each_task(tasks):
    figure = fits_figure(fits(tasks))
    panels = [axes for axes in figure.axes if axes.get_lines()]
    assert len(panels) == tasks
    x = torch.linspace(-5, 5, 21)
    for task, axes in enumerate(panels):
        truth, before, one, ten, support = axes.get_lines()
        for line, factor in ((truth, 1.0), (before, 0.0), (one, 0.5), (ten, 0.9)):
            y = factor * ((task + 1) * x.sin())
            assert data(line) == list(zip(x.tolist(), y.tolist(), strict=True))
        assert data(support) == [(point, point + task) for point in range(5)]
    assert legend(panels[0]) == ["truth", "0 steps", "1 step", "10 steps", "support"]


@pytest.mark.parametrize(
    ("figure", "inches"),
    [
        (adaptation_figure([evaluation(5, (3.0, 1.0, 0.5))]), (7, 4.5)),
        (fits_figure(fits(4)), (10, 6)),
    ],
)
def test_a_saved_figure_is_a_png_of_its_size(tmp_path, figure: Figure, inches):
    path = tmp_path / "new folder" / "figure.png"
    save_png(figure, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (inches[0] * DPI, inches[1] * DPI)
    assert len(data) > 10_000  # more than an empty canvas


def test_a_full_disk_leaves_the_figure_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    save_png(fits_figure(fits(1)), path)
    before = path.read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*figure.png'"):
        save_png(fits_figure(fits(4)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
