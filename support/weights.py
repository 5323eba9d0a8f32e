"""Load public ViT weights into f^E and f^D: what `--init FILE` does in both training scripts.

Our modules have the tensor names and shapes of MAE and timm. Those of Hugging Face and ViTPose are adapted.
ViTPose pads its images by 2 px before it cuts patches. We do not, which amounts to a crop moved by 2 px.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.run import InputError, file_checksum, first_line, require_finite, torch_load
from udapose import Decoder, Encoder, sincos_positions

READ = "plain ViTs are read as MAE, timm, DeiT, ViTPose and Hugging Face (ViT, DeiT, MAE, ViTPose) save them"
WRAPPERS = re.compile(
    r"^((module|_orig_mod|model|encoder|backbone|vit|deit|embeddings)\.|decoder\.(?=decoder_|mask_))+"
)
RENAMED = {  # pattern in the names of Hugging Face or ViTPose: name in MAE and timm
    r"^position_embeddings": "pos_embed",
    r"^patch_embeddings\.projection": "patch_embed.proj",
    r"^(decoder_)?(encoder\.)?layers?\.(?=\d)": r"\1blocks.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.(attention\.query|q_proj)\.": ".attn.query.",
    r"\.attention\.(attention\.key|k_proj)\.": ".attn.key.",
    r"\.attention\.(attention\.value|v_proj)\.": ".attn.value.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"^(layernorm|last_norm)\.": "norm.",
}
# A NumPy scalar, such as the best loss so far, is a type and a few bytes. Reading one executes nothing.
SCALAR = np.float64(0).__reduce__()[0]
NUMBERS = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"]
NAMES = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2
NUMPY_SCALARS = [np.dtype, *NUMBERS, *NAMES]


def load_public_weights(path: str | Path, encoder: Encoder, decoder: Decoder | None = None) -> list[str]:
    """Fill f^E, and f^D where it fits, from a file of public weights. Return lines about what was used.

    Raises InputError if the file cannot be read or does not fit f^E. Then nothing was changed.
    """
    tensors, notes, for_decoder = read_tensors(path), [], {}
    try:
        tensors = plain_names(tensors)
        for_encoder = fit(encoder, tensors, encoder.grid, ("cls_token", "pos_embed", "norm."), notes)
        for key in tensors:
            if key.startswith("blocks.") and key not in for_encoder:
                raise ValueError(f"{key} has no place here: the file is deeper, or has another kind of block")
    except ValueError as error:
        raise InputError(f"{path}: {error}; {READ}") from error
    if decoder is not None:
        try:
            for_decoder = fit(decoder, tensors, encoder.grid, ("decoder_pos_embed",), notes)
        except ValueError as error:
            notes.append(f"f^D keeps its initial values: {error}")
    require_finite(f"{path}: f^E or f^D", for_encoder | for_decoder)
    encoder.load_state_dict(for_encoder, strict=False)
    if decoder is not None:
        decoder.load_state_dict(for_decoder, strict=False)

    used = for_encoder | for_decoder
    missing = [key for key in encoder.state_dict() if key not in used]
    surplus = sorted({key.split(".")[0] for key in tensors if key not in used})
    if missing:
        notes.append(f"not in the file, left at their initial values: {', '.join(missing)}")
    if "cls_token" in missing:
        notes.append("no class token: attention maps, Eq. (6), are meaningless")
    if surplus:
        notes.append(f"left in the file, no such part here: {', '.join(surplus)}")
    return [
        f"used {len(used)} of {len(tensors)} tensors of {path} (CRC-32 {file_checksum(path)})",
        f"heads: {encoder.blocks[0].attn.heads}, which such a file does not say (a ViT has width / 64)",
        "images: normalised like ImageNet, which it does not say either (Google's own ViTs expect 0.5, 0.5)",
    ] + notes


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the named tensors of a .safetensors or torch file. Nothing in the file is executed."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file  # only this format needs it

            state = load_file(str(path))
        else:
            with torch.serialization.safe_globals(NUMPY_SCALARS):
                state = torch_load(path)
    except ImportError as error:
        raise InputError(f"{path}: this format needs safetensors: pip install safetensors") from error
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it contains {refused[1]}; save its tensors alone" if refused else first_line(error)
        raise InputError(f"{path}: cannot be read safely as weights: {why}; {READ}") from error
    if isinstance(state, dict) and {"optimiser", "settings"} <= state.keys():
        raise InputError(f"{path}: the checkpoint of a run, not a file of weights; give the run's folder")
    for key in ("model", "state_dict", "encoder"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    items = state.items() if isinstance(state, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: contains no named tensors; {READ}")
    return tensors


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate names to those of MAE and timm, and join what these keep in one tensor."""
    plain = {}
    for key, tensor in tensors.items():
        name = WRAPPERS.sub("", key)
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        if name in plain:
            raise ValueError(f"two of its tensors could be {name}, the second is {key}")
        plain[name] = tensor

    for name in [name for name in plain if ".attn.query." in name]:  # Hugging Face: q, k and v apart
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in plain and plain[part].shape == plain[name].shape for part in parts):
            plain[name.replace(".query.", ".qkv.")] = torch.cat([plain.pop(part) for part in parts])
    return plain


