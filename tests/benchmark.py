"""How fast the two training stages are, and how near to what this machine can do. Measures; asserts nothing.

    python tests/benchmark.py                          every part, a quarter of an hour on two CPU cores
    python tests/benchmark.py --sizes tiny --json speed.json
    python tests/benchmark.py --device cuda --sizes paper
    python tests/benchmark.py --only forms             readable forms against fast ones, a minute or two
    python tests/benchmark.py --only conversion        the readers of public data sets, a minute or two
    python tests/benchmark.py --only reading           stored images, from memory and from the disk, a minute

The figure of merit is a share: useful operations of a step (counted from the equations, `pretraining_flops`,
`finetuning_flops`) per second, over the machine's own rate for one large matrix product of the same type,
measured before and after the steps. A slow or busy machine changes both, and hardly their ratio. Every part
runs in a process of its own, so that its peak memory is its own.
"""
import argparse
import functools
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train_finetune as tune  # noqa: E402
import train_pretrain as pre  # noqa: E402
import udapose as u  # noqa: E402

# images of a step: (pre-training, fine-tuning pairs) on a CPU; a GPU takes more
SIZES = {"tiny": ("tiny", (128, 32), (2048, 512)), "paper": ("paper-hand", (32, 4), (256, 32))}


# ==========================================================================================================
# The limit, counted: operations of a multiplication and an addition, forward once and backward twice
# ==========================================================================================================
def block_flops(tokens: int, width: int) -> int:
    """One block, Eq. (1), forward: 12 D² a token in the linear layers, q k^T and A v in the attention."""
    return 2 * (12 * width ** 2 * tokens + 2 * tokens ** 2 * width)


def embedding_flops(patches: int, s) -> int:
    """The patch embedding, forward."""
    return 2 * patches * s.patch ** 2 * 3 * s.width


