"""A small world of moving shapes: a closed grammar of prompts, and a renderer that shows what a prompt says.

    a red circle moves left over a striped gray background
    two white rings stand still over a plain navy background
    a blue square moves up and a red circle moves down over a dotted brown background, the camera pans left
    a green triangle moves right in front of a yellow square over a checkered teal background

Of a pair, the first one is on the left, or above. Lengths are shares of the frame, x to the right and y down. A clip
lasts one unit of time, whatever its number of frames.
"""

import math
import random
import re
from dataclasses import dataclass

import torch

COLORS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (60, 90, 235),
    "yellow": (240, 215, 60),
    "purple": (190, 70, 215),
    "white": (240, 240, 240),
}
GROUNDS = {  # dark and light tone; a plain ground has the mean of both
    "gray": ((70, 70, 70), (115, 115, 115)),
    "brown": ((70, 45, 25), (125, 85, 50)),
    "teal": ((15, 65, 70), (30, 115, 120)),
    "navy": ((15, 20, 55), (35, 50, 110)),
}
TEXTURES = ("plain", "striped", "checkered", "dotted")
PERIOD = 0.25  # of every texture, in x and (but for stripes) in y
SHAPES = ("circle", "square", "triangle", "ring")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
NUMBERS = {1: "a", 2: "two", 3: "three"}
CAMERAS = {None: 0.0, "left": 0.5, "right": -0.5}  # way of the ground over a clip
KINDS = {"one": 0.4, "many": 0.2, "pair": 0.22, "front": 0.18}
TRAINED_KINDS = {"one": 0.2, "many": 0.15, "pair": 0.37, "front": 0.28}  # what is harder is shown more often
PANS = 0.4  # share of the clips in which the camera pans, where there is a texture
TRAINED_PANS = 0.5
AXES = (("left", "right", "still"), ("up", "down", "still"))
MAX_THINGS = 3


@dataclass(frozen=True)
class Thing:
    """What moves: a colour, a shape, a motion."""

    color: str
    shape: str
    motion: str

    @property
    def held_out(self) -> bool:
        """Whether no training clip shows it: one in eight. Every two of the three attributes meet in training."""
        place = list(COLORS).index(self.color), SHAPES.index(self.shape), list(MOTIONS).index(self.motion)
        return (place[0] + 2 * place[1] + 3 * place[2]) % 8 == 0


@dataclass(frozen=True)
class Scene:
    """What a prompt says.

    Attributes:
        kind: `one` thing, `many` of the same, a `pair` of two, or one passing in `front` of another that stands still.
        things: One or two; the one in front comes first.
        count: How many of the first one there are.
        ground: Colour of the background.
        texture: Pattern of the background.
        camera: Where it pans; None if it stands.
    """

    kind: str
    things: tuple[Thing, ...]
    count: int
    ground: str
    texture: str
    camera: str | None = None

    @property
    def prompt(self) -> str:
        return "".join(words for words, _ in self.phrases)

    @property
    def phrases(self) -> list[tuple[str, set[str]]]:
        """The phrases of the prompt, each with the facts about what it speaks of, all of them in `FACTS`."""
        first, many = self.things[0], self.count > 1
        number = NUMBERS[self.count]
        words = f"{number} {first.color} {first.shape}{'s' * many} {_verb(first.motion, many)}"
        facts = {first.color, first.shape, _verb(first.motion, False), number}
        phrases = [(words, facts | {"pair": {"first"}, "front": {"in front"}}.get(self.kind, set()))]
        if self.kind == "pair":
            second = self.things[1]
            verb = _verb(second.motion, False)
            words = f" and a {second.color} {second.shape} {verb}"
            phrases.append((words, {second.color, second.shape, verb, NUMBERS[1], "second"}))
        elif self.kind == "front":
            back = self.things[1]
            words = f" in front of a {back.color} {back.shape}"
            phrases.append((words, {back.color, back.shape, _verb(back.motion, False), NUMBERS[1], "behind"}))
        pan = f"pans {self.camera}" if self.camera else ""
        words = f" over a {self.texture} {self.ground} background" + (f", the camera {pan}" if pan else "")
        return [*phrases, (words, {self.texture, self.ground, pan} - {""})]


def _verb(motion, many):
    verb = "stand still" if motion == "still" else f"move {motion}"
    return verb if many else verb.replace("stand", "stands").replace("move", "moves")


_THING = f"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s?"
_MOTION = r"(?:moves? |stands? )(left|right|up|down|still)"
_PROMPT = re.compile(
    rf"(a|two|three) {_THING} {_MOTION}(?: and a {_THING} {_MOTION}| in front of a {_THING})?"
    rf" over a ({'|'.join(TEXTURES)}) ({'|'.join(GROUNDS)}) background(?:, the camera pans (left|right))?"
)


