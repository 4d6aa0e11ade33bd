"""A pipeline as it was, to the bit, after a load that failed half-way, whatever had been done by then.

peft exchanges modules, freezes parameters and merges into weights; diffusers takes offloading off and puts it on again.
So nothing is undone step by step. All attributes of all modules are kept before, by reference, and stand again after.
Only weights that are merged into are kept as copies, in main memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.pipelines.host import modules_of

__all__ = ["Before"]

_CONTAINERS = (dict, OrderedDict, list, set)  # whose contents are kept too; others refer to them, so they stay


class Before:
    """What a pipeline was, to go back to.

    Args:
        pipe: The pipeline.
        merged: Modules whose weights may change.
    """

    def __init__(self, pipe: Any, merged: Iterable[nn.Module]) -> None:
        self._pipe, self._class = pipe, type(pipe)
        modules = {id(each): each for root in modules_of(pipe).values() for each in root.modules()}
        hooks = [vars(each).get("_diffusers_hook") for each in modules.values()]
        owners = [pipe, *modules.values(), *(each for each in hooks if each is not None)]
        self._attributes = [_Attributes(each) for each in owners]
        parameters = {id(each): each for module in modules.values() for each in module.parameters(recurse=False)}
        self._trained = [(each, each.requires_grad) for each in parameters.values()]
        weights = {id(each): each for module in merged for each in module.parameters() if not each.is_meta}
        self._weights: list[tuple[Tensor, Tensor]] = [
            (each, each.detach().to("cpu", copy=True)) for each in weights.values()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the pipeline what it was."""
        self._pipe.__class__ = self._class
        for each in self._attributes:
            each.restore()
        for parameter, requires_grad in self._trained:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
        for weight, copy in self._weights:
            weight.data.copy_(copy)


class _Attributes:
    """The attributes of an object, and what is in those of them that are containers."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._values: Mapping[str, Any] = dict(vars(owner))
        self._contents = [(each, each.copy()) for each in self._values.values() if type(each) in _CONTAINERS]

    def restore(self) -> None:
        attributes = vars(self._owner)
        attributes.clear()
        attributes.update(self._values)
        for container, contents in self._contents:
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)
