"""DDC, DAN, DANN, as test_equations.py has it: slow loops, wrong variants that must be rejected, a case by
hand, properties; then their variants of train_finetune.py, and two processes against one."""
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F

import train_finetune
import udapose as u
from test_training import finetune, same, sets, stop_after, weights  # noqa: F401  (sets is a fixture)

close = torch.testing.assert_close
METHODS = ("ddc", "dan", "dann")


def rejected(check, wrong) -> None:
    """Only an AssertionError counts: a variant that crashes would show nothing about the check."""
    with pytest.raises(AssertionError): check(wrong)


def each(variants: dict):
    return pytest.mark.parametrize("wrong", variants.values(), ids=variants.keys())


def both_domains(B: int = 5, D: int = 3) -> list:
    """phi of source and target (B, D), double, ready for gradients: of another mean and another spread."""
    phi_s, phi_t = torch.randn(B, D).double(), 2 * torch.randn(B, D).double() + 1
    return [phi_s.requires_grad_(), phi_t.requires_grad_()]


def check_like(function, by_loops) -> None:
    """The same value, and the same gradient at both domains' features."""
    phi = both_domains()
    ours, theirs = function(*phi), by_loops(*phi)
    close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss, phi) for loss in (ours, theirs))): close(a, b)


# ==========================================================================================================
# The feature, and the two helpers
# ==========================================================================================================
def test_the_feature_is_the_mean_of_the_patch_tokens():
    """Class token left out; of bfloat16 tokens too in float32: their own numbers have no 1 + 1/256."""
    tokens = torch.tensor([[[100.0, -100.0], [1.0, 4.0], [3.0, 0.0]]])
    close(u.mean_patch_token(tokens), torch.tensor([[2.0, 2.0]]))
    close(u.mean_patch_token(torch.tensor([[[9.0], [1.0], [1 + 1 / 128]]]).bfloat16()),
          torch.tensor([[1 + 1 / 256]]))


def test_gradient_is_turned_and_scaled_and_the_value_kept():
    x = torch.randn(4, 3, requires_grad=True)
    y = u.ScaleGradient.apply(x, -0.3)
    assert torch.equal(x, y)
    y.pow(2).sum().backward()
    close(x.grad, -0.3 * 2 * x.detach())


def test_compared_features_are_those_of_the_encoder():
    """With `compare`, PoseEstimator returns the same head features, and phi of both domains."""
    encoder = u.Encoder((8, 8), 4, 8, 2, 2)
    model = u.PoseEstimator(encoder, u.KeypointHead(encoder.grid, 8, 4, 2)).eval()
    source, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    features, a_E, *phi = model(source, target, True)
    assert a_E is None and torch.equal(features, model(source)[0])
    for x, images in zip(phi, (source, target)):
        close(x, torch.stack([sum(tokens[1:]) / 4 for tokens in encoder(images)]))
        assert x.requires_grad


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


def test_ddc(): check_like(u.ddc_loss, ddc_by_loops)


@each(WRONG_DDC)
def test_ddc_rejects(wrong): rejected(lambda f: check_like(f, ddc_by_loops), wrong)


def test_ddc_by_hand():
    """Means (2, 0) and (0, 1): 4 + 1. Equal batches in another order: 0."""
    phi_s, phi_t = torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert u.ddc_loss(phi_s, phi_t).item() == 5 and u.ddc_loss(phi_s, phi_s.flip(0)).item() == 0


# ==========================================================================================================
# DAN  mean k(s, s') + mean k(t, t') - 2 mean k(s, t)
# ==========================================================================================================
def dan_by_loops(phi_s, phi_t):
    B, both = len(phi_s), [*phi_s, *phi_t]
    def distance(a, b): return sum((x - y) ** 2 for x, y in zip(a, b))
    sigma2 = sum(distance(a, b).detach() for a in both for b in both) / (2 * B) ** 2
    def k(a, b):
        return sum(torch.exp(-distance(a, b) / (2 * alpha * sigma2)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2))
    total = 0.0
    for i in range(B):
        for j in range(B):
            total = total + k(phi_s[i], phi_s[j]) + k(phi_t[i], phi_t[j]) - 2 * k(phi_s[i], phi_t[j])
    return total / B ** 2


