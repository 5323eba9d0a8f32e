"""Domain adaptation of 3D pose estimation by 2D masked reconstruction: the method, in the paper's order.

Park et al., "Leveraging 2D Masked Reconstruction for Domain Adaptation of 3D Pose Estimation",
arXiv 2501.08408.

Stage 1 (Sec. 3.1) trains an encoder f^E and a decoder f^D as a masked autoencoder on images of both domains.
Its loss gives more weight to foreground patches. Stage 2 (Sec. 3.2) trains f^E and a keypoint head f^H on the
labelled source. Meanwhile a penalty keeps the class token's attention on target images close to that of f^A,
a frozen copy of the pre-trained encoder.

    Eq. (1)  one transformer block                     Block
    Eq. (2)  weights of the patches                    foreground_weights
    Eq. (3)  weighted masked reconstruction            weighted_mae_loss
    Eq. (4)  3D heatmaps                               KeypointHead
    Eq. (5)  heatmap regression                        keypoint_loss, keypoint_loss_expanded
    Eq. (6)  attention regularisation                  attention_loss, class_attention
    Eq. (7)  the weighted sum of both                  hpe_loss

Letters in the shape comments:
    B images in a batch        N patches of an image       V visible patches, (1 - r) N
    T tokens of a sequence     D width of a token          M attention heads, d = D / M
    L blocks                   K keypoints                 S side of the heatmap volume, in voxels
    H, W image side in px      P side of a patch in px     C channels of the layer at hand
    r share of patches masked  D' width of a token in f^D  H^, H predicted and true heatmaps, Eq. (5)
Pixels and voxels have their centres at integers. The camera frame: x right, y down, z forward, millimetres.
`not in the paper:` marks what the paper leaves open, with the reason; in the settings, `(ours)` does.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# not in the paper: ImageNet's statistics, with which MAE, DeiT and ViTPose normalised their input.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LN_EPS = 1e-6  # not in the paper: MAE's value


# ==========================================================================================================
# Sec. 3.1  The transformer block and the encoder f^E (Tables 5, 7, 8). f^A is a frozen copy of it.
# ==========================================================================================================
def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, H, W) into N = (H/P)(W/P) patches (B, N, P*P*C), row by row; channels last."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)  # (B, C, H/P, P, W/P, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)  # (B, N, P*P*C)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify`: patches (B, N, P*P*C) with N = grid[0] * grid[1] to images (B, C, H, W)."""
    B, (rows, columns) = len(patches), grid
    x = patches.reshape(B, rows, columns, patch, patch, -1)  # (B, H/P, W/P, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, columns * patch)  # (B, C, H, W)


def normalise_patches(patches: Tensor) -> Tensor:
    """Give each patch (B, N, P*P*C) mean 0 and standard deviation 1. An option of MAE, not in the paper."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Pick the tokens of x (B, N, D) that index (B, V) names: (B, V, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # (B, V, D)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embedding (1, 1 + N, D): sines and cosines of column and row, zeros for the class token.

    not in the paper: Tables 5 and 7 omit it, but without it no block knows where a patch is. As in MAE.
    """
    if width % 4:
        raise ValueError(f"width {width} is not divisible by 4, as 2D sine-cosine positions need")
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]  # 2 x (N, D/4)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # (N, D)
    return torch.cat([torch.zeros(1, width), table.float()])[None]  # (1, 1 + N, D)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as it is usually written: the output (B, M, T, d) and the matrix A (B, M, T, T).

    A has a row for each query and a column for each key. F.scaled_dot_product_attention computes the same
    output, but never returns A.
    """
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)  # (B, M, T, T)
    A = scores.softmax(dim=-1)
    return A @ v, A


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output (B, M, T, d) of `plain_attention`.

    The fused kernel never stores A. On a CPU in bfloat16 its backward pass is 2 to 5 times slower than that
    of the plain form, which is used there.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return plain_attention(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v)


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """a_cls of one block, Sec. 3.2 and Table 8: how much the class token attends to each patch, (B, N).

    q and k (B, M, 1 + N, d) have the class token first. Only its row of A is computed, in float32. The row is
    averaged over the heads, because Table 8 prints one per block. The class token's attention to itself is
    dropped, and the rest is not normalised again ("excluding the j-th element").
    """
    with torch.autocast(q.device.type, enabled=False):  # autocast would compute it in bfloat16
        scores = q[:, :, :1].float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, M, 1, 1+N)
        return scores.softmax(dim=-1).mean(dim=1)[:, 0, 1:]  # (B, N)


class PatchEmbed(nn.Module):
    """Project patches (B, N, P*P*3) to tokens (B, N, D).

    The weights are a convolution's, so that public files load. They are applied as a linear layer, so that
    masked patches can be dropped first.
    """

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, patches: Tensor) -> Tensor:
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*3): row, column, channel
        return F.linear(patches, kernel, self.proj.bias)  # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention, MHSA in Eq. (1): tokens (B, T, D) to tokens (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by the number of heads, {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, each (B, M, T, d)."""
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)  # (B, T, 3, M, d)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, M, T, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and q and k, from which `class_attention` computes the class token's row."""
        q, k, v = self.split(x)
        y = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, M, T, d) to (B, T, D)
        return self.proj(y), q, k  # (B, T, D)


