"""data.py: the folder format and its refusals, conversion of FreiHAND and photographs, interruption, crops.

The fixture is FreiHAND in the publisher's own layout, made of the project's own rendered hands: 224 x 224
windows of larger pictures (so that some crops reach beyond), a dot of its finger's colour on each joint.
"""
import json
import mmap
import os
import shutil
import threading
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
from udapose import InputError, back_project, project, random_generator, run_script

N, SIDE = 6, 224                                             # samples in the fixture, each in 4 versions; px
FINGER = np.array([(255, 0, 0), (255, 200, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)])  # thumb .. little
BACKGROUND = np.array([(20, 90, 30), (120, 120, 120), (40, 60, 110), (150, 110, 70)])     # version 0 .. 3
CPU = torch.device("cpu")


def refused(message: str):
    return pytest.raises(InputError, match=message)


# ==========================================================================================================
# The fixture
# ==========================================================================================================
def windows() -> dict:
    """Rendered hands seen through a 224 px window of a 300 px picture: exact masks, mm and intrinsics."""
    rng = random_generator(0, "freihand fixture")
    hands = data.render("hands", rng, "source", N, 300)
    for i in range(N):
        x, y = rng.integers(15, 62, 2)
        for name in ("images", "masks"):
            hands[name][i, :SIDE, :SIDE] = hands[name][i, y:y + SIDE, x:x + SIDE].copy()
        hands["intrinsics"][i, :2, 2] -= (x, y)
    return hands | {name: hands[name][:, :SIDE, :SIDE] for name in ("images", "masks")}


def uv_of(keypoints, intrinsics) -> np.ndarray:
    return project(torch.tensor(keypoints), torch.tensor(intrinsics)).numpy()


