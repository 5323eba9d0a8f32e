"""Any folder of photographs and its subfolders, such as ImageNet's validation images, without labels: X_C.

    ROOT/ILSVRC2012_val_00000001.JPEG ..  or  ROOT/anything/anything.png ..
"""
import os
from collections.abc import Iterator
from pathlib import Path

from support.convert import Sample
from support.folder import HAND

SKELETON = HAND | {"joints": [], "bones": []}
MAX_SKIPPED = 1.0
KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def read(root: Path) -> tuple[int, Iterator[Sample]]:
    files = []
    for folder, folders, names in os.walk(root, followlinks=True):  # collections are often made of links
        folders[:] = [name for name in folders if not name.startswith(".")]  # a Mac's and an editor's own
        files += [(Path(folder) / name).relative_to(root).as_posix() for name in names
                  if Path(name).suffix.lower() in KINDS and not name.startswith(".")]
    return len(files), map(Sample, sorted(files))