class FeedForward(nn.Module):
    """FFN in Eq. (1): two linear layers with a GELU between them. The inner width is 4 D."""

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
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, D) to tokens (B, T, D) and, if `attention`, a_cls (B, N)."""
        y, q, k = self.attn(self.norm1(x))
        x = x + y  # Eq. (1), first line
        x = x + self.mlp(self.norm2(x))  # Eq. (1), second line
        return x, class_attention(q, k) if attention else None

    def only_class_attention(self, x: Tensor) -> Tensor:
        """a_cls (B, N) without the rest of the block: all that `attention_maps` needs of the last one."""
        q, k, _ = self.attn.split(self.norm1(x))
        return class_attention(q, k)


def initialise_transformer(module: nn.Module) -> None:
    """Initialise linear layers (bias 0) and the flattened patch kernel Xavier-uniform.

    not in the paper: MAE's initialisation.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        if isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))


class Encoder(nn.Module):
    """f^E, and the frozen f^A: a ViT of `depth` blocks with a class token and a final LayerNorm.

    Parameters have the names of MAE and timm, so that public weights load. Raises ValueError if the image is
    not divisible by the patch, or if `forward` gets images of another size.
    """

    def __init__(self, image: tuple[int, int], patch: int, width: int, depth: int, heads: int):
        super().__init__()
        if image[0] % patch or image[1] % patch:
            raise ValueError(f"image {image[0]} x {image[1]} px is not divisible by the patch, {patch} px")
        self.image, self.patch, self.width = tuple(image), patch, width
        self.grid = (image[0] // patch, image[1] // patch)
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(self.grid, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LN_EPS)  # not in the paper: as in every pre-norm transformer
        self.checkpointing = False  # True: recompute blocks in the backward pass, to save memory
        initialise_transformer(self)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """F_1 = [x^cls, x_m^p] (B, 1 + V, D), Sec. 3.1. `visible` (B, V): the patches to keep; None: all."""
        if tuple(images.shape[-2:]) != self.image:
            raise ValueError(f"the encoder takes {self.image} px images and got {tuple(images.shape[-2:])}")
        patches = patchify(images, self.patch)  # (B, N, P*P*3)
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)  # (B, N, D)
        if visible is not None:  # masked patches are dropped before they cost anything
            patches, positions = take_tokens(patches, visible), take_tokens(positions, visible)  # (B, V, ..)
        tokens = self.patch_embed(patches) + positions  # (B, V, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([cls, tokens.to(cls.dtype)], dim=1)  # (B, 1 + V, D)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Normalised images (B, 3, H, W) to tokens (B, 1 + V, D): F_MAE with `visible`, F_img without."""
        x = self.embed(images, visible)
        for block in self.blocks:
            x, _ = self.apply_block(block, x)
        return self.norm(x)

    def apply_block(self, block: Block, x: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """block(x, attention). With `checkpointing`, only x is kept for the backward pass."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(x, attention)
        return checkpoint(block, x, attention, use_reentrant=False, preserve_rng_state=False)

    def attention_maps(self, images: Tensor) -> Tensor:
        """a_cls of every block on the unmasked images, Table 8: (B, L, N)."""
        x, maps = self.embed(images), []
        for block in self.blocks[:-1]:
            x, row = self.apply_block(block, x, attention=True)
            maps.append(row)
        maps.append(self.blocks[-1].only_class_attention(x))
        return torch.stack(maps, dim=1)  # (B, L, N)


# ==========================================================================================================
# Sec. 3.1  Masking m^b and the decoder f^D (Table 5)
# ==========================================================================================================
def random_masking(noise: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the rN patches with the largest noise (B, N). Returns

    visible (B, V)  indices of the patches kept, V = round((1 - r) N),
    restore (B, N)  the place of each patch in the sequence [visible, masked],
    m       (B, N)  m^b: 1 = masked (to be reconstructed), 0 = visible.
    """
    B, N = noise.shape
    V = round(N * (1 - r))
    if not 0 < V < N:
        raise ValueError(f"masking ratio r = {r} leaves {V} of {N} patches visible: change r")
    order = noise.argsort(dim=1)  # (B, N) patch indices, visible ones first
    restore = order.argsort(dim=1)  # (B, N) the inverse permutation
    return order[:, :V], restore, (restore >= V).float()


class Decoder(nn.Module):
    """f^D, Table 5 L17-L22: project, insert mask tokens, restore the order, one block, predict pixels."""

    def __init__(self, grid: tuple, patch: int, encoder_width: int, width: int, depth: int, heads: int):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # one for all m_i of Sec. 3.1, as in MAE
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.decoder_pred = nn.Linear(width, patch * patch * 3)
        initialise_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, restore: Tensor) -> Tensor:
        """F_MAE (B, 1 + V, D) and `restore` (B, N) of `random_masking` to pixels x^ (B, N, P*P*3)."""
        x = self.decoder_embed(latent)  # (B, 1 + V, D')
        masked = restore.shape[1] + 1 - x.shape[1]
        hidden = self.mask_token.to(x.dtype).expand(len(x), masked, -1)  # (B, N - V, D')
        tokens = take_tokens(torch.cat([x[:, 1:], hidden], dim=1), restore)  # (B, N, D') in image order
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # (B, 1 + N, D')
        for block in self.decoder_blocks:
            x, _ = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # (B, N, P*P*3), class token dropped


