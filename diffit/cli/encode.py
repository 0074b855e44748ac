"""The configuration of python -m diffit.data.encode."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffit.cli.parser import answer_help, build_parser, config_first, instantiate, refuse
from diffit.cli.settings import Command
from diffit.data.config import EncodeConfig

COMMAND = Command(
    EncodeConfig,
    prog="python -m diffit.data.encode",
    description="Encode images once: python -m diffit.data.encode --data.path /data/imagenet --out /data/latents",
    epilog="On many GPUs: torchrun --nproc_per_node=8 -m diffit.data.encode ...",
    everyday=("data.path", "data.name", "out", "vae", "image_size", "device"),
)


def parse_encode(argv: Sequence[str] | None = None) -> EncodeConfig:
    """Resolve the command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    argv = sys.argv[1:] if argv is None else argv
    answer_help(COMMAND, argv)
    try:
        config: EncodeConfig
        config, _ = instantiate(build_parser(EncodeConfig, COMMAND.prog), EncodeConfig, config_first(argv))
        if not config.out:
            raise ValueError("say where the latents go: --out FOLDER")
        for name in ("image_size", "shard_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    except (ValueError, OSError) as error:
        refuse(str(error))
    return config
