"""The data-set folder: its skeletons, how it is opened and written, and every check that it has to pass.

Needed by every script. The format is described in data.py: a few .npy arrays and a meta.json.
"""
import contextlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from support.run import InputError, first_line, read_json, write_json

FORMAT = 1
ARRAYS = {"images": np.uint8, "masks": np.uint8, "keypoints": np.float32, "intrinsics": np.float32}
MARGIN = 1.25  # a stored crop is so many times as wide as the network's, which is `box` times the joints' box

HAND_JOINTS = ["wrist"] + [f"{name}_{i}" for name in ("thumb", "index", "middle", "ring", "little")
                           for i in (1, 2, 3, 4)]  # a finger's joints run from palm to tip
HAND_BONES = [(0 if i % 4 == 1 else i - 1, i) for i in range(1, 21)]  # (parent, child)
HAND = {"joints": HAND_JOINTS, "bones": HAND_BONES, "root": 0, "depth_range": 300.0, "box": 1.5}
HUMAN_JOINTS = ["pelvis", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
                "spine", "thorax", "nose", "head", "left_shoulder", "left_elbow", "left_wrist",
                "right_shoulder", "right_elbow", "right_wrist"]  # in Human3.6M's order
HUMAN_BONES = list(zip((0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15), range(1, 17), strict=True))
HUMAN = {"joints": HUMAN_JOINTS, "bones": HUMAN_BONES, "root": 0, "depth_range": 2000.0, "box": 1.25}


class Dataset:
    """A data-set folder, its arrays memory-mapped. `fields` names those to open besides the images; no other
    file is touched."""

    def __init__(self, folder: str | Path, *fields: str):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.images = open_array(self.folder / "images.npy", np.uint8, ("n", "H", "H", 3))
        n, H, W, _ = self.images.shape
        if H != W or n == 0:
            raise InputError(f"{self.folder}/images.npy: shape {self.images.shape}; not (n > 0, H, H, 3)")
        if n != self.meta.get("rows", n):
            raise InputError(f"{self.folder}/images.npy: {n} rows; meta.json counts {self.meta['rows']}")
        shapes = {"masks": (n, H, H), "keypoints": (n, len(self.meta["joints"]), 3), "intrinsics": (n, 3, 3)}
        self.masks, self.keypoints, self.intrinsics = (
            open_array(self.folder / f"{name}.npy", ARRAYS[name], shape) if name in fields else None
            for name, shape in shapes.items())
        if self.keypoints is not None:
            check_labels(self)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Changes with the data. It covers meta.json with its checksums, or else 256 rows of each array."""
        value = zlib.crc32((json.dumps(self.meta, sort_keys=True) + str(self.images.shape)).encode())
        some = np.linspace(0, len(self) - 1, min(256, len(self))).astype(int)
        for array in (self.images, self.masks, self.keypoints, self.intrinsics):
            if array is not None and not self.meta.get("crc"):
                value = zlib.crc32(np.ascontiguousarray(array[some]), value)
        return f"{value:08x}"


def open_array(path: Path, dtype: type, shape: tuple) -> np.ndarray:
    """A .npy file, memory-mapped, of this type and this shape (a letter stands for any length)."""
    if not path.exists():
        without = " (training with --masks none --xc 0 does without)" if path.name == "masks.npy" else ""
        raise InputError(f"{path}: missing; it is needed here{without}")
    try:
        array = np.lib.format.open_memmap(path, "r")
    except Exception as error:  # numpy raises what it likes: ValueError, OSError, EOFError, SyntaxError
        raise InputError(f"{path}: broken .npy array: {first_line(error)}") from error
    if array.dtype != dtype:
        raise InputError(f"{path}: {array.dtype}; give {np.dtype(dtype)}")
    fits = [n == m or isinstance(n, str) for n, m in zip(shape, array.shape, strict=False)]
    if array.ndim != len(shape) or not all(fits):
        raise InputError(f"{path}: shape {array.shape}; give ({', '.join(map(str, shape))})")
    return array


def is_indices(value, joints: list) -> bool:
    """Whether `value` is a list of indices of the joints."""
    return isinstance(value, list) and all(type(i) is int and 0 <= i < len(joints) for i in value)


META = {  # field of meta.json: what it has to be, and a test of it; joints come first
    "joints": ("a list of names", lambda v, _: isinstance(v, list) and all(isinstance(n, str) for n in v)),
    "bones": ("pairs of indices of its joints", lambda v, joints: isinstance(v, list) and all(
        is_indices(bone, joints) and len(bone) == 2 for bone in v)),
    "root": ("an index of its joints", lambda v, joints: is_indices([v], joints or [0])),
    "compare": ("indices of its joints", lambda v, joints: v is None or is_indices(v, joints)),
    "depth_range": ("millimetres, up to 1e6", lambda v, _: type(v) in (int, float) and 0 < v <= 1e6),
    "margin": ("a number from 1 to 10", lambda v, _: type(v) in (int, float) and 1 <= v <= 10),
}


def read_meta(folder: str | Path) -> dict:
    """meta.json, its optional fields filled in. InputError if it is missing, broken or of another format."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise InputError(f"{folder}: no data set here (no meta.json); see `python data.py -h`")
    meta = read_json(path)
    needed = {"format", "name", "joints", "bones", "root", "depth_range"}
    missing = needed - set(meta if isinstance(meta, dict) else ())
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}")
    if meta["format"] != FORMAT:
        raise InputError(f"{path}: format {str(meta['format'])[:60]}; this code reads {FORMAT}")
    meta = {"margin": MARGIN, "split": "", "origin": ""} | meta
    for key, (says, fits) in META.items():
        if key in meta and not fits(meta[key], meta["joints"]):
            raise InputError(f"{path}: {key} is {str(meta[key])[:60]}; give {says}")
    return meta


