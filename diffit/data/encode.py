"""Encode images into a latent cache: python -m diffit.data.encode --data.path /data/imagenet --out /data/latents"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffit.cli.encode import parse_encode
from diffit.cli.parser import fail
from diffit.data.config import EncodeConfig

if TYPE_CHECKING:
    from diffit.data.latents import LatentCache


def main() -> int:
    """Encode, say what came of it; 2 if the user can mend it, 130 if interrupted."""
    config = parse_encode()
    try:
        encode(config)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on with the shards that are missing", file=sys.stderr)
        return 130
    return 0


def encode(config: EncodeConfig) -> None:
    """Make, or go on making, the latent cache that a config describes, and print what it holds.

    Raises:
        ValueError, FileNotFoundError: in one sentence, for everything that a user can mend.
    """
    from diffit import distributed
    from diffit.codec import CodecConfig, VAECodec
    from diffit.data.datasets import open_images
    from diffit.data.encoding import encode_images
    from diffit.data.latents import open_cache
    from diffit.device import resolve_device, set_matmul_precision

    device, folder, data = resolve_device(config.device), Path(config.out).expanduser(), config.data
    set_matmul_precision("tf32")
    world = distributed.start(device)
    try:
        if data.name == "folder" and data.path is None:
            cache = open_cache(folder)
        else:
            codec = VAECodec(CodecConfig(config.vae), device)
            cache = encode_images(
                open_images(data.name, data.path, config.image_size, codec.image_channels),
                codec,
                folder,
                flip=config.flip,
                workers=data.workers,
                world=world,
                skip_unreadable=data.skip_unreadable,
                shard_size=config.shard_size,
            )
        if world.is_main:
            if config.verify:
                cache.verify()
            _report(cache)
    finally:
        distributed.stop()


def _report(cache: LatentCache) -> None:
    classes = f" in {len(cache.class_names)} classes" if cache.class_names else ""
    flips = "with mirror images" if cache.settings.flips == 2 else "without mirror images"
    print(f"{cache.folder}: {len(cache)} images{classes}, {flips}, {cache.num_bytes / 1e9:.3g} GB")


if __name__ == "__main__":
    sys.exit(main())
