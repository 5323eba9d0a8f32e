"""Bodies of the embedded benchmark: anatomy, activities, clothes and the looks of both domains.

Needed only by whoever wants to see or change how the benchmark is drawn.
"""
import numpy as np

from support.folder import HUMAN
from support.hands import CLOTH, DOMAINS, SKIN, Kind, calmed, normal, pick, rotation, uniform, with_half_gaps

# The body at rest, 1655 mm tall: standing, arms down, facing the camera, so that its right is at -x, its
# front at -z. A part turns about a joint, in the frame of its parent. A point: its part, then mm from there.
BASIN, WAIST, CHEST, HEAD, THIGH, SHIN, FOOT, UPPER_ARM, FOREARM = range(9)  # right side; + 5: the left
PIVOT = [0, 0, 7, 8, 1, 2, 3, 14, 15, 4, 5, 6, 11, 12]  # joint that a part turns about
SKULL, HIPS, ENDS = 17, 22, 34  # what only the drawing needs follows the joints: head; right and left; cuffs
BODY = np.zeros((34, 4), np.float32)
BODY[[0, 7, 8, 9, 10, *range(SKULL, HIPS)]] = [  # the middle
    (BASIN, 0, 0, 0), (WAIST, 0, -225, 8), (CHEST, 0, -250, 8), (HEAD, 0, -140, -105), (HEAD, 0, -250, -20),
    (HEAD, 0, -165, -22), (HEAD, 0, -105, -60), (HEAD, 0, -105, -8),  # skull, chin, neck
    (HEAD, 0, -190, -4), (HEAD, 0, -100, 16)]  # hair: crown, nape
LEFT, RIGHT = [4, 5, 6, 11, 12, 13, *range(HIPS + 6, ENDS)], [1, 2, 3, 14, 15, 16, *range(HIPS, HIPS + 6)]
BODY[RIGHT] = [
    (BASIN, -110, 5, 0), (THIGH, 0, 430, 0), (SHIN, 0, 415, 0),  # hip, knee, ankle
    (CHEST, -165, -225, 5), (UPPER_ARM, 0, 290, 0), (FOREARM, 0, 255, 0),  # shoulder, elbow, wrist
    (BASIN, -70, 15, 8), (WAIST, -50, -150, 0), (CHEST, -58, -165, -4),  # flank: hip, waist, breast
    (FOOT, 0, 45, 35), (FOOT, 0, 55, -135), (FOREARM, 0, 345, -8)]  # heel, toes, knuckles
BODY[LEFT] = BODY[RIGHT] * np.float32([1, -1, 1, 1])
BODY[LEFT, 0] += 5 * (BODY[LEFT, 0] >= THIGH)

# Degrees, a row an activity, mean and standard deviation: flexion, abduction, turning out of the hip, flexion
# of the knee; the same of shoulder and elbow; swing of the limbs in walking; lean of the trunk.
ACTIVITIES = np.float32([
    [[2, 4, 8, 4, 4, 8, 0, 20, 0, 1], [4, 3, 8, 4, 10, 6, 12, 15, 5, 3]],  # standing
    [[4, 2, 6, 14, 0, 7, 0, 28, 26, 5], [4, 2, 6, 6, 6, 5, 10, 14, 8, 4]],  # walking
    [[2, 5, 8, 5, 28, 16, 0, 75, 0, 2], [5, 4, 8, 5, 22, 14, 20, 30, 6, 4]],  # talking
    [[4, 6, 8, 12, 70, 25, 0, 22, 12, 10], [10, 5, 8, 12, 45, 25, 20, 18, 12, 12]],  # reaching
    [[2, 6, 8, 4, 150, 20, 0, 30, 0, -2], [5, 5, 8, 5, 20, 15, 20, 30, 8, 5]],  # arms up
    [[88, 10, 4, 85, 32, 12, 0, 55, 0, -4], [10, 8, 8, 16, 18, 8, 15, 25, 0, 8]],  # sitting
    [[70, 15, 8, 112, 50, 14, 0, 45, 4, 28], [12, 8, 8, 14, 22, 10, 15, 25, 6, 8]]])  # crouching
JOINT_LIMITS = np.float32([[-20, -4, -25, 0, -45, 2, -45, 0], [120, 45, 40, 140, 175, 120, 60, 145]])

