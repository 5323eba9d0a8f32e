"""The seven transfers of the paper, each from the publishers' files to a metric on its target.

The files are those that the readers' own tests write, in the publishers' layouts and formats; networks and
schedules are as small as can be. What is true of a fixture is known from how it was drawn, not from a reader:
so an oracle that answers the drawn poses must be right in millimetres.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import publishers
import pytest
import torch
from conftest import DECODER, HEAD, SEGMENTATION, TINY
from PIL import Image
from publishers import GAN_FOLDERS, MPI_ENLARGED, command

import data
import evaluate
import train_finetune
import train_pretrain
import udapose
from support.folder import Dataset, read_meta
from support.readers import _3dhp, _3dpw, freihand, gan, h36m, imagenet, pan, rhd, stb, surreal
from support.run import random_generator

CPU = torch.device("cpu")
HANDS = ["wrist"] + [f"{name}_{i}" for name in ("thumb", "index", "middle", "ring", "little")
                     for i in (1, 2, 3, 4)]
SMPL = ["right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "thorax",
        "left_shoulder", "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist"]
MPI = SMPL[:6] + ["spine", "thorax", "nose", "head"] + SMPL[7:]
ONLY_SMPL = "13 joints of SMPL (hips, knees, ankles, neck, shoulders, elbows, wrists) from its pelvis"


def gan_test() -> np.ndarray:
    """Those folders that half of the draws make a test set."""
    chosen = [f for f in GAN_FOLDERS if random_generator(0, f"gan data/{f}").random() < 0.5]
    assert 0 < len(chosen) < len(GAN_FOLDERS)
    return publishers.gan_truth(chosen)[0]


TRANSFERS = {  # target: its source, flags of its train half, of its test half, drawn poses (n, K, 3) mm of
    # the test half, names of the joints that errors are taken over, words of the protocol
    "stb": ("freihand", [], ["--split", "test"],
            lambda: publishers.stb_truth(["B1Counting", "B1Random"], "BB_left", "BB_right")[0], HANDS, ""),
    "rhd": ("freihand", [], ["--split", "evaluation"],
            lambda: publishers.rhd_truth("evaluation")[0], HANDS, ""),
    "pan": ("freihand", ["--stride", 1], ["--split", "test", "--stride", 1],
            lambda: publishers.pan_truth("171204_pose3")[0], HANDS, ""),
    "gan": ("freihand", ["--share", 0.5], ["--split", "test", "--share", 0.5], gan_test, HANDS, ""),
    "3dpw": ("h36m", [], ["--split", "test"],
             lambda: publishers.pw3d_truth("downtown_walk_00", "outdoors_up_01"), SMPL, ONLY_SMPL),
    "3dhp": ("h36m", ["--cameras", "0,4", "--stride", 1], ["--split", "test"],
             lambda: MPI_ENLARGED * publishers.mpi_truth("test"), MPI, "16 joints; the pelvis is aligned"),
    "surreal": ("h36m", ["--frames", "all"], ["--split", "val"],
                lambda: publishers.surreal_truth("val", lambda crowd: crowd[(len(crowd) - 1) // 2:][:1]),
                SMPL, ONLY_SMPL),
}
READERS = {reader.__name__.rpartition(".")[2].lstrip("_"): reader for reader in (
    freihand, stb, rhd, pan, gan, h36m, _3dpw, _3dhp, surreal, imagenet)}


@pytest.fixture
def root(name, request) -> Path:
    """The target's files as its publisher ships them."""
    return request.getfixturevalue({"3dpw": "pw3d", "3dhp": "mpi"}.get(name, name) + "_root")


def convert(name: str, root: Path, out: Path, *flags) -> Dataset:
    return command(READERS[name], root, out, *flags, side=48)


SMALL = ["--patch", "8", "--micro-batch", "0", "--epochs", "0.1"]


@pytest.fixture(scope="module")
def sources(request, tmp_path_factory):
    """(name) -> folder with X_C and, converted once, both halves of the source of that name."""
    top, photos = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("publisher") / "val"
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(60, 80, 3), (75, 50, 3), (64, 64)]):  # the last one is grey
        path = photos / f"n0144{i}/ILSVRC2012_val_{i + 1:08d}.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path, "JPEG")
    convert("imagenet", photos, top / "imagenet_val")

    def folder(name: str) -> Path:
        test = "evaluation" if name == "freihand" else "test"
        for half, split in (("train", "train"), ("test", test)):
            if not (top / f"{name}_{half}").exists():
                root = request.getfixturevalue(f"{name}_root")
                convert(name, root, top / f"{name}_{half}", "--split", split)
        return top
    return folder


