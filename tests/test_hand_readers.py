"""Readers of STB, RHD, PAN and GAN: from files in the publisher's own layout and formats to a data set.

The fixtures are hands of the project's own renderer, drawn as skeletons: a dot of its own colour on each
joint. So a picture tells where each joint is, whatever a reader says; and the traps of each format are put
in, one by one, to see that the checks of the conversion tell, or else the dots. With PICTURES set to a
folder, the sheets of `data.py show` are kept there.
"""
import inspect
import json
import os
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image, ImageDraw

import data
from udapose import InputError, project, random_generator

SIDE = 224                                                   # px of the stored crops
MIRROR = np.array([-1, 1, 1])
HUES = np.array([(255, 30, 30), (255, 200, 0), (0, 230, 60), (40, 110, 255), (255, 60, 255)])  # by finger
INKS = np.array([(255, 255, 255)] + [hue * (1, 0.8, 0.6, 0.4)[k] for hue in HUES for k in range(4)], int)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Labels are read in this process, not in one of their own."""
    monkeypatch.setattr(data, "in_a_process", lambda function, *arguments: function(*arguments))


def refused(message: str):
    return pytest.raises(InputError, match=message)


# ==========================================================================================================
# Hands and pictures of them
# ==========================================================================================================
def hands_at(name: str, count: int, centre, turn: float = 30) -> np.ndarray:
    """Right hands (count, 21, 3) mm, turned at random, their joints' mean at `centre` (3,) or (count, 3)."""
    rng = random_generator(0, f"hands of {name}")
    points = data.sample_hand(rng, count)[0][:, :21]
    angles = [np.radians(data.uniform(rng, (-turn, turn), count)) for _ in range(3)]
    points = points @ data.rotation(*angles).transpose(0, 2, 1)
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
        data.draw_skeleton(draw, uv, data.HAND_BONES, 1, (120, 120, 120))
        for ink, (u, v) in zip(INKS, uv): draw.ellipse((u - dot, v - dot, u + dot, v + dot), fill=tuple(ink))
    return image


def on_their_dots(dataset: data.Dataset, apart: float = 8) -> float:
    """Share of joints that land on a dot of their own ink, of those with no other joint within `apart` px."""
    uv = project(torch.tensor(dataset.keypoints[:]), torch.tensor(dataset.intrinsics[:])).numpy()
    met = []
    for image, points in zip(dataset.images[:].astype(int), uv):
        far = np.linalg.norm(points[:, None] - points, axis=-1) + 99 * np.eye(21)
        for joint, (u, v) in enumerate(np.round(points).astype(int)):
            if far[joint].min() > apart and 0 <= u < SIDE and 0 <= v < SIDE:
                met.append(np.abs(image[v, u] - INKS).sum(-1).argmin() == joint)
    assert len(met) > 5 * len(uv), "too few joints stand alone"
    return float(np.mean(met))


def agrees(dataset: data.Dataset, points: np.ndarray, K: np.ndarray) -> None:
    """The rows hold these joints (n, 21, 3) mm of right hands, and the intrinsics of crops of pictures with
    K (n, 3, 3): scaled and shifted, so that the joints' box is in the middle and 1 / 1.875 of the crop."""
    assert len(dataset) == len(points) and np.abs(dataset.keypoints[:] - points).max() < 2e-3
    to_crop = np.float64(dataset.intrinsics) @ np.linalg.inv(K)                          # (n, 3, 3)
    uv = project(torch.tensor(points), torch.tensor(K)).numpy()                          # (n, 21, 2) px
    low, high = uv.min(1), uv.max(1)
    scale = SIDE / (1.875 * (high - low).max(1))                                         # (n,)
    middle = (SIDE - 1) / 2 - scale[:, None] * (low + high) / 2                          # (n, 2) px
    expected = np.zeros_like(to_crop)
    expected[:, 0, 0], expected[:, 1, 1], expected[:, 2, 2], expected[:, :2, 2] = scale, scale, 1, middle
    assert np.allclose(to_crop, expected, atol=2e-3)


def mirrored(K, width: int) -> np.ndarray:
    """K (.., 3, 3) of the picture's mirror image."""
    K = np.array(K, float)
    K[..., 0, 2] = width - 1 - K[..., 0, 2]
    return K


def convert(name: str, root: Path, out: Path, *flags) -> data.Dataset:
    data.main([name, str(root), str(out), "--side", str(SIDE), "--workers", "1", *map(str, flags)])
    return data.Dataset(out, *(array for array in data.ARRAYS if (out / f"{array}.npy").exists()))


def sound(dataset: data.Dataset, capsys, left_out: int = 0) -> None:
    """`check` finds nothing, and `show` draws it."""
    capsys.readouterr()
    data.main(["check", str(dataset.folder)])
    assert f"labels: 0 of {len(dataset)} rows are impossible" in capsys.readouterr().out
    assert len(dataset.meta["skipped"]) == left_out
    name = "-".join([dataset.meta["name"], dataset.meta["split"], dataset.folder.name])
    picture = Path(os.environ.get("PICTURES", dataset.folder)) / f"{name}.png"
    data.main(["show", str(dataset.folder), str(picture)])


def slip(monkeypatch, name: str, **change) -> None:
    """Let the reader make a mistake: fields of its samples are replaced, by a function of the sample."""
    reader, *rest = data.READERS[name]

    def wrong(*args, **options):
        count, samples = reader(*args, **options)
        return count, (s._replace(**{k: f(s) for k, f in change.items()}) for s in samples)
    wrong.__signature__ = inspect.signature(reader)
    monkeypatch.setitem(data.READERS, name, (wrong, *rest))


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "broken"))


# ==========================================================================================================
# STB
# ==========================================================================================================
STB_RAW = [0, 17, 18, 19, 20, 13, 14, 15, 16, 9, 10, 11, 12, 5, 6, 7, 8, 1, 2, 3, 4]  # ours = raw[these]
STB_K = {"BB_left": lens(822.79041, 822.79041, 318.47345, 250.31296),
         "BB_right": lens(822.79041, 822.79041, 318.47345, 250.31296),
         "SK_color": lens(607.92271, 607.88192, 314.78337, 236.42484)}
