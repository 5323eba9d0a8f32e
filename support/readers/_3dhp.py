"""MPI-INF-3DHP (Mehta et al., 3DV 2017): train S1 to S8, videos; test TS1 to TS6, the frames called valid.

    S1/Seq1/  annot.mat  camera.calibration  imageSequence/video_0.avi ..
    S1/Seq2/  ..  S8/Seq2/
    mpi_inf_3dhp_test_set/TS1/  annot_data.mat  imageSequence/img_000001.jpg ..
    (or mpi_inf_3dhp_test_set/mpi_inf_3dhp_test_set/TS1/ .., as get_testset.sh leaves it)

Millimetres, camera; 17 of 28 joints in train, all 17 in test; the pelvis is above Human3.6M's. --labels
univ_annot3 (people enlarged to one height: the official protocol) or annot3 (as they are). The cameras of
train are in camera.calibration; that of a test sequence is fitted to annot3 and annot2. --stride and
--cameras (the customary 8 of 14, none at the ceiling) choose from train only. Frame i of a video is row i;
img_000001.jpg is row 0. No masks. Left out: rows of S4/Seq2 whose left and right are exchanged.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, pinhole
from support.folder import HUMAN
from support.readers.formats import need_files, read_h5, read_mat, reading
from support.readers.h36m import ALL_BUT_ROOT
from support.run import InputError

SKELETON = HUMAN | ALL_BUT_ROOT | {
    "protocol": ALL_BUT_ROOT["protocol"] + "; it lies above Human3.6M's, which adds to every joint's error"}
ORDER = {"train": [4, 23, 24, 25, 18, 19, 20, 3, 5, 6, 7, 9, 10, 11, 14, 15, 16],  # of 28
         "test": [14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4]}  # of 17
KNEES_AND_ANKLES = [2, 3, 5, 6]
# annot2 of hips and spine is 0.6 to 1.9 px from the projection of annot3, in genuine files
TOLERANCE = np.where(np.isin(np.arange(17), [1, 4, 7]), 5.0, 1.0)  # (17,) px
EXCHANGED = "S4/Seq2", range(3759, 5853)  # rows, from 0, whose left and right are exchanged
FRAMES = dict(zip((f"S{subject}/Seq{sequence}" for subject in range(1, 9) for sequence in (1, 2)), (
    6416, 12430, 6502, 6081, 12488, 12283, 6171, 6675, 12820, 12312, 6188, 6145, 6239, 6320, 6468, 6054),
    strict=True))  # of a sequence's videos; annot.mat has rows beyond their end


def read_calibration(path: Path, chosen: list[int]) -> dict[int, tuple]:
    """{camera: ((width, height) px, K (3, 3) px)} of a file; InputError if it lacks a `chosen` camera."""
    cameras = {}
    with reading(path, "camera.calibration"):
        for part in path.read_text().split("name")[1:]:
            words = part.split()
            size, matrix = (words.index(word) + 1 for word in ("size", "intrinsic"))
            K = np.reshape([float(word) for word in words[matrix:matrix + 16]], (4, 4))[:3, :3]
            cameras[int(words[0])] = (tuple(int(word) for word in words[size:size + 2]), K)
    missing = set(chosen) - set(cameras)
    if missing:
        raise InputError(f"{path}: has no camera {min(missing)}")
    return cameras


def fit_pinhole(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Intrinsics (3, 3) px, without skew, that project points (n, 3) mm, camera, nearest to uv (n, 2) px."""
    good = np.isfinite(points).all(axis=1) & np.isfinite(uv).all(axis=1) & (points[:, 2] != 0)
    xy, uv = points[good, :2] / points[good, 2:], uv[good]
    (fx, cx), (fy, cy) = (np.polyfit(xy[:, axis], uv[:, axis], 1) for axis in (0, 1))  # u = fx x + cx
    return pinhole(fx, fy, cx, cy)