def parse_prompt(prompt: str) -> Scene:
    """Return what a prompt of the grammar says.

    Raises:
        ValueError: If it is no prompt of the grammar.
    """
    match = _PROMPT.fullmatch(prompt.strip().lower())
    if match is None:
        raise ValueError(f"{prompt!r} is no prompt of the miniature world; an example: {EXAMPLE!r}")
    number, *first = match.group(1, 2, 3, 4)
    count = {name: count for count, name in NUMBERS.items()}[number]
    pair, back = match.group(5, 6, 7), match.group(8, 9)
    texture, ground, camera = match.group(10, 11, 12)
    things = (Thing(*first),)
    kind = "one" if count == 1 else "many"
    if pair[0]:
        kind, things = "pair", (*things, Thing(*pair))
    elif back[0]:
        kind, things = "front", (*things, Thing(*back, "still"))
    scene = Scene(kind, things, count, ground, texture, camera)
    if scene.prompt != prompt.strip().lower():
        raise ValueError(f"{prompt!r} is no prompt of the miniature world; did you mean {scene.prompt!r}?")
    return scene


EXAMPLE = "a red circle moves left over a striped gray background"

WORDS = sorted(
    {*"a two three and in front of over background , the camera pans move moves stand stands".split()}
    | {*COLORS, *GROUNDS, *TEXTURES, *MOTIONS, *SHAPES, *(f"{shape}s" for shape in SHAPES)}
)
"""Every word that a prompt can hold, the comma too."""

FACTS = (
    *COLORS, *SHAPES, *(_verb(motion, False) for motion in MOTIONS), *NUMBERS.values(), "first", "second",
    "in front", "behind", *TEXTURES, *GROUNDS, *(f"pans {side}" for side in CAMERAS if side),
)  # fmt: skip
"""Every fact that a prompt can state about a thing or the ground."""

_THINGS = [Thing(color, shape, motion) for color in COLORS for shape in SHAPES for motion in MOTIONS]