STB_FRAMES, BASELINE = 2, np.array([120.054, 0, 0])
TURN, SHIFT = (0.00531, -0.01196, 0.00301), np.array([-24.0381, -0.4563, -1.2326])


def turn_by(vector) -> np.ndarray:
    """Rodrigues' formula, by columns: v cos + (a x v) sin + a (a . v) (1 - cos)."""
    angle = np.linalg.norm(vector)
    a, cos, sin = np.array(vector) / angle, np.cos(angle), np.sin(angle)
    return np.stack([v * cos + np.cross(a, v) * sin + a * a.dot(v) * (1 - cos) for v in np.eye(3)], axis=1)


def stb_hands(sequence: str) -> dict[str, np.ndarray]:
    """Left hands (n, 21, 3) mm in the frame of each camera that takes pictures."""
    left = hands_at(f"stb {sequence}", STB_FRAMES, (-60, 0, 600)) * MIRROR
    return {"BB_left": left, "BB_right": left - BASELINE, "SK_color": left - (60, 0, 0)}


def stb_raw(hands: np.ndarray) -> np.ndarray:
    """Hands (n, 21, 3) -> handPara (3, 21, n), joint 0 the palm: half way from ring_1 to the wrist."""
    raw = np.empty_like(hands)
    raw[:, STB_RAW] = hands
    raw[:, 0] = (hands[:, 0] + hands[:, 13]) / 2
    return raw.transpose(2, 1, 0)


STB_SEQUENCES = [f"B{i}{kind}" for i in range(1, 7) for kind in ("Counting", "Random")]


