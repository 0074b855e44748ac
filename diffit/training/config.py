"""The settings of training. No tensor library is needed to read them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Literal

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import Source, find_checkpoint
from diffit.config import CodecConfig, Device, Precision
from diffit.data.config import DataConfig
from diffit.diffusion.config import GuidanceConfig, ProcessSettings, SamplingConfig
from diffit.models.config import DiffiTConfig, model_config
from diffit.settings import FREE, NOTED, setting


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Args:
        lr: peak learning rate.
        betas: decays of the first and second moment.
        weight_decay: decoupled weight decay.
        warmup: steps over which the rate rises linearly from zero.
        schedule: constant, or a cosine from lr to zero over the run.
        grad_clip: largest gradient norm; 0 does not clip.
    """

    lr: float = setting(1e-4, at_least=0, at_most=1)
    betas: tuple[float, float] = setting((0.9, 0.999), at_least=0, below=1)
    weight_decay: float = setting(0.0, at_least=0, at_most=1e3)
    warmup: int = setting(0, at_least=0)
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = setting(0.0, at_least=0, at_most=1e12)


@dataclass(frozen=True)
class EvaluationConfig:
    """FID and Inception Score of the first EMA, logged beside the loss.

    Args:
        every: steps between scores; 0 never scores.
        samples: number of samples, drawn with the recommended settings; FID falls with it, so compare equal numbers.
        batch_size: samples at a time per rank.
        reference: an .npz that evaluations/make_reference.py or ADM made.
        features: module:path of a classifier, in place of the Inception network.
    """

    every: int = setting(0, at_least=0)
    samples: int = setting(5000, at_least=2)
    batch_size: int = setting(64, at_least=1)
    reference: str | None = None
    features: str | None = None


@dataclass(frozen=True)
class ValidationConfig:
    """Loss of the first EMA on held-out images, whole and in eight bins of t, always at the same times and noise.

    Args:
        every: steps between losses; 0 never computes one.
        path: folder, ZIP or Parquet file of held-out images, with the classes of the training images; by default the
            test split of a data set by name.
        images: number of images, spread evenly over those there are.
    """

    every: int = setting(0, at_least=0)
    path: str | None = None
    images: int = setting(2000, at_least=1)


