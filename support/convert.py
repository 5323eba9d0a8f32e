"""Converts a publisher's samples to a data-set folder: checks of the labels, crops, workers, resuming.

Needed by `python data.py NAME ROOT OUT` and by the embedded benchmark. Readers are in support/readers/.
"""
import collections
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support.folder import HAND_JOINTS, HUMAN_JOINTS, MARGIN, write_folder
from support.readers.formats import Damaged, Missing, open_mask, open_picture, open_video, reading
from support.run import InputError, Progress, lock, write_atomically

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SAMPLES_PER_JOB = 16


class Sample(NamedTuple):
    """One picture, or one frame of a video, as its publisher ships it. File names are relative to ROOT."""

    image: str  # picture file, or video file if `frame` is given
    keypoints: np.ndarray | None = None  # (K, 3) mm, camera; NaN: not labelled. None: no labels at all
    intrinsics: np.ndarray | None = None  # (3, 3) px of the whole picture, pixel centres at integers
    mask: str | None = None  # picture file, or .mat file with `mask_key`; all samples have one, or none
    foreground: tuple = (128, 255)  # grey values, palette indices or labels in this closed range
    uv: np.ndarray | None = None  # (K, 2) px: the publisher's own 2D labels, if there are any
    size: tuple | None = None  # (width, height) px, if the publisher fixes it
    frame: int | None = None  # number of the frame in the video `image`, from 0
    mask_key: str | int | None = None  # str: variable of a .mat v5; int: index into cell 'Masks' of a v7.3
    left: bool = False  # a left hand: picture, mask, labels and camera are mirrored to a right one
    distortion: np.ndarray | None = None  # (5,) k1 k2 p1 p2 k3, OpenCV's formula; undone in the crop
    tolerance: float | np.ndarray = 2.0  # px that projected keypoints may be away from `uv`; or (K,)
    around: np.ndarray | None = None  # (n, 3) mm, camera: what the crop has to show besides
    fault: str | None = None  # "kind: why" if this sample's labels are damaged: it is left out and counted

    def __repr__(self) -> str:
        return self.image if self.frame is None else f"{self.image} frame {self.frame}"


# The checks of labels. Each returns None, or "kind: what is wrong".
def hand_fault(keypoints: np.ndarray) -> str | None:
    """What is impossible about joints (21, 3) mm of a right hand: unit, order along a finger, handedness.

    A finger's middle joint bends only towards the palm, so first bone x second bone points from the little
    finger to the index in a right hand. Straight or overstretched fingers do not tell, hence the -0.2.
    """
    bones = np.diff(keypoints[5:].reshape(4, 4, 3), axis=1)  # (4, 3, 3) mm, palm -> tip
    length = np.linalg.norm(bones, axis=-1)  # (4, 3) mm
    if np.isfinite(length[1, 0]) and not 15 <= length[1, 0] <= 80:
        return f"bone: {length[1, 0]:.3g} mm from middle_1 to middle_2, not a human's 15 to 80: another unit?"
    if np.nansum(length[:, 2] - length[:, 0]) > 0:
        return "order: the fingers' last bones are longer than the first: from tip to palm?"
    across = keypoints[5] - keypoints[17]  # (3,) little finger -> index
    scale = length[:, 0] * length[:, 1] * np.linalg.norm(across) + 1e-9
    if np.nansum(np.cross(bones[:, 0], bones[:, 1]) @ across / scale) / 4 < -0.2:
        return "handedness: fingers bend away from the palm: mirrored, a left hand, fingers in reverse order?"