@pytest.fixture(scope="module")
def stb(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "STB"
    (root / "labels").mkdir(parents=True)
    for sequence in STB_SEQUENCES:
        (root / "images" / sequence).mkdir(parents=True)
        hands = stb_hands(sequence)
        for kind, points in hands.items():
            for i in range(STB_FRAMES):
                image = picture((640, 480), uv_of(points[i], STB_K[kind]))
                image.save(root / f"images/{sequence}/{kind}_{i}.png", compress_level=1)
        labels = {"BB": hands["BB_left"], "SK": hands["SK_color"] @ turn_by(TURN).T + SHIFT}  # d = R c + t
        for camera, points in labels.items():
            scipy.io.savemat(root / f"labels/{sequence}_{camera}.mat", {"handPara": stb_raw(points)})
    return root


def stb_truth(sequences, *kinds) -> tuple[np.ndarray, np.ndarray]:
    """Right hands (n, 21, 3) mm and K (n, 3, 3) in the order of the reader: sequence, frame, picture."""
    points = [stb_hands(s)[kind][i] * MIRROR for s in sequences for i in range(STB_FRAMES) for kind in kinds]
    return np.array(points), np.array([mirrored(STB_K[k], 640) for k in kinds] * (len(points) // len(kinds)))


@pytest.mark.parametrize("flags, kinds", [((), ("BB_left", "BB_right")), (("--camera", "sk"), ("SK_color",))])
def test_stb(stb, tmp_path, capsys, flags, kinds):
    test = convert("stb", stb, tmp_path / f"stb{len(kinds)}", "--split", "test", *flags)
    agrees(test, *stb_truth(["B1Counting", "B1Random"], *kinds))
    assert on_their_dots(test) == 1
    sound(test, capsys)
    train = convert("stb", stb, tmp_path / "train", *flags)
    agrees(train, *stb_truth(STB_SEQUENCES[2:], *kinds))
    assert not (train.folder / "masks.npy").exists()


def test_stb_wrist(stb):
    """Of the palm that the file holds, both rules, by hand: no check of the conversion could tell them."""
    palm = stb_raw(stb_hands("B1Counting")["BB_left"]).transpose(2, 1, 0)[0, 0]
    hand = stb_hands("B1Counting")["BB_left"][0]
    for rule, wrist in (("ring", 2 * palm - hand[13]), ("middle", 2.2 * palm - 1.2 * hand[9])):
        count, samples = data.read_stb(stb, "test", wrist=rule)
        first = next(samples)
        assert count == 2 * 2 * STB_FRAMES and first.left
        assert np.allclose(first.keypoints[0], wrist) and not np.allclose(first.keypoints[0], palm, atol=20)
        assert np.allclose(first.keypoints[1:], hand[1:])


STB_SLIPS = {  # what goes wrong -> flags, what the checks say
    "fingers in the publisher's order": (dict(keypoints=lambda s: s.keypoints[STB_RAW]), "'handedness'"),
    "taken for right hands": (dict(left=lambda s: False), "'handedness'"),
    "labels mirrored, pictures not": (dict(keypoints=lambda s: s.keypoints * MIRROR), "'handedness'"),
    "metres": (dict(keypoints=lambda s: s.keypoints / 1000), "'bone'"),
    "centimetres": (dict(keypoints=lambda s: s.keypoints / 10), "'bone'"),
}


@pytest.mark.parametrize("what", STB_SLIPS)
def test_stb_slips_are_caught(what, stb, tmp_path, monkeypatch):
    change, message = STB_SLIPS[what]
    slip(monkeypatch, "stb", **change)
    with refused(message): convert("stb", stb, tmp_path / "out", "--split", "test")


KEEP, INVERT, FORGET = np.array, np.negative, np.zeros_like


@pytest.mark.parametrize("camera, turn, shift", [
    ("sk", INVERT, KEEP), ("sk", FORGET, KEEP), ("sk", KEEP, INVERT), ("sk", KEEP, FORGET),
    ("sk", INVERT, INVERT), ("bb", KEEP, INVERT), ("bb", KEEP, FORGET)])
def test_stb_wrong_frame_is_seen(camera, turn, shift, stb, tmp_path, monkeypatch):
    """No 2D labels, so no check tells; the dots do: R, t or the baseline inverted or forgotten."""
    wrong = [(kind, K, tuple(turn(np.float64(r))), tuple(shift(np.float64(t))))
             for kind, K, r, t in data.STB[camera]]
    monkeypatch.setitem(data.STB, camera, wrong)
    off = convert("stb", stb, tmp_path / "out", "--split", "test", "--camera", camera)
    assert on_their_dots(off) < (0.1 if camera == "sk" else 0.6)              # of bb, left pictures are right


STB_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "labels: no such folder. ROOT has images/B1Counting"),
    "one file of labels missing": (lambda r: (r / "labels/B1Random_BB.mat").unlink(),
                                   "B1Random_BB.mat: missing. ROOT"),
    "half a mat": (lambda r: cut(r / "labels/B1Random_BB.mat"), "B1Random_BB.mat: "),
    "empty mat": (lambda r: cut(r / "labels/B1Counting_BB.mat", 0), "B1Counting_BB.mat: "),
    "another variable": (lambda r: scipy.io.savemat(r / "labels/B1Random_BB.mat", {"hand": np.eye(3)}),
                         "B1Random_BB.mat: .*handPara"),
    "another shape": (lambda r: scipy.io.savemat(r / "labels/B1Random_BB.mat",
                                                 {"handPara": np.ones((21, 3, 2))}),
                      r"B1Random_BB.mat: handPara is \(21, 3, 2\)"),
    "a picture missing": (lambda r: (r / "images/B1Random/BB_right_1.png").unlink(),
                          "BB_right_1.png: missing. ROOT"),
    "a zip unpacked elsewhere": (lambda r: (r / "images/B1Random").rename(r / "images/Random"),
                                 "images/B1Random: no such folder. ROOT has"),
    "half a picture": (lambda r: cut(r / "images/B1Random/BB_left_0.png"), "BB_left_0.png: broken"),
    "another size": (lambda r: Image.new("RGB", (320, 240)).save(r / "images/B1Random/BB_left_0.png"),
                     "BB_left_0.png: 320 x 240 px, expected 640 x 480"),
}


@pytest.mark.parametrize("what", STB_DAMAGE)
def test_stb_damage_is_named(what, stb, tmp_path):
    spoil, message = STB_DAMAGE[what]
    root = tmp_path / "broken"
    for part in ("labels", "images/B1Counting", "images/B1Random"): shutil.copytree(stb / part, root / part)
    spoil(root)
    with refused(message): convert("stb", root, tmp_path / "out", "--split", "test")


# ==========================================================================================================
# RHD
# ==========================================================================================================
RHD_RAW = [0, 4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17]
RHD_K, RHD_SIZE = lens(283.1, 282.9, 160, 159.5), (320, 320)
RHD_COUNT = {"training": 8, "evaluation": 3}


def rhd_hands(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right hands (n, 21, 3) mm; True where the left one is nearer, and so larger."""
    n = RHD_COUNT[part]
    near = np.arange(n) % 3 != 1                                              # (n,) left right left left ..
    depth = lambda first: np.where(first, 420, 600)  # noqa: E731
    left = hands_at(f"rhd left {part}", n, np.stack([0 * near + 90, 0 * near, depth(near)], 1)) * MIRROR
    return left, hands_at(f"rhd right {part}", n, np.stack([0 * near + 110, 0 * near, depth(~near)], 1)), near


def index_mask(left: np.ndarray, right: np.ndarray) -> Image.Image:
    """8-bit index: 1 the person, 2-17 the left hand's bones and palm, 18-33 the right one's."""
    image = Image.new("L", RHD_SIZE)
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 100, 300, 319), fill=1)
    for uv, first, wide in ((left, 2, np.ptp(left, 0).max()), (right, 18, np.ptp(right, 0).max())):
        draw.polygon([tuple(uv[i]) for i in (0, 1, 5, 9, 13, 17)], fill=first + 15)
        for a, b in data.HAND_BONES:
            part = first + 15 if a == 0 else first + 3 * ((b - 1) // 4) + (b - 2) % 4
            draw.line([tuple(uv[a]), tuple(uv[b])], fill=part, width=max(2, int(wide / 12)))
        for tip in (4, 8, 12, 16, 20):
            draw.ellipse((*uv[tip] - 3, *uv[tip] + 3), fill=first + 3 * (tip // 4 - 1))
    return image


def write_rhd_labels(path: Path, labels: dict) -> None:
    """As Python 2 and its numpy wrote it: protocol 2, numpy.core."""
    path.write_bytes(pickle.dumps(labels, protocol=2).replace(b"numpy._core", b"numpy.core"))


@pytest.fixture(scope="module")
def rhd(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "RHD_published_v2"
    for part in RHD_COUNT:
        for kind in ("color", "mask"): (root / part / kind).mkdir(parents=True)
        labels = {}
        for i, (left, right, _) in enumerate(zip(*rhd_hands(part))):
            uv = [uv_of(hand, RHD_K) for hand in (left, right)]
            picture(RHD_SIZE, *uv, dot=3).save(root / f"{part}/color/{i:05d}.png")
            mask = index_mask(*uv)
            if i % 2: mask.putpalette(bytes(range(256)) * 3)                  # the same indices
            mask.save(root / f"{part}/mask/{i:05d}.png")
            raw, flat = np.empty((42, 3)), np.ones((42, 3))
            for start, hand, pixels in zip((0, 21), (left, right), uv):
                raw[start + np.array(RHD_RAW)], flat[start + np.array(RHD_RAW), :2] = hand / 1000, pixels
            flat[np.arange(42) % 5 == 0, 2] = 0                               # some joints are hidden
            labels[i] = {"xyz": np.float32(raw), "uv_vis": np.float32(flat), "K": np.float32(RHD_K)}
        write_rhd_labels(root / part / f"anno_{part}.pickle", labels)
    return root


@pytest.mark.parametrize("split, part", [("train", "training"), ("evaluation", "evaluation")])
def test_rhd(rhd, tmp_path, capsys, split, part):
    dataset = convert("rhd", rhd, tmp_path / "rhd", "--split", split)
    left, right, near = rhd_hands(part)
    truth = np.where(near[:, None, None], left * MIRROR, right)
    agrees(dataset, truth, np.where(near[:, None, None], mirrored(RHD_K, 320), RHD_K))
    assert on_their_dots(dataset, 7) == 1
    sound(dataset, capsys)


def test_rhd_masks_hold_one_hand_and_not_the_person(rhd, tmp_path):
    """Against the index picture, mirrored by hand and warped by what the intrinsics say."""
    dataset = convert("rhd", rhd, tmp_path / "rhd")
    left, right, near = rhd_hands("training")
    for i, first in enumerate(near):
        index = np.asarray(Image.open(rhd / f"training/mask/{i:05d}.png"))
        masks = {"hand": (index >= 2) & (index <= 17) if first else index >= 18, "hands": index >= 2,
                 "person": index >= 1}
        K = mirrored(RHD_K, 320) if first else RHD_K
        A = torch.from_numpy(dataset.intrinsics[i:i + 1] @ np.float32(np.linalg.inv(K)))[:, :2]
        overlap = {}
        for name, mask in masks.items():
            mask = torch.tensor(mask[:, ::-1].copy() if first else mask).float()[None, None]
            true = data.warp(mask, A, SIDE)[0, 0].numpy() >= 0.5
            mine = dataset.masks[i] >= 128
            overlap[name] = (mine & true).sum() / (mine | true).sum()
        assert overlap["hand"] > 0.93 > 0.8 > overlap["person"], overlap


def rewrite_rhd(root: Path, change) -> None:
    """Change each label of the training part, a dict that is changed in place."""
    path = root / "training/anno_training.pickle"
    labels = pickle.loads(path.read_bytes())
    for label in labels.values(): change(label)
    write_rhd_labels(path, labels)


def flip_files(*folders: Path) -> None:
    for path in (path for folder in folders for path in folder.iterdir()):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


def swapped(label):
    for key in ("xyz", "uv_vis"): label[key] = np.roll(label[key], 21, axis=0)


def left_twice(label):
    for key in ("xyz", "uv_vis"): label[key][21:] = label[key][:21]


def put(key, change):
    def apply(label): label[key] = change(label[key])
    return lambda root: rewrite_rhd(root, apply)


RHD_TRAPS = {  # what is wrong in the files or, as well, in the reader; and what the checks say
    "millimetres in the file": (put("xyz", lambda x: 1000 * x), "'bone'"),
    "from palm to tip": (lambda r: [put(k, lambda x: x[RHD_RAW + [21 + i for i in RHD_RAW]])(r)
                                    for k in ("xyz", "uv_vis")], "'order'"),
    "right and left exchanged": (lambda r: rewrite_rhd(r, swapped), "'handedness'"),
    "no + 21 for the right hand": (lambda r: rewrite_rhd(r, left_twice), "'handedness'"),
    "another camera": (put("K", lambda K: K * np.float32([[1.05], [1], [1]])), "'projection'.*2D labels"),
    "fingers of the 2D labels reversed": (put("uv_vis", lambda x: x[STB_RAW + [21 + i for i in STB_RAW]]),
                                          "'projection'.*2D labels"),
    "2D labels mirrored": (put("uv_vis", lambda x: [319, 0, 0] - x * MIRROR[:3] * [1, -1, -1]),
                           "'projection'.*2D labels"),
    "pictures mirrored": (lambda r: flip_files(r / "training/color", r / "training/mask"), "flipped"),
}


@pytest.mark.parametrize("what", RHD_TRAPS)
def test_rhd_traps(what, rhd, tmp_path):
    spoil, message = RHD_TRAPS[what]
    root = copy(rhd, tmp_path)
    spoil(root)
    with refused(message): convert("rhd", root, tmp_path / "out")


def test_rhd_the_other_hand_only_a_comparison_tells(rhd, tmp_path, monkeypatch):
    """The smaller hand has possible labels too."""
    monkeypatch.setattr(data, "more_left", lambda path, right=data.more_left: not right(path))
    left, right, near = rhd_hands("training")
    other = convert("rhd", rhd, tmp_path / "other")
    assert np.abs(other.keypoints[:] - np.where(near[:, None, None], left * MIRROR, right)).max() > 50


def test_rhd_malicious_pickle_runs_nothing(rhd, tmp_path):
    trace, root = tmp_path / "was_here", copy(rhd, tmp_path)

    class Evil:
        def __reduce__(self): return os.system, (f"touch {trace}",)
    (root / "training/anno_training.pickle").write_bytes(pickle.dumps({0: Evil()}, protocol=2))
    with refused("anno_training.pickle: "): convert("rhd", root, tmp_path / "out")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert trace.exists(), "it would have run"


RHD_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "no such folder. ROOT is RHD_published_v2"),
    "no labels": (lambda r: (r / "training/anno_training.pickle").unlink(), "training.pickle: missing"),
    "half a pickle": (lambda r: cut(r / "training/anno_training.pickle"), "anno_training.pickle: "),
    "empty pickle": (lambda r: cut(r / "training/anno_training.pickle", 0), "anno_training.pickle: "),
    "a list": (lambda r: write_rhd_labels(r / "training/anno_training.pickle", [1, 2]),
               "anno_training.pickle: broken file of labels"),
    "21 joints": (put("xyz", lambda x: x[:21]), "pickle: broken file of labels: sample 0 has"),
    "no K": (lambda r: rewrite_rhd(r, lambda label: label.pop("K")), "pickle: broken file of labels"),
    "words for joints": (put("xyz", lambda x: np.full(x.shape, "a")), "pickle: broken file of labels"),
    "numbered by words": (lambda r: write_rhd_labels(
        r / "training/anno_training.pickle",
        {str(i): v for i, v in pickle.loads((r / "training/anno_training.pickle").read_bytes()).items()}),
        "anno_training.pickle: broken file of labels: sample '0' has"),
    "a picture missing": (lambda r: (r / "training/color/00003.png").unlink(), "color/00003.png: missing. R"),
    "a mask missing": (lambda r: (r / "training/mask/00003.png").unlink(), "mask/00003.png: missing. ROOT"),
    "half a mask": (lambda r: cut(r / "training/mask/00003.png", 0.7), "mask/00003.png: broken"),
    "half a picture": (lambda r: cut(r / "training/color/00003.png"), "color/00003.png: broken"),
    "a mask in colours": (lambda r: Image.new("RGB", RHD_SIZE).save(r / "training/mask/00002.png"),
                          "mask/00002.png: broken mask: RGB, not"),
}


@pytest.mark.parametrize("what", RHD_DAMAGE)
def test_rhd_damage_is_named(what, rhd, tmp_path):
    spoil, message = RHD_DAMAGE[what]
    root = copy(rhd, tmp_path)
    spoil(root)
    with refused(message): convert("rhd", root, tmp_path / "out")


# ==========================================================================================================
# PAN
# ==========================================================================================================
PAN_SIZE, PAN_FRAMES = (480, 270), 5
PAN_K, PAN_LENS = lens(352, 350, 243, 131), (-0.22, 0.07, 0.002, -0.0015, 0.01)  # of HD, in small
PAN_R = {"00_00": turn_by((0.3, 2.1, -0.4)), "00_01": turn_by((0.3, 2.1, 0.5))}  # world -> camera
PAN_T = {"00_00": np.array([35.0, -120, 780]), "00_01": np.array([-60.0, -40, 690])}    # mm
SEQUENCES = ("171204_pose3", "171204_pose1")                 # with pictures, with videos; test, train


def pan_hands(sequence: str) -> dict[str, np.ndarray]:
    """Hands (n, 21, 3) mm in the dome: far off the axis of camera 00_00, where its lens bends."""
    n, R, t = PAN_FRAMES, PAN_R["00_00"], PAN_T["00_00"]
    x = np.linspace(-25, 25, n)[:, None, None] * [1, 0.5, 0]
    seen = {"left": hands_at(f"pan left {sequence}", n, (310, -110, 700)) * MIRROR + x,
            "right": hands_at(f"pan right {sequence}", n, (320, 120, 720)) + x,
            "second": hands_at(f"pan second {sequence}", n, (10, 120, 760)) - x}
    return {side: (points - t) @ R for side, points in seen.items()}          # X = R^T (X_c - t)


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


def write_video(path: Path, pictures: list) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=30, options={"crf": "8"})
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv444p"
        for image in pictures: container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def pan_shots(sequence: str, view: str) -> list[Image.Image]:
    hands = pan_hands(sequence)
    return [picture(PAN_SIZE, *(uv_of(points[i] @ PAN_R[view].T + PAN_T[view], PAN_K, PAN_LENS)
                                for points in hands.values()), dot=2) for i in range(PAN_FRAMES)]


@pytest.fixture(scope="module")
def pan(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("publisher") / "panoptic"
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
                write_video(root / f"hdVideos/hd_{view}.mp4", pan_shots(sequence, view))
                continue
            (root / "hdImgs" / view).mkdir(parents=True)
            for i, shot in enumerate(pan_shots(sequence, view)):
                shot.save(root / f"hdImgs/{view}/{view}_{i:08d}.jpg", quality=95, subsampling=0)
    (top / "171026_pose1").mkdir()                                            # a sequence without hands
    return top


def pan_truth(sequence: str, frames=range(PAN_FRAMES), views=tuple(PAN_R)) -> tuple[np.ndarray, np.ndarray]:
    """Right hands (n, 21, 3) mm, camera, and K (n, 3, 3): by view, frame and hand, those in the picture."""
    hands, rows = pan_hands(sequence), []
    for view, i, side in ((v, i, s) for v in views for i in frames for s in hands):
        points = hands[side][i] @ PAN_R[view].T + PAN_T[view]
        uv = uv_of(points, PAN_K, PAN_LENS)
        if (uv < 0).any() or (uv > np.array(PAN_SIZE) - 1).any(): continue
        rows.append((points * MIRROR, mirrored(PAN_K, 480)) if side == "left" else (points, PAN_K))
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def test_the_pan_fixture_bends():
    """The lens moves the drawn joints by several px, and some hands lie outside of a picture."""
    hands = pan_hands(SEQUENCES[0])["left"] @ PAN_R["00_00"].T + PAN_T["00_00"]
    off = np.linalg.norm(uv_of(hands, PAN_K) - uv_of(hands, PAN_K, PAN_LENS), axis=-1)
    assert 4 < off.mean() < 25
    assert 15 < len(pan_truth(SEQUENCES[0])[0]) < 6 * PAN_FRAMES


@pytest.mark.parametrize("split, sequence", [("test", SEQUENCES[0]), ("train", SEQUENCES[1])])
def test_pan(pan, tmp_path, capsys, split, sequence):
    dataset = convert("pan", pan, tmp_path / "pan", "--split", split, "--stride", 1)
    agrees(dataset, *pan_truth(sequence))
    assert on_their_dots(dataset, 14) == 1
    sound(dataset, capsys)


def test_pan_stride_and_views(pan, tmp_path):
    some = convert("pan", pan, tmp_path / "some", "--stride", 3, "--views", 1)
    agrees(some, *pan_truth(SEQUENCES[1], (0, 3), ("00_01",)))
    assert on_their_dots(some, 14) == 1
    count, samples = data.read_pan(pan, "train", stride=1)
    assert count >= len(list(samples)) and data.read_pan(pan, "train")[0] > 0
    for views in ("7", "0,x"):
        with refused("HD view"): data.read_pan(pan, views=views)
    with refused("--stride 1 or more"): convert("pan", pan, tmp_path / "none", "--stride", 0)


def test_pan_thresholds(pan, tmp_path):
    """A hand with one bad joint is no label; with the thresholds open, it is."""
    def hands(**flags): return len(list(data.read_pan(pan, "test", stride=1, views="0", **flags)[1]))
    strict = hands()
    assert strict == len(pan_truth(SEQUENCES[0], views=("00_00",))[0])
    assert hands(score=0.05) == hands(error=2e5) == strict + PAN_FRAMES and hands(score=0.9) == 0
    with refused("not one sample"): convert("pan", pan, tmp_path / "none", "--stride", 1, "--score", 0.9)


def test_far_outside_a_lens_folds_back():
    """A hand far beside the picture that the lens's polynomial puts into it is not in view."""
    hand = hands_at("fold", 1, (3300, 0, 1500))[0]
    folded = uv_of(hand, PAN_K, (-0.3, 0.028, 0, 0, 0))
    assert ((folded >= 0) & (folded <= (479, 269))).all(), "the test needs such a hand"
    assert not data.in_view(hand, PAN_K, np.array([-0.3, 0.028, 0, 0, 0]), PAN_SIZE)
    assert data.in_view(hands_at("fold", 1, (0, 0, 700))[0], PAN_K, np.array(PAN_LENS), PAN_SIZE)
    assert not data.in_view(-hands_at("fold", 1, (0, 0, 700))[0], PAN_K, np.array(PAN_LENS), PAN_SIZE)


def edit(root: Path, pattern: str, change) -> None:
    """change(content) of each JSON file that matches."""
    paths = list(root.glob(pattern))
    assert paths
    for path in paths:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))


