"""Domain adaptation of 3D pose estimation by 2D masked reconstruction: the method, in the paper's order.

Park et al., "Leveraging 2D Masked Reconstruction for Domain Adaptation of 3D Pose Estimation".

Stage 1 (Sec. 3.1) trains encoder f^E and decoder f^D as a masked autoencoder on the images of both domains;
the loss looks mostly at the foreground. Stage 2 (Sec. 3.2) trains f^E and a keypoint head f^H on the source's
labels, while the class token's attention on target images is held to that of the frozen pre-trained f^A.

    Eq. (1)  one transformer block                     Block
    Eq. (2)  weights of the patches                    foreground_weights
    Eq. (3)  weighted masked reconstruction            weighted_mae_loss
    Eq. (4)  3D heatmaps                               KeypointHead
    Eq. (5)  heatmap regression                        keypoint_loss, keypoint_loss_expanded
    Eq. (6)  attention regularisation                  attention_loss, class_attention
    Eq. (7)  the sum of both                           hpe_loss
    DDC, DAN, DANN (Table 1), for comparison           ddc_loss, dan_loss, dann_loss

Letters in the shape comments:
    B images in a batch     b those of them that a process holds at once
    N patches of an image   V visible patches, (1 - r) N
    T tokens of a sequence  D width of a token            M attention heads, d = D / M
    L blocks                K keypoints                   S side of the heatmap volume, in voxels
    H, W image side in px   P side of a patch in px       C channels
    r share of patches masked   D' width of a token in f^D   H^, H predicted and true heatmaps, Eq. (5)
The paper's S and M, masks and mask tokens, are spelt out. C is that of the layer at hand.
Pixels and voxels have their centres at integers. The camera frame: x right, y down, z forward, millimetres.
Where the paper is silent the comment says `not in the paper:` and why.
"""
import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

# not in the paper: the input statistics of MAE, DeiT and ViTPose, so that their weights fit (Google's own
# ViTs expect 0.5 and 0.5).
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LN_EPS = 1e-6  # not in the paper: MAE's value


class InputError(Exception):
    """Something the user can mend: a file, a setting, a value. The scripts print it as one line and stop."""


def first_line(error: Exception) -> str:
    """An error's text cut to one line, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


# ==========================================================================================================
# Sec. 3.1  The transformer block and the encoder f^E (Tables 5, 7, 8). f^A is a frozen copy of it.
# ==========================================================================================================
def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut (B, C, H, W) into N = (H/P)(W/P) patches (B, N, P*P*C), row by row; inside a patch likewise."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)         # (B, C, H/P, P, W/P, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)   # (B, N, P*P*C)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch (B, N, P*P*C) with mean 0 and deviation 1: an option of MAE's, not in the paper."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The way back: (B, N, P*P*C) with N = grid[0] * grid[1] to (B, C, H, W)."""
    B, (rows, columns) = len(patches), grid
    x = patches.reshape(B, rows, columns, patch, patch, -1)                           # (B, H/P, W/P, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, columns * patch)     # (B, C, H, W)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens x (B, N, D) at index (B, V): (B, V, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))       # (B, V, D)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embedding (1, 1 + N, D): sines and cosines of column and row; zero for the class token.

    not in the paper: Tables 5 and 7 omit it, but without it no block knows where a patch is. As in MAE.
    """
    if width % 4: raise InputError(f"width {width} is not divisible by 4, as 2D sine-cosine positions need")
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]                   # 2 x (N, D/4)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)     # (N, D)
    return torch.cat([torch.zeros(1, width), table.float()])[None]                       # (1, 1 + N, D)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as it is written: output (B, M, T, d) and the matrix A (B, M, T, T), whose rows sum to 1.

    The readable twin of F.scaled_dot_product_attention, which never returns A.
    """
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)              # (B, M, T, T)
    A = scores.softmax(dim=-1)                                         # query in the rows, key in the columns
    return A @ v, A


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """a_cls of one block, Sec. 3.2 and Table 8: how much the class token looks at each patch, (B, N).

    q (B, M, >= 1, d) and k (B, M, 1 + N, d) hold the class token first. Only the class row of A is needed, so
    only it is computed, in float32. Mean over heads (Table 8 prints one row a block); attention to itself is
    dropped and the rest is not scaled up again ("excluding the j-th element").
    """
    with torch.autocast(q.device.type, enabled=False):                     # else in bfloat16
        scores = q[:, :, :1].float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])   # (B, M, 1, 1+N)
        return scores.softmax(dim=-1).mean(dim=1)[:, 0, 1:]                              # (B, N)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output (B, M, T, d) of `plain_attention` by the faster of its two forms.

    The fused form never makes A, and wins on CUDA. On a CPU (torch 2.13) it is level in float32, and its
    bfloat16 backward pass 2 to 5 times slower than the written form's: tests/benchmark.py measures it.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu": return plain_attention(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v)


class PatchEmbed(nn.Module):
    """Patches (B, N, P*P*3) to tokens (B, N, D). Linear; public files hold it in a convolution's shape."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, patches: Tensor) -> Tensor:
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)           # (D, P*P*3): row, column, channel
        return F.linear(patches, kernel, self.proj.bias)                   # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention, MHSA in Eq. (1): tokens (B, T, D) to tokens (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads: raise InputError(f"width {width} is not divisible by the number of heads, {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)    # (B, T, 3, M, d)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)                        # 3 x (B, M, T, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and q and k, from which `class_attention` makes the class row where it is wanted."""
        q, k, v = self.split(x)
        y = attend(q, k, v).transpose(1, 2).flatten(2)                     # (B, M, T, d) to (B, T, D)
        return self.proj(y), q, k                                          # (B, T, D)


class FeedForward(nn.Module):
    """FFN in Eq. (1): two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Eq. (1), Sec. 3.1:  F' = F_i + MHSA(LN(F_i));  F_{i+1} = F' + FFN(LN(F')), on tokens (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=LN_EPS), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=LN_EPS), FeedForward(width)

    def forward(self, x: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, D) to tokens (B, T, D) and, if `attention`, a_cls (B, N)."""
        y, q, k = self.attn(self.norm1(x))
        x = x + y                                                          # Eq. (1), first line
        x = x + self.mlp(self.norm2(x))                                    # Eq. (1), second line
        return x, class_attention(q, k) if attention else None

    def only_class_attention(self, x: Tensor) -> Tensor:
        """a_cls (B, N) without the rest of the block: all that the last block of f^A is asked for."""
        q, k, _ = self.attn.split(self.norm1(x))
        return class_attention(q, k)


def initialise_transformer(module: nn.Module) -> None:
    """not in the paper: MAE's. Linear layers (bias 0) and the flattened patch kernel Xavier-uniform."""
    for part in module.modules():
        if isinstance(part, nn.Linear): nn.init.xavier_uniform_(part.weight); nn.init.zeros_(part.bias)
        if isinstance(part, PatchEmbed): nn.init.xavier_uniform_(part.proj.weight.flatten(1))


