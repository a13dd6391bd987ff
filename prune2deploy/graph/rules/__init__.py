"""The rules: one visible table from operator to rule. An operator that is not here is opaque."""

from prune2deploy.graph.node import Node
from prune2deploy.graph.rules import channelwise, elementwise, linear, movement, pool, reshape
from prune2deploy.graph.rules.base import Rule

RULES: dict[str, Rule] = {
    "Add": elementwise.ADD,
    "AveragePool": pool.AVERAGE_POOL,
    "BatchNormalization": channelwise.BATCH_NORMALIZATION,
    "Cast": channelwise.CAST,
    "Clip": channelwise.CLIP,
    "Concat": movement.CONCAT,
    "Conv": linear.CONV,
    "Dropout": channelwise.IDENTITY,
    "Flatten": reshape.RESHAPE,
    "Gemm": linear.GEMM,
    "GlobalAveragePool": pool.AVERAGE_POOL,
    "GlobalMaxPool": pool.MAX_POOL,
    "Identity": channelwise.IDENTITY,
    "LeakyRelu": channelwise.LEAKY_RELU,
    "MatMul": linear.MATMUL,
    "MaxPool": pool.MAX_POOL,
    "Mul": elementwise.MUL,
    "Pad": movement.PAD,
    "ReduceMean": pool.REDUCE_MEAN,
    "Relu": channelwise.RELU,
    "Reshape": reshape.RESHAPE,
    "Sigmoid": channelwise.SIGMOID,
    "Slice": movement.SLICE,
    "Squeeze": movement.SQUEEZE,
    "Sub": elementwise.SUB,
    "Transpose": movement.TRANSPOSE,
    "Unsqueeze": movement.UNSQUEEZE,
}


def rule_for(node: Node) -> Rule | None:
    """Return the rule of a node's operator, or None where it is unknown or of a custom domain."""
    return None if node.domain else RULES.get(node.op_type)
