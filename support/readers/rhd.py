"""RHD, rendered hand poses (Zimmermann & Brox, ICCV 2017), version 2: 320 x 320 px, metres, camera frame.

    RHD_published_v2/training/    anno_training.pickle  color/00000.png ..  mask/00000.png ..
    RHD_published_v2/evaluation/  anno_evaluation.pickle  color/  mask/

The pickle is {number: {"xyz": (42, 3), "uv_vis": (42, 3), "K": (3, 3)}}: both hands of a person, 0-20 left,
21-41 right, fingers from tip to palm. The hand with more pixels in the mask is taken, as the publisher's code
does. A mask is an index: 0 background, 1 person, 2-17 left hand, 18-33 right hand. K has its principal point
at 160 of 320 px. If that counts from the picture's edge, it is half a pixel off; it is left as it is.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from support.convert import Sample
from support.folder import HAND
from support.readers.formats import Damaged, need_files, open_mask, read_pickle, reading

SKELETON = HAND
LEFT, RIGHT = (2, 17), (18, 33)  # indices of each hand in a mask
ORDER = [0] + [4 * f + k for f in (0, 1, 2, 3, 4) for k in (4, 3, 2, 1)]  # ours = raw[ORDER], in each hand


def read(root: Path, split: Literal["train", "evaluation"] = "train") -> tuple[int, Iterator[Sample]]:
    part = "training" if split == "train" else split
    path, shapes = root / part / f"anno_{part}.pickle", {"xyz": (42, 3), "uv_vis": (42, 3), "K": (3, 3)}
    need_files(root, [f"{part}/anno_{part}.pickle"])
    labels = read_pickle(path)
    with reading(path, "file of labels"):
        for i in sorted(labels):
            found = {key: np.asarray(labels[i][key], float).shape for key in shapes}
            if found != shapes or not isinstance(i, int):
                raise ValueError(f"sample {i!r} has {found}, not {shapes}")
    need_files(root, [f"{part}/{kind}/{i:05d}.png" for kind in ("color", "mask") for i in labels])

    def samples() -> Iterator[Sample]:
        for i in sorted(labels):
            label, mask = labels[i], f"{part}/mask/{i:05d}.png"
            try:
                left = open_mask(root / mask, LEFT, None).sum() > open_mask(root / mask, RIGHT, None).sum()
            except Damaged as error:
                yield Sample(f"{part}/color/{i:05d}.png", fault=f"mask: {error}")
                continue
            rows = np.array(ORDER) + (0 if left else 21)  # (21,)
            xyz, uv, K = (np.float64(label[key]) for key in ("xyz", "uv_vis", "K"))  # metres, px, px
            yield Sample(f"{part}/color/{i:05d}.png", 1000.0 * xyz[rows], K, mask,
                         LEFT if left else RIGHT, uv[rows, :2], (320, 320), left=left)
    return len(labels), samples()
