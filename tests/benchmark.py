"""Measure how fast both training stages are, and how near to what this machine can do. Asserts nothing.

    python tests/benchmark.py                          both sizes, a few minutes on two CPU cores
    python tests/benchmark.py --sizes tiny --json speed.json
    python tests/benchmark.py --device cuda --sizes paper

MFU is the share of the machine's own rate that a step reaches: operations of the model per second, counted
from the equations (`pretraining_flops`, `finetuning_flops`), over the measured rate of one large matrix
multiplication of the same type. A slow or busy machine changes both, and hardly their ratio. Every stage runs
in a process of its own, so that its peak memory is its own.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import train_finetune as tune  # noqa: E402
import train_pretrain as pre  # noqa: E402
import udapose  # noqa: E402
from support import rendering  # noqa: E402
from support import run as runs  # noqa: E402
from support.folder import HAND, Dataset, write_folder  # noqa: E402

# images per step (pre-training, pairs in fine-tuning) on a CPU; a GPU takes more
SIZES = {"tiny": ("tiny", (128, 32), (2048, 512)), "paper": ("paper-hand", (32, 4), (256, 32))}


# ==== Operations of the model, counted: multiplications and additions, forward once and backward twice ==
def block_flops(tokens: int, width: int) -> int:
    """One block, Eq. (1), forward: 12 D² per token in the linear layers, q k^T and A v in the attention."""
    return 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)


def embedding_flops(patches: int, s) -> int:
    """The patch embedding, forward."""
    return 2 * patches * s.patch**2 * 3 * s.width


def pretraining_flops(s) -> int:
    """One image: f^E on the visible patches, f^D on all of them; 39.8e9 for ViT-B."""
    N = (s.image // s.patch) ** 2
    V = round(N * (1 - s.mask_ratio))
    encoder = embedding_flops(V, s) + s.depth * block_flops(1 + V, s.width)
    decoder = 2 * (1 + V) * s.width * s.decoder_width + 2 * N * s.decoder_width * s.patch**2 * 3
    return 3 * (encoder + decoder + s.decoder_depth * block_flops(1 + N, s.decoder_width))


def finetuning_flops(s, keypoints: int = 21) -> int:
    """One source and one target image. For an attention map, the last block needs q and k alone.

    Eq. (5) counts as the 1 x 1 convolution, whichever form computes it.
    """
    N, C, S = (s.image // s.patch) ** 2, s.head_channels, 4 * s.image // s.patch
    embed, block = embedding_flops(N, s), block_flops(1 + N, s.width)
    maps = embed + (s.depth - 1) * block + 2 * 2 * (1 + N) * s.width**2
    head = 2 * (4 * (S // 2) ** 2 * s.width * C + 4 * S**2 * C * C + S**2 * C * keypoints * S)
    return 3 * (embed + s.depth * block + head) + ((3 + 1) * maps if s.lam else 0)


def seconds_of(work, device: torch.device, repeats: int = 5) -> float:
    """Wall time of work(), the least of several."""
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        laps.append(time.perf_counter() - start)
    return min(laps)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large matrix multiplication, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device, 6)


# ==== The two stages, made of the scripts' own functions, on rendered hands =============================
def hands_folder(folder: Path, side: int) -> Dataset:
    """A data set of 16 rendered hands, 16 times over."""
    arrays = rendering.render("hands", runs.random_generator(0, "benchmark"), "source", 16, side)
    meta = {"name": folder.name, "margin": 1.25} | {k: v for k, v in HAND.items() if k != "box"}
    write_folder(folder, meta, 256, 16 * [arrays])
    return Dataset(folder, "masks", "keypoints", "intrinsics")


def settings_of(script, size: str, device: torch.device, *flags: str):
    """Settings of a script at a size, with a batch that fits here."""
    preset, on_cpu, on_gpu = SIZES[size]
    flags = ["--preset", preset, *flags]
    s = runs.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, flags, script.TASKS)
    s.batch = (on_gpu if device.type == "cuda" else on_cpu)[script is tune]
    return s


def pretraining(size: str, dataset: Dataset, device: torch.device, dtype: torch.dtype):
    """Settings, reader, model, loss(rows), operations per image, of stage 1."""
    s = settings_of(pre, size, device)
    domains = [pre.Domain(dataset, dataset.masks, s.masks != "none")]
    model = udapose.MaskedAutoencoder(*pre.networks(s)).to(device)

    def loss(rows):
        batch = pre.pretraining_batch(s, rows, domains, device)
        with runs.autocast(device, dtype):
            predicted, m = model(batch.images, batch.noise, s.mask_ratio)
        patches = udapose.patchify(batch.images, s.patch)
        return udapose.weighted_mae_loss(predicted, patches, batch.weights, m)

    return s, pre.PretrainingData(s, domains, dataset), model, loss, pretraining_flops(s)


def finetuning(size: str, dataset: Dataset, device: torch.device, dtype: torch.dtype):
    """The same of stage 2, per pair of a source and a target image."""
    s = settings_of(tune, size, device, "--init", "")
    model, f_A = tune.build(s, 21, 1, device)

    def loss(rows):
        batch = tune.pose_batch(s, rows, dataset.meta, model.head.side, device)
        terms = tune.pose_losses(s, model, model, f_A, None, batch, dtype, 0.0)
        return udapose.hpe_loss(terms["L_kpt"], terms["L_attn"], s.lam)

    return s, tune.PoseData(s, dataset, dataset), model.train(), loss, finetuning_flops(s)


STAGES = {"pre-training": pretraining, "fine-tuning": finetuning}


def train(s, reader, model, loss, device: torch.device, steps: int) -> tuple[float, float]:
    """Seconds per step, and the share of them spent waiting for data, of a loop like the scripts'."""
    optimiser = torch.optim.AdamW(udapose.parameter_groups(model, 0.05), lr=1e-4, fused=True)
    rows, waited = data.read_ahead(reader, range(steps + 1), [slice(0, s.batch)], -1, device), 0.0
    for step in range(steps + 1):
        ask = time.perf_counter()
        stored = next(rows)
        waited += time.perf_counter() - ask if step else 0
        optimiser.zero_grad()
        loss(stored).backward()
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step == 0:  # the first step warms up
            start = time.perf_counter()
    total = time.perf_counter() - start
    return total / steps, waited / total


