"""Data: what a data set is on disk, batches, augmentation, the embedded benchmark, readers of public data sets.

    python data.py hands datasets/hands            render the embedded benchmark (the training scripts do it themselves)
    python data.py freihand ROOT OUT --split train convert a publisher's files into a data-set folder, once
    python data.py show FOLDER PICTURE.png         draw a few samples of any data-set folder, labels and masks included

Bring your own data. A data set is a folder of arrays; write it with numpy in ten lines and every script reads it:

    images.npy      (n, H, H, 3) uint8             square RGB crops; what is drawn around the subject: see `margin`
    masks.npy       (n, H, H)    uint8             0 background .. 255 foreground        (only a source needs them)
    keypoints.npy   (n, K, 3)    float32           mm, camera frame: x right, y down, z forward; NaN: not labelled
    intrinsics.npy  (n, 3, 3)    float32           of the stored crop, pixel centres at integers: u = fx x / z + cx
    meta.json       {"format": 1, "name": "mine", "split": "train", "joints": ["wrist", ...], "bones": [[0, 1], ...],
                     "root": 0, "depth_range": 300.0, "margin": 1.25, "origin": "where it came from"}

A target needs images.npy and meta.json only; its other files are never opened in training. `margin`: the stored crop is
so many times as wide as the crop that a network sees, so that rotation and translation find real pixels at its edges.
"""
import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from udapose import (IMAGE_MEAN, IMAGE_STD, InputError, Progress, back_project, decode_heatmaps, from_rank_0, from_voxels, project, random_generator, run_script,
                     write_json)

FORMAT = 1
ARRAYS = {"images": (4, np.uint8), "masks": (3, np.uint8), "keypoints": (3, np.float32), "intrinsics": (3, np.float32)}


# ==========================================================================================================
# A data set on disk
# ==========================================================================================================
class Dataset:
    """A data-set folder; `fields` names the arrays to open, memory-mapped. What is not named is not opened.

    Raises InputError, naming file, value and remedy, for a missing, truncated or ill-shaped array and bad labels.
    """

    def __init__(self, folder: str | Path, *fields: str):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.images = self.masks = self.keypoints = self.intrinsics = None
        for field in ("images", *fields): setattr(self, field, self.open_array(field))
        n, H, W, channels = self.images.shape
        if (H, channels) != (W, 3) or n == 0:
            raise InputError(f"{self.folder}/images.npy: shape {self.images.shape}; expected (n > 0, H, H, 3)")
        self.check("masks", (n, H, H))
        self.check("keypoints", (n, len(self.meta["joints"]), 3))
        self.check("intrinsics", (n, 3, 3))
        if self.keypoints is not None and np.isinf(self.keypoints).any():
            row = int(np.isinf(self.keypoints).any(axis=(1, 2)).argmax())
            raise InputError(f"{self.folder}/keypoints.npy: row {row} is infinite; write NaN for a joint without label")

    def __len__(self) -> int:
        return len(self.images)

    def open_array(self, field: str) -> np.ndarray:
        path, (ndim, dtype) = self.folder / f"{field}.npy", ARRAYS[field]
        try: array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error: raise InputError(f"{path}: missing; this use of the folder needs it") from error
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a whole .npy array ({error}); write or convert it again") from error
        if array.ndim != ndim or array.dtype != dtype:
            raise InputError(f"{path}: {array.dtype} with {array.ndim} axes; expected {np.dtype(dtype)} with {ndim}")
        return array

    def check(self, field: str, shape: tuple) -> None:
        array = getattr(self, field)
        if array is not None and array.shape != shape:
            raise InputError(f"{self.folder}/{field}.npy: shape {array.shape}; images and meta.json ask for {shape}")

    @property
    def fingerprint(self) -> str:
        """Changes with the data: meta.json (it holds the arrays' checksums when we wrote them) and the shape."""
        return f"{zlib.crc32((json.dumps(self.meta, sort_keys=True) + str(self.images.shape)).encode()):08x}"


def read_meta(folder: Path) -> dict:
    try: meta = json.loads((folder / "meta.json").read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no data set here (no meta.json); see `python data.py -h`") from error
    except json.JSONDecodeError as error: raise InputError(f"{folder}/meta.json: not JSON ({error})") from error
    missing = {"format", "name", "joints", "bones", "root", "depth_range"} - set(meta)
    if missing: raise InputError(f"{folder}/meta.json: lacks {', '.join(sorted(missing))}")
    if meta["format"] != FORMAT: raise InputError(f"{folder}/meta.json: format {meta['format']}, this code reads {FORMAT}")
    return {"margin": 1.25, "split": "", "origin": ""} | meta


class Writer:
    """Appends rows to a data-set folder. Until `finish` it is OUT.part; opened again after a kill, it goes on there."""

    def __init__(self, folder: str | Path, meta: dict):
        self.folder, self.part, self.meta = Path(folder), Path(f"{folder}.part"), {"format": FORMAT} | meta
        if self.folder.exists(): raise InputError(f"{folder}: exists; remove it to make it again")
        try: self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error: raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
        path = self.part / "state.json"
        self.state = json.loads(path.read_text()) if path.exists() else \
            {"jobs": 0, "rows": 0, "skipped": [], "crc": {}, "row_bytes": {}}
        self.files = {}

    def open(self, name: str, rows: np.ndarray):
        """The file of one array, cut back to the rows that the saved state vouches for."""
        file = open(self.part / f"{name}.npy", "r+b" if name in self.state["row_bytes"] else "w+b")
        self.header(file, rows, 0)  # numpy leaves room in the header for the number of rows to grow
        file.truncate(file.tell() + self.state["rows"] * rows[0].nbytes)
        file.seek(0, os.SEEK_END)
        self.state["row_bytes"][name] = rows[0].nbytes
        self.state["crc"].setdefault(name, 0)
        return file

    @staticmethod
    def header(file, rows: np.ndarray, count: int) -> None:
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False,
                   "shape": (count,) + rows.shape[1:]})

    def append(self, arrays: dict[str, np.ndarray], skipped: list[str] = ()) -> None:
        """Rows of one job, arrays of the same length; `skipped` names the samples left out and why."""
        for name, rows in arrays.items():
            if not len(rows): continue
            if name not in self.files: self.files[name] = (self.open(name, rows), rows[:0])
            data = np.ascontiguousarray(rows).tobytes()
            self.files[name][0].write(data)
            self.state["crc"][name] = zlib.crc32(data, self.state["crc"][name])
        self.state["rows"] += len(next(iter(arrays.values()))) if arrays else 0
        self.state["skipped"] += list(skipped)
        self.state["jobs"] += 1

    def save(self) -> None:
        for file, _ in self.files.values(): file.flush(); os.fsync(file.fileno())
        write_json(self.part / "state.json", self.state)

    def finish(self) -> None:
        for file, rows in self.files.values():
            self.header(file, rows, self.state["rows"])
            file.close()
        write_json(self.part / "meta.json", self.meta | {k: self.state[k] for k in ("rows", "crc", "skipped")})
        (self.part / "state.json").unlink(missing_ok=True)
        os.replace(self.part, self.folder)


