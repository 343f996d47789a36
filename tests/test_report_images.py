"""What is shown of an evaluation on images: the table with the paper's numbers, and the figures."""

import dataclasses

import pytest
import torch
from matplotlib.colors import to_rgba

from maml_fast.config_images import FolderConfig, OmniglotConfig
from maml_fast.evaluate_images import (
    PAPER_OMNIGLOT,
    Answers,
    ImageEvaluation,
    StepAccuracy,
)
from maml_fast.plots_images import accuracy_figure, answers_figure
from maml_fast.report import accuracy_table, paper_accuracy, reported


def evaluation(shots=1, accuracy=(0.2, 0.9, 0.95), diverged=0):
    rows = (
        StepAccuracy(step, accuracy[place], 0.01 * (place + 1), diverged * place)
        for place, step in enumerate((0, 1, 3))
    )
    return ImageEvaluation(5, shots, 15, 600, 1, 2.0, 34, False, tuple(rows))


def rows_of(table):
    columns = [[str(cell) for cell in column._cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_the_table_has_the_papers_number_where_the_setting_is_the_papers():
    table = accuracy_table(OmniglotConfig(), "held-out", [evaluation(), evaluation(shots=5)])
    other = accuracy_table(OmniglotConfig(shots=5), "held-out", [evaluation(shots=5)])
    assert rows_of(table) == [
        ["1", "15", "0", "20.00 ± 1.00", ""],
        ["1", "15", "1", "90.00 ± 2.00", ""],
        ["1", "15", "3", "95.00 ± 3.00", "98.70 ± 0.40"],
        ["5", "15", "0", "20.00 ± 1.00", ""],
        ["5", "15", "1", "90.00 ± 2.00", ""],
        ["5", "15", "3", "95.00 ± 3.00", ""],  # trained with 1 shot
    ]
    assert rows_of(other)[2] == ["5", "15", "3", "95.00 ± 3.00", "99.90 ± 0.10"]
    assert "600 tasks from 34 classes (held-out), inner rate 2" in table.title
    assert "transductive" in str(table.caption)
    assert "Paper: trained on 1,200 characters" in str(table.caption)


def test_a_note_tells_that_the_classes_chose_the_checkpoint():
    captions = {
        chose: str(accuracy_table(FolderConfig(), "held-out", [evaluation()], chose).caption)
        for chose in (False, True)
    }
    note = "validated on these classes: they chose best.safetensors and the number of steps"
    assert (note in captions[True], note in captions[False]) == (True, False)


OTHERWISE = [
    {"model": "conv4-pool"},
    {"filters": 4},
    {"ways": 6},
    {"shots": 5},
    {"inner_lr": 0.4},
    {"inner_steps": 2},
    {"first_order": True},
    {"learn_inner_lr": True},
    {"rotations": False},
]


@pytest.mark.parametrize(
    ("config", "classes", "rate"),
    [
        *((OmniglotConfig(**change), "held-out", 2.0) for change in OTHERWISE),
        (FolderConfig(), "held-out", 2.0),
        (OmniglotConfig(), "train", 2.0),
        (OmniglotConfig(), "all", 2.0),
        (OmniglotConfig(), "held-out", 0.4),
    ],
)
def test_elsewhere_the_table_and_the_figure_have_none(config, classes, rate):
    found = dataclasses.replace(evaluation(diverged=2), inner_lr=rate)
    table = accuracy_table(config, classes, [found])
    assert [row[-1] for row in rows_of(table)] == ["", "", ""]
    assert [row[-2] for row in rows_of(table)] == [
        "20.00 ± 1.00",
        "90.00 ± 2.00 [*]",
        "95.00 ± 3.00 [*]",
    ]
    assert "[*] diverged after 3 steps: 4 tasks." in str(table.caption)
    assert "Paper" not in str(table.caption)
    assert paper_accuracy(config, classes, found) is None
    (axes,) = accuracy_figure(config, classes, [found]).axes
    assert "Finn" not in str([text.get_text() for text in axes.get_legend().get_texts()])


def test_the_papers_numbers():
    conv = {key[1:]: value for key, value in PAPER_OMNIGLOT.items() if key[0] == "conv4"}
    assert conv == {
        (5, 1): (3, 0.987, 0.004),
        (5, 5): (3, 0.999, 0.001),
        (20, 1): (5, 0.958, 0.003),
        (20, 5): (5, 0.989, 0.002),
    }

    def paper(shots=1, **options):
        config = OmniglotConfig(shots=shots, **options)
        return reported(config, "held-out", evaluation(shots))

    assert paper(model="fc") == (3, 0.897, 0.011)
    assert paper(shots=5, model="fc") == (3, 0.975, 0.006)
    assert paper(ways=20, inner_steps=5) == (5, 0.958, 0.003)
    assert paper(ways=20) is None  # trained with 1 step
    assert paper(ways=20, inner_steps=5, model="fc") is None
    assert paper(shots=2) is None


def test_the_figure_shows_each_evaluation_its_band_the_paper_and_chance():
    figure = accuracy_figure(
        OmniglotConfig(), "held-out", [evaluation(), evaluation(2, (0.2, 0.8, 0.85))]
    )
    (axes,) = figure.axes
    one, paper, two, chance = axes.get_lines()
    assert one.get_xydata().tolist() == [[0, 20], [1, 90], [3, 95]]
    assert two.get_xydata().tolist() == [[0, 20], [1, 80], [3, 85]]
    assert paper.get_xydata().tolist() == [[3, 98.7]]
    assert set(chance.get_ydata()) == {20}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["1 shot", "2 shots", "Finn et al. 2017, 1 shot", "chance, 20%"]


@pytest.mark.parametrize(("invert", "channels"), [(True, 1), (False, 3)])
def test_the_picture_shows_a_task_and_marks_right_and_wrong(invert, channels):
    generator = torch.Generator().manual_seed(0)
    support_y, query_y = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    answers = Answers(
        steps=3,
        support_x=torch.rand(4, channels, 5, 5, generator=generator),
        support_y=support_y,
        query_x=torch.rand(4, channels, 5, 5, generator=generator),
        query_y=query_y,
        predicted=torch.tensor([0, 0, -1, 1]),
    )
    figure = answers_figure(answers, invert)
    panels = figure.axes  # row by row: two of support images, two of query images
    wanted = [answers.support_x[i] for i in (0, 2, 1, 3)] + [answers.query_x[i] for i in range(4)]
    assert len(panels) == 8
    for axes, image in zip(panels, wanted, strict=True):
        shown = torch.as_tensor(axes.get_images()[0].get_array().data)
        image = 1 - image.double() if invert else image.double()
        torch.testing.assert_close(shown, image[0] if channels == 1 else image.permute(1, 2, 0))
    frames = [axes.spines["top"].get_edgecolor() for axes in panels]
    colors = ["tab:gray"] * 4 + ["tab:green", "tab:red", "tab:red", "tab:green"]
    assert frames == [to_rgba(color) for color in colors]
    signs = [axes.get_xlabel() for axes in panels[4:]]
    assert signs == ["✓ class 1", "✗ class 1", "✗ none", "✓ class 2"]
    assert [axes.get_title() for axes in panels[:2]] == ["class 1", "class 2"]
    assert figure.get_suptitle() == "2 of 4 query images right after 3 steps"
