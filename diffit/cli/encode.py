"""The configuration of python -m diffit.data.encode."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffit.cli.parser import build_parser, config_first, fail, parse
from diffit.data.config import EncodeConfig


def parse_encode(argv: Sequence[str] | None = None) -> EncodeConfig:
    """Resolve the command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = build_parser(
        EncodeConfig,
        prog="python -m diffit.data.encode",
        description="Encode images once: python -m diffit.data.encode --data.path /data/imagenet --out /data/latents",
        epilog="On many GPUs: torchrun --nproc_per_node=8 -m diffit.data.encode ...",
    )
    try:
        tree = parser.instantiate(parse(parser, config_first(sys.argv[1:] if argv is None else argv)))
        config = EncodeConfig(**{name: tree[name] for name in EncodeConfig.__dataclass_fields__})
        if not config.out:
            raise ValueError("say where the latents go: --out FOLDER")
        for name in ("image_size", "shard_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    except (ValueError, OSError) as error:
        fail(str(error))
    return config
