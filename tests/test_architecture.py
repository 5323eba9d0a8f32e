"""Tables 5 to 8 row by row at the paper's size. Then what the equations rest on: patches, positions, masks.

The paper's size is built on torch's meta device, which has shapes and counts but needs no memory.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import passes_only

import udapose

close = torch.testing.assert_close


# ==== Tables 5 to 8: ViT-B/16, 256 x 256 px, K = 21 =====================================================
@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        encoder = udapose.Encoder((256, 256), 16, 768, 12, 12)
        return {
            "f^E": encoder,
            "f^D": udapose.Decoder(encoder.grid, 16, 768, 512, 1, 16),
            "f^S": udapose.UNet(),
            "f^H": udapose.KeypointHead(encoder.grid, 768, 256, 21),
        }


@torch.no_grad()
def shapes(module, *inputs) -> dict:
    """Shapes of one image: name of each part called -> (in, out), and "output" -> what the module returns."""
    seen, hooks = {}, []

    def first(x):
        return tuple((x[0] if isinstance(x, tuple) else x).shape[1:])

    for name, part in module.named_modules():
        record = lambda _, x, y, name=name: seen.update({name: (first(x), first(y))})  # noqa: E731
        hooks.append(part.register_forward_hook(record))
    seen["output"] = first(module(*inputs))
    for hook in hooks:
        hook.remove()
    return seen


def test_parameter_counts(paper):
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in paper.items()}
    assert counts == {"f^E": 85_647_360, "f^D": 3_941_632, "f^S": 895_681, "f^H": 4_541_248}
    parts = [part for network in paper.values() for part in network.modules()]
    assert {part.eps for part in parts if isinstance(part, torch.nn.LayerNorm)} == {1e-6}  # MAE's


def test_table_5_encoder_and_decoder(paper):
    encoder, decoder = paper["f^E"], paper["f^D"]
    images, noise = torch.empty(1, 3, 256, 256, device="meta"), torch.empty(1, 256, device="meta")
    visible, restore, m = udapose.random_masking(noise, 0.75)
    assert shapes(encoder, images)["patch_embed"][1] == (256, 768)  # L1
    assert encoder.cls_token.shape == (1, 1, 768)  # L3
    seen = shapes(encoder, images, visible)
    assert seen["patch_embed"][1] == (64, 768)  # L2: masked first
    assert seen["blocks.0"][0] == (65, 768)  # L4
    assert [seen[f"blocks.{i}"][1] for i in range(12)] == [(65, 768)] * 12  # L5-L16
    seen = shapes(decoder, torch.empty(1, 65, 768, device="meta"), restore)
    assert seen["decoder_embed"] == ((65, 768), (65, 512))  # L17
    assert decoder.mask_token.shape == (1, 1, 512) and restore.shape[1] - visible.shape[1] == 192  # L18
    assert seen["decoder_blocks.0"] == ((257, 512), (257, 512))  # L19-L20
    assert seen["decoder_pred"][1] == (257, 768)  # L21
    assert seen["output"] == (256, 768) and "decoder_blocks.1" not in seen  # L22


def unet_by_table(net, x, concat=lambda skip, x: torch.cat([skip, x], 1)):
    """Table 6 line by line. L5 and the skips are misprinted: the skips here have the sizes that fit."""
    pool = lambda x: F.max_pool2d(x, 2)  # noqa: E731
    up = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    conv = lambda x, layer: F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1))  # noqa: E731
    double = lambda x, part: conv(conv(x, part[0]), part[2])  # noqa: E731
    L2 = F.relu(net.stem[1](F.conv2d(x, net.stem[0].weight, net.stem[0].bias, stride=2, padding=3)))
    L4 = double(L2, net.down[0])
    L7 = double(pool(L4), net.down[1])
    L10 = double(pool(L7), net.down[2])
    L13 = double(pool(L10), net.down[3])
    L16 = double(pool(L13), net.down[4])
    L20 = double(concat(L13, up(L16)), net.up[0])
    L24 = double(concat(L10, up(L20)), net.up[1])
    L28 = double(concat(L7, up(L24)), net.up[2])
    L32 = double(concat(L4, up(L28)), net.up[3])
    return F.conv2d(double(up(L32), net.last), net.head.weight, net.head.bias)


def lively(net):
    """Statistics and weights with which every layer matters. Without He's, deep layers fade to nothing."""
    for m in net.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(m.weight)
            torch.nn.init.normal_(m.bias, std=0.1)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 2)
    return net.eval()


