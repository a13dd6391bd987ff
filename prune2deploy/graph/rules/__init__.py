"""The rules: one visible table from operator to rule. An operator that is not here is opaque."""

from prune2deploy.graph.node import Node
from prune2deploy.graph.rules import (
    activation,
    arithmetic,
    axes,
    channelwise,
    concat,
    depth,
    linear,
    mixing,
    norm,
    pool,
    product,
    quantized,
    quantized_linear,
    reduce,
    repeat,
    reshape,
    resize,
    sample,
    select,
    shape,
    split,
)
from prune2deploy.graph.rules.base import Rule
from prune2deploy.plugins import RULES_GROUP, plugins

RULES: dict[str, Rule] = {
    **activation.RULES,  # functions of one input: see the table `activation.FUNCTIONS`
    **arithmetic.RULES,  # elementwise, of one or more inputs that are broadcast: see `arithmetic.OPERATORS`
    "ArgMax": mixing.ARG,
    "ArgMin": mixing.ARG,
    "AveragePool": pool.AVERAGE_POOL,
    "BatchNormalization": channelwise.BATCH_NORMALIZATION,
    "Concat": concat.CONCAT,
    "ConstantOfShape": repeat.STATED,
    "Conv": linear.CONV,
    "ConvInteger": quantized_linear.CONV_INTEGER,
    "ConvTranspose": linear.CONV_TRANSPOSE,
    "CumSum": mixing.CUMSUM,
    "DepthToSpace": depth.DEPTH_TO_SPACE,
    "DequantizeLinear": quantized.DEQUANTIZE_LINEAR,
    "Dropout": channelwise.IDENTITY,
    "DynamicQuantizeLinear": quantized.DYNAMIC_QUANTIZE_LINEAR,
    "Expand": repeat.EXPAND,
    "Flatten": reshape.RESHAPE,
    "Gather": select.GATHER,
    "Gemm": linear.GEMM,
    "GlobalAveragePool": pool.AVERAGE_POOL,
    "GlobalLpPool": pool.LP_POOL,
    "GlobalMaxPool": pool.MAX_POOL,
    "GridSample": sample.GRID_SAMPLE,
    "GroupNormalization": norm.GROUP_NORMALIZATION,
    "Hardmax": mixing.HARDMAX,
    "Identity": channelwise.IDENTITY,
    "InstanceNormalization": norm.INSTANCE_NORMALIZATION,
    "LRN": norm.LRN,
    "LayerNormalization": norm.LAYER_NORMALIZATION,
    "LogSoftmax": mixing.LOG_SOFTMAX,
    "LpNormalization": norm.LP_NORMALIZATION,
    "LpPool": pool.LP_POOL,
    "MatMul": linear.MATMUL,
    "MatMulInteger": quantized_linear.MATMUL_INTEGER,
    "MaxPool": pool.MAX_POOL,
    "MaxRoiPool": sample.ROI,
    "MeanVarianceNormalization": norm.MEAN_VARIANCE_NORMALIZATION,
    "Pad": select.PAD,
    "QLinearConv": quantized_linear.QLINEAR_CONV,
    "QLinearMatMul": quantized_linear.QLINEAR_MATMUL,
    "QuantizeLinear": quantized.QUANTIZE_LINEAR,
    "RMSNormalization": norm.LAYER_NORMALIZATION,
    "ReduceL1": reduce.REDUCE_L1,
    "ReduceL2": reduce.REDUCE_L2,
    "ReduceLogSum": reduce.REDUCE_LOG_SUM,
    "ReduceLogSumExp": reduce.REDUCE_LOG_SUM_EXP,
    "ReduceMax": reduce.REDUCE_MAX,
    "ReduceMean": reduce.REDUCE_MEAN,
    "ReduceMin": reduce.REDUCE_MIN,
    "ReduceProd": reduce.REDUCE_PROD,
    "ReduceSum": reduce.REDUCE_SUM,
    "ReduceSumSquare": reduce.REDUCE_SUM_SQUARE,
    "Reshape": reshape.RESHAPE,
    "Resize": resize.RESIZE,
    "ReverseSequence": sample.REVERSE_SEQUENCE,
    "RoiAlign": sample.ROI,
    "Shape": shape.SHAPE,
    "Size": shape.SHAPE,
    "Slice": select.SLICE,
    "Softmax": mixing.SOFTMAX,
    "SpaceToDepth": depth.SPACE_TO_DEPTH,
    "Split": split.SPLIT,
    "Squeeze": axes.SQUEEZE,
    "Tile": repeat.TILE,
    "TopK": mixing.TOPK,
    "Transpose": axes.TRANSPOSE,
    "Unsqueeze": axes.UNSQUEEZE,
    "Upsample": resize.RESIZE,
}

PRODUCTS = frozenset({"Gemm", "MatMul"})
"""Operators that have a rule of their own where both matrices are computed."""


def rule_for(node: Node) -> Rule | None:
    """Return the rule of a node's operator, or None where it is unknown or of a custom domain."""
    if node.domain:
        return plugin_rule(f"{node.domain}.{node.op_type}")
    if node.op_type in PRODUCTS and all(operand.is_value for operand in node.inputs[:2]):
        return product.PRODUCT
    if node.op_type in ("Expand", "Tile") and not node.inputs[0].is_value:
        return repeat.STATED
    if norm.BY_GROUP in node.attributes:
        return norm.GROUP_NORM_OF_THREE
    return quantized_linear.stored_weights_rule(node) or RULES.get(node.op_type) or plugin_rule(node.op_type)


def plugin_rule(name: str) -> Rule | None:
    """Return another package's rule of an operator that has none here, or None.

    Raises:
        InputError: if it cannot be loaded, or is not a `Rule`.
    """
    found = plugins(RULES_GROUP).get(name)
    rule: Rule | None = None if found is None else found.load(Rule, "a prune2deploy.graph.rules.base.Rule")
    return rule
