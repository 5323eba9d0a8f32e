"""Eq. (1) to Eq. (7) of the paper. A good file to read next to udapose.py. Each equation has one section:

NAME_by_loops   the formula, number by number, as slow and plain as it is printed
check_eqN(f)    AssertionError if f is not Eq. (N)
WRONG_N         variants that are easy to write by mistake; check_eqN must reject every one of them
tests           the function of udapose.py passes, the wrong variants do not; some cases by hand
"""

import copy
import math

import torch
import torch.nn.functional as F
from conftest import passes_only

import udapose

close = torch.testing.assert_close


def randomised(module: torch.nn.Module, std: float = 0.5) -> torch.nn.Module:
    """Random weights, biases and statistics, in double. The zeros and ones of fresh layers hide mistakes."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b.normal_()
        if name.endswith("running_var"):
            b.uniform_(0.5, 2.0)
    return module.double()


# ==========================================================================================================
# Eq. (1)  F' = F_i + MHSA(LN(F_i));  F_{i+1} = F' + FFN(LN(F'))
# ==========================================================================================================
def norm_by_loops(norm, token):
    mean = sum(token) / len(token)
    variance = sum((t - mean) ** 2 for t in token) / len(token)
    return (token - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def block_by_loops(block, tokens):
    """Eq. (1) on the tokens (T, D) of one image. The qkv layer gives q of every head, then k, then v."""
    (T, D), M = tokens.shape, block.attn.heads
    d = D // M
    qkv = [block.attn.qkv.weight @ norm_by_loops(block.norm1, t) + block.attn.qkv.bias for t in tokens]
    updated = []
    for i in range(T):
        heads = []
        for h in range(M):
            first = [part * D + h * d for part in range(3)]
            q, k, v = ([qkv[j][at : at + d] for j in range(T)] for at in first)
            e = [math.exp(q[i] @ k[j] / math.sqrt(d)) for j in range(T)]
            heads.append(sum(e[j] / sum(e) * v[j] for j in range(T)))
        F_prime = tokens[i] + block.attn.proj.weight @ torch.cat(heads) + block.attn.proj.bias
        hidden = block.mlp.fc1.weight @ norm_by_loops(block.norm2, F_prime) + block.mlp.fc1.bias
        gelu = torch.stack([0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in hidden])
        updated.append(F_prime + block.mlp.fc2.weight @ gelu + block.mlp.fc2.bias)
    return torch.stack(updated)


@torch.no_grad()
def check_eq1(forward):
    block, x = randomised(udapose.Block(8, 2)), torch.randn(2, 5, 8).double()
    close(forward(block, x), torch.stack([block_by_loops(block, tokens) for tokens in x]))


def block_with(attention=lambda q, k, v: udapose.plain_attention(q, k, v)[0], activation=F.gelu):
    """A block of the same weights with another attention(q, k, v) on (B, M, T, d), or another activation."""

    def forward(block, x):
        y = attention(*block.attn.split(block.norm1(x)))
        x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
        return x + block.mlp.fc2(activation(block.mlp.fc1(block.norm2(x))))

    return forward


def mhsa(block, x):
    return block.attn(x)[0]


WRONG_1 = {
    "no first residual": lambda b, x: (y := mhsa(b, b.norm1(x))) + b.mlp(b.norm2(y)),
    "no second residual": lambda b, x: b.mlp(b.norm2(x + mhsa(b, b.norm1(x)))),
    "norm after the residual": lambda b, x: b.norm2((y := b.norm1(x + mhsa(b, x))) + b.mlp(y)),
    "no LN before MHSA": lambda b, x: (y := x + mhsa(b, x)) + b.mlp(b.norm2(y)),
    "one LN for both": lambda b, x: (y := x + mhsa(b, b.norm1(x))) + b.mlp(b.norm1(y)),
    "both lines start from F_i": lambda b, x: x + mhsa(b, b.norm1(x)) + b.mlp(b.norm2(x)),
    "FFN first": lambda b, x: (y := x + b.mlp(b.norm2(x))) + mhsa(b, b.norm1(y)),
    "scores not divided": block_with(lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
    "softmax over queries": block_with(lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-2) @ v),
    "q and k exchanged": block_with(lambda q, k, v: udapose.plain_attention(k, q, v)[0]),
    "heads exchanged": block_with(lambda q, k, v: udapose.plain_attention(q, k, v)[0].flip(1)),
    "ReLU for GELU": block_with(activation=F.relu),
}


def test_eq1_block():
    check_eq1(block_with())  # with the readable attention
    passes_only(check_eq1, lambda block, x: block(x)[0], WRONG_1)


# ==========================================================================================================
# Eq. (2)  w_i = N ŵ_i / sum_k ŵ_k,  ŵ_i = exp(alpha (w*_i - 0.5))
# ==========================================================================================================
def weights_by_loops(masks, P, alpha):
    B, _, H, W = masks.shape
    result = []
    for s in masks[:, 0].tolist():
        patches = [(i, j) for i in range(H // P) for j in range(W // P)]
        inside = [(a, b) for a in range(P) for b in range(P)]
        w_star = [sum(s[P * i + a][P * j + b] for a, b in inside) / P**2 for i, j in patches]
        w_hat = [math.exp(alpha * (w - 0.5)) for w in w_star]
        result.append([len(w_hat) * w / sum(w_hat) for w in w_hat])
    return torch.tensor(result)


def check_eq2(function):
    masks = torch.rand(3, 1, 4, 6) * torch.tensor([1.0, 0.3, 0.0]).view(3, 1, 1, 1)  # the last mask is empty
    for alpha in (0.0, 2.0, 4.0):
        close(function(masks, 2, alpha), weights_by_loops(masks, 2, alpha))


def eq2_with(
    pool=F.avg_pool2d,
    w_hat=lambda w, alpha: torch.exp(alpha * (w - 0.5)),
    w=lambda w_hat: w_hat.shape[1] * w_hat / w_hat.sum(1, keepdim=True),
):
    return lambda masks, P, alpha: w(w_hat(pool(masks, P, P).flatten(1), alpha))


WRONG_2 = {
    "factor N missing": eq2_with(w=lambda w: w / w.sum(1, keepdim=True)),
    "not normalised": eq2_with(w=lambda w: w),
    "sum over the batch": eq2_with(w=lambda w: w.shape[1] * w / w.sum(0, keepdim=True)),
    "one sum for all images": eq2_with(w=lambda w: w.numel() * w / w.sum()),
    "alpha missing": eq2_with(w_hat=lambda w, alpha: torch.exp(w - 0.5)),
    "alpha outside exp": eq2_with(w_hat=lambda w, alpha: alpha * torch.exp(w - 0.5) + (alpha == 0)),
    "alpha negative": eq2_with(w_hat=lambda w, alpha: torch.exp(-alpha * (w - 0.5))),
    "no exp": eq2_with(w_hat=lambda w, alpha: 1 + alpha * w),
    "maximum of a patch": eq2_with(pool=F.max_pool2d),
    "sum of a patch": eq2_with(pool=lambda s, P, _: F.avg_pool2d(s, P, P) * P * P),
    "column by column": eq2_with(pool=lambda s, P, _: F.avg_pool2d(s, P, P).mT),
}


def test_eq2_weights():
    check_eq2(eq2_with(w_hat=lambda w, alpha: torch.exp(alpha * w)))  # the -0.5 cancels
    passes_only(check_eq2, udapose.foreground_weights, WRONG_2)


def test_eq2_by_hand():
    """Eq. (2): one patch is half foreground, one empty; alpha = 2 ln 3. ŵ is 3 to 1, w = 2 * (3/4, 1/4)."""
    masks = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]])
    close(udapose.foreground_weights(masks, 2, 2 * math.log(3)), torch.tensor([[1.5, 0.5]]))


# ==========================================================================================================
# Eq. (3)  L_WMAE = 1/N sum_i w_i m_i ||x^_i - x_i||²_2, mean over the batch
# ==========================================================================================================
def wmae_by_loops(predicted, patches, w, m):
    B, N, pixels = patches.shape
    total = 0.0
    for b in range(B):
        for i in range(N):
            norm = sum((predicted[b, i, p] - patches[b, i, p]) ** 2 for p in range(pixels))
            total += w[b, i] * m[b, i] * norm / N
    return total / B


def reconstruction():
    """Predicted and true patches (3, 4, 5), weights (3, 4) and mask (3, 4) with 3 of 4 patches masked."""
    m = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]])
    return torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4) + 0.1, m


def check_eq3(function):
    case = reconstruction()
    close(function(*case), wmae_by_loops(*case))


WRONG_3 = {
    "mean over pixels": lambda p, x, w, m: (w * m * (p - x).square().mean(-1)).mean(),
    "1/N missing": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).sum(1).mean(),
    "mean over masked patches": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).sum() / m.sum(),
    "mean by weight": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).sum() / (w * m).sum(),
    "sum over the batch": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).mean(1).sum(),
    "norm not squared": lambda p, x, w, m: (w * m * (p - x).norm(dim=-1)).mean(),
    "no mask": lambda p, x, w, m: (w * (p - x).square().sum(-1)).mean(),
    "visible patches": lambda p, x, w, m: (w * (1 - m) * (p - x).square().sum(-1)).mean(),
    "no weights": lambda p, x, w, m: (m * (p - x).square().sum(-1)).mean(),
}


def test_eq3_loss():
    passes_only(check_eq3, udapose.weighted_mae_loss, WRONG_3)


def test_eq3_by_hand():
    """Eq. (3): N = 2, squared norms 1 + 4 = 5 and 9, weights 0.5 and 1.5. First patch masked: 0.5 * 5 / 2."""
    predicted, patches = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.zeros(1, 2, 2)
    w = torch.tensor([[0.5, 1.5]])
    assert udapose.weighted_mae_loss(predicted, patches, w, torch.tensor([[1.0, 0.0]])).item() == 1.25
    assert udapose.weighted_mae_loss(predicted, patches, w, torch.ones(1, 2)).item() == 8.0  # + 1.5 * 9 / 2


# ==========================================================================================================
# Eq. (4)  H^ = Conv(Deconv(Deconv(F_img))), with ReLU and BatchNorm after each deconvolution (Table 7)
# ==========================================================================================================
def deconv_by_loops(layer, image):
    """Deconvolution of (C, h, w), 4 x 4, stride 2, padding 1: a pixel adds its kernel to the larger image."""
    (_, h, w), out = image.shape, len(layer.bias)
    larger = layer.bias.view(out, 1, 1).expand(out, 2 * h, 2 * w).clone()
    for i in range(h):
        for j in range(w):
            for a in range(4):
                for b in range(4):
                    y, x = 2 * i + a - 1, 2 * j + b - 1
                    if 0 <= y < 2 * h and 0 <= x < 2 * w:
                        larger[:, y, x] += image[:, i, j] @ layer.weight[:, :, a, b]
    return larger


def head_by_loops(head, tokens):
    """Eq. (4) and Table 7 in evaluation mode for one image's tokens (1 + N, D), to (K, Z, Y, X)."""
    rows, columns = head.grid
    x = torch.zeros(tokens.shape[1], rows, columns, dtype=tokens.dtype)
    for r in range(rows):
        for c in range(columns):
            x[:, r, c] = tokens[1 + r * columns + c]  # the class token is left out
    for deconv, norm in ((head.deconv1, head.norm1), (head.deconv2, head.norm2)):
        x = deconv_by_loops(deconv, x).clamp(min=0)
        for c in range(len(x)):
            x[c] = (x[c] - norm.running_mean[c]) / torch.sqrt(norm.running_var[c] + norm.eps) * norm.weight[c]
            x[c] += norm.bias[c]
    S = head.side
    H = torch.zeros(head.keypoints, S, S, S, dtype=tokens.dtype)
    for k in range(head.keypoints):
        for z in range(S):
            layer = k * S + z
            weighted = sum(head.conv.weight[layer, c, 0, 0] * x[c] for c in range(len(x)))
            H[k, z] = weighted + head.conv.bias[layer]
    return H


