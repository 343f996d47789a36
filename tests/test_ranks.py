"""A run of several processes is the run of one: its tasks, its gradient, its files and its end."""

import dataclasses
import json
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from maml_fast import ranks
from maml_fast.checkpoint import load_checkpoint
from maml_fast.config import ConfigError
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.errors import NonFiniteError
from maml_fast.ranks import ALONE, RankError, Ranks, joined, label
from maml_fast.tasks import ImageTasks, SinusoidTasks
from maml_fast.tasks.episodes import EVERY
from maml_fast.train import train
from tests.image_runs import folder_run
from tests.pictures import marked_set
from tests.processes import spawn

RANKS = 2
CHECKPOINT = "checkpoint.safetensors"


def config_of(output, **changes):
    """A small run of 5 tasks, which 2 ranks cannot share alike."""
    config = SinusoidConfig(
        iterations=12,
        tasks=5,
        shots=4,
        query_shots=5,
        hidden=(6, 5),
        activation="tanh",  # no kink at which two correct programs may differ
        inner_lr=0.1,
        meta_lr=0.01,
        learn_inner_lr=True,
        clip_gradient=0.5,
        seed=3,
        threads=1,
        log_every=5,
        checkpoint_every=4,
        output=output,
    )
    return dataclasses.replace(config, **changes)


def images_of(folder, config):
    """A run of 3 tasks, validated, on the pictures of `config`."""
    return dataclasses.replace(config, iterations=4, tasks=3, output=folder / "images")


def asked(config, rank, iteration):
    """The run, during which this rank alone gets a signal."""
    original = SinusoidTasks.sample
    taken = 0

    def sample(self, *arguments):
        nonlocal taken
        taken += 1
        if taken == iteration and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    SinusoidTasks.sample = sample
    try:
        return train(config)
    finally:
        SinusoidTasks.sample = original


def error_of(function):
    try:
        function()
    except (OSError, ValueError, FloatingPointError) as error:
        return [type(error).__name__, str(error)]
    return None


def broken(config, rank):
    """One rank's tasks are not finite in the third iteration; both must end."""
    original = SinusoidTasks.sample
    taken = 0

    def sample(self, *arguments):
        nonlocal taken
        taken += 1
        episodes = original(self, *arguments)
        if taken == 3 and rank == 1:
            episodes.query_y[1] = torch.inf
        return episodes

    SinusoidTasks.sample = sample
    try:
        train(config)
    finally:
        SinusoidTasks.sample = original
        if rank == 1:
            dist.destroy_process_group()  # as the end of the process would


