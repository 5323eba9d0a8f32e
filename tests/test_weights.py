"""Public weights: files in the layouts of MAE, timm and ViTPose, written here: loaded, or refused."""
import argparse
import os
import pickle
import sys

import pytest
import torch

import udapose as u

close = torch.testing.assert_close


# ==========================================================================================================
# The publishers' layouts, with random numbers
# ==========================================================================================================
def linear(name, out, into):
    return {f"{name}.weight": torch.randn(out, into), f"{name}.bias": torch.randn(out)}


def norm(name, D):
    return {f"{name}.weight": torch.randn(D), f"{name}.bias": torch.randn(D)}


def blocks(name, D, depth) -> dict:
    tensors = {}
    for i in range(depth):
        part = f"{name}.{i}"
        tensors |= norm(f"{part}.norm1", D) | norm(f"{part}.norm2", D)
        tensors |= linear(f"{part}.attn.qkv", 3 * D, D) | linear(f"{part}.attn.proj", D, D)
        tensors |= linear(f"{part}.mlp.fc1", 4 * D, D) | linear(f"{part}.mlp.fc2", D, 4 * D)
    return tensors


def vit(D=16, depth=2, patch=8, positions=None) -> dict:
    """What all ViT files share; `positions` (1, 1 + N, D), by default MAE's fixed ones on 4 x 4 patches."""
    positions = u.sincos_positions((4, 4), D) if positions is None else positions
    tensors = {"cls_token": torch.randn(1, 1, D), "pos_embed": positions}
    tensors |= {"patch_embed.proj.weight": torch.randn(D, 3, patch, patch)}
    tensors |= {"patch_embed.proj.bias": torch.randn(D)}
    return tensors | blocks("blocks", D, depth) | norm("norm", D)


def mae_decoder(D=16, width=8, depth=1, patch=8) -> dict:
    tensors = {"mask_token": torch.randn(1, 1, width), "decoder_pos_embed": u.sincos_positions((4, 4), width)}
    tensors |= linear("decoder_embed", width, D) | blocks("decoder_blocks", width, depth)
    return tensors | norm("decoder_norm", width) | linear("decoder_pred", 3 * patch ** 2, width)


def networks(grid=(4, 4)):
    encoder = u.Encoder((8 * grid[0], 8 * grid[1]), 8, 16, 2, 2)
    return encoder, u.Decoder(grid, 8, 16, 8, 1, 2)


def saved(path, content):
    torch.save(content, path)
    return path


def assert_holds(module, tensors: dict, but=()):
    for key, own in module.state_dict().items():
        if key not in but: close(own, tensors[key], rtol=0, atol=0, msg=key)


