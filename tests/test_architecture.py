"""The house, read from the code's own imports: they point down, and what is heavy or optional has its place."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "psa_diffusers"

# a line may import from the lines below it: this list is the architecture
ORDER = (
    "__init__",  # public names
    "generation",  # from a prompt to a file
    "demo",
    "calibration",
    "recording",
    "lora",  # guests of diffusers and peft, down to subclass
    "pipeline",
    "models",
    "warmup",
    "report",
    "subclass",
    "attention",  # the flow through the stages
    "kernels",
    "stages",
    "layout",  # what follows from the resolution
    "orders",
    "preset",  # what the user chose
    "run_config",
    "worklist",
    "configfile",
    "ranges",
)

# kernels return the types of the stages; the rest is what those types and the definition consist of
SHARED_WITH_KERNELS = {
    "stages.pyramid": {"Pyramid", "pooled_rows"},  # the rows of a Pyramid
    "stages.schedule": {"Schedule", "id_dtype"},  # the type of Schedule.block_ids
    "stages.importance": {"POOLED_CELL", "SAMPLE_STRIDE"},  # numbers of the definition
    "stages.moments": {
        *("MOMENT_CAP", "MOMENT_CELL", "SHAPE_STRIDE", "GAIN_QUERY_STRIDE", "GAIN_BLOCK_STRIDE"),  # the same
    },
}

# packages that only these parts import; an import of one of them anywhere else is a mistake
OWNERS = {
    "triton": {"kernels"},
    "diffusers": {"generation", "demo", "recording", "calibration", "pipeline", "models", "warmup", "lora"},
    "peft": {"lora", "pipeline", "generation"},
    "transformers": {"demo"},
    "omegaconf": {"configfile"},
    "matplotlib": {"report"},
}


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, from where in the file, and which names."""

    importer: str
    module: str
    names: frozenset[str]
    line: int
    lazy: bool

    def __str__(self):
        return f"psa_diffusers/{self.importer}, line {self.line}: {self.module} ({', '.join(sorted(self.names))})"

    @property
    def part(self):
        """The file or folder of the package that imports."""
        return self.importer.split("/")[0].removesuffix(".py")


def read_imports():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        importer = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            lazy = id(node) in inside
            if isinstance(node, ast.Import):
                found += [Import(importer, a.name, frozenset(), node.lineno, lazy) for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}, line {node.lineno}: write the name of the package in full"
                names = frozenset(alias.name for alias in node.names)
                if node.module == "psa_diffusers":  # `from psa_diffusers import stages` imports a part
                    found += [Import(importer, f"psa_diffusers.{n}", frozenset(), node.lineno, lazy) for n in names]
                else:
                    found.append(Import(importer, node.module, names, node.lineno, lazy))
    return found


IMPORTS = read_imports()
OWN = [(found, found.module.removeprefix("psa_diffusers.")) for found in IMPORTS if "psa_diffusers." in found.module]


def test_every_part_of_the_package_has_its_place():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts <= set(ORDER), f"give {sorted(parts - set(ORDER))} a line in ORDER"
    assert len(OWN) > 30, "the test must see the imports"


def test_imports_point_down():
    place = {part: line for line, part in enumerate(ORDER)}
    wrong = []
    for found, module in OWN:
        target = module.split(".")[0]
        if target != found.part and place[target] <= place[found.part]:
            wrong.append(str(found))
    assert not wrong, "\n".join(["these import from above them:", *wrong])


def test_kernels_share_only_result_types_with_the_stages():
    wrong = [
        str(found)
        for found, module in OWN
        if found.part == "kernels"
        and module.startswith("stages")
        and not (found.names and found.names <= SHARED_WITH_KERNELS.get(module, set()))
    ]
    assert not wrong, "\n".join(["kernels and stages share result types, nothing that computes:", *wrong])


def test_kernels_are_imported_when_they_run():
    wrong = [str(found) for found, module in OWN if module.split(".")[0] == "kernels" != found.part and not found.lazy]
    assert not wrong, "\n".join(["triton may be missing; import kernels inside the function that runs them:", *wrong])


@pytest.mark.parametrize("package", OWNERS)
def test_other_packages_are_imported_where_they_belong(package):
    wrong = [
        str(found) for found in IMPORTS if found.module.split(".")[0] == package and found.part not in OWNERS[package]
    ]
    assert not wrong, "\n".join([f"only {', '.join(sorted(OWNERS[package]))} may import {package}:", *wrong])


def test_families_of_models_do_not_import_each_other():
    files = (PACKAGE / "models").glob("*.py")
    families = {f"models.{path.stem}" for path in files if "\nregister_family(" in path.read_text(encoding="utf-8")}
    assert len(families) > 10, "the test must see the families"
    wrong = [str(found) for found, module in OWN if found.part == "models" and module in families]
    assert not wrong, "\n".join(["a family is one file that knows none of the others:", *wrong])