def each_hand(change):
    def apply(content):
        for person in content["people"]:
            for hand in (person.get("left_hand"), person.get("right_hand")):
                if hand: change(hand)
    return lambda root: edit(root, "*/hdHand3d/*.json", apply)


def scale_all(factor):
    """As if the unit were another: labels and the cameras' places."""
    def hands(hand): hand["landmarks"] = (factor * np.array(hand["landmarks"])).tolist()

    def cameras(content):
        for camera in content["cameras"]: camera["t"] = (factor * np.array(camera["t"])).tolist()

    def apply(root): each_hand(hands)(root); edit(root, "*/calibration_*.json", cameras)
    return apply


def swap_sides(content):
    for person in content["people"]:
        if "left_hand" in person and "right_hand" in person:
            person["left_hand"], person["right_hand"] = person["right_hand"], person["left_hand"]


def reverse(hand): hand["landmarks"] = np.reshape(hand["landmarks"], (21, 3))[STB_RAW].ravel().tolist()


def tip_first(hand): hand["landmarks"] = np.reshape(hand["landmarks"], (21, 3))[RHD_RAW].ravel().tolist()


PAN_TRAPS = {
    "millimetres": (scale_all(10), "'bone'"), "metres": (scale_all(0.01), "'bone'"),
    "left and right exchanged": (lambda r: edit(r, "*/hdHand3d/*.json", swap_sides), "'handedness'"),
    "fingers reversed": (each_hand(reverse), "'handedness'"),
    "from tip to palm": (each_hand(tip_first), "'order'"),
    "landmarks in cm, cameras in m": (lambda r: edit(r, "*/calibration_*.json", lambda c: [
        camera.update(t=(np.array(camera["t"]) / 100).tolist()) for camera in c["cameras"]] and c),
        "not one sample"),
}


