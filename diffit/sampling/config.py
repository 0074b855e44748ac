"""The settings of sampling. No tensor library is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import Source
from diffit.config import Device, Precision
from diffit.diffusion.config import ProcessSettings
from diffit.settings import FREE, SAME, setting


@dataclass(frozen=True)
class WeightsConfig:
    """Which weights, and where they run.

    Args:
        model: a model of the zoo; without --model_path its bundled or released weights are used. Diffit-Fashion, the
            bundled one, unless a file says otherwise.
        model_path: weights: a file, a run's folder (its newest checkpoint), a checkpoint's folder, a saved pipeline, a
            name, or a pipeline or file owner/repository/name.safetensors on the Hub.
        image_size: side of the images in pixels, 256 or 512 for the released weights; by default the checkpoint's.
        device: where to run; auto takes a GPU if there is one.
    """

    model: str | None = setting(None, SAME)
    model_path: str | None = setting(None, FREE)  # the weights' own hash is compared
    image_size: int | None = setting(None, SAME, at_least=1)
    device: Device = setting("auto", SAME)


@dataclass(frozen=True)
class SampleConfig(WeightsConfig, ProcessSettings):
    """What sample.py does.

    Args:
        log_dir: folder for the samples; logs/MODEL by default.
        num_samples: how many samples to make.
        batch_size: samples at a time per rank; it does not change the samples.
        seed: seed of the set; sample i depends on (seed, i) and the settings alone.
        class_labels: numbers or names of classes, repeated in turn, or all: sample i is of class i modulo their number;
            drawn at random per sample by default.
        class_cond: False samples without classes.
        vae: an AutoencoderKL of diffusers, a folder or a Hub id, in place of the checkpoint's own.
        precision: precision of matrix products; norms, softmax, guidance and sampler stay in fp32. Default fp32, with
            --fast True bf16 (fp16 where the GPU has no bf16).
        compile: compile network and VAE with torch.compile, on CUDA to CUDA graphs; it takes a minute or so before the
            first image. By default off, and with --fast True on where it pays, which is on CUDA.
        fast: for previews: 16-bit weights, the null half left out where guidance hardly acts (--guidance.skip_below
            1e-3) and, on CUDA, --compile True. What it changes in the images is in docs/benchmarks.md.
        save_png: also write every sample as a PNG file.
        overwrite: replace samples made with other settings.
        dry_run: print the resolved config and stop.
        process: the diffusion process that the network was trained for; the checkpoint's metadata have it.
    """

    log_dir: str | None = setting(None, FREE)
    num_samples: int = setting(16, SAME, at_least=1)
    batch_size: int = setting(16, FREE, at_least=1)
    seed: int = setting(0, SAME, at_least=0, at_most=2**64 - 1)
    class_labels: list[str] | None = setting(None, SAME)
    class_cond: bool = setting(True, SAME)
    vae: str | None = setting(None, SAME)
    precision: Precision | None = setting(None, SAME)
    compile: bool | None = setting(None, SAME)
    fast: bool = setting(False, SAME)
    save_png: bool = setting(False, FREE)
    overwrite: bool = setting(False, FREE)
    dry_run: bool = setting(False, FREE)


@dataclass(frozen=True)
class SampleTask:
    """A resolved command line of sample.py: its settings and the checkpoint."""

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
class AppConfig(WeightsConfig):
    """What app.py does.

    Args:
        port: port of the page at 127.0.0.1, which other machines cannot reach.
    """

    port: int = setting(7860, at_least=1, at_most=65535)


@dataclass(frozen=True)
class AppTask:
    """A resolved command line of app.py: its settings and the checkpoint."""

    config: AppConfig
    source: Source
    checkpoint: CheckpointConfig
