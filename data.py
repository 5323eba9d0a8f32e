"""Data: batches, augmentation, labels, prediction in millimetres; then the commands that make data sets.

    python data.py hands datasets/hands             render the embedded benchmark (the scripts do this, too)
    python data.py bodies datasets/bodies           the same with human bodies
    python data.py freihand ROOT OUT --split train  convert a publisher's files into a data-set folder, once
    python data.py imagenet ROOT OUT                use any folder of photographs as X_C
    python data.py show FOLDER PICTURE.png          draw 16 samples with their labels and masks
    python data.py check FOLDER                     check sizes, checksums, and whether labels are possible

Bring your own data. A data set is a folder of arrays. Write it with numpy, and every script reads it:

    images.npy      (n, H, H, 3) uint8     square RGB crops
    masks.npy       (n, H, H)    uint8     0 background .. 255 foreground; only a source needs them
    keypoints.npy   (n, K, 3)    float32   mm, camera frame: x right, y down, z forward; NaN: not labelled
    intrinsics.npy  (n, 3, 3)    float32   of the stored crop, pixel centres at integers: u = fx x / z + cx
    meta.json       {"format": 1, "name": "mine", "split": "train", "joints": ["wrist", ...], "root": 0,
                     "bones": [[0, 1], ...], "depth_range": 300.0, "margin": 1.25, "origin": "my renderer"}

A target needs images.npy and meta.json only; training never opens its other files. The stored crop shows
`margin` times the field of view that a network sees, so that most of a rotated or shifted crop is real.
Beyond it, edge pixels repeat.

The way of an image: in a worker process, a script's reader draws rows and augmentations of a step, and
`read_rows` reads the stored crops. On the training device, `augment` warps them to the network's crop and
jitters their colours, and `normalise` follows. For the labels, `labels_of` returns pixels and depths of that
crop, and `udapose.to_voxels` their place in the heatmaps. `predict` goes the way back.
"""

import argparse
import importlib
import inspect
import shutil
import signal
import sys
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from support.convert import Sample, convert, fault_of, to_uv
from support.folder import ARRAYS, Dataset, check_masks, read_meta
from support.pictures import draw_skeleton
from support.rendering import BENCHMARK, KINDS, make_benchmark
from support.run import InputError, autocast, random_generator, run_script, write_atomically
from udapose import IMAGE_MEAN, IMAGE_STD, back_project, from_voxels, project


