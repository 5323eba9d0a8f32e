"""Heatmap coding, Sec. 3.2: millimetres -> pixels -> voxels -> millimetres, and the errors of Sec. 4.1."""

import math

import pytest
import torch

import udapose

close = torch.testing.assert_close
NAN = float("nan")


def rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


# ==========================================================================================================
# Ground-truth heatmaps H, index order (K, Z, Y, X)
# ==========================================================================================================
def check_blob(function):
    """The peak of x = 2, y = 5, z = 7 is 1, at index [z, y, x]. One voxel away H is exp(-1 / 2 sigma²)."""
    H = function(torch.tensor([[[2.0, 5.0, 7.0], [3.0, 3.0, 3.0]]]), 9, 1.5)
    assert H.shape == (1, 2, 9, 9, 9)
    assert [i.item() for i in torch.unravel_index(H[0, 0].argmax(), (9, 9, 9))] == [7, 5, 2]
    neighbour = torch.tensor(math.exp(-1 / (2 * 1.5**2)))
    close(H[0, 0, 7, 5, 2], torch.tensor(1.0))
    for z, y, x in ((6, 5, 2), (7, 4, 2), (7, 5, 3)):
        close(H[0, 0, z, y, x], neighbour)
    close(H[0, 0, 6, 4, 3], neighbour**3)
    close(H[0, 1, 3, 3, 3], torch.tensor(1.0))


WRONG_BLOBS = {
    "z y x": lambda c, S, sigma: udapose.true_heatmaps(c.flip(-1), S, sigma),
    "x and y exchanged": lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma).mT,
    "y and z exchanged": lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma).transpose(2, 3),
    "sigma for sigma²": lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma**0.5),
    "factor 2 missing": lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma / 2**0.5),
    "sum 1": lambda c, S, sigma: udapose.true_heatmaps(c, S, sigma) / (2 * math.pi * sigma**2) ** 1.5,
}


def test_blob():
    check_blob(udapose.true_heatmaps)


@pytest.mark.parametrize("wrong", WRONG_BLOBS.values(), ids=WRONG_BLOBS.keys())
def test_blob_check_rejects(wrong):
    rejected(check_blob, wrong)


# ==========================================================================================================
# Decoding
# ==========================================================================================================
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


def centroid(heatmaps):
    """The usual 5³ centroid around the largest voxel. It recovers only half of the offset."""
    best = udapose.decode_heatmaps(heatmaps, refine=False).long().clamp(2, heatmaps.shape[-1] - 3)
    result = torch.zeros(*best.shape)
    for b in range(best.shape[0]):
        for k in range(best.shape[1]):
            window = [torch.arange(c - 2, c + 3) for c in best[b, k].tolist()]  # x y z
            z, y, x = torch.meshgrid(*window[::-1], indexing="ij")
            w = heatmaps[b, k, z, y, x]
            result[b, k] = torch.stack([(w * x).sum(), (w * y).sum(), (w * z).sum()]) / w.sum()
    return result


def with_offset(heatmaps, factor):
    """The largest voxel plus `factor` times what the refinement adds to it."""
    largest = udapose.decode_heatmaps(heatmaps, refine=False)
    return largest + factor * (udapose.decode_heatmaps(heatmaps) - largest)


WRONG_DECODERS = {
    "largest voxel only": lambda H: udapose.decode_heatmaps(H, refine=False),
    "z y x": lambda H: udapose.decode_heatmaps(H).flip(-1),
    "refined the wrong way": lambda H: with_offset(H, -1.0),
    "half of the offset": lambda H: with_offset(H, 0.5),
    "centroid": centroid,
}


@pytest.mark.parametrize("S, sigma", [(24, 1.8), (64, 2.0)])
def test_decoding_inverts_encoding(S, sigma):
    check_decoding(udapose.decode_heatmaps, S, sigma)


@pytest.mark.parametrize("wrong", WRONG_DECODERS.values(), ids=WRONG_DECODERS.keys())
def test_decoding_check_rejects(wrong):
    rejected(check_decoding, wrong)