class MaskedAutoencoder(nn.Module):
    """f^E and f^D in one forward pass, as DistributedDataParallel needs it."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor, noise: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and noise (B, N) to predicted patches x^ (B, N, P*P*3) and mask m^b (B, N)."""
        visible, restore, m = random_masking(noise, r)
        latent = self.encoder(images, visible)  # (B, 1 + V, D)
        if latent.shape[1] != 1 + visible.shape[1]:  # surplus tokens would be taken for patches
            raise ValueError(f"the encoder returned {latent.shape[1]} tokens for the class token and "
                             f"{visible.shape[1]} visible patches; it must drop all others")
        return self.decoder(latent, restore), m


# ==========================================================================================================
# Sec. 3.1  Foreground-centric reconstruction, Eq. (2) and Eq. (3), and backgrounds from X_C
# ==========================================================================================================
def foreground_share(masks: Tensor, patch: int) -> Tensor:
    """w* of Eq. (2), (B, N): the mean of masks s (B, 1, H, W) in each patch; 1 = foreground."""
    return F.avg_pool2d(masks.float(), kernel_size=patch, stride=patch).flatten(1)  # (B, N)


def foreground_weights(masks: Tensor, patch: int, alpha: float) -> Tensor:
    """Eq. (2), Sec. 3.1:  w_i = N ŵ_i / sum_k ŵ_k,  ŵ_i = exp(alpha (w*_i - 0.5)).

    masks s (B, 1, H, W), 0 = background .. 1 = foreground. Returns weights (B, N) of mean 1; an empty mask
    gives ones. The -0.5 cancels in the division and is kept as printed.
    """
    w_star = foreground_share(masks, patch)  # (B, N)
    w_hat = torch.exp(alpha * (w_star - 0.5))  # Eq. (2), right
    return w_hat.shape[1] * w_hat / w_hat.sum(dim=1, keepdim=True)  # Eq. (2), left