@torch.no_grad()
def check_eq4(forward):
    head, tokens = randomised(udapose.KeypointHead((2, 2), 3, 2, 3)).eval(), torch.randn(2, 5, 3).double()
    close(forward(head, tokens), torch.stack([head_by_loops(head, t) for t in tokens]))


def head_with(
    image=lambda t, grid: t[:, 1:].transpose(1, 2).unflatten(2, grid),
    stage=lambda x, deconv, norm: norm(F.relu(deconv(x))),
    volume=lambda x, K, S: x.unflatten(1, (K, S)),
):
    def forward(head, tokens):
        x = stage(image(tokens, head.grid), head.deconv1, head.norm1)
        return volume(head.conv(stage(x, head.deconv2, head.norm2)), head.keypoints, head.side)

    return forward


def mirrored(deconv):
    flipped = copy.deepcopy(deconv)
    flipped.weight.copy_(deconv.weight.flip(2, 3))
    return flipped


WRONG_4 = {
    "BatchNorm before ReLU": head_with(stage=lambda x, deconv, norm: F.relu(norm(deconv(x)))),
    "no ReLU": head_with(stage=lambda x, deconv, norm: norm(deconv(x))),
    "no BatchNorm": head_with(stage=lambda x, deconv, norm: F.relu(deconv(x))),
    "batch statistics in evaluation": lambda head, t: copy.deepcopy(head).train()(t),
    "kernel mirrored": head_with(stage=lambda x, deconv, norm: norm(F.relu(mirrored(deconv)(x)))),
    "class token kept": head_with(lambda t, grid: t[:, :-1].transpose(1, 2).unflatten(2, grid)),
    "tokens column by column": head_with(lambda t, grid: t[:, 1:].transpose(1, 2).unflatten(2, grid).mT),
    "token and channel axes mixed": head_with(lambda t, grid: t[:, 1:].reshape(len(t), -1, *grid)),
    "depth before keypoint": head_with(volume=lambda x, K, S: x.unflatten(1, (S, K)).transpose(1, 2)),
    "x and y exchanged": head_with(volume=lambda x, K, S: x.unflatten(1, (K, S)).mT),
    "depth reversed": head_with(volume=lambda x, K, S: x.unflatten(1, (K, S)).flip(2)),
}


