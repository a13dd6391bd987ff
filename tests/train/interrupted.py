"""Train a small network with checkpoints, and be killed while at it.

Usage: interrupted.py FOLDER WEIGHTS KILL_IN_EPOCH [OPTION=JSON ...]; KILL_IN_EPOCH 0 lets it finish.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_training import few_digits, small, train

from prune2deploy.train import EpochResult


def main() -> None:
    torch.set_num_threads(1)
    folder, weights, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    options = {key: json.loads(value) for key, value in (word.split("=") for word in sys.argv[4:])}

    def kill(result: EpochResult) -> None:
        if result.epoch == last:
            os.kill(os.getpid(), signal.SIGKILL)

    module = small(dropout=0.3)
    train(module, few_digits(), epochs=3, checkpoint=folder, after_epoch=kill, **options)
    save_file({name: each.contiguous() for name, each in module.state_dict().items()}, weights)


if __name__ == "__main__":
    main()
