"""The command line as the tests call it: in this process."""

from maml_fast.checkpoint import load_checkpoint
from maml_fast.cli import main


def run(*arguments):
    """The exit status; each argument is one word."""
    return main([str(argument) for argument in arguments])


def run_words(*arguments):
    """The same with several words an argument."""
    return run(*(word for text in arguments for word in str(text).split()))


def config_of(output):
    return load_checkpoint(output / "checkpoint.safetensors").config


def error(capsys):
    """The one line on stderr of a command that failed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("maml-fast: ")
    assert captured.err.count("\n") == 1
    return captured.err
