"""Operators of random graphs that move or select; none computes anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto

from graph.random_graphs.builder import FAR, Builder, Value


def pad(builder: Builder, draw: Any, x: Value) -> Value:
    modes = ("constant", "constant", "edge", "reflect") + ("wrap",) * (builder.opset >= 19)
    mode = draw(st.sampled_from(modes)) if x.size > 1 else "constant"
    before, after = (draw(st.integers(0, 2)), draw(st.integers(0, 2))) if mode == "constant" else (0, 0)
    edge = draw(st.sampled_from((0, 0, 1))) if mode == "constant" else 1
    fill = draw(st.sampled_from((0.0, 0.0, 0.75)))
    name = builder.pad(x.name, [0, before, edge, edge, 0, after, edge, edge], mode, fill)
    return x.to(name, channels=x.channels + before + after, size=x.size + 2 * edge)


def slice_channels(builder: Builder, draw: Any, x: Value) -> Value:
    start = draw(st.integers(0, x.channels - 1))
    end = draw(st.integers(start + 1, x.channels))
    step = draw(st.sampled_from((1, 1, 2, -1))) if builder.opset >= 10 else 1
    taken = range(start, end, step) if step > 0 else range(end - 1, start - 1, step)
    bounds = (start, end) if step > 0 else (end - 1, start - 1 if start else -FAR)
    return x.to(builder.slice(x.name, [1], bounds[:1], bounds[1:], step), channels=len(taken))


def slice_space(builder: Builder, draw: Any, x: Value) -> Value:
    """Every other place, or a corner."""
    if builder.opset >= 10 and draw(st.booleans()):
        return x.to(builder.slice(x.name, [2, 3], [0, 0], [FAR, FAR], 2), size=(x.size + 1) // 2)
    return x.to(builder.slice(x.name, [2, -1], [1, 0], [FAR, -1]), size=x.size - 1)


def gather(builder: Builder, draw: Any, x: Value) -> Value:
    """Channels taken in any order, some of them twice; at times by one index, or by a column of them."""
    lowest = -x.channels if builder.opset >= 11 else 0
    taken = draw(st.lists(st.integers(lowest, x.channels - 1), min_size=1, max_size=6))
    form = draw(st.sampled_from(("list", "list", "column", "scalar")))
    if form == "list" or x.flat:
        return x.to(builder.node("Gather", [x.name, builder.ints(*taken)], axis=1), channels=len(taken))
    if form == "scalar":
        y = builder.node("Gather", [x.name, builder.constant(taken[0], np.int64)], axis=1)
        return x.to(builder.unsqueeze(y, 1), channels=1)
    shape = draw(st.sampled_from(((1, -1), (-1, 1))))  # along both, what is kept would have to be a rectangle
    y = builder.node("Gather", [x.name, builder.constant(np.reshape(taken, shape), np.int64)], axis=1)
    return x.to(builder.reshape(y, 0, len(taken), x.size, x.size), channels=len(taken))


def split(builder: Builder, draw: Any, x: Value) -> Value:
    """Parts of the channels, of which all or some are joined again in another order."""
    form = draw(st.sampled_from(("sizes", "sizes", "even", "count") if builder.opset >= 18 else ("sizes", "even")))
    if form == "count":  # the last part may be smaller
        count = draw(st.integers(1, min(3, x.channels)))
        part = -(-x.channels // count)
        sizes = [min(part, x.channels - part * place) for place in range(count)]
        if sizes[-1] < 1:
            return x
        names = builder.nodes_out("Split", [x.name], count, axis=1, num_outputs=count)
    elif form == "even" and builder.opset < 18:
        count = 2 if x.channels % 2 == 0 else 1
        sizes = [x.channels // count] * count
        names = builder.nodes_out("Split", [x.name], count, axis=1)
    else:
        cuts = sorted({draw(st.integers(1, x.channels)) for _ in range(2)} | {x.channels})
        sizes = np.diff([0, *cuts]).tolist()
        names = builder.split(x.name, draw(st.sampled_from((1, 1 - (2 if x.flat else 4)))), sizes)
    order = draw(st.permutations(range(len(sizes))))
    chosen = order[: draw(st.integers(1, len(order)))]
    if len(chosen) == 1 and draw(st.booleans()):
        return x.to(names[chosen[0]], channels=sizes[chosen[0]])
    y = builder.node("Concat", [names[place] for place in chosen], axis=1)
    return x.to(y, channels=sum(sizes[place] for place in chosen))


def round_trip(builder: Builder, draw: Any, x: Value) -> Value:
    """Data movement that comes back: transposed there and back, split and merged, unsqueezed, put into the batch."""
    form = draw(st.sampled_from(("transpose", "unsqueeze", "split", "flat", "batch")))
    if form == "transpose":
        y = builder.node("Relu", [builder.transpose(x.name, 0, 2, 3, 1)])
        return x.to(builder.transpose(y, 0, 3, 1, 2))
    if form == "unsqueeze":
        axis = draw(st.sampled_from((1, 2, -1) if builder.opset >= 11 else (1, 2, 4)))
        return x.to(builder.squeeze(builder.unsqueeze(x.name, axis), axis))
    if form == "flat":
        return x.to(builder.reshape(builder.node("Flatten", [x.name]), -1, x.channels, x.size, x.size))
    if form == "batch":
        n, each = x.size, draw(st.sampled_from([k for k in range(1, x.channels + 1) if x.channels % k == 0]))
        sizes = draw(st.sampled_from([(each, n, n), (each, n * n), (n, n), (1, each, n * n), (n,)]))
        y = builder.node("Relu", [builder.reshape(x.name, -1, *sizes)])
        return x.to(builder.reshape(y, -1, x.channels, n, n))
    groups = 2 if x.channels % 2 == 0 else 1
    y = builder.reshape(x.name, 0, groups, x.channels // groups, x.size, x.size)
    return x.to(builder.reshape(y, 0, x.channels, x.size, x.size))


def shuffle(builder: Builder, draw: Any, x: Value) -> Value:
    """The channel shuffle of ShuffleNet: reshape, transpose, reshape."""
    groups = draw(st.sampled_from([n for n in (2, 3, 4) if x.channels % n == 0] or [1]))
    batch = draw(st.sampled_from((0, -1)))
    y = builder.reshape(x.name, batch, groups, x.channels // groups, x.size, x.size)
    y = builder.transpose(y, 0, 2, 1, 3, 4)
    return x.to(builder.reshape(y, batch, x.channels, x.size, x.size))


def depth_to_space(builder: Builder, draw: Any, x: Value) -> Value:
    """Pixel shuffle, by its operator or by reshapes."""
    if x.channels % 4:
        return space_to_depth(builder, draw, x)
    channels, n = x.channels // 4, x.size
    form = draw(st.sampled_from(("DCR", "CRD", "reshape")))
    if form == "reshape":
        y = builder.transpose(builder.reshape(x.name, 0, channels, 2, 2, n, n), 0, 1, 4, 2, 5, 3)
        y = builder.reshape(y, 0, channels, 2 * n, 2 * n)
    else:
        extra = {"mode": form} if builder.opset >= 11 else {}
        y = builder.node("DepthToSpace", [x.name], blocksize=2, **extra)
    return x.to(y, channels=channels, size=2 * n)


def space_to_depth(builder: Builder, draw: Any, x: Value) -> Value:
    if x.size % 2:
        return slice_space(builder, draw, x)
    n = x.size // 2
    if draw(st.booleans()):
        y = builder.node("SpaceToDepth", [x.name], blocksize=2)
    else:
        y = builder.transpose(builder.reshape(x.name, 0, x.channels, n, 2, n, 2), 0, 1, 3, 5, 2, 4)
        y = builder.reshape(y, 0, 4 * x.channels, n, n)
    return x.to(y, channels=4 * x.channels, size=n)


def resize(builder: Builder, draw: Any, x: Value) -> Value:
    """Twice the size, by Upsample or Resize."""
    scales = builder.constant([1, 1, 2, 2])
    mode = draw(st.sampled_from(("nearest", "linear")))
    if builder.opset < 10:
        return x.to(builder.node("Upsample", [x.name, scales], mode=mode), size=2 * x.size)
    if builder.opset < 11:
        return x.to(builder.node("Resize", [x.name, scales], mode=mode), size=2 * x.size)
    how = {"coordinate_transformation_mode": "asymmetric"} if mode == "nearest" else {}
    how |= {"nearest_mode": "floor"} if mode == "nearest" else {}
    none = "" if builder.opset >= 13 else builder.constant([])
    if builder.batch == "N" or draw(st.booleans()):
        return x.to(builder.node("Resize", [x.name, none, scales], mode=mode, **how), size=2 * x.size)
    size = draw(st.integers(1, x.size + 3))
    sizes = builder.ints(int(builder.batch), x.channels, size, size)
    return x.to(builder.node("Resize", [x.name, none, none, sizes], mode=mode, **how), size=size)


def repeat(builder: Builder, draw: Any, x: Value) -> Value:
    """Expand or Tile: of the channels, of one place to all, of the space."""
    form = draw(st.sampled_from(("tile", "expand", "expand places", "tile space")))
    if form == "tile":
        times = draw(st.integers(1, 3))
        counts = [1, times] if x.flat else [1, times, 1, 1]
        return x.to(builder.node("Tile", [x.name, builder.ints(*counts)]), channels=times * x.channels)
    if form == "tile space" and not x.flat and x.size <= 5:
        return x.to(builder.node("Tile", [x.name, builder.ints(1, 1, 2, 2)]), size=2 * x.size)
    if form == "expand places" and not x.flat:
        y = builder.node("GlobalMaxPool", [x.name])
        return x.to(builder.node("Expand", [y, builder.ints(1, 1, x.size, x.size)]))
    y = builder.slice(x.name, [1], [0], [1])
    rows = draw(st.integers(1, 4))
    return x.to(builder.node("Expand", [y, builder.ints(1, rows, *((1, 1) if not x.flat else ()))]), channels=rows)


def sample(builder: Builder, draw: Any, x: Value) -> Value:
    """Operators that read each map where a constant says; they need the batch's size."""
    batch, forms = int(builder.batch), ["reverse", "regions"]
    form = draw(st.sampled_from((*forms, "grid") if builder.opset >= 20 else forms))
    if form == "reverse":
        lengths = builder.ints(*builder.random.integers(1, x.size + 1, batch).tolist())
        y = builder.transpose(x.name, 2, 0, 1, 3)
        y = builder.node("ReverseSequence", [y, lengths], batch_axis=1, time_axis=0)
        return x.to(builder.transpose(y, 1, 2, 0, 3))
    if form == "grid":
        grid = builder.constant(builder.random.uniform(-1, 1, (batch, 4, 4, 2)))
        return x.to(builder.node("GridSample", [x.name, grid], mode="linear", padding_mode="zeros"), size=4)
    if builder.opset >= 22:  # ONNX Runtime has no such RoiAlign
        return x
    corners = builder.random.uniform(0, x.size / 2, (batch, 2))
    regions = builder.constant(np.concatenate([corners, corners + x.size / 2], axis=1))
    inputs = [x.name, regions, builder.constant(np.arange(batch), np.int64)]
    return x.to(builder.node("RoiAlign", inputs, output_height=3, output_width=3, sampling_ratio=2), size=3)