def weighted_mae_loss(predicted: Tensor, patches: Tensor, weights: Tensor, m: Tensor) -> Tensor:
    """Eq. (3), Sec. 3.1:  L_WMAE = 1/N sum_i w_i m_i ||x^_i - x_i||²_2, mean over the batch, in float32.

    predicted x^ and patches x (B, N, P*P*3); weights w (B, N) of Eq. (2), or ones; m (B, N): 1 = masked.
    As printed, the norm is a sum over a patch's pixels, and 1/N counts all patches, not the masked ones.
    """
    error = (predicted.float() - patches.float()).square().sum(dim=-1)  # (B, N)
    return (weights * m * error).mean(dim=1).mean(dim=0)  # Eq. (3)


def replace_background(images: Tensor, masks: Tensor, unconstrained: Tensor) -> Tensor:
    """Keep the foreground of x and take the background from x_c, Sec. 3.1, data augmentation.

    images, unconstrained (B, 3, H, W); masks (B, 1, H, W) in 0..1. not in the paper: the soft mask is cut at
    0.5. An image with under 1 % or over 90 % foreground stays as it is, because f^S probably failed on it.
    """
    hard = masks >= 0.5  # (B, 1, H, W) True = foreground
    share = hard.float().mean(dim=(1, 2, 3))[:, None, None, None]  # (B, 1, 1, 1)
    return torch.where(hard | (share < 0.01) | (share > 0.90), images, unconstrained)


# ==========================================================================================================
# Sec. 3.1  The segmentation network f^S (Table 6)
# ==========================================================================================================
class UNet(nn.Module):
    """f^S: normalised images (B, 3, H, W) to foreground logits (B, 1, H, W). Their sigmoid is the mask s.

        image  H                                                last -> head, H     L34-L36
          |  stem, stride 2                                      ^
        H/2    down0 ------------------- skip ---------------> up3                  L3-L4,   L31-L32
          |  max-pool                                            ^  nearest, x 2
        H/4    down1 ------------------- skip ---------------> up2                  L6-L7,   L27-L28
          |                                                      ^
        H/8    down2 ------------------- skip ---------------> up1                  L9-L10,  L23-L24
          |                                                      ^
        H/16   down3 ------------------- skip ---------------> up0                  L12-L13, L19-L20
          |                                                      ^
        H/32   down4 --------------------------------------------+                  L15-L16

    Every down, up and last is two 3 x 3 convolutions with ReLU. Table 6 contradicts itself in two places, and
    we take the only reading whose sizes fit: L5 is 64 x 64 as L6 is, and the skips come from L13, L10, L7 and
    L4 instead of L16, L13, L10 and L5. Upsampling goes to the skip's own size, so that odd sizes work. As
    printed, only L2 has BatchNorm. Raises ValueError for images under 32 px.
    """

    def __init__(self, channels: int = 64):
        super().__init__()
        c = channels
        first = nn.Conv2d(3, c, 7, stride=2, padding=3)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(c), nn.ReLU())  # L1-L2
        self.down = nn.ModuleList(self.double(c, c) for _ in range(5))
        self.up = nn.ModuleList(self.double(2 * c, c) for _ in range(4))
        self.last = self.double(c, c)
        self.head = nn.Conv2d(c, 1, 1)

    @staticmethod
    def double(c_in: int, c_out: int) -> nn.Sequential:
        """Two 3 x 3 convolutions, each with a ReLU."""
        first, second = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 32:
            raise ValueError(f"f^S needs images of 32 px or more, got {tuple(images.shape[-2:])}")
        x, skips = self.stem(images), []  # (B, C, H/2, W/2)
        for i, double in enumerate(self.down):
            x = double(x if i == 0 else F.max_pool2d(x, 2))  # (B, C, H/2^(i+1), W/2^(i+1))
            skips.append(x)
        for double, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:])  # (B, C, the size of the skip)
            x = double(torch.cat([skip, x], dim=1))  # (B, 2 C, ..) to (B, C, ..)
        return self.head(self.last(F.interpolate(x, size=images.shape[-2:])))  # (B, 1, H, W)


