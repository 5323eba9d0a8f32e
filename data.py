"""Data: a data set on disk, batches, augmentation, the embedded benchmark, readers of public data sets.

    python data.py hands datasets/hands             render the embedded benchmark (the scripts do so too);
    python data.py bodies datasets/bodies           the same with human bodies
    python data.py freihand ROOT OUT --split train  convert a publisher's files into a data-set folder, once
    python data.py imagenet ROOT OUT                any folder of photographs, as X_C
    python data.py show FOLDER PICTURE.png          draw a few samples, with their labels and masks
    python data.py check FOLDER                     sizes, checksums, and whether the labels are possible

Bring your own data. A data set is a folder of arrays; write it with numpy, and every script reads it:

    images.npy      (n, H, H, 3) uint8     square RGB crops
    masks.npy       (n, H, H)    uint8     0 background .. 255 foreground; only a source needs them
    keypoints.npy   (n, K, 3)    float32   mm, camera frame: x right, y down, z forward; NaN: not labelled
    intrinsics.npy  (n, 3, 3)    float32   of the stored crop, pixel centres at integers: u = fx x / z + cx
    checksums.npy   (n, 4)       uint32    optional: CRC of each record of these four (record_sums below)
    meta.json       {"format": 1, "name": "mine", "split": "train", "joints": ["wrist", ...], "root": 0,
                     "bones": [[0, 1], ...], "depth_range": 300.0, "margin": 1.25, "origin": "whence it came"}

A target needs images.npy and meta.json only; its other files are never opened in training. `margin`: the
stored crop is so many times as wide as the one that a network sees, so that rotation and translation find
real pixels.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import inspect
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import re
import resource
import signal
import threading
import warnings
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

from udapose import (IMAGE_MEAN, IMAGE_STD, InputError, Progress, autocast, back_project, first_line,
                     from_rank_0, from_voxels, project, random_generator, run_script, write_atomically,
                     write_json)

FORMAT = 1
ARRAYS = {"images": np.uint8, "masks": np.uint8,  # each array of a data set, and its type
          "keypoints": np.float32, "intrinsics": np.float32, "checksums": np.uint32}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SPAWN = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started threads
MEMORY, READ_SECONDS = 4 << 30, 600  # bytes that a process may use which reads foreign files; s to read one
LARGEST = 1 << 28                    # numbers in a publisher's array
VIDEOS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts"
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of Pillow's; its EPS runs Ghostscript
SUMMED = [name for name in ARRAYS if name != "checksums"]  # a column of checksums.npy each


# ==========================================================================================================
# A data set on disk
# ==========================================================================================================
class Dataset:
    """A data-set folder; `fields` names the arrays to open, memory-mapped. What is not named is not opened.

    Raises InputError, naming file, value and remedy, for a missing, truncated or ill-shaped array; and later,
    where the folder has checksums.npy, for a record that is not what was written, when it is first read.
    """

    def __init__(self, folder: str | Path, *fields: str):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.masks = self.keypoints = self.intrinsics = self.checksums = None
        self.images = open_array(self.folder / "images.npy", np.uint8, ("n", "H", "H", 3))
        n, H, W, _ = self.images.shape
        if H != W or n == 0:
            raise InputError(f"{self.folder}/images.npy: shape {self.images.shape}; not (n > 0, H, H, 3)")
        if n != self.meta.get("rows", n):
            raise InputError(f"{self.folder}/images.npy: {n} rows; meta.json counts {self.meta['rows']}")
        shapes = {"images": (n, H, H, 3), "masks": (n, H, H), "keypoints": (n, len(self.meta["joints"]), 3),
                  "intrinsics": (n, 3, 3), "checksums": (n, len(SUMMED))}
        if (self.folder / "checksums.npy").exists(): fields += ("checksums",)
        for field in fields:
            setattr(self, field, open_array(self.folder / f"{field}.npy", ARRAYS[field], shapes[field]))
        for i in range(0, n if self.keypoints is not None else 0, 65536):      # memory stays flat
            some = self.keypoints[i:i + 65536]
            if (bad := np.isinf(some).any(axis=(1, 2))).any():
                raise InputError(f"{self.folder}/keypoints.npy: row {i + int(bad.argmax())} is "
                                 "infinite; write NaN for no label")
            if self.intrinsics is None: continue
            with np.errstate(all="ignore"): size = np.linalg.det(self.intrinsics[i:i + 65536].astype(float))
            bad = np.isfinite(some).any(axis=(1, 2)) & ~(np.isfinite(size) & (size != 0))
            if bad.any():
                raise InputError(f"{self.folder}/intrinsics.npy: row {i + int(bad.argmax())} is no camera "
                                 "(not finite, or of determinant 0), but its image is labelled")
        if self.checksums is None: return                                      # a folder made by hand
        value = zlib.crc32(np.ascontiguousarray(self.checksums))
        if value != self.meta.get("crc", {}).get("checksums", value):
            raise InputError(f"{self.folder}/checksums.npy: not the one that meta.json was written with")
        for i, field in enumerate(SUMMED):
            if (array := getattr(self, field)) is not None:
                setattr(self, field, CheckedArray(array, self.checksums[:, i], self.folder / f"{field}.npy"))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Changes with the data: meta.json (which holds checksums, where we wrote it; else 256 rows of each
        array do) and the shape."""
        crc = {k: v for k, v in self.meta.get("crc", {}).items() if k in SUMMED}  # with checksums.npy or not
        meta = self.meta | ({"crc": crc} if "crc" in self.meta else {})
        value = zlib.crc32((json.dumps(meta, sort_keys=True) + str(self.images.shape)).encode())
        some = np.linspace(0, len(self) - 1, min(256, len(self))).astype(int)
        for array in () if crc else (self.images, self.masks, self.keypoints, self.intrinsics):
            if array is not None: value = zlib.crc32(np.ascontiguousarray(array[some]), value)
        return f"{value:08x}"


class CheckedArray:
    """An array of a data set: a record is held against its CRC when this process first reads it."""

    def __init__(self, array: np.ndarray, sums: np.ndarray, path: Path):
        self.array, self.sums, self.path = array, sums, path
        self.new, self.shape, self.dtype = np.ones(len(array), bool), array.shape, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self[:], dtype)

    def __getitem__(self, rows) -> np.ndarray:
        found = self.array[rows]
        if self.new[rows].any():
            one = isinstance(rows, (int, np.integer))
            index = range(len(self))[rows] if one else np.arange(len(self))[rows]   # of a slice, a mask, too
            for i, record in zip(np.atleast_1d(index), found if np.ndim(index) else [found]):
                if self.new[i] and zlib.crc32(np.ascontiguousarray(record)) != self.sums[i]:
                    raise InputError(f"{self.path}: row {i} is not what was written: damaged, or of another "
                                     "data set; convert it again")
            self.new[index] = False
        return found


def record_sums(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """CRC (n, 4) uint32 of each record of arrays of n rows, a column for each of SUMMED; 0: no array."""
    sums = np.zeros((len(next(iter(arrays.values()))), len(SUMMED)), np.uint32)
    for name, rows in arrays.items():
        rows = np.ascontiguousarray(rows, ARRAYS[name])
        sums[:, SUMMED.index(name)] = [zlib.crc32(row) for row in rows]
    return sums


def open_array(path: Path, dtype: type, shape: tuple) -> np.ndarray:
    """A .npy file, memory-mapped; InputError unless it has this type, this shape (a letter: any length)
    and exactly the bytes that its header announces."""
    if not path.exists():
        without = " (training with --masks none --xc 0 does without)" * (path.name == "masks.npy")
        raise InputError(f"{path}: missing; it is needed here{without}")
    with reading(path, ".npy array"):
        array = np.lib.format.open_memmap(path, "r")
        size = array.offset + array.nbytes
        if size != path.stat().st_size: raise ValueError(f"its header announces {size} bytes")
    if array.dtype != dtype: raise InputError(f"{path}: {array.dtype}; give {np.dtype(dtype)}")
    if array.ndim != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, array.shape)):
        raise InputError(f"{path}: shape {array.shape}; give ({', '.join(map(str, shape))})")
    return array


def read_meta(folder: Path) -> dict:
    """meta.json, optional fields filled in; InputError if it is missing, broken or of another format."""
    path = folder / "meta.json"
    if not path.exists():
        raise InputError(f"{folder}: no data set here (no meta.json); see `python data.py -h`")
    with reading(path, "JSON file"): meta = json.loads(path.read_text())
    if not isinstance(meta, dict): raise InputError(f"{path}: not a JSON object")
    missing = {"format", "name", "joints", "bones", "root", "depth_range"} - set(meta)
    if missing: raise InputError(f"{path}: lacks {', '.join(sorted(missing))}")
    if meta["format"] != FORMAT:
        raise InputError(f"{path}: format {str(meta['format'])[:60]}; this code reads {FORMAT}")
    check_fields(path, meta := {"margin": 1.25, "split": "", "origin": ""} | meta)
    return meta


def check_fields(path: Path, meta: dict) -> None:
    """InputError unless the fields of a meta.json, or of a checkpoint's skeleton, are what META says."""
    for key, (says, fits) in META.items():
        if key in meta and not fits(meta[key], meta["joints"]):
            raise InputError(f"{path}: {key} is {str(meta[key])[:60]}; give {says}")


def indices(value, joints: list) -> bool:
    """Whether `value` is a list of indices of the joints."""
    return isinstance(value, list) and all(type(i) is int and 0 <= i < len(joints) for i in value)


META = {  # field of meta.json: what it has to be, and whether it is; joints come first
    "joints": ("a list of names", lambda v, _: isinstance(v, list) and all(isinstance(n, str) for n in v)),
    "bones": ("pairs of indices of its joints", lambda v, joints: isinstance(v, list) and all(
        indices(bone, joints) and len(bone) == 2 for bone in v)),
    "root": ("an index of its joints", lambda v, joints: indices([v], joints or [0])),
    "compare": ("indices of its joints", lambda v, joints: v is None or indices(v, joints)),
    "depth_range": ("millimetres, up to 1e6", lambda v, _: type(v) in (int, float) and 0 < v <= 1e6),
    "margin": ("a number from 1 to 10", lambda v, _: type(v) in (int, float) and 1 <= v <= 10),
    "rows": ("their number", lambda v, _: type(v) is int),
    "protocol": ("words", lambda v, _: isinstance(v, str)),
    "crc": ("the arrays' checksums", lambda v, _: isinstance(v, dict) and all(type(c) is int
                                                                             for c in v.values()))}


class Writer:
    """Appends rows to a data-set folder: OUT.part until `finish`; opened after a kill, it goes on there."""

    def __init__(self, folder: str | Path, meta: dict):
        self.folder, self.part, self.files = Path(folder), Path(f"{Path(folder)}.part"), {}  # of "mine/" too
        self.meta = json.loads(json.dumps({"format": FORMAT} | meta))  # as it is read back
        if self.folder.exists(): raise InputError(f"{folder}: exists; remove it to make it again")
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            self.unlock = weakref.finalize(self, os.close, lock := os.open(self.part, os.O_RDONLY))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.part}: another process writes it; wait for that one") from error
        except OSError as error: raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
        path = self.part / "state.json"
        self.state = {"meta": self.meta, "jobs": 0, "order": 0, "rows": 0, "skipped": [], "crc": {},
                      "shape": {}}
        if path.exists():
            try: state = dict(json.loads(path.read_text()))
            except (ValueError, TypeError): state = {}
            if state.keys() != self.state.keys():
                raise InputError(f"{path}: broken, or of another version; remove {self.part}")
            self.state = state
        if self.state["meta"] != self.meta:
            raise InputError(f"{self.part}: was begun with other settings; give those again, or remove it")

    def open(self, name: str, shape: list[int]):
        """The file of one array with rows of `shape`, cut back to the rows that were saved."""
        path, dtype = self.part / f"{name}.npy", np.dtype(ARRAYS[name])
        file = open(path, "r+b" if path.exists() else "w+b")
        np.lib.format.write_array_header_1_0(  # numpy leaves room in it for the number of rows to grow
            file, {"descr": dtype.str, "fortran_order": False, "shape": (self.state["rows"], *shape)})
        size = file.tell() + self.state["rows"] * math.prod(shape) * dtype.itemsize
        if file.seek(0, os.SEEK_END) < size: raise InputError(f"{path}: has lost rows; remove {self.part}")
        file.truncate(size)
        file.seek(size)
        return file

    def append(self, arrays: dict[str, np.ndarray], skipped: list[str] = (), order: int = 0) -> None:
        """Rows of one job, arrays of the same length; `skipped` names the samples left out and why; `order`:
        checksum of the names of all jobs so far."""
        state, crc = self.state, dict(self.state["crc"])
        counts = {len(rows) for rows in arrays.values()} or {0}
        if arrays and len(counts) == 1: arrays = arrays | {"checksums": record_sums(arrays)}
        shape = {name: list(rows.shape[1:]) for name, rows in arrays.items()} or state["shape"]
        if len(counts) > 1 or (state["rows"] and shape != state["shape"]):
            raise InputError(f"{self.part}: rows {shape} ({counts}) after rows {state['shape']}: one data "
                             "set holds one kind of rows")
        for name, rows in arrays.items():
            if name not in self.files: self.files[name] = self.open(name, shape[name])
            data = np.ascontiguousarray(rows, ARRAYS[name]).tobytes()
            self.files[name].write(data)
            crc[name] = zlib.crc32(data, crc.get(name, 0))
        self.state = state | {"jobs": state["jobs"] + 1, "order": order, "crc": crc, "shape": shape,
                              "rows": state["rows"] + counts.pop(),
                              "skipped": state["skipped"] + list(skipped)}  # all or nothing

    def check_skipped(self, limit: float, final: bool = False) -> None:
        """InputError, with the commonest reason, once more than `limit` of the samples are left out."""
        skipped, kind = self.state["skipped"], lambda text: text.partition(": ")[2].partition(":")[0]
        seen = self.state["rows"] + len(skipped)
        too_many = len(skipped) > limit * seen and (final or seen >= 200)
        if not too_many and (self.state["rows"] or not final): return
        if not seen: raise InputError(f"{self.folder}: not one sample; mend the flags, remove {self.part}")
        (most, count), = collections.Counter(map(kind, skipped)).most_common(1)
        first = next(text for text in skipped if kind(text) == most)
        raise InputError(f"{self.folder}: {len(skipped)} of {seen} samples left out, {count} for {most!r} "
                         f"({first}). Mend it, remove {self.part}, run again")

    def save(self) -> None:
        for file in self.files.values(): file.flush(); os.fsync(file.fileno())
        write_json(self.part / "state.json", self.state)

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError): file.close()
        self.unlock()

    def finish(self) -> None:
        """Writes the final number of rows into the headers and gives the folder its name."""
        self.save()
        for file in self.files.values(): file.close()
        self.files = {name: self.open(name, shape) for name, shape in self.state["shape"].items()}
        for file in self.files.values(): file.flush(); os.fsync(file.fileno())
        counts = {k: self.state[k] for k in ("rows", "crc", "skipped")}
        write_json(self.part / "meta.json", self.meta | counts)
        os.replace(self.part, self.folder)
        (self.folder / "state.json").unlink()
        self.close()


def build_dataset(folder: str | Path, meta: dict, jobs, count: int, work, workers: int = 0,
                  images_a_job: int = 1, max_skipped: float = 0.05) -> None:
    """Write work(job) for every job, in order, to a data-set folder, on several processes.

    `jobs` is an iterable, of `count` jobs at most; few of them are held at a time. work(job) returns (arrays,
    skipped). The result does not depend on the number of workers, nor on how often it was interrupted: a
    killed run goes on from its last save, a few hundred rows back. InputError, naming the commonest reason,
    where more than `max_skipped` of the samples are left out: then not they are at fault.
    """
    writer, workers = Writer(folder, meta), workers or max(2, CORES)
    start = done = writer.state["jobs"]
    progress = Progress(f"{Path(folder).name}", count, images_a_job, start, every=5)
    jobs, order = iter(jobs), 0
    try:
        for job in itertools.islice(jobs, start): order = checksum_of_names(job, order)
        if order != writer.state["order"]:  # else some would come twice, and others never
            raise InputError(f"{writer.part}: was begun from other files: ROOT has changed since; remove it")
        for done, (job, (arrays, skipped)) in enumerate(ordered_results(work, jobs, workers), start + 1):
            order = checksum_of_names(job, order)
            writer.append(arrays, skipped, order)
            writer.check_skipped(max_skipped)
            if done % max(1, 512 // images_a_job) == 0: writer.save()
            progress.show(done)
        writer.check_skipped(max_skipped, final=True)
        progress.steps = done  # `count` may have been too many
        progress.show(done, final=True)
        writer.finish()
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError, InputError): writer.save()  # ValueError: closed already
        writer.close()
        if isinstance(error, OSError):
            raise InputError(f"{writer.part}: could not be written ({error})") from error
        raise


def checksum_of_names(job, before: int) -> int:
    """CRC of a job's name, or of its items' names, going on from that of the jobs `before`."""
    name = " ".join(map(str, job)) if isinstance(job, list) else str(job)
    return zlib.crc32(name.encode(errors="backslashreplace"), before)  # a file's name may be any bytes


def ordered_results(work, jobs, workers: int):
    """(job, work(job)) for each of an iterable of jobs, in order, computed ahead by several processes.

    One worker is this process itself. Of several, one that dies, in a C library as a rule, leaves an
    InputError that names the item of the job, or the job, that kills it.
    """
    if workers == 1: yield from ((job, work(job)) for job in jobs); return
    jobs, waiting = iter(jobs), collections.deque()                        # of (job, its future result)
    first = list(itertools.islice(jobs, workers))
    with process_pool(workers) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is the parent's
        waiting.extend((job, pool.submit(work, job)) for job in first)
        signal.signal(signal.SIGINT, handler)
        try:
            for job in jobs:
                waiting.append((job, pool.submit(work, job)))
                if len(waiting) < 4 * workers: continue
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
            while waiting: yield waiting[0][0], waiting[0][1].result(); waiting.popleft()
        except BrokenProcessPool as error:
            raise InputError(f"a worker process died at {culprit(work, [job for job, _ in waiting])}; mend "
                             "that, and the same command goes on where it stopped") from error
        finally:
            for _, future in waiting: future.cancel()


def process_pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Worker processes that start afresh and leave Ctrl-C to their parent."""
    return concurrent.futures.ProcessPoolExecutor(workers, SPAWN, quiet_worker)


def culprit(work, jobs: list) -> str:
    """The first of the jobs, or of their items if they are lists, that kills a process which does it alone.

    A pool does not tell which of its processes died, nor of what: so the jobs in question are done again.
    """
    alone = [[item] for job in jobs for item in job] if isinstance(jobs[0], list) else jobs
    with process_pool(1) as pool:
        for job in alone:
            if isinstance(pool.submit(work, job).exception(), BrokenProcessPool):
                return str(job[0] if isinstance(job, list) else job)
    return "none of its jobs when each is done alone (out of memory? give fewer --workers)"


def in_a_process(function, path: Path, *arguments):
    """function(path, *arguments) in a process of its own: a file that crashes it, or holds it up for
    READ_SECONDS, is an InputError."""
    mine, its = multiprocessing.Pipe(duplex=False)
    process = SPAWN.Process(target=answer, args=(its, function, path, *arguments), daemon=True)
    process.start()
    its.close()
    try:
        if not mine.poll(READ_SECONDS): raise InputError(f"{path}: not read in {READ_SECONDS} s: broken?")
        result = mine.recv()
    except (EOFError, OSError) as error:
        raise InputError(f"{path}: kills the process that reads it: broken? Download it again") from error
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception): raise result
    return result


def answer(pipe, function, *arguments) -> None:
    """The process of `in_a_process`: sends what the function returns or raises."""
    quiet_worker()
    limit_memory(MEMORY)
    try: result = function(*arguments)
    except Exception as error: result = error
    pipe.send(result)


def limit_memory(limit: int) -> int:
    """Give this process so many bytes at most: what a hostile file unpacks to is a MemoryError then. Returns
    the limit before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))  # -1: no limit
    return soft


