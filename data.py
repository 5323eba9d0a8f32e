"""Data: a data set on disk, batches, augmentation, the embedded benchmark, readers of public data sets.

    python data.py hands datasets/hands             render the embedded benchmark (the scripts do so too);
    python data.py bodies datasets/bodies           the same with human bodies
    python data.py freihand ROOT OUT --split train  convert a publisher's files into a data-set folder, once
    python data.py photos ROOT OUT                  any folder of photographs (ImageNet's), as X_C
    python data.py show FOLDER PICTURE.png          draw a few samples, with their labels and masks
    python data.py check FOLDER                     sizes, checksums, and whether the labels are possible

Bring your own data. A data set is a folder of arrays; write it with numpy, and every script reads it:

    images.npy      (n, H, H, 3) uint8     square RGB crops
    masks.npy       (n, H, H)    uint8     0 background .. 255 foreground; only a source needs them
    keypoints.npy   (n, K, 3)    float32   mm, camera frame: x right, y down, z forward; NaN: not labelled
    intrinsics.npy  (n, 3, 3)    float32   of the stored crop, pixel centres at integers: u = fx x / z + cx
    meta.json       {"format": 1, "name": "mine", "split": "train", "joints": ["wrist", ...], "root": 0,
                     "bones": [[0, 1], ...], "depth_range": 300.0, "margin": 1.25, "origin": "whence it came"}

A target needs images.npy and meta.json only; its other files are never opened in training. `margin`: the
stored crop is so many times as wide as the one that a network sees, so that rotation and translation find
real pixels.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import queue
import signal
import threading
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

from udapose import (IMAGE_MEAN, IMAGE_STD, InputError, Progress, autocast, back_project, decode_heatmaps,
                     from_rank_0, from_voxels, project, random_generator, run_script, write_atomically,
                     write_json)

FORMAT = 1
ARRAYS = {"images": (4, np.uint8), "masks": (3, np.uint8),  # axes and type of each array of a data set
          "keypoints": (3, np.float32), "intrinsics": (3, np.float32)}


# ==========================================================================================================
# A data set on disk
# ==========================================================================================================
class Dataset:
    """A data-set folder; `fields` names the arrays to open, memory-mapped. What is not named is not opened.

    Raises InputError, naming file, value and remedy, for a missing, truncated or ill-shaped array.
    """

    def __init__(self, folder: str | Path, *fields: str):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.images = self.masks = self.keypoints = self.intrinsics = None
        for field in ("images", *fields): setattr(self, field, self.open_array(field))
        n, H, W, channels = self.images.shape
        if (H, channels) != (W, 3) or n == 0:
            raise InputError(f"{self.folder}/images.npy: shape {self.images.shape}; not (n > 0, H, H, 3)")
        self.check("masks", (n, H, H))
        self.check("keypoints", (n, len(self.meta["joints"]), 3))
        self.check("intrinsics", (n, 3, 3))
        if self.keypoints is not None and np.isinf(self.keypoints).any():
            row = int(np.isinf(self.keypoints).any(axis=(1, 2)).argmax())
            raise InputError(f"{self.folder}/keypoints.npy: row {row} is infinite; write NaN for no label")

    def __len__(self) -> int:
        return len(self.images)

    def open_array(self, field: str) -> np.ndarray:
        path, (ndim, dtype) = self.folder / f"{field}.npy", ARRAYS[field]
        try: array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing; this use of the folder needs it") from error
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a whole .npy array ({error}); write it again") from error
        if array.ndim != ndim or array.dtype != dtype:
            raise InputError(f"{path}: {array.dtype}, {array.ndim} axes; not {np.dtype(dtype)}, {ndim} axes")
        return array

    def check(self, field: str, shape: tuple) -> None:
        array = getattr(self, field)
        if array is not None and array.shape != shape:
            raise InputError(f"{self.folder}/{field}.npy: shape {array.shape}; the others ask for {shape}")

    @property
    def fingerprint(self) -> str:
        """Changes with the data: meta.json (which holds checksums, where we wrote it) and the shape."""
        return f"{zlib.crc32((json.dumps(self.meta, sort_keys=True) + str(self.images.shape)).encode()):08x}"


def read_meta(folder: Path) -> dict:
    """meta.json, optional fields filled in; InputError if it is missing, broken or of another format."""
    try: meta = json.loads((folder / "meta.json").read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no data set here (no meta.json); see `python data.py -h`") from error
    except ValueError as error: raise InputError(f"{folder}/meta.json: not JSON ({error})") from error
    if not isinstance(meta, dict): raise InputError(f"{folder}/meta.json: not a JSON object")
    missing = {"format", "name", "joints", "bones", "root", "depth_range"} - set(meta)
    if missing: raise InputError(f"{folder}/meta.json: lacks {', '.join(sorted(missing))}")
    if meta["format"] != FORMAT:
        raise InputError(f"{folder}/meta.json: format {meta['format']}; this code reads {FORMAT}")
    if set(meta.get("compare") or []) - set(range(len(meta["joints"]))):
        raise InputError(f"{folder}/meta.json: compare {meta['compare']}; give indices of its joints")
    return {"margin": 1.25, "split": "", "origin": ""} | meta


class Writer:
    """Appends rows to a data-set folder: OUT.part until `finish`; opened after a kill, it goes on there."""

    def __init__(self, folder: str | Path, meta: dict):
        self.folder, self.part, self.files = Path(folder), Path(f"{folder}.part"), {}
        self.meta = json.loads(json.dumps({"format": FORMAT} | meta))  # as it is read back
        if self.folder.exists(): raise InputError(f"{folder}: exists; remove it to make it again")
        try: self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error: raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
        path = self.part / "state.json"
        self.state = json.loads(path.read_text()) if path.exists() else \
            {"meta": self.meta, "jobs": 0, "rows": 0, "skipped": [], "crc": {}, "shape": {}}
        if self.state["meta"] != self.meta:
            raise InputError(f"{self.part}: was begun with other settings; give those again, or remove it")

    def open(self, name: str, shape: list[int]):
        """The file of one array with rows of `shape`, cut back to the rows that were saved."""
        path, dtype = self.part / f"{name}.npy", np.dtype(ARRAYS[name][1])
        file = open(path, "r+b" if path.exists() else "w+b")
        np.lib.format.write_array_header_1_0(  # numpy leaves room in it for the number of rows to grow
            file, {"descr": dtype.str, "fortran_order": False, "shape": (self.state["rows"], *shape)})
        size = file.tell() + self.state["rows"] * math.prod(shape) * dtype.itemsize
        if file.seek(0, os.SEEK_END) < size: raise InputError(f"{path}: has lost rows; remove {self.part}")
        file.truncate(size)
        file.seek(size)
        return file

    def append(self, arrays: dict[str, np.ndarray], skipped: list[str] = ()) -> None:
        """Rows of one job, arrays of the same length; `skipped` names the samples left out and why."""
        state, crc = self.state, dict(self.state["crc"])
        shape = {name: list(rows.shape[1:]) for name, rows in arrays.items()} or state["shape"]
        counts = {len(rows) for rows in arrays.values()} or {0}
        if len(counts) > 1 or (state["rows"] and shape != state["shape"]):
            raise InputError(f"{self.part}: rows {shape} ({counts}) after rows {state['shape']}: one data "
                             "set holds one kind of rows")
        for name, rows in arrays.items():
            if name not in self.files: self.files[name] = self.open(name, shape[name])
            data = np.ascontiguousarray(rows, ARRAYS[name][1]).tobytes()
            self.files[name].write(data)
            crc[name] = zlib.crc32(data, crc.get(name, 0))
        self.state = state | {"jobs": state["jobs"] + 1, "rows": state["rows"] + counts.pop(), "crc": crc,
                              "shape": shape, "skipped": state["skipped"] + list(skipped)}  # all or nothing

    def check_skipped(self, limit: float, final: bool = False) -> None:
        """InputError, with the commonest reason, once more than `limit` of the samples are left out."""
        skipped, kind = self.state["skipped"], lambda text: text.partition(": ")[2].partition(":")[0]
        seen = self.state["rows"] + len(skipped)
        too_many = len(skipped) > limit * seen and (final or seen >= 200)
        if not too_many and (self.state["rows"] or not final): return
        (most, count), = collections.Counter(map(kind, skipped)).most_common(1) or [("", 0)]
        first = next((text for text in skipped if kind(text) == most), "there is none")
        raise InputError(f"{self.folder}: {len(skipped)} of {seen} samples left out, {count} for {most!r} "
                         f"({first}). Mend it, remove {self.part}, run again")

    def save(self) -> None:
        for file in self.files.values(): file.flush(); os.fsync(file.fileno())
        write_json(self.part / "state.json", self.state)

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError): file.close()

    def finish(self) -> None:
        """Writes the final number of rows into the headers and gives the folder its name."""
        self.save()
        self.close()
        for name, shape in self.state["shape"].items(): self.open(name, shape).close()
        counts = {k: self.state[k] for k in ("rows", "crc", "skipped")}
        write_json(self.part / "meta.json", self.meta | counts)
        os.replace(self.part, self.folder)
        (self.folder / "state.json").unlink()


def build_dataset(folder: str | Path, meta: dict, jobs: list, work, workers: int = 0, images_a_job: int = 1,
                  max_skipped: float = 0.05) -> None:
    """Write work(job) for every job, in order, to a data-set folder, on several processes.

    work(job) returns (arrays, skipped). The result does not depend on the number of workers, nor on how often
    it was interrupted: a killed run goes on from its last save, a few hundred rows back. InputError, naming
    the commonest reason, where more than `max_skipped` of the samples are left out: then not they are at
    fault.
    """
    writer, workers = Writer(folder, meta), workers or os.cpu_count() or 1
    start = writer.state["jobs"]
    progress = Progress(f"{Path(folder).name}", len(jobs), images_a_job, start, every=5)
    try:
        for done, (arrays, skipped) in enumerate(ordered_results(work, jobs[start:], workers), start + 1):
            writer.append(arrays, skipped)
            writer.check_skipped(max_skipped)
            if done % max(1, 512 // images_a_job) == 0: writer.save()
            progress.show(done)
        writer.check_skipped(max_skipped, final=True)
        progress.show(len(jobs), final=True)
        writer.finish()
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError, InputError): writer.save()  # ValueError: closed already
        writer.close()
        if isinstance(error, OSError):
            raise InputError(f"{writer.part}: could not be written ({error})") from error
        raise


def ordered_results(work, jobs: list, workers: int):
    """work(job) for each job, in order, computed a little ahead by several processes."""
    if workers == 1 or len(jobs) < 4: yield from map(work, jobs); return
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started threads
    with concurrent.futures.ProcessPoolExecutor(workers, context, quiet_worker) as pool:
        waiting, rest = collections.deque(), iter(jobs)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is the parent's
        waiting.extend(pool.submit(work, job) for job in itertools.islice(rest, workers))
        signal.signal(signal.SIGINT, handler)
        try:
            for job in rest:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= 4 * workers: yield waiting.popleft().result()
            while waiting: yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise InputError("a worker process died; the same command goes on where it stopped") from error
        finally:
            for future in waiting: future.cancel()


def quiet_worker() -> None:
    """Start of a worker: Ctrl-C is the parent's to handle, one thread, and no life after the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))  # noqa: E731
    threading.Thread(target=watch, daemon=True).start()  # a killed parent cannot tell its workers to go


