"""The configuration of python -m diffit.data.encode."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffit.codec import CodecConfig
from diffit.config.parser import build_parser, config_first, fail, parse
from diffit.data.settings import ImagesConfig
from diffit.device import Device


@dataclass(frozen=True)
class EncodeConfig:
    """What diffit.data.encode does.

    Args:
        data: the images; without a path or name, a finished cache is only checked.
        out: folder of the cache; the same command again goes on with it.
        vae: an AutoencoderKL of diffusers: a bundled name, a folder, or a Hub id.
        image_size: side of the square that is cut from every image, in pixels.
        flip: store the mirror images too.
        shard_size: images of a file; what a process that is killed loses at most.
        verify: read every shard of the finished cache again and compare its checksum.
        device: where the VAE runs; auto takes a GPU if there is one.
    """

    data: ImagesConfig = field(default_factory=ImagesConfig)
    out: str = ""
    vae: str = CodecConfig.vae
    image_size: int = 256
    flip: bool = True
    shard_size: int = 1024
    verify: bool = False
    device: Device = "auto"


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
