"""The configuration of python -m diffit.data.encode."""

from __future__ import annotations

from collections.abc import Sequence

from diffit.cli.parser import build_parser, check_numbers, given_arguments, instantiate, refusing
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
    config: EncodeConfig
    arguments = given_arguments(COMMAND, argv)
    with refusing():
        config, _ = instantiate(build_parser(EncodeConfig, COMMAND.prog), EncodeConfig, arguments)
        if not config.out:
            raise ValueError("say where the latents go: --out FOLDER")
        check_numbers(config, "image_size", "shard_size")
    return config
