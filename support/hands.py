"""Hands of the embedded benchmark: anatomy, poses, clothes and the looks of both domains.

Needed only by whoever wants to see or change how the benchmark is drawn. Random draws, rotations and looks
are shared with support/bodies.py.
"""
from typing import NamedTuple

import numpy as np

from support.folder import HAND

# The hand at rest, one row a finger: the back of a right hand faces the camera, fingers up (-y), thumb left
# (-x), palm away (+z). First joint and bones in mm (wrist to middle fingertip: 184); angles in degrees.
KNUCKLES = np.float32([[-21, -20, 8], [-23, -86, 0], [-2, -90, -4], [17, -84, -2], [33, -75, 3]])
PHALANGES = np.float32([[44, 32, 25], [41, 25, 20], [45, 28, 21], [42, 27, 21], [33, 20, 19]])
STRAIGHT = np.float32([[0, -5, -8]] + 4 * [[-10, 4, 0]])  # flexion of the joints, open hand
FIST = np.float32([[0, 42, 55]] + 4 * [[72, 96, 0]])  # the same closed; DIP follows PIP
WOBBLE = np.float32([[6, 8, 12]] + 4 * [[10, 12, 6]])  # standard deviation about both
LIMITS = np.float32([[[-10, -10, -15]] + 4 * [[-15, 0, 0]], [[15, 55, 75]] + 4 * [[80, 100, 65]]])
SPREAD = np.float32([[-36, -7, 0, 6, 13], [7, 5, 4, 4, 5]])  # in the palm's plane: mean, sd
LIFT = np.float32([[22, 0, 0, 0, 0], [6, 0, 0, 0, 0]])  # out of it: the thumb alone
BEND = np.float32([[0.85, -0.25, 0.45]] + 4 * [[0, 0, 1]])  # to the palm; the thumb across it
RADII = np.float32([[13, 10.5, 9.2, 7.2], [10.2, 8.6, 7.4, 6.2], [10.4, 8.9, 7.6, 6.3], [9.8, 8.4, 7.2, 6],
                    [9, 7.3, 6.2, 5.3]])  # mm, at the joints

# Points that only the drawing needs follow the 21 joints, in this order.
CARPUS, PALM, WEB, ARM, NAIL = 21, 24, 28, 30, 36
SKIN, HORN, CLOTH = range(3)
HAND_CONES = [  # (from point, to point, radius mm at each, material)
    (4 * f + k, 4 * f + k + 1, *RADII[f, k - 1:k + 1], SKIN) for f in range(5) for k in (1, 2, 3)] + [
    (CARPUS, PALM, 18, 16.5, SKIN), (CARPUS + 1, PALM + 1, 18, 17, SKIN), (WEB, WEB + 1, 9, 11, SKIN),
    (CARPUS + 1, PALM + 2, 18, 16.5, SKIN), (CARPUS + 2, PALM + 3, 18, 15.5, SKIN), (2, PALM, 6, 8, SKIN),
    (CARPUS, 1, 15, 13, SKIN), (CARPUS, ARM, 18, 19, SKIN), (CARPUS + 2, ARM + 1, 18, 19, SKIN),
    (ARM, ARM + 2, 19, 22, CLOTH), (ARM + 1, ARM + 3, 19, 22, CLOTH),
    (ARM + 2, ARM + 4, 22, 29, CLOTH), (ARM + 3, ARM + 5, 22, 29, CLOTH),
] + [(NAIL + f, NAIL + 5 + f, 0.63 * RADII[f, 3], 0.55 * RADII[f, 3], HORN) for f in range(5)]


