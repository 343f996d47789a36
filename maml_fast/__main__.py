"""`python -m maml_fast`: the command line, as torchrun starts it."""

import sys

from maml_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