def quiet_worker() -> None:
    """Start of a worker: Ctrl-C is the parent's to handle, one thread, and no life after the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))  # noqa: E731
    threading.Thread(target=watch, daemon=True).start()  # a killed parent cannot tell its workers to go


# ==========================================================================================================
# Batches
# ==========================================================================================================
@lru_cache(maxsize=4)
def epoch_permutation(count: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    """The order (count,) of an epoch. These 8 bytes an image, and CheckedArray's one, are all that grows."""
    return random_generator(seed, purpose, epoch).permutation(count)


def batch_rows(count: int, seed: int, purpose: str, step: int, batch: int) -> np.ndarray:
    """Rows (batch,) of global batch `step`: each of `count` once an epoch, in an order of (seed, epoch)."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([epoch_permutation(count, seed, purpose, int(p // count))[p % count] for p in places])


def prefetch(batches, device: torch.device):
    """The same batches, on CUDA made ahead. On a CPU one thread more than cores slows the others down
    (tests/benchmark.py measures it)."""
    return in_a_thread(batches, device) if device.type == "cuda" else iter(batches)


def in_a_thread(batches, device: torch.device):
    """The same batches; a thread prepares the next, three at most, while one is trained on. Its errors come
    through. On CUDA it works in a stream of its own: copies and augmentation overlap with training."""
    box: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item) -> None:
        while not stop.is_set():
            try: return box.put(item, timeout=0.1)
            except queue.Full: continue

    def work() -> None:
        try:
            with torch.cuda.stream(side):                                  # does nothing for None
                for item in batches:
                    put((item, side and side.record_event()))
                    if stop.is_set(): return
            put((None, StopIteration()))
        except BaseException as error: put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, event = box.get()
            if isinstance(event, StopIteration): return
            if isinstance(event, BaseException): raise event
            if event is not None: hand_over(item, event)
            yield item
    finally:
        stop.set()
        thread.join()  # a thread inside torch while Python shuts down would abort the process


def hand_over(item, event) -> None:
    """Let the current CUDA stream wait for `event`, and let it own the tensors of item, lists in lists."""
    torch.cuda.current_stream().wait_event(event)
    for part in item:
        if isinstance(part, Tensor): part.record_stream(torch.cuda.current_stream())
        elif part is not None: hand_over(part, event)


# ==========================================================================================================
# Augmentation (Sec. 7: rotation, translation, resize, colour jitter), on the batch, on the training device
# ==========================================================================================================
PARAMETERS = ("angle", "shift_x", "shift_y", "scale", "brightness", "contrast", "saturation",
              "red", "green", "blue")


def augmentation(rng: np.random.Generator, count: int, jitter: float, gain: float = 0.0) -> np.ndarray:
    """Random parameters (count, 10) in the order of PARAMETERS. not in the paper: the ranges (Sec. 7 gives
    none).

    Rotation +-30 degrees, translation +-10 % of the crop, scale 0.8-1.25; brightness, contrast and saturation
    1 +- jitter; channel gains 1 +- gain.
    """
    u = rng.uniform(-1, 1, (count, len(PARAMETERS)))
    columns = [np.deg2rad(30) * u[:, 0], 0.1 * u[:, 1], 0.1 * u[:, 2], 1.25 ** u[:, 3]]
    return np.stack(columns + [1 + jitter * u[:, i] for i in (4, 5, 6)]
                    + [1 + gain * u[:, i] for i in (7, 8, 9)], axis=1).astype(np.float32)


def no_augmentation(count: int) -> np.ndarray:
    """The parameters (count, 10) that change nothing: the centre of the stored crop."""
    return np.tile(np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1], np.float32), (count, 1))


def crop_transform(parameters: Tensor, stored: int, margin: float, side: int) -> Tensor:
    """Affine map A (B, 2, 3) from pixels of the stored crop to pixels of the network's crop of `side` px."""
    angle, shift, scale = parameters[:, 0], parameters[:, 1:3], parameters[:, 3]
    zoom = scale * side * margin / stored                                         # (B,) crop px per stored px
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)          # (B, 2, 2)
    centre = torch.full((len(parameters), 2, 1), (stored - 1) / 2, device=parameters.device)
    offset = (side - 1) / 2 + side * shift[..., None] - linear @ centre                           # (B, 2, 1)
    return torch.cat([linear, offset], dim=2)                                                     # (B, 2, 3)


def transform_points(A: Tensor, uv: Tensor) -> Tensor:
    """Pixels uv (B, K, 2) through A (B, 2, 3)."""
    return uv @ A[:, :, :2].transpose(1, 2) + A[:, None, :, 2]


def transform_intrinsics(A: Tensor, intrinsics: Tensor) -> Tensor:
    """Intrinsics (B, 3, 3) of the stored crop to those of the network's crop: A_3x3 K."""
    bottom = torch.tensor([[[0.0, 0.0, 1.0]]], device=A.device).expand(len(A), 1, 3)
    return torch.cat([A, bottom], dim=1) @ intrinsics


