"""Foreign checkpoints: whatever a file has, it is read or refused by name, in little time and
memory. A forged one has the right digest, as whoever made it can compute it too."""

import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from maml_fast.checkpoint import CheckpointError, _digest, load_checkpoint
from maml_fast.config import ConfigError
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.kinds import load_trained
from maml_fast.run_images import ImageRun
from maml_fast.run_sinusoid import SinusoidRun
from tests.image_runs import folder_run
from tests.mutations import FOREIGN, bounded, damaged, edited

DTYPES = [
    *("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64"),
    *("C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "Q4", "", "f32"),
]
SIZES = st.sampled_from([0, 1, 2, 3, 5, 2**31, 2**32, 2**62, 2**63 - 1, 2**64, -1])


@dataclasses.dataclass
class Saved:
    """A run, and what is in its checkpoint."""

    run: object
    whole: bytes
    entry: dict
    tensors: dict


def saved(run, path):
    run.step()
    run.save(path)
    whole = path.read_bytes()
    with safetensors.safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["maml_fast"])
    del entry["digest"]
    return Saved(run, whole, entry, safetensors.torch.load(whole))


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory):
    config = SinusoidConfig(
        hidden=(3,), tasks=2, iterations=3, backend="reference", learn_inner_lr=True
    )
    return saved(SinusoidRun(config), tmp_path_factory.mktemp("sinusoid") / "a")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    run = ImageRun(folder_run(folder))
    run.step()
    return saved(run, folder / "a")


def read(path, run):
    """Read in all three ways; each succeeds or refuses the file by its name, which stays as it
    is. A resumed run also refuses what a file says of its configuration, by the field's name."""
    before = path.read_bytes()
    with bounded():
        for reading in (load_checkpoint, load_trained, run.restore):
            try:
                reading(path)
            except CheckpointError as error:
                assert str(path) in str(error)  # noqa: PT017
            except ConfigError as error:
                assert reading == run.restore, error  # noqa: PT017
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def forged(path, entry, tensors):
    """A file of these, with a digest that is right."""
    text = json.dumps(entry | {"digest": _digest(entry, tensors)})
    path.write_bytes(safetensors.torch.save(tensors, {"maml_fast": text}))


def by_hand(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "foreign.safetensors"


@FOREIGN
@given(data=st.data())
def test_damaged_bytes(data, file, sinusoid):
    file.write_bytes(data.draw(damaged(sinusoid.whole)))
    read(file, sinusoid.run)


@FOREIGN
@given(data=st.data())
def test_a_forged_description(data, file, sinusoid):
    forged(file, data.draw(edited(sinusoid.entry)), sinusoid.tensors)
    read(file, sinusoid.run)


@FOREIGN
@given(data=st.data())
def test_a_forged_description_of_a_run_on_images(data, file, images):
    entry = data.draw(edited(images.entry))
    forged(file, entry, images.tensors)
    read(file, images.run)


@FOREIGN
@given(data=st.data())
def test_forged_tensors(data, file, sinusoid):
    """Of other shapes and types, with other values, missing, or with others beside them."""
    tensors = dict(sinusoid.tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(sinusoid.tensors)))
        kind = data.draw(st.sampled_from(["shape", "dtype", "values", "missing", "extra"]))
        tensor = sinusoid.tensors[name]
        if kind == "shape":
            tensors[name] = tensor.new_zeros(data.draw(st.lists(st.integers(0, 3), max_size=4)))
        elif kind == "dtype":
            dtypes = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
            tensors[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
        elif kind == "values":
            size = tensor.numel() * tensor.element_size()
            content = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
            flat = torch.frombuffer(content, dtype=torch.uint8).view(tensor.dtype)
            tensors[name] = flat.reshape(tensor.shape)
        elif kind == "missing":
            tensors.pop(name, None)
        else:
            tensors[data.draw(st.text(max_size=5)) + name] = tensor.clone()
    # Restored into a run of its own: what fits is taken over.
    run = SinusoidRun(sinusoid.run.config)
    forged(file, sinusoid.entry, tensors)
    read(file, run)


@FOREIGN
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(SIZES, max_size=4),
    places=st.sampled_from([[0, 0], [0, 24], [0, 2**63], [24, 0], [2**64 - 1, 2**64], [-1, 3]]),
)
@example(dtype="F32", shape=[0, 2**40, 2**40], places=[0, 0])
@example(dtype="F4", shape=[48], places=[0, 24])
def test_a_header_by_hand(dtype, shape, places, file, sinusoid):
    """Types and sizes that no tensor has, as the header of safetensors tells of them."""
    entry = {"format_version": 1, "config": {}, "iteration": 0, "digest": ""}
    by_hand(
        file,
        {
            "__metadata__": {"maml_fast": json.dumps(entry)},
            "model/0.weight": {"dtype": dtype, "shape": shape, "data_offsets": places},
        },
        bytes(24),
    )
    read(file, sinusoid.run)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(file)


@pytest.mark.parametrize("depth", [100, 900, 950, 990, 1000, 100_000])
def test_a_description_of_any_depth(depth, file, sinusoid):
    entry = {"format_version": 1, "config": {}, "iteration": 0, "digest": ""}
    deep = json.dumps(entry).replace("{}", '{"hidden": ' + "[" * depth + "]" * depth + "}")
    safetensors.torch.save_file({}, file, {"maml_fast": deep})
    read(file, sinusoid.run)


@pytest.mark.parametrize(
    "entry",
    [
        {"iteration": "7"},
        {"iteration": 7.0},
        {"iteration": True},
        {"iteration": -1},
        {"iteration": None},
        {"config": []},
        {"config": "sinusoid"},
        {"data": []},
        {"format_version": 0.5},
        {"format_version": True},
        {"digest": 3},
    ],
    ids=str,
)
def test_a_description_of_wrong_types_is_refused(entry, file, sinusoid):
    whole = sinusoid.entry | {"data": {}}
    forged(file, whole | entry, sinusoid.tensors)
    if "digest" in entry:
        safetensors.torch.save_file({}, file, {"maml_fast": json.dumps(whole | entry)})
    with pytest.raises(CheckpointError, match="damaged: its description cannot be read"):
        load_checkpoint(file)


def test_a_number_of_very_many_digits_is_refused(file):
    text = '{"format_version": ' + "1" * 5000 + "}"
    safetensors.torch.save_file({}, file, {"maml_fast": text})
    with pytest.raises(CheckpointError, match="its description cannot be read"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "sizes", [[300_000, 300_000], [2**31 - 1, 2**31 - 1], [2**31 - 1], [10**9] * 50], ids=str
)
def test_the_model_of_a_file_is_not_made_before_its_sizes_are_known(sizes, file, sinusoid):
    """It would take 360 GB, or more than there can be."""
    forged(file, sinusoid.entry | {"config": sinusoid.entry["config"] | {"hidden": sizes}}, {})
    with bounded(), pytest.raises(CheckpointError, match=r"foreign.safetensors: "):
        load_trained(file)


@pytest.mark.parametrize("count", [float("inf"), "x", None, [1], -1, True, 10**30], ids=str)
def test_data_that_are_none_are_refused_by_the_files_name(count, file, images):
    entry = images.entry | {"data": {"training": [["a", count]], "held_out": []}}
    forged(file, entry, images.tensors)
    for reading in (load_trained, images.run.restore):
        with pytest.raises(CheckpointError, match=r"foreign.safetensors: data: its classes cannot"):
            reading(file)


def test_a_path_that_is_none_is_refused(tmp_path):
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="a"):
            load_checkpoint(tmp_path / name)
