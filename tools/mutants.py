"""Break the analysis in one place at a time, and see whether a test notices; write models/bench/mutants.json.

Usage: python tools/mutants.py [--only NAME] [--sample N] [--jobs N] [--redo] [-o FILE]

A mutant is one small patch of one file of prune2deploy/graph. It is applied to a copy of the package, and the tests of
the rules, the traps, the regressions, the laws and some random graphs run on the copy until one fails. Tests that fail
without a mutant are left out, and named. A patch that no longer fits its file is an error: mend its text here.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "models" / "bench" / "mutants.json"
GRAPH = Path("prune2deploy") / "graph"
COPIED = ("prune2deploy", "tests", "tools", "pyproject.toml")
TESTS = (
    *("tests/graph/test_survivors.py", "tests/graph/test_traps.py", "tests/graph/test_regressions.py"),
    *("tests/graph/test_liveness_keep.py", "tests/graph/test_constraints.py", "tests/graph/test_row_numbers.py"),
    *("tests/graph/test_conv_transpose.py", "tests/graph/test_drops.py", "tests/graph/test_uneven.py"),
    *("tests/graph/test_shuffle.py", "tests/graph/test_quantized_models.py"),
    *("tests/graph/rules", "tests/graph/test_property.py"),
)
"""What every mutant is held against; its own tests come first."""


@dataclass(frozen=True)
class Mutant:
    """One place to break: ``old`` occurs exactly once in the file, ``new`` takes its place."""

    name: str
    file: str
    old: str
    new: str
    first: str = ""
    """The test file that should notice, run first."""


def _of(file: str, first: str, *rows: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, old, new, first) for name, old, new in rows]


RULE_TESTS = "tests/graph/rules/test_{}.py"
MUTANTS: list[Mutant] = [
    *_of(
        "rules/matrix.py",
        RULE_TESTS.format("linear"),
        (
            "a constant input is not folded into the bias",
            "    bias = matrix.bias[rows.kept] + constant_part(kept_rows, offset)\n",
            "    bias = matrix.bias[rows.kept]\n",
        ),
        (
            "zero padding does not hold an offset back",
            "    bound = (ratio != 0) & (padded | (np.abs(ratio) > FAR))",
            "    bound = (ratio != 0) & (np.abs(ratio) > FAR)",
        ),
        (
            "a constant under padding counts as no column",
            "    weight = np.where(constant & padded, shift, scale)\n    offset = np.where(bound | padded, 0.0, shift)",
            "    weight = scale\n    offset = np.where(bound, 0.0, shift)",
        ),
        (
            "an alias is not added to its representative",
            "        added[r] = added.get(r, 0.0) + ratio * kept_rows[:, k].astype(np.float64)\n",
            "",
        ),
        (
            "an alias is added without its multiple",
            "        ratio = cols.weight[k] / cols.weight[r]\n",
            "        ratio = 1.0\n",
        ),
        (
            "the offset of a representative is counted twice",
            "        offset[k] -= ratio * cols.offset[r]\n",
            "",
        ),
        (
            "rows that read the same inputs with other weights are equal",
            "hashlib.sha256(classes.key[order].tobytes() + shape.tobytes())",
            "hashlib.sha256(classes.key[order].tobytes())",
        ),
        (
            "equal columns are not added up before a row is called constant",
            "        merged[:, shared] = total\n",
            "",
        ),
        (
            "the constant of a row leaves out its bias",
            "    shift = matrix.bias + constant_part(matrix.weight, cols.offset)\n",
            "    shift = constant_part(matrix.weight, cols.offset)\n",
        ),
        (
            "a dead row keeps its bias",
            "    bias[idle] = np.where(reads.constant, reads.shift, 0.0)[rows.kept][idle]\n",
            "",
        ),
    ),
    *_of(
        "rules/linear.py",
        RULE_TESTS.format("linear"),
        (
            "a convolution ignores its padding",
            "        padded=_is_padded(node, weight.shape[2:]),\n",
            "        padded=False,\n",
        ),
        (
            "auto_pad SAME pads nothing",
            '    return bool(auto_pad != "VALID" and max(kernel) > 1)',
            "    return False",
        ),
        (
            "auto_pad SAME pads a kernel of one tap",
            '    return bool(auto_pad != "VALID" and max(kernel) > 1)',
            '    return bool(auto_pad != "VALID")',
        ),
        (
            "strides are no part of a convolution's key",
            '    keys = ("strides", "dilations", "pads", "auto_pad")\n',
            '    keys = ("dilations", "pads", "auto_pad")\n',
        ),
        (
            "a transposed convolution takes a constant for a constant",
            "        padded=not plain,\n",
            "        padded=False,\n",
        ),
        (
            "the groups of a transposed convolution are one",
            "    by_group = weight.reshape(groups, inputs // groups, height, taps).transpose(0, 2, 1, 3)\n    plain",
            "    by_group = weight.reshape(groups, height, inputs // groups, taps)\n    plain",
        ),
        (
            "a Gemm forgets alpha",
            "    scaled = weight if alpha == 1 else (weight * alpha).astype(weight.dtype)\n",
            "    scaled = weight\n",
        ),
        (
            "a Gemm forgets beta",
            'spread.astype(np.float64).ravel() * node.attribute("beta", 1.0)',
            "spread.astype(np.float64).ravel()",
        ),
        (
            "transB is taken for its opposite",
            "    weight = matrix if turned[1 - slot] != (slot == 1) else matrix.T\n",
            "    weight = matrix if turned[1 - slot] == (slot == 1) else matrix.T\n",
        ),
        (
            "a MatMul does not add what constants bring",
            '        edit.after("Add", {}, new if along_last else new[:, None])\n',
            "        pass\n",
        ),
    ),
    *_of(
        "rules/layer.py",
        RULE_TESTS.format("linear"),
        (
            "a depthwise convolution does not tie its channels",
            "            yield Equal(out, into)\n",
            "            pass\n",
        ),
        (
            "a grouped convolution may keep other numbers in each group",
            "            yield Count((into.reshape(linear.groups, -1), out.reshape(linear.groups, -1)))\n",
            "            pass\n",
        ),
        (
            "what a layer takes as space may shrink",
            "                yield freeze(positions.ids(operand.name, axis))\n        if linear.groups == 1:",
            "                pass\n        if linear.groups == 1:",
        ),
        (
            "weights that are not finite are covered",
            "        if not (_finite(linear.weight) and np.isfinite(linear.bias).all()):\n",
            "        if False:\n",
        ),
        (
            "a depthwise row's key forgets its weights",
            "view.numbers.scaled((mark, int(own.key[row]), shape.tobytes()), length)",
            "view.numbers.scaled((mark, int(own.key[row])), length)",
        ),
        (
            "a dead depthwise channel keeps its bias",
            "    bias = np.where(idle, np.where(constant, state.shift, 0.0), linear.bias)\n",
            "    bias = linear.bias.copy()\n",
        ),
    ),
    *_of(
        "rules/channelwise.py",
        RULE_TESTS.format("channelwise"),
        (
            "a norm forgets epsilon",
            '    factor = scale / np.sqrt(var + node.attribute("epsilon", 1e-5))\n',
            "    factor = scale / np.sqrt(var)\n",
        ),
        (
            "a norm forgets its mean",
            "    offset = shift - mean * factor\n",
            "    offset = shift\n",
        ),
        (
            "a norm's scale does not pass on a shift",
            "    return [make(fact.number, fact.scale * factor, fact.shift * factor + offset)]\n",
            "    return [make(fact.number, fact.scale * factor, fact.shift + offset)]\n",
        ),
        (
            "a norm drops all of its vectors but the variance",
            "    for slot in (1, 2, 3, 4):\n        array = node.inputs[slot].array\n        assert array is not None\n"
            "        edit.set_constant",
            "    for slot in (1, 2, 3):\n        array = node.inputs[slot].array\n        assert array is not None\n"
            "        edit.set_constant",
        ),
        (
            "Dropout in training mode is the identity",
            " or (node.input(2) is not None and (mode is None or mode.any())):",
            ":",
        ),
    ),
    *_of(
        "rules/activation.py",
        RULE_TESTS.format("activation"),
        (
            "LeakyRelu passes negative scales",
            "    return Function(lambda x: np.where(x < 0, alpha * x, x), degree=1)\n",
            "    return Function(lambda x: np.where(x < 0, alpha * x, x), degree=1, parity='odd')\n",
        ),
        (
            "Clip is evaluated without bounds",
            "    return Function(lambda x: np.minimum(np.maximum(x, low), high), degree=1 if scaled else None)\n",
            "    return Function(lambda x: x, degree=1 if scaled else None)\n",
        ),
        (
            "Clip passes scales whatever its bounds",
            "degree=1 if scaled else None)\n",
            "degree=1)\n",
        ),
        (
            "Sigmoid of 0 is 0",
            '    "Sigmoid": _plain(special.expit),\n',
            '    "Sigmoid": _plain(np.tanh),\n',
        ),
        (
            "Relu is odd",
            '    "Relu": _plain(lambda x: np.maximum(x, 0.0), degree=1),\n',
            '    "Relu": _plain(lambda x: np.maximum(x, 0.0), degree=1, parity="odd"),\n',
        ),
        (
            "attributes are no part of an activation's key",
            "    signature = (node.op_type, str(sorted(node.attributes.items())), constants, node.outputs[0].dtype)\n",
            "    signature = (node.op_type, constants, node.outputs[0].dtype)\n",
        ),
        (
            "a scale passes with a shift",
            "    passes = ~fact.constant & (fact.shift == 0) & np.isfinite(outer) & (outer != 0)\n",
            "    passes = ~fact.constant & np.isfinite(outer) & (outer != 0)\n",
        ),
        (
            "constants near a jump are sure",
            "                sure &= ~(np.abs(moved - value) > 4 * by)\n",
            "                pass\n",
        ),
        (
            "Cast rounds to the nearest integer",
            "    return Function(np.trunc, steps=source in FLOATS)\n",
            "    return Function(np.rint, steps=source in FLOATS)\n",
        ),
        (
            "HardSwish is linear beyond 6 halves",
            "lambda x: x * np.clip(x / 6 + 0.5, 0, 1)",
            "lambda x: x * np.clip(x / 3 + 0.5, 0, 1)",
        ),
    ),
    *_of(
        "rules/combine.py",
        RULE_TESTS.format("elementwise"),
        (
            "a product of shifted functions passes its scales",
            "    plain = (a.shift == 0) & (b.shift == 0) & _usable(factor)\n    keys",
            "    plain = _usable(factor)\n    keys",
        ),
        (
            "a constant factor forgets the shift",
            "    single = make(other.number, held * other.scale, held * other.shift)\n",
            "    single = make(other.number, held * other.scale, other.shift)\n",
        ),
        (
            "PRelu passes negative scales",
            "    keyed = Fact(x.number, np.where(plain, np.sign(x.scale), x.scale), x.shift)\n",
            "    keyed = Fact(x.number, np.where(plain, 1.0, x.scale), x.shift)\n",
        ),
        (
            "PRelu's slopes are no part of its key",
            '    number = view.numbers.of_facts(("slope",), keyed, slopes)\n',
            '    number = view.numbers.of_facts(("slope",), keyed)\n',
        ),
        (
            "a quotient is commutative",
            "    by_constant = make(a.number, a.scale / divisor, a.shift / divisor)\n",
            "    by_constant = make(a.number, a.scale * divisor, a.shift * divisor)\n",
        ),
        (
            "Where takes its other side",
            "    return _chosen(known, _chosen(condition.shift != 0, yes, no), found)\n",
            "    return _chosen(known, _chosen(condition.shift != 0, no, yes), found)\n",
        ),
        (
            "a side of Where that is taken does not matter",
            "        ~(condition.constant & (condition.shift == 0)),\n",
            "        ~condition.constant,\n",
        ),
    ),
    *_of(
        "rules/elementwise.py",
        RULE_TESTS.format("elementwise"),
        (
            "the operands of an elementwise operator are not tied",
            "    return Rule(facts, live, _ties, drop, operator.kind",
            "    return Rule(facts, live, lambda *_: [], drop, operator.kind",
        ),
        (
            "both zero factors of a product may go",
            "    return [own | ~decided for own in found]\n",
            "    return [~decided for own in found]\n",
        ),
        (
            "a cut operand is replaced by 0",
            "            values = np.where(fact.constant, fact.shift, filler)\n",
            "            values = np.zeros(fact.shape)\n",
        ),
        (
            "0 less an integer is that integer",
            "            if any(i < operator.neutral_from for i in others):\n                continue\n",
            "",
        ),
    ),
    *_of(
        "rules/align.py",
        RULE_TESTS.format("elementwise"),
        (
            "operands of lower rank are aligned in front",
            "    return fact.map(lambda array: array.reshape((1,) * start + array.shape))\n",
            "    return fact.map(lambda array: array.reshape(array.shape + (1,) * start))\n",
        ),
        (
            "a broadcast operand keeps its numbers",
            "            fact = _broadcast(fact, tuple(shapes[slot][axis] for axis in axes), domain, view)\n",
            "            pass\n",
        ),
        (
            "a constant map is taken for its first element",
            "    found = make(number, np.where(uniform, 0.0, 1.0), np.where(uniform, first, 0.0))\n",
            "    found = make(number, np.zeros(first.shape), first)\n",
        ),
    ),
    *_of(
        "rules/pool.py",
        RULE_TESTS.format("pool"),
        (
            "an average that counts its padding has no border",
            '    border = bool(_padded(node) and node.attribute("count_include_pad", 0))\n',
            "    border = False\n",
        ),
        (
            "a MaxPool without positions ties nothing",
            "        if not positions.has(output.name):\n",
            "        if all(positions.ids(output.name, axis) is None for axis in axes):\n",
        ),
        (
            "MaxPool passes negative scales",
            "    keyed = Fact(fact.number, np.where(fact.scale < 0, -1.0, 1.0), fact.shift)",
            "    keyed = Fact(fact.number, np.ones(fact.shape), fact.shift)",
        ),
        (
            "attributes are no part of a pool's key",
            "(node.op_type, sorted(node.attributes.items(), key=lambda item: item[0]), node.inputs[0].shape)",
            "(node.op_type, node.inputs[0].shape)",
        ),
    ),
    *_of(
        "rules/concat.py",
        RULE_TESTS.format("concat"),
        (
            "every input of a Concat starts at 0",
            "            start += size\n",
            "",
        ),
        (
            "a Concat along another axis does not tie its inputs",
            "            if other != axis:\n                yield from tie_axes",
            "            if False:\n                yield from tie_axes",
        ),
        (
            "a Concat of constants takes the first",
            "    same = np.logical_and.reduce([fact.constant & (fact.shift == facts[0].shift) for fact in facts])\n",
            "    same = np.logical_and.reduce([fact.constant for fact in facts])\n",
        ),
        (
            "a constant input of a Concat stays whole",
            "        if kept is not None and len(kept) < array.shape[other]:\n",
            "        if False:\n",
        ),
    ),
    *_of(
        "rules/split.py",
        RULE_TESTS.format("split"),
        (
            "an uneven Split is even",
            "    return [min(part, total - part * slot) for slot in range(count)]\n",
            "    return [part for slot in range(count)]\n",
        ),
        (
            "the sizes of a Split stay",
            "        _write_sizes(node, edit, [len(parts[slot]) for slot in stay], sizes)\n",
            "        pass\n",
        ),
        (
            "a Split does not keep the source of its outputs",
            "            yield freeze(source) if out is None else Implies(out, source)\n",
            "            pass\n",
        ),
    ),
    *_of(
        "rules/select.py",
        RULE_TESTS.format("select"),
        (
            "a Slice goes forward only",
            "        return np.arange(size)[start::step]\n    return np.arange(size)[start:end:step]\n",
            "        return np.arange(size)[start::step]\n    return np.arange(size)[start:end]\n",
        ),
        (
            "a Slice is written with its first step",
            "        ranges[axis] = (int(places[0]), int(places[-1]) + 1, int(steps[0]) if len(steps) else 1)\n",
            "        ranges[axis] = (int(places[0]), int(places[-1]) + 1, 1)\n",
        ),
        (
            "negative indices of a Gather count from the front",
            "np.where(given < 0, given + size, given).astype(np.int64)",
            "np.abs(given).astype(np.int64)",
        ),
        (
            "padding with a constant has no border",
            "        return linear_window(fact, signature, border=True, view=view)\n    kept",
            "        return linear_window(fact, signature, border=False, view=view)\n    kept",
        ),
        (
            "padding keeps every constant",
            "    kept = fact.constant & (fact.shift == fill)\n",
            "    kept = fact.constant\n",
        ),
        (
            "padded channels stay as many behind as before",
            "        amounts[place], amounts[len(axes) + place] = inside[0], len(sources) - 1 - inside[-1]\n",
            "        amounts[place] = inside[0]\n",
        ),
    ),
    *_of(
        "rules/axes.py",
        RULE_TESTS.format("axes"),
        (
            "a Transpose of collapsed axes keeps its numbers",
            "        if collapsed != sorted(collapsed):",
            "        if False:",
        ),
        (
            "a Squeeze without axes takes whatever is 1 by then",
            "SQUEEZE = renaming_rule(_squeeze_axes, _drop_squeeze)\n",
            "SQUEEZE = renaming_rule(_squeeze_axes)\n",
        ),
    ),
    *_of(
        "rules/reshape.py",
        RULE_TESTS.format("reshape"),
        (
            "a Reshape keeps no rectangle",
            "            yield Hull(sides)\n",
            "            pass\n",
        ),
        (
            "the target of a Reshape stays",
            "            sizes[axis] = len(indices)\n",
            "            pass\n",
        ),
        ("heads are not tied", "            yield Equal(own, other)\n", "            yield from ()\n"),
        (
            "heads that were in the batch are all alike",
            "    fact = expand(fact, 0, heads.out, (heads.out, heads.each, *sizes), view.numbers)\n",
            "    fact = fact.map(lambda array: np.repeat(array, heads.out, axis=0))\n",
        ),
        (
            "the first head stands for all",
            "    fact = collapse(fact, 0, (heads.into, heads.each, *sizes), view.numbers)\n",
            "    fact = fact.map(lambda array: array[:1])\n",
        ),
        (
            "what one head reads is not read of the others",
            "            mask = np.broadcast_to(wanted, (heads.into, *wanted.shape))\n",
            "            mask = np.stack([wanted, *[wanted & False] * (heads.into - 1)])\n",
        ),
    ),
    *_of(
        "rules/norm.py",
        RULE_TESTS.format("norm"),
        (
            "a norm ties nothing",
            "        return mixing_ties(node, positions, view, norm.axes)\n",
            "        return []\n",
        ),
        (
            "a norm needs only the positions that are read",
            "        return {0: Demand(spread(mask, expanded_among(fact, norm.axes), fact.shape))}\n",
            "        return {0: Demand(mask)}\n",
        ),
        (
            "a constant stays one behind a norm",
            "    zero = fact.constant & (fact.shift == 0)\n    whole",
            "    zero = fact.constant\n    whole",
        ),
        (
            "the number of groups of a norm stays",
            '        edit.set_attribute("num_groups", len(kept) // each)\n',
            "        pass\n",
        ),
    ),
    *_of(
        "rules/mixing.py",
        RULE_TESTS.format("mixing"),
        (
            "a softmax needs only the positions that are read",
            "        return {0: Demand(spread(outs[0], expanded_among(fact, _softmax_axes(node)), fact.shape))}\n",
            "        return {0: Demand(outs[0])}\n",
        ),
        (
            "a sum along a map keeps its constants",
            "        return [linear_window(fact, mark, border=True, view=view)]\n",
            "        return [linear_window(fact, mark, border=False, view=view)]\n",
        ),
    ),
    *_of(
        "rules/reduce.py",
        RULE_TESTS.format("reduce"),
        (
            "a sum over space is a mean",
            "SUM = Reduction(lambda c, n: c.sum(axis=-1) * n, _linear,",
            "SUM = Reduction(lambda c, n: c.sum(axis=-1), lambda fact, n: _linear(fact, 1),",
        ),
        (
            "a mean over channels forgets how many were left out",
            '    return [("Mul", np.full(rest.shape, share)), ("Add", rest)]\n',
            '    return [("Add", rest)]\n',
        ),
        (
            "a sum over channels does not get its constants back",
            '    return lambda c, count, share: [("Add", of(c).sum(axis=-1) * count)]\n',
            "    return lambda c, count, share: []\n",
        ),
        (
            "a square passes a scale as it is",
            "        scale = np.abs(fact.scale) ** degree\n",
            "        scale = np.abs(fact.scale)\n",
        ),
    ),
    *_of(
        "rules/depth.py",
        RULE_TESTS.format("depth"),
        (
            "DepthToSpace orders its phases as CRD always",
            '    if node.op_type == "DepthToSpace" and node.attribute("mode", "DCR") == "CRD":\n',
            '    if node.op_type == "DepthToSpace":\n',
        ),
        (
            "unequal phases make a constant",
            "[phase.constant & (phase.shift == phases[0].shift) for phase in phases]",
            "[phase.constant for phase in phases]",
        ),
        (
            "the phases of a channel are not tied",
            "        yield Equal(few, many[phase])\n",
            "        pass\n",
        ),
    ),
    *_of(
        "rules/resize.py",
        RULE_TESTS.format("resize"),
        (
            "the sizes of a Resize stay",
            "        edit.set_constant(3, given.sizes.array + change)\n",
            "        pass\n",
        ),
        (
            "a crop keeps every constant",
            "    kept = fact.constant & (fact.shift == outside)\n",
            "    kept = fact.constant\n",
        ),
    ),
    *_of(
        "rules/repeat.py",
        RULE_TESTS.format("repeat"),
        (
            "the repeats of a Tile stay",
            "        new.ravel()[axis] = times\n",
            "        pass\n",
        ),
        (
            "the shape of an Expand stays",
            "            new.ravel()[place] = len(kept)\n",
            "            pass\n",
        ),
    ),
    *_of(
        "rules/quantized.py",
        RULE_TESTS.format("quantized"),
        (
            "a zero point is added with the wrong sign",
            "    value = ((fact.shift - by.shift).astype(kind) * by.scale.astype(kind)).astype(np.float64)\n",
            "    value = ((fact.shift + by.shift).astype(kind) * by.scale.astype(kind)).astype(np.float64)\n",
        ),
        (
            "the scales of channels stay",
            "            edit.set_constant(part.slot, array[kept])\n",
            "            pass\n",
        ),
        (
            "the range of a dynamic quantisation needs only live channels",
            "    return {0: Demand(reads if outs[0] is None else reads | outs[0])}\n",
            "    return {0: Demand(np.zeros_like(reads) if outs[0] is None else outs[0])}\n",
        ),
    ),
    *_of(
        "fact.py",
        "tests/graph/test_traps.py",
        (
            "an expanded map has one number for all places",
            "(mark_number, number, i)",
            "(mark_number, number, 0)",
        ),
        (
            "a collapsed axis takes its first constant",
            "    same = (rows[1] == 0).all(1) & (rows[2] == rows[2][:, :1]).all(1)\n",
            "    same = (rows[1] == 0).all(1)\n",
        ),
    ),
    *_of(
        "liveness.py",
        "tests/graph/test_liveness_keep.py",
        (
            "the outputs of the graph are not live",
            "            whole = np.ones(facts[operand.name].shape, dtype=bool)\n",
            "            whole = np.zeros(facts[operand.name].shape, dtype=bool)\n",
        ),
        (
            "what a subgraph captures is not live",
            "                everything = Demand(np.ones(facts[name].shape, dtype=bool))\n",
            "                everything = Demand(np.zeros(facts[name].shape, dtype=bool))\n",
        ),
        (
            "no alias stands for its class",
            "            if not alive.flat[strong].any():\n",
            "            if False:\n",
        ),
        (
            "a reader that sees less takes all of equal channels",
            "        alive = ~fit_mask(~live, demand.live.shape) if demand.choices else live\n",
            "        alive = ~fit_mask(~live, demand.live.shape) if demand.choices else live\n"
            "        if demand.choices and demand.live.shape != layout:\n            live[...] = True\n",
        ),
        (
            "a channel that is live in one cell stands for its class",
            "~fit_mask(~live, demand.live.shape)",
            "fit_mask(live, demand.live.shape)",
        ),
    ),
    *_of(
        "keep.py",
        "tests/graph/test_liveness_keep.py",
        (
            "an axis may shrink to nothing",
            "        yield -1, Count((np.arange(first, first + size)[None],), always=True)  # no axis shrinks to 0\n",
            "        pass\n",
        ),
        (
            "rounding is ignored",
            "    return [] if ids is None else [Count((ids[None],), multiple=round_to, least=round_to, always=True)]\n",
            "    return []\n",
        ),
    ),
    *_of(
        "constraints.py",
        "tests/graph/test_constraints.py",
        (
            "a rectangle keeps its rows only",
            "                found.append(axis[box.any(axis=others)])\n",
            "                found.append(axis[box.all(axis=others)])\n",
        ),
        (
            "an active row need not have as many as the others",
            "            want = max(int(counts.max(initial=0)), self.least)\n",
            "            want = self.least\n",
        ),
        (
            "constraints are worked once",
            "                if not queued[other]:\n",
            "                if False:\n",
        ),
    ),
    *_of(
        "rewrite.py",
        "tests/graph/test_regressions.py",
        (
            "a shared constant takes the first version for all",
            "            if known.dtype == array.dtype and np.array_equal(known, array):\n",
            "            if known.dtype == array.dtype and known.shape == array.shape:\n",
        ),
    ),
    *_of(
        "rewrite.py",
        "tests/graph/test_uneven.py",
        (
            "the first group's columns are told for all",
            "    return groups[0] if all(group == groups[0] for group in groups) else groups\n",
            "    return groups[0]\n",
        ),
    ),
    *_of(
        "sizes.py",
        "tests/graph/test_open_sizes.py",
        (
            "a quotient may leave a rest",
            "    if not number or not divisor or number % divisor or own - names:\n",
            "    if not number or not divisor or own - names:\n",
        ),
        (
            "names need not cancel",
            "    if not number or not divisor or number % divisor or own - names:\n",
            "    if not number or not divisor or number % divisor:\n",
        ),
    ),
    *_of(
        "open_sizes.py",
        "tests/graph/test_open_sizes.py",
        (
            "sizes that a Resize is given are not looked at",
            '    "Resize": _resized,\n',
            "",
        ),
        (
            "a factor of 1 leaves no size as it is",
            "[size if scale == 1 else None for",
            "[None for",
        ),
        (
            "any factor leaves a size as it is",
            "[size if scale == 1 else None for",
            "[size for",
        ),
        ("a Range counts nothing", '    "Range": _counted,\n', ""),
        ("an Expand says nothing of its size", '    "Expand": _expanded,\n', ""),
        ("a ConstantOfShape says nothing of its size", '    "ConstantOfShape": _filled,\n', ""),
        (
            "what is left of a Reshape is not named",
            "    return [found if axis == opened[0] else size for axis, size in enumerate(output)]\n",
            "    return output\n",
        ),
    ),
    *_of(
        "shapes.py",
        "tests/graph/test_open_sizes.py",
        (
            "any rows that are written are all rows",
            "== [[0], [size], [1]]",
            "!= []",
        ),
    ),
    *_of(
        "infer.py",
        RULE_TESTS.format("pool"),
        (
            "a window that starts in the padding is counted",
            "        count, fewer = count - behind, fewer or behind\n",
            "",
        ),
        (
            "pools are counted by sizes that others have changed",
            "not any(floored(node, shapes.get(node.input[0])) for node in pools)",
            "not any([floored(node, shapes.get(node.input[0])) for node in pools])",
        ),
        ("a pool that is an output has no size", "*graph.input, *graph.output)", "*graph.input)"),
    ),
    *_of(
        "normal.py",
        "tests/graph/test_model.py",
        (
            "constants of small types are written as others",
            "        if read and str(tensor.dtype)",
            "        if str(0)",
        ),
    ),
    *_of(
        "strided.py",
        "tests/graph/test_open_sizes.py",
        ("elements that are read by stride need no order", "(read.ravel() == np.arange(whole)).all()", "True"),
        ("any stride is that of the batch", "places[0] != whole or ", ""),
        ("elements that are read by stride stay apart", "            redirect(output, source)\n", ""),
    ),
    *_of(
        "windows.py",
        "tests/graph/test_open_sizes.py",
        (
            "windows stay apart",
            '        turn.attrs["perm"] = [0, *(axis - count for axis in turn.attrs["perm"][count + 1 :])]\n',
            "",
        ),
    ),
    *_of(
        "rules/base.py",
        RULE_TESTS.format("elementwise"),
        (
            "a constant operand is not sliced",
            "        if kept is not None and size > 1:\n            array = np.take(array, kept, axis=axis)\n",
            "        pass\n",
        ),
    ),
    *_of(
        "rules/layer.py",
        "tests/graph/test_cells.py",
        (
            "a column that is live in one cell is read in all",
            "live_mask.all(axis=axes)",
            "live_mask.any(axis=axes)",
        ),
    ),
    *_of(
        "rules/reduce.py",
        "tests/graph/test_cells.py",
        (
            "an index that is live in one cell is reduced in all",
            "np.asarray(read.all(",
            "np.asarray(mask.any(",
        ),
    ),
    *_of(
        "keep.py",
        "tests/graph/test_cells.py",
        ("a range may read anything", '    "DynamicQuantizeLinear": (0,),\n', ""),
        ("a norm without epsilon may divide zero by zero", '(0,) if node.attribute("epsilon") == 0 else ', ""),
    ),
    *_of(
        "rules/activation.py",
        "tests/graph/test_cells.py",
        ("every Shrink is odd", 'parity="odd" if edge >= 0 else None', 'parity="odd"'),
    ),
    *_of(
        "rules/select.py",
        "tests/graph/test_open_sizes.py",
        (
            "a shuffle of space remembers its sizes",
            "        edit.set_attribute(SHUFFLE, None)  # of sizes that its shapes do not hold\n",
            "        pass\n",
        ),
    ),
    *_of(
        "rules/repeat.py",
        RULE_TESTS.format("repeat"),
        (
            "sizes that are computed hold none",
            "        yield freeze(positions.ids(node.outputs[0].name, axis))  # the computed sizes may hold its size\n",
            "        yield from ()\n",
        ),
        ("a constant that is tiled is alike", "if (values == first).all():", "if True:"),
        ("every constant of a computed size is zero", "np.asarray(value.values).reshape(())", "np.zeros(())"),
        (
            "a constant of a computed size needs no sizes",
            "    return {slot: everything(node.inputs[slot], view) for slot in node.value_slots}\n",
            "    return {}\n",
        ),
    ),
    *_of(
        "pads.py",
        "tests/graph/test_pads.py",
        ("a border takes the place of a pool's own padding", "int(amount) + int(more) for", "int(more) for"),
        ("any constant border is padding", " or np.ravel(value).tolist() != [-np.inf]", ""),
        ("a border may be wider than a window", "if all(amount < size", "if all(amount < 2 * size"),
        ("a border of channels is one of space", "border[:, :2].any()", "False"),
        ("a pool may step over its border", ' or max(pool.attrs.get("dilations") or [1]) > 1', ""),
        ("places are counted without the border", " or any(tensor.name for tensor in pool.outputs[1:])", ""),
    ),
    *_of(
        "permutation.py",
        "tests/graph/test_shuffle.py",
        ("a folded shuffle turns no bias", '"Conv": {1: 0, 2: 0}', '"Conv": {1: 0}'),
        ("a folded shuffle turns no BatchNormalization", '    "BatchNormalization": {1: 0, 2: 0, 3: 0, 4: 0},\n', ""),
        (
            "a transposed convolution is turned as a plain one",
            'READ = {"Conv": 1, "ConvTranspose": 0}',
            'READ = {"Conv": 1, "ConvTranspose": 1}',
        ),
        ("the inputs of a convolution are turned the wrong way", "            order = np.argsort(order)\n", ""),
        (
            "a shuffle is folded before another reader",
            "len(source.outputs) == 1 and len(source.inputs)",
            "len(source.inputs)",
        ),
        ("a shuffle is folded into a grouped convolution", ' and node.attrs.get("group", 1) == 1', ""),
        ("any reader of a shuffle carries it", "not (carries or _is_plain(node))", "False"),
        (
            "the order of a shuffle folded twice is the last one",
            "orders[name] = orders[name][order] if name in orders else order",
            "orders[name] = order",
        ),
    ),
    *_of(
        "names.py",
        "tests/graph/test_regressions.py",
        ("new names may be taken already", "    while name in taken:\n", "    while False:\n"),
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that killed it, ``survived``, or why it could not be applied."""

    killed_by: str = ""
    status: str = "killed"
    seconds: float = 0.0


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
        else:
            shutil.copy(source, target / name)


