"""Feed every reader of data sets thousands of damaged files: each has to end in success or in one line.

    python tests/fuzz.py                                1,000 files for each loader
    python tests/fuzz.py --files 100 --only pan folder  fewer; only these loaders

Damage is done to bytes (bits flipped, runs overwritten, cut out or doubled, ends lost) or to content (a value
of a JSON, pickle, MATLAB, HDF5 or .npy file is replaced by an odd one). A loader fails if it
raises anything but InputError, if its message has more than two lines or names no file of the data, or if it
starts a process or a connection, writes outside of its folder, or runs what is in a pickle. A crash or a hang
of a C library is counted, and is no failure. Case i of a loader is the same damage each time.
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import publishers  # noqa: E402
import scipy.io  # noqa: E402
import torch  # noqa: E402
from conftest import write_set  # noqa: E402

import data  # noqa: E402
from support import convert  # noqa: E402
from support import run as runs  # noqa: E402
from support.folder import Dataset, compared  # noqa: E402
from support.readers import _3dhp, _3dpw, freihand, gan, h36m, pan, rhd, stb, surreal  # noqa: E402

SECONDS, FORK = 40, multiprocessing.get_context("fork")  # for one file
ODD = [None, -1, 2**63 - 1, 1e308, float("nan"), float("inf"), "x", "a\0b", [], {}, [[]], [0] * 5000]
ODD += ["../../../etc/passwd", "/etc/passwd"]


# ==== Damage ============================================================================================
class Call:
    """Pickled, this is a call of what a pickle has no business to call."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def damage_bytes(rng, content: bytes) -> bytes:
    """One kind of damage to the bytes of a file, more often near its start."""
    n, content = len(content), bytearray(content)
    at = int(rng.integers(min(n, 512) if rng.random() < 0.4 else n)) if n else 0
    end = min(n, at + int(2 ** rng.uniform(0, 10)))
    kind = rng.integers(5)
    if kind == 0:
        content[at:end] = bytes(byte ^ 1 << int(rng.integers(8)) for byte in content[at:end])
    elif kind == 1:
        content[at:end] = rng.bytes(end - at)
    elif kind == 2:
        content[at:at] = content[at:end]
    elif kind == 3:
        del content[at:end]
    else:
        content[at:] = [b"", b"<html>404</html>", pickle.dumps([Call()])][rng.integers(3)]
    return bytes(content)


def odd_value(rng, old):
    """A value that a loader does not expect in the place of `old`."""
    if isinstance(old, np.ndarray):
        odd = [old[:0], old[..., None], old.T, old.astype("U3"), old * 1000, np.full(old.shape, np.nan)]
        odd.append(np.array([None, {}], object))
    elif type(old) in (int, float) and rng.random() < 0.5:
        odd = [-old, old + 1, old * 1000, str(old)]
    else:
        odd = ODD
    return odd[rng.integers(len(odd))]


