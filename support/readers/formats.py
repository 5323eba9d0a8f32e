"""Files as publishers ship them: pictures, videos, MATLAB, HDF5, CDF, JSON, and pickles of arrays.

These files come from a download, so nothing in them is executed, and no other file is opened for them.
Whatever is wrong with a file becomes one line that names it. Libraries are imported where they are needed.
"""
import contextlib
import json
import math
import os
import pickle
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.run import InputError, first_line

VIDEOS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts"
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow's EPS would run Ghostscript


class Missing(Exception):
    """A sample to leave out and count, such as a frame beyond the end of a video: "kind: what is wrong"."""


class Damaged(InputError):
    """A file is missing or cannot be read. If it is one sample's own, that sample is left out and counted."""


@contextlib.contextmanager
def reading(path: Path, what: str):
    """Context in which any failure to read a file becomes one line that names the file."""
    try:
        yield
    except (InputError, Missing):
        raise
    except ImportError as error:
        library = (error.name or str(error)).partition(".")[0]
        raise InputError(f"{path}: to read it, first: pip install {library}") from error
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        kind = "KeyError " if isinstance(error, KeyError) else ""  # its text is the key alone
        wrong = f"broken {what}: {kind}{first_line(error)}" if os.path.exists(path) else "missing"
        raise Damaged(f"{path}: {wrong}; give a whole {what}") from error


def listed(folder: Path, pattern: str) -> list[Path]:
    """What matches in a folder, sorted, without names that begin with a dot: a Mac adds `._name` to files."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def need_files(root: Path, names) -> None:
    """InputError unless all files are there: now, not in an hour."""
    for name in names:
        if not os.path.exists(f"{root}/{name}"):
            raise InputError(f"{root / name}: missing; with -h this command shows what belongs into ROOT")


def read_json_array(path: Path, *shape: int) -> np.ndarray:
    """A JSON list of n arrays of `shape` as (n, *shape) float64."""
    with reading(path, "JSON array"):
        array = np.array(json.loads(path.read_text()), np.float64)
        if array.shape[1:] != shape:
            raise ValueError(f"shape {array.shape}, expected {('n', *shape)}")
        return array


def open_picture(path: Path) -> np.ndarray:
    """Any picture file as (H, W, 3) uint8, turned as its EXIF says. What is transparent becomes white."""
    with reading(path, "picture (JPEG, PNG ..)"), Image.open(path, formats=PICTURES) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are fractions, of an unknown range")
        if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255; 32 bits may hold 0 to 255
            grey = np.asarray(image) / (1 if image.mode == "I" and image.getextrema()[1] < 256 else 257)
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:  # the colour under it is arbitrary
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


class Video:
    """The frames of a video by their number. A seek may land anywhere, so a frame is told by its time.

    Videos whose packets have no true times (AVI with frames out of order) are decoded from their beginning,
    and counted.
    """

    def __init__(self, path: Path):
        import av
        # under the name of a video, a playlist would have FFmpeg open the files and addresses it lists
        safe = {"format_whitelist": VIDEOS, "protocol_whitelist": "file"}
        self.container = av.open(str(path), options=safe)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # there are other workers
        packets = [(p.pts, p.pts if p.dts is None else p.dts, p.is_keyframe)
                   for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        self.count, times = len(packets), [time for time, _, _ in packets]
        late = self.stream.codec_context.has_b_frames  # frames come out of order
        self.timed = None not in times and not (late and times == sorted(times))
        self.number = {time: i for i, time in enumerate(sorted(times))} if self.timed else {}
        self.keys = sorted((self.number[t], start) for t, start, key in packets if key and self.timed)
        self.begin = min(start for _, start, _ in packets) if self.timed else 0
        self.next = math.inf  # number of the next frame that is decoded
        self.last = -1, None  # number and pixels of the last one

    def frame(self, number: int) -> np.ndarray:
        """Frame `number`, from 0, as (H, W, 3) uint8; Missing beyond the end."""
        if number >= self.count:
            raise Missing(f"frame: the video has {self.count}")
        if number == self.last[0]:  # one frame can show several hands
            return self.last[1]
        key, time = max((key for key in self.keys if key[0] <= number), default=(0, self.begin))
        if not key <= self.next <= number:
            self.container.seek(time, stream=self.stream)
            self.frames, self.next = self.container.decode(self.stream), key
        here = -1
        for frame in self.frames:
            here = self.number.get(frame.pts, -1) if self.timed else self.next
            self.next = here + 1
            if here >= number:
                break
        if here != number:
            raise ValueError(f"frame {number} cannot be decoded")
        self.last = number, frame.to_ndarray(format="rgb24")
        return self.last[1]


open_video = lru_cache(maxsize=2)(Video)  # in each worker


def open_mask(path: Path, foreground: tuple[float, float], key: str | int | None) -> np.ndarray:
    """A mask as (H, W) bool: True where the value is in the closed range; `key` as Sample.mask_key."""
    with reading(path, "mask"):
        if isinstance(key, str):
            values = read_mat(path, key)[key]
        elif key is not None:
            values = read_cell(path, key)
        else:
            with Image.open(path, formats=PICTURES) as image:
                values = np.asarray(image if image.mode in "PL" else image.convert("L"))
        return (values >= foreground[0]) & (values <= foreground[1])


def read_mat(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Variables of a MATLAB file of version 5, with MATLAB's axes."""
    with reading(path, "MATLAB file"):
        from scipy.io import loadmat
        found = loadmat(path, variable_names=names)
        return {name: found[name] for name in names}


