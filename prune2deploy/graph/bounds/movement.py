"""Bounds of the operators that move values: the operator itself on the layout, with collapsed axes kept collapsed.

Movement commutes with subtraction, so the difference moves as the values do. Where positions are taken more than once,
or elements of a collapsed axis are mixed, the hull stands in for them.
"""

from __future__ import annotations

import math
from functools import partial, reduce

import numpy as np

from prune2deploy.graph.bounds.interval import Array, Function, Interval, interval, point
from prune2deploy.graph.bounds.ranges import Ranges, collapsed, either, expanded, ranges, to_rank, unchanged
from prune2deploy.graph.bounds.step import BoundRule, Found, Step, axis_of, size_of
from prune2deploy.graph.fact import Shape
from prune2deploy.graph.rules.reshape import blocks


def moved(x: Ranges, move: Function) -> Ranges:
    """Return the ranges after a movement of layouts that takes every position at most once."""
    return x.each(lambda part: part.map(move))


def repeated(x: Ranges, move: Function) -> Ranges:
    """Return the ranges after a movement that may take a position several times: the norm follows from the ends."""
    return x.each(lambda part: interval(move(part.lo), move(part.hi)))


def identity(step: Step) -> Found:
    """Return the ranges of what passes its first input on."""
    return [step.ranges(0)]


def dropout(step: Step) -> Found:
    """Return the ranges of a Dropout at inference; its mask is not covered."""
    mode = step.node.constant(2)
    if len(step.node.outputs) > 1 or (step.has(2) and (mode is None or mode.any())):
        return None
    return [step.ranges(0)]


def transpose(step: Step) -> Found:
    """Return the ranges of a Transpose."""
    x = step.ranges(0)
    order = step.node.attribute("perm", list(reversed(range(len(x.shape)))))
    return [moved(x, lambda a: a.transpose(order))]


def squeeze(step: Step) -> Found:
    """Return the ranges of a Squeeze; axes that are not named must be known to be of size 1."""
    x, shape = step.ranges(0), step.shape()
    axes = step.integers(1, "axes")
    if axes is None:
        if step.has(1) or shape is None or any(not isinstance(size, int) for size in shape):
            return None
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    taken = tuple(axis % len(x.shape) for axis in axes)
    return [moved(x, lambda a: a.squeeze(axis=taken))]


def unsqueeze(step: Step) -> Found:
    """Return the ranges of an Unsqueeze."""
    axes = step.integers(1, "axes")
    if axes is None:
        return None
    rank = len(step.ranges(0).shape) + len(axes)
    added = tuple(axis % rank for axis in axes)
    return [moved(step.ranges(0), lambda a: np.expand_dims(a, added))]


def _opened(before: Shape, after: Shape) -> Shape:
    """Return the second shape with its one open size named as the first's, where it can be nothing else."""
    opens = [[size for size in shape if not isinstance(size, int)] for shape in (before, after)]
    rests = [int(np.prod([size for size in shape if isinstance(size, int)])) for shape in (before, after)]
    if len(opens[0]) == len(opens[1]) == 1 and rests[0] == rests[1] > 0:
        return tuple(size if isinstance(size, int) else opens[0][0] or "?" for size in after)
    return after


def reshape(step: Step) -> Found:
    """Return the ranges of a Reshape or Flatten: blocks of axes whose sizes multiply alike move on their own.

    Without them, the hull of all elements holds for every element.
    """
    x, before, after = step.ranges(0), step.shape(), step.output.shape
    if after is None:
        return None
    if before is None or len(before) != len(x.shape):
        return [_to_scalar(x, len(after))]
    named = _opened(before, after)
    if named is not after:
        before = tuple(size if isinstance(size, int) else size or "?" for size in before)
    found = blocks(before, named)
    if found is None:
        return [_to_scalar(x, len(after))]
    layout, target = list(x.shape), [1] * len(named)
    for block in found:
        if all(layout[axis] == 1 for axis in block.into):
            continue
        sizes, wanted = [before[axis] for axis in block.into], [named[axis] for axis in block.out]
        if len(block.into) == len(block.out) == 1:
            target[block.out[0]] = layout[block.into[0]]
        elif all(isinstance(size, int) for size in (*sizes, *wanted)):
            for axis, size in zip(block.into, sizes, strict=True):
                layout[axis] = int(size or 1)
            for axis, size in zip(block.out, wanted, strict=True):
                target[axis] = int(size or 1)
        else:
            x = collapsed(x, block.into)
            for axis in block.into:
                layout[axis] = 1
    return [moved(expanded(x, tuple(layout)), lambda a: a.reshape(target))]