@torch.no_grad()
def check_table_6(forward):
    net, x = lively(udapose.UNet(6)), torch.randn(2, 3, 64, 64)
    close(forward(net, x), unet_by_table(net, x), rtol=1e-3, atol=1e-4)


WRONG_UNETS = {
    "skip last": lambda net, x: unet_by_table(net, x, lambda skip, x: torch.cat([x, skip], 1)),
    "no skip": lambda net, x: unet_by_table(net, x, lambda skip, x: torch.cat([skip * 0, x], 1)),
    "sigmoid, which is in the loss": lambda net, x: net(x).sigmoid(),
}


def test_table_6_line_by_line(paper):
    passes_only(check_table_6, lambda net, x: net(x), WRONG_UNETS)
    assert paper["f^S"](torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1, 256, 256)
    assert udapose.UNet(4)(torch.randn(1, 3, 33, 50)).shape == (1, 1, 33, 50)  # odd sizes


def test_table_7_keypoint_head_and_table_8_attention_maps(paper, monkeypatch):
    images = torch.empty(1, 3, 256, 256, device="meta")
    seen = shapes(paper["f^E"], images)
    assert seen["patch_embed"][1] == (256, 768) and seen["blocks.0"][0] == (257, 768)  # L1, L3
    assert [seen[f"blocks.{i}"][1] for i in range(12)] == [(257, 768)] * 12  # L4-L15
    head = paper["f^H"].eval()
    seen = shapes(head, torch.empty(1, 257, 768, device="meta"))
    assert seen["deconv1"] == ((768, 16, 16), (256, 32, 32))  # L16-L17
    assert seen["norm1"][1] == (256, 32, 32)  # L18
    assert seen["deconv2"][1] == seen["norm2"][1] == (256, 64, 64)  # L19
    assert seen["conv"][1] == (64 * 21, 64, 64)  # L20
    assert seen["output"] == (21, 64, 64, 64)  # L21
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown on meta
    assert paper["f^E"].attention_maps(images).shape == (1, 12, 256)  # Table 8, L4-L16


