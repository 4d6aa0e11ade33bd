"""The house, read from the code's own imports: they point down, and what is heavy or optional has its place."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from psa_diffusers.models import families

PACKAGE = Path(__file__).parents[1] / "psa_diffusers"

# a line may import from the lines below it: this list is the architecture. A file named here stands apart from its
# folder: the registry and the tricks on diffusers know nothing of ours, so that everybody may use them
ORDER = (
    "__init__",  # public names
    "__main__",
    "cli",  # from a prompt to a file
    "calibration",
    "lora",
    "pipelines",  # what sits on a pipeline
    "models",  # one file a family
    "processors",  # what sits in a denoiser
    "models/registry",
    "pipelines/host",
    "attention",  # the flow, and the one place that picks a backend
    "presets",  # what the user chose
    "ops",  # the operation
)

# packages that only these rooms import; an import of one of them anywhere else is a mistake
OWNERS = {
    "triton": {"ops"},
    "diffusers": {"cli", "calibration", "lora", "pipelines", "pipelines/host", "models", "processors"},
    "peft": {"lora"},
    "transformers": {"cli"},
    "omegaconf": {"presets"},
    "matplotlib": {"pipelines"},
}

LONGEST = 400  # lines of a file
LONG_FOR_A_REASON = {"ops/triton/attend_hopper.py"}  # one kernel, in Triton's language for a chip


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, from where in the file, and which names."""

    importer: str
    module: str
    names: frozenset[str]
    line: int
    lazy: bool
    typing: bool

    def __str__(self):
        return f"psa_diffusers/{self.importer}, line {self.line}: {self.module} ({', '.join(sorted(self.names))})"

    @property
    def room(self):
        """The line of ORDER that imports."""
        return room_of(self.importer.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def room_of(module):
    """The line of ORDER that a module of the package, named without it, belongs to."""
    parts = module.split(".")
    own = "/".join(parts[:2])
    return own if own in ORDER else parts[0]


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes_within(tree, is_outer):
    return {id(node) for outer in ast.walk(tree) if is_outer(outer) for node in ast.walk(outer)}


def read_imports():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        importer = path.relative_to(PACKAGE).as_posix()
        tree = parse(path)
        inside = nodes_within(tree, lambda node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
        typing = nodes_within(tree, lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for node in ast.walk(tree):
            when = id(node) in inside, id(node) in typing
            if isinstance(node, ast.Import):
                found += [Import(importer, a.name, frozenset(), node.lineno, *when) for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}, line {node.lineno}: write the name of the package in full"
                names = frozenset(alias.name for alias in node.names)
                if node.module == "psa_diffusers":  # `from psa_diffusers import attention` imports a part
                    found += [Import(importer, f"psa_diffusers.{n}", frozenset(), node.lineno, *when) for n in names]
                else:
                    found.append(Import(importer, node.module, names, node.lineno, *when))
    return found


IMPORTS = read_imports()
OWN = [(found, found.module.removeprefix("psa_diffusers.")) for found in IMPORTS if "psa_diffusers." in found.module]
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def targets(found, module):
    """The modules that an import line means: `from psa_diffusers.ops import reference` means a part of that."""
    for name in found.names or {""}:
        inner = f"{module}.{name}".rstrip(".").replace(".", "/")
        yield f"{module}.{name}" if f"{inner}.py" in FILES or f"{inner}/__init__.py" in FILES else module


def test_every_part_of_the_package_has_its_place():
    rooms = {room_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")) for name in FILES}
    assert rooms <= set(ORDER), f"give {sorted(rooms - set(ORDER))} a line in ORDER"
    assert len(OWN) > 30, "the test must see the imports"


def test_imports_point_down():
    place = {room: line for line, room in enumerate(ORDER)}
    wrong = [
        str(found)
        for found, module in OWN
        for target in map(room_of, targets(found, module))
        if target != found.room and place.get(target, 0) <= place[found.room]
    ]
    assert not wrong, "\n".join(["these import from above them:", *wrong])


def test_no_file_imports_itself_over_others():
    """No circle, type annotations apart."""
    names = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES}
    after = {name: set() for name in FILES}
    for found, module in OWN:
        if not (found.lazy or found.typing):
            after[found.importer] |= {names[target] for target in targets(found, module) if target in names}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, "a circle: " + " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for other in sorted(after[name] - {name}):
            visit(other)
        open_.pop()
        done.add(name)

    for name in sorted(FILES):
        visit(name)


def test_ops_import_nothing_of_the_rest():
    wrong = [str(found) for found, module in OWN if found.room == "ops" and not module.startswith("ops")]
    assert not wrong, "\n".join(["the operation knows tensors only:", *wrong])


def test_backends_do_not_import_each_other():
    """Reference and kernels judge each other: they share types and constants, nothing that computes."""
    wrong = [
        str(found)
        for found, module in OWN
        for ours, theirs in (("ops/reference", "ops.triton"), ("ops/triton", "ops.reference"))
        if found.importer.startswith(ours) and any(target.startswith(theirs) for target in targets(found, module))
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_imported_when_they_run():
    wrong = [
        str(found)
        for found, module in OWN
        if not found.importer.startswith("ops/triton")
        and any(target.startswith("ops.triton") for target in targets(found, module))
        and not (found.lazy or found.typing)
    ]
    assert not wrong, "\n".join(["triton may be missing; import kernels inside the function that runs them:", *wrong])


@pytest.mark.parametrize("package", OWNERS)
def test_other_packages_are_imported_where_they_belong(package):
    wrong = [
        str(found) for found in IMPORTS if found.module.split(".")[0] == package and found.room not in OWNERS[package]
    ]
    assert not wrong, "\n".join([f"only {', '.join(sorted(OWNERS[package]))} may import {package}:", *wrong])


def test_families_of_models_do_not_import_each_other():
    files = (PACKAGE / "models").glob("*.py")
    families = {f"models.{path.stem}" for path in files if "\nregister_family(" in path.read_text(encoding="utf-8")}
    assert len(families) > 10, "the test must see the families"
    wrong = [
        str(found)
        for found, module in OWN
        if found.importer.startswith("models/") and found.importer != "models/families.py" and module in families
    ]
    assert not wrong, "\n".join(["a family is one file that knows none of the others:", *wrong])


def test_every_family_is_imported():
    files = {path.stem for path in (PACKAGE / "models").glob("*.py") if "\nregister_family(" in path.read_text("utf-8")}
    assert files == set(families.__all__)


def test_no_file_has_two_purposes():
    """A long file has a good reason, or two purposes."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    long = {name for name, count in lines.items() if count > LONGEST}
    assert long <= LONG_FOR_A_REASON, {name: lines[name] for name in sorted(long)}


def test_every_folder_says_what_it_is_for():
    silent = [
        name for name, path in FILES.items() if name.endswith("__init__.py") and not ast.get_docstring(parse(path))
    ]
    assert not silent


TESTS = Path(__file__).parent


def test_tests_mirror_the_package():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    tested = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")}
    assert rooms <= tested, f"nothing tests {sorted(rooms - tested)}"
    assert tested <= rooms | {"scripts"}, f"{sorted(tested - rooms)} mirror nothing"


@pytest.mark.parametrize("folder", ["tests", "scripts", "psa_diffusers"])
def test_modules_are_found_by_name_only(folder):
    """No loader by file path, no edit of sys.path, no test module that imports from another one."""
    paths = [path for path in (TESTS.parent / folder).rglob("*.py") if path != Path(__file__)]
    wrong = []
    for path in paths:
        for node in ast.walk(parse(path)):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Import, ast.ImportFrom)) else ""
            if text in ("importlib.util.spec_from_file_location", "sys.path.insert", "sys.path.append") or (
                isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1].startswith("test_")
            ):
                wrong.append(f"{path.relative_to(TESTS.parent)}, line {node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)
