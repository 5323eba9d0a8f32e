"""Small copies of what each publisher ships, in its own layout and file formats, with its real defects.

Hands are drawn as skeletons with a dot of its own colour on each joint; bodies with right limbs red, left
limbs blue and the middle yellow. So a picture tells where each joint is, whatever a reader says. Here is also
what the tests of readers share: changes to the files or to the reader, and the message that has to follow.
"""
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
from support.folder import HAND_BONES, HAND_JOINTS, HUMAN_BONES, HUMAN_JOINTS, Dataset
from support.hands import rotation, sample_hand, uniform
from support.pictures import draw_skeleton
from support.readers import _3dhp, _3dpw, freihand, gan, h36m, pan, rhd, stb, surreal
from support.rendering import render
from support.run import InputError, random_generator
from udapose import project

# without one of these, as on a GPU machine, pytest leaves this plugin out
av, h5py = pytest.importorskip("av"), pytest.importorskip("h5py")
scipy_io, cdfwrite = pytest.importorskip("scipy.io"), pytest.importorskip("cdflib.cdfwrite")
Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

MIRROR = np.array([-1, 1, 1])
SWAP = [0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 11, 12, 13]  # a body's left and right exchanged


# ==== Changes to files and readers ========================================================================
def refused(message: str):
    return pytest.raises(InputError, match=message)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def without(path: str):
    """A file or folder less."""
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def command(reader, root: Path, out: Path, *flags, side: int = 0) -> Dataset:
    """`python data.py READER ROOT OUT --workers 1`, and the data set that it makes."""
    name = reader.__name__.rpartition(".")[2].lstrip("_")
    side = side or (SIDE if reader in HAND_READERS else 128)
    data.main([name, str(root), str(out), "--side", str(side), "--workers", "1", *map(str, flags)])
    return data.open_all(out)


HAND_READERS = {freihand: "freihand_root", stb: "stb_root", rhd: "rhd_root", pan: "pan_root", gan: "gan_root"}
BODY_READERS = {h36m: "h36m_root", _3dpw: "pw3d_root", _3dhp: "mpi_root", surreal: "surreal_root"}
FLAGS = {freihand: [], stb: ["--split", "test"], rhd: [], pan: ["--split", "test", "--stride", 1],
         gan: ["--share", 0], h36m: ["--split", "test"], _3dpw: ["--split", "test"],
         _3dhp: ["--cameras", "0,4", "--stride", 1], surreal: ["--split", "val", "--frames", "all"]}