def enlarged(points: np.ndarray, normalised: np.ndarray, file: Path) -> np.ndarray:
    """annot3 (F, 17, 3) mm, camera, scaled so that the poses about the pelvis are those of univ_annot3.

    univ_annot3 shows each person at one height and another place, so it does not project. The scaled pose
    does: a person s times as large and s times as far away looks the same. Knees and ankles do not count: in
    today's TS6 they are corrected in annot3 alone.
    """
    own, other = (np.delete(x - x[:, :1], KNEES_AND_ANKLES, axis=1) for x in (points, normalised))
    s = (own * other).sum() / (own * own).sum()
    if not np.abs(s * own - other).max() < 1:
        raise InputError(f"{file}: univ_annot3 is not annot3 enlarged; use --labels annot3")
    return s * points


def read_test(root: Path, labels: str) -> tuple[int, Iterator[Sample]]:
    folder = "mpi_inf_3dhp_test_set/"  # the publisher's script unpacks it into one of the same name
    base = next((base for base in (2 * folder, folder) if (root / base).is_dir()), "")
    names = [f"{base}{name}" for name in ("TS1", "TS2", "TS3", "TS4", "TS5", "TS6")]
    files = ("annot_data.mat", "imageSequence/img_000001.jpg")
    need_files(root, [f"{name}/{file}" for name in names for file in files])

    def samples() -> Iterator[Sample]:
        for name in names:
            file, axes = root / name / "annot_data.mat", {"annot2": 2, "annot3": 3, "univ_annot3": 3}
            found = read_h5(file, *axes, "valid_frame")
            valid = np.flatnonzero(found["valid_frame"].ravel() == 1)  # (V,) rows
            with reading(file, "file of labels"):
                uv, points, other = (
                    np.reshape(found[key], (-1, 17, last))[valid][:, ORDER["test"]].astype(float)
                    for key, last in axes.items())
                K = fit_pinhole(points.reshape(-1, 3), uv.reshape(-1, 2))
            points = enlarged(points, other, file) if labels == "univ_annot3" else points
            images = [f"{name}/imageSequence/img_{row + 1:06d}.jpg" for row in valid]
            need_files(root, images)
            for image, keypoints, seen in zip(images, points, uv, strict=True):
                yield Sample(image, keypoints, K, uv=seen, tolerance=5.0)
    return 2929, samples()


def read(root: Path, split: Literal["train", "test"] = "train",
         labels: Literal["univ_annot3", "annot3"] = "univ_annot3", stride: int = 10,
         cameras: str = "0,1,2,4,5,6,7,8") -> tuple[int, Iterator[Sample]]:
    if split == "test":
        return read_test(root, labels)
    chosen = [int(word) for word in cameras.split(",") if word.isdecimal()]
    if len(set(chosen)) < len(cameras.split(",")):
        raise InputError(f"--cameras {cameras}: give numbers, each once, as 0,1,2")
    print("left out, for left and right are exchanged: rows 3,759 to 5,852 of S4/Seq2", flush=True)
    files = ["annot.mat", "camera.calibration", *(f"imageSequence/video_{c}.avi" for c in chosen)]
    need_files(root, [f"{name}/{file}" for name in FRAMES for file in files])
    calibrated = {name: read_calibration(root / name / "camera.calibration", chosen) for name in FRAMES}

    def samples() -> Iterator[Sample]:
        for name, frames in FRAMES.items():
            file = root / name / "annot.mat"
            keys = {"annot2": 2, "annot3": 3, labels: 3}  # two, if labels is annot3 itself
            found = read_mat(file, *keys)
            for c in chosen:
                with reading(file, f"file of labels (camera {c})"):
                    uv, points, *other = (
                        np.reshape(found[key][c, 0], (-1, 28, axes))[:frames, ORDER["train"]]
                        for key, axes in keys.items())
                size, K = calibrated[name][c]
                points = enlarged(points, other[0], file) if other else points
                for i in range(0, len(points), stride):
                    if name == EXCHANGED[0] and i in EXCHANGED[1]:
                        continue
                    yield Sample(f"{name}/imageSequence/video_{c}.avi", points[i], K, uv=uv[i], size=size,
                                 frame=i, tolerance=TOLERANCE)
    return sum(len(range(0, n, stride)) for n in FRAMES.values()) * len(chosen), samples()
