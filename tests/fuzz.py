"""Feed every loader of foreign files thousands of damaged ones: each has to end in success or in one line.

    python tests/fuzz.py                                2,000 files for each loader
    python tests/fuzz.py --files 100 --only pan image   fewer; only these loaders
    python tests/fuzz.py --only rhd --case 1234         this one file again, with its traceback

Damage is of two kinds: of bytes (bits flipped, runs overwritten, zeroed, doubled, cut out or in, ends lost,
counts and offsets at their extremes), and of content (a JSON, pickle, checkpoint, MATLAB, HDF5, CDF or .npy
file whose values are replaced by others that its loader does not expect, and which is whole as a file).
A file is loaded in a worker process with limits on memory and time. A loader fails here if it raises anything
but InputError, if its message has more than two lines or does not name a file of the data, if it crashes,
hangs, opens what lies outside of its folder, starts a process, a connection or a canary's command. A crash or
hang of a reader is tried again with the command itself, which reads in worker processes and has to end in a
line.

The damage is the same each time: case i of a loader depends on (loader, i) alone.
"""
import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import h5py
import numpy as np
import safetensors.torch
import scipy.io
import torch
from PIL import Image

import data
import evaluate
import udapose as u

FORK = multiprocessing.get_context("fork")
SECONDS, MEMORY = 40, 2 << 30          # for one file; of a worker
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# ==========================================================================================================
# Damage
# ==========================================================================================================
EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40,
            (1 << 63) - 1, (1 << 64) - 1]
NUMBERS = [b"0", b"-1", b"1e308", b"-1e308", b"NaN", b"99999999999999999999", b"2147483648",
           b"null", b"[]", b"1e-320"]


