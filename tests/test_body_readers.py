"""The readers of bodies: Human3.6M, 3DPW, MPI-INF-3DHP, SURREAL, end to end and with every trap put in.

The fixtures are written in the publishers' own layouts and file formats. Their bodies are drawn: right limbs
red, left limbs blue, the middle yellow, on green, so that a picture can be checked by eye, and by colour.
"""
import functools
import inspect
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import data
from udapose import InputError

av, cdflib, h5py = (pytest.importorskip(name) for name in ("av", "cdflib", "h5py"))
scipy_io = pytest.importorskip("scipy.io")

INK = {"r": (225, 40, 40), "l": (40, 70, 235), "m": (240, 210, 50)}
GREEN, SHADE = (60, 120, 60), (45, 95, 45)                     # background, in two tones
# The publishers' own lists of joints, by name: l left, r right.
OURS = ("pelvis rhip rknee rankle lhip lknee lankle spine neck nose top lshoulder lelbow lwrist rshoulder "
        "relbow rwrist").split()
H36M_NAMES = ("pelvis rhip rknee rankle rtoe rtip lhip lknee lankle ltoe ltip pelvis spine neck nose top "
              "neck lshoulder lelbow lwrist lwrist lthumb lhand lhand neck rshoulder relbow rwrist rwrist "
              "rthumb rhand rhand").split()
SMPL_NAMES = ("pelvis lhip rhip spine1 lknee rknee spine lankle rankle spine3 ltoe rtoe neck lcollar rcollar "
              "head lshoulder rshoulder lelbow relbow lwrist rwrist lhand rhand").split()
OPENPOSE_NAMES = ("nose neck rshoulder relbow rwrist lshoulder lelbow lwrist rhip rknee rankle lhip lknee "
                  "lankle reye leye rear lear").split()
MPI_28 = ("spine3 spine4 spine2 spine pelvis neck nose top lcollar lshoulder lelbow lwrist lhand rcollar "
          "rshoulder relbow rwrist rhand lhip lknee lankle ltoe ltip rhip rknee rankle rtoe rtip").split()
MPI_17 = ("top neck rshoulder relbow rwrist lshoulder lelbow lwrist rhip rknee rankle lhip lknee lankle "
          "pelvis spine nose").split()
SIDES = np.array([name[0] if name[0] in "rl" else "m" for name in OURS])
MPI_NAMES = {"train": MPI_28, "test": MPI_17}


def refused(message: str):
    return pytest.raises(InputError, match=message)


# ==========================================================================================================
# A body, its picture, and files of it
# ==========================================================================================================
def body(rng, place, lean: float = 1.0) -> dict[str, np.ndarray]:
    """{joint: (3,) mm, camera} of a bent body, its pelvis at `place`, mostly facing the camera."""
    turn, bend = rng.uniform(-1, 1), rng.uniform(0.3, 1.0, 2)
    part = {"pelvis": (0, 0, 0), "spine1": (0, 110, 5), "spine": (0, 230, 15), "spine2": (0, 260, 15),
            "spine3": (0, 330, 10), "spine4": (0, 400, 10), "neck": (0, 480, 10), "nose": (0, 570, 100),
            "head": (0, 600, 40), "top": (0, 700, 40)}
    for side, sign, (thigh, shin, arm) in (("l", 1, (0.2, 0.4, 0.5)), ("r", -1, (0.9, 0.3, 0.9))):
        a, b, c = thigh * bend[0], shin * bend[0] + 0.2, arm * bend[1] + 0.2
        chain = {"hip": (130 * sign, 0, 0), "knee": (30 * sign, -440 * np.cos(a), 440 * np.sin(a)),
                 "ankle": (0, -430 * np.cos(b), -430 * np.sin(b)), "toe": (10 * sign, -60, 120),
                 "tip": (0, 0, 60)}
        part |= dict(zip((side + name for name in chain), np.cumsum([*chain.values()], axis=0)))
        chain = {"collar": (60 * sign, 420, 0), "shoulder": (110 * sign, 30, 0),
                 "elbow": (280 * sign * np.sin(c), -280 * np.cos(c), 20), "wrist": (60 * sign, 60, 230),
                 "hand": (0, 30, 80), "thumb": (-20 * sign, 0, 20)}
        part |= dict(zip((side + name for name in chain), np.cumsum([*chain.values()], axis=0)))
        part |= {side + "eye": (35 * sign, 610, 90), side + "ear": (75 * sign, 600, 20)}
    s, c = np.sin(turn), np.cos(turn)                          # left, up, forward -> right, down, away
    to_camera = np.array([[c, 0, s], [0, -1, 0], [s, 0, -c]])
    return {name: to_camera @ np.array(xyz, float) * lean + place for name, xyz in part.items()}


def bodies(rng, count: int, low, high) -> list[dict]:
    return [body(rng, rng.uniform(low, high)) for _ in range(count)]


def stack(people: list[dict], names: list) -> np.ndarray:
    """(n, len(names), 3) mm."""
    return np.array([[person[name] for name in names] for person in people])


def ours(people: list[dict], no: tuple = ()) -> np.ndarray:
    """What a reader must find, (n, 17, 3) mm; NaN: the joints `no`."""
    truth = stack(people, OURS)
    truth[:, [OURS.index(name) for name in no]] = np.nan
    return truth


def bent(xy: np.ndarray, distortion) -> np.ndarray:
    """The lens of OpenCV's documentation: (..., 2) on the plane z = 1."""
    k1, k2, p1, p2, k3 = distortion
    x, y = xy[..., 0], xy[..., 1]
    r = np.sqrt(x ** 2 + y ** 2)
    radial = 1 + k1 * r ** 2 + k2 * r ** 4 + k3 * r ** 6
    return np.stack([x * radial + 2 * p1 * x * y + p2 * (r ** 2 + 2 * x ** 2),
                     y * radial + p1 * (r ** 2 + 2 * y ** 2) + 2 * p2 * x * y], axis=-1)


def seen(points: np.ndarray, K: np.ndarray, distortion=(0, 0, 0, 0, 0)) -> np.ndarray:
    """(..., 3) mm, camera -> (..., 2) px."""
    return bent(points[..., :2] / points[..., 2:], distortion) * K[[0, 1], [0, 1]] + K[:2, 2]


