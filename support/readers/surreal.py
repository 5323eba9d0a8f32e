"""SURREAL (Varol et al., CVPR 2017): rendered bodies, 320 x 240 px clips of mostly 100 frames.

    SURREAL/data/cmu/val/run0/01_01/  01_01_c0001.mp4  01_01_c0001_info.mat  01_01_c0001_segm.mat ..
    .. train, val, test; run0, run1, run2        (ROOT may also be SURREAL or SURREAL/data)

The middle frame of every clip, number ceil(T / 2) from 1, as val is evaluated, or each `stride`-th with
--frames all. Joints of the SMPL model, metres, world. Its camera is a mirror (det M = -1): the picture shows
the body's left as its right, so their names change places. Nose and head top are NaN. A person partly outside
the picture is kept if half of the joints are inside. Masks: segm_1 .. segm_T, body parts 1 .. 24.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, pinhole
from support.folder import HUMAN
from support.readers._3dpw import SMPL_COMPARED, head_top, in_our_order
from support.readers.formats import Damaged, listed, need_files, read_mat, reading
from support.run import InputError

SKELETON = HUMAN | SMPL_COMPARED
MAX_SKIPPED = 0.2
ORDER = [0, 1, 4, 7, 2, 5, 8, 6, 12, -1, -1, 17, 19, 21, 16, 18, 20]  # SMPL's, left for right
CAMERA = pinhole(600.0, 600.0, 159.5, 119.5)  # published: 160, 120, counted from the picture's edge
AXES = np.array([[0.0, 0, -1], [0, 1, 0], [-1, 0, 0]])  # world -> camera, a reflection
ENDS = (".mp4", "_info.mat", "_segm.mat")


def read_clip(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Joints (3, 24, T) mm from the camera, in the world's axes, and (2, 24, T) px."""
    info = read_mat(path, "joints2D", "joints3D", "camLoc")
    with reading(path, "file of labels"):
        uv, joints = (np.reshape(info[f"joints{n}D"], (n, 24, -1)).astype(float) for n in (2, 3))
        joints = 1000 * (joints - np.reshape(info["camLoc"], (3, 1, 1)))
        if not 0 < joints.shape[2] == uv.shape[2]:
            raise ValueError("no frames, or not as many in 2D")
        return joints, uv - 0.5  # pixel centres at integers


def read(root: Path, split: Literal["train", "val", "test"] = "train",
         frames: Literal["middle", "all"] = "middle", stride: int = 1) -> tuple[int, Iterator[Sample]]:
    if stride > 1 and frames == "middle":
        raise InputError(f"--stride {stride}: goes with --frames all")
    base = next((base for base in ("SURREAL/data/cmu", "data/cmu") if (root / base).is_dir()), "cmu")
    clips = sorted({path.relative_to(root).as_posix()[:-len(end)] for end in ENDS
                    for path in listed(root / base / split, f"run[012]/*/*{end}")})
    need_files(root, [clip + end for clip in clips for end in ENDS])

    def samples() -> Iterator[Sample]:
        for clip in clips:
            try:
                joints, uv = read_clip(root / f"{clip}_info.mat")
            except Damaged as error:
                yield Sample(f"{clip}.mp4", fault=f"labels: {error}")
                continue
            T = joints.shape[2]
            for i in [(T - 1) // 2] if frames == "middle" else range(0, T, stride):
                smpl = (AXES @ joints[:, :, i]).T  # (24, 3) mm, camera
                keypoints, seen = (in_our_order(found, ORDER) for found in (smpl, uv[:, :, i].T))
                yield Sample(f"{clip}.mp4", keypoints, CAMERA, f"{clip}_segm.mat", (1, 255), seen, (320, 240),
                             i, f"segm_{i + 1}", tolerance=1.0, around=head_top(smpl))
    return len(clips) * (1 if frames == "middle" else -(-100 // stride)), samples()
