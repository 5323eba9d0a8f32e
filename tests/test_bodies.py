"""The embedded benchmark of bodies: labels, masks, anatomy, domains; MPJPE; --task human from end to end."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import evaluate
import train_finetune
import train_pretrain
import udapose as u

JOINT = {name: i for i, name in enumerate(data.HUMAN_JOINTS)}
N = 150


def bodies(domain: str, count: int, side: int, seed: int = 0, **look) -> dict:
    """Rendered bodies, with some choices of the domain's look changed."""
    kind, changed = data.KINDS["bodies"], data.HUMAN_DOMAINS[domain] | look
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.KINDS, "bodies", kind._replace(domains={domain: changed}))
        return data.render("bodies", u.random_generator(seed, "test bodies"), domain, count, side)


@pytest.fixture(scope="module", params=["source", "target"])
def rendered(request) -> dict:
    return bodies(request.param, N, 60)


def uv_of(arrays: dict) -> np.ndarray:
    return u.project(torch.tensor(arrays["keypoints"]), torch.tensor(arrays["intrinsics"])).numpy()


def bone(keypoints: np.ndarray, a: str, b: str) -> np.ndarray:
    """From joint a to joint b, (n, 3) mm."""
    return keypoints[:, JOINT[b]] - keypoints[:, JOINT[a]]


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between (n, 3) and (n, 3), degrees."""
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# ==========================================================================================================
# Labels and masks
# ==========================================================================================================
def share_on_mask(arrays: dict, uv: np.ndarray) -> float:
    column, row = np.clip(np.round(uv), 0, 59).astype(int).transpose(2, 0, 1)
    return float((arrays["masks"][np.arange(N)[:, None], row, column] >= 128).mean())


def test_joints_lie_on_the_mask(rendered):
    uv = uv_of(rendered)
    inner = [i for name, i in JOINT.items() if name not in ("head", "nose")]           # those lie at its edge
    assert share_on_mask(rendered, uv[:, inner]) > 0.97 and share_on_mask(rendered, uv) > 0.93
    for wrong in (59 - uv, uv + 4, uv[..., ::-1], np.roll(uv, 1, axis=0)):
        assert share_on_mask(rendered, wrong[:, inner]) < 0.75


def test_the_mask_is_the_body_around_the_bones(rendered):
    """Bones drawn as wide as limbs, the trunk as wide as shoulders and hips, cover nearly the mask."""
    def iou(uv):
        both = either = 0
        for i in range(N):
            picture, scale = Image.new("L", (240, 240)), 4 * rendered["intrinsics"][i, 0, 0]
            draw, points = ImageDraw.Draw(picture), (uv[i] + 0.5) * 4
            per_mm = scale / rendered["keypoints"][i, 0, 2]
            for a, b in data.HUMAN_BONES:
                draw.line([tuple(points[a]), tuple(points[b])], fill=255, width=max(2, round(100 * per_mm)))
            draw.polygon([tuple(points[JOINT[n]]) for n in ("right_hip", "left_hip", "left_shoulder",
                                                            "right_shoulder")], fill=255)
            drawn, true = np.asarray(picture.reduce(4)) >= 128, rendered["masks"][i] >= 128
            both, either = both + (drawn & true).sum(), either + (drawn | true).sum()
        return both / either
    uv = uv_of(rendered)
    assert iou(uv) > 0.7 > 0.6 > max(iou(59 - uv), iou(uv + 3))


def test_the_crop_is_that_of_the_readers(rendered):
    uv = uv_of(rendered)
    assert np.allclose((uv.min(1) + uv.max(1)) / 2, 29.5, atol=0.01)
    assert np.allclose((uv.max(1) - uv.min(1)).max(1), 60 / (1.25 * 1.25), atol=0.01)


def test_a_body_looks_the_same_at_any_resolution():
    coarse, fine = (bodies("source", 12, side) for side in (60, 120))
    assert np.allclose(coarse["keypoints"], fine["keypoints"])
    small = fine["masks"].reshape(12, 60, 2, 60, 2).mean((2, 4)) >= 128
    assert ((coarse["masks"] >= 128) & small).sum() / ((coarse["masks"] >= 128) | small).sum() > 0.93


# ==========================================================================================================
# Anatomy
# ==========================================================================================================
LENGTHS = {"hip knee": (340, 560), "knee ankle": (330, 540), "shoulder elbow": (220, 380),
           "elbow wrist": (190, 340)}                                                  # mm


def test_bone_lengths_are_human(rendered):
    k = rendered["keypoints"].astype(float)
    for ends, (low, high) in LENGTHS.items():
        right, left = (np.linalg.norm(bone(k, *(f"{side}_{e}" for e in ends.split())), axis=-1)
                       for side in ("right", "left"))
        assert low < right.min() and right.max() < high and right.std() > 10, ends
        assert np.allclose(left, right, atol=0.5), f"{ends}: one arm or leg is longer"
    trunk = np.linalg.norm(bone(k, "pelvis", "spine"), axis=-1) + np.linalg.norm(bone(k, "spine", "thorax"),
                                                                                 axis=-1)
    leg = np.linalg.norm(bone(k, "right_hip", "right_knee"), axis=-1) + np.linalg.norm(
        bone(k, "right_knee", "right_ankle"), axis=-1)
    assert (np.abs(leg / trunk - 1.77) < 0.35).all()
    assert 2900 < k[:, :, 2].mean(1).min() and k[:, :, 2].mean(1).max() < 6100          # mm from the camera


def frame_of(k: np.ndarray) -> tuple:
    """Of the trunk: to the body's left, up, and forwards, (n, 3) each."""
    left = bone(k, "right_hip", "left_hip")
    up = bone(k, "pelvis", "spine")
    return left, up, np.cross(left, up)