def read_h5(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Variables of a MATLAB file of version 7.3, which is HDF5: MATLAB's axes in reverse, (F, .., ..)."""
    with reading(path, "MATLAB 7.3 file"):
        import h5py
        with h5py.File(path) as file:
            return {name: h5_values(file, file[name]) for name in names}


def read_cell(path: Path, index: int) -> np.ndarray:
    """Matrix number `index` of the cell 'Masks' (1, F) of a MATLAB 7.3 file; Missing if there is none."""
    import h5py
    if not path.exists():
        raise Missing(f"mask: no {path.name}")
    with h5py.File(path) as file:
        cell = file["Masks"]  # (F, 1) of references
        if index >= len(cell) or not cell[index, 0] or "MATLAB_empty" in file[cell[index, 0]].attrs:
            raise Missing(f"mask: {path.name} has none for this frame")
        return h5_values(file, file[cell[index, 0]]).T  # (H, W)


def h5_values(file, found) -> np.ndarray:
    """The numbers of an HDF5 data set; ValueError if they are in another file."""
    if found.file.filename != file.filename or found.external or found.is_virtual:
        raise ValueError(f"{found.name} lies in another file")
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{found.name} holds {found.dtype}, not numbers")
    return found[()]


def read_cdf(path: Path, name: str) -> np.ndarray:
    with reading(path, "CDF file"):
        import cdflib
        return np.asarray(cdflib.CDF(path).varget(name))


# Pickles. A pickle can call anything that it names, so it finds nothing but the few constructors below.
class PickledType:
    """Stands for numpy.dtype in a pickle: numpy's own believes any field offset that it is told."""

    def __init__(self, code, *_):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        self.order = state[1]

    def plain(self) -> np.dtype:
        if not re.fullmatch(r"[<>=|][biufcSUO]\d{0,4}", self.order + self.code):
            raise ValueError(f"an array of {self.code!r}")
        return np.dtype(self.order + self.code)


class PickledArray(np.ndarray):
    """Stands for numpy.ndarray in a pickle: numpy's own reads beyond a list that is too short."""

    def __setstate__(self, state):
        shape, kind, fortran, content = state[-4:]
        dtype, content = kind.plain(), content.encode("latin1") if isinstance(content, str) else content
        size = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
        if type(content) is not (list if dtype.hasobject else bytes) or len(content) != size or size < 0:
            raise ValueError(f"{shape} {dtype} in {len(content)} bytes")
        super().__setstate__((1, shape, dtype, bool(fortran), content))

    def __reduce__(self):
        return np.asarray(self).__reduce__()


ALLOWED = {  # what a pickle may name: arrays and scalars of numpy, bytes of Python 2
    "ndarray": "ndarray",
    "dtype": lambda *code: PickledType(*code),
    "_reconstruct": lambda *_: np.ndarray.__new__(PickledArray, 0),
    "scalar": lambda kind, data: np.frombuffer(
        data.encode("latin1") if isinstance(data, str) else data, kind.plain(), 1)[0],
    "encode": lambda text, encoding: text.encode("latin1"),
}


class ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        home = "_codecs" if name == "encode" else "numpy"
        if module.split(".")[0] == home and name in ALLOWED:
            return ALLOWED[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, no array: refused, nothing of it was run")


def read_pickle(path: Path):
    """A pickle of Python 2 or 3: numpy arrays, containers, numbers, str and bytes, and nothing else."""
    with reading(path, "pickle"), open(path, "rb") as file:
        return ArraysOnly(file, encoding="latin1").load()  # str of Python 2, in which arrays keep their bytes