# ==========================================================================================================
# Sec. 3.2  The keypoint head f^H, Eq. (4) and Table 7
# ==========================================================================================================
class KeypointHead(nn.Module):
    """Eq. (4), Sec. 3.2:  H^ = Conv(Deconv(Deconv(F_img))), tokens (B, 1 + N, D) to heatmaps (B, K, S, S, S).

    Table 7: drop the class token and put the rest back into an image. Two stages of a 4 x 4 deconvolution of
    stride 2, ReLU, BatchNorm, in the printed order, give S = 4 sqrt(N). A 1 x 1 convolution gives K S
    channels, which are S depths per keypoint: index order (K, Z, Y, X). Raises ValueError if the grid is not
    square.
    """

    def __init__(self, grid: tuple[int, int], width: int, channels: int, keypoints: int):
        super().__init__()
        if grid[0] != grid[1]:
            raise ValueError(f"the head needs a square image, got {grid[0]} x {grid[1]} patches")
        self.grid, self.keypoints, self.side = grid, keypoints, 4 * grid[0]
        self.deconv1 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.deconv2 = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, keypoints * self.side, 1)
        for layer in (self.deconv1, self.deconv2, self.conv):  # not in the paper: ViTPose's initialisation
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """All but the last convolution: (B, 1 + N, D) to (B, C, S, S), for `keypoint_loss_expanded`."""
        x = tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # (B, D, sqrt N, sqrt N), Table 7 L16-L17
        x = self.norm1(F.relu(self.deconv1(x)))  # (B, C, S/2, S/2), L18
        return self.norm2(F.relu(self.deconv2(x)))  # (B, C, S, S), L19

    def heatmaps(self, features: Tensor) -> Tensor:
        """The last convolution: (B, C, S, S) to H^ (B, K, S, S, S), index order K Z Y X."""
        x = self.conv(features.contiguous())  # (B, K S, S, S), L20; channels last would be copied in decoding
        return x.unflatten(1, (self.keypoints, self.side))  # (B, K, S, S, S), L21

    def forward(self, tokens: Tensor) -> Tensor:
        return self.heatmaps(self.features(tokens))  # Eq. (4), (B, K, S, S, S)


class PoseOutput(NamedTuple):
    """What `PoseEstimator.forward` returns. Parts that were not asked for are None."""

    features: Tensor  # (B, C, S, S), the head's features of the source images
    source_tokens: Tensor  # (B, 1 + N, D)
    a_E: Tensor | None  # (B, L, N), attention maps of f^E on the target images
    target_tokens: Tensor | None  # (B, 1 + N, D)
    target_features: Tensor | None  # (B, C, S, S)


class PoseEstimator(nn.Module):
    """f^E and f^H in one forward pass, as DistributedDataParallel needs it.

    The last convolution of f^H is left to the loss, Eq. (5). `discriminator` belongs to DANN, a method that
    the paper compares with. It is trained jointly with them.
    """

    def __init__(self, encoder: Encoder, head: KeypointHead, discriminator: nn.Module | None = None):
        super().__init__()
        self.encoder, self.head, self.discriminator = encoder, head, discriminator

    def forward(self, source: Tensor, target=None, attention=False, tokens=False, joint=False) -> PoseOutput:
        """Source images (B, 3, H, W) to head features; target images to what is asked for.

        attention: a_E. tokens: target_tokens. joint: target_features; both domains pass f^H in one batch, so
        that BatchNorm trains on the mixture whose statistics evaluation uses.
        """
        source_tokens = self.encoder(source)  # (B, 1 + N, D)
        target_tokens = self.encoder(target) if tokens or joint else None
        a_E = self.encoder.attention_maps(target) if attention else None
        if not joint:
            return PoseOutput(self.head.features(source_tokens), source_tokens, a_E, target_tokens, None)
        features = self.head.features(torch.cat([source_tokens, target_tokens]))  # (2B, C, S, S)
        return PoseOutput(features[: len(source)], source_tokens, a_E, target_tokens, features[len(source) :])

    def centres(self, images: Tensor) -> Tensor:
        """Predict: images (B, 3, H, W) to keypoints (B, K, 3), x y z in voxels of a volume of `head.side`."""
        return decode_heatmaps(self.head(self.encoder(images)))  # (B, K, S, S, S) to (B, K, 3)