# ==== The report ========================================================================================
def measure(stage: str, size: str, device: str, threads: int, root: Path) -> dict:
    """One stage at one size: rate, MFU, waiting for data, memory."""
    runs.configure_torch(threads)
    device = torch.device(device)
    dtype = runs.choose_dtype("auto", device)
    dataset = hands_folder(root / "set", 60 if size == "tiny" else 320)
    s, reader, model, loss, flops = STAGES[stage](size, dataset, device, dtype)
    rates, stored = [matmul_rate(dtype, device)], reader[0, slice(0, s.batch)]
    lap = seconds_of(lambda: loss(stored).backward(), device, 2)
    steps = max(2, min(200, int(10 / lap)))  # of about ten seconds in all
    seconds, waited = train(s, reader, model, loss, device, steps)
    rates.append(matmul_rate(dtype, device))
    memory = 1024 * resource.getrusage(0).ru_maxrss
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {
        "part": f"{stage}, {size}",
        "precision": str(dtype).removeprefix("torch."),
        "batch": s.batch,
        "images/s": s.batch / seconds,
        "TFLOP/s": s.batch * flops / seconds / 1e12,
        "matmul TFLOP/s": max(rates) / 1e12,
        "MFU": s.batch * flops / seconds / max(rates),
        "waiting for data": waited,
        "peak memory GiB": memory / 2**30,
    }


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="of the model")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--json", help="also write the results to this file")
    given = parser.parse_args(arguments)
    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or "CPU"
    threads = given.threads or torch.get_num_threads()
    results = [{"part": "machine", "torch": torch.__version__, "device": name, "threads": threads}]
    results[0]["cores"] = os.cpu_count()
    spawn = multiprocessing.get_context("spawn")
    for size, stage in [("", ""), *itertools.product(given.sizes, STAGES)]:
        if size:
            with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(1, mp_context=spawn) as pool:
                job = pool.submit(measure, stage, size, given.device, given.threads, Path(root))
                results.append(job.result())
        print(f"\n{results[-1]['part']}", flush=True)
        for key, value in list(results[-1].items())[1:]:
            print(f"  {key:<20}", f"{value:.3g}" if isinstance(value, float) else value, flush=True)
        if given.json:
            runs.write_json(given.json, results)


if __name__ == "__main__":
    main()
