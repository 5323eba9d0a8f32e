"""Stage 2, Sec. 3.2: 3D heatmaps from source labels, target attention held to that of the frozen f^A.

    python train_finetune.py                                         after train_pretrain.py; minutes on a CPU
    python train_finetune.py --variant scratch                       the baseline: source labels alone
    python train_finetune.py --task human                            bodies instead of hands
    torchrun --nproc_per_node 8 train_finetune.py --preset paper-hand

The same command again resumes a run that was stopped. Writes checkpoint.pt (f^E, f^H) for evaluate.py. The
last step's weights are the result: the target's labels are never opened (but by `oracle`, which learns them),
so that nothing can be chosen on them.
"""
import copy
import dataclasses
from pathlib import Path

import torch

import data
import udapose as u


@dataclasses.dataclass
class Settings:
    """One field a line: meaning, origin. Defaults: the paper's, where it has them. Others: PRESETS."""
    preset: str = "tiny"          # sizes and schedule: tiny, small, paper-hand, paper-human
    task: str = "hand"            # embedded benchmark, hand or human: see TASKS
    variant: str = "full"         # row of the paper's tables: see VARIANTS
    out: str = ""                 # run folder; default runs/PRESET[-human]/VARIANT-seedSEED
    init: str = "auto"    # pre-training run, or a public weights file; "": scratch; auto: by variant and seed
    source: str = "datasets/hands/source_train"     # data-set folder with keypoints
    target: str = "datasets/hands/target_train"     # data-set folder, images only (opened for lam or adapt)
    validation: str = "datasets/hands/source_val"  # labelled *source* images, to watch the training; "": none
    labels: int = 0               # labelled source images to use, the first so many; 0: all
    lam: float = 100.0            # lambda_attn of Eq. (7) (paper Sec. 7: 100 hands, 10 humans); 0: without AR
    adapt: str = ""  # method to compare with: see METHODS; on what all processes hold at once; "": none
    adapt_weight: float = 1.0     # its trade-off (DDC 0.25, DANN 1: published; DAN 1: public code's)
    sigma: float = 2.0          # standard deviation of the target Gaussians, voxels (ours; the field's value)
    image: int = 256              # side of the network's crop, px (paper Sec. 7)
    patch: int = 16               # side of a patch, px (paper: ViT-B/16)
    width: int = 768              # width of f^E (Table 7)
    depth: int = 12               # blocks of f^E (Table 7)
    heads: int = 12               # heads of f^E (ViT-B)
    head_channels: int = 256      # channels of f^H (Table 7)
    sync_bn: bool = False         # statistics of f^H's BatchNorm over all processes (CUDA only)
    batch: int = 128              # source images a step, and as many target images (paper Sec. 7)
    micro_batch: int = 0          # images a process holds at once; 0: its whole share (gradients accumulate)
    epochs: float = 50            # passes over the labelled source images (paper Sec. 7)
    warmup: int = 500             # steps in which the learning rate rises (ViTPose)
    lr: float = 5e-4              # peak learning rate of AdamW (paper Sec. 7)
    layer_decay: float = 1.0      # learning rate of a block, relative to the next one (1: off; ViTPose: 0.75)
    weight_decay: float = 0.1     # of AdamW (ViTPose, as its betas 0.9 and 0.999)
    jitter: float = 0.2           # brightness, contrast, saturation 1 +- jitter (ours)
    expanded: bool = True  # Eq. (5) without a heatmap (keypoint_loss_expanded); --no-expanded: as written
    seed: int = 0                 # of everything random
    device: str = "auto"          # auto, cpu, cuda
    threads: int = 0              # CPU threads of a process; 0: torch's choice
    precision: str = "auto"       # auto (timed at start-up), float32, bfloat16, float16
    compile: str = "auto"         # torch.compile: on, off; auto: on CUDA, in runs of 2000 steps and more
    deterministic: bool = False   # a GPU gives the same bits each time, more slowly; a CPU does without it
    checkpointing: bool = False   # recompute the encoder's blocks in the backward pass: less memory, slower
    validate_every: int = 250     # steps between measurements on the validation set
    save_every: int = 200         # steps between checkpoints: what a kill can lose
    log_every: int = 50           # steps between lines of log.jsonl


