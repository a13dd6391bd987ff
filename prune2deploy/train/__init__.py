"""Training, evaluation and BatchNorm recalibration of image classifiers."""

from prune2deploy.train.accuracy import Accuracy, evaluate, measure, measure_norms, recalibrate
from prune2deploy.train.loop import finetune
from prune2deploy.train.losses import distill_loss
from prune2deploy.train.memory import keep_freed_memory
from prune2deploy.train.processes import Processes
from prune2deploy.train.settings import OPTIMIZERS, PRECISIONS, EpochResult, Loss, Progress
from prune2deploy.train.task import Task

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "Accuracy",
    "EpochResult",
    "Loss",
    "Processes",
    "Progress",
    "Task",
    "distill_loss",
    "evaluate",
    "finetune",
    "keep_freed_memory",
    "measure",
    "measure_norms",
    "recalibrate",
]