def build_dataset(folder: str | Path, meta: dict, jobs: list, work, workers: int = 0, images_a_job: int = 1) -> None:
    """Write work(job) for every job, in order, to a data-set folder, on several processes, with a progress line.

    work(job) returns (arrays, skipped). The result does not depend on the number of workers, nor on how often it was
    interrupted: a killed run goes on from its last save, a few hundred rows back.
    """
    writer, workers = Writer(folder, meta), workers or os.cpu_count() or 1
    start = writer.state["jobs"]
    progress = Progress(f"{Path(folder).name}", len(jobs), images_a_job, start, every=5)
    results = ordered_results(work, jobs[start:], workers)
    try:
        for done, (arrays, skipped) in enumerate(results, start + 1):
            writer.append(arrays, skipped)
            if done % max(1, 512 // images_a_job) == 0: writer.save()
            progress.show(done)
    except BaseException:
        writer.save()
        raise
    progress.show(len(jobs), final=True)
    writer.save()
    writer.finish()


def ordered_results(work, jobs: list, workers: int):
    """work(job) for each job, in order, computed a little ahead by several processes."""
    if workers == 1 or len(jobs) < 4: yield from map(work, jobs); return
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started threads
    with concurrent.futures.ProcessPoolExecutor(workers, context, quiet_worker) as pool:
        waiting, rest = collections.deque(), iter(jobs)
        try:
            for job in rest:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= 4 * workers: yield waiting.popleft().result()
            while waiting: yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise InputError("a worker process died; run the same command again, it goes on where it stopped") from error
        finally:
            for future in waiting: future.cancel()


def quiet_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)


# ==========================================================================================================
# Batches
# ==========================================================================================================
@lru_cache(maxsize=8)
def epoch_permutation(count: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    return random_generator(seed, purpose, epoch).permutation(count)


def batch_rows(count: int, seed: int, purpose: str, step: int, batch: int) -> np.ndarray:
    """Rows of global batch `step` (batch,): each of `count` rows comes once an epoch, in an order of (seed, epoch)."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([epoch_permutation(count, seed, purpose, int(p // count))[p % count] for p in places])


def prefetch(batches):
    """The same batches, the next one being prepared by a thread while one is trained on. Errors come through."""
    box: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()

    def put(item) -> None:
        while not stop.is_set():
            try: return box.put(item, timeout=0.1)
            except queue.Full: continue

    def work() -> None:
        try:
            for item in batches: put((item, None))
            put((None, StopIteration()))
        except BaseException as error: put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error = box.get()
            if isinstance(error, StopIteration): return
            if error is not None: raise error
            yield item
    finally: stop.set()


# ==========================================================================================================
# Augmentation (Sec. 7: rotation, translation, resize, colour jitter), on the batch, on the training device
# ==========================================================================================================
PARAMETERS = ("angle", "shift_x", "shift_y", "scale", "brightness", "contrast", "saturation", "red", "green", "blue")


def augmentation(rng: np.random.Generator, count: int, jitter: float, gain: float = 0.0) -> np.ndarray:
    """Random parameters (count, 10) in the order of PARAMETERS. not in the paper: every range (Sec. 7 gives none).

    Rotation +-30 degrees, translation +-10 % of the crop, scale 0.8-1.25, brightness, contrast, saturation 1 +- jitter,
    channel gains 1 +- gain.
    """
    u = rng.uniform(-1, 1, (count, len(PARAMETERS)))
    columns = [np.deg2rad(30) * u[:, 0], 0.1 * u[:, 1], 0.1 * u[:, 2], 1.25 ** u[:, 3]]
    return np.stack(columns + [1 + jitter * u[:, i] for i in (4, 5, 6)]
                    + [1 + gain * u[:, i] for i in (7, 8, 9)], axis=1).astype(np.float32)


def no_augmentation(count: int) -> np.ndarray:
    """The parameters (count, 10) that change nothing: the centre of the stored crop."""
    return np.tile(np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1], np.float32), (count, 1))


def crop_transform(parameters: Tensor, stored: int, margin: float, side: int) -> Tensor:
    """Affine map A (B, 2, 3) from pixels of the stored crop to pixels of the network's crop of `side` px."""
    angle, shift, scale = parameters[:, 0], parameters[:, 1:3], parameters[:, 3]
    zoom = scale * side * margin / stored                                         # (B,) crop px per stored px
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)          # (B, 2, 2)
    centre = torch.full((len(parameters), 2, 1), (stored - 1) / 2, device=parameters.device)
    offset = (side - 1) / 2 + side * shift[..., None] - linear @ centre                           # (B, 2, 1)
    return torch.cat([linear, offset], dim=2)                                                     # (B, 2, 3)


def transform_points(A: Tensor, uv: Tensor) -> Tensor:
    """Pixels uv (B, K, 2) through A (B, 2, 3)."""
    return uv @ A[:, :, :2].transpose(1, 2) + A[:, None, :, 2]


def transform_intrinsics(A: Tensor, intrinsics: Tensor) -> Tensor:
    """Intrinsics (B, 3, 3) of the stored crop to those of the network's crop: A_3x3 K."""
    bottom = torch.tensor([[[0.0, 0.0, 1.0]]], device=A.device).expand(len(A), 1, 3)
    return torch.cat([A, bottom], dim=1) @ intrinsics


