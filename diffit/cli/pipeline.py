"""The command python -m diffit.pipeline."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from diffit.cli.run import one_sentence
from diffit.system.console import say


@one_sentence()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write the folder, print what reads it."""
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
    from diffit.pipeline import DiffiTPipeline  # loads PyTorch and diffusers, which --help does without
    from diffit.system.files import check_apart

    check_apart(Path(arguments.folder), arguments.checkpoint, "folder", inside=False)
    DiffiTPipeline.from_pretrained(arguments.checkpoint).save_pretrained(arguments.folder)
    say(f"{arguments.folder}: DiffiTPipeline.from_pretrained({json.dumps(arguments.folder)}) samples from it")
