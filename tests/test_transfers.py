"""The seven transfers of the paper, each from the publishers' files to a metric on its target.

The files are those that the readers' own tests write, in the publishers' layouts and formats; networks and
schedules are as small as can be. What is true of a fixture is known from how it was drawn, not from a reader:
so an oracle that answers the drawn poses must be right in millimetres, and wrong once a reader slips.
"""
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_body_readers import MPI_ENLARGED, mpi_truth, pw3d_truth, surreal_truth
from test_body_readers import fast, h36m, mpi, pw3d, surreal  # noqa: F401, fixtures
from test_data import freihand, hands  # noqa: F401, fixtures
from test_hand_readers import GAN_FOLDERS, MIRROR, RHD_RAW, gan_truth, pan_truth, rhd_hands, stb_truth
from test_hand_readers import gan, pan, rhd, stb  # noqa: F401, fixtures
from test_readers import SWAP

import data
import evaluate
import train_finetune
import train_pretrain
import udapose as u

CPU = torch.device("cpu")
HAND = ["wrist"] + [f"{name}_{i}" for name in ("thumb", "index", "middle", "ring", "little")
                    for i in (1, 2, 3, 4)]
SMPL = ["right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "thorax",
        "left_shoulder", "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist"]
MPI = SMPL[:6] + ["spine", "thorax", "nose", "head"] + SMPL[7:]
ONLY_SMPL = "13 joints of SMPL (hips, knees, ankles, neck, shoulders, elbows, wrists) from its pelvis"


def rhd_test() -> np.ndarray:
    left, right, near = rhd_hands("evaluation")
    return np.where(near[:, None, None], left * MIRROR, right)


def gan_test() -> np.ndarray:
    """Those folders that half of the draws make a test set."""
    chosen = [f for f in GAN_FOLDERS if u.random_generator(0, f"gan data/{f}").random() < 0.5]
    assert 0 < len(chosen) < len(GAN_FOLDERS)
    return gan_truth(chosen)[0]


