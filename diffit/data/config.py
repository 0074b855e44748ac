"""What may be set about data. No tensor library is needed to read it."""

from dataclasses import dataclass
from typing import Literal

from diffit.config import CodecConfig, Device
from diffit.settings import FREE, NOTED, setting

DataName = Literal["folder", "fashion_mnist", "cifar10"]


@dataclass(frozen=True)
class ImagesConfig:
    """Images.

    Args:
        name: kind of data: a folder or ZIP (one subfolder per class, or none, or in the layout of EDM's dataset_tool),
            or a known data set.
        path: the folder, ZIP or Parquet file; for a known data set the folder of its files. By default an installed
            copy is read, or else it is downloaded to data/.
        workers: processes per rank that read images; at most as many as there are cores.
        skip_unreadable: name and leave out unreadable images, rather than stop.
    """

    name: DataName = setting("folder", NOTED)
    path: str | None = setting(None, FREE)
    workers: int = setting(8, FREE, at_least=0)
    skip_unreadable: bool = setting(False, NOTED)


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """The training images.

    Args:
        flip: mirror each image with probability 1/2; off when --data.augment is on, which flips already.
        cache: folder of the latent cache, by default RUN_DIR/cache; made on first use. A finished one can be used
            without the images.
        augment: probability of each transform of EDM's augmentation, for pixels alone; 0 augments nothing.
    """

    flip: bool = setting(True, NOTED)
    cache: str | None = setting(None, FREE)
    augment: float = setting(0.0, NOTED, at_least=0, at_most=1)


@dataclass(frozen=True)
class EncodeConfig:
    """What diffit.data.encode does.

    Args:
        data: the images; without a path or name, a finished cache is only checked.
        out: folder of the cache; the same command resumes an unfinished one.
        vae: an AutoencoderKL of diffusers: a bundled name, a folder, or a Hub id.
        image_size: side of the square that is cut from every image, in pixels.
        flip: store the mirror images too.
        shard_size: images per file, and the most that a killed rank has to encode again.
        verify: read every shard of the finished cache again and compare its checksum.
        device: where the VAE runs; auto takes a GPU if there is one.
    """

    data: ImagesConfig = setting(ImagesConfig())
    out: str = ""
    vae: str = CodecConfig.vae
    image_size: int = setting(256, at_least=1)
    flip: bool = True
    shard_size: int = setting(1024, at_least=1)
    verify: bool = False
    device: Device = "auto"
