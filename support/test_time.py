"""Test-time training (our backbone): adapt f^E to a test image by reconstructing it, then predict its pose.

Not in the paper. The recipe is that of Gandelsman et al. (NeurIPS 2022) for classification: a head is trained
on a frozen masked autoencoder (here: `train_finetune.py --variant probe`); then f^E takes a few steps of SGD
on Eq. (3) for each test image. f^D and f^H stay as they are.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import udapose
from support.folder import Dataset, compared, with_root
from support.run import Progress, random_generator
from support.tables import interval, spread
from udapose import MaskedAutoencoder, PoseEstimator

COPIES, RATE, MOMENTUM = 128, 5e-3, 0.9  # of an image in a step, each with its own mask; of SGD
SHOWN = 0, 1, 2, 5, 10, 20, 50, 100  # steps


@torch.enable_grad()
def adapt(mae: MaskedAutoencoder, x: Tensor, r: float, norm_pix: bool, rng) -> Iterator[float]:
    """Train f^E and the mask token to reconstruct a normalised image x (1, 3, H, W), one step per `next`.

    mae is changed in place. Yields the mean squared error of a hidden pixel, from before the step. rng, a
    numpy generator, draws the masks.
    """
    patches = udapose.patchify(x, mae.encoder.patch).expand(COPIES, -1, -1)  # (128, N, P*P*3)
    if norm_pix:
        patches = udapose.normalise_patches(patches)
    B, N, pixels = patches.shape
    optimiser = torch.optim.SGD([*mae.encoder.parameters(), mae.decoder.mask_token], RATE, MOMENTUM)
    while True:
        noise = torch.from_numpy(rng.random((B, N), np.float32)).to(x.device)
        predicted, m = mae(x.expand(B, -1, -1, -1), noise, r)  # (128, N, P*P*3), (128, N)
        L_WMAE = udapose.weighted_mae_loss(predicted, patches, torch.ones_like(m), m)  # Eq. (3) with w = 1
        loss = L_WMAE * B * N / (m.sum() * pixels)  # per hidden pixel, as where the rate comes from
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def measure(estimator: PoseEstimator, mae: MaskedAutoencoder, s: dict, dataset: Dataset, images: int,
            steps: int, mode: str, device) -> tuple[np.ndarray, np.ndarray, float]:
    """Errors (1 + steps,) mm after each step, losses (steps,) in them, seconds per image.

    estimator and mae share f^E; s are the settings of the pre-training. All are means over `images` images,
    spread evenly over the test set. mode: "reset" adapts to each image alone, "online" keeps the weights.
    """
    loaded = {key: value.clone() for key, value in mae.state_dict().items()}
    rows, meta = with_root(dataset), dataset.meta
    rows = rows[np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(int)]
    errors, losses = np.zeros((len(rows), 1 + steps)), np.zeros((len(rows), steps))
    start = time.perf_counter()
    progress = Progress("test-time training", len(rows), "images")
    for i, row in enumerate(rows):
        if mode == "reset":
            mae.load_state_dict(loaded)
        x, _, _ = data.crops(dataset, row[None], data.no_augmentation(1), s["image"], device)
        rng = random_generator(0, "test-time training", int(row))
        adapting = adapt(mae, data.normalise(x), s["mask_ratio"], s["norm_pix"], rng)
        for step in range(1 + steps):
            if step:
                losses[i, step - 1] = next(adapting)
            with torch.no_grad():
                p, t = data.predict(estimator, dataset, row[None], s["image"], device)  # 2 x (1, K, 3) mm
            errors[i, step] = udapose.joint_errors(p, t, meta["root"])[:, compared(meta)].nanmean()
        progress.show(i + 1)
    return errors.mean(axis=0), losses.mean(axis=0), (time.perf_counter() - start) / len(rows)


def table(measured: dict[Path, tuple]) -> list[list[str]]:
    """Lines of text, the header first: the results of `measure` of each run, and their mean."""
    last = len(next(iter(measured.values()))[1])
    at = [step for step in SHOWN if step < last] + [last]
    lines = [["run", *(f"{step} steps" for step in at), "change", "loss", "seconds"]]
    for path, (errors, losses, seconds) in measured.items():
        loss = " to ".join(f"{v:.3f}" for v in losses[[0, -1]]) if last else "-"
        lines.append([path.name, *(f"{errors[step]:.2f}" for step in at), f"{errors[-1] - errors[0]:+.2f}",
                      loss, f"{seconds:.1f}"])
    if len(lines) == 2:
        return lines
    errors = np.stack([errors for errors, *_ in measured.values()])  # (runs, 1 + steps)
    change = interval(list(errors[:, -1] - errors[:, 0]))
    return [*lines, ["mean", *(spread(list(errors[:, step]), 2) for step in at), change, "", ""]]
