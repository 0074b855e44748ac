"""One optimizer step: batch -> loss -> gradient -> finite? -> AdamW -> EMA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffit.data.loader import Batch
from diffit.diffusion import Process
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.system.device import autocast
from diffit.system.distributed import World
from diffit.training.config import OptimizerConfig, TrainConfig
from diffit.training.ema import EMA, ema_decays, power_decay


@dataclass
class TrainState:
    """All that training changes.

    Args:
        model: the network; with FSDP it is sharded, and so are the EMAs.
        forward: the same network as the loss calls it: compiled, in DDP.
        emas: by file name, in the order of the config's decays.
        sums: of this rank's loss, mse, vb and gradient norm since the last line of the log [4]; of `summed` steps.
        step: how many steps are behind.
        skipped: how many of them were not taken; skipped_in_a_row: the last of them.
        images: number of images in the steps that were taken.
    """

    model: nn.Module
    forward: Any
    emas: dict[str, EMA]
    process: Process
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor
    summed: int = 0
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    images: int = 0


def train_step(
    state: TrainState, batch: Batch, config: TrainConfig, world: World, asked: Sequence[bool] = ()
) -> list[bool]:
    """Take a step in place, or skip it in all ranks if loss or gradient is not finite in one of them.

    asked: what this rank asks of all after the step, such as to stop. Returns what any rank asked, the same in all.

    Raises:
        ValueError: if too many steps in a row were skipped.
    """
    device, parts = batch.x_start.device, config.accumulate
    lr = learning_rate(config.optimizer, state.step, config.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    # PyTorch's dropout draws from this generator.
    stream = keyed_generator(config.seed, state.step, RandomStream.DROPOUT + world.rank)
    torch.manual_seed(int(stream.integers(2**63)))
    state.optimizer.zero_grad(set_to_none=True)

    # Loss and gradient, part by part; ranks share their gradients after the last part.
    total = torch.zeros(3, device=device)
    forward = autocast(state.forward, device, config.precision)
    for number, part in enumerate(split(batch, parts)):

        def predict(x: Tensor, t: Tensor, part: Batch = part) -> Tensor:
            return forward(x, t, **part.conditions)

        with gradient_sync(state.forward, on=number == parts - 1):
            losses = state.process.training_losses(predict, part.x_start, part.t, part.noise)
            state.scaler.scale(losses.loss.mean() / parts).backward()
        total += torch.stack([value.detach().mean() for value in (losses.loss, losses.mse, losses.vb)]) / parts
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.model, config.optimizer.grad_clip)
    values = torch.cat([total, norm[None]])  # [4]

    # All ranks agree; this is where the host waits for the device, once a step.
    agreed = torch.cat([~values.isfinite().all()[None], torch.tensor(asked, dtype=torch.bool, device=device)]).float()
    if world.size > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    skip, *asked_by_any = (flag > 0 for flag in agreed.tolist())

    state.step += 1
    if state.scaler.is_enabled():
        # The scaler has seen this rank's gradients alone: the scale must stay the same in all ranks.
        for not_finite in state.scaler._found_inf_per_device(state.optimizer).values():
            not_finite.fill_(float(skip))
    if not skip:
        state.optimizer.step()
        state.images += config.batch_size
        powers = [power_decay(length, state.images, config.batch_size) for length in config.ema_powers]
        for ema, decay in zip(state.emas.values(), ema_decays(config, state.step) + powers, strict=True):
            ema.update(state.model, decay)
        state.sums, state.summed = state.sums + values, state.summed + 1
    state.scaler.update()
    state.skipped += skip
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skip else 0
    if state.skipped_in_a_row >= config.max_skipped:
        raise ValueError(
            f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row, the last of them step "
            f"{state.step}: lower --optimizer.lr, set --optimizer.grad_clip, or choose --precision bf16 or fp32; the "
            "same command goes on from the newest checkpoint"
        )
    return asked_by_any


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of a run of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warm * decay


@contextlib.contextmanager
def gradient_sync(forward: Any, on: bool) -> Iterator[None]:
    """Around a forward and backward pass: whether gradients are shared with the other ranks after it."""
    if hasattr(forward, "set_requires_gradient_sync"):  # FSDP2
        forward.set_requires_gradient_sync(on)
    skip = isinstance(forward, nn.parallel.DistributedDataParallel) and not on
    with forward.no_sync() if skip else contextlib.nullcontext():
        yield


def gradient_norm(model: nn.Module, clip: float) -> Tensor:
    """The norm of all gradients [], which are clipped to `clip` unless that is 0."""
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` batches of the same size, its images in their order."""
    pieces = zip(batch.x_start.chunk(parts), batch.noise.chunk(parts), batch.t.chunk(parts), strict=True)
    conditions = {name: value.chunk(parts) for name, value in batch.conditions.items()}
    return [Batch(*piece, {name: value[i] for name, value in conditions.items()}) for i, piece in enumerate(pieces)]
