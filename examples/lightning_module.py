#!/usr/bin/env python
"""Prune inside Lightning's training loop: the penalty in ``training_step``, the rest in three of its hooks.

pip install lightning
python examples/lightning_module.py --method l1 --epochs 3 -o slim.onnx
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from own_loop import accuracy, digits, network
from torch import Tensor, nn
from torch.utils.data import DataLoader

import prune2deploy as p2d
from prune2deploy.methods import load_method


class Pruned(lightning.LightningModule):
    """Any classifier of yours, with a pruner at work."""

    def __init__(self, model: nn.Module, pruner: p2d.Pruner, rate: float) -> None:
        super().__init__()
        self.model, self.pruner, self.rate = model, pruner, rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; the pruner was made before it."""
        return torch.optim.SGD(self.model.parameters(), lr=self.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def on_fit_start(self) -> None:
        """Put the network in training mode; Lightning leaves it as the measurement before left it."""
        self.train()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss with the method's penalty."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels) + self.pruner.penalty()

    def on_after_backward(self) -> None:
        """Let the method edit the gradients."""
        self.pruner.after_backward()

    def on_train_batch_end(self, *_: object) -> None:
        """Let the method edit the weights, or keep what was pruned silent."""
        self.pruner.after_step()

    def on_train_epoch_end(self) -> None:
        """Tell the method that an epoch is over."""
        self.pruner.epoch_end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="l1", help="a name of 'p2d methods'")
    parser.add_argument("--epochs", type=int, default=3, help="of training, and of fine-tuning")
    parser.add_argument("-o", "--out", default="slim.onnx")
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    train_data, test_data = digits()
    loader = DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True)
    model, example = network(), train_data.tensors[0][:2]
    pruner = p2d.Pruner(model, example, method=load_method(options.method), target=p2d.Target(macs=0.5))

    def fit(rate: float) -> None:
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Pruned(model, pruner, rate), loader)

    fit(0.1)
    print(f"trained     {accuracy(model, test_data):.1%}")
    pruned = pruner.finish(calibration=loader)
    print(f"pruned      {accuracy(model, test_data):.1%}")
    fit(0.05)
    print(f"fine-tuned  {accuracy(model, test_data):.1%}")
    macs = p2d.export(model, pruned, example, options.out)["macs"]
    print(f"{options.out}: {macs['before']:,} MACs -> {macs['after']:,}, verified")


if __name__ == "__main__":
    main()
