"""The settings of sampling. No tensor library is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import Source
from diffit.config import Device, Precision
from diffit.diffusion.config import ProcessSettings


@dataclass(frozen=True)
class SampleConfig(ProcessSettings):
    """What sample.py does.

    Args:
        model: a model of the zoo; without --model_path its bundled or released weights are used. Diffit-Fashion, the
            bundled one, unless a file says otherwise.
        model_path: weights: a .safetensors or .pt file, or a Hub file owner/repository/name.safetensors.
        image_size: side of the images in pixels, 256 or 512 for the released weights; by default the checkpoint's.
        log_dir: folder for the samples; logs/MODEL by default.
        num_samples: how many samples to make.
        batch_size: samples at a time per rank; it does not change the samples.
        seed: sample i depends on (seed, i) and the settings alone.
        class_labels: numbers or names of classes, repeated in turn; drawn at random per sample by default.
        class_cond: False samples without classes.
        vae: an AutoencoderKL of diffusers, a folder or a Hub id, in place of the checkpoint's own.
        device: where to run; auto takes a GPU if there is one.
        precision: of the network's products; norms, softmax's sums, guidance and sampler stay in fp32. By default fp32,
            and with --fast True the 16 bits that the device computes with.
        fast: for previews: 16-bit weights, the null half left out where guidance hardly acts (--guidance.skip_below
            1e-3) and, on CUDA, network and VAE compiled. What it changes in the images is in docs/benchmarks.md.
        save_png: also write every sample as a PNG file.
        overwrite: replace samples made with other settings.
        dry_run: print the resolved config and stop.
        process: the one that the network was trained for, as the checkpoint says.
    """

    model: str | None = None
    model_path: str | None = None
    image_size: int | None = None
    log_dir: str | None = None
    num_samples: int = 16
    batch_size: int = 16
    seed: int = 0
    class_labels: list[str] | None = None
    class_cond: bool = True
    vae: str | None = None
    device: Device = "auto"
    precision: Precision | None = None
    fast: bool = False
    save_png: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class SampleTask:
    """A resolved command line of sample.py: its settings, and the checkpoint that they speak of."""

    config: SampleConfig
    source: Source
    checkpoint: CheckpointConfig

    @property
    def resolved(self) -> CheckpointConfig:
        """The checkpoint's config with what the command line changed in it."""
        nodes = {node.name: getattr(self.config, node.name) for node in fields(ProcessSettings)}
        codec = replace(self.checkpoint.codec, vae=self.config.vae or self.checkpoint.codec.vae)
        return replace(self.checkpoint, codec=codec, **nodes)


@dataclass(frozen=True)
class AppConfig:
    """What app.py does.

    Args:
        model: a model of the zoo; without --model_path its bundled or released weights are used. Diffit-Fashion, the
            bundled one, unless a file says otherwise.
        model_path: weights: a .safetensors or .pt file, or a Hub file owner/repository/name.safetensors.
        image_size: side of the images in pixels, 256 or 512 for the released weights; by default the checkpoint's.
        device: where to sample; auto takes a GPU if there is one.
        port: of 127.0.0.1, where the page is; other machines cannot reach it.
    """

    model: str | None = None
    model_path: str | None = None
    image_size: int | None = None
    device: Device = "auto"
    port: int = 7860


@dataclass(frozen=True)
class AppTask:
    """A resolved command line of app.py: its settings, and the checkpoint that they speak of."""

    config: AppConfig
    source: Source
    checkpoint: CheckpointConfig