# ==========================================================================================================
# Sec. 3.2  Ground-truth heatmaps and the losses, Eq. (5) to Eq. (7)
# ==========================================================================================================
def gaussian_1d(centres: Tensor, side: int, sigma: float) -> Tensor:
    """exp(-(i - c)² / 2 sigma²) at voxels i = 0..S-1 for (fractional) centres c (B, K): (B, K, S)."""
    voxels = torch.arange(side, device=centres.device, dtype=torch.float32)
    return torch.exp(-(voxels - centres.float()[..., None]).square() / (2 * sigma**2))


def true_heatmaps(centres: Tensor, side: int, sigma: float) -> Tensor:
    """H of Sec. 3.2: a Gaussian of peak 1 around each centre (B, K, 3), x y z in voxels: (B, K, S, S, S)."""
    x, y, z = (gaussian_1d(centres[..., axis], side, sigma) for axis in range(3))  # 3 x (B, K, S)
    return torch.einsum("bkz,bky,bkx->bkzyx", z, y, x)  # a Gaussian is separable


def keypoint_loss(predicted: Tensor, centres: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """Eq. (5), Sec. 3.2:  L_kpt = ||H^ - H||²_2, sum over keypoints and voxels, mean over the batch.

    predicted H^ (B, K, S, S, S); centres (B, K, 3), x y z in voxels; valid (B, K): 1 = counts, 0 = joint not
    labelled or outside the volume. The norm is a sum, as printed: a mean over voxels would be negligible next
    to 100 L_attn.
    """
    H = true_heatmaps(centres, predicted.shape[-1], sigma)
    error = (predicted.float() - H).square().sum(dim=(2, 3, 4))  # (B, K)
    return (valid * error).sum(dim=1).mean(dim=0)  # Eq. (5)


def keypoint_loss_expanded(features: Tensor, conv: nn.Conv2d, centres: Tensor, valid: Tensor, sigma: float):
    """Eq. (5) without a heatmap: the value of keypoint_loss(head.heatmaps(features), ..) without its memory.

    H^ = W F + b is linear in the head's features F (B, C, S, S), where W and b are weights and bias of its
    last convolution, and the Gaussian H = z y x is a product. Therefore, with 1 a plane of ones,
        ||H^ - H||² = ||W F + b||² - 2 <W F + b, H> + ||H||²,    ||H||² = |z|² |y|² |x|²,
        ||W F + b||² = trace(W (F F^T) W^T) + 2 (b^T W) (F 1) + S² |b|²,
        <W F + b, H> = sum_c (z^T W)_c (F (y x))_c + (b^T z) sum(y) sum(x),
    and nothing of size K S³ is ever stored. In float32, exact to 1e-5 of ||H||².
    """
    S, K = features.shape[-1], centres.shape[1]
    with torch.autocast(features.device.type, enabled=False):
        Fm = features.float().flatten(2)  # (B, C, S*S)
        W, b = conv.weight.float().view(K, S, -1), conv.bias.float().view(K, S)  # (K, S, C), (K, S)
        x, y, z = (gaussian_1d(centres[..., axis], S, sigma) for axis in range(3))  # 3 x (B, K, S)
        gram = Fm @ Fm.transpose(1, 2)  # (B, C, C) = F F^T
        power = W.transpose(1, 2) @ W  # (K, C, C) = W^T W
        bias = torch.einsum("bc,kc->bk", Fm.sum(-1), torch.einsum("kz,kzc->kc", b, W))  # (B, K) (b^T W) (F 1)
        norm_predicted = gram.flatten(1) @ power.flatten(1).T + 2 * bias + S**2 * b.square().sum(1)  # (B, K)
        plane = (y[..., :, None] * x[..., None, :]).flatten(2)  # (B, K, S*S)
        under_blob = plane @ Fm.transpose(1, 2)  # (B, K, C) = F (y x)
        at_depth = torch.einsum("bkz,kzc->bkc", z, W)  # (B, K, C) = z^T W
        inner = (under_blob * at_depth).sum(-1) + (z * b).sum(-1) * y.sum(-1) * x.sum(-1)  # (B, K)
        norm_true = z.square().sum(-1) * y.square().sum(-1) * x.square().sum(-1)  # (B, K)
        return (valid * (norm_predicted - 2 * inner + norm_true)).sum(1).mean(0)  # Eq. (5)


def attention_loss(a_E: Tensor, a_A: Tensor) -> Tensor:
    """Eq. (6), Sec. 3.2:  L_attn = ||a_cls^E - a_cls^A||_1, sum over blocks and patches, mean over the batch.

    a_E, a_A (B, L, N): attention maps of f^E and of the frozen f^A on the same target images.
    """
    return (a_E.float() - a_A.float()).abs().sum(dim=(1, 2)).mean(dim=0)  # Eq. (6)


def hpe_loss(L_kpt: Tensor, L_attn: Tensor, lambda_attn: float) -> Tensor:
    """Eq. (7), Sec. 3.2:  L_HPE = L_kpt + lambda_attn L_attn; lambda_attn = 100 (hands) or 10 (humans)."""
    return L_kpt + lambda_attn * L_attn  # Eq. (7)


# ==========================================================================================================
# Sec. 7  The learning rate and weight decay of both stages
# ==========================================================================================================
def cosine_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of a step, Sec. 7: linear warm-up to `peak`, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with and without weight decay. Biases, scales (1-D, as in MAE) and tokens have none."""
    decay = [p for n, p in module.named_parameters() if p.ndim > 1 and not n.endswith(("_token", "_tokens"))]
    plain = [p for n, p in module.named_parameters() if p.ndim <= 1 or n.endswith(("_token", "_tokens"))]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


# ==========================================================================================================
# Heatmap coding: millimetres -> voxels -> millimetres; the errors of Sec. 4.1
# ==========================================================================================================
def project(keypoints: Tensor, intrinsics: Tensor) -> Tensor:
    """Points (B, K, 3) mm, camera, and intrinsics (B, 3, 3) to pixels (B, K, 2): u = fx x/z + cx, v alike."""
    with torch.autocast(keypoints.device.type, enabled=False):  # bfloat16 has too few digits for pixels
        uvw = keypoints @ intrinsics.transpose(1, 2)  # (B, K, 3)
    return uvw[..., :2] / uvw[..., 2:]  # (B, K, 2) px


def back_project(uv: Tensor, z: Tensor, intrinsics: Tensor) -> Tensor:
    """Invert `project`: pixels uv (B, K, 2) at depths z (B, K) mm to points (B, K, 3) mm, camera."""
    homogeneous = torch.cat([uv, torch.ones_like(uv[..., :1])], dim=-1)  # (B, K, 3) u v 1
    with torch.autocast(uv.device.type, enabled=False):  # bfloat16 has too few digits for pixels
        rays = homogeneous @ torch.linalg.inv_ex(intrinsics)[0].transpose(1, 2)  # (B, K, 3) x/z y/z 1
    return rays * z[..., None]  # (B, K, 3) mm, camera


def to_voxels(uv: Tensor, depth: Tensor, image: int, depth_range: float, side: int) -> tuple[Tensor, Tensor]:
    """Pixels uv (B, K, 2) of a square crop and depth (B, K) mm from the root, to voxels (B, K, 3), x y z.

    The volume spans the crop, and depth_range mm around the root. Also returns valid (B, K): 1 = inside the
    volume, 0 = outside or not labelled (NaN); the centre of such a joint is set to 0. not in the paper: a
    joint outside is left out of Eq. (5), because a clipped Gaussian peaks at the border, not at the joint.
    """
    xy = (uv + 0.5) * side / image - 0.5  # centres are integers, so scale about the outer edge
    z = (depth / depth_range + 0.5) * side - 0.5
    centres = torch.cat([xy, z[..., None]], dim=-1)  # (B, K, 3)
    valid = ((centres >= -0.5) & (centres <= side - 0.5)).all(dim=-1)  # False if a coordinate is NaN
    return torch.where(valid[..., None], centres, 0.0), valid.float()


def from_voxels(centres: Tensor, image: int, depth_range: float, side: int) -> tuple[Tensor, Tensor]:
    """Invert `to_voxels`: voxels (B, K, 3) to pixels (B, K, 2) and root-relative depth (B, K) mm."""
    return (centres[..., :2] + 0.5) * image / side - 0.5, ((centres[..., 2] + 0.5) / side - 0.5) * depth_range


def decode_heatmaps(heatmaps: Tensor) -> Tensor:
    """Heatmaps (B, K, Z, Y, X) to centres (B, K, 3), x y z in voxels: the largest voxel, refined.

    not in the paper. Sum the 3³ window around it over two axes: three values along the third are left. The
    logarithm of a Gaussian is a parabola. Its vertex through these three is the centre, exactly.
    """
    B, K, S = heatmaps.shape[:3]
    best = heatmaps.flatten(2).max(dim=-1).indices  # (B, K); faster than argmax
    zyx = torch.stack([best // (S * S), best // S % S, best % S], dim=-1)  # (B, K, 3) z y x
    zyx = zyx.clamp(1, S - 2)  # at the border: extrapolate from the window inside
    step = torch.arange(-1, 2, device=heatmaps.device)
    z, y, x = (zyx[..., axis, None] + step for axis in range(3))  # 3 x (B, K, 3)
    flat = (z[..., :, None, None] * S + y[..., None, :, None]) * S + x[..., None, None, :]  # (B, K, 3, 3, 3)
    window = heatmaps.flatten(2).gather(2, flat.flatten(2)).float().clamp(min=1e-6)  # (B, K, 27)
    window = window.unflatten(2, (3, 3, 3))  # (B, K, Z, Y, X)
    profiles = torch.stack([window.sum(dim=(3, 4)), window.sum(dim=(2, 4)), window.sum(dim=(2, 3))], dim=2)
    left, middle, right = profiles.log().unbind(-1)  # (B, K, axis, 3 voxels) to 3 x (B, K, 3)
    curvature = (left - 2 * middle + right).clamp(max=-1e-3)  # a peak bends downwards
    vertex = ((left - right) / (2 * curvature)).clamp(-1.5, 1.5)  # (B, K, 3) z y x, inside the window
    return (zyx + vertex).flip(-1)  # (B, K, 3) x y z


def joint_errors(predicted: Tensor, truth: Tensor, root: int) -> Tensor:
    """Distances (B, K) mm with the roots aligned, Sec. 4.1. Their mean is the EPE or MPJPE.

    predicted, truth (B, K, 3) mm. A joint that is not labelled (NaN) gives NaN: take nanmean.
    """
    return ((predicted - predicted[:, root : root + 1]) - (truth - truth[:, root : root + 1])).norm(dim=-1)


def procrustes_align(predicted: Tensor, truth: Tensor, rigid: bool = False) -> Tensor:
    """Move predicted (B, K, 3) onto truth by the best rotation, shift and, unless rigid, scale (Sec. 4.1).

    Joints without a label (NaN) do not count. If the best orthogonal matrix is a reflection, its weakest axis
    is flipped. not in the paper: the scale. The paper says "rigidly".
    """
    valid = (truth.isfinite() & predicted.isfinite()).all(-1, keepdim=True)  # (B, K, 1)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    t_mean = torch.where(valid, truth, 0.0).sum(1, keepdim=True) / count  # (B, 1, 3)
    p_mean = torch.where(valid, predicted, 0.0).sum(1, keepdim=True) / count  # (B, 1, 3)
    t, p = torch.where(valid, truth - t_mean, 0.0), torch.where(valid, predicted - p_mean, 0.0)
    U, s, Vt = torch.linalg.svd(p.transpose(1, 2) @ t)  # (B, 3, 3), (B, 3), (B, 3, 3)
    sign = torch.ones_like(s)
    sign[:, 2] = torch.linalg.det(U @ Vt).sign()
    R = U @ (sign[..., None] * Vt)  # row vectors: p R = t
    size = p.square().sum(dim=(1, 2)).clamp(min=1e-12)
    scale = torch.ones_like(size) if rigid else (s * sign).sum(1) / size
    return ((predicted - p_mean) @ R) * scale[:, None, None] + t_mean