@pytest.mark.parametrize("what", PAN_TRAPS)
def test_pan_traps(what, pan, tmp_path):
    spoil, message = PAN_TRAPS[what]
    root = copy(pan, tmp_path)
    spoil(root)
    with refused(message): convert("pan", root, tmp_path / "out", "--split", "test", "--stride", 1)


def cameras_with(**fields):
    def apply(content):
        for camera in content["cameras"]: camera.update(fields)
    return lambda root: edit(root, "*/calibration_*.json", apply)


PAN_SHIFTS = {  # no 2D labels: the dots tell
    "distortion forgotten": dict(distortion=lambda s: None),
    "distortion the wrong way round": dict(distortion=lambda s: -s.distortion),
    "k3 before p1 and p2": dict(distortion=lambda s: s.distortion[[0, 1, 4, 2, 3]] * [1, 1, 1, 1, 1]),
    "R the other way round": dict(keypoints=lambda s: (s.keypoints - PAN_T["00_00"]) @ PAN_R["00_00"]
                                  @ PAN_R["00_00"] + PAN_T["00_00"]),        # R^T X + t
    "frame of another number": dict(image=lambda s: s.image.replace("00000001.jpg", "00000000.jpg")),
}


@pytest.mark.parametrize("what", PAN_SHIFTS)
def test_pan_wrong_camera_is_seen(what, pan, tmp_path, monkeypatch):
    slip(monkeypatch, "pan", **PAN_SHIFTS[what])
    off = convert("pan", pan, tmp_path / "out", "--split", "test", "--stride", 1, "--views", 0)
    assert on_their_dots(off, 14) < 0.95


