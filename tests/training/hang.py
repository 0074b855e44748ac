"""A run of two ranks of which one hangs in its third step; test_processes.py starts it with torchrun.

python -m torch.distributed.run --nproc_per_node=2 tests/training/hang.py FOLDER FLAGS ...
"""

import os
import signal
import sys
import time

from diffit.training import loop
from diffit.training.step import train_step
from tests.training.runs import run


def hang(state, *others):
    if os.environ["RANK"] == "1" and state.step == 2:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it with torchrun, which would wait for 30 s
        time.sleep(60)
    return train_step(state, *others)


loop.train_step = hang
try:
    run(sys.argv[2:], sys.argv[1], "--rank_timeout", "0.05")
except ValueError as error:
    print(error)