def train(source: str, top: Path, target: Path, runs: Path) -> None:
    """Both stages at the paper's preset, in small; what the target's folder holds beside images is spoilt."""
    for name in ("keypoints", "intrinsics", "masks"):
        (target / f"{name}.npy").write_bytes(b"not to be opened")
    preset = "paper-hand" if source == "freihand" else "paper-human"
    both = ["--preset", preset, "--source", f"{top}/{source}_train", "--target", str(target)]
    assert not train_pretrain.main([*both, *TINY, *DECODER, *SEGMENTATION, *SMALL, "--unconstrained",
                                    f"{top}/imagenet_val", "--out", f"{runs}/pretrain-full"])
    assert not train_finetune.main([*both, *TINY, *HEAD, *SMALL, "--init", f"{runs}/pretrain-full",
                                    "--out", f"{runs}/full"])


class Oracle:
    """Stands for f^E with f^H: decodes heatmaps of known poses (n, K, 3) mm, row by row of a data set."""
    image, head, sigma = 48, SimpleNamespace(side=24), 1.8

    def __init__(self, poses: np.ndarray, dataset: Dataset):
        self.poses, self.dataset, self.asked = poses, dataset, 0

    def centres(self, x: torch.Tensor) -> torch.Tensor:
        rows = np.arange(self.asked, self.asked + len(x))
        self.asked += len(x)
        poses = torch.from_numpy(np.nan_to_num(self.poses[rows], nan=1000.0)).float()  # (b, K, 3) mm
        _, _, A = data.crops(self.dataset, rows, data.no_augmentation(len(rows)), self.image, CPU)
        K = data.transform_intrinsics(A, torch.from_numpy(self.dataset.intrinsics[rows]))
        centres, _ = udapose.to_voxels(udapose.project(poses, K), poses[..., 2] - poses[:, :1, 2], self.image,
                                 self.dataset.meta["depth_range"], self.head.side)  # (b, K, 3)
        return udapose.decode_heatmaps(udapose.true_heatmaps(centres, self.head.side, self.sigma))


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfer(name, root, sources, tmp_path, capsys):
    """From the publishers' files to the row of a table, whose error is that of the drawn poses.

    And drawn pose -> heatmap -> voxel -> mm -> error is 0.
    """
    source, train_flags, test_flags, truth, names, protocol = TRANSFERS[name]
    top, runs, truth = sources(source), tmp_path / "runs", truth()
    K, depth_range, error = (21, 300, "EPE") if source == "freihand" else (17, 2000, "MPJPE")
    target = convert(name, root, tmp_path / "train", *train_flags)
    test = convert(name, root, tmp_path / "test", *test_flags)
    assert len(test) == len(truth)
    assert not {pose.tobytes() for pose in target.keypoints} & {pose.tobytes() for pose in test.keypoints}
    oracle = evaluate.measure_pose(Oracle(truth, test), test, Oracle.image, CPU)
    assert max(oracle["epe"], oracle["pa_epe"], oracle["pa_rigid"]) < 0.01  # mm; a voxel has 12 or 83
    train(source, top, target.folder, runs)
    capsys.readouterr()
    assert not evaluate.main([str(runs), "--source-test", f"{top}/{source}_test", "--target-test",
                              str(test.folder), "--pictures", "none", "--threads", "1", "--device", "cpu"])

    text, result = capsys.readouterr().out, json.loads((runs / "full/result.jsonl").read_text())
    found, joints = result["target"], read_meta(top / f"{source}_train")["joints"]
    estimator, state = evaluate.load_estimator(runs / "full/checkpoint.pt", CPU)
    assert (len(joints), state["skeleton"]["depth_range"]) == (K, depth_range)  # the source's
    assert state["skeleton"]["joints"] == joints and estimator.head.conv.out_channels == K * 24
    assert found["compared"].startswith(f"{len(names)} of {K} joints") and found["images"] == len(truth)
    with torch.no_grad():
        predicted, _ = data.predict(estimator, test, np.arange(len(test)), 48, CPU)
    apart = (predicted.numpy() - predicted.numpy()[:, :1]) - (truth - truth[:, :1])  # the root at 0
    expected = np.linalg.norm(apart, axis=-1)[:, [joints.index(name) for name in names]].mean()
    assert found["epe"] == pytest.approx(expected, abs=0.02) and result["metric"] == error
    assert 0 < found["pa_epe"] < found["epe"] and result["source"]["epe"] > 0
    for words in (f"target {error}", f"{expected:.1f}", protocol):
        assert words in text
    assert protocol in found["protocol"]
