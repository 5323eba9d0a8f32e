"""Rotten data and hostile files: every one ends in an InputError that names it, and nothing in it is run.

The long version, thousands of damaged files for each loader, is `python tests/fuzz.py`.
"""
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data
import udapose as u
from data import InputError
from test_readers import write_video

CPU, N, SIDE = torch.device("cpu"), 6, 24


def refused(message: str):
    return pytest.raises(InputError, match=message)


# ==========================================================================================================
# Rotten data
# ==========================================================================================================
def write_set(folder: Path, seed: int = 0, **changes) -> Path:
    """A data set of six rendered hands, as conversion and rendering write it."""
    skeleton = {k: v for k, v in data.HAND.items() if k != "box"}
    writer = data.Writer(folder, {"name": "six", **skeleton} | changes)
    rows = data.render("hands", u.random_generator(seed, "rotten"), "source", N, SIDE)
    for part in (slice(0, 4), slice(4, N)): writer.append({name: array[part] for name, array in rows.items()})
    writer.finish()
    return folder


@pytest.fixture
def rotten(tmp_path) -> Path:
    return write_set(tmp_path / "set")


def read_all(folder: Path, rows=range(N)) -> data.Dataset:
    """Everything that training reads of a folder."""
    dataset, rows = data.Dataset(folder, *data.SUMMED[1:]), np.array(rows)
    A = data.crops(dataset, rows, data.no_augmentation(len(rows)), 16, CPU, dataset.masks)[2]
    data.labels_of(dataset, rows, A)
    return dataset


