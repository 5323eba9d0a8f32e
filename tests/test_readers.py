"""What the readers of public data sets share: videos, lens, masks, file formats, conversion.

Every file is written here, small, in the real format: mp4, AVI, MATLAB 5 and 7.3, CDF, pickle, palette PNG.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import test_body_readers
import test_hand_readers
from PIL import Image
from test_body_readers import CLIP

import data
from support import convert as conversion
from support.convert import Sample, body_fault, build_dataset, convert_samples, fault_of, to_uv
from support.folder import HUMAN, HUMAN_JOINTS
from support.readers import _3dhp, formats, freihand, gan, h36m, pan, rhd, surreal
from support.readers.formats import Missing, Video, open_mask
from support.run import lock

# isort: off
from publishers import (
    BODY_READERS, FLAGS, HAND_READERS, MIRROR, SWAP, Rotation, command, contents, cut, refused, scipy_io,
    write_cdf, write_h5, write_pickle, write_video)
# isort: on

K = np.array([[300.0, 0, 119.5], [0, 300, 111.5], [0, 0, 1]])  # of 240 x 224 px
POSE = np.float64([  # mm, HUMAN, facing the camera: walking, right knee and left elbow bent
    (0, 0, 0), (-130, 0, 0), (-130, 420, -120), (-130, 820, 90), (130, 0, 0), (130, 440, 20),
    (130, 860, 60), (0, -230, 10), (0, -480, 0), (0, -580, -40), (0, -690, 0), (150, -450, 0),
    (220, -190, 40), (220, -90, -190), (-150, -450, 0), (-220, -170, 0), (-240, 80, -20)])


# ==== What all readers share ==============================================================================
READERS = HAND_READERS | BODY_READERS
NO_FOLDER = {"no folder": (shutil.rmtree, "missing|not one sample; with -h")}
CASES = [pytest.param(reader, *row, id=f"{reader.__name__[16:]} {what}")
         for reader, table in (test_hand_readers.CASES | test_body_readers.CASES).items()
         for what, row in (table | NO_FOLDER).items()]


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 / 0: the knuckle of relative joints
@pytest.mark.parametrize("reader, put_in, message", CASES)
def test_mistakes_are_told(reader, put_in, message, request, tmp_path):
    """Converting a copy of the publisher's files with the mistake in ends in one line with the message."""
    copy = Path(shutil.copytree(request.getfixturevalue(READERS[reader]), tmp_path / "copy"))
    put_in(copy)
    with refused(message) as caught:
        command(reader, copy, tmp_path / "out", *FLAGS[reader])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader, name, line", [
    (freihand, "training/rgb/00000007.jpg", "00000007.jpg: broken picture"),
    (rhd, "training/mask/00003.png", "color/00003.png: mask: .*/00003.png: broken mask"),
    (pan, "171204_pose3/hdHand3d/handRecon3D_hd00000003.json",
     "00_0._00000003.jpg: labels: .*hd00000003.json: broken file of labels"),
    (gan, "data/withObject/0002/0002_joint_pos_global.txt",
     "0002_color_composed.png: labels: .*pos_global.txt: broken file of labels: .* not 63"),
    (h36m, "S9/Videos/Posing.58860488.mp4", "Posing.58860488.mp4: broken video"),
    (_3dhp, "S1/Seq1/imageSequence/video_0.avi", "avi frame .: frame: the video has 1"),
    (surreal, f"{CLIP}_info.mat", "c0001.mp4: labels: .*_info.mat: (broken|has no)"),
    (surreal, f"{CLIP}_segm.mat", "01_01_c0001_segm.mat: (broken|has no)")])