def body_fault(keypoints: np.ndarray) -> str | None:
    """What is impossible about joints (17, 3) mm of HUMAN: unit, order of the sides, handedness.

    A knee bends one way: thigh x shin points from the right hip to the left one. So do elbows, but the
    shoulder turns them: they count less.
    """
    hinges = keypoints[[[1, 2, 3], [4, 5, 6], [14, 15, 16], [11, 12, 13]]]  # (4, 3, 3) mm: knees, elbows
    bones = np.diff(hinges, axis=1)  # (4, 2, 3) mm
    length = np.linalg.norm(bones, axis=-1)  # (4, 2) mm
    for thigh in length[:2, 0]:
        if thigh < 250 or thigh > 600:  # false where it is NaN
            return f"bone: {thigh:.3g} mm from hip to knee, not a human's 250 to 600: another unit?"
    hips, shoulders = keypoints[4] - keypoints[1], keypoints[11] - keypoints[14]  # (3,) right -> left
    if hips @ shoulders / (np.linalg.norm(hips) * np.linalg.norm(shoulders) + 1e-9) < -0.5:
        return "order: shoulders and hips point opposite ways: left and right exchanged in arms or legs?"
    across = hips / (np.linalg.norm(hips) + 1e-9)
    bend = np.cross(bones[:, 0], bones[:, 1]) @ across / (length.prod(axis=1) + 1e-9)  # sine of the angle
    if np.nansum(bend * [1, 1, -0.3, -0.3]) < -0.3:
        return "handedness: knees bend forwards: mirrored, or left and right exchanged?"


def projection_fault(keypoints, uv, size, mask=None, published=None, tolerance=2.0,
                     reach: float | None = None) -> str | None:
    """What is impossible about joints (K, 3) mm that are seen at uv (K, 2) px, in a picture of `size` (w, h).

    They have to be in front of the camera, in the picture, within `tolerance` px, () or (K,), of the
    publisher's own 2D labels (K, 2), and not far better on the mirrored mask than on the mask (H, W) bool
    itself. With `reach`, half of them have to be on the mask or within so many px of it.
    """
    valid = np.isfinite(keypoints).all(axis=1)
    if valid.sum() < 2:
        return f"projection: {valid.sum()} joints have labels"
    if (keypoints[valid, 2] <= 0).any():
        return "projection: a joint lies behind the camera"
    uv, size = uv[valid], np.array(size)
    inside, extent = ((uv >= -0.5) & (uv <= size - 0.5)).all(axis=1), np.ptp(uv, axis=0).max()
    if inside.mean() < 0.5:
        return f"projection: {inside.sum()} of {len(uv)} joints fall on the picture"
    if not 8 <= extent <= 2 * size.max():
        return f"projection: the joints' box is {extent:.1f} px wide"
    if published is not None:
        apart = np.nan_to_num(np.abs(uv - published[valid]).max(axis=1))  # (n,) px; 0: no 2D label
        over = apart > np.broadcast_to(tolerance, len(valid))[valid]
        if over.any():
            return (f"projection: {apart[over].max():.1f} px from the publisher's 2D labels: camera, order "
                    "or lens distortion?")
    if mask is not None:
        u, v = np.clip(np.round(uv), 0, size - 1).astype(int).T
        share, mirrored, r = mask[v, u].mean(), mask[v, size[0] - 1 - u].mean(), int(reach or 0)
        if mirrored > share + 0.25:
            return f"projection: {share:.0%} of the joints on the mask, mirrored {mirrored:.0%}: flipped?"
        near = [mask[max(y - r, 0):y + r + 1, max(x - r, 0):x + r + 1].any()
                for x, y in zip(u, v, strict=True)]
        if reach is not None and np.mean(near) < 0.5:
            return f"mask: {np.mean(near):.0%} of the joints on the mask: labels of another moment?"


def fault_of(joints: list[str], sample: Sample, size, width: float, mask=None) -> str | None:
    """What is impossible about a sample of this skeleton, in a picture of `size` (w, h). Bodies have to be on
    their mask (H, W) bool, widened by 5 % of `width`, that of the crop in px."""
    judge = {tuple(HAND_JOINTS): hand_fault, tuple(HUMAN_JOINTS): body_fault}.get(tuple(joints))
    fault = judge(sample.keypoints * [-1, 1, 1] if sample.left else sample.keypoints) if judge else None
    uv = to_uv(sample.keypoints, sample.intrinsics, sample.distortion)  # (K, 2) px
    reach = 0.05 * width if judge is body_fault else None
    return fault or projection_fault(sample.keypoints, uv, size, mask, sample.uv, sample.tolerance, reach)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """Intrinsics (3, 3) px of a camera without skew."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])  # (3, 3) px


def to_uv(keypoints: np.ndarray, intrinsics: np.ndarray, distortion: np.ndarray | None = None) -> np.ndarray:
    """One sample's joints (K, 3) mm, camera, and intrinsics (3, 3) -> (K, 2) px, through its lens."""
    xy = keypoints[:, :2] / keypoints[:, 2:]
    return distort(xy, distortion) @ intrinsics[:2, :2].T + intrinsics[:2, 2]