def test_eq4_head():
    passes_only(check_eq4, lambda head, tokens: head(tokens), WRONG_4)


# ==========================================================================================================
# Eq. (5)  L_kpt = ||H^ - H||²_2, sum over keypoints and voxels, mean over the batch
# ==========================================================================================================
def kpt_by_loops(predicted, centres, valid, sigma):
    B, K, S = predicted.shape[:3]
    total = 0.0
    for b in range(B):
        for k in range(K):
            x0, y0, z0 = centres[b, k].tolist()
            for z in range(S):
                for y in range(S):
                    for x in range(S):
                        square = (x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2
                        H = math.exp(-square / (2 * sigma**2))
                        total += valid[b, k].item() * (predicted[b, k, z, y, x].item() - H) ** 2
    return torch.tensor(total / B)


def pose(B=2, K=3, S=6):
    """Heatmaps (B, K, S, S, S), centres (B, K, 3) with one joint outside the volume, valid (B, K), sigma."""
    centres = torch.rand(B, K, 3) * (S - 1)
    centres[1, 0] = torch.tensor([-2.0, 3.0, 9.0])
    valid = torch.ones(B, K)
    valid[0, 1] = valid[1, 0] = 0
    return 0.3 * torch.randn(B, K, S, S, S), centres, valid, 1.4


def check_eq5(function):
    case = pose()
    close(function(*case), kpt_by_loops(*case), rtol=1e-5, atol=1e-5)


def eq5_with(
    loss=lambda error, valid: (valid * error.square().sum((2, 3, 4))).sum(1).mean(),
    blob=lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma),
):
    return lambda p, c, valid, sigma: loss(p - blob(c, p.shape[-1], sigma), valid)


