"""What the tests of foreign files share: damage to bytes and to values, and bounds to hold."""

import contextlib
import math
import os
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

STATUS = Path("/proc/self/status")
SECONDS, MEGABYTES = 10, 300

# Examples differ in how long they take, and each has a file of its own in the test's folder.
FOREIGN = settings(
    max_examples=int(os.environ.get("MAML_FAST_EXAMPLES", 100)),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, megabytes: float = MEGABYTES):
    """Little time and, where the system tells, little memory beyond what the process had."""
    before, started = _peak(reset=True), time.process_time()
    yield
    assert time.process_time() - started < seconds
    assert _peak() - before < megabytes


def _peak(reset: bool = False) -> float:
    """The most memory that this process has had since the last reset, in MB; 0 if nobody knows."""
    if not STATUS.exists():
        return 0.0
    if reset:
        with contextlib.suppress(OSError):
            STATUS.with_name("clear_refs").write_text("5")
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


# What a program that reads lengths and places trips over
EXTREMES = st.sampled_from([0, 1, -1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1])


@st.composite
def damaged(draw, whole: bytes):
    """The bytes with one to four damages: flipped, overwritten, cut, taken out, put in, doubled."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), start + draw(st.integers(1, 40)))
        kind = draw(st.sampled_from(["flip", "write", "cut", "out", "in", "double", "number"]))
        if kind == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "write":
            data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif kind == "cut":
            del data[start:]
        elif kind == "out":
            del data[start:end]
        elif kind == "in":
            data[start:start] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "double":
            data[start:start] = data[start:end]
        else:
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(EXTREMES) % 2 ** (8 * size)
            data[start : start + size] = number.to_bytes(size, "little")
    return bytes(data)


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**32 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 10**4000]),
    st.sampled_from([0.0, -0.0, 0.5, 3.0, 1e300, 1e-320, math.inf, -math.inf, math.nan]),
)
TEXTS = st.one_of(
    st.sampled_from(["", "auto", "cpu", "cuda", "maml", "relu", "/dev/null", "a/../b", "\0", "7"]),
    st.text(max_size=8),
)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw, document):
    """A document of JSON with one to three edits: something replaced, left out or added."""
    document = _copied(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            kind = draw(st.sampled_from(["replace", "replace", "leave out", "add"]))
            if kind == "replace":
                place[key] = draw(VALUES)
            elif kind == "leave out":
                del place[key]
            elif isinstance(place, dict):
                place[draw(TEXTS)] = draw(VALUES)
            else:
                place.append(draw(VALUES))
            break
    return document


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value