def member(rank, folder, pictures):
    """All that the tests below look at, in one pair of processes: starting them takes longest."""
    told = {}
    for name in ("whole", "again"):
        result = train(config_of(folder / name))
        told[name] = [result.iteration, result.loss, result.stopped_by]
    train(config_of(folder / "few", tasks=1))
    train(config_of(folder / "grown"), resume=True)  # begun by one process
    train(config_of(folder / "shrunk", iterations=7))
    stopped = asked(config_of(folder / "stopped"), rank, 6)
    told["stopped"] = [stopped.iteration, stopped.stopped_by]
    told["there"] = (folder / "stopped" / CHECKPOINT).exists()
    train(config_of(folder / "stopped"), resume=True)
    best = train(images_of(folder, pictures)).best
    told["best"] = [best.iteration, best.accuracy]
    told["differ"] = error_of(lambda: train(config_of(folder / "differ", seed=rank)))
    told["broken"] = error_of(lambda: broken(config_of(folder / "broken"), rank))
    (folder / f"told{rank}.json").write_text(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks did, and what one process did with the same configurations."""
    folder = tmp_path_factory.mktemp("ranks")
    pictures = folder_run(folder)
    train(config_of(folder / "grown", iterations=7))
    spawn(member, RANKS, folder, pictures)
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """By rank."""
    return [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(RANKS)]


def tensors(folder):
    return load_file(folder / CHECKPOINT)


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def assert_same_run(found, wanted):
    """To rounding; the stream of tasks to the bit."""
    assert found.keys() == wanted.keys()
    assert torch.equal(found["tasks/generator"], wanted["tasks/generator"])
    for name, tensor in wanted.items():
        difference = (found[name].double() - tensor.double()).norm()
        assert difference <= 1e-5 * tensor.double().norm(), name


def test_the_run_is_that_of_one_process(folder, told, tmp_path):
    alone = train(config_of(tmp_path / "one"))
    assert_same_run(tensors(folder / "whole"), tensors(tmp_path / "one"))
    assert told[0]["whole"] == told[1]["whole"] == [12, pytest.approx(alone.loss, rel=1e-6), 0]
    found, wanted = (
        [json.loads(line) for line in (at / "history.jsonl").read_text().splitlines()]
        for at in (folder / "whole", tmp_path / "one")
    )
    assert [line["iteration"] for line in found] == [5, 10]
    assert found == [pytest.approx(line, rel=1e-6) for line in wanted]


def test_so_many_processes_give_the_same_bits_each_time(folder):
    assert_same_bits(tensors(folder / "again"), tensors(folder / "whole"))


def test_fewer_tasks_than_processes(folder, tmp_path):
    train(config_of(tmp_path / "one", tasks=1))
    assert_same_run(tensors(folder / "few"), tensors(tmp_path / "one"))


def test_the_number_of_processes_may_change(folder, tmp_path):
    train(config_of(tmp_path / "one"))
    assert_same_run(tensors(folder / "grown"), tensors(tmp_path / "one"))
    assert train(config_of(folder / "shrunk"), resume=True).iteration == 12
    assert_same_run(tensors(folder / "shrunk"), tensors(tmp_path / "one"))


def test_a_signal_to_one_stops_all_after_the_same_iteration(folder, told):
    for one in told:
        assert one["stopped"] == [6, signal.SIGTERM]
        assert one["there"]  # when train returned, on every rank
    assert_same_bits(tensors(folder / "stopped"), tensors(folder / "whole"))


def test_validation_is_that_of_one_process(folder, told, tmp_path):
    config = images_of(folder, folder_run(tmp_path))
    alone = train(dataclasses.replace(config, output=tmp_path / "one")).best
    assert told[0]["best"] == told[1]["best"]
    assert told[0]["best"] == [alone.iteration, pytest.approx(alone.accuracy, abs=0.02)]
    for name in (CHECKPOINT, "best.safetensors"):
        found, wanted = (load_file(at / name) for at in (folder / "images", tmp_path / "one"))
        assert found["validation/best_iteration"] == wanted["validation/best_iteration"]
        for key, tensor in wanted.items():
            if key.startswith("model/") and key.endswith("weight"):
                # A convolution's bias before a norm has no gradient but rounding.
                assert (found[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def test_ranks_with_different_configurations_do_not_begin(told):
    for rank, one in enumerate(told):
        assert one["differ"] == [
            "RankError",
            f"rank {rank} of 2: the ranks do not have the same configuration and data",
        ]


def test_an_error_on_one_rank_ends_all(folder, told):
    kind, text = told[1]["broken"]
    assert kind == "NonFiniteError"
    assert text.startswith("rank 1 of 2: the query loss is not finite in 1 of 3 tasks: 1;")
    assert text.endswith(", of all 5 tasks: 3")  # the second of the ranks' shares is 2, 3, 4
    kind, text = told[0]["broken"]
    assert kind == "RankError"
    assert text.startswith("rank 0 of 2: another rank has ended, or did not answer in 600 s")
    assert load_checkpoint(folder / "broken" / CHECKPOINT).iteration == 0  # as it began


@pytest.mark.parametrize(("tasks", "count"), [(25, 2), (3, 5), (8, 4), (1, 1)])
def test_shares_are_all_tasks_once(tasks, count):
    shares = [Ranks(rank, count).share(tasks) for rank in range(count)]
    places = [place for share in shares for place in range(tasks)[share]]
    assert places == list(range(tasks))
    sizes = [len(range(tasks)[share]) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def streams(kind):
    if kind == "sinusoid":
        return SinusoidTasks(5)
    return ImageTasks(marked_set([6, 6, 7]), 2, rotations=True, seed=5)


@pytest.mark.parametrize("kind", ["sinusoid", "images"])
@pytest.mark.parametrize("own", [slice(0, 2), slice(2, 5), slice(3, 3)])
def test_a_share_is_that_part_of_all_tasks(kind, own):
    whole, part = streams(kind), streams(kind)
    for _ in range(2):
        wanted, found = whole.sample(5, 2, 3), part.sample(5, 2, 3, own)
        assert len(found.support_x) == own.stop - own.start
        assert all(torch.equal(a, b[own]) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(whole.state_dict()["generator"], part.state_dict()["generator"])


@pytest.mark.parametrize("name", ["", "none"])
def test_a_launch_without_a_name_is_no_launch(name, monkeypatch):
    """Else every later one would be taken for the same."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    with joined("cpu") as found:
        assert found.launch is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    with joined("cpu") as found:
        assert found.launch == "mine"


@pytest.mark.parametrize("port", ["0", "99999999", "x"])
def test_ports_that_are_none(port, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match="MASTER_PORT is"), joined("cpu"):
        pass


def test_a_store_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(ranks, "STORE_PATIENCE", timedelta(seconds=1))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "9")
    with pytest.raises(RankError, match="rank 0 of 1"), joined("cpu"):
        pass


