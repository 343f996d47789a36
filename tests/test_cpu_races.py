"""The C++ backend's own threads, used in every way that there is.

`make sanitize-threads` runs these with the thread sanitizer, which ends the process at a race.

Torch itself has one thread: how those of its OpenMP wait for each other, the sanitizer cannot see.
"""

import threading

import pytest
import torch
from torch import nn

from maml_fast import MAML, cpu_cost, cpu_features
from maml_fast.models import omniglot_conv4
from tests.engines import LAYOUTS
from tests.networks import Draw

pytestmark = pytest.mark.usefixtures("extension", "own_threads")

SIZES = (4, 24, 3)
NETWORKS = ("tasks_in_lanes", "rows_in_lanes", "images", "large")


@pytest.fixture
def own_threads():
    """The extension on threads of its own."""
    extension = cpu_features.extension()
    extension.share_openmp(0)
    yield
    cpu_features.extension.cache_clear()
    cpu_features.extension()


class Team:
    """The number of threads that a call has: that which its caller asked for, or else all did."""

    def __init__(self):
        self.everybody, self.own = 1, threading.local()

    def __call__(self, count):
        self.everybody = count

    def of_caller(self):
        return getattr(self.own, "count", self.everybody)


@pytest.fixture
def team(monkeypatch, threads):
    threads(1)
    team = Team()
    monkeypatch.setattr(torch, "get_num_threads", team.of_caller)
    return team


@pytest.fixture(params=NETWORKS)
def network(request, monkeypatch):
    """A model, a loss and a batch with work for several threads: of flat rows in either layout, of
    images, and with a weight so large that its sum over tasks is shared too."""
    draw = Draw(3)
    if request.param == "images":
        x, q = draw.normal(12, 3, 1, 8, 8), draw.normal(12, 3, 1, 8, 8)
        y, yq = (draw.classes(12, 3, classes=3) for _ in range(2))
        return omniglot_conv4(3, 4, image_size=8).double(), "cross_entropy", (x, y, q, yq)
    if request.param in LAYOUTS:
        monkeypatch.setattr(cpu_cost, "LAYOUTS", (request.param,))
    sizes, tasks = ((300, 100, 5), 20) if request.param == "large" else (SIZES, 60)
    return draw.mlp(sizes), "mse", tuple(draw.batch("mse", tasks, 5, 4, sizes)[:4])


def module(model, loss, **options):
    return MAML(model, loss, 0.1, inner_steps=2, backend="cpu", **options)


def at_once(works):
    """Runs each on a thread of its own, all begun at the same time; raises what one raised."""
    gate, raised = threading.Barrier(len(works)), []

    def run(work):
        try:
            gate.wait()
            work()
        except BaseException as error:
            raised.append(error)

    workers = [threading.Thread(target=run, args=(work,)) for work in works]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if raised:
        raise raised[0]


def assert_same_bits(found, wanted):
    assert torch.equal(found[0].task_losses, wanted[0].task_losses)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name


def test_calls_in_a_row_find_the_threads_awake(team):
    """The first test, while there is but one: where there are more of them than processors, they
    sleep between calls, and another lock wakes them."""
    draw = Draw(4)
    maml = module(draw.mlp(SIZES, nn.ReLU), "mse")
    batch = draw.batch("mse", 60, 5, 4, SIZES)
    team(2)
    wanted = maml.value_and_grad(*batch)
    for _ in range(200):
        assert_same_bits(maml.value_and_grad(*batch), wanted)


def test_a_call_on_more_and_on_fewer_threads(network, team):
    model, loss, batch = network
    maml = module(model, loss)
    team(1)
    wanted = maml.value_and_grad(*batch)
    for count in (2, 4, 3, 1, 6, 2):
        team(count)
        assert_same_bits(maml.value_and_grad(*batch), wanted)


def test_calls_of_one_module_and_of_others_at_once(network, team):
    """Whoever comes while the threads are taken works alone."""
    model, loss, batch = network
    team(3)
    mamls = [module(model, loss) for _ in range(3)]
    wanted = mamls[0].value_and_grad(*batch)

    def calls(maml):
        for _ in range(4):
            assert_same_bits(maml.value_and_grad(*batch), wanted)

    at_once([lambda maml=maml: calls(maml) for maml in (*mamls, mamls[0])])


def test_callers_that_ask_for_different_numbers_of_threads(network, team):
    model, loss, batch = network
    team(2)
    wanted = module(model, loss).value_and_grad(*batch)

    def calls(own):
        maml = module(model, loss)
        for count in own:
            team.own.count = count
            assert_same_bits(maml.value_and_grad(*batch), wanted)

    at_once([lambda own=own: calls(own) for own in ((2, 5, 1), (3, 1, 4), (1, 7, 2))])


def test_a_module_prepared_by_several_threads_at_once(network, team):
    """Plans and programs of several sizes, none there before: gradients, values, predictions."""
    model, loss, batch = network
    x, y, q, _ = batch
    team(2)
    before = module(model, loss)
    wanted = before.value_and_grad(*batch)
    less = before.value_and_grad(*(rows[:7] for rows in batch))
    predicted = before.adapt(x, y)(q)
    maml = module(model, loss)

    def gradient():
        assert_same_bits(maml.value_and_grad(*batch), wanted)

    def gradient_of_less():
        assert_same_bits(maml.value_and_grad(*(rows[:7] for rows in batch)), less)

    def value():
        with torch.no_grad():
            assert torch.equal(maml(*batch).loss, wanted[0].loss)

    def prediction():
        assert torch.equal(maml.adapt(x, y)(q), predicted)

    for _ in range(2):  # then with all prepared
        at_once([gradient, gradient_of_less, value, prediction, gradient])


def test_a_pause_in_which_the_threads_fall_asleep(team):
    draw = Draw(4)
    maml = module(draw.mlp(SIZES, nn.ReLU), "mse")
    batch = draw.batch("mse", 60, 5, 4, SIZES)
    team(3)
    wanted = maml.value_and_grad(*batch)
    for _ in range(4):
        threading.Event().wait(0.005)  # they spin for much less
        assert_same_bits(maml.value_and_grad(*batch), wanted)