def parts(k, B, take=torch.mean): return take(k[:B, :B]) + take(k[B:, B:]), take(k[:B, B:])


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
    "unbiased": dan_with(mean=lambda k, B: (parts(k, B, torch.sum)[0] - 10 * B) / (B * (B - 1))
                         - 2 * parts(k, B)[1]),
    "cross term once": dan_with(mean=lambda k, B: parts(k, B)[0] - parts(k, B)[1]),
    "cross term added": dan_with(mean=lambda k, B: parts(k, B)[0] + 2 * parts(k, B)[1]),
    "sums over the pairs": dan_with(mean=lambda k, B: B * B * difference(k, B)),
    "pairs of equal place": dan_with(mean=lambda k, B: 10 - 2 * k[:B, B:].diagonal().mean()),
    "square root": dan_with(mean=lambda k, B: difference(k, B).sqrt()),
}


def test_dan(): check_like(u.dan_loss, dan_by_loops)


def test_dan_written_out(): check_like(dan_with(), dan_by_loops)  # what the wrong variants are variants of


@each(WRONG_DAN)
def test_dan_rejects(wrong): rejected(lambda f: check_like(f, dan_by_loops), wrong)


def test_dan_by_hand():
    """0 and 1: distances 0 and 1, of mean 1/2 = sigma². k(0, 0) = 5, k(0, 1) = sum of exp(-1 / alpha)."""
    k = math.exp(-8) + math.exp(-4) + math.exp(-2) + math.exp(-1) + math.exp(-1 / 2)
    close(u.dan_loss(torch.zeros(1, 1), torch.ones(1, 1)), torch.tensor(10 - 2 * k))


def test_dan_of_equal_batches_is_0_and_a_shift_of_the_mean_raises_it():
    phi = torch.randn(6, 4)
    assert abs(u.dan_loss(phi, phi)) < 1e-6 and abs(u.dan_loss(phi, phi.flip(0))) < 1e-6
    losses = torch.stack([u.dan_loss(phi, phi + shift) for shift in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)])
    assert (losses.diff() > 0.1).all()
    close(u.dan_loss(phi, phi + 1), u.dan_loss(100 * phi, 100 * phi + 100))              # it has no scale
    collapsed = torch.ones(6, 4, requires_grad=True)                       # all features alike: no 0 / 0
    loss = u.dan_loss(collapsed, torch.ones(6, 4))
    loss.backward()
    assert loss == 0 and collapsed.grad.abs().max() == 0


def test_dan_sees_a_difference_of_spread_where_ddc_sees_none():
    phi = torch.randn(6, 4)
    phi = phi - phi.mean(0)
    assert u.dan_loss(phi, 3 * phi) > 0.3 and u.ddc_loss(phi, 3 * phi) < 1e-10


# ==========================================================================================================
# DANN  (mean -log d(phi_s) + mean -log(1 - d(phi_t))) / 2, gradient reversed before the discriminator
# ==========================================================================================================
def dann_by_loops(phi_s, phi_t, discriminator):
    """The discriminator's own loss, without reversal."""
    def d(phi): return 1 / (1 + torch.exp(-discriminator(phi)[0]))
    B = len(phi_s)
    return sum(-torch.log(d(phi_s[b])) / B - torch.log(1 - d(phi_t[b])) / B for b in range(B)) / 2


def check_dann(function):
    """Its value; the discriminator's gradient as it is; the features' gradient times -ramp."""
    D, phi, ramp = u.DomainDiscriminator(3, 8).double(), both_domains(), 0.3
    inputs = [*D.parameters(), *phi]
    ours, theirs = function(*phi, D, ramp), dann_by_loops(*phi, D)
    close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    for a, b in zip(ours[:-2], theirs[:-2]): close(a, b)
    for a, b in zip(ours[-2:], theirs[-2:]): close(a, -ramp * b)


def dann_with(reverse=lambda phi, ramp: u.ScaleGradient.apply(phi, -ramp), last=lambda loss, ramp: loss,
              terms=lambda s, t: (F.softplus(-s).mean() + F.softplus(t).mean()) / 2):
    return lambda phi_s, phi_t, D, ramp: last(terms(D(reverse(phi_s, ramp)), D(reverse(phi_t, ramp))), ramp)