WRONG_5 = {
    "mean over voxels": eq5_with(lambda e, v: (v * e.square().mean((2, 3, 4))).sum(1).mean()),
    "mean over keypoints": eq5_with(lambda e, v: (v * e.square().sum((2, 3, 4))).mean(1).mean()),
    "mean over valid keypoints": eq5_with(lambda e, v: (v * e.square().sum((2, 3, 4))).sum() / v.sum()),
    "sum over the batch": eq5_with(lambda e, v: (v * e.square().sum((2, 3, 4))).sum()),
    "norm not squared": eq5_with(lambda e, v: (v * e.square().sum((2, 3, 4)).sqrt()).sum(1).mean()),
    "valid forgotten": eq5_with(lambda e, v: e.square().sum((2, 3, 4)).sum(1).mean()),
    "valid inverted": eq5_with(lambda e, v: ((1 - v) * e.square().sum((2, 3, 4))).sum(1).mean()),
    "blob at z y x": eq5_with(blob=lambda c, S, sigma: udapose.true_heatmaps(c.flip(-1), S, sigma)),
    "x and y exchanged": eq5_with(blob=lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma).mT),
    "2 of 2 sigma² missing": eq5_with(blob=lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma / 2**0.5)),
    "centres rounded": eq5_with(blob=lambda c, S, sigma: udapose.true_heatmaps(c.round(), S, sigma)),
    "blob of sum 1": eq5_with(
        blob=lambda c, S, sigma: (H := udapose.true_heatmaps(c, S, sigma)) / H.sum((2, 3, 4), keepdim=True)
    ),
}


