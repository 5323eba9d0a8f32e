"""Public weights: files with the publishers' names and layouts, written here with random numbers.

They are loaded or refused. For MAE, an independent forward pass is compared with f^E and f^D.
"""

import argparse
import copy
import math
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


# ==== The publishers' layouts, with random numbers ======================================================
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
    names = {r"^(decoder_|mask_token)": r"decoder.\1",
             r"^decoder\.decoder_blocks": "decoder.decoder_layers",
             "^cls_token": f"{base}embeddings.cls_token",
             "^dist_token": f"{base}embeddings.distillation_token",
             "^pos_embed": f"{base}embeddings.position_embeddings",
             r"^patch_embed\.proj": f"{base}embeddings.patch_embeddings.projection",
             r"^blocks\.": f"{base}encoder.layer.", r"^norm\.": f"{base}layernorm.",
             r"\.norm1": ".layernorm_before", r"\.norm2": ".layernorm_after",
             r"\.mlp\.fc1": ".intermediate.dense", r"\.mlp\.fc2": ".output.dense",
             r"\.attn\.proj": ".attention.output.dense", r"\.attn\.qkv": ".attention.attention.qkv"}
    theirs = {}
    for name, tensor in tensors.items():
        for ours, new in names.items():
            name = re.sub(ours, new, name)
        parts = ("query", "key", "value") if ".qkv." in name else ("qkv",)
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            theirs[name.replace(".qkv.", f".{part}.")] = rows.clone()
    return theirs


def networks(grid=(4, 4)):
    encoder = udapose.Encoder((8 * grid[0], 8 * grid[1]), 8, 16, 2, 2)
    return encoder, udapose.Decoder(grid, 8, 16, 8, 1, 2)


def saved(path, content):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def assert_holds(module, tensors: dict, but=None):
    for key, own in module.state_dict().items():
        if key != but:
            close(own, tensors[key], rtol=0, atol=0, msg=key)


# ==== What is loaded: a forward pass for MAE, the tensors for the other layouts =========================
def transformer(tensors, x, heads=2):
    """Tokens x (B, T, D) after all blocks, which are torch's own, and the last norm of a pre-norm ViT."""
    D, ours = x.shape[-1], {"in_proj_": "qkv.", "self_attn.out_proj": "attn.proj", "self_attn.": "attn."}
    ours |= {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    for i in range(1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))):
        layer = torch.nn.TransformerEncoderLayer(D, heads, 4 * D, 0, "gelu", 1e-6, True, norm_first=True)
        for name, parameter in layer.named_parameters():
            for theirs, new in ours.items():
                name = name.replace(theirs, new)
            parameter.copy_(tensors[f"blocks.{i}.{name}"])
        x = layer(x)
    return F.layer_norm(x, (D,), tensors["norm.weight"], tensors["norm.bias"], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_forward_pass_of_mae(tmp_path, learned):
    """Encoder and decoder, without masking. For another size the sines and cosines are computed again."""
    grid, own = ((4, 4), torch.randn(1, 17, 16)) if learned else ((7, 5), None)
    tensors, (encoder, decoder) = vit(positions=own) | mae_decoder(), networks(grid)
    path = mae_file(tmp_path, tensors)
    report = load_public_weights(path, encoder, decoder)
    assert report[0].startswith(f"used {len(tensors)} of {len(tensors)} tensors of {path} (CRC-32 ")
    assert f"{zlib.crc32(path.read_bytes()):08x}" in report[0]
    assert "left" not in str(report) and "sines and cosines" in str(report)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for this file only
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    x = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=8)
    x = torch.cat([tensors["cls_token"].expand(2, 1, 16), x.flatten(2).mT], dim=1)
    tokens = transformer(tensors, x + (own if learned else udapose.sincos_positions(grid, 16)))
    close(encoder(images), tokens, rtol=0, atol=1e-4)
    parts = {key.removeprefix("decoder_"): w for key, w in tensors.items() if key.startswith("decoder_")}
    x = F.linear(tokens, parts["embed.weight"], parts["embed.bias"]) + udapose.sincos_positions(grid, 8)
    predicted = F.linear(transformer(parts, x), parts["pred.weight"], parts["pred.bias"])
    order = torch.arange(grid[0] * grid[1]).expand(2, -1)
    close(decoder(tokens, order), predicted[:, 1:], rtol=0, atol=1e-4)


