"""Readers of FreiHAND, STB, RHD, PAN and GAN: from files in the publisher's own layout to a data set."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from support.convert import hand_fault, projection_fault
from support.folder import Dataset
from support.readers import freihand, gan, pan, rhd, stb
from support.readers.formats import read_pickle
from support.rendering import render
from support.run import random_generator

# isort: off
from publishers import (
    BACKGROUND, GAN_FOLDERS, LITTLE_FIRST, MIRROR, N, PAN_FRAMES, PAN_K, PAN_LENS, PAN_R, PAN_SIZE,
    PAN_T, RHD_K, SEQUENCES, SIDE, STB_FRAMES, STB_SEQUENCES, TIP_FIRST, agrees, assert_sound_hands,
    command, contents, gan_truth, hands_at, mirrored, pan_hands, pan_truth, refused, rhd_hands, rhd_truth,
    scipy_io, stb_hands, stb_raw, stb_truth, uv_of, without, write_numbers, write_pickle)
# isort: on


@pytest.fixture(scope="module")
def freihand_set(freihand_root, tmp_path_factory) -> Dataset:
    return command(freihand, freihand_root, tmp_path_factory.mktemp("converted") / "train")


# ==== The checks of labels ================================================================================
@pytest.mark.parametrize("domain", ["source", "target"])
def test_rendered_hands_pass_and_slips_do_not(domain):
    keypoints = render("hands", random_generator(1, domain), domain, 150, 16)["keypoints"]

    def share(change):
        return np.mean([hand_fault(change(k)) is None for k in keypoints])
    assert share(lambda k: k) == 1
    assert share(lambda k: k * MIRROR) < 0.1 and share(lambda k: k[LITTLE_FIRST]) < 0.4
    assert share(lambda k: k / 10) == share(lambda k: k[TIP_FIRST]) == 0


def test_a_straight_hand_has_no_side():
    flat = np.zeros((21, 3))
    for joint in range(1, 21):
        finger, i = divmod(joint - 1, 4)
        flat[joint] = (25 * finger - 40, -85 - (0, 45, 72, 94)[i], 500 + (0, 0, 3, 5)[i])  # overstretched
    assert hand_fault(flat) is None and hand_fault(flat * MIRROR) is None


def test_projection_fault(hands):
    k, uv = hands["keypoints"][0], uv_of(hands["keypoints"][0], hands["intrinsics"][0])
    size, mask = (SIDE, SIDE), hands["masks"][0] >= 128
    assert projection_fault(k, uv, size, mask, uv + 1) is None
    assert "behind" in projection_fault(k * [1, 1, -1], uv, size)
    assert "box" in projection_fault(k, 100 + uv / 100, size)
    assert "joints have labels" in projection_fault(np.full_like(k, np.nan), uv, size)


# ==== FreiHAND ============================================================================================
def test_freihand(freihand_set, hands, capsys):
    four = (np.float64(np.repeat(hands[name], 4, axis=0)) for name in ("keypoints", "intrinsics"))
    assert_sound_hands(freihand_set, *four, capsys)
    assert freihand_set.meta["split"] == "train"
    outside = np.array(
        [freihand_set.images[i][freihand_set.masks[i] == 0].mean(axis=0) for i in range(4 * N)])
    version = np.abs(outside[:, None] - BACKGROUND).sum(-1).argmin(1)
    assert (version == np.arange(4 * N) % 4).all(), "picture i + n v is sample i with background v"


def overlap(dataset: Dataset, rows, masks: np.ndarray, K: np.ndarray) -> np.ndarray:
    """(n, C) of stored masks with those of pictures (n, C, H, W) bool, which K and an independent warp crop.

    The intrinsics alone say where the crop is.
    """
    A = torch.from_numpy(dataset.intrinsics[rows] @ np.float32(np.linalg.inv(K)))[:, :2]
    true = data.warp(torch.from_numpy(np.float32(masks)), A, SIDE).numpy() >= 0.5
    mine = dataset.masks[rows][:, None] >= 128
    return (mine & true).sum((2, 3)) / (mine | true).sum((2, 3))


def test_freihand_masks_fit(freihand_set, hands):
    for v in range(4):
        exact = hands["masks"][:, None] >= 128
        assert overlap(freihand_set, slice(v, None, 4), exact, hands["intrinsics"]).min() > 0.95


def test_freihand_other_splits_and_versions(freihand_root, freihand_set, tmp_path):
    test = command(freihand, freihand_root, tmp_path / "eval", "--split", "evaluation")
    assert len(test) == N and 0.05 < (test.masks[:] >= 128).mean() < 0.6
    odd = command(freihand, freihand_root, tmp_path / "two", "--versions", "13")
    assert np.array_equal(odd.images, freihand_set.images[np.arange(4 * N) % 2 == 1])


def test_two_workers_write_the_same_bytes(freihand_root, freihand_set, tmp_path, capsys):
    place = [str(freihand_root), str(tmp_path / "two"), "--side", str(SIDE), "--workers"]
    data.main(["freihand", *place, "2"])
    assert contents(tmp_path / "two") == contents(freihand_set.folder)
    (tmp_path / "two.part").mkdir()  # left by a kill after the last rename
    data.main(["freihand", *place, "1"])
    assert "two: converted already" in capsys.readouterr().out and not (tmp_path / "two.part").exists()


def rewrite(name: str, change):
    def apply(root):
        path = root / f"training_{name}.json"
        path.write_text(json.dumps(np.asarray(change(np.array(json.loads(path.read_text())))).tolist()))
    return apply


def mirror_pictures(root: Path) -> None:
    for path in root.glob("training/*/*.jpg"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=95)


FREIHAND_CASES = {
    "millimetres for metres": (rewrite("xyz", lambda k: 1000 * k), "'bone' .*rgb/00000000.jpg: .* unit"),
    "joints from tip to palm": (rewrite("xyz", lambda k: k[:, TIP_FIRST]), "'order'.* tip to palm"),
    "mirrored labels": (rewrite("xyz", lambda k: k * MIRROR), "'handedness'.* mirrored"),
    "mirrored pictures": (mirror_pictures, "'projection'.* flipped"),
    "another camera": (rewrite("K", lambda K: K + [[0, 0, 500], [0, 0, 0], [0, 0, 0]]),
                       "'projection'.* 0 of 21 joints fall on the picture"),
    "mask of another size": (lambda r: Image.new("L", (112, 112)).save(r / "training/mask/00000001.jpg"),
                             "mask/00000001.jpg is 112 x 112 px, not 224 x 224"),
    "missing picture": (without("training/rgb/00000005.jpg"), f"{4 * N - 1} pictures in .*, where 4 x {N}"),
    "short labels": (rewrite("xyz", lambda k: k[:-1]), f"{N - 1} samples in .*, {N} in training_K"),
    "not 21 joints": (rewrite("xyz", lambda k: k[:, :20]), "training_xyz.json: broken JSON array: shape"),
}


# ==== STB =================================================================================================
@pytest.mark.parametrize("flags, kinds", [((), ("BB_left", "BB_right")), (("--camera", "sk"), ("SK_color",))])
def test_stb(stb_root, tmp_path, capsys, flags, kinds):
    test = command(stb, stb_root, tmp_path / f"stb{len(kinds)}", "--split", "test", *flags)
    assert_sound_hands(test, *stb_truth(["B1Counting", "B1Random"], *kinds), capsys)
    train = command(stb, stb_root, tmp_path / "train", *flags)
    agrees(train, *stb_truth(STB_SEQUENCES[2:], *kinds))
    assert train.masks is None


def test_stb_wrist(stb_root):
    """Of the palm that the file holds, both rules, by hand: no check of the conversion could tell them."""
    palm = stb_raw(stb_hands("B1Counting")["BB_left"]).transpose(2, 1, 0)[0, 0]
    hand = stb_hands("B1Counting")["BB_left"][0]
    for rule, wrist in (("ring", 2 * palm - hand[13]), ("middle", 2.2 * palm - 1.2 * hand[9])):
        count, found = stb.read(stb_root, "test", wrist=rule)
        first = next(found)
        assert count == 2 * 2 * STB_FRAMES and first.left
        assert np.allclose(first.keypoints[0], wrist) and not np.allclose(first.keypoints[0], palm, atol=20)
        assert np.allclose(first.keypoints[1:], hand[1:])


STB_CASES = {
    "another shape": (lambda r: scipy_io.savemat(r / "labels/B1Random_BB.mat", {
        "handPara": np.ones((21, 3, 2))}), r"B1Random_BB.mat: handPara is \(21, 3, 2\)"),
    "a zip unpacked elsewhere": (lambda r: (r / "images/B1Random").rename(r / "images/Random"),
                                 "images/B1Random/.*png: missing"),
}


# ==== RHD =================================================================================================
@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_rhd(rhd_root, tmp_path, capsys, split):
    dataset = command(rhd, rhd_root, tmp_path / "rhd", "--split", split)
    assert_sound_hands(dataset, *rhd_truth("training" if split == "train" else split), capsys, 7)


def test_rhd_masks_hold_one_hand_and_not_the_person(rhd_root, tmp_path):
    """The index picture is mirrored by hand."""
    dataset = command(rhd, rhd_root, tmp_path / "rhd")
    for i, left in enumerate(rhd_hands("training")[2]):
        index = np.asarray(Image.open(rhd_root / f"training/mask/{i:05d}.png"))
        hand, person = (index >= 2) & (index <= 17) if left else index >= 18, index >= 1
        both = np.stack([hand, person])[None, ..., ::-1 if left else 1]
        found = overlap(dataset, [i], both, mirrored(RHD_K, 320) if left else RHD_K)[0]
        assert found[0] > 0.93 > 0.8 > found[1], found


RHD_LABELS = "training/anno_training.pickle"


def put(change, *keys):
    """Change these entries of each label of the training part."""
    def apply(root):
        labels = read_pickle(root / RHD_LABELS)
        for label in labels.values():
            label.update({key: change(np.asarray(label[key])) for key in keys})
        write_pickle(root / RHD_LABELS, labels)
    return apply


RHD_CASES = {
    "right and left exchanged": (put(lambda x: np.roll(x, 21, axis=0), "xyz", "uv_vis"), "'handedness'"),
    "another camera": (put(lambda K: K * np.float32([[1.05], [1], [1]]), "K"), "'projection'.*2D labels"),
    "2D labels in another order": (put(lambda x: x[::-1], "uv_vis"), "'projection'.*2D labels"),
    "21 joints": (put(lambda x: x[:21], "xyz"), "pickle: broken file of labels: sample 0 has"),
}


# ==== PAN =================================================================================================
@pytest.mark.parametrize("split, sequence", [("test", SEQUENCES[0]), ("train", SEQUENCES[1])])
def test_pan(pan_root, tmp_path, capsys, split, sequence):
    """The lens moves the drawn joints by several px, and some hands are outside of a picture."""
    hands = pan_hands(sequence)["left"] @ PAN_R["00_00"].T + PAN_T["00_00"]
    off = np.linalg.norm(uv_of(hands, PAN_K) - uv_of(hands, PAN_K, PAN_LENS), axis=-1)
    assert 4 < off.mean() < 25 and 15 < len(pan_truth(sequence)[0]) < 6 * PAN_FRAMES
    dataset = command(pan, pan_root, tmp_path / "pan", "--split", split, "--stride", 1)
    assert_sound_hands(dataset, *pan_truth(sequence), capsys, 14)


def test_pan_a_view_that_a_sequence_lacks_is_left_out(pan_root, tmp_path, capsys):
    root = Path(shutil.copytree(pan_root, tmp_path / "root"))
    (root / "171204_pose1/hdVideos/hd_00_00.mp4").unlink()
    dataset = command(pan, root, tmp_path / "out", "--stride", 1)
    agrees(dataset, *pan_truth(SEQUENCES[1], views=("00_01",)))
    assert f"{SEQUENCES[1]}: has no pictures of view 00_00, which is left out" in capsys.readouterr().out
    shutil.rmtree(root / "171204_pose3/hdImgs")
    with refused("not one sample"):
        command(pan, root, tmp_path / "none", "--split", "test", "--stride", 1)


def test_pan_pictures_extracted_as_png(pan_root, tmp_path):
    """The publisher's hdImgsExtractor.sh writes either."""
    root = Path(shutil.copytree(pan_root, tmp_path / "root"))
    for path in root.glob(f"{SEQUENCES[0]}/hdImgs/*/*.jpg"):
        Image.open(path).save(path.with_suffix(".png"), compress_level=1)
        path.unlink()
    found, kept = (command(pan, top, tmp_path / out, "--split", "test", "--stride", 1)
                   for top, out in ((root, "png"), (pan_root, "jpg")))
    assert np.array_equal(found.images, kept.images) and np.array_equal(found.keypoints, kept.keypoints)