def check_labels(dataset: Dataset) -> None:
    """InputError unless keypoints and intrinsics can be what they claim to be: every script opens them here.

    All rows: labels in front of the camera, and a camera for each labelled image. The first 1000 rows: bones
    of a plausible length, and joints that fall on the stored crop.
    """
    keypoints, intrinsics, joints = dataset.keypoints, dataset.intrinsics, dataset.meta["joints"]
    for start in range(0, len(dataset), 65536):  # in pieces, so that memory stays flat
        some = keypoints[start:start + 65536]  # (n, K, 3) mm
        bad = (np.abs(some) > 1e6) | (some[..., 2:] <= 0)
        if bad.any():
            row, joint, _ = np.argwhere(bad)[0]
            found = ", ".join(f"{x:g}" for x in some[row, joint])
            raise InputError(f"{dataset.folder}/keypoints.npy: row {start + row} has {joints[joint]} at "
                             f"({found}), beyond 1e6 mm or not in front of the camera; write NaN for a joint "
                             "without label")
        if intrinsics is not None:
            K = intrinsics[start:start + 65536]  # (n, 3, 3)
            with np.errstate(all="ignore"):
                size = np.linalg.det(K.astype(float))
            good = np.isfinite(size) & (size != 0) & (K[:, 2] == [0, 0, 1]).all(axis=1)
            bad = np.isfinite(some).all(axis=2).any(axis=1) & ~good
            if bad.any():
                raise InputError(f"{dataset.folder}/intrinsics.npy: row {start + int(bad.argmax())} is no "
                                 "camera (singular, or last row not 0 0 1), but its image is labelled")
    check_bones(dataset.folder, keypoints[:1000], dataset.meta)
    if intrinsics is not None:
        check_cameras(dataset)


def check_bones(folder: Path, poses: np.ndarray, meta: dict) -> None:
    """InputError unless the median bone of poses (n, K, 3) mm is 1 mm to 2 m, or human if the skeleton is."""
    parent, child = np.array(meta["bones"], int).reshape(-1, 2).T
    lengths = np.linalg.norm(poses[:, child] - poses[:, parent], axis=-1)  # (n, bones) mm
    if not np.isfinite(lengths).any():
        return
    median = np.nanmedian(lengths)
    human = {tuple(HAND_JOINTS): (10, 80), tuple(HUMAN_JOINTS): (60, 600)}
    low, high = human.get(tuple(meta["joints"]), (1, 2000))
    if not low <= median <= high:
        units = {"metres": 1000, "centimetres": 10, "micrometres": 0.001}
        guess = next((f": are these {unit}?" for unit, mm in units.items() if low <= mm * median <= high), "")
        raise InputError(f"{folder}/keypoints.npy: the median bone is {median:.3g} mm, expected {low} to "
                         f"{high} mm{guess}")