WRONG_DANN = {
    "no reversal": dann_with(reverse=lambda phi, ramp: phi),
    "scaled, not reversed": dann_with(reverse=lambda phi, ramp: u.ScaleGradient.apply(phi, ramp)),
    "reversed, not scaled": dann_with(reverse=lambda phi, ramp: u.ScaleGradient.apply(phi, -1.0)),
    "features detached": dann_with(reverse=lambda phi, ramp: phi.detach() + 0 * phi),
    "reversed behind the discriminator": dann_with(
        reverse=lambda phi, ramp: phi, last=lambda loss, ramp: u.ScaleGradient.apply(loss, -ramp)),
    "loss negative": dann_with(reverse=lambda phi, ramp: phi, last=lambda loss, ramp: -ramp * loss),
    "ramp on the loss": dann_with(reverse=lambda phi, ramp: u.ScaleGradient.apply(phi, -1.0),
                                  last=lambda loss, ramp: ramp * loss),
    "labels exchanged": dann_with(terms=lambda s, t: (F.softplus(s).mean() + F.softplus(-t).mean()) / 2),
    "one label for both": dann_with(terms=lambda s, t: (F.softplus(-s).mean() + F.softplus(-t).mean()) / 2),
    "half missing": dann_with(terms=lambda s, t: F.softplus(-s).mean() + F.softplus(t).mean()),
    "sum over the batch": dann_with(terms=lambda s, t: (F.softplus(-s).sum() + F.softplus(t).sum()) / 2),
    "target alone": dann_with(terms=lambda s, t: F.softplus(t).mean() + 0 * s.sum()),
    "squared error": dann_with(terms=lambda s, t: ((1 - s.sigmoid()) ** 2 + t.sigmoid() ** 2).mean() / 2),
}


def test_dann(): check_dann(u.dann_loss)


def test_dann_written_out(): check_dann(dann_with())


@each(WRONG_DANN)
def test_dann_rejects(wrong): rejected(check_dann, wrong)


def test_discriminator_at_chance_costs_ln_2():
    D = u.DomainDiscriminator(3)
    assert [tuple(p.shape) for p in D.parameters()] == [(1024, 3), (1024,), (1, 1024), (1,)]   # two layers
    for p in D[-1].parameters(): torch.nn.init.zeros_(p)
    close(u.dann_loss(torch.randn(4, 3), torch.randn(4, 3), D, 1.0), torch.tensor(math.log(2)))


def test_logits_of_a_sure_discriminator_stay_finite():
    """Right by 1000: costs 0. Wrong by 1000: costs 1000, with a gradient."""
    sure, x = torch.nn.Identity(), torch.full((2, 1), 1000.0, requires_grad=True)
    assert u.dann_loss(x, -x, sure, 1.0).item() == 0
    loss = u.dann_loss(-x, x, sure, 1.0)
    loss.backward()
    assert loss.item() == 1000 and bool((x.grad.abs() > 0.1).all())


def test_ramp():
    """0 at the start, (e - 1) / (e + 1) after a tenth, near 1 at the end, always rising."""
    assert u.dann_ramp(0) == 0 and 0.9999 < u.dann_ramp(1) < 1
    assert u.dann_ramp(0.1) == pytest.approx((math.e - 1) / (math.e + 1))
    values = [u.dann_ramp(i / 50) for i in range(51)]
    assert all(a < b for a, b in zip(values, values[1:]))


# ==========================================================================================================
# In the fine-tuning
# ==========================================================================================================
@pytest.fixture(scope="module")
def unlabelled(sets, tmp_path_factory):  # noqa: F811
    """The data, with a target that holds images and nothing else that can be read."""
    root = tmp_path_factory.mktemp("unlabelled")
    for path in sets.iterdir(): os.symlink(path, root / path.name)
    (root / "target").unlink()
    (root / "target").mkdir()
    for name in ("images.npy", "meta.json"): os.link(sets / "target" / name, root / "target" / name)
    for name in ("keypoints.npy", "masks.npy"): (root / "target" / name).write_text("not an array")
    return root


