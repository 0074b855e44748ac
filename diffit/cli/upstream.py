"""Upstream's command line of sample.py, rewritten to ours by a small table."""

from collections.abc import Sequence

from diffit.cli.parser import take_flag
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
# Upstream's flags whose value is another flag of ours: flag -> value -> (flag, value) or nothing to do.
TRANSLATED: dict[str, dict[str, tuple[str, str] | None]] = {
    "use_ddim": {"True": ("sampling.sampler", "ddim"), "False": None},
    "use_fp16": {"True": ("precision", "fp16"), "False": None},
    "vae_decoder": {choice: ("vae", STABILITY_VAE.format(choice)) for choice in ("ema", "mse")},
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
    position = 0
    while position < len(argv):
        flag, values, position = take_flag(argv, position)
        name = flag[2:]
        if name in TRANSLATED:
            ours += _translate(name, _boolean(" ".join(values) or "True"))
        elif name in MEANINGLESS:
            _refuse_unless_default(name, _boolean(" ".join(values) or "True"))
        else:
            ours += [f"--{ALIASES.get(name, name)}" if flag.startswith("--") else flag, *values]
    return ours


def _boolean(text: str) -> str:
    return text.capitalize() if text.lower() in ("true", "false", "none") else text


def _translate(name: str, value: str) -> list[str]:
    choices = TRANSLATED[name]
    if value not in choices:
        raise ValueError(f"--{name} {value} is unknown: choose one of {', '.join(choices)}")
    target = choices[value]
    return [f"--{target[0]}", target[1]] if target else []


def _refuse_unless_default(name: str, value: str) -> None:
    if value != MEANINGLESS[name]:
        launcher = name in ("world_size", "local_rank", "rank", "dist_url", "dist_on_itp")
        reason = "processes come from torchrun or Slurm" if launcher else "the network masks no tokens"
        raise ValueError(f"--{name} {value} has no meaning here ({reason}): leave it out")