def warp(images: Tensor, A: Tensor, side: int) -> Tensor:
    """Stored crops (B, C, H, H) through A (B, 2, 3) to (B, C, side, side), bilinear; edge pixels go on outside."""
    H, back = images.shape[-1], torch.linalg.inv(A[:, :, :2])              # (B, 2, 2) crop px -> stored px
    middle = back @ ((side - 1) / 2 - A[:, :, 2:])                  # (B, 2, 1) stored px of the crop's centre
    # grid_sample's own units, in both images: -1 .. 1 from the outer edge of the first pixel to that of the last
    theta = torch.cat([back * (side / H), (2 * middle + 1) / H - 1], dim=2)              # (B, 2, 3)
    grid = F.affine_grid(theta, [len(A), 1, side, side], align_corners=False)            # (B, side, side, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1: channel gains and brightness g, contrast c, saturation s; clipped to 0..1.

    x1 = g x;  x2 = c (x1 - mean) + mean;  x3 = s (x2 - grey) + grey: a 3 x 3 matrix and an offset for each image, and so
    one matrix product instead of eight passes over the pixels.
    """
    B, _, H, W = images.shape
    gains = parameters[:, 4, None] * parameters[:, 7:10]                                 # (B, 3)
    contrast, saturation = parameters[:, 5, None, None], parameters[:, 6, None, None]    # (B, 1, 1)
    mean = (images.mean(dim=(2, 3)) * gains).mean(dim=1)[:, None, None]                  # (B, 1, 1)
    mix = saturation * torch.eye(3, device=images.device) + (1 - saturation) / 3         # (B, 3, 3)
    matrix, offset = mix * (contrast * gains[:, None]), mean * (1 - contrast)           # (B, 3, 3), (B, 1, 1)
    return torch.baddbmm(offset, matrix, images.reshape(B, 3, -1)).clamp_(0, 1).reshape(B, 3, H, W)


def normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 to the statistics that the encoder expects."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return torch.addcmul(-mean / std, images, 1 / std)


def denormalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images * std + mean).clamp(0, 1)


def load_images(dataset: Dataset, rows: np.ndarray, device: torch.device, masks: np.ndarray | None = None) -> Tensor:
    """Rows of the stored images as (B, 3, H, H) in 0..1, or with `masks` (n, H, H) as a fourth channel."""
    x = torch.from_numpy(dataset.images[rows]).to(device, non_blocking=True).permute(0, 3, 1, 2)
    if masks is not None:
        x = torch.cat([x, torch.from_numpy(masks[rows]).to(device, non_blocking=True)[:, None]], dim=1)
    return x.float() / 255                                                               # (B, 3 or 4, H, H)


def crops(dataset: Dataset, rows: np.ndarray, parameters: np.ndarray, side: int, device: torch.device,
          masks: np.ndarray | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Augmented crops: images (B, 3, side, side) in 0..1, masks (B, 1, side, side) or None, and A (B, 2, 3)."""
    p = torch.from_numpy(parameters).to(device)
    A = crop_transform(p, dataset.images.shape[1], dataset.meta["margin"], side)
    x = warp(load_images(dataset, rows, device, masks), A, side)
    return colour_jitter(x[:, :3], p), None if masks is None else x[:, 3:], A


def labels_of(dataset: Dataset, rows: np.ndarray, A: Tensor) -> tuple[Tensor, Tensor]:
    """Labels in the network's crop: uv (B, K, 2) px and depth (B, K) mm relative to the root; NaN: not labelled."""
    keypoints = torch.from_numpy(dataset.keypoints[rows]).to(A.device)                  # (B, K, 3) mm, camera
    intrinsics = torch.from_numpy(dataset.intrinsics[rows]).to(A.device)                 # (B, 3, 3)
    uv = transform_points(A, project(keypoints, intrinsics))                             # (B, K, 2) px
    root = dataset.meta["root"]
    return uv, keypoints[..., 2] - keypoints[:, root:root + 1, 2]


def predict(estimator, dataset: Dataset, rows: np.ndarray, side: int, device) -> tuple[Tensor, Tensor]:
    """Predicted and true keypoints (B, K, 3) mm, camera frame of the crop, with the root's true depth.

    not in the paper: heatmaps give pixels and depth relative to the root; the crop's intrinsics and the true depth of
    the root turn them into millimetres, as the 3D-heatmap methods do. Errors are root-aligned, so depth only scales x, y.
    """
    images, _, A = crops(dataset, rows, no_augmentation(len(rows)), side, device)
    heatmaps = estimator.heatmaps(normalise(images))                                     # (B, K, S, S, S)
    uv, depth = from_voxels(decode_heatmaps(heatmaps), side, dataset.meta["depth_range"], heatmaps.shape[-1])
    truth = torch.from_numpy(dataset.keypoints[rows]).to(device)                        # (B, K, 3) mm, camera
    intrinsics = transform_intrinsics(A, torch.from_numpy(dataset.intrinsics[rows]).to(device))
    root = dataset.meta["root"]
    return back_project(uv, truth[:, root:root + 1, 2] + depth, intrinsics), truth


