"""DDC, DAN and DANN, tested like the equations: slow loops, wrong variants that must be rejected, a case by
hand, properties. Then their variants of train_finetune.py, and two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import finetune, interrupted, log, same, weights
from torch.nn.parallel import DistributedDataParallel

import train_finetune
import udapose
from support import comparisons
from support.comparisons import METHODS, DomainDiscriminator, ScaleGradient, dan_loss, dann_loss, ddc_loss
from support.run import parse_settings

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


# ==========================================================================================================
# The feature, and the two helpers
# ==========================================================================================================
def test_the_feature_is_the_mean_of_the_patch_tokens():
    """The class token is left out. The mean of bfloat16 tokens is float32: bfloat16 has no 1 + 1/256."""
    tokens = torch.tensor([[[100.0, -100.0], [1.0, 4.0], [3.0, 0.0]]])
    close(comparisons.mean_patch_token(tokens), torch.tensor([[2.0, 2.0]]))
    tokens = torch.tensor([[[9.0], [1.0], [1 + 1 / 128]]]).bfloat16()
    close(comparisons.mean_patch_token(tokens), torch.tensor([[1 + 1 / 256]]))


def test_compared_tokens_are_those_of_the_encoder():
    """With tokens=True, PoseEstimator returns the same head features, and the tokens of both domains."""
    encoder = udapose.Encoder((8, 8), 4, 8, 2, 2)
    model = udapose.PoseEstimator(encoder, udapose.KeypointHead(encoder.grid, 8, 4, 2)).eval()
    source, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    out = model(source, target, tokens=True)
    assert out.a_E is None and torch.equal(out.features, model(source).features)
    for tokens, images in ((out.source_tokens, source), (out.target_tokens, target)):
        close(tokens, encoder(images))
        assert tokens.requires_grad


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


# ==========================================================================================================
# DDC  |mean phi_s - mean phi_t|²
# ==========================================================================================================
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
    "absolute values": lambda s, t: (s.mean(0) - t.mean(0)).abs().sum(),
    "half of it": lambda s, t: (s.mean(0) - t.mean(0)).square().sum() / 2,
    "source detached": lambda s, t: (s.detach().mean(0) - t.mean(0)).square().sum() + 0 * s.sum(),
}


# ==========================================================================================================
# DAN  mean k(s, s') + mean k(t, t') - 2 mean k(s, t)
# ==========================================================================================================
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


def parts(k, B, take=torch.mean):
    return take(k[:B, :B]) + take(k[B:, B:]), take(k[:B, B:])


def difference(k, B):
    inside, across = parts(k, B)
    return inside - 2 * across


def dan_with(sigma2=lambda d2: d2.detach().mean(), kernels=sum, alphas=(1 / 8, 1 / 4, 1 / 2, 1, 2), factor=2,
             power=lambda d2: d2, mean=difference):
    def loss(phi_s, phi_t):
        phi = torch.cat([phi_s, phi_t])
        d2 = (phi[:, None] - phi[None]).square().sum(-1)
        k = kernels([torch.exp(-power(d2) / (factor * a * sigma2(d2))) for a in alphas])
        return mean(k, len(phi_s))

    return loss


WRONG_DAN = {
    "bandwidth not detached": dan_with(sigma2=lambda d2: d2.mean()),
    "bandwidth of 1": dan_with(sigma2=lambda d2: 1.0),
    "bandwidth of the source": dan_with(sigma2=lambda d2: d2[:5, :5].detach().mean()),
    "median for the mean": dan_with(sigma2=lambda d2: d2.detach().median()),
    "self-pairs not in the mean distance": dan_with(sigma2=lambda d2: d2.detach().sum() / (10 * 9)),
    "mean instead of sum over kernels": dan_with(kernels=lambda k: sum(k) / 5),
    "product of the kernels": dan_with(kernels=lambda k: torch.stack(k).prod(0)),
    "one kernel": dan_with(alphas=(1,)),
    "kernels one octave higher": dan_with(alphas=(1 / 4, 1 / 2, 1, 2, 4)),
    "2 of 2 sigma² missing": dan_with(factor=1),
    "distances not squared": dan_with(power=lambda d2: (d2 + 1e-12).sqrt()),
    "unbiased": dan_with(
        mean=lambda k, B: (parts(k, B, torch.sum)[0] - 10 * B) / (B * (B - 1)) - 2 * parts(k, B)[1]),
    "cross term once": dan_with(mean=lambda k, B: parts(k, B)[0] - parts(k, B)[1]),
    "cross term added": dan_with(mean=lambda k, B: parts(k, B)[0] + 2 * parts(k, B)[1]),
    "sums over the pairs": dan_with(mean=lambda k, B: B * B * difference(k, B)),
    "pairs of equal place": dan_with(mean=lambda k, B: 10 - 2 * k[:B, B:].diagonal().mean()),
    "square root": dan_with(mean=lambda k, B: difference(k, B).sqrt()),
}


def test_ddc_and_dan_by_hand():
    """DDC: means (2, 0) and (0, 1): 4 + 1. Equal batches in another order: 0.

    DAN, 0 and 1: distances 0 and 1, of mean 1/2 = sigma². k(0, 0) = 5, k(0, 1) = sum of exp(-1 / alpha).
    """
    phi_s, phi_t = torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert ddc_loss(phi_s, phi_t) == 5 and ddc_loss(phi_s, phi_s.flip(0)) == 0
    k = math.exp(-8) + math.exp(-4) + math.exp(-2) + math.exp(-1) + math.exp(-1 / 2)
    close(dan_loss(torch.zeros(1, 1), torch.ones(1, 1)), torch.tensor(10 - 2 * k))


def test_properties_of_dan():
    """Equal batches cost 0, a shift of the mean raises it, so does a spread, which DDC does not see."""
    phi = torch.randn(6, 4)
    assert abs(dan_loss(phi, phi)) < 1e-6 and abs(dan_loss(phi, phi.flip(0))) < 1e-6
    losses = torch.stack([dan_loss(phi, phi + shift) for shift in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)])
    assert (losses.diff() > 0.1).all()
    close(dan_loss(phi, phi + 1), dan_loss(100 * phi, 100 * phi + 100))  # it has no scale
    phi = phi - phi.mean(0)
    assert dan_loss(phi, 3 * phi) > 0.3 and ddc_loss(phi, 3 * phi) < 1e-10
    collapsed = torch.ones(6, 4, requires_grad=True)  # all features alike: no 0 / 0
    loss = dan_loss(collapsed, torch.ones(6, 4))
    loss.backward()
    assert loss == 0 and collapsed.grad.abs().max() == 0


# ==========================================================================================================
# DANN  (mean -log d(phi_s) + mean -log(1 - d(phi_t))) / 2, gradient reversed before the discriminator
# ==========================================================================================================
def dann_by_loops(phi_s, phi_t, discriminator):
    """The discriminator's own loss, without reversal."""

    def d(phi):
        return 1 / (1 + torch.exp(-discriminator(phi)[0]))

    B = len(phi_s)
    return sum(-torch.log(d(phi_s[b])) / B - torch.log(1 - d(phi_t[b])) / B for b in range(B)) / 2


