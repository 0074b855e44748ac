"""DiffiT for pixels: a U-shaped network of DiffiT ResBlocks (section 3.3 of the paper; CIFAR-10, FFHQ-64).

Letters: B batch, c image channels, h = w image side, C channels of a stage, s its side, W windows, N pixels of a
window, E channels of the conditioning token, F sinusoidal features.
What the paper leaves open is decided, with reasons, in docs/faithfulness.md.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffit.nn.attention import WindowAttention
from diffit.nn.block import DiffiTBlock
from diffit.nn.embedding import LabelEmbedder, time_embedder
from diffit.nn.variants import block_class, zero_gates
from diffit.nn.window import from_windows, to_windows

NOISE_FEATURES = 256
# What an image underwent: x-flip, y-flip, scale, rotation (2), anisotropic scale (2), translation (2); see
# diffit/data/augment.py, which makes these labels.
AUGMENT_LABELS = 9


def num_groups(channels: int) -> int:
    """Of a GroupNorm: 32, or groups of 4 channels in narrow networks."""
    return max(1, min(32, channels // 4))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups(channels), channels)


def conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1)


class DiffiTResBlock(nn.Module):
    """A convolution, then a DiffiT block within windows, and a residual around both (Eq. 9-10)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        head_dim: int,
        window_size: int,
        mlp_ratio: float,
        cond_dim: int,
        dropout: float,
        conditioning: str = "tmsa",
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm = group_norm(channels)
        self.act = nn.SiLU()
        self.conv = conv3x3(channels, out_channels)
        num_heads = out_channels // head_dim
        self.block = block_class(conditioning)(out_channels, num_heads, window_size, mlp_ratio, cond_dim, dropout)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: [B, C, s, s]; cond: [B, E]. Returns [B, C', s, s]."""
        x_hat = self.conv(self.act(self.norm(x)))  # Eq. 9: [B, C', s, s]
        windows = self.block(to_windows(x_hat, self.window_size), cond)  # [B, W, N, C']
        return from_windows(windows, *x_hat.shape[-2:]) + self.skip(x)  # Eq. 10: [B, C', s, s]


class PlainBlock(nn.Module):
    """A transformer block that knows nothing of DiffiT: neither convolution nor time in its attention (Table 4).

    The first of a stage adds a projection of the conditioning token to all tokens: there alone it sees the condition.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        head_dim: int,
        window_size: int,
        mlp_ratio: float,
        cond_dim: int,
        dropout: float,
        first: bool,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.merge = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, kernel_size=1)
        self.token = nn.Linear(cond_dim, out_channels) if first else None
        num_heads = out_channels // head_dim
        self.block = DiffiTBlock(
            out_channels, num_heads, window_size, mlp_ratio, dropout=dropout, attention=WindowAttention
        )

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: [B, C, s, s]; cond: [B, E]. Returns [B, C', s, s]."""
        x = self.merge(x)  # [B, C', s, s]
        windows = to_windows(x, self.window_size)  # [B, W, N, C']
        if self.token is not None:
            windows = windows + self.token(cond)[:, None, None]
        return from_windows(self.block(windows, cond), *x.shape[-2:])  # [B, C', s, s]


class Stage(nn.ModuleList):
    """The blocks of one resolution."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: [B, C, s, s]; cond: [B, E]. Returns [B, C', s, s]."""
        for block in self:
            x = block(x, cond)
        return x


class ImageDiffiT(nn.Module):
    """The image-space diffusion vision transformer, the raw network F of EDM; the defaults are those of CIFAR-10.

    Args:
        input_size: side of the image.
        in_channels: channels c of the image.
        channels: of each stage, from the full resolution down; every further stage has half the side.
        blocks: ResBlocks of each stage, in the encoder and again in the decoder (the last stage has no decoder).
        window_size: side of the attention windows, the same at every resolution.
        head_dim: channels per attention head.
        mlp_ratio: of the transformer blocks.
        cond_dim: channels E of the conditioning token.
        dropout: in training, inside every transformer block.
        class_dropout_prob: probability that a label becomes null in training, for classifier-free guidance.
        num_classes: the label `num_classes` is the null class; 0 makes an unconditional model.
        conditioning: how time and class enter the ResBlocks: tmsa, or a variant of `diffit.nn.variants.BLOCKS`.
        time_embedding: features of the noise level: positional, or fourier (random and fixed; for EDM's c_noise).
        encoder, decoder: stages of diffit (ResBlocks), or of plain transformer blocks to compare with (Table 4: both
            plain is its C, a plain decoder its D).

    Raises:
        ValueError: if one of these four is unknown or means nothing, the windows do not divide every resolution, or
            the other sizes do not fit together.
    """

    def __init__(
        self,
        input_size: int = 32,
        in_channels: int = 3,
        channels: tuple[int, ...] = (128, 256, 256),
        blocks: tuple[int, ...] = (2, 2, 2),
        window_size: int = 4,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        cond_dim: int = 512,
        dropout: float = 0.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 0,
        conditioning: str = "tmsa",
        time_embedding: str = "positional",
        encoder: str = "diffit",
        decoder: str = "diffit",
    ) -> None:
        super().__init__()
        check_sizes(input_size, channels, blocks, window_size, head_dim)
        for name, kind in (("encoder", encoder), ("decoder", decoder)):
            if kind not in ("diffit", "plain"):
                raise ValueError(f"unknown {name} '{kind}': choose diffit or plain")
        if encoder == decoder == "plain" and conditioning != "tmsa":
            raise ValueError(f"plain stages have no conditioning '{conditioning}' in their blocks: leave it out")
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes

        def stage(kind: str, width_in: int, width: int, count: int) -> Stage:
            widths = [width_in] + [width] * (count - 1)
            sizes = (head_dim, window_size, mlp_ratio, cond_dim, dropout)
            if kind == "plain":
                return Stage(PlainBlock(wide, width, *sizes, first=i == 0) for i, wide in enumerate(widths))
            return Stage(DiffiTResBlock(wide, width, *sizes, conditioning) for wide in widths)

        stages = list(zip(channels, blocks, strict=True))
        steps = list(pairwise(channels))  # (finer, coarser) widths of neighbouring stages
        self.t_embedder = time_embedder(time_embedding, cond_dim, NOISE_FEATURES)
        self.y_embedder = LabelEmbedder(num_classes, cond_dim, class_dropout_prob)
        self.augment_embedder = nn.Linear(AUGMENT_LABELS, NOISE_FEATURES, bias=False)
        self.tokenizer = conv3x3(in_channels, channels[0])
        self.encoder = nn.ModuleList(stage(encoder, C, C, count) for C, count in stages)
        self.downs = nn.ModuleList(conv3x3(fine, coarse, stride=2) for fine, coarse in steps)
        self.ups = nn.ModuleList(  # a transposed convolution would leave a checkerboard
            nn.Sequential(nn.Upsample(scale_factor=2), conv3x3(coarse, fine)) for fine, coarse in reversed(steps)
        )
        self.decoder = nn.ModuleList(stage(decoder, 2 * C, C, count) for C, count in stages[-2::-1])  # without the last
        self.norm = group_norm(channels[0])
        self.head = conv3x3(channels[0], in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As in the latent model: Xavier without bias, normal(0.02) embeddings, zero head (the first F is 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.detach().flatten(1))  # a convolution as the matrix it is
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (*self.t_embedder.mlp, self.augment_embedder):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        zero_gates(self)

    def blocks_in_order(self) -> list[nn.Module]:
        """What training recomputes, and shards, one at a time."""
        return [block for stage in (*self.encoder, *self.decoder) for block in stage]

    def condition(
        self,
        c_noise: Tensor,
        y: Tensor | None,
        augment_labels: Tensor | None,
        drop_label: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The conditioning token [B, E] of the arguments of `forward`, of whose x the dtype is.

        Missing labels become null and zero ones, so that every parameter has a gradient, as distributed training asks.
        """
        if y is None:
            y = torch.full(c_noise.shape, self.num_classes, device=c_noise.device)  # [B]
        if augment_labels is None:
            augment_labels = c_noise.new_zeros(c_noise.shape[0], AUGMENT_LABELS)  # [B, 9]
        augment_emb = self.augment_embedder(augment_labels.to(dtype))  # [B, F]
        return self.t_embedder(c_noise, augment_emb, dtype) + self.y_embedder(y, drop_label)  # [B, E]

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        y: Tensor | None = None,
        augment_labels: Tensor | None = None,
        drop_label: Tensor | None = None,
    ) -> Tensor:
        """The raw prediction F(c_in x; c_noise) of EDM; `diffit.diffusion.EDMPrecond` makes a denoiser of it.

        x: [B, c, h, w], scaled to unit variance; c_noise: [B], ln(sigma)/4; y: [B] labels in 0..num_classes (null by
        default); augment_labels: [B, 9], what the images underwent (nothing by default, as in sampling);
        drop_label: bool [B], labels to make null (by default drawn at random in training, none in eval mode).
        Any side that the windows divide at every resolution will do. Returns [B, c, h, w].

        Raises:
            ValueError: if the windows do not divide every resolution.
        """
        cond = self.condition(c_noise, y, augment_labels, drop_label, x.dtype)  # [B, E]
        x = self.tokenizer(x)  # [B, C, h, w]
        skips = []
        for stage, down in zip(self.encoder, self.downs, strict=False):  # all but the last stage
            x = stage(x, cond)  # [B, C, s, s]
            skips.append(x)
            x = down(x)  # [B, C', s/2, s/2]
        x = self.encoder[-1](x, cond)  # [B, C, s, s]
        for up, stage in zip(self.ups, self.decoder, strict=True):
            x = torch.cat([up(x), skips.pop()], dim=1)  # [B, 2C', 2s, 2s]
            x = stage(x, cond)  # [B, C', 2s, 2s]
        return self.head(self.norm(x))  # [B, c, h, w]


def check_sizes(
    input_size: int, channels: tuple[int, ...], blocks: tuple[int, ...], window_size: int, head_dim: int
) -> None:
    """Refuse sizes that do not fit together, before anything is built.

    Raises:
        ValueError: see `ImageDiffiT`.
    """
    if not channels or len(channels) != len(blocks):
        raise ValueError(f"channels {channels} and blocks {blocks} must name one number for every stage")
    if min(*channels, *blocks, window_size, head_dim) < 1:
        raise ValueError("channels, blocks, window_size and head_dim must be at least 1")
    for width in channels:
        if width % head_dim or width % num_groups(width):
            raise ValueError(
                f"{width} channels cannot be shared out to heads of {head_dim} and to {num_groups(width)} groups: "
                "choose a multiple of both"
            )
    multiple = window_size * 2 ** (len(channels) - 1)
    if input_size % multiple:
        raise ValueError(
            f"windows of {window_size}x{window_size} do not divide every resolution of a {input_size}x{input_size} "
            f"image in {len(channels)} stages: its side must be a multiple of {multiple}"
        )