class Encoder(nn.Module):
    """f^E, and frozen f^A: a ViT of `depth` blocks on an image (H, W), with class token and final LayerNorm.

    Parameter names are those of MAE and timm, so that public weights load (`load_public_weights`).
    Raises InputError where the image is not divisible by the patch, or forward sees an image of another size.
    """

    def __init__(self, image: tuple[int, int], patch: int, width: int, depth: int, heads: int):
        super().__init__()
        if image[0] % patch or image[1] % patch:
            raise InputError(f"image {image[0]} x {image[1]} px is not divisible by the patch, {patch} px")
        self.image, self.patch, self.width = tuple(image), patch, width
        self.grid = (image[0] // patch, image[1] // patch)
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(self.grid, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LN_EPS)  # not in the paper: as every pre-norm transformer
        self.checkpointing = False  # True: recompute blocks in the backward pass, for a third of the memory
        initialise_transformer(self)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """F_1 = [x^cls, x_m^p] (B, 1 + V, D), Sec. 3.1. `visible` (B, V): the patches kept; None: all."""
        if tuple(images.shape[-2:]) != self.image:
            raise InputError(f"the encoder takes {self.image} px images and got {tuple(images.shape[-2:])}")
        patches = patchify(images, self.patch)                             # (B, N, P*P*3)
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)      # (B, N, D)
        if visible is not None:  # masked patches are dropped before they cost anything
            patches, positions = take_tokens(patches, visible), take_tokens(positions, visible)  # (B, V, ..)
        tokens = self.patch_embed(patches) + positions                     # (B, V, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([cls, tokens.to(cls.dtype)], dim=1)               # (B, 1 + V, D)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W), normalised, to tokens (B, 1 + V, D): F_MAE with `visible`, F_img without."""
        x = self.embed(images, visible)
        for block in self.blocks: x, _ = self.run(block, x)
        return self.norm(x)

    def run(self, block: Block, x: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """block(x, attention); with `checkpointing`, only x is kept for the backward pass."""
        if not (self.checkpointing and torch.is_grad_enabled()): return block(x, attention)
        return checkpoint(block, x, attention, use_reentrant=False)

    def attention_maps(self, images: Tensor) -> Tensor:
        """a_cls of every block on the unmasked image, Table 8: (B, L, N). Nothing else of the last block."""
        x, maps = self.embed(images), []
        for block in self.blocks[:-1]:
            x, row = self.run(block, x, attention=True)
            maps.append(row)
        maps.append(self.blocks[-1].only_class_attention(x))
        return torch.stack(maps, dim=1)                                    # (B, L, N)


# ==========================================================================================================
# Sec. 3.1  Masking m^b and the decoder f^D (Table 5)
# ==========================================================================================================
def random_masking(noise: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the rN patches with the largest noise (B, N). Returns

    visible (B, V)  indices of the patches kept, V = round((1 - r) N),
    restore (B, N)  place of each patch in the sequence [visible, masked],
    m       (B, N)  m^b: 1 = masked (to be reconstructed), 0 = visible.
    """
    B, N = noise.shape
    V = round(N * (1 - r))
    if not 0 < V < N: raise InputError(f"masking ratio r = {r} leaves {V} of {N} patches visible: change r")
    order = noise.argsort(dim=1)                                    # (B, N) patch indices, visible ones first
    restore = order.argsort(dim=1)                                         # (B, N) the inverse permutation
    return order[:, :V], restore, (restore >= V).float()


class Decoder(nn.Module):
    """f^D, Table 5 L17-L22: projection, mask tokens, image order, one block, pixels; class token dropped."""

    def __init__(self, grid: tuple[int, int], patch: int, encoder_width: int, width: int, depth: int,
                 heads: int):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # one for all m_i of Sec. 3.1, as MAE
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.decoder_pred = nn.Linear(width, patch * patch * 3)
        initialise_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, restore: Tensor) -> Tensor:
        """F_MAE (B, 1 + V, D) and `restore` (B, N) of `random_masking` to pixels x^ (B, N, P*P*3)."""
        x = self.decoder_embed(latent)                                                   # (B, 1 + V, D')
        masked = restore.shape[1] + 1 - x.shape[1]
        hidden = self.mask_token.to(x.dtype).expand(len(x), masked, -1)                  # (B, N - V, D')
        tokens = take_tokens(torch.cat([x[:, 1:], hidden], dim=1), restore)        # (B, N, D') in image order
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed                # (B, 1 + N, D')
        for block in self.decoder_blocks: x, _ = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                            # (B, N, P*P*3)


class MaskedAutoencoder(nn.Module):
    """f^E and f^D of the pre-training stage in one forward pass: what DistributedDataParallel wraps."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor, noise: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and noise (B, N) to predicted patches x^ (B, N, P*P*3) and mask m^b (B, N)."""
        visible, restore, m = random_masking(noise, r)
        latent = self.encoder(images, visible)                             # (B, 1 + V, D)
        if latent.shape[1] != 1 + visible.shape[1]:  # more would pass for patches, and shift them all
            raise InputError(f"the encoder gives {latent.shape[1]} tokens for the class token and "
                             f"{visible.shape[1]} visible patches; it has to drop all others")
        return self.decoder(latent, restore), m


# ==========================================================================================================
# Sec. 3.1  Foreground-centric reconstruction, Eq. (2) and Eq. (3), and backgrounds from X_C
# ==========================================================================================================
def foreground_share(masks: Tensor, patch: int) -> Tensor:
    """w* of Eq. (2), (B, N): a patch's mean of masks s (B, 1, H, W), 0 = background .. 1 = foreground."""
    return F.avg_pool2d(masks.float(), kernel_size=patch, stride=patch).flatten(1)       # (B, N)


def foreground_weights(masks: Tensor, patch: int, alpha: float) -> Tensor:
    """Eq. (2), Sec. 3.1:  w_i = N ŵ_i / sum_k ŵ_k,  ŵ_i = exp(alpha (w*_i - 0.5)).

    masks s (B, 1, H, W), 0 = background .. 1 = foreground; w*_i is the mean of s in patch i. Returns W
    (B, N), mean 1; an empty mask gives ones. (The -0.5 cancels in the division; the equation has it.)
    """
    w_star = foreground_share(masks, patch)                                              # (B, N)
    w_hat = torch.exp(alpha * (w_star - 0.5))                                            # Eq. (2), right
    return w_hat.shape[1] * w_hat / w_hat.sum(dim=1, keepdim=True)                       # Eq. (2), left


def weighted_mae_loss(predicted: Tensor, patches: Tensor, weights: Tensor, m: Tensor) -> Tensor:
    """Eq. (3), Sec. 3.1:  L_WMAE = 1/N sum_i w_i m_i ||x^_i - x_i||²_2, mean over the batch, in float32.

    predicted x^, patches x (B, N, P*P*3); weights w (B, N) of Eq. (2), or ones; m (B, N): 1 = masked.
    As printed: the norm is a sum over a patch's pixels, and 1/N counts all patches, not the masked ones.
    """
    error = (predicted.float() - patches.float()).square().sum(dim=-1)                   # (B, N)
    return (weights * m * error).mean(dim=1).mean(dim=0)                                 # Eq. (3)


def replace_background(images: Tensor, masks: Tensor, unconstrained: Tensor) -> Tensor:
    """Sec. 3.1, data augmentation: keep the foreground of x and take the background from x_c.

    images, unconstrained (B, 3, H, W); masks (B, 1, H, W) in 0..1. not in the paper: the soft mask is cut at
    0.5; with under 1 % or over 90 % foreground f^S may have failed, and the image stays as it is.
    """
    hard = masks >= 0.5                                                    # (B, 1, H, W) True = foreground
    share = hard.float().mean(dim=(1, 2, 3))[:, None, None, None]          # (B, 1, 1, 1)
    return torch.where(hard | (share < 0.01) | (share > 0.90), images, unconstrained)


# ==========================================================================================================
# Sec. 3.1  The segmentation network f^S (Table 6)
# ==========================================================================================================
class UNet(nn.Module):
    """f^S: images (B, 3, H, W), normalised, to foreground logits (B, 1, H, W); sigmoid of them is the mask s.

    Table 6, mended where it contradicts itself: L5 is 64 x 64 (L6 is); the skips come from L13, L10, L7, L4,
    whose sizes fit, not from L16, L13, L10, L5. Upsampling goes to the skip's own size, so odd sizes work.
    BatchNorm stands in L2 alone, as printed. Raises InputError for images under 32 px.
    """

    def __init__(self, channels: int = 64):
        super().__init__()
        c = channels
        self.stem = nn.Sequential(nn.Conv2d(3, c, 7, stride=2, padding=3), nn.BatchNorm2d(c), nn.ReLU())  # L1
        self.down = nn.ModuleList(self.double(c, c) for _ in range(5))     # L3-4, L6-7, L9-10, L12-13, L15-16
        self.up = nn.ModuleList(self.double(2 * c, c) for _ in range(4))      # L19-20, L23-24, L27-28, L31-32
        self.last = self.double(c, c)                                           # L34-35, no skip at full size
        self.head = nn.Conv2d(c, 1, 1)                                       # L36, its sigmoid is in the loss

    @staticmethod
    def double(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(),
                             nn.Conv2d(c_out, c_out, 3, padding=1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 32:
            raise InputError(f"f^S needs images of 32 px or more, got {tuple(images.shape[-2:])}")
        x, skips = self.stem(images), []                                   # (B, C, H/2, W/2)
        for i, double in enumerate(self.down):
            x = double(x if i == 0 else F.max_pool2d(x, 2))                # (B, C, H/2^(i+1), W/2^(i+1))
            skips.append(x)
        for double, skip in zip(self.up, reversed(skips[:-1])):
            x = F.interpolate(x, size=skip.shape[-2:])                     # (B, C, the size of the skip)
            x = double(torch.cat([skip, x], dim=1))                        # (B, 2 C, ..) to (B, C, ..)
        return self.head(self.last(F.interpolate(x, size=images.shape[-2:])))  # (B, 1, H, W)


# ==========================================================================================================
# Sec. 3.2  The keypoint head f^H, Eq. (4) and Table 7
# ==========================================================================================================
class KeypointHead(nn.Module):
    """Eq. (4), Sec. 3.2:  H^ = Conv(Deconv(Deconv(F_img))), tokens (B, 1 + N, D) to heatmaps (B, K, S, S, S).

    Table 7: the class token is excluded, the rest is an image again; deconvolution 4 x 4 of stride 2, ReLU,
    BatchNorm, in that printed order, twice: S = 4 sqrt(N); 1 x 1 convolution to K S channels, S depths a
    keypoint: index order (K, Z, Y, X). Raises InputError if the grid of patches is not square.
    """

    def __init__(self, grid: tuple[int, int], width: int, channels: int, keypoints: int):
        super().__init__()
        if grid[0] != grid[1]:
            raise InputError(f"the head needs a square image, got {grid[0]} x {grid[1]} patches")
        self.grid, self.keypoints, self.side = grid, keypoints, 4 * grid[0]
        self.deconv1 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.deconv2 = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, keypoints * self.side, 1)
        for layer in (self.deconv1, self.deconv2, self.conv):  # not in the paper: ViTPose's initialisation
            nn.init.normal_(layer.weight, std=0.001); nn.init.zeros_(layer.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """Everything but the last convolution: (B, 1 + N, D) to (B, C, S, S). Eq. (5) can start from here."""
        x = tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid)    # (B, D, sqrt N, sqrt N), Table 7 L16-L17
        x = self.norm1(F.relu(self.deconv1(x)))                            # (B, C, S/2, S/2)        L18
        return self.norm2(F.relu(self.deconv2(x)))                         # (B, C, S, S)            L19

    def heatmaps(self, features: Tensor) -> Tensor:
        """The last convolution: (B, C, S, S) to H^ (B, K, S, S, S), index order K Z Y X."""
        return self.conv(features).unflatten(1, (self.keypoints, self.side))   # L20, L21

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heatmaps(self.features(tokens))                        # Eq. (4), (B, K, S, S, S)


class PoseEstimator(nn.Module):
    """f^E and f^H of the fine-tuning stage in one forward pass: what DistributedDataParallel wraps.

    DANN's discriminator, where there is one, is trained with them.
    """

    def __init__(self, encoder: Encoder, head: KeypointHead, discriminator: nn.Module | None = None):
        super().__init__()
        self.encoder, self.head, self.discriminator = encoder, head, discriminator

    def forward(self, source: Tensor, target: Tensor | None = None, compare: bool = False) -> tuple:
        """Source images (B, 3, H, W) to head features (B, C, S, S); target images to a_cls^E (B, L, N) or,
        with `compare`, those of both to phi_s and phi_t (B, D). Returns all four; None is not asked for."""
        tokens = self.encoder(source)                                      # (B, 1 + N, D)
        features, a_E, phi_s, phi_t = self.head.features(tokens), None, None, None
        if compare: phi_s, phi_t = mean_patch_token(tokens), mean_patch_token(self.encoder(target))
        elif target is not None: a_E = self.encoder.attention_maps(target)
        return features, a_E, phi_s, phi_t

    def centres(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to keypoints (B, K, 3), x y z in voxels of a volume of `head.side`, float32."""
        return decode_heatmaps(self.head(self.encoder(images)))            # (B, K, S, S, S) to (B, K, 3)


# ==========================================================================================================
# Sec. 3.2  Ground-truth heatmaps and the losses, Eq. (5) to Eq. (7)
# ==========================================================================================================
def gaussian_1d(centres: Tensor, side: int, sigma: float) -> Tensor:
    """exp(-(i - c)² / 2 sigma²), voxels i = 0..S-1, centres c (B, K): (B, K, S), peak 1, not rounded."""
    voxels = torch.arange(side, device=centres.device, dtype=torch.float32)
    return torch.exp(-(voxels - centres.float()[..., None]).square() / (2 * sigma ** 2))


def target_heatmaps(centres: Tensor, side: int, sigma: float) -> Tensor:
    """H of Sec. 3.2: a Gaussian of peak 1 around each centre (B, K, 3), x y z in voxels: (B, K, S, S, S)."""
    x, y, z = (gaussian_1d(centres[..., axis], side, sigma) for axis in range(3))        # 3 x (B, K, S)
    return torch.einsum("bkz,bky,bkx->bkzyx", z, y, x)                               # a Gaussian is separable


def keypoint_loss(predicted: Tensor, centres: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """Eq. (5), Sec. 3.2:  L_kpt = ||H^ - H||²_2, sum over keypoints and voxels, mean over the batch.

    predicted H^ (B, K, S, S, S); centres (B, K, 3), x y z in voxels; valid (B, K): 1 = counts, 0 = joint not
    labelled or outside the volume. The norm is a sum, as printed: the mean over voxels would be negligible
    beside 100 L_attn.
    """
    H = target_heatmaps(centres, predicted.shape[-1], sigma)
    error = (predicted.float() - H).square().sum(dim=(2, 3, 4))                          # (B, K)
    return (valid * error).sum(dim=1).mean(dim=0)                                        # Eq. (5)


def keypoint_loss_expanded(features: Tensor, conv: nn.Conv2d, centres: Tensor, valid: Tensor,
                           sigma: float) -> Tensor:
    """Eq. (5) without a heatmap: the value of keypoint_loss(conv(features), ..) without its memory.

    H^ = W F is linear in the head's features F (B, C, S, S), where W are the weights of its last convolution,
    and the Gaussian H = z y x is a product, so
        ||H^ - H||² = ||W F||² - 2 <W F, H> + ||H||²,   ||W F||² = trace(W (F F^T) W^T),
        <W F, H> = sum_c (z^T W)_c (F (y x))_c,         ||H||² = |z|² |y|² |x|²,
    and nothing of size K S³ is ever made. In float32, exact to 1e-5 of ||H||².
    """
    (B, C, S, _), K = features.shape, centres.shape[1]
    with torch.autocast(features.device.type, enabled=False):
        ones = features.new_ones(B, 1, S * S, dtype=torch.float32)              # the bias is one more channel
        Fm = torch.cat([features.float().flatten(2), ones], dim=1)                       # (B, C+1, S*S)
        W = torch.cat([conv.weight.float().flatten(1), conv.bias.float()[:, None]], dim=1)   # (K*S, C+1)
        W = W.reshape(K, S, C + 1)                                                           # (K, S, C+1)
        x, y, z = (gaussian_1d(centres[..., axis], S, sigma) for axis in range(3))       # 3 x (B, K, S)
        gram = Fm @ Fm.transpose(1, 2)                                                 # (B, C+1, C+1) = F F^T
        power = W.transpose(1, 2) @ W                                                  # (K, C+1, C+1) = W^T W
        norm_predicted = gram.flatten(1) @ power.flatten(1).T                      # (B, K) trace(W F F^T W^T)
        plane = (y[..., :, None] * x[..., None, :]).flatten(2)                           # (B, K, S*S)
        under_blob = plane @ Fm.transpose(1, 2)                                        # (B, K, C+1) = F (y x)
        at_depth = torch.einsum("bkz,kzc->bkc", z, W)                                    # (B, K, C+1) = z^T W
        inner = (under_blob * at_depth).sum(-1)                                          # (B, K)
        norm_target = z.square().sum(-1) * y.square().sum(-1) * x.square().sum(-1)       # (B, K)
        return (valid * (norm_predicted - 2 * inner + norm_target)).sum(1).mean(0)       # Eq. (5)


def attention_loss(a_E: Tensor, a_A: Tensor) -> Tensor:
    """Eq. (6), Sec. 3.2:  L_attn = ||a_cls^E - a_cls^A||_1, sum over blocks and patches, mean over the batch.

    a_E, a_A (B, L, N): attention maps of f^E and of the frozen f^A on the same target images.
    """
    return (a_E.float() - a_A.float()).abs().sum(dim=(1, 2)).mean(dim=0)                 # Eq. (6)


def hpe_loss(L_kpt: Tensor, L_attn: Tensor, lambda_attn: float) -> Tensor:
    """Eq. (7), Sec. 3.2:  L_HPE = L_kpt + lambda_attn L_attn; lambda_attn: 100 hands, 10 humans."""
    return L_kpt + lambda_attn * L_attn                                                  # Eq. (7)


# ==========================================================================================================
# Comparison methods, Sec. 4.2, Tables 1 and 2, on the mean patch token phi (B, D) of f^E: the paper does not
# say on which feature. No adaptation layer (DDC) or bottleneck between; one layer (DAN: several). Their loss
# takes the place of L_attn in Eq. (7), so that all else is equal.
# ==========================================================================================================
def mean_patch_token(tokens: Tensor) -> Tensor:
    """phi (B, D), float32: the mean of an image's patch tokens (B, 1 + N, D), class token left out."""
    return tokens[:, 1:].float().mean(dim=1)                               # (B, D)


class ScaleGradient(torch.autograd.Function):
    """x forwards, and `factor` times the gradient backwards. With -lambda it is DANN's reversal layer."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]: return ctx.factor * gradient, None


def gather_features(phi: Tensor) -> Tensor:
    """phi (b, D) of every process in one (B, D): unlike DANN, DDC and DAN are not sums over images.

    Every process then has the whole loss; a gradient reaches f^E through its own rows only, `world` times,
    for DistributedDataParallel takes the mean where the sum is due.
    """
    if not distributed(): return phi
    rank, world = place_among_processes()
    rows = [torch.empty_like(phi) for _ in range(world)]
    torch.distributed.all_gather(rows, phi.detach().contiguous())
    rows[rank] = ScaleGradient.apply(phi, float(world))
    return torch.cat(rows)                                                 # (B, D)


def ddc_loss(phi_s: Tensor, phi_t: Tensor) -> Tensor:
    """DDC (Tzeng et al. 2014):  |mean phi_s - mean phi_t|², means over the batches (B, D), sum over D."""
    return (phi_s.mean(dim=0) - phi_t.mean(dim=0)).square().sum()


def dan_loss(phi_s: Tensor, phi_t: Tensor) -> Tensor:
    """DAN (Long et al. 2015), multi-kernel MMD²:  mean k(s, s') + mean k(t, t') - 2 mean k(s, t),

        k(a, b) = sum_u exp(-|a - b|² / (2 alpha_u sigma²)),  alpha_u = 2^-3, 2^-2, .. 2^1,

    sigma² the mean of |a - b|² over all pairs of phi_s and phi_t (B, D) together: so it adapts to the
    features' scale; detached, or f^E could lower the loss through it. The means are over all B² pairs, s with
    itself too: this biased estimate is never negative and 0 for equal batches, uses every pair where the
    linear-time one takes B / 2, and lies above the unbiased one by 2 * 5 / B at most. All kernels have weight
    1, as in most public code; DAN can also learn the weights.
    """
    B, phi = len(phi_s), torch.cat([phi_s, phi_t])                         # (2B, D)
    d2 = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist").square()     # (2B, 2B), exact
    sigma2 = d2.detach().mean().clamp(min=1e-12)
    k = sum(torch.exp(-d2 / (2 * 2.0 ** u * sigma2)) for u in range(-3, 2))              # (2B, 2B)
    return k[:B, :B].mean() + k[B:, B:].mean() - 2 * k[:B, B:].mean()


class DomainDiscriminator(nn.Sequential):
    """DANN's domain classifier of two layers: phi (B, D) to a logit (B, 1), above 0 for the source.

    1024 hidden units, as in public code; no BatchNorm, which would make it depend on the micro-batch.
    """

    def __init__(self, width: int, hidden: int = 1024):
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def dann_loss(phi_s: Tensor, phi_t: Tensor, discriminator: nn.Module, ramp: float) -> Tensor:
    """DANN (Ganin & Lempitsky 2015):  (mean -log d(phi_s) + mean -log(1 - d(phi_t))) / 2,  d in 0..1.

    The discriminator learns to lower it; f^E, behind the reversal layer, to raise it, `ramp` times as hard.
    """
    logit_s, logit_t = (discriminator(ScaleGradient.apply(phi, -ramp)) for phi in (phi_s, phi_t))   # (B, 1)
    return (F.softplus(-logit_s).mean() + F.softplus(logit_t).mean()) / 2    # softplus(-l) = -log sigmoid(l)


def dann_ramp(p: float) -> float:
    """DANN's ramp 2 / (1 + exp(-10 p)) - 1 at progress p in 0..1: small while the discriminator is poor."""
    return 2 / (1 + math.exp(-10 * p)) - 1


# ==========================================================================================================
# Heatmap coding: millimetres -> voxels -> millimetres; the errors of Sec. 4.1
# ==========================================================================================================
def project(keypoints: Tensor, intrinsics: Tensor) -> Tensor:
    """Points (B, K, 3) mm, camera, and intrinsics (B, 3, 3) to pixels (B, K, 2): u = fx x/z + cx, v alike."""
    with torch.autocast(keypoints.device.type, enabled=False):       # pixels need more than 3 digits
        uvw = keypoints @ intrinsics.transpose(1, 2)                       # (B, K, 3)
    return uvw[..., :2] / uvw[..., 2:]                                     # (B, K, 2) px


def back_project(uv: Tensor, z: Tensor, intrinsics: Tensor) -> Tensor:
    """Pixels uv (B, K, 2) at depths z (B, K) mm to points (B, K, 3) mm, camera: the inverse of `project`."""
    homogeneous = torch.cat([uv, torch.ones_like(uv[..., :1])], dim=-1)                  # (B, K, 3) u v 1
    with torch.autocast(uv.device.type, enabled=False):               # pixels need more than 3 digits
        rays = homogeneous @ torch.linalg.inv_ex(intrinsics)[0].transpose(1, 2)          # (B, K, 3) x/z y/z 1
    return rays * z[..., None]                                             # (B, K, 3) mm, camera


def to_voxels(uv: Tensor, depth: Tensor, image: int, depth_range: float, side: int) -> tuple[Tensor, Tensor]:
    """Pixels uv (B, K, 2) of a square crop and depth (B, K) mm from the root, to voxels (B, K, 3), x y z.

    The volume spans the crop, and depth_range mm around the root. Also returns valid (B, K): 1 = inside the
    volume; a joint outside, or without label (NaN), is 0 and lies at the origin. not in the paper: a joint
    outside is left out of Eq. (5): only the tail of its Gaussian is inside, whose peak is not the joint.
    """
    xy = (uv + 0.5) * side / image - 0.5                                # pixel and voxel centres are integers
    z = (depth / depth_range + 0.5) * side - 0.5
    centres = torch.cat([xy, z[..., None]], dim=-1)                        # (B, K, 3)
    valid = ((centres >= -0.5) & (centres <= side - 0.5)).all(dim=-1)      # False where a coordinate is NaN
    return torch.where(valid[..., None], centres, 0.0), valid.float()


def from_voxels(centres: Tensor, image: int, depth_range: float, side: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_voxels`: pixels (B, K, 2) and root-relative depth (B, K) mm."""
    return (centres[..., :2] + 0.5) * image / side - 0.5, ((centres[..., 2] + 0.5) / side - 0.5) * depth_range


def decode_heatmaps(heatmaps: Tensor, refine: bool = True) -> Tensor:
    """Heatmaps (B, K, Z, Y, X) to centres (B, K, 3), x y z in voxels: the largest, refined in its 3³ window.

    not in the paper. The window's sums along two axes are a 1D profile of the third; where that is a Gaussian
    its logarithm is a parabola, whose vertex is the centre: exact for `target_heatmaps`, whatever sigma.
    """
    B, K, S = heatmaps.shape[:3]
    best = heatmaps.flatten(2).max(dim=-1).indices  # (B, K); faster than argmax, tests/benchmark.py measures
    zyx = torch.stack([best // (S * S), best // S % S, best % S], dim=-1)                # (B, K, 3) z y x
    if not refine: return zyx.flip(-1).float()
    zyx = zyx.clamp(1, S - 2)                              # at the border: extrapolate from the window inside
    step = torch.arange(-1, 2, device=heatmaps.device)
    z, y, x = (zyx[..., axis, None] + step for axis in range(3))                         # 3 x (B, K, 3)
    flat = (z[..., :, None, None] * S + y[..., None, :, None]) * S + x[..., None, None, :]   # (B, K, 3, 3, 3)
    window = heatmaps.flatten(2).gather(2, flat.flatten(2)).float().clamp(min=1e-6)      # (B, K, 27)
    window = window.unflatten(2, (3, 3, 3))                                              # (B, K, Z, Y, X)
    profiles = torch.stack([window.sum(dim=(3, 4)), window.sum(dim=(2, 4)), window.sum(dim=(2, 3))], dim=2)
    left, middle, right = profiles.log().unbind(-1)              # (B, K, axis, 3 voxels) to 3 x (B, K, 3)
    curvature = (left - 2 * middle + right).clamp(max=-1e-3)                          # a peak bends downwards
    vertex = ((left - right) / (2 * curvature)).clamp(-1.5, 1.5)                         # (B, K, 3) z y x
    return (zyx + vertex).flip(-1)                                                       # (B, K, 3) x y z


def joint_errors(predicted: Tensor, truth: Tensor, root: int) -> Tensor:
    """Distances (B, K) mm after moving the roots onto each other, Sec. 4.1; their mean is EPE or MPJPE.

    predicted, truth (B, K, 3) mm. A joint that is not labelled (NaN) gives NaN: take nanmean.
    """
    return ((predicted - predicted[:, root:root + 1]) - (truth - truth[:, root:root + 1])).norm(dim=-1)


def procrustes_align(predicted: Tensor, truth: Tensor, rigid: bool = False) -> Tensor:
    """Move predicted (B, K, 3) onto truth by the best rotation, shift and, unless rigid, scale (Sec. 4.1).

    Joints that are NaN in either do not count. A reflection is no rotation: the smallest singular vector is
    turned round where the product would be one. not in the paper, which aligns "rigidly": the scale.
    """
    valid = (truth.isfinite() & predicted.isfinite()).all(-1, keepdim=True)              # (B, K, 1)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    t_mean = torch.where(valid, truth, 0.0).sum(1, keepdim=True) / count                 # (B, 1, 3)
    p_mean = torch.where(valid, predicted, 0.0).sum(1, keepdim=True) / count             # (B, 1, 3)
    t, p = torch.where(valid, truth - t_mean, 0.0), torch.where(valid, predicted - p_mean, 0.0)
    U, s, Vt = torch.linalg.svd(p.transpose(1, 2) @ t)                         # (B, 3, 3), (B, 3), (B, 3, 3)
    sign = torch.ones_like(s)
    sign[:, 2] = torch.linalg.det(U @ Vt).sign()
    R = U @ (sign[..., None] * Vt)                                                      # row vectors: p R = t
    size = p.square().sum(dim=(1, 2)).clamp(min=1e-12)
    scale = torch.ones_like(size) if rigid else (s * sign).sum(1) / size
    return (predicted - p_mean) @ R * scale[:, None, None] + t_mean


# ==========================================================================================================
# Public weights: MAE, timm and ViTPose files into f^E (and f^D)
# ==========================================================================================================
def torch_load(path: str | Path):
    """What a torch file holds: tensors, plain values, an argparse.Namespace; nothing in it is run.

    ValueError for a part whose checksum fails (torch does not look at it) or that is compressed (a few bytes
    could unpack to any number).
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("its parts are compressed; torch.save writes none such")
            if (part := file.testzip()) is not None: raise ValueError(f"{part} is not what was written")
    with torch.serialization.safe_globals([argparse.Namespace]):           # official MAE files hold one
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def usable(path: str | Path):
    """Context in which what was read from `path` is put to use: where it does not fit, InputError."""
    try: yield
    except InputError as error: raise InputError(f"{path}: {error}") from error
    except (AttributeError, ArithmeticError, AssertionError, IndexError, KeyError, MemoryError, RuntimeError,
            TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: not what it should be ({what}); restore or remove it") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by name. Nothing in the file is run (`weights_only`)."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file  # optional: needed for this format only
            return load_file(str(path))
        state = torch_load(path)
    except ImportError as error:
        raise InputError(f"{path}: this format needs safetensors: pip install safetensors") from error
    except FileNotFoundError as error: raise InputError(f"{path}: no such file") from error
    except Exception as error:
        raise InputError(f"{path}: cannot be read safely as weights: {first_line(error)}") from error
    if isinstance(state, dict) and {"optimiser", "settings"} <= state.keys():
        raise InputError(f"{path}: the checkpoint of a run, not a file of weights; give the run's folder")
    for key in ("model", "state_dict", "encoder"):
        if isinstance(state, dict): state = state.get(key, state)
    if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{path}: holds no named tensors")
    tensors = {str(k): t for k, t in state.items() if isinstance(t, Tensor)}
    for key, tensor in tensors.items():
        with usable(path):
            if not torch.isfinite(tensor).all(): raise ValueError(f"{key} has values that are no numbers")
    return tensors


def resample_positions(positions: Tensor, grid: tuple[int, int], file_grid: tuple[int, int]) -> Tensor:
    """Learned patch positions (1, N', D) on file_grid, interpolated (bicubic) to another grid: (1, N, D)."""
    image = positions.float().unflatten(1, file_grid).permute(0, 3, 1, 2)                # (1, D, H', W')
    return F.interpolate(image, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def file_positions(tensors: dict[str, Tensor], encoder: Encoder) -> tuple[Tensor, str]:
    """Positions (1, 1 + N, D) to use, and why: recomputed where the file's are sines, else resampled."""
    learned = tensors["pos_embed"].float()
    if learned.ndim != 3 or learned.shape[2] != encoder.width:
        raise InputError(f"pos_embed is {tuple(learned.shape)} in the file; our width is {encoder.width}")
    count = learned.shape[1] - 1                                           # without the class token's
    rows = round(math.sqrt(count))
    if rows * rows != count: rows = round(math.sqrt(count * 4 / 3))  # 256 x 192, the usual upright human crop
    if rows == 0 or count % rows:
        raise InputError(f"pos_embed: {count} positions are neither a square nor a 4:3 grid of patches")
    file_grid = (rows, count // rows)
    if torch.allclose(learned, sincos_positions(file_grid, encoder.width), atol=1e-4):
        return sincos_positions(encoder.grid, encoder.width), "recomputed: sines and cosines"
    cls, patches = learned[:, :1], learned[:, 1:]
    if "cls_token" not in tensors: cls, patches = torch.zeros_like(cls), patches + cls   # ViTPose adds both
    patches = resample_positions(patches, encoder.grid, file_grid)
    return torch.cat([cls, patches], dim=1), f"learned, resampled from {file_grid} to {encoder.grid} patches"


def load_public_weights(path: str | Path, encoder: Encoder, decoder: Decoder | None = None) -> list[str]:
    """Fill f^E (and f^D) from an MAE, timm or ViTPose file; returns lines: what was used, left, and why.

    Raises InputError, naming the first key and both shapes, where a tensor does not fit or a block lacks one.
    """
    tensors = {re.sub(r"^(module\.)?(backbone\.)?(last_(?=norm\.))?", "", k): t
               for k, t in read_weights(path).items()}
    report = [f"heads: {encoder.blocks[0].attn.heads}, which such a file does not say (a ViT has width / 64)"]
    if "pos_embed" in tensors:
        with usable(path): tensors["pos_embed"], why = file_positions(tensors, encoder)
        report.append(f"pos_embed: {why}")
    if decoder is not None and "decoder_pos_embed" in tensors:
        tensors["decoder_pos_embed"] = decoder.decoder_pos_embed
    wanted = encoder.state_dict() | (decoder.state_dict() if decoder is not None else {})
    for key, own in wanted.items():
        if key not in tensors and (key.startswith("blocks.") or key.startswith("patch_embed.")):
            raise InputError(f"{path}: has no {key} {tuple(own.shape)}; it holds another architecture "
                             f"(its keys begin {', '.join(list(tensors)[:3])})")
        if key in tensors and tensors[key].shape != own.shape:
            theirs, ours = tuple(tensors[key].shape), tuple(own.shape)
            raise InputError(f"{path}: {key} is {theirs} in the file and {ours} here")
    surplus = [k for k in tensors if k not in wanted]
    foreign = [k for k in surplus if k.startswith("blocks.")]
    if foreign: raise InputError(f"{path}: {foreign[0]} {tuple(tensors[foreign[0]].shape)} is nothing here: "
                                 "the file is deeper, or has another kind of block")
    for module in filter(None, (encoder, decoder)):
        own = {k: t for k, t in tensors.items() if k in module.state_dict()}
        with usable(path): module.load_state_dict(own, strict=False)
    report.insert(0, f"used {len(wanted.keys() & tensors.keys())} of {len(tensors)} tensors of {path}")
    missing = [k for k in wanted if k not in tensors]
    if missing: report.append(f"not in the file, left at their initial values: {', '.join(missing[:4])}"
                              + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""))
    kinds = sorted({k.split(".")[0] for k in surplus})
    if surplus: report.append(f"left in the file, no such part here: {', '.join(kinds)}")
    if "cls_token" in missing: report.append("no class token: attention maps, Eq. (6), are meaningless")
    return report


# ==========================================================================================================
# Shared by the three scripts. The method ends here; below: processes, randomness, precision, runs, settings.
# ==========================================================================================================
PATIENCE = datetime.timedelta(minutes=20)  # for a peer that hangs; rendering the benchmark takes rank 0 less


def setup_distributed(device: str = "auto") -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. Started by `python` it is one process; by `torchrun`, many.

    A process that dies is missed at once: gloo's connections to it break, and `StopSignal` reduces over them
    at every step, on a GPU too. A process that waits for a dead one in nccl is ended by torchrun within 30 s.
    One that waits for a process that hangs gives up after PATIENCE (in nccl by its watchdog, which
    TORCH_NCCL_ASYNC_ERROR_HANDLING turns on by default).
    """
    if device not in ("auto", "cpu", "cuda"): raise InputError(f"--device {device}: choose auto, cpu or cuda")
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; choose --device cpu")
    if "RANK" not in os.environ: return 0, 1, torch.device("cuda" if cuda else "cpu")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs here")
    if cuda: torch.cuda.set_device(local)
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    return *place_among_processes(), place


def code_checksum() -> str:
    """CRC-32 of the code that trains: whether a run, and another, were made by the same lines."""
    names = "udapose.py", "data.py", "train_pretrain.py", "train_finetune.py"
    return f"{zlib.crc32(b''.join(Path(__file__).with_name(name).read_bytes() for name in names)):08x}"


def machine(device: torch.device) -> dict:
    """What computes, on another kind of which the bits differ: a GPU by its name, or as x86_64 AVX512.

    The bits of a GPU do not depend on the CPU's threads.
    """
    if device.type == "cuda": return {"machine": torch.cuda.get_device_name(device), "threads": 0}
    return {"machine": f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"}


def compute_with(threads: int, deterministic: bool = False) -> None:
    """CPU threads, 0: torch's choice. deterministic: a GPU gives the same bits each time, more slowly. Else
    atomic additions in the backward pass of attention, and cuDNN's choice of kernels, vary them.

    float32 is float32: rounded to TensorFloat-32, as convolutions are by default and, in some containers, all
    products, pixels and millimetres would have three digits.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if threads: torch.set_num_threads(threads)
    if not deterministic: return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.use_deterministic_algorithms(True)


def distributed() -> bool:
    """Whether this is one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def place_among_processes() -> tuple[int, int]:
    """Rank and number of processes."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed() else (0, 1)


def from_all_ranks(value) -> list:
    """What every process holds, in the order of their ranks, on every process."""
    values = [value] * place_among_processes()[1]
    if distributed(): torch.distributed.all_gather_object(values, value)
    return values


def from_rank_0(value):
    """The value that rank 0 holds, on every process. If it is an InputError, every process raises it."""
    box = [value]
    if distributed(): torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], InputError): raise box[0]
    return box[0]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place."""
    if distributed(): torch.distributed.all_reduce(values); values /= place_among_processes()[1]
    return values


def statistics_of_rank_0(module: nn.Module) -> None:
    """BatchNorm's statistics as rank 0 saves them, on every process: each moved them by its own images."""
    for buffer in module.buffers() if distributed() else (): torch.distributed.broadcast(buffer, 0)


def wait_for_all() -> None:
    """Returns once every process has come here. On the CPU: no GPU waits."""
    if distributed(): torch.distributed.all_reduce(torch.zeros(1))


class Guard:
    """Takes an optimiser's steps up to the first whose loss or gradient is not finite; then nothing changes.

    No GPU is waited for inside a step: the flag stays there, where the fused AdamW reads it and skips this
    update and all later ones, as under a GradScaler; `check`, called where the loop logs or saves, sees it. A
    CPU looks at every step. `sums` for the log and BatchNorm's statistics, changed by then, are put back.
    In float16 a gradient may overflow: the scaler skips that step and halves its scale, but not without end.
    Then save(step), and the images are named: losses(step) gives (term, value, data set, row) of each alone.
    """

    def __init__(self, optimiser, scaler, module: nn.Module, sums: Tensor, save, losses):
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.others = [sums, *(b for norm in norms for b in norm.buffers())]
        self.optimiser, self.scaler, self.save, self.losses = optimiser, scaler, save, losses
        self.weights = [p for group in optimiser.param_groups for p in group["params"]]
        self.first = torch.zeros((), device=sums.device)                   # 1 + the first bad step; 0: none
        self.kept = None                                                   # `others` and the scale, flat

    def start(self) -> None:
        """Before a step: no gradients, and the state kept to which `check` returns."""
        self.optimiser.zero_grad(set_to_none=True)
        scale = self.scaler.scale(torch.ones(1, device=self.first.device))    # float16's; else 1
        now = torch.cat([*(t.flatten() for t in self.others), scale])
        self.kept = now if self.kept is None else torch.where(self.first > 0, self.kept, now)

    def step(self, step: int, losses: Tensor) -> None:
        """The optimiser's step, gradients being ready; losses: of this step, or summed since the last log."""
        grads = [] if self.scaler.is_enabled() else [p.grad for p in self.weights if p.grad is not None]
        seen = losses.detach().sum()
        if grads: seen = seen + torch.nn.utils.get_total_norm(grads)
        sound = seen.isfinite() & (self.scaler.scale(torch.ones_like(seen)) > 1e-3)      # float16's; else 1
        sound = mean_over_processes(sound.float())                         # 1 where it is on all of them
        self.first = torch.where((self.first == 0) & (sound < 1), step + 1.0, self.first)
        if self.first.device.type == "cpu": self.check()
        # tell the optimiser to skip this update: a scaler skips on NaN, the fused AdamW where found_inf is 1
        if self.scaler.is_enabled(): self.weights[0].grad += torch.where(self.first > 0, torch.nan, 0.0)
        elif self.optimiser.defaults["fused"]: self.optimiser.found_inf = (self.first > 0).float()
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def check(self) -> None:
        """InputError, on all processes, where a step was not finite; the state before it is saved."""
        if not self.first: return
        step, sizes = int(self.first) - 1, [t.numel() for t in self.others]
        *others, scale = self.kept.split([*sizes, 1])
        for tensor, kept in zip(self.others, others): tensor.copy_(kept.view_as(tensor))
        if self.scaler.is_enabled(): self.scaler.update(float(scale))      # each skipped step halved it
        self.save(step)
        losses = [(term, str(dataset.folder), int(row), bool(value.isfinite()))
                  for term, value, dataset, row in self.losses(step)]
        raise InputError(f"{blame(losses)} at step {step + 1}; the checkpoint holds the state before it. "
                         "Look at the images; or lower --lr (--seg-lr), or give --precision float32, in "
                         "another --out")


def blame(losses: list[tuple]) -> str:
    """Which term is not finite for which images, from (term, data set, row, finite) of a process's images."""
    rows: dict[tuple, list] = {}
    for term, folder, row, finite in (loss for part in from_all_ranks(losses) for loss in part):
        if not finite: rows.setdefault((term, folder), []).append(row)
    if not rows: return f"the gradient is not finite, though {losses[0][0]} of each image is,"
    return ", ".join(f"{term} is not finite for {len(bad)} images of {folder} (rows "
                     f"{', '.join(map(str, sorted(bad)[:16]))}{', ..' * (len(bad) > 16)})"
                     for (term, folder), bad in rows.items())


def random_generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """Random numbers of (seed, purpose, step) alone: a resumed run draws what the undisturbed run drew.

    SeedSequence mixes the three; a sum would make seed 1 at step 0 repeat seed 0 at step 1.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step]))


def micro_batches(batch: int, micro_batch: int, rank: int, world: int, flag: str = "--batch") -> list[slice]:
    """The slices of the global batch that this process works on, one a micro-batch."""
    if batch % world: raise InputError(f"{flag} {batch} does not divide evenly among {world} processes")
    own = batch // world
    micro = min(micro_batch or own, own)
    if own % micro: raise InputError(f"--micro-batch {micro} does not divide the {own} images of a process")
    return [slice(rank * own + i, rank * own + i + micro) for i in range(0, own, micro)]


def parallel(model: nn.Module, world: int) -> nn.Module:
    """The model, or DistributedDataParallel of it: gradients are averaged while the backward pass runs."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model


def micro_steps(model: nn.Module, parts: list):
    """Each micro-batch of a step in turn; gradients travel between processes with the last only."""
    for i, part in enumerate(parts):
        quiet = i < len(parts) - 1 and hasattr(model, "no_sync")   # DistributedDataParallel's
        with model.no_sync() if quiet else contextlib.nullcontext(): yield part


def choose_precision(wanted: str, device: torch.device, one_pass) -> str:
    """float32, or a 16-bit type for the products where `one_pass(dtype)` is faster with it.

    one_pass is a forward and backward pass of this very model: a matrix product alone misleads, for narrow
    models lose to casts what they gain in products. A GPU older than bfloat16 is offered float16.
    """
    if wanted != "auto": return wanted
    old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    short = "float16" if old else "bfloat16"
    laps: dict[str, list[float]] = {"float32": [], short: []}
    for name in 6 * ("float32", short):  # in turn, so that a busy neighbour slows both
        start = time.perf_counter()
        try: one_pass(getattr(torch, name))
        except torch.OutOfMemoryError: start = -math.inf  # float32 may be too large where the other fits
        if device.type == "cuda": torch.cuda.synchronize()
        laps[name].append(time.perf_counter() - start)
    seconds = {name: min(own[1:]) for name, own in laps.items()}           # the first lap warms up
    return short if seconds[short] < 0.9 * seconds["float32"] else "float32"


def autocast(device: torch.device, dtype: torch.dtype):
    """Context in which products are taken in dtype; nothing changes for float32.

    No cache of rounded weights: all threads of a process share it, and the thread that prepares batches would
    empty it at random whenever it leaves an autocast of its own, which changes how gradients are summed.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def grad_scaler(device: torch.device, dtype: torch.dtype, state: dict) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; for the other types it does nothing."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state.get("scaler"): scaler.load_state_dict(state["scaler"])
    return scaler


def no_compile(device: torch.device) -> str:
    """Why torch.compile does not work here, or "": it needs Triton and a C compiler, which may be missing."""
    try: torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error: return first_line(error)  # whatever it is
    return ""


def wants_compile(wanted: str, device: torch.device, steps: int) -> bool:
    """Whether to use torch.compile: it takes a minute at the start, and gains next to nothing on a CPU.

    auto: where it pays, and works for all processes. InputError where it is wanted and does not work.
    """
    if wanted == "off": return False
    # a compiler that times its kernels may choose others next time; Triton makes nothing for less than 7.0
    pays = device.type == "cuda" and steps >= 2000 and not torch.are_deterministic_algorithms_enabled() \
        and torch.cuda.get_device_capability(device) >= (7, 0)
    why = no_compile(device) if wanted == "on" or pays else "it does not pay"
    if wanted == "on" and why: raise InputError(f"--compile on: torch.compile does not work here ({why})")
    if why and pays: print(f"torch.compile does not work here ({why}); goes on without it", flush=True)
    return not any(from_all_ranks(why))


def cosine_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of a step: linear warm-up to `peak`, then half a cosine to 0 (Sec. 7)."""
    if step < warmup: return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """No weight decay on 1-D parameters (MAE) and tokens (ours): they are offsets and scales, not maps."""
    decay = [p for n, p in module.named_parameters() if p.ndim > 1 and not n.endswith("_token")]
    plain = [p for n, p in module.named_parameters() if p.ndim <= 1 or n.endswith("_token")]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class StopSignal:
    """Ctrl-C and SIGTERM raise a flag, the loop saves at the end of its step. A second one stops at once.

    What comes within 3 seconds is the same one: a terminal and Slurm send it to each process, and torchrun,
    which gets it too, passes it on.
    """

    def __init__(self):
        self.number, self.agreed = 0, 0  # the signal that came here; the one that all processes stop for
        self.since = 0.0                 # when it came
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, self.note)

    def note(self, number, _frame):
        if self.number and time.monotonic() > self.since + 3: raise KeyboardInterrupt
        if not self.number: self.number, self.since = number, time.monotonic()

    def requested(self) -> bool:
        """True on every process as soon as one of them was told to stop. On the CPU: no GPU waits for it."""
        flag = torch.tensor([self.number])
        if distributed(): torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        self.agreed = int(flag)  # one that comes meanwhile stays in `number`, for the next step
        return self.agreed != 0

    @property
    def status(self) -> int:
        """The exit status that tells the shell which signal it was: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.agreed or signal.SIGINT)


class Progress:
    """One line now and then: step, values, images per second, time left. Silent except on rank 0."""

    def __init__(self, name: str, steps: int, images: int, start: int = 0, rank: int = 0, every: float = 10):
        self.name, self.steps, self.images, self.start, self.quiet = name, steps, images, start, rank != 0
        self.begin = self.shown = time.perf_counter()
        self.every = every

    def show(self, done: int, values: dict[str, float] | None = None, final: bool = False) -> None:
        now = time.perf_counter()
        if self.quiet or (now - self.shown < self.every and not final): return
        self.shown = now
        rate = (done - self.start) / (now - self.begin + 1e-9)
        left = (self.steps - done) / rate if rate else 0
        text = "".join(f" | {k} {v:.4g}" for k, v in (values or {}).items())
        clock = f"{int(left // 60)}:{int(left % 60):02d}"
        print(f"{self.name}  {done}/{self.steps}{text} | {rate * self.images:.0f} images/s | {clock} left",
              flush=True)


@contextlib.contextmanager
def writing(path: Path):
    """Context in which a failure to write becomes an InputError that names the file."""
    try: yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        kept = "the previous one is intact" if path.exists() else "nothing was saved"
        raise InputError(f"{path}: could not be written ({first_line(error)}); {kept}") from error


def write_atomically(path: Path, write) -> None:
    """`write(temporary)`, flush to disk, rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".part")
    try:
        with writing(path):
            write(temporary)
            with open(temporary, "rb") as file: os.fsync(file.fileno())
            os.replace(temporary, path)
    except InputError:
        with contextlib.suppress(OSError): temporary.unlink(missing_ok=True)
        raise


def file_checksum(path: str | Path) -> str:
    """CRC of a file, or of the checkpoint of a run folder: recorded with a run that builds on it."""
    path, crc = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20): crc = zlib.crc32(block, crc)
        return f"{crc:08x}"
    except OSError as error: raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def write_json(path: Path, value) -> None:
    """A JSON file, whole or not at all."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project: tensors and plain values only, so nothing in it can run."""
    try: state = torch_load(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; train it first (same --preset, --seed)") from error
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)})") from error
    kinds = {"settings": dict, "step": int, "steps": int, "seconds": (int, float), "stage": str}
    if not isinstance(state, dict) or "settings" not in state \
            or not all(isinstance(state.get(key, kind), kind) for key, kind in kinds.items() if key in state):
        raise InputError(f"{path}: not a checkpoint of this project")
    return state


def load_parts(path: str | Path, state: dict, **parts: nn.Module) -> None:
    """Copy the weights state[name] into each module; InputError names the first key that does not fit."""
    for name, module in parts.items():
        if not isinstance(state.get(name), dict):
            raise InputError(f"{path}: holds no {name}; it is a checkpoint of another kind")
        own = module.state_dict()
        for key in [*own, *(k for k in state[name] if k not in own)]:
            theirs, ours = (tuple(getattr(d[key], "shape", ["no tensor"])) if key in d else "nothing"
                            for d in (state[name], own))
            if theirs != ours:
                raise InputError(f"{path}: {name}.{key} is {theirs} in the file and {ours} here: another "
                                 "architecture; give the settings it was trained with")
            with usable(path):
                if not torch.isfinite(state[name][key]).all():
                    raise ValueError(f"{name}.{key} has values that are no numbers")
        with usable(path): module.load_state_dict(state[name])


class Run:
    """A run folder: config.json, log.jsonl, checkpoint.pt, result.json, a lock that a killed run releases.

    Raises InputError if the folder cannot be made, another process holds it, or it has other settings.
    """
    MAY_DIFFER = {"save_every", "log_every", "out", "compile", "checkpointing"}  # hardly change the result

    def __init__(self, folder: str, settings, facts: dict, rank: int, elastic: bool = False):
        self.folder, self.rank, self.lock, self.begin = Path(folder), rank, None, time.perf_counter()
        try: problem = self.claim(settings, facts, elastic) if rank == 0 else None
        except OSError as error: problem = InputError(f"{folder}: cannot hold a run ({error.strerror})")
        except (TypeError, ValueError, KeyError) as error:
            problem = InputError(f"{folder}/config.json: broken ({first_line(error)}); remove the folder")
        except InputError as error: problem = error
        from_rank_0(problem)
        path = self.folder / "config.json"
        self.config = from_rank_0(json.loads(path.read_text()) if rank == 0 else None)

    def claim(self, settings, facts: dict, elastic: bool) -> None:
        """elastic: another number of processes changes no more than the order of sums, so it may go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try: fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.folder}: another run is at work here; give another --out") from error
        path, new = self.folder / "config.json", dataclasses.asdict(settings)
        facts = {"threads": torch.get_num_threads()} | facts | {"torch": torch.__version__}
        facts["code"] = code_checksum()
        if not path.exists(): return write_json(path, {"settings": new, "facts": facts})
        defaults = {f.name: f.default for f in dataclasses.fields(settings)}   # a setting may be newer
        old = json.loads(path.read_text())
        ours, theirs = json.loads(json.dumps(new | facts)), defaults | old["settings"] | old["facts"]
        for known in ours, theirs:  # each data set's fingerprint under its own name
            known |= {f"{name}'s data": value for name, value in known.pop("data", {}).items()}
        moved = elastic and theirs.get("world") != ours.get("world")
        free = self.MAY_DIFFER | {"machine", "code"} | ({"world", "threads"} if moved else set())
        other = [f"{k}: {theirs.get(k)} there, {ours[k]} now" for k in ours
                 if k not in free and theirs.get(k) != ours[k]]
        if other and {p.name for p in self.folder.iterdir()} <= {"config.json", "lock"}:
            print(f"{self.folder}: holds nothing of its run yet, begins anew with these settings", flush=True)
            return write_json(path, {"settings": new, "facts": facts})
        if other: raise InputError(f"{self.folder}: was made with other settings ({'; '.join(other[:4])}); "
                                   "give those, or another --out")
        if moved: print(f"begun with {theirs.get('world')} processes, goes on with {ours['world']}: the same "
                        "up to the order of sums", flush=True)
        if (before := theirs.get("machine", ours.get("machine"))) != ours.get("machine"):
            print(f"begun on {before}, goes on on {ours['machine']}: not bit for bit the same", flush=True)
        if theirs.get("code", ours["code"]) != ours["code"]:
            print(f"{self.folder}: begun with other code than this; another --out begins anew", flush=True)

    def decide(self, name: str, choose):
        """A choice of the machine, made once by rank 0 and kept: a resume uses the first one."""
        if name not in self.config:
            self.config[name] = from_rank_0(choose())
            if self.rank == 0: write_json(self.folder / "config.json", self.config)
        return self.config[name]

    def decide_dtype(self, name: str, wanted: str, device: torch.device, one_pass) -> torch.dtype:
        return getattr(torch, self.decide(name, lambda: choose_precision(wanted, device, one_pass)))

    def decide_compile(self, wanted: str, device: torch.device, steps: int) -> bool:
        """What --compile says now; what `auto` chose is kept."""
        if wanted != "auto": self.config.pop("compile", None)
        return self.decide("compile", lambda: wants_compile(wanted, device, steps))

    def seconds(self) -> float:
        """Time that this stage has taken, before it was stopped included."""
        return time.perf_counter() - self.begin

    def save(self, name: str, settings, optimiser, parts: dict[str, nn.Module], **values) -> None:
        """A checkpoint: weights, optimiser, settings, seconds and plain values (stage, step, steps, ..)."""
        state = {"settings": dataclasses.asdict(settings), "optimiser": optimiser.state_dict(), **values,
                 "seconds": self.seconds(), **{k: module.state_dict() for k, module in parts.items()}}
        if self.rank == 0: write_atomically(self.folder / name, lambda path: torch.save(state, path))

    def resume(self, name: str, optimiser, parts: dict[str, nn.Module], stage: str = "") -> dict:
        """The saved values, or {"step": 0, "seconds": 0}; weights, optimiser filled; log cut back."""
        path, log = self.folder / name, self.folder / "log.jsonl"
        state = {"step": 0, "seconds": 0.0, "stage": stage}
        if from_rank_0(path.exists()):
            state = read_checkpoint(path)
            load_parts(path, state, **parts)
            with usable(path):
                for group in state["optimiser"]["param_groups"]:  # f^S's is fused on CUDA alone
                    group["fused"] = optimiser.defaults["fused"]
                optimiser.load_state_dict(state["optimiser"])
                state["step"], state["stage"], state["seconds"]
        if self.rank == 0 and log.exists():  # steps after the checkpoint are done again, and logged again
            with usable(log):
                whole = log.read_text().rpartition("\n")[0]  # a kill can cut the last line
                lines = [(json.loads(line), line) for line in whole.splitlines()]
                kept = [t for v, t in lines if v["stage"] != state["stage"] or v["step"] <= state["step"]]
            write_atomically(log, lambda part: part.write_text("".join(t + "\n" for t in kept)))
        self.begin = time.perf_counter() - state["seconds"]
        if self.rank == 0 and 0 < state["step"] < state.get("steps", state["step"]):
            print(f"{path}: goes on after step {state['step']}", flush=True)
        return state

    def log(self, **values) -> None:
        if self.rank != 0: return
        try:
            with open(self.folder / "log.jsonl", "a") as file: file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise InputError(f"{self.folder}/log.jsonl: {first_line(error)}") from error


# these must be above 0, every other number at least 0
POSITIVE = {"image", "patch", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads",
            "seg_channels", "seg_steps", "seg_batch", "batch", "epochs", "head_channels", "sigma",
            "layer_decay", "save_every", "log_every", "validate_every"}
MOST = {"seed": 2 ** 63, "threads": 1025, "jitter": 1, "seg_jitter": 1}                # and these below
WORDS = {"precision": ("auto", "float32", "bfloat16", "float16"), "compile": ("auto", "on", "off")}


def run_group(preset: str, task: str = "hand") -> str:
    """Folder under runs/, and first word of a row in tables: tiny, tiny-human, paper-hand, paper-human."""
    return preset if task == "hand" or preset.endswith(task) else f"{preset}-{task}"


def parse_settings(cls, doc: str, presets: dict[str, dict], variants: dict[str, dict], arguments=None,
                   tasks: dict[str, dict] = {}):
    """Settings of a script: the dataclass's defaults, then task, preset, variant, then the flags given. A
    preset may name its task; then no other goes with it.

    The help of a flag is the comment behind its field, then default and presets. Unknown flags fail.
    """
    notes = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        choices = {"preset": list(presets), "variant": list(variants), "task": list(tasks)}.get(field.name)
        kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        if choices: kind = {"choices": choices}
        if field.type is bool: kind = {"action": argparse.BooleanOptionalAction}
        values = [f"{k} {v[field.name]}" for k, v in (presets | tasks).items() if field.name in v]
        text = f"{notes.get(field.name, '')} [{'; '.join([str(field.default), *values])}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                            help=text.replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    preset, variant = given.get("preset", cls.preset), given.get("variant", cls.variant)
    chosen = {"preset": preset, "variant": variant}
    if tasks: chosen["task"] = given.get("task", presets[preset].get("task", cls.task))
    if (wanted := presets[preset].get("task", chosen.get("task"))) != chosen.get("task"):
        raise InputError(f"--task {chosen['task']}: preset {preset} is for {wanted}")
    task = tasks.get(chosen.get("task"), {})
    settings = cls(**(task | presets[preset] | variants[variant] | given | chosen))
    for name, value in dataclasses.asdict(settings).items():
        flag, words, most = f"--{name.replace('_', '-')} {value}", WORDS.get(name), MOST.get(name, math.inf)
        if words and value not in words: raise InputError(f"{flag}: choose {', '.join(words)}")
        if isinstance(value, str): continue
        least, enough = ("above 0", value > 0) if name in POSITIVE else ("not below 0", value >= 0)
        if not enough: raise InputError(f"{flag}: give a number {least}")
        if value >= most: raise InputError(f"{flag}: give a number below {most:g}")      # none is infinite
    return settings


def peer_is_gone(error: Exception) -> bool:
    """Whether this is what gloo or nccl raise where a process is left alone, or has waited too long."""
    return distributed() and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower())


def run_script(main) -> None:
    """Call main() and turn what the user can mend into one line on stderr, exit status 2.

    A process whose peer is gone says so and ends at once, status 1: what could be waited for will not come.
    One of several leaves by os._exit: while Python shuts down, a thread of the process group can abort it.
    """
    end, text = os._exit if "RANK" in os.environ else sys.exit, ""
    try:
        status = main()
        if status in (130, 143) and os.environ.get("RANK", "0") == "0":
            print("stopped; all is saved, the same command goes on", flush=True)
        if distributed(): torch.distributed.destroy_process_group()
    except InputError as error: status, text = 2, str(error)
    except torch.OutOfMemoryError as error:
        status, text = 2, (f"the GPU's memory is full ({first_line(error)}); give --checkpointing; or "
                           "lower --micro-batch, from the first checkpoint on in another --out")
    except OSError as error:  # as where no room is left for what is printed; nor will there be at exit
        end, status, text = os._exit, 2, f"{error.filename or 'standard output'}: {error.strerror or error}"
    except RuntimeError as error:
        if not peer_is_gone(error): raise
        end, status = os._exit, 1
        text = (f"another process of this run is gone or hangs ({first_line(error)}); the same command goes "
                "on from the last checkpoint")
    except KeyboardInterrupt: status = 130
    if text: print(f"error: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError): sys.stdout.flush()  # os._exit does not
    end(status)
