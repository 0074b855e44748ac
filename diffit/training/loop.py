"""The training loop: images or cached latents -> noise -> loss -> optimizer -> EMA -> checkpoint."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from diffit import distributed
from diffit.checkpoint import find_checkpoint
from diffit.device import resolve_device, set_matmul_precision
from diffit.files import as_tree, write_atomically
from diffit.training.checkpoints import Checkpoints
from diffit.training.config import TrainTask
from diffit.training.ema import EMA
from diffit.training.parallel import is_sharded, out_of_step, recompute_blocks, shard
from diffit.training.preview import read_picture, save_preview
from diffit.training.rates import averaging_decays
from diffit.training.samples import TrainingSampler
from diffit.training.setup import create_batches, initial_model, load_data
from diffit.training.state import EMA_FILE, RunState, ema_files
from diffit.training.step import Stepper
from diffit.training.stopping import Stopped, StopSignals
from diffit.training.watch import Watch

if TYPE_CHECKING:
    from diffit.training.score import Scorer


def train(task: TrainTask) -> Path:
    """Train, or go on training; returns the newest checkpoint's EMA weights, which sample.py takes.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
        Stopped: if SIGTERM or SIGUSR1 asked for it; the checkpoint is written.
    """
    device = resolve_device(task.config.device)
    set_matmul_precision(task.config.precision)
    world = distributed.start(device)
    try:
        return Training(task, device, world).run()
    finally:
        distributed.stop()


class Training:
    """One run, as seen by one process."""

    def __init__(self, task: TrainTask, device: torch.device, world: distributed.World) -> None:
        self.config = config = task.config
        self.recipe, self.device, self.world = task.recipe, device, world
        self.run_dir = Path(config.run_dir)
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", config.keep, config.keep_every)
        data = load_data(config, self.run_dir / "cache", world, device)
        self.description = config.checkpoint_config(data.class_names, "")
        self.batches = create_batches(config, self.description.network, data, world, device)
        torch.manual_seed(config.seed)  # the same initial weights in every process
        self.model = initial_model(config, self.description.network, self._print).to(device)
        names = ema_files(config.averages, config.ema_half_life is not None)
        self.averages = {name: EMA(self.model) for name in names}
        self._prepare_model()
        self.stepper = Stepper(self.model, list(self.averages.values()), config, device, world)
        self.state = RunState(self.model, self.averages, self.stepper.optimizer, world)
        self.step = 0
        self._restore()

    def _prepare_model(self) -> None:
        if self.config.activation_checkpointing:
            recompute_blocks(self.model)
        if self.config.parallel == "fsdp":
            if self.world.size == 1:
                raise ValueError(
                    "--parallel fsdp shares a network out over processes and there is one: start it with torchrun"
                )
            for model in (self.model, *(ema.model for ema in self.averages.values())):
                shard(model, self.world, self.device)

    def _print(self, sentence: str) -> None:
        if self.world.is_main:
            print(sentence)

    def run(self) -> Path:
        """All steps that are left."""
        if self.world.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(as_tree(self.config), sort_keys=False)
            write_atomically(self.run_dir / "config.yaml", text.encode())
        self.model.train()
        if self.config.evaluation.every:
            _ = self.scorer  # what is missing for it is said now, not after hours
        self.watch = Watch(self.config, self.description.network, self.step, self.device, self.world)
        try:
            with StopSignals() as self.signals:
                while self.step < self.config.steps:
                    self._train_until_next_event()
        finally:
            self.watch.close()
        newest = self.checkpoints.newest()
        assert newest is not None
        return newest / EMA_FILE

    def _train_until_next_event(self) -> None:
        """Steps up to the next one that is logged, saved or shown, and what is to be done there."""
        config, first = self.config, self.step
        events = (config.log_every, config.save_every, config.preview_every, config.evaluation.every)
        every = [n for n in events if n]
        end = min(config.steps, *(first // n * n + n for n in every))
        while self.step < end and not self.stepper.stop:
            self.stepper.take(self.batches[self.step], self.step, self.signals.asked)
            self.step += 1
            self.watch.bar.update()
        self.stepper.settle()
        stop = self.stepper.stop
        self._report()
        if self.step % config.save_every == 0 or self.step == config.steps or stop:
            self._save(must=stop or self.step == config.steps)
        if config.preview_every and self.step % config.preview_every == 0:
            self._preview()
        if config.evaluation.every and self.step % config.evaluation.every == 0:
            self._evaluate()
        if stop and self.step < config.steps:
            raise Stopped(f"stopped after step {self.step}: the same command goes on from there")

    def _report(self) -> None:
        """Log the means over the steps that were taken; with none of them, nothing was finite."""
        stepper = self.stepper
        mse, vb, norm = stepper.means() or (None, None, None)
        loss = None if mse is None or vb is None else mse + vb
        values = {"lr": stepper.optimizer.param_groups[0]["lr"], "loss": loss, "mse": mse, "vb": vb}
        values |= {"grad_norm": norm, "skipped": stepper.skips.total}
        values |= {"ema_decay": averaging_decays(self.config, self.step)[0]}
        if stepper.scaler.is_enabled():
            values["loss_scale"] = stepper.scaler.get_scale()
        self.watch.report(self.step, values)

    def _save(self, must: bool) -> None:
        """Write a checkpoint. If it cannot be written the run goes on, unless it `must` be, at the end of this start.

        Raises:
            ValueError: if the processes have come out of step, or it cannot be written and must be.
        """
        odd = out_of_step([self.model, *(ema.model for ema in self.averages.values())], self.world)
        if odd is not None:
            raise ValueError(
                f"the processes hold different values of {odd} at step {self.step}: a device or the network between "
                "them is faulty; the same command goes on from the checkpoint before"
            )
        try:
            self._write()
        except (OSError, RuntimeError) as error:
            distributed.on_main(self.world, lambda: self.checkpoints.abandon(self.step))
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if must:
                raise ValueError(
                    f"the checkpoint of step {self.step} could not be written ({reason}): mend that and give the same "
                    "command, which goes on from the newest checkpoint"
                ) from error
            self.watch.say(f"the checkpoint of step {self.step} could not be written ({reason}); the run goes on")
        self.watch.restart_clock(self.step)

    def _write(self) -> None:
        part = distributed.on_main(self.world, lambda: self.checkpoints.begin(self.step))
        description = self.config.checkpoint_config(self.description.class_names, self._made_by())
        scaler = self.stepper.scaler.state_dict()
        progress = {"step": self.step, "skipped": self.stepper.skips.total, "scaler": scaler}
        self.state.save(part, description, progress)
        distributed.on_main(self.world, lambda: self.checkpoints.finish(self.step))

    def _preview(self) -> None:
        """A picture of samples from the first average; a sharded one needs all processes."""
        average = self.averages[EMA_FILE].model
        path = self.run_dir / "previews" / f"{self.step:08d}.png" if self.world.is_main else None
        if path is not None or is_sharded(average):
            save_preview(self.sampler, average, path)
        if path is not None:
            self.watch.show("samples", read_picture(path), self.step)
        distributed.barrier(self.world)
        self.watch.restart_clock(self.step)

    @cached_property
    def sampler(self) -> TrainingSampler:
        return TrainingSampler(self.description, self.device, self.config.precision)

    @cached_property
    def scorer(self) -> Scorer:
        from diffit.training.score import Scorer

        return Scorer(self.config.evaluation, self.sampler)

    def _evaluate(self) -> None:
        """Score the first average, and log it."""
        self.watch.log_scores(self.step, self.scorer.score(self.averages[EMA_FILE].model))
        self.watch.restart_clock(self.step)

    def _made_by(self) -> str:
        """The recipe, how far it was followed, and what it started from."""
        here = f"{self.recipe}, {self.step} steps of {self.config.batch_size} images"
        if self.config.init_from is None:
            return here
        return f"{here}, after {find_checkpoint(path=self.config.init_from)[1].made_by}"

    def _restore(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is one."""
        newest = distributed.on_main(self.world, lambda: self.checkpoints.newest_intact(print))
        if newest is None:
            return
        _, found = find_checkpoint(path=newest / EMA_FILE)
        if found.network != self.description.network:
            raise ValueError(
                f"{self.run_dir} holds a run of another network ({found.network}): choose another --run_dir"
            )
        progress = self.state.load(newest, found, self.device)
        self.step, self.stepper.skips.total = progress["step"], progress["skipped"]
        if self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(progress["scaler"])