HEADS = linear("head", 10, 16) | linear("head_dist", 10, 16)
DIST = {"dist_token": torch.randn(1, 1, 16)}
LAYOUTS = {  # places before the patches, the publisher's names
    "timm": (1, lambda t: t | HEADS),
    "timm, no place for the class token": (0, dict),
    "DeiT, distilled": (2, lambda t: t | DIST | HEADS),
    "Hugging Face ViT": (1, hugging_face),
    "Hugging Face ViTModel": (1, lambda t: hugging_face(t, "")),
    "Hugging Face DeiT": (2, lambda t: hugging_face(t | DIST, "deit.")),
}


@pytest.mark.parametrize("n, theirs", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tensors_of_each_layout(tmp_path, n, theirs):
    tensors = vit(positions=torch.randn(1, n + 16, 16))
    for path, content in (("a.pth", {"model": theirs(tensors)}), ("a.safetensors", theirs(tensors))):
        encoder, _ = networks()
        load_public_weights(saved(tmp_path / path, content), encoder)
        assert_holds(encoder, tensors, but="pos_embed")
        close(encoder.pos_embed[:, 1:], tensors["pos_embed"][:, n:], rtol=0, atol=0)


def test_tensors_of_vitpose(tmp_path):
    """No class token, but its position, which is added to all patches."""
    tensors, (encoder, _) = vit(positions=torch.randn(1, 193, 16)), networks((16, 12))
    before = encoder.cls_token.clone()
    report = load_public_weights(saved(tmp_path / "vitpose.pth", {"state_dict": vitpose(tensors)}), encoder)
    assert any("attention maps" in line and "meaningless" in line for line in report)
    assert_holds(encoder, tensors | {"cls_token": before}, but="pos_embed")
    close(encoder.pos_embed[:, 1:], tensors["pos_embed"][:, 1:] + tensors["pos_embed"][:, :1], rtol=0, atol=0)
    assert (encoder.pos_embed[:, 0] == 0).all()


def test_learned_positions_are_resized_as_pillow_does():
    """It filters where the grid shrinks: here from 16 rows to 10, and from 12 columns to 14."""
    positions = torch.randn(1, 193, 8)
    ours, how = fit_positions(positions, (10, 14), 8, class_token=True)
    assert how == "learned, 1 + 16 x 12 positions, resampled to 10 x 14"
    maps = positions[0, 1:].unflatten(0, (16, 12)).numpy()
    maps = [Image.fromarray(maps[..., i]).resize((14, 10), Image.Resampling.BICUBIC) for i in range(8)]
    close(ours[0, 1:], torch.from_numpy(np.stack(maps, -1)).flatten(0, 1), rtol=0, atol=1e-5)
    close(ours[:, 0], positions[:, 0], rtol=0, atol=0)


# ==== Files that fit ====================================================================================
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
    (mae_decoder(width=12), "mask_token is (1, 1, 12) in the file and (1, 1, 8) here"),
    (mae_decoder(depth=0), "there is no decoder_blocks.0.norm1.weight (8,)")], ids=["wider", "shallower"])
def test_a_decoder_that_does_not_fit_is_left(tmp_path, theirs, says):
    """It is no error: f^E is filled, f^D keeps its initial values, and the report says so."""
    tensors, (encoder, decoder) = vit() | theirs, networks()
    before = copy.deepcopy(decoder.state_dict())
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


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "model.encoder.backbone."])
@pytest.mark.parametrize("names", [dict, hugging_face], ids=["timm", "Hugging Face"])
def test_any_stack_of_wrappers(tmp_path, prefix, names):
    """`module.` is from DistributedDataParallel, `_orig_mod.` from torch.compile, the others from classes."""
    tensors, (encoder, decoder) = vit() | mae_decoder(), networks()
    wrapped = {prefix + key: tensor for key, tensor in names(tensors).items()}
    report = load_public_weights(saved(tmp_path / "wrapped.pth", {"encoder": wrapped}), encoder, decoder)
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


# ==== Files that do not fit: one line that names the file, the tensor and both shapes; nothing is loaded
MISFITS = {  # tensors of the file, and what the message has to contain besides the file's name
    "wider": (lambda: vit(D=24), ["cls_token", "(1, 1, 24)", "(1, 1, 16)"]),
    "shallower": (lambda: vit(depth=1), ["blocks.1.norm1.weight (16,)", "begins with cls_token, pos_embed"]),
    "deeper": (lambda: vit(depth=3), ["blocks.2.norm1.weight", "deeper"]),
    "no key": (lambda: {k: t for k, t in hugging_face(vit()).items() if "1.attention.attention.key" not in k},
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
    before = copy.deepcopy((encoder.state_dict(), decoder.state_dict()))
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
            load_public_weights(saved(tmp_path / name, tensors), *networks())
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
    saved(tmp_path / "a.safetensors", vit())
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