def test_pan_stride_views_and_thresholds(pan_root, tmp_path):
    """A hand with one bad joint is no label; with the thresholds open, it is."""
    some = command(pan, pan_root, tmp_path / "some", "--stride", 3, "--views", 1)
    agrees(some, *pan_truth(SEQUENCES[1], (0, 3), ("00_01",)))
    with refused("HD view"):
        pan.read(pan_root, views="0,x")

    def count(**flags):
        return len(list(pan.read(pan_root, "test", stride=1, views="0", **flags)[1]))
    strict = len(pan_truth(SEQUENCES[0], views=("00_00",))[0])
    assert count() == strict and count(score=0.9) == 0
    assert count(score=0.05) == count(error=2e5) == strict + PAN_FRAMES


def test_far_outside_a_lens_folds_back():
    """A hand far beside the picture that the lens's polynomial puts into it is not in view."""
    hand, near = hands_at("fold", 1, (3300, 0, 1500))[0], hands_at("fold", 1, (0, 0, 700))[0]
    folded = uv_of(hand, PAN_K, (-0.3, 0.028, 0, 0, 0))
    assert ((folded >= 0) & (folded <= (479, 269))).all(), "the test needs such a hand"
    assert not pan.in_view(hand, PAN_K, np.array([-0.3, 0.028, 0, 0, 0]), PAN_SIZE)
    assert pan.in_view(near, PAN_K, np.array(PAN_LENS), PAN_SIZE)
    assert not pan.in_view(-near, PAN_K, np.array(PAN_LENS), PAN_SIZE)


