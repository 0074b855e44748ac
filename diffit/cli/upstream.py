"""Upstream's command line of sample.py, rewritten to ours by a small table."""

from collections.abc import Sequence

from diffit.cli.parser import split_flags
from diffit.config import STABILITY_VAE

# Upstream's flags (and one short name of ours) -> ours.
ALIASES = {
    "cfg_scale": "guidance.scale",
    "cfg_cond": "guidance.enabled",
    "scale_pow": "guidance.power",
    "num_sampling_steps": "sampling.num_sampling_steps",
    "clip_denoised": "sampling.clip_denoised",
    "sampler": "sampling.sampler",
    "noise_schedule": "diffusion.noise_schedule",
    "diffusion_steps": "diffusion.diffusion_steps",
    "learn_sigma": "diffusion.learn_sigma",
}
# Upstream's flags whose value is another flag of ours: flag -> value -> our arguments.
TRANSLATED: dict[str, dict[str, list[str]]] = {
    "use_ddim": {"True": ["--sampling.sampler", "ddim"], "False": []},
    "use_fp16": {"True": ["--precision", "fp16"], "False": []},
    "vae_decoder": {choice: ["--vae", STABILITY_VAE.format(choice)] for choice in ("ema", "mse")},
}
# Upstream's flags that mean nothing here, with the only value that is accepted.
MEANINGLESS = {
    "world_size": "1",
    "local_rank": "-1",
    "rank": "0",
    "dist_url": "env://",
    "dist_on_itp": "False",
    "mask_ratio": "None",
    "decode_layer": "None",
}

UPSTREAM_HELP = f"""\
Upstream's command lines work unchanged:
{chr(10).join(f"  --{name:<18} is --{target}" for name, target in ALIASES.items())}
  --use_ddim True      is --sampler ddim
  --use_fp16 True      is --precision fp16
  --vae_decoder ema    is --vae {STABILITY_VAE.format("ema")}; likewise mse
  --{", --".join(MEANINGLESS)}
                       are accepted with upstream's default only.

Naming a scale turns guidance on: --cfg_scale 4.4 alone is enough, and --cfg_cond False turns it off. (Upstream ignores
the scale silently unless --cfg_cond True is given too.) Defaults of sampling and guidance are those that the checkpoint
recommends: --dry_run True shows them.
"""


def upstream_arguments(argv: Sequence[str]) -> list[str]:
    """Rewrite upstream's flags to ours.

    Raises:
        ValueError: if an upstream flag has a value that means nothing here.
    """
    ours: list[str] = []
    for flag, values, _ in split_flags(argv):
        name, value = flag[2:], " ".join(values) or "True"
        if value.lower() in ("true", "false", "none"):
            value = value.capitalize()
        if name in TRANSLATED:
            if value not in TRANSLATED[name]:
                raise ValueError(f"--{name} {value} is unknown: choose one of {', '.join(TRANSLATED[name])}")
            ours += TRANSLATED[name][value]
        elif name not in MEANINGLESS:
            ours += [f"--{ALIASES.get(name, name)}" if flag.startswith("--") else flag, *values]
        elif value != MEANINGLESS[name]:
            network = name in ("mask_ratio", "decode_layer")
            reason = "the network masks no tokens" if network else "processes come from torchrun or Slurm"
            raise ValueError(f"--{name} {value} has no meaning here ({reason}): leave it out")
    return ours