# ==========================================================================================================
# Batches
# ==========================================================================================================
@lru_cache(maxsize=8)
def epoch_permutation(count: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    """The order (count,) of an epoch."""
    return random_generator(seed, purpose, epoch).permutation(count)


def batch_rows(count: int, seed: int, purpose: str, step: int, batch: int) -> np.ndarray:
    """Rows (batch,) of global batch `step`: each of `count` once an epoch, in an order of (seed, epoch)."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([epoch_permutation(count, seed, purpose, int(p // count))[p % count] for p in places])


def prefetch(batches, device: torch.device):
    """The same batches; a thread prepares the next while one is trained on. Its errors come through.

    On CUDA the thread works in a stream of its own, so that copies and augmentation overlap with training.
    """
    box: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item) -> None:
        while not stop.is_set():
            try: return box.put(item, timeout=0.1)
            except queue.Full: continue

    def work() -> None:
        try:
            with torch.cuda.stream(side):                                  # does nothing for None
                for item in batches: put((item, side and side.record_event()))
            put((None, StopIteration()))
        except BaseException as error: put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, event = box.get()
            if isinstance(event, StopIteration): return
            if isinstance(event, BaseException): raise event
            if event is not None: hand_over(item, event)
            yield item
    finally: stop.set()


def hand_over(item, event) -> None:
    """Let the current CUDA stream wait for `event`, and let it own the tensors of item, lists in lists."""
    torch.cuda.current_stream().wait_event(event)
    for part in item:
        if isinstance(part, Tensor): part.record_stream(torch.cuda.current_stream())
        elif part is not None: hand_over(part, event)


# ==========================================================================================================
# Augmentation (Sec. 7: rotation, translation, resize, colour jitter), on the batch, on the training device
# ==========================================================================================================
PARAMETERS = ("angle", "shift_x", "shift_y", "scale", "brightness", "contrast", "saturation",
              "red", "green", "blue")


def augmentation(rng: np.random.Generator, count: int, jitter: float, gain: float = 0.0) -> np.ndarray:
    """Random parameters (count, 10) in the order of PARAMETERS. not in the paper: the ranges (Sec. 7 gives
    none).

    Rotation +-30 degrees, translation +-10 % of the crop, scale 0.8-1.25; brightness, contrast and saturation
    1 +- jitter; channel gains 1 +- gain.
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
    """Stored crops (B, C, H, H) through A (B, 2, 3) to (B, C, side, side), bilinear; edge pixels repeat."""
    H, back = images.shape[-1], torch.linalg.inv_ex(A[:, :, :2])[0]        # (B, 2, 2) crop px -> stored px
    middle = back @ ((side - 1) / 2 - A[:, :, 2:])                  # (B, 2, 1) stored px of the crop's centre
    # grid_sample's own units, in both images: -1 .. 1 from the first pixel's outer edge to the last one's
    theta = torch.cat([back * (side / H), (2 * middle + 1) / H - 1], dim=2)              # (B, 2, 3)
    grid = F.affine_grid(theta, [len(A), 1, side, side], align_corners=False)            # (B, side, side, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1: channel gains and brightness g, contrast c, saturation s; clipped to 0..1.

    x1 = g x;  x2 = c (x1 - mean) + mean;  x3 = s (x2 - grey) + grey: a 3 x 3 matrix and an offset for each
    image, and so one matrix product instead of eight passes over the pixels.
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
    """The inverse of `normalise`, clipped to 0..1."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images * std + mean).clamp(0, 1)


def copy_ahead(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; pinned first on CUDA, so that the copy does not wait."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def load_images(dataset: Dataset, rows: np.ndarray, device: torch.device,
                masks: np.ndarray | None = None) -> Tensor:
    """Rows of the stored images as (B, 3, H, H) in 0..1, or with `masks` (n, H, H) as a fourth channel."""
    x = copy_ahead(dataset.images[rows], device).permute(0, 3, 1, 2)
    if masks is not None: x = torch.cat([x, copy_ahead(masks[rows], device)[:, None]], dim=1)
    return x.float() / 255                                                               # (B, 3 or 4, H, H)


def crops(dataset: Dataset, rows: np.ndarray, parameters: np.ndarray, side: int, device: torch.device,
          masks: np.ndarray | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Augmented crops: images (B, 3, side, side) in 0..1, masks (B, 1, side, side) or None, A (B, 2, 3)."""
    p = torch.from_numpy(parameters).to(device)
    A = crop_transform(p, dataset.images.shape[1], dataset.meta["margin"], side)
    x = warp(load_images(dataset, rows, device, masks), A, side)
    return colour_jitter(x[:, :3], p), None if masks is None else x[:, 3:], A


def labels_of(dataset: Dataset, rows: np.ndarray, A: Tensor) -> tuple[Tensor, Tensor]:
    """Labels in the network's crop: uv (B, K, 2) px, depth (B, K) mm from the root; NaN: not labelled."""
    keypoints = torch.from_numpy(dataset.keypoints[rows]).to(A.device)                  # (B, K, 3) mm, camera
    intrinsics = torch.from_numpy(dataset.intrinsics[rows]).to(A.device)                 # (B, 3, 3)
    uv = transform_points(A, project(keypoints, intrinsics))                             # (B, K, 2) px
    root = dataset.meta["root"]
    return uv, keypoints[..., 2] - keypoints[:, root:root + 1, 2]


def same_skeleton(dataset: Dataset, skeleton: dict) -> None:
    """InputError unless the data set's joints, root and depth range are those that a model learned."""
    theirs, ours = dataset.meta["joints"], skeleton["joints"]
    if len(theirs) != len(ours):
        raise InputError(f"{dataset.folder}: {len(theirs)} joints, the model has {len(ours)}")
    for key in ("joints", "root", "depth_range"):
        if dataset.meta[key] != skeleton[key]:
            raise InputError(f"{dataset.folder}: {key} is {dataset.meta[key]}, the model has {skeleton[key]}")


def compared(meta: dict) -> list[int]:
    """Joints over which errors are averaged: `compare` of meta.json; else all, but of a human not the root,
    whose error is 0 by definition: hands' EPE counts the wrist by custom, MPJPE here does not the pelvis."""
    body = meta["joints"] == HUMAN_JOINTS
    return meta.get("compare") or [i for i in range(len(meta["joints"])) if not body or i != meta["root"]]


def predict(estimator, dataset: Dataset, rows: np.ndarray, side: int, device,
            dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Predicted and true keypoints (B, K, 3) mm, camera frame of the crop, with the root's true depth.

    not in the paper: heatmaps give pixels and depth from the root; the crop's intrinsics and the root's true
    depth turn them into millimetres, as 3D-heatmap methods do. Errors are root-aligned, so that depth only
    scales x, y.
    """
    images, _, A = crops(dataset, rows, no_augmentation(len(rows)), side, device)
    with autocast(A.device, dtype): heatmaps = estimator.heatmaps(normalise(images))       # (B, K, S, S, S)
    uv, depth = from_voxels(decode_heatmaps(heatmaps), side, dataset.meta["depth_range"], heatmaps.shape[-1])
    truth = torch.from_numpy(dataset.keypoints[rows]).to(device)                        # (B, K, 3) mm, camera
    intrinsics = transform_intrinsics(A, torch.from_numpy(dataset.intrinsics[rows]).to(device))
    root = dataset.meta["root"]
    return back_project(uv, truth[:, root:root + 1, 2] + depth, intrinsics), truth


def chunks(count: int, size: int = 100) -> list[np.ndarray]:
    """Rows 0..count-1 in pieces of at most `size`."""
    return np.array_split(np.arange(count), -(-count // size))


def open_masks(path: str | Path, dataset: Dataset) -> np.ndarray:
    """Masks (n, H, H) uint8 of a data set in a file of their own: f^S's lie in the run."""
    try: masks = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: no readable masks ({error})") from error
    if masks.shape != dataset.images.shape[:3] or masks.dtype != np.uint8:
        raise InputError(f"{path}: {masks.dtype} {masks.shape}; expected uint8 {dataset.images.shape[:3]}")
    return masks


# ==========================================================================================================
# The embedded benchmark: hands and bodies rendered by round cones, in two domains
# ==========================================================================================================
HAND_JOINTS = ["wrist"] + [f"{name}_{i}" for name in ("thumb", "index", "middle", "ring", "little")
                           for i in (1, 2, 3, 4)]                          # a finger: palm -> tip
HAND_BONES = [(0 if i % 4 == 1 else i - 1, i) for i in range(1, 21)]       # (parent, child)
HAND = {"joints": HAND_JOINTS, "bones": HAND_BONES, "root": 0, "depth_range": 300.0}
HUMAN_JOINTS = ["pelvis", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
                "spine", "thorax", "nose", "head", "left_shoulder", "left_elbow", "left_wrist",
                "right_shoulder", "right_elbow", "right_wrist"]             # in Human3.6M's order
HUMAN_BONES = list(zip((0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15), range(1, 17)))  # (parent, child)
HUMAN = {"joints": HUMAN_JOINTS, "bones": HUMAN_BONES, "root": 0, "depth_range": 2000.0}

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
HAND_CONES = [
    (4 * f + k, 4 * f + k + 1, *RADII[f, k - 1:k + 1], SKIN) for f in range(5) for k in (1, 2, 3)] + [
    (CARPUS, PALM, 18, 16.5, SKIN), (CARPUS + 1, PALM + 1, 18, 17, SKIN), (WEB, WEB + 1, 9, 11, SKIN),
    (CARPUS + 1, PALM + 2, 18, 16.5, SKIN), (CARPUS + 2, PALM + 3, 18, 15.5, SKIN), (2, PALM, 6, 8, SKIN),
    (CARPUS, 1, 15, 13, SKIN), (CARPUS, ARM, 18, 19, SKIN), (CARPUS + 2, ARM + 1, 18, 19, SKIN),
    (ARM, ARM + 2, 19, 22, CLOTH), (ARM + 1, ARM + 3, 19, 22, CLOTH),
    (ARM + 2, ARM + 4, 22, 29, CLOTH), (ARM + 3, ARM + 5, 22, 29, CLOTH),
] + [(NAIL + f, NAIL + 5 + f, 0.63 * RADII[f, 3], 0.55 * RADII[f, 3], HORN) for f in range(5)]
FINE = 2            # samples per stored pixel and axis
GROUP = 32          # hands or bodies drawn together: few enough for the processor's cache

# The body at rest, 1655 mm tall: standing, arms down, facing the camera, so that its right is at -x, its
# front at -z. A part turns about a joint, in the frame of the part before. A point: its part, mm from there.
BASIN, WAIST, CHEST, HEAD, THIGH, SHIN, FOOT, UPPER_ARM, FOREARM = range(9)  # right side; + 5: the left
PIVOT = [0, 0, 7, 8, 1, 2, 3, 14, 15, 4, 5, 6, 11, 12]                     # joint that a part turns about
SKULL, HIPS, ENDS = 17, 22, 34  # what only the drawing needs follows the joints: head; right and left; cuffs
BODY = np.zeros((34, 4), np.float32)
BODY[[0, 7, 8, 9, 10, *range(SKULL, HIPS)]] = [                            # the middle
    (BASIN, 0, 0, 0), (WAIST, 0, -225, 8), (CHEST, 0, -250, 8), (HEAD, 0, -140, -105), (HEAD, 0, -250, -20),
    (HEAD, 0, -165, -22), (HEAD, 0, -105, -60), (HEAD, 0, -105, -8),       # skull, chin, neck
    (HEAD, 0, -190, -4), (HEAD, 0, -100, 16)]                              # hair: crown, nape
BODY[[1, 2, 3, 14, 15, 16, *range(HIPS, HIPS + 6)]] = [                    # the right side
    (BASIN, -110, 5, 0), (THIGH, 0, 430, 0), (SHIN, 0, 415, 0),            # hip, knee, ankle
    (CHEST, -165, -225, 5), (UPPER_ARM, 0, 290, 0), (FOREARM, 0, 255, 0),  # shoulder, elbow, wrist
    (BASIN, -70, 15, 8), (WAIST, -50, -150, 0), (CHEST, -58, -165, -4),    # flank: hip, waist, breast
    (FOOT, 0, 45, 35), (FOOT, 0, 55, -135), (FOREARM, 0, 345, -8)]         # heel, toes, knuckles
LEFT, RIGHT = [4, 5, 6, 11, 12, 13, *range(HIPS + 6, ENDS)], [1, 2, 3, 14, 15, 16, *range(HIPS, HIPS + 6)]
BODY[LEFT] = BODY[RIGHT] * np.float32([1, -1, 1, 1])
BODY[LEFT, 0] += 5 * (BODY[LEFT, 0] >= THIGH)

# Degrees, a row an activity, mean and standard deviation: flexion, abduction, turning out of the hip, flexion
# of the knee; the same of shoulder and elbow; swing of the limbs in walking; lean of the trunk.
ACTIVITIES = np.float32([
    [[2, 4, 8, 4, 4, 8, 0, 20, 0, 1], [4, 3, 8, 4, 10, 6, 12, 15, 5, 3]],              # standing
    [[4, 2, 6, 14, 0, 7, 0, 28, 26, 5], [4, 2, 6, 6, 6, 5, 10, 14, 8, 4]],             # walking
    [[2, 5, 8, 5, 28, 16, 0, 75, 0, 2], [5, 4, 8, 5, 22, 14, 20, 30, 6, 4]],           # talking
    [[4, 6, 8, 12, 70, 25, 0, 22, 12, 10], [10, 5, 8, 12, 45, 25, 20, 18, 12, 12]],   # reaching
    [[2, 6, 8, 4, 150, 20, 0, 30, 0, -2], [5, 5, 8, 5, 20, 15, 20, 30, 8, 5]],         # arms up
    [[88, 10, 4, 85, 32, 12, 0, 55, 0, -4], [10, 8, 8, 16, 18, 8, 15, 25, 0, 8]],      # sitting
    [[70, 15, 8, 112, 50, 14, 0, 45, 4, 28], [12, 8, 8, 14, 22, 10, 15, 25, 6, 8]]])   # crouching
JOINT_LIMITS = np.float32([[-20, -4, -25, 0, -45, 2, -45, 0], [120, 45, 40, 140, 175, 120, 60, 145]])

HAIR, SHIRT, SLEEVE, TROUSERS, LEG, SHOES = range(CLOTH, CLOTH + 6)
HUMAN_CONES = [(SKULL, SKULL + 1, 80, 50, SKIN), (8, SKULL + 2, 50, 46, SKIN), (14, 11, 44, 44, SHIRT),
               (SKULL + 3, SKULL + 4, 70, 48, HAIR), (HIPS, HIPS + 6, 80, 80, TROUSERS)] + [
    cone for flank, end, hip, shoulder in ((HIPS, ENDS, 1, 14), (HIPS + 6, ENDS + 4, 4, 11)) for cone in (
        (flank, flank + 1, 80, 74, TROUSERS), (flank + 1, flank + 2, 76, 84, SHIRT),
        (flank + 2, shoulder, 80, 46, SHIRT), (hip, end, 76, 58, TROUSERS), (end, end + 1, 60, 52, LEG),
        (end + 1, hip + 2, 52, 38, SKIN), (hip + 2, flank + 3, 38, 34, SKIN),
        (flank + 3, flank + 4, 34, 30, SHOES), (shoulder, end + 2, 44, 38, SHIRT),
        (end + 2, end + 3, 40, 36, SLEEVE), (end + 3, shoulder + 2, 36, 27, SKIN),
        (shoulder + 2, flank + 5, 29, 24, SKIN))]

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
CLOTHES = dict(  # sleeves end at 0 the shoulder, 1 the elbow, 2 the wrist; trousers' legs alike
    shirt=[(225, 225, 225), (130, 130, 140), (60, 80, 130), (45, 45, 50), (150, 60, 60)], sleeve=(0.4, 1.9),
    trousers=[(55, 70, 110), (45, 45, 50), (170, 155, 125)], leg=(0.6, 2.4), cloth_jitter=0.08, pattern=0.0,
    shoes=[(40, 40, 45), (225, 225, 225), (100, 70, 50)], hair=[(40, 30, 25), (90, 60, 40), (190, 160, 110)],
    roll=(-8, 8), pitch=(-8, 15), yaw=(-150, 150), floor=[(150, 140, 130), (110, 90, 70), (90, 90, 95)])
OTHER_CLOTHES = dict(
    shirt=[(200, 60, 50), (230, 180, 60), (60, 140, 90), (60, 120, 190), (150, 80, 160), (235, 235, 225),
           (40, 40, 45)], sleeve=(0.2, 1.9), cloth_jitter=0.2, pattern=0.5,
    trousers=[(90, 100, 70), (120, 60, 50), (200, 190, 180), (50, 60, 80), (30, 30, 35)], leg=(0.3, 2.2),
    shoes=[(200, 60, 60), (60, 90, 160), (230, 230, 230), (60, 50, 40)],
    hair=[(25, 20, 20), (150, 150, 150), (150, 80, 45), (230, 205, 150)],
    decoys=[(200, 60, 50), (60, 120, 190), (120, 60, 50), (148, 98, 72), (250, 226, 214), (50, 60, 80)],
    roll=(-12, 12), pitch=(0, 30), yaw=(-70, 230),
    floor=[(100, 110, 70), (140, 110, 90), (80, 70, 90), (180, 170, 150)])
HUMAN_DOMAINS = {
    "source": DOMAINS["source"] | CLOTHES, "target": DOMAINS["target"] | OTHER_CLOTHES,
    "target_shifted": DOMAINS["target_shifted"] | OTHER_CLOTHES | dict(
        shirt=[(240, 130, 170), (120, 200, 190), (110, 110, 60), (90, 60, 120), (240, 240, 120)], pattern=0.7,
        trousers=[(160, 140, 60), (70, 110, 120), (130, 130, 140)], roll=(-15, 15), pitch=(5, 40))}
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


def sample_hand(rng, count):
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


def sample_stance(rng, count):
    """Flexion, abduction and turning out of the 14 parts of a body, rad, (B, 14, 3), within joint limits: an
    activity's mean and deviation, of which both sides share a part; in walking, left and right swing."""
    activity = rng.integers(len(ACTIVITIES), size=count)
    mean, sd = ACTIVITIES[activity].transpose(1, 0, 2)[:, :, None]         # (B, 1, 10) each
    drawn = mean + sd * (normal(rng, 0.6, count, 1, 10) + normal(rng, 0.8, count, 2, 10))  # (B, 2, 10)
    phase = uniform(rng, (0, 2 * np.pi), count, 1) + np.float32([0, np.pi])  # (B, 2)
    stride, lean = drawn[:, :1, 8], drawn[:, 0, 9]
    drawn[..., 0] += lean[:, None] + stride * np.sin(phase)                # legs stand where the trunk leans
    drawn[..., 3] += 1.3 * abs(stride) * np.maximum(np.cos(phase), 0)      # the knee bends on the way forward
    drawn[..., 4] -= 0.8 * stride * np.sin(phase)
    limbs = np.clip(drawn[..., :8], *JOINT_LIMITS)                         # (B, 2, 8)
    stance = np.zeros((count, 14, 3), np.float32)
    stance[:, :4] = normal(rng, 1, count, 4, 3) * np.float32([[0, 2, 0], [5, 5, 7], [5, 5, 7], [10, 6, 25]])
    stance[:, :3, 0] -= lean[:, None] * np.float32([1, 0.3, 0.3])
    for side, thigh in enumerate((THIGH, THIGH + 5)):
        stance[:, thigh], stance[:, thigh + 3] = limbs[:, side, :3], limbs[:, side, 4:7]
        stance[:, thigh + 1, 0], stance[:, thigh + 4, 0] = -limbs[:, side, 3], limbs[:, side, 7]
        level = lean - limbs[:, side, 0] + limbs[:, side, 3]               # the ankle bends to level the foot
        stance[:, thigh + 2, 0] = np.clip(level, -45, 30)
    return np.radians(stance)


def sample_body(rng, count):
    """Forward kinematics of random bodies, pelvis at 0, as `sample_hand`: points (B, 34, 3) mm, girth (B,).
    Flexion moves a hanging limb forward; left abduction and turning out are the mirror image of the right."""
    angles = sample_stance(rng, count).transpose(2, 0, 1)                  # (3, B, 14)
    angles[1:, :, :9] *= -1
    # rotation() is Rz Rx Ry of its angles; with the axes in reverse, Rx Rz Ry of the negative ones
    turn = rotation(*angles.reshape(3, -1)).reshape(count, 14, 3, 3)[..., ::-1, ::-1]
    size = 1 + normal(rng, 0.035, count, 14)
    size[:, 9:] = size[:, 4:9]                                             # both sides are equally long
    part, rest = BODY[:, 0].astype(int), BODY[:, 1:]
    rest = rest * size[:, part, None]                                      # (B, 34, 3) mm
    frames, points = turn.copy(), np.zeros((count, 34, 3), np.float32)
    for p, pivot in enumerate(PIVOT):
        if p: frames[:, p] = frames[:, part[pivot]] @ turn[:, p]
        own = np.flatnonzero(part == p)
        points[:, own] = points[:, pivot, None] + rest[:, own] @ frames[:, p].transpose(0, 2, 1)
    stature = uniform(rng, (1500, 1950), count) / 1655
    return points * stature[:, None, None], stature * (1 + normal(rng, 0.1, count))


def rotation(roll, pitch, yaw):
    """Matrices (B, 3, 3) = Rz(roll) Rx(pitch) Ry(yaw), radians: roll turns the picture, the others tilt."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    rows = [[cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy],
            [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy], [-cp * sy, sp, cp * cy]]
    return np.array(rows, np.float32).transpose(2, 0, 1)                   # (B, 3, 3)


def place(rng, points, joints, distance, look):
    """Points (B, P, 3) mm -> camera frame: turned as the domain's viewpoints say, the mean of the `joints`
    first ones at a depth within `distance` mm, up to 11 degrees off the optical axis in x and in y."""
    count = len(points)
    angles = [np.radians(uniform(rng, look[key], count)) for key in ("roll", "pitch", "yaw")]
    depth = uniform(rng, distance, count, 1)
    centre = np.concatenate([uniform(rng, (-0.2, 0.2), count, 2) * depth, depth], 1)  # (B, 3) mm
    points = points @ rotation(*angles).transpose(0, 2, 1)
    return points + (centre - points[:, :joints].mean(1))[:, None]            # (B, P, 3) mm, camera


def crop_intrinsics(joints, side):
    """Pinhole K (B, 3, 3) in stored pixels for joints (B, K, 3) mm. The wide picture's focal length cancels:
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


def draw_cone(sums, cone, blend, flat, scale, girth, depth, *worn):
    """Adds a cone to sums (3 + M + 1, B, G, G), in place and in each image's own window of the G x G samples:
    weight, weight * normal x, weight * normal y, weight of each of the M materials but skin; the last keeps
    the largest cover. flat (B, P, 2) px, scale (B, P) px per mm, girth (B,), depth (B, P) px; worn: for each
    of the M materials (B,), 0 where it is skin after all. Clothes are 15 % wider than the limb."""
    (i, j, ri, rj, what), (count, grid) = cone, sums.shape[1:3]
    wide = girth * (1 + 0.15 * worn[what - 1] if what >= CLOTH else 1)
    ends, radii = flat[:, [i, j]], scale[:, [i, j]] * np.float32([ri, rj]) * wide[:, None]  # px
    low, high = (ends - radii[..., None]).min(1), (ends + radii[..., None]).max(1)  # (B, 2) px
    low, high = (np.clip((v + 0.5) * FINE + m, 0, grid).astype(int) for v, m in ((low, -1), (high, 2)))
    width = max(int((high - low).max()), 1)
    low = np.minimum(low, grid - width)                                    # (B, 2) samples, x and y
    x, y = ((low.T[..., None] + np.arange(width) + 0.5) / FINE - 0.5).astype(np.float32)  # (B, w) px each
    cover, z, nx, ny = cone_surface(ends, radii, depth[:, [i, j]], x[:, None], y[..., None])
    weight = cover * np.exp(np.clip(z * (-1 / blend / scale[:, :1, None]), -80, 80))
    window = sliding_window_view(sums, (width, width), (2, 3), writeable=True)  # (6.., B, y, x, w, w)
    where = np.arange(count), low[:, 1], low[:, 0]
    window[0][where] += weight
    window[1][where] += weight * nx
    window[2][where] += weight * ny
    if what != SKIN: window[2 + what][where] += weight * worn[what - 1][:, None, None]
    window[-1][where] = np.maximum(window[-1][where], cover)


def rasterise(cones, blend, points, girth, worn, intrinsics, side):
    """Draws `cones` for points (B, P, 3) mm -> (3 + M + 1, B, S, S) float32, the channels of `draw_cone`.

    Every sample sums exp(-depth / blend) over the cones: a z-buffer whose order does not matter, which melts
    surfaces that meet and parts those that lie apart. Figures of like size share a group: tight windows."""
    flat = to_pixels(points, intrinsics)                                   # (B, P, 2) px
    scale = intrinsics[:, 0, 0, None] / points[..., 2]                     # (B, P) px per mm
    depth = (points[..., 2] - points[:, :1, 2]) * scale[:, :1]             # (B, P) px, from the root
    layers = np.empty((4 + len(worn), len(points), side, side), np.float32)
    for rows in np.array_split(np.argsort(scale[:, 0]), -(-len(points) // GROUP)):
        sums = np.zeros((len(layers), len(rows), side * FINE, side * FINE), np.float32)
        own = [array[rows] for array in (flat, scale, girth, depth, *worn)]
        for cone in cones: draw_cone(sums, cone, blend, *own)
        sums = sum(sums[..., k::FINE, :] for k in range(FINE))             # ten times faster than mean()
        layers[:, rows] = sum(sums[..., k::FINE] for k in range(FINE)) / FINE ** 2  # (4 + M, b, S, S)
    return layers


def smooth_noise(rng, count, channels, cells, side):
    """Gaussian noise (B, C, S, S) of variance 1, about `cells` waves across the image: random numbers on a
    coarse lattice, blended by two small matrix products."""
    apart = (np.arange(side, dtype=np.float32)[:, None] + 0.5) / side * cells - np.arange(cells + 1)
    blend = np.exp(-2 * apart ** 2)
    blend = (blend / np.linalg.norm(blend, axis=1, keepdims=True)).astype(np.float32)  # (S, cells + 1)
    return blend @ rng.standard_normal((count, channels, cells + 1, cells + 1), np.float32) @ blend.T


def shade(rng, layers, blend, tone, cloths, look):
    """Layers (4 + M, B, S, S), colours of skin or glove (B, 3) and of the M - 1 clothes, each (B, 3, S, S) or
    (B, 3, 1, 1) -> picture (B, 3, S, S): ambient + diffuse + some specular light; darker where a neighbour
    lies nearer the camera, by 3 mm in a hand."""
    count, side = layers.shape[1], layers.shape[-1]
    total = np.maximum(layers[0], 1e-35)
    nx, ny, nail, *worn = layers[1:-1] / total                             # (B, S, S) each
    tilt = np.radians(uniform(rng, look["light_angle"], count, 1, 1))
    turn = uniform(rng, (0, 2 * np.pi), count, 1, 1)
    facing = (nx * np.sin(tilt) * np.cos(turn) + ny * (np.sin(tilt) * np.sin(turn) - 0.2)  # rather from above
              + np.sqrt(np.maximum(1 - nx ** 2 - ny ** 2, 0)) * np.cos(tilt))
    facing = np.maximum(facing, 0)                                         # (B, S, S)
    depth = np.where(layers[0] > 1e-30, -blend * np.log(total), 60 * blend)  # mm, the void lies far back
    reach = max(round(side / 30), 1)
    hidden = sum(np.clip((depth - np.roll(depth, shift, axis) - 1.2 * blend) / (16 * blend), 0, 0.5)
                 for axis in (1, 2) for shift in (-reach, reach))
    light, ambient = (uniform(rng, look[key], count, 1, 1, 1) * (1 + normal(rng, tint, count, 3, 1, 1))
                      for key, tint in (("light", look["light_tint"]), ("ambient", look["light_tint"] / 2)))
    bright = ambient + light * facing[:, None]                             # (B, 3, S, S)
    mottle = 1 + 0.04 * smooth_noise(rng, count, 1, 8, side)
    albedo = tone[..., None, None] * (mottle + np.float32([0.35, 0.22, 0.22])[:, None, None] * nail[:, None])
    for share, cloth in zip(worn, cloths): albedo += share[:, None] * (cloth - albedo)
    shine = uniform(rng, look["shine"], count, 1, 1) * facing ** 12 * (1 - sum(worn))
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
    """What lies behind the figure, (B, 3, S, S) in 0..1: a wall, for bodies a floor, clouds and grain on
    them, shapes, and limbs of the colour of skin (or clothes) that are nobody's."""
    canvas = pick(rng, look["wall"], look["wall_jitter"], count)[..., None, None]
    if "floor" in look:
        floor = pick(rng, look["floor"], look["wall_jitter"], count)[..., None, None]
        down = np.float32(np.arange(side) / side)[:, None] - uniform(rng, (0.45, 0.9), count, 1, 1, 1)
        canvas = canvas + np.clip(down / 0.02 + 0.5, 0, 1) * (floor - canvas)  # (B, 3, S, 1)
    for key, cells in (("clouds", 3), ("grain", 16)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas = canvas + uniform(rng, look[key], count, 1, 1, 1) * (grey + 0.5 * colour)
    busy = rng.random((count, 1, 1)) < look["busy"]
    for _ in range(look["shapes"]):
        colour = 0.5 + look["shape_colour"] * uniform(rng, (-0.5, 0.5), count, 3)
        paint_shape(rng, canvas, colour, look["shape_chance"] * busy, look["shape_size"], (0.2, 1.0),
                    look["shape_soft"], look["stripes"])
    for _ in range(look["limbs"]):
        paint_shape(rng, canvas, pick(rng, look.get("decoys", look["skin"]), 0.1, count),
                    look["limb_chance"], (0.15, 0.5), look["limb_aspect"], look["shape_soft"], rounded=1.0)
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


def dress_hand(rng, points, side, look):
    """What a hand wears -> points (B, P, 3) as given; worn, 0 or 1 for nails and sleeve, (B,) each; colour of
    the skin (B, 3), and of the sleeve (B, 3, 1, 1)."""
    count = len(points)
    sleeved = (rng.random(count) < look["sleeve"]).astype(np.float32)
    gloved = rng.random((count, 1)) < look["glove"]                        # a glove hides the nails
    skin, glove = pick(rng, look["skin"], look["skin_jitter"], count), pick(rng, look["gloves"], 0.1, count)
    cloth = uniform(rng, (0.1, 0.9), count, 3)[..., None, None]
    return points, [~gloved[:, 0], sleeved], np.where(gloved, glove, skin), [cloth]


def fabric(rng, palette, count, side, look):
    """Colours (B, 3, S, S) of a piece of clothing: one of the palette, or stripes or checks of two."""
    plain, other = (pick(rng, palette, look["cloth_jitter"], count)[..., None, None] for _ in range(2))
    turn, waves = uniform(rng, (0, np.pi), count, 1, 1), uniform(rng, (30, 80), count, 1, 1)
    x, y = np.meshgrid(*2 * [np.arange(side, dtype=np.float32) / side])    # (S, S)
    p, q = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x  # (B, S, S)
    checked, printed = (rng.random((count, 1, 1)) < odds for odds in (0.5, look["pattern"]))
    lines = np.sin(waves * p) * np.where(checked, np.sin(waves * q), np.float32(1))
    return plain + (printed * np.clip(2 * lines + 0.5, 0, 1))[:, None] * (other - plain)


def dress_body(rng, points, side, look):
    """As `dress_hand`, for bodies; appends where trousers' legs and sleeves end, on the upper and the lower
    half of each limb: right leg, right arm, left leg, left arm. Of the 7 materials, HORN is never worn."""
    count, ends = len(points), []
    leg, sleeve = (np.clip(uniform(rng, look[key], count), 0, 1.95) for key in ("leg", "sleeve"))
    for top, t in ((1, leg), (14, sleeve), (4, leg), (11, sleeve)):
        upper, middle, lower = (points[:, top + i] for i in range(3))      # (B, 3) mm
        ends += [upper + (middle - upper) * np.minimum(t, 1)[:, None],
                 middle + (lower - middle) * np.maximum(t - 1, 0)[:, None]]
    always, skin = np.ones(count, np.float32), pick(rng, look["skin"], look["skin_jitter"], count)
    hair, shoes = (pick(rng, look[key], 0.1, count)[..., None, None] for key in ("hair", "shoes"))
    shirt, trousers = (fabric(rng, look[key], count, side, look) for key in ("shirt", "trousers"))
    worn = [0 * always, always, always, np.float32(sleeve > 1), always, np.float32(leg > 1), always]
    return (np.concatenate([points, np.stack(ends, 1)], 1), worn, skin,
            [hair, shirt, shirt, trousers, trousers, shoes])


class Kind(NamedTuple):
    """What hands and bodies differ in; everything else about rendering is shared."""
    skeleton: dict
    cones: list
    pose: object      # (rng, count) -> points, girth
    dress: object     # (rng, points, side, look) -> points, worn, tone, cloths
    domains: dict
    blend: float      # mm of depth over which surfaces melt into one another
    distance: tuple   # mm from the camera
    foreign: int      # the clothes that are not foreground, 0: none


KINDS = {"hands": Kind(HAND, HAND_CONES, sample_hand, dress_hand, DOMAINS, 2.5, (400, 900), CLOTH),
         "bodies": Kind(HUMAN, HUMAN_CONES, sample_body, dress_body, HUMAN_DOMAINS, 12.0, (3000, 6000), 0)}


def render(kind, rng, domain, count, side):
    """Labelled images of one of KINDS and of its domains: images (B, S, S, 3) uint8; masks (B, S, S) uint8,
    255 on a body, or on a hand and its bare forearm (not on a sleeve), 0 elsewhere; keypoints (B, K, 3) and
    intrinsics (B, 3, 3), float32."""
    kind = KINDS[kind]
    look, joints = kind.domains[domain], len(kind.skeleton["joints"])
    points, girth = kind.pose(rng, count)
    points = place(rng, points, joints, kind.distance, look)
    intrinsics = crop_intrinsics(points[:, :joints], side)
    points, worn, tone, cloths = kind.dress(rng, points, side, look)
    layers = rasterise(kind.cones, kind.blend, points, girth, worn, intrinsics, side)
    figure = shade(rng, layers, kind.blend, tone, cloths, look)
    image = background(rng, count, side, look)
    image += layers[-1][:, None] * (figure - image)
    mask = layers[-1]                                                      # (B, S, S)
    if kind.foreign: mask = mask * (1 - layers[2 + kind.foreign] / np.maximum(layers[0], 1e-35))
    return dict(images=develop(rng, image, look), masks=(mask * 255 + 0.5).astype(np.uint8),
                keypoints=points[:, :joints].astype(np.float32), intrinsics=intrinsics)


render_hands, render_bodies = (partial(render, kind) for kind in KINDS)


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
BENCHMARK = {  # folder: (domain, images); no two share a random number, so train, val and test are disjoint
    "source_train": ("source", 10000), "source_val": ("source", 1000), "source_test": ("source", 1000),
    "target_train": ("target", 10000), "target_test": ("target", 1000), "unconstrained": (None, 4000),
    "shifted_test": ("target_shifted", 1000),  # a second, unseen look of the target, to check a result on
}


def render_chunk(job: tuple[str, str, int, int]) -> tuple[dict[str, np.ndarray], list]:
    """Job (kind, folder, chunk, side): CHUNK images of a folder of BENCHMARK with their labels."""
    kind, name, chunk, side = job
    domain, count = BENCHMARK[name]
    rng = random_generator(0, f"{kind} {name}", chunk)
    count = min(CHUNK, count - chunk * CHUNK)
    if domain: return render(kind, rng, domain, count, side), []
    return {"images": render_unconstrained(rng, count, side)}, []


def make_benchmark(kind: str, root: str | Path, side: int = 60, workers: int = 0) -> None:
    """Render the folders of BENCHMARK, of `kind`, that are not there yet under root, crops of `side` px."""
    for name, (domain, count) in BENCHMARK.items():
        if (Path(root) / name).exists():
            there = np.load(Path(root) / name / "images.npy", mmap_mode="r").shape[1]
            if there != side: raise InputError(f"{root}/{name}: exists with {there} px; remove it")
            continue
        meta = {"name": f"{kind} {domain or 'unconstrained'}", "split": name.split("_")[-1], "margin": 1.25,
                **KINDS[kind].skeleton, "origin": f"rendered by this project, {side} px"}
        if not domain: meta |= {"joints": [], "bones": []}
        jobs = [(kind, name, i, side) for i in range(-(-count // CHUNK))]
        build_dataset(Path(root) / name, meta, jobs, render_chunk, workers, CHUNK)


def ensure_benchmark(folders: list[str], rank: int) -> None:
    """Render the embedded benchmark if one of these folders belongs to it and is not there."""
    error = None
    if rank == 0:
        try:
            for folder in map(Path, filter(None, folders)):
                kind = folder.parent.name
                if folder.name in BENCHMARK and kind in KINDS and not folder.exists():
                    make_benchmark(kind, folder.parent)
        except InputError as caught: error = caught
    from_rank_0(error)


# ==========================================================================================================
# Readers of public data sets: a publisher's files -> Samples -> checked -> cropped -> a data-set folder
# ==========================================================================================================
# A reader is a function (root, own options with defaults) -> list of Samples. It opens the files of labels,
# not the pictures; a line in READERS puts it on the command line. All readers share everything else.
BOX, MARGIN = 1.5, 1.25  # network's crop: so many times the joints' box; stored crop: so many times that crop
SAMPLES_A_JOB = 16


class Sample(NamedTuple):
    """One picture as its publisher ships it; files are named relative to ROOT."""
    image: str
    keypoints: np.ndarray | None = None   # (K, 3) mm, camera; NaN: not labelled. None: no labels at all
    intrinsics: np.ndarray | None = None  # (3, 3) px of the whole picture, pixel centres at integers
    mask: str | None = None               # foreground where its grey value (palette index) is ..
    foreground: int = 128                 # .. so much or more
    uv: np.ndarray | None = None          # (K, 2) px: the publisher's own 2D labels, where there are any
    size: tuple | None = None             # (width, height) px of every picture of this publisher


def open_picture(path: Path, least: int = 0, foreground: int | None = None) -> np.ndarray:
    """Any picture file as (H, W, 3) uint8, turned as its EXIF says; grey, palette, CMYK, 16 bit become RGB.

    `least`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if both sides keep so many pixels. With
    `foreground` it is a mask, (H, W) bool: True where the grey value (or palette index) is that or more.
    """
    try:
        with Image.open(path) as image:
            if foreground is not None:
                return np.asarray(image if image.mode in "PL" else image.convert("L")) >= foreground
            if least: image.draft("RGB", (least, least))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:  # what lies under it is arbitrary: white instead
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{path}: broken picture: {error}; give a whole PNG or JPEG file") from error


def open_sample(root: Path, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """Picture (H, W, 3) uint8 and mask (H, W) bool or None, of the sizes that they must have."""
    image = open_picture(root / sample.image)
    mask = open_picture(root / sample.mask, foreground=sample.foreground) if sample.mask else None
    width, height = sample.size or image.shape[1::-1]
    for name, array in ((sample.image, image), (sample.mask, mask)):
        if array is not None and (found := array.shape[1::-1]) != (width, height):
            raise InputError(f"{root / name}: {found[0]} x {found[1]} px, expected {width} x {height}")
    return image, mask


def need_files(root: Path, names: list[str], layout: str) -> None:
    """InputError unless all are there: now, not in an hour. Lists a folder once: 100,000 stats are slow."""
    folders = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        try: present = folders[folder] = folders.get(folder) or set(os.listdir(root / folder))
        except OSError as error: raise InputError(f"{root / folder}: no such folder. {layout}") from error
        if file not in present: raise InputError(f"{root / name}: missing. {layout}")


def read_json_array(path: Path, *shape: int) -> np.ndarray:
    """A JSON list of n arrays of `shape` as (n, *shape) float64."""
    try: array = np.array(json.loads(path.read_text()), np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a whole JSON array ({error})") from error
    if array.shape[1:] != shape: raise InputError(f"{path}: shape {array.shape}, expected {('n', *shape)}")
    return array


# ---------------------------------------------------------------- the checks: None, or "kind: what is wrong"

def hand_fault(keypoints: np.ndarray) -> str | None:
    """Joints (21, 3) mm of a right hand, judged by its four fingers: unit, order along a finger, handedness.

    A finger's middle joint bends towards the palm only, so first bone x second bone points from the little
    finger to the index in a right hand, and away in its mirror image. It has to point away by 0.2 (12 degrees
    a finger) to count: straight fingers do not tell, and overstretched ones are no left hand.
    """
    bones = np.diff(keypoints[5:].reshape(4, 4, 3), axis=1)                # (4, 3, 3) mm, palm -> tip
    length = np.linalg.norm(bones, axis=-1)                                # (4, 3) mm
    if np.isfinite(length[1, 0]) and not 15 <= length[1, 0] <= 80:
        return f"bone: {length[1, 0]:.3g} mm from middle_1 to middle_2, not a human's 15 to 80: another unit?"
    if np.nansum(length[:, 2] - length[:, 0]) > 0:
        return "order: the fingers' last bones are longer than the first: from tip to palm?"
    across = keypoints[5] - keypoints[17]                                  # (3,) little finger -> index
    scale = length[:, 0] * length[:, 1] * np.linalg.norm(across) + 1e-9
    if np.nansum(np.cross(bones[:, 0], bones[:, 1]) @ across / scale) / 4 < -0.2:
        return "handedness: fingers bend away from the palm: mirrored, a left hand, fingers in reverse order?"


def projection_fault(keypoints, uv, size, mask=None, published=None) -> str | None:
    """Joints (K, 3) mm, their uv (K, 2) px in a picture of `size` (width, height): before the camera, in the
    picture, at the publisher's own 2D labels (K, 2), on the mask (H, W) bool as they are, not mirrored."""
    valid = np.isfinite(keypoints).all(axis=1)
    if valid.sum() < 2: return f"projection: {valid.sum()} joints have labels"
    if (keypoints[valid, 2] <= 0).any(): return "projection: a joint lies behind the camera"
    uv, size = uv[valid], np.array(size)
    inside, extent = ((uv >= -0.5) & (uv <= size - 0.5)).all(axis=1), np.ptp(uv, axis=0).max()
    if inside.mean() < 0.5: return f"projection: {inside.sum()} of {len(uv)} joints fall on the picture"
    if not 8 <= extent <= 2 * size.max(): return f"projection: the joints' box is {extent:.1f} px wide"
    if published is not None and (apart := np.abs(uv - published[valid]).max()) > max(2, 0.03 * extent):
        return f"projection: {apart:.1f} px from the publisher's 2D labels: camera, order or lens distortion?"
    if mask is not None:
        u, v = np.clip(np.round(uv), 0, size - 1).astype(int).T
        share, mirrored = mask[v, u].mean(), mask[v, size[0] - 1 - u].mean()
        if mirrored > share + 0.25:
            return f"projection: {share:.0%} of the joints on the mask, mirrored {mirrored:.0%}: flipped?"


def fault_of(keypoints, uv, size, mask=None, published=None) -> str | None:
    hand = hand_fault(keypoints) if len(keypoints) == len(HAND_JOINTS) else None
    return hand or projection_fault(keypoints, uv, size, mask, published)


def to_uv(keypoints: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """`project` for one sample: (K, 3) mm, camera, and (3, 3) px -> (K, 2) px."""
    return project(torch.tensor(keypoints)[None], torch.tensor(intrinsics)[None])[0].numpy()


# ---------------------------------------------------------------- the crop

def crop_square(pixels: np.ndarray, corner: np.ndarray, width: float, side: int) -> np.ndarray:
    """A square of `width` px at upper left `corner` (x, y) of pixels (H, W[, 3]) uint8, as (side, side[, 3]).

    Corner and width count from the outer edge of the first pixel: pixel u covers u .. u + 1 there, its centre
    is u + 0.5. Bilinear, antialiased when shrinking; edge pixels go on beyond the picture.
    """
    reach = 2 + math.ceil(width / side)                                    # px that antialiasing sees beyond
    low, high = np.floor(corner).astype(int) - reach, np.ceil(corner + width).astype(int) + reach
    rows, columns = (np.arange(low[i], high[i]).clip(0, pixels.shape[1 - i] - 1) for i in (1, 0))
    x, y = corner - low
    patch = Image.fromarray(pixels[rows[:, None], columns])
    return np.asarray(patch.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + width, y + width)))


def crop_sample(sample: Sample, image, mask, uv: np.ndarray, side: int) -> dict[str, np.ndarray]:
    """A row of each array: the square around the valid joints' uv (K, 2) px, and the intrinsics of it."""
    low, high = np.nanmin(uv, axis=0), np.nanmax(uv, axis=0)               # (2,) px
    width = BOX * MARGIN * (high - low).max()
    corner, s = (low + high) / 2 + 0.5 - width / 2, side / width
    to_crop = np.diag([s, s, 1.0])
    to_crop[:2, 2] = (0.5 - corner) * s - 0.5                              # u' = (u + 0.5 - corner) s - 0.5
    row = {"images": crop_square(image, corner, width, side), "keypoints": np.float32(sample.keypoints),
           "intrinsics": np.float32(to_crop @ sample.intrinsics)}
    return row if mask is None else row | {"masks": crop_square(mask * np.uint8(255), corner, width, side)}


def convert(root: Path, side: int, job: list[Sample]) -> tuple[dict[str, np.ndarray], list[str]]:
    """A job of `build_dataset`: rows of samples that pass the checks; "FILE: kind: what is wrong" of others.

    A broken picture that has labels stops the conversion (the download is broken); any other is left out.
    """
    rows, skipped = [], []
    for sample in job:
        if sample.keypoints is None:
            try: image = open_picture(root / sample.image, side)
            except InputError as error: skipped.append(str(error)); continue
            size = np.array(image.shape[1::-1])
            rows.append({"images": crop_square(image, (size - size.min()) / 2, size.min(), side)})
            continue
        image, mask = open_sample(root, sample)
        uv = to_uv(sample.keypoints, sample.intrinsics)                    # (K, 2) px
        fault = fault_of(sample.keypoints, uv, image.shape[1::-1], mask, sample.uv)
        if fault: skipped.append(f"{sample.image}: {fault}")
        else: rows.append(crop_sample(sample, image, mask, uv, side))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}, skipped


# ---------------------------------------------------------------- the readers

FREIHAND = {  # split: its folder, pictures of a sample, folder of masks, least grey value of a hand, archive
    "train": ("training", 4, "mask", 128, "FreiHAND_pub_v2"),
    "evaluation": ("evaluation", 1, "segmap", 1, "FreiHAND_pub_v2_eval")}


def read_freihand(root: Path, split: str = "train", versions: str = "0123") -> list[Sample]:
    """FreiHAND v2 (Zimmermann et al., ICCV 2019): right hands, 224 x 224 px, our joint order, metres, camera.

    train: n = 32,560 labels and masks (hand and forearm, JPEG noise) of 4 n pictures: picture i + n v shows
    sample i on background v: 0 green screen, 1 harmonised, 2 and 3 recoloured. evaluation: n = 3,960; labels
    and masks came later, in FreiHAND_pub_v2_eval. Rows go by sample, its versions side by side.
    """
    if split not in FREIHAND: raise InputError(f"split {split!r}: {' or '.join(FREIHAND)}")
    if not versions or set(versions) - set("0123"): raise InputError(f"versions {versions!r}: some of 0123")
    part, copies, masks, foreground, archive = FREIHAND[split]
    layout = f"ROOT is {archive} with {part}_xyz.json, {part}_K.json, {part}/rgb/*.jpg, {part}/{masks}/*"
    need_files(root, [f"{part}_xyz.json", f"{part}_K.json", f"{part}/rgb/{0:08d}.jpg"], layout)
    xyz = 1000 * read_json_array(root / f"{part}_xyz.json", 21, 3)         # (n, 21, 3) m -> mm, camera
    K = read_json_array(root / f"{part}_K.json", 3, 3)                     # (n, 3, 3) px
    n, pictures = len(xyz), sum(name.endswith(".jpg") for name in os.listdir(root / part / "rgb"))
    if len(K) != n or pictures != copies * n:  # with a wrong n, i + n v is the picture of another sample
        raise InputError(f"{root}: {n} samples in {part}_xyz.json, {len(K)} in {part}_K.json, {pictures} "
                         f"pictures in {part}/rgb, where {copies} x {n} belong: an incomplete download?")
    masked = split == "train" or (root / part / masks).is_dir()
    suffix = "png" if (root / part / masks / f"{0:08d}.png").exists() else "jpg"
    samples = [Sample(f"{part}/rgb/{i + n * int(v):08d}.jpg", xyz[i], K[i], size=(224, 224),
                      mask=f"{part}/{masks}/{i:08d}.{suffix}" if masked else None, foreground=foreground)
               for i in range(n) for v in (versions if copies > 1 else "0")]
    need_files(root, [file for s in samples for file in (s.image, s.mask) if file], layout)
    return samples


def read_photos(root: Path) -> list[Sample]:
    """Any folder of photographs and its subfolders, as ImageNet's validation images, without labels: X_C."""
    kinds = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in kinds)
    samples = [Sample(file) for file in sorted(files)]
    if not samples: raise InputError(f"{root}: no photographs here ({', '.join(kinds)})")
    return samples


READERS = {  # name on the command line: (reader, skeleton, share of the samples that may be left out)
    "freihand": (read_freihand, HAND, 0.05),
    "photos": (read_photos, HAND | {"joints": [], "bones": []}, 1.0),
}


def convert_dataset(name: str, root: str, out: str, side: int, workers: int, **options) -> None:
    """ROOT as its publisher ships it -> data-set folder OUT, stored crops of `side` px."""
    reader, skeleton, max_skipped = READERS[name]
    samples = reader(Path(root), **options)
    origin = " ".join([f"python data.py {name} --side {side}"] + [f"--{k} {v}" for k, v in options.items()])
    meta = {"name": name, "split": options.get("split", ""), "margin": MARGIN, "origin": origin, **skeleton}
    jobs = [samples[i:i + SAMPLES_A_JOB] for i in range(0, len(samples), SAMPLES_A_JOB)]
    build_dataset(out, meta, jobs, partial(convert, Path(root), side), workers, SAMPLES_A_JOB, max_skipped)
    skipped = read_meta(Path(out))["skipped"]
    print(f"{out}: {len(samples) - len(skipped)} samples, {len(skipped)} left out", *skipped[:5], sep="\n  ")


# ==========================================================================================================
# python data.py: show, check, and the command line
# ==========================================================================================================
COLOURS = ((230, 60, 60), (240, 170, 30), (60, 200, 80), (60, 140, 250), (200, 90, 230), (60, 210, 210))


def open_all(folder: str) -> Dataset:
    return Dataset(folder, *(name for name in ARRAYS if (Path(folder) / f"{name}.npy").exists()))


def draw_skeleton(draw: ImageDraw.ImageDraw, uv: np.ndarray, bones: list, width: int,
                  colour: tuple = ()) -> None:
    """Bones between joints uv (K, 2) px, one colour, or one for each limb; a joint may lack its label."""
    limb = -1
    for i, (a, b) in enumerate(bones):
        limb += i == 0 or a != bones[i - 1][1]  # a bone that starts where the last one ended goes on with it
        if not np.isfinite(uv[[a, b]]).all(): continue
        ink, (u, v) = colour or COLOURS[limb % len(COLOURS)], uv[b]
        draw.line([tuple(uv[a]), tuple(uv[b])], fill=ink, width=width)
        draw.ellipse((u - width, v - width, u + width, v + width), fill=ink)


def draw_sample(dataset: Dataset, row: int, cell: int) -> Image.Image:
    """A stored crop, `cell` px wide: mask outline (white), network's crop (grey), skeleton; name below."""
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
        uv = to_uv(dataset.keypoints[row], dataset.intrinsics[row])        # (K, 2) stored px
        draw_skeleton(draw, (uv + 0.5) * cell / H - 0.5, dataset.meta["bones"], cell // 128)
    draw.text((4, cell + 2), f"{dataset.meta['name']} {dataset.meta['split']} {row}", font_size=22)
    return picture


def show(folder: str, picture: str, cell: int = 512) -> None:
    """A contact sheet of 16 samples from all over the data set, drawn at twice its size and then halved."""
    dataset = open_all(folder)
    rows = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int))
    sheet = Image.new("RGB", (4 * cell, -(-len(rows) // 4) * (cell + 32)))
    for i, row in enumerate(rows):
        sheet.paste(draw_sample(dataset, row, cell), (i % 4 * cell, i // 4 * (cell + 32)))
    write_atomically(Path(picture), lambda path: sheet.reduce(2).save(path, format="PNG"))


def check(folder: str) -> None:
    """Sizes and checksums of all arrays (InputError names what is damaged), and the checks on all labels."""
    dataset = open_all(folder)
    crc, size = dataset.meta.get("crc", {}), dataset.images.shape[1:3]
    for name in ARRAYS:
        array, value, path = getattr(dataset, name), 0, Path(folder) / f"{name}.npy"
        if array is None and name not in crc: continue
        if array is None: raise InputError(f"{path}: missing; meta.json counts on it")
        for i in range(0, len(array), 256): value = zlib.crc32(np.ascontiguousarray(array[i:i + 256]), value)
        if path.stat().st_size != array.offset + array.nbytes or value != crc.get(name, value):
            raise InputError(f"{path}: size or checksum is not what was written; convert it again")
        print(f"{name}.npy: {array.shape} {array.dtype}, {'sound' if name in crc else 'without a checksum'}")
    if dataset.keypoints is None or dataset.intrinsics is None: return
    faults = []
    for i, (keypoints, K) in enumerate(zip(dataset.keypoints, dataset.intrinsics)):
        mask = dataset.masks[i] >= 128 if dataset.masks is not None else None
        if fault := fault_of(keypoints, to_uv(keypoints, K), size, mask): faults.append(f"row {i}: {fault}")
    print(f"labels: {len(faults)} of {len(dataset)} rows are impossible", *faults[:5], sep="\n  ")


def main(arguments=None) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, *places: str, **flags) -> None:
        sub = commands.add_parser(name, description=about, formatter_class=plain)
        for place in places: sub.add_argument(place, metavar=place.upper())
        for flag, value in flags.items():
            sub.add_argument(f"--{flag}", type=type(value), default=value, metavar="", help="[%(default)s]")

    for kind in KINDS: command(kind, f"Render the embedded benchmark of {kind}.", "out", side=60, workers=0)
    for name, (reader, _, _) in READERS.items():  # what a reader takes beside root are its flags
        own = {p.name: p.default for p in inspect.signature(reader).parameters.values() if p.name != "root"}
        command(name, reader.__doc__, "root", "out", **own, side=320, workers=0)
    command("show", "Draw 16 samples of a data-set folder.", "folder", "picture")
    command("check", check.__doc__, "folder")
    given = vars(parser.parse_args(arguments))
    name, side, workers = given.pop("command"), given.get("side", 16), given.get("workers", 0)
    if side < 16 or workers < 0: raise InputError("--side is 16 or more, --workers 0 (all cores) or more")
    if name in KINDS: make_benchmark(name, given["out"], side, workers)
    elif name in ("show", "check"): (show if name == "show" else check)(**given)
    else: convert_dataset(name, **given)


if __name__ == "__main__": run_script(main)
