"""What the readers of public data sets share: videos, masks, lens, left hands, file formats, streaming.

Every file is written here, small, in the real format (mp4, AVI, MATLAB 5 and 7.3, CDF, pickle, palette PNG).
"""
import itertools
import os
import pickle
import re
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import Interruption, contents, refused

import data
from udapose import random_generator

av, h5py = pytest.importorskip("av"), pytest.importorskip("h5py")
io_of_scipy, cdfwrite = pytest.importorskip("scipy.io"), pytest.importorskip("cdflib.cdfwrite")

K = np.array([[300.0, 0, 119.5], [0, 300, 111.5], [0, 0, 1]])                 # of 240 x 224 px
POSE = np.float64([  # mm, HUMAN, facing the camera: walking, right knee and left elbow bent
    (0, 0, 0), (-130, 0, 0), (-130, 420, -120), (-130, 820, 90), (130, 0, 0), (130, 440, 20),
    (130, 860, 60), (0, -230, 10), (0, -480, 0), (0, -580, -40), (0, -690, 0), (150, -450, 0),
    (220, -190, 40), (220, -90, -190), (-150, -450, 0), (-220, -170, 0), (-240, 80, -20)])
SWAP = [0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 11, 12, 13]             # left and right exchanged


# ==========================================================================================================
# Videos
# ==========================================================================================================
def write_video(path: Path, frames, codec: str = "libx264", file: dict = {}, **options) -> None:
    """Frames (H, W, 3) uint8 as a video with keyframes every 12 and B-frames between."""
    options = {"g": "12", "bf": "3"} | options
    with av.open(str(path), "w", options=file) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        for i, frame in enumerate(frames):
            if i == 0: stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


BITS = 2 ** np.arange(6)


def numbered(count: int) -> list[np.ndarray]:
    """Frame i, 96 x 48 px, bears its number as six stripes, a black or white one for each binary digit."""
    rows = [np.repeat(np.where(i & BITS, 220, 30).astype(np.uint8), 16) for i in range(count)]
    return [np.tile(row[None, :, None], (48, 1, 3)) for row in rows]


def number_of(frame: np.ndarray) -> int:
    return int(BITS @ (frame.reshape(48, 6, 16, 3).mean(axis=(0, 2, 3)) > 125))


VIDEOS = {"mp4": ("a.mp4", "libx264", {}), "one keyframe": ("b.mp4", "libx264", {"g": "999"}),
          "open groups": ("c.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12"}),
          "mpeg4 avi": ("d.avi", "mpeg4", {"bf": "0"}), "h264 avi": ("e.avi", "libx264", {}),
          "mpeg4 avi with B-frames": ("f.avi", "mpeg4", {"bf": "2"})}


@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_of_a_video_are_exact(kind, tmp_path):
    """In order, backwards, with strides, at random: always the same picture, that of the frame's number."""
    name, codec, options = VIDEOS[kind]
    write_video(tmp_path / name, numbered(50), codec, **options)
    video = data.Video(tmp_path / name)
    assert video.count == 50
    first = [video.frame(i) for i in range(50)]
    assert [number_of(frame) for frame in first] == list(range(50))
    places = [*range(49, -1, -1), *range(0, 50, 7), *np.random.default_rng(0).integers(0, 50, 60)]
    for i in places: assert np.array_equal(video.frame(i), first[i]), i
    with pytest.raises(data.Missing, match="frame: the video has 50"): video.frame(50)


def test_frames_in_order_are_decoded_once(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(50))
    video = data.Video(tmp_path / "a.mp4")
    seeks, container = [], video.container

    class Counting:
        def seek(self, *a, **k): seeks.append(a); return container.seek(*a, **k)
        def decode(self, *a): return container.decode(*a)
    video.container = Counting()
    for i in range(0, 50): video.frame(i)
    assert len(seeks) == 1
    for i in range(0, 50, 12): video.frame(i)                                 # from a keyframe to a keyframe
    assert len(seeks) == 6
    for i in (48, 48, 49, 49): video.frame(i)                                 # one frame, several hands
    assert len(seeks) == 6


