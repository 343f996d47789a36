"""Class splits: by share, number and name, by class and by group; what a seed fixes."""

import pytest
import torch

from maml_fast.tasks import DataError, ImageSet, classes_named, group_of, split_classes


def named_set(names):
    images = torch.arange(len(names), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(images, torch.arange(len(names) + 1), tuple(names), invert=False)


ALPHABETS = {"Greek": 24, "Latin": 26, "Korean": 40, "Balinese": 24, "Early": 22}
DATA = named_set(
    [f"{name}/character{i:02}" for name, count in ALPHABETS.items() for i in range(1, count + 1)]
)


def check(data, train, validation):
    """The two have all classes, each once, with their own images, in the order of the data."""
    assert set(train.names) | set(validation.names) == set(data.names)
    assert len(train.names) + len(validation.names) == len(data.names)
    for part in (train, validation):
        places = [data.names.index(name) for name in part.names]
        assert places == sorted(places)
        assert part.images.flatten().tolist() == places


@pytest.mark.parametrize(("validation", "count"), [(0.25, 34), (13, 13), (0.001, 1), (0.999, 135)])
def test_a_share_or_number_of_classes_at_random(validation, count):
    train, held_out = split_classes(DATA, validation, seed=1)
    check(DATA, train, held_out)
    assert len(held_out.names) == count


@pytest.mark.parametrize(("validation", "count"), [(0.4, 2), (1, 1), (4, 4), (0.01, 1), (0.99, 4)])
def test_a_share_or_number_of_groups(validation, count):
    train, held_out = split_classes(DATA, validation, seed=1, by="group")
    check(DATA, train, held_out)
    groups = {group_of(name) for name in held_out.names}
    assert len(groups) == count
    assert not groups & {group_of(name) for name in train.names}


def test_named_groups_and_classes():
    train, held_out = split_classes(DATA, ["Latin", "Greek/character03"], by="group")
    check(DATA, train, held_out)
    assert held_out.names[0] == "Greek/character03"
    assert {group_of(name) for name in held_out.names[1:]} == {"Latin"}
    assert len(held_out.names) == 27


def test_a_name_is_taken_whole():
    data = named_set(["a/b/1", "a/b/2", "a/bc/1", "ab/1"])
    assert classes_named(data, ["a/b"]) == {0, 1}
    assert classes_named(data, ["a"]) == {0, 1, 2}
    assert classes_named(data, ["ab", "a/b/2"]) == {1, 3}


def test_seeds_fix_the_choice_whatever_the_order():
    one, two = (split_classes(DATA, 0.3, seed=5)[1] for _ in range(2))
    other = split_classes(DATA, 0.3, seed=6)[1]
    assert one.names == two.names != other.names
    backwards = DATA.subset(list(reversed(range(len(DATA.names)))))
    assert set(split_classes(backwards, 0.3, seed=5)[1].names) == set(one.names)


def test_every_class_is_held_out_by_some_seeds():
    times = torch.zeros(len(DATA.names))
    for seed in range(400):
        for image in split_classes(DATA, 34, seed=seed)[1].images.flatten().tolist():
            times[image] += 1
    # Binomial, 400 times a quarter: mean 100, deviation 8.7.
    assert times.min() > 100 - 5 * 8.7
    assert times.max() < 100 + 5 * 8.7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validation": 0.0}, ValueError, "validation is 0.0; wanted is a share between 0 and 1"),
        ({"validation": float("nan")}, ValueError, "validation is nan"),
        ({"validation": 0}, ValueError, "validation is 0; wanted is a whole number of at least 1"),
        ({"validation": True}, ValueError, "validation is True"),
        ({"validation": 136}, DataError, "validation is 136 of 136 classes; wanted is at most 135"),
        ({"validation": 5, "by": "group"}, DataError, "validation is 5 of 5 groups"),
        ({"validation": ["Latim"]}, DataError, "'Latim'; there are Balinese, Early, Greek"),
        ({"validation": []}, TypeError, r"names of classes or groups are \[\]"),
        ({"validation": "Latin"}, TypeError, "names of classes or groups are 'Latin'"),
        ({"validation": list(ALPHABETS)}, DataError, "takes all 136 classes"),
        (
            {"validation": 1, "by": "name"},
            ValueError,
            "by is 'name'; wanted is 'random' or 'group'",
        ),
        ({"validation": 1, "seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        split_classes(DATA, **options)


def test_one_group_cannot_be_split():
    with pytest.raises(DataError, match="the data has 1 of groups; to split it, wanted are 2"):
        split_classes(named_set(["cat", "dog"]), 1, by="group")
