"""Sets of images and the sizes of their episodes: subsets, and bad arguments, which are named."""

import pytest
import torch

from maml_fast.tasks import DataError, ImageSet, ImageTasks
from tests.pictures import marked_set


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 4}, "the data has 3 classes; wanted are 4"),
        (
            {"ways": 13, "rotations": True},
            "the data has 3 classes, 12 with rotations; wanted are 13",
        ),
        ({"ways": 0}, "ways is 0; wanted is a whole number of at least 1"),
        ({"ways": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImageTasks(marked_set([4] * 3), **options)


def test_an_integer_dtype_is_refused():
    with pytest.raises(TypeError, match=r"dtype is torch.uint8; wanted is a floating type"):
        ImageTasks(marked_set([4]), 1, dtype=torch.uint8)


def test_oblong_images_are_not_turned():
    data = ImageSet(torch.zeros(2, 1, 2, 3, dtype=torch.uint8), torch.tensor([0, 2]), ("a",), False)
    assert ImageTasks(data, 1).sample(1, 1, 1).query_x.shape == (1, 1, 1, 2, 3)
    with pytest.raises(DataError, match="images are 2 x 3; to rotate them, wanted are squares"):
        ImageTasks(data, 1, rotations=True)


def test_too_few_images_of_a_class_are_named():
    sampler = ImageTasks(marked_set([20, 6, 20]), 2)
    sampler.sample(1, 1, 5)
    with pytest.raises(
        DataError,
        match=r"'class1' has 6 images; wanted are at least shots \+ query_shots = 1 \+ 6 = 7",
    ):
        sampler.sample(1, 1, 6)


@pytest.mark.parametrize("name", ["tasks", "shots", "query_shots"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_a_bad_size_is_named(name, value):
    sizes = {"tasks": 1, "shots": 1, "query_shots": 1} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; wanted is a whole number"):
        ImageTasks(marked_set([4]), 1).sample(**sizes)


def test_a_subset_has_its_classes_images_in_the_order_asked_for():
    data = marked_set([2, 3, 4], invert=True)
    subset = data.subset([2, 0])
    assert subset.names == ("class2", "class0")
    assert subset.starts.tolist() == [0, 4, 6]
    assert subset.counts.tolist() == [4, 2]
    assert subset.images[:, 0, 0, 0].tolist() == [6, 7, 8, 9, 1, 2]
    assert subset.invert


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes has 0; wanted are classes, each once"),
        ([1, 1], "classes has 2; wanted are classes, each once"),
        ([3], "classes is 3; wanted is a whole number of at least 0 and at most 2"),
        ([-1], "classes is -1"),
    ],
)
def test_a_bad_subset_is_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        marked_set([2, 3, 4]).subset(classes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(3, 1, 2, 2)}, TypeError, "images is torch.float32"),
        (
            {"images": torch.zeros(3, 2, 2, dtype=torch.uint8)},
            ValueError,
            r"images has the shape \[3, 2, 2\]",
        ),
        (
            {"starts": torch.tensor([0, 1, 3], dtype=torch.int32)},
            TypeError,
            "starts is torch.int32",
        ),
        ({"starts": torch.tensor([0, 3])}, ValueError, "starts has 2 entries for 2 names"),
        (
            {"starts": torch.tensor([0, 1, 4])},
            ValueError,
            "starts goes from 0 to 4; wanted is 0 to 3",
        ),
        ({"starts": torch.tensor([0, 3, 3])}, ValueError, "gives class 'b' no image"),
        ({"names": ("a", "a")}, ValueError, "names has 2; wanted are names, each once"),
    ],
)
def test_fields_that_do_not_belong_together_are_refused(changes, error, message):
    fields = {
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "starts": torch.tensor([0, 1, 3]),
        "names": ("a", "b"),
        "invert": False,
    }
    ImageSet(**fields)
    with pytest.raises(error, match=message):
        ImageSet(**fields | changes)
