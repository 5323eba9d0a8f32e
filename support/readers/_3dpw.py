"""3DPW (von Marcard et al., ECCV 2018): one or two people outdoors, a moving camera, 1920 x 1080 px.

    sequenceFiles/test/downtown_walking_00.pkl ..       (or sequenceFiles/sequenceFiles/test/ ..)
    imageFiles/downtown_walking_00/image_00000.jpg ..

One sample for each person in each `stride`-th frame in which the camera's pose is valid and the person was
detected, which is the publisher's rule. Joints of the SMPL model, metres, world; cam_poses[i] takes them to
the camera of frame i. SMPL has neither our nose nor our head top (NaN). poses2d is a network's detection: its
better half tells whose joints these are.
"""
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, to_uv
from support.folder import HUMAN
from support.readers.formats import listed, need_files, read_pickle, reading

SMPL_COMPARED = {
    "compare": [1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 14, 15, 16],
    "protocol": "13 joints of SMPL (hips, knees, ankles, neck, shoulders, elbows, wrists) from its pelvis; "
                "hips and pelvis are not Human3.6M's: not comparable with Table 2, on regressed joints"}
SKELETON = HUMAN | SMPL_COMPARED
MAX_SKIPPED = 0.1
SMPL_ORDER = [0, 2, 5, 8, 1, 4, 7, 6, 12, -1, -1, 16, 18, 20, 17, 19, 21]  # of 24; -1: SMPL has none
OPENPOSE_ORDER = [-1, 8, 9, 10, 11, 12, 13, -1, 1, -1, -1, 5, 6, 7, 2, 3, 4]  # of 18


def in_our_order(joints: np.ndarray, order: list) -> np.ndarray:
    """The publisher's joints (K, C) in our order, (17, C) float64; NaN where `order` has -1."""
    return np.vstack([joints, np.full((1, joints.shape[1]), np.nan)])[order]


def head_top(smpl: np.ndarray) -> np.ndarray:
    """About the top of the head, (1, 3), of SMPL's joints (24, 3): no label, but the crop has to show it."""
    return smpl[15:16] + 0.7 * (smpl[15:16] - smpl[9:10])


def read_sequence(path: Path) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    """World -> camera (F, 4, 4) mm; intrinsics (3, 3) px; for each person joints (F, 24, 3) mm, world,
    detections (F, 3, 18) u, v, confidence, and whether the camera is known (F,)."""
    found = read_pickle(path)
    with reading(path, "sequence of 3DPW"):
        cameras = np.reshape(found["cam_poses"], (-1, 4, 4)).astype(float)
        cameras[:, :3, 3] *= 1000  # m -> mm
        people = [(1000 * np.reshape(joints, (len(cameras), 24, 3)),
                   np.reshape(seen, (len(cameras), 3, 18)).astype(float), np.reshape(valid, len(cameras)))
                  for joints, seen, valid in zip(found["jointPositions"], found["poses2d"],
                                                 found["campose_valid"], strict=True)]
        return cameras, np.reshape(found["cam_intrinsics"], (3, 3)).astype(float), people


def read(root: Path, split: Literal["train", "validation", "test"] = "train",
         stride: int = 1) -> tuple[int, Iterator[Sample]]:
    twice = root / "sequenceFiles/sequenceFiles"
    files = listed((twice if twice.is_dir() else twice.parent) / split, "*.pkl")
    need_files(root, [f"imageFiles/{file.stem}/image_00000.jpg" for file in files])

    def samples() -> Iterator[Sample]:
        for file in files:
            cameras, K, people = read_sequence(file)
            images = [f"imageFiles/{file.stem}/image_{i:05d}.jpg" for i in range(len(cameras))]
            need_files(root, images)
            for i, (joints, seen, valid) in itertools.product(range(0, len(images), stride), people):
                if not valid[i] or not seen[i].any():
                    continue
                R, t = cameras[i, :3, :3], cameras[i, :3, 3]  # (3, 3); (3,) mm
                smpl = joints[i] @ R.T + t  # (24, 3) mm, camera
                keypoints = in_our_order(smpl, SMPL_ORDER)  # (17, 3)
                uv = in_our_order(np.where(seen[i, 2] > 0, seen[i, :2], np.nan).T, OPENPOSE_ORDER)  # (17, 2)
                projected = to_uv(keypoints, K)
                apart = np.linalg.norm(uv - projected, axis=1)  # (17,) px
                uv[~(apart <= np.nanmedian(apart))] = np.nan  # its worse half: hidden or mistaken
                height = (np.nanmax(projected, axis=0) - np.nanmin(projected, axis=0)).max()
                yield Sample(images[i], keypoints, K, uv=uv, tolerance=max(10.0, 0.15 * height),
                             around=head_top(smpl))

    frames = (len(listed(root / "imageFiles" / file.stem, "*.jpg")) for file in files)
    return 2 * sum(-(-n // stride) for n in frames), samples()
