"""What a scene is made of: things in named shapes, colours, materials and sizes on a floor, under a light.

A scene is a plain value. Everything else (picture, caption, answer, edit, target) follows from it.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

SHAPES = ("ball", "cube", "cylinder", "cone", "torus", "pyramid", "doll")
# sRGB. Far apart in CIELAB and not too near white, so that shading keeps each nearest to itself.
COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 134, 24),
    "yellow": (250, 214, 40),
    "green": (44, 160, 60),
    "cyan": (40, 196, 208),
    "blue": (24, 96, 216),
    "purple": (132, 44, 164),
    "pink": (246, 130, 186),
    "white": (244, 244, 242),
    "black": (30, 30, 34),
}
MATERIALS = ("matte", "glossy", "metal", "striped", "dotted")
SIZES = ("small", "medium", "large")
BACKGROUNDS = ("studio", "wood table", "beach", "meadow", "night", "tiles", "snow", "desert")
PLAIN = "plain"  # nothing but white, without shadows: what a thing is put on that is cut out of a scene; never sampled
LIGHTS = ("left", "right", "front", "warm", "cool", "dim")
STYLES = ("photo", "pencil sketch", "watercolour", "pixel art", "black and white", "cartoon", "oil painting")
SPLITS = ("train", "held-out")

SIZE_RADIUS = {"small": 0.32, "medium": 0.46, "large": 0.66}  # world units; about half the width of a thing
# Radius of the circle on the floor that a thing needs, in multiples of its size's radius.
FOOTPRINTS = {"ball": 1.0, "cube": 1.14, "cylinder": 0.82, "cone": 0.95, "torus": 1.0, "pyramid": 1.28, "doll": 0.95}
FLOOR_HALF_WIDTH, FLOOR_DEPTH = 1.4, 2.6  # world units from the middle to x = 1, and from z = 0 to z = 1

# Joint angles of a doll in degrees, in the plane of its chest, the doll's own left first: shoulder, elbow (0 hangs
# down, 90 points outward; elbow adds to the shoulder), then hip and knee likewise.
JOINT_ANGLES = (
    "left shoulder",
    "left elbow",
    "right shoulder",
    "right elbow",
    "left hip",
    "left knee",
    "right hip",
    "right knee",
)
POSES = {
    "standing": (14.0, 4.0, 14.0, 4.0, 5.0, 0.0, 5.0, 0.0),
    "arms out": (88.0, 2.0, 88.0, 2.0, 6.0, 0.0, 6.0, 0.0),
    "arms up": (152.0, 8.0, 152.0, 8.0, 6.0, 0.0, 6.0, 0.0),
    "waving": (18.0, 4.0, 100.0, 62.0, 6.0, 0.0, 6.0, 0.0),
    "hands on hips": (52.0, -104.0, 52.0, -104.0, 10.0, 0.0, 10.0, 0.0),
    "legs apart": (60.0, 6.0, 60.0, 6.0, 28.0, 0.0, 28.0, 0.0),
    "kicking": (64.0, 6.0, 84.0, 6.0, 58.0, -6.0, 2.0, 0.0),
}

# Of a doll, in multiples of its radius: where the limb starts beside the middle, its two bones, and the hand or foot.
ARM, LEG = (0.5, 0.52, 0.5, 0.16), (0.24, 0.74, 0.7, 0.12)

LEFT_OF_MARGIN, BEHIND_MARGIN = 0.25, 0.2  # of floor x and z: nearer than that, neither side is said


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One solid that stands on the floor."""

    shape: str
    """One of SHAPES."""
    colour: str
    """One of COLOURS."""
    material: str = "matte"
    """One of MATERIALS. Stripes and dots are a darker or lighter tone of the colour."""
    size: str = "medium"
    """One of SIZES."""
    x: float = 0.0
    """Place on the floor, -1 left to 1 right."""
    z: float = 0.5
    """Place on the floor, 0 near to 1 far."""
    yaw: float = 0.0
    """Turn about the vertical axis, degrees; 0 faces the camera."""
    pose: tuple[float, ...] = ()
    """Of a doll: JOINT_ANGLES in degrees; empty is standing."""

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, SHAPES)
        check_choice("colour", self.colour, tuple(COLOURS))
        check_choice("material", self.material, MATERIALS)
        check_choice("size", self.size, SIZES)
        if not -1 <= self.x <= 1:
            raise ValueError(f"x={self.x}: must be from -1 to 1")
        if not 0 <= self.z <= 1:
            raise ValueError(f"z={self.z}: must be from 0 to 1")
        if self.pose and (self.shape != "doll" or len(self.pose) != len(JOINT_ANGLES)):
            raise ValueError(f"pose={self.pose}: must be {len(JOINT_ANGLES)} angles of a doll, or empty")

    @property
    def radius(self) -> float:
        """Half the nominal width, world units."""
        return SIZE_RADIUS[self.size]

    @property
    def place(self) -> tuple[float, float]:
        """World X and Z of the middle of its footprint."""
        return self.x * FLOOR_HALF_WIDTH, self.z * FLOOR_DEPTH


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things on a floor, with what is behind them, the light, and the style in which all is drawn."""

    things: tuple[Thing, ...]
    background: str = "studio"
    light: str = "left"
    style: str = "photo"
    seed: int = 0
    """Chooses the detail of the background's texture, nothing else."""

    def __post_init__(self) -> None:
        check_choice("background", self.background, (*BACKGROUNDS, PLAIN))
        check_choice("light", self.light, LIGHTS)
        check_choice("style", self.style, STYLES)

    def with_thing(self, index: int, **changes) -> "Scene":
        """The same scene, but for fields of one thing."""
        things = list(self.things)
        things[index] = dataclasses.replace(things[index], **changes)
        return dataclasses.replace(self, things=tuple(things))

    def without_thing(self, index: int) -> "Scene":
        return dataclasses.replace(self, things=self.things[:index] + self.things[index + 1 :])

    def plus(self, *things: Thing) -> "Scene":
        return dataclasses.replace(self, things=self.things + things)


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(allowed)}")


