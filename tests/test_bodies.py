"""The embedded benchmark of bodies: labels, masks, anatomy, domains; MPJPE; --task human from end to end."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODER, HEAD, SEGMENTATION, TINY
from publishers import projected

import evaluate
import train_finetune
import train_pretrain
from support import rendering
from support.convert import body_fault
from support.folder import ARRAYS, HUMAN, HUMAN_JOINTS
from support.rendering import BENCHMARK, KINDS, render_chunk
from support.run import random_generator

JOINT = {name: i for i, name in enumerate(HUMAN_JOINTS)}
N = 150


def bodies(domain: str, count: int, side: int) -> dict:
    return rendering.render("bodies", random_generator(0, "test bodies"), domain, count, side)


@pytest.fixture(scope="module", params=["source", "target"])
def rendered(request) -> dict:
    return bodies(request.param, N, 60)


def bone(keypoints: np.ndarray, a: str, b: str) -> np.ndarray:
    """From joint a to joint b, (n, 3) mm."""
    return keypoints[:, JOINT[b]] - keypoints[:, JOINT[a]]


# ==== Labels, masks, anatomy ==============================================================================
def test_rendered_bodies_are_human(rendered):
    """Bones of a human's length, limbs that bend the way limbs do; not so of mirror images."""
    k = rendered["keypoints"].astype(float)
    assert all(body_fault(pose) is None for pose in k)
    assert np.mean([body_fault(pose * [-1, 1, 1]) is None for pose in k]) < 0.3
    for a, b in (("hip", "knee"), ("knee", "ankle"), ("shoulder", "elbow"), ("elbow", "wrist")):
        right, left = (np.linalg.norm(bone(k, f"{s}_{a}", f"{s}_{b}"), axis=-1) for s in ("right", "left"))
        assert right.std() > 10 and np.allclose(left, right, atol=0.5), f"{a}: one arm or leg is longer"
    assert 2900 < k[:, :, 2].mean(1).min() and k[:, :, 2].mean(1).max() < 6100  # mm from the camera


def share_on_mask(arrays: dict, uv: np.ndarray) -> float:
    column, row = np.clip(np.round(uv), 0, 59).astype(int).transpose(2, 0, 1)
    return float((arrays["masks"][np.arange(N)[:, None], row, column] >= 128).mean())


def test_joints_lie_on_the_mask_in_a_crop_as_that_of_the_readers(rendered):
    uv = projected(rendered["keypoints"], rendered["intrinsics"])
    inner = [i for name, i in JOINT.items() if name not in ("head", "nose")]  # those lie at its edge
    assert share_on_mask(rendered, uv[:, inner]) > 0.97 and share_on_mask(rendered, uv) > 0.93
    for wrong in (59 - uv, uv + 4, uv[..., ::-1], np.roll(uv, 1, axis=0)):
        assert share_on_mask(rendered, wrong[:, inner]) < 0.75
    assert np.allclose((uv.min(1) + uv.max(1)) / 2, 29.5, atol=0.01)
    assert np.allclose((uv.max(1) - uv.min(1)).max(1), 60 / (1.25 * 1.25), atol=0.01)


