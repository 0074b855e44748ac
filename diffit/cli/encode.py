"""The command python -m diffit.data.encode."""

from __future__ import annotations

from collections.abc import Sequence

from diffit.cli.parser import build, given_arguments, parse
from diffit.cli.run import one_sentence
from diffit.cli.settings import Command
from diffit.data.config import EncodeConfig

COMMAND = Command(
    EncodeConfig,
    prog="python -m diffit.data.encode",
    description="Encode images once: python -m diffit.data.encode --data.path /data/imagenet --out /data/latents",
    epilog="On many GPUs: torchrun --nproc_per_node=8 -m diffit.data.encode ...",
    everyday=("data.path", "data.name", "out", "vae", "image_size", "device"),
)


@one_sentence("stopped: the same command goes on with the shards that are missing")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, encode, print what came of it."""
    config = parse_encode(argv)
    from diffit.data.encode import encode  # loads PyTorch, which --help does without

    encode(config)


@one_sentence()
def parse_encode(argv: Sequence[str] | None = None) -> EncodeConfig:
    """Resolve the command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    config = build(EncodeConfig, parse(COMMAND, given_arguments(COMMAND, argv)))
    if not config.out:
        raise ValueError("say where the latents go: --out FOLDER")
    return config