def test_plain_argmax_by_hand():
    H = torch.zeros(1, 2, 5, 5, 5)
    H[0, 0, 4, 0, 2] = H[0, 1, 1, 2, 3] = 1
    close(udapose.decode_heatmaps(H, refine=False), torch.tensor([[[2.0, 0, 4], [3, 2, 1]]]))


def test_decoding_stays_beside_the_largest_voxel():
    """Noise, negative values and constants, as an untrained network gives, must not throw a joint far off."""
    for heatmaps in (torch.randn(2, 3, 8, 8, 8), torch.zeros(2, 3, 8, 8, 8), -torch.rand(2, 3, 8, 8, 8)):
        centres = udapose.decode_heatmaps(heatmaps)
        assert centres.isfinite().all()
        assert (centres - udapose.decode_heatmaps(heatmaps, refine=False)).abs().max() <= 2.5


# ==========================================================================================================
# Pixels and millimetres
# ==========================================================================================================
def test_voxels_by_hand():
    """256 px on 64 voxels: pixel 0 has its centre at voxel 1/8 - 1/2; the root is in the middle."""
    uv = torch.tensor([[[0.0, 255.0], [-0.5, 255.5], [127.5, 31.5]]])
    depth = torch.tensor([[0.0, 75.0, -150.0]])
    centres, valid = udapose.to_voxels(uv, depth, 256, 300.0, 64)
    close(centres, torch.tensor([[[-0.375, 63.375, 31.5], [-0.5, 63.5, 47.5], [31.5, 7.5, -0.5]]]))
    assert valid.tolist() == [[1, 1, 1]]


def test_voxels_round_trip():
    uv, depth = torch.rand(2, 5, 2) * 64 - 0.5, (torch.rand(2, 5) - 0.5) * 300
    centres, valid = udapose.to_voxels(uv, depth, 64, 300.0, 24)
    assert (valid == 1).all()
    back_uv, back_depth = udapose.from_voxels(centres, 64, 300.0, 24)
    close(back_uv, uv, rtol=0, atol=1e-4)
    close(back_depth, depth, rtol=0, atol=1e-3)


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


def cameras(B):
    K = torch.eye(3).repeat(B, 1, 1)
    K[:, 0, 0], K[:, 1, 1] = torch.linspace(200, 300, B), torch.linspace(400, 250, B)
    K[:, 0, 2], K[:, 1, 2] = torch.linspace(30, 40, B), torch.linspace(20, 25, B)
    return K


def test_projection_by_hand():
    """fx = 100, fy = 200, cx = 10, cy = 20; (5, -4, 50) mm: u = 100 * 5 / 50 + 10, v = 200 * -4 / 50 + 20."""
    camera = torch.tensor([[[100.0, 0, 10], [0, 200, 20], [0, 0, 1]]])
    point, uv = torch.tensor([[[5.0, -4.0, 50.0]]]), torch.tensor([[[20.0, 4.0]]])
    close(udapose.project(point, camera), uv)
    close(udapose.back_project(uv, torch.tensor([[50.0]]), camera), point)


def test_projection_round_trip():
    points = torch.randn(3, 6, 3) * 80 + torch.tensor([0.0, 0, 700])
    uv = udapose.project(points, cameras(3))
    close(udapose.back_project(uv, points[..., 2], cameras(3)), points, rtol=1e-4, atol=1e-2)


def test_millimetres_to_heatmaps_and_back():
    """The whole way of a label: project, encode, decode, back-project with the root's true depth."""
    points = torch.randn(2, 8, 3) * 30 + torch.tensor([0.0, 0, 600])
    camera = torch.tensor([[[150.0, 0, 31.5], [0, 150, 31.5], [0, 0, 1]]]).expand(2, 3, 3)
    root = points[:, :1, 2]
    centres, valid = udapose.to_voxels(udapose.project(points, camera), points[..., 2] - root, 64, 300.0, 24)
    assert valid.all()
    decoded = udapose.decode_heatmaps(udapose.true_heatmaps(centres, 24, 1.8))
    uv, depth = udapose.from_voxels(decoded, 64, 300.0, 24)
    close(udapose.back_project(uv, root + depth, camera), points, rtol=0, atol=0.6)  # 0.05 voxel of 12.5 mm


