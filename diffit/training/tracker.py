"""Where a run's curves and pictures go beside log.jsonl: TensorBoard, Weights & Biases, trackio, or nowhere."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from diffit.system.files import as_tree, first_line, write_atomically
from diffit.training.config import TrainConfig


def check_tracker(config: TrainConfig) -> None:
    """Refuse, before any work, a tracker that is not installed or has no key.

    Raises:
        ValueError: in one sentence.
    """
    if config.tracker not in ("wandb", "trackio"):
        return
    try:
        library = importlib.import_module(config.tracker)
    except ImportError as error:
        raise ValueError(
            f"--tracker {config.tracker} needs that package: pip install {config.tracker}, or choose another tracker"
        ) from error
    if config.tracker == "wandb" and os.environ.get("WANDB_MODE", library.setup().settings.mode) == "online":
        with contextlib.suppress(TypeError):  # older versions cannot be asked: they say it when the run starts
            if not library.login(prompt=False):
                raise ValueError("--tracker wandb has no key: run `wandb login` once, or set WANDB_MODE=offline")


def create_tracker(config: TrainConfig, first: int) -> TensorBoard | HostedRun | None:
    """The tracker that a config names, going on from step `first`; None for none, or TensorBoard that is not there.

    Raises:
        ValueError: if another one cannot be reached.
    """
    if config.tracker == "none":
        return None
    try:
        return TensorBoard(config, first) if config.tracker == "tensorboard" else HostedRun(config)
    except Exception as error:
        if config.tracker == "tensorboard" and isinstance(error, ImportError):
            return None  # it is the default: who wants no curves need not install it
        raise ValueError(
            f"--tracker {config.tracker} does not start ({first_line(error)}): see to that, or choose another tracker"
        ) from error


class TensorBoard:
    """Event files in RUN_DIR/tensorboard; what an earlier start logged after step `first` is taken back."""

    def __init__(self, config: TrainConfig, first: int) -> None:
        # TensorBoard's own mark for 'without TensorFlow', which it would otherwise load, with a page of log lines.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(config.run_dir) / "tensorboard"), purge_step=first + 1)
        settings = yaml.safe_dump(as_tree(config), sort_keys=False)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in settings.splitlines()), first)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture file."""
        self.writer.add_image(name, read_picture(path), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class HostedRun:
    """A run of Weights & Biases or of trackio, which have one interface. The next start goes on in the same run.

    Where they write, offline or not, is theirs to settle: WANDB_MODE=offline, say, or TRACKIO_DIR.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.library = importlib.import_module(config.tracker)
        run_dir = Path(config.run_dir)
        path = run_dir / "tracker_run.txt"  # a new run in a folder of the same name elsewhere is another run
        if not path.exists():
            write_atomically(path, f"{run_dir.name}-{uuid.uuid4().hex[:8]}".encode())
        name = path.read_text()
        own: dict[str, Any] = {"id": name, "dir": str(run_dir)} if config.tracker == "wandb" else {}
        self.library.init(project="diffit", name=name, config=as_tree(config), resume="allow", **own)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, at a step."""
        self.library.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture file."""
        self.library.log({name: self.library.Image(str(path))}, step=step)

    def close(self) -> None:
        self.library.finish()


def read_picture(path: Path) -> NDArray[np.uint8]:
    """A picture file as uint8 [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))
