"""Image data: training, held-out and test splits of labelled uint8 images.

Choices are made on the held-out split, a share of the training set; the test split is for final figures only.
"""

from prune2deploy.data.base import Data, Split, Subset, TensorSplit
from prune2deploy.data.batches import Batches
from prune2deploy.data.load import load_data
from prune2deploy.data.pixels import augment, draw_moves, moved, normalise

__all__ = [
    "Batches",
    "Data",
    "Split",
    "Subset",
    "TensorSplit",
    "augment",
    "draw_moves",
    "load_data",
    "moved",
    "normalise",
]