def picture(size: tuple, people: list[dict], K, distortion=(0, 0, 0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Drawn bodies (H, W, 3) uint8 and their mask (H, W) bool."""
    image = Image.new("RGB", size, GREEN)
    draw, mask = ImageDraw.Draw(image), Image.new("1", size)
    for x in range(0, size[0], 32): draw.rectangle((x, 0, x + 15, size[1]), fill=SHADE)
    for person in people:
        uv = seen(stack([person], OURS)[0], K, distortion)
        width = max(3, int(np.ptp(uv[:, 1]) / 18))
        for canvas, ink in ((draw, INK), (ImageDraw.Draw(mask), dict.fromkeys("rlm", 1))):
            for a, b in sorted(data.HUMAN_BONES, key=lambda bone: SIDES[bone[1]] != "m"):
                canvas.line([tuple(uv[a]), tuple(uv[b])], fill=ink[SIDES[b]], width=width)
            for i, (u, v) in enumerate(uv):
                r = 0.75 * width
                canvas.ellipse((u - r, v - r, u + r, v + r), fill=ink[SIDES[i]])
    return np.asarray(image), np.asarray(mask)


def write_video(path: Path, frames: list, codec: str = "libx264") -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=50)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate, stream.thread_count = "yuv420p", 8_000_000, 1
        if codec == "libx264": stream.options = {"crf": "10", "preset": "ultrafast"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")): file.mux(packet)
        for packet in stream.encode(): file.mux(packet)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)


def write_h5(path: Path, arrays: dict) -> None:
    """A MATLAB 7.3 file: HDF5 behind 512 bytes, each array's axes reversed, of a cell the references."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            if not isinstance(array, list): file[name] = np.asarray(array).T; continue
            cell = file.create_dataset(name, (len(array), 1), h5py.ref_dtype)
            for i, item in enumerate(array):
                file[f"#refs#/{name}{i}"] = np.asarray(item).T
                cell[i, 0] = file[f"#refs#/{name}{i}"].ref
    with open(path, "r+b") as file: file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")


def write_cdf(path: Path, pose: np.ndarray) -> None:
    """Pose (F, ...) as Human3.6M's float32 (1, F, -1)."""
    from cdflib.cdfwrite import CDF
    pose = pose.reshape(1, len(pose), -1).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    file = CDF(str(path), {"Encoding": 6, "Majority": "row_major"})
    spec = {"Variable": "Pose", "Data_Type": 44, "Num_Elements": 1, "Rec_Vary": True,
            "Dim_Sizes": list(pose.shape[1:]), "Compress": 6}
    file.write_var(spec, var_data=pose)
    file.close()


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did: str are byte strings, arrays' data too."""
    dispatch = pickle._Pickler.dispatch.copy()

    def save_old_string(self, text):
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + len(raw).to_bytes(4, "little") + raw)
        self.memoize(text)
    dispatch[str] = dispatch[bytes] = save_old_string


def write_pickle(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    path.write_bytes(file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


# ==========================================================================================================
# From a fixture to a data set
# ==========================================================================================================
def run(name: str, root: Path, out: Path, *flags, side: int = 128) -> data.Dataset:
    data.main([name, str(root), str(out), "--side", str(side), "--workers", "1", *map(str, flags)])
    fields = [field for field in data.ARRAYS if (out / f"{field}.npy").exists() and field != "images"]
    return data.Dataset(out, *fields)


def colours_met(dataset: data.Dataset) -> float:
    """Share of joints whose pixel has its side's colour, of those with no other side within 5 px."""
    met, inks = [], np.array([INK["r"], INK["l"], INK["m"], GREEN, SHADE])
    for image, keypoints, K in zip(dataset.images, dataset.keypoints, dataset.intrinsics):
        uv, size = data.to_uv(keypoints, K), len(image)
        for i, (u, v) in enumerate(uv):
            apart = np.linalg.norm(uv - (u, v), axis=1) + 99 * (SIDES == SIDES[i])
            if not (0 <= u < size - 1 and 0 <= v < size - 1) or np.nanmin(apart) < 8: continue
            ink = inks[np.abs(image[round(v), round(u)] - inks).sum(-1).argmin()]
            met.append(tuple(ink) == INK[SIDES[i]])
    assert len(met) > 4 * len(dataset)
    return float(np.mean(met))


def assert_sound(dataset: data.Dataset, truth: np.ndarray, capsys) -> None:
    """The rows are `truth` (n, 17, 3) mm and show the joints at their projections; `check` finds no fault."""
    assert dataset.meta["skipped"] == [] and dataset.meta["joints"] == data.HUMAN_JOINTS
    assert dataset.keypoints.shape == truth.shape
    assert np.allclose(dataset.keypoints, truth, atol=0.01, equal_nan=True)
    assert colours_met(dataset) > 0.97
    data.main(["check", str(dataset.folder)])
    out = capsys.readouterr().out
    assert f"labels: 0 of {len(dataset)} rows are impossible" in out and "without" not in out


def trap(monkeypatch, name: str, change) -> None:
    """Puts a mistake into a reader: each of its samples goes through change(sample)."""
    reader, *rest = data.READERS[name]

    @functools.wraps(reader)
    def wrong(*arguments, **options):
        count, samples = reader(*arguments, **options)
        return count, map(change, samples)
    wrong.__signature__ = inspect.signature(reader)
    monkeypatch.setitem(data.READERS, name, (wrong, *rest))


# ==========================================================================================================
# Human3.6M
# ==========================================================================================================
H36M_SIZE = {"54138969": (250, 252), "58860488": (250, 250)}
H36M_K = {"54138969": np.array([[286.4, 0, 128.2], [0, 286.1, 127.4], [0, 0, 1]]),
          "58860488": np.array([[287.3, 0, 129.3], [0, 286.9, 125.1], [0, 0, 1]])}
H36M_LENS = {"54138969": (-0.21, 0.24, -0.0009, -0.0016, -0.003),
             "58860488": (-0.25, 0.30, 0.0020, -0.0010, -0.050)}
H36M_VIDEOS = {"S1": ("Directions 1", "Directions", "_ALL 1"), "S5": ("WalkDog",), "S6": ("Sitting 2",),
               "S7": ("Photo",), "S8": ("Waiting",), "S9": ("Posing", "_ALL"),
               "S11": ("Directions", "Directions 1")}
H36M_FRAMES = 6


def h36m_people(subject: str, video: str, camera: str) -> list[dict]:
    rng = np.random.default_rng([ord(c) for c in subject + video + camera])
    return bodies(rng, H36M_FRAMES, (-1100, -500, 3300), (1100, 300, 4600))


def h36m_videos(*subjects: str) -> list[tuple]:
    """(subject, video, camera) of those that are read, in the order of the rows."""
    return [(s, v, c) for s in subjects for c in sorted(H36M_K)
            for v in sorted(H36M_VIDEOS[s], key=lambda v: v + ".")
            if "_ALL" not in v and (s, v, c) != ("S11", "Directions", "54138969")]


def write_h36m(root: Path) -> None:
    """D3 has two frames more than the video, D2 one; "_ALL" is broken, and so is one video."""
    for subject, videos in H36M_VIDEOS.items():
        for folder in ("Videos", "MySegmentsMat/ground_truth_bs"):
            (root / subject / folder).mkdir(parents=True)
        for video, camera in ((v, c) for v in videos for c in H36M_K):
            name, K, lens = f"{video}.{camera}", H36M_K[camera], H36M_LENS[camera]
            people = h36m_people(subject, video, camera)
            points = stack(people + people[:2], H36M_NAMES)
            poses = root / subject / "MyPoseFeatures"
            write_cdf(poses / "D3_Positions_mono" / f"{name}.cdf", points)
            write_cdf(poses / "D2_Positions" / f"{name}.cdf", seen(points, K, lens)[:H36M_FRAMES + 1])
            file = root / subject / "Videos" / f"{name}.mp4"
            if "_ALL" in video or (subject, name) == ("S11", "Directions.54138969"):
                file.write_bytes(b"corrupt")
                continue
            frames, masks = zip(*(picture(H36M_SIZE[camera], [person], K, lens) for person in people))
            write_video(file, frames)
            write_h5(root / subject / f"MySegmentsMat/ground_truth_bs/{name}.mat",
                     {"Masks": [mask.astype(np.uint8) for mask in masks]})


@pytest.fixture(scope="module")
def h36m(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "h36m"
    write_h36m(root)
    return root


@pytest.fixture(scope="module")
def h36m_set(h36m, tmp_path_factory) -> data.Dataset:
    return run("h36m", h36m, tmp_path_factory.mktemp("h36m") / "train")


@pytest.fixture
def small_h36m(h36m, tmp_path, monkeypatch) -> Path:
    """A copy to break, of the test subjects."""
    monkeypatch.setitem(data.H36M_SUBJECTS, "train", ("S9", "S11"))
    for subject in ("S9", "S11"): shutil.copytree(h36m / subject, tmp_path / "h36m" / subject)
    return tmp_path / "h36m"


def test_h36m(h36m_set, capsys):
    videos = h36m_videos("S1", "S5", "S6", "S7", "S8")
    truth = np.concatenate([ours(h36m_people(*video))[::5] for video in videos])
    assert len(videos) == 12 and h36m_set.meta["split"] == "train"
    assert_sound(h36m_set, truth, capsys)


def test_h36m_crops_are_pinhole_images_with_masks(h36m_set):
    """The lens is undone in picture and mask: the mask covers the pinhole projections and no background."""
    green = np.abs(h36m_set.images[:].astype(int) - GREEN).sum(-1) < 30           # (n, H, H)
    assert share_on_mask(h36m_set) > 0.99 and (h36m_set.masks[:][green] < 128).mean() > 0.99
    assert 0.02 < (h36m_set.masks[:] >= 128).mean() < 0.2


def test_h36m_lens_is_found(h36m):
    _, samples = data.read_h36m(h36m)
    for sample in samples:
        camera = sample.image.rpartition(".")[0][-8:]
        K, lens = H36M_K[camera], H36M_LENS[camera]
        assert np.abs(seen(sample.keypoints, K, lens) - sample.uv).max() < 0.01
        assert np.abs(seen(sample.keypoints, sample.intrinsics, sample.distortion) - sample.uv).max() < 0.1
        assert np.abs(seen(sample.keypoints, sample.intrinsics) - sample.uv).max() > 0.1
        assert np.allclose(sample.intrinsics, K, rtol=0.01)
        assert np.isclose(sample.distortion[0], lens[0], atol=0.1)


def test_h36m_lens_of_the_publisher_s_own_form():
    """Its tangential term lacks OpenCV's factor 2 beside the radial one: no pixel moves by half for that."""
    points = np.random.default_rng(0).uniform((-1300, -900, 3000), (1300, 1000, 6500), (4000, 3))
    x, y = (points[:, :2] / points[:, 2:]).T
    r2 = x * x + y * y
    factor = 1 - 0.21 * r2 + 0.25 * r2 ** 2 - 0.003 * r2 ** 3 - 0.0009 * y - 0.0016 * x
    uv = np.stack([1145 * (x * factor - 0.0016 * r2) + 512, 1143 * (y * factor - 0.0009 * r2) + 515], axis=1)
    K, lens = data.lens_of(points, uv, "camera")
    assert np.abs(seen(points, K, lens) - uv).max() < 0.2
    assert np.abs(seen(points, K) - uv).max() > 2
    with refused("camera: no lens takes"): data.lens_of(points, uv + 3 * (points[:, :1] > 0), "camera")


def test_h36m_test_split(h36m, tmp_path, capsys):
    dataset = run("h36m", h36m, tmp_path / "test", "--split", "test", "--masks", "no")
    truth = np.concatenate([ours(h36m_people(*video))[::5] for video in h36m_videos("S9", "S11")])
    assert dataset.masks is None and len(truth) == 10   # S9: 2 videos, S11: 4, one of them corrupt
    assert_sound(dataset, truth, capsys)


def test_h36m_unpacked_one_folder_a_download(h36m_set, h36m, tmp_path):
    root = Path(shutil.copytree(h36m, tmp_path / "h36m"))
    for subject in ("S1", "S5", "S6", "S7", "S8"):
        for kind in ("D2_Positions", "D3_Positions_mono"):
            (root / subject / "MyPoseFeatures" / kind).rename(root / subject / f"Poses_{kind}")
    dataset = run("h36m", root, tmp_path / "out")
    assert np.array_equal(dataset.images, h36m_set.images)
    assert np.array_equal(dataset.keypoints, h36m_set.keypoints)


def test_h36m_without_the_masks_of_a_video(small_h36m, tmp_path, monkeypatch):
    """Its frames are left out and counted, and too many of them are an error."""
    (small_h36m / "S9/MySegmentsMat/ground_truth_bs/Posing.58860488.mat").unlink()
    with refused("for 'mask' .*Posing.58860488.mp4 frame 0: mask: no Posing.58860488.mat"):
        run("h36m", small_h36m, tmp_path / "out", "--split", "test")
    monkeypatch.setitem(data.READERS, "h36m", (*data.READERS["h36m"][:2], 0.9))
    dataset = run("h36m", small_h36m, tmp_path / "most", "--split", "test")
    assert len(dataset.meta["skipped"]) > 0 and all("mask: no Posing" in text for text in dataset.meta["skipped"])


def test_h36m_lengths_differ(h36m, tmp_path, monkeypatch):
    """2D positions go on for a frame, 3D for two, after the video's end: one frame is counted as left out."""
    monkeypatch.setitem(data.READERS, "h36m", (*data.READERS["h36m"][:2], 0.2))
    dataset = run("h36m", h36m, tmp_path / "out", "--split", "test", "--stride", 1, side=32)
    assert len(dataset) == 5 * H36M_FRAMES and len(dataset.meta["skipped"]) == 5
    assert all("frame 6" in line for line in dataset.meta["skipped"])


def left_leg_first(monkeypatch, root):
    monkeypatch.setattr(data, "H36M_JOINTS", [11, 6, 7, 8, 1, 2, 3, 12, 24, 14, 15, 17, 18, 19, 25, 26, 27])


def all_sides_swapped(monkeypatch, root):
    monkeypatch.setattr(data, "H36M_JOINTS", [0, 6, 7, 8, 1, 2, 3, 12, 13, 14, 15, 25, 26, 27, 17, 18, 19])


def no_lens(monkeypatch, root):
    trap(monkeypatch, "h36m", lambda sample: sample._replace(distortion=None))


def universal_skeleton(monkeypatch, root):
    """mono_universal: bones of another length about the same pelvis."""
    for file in root.glob("S*/MyPoseFeatures/D3_Positions_mono/*.cdf"):
        points = np.asarray(cdflib.CDF(file).varget("Pose")).reshape(-1, 32, 3).astype(float)
        stretch = np.where(np.array([name[1:] in ("knee", "ankle") for name in H36M_NAMES]), 1.2, 1.1)
        write_cdf(file, points[:, :1] + stretch[:, None] * (points - points[:, :1]))


def world_positions(monkeypatch, root):
    for file in root.glob("S*/MyPoseFeatures/D3_Positions_mono/*.cdf"):
        points = np.asarray(cdflib.CDF(file).varget("Pose")).reshape(-1, 32, 3).astype(float)
        write_cdf(file, points[..., [0, 2, 1]] * (1, 1, -1) + (200, 900, 1500))


def other_units(monkeypatch, root):
    for file in root.glob("S*/MyPoseFeatures/D3_Positions_mono/*.cdf"):
        write_cdf(file, np.asarray(cdflib.CDF(file).varget("Pose"))[0] / 1000)


H36M_TRAPS = {
    "left leg first": (left_leg_first, "'order'.*left and right exchanged in arms or legs"),
    "left and right exchanged": (all_sides_swapped, "'handedness'.*knees bend forwards"),
    "distortion forgotten": (no_lens, "'projection'.*px from the publisher's 2D labels.*distortion"),
    "mono_universal": (universal_skeleton, "camera 54138969: no lens takes its 3D to its 2D positions"),
    "world positions": (world_positions, "camera 54138969: no lens takes its 3D to its 2D positions"),
    "metres": (other_units, "'bone'"),
}


@pytest.mark.parametrize("what", H36M_TRAPS)
def test_h36m_traps(what, small_h36m, tmp_path, monkeypatch):
    put_in, message = H36M_TRAPS[what]
    put_in(monkeypatch, small_h36m)
    with refused(message): run("h36m", small_h36m, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def share_on_mask(dataset: data.Dataset) -> float:
    """Of the joints inside the crop, those on its mask."""
    on = []
    for mask, keypoints, K in zip(dataset.masks, dataset.keypoints, dataset.intrinsics):
        uv, size = np.nan_to_num(seen(keypoints, K), nan=-1), len(mask)
        u, v = np.round(uv[((uv >= 0) & (uv < size - 1)).all(axis=1)]).astype(int).T
        on.extend(mask[v, u] >= 128)
    return float(np.mean(on))


def other_frame(sample: data.Sample) -> int:
    """The frame before, as for a reader that drops a video's first; of the first frame the second."""
    return sample.frame - 1 if sample.frame else 1


def test_h36m_other_pictures_and_masks_are_told(h36m, h36m_set, tmp_path, monkeypatch):
    """What no check of the labels can know: here it is seen that another frame's would not fit."""
    trap(monkeypatch, "h36m", lambda sample: sample._replace(frame=other_frame(sample)))
    dataset = run("h36m", h36m, tmp_path / "one", "--split", "test")
    assert colours_met(h36m_set) > 0.97 and share_on_mask(h36m_set) > 0.99
    assert colours_met(dataset) < 0.6 and share_on_mask(dataset) > 0.99
    monkeypatch.undo()
    trap(monkeypatch, "h36m", lambda sample: sample._replace(mask_key=other_frame(sample)))
    dataset = run("h36m", h36m, tmp_path / "two", "--split", "test")
    assert colours_met(dataset) > 0.97 and share_on_mask(dataset) < 0.7
    monkeypatch.undo()
    monkeypatch.setattr(data, "H36M_JOINTS", list(range(17)))  # not the 17 of 32
    trap(monkeypatch, "h36m", lambda sample: sample._replace(uv=None))
    with pytest.raises(InputError, match="bone: .* mm from hip to knee"):
        run("h36m", h36m, tmp_path / "three", "--split", "test")


H36M_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "S9/.*no such folder. ROOT holds S1/Videos"),
    "no videos": (lambda r: shutil.rmtree(r / "S9/Videos"), "S9/Videos: no such folder. ROOT holds"),
    "a video less": (lambda r: (r / "S11/Videos/Directions 1.58860488.mp4").unlink(),
                     "S11/Videos/Directions 1.58860488.mp4: missing"),
    "a pose less": (lambda r: (r / "S9/MyPoseFeatures/D3_Positions_mono/Posing.58860488.cdf").unlink(),
                    "D3_Positions_mono/Posing.58860488.cdf: missing"),
    "no mono": (lambda r: shutil.rmtree(r / "S9/MyPoseFeatures/D3_Positions_mono"), "mono: no such"),
    "no masks": (lambda r: shutil.rmtree(r / "S9/MySegmentsMat"), "S9/MySegmentsMat: no such.* --masks no"),
    "half a cdf": (lambda r: cut(r / "S9/MyPoseFeatures/D2_Positions/Posing.58860488.cdf"),
                   "Posing.58860488.cdf: "),
    "empty cdf": (lambda r: cut(r / "S9/MyPoseFeatures/D2_Positions/Posing.58860488.cdf", 0),
                  "Posing.58860488.cdf: "),
    "2D for 3D": (lambda r: shutil.copy(*(r / f"S9/MyPoseFeatures/{kind}/Posing.58860488.cdf"
                                          for kind in ("D2_Positions", "D3_Positions_mono"))),
                  "D3_Positions_mono/Posing.58860488.cdf: Pose .* 96"),
    "half a video": (lambda r: cut(r / "S9/Videos/Posing.58860488.mp4"), "Posing.58860488.mp4: "),
    "half the masks": (lambda r: cut(r / "S9/MySegmentsMat/ground_truth_bs/Posing.58860488.mat"),
                       "Posing.58860488.mat: "),
}


@pytest.mark.parametrize("what", H36M_DAMAGE)
def test_h36m_damage(what, small_h36m, tmp_path):
    spoil, message = H36M_DAMAGE[what]
    spoil(small_h36m)
    with refused(message) as caught: run("h36m", small_h36m, tmp_path / "out")
    assert "\n" not in str(caught.value)


# ==========================================================================================================
# 3DPW
# ==========================================================================================================
PW3D_SIZE = {"downtown_walk_00": (480, 270), "outdoors_up_01": (270, 480), "office_call_00": (480, 270)}
PW3D_SPLIT = {"test": ("downtown_walk_00", "outdoors_up_01"), "train": ("office_call_00",), "validation": ()}
PW3D_FRAMES, PW3D_PEOPLE = 4, {"downtown_walk_00": 2, "outdoors_up_01": 1, "office_call_00": 2}
NOT_IN_SMPL = ("nose", "top")


def pw3d_scene(name: str) -> tuple:
    """Intrinsics; for each frame world -> camera (4, 4) m, far from the others', and the people."""
    rng, (width, height) = np.random.default_rng([ord(c) for c in name]), PW3D_SIZE[name]
    K = np.array([[490, 0, width / 2 - 0.3], [0, 490, height / 2 + 0.4], [0, 0, 1]])
    poses = np.tile(np.eye(4), (PW3D_FRAMES, 1, 1))
    poses[:, :3, :3] = data.rotation(*rng.uniform(-1.5, 1.5, (3, PW3D_FRAMES)))
    poses[:, :3, 3] = rng.uniform(-2, 2, (PW3D_FRAMES, 3))
    reach = width / 490 * 4500 / 2
    low = ((-0.6 * reach, -200, 4300), (0.35 * reach, -200, 4300))
    people = [[body(rng, rng.uniform(low[p], np.add(low[p], (0.25 * reach, 100, 500))))
               for p in range(PW3D_PEOPLE[name])] for _ in range(PW3D_FRAMES)]
    return K, poses, people


def pw3d_known(name: str) -> list[list[bool]]:
    """[frame][person]: whether there is a sample."""
    return [[(name, i, p) not in (("downtown_walk_00", 1, 0), ("downtown_walk_00", 2, 1))
             for p in range(PW3D_PEOPLE[name])] for i in range(PW3D_FRAMES)]


def write_3dpw(root: Path) -> None:
    for split, name in ((split, name) for split, names in PW3D_SPLIT.items() for name in names):
        (K, poses, people), rng = pw3d_scene(name), np.random.default_rng(0)
        joints = np.array([stack(crowd, SMPL_NAMES) for crowd in people]) / 1000     # (F, P, 24, 3) m, camera
        joints = np.einsum("fji,fpkj->fpki", poses[:, :3, :3], joints - poses[:, None, None, :3, 3])
        found = np.array([seen(stack(crowd, OPENPOSE_NAMES), K) for crowd in people])  # (F, P, 18, 2) px
        found, sure = found + rng.normal(0, 2, found.shape), np.full((*found.shape[:3], 1), 0.8)
        found = np.concatenate([found, sure], axis=-1)
        found[:, :, [4, 16]] = 0                                       # wrist and ear are never found
        found[:, :, 10, :2] += 90                                      # the ankle is someone else's
        found[2, 1:] = 0                                               # in frame 2 the second is not found
        valid = np.ones((PW3D_PEOPLE[name], PW3D_FRAMES), int)
        if len(valid) > 1 and split == "test": valid[0, 1] = 0
        rest = {"sequence": name, "genders": ["m", "f"], "betas": [np.zeros(10)] * 2, "texture_maps": [],
                "img_frame_ids": np.arange(PW3D_FRAMES) * 2, "trans_60Hz": [np.zeros((7, 3))] * 2}
        write_pickle(root / f"sequenceFiles/{split}/{name}.pkl", rest | {
            "jointPositions": [np.ascontiguousarray(j.reshape(-1, 72)) for j in joints.swapaxes(0, 1)],
            "poses2d": [np.ascontiguousarray(f.transpose(0, 2, 1)) for f in found.swapaxes(0, 1)],
            "campose_valid": list(valid), "cam_poses": poses, "cam_intrinsics": K})
        for i, crowd in enumerate(people):
            pixels, _ = picture(PW3D_SIZE[name], crowd, K)
            write_picture(root / f"imageFiles/{name}/image_{i:05d}.jpg", pixels)


def pw3d_truth(*names: str, no: tuple = NOT_IN_SMPL) -> np.ndarray:
    return ours([person for name in names for crowd, known in zip(pw3d_scene(name)[2], pw3d_known(name))
                 for person, here in zip(crowd, known) if here], no)


@pytest.fixture(scope="module")
def pw3d(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "3DPW"
    write_3dpw(root)
    return root


@pytest.fixture
def broken_3dpw(pw3d, tmp_path) -> Path:
    return Path(shutil.copytree(pw3d, tmp_path / "3DPW"))


@pytest.fixture(scope="module")
def pw3d_set(pw3d, tmp_path_factory) -> data.Dataset:
    return run("3dpw", pw3d, tmp_path_factory.mktemp("3dpw") / "test", "--split", "test")


def test_3dpw(pw3d_set, capsys):
    truth = pw3d_truth("downtown_walk_00", "outdoors_up_01")
    assert len(truth) == 6 + 4 and np.isnan(truth[:, 9:11]).all() and np.isfinite(truth[:, 8]).all()
    assert_sound(pw3d_set, truth, capsys)


def assert_heads_inside(dataset: data.Dataset, truth: np.ndarray) -> None:
    """The network's crop (a margin less than the stored one) holds what SMPL has no joint for."""
    room = (1 - 1 / dataset.meta["margin"]) / 2 * dataset.images.shape[1]
    for points, K in zip(truth, dataset.intrinsics):
        uv = seen(points[[9, 10]], K)
        assert (uv > 1.2 * room).all() and (uv < dataset.images.shape[1] - 1 - 1.2 * room).all()


def test_3dpw_heads_are_inside(pw3d_set):
    assert_heads_inside(pw3d_set, pw3d_truth(*PW3D_SPLIT["test"], no=()))


def test_3dpw_other_split_stride_and_folder(pw3d, broken_3dpw, tmp_path, capsys):
    dataset = run("3dpw", pw3d, tmp_path / "train")
    truth = pw3d_truth("office_call_00")
    detected = np.arange(8) != 5                                       # person 1 of frame 2
    assert_sound(dataset, truth[detected], capsys)
    (broken_3dpw / "sequenceFiles").rename(broken_3dpw / "s")
    (broken_3dpw / "sequenceFiles").mkdir()
    (broken_3dpw / "s").rename(broken_3dpw / "sequenceFiles/sequenceFiles")
    assert_sound(run("3dpw", broken_3dpw, tmp_path / "two", "--stride", 3), truth[[0, 1, 6, 7]], capsys)


def rewrite_sequences(change):
    """A trap: change(dict) of each sequence in place."""
    def put_in(monkeypatch, root):
        for file in root.glob("sequenceFiles/*/*.pkl"):
            found = data.read_pickle(file)
            change(found)
            write_pickle(file, found)
    return put_in


def millimetres(found): found["jointPositions"] = [1000 * joints for joints in found["jointPositions"]]
def centimetres(found): found["jointPositions"] = [100 * joints for joints in found["jointPositions"]]
def next_camera(found): found["cam_poses"] = np.roll(found["cam_poses"], 1, axis=0)
def inverse_camera(found): found["cam_poses"] = np.linalg.inv(found["cam_poses"])
def other_person(found): found["jointPositions"] = found["jointPositions"][::-1]
def fewer_frames(found): found["jointPositions"] = [joints[1:] for joints in found["jointPositions"]]
def fewer_people(found): found["poses2d"].pop()
def words(found): found["poses2d"] = [np.full(seen.shape, "a") for seen in found["poses2d"]]
def no_camera(found): found["cam_poses"] = np.tile(np.eye(4), (PW3D_FRAMES, 1, 1))


def smpl_taken_for_surreal(monkeypatch, root):
    monkeypatch.setattr(data, "SMPL_JOINTS", data.MIRRORED_SMPL)


PW3D_TRAPS = {
    "millimetres taken for metres": (rewrite_sequences(millimetres), "'bone'.* another unit"),
    "centimetres taken for metres": (rewrite_sequences(centimetres), "'bone'.* another unit"),
    "camera of another frame": (rewrite_sequences(next_camera), "'projection'"),
    "camera -> world": (rewrite_sequences(inverse_camera), "'projection'"),
    "world taken for camera": (rewrite_sequences(no_camera), "'projection'"),
    "labels of the other person": (rewrite_sequences(other_person), "'projection'.* px from the publisher's"),
    "left and right exchanged": (smpl_taken_for_surreal, "'handedness'"),
}


@pytest.mark.parametrize("what", PW3D_TRAPS)
def test_3dpw_traps(what, broken_3dpw, tmp_path, monkeypatch):
    put_in, message = PW3D_TRAPS[what]
    put_in(monkeypatch, broken_3dpw)
    with refused("samples left out.*" + message):
        run("3dpw", broken_3dpw, tmp_path / "out", "--split", "test")


def test_3dpw_other_pictures_are_told(pw3d, tmp_path, monkeypatch):
    """img_frame_ids count at 60 Hz; taken for image numbers they show another moment."""
    following = {f"image_{i:05d}": f"image_{(2 * i) % 3:05d}" for i in range(PW3D_FRAMES)}
    def wrong(sample):
        path = Path(sample.image)
        return sample._replace(image=str(path.with_stem(following[path.stem])))
    trap(monkeypatch, "3dpw", wrong)
    assert colours_met(run("3dpw", pw3d, tmp_path / "out", "--split", "test")) < 0.85


class Malicious:
    def __reduce__(self): return (Path.touch, (Path("was_run"),))


def without(key):
    def put_in(root):
        file = root / "sequenceFiles/test/outdoors_up_01.pkl"
        found = data.read_pickle(file)
        del found[key]
        write_pickle(file, found)
    return put_in


PW3D_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "sequenceFiles/test: no sequence here. ROOT holds"),
    "no pictures": (lambda r: shutil.rmtree(r / "imageFiles"), "imageFiles/.*no such folder. ROOT holds"),
    "pictures of one": (lambda r: shutil.rmtree(r / "imageFiles/outdoors_up_01"), "outdoors_up_01: no such"),
    "a picture less": (lambda r: (r / "imageFiles/outdoors_up_01/image_00003.jpg").unlink(),
                       "image_00003.jpg: missing.* has 4 frames"),
    "half a picture": (lambda r: cut(r / "imageFiles/outdoors_up_01/image_00003.jpg"), "00003.jpg: broken"),
    "half a pickle": (lambda r: cut(r / "sequenceFiles/test/outdoors_up_01.pkl"), "outdoors_up_01.pkl: "),
    "an empty pickle": (lambda r: cut(r / "sequenceFiles/test/outdoors_up_01.pkl", 0), "up_01.pkl: "),
    "no cameras": (without("cam_poses"), "outdoors_up_01.pkl: broken sequence of 3DPW: KeyError .*cam_poses"),
    "no joints": (without("jointPositions"), "up_01.pkl: broken sequence of 3DPW: KeyError .*jointPositions"),
    "another pickle": (lambda r: write_pickle(r / "sequenceFiles/test/outdoors_up_01.pkl", [1, 2]),
                       "outdoors_up_01.pkl: broken sequence of 3DPW"),
    "fewer frames": (lambda r: rewrite_sequences(fewer_frames)(None, r), "pkl: broken sequence of 3DPW"),
    "words": (lambda r: rewrite_sequences(words)(None, r), "pkl: broken sequence of 3DPW: could not"),
    "fewer people": (lambda r: rewrite_sequences(fewer_people)(None, r), "pkl: broken sequence of 3DPW"),
    "a malicious pickle": (lambda r: (r / "sequenceFiles/test/outdoors_up_01.pkl").write_bytes(
        pickle.dumps({"cam_poses": Malicious()})), "outdoors_up_01.pkl: .*refused"),
}


@pytest.mark.parametrize("what", PW3D_DAMAGE)
def test_3dpw_damage(what, broken_3dpw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, message = PW3D_DAMAGE[what]
    spoil(broken_3dpw)
    with refused(message) as caught: run("3dpw", broken_3dpw, tmp_path / "out", "--split", "test")
    assert "\n" not in str(caught.value) and not (tmp_path / "was_run").exists()


# ==========================================================================================================
# MPI-INF-3DHP
# ==========================================================================================================
MPI_SIZE, MPI_ENLARGED, MPI_ROWS = (256, 256), 1.09, {"S1/Seq1": 4, "S1/Seq2": 3}
MPI_CALIBRATION = {  # numbers of many lengths, as the publisher's
    0: np.array([[187.211625, 0, 128.088, 0], [0, 187.137875, 131.42425, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    4: np.array([[186.6, 0, 127.25, 0], [0, 186.5405, 126.9, 0], [0, 0, 1, 0], [0, 0, 0, 1]])}
MPI_VALID = [1, 0, 1, 1]


def mpi_people(sequence: str, camera: int = 0) -> list[dict]:
    rng = np.random.default_rng([ord(c) for c in sequence] + [camera])
    return bodies(rng, 5, (-700, -300, 3000), (700, 200, 4000))


def universal(points: np.ndarray) -> np.ndarray:
    """univ_annot3 of annot3 (n, K, 3): people of another height, who stand elsewhere."""
    return MPI_ENLARGED * points + (150, -40, 300)


def write_3dhp(root: Path) -> None:
    for name in MPI_ROWS:  # annot.mat has five rows, one or two more than the video has frames
        folder = root / name
        (folder / "imageSequence").mkdir(parents=True)
        cells = {key: np.empty((14, 1), object) for key in ("annot2", "annot3", "univ_annot3")}
        text = "Skeletool Camera Calibration File V1.0\n"
        for camera in range(14):
            M = MPI_CALIBRATION.get(camera, 2 * np.eye(4))
            points = stack(mpi_people(name, camera), MPI_NAMES["train"])
            arrays = seen(points, M[:3, :3]), points, universal(points)
            for cell, array in zip(cells.values(), arrays): cell[camera, 0] = array.reshape(len(points), -1)
            numbers = {"sensor": "10 10", "size": "256 256", "animated": 0,
                       "intrinsic": " ".join(map(str, M.ravel())), "extrinsic": " ".join(["0.9650164"] * 16),
                       "radial": 0}
            text += f"name          {camera}\n" + "".join(f"  {k:<12}{v}\n" for k, v in numbers.items())
            if camera not in MPI_CALIBRATION: continue
            frames = [picture(MPI_SIZE, [p], M[:3, :3])[0] for p in mpi_people(name, camera)[:MPI_ROWS[name]]]
            write_video(folder / f"imageSequence/video_{camera}.avi", frames, "mpeg4")
        (folder / "camera.calibration").write_text(text)
        scipy_io.savemat(folder / "annot.mat", cells | {"cameras": np.arange(14.0)}, do_compression=True)


def write_3dhp_test(root: Path) -> None:
    for i in range(1, 7):
        people, size = mpi_people(f"TS{i}")[:4], (256, 256) if i < 5 else (320, 180)
        folder, points = root / f"mpi_inf_3dhp_test_set/TS{i}", stack(people, MPI_NAMES["test"])
        K = np.array([[150 + 3 * i, 0, size[0] / 2 + 0.2 * i], [0, 151 + 3 * i, size[1] / 2], [0, 0, 1]])
        uv = seen(points, K) + np.random.default_rng(i).uniform(-0.3, 0.3, (4, 17, 2))
        for j, person in enumerate(people):
            write_picture(folder / f"imageSequence/img_{j + 1:06d}.jpg", picture(size, [person], K)[0])
        write_h5(folder / "annot_data.mat", {  # in MATLAB (2, 17, 1, F), which write_h5 turns back
            "annot2": uv[:, None].T, "annot3": points[:, None].T, "univ_annot3": universal(points)[:, None].T,
            "valid_frame": np.array([MPI_VALID], float), "activity_annotation": np.ones((1, 4))})


@pytest.fixture(scope="module")
def mpi(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "3DHP"
    write_3dhp(root)
    write_3dhp_test(root)
    return root


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Two sequences instead of 16; labels are read in this process, not in one of their own."""
    monkeypatch.setattr(data, "MPI_FRAMES", MPI_ROWS)
    monkeypatch.setattr(data, "in_a_process", lambda function, *arguments: function(*arguments))


@pytest.fixture
def broken_3dhp(mpi, tmp_path) -> Path:
    return Path(shutil.copytree(mpi, tmp_path / "3DHP"))


def run_3dhp(root: Path, out: Path, *flags) -> data.Dataset:
    return run("3dhp", root, out, "--cameras", "0,4", "--stride", 1, *flags)


def mpi_truth(split: str) -> np.ndarray:
    if split == "test":
        return np.concatenate([ours(mpi_people(f"TS{i}")[:4])[[0, 2, 3]] for i in range(1, 7)])
    return np.concatenate([ours(mpi_people(name, camera))[:rows]
                           for name, rows in MPI_ROWS.items() for camera in MPI_CALIBRATION])


@pytest.mark.parametrize("split", ["train", "test"])
def test_3dhp(split, mpi, tmp_path, capsys):
    """annot3: as it was; univ_annot3: its poses, where they project like annot3; the same pictures."""
    truth = mpi_truth(split)
    assert len(truth) == {"train": 14, "test": 18}[split]
    metric = run_3dhp(mpi, tmp_path / "annot3", "--split", split, "--labels", "annot3")
    assert_sound(metric, truth, capsys)
    official = run_3dhp(mpi, tmp_path / "univ", "--split", split)
    assert_sound(official, MPI_ENLARGED * truth, capsys)
    relative = universal(truth) - universal(truth)[:, :1]
    assert np.allclose(official.keypoints[:] - official.keypoints[:][:, :1], relative, atol=0.01)
    assert np.array_equal(official.images, metric.images)
    assert np.allclose(official.intrinsics, metric.intrinsics, rtol=1e-5)


def test_3dhp_stride_cameras_and_unpacked_test_set(mpi, broken_3dhp, tmp_path, capsys):
    dataset = run("3dhp", mpi, tmp_path / "one", "--cameras", "4", "--labels", "annot3", "--stride", 2)
    truth = [ours(mpi_people(name, 4))[:rows:2] for name, rows in MPI_ROWS.items()]
    assert_sound(dataset, np.concatenate(truth), capsys)
    dataset = run("3dhp", mpi / "mpi_inf_3dhp_test_set", tmp_path / "two", "--split", "test")
    assert_sound(dataset, MPI_ENLARGED * mpi_truth("test"), capsys)


def test_3dhp_cameras(mpi):
    found = data.read_calibration(mpi / "S1/Seq1/camera.calibration")
    assert sorted(found) == list(range(14))
    for camera, M in MPI_CALIBRATION.items(): assert np.array_equal(found[camera][1], M[:3, :3])
    for sample in data.read_3dhp(mpi, "test")[1]:
        i = int(sample.image[24])
        cx, cy = (128, 128) if i < 5 else (160, 90)
        expected = [[150 + 3 * i, 0, cx + 0.2 * i], [0, 151 + 3 * i, cy]]
        assert np.allclose(sample.intrinsics[:2], expected, atol=2)


def calibration_by_columns(path: Path) -> dict:
    """As readers that count on the width of the numbers: of the first camera's here."""
    cameras = {}
    for part in path.read_text().split("name")[1:]:
        numbers = part.split("intrinsic   ")[1]
        fx, cx, fy, cy = (float(numbers[a:b].split()[0]) for a, b in ((0, 10), (15, 22), (31, 41), (42, 51)))
        cameras[int(part.split()[0])] = ((256, 256), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))
    assert np.array_equal(cameras[0][1], MPI_CALIBRATION[0][:3, :3])
    return cameras


def other_camera(path: Path) -> dict:
    known = data_read_calibration(path)
    return known | {0: known[4], 4: known[0]}


data_read_calibration = data.read_calibration


def mpi_raw_universal(monkeypatch, root): monkeypatch.setattr(data, "universal", lambda own, other, _: other)
def mpi_columns(monkeypatch, root): monkeypatch.setattr(data, "read_calibration", calibration_by_columns)
def mpi_other_camera(monkeypatch, root): monkeypatch.setattr(data, "read_calibration", other_camera)


def mpi_sides(monkeypatch, root):
    swap = [0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 11, 12, 13]
    joints = {split: [places[i] for i in swap] for split, places in data.MPI_JOINTS.items()}
    monkeypatch.setattr(data, "MPI_JOINTS", joints)


def mpi_test_order(monkeypatch, root):
    """The order of the test's joints for those of train."""
    monkeypatch.setattr(data, "MPI_JOINTS", dict.fromkeys(("train", "test"), data.MPI_JOINTS["test"]))


def mpi_axes(monkeypatch, root):
    """HDF5 has MATLAB's axes in reverse: reversed again they are MATLAB's, not numpy's."""
    read = data.read_h5
    monkeypatch.setattr(data, "read_h5", lambda *a: {k: v.T for k, v in read(*a).items()})


MPI_TRAPS = {
    "univ_annot3 as it is": ("train", mpi_raw_universal, "left out.*'projection'.* px from the publisher's"),
    "univ_annot3 as it is, test": ("test", mpi_raw_universal, "left out.*'projection'.* px from the pub"),
    "calibration by columns": ("train", mpi_columns, "left out.*'projection'"),
    "another camera": ("train", mpi_other_camera, "left out.*'projection'.* px from the publisher's"),
    "left and right exchanged": ("train", mpi_sides, "left out.*'handedness'"),
    "left and right exchanged, test": ("test", mpi_sides, "left out.*'handedness'"),
    "joints in the order of test": ("train", mpi_test_order, "left out.*'(order|bone|handedness)'"),
    "axes reversed twice": ("test", mpi_axes, r"annot_data.mat: annot2 \(2, 17, 1, 4\), not \(4, 1, 17, 2\)"),
}


@pytest.mark.parametrize("what", MPI_TRAPS)
def test_3dhp_traps(what, mpi, tmp_path, monkeypatch):
    split, put_in, message = MPI_TRAPS[what]
    put_in(monkeypatch, mpi)
    with refused(message): run_3dhp(mpi, tmp_path / "out", "--split", split)


def test_3dhp_other_pictures_are_told(mpi, tmp_path, monkeypatch):
    """Videos and rows count from 0, the test's pictures from 1; valid_frame is not the pictures' number."""
    def wrong(sample):
        if sample.frame is not None: return sample._replace(frame=other_frame(sample))
        number = int(sample.image[-10:-4])
        return sample._replace(image=sample.image[:-10] + f"{number % 4 + 1:06d}.jpg")
    trap(monkeypatch, "3dhp", wrong)
    assert colours_met(run_3dhp(mpi, tmp_path / "train")) < 0.7
    assert colours_met(run_3dhp(mpi, tmp_path / "test", "--split", "test")) < 0.7


def stretched(root: Path) -> None:
    found = scipy_io.loadmat(root / "S1/Seq1/annot.mat", variable_names=["annot2", "annot3", "univ_annot3"])
    found["univ_annot3"][0, 0] = found["univ_annot3"][0, 0] * np.tile([1, 1.05, 1], 28)
    scipy_io.savemat(root / "S1/Seq1/annot.mat", {k: v for k, v in found.items() if "__" not in k})


MPI_DAMAGE = {
    "no folder": ("train", lambda r: shutil.rmtree(r), "S1/Seq1: no such folder. ROOT holds S1/Seq1"),
    "no test set": ("test", lambda r: shutil.rmtree(r / "mpi_inf_3dhp_test_set"), "TS1: no such folder. RO"),
    "a sequence less": ("train", lambda r: shutil.rmtree(r / "S1/Seq2"), "S1/Seq2: no such folder. ROOT"),
    "no TS6": ("test", lambda r: shutil.rmtree(r / "mpi_inf_3dhp_test_set/TS6"), "TS6: no such folder"),
    "a video less": ("train", lambda r: (r / "S1/Seq2/imageSequence/video_4.avi").unlink(), "4.avi: missing"),
    "a picture less": (
        "test", lambda r: (r / "mpi_inf_3dhp_test_set/TS6/imageSequence/img_000004.jpg").unlink(),
        "TS6/imageSequence/img_000004.jpg: missing"),
    "half annot.mat": ("train", lambda r: cut(r / "S1/Seq2/annot.mat"), "S1/Seq2/annot.mat: "),
    "empty annot.mat": ("train", lambda r: cut(r / "S1/Seq1/annot.mat", 0), "S1/Seq1/annot.mat: "),
    "half annot_data.mat": ("test", lambda r: cut(r / "mpi_inf_3dhp_test_set/TS2/annot_data.mat"),
                            "TS2/annot_data.mat: "),
    "half a calibration": ("train", lambda r: cut(r / "S1/Seq2/camera.calibration", 0.2),
                           "S1/Seq2/camera.calibration: (broken|has no)"),
    "a calibration without a camera": ("train", lambda r: (r / "S1/Seq2/camera.calibration").write_text(
        (r / "S1/Seq2/camera.calibration").read_text().partition("name          4")[0]), "has no camera 4"),
    "half a video": ("train", lambda r: cut(r / "S1/Seq1/imageSequence/video_0.avi"), "video_0.avi: "),
    "another univ_annot3": ("train", stretched, "S1/Seq1/annot.mat: univ_annot3 is not annot3 enlarged; use"),
}


@pytest.mark.parametrize("what", MPI_DAMAGE)
def test_3dhp_damage(what, broken_3dhp, tmp_path):
    split, spoil, message = MPI_DAMAGE[what]
    spoil(broken_3dhp)
    with refused(message) as caught: run_3dhp(broken_3dhp, tmp_path / "out", "--split", split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cameras", ["all", "0,x4", "", "0,0"])
def test_3dhp_cameras_are_numbers(cameras, mpi, tmp_path):
    with refused("--cameras"): run("3dhp", mpi, tmp_path / "out", "--cameras", cameras)


# ==========================================================================================================
# SURREAL
# ==========================================================================================================
SURREAL_K = np.array([[600, 0, 159.5], [0, 600, 119.5], [0, 0, 1]])   # 160, 120 from the picture's edge
SURREAL_M = np.array([[0, 0, -1], [0, 1, 0], [-1, 0, 0]])          # world -> camera
SURREAL_CLIPS = {"val": {"run0/01_01/01_01_c0001": 5, "run0/01_01/01_01_c0002": 1,
                         "run1/ung_02_11/ung_02_11_c0007": 4, "run2/01_01/01_01_c0001": 3},
                 "train": {"run1/02_03/02_03_c0001": 2}}


def surreal_people(split: str, clip: str) -> list[dict]:
    rng = np.random.default_rng([ord(c) for c in split + clip])
    return bodies(rng, SURREAL_CLIPS[split][clip], (-900, -200, 6500), (900, 200, 7500))


def mirrored(names: list) -> list:
    """What a mirror shows where the body has these."""
    return [{"l": "r", "r": "l"}.get(name[0], name[0]) + name[1:] for name in names]


def write_clip(place: Path, people: list[dict]) -> None:
    """place.mp4, place_info.mat, place_segm.mat."""
    place.parent.mkdir(parents=True, exist_ok=True)
    points, location = stack(people, mirrored(SMPL_NAMES)), np.array([7.2, -0.9, 0.13])
    arrays = {"joints3D": points / 1000 @ SURREAL_M + location, "joints2D": np.round(seen(points, SURREAL_K) + 0.5)}
    scipy_io.savemat(f"{place}_info.mat", {  # M is orthogonal: its transpose leads back to the world
        "camLoc": location[:, None], "zrot": np.zeros((len(people), 1)), "sequence": place.name,
        **{name: np.squeeze(np.float32(array.transpose(2, 1, 0))) for name, array in arrays.items()}})
    frames, masks = zip(*(picture((320, 240), [person], SURREAL_K) for person in people))
    write_video(Path(f"{place}.mp4"), frames)
    parts = {f"segm_{t + 1}": mask * np.uint8(7) for t, mask in enumerate(masks)}
    scipy_io.savemat(f"{place}_segm.mat", parts, do_compression=True)


def write_surreal(root: Path) -> None:
    for split, clip in ((split, clip) for split, clips in SURREAL_CLIPS.items() for clip in clips):
        write_clip(root / "SURREAL/data/cmu" / split / clip, surreal_people(split, clip))


@pytest.fixture(scope="module")
def surreal(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "surreal"
    write_surreal(root)
    return root


@pytest.fixture
def broken_surreal(surreal, tmp_path) -> Path:
    return Path(shutil.copytree(surreal, tmp_path / "surreal"))


def surreal_truth(split: str, choose) -> np.ndarray:
    return ours([person for clip in SURREAL_CLIPS[split] for person in choose(surreal_people(split, clip))],
                NOT_IN_SMPL)


def run_surreal(root: Path, out: Path, *flags) -> data.Dataset:
    return run("surreal", root, out, "--split", "val", *flags)


def test_surreal(surreal, tmp_path, capsys):
    """The middle frame of each clip, the one of a clip of one; sides as the picture shows them."""
    dataset = run_surreal(surreal, tmp_path / "out")
    truth = surreal_truth("val", lambda people: people[len(people) // 2:][:1])
    assert len(truth) == 4 and np.isnan(truth[:, 9:11]).all()
    assert_sound(dataset, truth, capsys)
    assert share_on_mask(dataset) > 0.99
    people = [surreal_people("val", clip) for clip in SURREAL_CLIPS["val"]]
    assert_heads_inside(dataset, ours([crowd[len(crowd) // 2] for crowd in people]))


def test_surreal_all_frames_of_a_run(surreal, tmp_path, capsys):
    dataset = run_surreal(surreal, tmp_path / "all", "--frames", "all", "--stride", 2)
    assert_sound(dataset, surreal_truth("val", lambda people: people[::2]), capsys)
    assert share_on_mask(dataset) > 0.99
    truth = ours(surreal_people("val", "run2/01_01/01_01_c0001"), NOT_IN_SMPL)
    for root in (surreal / "SURREAL", surreal / "SURREAL/data"):
        assert_sound(run_surreal(root, tmp_path / root.name, "--frames", "all", "--runs", "2"), truth, capsys)


def test_surreal_is_measured_from_the_centre_of_its_first_pixel(surreal):
    """Its own numbers count from the picture's edge: half a pixel more, in the camera and in the 2D labels."""
    samples = list(data.read_surreal(surreal, "val", "all")[1])
    apart = [sample.uv - data.to_uv(sample.keypoints, sample.intrinsics) for sample in samples]
    assert all(np.array_equal(sample.intrinsics, SURREAL_K) for sample in samples)     # that draws the pictures
    assert np.abs(np.nanmean(apart, axis=(0, 1))).max() < 0.15             # of rounding, half a pixel a joint


def test_surreal_options_that_say_nothing_are_refused(surreal, tmp_path):
    with refused("--stride 5: goes with --frames all"): run_surreal(surreal, tmp_path / "a", "--stride", 5)
    with refused("--runs '00': some of 012, each once"): run_surreal(surreal, tmp_path / "a", "--runs", "00")


def surreal_sides(monkeypatch): monkeypatch.setattr(data, "MIRRORED_SMPL", data.SMPL_JOINTS)
def surreal_rotation(monkeypatch): monkeypatch.setattr(data, "SURREAL_AXES", SURREAL_M * [[-1], [1], [1]])
def surreal_world(monkeypatch): monkeypatch.setattr(data, "SURREAL_AXES", np.eye(3))
def surreal_units(monkeypatch): monkeypatch.setattr(data, "SURREAL_AXES", SURREAL_M / 10)
def surreal_upside_down(monkeypatch): monkeypatch.setattr(data, "SURREAL_AXES", SURREAL_M * [[1], [-1], [1]])


SURREAL_TRAPS = {
    "names as they are": (surreal_sides, "'handedness'.* mirrored"),
    "camera made a rotation": (surreal_rotation, "'(projection|handedness)'"),
    "world taken for camera": (surreal_world, "'(projection|handedness)'"),
    "another unit": (surreal_units, "'bone'.* another unit"),
    "upside down": (surreal_upside_down, "'(projection|handedness)'"),
}


@pytest.mark.parametrize("what", SURREAL_TRAPS)
def test_surreal_traps(what, surreal, tmp_path, monkeypatch):
    put_in, message = SURREAL_TRAPS[what]
    put_in(monkeypatch)
    with refused("samples left out.*" + message): run_surreal(surreal, tmp_path / "out", "--frames", "all")


def test_surreal_other_pictures_and_masks_are_told(surreal, tmp_path, monkeypatch):
    """segm_1 is the mask of frame 0."""
    trap(monkeypatch, "surreal", lambda sample: sample._replace(frame=max(sample.frame - 1, 0)))
    dataset = run_surreal(surreal, tmp_path / "frame")
    assert colours_met(dataset) < 0.7 and share_on_mask(dataset) > 0.99
    monkeypatch.undo()
    trap(monkeypatch, "surreal", lambda sample: sample._replace(mask_key=f"segm_{max(sample.frame, 1)}"))
    dataset = run_surreal(surreal, tmp_path / "mask")
    assert colours_met(dataset) > 0.97 and share_on_mask(dataset) < 0.8


@pytest.mark.parametrize("right, rows", [(1000, 2), (3000, 1)])        # mm; the picture ends at 1067
def test_surreal_people_partly_outside_stay(right, rows, broken_surreal, tmp_path, monkeypatch):
    """Half the joints inside is enough; who is gone is left out."""
    clip = broken_surreal / "SURREAL/data/cmu/val/run0/01_01/01_01_c0002"
    write_clip(clip, [body(np.random.default_rng(0), (right, 0, 4000))])
    monkeypatch.setitem(data.READERS, "surreal", (*data.READERS["surreal"][:2], 0.6))
    dataset = run_surreal(broken_surreal, tmp_path / "out", "--runs", "0")
    assert len(dataset) == rows and len(dataset.meta["skipped"]) == 2 - rows
    assert all("joints fall on the picture" in line for line in dataset.meta["skipped"])


def surreal_file(end): return lambda root: root / f"SURREAL/data/cmu/val/run0/01_01/01_01_c0001{end}"


def less_labels(root: Path) -> None:
    arrays = {"joints3D": np.zeros((3, 23)), "joints2D": np.zeros((2, 24)), "camLoc": np.zeros((3, 1))}
    scipy_io.savemat(surreal_file("_info.mat")(root), arrays)


SURREAL_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "cmu/val: no clips here. ROOT holds cmu/val/run0"),
    "no masks": (lambda r: surreal_file("_segm.mat")(r).unlink(), "c0001_segm.mat: missing. ROOT holds"),
    "no video": (lambda r: surreal_file(".mp4")(r).unlink(), "01_01_c0001.mp4: missing. ROOT holds"),
    "no labels": (lambda r: surreal_file("_info.mat")(r).unlink(), "c0001_info.mat: missing. ROOT holds"),
    "half a video": (lambda r: cut(surreal_file(".mp4")(r)), "01_01_c0001.mp4: "),
    "half the masks": (lambda r: cut(surreal_file("_segm.mat")(r)), "01_01_c0001_segm.mat: "),
    "half the labels": (lambda r: cut(surreal_file("_info.mat")(r)), "01_01_c0001_info.mat: "),
    "labels of 23 joints": (less_labels, "01_01_c0001_info.mat: broken file of labels"),
}


@pytest.mark.parametrize("what", SURREAL_DAMAGE)
def test_surreal_damage(what, broken_surreal, tmp_path):
    spoil, message = SURREAL_DAMAGE[what]
    spoil(broken_surreal)
    with refused(message) as caught: run_surreal(broken_surreal, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runs", ["3", ""])
def test_surreal_runs(runs, surreal, tmp_path):
    with refused("--runs"): run("surreal", surreal, tmp_path / "out", "--runs", runs)


# ==========================================================================================================
# What all share
# ==========================================================================================================
@pytest.mark.parametrize("line", [
    "h36m --split val", "h36m --masks maybe", "3dpw --split val", "3dhp --split val", "3dhp --labels annot2",
    "surreal --split all", "surreal --frames some"])
def test_unknown_choices_are_refused(line, tmp_path, capsys):
    name, flag, value = line.split()
    with pytest.raises(SystemExit): run(name, tmp_path, tmp_path / "out", flag, value)
    assert f"{flag}: invalid choice: '{value}' (choose from " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h36m", "3dpw", "3dhp", "surreal"])
def test_strides_are_1_or_more(name, tmp_path):
    with refused("--stride 1 or more"): run(name, tmp_path, tmp_path / "out", "--stride", 0)


def test_compared_joints():
    """The root, aligned, is never among them; of SMPL none that it has not; a line says so."""
    for name in ("h36m", "3dpw", "3dhp", "surreal"):
        _, skeleton, _ = data.READERS[name]
        compared = [OURS[i] for i in skeleton["compare"]]
        assert skeleton["joints"] == data.HUMAN_JOINTS and "pelvis" not in compared
        assert str(len(compared)) in skeleton["protocol"] and "pelvis" in skeleton["protocol"]
        assert len(compared) == len(set(compared)) == (13 if name in ("3dpw", "surreal") else 16)
        if name in ("3dpw", "surreal"): assert not {"nose", "top", "spine"} & set(compared)
