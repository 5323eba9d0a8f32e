"""FreiHAND v2 (Zimmermann et al., ICCV 2019): right hands, 224 x 224 px, metres, our joint order.

    FreiHAND_pub_v2/       training_xyz.json  training_K.json  training/rgb/00000000.jpg ..  training/mask/
    FreiHAND_pub_v2_eval/  evaluation_xyz.json  evaluation_K.json  evaluation/rgb/  evaluation/segmap/

train: n = 32,560 labels and masks (hand and forearm, with JPEG noise) for 4 n pictures. Picture i + n v shows
sample i in version v: 0 green screen, 1 harmonised, 2 and 3 recoloured. evaluation: n = 3,960.
"""
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from support.convert import Sample
from support.folder import HAND
from support.readers.formats import listed, need_files, read_json_array
from support.run import InputError

SKELETON = HAND
SPLITS = {  # its folder, pictures per sample, folder of masks, grey values of a hand
    "train": ("training", 4, "mask", (128, 255)), "evaluation": ("evaluation", 1, "segmap", (1, 255))}


def read(root: Path, split: Literal["train", "evaluation"] = "train",
         versions: str = "0123") -> tuple[int, Iterator[Sample]]:
    if not versions or set(versions) - set("0123") or len(set(versions)) < len(versions):
        raise InputError(f"--versions {versions!r}: some of 0123, each once")
    part, copies, masks, foreground = SPLITS[split]
    need_files(root, [f"{part}_xyz.json", f"{part}_K.json", f"{part}/rgb/{0:08d}.jpg"])
    xyz = 1000 * read_json_array(root / f"{part}_xyz.json", 21, 3)  # (n, 21, 3) m -> mm, camera
    K = read_json_array(root / f"{part}_K.json", 3, 3)  # (n, 3, 3) px
    n, pictures = len(xyz), len(listed(root / part / "rgb", "*.jpg"))
    if len(K) != n or pictures != copies * n:  # with a wrong n, i + n v is the picture of another sample
        raise InputError(f"{root}: {n} samples in {part}_xyz.json, {len(K)} in {part}_K.json, {pictures} "
                         f"pictures in {part}/rgb, where {copies} x {n} belong: an incomplete download?")
    masked = split == "train" or (root / part / masks).is_dir()
    suffix = "png" if (root / part / masks / f"{0:08d}.png").exists() else "jpg"
    copies = versions if copies > 1 else "0"
    need_files(root, (f"{part}/rgb/{i + n * int(v):08d}.jpg" for v in copies for i in range(n)))
    if masked:
        need_files(root, (f"{part}/{masks}/{i:08d}.{suffix}" for i in range(n)))

    def samples() -> Iterator[Sample]:
        for i, v in itertools.product(range(n), copies):
            mask = f"{part}/{masks}/{i:08d}.{suffix}" if masked else None
            image = f"{part}/rgb/{i + n * int(v):08d}.jpg"
            yield Sample(image, xyz[i], K[i], mask, foreground, size=(224, 224))
    return n * len(copies), samples()