def chunks(count: int, size: int = 100) -> list[np.ndarray]:
    """Rows 0..count-1 in pieces of at most `size`."""
    return np.array_split(np.arange(count), -(-count // size))


def open_masks(path: str | Path, dataset: Dataset) -> np.ndarray:
    """Masks (n, H, H) uint8 of a data set from a file of their own: f^S's, kept in the run, never in the data set."""
    try: masks = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error: raise InputError(f"{path}: no readable masks ({error})") from error
    if masks.shape != dataset.images.shape[:3] or masks.dtype != np.uint8:
        raise InputError(f"{path}: {masks.dtype} {masks.shape}; expected uint8 {dataset.images.shape[:3]}")
    return masks


# ==========================================================================================================
# The embedded benchmark: hands rendered by round cones, in two domains
# ==========================================================================================================
HAND_JOINTS = ["wrist"] + [f"{name}_{i}" for name in ("thumb", "index", "middle", "ring", "little")
                           for i in (1, 2, 3, 4)]                          # a finger: palm -> tip
HAND_BONES = [(0 if i % 4 == 1 else i - 1, i) for i in range(1, 21)]       # (parent, child)

# The hand at rest, one row a finger: the back of a right hand faces the camera, fingers up (-y), thumb left
# (-x), palm away (+z). First joint and bones in mm (wrist to middle fingertip: 184); angles in degrees.
KNUCKLES = np.float32([[-21, -20, 8], [-23, -86, 0], [-2, -90, -4], [17, -84, -2], [33, -75, 3]])
PHALANGES = np.float32([[44, 32, 25], [41, 25, 20], [45, 28, 21], [42, 27, 21], [33, 20, 19]])
STRAIGHT = np.float32([[0, -5, -8]] + 4 * [[-10, 4, 0]])                   # flexion of the joints, open hand
FIST = np.float32([[0, 42, 55]] + 4 * [[72, 96, 0]])                       # the same closed; DIP follows PIP
WOBBLE = np.float32([[6, 8, 12]] + 4 * [[10, 12, 6]])                      # standard deviation about both
LIMITS = np.float32([[[-10, -10, -15]] + 4 * [[-15, 0, 0]], [[15, 55, 75]] + 4 * [[80, 100, 65]]])
SPREAD = np.float32([[-36, -7, 0, 6, 13], [7, 5, 4, 4, 5]])                # in the palm's plane: mean, sd
LIFT = np.float32([[22, 0, 0, 0, 0], [6, 0, 0, 0, 0]])                     # out of it: the thumb alone
BEND = np.float32([[0.85, -0.25, 0.45]] + 4 * [[0, 0, 1]])                 # to the palm; the thumb across it
RADII = np.float32([[13, 10.5, 9.2, 7.2], [10.2, 8.6, 7.4, 6.2], [10.4, 8.9, 7.6, 6.3], [9.8, 8.4, 7.2, 6],
                    [9, 7.3, 6.2, 5.3]])                                   # mm, at the joints

# Points that only the drawing needs follow the 21 joints, in this order; then (from, to, radii mm, what).
CARPUS, PALM, WEB, ARM, NAIL = 21, 24, 28, 30, 36
SKIN, HORN, CLOTH = range(3)
CONES = [(4 * f + k, 4 * f + k + 1, *RADII[f, k - 1:k + 1], SKIN) for f in range(5) for k in (1, 2, 3)] + [
    (CARPUS, PALM, 18, 16.5, SKIN), (CARPUS + 1, PALM + 1, 18, 17, SKIN), (WEB, WEB + 1, 9, 11, SKIN),
    (CARPUS + 1, PALM + 2, 18, 16.5, SKIN), (CARPUS + 2, PALM + 3, 18, 15.5, SKIN), (2, PALM, 6, 8, SKIN),
    (CARPUS, 1, 15, 13, SKIN), (CARPUS, ARM, 18, 19, SKIN), (CARPUS + 2, ARM + 1, 18, 19, SKIN),
    (ARM, ARM + 2, 19, 22, CLOTH), (ARM + 1, ARM + 3, 19, 22, CLOTH),
    (ARM + 2, ARM + 4, 22, 29, CLOTH), (ARM + 3, ARM + 5, 22, 29, CLOTH),
] + [(NAIL + f, NAIL + 5 + f, 0.63 * RADII[f, 3], 0.55 * RADII[f, 3], HORN) for f in range(5)]
BLEND = 2.5         # mm of depth over which surfaces melt into one another
FINE = 2            # samples per stored pixel and axis
GROUP = 32          # hands drawn together: few enough for the processor's cache

# Every choice of appearance. Colours are 0..255, a pair (a, b) is a uniform range, angles are in degrees, and
# lengths in parts of the image's side, so that a domain looks alike at any resolution.
DOMAINS = {
    "source": dict(
        roll=(-40, 40), pitch=(-22, 22), yaw=(-22, 22), glove=0, gloves=[(0, 0, 0)], sleeve=0.15,
        skin=[(236, 192, 166), (220, 166, 136), (196, 138, 108), (240, 204, 184)], skin_jitter=0.03,
        light_angle=(0, 30), light=(0.42, 0.58), light_tint=0.02, ambient=(0.40, 0.48), shine=(0.0, 0.10),
        wall=[(70, 160, 90), (60, 90, 150), (200, 200, 200), (120, 120, 125), (225, 205, 150), (40, 45, 55),
              (150, 80, 80), (110, 150, 165), (235, 235, 230), (120, 100, 75)], wall_jitter=0.10,
        clouds=(0.0, 0.07), grain=(0.0, 0.012), busy=0.5, shapes=3, shape_chance=0.8, shape_size=(0.15, 0.45),
        shape_soft=(0.02, 0.15), shape_colour=0.6, stripes=0.0, limbs=0,
        blur=(0.0, 0.006), noise=(0.0, 0.012), gamma=(0.92, 1.08), contrast=(0.92, 1.05), balance=0.015),
    "target": dict(
        roll=(-28, 52), pitch=(-25, 25), yaw=(-25, 25), sleeve=0.35, skin_jitter=0.06,
        glove=0.06, gloves=[(40, 60, 130), (150, 35, 40), (45, 45, 45), (210, 200, 60)],
        skin=[(112, 74, 54), (84, 54, 40), (148, 98, 72), (250, 226, 214), (222, 138, 118), (190, 112, 92)],
        light_angle=(25, 65), light=(0.6, 0.95), light_tint=0.14, ambient=(0.25, 0.42), shine=(0.05, 0.3),
        wall=[(150, 110, 80), (90, 105, 80), (170, 150, 130), (60, 70, 100), (100, 60, 50), (190, 180, 165)],
        wall_jitter=0.20, clouds=(0.06, 0.16), grain=(0.015, 0.06), busy=1, shapes=5, shape_chance=0.75,
        shape_size=(0.06, 0.30), shape_soft=(0.004, 0.03), shape_colour=0.9, stripes=0.35,
        limbs=2, limb_chance=0.5, limb_aspect=(0.1, 0.35),
        blur=(0.003, 0.014), noise=(0.01, 0.04), gamma=(0.75, 1.35), contrast=(0.7, 1.1), balance=0.07),
}
DOMAINS["target_shifted"] = dict(  # the target once more, as no training image shows it
    DOMAINS["target"], glove=0.08, gloves=[(30, 110, 80), (190, 110, 160), (235, 235, 235)],
    wall=[(60, 110, 120), (180, 90, 50), (110, 120, 60), (140, 90, 130), (205, 190, 170)],
    light_angle=(35, 75), light_tint=0.20, clouds=(0.03, 0.12), grain=(0.03, 0.07), shapes=7,
    shape_size=(0.04, 0.20), stripes=0.7, limbs=1, limb_aspect=(0.2, 0.5), balance=0.10)
UNCONSTRAINED = dict(
    skin=[(232, 190, 165), (200, 140, 110), (150, 100, 75), (100, 66, 50), (215, 130, 110)], skin_chance=0.35,
    shapes=5, shape_chance=0.6, shape_size=(0.05, 0.5), shape_aspect=(0.12, 1.0), shape_soft=(0.004, 0.08),
    stripes=0.25, blur=(0.0, 0.012), noise=(0.0, 0.03), gamma=(0.8, 1.25), contrast=(0.75, 1.1), balance=0.05)


def uniform(rng, limits, *shape):
    """Uniform float32 numbers of `shape` within limits = (low, high)."""
    return np.float32(limits[0]) + np.float32(limits[1] - limits[0]) * rng.random(shape, np.float32)


def normal(rng, spread, *shape):
    """Gaussian float32 numbers of `shape`, cut at two standard deviations: no monsters in the tails."""
    return np.clip(rng.standard_normal(shape, np.float32), -2, 2) * np.float32(spread)


def pick(rng, palette, jitter, count):
    """Colours (count, 3) in 0..1, one of the palette each: brightness jittered, hue a third as much."""
    colour = np.float32(palette)[rng.integers(len(palette), size=count)] / 255
    return np.clip(colour * (1 + normal(rng, jitter, count, 1)) + normal(rng, jitter / 3, count, 3), 0, 1)


def sample_angles(rng, count):
    """Flexion (B, 5, 3), spread (B, 5) and lift (B, 5) of the fingers, rad, within joint limits. The curl of
    the whole hand and that of each finger are mixed; in three of ten hands every finger is on its own."""
    own, whole = rng.random((count, 5), np.float32), rng.beta(1.0, 1.7, (count, 1)).astype(np.float32)
    curl = np.where(rng.random((count, 1)) < 0.3, own, 0.75 * whole + 0.25 * own)[..., None]  # (B, 5, 1)
    flexion = STRAIGHT + (FIST - STRAIGHT) * curl + WOBBLE * normal(rng, 1, count, 5, 3)
    flexion[:, 1:, 2] += 0.6 * flexion[:, 1:, 1]                           # one tendon bends both
    fan = SPREAD[1] * normal(rng, 1, count, 5) + 0.4 * SPREAD[0] * normal(rng, 1, count, 1)
    spread = SPREAD[0] + fan * (1 - 0.8 * curl[..., 0])                    # a fist cannot spread
    lift = LIFT[0] * (0.7 + 0.6 * curl[..., 0]) + LIFT[1] * normal(rng, 1, count, 5)
    return np.radians(np.clip(flexion, *LIMITS)), np.radians(spread), np.radians(lift)


def sample_fingers(rng, count):
    """Forward kinematics: joints (B, 5, 4, 3) mm and the way each last bone bends, (B, 5, 3). Flexion adds up
    along a finger, in the plane of its directions `forward` and `bend`; each bone's length varies by 5 %."""
    flexion, spread, lift = sample_angles(rng, count)
    forward = np.stack([np.sin(spread) * np.cos(lift), -np.cos(spread) * np.cos(lift), np.sin(lift)], -1)
    bend = BEND - (forward * BEND).sum(-1, keepdims=True) * forward        # (B, 5, 3), now normal to it
    bend = (bend / np.linalg.norm(bend, axis=-1, keepdims=True))[:, :, None]
    total, forward = np.cumsum(flexion, -1)[..., None], forward[:, :, None]  # (B, 5, 3, 1), (B, 5, 1, 3)
    lengths = PHALANGES * (1 + normal(rng, 0.05, count, 5, 3))
    bones = (np.cos(total) * forward + np.sin(total) * bend) * lengths[..., None]  # (B, 5, 3, 3) mm
    base = (KNUCKLES * (1 + normal(rng, 0.05, count, 5, 1)))[:, :, None]
    inward = np.cos(total) * bend - np.sin(total) * forward                # (B, 5, 3, 3)
    return np.concatenate([base, base + np.cumsum(bones, 2)], 2), inward[:, :, 2]


def sample_forearm(rng, count):
    """Cuff, middle and elbow end, thumb side and little finger's side of each: (B, 6, 3) mm, wrist at 0."""
    swing, drop = np.radians(normal(rng, 10, 2, count))
    along = np.stack([np.sin(swing), np.cos(swing) * np.cos(drop), np.sin(drop)], -1)[:, None]  # (B, 1, 3)
    across = np.stack([np.cos(swing), -np.sin(swing), 0 * swing], -1)[:, None]
    reach = uniform(rng, (25, 70), count, 1, 1) + np.float32([0, 0, 70, 70, 230, 230])[:, None]  # (B, 6, 1)
    return along * reach + across * np.float32([-8, 8, -8, 8, -10, 10])[:, None] + np.float32([0, 0, 8])


def sample_pose(rng, count):
    """Random right hands, wrist at 0 -> points (B, P, 3) mm: 21 joints, then what only the drawing needs; and
    girth (B,), the factor of all radii."""
    digits, inward = sample_fingers(rng, count)                            # (B, 5, 4, 3), (B, 5, 3) mm
    wrist = np.zeros((count, 1, 3), np.float32)
    carpus = wrist + np.float32([[-10, -3, 6], [0, -3, 6], [10, -3, 6]])
    palm = digits[:, 1:, 0] * np.float32([0.82, 0.93, 1]) + np.float32([0, 0, 6])  # under the knuckles
    web = np.stack([digits[:, 0, :2].mean(1), digits[:, 1, 0] * 0.6 + np.float32([0, 0, 4])], 1)
    bone, out = digits[:, :, 3] - digits[:, :, 2], inward * -RADII[:, 3:]
    nails = np.concatenate([digits[:, :, 2] + 0.5 * bone + 0.72 * out, digits[:, :, 3] + 0.6 * out], 1)
    parts = [wrist, digits.reshape(count, 20, 3), carpus, palm, web, sample_forearm(rng, count), nails]
    size = 1 + normal(rng, 0.05, count)
    return np.concatenate(parts, 1) * size[:, None, None], size * (1 + normal(rng, 0.05, count))


def rotation(roll, pitch, yaw):
    """Matrices (B, 3, 3) = Rz(roll) Rx(pitch) Ry(yaw), radians: roll turns the picture, the others tilt."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    rows = [[cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy],
            [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy], [-cp * sy, sp, cp * cy]]
    return np.array(rows, np.float32).transpose(2, 0, 1)                   # (B, 3, 3)


def place(rng, points, look):
    """Hands (B, P, 3) mm -> camera frame: turned as the domain's viewpoints say, 400-900 mm away, up to 11
    degrees off the optical axis in x and in y."""
    count = len(points)
    angles = [np.radians(uniform(rng, look[key], count)) for key in ("roll", "pitch", "yaw")]
    depth = uniform(rng, (400, 900), count, 1)
    centre = np.concatenate([uniform(rng, (-0.2, 0.2), count, 2) * depth, depth], 1)  # (B, 3) mm
    points = points @ rotation(*angles).transpose(0, 2, 1)
    return points + (centre - points[:, :21].mean(1))[:, None]             # (B, P, 3) mm, camera


def crop_intrinsics(joints, side):
    """Pinhole K (B, 3, 3) in stored pixels for joints (B, 21, 3) mm. The wide picture's focal length cancels:
    the square box of the joints, seen on the plane z = 1, is to fill 1 / (1.5 * 1.25) of the stored image."""
    flat = joints[..., :2] / joints[..., 2:]
    low, high = flat.min(1), flat.max(1)                                   # (B, 2)
    focal = side / (1.5 * 1.25 * (high - low).max(1))
    matrix = focal[:, None, None] * np.float32(np.diag([1, 1, 0])) + np.float32(np.diag([0, 0, 1]))
    matrix[:, :2, 2] = (side - 1) / 2 - focal[:, None] * (low + high) / 2  # pixel centres are integers
    return matrix                                                          # (B, 3, 3)


def to_pixels(points, intrinsics):
    """(B, P, 3) mm, camera -> (B, P, 2) px."""
    return points[..., :2] / points[..., 2:] * intrinsics[:, None, 0, :1] + intrinsics[:, None, :2, 2]


def cone_surface(ends, radii, depths, x, y):
    """A round cone (capsule of two radii) in each image, seen on the pixels x (B, 1, w), y (B, w, 1): ends
    (B, 2, 2) px, radii (B, 2) px, depths (B, 2) px -> cover (B, w, w) 0..1, and of the visible surface depth
    (B, w, w) px and normal x and y. e is the distance to the axis of length L on the image, t runs along it.
    The outline lies beside the nearest t; what is seen sqrt(r^2 - e^2) dz / (L sqrt(L^2 + dz^2)) before."""
    start = np.concatenate([ends, radii[..., None], depths[..., None]], 2).transpose(1, 2, 0)[..., None, None]
    (x0, y0, r, z), (dx, dy, dr, dz) = start[0], start[1] - start[0]       # (B, 1, 1) each
    dx = np.where(dx ** 2 + dy ** 2 < 1e-3, np.float32(0.04), dx)          # L is never 0
    square = dx ** 2 + dy ** 2                                             # L^2, (B, 1, 1)
    x, y = x - x0, y - y0
    along = x * (dx / square) + y * (dy / square)                          # (B, w, w), 0..1 between the ends
    aside = (x * dy - y * dx) ** 2 / square                                # e^2
    t = np.clip(along, 0, 1)
    radius = r + t * dr
    cover = np.clip((radius - np.sqrt(aside + (along - t) ** 2 * square)) * FINE + 0.5, 0, 1)
    before = dz / np.sqrt(square * (square + dz ** 2))
    t = np.clip(along - before * np.sqrt(np.maximum(radius ** 2 - aside, 0)), 0, 1)
    radius = r + t * dr
    height = np.sqrt(np.maximum(radius ** 2 - aside - (along - t) ** 2 * square, 0))
    return cover, z + t * dz - height, (x - t * dx) / radius, (y - t * dy) / radius


def draw_cone(sums, cone, flat, scale, girth, depth, sleeved):
    """Adds one of CONES to sums (6, B, G, G), in place and in each image's own window of the G x G samples:
    weight, weight * normal x, weight * normal y, weight of nail, of sleeve; the last keeps the largest cover.
    flat (B, P, 2) px, scale (B, P) px per mm, girth (B,), depth (B, P) px, sleeved (B,) 0 or 1."""
    (i, j, ri, rj, what), (count, grid) = cone, sums.shape[1:3]
    wide = girth * (1 + 0.15 * sleeved if what == CLOTH else 1)
    ends, radii = flat[:, [i, j]], scale[:, [i, j]] * np.float32([ri, rj]) * wide[:, None]  # px
    low, high = (ends - radii[..., None]).min(1), (ends + radii[..., None]).max(1)  # (B, 2) px
    low, high = (np.clip((v + 0.5) * FINE + m, 0, grid).astype(int) for v, m in ((low, -1), (high, 2)))
    width = max(int((high - low).max()), 1)
    low = np.minimum(low, grid - width)                                    # (B, 2) samples, x and y
    x, y = ((low.T[..., None] + np.arange(width) + 0.5) / FINE - 0.5).astype(np.float32)  # (B, w) px each
    cover, z, nx, ny = cone_surface(ends, radii, depth[:, [i, j]], x[:, None], y[..., None])
    weight = cover * np.exp(np.clip(z * (-1 / BLEND / scale[:, :1, None]), -80, 80))
    window = sliding_window_view(sums, (width, width), (2, 3), writeable=True)  # (6, B, y, x, w, w)
    where = np.arange(count), low[:, 1], low[:, 0]
    window[0][where] += weight
    window[1][where] += weight * nx
    window[2][where] += weight * ny
    if what != SKIN:
        window[2 + what][where] += weight * (sleeved[:, None, None] if what == CLOTH else 1)
    window[5][where] = np.maximum(window[5][where], cover)


def rasterise(points, girth, sleeved, intrinsics, side):
    """Draws CONES for points (B, P, 3) mm -> (6, B, S, S) float32, the channels of `draw_cone`.

    Every sample sums exp(-depth / BLEND) over the cones: a z-buffer whose order does not matter, which melts
    surfaces that meet and parts those that lie apart. Hands of like size share a group: tight windows."""
    flat = to_pixels(points, intrinsics)                                     # (B, P, 2) px
    scale = intrinsics[:, 0, 0, None] / points[..., 2]                     # (B, P) px per mm
    depth = (points[..., 2] - points[:, :1, 2]) * scale[:, :1]             # (B, P) px, from the wrist
    layers = np.empty((6, len(points), side, side), np.float32)
    for rows in np.array_split(np.argsort(scale[:, 0]), -(-len(points) // GROUP)):
        sums = np.zeros((6, len(rows), side * FINE, side * FINE), np.float32)
        for cone in CONES:
            draw_cone(sums, cone, flat[rows], scale[rows], girth[rows], depth[rows], sleeved[rows])
        sums = sum(sums[..., k::FINE, :] for k in range(FINE))             # ten times faster than mean()
        layers[:, rows] = sum(sums[..., k::FINE] for k in range(FINE)) / FINE ** 2  # (6, b, S, S)
    return layers


def smooth_noise(rng, count, channels, cells, side):
    """Gaussian noise (B, C, S, S) of variance 1, about `cells` waves across the image: random numbers on a
    coarse lattice, blended by two small matrix products."""
    apart = (np.arange(side, dtype=np.float32)[:, None] + 0.5) / side * cells - np.arange(cells + 1)
    blend = np.exp(-2 * apart ** 2)
    blend = (blend / np.linalg.norm(blend, axis=1, keepdims=True)).astype(np.float32)  # (S, cells + 1)
    return blend @ rng.standard_normal((count, channels, cells + 1, cells + 1), np.float32) @ blend.T


def shade(rng, layers, tone, cloth, look):
    """Layers (6, B, S, S), colours of skin or glove and of the sleeve (B, 3) -> picture (B, 3, S, S) of the
    hand: ambient + diffuse + some specular light; darker where a neighbour lies 3 mm nearer the camera."""
    count, side = layers.shape[1], layers.shape[-1]
    total = np.maximum(layers[0], 1e-35)
    nx, ny, nail, sleeve = layers[1:5] / total                             # (B, S, S) each
    tilt = np.radians(uniform(rng, look["light_angle"], count, 1, 1))
    turn = uniform(rng, (0, 2 * np.pi), count, 1, 1)
    facing = (nx * np.sin(tilt) * np.cos(turn) + ny * (np.sin(tilt) * np.sin(turn) - 0.2)  # rather from above
              + np.sqrt(np.maximum(1 - nx ** 2 - ny ** 2, 0)) * np.cos(tilt))
    facing = np.maximum(facing, 0)                                         # (B, S, S)
    depth = np.where(layers[0] > 1e-30, -BLEND * np.log(total), 150)       # mm, the void lies far back
    reach = max(round(side / 30), 1)
    hidden = sum(np.clip((depth - np.roll(depth, shift, axis) - 3) / 40, 0, 0.5)
                 for axis in (1, 2) for shift in (-reach, reach))
    light, ambient = (uniform(rng, look[key], count, 1, 1, 1) * (1 + normal(rng, tint, count, 3, 1, 1))
                      for key, tint in (("light", look["light_tint"]), ("ambient", look["light_tint"] / 2)))
    bright = ambient + light * facing[:, None]                             # (B, 3, S, S)
    mottle = 1 + 0.04 * smooth_noise(rng, count, 1, 8, side)
    albedo = tone[..., None, None] * (mottle + np.float32([0.35, 0.22, 0.22])[:, None, None] * nail[:, None])
    albedo += sleeve[:, None] * (cloth[..., None, None] - albedo)
    shine = uniform(rng, look["shine"], count, 1, 1) * facing ** 12 * (1 - sleeve)
    return (albedo * bright + shine[:, None]) * (1 - 0.45 * np.minimum(hidden, 1))[:, None]


def paint_shape(rng, canvas, colour, chance, size, aspect, soft, stripes=0.0, rounded=0.0):
    """Lays a soft ellipse or box over each canvas (B, 3, S, S) with probability `chance`, in place: colour
    (B, 3), half length and softness in parts of the side, aspect = width / length, `stripes` the chance of
    stripes, `rounded` 0..1 how dark its long edges are, like a limb's."""
    count, side = len(canvas), canvas.shape[-1]
    centre, turn = uniform(rng, (0, 1), 2, count, 1), uniform(rng, (0, np.pi), count, 1)
    x, y = (np.arange(side, dtype=np.float32) + 0.5) / side - centre       # (B, S) each
    long = uniform(rng, size, count, 1, 1)
    wide = long * uniform(rng, aspect, count, 1, 1)
    p = ((np.cos(turn) * x)[:, None] + (np.sin(turn) * y)[..., None]) / long  # (B, S, S)
    q = ((np.cos(turn) * y)[..., None] - (np.sin(turn) * x)[:, None]) / wide
    boxy, striped, there = (rng.random((count, 1, 1)) < odds for odds in (0.4, stripes, chance))
    away = np.where(boxy, np.maximum(np.abs(p), np.abs(q)), np.sqrt(p ** 2 + q ** 2))
    cover = there * np.clip((1 - away) * wide / uniform(rng, soft, count, 1, 1) + 0.5, 0, 1)
    fill = 1 + 0.3 * np.sin(striped * uniform(rng, (9, 27), count, 1, 1) * p) + uniform(
        rng, (-0.15, 0.15), count, 1, 1) * q - 0.6 * rounded * np.minimum(q ** 2, 1)
    canvas += cover[:, None].astype(np.float32) * (colour[..., None, None] * fill[:, None] - canvas)


def background(rng, count, side, look):
    """What lies behind the hand, (B, 3, S, S) in 0..1: a wall, clouds and grain on it, shapes, and limbs of
    skin colour that are nobody's hand."""
    canvas = pick(rng, look["wall"], look["wall_jitter"], count)[..., None, None]
    for key, cells in (("clouds", 3), ("grain", 16)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas = canvas + uniform(rng, look[key], count, 1, 1, 1) * (grey + 0.5 * colour)
    busy = rng.random((count, 1, 1)) < look["busy"]
    for _ in range(look["shapes"]):
        colour = 0.5 + look["shape_colour"] * uniform(rng, (-0.5, 0.5), count, 3)
        paint_shape(rng, canvas, colour, look["shape_chance"] * busy, look["shape_size"], (0.2, 1.0),
                    look["shape_soft"], look["stripes"])
    for _ in range(look["limbs"]):
        paint_shape(rng, canvas, pick(rng, look["skin"], 0.1, count), look["limb_chance"], (0.15, 0.5),
                    look["limb_aspect"], look["shape_soft"], rounded=1.0)
    return canvas


def develop(rng, image, look):
    """The camera: blur, contrast, white balance, gamma and noise on image (B, 3, S, S), 0..1 -> uint8
    (B, S, S, 3)."""
    count, side = len(image), image.shape[-1]
    sigma = np.maximum(uniform(rng, look["blur"], count, 1, 1, 1) * side, 0.05)  # px
    apart = np.arange(side, dtype=np.float32)[:, None] - np.arange(side, dtype=np.float32)
    kernel = np.exp(-0.5 * (apart / sigma) ** 2)                           # (B, 1, S, S)
    kernel /= kernel.sum(-1, keepdims=True)
    image = kernel @ image @ kernel.transpose(0, 1, 3, 2)
    image = 0.5 + (image - 0.5) * uniform(rng, look["contrast"], count, 1, 1, 1)
    image *= 1 + normal(rng, look["balance"], count, 3, 1, 1)
    image = np.clip(image, 1e-3, 1) ** uniform(rng, look["gamma"], count, 1, 1, 1)
    grain = uniform(rng, (-1.73, 1.73), *image.shape)                      # variance 1, cheaper than Gaussian
    image += grain * uniform(rng, look["noise"], count, 1, 1, 1)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)  # (B, S, S, 3)


def render_hands(rng, domain, count, side):
    """Labelled images of one of DOMAINS: images (B, S, S, 3) uint8; masks (B, S, S) uint8, 255 on a hand and
    its bare forearm, 0 elsewhere and on a sleeve; keypoints (B, 21, 3) and intrinsics (B, 3, 3), float32."""
    look = DOMAINS[domain]
    points, girth = sample_pose(rng, count)
    points = place(rng, points, look)
    intrinsics = crop_intrinsics(points[:, :21], side)
    sleeved = (rng.random(count) < look["sleeve"]).astype(np.float32)
    layers = rasterise(points, girth, sleeved, intrinsics, side)
    gloved = rng.random((count, 1)) < look["glove"]
    skin, glove = pick(rng, look["skin"], look["skin_jitter"], count), pick(rng, look["gloves"], 0.1, count)
    layers[3] *= ~gloved[..., None]                                        # a glove hides the nails
    hand = shade(rng, layers, np.where(gloved, glove, skin), uniform(rng, (0.1, 0.9), count, 3), look)
    image = background(rng, count, side, look)
    image += layers[5][:, None] * (hand - image)
    bare = layers[5] * (1 - layers[4] / np.maximum(layers[0], 1e-35))      # (B, S, S)
    return dict(images=develop(rng, image, look), masks=(bare * 255 + 0.5).astype(np.uint8),
                keypoints=points[:, :21].astype(np.float32), intrinsics=intrinsics)


def render_unconstrained(rng, count, side):
    """X_C: (B, S, S, 3) uint8 without hands. Clouds on many scales, in a third bent to marble or wood, under
    blobs and bars of any colour, a third of them of skin colour."""
    look, canvas = UNCONSTRAINED, np.zeros((count, 3, side, side), np.float32)
    rough = uniform(rng, (0.3, 0.8), count, 1, 1, 1)
    for octave, cells in enumerate((2, 4, 8, 16, 32)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas += rough ** octave * (grey + 0.6 * colour)
    waves = np.sin(canvas[:, :1] * uniform(rng, (1, 5), count, 1, 1, 1))
    canvas = np.where(rng.random((count, 1, 1, 1)) < 0.3, 0.3 * canvas + waves, canvas)
    canvas = uniform(rng, (0.1, 0.9), count, 3, 1, 1) + canvas * uniform(rng, (0.03, 0.16), count, 1, 1, 1)
    for _ in range(look["shapes"]):
        colour = np.where(rng.random((count, 1)) < look["skin_chance"], pick(rng, look["skin"], 0.2, count),
                          uniform(rng, (0, 1), count, 3))
        paint_shape(rng, canvas, colour, look["shape_chance"], look["shape_size"], look["shape_aspect"],
                    look["shape_soft"], look["stripes"], rng.random((count, 1, 1), np.float32))
    return develop(rng, canvas, look)


# ==========================================================================================================
# The embedded benchmark on disk
# ==========================================================================================================
CHUNK = 50  # images of one rendering job; its random numbers depend on (split, chunk) alone
BENCHMARK = {  # folder: (domain, images). No two folders share a random number, so train, val and test are disjoint
    "source_train": ("source", 10000), "source_val": ("source", 1000), "source_test": ("source", 1000),
    "target_train": ("target", 10000), "target_test": ("target", 1000), "unconstrained": (None, 4000),
}


def render_chunk(job: tuple[str, int, int]) -> tuple[dict[str, np.ndarray], list]:
    name, chunk, side = job
    domain, count = BENCHMARK[name]
    rng = random_generator(0, f"hands {name}", chunk)
    count = min(CHUNK, count - chunk * CHUNK)
    return (render_hands(rng, domain, count, side) if domain else {"images": render_unconstrained(rng, count, side)}), []


def make_benchmark(root: str | Path, side: int = 60, workers: int = 0) -> None:
    """Render the data-set folders of BENCHMARK that are not there yet under root, stored crops of `side` px."""
    for name, (domain, count) in BENCHMARK.items():
        if (Path(root) / name).exists(): continue
        meta = {"name": f"hands {domain or 'unconstrained'}", "split": name.split("_")[-1], "margin": 1.25,
                "joints": HAND_JOINTS if domain else [], "bones": HAND_BONES if domain else [], "root": 0,
                "depth_range": 300.0, "origin": f"rendered by this project, {side} px"}
        jobs = [(name, i, side) for i in range(-(-count // CHUNK))]
        build_dataset(Path(root) / name, meta, jobs, render_chunk, workers, CHUNK)


def ensure_benchmark(folders: list[str], rank: int) -> None:
    """Render the embedded benchmark if one of these folders belongs to it and is not there."""
    error = None
    if rank == 0:
        try:
            for folder in map(Path, filter(None, folders)):
                if folder.name in BENCHMARK and folder.parent.name == "hands" and not folder.exists():
                    make_benchmark(folder.parent)
        except InputError as caught: error = caught
    from_rank_0(error)