def damage_bytes(rng, content: bytes, others: list[bytes]) -> bytes:
    """One kind of damage to the bytes of a file; `others` are contents to swap or splice in."""
    n, content = len(content), bytearray(content)
    at = int(rng.integers(n)) if n else 0
    if rng.random() < 0.4: at = min(at, int(rng.integers(512)))                # headers
    run = min(n - at, int(2 ** rng.uniform(0, 10)))
    other = others[rng.integers(len(others))]
    match int(rng.integers(12)):
        case 0:
            for place in rng.integers(max(0, at - 64), min(n, at + 64), rng.integers(1, 9)) if n else []:
                content[place] ^= 1 << int(rng.integers(8))
        case 1: content[at:at + run] = rng.bytes(run)
        case 2: content[at:at + run] = bytes([rng.choice([0, 255])]) * run
        case 3: del content[at:]
        case 4: content[at:at] = content[at:at + run] * int(rng.integers(1, 4))
        case 5: del content[at:at + run]
        case 6: content[at:] = other[int(rng.integers(len(other) + 1)):]
        case 7: content[:] = other
        case 8 | 9:
            size, value = int(rng.choice([1, 2, 4, 8])), EXTREMES[rng.integers(len(EXTREMES))]
            order = str(rng.choice(["little", "big"]))
            content[at:at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, order)
        case 10: content += rng.bytes(run)
        case 11:
            places = [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?", content[at:at + 4096])]
            if places:
                low, high = places[rng.integers(len(places))]
                content[at + low:at + high] = NUMBERS[rng.integers(len(NUMBERS))]
    return bytes(content)


def odd_value(rng, old, plain: bool):
    """A value that a loader does not expect in the place of `old`; `plain`: such as JSON knows."""
    odd = [None, True, -1, 0, 1, 2 ** 31, 2 ** 63 - 1, 10 ** 30, 1e308, -1e308, float("nan"),
           float("inf"), "", "x", "00_00", "../../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]], [None],
           {"x": 1}, [0] * 5000, "9" * 5000]
    if not plain:
        odd += [b"\0\1", (), np.zeros((0, 3)), np.full((2, 2), np.nan), np.zeros((1, 1, 1, 1)),
                np.array(["a", "b"])]
        odd += [torch.zeros(0), torch.full((2, 3), torch.nan), torch.zeros(3, dtype=torch.complex64),
                torch.zeros(2, 2, dtype=torch.int8), torch.eye(3).to_sparse(),
                torch.zeros(1).expand(4096, 4096)]
    if isinstance(old, (int, float)) and rng.random() < 0.6:
        odd = [-old, old + 1, old * 1000, old / 1000, old * 1e30, 0, -1, 10 ** 9, 100000, str(old),
               float(old)]
    if isinstance(old, (np.ndarray, torch.Tensor)) and rng.random() < 0.8:
        odd = [old[:0], old[:1], old[..., None], -old if old.dtype not in (bool, torch.bool) else old,
               old.reshape(-1), old.T if old.ndim == 2 else old,
               old * 1000 if rng.random() < 0.5 else old * float("inf"),
               old[::-1] if isinstance(old, np.ndarray) and old.ndim else old, old != 0]
    return odd[rng.integers(len(odd))]


def damage_tree(rng, value, plain: bool, depth: int = 0):
    """A copy of nested dicts and lists with one node replaced, left out or doubled."""
    if isinstance(value, (dict, list, tuple)) and len(value) and (depth == 0 or rng.random() < 0.85):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        changed = copy.copy(value) if isinstance(value, dict) else list(value)
        kind = rng.random()
        if kind < 0.08: del changed[key]
        elif kind < 0.12 and isinstance(changed, dict):
            changed["x" if plain else odd_value(rng, 0, True)] = changed[key]
        elif kind < 0.16 and isinstance(changed, list): changed.insert(key, changed[key])
        else: changed[key] = damage_tree(rng, changed[key], plain, depth + 1)
        return tuple(changed) if isinstance(value, tuple) else changed
    return odd_value(rng, value, plain)


def damage_array(rng, array: np.ndarray) -> np.ndarray:
    """Another type, shape, order, or odd values in an array."""
    array = np.array(array)
    match int(rng.integers(7)):
        case 0: return array.astype(str(rng.choice(["float64", "float32", "int16", "uint8", "bool",
                                                    "complex64", "U3", "O"])))
        case 1: return array[:int(rng.integers(len(array)))] if array.ndim and len(array) else array
        case 2: return array[..., None] if rng.random() < 0.5 else array.reshape(-1)
        case 3: return np.asfortranarray(array.T)
        case 4: return array.swapaxes(*rng.integers(array.ndim, size=2)) if array.ndim else array
        case 5: return np.zeros(0, array.dtype)
    array = array.astype(float) if array.dtype.kind in "biuf" and rng.random() < 0.5 else array
    if array.dtype.kind == "f" and array.size:
        some = rng.integers(array.size, size=max(1, array.size // 9))
        array.reshape(-1)[some] = rng.choice([np.nan, np.inf, 1e38, -5, 0])
    return array


def through_json(rng, content):
    return json.dumps(damage_tree(rng, json.loads(content), True)).encode()


class Call:
    """Pickled, it is a call of what a pickle has no business to call."""

    def __init__(self, *call): self.call = call

    def __reduce__(self): return self.call[0], self.call[1:]


def through_pickle(rng, content):
    value = pickle.loads(content, encoding="latin1")
    calls = ((os.system, "touch canary"), (eval, "open('canary', 'w')"), (np.load, "x", None, True),
             (getattr, np, "save"))
    hostile = rng.random() >= 0.8
    changed = {0: value, 1: Call(*calls[rng.integers(4)])} if hostile else damage_tree(rng, value, False)
    return pickle.dumps(changed, int(rng.integers(6)))


def through_torch(rng, content):
    with torch.serialization.safe_globals([argparse.Namespace]):
        value = torch.load(io.BytesIO(content), weights_only=True)
    out = io.BytesIO()
    hostile = rng.random() >= 0.9
    changed = {**value, "x": Call(os.system, "touch canary")} if hostile else damage_tree(rng, value, False)
    torch.save(changed, out)
    return out.getvalue()


def through_npy(rng, content):
    out = io.BytesIO()
    np.save(out, damage_array(rng, np.load(io.BytesIO(content))), allow_pickle=True)
    return out.getvalue()


def through_safetensors(rng, content):
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(damage_tree(rng, json.loads(content[8:8 + length]), True)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length:]


def through_mat(rng, content):
    if content[512:520] == b"\x89HDF\r\n\x1a\n" or content[:4] == b"\x89HDF": return through_h5(rng, content)
    values = {k: v for k, v in scipy.io.loadmat(io.BytesIO(content)).items() if not k.startswith("__")}
    key, out = list(values)[rng.integers(len(values))], io.BytesIO()
    odd = [damage_array(rng, values[key]), np.array([[{"a": 1}]], object), "text", {"field": 1},
           np.zeros((2, 2))]
    values[key] = odd[0] if rng.random() < 0.6 else odd[rng.integers(5)]
    if rng.random() < 0.1: del values[key]
    scipy.io.savemat(out, values, do_compression=bool(rng.random() < 0.5))
    return out.getvalue()


def through_h5(rng, content):
    out = io.BytesIO(content)
    with h5py.File(out, "r+") as file:
        key = list(file)[rng.integers(len(file))]
        value = file[key][()] if isinstance(file[key], h5py.Dataset) else 0
        match int(rng.integers(6)):
            case 0: del file[key]
            case 1: del file[key]; file[key] = h5py.ExternalLink("/etc/passwd", "/x")
            case 2: del file[key]; file.create_group(key)
            case 3: del file[key]; file.create_dataset(key, (1 << 20, 1 << 20), "f8", chunks=(64, 64))
            case 4: del file[key]; file.create_dataset(key, (9, 9), "u1", external=[("/etc/passwd", 0, 81)])
            case 5 if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
                del file[key]
                with contextlib.suppress(TypeError): file[key] = damage_array(rng, value)
    return out.getvalue()


def through_cdf(rng, content):
    from test_readers import write_cdf
    shape = [(1, 5, 96), (1, 5, 64), (2, 5, 96), (1, 1, 96), (1, 300000, 96), (1, 5, 1)][rng.integers(6)]
    value = np.float32(rng.choice([np.nan, np.inf, 1e30, 0, 5])) * np.ones(shape, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_cdf(Path(folder) / "a.cdf", **{"Pose" if rng.random() < 0.9 else "Pos": value})
        return (Path(folder) / "a.cdf").read_bytes()


def through_png(rng, content):
    """Damage inside one chunk, whose checksum is then mended, so that the decoder goes on."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        chunks.append((content[at + 4:at + 8], content[at + 8:at + 8 + length]))
        at += 12 + length
    i = int(rng.integers(len(chunks))) if rng.random() < 0.6 else 0
    chunks[i] = chunks[i][0], damage_bytes(rng, chunks[i][1], [b"\0\0\0\0"])
    return content[:8] + b"".join(struct.pack(">I", len(body)) + kind + body
                                  + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)


CONTENT = {".json": through_json, ".pickle": through_pickle, ".pkl": through_pickle, ".pt": through_torch,
           ".pth": through_torch, ".npy": through_npy, ".safetensors": through_safetensors,
           ".mat": through_mat, ".cdf": through_cdf, ".png": through_png}


# ==========================================================================================================
# Loaders: how valid files are made, and how they are read
# ==========================================================================================================
class Places:
    """In the place of pytest's tmp_path_factory."""

    def __init__(self, top: Path): self.top = top

    def mktemp(self, name: str) -> Path:
        (self.top / name).mkdir()
        return self.top / name


SETTINGS = {"preset": "tiny", "variant": "full", "out": "runs/tiny/full-seed0", "seed": 0, "source": "nowhere",
            "image": 32, "patch": 8, "width": 16, "depth": 2, "heads": 2, "head_channels": 8, "sigma": 2.0}


def write_checkpoint(path: Path) -> None:
    """A small fine-tuned model with its optimiser."""
    torch.manual_seed(0)
    encoder = u.Encoder((32, 32), 8, 16, 2, 2)
    head = u.KeypointHead(encoder.grid, 16, 8, 21)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()])
    skeleton = {key: data.HAND[key] for key in ("joints", "bones", "root", "depth_range")}
    skeleton["bones"] = [list(bone) for bone in skeleton["bones"]]
    torch.save({"settings": SETTINGS, "encoder": encoder.state_dict(), "head": head.state_dict(), "step": 3,
                "steps": 3, "optimiser": optimiser.state_dict(), "skeleton": skeleton, "seconds": 1.0,
                "stage": "finetuning", "scaler": {}, "sums": torch.zeros(3)}, path)


def build_checkpoint(top: Path) -> Path:
    (top / "run").mkdir()
    write_checkpoint(top / "run/checkpoint.pt")
    return top


def load_checkpoint(root: Path, _) -> None:
    path = root / "run/checkpoint.pt"
    if not evaluate.finished_runs([str(root)]): return
    estimator, state = evaluate.load_estimator(path, CPU)
    K, (rows, columns), P = len(state["skeleton"]["joints"]), estimator.encoder.grid, estimator.encoder.patch
    evaluate.millimetres_per_pixel(np.ones((K, 2)), np.ones(K), state)
    with torch.no_grad(): estimator.centres(torch.zeros(1, 3, rows * P, columns * P))
    own = u.PoseEstimator(u.Encoder((32, 32), 8, 16, 2, 2), u.KeypointHead((4, 4), 16, 8, 21))
    run = u.Run.__new__(u.Run)                                                 # a resume, without a lock
    run.folder, run.rank = root / "run", 0
    state = run.resume("checkpoint.pt", torch.optim.AdamW(own.parameters()), dict(own.named_children()))
    range(state["step"], 9)


def public_weights() -> dict:
    torch.manual_seed(0)
    encoder, decoder = u.Encoder((32, 32), 8, 16, 2, 2), u.Decoder((4, 4), 8, 16, 8, 1, 2)
    positions = {"pos_embed": u.sincos_positions((4, 4), 16), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    tensors = {**encoder.state_dict(), **decoder.state_dict(), **positions}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def build_weights(top: Path) -> Path:
    tensors = public_weights()
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1.0), "epoch": 3}, top / "mae.pth")
    torch.save({"state_dict": {f"module.{k}": v.half() for k, v in tensors.items()}}, top / "other.pth",
               _use_new_zipfile_serialization=False)
    learned = {k: v for k, v in tensors.items() if "decoder" not in k} | {"pos_embed": torch.randn(1, 10, 16)}
    torch.save(learned, top / "timm.pth")
    return top