def check_cameras(dataset: Dataset) -> None:
    """InputError unless the intrinsics are those of the stored crop, in pixels."""
    H = dataset.images.shape[1]
    with np.errstate(invalid="ignore"):
        seen = np.einsum("nij,nkj->nki", dataset.intrinsics[:1000].astype(float), dataset.keypoints[:1000])
    uv = seen[..., :2] / seen[..., 2:]  # (n, K, 2) px
    uv = uv[np.isfinite(uv).all(axis=-1)]  # (labelled joints, 2)
    inside = ((uv > -1) & (uv < H)).all(axis=-1)
    if len(uv) and (inside.mean() < 0.5 or (uv < H / 2).all()):
        where = "all in the upper left quarter" if (uv < H / 2).all() else f"{inside.mean():.0%} of joints"
        raise InputError(f"{dataset.folder}/intrinsics.npy: not of the stored crops of {H} x {H} px, on "
                         f"which it puts {where}; give their intrinsics, in pixels")


def open_masks(path: Path, dataset: Dataset) -> np.ndarray:
    """Masks (n, H, H) uint8 of a data set in a file of their own, such as f^S's predictions in a run."""
    return open_array(path, np.uint8, dataset.images.shape[:3])


def check_masks(masks: np.ndarray, path: str | Path, remedy: str) -> None:
    """InputError if none of 256 masks has foreground, as when 0 and 1 were stored instead of 0 and 255."""
    largest = masks[np.linspace(0, len(masks) - 1, min(256, len(masks))).astype(int)].max()
    if largest < 128:
        raise InputError(f"{path}: the largest value is {largest}, no foreground: write 0 background .. "
                         f"255 foreground, or {remedy}")


def same_skeleton(dataset: Dataset, skeleton: dict, whose: str) -> None:
    """InputError unless the data set's joints, root and depth range are those of `whose` skeleton."""
    for key in ("joints", "root", "depth_range"):
        found, known = dataset.meta[key], skeleton[key]
        if found != known:
            raise InputError(f"{dataset.folder}: {key} is {found}, not {known} as {whose}")


def with_root(dataset: Dataset) -> np.ndarray:
    """Rows of a labelled data set whose root is labelled: without it, nothing says how far away a joint is.
    InputError if there is none."""
    root = dataset.meta["root"]
    rows = np.flatnonzero(np.isfinite(dataset.keypoints[:, root]).all(axis=1))
    if not len(rows):
        raise InputError(f"{dataset.folder}/keypoints.npy: no image has a label of the root, "
                         f"{dataset.meta['joints'][root]}; errors are measured from it")
    return rows


def compared(meta: dict) -> list[int]:
    """Joints over which errors are averaged: `compare` of meta.json if it is there. Otherwise all joints, for
    bodies without the root, whose error is 0 by definition; for hands with it, as is customary for EPE."""
    body = meta["joints"] == HUMAN_JOINTS
    return meta.get("compare") or [i for i in range(len(meta["joints"])) if not body or i != meta["root"]]


def write_folder(folder: Path, meta: dict, rows: int, parts: Iterable[dict[str, np.ndarray]]) -> None:
    """Write a data set of `rows` rows from parts, dicts of arrays that follow one another."""
    folder.mkdir(exist_ok=True)
    files, crc = {}, {}
    with contextlib.ExitStack() as stack:
        for name, array in (item for part in parts for item in part.items()):
            dtype = np.dtype(ARRAYS[name])
            if name not in files:
                files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(files[name], header)
            data = np.ascontiguousarray(array, dtype).tobytes()
            files[name].write(data)
            crc[name] = zlib.crc32(data, crc.get(name, 0))
    write_json(folder / "meta.json", {"format": FORMAT} | meta | {"rows": rows, "crc": crc})
