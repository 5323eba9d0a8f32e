"""Human3.6M (Ionescu et al., PAMI 2014): videos of 1000 x 1000 (1002) px, 50 frames per second.

    S1/Videos/Directions 1.54138969.mp4 ..
    S1/MyPoseFeatures/D3_Positions_mono/Directions 1.54138969.cdf ..  and D2_Positions  (or S1/Poses_..)
    S1/MySegmentsMat/ground_truth_bs/Directions 1.54138969.mat ..
    S5 ..

train: subjects 1, 5, 6, 7, 8; test: 9, 11; of every video each `stride`-th frame. Millimetres, camera (the
positions called mono; mono_universal is another body). Frame i of a video is pose i. Intrinsics and lens are
not in these files: they are fitted to the publisher's 3D and 2D positions, for each subject and camera.
--masks no does without masks. Left out: "_ALL", which is no action; S11's Directions of camera 54138969,
whose video is corrupt; S9's Greeting, SittingDown 1 and Waiting 1, whose labels are 200 mm off.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, pinhole
from support.folder import HUMAN
from support.readers.formats import listed, need_files, read_cdf
from support.run import InputError

ALL_BUT_ROOT = {  # indices of the joints over which errors are averaged, and what to say with the number
    "compare": list(range(1, 17)),
    "protocol": "16 joints; the pelvis is aligned and does not count (if it did: 16/17 of the error)"}
SKELETON = HUMAN | ALL_BUT_ROOT
ORDER = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27]  # of 32, some of which are there twice
SUBJECTS = {"train": ("S1", "S5", "S6", "S7", "S8"), "test": ("S9", "S11")}
SHIFTED = ("S9 Greeting", "S9 SittingDown 1", "S9 Waiting 1")  # by 200 mm, in 3D and 2D alike


def read_positions(path: Path, axes: int) -> np.ndarray:
    """A file of positions, (1, F, 32 * axes) in a CDF, as (F, 32, axes) float64."""
    pose = read_cdf(path, "Pose")
    if pose.ndim != 3 or pose.shape[::2] != (1, 32 * axes) or not np.isfinite(pose).all():
        raise InputError(f"{path}: Pose {pose.shape}; not (1, frames, {32 * axes}) finite numbers")
    return pose.reshape(-1, 32, axes).astype(float)


def fit_lens(points: np.ndarray, uv: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The camera `name` that takes points (.., 3) mm, camera, to uv (.., 2) px, by least squares.

    Returns intrinsics (3, 3) px and distortion (5,) k1 k2 p1 p2 k3; InputError if it misses by half a pixel.
    With r2 = x x + y y, u = fx (x (1 + k1 r2 + k2 r2^2 + k3 r2^3) + 2 p1 x y + p2 (r2 + 2 x x)) + cx is
    linear in fx, cx and fx times k, p. v has fy, which differs from fx by a thousandth, times the same k, p.
    """
    step = points.size // 60000 | 1  # odd, so that all of the 32 joints get a turn
    points, uv = points.reshape(-1, 3)[::step], uv.reshape(-1, 2)[::step]
    x, y = (points[:, :2] / points[:, 2:]).T  # (n,)
    r2, none, one = x * x + y * y, np.zeros(len(x)), np.ones(len(x))
    bent = np.array([[x * r2, y * r2], [x * r2 ** 2, y * r2 ** 2], [2 * x * y, r2 + 2 * y * y],
                     [r2 + 2 * x * x, 2 * x * y], [x * r2 ** 3, y * r2 ** 3]])  # (5, 2, n)
    columns = np.array([[x, none], [one, none], [none, y], [none, one], *bent]).reshape(9, -1).T  # (2 n, 9)
    solution = np.linalg.lstsq(columns, uv.T.ravel(), rcond=None)[0]
    fx, cx, fy, cy = solution[:4]
    apart = np.quantile(np.abs(columns @ solution - uv.T.ravel()), 0.99)
    if apart > 0.5:
        raise InputError(f"{name}: no lens takes its 3D to its 2D positions, {apart:.1f} px remain; are "
                         "these one download's files, D3_Positions_mono and D2_Positions?")
    return pinhole(fx, fy, cx, cy), solution[4:] * 2 / (fx + fy)


def read(root: Path, split: Literal["train", "test"] = "train", stride: int = 5,
         masks: Literal["yes", "no"] = "yes") -> tuple[int, Iterator[Sample]]:
    def place(subject: str, kind: str) -> str:
        apart = f"{subject}/Poses_{kind}"  # one folder per download
        return apart if (root / apart).is_dir() else f"{subject}/MyPoseFeatures/{kind}"

    def positions(subject: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a video: (F, 32, 3) mm, camera, and (F, 32, 2) px."""
        points = read_positions(root / place(subject, "D3_Positions_mono") / f"{name}.cdf", 3)
        uv = read_positions(root / place(subject, "D2_Positions") / f"{name}.cdf", 2)
        return points[:len(uv)], uv[:len(points)]

    videos, lenses, longest = {}, {}, 0  # of (subject, camera)
    if split == "test":
        print(f"left out, for their labels are 200 mm off: {', '.join(SHIFTED)}", flush=True)
    for subject in SUBJECTS[split]:
        kinds = {f"{subject}/Videos": ".mp4", place(subject, "D3_Positions_mono"): ".cdf"}
        found = {path.stem for folder, end in kinds.items() for path in listed(root / folder, f"*{end}")}
        kinds[place(subject, "D2_Positions")] = ".cdf"
        if masks == "yes":
            need_files(root, [f"{subject}/MySegmentsMat/ground_truth_bs"])
        names = sorted(name for name in found if not name.startswith("_ALL")
                       and f"{subject} {name}" != "S11 Directions.54138969"
                       and f"{subject} {name.rpartition('.')[0]}" not in SHIFTED)
        wanted = names or ["*"]  # none: the error says what is missing
        need_files(root, (f"{place}/{name}{end}" for place, end in kinds.items() for name in wanted))
        for name in names:
            videos.setdefault((subject, name.rpartition(".")[2]), []).append(name)
    for (subject, camera), names in videos.items():
        some = [positions(subject, name) for name in names[::max(1, len(names) // 4)]]
        longest = max(longest, *(len(uv) for _, uv in some))
        points, uv = (np.concatenate(parts) for parts in zip(*some, strict=True))  # (n, 32, 3), (n, 32, 2)
        lenses[subject, camera] = fit_lens(points, uv, f"{root / subject}, camera {camera}")

    def samples() -> Iterator[Sample]:
        for (subject, camera), name in ((key, name) for key, names in videos.items() for name in names):
            points, uv = (part[:, ORDER] for part in positions(subject, name))
            mask = f"{subject}/MySegmentsMat/ground_truth_bs/{name}.mat" if masks == "yes" else None
            K, distortion = lenses[subject, camera]
            for i in range(0, len(points), stride):
                yield Sample(f"{subject}/Videos/{name}.mp4", points[i], K, mask, (1, 255), uv[i], frame=i,
                             mask_key=i if mask else None, distortion=distortion, tolerance=1.0)
    return sum(map(len, videos.values())) * -(-longest // stride), samples()