def _to_scalar(x: Ranges, rank: int) -> Ranges:
    """Return the hull of all elements, as the ranges of a value of some rank that holds them in any order."""
    return moved(collapsed(x, tuple(range(len(x.shape)))), lambda a: a.reshape((1,) * rank))


def anywhere(step: Step) -> Found:
    """Return the ranges of an operator each of whose elements is one of its first input, chosen by constants."""
    if step.output.shape is None or any(operand.is_value for operand in step.node.inputs[1:]):
        return None
    return [_repeated_scalar(step.ranges(0), len(step.output.shape))]


def _repeated_scalar(x: Ranges, rank: int) -> Ranges:
    return repeated(_to_scalar(x, rank), lambda a: a)


def concat(step: Step) -> Found:
    """Return the ranges of a Concat."""
    rank = max(len(step.ranges(slot).shape) for slot in range(len(step.node.inputs)))
    parts = [to_rank(step.ranges(slot), rank) for slot in range(len(step.node.inputs))]
    axis = axis_of(step)
    sizes = [size_of(step.shape(slot), axis) for slot in range(len(parts))]
    if None in sizes or (axis != 1 and all(part.shape[axis] == 1 for part in parts)):
        return [reduce(either, (collapsed(part, (axis,)) for part in parts))]
    common = np.broadcast_shapes(*(tuple(1 if a == axis else n for a, n in enumerate(p.shape)) for p in parts))
    spread_parts = [
        expanded(part, tuple(int(size or 1) if a == axis else n for a, n in enumerate(common)))
        for part, size in zip(parts, sizes, strict=True)
    ]

    def joined(pieces: list[Interval]) -> Interval:
        norm = math.hypot(*(piece.norm for piece in pieces)) * (1 + 1e-12)
        ends = [np.concatenate([getattr(piece, end) for piece in pieces], axis=axis) for end in ("lo", "hi")]
        return interval(ends[0], ends[1], norm)

    columns = [(part.reference, part.changed, part.difference) for part in spread_parts]
    return [ranges(*(joined(list(pieces)) for pieces in zip(*columns, strict=True)))]


