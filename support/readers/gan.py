"""GAN, GANerated Hands (Mueller et al., CVPR 2018): left hands, crops of 256 px, mm, camera, our joint order.

    GANeratedHands_Release/data/noObject/0001/    0001_color_composed.png  0001_joint2D.txt
                                                  0001_joint_pos_global.txt  0001_crop_params.txt ..
    GANeratedHands_Release/data/withObject/0001/  ..

There is no official split. A folder (up to 1,024 neighbouring frames) is --split test with probability
--share, by a draw from --seed and its own name, else train. All joints are labelled, hidden or not, and have
2D labels. A crop is a square at (u, v) of a picture of 640 x 480 px, scaled to 256 px. Whether crop_params
gives the factor or its inverse is told by which of the two puts the joints on the 2D labels. No masks.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, pinhole, to_uv
from support.folder import HAND
from support.readers.formats import Damaged, listed, need_files, reading
from support.run import InputError, random_generator

SKELETON = HAND
FILES = {"joint2D": 42, "joint_pos_global": 63, "crop_params": 3}  # numbers in each
PICTURE = "_color_composed.png"


def read_numbers(path: Path, count: int) -> np.ndarray:
    """The numbers (count,) of a text file: one line, separated by commas."""
    with reading(path, "file of labels"):
        numbers = np.array(path.read_text().strip().strip(",").split(","), float)
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} numbers, not {count}")
        return numbers


def read(root: Path, split: Literal["train", "test"] = "train", share: float = 0.1,
         seed: int = 0) -> tuple[int, Iterator[Sample]]:
    if not 0 <= share <= 1:
        raise InputError(f"--share {share:g}: the part that is test, 0 to 1")
    layout = ("ROOT is GANeratedHands_Release with data/noObject/0001/0001_color_composed.png, and beside it "
              "0001_joint2D.txt, 0001_joint_pos_global.txt, 0001_crop_params.txt; so too data/withObject")
    need_files(root, ["data/noObject", "data/withObject"], layout)
    folders = sorted(f"data/{path.parent.name}/{path.name}" for path in listed(root, "data/*Object/*"))
    folders = [name for name in folders
               if (random_generator(seed, f"gan {name}").random() < share) == (split == "test")
               and (root / name).is_dir()]

    def frames(folder: str) -> list[str]:
        return [f"{folder}/{path.name.removesuffix(PICTURE)}"
                for path in listed(root / folder, f"*{PICTURE}")]

    count = 0
    for starts in map(frames, folders):
        need_files(root, [f"{start}_{kind}.txt" for start in starts for kind in FILES], layout)
        count += len(starts)
    if not count:
        raise InputError(f"{root}: no pictures in split {split} of share {share}. {layout}")

    def samples() -> Iterator[Sample]:
        for start in (start for folder in folders for start in frames(folder)):
            try:
                uv, points, (u, v, scale) = (read_numbers(root / f"{start}_{kind}.txt", n)
                                             for kind, n in FILES.items())
            except Damaged as error:
                yield Sample(f"{start}{PICTURE}", fault=f"labels: {error}")
                continue
            if not scale > 0:
                raise InputError(f"{root / start}_crop_params.txt: scale {scale}")
            uv, points = uv.reshape(21, 2), points.reshape(21, 3)  # px of the crop; mm, camera
            views = [pinhole(617.173 * s, 617.173 * s, (315.453 - u) * s, (242.259 - v) * s)
                     for s in (scale, 1 / scale)]
            K = min(views, key=lambda K: np.abs(to_uv(points, K) - uv).max())
            yield Sample(f"{start}{PICTURE}", points, K, uv=uv, size=(256, 256), left=True)
    return count, samples()
