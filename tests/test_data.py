"""data.py and the folder format: what is refused, check, show, the benchmark's folders; batches and crops."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from publishers import projected
from test_hand_readers import TIP_FIRST
from test_readers import META, cut, refused

import data
from support import folder as folders
from support import rendering
from support.convert import Sample, convert_samples
from support.folder import HAND, HUMAN, Dataset, with_root
from support.pictures import COLOURS
from support.rendering import render
from support.run import random_generator
from udapose import project

CPU = torch.device("cpu")


# ==== A data-set folder, written by hand, and what is refused ===========================================
@pytest.fixture
def own(tmp_path) -> Path:
    folder, rng = tmp_path / "own", np.random.default_rng(0)
    folder.mkdir()
    np.save(folder / "images.npy", rng.integers(0, 255, (6, 50, 50, 3), dtype=np.uint8))
    np.save(folder / "masks.npy", rng.integers(0, 255, (6, 50, 50), dtype=np.uint8))
    np.save(folder / "keypoints.npy", np.float32(rng.uniform(-80, 80, (6, 2, 3)) + (0, 0, 500)))
    np.save(folder / "intrinsics.npy", np.float32([[[100, 0, 24.5], [0, 100, 24.5], [0, 0, 1]]] * 6))
    (folder / "meta.json").write_text(json.dumps(META | {"format": 1}))
    return folder


def every(folder: Path) -> Dataset:
    return Dataset(folder, "masks", "keypoints", "intrinsics")


def saved(name, change):
    return lambda folder: np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))


def with_value(where, value):
    """A change of an array: `value` at [where]."""
    def change(array):
        array = array.copy()
        array[where] = value
        return array
    return change


def meta(**fields):
    return lambda folder: (folder / "meta.json").write_text(json.dumps(META | {"format": 1} | fields))


REFUSED = {
    "no folder": (lambda f: shutil.rmtree(f), "no data set here"),
    "missing array": (lambda f: (f / "masks.npy").unlink(), "masks.npy: missing.*--masks none --xc 0"),
    "no camera": (saved("intrinsics", lambda a: 0 * a), "intrinsics.npy: row 0 is no camera"),
    "truncated array": (lambda f: cut(f / "images.npy"), "images.npy: broken .npy array"),
    "wrong number of joints": (saved("keypoints", lambda a: np.repeat(a, 2, 1)), "keypoints.npy: shape"),
    "not square": (saved("images", lambda a: a[:, :40]), r"shape \(6, 40, 50, 3\); not \(n > 0, H, H, 3\)"),
    "masks of another size": (saved("masks", lambda a: a[:, :40, :40]), "masks.npy: shape"),
    "float images": (saved("images", lambda a: a / 255), "npy: float64; give uint8"),
    "a label of 3e38": (saved("keypoints", with_value((3, 1, 2), 3e38)),
                        "row 3 has b at .*3e.38., beyond 1e6 mm or .* write NaN"),
    "(0, 0, 0) for no label": (saved("keypoints", with_value((3, 1), 0)),
                               r"row 3 has b at \(0, 0, 0\), .* not in front"),
    "metres": (saved("keypoints", lambda a: a / 1000), "own/keypoints.npy: the median bone is 0.* metres"),
    "intrinsics of the uncropped picture": (
        saved("intrinsics", lambda a: a + np.float32([[0, 0, 270], [0, 0, 270], [0, 0, 0]])),
        "it puts 0% of joints"),
    "normalised intrinsics": (saved("intrinsics", lambda a: a * np.float32([[0.02], [0.02], [1]])),
                              "puts all in the upper left quarter"),
    "a last row of 0 0 0.5": (saved("intrinsics", lambda a: a * np.float32([[1], [1], [0.5]])),
                              "last row not 0 0 1"),
    "half a meta.json": (lambda f: cut(f / "meta.json"), "meta.json: not a readable JSON file"),
    "empty meta.json": (lambda f: (f / "meta.json").write_text("{}"), "lacks bones, depth_range, format"),
    "other rows": (meta(rows=5), "images.npy: 6 rows; meta.json counts 5"),
} | {f"{key} = {value}": (meta(**{key: value}), f"meta.json: {key}") for key, value in [
    ("joints", 5), ("bones", [[0, 2]]), ("root", -1), ("depth_range", "300"), ("margin", 0), ("compare", [2]),
    ("format", 2)]}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_folders_are_refused(what, own):
    every(own)
    spoil, message = REFUSED[what]
    spoil(own)
    with refused(message):
        every(own)


def test_unlabelled_joints_and_images_are_welcome(own):
    """NaN is no label. An image without labels needs no camera."""
    saved("keypoints", with_value((3, 1, 2), np.nan))(own)
    last = np.arange(6)[:, None, None] == 5
    saved("keypoints", lambda a: np.where(last, np.float32(np.nan), a))(own)
    saved("intrinsics", lambda a: np.where(last, 0, a))(own)
    _, depth = labels(every(own), torch.eye(3)[None, :2].repeat(6, 1, 1))
    assert depth[3, 1].isnan() and depth[5].isnan().all() and depth.isfinite().sum() == 9
    assert with_root(every(own)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["hands", "bodies"])
def test_labels_in_another_unit_are_refused(kind, tmp_path):
    """Hands and bodies in every set that is opened with labels: their bones are known to be human."""
    folder = written(tmp_path / "set", kind=kind)
    saved("keypoints", lambda a: a / 10)(folder)
    with refused("set/keypoints.npy: the median bone is .* mm, expected .* mm: are these centimetres?"):
        every(folder)
    assert Dataset(folder).keypoints is None  # a target's labels are nobody's business


def test_another_skeleton_is_refused(own):
    dataset = every(own)
    folders.same_skeleton(dataset, META, "the model")
    for change, message in (({"joints": ["b", "a"]}, "joints is .'a', 'b'., not .'b', 'a'. as the model"),
                            ({"depth_range": 2000}, "depth_range is 300, not 2000")):
        with refused(message):
            folders.same_skeleton(dataset, META | change, "the model")
    assert folders.compared(HAND) == list(range(21)) and folders.compared(HUMAN) == list(range(1, 17))
    assert folders.compared(HAND | {"compare": [4, 8]}) == [4, 8]


def written(folder: Path, side: int = 24, kind: str = "hands") -> Path:
    """Six rendered hands or bodies, as conversion and rendering write them."""
    rows = render(kind, random_generator(0, "six"), "source", 6, side)
    parts = [{name: array[part] for name, array in rows.items()} for part in (slice(0, 4), slice(4, 6))]
    skeleton = {k: v for k, v in rendering.KINDS[kind].skeleton.items() if k != "box"}
    folders.write_folder(folder, {"name": "six", "skipped": []} | skeleton, 6, parts)
    return folder


# ==== check and show ====================================================================================
def test_check_names_what_is_damaged(tmp_path):
    folder = written(tmp_path / "set")
    for path in (folder / f"{name}.npy" for name in folders.ARRAYS):
        whole = path.read_bytes()
        path.write_bytes(whole[:-36] + bytes([whole[-36] ^ 4]) + whole[-35:])
        with refused(f"{path.name}: not what was written, by its checksum"):
            data.main(["check", str(folder)])
        path.write_bytes(whole)
    (folder / "masks.npy").unlink()
    with refused("masks.npy: missing; meta.json has its checksum"):
        data.main(["check", str(folder)])


@pytest.mark.filterwarnings("error")
def test_check_of_own_data(own, tmp_path, capsys):
    """Rows without labels are not impossible; hands whose fingers are numbered from the tip are."""
    poses = np.tile(np.float32([(-20, 0, 500), (20, 0, 500)]), (6, 1, 1))
    poses[0], poses[1, 1] = np.nan, np.nan
    np.save(own / "keypoints.npy", poses)
    saved("masks", lambda a: a | 128)(own)
    data.main(["check", str(own)])
    text = capsys.readouterr().out
    assert text.count("without a checksum") == 4 and "labels: 0 of 6 rows are impossible" in text
    assert "bones: 40 mm in the median; joints: 25.0 % unlabelled" in text and "1 rows lack the root" in text
    saved("masks", lambda a: a // 128)(own)
    with refused("masks.npy: the largest value is 1, no foreground"):
        data.main(["check", str(own)])
    folder = written(tmp_path / "hands")
    saved("keypoints", lambda a: a[:, TIP_FIRST])(folder)
    (folder / "meta.json").write_text(json.dumps({"format": 1, "name": "reversed"} | HAND))
    data.main(["check", str(folder)])
    assert "6 of 6 rows are impossible\n  row 0: " in capsys.readouterr().out


def test_show_draws_the_skeleton_where_the_hand_is(own, tmp_path):
    """On a black picture, finger colours are found at the projected tips; a sheet of images alone."""
    folder = written(tmp_path / "black", 224)
    np.save(folder / "images.npy", np.zeros((6, 224, 224, 3), np.uint8))
    dataset = Dataset(folder, "keypoints", "intrinsics")
    picture = np.asarray(data.draw_sample(dataset, 0, 448)).astype(int)
    uv = np.round(projected(dataset.keypoints[:1], dataset.intrinsics[:1])[0] * 2 + 0.5).astype(int)
    for finger, (u, v) in enumerate(uv[4:21:4]):
        near = picture[v - 2:v + 3, u - 2:u + 3]
        assert (np.abs(near - COLOURS[finger]).sum(-1) < 20).any()
    (own / "keypoints.npy").unlink()
    for place in (folder, own):
        data.main(["show", str(place), str(tmp_path / "sheet.png")])
        assert Image.open(tmp_path / "sheet.png").size == (1024, 2 * 272)


# ==== The embedded benchmark's folders ==================================================================
def test_hands(tmp_path, monkeypatch, capsys):
    """The embedded benchmark goes through the same writer, and its labels through the same checks."""
    monkeypatch.setattr(data, "BENCHMARK", {"target_test": ("target", 60), "unconstrained": (None, 10)})
    monkeypatch.setattr(rendering, "BENCHMARK", data.BENCHMARK)
    for work in (True, False):  # the second time there is none
        data.main(["hands", str(tmp_path), "--side", "40", "--workers", "1"])
        assert ("target_test: 60/60 images | " in capsys.readouterr().out) == work
    assert every(tmp_path / "target_test").images.shape == (60, 40, 40, 3)
    assert len(Dataset(tmp_path / "unconstrained")) == 10
    data.main(["check", str(tmp_path / "target_test")])
    assert "labels: 0 of 60 rows are impossible" in capsys.readouterr().out
    with refused("target_test: exists with 40 px; remove it"):
        data.main(["hands", str(tmp_path), "--side", "60"])


def test_half_gaps(tmp_path, monkeypatch):
    """One half of the gap each: the other half's settings are the source's. Rendered if one is asked for."""
    for domains in (kind.domains for kind in rendering.KINDS.values()):
        source, target, figure, scenery = (domains[k] for k in ("source", "target", "figure", "scenery"))
        assert figure["wall"] == source["wall"] and scenery["wall"] == target["wall"] != source["wall"]
        assert figure["skin"] == target["skin"] != source["skin"] and scenery["skin"] == source["skin"]
    monkeypatch.setattr(rendering, "BENCHMARK", {"target_test": ("target", 4)})
    monkeypatch.setattr(rendering, "HALF_GAPS", {"figure_test": ("figure", 4)})
    rendering.ensure_benchmark([str(tmp_path / "hands/figure_test"), ""])
    assert sorted(path.name for path in (tmp_path / "hands").iterdir()) == ["figure_test", "target_test"]


# ==== Photographs =======================================================================================
def test_photos(tmp_path):
    """What no picture can be read from is left out and named; other files are no photographs."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    Image.new("RGB", (1, 1), (9, 8, 7)).save(root / "a_tiny.bmp")
    Image.new("RGBA", (60, 40), (9, 8, 7, 0)).save(root / "b_clear.png")
    Image.new("RGB", (60, 40), (255, 0, 0)).save(root / "deep/c_red.JPEG", quality=95)
    Image.new("RGB", (60, 40)).save(root / "._a_tiny.png")  # a Mac's, no photograph
    (root / "folder.jpg").mkdir()  # only regular files are photographs
    shutil.copy(root / "deep/c_red.JPEG", root / "h_cut.jpg")
    cut(root / "h_cut.jpg")
    (root / "readme.txt").write_text("not a photograph")
    data.main(["imagenet", str(root), f"{tmp_path}/xc/", "--side", "32", "--workers", "1"])  # with a slash
    dataset = Dataset(tmp_path / "xc")
    assert [text.split(": ")[0][-9:] for text in dataset.meta["skipped"]] == ["h_cut.jpg"]
    tiny, clear, red = dataset.images[:].astype(int)
    assert dataset.meta["joints"] == [] and (tiny == (9, 8, 7)).all() and np.abs(red - (255, 0, 0)).max() < 9
    assert (clear == 255).all()  # what is transparent is white
    with refused("not one sample"):
        data.main(["imagenet", f"{tmp_path}/nothing", f"{tmp_path}/none", "--workers", "1"])