# ==========================================================================================================
# Files that fit
# ==========================================================================================================
def mae_file(tmp_path, tensors):
    """As published: with the optimiser, the epoch and the arguments of the run, an argparse.Namespace."""
    return saved(tmp_path / "mae.pth", {
        "model": tensors, "optimizer": {"state": {}, "param_groups": []}, "epoch": 799,
        "scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=1.5e-4, mask_ratio=0.75)})


def test_mae_with_decoder(tmp_path):
    tensors, (encoder, decoder) = vit() | mae_decoder(), networks()
    report = u.load_public_weights(mae_file(tmp_path, tensors), encoder, decoder)
    assert_holds(encoder, tensors), assert_holds(decoder, tensors)
    assert report[0].startswith(f"used {len(tensors)} of {len(tensors)} tensors") and "mae.pth" in report[0]
    assert any("recomputed" in line for line in report) and not any("left" in line for line in report)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()      # allowed for this file only


def test_mae_into_the_encoder_alone_leaves_the_decoder(tmp_path):
    tensors, (encoder, _) = vit() | mae_decoder(), networks()
    report = u.load_public_weights(mae_file(tmp_path, tensors), encoder)
    assert_holds(encoder, tensors)
    left = next(line for line in report if line.startswith("left in the file"))
    assert all(part in left for part in ("decoder_blocks", "decoder_embed", "mask_token"))


def test_mae_without_decoder_says_that_the_decoder_starts_afresh(tmp_path):
    tensors, (encoder, decoder) = vit(), networks()
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    report = u.load_public_weights(mae_file(tmp_path, tensors), encoder, decoder)
    assert_holds(encoder, tensors), assert_holds(decoder, before)
    assert any("not in the file" in line and "mask_token" in line for line in report)


def test_mae_with_eight_decoder_blocks_leaves_the_surplus(tmp_path):
    tensors, (encoder, decoder) = vit() | mae_decoder(depth=8), networks()
    report = u.load_public_weights(mae_file(tmp_path, tensors), encoder, decoder)
    assert_holds(encoder, tensors), assert_holds(decoder, tensors)
    assert any(line.startswith("left in the file") and "decoder_blocks" in line for line in report)


def test_fixed_positions_are_recomputed_for_another_grid(tmp_path):
    tensors, (encoder, decoder) = vit() | mae_decoder(), networks((2, 3))
    report = u.load_public_weights(mae_file(tmp_path, tensors), encoder, decoder)
    close(encoder.pos_embed, u.sincos_positions((2, 3), 16))
    close(decoder.decoder_pos_embed, u.sincos_positions((2, 3), 8))
    assert_holds(encoder, tensors, but=["pos_embed"])
    assert_holds(decoder, tensors, but=["decoder_pos_embed"])
    assert "pos_embed: recomputed: sines and cosines" in report


def test_timm_on_its_own_grid(tmp_path):
    """timm stores the tensors bare, with learned positions and a classifier."""
    tensors = vit(positions=torch.randn(1, 17, 16)) | linear("head", 10, 16)
    encoder, _ = networks()
    report = u.load_public_weights(saved(tmp_path / "timm.pth", tensors), encoder)
    assert_holds(encoder, tensors, but=["pos_embed"])
    close(encoder.pos_embed, tensors["pos_embed"], rtol=0, atol=1e-5)
    assert any("learned" in line for line in report) and "left in the file, no such part here: head" in report
    assert not any("meaningless" in line for line in report)


def test_learned_positions_are_resampled(tmp_path):
    """Channel 0 knows its row of 4, channel 1 its column, and so they must on 8 x 6 patches."""
    positions = torch.zeros(1, 17, 16)
    positions[0, 1:, 0] = torch.arange(4.0).repeat_interleave(4)
    positions[0, 1:, 1] = torch.arange(4.0).repeat(4)
    positions[0, 1:, 2] = 7.0                                              # a constant stays one
    positions[0, 0] = torch.randn(16)                                      # the class token's stays
    encoder, _ = networks((8, 6))
    u.load_public_weights(saved(tmp_path / "timm.pth", vit(positions=positions)), encoder)
    close(encoder.pos_embed[0, 0], positions[0, 0])
    rows, columns, constant = (encoder.pos_embed[0, 1:, i].view(8, 6) for i in range(3))
    close(constant, torch.full((8, 6), 7.0))
    close(rows, rows[:, :1].expand(8, 6)), close(columns, columns[:1].expand(8, 6))
    assert (rows[:, 0].diff() > 0).all() and (columns[0].diff() > 0).all()
    # half-pixel alignment: new row i of 8 lies at (i + 0.5) / 2 - 0.5 of 4
    close(rows[2:6, 0], (torch.arange(2, 6) + 0.5) / 2 - 0.5, rtol=0, atol=0.1)
    close(rows[:, 0] + rows[:, 0].flip(0), torch.full((8,), 3.0))


def test_safetensors(tmp_path):
    from safetensors.torch import save_file
    tensors, (encoder, _) = vit(positions=torch.randn(1, 17, 16)) | linear("head", 10, 16), networks()
    save_file(tensors, tmp_path / "timm.safetensors")
    u.load_public_weights(tmp_path / "timm.safetensors", encoder)
    assert_holds(encoder, tensors, but=["pos_embed"])


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(u.InputError, match="a.safetensors.*pip install safetensors"):
        u.load_public_weights(tmp_path / "a.safetensors", networks()[0])


def vitpose(grid=(16, 12)) -> dict:
    """ViTPose: prefixes, no class token but its position, `last_norm`, upright crops, a head of its own."""
    tensors = vit(positions=torch.randn(1, 1 + grid[0] * grid[1], 16))
    del tensors["cls_token"]
    tensors = {f"backbone.{k.replace('norm.', 'last_norm.') if k.startswith('norm.') else k}": v
               for k, v in tensors.items()}
    return tensors | {"keypoint_head.final_layer.weight": torch.randn(17, 16, 1, 1)}


def test_vitpose(tmp_path):
    tensors, (encoder, _) = vitpose(), networks((16, 12))
    before = encoder.cls_token.clone()
    path = saved(tmp_path / "vitpose.pth", {"meta": {"epoch": 210}, "state_dict": tensors})
    report = u.load_public_weights(path, encoder)
    own = {k.removeprefix("backbone.").replace("last_norm", "norm"): v for k, v in tensors.items()}
    assert_holds(encoder, own, but=["cls_token", "pos_embed"])
    close(encoder.cls_token, before, rtol=0, atol=0)
    positions = own["pos_embed"]                                           # the first is added to every patch
    close(encoder.pos_embed[:, 1:], positions[:, 1:] + positions[:, :1], rtol=0, atol=1e-5)
    assert (encoder.pos_embed[:, 0] == 0).all()
    assert any("attention maps" in line and "meaningless" in line for line in report)
    assert any("left in the file" in line and "keypoint_head" in line for line in report)
    assert any("learned" in line and "(16, 12)" in line for line in report)


def test_vitpose_on_a_square_grid(tmp_path):
    encoder, _ = networks((4, 4))
    u.load_public_weights(saved(tmp_path / "vitpose.pth", {"state_dict": vitpose()}), encoder)
    assert encoder.pos_embed.shape == (1, 17, 16) and encoder.pos_embed[:, 1:].abs().sum() > 0


def test_half_precision_and_wrapped_names(tmp_path):
    """`module.` is what DistributedDataParallel leaves; a half file becomes float32."""
    tensors, (encoder, _) = {k: v.half() for k, v in vit().items()}, networks()
    path = saved(tmp_path / "ddp.pth", {"model": {f"module.{k}": v for k, v in tensors.items()}})
    u.load_public_weights(path, encoder)
    assert_holds(encoder, {k: v.float() for k, v in tensors.items()}, but=["pos_embed"])
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


# ==========================================================================================================
# Files that do not fit: one error that names the file, the first key and both shapes; nothing is loaded
# ==========================================================================================================
def without(tensors, *parts): return {k: v for k, v in tensors.items() if not any(p in k for p in parts)}


MISFITS = {  # tensors of the file, and what the message has to contain beside the file's name
    "wider": (lambda: vit(D=24), ["pos_embed", "(1, 17, 24)", "16"]),
    "another patch": (lambda: vit(patch=4), ["patch_embed.proj.weight", "(16, 3, 4, 4)", "(16, 3, 8, 8)"]),
    "shallower": (lambda: vit(depth=1), ["blocks.1.norm1.weight", "(16,)"]),
    "deeper": (lambda: vit(depth=3), ["blocks.2.norm1.weight", "(16,)"]),
    "LayerScale": (lambda: vit() | {"blocks.0.ls1.gamma": torch.ones(16)}, ["blocks.0.ls1.gamma", "(16,)"]),
    "no patches": (lambda: without(vit(), "patch_embed"), ["patch_embed.proj.weight", "(16, 3, 8, 8)"]),
    "no bias": (lambda: without(vit(), "qkv.bias"), ["blocks.0.attn.qkv.bias", "(48,)"]),
    "another network": (lambda: linear("layer1", 8, 8), ["patch_embed.proj.weight", "layer1.weight"]),
    "wider decoder": (lambda: vit() | mae_decoder(width=12), ["mask_token", "(1, 1, 12)", "(1, 1, 8)"]),
    "strange positions": (lambda: vit(positions=torch.randn(1, 8, 16)), ["pos_embed", "7 positions"]),
    "narrow positions": (lambda: vit(positions=torch.randn(1, 17, 12)), ["pos_embed", "(1, 17, 12)", "16"]),
    "flat positions": (lambda: vit(positions=torch.randn(17, 16)), ["pos_embed", "(17, 16)"]),
}


@pytest.mark.parametrize("tensors, says", MISFITS.values(), ids=MISFITS.keys())
def test_a_file_that_does_not_fit_is_refused(tmp_path, tensors, says):
    path, (encoder, decoder) = saved(tmp_path / "misfit.pth", {"model": tensors()}), networks()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(u.InputError) as error: u.load_public_weights(path, encoder, decoder)
    text = str(error.value)
    assert "misfit.pth" in text and "\n" not in text
    for part in says: assert part in text, text
    assert_holds(encoder, before)


def test_no_such_file(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(u.InputError, match=f"{name}: no such file"): u.read_weights(tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_files(tmp_path, share):
    from safetensors.torch import save_file
    saved(tmp_path / "zip.pth", vit())
    torch.save(vit(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(vit(), tmp_path / "cut.safetensors")
    for name in ("zip.pth", "old.pth", "cut.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(u.InputError, match=f"{name}: .*read") as error: u.read_weights(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"\x00" * 400, bytes(range(256)), b"."])
def test_files_that_are_something_else(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(u.InputError, match="other.pth") as error: u.read_weights(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [1, 2], torch.ones(3), {"model": 5}])
def test_files_without_named_tensors(tmp_path, content):
    with pytest.raises(u.InputError, match="x.pth: holds no named tensors"):
        u.read_weights(saved(tmp_path / "x.pth", content))


class Malicious:
    """Unpickled, it calls function(argument)."""

    def __init__(self, function, argument): self.call = function, (argument,)

    def __reduce__(self): return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "it ran"
    for i, attack in enumerate([Malicious(os.mkdir, str(marker)), Malicious(os.system, f"mkdir '{marker}'")]):
        (tmp_path / f"bare{i}.pth").write_bytes(pickle.dumps(attack))
        saved(tmp_path / f"zip{i}.pth", {"model": vit() | {"cls_token": attack}})
        torch.save({"model": attack}, tmp_path / f"old{i}.pth", _use_new_zipfile_serialization=False)
        for name in (f"bare{i}.pth", f"zip{i}.pth", f"old{i}.pth"):
            with pytest.raises(u.InputError, match=f"{name}: .*read safely"):
                u.load_public_weights(tmp_path / name, networks()[0])
            assert not marker.exists()
    pickle.loads((tmp_path / "bare0.pth").read_bytes())
    assert marker.exists(), "the fixture was harmless: this test showed nothing"
