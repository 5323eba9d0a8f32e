"""DDC, DAN and DANN, tested like the equations: slow loops, and wrong variants that must be rejected. Then
their variants of train_finetune.py, and two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import finetune, log, passes_only, same, settings, weights
from torch.nn.parallel import DistributedDataParallel

import train_finetune
import udapose
from support import comparisons
from support.comparisons import METHODS, DomainDiscriminator, ScaleGradient, dan_loss, dann_loss, ddc_loss

close = torch.testing.assert_close


def both_domains(B: int = 5, D: int = 3) -> list:
    """phi of source and target (B, D), double, with gradients. Mean and spread differ between the domains."""
    phi_s, phi_t = torch.randn(B, D).double(), 2 * torch.randn(B, D).double() + 1
    return [phi_s.requires_grad_(), phi_t.requires_grad_()]


def check_like(function, by_loops) -> None:
    """The same value, and the same gradient at both domains' features."""
    phi = both_domains()
    ours, theirs = function(*phi), by_loops(*phi)
    close(ours, theirs)
    close(torch.autograd.grad(ours, phi), torch.autograd.grad(theirs, phi))


# ==== The feature, and the two helpers ==================================================================
def test_the_mean_of_bfloat16_tokens_is_float32():
    """The class token is left out. bfloat16 has no 1 + 1/256."""
    tokens = torch.tensor([[[9.0], [1.0], [1 + 1 / 128]]]).bfloat16()
    close(comparisons.mean_patch_token(tokens), torch.tensor([[1 + 1 / 256]]))


def test_a_method_is_called_by_its_name():
    """`adaptation_loss` is the method's loss on the mean patch tokens, with DANN's ramp at `progress`."""
    source, target, D = torch.randn(4, 5, 3), torch.randn(4, 5, 3), DomainDiscriminator(3)
    phi = source[:, 1:].mean(1), target[:, 1:].mean(1)
    close(comparisons.adaptation_loss("ddc", source, target), ddc_loss(*phi))
    close(comparisons.adaptation_loss("dan", source, target), dan_loss(*phi))
    source.requires_grad_()
    gradients = []
    for progress in (0.0, 0.05, 1.0):
        loss = comparisons.adaptation_loss("dann", source, target, D, progress)
        close(loss, dann_loss(*phi, D, 1.0))
        gradients.append(torch.autograd.grad(loss, source)[0])
    assert (gradients[0] == 0).all()
    close(gradients[1], gradients[2] * comparisons.dann_ramp(0.05) / comparisons.dann_ramp(1.0))


# ==== DDC  |mean phi_s - mean phi_t|² ===================================================================
def ddc_by_loops(phi_s, phi_t):
    (B, D), total = phi_s.shape, 0.0
    for c in range(D):
        total = total + (sum(phi_s[b, c] for b in range(B)) / B - sum(phi_t[b, c] for b in range(B)) / B) ** 2
    return total


WRONG_DDC = {
    "mean over the width": lambda s, t: (s.mean(0) - t.mean(0)).square().mean(),
    "means over the width": lambda s, t: (s.mean(1) - t.mean(1)).square().sum(),
    "sums over the batch": lambda s, t: (s.sum(0) - t.sum(0)).square().sum(),
    "image against image": lambda s, t: (s - t).square().sum(1).mean(),
    "not squared": lambda s, t: (s.mean(0) - t.mean(0)).norm(),
    "source detached": lambda s, t: (s.detach().mean(0) - t.mean(0)).square().sum() + 0 * s.sum(),
}


def test_ddc():
    passes_only(lambda loss: check_like(loss, ddc_by_loops), ddc_loss, WRONG_DDC)