@dataclass(frozen=True)
class TrainConfig(ProcessSettings):
    """What train.py does.

    Args:
        model: a size of the zoo.
        network: fields of the network's config to replace, such as {depth: 30} or {blocks: [4, 4, 4]}.
        run_dir: folder of checkpoints and logs; the same command again resumes from its newest checkpoint.
        init_from: start a new run from other weights: a run's folder, a file, a name, or whatever else sample.py
            --model_path takes. They bring model, network, codec and process, and what to recommend, as defaults;
            classes and resolution may differ.
        steps: optimizer steps of the whole run.
        batch_size: images per optimizer step, over all ranks and accumulated parts.
        accumulate: number of parts that each rank splits its share of a step into, to save memory.
        seed: seed of initialisation, order of images, timesteps, noise and dropped labels.
        ema_decay: decay of the weight EMA; a list keeps several EMAs, of which the first is sampled from.
        ema_half_life: half-life of the weight EMA in images, in place of ema_decay; as in EDM at most 5% of the images
            seen so far.
        ema_power: further EMAs, of power functions, of which tools/posthoc_ema.py makes EMAs of any length; their
            relative standard deviations sigma_rel, such as 0.05 0.1. Off by default.
        ema_snapshots: snapshots of each EMA of ema_power over the run, at least, in fp16 in RUN_DIR/snapshots.
        device: where to run; auto takes a GPU if there is one.
        precision: precision of the forward and backward pass; weights stay in fp32, and with fp16 the loss is scaled.
        compile: compile the network with torch.compile.
        parallel: what is sharded over ranks: ddp shards the batch alone, fsdp (FSDP2) also weights, gradients,
            optimizer and EMAs, for networks that do not fit into one GPU.
        activation_checkpointing: recompute every block in the backward pass, to save memory.
        rank_timeout: minutes that ranks wait for one that hangs in a step, before the run ends with an error.
        max_skipped: stop after this many consecutive non-finite steps; each such step is skipped.
        log_every: steps between log lines.
        save_every: steps between checkpoints; by default they come by time, in at most 1% of it.
        keep: how many of the newest checkpoints stay.
        keep_every: checkpoints of steps that are a multiple of it stay for good; 0 is none.
        tracker: where curves and pictures go beside log.jsonl; tensorboard only where it is installed.
        preview_every: steps between pictures of samples, always of the same noise and classes; 0 is none. By default
            they come by time: the first within two minutes, then ever more rarely, in at most 1% of it.
        sampling: what the checkpoint recommends to sample.py.
        guidance: what the checkpoint recommends to sample.py.
        codec: the VAE, or pixels.
        process: the diffusion process: gaussian (the default of latent models), edm (that of models of pixels) or flow
            (both); its settings are in the node diffusion, edm or flow.
        dry_run: print the resolved config, the size of the network and the cost of the run, and stop.
    """

    model: str = setting("Diffit", NOTED)
    network: dict[str, int | float | bool | str | list[int]] = setting(resume=NOTED, factory=dict)
    run_dir: str = setting("runs/train", FREE)
    init_from: str | None = setting(None, NOTED)
    steps: int = setting(400_000, NOTED, at_least=1)
    batch_size: int = setting(256, NOTED, at_least=1)
    accumulate: int = setting(1, NOTED, at_least=1)
    seed: int = setting(0, NOTED, at_least=0, at_most=2**64 - 1)
    ema_decay: float | list[float] = setting(0.9999, NOTED, at_least=0, below=1)
    ema_half_life: float | list[float] | None = setting(None, NOTED, above=0, at_most=1e12)
    ema_power: float | list[float] | None = setting(None, NOTED, above=0, at_most=0.28)
    ema_snapshots: int = setting(40, FREE, at_least=1)
    device: Device = setting("auto", NOTED)
    precision: Precision = setting("tf32", NOTED)
    compile: bool = setting(False, NOTED)
    parallel: Literal["ddp", "fsdp"] = setting("ddp", NOTED)
    activation_checkpointing: bool = setting(False, NOTED)
    rank_timeout: float = setting(10.0, FREE, at_least=0.01, at_most=1e6)
    max_skipped: int = setting(25, FREE, at_least=1)
    log_every: int = setting(100, FREE, at_least=1)
    save_every: int | None = setting(None, FREE, at_least=1)
    keep: int = setting(2, FREE, at_least=1)
    keep_every: int = setting(0, FREE, at_least=0)
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = setting("tensorboard", FREE)
    preview_every: int | None = setting(None, FREE, at_least=0)
    evaluation: EvaluationConfig = setting(EvaluationConfig(), FREE)
    validation: ValidationConfig = setting(ValidationConfig(), FREE)
    data: DataConfig = setting(DataConfig())
    codec: CodecConfig = setting(CodecConfig(), NOTED)
    optimizer: OptimizerConfig = setting(OptimizerConfig(), NOTED)
    dry_run: bool = setting(False, FREE)
    _: KW_ONLY
    sampling: SamplingConfig = setting(SamplingConfig(), FREE)  # what the checkpoint recommends, not what is learned
    guidance: GuidanceConfig = setting(GuidanceConfig(), FREE)

    def checkpoint_config(self, class_names: tuple[str, ...], made_by: str) -> CheckpointConfig:
        """What a checkpoint of this run says about itself."""
        network = model_config(self.model, **self.network)
        if "num_classes" not in self.network:
            network = replace(network, num_classes=len(class_names))
        if isinstance(network, DiffiTConfig):
            network = replace(network, learn_sigma=self.process_config.learn_sigma)
        return CheckpointConfig(
            model=self.model,
            network=network,
            codec=self.codec,
            class_names=class_names if network.num_classes else (),
            made_by=made_by,
            **{node.name: getattr(self, node.name) for node in fields(ProcessSettings)},
        )

    @property
    def ema_rates(self) -> list[float]:
        """The decays of the EMAs, or their half-lives if these are set; the one to sample from first."""
        given = self.ema_decay if self.ema_half_life is None else self.ema_half_life
        return given if isinstance(given, list) else [given]

    @property
    def ema_powers(self) -> list[float]:
        """The sigma_rel of each EMA of a power function."""
        return self.ema_power if isinstance(self.ema_power, list) else [self.ema_power] if self.ema_power else []

    @property
    def snapshot_every(self) -> int:
        """Steps between snapshots of these; the last step has one too."""
        return max(1, self.steps // self.ema_snapshots)


@dataclass(frozen=True)
class TrainTask:
    """A resolved command line of train.py, and the recipe that it followed."""

    config: TrainConfig
    recipe: str


def find_start(config: TrainConfig) -> tuple[Source, CheckpointConfig]:
    """The weights that --init_from names, and what they are; see `find_checkpoint`."""
    return find_checkpoint(config.model, config.init_from, door="--init_from")
