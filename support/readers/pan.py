"""PAN, hands of the CMU Panoptic Studio (Joo et al., TPAMI 2017): 31 HD views, 1920 x 1080 px, cm, dome.

    171204_pose3/  calibration_171204_pose3.json
                   hdHand3d/handRecon3D_hd00000000.json ..    (hdHand3d.tar)
                   hdImgs/00_00/00_00_00000000.jpg (.png) ..  or  hdVideos/hd_00_00.mp4 ..
    171204_pose1/  ..

--split test: the sequence 171204_pose3; train: all others in ROOT. Of the frames (29.97 per second) those
whose number is a multiple of --stride, in the --views given (as 0,7,30; empty: all). Both hands of everyone,
in our joint order, if all 21 joints are valid, have at least --score, are off by at most --error px, and are
in the picture. The lens bends by 20 px and more. No 2D labels, no masks.
"""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, to_uv
from support.folder import HAND
from support.readers.formats import Damaged, listed, need_files, reading
from support.run import InputError

SKELETON = HAND
TEST = "171204_pose3"


def read_cameras(path: Path, views: str) -> dict[str, tuple]:
    """HD cameras of a calibration file, or those numbered in `views`. Name "00_07" -> size (width, height),
    K (3, 3) px, distortion (5,), and R (3, 3), t (3,) mm from the dome's frame to the camera's."""
    with reading(path, "calibration"):
        found = {}
        for camera in json.loads(path.read_text())["cameras"]:
            if camera["type"] == "hd":
                width, height = camera["resolution"]
                K, R, lens, t = (np.reshape(camera[key], shape).astype(float) for key, shape in (
                    ("K", (3, 3)), ("R", (3, 3)), ("distCoef", 5), ("t", 3)))
                found[camera["name"]] = ((int(width), int(height)), K, lens, R, 10 * t)  # cm -> mm
    wanted = [f"00_{view.strip():>02}" for view in views.split(",")] if views else sorted(found)
    missing = set(wanted) - set(found)
    if missing:
        raise InputError(f"{path}: has no HD view {min(missing)}; correct --views")
    return {name: found[name] for name in wanted}


def read_hands(path: Path, score: float, error: float) -> list[tuple[bool, np.ndarray]]:
    """Hands of a frame: (is it a left one, (21, 3) mm, dome). Left out are people without an identity, and
    hands with a joint that is not valid, has less than `score`, or is off by more than `error` px."""
    with reading(path, "file of labels"):
        people = [person for person in json.loads(path.read_text())["people"] if person["id"] != -1]
        hands = [(side, p[side]) for p in people for side in ("left_hand", "right_hand") if p.get(side)]
        return [(side == "left_hand", 10 * np.array(hand["landmarks"], float).reshape(21, 3))  # cm -> mm
                for side, hand in hands
                if np.min(hand["validity"]) == 1 and np.min(hand["averageScore"]) >= score
                and np.max(hand["averageReproError"]) <= error]


def in_view(keypoints: np.ndarray, K: np.ndarray, distortion: np.ndarray, size: tuple) -> bool:
    """Whether all joints (n, 3) mm, camera, are in a picture of `size` (width, height).

    A lens's polynomial folds what is far outside back into the picture. So without the lens they may be
    outside by a quarter of it, and no more."""
    straight, uv, size = to_uv(keypoints, K), to_uv(keypoints, K, distortion), np.array(size)
    return bool((keypoints[:, 2] > 0).all() and ((uv >= 0) & (uv <= size - 1)).all()
                and ((straight >= -size / 4) & (straight <= 1.25 * size)).all())


def read(root: Path, split: Literal["train", "test"] = "train", stride: int = 30, views: str = "",
         score: float = 0.3, error: float = 20.0) -> tuple[int, Iterator[Sample]]:
    files = "handRecon3D_hd" + 8 * "[0-9]" + ".json"  # no "copy of", no " (1)"
    frames = {folder.parent.name: sorted(int(file.stem[-8:]) for file in folder.glob(files))
              for folder in listed(root, "*/hdHand3d")}
    frames = {name: [i for i in numbers if i % stride == 0] for name, numbers in frames.items()
              if (name == TEST) == (split == "test")}
    need_files(root, [f"{name}/calibration_{name}.json" for name in frames])
    cameras = {name: read_cameras(root / name / f"calibration_{name}.json", views) for name in frames}

    def hands(name: str, i: int) -> list:
        """Hands of a frame: (its number, is it a left one, joints, None), or one (.., what is wrong)."""
        file = root / name / f"hdHand3d/handRecon3D_hd{i:08d}.json"
        try:
            return [(i, left, points, None) for left, points in read_hands(file, score, error)]
        except Damaged as problem:
            return [(i, False, None, f"labels: {problem}")]

    def shot(name: str, view: str, i: int) -> tuple[str, int | None]:
        if not (root / name / "hdImgs").is_dir():
            return f"{name}/hdVideos/hd_{view}.mp4", i
        place = f"{name}/hdImgs/{view}/{view}_{i:08d}"
        return f"{place}.png" if (root / f"{place}.png").exists() else f"{place}.jpg", None

    for name, numbers in frames.items():  # not every sequence has all views
        place = "hdImgs/{}" if (root / name / "hdImgs").is_dir() else "hdVideos/hd_{}.mp4"
        for view in [view for view in cameras[name] if not (root / name / place.format(view)).exists()]:
            print(f"{name}: has no pictures of view {view}, which is left out", flush=True)
            del cameras[name][view]
        need_files(root, (shot(name, view, i)[0] for view in cameras[name] for i in numbers))

    def samples() -> Iterator[Sample]:
        for name in frames:
            seen = [hand for i in frames[name] for hand in hands(name, i)]
            for view, (size, K, distortion, R, t) in cameras[name].items():  # a video in its own order
                for i, left, points, fault in seen:
                    image, frame = shot(name, view, i)
                    if fault:
                        yield Sample(image, frame=frame, fault=fault)
                        continue
                    there = points @ R.T + t  # (21, 3) mm, camera
                    if in_view(there, K, distortion, size):
                        yield Sample(image, there, K, size=size, frame=frame, left=left,
                                     distortion=distortion)

    most = {name: max((len(hands(name, i)) for i in frames[name][::100]), default=0) for name in frames}
    return sum(len(frames[name]) * len(cameras[name]) * max(2, most[name]) for name in frames), samples()
