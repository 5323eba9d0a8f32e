"""The embedded benchmark: hands and bodies drawn from round cones in two domains, and its folders on disk.

Needed by every script that is run without own data. Domains ("looks") are in support/hands.py and bodies.py.
"""
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from support.bodies import BODIES
from support.convert import CORES, build_dataset
from support.folder import MARGIN, Dataset
from support.hands import CLOTH, HANDS, SKIN, normal, pick, rotation, uniform
from support.run import InputError, random_generator

FINE = 2  # samples per stored pixel and axis
GROUP = 32  # hands or bodies drawn together: few enough for the processor's cache

UNCONSTRAINED = dict(
    skin=[(232, 190, 165), (200, 140, 110), (150, 100, 75), (100, 66, 50), (215, 130, 110)], skin_chance=0.35,
    shapes=5, shape_chance=0.6, shape_size=(0.05, 0.5), shape_aspect=(0.12, 1.0), shape_soft=(0.004, 0.08),
    stripes=0.25, blur=(0.0, 0.012), noise=(0.0, 0.03), gamma=(0.8, 1.25), contrast=(0.75, 1.1), balance=0.05)


def place(rng, points, joints, distance, look):
    """Points (B, P, 3) mm -> camera frame: turned as the domain's viewpoints say, the mean of the `joints`
    first ones at a depth within `distance` mm, up to 11 degrees off the optical axis in x and in y."""
    count = len(points)
    angles = [np.radians(uniform(rng, look[key], count)) for key in ("roll", "pitch", "yaw")]
    depth = uniform(rng, distance, count, 1)
    centre = np.concatenate([uniform(rng, (-0.2, 0.2), count, 2) * depth, depth], 1)  # (B, 3) mm
    points = points @ rotation(*angles).transpose(0, 2, 1)
    return points + (centre - points[:, :joints].mean(1))[:, None]  # (B, P, 3) mm, camera


def crop_intrinsics(joints, side, box):
    """Pinhole (B, 3, 3) in stored pixels for joints (B, K, 3) mm. The wide picture's focal length cancels:
    the square around the joints, seen on the plane z = 1, fills 1 / (box * MARGIN) of the stored image."""
    flat = joints[..., :2] / joints[..., 2:]
    low, high = flat.min(1), flat.max(1)  # (B, 2)
    focal = side / (box * MARGIN * (high - low).max(1))
    matrix = focal[:, None, None] * np.float32(np.diag([1, 1, 0])) + np.float32(np.diag([0, 0, 1]))
    matrix[:, :2, 2] = (side - 1) / 2 - focal[:, None] * (low + high) / 2  # pixel centres are integers
    return matrix  # (B, 3, 3)


def cone_surface(ends, radii, depths, x, y):
    """A round cone (capsule of two radii) in each image, seen on the pixels x (B, 1, w), y (B, w, 1): ends
    (B, 2, 2) px, radii (B, 2) px, depths (B, 2) px -> cover (B, w, w) 0..1, and of the visible surface depth
    (B, w, w) px and normal x and y. e is the distance to the axis of length L on the image, t runs along it.
    The outline is beside the nearest t; what is seen sqrt(r^2 - e^2) dz / (L sqrt(L^2 + dz^2)) before."""
    start = np.concatenate([ends, radii[..., None], depths[..., None]], 2).transpose(1, 2, 0)[..., None, None]
    (x0, y0, r, z), (dx, dy, dr, dz) = start[0], start[1] - start[0]  # (B, 1, 1) each
    dx = np.where(dx ** 2 + dy ** 2 < 1e-3, np.float32(0.04), dx)  # L is never 0
    square = dx ** 2 + dy ** 2  # L^2, (B, 1, 1)
    x, y = x - x0, y - y0
    along = x * (dx / square) + y * (dy / square)  # (B, w, w), 0..1 between the ends
    aside = (x * dy - y * dx) ** 2 / square  # e^2
    t = np.clip(along, 0, 1)
    radius = r + t * dr
    cover = np.clip((radius - np.sqrt(aside + (along - t) ** 2 * square)) * FINE + 0.5, 0, 1)
    before = dz / np.sqrt(square * (square + dz ** 2))
    t = np.clip(along - before * np.sqrt(np.maximum(radius ** 2 - aside, 0)), 0, 1)
    radius = r + t * dr
    height = np.sqrt(np.maximum(radius ** 2 - aside - (along - t) ** 2 * square, 0))
    return cover, z + t * dz - height, (x - t * dx) / radius, (y - t * dy) / radius


