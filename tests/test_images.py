"""Episodes of images: what is drawn, how likely, as which pixels."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maml_fast import MAML
from maml_fast.tasks import Episodes, ImageSet, ImageTasks, images
from maml_fast.tasks.images import decode_lehmer, draw_distinct, turned
from tests.pictures import marked_set


def read_marks(x, counts):
    """[T, N, 1, H, H] of `marked_set` -> image, class and quarter turns, each [T, N]."""
    corners = [x[..., 0, 0, 0], x[..., 0, -1, 0], x[..., 0, -1, -1], x[..., 0, 0, -1]]
    corners = torch.stack(corners)  # counter-clockwise
    assert ((corners > 0).sum(0) == 1).all()
    assert torch.equal(corners.sum(0), x.sum((2, 3, 4)))
    image = (corners.sum(0) * 255).round().long() - 1
    own = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return image, own[image], corners.argmax(0)


def within_chance(observed, expected):
    """Chi-square of counts, within five standard deviations of its mean."""
    degrees = len(observed) - 1
    chi = ((observed - expected) ** 2 / expected).sum().item()
    return chi < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(("high", "count"), [(1, 1), (4, 1), (4, 4), (6, 3), (5, 5)])
def test_lehmer_codes_stand_for_all_ordered_choices_once(high, count):
    codes = list(itertools.product(*(range(high - i) for i in range(count))))
    chosen = decode_lehmer(torch.tensor(codes).T.contiguous()).T.tolist()
    assert sorted(chosen) == sorted(map(list, itertools.permutations(range(high), count)))


@settings(max_examples=60, deadline=None)
@given(
    highs=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
)
def test_draws_are_distinct_and_in_range(highs, count, seed):
    count = min(count, *highs)
    high = torch.tensor(highs)
    drawn = draw_distinct(high, count, torch.Generator().manual_seed(seed))
    assert drawn.shape == (count, len(highs))
    assert (drawn >= 0).all()
    assert (drawn < high).all()
    assert all(len(set(column)) == count for column in drawn.T.tolist())


@pytest.mark.parametrize(("high", "count"), [(2, 1), (5, 2), (4, 4), (7, 3)])
def test_ordered_choices_are_equally_likely(high, count):
    draws = 60_000
    generator = torch.Generator().manual_seed(high + count)
    drawn = draw_distinct(torch.tensor(high).expand(draws), count, generator)
    code = (drawn * high ** torch.arange(count)[:, None]).sum(0)
    observed = code.bincount(minlength=high**count)
    observed = observed[observed > 0].double()
    choices = math.perm(high, count)
    assert len(observed) == choices
    assert within_chance(observed, torch.tensor(draws / choices))


@pytest.mark.parametrize("choose", [torch.where, images._choose], ids=["where", "bytes"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_images_are_turned_by_their_quarters(choose, size, draw):
    pixels = torch.randint(0, 256, (9, 3, size, size), dtype=torch.uint8)
    quarters = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    found = turned(pixels, quarters, choose)
    for image, quarter, wanted in zip(found, quarters.tolist(), pixels, strict=True):
        assert torch.equal(image, wanted.rot90(quarter, (1, 2)))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=9),
    rotations=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_an_episode_is_of_distinct_classes_and_images(counts, rotations, seed, data):
    shots = data.draw(st.integers(1, min(counts) - 1), label="shots")
    query_shots = data.draw(st.integers(1, min(counts) - shots), label="query_shots")
    ways = data.draw(st.integers(1, len(counts) * (4 if rotations else 1)), label="ways")
    sampler = ImageTasks(marked_set(counts), ways, rotations=rotations, seed=seed)
    episodes = sampler.sample(4, shots, query_shots)
    assert episodes.support_x.shape == (4, ways * shots, 1, 3, 3)
    assert episodes.query_x.shape == (4, ways * query_shots, 1, 3, 3)
    assert all(tensor.is_contiguous() for tensor in episodes)
    support = read_marks(episodes.support_x, counts)
    query = read_marks(episodes.query_x, counts)
    for task in range(4):
        classes = {}
        for (image, own, turn), labels in (
            (support, episodes.support_y),
            (query, episodes.query_y),
        ):
            assert labels.dtype == torch.int64
            assert torch.equal(
                labels[task].bincount(), torch.full((ways,), len(image[task]) // ways)
            )
            for label, c, r in zip(
                labels[task].tolist(), own[task].tolist(), turn[task].tolist(), strict=True
            ):
                assert classes.setdefault(label, (c, r)) == (c, r)  # one class and turn a label
                assert rotations or r == 0
        assert len(set(classes.values())) == ways  # distinct classes
        turns = support[2][task].tolist() + query[2][task].tolist()
        drawn = list(zip(support[0][task].tolist() + query[0][task].tolist(), turns, strict=True))
        assert len(set(drawn)) == len(drawn) == ways * (shots + query_shots)  # disjoint


@pytest.mark.parametrize("rotations", [False, True])
def test_classes_and_images_are_equally_likely_at_every_place(rotations):
    counts, tasks, ways = [3, 12, 4, 7], 30_000, 3
    sampler = ImageTasks(marked_set(counts), ways, rotations=rotations, seed=1)
    drawn = sampler.draw(tasks, shots=1, query_shots=2)
    classes = len(counts) * (4 if rotations else 1)
    for label in range(ways):
        observed = drawn.classes[:, label].bincount(minlength=classes).double()
        assert within_chance(observed, torch.tensor(tasks / classes))
    for images_drawn in (drawn.support[..., 0], drawn.query[..., 0], drawn.query[..., 1]):
        for c, count in enumerate(counts):
            here = images_drawn[drawn.classes % len(counts) == c] - sum(counts[:c])
            observed = here.bincount(minlength=count).double()
            assert len(observed) == count
            assert within_chance(observed, torch.tensor(len(here) / count))


def test_a_turned_class_has_the_number_of_its_quarter():
    counts = [4, 4, 4]
    sampler = ImageTasks(marked_set(counts), 5, rotations=True, seed=2)
    drawn = sampler.draw(50, 2, 2)
    episodes = sampler.episodes(drawn)
    image, own, turn = read_marks(episodes.support_x, counts)
    assert torch.equal(image, drawn.support.flatten(1))
    assert torch.equal(own + 3 * turn, drawn.classes.repeat_interleave(2, dim=1))
    assert torch.equal(episodes.support_y, torch.arange(5).repeat_interleave(2).expand(50, 10))


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_rounded_once(invert, dtype):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 1, 1, 1)
    data = ImageSet(pixels, torch.tensor([0, 2]), ("one",), invert)
    x = ImageTasks(data, 1, dtype=dtype).sample(1, 1, 1).query_x
    values = np.arange(256, dtype=np.float32 if dtype == torch.float32 else np.float64)
    wanted = (255 - values if invert else values) / 255
    assert x.dtype == dtype
    assert x.flatten().tolist() == wanted.tolist()
    assert torch.equal(data.images, pixels)  # left as they were


@pytest.mark.parametrize("invert", [False, True])
def test_a_stream_keeps_no_images_beside_those_of_its_set(invert):
    data = marked_set([4] * 5, invert=invert)
    sampler = ImageTasks(data, 3)
    sampler.sample(2, 1, 1)
    kept = [value for value in vars(sampler).values() if isinstance(value, torch.Tensor)]
    assert sampler.data.images.data_ptr() == data.images.data_ptr()
    assert sum(tensor.nbytes for tensor in kept) < data.images.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_half_precision(dtype):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 1, 1, 1)
    data = ImageSet(pixels, torch.tensor([0, 2]), ("one",), invert=False)
    x = ImageTasks(data, 1, dtype=dtype).sample(1, 1, 1).query_x
    assert x.dtype == dtype
    wanted = torch.arange(256).double() / 255
    assert ((x.flatten().double() - wanted).abs() <= wanted * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("chunk", [1, 9 * 7, 2**30])
def test_chunks_change_no_bit(chunk, monkeypatch):
    sampler = ImageTasks(marked_set([5] * 6, invert=True), 4, rotations=True, seed=3)
    drawn = sampler.draw(6, 2, 3)
    wanted = sampler.episodes(drawn)
    monkeypatch.setattr(images, "CHUNK_CPU", chunk)
    found = sampler.episodes(drawn)
    assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))


def test_a_seed_fixes_every_bit_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    data = marked_set([6] * 20)
    one, two, other = (ImageTasks(data, 5, rotations=True, seed=seed) for seed in (6, 6, 7))
    for _ in range(3):
        a, b, c = one.sample(5, 1, 3), two.sample(5, 1, 3), other.sample(5, 1, 3)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a.support_x, c.support_x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_stream_goes_on_with_the_same_bits():
    data = marked_set([6] * 9)
    sampler = ImageTasks(data, 3, seed=8)
    sampler.sample(3, 1, 1)
    state = sampler.state_dict()
    wanted = [sampler.sample(3, 1, 2), sampler.sample(2, 2, 1)]
    restored = ImageTasks(data, 3, seed=99)
    restored.load_state_dict(state)
    for episodes, found in zip(
        wanted, [restored.sample(3, 1, 2), restored.sample(2, 2, 1)], strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(episodes, found, strict=True))
    with pytest.raises(ValueError, match=r"keys \['seed'\]; wanted is \['generator'\]"):
        sampler.load_state_dict({"seed": torch.zeros(1)})


def test_maml_takes_the_episodes():
    episodes = ImageTasks(marked_set([4] * 5), 3, seed=1, dtype=torch.float64).sample(4, 1, 2)
    assert isinstance(episodes, Episodes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3, dtype=torch.float64))
    found = MAML(model, loss="cross_entropy", inner_lr=0.4)(*episodes)
    wanted = MAML(model, loss="cross_entropy", inner_lr=0.4, backend="reference")(*episodes)
    assert found.query_outputs.shape == (4, 6, 3)
    assert torch.allclose(found.task_losses, wanted.task_losses, rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_its_own_and_makes_the_same_pixels():
    data = marked_set([7, 9, 8], invert=True)
    there = ImageTasks(data, 5, rotations=True, seed=1, device="cuda")
    drawn = there.draw(300, 2, 3)
    found = there.episodes(drawn)
    assert {tensor.device.type for tensor in found} == {"cuda"}
    here = ImageTasks(data, 5, rotations=True)
    wanted = here.episodes(type(drawn)(*(part.cpu() for part in drawn)))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, wanted, strict=True))
    assert all(len(set(row)) == 5 for row in drawn.classes.tolist())
