"""The command `maml-fast profile`: where the time and memory of a training iteration go."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from cyclopts import App, Parameter

from maml_fast import Profile, profile
from maml_fast.checkpoint import CheckpointError, load_checkpoint, write_atomically
from maml_fast.config import TrainConfig, check_device, check_whole
from maml_fast.config_images import FolderConfig, ImageConfig, OmniglotConfig
from maml_fast.config_sinusoid import SinusoidConfig
from maml_fast.image_data import image_shape
from maml_fast.kinds import make_run
from maml_fast.profiled import aligned
from maml_fast.progress import cpu_threads
from maml_fast.run import TASK_SEEDS, Run
from maml_fast.run_images import image_model
from maml_fast.tasks import ImageSet, ImageTasks

PARTS = SAMPLING, META_STEP, OPTIMISER, REST = (
    *("sampling", "meta-step and gradient", "optimiser", "rest"),
)
SECONDS, LEAST, MOST = 0.5, 6, 400  # of iterations, unless told otherwise
A = TypeVar("A")

profile_app = App(
    name="profile", help="Show where the time and memory of a training iteration go, by layer."
)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What to measure, and where to write it.

    Attributes:
        checkpoint: Model and options of a run, from a file that training wrote; flags beat it.
        repeats: Iterations and meta-steps to measure; about a second's if left out.
        json_path: Write the numbers to this file too; "-" is the standard output.
    """

    checkpoint: Path | None = None
    repeats: int | None = None
    json_path: Annotated[str | None, Parameter(name="--json", allow_leading_hyphen=True)] = None


SINUSOID, OMNIGLOT, FOLDER = SinusoidConfig(), OmniglotConfig(), FolderConfig()
DEFAULTS = ProfileOptions()


@profile_app.command(name="sinusoid")
def profile_sinusoid(
    config: Annotated[SinusoidConfig, Parameter(name="*")] = SINUSOID,
    *,
    options: Annotated[ProfileOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Profile training on sinusoids, with the options of `maml-fast train sinusoid`.

    Nothing is written but what --json names.
    """
    return _profile(config, options)


@profile_app.command(name="omniglot")
def profile_omniglot(
    config: Annotated[OmniglotConfig, Parameter(name="*")] = OMNIGLOT,
    *,
    options: Annotated[ProfileOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Profile training on Omniglot, with the options of `maml-fast train omniglot`.

    Images are random pixels unless --data is given; nothing is downloaded, and nothing is written
    but what --json names.
    """
    return _profile(config, options)


@profile_app.command(name="images")
def profile_images(
    config: Annotated[FolderConfig, Parameter(name="*")] = FOLDER,
    *,
    options: Annotated[ProfileOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Profile training on images, with the options of `maml-fast train images`.

    Images are random pixels unless --data is given. Nothing is written but what --json names.
    """
    return _profile(config, options)


def _profile(config: TrainConfig, options: ProfileOptions) -> int:
    if options.repeats is not None:
        check_whole("repeats", options.repeats, least=1)
    with cpu_threads(config.threads):
        run = _make_run(config, options.checkpoint)
        iteration = _measure(run, options.repeats)
        found = profile(run.maml, *run.sample(), repeats=options.repeats)
    peak = process_peak()
    to = sys.stderr if options.json_path == "-" else sys.stdout
    print(_text(found, iteration, peak), file=to)
    if options.json_path is None:
        return 0
    document = {
        "config": config.to_dict(),
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
        "iteration_ms": iteration,
        "process_peak_bytes": peak,
        "profile": found.to_dict(),
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if options.json_path == "-":
        sys.stdout.write(text)
    else:
        path = Path(options.json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    return 0


def _make_run(config: TrainConfig, path: Path | None) -> Run:
    """The beginning of the run, or the model of a checkpoint."""
    if isinstance(config, ImageConfig) and not config.data:
        device = check_device(config.device)
        tasks = ImageTasks(
            random_images(config),
            config.ways,
            rotations=config.rotations,
            seed=config.seed + TASK_SEEDS,
            device=device,
        )
        run = Run(config, image_model(config, device), "cross_entropy", tasks)
    else:
        run = make_run(config)
    if path is None:
        return run
    checkpoint = load_checkpoint(path)
    try:
        run.model.load_state_dict(checkpoint.group("model", run.model.state_dict()))
        if run.rates:
            wanted = {name: rate.detach() for name, rate in run.rates.items()}
            for name, rate in checkpoint.group("rates", wanted).items():
                run.rates[name].data.copy_(rate)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return run


def random_images(config: ImageConfig) -> ImageSet:
    """Pixels at random, of the run's shape: as many classes and images as one task wants."""
    size, channels = image_shape(config)
    each = config.shots + config.query_shots
    generator = torch.Generator().manual_seed(config.seed)
    pixels = (config.ways * each, channels, size, size)
    return ImageSet(
        images=torch.randint(256, pixels, generator=generator, dtype=torch.uint8),
        starts=torch.arange(config.ways + 1) * each,
        names=tuple(f"class {i}" for i in range(config.ways)),
        invert=False,
    )


def _measure(run: Run, repeats: int | None) -> dict[str, float]:
    """Milliseconds of an iteration's parts, and of all of it: the mean of the faster half."""
    _iterate(run)  # plans, and tries the plan
    took = _iterate(run)["iteration"] / 1e3
    count = min(max(int(SECONDS / max(took, 1e-9)), LEAST), MOST) if repeats is None else repeats
    found = sorted((_iterate(run) for _ in range(count)), key=lambda parts: parts["iteration"])
    best = found[: (len(found) + 1) // 2]
    return {name: sum(parts[name] for parts in best) / len(best) for name in best[0]}


def _iterate(run: Run) -> dict[str, float]:
    """One iteration, timed."""
    device = run.parameters.flat.device
    start = time.perf_counter()

    def timed(part: Callable[[], A]) -> tuple[A, float]:
        begin = time.perf_counter()
        result = part()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result, 1e3 * (time.perf_counter() - begin)

    episodes, sampling = timed(run.sample)
    found, meta_step = timed(lambda: run.descend(episodes))
    _, optimiser = timed(run.update)
    run.count(*found)
    whole = 1e3 * (time.perf_counter() - start)
    rest = whole - sampling - meta_step - optimiser
    parts = zip(PARTS, (sampling, meta_step, optimiser, rest), strict=True)
    return {**dict(parts), "iteration": whole}


def process_peak() -> int | None:
    """The most bytes the process has held so far; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _text(found: Profile, iteration: dict[str, Any], peak: int | None) -> str:
    rows = [("training iteration", "ms", "%")]
    whole = iteration["iteration"]
    rows += [(name, f"{ms:.3f}", f"{100 * ms / whole:.1f}") for name, ms in iteration.items()]
    lines = [str(found), "", *aligned(rows, texts=1)]
    if peak is not None:
        lines.append(f"peak of the process: {peak / 2**20:.0f} MiB, Python and torch included")
    return "\n".join(lines)
