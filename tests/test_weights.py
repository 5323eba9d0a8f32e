"""Public weights: files with the publishers' names and layouts, written here with random numbers.

They are loaded or refused. For each layout, an independent forward pass is compared with f^E.
"""

import argparse
import math
import os
import pickle
import re
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import udapose
from support.run import InputError
from support.weights import fit_positions, load_public_weights, read_tensors

close = torch.testing.assert_close


# ==========================================================================================================
# The publishers' layouts, with random numbers
# ==========================================================================================================
def linear(name, out, into):
    return {f"{name}.weight": torch.randn(out, into) / into**0.5, f"{name}.bias": torch.randn(out) / 4}


def norm(name, D):
    return {f"{name}.weight": 1 + torch.randn(D) / 4, f"{name}.bias": torch.randn(D) / 4}


def blocks(name, D, depth) -> dict:
    tensors = {}
    for i in range(depth):
        part = f"{name}.{i}"
        tensors |= norm(f"{part}.norm1", D) | norm(f"{part}.norm2", D)
        tensors |= linear(f"{part}.attn.qkv", 3 * D, D) | linear(f"{part}.attn.proj", D, D)
        tensors |= linear(f"{part}.mlp.fc1", 4 * D, D) | linear(f"{part}.mlp.fc2", D, 4 * D)
    return tensors


def vit(D=16, depth=2, patch=8, positions=None) -> dict:
    """What all ViT files share. `positions` (1, n + N, D), by default MAE's fixed ones on 4 x 4 patches."""
    positions = udapose.sincos_positions((4, 4), D) if positions is None else positions
    tensors = {"cls_token": torch.randn(1, 1, D), "pos_embed": positions}
    tensors |= {"patch_embed.proj.weight": torch.randn(D, 3, patch, patch) / patch}
    tensors |= {"patch_embed.proj.bias": torch.randn(D)}
    return tensors | blocks("blocks", D, depth) | norm("norm", D)


def mae_decoder(D=16, width=8, depth=1, patch=8) -> dict:
    tensors = {"mask_token": torch.randn(1, 1, width)}
    tensors |= {"decoder_pos_embed": udapose.sincos_positions((4, 4), width)}
    tensors |= linear("decoder_embed", width, D) | blocks("decoder_blocks", width, depth)
    return tensors | norm("decoder_norm", width) | linear("decoder_pred", 3 * patch**2, width)


def vitpose(tensors: dict) -> dict:
    """ViTPose: no class token but its position, `last_norm`, a head of its own."""
    names = {name: f"backbone.{name}" for name in tensors if name != "cls_token"}
    names |= {f"norm.{part}": f"backbone.last_norm.{part}" for part in ("weight", "bias")}
    head = {"keypoint_head.final_layer.weight": torch.randn(17, 16, 1, 1)}
    return {theirs: tensors[name] for name, theirs in names.items()} | head


def hugging_face(tensors: dict, base: str = "vit.") -> dict:
    """Hugging Face's names, query, key and value apart. The decoder's are those of ViTMAEForPreTraining."""
    names = {"cls_token": f"{base}embeddings.cls_token",
             "dist_token": f"{base}embeddings.distillation_token",
             "pos_embed": f"{base}embeddings.position_embeddings",
             "patch_embed.proj": f"{base}embeddings.patch_embeddings.projection",
             "blocks.": f"{base}encoder.layer.", "decoder_blocks.": "decoder.decoder_layers.",
             "norm.": f"{base}layernorm."}
    inside = {".norm1": ".layernorm_before", ".norm2": ".layernorm_after", ".mlp.fc1": ".intermediate.dense",
              ".mlp.fc2": ".output.dense", ".attn.proj": ".attention.output.dense",
              ".attn.qkv": ".attention.attention.qkv"}
    theirs = {}
    for name, tensor in tensors.items():
        new = f"decoder.{name}" if name.startswith(("decoder_", "mask_token")) else name
        for ours, start in names.items():
            if name.startswith(ours):
                new = start + name[len(ours) :]
        for ours, part in inside.items():
            new = new.replace(ours, part)
        if ".qkv." not in new:
            theirs[new] = tensor
            continue
        for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            theirs[new.replace(".qkv.", f".{part}.")] = rows.clone()
    return theirs


def networks(grid=(4, 4)):
    encoder = udapose.Encoder((8 * grid[0], 8 * grid[1]), 8, 16, 2, 2)
    return encoder, udapose.Decoder(grid, 8, 16, 8, 1, 2)


def saved(path, content):
    torch.save(content, path)
    return path


