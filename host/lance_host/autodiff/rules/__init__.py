"""The table of backward rules: one entry for each operator.

Formulas are those of the ONNX operator texts, differentiated; each is checked against PyTorch autograd in
`tests/host/test_rules.py`.
"""

from lance_host.autodiff.rules import (
    activation,
    conv,
    elementwise,
    indexing,
    norm,
    pooling,
    product,
    reduction,
    resizing,
    shape,
)
from lance_host.autodiff.rules.common import OfAllOutputs, Rule

RULES: dict[str, Rule | OfAllOutputs] = {
    # arithmetic
    "Add": elementwise.add,
    "Sub": elementwise.subtract,
    "Mul": elementwise.multiply,
    "Div": elementwise.divide,
    "Neg": elementwise.negate,
    "Abs": elementwise.absolute,
    "Pow": elementwise.power,
    "Sqrt": elementwise.square_root,
    "Reciprocal": elementwise.reciprocal,
    "Exp": elementwise.exponential,
    "Log": elementwise.logarithm,
    "Erf": elementwise.error_function,
    "Sin": elementwise.sine,
    "Cos": elementwise.cosine,
    "Min": elementwise.extremum,
    "Max": elementwise.extremum,
    "Where": elementwise.where,
    "Cast": elementwise.cast,
    "Identity": elementwise.identity,
    "Dropout": elementwise.dropout,
    # activation functions
    "Relu": activation.relu,
    "LeakyRelu": activation.leaky_relu,
    "PRelu": activation.prelu,
    "Clip": activation.clip,
    "Sigmoid": activation.sigmoid,
    "HardSigmoid": activation.hard_sigmoid,
    "HardSwish": activation.hard_swish,
    "Tanh": activation.tanh,
    "Gelu": activation.gelu,
    "Mish": activation.mish,
    "Elu": activation.elu,
    "Celu": activation.celu,
    "Selu": activation.selu,
    "Softplus": activation.softplus,
    "Softsign": activation.softsign,
    "Softmax": activation.softmax,
    "LogSoftmax": activation.log_softmax,
    # products
    "MatMul": product.matmul,
    "Gemm": product.gemm,
    "Einsum": product.einsum,
    "Conv": conv.conv,
    "ConvTranspose": conv.conv_transpose,
    # normalisation
    "BatchNormalization": norm.batch_norm,
    "LayerNormalization": norm.layer_norm,
    "GroupNormalization": norm.group_norm,
    "InstanceNormalization": norm.instance_norm,
    # reductions and pooling
    "ReduceSum": reduction.reduce_sum,
    "ReduceMean": reduction.reduce_mean,
    "ReduceMax": reduction.reduce_extremum,
    "ReduceMin": reduction.reduce_extremum,
    "ReduceL1": reduction.reduce_l1,
    "ReduceL2": reduction.reduce_l2,
    "ReduceSumSquare": reduction.reduce_sum_square,
    "ReduceLogSumExp": reduction.reduce_log_sum_exp,
    "CumSum": indexing.cumulative_sum,
    "GlobalAveragePool": pooling.global_average_pool,
    "GlobalMaxPool": pooling.global_max_pool,
    "AveragePool": pooling.average_pool,
    "MaxPool": pooling.max_pool,
    "Resize": resizing.resize,
    # shape and position
    "Reshape": shape.reshape,
    "Flatten": shape.reshape,
    "Squeeze": shape.reshape,
    "Unsqueeze": shape.reshape,
    "Transpose": shape.transpose,
    "Concat": shape.concat,
    "Split": OfAllOutputs(shape.split),
    "Expand": shape.expand,
    "Tile": shape.tile,
    "DepthToSpace": shape.depth_to_space,
    "SpaceToDepth": shape.space_to_depth,
    "Slice": indexing.slice_,
    "Gather": indexing.gather,
    "GatherND": indexing.gather_nd,
    "ScatterND": indexing.scatter_nd,
    "Trilu": indexing.triangle,
    "Pad": indexing.pad,
}

# Operators through which no gradient flows: shapes, positions, truth values, and steps of slope 0.
STOPS = frozenset(
    {
        *("Shape", "Size", "Range", "ConstantOfShape", "ArgMax", "ArgMin", "NonZero", "OneHot", "EyeLike"),
        *(
            "Equal",
            "Greater",
            "GreaterOrEqual",
            "Less",
            "LessOrEqual",
            "Not",
            "And",
            "Or",
            "Xor",
            "IsNaN",
            "IsInf",
        ),
        *("Floor", "Ceil", "Round", "Sign"),
    }
)