def draw_cone(sums, cone, blend, flat, scale, girth, depth, *worn):
    """Adds a cone to sums (3 + M + 1, B, G, G), in place and in each image's own window of the G x G samples:
    weight, weight * normal x, weight * normal y, weight of each of the M materials but skin; the last keeps
    the largest cover. flat (B, P, 2) px, scale (B, P) px per mm, girth (B,), depth (B, P) px; worn: for each
    of the M materials (B,), 0 where it is skin after all. Clothes are 15 % wider than the limb."""
    (i, j, ri, rj, what), (count, grid) = cone, sums.shape[1:3]
    wide = girth * (1 + 0.15 * worn[what - 1] if what >= CLOTH else 1)
    ends, radii = flat[:, [i, j]], scale[:, [i, j]] * np.float32([ri, rj]) * wide[:, None]  # px
    low, high = (ends - radii[..., None]).min(1), (ends + radii[..., None]).max(1)  # (B, 2) px
    low, high = (np.clip((v + 0.5) * FINE + m, 0, grid).astype(int) for v, m in ((low, -1), (high, 2)))
    width = max(int((high - low).max()), 1)
    low = np.minimum(low, grid - width)  # (B, 2) samples, x and y
    x, y = ((low.T[..., None] + np.arange(width) + 0.5) / FINE - 0.5).astype(np.float32)  # (B, w) px each
    cover, z, nx, ny = cone_surface(ends, radii, depth[:, [i, j]], x[:, None], y[..., None])
    weight = cover * np.exp(np.clip(z * (-1 / blend / scale[:, :1, None]), -80, 80))
    window = sliding_window_view(sums, (width, width), (2, 3), writeable=True)  # (6.., B, y, x, w, w)
    where = np.arange(count), low[:, 1], low[:, 0]
    window[0][where] += weight
    window[1][where] += weight * nx
    window[2][where] += weight * ny
    if what != SKIN:
        window[2 + what][where] += weight * worn[what - 1][:, None, None]
    window[-1][where] = np.maximum(window[-1][where], cover)