def build_safetensors(top: Path) -> Path:
    safetensors.torch.save_file(public_weights(), top / "timm.safetensors")
    return top


def load_weights(root: Path, touched: Path) -> None:
    u.load_public_weights(touched, u.Encoder((32, 32), 8, 16, 2, 2), u.Decoder((4, 4), 8, 16, 8, 1, 2))


def build_folder(top: Path) -> Path:
    """A data set with checksums of all kinds, and the same as one would write it by hand."""
    rows = data.render("hands", u.random_generator(0, "fuzz"), "source", 6, 24)
    meta = {"name": "fuzz", "split": "train", "margin": 1.25, "origin": "", "compare": [1, 2],
            **{k: v for k, v in data.HAND.items() if k != "box"}}
    writer = data.Writer(top / "whole", meta)
    writer.append(rows)
    writer.finish()
    (top / "own").mkdir()
    for name, array in rows.items(): np.save(top / f"own/{name}.npy", array)
    (top / "own/meta.json").write_text(json.dumps({"format": 1, **meta}))
    return top


def load_folder(root: Path, touched: Path) -> None:
    folder = touched.parent
    dataset = data.Dataset(folder, "masks", "keypoints", "intrinsics")
    rows = np.arange(len(dataset))
    _, _, A = data.crops(dataset, rows, data.no_augmentation(len(rows)), 16, CPU, dataset.masks)
    data.labels_of(dataset, rows, A)
    data.compared(dataset.meta), dataset.fingerprint, data.open_masks(folder / "masks.npy", dataset)
    data.draw_sample(dataset, 0, 64)
    data.check(str(folder))


