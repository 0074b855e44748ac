"""The configuration of sample.py. Precedence, weak to strong: what the checkpoint recommends, --config, flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

from diffit.cli.parser import build_parser, config_first, fail, parse
from diffit.cli.upstream import UPSTREAM_HELP, upstream_arguments
from diffit.config import PIXELS
from diffit.diffusion.config import SKIP_BELOW, ProcessSettings, check_process
from diffit.sampling.config import SampleConfig, SampleTask
from diffit.sources import CheckpointConfig, Source, find_checkpoint


def parse_sample(argv: Sequence[str] | None = None) -> SampleTask:
    """Resolve sample.py's command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = build_parser(
        SampleConfig,
        prog="sample.py",
        description="Sample images from a DiffiT checkpoint: python sample.py --model Diffit-Fashion",
        epilog=UPSTREAM_HELP,
    )
    try:
        arguments = upstream_arguments(config_first(sys.argv[1:] if argv is None else argv))
        named = parse(parser, arguments)
        source, checkpoint = find_checkpoint(named.model, named.model_path, named.image_size)
        recommended = {"model": checkpoint.model, "image_size": checkpoint.image_size, "process": checkpoint.process}
        for node in fields(ProcessSettings)[1:]:
            for key, value in asdict(getattr(checkpoint, node.name)).items():
                recommended[f"{node.name}.{key}"] = value
        if named.fast and checkpoint.process_config.num_timesteps is not None:
            recommended["guidance.skip_below"] = SKIP_BELOW
        parser.set_defaults(recommended)
        tree = parser.instantiate(parse(parser, arguments))
        config = SampleConfig(**{name: tree[name] for name in SampleConfig.__dataclass_fields__})
        _check_sample(config)
        _check_against(config, source, checkpoint)
    except (ValueError, OSError) as error:
        fail(str(error))
    return SampleTask(config, source, checkpoint)


def _check_sample(config: SampleConfig) -> None:
    for name in ("num_samples", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"--seed must be between 0 and 2^64 - 1, not {config.seed}")
    if config.class_labels is not None and not config.class_labels:
        raise ValueError("--class_labels needs at least one class")


def _check_against(config: SampleConfig, source: Source, checkpoint: CheckpointConfig) -> None:
    if config.process != checkpoint.process:
        raise ValueError(f"{source} was trained for the {checkpoint.process} process: leave --process out")
    if config.vae and checkpoint.codec.vae == PIXELS:
        raise ValueError(f"{source} makes pixels, which no VAE has to decode: leave --vae out")
    if config.class_labels and not checkpoint.network.num_classes:
        raise ValueError(f"{checkpoint.model} in {source} knows no classes: leave --class_labels out")
    if config.class_labels and not config.class_cond:
        raise ValueError("--class_cond False samples without classes: leave it or --class_labels out")
    check_process(config.process_config, config.sampling, config.guidance)