TRANSFERS = {  # target: its source, flags of its train half, of its test half, drawn poses (n, K, 3) mm of
    # the test half, names of the joints that errors are taken over, words of the protocol
    "stb": ("freihand", [], ["--split", "test"],
            lambda: stb_truth(["B1Counting", "B1Random"], "BB_left", "BB_right")[0], HAND, ""),
    "rhd": ("freihand", [], ["--split", "evaluation"], rhd_test, HAND, ""),
    "pan": ("freihand", ["--stride", 1], ["--split", "test", "--stride", 1],
            lambda: pan_truth("171204_pose3")[0], HAND, ""),
    "gan": ("freihand", ["--share", 0.5], ["--split", "test", "--share", 0.5], gan_test, HAND, ""),
    "3dpw": ("h36m", [], ["--split", "test"], lambda: pw3d_truth("downtown_walk_00", "outdoors_up_01"), SMPL,
             ONLY_SMPL),
    "3dhp": ("h36m", ["--cameras", "0,4", "--stride", 1], ["--split", "test"],
             lambda: MPI_ENLARGED * mpi_truth("test"), MPI, "16 joints; the pelvis is aligned"),
    "surreal": ("h36m", ["--frames", "all"], ["--split", "val"],
                lambda: surreal_truth("val", lambda people: people[len(people) // 2:][:1]), SMPL, ONLY_SMPL),
}
SOURCES = {  # preset, test split, K, depth range in mm, error
    "freihand": ("paper-hand", "evaluation", 21, 300.0, "EPE"),
    "h36m": ("paper-human", "test", 17, 2000.0, "MPJPE")}


@pytest.fixture
def root(name, request) -> Path:
    """The target's files as its publisher ships them."""
    return request.getfixturevalue({"3dpw": "pw3d", "3dhp": "mpi"}.get(name, name))


def convert(name: str, root: Path, out: Path, *flags) -> data.Dataset:
    data.main([name, str(root), str(out), "--side", "48", "--workers", "1", *map(str, flags)])
    return data.Dataset(out, *([] if name == "imagenet" else ["keypoints", "intrinsics"]))


# ==========================================================================================================
# The four commands
# ==========================================================================================================
NETWORK = ["--device", "cpu", "--precision", "float32", "--threads", "1", "--image", "32", "--patch", "8",
           "--width", "16", "--depth", "2", "--heads", "2", "--batch", "8", "--micro-batch", "0",
           "--epochs", "0.1"]


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory):
    """(name) -> folder with X_C and, converted once, both halves of the source of that name."""
    top, done = tmp_path_factory.mktemp("datasets"), set()
    photos, rng = tmp_path_factory.mktemp("publisher") / "val", np.random.default_rng(0)
    for i, shape in enumerate([(60, 80, 3), (75, 50, 3), (64, 64)]):          # the last one is grey
        path = photos / f"n0144{i}/ILSVRC2012_val_{i + 1:08d}.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path, "JPEG")
    convert("imagenet", photos, top / "imagenet_val")

    def folder(name: str) -> Path:
        for split in {"train", SOURCES[name][1]} if name not in done else ():
            convert(name, request.getfixturevalue(name), top / f"{name}_{split}", "--split", split)
        done.add(name)
        return top
    return folder


def train(source: str, top: Path, target: Path, runs: Path) -> None:
    """Both stages at the paper's preset, in small; what the target's folder holds beside images is spoilt."""
    for name in ("keypoints", "intrinsics", "masks"):
        (target / f"{name}.npy").write_bytes(b"not to be opened")
    both = ["--preset", SOURCES[source][0], "--source", f"{top}/{source}_train", "--target", str(target)]
    assert train_pretrain.main([*both, *NETWORK, "--unconstrained", f"{top}/imagenet_val", "--out",
                                f"{runs}/pretrain-full", "--decoder-width", "16", "--decoder-heads", "2",
                                "--seg-channels", "4", "--seg-steps", "2", "--seg-batch", "4"]) == 0
    assert train_finetune.main([*both, *NETWORK, "--init", f"{runs}/pretrain-full", "--out", f"{runs}/full",
                                "--head-channels", "8", "--warmup", "1"]) == 0


def error_over(names: list[str], joints: list[str], predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance, mm, over the joints of these names, the first joint of both at 0: by the definition."""
    apart = (predicted - predicted[:, :1]) - (truth - truth[:, :1])
    return float(np.nanmean(np.sqrt((apart ** 2).sum(-1))[:, [joints.index(name) for name in names]]))


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfer(name, root, sources, tmp_path, capsys):
    """From the publishers' files to the row of a table, whose error is that of the drawn poses."""
    source, train_flags, test_flags, truth, names, protocol = TRANSFERS[name]
    _, split, K, depth_range, error = SOURCES[source]
    top, runs = sources(source), tmp_path / "runs"
    target = convert(name, root, tmp_path / "train", *train_flags)
    test = convert(name, root, tmp_path / "test", *test_flags)
    assert not {pose.tobytes() for pose in target.keypoints} & {pose.tobytes() for pose in test.keypoints}
    train(source, top, target.folder, runs)
    capsys.readouterr()
    assert evaluate.main([str(runs), "--source-test", f"{top}/{source}_{split}", "--target-test",
                          str(test.folder), "--pictures", "none", "--threads", "1", "--device", "cpu"]) == 0

    text, result = capsys.readouterr().out, json.loads((runs / "full/result.json").read_text())
    found, joints = result["target"], data.read_meta(top / f"{source}_train")["joints"]
    estimator, state = evaluate.load_estimator(runs / "full/checkpoint.pt", CPU)
    assert (len(joints), state["skeleton"]["depth_range"]) == (K, depth_range)           # the source's
    assert state["skeleton"]["joints"] == joints and estimator.head.conv.out_channels == K * 16
    assert found["compared"] == names and found["images"] == len(truth())
    with torch.no_grad(): predicted, _ = data.predict(estimator, test, np.arange(len(test)), 32, CPU)
    expected = error_over(names, joints, predicted.numpy(), truth())
    assert found["epe"] == pytest.approx(expected, abs=0.02) and result["metric"] == error
    p, t = (x[:, [joints.index(name) for name in names]] for x in (predicted.numpy(), truth()))
    moved = (p - p.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))   # not the best way
    assert 0 < found["pa_epe"] < np.linalg.norm(moved, axis=-1).mean() and result["source"]["epe"] > 0
    for words in (f"target {error}", f"target PA-{error}", f" {expected:.1f} ", f" {found['pa_epe']:.1f} ",
                  protocol): assert words in text
    assert protocol in found["protocol"]


# ==========================================================================================================
# The oracle
# ==========================================================================================================
class Oracle:
    """Stands for f^E with f^H: decodes heatmaps of known poses (n, K, 3) mm, row by row of a data set."""
    image, head, sigma = 48, SimpleNamespace(side=24), 1.8

    def __init__(self, poses: np.ndarray, dataset: data.Dataset):
        self.poses, self.dataset, self.asked = poses, dataset, 0

    def centres(self, x: torch.Tensor) -> torch.Tensor:
        rows = np.arange(self.asked, self.asked + len(x))
        self.asked += len(x)
        poses = torch.from_numpy(np.nan_to_num(self.poses[rows], nan=1000.0)).float()    # (b, K, 3) mm
        _, _, A = data.crops(self.dataset, rows, data.no_augmentation(len(rows)), self.image, CPU)
        K = data.transform_intrinsics(A, torch.from_numpy(self.dataset.intrinsics[rows]))
        centres, _ = u.to_voxels(u.project(poses, K), poses[..., 2] - poses[:, :1, 2], self.image,
                                 self.dataset.meta["depth_range"], self.head.side)       # (b, K, 3)
        return u.decode_heatmaps(u.target_heatmaps(centres, self.head.side, self.sigma))


def oracle_errors(name: str, root: Path, out: Path) -> dict:
    """What evaluate.py measures of an estimator that answers every drawn pose of a target's test half."""
    _, _, flags, truth, _, _ = TRANSFERS[name]
    test = convert(name, root, out, *flags)
    assert len(test) == len(truth())
    return evaluate.measure_pose(Oracle(truth(), test), test, Oracle.image, CPU)


def slip(monkeypatch, name: str, change) -> None:
    """A mistake in a reader: its joints (K, 3) go through change(), and the conversion's checks are off."""
    reader, *rest = data.READERS[name]

    def wrong(*arguments, **options):
        count, samples = reader(*arguments, **options)
        return count, (s._replace(keypoints=change(s.keypoints)) for s in samples)
    wrong.__signature__ = inspect.signature(reader)
    monkeypatch.setitem(data.READERS, name, (wrong, *rest))
    monkeypatch.setattr(data, "fault_of", lambda *_: None)


@pytest.mark.parametrize("name", TRANSFERS)
def test_an_oracle_is_right_and_tells_a_slip(name, root, tmp_path, monkeypatch):
    """Drawn pose -> heatmap -> voxel -> mm -> error is 0; not so of a reader with another order or unit."""
    hand, found = TRANSFERS[name][0] == "freihand", oracle_errors(name, root, tmp_path / "right")
    assert max(found["epe"], found["pa_epe"], found["pa_rigid"]) < 0.01       # mm; a voxel has 12 or 83
    for what, change in (("order", lambda k: k[RHD_RAW if hand else SWAP]), ("unit", lambda k: k / 1000)):
        with monkeypatch.context() as patch:
            slip(patch, name, change)
            assert oracle_errors(name, root, tmp_path / what)["epe"] > (20 if hand else 60), what
