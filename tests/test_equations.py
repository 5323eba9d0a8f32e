"""Eq. (1) to Eq. (7) of the paper. A good file to read next to udapose.py. Each equation has one section:

NAME_by_loops   the formula, number by number, as slow and plain as it is printed
check_eqN(f)    AssertionError if f is not Eq. (N)
WRONG_N         variants that are easy to write by mistake; check_eqN must reject every one of them
test_eqN_*      the function of udapose.py passes, the wrong variants do not
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


# ==== Eq. (1)  F' = F_i + MHSA(LN(F_i));  F_{i+1} = F' + FFN(LN(F')) ====================================
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


def block_with(attention):
    """A block of the same weights with another attention(q, k, v) on (B, M, T, d)."""

    def forward(block, x):
        y = attention(*block.attn.split(block.norm1(x)))
        x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))

    return forward


def mhsa(block, x):
    return block.attn(x)[0]


WRONG_1 = {
    "no first residual": lambda b, x: (y := mhsa(b, b.norm1(x))) + b.mlp(b.norm2(y)),
    "no second residual": lambda b, x: b.mlp(b.norm2(x + mhsa(b, b.norm1(x)))),
    "norm after the residual": lambda b, x: b.norm2((y := b.norm1(x + mhsa(b, x))) + b.mlp(y)),
    "one LN for both": lambda b, x: (y := x + mhsa(b, b.norm1(x))) + b.mlp(b.norm1(y)),
    "both lines start from F_i": lambda b, x: x + mhsa(b, b.norm1(x)) + b.mlp(b.norm2(x)),
    "scores not divided": block_with(lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
    "softmax over queries": block_with(lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-2) @ v),
    "q and k exchanged": block_with(lambda q, k, v: udapose.plain_attention(k, q, v)[0]),
}


def test_eq1_block():
    check_eq1(block_with(lambda q, k, v: udapose.plain_attention(q, k, v)[0]))  # with the readable attention
    passes_only(check_eq1, lambda block, x: block(x)[0], WRONG_1)


# ==== Eq. (2)  w_i = N ŵ_i / sum_k ŵ_k,  ŵ_i = exp(alpha (w*_i - 0.5)) ==================================
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


weights = udapose.foreground_weights
WRONG_2 = {
    "factor N missing": lambda s, P, alpha: weights(s, P, alpha) / 6,
    "sum over the batch": lambda s, P, alpha: weights(s, P, alpha) / weights(s, P, alpha).sum(0) * 6,
    "alpha missing": lambda s, P, alpha: weights(s, P, 1.0),
    "alpha negative": lambda s, P, alpha: weights(s, P, -alpha),
    "no exp": lambda s, P, alpha: F.normalize(1 + alpha * F.avg_pool2d(s, P).flatten(1), p=1) * 6,
    "maximum of a patch": lambda s, P, alpha: weights(F.max_pool2d(s, P), 1, alpha),
    "sum of a patch": lambda s, P, alpha: weights(s * P * P, P, alpha),
    "column by column": lambda s, P, alpha: weights(s.mT, P, alpha),
}


def test_eq2_weights():
    passes_only(check_eq2, weights, WRONG_2)


# ==== Eq. (3)  L_WMAE = 1/N sum_i w_i m_i ||x^_i - x_i||²_2, mean over the batch ========================
def wmae_by_loops(predicted, patches, w, m):
    B, N, pixels = patches.shape
    total = 0.0
    for b in range(B):
        for i in range(N):
            norm = sum((predicted[b, i, p] - patches[b, i, p]) ** 2 for p in range(pixels))
            total += w[b, i] * m[b, i] * norm / N
    return total / B


def check_eq3(function):
    """Predicted and true patches (3, 4, 5), weights (3, 4), and a mask (3, 4) of 3 of 4 patches."""
    m = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]])
    case = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4) + 0.1, m
    close(function(*case), wmae_by_loops(*case))


WRONG_3 = {
    "mean over pixels": lambda p, x, w, m: (w * m * (p - x).square().mean(-1)).mean(),
    "1/N missing": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).sum(1).mean(),
    "mean over masked patches": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).sum() / m.sum(),
    "sum over the batch": lambda p, x, w, m: (w * m * (p - x).square().sum(-1)).mean(1).sum(),
    "norm not squared": lambda p, x, w, m: (w * m * (p - x).norm(dim=-1)).mean(),
    "visible patches": lambda p, x, w, m: (w * (1 - m) * (p - x).square().sum(-1)).mean(),
    "no weights": lambda p, x, w, m: (m * (p - x).square().sum(-1)).mean(),
}


def test_eq3_loss():
    passes_only(check_eq3, udapose.weighted_mae_loss, WRONG_3)


# ==== Eq. (4)  H^ = Conv(Deconv(Deconv(F_img))), with ReLU and BatchNorm after each deconvolution (Table 7)
def head_by_loops(head, tokens):
    """Eq. (4) and Table 7 in evaluation mode for one image's tokens (1 + N, D), to (K, Z, Y, X)."""
    rows, columns = head.grid
    x = torch.zeros(tokens.shape[1], rows, columns, dtype=tokens.dtype)
    for r in range(rows):
        for c in range(columns):
            x[:, r, c] = tokens[1 + r * columns + c]  # the class token is left out
    for deconv, norm in ((head.deconv1, head.norm1), (head.deconv2, head.norm2)):
        x = F.conv_transpose2d(x, deconv.weight, deconv.bias, stride=2, padding=1).clamp(min=0)
        x = F.batch_norm(x[None], norm.running_mean, norm.running_var, norm.weight, norm.bias)[0]
    S, layers = head.side, F.conv2d(x, head.conv.weight, head.conv.bias)  # (K S, S, S)
    return torch.stack([torch.stack([layers[k * S + z] for z in range(S)]) for k in range(head.keypoints)])


