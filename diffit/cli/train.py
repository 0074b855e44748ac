"""The configuration of train.py. Precedence, weak to strong: defaults, --config, flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffit.cli.parser import build_parser, config_first, fail, parse
from diffit.config import PIXELS
from diffit.diffusion.config import (
    check_process,
)
from diffit.models.config import DiffiTConfig, model_config
from diffit.training.config import TrainConfig, TrainTask


def parse_train(argv: Sequence[str] | None = None) -> TrainTask:
    """Resolve train.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = build_parser(
        TrainConfig,
        prog="train.py",
        description="Train a DiffiT: python train.py --config configs/fashion_mnist.yaml",
        epilog="Alone, or on many GPUs: torchrun --nproc_per_node=8 train.py --config ...",
    )
    try:
        arguments = config_first(sys.argv[1:] if argv is None else argv)
        tree = parser.instantiate(parse(parser, arguments))
        config = TrainConfig(**{name: tree[name] for name in TrainConfig.__dataclass_fields__})
        _check(config)
    except (ValueError, OSError) as error:
        fail(str(error))
    return TrainTask(config, str((tree.config or ["command line"])[0]))


def _check(config: TrainConfig) -> None:
    network = model_config(config.model, **config.network)
    fitting = ("gaussian", "latents") if isinstance(network, DiffiTConfig) else ("edm", "pixels")
    seen = "pixels" if config.codec.vae == PIXELS else "latents"
    if config.process not in (fitting[0], "flow") or seen != fitting[1]:
        raise ValueError(f"{config.model} needs --process {fitting[0]} or flow and a --codec.vae of {fitting[1]}")
    check_process(config.process_config, config.sampling, config.guidance)
    if not 0 <= config.data.augment <= 1 or (config.data.augment and config.codec.vae != PIXELS):
        raise ValueError(f"--data.augment is a probability, and for pixels only: it cannot be {config.data.augment}")
    for name in ("steps", "batch_size", "accumulate", "max_skipped", "log_every", "save_every", "keep"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if config.keep_every < 0 or config.keep_every % config.save_every:
        raise ValueError(
            f"--keep_every {config.keep_every} must be a multiple of --save_every {config.save_every}: other steps "
            "have no checkpoint"
        )
    if config.preview_every < 0:
        raise ValueError(f"--preview_every must be at least 0, not {config.preview_every}")
    _check_averages(config)
    _check_evaluation(config)


def _check_evaluation(config: TrainConfig) -> None:
    wanted = config.evaluation
    if wanted.every < 0 or wanted.samples < 2 or wanted.batch_size < 1:
        raise ValueError("--evaluation needs every >= 0, samples >= 2 and batch_size >= 1")
    if wanted.every and wanted.reference is None:
        raise ValueError("--evaluation.every needs --evaluation.reference: make one with evaluations/make_reference.py")
    if wanted.every and config.parallel == "fsdp":
        raise ValueError(
            "--evaluation does not score sharded networks: score checkpoints with sample.py and eval_run.sh"
        )


def _check_averages(config: TrainConfig) -> None:
    if not config.ema_rates or len(set(config.ema_rates)) < len(config.ema_rates):
        raise ValueError(f"the averages {config.ema_rates} must be at least one, and all different")
    for value in config.ema_rates:
        if config.ema_half_life is None and not 0 <= value < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), not {value}")
        if config.ema_half_life is not None and value <= 0:
            raise ValueError(f"--ema_half_life must be above 0 images, not {value}")