HAIR, SHIRT, SLEEVE, TROUSERS, LEG, SHOES = range(CLOTH, CLOTH + 6)
HUMAN_CONES = [(SKULL, SKULL + 1, 80, 50, SKIN), (8, SKULL + 2, 50, 46, SKIN), (14, 11, 44, 44, SHIRT),
               (SKULL + 3, SKULL + 4, 70, 48, HAIR), (HIPS, HIPS + 6, 80, 80, TROUSERS)] + [
    cone for flank, end, hip, shoulder in ((HIPS, ENDS, 1, 14), (HIPS + 6, ENDS + 4, 4, 11)) for cone in (
        (flank, flank + 1, 80, 74, TROUSERS), (flank + 1, flank + 2, 76, 84, SHIRT),
        (flank + 2, shoulder, 80, 46, SHIRT), (hip, end, 76, 58, TROUSERS), (end, end + 1, 60, 52, LEG),
        (end + 1, hip + 2, 52, 38, SKIN), (hip + 2, flank + 3, 38, 34, SKIN),
        (flank + 3, flank + 4, 34, 30, SHOES), (shoulder, end + 2, 44, 38, SHIRT),
        (end + 2, end + 3, 40, 36, SLEEVE), (end + 3, shoulder + 2, 36, 27, SKIN),
        (shoulder + 2, flank + 5, 29, 24, SKIN))]


# Bodies face the camera, more or less. At 48 px only a few pixels of face tell front from back, and a small
# model that has to tell them exchanges left and right in four of ten images.
CLOTHES = dict(  # sleeves end at 0 the shoulder, 1 the elbow, 2 the wrist; trousers' legs alike
    shirt=[(225, 225, 225), (130, 130, 140), (60, 80, 130), (45, 45, 50), (150, 60, 60)], sleeve=(0.4, 1.9),
    trousers=[(55, 70, 110), (45, 45, 50), (170, 155, 125)], leg=(0.6, 2.4), cloth_jitter=0.08, pattern=0.0,
    shoes=[(40, 40, 45), (225, 225, 225), (100, 70, 50)], hair=[(40, 30, 25), (90, 60, 40), (190, 160, 110)],
    roll=(-8, 8), pitch=(-8, 15), yaw=(-60, 60), floor=[(150, 140, 130), (110, 90, 70), (90, 90, 95)])
OTHER_CLOTHES = dict(
    shirt=[(200, 60, 50), (230, 180, 60), (60, 140, 90), (60, 120, 190), (150, 80, 160), (235, 235, 225),
           (40, 40, 45)], sleeve=(0.2, 1.9), cloth_jitter=0.2, pattern=0.5,
    trousers=[(90, 100, 70), (120, 60, 50), (200, 190, 180), (50, 60, 80), (30, 30, 35)], leg=(0.3, 2.2),
    shoes=[(200, 60, 60), (60, 90, 160), (230, 230, 230), (60, 50, 40)],
    hair=[(25, 20, 20), (150, 150, 150), (150, 80, 45), (230, 205, 150)],
    decoys=[(200, 60, 50), (60, 120, 190), (120, 60, 50), (148, 98, 72), (250, 226, 214), (50, 60, 80)],
    roll=(-12, 12), pitch=(0, 30), yaw=(-30, 90),
    floor=[(100, 110, 70), (140, 110, 90), (80, 70, 90), (180, 170, 150)])

# A body is thinner than a hand and covers half of its area, so the hands' clutter would hide it. With a third
# of the clutter, f^S keeps nine tenths of its IoU from source to target, as on hands.
HUMAN_DOMAINS = {
    "source": DOMAINS["source"] | CLOTHES, "target": calmed(DOMAINS["target"], 1 / 3) | OTHER_CLOTHES,
    "target_shifted": calmed(DOMAINS["target_shifted"], 1 / 3) | OTHER_CLOTHES | dict(
        shirt=[(240, 130, 170), (120, 200, 190), (110, 110, 60), (90, 60, 120), (240, 240, 120)], pattern=0.7,
        trousers=[(160, 140, 60), (70, 110, 120), (130, 130, 140)], roll=(-15, 15), pitch=(5, 40))}


def sample_stance(rng, count):
    """Draw flexion, abduction and turning out of the 14 parts of a body, (B, 14, 3) rad, within joint limits,
    about the mean of an activity. Both sides share a part of the variation; in walking they swing in turn."""
    activity = rng.integers(len(ACTIVITIES), size=count)
    mean, sd = ACTIVITIES[activity].transpose(1, 0, 2)[:, :, None]  # (B, 1, 10) each
    drawn = mean + sd * (normal(rng, 0.6, count, 1, 10) + normal(rng, 0.8, count, 2, 10))  # (B, 2, 10)
    phase = uniform(rng, (0, 2 * np.pi), count, 1) + np.float32([0, np.pi])  # (B, 2)
    stride, lean = drawn[:, :1, 8], drawn[:, 0, 9]
    drawn[..., 0] += lean[:, None] + stride * np.sin(phase)  # legs stand where the trunk leans
    drawn[..., 3] += 1.3 * abs(stride) * np.maximum(np.cos(phase), 0)  # the knee bends on the way forward
    drawn[..., 4] -= 0.8 * stride * np.sin(phase)
    limbs = np.clip(drawn[..., :8], *JOINT_LIMITS)  # (B, 2, 8)
    stance = np.zeros((count, 14, 3), np.float32)
    stance[:, :4] = normal(rng, 1, count, 4, 3) * np.float32([[0, 2, 0], [5, 5, 7], [5, 5, 7], [10, 6, 25]])
    stance[:, :3, 0] -= lean[:, None] * np.float32([1, 0.3, 0.3])
    for side, thigh in enumerate((THIGH, THIGH + 5)):
        stance[:, thigh], stance[:, thigh + 3] = limbs[:, side, :3], limbs[:, side, 4:7]
        stance[:, thigh + 1, 0], stance[:, thigh + 4, 0] = -limbs[:, side, 3], limbs[:, side, 7]
        level = lean - limbs[:, side, 0] + limbs[:, side, 3]  # the ankle bends to level the foot
        stance[:, thigh + 2, 0] = np.clip(level, -45, 30)
    return np.radians(stance)


