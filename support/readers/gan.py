"""GAN, GANerated Hands (Mueller et al., CVPR 2018): left hands, crops of 256 px, mm, camera, our joint order.

    GANeratedHands_Release/data/noObject/0001/    0001_color_composed.png  0001_joint2D.txt
                                                  0001_joint_pos_global.txt  0001_crop_params.txt ..
    GANeratedHands_Release/data/withObject/0001/  ..

There is no official split. A folder (up to 1,024 neighbouring frames) is --split test with probability
--share, by a draw from --seed and its own name, else train. A crop is a square at (u, v) of a picture of
640 x 480 px, scaled to 256 px. Whether crop_params gives the factor or its inverse is told by which of them
puts the joints on the 2D labels. No masks.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample, pinhole, to_uv
from support.folder import HAND
from support.readers.formats import Damaged, listed, need_files, reading
from support.run import random_generator

SKELETON = HAND
FILES = {"joint2D": 42, "joint_pos_global": 63, "crop_params": 3}  # numbers in each
PICTURE = "_color_composed.png"


def read_numbers(path: Path, count: int) -> np.ndarray:
    with reading(path, "file of labels"):
        numbers = np.array(path.read_text().strip().strip(",").split(","), float)
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} numbers, not {count}")
        return numbers


def read(root: Path, split: Literal["train", "test"] = "train", share: float = 0.1,
         seed: int = 0) -> tuple[int, Iterator[Sample]]:
    need_files(root, ["data/noObject", "data/withObject"])
    folders = [path.relative_to(root).as_posix() for path in listed(root, "data/*Object/*")]
    folders = [name for name in folders
               if (random_generator(seed, f"gan {name}").random() < share) == (split == "test")]
    starts = [f"{folder}/{path.name.removesuffix(PICTURE)}" for folder in folders
              for path in listed(root / folder, f"*{PICTURE}")]
    need_files(root, (f"{start}_{kind}.txt" for start in starts for kind in FILES))

    def samples() -> Iterator[Sample]:
        for start in starts:
            try:
                uv, points, (u, v, scale) = (read_numbers(root / f"{start}_{kind}.txt", n)
                                             for kind, n in FILES.items())
            except Damaged as error:
                yield Sample(f"{start}{PICTURE}", fault=f"labels: {error}")
                continue
            uv, points = uv.reshape(21, 2), points.reshape(21, 3)  # px of the crop; mm, camera
            views = [pinhole(617.173 * s, 617.173 * s, (315.453 - u) * s, (242.259 - v) * s)
                     for s in (scale, 1 / scale)]
            K = min(views, key=lambda K: np.abs(to_uv(points, K) - uv).max())
            yield Sample(f"{start}{PICTURE}", points, K, uv=uv, size=(256, 256), left=True)
    return len(starts), samples()
