"""A strict session: fresh buffers are NaN, so that a store left out turns a comparison red."""

import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before Triton is loaded, which maml_fast does
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products

import maml_fast

if not importlib.util.find_spec("maml_fast.kernels"):  # a checkout that is not installed
    maml_fast.__path__.append(str(Path(__file__).parents[1]))

from maml_fast import cpu_cost, cpu_features
from tests.engines import ENGINES, LAYOUTS
from tests.networks import Draw
from tests.test_packaging import needs_extension

# The same examples on every run; --hypothesis-profile=default draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def poisoned_buffers():
    # In deterministic mode torch fills the memory of torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def output(tmp_path):
    """Of a command that trains."""
    return tmp_path / "run"


@pytest.fixture(params=ENGINES)
def instructions(request, monkeypatch):
    """One instruction set of the C++ backend."""
    monkeypatch.setenv(cpu_features.FORCED, request.param)
    return request.param


@pytest.fixture
def alone(monkeypatch):
    """For pytest within a test: pytest-benchmark times nothing in workers of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def draw() -> Draw:
    return Draw(seed=0)


@pytest.fixture
def extension():
    """The C++ extension is there; the test is skipped, or fails, where it is not."""
    needs_extension()


@pytest.fixture
def threads():
    """Sets torch's number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=list(itertools.product(ENGINES, LAYOUTS)), ids="-".join)
def engine(request, monkeypatch):
    """One instruction set and one layout."""
    name, layout = request.param
    monkeypatch.setenv(cpu_features.FORCED, name)
    monkeypatch.setattr(cpu_cost, "LAYOUTS", (layout,))
    return name, layout
