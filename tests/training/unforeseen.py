"""A run whose fourth step fails as nobody foresaw; test_ends.py starts it: python unforeseen.py FILE FLAGS ..."""

import sys
from pathlib import Path

from diffit.cli.train import main
from diffit.training import loop
from diffit.training.step import train_step

failed = Path(sys.argv.pop(1))


def fail(state, *others):
    if state.step == 3:
        failed.touch()
        raise RuntimeError("as nobody foresaw")
    return train_step(state, *others)


loop.train_step = fail
sys.exit(main())