def check_dann(function):
    """Its value; the discriminator's gradient as it is; the features' gradient times -ramp."""
    D, phi, ramp = DomainDiscriminator(3, 8).double(), both_domains(), 0.3
    inputs = [*D.parameters(), *phi]
    ours, theirs = function(*phi, D, ramp), dann_by_loops(*phi, D)
    close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    close(ours[:-2], theirs[:-2])
    close(ours[-2:], tuple(-ramp * gradient for gradient in theirs[-2:]))


def dann_with(reverse=lambda phi, ramp: ScaleGradient.apply(phi, -ramp), last=lambda loss, ramp: loss,
              terms=lambda s, t: (F.softplus(-s).mean() + F.softplus(t).mean()) / 2):
    return lambda phi_s, phi_t, D, ramp: last(terms(D(reverse(phi_s, ramp)), D(reverse(phi_t, ramp))), ramp)


WRONG_DANN = {
    "no reversal": dann_with(reverse=lambda phi, ramp: phi),
    "scaled, not reversed": dann_with(reverse=lambda phi, ramp: ScaleGradient.apply(phi, ramp)),
    "reversed, not scaled": dann_with(reverse=lambda phi, ramp: ScaleGradient.apply(phi, -1.0)),
    "features detached": dann_with(reverse=lambda phi, ramp: phi.detach() + 0 * phi),
    "reversed after the discriminator": dann_with(
        reverse=lambda phi, ramp: phi, last=lambda loss, ramp: ScaleGradient.apply(loss, -ramp)),
    "loss negative": dann_with(reverse=lambda phi, ramp: phi, last=lambda loss, ramp: -ramp * loss),
    "ramp on the loss": dann_with(
        reverse=lambda phi, ramp: ScaleGradient.apply(phi, -1.0), last=lambda loss, ramp: ramp * loss),
    "labels exchanged": dann_with(terms=lambda s, t: (F.softplus(s).mean() + F.softplus(-t).mean()) / 2),
    "one label for both": dann_with(terms=lambda s, t: (F.softplus(-s).mean() + F.softplus(-t).mean()) / 2),
    "half missing": dann_with(terms=lambda s, t: F.softplus(-s).mean() + F.softplus(t).mean()),
    "sum over the batch": dann_with(terms=lambda s, t: (F.softplus(-s).sum() + F.softplus(t).sum()) / 2),
    "target alone": dann_with(terms=lambda s, t: F.softplus(t).mean() + 0 * s.sum()),
    "squared error": dann_with(terms=lambda s, t: ((1 - s.sigmoid()) ** 2 + t.sigmoid() ** 2).mean() / 2),
}