def test_one_damaged_file_does_not_end_a_conversion(reader, name, line, request, tmp_path, monkeypatch):
    """Its samples are left out, counted and named; the others are converted."""
    monkeypatch.setattr(reader, "MAX_SKIPPED", 0.6, raising=False)  # of so few samples
    copy = Path(shutil.copytree(request.getfixturevalue(READERS[reader]), tmp_path / "copy"))
    whole = command(reader, copy, tmp_path / "whole", *FLAGS[reader], side=32)
    cut(copy / name)
    part = command(reader, copy, tmp_path / "part", *FLAGS[reader], side=32)
    assert 0 < len(part) < len(whole) and part.meta["skipped"]
    assert all(re.search(line, text) for text in part.meta["skipped"])


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__[16:])
def test_a_mac_s_own_files_are_ignored(reader, request, tmp_path):
    root = request.getfixturevalue(READERS[reader])
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    for path in [copy, *copy.rglob("*")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        if path.is_dir():
            (path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    before = command(reader, root, tmp_path / "before", *FLAGS[reader], side=32)
    after = command(reader, copy, tmp_path / "after", *FLAGS[reader], side=32)
    assert after.fingerprint == before.fingerprint and after.meta["skipped"] == []


@pytest.mark.parametrize("line, message", [
    ("pan --stride 0", "--stride 1"), ("freihand --side 3", "--side is 16"),
    ("freihand --workers -1", "--workers 0"), ("freihand --versions 11", "--versions '11'"),
    ("3dhp --cameras all", "--cameras"), ("3dhp --cameras 0,0", "each once"),
    ("surreal --stride 5", "goes with --frames all")])
def test_impossible_values_are_refused(line, message, tmp_path):
    name, *flags = line.split()
    with refused(message):
        data.main([name, str(tmp_path), str(tmp_path / "out"), *flags])


# ==== Videos ==============================================================================================
BITS = 2 ** np.arange(6)


def numbered(count: int) -> list[np.ndarray]:
    """Frame i, 96 x 48 px, bears its number as six stripes, black or white for each binary digit."""
    rows = [np.repeat(np.where(i & BITS, 220, 30).astype(np.uint8), 16) for i in range(count)]
    return [np.tile(row[None, :, None], (48, 1, 3)) for row in rows]


def number_of(frame: np.ndarray) -> int:
    return int(BITS @ (frame.reshape(48, 6, 16, 3).mean(axis=(0, 2, 3)) > 125))


VIDEOS = {"mp4": ("a.mp4", "libx264", {}), "one keyframe": ("b.mp4", "libx264", {"g": "999"}),
          "open groups": ("c.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12"}),
          "mpeg4 avi": ("d.avi", "mpeg4", {"bf": "0"}),
          "mpeg4 avi with B-frames": ("f.avi", "mpeg4", {"bf": "2"})}


@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_of_a_video_are_exact(kind, tmp_path):
    """In order, backwards, with strides, at random: always the picture of the frame's number."""
    name, codec, options = VIDEOS[kind]
    write_video(tmp_path / name, numbered(50), codec, **options)
    video = Video(tmp_path / name)
    first = [video.frame(i) for i in range(50)]
    assert video.count == 50 and [number_of(frame) for frame in first] == list(range(50))
    for i in (*range(49, -1, -1), *range(0, 50, 7), *np.random.default_rng(0).integers(0, 50, 60)):
        assert np.array_equal(video.frame(i), first[i]), i
    with pytest.raises(Missing, match="frame: the video has 50"):
        video.frame(50)


# ==== One sample: the lens, masks (left hands: STB, RHD, PAN, GAN) ========================================
LENS = np.array([-0.4, 0.3, 0.01, -0.008, 0.05])


def body(image: str, **fields) -> Sample:
    """POSE, 2.4 m in front of the camera K."""
    return Sample(image, POSE + [60, -80, 2400], K, **fields)


def drawn(sample: Sample = None, size=(240, 224), sigma: float = 1.3) -> np.ndarray:
    """A soft white dot where the lens shows each joint, on grey: (H, W, 3) uint8."""
    sample = sample or body("")
    uv = to_uv(sample.keypoints, sample.intrinsics, sample.distortion)
    bells = [np.exp(-(np.arange(n) - uv[:, i, None]) ** 2 / (2 * sigma ** 2)) for i, n in enumerate(size)]
    dots = [np.outer(down, along) for along, down in zip(*bells, strict=True)]
    return np.repeat(np.uint8(np.round(60 + 190 * np.max(dots, axis=0)))[..., None], 3, axis=-1)


def convert(root: Path, *job):
    return convert_samples(root, 128, HUMAN, list(job))


def apart(image: np.ndarray, keypoints, intrinsics, radius: int = 4) -> np.ndarray:
    """Distance (n,) px from each projected joint to the centre of the white dot around it; joints alone."""
    uv = to_uv(np.float64(keypoints), np.float64(intrinsics))
    alone = np.sort(np.linalg.norm(uv[:, None] - uv, axis=-1))[:, 1] > 2 * radius + 1
    found = []
    for x, y in uv[alone]:
        u, v = np.round([x, y]).astype(int)
        near = image[v - radius:v + radius + 1, u - radius:u + radius + 1, 0].astype(float)
        near = np.maximum(near - near.min() - 25, 0)
        ticks = np.arange(-radius, radius + 1)
        centre = np.array([(near * ticks).sum(), (near * ticks[:, None]).sum()]) / max(near.sum(), 1e-9)
        found.append(np.linalg.norm(centre + (u - x, v - y)))
    assert len(found) >= 6
    return np.array(found)


def zoomed(times: int) -> np.ndarray:
    """K of a picture `times` as large."""
    zoom = np.diag([times, times, 1.0])
    zoom[:2, 2] = (times - 1) / 2
    return zoom @ K


@pytest.mark.parametrize("shrink", [1, 4])
def test_lens_distortion_is_undone(shrink, tmp_path):
    """The stored crop is a pinhole picture, also when it is smaller than its part of the picture."""
    sample = body("a.png", distortion=LENS, mask="m.png")._replace(intrinsics=zoomed(shrink))
    sample = sample._replace(uv=to_uv(sample.keypoints, sample.intrinsics, LENS))
    picture = drawn(sample, (240 * shrink, 224 * shrink), 1.3 * shrink)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(np.uint8(255) * (picture[..., 0] > 150)).save(tmp_path / "m.png")
    arrays, _ = convert(tmp_path, sample)
    keypoints, intrinsics = arrays["keypoints"][0], arrays["intrinsics"][0]
    assert apart(arrays["images"][0], keypoints, intrinsics).max() < 0.3
    assert apart(arrays["masks"][0][..., None], keypoints, intrinsics).max() < 0.45
    ignored, _ = convert(tmp_path, sample._replace(distortion=None, uv=None))
    assert apart(ignored["images"][0], ignored["keypoints"][0], ignored["intrinsics"][0]).max() > 1
    _, (reason,) = convert(tmp_path, sample._replace(distortion=None))
    assert "px from the publisher's 2D labels" in reason


def test_a_frame_without_mask_is_left_out(tmp_path):
    """The cell of a MATLAB 7.3 file holds an empty matrix, or ends too early."""
    labels = np.random.default_rng(0).integers(0, 4, (224, 240), dtype=np.uint8)
    write_h5(tmp_path / "m.mat", {"Masks": [labels, None]})
    Image.fromarray(drawn()).save(tmp_path / "a.png")
    _, skipped = convert(tmp_path, *(body("a.png", mask="m.mat", mask_key=i, foreground=(0, 3))
                                     for i in range(3)))
    assert skipped == ["a.png: mask: m.mat has none for this frame"] * 2
    assert np.array_equal(open_mask(tmp_path / "m.mat", (2, 2), 0), labels == 2)


# ==== The checks on labels; those on hands are in test_hand_readers.py ====================================
def bent(knee: float, elbow: float) -> np.ndarray:
    """POSE with both knees and both elbows bent by these angles (degrees)."""
    pose = POSE.copy()
    for hip, shoulder in ((1, 14), (4, 11)):
        for first, angle, sign in ((hip, knee, 1), (shoulder, elbow, -1)):
            a = np.radians(angle) / 2
            pose[first + 1] = pose[first] + np.array([0, np.cos(a), -sign * np.sin(a)]) * 420
            pose[first + 2] = pose[first + 1] + np.array([0, np.cos(a), sign * np.sin(a)]) * 420
    return pose


def turned(pose: np.ndarray, seed: int) -> np.ndarray:
    return pose @ Rotation.random(random_state=seed).as_matrix()


BODY_SLIPS = {"metres": (lambda k: k / 1000, "bone: 0.4.* another unit"),
              "centimetres": (lambda k: k / 10, "bone: 4.* another unit"),
              "left and right": (lambda k: k[SWAP], "handedness"),
              "mirror image": (lambda k: k * MIRROR, "handedness"),
              "legs exchanged": (lambda k: k[SWAP[:7] + list(range(7, 17))], "order: shoulders and hips"),
              "arms exchanged": (lambda k: k[list(range(7)) + SWAP[7:]], "order: shoulders and hips")}


@pytest.mark.parametrize("slip", BODY_SLIPS)
@pytest.mark.parametrize("pose", [POSE, bent(90, 60), bent(30, 0), bent(0, 80), bent(140, 150)],
                         ids=["walking", "sitting", "knees", "elbows", "crouching"])
def test_body_slips_are_caught(slip, pose):
    change, reason = BODY_SLIPS[slip]
    for seed in range(5):
        assert body_fault(turned(pose, seed)) is None
        fault = body_fault(turned(change(pose), seed))
        assert fault and re.match(reason, fault), fault


def test_straight_limbs_do_not_tell():
    for pose in (bent(0, 0), bent(5, 8), bent(-5, -8), np.full((17, 3), np.nan)):
        assert body_fault(pose) is None and body_fault(pose * MIRROR) is None


def test_a_skeleton_is_judged_by_its_own_rules():
    """Seventeen joints of other names are nobody's body."""
    right, seen = body(""), np.diag([-1, 1, 1.0])
    wrong = right._replace(keypoints=right.keypoints * MIRROR, intrinsics=K @ seen)  # where `right` is seen
    assert "handedness" in fault_of(HUMAN_JOINTS, wrong, (240, 224), 224)
    assert fault_of([f"joint {i}" for i in range(17)], wrong, (240, 224), 224) is None


# ==== Files of labels =====================================================================================
def test_arrays_come_back_from_every_format(tmp_path):
    """And a broken, missing or other file is one line that names it."""
    pose = np.random.default_rng(0).random((1, 5, 96)).astype(np.float32)
    scipy_io.savemat(tmp_path / "a.mat", {"pose": pose, "more": np.eye(3)}, do_compression=True)
    write_cdf(tmp_path / "a.cdf", pose=pose)
    write_h5(tmp_path / "b.mat", {"pose": pose.T, "more": np.eye(3)})
    write_pickle(tmp_path / "a.pkl", {"pose": pose})
    for read, name in ((formats.read_mat, "a.mat"), (formats.read_h5, "b.mat"),
                       (lambda *a: {"pose": formats.read_cdf(*a)}, "a.cdf"),
                       (lambda path, _: formats.read_pickle(path), "a.pkl")):
        path = tmp_path / name
        assert np.array_equal(read(path, "pose")["pose"], pose)
        if name != "a.pkl":
            with refused(f"{name}: broken .*annot2"):
                read(path, "annot2")
        content = path.read_bytes()
        for bad in (content[:len(content) // 2], b"", b"<html>404</html>" * 9):
            path.write_bytes(bad)
            with refused(f"{name}: broken") as caught:
                read(path, "pose")
            assert "\n" not in str(caught.value)
        path.unlink()
        with refused(f"{name}: missing; give a whole"):
            read(path, "pose")


def test_a_missing_library_is_an_error_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with refused("a.mat: to read it, first: pip install scipy"):
        formats.read_mat(tmp_path / "a.mat", "pose")


# ==== Conversion: interruption, workers, the limit on samples left out ====================================
META = {"name": "n", "split": "", "joints": ["a", "b"], "bones": [[0, 1]], "root": 0, "depth_range": 300}


def small_work(job: int) -> tuple[dict, list]:
    """0 to 4 rows of 5 x 5 px, told from each other by their numbers; now and then a sample left out."""
    count, rng = (3, 4, 0, 1)[job % 4], np.random.default_rng(job)
    skipped = [f"{job}.jpg: bone: too long"] if job % 20 == 2 else []
    return {"images": rng.integers(0, 255, (count, 5, 5, 3), dtype=np.uint8)} if count else {}, skipped


def build_small(folder: Path, workers: int = 1, work=small_work, jobs=range(60)) -> None:
    build_dataset(folder, META, jobs, 120, work, workers)


def test_finished_shards_are_not_made_again(tmp_path):
    """The jobs done before an interruption, and a job whose samples have other names since."""
    done = []

    def work(job):
        done.append(job)
        if len(done) == 30:
            raise KeyboardInterrupt
        return small_work(int(job))
    with pytest.raises(KeyboardInterrupt):
        build_small(tmp_path / "set", 1, work, map(str, range(40)))
    with refused("set.part: another process writes here"), lock(tmp_path / "set.part"):
        build_small(tmp_path / "set")
    build_small(tmp_path / "set", 1, work, ["00", *map(str, range(1, 40))])
    assert done == [*map(str, range(30)), "00", *map(str, range(29, 40))]
    with refused("set: exists; remove it to make it again"):
        build_small(tmp_path / "set")


def test_a_full_disk_is_an_error_line_and_the_conversion_goes_on_later(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    for where, name in ((conversion.np, "savez"), (conversion.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            with refused("set.part.*could not be written.*No space"):
                build_small(tmp_path / "set")
    build_small(tmp_path / "set")
    build_small(tmp_path / "other/set")
    assert contents(tmp_path / "set") == contents(tmp_path / "other/set")


def test_the_limit_on_samples_left_out(tmp_path):
    def build(name, jobs, out, **more):
        """Ten samples per job, of which out(job) are left out, all but one for the same reason."""
        def work(job):
            reasons = ["order: tip first?", *9 * ["unit: metres?"]][:out(job)]
            lines = [f"{job}-{i}.jpg: {reason}" for i, reason in enumerate(reasons)]
            left = 10 - len(lines)
            return {"images": np.zeros((left, 4, 4, 3), np.uint8)} if left else {}, lines
        build_dataset(tmp_path / name, META, jobs, 10 ** 4, work, 1, **more)
    seen = []
    with refused("60 of 200 samples left out, 40 .*for 'unit' .0-1.jpg: unit: metres"):
        build("early", (seen.append(job) or job for job in range(10 ** 4)), lambda _: 3)
    assert len(seen) == 20  # not after 10,000
    with refused("30 of 30"):
        build("none", range(3), lambda _: 10, max_skipped=1.0)
    with refused("not one sample"):
        build("nothing", [], lambda _: 3)
    build("fine", range(20), lambda job: job == 0)  # 1 of 200
    assert json.loads((tmp_path / "fine/meta.json").read_text())["skipped"] == ["0-0.jpg: order: tip first?"]