# ==========================================================================================================
# Batches: which rows, and reading them ahead
# ==========================================================================================================
@lru_cache(maxsize=4)
def epoch_permutation(count: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    """The order (count,) in which an epoch visits `count` rows."""
    return random_generator(seed, purpose, epoch).permutation(count)


def batch_rows(count: int, seed: int, purpose: str, step: int, batch: int) -> np.ndarray:
    """Rows (batch,) of global batch `step`. Each of `count` rows comes once per epoch."""
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    parts = [epoch_permutation(count, seed, purpose, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)


class StoredCrops(NamedTuple):
    """Rows of a data set as they are on disk, and the augmentation drawn for them: what a worker reads."""

    images: Tensor  # (b, H, H, 3) uint8
    masks: Tensor | None  # (b, H, H) uint8, 0 background .. 255 foreground
    parameters: Tensor  # (b, 10) of `augmentation`
    margin: float  # the stored crop shows this many times the network's field of view


def read_rows(dataset: Dataset, rows: np.ndarray, parameters: np.ndarray, masks=None) -> StoredCrops:
    """Read rows of the stored images, and of `masks` (n, H, H) if given. parameters (b, 10) go with them."""
    masks = None if masks is None else torch.from_numpy(masks[rows])
    images = torch.from_numpy(dataset.images[rows])
    return StoredCrops(images, masks, torch.from_numpy(parameters), dataset.meta["margin"])


def read_ahead(batches, steps: range, micro: list[slice], workers: int, device: torch.device):
    """Iterate over batches[step, slice] for every step and micro-batch, read ahead by worker processes.

    batches: a map-style torch data set; an item is one micro-batch as stored. micro: the slices of the global
    batch (that of all processes) which this process takes one after the other. workers: -1 means 8 on CUDA
    and none on a CPU, where they would compete with training for the cores. On CUDA, tensors arrive in pinned
    memory, so that copies do not wait.
    """
    cuda = device.type == "cuda"
    workers = (8 if cuda else 0) if workers < 0 else workers
    keys = [(step, own) for step in steps for own in micro]
    options = dict(num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_ctrl_c)
    options["multiprocessing_context"] = "fork" if workers else None  # "spawn" would pickle masks
    return iter(torch.utils.data.DataLoader(batches, sampler=keys, batch_size=None, **options))


def ignore_ctrl_c(_worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """An array or tensor on the device. A copy from pinned memory does not wait for the GPU."""
    return torch.as_tensor(array).to(device, non_blocking=True)


# ==========================================================================================================
# Augmentation, Sec. 7: rotation, translation, scale, colours; on the batch, on the training device
# ==========================================================================================================
PARAMETERS = ("angle", "shift_x", "shift_y", "scale", "brightness", "contrast", "saturation")
PARAMETERS += ("red", "green", "blue")


def augmentation(rng: np.random.Generator, count: int, jitter: float, gain: float = 0.0) -> np.ndarray:
    """Draw parameters (count, 10) in the order of PARAMETERS.

    Rotation +-30 degrees, translation +-10 % of the crop, scale 0.8 to 1.25; brightness, contrast and
    saturation 1 +- jitter; channel gains 1 +- gain. not in the paper: the ranges, of which Sec. 7 gives none.
    """
    u = rng.uniform(-1, 1, (count, len(PARAMETERS)))
    columns = [np.deg2rad(30) * u[:, 0], 0.1 * u[:, 1], 0.1 * u[:, 2], 1.25 ** u[:, 3]]
    columns += [1 + jitter * u[:, i] for i in (4, 5, 6)] + [1 + gain * u[:, i] for i in (7, 8, 9)]
    return np.stack(columns, axis=1).astype(np.float32)


def no_augmentation(count: int) -> np.ndarray:
    """The parameters (count, 10) that change nothing: the centre of the stored crop."""
    return np.tile(np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1], np.float32), (count, 1))


def crop_transform(parameters: Tensor, stored: int, margin: float, side: int) -> Tensor:
    """Affine map A (B, 2, 3) from pixels of the stored crop to pixels of the network's crop of `side` px."""
    angle, shift, scale = parameters[:, 0], parameters[:, 1:3], parameters[:, 3]
    zoom = scale * side * margin / stored  # (B,) crop px per stored px
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)  # (B, 2, 2)
    centre = torch.full((len(parameters), 2, 1), (stored - 1) / 2, device=parameters.device)
    offset = (side - 1) / 2 + side * shift[..., None] - linear @ centre  # (B, 2, 1)
    return torch.cat([linear, offset], dim=2)  # (B, 2, 3)


def transform_points(A: Tensor, uv: Tensor) -> Tensor:
    """Map pixels uv (B, K, 2) by A (B, 2, 3)."""
    return uv @ A[:, :, :2].transpose(1, 2) + A[:, None, :, 2]


def transform_intrinsics(A: Tensor, intrinsics: Tensor) -> Tensor:
    """Intrinsics (B, 3, 3) of the stored crop to those of the network's crop: A_3x3 K."""
    bottom = torch.tensor([[[0.0, 0.0, 1.0]]], device=A.device).expand(len(A), 1, 3)
    return torch.cat([A, bottom], dim=1) @ intrinsics


