"""The augmentation of EDM. What was done to each image conditions the network, so that samples stay free of it.

Every transform but the flips is part of one affine map, and the image is resampled once:

    source point = S^-1 R^-1 A^-1 T^-1 (output point)      S scale, R rotation, A anisotropic scale, T translation

Resampling goes over a grid of twice the density, as band-limited warping needs: interpolate to it, read it at the
mapped points (bicubic), and filter it down. The two filters are the symmetric biorthogonal pair of Cohen, Daubechies
and Feauveau with 9 and 7 taps: filtering up and down again is the identity, and symmetry keeps it so for mirrored and
turned images, so that shifts by whole pixels and quarter turns are exact. The shorter filter, which lets less through
above the new Nyquist frequency, is the one that filters down.

Letters: B batch, c channels, h and w sides. Points are (x to the right, y down) from the image's centre, in pixels;
angles turn counter-clockwise as seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_STD = 0.2  # of the binary logarithm of both scale factors
TRANSLATION_STD = 1 / 8  # of the image's side

# The right halves of both filters, centre first; they sum to 2 (twice the samples) and to 1.
_UP = (1.205898036472720, 0.533728236885750, -0.156446533057980, -0.033728236885750, 0.053497514821620)
_DOWN = (0.557543526228497, 0.295635881557125, -0.028771763114250, -0.045635881557125)


@dataclass(frozen=True)
class Augmentation:
    """What is done to each of B images: float64 [B] each, all 0 for nothing."""

    x_flip: Tensor  # 0 or 1
    y_flip: Tensor  # 0 or 1
    scale: Tensor  # w: factor 2^(0.2 w)
    rotation: Tensor  # angle
    stretch: Tensor  # w: factor 2^(0.2 w) along the axis, 2^(-0.2 w) across it
    axis: Tensor  # angle of that axis
    x_shift: Tensor  # in eighths of the width
    y_shift: Tensor  # in eighths of the height

    def labels(self) -> Tensor:
        """The network's condition `augment_labels`, float32 [B, 9]."""
        columns = [self.x_flip, self.y_flip, self.scale, self.rotation.cos() - 1, self.rotation.sin()]
        columns += [self.stretch * self.axis.cos(), self.stretch * self.axis.sin(), self.x_shift, self.y_shift]
        return torch.stack(columns, dim=1).float()  # [B, 9]

    def source_map(self, height: int, width: int) -> Tensor:
        """The affine map from output points to source points, flips aside: float64 [B, 2, 3]."""
        shift = torch.stack([self.x_shift * width, self.y_shift * height], dim=1) * TRANSLATION_STD  # [B, 2]
        shrink = 2 ** (-SCALE_STD * self.scale)[:, None, None]
        squeeze = torch.stack([-self.stretch, self.stretch], dim=1).mul(SCALE_STD).exp2().diag_embed()  # [B, 2, 2]
        along = rotation_matrix(self.axis)
        linear = shrink * rotation_matrix(-self.rotation) @ along @ squeeze @ along.mT  # [B, 2, 2]
        return torch.cat([linear, -linear @ shift[:, :, None]], dim=2)  # [B, 2, 3]


def rotation_matrix(angle: Tensor) -> Tensor:
    """angle: [B]. Returns [B, 2, 2], which turns points counter-clockwise as seen (y points down)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)  # [B, 2, 2]


def draw_augmentation(generators: Sequence[np.random.Generator], probability: float) -> Augmentation:
    """Draw what is done to each of B images from its own generator, always 10 uniform and 4 normal numbers.

    Every transform is applied with that probability; the flip in x always is, and either flip is a fair coin then.
    """
    numbers = [np.concatenate([draw.random(10), draw.standard_normal(4)]) for draw in generators]
    uniform, normal = torch.from_numpy(np.stack(numbers, axis=1)).split((10, 4))  # [10, B], [4, B]
    y_flip, scale, rotation, stretch, shift = (uniform[:5] < probability).double()
    x_coin, y_coin, tilted = (uniform[5:8] < 0.5).double()
    turn, axis = math.pi * (2 * uniform[8:] - 1)
    return Augmentation(
        x_flip=x_coin,
        y_flip=y_flip * y_coin,
        scale=scale * normal[0],
        rotation=rotation * turn,
        stretch=stretch * normal[1],
        axis=stretch * tilted * axis,
        x_shift=shift * normal[2],
        y_shift=shift * normal[3],
    )


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """images: float [B, c, h, w]. Returns the transformed ones; borders reflect, untouched images stay bit-equal."""
    for chosen, dim in ((augmentation.x_flip, -1), (augmentation.y_flip, -2)):
        images = torch.where((chosen > 0).view(-1, 1, 1, 1), images.flip(dim), images)
    source = augmentation.source_map(*images.shape[-2:])
    moved = (source != torch.eye(2, 3, dtype=source.dtype)).flatten(1).any(1).nonzero()[:, 0]
    if len(moved):
        images = images.index_copy(0, moved, resample(images[moved], source[moved]))
    return images


def resample(images: Tensor, source: Tensor) -> Tensor:
    """Read images [B, c, h, w] at the source points of every output point. source: affine maps [B, 2, 3]."""
    B, c, h, w = images.shape
    taps = [torch.tensor(half[:0:-1] + half, dtype=torch.float64) for half in (_UP, _DOWN)]
    up, down = (torch.outer(row, row)[None, None].to(images.dtype) for row in taps)  # each [1, 1, k, k]
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect").reshape(B * c, 1, h + 4, w + 4)
    dense = F.conv_transpose2d(padded, up, stride=2, padding=8).view(B, c, 2 * h - 1, 2 * w - 1)
    # Where the points of the dense output grid lie in the source, in half sides, as (x, y). The filter down needs a
    # margin of 3 points.
    maps = source / torch.tensor([[(w - 1) / 2], [(h - 1) / 2]], dtype=source.dtype)  # [B, 2, 3]
    y, x = (torch.arange(-3, 2 * n + 2, dtype=source.dtype) / 2 - (n - 1) / 2 for n in (h, w))
    per_x, per_y, offset = (maps[:, None, None, :, k] for k in range(3))  # each [B, 1, 1, 2]
    grid = (x[:, None] * per_x + y[:, None, None] * per_y + offset).to(images.dtype)  # [B, 2h+5, 2w+5, 2]
    warped = F.grid_sample(dense, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
    return F.conv2d(warped.reshape(B * c, 1, 2 * h + 5, 2 * w + 5), down, stride=2).view(B, c, h, w)