# Every choice of appearance. Colours are 0..255, a pair (a, b) is a uniform range, angles are in degrees, and
# lengths in parts of the image's side, so that a domain looks alike at any resolution.
DOMAINS = {
    "source": dict(
        roll=(-40, 40), pitch=(-22, 22), yaw=(-22, 22), glove=0, gloves=[(0, 0, 0)], sleeve=0.15,
        skin=[(236, 192, 166), (220, 166, 136), (196, 138, 108), (240, 204, 184)], skin_jitter=0.03,
        light_angle=(0, 30), light=(0.42, 0.58), light_tint=0.02, ambient=(0.40, 0.48), shine=(0.0, 0.10),
        wall=[(70, 160, 90), (60, 90, 150), (200, 200, 200), (120, 120, 125), (225, 205, 150), (40, 45, 55),
              (150, 80, 80), (110, 150, 165), (235, 235, 230), (120, 100, 75)], wall_jitter=0.10,
        clouds=(0.0, 0.07), grain=(0.0, 0.012), busy=0.5, shapes=3, shape_chance=0.8, shape_size=(0.15, 0.45),
        shape_soft=(0.02, 0.15), shape_colour=0.6, stripes=0.0, limbs=0,
        blur=(0.0, 0.006), noise=(0.0, 0.012), gamma=(0.92, 1.08), contrast=(0.92, 1.05), balance=0.015),
    "target": dict(
        roll=(-28, 52), pitch=(-25, 25), yaw=(-25, 25), sleeve=0.35, skin_jitter=0.06,
        glove=0.06, gloves=[(40, 60, 130), (150, 35, 40), (45, 45, 45), (210, 200, 60)],
        skin=[(112, 74, 54), (84, 54, 40), (148, 98, 72), (250, 226, 214), (222, 138, 118), (190, 112, 92)],
        light_angle=(25, 65), light=(0.6, 0.95), light_tint=0.14, ambient=(0.25, 0.42), shine=(0.05, 0.3),
        wall=[(150, 110, 80), (90, 105, 80), (170, 150, 130), (60, 70, 100), (100, 60, 50), (190, 180, 165)],
        wall_jitter=0.20, clouds=(0.06, 0.16), grain=(0.015, 0.06), busy=1, shapes=5, shape_chance=0.75,
        shape_size=(0.06, 0.30), shape_soft=(0.004, 0.03), shape_colour=0.9, stripes=0.35,
        limbs=2, limb_chance=0.5, limb_aspect=(0.1, 0.35),
        blur=(0.003, 0.014), noise=(0.01, 0.04), gamma=(0.75, 1.35), contrast=(0.7, 1.1), balance=0.07),
}
DOMAINS["target_shifted"] = dict(  # the target once more, as no training image shows it
    DOMAINS["target"], glove=0.08, gloves=[(30, 110, 80), (190, 110, 160), (235, 235, 235)],
    wall=[(60, 110, 120), (180, 90, 50), (110, 120, 60), (140, 90, 130), (205, 190, 170)],
    light_angle=(35, 75), light_tint=0.20, clouds=(0.03, 0.12), grain=(0.03, 0.07), shapes=7,
    shape_size=(0.04, 0.20), stripes=0.7, limbs=1, limb_aspect=(0.2, 0.5), balance=0.10)

CLUTTER = "clouds grain busy shape_chance shape_size shape_soft shape_colour stripes limb_chance".split()
SCENERY = "wall clouds grain busy shapes shape stripes limbs limb decoys floor".split()  # settings


def uniform(rng, limits, *shape):
    """Uniform float32 numbers of `shape` within limits = (low, high)."""
    return np.float32(limits[0]) + np.float32(limits[1] - limits[0]) * rng.random(shape, np.float32)


def normal(rng, spread, *shape):
    """Gaussian float32 numbers of `shape`, cut at two standard deviations: no monsters in the tails."""
    return np.clip(rng.standard_normal(shape, np.float32), -2, 2) * np.float32(spread)


def pick(rng, palette, jitter, count):
    """Colours (count, 3) in 0..1, one of the palette each: brightness jittered, hue a third as much."""
    colour = np.float32(palette)[rng.integers(len(palette), size=count)] / 255
    return np.clip(colour * (1 + normal(rng, jitter, count, 1)) + normal(rng, jitter / 3, count, 3), 0, 1)


def rotation(roll, pitch, yaw):
    """Matrices (B, 3, 3) = Rz(roll) Rx(pitch) Ry(yaw), radians: roll turns the picture, the others tilt."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    rows = [[cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy],
            [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy], [-cp * sy, sp, cp * cy]]
    return np.array(rows, np.float32).transpose(2, 0, 1)  # (B, 3, 3)


def calmed(look: dict, share: float) -> dict:
    """A domain whose clutter is only `share` of the way from the source's to its own; its colours stay."""
    calm = DOMAINS["source"] | {"limb_chance": 0.0}
    between = {key: np.asarray(calm[key]) * (1 - share) + np.asarray(look[key]) * share for key in CLUTTER}
    shapes = round(calm["shapes"] * (1 - share) + look["shapes"] * share)
    return look | {key: value.tolist() for key, value in between.items()} | {"shapes": shapes}


def mix(figure: dict, scene: dict) -> dict:
    """A domain with the figures, light and camera of one domain and the scenery of another."""
    return {k: v for k, v in figure.items() if k.split("_")[0] not in SCENERY} | {
        k: v for k, v in scene.items() if k.split("_")[0] in SCENERY}


def with_half_gaps(looks: dict) -> dict:
    """The domains, and two targets that differ from the source in figures or in scenery alone."""
    return looks | {"figure": mix(looks["target"], looks["source"]),
                    "scenery": mix(looks["source"], looks["target"])}


def sample_angles(rng, count):
    """Draw flexion (B, 5, 3), spread (B, 5) and lift (B, 5) of the fingers, rad, within joint limits."""
    own, whole = rng.random((count, 5), np.float32), rng.beta(1.0, 1.7, (count, 1)).astype(np.float32)
    curl = np.where(rng.random((count, 1)) < 0.3, own, 0.75 * whole + 0.25 * own)[..., None]  # (B, 5, 1)
    flexion = STRAIGHT + (FIST - STRAIGHT) * curl + WOBBLE * normal(rng, 1, count, 5, 3)
    flexion[:, 1:, 2] += 0.6 * flexion[:, 1:, 1]  # one tendon bends both
    fan = SPREAD[1] * normal(rng, 1, count, 5) + 0.4 * SPREAD[0] * normal(rng, 1, count, 1)
    spread = SPREAD[0] + fan * (1 - 0.8 * curl[..., 0])  # a fist cannot spread
    lift = LIFT[0] * (0.7 + 0.6 * curl[..., 0]) + LIFT[1] * normal(rng, 1, count, 5)
    return np.radians(np.clip(flexion, *LIMITS)), np.radians(spread), np.radians(lift)