def flip(path: Path, at: int) -> None:
    """One bit of the byte at `at`, from the end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_checksum_for_every_record(rotten):
    sums = np.load(rotten / "checksums.npy")
    for column, name in enumerate(data.SUMMED):
        array = np.load(rotten / f"{name}.npy")
        assert [zlib.crc32(array[i].tobytes()) for i in range(N)] == sums[:, column].tolist()
    assert len(np.unique(sums)) == sums.size
    read_all(rotten)


@pytest.mark.parametrize("name", data.SUMMED)
def test_a_bit_that_flips_is_told_when_its_record_is_read(rotten, name):
    array = np.load(rotten / f"{name}.npy", mmap_mode="r")
    flip(rotten / f"{name}.npy", array.offset + 3 * array[0].nbytes + 5)
    read_all(rotten, [0, 1, 2, 4, 5])
    with refused(f"{name}.npy: row 3 is not what was written"): read_all(rotten, [5, 3, 0])
    with refused(f"{name}.npy: row 3 is not what was written"): data.check(str(rotten))
    for rows in (3, slice(2, 5), slice(None), -3, [0, 3], np.arange(N) == 3):
        dataset = data.Dataset(rotten, *data.SUMMED[1:])
        getattr(dataset, name)[[0, 1]]
        with refused("row 3 is not"): getattr(dataset, name)[rows]
    dataset = data.Dataset(rotten, *data.SUMMED[1:])
    with refused("row 3 is not"):
        data.read_into(np.empty_like(array), getattr(dataset, name), np.arange(N))


def test_a_record_is_checked_once(rotten, monkeypatch):
    dataset, calls, crc32 = data.Dataset(rotten), [], zlib.crc32
    monkeypatch.setattr(data.zlib, "crc32", lambda *a: calls.append(1) or crc32(*a))
    for _ in range(3): dataset.images[np.array([1, 4])]
    assert len(calls) == 2
    dataset.images[:]
    assert len(calls) == N
    assert dataset.images.new.nbytes == N                                      # all that it costs in memory


@pytest.mark.parametrize("name", data.SUMMED)
def test_files_of_another_data_set(rotten, tmp_path, name):
    """The same shape, other content: told by its records; with its checksums beside it, at the start."""
    other = write_set(tmp_path / "other", 1)
    if name == "intrinsics": np.save(other / "intrinsics.npy", 2 * np.load(other / "intrinsics.npy"))
    shutil.copy(other / f"{name}.npy", rotten)
    with refused(f"set/{name}.npy: row 0 is not .*, or of another data set"): read_all(rotten)
    shutil.copy(other / "checksums.npy", rotten)
    with refused("set/checksums.npy: not the one that meta.json was written with"): data.Dataset(rotten)


def test_damage_is_told_at_the_start(rotten, tmp_path):
    def spoil(name, change):
        folder = Path(shutil.copytree(rotten, tmp_path / "spoilt", dirs_exist_ok=True))
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        return folder
    for name in data.ARRAYS:
        for change in (lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:50], lambda b: b""):
            with refused(f"spoilt/{name}.npy: broken .npy array"): read_all(spoil(f"{name}.npy", change), [])
    with refused("checksums.npy: not the one"):
        data.Dataset(spoil("checksums.npy", lambda b: b[:-1] + bytes([b[-1] ^ 1])))
    shutil.copytree(rotten, tmp_path / "spoilt", dirs_exist_ok=True)
    for name in data.ARRAYS:
        if name != "checksums": np.save(tmp_path / f"spoilt/{name}.npy", np.load(rotten / f"{name}.npy")[:5])
    with refused("images.npy: 5 rows; meta.json counts 6"): data.Dataset(tmp_path / "spoilt")
    (rotten / "checksums.npy").unlink()
    assert data.Dataset(rotten).checksums is None                          # may be left out, as labels may
    with refused("checksums.npy: missing; meta.json counts on it"): data.check(str(rotten))


def test_labels_of_another_joint_set(rotten, tmp_path):
    np.save(rotten / "keypoints.npy", np.load(rotten / "keypoints.npy")[:, :17])
    with refused(r"keypoints.npy: shape \(6, 17, 3\)"): read_all(rotten)
    one, two = (data.Dataset(write_set(tmp_path / str(i), joints=joints)) for i, joints in
                enumerate((data.HAND_JOINTS, data.HAND_JOINTS[::-1])))
    with refused(f"{tmp_path}/1: joints is"): data.same_skeleton(two, one.meta)


def test_a_folder_without_checksums_stays_valid(rotten, capsys):
    before = read_all(rotten).fingerprint
    meta = json.loads((rotten / "meta.json").read_text())
    del meta["crc"]["checksums"]
    (rotten / "meta.json").write_text(json.dumps(meta))
    (rotten / "checksums.npy").unlink()
    assert read_all(rotten).fingerprint == before                              # of runs before there were any
    data.check(str(rotten))
    assert "no checksums.npy" in capsys.readouterr().out
    arrays = {name: np.load(rotten / f"{name}.npy") for name in data.SUMMED}
    np.save(rotten / "checksums.npy", data.record_sums(arrays))
    read_all(rotten)                                                           # one may write it by hand
    flip(rotten / "masks.npy", -1)
    with refused("masks.npy: row 5 is not"): read_all(rotten)


def test_a_data_set_that_changes_between_a_run_and_its_resume(rotten, tmp_path):
    from test_shared import settings
    own = tmp_path / "own"

    def run():
        return u.Run(str(tmp_path / "run"), settings(), {"data": {"source": read_all(own).fingerprint}}, 0)
    own.mkdir()
    for name in data.SUMMED: shutil.copy(rotten / f"{name}.npy", own)         # by hand: no checksum anywhere
    meta = json.loads((rotten / "meta.json").read_text())
    (own / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("crc", "rows")}))
    for _ in range(2): run().lock.close()
    (tmp_path / "run/checkpoint.pt").touch()
    flip(own / "masks.npy", -7)
    with refused(r"run: was made with other settings \(source's data: \w{8} there, \w{8} now\)"): run()


# ==========================================================================================================
# Hostile files: weights
# ==========================================================================================================
def rezipped(path: Path, kind: int = zipfile.ZIP_STORED, change=lambda name, content: content) -> None:
    """The same checkpoint with other parts, and checksums that fit them."""
    with zipfile.ZipFile(path) as file: parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in parts.items(): file.writestr(name, change(name, content))


def test_a_bit_that_flips_in_a_checkpoint(tmp_path):
    weights, path = torch.arange(1000.0), tmp_path / "a.pt"
    for load in (u.read_checkpoint, u.read_weights):
        torch.save({"settings": {}, "model": {"w": weights}}, path)
        load(path)
        flip(path, path.read_bytes().find(weights.numpy().tobytes()) + 2001)
        found = torch.load(path, weights_only=True)["model"]["w"]              # torch does not look
        assert not torch.equal(found, weights)
        with refused("a.pt: .*data/0 is not what was written"): load(path)


def test_a_checkpoint_that_unpacks_to_more(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"settings": {}, "model": {"w": torch.zeros(1 << 20)}}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    for load in (u.read_checkpoint, u.read_weights):
        with refused("a.pt: .*its parts are compressed"): load(path)


@pytest.mark.parametrize("odd", [
    {"w": torch.full((3,), torch.nan)}, {"w": torch.zeros(2).to_sparse()}, {"w": 5}, {5: torch.zeros(3)}, [1],
    None, {"w": torch.zeros(3, dtype=torch.complex64) + torch.inf}])
def test_odd_weights(tmp_path, odd):
    path, module = tmp_path / "a.pt", torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(3))
    torch.save({"settings": {}, "part": odd}, path)
    with refused("a.pt: "): u.load_parts(path, u.read_checkpoint(path), part=module)


def test_settings_that_ask_for_terabytes(tmp_path):
    import evaluate
    import fuzz
    path = tmp_path / "a.pt"
    fuzz.write_checkpoint(path)
    whole = torch.load(path, weights_only=True)
    evaluate.load_estimator(path, CPU)
    for change in ({"width": 1 << 20}, {"depth": 1 << 40}, {"image": 1 << 13}, {"head_channels": 1 << 30},
                   {"patch": 0}, {"heads": 3}, {"width": "16"}, {"depth": -1}, {"heads": None}):
        torch.save(whole | {"settings": whole["settings"] | change}, path)
        with refused("a.pt: "): evaluate.load_estimator(path, CPU)
    for skeleton in ({}, {"joints": 5}, {"bones": [[0, 99]]}, {"root": "x"}):
        torch.save(whole | {"skeleton": whole["skeleton"] | skeleton if skeleton else {}}, path)
        with refused("a.pt: "): evaluate.load_estimator(path, CPU)


# ==========================================================================================================
# Hostile files: labels
# ==========================================================================================================
def string(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    return string(module) + string(name) + b"\x93"


DTYPE = (named("numpy", "dtype") + string("V8") + b"\x89\x88\x87R(K\x03" + string("|") + b"N" + string("a")
         + b"\x85}" + string("a") + named("numpy", "dtype") + string("f8") + b"\x89\x88\x87R"
         + b"J\0\0\0\x7f\x86sK\x08K\x01K\x10tb")
MADE = named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\0\x85C\x01b\x87R"
OBJECTS = (named("numpy", "dtype") + string("O") + b"\x89\x88\x87R(K\x03" + string("|")
           + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb")
GADGETS = {  # opcodes of a pickle; the first three kill a process that believes them, or read its memory
    "pointers of bytes": named("numpy", "ndarray") + b"K\x01\x85" + string("O") + b"C\x08AAAAAAAA\x87R",
    "a field beyond its record": MADE + b"(K\x01K\x01\x85" + DTYPE + b"\x89C\x08AAAAAAAAtb",
    "a list shorter than its array": MADE + b"(K\x01J\0\0\0\x10\x85" + OBJECTS + b"\x89]tb",
    "bytes shorter than their array": named("numpy._core.numeric", "_frombuffer") + b"(C\x08AAAAAAAA" +
        OBJECTS + b"K\x01\x85" + string("C") + b"tR",
    "a negative shape": MADE + b"(K\x01J\xff\xff\xff\xff\x85" + OBJECTS + b"\x89]tb",
    "no dtype": MADE + b"(K\x01K\x01\x85N\x89C\x08AAAAAAAAtb",
    "numpy.load": named("numpy", "load") + string("x.npy") + b"N\x88\x87R",
    "partial": named("functools", "partial") + named("os", "system") + string("touch canary") + b"\x86R)R",
    "builtins": named("builtins", "eval") + string("open('canary', 'w')") + b"\x85R",
    "a module's module": named("numpy", "testing.runstring") + string("1") + b"\x85R",
    "getattr": named("builtins", "getattr") + named("numpy", "ndarray") + string("tofile") + b"\x86R",
    "a record with objects": MADE + b"(K\x01K\x01\x85" + named("numpy", "dtype") + string("V8, O") +
        b"\x85R\x89C\x08AAAAAAAAtb",
}


@pytest.mark.parametrize("what", GADGETS)
def test_gadgets_in_pickles(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04" + GADGETS[what] + b".")
    with refused("bad.pkl: (names|broken pickle)"): data.read_pickle_here(path)
    assert not Path("canary").exists()


def test_pickles_that_kill_fill_or_hold_up_their_reader(tmp_path, monkeypatch):
    """Read in a process of its own: tuples in tuples as a key, a memo of 2^31 places, a key hashed for
    ever."""
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04})" + b"\x85" * 1_000_000 + b"Ns.")
    with refused("bad.pkl: kills the process that reads it"): data.read_pickle(path)
    path.write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    with refused("bad.pkl: (broken pickle: MemoryError|kills)"): data.read_pickle(path)
    path.write_bytes(b"\x80\x04})" + b"2\x86" * 60 + b"Ns.")
    monkeypatch.setattr(data, "READ_SECONDS", 3)
    with refused("bad.pkl: not read in 3 s"): data.read_pickle(path)


def test_objects_and_huge_shapes_in_npy(rotten):
    path, calls = rotten / "images.npy", []
    header = str({"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10, 3)}).encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 99)
    with refused("images.npy: broken .npy array"): data.Dataset(rotten)
    np.save(path, np.array([{"a": calls}] * 6, object), allow_pickle=True)
    with refused("images.npy: broken .npy array"): data.Dataset(rotten)
    with open(path, "wb") as file: np.savez_compressed(file, images=np.zeros((6, 24, 24, 3), np.uint8))
    with refused("images.npy: broken .npy array"): data.Dataset(rotten)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"joints": ' * 50_000, "9" * 10_000, "nul", '"\ud800"'])
def test_hostile_json(rotten, text):
    (rotten / "meta.json").write_bytes(text.encode("utf8", "surrogatepass"))
    with refused("meta.json: "): data.Dataset(rotten)


@pytest.mark.parametrize("field, value", [
    ("joints", 5), ("joints", [1] * 21), ("bones", [[0, 21]]), ("bones", [[0]]), ("bones", {}), ("root", -1),
    ("root", 1.0), ("root", None), ("depth_range", 0), ("depth_range", "300"), ("depth_range", float("nan")),
    ("margin", 0), ("margin", 1e9), ("compare", [[1]]), ("compare", [21]), ("crc", []), ("rows", "6"),
    ("format", [])])
def test_fields_of_meta_json(rotten, field, value):
    meta = json.loads((rotten / "meta.json").read_text())
    (rotten / "meta.json").write_text(json.dumps(meta | {field: value}))
    with refused(f"meta.json: {field}"): data.Dataset(rotten)


def test_hostile_matlab_files(tmp_path):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"pose": np.zeros((77, 88), np.uint8)})
    sizes = (struct.pack("<ii", *sides) for sides in ((77, 88), (1 << 20, 1 << 20)))
    path.write_bytes(path.read_bytes().replace(*sizes))
    with refused(r"a.mat: .*pose claims to be \(1048576, 1048576\)"): data.read_mat(path, "pose")
    cells = np.zeros(1, object)
    for _ in range(3): cells[0], cells = cells.copy(), np.array([cells], object)
    scipy.io.savemat(path, {"pose": cells})
    with refused("a.mat: .*pose holds no numbers but cell"): data.read_mat(path, "pose")


H5 = {  # what to put in the place of the numbers, and what is said
    "absurd": (lambda f: f.create_dataset("x", (1 << 20, 1 << 20), "f8", chunks=(64, 64)), "claims to be"),
    "another file": (lambda f: f.__setitem__("x", h5py.ExternalLink("other.h5", "/x")), "lies in another"),
    "a file's bytes": (lambda f: f.create_dataset("x", (8,), "u1", external=[("other.h5", 0, 8)]), "lies in"),
    "virtual": (lambda f: f.create_virtual_dataset("x", virtual()), "lies in another file"),
    "words": (lambda f: f.__setitem__("x", ["a", "b"]), "claims to be object"),
    "a folder": (lambda f: f.create_group("x"), "broken MATLAB 7.3 file")}


def virtual():
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
    return layout


@pytest.mark.parametrize("what", H5)
def test_hostile_hdf5(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put, says = H5[what]
    with h5py.File("other.h5", "w") as file: file["x"] = np.arange(3.0)
    with h5py.File("a.mat", "w") as file: put(file)
    with refused(f"a.mat: .*{says}"): data.read_h5(Path("a.mat"), "x")


def test_safetensors_that_claims_terabytes(tmp_path):
    for header in ({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
                   {"w": {"dtype": "F32", "shape": [2], "data_offsets": [1 << 62, (1 << 62) + 8]}}):
        text = json.dumps(header).encode()
        for length in (len(text), 1 << 60):
            (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + text + b"\0" * 8)
            with refused("a.safetensors: cannot be read safely"): u.read_weights(tmp_path / "a.safetensors")


# ==========================================================================================================
# Hostile files: pictures, videos, names
# ==========================================================================================================
def png_of(width: int, height: int) -> bytes:
    """A PNG of a few kB that unpacks to width x height black pixels, or would."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = zlib.compress(b"\0" * (1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + \
        chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000, 2_000_000])                 # of the first Pillow only warns