def pytest(folder: Path, tests: list[str], *options: str) -> str:
    """Run tests in a copy and return what pytest says."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.setdefault("P2D_TEST_DATA", str((ROOT / ".." / "shared" / "data").resolve()))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "--tb=no"]
    done = subprocess.run(
        [*command, *options, *tests], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def failures(shown: str) -> list[str]:
    """Return the ids of tests that failed or could not be collected."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::[^\n]+?)?)(?: - .*)?$", shown, flags=re.MULTILINE)


def apply(mutant: Mutant, folder: Path) -> str | None:
    """Patch the copy; return why the patch does not fit, or None."""
    path = folder / GRAPH / mutant.file
    if not path.is_file():
        return "its file is gone"
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"its text occurs {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    return None


def outcome(mutant: Mutant, already: list[str]) -> Outcome:
    """Apply a mutant to a copy of its own and run tests until one fails that passes without it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        why = apply(mutant, folder)
        if why is not None:
            return Outcome(status=why)
        deselected = [option for test in already for option in ("--deselect", test)]
        first = [mutant.first] if mutant.first and (folder / mutant.first).is_file() else []
        for tests in (first, list(TESTS)):
            found = failures(pytest(folder, tests, "-x", *deselected)) if tests else []
            if found:
                return Outcome(found[0], "killed", round(time.perf_counter() - start, 1))
    return Outcome(status="survived", seconds=round(time.perf_counter() - start, 1))


def baseline() -> list[str]:
    """Return the tests that fail without any mutant."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        return failures(pytest(folder, list(TESTS)))