def warp(images: Tensor, A: Tensor, side: int) -> Tensor:
    """Stored crops (B, C, H, H) through A (B, 2, 3) to (B, C, side, side), bilinear; edge pixels repeat."""
    H = images.shape[-1]
    (a, b, c), (d, e, f) = (row.unbind(1) for row in A.unbind(1))  # u' = a u + b v + c, v' = d u + e v + f
    back = torch.stack([e, -d, -b, a], dim=1) / (a * e - b * d)[:, None]
    back = back.view(-1, 2, 2)  # (B, 2, 2) inverse of A[:, :, :2], transposed: crop px -> stored px
    crop = torch.arange(side, device=A.device, dtype=A.dtype)  # (side,) px
    along_u = (crop - c[:, None])[..., None] * back[:, :1]  # (B, side, 2) stored px that a column adds
    along_v = (crop - f[:, None])[..., None] * back[:, 1:]  # (B, side, 2) stored px that a row adds
    # grid_sample counts -1 .. 1 from the outer edge of the first pixel to that of the last one
    along_u, along_v = (2 * along_u + 1) / H - 1, 2 * along_v / H
    grid = along_u[:, None] + along_v[:, :, None]  # (B, side, side, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1: channel gains and brightness g, contrast c, saturation s; clipped to 0..1.

    x1 = g x;  x2 = c (x1 - mean) + mean;  x3 = s (x2 - grey) + grey. Together they are a 3 x 3 matrix and an
    offset per image: one matrix multiplication instead of eight passes over the pixels.
    """
    B, _, H, W = images.shape
    gains = parameters[:, 4, None] * parameters[:, 7:10]  # (B, 3)
    contrast, saturation = parameters[:, 5, None, None], parameters[:, 6, None, None]  # (B, 1, 1)
    mean = (images.mean(dim=(2, 3)) * gains).mean(dim=1)[:, None, None]  # (B, 1, 1)
    mix = saturation * torch.eye(3, device=images.device) + (1 - saturation) / 3  # (B, 3, 3)
    matrix, offset = mix * (contrast * gains[:, None]), mean * (1 - contrast)  # (B, 3, 3), (B, 1, 1)
    return torch.baddbmm(offset, matrix, images.reshape(B, 3, -1)).clamp_(0, 1).reshape(B, 3, H, W)


def augment(stored: StoredCrops, side: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Stored crops to the network's: images (b, 3, side, side) in 0..1, masks or None, A (b, 2, 3)."""
    x = to_device(stored.images, device).permute(0, 3, 1, 2)  # (b, 3, H, H)
    if stored.masks is not None:  # a mask is warped as a fourth channel
        x = torch.cat([x, to_device(stored.masks, device)[:, None]], dim=1)  # (b, 4, H, H)
    parameters = to_device(stored.parameters, device)
    A = crop_transform(parameters, x.shape[-1], stored.margin, side)  # (b, 2, 3)
    x = warp(x.float().div_(255), A, side)  # (b, 3 or 4, side, side)
    return colour_jitter(x[:, :3], parameters), None if stored.masks is None else x[:, 3:], A


@lru_cache
def image_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 3, 1, 1) of the encoder's input. Cached: copying to a GPU waits."""
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return mean, std


def normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 to the mean and standard deviation that the encoder expects."""
    mean, std = image_statistics(images.device)
    return torch.addcmul(-mean / std, images, 1 / std)


def denormalise(images: Tensor) -> Tensor:
    """Invert `normalise`, clipped to 0..1."""
    mean, std = image_statistics(images.device)
    return (images * std + mean).clamp(0, 1)


def crops(dataset: Dataset, rows: np.ndarray, parameters: np.ndarray, side: int, device, masks=None):
    """Read and augment in one call, for evaluation. Returns what `augment` returns."""
    return augment(read_rows(dataset, rows, parameters, masks), side, device)


# ==========================================================================================================
# Labels in the network's crop, and predictions back in millimetres
# ==========================================================================================================
def labels_of(keypoints: Tensor, intrinsics: Tensor, A: Tensor, root: int) -> tuple[Tensor, Tensor]:
    """Keypoints (B, K, 3) mm, camera, to uv (B, K, 2) px in the network's crop and depth from the root.

    intrinsics (B, 3, 3) belong to the stored crop; A (B, 2, 3) maps it to the network's. NaN: not labelled.
    """
    uv = transform_points(A, project(keypoints, intrinsics))  # (B, K, 2) px
    return uv, keypoints[..., 2] - keypoints[:, root : root + 1, 2]


def predict(estimator, dataset: Dataset, rows: np.ndarray, side: int, device, dtype=torch.float32):
    """Predicted and true keypoints (B, K, 3) mm, camera frame of the crop, with the root's true depth.

    not in the paper: heatmaps give pixels and the depth from the root. The crop's intrinsics and the root's
    true depth turn them into millimetres, as in other 3D-heatmap methods. Errors are measured with the roots
    aligned, so the root's depth only scales x and y.
    """
    images, _, A = crops(dataset, rows, no_augmentation(len(rows)), side, device)
    with autocast(A.device, dtype):
        centres = estimator.centres(normalise(images))  # (B, K, 3) voxels
    uv, depth = from_voxels(centres, side, dataset.meta["depth_range"], estimator.head.side)
    truth = to_device(dataset.keypoints[rows], device)  # (B, K, 3) mm, camera
    intrinsics = transform_intrinsics(A, to_device(dataset.intrinsics[rows], device))  # (B, 3, 3)
    root = dataset.meta["root"]
    return back_project(uv, truth[:, root : root + 1, 2] + depth, intrinsics), truth


def chunks(count: int) -> list[np.ndarray]:
    """Rows 0..count-1 in pieces of at most 100."""
    return np.array_split(np.arange(count), -(-count // 100))


# ==========================================================================================================
# Commands
# ==========================================================================================================
READERS = Path(__file__).parent / "support" / "readers"  # a file per public data set, named as its command
FLAGS = {"side": "px of a stored crop, which is 1.25 times as wide as the network's",
         "workers": "processes; 0: all cores"}


def open_all(folder: str) -> Dataset:
    """A data set with every array that its folder holds."""
    return Dataset(folder, *(name for name in ARRAYS if (Path(folder) / f"{name}.npy").exists()))


def draw_sample(dataset: Dataset, row: int, cell: int) -> Image.Image:
    """A stored crop, `cell` px wide: the mask's outline (white), network's crop (grey), skeleton, name."""
    H, edge = dataset.images.shape[1], cell * (1 - 1 / dataset.meta["margin"]) / 2
    picture = Image.new("RGB", (cell, cell + 32))
    picture.paste(Image.fromarray(dataset.images[row]).resize((cell, cell), Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((edge, edge, cell - 1 - edge, cell - 1 - edge), outline=(128, 128, 128), width=2)
    if dataset.masks is not None:
        hard = Image.fromarray(dataset.masks[row]).resize((cell, cell)).point(lambda grey: 255 * (grey > 127))
        outline = hard.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3))
        picture.paste((255, 255, 255), (0, 0, cell, cell), outline)
    if dataset.keypoints is not None and dataset.intrinsics is not None:
        uv = to_uv(dataset.keypoints[row], dataset.intrinsics[row])  # (K, 2) stored px
        draw_skeleton(draw, (uv + 0.5) * cell / H - 0.5, dataset.meta["bones"], cell // 128)
    draw.text((4, cell + 2), f"{dataset.meta['name']} {dataset.meta['split']} {row}", font_size=22)
    return picture


def show(folder: str, picture: str, cell: int = 512) -> None:
    """Draw 16 samples from all over a data set on one sheet, at twice its size, and halve it."""
    dataset = open_all(folder)
    rows = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int))
    sheet = Image.new("RGB", (4 * cell, -(-len(rows) // 4) * (cell + 32)))
    for i, row in enumerate(rows):
        sheet.paste(draw_sample(dataset, row, cell), (i % 4 * cell, i // 4 * (cell + 32)))
    write_atomically(Path(picture), lambda path: sheet.reduce(2).save(path, format="PNG"))


def check(folder: str) -> None:
    """Check sizes and checksums of all arrays (an error names what is damaged), and every label."""
    dataset = open_all(folder)
    crc = dataset.meta.get("crc", {})
    for name in ARRAYS:
        array, value = getattr(dataset, name), 0
        if array is None and name in crc:
            raise InputError(f"{folder}/{name}.npy: missing; meta.json has its checksum")
        if array is not None:
            for i in range(0, len(array), 256):
                value = zlib.crc32(np.ascontiguousarray(array[i : i + 256]), value)
            if value != crc.get(name, value):
                raise InputError(f"{folder}/{name}.npy: not what was written, by its checksum; make it again")
            known = "sound" if name in crc else "without a checksum"
            print(f"{name}.npy: {array.shape} {array.dtype}, {known}")
    if dataset.masks is not None:
        check_masks(dataset.masks, f"{folder}/masks.npy", "remove the file")
    if dataset.keypoints is None or dataset.intrinsics is None or not dataset.meta["joints"]:
        return
    faults = []
    for i, (keypoints, K) in enumerate(zip(dataset.keypoints, dataset.intrinsics, strict=True)):
        if np.isfinite(keypoints).all(axis=1).sum() < 2:  # too few labels to be impossible
            continue
        mask = None if dataset.masks is None else dataset.masks[i] >= 128
        H, sample = dataset.images.shape[1], Sample("", keypoints, K)
        with np.errstate(all="ignore"):
            fault = fault_of(dataset.meta["joints"], sample, (H, H), H, mask)
        if fault:
            faults.append(f"row {i}: {fault}")
    print(f"labels: {len(faults)} of {len(dataset)} rows are impossible", *faults[:5], sep="\n  ")
    print(describe_labels(np.array(dataset.keypoints), dataset.meta))


def describe_labels(poses: np.ndarray, meta: dict) -> str:
    """One line on poses (n, K, 3) mm that shows a wrong unit, and how many labels are of no use."""
    parent, child = np.array(meta["bones"], int).reshape(-1, 2).T
    bones = np.linalg.norm(poses[:, child] - poses[:, parent], axis=-1)  # (n, bones) mm
    known = np.isfinite(poses).all(-1)  # (n, K)
    depth = abs(poses[..., 2] - poses[:, [meta["root"]], 2])  # (n, K) mm
    length = f"{np.median(bones[np.isfinite(bones)]):.3g} mm" if np.isfinite(bones).any() else "unknown"
    return (f"bones: {length} in the median; joints: {100 * (1 - known.mean()):.1f} % unlabelled, "
            f"{100 * (depth > meta['depth_range'] / 2).mean():.1f} % beyond the depth range of "
            f"{meta['depth_range']:g} mm; {(~known[:, meta['root']]).sum()} rows lack the root: nothing is "
            "learned from them")


def convert_dataset(name: str, reader, root: str, out: str, side: int, workers: int, **options) -> None:
    """ROOT as its publisher ships it -> data-set folder OUT. Without work if that is there already."""
    origin = " ".join([f"python data.py {name} --side {side}"] + [f"--{k} {v}" for k, v in options.items()])
    if (Path(out) / "meta.json").exists() and read_meta(out)["origin"] == origin:
        shutil.rmtree(f"{Path(out)}.part", ignore_errors=True)  # of a conversion that was killed at its end
        return print(f"{out}: converted already (this ROOT is not compared); remove it to convert again")
    meta = convert(name, reader, root, out, side, workers, origin, **options)
    some = [text.encode(errors="backslashreplace").decode() for text in meta["skipped"][:5]]  # any bytes
    print(f"{out}: {meta['rows']} samples, {len(meta['skipped'])} left out", *some, sep="\n  ")


def main(arguments=None) -> None:
    """`python data.py ..`: render, convert, show or check. A reader's flags are the arguments of `read`."""
    given, shape = sys.argv[1:] if arguments is None else arguments, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = {kind: (["out"], {"side": 60, "workers": 0}, f"Render the embedded benchmark of {kind}.")
           for kind in KINDS}  # command: its places, its flags, what it does
    own |= {"show": (["folder", "picture"], {}, show.__doc__), "check": (["folder"], {}, check.__doc__)}
    reader, choices = None, {}
    for path in sorted(READERS.glob("*.py")):
        if path.stem in ("__init__", "formats"):
            continue
        name = path.stem.lstrip("_")
        own[name] = ([], {}, path.read_text()[3:].partition("\n")[0])
        if name in given[:1]:  # only the reader that is asked for is imported
            reader = importlib.import_module(f"support.readers.{path.stem}")
            signature = inspect.signature(reader.read, eval_str=True)
            parameters = [p for p in signature.parameters.values() if p.name != "root"]
            choices = {p.name: get_args(p.annotation) for p in parameters}  # of a Literal
            options = {p.name: p.default for p in parameters}
            own[name] = (["root", "out"], options | {"side": 320, "workers": 0}, reader.__doc__)
    for name, (places, flags, about) in own.items():
        line = about.partition("\n")[0].replace("%", "%%")
        sub = commands.add_parser(name, help=line, description=about, formatter_class=shape)
        for place in places:
            sub.add_argument(place, metavar=place.upper())
        for flag, value in flags.items():
            form = {"type": type(value), "metavar": type(value).__name__.upper()}
            if choices.get(flag):
                form = {"choices": choices[flag]}
            if isinstance(value, bool):
                form = {"action": argparse.BooleanOptionalAction}
            sub.add_argument(f"--{flag}", default=value, help=f"{FLAGS.get(flag, '')} [%(default)s]", **form)
    given = vars(parser.parse_args(given))
    name, side, workers = given.pop("command"), given.get("side", 16), given.get("workers", 0)
    if side < 16 or workers < 0 or given.get("stride", 1) < 1:
        raise InputError("--side is 16 or more, --stride 1 or more, --workers 0 (all cores) or more")
    if name in KINDS:
        make_benchmark(name, given["out"], BENCHMARK, side, workers)
    elif name in ("show", "check"):
        (show if name == "show" else check)(**given)
    else:
        convert_dataset(name, reader, **given)


if __name__ == "__main__":
    run_script(main)
