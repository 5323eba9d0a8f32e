"""STB, the stereo hand pose benchmark (Zhang et al., ICIP 2017): left hands, 640 x 480 px, mm.

    images/B1Counting/BB_left_0.png  BB_right_0.png  SK_color_0.png ..    labels/B1Counting_BB.mat  _SK.mat
    .. B1 to B6, Counting and Random. A zip without a folder in it has to be unpacked into one.

--split test: B1; train: B2 to B6. --camera bb: both pictures of the stereo pair, labels in the left camera's
frame; sk: the colour picture beside the depth camera, in whose frame the labels d are: c = R^T (d - t).
Fingers run from little to thumb, and joint 0 is the palm's centre. --wrist says from which knuckle it becomes
a wrist; most code uses ring. No 2D labels, no lens distortion, no masks.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, pinhole
from support.folder import HAND
from support.readers.formats import need_files, read_mat
from support.run import InputError

SKELETON = HAND
ORDER = [0] + [4 * f + k for f in (4, 3, 2, 1, 0) for k in (1, 2, 3, 4)]  # ours = raw[ORDER]
WRIST = {"ring": (13, 2.0), "middle": (9, 2.2)}  # wrist = knuckle + factor (palm - knuckle)
CAMERAS = {  # its pictures, each with (fx, fy, cx, cy) px, and the rotation vector and shift (mm) of
    # d = R c + t, from points c in the frame of the picture's camera to points d in the labels' frame
    "bb": [("BB_left", (822.79041, 822.79041, 318.47345, 250.31296), (0, 0, 0), (0, 0, 0)),
           ("BB_right", (822.79041, 822.79041, 318.47345, 250.31296), (0, 0, 0), (120.054, 0, 0))],
    "sk": [("SK_color", (607.92271, 607.88192, 314.78337, 236.42484), (0.00531, -0.01196, 0.00301),
            (-24.0381, -0.4563, -1.2326))]}


def read_hands(path: Path, wrist: str) -> np.ndarray:
    """Joints (n, 21, 3) mm of a file of labels, in our order."""
    raw = read_mat(path, "handPara")["handPara"]  # (3, 21, n) mm
    if raw.ndim != 3 or raw.shape[:2] != (3, 21):
        raise InputError(f"{path}: handPara is {raw.shape}, not (3, 21, n)")
    hands, (knuckle, factor) = raw.transpose(2, 1, 0)[:, ORDER], WRIST[wrist]  # (n, 21, 3) mm
    hands[:, 0] = hands[:, knuckle] + factor * (hands[:, 0] - hands[:, knuckle])
    return hands


def read(root: Path, split: Literal["train", "test"] = "train", camera: Literal["bb", "sk"] = "bb",
         wrist: Literal["ring", "middle"] = "ring") -> tuple[int, Iterator[Sample]]:
    numbers = [1] if split == "test" else [2, 3, 4, 5, 6]
    labels = {f"B{i}{kind}": f"labels/B{i}{kind}_{camera.upper()}.mat"
              for i in numbers for kind in ("Counting", "Random")}
    need_files(root, labels.values())
    counts = {name: len(read_hands(root / file, wrist)) for name, file in labels.items()}
    need_files(root, [f"images/{name}/{kind}_{i}.png" for name, n in counts.items()
                      for kind, *_ in CAMERAS[camera] for i in range(n)])

    def samples() -> Iterator[Sample]:
        from scipy.spatial.transform import Rotation
        for name, file in labels.items():
            for i, hand in enumerate(read_hands(root / file, wrist)):
                for kind, lens, turn, shift in CAMERAS[camera]:
                    R = Rotation.from_rotvec(turn).as_matrix()
                    there = (hand - shift) @ R  # (21, 3) rows: R^T of columns
                    image = f"images/{name}/{kind}_{i}.png"
                    yield Sample(image, there, pinhole(*lens), size=(640, 480), left=True)
    return sum(counts.values()) * len(CAMERAS[camera]), samples()