def test_eq5_loss():
    passes_only(check_eq5, udapose.keypoint_loss, WRONG_5)  # keypoint_loss_expanded: see test_fast_forms.py


def test_eq5_by_hand():
    """Eq. (5): S = 2, centre at voxel (0, 0, 0), sigma such that a step halves H: H = (1/2)^(x + y + z).
    H^ = 0 costs (1 + 1/4)^3. H^ = 1 costs 0 + 3 * (1/2)² + 3 * (3/4)² + (7/8)²."""
    loss, sigma = udapose.keypoint_loss, math.sqrt(1 / (2 * math.log(2)))
    zero, one = torch.zeros(1, 1, 3), torch.ones(1, 1)
    close(loss(torch.zeros(1, 1, 2, 2, 2), zero, one, sigma), torch.tensor(1.953125), atol=1e-5, rtol=0)
    close(loss(torch.ones(1, 1, 2, 2, 2), zero, one, sigma), torch.tensor(3.203125), atol=1e-5, rtol=0)


# ==========================================================================================================
# Eq. (6)  L_attn = ||a_cls^E - a_cls^A||_1, and the attention maps a_cls in it (Sec. 3.2, Table 8)
# ==========================================================================================================
def class_rows_by_loops(q, k):
    """Attention of the class token, "excluding the j-th element", its own; mean over heads: (B, N)."""
    B, M, T, d = q.shape
    rows = torch.zeros(B, T - 1)
    for b in range(B):
        for h in range(M):
            scores = [sum(q[b, h, 0, c] * k[b, h, j, c] for c in range(d)) / math.sqrt(d) for j in range(T)]
            e = [math.exp(score) for score in scores]
            for j in range(1, T):
                rows[b, j - 1] += e[j] / sum(e) / M
    return rows


def check_class_attention(function):
    q, k = torch.randn(2, 2, 3, 5, 4).unbind(0)
    close(function(q, k), class_rows_by_loops(q, k))


def matrix(q, k):
    return udapose.plain_attention(q, k, k)[1]