def test_one_process_is_not_touched():
    loss, gradient = torch.tensor(2.0), torch.ones(3)
    combined, counted = ALONE.combine(gradient, loss, 5)
    assert combined is loss
    assert counted == 5
    assert torch.equal(gradient, torch.ones(3))
    assert ALONE.share(5) == EVERY
    error = NonFiniteError("x", [1])
    assert ALONE.explained(error, 5) is error
    with joined("cpu") as found:
        assert (found.rank, found.count, found.launch) == (0, 1, None)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2; wanted is what torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; wanted is the number that torchrun sets"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "MASTER_ADDR is not set; wanted is what torchrun sets",
        ),
    ],
)
def test_half_an_environment_is_refused(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), joined("cpu"):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "local", "message"),
    [
        ("cuda:0", 0, "device is 'cuda:0', and there are 2 processes; wanted is 'cpu' or 'cuda'"),
        ("mps", 0, "device is 'mps', and there are 2 processes; wanted is 'cpu' or 'cuda'"),
        ("cuda", 1, "'cuda', of which this machine has 1, and process 2 on it has none left"),
    ],
)
def test_each_process_has_a_device_of_its_own(name, local, message, monkeypatch):
    """As on a machine with one GPU."""
    taken = []
    monkeypatch.setattr(ranks, "check_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with pytest.raises(ConfigError, match=message):
        Ranks(local, 2, local).device(name)
    assert taken == []
    assert Ranks(2, 4, 0).device("cuda") == torch.device("cuda", 0)
    assert taken == [0]
    assert Ranks(1, 2, 1).device("cpu") == torch.device("cpu")
    assert Ranks().device("cuda:0") == torch.device("cuda", 0)


def test_a_launch_knows_the_run_that_it_began(tmp_path):
    assert not Ranks(launch="a").began(tmp_path)
    Ranks(launch="a").mark(tmp_path)
    assert Ranks(launch="a").began(tmp_path)
    assert not Ranks(launch="b").began(tmp_path)
    assert not Ranks().began(tmp_path)
    Ranks().mark(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ranks.LAUNCH).write_text("{")
    assert not Ranks(launch="a").began(tmp_path)


def test_messages_name_the_rank(monkeypatch):
    assert label() == ""
    monkeypatch.setenv("RANK", "1")
    assert label() == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert label() == "rank 1: "
    assert isinstance(RankError("x"), OSError)  # which the command line tells in a line
