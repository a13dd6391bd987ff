"""Slim many architectures with planted zeros, verify each, and keep a table of what happened.

Usage: python tools/slim_zoo.py [--only NAME] [--source builtin|onnx|timm|torchvision|detection] [--exporter legacy]
                                [--redo all|failed|old] [--limit SECONDS] [--table] [-o FILE]

A network gets random weights (seeded; its norms are calibrated on noise, their scales and shifts drawn), is exported
once and planted three ways, and every way is a row:

groups    half the channels of every prunable group silenced in the unfused graph, as masks do
fused     the same, then onnxscript's optimiser, which folds the norms
filters   the optimised dense graph with half of the filters of every convolution and linear layer zeroed, biases kept:
          the channels become nonzero constants, and ties with live channels hold many of them back

``left`` is what the slim graph has more than the cost model of the groups predicts. ``held`` counts, by opaque
operator, constant channels that its nodes read: they stay since nothing is known of the reader. ``noise``, of rows that
fail, is how far an ulp in the inputs alone moves the outputs: with random weights some networks amplify rounding
without bound. Each network runs in a process of its own with a time limit. Rows are written as they come and those that
are there are skipped.
"""

import argparse
import fcntl
import functools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from code_version import package_hash  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from planting import plant_groups  # noqa: E402

from prune2deploy.errors import P2DError, one_line  # noqa: E402
from prune2deploy.files import read_json, write_bytes, write_json  # noqa: E402
from prune2deploy.graph.groups import find_groups  # noqa: E402
from prune2deploy.graph.layers import totals  # noqa: E402
from prune2deploy.graph.model import copy_of, load_model  # noqa: E402
from prune2deploy.graph.rewrite import Slimmed, remove_dead_channels  # noqa: E402
from prune2deploy.graph.verify import verify  # noqa: E402
from prune2deploy.groups import Groups  # noqa: E402

RESULTS = ROOT / "models" / "bench" / "zoo.json"
VARIANTS = ("groups", "fused", "filters")
LEGACY_OPSET = 13

