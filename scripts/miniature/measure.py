"""Read from the pixels of a clip what it shows, and compare that with what its prompt says.

Nothing here knows the prompt while it looks: `describe` sees pixels only.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .world import COLORS, GROUNDS, PERIOD, SHAPES, Scene, distance

SAMPLED = 13  # frames that are looked at
LEAST_AREA = 0.006  # share of the frame that a thing covers at least; the smallest ring covers .016
LEAST_WAY = 0.12  # share of the frame that a moving thing passes at least; drawn ones pass .45
LEAST_PAN = 0.15  # the same of the ground; drawn ones pass .5


@dataclass(frozen=True)
class Seen:
    """What is seen of the things of one colour.

    Attributes:
        color: Their colour.
        count: How many there are, by the frames' majority.
        shape: Their shape, by the majority of all views of one alone.
        motion: Where they go.
        least: Smallest visible area over the clip, as a share of the usual one.
    """

    color: str
    count: int
    shape: str
    motion: str
    least: float


@dataclass(frozen=True)
class Description:
    """What a clip shows."""

    things: tuple[Seen, ...]
    ground: str
    texture: str
    camera: str | None


def describe(frames: np.ndarray | torch.Tensor) -> Description:
    """Describe a clip ``[frames, height, width, 3]`` with values in [0, 1]."""
    video = torch.as_tensor(np.asarray(frames), dtype=torch.float32)
    index = torch.linspace(0, len(video) - 1, min(SAMPLED, len(video))).round().long()
    labels = _label(video[index])
    ground = max(GROUNDS, key=lambda name: int((labels == _GROUND_IDS[name]).sum()))
    open_ground = F.max_pool2d((labels < len(COLORS)).float()[:, None], 5, 1, 2)[:, 0] == 0
    texture, camera = _read_ground(video[index], open_ground, ground)
    masks = {}
    for number, color in enumerate(COLORS):
        mask = _opened(labels == number)
        if mask.float().mean((1, 2)).median() > LEAST_AREA:
            masks[color] = mask
    return Description(tuple(_see(color, mask, masks) for color, mask in masks.items()), ground, texture, camera)


def compare(scene: Scene, seen: Description) -> dict[str, bool]:
    """Which attributes that a prompt names are right.

    Returns:
        For each named attribute whether it is shown; `things` says that nothing else is there.
    """
    found = {thing.color: thing for thing in seen.things}
    right = {"things": set(found) == {thing.color for thing in scene.things}}
    for place, thing in enumerate(scene.things):
        here = found.get(thing.color)
        suffix = "" if place == 0 else " 2"
        right[f"color{suffix}"] = here is not None
        right[f"shape{suffix}"] = here is not None and here.shape == thing.shape
        right[f"count{suffix}"] = here is not None and here.count == (scene.count if place == 0 else 1)
        if scene.kind != "front" or place == 0:
            right[f"motion{suffix}"] = here is not None and here.motion == thing.motion
    if scene.kind == "front":
        front, back = (found.get(thing.color) for thing in scene.things)
        right["in front"] = front is not None and back is not None and front.least > back.least
    right["ground"] = seen.ground == scene.ground
    right["texture"] = seen.texture == scene.texture
    if scene.camera:
        right["camera"] = seen.camera == scene.camera
    return right


_GROUND_IDS = {name: len(COLORS) + place for place, name in enumerate(GROUNDS)}
_TONES = [  # dark, middle and light of every ground
    (_GROUND_IDS[name], tuple(dark + (light - dark) * share for dark, light in zip(*tones, strict=True)))
    for (name, tones), share in itertools.product(GROUNDS.items(), (0.0, 0.5, 1.0))
]
_COLORS = torch.tensor([*COLORS.values(), *(tone for _, tone in _TONES)], dtype=torch.float32) / 255
_IDS = torch.tensor([*range(len(COLORS)), *(number for number, _ in _TONES)])


def _label(video):
    """The nearest colour of every pixel: the number of a thing's colour, or of a ground after them."""
    return _IDS[torch.cdist(video.flatten(0, 2), _COLORS).argmin(1)].view(video.shape[:3])


def _opened(mask):
    """Without what is thinner than three pixels: soft edges between two colours may look like a third."""
    thin = -F.max_pool2d(-mask.float()[:, None], 3, 1, 1)
    return F.max_pool2d(thin, 3, 1, 1)[:, 0] > 0


def _parts(mask):
    """Connected parts of ``[F, H, W]``, for each frame a list of masks of at least half the least area.

    Found at half the resolution: what is a pixel apart counts as one.
    """
    size = mask[0].numel()
    coarse = F.max_pool2d(mask.float()[:, None], 2, ceil_mode=True)[:, 0]
    labels = torch.arange(1, coarse[0].numel() + 1, dtype=torch.float32).view(1, *coarse.shape[1:]) * coarse
    while True:  # every pixel takes the largest label that reaches it
        grown = labels
        for _ in range(8):
            grown = F.max_pool2d(grown[:, None], 3, 1, 1)[:, 0] * coarse
        if torch.equal(grown, labels):
            break
        labels = grown
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : mask.shape[1], : mask.shape[2]] * mask
    frames = []
    for frame in labels:
        numbers, areas = frame[frame > 0].unique(return_counts=True)
        large = [number for number, area in zip(numbers, areas, strict=True) if area > LEAST_AREA * size / 2]
        frames.append([frame == number for number in large])
    return frames


