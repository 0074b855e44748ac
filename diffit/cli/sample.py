"""The command sample.py. Precedence of settings, weak to strong: what the checkpoint recommends, --config, flags."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

import yaml

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import Source, find_checkpoint
from diffit.cli.parser import build_parser, check_numbers, fail, given_arguments, instantiate, parse, refusing
from diffit.cli.settings import Command
from diffit.cli.upstream import UPSTREAM_HELP, upstream_arguments
from diffit.config import PIXELS
from diffit.diffusion.config import SKIP_BELOW, ProcessSettings, check_process
from diffit.sampling.config import SampleConfig, SampleTask
from diffit.system.files import as_tree
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


def main() -> int:
    """Parse, sample, say where the samples are; 2 if the user can mend it, 130 if interrupted."""
    task, world = parse_sample(), detect_world()
    if task.config.dry_run:
        print(yaml.safe_dump(as_tree(task.config), sort_keys=False), end="")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from diffit.sampling.generate import generate  # loads PyTorch, which --help and --dry_run do without

    try:
        path = generate(task)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        if world.is_main:
            print("\nstopped: the same command continues from here", file=sys.stderr)
        return 130
    if world.is_main:
        print(f"{path}  (pictures: {path.with_name('grid.png')})")
    return 0


def parse_sample(argv: Sequence[str] | None = None) -> SampleTask:
    """Resolve sample.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    arguments = given_arguments(COMMAND, argv)
    parser = build_parser(SampleConfig, COMMAND.prog)
    with refusing():
        arguments = upstream_arguments(arguments)
        named = parse(parser, SampleConfig, arguments)
        source, checkpoint = find_checkpoint(named.model, named.model_path, named.image_size)
        recommended = {"model": checkpoint.model, "image_size": checkpoint.image_size, "process": checkpoint.process}
        for node in fields(ProcessSettings)[1:]:
            for key, value in asdict(getattr(checkpoint, node.name)).items():
                recommended[f"{node.name}.{key}"] = value
        if named.fast and checkpoint.process_config.num_timesteps is not None:
            recommended["guidance.skip_below"] = SKIP_BELOW
        parser.set_defaults(recommended)
        config, _ = instantiate(parser, SampleConfig, arguments)
        _check(config, source, checkpoint)
        return SampleTask(config, source, checkpoint)


def _check(config: SampleConfig, source: Source, checkpoint: CheckpointConfig) -> None:
    check_numbers(config, "num_samples", "batch_size")
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
