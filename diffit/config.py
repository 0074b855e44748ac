"""Settings that several packages share. No tensor library is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffit.settings import setting

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]

STABILITY_VAE = "stabilityai/sd-vae-ft-{}"
PIXELS = "pixels"


@dataclass(frozen=True)
class CodecConfig:
    """How images become what the network sees.

    Args:
        vae: an AutoencoderKL of diffusers: a bundled name, a folder, or a Hub id; or `pixels`, for a network that sees
            the images themselves.
        factor: image side over latent side; 1 for pixels.
    """

    vae: str = STABILITY_VAE.format("ema")
    factor: int = setting(8, at_least=1, at_most=1024)