def test_a_broken_video_is_an_error_line(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(50))
    write_video(tmp_path / "b.mp4", numbered(50), file={"movflags": "faststart"})    # its index comes first
    a, b = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4"))
    spoilt = bytearray(b)
    spoilt[b.find(b"mdat") + 300::13] = bytes(len(spoilt[b.find(b"mdat") + 300::13]))
    broken = {"half": a[:len(a) // 2], "short": b[:-len(b) // 5], "empty": b"", "text": b"not a video" * 99,
              "spoilt": spoilt}
    for name, content in broken.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with refused(f"{name}.mp4: broken video: "):
            for frame in range(50): read_frame(tmp_path, f"{name}.mp4", frame)
    with refused("short.mp4: .*ends after .* of 50 frames"): read_frame(tmp_path, "short.mp4", 0)
    with refused("none.mp4: missing; give a whole video"): read_frame(tmp_path, "none.mp4", 3)


def read_frame(root: Path, name: str, frame: int) -> np.ndarray:
    return data.open_sample(root, data.Sample(name, frame=frame), 0, 0)[0]


def test_a_frame_beyond_the_end_is_left_out(tmp_path):
    """Pose files are a few frames longer than their videos."""
    write_video(tmp_path / "a.mp4", [drawn()] * 5)
    arrays, skipped = convert(tmp_path, *(body("a.mp4", frame=i) for i in range(7)))
    assert len(arrays["images"]) == 5
    assert skipped == [f"a.mp4 frame {i}: frame: the video has 5" for i in (5, 6)]


# ==========================================================================================================
# One sample: the lens, left hands, masks, small decoding
# ==========================================================================================================
LENS = np.array([-0.4, 0.3, 0.01, -0.008, 0.05])


def body(image: str, **fields) -> data.Sample:
    """POSE, 2.4 m before the camera K."""
    return data.Sample(image, POSE + [60, -80, 2400], K, **fields)


def drawn(sample: data.Sample = body(""), size=(240, 224), sigma: float = 1.3) -> np.ndarray:
    """A soft white dot where the lens shows each joint, on grey: (H, W, 3) uint8."""
    uv = data.to_uv(sample.keypoints, sample.intrinsics, sample.distortion)
    bells = [np.exp(-(np.arange(n) - uv[:, i, None]) ** 2 / (2 * sigma ** 2)) for i, n in enumerate(size)]
    dots = [np.outer(down, along) for along, down in zip(*bells)]
    return np.repeat(np.uint8(np.round(60 + 190 * np.max(dots, axis=0)))[..., None], 3, axis=-1)


def convert(root: Path, *samples, side: int = 128, skeleton=data.HUMAN):
    return data.convert(root, side, skeleton, list(samples))


def apart(image: np.ndarray, keypoints, intrinsics, radius: int = 4) -> np.ndarray:
    """Distance (n,) px from each projected joint to the centre of the white dot around it; joints alone."""
    uv = data.to_uv(np.float64(keypoints), np.float64(intrinsics))
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


def test_the_lens_is_opencv_s():
    """Its documented formula, point by point, and one point by hand."""
    k1, k2, p1, p2, k3 = LENS
    for x, y in np.random.default_rng(0).uniform(-0.6, 0.6, (20, 2)):
        r2 = x ** 2 + y ** 2
        radial = 1 + k1 * r2 + k2 * r2 ** 2 + k3 * r2 ** 3
        expected = (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x ** 2),
                    y * radial + p1 * (r2 + 2 * y ** 2) + 2 * p2 * x * y)
        assert np.allclose(data.distort(np.array([x, y]), LENS), expected, atol=1e-12)
    found = data.to_uv(np.array([[1.0, 0, 2]]), np.diag([100.0, 100, 1]), np.array([0.4, 0, 0.1, 0.2, 0]))
    assert np.allclose(found, [[50 * 1.1 + 100 * 0.2 * 0.75, 100 * 0.1 * 0.25]])


