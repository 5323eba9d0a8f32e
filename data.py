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
`margin` times the field of view that a network sees, so that rotation and translation find real pixels.

The way of an image: `read_rows` reads stored crops and the augmentation drawn for them, in a worker process;
`augment` warps them to the network's crop and jitters their colours, on the training device; `normalise`.
"""

import signal
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.folder import Dataset
from support.run import autocast, random_generator
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

    batches: a map-style torch data set. workers: -1 means 8 on CUDA and none on a CPU, where they would
    compete with training for the cores. On CUDA, tensors arrive in pinned memory, so that copies do not wait.
    """
    cuda = device.type == "cuda"
    workers = (8 if cuda else 0) if workers < 0 else workers
    keys = [(step, own) for step in steps for own in micro]
    options = dict(num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_ctrl_c)
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
    back = back.view(-1, 2, 2)  # (B, 2, 2) crop px -> stored px: the inverse, transposed
    crop = torch.arange(side, device=A.device, dtype=A.dtype)  # (side,) px
    along_u = (crop - c[:, None])[..., None] * back[:, :1]  # (B, side, 2) stored px, part of each column
    along_v = (crop - f[:, None])[..., None] * back[:, 1:]  # (B, side, 2) stored px, part of each row
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
    x = warp(x.float() / 255, A, side)  # (b, 3 or 4, side, side)
    return colour_jitter(x[:, :3], parameters), None if stored.masks is None else x[:, 3:], A


@lru_cache
def image_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 3, 1, 1) of the encoder's input. Kept: copies to a GPU wait."""
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