TINY = dict(image=48, patch=8, width=96, depth=4, heads=3, head_channels=48, labels=1000, batch=32, epochs=32,
            warmup=50, lr=2e-3, sigma=1.8)
PRESETS = {
    "tiny": TINY,
    "small": TINY | dict(epochs=64, save_every=500),
    "paper-hand": dict(task="hand", source="datasets/freihand_train", target="datasets/rhd_train",
                       validation="", micro_batch=64,  # 211 MiB a pair: 13 of a GPU's 24 GiB
                       save_every=2000),  # a checkpoint is 1.1 GB
    "paper-human": dict(task="human", source="datasets/h36m_train", target="datasets/3dhp_train",
                        validation="", lam=10.0, epochs=100, micro_batch=64, save_every=2000),
}
TASKS = {  # what the embedded benchmark of bodies changes
    "hand": {},
    "human": dict(source="datasets/bodies/source_train", target="datasets/bodies/target_train",
                  validation="datasets/bodies/source_val", lam=10.0),  # the paper's; 100: source 7 mm worse
}
VARIANTS = {  # each starts from the pre-training run of its own name, or of that in PRETRAINED_BY
    "full": {},
    "scratch": dict(init="", lam=0.0),
    "mae": dict(lam=0.0),                       # "Ours (MAE)", "w/o FCR, AR"
    "no-fcr": {}, "no-xc": {}, "source-masks": {},
    "no-ar": dict(lam=0.0),                     # "w/o AR": shares the pre-training of "full"
    "no-fcr-ar": dict(lam=0.0), "no-xc-ar": dict(lam=0.0), "no-fcr-xc": {},   # the other cells of 2 x 2 x 2
    "source-only": dict(lam=0.0), "source-only-mae": dict(lam=0.0), "source-only-no-xc": dict(lam=0.0),
    "oracle": dict(init="", lam=0.0, validation=""),   # the labelled target as source: a lower bound
    "ddc": dict(init="", lam=0.0, adapt="ddc", adapt_weight=0.25),   # from scratch; below: from MAE weights
    "dan": dict(init="", lam=0.0, adapt="dan"), "dann": dict(init="", lam=0.0, adapt="dann"),
    "mae-ddc": dict(lam=0.0, adapt="ddc", adapt_weight=0.25),
    "mae-dan": dict(lam=0.0, adapt="dan"), "mae-dann": dict(lam=0.0, adapt="dann"),
}
PRETRAINED_BY = {"no-ar": "full", "no-fcr-ar": "no-fcr", "no-xc-ar": "no-xc", "no-fcr-xc": "mae",
                 "mae-ddc": "mae", "mae-dan": "mae", "mae-dann": "mae"}
METHODS = {"ddc": u.ddc_loss, "dan": u.dan_loss, "dann": u.dann_loss}  # --adapt, in the place of L_attn
SKELETON = ("joints", "bones", "root", "depth_range")  # what a model has to remember of its labels


# ==========================================================================================================
# One step
# ==========================================================================================================
def finetuning_batch(s: Settings, step: int, own: slice, source, target, labels: int, side: int, device):
    """Source images (b, 3, H, W), voxel centres (b, K, 3), valid (b, K); target images or None."""
    rng = u.random_generator(s.seed, "finetuning", step)
    rows = data.batch_rows(labels, s.seed, "finetuning order", step, s.batch)[own]
    x_s, _, A = data.crops(source, rows, data.augmentation(rng, s.batch, s.jitter)[own], s.image, device)
    uv, depth = data.labels_of(source, rows, A)                        # (b, K, 2) px, (b, K) mm from the root
    centres, valid = u.to_voxels(uv, depth, s.image, source.meta["depth_range"], side)
    if target is None: return data.normalise(x_s), centres, valid, None
    rows = data.batch_rows(len(target), s.seed, "target order", step, s.batch)[own]
    x_t, _, _ = data.crops(target, rows, data.augmentation(rng, s.batch, s.jitter)[own], s.image, device)
    return data.normalise(x_s), centres, valid, data.normalise(x_t)