def rasterise(cones, blend, points, girth, worn, intrinsics, side):
    """Draws `cones` for points (B, P, 3) mm -> (3 + M + 1, B, S, S) float32, the channels of `draw_cone`.

    Every sample sums exp(-depth / blend) over the cones: a z-buffer whose order does not matter, which melts
    surfaces that meet. Figures of like size share a group: tight windows."""
    flat = points[..., :2] / points[..., 2:] * intrinsics[:, None, 0, :1] + intrinsics[:, None, :2, 2]  # px
    scale = intrinsics[:, 0, 0, None] / points[..., 2]  # (B, P) px per mm
    depth = (points[..., 2] - points[:, :1, 2]) * scale[:, :1]  # (B, P) px, from the root
    layers = np.empty((4 + len(worn), len(points), side, side), np.float32)
    for rows in np.array_split(np.argsort(scale[:, 0]), -(-len(points) // GROUP)):
        sums = np.zeros((len(layers), len(rows), side * FINE, side * FINE), np.float32)
        own = [array[rows] for array in (flat, scale, girth, depth, *worn)]
        for cone in cones:
            draw_cone(sums, cone, blend, *own)
        sums = sum(sums[..., k::FINE, :] for k in range(FINE))  # ten times faster than mean()
        layers[:, rows] = sum(sums[..., k::FINE] for k in range(FINE)) / FINE ** 2  # (4 + M, b, S, S)
    return layers


def smooth_noise(rng, count, channels, cells, side):
    """Gaussian noise (B, C, S, S) of variance 1, about `cells` waves across the image: random numbers on a
    coarse lattice, blended by two small matrix products."""
    apart = (np.arange(side, dtype=np.float32)[:, None] + 0.5) / side * cells - np.arange(cells + 1)
    blend = np.exp(-2 * apart ** 2)
    blend = (blend / np.linalg.norm(blend, axis=1, keepdims=True)).astype(np.float32)  # (S, cells + 1)
    return blend @ rng.standard_normal((count, channels, cells + 1, cells + 1), np.float32) @ blend.T


def shade(rng, layers, blend, tone, cloths, look):
    """Layers (4 + M, B, S, S), colours of skin or glove (B, 3) and of the M - 1 clothes, each (B, 3, S, S) or
    (B, 3, 1, 1) -> picture (B, 3, S, S): ambient + diffuse + some specular light; darker where a neighbour
    lies nearer the camera, by 3 mm in a hand."""
    count, side = layers.shape[1], layers.shape[-1]
    total = np.maximum(layers[0], 1e-35)
    nx, ny, nail, *worn = layers[1:-1] / total  # (B, S, S) each
    tilt = np.radians(uniform(rng, look["light_angle"], count, 1, 1))
    turn = uniform(rng, (0, 2 * np.pi), count, 1, 1)
    facing = (nx * np.sin(tilt) * np.cos(turn) + ny * (np.sin(tilt) * np.sin(turn) - 0.2)  # rather from above
              + np.sqrt(np.maximum(1 - nx ** 2 - ny ** 2, 0)) * np.cos(tilt))
    facing = np.maximum(facing, 0)  # (B, S, S)
    depth = np.where(layers[0] > 1e-30, -blend * np.log(total), 60 * blend)  # mm, the void lies far back
    reach = max(round(side / 30), 1)
    hidden = sum(np.clip((depth - np.roll(depth, shift, axis) - 1.2 * blend) / (16 * blend), 0, 0.5)
                 for axis in (1, 2) for shift in (-reach, reach))
    light, ambient = (uniform(rng, look[key], count, 1, 1, 1) * (1 + normal(rng, tint, count, 3, 1, 1))
                      for key, tint in (("light", look["light_tint"]), ("ambient", look["light_tint"] / 2)))
    bright = ambient + light * facing[:, None]  # (B, 3, S, S)
    mottle = 1 + 0.04 * smooth_noise(rng, count, 1, 8, side)
    albedo = tone[..., None, None] * (mottle + np.float32([0.35, 0.22, 0.22])[:, None, None] * nail[:, None])
    for share, cloth in zip(worn, cloths, strict=True):
        albedo += share[:, None] * (cloth - albedo)
    shine = uniform(rng, look["shine"], count, 1, 1) * facing ** 12 * (1 - sum(worn))
    return (albedo * bright + shine[:, None]) * (1 - 0.45 * np.minimum(hidden, 1))[:, None]


def paint_shape(rng, canvas, colour, chance, size, aspect, soft, stripes=0.0, rounded=0.0):
    """Lays a soft ellipse or box over each canvas (B, 3, S, S) with probability `chance`, in place: colour
    (B, 3), half length and softness in parts of the side, aspect = width / length, `stripes` the chance of
    stripes, `rounded` 0..1 how dark its long edges are, like a limb's."""
    count, side = len(canvas), canvas.shape[-1]
    centre, turn = uniform(rng, (0, 1), 2, count, 1), uniform(rng, (0, np.pi), count, 1)
    x, y = (np.arange(side, dtype=np.float32) + 0.5) / side - centre  # (B, S) each
    long = uniform(rng, size, count, 1, 1)
    wide = long * uniform(rng, aspect, count, 1, 1)
    p = ((np.cos(turn) * x)[:, None] + (np.sin(turn) * y)[..., None]) / long  # (B, S, S)
    q = ((np.cos(turn) * y)[..., None] - (np.sin(turn) * x)[:, None]) / wide
    boxy, striped, there = (rng.random((count, 1, 1)) < odds for odds in (0.4, stripes, chance))
    away = np.where(boxy, np.maximum(np.abs(p), np.abs(q)), np.sqrt(p ** 2 + q ** 2))
    cover = there * np.clip((1 - away) * wide / uniform(rng, soft, count, 1, 1) + 0.5, 0, 1)
    fill = 1 + 0.3 * np.sin(striped * uniform(rng, (9, 27), count, 1, 1) * p) + uniform(
        rng, (-0.15, 0.15), count, 1, 1) * q - 0.6 * rounded * np.minimum(q ** 2, 1)
    canvas += cover[:, None].astype(np.float32) * (colour[..., None, None] * fill[:, None] - canvas)


def background(rng, count, side, look):
    """What lies behind the figure, (B, 3, S, S) in 0..1: a wall, for bodies a floor, clouds and grain on
    them, shapes, and limbs of the colour of skin (or clothes) that are nobody's."""
    canvas = pick(rng, look["wall"], look["wall_jitter"], count)[..., None, None]
    if "floor" in look:
        floor = pick(rng, look["floor"], look["wall_jitter"], count)[..., None, None]
        down = np.float32(np.arange(side) / side)[:, None] - uniform(rng, (0.45, 0.9), count, 1, 1, 1)
        canvas = canvas + np.clip(down / 0.02 + 0.5, 0, 1) * (floor - canvas)  # (B, 3, S, 1)
    for key, cells in (("clouds", 3), ("grain", 16)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas = canvas + uniform(rng, look[key], count, 1, 1, 1) * (grey + 0.5 * colour)
    busy = rng.random((count, 1, 1)) < look["busy"]
    for _ in range(look["shapes"]):
        colour = 0.5 + look["shape_colour"] * uniform(rng, (-0.5, 0.5), count, 3)
        paint_shape(rng, canvas, colour, look["shape_chance"] * busy, look["shape_size"], (0.2, 1.0),
                    look["shape_soft"], look["stripes"])
    for _ in range(look["limbs"]):
        paint_shape(rng, canvas, pick(rng, look.get("decoys", look["skin"]), 0.1, count),
                    look["limb_chance"], (0.15, 0.5), look["limb_aspect"], look["shape_soft"], rounded=1.0)
    return canvas


def develop(rng, image, look):
    """The camera: blur, contrast, white balance, gamma and noise on image (B, 3, S, S), 0..1 -> uint8
    (B, S, S, 3)."""
    count, side = len(image), image.shape[-1]
    sigma = np.maximum(uniform(rng, look["blur"], count, 1, 1, 1) * side, 0.05)  # px
    apart = np.arange(side, dtype=np.float32)[:, None] - np.arange(side, dtype=np.float32)
    kernel = np.exp(-0.5 * (apart / sigma) ** 2)  # (B, 1, S, S)
    kernel /= kernel.sum(-1, keepdims=True)
    image = kernel @ image @ kernel.transpose(0, 1, 3, 2)
    image = 0.5 + (image - 0.5) * uniform(rng, look["contrast"], count, 1, 1, 1)
    image *= 1 + normal(rng, look["balance"], count, 3, 1, 1)
    image = np.clip(image, 1e-3, 1) ** uniform(rng, look["gamma"], count, 1, 1, 1)
    grain = uniform(rng, (-1.73, 1.73), *image.shape)  # variance 1, cheaper than Gaussian
    image += grain * uniform(rng, look["noise"], count, 1, 1, 1)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)  # (B, S, S, 3)


KINDS = {"hands": HANDS, "bodies": BODIES}


def render(kind, rng, domain, count, side):
    """Labelled images: images (B, S, S, 3) uint8; masks (B, S, S) uint8, 255 on a body, or on a hand and its
    bare forearm (not on a sleeve), 0 elsewhere; keypoints (B, K, 3) and intrinsics (B, 3, 3), float32."""
    kind = KINDS[kind]
    look, joints = kind.domains[domain], len(kind.skeleton["joints"])
    points, girth = kind.pose(rng, count)
    points = place(rng, points, joints, kind.distance, look)
    intrinsics = crop_intrinsics(points[:, :joints], side, kind.skeleton["box"])
    points, worn, tone, cloths = kind.dress(rng, points, side, look)
    layers = rasterise(kind.cones, kind.blend, points, girth, worn, intrinsics, side)
    figure = shade(rng, layers, kind.blend, tone, cloths, look)
    image = background(rng, count, side, look)
    image += layers[-1][:, None] * (figure - image)
    mask = layers[-1]  # (B, S, S)
    if kind.foreign:
        mask = mask * (1 - layers[2 + kind.foreign] / np.maximum(layers[0], 1e-35))
    return dict(images=develop(rng, image, look), masks=(mask * 255 + 0.5).astype(np.uint8),
                keypoints=points[:, :joints].astype(np.float32), intrinsics=intrinsics)


def render_unconstrained(rng, count, side):
    """X_C: (B, S, S, 3) uint8 without hands. Clouds on many scales, in a third bent to marble or wood, under
    blobs and bars of any colour, a third of them of skin colour."""
    look, canvas = UNCONSTRAINED, np.zeros((count, 3, side, side), np.float32)
    rough = uniform(rng, (0.3, 0.8), count, 1, 1, 1)
    for octave, cells in enumerate((2, 4, 8, 16, 32)):
        grey, colour = (smooth_noise(rng, count, channels, cells, side) for channels in (1, 3))
        canvas += rough ** octave * (grey + 0.6 * colour)
    waves = np.sin(canvas[:, :1] * uniform(rng, (1, 5), count, 1, 1, 1))
    canvas = np.where(rng.random((count, 1, 1, 1)) < 0.3, 0.3 * canvas + waves, canvas)
    canvas = uniform(rng, (0.1, 0.9), count, 3, 1, 1) + canvas * uniform(rng, (0.03, 0.16), count, 1, 1, 1)
    for _ in range(look["shapes"]):
        colour = np.where(rng.random((count, 1)) < look["skin_chance"], pick(rng, look["skin"], 0.2, count),
                          uniform(rng, (0, 1), count, 3))
        paint_shape(rng, canvas, colour, look["shape_chance"], look["shape_size"], look["shape_aspect"],
                    look["shape_soft"], look["stripes"], rng.random((count, 1, 1), np.float32))
    return develop(rng, canvas, look)


CHUNK = 50  # images of one rendering job; its random numbers depend on (split, chunk) alone
BENCHMARK = {  # folder: (domain, images); no two share a random number, so train, val and test are disjoint
    "source_train": ("source", 10000), "source_val": ("source", 1000), "source_test": ("source", 1000),
    "target_train": ("target", 10000), "target_test": ("target", 1000), "unconstrained": (None, 4000),
    "shifted_test": ("target_shifted", 1000),  # a second, unseen look of the target, to check a result on
}
HALF_GAPS = {  # rendered only where a script is given one: targets that differ from the source in one half
    "figure_train": ("figure", 10000), "figure_test": ("figure", 1000),  # .. its figures, light and camera
    "scenery_train": ("scenery", 10000), "scenery_test": ("scenery", 1000),
}


def render_chunk(job: tuple[str, str, int, int]) -> tuple[dict[str, np.ndarray], list]:
    """Job (kind, folder, chunk, side): CHUNK images of a folder of the benchmark; none is skipped."""
    kind, name, chunk, side = job
    domain, count = (BENCHMARK | HALF_GAPS)[name]
    rng = random_generator(0, f"{kind} {name}", chunk)
    count = min(CHUNK, count - chunk * CHUNK)
    if domain is None:
        return {"images": render_unconstrained(rng, count, side)}, []
    return render(kind, rng, domain, count, side), []


def make_benchmark(kind: str, root: str | Path, folders: dict, side: int = 60, workers: int = 0) -> None:
    """Render the `folders` of `kind` that are not there yet under root, crops of `side` px."""
    for name, (domain, count) in folders.items():
        folder = Path(root) / name
        if folder.exists():
            there = Dataset(folder).images.shape[1]
            if there != side:
                raise InputError(f"{folder}: exists with {there} px; remove it")
            continue
        skeleton = {k: v for k, v in KINDS[kind].skeleton.items() if k != "box"}
        meta = {"name": f"{kind} {domain or 'unconstrained'}", "split": name.split("_")[-1], "margin": MARGIN,
                **skeleton, "origin": f"rendered by this project, {side} px"}
        if domain is None:
            meta |= {"joints": [], "bones": []}
        jobs = [(kind, name, i, side) for i in range(-(-count // CHUNK))]
        build_dataset(folder, meta, jobs, count, render_chunk, min(workers or CORES, len(jobs)))


def in_benchmark(folder: str | Path) -> bool:
    """Whether a folder is one that the embedded benchmark has, rendered or not: hands/NAME or bodies/NAME."""
    folder = Path(folder)
    return folder.name in BENCHMARK | HALF_GAPS and folder.parent.name in KINDS


def auto_folder(value: str, source: str, name: str) -> str:
    """A flag's data set. "auto": the folder `name` beside a source of the benchmark, "" beside others."""
    if value != "auto":
        return value
    return str(Path(source).parent / name) if in_benchmark(source) else ""


def ensure_benchmark(folders: list[str]) -> None:
    """Render the embedded benchmark if one of these folders belongs to it and is not there."""
    for folder in map(Path, folders):
        if in_benchmark(folder) and not folder.exists():
            wanted = {folder.name: (BENCHMARK | HALF_GAPS)[folder.name]}
            make_benchmark(folder.parent.name, folder.parent, BENCHMARK | wanted)
