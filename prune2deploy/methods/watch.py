"""What the layers at the ends of a network's stages give: seen, and replaced."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prune2deploy.errors import InputError
from prune2deploy.methods.stages import Cut

if TYPE_CHECKING:
    from torch import Tensor, nn

Features = Mapping[str, "list[Tensor]"]
"""Layer -> what its cut gave, call by call."""


class Watch:
    """Sees what the cuts of a network give, and can put something else in its place.

    While ``fed`` is set, what a cut gives is noted, and its readers see the fed features of that cut in its place: so
    every stage gets the input that the fed features were computed from, whatever the stages before it give. Channels
    that ``hidden`` names stay as the network gives them: they are masked there, and are masked for the readers too.

    Use it as a context; outside it the network has no hooks.
    """

    def __init__(self, module: "nn.Module", cuts: Iterable[Cut]) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self.fed: Features | None = None
        self.hidden: Mapping[str, Tensor] = {}
        self._module, self._cuts = module, tuple(cuts)
        self._handles: list[Any] = []

    def __enter__(self) -> "Watch":
        self._handles.append(self._module.register_forward_pre_hook(lambda *_: self._begin()))
        for cut in self._cuts:
            try:
                part = self._module.get_submodule(cut.module)
            except AttributeError:
                self.__exit__()
                raise InputError(_unseen(cut)) from None
            self._handles.append(part.register_forward_hook(self._hook(cut.layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def features(self) -> dict[str, "list[Tensor]"]:
        """Return what the cuts gave in the last run of the network, cut off from its gradients.

        Raises:
            InputError: if the network ran without calling the module of a cut.
        """
        for cut in self._cuts:
            if cut.layer not in self.found:
                raise InputError(_unseen(cut))
        return {layer: [one.detach() for one in calls] for layer, calls in self.found.items()}

    def _begin(self) -> None:
        self.found = {}

    def _hook(self, layer: str) -> "Callable[[nn.Module, Any, Tensor], Tensor | None]":
        import torch

        def hook(part: "nn.Module", _: Any, output: "Tensor") -> "Tensor | None":
            calls = self.found.setdefault(layer, [])
            calls.append(output)
            if self.fed is None or layer not in self.fed:
                return None
            full = self.fed[layer][len(calls) - 1]
            if layer not in self.hidden:
                return full
            return torch.where(along(self.hidden[layer], output, part), output, full)

        return hook


def along(mask: "Tensor", output: "Tensor", part: "nn.Module") -> "Tensor":
    """Return a mask [channels] in a form that broadcasts over what a layer gives."""
    from torch import nn

    axis = output.ndim - 1 if isinstance(part, nn.Linear) else 1
    return mask.view([-1 if place == axis else 1 for place in range(output.ndim)])


def _unseen(cut: Cut) -> str:
    return (
        f"method 'sp' cannot see what '{cut.layer}' gives, for the network does not call its module '{cut.module}'; "
        "keep the layer before it with --keep, or call the module in forward()"
    )
