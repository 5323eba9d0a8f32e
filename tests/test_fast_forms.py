"""Fast = readable: where udapose.py computes something another way than it is written, both must agree."""
import math
import threading

import pytest
import torch
import torch.nn.functional as F

from torch.utils.flop_counter import FlopCounterMode

import benchmark
import train_finetune
import train_pretrain
import udapose as u

close = torch.testing.assert_close


def rejected(check, wrong) -> None:
    with pytest.raises(AssertionError): check(wrong)


# ==========================================================================================================
# Attention: fused for every token, and the class row apart, Eq. (1) and Eq. (6)
# ==========================================================================================================
def plain_maps(encoder, images):
    """Tokens, and a_cls of every block from the whole matrix: class row, head mean, class column dropped."""
    x, maps = encoder.embed(images), []
    for block in encoder.blocks:
        q, k, v = block.attn.split(block.norm1(x))
        y, A = u.plain_attention(q, k, v)                                  # (B, M, T, d), (B, M, T, T)
        maps.append(A.mean(dim=1)[:, 0, 1:])
        x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x), torch.stack(maps, dim=1)


@torch.no_grad()
def encoder_with_sharp_attention():
    """Larger weights than the initial ones, under which attention is nearly uniform and all maps alike."""
    encoder = u.Encoder((16, 24), 4, 16, 3, 4)
    for p in encoder.parameters():
        if p.ndim == 2: p.mul_(3)
    return encoder, torch.randn(2, 3, 16, 24)


def test_fused_attention_is_plain_attention():
    q, k, v = torch.randn(3, 2, 3, 7, 4).unbind(0)
    y, A = u.plain_attention(q, k, v)
    close(F.scaled_dot_product_attention(q, k, v), y)
    close(A.sum(-1), torch.ones(2, 3, 7))


