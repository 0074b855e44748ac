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
        name: folder (or ZIP; one subfolder per class, or none, or as EDM's dataset_tool has it), or a known data set.
        path: the folder, ZIP or Parquet file; of a known data set the folder of its files, by default an installed
            copy, or else it is downloaded to data/.
        workers: worker processes that read images, for each rank; never more than there are cores.
        skip_unreadable: name and leave out images that cannot be read, rather than stop.
    """

    name: DataName = setting("folder", NOTED)
    path: str | None = setting(None, FREE)
    workers: int = setting(8, FREE, at_least=0)
    skip_unreadable: bool = setting(False, NOTED)


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """The training images.

    Args:
        flip: show every other image mirrored, at random; the augmentation of pixels does so by itself.
        cache: folder of a latent cache, by default RUN_DIR/cache; made if it is not there. Without a path, a finished
            one is all that is needed.
        augment: probability of each transform of EDM's augmentation, of pixels only; 0 is no augmentation at all.
    """

    flip: bool = setting(True, NOTED)
    cache: str | None = setting(None, FREE)
    augment: float = setting(0.0, NOTED, at_least=0, at_most=1)


@dataclass(frozen=True)
class EncodeConfig:
    """What diffit.data.encode does.

    Args:
        data: the images; without a path or name, a finished cache is only checked.
        out: folder of the cache; the same command again goes on with it.
        vae: an AutoencoderKL of diffusers: a bundled name, a folder, or a Hub id.
        image_size: side of the square that is cut from every image, in pixels.
        flip: store the mirror images too.
        shard_size: images of a file; what a rank that is killed loses at most.
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