def build_image(top: Path) -> Path:
    (top / "run").mkdir()
    write_checkpoint(top / "run/checkpoint.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((90, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, how in {"a.jpg": {"exif": exif}, "b.png": {}, "d.gif": {}, "e.webp": {}, "h.bmp": {},
                      "f.webp": {"lossless": True}, "g.tif": {"compression": "tiff_lzw"},
                      "i.jpg": {"progressive": True}, "k.tif": {"compression": "tiff_adobe_deflate"}}.items():
        image.save(top / name, **how)
    image.convert("P").save(top / "c.png", transparency=3)
    image.convert("CMYK").save(top / "j.jpg")
    Image.fromarray(np.full((40, 60), 40000, np.uint16)).save(top / "l.png")
    return top


def load_image(root: Path, touched: Path) -> None:
    evaluate.draw_photo(root / "run/checkpoint.pt", str(touched), None, root, CPU)


def fixture(module: str, name: str):
    """Builds a publisher's files as the fixture `name` of the tests of readers does."""
    def build(top: Path) -> Path:
        tests = __import__(module)
        if name == "freihand": return tests.freihand.__wrapped__(tests.windows(), Places(top))
        if name == "gan": return tests.write_gan(top / "GANeratedHands_Release", False)
        return getattr(tests, name).__wrapped__(Places(top))
    return build


