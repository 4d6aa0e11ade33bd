"""Write a safetensors file tensor by tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["SafetensorsWriter"]

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SafetensorsWriter:
    """A safetensors file in the making: the data goes beside it, the header is known at the end.

    Args:
        path: The file. It appears, or is replaced, in `finish`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = path.with_name(path.name + ".data")
        self._header: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a tensor under a key that is new."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._data.open("wb")
        tensor = tensor.detach().contiguous().cpu()
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        self._header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }
        self._file.write(tensor.view(torch.uint8).numpy().data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Put header and data together under the name of the file."""
        self._close()
        header = json.dumps({"__metadata__": dict(metadata), **self._header}).encode()
        header += b" " * (-len(header) % 8)
        whole = self._path.with_name(self._path.name + ".part")
        try:
            with whole.open("wb") as target, self._data.open("rb") as source:
                target.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(source, target)
            whole.replace(self._path)
        finally:
            whole.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)

    def drop(self) -> None:
        """Write no file."""
        self._close()
        self._data.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
