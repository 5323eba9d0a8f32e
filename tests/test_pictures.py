"""Measuring runs, their pictures, and photographs of one's own, with tiny untrained networks."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import evaluate
import train_finetune
import train_pretrain
import udapose
from support import photographs, pictures
from support.folder import Dataset
from support.readers.formats import open_picture
from support.run import InputError, file_checksum

SIDE, N = 48, 4
BONES = [[0, 1], [0, 2], [2, 3]]  # two fingers, of one bone and of two
META = {"format": 1, "name": "toy", "split": "test", "joints": list("abcd"), "bones": BONES, "root": 0,
        "depth_range": 300.0, "margin": 1.25, "origin": "test_pictures.py"}
SIZES = {"image": SIDE, "patch": 16, "width": 16, "depth": 2, "heads": 2}
RED, ORANGE = pictures.COLOURS[:2]
CPU = torch.device("cpu")


def save_checkpoint(folder, script, seed=0, **settings) -> None:
    """A finished run of untrained networks."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    s = dataclasses.asdict(script.Settings()) | SIZES | {"seed": seed, "out": str(folder), "init": ""}
    s |= {"target": ""} | settings
    encoder = udapose.Encoder((SIDE, SIDE), 16, 16, 2, 2)
    state = {"settings": s, "step": 2, "steps": 2, "seconds": 1.0, "encoder": encoder.state_dict()}
    if script is train_pretrain:
        s |= {"decoder_width": 16, "decoder_heads": 2, "seg_channels": 4}
        state["decoder"] = udapose.Decoder(encoder.grid, 16, 16, 16, 1, 2).state_dict()
        torch.save(state | {"segmentation": udapose.UNet(4).state_dict()}, folder / "segmentation.pt")
        lines = [{"stage": "pretraining", "step": i, "L_WMAE": 100 / i} for i in (1, 2)]
    else:
        s |= {"head_channels": 4}
        state["head"] = udapose.KeypointHead(encoder.grid, 16, 4, 4).state_dict()
        state["skeleton"] = {k: META[k] for k in ("joints", "bones", "root", "depth_range")}
        lines = [{"stage": "finetuning", "step": i, "L_kpt": 50 / i, "L_attn": 0.1 / i} for i in (1, 2)]
        lines.append({"stage": "finetuning", "step": 2, "source_val_epe": 40.0})
    torch.save(state, folder / "checkpoint.pt")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def save_dataset(folder) -> None:
    """N crops of noise with a bright square, the mask; joints around the camera's axis at half a metre."""
    folder.mkdir(parents=True)
    rng, masks = np.random.default_rng(0), np.zeros((N, 60, 60), np.uint8)
    masks[:, 20:40, 20:40] = 255
    np.save(folder / "masks.npy", masks)
    noise = rng.integers(0, 90, (N, 60, 60, 3), dtype=np.uint8)
    np.save(folder / "images.npy", noise + masks[..., None] // 2)
    np.save(folder / "keypoints.npy", np.float32(rng.uniform(-60, 60, (N, 4, 3)) + (0, 0, 500)))
    np.save(folder / "intrinsics.npy", np.float32([[[150, 0, 29.5], [0, 150, 29.5], [0, 0, 1]]] * N))
    (folder / "meta.json").write_text(json.dumps(META))


@pytest.fixture
def toy(tmp_path) -> Dataset:
    save_dataset(tmp_path / "toy")
    return Dataset(tmp_path / "toy", "keypoints", "intrinsics", "masks")


@pytest.fixture
def flags(toy) -> list[str]:
    return ["--source-test", str(toy.folder), "--target-test", str(toy.folder), "--device", "cpu"]


def measured(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]


def colour_at(picture, xy) -> tuple:
    return tuple(np.array(picture)[tuple(np.round(xy).astype(int)[::-1])].tolist())


def centre_of(picture, colour) -> np.ndarray:
    """Mean (x, y) of the pixels of one colour."""
    return np.argwhere((np.array(picture) == colour).all(-1)).mean(axis=0)[::-1]


# ==== Measuring =========================================================================================
def test_a_run_is_measured_with_its_pre_training(toy, tmp_path, monkeypatch):
    """Settings, last losses, chance, and the attention before fine-tuning. In two parts it gives the same."""
    init = {"source": str(toy.folder), "init": str(tmp_path / "pretrain-full-seed0")}
    save_checkpoint(tmp_path / "pretrain-full-seed0", train_pretrain, alpha=7.0)
    save_checkpoint(tmp_path / "full-seed1", train_finetune, 1, **init)
    save_checkpoint(tmp_path / "gone-seed1", train_finetune, 1, source="moved/away", init="nowhere")
    tests, known = {"source": toy, "target": toy}, {}
    full, before, gone = (evaluate.measure(tmp_path / name / "checkpoint.pt", tests, CPU, known)
                          for name in ("full-seed1", "pretrain-full-seed0", "gone-seed1"))
    assert (full["row"], full["labels"], full["test"][-4:]) == ("full", N, "/toy")
    assert full["pretraining"]["settings"]["alpha"] == 7
    assert full["pretraining"]["target"] == before["target"] and before["target"].keys() == {
        "lift", "reconstruction", "mask_iou"}
    assert full["target"]["lift"] != before["target"]["lift"] and full["target"]["chance"] > 0
    assert "pretraining" not in gone and np.isnan(gone["target"]["chance"])  # its source is gone as well
    assert measured(tmp_path / "full-seed1") == [full]
    monkeypatch.setattr(data, "chunks", lambda n: [np.arange(1), np.arange(1, n)])
    again = evaluate.measure(tmp_path / "full-seed1/checkpoint.pt", tests, CPU, {})
    assert again["target"] == full["target"] and again["pretraining"] == full["pretraining"]


def test_results_keep_one_line_per_test_set(toy, tmp_path):
    """Measuring again replaces the line; another test set adds one."""
    save_dataset(tmp_path / "other")
    save_checkpoint(tmp_path / "full-seed0", train_finetune, source=str(toy.folder))
    for name in ("toy", "other", "toy"):
        test = Dataset(tmp_path / name, "keypoints", "intrinsics")
        evaluate.measure(tmp_path / "full-seed0/checkpoint.pt", {"source": toy, "target": test}, CPU, {})
    assert [r["test"].split("/")[-1] for r in measured(tmp_path / "full-seed0")] == ["other", "toy"]


def test_the_pre_training_run_is_found_only_if_it_is_the_same(tmp_path, capsys):
    """Next to the run, if the runs were moved; not if it was trained again since."""
    save_checkpoint(tmp_path / "pretrain-full-seed0", train_pretrain)
    save_checkpoint(tmp_path / "full-seed0", train_finetune)
    path, before = (tmp_path / name / "checkpoint.pt" for name in ("full-seed0", "pretrain-full-seed0"))
    made = {"settings": {"init": "runs/elsewhere/pretrain-full-seed0"}, "made_by": {}}
    assert evaluate.pretraining_of(path, made) == before
    assert evaluate.pretraining_of(path, made | {"made_by": {"init": file_checksum(before)}}) == before
    assert evaluate.pretraining_of(path, made | {"made_by": {"init": "0"}}) is None
    assert "measured without its pre-training" in capsys.readouterr().out
    for init in ("", str(before)):  # scratch; a file of weights
        assert evaluate.pretraining_of(path, made | {"settings": {"init": init}}) is None


def test_a_run_from_a_file_of_weights_has_the_settings_of_the_file(toy, tmp_path):
    """assets/pretrained-small.pt keeps the settings of its pre-training, so that its runs join their row."""
    save_checkpoint(tmp_path / "pretrain", train_pretrain, alpha=7.0)
    init = shutil.copy(tmp_path / "pretrain/checkpoint.pt", tmp_path / "weights.pt")
    save_checkpoint(tmp_path / "full-seed0", train_finetune, source=str(toy.folder), init=str(init))
    path = tmp_path / "full-seed0/checkpoint.pt"
    assert evaluate.measure_finetuned(path, {}, CPU, {})["pretraining"]["settings"]["alpha"] == 7


def test_a_run_that_used_the_masks_of_another_has_its_network(toy, tmp_path):
    """--target-masks RUN: the IoU is that of the f^S in RUN."""
    save_checkpoint(tmp_path / "first", train_pretrain)
    save_checkpoint(tmp_path / "second", train_pretrain, 1, target_masks=str(tmp_path / "first"))
    (tmp_path / "second/segmentation.pt").unlink()
    paths = [tmp_path / name / "checkpoint.pt" for name in ("first", "second")]
    first, second = (evaluate.measure_pretrained(path, {"target": toy}, CPU, {})["target"] for path in paths)
    assert first["mask_iou"] == second["mask_iou"] and first["lift"] != second["lift"]


def test_everything_from_the_command_line(flags, toy, tmp_path, capsys):
    """Unfinished runs are named, a shared pre-training is measured once, every picture is written."""
    runs = tmp_path / "runs"
    save_checkpoint(runs / "pretrain-full-seed0", train_pretrain, norm_pix=True, source=str(toy.folder))
    for seed in (0, 1):
        save_checkpoint(runs / f"full-seed{seed}", train_finetune, seed, source=str(toy.folder),
                        init=str(runs / "pretrain-full-seed0"))
    save_checkpoint(runs / "scratch-seed0", train_finetune, source=str(toy.folder), lam=0.0)
    save_checkpoint(runs / "late-seed0", train_finetune)
    path = runs / "late-seed0/checkpoint.pt"
    torch.save(torch.load(path) | {"step": 1}, path)
    evaluate.main([str(runs), *flags])
    text = capsys.readouterr().out
    assert "left out, not finished (1 of 2 steps): " in text and re.search(r"\nfull +\| 2 ", text)
    assert "tiny" not in text.replace(str(tmp_path), "")  # own data is not called after a preset of ours
    names = {"attention", "curves", "poses", "reconstruction-full"}
    assert {path.stem for path in (runs / "pictures").iterdir()} == names
    for name in names - {"curves"}:
        assert len(Image.open(runs / f"pictures/{name}.png").getcolors(maxcolors=10**6)) > 1000


def test_what_cannot_be_measured_is_said_before_anything_is(flags, toy, tmp_path, monkeypatch):
    """Own data on the embedded benchmark, for one."""
    monkeypatch.setattr(evaluate, "measure", lambda *a: pytest.fail("measured"))
    for name in "ab":
        save_checkpoint(tmp_path / f"runs/{name}", train_finetune, source=str(toy.folder))
    path = tmp_path / "runs/b/checkpoint.pt"
    state = torch.load(path)
    own = "trained on .*toy; name labelled test images of your own: --source-test FOLDER --target-test"
    for some in ([], flags[:2], flags[2:4]):
        with pytest.raises(InputError, match=own):
            evaluate.main([str(path.parent), *some])
    torch.save(state | {"skeleton": state["skeleton"] | {"joints": list("abce")}}, path)
    with pytest.raises(InputError, match="toy: joints"):
        evaluate.main([str(tmp_path / "runs"), *flags])
    torch.save(state | {"step": 1}, path)
    for folder, words in ((path.parent, "b: no run is finished"), (toy.folder, "toy: no checkpoint.pt here")):
        with pytest.raises(InputError, match=words):
            evaluate.main([str(folder), *flags])


def test_an_image_whose_root_has_no_label_counts_nowhere(toy, tmp_path):
    """Its other joints are labelled, but nothing says how far away it is."""
    save_checkpoint(tmp_path / "full-seed0", train_finetune)
    estimator, _ = evaluate.load_estimator(tmp_path / "full-seed0/checkpoint.pt", CPU)
    keypoints = np.load(toy.folder / "keypoints.npy")
    keypoints[0, META["root"]] = np.nan
    np.save(toy.folder / "keypoints.npy", keypoints)
    shutil.copytree(toy.folder, tmp_path / "others")
    for name in ("images", "masks", "keypoints", "intrinsics"):
        np.save(tmp_path / f"others/{name}.npy", np.load(toy.folder / f"{name}.npy")[1:])
    a, b = (evaluate.measure_pose(estimator, Dataset(folder, "keypoints", "intrinsics"), SIDE, CPU)
            for folder in (toy.folder, tmp_path / "others"))
    for key in ("epe", "in_plane", "depth", "pa_epe", "pa_rigid", "auc"):
        assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_overlap_of_masks(toy):
    """Predicted: the left half, barely. True: 20 x 20 px in the middle, of which half is there."""
    left = torch.full((1, 1, SIDE, SIDE), -0.1)
    left[..., : SIDE // 2] = 0.0
    iou = evaluate.measure_masks(lambda x: left.expand(len(x), -1, -1, -1), toy, SIDE, CPU)
    assert iou == pytest.approx(200 / (SIDE * SIDE / 2 + 400 - 200))


def test_measures_of_nothing_are_no_numbers(toy):
    """No foreground, in the truth or predicted: neither a bad overlap nor a perfect reconstruction."""
    np.save(toy.folder / "masks.npy", np.zeros((N, 60, 60), np.uint8))
    dataset = Dataset(toy.folder, "masks")
    assert np.isnan(evaluate.measure_masks(lambda x: torch.full_like(x[:, :1], -9.0), dataset, SIDE, CPU))
    s = {"image": SIDE, "patch": 16, "mask_ratio": 0.5, "norm_pix": False}
    on, edge, beside = evaluate.measure_reconstruction(
        lambda x, noise, r: (udapose.patchify(x, 16) + 1, (noise > 0.5).float()), dataset, s, CPU)
    assert np.isnan([on, edge]).all() and beside == pytest.approx(1.0)


# ==== What is drawn is where it should be ===============================================================
def test_views_are_neither_upside_down_nor_mirrored():
    up_left, far_right = (-50, -80, 0), (60, 0, 70)  # mm: y down, z away
    pose = np.float32([(0, 0, 0), up_left, far_right, far_right])
    front, right = (pictures.view(pose, None, across, BONES) for across in (0, 2))
    (left_x, left_y), (right_x, right_y) = centre_of(front, RED), centre_of(front, ORANGE)
    assert left_x < right_x and left_y < right_y  # as the camera sees it
    (near_x, near_y), (far_x, far_y) = centre_of(right, RED), centre_of(right, ORANGE)
    assert near_x < far_x and near_y < far_y  # far is to the right


def test_skeleton_is_on_the_keypoints():
    """A bright pixel of the image, shown as a panel, is where the joint that was found there is drawn."""
    uv = torch.tensor([(10.0, 30.0), (40.0, 5.0), (20.0, 44.0), (float("nan"), 3.0)])
    points = pictures.in_panel(uv, SIDE)
    for (x, y), point in zip(uv[:3].int().tolist(), points, strict=False):
        image = torch.zeros(3, SIDE, SIDE)
        image[:, y, x] = 1
        light = np.array(pictures.to_panel(image))[..., 0].astype(float)
        middle = [(light.sum(axis) * np.arange(pictures.CELL)).sum() / light.sum() for axis in (0, 1)]
        assert np.abs(middle - point).max() < 0.5
    for bones, dots in ((BONES, (RED, ORANGE)), ([], (RED, RED))):  # a dot if there is no bone
        blank = Image.new("RGB", (pictures.CELL, pictures.CELL))
        pictures.draw_skeleton(ImageDraw.Draw(blank), points, bones, 5)
        assert [colour_at(blank, points[i]) for i in (1, 2)] == list(dots)
        assert {c for _, c in blank.getcolors()} == {(0, 0, 0), *dots}  # no bone to the NaN joint


def test_heat_has_row_and_column_in_place():
    values = torch.full((9,), 0.1)
    values[1 * 3 + 2] = 5  # row 1, column 2
    panel = pictures.heat(Image.new("RGB", (pictures.CELL, pictures.CELL)), values)
    for i in range(9):
        r, _, b = colour_at(panel, (np.array([i % 3, i // 3]) + 0.5) * pictures.CELL / 3)
        assert (r > b) == (i == 5)


# ==== Photographs =======================================================================================
def shades() -> np.ndarray:
    """(40, 60) uint8: dark above, light below."""
    return np.repeat(np.uint8([40, 200]), 20)[:, None].repeat(60, axis=1)


@pytest.mark.parametrize("name", ["grey.png", "palette.png", "rgb.jpg", "cmyk.jpg", "16bit.png", "32bit.tif"])
def test_every_kind_of_picture_is_read_as_rgb(name, tmp_path):
    """Integers of 32 bits from 0 to 255 were read as black."""
    grey = Image.fromarray(shades())
    rgb = grey.convert("RGB")
    kinds = {"palette": grey.convert("P"), "rgb": rgb, "cmyk": rgb.convert("CMYK"),
             "16bit": Image.fromarray(shades().astype(np.uint16) * 257),
             "32bit": Image.fromarray(shades().astype(np.int32))}
    kinds.get(name.split(".")[0], grey).save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.dtype == np.uint8 and picture.shape == (40, 60, 3)
    assert np.abs(picture[..., 1].astype(int) - shades()).max() < 12


def test_a_turned_picture_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    stored = Image.fromarray(shades()).convert("RGB").rotate(90, expand=True)
    stored.save(tmp_path / "turned.jpg", exif=exif)
    picture = open_picture(tmp_path / "turned.jpg")
    assert picture.shape == (40, 60, 3) and picture[:15].mean() < 60 and picture[25:].mean() > 180


def save_photo(path, size=(60, 40)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path)
    return str(path)


@pytest.mark.parametrize("box, expected, width", [
    ((10, 20, 20, 8), (5, 9), 30), ((10, 2, 8, 20), (-1, -3), 30),  # around (20, 24) and (14, 12)
    ((-10, 20, 20, 30), (-10, 15), 30), (None, (10, 0), 40)])  # clipped to 0 20 10 20; the middle
def test_the_square_is_that_of_training_and_a_box_is_clipped(box, expected, width):
    corner, side = photographs.square_around(box, (60, 40), "", 1.5)
    assert side == width and corner.tolist() == list(expected)
    for outside in ([60, 0, 9, 9], [0, 0, 0, 9], [-9, 0, 9, 9], [0, 0, np.nan, 9]):
        with pytest.raises(InputError, match=r"a.png: --box .* is outside of the picture, 60 x 40 px; give"):
            photographs.square_around(outside, (60, 40), "a.png", 1.5)


def test_joints_in_space_have_bones_as_in_training():
    """A pose seen by a camera of known focal length comes back; with another one, only its scale is right."""
    pose = np.array([(0, 0, 500), (40, -30, 520), (-50, 20, 470), (-60, 60, 440)], float)  # (K, 3) mm
    uv, depth = 700 * pose[:, :2] / pose[:, 2:] + (319.5, 239.5), pose[:, 2] - 500

    def place(depth, focal, poses):
        return photographs.place_in_space(uv, depth, focal, (640, 480), META, poses[None])

    found, why = place(depth, 700.0, pose)
    assert np.allclose(found, pose, atol=1e-6) and why == "bones are as long as in training"
    other, (a, b) = place(depth, 1400.0, pose)[0], np.transpose(BONES)
    assert np.isclose(np.square(other[a] - other[b]).sum(), np.square(pose[a] - pose[b]).sum())
    assert other[0, 2] > 900
    for depths, poses, words in ((100 * depth, pose, "longer than"), (depth, pose * np.nan, "no bone is")):
        found, why = place(depths, 700.0, poses)
        assert np.isfinite(found).all() and words in why


def test_photographs_from_the_command_line(toy, tmp_path, capsys):
    """Files and folders: a picture and numbers for each, none overwritten by a namesake."""
    save_checkpoint(tmp_path / "runs/full-seed0", train_finetune, source=str(toy.folder))
    one, other = save_photo(tmp_path / "a/me.jpg"), save_photo(tmp_path / "b/me.jpg", (50, 70))
    (tmp_path / "a/._me.jpg").write_text("left by another system")
    out = ["--pictures", str(tmp_path / "out")]
    evaluate.main([str(tmp_path / "runs"), "--image", str(tmp_path / "a"), other, *out])
    assert "focal length 60 px, assumed; distance: " in capsys.readouterr().out
    box = ["--box", "5", "5", "20", "20", "--focal", "75"]
    evaluate.main([str(tmp_path / "runs"), "--image", one, *box, *out])
    evaluate.main([str(tmp_path / "runs"), "--image", one, *out])  # its own prediction is replaced
    names = [f"{name}_pose" for name in ("me", "me-2", "me-5-5-20-20")]
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(2 * names)
    numbers = json.loads((tmp_path / "out/me-5-5-20-20_pose.json").read_text())
    assert (numbers["focal_length"], numbers["focal_length_assumed"]) == (75, False)
    pixels, mm = np.array(numbers["pixels"]), np.array(numbers["millimetres"])  # (K, 2), (K, 3)
    assert np.allclose(75 * mm[:, :2] / mm[:, 2:] + (29.5, 19.5), pixels, atol=0.1)  # of that camera
    assert numbers["joints"] == list("abcd")


def test_one_bad_photograph_does_not_stop_the_others(toy, tmp_path):
    save_checkpoint(tmp_path / "runs/full-seed0", train_finetune, source=str(toy.folder))
    save_photo(tmp_path / "a/good.png")
    save_photo(tmp_path / "a/tiny.png", (8, 8))
    (tmp_path / "a/bad.png").write_text("not a picture")
    flags = ["--image", str(tmp_path / "a"), "--pictures", str(tmp_path / "out")]
    with pytest.raises(InputError, match="bad.png: .*\n.*tiny.png: 8 x 8 px; give a picture of at least 16"):
        evaluate.main([str(tmp_path / "runs"), *flags])
    assert (tmp_path / "out/good_pose.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--image", "a.png", "--table"], "--image: leave out"),
    (["--image", "a.png", "--focal", "nan"], "give numbers not below 0")])
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(InputError, match=words):
        evaluate.main(flags)