def check_attend(attend, dtype, rtol):
    """Outputs and gradients against the written form in float64."""
    q, k, v = (torch.randn(2, 3, 37, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    results = []
    for form, kind in ((attend, dtype), (lambda q, k, v: u.plain_attention(q, k, v)[0], torch.float64)):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in (q, k, v)]      # the same rounded input
        y = form(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, exact in zip(*results):
        close(ours.double(), exact, rtol=rtol, atol=rtol * float(exact.detach().abs().max()))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_either_form_of_attention_is_the_written_one(dtype, rtol):
    for form in (u.attend, F.scaled_dot_product_attention): check_attend(form, dtype, rtol)
    wrong = lambda q, k, v: u.attend(2 ** 0.5 * q, k, v)  # noqa: E731
    with pytest.raises(AssertionError): check_attend(wrong, dtype, rtol)


def test_class_attention_is_the_class_row_of_plain_attention():
    q, k, v = torch.randn(3, 2, 3, 7, 4).unbind(0)
    _, A = u.plain_attention(q, k, v)
    close(u.class_attention(q, k), A.mean(dim=1)[:, 0, 1:])
    assert (u.class_attention(q, k).sum(-1) < 1).all()                     # less the class token's own share


@torch.no_grad()
def test_maps_are_the_plain_ones_with_fused_attention_in_use(monkeypatch):
    encoder, images = encoder_with_sharp_attention()
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    tokens, maps = plain_maps(encoder, images)
    assert maps.std(dim=-1).min() > 0.3 * maps.mean()                      # the maps say something
    close(encoder(images), tokens, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3, "every block uses fused attention"
    calls.clear()
    close(encoder.attention_maps(images), maps, rtol=1e-4, atol=1e-6)
    assert len(calls) == 2, "the last block of f^A needs no attention output"


@torch.no_grad()
def test_a_block_returns_the_map_of_its_own_input():
    encoder, images = encoder_with_sharp_attention()
    x, block = encoder.embed(images), encoder.blocks[0]
    _, row = block(x, attention=True)
    close(row, plain_maps(encoder, images)[1][:, 0])
    close(block.only_class_attention(x), row)
    assert block(x)[1] is None


@torch.no_grad()
def test_only_visible_patches_are_embedded():
    """Masking before the embedding gives the tokens of masking after it, x_m^p of Sec. 3.1."""
    encoder, images = encoder_with_sharp_attention()
    visible = torch.stack([torch.randperm(24)[:6] for _ in range(2)])
    everything = encoder.embed(images)
    some = encoder.embed(images, visible)
    for b in range(2): close(some[b, 1:], everything[b, 1 + visible[b]]), close(some[b, 0], everything[b, 0])


# ==========================================================================================================
# Eq. (5) without a heatmap
# ==========================================================================================================
def fitting_problem(B=3, K=4, S=12, C=6, weight=0.3):
    features, conv = torch.randn(B, C, S, S), torch.nn.Conv2d(C, K * S, 1)
    with torch.no_grad(): conv.weight.normal_(std=weight), conv.bias.normal_(std=weight)
    centres, valid = torch.rand(B, K, 3) * S - 0.5, torch.ones(B, K)
    valid[0, 1] = valid[2, 0] = valid[2, 3] = 0
    return features, conv, centres, valid, 1.8


def readable(features, conv, centres, valid, sigma):
    K, S = centres.shape[1], features.shape[-1]
    return u.keypoint_loss(conv(features).unflatten(1, (K, S)), centres, valid, sigma)


def value_and_gradients(loss, features, conv, *rest):
    features = features.detach().requires_grad_()
    value = loss(features, conv, *rest)
    return value.detach(), torch.autograd.grad(value, [features, conv.weight, conv.bias])


def check_expanded(loss, weight=0.3, noise=None):
    features, conv, centres, valid, sigma = problem = fitting_problem(weight=weight)
    if noise is not None: problem = nearly_perfect(noise)
    ours, our_gradients = value_and_gradients(loss, *problem)
    value, gradients = value_and_gradients(readable, *problem)
    size = u.keypoint_loss(torch.zeros(3, 4, 12, 12, 12), centres, valid, sigma)           # ||H||²
    assert abs(ours - value) < 1e-5 * (size + value), (ours, value, size)
    for one, other in zip(our_gradients, gradients):
        assert (one - other).abs().max() < 1e-5 * (1 + other.abs().max()) * math.sqrt(size)


def nearly_perfect(noise):
    """Features that are the target heatmaps and a convolution that passes them on, disturbed by `noise`."""
    _, _, centres, valid, sigma = fitting_problem()
    H = u.target_heatmaps(centres, 12, sigma).flatten(1, 2)                # (B, K*S, S, S)
    conv = torch.nn.Conv2d(48, 48, 1)
    with torch.no_grad(): torch.nn.init.dirac_(conv.weight), conv.bias.zero_()
    return H + noise * torch.randn_like(H), conv, centres, valid, sigma


def without_bias(conv):
    bare = torch.nn.Conv2d(conv.in_channels, conv.out_channels, 1)
    bare.weight, bare.bias = conv.weight, torch.nn.Parameter(conv.bias * 0)
    return bare


def as_leaf(conv, loss):  # keeps conv.bias in the graph, so that only the value can betray the variant
    return loss + 0 * conv.bias.sum()


WRONG_EXPANDED = {
    "bias forgotten": lambda f, conv, c, v, s: as_leaf(
        conv, u.keypoint_loss_expanded(f, without_bias(conv), c, v, s)),
    "x and y exchanged": lambda f, conv, c, v, s: u.keypoint_loss_expanded(f, conv, c[..., [1, 0, 2]], v, s),
    "x and z exchanged": lambda f, conv, c, v, s: u.keypoint_loss_expanded(f, conv, c.flip(-1), v, s),
    "valid forgotten": lambda f, conv, c, v, s: u.keypoint_loss_expanded(f, conv, c, v * 0 + 1, s),
    "sum over the batch": lambda f, conv, c, v, s: u.keypoint_loss_expanded(f, conv, c, v, s) * len(f),
}


@pytest.mark.parametrize("weight", [0.001, 0.3])
def test_expanded_loss_equals_the_readable_one(weight):
    """Eq. (5) in value and gradients, at the head's initial weights and large ones; some joints invalid."""
    check_expanded(u.keypoint_loss_expanded, weight)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_expanded_loss_near_a_perfect_fit(noise):
    """There the three terms of Eq. (5) cancel: what is left must still be right to 1e-5 of ||H||²."""
    check_expanded(u.keypoint_loss_expanded, noise=noise)


@pytest.mark.parametrize("wrong", WRONG_EXPANDED.values(), ids=WRONG_EXPANDED.keys())
def test_expanded_check_rejects(wrong): rejected(check_expanded, wrong)


def check_expanded_in_bfloat16(loss):
    """Inside autocast, value and gradients: within bfloat16's rounding (2^-8) of the readable form's."""
    features, *rest = fitting_problem(weight=0.1)
    results = []
    for form in (loss, readable):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(value_and_gradients(form, features.bfloat16(), *rest))
    (ours, our_gradients), (value, gradients) = results
    close(ours, value, rtol=2 ** -8, atol=0)
    for one, other in zip(our_gradients, gradients):
        close(one, other, rtol=0, atol=4 * 2 ** -8 * float(other.abs().max()))
    assert our_gradients[0].dtype == torch.bfloat16 and our_gradients[1].dtype == torch.float32


def test_expanded_loss_in_bfloat16(): check_expanded_in_bfloat16(u.keypoint_loss_expanded)


@pytest.mark.parametrize("wrong", WRONG_EXPANDED.values(), ids=WRONG_EXPANDED.keys())
def test_bfloat16_check_rejects(wrong): rejected(check_expanded_in_bfloat16, wrong)


def test_expanded_loss_of_no_valid_joint_is_zero():
    features, conv, centres, valid, sigma = fitting_problem()
    problem = features, conv, centres, valid * 0, sigma
    value, gradients = value_and_gradients(u.keypoint_loss_expanded, *problem)
    assert value == 0 and all((g == 0).all() for g in gradients)


# ==========================================================================================================
# Precision: what says float32 computes in float32, inside autocast too
# ==========================================================================================================
def float32_functions():
    features, conv, centres, valid, sigma = fitting_problem()
    heatmaps = conv(features).unflatten(1, (4, 12)).detach()
    predicted, patches, w, m = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.rand(2, 4), torch.ones(2, 4)
    q, k = torch.randn(2, 2, 3, 7, 4).unbind(0)
    a_E, a_A = torch.rand(2, 2, 3, 4).unbind(0)
    camera = torch.tensor([[[300.0, 0, 31.5], [0, 300, 31.5], [0, 0, 1]]]).expand(3, 3, 3)
    points, uv = torch.randn(3, 4, 3) * 50 + torch.tensor([0.0, 0, 600]), torch.rand(3, 4, 2) * 63
    return {
        "weighted_mae_loss": lambda: u.weighted_mae_loss(predicted, patches, w, m),
        "keypoint_loss": lambda: u.keypoint_loss(heatmaps, centres, valid, sigma),
        "keypoint_loss_expanded": lambda: u.keypoint_loss_expanded(features, conv, centres, valid, sigma),
        "attention_loss": lambda: u.attention_loss(a_E, a_A),
        "class_attention": lambda: u.class_attention(q, k),
        "project": lambda: u.project(points, camera),
        "back_project": lambda: u.back_project(uv, points[..., 2], camera),
    }


@pytest.mark.parametrize("name", ["weighted_mae_loss", "keypoint_loss", "keypoint_loss_expanded",
                                  "attention_loss", "class_attention", "project", "back_project"])
def test_float32_inside_autocast(name):
    """bfloat16 has three digits: pixels, millimetres and losses would be off by up to a half percent."""
    function = float32_functions()[name]
    with torch.autocast("cpu", torch.bfloat16): inside = function()
    close(inside, function())


def check_threads_do_not_meddle(autocast):
    """A weight used twice has one gradient, whether or not a thread leaves an autocast of its own between."""
    def elsewhere():
        with torch.autocast("cpu", enabled=False): pass
    layer, x = torch.nn.Linear(32, 32), torch.randn(2, 64, 32)
    gradients = []
    for meddle in (lambda: None, elsewhere):
        with autocast():
            y = layer(x[0])
            (thread := threading.Thread(target=meddle)).start(), thread.join()
            y = y.square().sum() + layer(x[1]).square().sum()
        gradients.append(torch.autograd.grad(y, layer.weight)[0])
    assert torch.equal(*gradients)


def test_what_a_thread_does_changes_no_gradient():
    check_threads_do_not_meddle(lambda: u.autocast(torch.device("cpu"), torch.bfloat16))
    rejected(check_threads_do_not_meddle, lambda: torch.autocast("cpu", torch.bfloat16))


# ==========================================================================================================
# The operations that tests/benchmark.py divides by time, against torch's own counter
# ==========================================================================================================
def counted(compute) -> int:
    with FlopCounterMode(display=False) as counter: compute()
    return counter.get_total_flops()


def settings(script, *flags: str):
    return u.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, flags, script.TASKS)


@pytest.mark.parametrize("preset", ["tiny", "paper-hand"])
def test_counted_operations(preset, monkeypatch):
    """Forward passes are counted; a backward pass is two of them. The fused form escapes torch's counter."""
    monkeypatch.setattr(u, "attend", lambda q, k, v: u.plain_attention(q, k, v)[0])
    s = settings(train_pretrain, "--preset", preset)
    f = settings(train_finetune, "--preset", preset, "--init", "")
    encoder = u.Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
    decoder = u.Decoder(encoder.grid, s.patch, s.width, s.decoder_width, s.decoder_depth, s.decoder_heads)
    mae = u.MaskedAutoencoder(encoder, decoder)
    head = u.KeypointHead(encoder.grid, f.width, f.head_channels, 21)
    images, noise = torch.rand(1, 3, s.image, s.image), torch.rand(1, (s.image // s.patch) ** 2)
    with torch.no_grad():
        masked = counted(lambda: mae(images, noise, s.mask_ratio))
        pose, maps = counted(lambda: head(encoder(images))), counted(lambda: encoder.attention_maps(images))
    assert benchmark.pretraining_flops(s) == pytest.approx(3 * masked, rel=3e-3)  # x^ of the class token
    assert benchmark.finetuning_flops(f) == pytest.approx(3 * pose + 4 * maps, rel=0.03)  # maps: v as well
    if preset == "paper-hand": assert benchmark.pretraining_flops(s) == pytest.approx(39.8e9, rel=2e-3)