def build_photos(top: Path) -> Path:
    root = build_image(top)
    shutil.rmtree(root / "run")
    return root


def reader(name: str, options):
    """Loads the labels, and the samples that the touched file belongs to, two others otherwise."""
    def load(root: Path, touched: Path) -> None:
        convert, skeleton, _ = data.READERS[name]
        data.open_video.cache_clear()
        there = touched.relative_to(root).as_posix()
        _, samples = convert(root, **options(there))
        first, own = [], []
        for i, sample in zip(range(400), samples):
            if there in (sample.image, sample.mask) and len(own) < 2: own.append(sample)
            elif i < 2: first.append(sample)
        for sample in own or first:
            rows, skipped = data.convert(root, 48, skeleton, [sample])
            if skipped and str(root) in skipped[0]: raise u.InputError(skipped[0])  # a photograph left out
            if any(np.isinf(rows[key]).any() for key in ("keypoints", "intrinsics") if key in rows):
                raise ArithmeticError(f"infinite labels of {sample} were converted")
    return load


class Loader:
    """build(folder) -> root of valid files; load(root, touched file); command: of data.py, if it has one."""

    def __init__(self, build, load, files: str = "**/*", command=None):
        self.build, self.load, self.files, self.command = build, load, files, command


def of_reader(name: str, build, options=lambda there: {}, files: str = "**/*") -> Loader:
    def command(there):
        return [name] + [part for k, v in options(there).items() for part in (f"--{k}", str(v))]
    return Loader(build, reader(name, options), files, command)


LOADERS = {
    "checkpoint": Loader(build_checkpoint, load_checkpoint),
    "pth": Loader(build_weights, load_weights),
    "safetensors": Loader(build_safetensors, load_weights),
    "folder": Loader(build_folder, load_folder),
    "image": Loader(build_image, load_image, "*.*"),
    "freihand": of_reader("freihand", fixture("test_data", "freihand"), files="training*/**/*"),
    "stb": of_reader("stb", fixture("test_hand_readers", "stb"), lambda there: {
        "split": "test" if "B1" in there else "train", "camera": "sk" if "SK" in there else "bb"}),
    "rhd": of_reader("rhd", fixture("test_hand_readers", "rhd"),
                     lambda there: {"split": "evaluation" if "evaluation" in there else "train"}),
    "pan": of_reader("pan", fixture("test_hand_readers", "pan"),
                     lambda there: {"split": "test" if data.PAN_TEST in there else "train", "stride": 1}),
    "gan": of_reader("gan", fixture("test_hand_readers", "gan"), lambda there: {"share": 0.0}),
    "h36m": of_reader("h36m", fixture("test_body_readers", "h36m"), lambda there: {"split": "test"},
                      "S9/**/*"),
    "3dpw": of_reader("3dpw", fixture("test_body_readers", "pw3d"), lambda there: {
        "split": "test" if "test" in there or "imageFiles" in there else "train"}),
    "3dhp": of_reader("3dhp", fixture("test_body_readers", "mpi"), lambda there: {
        "split": "test", "labels": "univ_annot3"} if "TS" in there else {"cameras": "0,4", "stride": 1}),
    "surreal": of_reader("surreal", fixture("test_body_readers", "surreal"), lambda there: {"split": "val"}),
    "imagenet": of_reader("imagenet", build_photos),
}


# ==========================================================================================================
# One case, and thousands
# ==========================================================================================================
seen: list[str] = []                   # what a loader did that no loader should do
FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "socket.connect", "socket.getaddrinfo", "ctypes.dlopen"}