def run_variant(folder, run, variant, *more):
    return finetune(folder, run, "", "--variant", variant, "--validation", "", *more)


@pytest.fixture(scope="module")
def scratch(unlabelled, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "scratch"
    assert run_variant(unlabelled, run, "scratch") == 0
    return run


@pytest.mark.parametrize("method", METHODS)
def test_each_variant_trains_and_resumes_bitwise(unlabelled, scratch, tmp_path, monkeypatch, method):
    assert run_variant(unlabelled, tmp_path / "whole", method) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run_variant(unlabelled, tmp_path / "run", method) == 130
    assert run_variant(unlabelled, tmp_path / "run", method) == 0
    parts = ["encoder", "head", *(["discriminator"] if method == "dann" else [])]
    ours, whole = (weights(tmp_path / run, *parts) for run in ("run", "whole"))
    assert same(ours, whole)
    assert (tmp_path / "run/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    assert not same(weights(tmp_path / "whole", "encoder"), weights(scratch, "encoder"))
    last = json.loads((tmp_path / "whole/log.jsonl").read_text().splitlines()[-1])
    weight = {"ddc": 0.25, "dan": 1.0, "dann": 1.0}[method]
    assert last[f"L_{method}"] > 0 and "L_attn" not in last
    assert last[f"adapt_weight L_{method} / L_kpt"] == pytest.approx(weight * last[f"L_{method}"] / last["L_kpt"])


@pytest.mark.parametrize("method", METHODS)
def test_without_weight_a_variant_is_scratch(unlabelled, scratch, tmp_path, method):
    """All else is equal: source images, augmentation, order, initial weights, schedule."""
    assert run_variant(unlabelled, tmp_path / "run", method, "--adapt-weight", "0") == 0
    assert same(weights(tmp_path / "run", "encoder", "head"), weights(scratch, "encoder", "head"))


def test_dann_trains_its_discriminator_in_micro_batches_and_bfloat16(unlabelled, tmp_path):
    more = ["--micro-batch", "4", "--precision", "bfloat16", "--layer-decay", "0.75"]
    assert run_variant(unlabelled, tmp_path / "run", "dann", *more) == 0
    torch.manual_seed(0)
    encoder = u.Encoder((48, 48), 8, 16, 2, 2)
    u.KeypointHead(encoder.grid, 16, 8, 21)
    before, after = u.DomainDiscriminator(16).state_dict(), weights(tmp_path / "run", "discriminator")
    for old, new in zip(before.values(), after.values(), strict=True):
        assert not torch.equal(old, new) and bool(new.isfinite().all())


def settings(*arguments: str) -> train_finetune.Settings:
    script = train_finetune
    s = u.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, arguments)
    script.complete(s)
    return s


def test_variants():
    for method, weight in zip(METHODS, (0.25, 1.0, 1.0)):
        s = settings("--variant", method, "--seed", "3")
        assert (s.init, s.lam, s.adapt, s.adapt_weight) == ("", 0, method, weight)
        s = settings("--variant", f"mae-{method}", "--seed", "3", "--preset", "small")
        assert (s.init, s.lam) == ("runs/small/pretrain-mae-seed3", 0)
        assert (s.adapt, s.adapt_weight, s.out) == (method, weight, f"runs/small/mae-{method}-seed3")
    compare = {v: train_finetune.comparison(settings("--variant", v), None, 0) for v in ("ddc", "dan", "mae")}
    assert compare == {"ddc": u.ddc_loss, "dan": u.dan_loss, "mae": None}
    assert all(settings("--variant", v).adapt == "" for v in ("full", "scratch", "mae", "oracle"))


def test_refusals():
    refuse = lambda message: pytest.raises(u.InputError, match=message)  # noqa: E731
    with refuse("choose ddc, dan, dann"): settings("--adapt", "nothing", "--lam", "0")
    with refuse("give --lam 0"): settings("--adapt", "dann")
    with refuse("--source elsewhere: the oracle learns the labels of --target"):
        settings("--variant", "oracle", "--source", "elsewhere")
    both = settings("--variant", "oracle", "--source", "here", "--target", "here")
    assert both.source == settings("--variant", "oracle", "--target", "here").source == "here"


def test_progress_runs_from_0_to_1(unlabelled, tmp_path, monkeypatch):
    """The ramp is asked for step / steps, and the loss is called with its value."""
    asked, used, dann_loss = [], [], u.dann_loss
    monkeypatch.setattr(u, "dann_ramp", lambda p: asked.append(p) or 10 + p)
    monkeypatch.setattr(u, "dann_loss", lambda *a: used.append(a[3]) or dann_loss(*a))
    assert run_variant(unlabelled, tmp_path / "run", "dann") == 0
    assert asked == [step / 6 for step in range(6)] and used == [10 + p for p in asked]


# ==========================================================================================================
# Two processes against one
# ==========================================================================================================
def model_and_batch(method: str):
    """A small model in evaluation mode (no batch statistics), and one batch of 6 images of each domain."""
    torch.manual_seed(0)
    encoder, images = u.Encoder((16, 16), 4, 8, 2, 2), torch.randn(2, 6, 3, 16, 16)
    D = u.DomainDiscriminator(8, 16) if method == "dann" else None
    estimator = u.PoseEstimator(encoder, u.KeypointHead(encoder.grid, 8, 4, 2), D).eval()
    return estimator, (images[0], torch.rand(6, 2, 3) * 15, torch.ones(6, 2), images[1] + 1)


def gradients(method: str, rank: int = 0, world: int = 1) -> dict:
    """Gradient of Eq. (7), the method's loss in it, at all weights, on this process's share of the batch."""
    s, (estimator, batch) = settings("--variant", method), model_and_batch(method)
    model, compare = u.parallel(estimator, world), train_finetune.comparison(s, estimator.discriminator, 0.2)
    share = [x[rank * 6 // world:(rank + 1) * 6 // world] for x in batch]
    losses = train_finetune.pose_losses(s, model, estimator.head, None, *share, torch.device("cpu"),
                                        torch.float32, compare)
    u.hpe_loss(*losses, 1000.0).backward()
    return {name: p.grad.clone() for name, p in estimator.named_parameters()}


def gathered_without_factor(phi):
    rows = [torch.empty_like(phi) for _ in range(2)]
    torch.distributed.all_gather(rows, phi.detach())
    rows[torch.distributed.get_rank()] = phi
    return torch.cat(rows)


GATHERS = {"": u.gather_features, "factor missing": gathered_without_factor,
           "own images only": lambda phi: phi}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name, u.gather_features in GATHERS.items():
        for method in METHODS: found[name, method] = gradients(method, rank, 2)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Half a batch on each: gathered, the loss is that of the whole batch, and so is the mean gradient."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for method in METHODS:
        whole = gradients(method)
        rounding = 1e-5 * max(float(p.abs().max()) for p in whole.values())
        for name, p in whole.items():
            close(first["", method][name], p, rtol=1e-4, atol=rounding)
            assert torch.equal(first["", method][name], second["", method][name])
        for wrong in list(GATHERS)[1:]:
            weight = "encoder.blocks.0.mlp.fc1.weight"
            far = (first[wrong, method][weight] - whole[weight]).norm() / whole[weight].norm()
            alike = (wrong, method) == ("own images only", "dann")         # it is a mean over images
            assert far < 1e-4 if alike else far > 0.05, (wrong, method)


def test_an_image_of_another_process_is_not_blamed(monkeypatch):
    """Where a step is not finite, each process looks at its own images, of which a loss gathers all."""
    s, (estimator, batch) = settings("--variant", "dan", "--batch", "12"), model_and_batch("dan")
    monkeypatch.setattr(train_finetune, "finetuning_batch", lambda *_: batch)
    monkeypatch.setattr(u, "place_among_processes", lambda: (1, 2))
    monkeypatch.setattr(u, "gather_features", lambda phi: torch.cat([torch.full_like(phi, torch.nan), phi]))
    batch[3][4] = torch.nan                                                # the fifth of this process's own
    found = list(train_finetune.losses_by_image(s, 0, slice(6, 12), estimator, None, range(24), range(24), 24,
                                                torch.device("cpu"), torch.float32))
    assert [bool(value.isfinite()) for term, value, *_ in found if term == "L_dan"] == [True] * 4 + [False, True]
