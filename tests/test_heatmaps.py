"""Heatmap coding, Sec. 3.2: millimetres -> pixels -> voxels -> millimetres, and the errors of Sec. 4.1."""

import torch
from conftest import passes_only
from scipy.spatial.transform import Rotation

import udapose

close = torch.testing.assert_close
NAN = float("nan")


# ==== Decoding (for the Gaussians themselves, see Eq. (5) in test_equations.py) =========================
def check_decoding(decode, S=24, sigma=1.8):
    """decode(encode(x)) is x within 0.05 voxel, up to the very border of the volume, for any peak height."""
    inside = torch.rand(1, 30, 3) * (S - 1)
    border = torch.rand(1, 30, 3) * (S - 1)
    border[0, torch.arange(30), torch.arange(30) % 3] = torch.linspace(-0.5, 0.4, 30)
    border[0, 15:] = S - 1 - border[0, 15:]
    corners = torch.tensor([[[-0.5, -0.5, -0.5], [S - 0.5, S - 0.5, S - 0.5], [-0.4, 0, S - 0.6]]])
    centres = torch.cat([inside, border, corners], dim=1)
    for height in (1.0, 0.3):
        error = (decode(height * udapose.true_heatmaps(centres, S, sigma)) - centres).abs().max()
        assert error < 0.05, f"{error:.3f} voxel"


def largest_voxel(heatmaps):
    """x y z of the largest voxel, (B, K, 3)."""
    z_y_x = torch.unravel_index(heatmaps.flatten(2).argmax(dim=-1), heatmaps.shape[2:])
    return torch.stack(z_y_x[::-1], dim=-1).float()


right = udapose.decode_heatmaps
WRONG_DECODERS = {
    "largest voxel only": largest_voxel,
    "z y x": lambda H: right(H).flip(-1),
    "refined the wrong way": lambda H: 2 * largest_voxel(H) - right(H),
    "half of the offset": lambda H: (largest_voxel(H) + right(H)) / 2,
}


def test_decoding_inverts_encoding():
    check_decoding(right, 64, 2.0)
    passes_only(check_decoding, right, WRONG_DECODERS)


def test_decoding_stays_beside_the_largest_voxel():
    """Noise, negative values and constants, as an untrained network gives, must not throw a joint far off."""
    for heatmaps in (torch.randn(2, 3, 8, 8, 8), torch.zeros(2, 3, 8, 8, 8), -torch.rand(2, 3, 8, 8, 8)):
        centres = right(heatmaps)
        assert centres.isfinite().all()
        assert (centres - largest_voxel(heatmaps)).abs().max() <= 2.5


# ==== Pixels and millimetres ============================================================================
def test_voxels_by_hand():
    """256 px on 64 voxels: pixel 0 has its centre at voxel 1/8 - 1/2; the root is in the middle. And back."""
    uv = torch.tensor([[[0.0, 255.0], [-0.5, 255.5], [127.5, 31.5]]])
    depth = torch.tensor([[0.0, 75.0, -150.0]])
    centres, valid = udapose.to_voxels(uv, depth, 256, 300.0, 64)
    close(centres, torch.tensor([[[-0.375, 63.375, 31.5], [-0.5, 63.5, 47.5], [31.5, 7.5, -0.5]]]))
    assert valid.tolist() == [[1, 1, 1]]
    close(udapose.from_voxels(centres, 256, 300.0, 64), (uv, depth))


def test_unlabelled_and_outside_joints_have_weight_0():
    u, v = [NAN, 5, 5, 5, -0.6, 5, 5], [NAN, NAN, 5, 5, 5, 63.6, 5]
    uv = torch.tensor([u, v]).T[None]  # (1, 7, 2) px
    depth = torch.tensor([[NAN, 0.0, NAN, 151.0, 0.0, 0.0, 149.0]])
    centres, valid = udapose.to_voxels(uv, depth, 64, 300.0, 24)
    assert valid.tolist() == [[0, 0, 0, 0, 0, 0, 1]]
    assert centres.isfinite().all() and (centres[valid == 0] == 0).all()
    predicted = torch.rand(1, 7, 24, 24, 24, requires_grad=True)
    udapose.keypoint_loss(predicted, centres, valid, 1.8).backward()  # Eq. (5): no NaN, and no gradient
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[0, :6] == 0).all() and predicted.grad[0, 6].any()


