"""Hostile files: every one ends in an InputError that names it, and nothing in it is executed or fetched."""
import itertools
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from publishers import h5py, refused, scipy_io, write_video

from support.convert import Sample, open_sample
from support.folder import open_array
from support.readers.formats import Video, open_picture, read_h5, read_mat, read_pickle
from support.run import read_checkpoint


# ==== Checkpoints =========================================================================================
class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_checkpoint(tmp_path):
    torch.save({"model": Malicious(os.system, f"touch {tmp_path}/trace")}, tmp_path / "a.pt")
    with refused("a.pt: not a readable checkpoint"):
        read_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "trace").exists()


# ==== Pickles =============================================================================================
def test_pickles_of_arrays_are_read(tmp_path):
    """Of protocols 0 to 4. Those of Python 2 and numpy 1 are what RHD and 3DPW ship."""
    value = {"xyz": np.arange(6.0).reshape(2, 3), "scalar": np.float64(2.5), "raw": b"\xff\x00",
             "pair": (1, None), "fortran": np.asfortranarray(np.eye(3, 4))}
    for protocol in range(5):
        (tmp_path / "good.pkl").write_bytes(pickle.dumps(value, protocol))
        np.testing.assert_equal(read_pickle(tmp_path / "good.pkl"), value)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "bad.pkl"
    calls = [(os.system, f"touch {trace}"), (eval, f"open({str(trace)!r}, 'w')"), (open, str(trace), "w"),
             (np.memmap, str(trace), "uint8", "w+", 0, (4,)), (np.save, str(trace), 0)]
    for protocol, call in itertools.product((0, 2, 4), calls):
        path.write_bytes(pickle.dumps({"xyz": np.zeros(3), 3: [Malicious(*call)]}, protocol))
        with refused("bad.pkl: .*names .*, no array: refused, nothing of it was run"):
            read_pickle(path)
        assert not trace.exists()


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
GADGETS = {  # opcodes of a pickle; the first three would let numpy read memory that is not theirs
    "pointers of bytes": named("numpy", "ndarray") + b"K\x01\x85" + string("O") + b"C\x08AAAAAAAA\x87R",
    "a field beyond its record": MADE + b"(K\x01K\x01\x85" + DTYPE + b"\x89C\x08AAAAAAAAtb",
    "a list shorter than its array": MADE + b"(K\x01J\0\0\0\x10\x85" + OBJECTS + b"\x89]tb",
    "a buffer": named("numpy._core.numeric", "_frombuffer") + b"(C\x08AAAAAAAA" +
        OBJECTS + b"K\x01\x85" + string("C") + b"tR",
    "a dotted name": named("numpy", "ndarray.tofile"),
    "codecs": named("_codecs", "decode"),
}


@pytest.mark.parametrize("what", GADGETS)
def test_gadgets_in_pickles(what, tmp_path):
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04" + GADGETS[what] + b".")
    with refused("bad.pkl: broken pickle"):
        read_pickle(path)


# ==== Arrays ==============================================================================================
def test_objects_and_huge_shapes_in_npy(tmp_path):
    path = tmp_path / "images.npy"
    header = str({"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10, 3)}).encode()
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 99
    evil = Malicious(os.system, f"touch {tmp_path}/trace")
    np.save(path, np.array([{"a": evil}] * 6, object), allow_pickle=True)
    objects = path.read_bytes()
    np.savez_compressed(tmp_path / "zip.npz", images=np.zeros((6, 24, 24, 3), np.uint8))
    for content in (huge, objects, (tmp_path / "zip.npz").read_bytes()):
        path.write_bytes(content)
        with refused("images.npy: broken .npy array"):
            open_array(path, np.uint8, ("n", "H", "H", 3))
    assert not (tmp_path / "trace").exists()


def test_a_hostile_matlab_file(tmp_path):
    path = tmp_path / "a.mat"
    scipy_io.savemat(path, {"pose": np.zeros((77, 88), np.uint8)})
    sizes = (struct.pack("<ii", *sides) for sides in ((77, 88), (1 << 20, 1 << 20)))
    path.write_bytes(path.read_bytes().replace(*sizes))
    with refused("a.mat: broken MATLAB file"):
        read_mat(path, "pose")


H5 = {  # what to put in the place of the numbers, and what is said
    "absurd": (lambda f: f.create_dataset("x", (1 << 20, 1 << 20), "f8", chunks=(64, 64)), "broken"),
    "another file": (lambda f: f.__setitem__("x", h5py.ExternalLink("other.h5", "/x")), "lies in another"),
    "a file's bytes": (lambda f: f.create_dataset("x", (8,), "u1", external=[("other.h5", 0, 8)]), "lies in"),
    "virtual": (lambda f: f.create_virtual_dataset("x", virtual()), "lies in another file"),
    "words": (lambda f: f.__setitem__("x", ["a", "b"]), "holds object, not numbers")}


def virtual():
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
    return layout


@pytest.mark.parametrize("what", H5)
def test_hostile_hdf5(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put, says = H5[what]
    with h5py.File("other.h5", "w") as file:
        file["x"] = np.arange(3.0)
    with h5py.File("a.mat", "w") as file:
        put(file)
    with refused(f"a.mat: .*{says}"):
        read_h5(Path("a.mat"), "x")


# ==== Pictures, videos, names =============================================================================
def test_postscript_is_no_picture(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, an interpreter of programs."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/canary\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
                                    "showpage\n%%EOF\n")
    with refused("a.jpg: broken picture"):
        open_picture(tmp_path / "a.jpg")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", [
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile secret.ts\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"])
def test_a_playlist_is_no_video(text, tmp_path):
    write_video(tmp_path / "secret.ts", [np.full((64, 64, 3), 90, np.uint8)] * 5, file={"format": "mpegts"})
    assert Video(tmp_path / "secret.ts").frame(0).shape == (64, 64, 3)
    (tmp_path / "a.mp4").write_text(text.format(tmp_path / "secret.ts"))
    with refused("a.mp4: broken video"):
        open_sample(tmp_path, Sample("a.mp4", frame=0))


def test_names_cannot_leave_their_root(tmp_path):
    root, picture = tmp_path / "root", Image.new("RGB", (40, 40))
    (root / "in").mkdir(parents=True)
    for path in (tmp_path / "secret.png", root / "in/a..png"):
        picture.save(path)
    for name in ("../secret.png", "in/../../secret.png", str(tmp_path / "secret.png"), "in/../in/a..png"):
        with refused("its labels name .*, which lies outside of it: refused"):
            open_sample(root, Sample(name))
        with refused("outside of it: refused"):
            open_sample(root, Sample("in/a..png", mask=name))
    os.makedirs(tmp_path / "other")
    (tmp_path / "other/in").symlink_to(root / "in")  # a download on two disks
    for place in (root, tmp_path / "other"):
        assert open_sample(place, Sample("in/a..png"))[0].shape == (40, 40, 3)