def test_a_crop_does_not_hold_what_the_camera_nearly_touches(tmp_path):
    """A head's top at 1 mm would make the crop kilometres wide, one behind the camera turn it inside out."""
    Image.new("RGB", (240, 224)).save(tmp_path / "a.png")
    far, near, behind = (body("a.png", around=np.array([[60.0, -100, z]])) for z in (2400, 1, -50))
    rows, skipped = convert(tmp_path, far, near, behind)
    assert len(rows["images"]) == 1 and len(skipped) == 2
    assert all("a point less than 100 mm before the camera" in reason for reason in skipped)


@pytest.mark.parametrize("shrink, kind", [(1, "png"), (4, "png"), (4, "jpg")])
def test_lens_distortion_is_undone(shrink, kind, tmp_path):
    """The stored crop is a pinhole picture; also when it is smaller than its part of the picture, and where a
    JPEG is decoded at an eighth for that."""
    zoom = np.diag([shrink, shrink, 1.0])
    zoom[:2, 2] = (shrink - 1) / 2
    sample = body(f"a.{kind}", distortion=LENS, mask="m.png")._replace(intrinsics=zoom @ K)
    sample = sample._replace(uv=data.to_uv(sample.keypoints, sample.intrinsics, LENS))
    picture = drawn(sample, (240 * shrink, 224 * shrink), 1.3 * shrink)
    Image.fromarray(picture).save(tmp_path / f"a.{kind}")
    Image.fromarray(np.uint8(255) * (picture[..., 0] > 150)).save(tmp_path / "m.png")
    arrays, skipped = convert(tmp_path, sample)
    assert not skipped
    keypoints, intrinsics = arrays["keypoints"][0], arrays["intrinsics"][0]
    assert apart(arrays["images"][0], keypoints, intrinsics).max() < 0.3
    assert apart(arrays["masks"][0][..., None], keypoints, intrinsics).max() < 0.45
    ignored, _ = convert(tmp_path, sample._replace(distortion=None, uv=None))
    assert apart(ignored["images"][0], ignored["keypoints"][0], ignored["intrinsics"][0]).max() > 1
    _, (reason,) = convert(tmp_path, sample._replace(distortion=None))
    assert "px from the publisher's 2D labels" in reason