CHECKS = {"ddc": lambda f: check_like(f, ddc_by_loops), "dan": lambda f: check_like(f, dan_by_loops),
          "dann": check_dann}


@pytest.mark.parametrize("loss, function", [("ddc", ddc_loss), ("dan", dan_loss), ("dan", dan_with()),
                                            ("dann", dann_loss), ("dann", dann_with())])
def test_losses(loss, function):
    """Ours, and the written-out forms that the wrong variants are variants of."""
    CHECKS[loss](function)


WRONG = {"ddc": WRONG_DDC, "dan": WRONG_DAN, "dann": WRONG_DANN}


@pytest.mark.parametrize("loss, name", [(loss, name) for loss in WRONG for name in WRONG[loss]])
def test_losses_reject(loss, name):
    """Only an AssertionError counts: a variant that crashes would show nothing about the check."""
    with pytest.raises(AssertionError):
        CHECKS[loss](WRONG[loss][name])


def test_discriminator_at_chance_costs_ln_2_and_logits_of_a_sure_one_stay_finite():
    """Right by 1000: costs 0. Wrong by 1000: costs 1000, with a gradient."""
    D = DomainDiscriminator(3)
    assert [tuple(p.shape) for p in D.parameters()] == [(1024, 3), (1024,), (1, 1024), (1,)]  # two layers
    for p in D[-1].parameters():
        torch.nn.init.zeros_(p)
    close(dann_loss(torch.randn(4, 3), torch.randn(4, 3), D, 1.0), torch.tensor(math.log(2)))
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


# ==========================================================================================================
# In the fine-tuning
# ==========================================================================================================
@pytest.fixture(scope="module")
def scratch(sets, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "scratch"
    finetune(sets, run, "", "--variant", "scratch")
    return run


@pytest.mark.parametrize("method", METHODS)
def test_each_variant_trains_and_resumes_bitwise(sets, scratch, tmp_path, monkeypatch, method):
    """Without its weight it is scratch: all else is equal, as images, order, initial weights, schedule."""
    whole, run, without = (tmp_path / name for name in ("whole", "run", "without"))
    finetune(sets, whole, "", "--variant", method)
    interrupted(monkeypatch, 4, finetune, sets, run, "", "--variant", method)  # at step 6, saved: 4
    finetune(sets, run, "", "--variant", method)
    assert same(weights(run), weights(whole)) and log(run) == log(whole)
    last = next(line for line in log(whole) if line["step"] == 6)
    assert last[f"L_{method}"] > 0 and "L_attn" not in last
    finetune(sets, without, "", "--variant", method, "--adapt-weight", "0")
    old, new, zero = ({key: w for key, w in weights(path).items() if not key.startswith("discriminator")}
                      for path in (scratch, whole, without))
    assert same(zero, old) and not same(new, old)
    trained, initial = ({key: w for key, w in weights(path).items() if key.startswith("discriminator")}
                        for path in (whole, without))
    assert bool(trained) == (method == "dann") and (not trained or not same(trained, initial))


def settings(*arguments: str) -> train_finetune.Settings:
    script = train_finetune
    s = parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, arguments, script.TASKS)
    script.complete(s)
    return s


