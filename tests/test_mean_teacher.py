"""The mean teacher: its moving average, its labels on the student's crops, its loss; then the variants."""

import copy

import pytest
import torch
from conftest import checkpoint, finetune, log, resumed, same, settings

import data
import train_finetune
import udapose
from support.comparisons import teacher_labels, update_teacher
from support.folder import Dataset

close = torch.testing.assert_close
IMAGE, S, K = 16, 16, 3


# ==== The moving average ================================================================================
def test_average_has_the_closed_form_and_covers_running_statistics():
    """After n updates with a constant student: teacher = 0.999^n start + (1 - 0.999^n) student."""
    teacher, student = torch.nn.BatchNorm1d(2).double(), torch.nn.BatchNorm1d(2).double()
    for tensor in (student.weight.data, student.running_mean, student.running_var):
        tensor.fill_(5.0)
    student.num_batches_tracked += 7
    for _ in range(50):
        update_teacher(teacher, student, 0.999)
    old = 0.999**50
    close(teacher.weight.detach(), torch.full((2,), old + 5 * (1 - old)).double())
    close(teacher.running_mean, torch.full((2,), 5 * (1 - old)).double())
    close(teacher.running_var, torch.full((2,), old + 5 * (1 - old)).double())
    assert teacher.num_batches_tracked == 7 and (student.weight == 5).all()
    update_teacher(teacher, student, 0.0)
    assert same(teacher.state_dict(), student.state_dict())


# ==== Labels and loss ===================================================================================
def test_centres_move_as_the_image_does():
    """By A, which moves the image: see the next test. The depth stays."""
    side, uv = 48, torch.tensor([[[20.0, 25.0], [28.0, 22.0], [24.0, 30.0]]])
    depth = torch.tensor([[-0.3, 0.0, 0.2]])
    parameters = torch.from_numpy(data.no_augmentation(1))
    parameters[0, :4] = torch.tensor([0.4, 0.05, -0.08, 1.1])  # rotation, shift, scale
    A = data.crop_transform(parameters, side, 1.0, side)
    centres, inside = udapose.to_voxels(uv, depth, side, 1.0, S)
    assert inside.all()
    moved, _ = teacher_labels(udapose.true_heatmaps(centres, S, 1.0), A, side)
    at, deep = udapose.from_voxels(moved, side, 1.0, S)
    close(at, data.transform_points(A, uv), atol=0.02, rtol=0)
    close(deep, depth, atol=1e-3, rtol=0)
    assert (at - uv).abs().max() > 3  # without A they would be elsewhere


def test_the_teacher_sees_the_crop_without_augmentation(sets):
    """x_plain warped by A_t is x_t, up to two resamplings instead of one."""
    s = settings(train_finetune, "--variant", "mt", "--image", "48", "--jitter", "0", "--batch", "8")
    source, target = (Dataset(sets / name, "keypoints", "intrinsics") for name in ("source", "target"))
    rows = train_finetune.PoseData(s, source, target)[3, slice(0, 8)]
    batch = train_finetune.pose_batch(s, rows, source.meta, S, torch.device("cpu"))
    drawn = data.batch_rows(len(target), s.seed, "target order", 3, 8)
    plain, _, _ = data.crops(target, drawn, data.no_augmentation(8), 48, torch.device("cpu"))
    close(batch.x_plain, data.normalise(plain))
    warped, inner = data.warp(batch.x_plain, batch.A_t, 48), slice(12, 36)
    error = (warped - batch.x_t)[..., inner, inner].abs().mean()
    assert error < 0.3 * (batch.x_plain - batch.x_t)[..., inner, inner].abs().mean()


def test_half_of_the_joints_count_and_none_outside():
    """Peaks above the median of the batch count, unless the student's crop does not show the joint."""
    centres = torch.full((4, K, 3), 7.0)
    heights = torch.arange(1.0, 13.0).view(4, K, 1, 1, 1)
    blobs = [udapose.true_heatmaps(centres[:2], S, sigma) for sigma in (2.0, 1.0)]  # low ones have more mass
    heatmaps = heights * torch.cat(blobs)
    still = torch.eye(2, 3).expand(4, 2, 3).clone()
    close(teacher_labels(heatmaps, still, IMAGE)[1].flatten(), torch.tensor([0.0] * 6 + [1.0] * 6))
    still[3, 0, 2] = 100.0  # the last crop is shifted out of sight
    wanted = torch.tensor([0.0] * 6 + [1.0] * 3 + [0.0] * 3)
    close(teacher_labels(heatmaps, still, IMAGE)[1].flatten(), wanted)


@pytest.mark.parametrize("flag", ["--expanded", "--no-expanded"])
def test_the_loss_is_eq_5(flag):
    s = settings(train_finetune, "--variant", "mt", flag, "--sigma", "1.5")
    head, features = udapose.KeypointHead((4, 4), 8, 6, K), torch.randn(2, 6, S, S)
    centres, valid = 4 + 8 * torch.rand(2, K, 3), torch.ones(2, K)
    loss = train_finetune.heatmap_loss(s, head, features, centres, valid, torch.float32)
    close(loss, udapose.keypoint_loss(head.heatmaps(features), centres, valid, 1.5))


# ==== In the fine-tuning ================================================================================
@pytest.mark.parametrize("variant", ["mt", "full-mt"])
def test_variant_trains_and_resumes_bitwise(sets, pretrained, tmp_path, monkeypatch, variant):
    """The loss sets in at its share of the steps. The result is the teacher; the student is kept as well."""
    init = "" if variant == "mt" else pretrained
    judged, predict = [], data.predict
    monkeypatch.setattr(data, "predict", lambda model, *more: judged.append(model) or predict(model, *more))
    more = "--variant", variant, "--log-every", "1"
    run = resumed(monkeypatch, tmp_path, 6, finetune, sets, init, *more)  # at step 5, saved: 4
    state, steps = checkpoint(run), [line for line in log(run) if "L_kpt" in line]
    assert [line["step"] for line in steps if "L_mt" in line] == [5, 6]  # of 6; 0.57 * 6 = 3.4 are over
    assert all(("L_attn" in line) == (variant == "full-mt") for line in steps)
    assert not same(state["encoder"], state["student_encoder"])
    teacher = judged[-1]
    assert all(same(part.state_dict(), state[name]) for name, part in teacher.named_children())
    assert not any(p.requires_grad for model in judged for p in model.parameters())


def test_the_teacher_gets_no_gradient(sets, tmp_path, monkeypatch):
    """Without the average it never moves. The average is a copy until the start. Labels are in float32."""
    seen, labels = [], train_finetune.teacher_labels

    def in_float32(*given):
        assert not torch.is_autocast_enabled("cpu")
        return labels(*given)

    def watch(teacher, student, decay):
        assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
        seen.append((decay, copy.deepcopy(teacher.state_dict())))

    monkeypatch.setattr(train_finetune, "update_teacher", watch)
    monkeypatch.setattr(train_finetune, "teacher_labels", in_float32)
    finetune(sets, tmp_path / "run", "", "--variant", "mt", "--mt-decay", "0.9", "--precision", "bfloat16")
    assert [decay for decay, _ in seen] == [0, 0, 0, 0, 0.9, 0.9]
    assert all(same(state, seen[0][1]) for _, state in seen)