def _see(color, mask, masks):
    size = mask.shape[1]
    others = torch.zeros_like(mask)
    for name, other in masks.items():
        if name != color:
            others |= other
    others = F.max_pool2d(others.float()[:, None], 7, 1, 3)[:, 0] > 0
    frames = _parts(mask)
    counts, shapes = Counter(), Counter()
    for number, parts in enumerate(frames):
        alone = [part for part in parts if not (part & others[number]).any()]
        if len(alone) == len(parts):
            counts[len(parts)] += 1
        for part in alone:
            if not (part[0].any() or part[-1].any() or part[:, 0].any() or part[:, -1].any()):
                shapes[_shape(part)] += 1
    areas = mask.float().sum((1, 2))
    return Seen(
        color,
        counts.most_common(1)[0][0] if counts else max(1, min(len(parts) for parts in frames)),
        shapes.most_common(1)[0][0] if shapes else "none",
        _motion(mask, size),
        float(areas.min() / areas.median().clamp_min(1)),
    )


def _shape(part):
    """The shape that covers a part best when both fill the same box."""
    rows, columns = torch.where(part.any(1))[0], torch.where(part.any(0))[0]
    box = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
    box = F.interpolate(box[None, None], size=(32, 32), mode="bilinear", align_corners=False)[0, 0]
    return max(
        _TEMPLATES,
        key=lambda name: float(torch.minimum(box, _TEMPLATES[name]).sum() / torch.maximum(box, _TEMPLATES[name]).sum()),
    )


def _make_templates():
    fine = torch.linspace(-1.1, 1.1, 441)
    templates = {}
    for number, name in enumerate(SHAPES):
        inside = (distance(torch.tensor(number), fine[None, :], fine[:, None]) < 0).float()
        rows, columns = torch.where(inside.any(1))[0], torch.where(inside.any(0))[0]
        box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        templates[name] = F.interpolate(box[None, None], size=(32, 32), mode="area")[0, 0]
    return templates


_TEMPLATES = _make_templates()


def _motion(mask, size):
    """Where the middle of a mask goes from the first to the last frames."""
    weights = mask.float()
    total = weights.sum((1, 2))
    seen = total > LEAST_AREA * size * size / 2
    if seen.sum() < 4:
        return "none"
    place = torch.arange(size, dtype=torch.float32)
    x = ((weights.sum(1) * place).sum(1) / total.clamp_min(1))[seen] / size
    y = ((weights.sum(2) * place).sum(1) / total.clamp_min(1))[seen] / size
    way = [float(z[-2:].mean() - z[:2].mean()) for z in (x, y)]
    if max(map(abs, way)) < LEAST_WAY:
        return "still"
    if abs(way[0]) > abs(way[1]):
        return "right" if way[0] > 0 else "left"
    return "down" if way[1] > 0 else "up"


def _read_ground(video, free, ground):
    """Texture and pan of the ground from its waves: stripes run in x, checks in x and y together, dots in each."""
    dark, light = (torch.tensor(tone) / 255 for tone in GROUNDS[ground])
    axis = light - dark
    tone = ((video - (dark + light) / 2) @ axis) / axis.square().sum() * 2  # -1 dark, 1 light
    size = video.shape[1]
    turn = 2 * math.pi * (torch.arange(size) + 0.5) / size / PERIOD
    waves = {"x": (1, 0), "y": (0, 1), "xy": (1, 1), "yx": (1, -1)}
    heights, phases = {}, {}
    weight = free.float()
    total = weight.sum((1, 2)).clamp_min(1)
    mean = (tone * weight).sum((1, 2)) / total
    signal = (tone - mean[:, None, None]) * weight
    for name, (in_x, in_y) in waves.items():
        angle = in_x * turn[None, :] + in_y * turn[:, None]
        wave = torch.complex(angle.cos(), -angle.sin())
        value = (signal * wave).sum((1, 2)) / total * 2
        heights[name] = float(value.abs().mean())
        phases[name] = value
    if max(heights.values()) < 0.3:  # the weakest drawn texture has .7
        return "plain", None
    check = (heights["xy"] + heights["yx"]) / 2
    scores = {
        "striped": heights["x"] - heights["y"],
        "checkered": 1.5 * check,
        "dotted": min(heights["x"], heights["y"]) * 1.5,
    }
    texture = max(scores, key=scores.get)
    phase = phases["xy"] if texture == "checkered" else phases["x"]
    way = -float(torch.angle(phase[1:] * phase[:-1].conj()).sum()) / (2 * math.pi) * PERIOD
    camera = None if abs(way) < LEAST_PAN else "left" if way > 0 else "right"
    return texture, camera