def distort(xy: np.ndarray, distortion: np.ndarray | None) -> np.ndarray:
    """Points (.., 2) on the plane z = 1 -> where a lens with k1 k2 p1 p2 k3 shows them, (.., 2)."""
    if distortion is None:
        return xy
    (k1, k2, p1, p2, k3), (x, y) = distortion, (xy[..., 0], xy[..., 1])
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return np.stack([x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
                     y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y], axis=-1)


def crop_square(pixels: np.ndarray, corner: np.ndarray, width: float, side: int) -> np.ndarray:
    """A square of `width` px at upper left `corner` (x, y) of pixels (H, W[, 3]) uint8, as (side, side[, 3]).

    Corner and width count from the outer edge of the first pixel: there, pixel u covers u .. u + 1 and its
    centre is u + 0.5. Bilinear, antialiased when shrinking; edge pixels continue beyond the picture.
    """
    reach = 2 + math.ceil(width / side)  # px that antialiasing sees beyond
    low, high = np.floor(corner).astype(int) - reach, np.ceil(corner + width).astype(int) + reach
    rows, columns = (np.arange(low[i], high[i]).clip(0, pixels.shape[1 - i] - 1) for i in (1, 0))
    x, y = corner - low
    part = pixels[rows[0]:rows[-1] + 1].take(columns, axis=1).take(rows - rows[0], axis=0)
    patch = Image.fromarray(part)  # fancy indexing by rows and columns at once is many times slower
    return np.asarray(patch.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + width, y + width)))


def crop_window(uv: np.ndarray, box: float) -> tuple[np.ndarray, float]:
    """The square around the labelled joints' uv (K, 2) px: corner (x, y) and width, as in `crop_square`."""
    low, high = np.fmin.reduce(uv), np.fmax.reduce(uv)  # (2,) px
    width = box * MARGIN * (high - low).max()
    return (low + high) / 2 + 0.5 - width / 2, width


