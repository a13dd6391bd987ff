"""Networks: the built-in ones, those of torchvision and timm, and the user's own, with their weights.

Importing this package needs no torch; building a network does.
"""

from prune2deploy.networks.load import Network, load_network
from prune2deploy.networks.table import NETWORKS, NetworkInfo
from prune2deploy.networks.weights import load_weights, normalisation, save_weights

__all__ = ["NETWORKS", "Network", "NetworkInfo", "load_network", "load_weights", "normalisation", "save_weights"]