def test_decompression_bombs(side, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(side, side))
    for read in (data.open_picture, lambda path: data.open_mask(path, (1, 255), None), data.more_left):
        with refused("bomb.png: broken (picture|mask): Image size .* exceeds limit") as caught: read(path)
        assert "\n" not in str(caught.value)


def test_postscript_is_no_picture(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, an interpreter of programs."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/canary\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
                                    "showpage\n%%EOF\n")
    with refused("a.jpg: broken picture"): data.open_picture(tmp_path / "a.jpg")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", [
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile secret.ts\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"])
def test_a_playlist_is_no_video(text, tmp_path):
    write_video(tmp_path / "secret.ts", [np.full((64, 64, 3), 90, np.uint8)] * 5, file={"format": "mpegts"})
    assert data.Video(tmp_path / "secret.ts").frame(0).shape == (64, 64, 3)
    (tmp_path / "a.mp4").write_text(text.format(tmp_path / "secret.ts"))
    with refused("a.mp4: broken video"):
        data.open_sample(tmp_path, data.Sample("a.mp4", frame=0), 16, 0)


def test_names_cannot_leave_their_root(tmp_path):
    root, picture = tmp_path / "root", Image.new("RGB", (40, 40))
    (root / "in").mkdir(parents=True)
    for path in (tmp_path / "secret.png", root / "in/a..png"): picture.save(path)
    for name in ("../secret.png", "in/../../secret.png", str(tmp_path / "secret.png"), "in/../in/a..png"):
        with refused("its labels name .*, which lies outside of it: refused"):
            data.open_sample(root, data.Sample(name), 16, 0)
        with refused("outside of it: refused"):
            data.open_sample(root, data.Sample("in/a..png", mask=name), 16, 0)
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "disk").symlink_to(root / "in")
    os.makedirs(tmp_path / "other")
    (tmp_path / "other/in").symlink_to(root / "in")                            # a download on two disks
    for place in (root, tmp_path / "link", tmp_path / "other", tmp_path / "link/../root"):
        assert data.open_sample(place, data.Sample("in/a..png"), 16, 0)[2] == (40, 40)