def is_held_out(shape: str, colour: str) -> bool:
    """Whether this pair never occurs in training scenes: ten pairs of seventy, one for every colour."""
    return SHAPES.index(shape) == (3 * list(COLOURS).index(colour) + 1) % len(SHAPES)


def has_held_out(scene: Scene) -> bool:
    return any(is_held_out(thing.shape, thing.colour) for thing in scene.things)


def footprint_radius(thing: Thing) -> float:
    """Radius of the circle on the floor over which the thing stands, spread arms and legs included, world units."""
    reach = max(FOOTPRINTS["doll"], *doll_reach(thing.pose)) if thing.shape == "doll" else FOOTPRINTS[thing.shape]
    return reach * thing.radius


@lru_cache(maxsize=64)
def doll_reach(pose: tuple[float, ...]) -> tuple[float, ...]:
    """How far each limb of a doll reaches from its middle, in multiples of its radius: left and right arm and leg."""
    angles = [math.radians(angle) for angle in pose or POSES["standing"]]
    reaches = []
    for limb, (start, upper, lower, end) in zip((0, 2, 4, 6), (ARM, ARM, LEG, LEG)):
        first, second = angles[limb], angles[limb] + angles[limb + 1]
        elbow = start + upper * math.sin(first)
        reaches.append(max(elbow + 0.04, elbow + (lower + end) * math.sin(second)) + 0.1)  # and half its width
    return tuple(reaches)


def gap(a: Thing, b: Thing) -> float:
    """World units between two footprints; negative where they overlap."""
    (ax, az), (bx, bz) = a.place, b.place
    return math.hypot(ax - bx, az - bz) - footprint_radius(a) - footprint_radius(b)


def left_of(a: Thing, b: Thing) -> bool:
    """Whether a stands clearly to the left of b."""
    return a.x < b.x - LEFT_OF_MARGIN


def right_of(a: Thing, b: Thing) -> bool:
    return left_of(b, a)


def behind(a: Thing, b: Thing) -> bool:
    """Whether a stands clearly farther away than b."""
    return a.z > b.z + BEHIND_MARGIN


def in_front_of(a: Thing, b: Thing) -> bool:
    return behind(b, a)


def column(thing: Thing) -> str:
    """Where it stands from left to right: "left", "middle" or "right"; "" near a border between two."""
    if abs(abs(thing.x) - 0.36) < 0.04:
        return ""
    return "middle" if abs(thing.x) < 0.36 else "left" if thing.x < 0 else "right"


def row(thing: Thing) -> str:
    """Where it stands in depth: "front" or "back"; "" in between."""
    return "front" if thing.z < 0.4 else "back" if thing.z > 0.6 else ""


def pose_name(pose: tuple[float, ...]) -> str:
    """The named pose nearest to these joint angles."""
    if not pose:
        return "standing"
    return min(POSES, key=lambda name: math.dist(POSES[name], pose))