def draw_version(hands: dict, i: int, v: int) -> Image.Image:
    hard = hands["masks"][i, ..., None] >= 128
    picture = Image.fromarray(np.where(hard, hands["images"][i], BACKGROUND[v]).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for joint, (x, y) in enumerate(uv_of(hands["keypoints"], hands["intrinsics"])[i]):
        if joint: draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=tuple(FINGER[(joint - 1) // 4]))
    return picture


def write_freihand(root: Path, hands: dict) -> None:
    for folder in ("training/rgb", "training/mask", "evaluation/rgb", "evaluation/segmap"):
        (root / folder).mkdir(parents=True)
    fine = {"quality": 95, "subsampling": 0}  # the dots keep their colours
    for i in range(N):
        for v in range(4): draw_version(hands, i, v).save(root / f"training/rgb/{i + N * v:08d}.jpg", **fine)
        draw_version(hands, i, 0).save(root / f"evaluation/rgb/{i:08d}.jpg", **fine)
        hard = Image.fromarray(np.uint8(255) * (hands["masks"][i] >= 128))
        hard.convert("RGB").save(root / f"training/mask/{i:08d}.jpg", quality=75)          # 3 channels, noise
        hard.point(lambda grey: grey // 85).save(root / f"evaluation/segmap/{i:08d}.png")  # 0, and 3: a part
    for part in ("training", "evaluation"):
        (root / f"{part}_xyz.json").write_text(json.dumps((hands["keypoints"] / 1000).tolist()))
        (root / f"{part}_K.json").write_text(json.dumps(hands["intrinsics"].tolist()))


@pytest.fixture(scope="module")
def hands() -> dict:
    return windows()


@pytest.fixture(scope="module")
def freihand(hands, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("publisher") / "FreiHAND"
    write_freihand(root, hands)
    return root


@pytest.fixture
def broken(freihand, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(freihand, tmp_path / "FreiHAND"))


def run(root: Path, out: Path, *flags) -> None:
    data.main(["freihand", str(root), str(out), "--side", "64", "--workers", "1", *flags])


@pytest.fixture(scope="module")
def converted(freihand, tmp_path_factory) -> data.Dataset:
    out = tmp_path_factory.mktemp("converted") / "train"
    run(freihand, out, "--side", "224")
    return data.Dataset(out, "masks", "keypoints", "intrinsics")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


# ==========================================================================================================
# FreiHAND, end to end
# ==========================================================================================================
def test_freihand_rows(converted, hands):
    meta = converted.meta
    assert len(converted) == 4 * N and meta["joints"] == data.HAND_JOINTS and meta["skipped"] == []
    assert (meta["name"], meta["split"], meta["rows"]) == ("freihand", "train", 4 * N)
    assert np.allclose(converted.keypoints, np.repeat(hands["keypoints"], 4, axis=0), atol=1e-3)     # mm
    outside = np.array([x[mask == 0].mean(axis=0) for x, mask in zip(converted.images, converted.masks)])
    version = np.abs(outside[:, None] - BACKGROUND).sum(-1).argmin(1)
    assert (version == np.arange(4 * N) % 4).all(), "picture i + n v is sample i with background v"


def colours_met(images, uv) -> float:
    """Share of joints whose pixel has its finger's colour, among those with no other joint within 9 px."""
    met = []
    for image, points in zip(images, uv):
        apart = np.linalg.norm(points[:, None] - points, axis=-1) + 99 * np.eye(21)
        for joint in range(1, 21):
            u, v = np.round(points[joint]).astype(int)
            if apart[joint].min() < 9 or not (0 <= u < 224 and 0 <= v < 224): continue
            met.append(np.abs(image[v, u] - FINGER).sum(-1).argmin() == (joint - 1) // 4)
    assert len(met) > 100
    return float(np.mean(met))


def test_joints_land_on_their_colours(converted):
    uv = uv_of(converted.keypoints[:], converted.intrinsics[:])
    assert colours_met(converted.images, uv) == 1
    for wrong in (223 - uv, uv[..., ::-1], uv + 5, uv[np.arange(4 * N) - 4]):
        assert colours_met(converted.images, wrong) < 0.9


def test_masks_fit(converted, hands):
    """Against an independent warp of the exact mask: the intrinsics alone say where the crop lies."""
    A = torch.from_numpy(converted.intrinsics[::4] @ np.linalg.inv(hands["intrinsics"]))[:, :2]  # to the crop
    true = data.warp(torch.from_numpy(hands["masks"].copy())[:, None] / 255, A, 224)[:, 0] >= 0.5
    for v in range(4):
        mine = torch.tensor(converted.masks[v::4]) >= 128
        iou = (mine & true).sum((1, 2)) / (mine | true).sum((1, 2))
        assert iou.min() > 0.95
        assert ((mine[1:] & true[:-1]).sum() / (mine[1:] | true[:-1]).sum()) < 0.8, "any mask would fit"


def test_box_of_the_crop(converted):
    """The joints' box is centred and fills 1 / (1.5 x 1.25) of the stored crop."""
    uv = uv_of(converted.keypoints[:], converted.intrinsics[:])
    low, high = uv.min(1), uv.max(1)
    assert np.allclose((low + high) / 2, (224 - 1) / 2, atol=0.01)
    assert np.allclose((high - low).max(1), 224 / 1.875, atol=0.01)


def test_evaluation_split(freihand, broken, tmp_path):
    run(freihand, tmp_path / "eval", "--split", "evaluation")
    dataset = data.Dataset(tmp_path / "eval", "masks", "keypoints", "intrinsics")
    assert len(dataset) == N and dataset.images.shape[1] == 64
    assert 0.05 < (dataset.masks[:] >= 128).mean() < 0.6
    shutil.rmtree(broken / "evaluation/segmap")
    run(broken, tmp_path / "no_masks", "--split", "evaluation")
    assert not (tmp_path / "no_masks/masks.npy").exists()
    assert np.array_equal(np.load(tmp_path / "no_masks/images.npy"), dataset.images)


def test_versions(freihand, converted, tmp_path):
    run(freihand, tmp_path / "two", "--versions", "13", "--side", "224")
    odd = np.arange(4 * N) % 2 == 1
    assert np.array_equal(np.load(tmp_path / "two/images.npy"), converted.images[odd])
    for versions in ("4", ""):
        with refused("--versions"): run(freihand, tmp_path / "none", "--versions", versions)


def test_two_workers_write_the_same_bytes(freihand, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLES_A_JOB", 4)
    run(freihand, tmp_path / "one" / "set")
    run(freihand, tmp_path / "two" / "set", "--workers", "2")
    assert contents(tmp_path / "one/set") == contents(tmp_path / "two/set")


# ==========================================================================================================
# The crop: pixel centres are integers
# ==========================================================================================================
@pytest.mark.parametrize("corner, width, side",
                         [((31.3, 12.8), 150, 64), ((60.7, 90.2), 40, 64), ((5, 5), 96, 96)])
def test_crop_square_is_exact(corner, width, side):
    """On a picture whose value is u (or v), the crop's value is the u (or v) that its pixel came from."""
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8), (224, 224))
    for axis, picture in enumerate((ramp, ramp.T)):
        crop = data.crop_square(np.ascontiguousarray(picture), np.array(corner), width, side).astype(float)
        place = (np.arange(side) + 0.5) * width / side + corner[axis] - 0.5
        error = (crop - place) if axis == 0 else (crop.T - place)
        assert np.abs(error).max() < 0.6 and abs(error.mean()) < 0.08          # 8 bit: rounded to 0.5
        assert abs((error + 0.5).mean()) > 0.2                                 # corners at integers: rejected


def test_crop_square_repeats_the_edge():
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    crop = data.crop_square(picture, np.array([-30.0, -20.0]), 100.0, 100)
    assert np.array_equal(crop[20:60, 30:80], picture)
    assert (crop[:20, :30] == picture[0, 0]).all() and (crop[60:, 80:] == picture[-1, -1]).all()
    assert np.array_equal(crop[5, 30:80], picture[0]) and np.array_equal(crop[20:60, 90], picture[:, -1])


def test_crop_shrinks_without_aliasing():
    stripes = np.tile(np.uint8([0, 255]), (224, 112))
    crop = data.crop_square(stripes, np.array([0.0, 0.0]), 224.0, 32)
    assert np.abs(crop[:, 1:-1].astype(int) - 127).max() <= 4


def test_box_of_the_valid_joints_only(hands):
    keypoints, K = hands["keypoints"][0].astype(float), hands["intrinsics"][0].astype(float)
    keypoints[[4, 8, 12]] = np.nan
    sample = data.Sample("x.jpg", keypoints, K)
    window = data.crop_window(data.to_uv(keypoints, K), 1.5)
    row = data.crop_sample(sample, hands["images"][0], None, (SIDE, SIDE), window, 100)
    uv = uv_of(row["keypoints"][None], row["intrinsics"][None])[0]
    assert np.isnan(uv[[4, 8, 12]]).all()
    assert np.isclose((np.nanmax(uv, axis=0) - np.nanmin(uv, axis=0)).max(), 100 / 1.875, atol=0.01)


# ==========================================================================================================
# The three checks, and traps put in on purpose
# ==========================================================================================================
MIRROR = np.array([-1, 1, 1])
TIP_FIRST = [0] + [4 * f + i for f in range(5) for i in (4, 3, 2, 1)]            # as RHD
LITTLE_FIRST = [0] + [4 * f + i for f in (4, 3, 2, 1, 0) for i in (1, 2, 3, 4)]  # as STB


@pytest.mark.parametrize("domain", ["source", "target"])
def test_rendered_hands_pass_and_slips_do_not(domain):
    keypoints = data.render("hands", random_generator(1, domain), domain, 150, 16)["keypoints"]
    share = lambda change: np.mean([data.hand_fault(change(k)) is None for k in keypoints])  # noqa: E731
    assert share(lambda k: k) == 1
    assert share(lambda k: k * MIRROR) < 0.1 and share(lambda k: k[LITTLE_FIRST]) < 0.4
    for change in (lambda k: k / 1000, lambda k: k / 10, lambda k: k * 1000, lambda k: k[TIP_FIRST]):
        assert share(change) == 0


def test_a_straight_hand_has_no_side():
    """What the sign cannot tell, it does not judge; an unlabelled joint is no fault either."""
    flat = np.zeros((21, 3))
    for finger in range(5):
        for i in range(4): flat[1 + 4 * finger + i] = (25 * finger - 40, -85 - (0, 45, 72, 94)[i], 500)
    assert data.hand_fault(flat) is None and data.hand_fault(flat * MIRROR) is None
    for joint in (7, 11, 15, 19): flat[joint:joint + 2, 2] += (3, 5)    # overstretched by 6 degrees
    assert data.hand_fault(flat) is None and data.hand_fault(flat * MIRROR) is None
    flat[[0, 5, 9]] = np.nan
    assert data.hand_fault(flat) is None


def test_projection_fault(hands):
    k, uv = hands["keypoints"][0], uv_of(hands["keypoints"], hands["intrinsics"])[0]
    size, mask = (SIDE, SIDE), hands["masks"][0] >= 128
    assert data.projection_fault(k, uv, size, mask, uv + 1) is None
    assert "2D labels" in data.projection_fault(k, uv, size, mask, uv[LITTLE_FIRST])
    assert "behind" in data.projection_fault(k * [1, 1, -1], uv, size)
    assert "fall on" in data.projection_fault(k, uv + 200, size)
    assert "box" in data.projection_fault(k, 100 + uv / 100, size)
    assert "joints have labels" in data.projection_fault(np.full_like(k, np.nan), uv, size)


def rewrite(root: Path, name: str, change) -> None:
    path = root / f"training_{name}.json"
    path.write_text(json.dumps(np.asarray(change(np.array(json.loads(path.read_text())))).tolist()))


def mirror_files(root: Path, *folders: str) -> None:
    for path in (path for folder in folders for path in (root / "training" / folder).iterdir()):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=95)


def left_hands(root: Path) -> None:
    mirror_files(root, "rgb", "mask")
    rewrite(root, "xyz", lambda xyz: xyz * MIRROR)
    rewrite(root, "K", lambda K: np.array([[[k[0][0], 0, 223 - k[0][2]], k[1], k[2]] for k in K.tolist()]))


def xyz(change):
    return lambda root: rewrite(root, "xyz", change)


TRAPS = {  # what is wrong with the reader or the files, and what the error says
    "millimetres taken for metres": (xyz(lambda k: 1000 * k), "'bone' .training/rgb/00000000.jpg: .* unit"),
    "metres left as they are": (xyz(lambda k: k / 1000), "'bone' .training/rgb/00000000.jpg: .* unit"),
    "joints from tip to palm": (xyz(lambda k: k[:, TIP_FIRST]), "'order'.* tip to palm"),
    "fingers in reverse": (xyz(lambda k: k[:, LITTLE_FIRST]), "'handedness'.* reverse order"),
    "left hands": (left_hands, "'handedness'.* mirrored"),
    "mirrored labels": (xyz(lambda k: k * MIRROR), "'handedness'.* mirrored"),
    "mirrored pictures": (lambda root: mirror_files(root, "rgb", "mask"), "'projection'.* flipped"),
    "another camera": (lambda root: rewrite(root, "K", lambda K: K + [[0, 0, 500], [0, 0, 0], [0, 0, 0]]),
                       "'projection'.* 0 of 21 joints fall on the picture"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap, broken, tmp_path):
    spoil, reason = TRAPS[trap]
    spoil(broken)
    with refused(f"samples left out.*{reason}"): run(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


DAMAGE = {  # what happens to the download, and the words (file, what is wrong) of the error
    "truncated picture": (lambda r: cut(r / "training/rgb/00000007.jpg"), "00000007.jpg: broken.*truncated"),
    "empty mask file": (lambda r: cut(r / "training/mask/00000002.jpg", 0), "mask/00000002.jpg: broken"),
    "another size": (lambda r: Image.new("RGB", (200, 224)).save(r / "training/rgb/00000003.jpg"),
                     "rgb/00000003.jpg: 200 x 224 px, expected 224 x 224"),
    "mask of another size": (lambda r: Image.new("L", (112, 112)).save(r / "training/mask/00000001.jpg"),
                             "mask/00000001.jpg: 112 x 112 px"),
    "missing picture": (lambda r: (r / "training/rgb/00000005.jpg").rename(r / "training/rgb/x.jpg"),
                        "rgb/00000005.jpg: missing. ROOT is FreiHAND_pub_v2 with"),
    "no masks": (lambda r: shutil.rmtree(r / "training/mask"), "training/mask: no such folder. ROOT is"),
    "no pictures": (lambda r: shutil.rmtree(r / "training/rgb"), "training/rgb: no such folder. ROOT is"),
    "no labels": (lambda r: (r / "training_xyz.json").unlink(), "training_xyz.json: missing. ROOT is"),
    "short labels": (xyz(lambda k: k[:-1]), f"{N - 1} samples in training_xyz.json, {N} in training_K.json"),
    "short lists": (lambda r: [rewrite(r, name, lambda v: v[:-1]) for name in ("xyz", "K")],
                    f"{4 * N} pictures in .*, where 4 x {N - 1} belong"),
    "half a json": (lambda r: cut(r / "training_K.json"), "training_K.json: broken JSON array"),
    "not 21 joints": (xyz(lambda k: k[:, :20]), "training_xyz.json: shape"),
    "another folder": (lambda r: shutil.rmtree(r), "no such folder. ROOT is"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_downloads_are_named(damage, broken, tmp_path):
    spoil, message = DAMAGE[damage]
    spoil(broken)
    with refused(message): run(broken, tmp_path / "out")


def test_the_command_line_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end: run_script(lambda: run(tmp_path / "nothing", tmp_path / "out"))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    for wrong in (["--sides", "3"], ["--split", "test"]):
        with pytest.raises(SystemExit): data.main(["freihand", "a", "b", *wrong])
    for flags in (["--side", "3"], ["--workers", "-1"]):
        with refused("--side is 16"): run(tmp_path, tmp_path / "out", *flags)


# ==========================================================================================================
# Writing: interruption, the limit on samples left out
# ==========================================================================================================
META = {"name": "small", "split": "train", "joints": ["a", "b"], "bones": [(0, 1)], "root": 0,
        "depth_range": 300}


def small_work(job: int) -> tuple[dict, list]:
    """0 to 4 rows of 5 x 5 px, told from each other by their numbers; now and then a sample left out."""
    count, rng = (3, 4, 0, 1)[job % 4], np.random.default_rng(job)
    skipped = [f"{job}.jpg: bone: too long"] if job % 20 == 2 else []
    return {"images": rng.integers(0, 255, (count, 5, 5, 3), dtype=np.uint8),
            "keypoints": rng.random((count, 2, 3), np.float32)} if count else {}, skipped


def build_small(folder: Path, **options) -> None:
    data.build_dataset(folder, META, range(24), 24, small_work, 1, images_a_job=256, **options)


class Interruption:
    """Raises KeyboardInterrupt at the n-th line that data.py executes; n = 0 only counts the lines."""

    def __init__(self, at: int):
        self.at, self.seen, self.before = at, 0, sys.gettrace()

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != data.__file__: return None
        if event == "line": self.seen += 1
        if event == "line" and self.seen == self.at: raise KeyboardInterrupt
        return self.trace


@pytest.fixture
def no_fsync(monkeypatch):
    monkeypatch.setattr(data.os, "fsync", lambda _: None)  # these tests do not cut the power, and it is slow


def test_interrupted_anywhere_the_result_is_the_same(tmp_path, no_fsync):
    """Ctrl-C at any line of the writer, twice, then the same command to the end."""
    with Interruption(0) as undisturbed: build_small(tmp_path / "whole" / "set")
    expected, lines = contents(tmp_path / "whole/set"), undisturbed.seen
    assert np.load(tmp_path / "whole/set/images.npy").shape == (48, 5, 5, 3) and lines > 500
    places = np.random.default_rng(0).integers(1, lines, 60).tolist() + list(range(lines - 40, lines + 1))
    for at in places:                                                          # the last 40: `finish`
        out = tmp_path / str(at) / "set"
        for again in (at, at // 3 + 1):
            try:
                with Interruption(again): build_small(out)
            except KeyboardInterrupt: pass
            except InputError as error: assert "exists" in str(error)          # it was ready already
        if not out.exists(): build_small(out)
        (out / "state.json").unlink(missing_ok=True)                           # left by the very last line
        assert contents(out) == expected, f"interrupted at line {at} of {lines}"


def test_killed_without_a_last_save(tmp_path, monkeypatch, no_fsync):
    """As after kill -9 or a power cut: what was written since the last save, half a row too, is cut off."""
    build_small(tmp_path / "whole" / "set")
    save, append = data.Writer.save, data.Writer.append
    for stop in (1, 2, 5, 12, 23, 24):
        out, jobs = tmp_path / str(stop) / "set", []

        def die(writer, *more):
            append(writer, *more)
            jobs.append(1)
            if len(jobs) == stop:
                for file in writer.files.values(): file.write(b"half a row")
                monkeypatch.setattr(data.Writer, "save", lambda _: None)
                raise KeyboardInterrupt
        monkeypatch.setattr(data.Writer, "append", die)
        with pytest.raises(KeyboardInterrupt): build_small(out)
        monkeypatch.setattr(data.Writer, "append", append)
        monkeypatch.setattr(data.Writer, "save", save)
        build_small(out)
        assert contents(out) == contents(tmp_path / "whole/set")


def test_resume_refuses_other_settings_and_lost_rows(tmp_path, freihand, broken):
    cut(broken / "training/rgb/00000023.jpg")
    with refused("00000023.jpg: broken"): run(broken, tmp_path / "set")
    with refused("set.part: was begun with other settings"):
        run(freihand, tmp_path / "set", "--side", "80")
    images = tmp_path / "set.part/images.npy"
    whole = images.read_bytes()
    images.write_bytes(whole[:3000])
    with refused("images.npy: has lost rows"): run(freihand, tmp_path / "set")
    images.write_bytes(whole)
    run(freihand, tmp_path / "set")                                                   # mended: it goes on
    run(freihand, tmp_path / "fresh")
    assert {**contents(tmp_path / "set")} == {**contents(tmp_path / "fresh")}
    run(freihand, tmp_path / "set")                                        # it says that it is there
    with refused("exists; remove it"): run(freihand, tmp_path / "set", "--side", "80")


def test_full_disk_is_an_error_line_and_the_conversion_goes_on_later(tmp_path, monkeypatch):
    opened, room = data.Writer.open, [2000]

    class Full:
        def __init__(self, file): self.file = file
        def __getattr__(self, name): return getattr(self.file, name)

        def write(self, content):
            room[0] -= len(content)
            if room[0] < 0: raise OSError(28, "No space left on device")
            return self.file.write(content)

    monkeypatch.setattr(data.Writer, "open", lambda *a: Full(opened(*a)))
    with refused("set.part: could not be written.*No space"): build_small(tmp_path / "set")
    monkeypatch.setattr(data.Writer, "open", opened)
    build_small(tmp_path / "set")
    build_small(tmp_path / "other/set")
    assert contents(tmp_path / "set") == contents(tmp_path / "other/set")


def skipping(share: float):
    """Work that leaves out `share` of ten samples a job, most of them for one reason."""
    def work(job):
        out = round(10 * share) if job >= 0 else 0
        return {"images": np.zeros((10 - out, 4, 4, 3), np.uint8)} if out < 10 else {}, \
            [f"{job}-{i}.jpg: {'unit: metres?' if i else 'order: tip first?'}" for i in range(out)]
    return work


def test_the_limit_on_samples_left_out(tmp_path):
    def build(name, share, jobs, **more):
        data.build_dataset(tmp_path / name, META, jobs, 10 ** 4, skipping(share), 1, **more)
    seen = []
    with refused("60 of 200 samples left out, 40 .*for 'unit' .0-1.jpg: unit: metres"):
        build("early", 0.3, (seen.append(job) or job for job in range(10 ** 4)))
    assert len(seen) == 20                                                            # not after 10,000
    with refused("9 of 30"): build("late", 0.3, [0, 1, 2])
    build("fine", 0.1, [0] + [-1] * 19)                                               # 1 of 200
    with refused("30 of 30"): build("none", 1.0, [0, 1, 2], max_skipped=1.0)
    assert json.loads((tmp_path / "fine/meta.json").read_text())["skipped"] == ["0-0.jpg: order: tip first?"]


def test_a_reader_that_changes_its_arrays_is_refused(tmp_path):
    rows = lambda *shape: np.zeros(shape, np.uint8)  # noqa: E731
    for number, second in enumerate(({"images": rows(1, 6, 6, 3)},
                                     {"images": rows(1, 5, 5, 3), "masks": rows(1, 5, 5)},
                                     {"images": rows(2, 5, 5, 3), "masks": rows(1, 5, 5)})):
        jobs = [{"images": rows(1, 5, 5, 3)}, second]
        with refused("data set holds one kind of rows"):
            data.build_dataset(tmp_path / str(number), META, jobs, 2, lambda job: (job, []), 1)


# ==========================================================================================================
# Photographs
# ==========================================================================================================
def test_photos(tmp_path):
    root, grey = tmp_path / "photos", np.full((40, 60), 200, np.uint8)
    (root / "deep").mkdir(parents=True)
    halves = Image.new("RGB", (60, 40), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 0, 60, 20))                                  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 6                                                           # to be turned by 90 degrees
    Image.fromarray(grey).save(root / "a_grey.png")
    Image.fromarray(np.full((40, 60), 200 * 257, np.uint16)).save(root / "b_16bit.png")
    Image.new("CMYK", (60, 40), (0, 255, 255, 0)).save(root / "c_cmyk.jpg", quality=95)
    halves.save(root / "d_turned.JPEG", exif=exif, quality=95)
    halves.convert("P").save(root / "deep/e_palette.png")
    Image.new("RGB", (1, 1), (9, 8, 7)).save(root / "f_tiny.bmp")
    halves.save(root / "g_cut.jpg"); cut(root / "g_cut.jpg")
    (root / "h_text.jpg").write_text("not a picture")
    (root / "readme.txt").write_text("not a photograph")
    data.main(["imagenet", str(root), str(tmp_path / "xc"), "--side", "32", "--workers", "1"])
    dataset = data.Dataset(tmp_path / "xc")
    assert len(dataset) == 6 and dataset.meta["joints"] == []
    assert [text.split(": ")[0][-9:] for text in dataset.meta["skipped"]] == ["g_cut.jpg", "_text.jpg"]
    images = dataset.images[:].astype(int)
    assert (images[:2] == 200).all() and np.abs(images[2] - (255, 0, 0)).max() < 12
    assert np.abs(images[3][:, :12] - (255, 0, 0)).max() < 40 < np.abs(images[3][:, 20:] - (255, 0, 0)).max()
    assert np.abs(images[3][:, 20:] - (0, 0, 255)).max() < 40                  # blue is on the right now
    assert np.abs(images[4][:12] - (0, 0, 255)).max() < 9 and (images[5] == (9, 8, 7)).all()
    for folder in (tmp_path / "nothing", root / "deep/none"):
        with refused("no photographs"): data.main(["imagenet", str(folder), str(tmp_path / "none")])


def test_a_download_that_grew_while_it_was_stopped_is_refused(tmp_path, monkeypatch):
    """Names that sort before those that are done would push some out, and bring others twice."""
    root, out = tmp_path / "photos", tmp_path / "xc"
    root.mkdir()
    def photo(name, shade): Image.new("RGB", (20, 20), (shade, 0, 0)).save(root / name)
    for i in range(64): photo(f"b{i:02d}.png", i)
    append = data.Writer.append

    def stop_after_two(writer, *more):
        append(writer, *more)
        if writer.state["jobs"] == 2: raise KeyboardInterrupt
    def convert(): data.main(["imagenet", str(root), str(out), "--side", "16", "--workers", "1"])
    with monkeypatch.context() as patch:
        patch.setattr(data.Writer, "append", stop_after_two)
        with pytest.raises(KeyboardInterrupt): convert()
    photo("a.png", 200)
    with refused("xc.part: was begun from other files: ROOT has changed since; remove it"): convert()
    (root / "a.png").unlink()
    convert()
    assert data.Dataset(out).images[:][:, 0, 0, 0].tolist() == list(range(64))


def test_photographs_behind_links(tmp_path):
    """On clusters, collections are made of links; one that leads back up ends nowhere."""
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    for i, place in enumerate(("far/deep", "root")): Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / place / "a.png")
    (tmp_path / "root/linked").symlink_to(tmp_path / "far")
    (tmp_path / "root/again").symlink_to(tmp_path / "far")
    for link, place in (("far/back", "far"), ("root/loop", "root"), ("root/up", "")):
        (tmp_path / link).symlink_to(tmp_path / place)
    count, samples = data.read_photos(tmp_path / "root")
    assert [sample.image for sample in samples] == ["a.png", "again/deep/a.png"] and count == 2


def test_pixels_that_are_fractions_are_left_out(tmp_path):
    Image.fromarray(np.full((20, 20), 40000.0, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif: .*fractions, of an unknown range"): data.open_picture(tmp_path / "a.tif")


def test_a_reader_of_two_kinds_of_samples_is_refused(tmp_path):
    Image.new("RGB", (224, 224)).save(tmp_path / "a.png")
    plain, rows = data.Sample("a.png"), {"images": 1, "keypoints": 2}
    for first in (plain, plain._replace(left=True)):
        made = iter([{"images": np.zeros(1)}, dict.fromkeys(rows, np.zeros(1))])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "convert_sample", lambda *_: next(made))
            with refused("samples a.png to a.png some have .'images',., others .'images', 'keypoints'.: a reader gives"):
                data.convert(tmp_path, 32, data.HAND, [first, plain])


def test_a_switch_of_a_reader_can_be_switched_off(monkeypatch, tmp_path, capsys):
    seen = []

    def read(root, flip: bool = True): seen.append(flip); raise InputError("read")
    monkeypatch.setitem(data.READERS, "mine", (read, data.HAND, 0.05))
    for flags in ([], ["--flip"], ["--no-flip"]):
        with refused("read"): data.main(["mine", str(tmp_path), str(tmp_path / "out"), *flags])
    assert seen == [True, True, False]
    for command, texts in (([], ("freihand ", "surreal ", "check ")), (["stb"], ("px of a stored crop", "0: all cores"))):
        with pytest.raises(SystemExit): data.main([*command, "-h"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(text in said for text in texts)


def test_a_folder_may_be_named_with_a_slash(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    data.main(["imagenet", str(tmp_path), f"{tmp_path}/xc/", "--side", "32", "--workers", "1"])
    assert len(data.Dataset(tmp_path / "xc")) == 1


def test_a_file_may_be_named_with_any_bytes(tmp_path, capsys):
    """Of an archive packed where names were latin-1; one is a picture, one is left out, and said."""
    root = tmp_path / "photos"
    root.mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(root / os.fsdecode("café.png".encode("latin1")))
    (root / os.fsdecode("maçã.png".encode("latin1"))).write_bytes(b"no picture")
    data.main(["imagenet", str(root), str(tmp_path / "xc"), "--side", "32", "--workers", "1"])
    assert len(data.Dataset(tmp_path / "xc")) == 1
    assert r"ma\udce7\udce3.png: broken picture" in capsys.readouterr().out


def test_a_folder_that_is_no_data_set_is_not_written_to(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "xc").mkdir()
    with refused("xc: exists; remove it to make it again"):
        data.main(["imagenet", str(tmp_path), str(tmp_path / "xc"), "--side", "32", "--workers", "1"])
    assert not list((tmp_path / "xc").iterdir())


def test_photo_is_cropped_at_its_centre(tmp_path):
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    arrays, _ = data.convert(tmp_path, 100, data.HAND, [data.Sample("ramp.png")])
    assert np.array_equal(arrays["images"][0, :, :, 0], ramp[:, 50:150])


# ==========================================================================================================
# A data-set folder, written by hand, and what is refused
# ==========================================================================================================
@pytest.fixture
def own(tmp_path) -> Path:
    """The ten lines of "bring your own data"."""
    folder, rng = tmp_path / "own", np.random.default_rng(0)
    folder.mkdir()
    np.save(folder / "images.npy", rng.integers(0, 255, (6, 50, 50, 3), dtype=np.uint8))
    np.save(folder / "masks.npy", rng.integers(0, 255, (6, 50, 50), dtype=np.uint8))
    np.save(folder / "keypoints.npy", np.float32(rng.uniform(-80, 80, (6, 2, 3)) + (0, 0, 500)))
    np.save(folder / "intrinsics.npy", np.float32([[[100, 0, 24.5], [0, 100, 24.5], [0, 0, 1]]] * 6))
    (folder / "meta.json").write_text(json.dumps(META | {"format": 1}))
    return folder


def every(folder: Path) -> data.Dataset:
    return data.Dataset(folder, "masks", "keypoints", "intrinsics")


def resave(folder: Path, name: str, change) -> None:
    array = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", change(array))


def spoilt(array, value):
    array = array.copy()
    array[3, 1, 2] = value
    return array


def saved(name, change):
    return lambda folder: resave(folder, name, change)


REFUSED = {
    "no folder": (lambda f: shutil.rmtree(f), "no data set here"),
    "missing array": (lambda f: (f / "masks.npy").unlink(), "masks.npy: missing.*--masks none --xc 0"),
    "missing labels": (lambda f: (f / "keypoints.npy").unlink(), "keypoints.npy: missing; it is needed here$"),
    "grey images": (saved("images", lambda a: a[..., 0]), r"images.npy: shape \(6, 50, 50\); give \(n, H, H, 3\)"),
    "no camera": (saved("intrinsics", lambda a: 0 * a), "intrinsics.npy: row 0 is no camera"),
    "a camera that is NaN": (saved("intrinsics", lambda a: spoilt(a, np.nan)), "intrinsics.npy: row 3 is no cam"),
    "a protocol of no words": (lambda f: (f / "meta.json").write_text(json.dumps(
        META | {"format": 1, "protocol": ["a"]})), "protocol is .'a'.; give words"),
    "truncated array": (lambda f: cut(f / "images.npy"), "images.npy: broken .npy array"),
    "empty file": (lambda f: cut(f / "keypoints.npy", 0), "keypoints.npy: broken .npy array"),
    "not an array": (lambda f: (f / "images.npy").write_text("images"), "images.npy: broken .npy array"),
    "pickled objects": (saved("masks", lambda a: np.array([{}])), "masks.npy: broken .npy array"),
    "wrong number of joints": (saved("keypoints", lambda a: np.repeat(a, 2, 1)), "keypoints.npy: shape"),
    "wrong number of intrinsics": (saved("intrinsics", lambda a: a[:5]), "intrinsics.npy: shape"),
    "not square": (saved("images", lambda a: a[:, :40]), "images.npy: shape"),
    "no images": (saved("images", lambda a: a[:0]), "images.npy"),
    "masks of another size": (saved("masks", lambda a: a[:, :40, :40]), "masks.npy: shape"),
    "float images, a NaN in them": (saved("images", lambda a: spoilt(a / 255, np.nan)), "npy: float64"),
    "double keypoints": (saved("keypoints", lambda a: a.astype(float)), "keypoints.npy: float64"),
    "infinite label": (saved("keypoints", lambda a: spoilt(a, np.inf)), "keypoints.npy: row 3 is infinite"),
    "half a meta.json": (lambda f: cut(f / "meta.json"), "meta.json: broken JSON file"),
    "binary meta.json": (lambda f: (f / "meta.json").write_bytes(b"\x00\xff" * 9), "meta.json: broken JSON"),
    "meta.json is a number": (lambda f: (f / "meta.json").write_text("3"), "meta.json: not a JSON object"),
    "empty meta.json": (lambda f: (f / "meta.json").write_text("{}"), "lacks bones, depth_range, format"),
    "another format": (lambda f: (f / "meta.json").write_text(json.dumps(META | {"format": 2})), "format 2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_folders_are_refused(what, own):
    every(own)
    spoil, message = REFUSED[what]
    spoil(own)
    with refused(message): every(own)


def test_unlabelled_joints_are_welcome(own):
    resave(own, "keypoints", lambda a: spoilt(a, np.nan))
    uv, depth = data.labels_of(every(own), np.arange(6), torch.eye(3)[None, :2].repeat(6, 1, 1))
    assert depth[3, 1].isnan() and depth.isfinite().sum() == 11


def test_an_image_without_labels_needs_no_camera(own):
    """Zeros are what one writes where there is nothing; nor does a joint behind the camera count."""
    def last(value):
        def change(a):
            a = a.copy()
            a[5] = value
            return a
        return change
    resave(own, "keypoints", last(np.nan)), resave(own, "intrinsics", last(0))
    dataset = every(own)
    K = torch.from_numpy(np.array(dataset.intrinsics))
    assert back_project(torch.zeros(6, 2, 2), torch.full((6, 2), 9.0), K)[:5].isfinite().all()
    resave(own, "keypoints", lambda a: np.where(np.arange(6)[:, None, None] == 2, -a, a))
    uv, depth = data.labels_of(every(own), np.arange(6), torch.eye(3)[None, :2].repeat(6, 1, 1))
    assert [bool(row.isfinite().all()) for row in uv] == [True, True, False, True, True, False]
    assert uv[2].isnan().all() and depth[2].isnan().all()


def test_a_target_s_labels_are_not_opened(own):
    rows, parameters = np.arange(6), data.augmentation(np.random.default_rng(0), 6, 0.4)
    before, dataset = data.Dataset(own).fingerprint, data.Dataset(own)
    assert dataset.masks is None and dataset.keypoints is None and dataset.intrinsics is None
    x, m, _ = data.crops(dataset, rows, parameters, 40, CPU)
    for name in ("masks", "keypoints", "intrinsics"): (own / f"{name}.npy").unlink()
    dataset = data.Dataset(own)
    assert dataset.fingerprint == before and m is None
    assert torch.equal(data.crops(dataset, rows, parameters, 40, CPU)[0], x)


def test_masks_of_a_run(own, tmp_path):
    dataset = data.Dataset(own)
    assert data.open_masks(own / "masks.npy", dataset).shape == (6, 50, 50)
    np.save(tmp_path / "small.npy", np.zeros((6, 40, 40), np.uint8))
    for path in (tmp_path / "small.npy", tmp_path / "nothing.npy", own / "meta.json"):
        with refused(path.name): data.open_masks(path, dataset)


# ==========================================================================================================
# show and check
# ==========================================================================================================
def test_check(converted, tmp_path, capsys):
    folder = Path(shutil.copytree(converted.folder, tmp_path / "set"))
    data.main(["check", str(folder)])
    assert capsys.readouterr().out.count("sound") == 5
    whole = (folder / "images.npy").read_bytes()
    for damaged, says in ((whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:], "row 0 is not what was"),
                          (whole + b"more", "broken .npy array: its header announces")):
        (folder / "images.npy").write_bytes(damaged)
        with refused(f"images.npy: {says}"): data.main(["check", str(folder)])
    (folder / "images.npy").write_bytes(whole)
    (folder / "masks.npy").unlink()
    with refused("masks.npy: missing"): data.main(["check", str(folder)])


def test_check_of_own_data(converted, own, tmp_path, capsys):
    data.main(["check", str(own)])
    said = capsys.readouterr().out
    assert said.count("without a checksum") == 4 and "no foreground" not in said
    resave(own, "masks", lambda a: a // 128)
    data.main(["check", str(own)])
    assert "masks: the largest value is 1: no foreground" in capsys.readouterr().out
    for name in data.SUMMED: shutil.copy(converted.folder / f"{name}.npy", own)
    meta = json.loads((converted.folder / "meta.json").read_text())
    (own / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("crc", "rows")}))
    resave(own, "keypoints", lambda a: a / 1000)
    data.main(["check", str(own)])
    assert f"{4 * N} of {4 * N} rows are impossible" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_rows_without_labels_are_not_impossible(own, capsys):
    def change(poses):
        poses[:] = (-20, 0, 500), (20, 0, 500)
        poses[0], poses[1, 1] = np.nan, np.nan
        return poses
    (own / "masks.npy").unlink()
    resave(own, "keypoints", change)
    data.main(["check", str(own)])
    assert "labels: 0 of 6 rows are impossible" in capsys.readouterr().out
    resave(own, "keypoints", lambda poses: poses * np.float32([1, 1, 0]))  # in the camera's plane
    data.main(["check", str(own)])
    assert "labels: 4 of 6 rows are impossible" in capsys.readouterr().out


def test_labels_in_words():
    """Bones of 50 and 67.1 mm, one joint 60 mm behind the root, in one of four rows no root; in metres."""
    meta, poses = {"bones": [[0, 1], [1, 2]], "root": 1, "depth_range": 100.0}, np.zeros((4, 3, 3), np.float32)
    poses[:, 0], poses[:, 2], poses[3, 1] = (0, 30, 60), (30, 40, 0), np.nan
    assert data.describe_labels(poses, meta) == (
        "bones: 58.5 mm in the median; joints: 8.3 % unlabelled, 25.0 % beyond the depth range of 100 mm; "
        "1 rows lack the root: nothing is learned of them")
    assert data.describe_labels(poses / 1000, meta).startswith("bones: 0.0585 mm")
    assert data.describe_labels(poses, meta | {"bones": []}).startswith("bones: unknown")


def test_hands(tmp_path, monkeypatch, capsys):
    """The embedded benchmark goes through the same writer, and its labels through the same checks."""
    monkeypatch.setattr(data, "BENCHMARK", {"target_test": ("target", 60), "unconstrained": (None, 10)})
    for _ in range(2): data.main(["hands", str(tmp_path), "--side", "40", "--workers", "1"])  # 2nd: no work
    assert every(tmp_path / "target_test").images.shape == (60, 40, 40, 3)
    assert len(data.Dataset(tmp_path / "unconstrained")) == 10
    data.main(["check", str(tmp_path / "target_test")])
    assert "labels: 0 of 60 rows are impossible" in capsys.readouterr().out


def test_half_gaps(tmp_path, monkeypatch):
    """One half of the gap each: the other half's settings are the source's. Rendered where one is asked for."""
    scenery = ("wall", "clouds", "grain", "busy", "shape", "stripes", "limb", "decoys", "floor")
    for domains in data.DOMAINS, data.HUMAN_DOMAINS:
        for name, figure, place in ("figure", "target", "source"), ("scenery", "source", "target"):
            for key, value in domains[name].items():
                assert value == domains[place if key.startswith(scenery) else figure][key], (name, key)
        assert domains["figure"]["skin"] == domains["target"]["skin"] != domains["scenery"]["skin"]
        assert domains["figure"]["wall"] == domains["source"]["wall"] != domains["scenery"]["wall"]
    monkeypatch.setattr(data, "BENCHMARK", {"target_test": ("target", 4)})
    monkeypatch.setattr(data, "HALF_GAPS", {"figure_test": ("figure", 4), "scenery_test": ("scenery", 4)})
    with refused("hands/mine: no data set here"):                          # before anything is rendered
        data.ensure_benchmark([str(tmp_path / "hands/figure_test"), str(tmp_path / "hands/mine")], 0)
    assert not (tmp_path / "hands").exists()
    data.ensure_benchmark([str(tmp_path / "hands/figure_test"), ""], 0)
    assert sorted(path.name for path in (tmp_path / "hands").iterdir()) == ["figure_test", "target_test"]
    assert data.read_meta(tmp_path / "hands/figure_test")["name"] == "hands figure"


def test_show(converted, own, tmp_path):
    for folder in (converted.folder, own):
        data.main(["show", str(folder), str(tmp_path / "sheet.png")])
        assert Image.open(tmp_path / "sheet.png").size in ((1024, 4 * 272), (1024, 2 * 272))
    (own / "keypoints.npy").unlink()
    data.main(["show", str(own), str(tmp_path / "images.png")])
    with refused("could not be written"): data.main(["show", str(own), str(tmp_path / "none/x.png")])


def test_show_draws_the_skeleton_where_the_hand_is(hands, tmp_path):
    """On a black picture, the sheet's finger colours are found at the projected tips."""
    folder, K = tmp_path / "black", hands["intrinsics"].copy()
    folder.mkdir()
    np.save(folder / "images.npy", np.zeros((N, SIDE, SIDE, 3), np.uint8))
    np.save(folder / "keypoints.npy", hands["keypoints"])
    np.save(folder / "intrinsics.npy", K)
    (folder / "meta.json").write_text(json.dumps(META | data.HAND | {"format": 1}))
    picture = np.asarray(data.draw_sample(every_but_masks(folder), 0, 448)).astype(int)
    for tip in range(4, 21, 4):
        u, v = np.round(uv_of(hands["keypoints"], K)[0, tip] * 2 + 0.5).astype(int)
        if not (8 < u < 440 and 8 < v < 440): continue
        near = picture[v - 2:v + 3, u - 2:u + 3].reshape(-1, 3)
        assert (np.abs(near - data.COLOURS[tip // 4 - 1]).sum(-1) < 20).any()


def every_but_masks(folder: Path) -> data.Dataset:
    return data.Dataset(folder, "keypoints", "intrinsics")


# ==========================================================================================================
# Batches and augmentation
# ==========================================================================================================
def test_batch_rows():
    steps = [data.batch_rows(10, 0, "order", step, 4) for step in range(15)]   # 6 epochs of 10 rows
    epochs = np.concatenate(steps).reshape(6, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert np.array_equal(data.batch_rows(10, 0, "order", 11, 4), steps[11])   # no state: resumes anywhere
    for other in ((1, "order"), (0, "other order")):
        assert not np.array_equal([data.batch_rows(10, *other, step, 4) for step in range(15)], steps)
    assert sorted(data.batch_rows(3, 0, "order", 0, 9)) == 3 * [0] + 3 * [1] + 3 * [2]  # three epochs in one


def test_rows_for_a_gpu_are_read_into_pinned_memory(dots, monkeypatch):
    """The same rows, in their order; the copy does not wait."""
    rows, asked, empty = np.array([7, 0, 7, 3]), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, dtype: asked.append(pin_memory) or
                        empty(*size, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: asked.append(non_blocking) or x)
    for array in (dots.images, dots.masks):
        x = data.read_rows(array, rows, torch.device("cuda"))
        assert x.dtype == torch.uint8 and torch.equal(x, torch.from_numpy(array[rows]))
    assert asked == [True] * 4


def test_rows_that_come_next_are_announced(dots, monkeypatch):
    """The pages of each record, from the start of the first one to its end; only of mapped files."""
    asked: list[tuple] = []

    class Spy(np.memmap):
        base = SimpleNamespace(madvise=lambda *call: asked.append(call))
    spied, size = dots.images.view(Spy), dots.images[0].nbytes
    monkeypatch.setattr(dots, "images", spied)
    data.announce(dots.images, np.array([11, 0, 5]))
    for row, (advice, start, length) in zip((11, 0, 5), asked, strict=True):
        first = spied.offset + row * size
        assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        assert first - mmap.PAGESIZE < start <= first and start + length == first + size
    data.load_images(dots, np.array([2]), torch.device("cpu"), np.array(dots.masks))
    data.announce(data.CheckedArray(spied, np.zeros(len(spied)), dots.folder), np.array([1]))
    assert len(asked) == 5                                         # of masks that are not in a file: nothing
    mapped = data.open_array(dots.folder / "masks.npy", np.uint8, dots.masks.shape)
    data.announce(mapped, np.arange(len(mapped)))                  # the system takes each of them


@pytest.mark.parametrize("prefetch", [data.prefetch, data.in_a_thread])
def test_prefetch(prefetch):
    """Without a thread, as on a CPU, and with one: the same batches, and their errors come through."""
    workers = []

    def counted():
        for i in range(7):
            workers.append(threading.current_thread())
            yield i
    assert list(prefetch(counted(), torch.device("cpu"))) == list(range(7))
    assert (workers[0] is threading.main_thread()) == (prefetch is data.prefetch)

    def failing():
        yield 1
        raise InputError("no such row")
    with refused("no such row"): list(prefetch(failing(), torch.device("cpu")))


def test_prefetch_ends_with_its_reader():
    """A loop that stops early leaves no thread at work: one inside torch would abort a process that exits."""
    made, before = [], threading.active_count()
    batches = data.in_a_thread((made.append(i) or i for i in range(10 ** 6)), torch.device("cpu"))
    assert next(batches) == 0
    batches.close()
    assert threading.active_count() == before and len(made) < 10


def test_augmentation_ranges():
    p = data.augmentation(np.random.default_rng(0), 4000, 0.4, gain=0.3)
    low, high = p.min(axis=0), p.max(axis=0)
    wide = [np.pi / 6, 0.1, 0.1, 1.25, 1.4, 1.4, 1.4, 1.3, 1.3, 1.3]
    assert np.allclose(high, wide, atol=0.01)
    assert np.allclose(low, [-np.pi / 6, -0.1, -0.1, 0.8] + 3 * [0.6] + 3 * [0.7], atol=0.01)
    assert np.array_equal(data.augmentation(np.random.default_rng(5), 3, 0)[:, 4:], np.ones((3, 6)))


@pytest.fixture
def dots(tmp_path) -> data.Dataset:
    """Each picture and mask shows one soft dot, at the first keypoint's projection."""
    rng, n, H = np.random.default_rng(3), 12, 100
    K = np.float32([[[300, 0, 52.25], [0, 290, 47.5], [0, 0, 1]]] * n)
    keypoints = np.float32(rng.uniform(-30, 30, (n, 2, 3)) + (0, 0, 500))
    u, v = np.meshgrid(np.arange(H), np.arange(H))
    centre = uv_of(keypoints, K)[:, 0, :, None, None]                          # (n, 2, 1, 1) px
    square = (u - centre[:, 0]) ** 2 + (v - centre[:, 1]) ** 2                 # (n, H, H)
    dot = np.uint8(np.round(255 * np.exp(-square / (2 * 2.5 ** 2))))
    np.save(tmp_path / "images.npy", np.repeat(dot[..., None], 3, axis=-1))
    np.save(tmp_path / "masks.npy", dot)
    np.save(tmp_path / "keypoints.npy", keypoints)
    np.save(tmp_path / "intrinsics.npy", K)
    (tmp_path / "meta.json").write_text(json.dumps(META | {"format": 1, "margin": 1.25}))
    return every(tmp_path)


def centroids(x: torch.Tensor) -> torch.Tensor:
    """Centre of brightness of x (B, H, W), (B, 2) px."""
    H = x.shape[-1]
    u = torch.arange(H, dtype=torch.float32)
    return torch.stack([(x * u).sum((1, 2)), (x * u[:, None]).sum((1, 2))], -1) / x.sum((1, 2))[:, None]


def test_image_mask_and_labels_move_together(dots):
    rows, parameters = np.arange(12), data.augmentation(np.random.default_rng(0), 12, 0)
    x, m, A = data.crops(dots, rows, parameters, 64, CPU, dots.masks)
    uv, _ = data.labels_of(dots, rows, A)
    inside = ((uv[:, 0] > 8) & (uv[:, 0] < 55)).all(dim=1)
    assert inside.sum() >= 8 and x.shape == (12, 3, 64, 64) and m.shape == (12, 1, 64, 64)

    def error(where, points):
        return (centroids(where)[inside] - points[inside, 0]).norm(dim=-1).max()
    assert error(x[:, 0], uv) < 0.06 and error(m[:, 0], uv) < 0.06
    for column, change in ((0, np.negative), (1, np.negative), (2, np.negative), (3, np.reciprocal)):
        wrong = parameters.copy()  # turned, moved, zoomed the other way
        wrong[:, column] = change(wrong[:, column])
        A = data.crop_transform(torch.from_numpy(wrong), 100, 1.25, 64)
        assert error(x[:, 0], data.labels_of(dots, rows, A)[0]) > 0.5


@pytest.mark.parametrize("column, value, expected", [
    (0, 0.0, [[39.5, 39.5], [49.5, 39.5]]),         # as it is: the centre, and 10 px to the right of it
    (0, np.pi / 2, [[39.5, 39.5], [39.5, 49.5]]),   # a right angle clockwise: 10 px below it
    (1, 0.1, [[47.5, 39.5], [57.5, 39.5]]),         # 10 % of 80 px to the right
    (2, 0.1, [[39.5, 47.5], [49.5, 47.5]]),         # 10 % down
    (3, 2.0, [[39.5, 39.5], [59.5, 39.5]])])        # twice as large
def test_parameters_mean_what_they_say(column, value, expected):
    p, points = data.no_augmentation(1), torch.tensor([[[49.5, 49.5], [59.5, 49.5]]])
    p[:, column] = value
    found = data.transform_points(data.crop_transform(torch.from_numpy(p), 100, 1.25, 80), points)[0]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)


def test_no_augmentation_is_the_centre_crop(own):
    dataset = every(own)
    x, m, _ = data.crops(dataset, np.arange(6), data.no_augmentation(6), 40, CPU, dataset.masks)
    assert np.allclose(255 * x.permute(0, 2, 3, 1).numpy(), dataset.images[:][:, 5:45, 5:45], atol=0.01)
    assert np.allclose(255 * m[:, 0].numpy(), dataset.masks[:][:, 5:45, 5:45], atol=0.01)


def test_warp_repeats_the_edge():
    image = torch.rand(1, 3, 20, 20)
    A = torch.tensor([[[1.0, 0, 10], [0, 1, 10]]])                             # 10 px to the right and down
    moved = data.warp(image, A, 40)
    assert torch.allclose(moved[:, :, 10:30, 10:30], image, atol=1e-5)
    assert torch.allclose(moved[:, :, :10, :10], image[:, :, :1, :1].expand(-1, -1, 10, 10), atol=1e-5)
    assert torch.allclose(moved[:, :, 15, 30:], image[:, :, 5, -1:].expand(-1, -1, 10), atol=1e-5)


def test_transformed_intrinsics_project_to_transformed_points(dots):
    rows = np.arange(12)
    parameters = torch.from_numpy(data.augmentation(np.random.default_rng(1), 12, 0))
    A = data.crop_transform(parameters, 100, 1.25, 64)
    keypoints, K = (torch.from_numpy(array[rows]) for array in (dots.keypoints, dots.intrinsics))
    moved = data.transform_points(A, project(keypoints, K))
    assert torch.allclose(project(keypoints, data.transform_intrinsics(A, K)), moved, atol=1e-3)
    assert not torch.allclose(project(keypoints, K), moved, atol=1)


def test_colour_jitter():
    x, p = torch.rand(2, 3, 8, 8) * 0.5 + 0.2, torch.from_numpy(data.no_augmentation(2))
    grey, mean = x.mean(dim=1, keepdim=True).expand_as(x), x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x)
    green = x * torch.tensor([1, 1.1, 1]).view(3, 1, 1)
    cases = [(4, 1.0, x), (4, 1.2, 1.2 * x), (5, 0.0, mean), (5, 0.5, (x + mean) / 2), (6, 0.0, grey),
             (6, 0.5, (x + grey) / 2), (8, 1.1, green), (4, 9.0, torch.ones_like(x))]
    for column, value, expected in cases:
        q = p.clone()
        q[:, column] = value
        assert torch.allclose(data.colour_jitter(x, q), expected, atol=1e-6), data.PARAMETERS[column]
    p[:, 4], p[:, 5], p[:, 6], p[:, 8] = 1.2, 0.5, 0.5, 1.1                    # in this order
    mean = (1.2 * green).mean(dim=(1, 2, 3), keepdim=True)
    contrasted = (1.2 * green + mean) / 2
    expected = (contrasted + contrasted.mean(dim=1, keepdim=True)) / 2
    assert torch.allclose(data.colour_jitter(x, p), expected, atol=1e-6)


def test_normalise_and_back():
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(data.denormalise(data.normalise(x)), x, atol=1e-6)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    assert torch.allclose(data.normalise(mean), torch.zeros(1), atol=1e-6)
