"""What is kept from call to call, without a GPU: graphs, by a stand-in for them; tiles measured."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch

from maml_fast import MAML, triton_features
from maml_fast.backends import cuda_graphs, tuning
from maml_fast.backends.cuda_graphs import GRAPHS_KEPT, KEYS_KEPT, Graphs
from maml_fast.problem import TaskBatch


def batch_of(tasks, value=1.0):
    return TaskBatch(*(torch.full((tasks, 2, 1), value) for _ in range(4)))


class Recorded:
    """Instead of a graph: launches again on what it keeps, into tensors that it keeps."""

    def __init__(self, batch, launch):
        self.batch = TaskBatch(*(t.clone() for t in batch[:4]))
        self.launch = launch
        self.results = launch(self.batch)
        made.append(self)

    def replay(self, batch):
        for mine, theirs in zip(self.batch[:4], batch[:4], strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(self.results, self.launch(self.batch), strict=True):
            mine.copy_(theirs)
        replayed.append(self)
        return [tensor.clone() for tensor in self.results]


made, replayed, direct = [], [], []


def launch(batch):
    direct.append(batch)
    return [batch.support_x.sum(dim=(1, 2)), batch.query_y.sum()]


@pytest.fixture
def stand_in(monkeypatch):
    for record in (made, replayed, direct):
        record.clear()
    monkeypatch.setattr(cuda_graphs, "Captured", Recorded)
    monkeypatch.setattr(cuda_graphs, "on_gpu", lambda batch: True)


def check(graphs, key, batch):
    sums, total = graphs.run(key, batch, launch)
    assert torch.equal(sums, batch.support_x.sum(dim=(1, 2)))
    assert torch.equal(total, batch.query_y.sum())
    return sums


@pytest.mark.usefixtures("stand_in")
class TestGraphs:
    def test_the_second_call_is_captured_and_later_ones_replayed(self):
        graphs = Graphs()
        for call, counts in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
            check(graphs, "key", batch_of(3, float(call)))
            assert (len(made), len(replayed)) == counts

    def test_results_are_the_callers_own(self):
        graphs = Graphs()
        found = [check(graphs, "key", batch_of(3, float(call))) for call in range(4)]
        assert [sums[0].item() for sums in found] == [0, 2, 4, 6]

    def test_of_keys_and_shapes_each_has_its_own(self):
        graphs = Graphs()
        for _ in range(3):
            for key, tasks in (("a", 3), ("b", 3), ("a", 4)):
                check(graphs, key, batch_of(tasks))
        assert len(made) == 3
        assert len(replayed) == 6

    def test_another_dtype_is_another_graph(self):
        graphs = Graphs()
        for _ in range(2):
            check(graphs, "key", batch_of(3))
            check(graphs, "key", TaskBatch(*(t.long() for t in batch_of(3)[:4])))
        assert [graph.batch.support_x.dtype for graph in made] == [torch.float32, torch.int64]

    @pytest.mark.parametrize(("allowed", "key"), [(False, "key"), (True, None)])
    def test_what_may_not_be_captured(self, allowed, key):
        graphs = Graphs(allowed)
        for _ in range(3):
            check(graphs, key, batch_of(3))
        assert len(direct) == 3
        assert not made

    def test_not_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(cuda_graphs, "on_gpu", lambda batch: False)
        graphs = Graphs()
        for _ in range(3):
            check(graphs, "key", batch_of(3))
        assert not made

    def test_the_latest_are_kept(self):
        graphs = Graphs()
        for key in range(GRAPHS_KEPT + 1):
            for _ in range(2):
                check(graphs, key, batch_of(3))
            check(graphs, 0, batch_of(3))  # so that it is never the oldest
        assert len(graphs._captured) == GRAPHS_KEPT
        before = len(made)
        check(graphs, 0, batch_of(3))
        for _ in range(3):  # had to make room: not captured again, or keys in turn always would be
            check(graphs, 1, batch_of(3))
        assert len(made) == before
        assert len(graphs._captured) == GRAPHS_KEPT

    def test_keys_that_never_come_again_are_forgotten(self):
        graphs = Graphs()
        for key in range(10 * KEYS_KEPT):
            check(graphs, key, batch_of(3))
        assert len(graphs._seen) == KEYS_KEPT
        assert not made

    def test_what_a_graph_reads_lives_as_long(self):
        """The rates of a call, say, of which the next call has others."""
        graphs, rates = Graphs(), {}

        def run(key):
            rates["latest"] = torch.tensor(float(key))
            graphs.run(key, batch_of(3), launch, lambda: rates["latest"])

        for key in (1, 1, 2):
            run(key)
        assert [graph.alive.item() for graph in made] == [1]

    @pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, RuntimeError])
    def test_what_cannot_be_captured_is_launched(self, monkeypatch, kind):
        tried = []

        def fails(batch, launch):
            tried.append(batch)
            raise kind("no memory")

        monkeypatch.setattr(cuda_graphs, "Captured", fails)
        graphs = Graphs()
        check(graphs, "key", batch_of(3))
        with pytest.warns(RuntimeWarning, match="could not be captured.*no memory"):
            check(graphs, "key", batch_of(3))
        for _ in range(2):
            check(graphs, "key", batch_of(3))
        assert len(tried) == 1


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kernels", ["fused", "layers"])
def test_a_meta_step_lets_nothing_go_that_its_graph_reads(kernels, draw):
    """The parameters' addresses and the rates, once the model has others."""
    pytest.importorskip("triton")
    if not triton_features.interpreted():
        pytest.skip("needs Triton's interpreter")
    sizes, rate = (2, 3, 2), torch.tensor(0.1)
    model, other = (draw.mlp(sizes).float() for _ in range(2))
    batch = TaskBatch(*(t.float() for t in draw.batch("mse", 2, 2, 2, sizes)[:4]))
    forms = {"fused": "auto", "layers": "factored"}[kernels]
    maml = MAML(model, inner_lr=rate, backend="triton", fast_weights=forms)
    for _ in range(2):
        maml.value_and_grad(*batch)
    (step,) = maml.plan(*batch[:4:2]).programs.values()
    reads = [weakref.ref(step._rates[1])]
    if kernels == "fused":
        reads.append(weakref.ref(step._addresses[1]))
    assert len(made) == 1
    for p, new in zip(model.parameters(), other.parameters(), strict=True):
        p.data = new.data
    rate.fill_(0.3)
    maml.value_and_grad(*batch)
    assert len(made) == 1
    latest = [step._rates[1]] + ([step._addresses[1]] if kernels == "fused" else [])
    assert reads[-1]() is not latest[-1]  # it has others now
    assert all(tensor() is not None for tensor in reads)