BUILTIN = """resnet20 resnet20_proj resnet8 resnet56 resnet_digits vgg16_bn mobilenetv2_cifar resnet18:64 resnet34:64
resnet50:64 mobilenetv2:64"""
TORCHVISION = """alexnet:96 vgg11_bn:64 squeezenet1_1:96 densenet121:64 googlenet:64 inception_v3:96 mobilenet_v2:64
mobilenet_v3_small:64 mobilenet_v3_large:64 shufflenet_v2_x0_5:64 shufflenet_v2_x1_0:64 mnasnet0_5:64 resnet18:64
resnet50:64 resnext50_32x4d:64 regnet_y_400mf:64 regnet_x_400mf:64 efficientnet_b0:64 efficientnet_v2_s:64
convnext_tiny:64 swin_t:64 swin_v2_t:64 deeplabv3_mobilenet_v3_large:64 deeplabv3_resnet50:64
fcn_resnet50:64 lraspp_mobilenet_v3_large:64 r3d_18:16 mc3_18:16 r2plus1d_18:16"""
DETECTION = """ssdlite320_mobilenet_v3_large:96 ssd300_vgg16:300 fasterrcnn_mobilenet_v3_large_fpn:64
retinanet_resnet50_fpn:64 retinanet_resnet50_fpn_v2:64 fcos_resnet50_fpn:64"""
TIMM = """
resnet10t:64 resnet14t:64 resnet26d:64 legacy_seresnet18:64 seresnext26t_32x4d:64 skresnet18:64 ecaresnext26t_32x4d:64
gcresnet33ts:64 res2net50_26w_4s:64 res2next50:64 resnest14d:64 selecsls42b:64 dla34:64 dla46_c:64 hrnet_w18_small:64
hardcorenas_a:64 ghostnet_100:64 ghostnetv2_100:64 repghostnet_050:64 mobilenetv1_100:64 mobilenetv3_small_050:64
mobilenetv4_conv_small_050:64 tf_mobilenetv3_small_minimal_100:64 lcnet_050:64 mixnet_s:64 tf_mixnet_s:64
fbnetc_100:64 spnasnet_100:64 semnasnet_075:64 efficientnet_lite0:64 efficientnet_es:64 tinynet_e:64 rexnet_100:64
mobileone_s0:64 repvgg_a0:64 fastvit_t8:64 edgenext_xx_small:64 mobilevit_xxs:64 mobilevitv2_050:64 efficientvit_b0:64
efficientvit_m0 efficientformer_l1 efficientformerv2_s0 poolformer_s12:64 poolformerv2_s12:64 convnext_atto:64
convnextv2_atto:64 convnext_atto_ols:64 inception_next_atto:64 inception_v4:96 xception41:64 legacy_xception:64
cspresnet50:64 cspresnext50:64 cspdarknet53:64 darknet53:64 cs3darknet_s:64 vovnet39a:64 ese_vovnet19b_dw:64 dpn48b:64
dpn68:64 densenet121:64 densenetblur121d:64 resnetv2_50:64 resnetv2_50d_gn:64 resnet50_gn:64 gernet_s:64
regnetx_002:64 regnety_002:64 regnetz_005:64 regnetv_040:64 nf_regnet_b0:64 eca_nfnet_l0:64 botnet26t_256:256
halonet26t:256 lambda_resnet26t:128 bat_resnext26ts:256 sebotnet33ts_256:256 hgnet_tiny:64 hgnetv2_b0:64
repvit_m0_9:64 starnet_s1:64 shvit_s1:128 mambaout_femto:64 rdnet_tiny:64 tiny_vit_5m_224 swiftformer_xs
fasternet_t0:64 focalnet_tiny_srf:64 davit_tiny:64 levit_128s levit_conv_128s visformer_tiny vit_tiny_patch16_224
deit_tiny_patch16_224 mixer_s32_224 resmlp_12_224 xcit_nano_12_p16_224 pit_ti_224 pvt_v2_b0:64 twins_pcpvt_small:64
swin_tiny_patch4_window7_224 coat_tiny coatnet_nano_rw_224 maxvit_pico_rw_256 tresnet_m:64 pnasnet5large:96
resnet18+features:64 mobilenetv3_small_100+features:64 dla34+features:64 hrnet_w18_small+features:64
efficientnet_lite0+features:64 convnext_atto+features:64 cspdarknet53+features:64 vovnet39a+features:64
nasnetalarge:96 convmixer_768_32:64 volo_d1_224 nextvit_small:64 crossvit_tiny_240 sequencer2d_s gmlp_s16_224"""
ONNX_FILES = "yolox_nano nanodet_m_320 ultraface_rfb_320"
NETWORKS = {"builtin": BUILTIN, "onnx": ONNX_FILES, "torchvision": TORCHVISION, "detection": DETECTION, "timm": TIMM}
Row = dict[str, Any]


def names_of(source: str) -> list[str]:
    return NETWORKS[source].split()


# --- networks -----------------------------------------------------------------------------------------------------