def sample_fingers(rng, count):
    """Forward kinematics: joints (B, 5, 4, 3) mm and the direction in which each last bone bends, (B, 5, 3).
    Flexion adds up along a finger, in the plane of `forward` and `bend`."""
    flexion, spread, lift = sample_angles(rng, count)
    forward = np.stack([np.sin(spread) * np.cos(lift), -np.cos(spread) * np.cos(lift), np.sin(lift)], -1)
    bend = BEND - (forward * BEND).sum(-1, keepdims=True) * forward  # (B, 5, 3), now normal to it
    bend = (bend / np.linalg.norm(bend, axis=-1, keepdims=True))[:, :, None]
    total, forward = np.cumsum(flexion, -1)[..., None], forward[:, :, None]  # (B, 5, 3, 1), (B, 5, 1, 3)
    lengths = PHALANGES * (1 + normal(rng, 0.05, count, 5, 3))
    bones = (np.cos(total) * forward + np.sin(total) * bend) * lengths[..., None]  # (B, 5, 3, 3) mm
    base = (KNUCKLES * (1 + normal(rng, 0.05, count, 5, 1)))[:, :, None]
    inward = np.cos(total) * bend - np.sin(total) * forward  # (B, 5, 3, 3)
    return np.concatenate([base, base + np.cumsum(bones, 2)], 2), inward[:, :, 2]


def sample_forearm(rng, count):
    """Points (B, 6, 3) mm, wrist at 0: thumb side and little finger's side of cuff, middle and elbow end."""
    swing, drop = np.radians(normal(rng, 10, 2, count))
    along = np.stack([np.sin(swing), np.cos(swing) * np.cos(drop), np.sin(drop)], -1)[:, None]  # (B, 1, 3)
    across = np.stack([np.cos(swing), -np.sin(swing), 0 * swing], -1)[:, None]
    reach = uniform(rng, (25, 70), count, 1, 1) + np.float32([0, 0, 70, 70, 230, 230])[:, None]  # (B, 6, 1)
    return along * reach + across * np.float32([-8, 8, -8, 8, -10, 10])[:, None] + np.float32([0, 0, 8])


def sample_hand(rng, count):
    """Random right hands, the wrist at 0: points (B, P, 3) mm, and girth (B,), the factor of all radii."""
    digits, inward = sample_fingers(rng, count)  # (B, 5, 4, 3), (B, 5, 3) mm
    wrist = np.zeros((count, 1, 3), np.float32)
    carpus = wrist + np.float32([[-10, -3, 6], [0, -3, 6], [10, -3, 6]])
    palm = digits[:, 1:, 0] * np.float32([0.82, 0.93, 1]) + np.float32([0, 0, 6])  # under the knuckles
    web = np.stack([digits[:, 0, :2].mean(1), digits[:, 1, 0] * 0.6 + np.float32([0, 0, 4])], 1)
    bone, out = digits[:, :, 3] - digits[:, :, 2], inward * -RADII[:, 3:]
    nails = np.concatenate([digits[:, :, 2] + 0.5 * bone + 0.72 * out, digits[:, :, 3] + 0.6 * out], 1)
    parts = [wrist, digits.reshape(count, 20, 3), carpus, palm, web, sample_forearm(rng, count), nails]
    size = 1 + normal(rng, 0.05, count)
    return np.concatenate(parts, 1) * size[:, None, None], size * (1 + normal(rng, 0.05, count))


def dress_hand(rng, points, side, look):
    """Draw what a hand wears. Returns the points (B, P, 3) as given; whether nails and sleeve are seen, (B,)
    each; the colour of skin or glove (B, 3); and a list with the sleeve's colour (B, 3, 1, 1)."""
    count = len(points)
    sleeved = (rng.random(count) < look["sleeve"]).astype(np.float32)
    gloved = rng.random((count, 1)) < look["glove"]  # a glove hides the nails
    skin, glove = pick(rng, look["skin"], look["skin_jitter"], count), pick(rng, look["gloves"], 0.1, count)
    cloth = uniform(rng, (0.1, 0.9), count, 3)[..., None, None]
    return points, [~gloved[:, 0], sleeved], np.where(gloved, glove, skin), [cloth]


class Kind(NamedTuple):
    """What hands and bodies differ in; everything else about rendering is shared."""
    skeleton: dict
    cones: list
    pose: object  # (rng, count) -> points, girth
    dress: object  # (rng, points, side, look) -> points, worn, tone, cloths
    domains: dict
    blend: float  # mm of depth over which surfaces melt into one another
    distance: tuple  # mm from the camera
    foreign: int  # the clothes that are not foreground, 0: none


HANDS = Kind(HAND, HAND_CONES, sample_hand, dress_hand, with_half_gaps(DOMAINS), 2.5, (400, 900), CLOTH)