def concat(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    same = [value for value in values if (value.size, value.flat) == (x.size, x.flat)]
    parts = [x, *draw(st.lists(st.sampled_from(same), min_size=1, max_size=2))]
    exact = all(value.exact for value in parts)
    axis = 1 if draw(st.booleans()) else 1 - (2 if x.flat else 4)
    name = builder.node("Concat", [value.name for value in parts], axis=axis)
    return x.to(name, channels=sum(value.channels for value in parts), exact=exact)


def concat_constant(builder: Builder, draw: Any, x: Value) -> Value:
    """Channels of constants beside computed ones."""
    more = draw(st.integers(1, 2))
    if builder.batch == "N":
        first = builder.slice(x.name, [1], [0], [1])
        zeros = builder.node("Mul", [first, builder.constant(0.0)])
        part = builder.node("Add", [zeros, builder.constant(np.ones((more, *(() if x.flat else (1, 1)))) * 0.5)])
    else:
        shape = (int(builder.batch), more, *(() if x.flat else (x.size, x.size)))
        part = builder.constant(np.full(shape, 0.5) if draw(st.booleans()) else builder.random.integers(-2, 3, shape))
    parts = [x.name, part] if draw(st.booleans()) else [part, x.name]
    return x.to(builder.node("Concat", parts, axis=1), channels=x.channels + more)


def space_concat(builder: Builder, draw: Any, x: Value, values: list[Value]) -> Value:
    """Two maps side by side, brought back to a square."""
    other = draw(st.sampled_from([value for value in values if value.like(x)]))
    y = builder.node("Concat", [x.name, other.name], axis=3)
    return x.to(builder.node("MaxPool", [y], kernel_shape=[1, 2], strides=[1, 2]))


def focus(builder: Builder, draw: Any, x: Value) -> Value:
    """The four strided slices at the start of a YOLOX."""
    corners = ((0, 0), (1, 0), (0, 1), (1, 1))
    parts = [builder.slice(x.name, [2, 3], corner, [FAR, FAR], 2) for corner in corners]
    return x.to(builder.node("Concat", parts, axis=1), channels=4 * x.channels, size=x.size // 2)


# --- to flat values ---------------------------------------------------------------------------------------------------


def flatten(builder: Builder, draw: Any, x: Value) -> Value:
    form = draw(st.sampled_from(("flatten", "reshape", "sizes", "mean", "gap", "squeeze")))
    wide = x.channels * x.size**2
    if form == "flatten":
        return Value(builder.node("Flatten", [x.name]), wide, 1, True, x.exact)
    if form == "reshape":
        target = draw(st.sampled_from(([-1, wide], [0, wide], [0, -1])))
        return Value(builder.reshape(x.name, *target), wide, 1, True, x.exact)
    if form == "sizes":
        return Value(builder.node("Reshape", [x.name, sizes_of(builder, draw, x)]), wide, 1, True, x.exact)
    if form == "mean":
        return Value(builder.reduce("ReduceMean", x.name, [2, 3], keepdims=0), x.channels, 1, True)
    y = builder.node("GlobalAveragePool", [x.name])
    if form == "gap":
        return Value(builder.node("Flatten", [y]), x.channels, 1, True)
    free = builder.batch == 2 and x.channels > 1 and draw(st.booleans())  # of all axes of size 1
    return Value(builder.node("Squeeze", [y]) if free else builder.squeeze(y, 2, 3), x.channels, 1, True)


def sizes_of(builder: Builder, draw: Any, x: Value) -> str:
    """Compute the shape of ``x.view(x.size(0), -1)``, or of ``x.view(-1, x.size(1) * x.size(2) * x.size(3))``."""
    shape = builder.node("Shape", [x.name])

    def size(axis: int) -> str:
        return builder.node("Gather", [shape, builder.constant(axis, np.int64)], axis=0)

    if draw(st.booleans()):
        first, second = builder.unsqueeze(size(0), 0), builder.ints(-1)
    else:
        wide = builder.node("Mul", [builder.node("Mul", [size(1), size(2)]), size(3)])
        first, second = builder.ints(-1), builder.unsqueeze(wide, 0)
    y = builder.node("Concat", [first, second], axis=0)
    return builder.node("Cast", [y], to=TensorProto.INT64) if draw(st.booleans()) else y


def sized_reshape(builder: Builder, draw: Any, x: Value) -> Value:
    """A reshape there and back whose shapes are computed from the value's own."""
    shape = builder.node("Shape", [x.name])
    batch = builder.slice(shape, [0], [0], [1])
    target = builder.node("Concat", [batch, builder.ints(x.channels), builder.ints(-1)], axis=0)
    row = builder.node("Reshape", [x.name, target])
    return x.to(builder.node("Reshape", [row, shape]))
