"""No dead knobs: somebody outside `presets/` reads every field of a preset."""

import ast
from dataclasses import dataclass, fields
from pathlib import Path

import psa_diffusers
from psa_diffusers.presets import BlockSize, PSAPreset, SimThresholds
from psa_diffusers.presets import schema as schema_module

PACKAGE = Path(psa_diffusers.__file__).parent
DESCRIPTIVE = {"name", "model", "description"}  # for people and messages; no field decides anything by them


def trees_outside(package=PACKAGE):
    paths = [path for path in package.rglob("*.py") if "presets" not in path.relative_to(package).parts]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def word_of(node):
    """The last word of `preset`, `run.preset`, `preset.at(...)` or `_private_preset`: what an expression is called."""
    while isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def reads_of(trees, known_as):
    """Attributes that are read of objects whose name ends in `known_as`, or that are annotated as presets."""
    read = set()
    for tree in trees:
        annotated = {
            node.arg if isinstance(node, ast.arg) else word_of(node.target)
            for node in ast.walk(tree)
            if isinstance(node, (ast.arg, ast.AnnAssign))
            and node.annotation is not None
            and "PSAPreset" in ast.unparse(node.annotation)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                word = word_of(node.value)
                if word.endswith(known_as) or word in annotated:
                    read.add(node.attr)
    return read


def reads_within(source, name):
    """Property or method of a class to the attributes of `self` that it reads, those of its parts as `part.field`."""
    (body,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    within = {}
    for method in body.body:
        # dunder methods check every field, and those that copy and print do not decide anything
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and method.name != "to_dict":
            attributes = [node for node in ast.walk(method) if isinstance(node, ast.Attribute)]
            own = {node.attr for node in attributes if word_of(node.value) == "self"}
            inner = {f"{word_of(node.value)}.{node.attr}" for node in attributes}
            within[method.name] = own | inner
    return within


def unread(cls, source, trees, *, parts=(), known_as="preset", expected=DESCRIPTIVE):
    """The fields of a preset class, and of its parts, that nothing outside reads, directly or by a property."""
    read, within = reads_of(trees, known_as), reads_within(source, cls.__name__)
    while more := {name for method in read & set(within) for name in within[method]} - read:
        read |= more
    dead = {spec.name for spec in fields(cls)} - read - set(expected)
    for part, kind in parts:
        if part not in dead:
            direct = reads_of(trees, part) | reads_of(trees, part.rpartition("_")[2])
            dead |= {
                f"{part}.{spec.name}"
                for spec in fields(kind)
                if spec.name not in direct and f"{part}.{spec.name}" not in read
            }
    return dead


def test_every_field_is_read_outside():
    source = Path(schema_module.__file__).read_text(encoding="utf-8")
    parts = (("block_size", BlockSize), ("sim_thresholds", SimThresholds))
    dead = unread(PSAPreset, source, trees_outside(), parts=parts)
    assert not dead, f"nothing outside presets/ reads {', '.join(sorted(dead))} as preset.<field>: remove the field"


# a preset like ours, in which some fields are dead

SYNTHETIC = """
class Knobs:
    def __post_init__(self):
        assert self.checked_only >= 0

    @property
    def width(self):
        return self.size.wide * self.scale

    @property
    def unused(self):
        return self.by_unused

    def to_dict(self):
        return {"copied": self.copied}
"""
OUTSIDE = """
def attend(preset, other, chosen: PSAPreset):
    other.of_another = 3
    preset.written = 2
    thing = preset.direct + other.of_another + preset.for_step(3).by_call + chosen.annotated
    return thing + preset.width + run.preset.nested
"""


@dataclass
class Size:
    wide: int = 1
    deep: int = 1


@dataclass
class Knobs:
    name: str = ""
    direct: int = 0
    annotated: int = 0
    nested: int = 0
    scale: int = 0
    size: Size | None = None
    checked_only: int = 0
    by_unused: int = 0
    copied: int = 0
    of_another: int = 0
    written: int = 0


def test_dead_fields_are_found():
    dead = unread(Knobs, SYNTHETIC, [ast.parse(OUTSIDE)], parts=[("size", Size)])
    assert dead == {"checked_only", "by_unused", "copied", "of_another", "written", "size.deep"}


def test_a_field_that_is_added_and_read_by_nobody_is_found():
    @dataclass(frozen=True)
    class Longer(PSAPreset):
        knob: int = 0

    source = Path(schema_module.__file__).read_text(encoding="utf-8").replace("class PSAPreset(", "class Longer(")
    assert unread(Longer, source, trees_outside()) == {"knob"}
