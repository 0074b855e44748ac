"""One optimizer step: batch -> noise -> loss -> gradient -> AdamW -> averages.

Nothing in a step waits for the device. It is decided there whether a step is taken or skipped: its loss and the norm of
its gradient are finite in all processes, or nothing changes. The host learns of it while the next step is computed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffit.data.batches import Batch, dropout_seed
from diffit.diffusion import create_process
from diffit.distributed import World
from diffit.training.config import TrainConfig
from diffit.training.ema import EMA
from diffit.training.flags import Flags
from diffit.training.parallel import Parallel, gradient_norm
from diffit.training.rates import averaging_decays, learning_rate
from diffit.training.stopping import Skips


class Stepper:
    """Takes the optimizer steps of one process.

    Args:
        model: the network, on the device; with FSDP it is already sharded, and so are
        averages: those of it, in the order of the config's.
    """

    def __init__(
        self, model: nn.Module, averages: list[EMA], config: TrainConfig, device: torch.device, world: World
    ) -> None:
        self.model, self.averages, self.config, self.device, self.world = model, averages, config, device, world
        self.process = create_process(config.process_config)
        self.forward = Parallel(model, config, device, world)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            config.optimizer.lr,
            config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=device.type != "mps",  # whose fused kernel takes no notice of found_inf
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.skips = Skips(config.max_skipped)
        self.stop = False  # whether a process was asked to stop, as far as the host knows
        self._unsettled: tuple[int, Flags] | None = None
        self._sums = self._zeros = torch.zeros(4, device=device)  # of mse, vb, gradient norm and 1, over steps taken

    def take(self, batch: Batch, step: int, asked: bool) -> None:
        """Queue step `step`, counted from 0.

        Args:
            asked: whether this process was asked to stop.

        Raises:
            ValueError: if too many steps before this one were skipped.
        """
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config.optimizer, step, self.config.steps)
        torch.manual_seed(dropout_seed(self.config.seed, step, self.world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.accumulate(batch)
        self.settle()  # here, for the device has the pass above to compute while the host waits for the step before
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.trained, self.config.optimizer.grad_clip)
        wrong = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        flags = Flags(torch.stack([wrong.to(norm), torch.full_like(norm, float(asked))]), self.world)
        self._update(flags.here[0])
        values = torch.cat([losses, norm[None], torch.ones_like(norm[None])])
        self._sums = self._sums + torch.where(flags.here[0] > 0, 0.0, values)
        self._unsettled = step + 1, flags

    def settle(self) -> None:
        """Learn what became of the last step, count it, and let the averages follow if it was taken.

        The weights must still be those after that step: the averages are up to date once this was called.

        Raises:
            ValueError: if too many steps in a row were skipped.
        """
        if self._unsettled is None:
            return
        (step, flags), self._unsettled = self._unsettled, None
        skipped, self.stop = flags.read()
        if not skipped:
            for ema, decay in zip(self.averages, averaging_decays(self.config, step), strict=True):
                ema.update(self.model, decay)
        self.skips.count(skipped, step)

    def means(self) -> list[float] | None:
        """Mean mse, vb and gradient norm of all processes over the steps taken since the last call; None of none.

        Waits for the device.
        """
        sums, self._sums = self._sums, self._zeros
        if self.world.size > 1:
            dist.all_reduce(sums)
        *totals, taken = (sums / self.world.size).tolist()
        return [total / taken for total in totals] if taken else None

    def accumulate(self, batch: Batch) -> Tensor:
        """The gradient of the mean loss of this process's images, part by part; returns mean mse and vb [2]."""
        parts = self.config.accumulate
        total = torch.zeros(2, device=self.device)
        for number, part in enumerate(split(batch, parts)):
            with self.forward.passing(last=number == parts - 1):
                model = partial(self._predict, part.conditions)
                losses = self.process.training_losses(model, part.x_start, part.t, part.noise)
                self.scaler.scale(losses.loss.mean() / parts).backward()
            total += torch.stack([losses.mse.detach().mean(), losses.vb.detach().mean()]) / parts
        return total

    def _predict(self, conditions: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return self.forward(x, t, **conditions)

    def _update(self, wrong: Tensor) -> None:
        """AdamW's step, or none if `wrong` [], which is 0 or 1, is 1; the loss scale falls then."""
        if self.scaler.is_enabled():
            # The scaler has seen this process's gradients alone: the scale must stay the same in all processes.
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(wrong)
        fused = self.optimizer.defaults["fused"]
        if fused:
            self.optimizer.found_inf = wrong  # type: ignore[attr-defined]
        if fused or not wrong:  # only what is not fused reads the flag, and waits
            self.optimizer.step()
        self.scaler.update()


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` batches of the same size, its images in their order."""
    size = len(batch.t) // parts
    pieces = [slice(first, first + size) for first in range(0, len(batch.t), size)]
    return [
        replace(
            batch,
            x_start=batch.x_start[piece],
            noise=batch.noise[piece],
            t=batch.t[piece],
            conditions={name: value[piece] for name, value in batch.conditions.items()},
        )
        for piece in pieces
    ]
