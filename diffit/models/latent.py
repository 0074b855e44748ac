"""DiffiT for VAE latents: class-conditional ImageNet at 256 and 512 pixels (section 3.2 of the paper).

Letters: B batch, c latent channels, h = w latent side, p patch size, N = (h/p)^2 tokens, C hidden size,
o output channels.
"""

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from diffit.nn.embedding import LabelEmbedder, sincos_position_embedding, time_embedder
from diffit.nn.variants import block_class, zero_gates


class FinalLayer(nn.Module):
    """LayerNorm, SiLU, linear projection of every token to the pixels of its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.act = nn.SiLU()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, C]. Returns [B, N, p*p*o]."""
        return self.linear(self.act(self.norm(x)))


class DiffiT(nn.Module):
    """The latent diffusion vision transformer; constructor and parameter names are those of the released weights.

    Args:
        input_size: side of the latent (32 at 256 pixels, 64 at 512).
        patch_size: side of a patch; the attention window is the whole grid of patches.
        in_channels: latent channels c.
        hidden_size, depth, num_heads, mlp_ratio: of the transformer. 28 blocks are the released 561 M parameters; the
            paper's text says 30.
        class_dropout_prob: probability that a label becomes null in training, for classifier-free guidance.
        num_classes: the label `num_classes` is the null class; 0 makes an unconditional model.
        learn_sigma: also predict the interpolation of the variance, in c further output channels.
        conditioning: how time and class enter the blocks: tmsa, or a variant of `diffit.nn.variants.BLOCKS`.
        time_embedding: features of the timestep: positional, or fourier (random and fixed).

    Raises:
        ValueError: if conditioning or time_embedding is unknown, patch_size does not divide input_size, num_heads not
            hidden_size, or 4 not hidden_size.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        conditioning: str = "tmsa",
        time_embedding: str = "positional",
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide the latent side {input_size}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        grid = input_size // patch_size
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        positions = sincos_position_embedding(hidden_size, grid)[None].to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.t_embedder = time_embedder(time_embedding, hidden_size, t_range=1000)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        block = block_class(conditioning)
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, grid, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier linear layers without bias, normal(0.02) embeddings, and a zero head: the first prediction is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight.detach().flatten(1))  # the patch projection, as the matrix it is
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        zero_gates(self)

    def blocks_in_order(self) -> list[nn.Module]:
        """What training recomputes, and shards, one at a time."""
        return list(self.blocks)

    def unpatchify(self, x: Tensor) -> Tensor:
        """x: [B, N, p*p*o], each token in (row, column, channel) order. Returns [B, o, h, w]."""
        side, p = self.input_size // self.patch_size, self.patch_size
        x = x.view(x.shape[0], side, side, p, p, self.out_channels)  # [B, h/p, w/p, p, p, o]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, side * p, side * p)  # [B, o, h, w]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Predict the noise (and the variance) of noisy latents.

        x: [B, c, h, w]; t: [B] timesteps in 0..T-1 of the original process; y: [B] labels in 0..num_classes;
        drop_label: bool [B], labels to make null (by default drawn at random in training, none in eval mode).
        Returns [B, o, h, w]: first c channels noise, then c of variance interpolation when learn_sigma.
        """
        tokens = self.x_embedder(x) + self.pos_embed  # [B, N, C]
        cond = self.t_embedder(t, dtype=x.dtype) + self.y_embedder(y, drop_label)  # [B, C]
        tokens = tokens[:, None]  # one window, the whole grid: [B, 1, N, C]
        for block in self.blocks:
            tokens = block(tokens, cond)  # [B, 1, N, C]
        return self.unpatchify(self.final_layer(tokens[:, 0]))  # [B, o, h, w]