def split(step: Step) -> Found:
    """Return the ranges of a Split."""
    x, axis = step.ranges(0), axis_of(step)
    outputs = len(step.node.outputs)
    if x.shape[axis] == 1:
        return [x] * outputs
    sizes = step.integers(1, "split")
    if sizes is None:
        if step.has(1):
            return None
        each = -(-x.shape[axis] // int(step.node.attribute("num_outputs", outputs)))
        sizes = [each] * (outputs - 1) + [x.shape[axis] - each * (outputs - 1)]
    ends = np.cumsum(sizes)[:-1].tolist()
    return [moved(x, partial(_part, ends=ends, axis=axis, place=place)) for place in range(outputs)]


def _part(array: Array, *, ends: list[int], axis: int, place: int) -> Array:
    return np.split(array, ends, axis=axis)[place]


def slice_(step: Step) -> Found:
    """Return the ranges of a Slice with constant bounds; of a collapsed axis it takes some of what is alike."""
    x = step.ranges(0)
    starts, ends = step.integers(1, "starts"), step.integers(2, "ends")
    if starts is None or ends is None or (step.has(3) and step.node.constant(3) is None):
        return None
    axes = step.integers(3, "axes") or list(range(len(starts)))
    steps = step.integers(4, "steps")
    if steps is None:
        if step.has(4):
            return None
        steps = [1] * len(starts)
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        axis %= len(x.shape)
        if x.shape[axis] > 1:
            size = x.shape[axis]
            taken = np.arange(size)[slice(start, None if stride < 0 and end < -size else end, stride)]
            x = moved(x, partial(np.take, indices=taken, axis=axis))
    return [x]


def gather(step: Step) -> Found:
    """Return the ranges of a Gather; with computed indices the hull of what it can take."""
    x, axis = step.ranges(0), axis_of(step)
    indices = step.node.constant(1)
    rank = step.node.inputs[1].rank if indices is None else indices.ndim
    if rank is None:
        return None
    if indices is not None and x.shape[axis] > 1:
        taken = indices.astype(np.int64) % x.shape[axis]
        often = int(np.bincount(taken.ravel()).max(initial=1))  # a position taken n times counts n times in the squares

        def take(part: Interval) -> Interval:
            norm = part.norm * float(np.sqrt(often)) * (1 + 1e-12)
            return interval(part.lo.take(taken, axis=axis), part.hi.take(taken, axis=axis), norm)

        return [x.each(take)]
    x = collapsed(x, (axis,))
    target = x.shape[:axis] + (1,) * rank + x.shape[axis + 1 :]
    return [moved(x, lambda a: a.reshape(target))] if indices is not None or step.ranges(1).same else None


def pad(step: Step) -> Found:
    """Return the ranges of a Pad: a constant border adds its value; the other modes repeat what is there."""
    x = step.ranges(0)
    rank = len(x.shape)
    pads = step.integers(1, "pads")
    listed = step.integers(3, "axes") if step.has(3) else list(range(rank))
    if pads is None or listed is None:
        return None
    axes = [axis % rank for axis in listed]
    edges = {axis: (pads[k], pads[k + len(axes)]) for k, axis in enumerate(axes)}
    mode = step.node.attribute("mode", "constant")
    fill = _fill(step, rank)
    if fill is None:
        return None
    for axis, (before, after) in edges.items():
        if not before and not after:
            continue
        if x.shape[axis] == 1 or mode != "constant" or min(before, after) < 0:
            x = collapsed(x, (axis,))
            x = either(x, fill) if mode == "constant" else repeated(x, lambda a: a)
        else:
            x = _padded(x, fill, axis, before, after)
    return [x]


def _fill(step: Step, rank: int) -> Ranges | None:
    if "value" in step.node.attributes or not step.has(2):
        return unchanged(point(np.full((1,) * rank, float(step.node.attribute("value", 0.0)))))
    value = step.ranges(2)
    return to_rank(moved(value, lambda a: a.reshape(())), rank)


def _padded(x: Ranges, fill: Ranges, axis: int, before: int, after: int) -> Ranges:
    def joined(inner: Interval, border: Interval) -> Interval:
        def end(part: Array, edge: Array) -> Array:
            sizes = [list(part.shape), list(part.shape)]
            sizes[0][axis], sizes[1][axis] = before, after
            return np.concatenate([np.broadcast_to(edge, sizes[0]), part, np.broadcast_to(edge, sizes[1])], axis=axis)

        if border.is_zero:  # rows of 0 add nothing to the norm
            return interval(end(inner.lo, border.lo), end(inner.hi, border.hi), inner.norm)
        return interval(end(inner.lo, border.lo), end(inner.hi, border.hi))

    return ranges(
        joined(x.reference, fill.reference), joined(x.changed, fill.changed), joined(x.difference, fill.difference)
    )


def expand(step: Step) -> Found:
    """Return the ranges of an Expand: a collapsed axis stays so, and axes of size 1 repeat."""
    shape = step.output.shape
    if shape is None:
        return None
    return [repeated(to_rank(step.ranges(0), len(shape)), lambda a: a)]


def resize(step: Step) -> Found:
    """Return the ranges of a Resize or Upsample: nearest takes elements, linear means of them with weights of sum 1.

    Cubic interpolation has negative weights, and is not covered. Cropping may read the extrapolation value.
    """
    node, x = step.node, step.ranges(0)
    if node.attribute("mode", "nearest") not in ("nearest", "linear"):
        return None
    cropped = node.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    x = collapsed(x, tuple(axis for axis in range(len(x.shape)) if cropped or not _keeps(step, axis)))
    if cropped:
        value = float(node.attribute("extrapolation_value", 0.0))
        x = either(x, unchanged(point(np.full((1,) * len(x.shape), value))))
    return [x]


def _keeps(step: Step, axis: int) -> bool:
    """Whether a Resize leaves an axis as it is: not listed, or of scale 1; the same size alone may hide a scale."""
    node = step.node
    axes = [int(one) % len(step.ranges(0).shape) for one in node.attribute("axes", range(len(step.ranges(0).shape)))]
    if axis not in axes:
        return True
    slot = 1 if node.op_type == "Upsample" or node.opset < 11 else 2
    scales = np.ravel(node.attributes["scales"]) if "scales" in node.attributes else node.constant(slot)
    if scales is not None and scales.size:
        return float(scales.ravel()[axes.index(axis)]) == 1.0
    size = size_of(step.shape(), axis)
    return slot == 2 and node.constant(3) is not None and size is not None and size == size_of(step.output.shape, axis)


MOVEMENT: dict[str, BoundRule] = {
    "Concat": concat,
    "DepthToSpace": anywhere,
    "Dropout": dropout,
    "Expand": expand,
    "Flatten": reshape,
    "Gather": gather,
    "GatherElements": anywhere,
    "GatherND": anywhere,
    "Identity": identity,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Slice": slice_,
    "SpaceToDepth": anywhere,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": anywhere,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Upsample": resize,
}
"""Operator -> its rule."""
