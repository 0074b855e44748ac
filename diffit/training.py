"""The training loop: images or cached latents -> noise -> loss -> optimizer -> EMA -> checkpoint."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from diffit import distributed
from diffit.checkpoint import find_checkpoint, load_weights, save_checkpoint, write_atomically
from diffit.codec import create_codec
from diffit.config.parser import as_tree
from diffit.config.train import OptimizerConfig, TrainConfig, TrainTask
from diffit.data.batches import Batch, Batches, dropout_seed
from diffit.data.datasets import fitting_labels
from diffit.data.order import Plan
from diffit.data.prepare import TrainingData, prepare_data
from diffit.device import autocast, resolve_device, set_matmul_precision
from diffit.diffusion import EDM, GaussianDiffusion, create_diffusion
from diffit.diffusion.gaussian import TrainingLosses
from diffit.diffusion.settings import EDMConfig, ProcessConfig
from diffit.ema import EMA, half_life_decay, ramped_decay
from diffit.logs import JsonLog
from diffit.models.zoo import build_model, model_config

EMA_FILE, STATE_FILE = "ema.safetensors", "state.pt"


def train(task: TrainTask) -> Path:
    """Train, or go on training; returns the newest checkpoint's EMA weights, which sample.py takes.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
    """
    device = resolve_device(task.config.device)
    set_matmul_precision(task.config.precision)
    world = distributed.start(device)
    try:
        return Training(task, device, world).run()
    finally:
        distributed.stop()


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of a run of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warm * decay


def averaging_decay(config: TrainConfig, step: int) -> float:
    """The decay of the averaged weights at optimizer step `step`, counted from 1."""
    if config.ema_half_life is None:
        return ramped_decay(config.ema_decay, step)
    return half_life_decay(config.ema_half_life, config.batch_size, step)


def create_process(config: ProcessConfig) -> GaussianDiffusion | EDM:
    """The process that a config describes, for its training_losses."""
    if isinstance(config, EDMConfig):
        return EDM(config)
    return create_diffusion("", config.noise_schedule, config.learn_sigma, config.diffusion_steps)


class Training:
    """One run, as seen by one process."""

    def __init__(self, task: TrainTask, device: torch.device, world: distributed.World) -> None:
        self.config = config = task.config
        self.recipe, self.device, self.world = task.recipe, device, world
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        data = self._data()
        self.description = config.checkpoint_config(data.class_names, "")
        self.batches = self._batches(data)
        self.process = create_process(config.process_config)
        torch.manual_seed(config.seed)  # the same initial weights in every process
        self.model = self._initial_model().to(device)
        self.ema = EMA(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained, settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=device.type == "cuda"
        )
        self.step = 0
        self._restore()
        self.forward = self._wrapped_model()

    def _data(self) -> TrainingData:
        """The data set as the network is to see it; a latent model's is encoded first."""
        config = self.config
        network = model_config(config.model, **config.network)
        codec = create_codec(config.codec, self.device)
        size = network.input_size * config.codec.factor
        cache = self.run_dir / "cache"
        return prepare_data(config.data, codec, size, network.in_channels, cache, self.world, self.device)

    def _batches(self, data: TrainingData) -> Batches:
        size, processes = self.config.batch_size, self.world.size
        if size % processes:
            raise ValueError(f"--batch_size {size} cannot be shared by {processes} processes: choose a multiple")
        share = size // processes
        part = slice(self.world.rank * share, (self.world.rank + 1) * share)
        plan = Plan(self.config.seed, len(data.labels), size, part, data.flip)
        network, clean = self.description.network, data.clean(plan)
        expected = (network.in_channels, network.input_size, network.input_size)
        if clean.shape != expected:
            raise ValueError(
                f"the data are {'x'.join(map(str, clean.shape))} and {self.config.model} takes "
                f"{'x'.join(map(str, expected))}: set --network or --codec to fit"
            )
        labels = torch.from_numpy(fitting_labels(data.labels, network.num_classes)).to(self.device)
        return Batches(clean, labels, plan, self.config.process_config, network.class_dropout_prob)

    def _initial_model(self) -> nn.Module:
        """A fresh network, or the one that --init_from names."""
        if self.config.init_from is None:
            return build_model(self.description.network)
        source, found = find_checkpoint(path=self.config.init_from)
        if found.network != self.description.network:
            raise ValueError(f"{source} holds another network ({found.network}): it cannot start this run")
        return load_weights(source.fetch(), found)

    def _wrapped_model(self) -> Any:
        """The model as the loss calls it: compiled, in parallel, under autocast, as configured."""
        model: nn.Module = torch.compile(self.model) if self.config.compile else self.model  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [torch.cuda.current_device()] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        return autocast(model, self.device, self.config.precision)

    def run(self) -> Path:
        """All steps that are left."""
        if self.world.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(as_tree(self.config), sort_keys=False)
            write_atomically(self.run_dir / "config.yaml", text.encode())
            self.log = JsonLog(self.run_dir / "log.jsonl", self.step)
        self.model.train()
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not self.world.is_main)
        with bar:
            while self.step < self.config.steps:
                self._train_until_next_log(bar)
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self._save()
        return self._newest() / EMA_FILE  # type: ignore[operator]

    def _train_until_next_log(self, bar: tqdm[Any]) -> None:
        """Steps up to the next one that is logged or saved; only then is the device waited for."""
        config, first, start = self.config, self.step, time.monotonic()
        stops = (config.steps, *(self.step // every * every + every for every in (config.log_every, config.save_every)))
        totals = torch.zeros(3, device=self.device)
        while self.step < min(stops):
            losses, norm = self._optimize(self.batches[self.step], self.step)
            self.step += 1
            totals += torch.stack([losses.mse.detach().mean(), losses.vb.detach().mean(), norm])
            bar.update()
        if self.world.size > 1:
            dist.all_reduce(totals)
            totals /= self.world.size
        mse, vb, norm = (totals / (self.step - first)).tolist()
        speed = (self.step - first) * config.batch_size / (time.monotonic() - start)
        bar.set_postfix(loss=f"{mse + vb:.4f}", img_s=f"{speed:.0f}")
        if self.world.is_main:
            rate = self.optimizer.param_groups[0]["lr"]
            progress = {"step": self.step, "images": self.step * config.batch_size, "lr": rate}
            self.log.write(**progress, loss=mse + vb, mse=mse, vb=vb, grad_norm=norm, images_per_s=round(speed, 1))

    def _optimize(self, batch: Batch, step: int) -> tuple[TrainingLosses, Tensor]:
        """One optimizer step; returns the losses and the gradient norm."""
        settings = self.config.optimizer
        self.optimizer.param_groups[0]["lr"] = learning_rate(settings, step, self.config.steps)
        torch.manual_seed(dropout_seed(self.config.seed, step, self.world.rank))
        losses = self.process.training_losses(
            lambda x, t: self.forward(x, t, **batch.conditions), batch.x_start, batch.t, batch.noise
        )
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.trained, settings.grad_clip or math.inf)
        self.optimizer.step()
        self.ema.update(self.model, averaging_decay(self.config, step + 1))
        return losses, norm

    def _save(self) -> None:
        """Write a checkpoint under a temporary name, rename it, and drop the oldest."""
        if self.world.is_main:
            folder = self.checkpoints / f"{self.step:08d}"
            temporary = folder.with_suffix(".part")
            temporary.mkdir(parents=True, exist_ok=True)
            description = self.config.checkpoint_config(self.description.class_names, self._made_by())
            save_checkpoint(temporary / EMA_FILE, self.ema.model.state_dict(), description)
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            torch.save(state, temporary / STATE_FILE)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.replace(folder)
            for old in self._complete()[: -self.config.keep]:
                shutil.rmtree(old)
        distributed.barrier(self.world)

    def _made_by(self) -> str:
        """The recipe, how far it was followed, and what it started from."""
        here = f"{self.recipe}, {self.step} steps of {self.config.batch_size} images"
        if self.config.init_from is None:
            return here
        return f"{here}, after {find_checkpoint(path=self.config.init_from)[1].made_by}"

    def _complete(self) -> list[Path]:
        """Checkpoints that were written to the end, oldest first."""
        return sorted(folder for folder in self.checkpoints.glob("*") if folder.suffix != ".part")

    def _newest(self) -> Path | None:
        return next(reversed(self._complete()), None)

    def _restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = self._newest()
        if newest is None:
            return
        _, found = find_checkpoint(path=newest / EMA_FILE)
        if found.network != self.description.network:
            raise ValueError(
                f"{self.run_dir} holds a run of another network ({found.network}): choose another --run_dir"
            )
        self.ema.model.load_state_dict(load_weights(newest / EMA_FILE, found).state_dict())
        state = torch.load(newest / STATE_FILE, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
