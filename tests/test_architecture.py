"""Tables 5 to 8 row by row at the paper's size. Then what the equations rest on: patches, positions, masks.

The paper's size is built on torch's meta device, which has shapes and counts but needs no memory.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import udapose

close = torch.testing.assert_close


def rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


# ==========================================================================================================
# Tables 5 to 8: ViT-B/16, 256 x 256 px, K = 21
# ==========================================================================================================
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


TABLE_6 = [  # rows, part, 0 = into it or 1 = out of it, channels, height = width
    ("L1", "stem.0", 1, 64, 128),
    ("L2", "stem.2", 1, 64, 128),
    ("L3", "down.0.1", 1, 64, 128),
    ("L4", "down.0.3", 1, 64, 128),
    ("L5, misprinted", "down.1.0", 0, 64, 64),
    ("L6", "down.1.1", 1, 64, 64),
    ("L7", "down.1.3", 1, 64, 64),
    ("L8", "down.2.0", 0, 64, 32),
    ("L9", "down.2.1", 1, 64, 32),
    ("L10", "down.2.3", 1, 64, 32),
    ("L11", "down.3.0", 0, 64, 16),
    ("L12", "down.3.1", 1, 64, 16),
    ("L13", "down.3.3", 1, 64, 16),
    ("L14", "down.4.0", 0, 64, 8),
    ("L15", "down.4.1", 1, 64, 8),
    ("L16", "down.4.3", 1, 64, 8),
    ("L17-18", "up.0.0", 0, 128, 16),
    ("L19", "up.0.1", 1, 64, 16),
    ("L20", "up.0.3", 1, 64, 16),
    ("L21-22", "up.1.0", 0, 128, 32),
    ("L23", "up.1.1", 1, 64, 32),
    ("L24", "up.1.3", 1, 64, 32),
    ("L25-26", "up.2.0", 0, 128, 64),
    ("L27", "up.2.1", 1, 64, 64),
    ("L28", "up.2.3", 1, 64, 64),
    ("L29-30", "up.3.0", 0, 128, 128),
    ("L31", "up.3.1", 1, 64, 128),
    ("L32", "up.3.3", 1, 64, 128),
    ("L33", "last.0", 0, 64, 256),
    ("L34", "last.1", 1, 64, 256),
    ("L35", "last.3", 1, 64, 256),
    ("L36", "head", 1, 1, 256),
]


def test_table_6_segmentation_network(paper):
    seen = shapes(paper["f^S"], torch.empty(1, 3, 256, 256, device="meta"))
    for row, part, side, channels, size in TABLE_6:
        assert seen[part][side] == (channels, size, size), row
    kernels = {m.kernel_size for n, m in paper["f^S"].named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert kernels == {(7, 7), (3, 3), (1, 1)}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in paper["f^S"].modules()) == 1  # L2 only


def unet_by_table(net, x, concat=lambda skip, x: torch.cat([skip, x], 1)):
    """Table 6 line by line; the skips come from the rows whose size fits: L13, L10, L7 and L4."""
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


def test_table_6_line_by_line():
    check_table_6(lambda net, x: net(x))
    rejected(check_table_6, lambda net, x: unet_by_table(net, x, lambda skip, x: torch.cat([x, skip], 1)))
    rejected(check_table_6, lambda net, x: unet_by_table(net, x, lambda skip, x: torch.cat([skip * 0, x], 1)))
    rejected(check_table_6, lambda net, x: net(x).sigmoid())  # the sigmoid of L36 is in the loss


def test_table_7_keypoint_head(paper):
    seen = shapes(paper["f^E"], torch.empty(1, 3, 256, 256, device="meta"))
    assert seen["patch_embed"][1] == (256, 768) and seen["blocks.0"][0] == (257, 768)  # L1, L3
    assert [seen[f"blocks.{i}"][1] for i in range(12)] == [(257, 768)] * 12  # L4-L15
    head = paper["f^H"].eval()
    seen = shapes(head, torch.empty(1, 257, 768, device="meta"))
    assert seen["deconv1"] == ((768, 16, 16), (256, 32, 32))  # L16-L17
    assert seen["norm1"][1] == (256, 32, 32)  # L18
    assert seen["deconv2"][1] == seen["norm2"][1] == (256, 64, 64)  # L19
    assert seen["conv"][1] == (64 * 21, 64, 64)  # L20
    assert seen["output"] == (21, 64, 64, 64)  # L21
    assert all(d.kernel_size == (4, 4) and d.stride == (2, 2) for d in (head.deconv1, head.deconv2))


@torch.no_grad()
def test_table_8_attention_maps():
    """In real memory. With every weight 0, all 257 tokens get the same attention, 1 / 257, in every block."""
    with torch.device("meta"):
        encoder = udapose.Encoder((256, 256), 16, 768, 12, 12)
    encoder.to_empty(device="cpu")
    for tensor in encoder.state_dict().values():
        tensor.zero_()
    maps = encoder.attention_maps(torch.zeros(1, 3, 256, 256))
    close(maps, torch.full((1, 12, 256), 1 / 257))  # L4-L16
    close(encoder.blocks[0].only_class_attention(torch.zeros(1, 257, 768)), maps[:, 0])


@torch.no_grad()
def test_pose_estimator_sends_each_domain_its_own_way():
    """Sec. 3.2: source images to the head's features, target images to attention maps; no target, no maps."""
    encoder = udapose.Encoder((16, 16), 4, 16, 2, 2)
    model = udapose.PoseEstimator(encoder, lively(udapose.KeypointHead((4, 4), 16, 8, 3))).eval()
    source, target = torch.randn(2, 3, 16, 16), torch.randn(3, 3, 16, 16)
    out = model(source, target, attention=True)
    close(out.features, model.head.features(encoder(source)))
    close(out.a_E, encoder.attention_maps(target))
    assert out.target_tokens is None and model(source).a_E is None
    heatmaps = model.head.conv(out.features).unflatten(1, (3, 16))
    close(model.centres(source), udapose.decode_heatmaps(heatmaps))


