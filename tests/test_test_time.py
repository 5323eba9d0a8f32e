"""Test-time training: the probe, one step of `adapt`, the two modes, and the table."""

import numpy as np
import pytest
import torch
from conftest import checkpoint, finetune, same

import evaluate
import udapose
from support import test_time
from support.folder import Dataset
from support.run import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def probe(sets, pretrained):
    run = pretrained.parent / "probe-seed0"
    finetune(sets, run, pretrained, "--variant", "probe")
    return run


@pytest.fixture()
def loaded(sets, pretrained, probe):
    """The probe's estimator, the autoencoder with the same f^E, settings, and the target test set."""
    path = pretrained / "checkpoint.pt"
    mae = evaluate.load_autoencoder(path, checkpoint(pretrained), CPU)
    estimator, _ = evaluate.load_estimator(probe / "checkpoint.pt", CPU)
    mae.encoder = estimator.encoder
    for layer in (mae.decoder.decoder_pred, estimator.head.conv):  # hardly trained: the image does not matter
        torch.nn.init.normal_(layer.weight, std=0.2)
    dataset = Dataset(sets / "target_test", "keypoints", "intrinsics")
    return estimator, mae, checkpoint(pretrained)["settings"], dataset


def state_of(module) -> dict:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_a_probe_leaves_the_encoder_as_it_was(pretrained, probe, sets, tmp_path):
    assert same(checkpoint(probe)["encoder"], checkpoint(pretrained)["encoder"])
    finetune(sets, tmp_path / "other", pretrained, "--variant", "no-ar")
    assert not same(checkpoint(tmp_path / "other")["encoder"], checkpoint(pretrained)["encoder"])
    for more in (["--lam", "1"], ["--init", ""], ["--adapt", "ddc"]):
        with pytest.raises(InputError, match="^--freeze needs --init, --lam 0"):
            finetune(sets, tmp_path / "run", pretrained, "--variant", "probe", *more)


def test_a_step_is_sgd_on_the_mean_over_hidden_pixels(loaded):
    """By hand: MAE's loss, its gradient at f^E and the mask token, one step. Nothing else moves."""
    _, mae, s, _ = loaded
    x, before, r = torch.randn(1, 3, s["image"], s["image"]), state_of(mae), s["mask_ratio"]
    N = (s["image"] // s["patch"]) ** 2
    value = next(test_time.adapt(mae, x, r, False, np.random.default_rng(0)))
    after = state_of(mae)
    mae.load_state_dict(before)
    mae.zero_grad()
    noise = torch.from_numpy(np.random.default_rng(0).random((128, N), np.float32))
    predicted, m = mae(x.expand(128, -1, -1, -1), noise, r)
    error = (predicted - udapose.patchify(x, s["patch"])).square()
    loss = error[m > 0].mean()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert value != pytest.approx(error.mean().item(), rel=1e-3)  # visible patches do not count
    trained = {f"encoder.{name}": p for name, p in mae.encoder.named_parameters()}
    trained["decoder.mask_token"] = mae.decoder.mask_token
    for name, p in trained.items():
        torch.testing.assert_close(after[name], before[name] - test_time.RATE * p.grad, rtol=1e-4, atol=1e-7)
    assert same({k: v for k, v in after.items() if k not in trained},
                {k: v for k, v in before.items() if k not in trained})


def test_modes(loaded, monkeypatch):
    """`reset` begins each image with the loaded weights, bitwise. 0 steps change nothing."""
    estimator, mae, s, dataset = loaded
    first, begun, adapt = state_of(mae), [], test_time.adapt

    def watch(mae, *given):
        begun.append(state_of(mae))
        return adapt(mae, *given)

    monkeypatch.setattr(test_time, "adapt", watch)
    results = {}
    for mode, steps in (("reset", 0), ("online", 0), ("reset", 2), ("online", 2)):
        mae.load_state_dict(first)
        begun.clear()
        results[mode, steps] = test_time.measure(estimator, mae, s, dataset, 3, steps, mode, CPU)
        assert len(begun) == 3 and same(begun[0], first)
        assert [same(state, first) for state in begun[1:]] == [mode == "reset" or steps == 0] * 2
    mae.load_state_dict(first)
    usual = evaluate.measure_pose(estimator, dataset, s["image"], CPU)
    whole, _, _ = test_time.measure(estimator, mae, s, dataset, 12, 0, "reset", CPU)
    assert whole[0] == pytest.approx(usual["epe"], rel=1e-4)
    assert results["reset", 2][0][0] == results["reset", 0][0][0]


def test_the_command_prints_a_table(sets, pretrained, probe, tmp_path, capsys):
    tests = ["--source-test", f"{sets}/source_test", "--target-test", f"{sets}/target_test"]
    line = [*tests, "--ttt", "3", "--images", "2"]
    evaluate.main([str(probe), *line, "--markdown"])
    out = capsys.readouterr().out
    titles = "run", "0 steps", "1 steps", "2 steps", "3 steps", "change", "loss", "seconds"
    assert " ".join(titles) in " ".join(out.replace("|", " ").split())
    assert "\n| probe-seed0 | " in out and "no longer fits" not in out and "| mean" not in out
    for more, words in (["--ttt", "-1"], "--ttt -1"), (["--images", "0"], "--images 0"):
        with pytest.raises(InputError, match=words):
            evaluate.main([str(probe), *line, *more])
    with pytest.raises(InputError, match="--ttt: name fine-tuned runs"):
        evaluate.main([str(pretrained), *line])
    finetune(sets, tmp_path / "scratch", "", "--variant", "scratch")
    with pytest.raises(InputError, match="--ttt needs f.D of its pre-training run"):
        evaluate.main([str(tmp_path / "scratch"), *line])