def test_photo_is_cropped_at_its_centre(tmp_path):
    ramp = np.arange(200, dtype=np.uint8)[None].repeat(100, axis=0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    arrays, _ = convert_samples(tmp_path, 100, HAND, [Sample("ramp.png")])
    assert np.array_equal(arrays["images"][0, :, :, 0], ramp[:, 50:150])


# ==== Batches and augmentation ==========================================================================
def labels(dataset: Dataset, A: torch.Tensor) -> tuple:
    """uv and depth of all rows in the crops of A."""
    keypoints, K = (torch.tensor(array) for array in (dataset.keypoints, dataset.intrinsics))
    return data.labels_of(keypoints, K, A, dataset.meta["root"])


def test_batch_rows():
    steps = [data.batch_rows(10, 0, "order", step, 4) for step in range(15)]  # 6 epochs of 10 rows
    epochs = np.concatenate(steps).reshape(6, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6
    for other in ((1, "order"), (0, "other order")):
        assert not np.array_equal([data.batch_rows(10, *other, step, 4) for step in range(15)], steps)
    assert sorted(data.batch_rows(3, 0, "order", 0, 9)) == 3 * [0] + 3 * [1] + 3 * [2]  # three epochs in one


def test_augmentation_ranges():
    p = data.augmentation(np.random.default_rng(0), 4000, 0.4, gain=0.3)
    assert np.allclose(p.max(axis=0), [np.pi / 6, 0.1, 0.1, 1.25] + 3 * [1.4] + 3 * [1.3], atol=0.01)
    assert np.allclose(p.min(axis=0), [-np.pi / 6, -0.1, -0.1, 0.8] + 3 * [0.6] + 3 * [0.7], atol=0.01)
    assert np.array_equal(data.augmentation(np.random.default_rng(5), 3, 0)[:, 4:], np.ones((3, 6)))


@pytest.fixture
def dots(own) -> Dataset:
    """Each picture and mask shows one soft dot, at the first keypoint's projection."""
    rng, H = np.random.default_rng(3), 100
    K = np.float32([[[300, 0, 52.25], [0, 290, 47.5], [0, 0, 1]]] * 12)
    keypoints = np.float32(rng.uniform(-30, 30, (12, 2, 3)) + (0, 0, 500))
    u, v = projected(keypoints, K)[:, 0].T[..., None, None]  # (12, 1, 1) px
    square = (np.arange(H) - u) ** 2 + (np.arange(H)[:, None] - v) ** 2  # (12, H, H)
    dot = np.uint8(np.round(255 * np.exp(-square / (2 * 2.5 ** 2))))
    arrays = {"images": np.repeat(dot[..., None], 3, axis=-1), "masks": dot, "keypoints": keypoints}
    for name, array in (arrays | {"intrinsics": K}).items():
        np.save(own / f"{name}.npy", array)
    meta(margin=1.25)(own)
    return every(own)


def centroids(x: torch.Tensor) -> torch.Tensor:
    """Centre of brightness of x (B, H, W), (B, 2) px."""
    H = x.shape[-1]
    u = torch.arange(H, dtype=torch.float32)
    return torch.stack([(x * u).sum((1, 2)), (x * u[:, None]).sum((1, 2))], -1) / x.sum((1, 2))[:, None]


def test_image_mask_and_labels_move_together(dots):
    rows, parameters = np.arange(12), data.augmentation(np.random.default_rng(0), 12, 0)
    x, m, A = data.crops(dots, rows, parameters, 64, CPU, dots.masks)
    uv, _ = labels(dots, A)
    inside = ((uv[:, 0] > 8) & (uv[:, 0] < 55)).all(dim=1)
    assert inside.sum() >= 8 and x.shape == (12, 3, 64, 64) and m.shape == (12, 1, 64, 64)

    def error(where, points):
        return (centroids(where)[inside] - points[inside, 0]).norm(dim=-1).max()

    assert error(x[:, 0], uv) < 0.06 and error(m[:, 0], uv) < 0.06
    for column, change in ((0, np.negative), (1, np.negative), (2, np.negative), (3, np.reciprocal)):
        wrong = parameters.copy()  # turned, moved, zoomed the other way
        wrong[:, column] = change(wrong[:, column])
        A = data.crop_transform(torch.from_numpy(wrong), 100, 1.25, 64)
        assert error(x[:, 0], labels(dots, A)[0]) > 0.5


@pytest.mark.parametrize("column, value, expected", [
    (0, 0.0, [[39.5, 39.5], [49.5, 39.5]]),  # as it is: the centre, and 10 px to the right of it
    (0, np.pi / 2, [[39.5, 39.5], [39.5, 49.5]]),  # a right angle clockwise: 10 px below it
    (1, 0.1, [[47.5, 39.5], [57.5, 39.5]]),  # 10 % of 80 px to the right
    (2, 0.1, [[39.5, 47.5], [49.5, 47.5]]),  # 10 % down
    (3, 2.0, [[39.5, 39.5], [59.5, 39.5]])])  # twice as large
def test_parameters_mean_what_they_say(column, value, expected):
    p, points = data.no_augmentation(1), torch.tensor([[[49.5, 49.5], [59.5, 49.5]]])
    p[:, column] = value
    found = data.transform_points(data.crop_transform(torch.from_numpy(p), 100, 1.25, 80), points)[0]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)


def test_no_augmentation_is_the_centre_crop(own):
    dataset = every(own)
    x, m, _ = data.crops(dataset, np.arange(6), data.no_augmentation(6), 40, CPU, dataset.masks)
    for ours, stored in ((x.permute(0, 2, 3, 1), dataset.images), (m[:, 0], dataset.masks)):
        assert np.allclose(255 * ours.numpy(), stored[:][:, 5:45, 5:45], atol=0.01)


def test_warp_repeats_the_edge():
    image, A = torch.rand(1, 3, 20, 20), torch.tensor([[[1.0, 0, 10], [0, 1, 10]]])  # right and down, 10 px
    moved = torch.nn.functional.pad(image, (10, 10, 10, 10), mode="replicate")
    assert torch.allclose(data.warp(image, A, 40), moved, atol=1e-5)


def test_transformed_intrinsics_project_to_transformed_points(dots):
    parameters = torch.from_numpy(data.augmentation(np.random.default_rng(1), 12, 0))
    A = data.crop_transform(parameters, 100, 1.25, 64)
    keypoints, K = (torch.from_numpy(array[np.arange(12)]) for array in (dots.keypoints, dots.intrinsics))
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
    p[:, 4], p[:, 5], p[:, 6], p[:, 8] = 1.2, 0.5, 0.5, 1.1  # in this order
    mean = (1.2 * green).mean(dim=(1, 2, 3), keepdim=True)
    contrasted = (1.2 * green + mean) / 2
    expected = (contrasted + contrasted.mean(dim=1, keepdim=True)) / 2
    assert torch.allclose(data.colour_jitter(x, p), expected, atol=1e-6)


def test_normalise_and_back():
    x, mean = torch.rand(2, 3, 4, 4), torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    assert torch.allclose(data.denormalise(data.normalise(x)), x, atol=1e-6)
    assert torch.allclose(data.normalise(mean), torch.zeros(1), atol=1e-6)