def test_variants(capsys):
    for method, weight in zip(METHODS, (0.25, 1.0, 1.0), strict=True):
        s = settings("--variant", method, "--seed", "3")
        assert (s.init, s.lam, s.adapt, s.adapt_weight) == ("", 0, method, weight)
        s = settings("--variant", f"mae-{method}", "--seed", "3", "--preset", "small")
        assert (s.init, s.lam) == ("runs/small/pretrain-mae-seed3", 0)
        assert (s.adapt, s.adapt_weight, s.out) == (method, weight, f"runs/small/mae-{method}-seed3")
    assert all(settings("--variant", v).adapt == "" for v in ("full", "scratch", "mae", "oracle"))
    with pytest.raises(SystemExit):
        settings("--adapt", "nothing", "--lam", "0")
    assert "ddc, dan, dann" in capsys.readouterr().err.replace("'", "")
    assert settings("--adapt", "dann").lam == 100  # beside AR


def test_progress_runs_from_0_to_1(sets, tmp_path, monkeypatch):
    """The ramp is asked for step / steps, and the loss is called with its value."""
    asked, used = [], []
    monkeypatch.setattr(comparisons, "dann_ramp", lambda p: asked.append(p) or 10 + p)
    monkeypatch.setattr(comparisons, "dann_loss", lambda *given: used.append(given[3]) or dann_loss(*given))
    finetune(sets, tmp_path / "run", "", "--variant", "dann")
    assert asked == [step / 6 for step in range(6)] and used == [10 + p for p in asked]


# ==========================================================================================================
# Two processes against one
# ==========================================================================================================
def model_and_batch(method: str):
    """A small model in evaluation mode (no batch statistics), and one batch of 6 images of each domain."""
    torch.manual_seed(0)
    encoder, images = udapose.Encoder((16, 16), 4, 8, 2, 2), torch.randn(2, 6, 3, 16, 16)
    D = DomainDiscriminator(8, 16) if method == "dann" else None
    estimator = udapose.PoseEstimator(encoder, udapose.KeypointHead(encoder.grid, 8, 4, 2), D).eval()
    return estimator, (images[0], torch.rand(6, 2, 3) * 15, torch.ones(6, 2), images[1] + 1)


def gradients(method: str, rank: int = 0, world: int = 1) -> dict:
    """Gradient of Eq. (7) with the method's loss at all weights, on this process's share of the batch."""
    estimator, batch = model_and_batch(method)
    model = DistributedDataParallel(estimator) if world > 1 else estimator
    source, centres, valid, target = (part[rank * 6 // world : (rank + 1) * 6 // world] for part in batch)
    out = model(source, target, tokens=True)
    L_kpt = udapose.keypoint_loss_expanded(out.features, estimator.head.conv, centres, valid, 2.0)
    tokens = out.source_tokens, out.target_tokens
    second = comparisons.adaptation_loss(method, *tokens, estimator.discriminator, 0.2)
    udapose.hpe_loss(L_kpt, second, 1000.0).backward()
    return {name: p.grad.clone() for name, p in estimator.named_parameters()}


def gathered_without_factor(phi):
    rows = [torch.empty_like(phi) for _ in range(2)]
    torch.distributed.all_gather(rows, phi.detach())
    rows[torch.distributed.get_rank()] = phi
    return torch.cat(rows)


GATHERS = {"": comparisons.gather_features, "factor missing": gathered_without_factor,
           "own images only": lambda phi: phi}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name, gather in GATHERS.items():
        comparisons.gather_features = gather
        for method in METHODS:
            found[name, method] = gradients(method, rank, 2)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Half a batch on each. DDC and DAN gather the features; DANN need not, as a mean over images."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for method in METHODS:
        whole = gradients(method)
        rounding = 1e-5 * max(float(p.abs().max()) for p in whole.values())
        for name, p in whole.items():
            close(first["", method][name], p, rtol=1e-4, atol=rounding)
            assert torch.equal(first["", method][name], second["", method][name])
        for wrong in list(GATHERS)[1:] if method != "dann" else []:
            weight = "encoder.blocks.0.mlp.fc1.weight"
            far = (first[wrong, method][weight] - whole[weight]).norm() / whole[weight].norm()
            assert far > 0.05, (wrong, method)