def watch(place: Path) -> None:
    """Notes processes started, connections, files written outside of `place`, and files of /etc opened."""
    def hook(event, arguments):
        if event in FORBIDDEN: seen.append(f"{event} {arguments}"[:200])
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            path, _, flags = arguments
            written = flags & (os.O_WRONLY | os.O_RDWR) and not path.startswith((str(place), "/dev/"))
            if written or (path.startswith("/etc/") and "passwd" in path): seen.append(f"opened {path}")
    sys.addaudithook(hook)


def files_of(loader: Loader, root: Path) -> list[list[Path]]:
    """The files to damage, by suffix."""
    groups: dict = {}
    for path in sorted(root.glob(loader.files)):
        if path.is_file() and "run" not in path.parts or path.suffix == ".pt":
            groups.setdefault(path.suffix, []).append(path)
    return list(groups.values())


def damage(name: str, case: int, groups: list[list[Path]]) -> tuple[Path, bytes | None]:
    """The file that case damages, and its damaged content; None: the file is missing."""
    rng = u.random_generator(0, f"fuzz {name}", case)
    group = groups[rng.integers(len(groups))]
    path = group[rng.integers(len(group))]
    content, others = path.read_bytes(), [group[i].read_bytes() for i in rng.integers(len(group), size=3)]
    others += [b"", b"<html>404</html>", pickle.dumps([Call(os.system, "touch canary")])]
    if rng.random() < 0.01: return path, None
    if path.suffix in CONTENT and rng.random() < 0.5:
        with contextlib.suppress(Exception): return path, CONTENT[path.suffix](rng, content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))): content = damage_bytes(rng, content, others)
    return path, content


def judge(loader: Loader, root: Path, path: Path) -> tuple[str, str]:
    """("accepted" or "refused" or "failed", what was said) when the damaged file is loaded."""
    seen.clear()
    try:
        with contextlib.redirect_stdout(io.StringIO()): loader.load(root, path)
        outcome, text = "accepted", ""
    except u.InputError as error:
        outcome, text = "refused", str(error)
        if len(text.splitlines()) > 2 or len(text) > 1500:
            outcome, text = "failed", f"a long message: {text[:3000]}"
        elif str(root) not in text: outcome, text = "failed", f"names no file: {text}"
    except BaseException: outcome, text = "failed", traceback.format_exc()
    if seen: outcome, text = "failed", f"did what no loader should do: {seen[:3]}"
    if Path("canary").exists(): outcome, text = "failed", "code of the file was run"
    return outcome, text


def work(pipe, name: str, root: Path, cases) -> None:
    """The worker process: damages, loads, restores; sends (case, outcome, text)."""
    out, place = os.open(os.devnull, os.O_WRONLY), root.parent
    if pipe is not None: os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(place)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_AS, (8 * MEMORY, 8 * MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    data.in_a_process = lambda function, *arguments: function(*arguments)      # this is one
    data.H36M_SUBJECTS["test"] = ("S9",)
    data.MPI_FRAMES = getattr(sys.modules.get("test_body_readers"), "MPI_ROWS", data.MPI_FRAMES)
    loader = LOADERS[name]
    groups = files_of(loader, root)
    watch(place)
    for case in cases:
        path, content = damage(name, case, groups)
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        pipe.send((case, "begun", ""))
        outcome, text = judge(loader, root, path)
        path.write_bytes(before)
        pipe.send((case, outcome, text))
    pipe.send((-1, "", ""))


def again(name: str, root: Path, case: int) -> tuple[str, str]:
    """The outcome where a crash or a hang of a reader meets the command itself, with its own processes."""
    loader = LOADERS[name]
    path, content = damage(name, case, files_of(loader, root))
    before, out = path.read_bytes(), root.parent / "out"
    path.write_bytes(content or b"")
    command = loader.command(path.relative_to(root).as_posix())
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data, udapose; data.READ_SECONDS = 30; "
              "udapose.run_script(lambda: data.main(sys.argv[1:]))")
    call = [sys.executable, "-c", script, command[0], str(root), str(out), *command[1:], "--workers", "2"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=240, cwd=root.parent)
        last = done.stderr.strip().splitlines()[-1:] or [""]
        fine = done.returncode in (0, 2) and "Traceback" not in done.stderr
        return ("caught" if fine else "failed"), last[0]
    except subprocess.TimeoutExpired: return "failed", "hangs, with the command too"
    finally:
        path.write_bytes(before)
        shutil.rmtree(out, ignore_errors=True), shutil.rmtree(f"{out}.part", ignore_errors=True)


