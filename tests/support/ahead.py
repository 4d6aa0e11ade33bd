"""Compile what the launchers launch, for chips that are not there: launches are recorded, compiled, and read back."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, reduced to what decides the machine code."""

    kernel: JITFunction
    signature: tuple  # (parameter, type), type "constexpr" for constants
    constants: tuple  # (path, value)
    aligned: tuple  # paths of pointers and integers that 16 divides
    options: tuple  # (option, value)

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    def compile(self, target: GPUTarget):
        source = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(
            self.kernel,
            dict(self.signature),
            dict(self.constants),
            {path: [["tt.divisibility", 16]] for path in self.aligned},
        )
        return triton.compile(source, target=target, options=dict(self.options))


def record_launches(monkeypatch, run) -> list[Launch]:
    """The distinct launches of ``run()``; nothing is executed, so every output holds whatever memory held."""
    launches = {}

    def keep(kernel, *args, grid, warmup, **kwargs):
        launches[_describe(kernel, args, kwargs)] = None

    monkeypatch.setattr(JITFunction, "run", keep)
    run()
    return list(launches)


def _describe(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    options = tuple((name, kwargs.pop(name)) for name in OPTIONS if name in kwargs)
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants, aligned, signature = [], [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature.append((parameter.name, "constexpr"))
            constants.append(((parameter.num,), value))
        else:
            kind = _type(value, (parameter.num,), not parameter.do_not_specialize, constants, aligned)
            signature.append((parameter.name, kind))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


def _type(value, path, specialize, constants, aligned):
    """The type under which Triton compiles an argument, as its own just-in-time launcher would choose it."""
    if isinstance(value, tuple):
        return tuple(_type(x, (*path, i), specialize, constants, aligned) for i, x in enumerate(value))
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            aligned.append(path)
        return POINTER[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if specialize and value == 1:
        constants.append((path, 1))
        return "constexpr"
    if specialize and value % 16 == 0:
        aligned.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def product_loops(compiled, tmp_path: Path) -> list[Counter]:
    """How often each instruction stands in each innermost loop with a Hopper matrix product, from the machine code."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    code = subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout
    names, places = [], {}
    loops = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\S+):", line):
            places[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z0-9]+)(.*);", line):
            names.append(found[1])
            back = re.search(r"`\((\.L_\S+)\)", found[2]) if found[1] == "BRA" else None
            if back and back[1] in places:
                loops.append((places[back[1]], len(names)))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counts = [Counter(names[start:end]) for start, end in inner]
    return [count for count in counts if count["HGMMA"]]


def resources(compiled, tmp_path: Path) -> dict[str, int]:
    """Registers a thread and bytes of stack a thread (spilled registers live there), from the machine code."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}