def first_file(root: Path, pattern: str) -> Path: return sorted(root.glob(pattern))[0]


PAN_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "no labels of split test. ROOT has SEQ/calibration"),
    "hands not unpacked": (lambda r: shutil.rmtree(r / SEQUENCES[0] / "hdHand3d"), "no labels of split test"),
    "no calibration": (lambda r: first_file(r, "*pose3/cal*").unlink(), "_171204_pose3.json: missing"),
    "half a calibration": (lambda r: cut(first_file(r, "*pose3/cal*")), "pose3.json: broken calibration"),
    "a calibration of nothing": (lambda r: first_file(r, "*pose3/cal*").write_text('{"cameras": [{}]}'),
                                 "pose3.json: broken calibration"),
    "half a label": (lambda r: cut(r / SEQUENCES[0] / "hdHand3d/handRecon3D_hd00000003.json"),
                     "hd00000003.json: broken file of labels"),
    "20 joints": (each_hand(lambda hand: hand.update(landmarks=hand["landmarks"][:60])), "broken file"),
    "a picture missing": (lambda r: (r / SEQUENCES[0] / "hdImgs/00_01/00_01_00000002.jpg").unlink(),
                          "00_01_00000002.jpg: missing. ROOT has"),
    "a view missing": (lambda r: shutil.rmtree(r / SEQUENCES[0] / "hdImgs/00_01"), "00_01: no such folder"),
    "half a picture": (lambda r: cut(r / SEQUENCES[0] / "hdImgs/00_00/00_00_00000001.jpg"),
                       "00_00_00000001.jpg: broken"),
    "another size": (cameras_with(resolution=[1920, 1080], K=(PAN_K * [[4], [4], [1]]).tolist()),
                     "00_00_00000000.jpg: 480 x 270 px, expected 1920 x 1080"),
}