def copy_of(module) -> dict:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_holds(module, tensors: dict, but=()):
    for key, own in module.state_dict().items():
        if key not in but:
            close(own, tensors[key], rtol=0, atol=0, msg=key)


# ==========================================================================================================
# An independent forward pass, on the numbers of the file
# ==========================================================================================================
def resized(positions, rows, columns, grid):
    """Learned positions (N, D) on rows x columns patches, resized by Pillow, which also filters."""
    maps = positions.numpy().astype(np.float32).reshape(rows, columns, -1)
    maps = [np.asarray(Image.fromarray(maps[..., i]).resize(grid[::-1], Image.Resampling.BICUBIC))
            for i in range(maps.shape[2])]
    return torch.from_numpy(np.stack(maps, -1)).flatten(0, 1)


def vit_forward(tensors, images, positions, cls=None, padding=0, heads=2):
    """Tokens of a pre-norm ViT, in float64. positions (N, D) are added to the patches; cls (D) is first."""
    w = {key: tensor.double() for key, tensor in tensors.items()}
    P = w["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], P, padding)
    x = x.flatten(2).transpose(1, 2) + positions.double()
    if cls is not None:
        x = torch.cat([cls.double().expand(len(x), 1, -1), x], dim=1)
    D = x.shape[-1]
    for i in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))):
        p = {key.split(".", 2)[2]: value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        y = y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (heads, D // heads)) for part in y.chunk(3, dim=-1))
        A = torch.einsum("bihd,bjhd->bhij", q, k).div((D // heads) ** 0.5).softmax(-1)
        y = torch.einsum("bhij,bjhd->bihd", A, v).flatten(2)
        x = x + y @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return F.layer_norm(x, (D,), w["norm.weight"], w["norm.bias"], 1e-6).float()


def with_class_token(tensors, images, grid, n):
    """MAE, timm, DeiT, Hugging Face: n places before the patches, the class token's first, if any."""
    places = tensors["pos_embed"][0].double()
    side = math.isqrt(len(places) - n)
    positions = places[n:] if grid == (side, side) else resized(places[n:], side, side, grid)
    cls = tensors["cls_token"][0, 0] + (places[0] if n else 0)
    return vit_forward(tensors, images, positions, cls)


def learned(n):
    return torch.randn(1, n + 16, 16)


HEADS = linear("head", 10, 16) | linear("head_dist", 10, 16)
DIST = {"dist_token": torch.randn(1, 1, 16)}
LAYOUTS = {  # positions of the file, places before the patches, content of the file, its name
    "timm": (lambda: learned(1), 1, lambda t: t | HEADS, "timm.pth"),
    "timm, safetensors": (lambda: learned(1), 1, lambda t: t | HEADS, "model.safetensors"),
    "timm, no place for the class token": (lambda: learned(0), 0, lambda t: t, "timm.pth"),
    "DeiT": (lambda: learned(1), 1, lambda t: {"model": t | HEADS}, "deit.pth"),
    "DeiT, distilled": (lambda: learned(2), 2, lambda t: {"model": t | DIST | HEADS}, "deit.pth"),
    "Hugging Face ViT": (lambda: learned(1), 1, hugging_face, "pytorch_model.bin"),
    "Hugging Face ViTModel": (lambda: learned(1), 1, lambda t: hugging_face(t, ""), "model.safetensors"),
    "Hugging Face DeiT": (lambda: learned(2), 2, lambda t: hugging_face(t | DIST, "deit."), "deit.bin"),
}


def written(path, content):
    if path.suffix != ".safetensors":
        return saved(path, content)
    from safetensors.torch import save_file

    save_file(content, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("own_size", [True, False], ids=["own size", "another size"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_forward_pass_is_the_publishers(tmp_path, layout, own_size):
    positions, n, content, name = layout
    tensors = vit(positions=positions())
    side = math.isqrt(tensors["pos_embed"].shape[1] - n)
    grid = (side, side) if own_size else (7, 5)
    encoder, images = networks(grid)[0], torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    report = load_public_weights(written(tmp_path / name, content(tensors)), encoder)
    close(encoder(images), with_class_token(tensors, images, grid, n), rtol=0, atol=1e-4)
    assert any("learned" in line and own_size != ("resampled to 7 x 5" in line) for line in report)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (7, 5)], ids=["own size", "another size"])
@pytest.mark.parametrize("name", ["mae.pth", "model.safetensors", "pytorch_model.bin"])
def test_forward_pass_of_mae(tmp_path, grid, name):
    """Encoder and decoder, without masking. For the other size the sines and cosines are computed again."""
    tensors, (encoder, decoder) = vit() | mae_decoder(), networks(grid)
    if name == "mae.pth":
        path = mae_file(tmp_path, tensors)
    else:
        path = written(tmp_path / name, hugging_face(tensors))
    report = load_public_weights(path, encoder, decoder)
    assert report[0].startswith(f"used {len(tensors)} of {len(tensors)} tensors") and name in report[0]
    assert f"CRC-32 {zlib.crc32(path.read_bytes()):08x}" in report[0]
    assert "left" not in str(report) and "sines and cosines" in str(report)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for this file only
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    fixed = udapose.sincos_positions(grid, 16)[0, 1:]
    tokens = vit_forward(tensors, images, fixed, tensors["cls_token"][0, 0])
    close(encoder(images), tokens, rtol=0, atol=1e-4)
    parts = {key.removeprefix("decoder_"): w for key, w in tensors.items() if key.startswith("decoder_")}
    x = tokens @ parts["embed.weight"].T + parts["embed.bias"]
    # as a ViT whose patches are the pixels of a (B, 8, N, 1) image, and its embedding the identity
    cls, patches = x[:, 0], x[:, 1:].transpose(1, 2)[..., None]
    parts["patch_embed.proj.weight"] = torch.eye(8)[..., None, None]
    parts["patch_embed.proj.bias"] = torch.zeros(8)
    x = vit_forward(parts, patches, udapose.sincos_positions(grid, 8)[0, 1:], cls[:, None])
    order = torch.arange(grid[0] * grid[1]).expand(2, -1)
    predicted = x[:, 1:] @ parts["pred.weight"].T + parts["pred.bias"]
    close(decoder(tokens, order), predicted, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(16, 12), (10, 10)], ids=["own size", "another size"])
def test_forward_pass_of_vitpose(tmp_path, grid):
    """ViTPose has no class token, so our blocks run on the patches alone. It pads by 2 px: ours are moved."""
    tensors, (encoder, _) = vit(positions=torch.randn(1, 193, 16)), networks(grid)
    before = encoder.cls_token.clone()
    report = load_public_weights(saved(tmp_path / "vitpose.pth", {"state_dict": vitpose(tensors)}), encoder)
    assert any("attention maps" in line and "meaningless" in line for line in report)
    assert torch.equal(encoder.cls_token, before) and (encoder.pos_embed[:, 0] == 0).all()
    images, places = torch.randn(2, 3, 8 * grid[0], 8 * grid[1]), tensors["pos_embed"][0]
    positions = places[1:] + places[:1]
    positions = positions if grid == (16, 12) else resized(positions, 16, 12, grid)
    x = encoder.embed(F.pad(images, (2, -2, 2, -2)))[:, 1:]
    for block in encoder.blocks:
        x, _ = block(x)
    close(encoder.norm(x), vit_forward(tensors, images, positions, padding=2), rtol=0, atol=1e-4)


# ==========================================================================================================
# Files that fit
# ==========================================================================================================
def mae_file(tmp_path, tensors):
    """As published: with the optimiser, the epoch and the arguments of the run, an argparse.Namespace."""
    content = {"model": tensors, "optimizer": {"state": {}, "param_groups": []}, "epoch": 799,
               "args": argparse.Namespace(lr=1.5e-4, mask_ratio=0.75)}
    return saved(tmp_path / "mae.pth", content)


def test_blocks_without_a_place_here_are_left(tmp_path):
    tensors, (encoder, decoder) = vit() | mae_decoder(depth=8), networks()
    report = load_public_weights(mae_file(tmp_path, tensors), encoder, decoder)
    assert_holds(encoder, tensors)
    assert_holds(decoder, tensors)
    assert "left in the file, no such part here: decoder_blocks" in report


@pytest.mark.parametrize("theirs, says", [
    (None, "mask_token"),
    (dict(width=12), "mask_token is (1, 1, 12) in the file and (1, 1, 8) here"),
    (dict(patch=4), "decoder_pred.weight is (48, 8) in the file and (192, 8) here"),
    (dict(depth=0), "there is no decoder_blocks.0.norm1.weight (8,)")])
def test_a_decoder_that_does_not_fit_is_left(tmp_path, theirs, says):
    """It is no error: f^E is filled, f^D keeps its initial values, and the report says so."""
    tensors, (encoder, decoder) = vit() | (mae_decoder(**theirs) if theirs else {}), networks()
    before = copy_of(decoder)
    report = load_public_weights(mae_file(tmp_path, tensors), encoder, decoder)
    assert_holds(encoder, tensors)
    assert_holds(decoder, before)
    assert any(line.startswith("f^D keeps its initial values") and says in line for line in report)
    assert not any("decoder_pos_embed" in line and "sines" in line for line in report)


PLACES = [(16, 0, (4, 4)), (37, 1, (6, 6)), (198, 2, (14, 14)), (577, 1, (24, 24)), (49, 0, (7, 7)),
          (192, 0, (16, 12)), (193, 1, (16, 12)), (194, 2, (16, 12)), (769, 1, (32, 24))]


@pytest.mark.parametrize("count, n, grid", PLACES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_places_before_the_patches_and_grids(count, n, grid, kind):
    """0, 1 or 2 places, square or 4:3 grids, any floating type. Learned ones are kept, sines recognised."""
    positions = torch.randn(1, count, 8).to(kind)
    ours, how = fit_positions(positions, grid, 8, class_token=True)
    assert how == f"learned, {n} + {grid[0]} x {grid[1]} positions"
    close(ours[:, 1:], positions[:, n:].float(), rtol=0, atol=0)
    close(ours[:, 0], positions[:, 0].float() if n else torch.zeros(1, 8), rtol=0, atol=0)
    fixed = torch.cat([torch.zeros(1, n, 8), udapose.sincos_positions(grid, 8)[:, 1:]], dim=1).to(kind)
    ours, how = fit_positions(fixed, (5, 9), 8, class_token=True)
    assert how == "sines and cosines, computed for 5 x 9 patches"
    close(ours[0, 1:], udapose.sincos_positions((5, 9), 8)[0, 1:])


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "model.", "encoder.", "backbone.", "module._orig_mod.", "_orig_mod.module.",
    "model.backbone.", "module.model.encoder.backbone."])
@pytest.mark.parametrize("names", [dict, hugging_face], ids=["timm", "Hugging Face"])
def test_any_stack_of_wrappers(tmp_path, prefix, names):
    """`module.` is from DistributedDataParallel, `_orig_mod.` from torch.compile, the others from classes."""
    tensors, (encoder, decoder) = vit() | mae_decoder(), networks()
    wrapped = {prefix + key: tensor for key, tensor in names(tensors).items()}
    report = load_public_weights(saved(tmp_path / "wrapped.pth", {"model": wrapped}), encoder, decoder)
    assert_holds(encoder, tensors)
    assert_holds(decoder, tensors)
    assert report[0].startswith(f"used {len(tensors)} of {len(tensors)} tensors")


@pytest.mark.parametrize("kind", ["zip", "old", "old, by NumPy 1"])
def test_a_file_with_numpy_scalars(tmp_path, kind):
    tensors, (encoder, _) = vit(), networks()
    scalars = {"best": np.float64(0.75), "epoch": np.int64(9), "loss": np.float32(1), "done": np.True_}
    path = tmp_path / "a.pth"
    torch.save({"model": tensors} | scalars, path, _use_new_zipfile_serialization=kind == "zip")
    if kind == "old, by NumPy 1":
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    load_public_weights(path, encoder)
    assert_holds(encoder, tensors)
    assert np.dtype not in torch.serialization.get_safe_globals()


# ==========================================================================================================
# Files that do not fit: one line that names the file, the tensor and both shapes; nothing is loaded
# ==========================================================================================================
def without(tensors, *parts):
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


CLIP = {"visual.class_embedding": torch.ones(16), "visual.conv1.weight": torch.ones(16, 3, 8, 8)}
MISFITS = {  # tensors of the file, and what the message has to contain besides the file's name
    "wider": (lambda: vit(D=24), ["cls_token", "(1, 1, 24)", "(1, 1, 16)"]),
    "another patch": (lambda: vit(patch=4), ["patch_embed.proj.weight", "(16, 3, 4, 4)", "(16, 3, 8, 8)"]),
    "shallower": (lambda: vit(depth=1), ["blocks.1.norm1.weight", "(16,)"]),
    "deeper": (lambda: vit(depth=3), ["blocks.2.norm1.weight", "deeper"]),
    "LayerScale": (lambda: vit() | {"blocks.0.ls1.gamma": torch.ones(16)},
                   ["blocks.0.ls1.gamma", "another kind"]),
    "BEiT": (lambda: without(vit(), "qkv.bias") | {"blocks.0.attn.q_bias": torch.ones(16)},
             ["blocks.0.attn.qkv.bias", "(48,)"]),
    "CLIP": (lambda: CLIP, ["patch_embed.proj.weight", "visual.class_embedding"]),
    "no key": (lambda: without(hugging_face(vit()), "layer.1.attention.attention.key"),
               ["blocks.1.attn.qkv.weight", "(48, 16)"]),
    "strange positions": (lambda: vit(positions=torch.randn(1, 8, 16)), ["pos_embed", "8 positions"]),
    "narrow positions": (lambda: vit(positions=torch.randn(1, 17, 12)), ["pos_embed", "(1, 17, 12)", "16"]),
    "whole numbers": (lambda: vit() | {"norm.weight": torch.ones(16).long()}, ["norm.weight", "torch.int64"]),
    "twice": (lambda: vit() | {"module.norm.weight": torch.ones(16)}, ["norm.weight", "module.norm.weight"]),
}


@pytest.mark.parametrize("tensors, says", MISFITS.values(), ids=MISFITS.keys())
def test_a_file_that_does_not_fit_is_refused(tmp_path, tensors, says):
    """The line also says which layouts are read."""
    path = saved(tmp_path / "misfit.pth", {"model": tensors() | mae_decoder()})
    encoder, decoder = networks()
    before = copy_of(encoder), copy_of(decoder)
    with pytest.raises(InputError) as error:
        load_public_weights(path, encoder, decoder)
    text = str(error.value)
    assert "misfit.pth" in text and "\n" not in text
    for part in [*says, "MAE, timm, DeiT, ViTPose and Hugging Face"]:
        assert part in text, text
    assert_holds(encoder, before[0])
    assert_holds(decoder, before[1])


@pytest.mark.parametrize("key, value", [("blocks.1.mlp.fc2.weight", math.nan), ("pos_embed", math.inf),
                                        ("decoder_embed.bias", -math.inf)])
def test_values_that_are_not_finite_are_refused(tmp_path, key, value):
    """Neither .safetensors nor old .pth files have checksums. Values that are not used are not checked."""
    tensors = vit() | mae_decoder()
    tensors[key].view(-1)[5] = value
    for name in ("mae.pth", "mae.safetensors"):
        with pytest.raises(InputError, match=f"{name}: f.*{key} has values that are not finite"):
            load_public_weights(written(tmp_path / name, tensors), *networks())
    unused = vit() | {"head.weight": torch.tensor([value])}
    load_public_weights(saved(tmp_path / "unused.pth", unused), networks()[0])


def refused_in_one_line(path, words):
    with pytest.raises(InputError, match=f"{path.name}: {words}") as error:
        read_tensors(path)
    assert "\n" not in str(error.value)


def test_files_that_are_truncated_or_something_else(tmp_path):
    """Parts of a file, a web page, the pointer of git-lfs, bytes; no file; a file without named tensors."""
    saved(tmp_path / "zip.pth", vit())
    torch.save(vit(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    written(tmp_path / "a.safetensors", vit())
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        parts = [whole[: int(share * len(whole))] for share in (0.0, 0.01, 0.3, 0.99)]
        for content in (*parts, b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs", bytes(400)):
            path.write_bytes(content)
            refused_in_one_line(path, ".*read")
        path.unlink()
        refused_in_one_line(path, ".*No such file")
    for content in ({}, {"model": {}}, {"epoch": 3}, [1, 2], torch.ones(3), {"model": 5}):
        refused_in_one_line(saved(tmp_path / "x.pth", content), "contains no named tensors")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = pickle.dumps(Malicious())
    (tmp_path / "bare.pth").write_bytes(bare)
    saved(tmp_path / "zip.pth", {"model": vit() | {"cls_token": Malicious()}})
    torch.save({"model": Malicious()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("bare.pth", "zip.pth", "old.pth"):
        with pytest.raises(InputError, match=f"{name}: .*read safely"):
            load_public_weights(tmp_path / name, networks()[0])
    assert not os.path.exists("it ran")
    pickle.loads(bare)
    assert os.path.exists("it ran"), "the fixture was harmless: this test showed nothing"


def test_what_is_refused_is_named_with_the_remedy(tmp_path, monkeypatch):
    """Objects of a training framework, as NumPy arrays; the checkpoint of a run; a missing library."""
    saved(tmp_path / "a.pth", {"state_dict": vit(), "history": np.ones(3)})
    saved(tmp_path / "checkpoint.pt", {"encoder": vit(), "optimiser": {}, "settings": {}})
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for words in (r"a.pth: .*contains numpy\S+_reconstruct; save its tensors alone",
                  "checkpoint.pt: the checkpoint of a run.*give the run's folder",
                  "a.safetensors.*pip install safetensors"):
        name = re.match("[a-z]+.[a-z]+", words)[0]
        with pytest.raises(InputError, match=words):
            load_public_weights(tmp_path / name, networks()[0])
