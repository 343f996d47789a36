"""Foreign configurations: tables, files of TOML and command lines are taken or refused by name."""

import dataclasses

import pytest
from cyclopts.exceptions import CycloptsError
from hypothesis import example, given
from hypothesis import strategies as st

from maml_fast.checkpoint import CheckpointError
from maml_fast.cli import app
from maml_fast.cli_options import MAX_TOML
from maml_fast.config import ConfigError
from maml_fast.kinds import KINDS
from tests.mutations import FOREIGN, NUMBERS, PLAIN, TEXTS, VALUES, bounded, damaged

CONFIGS = [kind.config for kind in KINDS.values()]
FIELDS = sorted({field.name for config in CONFIGS for field in dataclasses.fields(config)})
KEYS = st.one_of(st.sampled_from(FIELDS), TEXTS)

WHOLE = b"""# options of a run
tasks = 4
inner_lr = 1e-2
first_order = true
hidden = [40, 0x28, 4_0]
output = "runs/a \\u00e9"
method = 'maml'
threads = 1
"""


@pytest.mark.parametrize("config", CONFIGS)
@FOREIGN
@given(values=st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_table(config, values):
    with bounded():
        try:
            found = config.from_dict(values, "here")
        except ConfigError as error:
            assert str(error).startswith("here: ")  # noqa: PT017
            assert len(str(error)) < 1500  # noqa: PT017
        else:
            assert config.from_run(found.to_dict(), "there") == found


@pytest.mark.parametrize("config", CONFIGS)
@FOREIGN
@given(values=st.dictionaries(st.sampled_from(FIELDS), PLAIN, max_size=4))
@example(values={"validation_classes": 0, "folders_for_validation": True})
@example(values={"validation_classes": 0, "alphabets_for_validation": 3})
def test_any_fields(config, values):
    """As a caller of the class may give them."""
    own = {field.name for field in dataclasses.fields(config)}
    try:
        config(**{name: value for name, value in values.items() if name in own})
    except ConfigError as error:
        assert any(name in str(error) for name in values)  # noqa: PT017


def taken(file, kind="sinusoid"):
    """Whether the command line takes a file of options; what it refuses it names."""
    arguments = ["train", kind, "--config", str(file)]
    with bounded():
        try:
            app.parse_args(arguments, exit_on_error=False, print_error=False)
        except (ConfigError, CycloptsError) as error:
            text = " ".join(str(error).split())
            assert str(file) in text or any(name in text for name in FIELDS)
            return False
    return True


@FOREIGN
@given(data=st.data())
def test_any_damage_to_a_file(data, tmp_path):
    file = tmp_path / "options.toml"
    file.write_bytes(data.draw(damaged(WHOLE)))
    taken(file)


def toml(value):
    """A value as TOML; what it has no word for, as a text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in str(value)) + '"'


@pytest.mark.parametrize("kind", KINDS)
@FOREIGN
@given(values=st.dictionaries(KEYS, VALUES | NUMBERS, max_size=4))
def test_any_table_in_a_file(kind, values, tmp_path):
    file = tmp_path / "options.toml"
    lines = [f"{toml(name)} = {toml(value)}\n" for name, value in values.items()]
    file.write_text("".join(lines), encoding="utf-8", errors="replace")
    taken(file, kind)


def test_the_file_that_is_damaged_is_taken_whole(tmp_path):
    file = tmp_path / "options.toml"
    file.write_bytes(WHOLE)
    assert taken(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks = " + "[" * 2000, "no valid TOML: nested too deeply"),
        ("tasks = 0x" + "f" * 8000, "tasks is a int too large to be shown; wanted is"),
        ("tasks = " + "9" * 5000, "no valid TOML"),
        ("tasks = 1979-05-27", r"tasks is datetime.date\(1979, 5, 27\); wanted is a whole number"),
        ("inner_lr = 1" + "0" * 400, r"inner_lr is 1000\d*\.\.\.; wanted is a finite number"),
        ("hidden = " + repr([[0]] * 900), r"hidden is \[0\]; wanted is a whole number"),
        ("tasks = 2147483648", "tasks is 2147483648; wanted is a whole number of at most"),
        ("tasks = '" + "x" * 9000 + "'", r"tasks is 'x{199}\.\.\.; wanted is a whole number"),
        (".".join("a" * 8000) + " = 1", "unknown key 'a'"),
        ("#" * (MAX_TOML + 1), "longer than 16,384 bytes; wanted is a file of options"),
        ("tasks = 1\0", "no valid TOML"),
    ],
    ids=lambda text: text[:12],
)
def test_what_a_parser_trips_over(text, message, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text(text)
    with bounded(), pytest.raises(ConfigError, match=rf"options.toml: .*{message}"):
        app.parse_args(
            ["train", "sinusoid", "--config", str(file)], exit_on_error=False, print_error=False
        )


@FOREIGN
@given(
    flags=st.lists(
        st.tuples(st.sampled_from([name.replace("_", "-") for name in FIELDS]), TEXTS), max_size=3
    ),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_any_flags(flags, kind):
    """A line of the shell has no zero bytes, but whoever calls `main` may."""
    arguments = ["train", kind, *(word for flag, value in flags for word in (f"--{flag}", value))]
    try:
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    except (ConfigError, CheckpointError, CycloptsError) as error:
        assert str(error)  # noqa: PT017