def pose_losses(s: Settings, model, head, f_A, x_s, centres, valid, x_t, device, dtype, compare=None):
    """L_kpt of Eq. (5) and L_attn of Eq. (6) for one micro-batch; in its place the loss of `compare`."""
    with u.autocast(device, dtype):
        features, a_E, *phi = model(x_s, x_t, compare is not None)       # (b, C, S, S), (b, L, N), 2 x (b, D)
        heatmaps = None if s.expanded else head.heatmaps(features)                  # Eq. (4), (b, K, S, S, S)
    if s.expanded:  # the last convolution of Eq. (4) is folded into Eq. (5); --no-expanded: as printed
        L_kpt = u.keypoint_loss_expanded(features, head.conv, centres, valid, s.sigma)
    else: L_kpt = u.keypoint_loss(heatmaps, centres, valid, s.sigma)                                 # Eq. (5)
    if x_t is None: return L_kpt, torch.zeros((), device=device)
    if compare is not None: return L_kpt, compare(*map(u.gather_features, phi))
    with torch.no_grad(), u.autocast(device, dtype): a_A = f_A.attention_maps(x_t)    # the same augmented x_t
    return L_kpt, u.attention_loss(a_E, a_A)                                                         # Eq. (6)


def comparison(s: Settings, discriminator, p: float):
    """The loss of (phi_s, phi_t) that --adapt names, at progress p in 0..1 of the training, or None."""
    if s.adapt == "dann": return lambda phi_s, phi_t: u.dann_loss(phi_s, phi_t, discriminator, u.dann_ramp(p))
    return METHODS.get(s.adapt)


def second_term(s: Settings) -> tuple[str, str]:
    """What stands beside L_kpt in Eq. (7), L_attn or the loss of a comparison method, and the setting that
    weights it."""
    return (f"L_{s.adapt}", "adapt_weight") if s.adapt else ("L_attn", "lam")


@torch.no_grad()
def validate(s: Settings, estimator, dataset, rank: int, world: int, device, dtype) -> float:
    """EPE (MPJPE for humans) on labelled source images, mm, with the root's true depth; on all processes."""
    estimator.eval()
    u.statistics_of_rank_0(estimator)
    total = torch.zeros(2, dtype=torch.float64)                                # sum and number of the errors
    for rows in data.chunks(len(dataset))[rank::world]:
        predicted, truth = data.predict(estimator, dataset, rows, s.image, device, dtype)   # (b, K, 3) mm
        errors = u.joint_errors(predicted, truth, dataset.meta["root"])[:, data.compared(dataset.meta)]
        errors = errors.double().cpu()                                                     # (b, compared) mm
        total += torch.stack([errors.nansum(), errors.isfinite().sum()])
    estimator.train()
    return float(torch.div(*u.mean_over_processes(total)))


@torch.no_grad()
def losses_by_image(s: Settings, step: int, own: slice, estimator, f_A, source, target, labels: int, device,
                    dtype):
    """(term, value, data set, row) of each image of a micro-batch alone, to find the one that is not finite.

    A loss of two domains has no value for one image: the sum of its feature stands in for it.
    """
    rank = u.place_among_processes()[0]  # phi_t holds an image of each process, `gather_features`
    compare = (lambda phi_s, phi_t: phi_t[rank].sum()) if s.adapt else None
    batch = finetuning_batch(s, step, own, source, target, labels, estimator.head.side, device)
    rows = data.batch_rows(labels, s.seed, "finetuning order", step, s.batch)[own]
    if target is not None: others = data.batch_rows(len(target), s.seed, "target order", step, s.batch)[own]
    for i, row in enumerate(rows):
        one = [part[i:i + 1] if part is not None else None for part in batch]
        L_kpt, second = pose_losses(s, estimator, estimator.head, f_A, *one, device, dtype, compare)
        yield "L_kpt", L_kpt, source, row
        if target is not None: yield second_term(s)[0], second, target, others[i]


