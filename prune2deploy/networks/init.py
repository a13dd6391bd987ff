"""How built-in networks are initialised."""

from torch import nn


def initialise(module: nn.Module) -> None:
    """Draw convolutions after He et al. (ICCV 2015, fan-out) and linear layers from N(0, 0.01); norms 1, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, 0.01)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