@functools.cache
def define_missing_operators() -> None:
    """Let torchvision be imported where its compiled half cannot be loaded, as beside a CPU build of torch."""
    import importlib.util

    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(next(str(path) for path in Path(spec.origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for signature in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
            "int sampling_ratio, bool aligned) -> Tensor",
        ):
            library.define(signature)
        globals()["_library"] = library  # its definitions last as long as it does


def _torchvision(name: str) -> Any:
    define_missing_operators()
    import torchvision

    options = {"weights_backbone": None} if any(word in name for word in ("deeplab", "fcn_", "lraspp")) else {}
    if "inception" in name or "googlenet" in name:
        options |= {"aux_logits": False, "init_weights": False, "transform_input": False}
    return torchvision.models.get_model(name, weights=None, **options)


def _detection(name: str) -> Any:
    """Return a detector's backbone, and its head where that is a plain network of the backbone's maps."""
    import torch

    define_missing_operators()
    import torchvision

    whole = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=11)

    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = whole.backbone
            self.head = getattr(whole, "head", None)

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            maps = list(self.backbone(image).values())
            return maps if self.head is None else list(self.head(maps).values())

    return Maps()


def _timm(name: str) -> Any:
    define_missing_operators()
    import timm

    name, _, features = name.partition("+")
    options = {"features_only": True} if features else {"num_classes": 10}
    return timm.create_model(name, pretrained=False, exportable=True, **options)


def _builtin(name: str) -> Any:
    from prune2deploy.networks import load_network

    return load_network(name).module


BUILD: dict[str, Callable[[str], Any]] = {
    "builtin": _builtin,
    "torchvision": _torchvision,
    "detection": _detection,
    "timm": _timm,
}


def input_size(source: str, name: str, module: Any) -> tuple[int, ...]:
    """Return the shape of one sample, small where the network allows it."""
    short, _, wanted = name.partition(":")
    if source == "builtin":
        from prune2deploy import networks

        shape = networks.NETWORKS[short].input_shape
        return (*shape[:1], int(wanted), int(wanted)) if wanted else shape
    if source == "torchvision" and any(word in short for word in ("3d", "mc3", "plus1d")):
        return (3, 4, int(wanted) * 2, int(wanted) * 2)
    default = getattr(module, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return (3, int(wanted), int(wanted)) if wanted else tuple(default)


def randomise(module: Any, example: Any) -> None:
    """Draw every scale and shift: no channel may be silent before one is planted; calibrate the norms on noise.

    Before, so that the draws do not meet wild activations, and after, so that they make none.
    """
    import torch

    calibrate(module, example)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim <= 1 or "gamma" in name or not parameter.any():
                around = 1.0 if name.rpartition(".")[2] in ("weight", "gamma", "scale") else 0.0
                parameter.copy_(around + 0.4 * (torch.rand_like(parameter) - 0.5))
    calibrate(module, example)


def calibrate(module: Any, example: Any) -> None:
    """Give every BatchNorm the statistics of one batch of noise."""
    import torch

    norms = [each for each in module.modules() if isinstance(each, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        module.train()
        with torch.no_grad():
            module(torch.cat([example, torch.randn_like(example)]))
        module.eval()


def export(module: Any, example: Any, exporter: str) -> onnx.ModelProto:
    """Return the graph: unfused from torch's default exporter, or as the legacy one writes it."""
    if exporter == "legacy":
        return _legacy(module, example)
    from prune2deploy.exporter import export_network

    return export_network(module, (example,), fuse=False).model


def _legacy(module: Any, example: Any) -> onnx.ModelProto:
    import io
    import warnings

    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (example,),
            buffer,
            dynamo=False,
            opset_version=LEGACY_OPSET,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )
    return onnx.load_from_string(buffer.getvalue())


# --- planting -----------------------------------------------------------------------------------------------------


def edit_weights(model: onnx.ModelProto, edit: Callable[[dict[str, np.ndarray]], Any]) -> Any:
    """Let ``edit`` change copies of the initializers, write back those that changed, and return what it returns."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays = {name: numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    result = edit(arrays)
    for name, tensor in tensors.items():
        if not np.array_equal(numpy_helper.to_array(tensor), arrays[name]):
            tensor.CopyFrom(numpy_helper.from_array(arrays[name], name))
    return result


FILTER_AXIS = {"Conv": 0, "Gemm": None, "MatMul": -1}


def plant_filters(model: onnx.ModelProto, seed: int = 1) -> None:
    """Zero half of the filters of every convolution and linear layer, in place; biases and norms stay."""
    random = np.random.default_rng(seed)

    def edit(arrays: dict[str, np.ndarray]) -> None:
        for node in model.graph.node:
            if node.op_type not in FILTER_AXIS or len(node.input) < 2 or node.input[1] not in arrays:
                continue
            axis = FILTER_AXIS[node.op_type]
            if axis is None:
                transposed = any(item.name == "transB" and item.i for item in node.attribute)
                axis = 0 if transposed else 1
            weight = np.moveaxis(arrays[node.input[1]], axis, 0)
            weight[random.permutation(len(weight))[: len(weight) // 2]] = 0

    edit_weights(model, edit)


# --- one network --------------------------------------------------------------------------------------------------


def held_back(slimmed: Slimmed) -> tuple[dict[str, int], dict[str, str]]:
    """Return by opaque operator how many constant channels its nodes read, and the first reason that was given."""
    held: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    known = slimmed.analysis.known
    for node in slimmed.analysis.tables.nodes:
        values = [operand.name for operand in node.inputs if operand.is_value and operand.name in known.view.facts]
        if known.rules[node.index] is None and values:
            facts = [known.view.facts[name] for name in set(values)]
            held[node.op_type] += sum(int(fact.constant.sum()) for fact in facts if fact.constant.size > 1)
            reasons.setdefault(node.op_type, f"{known.opaque.get(node.index, '')} ({node.name})")
    return dict(held), reasons


def slim_row(model: onnx.ModelProto, groups: Groups | None, widths: dict[str, int] | None) -> Row:
    """Slim and verify one planted graph."""
    reference = model.SerializeToString()
    row: Row = {
        "nodes": len(model.graph.node),
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
    }
    slimmed = remove_dead_channels(onnx.load_from_string(reference))
    before, after = totals(slimmed.layers, "before"), totals(slimmed.layers, "after")
    held, reasons = held_back(slimmed)
    row |= {
        "removed": slimmed.removed_channels,
        "macs": [before.macs, after.macs],
        "parameters": [before.parameters, after.parameters],
        "seconds": {key: round(value, 3) for key, value in slimmed.seconds.items()},
        "opaque": slimmed.opaque,
        "held": held,
        "reasons": reasons,
    }
    if groups is not None and widths is not None:
        row["left"] = {
            "macs": after.macs - groups.cost.macs(widths),
            "parameters": after.parameters - groups.cost.parameters(widths),
        }
    try:
        outputs = verify(reference, slimmed.model.SerializeToString()).outputs
        row["verify"] = "ok"
        row["worst"] = max((output.relative for output in outputs), default=0.0)
        row["largest"] = [min(output.largest for output in outputs), max(output.largest for output in outputs)]
    except P2DError as error:
        row["verify"] = one_line(f"{type(error).__name__}: {error}", 300)
        row["noise"] = noise(reference)
    return row


def noise(model: bytes) -> float:
    """Return how far an ulp more or less in the inputs moves the outputs: what no removal can stay below."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random, worst = np.random.default_rng(0), 0.0
    for scale in (1.0, 1.0, 100.0, 100.0):
        feeds = {}
        for item in session.get_inputs():
            shape = [size if isinstance(size, int) else 2 for size in item.shape]
            feeds[item.name] = (scale * random.standard_normal(shape)).astype(np.float32)
        moved = {name: np.nextafter(array, np.float32(np.inf)) for name, array in feeds.items()}
        for a, b in zip(session.run(None, feeds), session.run(None, moved), strict=True):
            worst = max(worst, float(np.abs(a.astype(np.float64) - b).max(initial=0.0)))
    return worst


def guarded(make: Callable[[], Row]) -> Row:
    """Return a row, or what went wrong in the place where it would be."""
    import traceback

    try:
        return make()
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "prune2deploy" in frame.filename]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return {"error": one_line(f"{type(error).__name__}{place}: {error}", 300)}


def planted(dense: onnx.ModelProto, exporter: str) -> Iterator[tuple[str, Row]]:
    """Yield the row of every variant of one exported network."""
    from onnxscript import optimizer

    try:
        groups = find_groups(copy_of(dense))
    except Exception as error:
        for variant in VARIANTS:
            yield variant, {"error": one_line(f"find_groups: {type(error).__name__}: {error}", 300)}
        return
    by_group = copy_of(dense)
    widths = plant_groups(by_group, groups)
    yield "groups", guarded(lambda: slim_row(by_group, groups, widths)) | {"prunable": len(groups.prunable)}
    optimised = dense
    if exporter == "dynamo":
        yield "fused", guarded(lambda: slim_row(optimizer.optimize(copy_of(by_group)), None, None))
        optimised = optimizer.optimize(dense)
    plant_filters(optimised)
    yield "filters", guarded(lambda: slim_row(optimised, None, None))


def onnx_folder() -> Path:
    return Path(os.environ.get("P2D_TEST_DATA") or ROOT / ".." / "shared" / "data").resolve() / "onnx"


def measure(source: str, name: str, exporter: str) -> dict[str, Row]:
    """Return the rows of one network by variant, measured in this process."""
    short = name.partition(":")[0]
    if source == "onnx":
        model = load_model(onnx_folder() / f"{short}.onnx")
        rows = {"as it is": guarded(lambda: slim_row(copy_of(model), None, None))}
        return rows | dict(planted(model, "as it is"))
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = BUILD[source](short).eval()
    example = torch.randn(2, *input_size(source, name, module))
    randomise(module, example)
    return dict(planted(export(module, example, exporter), exporter))


# --- the table ----------------------------------------------------------------------------------------------------


def in_a_process(source: str, name: str, exporter: str, limit: float) -> dict[str, Row]:
    """Return the rows of one network, measured in a process that may die or be killed."""
    command = [sys.executable, __file__, "--child", source, name, exporter]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"all": {"error": f"took longer than {limit:.0f} s"}}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        return {"all": {"error": f"exit {done.returncode}: {one_line(done.stderr[-400:], 400)}"}}
    rows: dict[str, Row] = json.loads(lines[-1])
    return rows


@contextmanager
def document(path: Path) -> Iterator[dict[str, Row]]:
    """Give the rows on disk to be changed; several runs may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read_json(path)["rows"] if path.exists() else {}
        yield rows
        write_json(path, {"schema_version": 1, "rows": rows})
        write_bytes(path.with_suffix(".txt"), ("\n".join(table(rows)) + "\n").encode())
    finally:
        os.close(lock)


def failed(row: Row) -> bool:
    return "error" in row or row.get("verify") != "ok"


def wanted(rows: dict[str, Row], prefix: str, redo: str) -> bool:
    """Whether a network is to be measured (again)."""
    own = [row for key, row in rows.items() if key.startswith(prefix + "|")]
    if not own or redo == "all":
        return True
    if redo == "failed":
        return any(failed(row) for row in own)
    return redo == "old" and any(row["package"] != package_hash() for row in own)


def table(rows: dict[str, Row]) -> Iterator[str]:
    """Yield the table's lines: one per row, then the sums and what was opaque."""
    columns = ("network | exporter | variant", "opset", "nodes", "removed", "MACs", "params", "left", "s", "verify")
    form = "{:58} {:>5} {:>6} {:>8} {:>6} {:>6} {:>9} {:>6}  {}"
    yield form.format(*columns)
    opaque: dict[str, list[int]] = {}
    for key, row in sorted(rows.items()):
        if "error" in row:
            yield form.format(key.replace("|", " | "), *[""] * 7, "ERROR " + row["error"])
            continue
        share = [f"{after / before:.2f}" if before else "-" for before, after in (row["macs"], row["parameters"])]
        left = row.get("left", {}).get("parameters", "")
        seconds = f"{sum(row['seconds'].values()):.2f}"
        verdict = row["verify"] + (f" (an ulp in the inputs moves it by {row['noise']:.1e})" if "noise" in row else "")
        shown = (row["opset"], row["nodes"], row["removed"], *share, left, seconds, verdict)
        yield form.format(key.replace("|", " | "), *shown)
        for operator, count in row["opaque"].items():
            sums = opaque.setdefault(operator, [0, 0, 0])
            sums[0], sums[1], sums[2] = sums[0] + 1, sums[1] + count, sums[2] + row["held"].get(operator, 0)
    yield ""
    networks = {key.split("|")[0] for key in rows}
    good = sum(not failed(row) for row in rows.values())
    yield f"{len(networks)} networks, {len(rows)} rows, {good} verified, {len(rows) - good} not"
    yield ""
    yield "opaque operator            rows  nodes  constant channels held back"
    for operator, sums in sorted(opaque.items(), key=lambda item: -item[1][2]):
        yield f"{operator:24} {sums[0]:6} {sums[1]:6} {sums[2]:6}"


def run(tasks: Sequence[tuple[str, str, str]], path: Path, redo: str, limit: float) -> int:
    """Measure every network that is wanted; return how many rows failed."""
    bad = 0
    for source, name, exporter in tasks:
        prefix = f"{source}:{name.partition(':')[0]}|{exporter}"
        with document(path) as rows:
            if not wanted(rows, prefix, redo):
                continue
        start, package = time.perf_counter(), package_hash()
        made = in_a_process(source, name, exporter, limit)
        with document(path) as rows:
            for key in [key for key in rows if key.startswith(prefix + "|")]:
                del rows[key]
            for variant, row in made.items():
                rows[f"{prefix}|{variant}"] = row | {"package": package}
        bad += sum(failed(row) for row in made.values())
        shown = {variant: row.get("error") or row["verify"] for variant, row in made.items()}
        print(f"{prefix} {time.perf_counter() - start:.0f}s {shown}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Slim many architectures with planted zeros and verify each.")
    parser.add_argument("--only", help="networks whose name contains this")
    parser.add_argument("--source", choices=NETWORKS)
    parser.add_argument("--exporter", choices=("dynamo", "legacy"), default="dynamo")
    parser.add_argument("--redo", choices=("all", "failed", "old"), default="none", help="measure these rows again")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network")
    parser.add_argument("--table", action="store_true", help="only show the table")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(*given.child)))
        return 0
    if given.table:
        print("\n".join(table(read_json(given.output)["rows"])))
        return 0
    tasks = [
        (source, name, given.exporter if source != "onnx" else "as it is")
        for source in NETWORKS
        for name in names_of(source)
        if given.source in (None, source) and (given.only is None or given.only in name)
    ]
    return 1 if run(tasks, given.output, given.redo, given.limit) else 0


if __name__ == "__main__":
    sys.exit(main())