# ==========================================================================================================
# Errors of Sec. 4.1
# ==========================================================================================================
def test_joint_errors_by_hand():
    """Root 1. Relative to it, joint 0 is predicted at (3, 4, 0) and truly at (0, 0, 0): 5 mm. The root: 0."""
    predicted = torch.tensor([[[13.0, 14.0, 10.0], [10.0, 10.0, 10.0], [10.0, 10.0, 22.0]]])
    truth = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [NAN, NAN, NAN]]])
    errors = udapose.joint_errors(predicted, truth, 1)
    assert errors[0, :2].tolist() == [5, 0] and errors[0, 2].isnan()
    assert errors.nanmean() == 2.5
    assert udapose.joint_errors(predicted, predicted + 7, 0).abs().max() == 0  # a translation is no error


def rotation(seed=0):
    Q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    return Q * torch.linalg.det(Q)  # -1 times three axes turns a reflection into a rotation


def check_procrustes(align):
    """A rotated, scaled, moved pose aligns exactly. A mirrored one keeps an error, the smallest possible."""
    truth = torch.randn(2, 10, 3) * 50
    truth[..., 2] *= 0.3  # flat like a hand, so that a reflection fits best
    moved = 1.7 * truth @ rotation().T + torch.tensor([10.0, -20.0, 300.0])
    close(align(moved, truth), truth, rtol=0, atol=1e-3)
    mirrored = moved * torch.tensor([-1.0, 1.0, 1.0])
    left = (align(mirrored, truth) - truth).norm(dim=-1).mean()
    assert left > 2, f"a mirrored pose was aligned to {left:.4f} mm"
    error = (align(mirrored, truth) - truth).square().sum()
    for _ in range(20):  # no small turn or scale is better
        turn = torch.matrix_exp(0.02 * (G := torch.randn(3, 3)) - 0.02 * G.T) * (1 + 0.02 * torch.randn(()))
        centre = truth.mean(1, keepdim=True)
        assert ((align(mirrored, truth) - centre) @ turn + centre - truth).square().sum() >= error - 1e-2


def procrustes(predicted, truth, guard=True, transposed=False, guard_scale=True, centred=True):
    p_mean, t_mean = (x.mean(1, keepdim=True) * centred for x in (predicted, truth))
    p, t = predicted - p_mean, truth - t_mean
    U, s, Vt = torch.linalg.svd(p.mT @ t)
    sign = torch.ones_like(s)
    if guard:
        sign[:, 2] = torch.linalg.det(U @ Vt).sign()
    R = U @ (sign[..., None] * Vt)
    scale = ((s * sign if guard_scale else s).sum(1) / p.square().sum((1, 2)))[:, None, None]
    return scale * p @ (R.mT if transposed else R) + t_mean


def test_procrustes():
    check_procrustes(udapose.procrustes_align)
    check_procrustes(procrustes)


WRONG_PROCRUSTES = [{"guard": False}, {"transposed": True}, {"guard_scale": False}, {"centred": False}]


@pytest.mark.parametrize("wrong", WRONG_PROCRUSTES, ids=lambda wrong: next(iter(wrong)))
def test_procrustes_check_rejects(wrong):
    rejected(check_procrustes, lambda predicted, truth: procrustes(predicted, truth, **wrong))


def test_procrustes_check_rejects_rigid():
    rejected(check_procrustes, lambda *poses: udapose.procrustes_align(*poses, rigid=True))


def test_rigid_procrustes_keeps_the_scale():
    truth = torch.randn(1, 10, 3) * 50
    moved = truth @ rotation().T + 100
    close(udapose.procrustes_align(moved, truth, rigid=True), truth, rtol=0, atol=1e-3)
    aligned = udapose.procrustes_align(1.7 * moved, truth, rigid=True)
    size = lambda x: (x - x.mean(1, keepdim=True)).norm()  # noqa: E731
    close(size(aligned), 1.7 * size(truth))


def test_procrustes_ignores_joints_without_a_label():
    truth = torch.randn(2, 10, 3) * 50
    predicted = truth @ rotation().T * 0.5 + 30
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