# ==========================================================================================================
# Set-up
# ==========================================================================================================
def build(s: Settings, keypoints: int, rank: int, device):
    """f^E with f^H, and frozen f^A: the same pre-trained weights twice, Sec. 3.2. From scratch: no f^A."""
    torch.manual_seed(s.seed)
    encoder = u.Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
    head = u.KeypointHead(encoder.grid, s.width, s.head_channels, keypoints)
    path = Path(s.init) / "checkpoint.pt"
    if s.init and Path(s.init).is_file():
        report = u.load_public_weights(s.init, encoder)
        if rank == 0: print("\n".join(report), flush=True)
    elif s.init:
        if not path.parent.is_dir():
            raise u.InputError(f"--init {s.init}: neither a pre-training run (train it first, same --preset, "
                               "--seed) nor a file of weights")
        if rank == 0: print(f"starts from {s.init}", flush=True)
        state = u.read_checkpoint(path)
        if "decoder" not in state: raise u.InputError(f"{s.init}: not a pre-training run; --init takes one")
        with u.usable(path): step, steps = state["step"], state["steps"]
        if step != steps: raise u.InputError(f"{s.init}: stands at step {step} of {steps}: finish it")
        with u.usable(path):
            theirs = {k: state["settings"][k] for k in ("image", "patch", "width", "depth", "heads")}
        other = [f"{k} {v} there, {getattr(s, k)} here" for k, v in theirs.items() if v != getattr(s, k)]
        if other: raise u.InputError(f"{s.init}: another architecture: {', '.join(other)}")
        u.load_parts(path, state, encoder=encoder)
        known = state["settings"].get("target", "")
        if s.lam and rank == 0 and (not known or Path(known) != Path(s.target)):
            print(f"f^A was pre-trained on {known or 'no target'}; L_attn holds its attention on {s.target}",
                  flush=True)
    encoder.checkpointing = s.checkpointing
    f_A = copy.deepcopy(encoder).eval().requires_grad_(False).to(device) if s.lam else None
    if s.sync_bn and device.type != "cuda": raise u.InputError("--sync-bn: SyncBatchNorm exists on CUDA only")
    if s.sync_bn: head = torch.nn.SyncBatchNorm.convert_sync_batchnorm(head)
    discriminator = u.DomainDiscriminator(s.width) if s.adapt == "dann" else None
    return u.PoseEstimator(encoder, head, discriminator).to(device), f_A


def optimiser_groups(s: Settings, estimator) -> list[dict]:
    """Weight decay as `parameter_groups`; block i of L learns at layer_decay^(L + 1 - i) of lr (ViTPose)."""
    encoder, lowest = estimator.encoder, s.layer_decay ** (s.depth + 1)
    parts = [(estimator.head, 1.0), (encoder.norm, 1.0), (encoder.patch_embed, lowest)]
    parts += [(block, s.layer_decay ** (s.depth + 1 - i)) for i, block in enumerate(encoder.blocks, 1)]
    if estimator.discriminator is not None: parts.append((estimator.discriminator, 1.0))
    groups = [g | {"scale": scale} for part, scale in parts for g in u.parameter_groups(part, s.weight_decay)]
    groups.append({"params": [encoder.cls_token], "weight_decay": 0.0, "scale": lowest})
    here = {id(p) for group in groups for p in group["params"]}
    lost = [n for n, p in estimator.named_parameters() if p.requires_grad and id(p) not in here]
    if lost: raise u.InputError(f"optimiser_groups: {lost[0]} would not be trained; give it a rate there")
    return [g for g in groups if g["params"]]


def complete(s: Settings) -> None:
    """Settings that follow from others."""
    usual = {changed.get("source", Settings.source) for changed in (PRESETS | TASKS).values()}
    if s.variant == "oracle" and s.source not in usual | {s.target}:
        raise u.InputError(f"--source {s.source}: the oracle learns the labels of --target; name it there")
    if s.variant == "oracle": s.source = s.target
    runs = f"runs/{u.run_group(s.preset, s.task)}"
    s.out = s.out or f"{runs}/{s.variant}-seed{s.seed}"
    if s.init == "auto": s.init = f"{runs}/pretrain-{PRETRAINED_BY.get(s.variant, s.variant)}-seed{s.seed}"
    if s.adapt and s.adapt not in METHODS:
        raise u.InputError(f"--adapt {s.adapt}: choose {', '.join(METHODS)}")
    if s.adapt and s.lam: raise u.InputError("--adapt stands in the place of L_attn in Eq. (7): give --lam 0")
    if s.lam and not s.init: raise u.InputError("--lam > 0 needs a pre-trained f^A: give --init, or --lam 0")


