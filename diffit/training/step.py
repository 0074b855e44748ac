"""One optimizer step: batch -> loss -> gradient -> finite? -> AdamW -> EMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffit.data.loader import Batch
from diffit.diffusion import Process
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.system.distributed import World
from diffit.training.config import TrainConfig
from diffit.training.ema import EMA, ema_decays, learning_rate
from diffit.training.parallel import gradient_norm, gradient_sync


@dataclass
class TrainState:
    """All that training changes.

    Args:
        model: the network; with FSDP it is sharded, and so are the EMAs.
        forward: the same network as the loss calls it: compiled, in DDP.
        emas: by file name, in the order of the config's decays.
        step: how many steps are behind.
        skipped: how many of them were not taken; skipped_in_a_row: the last of them.
    """

    model: nn.Module
    forward: Any
    emas: dict[str, EMA]
    process: Process
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    """What became of a step: taken or skipped, in all ranks alike.

    Args:
        values: this rank's loss, mse, vb and gradient norm [4], on the device.
        finite: whether the step was taken.
        stop: whether a rank was asked to stop.
    """

    values: Tensor
    finite: bool
    stop: bool


def train_step(
    state: TrainState, batch: Batch, config: TrainConfig, world: World, stop_requested: bool = False
) -> StepResult:
    """Take a step in place, or skip it in all ranks if loss or gradient is not finite in one of them.

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
    for number, part in enumerate(split(batch, parts)):

        def predict(x: Tensor, t: Tensor, part: Batch = part) -> Tensor:
            half = torch.float16 if config.precision == "fp16" else torch.bfloat16
            with torch.autocast(device.type, half, enabled=config.precision in ("bf16", "fp16")):
                return state.forward(x, t, **part.conditions)

        with gradient_sync(state.forward, on=number == parts - 1):
            losses = state.process.training_losses(predict, part.x_start, part.t, part.noise)
            state.scaler.scale(losses.loss.mean() / parts).backward()
        total += torch.stack([value.detach().mean() for value in (losses.loss, losses.mse, losses.vb)]) / parts
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.model, config.optimizer.grad_clip)
    values = torch.cat([total, norm[None]])  # [4]

    # All ranks agree; this is where the host waits for the device, once a step.
    agreed = torch.stack([~values.isfinite().all(), torch.tensor(stop_requested, device=device)]).float()
    if world.size > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    skip, stop = (flag > 0 for flag in agreed.tolist())

    state.step += 1
    if state.scaler.is_enabled():
        # The scaler has seen this rank's gradients alone: the scale must stay the same in all ranks.
        for found in state.scaler._found_inf_per_device(state.optimizer).values():
            found.fill_(float(skip))
    if not skip:
        state.optimizer.step()
        for ema, decay in zip(state.emas.values(), ema_decays(config, state.step), strict=True):
            ema.update(state.model, decay)
    state.scaler.update()
    state.skipped += skip
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skip else 0
    if state.skipped_in_a_row >= config.max_skipped:
        raise ValueError(
            f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row, the last of them step "
            f"{state.step}: lower --optimizer.lr, set --optimizer.grad_clip, or choose --precision bf16 or fp32; the "
            "same command goes on from the newest checkpoint"
        )
    return StepResult(values, not skip, stop)


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` batches of the same size, its images in their order."""
    pieces = zip(batch.x_start.chunk(parts), batch.noise.chunk(parts), batch.t.chunk(parts), strict=True)
    conditions = {name: value.chunk(parts) for name, value in batch.conditions.items()}
    return [Batch(*piece, {name: value[i] for name, value in conditions.items()}) for i, piece in enumerate(pieces)]