NAMES = ["a", "b", "c"]
SECONDS = {"a": 3.0, "b": 1.0, "c": 2.0}


class Kernel:
    """Candidates by name; remembers which ran, and which was measured."""

    def __init__(self, wrong=(), failing=None, seconds=SECONDS):
        self.wrong, self.failing, self.of, self.ran, self.measured = (
            wrong, failing or {}, seconds, [], [],
        )  # fmt: skip

    def run(self, name):
        self.ran.append(name)
        if name in self.failing:
            raise self.failing[name]
        # A small tensor beside a large one, and one that is next to nothing
        found = torch.tensor([0.1, 0.15 if name in self.wrong else 0.1 + 1e-7])
        return [torch.ones(50), found, torch.tensor([1e-9 if name == "b" else 0.0])]

    def seconds(self, call):
        call()
        self.measured.append(self.ran[-1])
        return self.of[self.ran[-1]]

    def quickest(self, key="key", names=NAMES):
        return tuning.quickest(key, names, self.run, self.seconds)


@pytest.fixture
def file(monkeypatch, tmp_path):
    """Where choices are remembered; nothing is known yet."""
    pytest.importorskip("triton")
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "of" / "caches"))
    forget(monkeypatch)
    return tmp_path / "of" / "caches" / "tiles.json"


def forget(monkeypatch):
    """As a new process."""
    monkeypatch.setattr(tuning, "_remembered", {})