def built(name: str, place: Path) -> Path:
    """Valid files, made in a process of its own (encoders start threads); the files' root."""
    pipe, its = FORK.Pipe(False)

    def build() -> None:
        with contextlib.redirect_stdout(io.StringIO()): its.send(LOADERS[name].build(place))
    process = FORK.Process(target=build)
    process.start()
    root = pipe.recv()
    process.join()
    return root


def fuzz(name: str, files: int, keep: Path, first: int = 0) -> dict:
    """Cases first .. first + files - 1 of a loader; counts of outcomes. Files that failed are kept."""
    counts, failures = dict.fromkeys(("accepted", "refused", "caught", "failed"), 0), []
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as place:
        (top := Path(place) / "files").mkdir()
        if name in ("3dhp", "h36m", "3dpw", "surreal"): import test_body_readers  # noqa: F401, for the forks
        root = built(name, top)
        whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        case, end = first, first + files
        while case < end:
            mine, its = FORK.Pipe(False)
            process = FORK.Process(target=work, args=(its, name, root, range(case, end)))
            process.start()
            its.close()
            while True:
                try: message = mine.recv() if mine.poll(SECONDS) else (case, "hang", f"hangs for {SECONDS} s")
                except (EOFError, OSError):
                    process.join()
                    message = case, "crash", f"killed the process: exit code {process.exitcode}"
                number, outcome, text = message
                if number == -1 or outcome in ("crash", "hang"): break
                case = number + (outcome != "begun")
                if outcome == "begun": continue
                counts[outcome] += 1
                if outcome == "failed": failures.append((number, text))
            process.kill()
            process.join()
            if number == -1: break
            for path, content in whole.items(): path.write_bytes(content)
            if LOADERS[name].command:
                outcome, said = again(name, root, case)
                text += f"; the command: {said}"
            else: outcome = "failed"
            counts[outcome] += 1
            if outcome == "failed": failures.append((case, text))
            case += 1
        if files >= 100 and not counts["accepted"]:  # some damage is slight: then the valid files are refused
            failures.append((first, "of all files not one was accepted"))
            counts["failed"] += 1
        for number, text in failures[:50]:
            path, content = damage(name, number, files_of(LOADERS[name], root))
            (keep / name).mkdir(parents=True, exist_ok=True)
            (keep / name / f"{number}-{path.name}").write_bytes(content or b"")
    return counts | {"failures": failures}


def main(arguments=None) -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--files", type=int, default=2000, help="for each loader [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="LOADER",
                        help=", ".join(LOADERS))
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--keep", default="runs/fuzz", help="folder for the files that fail [%(default)s]")
    a = parser.parse_args(arguments)
    print(f"{'loader':12} {'files':>6} {'accepted':>9} {'refused':>8} {'C crash or hang -> line':>24} "
          f"{'failed':>7} {'s':>6}")
    failed = 0
    for name in a.only:
        begin, files = time.perf_counter(), a.files if a.case is None else 1
        found = fuzz(name, files, Path(a.keep), a.case or 0)
        failed += found["failed"]
        print(f"{name:12} {files:6} {found['accepted']:9} {found['refused']:8} {found['caught']:24} "
              f"{found['failed']:7} {time.perf_counter() - begin:6.0f}", flush=True)
        kinds: dict = {}
        for number, text in found["failures"]:
            kinds.setdefault(text.strip().splitlines()[-1][:150], []).append((number, text))
        for kind, cases in kinds.items():
            print(f"    {len(cases)} x {kind}   (cases {', '.join(str(n) for n, _ in cases[:6])})")
            places = re.findall(r'File "[^"]*/(\w+\.py)", line (\d+)', cases[0][1])
            way = " <- ".join(f"{file}:{line}" for file, line in places[::-1][:6])
            if places: print(f"        at {way}", flush=True)
            if a.case is not None: print(cases[0][1])
    print(f"{failed} failures, their files in {a.keep}" if failed else "no failure")
    return int(failed > 0)


if __name__ == "__main__": sys.exit(main())
