"""Your own photographs: which square to crop, how far away the joints are, what the files are called.

Needed by `evaluate.py --image`. Works on arrays and paths; no model is opened here.
"""

import itertools
from pathlib import Path

import numpy as np

from support.readers.formats import listed
from support.run import InputError, read_json


def photographs(places: list[str]) -> list[Path]:
    """These files and, of these folders, the files inside. Names that begin with a dot are ignored."""
    found = []
    for place in map(Path, places):
        found += [path for path in listed(place, "*") if path.is_file()] if place.is_dir() else [place]
    if not found:
        raise InputError(f"{' '.join(places)}: no photograph here")
    return found


def square_around(box: list[float] | None, size: tuple[int, int], name, times: float):
    """Corner (2,) and width in px of the square to crop: `times` the box x y w h, clipped to the picture.

    Without a box, the largest square in the middle. InputError for a box outside of the picture.
    """
    size = np.array(size)
    low, high = (size - size.min()) / 2, (size + size.min()) / 2  # (2,) px
    if box:
        low, high = np.maximum(box[:2], 0), np.minimum(np.add(box[:2], box[2:]), size)
        if not (low < high).all():  # NaN fails as well
            raise InputError(f"{name}: --box {' '.join(f'{v:g}' for v in box)} is outside of the picture, "
                             f"{size[0]} x {size[1]} px; give left, top, width, height in its pixels")
    width = (high - low).max() * (times if box else 1)
    return (low + high - width) / 2, width


def place_in_space(uv: np.ndarray, depth: np.ndarray, focal: float, size: tuple, skeleton: dict, poses):
    """Joints (K, 3) in mm, in the camera frame of a photograph, and words on how their distance was found.

    uv (K, 2): pixels of the photograph; depth (K,): mm from the root; poses (n, K, 3): training labels in mm.
    not in the paper: the root is at the distance at which bones are as long as in training (the sum of their
    squares), which is a quadratic equation.
    """
    rays = np.column_stack([(uv - (np.array(size) - 1) / 2) / focal, np.ones(len(uv))])  # (K, 3)
    a, b = np.array(skeleton["bones"], int).reshape(-1, 2).T
    squares = np.square(poses[:, a] - poses[:, b]).sum(-1)  # (n, bones) mm²
    known = np.isfinite(squares).any(axis=0)  # (bones,)
    a, b, total = a[known], b[known], np.nanmean(squares[:, known], axis=0).sum()
    grow, rest = rays[a] - rays[b], rays[a] * depth[a, None] - rays[b] * depth[b, None]  # bone: z grow + rest
    A, B, C = (grow**2).sum(), (grow * rest).sum(), (rest**2).sum() - total
    if not known.any():
        z = focal * skeleton["depth_range"] / np.ptp(uv, axis=0).max()
        why = "a guess, because no bone is labelled in training"
    elif C < -0.1 * total:
        z = (-B + np.sqrt(B * B - A * C)) / A
        why = "bones are as long as in training"
    else:
        z = np.sqrt(0.1 * total / A)
        why = "a guess, because the depths alone are longer than bones in training"
    return rays * (z + depth)[:, None], why


def free_name(folder: Path, stem: str, photo: Path) -> Path:
    """folder/STEM_pose.json, with a number if that is the prediction of another photograph of this name."""
    for i in itertools.count(1):
        path = folder / f"{stem}{f'-{i}' * (i > 1)}_pose.json"
        if not path.exists() or read_json(path).get("photograph") == str(photo.resolve()):
            return path