# ==== Domains, folders, determinism =======================================================================
def views(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the camera looks down on the trunk, and heading, 0 facing the camera, degrees."""
    left = k[:, JOINT["left_hip"]] - k[:, JOINT["right_hip"]]
    down = np.degrees(np.arcsin(-bone(k, "pelvis", "spine")[:, 2] / np.linalg.norm(
        bone(k, "pelvis", "spine"), axis=-1)))
    return down, np.degrees(np.arctan2(-left[:, 2], left[:, 0]))


def test_domains_differ():
    source, target = (bodies(domain, N, 60)["keypoints"] for domain in ("source", "target"))
    (down_s, heading_s), (down_t, heading_t) = views(source), views(target)
    assert down_t.mean() > down_s.mean() + 5
    assert np.abs(heading_s).max() < 75 and abs(heading_s.mean()) < 8  # never from behind
    assert 20 < abs(heading_t.mean()) < 40 and (np.abs(heading_t) > 65).mean() > 0.1


def test_folders_share_no_pose():
    poses = {}
    for name, (domain, _) in BENCHMARK.items():
        if not domain:
            continue
        k = render_chunk(("bodies", name, 0, 16))[0]["keypoints"]
        poses[name] = np.linalg.norm(k[:, [2, 3, 12, 13]] - k[:, :1], axis=-1)  # (50, 4) mm, any view
    assert len(poses) == 6
    for a in poses:
        for b in poses:
            apart = np.abs(poses[a][:, None] - poses[b]).max(-1) + 99 * np.eye(50) * (a == b)
            assert apart.min() > 0.05, f"{a} and {b} share a body"


def test_rendering_is_deterministic_and_kinds_differ():
    a, b = (render_chunk(("bodies", "source_val", 3, 30))[0] for _ in range(2))
    assert all(np.array_equal(a[name], b[name]) for name in ARRAYS)
    x_c = [render_chunk((kind, "unconstrained", 0, 30))[0]["images"] for kind in KINDS]
    assert not np.array_equal(*x_c)


# ==== MPJPE ===============================================================================================
@pytest.mark.parametrize("compare", [None, [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]])
def test_mpjpe_is_over_the_listed_joints(compare):
    """By the definition; the root, always 0, and joints that are not listed do not count."""
    truth = torch.randn(9, 17, 3) * 300 + torch.tensor([0, 0, 4000.0])
    predicted = truth + torch.randn(9, 17, 3) * 60
    meta, joints = HUMAN | ({"compare": compare} if compare else {}), compare or list(range(1, 17))
    result = evaluate.pose_metrics(predicted, truth, meta)
    apart = torch.linalg.norm((predicted - predicted[:, :1]) - (truth - truth[:, :1]), dim=-1)  # (9, 17) mm
    assert result["epe"] == pytest.approx(float(apart[:, joints].mean()), rel=1e-5)
    predicted[:, [i for i in range(1, 17) if i not in joints]] += 500
    assert evaluate.pose_metrics(predicted, truth, meta)["pa_epe"] == pytest.approx(result["pa_epe"])


def test_errors_in_the_plane_in_depth_and_aligned_by_hand():
    """Root aligned: a shift of all costs nothing; x, y on the one hand and z on the other, of 16 joints."""
    truth = torch.randn(5, 17, 3) * 300 + torch.tensor([0, 0, 4000.0])
    predicted = truth + torch.tensor([7.0, -8.0, 90.0])
    predicted[:, 3] += torch.tensor([3.0, 4.0, 0.0])
    predicted[:, 5] -= torch.tensor([0.0, 0.0, 48.0])
    result = evaluate.pose_metrics(predicted, truth, HUMAN)
    found = [result[key] for key in ("in_plane", "depth", "epe")]
    assert found == pytest.approx([5 / 16, 48 / 16, 53 / 16], abs=1e-3)
    result = evaluate.pose_metrics(1.2 * truth + 70, truth, HUMAN)
    assert result["pa_epe"] < 0.1 and 20 < result["pa_rigid"] < 200


def test_chance_is_over_the_same_joints():
    class Labelled:
        meta, keypoints = HUMAN, np.random.default_rng(0).normal(0, 300, (20, 17, 3)).astype(np.float32)
    relative = Labelled.keypoints - Labelled.keypoints[:, :1]
    expected = np.linalg.norm(relative - relative.mean(0), axis=-1)[:, 1:].mean()
    assert evaluate.mean_pose_error(Labelled, 20, Labelled) == pytest.approx(expected, rel=1e-5)


# ==== --task human ========================================================================================
def test_human_from_nothing_to_table_and_pictures(tmp_path, monkeypatch, capsys):
    """The three commands, with --task human and no folder named: renders, trains, measures, draws."""
    monkeypatch.chdir(tmp_path)
    few = {name: (domain, 24) for name, (domain, _) in BENCHMARK.items()}
    monkeypatch.setattr(rendering, "BENCHMARK", few)
    assert not train_pretrain.main(["--task", "human", "--epochs", "1", *TINY, *DECODER, *SEGMENTATION])
    tune = ["--task", "human", "--epochs", "2", *TINY, *HEAD]
    assert not train_finetune.main(tune) and not train_finetune.main(tune + ["--variant", "scratch"])
    assert not evaluate.main(["--device", "cpu", "--threads", "1"])
    text = capsys.readouterr().out
    for words in ("target MPJPE", "full", "scratch", "16 of 17 joints: right_hip"):
        assert words in text
    assert not (tmp_path / "datasets/hands").exists()
    result = json.loads((tmp_path / "runs/tiny-human/full-seed0/result.jsonl").read_text())
    assert result["metric"] == "MPJPE" and "pelvis" not in result["target"]["compared"]
    assert result["target"]["epe"] == pytest.approx(np.mean(result["target"]["per_joint"][1:]), abs=0.01)
    drawn = {path.stem for path in Path("runs/pictures").iterdir()}
    assert {"poses", "attention", "curves"} <= drawn
    assert not evaluate.main(["--table", "--rigid", "--all", "runs"])
    assert "rigid PA-MPJPE" in capsys.readouterr().out
