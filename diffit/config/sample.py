"""The configuration of sample.py. Precedence, weak to strong: what the checkpoint recommends, --config, flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from diffit.checkpoint import CheckpointConfig, Source, find_checkpoint
from diffit.codec import PIXELS, CodecConfig
from diffit.config.parser import build_parser, config_first, fail, parse
from diffit.config.upstream import UPSTREAM_HELP, upstream_arguments
from diffit.device import Device, Precision
from diffit.diffusion.settings import (
    DiffusionConfig,
    EDMConfig,
    GuidanceConfig,
    Process,
    ProcessConfig,
    SamplingConfig,
    check_process,
)
from diffit.fast import SKIP_BELOW


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py does.

    Args:
        model: a model of the zoo; without --model_path its bundled or released weights are used. Diffit-Fashion, the
            bundled one, unless a file says otherwise.
        model_path: weights: a .safetensors or .pt file, or a Hub file owner/repository/name.safetensors.
        image_size: side of the images in pixels, 256 or 512 for the released weights; by default the checkpoint's.
        log_dir: folder for the samples; logs/MODEL by default.
        num_samples: how many samples to make.
        batch_size: samples at a time per process; it does not change the samples.
        seed: sample i depends on (seed, i) and the settings alone.
        class_labels: numbers or names of classes, repeated in turn; drawn at random per sample by default.
        class_cond: False samples without classes.
        vae: an AutoencoderKL of diffusers, a folder or a Hub id, in place of the checkpoint's own.
        device: where to run; auto takes a GPU if there is one.
        precision: of the network's products; norms, softmax's sums, guidance and sampler stay in fp32. By default fp32,
            and with --fast True the 16 bits that the device computes with.
        fast: for previews: 16-bit weights, projections of times and labels computed beforehand, the null half left out
            where guidance hardly acts (--guidance.skip_below 1e-3) and, on CUDA, network and VAE compiled. What it
            changes in the images is in docs/benchmarks.md.
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
    process: Process = "gaussian"
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    edm: EDMConfig = field(default_factory=EDMConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    @property
    def process_config(self) -> ProcessConfig:
        return self.edm if self.process == "edm" else self.diffusion


@dataclass(frozen=True)
class SampleTask:
    """A resolved command line of sample.py: its settings, and the checkpoint that they speak of."""

    config: SampleConfig
    source: Source
    checkpoint: CheckpointConfig

    @property
    def vae(self) -> CodecConfig:
        """The checkpoint's codec, or the one that --vae names."""
        codec = self.checkpoint.codec
        return CodecConfig(self.config.vae, codec.factor) if self.config.vae else codec


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
        for node in ("diffusion", "edm", "sampling", "guidance"):
            for key, value in asdict(getattr(checkpoint, node)).items():
                recommended[f"{node}.{key}"] = value
        if named.fast and checkpoint.process == "gaussian":
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
    check_process(config.process, config.sampling, config.guidance)
