"""What each of two processes sees; test_processes.py starts this with torchrun and judges what it writes.

python -m torch.distributed.run --nproc_per_node=2 tests/training/ranks.py FOLDER FLAGS ...
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from diffit.system import distributed
from diffit.training import checkpointing, loop
from diffit.training.step import train_step
from diffit.training.stopping import Stopped
from tests.training.runs import changed, poisoned, remembered, replaced, run


@contextlib.contextmanager
def opened() -> Iterator[list[str]]:
    """The files of weights that this rank opens to load them."""
    files: list[str] = []
    stream, load = checkpointing.FileSystem.create_stream, checkpointing.load_weights

    def open_shard(self: object, path: Path, mode: str) -> object:
        if mode == "rb" and str(path).endswith(".distcp"):
            files.append("shard")
        return stream(self, path, mode)

    def open_ema(path: Path, *others: object) -> object:
        files.append("ema")
        return load(path, *others)

    shards = replaced(checkpointing.FileSystem, "create_stream", open_shard)
    with shards, replaced(checkpointing, "load_weights", open_ema):
        yield files


def main() -> None:
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    world = distributed.start(torch.device("cpu"))
    stop, distributed.stop = distributed.stop, lambda: None  # all runs share these ranks

    def begin(name: str, *more: str) -> None:
        run(flags, folder / name, *more)

    @contextlib.contextmanager
    def held(error: str | None) -> Iterator[int]:
        """Rank 0's context: its value, or an error of entering it."""
        if error:
            raise ValueError(error)
        yield world.rank + 1

    seen: dict[str, object] = {}
    with distributed.main_only(world, held(None)) as seen["entered"]:
        pass
    try:
        with distributed.main_only(world, held("in use")):
            seen["refused"] = "entered"
    except ValueError as error:
        seen["refused"] = str(error)
    seen["own"] = distributed.on_all(world, lambda: world.rank)

    def fail_on_one() -> dict[str, float]:
        if world.rank == 1:
            raise RuntimeError("odd")
        return {}

    with replaced(loop, "create_validation", lambda *others: lambda: distributed.on_all(world, fail_on_one)):
        begin("odd", "--validation.every", "2")  # what one rank cannot score ends no run, and no rank waits for it
    seen["odd"] = (folder / "odd/checkpoints/00000006/complete.json").exists()
    begin("long", "--steps", "50", "--save_every", "50")
    powers = ["--ema_power", "0.1"]
    begin("ddp", "--validation.every", "3", *powers)
    more = [*powers, "--activation_checkpointing", "true", "--validation.every", "3"]
    begin("fsdp", "--parallel", "fsdp", "--ema_decay", "[0.9, 0.2]", *more)
    begin("fsdp_half", "--parallel", "fsdp", "--ema_decay", "[0.9, 0.2]", "--steps", "4", *powers)
    with opened() as seen["fsdp_read"]:
        begin("fsdp_half", "--parallel", "fsdp", "--ema_decay", "[0.9, 0.2]", "--preview_every", "6", *powers)
    begin("ddp_half", "--steps", "4")
    with opened() as seen["ddp_read"]:
        begin("ddp_half")
    for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
        begin(f"to_{then}", "--parallel", first, "--steps", "4")
        begin(f"to_{then}", "--parallel", then)

    for kind in ("ddp", "fsdp"):
        run_dir = folder / f"poisoned_{kind}"
        with poisoned({3} if world.rank == 1 else ()), remembered() as states:
            begin(f"poisoned_{kind}", "--accumulate", "2", "--parallel", kind)
        progress = json.loads((run_dir / "checkpoints/00000006/progress.json").read_text())
        seen[f"skipped_{kind}"] = progress["skipped"]
        seen[f"changed_{kind}"] = [sorted(changed(states[step], states[step - 1])) for step in (3, 4)]

    def come_apart(state, *others):
        if world.rank == 1:
            state.model.head.weight.data.view(torch.int32)[0, 0, 0, 0] += 1
        return [True, *3 * [False]]

    try:
        with replaced(loop, "train_step", come_apart):
            begin("apart")
    except ValueError as error:
        seen["apart"] = str(error)

    steps = []

    def ask(state, *others):
        if world.rank == 1 and state.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        result = train_step(state, *others)
        steps.append(state.step)
        return result

    try:
        with replaced(loop, "train_step", ask):
            begin("stopped", "--steps", "50", "--save_every", "50")
    except Stopped as error:
        seen["stopped"] = [type(error).__name__, steps[-1]]
    (folder / f"rank{world.rank}.json").write_text(json.dumps(seen))
    stop()


main()
