"""The command sample.py. Precedence of settings, weak to strong: what the checkpoint recommends, --config, flags."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import Source, find_checkpoint, find_guide
from diffit.cli.parser import build, given_arguments, parse
from diffit.cli.run import one_sentence
from diffit.cli.settings import Command, yaml_lines
from diffit.cli.upstream import UPSTREAM_HELP, upstream_arguments
from diffit.config import PIXELS
from diffit.diffusion.config import SKIP_BELOW, ProcessSettings, check_process
from diffit.sampling.config import SampleConfig, SampleTask
from diffit.system.console import say
from diffit.system.ranks import detect_world

_NODES = [node.name for node in fields(ProcessSettings)]
COMMAND = Command(
    SampleConfig,
    prog="sample.py",
    description="Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion",
    epilog=UPSTREAM_HELP,
    everyday=(
        *("model", "model_path", "num_samples", "class_labels", "guidance.scale", "sampling.num_sampling_steps"),
        *("sampling.sampler", "seed", "batch_size", "log_dir", "overwrite", "device", "fast", "dry_run"),
    ),
    follows=dict.fromkeys(_NODES, "the checkpoint's"),
)


@one_sentence("stopped: the same command continues from here")
def main() -> None:
    """Parse, sample, print where the samples are."""
    task = parse_sample()
    if task.config.dry_run:
        say(*yaml_lines(task.config, task.checkpoint.network.num_classes))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from diffit.sampling.generate import generate  # loads PyTorch, which --help and --dry_run do without

    path = generate(task)
    if detect_world().is_main:
        say(f"{path}  (pictures: {path.with_name('grid.png')})")


@one_sentence()
def parse_sample(argv: Sequence[str] | None = None) -> SampleTask:
    """Resolve sample.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    given = parse(COMMAND, upstream_arguments(given_arguments(COMMAND, argv)))
    source, checkpoint = find_checkpoint(given.get("model"), given.get("model_path"), given.get("image_size"))
    recommended = {"model": checkpoint.model, "image_size": checkpoint.image_size}
    recommended |= checkpoint.recommended(given.get("sampling.sampler"))
    if given.get("fast") and checkpoint.process_config.num_timesteps is not None:
        recommended["guidance.skip_below"] = SKIP_BELOW
    config = build(SampleConfig, recommended | given)
    _check(config, source, checkpoint)
    task = SampleTask(config, source, checkpoint)
    find_guide(task.resolved)
    return task


def _check(config: SampleConfig, source: Source, checkpoint: CheckpointConfig) -> None:
    if config.class_labels is not None and not config.class_labels:
        raise ValueError("--class_labels needs at least one class")
    if config.process != checkpoint.process:
        raise ValueError(f"{source} was trained for the {checkpoint.process} process: leave --process out")
    if config.vae and checkpoint.codec.vae == PIXELS:
        raise ValueError(f"{source} makes pixels, which no VAE has to decode: leave --vae out")
    if config.class_labels and not checkpoint.network.num_classes:
        raise ValueError(f"{checkpoint.model} in {source} knows no classes: leave --class_labels out")
    if config.class_labels and not config.class_cond:
        raise ValueError("--class_cond False samples without classes: leave it or --class_labels out")
    check_process(config.process_config, config.sampling, config.guidance)


if __name__ == "__main__":  # torchrun -m diffit.cli.sample
    sys.exit(main())
