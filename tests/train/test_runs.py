"""Training inside a run: how it is told, what it leaves, that it goes on after a kill, and on several processes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import ENVIRONMENT, command, done, p2d, refused, small_network, write_small_recipe
from safetensors.torch import load_file

from prune2deploy.masks import load_masks
from prune2deploy.methods.l1 import L1
from prune2deploy.recipe import load_recipe, make_recipe

RESULTS = ("masks.safetensors", "weights.safetensors", "dense.safetensors", "groups.json", "slim.onnx", "recipe.toml")


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recipe_of(folder: Path, epochs: int, *finetune: str, head: tuple[str, ...] = ()) -> Path:
    path = write_small_recipe(folder, *head)
    lines = "\n".join((f"epochs = {epochs}", *finetune))
    path.write_text(path.read_text().replace("epochs = 1", lines))
    return path


def kill_while_training(recipe: Path, run: Path, of: str = "") -> None:
    """Start a walk and kill it when its first epochs are on disk, long before its last; ``of`` is whose: a folder."""
    checkpoint = run / "checkpoints" / of / "training.safetensors"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    words = command("run", recipe, "-o", run)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"


EPOCHS = 25
LONG = ("ema = 0.9", "label_smoothing = 0.1", "distill = true")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run, which was killed while it trained; no test may change it."""
    folder = tmp_path_factory.mktemp("killed")
    kill_while_training(recipe_of(folder, EPOCHS, *LONG), folder / "run")
    return folder


@pytest.fixture
def own(killed: Path, tmp_path: Path) -> Path:
    """The killed run, for a test to change. Its recipe names the network where it was first."""
    return Path(shutil.copytree(killed / "run", tmp_path / "own"))


# --- after a kill -----------------------------------------------------------------------------------------------------