@pytest.mark.parametrize("what", PAN_DAMAGE)
def test_pan_damage_is_named(what, pan, tmp_path):
    spoil, message = PAN_DAMAGE[what]
    root = copy(pan, tmp_path)
    spoil(root)
    with refused(message): convert("pan", root, tmp_path / "out", "--split", "test", "--stride", 1)


def test_pan_files_that_a_browser_numbered_are_no_labels(pan, tmp_path):
    root = copy(pan, tmp_path)
    label = root / SEQUENCES[0] / "hdHand3d/handRecon3D_hd00000000.json"
    shutil.copy(label, label.with_name("handRecon3D_hd00000000 (1).json"))
    flags = ("--split", "test", "--stride", 1)
    before, after = (convert("pan", r, tmp_path / name, *flags) for r, name in ((pan, "a"), (root, "b")))
    assert np.array_equal(before.keypoints[:], after.keypoints[:])


@pytest.mark.parametrize("what", ["missing", "half"])
def test_pan_broken_video_is_named(what, pan, tmp_path):
    root = copy(pan, tmp_path)
    path = root / SEQUENCES[1] / "hdVideos/hd_00_01.mp4"
    cut(path) if what == "half" else path.unlink()
    with refused("hd_00_01.mp4: (missing|broken)"): convert("pan", root, tmp_path / "out", "--stride", 1)


# ==========================================================================================================
# GAN
# ==========================================================================================================
GAN_K = lens(617.173, 617.173, 315.453, 242.259)
GAN_FOLDERS = [f"{kind}/{i:04d}" for kind in ("noObject", "withObject") for i in (1, 2, 3)]


