"""Does SP's proxy rank networks? Its Spearman correlation with the accuracy behind short training, on the digits.

A super-network is trained once; of the choices that cost about the same some are drawn, each is sliced out of it,
trained for some epochs, and tested. The result is written to models/bench/rank_sp.json as it came out.
"""

import argparse
import copy
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from prune2deploy.apply import MaskKeeper, apply_masks, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.data import load_data
from prune2deploy.exporter import export_network
from prune2deploy.files import write_json
from prune2deploy.graph.groups import find_groups
from prune2deploy.groups import Groups
from prune2deploy.methods.sp import SP
from prune2deploy.methods.stages import find_stages, first_channels, width_choices
from prune2deploy.methods.supernet import measured_losses
from prune2deploy.networks import load_network
from prune2deploy.train import Task, evaluate

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "resnet_digits"


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    data = load_data("digits", seed=options.seed)
    network = load_network(NETWORK, num_classes=10, in_channels=1, seed=options.seed)
    groups = find_groups(export_network(network.module, network.example_inputs, fuse=False).model)
    task = Task(data, data.mean, data.std, seed=options.seed, settings={"precision": "fp32"})
    budget, method = Budget(Target("macs", options.share)), SP(epochs=options.epochs, seed=options.seed)
    started = time.perf_counter()
    state = method.fit(network.module, groups, budget, task)
    stages = find_stages(weights_of(network.module), groups, method.longest)
    choices = width_choices(groups, [group for stage in stages for group in stage.groups], method.steps, budget)
    losses = measured_losses(
        network.module, groups, stages, choices, state.order, lambda: task.images(), lambda: task.holdout()
    )
    rows = []
    for chosen in _of_equal_cost(groups, choices, options):
        proxy = sum(
            table[tuple(chosen[group] for group in stage.groups)] for stage, table in zip(stages, losses, strict=True)
        )
        masks = first_channels(state.order, chosen)
        net = copy.deepcopy(network.module)
        apply_masks(net, groups, masks)
        task.recalibrate(net)
        before = evaluate(net, data.test, data.mean, data.std)
        task.train(net, epochs=options.retrain, lr=options.lr, after_step=MaskKeeper(net, groups, masks))
        after = evaluate(net, data.test, data.mean, data.std)
        share = groups.cost.macs(groups.full_widths() | chosen) / groups.cost.macs(groups.full_widths())
        rows.append(
            {
                "widths": chosen,
                "share": share,
                "proxy": proxy,
                "sliced": {"top1": before.top1, "loss": before.loss},
                "retrained": {"top1": after.top1, "loss": after.loss},
            }
        )
        print(f"proxy {proxy:.4f}  sliced {before.top1:.4f}  retrained {after.top1:.4f} {after.loss:.4f}", flush=True)
    full = evaluate(network.module, data.test, data.mean, data.std)
    document = {
        "network": NETWORK,
        "options": {**vars(options), "output": options.output.name},
        "full_top1": full.top1,
        "spearman": {
            f"{when}_{what}": _spearman(rows, when, what)
            for when in ("sliced", "retrained")
            for what in ("top1", "loss")
        },
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    write_json(options.output, document)
    print(json.dumps(document["spearman"], indent=1))


def _of_equal_cost(groups: Groups, choices: dict[str, list[int]], options: argparse.Namespace) -> list[dict[str, int]]:
    """Return some of the choices whose MACs are within the tolerance of the share, drawn at random."""
    full = groups.full_widths()
    dense = groups.cost.macs(full)
    every = (dict(zip(choices, widths, strict=True)) for widths in itertools.product(*choices.values()))
    near = [one for one in every if abs(groups.cost.macs(full | one) / dense - options.share) <= options.tolerance]
    generator = np.random.default_rng(options.seed)
    return [near[place] for place in generator.permutation(len(near))[: options.networks]]


def _spearman(rows: list[dict[str, object]], when: str, what: str) -> dict[str, float]:
    """Return the rank correlation of the proxy with what was measured; a good proxy falls as top-1 rises."""
    measured = [row[when][what] for row in rows]  # type: ignore[index]
    found = spearmanr([row["proxy"] for row in rows], measured)
    return {"rho": float(found.statistic), "p": float(found.pvalue)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="of the super-network")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--retrain", type=int, default=3, help="epochs of each network")
    parser.add_argument("--lr", type=float, default=0.02, help="of that")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "bench" / "rank_sp.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
