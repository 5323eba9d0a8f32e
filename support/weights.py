"""Load public ViT weights into f^E and f^D: what `--init FILE` does in both training scripts.

Our modules have the tensor names and shapes of MAE and timm; the names of Hugging Face and ViTPose are translated.
A file says neither how many heads its network has nor how its images were normalised, so neither is checked.
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

READ = "only plain ViTs are read, as saved by MAE, timm, DeiT, ViTPose or Hugging Face (ViT, DeiT, MAE, ViTPose)"
WRAPPERS = re.compile(
    r"^((module|_orig_mod|model|encoder|backbone|teacher|vit|deit|embeddings)\.|decoder\.(?=decoder_|mask_))+"
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
NUMPY_SCALARS = [np.dtype, *NUMBERS, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]


def load_public_weights(path: str | Path, encoder: Encoder, decoder: Decoder | None = None) -> list[str]:
    """Fill f^E, and f^D where it fits, from a file of public weights. Return lines about what was used.

    Raises InputError, in one line, if the file cannot be read or does not fit f^E. Then nothing was changed.
    """
    found = read_tensors(path)
    for_decoder, notes_decoder = {}, []
    try:
        tensors, notes = plain_names(found, encoder.width)
        for_encoder, notes_encoder = fit(encoder, tensors, encoder.grid, ("cls_token", "pos_embed", "norm."))
        for key in tensors:
            if key.startswith("blocks.") and key not in for_encoder:
                raise ValueError(f"{key} has no place here: the file is deeper, or has another kind of block")
    except ValueError as error:
        raise InputError(f"{path}: {error}; {READ}") from error
    if decoder is not None:
        try:
            for_decoder, notes_decoder = fit(decoder, tensors, encoder.grid, ("decoder_pos_embed",))
        except ValueError as error:
            notes_decoder = [f"f^D keeps its initial values: {error}"]
    require_finite(f"{path}: f^E", for_encoder)
    require_finite(f"{path}: f^D", for_decoder)
    encoder.load_state_dict(for_encoder, strict=False)
    if decoder is not None:
        decoder.load_state_dict(for_decoder, strict=False)

    used = for_encoder | for_decoder
    missing = [key for key in encoder.state_dict() if key not in used]
    surplus = sorted({key.split(".")[0] for key in tensors if key not in used})
    if missing:
        notes_decoder.append(f"not in the file, left at their initial values: {', '.join(missing)}")
    if "cls_token" in missing:
        notes_decoder.append("no class token: attention maps, Eq. (6), are meaningless")
    if surplus:
        notes_decoder.append(f"left in the file, no such part here: {', '.join(surplus)}")
    return [
        f"used {len(used)} of {len(tensors)} tensors of {path} (CRC-32 {file_checksum(path)})",
        f"heads: {encoder.blocks[0].attn.heads}, images normalised by ImageNet's mean and standard deviation: "
        "the file says neither (a ViT has width / 64 heads; Google's own ViTs expect 0.5 and 0.5)",
        *notes, *notes_encoder, *notes_decoder,
    ]


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
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it contains {refused[1]}; save its tensors alone" if refused else first_line(error)
        raise InputError(f"{path}: cannot be read safely as weights: {why}; {READ}") from error
    if isinstance(state, dict) and {"optimiser", "settings"} <= state.keys():
        raise InputError(f"{path}: the checkpoint of a run, not a file of weights; give the run's folder")
    for key in ("model", "state_dict", "teacher", "encoder"):  # a teacher next to its student is what DINO publishes
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = {f"teacher.{name}" if key == "teacher" else name: value for name, value in state[key].items()}
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"{path}: contains no named tensors; {READ}")
    return tensors


def plain_names(tensors: dict[str, Tensor], width: int) -> tuple[dict[str, Tensor], list[str]]:
    """Translate names to those of MAE and timm, and join what these keep in one tensor. Also return notes."""
    plain, notes = {}, []
    if any(key.startswith("teacher.") for key in tensors):
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("teacher.")}
        notes.append("student and teacher: the teacher's weights are used")
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

    experts = {name: plain.pop(name) for name in list(plain) if ".mlp.experts." in name}
    for name, expert in experts.items():  # ViTPose+: some of the rows of fc2 are in an expert for each data set
        shared = plain.get(fc2 := name.replace(".experts.0.", ".fc2."))
        if shared is not None and shared.shape[0] + expert.shape[0] == width:
            plain[fc2] = torch.cat([shared, expert])
    if experts:
        notes.append("ViTPose+: of its experts, the first (COCO) is used, or none if fc2 has one already")
    return plain, notes


def fit(module: nn.Module, tensors: dict[str, Tensor], grid: tuple[int, int], optional: tuple[str, ...]):
    """Return the tensors for a module, in float32 and with positions for its grid of patches, and notes.

    Raises ValueError at the first one that is missing and not optional, or has another shape.
    """
    fitting, notes = {}, []
    for key, own in module.state_dict().items():
        if key not in tensors and key.startswith(optional):
            continue
        if key not in tensors:
            raise ValueError(f"there is no {key} {tuple(own.shape)}; its names begin {', '.join(list(tensors)[:3])}")
        tensor = tensors[key]
        if not tensor.is_floating_point():
            raise ValueError(f"{key} is {tensor.dtype} in the file")
        if key.endswith("pos_embed"):
            tensor, how = fit_positions(tensor, grid, own.shape[2], "cls_token" in tensors)
            notes.append(f"{key}: {how}")
        if tensor.shape != own.shape:
            raise ValueError(f"{key} is {tuple(tensor.shape)} in the file and {tuple(own.shape)} here")
        fitting[key] = tensor.float()
    return fitting, notes


def fit_positions(positions: Tensor, grid: tuple[int, int], width: int, class_token: bool) -> tuple[Tensor, str]:
    """Return positions (1, 1 + N, D) for `grid`, and how they were made from those of the file, (1, n + N', D).

    n is the number of places before the patches: none, the class token's, or also DeiT's distillation token's.
    The file's grid is square or upright 4:3, as for the 256 x 192 px crops of ViTPose. Sines and cosines are
    computed again, learned positions resampled as timm does.
    """
    if positions.ndim != 3 or len(positions) != 1 or positions.shape[2] != width:
        raise ValueError(f"pos_embed is {tuple(positions.shape)} in the file; our width is {width}")
    count = positions.shape[1]
    for rows, columns, n in ((k * a, k * b, n) for a, b in ((1, 1), (4, 3)) for n in (1, 0, 2) for k in range(1, 129)):
        if rows * columns + n == count:  # squares first: 49 is 7 x 7, and not 1 + 8 x 6
            break
    else:
        raise ValueError(f"pos_embed: {count} positions are neither a square nor an upright 4:3 grid of patches")
    patches = positions[:, n:].float()  # (1, N', D)
    first = torch.cat([positions[:, :n].float(), torch.zeros(1, 1, width)], dim=1)[:, :1]  # (1, 1, D)
    rounding = max(1e-4, torch.finfo(positions.dtype).eps)
    if torch.allclose(torch.cat([first, patches], 1), sincos_positions((rows, columns), width), atol=rounding):
        return sincos_positions(grid, width), f"sines and cosines, computed again for {grid} patches"
    if not class_token:  # ViTPose adds the class token's position to every patch
        patches, first = patches + first, torch.zeros_like(first)
    image = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)  # (1, D, H', W')
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)  # (1, D, H, W)
    how = f"learned, resampled from {(rows, columns)} to {grid} patches, {n} places before them in the file"
    return torch.cat([first, image.flatten(2).transpose(1, 2)], dim=1), how