# ==========================================================================================================
# Other sizes
# ==========================================================================================================
@torch.no_grad()
def test_encoder_and_decoder_take_grids_that_are_not_square():
    encoder = udapose.Encoder((64, 96), 16, 16, 2, 2)
    decoder = udapose.Decoder(encoder.grid, 16, 16, 8, 1, 2)
    images = torch.randn(2, 3, 64, 96)
    predicted, m = udapose.MaskedAutoencoder(encoder, decoder)(images, torch.rand(2, 24), 0.75)
    assert encoder.grid == (4, 6) and predicted.shape == udapose.patchify(images, 16).shape == (2, 24, 768)
    assert udapose.unpatchify(predicted, 16, encoder.grid).shape == images.shape and m.sum() == 36
    assert encoder.attention_maps(images).shape == (2, 2, 24)
    with pytest.raises(ValueError, match=r"\(64, 96\).*\(96, 64\)"):
        encoder(images.mT)


@pytest.mark.parametrize("size", [(48, 48), (60, 60), (33, 50)])
@torch.no_grad()
def test_unet_takes_odd_sizes(size):
    assert udapose.UNet(4)(torch.randn(1, 3, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: udapose.Encoder((60, 64), 16, 16, 1, 2), "60 x 64.*patch, 16"),
        (lambda: udapose.Encoder((64, 60), 16, 16, 1, 2), "64 x 60.*patch, 16"),
        (lambda: udapose.Encoder((32, 32), 16, 18, 1, 2), "18.*divisible by 4"),
        (lambda: udapose.Encoder((32, 32), 16, 16, 1, 3), "16.*heads, 3"),
        (lambda: udapose.UNet(4)(torch.randn(1, 3, 16, 64)), "32 px"),
        (lambda: udapose.Encoder((32, 32), 16, 16, 1, 2)(torch.randn(1, 3, 48, 32)), r"\(32, 32\).*\(48, 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()


# ==========================================================================================================
# In evaluation mode a sample's result does not depend on its batch
# ==========================================================================================================
def check_alone_as_in_a_batch(function, batch):
    together = function(batch)
    close(function(batch[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
    others = torch.cat([5 * torch.randn_like(batch[:1]), batch[1:2], batch[:1]])
    close(function(others)[1], together[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    encoder = udapose.Encoder((16, 16), 4, 16, 2, 2).eval()
    head, net = lively(udapose.KeypointHead((4, 4), 16, 8, 3)), lively(udapose.UNet(4))
    images, tokens, large = torch.randn(3, 3, 16, 16), torch.randn(3, 17, 16), torch.randn(3, 3, 32, 32)
    check_alone_as_in_a_batch(encoder, images)
    check_alone_as_in_a_batch(encoder.attention_maps, images)
    check_alone_as_in_a_batch(head, tokens)
    check_alone_as_in_a_batch(net, large)
    check_alone_as_in_a_batch(udapose.PoseEstimator(encoder, head).centres, images)
    for module, batch in ((head, tokens), (net, large)):  # BatchNorm in training is seen
        with pytest.raises(AssertionError):
            check_alone_as_in_a_batch(module.train(), batch)


# ==========================================================================================================
# Patches and positions
# ==========================================================================================================
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
    check_patches(udapose.patchify)


@pytest.mark.parametrize("wrong", WRONG_PATCHES.values(), ids=WRONG_PATCHES.keys())
def test_patchify_check_rejects(wrong):
    rejected(check_patches, wrong)


def test_patchify_round_trip():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(udapose.unpatchify(udapose.patchify(images, 4), 4, (2, 3)), images)
    one = torch.randn(2, 1, 8, 12)
    assert torch.equal(udapose.unpatchify(udapose.patchify(one, 2), 2, (4, 6)), one)


@torch.no_grad()
def test_patch_embedding_is_the_convolution():
    embed, images = udapose.PatchEmbed(4, 8), torch.randn(2, 3, 8, 12)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    close(embed(udapose.patchify(images, 4)), expected, rtol=1e-5, atol=1e-5)


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


def test_positions():
    check_positions(udapose.sincos_positions)
    quarters = udapose.sincos_positions((2, 3), 8).chunk(4, dim=-1)
    for order in ((2, 3, 0, 1), (1, 0, 3, 2)):  # row first; cosine first
        rejected(check_positions, lambda *_, order=order: torch.cat([quarters[i] for i in order], -1))
    rejected(check_positions, lambda grid, D: udapose.sincos_positions(grid[::-1], D))
    rejected(check_positions, lambda grid, D: torch.cat([positions_by_loops(2, 3, 8)[:, 1:2]] * 7, 1))


def test_positions_by_hand():
    """D = 4: one frequency, 1. Row 1, column 2 of 2 x 3 is token 6: sin 2, cos 2, sin 1, cos 1."""
    expected = torch.tensor([math.sin(2), math.cos(2), math.sin(1), math.cos(1)])
    close(udapose.sincos_positions((2, 3), 4)[0, 6], expected)


@torch.no_grad()
def test_positions_are_added_once_to_every_token():
    encoder = udapose.Encoder((8, 12), 4, 8, 1, 2)
    images = torch.randn(2, 3, 8, 12)
    tokens = encoder.patch_embed(udapose.patchify(images, 4)) + udapose.sincos_positions((2, 3), 8)[:, 1:]
    close(encoder.embed(images), torch.cat([encoder.cls_token.expand(2, 1, 8), tokens], 1))
    assert not any("pos_embed" in name for name, _ in encoder.named_parameters())  # fixed, not learned


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


# ==========================================================================================================
# Masking m^b and the decoder
# ==========================================================================================================
@pytest.mark.parametrize("N, r", [(36, 0.75), (256, 0.75), (36, 0.5), (36, 0.95), (24, 0.6)])
def test_masking(N, r):
    visible, restore, m = udapose.random_masking(torch.rand(3, N), r)
    assert visible.shape == (3, round((1 - r) * N))
    for b in range(3):
        assert sorted(restore[b].tolist()) == list(range(N))
        assert set(visible[b].tolist()) == {i for i in range(N) if m[b, i] == 0}  # 1 = masked
        for place, patch in enumerate(visible[b].tolist()):
            assert restore[b, patch] == place
    assert not torch.equal(m[0], m[1])  # each image its own


def test_masking_by_hand():
    """The largest noise is hidden: patches 2 and 0. Sequence [visible 1, 3 | masked 0, 2]: 0 is third."""
    visible, restore, m = udapose.random_masking(torch.tensor([[0.3, 0.1, 0.4, 0.2]]), 0.5)
    assert (visible.tolist(), restore.tolist(), m.tolist()) == ([[1, 3]], [[2, 0, 3, 1]], [[1, 0, 1, 0]])


@pytest.mark.parametrize("r", [0.0, 0.01, 0.99, 1.0])
def test_masking_nothing_or_everything_is_refused(r):
    with pytest.raises(ValueError, match=f"r = {r}"):
        udapose.random_masking(torch.rand(2, 16), r)


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


def test_decoder_puts_tokens_in_their_places():
    check_decoder_input(decoder_input)
    rejected(check_decoder_input, lambda d, latent, restore: decoder_input(d, latent, restore.argsort(1)))
    rejected(check_decoder_input, lambda d, latent, restore: decoder_input(d, latent, restore.flip(1)))
    rejected(check_decoder_input, lambda d, latent, _: decoder_input(d, latent, torch.arange(6).expand(2, 6)))
    rejected(check_decoder_input, lambda d, *given: decoder_input(d, *given) - d.decoder_pos_embed)


@torch.no_grad()
def test_decoder_predicts_from_its_own_tokens_without_the_class_token():
    """With its block switched off, f^D predicts from its normalised input without the first token."""
    decoder = udapose.Decoder((2, 3), 2, 8, 4, 1, 2)
    block = decoder.decoder_blocks[0]
    block.attn.proj.weight.zero_()
    block.mlp.fc2.weight.zero_()
    _, restore, _ = udapose.random_masking(torch.rand(2, 6), 0.5)
    latent = torch.randn(2, 4, 8)
    x = decoder_input(decoder, latent, restore)
    close(decoder(latent, restore), decoder.decoder_pred(F.layer_norm(x, (4,), eps=1e-6))[:, 1:])
    assert decoder(latent, restore).shape == (2, 6, 12)


def test_masked_pixels_are_never_seen():
    """The prediction depends on visible pixels only. Otherwise reconstruction would be copying."""
    encoder = udapose.Encoder((8, 12), 4, 8, 1, 2)
    mae = udapose.MaskedAutoencoder(encoder, udapose.Decoder(encoder.grid, 4, 8, 8, 1, 2))
    images = torch.randn(2, 3, 8, 12, requires_grad=True)
    predicted, m = mae(images, torch.rand(2, 6), 0.5)
    predicted.square().sum().backward()
    reached = udapose.patchify(images.grad, 4).abs().sum(-1) > 0
    assert torch.equal(reached, m == 0)
    assert mae.decoder.mask_token.grad.abs().sum() > 0


# ==========================================================================================================
# Backgrounds from X_C
# ==========================================================================================================
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
    check_background(udapose.replace_background)


@pytest.mark.parametrize("wrong", WRONG_BACKGROUNDS.values(), ids=WRONG_BACKGROUNDS.keys())
def test_background_check_rejects(wrong):
    rejected(check_background, wrong)


def test_tokens_of_a_forks_own_are_refused():
    """Register tokens that are not dropped would be taken for visible patches, and shift them all."""

    class WithRegisters(udapose.Encoder):
        def forward(self, images, visible=None):
            x = super().forward(images, visible)
            return torch.cat([x[:, :1], x.new_zeros(len(x), 2, self.width), x[:, 1:]], dim=1)

    encoder = WithRegisters((8, 12), 4, 8, 1, 2)
    mae = udapose.MaskedAutoencoder(encoder, udapose.Decoder(encoder.grid, 4, 8, 8, 1, 2))
    with pytest.raises(ValueError, match="returned 6 tokens for the class token and 3 visible patches"):
        mae(torch.randn(2, 3, 8, 12), torch.rand(2, 6), 0.5)