def sample_body(rng, count):
    """Random bodies with the pelvis at 0: points (B, 34, 3) mm, and girth (B,), the factor of all radii.
    Flexion moves a hanging limb forward. Left abduction and turning out mirror the right ones."""
    angles = sample_stance(rng, count).transpose(2, 0, 1)  # (3, B, 14)
    angles[1:, :, :9] *= -1
    # rotation() is Rz Rx Ry of its angles; with the axes in reverse, Rx Rz Ry of the negative ones
    turn = rotation(*angles.reshape(3, -1)).reshape(count, 14, 3, 3)[..., ::-1, ::-1]
    size = 1 + normal(rng, 0.035, count, 14)
    size[:, 9:] = size[:, 4:9]  # both sides are equally long
    part, rest = BODY[:, 0].astype(int), BODY[:, 1:]
    rest = rest * size[:, part, None]  # (B, 34, 3) mm
    frames, points = turn.copy(), np.zeros((count, 34, 3), np.float32)
    for p, pivot in enumerate(PIVOT):
        if p:
            frames[:, p] = frames[:, part[pivot]] @ turn[:, p]
        own = np.flatnonzero(part == p)
        points[:, own] = points[:, pivot, None] + rest[:, own] @ frames[:, p].transpose(0, 2, 1)
    stature = uniform(rng, (1500, 1950), count) / 1655
    return points * stature[:, None, None], stature * (1 + normal(rng, 0.1, count))


def fabric(rng, palette, count, side, look):
    """Colours (B, 3, S, S) of a piece of clothing: one of the palette, or stripes or checks of two."""
    plain, other = (pick(rng, palette, look["cloth_jitter"], count)[..., None, None] for _ in range(2))
    turn, waves = uniform(rng, (0, np.pi), count, 1, 1), uniform(rng, (30, 80), count, 1, 1)
    x, y = np.meshgrid(*2 * [np.arange(side, dtype=np.float32) / side])  # (S, S)
    p, q = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x  # (B, S, S)
    checked, printed = (rng.random((count, 1, 1)) < odds for odds in (0.5, look["pattern"]))
    lines = np.sin(waves * p) * np.where(checked, np.sin(waves * q), np.float32(1))
    return plain + (printed * np.clip(2 * lines + 0.5, 0, 1))[:, None] * (other - plain)


def dress_body(rng, points, side, look):
    """Dress bodies as `dress_hand` does hands, and append the points where trouser legs and sleeves end: two
    per limb, on its upper and its lower half. Of the 7 materials, HORN is never worn."""
    count, ends = len(points), []
    leg, sleeve = (np.clip(uniform(rng, look[key], count), 0, 1.95) for key in ("leg", "sleeve"))
    for top, t in ((1, leg), (14, sleeve), (4, leg), (11, sleeve)):
        upper, middle, lower = (points[:, top + i] for i in range(3))  # (B, 3) mm
        ends += [upper + (middle - upper) * np.minimum(t, 1)[:, None],
                 middle + (lower - middle) * np.maximum(t - 1, 0)[:, None]]
    always, skin = np.ones(count, np.float32), pick(rng, look["skin"], look["skin_jitter"], count)
    hair, shoes = (pick(rng, look[key], 0.1, count)[..., None, None] for key in ("hair", "shoes"))
    shirt, trousers = (fabric(rng, look[key], count, side, look) for key in ("shirt", "trousers"))
    worn = [0 * always, always, always, np.float32(sleeve > 1), always, np.float32(leg > 1), always]
    return (np.concatenate([points, np.stack(ends, 1)], 1), worn, skin,
            [hair, shirt, shirt, trousers, trousers, shoes])


BODIES = Kind(HUMAN, HUMAN_CONES, sample_body, dress_body, with_half_gaps(HUMAN_DOMAINS), 12.0,
              (3000, 6000), 0)
