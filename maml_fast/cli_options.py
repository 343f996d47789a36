"""Where the command line's options come from: flags, a file, the run to resume, the paper."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, Argument, ArgumentCollection, Parameter
from cyclopts.config import Dict

from maml_fast.checkpoint import load_checkpoint
from maml_fast.config import ConfigError, TrainConfig, kind_of
from maml_fast.config_sinusoid import Method
from maml_fast.kinds import KINDS
from maml_fast.run_files import RunFiles

# Bytes of a file of options, which has dozens of lines: a key this long takes the parser 0.3 GB.
MAX_TOML = 2**14


@dataclass(frozen=True, kw_only=True)
class Begin:
    """How a run begins.

    Attributes:
        config_file: TOML file with any of these options as keys, as in `inner_steps = 5`; flags
            beat it.
        resume: Go on with the run in the output folder, with its options.
        previous: With --resume, go on from the checkpoint before the newest one, as where that is
            damaged.
        overwrite: Delete the run in the output folder.
    """

    config_file: Annotated[Path | None, Parameter(name="--config")] = None
    resume: Annotated[bool, Parameter(negative=())] = False
    previous: Annotated[bool, Parameter(negative=())] = False
    overwrite: Annotated[bool, Parameter(negative=())] = False


def option_sources(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what no flag sets: from --config, then with --resume from the run's checkpoint, or
    of a profile from --checkpoint; then what the paper does with so many ways and shots (and query
    images), or with the method."""
    for argument in arguments:
        _refuse_fractions(argument)
    if commands[:1] not in (("train",), ("profile",)) or commands[-1] not in KINDS:
        return
    by_name = {argument.name: argument for argument in arguments}
    kind = KINDS[commands[-1]].config
    # What fields there may be in a file depends on the method, and a flag for that beats the file.
    given = [token.value for token in (by_name["--method"].tokens if "--method" in by_name else ())]
    by_flag = {"method": given[0]} if given and given[0] in get_args(Method) else {}

    def fill(values: dict[str, Any], source: str) -> None:
        kind.from_dict(values, source)  # strict about keys and types, as Dict is not
        values = {name: value for name, value in values.items() if value not in (None, [])}
        Dict(values, source=source, use_commands_as_keys=False)(app, commands, arguments)

    if commands[0] == "profile" and (tokens := by_name["--checkpoint"].tokens):
        path = Path(tokens[0].value)
        values = _of_kind(kind, path, "profile it with: maml-fast profile {} --checkpoint")
        values.pop("data", None)  # which need not be there any more
        fill(values, source=str(path))
    if commands[0] == "train" and by_name["--config"].tokens:
        path = Path(by_name["--config"].tokens[0].value)
        fill(_read_toml(path) | by_flag, source=str(path))
    if commands[0] == "train" and by_name["--resume"].tokens:
        tokens = by_name["--output"].tokens
        output = tokens[0].value if tokens else str(_default(kind, "output"))
        files = RunFiles(Path(output))
        path = files.previous if by_name["--previous"].tokens else files.checkpoint
        with files.telling_of_previous():
            values = _of_kind(kind, path, "resume it with: maml-fast train {} --resume")
        for name, value in by_flag.items():
            if value != (had := values.get(name, _default(kind, name))):
                raise ConfigError(f"{name} is {value!r}, but the run to resume has {had!r}")
        fill(values | {"output": output}, source=str(path))
    flags = {name: by_name[f"--{name.replace('_', '-')}"] for name in kind.recipe_for}
    chosen = {name: _chosen(flag, kind, name) for name, flag in flags.items()}
    if all(chosen.values()):  # else the configuration will complain
        fill(kind.recipe(chosen), source="the paper's settings")


def _of_kind(kind: type[TrainConfig], path: Path, instead: str) -> dict[str, Any]:
    """The options in a checkpoint, which must be of a run of this kind."""
    found, values = kind_of(load_checkpoint(path).config)
    if found != kind.kind:
        raise ConfigError(f"{path}: a run of kind {found!r}; {instead.format(found)}")
    return values


def _default(kind: type[TrainConfig], name: str) -> Any:
    return kind.__dataclass_fields__[name].default


def _chosen(argument: Argument, kind: type[TrainConfig], name: str) -> int | str:
    """What an option is set to; 0 where a whole number above 0 is wanted and it is none."""
    default: int | str = _default(kind, name)
    if not argument.tokens:
        return default
    if isinstance(default, str):
        return argument.tokens[0].value
    try:
        return max(int(argument.tokens[0].value), 0)
    except ValueError:
        return 0


def _refuse_fractions(argument: Argument) -> None:
    """Cyclopts rounds --tasks 2.5 to 2; an error is wanted."""
    if argument.hint in (int, int | None, tuple[int, ...]):
        for token in argument.tokens:
            if "." in token.value:
                raise ConfigError(f"{token.keyword} is {token.value}; wanted is a whole number")


def _read_toml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_TOML + 1)
    if len(text) > MAX_TOML:
        raise ConfigError(f"{path}: longer than {MAX_TOML:,} bytes; wanted is a file of options")
    try:
        return tomllib.loads(text.decode())
    except RecursionError:
        raise ConfigError(f"{path}: no valid TOML: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: no valid TOML: {error}") from None