def fit(module: nn.Module, tensors: dict, grid: tuple[int, int], optional: tuple, notes: list[str]) -> dict:
    """Return the tensors for a module, in float32 and with positions for its grid of patches. ValueError at
    the first tensor that has another shape, or that is missing and not optional."""
    fitting, how = {}, []
    for key, own in module.state_dict().items():
        if key not in tensors and key.startswith(optional):
            continue
        if key not in tensors:
            names = ", ".join(list(tensors)[:3])
            raise ValueError(f"there is no {key} {tuple(own.shape)} in the file, which begins with {names}")
        tensor = tensors[key]
        if not tensor.is_floating_point():
            raise ValueError(f"{key} is {tensor.dtype} in the file")
        if key.endswith("pos_embed"):
            tensor, origin = fit_positions(tensor, grid, own.shape[2], "cls_token" in tensors)
            how.append(f"{key}: {origin}")
        if tensor.shape != own.shape:
            raise ValueError(f"{key} is {tuple(tensor.shape)} in the file and {tuple(own.shape)} here")
        fitting[key] = tensor.float()
    notes += how
    return fitting


def fit_positions(positions: Tensor, grid: tuple[int, int], width: int, class_token: bool):
    """Return positions (1, 1 + N, D) for `grid`, and how they were made from the file's (1, n + N', D).

    n counts the places before the patches: none, the class token, or also DeiT's distillation token. The grid
    of the file is square or upright 4:3, as for ViTPose's crops of 256 x 192 px. Sines and cosines are
    computed again; learned positions are resampled as timm does.
    """
    if positions.ndim != 3 or len(positions) != 1 or positions.shape[2] != width:
        raise ValueError(f"pos_embed is {tuple(positions.shape)} in the file, the width here is {width}")
    count = positions.shape[1]
    sizes = [(k * a, k * b, n) for a, b in ((1, 1), (4, 3)) for n in range(3) for k in range(1, 129)]
    sizes = [(rows, columns, n) for rows, columns, n in sizes if rows * columns + n == count]
    if not sizes:
        raise ValueError(f"pos_embed: {count} positions are neither a square nor an upright 4:3 grid")
    rows, columns, n = sizes[0]  # squares first: 49 is 7 x 7, not 1 + 8 x 6
    patches = positions[:, n:].float()  # (1, N', D)
    first = torch.cat([positions[:, :n].float(), torch.zeros(1, 1, width)], dim=1)[:, :1]  # (1, 1, D)
    sines = sincos_positions((rows, columns), width)
    rounding = max(1e-4, torch.finfo(positions.dtype).eps)
    if torch.allclose(torch.cat([first, patches], dim=1), sines, rtol=0, atol=rounding):
        return sincos_positions(grid, width), f"sines and cosines, computed for {grid[0]} x {grid[1]} patches"
    if not class_token:  # ViTPose adds the class token's position to every patch
        patches, first = patches + first, torch.zeros_like(first)
    how = f"learned, {n} + {rows} x {columns} positions"
    if grid != (rows, columns):
        image = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)  # (1, D, H', W')
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)  # (1, D, H, W)
        patches = image.flatten(2).transpose(1, 2)  # (1, N, D)
        how += f", resampled to {grid[0]} x {grid[1]}"
    return torch.cat([first, patches], dim=1), how
