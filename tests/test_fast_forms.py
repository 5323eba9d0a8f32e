"""Fast = readable: where udapose.py computes in another way than the paper writes, both must agree."""

import math

import torch
import torch.nn.functional as F
from conftest import passes_only

import udapose

close = torch.testing.assert_close


# ==== Attention: fused for every token, and the class row apart, Eq. (1) and Eq. (6) ====================
def plain_maps(encoder, images):
    """Tokens, and a_cls of every block from the whole matrix: class row, head mean, class column dropped."""
    x, maps = encoder.embed(images), []
    for block in encoder.blocks:
        q, k, v = block.attn.split(block.norm1(x))
        y, A = udapose.plain_attention(q, k, v)  # (B, M, T, d), (B, M, T, T)
        maps.append(A.mean(dim=1)[:, 0, 1:])
        x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x), torch.stack(maps, dim=1)


@torch.no_grad()
def encoder_with_sharp_attention():
    """An encoder with larger weights. With the initial ones attention is nearly uniform, all maps alike."""
    encoder = udapose.Encoder((16, 24), 4, 16, 3, 4)
    for p in encoder.parameters():
        if p.ndim == 2:
            p.mul_(3)
    return encoder, torch.randn(2, 3, 16, 24)


def test_attention_in_bfloat16():
    q, k, v = torch.randn(3, 2, 3, 37, 16).bfloat16()
    exact, _ = udapose.plain_attention(q.double(), k.double(), v.double())
    close(udapose.attend(q, k, v).double(), exact, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_maps_are_the_plain_ones_with_fused_attention_in_use(monkeypatch):
    encoder, images = encoder_with_sharp_attention()
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    tokens, maps = plain_maps(encoder, images)
    assert maps.std(dim=-1).min() > 0.3 * maps.mean()  # the maps are not uniform
    close(encoder(images), tokens, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3, "every block uses fused attention"
    calls.clear()
    close(encoder.attention_maps(images), maps, rtol=1e-4, atol=1e-6)
    assert len(calls) == 2, "the last block of f^A needs no attention output"
    x, block = encoder.embed(images), encoder.blocks[0]  # a block's map is that of its own input
    for row in (block(x, attention=True)[1], block.only_class_attention(x)):
        close(row, maps[:, 0])
    assert block(x)[1] is None


@torch.no_grad()
def test_only_visible_patches_are_embedded():
    """Masking before the embedding gives the tokens of masking after it, x_m^p of Sec. 3.1."""
    encoder, images = encoder_with_sharp_attention()
    visible = torch.stack([torch.randperm(24)[:6] for _ in range(2)])
    everything = encoder.embed(images)
    some = encoder.embed(images, visible)
    for b in range(2):
        close(some[b, 1:], everything[b, 1 + visible[b]])
        close(some[b, 0], everything[b, 0])


# ==== Eq. (5) without a heatmap =========================================================================
def fitting_problem(B=3, K=4, S=12, C=6, weight=0.3):
    features, conv = torch.randn(B, C, S, S), torch.nn.Conv2d(C, K * S, 1)
    for p in conv.parameters():
        torch.nn.init.normal_(p, std=weight)
    centres, valid = torch.rand(B, K, 3) * S - 0.5, torch.ones(B, K)
    valid[0, 1] = valid[2, 0] = valid[2, 3] = 0
    return features, conv, centres, valid, 1.8


def readable(features, conv, centres, valid, sigma):
    K, S = centres.shape[1], features.shape[-1]
    return udapose.keypoint_loss(conv(features).unflatten(1, (K, S)), centres, valid, sigma)


def value_and_gradients(loss, features, conv, *rest):
    features = features.detach().requires_grad_()
    value = loss(features, conv, *rest)
    return value.detach(), torch.autograd.grad(value, [features, conv.weight, conv.bias])


def check_expanded(loss, weight=0.3, noise=None):
    problem = fitting_problem(weight=weight) if noise is None else nearly_perfect(noise)
    ours, our_gradients = value_and_gradients(loss, *problem)
    value, gradients = value_and_gradients(readable, *problem)
    size = udapose.keypoint_loss(torch.zeros(3, 4, 12, 12, 12), *problem[2:])  # ||H||²
    assert abs(ours - value) < 1e-5 * (size + value), (ours, value, size)
    for one, other in zip(our_gradients, gradients, strict=True):
        assert (one - other).abs().max() < 1e-5 * (1 + other.abs().max()) * math.sqrt(size)


def nearly_perfect(noise):
    """The target heatmaps as features, disturbed by `noise`, and a convolution that passes them on."""
    _, _, centres, valid, sigma = fitting_problem()
    H = udapose.true_heatmaps(centres, 12, sigma).flatten(1, 2)  # (B, K*S, S, S)
    conv = torch.nn.Conv2d(48, 48, 1)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    return H + noise * torch.randn_like(H), conv, centres, valid, sigma


right = udapose.keypoint_loss_expanded
WRONG_EXPANDED = {
    "x and y exchanged": lambda f, conv, c, v, s: right(f, conv, c[..., [1, 0, 2]], v, s),
    "x and z exchanged": lambda f, conv, c, v, s: right(f, conv, c.flip(-1), v, s),
    "valid forgotten": lambda f, conv, c, v, s: right(f, conv, c, v * 0 + 1, s),
    "sum over the batch": lambda f, conv, c, v, s: right(f, conv, c, v, s) * len(f),
}


def test_expanded_loss_equals_the_readable_one():
    """Eq. (5) in value and gradients, also with the head's initial weights and near a perfect fit.

    There the three terms cancel. The rest must still be right to 1e-5 of ||H||².
    """
    passes_only(check_expanded, right, WRONG_EXPANDED)
    for problem in ({"weight": 0.001}, {"noise": 0}, {"noise": 1e-2}):
        check_expanded(right, **problem)


# ==== Precision: functions that promise float32 compute in float32, inside autocast too =================
def float32_functions():
    features, conv, centres, valid, sigma = fitting_problem()
    heatmaps = conv(features).unflatten(1, (4, 12)).detach()
    predicted, patches, w, m = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.rand(2, 4), torch.ones(2, 4)
    q, k = torch.randn(2, 2, 3, 7, 4).unbind(0)
    a_E, a_A = torch.rand(2, 2, 3, 4).unbind(0)
    camera = torch.tensor([[[300.0, 0, 31.5], [0, 300, 31.5], [0, 0, 1]]]).expand(3, 3, 3)
    points, uv = torch.randn(3, 4, 3) * 50 + torch.tensor([0.0, 0, 600]), torch.rand(3, 4, 2) * 63
    return {
        "weighted_mae_loss": lambda: udapose.weighted_mae_loss(predicted, patches, w, m),
        "keypoint_loss": lambda: udapose.keypoint_loss(heatmaps, centres, valid, sigma),
        "keypoint_loss_expanded": lambda: right(features.bfloat16(), conv, centres, valid, sigma),
        "attention_loss": lambda: udapose.attention_loss(a_E, a_A),
        "class_attention": lambda: udapose.class_attention(q, k),
        "project": lambda: udapose.project(points, camera),
        "back_project": lambda: udapose.back_project(uv, points[..., 2], camera),
    }


def test_float32_inside_autocast():
    """bfloat16 has three digits, so pixels, millimetres and losses would be off by up to half a percent."""
    for name, function in float32_functions().items():
        with torch.autocast("cpu", torch.bfloat16):
            inside = function()
        close(inside, function(), msg=lambda text, name=name: f"{name}: {text}")