PAN_CASES = {
    "another size": (lambda r: Image.new("RGB", (240, 135)).save(
        r / f"{SEQUENCES[0]}/hdImgs/00_01/00_01_00000000.jpg"), "jpg is 240 x 135 px, not 480 x 270"),
    "no hands there": (without(f"{SEQUENCES[0]}/hdHand3d"), "not one sample; with -h"),
    "a picture missing": (without(f"{SEQUENCES[0]}/hdImgs/00_01/00_01_00000002.jpg"),
                          "00_01_00000002.jpg: missing"),
}


# ==== GAN =================================================================================================
def retype(change, kind: str):
    """Rewrite every file of a kind; change(numbers as rows of the kind's width)."""
    def apply(root):
        for path in root.glob(f"data/*/*/*_{kind}.txt"):
            numbers = np.array(path.read_text().split(","), float)
            write_numbers(path, np.asarray(change(numbers.reshape(-1, 2 if kind == "joint2D" else 3))))
    return apply


@pytest.mark.parametrize("inverse", [False, True])
def test_gan(inverse, gan_root, tmp_path, capsys):
    """Whether the file holds the crop's factor or its inverse."""
    root = Path(shutil.copytree(gan_root, tmp_path / "root"))
    if inverse:
        retype(lambda x: x ** [1, 1, -1], "crop_params")(root)
    dataset = command(gan, root, tmp_path / "gan", "--share", 0)
    assert_sound_hands(dataset, *gan_truth(GAN_FOLDERS), capsys)