def test_projection_by_hand():
    """fx = 100, fy = 200, cx = 10, cy = 20; (5, -4, 50) mm: u = 100 * 5 / 50 + 10, v = 200 * -4 / 50 + 20."""
    camera = torch.tensor([[[100.0, 0, 10], [0, 200, 20], [0, 0, 1]]])
    point, uv = torch.tensor([[[5.0, -4.0, 50.0]]]), torch.tensor([[[20.0, 4.0]]])
    close(udapose.project(point, camera), uv)
    close(udapose.back_project(uv, torch.tensor([[50.0]]), camera), point)


# ==== Errors of Sec. 4.1 ================================================================================
def test_joint_errors_by_hand():
    """Root 1. Relative to it, joint 0 is predicted at (3, 4, 0) and truly at (0, 0, 0): 5 mm. The root: 0."""
    predicted = torch.tensor([[[13.0, 14.0, 10.0], [10.0, 10.0, 10.0], [10.0, 10.0, 22.0]]])
    truth = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [NAN, NAN, NAN]]])
    errors = udapose.joint_errors(predicted, truth, 1)
    assert errors[0, :2].tolist() == [5, 0] and errors[0, 2].isnan()
    assert errors.nanmean() == 2.5
    assert udapose.joint_errors(predicted, predicted + 7, 0).abs().max() == 0  # a translation is no error


R = torch.tensor(Rotation.random(random_state=0).as_matrix()).float()


def check_procrustes(align, rigid=False):
    """SciPy's best rotation, and then the best scale. A mirrored pose, flat like a hand, keeps an error."""
    truth = torch.randn(2, 10, 3) * torch.tensor([50.0, 50.0, 15.0])
    for mirror in (1.0, -1.0):
        predicted = 1.7 * truth @ R.T * torch.tensor([mirror, 1.0, 1.0]) + torch.tensor([10.0, -20.0, 300.0])
        for p, t, aligned in zip(predicted, truth, align(predicted, truth), strict=True):
            p, middle, t = p - p.mean(0), t.mean(0), t - t.mean(0)
            p = torch.tensor(Rotation.align_vectors(t, p)[0].apply(p)).float()
            scale = 1 if rigid else (p * t).sum() / p.square().sum()
            close(aligned, scale * p + middle, rtol=0, atol=1e-3)


def reflecting(predicted, truth):
    both = [udapose.procrustes_align(predicted * torch.tensor([x, 1.0, 1.0]), truth) for x in (1.0, -1.0)]
    return min(both, key=lambda aligned: (aligned - truth).norm())


WRONG_PROCRUSTES = {
    "reflections allowed": reflecting,
    "rigid": lambda *poses: udapose.procrustes_align(*poses, rigid=True),
    "not centred": lambda predicted, truth: udapose.procrustes_align(predicted, truth) + 1,
    "scaled": lambda predicted, truth: 1.02 * udapose.procrustes_align(predicted, truth),
}


def test_procrustes():
    passes_only(check_procrustes, udapose.procrustes_align, WRONG_PROCRUSTES)
    check_procrustes(WRONG_PROCRUSTES["rigid"], rigid=True)


def test_procrustes_ignores_joints_without_a_label():
    truth = torch.randn(2, 10, 3) * 50
    predicted = truth @ R.T * 0.5 + 30
    predicted[0, 3] += 1000  # wrong, but without a label nobody can tell
    labelled = truth.clone()
    labelled[0, 3] = NAN
    aligned = udapose.procrustes_align(predicted, labelled)
    keep = torch.arange(10) != 3
    close(aligned[0, keep], truth[0, keep], rtol=0, atol=1e-3)
    close(aligned[1], truth[1], rtol=0, atol=1e-3)


def test_procrustes_without_anything_to_align():
    """A sample without labels, or with all joints in one place, must not spoil the mean of its batch."""
    truth = torch.randn(2, 10, 3) * 50
    assert udapose.procrustes_align(truth + 5, truth * NAN).isfinite().all()
    close(udapose.procrustes_align(torch.ones(2, 10, 3), truth), truth.mean(1, keepdim=True).expand(2, 10, 3))
