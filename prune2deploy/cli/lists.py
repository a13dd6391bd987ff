"""Commands that say what there is: methods, networks, ops, backends, doctor."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from prune2deploy.cli.options import Json
from prune2deploy.cli.output import emit, say


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, for its details.")] = None, as_json: Json = False
) -> None:
    """List the pruning methods, or show one: what it needs and yields, what was read of its paper, and its options."""
    from dataclasses import asdict

    from prune2deploy.methods import all_methods, describe_options, method_class
    from prune2deploy.screen import plain_table

    known = all_methods()
    if name is None:
        rows = [(key, info.summary, _needs(info.needs), info.yields, info.status) for key, info in known.items()]
        table = {key: {k: v for k, v in asdict(info).items() if k != "target"} for key, info in known.items()}
        emit(
            {"methods": table},
            plain_table(("method", "how it chooses", "needs", "yields", "status"), rows),
            as_json=as_json,
        )
        return
    found = method_class(name)
    info, options = known[name], describe_options(found)
    described = {"needs": asdict(info.needs), "yields": info.yields, "status": info.status, "source": info.source}
    own_loop = not found.phases
    lines = [
        inspect.cleandoc(found.__doc__ or ""),
        "",
        f"needs     {_needs(info.needs)}",
        f"yields    {info.yields}",
        f"status    {info.status}; {info.source}",
        f"own loop  {'yes, by prune2deploy.Pruner' if own_loop else 'no: it trains in phases of its own'}",
        "",
        *(f"--option {key}=...  {allowed}" for key, allowed in options.items()),
        *([] if options else ["no options"]),
    ]
    document = {"method": name, "options": options, "own_loop": own_loop, **described}
    emit(document, "\n".join(lines), as_json=as_json)


def _needs(needs: Any) -> str:
    from dataclasses import asdict

    return ", ".join(key.replace("_", " ") for key, wanted in asdict(needs).items() if wanted) or "nothing"


def networks(as_json: Json = False) -> None:
    """List the built-in networks."""
    from prune2deploy.networks import NETWORKS
    from prune2deploy.screen import plain_table

    rows = [
        (info.name, "x".join(map(str, info.input_shape)), info.num_classes, info.description)
        for info in NETWORKS.values()
    ]
    table = {
        info.name: {
            "input_shape": info.input_shape,
            "num_classes": info.num_classes,
            "description": info.description,
            "paper": info.paper,
        }
        for info in NETWORKS.values()
    }
    emit({"networks": table}, plain_table(("network", "input", "classes", "what it is"), rows), as_json=as_json)
    say("also FILE.py:FACTORY, and with the extra 'zoo' torchvision:NAME and timm:NAME", as_json=as_json)


def ops(as_json: Json = False) -> None:
    """List the ONNX operators that the channel analysis has a rule for."""
    from prune2deploy.graph.rules import RULES
    from prune2deploy.plugins import RULES_GROUP, plugins
    from prune2deploy.screen import plain_table

    others = {name: f"rule of {found.package}" for name, found in plugins(RULES_GROUP).items() if name not in RULES}
    table = {name: rule.kind for name, rule in RULES.items()} | others
    emit({"ops": table}, plain_table(("operator", "kind"), list(table.items())), as_json=as_json)
    say("any other operator is opaque: what it reads stays, and it is counted", as_json=as_json)


def backends(as_json: Json = False) -> None:
    """List the backends, and what is missing for each."""
    from prune2deploy.backends import BACKENDS
    from prune2deploy.screen import plain_table

    rows = [(name, info.description, _uses(info), info.status() or "ready") for name, info in BACKENDS.items()]
    table = {row[0]: {"description": row[1], "uses": row[2], "status": row[3]} for row in rows}
    emit({"backends": table}, plain_table(("backend", "what it is", "for", "state"), rows), as_json=as_json)


def _uses(info: Any) -> str:
    return ", ".join(name for name, is_so in (("bench", info.benches), ("export --trt", info.builds)) if is_so)


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and which commands can run on it."""
    from importlib.util import find_spec

    from prune2deploy.backends import BACKENDS
    from prune2deploy.environment import environment
    from prune2deploy.screen import plain_table

    found = environment()
    has: Callable[[str], bool] = lambda name: find_spec(name) is not None  # noqa: E731
    checks = [
        (
            "prune, export, run",
            "ready" if has("torch") and has("onnxscript") else "pip install 'prune2deploy[torch,cpu]'",
        ),
        ("slim, verify, inspect", "ready" if has("onnxruntime") else "pip install 'prune2deploy[cpu]'"),
        *((f"{_uses(info)} with {name}", info.status() or "ready") for name, info in BACKENDS.items()),
    ]
    emit({"environment": found, "checks": dict(checks)}, plain_table(("what", "state"), checks), as_json=as_json)
    shown = {key: value for key, value in found.items() if value not in (None, [], {}) and key != "packages"}
    say("\n".join(f"{key:<18} {value}" for key, value in shown.items()), as_json=as_json)
    say("packages           " + ", ".join(f"{k} {v}" for k, v in found["packages"].items()), as_json=as_json)