def draw_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw a scene: of things that are in the training set, or with a first thing that is not."""
    kinds, pans = (KINDS, PANS) if held_out else (TRAINED_KINDS, TRAINED_PANS)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    while True:
        first = rng.choice(_THINGS)
        if first.held_out == held_out and not (kind == "front" and first.motion == "still"):
            break
    things = (first,)
    if kind in ("pair", "front"):
        axis = rng.choice([axis for axis in AXES if first.motion in axis])
        motions = axis if kind == "pair" else ("still",)
        while True:
            second = Thing(rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(motions))
            if second.color != first.color and (held_out or not second.held_out):
                break
        things = (first, second)
    texture = rng.choice(TEXTURES)
    camera = rng.choice(("left", "right")) if texture != "plain" and rng.random() < pans else None
    count = rng.choice((2, 3)) if kind == "many" else 1
    return Scene(kind, things, count, rng.choice(list(GROUNDS)), texture, camera)


def held_out_scenes(number: int, seed: int = 0) -> list[Scene]:
    """Draw different scenes that no training clip shows, the same for the same seed."""
    rng, scenes = random.Random(f"held out {seed}"), {}
    while len(scenes) < number:
        scene = draw_scene(rng, held_out=True)
        scenes[scene.prompt] = scene
    return list(scenes.values())


def _place(scene: Scene, rng: random.Random) -> list[tuple[Thing, float, float, float, float, float]]:
    """Lay a scene out: each thing with its start, its end and its radius, what is in front last."""

    def path(thing, across, along, way, radius):
        x, y = MOTIONS[thing.motion]
        centre = (along, across) if x or (not y and horizontal) else (across, along)
        start = centre[0] - x * way / 2, centre[1] - y * way / 2
        return thing, *start, start[0] + x * way, start[1] + y * way, radius

    def near(middle, most):
        return middle + rng.uniform(-most, most)

    horizontal = rng.random() < 0.5  # of what stands still
    first = scene.things[0]
    if scene.kind == "one":
        along = near(0.5, 0.2) if first.motion == "still" else near(0.5, 0.05)
        return [path(first, near(0.5, 0.25), along, near(0.5, 0.05), near(0.18, 0.02))]
    if scene.kind == "many":
        lanes = (0.28, 0.72) if scene.count == 2 else (0.18, 0.5, 0.82)
        radius = near(0.16, 0.01) if scene.count == 2 else near(0.125, 0.01)
        way = near(0.5, 0.05)
        return [path(first, near(lane, 0.02), near(0.5, 0.06), way, radius) for lane in lanes]
    if scene.kind == "pair":
        horizontal = all(thing.motion in AXES[0] for thing in scene.things)
        return [
            path(thing, near(lane, 0.03), near(0.5, 0.06), near(0.5, 0.05), near(0.165, 0.015))
            for thing, lane in zip(scene.things, (0.27, 0.73), strict=True)
        ]
    back = path(scene.things[1], near(0.5, 0.03), near(0.5, 0.03), 0, near(0.175, 0.01))
    middle = back[2] if MOTIONS[first.motion][0] else back[1]
    return [back, path(first, near(middle, 0.03), near(0.5, 0.01), 0.7, near(0.13, 0.01))]


def pack(scenes: list[Scene], rng: random.Random) -> dict[str, torch.Tensor]:
    """Lay scenes out and return what `render` needs, as small tensors on the CPU."""
    rows = []
    for scene in scenes:
        placed = _place(scene, rng)
        things = [
            (SHAPES.index(thing.shape), *path, *(value / 255 for value in COLORS[thing.color]))
            for thing, *path in placed
        ]
        things += [(-1, *[0.0] * 4, 1.0, *[0.0] * 3)] * (MAX_THINGS - len(things))
        dark, light = (tuple(value / 255 for value in tone) for tone in GROUNDS[scene.ground])
        rows.append((things, (*dark, *light), (rng.random(), rng.random(), CAMERAS[scene.camera])))
    things, tones, offsets = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {
        "things": things,  # [B, MAX_THINGS, 9]: shape, start x, y, end x, y, radius, colour; shape -1 is none
        "tones": tones.view(-1, 2, 3),  # dark and light
        "offsets": offsets,  # [B, 3]: start of the texture in periods, and its way over the clip
        "textures": torch.tensor([TEXTURES.index(scene.texture) for scene in scenes]),
    }


def render(packed: dict[str, torch.Tensor], *, frames: int, size: int) -> torch.Tensor:
    """Draw clips on the device of `packed`: ``[B, 3, frames, size, size]`` in [-1, 1], edges one pixel soft."""
    things = packed["things"]
    device = things.device
    time = torch.linspace(0, 1, frames, device=device)
    pixel = (torch.arange(size, device=device) + 0.5) / size
    video = _grounds(packed, time, pixel)
    for slot in range(MAX_THINGS):
        shape, x0, y0, x1, y1, radius = (things[:, slot, k, None] for k in range(6))
        x = (pixel - (x0 + (x1 - x0) * time)[..., None]) / radius[..., None]  # [B, frames, size], in radii
        y = (pixel - (y0 + (y1 - y0) * time)[..., None]) / radius[..., None]
        outside = distance(shape[..., None, None], x[:, :, None, :], y[:, :, :, None]) * radius[..., None, None] * size
        cover = (0.5 - outside).clamp(0, 1) * (shape >= 0)[..., None, None]  # [B, frames, size, size]
        video = torch.lerp(video, things[:, slot, 6:, None, None, None], cover[:, None])
    return video * 2 - 1


def distance(shape, x, y):
    """Signed distance to the edge of each clip's shape, in radii, negative inside."""
    round_ = (x.square() + y.square()).sqrt()
    square = torch.maximum(x.abs(), y.abs()) - 0.88
    side = (1.8 * x.abs() - 1.05 * (y + 1)) / math.hypot(1.8, 1.05)
    triangle = torch.maximum(y - 0.8, side)
    ring = (round_ - 0.74).abs() - 0.26
    out = torch.where(shape == 0, round_ - 1, ring)
    return torch.where(shape == 1, square, torch.where(shape == 2, triangle, out))


def _grounds(packed, time, pixel):
    offsets, texture = packed["offsets"], packed["textures"][:, None, None, None]
    x = (pixel - offsets[:, 2, None, None] * time[:, None]) / PERIOD + offsets[:, 0, None, None]  # [B, frames, size]
    y = (pixel / PERIOD + offsets[:, 1, None])[:, None, :, None]  # [B, 1, size, 1]
    x = x[:, :, None, :]
    soft = PERIOD * len(pixel) / 2  # half a period in pixels: how steep an edge of one pixel is
    wave_x, wave_y = (torch.sin(2 * math.pi * z) for z in (x, y))
    striped = (wave_x * soft / 2).clamp(-1, 1).expand(-1, -1, len(pixel), -1)
    checkered = (wave_x * soft / 2).clamp(-1, 1) * (wave_y * soft / 2).clamp(-1, 1)
    to_dot = ((x - x.floor() - 0.5).square() + (y - y.floor() - 0.5).square()).sqrt()
    dotted = ((0.3 - to_dot) * 2 * soft).clamp(-1, 1)
    tone = torch.where(texture == 1, striped, torch.where(texture == 2, checkered, dotted))
    tone = torch.where(texture == 0, 0.0, tone)[:, None]
    dark, light = (packed["tones"][:, k, :, None, None, None] for k in range(2))
    return dark + (light - dark) * (tone + 1) / 2