def crop_undistorted(pixels: np.ndarray, corner, width: float, side: int, sample: Sample) -> np.ndarray:
    """`crop_square` of the picture that a lens without distortion would have taken.

    The part in question is shrunk to about two pixels per pixel of the crop. Each half pixel of the crop
    fetches its colour there. The lens is computed at 65 x 65 places and linear between them, which is exact
    to a few hundredths of a pixel.
    """
    K, fine = sample.intrinsics, 2 * side
    places = np.linspace(0.5, fine - 0.5, 65) * width / fine - 0.5
    u, v = np.meshgrid(corner[0] + places, corner[1] + places)  # (65, 65) px, undistorted
    xy = (np.stack([u, v], axis=-1) - K[:2, 2]) @ np.linalg.inv(K[:2, :2]).T  # (65, 65, 2) at z = 1
    uv = distort(xy, sample.distortion) @ K[:2, :2].T + K[:2, 2] + 0.5  # (65, 65, 2) px from the edge
    seen = np.clip(uv, 0, pixels.shape[1::-1])
    low = seen.min(axis=(0, 1))
    extent = (seen.max(axis=(0, 1)) - low).max() + 1e-6
    patch = crop_square(pixels, low, extent, math.ceil(extent * min(1, fine / width))).copy()
    patch = torch.from_numpy(patch.reshape(*patch.shape[:2], -1))  # (h, w, C)
    patch = patch.permute(2, 0, 1)[None].float()  # (1, C, h, w)
    grid = torch.from_numpy((uv - low) * (2 / extent) - 1).permute(2, 0, 1)[None].float()  # (1, 2, 65, 65)
    grid = F.interpolate(grid, (fine, fine), mode="bilinear", align_corners=True)  # (1, 2, 2 side, 2 side)
    found = F.grid_sample(patch, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    found = F.avg_pool2d(found, 2)[0].permute(1, 2, 0).round().byte()  # (side, side, C)
    return found.numpy().reshape(side, side, *pixels.shape[2:])


def crop_sample(sample: Sample, image, mask, window, side: int) -> dict[str, np.ndarray]:
    """One row of each array: the window (corner, width) of image and mask, labels, the crop's intrinsics."""
    corner, width = window
    s = side / width
    K = np.diag([s, s, 1.0])
    K[:2, 2] = (0.5 - corner) * s - 0.5  # u' = (u + 0.5 - corner) s - 0.5
    row = {"keypoints": np.float32(sample.keypoints), "intrinsics": np.float32(K @ sample.intrinsics)}
    pictures = {"images": image} if mask is None else {"images": image, "masks": mask * np.uint8(255)}
    for name, pixels in pictures.items():
        if sample.distortion is None:
            crop = crop_square(pixels, corner, width, side)
        else:
            crop = crop_undistorted(pixels, corner, width, side, sample)
        row[name] = crop[:, ::-1] if sample.left else crop
    if sample.left:
        row["keypoints"] = row["keypoints"] * np.float32([-1, 1, 1])
        row["intrinsics"][0, 1:] *= -1  # skew, and cx -> side - 1 - cx
        row["intrinsics"][0, 2] += side - 1
    return row


def open_sample(root: Path, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """Picture (H, W, 3) uint8 and its mask (H, W) bool, if it has one."""
    for name in (sample.image, sample.mask or ""):  # these names can come from files of labels
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{root}: its labels name {name!r}, which lies outside of it: refused")
    path, mask = root / sample.image, None
    if sample.frame is None:
        image = open_picture(path)
    else:
        with reading(path, "video"):
            image = open_video(path).frame(sample.frame)
    if sample.mask:
        mask = open_mask(root / sample.mask, sample.foreground, sample.mask_key)
    expected = tuple(sample.size or image.shape[1::-1])
    for name, pixels in ((sample.image, image), (sample.mask, mask)):
        if pixels is not None and pixels.shape[1::-1] != expected:
            (w, h), (W, H) = pixels.shape[1::-1], expected
            raise Missing(f"size: {name} is {w} x {h} px, not {W} x {H}")
    return image, mask


def convert_sample(root: Path, side: int, skeleton: dict, sample: Sample) -> dict[str, np.ndarray]:
    """One row of each array; Missing, "kind: what is wrong", if the sample has to be left out."""
    if sample.fault:
        raise Missing(sample.fault)
    if sample.keypoints is None:
        image, _ = open_sample(root, sample)
        size = np.array(image.shape[1::-1])  # the crop is the square at its centre
        return {"images": crop_square(image, (size - size.min()) / 2, size.min(), side)}
    held = sample.keypoints if sample.around is None else np.vstack([sample.keypoints, sample.around])
    window = crop_window(to_uv(held, sample.intrinsics), skeleton["box"])
    image, mask = open_sample(root, sample)
    fault = fault_of(skeleton["joints"], sample, image.shape[1::-1], window[1], mask)
    if fault:
        raise Missing(fault)
    if sample.around is not None and sample.around[:, 2].min() < 100:
        raise Missing("projection: the crop has to hold a point less than 100 mm before the camera")
    return crop_sample(sample, image, mask, window, side)


def convert_samples(root: Path, side: int, skeleton: dict, job: list[Sample]) -> tuple[dict, list[str]]:
    """Rows of the samples that pass the checks, and "FILE: kind: what is wrong" for each of the others."""
    rows, skipped = [], []
    for sample in job:
        try:
            rows.append(convert_sample(root, side, skeleton, sample))
        except Missing as reason:
            skipped.append(f"{sample}: {reason}")
        except Damaged as error:
            skipped.append(str(error))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}, skipped


def convert(name: str, reader, root: str, out: str, side: int, workers: int, origin: str, **options) -> dict:
    """ROOT as its publisher ships it -> data-set folder OUT, crops of `side` px. Returns its meta.json."""
    meta = {"name": name, "split": options.get("split", ""), "margin": MARGIN, "origin": origin}
    meta |= {key: value for key, value in reader.SKELETON.items() if key != "box"}
    count, samples = reader.read(Path(root), **options)
    jobs = iter(lambda: list(itertools.islice(samples, SAMPLES_PER_JOB)), [])
    work = partial(convert_samples, Path(root), side, reader.SKELETON)
    return build_dataset(out, meta, jobs, count, work, workers, getattr(reader, "MAX_SKIPPED", 0.05))


def build_dataset(folder: str | Path, meta: dict, jobs: Iterable, total: int, work, workers: int = 0,
                  max_skipped: float = 0.05) -> dict:
    """Write work(job) for every job, in order, to a data-set folder. Returns its meta.json.

    work(job) returns (arrays, skipped): rows of each array, and a line for each sample that is left out.
    The result of a job is a shard: a file in FOLDER.part, renamed once it is whole. The next call skips the
    shards that are there, so an interrupted conversion continues. The result is the same bytes for any number
    of workers (0: all cores). If more than `max_skipped` of the samples are left out, the reader is probably
    wrong, not the data: InputError.
    """
    folder, part = Path(folder), Path(f"{Path(folder)}.part")
    if folder.exists():
        raise InputError(f"{folder}: exists; remove it to make it again")
    begun = json.dumps(meta, sort_keys=True)

    def tasks():
        for i, job in enumerate(jobs):  # a CRC of settings and job: no shard is taken for another one
            crc = zlib.crc32(f"{begun} {job}".encode(errors="backslashreplace"))  # a name can be any bytes
            yield part / f"{i:07d}-{crc:08x}.npz", work, job

    shards, rows, skipped = [], 0, []
    progress = Progress(folder.name, total, unit="images", every=5)
    with lock(part):
        if any(part.glob("*.npz")):
            print(f"{part}: continues; if you changed the reader, remove this folder first", flush=True)
        for path, count, new in in_order(make_shard, tasks(), workers or CORES):
            shards.append(path)
            rows, skipped = rows + count, skipped + new
            if rows + len(skipped) >= 200:
                check_skipped(folder, rows, skipped, max_skipped)
            progress.show(rows + len(skipped))
        check_skipped(folder, rows, skipped, max_skipped)
        progress.total = rows + len(skipped)  # `total` may be an upper bound
        progress.show(progress.total, final=True)
        try:
            write_folder(part / "whole", meta | {"skipped": skipped}, rows, map(read_shard, shards))
            os.replace(part / "whole", folder)
        except OSError as error:
            raise InputError(f"{part}: could not be written ({error.strerror}); run it again") from error
    shutil.rmtree(part, ignore_errors=True)
    return meta | {"rows": rows, "skipped": skipped}


def make_shard(task: tuple) -> tuple[Path, int, list[str]]:
    """Do a job and write its shard, unless it is there. Returns path, number of rows, skipped."""
    path, work, job = task
    if not path.exists():
        arrays, skipped = work(job)
        notes = json.dumps([len(next(iter(arrays.values()), ())), skipped])

        def write(temporary):
            with open(temporary, "wb") as file:
                np.savez(file, notes=notes, **arrays)
        write_atomically(path, write)
    with np.load(path) as shard:
        return path, *json.loads(str(shard["notes"]))


def read_shard(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as shard:
        return {name: shard[name] for name in shard.files if name != "notes"}


def check_skipped(folder: Path, rows: int, skipped: list[str], limit: float) -> None:
    """InputError, with the most common reason, if all or more than `limit` of the samples are left out."""
    seen = rows + len(skipped)
    if rows and len(skipped) <= limit * seen:
        return
    if not seen:
        raise InputError(f"{folder}: not one sample; with -h this command shows what belongs into ROOT")
    kinds = [line.partition(": ")[2].partition(":")[0] for line in skipped]
    (most, count), = collections.Counter(kinds).most_common(1)
    raise InputError(f"{folder}: {len(skipped)} of {seen} samples left out, {count} for {most!r} "
                     f"({skipped[kinds.index(most)]}). Fix it, remove {folder}.part, run again")


def in_order(function, tasks: Iterable, workers: int):
    """function(task) for each task, in order, computed ahead by a pool of processes, or by this one alone."""
    if workers == 1:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # torch's operations can hang in a forked worker
    pool, waiting = concurrent.futures.ProcessPoolExecutor(workers, spawn, quiet_worker), collections.deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def quiet_worker() -> None:
    """Start of a worker: Ctrl-C is the parent's to handle, and one thread is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