def warp(images: Tensor, A: Tensor, side: int) -> Tensor:
    """Stored crops (B, C, H, H) through A (B, 2, 3) to (B, C, side, side), bilinear; edge pixels repeat."""
    H, back = images.shape[-1], torch.linalg.inv_ex(A[:, :, :2])[0]        # (B, 2, 2) crop px -> stored px
    middle = back @ ((side - 1) / 2 - A[:, :, 2:])                  # (B, 2, 1) stored px of the crop's centre
    # grid_sample's own units, in both images: -1 .. 1 from the first pixel's outer edge to the last one's
    theta = torch.cat([back * (side / H), (2 * middle + 1) / H - 1], dim=2)              # (B, 2, 3)
    grid = F.affine_grid(theta, [len(A), 1, side, side], align_corners=False)            # (B, side, side, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1: channel gains and brightness g, contrast c, saturation s; clipped to 0..1.

    x1 = g x;  x2 = c (x1 - mean) + mean;  x3 = s (x2 - grey) + grey: a 3 x 3 matrix and an offset for each
    image, and so one matrix product instead of eight passes over the pixels.
    """
    B, _, H, W = images.shape
    gains = parameters[:, 4, None] * parameters[:, 7:10]                                 # (B, 3)
    contrast, saturation = parameters[:, 5, None, None], parameters[:, 6, None, None]    # (B, 1, 1)
    mean = (images.mean(dim=(2, 3)) * gains).mean(dim=1)[:, None, None]                  # (B, 1, 1)
    mix = saturation * torch.eye(3, device=images.device) + (1 - saturation) / 3         # (B, 3, 3)
    matrix, offset = mix * (contrast * gains[:, None]), mean * (1 - contrast)           # (B, 3, 3), (B, 1, 1)
    return torch.baddbmm(offset, matrix, images.reshape(B, 3, -1)).clamp_(0, 1).reshape(B, 3, H, W)


def normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 to the statistics that the encoder expects."""
    mean, std = (to_device(np.float32(v), images.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return torch.addcmul(-mean / std, images, 1 / std)


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`, clipped to 0..1."""
    mean, std = (to_device(np.float32(v), images.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (images * std + mean).clamp(0, 1)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array as a tensor on the device. On CUDA by way of pinned memory: a copy from elsewhere would
    wait for all that the stream was given before."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x


def read_rows(array: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows (B, ..) of a memory-mapped uint8 array as a tensor on the device.

    On CUDA by way of pinned memory, whose copy to the GPU does not wait; torch keeps it for the next batch.
    """
    if torch.device(device).type != "cuda": return torch.from_numpy(array[rows])
    pinned = torch.empty(len(rows), *array.shape[1:], dtype=torch.uint8, pin_memory=True)
    read_into(pinned.numpy(), array, rows)
    return pinned.to(device, non_blocking=True)


def read_into(buffer: np.ndarray, array: np.ndarray, rows: np.ndarray) -> None:
    """buffer[:] = array[rows], row by row: each is copied once, not twice, to memory that has its pages
    already, nearly twice as fast where a row is 320 x 320 px (tests/benchmark.py measures it)."""
    for place, row in zip(buffer, rows): place[...] = array[row]


def announce(array: np.ndarray, rows: np.ndarray) -> None:
    """Tell the system which rows of a memory-mapped array come next: it fetches those that are not in memory
    from the disk at once, not one after another, several times as fast (tests/benchmark.py measures it)."""
    array = getattr(array, "array", array)                                               # of `CheckedArray`
    if not isinstance(array, np.memmap): return
    size = array[0].nbytes
    for row in rows:
        end = array.offset + (int(row) + 1) * size
        start = (end - size) // mmap.PAGESIZE * mmap.PAGESIZE
        array.base.madvise(mmap.MADV_WILLNEED, start, end - start)


def load_images(dataset: Dataset, rows: np.ndarray, device: torch.device,
                masks: np.ndarray | None = None) -> Tensor:
    """Rows of the stored images as (B, 3, H, H) in 0..1, or with `masks` (n, H, H) as a fourth channel."""
    announce(dataset.images, rows)
    if masks is not None: announce(masks, rows)
    x = read_rows(dataset.images, rows, device).permute(0, 3, 1, 2)
    if masks is not None: x = torch.cat([x, read_rows(masks, rows, device)[:, None]], dim=1)
    return x.float() / 255                                                               # (B, 3 or 4, H, H)


def crops(dataset: Dataset, rows: np.ndarray, parameters: np.ndarray, side: int, device: torch.device,
          masks: np.ndarray | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Augmented crops: images (B, 3, side, side) in 0..1, masks (B, 1, side, side) or None, A (B, 2, 3)."""
    p = to_device(parameters, device)
    A = crop_transform(p, dataset.images.shape[1], dataset.meta["margin"], side)
    x = warp(load_images(dataset, rows, device, masks), A, side)
    return colour_jitter(x[:, :3], p), None if masks is None else x[:, 3:], A


def labels_of(dataset: Dataset, rows: np.ndarray, A: Tensor) -> tuple[Tensor, Tensor]:
    """Labels in the network's crop: uv (B, K, 2) px, depth (B, K) mm from the root; NaN: not labelled."""
    keypoints = to_device(dataset.keypoints[rows], A.device)                            # (B, K, 3) mm, camera
    keypoints = torch.where(keypoints[..., 2:] > 0, keypoints, torch.nan)             # none behind the camera
    intrinsics = to_device(dataset.intrinsics[rows], A.device)                           # (B, 3, 3)
    uv = transform_points(A, project(keypoints, intrinsics))                             # (B, K, 2) px
    root = dataset.meta["root"]
    return uv, keypoints[..., 2] - keypoints[:, root:root + 1, 2]


def same_skeleton(dataset: Dataset, skeleton: dict, whose: str = "the model") -> None:
    """InputError unless the data set's joints, root and depth range are those of `whose` skeleton."""
    theirs, ours = dataset.meta["joints"], skeleton["joints"]
    if len(theirs) != len(ours):
        raise InputError(f"{dataset.folder}: {len(theirs)} joints, not {len(ours)} as {whose}")
    for key in ("joints", "root", "depth_range"):
        if dataset.meta[key] != skeleton[key]:
            found, known = dataset.meta[key], skeleton[key]
            raise InputError(f"{dataset.folder}: {key} is {found}, not {known} as {whose}")


def say_if_enlarged(datasets: list[Dataset | None], side: int) -> None:
    """Name those whose stored crops hold fewer pixels than the network's crop of `side` px asks for."""
    for dataset in filter(None, datasets):
        there = round(dataset.images.shape[1] / dataset.meta["margin"])
        if there < side: print(f"{dataset.folder}: crops of {there} px are enlarged to {side}", flush=True)


def with_root(dataset: Dataset) -> np.ndarray:
    """The rows of a labelled data set whose root is labelled: of others nothing says how far away they are.
    InputError where there is none."""
    root = dataset.meta["root"]
    rows = np.flatnonzero(np.isfinite(np.array(dataset.keypoints)[:, root]).all(axis=1))
    if len(rows): return rows
    raise InputError(f"{dataset.folder}/keypoints.npy: no image has a label of the root, "
                     f"{dataset.meta['joints'][root]}; errors are measured from it")


def compared(meta: dict) -> list[int]:
    """Joints over which errors are averaged: `compare` of meta.json; else all, for humans without the
    root, whose error is 0 by definition; for hands with it, as is customary for EPE."""
    body = meta["joints"] == HUMAN_JOINTS
    return meta.get("compare") or [i for i in range(len(meta["joints"])) if not body or i != meta["root"]]


def predict(estimator, dataset: Dataset, rows: np.ndarray, side: int, device,
            dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Predicted and true keypoints (B, K, 3) mm, camera frame of the crop, with the root's true depth.

    not in the paper: heatmaps give pixels and depth from the root; the crop's intrinsics and the root's true
    depth turn them into millimetres, as 3D-heatmap methods do. Errors are root-aligned, so that depth only
    scales x, y.
    """
    images, _, A = crops(dataset, rows, no_augmentation(len(rows)), side, device)
    with autocast(A.device, dtype): centres = estimator.centres(normalise(images))      # (B, K, 3) voxels
    uv, depth = from_voxels(centres, side, dataset.meta["depth_range"], estimator.head.side)
    truth = to_device(dataset.keypoints[rows], device)                                  # (B, K, 3) mm, camera
    intrinsics = transform_intrinsics(A, to_device(dataset.intrinsics[rows], device))
    root = dataset.meta["root"]
    return back_project(uv, truth[:, root:root + 1, 2] + depth, intrinsics), truth


def chunks(count: int) -> list[np.ndarray]:
    """Rows 0..count-1 in pieces of at most 100."""
    return np.array_split(np.arange(count), -(-count // 100))


def open_masks(path: str | Path, dataset: Dataset) -> np.ndarray:
    """Masks (n, H, H) uint8 of a data set in a file of their own: f^S's lie in the run."""
    return open_array(Path(path), np.uint8, dataset.images.shape[:3])


# ==========================================================================================================
# The embedded benchmark: hands and bodies rendered by round cones, in two domains
# ==========================================================================================================
MARGIN = 1.25  # the stored crop: so many times the network's, which is "box" times the joints' box
HAND_JOINTS = ["wrist"] + [f"{name}_{i}" for name in ("thumb", "index", "middle", "ring", "little")
                           for i in (1, 2, 3, 4)]                          # a finger: palm -> tip
HAND_BONES = [(0 if i % 4 == 1 else i - 1, i) for i in range(1, 21)]       # (parent, child)
HAND = {"joints": HAND_JOINTS, "bones": HAND_BONES, "root": 0, "depth_range": 300.0, "box": 1.5}
HUMAN_JOINTS = ["pelvis", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
                "spine", "thorax", "nose", "head", "left_shoulder", "left_elbow", "left_wrist",
                "right_shoulder", "right_elbow", "right_wrist"]             # in Human3.6M's order
HUMAN_BONES = list(zip((0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15), range(1, 17)))  # (parent, child)
HUMAN = {"joints": HUMAN_JOINTS, "bones": HUMAN_BONES, "root": 0, "depth_range": 2000.0, "box": 1.25}

# The hand at rest, one row a finger: the back of a right hand faces the camera, fingers up (-y), thumb left
# (-x), palm away (+z). First joint and bones in mm (wrist to middle fingertip: 184); angles in degrees.
KNUCKLES = np.float32([[-21, -20, 8], [-23, -86, 0], [-2, -90, -4], [17, -84, -2], [33, -75, 3]])
PHALANGES = np.float32([[44, 32, 25], [41, 25, 20], [45, 28, 21], [42, 27, 21], [33, 20, 19]])
STRAIGHT = np.float32([[0, -5, -8]] + 4 * [[-10, 4, 0]])                   # flexion of the joints, open hand
FIST = np.float32([[0, 42, 55]] + 4 * [[72, 96, 0]])                       # the same closed; DIP follows PIP
WOBBLE = np.float32([[6, 8, 12]] + 4 * [[10, 12, 6]])                      # standard deviation about both
LIMITS = np.float32([[[-10, -10, -15]] + 4 * [[-15, 0, 0]], [[15, 55, 75]] + 4 * [[80, 100, 65]]])
SPREAD = np.float32([[-36, -7, 0, 6, 13], [7, 5, 4, 4, 5]])                # in the palm's plane: mean, sd
LIFT = np.float32([[22, 0, 0, 0, 0], [6, 0, 0, 0, 0]])                     # out of it: the thumb alone
BEND = np.float32([[0.85, -0.25, 0.45]] + 4 * [[0, 0, 1]])                 # to the palm; the thumb across it
RADII = np.float32([[13, 10.5, 9.2, 7.2], [10.2, 8.6, 7.4, 6.2], [10.4, 8.9, 7.6, 6.3], [9.8, 8.4, 7.2, 6],
                    [9, 7.3, 6.2, 5.3]])                                   # mm, at the joints

# Points that only the drawing needs follow the 21 joints, in this order; then (from, to, radii mm, what).
CARPUS, PALM, WEB, ARM, NAIL = 21, 24, 28, 30, 36
SKIN, HORN, CLOTH = range(3)
HAND_CONES = [
    (4 * f + k, 4 * f + k + 1, *RADII[f, k - 1:k + 1], SKIN) for f in range(5) for k in (1, 2, 3)] + [
    (CARPUS, PALM, 18, 16.5, SKIN), (CARPUS + 1, PALM + 1, 18, 17, SKIN), (WEB, WEB + 1, 9, 11, SKIN),
    (CARPUS + 1, PALM + 2, 18, 16.5, SKIN), (CARPUS + 2, PALM + 3, 18, 15.5, SKIN), (2, PALM, 6, 8, SKIN),
    (CARPUS, 1, 15, 13, SKIN), (CARPUS, ARM, 18, 19, SKIN), (CARPUS + 2, ARM + 1, 18, 19, SKIN),
    (ARM, ARM + 2, 19, 22, CLOTH), (ARM + 1, ARM + 3, 19, 22, CLOTH),
    (ARM + 2, ARM + 4, 22, 29, CLOTH), (ARM + 3, ARM + 5, 22, 29, CLOTH),
] + [(NAIL + f, NAIL + 5 + f, 0.63 * RADII[f, 3], 0.55 * RADII[f, 3], HORN) for f in range(5)]
FINE = 2            # samples per stored pixel and axis
GROUP = 32          # hands or bodies drawn together: few enough for the processor's cache

# The body at rest, 1655 mm tall: standing, arms down, facing the camera, so that its right is at -x, its
# front at -z. A part turns about a joint, in the frame of the part before. A point: its part, mm from there.
BASIN, WAIST, CHEST, HEAD, THIGH, SHIN, FOOT, UPPER_ARM, FOREARM = range(9)  # right side; + 5: the left
PIVOT = [0, 0, 7, 8, 1, 2, 3, 14, 15, 4, 5, 6, 11, 12]                     # joint that a part turns about
SKULL, HIPS, ENDS = 17, 22, 34  # what only the drawing needs follows the joints: head; right and left; cuffs
BODY = np.zeros((34, 4), np.float32)
BODY[[0, 7, 8, 9, 10, *range(SKULL, HIPS)]] = [                            # the middle
    (BASIN, 0, 0, 0), (WAIST, 0, -225, 8), (CHEST, 0, -250, 8), (HEAD, 0, -140, -105), (HEAD, 0, -250, -20),
    (HEAD, 0, -165, -22), (HEAD, 0, -105, -60), (HEAD, 0, -105, -8),       # skull, chin, neck
    (HEAD, 0, -190, -4), (HEAD, 0, -100, 16)]                              # hair: crown, nape
LEFT, RIGHT = [4, 5, 6, 11, 12, 13, *range(HIPS + 6, ENDS)], [1, 2, 3, 14, 15, 16, *range(HIPS, HIPS + 6)]
BODY[RIGHT] = [
    (BASIN, -110, 5, 0), (THIGH, 0, 430, 0), (SHIN, 0, 415, 0),            # hip, knee, ankle
    (CHEST, -165, -225, 5), (UPPER_ARM, 0, 290, 0), (FOREARM, 0, 255, 0),  # shoulder, elbow, wrist
    (BASIN, -70, 15, 8), (WAIST, -50, -150, 0), (CHEST, -58, -165, -4),    # flank: hip, waist, breast
    (FOOT, 0, 45, 35), (FOOT, 0, 55, -135), (FOREARM, 0, 345, -8)]         # heel, toes, knuckles
BODY[LEFT] = BODY[RIGHT] * np.float32([1, -1, 1, 1])
BODY[LEFT, 0] += 5 * (BODY[LEFT, 0] >= THIGH)

# Degrees, a row an activity, mean and standard deviation: flexion, abduction, turning out of the hip, flexion
# of the knee; the same of shoulder and elbow; swing of the limbs in walking; lean of the trunk.
ACTIVITIES = np.float32([
    [[2, 4, 8, 4, 4, 8, 0, 20, 0, 1], [4, 3, 8, 4, 10, 6, 12, 15, 5, 3]],              # standing
    [[4, 2, 6, 14, 0, 7, 0, 28, 26, 5], [4, 2, 6, 6, 6, 5, 10, 14, 8, 4]],             # walking
    [[2, 5, 8, 5, 28, 16, 0, 75, 0, 2], [5, 4, 8, 5, 22, 14, 20, 30, 6, 4]],           # talking
    [[4, 6, 8, 12, 70, 25, 0, 22, 12, 10], [10, 5, 8, 12, 45, 25, 20, 18, 12, 12]],   # reaching
    [[2, 6, 8, 4, 150, 20, 0, 30, 0, -2], [5, 5, 8, 5, 20, 15, 20, 30, 8, 5]],         # arms up
    [[88, 10, 4, 85, 32, 12, 0, 55, 0, -4], [10, 8, 8, 16, 18, 8, 15, 25, 0, 8]],      # sitting
    [[70, 15, 8, 112, 50, 14, 0, 45, 4, 28], [12, 8, 8, 14, 22, 10, 15, 25, 6, 8]]])   # crouching
JOINT_LIMITS = np.float32([[-20, -4, -25, 0, -45, 2, -45, 0], [120, 45, 40, 140, 175, 120, 60, 145]])

HAIR, SHIRT, SLEEVE, TROUSERS, LEG, SHOES = range(CLOTH, CLOTH + 6)
HUMAN_CONES = [(SKULL, SKULL + 1, 80, 50, SKIN), (8, SKULL + 2, 50, 46, SKIN), (14, 11, 44, 44, SHIRT),
               (SKULL + 3, SKULL + 4, 70, 48, HAIR), (HIPS, HIPS + 6, 80, 80, TROUSERS)] + [
    cone for flank, end, hip, shoulder in ((HIPS, ENDS, 1, 14), (HIPS + 6, ENDS + 4, 4, 11)) for cone in (
        (flank, flank + 1, 80, 74, TROUSERS), (flank + 1, flank + 2, 76, 84, SHIRT),
        (flank + 2, shoulder, 80, 46, SHIRT), (hip, end, 76, 58, TROUSERS), (end, end + 1, 60, 52, LEG),
        (end + 1, hip + 2, 52, 38, SKIN), (hip + 2, flank + 3, 38, 34, SKIN),
        (flank + 3, flank + 4, 34, 30, SHOES), (shoulder, end + 2, 44, 38, SHIRT),
        (end + 2, end + 3, 40, 36, SLEEVE), (end + 3, shoulder + 2, 36, 27, SKIN),
        (shoulder + 2, flank + 5, 29, 24, SKIN))]

# Every choice of appearance. Colours are 0..255, a pair (a, b) is a uniform range, angles are in degrees, and
# lengths in parts of the image's side, so that a domain looks alike at any resolution.
DOMAINS = {
    "source": dict(
        roll=(-40, 40), pitch=(-22, 22), yaw=(-22, 22), glove=0, gloves=[(0, 0, 0)], sleeve=0.15,
        skin=[(236, 192, 166), (220, 166, 136), (196, 138, 108), (240, 204, 184)], skin_jitter=0.03,
        light_angle=(0, 30), light=(0.42, 0.58), light_tint=0.02, ambient=(0.40, 0.48), shine=(0.0, 0.10),
        wall=[(70, 160, 90), (60, 90, 150), (200, 200, 200), (120, 120, 125), (225, 205, 150), (40, 45, 55),
              (150, 80, 80), (110, 150, 165), (235, 235, 230), (120, 100, 75)], wall_jitter=0.10,
        clouds=(0.0, 0.07), grain=(0.0, 0.012), busy=0.5, shapes=3, shape_chance=0.8, shape_size=(0.15, 0.45),
        shape_soft=(0.02, 0.15), shape_colour=0.6, stripes=0.0, limbs=0,
        blur=(0.0, 0.006), noise=(0.0, 0.012), gamma=(0.92, 1.08), contrast=(0.92, 1.05), balance=0.015),
    "target": dict(
        roll=(-28, 52), pitch=(-25, 25), yaw=(-25, 25), sleeve=0.35, skin_jitter=0.06,
        glove=0.06, gloves=[(40, 60, 130), (150, 35, 40), (45, 45, 45), (210, 200, 60)],
        skin=[(112, 74, 54), (84, 54, 40), (148, 98, 72), (250, 226, 214), (222, 138, 118), (190, 112, 92)],
        light_angle=(25, 65), light=(0.6, 0.95), light_tint=0.14, ambient=(0.25, 0.42), shine=(0.05, 0.3),
        wall=[(150, 110, 80), (90, 105, 80), (170, 150, 130), (60, 70, 100), (100, 60, 50), (190, 180, 165)],
        wall_jitter=0.20, clouds=(0.06, 0.16), grain=(0.015, 0.06), busy=1, shapes=5, shape_chance=0.75,
        shape_size=(0.06, 0.30), shape_soft=(0.004, 0.03), shape_colour=0.9, stripes=0.35,
        limbs=2, limb_chance=0.5, limb_aspect=(0.1, 0.35),
        blur=(0.003, 0.014), noise=(0.01, 0.04), gamma=(0.75, 1.35), contrast=(0.7, 1.1), balance=0.07),
}
DOMAINS["target_shifted"] = dict(  # the target once more, as no training image shows it
    DOMAINS["target"], glove=0.08, gloves=[(30, 110, 80), (190, 110, 160), (235, 235, 235)],
    wall=[(60, 110, 120), (180, 90, 50), (110, 120, 60), (140, 90, 130), (205, 190, 170)],
    light_angle=(35, 75), light_tint=0.20, clouds=(0.03, 0.12), grain=(0.03, 0.07), shapes=7,
    shape_size=(0.04, 0.20), stripes=0.7, limbs=1, limb_aspect=(0.2, 0.5), balance=0.10)
# Bodies turn to the camera, more or less: at 48 px a few pixels of face are all that tells front from back,
# and a small model that has to do so exchanges left and right in four images of ten.
CLOTHES = dict(  # sleeves end at 0 the shoulder, 1 the elbow, 2 the wrist; trousers' legs alike
    shirt=[(225, 225, 225), (130, 130, 140), (60, 80, 130), (45, 45, 50), (150, 60, 60)], sleeve=(0.4, 1.9),
    trousers=[(55, 70, 110), (45, 45, 50), (170, 155, 125)], leg=(0.6, 2.4), cloth_jitter=0.08, pattern=0.0,
    shoes=[(40, 40, 45), (225, 225, 225), (100, 70, 50)], hair=[(40, 30, 25), (90, 60, 40), (190, 160, 110)],
    roll=(-8, 8), pitch=(-8, 15), yaw=(-60, 60), floor=[(150, 140, 130), (110, 90, 70), (90, 90, 95)])
OTHER_CLOTHES = dict(
    shirt=[(200, 60, 50), (230, 180, 60), (60, 140, 90), (60, 120, 190), (150, 80, 160), (235, 235, 225),
           (40, 40, 45)], sleeve=(0.2, 1.9), cloth_jitter=0.2, pattern=0.5,
    trousers=[(90, 100, 70), (120, 60, 50), (200, 190, 180), (50, 60, 80), (30, 30, 35)], leg=(0.3, 2.2),
    shoes=[(200, 60, 60), (60, 90, 160), (230, 230, 230), (60, 50, 40)],
    hair=[(25, 20, 20), (150, 150, 150), (150, 80, 45), (230, 205, 150)],
    decoys=[(200, 60, 50), (60, 120, 190), (120, 60, 50), (148, 98, 72), (250, 226, 214), (50, 60, 80)],
    roll=(-12, 12), pitch=(0, 30), yaw=(-30, 90),
    floor=[(100, 110, 70), (140, 110, 90), (80, 70, 90), (180, 170, 150)])
CLUTTER = "clouds grain busy shape_chance shape_size shape_soft shape_colour stripes limb_chance".split()


def calmed(look: dict, share: float) -> dict:
    """A domain whose scenery is cluttered only `share` of the way from the source's; its colours stay."""
    calm = DOMAINS["source"] | {"limb_chance": 0.0}
    between = {key: np.asarray(calm[key]) * (1 - share) + np.asarray(look[key]) * share for key in CLUTTER}
    shapes = round(calm["shapes"] * (1 - share) + look["shapes"] * share)
    return look | {key: value.tolist() for key, value in between.items()} | {"shapes": shapes}


# A body is thinner than a hand, and covers half of its area: hands' clutter would hide it. With a third of it
# f^S, trained on the source, keeps as much of its IoU as on hands, nine tenths.
HUMAN_DOMAINS = {
    "source": DOMAINS["source"] | CLOTHES, "target": calmed(DOMAINS["target"], 1 / 3) | OTHER_CLOTHES,
    "target_shifted": calmed(DOMAINS["target_shifted"], 1 / 3) | OTHER_CLOTHES | dict(
        shirt=[(240, 130, 170), (120, 200, 190), (110, 110, 60), (90, 60, 120), (240, 240, 120)], pattern=0.7,
        trousers=[(160, 140, 60), (70, 110, 120), (130, 130, 140)], roll=(-15, 15), pitch=(5, 40))}
SCENERY = "wall clouds grain busy shapes shape stripes limbs limb decoys floor".split()   # as settings begin


def mix(figure: dict, scene: dict) -> dict:
    """A domain with the figures, light and camera of one and the scenery of another: half of their gap."""
    return {k: v for k, v in figure.items() if k.split("_")[0] not in SCENERY} | {
        k: v for k, v in scene.items() if k.split("_")[0] in SCENERY}


for looks in DOMAINS, HUMAN_DOMAINS:
    looks |= {"figure": mix(looks["target"], looks["source"]),
              "scenery": mix(looks["source"], looks["target"])}
UNCONSTRAINED = dict(
    skin=[(232, 190, 165), (200, 140, 110), (150, 100, 75), (100, 66, 50), (215, 130, 110)], skin_chance=0.35,
    shapes=5, shape_chance=0.6, shape_size=(0.05, 0.5), shape_aspect=(0.12, 1.0), shape_soft=(0.004, 0.08),
    stripes=0.25, blur=(0.0, 0.012), noise=(0.0, 0.03), gamma=(0.8, 1.25), contrast=(0.75, 1.1), balance=0.05)


def uniform(rng, limits, *shape):
    """Uniform float32 numbers of `shape` within limits = (low, high)."""
    return np.float32(limits[0]) + np.float32(limits[1] - limits[0]) * rng.random(shape, np.float32)


def normal(rng, spread, *shape):
    """Gaussian float32 numbers of `shape`, cut at two standard deviations: no monsters in the tails."""
    return np.clip(rng.standard_normal(shape, np.float32), -2, 2) * np.float32(spread)


def pick(rng, palette, jitter, count):
    """Colours (count, 3) in 0..1, one of the palette each: brightness jittered, hue a third as much."""
    colour = np.float32(palette)[rng.integers(len(palette), size=count)] / 255
    return np.clip(colour * (1 + normal(rng, jitter, count, 1)) + normal(rng, jitter / 3, count, 3), 0, 1)


def sample_angles(rng, count):
    """Flexion (B, 5, 3), spread (B, 5) and lift (B, 5) of the fingers, rad, within joint limits. The curl of
    the whole hand and that of each finger are mixed; in three of ten hands every finger is on its own."""
    own, whole = rng.random((count, 5), np.float32), rng.beta(1.0, 1.7, (count, 1)).astype(np.float32)
    curl = np.where(rng.random((count, 1)) < 0.3, own, 0.75 * whole + 0.25 * own)[..., None]  # (B, 5, 1)
    flexion = STRAIGHT + (FIST - STRAIGHT) * curl + WOBBLE * normal(rng, 1, count, 5, 3)
    flexion[:, 1:, 2] += 0.6 * flexion[:, 1:, 1]                           # one tendon bends both
    fan = SPREAD[1] * normal(rng, 1, count, 5) + 0.4 * SPREAD[0] * normal(rng, 1, count, 1)
    spread = SPREAD[0] + fan * (1 - 0.8 * curl[..., 0])                    # a fist cannot spread
    lift = LIFT[0] * (0.7 + 0.6 * curl[..., 0]) + LIFT[1] * normal(rng, 1, count, 5)
    return np.radians(np.clip(flexion, *LIMITS)), np.radians(spread), np.radians(lift)


def sample_fingers(rng, count):
    """Forward kinematics: joints (B, 5, 4, 3) mm and the way each last bone bends, (B, 5, 3). Flexion adds up
    along a finger, in the plane of its directions `forward` and `bend`; each bone's length varies by 5 %."""
    flexion, spread, lift = sample_angles(rng, count)
    forward = np.stack([np.sin(spread) * np.cos(lift), -np.cos(spread) * np.cos(lift), np.sin(lift)], -1)
    bend = BEND - (forward * BEND).sum(-1, keepdims=True) * forward        # (B, 5, 3), now normal to it
    bend = (bend / np.linalg.norm(bend, axis=-1, keepdims=True))[:, :, None]
    total, forward = np.cumsum(flexion, -1)[..., None], forward[:, :, None]  # (B, 5, 3, 1), (B, 5, 1, 3)
    lengths = PHALANGES * (1 + normal(rng, 0.05, count, 5, 3))
    bones = (np.cos(total) * forward + np.sin(total) * bend) * lengths[..., None]  # (B, 5, 3, 3) mm
    base = (KNUCKLES * (1 + normal(rng, 0.05, count, 5, 1)))[:, :, None]
    inward = np.cos(total) * bend - np.sin(total) * forward                # (B, 5, 3, 3)
    return np.concatenate([base, base + np.cumsum(bones, 2)], 2), inward[:, :, 2]


def sample_forearm(rng, count):
    """Cuff, middle and elbow end, thumb side and little finger's side of each: (B, 6, 3) mm, wrist at 0."""
    swing, drop = np.radians(normal(rng, 10, 2, count))
    along = np.stack([np.sin(swing), np.cos(swing) * np.cos(drop), np.sin(drop)], -1)[:, None]  # (B, 1, 3)
    across = np.stack([np.cos(swing), -np.sin(swing), 0 * swing], -1)[:, None]
    reach = uniform(rng, (25, 70), count, 1, 1) + np.float32([0, 0, 70, 70, 230, 230])[:, None]  # (B, 6, 1)
    return along * reach + across * np.float32([-8, 8, -8, 8, -10, 10])[:, None] + np.float32([0, 0, 8])


def sample_hand(rng, count):
    """Random right hands, wrist at 0 -> points (B, P, 3) mm: 21 joints, then what only the drawing needs; and
    girth (B,), the factor of all radii."""
    digits, inward = sample_fingers(rng, count)                            # (B, 5, 4, 3), (B, 5, 3) mm
    wrist = np.zeros((count, 1, 3), np.float32)
    carpus = wrist + np.float32([[-10, -3, 6], [0, -3, 6], [10, -3, 6]])
    palm = digits[:, 1:, 0] * np.float32([0.82, 0.93, 1]) + np.float32([0, 0, 6])  # under the knuckles
    web = np.stack([digits[:, 0, :2].mean(1), digits[:, 1, 0] * 0.6 + np.float32([0, 0, 4])], 1)
    bone, out = digits[:, :, 3] - digits[:, :, 2], inward * -RADII[:, 3:]
    nails = np.concatenate([digits[:, :, 2] + 0.5 * bone + 0.72 * out, digits[:, :, 3] + 0.6 * out], 1)
    parts = [wrist, digits.reshape(count, 20, 3), carpus, palm, web, sample_forearm(rng, count), nails]
    size = 1 + normal(rng, 0.05, count)
    return np.concatenate(parts, 1) * size[:, None, None], size * (1 + normal(rng, 0.05, count))


def sample_stance(rng, count):
    """Flexion, abduction and turning out of the 14 parts of a body, rad, (B, 14, 3), within joint limits: an
    activity's mean and deviation, of which both sides share a part; in walking, left and right swing."""
    activity = rng.integers(len(ACTIVITIES), size=count)
    mean, sd = ACTIVITIES[activity].transpose(1, 0, 2)[:, :, None]         # (B, 1, 10) each
    drawn = mean + sd * (normal(rng, 0.6, count, 1, 10) + normal(rng, 0.8, count, 2, 10))  # (B, 2, 10)
    phase = uniform(rng, (0, 2 * np.pi), count, 1) + np.float32([0, np.pi])  # (B, 2)
    stride, lean = drawn[:, :1, 8], drawn[:, 0, 9]
    drawn[..., 0] += lean[:, None] + stride * np.sin(phase)                # legs stand where the trunk leans
    drawn[..., 3] += 1.3 * abs(stride) * np.maximum(np.cos(phase), 0)      # the knee bends on the way forward
    drawn[..., 4] -= 0.8 * stride * np.sin(phase)
    limbs = np.clip(drawn[..., :8], *JOINT_LIMITS)                         # (B, 2, 8)
    stance = np.zeros((count, 14, 3), np.float32)
    stance[:, :4] = normal(rng, 1, count, 4, 3) * np.float32([[0, 2, 0], [5, 5, 7], [5, 5, 7], [10, 6, 25]])
    stance[:, :3, 0] -= lean[:, None] * np.float32([1, 0.3, 0.3])
    for side, thigh in enumerate((THIGH, THIGH + 5)):
        stance[:, thigh], stance[:, thigh + 3] = limbs[:, side, :3], limbs[:, side, 4:7]
        stance[:, thigh + 1, 0], stance[:, thigh + 4, 0] = -limbs[:, side, 3], limbs[:, side, 7]
        level = lean - limbs[:, side, 0] + limbs[:, side, 3]               # the ankle bends to level the foot
        stance[:, thigh + 2, 0] = np.clip(level, -45, 30)
    return np.radians(stance)


def sample_body(rng, count):
    """Forward kinematics of random bodies, pelvis at 0, as `sample_hand`: points (B, 34, 3) mm, girth (B,).
    Flexion moves a hanging limb forward; left abduction and turning out are the mirror image of the right."""
    angles = sample_stance(rng, count).transpose(2, 0, 1)                  # (3, B, 14)
    angles[1:, :, :9] *= -1
    # rotation() is Rz Rx Ry of its angles; with the axes in reverse, Rx Rz Ry of the negative ones
    turn = rotation(*angles.reshape(3, -1)).reshape(count, 14, 3, 3)[..., ::-1, ::-1]
    size = 1 + normal(rng, 0.035, count, 14)
    size[:, 9:] = size[:, 4:9]                                             # both sides are equally long
    part, rest = BODY[:, 0].astype(int), BODY[:, 1:]
    rest = rest * size[:, part, None]                                      # (B, 34, 3) mm
    frames, points = turn.copy(), np.zeros((count, 34, 3), np.float32)
    for p, pivot in enumerate(PIVOT):
        if p: frames[:, p] = frames[:, part[pivot]] @ turn[:, p]
        own = np.flatnonzero(part == p)
        points[:, own] = points[:, pivot, None] + rest[:, own] @ frames[:, p].transpose(0, 2, 1)
    stature = uniform(rng, (1500, 1950), count) / 1655
    return points * stature[:, None, None], stature * (1 + normal(rng, 0.1, count))


def rotation(roll, pitch, yaw):
    """Matrices (B, 3, 3) = Rz(roll) Rx(pitch) Ry(yaw), radians: roll turns the picture, the others tilt."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    rows = [[cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy],
            [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy], [-cp * sy, sp, cp * cy]]
    return np.array(rows, np.float32).transpose(2, 0, 1)                   # (B, 3, 3)


def place(rng, points, joints, distance, look):
    """Points (B, P, 3) mm -> camera frame: turned as the domain's viewpoints say, the mean of the `joints`
    first ones at a depth within `distance` mm, up to 11 degrees off the optical axis in x and in y."""
    count = len(points)
    angles = [np.radians(uniform(rng, look[key], count)) for key in ("roll", "pitch", "yaw")]
    depth = uniform(rng, distance, count, 1)
    centre = np.concatenate([uniform(rng, (-0.2, 0.2), count, 2) * depth, depth], 1)  # (B, 3) mm
    points = points @ rotation(*angles).transpose(0, 2, 1)
    return points + (centre - points[:, :joints].mean(1))[:, None]            # (B, P, 3) mm, camera


def crop_intrinsics(joints, side, box):
    """Pinhole (B, 3, 3) in stored pixels for joints (B, K, 3) mm. The wide picture's focal length cancels:
    the square around the joints, seen on the plane z = 1, fills 1 / (box * MARGIN) of the stored image."""
    flat = joints[..., :2] / joints[..., 2:]
    low, high = flat.min(1), flat.max(1)                                   # (B, 2)
    focal = side / (box * MARGIN * (high - low).max(1))
    matrix = focal[:, None, None] * np.float32(np.diag([1, 1, 0])) + np.float32(np.diag([0, 0, 1]))
    matrix[:, :2, 2] = (side - 1) / 2 - focal[:, None] * (low + high) / 2  # pixel centres are integers
    return matrix                                                          # (B, 3, 3)


def cone_surface(ends, radii, depths, x, y):
    """A round cone (capsule of two radii) in each image, seen on the pixels x (B, 1, w), y (B, w, 1): ends
    (B, 2, 2) px, radii (B, 2) px, depths (B, 2) px -> cover (B, w, w) 0..1, and of the visible surface depth
    (B, w, w) px and normal x and y. e is the distance to the axis of length L on the image, t runs along it.
    The outline lies beside the nearest t; what is seen sqrt(r^2 - e^2) dz / (L sqrt(L^2 + dz^2)) before."""
    start = np.concatenate([ends, radii[..., None], depths[..., None]], 2).transpose(1, 2, 0)[..., None, None]
    (x0, y0, r, z), (dx, dy, dr, dz) = start[0], start[1] - start[0]       # (B, 1, 1) each
    dx = np.where(dx ** 2 + dy ** 2 < 1e-3, np.float32(0.04), dx)          # L is never 0
    square = dx ** 2 + dy ** 2                                             # L^2, (B, 1, 1)
    x, y = x - x0, y - y0
    along = x * (dx / square) + y * (dy / square)                          # (B, w, w), 0..1 between the ends
    aside = (x * dy - y * dx) ** 2 / square                                # e^2
    t = np.clip(along, 0, 1)
    radius = r + t * dr
    cover = np.clip((radius - np.sqrt(aside + (along - t) ** 2 * square)) * FINE + 0.5, 0, 1)
    before = dz / np.sqrt(square * (square + dz ** 2))
    t = np.clip(along - before * np.sqrt(np.maximum(radius ** 2 - aside, 0)), 0, 1)
    radius = r + t * dr
    height = np.sqrt(np.maximum(radius ** 2 - aside - (along - t) ** 2 * square, 0))
    return cover, z + t * dz - height, (x - t * dx) / radius, (y - t * dy) / radius


def draw_cone(sums, cone, blend, flat, scale, girth, depth, *worn):
    """Adds a cone to sums (3 + M + 1, B, G, G), in place and in each image's own window of the G x G samples:
    weight, weight * normal x, weight * normal y, weight of each of the M materials but skin; the last keeps
    the largest cover. flat (B, P, 2) px, scale (B, P) px per mm, girth (B,), depth (B, P) px; worn: for each
    of the M materials (B,), 0 where it is skin after all. Clothes are 15 % wider than the limb."""
    (i, j, ri, rj, what), (count, grid) = cone, sums.shape[1:3]
    wide = girth * (1 + 0.15 * worn[what - 1] if what >= CLOTH else 1)
    ends, radii = flat[:, [i, j]], scale[:, [i, j]] * np.float32([ri, rj]) * wide[:, None]  # px
    low, high = (ends - radii[..., None]).min(1), (ends + radii[..., None]).max(1)  # (B, 2) px
    low, high = (np.clip((v + 0.5) * FINE + m, 0, grid).astype(int) for v, m in ((low, -1), (high, 2)))
    width = max(int((high - low).max()), 1)
    low = np.minimum(low, grid - width)                                    # (B, 2) samples, x and y
    x, y = ((low.T[..., None] + np.arange(width) + 0.5) / FINE - 0.5).astype(np.float32)  # (B, w) px each
    cover, z, nx, ny = cone_surface(ends, radii, depth[:, [i, j]], x[:, None], y[..., None])
    weight = cover * np.exp(np.clip(z * (-1 / blend / scale[:, :1, None]), -80, 80))
    window = sliding_window_view(sums, (width, width), (2, 3), writeable=True)  # (6.., B, y, x, w, w)
    where = np.arange(count), low[:, 1], low[:, 0]
    window[0][where] += weight
    window[1][where] += weight * nx
    window[2][where] += weight * ny
    if what != SKIN: window[2 + what][where] += weight * worn[what - 1][:, None, None]
    window[-1][where] = np.maximum(window[-1][where], cover)


def rasterise(cones, blend, points, girth, worn, intrinsics, side):
    """Draws `cones` for points (B, P, 3) mm -> (3 + M + 1, B, S, S) float32, the channels of `draw_cone`.

    Every sample sums exp(-depth / blend) over the cones: a z-buffer whose order does not matter, which melts
    surfaces that meet and parts those that lie apart. Figures of like size share a group: tight windows."""
    flat = points[..., :2] / points[..., 2:] * intrinsics[:, None, 0, :1] + intrinsics[:, None, :2, 2]  # px
    scale = intrinsics[:, 0, 0, None] / points[..., 2]                     # (B, P) px per mm
    depth = (points[..., 2] - points[:, :1, 2]) * scale[:, :1]             # (B, P) px, from the root
    layers = np.empty((4 + len(worn), len(points), side, side), np.float32)
    for rows in np.array_split(np.argsort(scale[:, 0]), -(-len(points) // GROUP)):
        sums = np.zeros((len(layers), len(rows), side * FINE, side * FINE), np.float32)
        own = [array[rows] for array in (flat, scale, girth, depth, *worn)]
        for cone in cones: draw_cone(sums, cone, blend, *own)
        sums = sum(sums[..., k::FINE, :] for k in range(FINE))             # ten times faster than mean()
        layers[:, rows] = sum(sums[..., k::FINE] for k in range(FINE)) / FINE ** 2  # (4 + M, b, S, S)
    return layers


def smooth_noise(rng, count, channels, cells, side):
    """Gaussian noise (B, C, S, S) of variance 1, about `cells` waves across the image: random numbers on a
    coarse lattice, blended by two small matrix products."""
    apart = (np.arange(side, dtype=np.float32)[:, None] + 0.5) / side * cells - np.arange(cells + 1)
    blend = np.exp(-2 * apart ** 2)
    blend = (blend / np.linalg.norm(blend, axis=1, keepdims=True)).astype(np.float32)  # (S, cells + 1)
    return blend @ rng.standard_normal((count, channels, cells + 1, cells + 1), np.float32) @ blend.T


def shade(rng, layers, blend, tone, cloths, look):
    """Layers (4 + M, B, S, S), colours of skin or glove (B, 3) and of the M - 1 clothes, each (B, 3, S, S) or
    (B, 3, 1, 1) -> picture (B, 3, S, S): ambient + diffuse + some specular light; darker where a neighbour
    lies nearer the camera, by 3 mm in a hand."""
    count, side = layers.shape[1], layers.shape[-1]
    total = np.maximum(layers[0], 1e-35)
    nx, ny, nail, *worn = layers[1:-1] / total                             # (B, S, S) each
    tilt = np.radians(uniform(rng, look["light_angle"], count, 1, 1))
    turn = uniform(rng, (0, 2 * np.pi), count, 1, 1)
    facing = (nx * np.sin(tilt) * np.cos(turn) + ny * (np.sin(tilt) * np.sin(turn) - 0.2)  # rather from above
              + np.sqrt(np.maximum(1 - nx ** 2 - ny ** 2, 0)) * np.cos(tilt))
    facing = np.maximum(facing, 0)                                         # (B, S, S)
    depth = np.where(layers[0] > 1e-30, -blend * np.log(total), 60 * blend)  # mm, the void lies far back
    reach = max(round(side / 30), 1)
    hidden = sum(np.clip((depth - np.roll(depth, shift, axis) - 1.2 * blend) / (16 * blend), 0, 0.5)
                 for axis in (1, 2) for shift in (-reach, reach))
    light, ambient = (uniform(rng, look[key], count, 1, 1, 1) * (1 + normal(rng, tint, count, 3, 1, 1))
                      for key, tint in (("light", look["light_tint"]), ("ambient", look["light_tint"] / 2)))
    bright = ambient + light * facing[:, None]                             # (B, 3, S, S)
    mottle = 1 + 0.04 * smooth_noise(rng, count, 1, 8, side)
    albedo = tone[..., None, None] * (mottle + np.float32([0.35, 0.22, 0.22])[:, None, None] * nail[:, None])
    for share, cloth in zip(worn, cloths): albedo += share[:, None] * (cloth - albedo)
    shine = uniform(rng, look["shine"], count, 1, 1) * facing ** 12 * (1 - sum(worn))
    return (albedo * bright + shine[:, None]) * (1 - 0.45 * np.minimum(hidden, 1))[:, None]


def paint_shape(rng, canvas, colour, chance, size, aspect, soft, stripes=0.0, rounded=0.0):
    """Lays a soft ellipse or box over each canvas (B, 3, S, S) with probability `chance`, in place: colour
    (B, 3), half length and softness in parts of the side, aspect = width / length, `stripes` the chance of
    stripes, `rounded` 0..1 how dark its long edges are, like a limb's."""
    count, side = len(canvas), canvas.shape[-1]
    centre, turn = uniform(rng, (0, 1), 2, count, 1), uniform(rng, (0, np.pi), count, 1)
    x, y = (np.arange(side, dtype=np.float32) + 0.5) / side - centre       # (B, S) each
    long = uniform(rng, size, count, 1, 1)
    wide = long * uniform(rng, aspect, count, 1, 1)
    p = ((np.cos(turn) * x)[:, None] + (np.sin(turn) * y)[..., None]) / long  # (B, S, S)
    q = ((np.cos(turn) * y)[..., None] - (np.sin(turn) * x)[:, None]) / wide
    boxy, striped, there = (rng.random((count, 1, 1)) < odds for odds in (0.4, stripes, chance))
    away = np.where(boxy, np.maximum(np.abs(p), np.abs(q)), np.sqrt(p ** 2 + q ** 2))
    cover = there * np.clip((1 - away) * wide / uniform(rng, soft, count, 1, 1) + 0.5, 0, 1)
    fill = 1 + 0.3 * np.sin(striped * uniform(rng, (9, 27), count, 1, 1) * p) + uniform(
        rng, (-0.15, 0.15), count, 1, 1) * q - 0.6 * rounded * np.minimum(q ** 2, 1)
    canvas += cover[:, None].astype(np.float32) * (colour[..., None, None] * fill[:, None] - canvas)


def background(rng, count, side, look):
    """What lies behind the figure, (B, 3, S, S) in 0..1: a wall, for bodies a floor, clouds and grain on
    them, shapes, and limbs of the colour of skin (or clothes) that are nobody's."""
    canvas = pick(rng, look["wall"], look["wall_jitter"], count)[..., None, None]
    if "floor" in look:
        floor = pick(rng, look["floor"], look["wall_jitter"], count)[..., None, None]
        down = np.float32(np.arange(side) / side)[:, None] - uniform(rng, (0.45, 0.9), count, 1, 1, 1)
        canvas = canvas + np.clip(down / 0.02 + 0.5, 0, 1) * (floor - canvas)  # (B, 3, S, 1)
    for key, cells in (("clouds", 3), ("grain", 16)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas = canvas + uniform(rng, look[key], count, 1, 1, 1) * (grey + 0.5 * colour)
    busy = rng.random((count, 1, 1)) < look["busy"]
    for _ in range(look["shapes"]):
        colour = 0.5 + look["shape_colour"] * uniform(rng, (-0.5, 0.5), count, 3)
        paint_shape(rng, canvas, colour, look["shape_chance"] * busy, look["shape_size"], (0.2, 1.0),
                    look["shape_soft"], look["stripes"])
    for _ in range(look["limbs"]):
        paint_shape(rng, canvas, pick(rng, look.get("decoys", look["skin"]), 0.1, count),
                    look["limb_chance"], (0.15, 0.5), look["limb_aspect"], look["shape_soft"], rounded=1.0)
    return canvas


def develop(rng, image, look):
    """The camera: blur, contrast, white balance, gamma and noise on image (B, 3, S, S), 0..1 -> uint8
    (B, S, S, 3)."""
    count, side = len(image), image.shape[-1]
    sigma = np.maximum(uniform(rng, look["blur"], count, 1, 1, 1) * side, 0.05)  # px
    apart = np.arange(side, dtype=np.float32)[:, None] - np.arange(side, dtype=np.float32)
    kernel = np.exp(-0.5 * (apart / sigma) ** 2)                           # (B, 1, S, S)
    kernel /= kernel.sum(-1, keepdims=True)
    image = kernel @ image @ kernel.transpose(0, 1, 3, 2)
    image = 0.5 + (image - 0.5) * uniform(rng, look["contrast"], count, 1, 1, 1)
    image *= 1 + normal(rng, look["balance"], count, 3, 1, 1)
    image = np.clip(image, 1e-3, 1) ** uniform(rng, look["gamma"], count, 1, 1, 1)
    grain = uniform(rng, (-1.73, 1.73), *image.shape)                      # variance 1, cheaper than Gaussian
    image += grain * uniform(rng, look["noise"], count, 1, 1, 1)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)  # (B, S, S, 3)


def dress_hand(rng, points, side, look):
    """What a hand wears -> points (B, P, 3) as given; worn, 0 or 1 for nails and sleeve, (B,) each; colour of
    the skin (B, 3), and of the sleeve (B, 3, 1, 1)."""
    count = len(points)
    sleeved = (rng.random(count) < look["sleeve"]).astype(np.float32)
    gloved = rng.random((count, 1)) < look["glove"]                        # a glove hides the nails
    skin, glove = pick(rng, look["skin"], look["skin_jitter"], count), pick(rng, look["gloves"], 0.1, count)
    cloth = uniform(rng, (0.1, 0.9), count, 3)[..., None, None]
    return points, [~gloved[:, 0], sleeved], np.where(gloved, glove, skin), [cloth]


def fabric(rng, palette, count, side, look):
    """Colours (B, 3, S, S) of a piece of clothing: one of the palette, or stripes or checks of two."""
    plain, other = (pick(rng, palette, look["cloth_jitter"], count)[..., None, None] for _ in range(2))
    turn, waves = uniform(rng, (0, np.pi), count, 1, 1), uniform(rng, (30, 80), count, 1, 1)
    x, y = np.meshgrid(*2 * [np.arange(side, dtype=np.float32) / side])    # (S, S)
    p, q = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x  # (B, S, S)
    checked, printed = (rng.random((count, 1, 1)) < odds for odds in (0.5, look["pattern"]))
    lines = np.sin(waves * p) * np.where(checked, np.sin(waves * q), np.float32(1))
    return plain + (printed * np.clip(2 * lines + 0.5, 0, 1))[:, None] * (other - plain)


def dress_body(rng, points, side, look):
    """As `dress_hand`, for bodies; appends where trousers' legs and sleeves end, on the upper and the lower
    half of each limb: right leg, right arm, left leg, left arm. Of the 7 materials, HORN is never worn."""
    count, ends = len(points), []
    leg, sleeve = (np.clip(uniform(rng, look[key], count), 0, 1.95) for key in ("leg", "sleeve"))
    for top, t in ((1, leg), (14, sleeve), (4, leg), (11, sleeve)):
        upper, middle, lower = (points[:, top + i] for i in range(3))      # (B, 3) mm
        ends += [upper + (middle - upper) * np.minimum(t, 1)[:, None],
                 middle + (lower - middle) * np.maximum(t - 1, 0)[:, None]]
    always, skin = np.ones(count, np.float32), pick(rng, look["skin"], look["skin_jitter"], count)
    hair, shoes = (pick(rng, look[key], 0.1, count)[..., None, None] for key in ("hair", "shoes"))
    shirt, trousers = (fabric(rng, look[key], count, side, look) for key in ("shirt", "trousers"))
    worn = [0 * always, always, always, np.float32(sleeve > 1), always, np.float32(leg > 1), always]
    return (np.concatenate([points, np.stack(ends, 1)], 1), worn, skin,
            [hair, shirt, shirt, trousers, trousers, shoes])


class Kind(NamedTuple):
    """What hands and bodies differ in; everything else about rendering is shared."""
    skeleton: dict
    cones: list
    pose: object      # (rng, count) -> points, girth
    dress: object     # (rng, points, side, look) -> points, worn, tone, cloths
    domains: dict
    blend: float      # mm of depth over which surfaces melt into one another
    distance: tuple   # mm from the camera
    foreign: int      # the clothes that are not foreground, 0: none


KINDS = {"hands": Kind(HAND, HAND_CONES, sample_hand, dress_hand, DOMAINS, 2.5, (400, 900), CLOTH),
         "bodies": Kind(HUMAN, HUMAN_CONES, sample_body, dress_body, HUMAN_DOMAINS, 12.0, (3000, 6000), 0)}


def render(kind, rng, domain, count, side):
    """Labelled images of one of KINDS and of its domains: images (B, S, S, 3) uint8; masks (B, S, S) uint8,
    255 on a body, or on a hand and its bare forearm (not on a sleeve), 0 elsewhere; keypoints (B, K, 3) and
    intrinsics (B, 3, 3), float32."""
    kind = KINDS[kind]
    look, joints = kind.domains[domain], len(kind.skeleton["joints"])
    points, girth = kind.pose(rng, count)
    points = place(rng, points, joints, kind.distance, look)
    intrinsics = crop_intrinsics(points[:, :joints], side, kind.skeleton["box"])
    points, worn, tone, cloths = kind.dress(rng, points, side, look)
    layers = rasterise(kind.cones, kind.blend, points, girth, worn, intrinsics, side)
    figure = shade(rng, layers, kind.blend, tone, cloths, look)
    image = background(rng, count, side, look)
    image += layers[-1][:, None] * (figure - image)
    mask = layers[-1]                                                      # (B, S, S)
    if kind.foreign: mask = mask * (1 - layers[2 + kind.foreign] / np.maximum(layers[0], 1e-35))
    return dict(images=develop(rng, image, look), masks=(mask * 255 + 0.5).astype(np.uint8),
                keypoints=points[:, :joints].astype(np.float32), intrinsics=intrinsics)


def render_unconstrained(rng, count, side):
    """X_C: (B, S, S, 3) uint8 without hands. Clouds on many scales, in a third bent to marble or wood, under
    blobs and bars of any colour, a third of them of skin colour."""
    look, canvas = UNCONSTRAINED, np.zeros((count, 3, side, side), np.float32)
    rough = uniform(rng, (0.3, 0.8), count, 1, 1, 1)
    for octave, cells in enumerate((2, 4, 8, 16, 32)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas += rough ** octave * (grey + 0.6 * colour)
    waves = np.sin(canvas[:, :1] * uniform(rng, (1, 5), count, 1, 1, 1))
    canvas = np.where(rng.random((count, 1, 1, 1)) < 0.3, 0.3 * canvas + waves, canvas)
    canvas = uniform(rng, (0.1, 0.9), count, 3, 1, 1) + canvas * uniform(rng, (0.03, 0.16), count, 1, 1, 1)
    for _ in range(look["shapes"]):
        colour = np.where(rng.random((count, 1)) < look["skin_chance"], pick(rng, look["skin"], 0.2, count),
                          uniform(rng, (0, 1), count, 3))
        paint_shape(rng, canvas, colour, look["shape_chance"], look["shape_size"], look["shape_aspect"],
                    look["shape_soft"], look["stripes"], rng.random((count, 1, 1), np.float32))
    return develop(rng, canvas, look)


# ==========================================================================================================
# The embedded benchmark on disk
# ==========================================================================================================
CHUNK = 50  # images of one rendering job; its random numbers depend on (split, chunk) alone
BENCHMARK = {  # folder: (domain, images); no two share a random number, so train, val and test are disjoint
    "source_train": ("source", 10000), "source_val": ("source", 1000), "source_test": ("source", 1000),
    "target_train": ("target", 10000), "target_test": ("target", 1000), "unconstrained": (None, 4000),
    "shifted_test": ("target_shifted", 1000),  # a second, unseen look of the target, to check a result on
}
HALF_GAPS = {  # rendered only where a script is given one: targets that differ from the source in one half
    "figure_train": ("figure", 10000), "figure_test": ("figure", 1000),    # .. its figures, light and camera
    "scenery_train": ("scenery", 10000), "scenery_test": ("scenery", 1000),
}


def render_chunk(job: tuple[str, str, int, int]) -> tuple[dict[str, np.ndarray], list]:
    """Job (kind, folder, chunk, side): CHUNK images of a benchmark's folder with their labels."""
    kind, name, chunk, side = job
    domain, count = (BENCHMARK | HALF_GAPS)[name]
    rng = random_generator(0, f"{kind} {name}", chunk)
    count = min(CHUNK, count - chunk * CHUNK)
    if domain: return render(kind, rng, domain, count, side), []
    return {"images": render_unconstrained(rng, count, side)}, []


def make_benchmark(kind: str, root: str | Path, folders: dict, side: int = 60, workers: int = 0) -> None:
    """Render the `folders` of `kind` that are not there yet under root, crops of `side` px."""
    for name, (domain, count) in folders.items():
        if (Path(root) / name).exists():
            there = Dataset(Path(root) / name).images.shape[1]
            if there != side: raise InputError(f"{root}/{name}: exists with {there} px; remove it")
            continue
        skeleton = {k: v for k, v in KINDS[kind].skeleton.items() if k != "box"}
        meta = {"name": f"{kind} {domain or 'unconstrained'}", "split": name.split("_")[-1], "margin": MARGIN,
                **skeleton, "origin": f"rendered by this project, {side} px"}
        if not domain: meta |= {"joints": [], "bones": []}
        jobs = [(kind, name, i, side) for i in range(-(-count // CHUNK))]
        build_dataset(Path(root) / name, meta, jobs, len(jobs), render_chunk, workers, CHUNK)


def in_benchmark(folder: str | Path) -> bool:
    """Whether a folder is one that the embedded benchmark has, rendered or not."""
    folder = Path(folder)
    return folder.name in BENCHMARK | HALF_GAPS and folder.parent.name in KINDS


def ensure_benchmark(folders: list[str], rank: int) -> None:
    """Render the embedded benchmark if one of these folders belongs to it and is not there.

    Raises InputError, before anything is rendered, where one neither is there nor belongs to it.
    """
    error, known = None, BENCHMARK | HALF_GAPS
    if rank == 0:
        try:
            absent = [folder for folder in map(Path, filter(None, folders)) if not folder.exists()]
            for folder in absent:
                if not in_benchmark(folder): Dataset(folder)
            for folder in absent:
                if not folder.exists():
                    make_benchmark(folder.parent.name, folder.parent,
                                   BENCHMARK | {folder.name: known[folder.name]})
        except InputError as caught: error = caught
    from_rank_0(error)


# ==========================================================================================================
# Readers of public data sets: a publisher's files -> Samples -> checked -> cropped -> a data-set folder
# ==========================================================================================================
# A reader is a function (root, own options with defaults) -> (number of samples or an upper bound, generator
# of Samples). It refuses early what it can; its generator opens the files of labels one sequence at a time,
# and never a picture. A line in READERS puts it and its options on the command line, which takes of a Literal
# no other value. All readers share everything else.
SAMPLES_A_JOB = 16
Split = Literal["train", "test"]


class Sample(NamedTuple):
    """One picture, or one frame of a video, as its publisher ships it; files are named relative to ROOT."""
    image: str                            # picture file, or video file if `frame` is given
    keypoints: np.ndarray | None = None   # (K, 3) mm, camera; NaN: not labelled. None: no labels at all
    intrinsics: np.ndarray | None = None  # (3, 3) px of the whole picture, pixel centres at integers
    mask: str | None = None               # picture file, or .mat file (then `mask_key` says what in it)
    foreground: tuple = (128, 255)        # foreground: grey value, palette index, label in this closed range
    uv: np.ndarray | None = None          # (K, 2) px: the publisher's own 2D labels, where there are any
    size: tuple | None = None             # (width, height) px, where the publisher fixes it
    frame: int | None = None              # number of the frame in the video `image`, from 0
    mask_key: str | int | None = None     # .mat v5: name of the variable; v7.3: index into the cell 'Masks'
    left: bool = False                    # a left hand: picture, mask, labels, camera become a right hand
    distortion: np.ndarray | None = None  # (5,) k1 k2 p1 p2 k3 (OpenCV's formula); undone in the crop
    tolerance: float = 2.0                # px that projected keypoints may lie from `uv`
    around: np.ndarray | None = None      # (n, 3) mm, camera: points, no joints, that the crop holds as well

    def __str__(self) -> str:
        return self.image if self.frame is None else f"{self.image} frame {self.frame}"


class Missing(Exception):
    """A sample has no picture or no mask, as now and then at the end of a video: it is left out, counted."""


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def reading(path: Path, what: str):
    """Whatever goes wrong while a file is read becomes one line that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (InputError, Missing): raise
    except ImportError as error:
        library = (error.name or str(error)).partition(".")[0]
        raise InputError(f"{path}: to read it, first: pip install {library}") from error
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        kind = "KeyError " if isinstance(error, KeyError) else ""  # its text is the key alone
        wrong = f"broken {what}: {kind}{first_line(error)}" if os.path.exists(path) else "missing"
        raise InputError(f"{path}: {wrong}; give a whole {what}") from error


def open_picture(path: Path, side: int = 0, width: float = 0) -> tuple[np.ndarray, tuple[int, int]]:
    """Any picture file as (h, w, 3) uint8, turned as its EXIF says, and its own size (W, H); grey, palette,
    CMYK and 16 bit become RGB.

    If `width` px of it (0: its shorter side) are to become `side` px, a JPEG is decoded at 1/2, 1/4 or 1/8 of
    its size where that leaves as many pixels: a quarter of the time, or less. Not one to be turned: the last
    of such pixels, which reach beyond the picture, would come first, and the picture lie beside its labels.
    """
    with reading(path, "picture"), Image.open(path, formats=PICTURES) as image:
        turned = image.getexif().get(0x0112, 1) > 1
        if turned: image = ImageOps.exif_transpose(image)
        size, share = image.size, side / (width or min(image.size))
        if side and not turned: image.draft("RGB", [math.ceil(share * length) for length in size])
        if image.mode == "F": raise ValueError("its pixels are fractions, of an unknown range")
        if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:  # what lies under it is arbitrary: white instead
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image.convert("RGB")), size


class Video:
    """The frames of a video by their number, whatever a seek lands on: a frame is told by its time.

    It stays open, so that frames in order are decoded once each. Videos whose packets bear no true times
    (AVI with frames out of order) are decoded from their beginning, and counted.
    """

    def __init__(self, path: Path):
        import av
        # a playlist under the name of a video would have FFmpeg open what it names, files and addresses
        safe = {"format_whitelist": VIDEOS, "protocol_whitelist": "file"}
        self.container = av.open(str(path), options=safe)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # there are other workers
        packets = [(p.pts, p.pts if p.dts is None else p.dts, p.is_keyframe)
                   for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        self.count, times = len(packets), [time for time, _, _ in packets]
        if self.count < 0.9 * self.stream.frames:
            raise ValueError(f"it ends after {self.count} of {self.stream.frames} frames")
        late = self.stream.codec_context.has_b_frames                      # frames come out of order
        self.timed = None not in times and not (late and times == sorted(times))
        self.number = {time: i for i, time in enumerate(sorted(times))} if self.timed else {}
        self.keys = sorted((self.number[t], start) for t, start, key in packets if key and self.timed)
        self.begin = min(start for _, start, _ in packets) if self.timed else 0
        self.next = math.inf                                               # number of the next frame decoded
        self.last = -1, None                                               # number and pixels of the last one

    def frame(self, number: int) -> np.ndarray:
        """Frame `number` from 0 as (H, W, 3) uint8; Missing beyond the end."""
        if number >= self.count: raise Missing(f"frame: the video has {self.count}")
        if number == self.last[0]: return self.last[1]                     # it shows several hands
        key, time = max((key for key in self.keys if key[0] <= number), default=(0, self.begin))
        if not key <= self.next <= number:
            self.container.seek(time, stream=self.stream)
            self.frames, self.next = self.container.decode(self.stream), key
        here = -1
        for frame in self.frames:
            here = self.number.get(frame.pts, -1) if self.timed else self.next
            self.next = here + 1
            if here >= number: break
        if here != number: raise ValueError(f"frame {number} cannot be decoded")
        self.last = number, frame.to_ndarray(format="rgb24")
        return self.last[1]


open_video = lru_cache(maxsize=2)(Video)  # in each worker


def open_mask(path: Path, foreground: tuple[float, float], key: str | int | None) -> np.ndarray:
    """A mask as (H, W) bool: True where the value lies in the closed range; `key` as Sample.mask_key."""
    with reading(path, "mask"):
        if key is None:
            with Image.open(path, formats=PICTURES) as image:
                values = np.asarray(image if image.mode in "PL" else image.convert("L"))
        elif isinstance(key, str): values = read_mat(path, key)[key]
        else:
            import h5py
            if not path.exists(): raise Missing(f"mask: no {path.name}")
            with h5py.File(path) as file:
                cell = file["Masks"]                                       # (F, 1) of references
                empty = key >= len(cell) or not cell[key, 0] or "MATLAB_empty" in file[cell[key, 0]].attrs
                if empty: raise Missing(f"mask: {path.name} has none for this frame")
                values = h5_values(file, file[cell[key, 0]]).T             # (H, W)
        if np.ndim(values) != 2: raise ValueError(f"shape {np.shape(values)}, not (height, width)")
        return (values >= foreground[0]) & (values <= foreground[1])


def open_sample(root: Path, sample: Sample, side: int, width: float) -> tuple:
    """Picture (h, w, 3) uint8, its mask (H, W) bool or None, and the picture's own size (W, H).

    Picture and mask must have the size that the publisher says; a JPEG of which `width` px become `side` px
    may be decoded smaller, (h, w).
    """
    for name in (sample.image, sample.mask or ""):  # such names stand in files of labels
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{root}: its labels name {name!r}, which lies outside of it: refused")
    path, mask = root / sample.image, None
    pixels = side if sample.distortion is None else 2 * side               # as `crop_undistorted` wants
    if sample.frame is None: image, size = open_picture(path, pixels, width)
    else:
        with reading(path, "video"): image = open_video(path).frame(sample.frame)
        size = image.shape[1::-1]
    if sample.mask: mask = open_mask(root / sample.mask, sample.foreground, sample.mask_key)
    expected = tuple(sample.size or size)
    for name, found in ((sample.image, size), (sample.mask, expected if mask is None else mask.shape[1::-1])):
        if found != expected: raise InputError(f"{root / name}: {found[0]} x {found[1]} px, expected "
                                               f"{expected[0]} x {expected[1]}")
    return image, mask, size


def need_files(root: Path, names: list[str], layout: str) -> None:
    """InputError unless all are there: now, not in an hour. Lists a folder once: 100,000 stats are slow."""
    folders = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        try: present = folders[folder] = folders.get(folder) or set(os.listdir(root / folder))
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise InputError(f"{root / folder}: no such folder. {layout}") from error
        if file not in present: raise InputError(f"{root / name}: missing. {layout}")


def read_json_array(path: Path, *shape: int) -> np.ndarray:
    """A JSON list of n arrays of `shape` as (n, *shape) float64."""
    with reading(path, "JSON array"): array = np.array(json.loads(path.read_text()), np.float64)
    if array.shape[1:] != shape: raise InputError(f"{path}: shape {array.shape}, expected {('n', *shape)}")
    return array


def read_mat(path: Path, *names: str, kinds: tuple = ()) -> dict[str, np.ndarray]:
    """Variables of a MATLAB file of version 5 as scipy gives them: MATLAB's axes, two at least. Arrays of
    numbers; with `kinds` of those too, as cells, which may lie in each other until a process dies of it."""
    with reading(path, "MATLAB file"):
        from scipy.io import loadmat, whosmat
        there = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        for name, (shape, kind) in named(path, there, names).items():
            if math.prod(shape) > LARGEST: raise ValueError(f"{name} claims to be {shape}")
            if not re.fullmatch(r"u?int\d+|single|double|logical", kind) and kind not in kinds:
                raise ValueError(f"{name} holds no numbers but {kind}")
        found = loadmat(path, variable_names=names)
        if any(found[name].dtype.kind not in "biuf" + "O" * bool(kinds) for name in names):
            raise ValueError("complex numbers")
        return {name: found[name] for name in names}


def read_h5(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Variables of a MATLAB file of version 7.3, an HDF5 file: MATLAB's axes in reverse, (F, .., ..). To be
    called by way of `in_a_process`: HDF5 itself may crash."""
    with reading(path, "MATLAB 7.3 file"):
        import h5py
        with h5py.File(path) as file:
            return {k: h5_values(file, v) for k, v in named(path, file, names).items()}


def h5_values(file, found) -> np.ndarray:
    """The numbers of an HDF5 data set; ValueError where they lie in another file, or are absurdly many."""
    if found.file.filename != file.filename or found.external or found.is_virtual:
        raise ValueError(f"{found.name} lies in another file")
    if found.dtype.kind not in "biuf" or found.size > LARGEST:
        raise ValueError(f"{found.name} claims to be {found.dtype} {found.shape}")
    return found[()]


def read_cdf(path: Path, name: str) -> np.ndarray:
    """One variable of a CDF file."""
    with reading(path, "CDF file"):
        import cdflib
        file = cdflib.CDF(path)
        if name not in (there := file.cdf_info().zVariables): named(path, there, [name])
        return np.asarray(file.varget(name))


def named(path: Path, variables, names) -> dict:
    """Those of the variables of a file; InputError if one is not there."""
    for name in set(names) - set(variables):
        there = ", ".join(k for k in variables if not k.startswith(("_", "#")))
        raise InputError(f"{path}: has no variable {name!r}, but {there or 'none'}")
    return {name: variables[name] for name in names}


class PickledType:
    """Stands for a numpy.dtype in a pickle: numpy's own __setstate__ believes whatever offsets it is told."""

    def __init__(self, code, *_): self.code, self.order = code, "|"

    def __setstate__(self, state): self.order = state[1]

    def plain(self) -> np.dtype:
        if not re.fullmatch(r"[<>=|][biufcSUO]\d{0,4}", self.order + self.code):
            raise ValueError(f"an array of {self.code!r}")
        return np.dtype(self.order + self.code)


class PickledArray(np.ndarray):
    """An array whose __setstate__ believes nothing: numpy's reads beyond a list shorter than its shape."""

    def __setstate__(self, state):
        shape, kind, fortran, content = state[-4:]
        dtype, content = kind.plain(), content.encode("latin1") if isinstance(content, str) else content
        size = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
        if type(content) is not (list if dtype.hasobject else bytes) or len(content) != size or size < 0:
            raise ValueError(f"{shape} {dtype} in {len(content)} bytes")
        super().__setstate__((1, shape, dtype, bool(fortran), content))

    def __reduce__(self): return np.asarray(self).__reduce__()


class ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays in plain containers: what a pickle names may be called, so it finds no other, and
    of numpy only what is made here: numpy's own ndarray would take any bytes for pointers."""

    def find_class(self, module: str, name: str):
        known = {"ndarray": "ndarray", "dtype": lambda *code: PickledType(*code),
                 "_reconstruct": lambda *_: np.ndarray.__new__(PickledArray, 0),
                 "scalar": lambda kind, data: np.frombuffer(
                     data.encode("latin1") if isinstance(data, str) else data, kind.plain(), 1)[0],
                 "_frombuffer": lambda data, kind, shape, order: np.frombuffer(
                     data, kind.plain()).reshape(shape, order=order),
                 "encode": lambda text, encoding: text.encode("latin1")}   # bytes in pickles of protocol 2
        if module.split(".")[0] == ("_codecs" if name == "encode" else "numpy") and name in known:
            return known[name]
        raise InputError(f"{self.path}: names {module}.{name}, no array: refused, nothing of it was run")


def read_pickle(path: Path):
    """A pickle of python 2 or 3 that holds numpy arrays, plain containers, numbers, str and bytes only.

    InputError where it holds anything else: a pickle can run any command, and these come from a download.
    """
    return in_a_process(read_pickle_here, path)


def read_pickle_here(path: Path):
    """`read_pickle` in this very process, which tuples in tuples by the million would take along."""
    with reading(path, "pickle"), open(path, "rb") as file:
        unpickler = ArraysOnly(file, encoding="latin1")  # python 2's str, whose arrays' bytes they are too
        unpickler.path = path
        return unpickler.load()


def pinhole_of(points: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Intrinsics (3, 3) px, without skew, that project points (n, 3) mm, camera, nearest to uv (n, 2) px."""
    good, K = np.isfinite(points).all(axis=1) & np.isfinite(uv).all(axis=1) & (points[:, 2] != 0), np.eye(3)
    for axis in (0, 1):
        slope = points[good, axis] / points[good, 2]
        K[axis, axis], K[axis, 2] = np.polyfit(slope, uv[good, axis], 1)   # u = f x / z + c
    return K


# ---------------------------------------------------------------- the checks: None, or "kind: what is wrong"

def hand_fault(keypoints: np.ndarray) -> str | None:
    """Joints (21, 3) mm of a right hand, judged by its four fingers: unit, order along a finger, handedness.

    A finger's middle joint bends towards the palm only, so first bone x second bone points from the little
    finger to the index in a right hand, and away in its mirror image. It has to point away by 0.2 (12 degrees
    a finger) to count: straight fingers do not tell, and overstretched ones are no left hand.
    """
    bones = np.diff(keypoints[5:].reshape(4, 4, 3), axis=1)                # (4, 3, 3) mm, palm -> tip
    length = np.linalg.norm(bones, axis=-1)                                # (4, 3) mm
    if np.isfinite(length[1, 0]) and not 15 <= length[1, 0] <= 80:
        return f"bone: {length[1, 0]:.3g} mm from middle_1 to middle_2, not a human's 15 to 80: another unit?"
    if np.nansum(length[:, 2] - length[:, 0]) > 0:
        return "order: the fingers' last bones are longer than the first: from tip to palm?"
    across = keypoints[5] - keypoints[17]                                  # (3,) little finger -> index
    scale = length[:, 0] * length[:, 1] * np.linalg.norm(across) + 1e-9
    if np.nansum(np.cross(bones[:, 0], bones[:, 1]) @ across / scale) / 4 < -0.2:
        return "handedness: fingers bend away from the palm: mirrored, a left hand, fingers in reverse order?"


def body_fault(keypoints: np.ndarray) -> str | None:
    """Joints (17, 3) mm of HUMAN, judged by a thigh's length and by the sides: unit, order, handedness.

    A knee bends one way: thigh x shin points from the right hip to the left one; in a mirror image, or where
    left and right are exchanged, it points back. So do elbows, but for the turn of the shoulder: they count
    less. Straight limbs do not tell.
    """
    hinges = keypoints[[[1, 2, 3], [4, 5, 6], [14, 15, 16], [11, 12, 13]]]  # (4, 3, 3) mm: knees, elbows
    bones = np.diff(hinges, axis=1)                                        # (4, 2, 3) mm
    length = np.linalg.norm(bones, axis=-1)                                # (4, 2) mm
    for thigh in length[:2, 0]:
        if thigh < 250 or thigh > 600:                                     # not where it is NaN
            return f"bone: {thigh:.3g} mm from hip to knee, not a human's 250 to 600: another unit?"
    hips, shoulders = keypoints[4] - keypoints[1], keypoints[11] - keypoints[14]  # (3,) right -> left
    wide = np.linalg.norm(hips) * np.linalg.norm(shoulders) + 1e-9
    if hips @ shoulders / wide < -0.5:
        return "order: shoulders and hips point opposite ways: left and right exchanged in arms or legs?"
    across = hips / (np.linalg.norm(hips) + 1e-9)
    bend = np.cross(bones[:, 0], bones[:, 1]) @ across / (length.prod(axis=1) + 1e-9)  # sine of the angle
    if np.nansum(bend * [1, 1, -0.3, -0.3]) < -0.3:
        return "handedness: knees bend forwards: mirrored, or left and right exchanged?"


def projection_fault(keypoints, uv, size, mask=None, published=None, tolerance=2.0) -> str | None:
    """Joints (K, 3) mm, their uv (K, 2) px in a picture of `size` (width, height): before the camera, in the
    picture, within `tolerance` px of the publisher's own 2D labels (K, 2) where there are any, on the mask
    (H, W) bool as they are, not mirrored."""
    valid = np.isfinite(keypoints).all(axis=1)
    if valid.sum() < 2: return f"projection: {valid.sum()} joints have labels"
    if (keypoints[valid, 2] <= 0).any(): return "projection: a joint lies behind the camera"
    uv, size = uv[valid], np.array(size)
    inside, extent = ((uv >= -0.5) & (uv <= size - 0.5)).all(axis=1), np.ptp(uv, axis=0).max()
    if inside.mean() < 0.5: return f"projection: {inside.sum()} of {len(uv)} joints fall on the picture"
    if not 8 <= extent <= 2 * size.max(): return f"projection: the joints' box is {extent:.1f} px wide"
    apart = 0 if published is None else np.fmax.reduce(np.abs(uv - published[valid]), axis=None)
    if apart > tolerance:
        return f"projection: {apart:.1f} px from the publisher's 2D labels: camera, order or lens distortion?"
    if mask is not None:
        u, v = np.clip(np.round(uv), 0, size - 1).astype(int).T
        share, mirrored = mask[v, u].mean(), mask[v, size[0] - 1 - u].mean()
        if mirrored > share + 0.25:
            return f"projection: {share:.0%} of the joints on the mask, mirrored {mirrored:.0%}: flipped?"


def fault_of(joints: list[str], keypoints, uv, size, mask=None, published=None, tolerance=2.0,
             left: bool = False) -> str | None:
    """What is impossible about the labels of one sample, a skeleton of these joints, or None."""
    right = keypoints * [-1, 1, 1] if left else keypoints
    fault = hand_fault(right) if joints == HAND_JOINTS else \
        body_fault(right) if joints == HUMAN_JOINTS else None
    return fault or projection_fault(keypoints, uv, size, mask, published, tolerance)


def to_uv(keypoints: np.ndarray, intrinsics: np.ndarray, distortion: np.ndarray | None = None) -> np.ndarray:
    """One sample's (K, 3) mm, camera, and intrinsics (3, 3) -> (K, 2) px, through a lens with distortion."""
    xy = keypoints[:, :2] / keypoints[:, 2:]
    return distort(xy, distortion) @ intrinsics[:2, :2].T + intrinsics[:2, 2]


def distort(xy: np.ndarray, distortion: np.ndarray | None) -> np.ndarray:
    """Points (.., 2) of the plane z = 1 -> where a lens with k1 k2 p1 p2 k3 shows them, (.., 2)."""
    if distortion is None: return xy
    (k1, k2, p1, p2, k3), (x, y) = distortion, (xy[..., 0], xy[..., 1])
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return np.stack([x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
                     y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y], axis=-1)


# ---------------------------------------------------------------- the crop

def crop_square(pixels: np.ndarray, corner: np.ndarray, width: float, side: int) -> np.ndarray:
    """A square of `width` px at upper left `corner` (x, y) of pixels (H, W[, 3]) uint8, as (side, side[, 3]).

    Corner and width count from the outer edge of the first pixel: pixel u covers u .. u + 1 there, its centre
    is u + 0.5. Bilinear, antialiased when shrinking; edge pixels go on beyond the picture.
    """
    reach = 2 + math.ceil(width / side)                                    # px that antialiasing sees beyond
    low, high = np.floor(corner).astype(int) - reach, np.ceil(corner + width).astype(int) + reach
    rows, columns = (np.arange(low[i], high[i]).clip(0, pixels.shape[1 - i] - 1) for i in (1, 0))
    x, y = corner - low
    part = pixels[rows[0]:rows[-1] + 1].take(columns, axis=1).take(rows - rows[0], axis=0)
    patch = Image.fromarray(part)  # fancy indexing by rows and columns at once is many times slower
    return np.asarray(patch.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + width, y + width)))


def crop_window(uv: np.ndarray, box: float) -> tuple[np.ndarray, float]:
    """The square around the labelled joints' uv (K, 2) px: its corner (x, y) and width, as `crop_square`."""
    low, high = np.fmin.reduce(uv), np.fmax.reduce(uv)                     # (2,) px
    width = box * MARGIN * (high - low).max()
    return (low + high) / 2 + 0.5 - width / 2, width


def crop_undistorted(pixels: np.ndarray, corner, width: float, side: int, sample: Sample,
                     shrunk: int) -> np.ndarray:
    """`crop_square` of the picture as a lens without distortion would have taken it; of its pixels, `shrunk`
    x `shrunk` are one of those given.

    The part in question is shrunk to about two pixels for each of the crop's, as `crop_square` does it; from
    there each half pixel of the crop fetches its colour; then 2 x 2 are averaged. The lens is computed at
    65 x 65 places, and linear between: that is exact to a few hundredths of a pixel.
    """
    K, fine = sample.intrinsics, 2 * side
    places = np.linspace(0.5, fine - 0.5, 65) * width / fine - 0.5
    u, v = np.meshgrid(corner[0] + places, corner[1] + places)             # (65, 65) px, undistorted
    xy = (np.stack([u, v], axis=-1) - K[:2, 2]) @ np.linalg.inv(K[:2, :2]).T    # (65, 65, 2) at z = 1
    uv = (distort(xy, sample.distortion) @ K[:2, :2].T + K[:2, 2] + 0.5) / shrunk  # (65, 65, 2) from the edge
    seen = np.clip(uv, 0, pixels.shape[1::-1])
    low = seen.min(axis=(0, 1))
    extent = (seen.max(axis=(0, 1)) - low).max() + 1e-6
    patch = crop_square(pixels, low, extent, math.ceil(extent * min(1, shrunk * fine / width))).copy()
    patch = torch.from_numpy(patch.reshape(*patch.shape[:2], -1)).permute(2, 0, 1)[None].float()
    grid = torch.from_numpy((uv - low) * (2 / extent) - 1).permute(2, 0, 1)[None].float()  # -1 .. 1
    grid = F.interpolate(grid, (fine, fine), mode="bilinear", align_corners=True)  # (1, 2, 2 side, 2 side)
    found = F.grid_sample(patch, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    found = F.avg_pool2d(found, 2)[0].permute(1, 2, 0).round().byte()      # (side, side, C)
    return found.numpy().reshape(side, side, *pixels.shape[2:])


def crop_sample(sample: Sample, image, mask, size, window, side: int) -> dict[str, np.ndarray]:
    """A row of each array: the window (corner, width) of the picture (h, w, 3), which may have been decoded
    smaller than its own size (W, H), of its mask (H, W), and the intrinsics; a left hand as a right one."""
    corner, width = window
    s = side / width
    shrunk = min((1, 2, 4, 8), key=lambda n: abs(-(-size[0] // n) - image.shape[1]))    # px of it in a pixel
    K = np.diag([s, s, 1.0])
    K[:2, 2] = (0.5 - corner) * s - 0.5                                    # u' = (u + 0.5 - corner) s - 0.5
    row = {"keypoints": np.float32(sample.keypoints), "intrinsics": np.float32(K @ sample.intrinsics)}
    for name, pixels, n in (("images", image, shrunk), ("masks", mask, 1)):
        if pixels is None: continue
        pixels = pixels * np.uint8(255) if pixels.dtype == bool else pixels
        row[name] = crop_square(pixels, corner / n, width / n, side) if sample.distortion is None else \
            crop_undistorted(pixels, corner, width, side, sample, n)
    if sample.left:
        row = {k: row[k][:, ::-1] if k in ("images", "masks") else row[k] for k in row}
        row["keypoints"] = row["keypoints"] * np.float32([-1, 1, 1])
        row["intrinsics"][0, 1:] *= -1                                     # skew and cx -> side - 1 - cx
        row["intrinsics"][0, 2] += side - 1
    return row


def convert(root: Path, side: int, skeleton: dict, job: list[Sample]) -> tuple[dict, list[str]]:
    """A job of `build_dataset`: rows of samples that pass the checks; "FILE: kind: what is wrong" of others.

    A broken picture that has labels stops the conversion (the download is broken); any other is left out.
    """
    if multiprocessing.parent_process() is not None: limit_memory(MEMORY)    # a worker reads foreign files
    rows, skipped = [], []
    for sample in job:
        try: rows.append(convert_sample(root, side, skeleton, sample))
        except Missing as reason: skipped.append(f"{sample}: {reason}")
        except InputError as error:
            if sample.keypoints is not None: raise
            skipped.append(str(error))
    if len(kinds := {tuple(row) for row in rows}) > 1:
        names = ", others ".join(map(str, sorted(kinds)))
        raise InputError(f"{root}: of samples {job[0]} to {job[-1]} some have {names}: a reader gives labels "
                         "to all of its samples or to none, and masks alike")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}, skipped


def convert_sample(root: Path, side: int, skeleton: dict, sample: Sample) -> dict[str, np.ndarray]:
    """A row of each array; Missing, "kind: what is wrong", where the sample has to be left out."""
    if sample.keypoints is None:
        image, _, _ = open_sample(root, sample, side, 0)
        size = np.array(image.shape[1::-1])  # the crop: the square at its centre
        return {"images": crop_square(image, (size - size.min()) / 2, size.min(), side)}
    held = sample.keypoints if sample.around is None else np.vstack([sample.keypoints, sample.around])
    window = crop_window(to_uv(held, sample.intrinsics), skeleton["box"])
    image, mask, size = open_sample(root, sample, side, window[1] if np.isfinite(window[1]) else 0)
    uv = to_uv(sample.keypoints, sample.intrinsics, sample.distortion)     # (K, 2) px
    fault = fault_of(skeleton["joints"], sample.keypoints, uv, size, mask, sample.uv, sample.tolerance,
                     sample.left)
    if not fault and sample.around is not None and sample.around[:, 2].min() < 100:
        fault = "projection: the crop has to hold a point less than 100 mm before the camera"
    if fault: raise Missing(fault)
    return crop_sample(sample, image, mask, size, window, side)


# ---------------------------------------------------------------- the readers: hands

FREIHAND = {  # split: its folder, pictures of a sample, folder of masks, grey values of a hand, archive
    "train": ("training", 4, "mask", (128, 255), "FreiHAND_pub_v2"),
    "evaluation": ("evaluation", 1, "segmap", (1, 255), "FreiHAND_pub_v2_eval")}


def read_freihand(root: Path, split: Literal["train", "evaluation"] = "train",
                  versions: str = "0123") -> tuple[int, Iterator[Sample]]:
    """FreiHAND v2 (Zimmermann et al., ICCV 2019): right hands, 224 x 224 px, our joint order, metres, camera.

    train: n = 32,560 labels and masks (hand and forearm, JPEG noise) of 4 n pictures: picture i + n v shows
    sample i on background v: 0 green screen, 1 harmonised, 2 and 3 recoloured. evaluation: n = 3,960; labels
    and masks came later, in FreiHAND_pub_v2_eval. Rows go by sample, its versions side by side.
    """
    if not versions or set(versions) - set("0123") or len(set(versions)) < len(versions):
        raise InputError(f"--versions {versions!r}: some of 0123, each once")
    part, copies, masks, foreground, archive = FREIHAND[split]
    layout = f"ROOT is {archive} with {part}_xyz.json, {part}_K.json, {part}/rgb/*.jpg, {part}/{masks}/*"
    need_files(root, [f"{part}_xyz.json", f"{part}_K.json", f"{part}/rgb/{0:08d}.jpg"], layout)
    xyz = 1000 * read_json_array(root / f"{part}_xyz.json", 21, 3)         # (n, 21, 3) m -> mm, camera
    K = read_json_array(root / f"{part}_K.json", 3, 3)                     # (n, 3, 3) px
    n, pictures = len(xyz), sum(name.endswith(".jpg") for name in os.listdir(root / part / "rgb"))
    if len(K) != n or pictures != copies * n:  # with a wrong n, i + n v is the picture of another sample
        raise InputError(f"{root}: {n} samples in {part}_xyz.json, {len(K)} in {part}_K.json, {pictures} "
                         f"pictures in {part}/rgb, where {copies} x {n} belong: an incomplete download?")
    masked = split == "train" or (root / part / masks).is_dir()
    suffix = "png" if (root / part / masks / f"{0:08d}.png").exists() else "jpg"
    copies = versions if copies > 1 else "0"
    need_files(root, (f"{part}/rgb/{i + n * int(v):08d}.jpg" for v in copies for i in range(n)), layout)
    if masked: need_files(root, (f"{part}/{masks}/{i:08d}.{suffix}" for i in range(n)), layout)

    def samples():
        for i, v in itertools.product(range(n), copies):
            mask = f"{part}/{masks}/{i:08d}.{suffix}" if masked else None
            image = f"{part}/rgb/{i + n * int(v):08d}.jpg"
            yield Sample(image, xyz[i], K[i], mask, foreground, size=(224, 224))
    return n * len(copies), samples()


LITTLE_FIRST = [0] + [4 * f + k for f in (4, 3, 2, 1, 0) for k in (1, 2, 3, 4)]  # ours = raw[these], in STB
TIP_FIRST = [0] + [4 * f + k for f in (0, 1, 2, 3, 4) for k in (4, 3, 2, 1)]     # and in each hand of RHD
STB_WRIST = {"ring": (13, 2.0), "middle": (9, 2.2)}  # wrist = knuckle + factor (palm - knuckle)
STB = {  # camera: its pictures, each with (fx, fy, cx, cy) px, and the rotation vector and shift (mm) of
    # d = R c + t: from points c in the frame of the picture's camera to points d in the labels' frame
    "bb": [("BB_left", (822.79041, 822.79041, 318.47345, 250.31296), (0, 0, 0), (0, 0, 0)),
           ("BB_right", (822.79041, 822.79041, 318.47345, 250.31296), (0, 0, 0), (120.054, 0, 0))],
    "sk": [("SK_color", (607.92271, 607.88192, 314.78337, 236.42484), (0.00531, -0.01196, 0.00301),
            (-24.0381, -0.4563, -1.2326))]}


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """Intrinsics (3, 3) px of a camera without skew."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])                 # (3, 3) px


def rotation_by(vector) -> np.ndarray:
    """Rotation matrix (3, 3) about `vector` (3,) by its length in radians."""
    x, y, z = vector
    return torch.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)).numpy()


def read_stb(root: Path, split: Split = "train", camera: Literal["bb", "sk"] = "bb",
             wrist: Literal["ring", "middle"] = "ring") -> tuple[int, Iterator[Sample]]:
    """STB, the stereo hand pose benchmark (Zhang et al., ICIP 2017): left hands, 640 x 480 px, mm.

    --split test: B1Counting and B1Random; train: B2 to B6. --camera bb: left and right picture of the stereo
    pair, labels in the left camera's frame; sk: the colour picture beside the depth camera, in whose frame
    the labels d are: c = R^T (d - t). Raw fingers go from little to thumb. Raw joint 0 is the palm's centre;
    --wrist says how it becomes a wrist: ring, ring_1 + 2 (palm - ring_1), which most code does, or middle,
    middle_1 + 2.2 (palm - middle_1). No 2D labels, no lens distortion, no masks.
    """
    layout = ("ROOT has images/B1Counting/BB_left_0.png .. and labels/B1Counting_BB.mat .., B1 to B6, "
              "Counting and Random; a zip without a folder in it is to be unpacked into one")
    sequences = [f"B{i}{kind}" for i in ([1] if split == "test" else [2, 3, 4, 5, 6])
                 for kind in ("Counting", "Random")]
    need_files(root, [f"labels/{name}_{camera.upper()}.mat" for name in sequences], layout)

    def joints(name: str) -> np.ndarray:
        path = root / f"labels/{name}_{camera.upper()}.mat"
        raw = read_mat(path, "handPara")["handPara"]                       # (3, 21, n) mm
        if raw.ndim != 3 or raw.shape[:2] != (3, 21):
            raise InputError(f"{path}: handPara is {raw.shape}, not (3, 21, n)")
        hands, (knuckle, factor) = raw.transpose(2, 1, 0)[:, LITTLE_FIRST], STB_WRIST[wrist]  # (n, 21, 3) mm
        hands[:, 0] = hands[:, knuckle] + factor * (hands[:, 0] - hands[:, knuckle])
        return hands

    counts = {name: len(joints(name)) for name in sequences}
    need_files(root, [f"images/{name}/{kind}_{i}.png" for name, n in counts.items()
                      for kind, *_ in STB[camera] for i in range(n)], layout)

    def samples() -> Iterator[Sample]:
        for name in sequences:
            for i, hand in enumerate(joints(name)):
                for kind, lens, turn, shift in STB[camera]:
                    there = (hand - shift) @ rotation_by(turn)             # (21, 3) rows: R^T of columns
                    yield Sample(f"images/{name}/{kind}_{i}.png", there, pinhole(*lens), size=(640, 480),
                                 left=True)
    return sum(counts.values()) * len(STB[camera]), samples()


def more_left(path: Path) -> bool:
    """Whether an index mask of RHD shows more of the left hand (2 .. 17) than of the right (18 .. 33)."""
    with reading(path, "mask"), Image.open(path, formats=PICTURES) as mask:
        if mask.mode not in "LP": raise ValueError(f"{mask.mode}, not one index a pixel")
        pixels = mask.histogram()
    return sum(pixels[2:18]) > sum(pixels[18:34])


def read_rhd(root: Path, split: Literal["train", "evaluation"] = "train") -> tuple[int, Iterator[Sample]]:
    """RHD, rendered hand poses (Zimmermann & Brox, ICCV 2017), version 2: 320 x 320 px, metres, camera frame.

    --split train or evaluation. Each picture has labels of both hands of a person, 0-20 left, 21-41 right,
    fingers from tip to palm, and 2D labels. Of the two that with more pixels in the mask is taken, as the
    publisher's code does: so this reader alone looks into masks. All 21 joints are used, hidden ones too. A
    mask is an index: 0 background, 1 person, 2-17 left hand, 18-33 right hand. Its K has the principal point
    at 160 of 320 px, which may count from the picture's edge (not said, and left as it is: half a pixel).
    """
    part = "training" if split == "train" else split
    layout = f"ROOT is RHD_published_v2 with {part}/anno_{part}.pickle, {part}/color and mask/00000.png .."
    path, shapes = root / part / f"anno_{part}.pickle", {"xyz": (42, 3), "uv_vis": (42, 3), "K": (3, 3)}
    need_files(root, [f"{part}/anno_{part}.pickle"], layout)
    labels = read_pickle(path)                                             # {number: {"xyz": array, ..}}
    with reading(path, "file of labels"):
        for i in sorted(labels):
            found = {key: np.asarray(labels[i][key], float).shape for key in shapes}
            if found != shapes or not isinstance(i, int):
                raise ValueError(f"sample {i!r} has {found}, not {shapes}")
    need_files(root, [f"{part}/{kind}/{i:05d}.png" for kind in ("color", "mask") for i in labels], layout)

    def samples() -> Iterator[Sample]:
        for i in sorted(labels):
            label, mask = labels[i], f"{part}/mask/{i:05d}.png"
            left = more_left(root / mask)
            rows = np.array(TIP_FIRST) + (0 if left else 21)               # (21,)
            yield Sample(f"{part}/color/{i:05d}.png", 1000.0 * label["xyz"][rows], np.float64(label["K"]),
                         mask, (2, 17) if left else (18, 33), label["uv_vis"][rows, :2], (320, 320),
                         left=left)
    return len(labels), samples()


PAN_TEST = "171204_pose3"


def pan_cameras(path: Path, views: str) -> dict[str, tuple]:
    """HD cameras of a calibration file, or those numbered in `views`: name "00_07" -> size (width, height),
    K (3, 3) px, distortion (5,), and R (3, 3), t (3,) mm from the dome's frame to the camera's."""
    with reading(path, "calibration"):
        array = lambda value, *shape: np.array(value, float).reshape(shape)  # noqa: E731
        found = {c["name"]: (tuple(array(c["resolution"], 2).astype(int).tolist()), array(c["K"], 3, 3),
                             array(c["distCoef"], 5), array(c["R"], 3, 3), 10 * array(c["t"], 3))  # cm -> mm
                 for c in json.loads(path.read_text())["cameras"] if c["type"] == "hd"}
    wanted = [f"00_{view.strip():>02}" for view in views.split(",")] if views else sorted(found)
    if missing := set(wanted) - set(found):
        raise InputError(f"{path}: has no HD view {min(missing)}; mend --views")
    return {name: found[name] for name in wanted}


def pan_hands(path: Path, score: float, error: float) -> list[tuple[bool, np.ndarray]]:
    """Hands of a frame: (is it a left one, (21, 3) mm, dome). Left out are people without an identity, and
    hands with a joint that is not valid, below `score`, or off the views by more than `error` px."""
    with reading(path, "file of labels"):
        people = [person for person in json.loads(path.read_text())["people"] if person["id"] != -1]
        hands = [(side, p[side]) for p in people for side in ("left_hand", "right_hand") if p.get(side)]
        return [(side == "left_hand", 10 * np.array(hand["landmarks"], float).reshape(21, 3))  # cm -> mm
                for side, hand in hands
                if np.min(hand["validity"]) == 1 and np.min(hand["averageScore"]) >= score
                and np.max(hand["averageReproError"]) <= error]


def in_view(keypoints: np.ndarray, K: np.ndarray, distortion: np.ndarray, size: tuple) -> bool:
    """Whether all joints (n, 3) mm, camera, lie in a picture of `size` (width, height). A lens's polynomial
    folds what is far outside back into it: so without the lens they may lie outside by a quarter of it."""
    straight, uv, size = to_uv(keypoints, K), to_uv(keypoints, K, distortion), np.array(size)
    return bool((keypoints[:, 2] > 0).all() and ((uv >= 0) & (uv <= size - 1)).all()
                and ((straight >= -size / 4) & (straight <= 1.25 * size)).all())


def read_pan(root: Path, split: Split = "train", stride: int = 30, views: str = "", score: float = 0.3,
             error: float = 20.0) -> tuple[int, Iterator[Sample]]:
    """PAN, hands of the CMU Panoptic Studio (Joo et al., TPAMI 2017): 31 HD views, 1920 x 1080 px, cm, dome.

    --split test: the sequence 171204_pose3; train: all others in ROOT. Of the frames (29.97 a second) those
    whose number is a multiple of --stride, in the --views given (as 0,7,30; empty: all), from hdImgs if that
    is there, else from hdVideos. Both hands of everyone, our joint order, if all 21 joints are valid, of
    --score at least, off by --error px at most, and in the picture; X_c = R X + t. The lens bends by 20 px
    and more. A hand may be hidden in a view. No 2D labels, no masks.
    """
    layout = ("ROOT has SEQ/calibration_SEQ.json, SEQ/hdHand3d/handRecon3D_hd00000000.json .. (hdHand3d.tar) "
              "and SEQ/hdImgs/00_00/00_00_00000000.jpg .. or SEQ/hdVideos/hd_00_00.mp4 ..")
    files = "handRecon3D_hd" + 8 * "[0-9]" + ".json"                       # no "copy of", no " (1)"
    frames = {folder.parent.name: sorted(int(file.stem[-8:]) for file in folder.glob(files))
              for folder in sorted(root.glob("*/hdHand3d"))}
    frames = {name: [i for i in numbers if i % stride == 0] for name, numbers in frames.items()
              if (name == PAN_TEST) == (split == "test")}
    if not any(frames.values()): raise InputError(f"{root}: no labels of split {split}. {layout}")
    need_files(root, [f"{name}/calibration_{name}.json" for name in frames], layout)
    cameras = {name: pan_cameras(root / name / f"calibration_{name}.json", views) for name in frames}

    def hands(name: str, i: int) -> list:
        return pan_hands(root / name / f"hdHand3d/handRecon3D_hd{i:08d}.json", score, error)

    def shot(name: str, view: str, i: int) -> tuple[str, int | None]:
        if not (root / name / "hdImgs").is_dir(): return f"{name}/hdVideos/hd_{view}.mp4", i
        return f"{name}/hdImgs/{view}/{view}_{i:08d}.jpg", None

    for name, view in ((name, view) for name in frames for view in cameras[name]):
        need_files(root, [shot(name, view, i)[0] for i in frames[name]], layout)

    def samples() -> Iterator[Sample]:
        for name in frames:
            seen = [(i, *hand) for i in frames[name] for hand in hands(name, i)]
            for view, (size, K, distortion, R, t) in cameras[name].items():  # a video in its order
                for i, left, points in seen:
                    there = points @ R.T + t                               # (21, 3) mm, camera
                    if not in_view(there, K, distortion, size): continue
                    image, frame = shot(name, view, i)
                    yield Sample(image, there, K, size=size, frame=frame, left=left, distortion=distortion)

    most = {name: max((len(hands(name, i)) for i in frames[name][::100]), default=0) for name in frames}
    return sum(len(frames[name]) * len(cameras[name]) * max(2, most[name]) for name in frames), samples()


GAN_FILES = {"joint2D": 42, "joint_pos_global": 63, "crop_params": 3}      # numbers in each


def gan_numbers(path: Path, count: int) -> np.ndarray:
    """The numbers (count,) of a text file: one line, separated by commas."""
    with reading(path, "file of labels"):
        numbers = np.array(path.read_text().strip().strip(",").split(","), float)
        if len(numbers) != count: raise ValueError(f"{len(numbers)} numbers, not {count}")
        return numbers


def read_gan(root: Path, split: Split = "train", share: float = 0.1,
             seed: int = 0) -> tuple[int, Iterator[Sample]]:
    """GAN, GANerated Hands (Mueller et al., CVPR 2018): left hands, crops of 256 px, mm, camera, our order.

    There is no official split. A folder (up to 1,024 neighbouring frames) is --split test with probability
    --share, by a draw from --seed and its own name, else train. All joints are labelled, hidden or not, and
    have 2D labels. A crop is a square at (u, v) of a picture of 640 x 480 px scaled to 256 px; whether
    crop_params gives the factor or its inverse is told by which puts the joints on the 2D labels. No masks.
    """
    if not 0 <= share <= 1: raise InputError(f"--share {share:g}: the part that is test, 0 to 1")
    layout = ("ROOT is GANeratedHands_Release with data/noObject/0001/0001_color_composed.png, and beside it "
              "0001_joint2D.txt, 0001_joint_pos_global.txt, 0001_crop_params.txt; so too data/withObject")
    need_files(root, ["data/noObject", "data/withObject"], layout)
    folders = sorted(f"data/{path.parent.name}/{path.name}" for path in root.glob("data/*Object/*"))
    folders = [name for name in folders
               if (random_generator(seed, f"gan {name}").random() < share) == (split == "test")
               and (root / name).is_dir()]

    def frames(folder: str) -> list[str]:
        end = "_color_composed.png"
        return sorted(f"{folder}/{file.removesuffix(end)}" for file in os.listdir(root / folder)
                      if file.endswith(end))

    count = 0
    for starts in map(frames, folders):
        need_files(root, [f"{start}_{kind}.txt" for start in starts for kind in GAN_FILES], layout)
        count += len(starts)
    if not count: raise InputError(f"{root}: no pictures in split {split} of share {share}. {layout}")

    def samples() -> Iterator[Sample]:
        for start in (start for folder in folders for start in frames(folder)):
            uv, points, (u, v, scale) = (gan_numbers(root / f"{start}_{kind}.txt", n)
                                         for kind, n in GAN_FILES.items())
            if not scale > 0: raise InputError(f"{root / start}_crop_params.txt: scale {scale}")
            uv, points = uv.reshape(21, 2), points.reshape(21, 3)          # px of the crop; mm, camera
            views = [pinhole(617.173 * s, 617.173 * s, (315.453 - u) * s, (242.259 - v) * s)
                     for s in (scale, 1 / scale)]
            K = min(views, key=lambda K: np.abs(to_uv(points, K) - uv).max())
            yield Sample(f"{start}_color_composed.png", points, K, uv=uv, size=(256, 256), left=True)
    return count, samples()


# ---------------------------------------------------------------- the readers: bodies, photographs

# Where our 17 joints stand in the publisher's own list; -1: nowhere.
H36M_JOINTS = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27]    # of 32, some of them twice
SMPL_JOINTS = [0, 2, 5, 8, 1, 4, 7, 6, 12, -1, -1, 16, 18, 20, 17, 19, 21]     # of 24: no nose, no head top
MIRRORED_SMPL = [0, 1, 4, 7, 2, 5, 8, 6, 12, -1, -1, 17, 19, 21, 16, 18, 20]   # left for right
OPENPOSE_JOINTS = [-1, 8, 9, 10, 11, 12, 13, -1, 1, -1, -1, 5, 6, 7, 2, 3, 4]  # of 18
MPI_JOINTS = {"train": [4, 23, 24, 25, 18, 19, 20, 3, 5, 6, 7, 9, 10, 11, 14, 15, 16],  # of 28
              "test": [14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4]}       # of 17
H36M_SUBJECTS = {"train": ("S1", "S5", "S6", "S7", "S8"), "test": ("S9", "S11")}
MPI_FRAMES = dict(zip((f"S{subject}/Seq{sequence}" for subject in range(1, 9) for sequence in (1, 2)), (
    6416, 12430, 6502, 6081, 12488, 12283, 6171, 6675, 12820, 12312, 6188, 6145, 6239, 6320, 6468, 6054)))
SURREAL_CAMERA = pinhole(600.0, 600.0, 159.5, 119.5)  # published: 160, 120, counted from the picture's edge
SURREAL_AXES = np.array([[0.0, 0, -1], [0, 1, 0], [-1, 0, 0]])                 # world -> camera, a reflection
ALL_BUT_ROOT = {  # indices of the joints over which errors are averaged, and what to say with the number
    "compare": list(range(1, 17)),
    "protocol": "16 joints; the pelvis is aligned and does not count (if it did: 16/17 of the error)"}
MPI_COMPARED = ALL_BUT_ROOT | {
    "protocol": ALL_BUT_ROOT["protocol"] + "; it lies above Human3.6M's, which adds to every joint's error"}
SMPL_COMPARED = {
    "compare": [1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 14, 15, 16],
    "protocol": "13 joints of SMPL (hips, knees, ankles, neck, shoulders, elbows, wrists) from its pelvis; "
                "hips and pelvis are not Human3.6M's: not comparable with Table 2, on regressed joints"}


def body_joints(joints: np.ndarray, places: list) -> np.ndarray:
    """The publisher's joints (K, C) in our order, (17, C) float64; NaN where `places` has -1."""
    return np.vstack([joints, np.full((1, joints.shape[1]), np.nan)])[places]


def head_top(smpl: np.ndarray) -> np.ndarray:
    """About the top of the head, (1, 3), of SMPL's joints (24, 3): no label, but the crop has to hold it."""
    return smpl[15:16] + 0.7 * (smpl[15:16] - smpl[9:10])


def read_positions(path: Path, axes: int) -> np.ndarray:
    """Human3.6M's file of positions, (1, F, 32 * axes) in a CDF, as (F, 32, axes) float64."""
    pose = read_cdf(path, "Pose")
    if pose.ndim != 3 or pose.shape[::2] != (1, 32 * axes) or not np.isfinite(pose).all():
        raise InputError(f"{path}: Pose {pose.shape}; not (1, frames, {32 * axes}) finite numbers")
    return pose.reshape(-1, 32, axes).astype(float)


def lens_of(points: np.ndarray, uv: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The camera `name` that takes points (.., 3) mm, camera, to uv (.., 2) px, by least squares.

    Returns intrinsics (3, 3) px and distortion (5,) k1 k2 p1 p2 k3; InputError if it misses by half a pixel.
    With r2 = x x + y y, u = fx (x (1 + k1 r2 + k2 r2^2 + k3 r2^3) + 2 p1 x y + p2 (r2 + 2 x x)) + cx is
    linear in fx, cx and fx times k, p; v has fy times the same k, p. In these few pixels fy is
    taken to be fx: Human3.6M's are a thousandth apart.
    """
    step = points.size // 60000 | 1                                        # odd: of 32 joints all get a turn
    points, uv = points.reshape(-1, 3)[::step], uv.reshape(-1, 2)[::step]
    x, y = (points[:, :2] / points[:, 2:]).T                               # (n,)
    r2, none, one = x * x + y * y, np.zeros(len(x)), np.ones(len(x))
    bent = np.array([[x * r2, y * r2], [x * r2 ** 2, y * r2 ** 2], [2 * x * y, r2 + 2 * y * y],
                     [r2 + 2 * x * x, 2 * x * y], [x * r2 ** 3, y * r2 ** 3]])                 # (5, 2, n)
    columns = np.array([[x, none], [one, none], [none, y], [none, one], *bent]).reshape(9, -1).T  # (2 n, 9)
    try: solution = np.linalg.lstsq(columns, uv.T.ravel(), rcond=None)[0]
    except np.linalg.LinAlgError as error: raise InputError(f"{name}: no lens fits: {error}") from error
    fx, cx, fy, cy = solution[:4]
    apart = np.quantile(np.abs(columns @ solution - uv.T.ravel()), 0.99)
    if apart > 0.5:
        raise InputError(f"{name}: no lens takes its 3D to its 2D positions, {apart:.1f} px remain; are "
                         "these one download's files, D3_Positions_mono and D2_Positions?")
    return pinhole(fx, fy, cx, cy), solution[4:] * 2 / (fx + fy)


def h36m_place(root: Path, subject: str, kind: str) -> str:
    """The folder of a subject's positions in ROOT: as unpacked, or one folder for each download."""
    here, there = f"{subject}/MyPoseFeatures/{kind}", f"{subject}/Poses_{kind}"
    return there if (root / there).is_dir() else here


def h36m_positions(root: Path, subject: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a video, (F, 32, 3) mm in the camera frame and (F, 32, 2) px."""
    points = read_positions(root / h36m_place(root, subject, "D3_Positions_mono") / f"{name}.cdf", 3)
    uv = read_positions(root / h36m_place(root, subject, "D2_Positions") / f"{name}.cdf", 2)
    return points[:len(uv)], uv[:len(points)]


def read_h36m(root: Path, split: Split = "train", stride: int = 5,
              masks: Literal["yes", "no"] = "yes") -> tuple[int, Iterator[Sample]]:
    """Human3.6M (Ionescu et al., PAMI 2014): videos of 1000 x 1000 (1002) px, 50 frames a second.

    train: subjects 1, 5, 6, 7, 8; test: 9, 11; of every video each `stride`-th frame. Millimetres, camera
    (the positions called mono; mono_universal is another body), 17 of the publisher's 32 joints. Frame i of a
    video is pose i. Intrinsics and lens are not in these files: they are fitted to the publisher's 3D and 2D
    positions, for each subject and camera. Masks (ground_truth_bs) are what pre-training needs of its source;
    --masks no goes without. Left out: "_ALL", no action; S11's Directions, camera 54138969, corrupt.
    """
    layout = ("ROOT holds S1/Videos/*.mp4, S1/MyPoseFeatures/D3_Positions_mono/*.cdf and D2_Positions/*.cdf "
              "(or S1/Poses_.. for both), S1/MySegmentsMat/ground_truth_bs/*.mat (or --masks no), S5 ..")

    videos, lenses, longest = {}, {}, 0
    for subject in H36M_SUBJECTS[split]:
        kinds = {f"{subject}/Videos": ".mp4", h36m_place(root, subject, "D3_Positions_mono"): ".cdf"}
        found = {path.stem for folder, end in kinds.items() for path in (root / folder).glob(f"*{end}")}
        kinds[h36m_place(root, subject, "D2_Positions")] = ".cdf"
        if masks == "yes": need_files(root, [f"{subject}/MySegmentsMat/ground_truth_bs"], layout)
        names = sorted(name for name in found if not name.startswith("_ALL")
                       and (subject, name) != ("S11", "Directions.54138969")) or ["*"]  # none: said below
        need_files(root, [f"{folder}/{name}{end}" for folder, end in kinds.items() for name in names], layout)
        for name in names: videos.setdefault((subject, name.rpartition(".")[2]), []).append(name)
    for (subject, camera), names in videos.items():
        some = [h36m_positions(root, subject, name) for name in names[::max(1, len(names) // 4)]]
        longest = max(longest, *(len(uv) for _, uv in some))
        points, uv = (np.concatenate(parts) for parts in zip(*some))       # (n, 32, 3) mm, (n, 32, 2) px
        lenses[subject, camera] = lens_of(points, uv, f"{root / subject}, camera {camera}")

    def samples() -> Iterator[Sample]:
        for (subject, camera), names in videos.items():
            for name in names:
                points, uv = (part[:, H36M_JOINTS] for part in h36m_positions(root, subject, name))
                mask = f"{subject}/MySegmentsMat/ground_truth_bs/{name}.mat" if masks == "yes" else None
                K, distortion = lenses[subject, camera]
                for i in range(0, len(points), stride):
                    yield Sample(f"{subject}/Videos/{name}.mp4", points[i], K, mask, (1, 255), uv[i], frame=i,
                                 mask_key=i if mask else None, distortion=distortion, tolerance=1.0)
    return sum(map(len, videos.values())) * -(-longest // stride), samples()


def read_3dpw(root: Path, split: Literal["train", "validation", "test"] = "train",
              stride: int = 1) -> tuple[int, Iterator[Sample]]:
    """3DPW (von Marcard et al., ECCV 2018): one or two people outdoors, a moving camera, 1920 x 1080 px.

    One sample for each person in each `stride`-th frame in which the camera's pose is valid and the person
    was detected (the publisher's rule). Joints of the SMPL model, metres, world; cam_poses[i] takes them to
    the camera of frame i. No joint of SMPL is our nose or head top (NaN), and its pelvis and hips are not
    Human3.6M's. poses2d is a network's detection: the better half of it only tells whose joints these are.
    """
    layout = f"ROOT holds sequenceFiles/{split}/SEQUENCE.pkl and imageFiles/SEQUENCE/image_00000.jpg .."
    twice = root / "sequenceFiles/sequenceFiles"  # as some unpack it
    files = sorted(((twice if twice.is_dir() else twice.parent) / split).glob("*.pkl"))
    if not files: raise InputError(f"{twice.parent / split}: no sequence here. {layout}")
    need_files(root, [f"imageFiles/{file.stem}/image_00000.jpg" for file in files], layout)

    def samples() -> Iterator[Sample]:
        for file in files:
            cameras, K, people = read_sequence(file)
            images = [f"imageFiles/{file.stem}/image_{i:05d}.jpg" for i in range(len(cameras))]
            need_files(root, images, f"{file.name} has {len(images)} frames. {layout}")
            for i, (joints, seen, valid) in itertools.product(range(0, len(images), stride), people):
                if not valid[i] or not seen[i].any(): continue
                R, t = cameras[i, :3, :3], cameras[i, :3, 3]               # (3, 3); (3,) mm
                smpl = joints[i] @ R.T + t                                 # (24, 3) mm, camera
                keypoints = body_joints(smpl, SMPL_JOINTS)                 # (17, 3)
                uv = body_joints(np.where(seen[i, 2] > 0, seen[i, :2], np.nan).T, OPENPOSE_JOINTS)
                apart = np.linalg.norm(uv - (projected := to_uv(keypoints, K)), axis=1)        # (17,) px
                uv[~(apart <= np.nanmedian(apart))] = np.nan               # its worse half: hidden, mistaken
                known = projected[np.isfinite(projected).all(axis=1)]
                height = np.ptp(known, axis=0).max() if len(known) else 0
                yield Sample(images[i], keypoints, K, uv=uv, tolerance=max(10.0, 0.15 * height),
                             around=head_top(smpl))

    frames = (len(os.listdir(root / "imageFiles" / file.stem)) for file in files)
    return 2 * sum(-(-n // stride) for n in frames), samples()


def read_sequence(path: Path) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    """A sequence of 3DPW: world -> camera (F, 4, 4) mm; intrinsics (3, 3) px; for each person joints
    (F, 24, 3) mm, world, detections (F, 3, 18) u, v, confidence, and whether the camera is known (F,)."""
    found = read_pickle(path)
    with reading(path, "sequence of 3DPW"):
        cameras = np.reshape(found["cam_poses"], (-1, 4, 4)).astype(float)
        cameras[:, :3, 3] *= 1000                                          # m -> mm
        people = [(1000 * np.reshape(joints, (len(cameras), 24, 3)),
                   np.reshape(seen, (len(cameras), 3, 18)).astype(float), np.reshape(valid, len(cameras)))
                  for joints, seen, valid in zip(found["jointPositions"], found["poses2d"],
                                                 found["campose_valid"], strict=True)]
        return cameras, np.reshape(found["cam_intrinsics"], (3, 3)).astype(float), people


def read_calibration(path: Path) -> dict[int, tuple]:
    """MPI-INF-3DHP's camera.calibration: {camera: ((width, height) px, intrinsics (3, 3) px)}.

    By words, not by columns: the numbers are of any length.
    """
    cameras = {}
    with reading(path, "camera.calibration"):
        for part in path.read_text().split("name")[1:]:
            words = part.split()
            size, matrix = (words.index(word) + 1 for word in ("size", "intrinsic"))
            K = np.reshape([float(word) for word in words[matrix:matrix + 16]], (4, 4))[:3, :3]
            cameras[int(words[0])] = (tuple(int(word) for word in words[size:size + 2]), K)
    return cameras


def universal(points: np.ndarray, normalised: np.ndarray, file: Path) -> np.ndarray:
    """annot3 (F, 17, 3) mm, camera, enlarged so that the poses from the pelvis are those of univ_annot3.

    univ_annot3 is annot3 with each person enlarged to one height, and stands elsewhere: it does not project.
    The scaled pose does: a person s times as large and s times as far looks the same. InputError if there is
    no such s.
    """
    own, other = (x - x[:, :1] for x in (points, normalised))
    s = (own * other).sum() / (own * own).sum()
    if not np.abs(s * own - other).max() < 1:
        raise InputError(f"{file}: univ_annot3 is not annot3 enlarged; use --labels annot3")
    return s * points


def training_3dhp(root: Path, labels: str, stride: int, cameras: str) -> tuple[int, Iterator[Sample]]:
    """The training half of read_3dhp."""
    try: chosen = [int(word) for word in cameras.split(",")]
    except ValueError as error: raise InputError(f"--cameras {cameras}: give numbers, as 0,1,2") from error
    if len(set(chosen)) < len(chosen): raise InputError(f"--cameras {cameras}: each once")
    layout = "ROOT holds S1/Seq1/annot.mat, camera.calibration, imageSequence/video_0.avi .., S1/Seq2, S2 .."
    files = ["annot.mat", "camera.calibration", *(f"imageSequence/video_{c}.avi" for c in chosen)]
    need_files(root, [f"{name}/{file}" for name in MPI_FRAMES for file in files], layout)
    calibrated = {name: read_calibration(root / name / "camera.calibration") for name in MPI_FRAMES}
    for name, known in calibrated.items():
        if missing := set(chosen) - set(known):
            raise InputError(f"{root / name}/camera.calibration: has no camera {min(missing)}")

    def samples() -> Iterator[Sample]:
        for name, frames in MPI_FRAMES.items():  # annot.mat has rows beyond the video's end
            file, places = root / name / "annot.mat", MPI_JOINTS["train"]
            keys = {"annot2": 2, "annot3": 3, labels: 3}                   # two, if labels is annot3 itself
            found = in_a_process(partial(read_mat, kinds=("cell",)), file, *keys)
            for c in chosen:
                with reading(file, f"file of labels (camera {c})"):
                    uv, points, *other = (np.reshape(found[key][c, 0], (-1, 28, axes))[:frames, places]
                                          for key, axes in keys.items())
                size, K = calibrated[name][c]
                points = universal(points, other[0], file) if other else points
                for i in range(0, len(points), stride):
                    yield Sample(f"{name}/imageSequence/video_{c}.avi", points[i], K, uv=uv[i], size=size,
                                 frame=i, tolerance=1.0)
    return sum(len(range(0, n, stride)) for n in MPI_FRAMES.values()) * len(chosen), samples()


def testing_3dhp(root: Path, labels: str) -> tuple[int, Iterator[Sample]]:
    """The test half of read_3dhp."""
    base = "mpi_inf_3dhp_test_set/" if (root / "mpi_inf_3dhp_test_set").is_dir() else ""
    layout = "ROOT holds mpi_inf_3dhp_test_set/TS1/annot_data.mat, imageSequence/img_000001.jpg, .. TS6"
    files = ("annot_data.mat", "imageSequence/img_000001.jpg")
    need_files(root, [f"{base}TS{i}/{file}" for i in range(1, 7) for file in files], layout)

    def samples() -> Iterator[Sample]:
        for name in (f"{base}TS{i}" for i in range(1, 7)):
            file, axes = root / name / "annot_data.mat", {"annot2": 2, "annot3": 3, "univ_annot3": 3}
            found = in_a_process(read_h5, file, *axes, "valid_frame")
            n = found["valid_frame"].size
            for key, last in axes.items():
                if found[key].shape != (n, 1, 17, last):
                    raise InputError(f"{file}: {key} {found[key].shape}, not {(n, 1, 17, last)}")
            valid = np.flatnonzero(found["valid_frame"].ravel() == 1)      # (V,) rows
            uv, points, other = (found[key][valid, 0][:, MPI_JOINTS["test"]].astype(float) for key in axes)
            with reading(file, "file of labels"): K = pinhole_of(points.reshape(-1, 3), uv.reshape(-1, 2))
            points = universal(points, other, file) if labels == "univ_annot3" else points
            images = [f"{name}/imageSequence/img_{row + 1:06d}.jpg" for row in valid]
            need_files(root, images, layout)
            for image, keypoints, seen in zip(images, points, uv):
                yield Sample(image, keypoints, K, uv=seen, tolerance=5.0)
    return 2929, samples()


def read_3dhp(root: Path, split: Split = "train", labels: Literal["univ_annot3", "annot3"] = "univ_annot3",
              stride: int = 10, cameras: str = "0,1,2,4,5,6,7,8") -> tuple[int, Iterator[Sample]]:
    """MPI-INF-3DHP (Mehta et al., 3DV 2017): train S1 to S8, videos; test TS1 to TS6, valid frames.

    Millimetres, camera; 17 of 28 joints in train, all 17 in test; the pelvis lies above Human3.6M's. --labels
    univ_annot3 (people enlarged to one height: the official protocol) or annot3 (as they are). The cameras
    of train are in camera.calibration, that of a test sequence is fitted to annot3 and annot2. --stride and
    --cameras (the customary 8 of 14: none at the ceiling) choose from train only, 25 or 50 frames a second.
    Frame i of a video is row i; img_000001.jpg is row 0. No masks are read: a target needs none.
    """
    return training_3dhp(root, labels, stride, cameras) if split == "train" else testing_3dhp(root, labels)


def read_surreal(root: Path, split: Literal["train", "val", "test"] = "train",
                 frames: Literal["middle", "all"] = "middle", stride: int = 1,
                 runs: str = "012") -> tuple[int, Iterator[Sample]]:
    """SURREAL (Varol et al., CVPR 2017): rendered bodies, 320 x 240 px clips of mostly 100 frames.

    The middle frame of every clip (so is val evaluated), or each `stride`-th with --frames all. Joints of the
    SMPL model, metres, world; its camera is a mirror (det M = -1): the picture shows the body's left as its
    right, so their names change places. Nose and head top are NaN; pelvis and hips are not Human3.6M's. A
    person partly outside the picture is kept if half of the joints are inside. Masks: segm_1 .. segm_T, body
    parts 1 .. 24.
    """
    if not runs or set(runs) - set("012") or len(set(runs)) < len(runs):
        raise InputError(f"--runs {runs!r}: some of 012, each once")
    if stride > 1 and frames == "middle": raise InputError(f"--stride {stride}: goes with --frames all")
    base = next((base for base in ("SURREAL/data/cmu", "data/cmu") if (root / base).is_dir()), "cmu")
    layout = (f"ROOT holds cmu/{split}/run0/SEQUENCE/SEQUENCE_c0001.mp4, SEQUENCE_c0001_info.mat and "
              "SEQUENCE_c0001_segm.mat, .., run1, run2")
    ends = (".mp4", "_info.mat", "_segm.mat")
    clips = sorted({path.relative_to(root).as_posix()[:-len(end)] for run in sorted(runs) for end in ends
                    for path in (root / base / split / f"run{run}").glob(f"*/*{end}")})
    if not clips: raise InputError(f"{root / base / split}: no clips here. {layout}")
    need_files(root, [clip + end for clip in clips for end in ends], layout)

    def samples() -> Iterator[Sample]:
        for clip in clips:
            path = root / f"{clip}_info.mat"
            info = read_mat(path, "joints2D", "joints3D", "camLoc")
            with reading(path, "file of labels"):  # a clip of one frame lacks the last axis
                uv, joints = (np.reshape(info[f"joints{n}D"], (n, 24, -1)).astype(float) for n in (2, 3))
                uv -= 0.5                                                  # pixel centres at integers
                joints = 1000 * (joints - np.reshape(info["camLoc"], (3, 1, 1)))
                if not 0 < joints.shape[2] == uv.shape[2]: raise ValueError("no frames, or not as many in 2D")
            T = joints.shape[2]
            for i in [T // 2] if frames == "middle" else range(0, T, stride):
                smpl = (SURREAL_AXES @ joints[:, :, i]).T                  # (24, 3) mm, camera
                keypoints, seen = (body_joints(found, MIRRORED_SMPL) for found in (smpl, uv[:, :, i].T))
                yield Sample(f"{clip}.mp4", keypoints, SURREAL_CAMERA, f"{clip}_segm.mat", (1, 255), seen,
                             (320, 240), i, f"segm_{i + 1}", tolerance=1.0, around=head_top(smpl))
    return len(clips) * (1 if frames == "middle" else -(-100 // stride)), samples()


def read_photos(root: Path) -> tuple[int, Iterator[Sample]]:
    """Any folder of photographs and its subfolders, as ImageNet's validation images, without labels: X_C."""
    kinds = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    files, seen = [], {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):         # collections are made of links
        real = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for place, name in real.items() if place not in seen)   # each folder once
        seen |= real.keys()
        files += [(Path(folder) / name).relative_to(root).as_posix() for name in names
                  if Path(name).suffix.lower() in kinds]
    files.sort()
    if not files: raise InputError(f"{root}: no photographs here ({', '.join(kinds)})")
    return len(files), map(Sample, files)


READERS = {  # name on the command line: (reader, skeleton, share of the samples that may be left out)
    "freihand": (read_freihand, HAND, 0.05),
    "stb": (read_stb, HAND, 0.05),
    "rhd": (read_rhd, HAND, 0.05),
    "pan": (read_pan, HAND, 0.05),
    "gan": (read_gan, HAND, 0.05),
    "h36m": (read_h36m, HUMAN | ALL_BUT_ROOT, 0.05),
    "3dpw": (read_3dpw, HUMAN | SMPL_COMPARED, 0.1),
    "3dhp": (read_3dhp, HUMAN | MPI_COMPARED, 0.05),
    "surreal": (read_surreal, HUMAN | SMPL_COMPARED, 0.2),
    "imagenet": (read_photos, HAND | {"joints": [], "bones": []}, 1.0),
}


def convert_dataset(name: str, root: str, out: str, side: int, workers: int, **options) -> None:
    """ROOT as its publisher ships it -> data-set folder OUT, stored crops of `side` px."""
    reader, skeleton, max_skipped = READERS[name]
    origin = " ".join([f"python data.py {name} --side {side}"] + [f"--{k} {v}" for k, v in options.items()])
    meta = {"name": name, "split": options.get("split", ""), "margin": MARGIN, "origin": origin, **skeleton}
    del meta["box"]
    if (Path(out) / "meta.json").exists() and read_meta(Path(out))["origin"] == origin:
        return print(f"{out}: converted already (this ROOT is not compared); remove it to convert again")
    before = limit_memory(MEMORY)
    try:
        count, samples = reader(Path(root), **options)
        jobs = iter(lambda: list(itertools.islice(samples, SAMPLES_A_JOB)), [])
        work = partial(convert, Path(root), side, skeleton)
        build_dataset(out, meta, jobs, -(-count // SAMPLES_A_JOB), work, workers, SAMPLES_A_JOB, max_skipped)
    finally: limit_memory(before)
    meta = read_meta(Path(out))
    some = [text.encode(errors="backslashreplace").decode() for text in meta["skipped"][:5]]  # as for stderr
    print(f"{out}: {meta['rows']} samples, {len(meta['skipped'])} left out", *some, sep="\n  ")


# ==========================================================================================================
# python data.py: show, check, and the command line
# ==========================================================================================================
COLOURS = ((230, 60, 60), (240, 170, 30), (60, 200, 80), (60, 140, 250), (200, 90, 230), (60, 210, 210))


def open_all(folder: str) -> Dataset:
    """A data set with every array that its folder holds."""
    return Dataset(folder, *(name for name in SUMMED if (Path(folder) / f"{name}.npy").exists()))


def draw_skeleton(draw: ImageDraw.ImageDraw, uv: np.ndarray, bones: list, width: int,
                  colour: tuple = ()) -> None:
    """Bones between joints uv (K, 2) px, one colour, or one for each limb; a joint may lack its label. One of
    which no bone can be drawn is a dot."""
    limb, known = -1, np.isfinite(uv).all(axis=1)
    joined = {i for bone in bones if known[list(bone)].all() for i in bone}
    for u, v in (uv[i] for i in np.flatnonzero(known) if i not in joined):
        draw.ellipse((u - width, v - width, u + width, v + width), fill=colour or COLOURS[0])
    for i, (a, b) in enumerate(bones):
        limb += i == 0 or a != bones[i - 1][1]  # a bone that starts where the last one ended goes on with it
        if not known[[a, b]].all(): continue
        ink, (u, v) = colour or COLOURS[limb % len(COLOURS)], uv[b]
        draw.line([tuple(uv[a]), tuple(uv[b])], fill=ink, width=width)
        draw.ellipse((u - width, v - width, u + width, v + width), fill=ink)


def draw_sample(dataset: Dataset, row: int, cell: int) -> Image.Image:
    """A stored crop, `cell` px wide: mask outline (white), network's crop (grey), skeleton; name below."""
    H, edge = dataset.images.shape[1], cell * (1 - 1 / dataset.meta["margin"]) / 2
    picture = Image.new("RGB", (cell, cell + 32))
    picture.paste(Image.fromarray(dataset.images[row]).resize((cell, cell), Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((edge, edge, cell - 1 - edge, cell - 1 - edge), outline=(128, 128, 128), width=2)
    if dataset.masks is not None:
        hard = Image.fromarray(dataset.masks[row]).resize((cell, cell)).point(lambda grey: 255 * (grey > 127))
        outline = hard.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3))
        picture.paste((255, 255, 255), (0, 0, cell, cell), outline)
    if dataset.keypoints is not None and dataset.intrinsics is not None:
        uv = to_uv(dataset.keypoints[row], dataset.intrinsics[row])        # (K, 2) stored px
        draw_skeleton(draw, (uv + 0.5) * cell / H - 0.5, dataset.meta["bones"], cell // 128)
    draw.text((4, cell + 2), f"{dataset.meta['name']} {dataset.meta['split']} {row}", font_size=22)
    return picture


def show(folder: str, picture: str, cell: int = 512) -> None:
    """A contact sheet of 16 samples from all over the data set, drawn at twice its size and then halved."""
    dataset = open_all(folder)
    rows = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int))
    sheet = Image.new("RGB", (4 * cell, -(-len(rows) // 4) * (cell + 32)))
    for i, row in enumerate(rows):
        sheet.paste(draw_sample(dataset, row, cell), (i % 4 * cell, i // 4 * (cell + 32)))
    write_atomically(Path(picture), lambda path: sheet.reduce(2).save(path, format="PNG"))


def check(folder: str) -> None:
    """Sizes and checksums of all arrays (an error names what is damaged), and the checks on all labels."""
    dataset = open_all(folder)
    crc, size = dataset.meta.get("crc", {}), dataset.images.shape[1:3]
    for name in ARRAYS:
        array, value, path = getattr(dataset, name), 0, Path(folder) / f"{name}.npy"
        if array is None and name not in crc: continue
        if array is None: raise InputError(f"{path}: missing; meta.json counts on it")
        for i in range(0, len(array), 256): value = zlib.crc32(np.ascontiguousarray(array[i:i + 256]), value)
        if value != crc.get(name, value):
            raise InputError(f"{path}: its checksum is not what was written; convert it again")
        print(f"{name}.npy: {array.shape} {array.dtype}, {'sound' if name in crc else 'without a checksum'}")
    if dataset.masks is not None:
        largest = max(dataset.masks[i:i + 256].max() for i in range(0, len(dataset), 256))
        if largest < 128: print(f"masks: the largest value is {largest}: no foreground (255 is, 0 is none)")
    if dataset.checksums is None: print("no checksums.npy: training cannot tell a damaged record")
    if dataset.keypoints is None or dataset.intrinsics is None or not dataset.meta["joints"]: return
    faults = []
    for i, (keypoints, K) in enumerate(zip(dataset.keypoints, dataset.intrinsics)):
        mask = dataset.masks[i] >= 128 if dataset.masks is not None else None
        if np.isfinite(keypoints).all(axis=1).sum() < 2: continue          # too few labels to be impossible
        with np.errstate(all="ignore"): uv = to_uv(keypoints, K)
        fault = fault_of(dataset.meta["joints"], keypoints, uv, size, mask)
        if fault: faults.append(f"row {i}: {fault}")
    print(f"labels: {len(faults)} of {len(dataset)} rows are impossible", *faults[:5], sep="\n  ")
    print(describe_labels(np.array(dataset.keypoints), dataset.meta))


def describe_labels(poses: np.ndarray, meta: dict) -> str:
    """What betrays another unit, or labels of which nothing is learned, of poses (n, K, 3) mm: in words."""
    parent, child = np.array(meta["bones"], int).reshape(-1, 2).T
    bones = np.linalg.norm(poses[:, child] - poses[:, parent], axis=-1)                  # (n, bones) mm
    known = np.isfinite(poses).all(-1)                                                   # (n, K)
    depth = abs(poses[..., 2] - poses[:, [meta["root"]], 2])                             # (n, K) mm
    length = f"{np.median(bones[np.isfinite(bones)]):.3g} mm" if np.isfinite(bones).any() else "unknown"
    return (f"bones: {length} in the median; joints: {100 * (1 - known.mean()):.1f} % unlabelled, "
            f"{100 * (depth > meta['depth_range'] / 2).mean():.1f} % beyond the depth range of "
            f"{meta['depth_range']:g} mm; {(~known[:, meta['root']]).sum()} rows lack the root: nothing is "
            "learned of them")


FLAGS = {"side": "px of a stored crop, MARGIN = 1.25 times as wide as the network's",
         "workers": "processes; 0: all cores"}


def main(arguments=None) -> None:
    """`python data.py ..`: render, convert, show or check."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, *places: str, kinds: dict = {}, **flags) -> None:
        line = (about or "").partition("\n")[0]
        sub = commands.add_parser(name, help=line, description=about, formatter_class=plain)
        for place in places: sub.add_argument(place, metavar=place.upper())
        for flag, value in flags.items():
            choices = get_args(kinds.get(flag)) or None                    # of a Literal
            own = {"type": type(value), "choices": choices, "metavar": "|".join(choices or "")}
            if isinstance(value, bool): own = {"action": argparse.BooleanOptionalAction}
            sub.add_argument(f"--{flag}", default=value, help=f"{FLAGS.get(flag, '')} [%(default)s]", **own)

    for kind in KINDS: command(kind, f"Render the embedded benchmark of {kind}.", "out", side=60, workers=0)
    for name, (reader, _, _) in READERS.items():  # what a reader takes beside root are its flags
        own = {p.name: p.default for p in inspect.signature(reader).parameters.values() if p.name != "root"}
        command(name, reader.__doc__, "root", "out", kinds=reader.__annotations__, **own, side=320, workers=0)
    command("show", "Draw 16 samples of a data-set folder.", "folder", "picture")
    command("check", check.__doc__, "folder")
    given = vars(parser.parse_args(arguments))
    name, side, workers = given.pop("command"), given.get("side", 16), given.get("workers", 0)
    if side < 16 or workers < 0 or given.get("stride", 1) < 1:
        raise InputError("--side is 16 or more, --stride 1 or more, --workers 0 (all cores) or more")
    if name in KINDS: make_benchmark(name, given["out"], BENCHMARK, side, workers)
    elif name in ("show", "check"): (show if name == "show" else check)(**given)
    else: convert_dataset(name, **given)


if __name__ == "__main__": run_script(main)