# ==== File formats ========================================================================================
def write_video(path: Path, frames, codec: str = "libx264", pixels: str = "yuv420p", file=None,
                **options) -> None:
    """Frames (H, W, 3) uint8 as a video with keyframes every 12 and B-frames between."""
    with av.open(str(path), "w", options=file or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", "bf": "3"} | options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)


def write_h5(path: Path, arrays: dict) -> None:
    """A MATLAB 7.3 file: HDF5 behind 512 bytes, each array's axes reversed, a cell (list) as references."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            if not isinstance(array, list):
                file[name] = np.asarray(array).T
                continue
            cell = file.create_dataset(name, (len(array), 1), h5py.ref_dtype)
            for i, item in enumerate(array):
                place = f"#refs#/{name}{i}"
                file[place] = np.uint64([0, 0]) if item is None else np.asarray(item).T
                if item is None:
                    file[place].attrs["MATLAB_empty"] = np.uint8(1)
                cell[i, 0] = file[place].ref
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")


def write_cdf(path: Path, **variables) -> None:
    """Variables as Human3.6M stores them: one compressed record."""
    path.unlink(missing_ok=True)
    file = cdfwrite.CDF(str(path), {"Majority": "row_major", "Encoding": 6})
    for name, value in variables.items():
        spec = {"Variable": name, "Data_Type": 44, "Num_Elements": 1, "Rec_Vary": True, "Compress": 6,
                "Dim_Sizes": list(value.shape[1:])}
        file.write_var(spec, var_data=value)
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


# ==== Hands and pictures of them ==========================================================================
SIDE = 224  # px of the stored crops
HUES = np.array([(255, 30, 30), (255, 200, 0), (0, 230, 60), (40, 110, 255), (255, 60, 255)])  # by finger
INKS = np.array([(255, 255, 255)] + [hue * (1, 0.8, 0.6, 0.4)[k] for hue in HUES for k in range(4)], int)
LITTLE_FIRST = [0, 17, 18, 19, 20, 13, 14, 15, 16, 9, 10, 11, 12, 5, 6, 7, 8, 1, 2, 3, 4]  # STB's order
TIP_FIRST = [0, 4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17]  # RHD's order


def hands_at(name: str, count: int, centre, turn: float = 30) -> np.ndarray:
    """Right hands (count, 21, 3) mm, turned at random, their joints' mean at `centre` (3,) or (count, 3)."""
    rng = random_generator(0, f"hands of {name}")
    points = sample_hand(rng, count)[0][:, :21]
    angles = [np.radians(uniform(rng, (-turn, turn), count)) for _ in range(3)]
    points = points @ rotation(*angles).transpose(0, 2, 1)
    points = np.float64(points - points.mean(1, keepdims=True))
    return points + np.broadcast_to(np.float64(centre), (count, 3))[:, None]


def lens(fx, fy, cx, cy) -> np.ndarray:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def uv_of(points, K, k=(0, 0, 0, 0, 0)) -> np.ndarray:
    """OpenCV's camera, written from its documentation: points (.., 3), K (3, 3), k1 k2 p1 p2 k3 -> px."""
    x, y = points[..., 0] / points[..., 2], points[..., 1] / points[..., 2]
    square, (k1, k2, p1, p2, k3) = x * x + y * y, k
    radial = 1 + k1 * square + k2 * square ** 2 + k3 * square ** 3
    bent_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
    bent_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
    return np.stack([K[0, 0] * bent_x + K[0, 2], K[1, 1] * bent_y + K[1, 2]], -1)


def picture(size, *hands, dot: int = 4) -> Image.Image:
    """Skeletons of hands uv (21, 2) px: thin grey bones, a dot of its ink on each joint."""
    image = Image.new("RGB", size, (60, 60, 60))
    draw = ImageDraw.Draw(image)
    for uv in hands:
        draw_skeleton(draw, uv, HAND_BONES, 1, (120, 120, 120))
        for ink, (u, v) in zip(INKS, uv, strict=True):
            draw.ellipse((u - dot, v - dot, u + dot, v + dot), fill=tuple(ink))
    return image


def projected(keypoints, intrinsics) -> np.ndarray:
    """Keypoints (n, K, 3) mm through intrinsics (n, 3, 3): (n, K, 2) px."""
    return project(torch.tensor(keypoints), torch.tensor(intrinsics)).numpy()


def on_their_inks(dataset: Dataset, inks: np.ndarray, apart: float, others=()) -> float:
    """Share of joints that land on their ink (K, 3), of those with no other ink's joint within `apart` px."""
    uv = projected(dataset.keypoints, dataset.intrinsics)  # (n, K, 2) px
    palette, met = np.array([*inks, *others], int), []
    for image, points in zip(dataset.images[:].astype(int), uv, strict=True):
        for ink, (u, v) in zip(inks, points, strict=True):
            far = np.linalg.norm(points - (u, v), axis=1) + 99 * (inks == ink).all(axis=1)
            if 0 <= u < len(image) - 1 and 0 <= v < len(image) - 1 and np.nanmin(far) > apart:
                nearest = palette[np.abs(image[round(v), round(u)] - palette).sum(-1).argmin()]
                met.append((nearest == ink).all())
    assert len(met) > 4 * len(uv), "too few joints stand alone"
    return float(np.mean(met))


def agrees(dataset: Dataset, points: np.ndarray, K: np.ndarray) -> None:
    """The rows hold these joints (n, 21, 3) mm of right hands, and the intrinsics of crops of pictures with
    K (n, 3, 3): scaled and shifted, so that the joints' box is in the middle and 1 / 1.875 of the crop."""
    assert len(dataset) == len(points) and np.abs(dataset.keypoints[:] - points).max() < 2e-3
    to_crop = np.float64(dataset.intrinsics) @ np.linalg.inv(K)  # (n, 3, 3)
    uv = projected(points, K)  # (n, 21, 2) px
    low, high = uv.min(1), uv.max(1)
    scale = SIDE / (1.875 * (high - low).max(1))  # (n,)
    middle = (SIDE - 1) / 2 - scale[:, None] * (low + high) / 2  # (n, 2) px
    expected = np.zeros_like(to_crop)
    expected[:, 0, 0], expected[:, 1, 1], expected[:, 2, 2], expected[:, :2, 2] = scale, scale, 1, middle
    assert np.allclose(to_crop, expected, atol=2e-3)


def mirrored(K, width: int) -> np.ndarray:
    """K (.., 3, 3) of the picture's mirror image."""
    K = np.array(K, float)
    K[..., 0, 2] = width - 1 - K[..., 0, 2]
    return K


def assert_sound_hands(dataset: Dataset, points, K, capsys, apart: float = 8) -> None:
    """The rows agree with points and K; joints are on their dots; `check` finds nothing; `show` draws it."""
    agrees(dataset, points, K)
    assert on_their_inks(dataset, INKS, apart) == 1
    capsys.readouterr()
    data.main(["check", str(dataset.folder)])
    assert f"labels: 0 of {len(dataset)} rows are impossible" in capsys.readouterr().out
    assert dataset.meta["skipped"] == [] and dataset.meta["joints"] == HAND_JOINTS
    data.main(["show", str(dataset.folder), f"{dataset.folder}.png"])


# ==== FreiHAND ============================================================================================
N = 6  # samples, each in 4 versions
BACKGROUND = np.array([(20, 90, 30), (120, 120, 120), (40, 60, 110), (150, 110, 70)])  # version 0 .. 3


def windows() -> dict:
    """Rendered hands seen through a 224 px window of a 300 px picture: exact masks, mm and intrinsics."""
    rng = random_generator(0, "freihand fixture")
    hands = render("hands", rng, "source", N, 300)
    for i in range(N):
        x, y = rng.integers(15, 62, 2)
        for name in ("images", "masks"):
            hands[name][i, :SIDE, :SIDE] = hands[name][i, y:y + SIDE, x:x + SIDE].copy()
        hands["intrinsics"][i, :2, 2] -= (x, y)
    return hands | {name: hands[name][:, :SIDE, :SIDE] for name in ("images", "masks")}


def write_freihand(root: Path) -> None:
    hands = windows()
    for folder in ("training/rgb", "training/mask", "evaluation/rgb", "evaluation/segmap"):
        (root / folder).mkdir(parents=True)
    for i in range(N):
        hard = hands["masks"][i] >= 128
        uv = uv_of(hands["keypoints"][i], hands["intrinsics"][i])
        for v in range(4):
            shot = np.where(hard[..., None], hands["images"][i], BACKGROUND[v]).astype(np.uint8)
            shot = Image.fromarray(shot)
            draw = ImageDraw.Draw(shot)
            for ink, (x, y) in zip(INKS, uv, strict=True):
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=tuple(ink))
            shot.save(root / f"training/rgb/{i + N * v:08d}.jpg", quality=95, subsampling=0)
            if v == 0:
                shot.save(root / f"evaluation/rgb/{i:08d}.jpg", quality=95, subsampling=0)
        mask = Image.fromarray(np.uint8(255) * hard)
        mask.convert("RGB").save(root / f"training/mask/{i:08d}.jpg", quality=75)  # 3 channels, noise
        mask.point(lambda grey: grey // 85).save(root / f"evaluation/segmap/{i:08d}.png")  # 0, and 3: a part
    for part in ("training", "evaluation"):
        (root / f"{part}_xyz.json").write_text(json.dumps((hands["keypoints"] / 1000).tolist()))
        (root / f"{part}_K.json").write_text(json.dumps(hands["intrinsics"].tolist()))


# ==== STB =================================================================================================
STB_K = {"BB_left": lens(822.79041, 822.79041, 318.47345, 250.31296),
         "BB_right": lens(822.79041, 822.79041, 318.47345, 250.31296),
         "SK_color": lens(607.92271, 607.88192, 314.78337, 236.42484)}
STB_FRAMES, BASELINE = 2, np.array([120.054, 0, 0])
TURN = Rotation.from_rotvec((0.00531, -0.01196, 0.00301)).as_matrix()
SHIFT = np.array([-24.0381, -0.4563, -1.2326])
STB_SEQUENCES = [f"B{i}{kind}" for i in range(1, 7) for kind in ("Counting", "Random")]


def stb_hands(sequence: str) -> dict[str, np.ndarray]:
    """Left hands (n, 21, 3) mm in the frame of each camera that takes pictures."""
    left = hands_at(f"stb {sequence}", STB_FRAMES, (-60, 0, 600)) * MIRROR
    return {"BB_left": left, "BB_right": left - BASELINE, "SK_color": left - (60, 0, 0)}


def stb_raw(hands: np.ndarray) -> np.ndarray:
    """Hands (n, 21, 3) -> handPara (3, 21, n), joint 0 the palm: half way from ring_1 to the wrist."""
    raw = np.empty_like(hands)
    raw[:, LITTLE_FIRST] = hands
    raw[:, 0] = (hands[:, 0] + hands[:, 13]) / 2
    return raw.transpose(2, 1, 0)


def write_stb(root: Path) -> None:
    (root / "labels").mkdir(parents=True)
    for sequence in STB_SEQUENCES:
        (root / "images" / sequence).mkdir(parents=True)
        hands = stb_hands(sequence)
        for kind, points in hands.items():
            for i in range(STB_FRAMES):
                image = picture((640, 480), uv_of(points[i], STB_K[kind]))
                image.save(root / f"images/{sequence}/{kind}_{i}.png", compress_level=1)
        labels = {"BB": hands["BB_left"], "SK": hands["SK_color"] @ TURN.T + SHIFT}  # d = R c + t
        for camera, points in labels.items():
            scipy_io.savemat(root / f"labels/{sequence}_{camera}.mat", {"handPara": stb_raw(points)})


def stb_truth(sequences, *kinds) -> tuple[np.ndarray, np.ndarray]:
    """Right hands (n, 21, 3) mm and K (n, 3, 3) in the order of the reader: sequence, frame, picture."""
    points = [stb_hands(s)[kind][i] * MIRROR for s in sequences for i in range(STB_FRAMES) for kind in kinds]
    return np.array(points), np.array([mirrored(STB_K[k], 640) for k in kinds] * (len(points) // len(kinds)))


# ==== RHD =================================================================================================
RHD_K = lens(283.1, 282.9, 160, 159.5)  # of 320 x 320 px
RHD_COUNT = {"training": 8, "evaluation": 3}


def rhd_hands(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right hands (n, 21, 3) mm; True where the left one is nearer, and so larger."""
    n = RHD_COUNT[part]
    near = np.arange(n) % 3 != 1  # (n,) left right left left ..
    depth = {first: np.where(near == first, 420, 600) for first in (True, False)}
    left = hands_at(f"rhd left {part}", n, np.stack([0 * near + 90, 0 * near, depth[True]], 1)) * MIRROR
    return left, hands_at(f"rhd right {part}", n, np.stack([0 * near + 110, 0 * near, depth[False]], 1)), near


def rhd_truth(part: str) -> tuple[np.ndarray, np.ndarray]:
    """The nearer hands (n, 21, 3) mm as right ones, and K (n, 3, 3)."""
    left, right, near = rhd_hands(part)
    near = near[:, None, None]
    return np.where(near, left * MIRROR, right), np.where(near, mirrored(RHD_K, 320), RHD_K)


def index_mask(left: np.ndarray, right: np.ndarray) -> Image.Image:
    """8-bit index: 1 the person, 2-17 the left hand's bones and palm, 18-33 the right one's."""
    image = Image.new("L", (320, 320))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 100, 300, 319), fill=1)
    for uv, first in ((left, 2), (right, 18)):
        draw.polygon([tuple(uv[i]) for i in (0, 1, 5, 9, 13, 17)], fill=first + 15)
        for a, b in HAND_BONES:
            width = max(2, int(np.ptp(uv, 0).max() / 12))
            draw.line([tuple(uv[a]), tuple(uv[b])], fill=first + (b - 1) % 15, width=width)
        for tip in (4, 8, 12, 16, 20):
            draw.ellipse((*uv[tip] - 3, *uv[tip] + 3), fill=first + tip // 4)
    return image


def write_rhd(root: Path) -> None:
    for part in RHD_COUNT:
        for kind in ("color", "mask"):
            (root / part / kind).mkdir(parents=True)
        labels = {}
        for i, (left, right, _) in enumerate(zip(*rhd_hands(part), strict=True)):
            uv = [uv_of(hand, RHD_K) for hand in (left, right)]
            picture((320, 320), *uv, dot=3).save(root / f"{part}/color/{i:05d}.png")
            mask = index_mask(*uv)
            if i % 2:
                mask.putpalette(bytes(range(256)) * 3)  # the same indices
            mask.save(root / f"{part}/mask/{i:05d}.png")
            raw, flat = np.empty((42, 3)), np.ones((42, 3))
            for start, hand, pixels in zip((0, 21), (left, right), uv, strict=True):
                raw[start + np.array(TIP_FIRST)], flat[start + np.array(TIP_FIRST), :2] = hand / 1000, pixels
            flat[np.arange(42) % 5 == 0, 2] = 0  # some joints are hidden
            labels[i] = {"xyz": np.float32(raw), "uv_vis": np.float32(flat), "K": np.float32(RHD_K)}
        write_pickle(root / part / f"anno_{part}.pickle", labels)


# ==== PAN =================================================================================================
PAN_SIZE, PAN_FRAMES = (480, 270), 5
PAN_K, PAN_LENS = lens(352, 350, 243, 131), (-0.22, 0.07, 0.002, -0.0015, 0.01)  # of HD, in small
PAN_R = {"00_00": Rotation.from_rotvec((0.3, 2.1, -0.4)).as_matrix(),  # world -> camera
         "00_01": Rotation.from_rotvec((0.3, 2.1, 0.5)).as_matrix()}
PAN_T = {"00_00": np.array([35.0, -120, 780]), "00_01": np.array([-60.0, -40, 690])}  # mm
SEQUENCES = ("171204_pose3", "171204_pose1")  # with pictures, with videos; test, train


def pan_hands(sequence: str) -> dict[str, np.ndarray]:
    """Hands (n, 21, 3) mm in the dome: far off the axis of camera 00_00, where its lens bends."""
    n, R, t = PAN_FRAMES, PAN_R["00_00"], PAN_T["00_00"]
    x = np.linspace(-25, 25, n)[:, None, None] * [1, 0.5, 0]
    seen = {"left": hands_at(f"pan left {sequence}", n, (310, -110, 700)) * MIRROR + x,
            "right": hands_at(f"pan right {sequence}", n, (320, 120, 720)) + x,
            "second": hands_at(f"pan second {sequence}", n, (10, 120, 760)) - x}
    return {side: (points - t) @ R for side, points in seen.items()}  # X = R^T (X_c - t)


def hand_json(points: np.ndarray, **other) -> dict:
    """As the dome's files: centimetres, 21 of each measure."""
    return {"landmarks": np.round(points / 10, 6).ravel().tolist(), "averageScore": [0.7] * 21,
            "averageReproError": [4.5] * 21, "validity": [1] * 21, "visibility": [[0, 3, 17]] * 21} | other


def one(value, rest) -> list:
    return [rest] * 12 + [value] + [rest] * 8


def pan_people(hands: dict, i: int) -> list[dict]:
    """Person 0 with both hands, person 1 with a right one only; the rest are traps, none of them a label."""
    left, right, second = (hands[side][i] for side in ("left", "right", "second"))
    return [{"id": 0, "left_hand": hand_json(left), "right_hand": hand_json(right)},
            {"id": 1, "right_hand": hand_json(second)},
            {"id": 2},
            {"id": 3, "left_hand": {}, "right_hand": hand_json(second, validity=one(0, 1))},
            {"id": 4, "right_hand": hand_json(second, averageScore=one(0.1, 0.7))},
            {"id": 5, "right_hand": hand_json(second, averageReproError=one(1e5, 4.5))},
            {"id": -1, "left_hand": hand_json(left), "right_hand": hand_json(right)}]


def calibration() -> dict:
    cameras = [{"name": name, "type": "hd", "resolution": PAN_SIZE, "panel": 0, "node": int(name[3:]),
                "K": PAN_K.tolist(), "distCoef": PAN_LENS, "R": R.tolist(),
                "t": (PAN_T[name] / 10).reshape(3, 1).tolist()} for name, R in PAN_R.items()]
    other = [dict(cameras[0], name=name, type=kind, resolution=[640, 480], t=[[0], [0], [9]])
             for name, kind in (("01_01", "vga"), ("50_01", "kinect-color"))]
    return {"calibDataSource": "drawn", "cameras": other + cameras}


def pan_shots(sequence: str, view: str) -> list[Image.Image]:
    hands = pan_hands(sequence)
    return [picture(PAN_SIZE, *(uv_of(points[i] @ PAN_R[view].T + PAN_T[view], PAN_K, PAN_LENS)
                                for points in hands.values()), dot=2) for i in range(PAN_FRAMES)]


def write_pan(top: Path) -> None:
    for sequence in SEQUENCES:
        root, hands = top / sequence, pan_hands(sequence)
        (root / "hdHand3d").mkdir(parents=True)
        (root / f"calibration_{sequence}.json").write_text(json.dumps(calibration()))
        for i in range(PAN_FRAMES):
            content = {"version": 0.5, "fpsType": "hd_29_97", "people": pan_people(hands, i)}
            (root / f"hdHand3d/handRecon3D_hd{i:08d}.json").write_text(json.dumps(content))
        for view in PAN_R:
            if sequence == SEQUENCES[1]:
                (root / "hdVideos").mkdir(exist_ok=True)
                shots = [np.asarray(shot) for shot in pan_shots(sequence, view)]
                write_video(root / f"hdVideos/hd_{view}.mp4", shots, pixels="yuv444p", crf="8")
                continue
            (root / "hdImgs" / view).mkdir(parents=True)
            for i, shot in enumerate(pan_shots(sequence, view)):
                shot.save(root / f"hdImgs/{view}/{view}_{i:08d}.jpg", quality=95, subsampling=0)
    (top / "171026_pose1").mkdir()  # a sequence without hands


def pan_truth(sequence: str, frames=range(PAN_FRAMES), views=tuple(PAN_R)) -> tuple[np.ndarray, np.ndarray]:
    """Right hands (n, 21, 3) mm, camera, and K (n, 3, 3): by view, frame and hand, those in the picture."""
    hands, rows = pan_hands(sequence), []
    for view, i, side in ((v, i, s) for v in views for i in frames for s in hands):
        points = hands[side][i] @ PAN_R[view].T + PAN_T[view]
        uv = uv_of(points, PAN_K, PAN_LENS)
        if (uv < 0).any() or (uv > np.array(PAN_SIZE) - 1).any():
            continue
        rows.append((points * MIRROR, mirrored(PAN_K, 480)) if side == "left" else (points, PAN_K))
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


# ==== GAN =================================================================================================
GAN_K = lens(617.173, 617.173, 315.453, 242.259)
GAN_FOLDERS = [f"{kind}/{i:04d}" for kind in ("noObject", "withObject") for i in (1, 2, 3)]


def gan_folder(folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two frames: a left hand (21, 3) mm in the frame of the whole picture, its crop (u, v, factor)."""
    rows = []
    for hand in hands_at(f"gan {folder}", 2, (20, 10, 500)) * MIRROR:
        uv = uv_of(hand, GAN_K)
        low, box = uv.min(0) - 15, np.ptp(uv, axis=0).max() + 30  # px of 640 x 480
        rows.append((hand, np.array([*np.round(low), 256 / np.round(box)])))
    return rows


def crop_K(crop: np.ndarray) -> np.ndarray:
    u, v, s = crop
    return np.diag([s, s, 1]) @ (GAN_K - [[0, 0, u], [0, 0, v], [0, 0, 0]])


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    path.write_text(",".join(f"{x:.6f}" for x in numbers.ravel()))


def write_gan(root: Path) -> None:
    for folder in GAN_FOLDERS:
        (root / "data" / folder).mkdir(parents=True)
        for i, (hand, crop) in enumerate(gan_folder(folder), 1):
            start, uv = root / f"data/{folder}/{i:04d}", uv_of(hand, crop_K(crop))
            picture((256, 256), uv).save(f"{start}_color_composed.png")
            relative = (hand - hand[9]) / np.linalg.norm(hand[9] - hand[0])
            for kind, numbers in (("joint2D", uv), ("joint_pos_global", hand), ("joint_pos", relative),
                                  ("crop_params", crop)):
                write_numbers(Path(f"{start}_{kind}.txt"), numbers)


def gan_truth(folders) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for folder in folders for row in gan_folder(folder)]
    hands, crops = (np.array(column) for column in zip(*rows, strict=True))
    return hands * MIRROR, np.array([mirrored(crop_K(crop), 256) for crop in crops])


# ==== Bodies and pictures of them =========================================================================
INK = {"r": (225, 40, 40), "l": (40, 70, 235), "m": (240, 210, 50)}
GREEN, SHADE = (60, 120, 60), (45, 95, 45)  # background, in two tones
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
NOT_IN_SMPL = ("nose", "top")


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
        part |= dict(zip((side + name for name in chain), np.cumsum([*chain.values()], axis=0), strict=True))
        chain = {"collar": (60 * sign, 420, 0), "shoulder": (110 * sign, 30, 0),
                 "elbow": (280 * sign * np.sin(c), -280 * np.cos(c), 20), "wrist": (60 * sign, 60, 230),
                 "hand": (0, 30, 80), "thumb": (-20 * sign, 0, 20)}
        part |= dict(zip((side + name for name in chain), np.cumsum([*chain.values()], axis=0), strict=True))
        part |= {side + "eye": (35 * sign, 610, 90), side + "ear": (75 * sign, 600, 20)}
    s, c = np.sin(turn), np.cos(turn)  # left, up, forward -> right, down, away
    to_camera = np.array([[c, 0, s], [0, -1, 0], [s, 0, -c]])
    return {name: to_camera @ np.array(xyz, float) * lean + place for name, xyz in part.items()}


def people_at(rng, count: int, low, high) -> list[dict]:
    return [body(rng, rng.uniform(low, high)) for _ in range(count)]


def stack(people: list[dict], names: list) -> np.ndarray:
    """(n, len(names), 3) mm."""
    return np.array([[person[name] for name in names] for person in people])


def ours(people: list[dict], no: tuple = ()) -> np.ndarray:
    """What a reader must find, (n, 17, 3) mm; NaN: the joints `no`."""
    truth = stack(people, OURS)
    truth[:, [OURS.index(name) for name in no]] = np.nan
    return truth


def body_picture(size, people: list[dict], K, distortion=(0, 0, 0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Drawn bodies (H, W, 3) uint8 and their mask (H, W) bool."""
    image = Image.new("RGB", size, GREEN)
    draw, mask = ImageDraw.Draw(image), Image.new("1", size)
    for x in range(0, size[0], 32):
        draw.rectangle((x, 0, x + 15, size[1]), fill=SHADE)
    for person in people:
        uv = uv_of(stack([person], OURS)[0], K, distortion)
        width = max(3, int(np.ptp(uv[:, 1]) / 18))
        for canvas, ink in ((draw, INK), (ImageDraw.Draw(mask), dict.fromkeys("rlm", 1))):
            for a, b in sorted(HUMAN_BONES, key=lambda bone: SIDES[bone[1]] != "m"):
                canvas.line([tuple(uv[a]), tuple(uv[b])], fill=ink[SIDES[b]], width=width)
            for i, (u, v) in enumerate(uv):
                r = 0.75 * width
                canvas.ellipse((u - r, v - r, u + r, v + r), fill=ink[SIDES[i]])
    return np.asarray(image), np.asarray(mask)


def assert_sound(dataset: Dataset, truth: np.ndarray, capsys) -> None:
    """The rows are `truth` (n, 17, 3) mm and show the joints at their projections; `check` finds no fault."""
    assert dataset.meta["skipped"] == [] and dataset.meta["joints"] == HUMAN_JOINTS
    assert dataset.keypoints.shape == truth.shape
    assert np.allclose(dataset.keypoints, truth, atol=0.01, equal_nan=True)
    inks = np.array([INK[side] for side in SIDES])  # (17, 3)
    assert on_their_inks(dataset, inks, 8, (GREEN, SHADE)) > 0.97
    data.main(["check", str(dataset.folder)])
    out = capsys.readouterr().out
    assert f"labels: 0 of {len(dataset)} rows are impossible" in out and "without" not in out


def share_on_mask(dataset: Dataset) -> float:
    """Of the joints inside the crop, those on its mask."""
    on = []
    for mask, keypoints, K in zip(dataset.masks, dataset.keypoints, dataset.intrinsics, strict=True):
        uv, size = np.nan_to_num(uv_of(keypoints, K), nan=-1), len(mask)
        u, v = np.round(uv[((uv >= 0) & (uv < size - 1)).all(axis=1)]).astype(int).T
        on.extend(mask[v, u] >= 128)
    return float(np.mean(on))


# ==== Human3.6M ===========================================================================================
H36M_SIZE = {"54138969": (250, 252), "58860488": (250, 250)}
H36M_K = {"54138969": np.array([[286.4, 0, 128.2], [0, 286.1, 127.4], [0, 0, 1]]),
          "58860488": np.array([[287.3, 0, 129.3], [0, 286.9, 125.1], [0, 0, 1]])}
H36M_LENS = {"54138969": (-0.21, 0.24, -0.0009, -0.0016, -0.003),
             "58860488": (-0.25, 0.30, 0.0020, -0.0010, -0.050)}
H36M_VIDEOS = {"S1": ("Directions 1", "Directions", "_ALL 1"), "S5": ("WalkDog",), "S6": ("Sitting 2",),
               "S7": ("Photo",), "S8": ("Waiting",), "S9": ("Posing", "Greeting", "_ALL"),
               "S11": ("Directions", "Directions 1")}
H36M_FRAMES = 6


def h36m_people(subject: str, video: str, camera: str) -> list[dict]:
    rng = np.random.default_rng([ord(c) for c in subject + video + camera])
    return people_at(rng, H36M_FRAMES, (-1100, -500, 3300), (1100, 300, 4600))


def h36m_videos(*subjects: str) -> list[tuple]:
    """(subject, video, camera) of those that are read, in the order of the rows."""
    return [(s, v, c) for s in subjects for c in sorted(H36M_K)
            for v in sorted(H36M_VIDEOS[s], key=lambda v: v + ".")
            if "_ALL" not in v and (s, v) != ("S9", "Greeting")
            and (s, v, c) != ("S11", "Directions", "54138969")]


def write_pose(path: Path, pose: np.ndarray) -> None:
    """Pose (F, ...) as Human3.6M's float32 (1, F, -1)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_cdf(path, Pose=pose.reshape(1, len(pose), -1).astype(np.float32))


def write_h36m(root: Path) -> None:
    """D3 has two frames more than the video, D2 one; "_ALL" is broken, and so is one video; the labels of
    S9's Greeting are 200 mm off, in 3D and 2D alike."""
    for subject, videos in H36M_VIDEOS.items():
        for folder in ("Videos", "MySegmentsMat/ground_truth_bs"):
            (root / subject / folder).mkdir(parents=True)
        for video, camera in ((v, c) for v in videos for c in H36M_K):
            name, K, lens = f"{video}.{camera}", H36M_K[camera], H36M_LENS[camera]
            people = h36m_people(subject, video, camera)
            points = stack(people + people[:2], H36M_NAMES) + (200.0 * (video == "Greeting"), 0, 0)
            poses = root / subject / "MyPoseFeatures"
            write_pose(poses / "D3_Positions_mono" / f"{name}.cdf", points)
            write_pose(poses / "D2_Positions" / f"{name}.cdf", uv_of(points, K, lens)[:H36M_FRAMES + 1])
            file = root / subject / "Videos" / f"{name}.mp4"
            if "_ALL" in video or (subject, name) == ("S11", "Directions.54138969"):
                file.write_bytes(b"corrupt")
                continue
            shots = [body_picture(H36M_SIZE[camera], [person], K, lens) for person in people]
            frames, masks = zip(*shots, strict=True)
            write_video(file, frames, crf="10", preset="ultrafast")
            write_h5(root / subject / f"MySegmentsMat/ground_truth_bs/{name}.mat",
                     {"Masks": [mask.astype(np.uint8) for mask in masks]})


# ==== 3DPW ================================================================================================
PW3D_SIZE = {"downtown_walk_00": (480, 270), "outdoors_up_01": (270, 480), "office_call_00": (480, 270)}
PW3D_SPLIT = {"test": ("downtown_walk_00", "outdoors_up_01"), "train": ("office_call_00",), "validation": ()}
PW3D_FRAMES, PW3D_PEOPLE = 4, {"downtown_walk_00": 2, "outdoors_up_01": 1, "office_call_00": 2}


def pw3d_scene(name: str) -> tuple:
    """Intrinsics; for each frame world -> camera (4, 4) m, far from the others', and the people."""
    rng, (width, height) = np.random.default_rng([ord(c) for c in name]), PW3D_SIZE[name]
    K = np.array([[490, 0, width / 2 - 0.3], [0, 490, height / 2 + 0.4], [0, 0, 1]])
    poses = np.tile(np.eye(4), (PW3D_FRAMES, 1, 1))
    poses[:, :3, :3] = rotation(*rng.uniform(-1.5, 1.5, (3, PW3D_FRAMES)))
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
        joints = np.array([stack(crowd, SMPL_NAMES) for crowd in people]) / 1000  # (F, P, 24, 3) m, camera
        joints = np.einsum("fji,fpkj->fpki", poses[:, :3, :3], joints - poses[:, None, None, :3, 3])
        found = np.array([uv_of(stack(crowd, OPENPOSE_NAMES), K) for crowd in people])  # (F, P, 18, 2) px
        found, sure = found + rng.normal(0, 2, found.shape), np.full((*found.shape[:3], 1), 0.8)
        found = np.concatenate([found, sure], axis=-1)
        found[:, :, [4, 16]] = 0  # wrist and ear are never found
        found[:, :, 10, :2] += 90  # the ankle is someone else's
        found[2, 1:] = 0  # in frame 2 the second is not found
        valid = np.ones((PW3D_PEOPLE[name], PW3D_FRAMES), int)
        if len(valid) > 1 and split == "test":
            valid[0, 1] = 0
        rest = {"sequence": name, "genders": ["m", "f"], "betas": [np.zeros(10)] * 2, "texture_maps": [],
                "img_frame_ids": np.arange(PW3D_FRAMES) * 2, "trans_60Hz": [np.zeros((7, 3))] * 2}
        write_pickle(root / f"sequenceFiles/{split}/{name}.pkl", rest | {
            "jointPositions": [np.ascontiguousarray(j.reshape(-1, 72)) for j in joints.swapaxes(0, 1)],
            "poses2d": [np.ascontiguousarray(f.transpose(0, 2, 1)) for f in found.swapaxes(0, 1)],
            "campose_valid": list(valid), "cam_poses": poses, "cam_intrinsics": K})
        for i, crowd in enumerate(people):
            pixels, _ = body_picture(PW3D_SIZE[name], crowd, K)
            write_picture(root / f"imageFiles/{name}/image_{i:05d}.jpg", pixels)


def pw3d_truth(*names: str, no: tuple = NOT_IN_SMPL) -> np.ndarray:
    return ours([person for name in names for i, crowd in enumerate(pw3d_scene(name)[2])
                 for person, here in zip(crowd, pw3d_known(name)[i], strict=True) if here], no)


# ==== MPI-INF-3DHP ========================================================================================
MPI_SIZE, MPI_ENLARGED, MPI_ROWS = (256, 256), 1.09, {"S1/Seq1": 4, "S1/Seq2": 3}
MPI_CALIBRATION = {  # numbers of many lengths, as the publisher's
    0: np.array([[187.211625, 0, 128.088, 0], [0, 187.137875, 131.42425, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    4: np.array([[186.6, 0, 127.25, 0], [0, 186.5405, 126.9, 0], [0, 0, 1, 0], [0, 0, 0, 1]])}
MPI_VALID = [1, 0, 1, 1]


def mpi_people(sequence: str, camera: int = 0) -> list[dict]:
    rng = np.random.default_rng([ord(c) for c in sequence] + [camera])
    return people_at(rng, 5, (-700, -300, 3000), (700, 200, 4000))


def universal(points: np.ndarray) -> np.ndarray:
    """univ_annot3 of annot3 (n, K, 3): people of another height, who stand elsewhere."""
    return MPI_ENLARGED * points + (150, -40, 300)


def write_3dhp(root: Path) -> None:
    write_3dhp_test(root)
    for name in MPI_ROWS:  # annot.mat has five rows, one or two more than the video has frames
        folder = root / name
        (folder / "imageSequence").mkdir(parents=True)
        cells = {key: np.empty((14, 1), object) for key in ("annot2", "annot3", "univ_annot3")}
        text = "Skeletool Camera Calibration File V1.0\n"
        for camera in range(14):
            M = MPI_CALIBRATION.get(camera, 2 * np.eye(4))
            points = stack(mpi_people(name, camera), MPI_NAMES["train"])
            uv = uv_of(points, M[:3, :3])
            off = [MPI_28.index(name) for name in ("lhip", "rhip", "spine")]
            uv[:, off] += (1.1, -1.9)  # px, as in genuine files
            arrays = uv, points, universal(points)
            for cell, array in zip(cells.values(), arrays, strict=True):
                cell[camera, 0] = array.reshape(len(points), -1)
            numbers = {"sensor": "10 10", "size": "256 256", "animated": 0,
                       "intrinsic": " ".join(map(str, M.ravel())), "extrinsic": " ".join(["0.9650164"] * 16),
                       "radial": 0}
            text += f"name          {camera}\n" + "".join(f"  {k:<12}{v}\n" for k, v in numbers.items())
            if camera not in MPI_CALIBRATION:
                continue
            drawn = mpi_people(name, camera)[:MPI_ROWS[name]]
            frames = [body_picture(MPI_SIZE, [p], M[:3, :3])[0] for p in drawn]
            write_video(folder / f"imageSequence/video_{camera}.avi", frames, "mpeg4", bf="0", b="8000000")
        (folder / "camera.calibration").write_text(text)
        scipy_io.savemat(folder / "annot.mat", cells | {"cameras": np.arange(14.0)}, do_compression=True)


def write_3dhp_test(root: Path) -> None:
    for i in range(1, 7):
        people, size = mpi_people(f"TS{i}")[:4], (256, 256) if i < 5 else (320, 180)
        folder, points = root / f"mpi_inf_3dhp_test_set/TS{i}", stack(people, MPI_NAMES["test"])
        K = np.array([[150 + 3 * i, 0, size[0] / 2 + 0.2 * i], [0, 151 + 3 * i, size[1] / 2], [0, 0, 1]])
        uv = uv_of(points, K) + np.random.default_rng(i).uniform(-0.3, 0.3, (4, 17, 2))
        other = universal(points)
        if i == 6:  # knees and ankles were corrected in annot3 alone
            other[:, [MPI_17.index(name) for name in ("rknee", "lankle")]] += (25, -10, 8)
        for j, person in enumerate(people):
            write_picture(folder / f"imageSequence/img_{j + 1:06d}.jpg", body_picture(size, [person], K)[0])
        write_h5(folder / "annot_data.mat", {  # in MATLAB (2, 17, 1, F), which write_h5 turns back
            "annot2": uv[:, None].T, "annot3": points[:, None].T, "univ_annot3": other[:, None].T,
            "valid_frame": np.array([MPI_VALID], float), "activity_annotation": np.ones((1, 4))})


@pytest.fixture(autouse=True)
def two_sequences(monkeypatch):
    """Instead of 16."""
    monkeypatch.setattr(_3dhp, "FRAMES", MPI_ROWS)


def mpi_truth(split: str) -> np.ndarray:
    if split == "test":
        return np.concatenate([ours(mpi_people(f"TS{i}")[:4])[[0, 2, 3]] for i in range(1, 7)])
    return np.concatenate([ours(mpi_people(name, camera))[:rows]
                           for name, rows in MPI_ROWS.items() for camera in MPI_CALIBRATION])


# ==== SURREAL =============================================================================================
SURREAL_K = np.array([[600, 0, 159.5], [0, 600, 119.5], [0, 0, 1]])  # 160, 120 from the picture's edge
SURREAL_M = np.array([[0, 0, -1], [0, 1, 0], [-1, 0, 0]])  # world -> camera
SURREAL_CLIPS = {"val": {"run0/01_01/01_01_c0001": 5, "run0/01_01/01_01_c0002": 1,
                         "run1/ung_02_11/ung_02_11_c0007": 4, "run2/01_01/01_01_c0001": 3},
                 "train": {"run1/02_03/02_03_c0001": 2}}


def surreal_people(split: str, clip: str) -> list[dict]:
    rng = np.random.default_rng([ord(c) for c in split + clip])
    return people_at(rng, SURREAL_CLIPS[split][clip], (-900, -200, 6500), (900, 200, 7500))


def mirror_names(names: list) -> list:
    """What a mirror shows where the body has these."""
    return [{"l": "r", "r": "l"}.get(name[0], name[0]) + name[1:] for name in names]


def write_clip(place: Path, people: list[dict]) -> None:
    """place.mp4, place_info.mat, place_segm.mat."""
    place.parent.mkdir(parents=True, exist_ok=True)
    points, location = stack(people, mirror_names(SMPL_NAMES)), np.array([7.2, -0.9, 0.13])
    arrays = {"joints3D": points / 1000 @ SURREAL_M + location,
              "joints2D": np.round(uv_of(points, SURREAL_K) + 0.5)}
    scipy_io.savemat(f"{place}_info.mat", {  # M is orthogonal: its transpose leads back to the world
        "camLoc": location[:, None], "zrot": np.zeros((len(people), 1)), "sequence": place.name,
        **{name: np.squeeze(np.float32(array.transpose(2, 1, 0))) for name, array in arrays.items()}})
    frames, masks = zip(*(body_picture((320, 240), [person], SURREAL_K) for person in people), strict=True)
    write_video(Path(f"{place}.mp4"), frames, crf="10", preset="ultrafast")
    parts = {f"segm_{t + 1}": mask * np.uint8(7) for t, mask in enumerate(masks)}
    scipy_io.savemat(f"{place}_segm.mat", parts, do_compression=True)


def write_surreal(root: Path) -> None:
    for split, clip in ((split, clip) for split, clips in SURREAL_CLIPS.items() for clip in clips):
        write_clip(root / "SURREAL/data/cmu" / split / clip, surreal_people(split, clip))


def surreal_truth(split: str, choose) -> np.ndarray:
    return ours([person for clip in SURREAL_CLIPS[split] for person in choose(surreal_people(split, clip))],
                NOT_IN_SMPL)


# ==== Fixtures, one per publisher =========================================================================
def shipped(name: str, write):
    """A fixture: the folder `name` with the files that write(folder) puts there."""
    @pytest.fixture(scope="session")
    def root(tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("publisher") / name
        write(folder)
        return folder
    return root


@pytest.fixture(scope="session")
def hands() -> dict:
    return windows()


freihand_root, stb_root = shipped("FreiHAND", write_freihand), shipped("STB", write_stb)
rhd_root, pan_root = shipped("RHD_published_v2", write_rhd), shipped("panoptic", write_pan)
gan_root = shipped("GANeratedHands_Release", write_gan)
h36m_root, pw3d_root = shipped("h36m", write_h36m), shipped("3DPW", write_3dpw)
mpi_root, surreal_root = shipped("3DHP", write_3dhp), shipped("surreal", write_surreal)