def spread(mutants: list[Mutant], count: int) -> list[Mutant]:
    """Return about so many mutants, from all files."""
    return mutants[:: max(1, len(mutants) // count)][:count]


def run(mutants: list[Mutant], path: Path, jobs: int, redo: bool) -> Iterator[tuple[Mutant, Outcome]]:
    """Yield every mutant's outcome, writing the document after each; survivors and misfits come again each time."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    done: dict[str, dict[str, object]] = known.get("mutants", {})
    again = [mutant for mutant in mutants if redo or done.get(mutant.name, {}).get("status") != "killed"]
    already = baseline() if again else []
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, found in zip(again, pool.map(lambda mutant: outcome(mutant, already), again), strict=True):
            done[mutant.name] = {"file": mutant.file, **vars(found)}
            document = {"schema_version": 1, "failing_without_mutants": already, "mutants": done}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
            yield mutant, found


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the analysis in one place at a time; a test should notice.")
    parser.add_argument("--only", default="", help="mutants whose name or file contains this")
    parser.add_argument("--sample", type=int, help="about so many of them, from all files")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--redo", action="store_true", help="run those too that are known to be killed")
    parser.add_argument("--check", action="store_true", help="only see whether every patch fits its file")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if given.only in mutant.name or given.only in mutant.file]
    if given.check:
        counts = {mutant.name: (ROOT / GRAPH / mutant.file).read_text().count(mutant.old) for mutant in chosen}
        wrong = {name: count for name, count in counts.items() if count != 1}
        print("\n".join(f"{name}: its text occurs {count} times" for name, count in wrong.items()) or "all fit")
        return 1 if wrong else 0
    chosen = spread(chosen, given.sample) if given.sample else chosen
    bad = 0
    for mutant, found in run(chosen, given.output, given.jobs, given.redo):
        bad += found.status != "killed"
        print(f"{found.status:9} {found.seconds:6.1f}s  {mutant.file}: {mutant.name}  {found.killed_by}", flush=True)
    print(f"{len(chosen)} mutants, {bad} not killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
