"""Methods to compare with, on our backbone (`train_finetune.py --adapt`). Each adds one loss to Eq. (7).

DDC, DAN and DANN, from Table 1, bring the features of the two domains closer. The paper does not say on which
feature; we use the mean patch token phi (B, D) of f^E, without an adaptation layer or bottleneck, at this one
layer. The mean teacher is not in the paper; it is the standard method for 2D poses.

    s, t  source and target        B  images of each domain in a batch        D  width of a token
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import transform_points
from support.run import rank_and_world
from udapose import decode_heatmaps, from_voxels, to_voxels


def adaptation_loss(method: str, source_tokens: Tensor, target_tokens: Tensor,
                    discriminator: nn.Module | None = None, progress: float = 0.0) -> Tensor:
    """Return the loss of `method` (a key of METHODS) on the tokens (B, 1 + N, D) of both domains.

    `discriminator` is a `DomainDiscriminator` (DANN only). `progress` is the share of the training that is
    over, 0..1.
    """
    phi_s = mean_patch_token(source_tokens)  # (B, D)
    phi_t = mean_patch_token(target_tokens)  # (B, D)
    if method == "dann":
        return dann_loss(phi_s, phi_t, discriminator, dann_ramp(progress))
    return METHODS[method](gather_features(phi_s), gather_features(phi_t))


def mean_patch_token(tokens: Tensor) -> Tensor:
    """Average the patch tokens of (B, 1 + N, D) in float32, without the class token: phi (B, D)."""
    return tokens[:, 1:].float().mean(dim=1)  # (B, D)


class ScaleGradient(torch.autograd.Function):
    """Return x unchanged and multiply its gradient by `factor`; -lambda gives DANN's gradient reversal."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


def gather_features(phi: Tensor) -> Tensor:
    """Collect phi (b, D) of all processes into (B, D): DDC and DAN compare whole batches, not single images.

    Every process then computes the whole loss, but its gradient reaches f^E only through the process's own
    rows. DistributedDataParallel averages where these parts must be added, hence the factor `world`.
    """
    rank, world = rank_and_world()
    if world == 1:
        return phi
    rows = [torch.empty_like(phi) for _ in range(world)]
    torch.distributed.all_gather(rows, phi.detach().contiguous())
    rows[rank] = ScaleGradient.apply(phi, float(world))
    return torch.cat(rows)  # (B, D)


def ddc_loss(phi_s: Tensor, phi_t: Tensor) -> Tensor:
    """DDC (Tzeng et al. 2014):  |mean phi_s - mean phi_t|², phi (B, D), means over B, sum over D."""
    return (phi_s.mean(dim=0) - phi_t.mean(dim=0)).square().sum()


def dan_loss(phi_s: Tensor, phi_t: Tensor) -> Tensor:
    """DAN (Long et al. 2015), multi-kernel MMD²:  mean k(s, s') + mean k(t, t') - 2 mean k(s, t),

        k(a, b) = sum_u exp(-|a - b|² / (2 alpha_u sigma²)),  alpha_u = 2^-3, 2^-2, .. 2^1,

    with s and t rows of phi_s and phi_t, (B, D) each. sigma² is the mean of |a - b|² over all pairs of both
    domains, so the kernels adapt to the scale of the features. It is detached; otherwise f^E could lower the
    loss by spreading the features. The means run over all B² pairs, s with itself included. This biased
    estimate is never negative, and 0 for equal batches. It exceeds the unbiased one by at most 10 / B, and
    uses all pairs where the linear-time estimate uses B / 2. The kernels have equal weights, as in most
    public code; DAN can also learn them.
    """
    B = len(phi_s)
    phi = torch.cat([phi_s, phi_t])  # (2B, D)
    distance2 = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist").square()  # (2B, 2B), exact
    sigma2 = distance2.detach().mean().clamp(min=1e-12)
    k = sum(torch.exp(-distance2 / (2 * 2.0**u * sigma2)) for u in range(-3, 2))  # (2B, 2B)
    return k[:B, :B].mean() + k[B:, B:].mean() - 2 * k[:B, B:].mean()


class DomainDiscriminator(nn.Sequential):
    """DANN's domain classifier, two layers: phi (B, D) to a logit (B, 1), positive for the source.

    1024 hidden units, as in public code. No BatchNorm: the result would depend on the micro-batch.
    """

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, 1))


def dann_loss(phi_s: Tensor, phi_t: Tensor, discriminator: nn.Module, ramp: float) -> Tensor:
    """DANN (Ganin & Lempitsky 2015):  (mean -log d(phi_s) + mean -log(1 - d(phi_t))) / 2,  phi (B, D).

    The discriminator d, with values in 0..1, learns to lower this loss. f^E learns to raise it: on the way to
    phi the gradient is reversed and multiplied by `ramp`.
    """
    logit_s = discriminator(ScaleGradient.apply(phi_s, -ramp))  # (B, 1)
    logit_t = discriminator(ScaleGradient.apply(phi_t, -ramp))  # (B, 1)
    return (F.softplus(-logit_s).mean() + F.softplus(logit_t).mean()) / 2  # softplus(-l) = -log sigmoid(l)


def dann_ramp(progress: float) -> float:
    """DANN's schedule 2 / (1 + exp(-10 p)) - 1, p = 0..1: weak at first, while the discriminator is poor."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


METHODS = {"ddc": ddc_loss, "dan": dan_loss, "dann": dann_loss}


# ==========================================================================================================
# Mean teacher (our backbone), after the 2D recipe of Kim et al. (ECCV 2022), without style transfer and
# occlusion. Its loss is Eq. (5) on the student's target heatmaps, with the teacher's centres as labels.
# ==========================================================================================================
@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move each weight and running statistic of the teacher to  decay * teacher + (1 - decay) * student."""
    for old, new in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:  # BatchNorm's counter
            old.copy_(new)


@torch.no_grad()
def teacher_labels(heatmaps: Tensor, A: Tensor, image: int) -> tuple[Tensor, Tensor]:
    """Labels for the student's crops: centres (B, K, 3) in voxels, and valid (B, K), 1 = the joint counts.

    heatmaps (B, K, S, S, S): the teacher's, of crops of `image` px without augmentation. A (B, 2, 3) maps
    their pixels to those of the student's crops; the depth stays. A joint counts if its peak is above the
    median of the micro-batch, and if its centre lies in the student's volume.
    """
    side, depth_range, heatmaps = heatmaps.shape[-1], 1.0, heatmaps.float()  # depth in units of the volume
    peaks = heatmaps.amax(dim=(2, 3, 4))  # (B, K)
    uv, depth = from_voxels(decode_heatmaps(heatmaps), image, depth_range, side)  # (B, K, 2) px, (B, K)
    centres, inside = to_voxels(transform_points(A, uv), depth, image, depth_range, side)
    return centres, inside * (peaks > peaks.median())