# ==== DAN  mean k(s, s') + mean k(t, t') - 2 mean k(s, t) ===============================================
def dan_by_loops(phi_s, phi_t):
    B, both = len(phi_s), [*phi_s, *phi_t]

    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    sigma2 = sum(distance(a, b).detach() for a in both for b in both) / (2 * B) ** 2

    def k(a, b):
        return sum(torch.exp(-distance(a, b) / (2 * alpha * sigma2)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    total = 0.0
    for i in range(B):
        for j in range(B):
            total = total + k(phi_s[i], phi_s[j]) + k(phi_t[i], phi_t[j]) - 2 * k(phi_s[i], phi_t[j])
    return total / B**2


def dan_with(sigma2=lambda d2: d2.detach().mean(), alphas=(1 / 8, 1 / 4, 1 / 2, 1, 2),
             mean=lambda ss, tt, st: ss.mean() + tt.mean() - 2 * st.mean()):
    def loss(phi_s, phi_t):
        B, phi = len(phi_s), torch.cat([phi_s, phi_t])
        d2 = (phi[:, None] - phi[None]).square().sum(-1)
        k = sum(torch.exp(-d2 / (2 * a * sigma2(d2))) for a in alphas)
        return mean(k[:B, :B], k[B:, B:], k[:B, B:])

    return loss


WRONG_DAN = {
    "bandwidth not detached": dan_with(sigma2=lambda d2: d2.mean()),
    "bandwidth of 1": dan_with(sigma2=lambda d2: 1.0),
    "bandwidth of the source": dan_with(sigma2=lambda d2: d2[:5, :5].detach().mean()),
    "self-pairs not in the mean distance": dan_with(sigma2=lambda d2: d2.detach().sum() / (10 * 9)),
    "2 of 2 sigma² missing": dan_with(sigma2=lambda d2: d2.detach().mean() / 2),
    "one kernel": dan_with(alphas=(1,)),
    "mean over kernels": lambda s, t: dan_loss(s, t) / 5,
    "sums over the pairs": lambda s, t: dan_loss(s, t) * 25,
    "unbiased": dan_with(mean=lambda ss, tt, st: (ss.sum() + tt.sum() - 2 * 25) / 20 - 2 * st.mean()),
    "cross term once": dan_with(mean=lambda ss, tt, st: ss.mean() + tt.mean() - st.mean()),
    "cross term added": dan_with(mean=lambda ss, tt, st: ss.mean() + tt.mean() + 2 * st.mean()),
}


def test_dan():
    check_like(dan_with(), dan_by_loops)
    passes_only(lambda loss: check_like(loss, dan_by_loops), dan_loss, WRONG_DAN)
    collapsed = torch.ones(6, 4, requires_grad=True)  # all features alike: no 0 / 0
    loss = dan_loss(collapsed, torch.ones(6, 4))
    loss.backward()
    assert loss == 0 and collapsed.grad.abs().max() == 0


# ==== DANN  (mean -log d(phi_s) + mean -log(1 - d(phi_t))) / 2, gradient reversed before the discriminator
def dann_by_loops(phi_s, phi_t, discriminator):
    """The discriminator's own loss, without reversal."""

    def d(phi):
        return 1 / (1 + torch.exp(-discriminator(phi)[0]))

    B = len(phi_s)
    return sum(-torch.log(d(phi_s[b])) / B - torch.log(1 - d(phi_t[b])) / B for b in range(B)) / 2


def check_dann(function):
    """Its value; the discriminator's gradient as it is; the features' gradient times -ramp."""
    D, phi, ramp = DomainDiscriminator(3).double(), both_domains(), 0.3
    inputs = [*D.parameters(), *phi]
    ours, theirs = function(*phi, D, ramp), dann_by_loops(*phi, D)
    close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    close(ours[:-2], theirs[:-2])
    close(ours[-2:], tuple(-ramp * gradient for gradient in theirs[-2:]))


def dann_with(reverse=lambda phi, ramp: ScaleGradient.apply(phi, -ramp),
              terms=lambda s, t: (F.softplus(-s).mean() + F.softplus(t).mean()) / 2):
    return lambda phi_s, phi_t, D, ramp: terms(D(reverse(phi_s, ramp)), D(reverse(phi_t, ramp)))


WRONG_DANN = {
    "no reversal": dann_with(reverse=lambda phi, ramp: phi),
    "scaled, not reversed": dann_with(reverse=lambda phi, ramp: ScaleGradient.apply(phi, ramp)),
    "reversed, not scaled": dann_with(reverse=lambda phi, ramp: ScaleGradient.apply(phi, -1.0)),
    "features detached": dann_with(reverse=lambda phi, ramp: phi.detach() + 0 * phi),
    "discriminator reversed": lambda *given: ScaleGradient.apply(dann_loss(*given), -1.0),
    "loss negative": lambda *given: -dann_loss(*given),
    "labels exchanged": dann_with(terms=lambda s, t: (F.softplus(s).mean() + F.softplus(-t).mean()) / 2),
    "half missing": lambda *given: 2 * dann_loss(*given),
    "target alone": dann_with(terms=lambda s, t: F.softplus(t).mean() + 0 * s.sum()),
}


def test_dann():
    check_dann(dann_with())
    passes_only(check_dann, dann_loss, WRONG_DANN)


def test_discriminator_has_two_layers_and_a_sure_one_stays_finite():
    """Right by 1000: costs 0. Wrong by 1000: costs 1000, with a gradient."""
    D = DomainDiscriminator(3)
    assert [tuple(p.shape) for p in D.parameters()] == [(1024, 3), (1024,), (1, 1024), (1,)]
    sure, x = torch.nn.Identity(), torch.full((2, 1), 1000.0, requires_grad=True)
    assert dann_loss(x, -x, sure, 1.0).item() == 0
    loss = dann_loss(-x, x, sure, 1.0)
    loss.backward()
    assert loss.item() == 1000 and bool((x.grad.abs() > 0.1).all())


def test_ramp():
    """0 at the start, (e - 1) / (e + 1) after a tenth, near 1 at the end, always rising."""
    assert comparisons.dann_ramp(0) == 0 and 0.9999 < comparisons.dann_ramp(1) < 1
    assert comparisons.dann_ramp(0.1) == pytest.approx((math.e - 1) / (math.e + 1))
    assert (torch.tensor([comparisons.dann_ramp(i / 50) for i in range(51)]).diff() > 0).all()


# ==== In the fine-tuning ================================================================================
@pytest.fixture(scope="module")
def scratch(sets, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "scratch"
    finetune(sets, run, "", "--variant", "scratch")
    return run


@pytest.mark.parametrize("method", METHODS)
def test_each_variant_without_its_weight_is_scratch(sets, scratch, tmp_path, method):
    """All else is equal: images, order, initial weights, schedule. For its resume, see test_training.py."""
    whole, without = tmp_path / "whole", tmp_path / "without"
    finetune(sets, whole, "", "--variant", method)
    last = next(line for line in log(whole) if line["step"] == 6)
    assert last[f"L_{method}"] > 0 and "L_attn" not in last
    finetune(sets, without, "", "--variant", method, "--adapt-weight", "0")
    old, new, zero = weights(scratch), weights(whole), weights(without)
    D = [key for key in new if key.startswith("discriminator")]
    assert bool(D) == (method == "dann") and not any(torch.equal(new[key], zero[key]) for key in D)
    assert same({key: zero[key] for key in zero if key not in D}, old)
    assert not any(torch.equal(new[key], old[key]) for key in old if key.endswith("weight"))


def test_variants():
    """Where each starts from, and its losses, the mean teacher's included."""
    for name, init, weight in (("ddc", "", 0.25), ("dan", "", 1.0), ("dann", "", 1.0), ("mt", "", 1.0),
                               ("mae-ddc", "mae", 0.25), ("mae-dan", "mae", 1.0), ("mae-dann", "mae", 1.0),
                               ("mae-mt", "mae", 1.0), ("full-mt", "full", 1.0)):
        s = settings(train_finetune, "--variant", name, "--seed", "3", "--preset", "small")
        assert s.init == (init and f"runs/small/pretrain-{init}-seed3")
        assert (s.lam, s.adapt, s.adapt_weight) == (100 * (init == "full"), name.split("-")[-1], weight)
    human = settings(train_finetune, "--preset", "paper-human")
    assert human.lam == 10 and human.out == "runs/paper-human/full-seed0"


def test_progress_runs_from_0_to_1(sets, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(comparisons, "dann_ramp", lambda p: asked.append(p) or p)
    finetune(sets, tmp_path / "run", "", "--variant", "dann")
    assert asked == [step / 6 for step in range(6)]


# ==== Two processes against one =========================================================================
def gradients(method: str, rank: int = 0, world: int = 1) -> dict:
    """Gradient of Eq. (7) with the method's loss at all weights, on this process's share of a batch."""
    torch.manual_seed(0)
    encoder, images = udapose.Encoder((16, 16), 4, 8, 2, 2), torch.randn(2, 6, 3, 16, 16)
    D = DomainDiscriminator(8) if method == "dann" else None
    head = udapose.KeypointHead(encoder.grid, 8, 4, 2)
    estimator = udapose.PoseEstimator(encoder, head, D).eval()  # no batch statistics
    model = DistributedDataParallel(estimator) if world > 1 else estimator
    batch = images[0], images[1] + 1, torch.rand(6, 2, 3) * 15, torch.ones(6, 2)
    source, target, centres, valid = (part[rank * 6 // world : (rank + 1) * 6 // world] for part in batch)
    out = model(source, target, tokens=True)
    L_kpt = udapose.keypoint_loss_expanded(out.features, head.conv, centres, valid, 2.0)
    second = comparisons.adaptation_loss(method, out.source_tokens, out.target_tokens, D, 0.2)
    udapose.hpe_loss(L_kpt, second, 1000.0).backward()
    return {name: p.grad.clone() for name, p in estimator.named_parameters()}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({method: gradients(method, rank, 2) for method in METHODS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Half a batch on each. DDC and DAN gather the features; DANN need not, as a mean over images."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for method in METHODS:
        whole = gradients(method)
        assert same(first[method], second[method])
        rounding = 1e-5 * max(float(p.abs().max()) for p in whole.values())
        for name, p in whole.items():
            close(first[method][name], p, rtol=1e-4, atol=rounding)
