"""What each of two processes sees; test_processes.py starts this with torchrun and judges what it writes.

python -m torch.distributed.run --nproc_per_node=2 tests/train/ranks.py FOLDER FLAGS ...
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from diffit import distributed
from diffit.cli.train import parse_train
from diffit.training.loop import Training
from tests.training.runs import Poisoned, changed, remembered


def main() -> None:
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    device = torch.device("cpu")
    world = distributed.start(device)

    def begin(name: str, *more: str) -> Training:
        return Training(parse_train([*flags, "--run_dir", str(folder / name), *more]), device, world)

    seen: dict[str, object] = {}
    begin("long", "--steps", "50", "--save_every", "50").run()
    begin("ddp").run()
    begin("fsdp", "--parallel", "fsdp", "--ema_decay", "[0.9, 0.2]", "--activation_checkpointing", "true").run()
    begin("fsdp_half", "--parallel", "fsdp", "--ema_decay", "[0.9, 0.2]", "--steps", "4").run()
    begin("fsdp_half", "--parallel", "fsdp", "--ema_decay", "[0.9, 0.2]", "--preview_every", "6").run()
    try:
        begin("fsdp_half", "--ema_decay", "[0.9, 0.2]").run()
    except ValueError as error:
        seen["other_kind"] = str(error)

    for kind in ("ddp", "fsdp"):
        poisoned = begin(f"poisoned_{kind}", "--accumulate", "2", "--parallel", kind)
        poisoned.batches = Poisoned(poisoned.batches, {3} if world.rank == 1 else ())
        states = remembered(poisoned)
        poisoned.run()
        seen[f"skipped_{kind}"] = poisoned.stepper.skips.total
        seen[f"changed_{kind}"] = [sorted(changed(states[step], states[step - 1])) for step in (3, 4)]

    apart = begin("apart")
    if world.rank == 1:
        weight = dict(apart.model.named_parameters())["head.weight"]
        weight.data.view(torch.int32)[0, 0, 0, 0] += 1
    try:
        apart._save(must=True)
    except ValueError as error:
        seen["apart"] = str(error)

    stopped = begin("stopped", "--steps", "50", "--save_every", "50")
    if world.rank == 1:

        def ask() -> None:
            while stopped.step < 3:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)

        threading.Thread(target=ask).start()
    try:
        stopped.run()
    except Exception as error:
        seen["stopped"] = [type(error).__name__, stopped.step]
    (folder / f"rank{world.rank}.json").write_text(json.dumps(seen))
    distributed.stop()


main()