def check_labels(s: Settings, source: data.Dataset, side: int) -> None:
    """InputError unless some joint of the labelled images lies in the volume of `side` voxels."""
    H, meta, count = source.images.shape[1], source.meta, min(s.labels or len(source), len(source))
    for rows in data.chunks(count):
        as_it_is = torch.from_numpy(data.no_augmentation(len(rows)))
        A = data.crop_transform(as_it_is, H, meta["margin"], s.image)                     # (b, 2, 3)
        uv, depth = data.labels_of(source, rows, A)                    # (b, K, 2) px, (b, K) mm from the root
        if u.to_voxels(uv, depth, s.image, meta["depth_range"], side)[1].any(): return
    raise u.InputError(f"{source.folder}: no joint of the first {count} images (--labels) counts: the root "
                       "has no label, or all lie outside the volume; look at them: python data.py show "
                       f"{source.folder} PICTURE.png")


def open_data(s: Settings):
    """Source with labels, target (images only), validation (None where not asked for); checksums of the two
    that are learned from."""
    source = data.Dataset(s.source, "keypoints", "intrinsics")
    target = data.Dataset(s.target) if s.lam or s.adapt else None
    validation = data.Dataset(s.validation, "keypoints", "intrinsics") if s.validation else None
    whose = f'{s.source}; name another --validation, or "" for none'
    if validation is not None:
        data.same_skeleton(validation, source.meta, whose)
        data.with_root(validation)
    facts = {name: d.fingerprint for name, d in (("source", source), ("target", target)) if d is not None}
    return source, target, validation, facts


def train_pose(s: Settings, run: u.Run, stop: u.StopSignal, estimator, f_A, source, target, validation,
               device, world) -> bool:
    """f^E and f^H by Eq. (7). Returns False if stopped."""
    weight = getattr(s, second_term(s)[1])
    head, parts = estimator.head, dict(estimator.named_children())  # f^E, f^H and DANN's discriminator
    optimiser = torch.optim.AdamW(optimiser_groups(s, estimator), lr=s.lr, betas=(0.9, 0.999), fused=True)
    labels, skeleton = min(s.labels or len(source), len(source)), {k: source.meta[k] for k in SKELETON}
    steps = max(1, round(s.epochs * labels / s.batch))
    state = run.resume("checkpoint.pt", optimiser, parts, "finetuning")
    if (start := state["step"]) == steps:
        if run.rank == 0: print(f"finished already: {run.folder}", flush=True)
        return True
    sums = state.get("sums", torch.zeros(3)).to(device)  # of both terms of Eq. (7), steps since the last log
    micro = u.micro_batches(s.batch, s.micro_batch, run.rank, world)

    def make(step, own): return finetuning_batch(s, step, own, source, target, labels, head.side, device)
    trial, first = copy.deepcopy(estimator), make(0, micro[0])
    dtype = run.decide_dtype("precision", s.precision, device, lambda dtype: sum(pose_losses(
        s, trial, trial.head, f_A, *first, device, dtype, comparison(s, trial.discriminator, 0))).backward())
    del trial, first  # else their memory stays taken
    if run.decide_compile(s.compile, device, steps):
        estimator.compile()
        if f_A is not None: f_A.attention_maps = torch.compile(f_A.attention_maps)
    if run.rank == 0: announce(s, steps, labels, len(source), dtype)
    model, scaler = u.parallel(estimator, world), u.grad_scaler(device, dtype, state)
    estimator.train()
    progress = u.Progress("fine-tuning", steps, s.batch, start, run.rank)

    def save(done): run.save("checkpoint.pt", s, optimiser, parts, stage="finetuning", step=done,
                             steps=steps, sums=u.mean_over_processes(sums), skeleton=skeleton,
                             scaler=scaler.state_dict())

    def losses(step): return (loss for own in micro for loss in losses_by_image(
        s, step, own, estimator, f_A, source, target, labels, device, dtype))
    guard = u.Guard(optimiser, scaler, estimator, sums, save, losses)
    ahead = data.prefetch((make(i, own) for i in range(start, steps) for own in micro), device)
    for step in range(start, steps):
        rate = u.cosine_rate(step, steps, s.warmup, s.lr)
        for group in optimiser.param_groups: group["lr"] = rate * group["scale"]
        guard.start()
        compare = comparison(s, estimator.discriminator, step / steps)
        for _ in u.micro_steps(model, micro):
            L_kpt, L_second = pose_losses(s, model, head, f_A, *next(ahead), device, dtype, compare)
            L_HPE = u.hpe_loss(L_kpt, L_second, weight)            # Eq. (7): L_second is L_attn, lambda_attn
            scaler.scale(L_HPE / len(micro)).backward()
            sums += torch.stack([L_kpt.detach(), L_second.detach(), torch.ones_like(L_kpt)]) / len(micro)
        guard.step(step, sums)
        done, stopping = step + 1, stop.requested()
        logging, saving, validating = (done % every == 0 or done == steps for every in
                                       (s.log_every, s.save_every, s.validate_every))
        if logging or saving or validating or stopping: guard.check()
        if logging: report(s, run, progress, done, steps, sums, rate)
        if validating and validation is not None:
            epe = validate(s, estimator, validation, run.rank, world, device, dtype)
            run.log(stage="finetuning", step=done, source_val_epe=epe)
            if run.rank == 0:
                print(f"fine-tuning  {done}/{steps} | error on source validation {epe:.2f} mm", flush=True)
        if saving or stopping: save(done)
        if stopping: return False
    return True


