"""Between images and what the network sees: a VAE's latents, or the pixels themselves. Only this file knows the VAE.

Letters: B batch, c latent channels, h = w latent side, C image channels, H = W image side.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffit.config import PIXELS, STABILITY_VAE, CodecConfig
from diffit.system.files import first_line, quiet_hub
from diffit.system.ranks import detect_world

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BUNDLED_VAES = {"Diffit-Fashion-VAE": Path(__file__).parent / "bundled" / "diffit_fashion_vae"}
_STABILITY_CONFIG = {
    "latent_channels": 4,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "sample_size": 256,
}
_PIXELS_AT_ONCE = 1 << 20  # 16 images of 256 x 256, 4 of 512 x 512


class VAECodec:
    """Images <-> latents of zero mean and unit deviation, as the VAE's own config defines them.

    latents = (z - latents_mean) / latents_std * scaling_factor, the convention of diffusers, where shift_factor is a
    mean of all channels; Stable Diffusion's VAEs have no mean and deviation and the factor 0.18215.

    Args:
        config: which VAE.
        device: where it runs.
        compiled: compile its decoder.
        vae: the AutoencoderKL itself, if it is loaded already.

    Raises:
        ValueError: if the VAE cannot be found or loaded.
    """

    def __init__(
        self, config: CodecConfig, device: torch.device, compiled: bool = False, vae: AutoencoderKL | None = None
    ) -> None:
        self.reference, self.factor, self.device = config.vae, config.factor, device
        self.vae = (vae or _load_vae(config.vae)).eval().requires_grad_(False).to(device)
        self.vae.decoder.to(memory_format=torch.channels_last)  # which convolutions prefer
        if compiled:
            self.vae.decoder.compile(dynamic=False)
        self.latent_channels: int = self.vae.config.latent_channels
        self.image_channels: int = self.vae.config.out_channels
        known = self.vae.config  # of which not every kind of VAE has every entry
        self.downsampling: int = 2 ** (len(known["block_out_channels"]) - 1)  # image side over latent side
        mean = known.get("latents_mean") or [known.get("shift_factor") or 0.0] * self.latent_channels
        std = known.get("latents_std") or [1.0] * self.latent_channels
        self.scaling_factor = scale = float(self.vae.config.scaling_factor)
        # Mean and scale of latents [1, c, 1, 1], on the CPU for data sets' workers and on the device.
        self.normalisation = torch.tensor(mean).view(1, -1, 1, 1), (scale / torch.tensor(std)).view(1, -1, 1, 1)
        self._mean, self._scale = (value.to(device) for value in self.normalisation)

    def encode_moments(self, images: Tensor) -> Tensor:
        """images: uint8 [B, H, W, C]. Returns mean and log variance of the VAE's posterior, float32 [B, 2c, h, w]."""
        x = images.to(self._mean.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, C, H, W]
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.parameters

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, normalised. moments: [B, 2c, h, w]; noise: [B, c, h, w]. Returns [B, c, h, w]."""
        return draw_latents(moments, noise, self._mean, self._scale)

    def weights_hash(self) -> str:
        """The SHA-256 of names and values of the VAE's weights: the same VAE, whatever it was called by."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, c, h, w]. Returns uint8 images [B, H, W, C].

        As many images at a time as `_PIXELS_AT_ONCE` allows: the memory does not grow with B.
        """
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        parts = latents.split(max(1, _PIXELS_AT_ONCE // pixels))
        parts = [(z / self._scale + self._mean).to(self.vae.dtype) for z in parts]
        return torch.cat([to_uint8(self.vae.decode(z).sample, rounded=False) for z in parts])


def draw_latents(moments: Tensor, noise: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """A draw from the VAE's posterior, normalised.

    moments: its mean and log variance [B, 2c, h, w]; noise: standard normal [B, c, h, w]; mean and scale of latents
    [1, c, 1, 1]. Returns [B, c, h, w].
    """
    posterior_mean, log_variance = moments.chunk(2, dim=1)
    z = posterior_mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
    return (z - mean) * scale


class PixelCodec:
    """Images <-> pixels in [-1, 1], for as many channels as the images have: c = C, h = H.

    Args:
        device: where images are sampled.
    """

    latent_channels = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def encode(self, images: Tensor) -> Tensor:
        """images: uint8 [B, H, W, C]. Returns float32 [B, C, H, W] in [-1, 1]."""
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, pixels: Tensor) -> Tensor:
        """pixels: [B, C, H, W]. Returns uint8 images [B, H, W, C]."""
        return to_uint8(pixels, rounded=True)


Codec = VAECodec | PixelCodec


def create_codec(
    config: CodecConfig, device: torch.device, compiled: bool = False, vae: AutoencoderKL | None = None
) -> Codec:
    """The codec that a config names; compiled if there is anything to compile; around `vae` if that is loaded already.

    Raises:
        ValueError: if the VAE cannot be found or loaded, or pixels are to be scaled.
    """
    if config.vae != PIXELS:
        return VAECodec(config, device, compiled, vae)
    if config.factor != 1:
        raise ValueError(f"the codec 'pixels' keeps the size of images: --codec.factor must be 1, not {config.factor}")
    return PixelCodec(device)


def to_uint8(x: Tensor, rounded: bool) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C].

    Pixels are rounded, up from a half, as in EDM. What a VAE decodes is truncated, as in the release, with which the
    published scores were made: images are half a grey level darker, a quirk that is kept.

    Raises:
        ValueError: if a value is not finite.
    """
    if not x.isfinite().all():
        raise ValueError("an image is not finite: use a smaller guidance scale, more bits, or intact weights")
    values = x * 127.5 + 128 if rounded else (x + 1) * 127.5
    return values.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def vae_config(reference: str) -> dict[str, Any]:
    """The config of a VAE that is on this machine; for one of the Hub, that of Stability's."""
    file = BUNDLED_VAES.get(reference, Path(reference)) / "config.json"
    try:
        return _STABILITY_CONFIG | json.loads(file.read_text())
    except OSError:
        return _STABILITY_CONFIG
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({first_line(error)}): copy the VAE again") from error


def vae_is_at_hand(repo_id: str) -> bool:
    """Whether a VAE of the Hub is in its cache, or the Hub answers within seconds.

    Of several ranks none asks the Hub, as they must all come to the same answer.
    """
    from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo_id, "config.json"), str):
        return True
    if constants.HF_HUB_OFFLINE or detect_world().size > 1:
        return False
    try:
        return bool(get_session().head(hf_hub_url(repo_id, "config.json"), timeout=3).status_code < 400)
    except Exception:  # the client's own, or those of requests or httpx, by its version
        return False


def _load_vae(reference: str):  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL  # takes seconds, which pixels do not pay

    path = BUNDLED_VAES.get(reference, Path(reference))
    local = path.is_dir()
    if not local and reference.count("/") != 1:
        raise ValueError(
            f"there is no VAE '{reference}': give the folder of a diffusers AutoencoderKL, a Hub id such as "
            f"{STABILITY_VAE.format('ema')}, or one of {', '.join(BUNDLED_VAES)}"
        )
    try:
        # The small memory saving of low_cpu_mem_usage needs one more package.
        with quiet_hub(None if local else reference):
            return AutoencoderKL.from_pretrained(str(path) if local else reference, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        hint = (
            "check that the folder holds config.json and intact weights of a diffusers AutoencoderKL"
            if local
            else "check the network, or give --vae the folder of a copy"
        )
        raise ValueError(f"cannot load the VAE '{reference}' ({first_line(error)[:160]}): {hint}") from error