def test_joints_bend_as_far_and_the_way_joints_do(rendered):
    k = rendered["keypoints"].astype(float)
    left, up, front = frame_of(k)
    for side, sign in (("right", 1), ("left", -1)):
        thigh, shin = bone(k, f"{side}_hip", f"{side}_knee"), bone(k, f"{side}_knee", f"{side}_ankle")
        arm, fore = bone(k, f"{side}_shoulder", f"{side}_elbow"), bone(k, f"{side}_elbow", f"{side}_wrist")
        knee, elbow = angle(thigh, shin), angle(arm, fore)
        assert knee.max() < 141 and elbow.max() < 146 and knee.std() > 15 and elbow.std() > 15
        axis = np.cross(thigh, shin)                                        # to the left, if bent backwards
        bent = knee > 25
        assert bent.sum() > 30 and ((axis * left).sum(-1)[bent] > 0).mean() > 0.99
        axis, bent = np.cross(arm, fore), elbow > 25                        # to the right, but the arm turns
        assert ((axis * left).sum(-1)[bent] < 0).mean() > 0.9
        assert angle(-up, thigh).max() < 135                                # hip: 120 and the waist's bend
        for limb, across in ((thigh, left), (arm, bone(k, "right_shoulder", "left_shoulder"))):
            assert angle(-sign * across, limb).mean() < 87                  # limbs are held outwards
    nose = bone(k, "thorax", "nose")
    assert angle(bone(k, "spine", "thorax"), bone(k, "thorax", "head")).max() < 45
    assert ((nose * front).sum(-1) > 0).all()


def test_left_is_left():
    """Facing the camera a body's right is at the left of the picture; from behind it is not."""
    for yaw, sign in (((-40, 40), 1), ((140, 220), -1)):
        arrays = bodies("source", N, 60, yaw=yaw, pitch=(0, 0), roll=(0, 0))
        x = uv_of(arrays)[..., 0]
        for name in ("hip", "shoulder"):
            assert (sign * (x[:, JOINT[f"left_{name}"]] - x[:, JOINT[f"right_{name}"]]) > 0).mean() > 0.97
        away = arrays["keypoints"][:, JOINT["nose"], 2] - arrays["keypoints"][:, JOINT["thorax"], 2]
        assert (sign * away < 0).mean() > 0.95                              # the nose towards the camera
    mirrored = arrays["keypoints"] * np.float32([-1, 1, 1])
    _, _, front = frame_of(mirrored)
    assert ((bone(mirrored, "thorax", "nose") * front).sum(-1) < 0).all()   # what the tests would see


def test_the_picture_shows_the_side_that_the_labels_say():
    """Skin in the face and dark hair at the back: the head of a body that faces the camera is lighter."""
    def brightness(yaw):
        arrays = bodies("source", N, 60, yaw=yaw, hair=[(10, 10, 10)], blur=(0, 0))
        column, row = np.round(uv_of(arrays)[:, [JOINT["nose"], JOINT["head"]]].mean(1)).astype(int).T
        return arrays["images"][np.arange(N), row, column].mean(-1)
    assert np.median(brightness((-20, 20))) > 1.5 * np.median(brightness((160, 200)))