def announce(s: Settings, steps: int, labels: int, images: int, dtype) -> None:
    """Say what is about to be trained."""
    print(f"fine-tuning: {steps} steps, {labels}/{images} labels, {dtype}", flush=True)
    if s.warmup > steps:
        print(f"--warmup {s.warmup}: the learning rate only rises in {steps} steps, and never reaches --lr",
              flush=True)


def report(s: Settings, run: u.Run, progress: u.Progress, done: int, steps: int, sums, rate: float) -> None:
    """Log the mean of each term of Eq. (7) since the last time, and their ratio; sums start again at 0."""
    (name, weight), (L_kpt, L_second, _) = second_term(s), (u.mean_over_processes(sums) / sums[2]).tolist()
    losses = {"L_kpt": L_kpt, name: L_second}
    share = getattr(s, weight) * L_second / L_kpt if L_kpt else 0.0        # 0: no joint counts
    shown = losses | {f"{weight} {name} / L_kpt": share}
    run.log(stage="finetuning", step=done, lr=rate, **shown)
    progress.show(done, shown, final=done == steps)
    sums.zero_()


def main(arguments=None) -> int:
    """Train f^E and f^H; 0 when finished, 130 or 143 when stopped (Ctrl-C, SIGTERM)."""
    s = u.parse_settings(Settings, __doc__, PRESETS, VARIANTS, arguments, TASKS)
    complete(s)
    rank, world, device = u.setup_distributed(s.device)
    u.compute_with(s.threads, s.deterministic)
    data.ensure_benchmark([s.source, s.target if s.lam or s.adapt else "", s.validation], rank)
    stop = u.StopSignal()
    source, target, validation, facts = open_data(s)
    if rank == 0: data.say_if_enlarged([source, target, validation], s.image)
    estimator, f_A = build(s, len(source.meta["joints"]), rank, device)
    check_labels(s, source, estimator.head.side)
    u.micro_batches(s.batch, s.micro_batch, rank, world)  # refuses an uneven batch before a folder is made
    if s.init: facts["init"] = u.file_checksum(s.init)
    elastic = s.sync_bn and not s.micro_batch  # else f^H's BatchNorm sees one process's images
    run = u.Run(s.out, s, {"data": facts, "world": world, **u.machine(device)}, rank, elastic)
    finished = train_pose(s, run, stop, estimator, f_A, source, target, validation, device, world)
    if not finished: return stop.status
    if rank == 0: print(f"finished: {run.folder}; now: python evaluate.py {run.folder}", flush=True)
    return 0


if __name__ == "__main__": u.run_script(main)