def gan_folder(folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two frames: a left hand (21, 3) mm in the frame of the whole picture, its crop (u, v, factor)."""
    rows = []
    for hand in hands_at(f"gan {folder}", 2, (20, 10, 500)) * MIRROR:
        uv = uv_of(hand, GAN_K)
        low, box = uv.min(0) - 15, np.ptp(uv, axis=0).max() + 30              # px of 640 x 480
        rows.append((hand, np.array([*np.round(low), 256 / np.round(box)])))
    return rows


def crop_K(crop: np.ndarray) -> np.ndarray:
    u, v, s = crop
    return np.diag([s, s, 1]) @ (GAN_K - [[0, 0, u], [0, 0, v], [0, 0, 0]])


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    path.write_text(",".join(f"{x:.6f}" for x in numbers.ravel()))


def write_gan(root: Path, inverse: bool) -> Path:
    for folder in GAN_FOLDERS:
        (root / "data" / folder).mkdir(parents=True)
        for i, (hand, crop) in enumerate(gan_folder(folder), 1):
            start, uv = root / f"data/{folder}/{i:04d}", uv_of(hand, crop_K(crop))
            picture((256, 256), uv).save(f"{start}_color_composed.png")
            write_numbers(Path(f"{start}_joint2D.txt"), uv)
            write_numbers(Path(f"{start}_joint_pos_global.txt"), hand)
            relative = (hand - hand[9]) / np.linalg.norm(hand[9] - hand[0])
            write_numbers(Path(f"{start}_joint_pos.txt"), relative)
            write_numbers(Path(f"{start}_crop_params.txt"), crop ** [1, 1, -1 if inverse else 1])
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["factor", "inverse"])
def gan_either(request, tmp_path_factory) -> Path:
    return write_gan(tmp_path_factory.mktemp("publisher") / "GANeratedHands_Release", request.param)


@pytest.fixture(scope="module")
def gan(tmp_path_factory) -> Path:
    return write_gan(tmp_path_factory.mktemp("publisher") / "GANeratedHands_Release", False)


def gan_truth(folders) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for folder in folders for row in gan_folder(folder)]
    hands, crops = (np.array(column) for column in zip(*rows))
    return hands * MIRROR, np.array([mirrored(crop_K(crop), 256) for crop in crops])


def test_gan(gan_either, tmp_path, capsys):
    """Whether the file holds the crop's factor or its inverse."""
    dataset = convert("gan", gan_either, tmp_path / "gan", "--share", 0)
    agrees(dataset, *gan_truth(GAN_FOLDERS))
    assert on_their_dots(dataset) == 1
    sound(dataset, capsys)


def folders_of(samples) -> list[str]:
    return sorted({"/".join(sample.image.split("/")[1:3]) for sample in samples})


def test_gan_split_is_by_folder_and_seeded(gan, tmp_path):
    parts = {}
    for seed in range(6):
        for split in ("train", "test"):
            try: parts[seed, split] = folders_of(data.read_gan(gan, split, 0.5, seed)[1])
            except InputError as error:
                parts[seed, split] = []
                assert "no pictures in split" in str(error)
        assert sorted(parts[seed, "train"] + parts[seed, "test"]) == GAN_FOLDERS
    assert len({tuple(part) for (_, split), part in parts.items() if split == "test"}) > 3
    assert parts[3, "train"] == folders_of(data.read_gan(gan, "train", 0.5, 3)[1])
    part = copy(gan, tmp_path)                                                # a folder stays in its split
    shutil.rmtree(part / "data/noObject/0001")
    assert folders_of(data.read_gan(part, "train", 0.5, 3)[1]) == \
        [folder for folder in parts[3, "train"] if folder != "noObject/0001"]
    drawn = [random_generator(0, f"gan data/{kind}/{i:04d}").random() < 0.1
             for kind, n in (("noObject", 141), ("withObject", 184)) for i in range(1, n + 1)]
    assert 20 <= sum(drawn) <= 45


def retype(kind: str, change):
    """Rewrite every file of a kind."""
    def apply(root):
        for path in root.glob(f"data/*/*/*_{kind}.txt"):
            write_numbers(path, change(np.array(path.read_text().split(","), float)))
    return apply


def both(kinds, change):
    return lambda root: [retype(kind, change(n))(root) for kind, n in kinds]


GAN_TRAPS = {
    "metres": (retype("joint_pos_global", lambda x: x / 1000), "'bone'"),
    "relative joints": (lambda r: [shutil.copy(p, str(p).replace("_pos", "_pos_global"))
                                   for p in r.glob("data/*/*/*_joint_pos.txt")], "'bone'|'projection'"),
    "fingers reversed": (both([("joint2D", 2), ("joint_pos_global", 3)],
                              lambda n: lambda x: x.reshape(21, n)[STB_RAW]), "'handedness'"),
    "from tip to palm": (both([("joint2D", 2), ("joint_pos_global", 3)],
                              lambda n: lambda x: x.reshape(21, n)[RHD_RAW]), "'order'"),
    "2D labels in another order": (retype("joint2D", lambda x: x.reshape(21, 2)[STB_RAW]), "2D labels"),
    "v, u instead of u, v": (retype("joint2D", lambda x: x.reshape(21, 2)[:, ::-1]), "2D labels"),
    "neither the factor nor its inverse": (retype("crop_params", lambda x: x * [1, 1, 1.1]), "2D labels"),
    "the box's corner forgotten": (retype("crop_params", lambda x: x * [0, 0, 1]), "2D labels|'projection'"),
    "a mirrored release": (lambda r: [retype("joint_pos_global", lambda x: x.reshape(21, 3) * MIRROR)(r),
                                      retype("joint2D", lambda x: [255, 0] - x.reshape(21, 2) * [1, -1])(r)],
                           "'handedness'"),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 / 0: the knuckle of relative joints
@pytest.mark.parametrize("what", GAN_TRAPS)
def test_gan_traps(what, gan, tmp_path):
    spoil, message = GAN_TRAPS[what]
    root = copy(gan, tmp_path)
    spoil(root)
    with refused(message): convert("gan", root, tmp_path / "out", "--share", 0)


@pytest.mark.parametrize("slipped, message", [
    (dict(left=lambda s: False), "'handedness'"),
    (dict(intrinsics=lambda s: lens(617.173, 617.173, 315.453, 242.259)), "2D labels|'projection'"),
    (dict(intrinsics=lambda s: np.diag([(617.173 / s.intrinsics[0, 0]) ** 2] * 2 + [1]) @ s.intrinsics),
     "2D labels"),                                                            # the scale the wrong way round
    (dict(intrinsics=lambda s: s.intrinsics * [[1.06], [1.06], [1]]), "2D labels"),
    (dict(intrinsics=lambda s: s.intrinsics + [[0, 0, 6], [0, 0, 0], [0, 0, 0]]), "2D labels")])
def test_gan_slips_of_the_reader(slipped, message, gan, tmp_path, monkeypatch):
    slip(monkeypatch, "gan", **slipped)
    with refused(message): convert("gan", gan, tmp_path / "out", "--share", 0)


def some_file(kind): return lambda r: r / f"data/withObject/0002/0002_{kind}"


GAN_DAMAGE = {
    "no folder": (lambda r: shutil.rmtree(r), "data: no such folder. ROOT is GANeratedHands_Release"),
    "half of the release": (lambda r: shutil.rmtree(r / "data/withObject"), "withObject: missing. ROOT is"),
    "a text missing": (lambda r: some_file("joint2D.txt")(r).unlink(), "0002_joint2D.txt: missing. ROOT is"),
    "half a text": (lambda r: cut(some_file("joint_pos_global.txt")(r)), "pos_global.txt: broken file"),
    "empty text": (lambda r: cut(some_file("crop_params.txt")(r), 0), "crop_params.txt: broken file"),
    "no numbers": (lambda r: some_file("joint2D.txt")(r).write_text("a,b"), "joint2D.txt: broken file"),
    "no scale": (retype("crop_params", lambda x: x * [1, 1, 0]), "crop_params.txt: scale 0"),
    "half a picture": (lambda r: cut(some_file("color_composed.png")(r)), "color_composed.png: broken"),
    "another size": (lambda r: Image.new("RGB", (128, 128)).save(some_file("color_composed.png")(r)),
                     "color_composed.png: 128 x 128 px, expected 256 x 256"),
}


@pytest.mark.parametrize("what", GAN_DAMAGE)
def test_gan_damage_is_named(what, gan, tmp_path):
    spoil, message = GAN_DAMAGE[what]
    root = copy(gan, tmp_path)
    spoil(root)
    with refused(message): convert("gan", root, tmp_path / "out", "--share", 0)


# ==========================================================================================================
# What all four share
# ==========================================================================================================
@pytest.mark.parametrize("line", ["stb --split val", "stb --camera kinect", "stb --wrist palm",
                                  "rhd --split test", "pan --split val", "gan --split val"])
def test_unknown_choices_are_refused(line, tmp_path, capsys):
    name, flag, value = line.split()
    with pytest.raises(SystemExit): data.main([name, str(tmp_path), "out", flag, value])
    assert f"{flag}: invalid choice: '{value}' (choose from " in capsys.readouterr().err


@pytest.mark.parametrize("name, flags", [("stb", ["test"]), ("rhd", []), ("pan", ["test", 1]),
                                         ("gan", ["train", 0])])
def test_the_same_samples_each_time(name, flags, request):
    """As resuming asks; and the count, which the progress line shows, is not too small."""
    reader, root = data.READERS[name][0], request.getfixturevalue(name)
    count, first = (lambda count, samples: (count, list(samples)))(*reader(root, *flags))
    second = list(reader(root, *flags)[1])
    assert list(map(str, first)) == list(map(str, second)) and count >= len(first) > 5
    assert all(np.array_equal(a.keypoints, b.keypoints) for a, b in zip(first, second))
    assert (count == len(first)) == (name != "pan")