class TestTuning:
    def test_the_quickest_is_taken(self, file):
        kernel = Kernel()
        assert kernel.quickest() == "b"
        assert kernel.measured == NAMES
        assert list(json.loads(file.read_text()).values()) == ["'b'"]

    def test_it_is_measured_once(self, file, monkeypatch):
        assert Kernel().quickest() == "b"
        for kernel in (Kernel(), Kernel()):
            assert kernel.quickest() == "b"
            assert not kernel.ran
            forget(monkeypatch)  # the file remembers
        file.unlink()
        kernel = Kernel()
        assert kernel.quickest() == "b"
        assert kernel.measured == NAMES

    @pytest.mark.parametrize("changed", ["key", "candidates", "versions"])
    def test_anything_else_is_measured_anew(self, file, monkeypatch, changed):
        Kernel().quickest()
        forget(monkeypatch)
        if changed == "versions":
            monkeypatch.setattr(tuning, "_versions", lambda: "another triton")
        kernel = Kernel()
        names = ["a", "c"] if changed == "candidates" else NAMES
        key = "another" if changed == "key" else "key"
        assert kernel.quickest(key, names) == ("c" if changed == "candidates" else "b")
        assert kernel.measured == names
        assert len(json.loads(file.read_text())) == 2  # and the first is not forgotten

    def test_a_wrong_result_is_not_taken(self, file):
        kernel = Kernel(wrong=["b"])
        assert kernel.quickest() == "c"
        assert kernel.measured == ["a", "c"]

    def test_nor_one_that_is_nan(self, file):
        kernel = Kernel()
        run = kernel.run
        kernel.run = lambda name: [t * (torch.nan if name == "b" else 1) for t in run(name)]
        assert kernel.quickest() == "c"

    @pytest.mark.parametrize("kind", ["out of resources", "driver", "value"])
    def test_what_does_not_run_is_not_taken(self, file, kind):
        from triton.runtime.errors import OutOfResources

        error = {
            "out of resources": OutOfResources(300_000, 232_448, "shared memory"),
            "driver": RuntimeError("Triton Error [CUDA]: too many resources requested"),
            "value": ValueError("tiles"),
        }[kind]
        assert Kernel(failing={"b": error}).quickest() == "c"
        assert Kernel(failing={"b": error, "c": error}).quickest("other") == "a"
        with pytest.raises(type(error)):  # without it there is nothing to compare with
            Kernel(failing={"a": error}).quickest("a third")

    def test_the_first_stays_where_all_others_are_wrong(self, file):
        assert Kernel(wrong=["b", "c"]).quickest() == "a"

    def test_nothing_is_learned_from_data_that_are_not_finite(self, file):
        kernel = Kernel()
        kernel.run = lambda name: [torch.ones(2), torch.tensor([1.0, torch.nan])]
        assert kernel.quickest() is None
        assert not file.exists()
        assert Kernel().quickest() == "b"

    @pytest.mark.parametrize(
        "text", [b"", b"{", b"[]", b'"b"', b"\xff\xfe", b"null", "of another kind", "unknown"]
    )
    def test_a_file_with_something_else_in_it(self, file, monkeypatch, text):
        Kernel().quickest()
        forget(monkeypatch)
        (key,) = json.loads(file.read_text())
        if isinstance(text, str):
            text = json.dumps({key: ["'b'"] if text == "of another kind" else "'d'"}).encode()
        file.write_bytes(text)
        kernel = Kernel()
        assert kernel.quickest() == "b"
        assert kernel.measured == NAMES
        assert json.loads(file.read_text())[key] == "'b'"  # mended

    @pytest.mark.parametrize("place", ["a file", "nowhere"])
    def test_a_folder_that_cannot_be_written(self, file, monkeypatch, place, tmp_path):
        (tmp_path / "taken").write_text("")
        folder = {"a file": tmp_path / "taken", "nowhere": "/proc/none"}[place]
        monkeypatch.setenv(tuning.FOLDER, str(folder))
        assert Kernel().quickest() == "b"
        assert Kernel().quickest() == "b"

    def test_nothing_is_left_behind_where_the_file_cannot_be_replaced(self, file):
        file.mkdir(parents=True)
        assert Kernel().quickest() == "b"
        assert os.listdir(file.parent) == [file.name]

    def test_a_user_without_a_home(self, file, monkeypatch):
        def nowhere():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv(tuning.FOLDER)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", nowhere)
        assert Kernel().quickest() == "b"

    def test_where_the_file_is(self, monkeypatch, tmp_path):
        monkeypatch.delenv(tuning.FOLDER, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert tuning.path() == tmp_path / "maml_fast" / "tiles.json"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tuning.path() == tmp_path / ".cache" / "maml_fast" / "tiles.json"
        monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "own"))
        assert tuning.path() == tmp_path / "own" / "tiles.json"