@torch.no_grad()
def check_eq4(forward):
    head, tokens = randomised(udapose.KeypointHead((2, 2), 3, 2, 3)).eval(), torch.randn(2, 5, 3).double()
    close(forward(head, tokens), torch.stack([head_by_loops(head, t) for t in tokens]))


def head_with(stage):
    """A head of the same weights with another stage(x, deconv, norm)."""

    def forward(head, tokens):
        x = tokens[:, 1:].mT.unflatten(2, head.grid)
        x = stage(stage(x, head.deconv1, head.norm1), head.deconv2, head.norm2)
        return head.heatmaps(x)

    return forward


WRONG_4 = {
    "BatchNorm before ReLU": head_with(lambda x, deconv, norm: F.relu(norm(deconv(x)))),
    "no ReLU": head_with(lambda x, deconv, norm: norm(deconv(x))),
    "no BatchNorm": head_with(lambda x, deconv, norm: F.relu(deconv(x))),
    "batch statistics in evaluation": lambda head, t: copy.deepcopy(head).train()(t),
    "class token kept": lambda head, t: head(t.roll(1, dims=1)),  # before it the last patch, which is dropped
    "tokens column by column": lambda head, t: head(t[:, [0, 1, 3, 2, 4]]),
    "depth before keypoint": lambda head, t: head(t).flatten(1, 2).unflatten(1, (8, 3)).transpose(1, 2),
    "x and y exchanged": lambda head, t: head(t).mT,
    "depth reversed": lambda head, t: head(t).flip(2),
}


def test_eq4_head():
    passes_only(check_eq4, lambda head, tokens: head(tokens), WRONG_4)


# ==== Eq. (5)  L_kpt = ||H^ - H||²_2, sum over keypoints and voxels, mean over the batch ================
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


def check_eq5(function):
    """Heatmaps (2, 3, 6, 6, 6), centres (2, 3, 3) with one joint outside the volume, valid (2, 3), sigma."""
    centres, valid = torch.rand(2, 3, 3) * 5, torch.ones(2, 3)
    centres[1, 0] = torch.tensor([-2.0, 3.0, 9.0])
    valid[0, 1] = valid[1, 0] = 0
    case = 0.3 * torch.randn(2, 3, 6, 6, 6), centres, valid, 1.4
    close(function(*case), kpt_by_loops(*case), rtol=1e-5, atol=1e-5)


loss = udapose.keypoint_loss
WRONG_5 = {
    "mean over voxels": lambda p, c, valid, sigma: loss(p, c, valid, sigma) / 6**3,
    "mean over valid keypoints": lambda p, c, valid, sigma: loss(p, c, valid, sigma) * 2 / valid.sum(),
    "sum over the batch": lambda p, c, valid, sigma: loss(p, c, valid, sigma) * 2,
    "valid forgotten": lambda p, c, valid, sigma: loss(p, c, valid * 0 + 1, sigma),
    "valid inverted": lambda p, c, valid, sigma: loss(p, c, 1 - valid, sigma),
    "blob at z y x": lambda p, c, valid, sigma: loss(p, c.flip(-1), valid, sigma),
    "x and y exchanged": lambda p, c, valid, sigma: loss(p.mT, c, valid, sigma),
    "2 of 2 sigma² missing": lambda p, c, valid, sigma: loss(p, c, valid, sigma / 2**0.5),
    "centres rounded": lambda p, c, valid, sigma: loss(p, c.round(), valid, sigma),
}


def test_eq5_loss():
    passes_only(check_eq5, loss, WRONG_5)  # keypoint_loss_expanded: see test_fast_forms.py


# ==== Eq. (6)  L_attn = ||a_cls^E - a_cls^A||_1, and the attention maps a_cls in it (Sec. 3.2, Table 8) =
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
    "scores not divided": lambda q, k: (q @ k.mT).softmax(-1).mean(1)[:, 0, 1:],
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
    "mean over everything": lambda a, b: (a - b).abs().mean(),
    "sum over the batch": lambda a, b: (a - b).abs().sum(),
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


# ==== Eq. (7)  L_HPE = L_kpt + lambda_attn L_attn =======================================================
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