def test_activities_differ(rendered):
    """Standing, sitting, crouching, arms up: all there."""
    k = rendered["keypoints"].astype(float)
    _, up, _ = frame_of(k)
    knee = angle(bone(k, "left_hip", "left_knee"), bone(k, "left_knee", "left_ankle"))
    hip = angle(-up, bone(k, "left_hip", "left_knee"))
    arm = angle(-up, bone(k, "left_shoulder", "left_elbow"))
    assert 0.1 < ((knee > 60) & (hip > 50)).mean() < 0.5 and 0.3 < (knee < 30).mean() < 0.9
    assert 0.08 < (arm > 120).mean() < 0.4 and 0.15 < (arm < 30).mean()


# ==========================================================================================================
# Domains, folders, determinism
# ==========================================================================================================
def views(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the camera looks down on the trunk, and heading, 0 facing the camera, degrees."""
    left = k[:, JOINT["left_hip"]] - k[:, JOINT["right_hip"]]
    down = np.degrees(np.arcsin(-bone(k, "pelvis", "spine")[:, 2] / np.linalg.norm(
        bone(k, "pelvis", "spine"), axis=-1)))
    return down, np.degrees(np.arctan2(-left[:, 2], left[:, 0]))


def test_domains_differ_and_poses_do_not():
    source, target = (bodies(domain, 300, 60) for domain in ("source", "target"))
    (down_s, heading_s), (down_t, heading_t) = views(source["keypoints"]), views(target["keypoints"])
    assert down_t.mean() > down_s.mean() + 5
    assert np.abs(heading_s).max() < 75 and abs(heading_s.mean()) < 8       # never from behind
    assert 20 < abs(heading_t.mean()) < 40 and (np.abs(heading_t) > 65).mean() > 0.1
    flexion = [angle(bone(k, "left_hip", "left_knee"), bone(k, "left_knee", "left_ankle"))
               for k in (source["keypoints"], target["keypoints"])]
    assert abs(flexion[0].mean() - flexion[1].mean()) < 8
    def colourfulness(arrays):
        images, on = arrays["images"].astype(float), arrays["masks"] >= 128
        return [np.ptp(images, axis=-1)[where].mean() + images.std(axis=(1, 2)).mean() for where in (on, ~on)]
    on, off = np.array(colourfulness(target)) / np.array(colourfulness(source))
    assert on > 1.1 and off > 1.04                 # 0.99 off the body before the source's scenery


def test_scenery_of_bodies_is_a_third_of_the_way():
    """From the source's clutter, share 0, to that of the hands' target, share 1; colours are the target's."""
    calm, wild, mine = data.DOMAINS["source"], data.DOMAINS["target"], data.HUMAN_DOMAINS["target"]
    assert mine["shapes"] == 4 and mine["wall"] == wild["wall"] and mine["limbs"] == wild["limbs"]
    assert mine["stripes"] == pytest.approx(0.35 / 3) and mine["limb_chance"] == pytest.approx(0.5 / 3)
    np.testing.assert_allclose(mine["shape_size"], (0.12, 0.40))
    for share, as_in in ((0, calm | {"limb_chance": 0}), (1, wild)):
        for key in (*data.CLUTTER, "shapes"):
            np.testing.assert_allclose(data.calmed(wild, share)[key], as_in[key], atol=1e-12)


def test_folders_share_no_pose():
    poses = {}
    for name, (domain, _) in data.BENCHMARK.items():
        if not domain: continue
        k = data.render_chunk(("bodies", name, 0, 16))[0]["keypoints"]
        poses[name] = np.linalg.norm(k[:, [2, 3, 12, 13]] - k[:, :1], axis=-1)   # (50, 4) mm, any view
    assert len(poses) == 6
    for a in poses:
        for b in poses:
            apart = np.abs(poses[a][:, None] - poses[b]).max(-1) + 99 * np.eye(50) * (a == b)
            assert apart.min() > 0.05, f"{a} and {b} share a body"


def test_rendering_is_deterministic_and_kinds_differ():
    a, b = (data.render_chunk(("bodies", "source_val", 3, 30))[0] for _ in range(2))
    assert all(np.array_equal(a[name], b[name]) for name in data.SUMMED)
    other = data.render_chunk(("bodies", "source_val", 4, 30))[0]
    assert not np.array_equal(a["images"], other["images"])
    x_c = [data.render_chunk((kind, "unconstrained", 0, 30))[0]["images"] for kind in data.KINDS]
    assert not np.array_equal(*x_c)





# ==========================================================================================================
# MPJPE
# ==========================================================================================================
def slow_mpjpe(predicted, truth, joints) -> float:
    total = 0.0
    for p, t in zip(predicted.tolist(), truth.tolist()):
        for joint in joints:
            total += sum(((p[joint][c] - p[0][c]) - (t[joint][c] - t[0][c])) ** 2 for c in range(3)) ** 0.5
    return total / len(predicted) / len(joints)


@pytest.mark.parametrize("compare", [None, [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]])
def test_mpjpe_is_over_the_listed_joints(compare):
    truth = torch.randn(9, 17, 3) * 300 + torch.tensor([0, 0, 4000.0])
    predicted = truth + torch.randn(9, 17, 3) * 60
    meta = data.HUMAN | ({"compare": compare} if compare else {})
    joints = compare or list(range(1, 17))
    result = evaluate.pose_metrics(predicted, truth, meta)
    assert result["epe"] == pytest.approx(slow_mpjpe(predicted, truth, joints), rel=1e-5)
    assert result["compared"] == [data.HUMAN_JOINTS[i] for i in joints] and len(result["per_joint"]) == 17
    assert result["epe"] != pytest.approx(slow_mpjpe(predicted, truth, range(17)), rel=1e-3)  # the root, 0
    moved = predicted.clone()
    moved[:, [i for i in range(1, 17) if i not in joints]] += 500  # what is not compared does not count
    assert evaluate.pose_metrics(moved, truth, meta)["pa_epe"] == pytest.approx(result["pa_epe"])


def test_pa_mpjpe_by_similarity_and_rigid():
    truth = torch.randn(5, 17, 3) * 300 + torch.tensor([0, 0, 4000.0])
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    turn = turn * turn.det().sign()
    result = evaluate.pose_metrics(1.2 * truth @ turn + 70, truth, data.HUMAN)
    assert result["pa_epe"] < 0.1 and 20 < result["pa_rigid"] < 200
    assert evaluate.pose_metrics(truth @ turn + 70, truth, data.HUMAN)["pa_rigid"] < 0.1


def test_errors_in_the_plane_and_in_depth_by_hand():
    """Root aligned: a shift of all costs nothing; x, y on the one hand and z on the other, of 16 joints."""
    truth = torch.randn(2, 17, 3) * 300 + torch.tensor([0, 0, 4000.0])
    predicted = truth + torch.tensor([7.0, -8.0, 90.0])
    predicted[:, 3] += torch.tensor([3.0, 4.0, 0.0])
    predicted[:, 5] -= torch.tensor([0.0, 0.0, 48.0])
    result = evaluate.pose_metrics(predicted, truth, data.HUMAN)
    found = [result[key] for key in ("in_plane", "depth", "epe")]
    assert found == pytest.approx([5 / 16, 48 / 16, 53 / 16], abs=1e-3)


def test_chance_is_over_the_same_joints():
    class Labelled:
        meta, keypoints = data.HUMAN, np.random.default_rng(0).normal(0, 300, (20, 17, 3)).astype(np.float32)
    relative = Labelled.keypoints - Labelled.keypoints[:, :1]
    expected = np.linalg.norm(relative - relative.mean(0), axis=-1)[:, 1:].mean()
    assert evaluate.mean_pose_error(Labelled, 20, Labelled) == pytest.approx(expected, rel=1e-5)


def test_hands_count_every_joint_as_before():
    assert data.compared(data.HAND) == list(range(21))
    assert data.compared(data.HAND | {"compare": [4, 8]}) == [4, 8]


def test_compare_must_name_joints(tmp_path):
    meta = data.HUMAN | {"format": 1, "name": "x", "compare": [3, 17]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(u.InputError, match="compare is .3, 17.; give indices of its joints"):
        data.read_meta(tmp_path)


def test_tables_of_hands_and_humans_are_apart():
    numbers = {"epe": 80.0, "pa_epe": 50.0, "pa_rigid": 60.0, "auc": 0.4, "chance": 200.0,
               "protocol": "H to S", "compared": ["head"]}
    results = [{"kind": "finetuning", "metric": name, "target": numbers | {"epe": epe}, "source": numbers,
                "settings": {"preset": "tiny", "task": task, "out": "r/full", "seed": 0}}
               for name, task, epe in (("EPE", "hand", 33.0), ("MPJPE", "human", 77.0))]
    for key in ("protocol", "compared", "pa_rigid"): del results[0]["target"][key]          # an old file
    del results[0]["metric"]
    results[0]["source"] = results[0]["target"]
    hand, human = (evaluate.table(results, error) for error in ("EPE", "MPJPE"))
    assert hand[0][2:6:2] == ["target EPE", "target PA-EPE"] and hand[1][::2][:2] == ["tiny full", "33.0"]
    assert human[0][2:6:2] == ["target MPJPE", "target PA-MPJPE"] and human[1][0] == "tiny-human full"
    assert [row[2:6:2] for row in human[1:2]] == [["77.0", "50.0"]] and len(hand) == len(human) == 3
    assert evaluate.table(results, "MPJPE", rigid=True)[1][4] == "60.0"
    note = "target, source MPJPE over 1 joints, roots aligned: head\n  H to S"
    assert evaluate.error_notes(results) == [note]


# ==========================================================================================================
# --task human
# ==========================================================================================================
def settings(script, *arguments: str):
    return u.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, arguments, script.TASKS)


def test_task_changes_defaults_only():
    for script in (train_pretrain, train_finetune):
        hand, human = (vars(settings(script, "--task", task)) for task in ("hand", "human"))
        assert vars(settings(script)) == hand
        for key in hand:
            same = hand[key] == human[key]
            assert same or key in ("task", "lam") or human[key] == hand[key].replace("hands", "bodies"), key
        assert human["source"] == "datasets/bodies/source_train"
        assert settings(script, "--task", "human", "--source", "mine").source == "mine"
        assert settings(script, "--preset", "paper-human").task == "human"
        assert settings(script, "--preset", "paper-human").source == "datasets/h36m_train"
        with pytest.raises(u.InputError, match="--task human: preset paper-hand is for hand"):
            settings(script, "--preset", "paper-hand", "--task", "human")
    assert settings(train_finetune, "--task", "human", "--variant", "scratch").lam == 0
    assert settings(train_finetune, "--preset", "paper-human").lam == 10
    s = settings(train_finetune, "--task", "human", "--variant", "no-ar")
    train_finetune.complete(s)
    assert (s.out, s.init) == ("runs/tiny-human/no-ar-seed0", "runs/tiny-human/pretrain-full-seed0")
    assert [u.run_group(p, "human") for p in ("small", "paper-human")] == ["small-human", "paper-human"]


SMALL = ["--width", "16", "--depth", "2", "--heads", "2", "--threads", "1", "--device", "cpu",
         "--precision", "float32", "--log-every", "2"]


def test_human_from_nothing_to_table_and_pictures(tmp_path, monkeypatch, capsys):
    """The three commands, with --task human and no folder named: renders, trains, measures, draws."""
    monkeypatch.chdir(tmp_path)
    few = {name: (domain, 24) for name, (domain, _) in data.BENCHMARK.items()}
    monkeypatch.setattr(data, "BENCHMARK", few)
    assert train_pretrain.main(["--task", "human", *SMALL, "--decoder-width", "16", "--decoder-heads", "2",
                                "--seg-channels", "4", "--seg-steps", "3", "--seg-batch", "8", "--batch",
                                "16", "--epochs", "1"]) == 0
    tune = ["--task", "human", *SMALL, "--head-channels", "8", "--labels", "16", "--batch", "8", "--epochs",
            "2", "--warmup", "2"]
    assert train_finetune.main(tune) == 0 and train_finetune.main(tune + ["--variant", "scratch"]) == 0
    assert evaluate.main(["--device", "cpu", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    for words in ("target MPJPE", "target PA-MPJPE", "tiny-human full", "tiny-human scratch",
                  "target, source MPJPE over 16 joints, roots aligned: right_hip"):
        assert words in text
    assert "target EPE" not in text and not (tmp_path / "datasets/hands").exists()
    result = json.loads((tmp_path / "runs/tiny-human/full-seed0/result.json").read_text())
    assert result["metric"] == "MPJPE" and "pelvis" not in result["target"]["compared"]
    assert result["target"]["per_joint"][0] == 0 and len(result["target"]["per_joint"]) == 17
    assert result["target"]["epe"] == pytest.approx(np.mean(result["target"]["per_joint"][1:]), abs=0.01)
    meta = data.read_meta(Path("datasets/bodies/target_test"))
    assert meta["joints"] == data.HUMAN_JOINTS and meta["depth_range"] == 2000
    drawn = {path.stem for path in Path("runs/pictures").iterdir()}
    assert {"poses", "attention", "pck", "curves"} <= drawn
    assert evaluate.main(["--table", "--rigid", "runs"]) == 0
    assert "target rigid PA-MPJPE" in capsys.readouterr().out
