"""The command line of python -m diffit.pipeline."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence


def parse_convert(argv: Sequence[str] | None = None) -> tuple[str, str]:
    """The checkpoint and the folder to write. Ends the program with exit code 2 if they are not both there."""
    parser = ArgumentParser(
        prog="python -m diffit.pipeline",
        description="Write a checkpoint as a folder that diffusers reads: python -m diffit.pipeline runs/mine my_model",
    )
    parser.add_argument(
        "checkpoint",
        help="a run's folder (its newest checkpoint), one of its checkpoints, state.pt or state/ in that (weights "
        "without EMA), a .safetensors file, or a name: Diffit-Fashion, Diffit, nvidia/DiffiT/diffit_512.safetensors",
    )
    parser.add_argument("folder", help="where the pipeline is written")
    arguments = parser.parse_args(argv)
    return arguments.checkpoint, arguments.folder