def test_pose_estimator_sends_each_domain_its_own_way():
    """Source to the head; target to attention maps, to tokens, or (joint) to the head, in one batch."""
    encoder = udapose.Encoder((16, 16), 4, 16, 2, 2)
    model = udapose.PoseEstimator(encoder, lively(udapose.KeypointHead((4, 4), 16, 8, 3))).train()
    source, target = torch.randn(2, 3, 16, 16), 3 * torch.randn(3, 3, 16, 16)
    tokens, plain = (encoder(source), encoder(target)), model(source)
    close(plain.features, model.head.features(tokens[0]))
    assert plain.a_E is plain.target_tokens is plain.target_features is None
    out, joint = (model(source, target, attention=True, tokens=True), model(source, target, joint=True))
    close((out.features, out.source_tokens, out.target_tokens), (plain.features, *tokens))
    close(out.a_E, encoder.attention_maps(target))
    close(torch.cat([joint.features, joint.target_features]), model.head.features(torch.cat(tokens)))
    assert all(x.requires_grad for x in (*out[:4], *joint[:2], *joint[3:]))
    centres = model.eval().centres(source)
    close(centres, udapose.decode_heatmaps(model.head.heatmaps(model(source).features)))


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: udapose.Encoder((60, 64), 16, 16, 1, 2), "60 x 64.*patch, 16"),
        (lambda: udapose.Encoder((64, 60), 16, 16, 1, 2), "64 x 60.*patch, 16"),
        (lambda: udapose.Encoder((32, 32), 16, 18, 1, 2), "18.*divisible by 4"),
        (lambda: udapose.Encoder((32, 32), 16, 16, 1, 3), "16.*heads, 3"),
        (lambda: udapose.UNet(4)(torch.randn(1, 3, 16, 64)), "32 px"),
        (lambda: udapose.KeypointHead((4, 6), 8, 8, 3), "square.*4 x 6"),
        (lambda: udapose.random_masking(torch.rand(2, 16), 0.01), "r = 0.01"),
        (lambda: udapose.random_masking(torch.rand(2, 16), 0.99), "r = 0.99"),
        (lambda: udapose.Encoder((32, 32), 16, 16, 1, 2)(torch.randn(1, 3, 48, 32)), r"\(32, 32\).*\(48, 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()


# ==== Patches and positions =============================================================================
def check_patches(cut):
    """MAE's order: patches row by row; inside a patch row, column, channel."""
    images, P = torch.randn(2, 3, 4, 6), 2
    inside = [(a, e, c) for a in range(P) for e in range(P) for c in range(3)]
    places = [(b, i, j) for b in range(2) for i in range(2) for j in range(3)]
    expected = [[images[b, c, P * i + a, P * j + e] for a, e, c in inside] for b, i, j in places]
    close(cut(images, P), torch.tensor(expected).view(2, 6, 12))


WRONG_PATCHES = {
    "channel first": lambda x, P: F.unfold(x, P, stride=P).mT,
    "columns first inside": lambda x, P: (
        udapose.patchify(x, P).unflatten(2, (P, P, 3)).transpose(2, 3).flatten(2)
    ),
    "columns first": lambda x, P: udapose.patchify(x, P).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
    "no patches at all": lambda x, P: x.permute(0, 2, 3, 1).reshape(2, 6, 12),
}


def test_patchify():
    passes_only(check_patches, udapose.patchify, WRONG_PATCHES)
    images = torch.randn(2, 2, 8, 12)  # two channels: images or maps
    assert torch.equal(udapose.unpatchify(udapose.patchify(images, 4), 4, (2, 3)), images)


def test_normalised_patches_are_those_of_mae():
    """Its variance is the unbiased one: 1, 2, 3 has 1, not 2/3."""
    close(udapose.normalise_patches(torch.tensor([[[1.0, 2.0, 3.0]]])), torch.tensor([[[-1.0, 0.0, 1.0]]]))


def positions_by_loops(rows, columns, D):
    """MAE's order: the first half of the channels encodes the column, the second the row; sin before cos."""
    table = [[0.0] * D]  # the class token has no position
    for r in range(rows):
        for c in range(columns):
            token = []
            for place in (c, r):
                angles = [place / 10000 ** (i / (D // 4)) for i in range(D // 4)]
                token += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(token)
    return torch.tensor(table)[None]


def check_positions(function):
    close(function((2, 3), 8), positions_by_loops(2, 3, 8))


WRONG_POSITIONS = {
    "row first": lambda grid, D: udapose.sincos_positions(grid, D).roll(4, -1),
    "cosine first": lambda grid, D: udapose.sincos_positions(grid, D)[..., [2, 3, 0, 1, 6, 7, 4, 5]],
    "grid turned": lambda grid, D: udapose.sincos_positions(grid[::-1], D),
}


def test_positions():
    passes_only(check_positions, udapose.sincos_positions, WRONG_POSITIONS)


def test_initial_weights_are_maes():
    """Xavier-uniform, with the patch kernel as a matrix; biases 0; tokens normal, standard deviation 0.02."""
    encoder = udapose.Encoder((32, 32), 16, 128, 1, 2)
    fc1, kernel = encoder.blocks[0].mlp.fc1.weight, encoder.patch_embed.proj.weight
    for weight, fan in ((fc1, 128 + 512), (kernel, 768 + 128)):
        bound = math.sqrt(6 / fan)
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() * math.sqrt(3) / bound - 1) < 0.02
    assert all((m.bias == 0).all() for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    decoder = udapose.Decoder((2, 2), 16, 128, 512, 1, 2)
    for token in (encoder.cls_token, decoder.mask_token):
        assert 0.015 < token.std() < 0.025
    head = udapose.KeypointHead((2, 2), 16, 8, 3)
    for layer in (head.deconv1, head.deconv2, head.conv):
        assert 0.0007 < layer.weight.std() < 0.0013


# ==== Masking m^b and the decoder =======================================================================
def test_masking_by_hand():
    """The largest noise is hidden: patches 2 and 0. Sequence [visible 1, 3 | masked 0, 2]: 0 is third."""
    visible, restore, m = udapose.random_masking(torch.tensor([[0.3, 0.1, 0.4, 0.2], [1.0, 2, 3, 4]]), 0.5)
    assert (visible.tolist(), restore.tolist()) == ([[1, 3], [0, 1]], [[2, 0, 3, 1], [0, 1, 2, 3]])
    assert m.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    for N, r, V in ((256, 0.75, 64), (36, 0.95, 2), (24, 0.6, 10)):
        assert udapose.random_masking(torch.rand(1, N), r)[0].shape == (1, V)


@torch.no_grad()
def check_decoder_input(arrange):
    """Visible tokens in their own places, mask tokens in the others, class token first, positions added."""
    decoder = udapose.Decoder((2, 3), 2, 8, 4, 1, 2)
    visible, restore, m = udapose.random_masking(torch.rand(2, 6), 0.5)
    latent = torch.randn(2, 4, 8)
    tokens = decoder.decoder_embed(latent)
    expected = decoder.decoder_pos_embed.expand(2, -1, -1).clone()
    for b in range(2):
        expected[b, 0] += tokens[b, 0]
        for i in range(6):
            if m[b, i]:
                expected[b, 1 + i] += decoder.mask_token[0, 0]
            else:
                expected[b, 1 + i] += tokens[b, 1 + visible[b].tolist().index(i)]
    close(arrange(decoder, latent, restore), expected)


def decoder_input(decoder, latent, restore):
    """The input of the first block of f^D, L19 of Table 5."""
    seen = []
    hook = decoder.decoder_blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    decoder(latent, restore)
    hook.remove()
    return seen[0]


WRONG_ARRANGEMENTS = {
    "inverse order": lambda d, latent, restore: decoder_input(d, latent, restore.argsort(1)),
    "reversed": lambda d, latent, restore: decoder_input(d, latent, restore.flip(1)),
    "order not restored": lambda d, latent, _: decoder_input(d, latent, torch.arange(6).expand(2, 6)),
    "no positions": lambda d, *given: decoder_input(d, *given) - d.decoder_pos_embed,
}


def test_decoder_puts_tokens_in_their_places():
    passes_only(check_decoder_input, decoder_input, WRONG_ARRANGEMENTS)


def test_masked_pixels_are_never_seen():
    """The prediction depends on visible pixels only. Otherwise reconstruction would be copying.

    Register tokens of a fork that are not dropped would be taken for visible patches, and shift them all.
    """
    encoder = udapose.Encoder((8, 12), 4, 8, 1, 2)
    mae = udapose.MaskedAutoencoder(encoder, udapose.Decoder(encoder.grid, 4, 8, 8, 1, 2))
    images = torch.randn(2, 3, 8, 12, requires_grad=True)
    predicted, m = mae(images, torch.rand(2, 6), 0.5)
    predicted.square().sum().backward()
    reached = udapose.patchify(images.grad, 4).abs().sum(-1) > 0
    assert torch.equal(reached, m == 0)
    assert mae.decoder.mask_token.grad.abs().sum() > 0
    encoder.forward = lambda images, visible: torch.zeros(2, 6, 8)
    with pytest.raises(ValueError, match="returned 6 tokens for the class token and 3 visible patches"):
        mae(images, torch.rand(2, 6), 0.5)


# ==== Backgrounds from X_C ==============================================================================
def background_by_rules(x, mask, x_c):
    """One image. Foreground stays, background comes from x_c. A mask under 1 % or over 90 % is not used."""
    pixels = [(i, j) for i in range(mask.shape[1]) for j in range(mask.shape[2])]
    foreground = {p for p in pixels if mask[0][p] >= 0.5}
    mixed = x.clone()
    if 0.01 * len(pixels) <= len(foreground) <= 0.9 * len(pixels):
        for i, j in pixels:
            if (i, j) not in foreground:
                mixed[:, i, j] = x_c[:, i, j]
    return mixed


def check_background(function):
    """10 x 10 px, so that a pixel is 1 %: 30, 0, 1, 90, 91, 100 % foreground, hard, soft and at 0.5."""
    x, x_c, masks = torch.randn(6, 3, 10, 10), torch.randn(6, 3, 10, 10), torch.zeros(6, 1, 100)
    for i, pixels in enumerate((30, 0, 1, 90, 91, 100)):
        masks[i, :, :pixels] = 1
    masks = masks.view(6, 1, 10, 10)
    for s in (masks, 0.2 + 0.4 * masks, 0.49 + 0.01 * masks):
        s = (100 * s).round() / 100  # 0.49 + 0.01 is not quite 0.5
        expected = torch.stack([background_by_rules(*case) for case in zip(x, s, x_c, strict=True)])
        assert torch.equal(function(x, s, x_c), expected)


WRONG_BACKGROUNDS = {
    "foreground replaced": lambda x, s, x_c: udapose.replace_background(x_c, s, x),
    "soft mixture": lambda x, s, x_c: s * x + (1 - s) * x_c,
    "no rule for bad masks": lambda x, s, x_c: torch.where(s >= 0.5, x, x_c),
    "0.5 is background": lambda x, s, x_c: udapose.replace_background(x, s - 0.001, x_c),
    "mean of the soft mask": lambda x, s, x_c: torch.where(
        (s >= 0.5) | ~((a := s.mean((1, 2, 3), keepdim=True)) >= 0.01) | (a > 0.9), x, x_c
    ),
}


def test_background():
    passes_only(check_background, udapose.replace_background, WRONG_BACKGROUNDS)