# ==========================================================================================================
# Fuzzing, in short
# ==========================================================================================================
FUZZ = Path(__file__).parent / "fuzz.py"


def test_every_loader_survives_damaged_files(tmp_path):
    command = [sys.executable, str(FUZZ), "--files", "20", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 17, done.stdout + done.stderr


BAD = """
import os, sys, time
sys.path.insert(0, {tests!r})
import fuzz
fuzz.SECONDS = 1
def load(root, touched):
    match int((root / "a.txt").stat().st_mtime_ns) and next(numbers):
        case 1: raise KeyError("inside")
        case 2: raise fuzz.u.InputError("no file is named")
        case 3: raise fuzz.u.InputError(f"{{root}}/a.txt: " + "line\\n" * 3)
        case 4: os.system("true")
        case 5: open("canary", "w").close(); os.unlink
        case 6: os.remove("canary"); open("/etc/passwd").close()
        case 7: raise fuzz.u.InputError(f"{{root}}/a.txt: fine")
        case 8: os.kill(os.getpid(), 11)
        case 9: time.sleep(9)
numbers = iter(range(1, 10))
def build(top):
    (top / "a.txt").write_text("12"); return top
fuzz.LOADERS["bad"] = fuzz.Loader(build, load)
found = fuzz.fuzz("bad", 8, fuzz.Path("kept"))
fuzz.LOADERS["slow"] = fuzz.Loader(build, lambda root, touched: time.sleep(9))
slow = fuzz.fuzz("slow", 1, fuzz.Path("kept"))
print([n for n, _ in found["failures"]], found["refused"], found["accepted"], slow["failed"])
"""


def test_the_fuzzer_notices(tmp_path):
    """A traceback, a message without a file, a long one, a process, code run, a file outside, crash, hang."""
    command = [sys.executable, "-c", BAD.format(tests=str(FUZZ.parent))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[-2] == "[0, 1, 2, 3, 4, 5, 7] 1 0 1", done.stdout + done.stderr