def pretraining_flops(s) -> int:
    """Useful operations for one image: f^E on the visible patches, f^D on all; 39.8e9 at ViT-B."""
    N = (s.image // s.patch) ** 2
    V = round(N * (1 - s.mask_ratio))
    encoder = embedding_flops(V, s) + s.depth * block_flops(1 + V, s.width)
    decoder = 2 * (1 + V) * s.width * s.decoder_width + 2 * N * s.decoder_width * s.patch ** 2 * 3
    return 3 * (encoder + decoder + s.decoder_depth * block_flops(1 + N, s.decoder_width))


def finetuning_flops(s, keypoints: int = 21) -> int:
    """Useful operations for one source and one target image; the last block of f^A, and of f^E on the target,
    owes its q and k alone. Eq. (5) counts as the 1x1 convolution, whichever form computes it."""
    N, C, S = (s.image // s.patch) ** 2, s.head_channels, 4 * s.image // s.patch
    embed, block = embedding_flops(N, s), block_flops(1 + N, s.width)
    maps = embed + (s.depth - 1) * block + 2 * 2 * (1 + N) * s.width ** 2
    head = 2 * (4 * (S // 2) ** 2 * s.width * C + 4 * S ** 2 * C * C + S ** 2 * C * keypoints * S)
    return 3 * (embed + s.depth * block + head) + ((3 + 1) * maps if s.lam else 0)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of one large product, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / seconds_of(lambda: a @ b, device, 6)


def seconds_of(work, device: torch.device, repeats: int = 5) -> float:
    """Wall time of work(), the least of several."""
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda": torch.cuda.synchronize()
        laps.append(time.perf_counter() - start)
    return min(laps)


# ==========================================================================================================
# The two stages, made of the scripts' own functions, on random images
# ==========================================================================================================
def random_folder(folder: Path, count: int, side: int) -> data.Dataset:
    """A data set of noise with masks and possible labels."""
    rng, middle = np.random.default_rng(0), (side - 1) / 2
    K = np.tile(np.float32([[2 * side, 0, middle], [0, 2 * side, middle], [0, 0, 1]]), (count, 1, 1))
    keypoints = rng.uniform(-80, 80, (count, 21, 3)).astype(np.float32) + np.float32([0, 0, 600])
    writer = data.Writer(folder, {"name": folder.name, "margin": 1.25, **data.HAND})
    writer.append({"images": rng.integers(256, size=(count, side, side, 3), dtype=np.uint8),
                   "masks": rng.integers(256, size=(count, side, side), dtype=np.uint8),
                   "keypoints": keypoints, "intrinsics": K})
    writer.finish()
    return data.Dataset(folder, "masks", "keypoints", "intrinsics")


def settings_of(script, size: str, device: torch.device, *flags: str):
    """Settings of a script at a size, with a batch that fits here."""
    preset, on_cpu, on_gpu = SIZES[size]
    flags = ["--preset", preset, *flags]
    s = u.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, flags, script.TASKS)
    s.batch = (on_gpu if device.type == "cuda" else on_cpu)[script is tune]
    return s


def pretraining(size: str, sets, device, *flags: str):
    """(settings, make(step) -> batch, loss(batch, dtype), model, operations of a step) of stage 1."""
    s = settings_of(pre, size, device, *flags)
    domains = [(sets, sets.masks, s.masks != "none")]
    encoder = u.Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
    decoder = u.Decoder(encoder.grid, s.patch, s.width, s.decoder_width, s.decoder_depth, s.decoder_heads)
    model = u.MaskedAutoencoder(encoder, decoder).to(device)
    make = lambda step: pre.pretraining_batch(s, step, slice(0, s.batch), domains, sets, device)  # noqa: E731
    loss = lambda batch, dtype: pre.reconstruction_loss(s, model, *batch, device, dtype)[0]  # noqa: E731
    return s, make, loss, model, s.batch * pretraining_flops(s)


def finetuning(size: str, sets, device, *flags: str):
    """The same of stage 2; a step holds as many pairs of a source and a target image as its batch says."""
    s = settings_of(tune, size, device, "--init", "", *flags)
    model, f_A = tune.build(s, 21, 1, device)
    target = sets if s.lam else None
    make = lambda step: tune.finetuning_batch(  # noqa: E731
        s, step, slice(0, s.batch), sets, target, len(sets), model.head.side, device)

    def loss(batch, dtype):
        L_kpt, L_attn = tune.pose_losses(s, model, model.head, f_A, *batch, device, dtype)
        return u.hpe_loss(L_kpt, L_attn, s.lam)

    return s, make, loss, model.train(), s.batch * finetuning_flops(s)


STAGES = {"pre-training": pretraining, "fine-tuning": finetuning}


def train(make, loss, model, dtype, device, steps: int, prefetch=data.prefetch) -> tuple[float, float]:
    """Seconds of a step, and the share of them spent waiting for data, of a loop as the scripts have it."""
    optimiser = torch.optim.AdamW(u.parameter_groups(model, 0.05), lr=1e-4, fused=True)
    batches, waited = prefetch((make(i) for i in range(steps + 1)), device), 0.0
    for step in range(steps + 1):
        ask = time.perf_counter()
        batch = next(batches)
        if step: waited += time.perf_counter() - ask
        optimiser.zero_grad(set_to_none=True)
        loss(batch, dtype).backward()
        optimiser.step()
        if device.type == "cuda": torch.cuda.synchronize()
        if step == 0: start = time.perf_counter()                         # the first step warms up
    total = time.perf_counter() - start
    return total / steps, waited / total


def saved_bytes(compute) -> int:
    """Bytes that the backward pass of compute() would keep, beside parameters: the same on every device."""
    kept = {}

    def keep(x):
        if isinstance(x, torch.nn.Parameter): return x
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): compute()
    return sum(kept.values())


# ==========================================================================================================
# The parts of the report; each runs in its own process and returns a dict
# ==========================================================================================================
def measure_stage(stage: str, size: str, root: str, device: torch.device) -> dict:
    """One stage at one size: rate, share of the product's rate, data wait, memory."""
    preset = SIZES[size][0]
    sets = random_folder(Path(root) / "set", 256, 60 if preset == "tiny" else 320)
    s, make, loss, model, flops = STAGES[stage](size, sets, device)
    batch, before = make(0), memory(device)
    name = u.choose_precision("auto", device, lambda dtype: loss(batch, dtype).backward())
    dtype = getattr(torch, name)
    rates = [matmul_rate(dtype, device)]
    lap = seconds_of(lambda: loss(batch, dtype).backward(), device, 2)
    steps = max(2, min(200, int(10 / lap)))                                # of about ten seconds in all
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()         # without the float32 laps
    seconds, waited = train(make, loss, model, dtype, device, steps)
    peak = memory(device)
    rates.append(matmul_rate(dtype, device))
    threaded, _ = train(make, loss, model, dtype, device, steps, data.in_a_thread)
    laps = laps_of({kind: lambda kind=kind: loss(batch, kind).backward()
                    for kind in (torch.float32, torch.bfloat16)}, device)
    full, kept = s.batch, []
    for s.batch in (2, 6):  # the difference: casts of the weights do not grow with the batch
        batch = make(0)
        kept.append(saved_bytes(lambda: loss(batch, dtype)))
    return {"part": f"{stage}, {size}", "precision": name, "batch": full, "images/s": full / seconds,
            "TFLOP/s": flops / seconds / 1e12, "product TFLOP/s": max(rates) / 1e12,
            "share of the product's rate": flops / seconds / max(rates), "waiting for data": waited,
            "step, with a batch thread / as it is": threaded / seconds,
            "step, float32 / bfloat16": laps[torch.float32] / laps[torch.bfloat16],
            "peak memory GiB": peak / 2 ** 30, "GiB before": before / 2 ** 30,
            "kept for backward, MiB an image": (kept[1] - kept[0]) / 4 / 2 ** 20}


def measure_options(stage: str, size: str, root: str, device: torch.device) -> dict:
    """What the optional parts cost, in shares of the full step's time (batch and step on their own)."""
    sets = random_folder(Path(root) / "set", 256, 60 if size == "tiny" else 320)
    s, make, loss, model, _ = STAGES[stage](size, sets, device)
    batch = make(0)
    dtype = getattr(torch, u.choose_precision("auto", device, lambda dtype: loss(batch, dtype).backward()))
    def step(batch=batch): loss(batch, dtype).backward()
    result = {"part": f"{stage}, {size}: shares of a step"}
    if stage == "pre-training":
        other = {"X_C": pretraining(size, sets, device, "--xc", "0")[1],
                 "foreground weights": pretraining(size, sets, device, "--masks", "none")[1]}
        laps = laps_of({"step": step, "batch": lambda: make(1)}
                       | {k: lambda m=m: m(1) for k, m in other.items()}, device)
        whole = laps["step"] + laps["batch"]
        result["batch"] = laps["batch"] / whole
        return result | {k: (laps["batch"] - laps[k]) / whole for k in other}
    rows = u.class_attention

    def no_rows():
        u.class_attention = lambda q, k: q[:, 0, 0, :1] + k[:, 0, 1:, 0]   # (B, N), next to nothing
        step()
        u.class_attention = rows

    laps = laps_of({"step": step, "class rows": no_rows, "target": lambda: step((*batch[:3], None)),
                    "batch": lambda: make(1)}, device)
    f_A = seconds_of(lambda: attention_only(model, batch[3], device, dtype), device)
    return result | {"class rows": 1 - laps["class rows"] / laps["step"], "f^A": f_A / laps["step"],
                     "target pass, f^A and Eq. (6)": 1 - laps["target"] / laps["step"],
                     "batch": laps["batch"] / laps["step"]}


@torch.no_grad()
def attention_only(model, x_t, device, dtype):
    with u.autocast(device, dtype): return model.encoder.attention_maps(x_t)


def laps_of(works: dict, device, seconds: float = 8) -> dict:
    """The least time of each, taken in turn, so that a busy neighbour hits all alike; at least three rounds."""
    laps, end = [], time.perf_counter() + seconds
    while len(laps) < 3 or time.perf_counter() < end:
        laps.append({name: seconds_of(work, device, 1) for name, work in works.items()})
    return {name: min(lap[name] for lap in laps) for name in works}


def measure_forms(size: str, root: str, device: torch.device) -> dict:
    """Readable forms against fast ones, in ms: attention in both types and Eq. (5), forward and backward; the
    largest voxel of every heatmap in both types."""
    s, B = settings_of(tune, size, device, "--init", ""), 8 if size == "paper" else 32
    result, d, T = {"part": f"forms, {size} (ms)"}, s.width // s.heads, 1 + (s.image // s.patch) ** 2
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(B, T, 3, s.heads, d, device=device, dtype=dtype, requires_grad=True)
        def run(form):
            y = form(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            y.backward(torch.ones_like(y))

        def written(): run(lambda q, k, v: u.plain_attention(q, k, v)[0])
        def fused(): run(torch.nn.functional.scaled_dot_product_attention)
        laps = laps_of({"written": written, "fused": fused}, device)
        result |= {f"attention {str(dtype)[6:]} {k}": 1e3 * v for k, v in laps.items()}
    S, C = 4 * s.image // s.patch, s.head_channels
    head = u.KeypointHead((S // 4, S // 4), s.width, C, 21).to(device)
    features = torch.randn(B, C, S, S, device=device, requires_grad=True)
    centres, valid = torch.rand(B, 21, 3, device=device) * S, torch.ones(B, 21, device=device)
    def written(): u.keypoint_loss(head.heatmaps(features), centres, valid, s.sigma).backward()
    def expanded(): u.keypoint_loss_expanded(features, head.conv, centres, valid, s.sigma).backward()
    laps = laps_of({"written": written, "expanded": expanded}, device)
    kept = [saved_bytes(lambda: u.keypoint_loss(head.heatmaps(features), centres, valid, s.sigma)),
            saved_bytes(lambda: u.keypoint_loss_expanded(features, head.conv, centres, valid, s.sigma))]
    result |= {f"Eq. (5) {k}": 1e3 * v for k, v in laps.items()} | {
        f"Eq. (5) {k}, MiB kept an image": v / B / 2 ** 20 for k, v in zip(("written", "expanded"), kept)}
    for dtype in (torch.float32, torch.bfloat16):
        heatmaps = torch.randn(B, 21, S ** 3, device=device).to(dtype)
        forms = {"argmax": heatmaps.argmax, "max": heatmaps.max}
        laps = laps_of({name: functools.partial(form, -1) for name, form in forms.items()}, device)
        result |= {f"largest voxel {str(dtype)[6:]} {k}": 1e3 * v for k, v in laps.items()}
    return result


def measure_reading(root: str, device: torch.device) -> dict:
    """Stored images of 320 px a second: from memory, in the two ways to fill pinned memory; and from the disk
    (where the folder for temporary files lies on one), rows announced or not."""
    path, rng = random_folder(Path(root) / "set", 2000, 320).folder / "images.npy", np.random.default_rng(0)
    buffer = np.empty((256, 320, 320, 3), np.uint8)

    def at_once(images, rows): buffer[...] = images[rows]                 # as torch.from_numpy().pin_memory()
    def row_by_row(images, rows): data.read_into(buffer, images, rows)    # as data.read_rows on CUDA
    def announced(images, rows): data.announce(images, rows); row_by_row(images, rows)
    def rate(read, cold=False):
        path.read_bytes()                                                  # now it is in memory
        if cold:
            with open(path) as file:
                os.fsync(file)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        images, rows = data.open_array(path, np.uint8, ("n", 320, 320, 3)), rng.permutation(2000)[:256]
        return len(rows) / seconds_of(lambda: read(images, rows), torch.device("cpu"), 1)
    ways = {"from memory, at once": (at_once,), "from memory, row by row": (row_by_row,),
            "from memory, announced": (announced,)}
    if hasattr(os, "posix_fadvise"):  # not on macOS
        ways |= {"from the disk": (row_by_row, True), "from the disk, announced": (announced, True)}
    for way in ways.values(): rate(*way)                                   # the first warms up
    laps = [{name: rate(*way) for name, way in ways.items()} for _ in range(5)]
    return {"part": "reading (images/s)"} | {name: max(lap[name] for lap in laps) for name in ways}


def measure_compile(size: str, root: str, device: torch.device) -> dict:
    """torch.compile: seconds it takes, and the step's time with it over the one without."""
    sets = random_folder(Path(root) / "set", 64, 60 if size == "tiny" else 320)
    s, make, loss, model, _ = pretraining(size, sets, device)
    batch, result = make(0), {"part": f"torch.compile, pre-training, {size}"}
    dtype = getattr(torch, u.choose_precision("auto", device, lambda dtype: loss(batch, dtype).backward()))
    plain = seconds_of(lambda: loss(batch, dtype).backward(), device)
    model.compile()
    result["seconds to compile"] = seconds_of(lambda: loss(batch, dtype).backward(), device, 1)
    result["step, compiled / plain"] = seconds_of(lambda: loss(batch, dtype).backward(), device) / plain
    return result


def scaling_worker(rank: int, world: int, folder: str, name: str, port: int, box) -> None:
    """One of several processes: seconds of a step of pre-training with gradients averaged."""
    device = torch.device(name, rank) if name == "cuda" else torch.device("cpu")
    torch.cuda.set_device(device) if name == "cuda" else torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo", rank=rank, world_size=world)
    sets = data.Dataset(folder, "masks")
    s, make, _, mae, _ = pretraining("tiny", sets, device)
    model = u.parallel(mae, world)
    loss = lambda batch, dtype: pre.reconstruction_loss(s, model, *batch, device, dtype)[0]  # noqa: E731
    seconds, _ = train(make, loss, model, torch.float32, device, 60)
    if rank == 0: box.put(s.batch * world / seconds)
    torch.distributed.destroy_process_group()


def measure_scaling(most: int, root: str, device: torch.device) -> dict:
    """Images per second of 1 and of `most` processes, one thread (or GPU) each, a full batch each."""
    random_folder(Path(root) / "set", 512, 60)
    context, rates = multiprocessing.get_context("spawn"), {}
    for world in (1, most):
        box, port = context.Queue(), 29000 + os.getpid() % 1000 + world
        workers = [context.Process(target=scaling_worker, args=(
            rank, world, f"{root}/set", device.type, port, box)) for rank in range(world)]
        for worker in workers: worker.start()
        rates[world] = box.get(timeout=300)
        for worker in workers: worker.join()
    return {"part": f"{most} processes, pre-training, tiny", "images/s of one": rates[1],
            f"images/s of {most}": rates[most], "efficiency": rates[most] / rates[1] / most}


def memory(device: torch.device) -> float:
    """Peak bytes so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda": return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# ==========================================================================================================
# Conversion of public data sets: their readers' test files, as large as the publisher's
# ==========================================================================================================
def drawn_files(name: str, root: Path) -> Path:
    """The files that the tests of a reader draw, in their publisher's layout."""
    import test_body_readers as body
    import test_data as first
    import test_hand_readers as hand
    data.MPI_FRAMES = body.MPI_ROWS                                        # two sequences ..
    data.in_a_process = lambda function, *arguments: function(*arguments)  # .. labels in this process
    if name in ("stb", "rhd", "pan"):                                      # fixtures: what pytest wraps
        return getattr(hand, name).__wrapped__(SimpleNamespace(mktemp=lambda _: root))
    if name == "freihand": first.write_freihand(root, first.windows())
    elif name == "gan": hand.write_gan(root, False)
    elif name == "imagenet":                                               # as large as most of its images
        root.mkdir()
        for i in range(8): Image.new("RGB", (500, 375), (90, 110, 130)).save(root / f"{i}.JPEG")
    else: getattr(body, f"write_{name}")(root)
    if name == "3dhp": body.write_3dhp_test(root)
    return root


# reader, its options, pictures so many times as wide as drawn; of a video: frames, and those of them taken
CONVERSIONS = [
    ("freihand", {}, 1, 0, []), ("stb", {}, 1, 0, []), ("rhd", {}, 1, 0, []),
    ("pan", {"split": "test", "stride": 1}, 4, 0, []), ("pan", {"stride": 1}, 4, 61, range(0, 61, 30)),
    ("gan", {}, 1, 0, []), ("h36m", {}, 4, 60, range(0, 60, 5)), ("3dpw", {}, 4, 0, []),
    ("3dhp", {"stride": 1, "cameras": "0,4"}, 8, 41, range(0, 41, 10)), ("3dhp", {"split": "test"}, 8, 0, []),
    ("surreal", {"split": "val"}, 1, 100, [50]), ("imagenet", {}, 1, 0, [])]


def enlarged(sample: data.Sample, times: int) -> data.Sample:
    """The sample as of a picture that is so many times as wide."""
    if sample.keypoints is None: return sample
    S = np.diag([times, times, 1.0])
    S[:2, 2] = (times - 1) / 2                                             # pixel centres are integers
    uv = None if sample.uv is None else sample.uv * times + (times - 1) / 2
    size = sample.size and tuple(times * np.array(sample.size))
    return sample._replace(intrinsics=S @ sample.intrinsics, uv=uv, size=size, tolerance=9.0 * times)


def blow_up(root: Path, samples: list, times: int, frames: int, taken) -> list:
    """Rewrites some of the samples' pictures `times` as wide, with a camera's noise (a decoder's time goes by
    what it finds), and returns the samples that fit; a video gets `frames`, and samples at those `taken`."""
    from test_body_readers import write_h5, write_video
    rng, files, result = np.random.default_rng(0), {}, []
    for s in samples: files.setdefault(s.image, []).append(s)

    def grown(sample: data.Sample) -> np.ndarray:
        image = data.open_sample(root, sample._replace(mask=None), 0, 0)[0]
        image = Image.fromarray(image).resize(tuple(times * np.array(image.shape[1::-1])))
        return np.uint8(np.clip(image + rng.normal(0, 6, np.shape(image)), 0, 255))

    for name, own in list(files.items())[:2 if frames else 12]:
        images, larger = [grown(s) for s in (own if frames else own[:1])], [enlarged(s, times) for s in own]
        if not frames:
            Image.fromarray(images[0]).save(root / name, quality=90)
            result += larger
            continue
        codec, turn = "mpeg4" if name.endswith("avi") else "libx264", [i % len(own) for i in range(frames)]
        write_video(root / name, [images[i] for i in turn], codec)
        masked = bool(times > 1 and own[0].mask)
        if masked:
            masks = [data.open_mask(root / s.mask, s.foreground, s.mask_key) for s in own]
            masks = [np.kron(mask, np.ones((times, times), np.uint8)) for mask in masks]
            write_h5(root / own[0].mask, {"Masks": [masks[i] for i in turn]})
        result += [larger[turn[i]]._replace(frame=i, **({"mask_key": i} if masked else {})) for i in taken]
    data.open_video.cache_clear()
    return result


def rate_of(samples: list, root: Path, skeleton: dict) -> float:
    """Images of one worker, from files of pictures to rows of arrays, a second of its processor time: a rate
    per core, whoever else is busy; the best of several laps."""
    jobs = [samples[i:i + data.SAMPLES_A_JOB] for i in range(0, len(samples), data.SAMPLES_A_JOB)]

    def lap() -> float:
        start = time.process_time()
        data.open_video.cache_clear()
        for job in jobs:
            _, skipped = data.convert(root, 320, skeleton, job)
            if skipped: raise RuntimeError(skipped[0])
        return time.process_time() - start

    laps = [lap(), lap()]
    while sum(laps) < 1.5: laps.append(lap())
    return len(samples) / min(laps)


def measure_conversion(root: str, device: torch.device) -> dict:
    """Every reader with a data set's own size of pictures, stored at 320 px. Labels are not counted."""
    torch.set_num_threads(1)                                               # as in a worker
    result = {"part": "conversion, images/s of one core"}
    for i, (name, options, *size) in enumerate(CONVERSIONS):
        files = drawn_files(name, Path(root) / str(i))
        samples = blow_up(files, list(data.READERS[name][0](files, **options)[1]), *size)
        _, _, (width, height) = data.open_sample(files, samples[0]._replace(mask=None), 0, 0)
        kind = f"{name}, {width} x {height} {Path(samples[0].image).suffix[1:].lower()}"
        result[kind] = rate_of(samples, files, data.READERS[name][1])
    return result


# ==========================================================================================================
# The report
# ==========================================================================================================
def alone(function, *arguments) -> dict:
    """function(*arguments, root) in a process of its own, with a temporary folder."""
    spawn = multiprocessing.get_context("spawn")                           # a Pool's worker may start none
    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(in_folder, function, arguments, root).result()


def in_folder(function, arguments, root: str) -> dict:
    *most, device, threads = arguments
    if threads: torch.set_num_threads(threads)
    return function(*most, root, torch.device(device))


def show(result: dict) -> None:
    def text(value): return f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = (f"  {k:<36} {text(v)}" for k, v in result.items() if k != "part")
    print(f"\n{result['part']}", *lines, sep="\n", flush=True)


def main(arguments=None) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--only", choices=["training", "forms", "reading", "conversion"], help="one part")
    parser.add_argument("--json", help="also write the results to this file")
    given = parser.parse_args(arguments)
    where = (given.device, given.threads)
    results = [{"part": "machine", "torch": torch.__version__, "processor": platform.processor() or "unknown",
                "cores": os.cpu_count(), "threads": given.threads or torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if given.device == "cuda" else "CPU (no GPU here)"}]
    show(results[0])
    jobs = [(f, stage, size) for f in (measure_stage, measure_options) for size in given.sizes
            for stage in STAGES]
    jobs += [(measure_compile, size) for size in given.sizes]
    training, forms, reading, conversion = (given.only in (None, part) for part in
                                            ("training", "forms", "reading", "conversion"))
    processes = torch.cuda.device_count() if given.device == "cuda" else min(2, os.cpu_count() or 1)
    jobs = jobs * training + [(measure_scaling, processes)] * (training and processes > 1)
    jobs += [(measure_forms, size) for size in given.sizes] * forms
    jobs += [(measure_reading,)] * reading + [(measure_conversion,)] * conversion
    for function, *which in jobs:
        results.append(alone(function, *which, *where))
        show(results[-1])
        if given.json: u.write_json(Path(given.json), results)


if __name__ == "__main__": main()