def damage_tree(rng, value):
    """A copy of nested dicts and lists with one node replaced or removed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return odd_value(rng, value)
    changed = copy.copy(value)
    key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(rng.integers(len(value)))
    if rng.random() < 0.1:
        del changed[key]
    else:
        changed[key] = damage_tree(rng, changed[key])
    return changed


def damage_json(rng, path):
    path.write_text(json.dumps(damage_tree(rng, json.loads(path.read_text()))))


def damage_pickle(rng, path):
    value = pickle.loads(path.read_bytes(), encoding="latin1")
    path.write_bytes(pickle.dumps({0: value, 1: Call()} if rng.random() < 0.2 else damage_tree(rng, value)))


def damage_npy(rng, path):
    np.save(path, odd_value(rng, np.load(path)), allow_pickle=True)


def damage_mat(rng, path):
    if h5py.is_hdf5(path):
        with h5py.File(path, "r+") as file:
            key = list(file)[rng.integers(len(file))]
            value = file[key][()] if isinstance(file[key], h5py.Dataset) else np.zeros(3)
            del file[key]
            odd = [h5py.ExternalLink("/etc/passwd", "/x"), np.zeros((9, 9)), value.T]
            file[key] = odd[rng.integers(len(odd))]
        return
    values = {k: v for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}
    key = list(values)[rng.integers(len(values))]
    values[key] = [odd_value(rng, np.float64([[1, 2]])), "text", {"field": 1}, values[key].T][rng.integers(4)]
    scipy.io.savemat(path, values)


CONTENT = {".json": damage_json, ".pickle": damage_pickle, ".pkl": damage_pickle, ".npy": damage_npy}
CONTENT |= {".mat": damage_mat}


def damage(name: str, case: int, files: list[Path]) -> tuple[Path, bytes]:
    """Damage one of the files. Returns it, and its content before. Every kind of file has the same chance."""
    rng = runs.random_generator(0, f"fuzz {name}", case)
    kinds = sorted({path.suffix for path in files})
    kind = kinds[rng.integers(len(kinds))]
    path = rng.choice([path for path in files if path.suffix == kind])
    before, way = path.read_bytes(), rng.random()
    if way < 0.01:
        path.unlink()
    elif way < 0.5 and kind in CONTENT:
        with contextlib.suppress(Exception):  # some odd values cannot be written
            CONTENT[kind](rng, path)
    else:
        path.write_bytes(damage_bytes(rng, before))
    return path, before


# ==== Loaders: build(folder) writes valid files; load(root, touched) reads them as the scripts do =======
def build_folder(root: Path) -> None:
    """A data set with checksums, and one as somebody would write it by hand."""
    write_set(root / "set", "source", 6)
    write_set(root / "own", "source", 6)
    meta = json.loads((root / "own/meta.json").read_text())
    kept = {key: value for key, value in meta.items() if key not in ("crc", "rows")} | {"compare": [1, 2]}
    (root / "own/meta.json").write_text(json.dumps(kept))


def load_folder(root: Path, touched: Path) -> None:
    dataset, rows = Dataset(touched.parent, "masks", "keypoints", "intrinsics"), np.arange(3)
    _, _, A = data.crops(dataset, rows, data.no_augmentation(3), 16, torch.device("cpu"), dataset.masks)
    labels = torch.from_numpy(dataset.keypoints[rows]), torch.from_numpy(dataset.intrinsics[rows])
    data.labels_of(*labels, A, dataset.meta["root"])
    compared(dataset.meta)
    data.check(str(touched.parent))
    data.draw_sample(dataset, 0, 64)


def reader(own, build, **options):
    """A module of support/readers/, on the files that its tests write."""

    def load(root: Path, touched: Path) -> None:
        there, (_, samples) = touched.relative_to(root).as_posix(), own.read(root, **options)
        some = [s for i, s in zip(range(200), samples, strict=False) if i < 2 or there in (s.image, s.mask)]
        for sample in some[-4:]:
            rows, _ = convert.convert_samples(root, 48, own.SKELETON, [sample])
            for key in ("keypoints", "intrinsics"):
                assert not np.isinf(rows.get(key, 0)).any(), f"infinite labels of {sample} were converted"

    return build, load


LOADERS = {
    "folder": (build_folder, load_folder),
    "freihand": reader(freihand, publishers.write_freihand),
    "stb": reader(stb, publishers.write_stb, split="test"),
    "rhd": reader(rhd, publishers.write_rhd),
    "pan": reader(pan, publishers.write_pan, stride=1),
    "gan": reader(gan, publishers.write_gan, share=0.0),
    "h36m": reader(h36m, publishers.write_h36m, split="test"),
    "3dpw": reader(_3dpw, publishers.write_3dpw, split="test"),
    "3dhp": reader(_3dhp, publishers.write_3dhp, cameras="0,4", stride=1),
    "surreal": reader(surreal, publishers.write_surreal, split="val"),
}
_3dhp.FRAMES = publishers.MPI_ROWS


# ==== One case, and thousands ===========================================================================
seen: list[str] = []  # what a loader did that no loader should do
FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}


def watch(place: Path) -> None:
    """Note processes, connections, and files written outside of `place` or opened in /etc."""

    def hook(event, arguments):
        if event in FORBIDDEN:
            seen.append(f"{event} {arguments}"[:200])
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            path, _, flags = arguments
            written = flags & (os.O_WRONLY | os.O_RDWR) and not path.startswith((str(place), "/dev/"))
            if written or path == "/etc/passwd":
                seen.append(f"opened {path}")

    sys.addaudithook(hook)


def judge(pipe, load, root: Path, touched: Path) -> None:
    """Load the damaged file, in a process of its own. Send the outcome, and what was said."""
    os.chdir(root)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries of videos write there
    torch.set_num_threads(1)
    watch(root)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load(root, touched)
        outcome, text = "accepted", ""
    except runs.InputError as error:
        outcome, text = "refused", str(error)
        if len(text.splitlines()) > 2 or str(root) not in text:
            outcome, text = "FAILED", f"not two lines that name a file: {text[:1000]}"
    except Exception:
        outcome, text = "FAILED", traceback.format_exc()
    if seen or Path("canary").exists():
        outcome, text = "FAILED", f"did what no loader should do: {seen[:3]} {text}"
    pipe.send((outcome, text))


def fuzz(name: str, count: int) -> tuple[dict, list]:
    """Counts of outcomes of a loader, and its failures (case, text). Every file is loaded in a fork."""
    counts, failures = dict.fromkeys(("accepted", "refused", "crashed", "FAILED"), 0), []
    build, load = LOADERS[name]
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as place:
        build(Path(place))
        files = [path for path in sorted(Path(place).rglob("*")) if path.is_file()]
        for case in range(count):
            path, before = damage(name, case, files)
            ours, its = FORK.Pipe(False)
            process = FORK.Process(target=judge, args=(its, load, Path(place), path))
            process.start()
            its.close()
            outcome, text = "crashed", ""
            with contextlib.suppress(EOFError):
                if ours.poll(SECONDS):
                    outcome, text = ours.recv()
            process.kill()
            process.join()
            path.write_bytes(before)
            counts[outcome] += 1
            failures += [(case, text)] if outcome == "FAILED" else []
    if count >= 100 and not counts["accepted"]:  # some damage is slight: the valid files are refused
        failures.append((0, "not one of all files was accepted"))
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1000, help="for each loader [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), default=list(LOADERS), help="these")
    given, failed = parser.parse_args(), 0
    for name in given.only:
        counts, failures = fuzz(name, given.files)
        failed += len(failures)
        print(f"{name:12}", *(f"{value:6} {kind}" for kind, value in counts.items()), flush=True)
        kinds = {text.strip().splitlines()[-1][:150]: (case, text) for case, text in failures}
        for case, text in kinds.values():
            print(f"    case {case}: {text}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