def test_gan_split_is_by_folder_and_seeded(gan_root):
    def folders_of(split, seed):
        return {"/".join(s.image.split("/")[1:3]) for s in gan.read(gan_root, split, 0.5, seed)[1]}
    tests = [folders_of("test", seed) for seed in range(4)]
    for seed, test in enumerate(tests):
        assert folders_of("train", seed) == set(GAN_FOLDERS) - test
    assert len({tuple(sorted(test)) for test in tests}) > 2


GAN_CASES = {
    "2D labels in another order": (retype(lambda x: x[LITTLE_FIRST], "joint2D"), "2D labels"),
    "neither the factor nor its inverse": (retype(lambda x: x * [1, 1, 1.1], "crop_params"), "2D labels"),
    "mirrored labels": (retype(lambda x: x * MIRROR, "joint_pos_global"), "'handedness'"),
    "half of the release": (without("data/withObject"), "withObject: missing"),
    "another size": (lambda r: Image.new("RGB", (128, 128)).save(
        r / "data/withObject/0002/0002_color_composed.png"), "composed.png is 128 x 128 px, not 256 x 256"),
}


# test_readers.py puts these in
CASES = {freihand: FREIHAND_CASES, stb: STB_CASES, rhd: RHD_CASES, pan: PAN_CASES, gan: GAN_CASES}
