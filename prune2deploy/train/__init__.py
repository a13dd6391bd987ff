"""Training, evaluation and BatchNorm recalibration of image classifiers."""

from prune2deploy.train.accuracy import Accuracy, evaluate, measure, measure_norms, recalibrate
from prune2deploy.train.sgd import PRECISIONS, EpochResult, Loss, Progress, finetune
from prune2deploy.train.task import Task

__all__ = [
    "PRECISIONS",
    "Accuracy",
    "EpochResult",
    "Loss",
    "Progress",
    "Task",
    "evaluate",
    "finetune",
    "measure",
    "measure_norms",
    "recalibrate",
]
