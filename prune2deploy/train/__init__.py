"""Training, evaluation and BatchNorm recalibration of image classifiers."""

from prune2deploy.train.accuracy import Accuracy, evaluate, recalibrate
from prune2deploy.train.sgd import PRECISIONS, EpochResult, Loss, Progress, finetune

__all__ = ["PRECISIONS", "Accuracy", "EpochResult", "Loss", "Progress", "evaluate", "finetune", "recalibrate"]