def test_under_a_lens_a_jpeg_decoded_small_is_as_sharp(tmp_path):
    """The lens is undone on two pixels for each of the crop's: with one alone an eighth of this contrast is lost."""
    squares = np.random.default_rng(0).integers(40, 215, (112, 120, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    crops = []
    for kind in ("png", "jpg"):
        Image.fromarray(squares).save(tmp_path / f"a.{kind}", quality=98, subsampling=0)
        sample = body(f"a.{kind}", distortion=LENS)._replace(intrinsics=np.diag([4.0, 4, 1]) @ K)
        crops.append(np.float32(convert(tmp_path, sample)[0]["images"][0]))
    assert np.abs(crops[0] - crops[1]).mean() < 3


def test_a_lens_of_no_effect_changes_nothing(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(picture).save(tmp_path / "a.png")
    plain, _ = convert(tmp_path, body("a.png"), side=64)
    lens, _ = convert(tmp_path, body("a.png", distortion=np.zeros(5)), side=64)
    assert np.abs(plain["images"].astype(int) - lens["images"]).mean() < 6
    assert np.array_equal(plain["intrinsics"], lens["intrinsics"])


@pytest.fixture(scope="module")
def hand() -> dict:
    return data.render("hands", random_generator(0, "a left hand"), "source", 1, 200)


@pytest.mark.parametrize("distortion", [None, LENS / 10])
def test_left_hands_become_right_hands(hand, distortion, tmp_path):
    """A right hand, and its mirror image given as a left one: the rows are the same but for rounding."""
    keypoints, intrinsics = hand["keypoints"][0].astype(float), hand["intrinsics"][0].astype(float)
    Image.fromarray(hand["images"][0]).save(tmp_path / "right.png")
    Image.fromarray(hand["masks"][0]).save(tmp_path / "right_mask.png")
    for name in ("right", "right_mask"):
        mirrored = Image.open(tmp_path / f"{name}.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(tmp_path / f"{name.replace('right', 'left')}.png")
    right = data.Sample("right.png", keypoints, intrinsics, "right_mask.png", distortion=distortion)
    left = data.Sample("left.png", keypoints * [-1, 1, 1], intrinsics.copy(), "left_mask.png", left=True,
                       distortion=distortion if distortion is None else distortion * [1, 1, 1, -1, 1])
    left.intrinsics[0, 2] = 199 - intrinsics[0, 2]
    (a, _), (b, skipped) = (convert(tmp_path, s, skeleton=data.HAND, side=64) for s in (right, left))
    assert not skipped and np.allclose(a["keypoints"], b["keypoints"])
    assert np.allclose(a["intrinsics"], b["intrinsics"], atol=1e-3)
    for name in ("images", "masks"): assert np.abs(a[name].astype(int) - b[name]).max() <= 3, name
    _, (reason,) = convert(tmp_path, left._replace(left=False), skeleton=data.HAND)
    assert "left.png: handedness" in reason
    _, (reason,) = convert(tmp_path, right._replace(left=True), skeleton=data.HAND)
    assert "handedness" in reason


def test_masks_from_palette_pictures(tmp_path):
    """RHD's: an index picture, whose palette says nothing about the labels."""
    values = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 34
    picture = Image.fromarray(values, "P")
    picture.putpalette([255, 255, 255] * 2 + [0, 0, 0] * 32)
    picture.save(tmp_path / "m.png")
    for low, high in ((2, 17), (18, 33), (1, 255), (7, 7)):
        assert np.array_equal(data.open_mask(tmp_path / "m.png", (low, high), None),
                              (values >= low) & (values <= high))


def write_v73(path: Path, masks: list) -> None:
    """A cell 'Masks' (1, F) of (H, W) matrices, as MATLAB 7.3 stores it; None: an empty matrix."""
    with h5py.File(path, "w", userblock_size=512) as file:
        cell = file.create_dataset("Masks", (len(masks), 1), h5py.ref_dtype)
        for i, mask in enumerate(masks):
            stored = np.uint64([0, 0]) if mask is None else np.asarray(mask).T
            item = file.create_dataset(f"#refs#/{i}", data=stored)
            if mask is None: item.attrs["MATLAB_empty"] = np.uint8(1)
            cell[i, 0] = item.ref
    with open(path, "r+b") as file: file.write(b"MATLAB 7.3 MAT-file".ljust(124) + bytes([0, 2, 73, 77]))


@pytest.mark.parametrize("kind", ["v5", "v7.3"])
def test_masks_from_mat_files(kind, tmp_path):
    labels = [np.random.default_rng(i).integers(0, 4, (224, 240), dtype=np.uint8) for i in range(3)]
    if kind == "v5":
        names = [f"segm_{i + 1}" for i in range(3)]
        io_of_scipy.savemat(tmp_path / "m.mat", dict(zip(names, labels)), do_compression=True)
    else:
        write_v73(tmp_path / "m.mat", [*labels, None])
        names = range(3)
    for name, label in zip(names, labels):
        assert np.array_equal(data.open_mask(tmp_path / "m.mat", (1, 255), name), label > 0)
        assert np.array_equal(data.open_mask(tmp_path / "m.mat", (2, 2), name), label == 2)
    Image.fromarray(drawn()).save(tmp_path / "a.png")
    if kind == "v7.3":
        arrays, skipped = convert(tmp_path, *(body("a.png", mask="m.mat", mask_key=i, foreground=(0, 3))
                                              for i in range(6)))
        assert len(arrays["masks"]) == 3 and (arrays["masks"] == 255).all()
        assert skipped == ["a.png: mask: m.mat has none for this frame"] * 3
    else:
        with refused("m.mat: has no variable 'segm_4', but segm_1, segm_2, segm_3"):
            data.open_mask(tmp_path / "m.mat", (1, 255), "segm_4")
    (tmp_path / "m.mat").write_bytes((tmp_path / "m.mat").read_bytes()[:900])
    with refused("m.mat: .*(broken|no variable)"): data.open_mask(tmp_path / "m.mat", (1, 255), names[0])


def test_small_decoding_changes_nothing_but_time(tmp_path, monkeypatch):
    """A large JPEG, decoded at a quarter, gives the same crop as the whole; its size is still checked."""
    zoom = np.diag([4.0, 4, 1])
    zoom[:2, 2] = 1.5
    for size in ((960, 896), (957, 893)):                                     # not divisible by 4 either
        sample = body("a.jpg", size=size, mask="m.png")._replace(intrinsics=zoom @ K)
        picture = drawn(sample, size, 6)
        Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
        Image.fromarray(picture[..., 0]).save(tmp_path / "m.png")
        small, _ = convert(tmp_path, sample, side=200)
        width = data.crop_window(data.to_uv(sample.keypoints, sample.intrinsics), 1.25)[1]
        decoded, own = data.open_picture(tmp_path / "a.jpg", 200, width)
        assert decoded.shape[1] == -(-size[0] // 4) and own == size
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "draft", lambda *_: None)
            whole, _ = convert(tmp_path, sample, side=200)
        for name in ("keypoints", "intrinsics", "masks"): assert np.array_equal(small[name], whole[name])
        assert np.abs(small["images"].astype(int) - whole["images"]).mean() < 2
        assert apart(small["images"][0], small["keypoints"][0], small["intrinsics"][0], 3).max() < 0.1
    with refused("a.jpg: 957 x 893 px, expected 956 x 893"):
        convert(tmp_path, sample._replace(size=(956, 893)))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize("turn, back", [(2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (6, "ROTATE_90"),
                                        (8, "ROTATE_270")])
def test_small_decoding_of_a_turned_picture(kind, turn, back, tmp_path):
    """A picture whose EXIF turns it, of a size not divisible by 8, shows the joints where they are."""
    zoom = np.diag([4.0, 4, 1])
    zoom[:2, 2] = 1.5
    sample = body(f"a.{kind}", size=(953, 889))._replace(intrinsics=zoom @ K)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.fromarray(drawn(sample, (953, 889), 9)).transpose(Image.Transpose[back])
    picture.save(tmp_path / f"a.{kind}", quality=95, exif=exif)
    arrays, skipped = convert(tmp_path, sample, side=90)
    assert not skipped
    assert apart(arrays["images"][0], arrays["keypoints"][0], arrays["intrinsics"][0], 3).max() < 0.15


def test_small_decoding_of_a_narrow_picture(tmp_path):
    """97 px decoded at an eighth are 13 of 8 px each, the last beyond the picture: not of 97 / 13."""
    lean = np.array([[60.0, 0, 48], [0, 300, 299.5], [0, 0, 1]])
    sample = body("a.jpg")._replace(intrinsics=lean)
    pixels = np.random.default_rng(0).integers(0, 256, (76, 13, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for kind in ("jpg", "png"): Image.fromarray(pixels[:600, :97]).save(tmp_path / f"a.{kind}", quality=95)
    jpg, png = (convert(tmp_path, sample._replace(image=name), side=16)[0] for name in ("a.jpg", "a.png"))
    assert data.open_picture(tmp_path / "a.jpg", 16, 150)[0].shape[1] == 13
    assert np.abs(jpg["images"].astype(int) - png["images"]).mean() < 12


# ==========================================================================================================
# The checks on a body
# ==========================================================================================================
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
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return pose @ (q * [np.linalg.det(q), 1, 1])


MIRROR = np.array([-1, 1, 1])
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
        assert data.body_fault(turned(pose, seed)) is None
        fault = data.body_fault(turned(change(pose), seed))
        assert fault and re.match(reason, fault), fault


def test_straight_limbs_do_not_tell():
    for pose in (bent(0, 0), bent(5, 8), bent(-5, -8)):
        assert data.body_fault(pose) is None and data.body_fault(pose * MIRROR) is None
    part = POSE.copy()
    part[[1, 4, 11]] = np.nan
    assert data.body_fault(part) is None and data.body_fault(np.full((17, 3), np.nan)) is None


def test_a_skeleton_is_judged_by_its_own_rules(tmp_path):
    """Seventeen joints of other names are nobody's body; the command line's check goes by the names too."""
    uv, wrong = data.to_uv(body("").keypoints, K), body("").keypoints * MIRROR
    assert "handedness" in data.fault_of(data.HUMAN_JOINTS, wrong, uv, (240, 224))
    assert data.fault_of([f"joint {i}" for i in range(17)], wrong, uv, (240, 224)) is None
    assert data.fault_of(data.HUMAN_JOINTS, wrong, uv, (240, 224), left=True) is None


def test_box_of_a_body(tmp_path):
    Image.fromarray(drawn()).save(tmp_path / "a.png")
    for skeleton in (data.HUMAN, data.HUMAN | {"box": 1.5}):
        arrays, _ = convert(tmp_path, body("a.png"), side=100, skeleton=skeleton)
        uv = data.to_uv(arrays["keypoints"][0], arrays["intrinsics"][0])
        assert np.isclose(np.ptp(uv, axis=0).max(), 100 / 1.25 / skeleton["box"], atol=0.01)


def test_tolerance_and_unlabelled_joints(tmp_path):
    Image.fromarray(drawn()).save(tmp_path / "a.png")
    sample = body("a.png")
    uv = data.to_uv(sample.keypoints, K) + [3, 0]
    uv[5] = np.nan
    _, (reason,) = convert(tmp_path, sample._replace(uv=uv))
    assert "3.0 px from the publisher's 2D labels" in reason
    assert convert(tmp_path, sample._replace(uv=uv, tolerance=3.1))[1] == []
    empty = sample._replace(keypoints=np.full((17, 3), np.nan))
    assert "0 joints have labels" in convert(tmp_path, empty)[1][0]


# ==========================================================================================================
# Files of labels
# ==========================================================================================================
class Malicious:
    def __init__(self, function, *arguments): self.call = function, arguments

    def __reduce__(self): return self.call


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "bad.pkl"
    calls = [(os.system, f"touch {trace}"), (eval, f"open({str(trace)!r}, 'w')"), (open, str(trace), "w"),
             (np.load, "x"), (np.memmap, str(trace), "uint8", "w+", 0, (4,)), (np.save, str(trace), 0),
             (np.fromfile, str(path)), (os.mkdir, str(trace))]
    for protocol, call in itertools.product((0, 2, 4, 5), calls):
        path.write_bytes(pickle.dumps({"xyz": np.zeros(3), 3: [Malicious(*call)]}, protocol))
        with refused("bad.pkl: names .*, no array: refused, nothing of it was run"):
            data.read_pickle_here(path)
        assert not trace.exists()
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")         # a dotted name
    with refused("bad.pkl: names numpy.ndarray.tofile"): data.read_pickle_here(path)
    for name in ("numpy\nencode", "numpy.testing._private.utils\nrunstring", "_codecs\ndecode"):
        path.write_bytes(f"c{name}\n.".encode())
        with refused("bad.pkl: names"): data.read_pickle_here(path)


def test_pickles_of_arrays_are_read(tmp_path):
    path, rng = tmp_path / "good.pkl", np.random.default_rng(0)
    value = {0: {"xyz": rng.random((42, 3)), "K": np.eye(3, dtype=np.float32)}, "genders": ["m", "f"],
             "poses": [rng.random((3, 72)), rng.integers(0, 9, (2, 2))], "text": "é", "raw": b"\xff\x00",
             "scalar": np.float64(2.5), "flags": np.array([True, False]), "none": None, "pair": (1, 2.5),
             "fortran": np.asfortranarray(rng.random((3, 4)))}
    for protocol in range(6):
        path.write_bytes(pickle.dumps(value, protocol))
        found = data.read_pickle_here(path)
        assert list(found) == list(value) and found["raw"] == value["raw"] and found["text"] == "é"
        assert np.array_equal(found[0]["xyz"], value[0]["xyz"]) and found["scalar"] == 2.5
        assert np.array_equal(found["poses"][1], value["poses"][1])
        assert np.array_equal(found["fortran"], value["fortran"])


def python_2_pickle(array: np.ndarray) -> bytes:
    """What Python 2 and numpy 1 wrote, opcode by opcode: str are bytes (U, T), the module is numpy.core."""
    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else \
            b"T" + len(text).to_bytes(4, "little") + text
    shape = b"".join(b"K" + bytes([n]) for n in array.shape)
    dtype = b"cnumpy\ndtype\n" + string(b"f8") + b"K\x00K\x01\x87R(K\x03" + string(b"<") + \
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    state = b"(K\x01(" + shape + b"t" + dtype + b"\x89" + string(array.tobytes()) + b"tb"
    return b"\x80\x02}" + string(b"cam_poses") + made + state + b"s" + b"."


def test_a_pickle_of_python_2_is_read(tmp_path):
    array = np.random.default_rng(0).normal(size=(9, 4, 4))
    content = python_2_pickle(array)
    (tmp_path / "old.pkl").write_bytes(content)
    assert np.array_equal(data.read_pickle_here(tmp_path / "old.pkl")["cam_poses"], array)
    with pytest.raises(UnicodeDecodeError): pickle.loads(content)              # without latin1


def write_cdf(path: Path, **variables) -> None:
    """Variables as Human3.6M stores them: one compressed record."""
    file = cdfwrite.CDF(path, {"Majority": "row_major", "Encoding": 6})
    for name, value in variables.items():
        spec = {"Variable": name, "Data_Type": 44, "Num_Elements": 1, "Rec_Vary": True, "Compress": 6,
                "Dim_Sizes": list(value.shape[1:])}
        file.write_var(spec, var_data=value)
    file.close()


@pytest.fixture
def files(tmp_path):
    """One file of each format, and the array (1, 5, 96) in it."""
    pose = np.random.default_rng(0).random((1, 5, 96)).astype(np.float32)
    io_of_scipy.savemat(tmp_path / "a.mat", {"pose": pose, "more": np.eye(3)}, do_compression=True)
    write_cdf(tmp_path / "a.cdf", Pose=pose)
    with h5py.File(tmp_path / "b.mat", "w", userblock_size=512) as file:
        file["annot3"], file["valid_frame"] = pose.transpose(1, 0, 2), np.ones((5, 1))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"pose": pose}))
    return tmp_path, pose


def test_arrays_come_back_from_every_format(files):
    root, pose = files
    assert np.array_equal(data.read_mat(root / "a.mat", "pose")["pose"], pose)
    assert np.array_equal(data.read_cdf(root / "a.cdf", "Pose"), pose)
    found = data.in_a_process(data.read_h5, root / "b.mat", "annot3", "valid_frame")
    assert np.array_equal(found["annot3"], pose.transpose(1, 0, 2)) and found["valid_frame"].shape == (5, 1)
    for read, name, there in ((data.read_mat, "a.mat", "pose, more"), (data.read_cdf, "a.cdf", "Pose"),
                              (data.read_h5, "b.mat", "annot3, valid_frame")):
        with refused(f"{name}: has no variable 'annot2', but {there}"): read(root / name, "annot2")


def test_broken_files_are_error_lines(files):
    root, _ = files
    for read, name, variable in ((data.read_mat, "a.mat", ["pose"]), (data.read_h5, "b.mat", ["annot3"]),
                                 (data.read_cdf, "a.cdf", ["Pose"]), (data.read_pickle_here, "a.pkl", [])):
        content = (root / name).read_bytes()
        for bad in (content[:len(content) // 2], b"", b"<html>404</html>" * 9, content[::-1]):
            (root / name).write_bytes(bad)
            with refused(f"{name}: (broken|has no variable)") as caught: read(root / name, *variable)
            assert "\n" not in str(caught.value)
        (root / name).unlink()
        with refused(f"{name}: missing; give a whole"): read(root / name, *variable)


def die(path: Path, *_) -> None:
    """As a C library does."""
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_reader_that_dies_is_an_error_line(tmp_path):
    with refused("b.mat: kills the process that reads it"): data.in_a_process(die, tmp_path / "b.mat")


def test_a_missing_library_is_an_error_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with refused("a.mat: to read it, first: pip install scipy"): data.read_mat(tmp_path / "a.mat", "pose")


def test_pinhole_of():
    rng = np.random.default_rng(0)
    points = rng.uniform((-900, -900, 2000), (900, 900, 5000), (200, 3))
    true = np.array([[1145.0, 0, 512.5], [0, 1143.8, 515.2], [0, 0, 1]])
    uv = data.to_uv(points, true)
    uv[7], points[9] = np.nan, np.nan
    assert np.allclose(data.pinhole_of(points, uv), true, atol=1e-6)
    assert np.allclose(data.pinhole_of(points, uv + rng.normal(0, 0.5, uv.shape)), true, atol=1.5)


# ==========================================================================================================
# Streaming
# ==========================================================================================================
def deadly_work(deadly: int, job: list) -> tuple[dict, list]:
    for sample in job:
        if sample.frame == deadly: os._exit(1)
    return {"images": np.zeros((len(job), 4, 4, 3), np.uint8)}, []


META = {"name": "n", "split": "", "joints": [], "bones": [], "root": 0, "depth_range": 1}


def test_a_worker_that_dies_names_its_sample(tmp_path):
    jobs = [[data.Sample("S1/Walking.mp4", frame=4 * i + j) for j in range(4)] for i in range(12)]
    with refused("a worker process died at S1/Walking.mp4 frame 22;"):
        data.build_dataset(tmp_path / "set", META, iter(jobs), 12, partial(deadly_work, 22), 2, 4)
    data.build_dataset(tmp_path / "set", META, iter(jobs), 12, partial(deadly_work, -1), 1, 4)   # mended
    assert len(np.load(tmp_path / "set/images.npy")) == 48


def drawn_video(root: Path, count: int = 70):
    """Stands in READERS: a reader of one drawn video with masks, left out every tenth sample."""
    wrong = POSE[SWAP] + [60, -80, 2400]

    def samples():
        for i in range(count):
            sample = body("a.mp4", frame=i, mask="m.mat", mask_key=i % 3, foreground=(1, 3))
            yield sample._replace(keypoints=wrong) if i % 30 == 9 else sample
    return count + 50, samples()


def test_interrupted_ten_times_and_resumed_with_other_workers(tmp_path, monkeypatch):
    """Ctrl-C at ten random lines, one worker or two: the bytes of one undisturbed conversion."""
    monkeypatch.setattr(data, "SAMPLES_A_JOB", 4)
    monkeypatch.setattr(data.os, "fsync", lambda _: None)
    monkeypatch.setitem(data.READERS, "drawn", (drawn_video, data.HUMAN, 0.1))
    write_video(tmp_path / "a.mp4", [drawn()] * 70)
    write_v73(tmp_path / "m.mat", [np.full((224, 240), i, np.uint8) for i in range(3)])

    def run(out, workers): data.convert_dataset("drawn", str(tmp_path), str(tmp_path / out), 32, workers)
    with Interruption(0) as undisturbed: run("whole/set", 1)
    expected, rng, stops = contents(tmp_path / "whole/set"), np.random.default_rng(0), 0
    assert len(np.load(tmp_path / "whole/set/images.npy")) == 67
    for workers in (1, 1, 1, 1, 1, 2, 1, 1, 1, 1):
        try:
            with Interruption(int(rng.integers(100, undisturbed.seen // 8))): run("cut/set", workers)
        except KeyboardInterrupt: stops += 1
        data.open_video.cache_clear()                                          # as a new process would
    assert stops == 10
    run("cut/set", 1)
    assert contents(tmp_path / "cut/set") == expected


def one_picture(root: Path, count: int = 20000):
    return count, (body("a.png") for _ in range(count))


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's memory")
def test_memory_does_not_grow(tmp_path, monkeypatch):
    """A sample takes 700 bytes at least: a list of them all would be seen."""
    monkeypatch.setattr(data.os, "fsync", lambda _: None)
    monkeypatch.setattr(data, "convert", lambda root, side, skeleton, job: (
        {"images": np.zeros((len(job), side, side, 3), np.uint8)}, []))
    monkeypatch.setitem(data.READERS, "one", (one_picture, data.HUMAN, 0.1))
    before = anonymous_memory()
    most, append = [], data.Writer.append
    monkeypatch.setattr(data.Writer, "append", lambda *a: (append(*a), most.append(anonymous_memory())))
    data.convert_dataset("one", str(tmp_path), str(tmp_path / "set"), 16, 1)
    assert len(most) == 1250 and max(most) - before < 4e6