def test_a_killed_run_holds_nothing_under_its_final_names_but_what_it_needs_to_go_on(killed: Path) -> None:
    names = {path.name for path in (killed / "run").iterdir()}
    assert names == {"lock", "checkpoints"}
    inside = {path.name for path in (killed / "run" / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert inside >= {"pruned.json", "training.safetensors", "masks.safetensors", "weights.safetensors", "log.jsonl"}


def test_resume_goes_on_with_the_last_epoch_and_ends_with_the_same_bits(
    killed: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("run", killed / "recipe.toml", "-o", tmp_path / "whole")
    (own / "checkpoints" / ".training.safetensors.abc.part").write_bytes(b"half")
    monkeypatch.setattr(L1, "scores", lambda *_: pytest.fail("channels were chosen again"))
    began = len(log(own / "checkpoints"))
    done("run", killed / "recipe.toml", "-o", own, "--resume")
    for name in RESULTS:
        assert (own / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (own / "checkpoints").exists()
    lines, expected = log(own), log(tmp_path / "whole")
    assert [one["epoch"] for one in lines] == list(range(1, EPOCHS + 1))
    assert 1 <= began < EPOCHS
    timeless = [[{key: one[key] for key in one if key != "seconds"} for one in each] for each in (lines, expected)]
    assert timeless[0] == timeless[1]
    assert report(own)["prune"]["history"] == lines
    accuracy = [report(folder)["prune"]["accuracy"] for folder in (own, tmp_path / "whole")]
    assert accuracy[0] == accuracy[1]


CSGD = ('method = "csgd"', 'method_options = {epochs = 25, learning_rate = 0.1, strength = 0.02, merge = "anyway"}')


@pytest.mark.slow
def test_a_method_that_was_killed_while_it_trained_goes_on_too_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 1, head=CSGD)
    kill_while_training(recipe, tmp_path / "run", "method")
    assert not (tmp_path / "run" / "masks.safetensors").exists()
    done("run", recipe, "-o", tmp_path / "whole")
    done("run", recipe, "-o", tmp_path / "run", "--resume")
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    sections = [report(tmp_path / run)["prune"] for run in ("run", "whole")]
    assert len(sections[0]["method_history"]) == 25
    assert sections[0]["method_report"] == sections[1]["method_report"]
    assert sections[0]["accuracy"] == sections[1]["accuracy"]


@pytest.mark.slow
def test_a_method_that_was_killed_in_the_run_of_another_recipe_goes_on_too(tmp_path: Path) -> None:
    done("run", recipe_of(tmp_path / "first", 1), "-o", tmp_path / "run")
    recipe = recipe_of(tmp_path / "other", 1, head=CSGD)
    kill_while_training(recipe, tmp_path / "run", "method")
    began = len(log(tmp_path / "run" / "checkpoints"))
    done("run", recipe, "-o", tmp_path / "run", "--resume")
    lines = [one for one in log(tmp_path / "run") if one["what"] == "method"]
    assert [one["epoch"] for one in lines] == list(range(1, 26))
    assert 1 <= began < 25
    spent = sum(one["seconds"] for one in lines)
    assert report(tmp_path / "run")["prune"]["seconds"]["training"] >= round(spent, 3), "before the kill, too"


@pytest.mark.slow
def test_an_interrupted_prune_says_how_it_goes_on_and_does(tmp_path: Path) -> None:
    call = ("prune", small_network(tmp_path), "--finetune-epochs", EPOCHS, "-o", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "training.safetensors"
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # it is ignored in what shells run in the background
    with subprocess.Popen(
        command(*call), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heeded
    ) as process:
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.decode().splitlines()[-1].startswith("p2d: interrupted;")
    assert "--resume" in said.decode()
    began = len(log(tmp_path / "run" / "checkpoints"))
    done(*call, "--resume")
    assert 1 <= began < EPOCHS
    assert [one["epoch"] for one in log(tmp_path / "run")] == list(range(1, EPOCHS + 1))
    written = (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns
    done(*call, "--resume")
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns == written, "there was nothing left to do"


@pytest.mark.slow
def test_what_a_method_trained_and_then_refused_to_choose_by_is_kept(tmp_path: Path) -> None:
    options = "method_options = {epochs = 4, learning_rate = 0.1, strength = 5.0, vector_strength = 1.0}"
    recipe = recipe_of(tmp_path, 1, head=('method = "csgd"', options))
    kept = tmp_path / "run" / "trained.safetensors"
    refused(p2d("run", recipe, "-o", tmp_path / "run"), 2, "has not converged", f"--weights {kept}")
    trained = load_file(kept)
    text = recipe.read_text().replace("epochs = 4,", "epochs = 30,")
    (tmp_path / "again.toml").write_text(f'weights = "{kept}"\n{text}')
    done("run", tmp_path / "again.toml", "-o", tmp_path / "run")
    dense = load_file(tmp_path / "run" / "dense.safetensors")
    assert all(dense[name].equal(tensor) for name, tensor in trained.items())


@pytest.mark.slow
def test_without_resume_a_killed_run_begins_anew(killed: Path, own: Path, tmp_path: Path) -> None:
    short = recipe_of(tmp_path / "short", 1)
    done("run", short, "-o", own)
    assert not (own / "checkpoints").exists()
    assert [one["epoch"] for one in log(own)] == [1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("learning_rate = 0.3|learning_rate = 0.2", "its finetune.learning_rate is 0.3 where this one has 0.2"),
        ("network|method = 'fpgm'\nnetwork", "its method is 'l1' where this one has 'fpgm'"),
        ("network|target = 'macs=0.6'\nnetwork", "its target is 'macs=0.5' where this one has 'macs=0.6'"),
    ],
)
def test_resume_refuses_the_training_of_another_recipe(
    change: str, says: str, killed: Path, own: Path, tmp_path: Path
) -> None:
    old, new = change.split("|")
    text = (killed / "recipe.toml").read_text().replace("net.py", str(killed / "net.py"))
    (tmp_path / "other.toml").write_text(text.replace(old, new, 1))
    before = contents(own)
    refused(p2d("run", tmp_path / "other.toml", "-o", own, "--resume"), 2, "begun.json", says, "remove it")
    assert contents(own) == before


def test_resume_refuses_the_training_of_another_version(
    killed: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune2deploy.identity.__version__", "99.0.0")
    refused(p2d("run", killed / "recipe.toml", "-o", own, "--resume"), 2, "begun.json", "its version is")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_resume_names_what_is_damaged(text: str, killed: Path, own: Path) -> None:
    (own / "checkpoints" / "pruned.json").write_text(text)
    refused(p2d("run", killed / "recipe.toml", "-o", own, "--resume"), 2, "pruned.json")


@pytest.mark.slow
def test_a_run_that_was_being_made_anew_is_gone_on_with_and_the_earlier_one_stays_until_then(
    killed: Path, own: Path, tmp_path: Path
) -> None:
    done("run", recipe_of(tmp_path / "first", 1), "-o", tmp_path / "run")
    before = contents(tmp_path / "run")
    shutil.copytree(own / "checkpoints", tmp_path / "run" / "checkpoints")
    done("run", tmp_path / "first" / "recipe.toml", "-o", tmp_path / "run", "--resume")
    after = contents(tmp_path / "run")
    assert all(after[name] == data for name, data in before.items() if name != "report.html")
    done("run", killed / "recipe.toml", "-o", tmp_path / "run", "--resume")
    assert load_recipe(tmp_path / "run" / "recipe.toml").finetune.epochs == EPOCHS
    assert len(log(tmp_path / "run")) == EPOCHS


def test_settings_of_fine_tuning_without_epochs_are_said_to_change_nothing(tmp_path: Path) -> None:
    call = ("prune", small_network(tmp_path))
    done(*call, "--distill", "--ema", 0.9, "--optimizer", "adamw", "--precision", "fp32", "-o", tmp_path / "idle")
    (said,) = [text for text in report(tmp_path / "idle")["prune"]["warnings"] if "changed nothing" in text]
    assert said.startswith("optimizer, ema, distill of fine-tuning")
    done(*call, "-o", tmp_path / "usual")
    assert not any("changed nothing" in text for text in report(tmp_path / "usual")["prune"]["warnings"])


def test_a_training_that_diverges_leaves_the_earlier_run_as_it_was(small: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    before = contents(run)
    network = load_recipe(run / "recipe.toml").network
    wild = ("--finetune-epochs", 3, "--learning-rate", "1e30")
    refused(p2d("prune", network, *wild, "-o", run), 2, "training diverged", "lower learning rate")
    after = contents(run)
    assert {name: after.get(name) for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} <= {"checkpoints"}


# --- how it is told ---------------------------------------------------------------------------------------------------


def test_the_options_of_fine_tuning_are_in_the_recipe_of_the_run(tmp_path: Path) -> None:
    options = ("--finetune-epochs", 1, "--optimizer", "adamw", "--ema", 0.5, "--label-smoothing", 0.1, "--distill")
    more = ("--weight-decay", 0.01, "--precision", "fp32", "--batch-size", 64)
    done("prune", small_network(tmp_path), *options, *more, "-o", tmp_path / "run")
    found = load_recipe(tmp_path / "run" / "recipe.toml").finetune
    assert (found.optimizer, found.learning_rate, found.ema, found.label_smoothing) == ("adamw", 1e-3, 0.5, 0.1)
    assert (found.distill, found.weight_decay, found.precision, found.batch_size) == (True, 0.01, "fp32", 64)
    [line] = log(tmp_path / "run")
    assert line.keys() == {"what", "epoch", "loss", "holdout_top1", "holdout_loss", "lr", "seconds"}
    assert (line["what"], line["epoch"]) == ("finetune", 1)


@pytest.mark.slow
def test_every_setting_of_fine_tuning_changes_the_weights(tmp_path: Path) -> None:
    settings = {
        "plain": (),
        "ema": ("--ema", 0.5),
        "smoothing": ("--label-smoothing", 0.2),
        "distill": ("--distill",),
        "decay": ("--weight-decay", 0.1),
        "adamw": ("--optimizer", "adamw"),
    }
    found = set()
    for name, options in settings.items():
        done("prune", small_network(tmp_path), "--finetune-epochs", 1, *options, "-o", tmp_path / name)
        found.add((tmp_path / name / "weights.safetensors").read_bytes())
        assert (tmp_path / name / "masks.safetensors").read_bytes() == (
            tmp_path / "plain" / "masks.safetensors"
        ).read_bytes()
    assert len(found) == len(settings)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"momentum": 1.0},
        {"label_smoothing": 1.0},
        {"ema": -0.1},
        {"temperature": 0.0},
        {"distill_share": 1.5},
        {"precision": "fp16"},
        {"epochs": 2, "warmup_epochs": 3.0},
        {"gradient_clipping": -1.0},
        {"batch_size": 1},
        {"learning_rate": float("inf")},
    ],
)
def test_settings_that_do_not_fit_are_refused_on_one_line(options: dict[str, Any]) -> None:
    from prune2deploy.errors import InputError

    with pytest.raises(InputError) as caught:
        make_recipe({"network": "resnet8", "finetune": options})
    assert list(options)[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rate_of_adamw_is_its_usual_one_unless_it_is_given() -> None:
    rates = [
        make_recipe({"network": "a", "finetune": values}).finetune.learning_rate
        for values in ({}, {"optimizer": "adamw"}, {"optimizer": "adamw", "learning_rate": 0.01})
    ]
    assert rates == [0.05, 1e-3, 0.01]


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_the_log_has_the_methods_own_training_too(tmp_path: Path) -> None:
    options = ("--method", "adapruner", "--option", "epochs=2", "--finetune-epochs", 1)
    done("prune", small_network(tmp_path), *options, "-o", tmp_path / "run")
    lines = log(tmp_path / "run")
    section = report(tmp_path / "run")["prune"]
    assert section["method_history"] + section["history"] == lines
    assert [one["what"] for one in lines] == ["method"] * (len(lines) - 1) + ["finetune"]
    assert len(lines) >= 3


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done("prune", small_network(tmp_path), "--finetune-epochs", 3, "--tensorboard", "-o", tmp_path / "run")
    code = (
        "import sys, json\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1]); events.Reload()\n"
        "print(json.dumps([[one.step, one.value] for one in events.Scalars('finetune/loss')]))\n"
    )
    words = [sys.executable, "-c", code, tmp_path / "run" / "tensorboard"]
    found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    values = json.loads(found.stdout)
    assert [step for step, _ in values] == [1, 2, 3]
    assert [value for _, value in values] == pytest.approx([one["loss"] for one in log(tmp_path / "run")], rel=1e-6)
    done("prune", small_network(tmp_path), "-o", tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists(), "the events of a training that this run did not do"


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = p2d("prune", small_network(tmp_path), "--finetune-epochs", 1, "--tensorboard", "-o", tmp_path / "run")
    refused(outcome, 2, "tensorboard is not installed", "prune2deploy[tensorboard]")


def test_a_training_that_may_be_diverging_is_said_at_once_and_in_the_report(tmp_path: Path) -> None:
    options = ("--finetune-epochs", 6, "--learning-rate", 3.0)
    outcome = p2d("prune", small_network(tmp_path), *options, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "warning: training may be diverging" in outcome.err
    texts = report(tmp_path / "run")["prune"]["warnings"]
    assert any(text.startswith("fine-tuning: training may be diverging") for text in texts)
    assert "note: fine-tuning: training may be diverging" in " ".join(outcome.out.split())


# --- several processes ------------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.run(
        [*words, "prune2deploy", *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_walk_the_whole_way_as_one_does(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 2, "ema = 0.5")
    found = torchrun("run", recipe, "-o", tmp_path / "two", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["slim"]["removed_channels"] > 0, "what was printed is not one document"
    done("run", recipe, "-o", tmp_path / "one")
    masks = [load_masks(tmp_path / name / "masks.safetensors") for name in ("one", "two")]
    assert masks[0].keys() == masks[1].keys()
    assert all((mask == masks[1][name]).all() for name, mask in masks[0].items())
    dense = [load_file(tmp_path / name / "dense.safetensors") for name in ("one", "two")]
    assert all(bool((each == dense[1][name]).all()) for name, each in dense[0].items())
    losses = [[one["loss"] for one in log(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # batch norms see half of a batch each
    assert not (tmp_path / "two" / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(killed: Path, own: Path) -> None:
    found = torchrun("run", killed / "recipe.toml", "-o", own, "--resume")
    assert found.returncode == 0, found.stderr
    assert len(log(own)) == EPOCHS
    again = torchrun("run", killed / "recipe.toml", "-o", own, "--resume")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_several_processes_refuse_what_one_refuses(tmp_path: Path) -> None:
    found = torchrun("prune", small_network(tmp_path), "--target", "macs=0.000001", "-o", tmp_path / "run")
    assert found.returncode != 0
    assert "p2d: " in found.stderr
    assert "Traceback" not in "".join(line for line in found.stderr.splitlines() if line.startswith("p2d"))
    assert not (tmp_path / "run" / "masks.safetensors").exists()