WRONG_MAPS = {
    "class column kept": lambda q, k: matrix(q, k).mean(1)[:, 0],
    "row scaled up to 1": lambda q, k: F.normalize(matrix(q, k).mean(1)[:, 0, 1:], p=1, dim=-1),
    "column of the class token": lambda q, k: matrix(q, k).mean(1)[:, 1:, 0],
    "q and k exchanged": lambda q, k: matrix(k, q).mean(1)[:, 0, 1:],
    "sum over heads": lambda q, k: matrix(q, k).sum(1)[:, 0, 1:],
    "heads averaged before the softmax": lambda q, k: (q @ k.mT / 2).mean(1).softmax(-1)[:, 0, 1:],
    "scores not divided": lambda q, k: (q @ k.mT).softmax(-1).mean(1)[:, 0, 1:],
    "softmax over queries": lambda q, k: (q @ k.mT / 2).softmax(-2).mean(1)[:, 0, 1:],
    "softmax without the class token": lambda q, k: (q @ k.mT / 2)[..., 1:].softmax(-1).mean(1)[:, 0],
    "class token last": lambda q, k: matrix(q, k).mean(1)[:, -1, :-1],
}


def attn_by_loops(a_E, a_A):
    B, L, N = a_E.shape
    return sum(abs(a_E[b, i, j] - a_A[b, i, j]) for b in range(B) for i in range(L) for j in range(N)) / B


def check_eq6(function):
    a_E, a_A = torch.rand(2, 3, 4, 5).unbind(0)
    close(function(a_E, a_A), attn_by_loops(a_E, a_A))


WRONG_6 = {
    "mean over patches": lambda a, b: (a - b).abs().mean(2).sum(1).mean(),
    "mean over blocks": lambda a, b: (a - b).abs().sum(2).mean(1).mean(),
    "mean over everything": lambda a, b: (a - b).abs().mean(),
    "sum over the batch": lambda a, b: (a - b).abs().sum(),
    "last block only": lambda a, b: (a - b)[:, -1].abs().sum(1).mean(),
    "no absolute value": lambda a, b: (a - b).sum((1, 2)).mean(),
    "squared": lambda a, b: (a - b).square().sum((1, 2)).mean(),
}


def test_eq6_class_attention():
    passes_only(check_class_attention, udapose.class_attention, WRONG_MAPS)


def test_eq6_loss():
    passes_only(check_eq6, udapose.attention_loss, WRONG_6)


def test_eq6_gradient_reaches_queries_and_keys_only():
    """Eq. (6) reaches f^E up to q and k of its last block, but not v, projection, FFN, norm or f^H."""
    encoder = udapose.Encoder((8, 8), 4, 8, 2, 2)
    udapose.attention_loss(encoder.attention_maps(torch.randn(2, 3, 8, 8)), torch.rand(2, 2, 4)).backward()
    reached = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    after = {n for n, _ in encoder.named_parameters() if n.startswith(("norm.", "blocks.1."))}
    before = {n for n, _ in encoder.named_parameters()} - after
    last = {"norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"}
    assert reached == before | {f"blocks.1.{n}" for n in last}
    q, k, v = encoder.blocks[1].attn.qkv.weight.grad.chunk(3)
    assert q.any() and k.any() and not v.any()


# ==========================================================================================================
# Eq. (7)  L_HPE = L_kpt + lambda_attn L_attn
# ==========================================================================================================
def check_eq7(function):
    """The value, and the gradient at both terms: 1 and lambda."""
    for L_kpt, L_attn, lam in ((3.0, 0.5, 100.0), (7.0, 2.0, 10.0), (5.0, 4.0, 0.0)):
        terms = torch.tensor([L_kpt, L_attn], requires_grad=True)
        value = function(*terms, lam)
        close(value.detach(), torch.tensor(L_kpt + lam * L_attn))
        close(torch.autograd.grad(value, terms)[0], torch.tensor([1, lam]))


WRONG_7 = {
    "lambda missing": lambda k, a, lam: k + a,
    "lambda on the other term": lambda k, a, lam: lam * k + a,
    "lambda on both": lambda k, a, lam: lam * (k + a),
    "difference": lambda k, a, lam: k - lam * a,
    "no gradient at the attention": lambda k, a, lam: k + lam * a.detach(),
}


def test_eq7_sum():
    passes_only(check_eq7, udapose.hpe_loss, WRONG_7)
