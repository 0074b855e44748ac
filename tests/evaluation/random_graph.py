"""A frozen graph with the node names, kinds and shapes of the Inception network of 2015, and random weights."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import GOLDEN

_TENSORS = (np.dtype(np.float32), 1), (np.dtype(np.int32), 3)


class RandomInception:
    """Builds the graph node by node; `write` stores it as TensorFlow's freezer would."""

    def __init__(self, seed: int = 0, scale_after_normalization: bool = True) -> None:
        from tensorboard.compat.proto.graph_pb2 import GraphDef

        self.graph = GraphDef()
        self.graph.versions.producer = 8  # TensorFlow refuses this batch-norm from graphs of version 9 and later
        self.random = np.random.default_rng(seed)
        self.scaled = scale_after_normalization
        blocks = json.loads((GOLDEN / "inception_names.json").read_text())["blocks"]
        self.blocks = {block["tf"]: block for block in blocks}
        self._build()

    def write(self, path: Path) -> Path:
        path.write_bytes(self.graph.SerializeToString())
        return path

    def _node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        node = self.graph.node.add(op=op, name=name, input=inputs)
        for key, value in attributes.items():
            attribute = node.attr[key]
            if key in ("T", "DstT", "SrcT", "dtype", "Tdim", "Tshape", "Tidx"):
                attribute.type = value
            elif isinstance(value, list):
                attribute.list.i.extend(value)
            elif isinstance(value, str):
                attribute.s = value.encode()
            elif isinstance(value, bool):
                attribute.b = value
            elif isinstance(value, float):
                attribute.f = value
            else:
                attribute.i = value
        return name

    def _constant(self, name: str, value: np.ndarray) -> str:
        kind = dict(_TENSORS)[value.dtype]
        node = self.graph.node.add(op="Const", name=name)
        node.attr["dtype"].type = kind
        tensor = node.attr["value"].tensor
        tensor.dtype = kind
        for size in value.shape:
            tensor.tensor_shape.dim.add(size=size)
        if value.ndim:
            tensor.tensor_content = value.tobytes()
        else:  # a scalar is stored as a list of one
            (tensor.float_val if kind == 1 else tensor.int_val).append(value.item())
        return name

    def _floats(self, name: str, value: Any) -> str:
        return self._constant(name, np.asarray(value, np.float32))

    def _integers(self, name: str, value: Any) -> str:
        return self._constant(name, np.asarray(value, np.int32))

    def _convolution(self, scope: str, source: str) -> str:
        block = self.blocks[scope]
        shape, stride = block["conv2d_params_HWIO"], block["stride"]
        channels = shape[-1]
        noise = self.random.standard_normal
        kernel = self._floats(f"{scope}/conv2d_params", noise(shape) * np.sqrt(2 / np.prod(shape[:3])))
        same = max(block["padding"]) > 0 or shape[:2] == [1, 1]
        padding = "SAME" if same else "VALID"
        out = self._node(
            "Conv2D", f"{scope}/Conv2D", source, kernel, T=1, strides=[1, stride, stride, 1], padding=padding
        )
        norm = f"{scope}/batchnorm"
        beta = self._floats(f"{norm}/beta", 0.1 * noise(channels))
        gamma = self._floats(f"{norm}/gamma", self.random.uniform(0.7, 1.3, channels))
        mean = self._floats(f"{norm}/moving_mean", 0.1 * noise(channels))
        variance = self._floats(f"{norm}/moving_variance", self.random.uniform(0.7, 1.3, channels))
        out = self._node(
            "BatchNormWithGlobalNormalization", norm, out, mean, variance, beta, gamma,
            T=1, variance_epsilon=0.001, scale_after_normalization=self.scaled,
        )  # fmt: skip
        check = self._node("CheckNumerics", f"{scope}/CheckNumerics", out, T=1, message="not finite")
        out = self._node("Identity", f"{scope}/control_dependency", out, f"^{check}", T=1)
        return self._node("Relu", scope, out, T=1)

    def _pool(self, op: str, name: str, source: str, size: int, stride: int, padding: str) -> str:
        return self._node(
            op, name, source, T=1, ksize=[1, size, size, 1], strides=[1, stride, stride, 1], padding=padding
        )

    def _join(self, name: str, sources: list[str]) -> str:
        axis = self._integers(f"{name}/concat_dim", 3)
        return self._node("Concat", name, axis, *sources, T=1, N=len(sources))

    def _tower(self, scope: str, names: list[str], source: str) -> str:
        """A chain of convolutions, which may end in two side by side (scope/mixed)."""
        ends = []
        for name in names:
            if name.startswith("mixed/"):
                ends.append(self._convolution(f"{scope}/{name}", source))
            else:
                source = self._convolution(f"{scope}/{name}", source)
        return self._join(f"{scope}/mixed", ends) if ends else source

    def _mixed(self, scope: str, source: str) -> str:
        towers: dict[str, list[str]] = defaultdict(list)
        for name in self.blocks:
            if name.startswith(f"{scope}/"):
                tower, _, rest = name.removeprefix(f"{scope}/").partition("/")
                towers[tower].append(rest)
        ends = []
        for tower, names in towers.items():
            path = f"{scope}/{tower}"
            if tower == "conv":
                ends.append(self._convolution(path, source))
            elif tower == "tower_2":
                op = "MaxPool" if scope == "mixed_10" else "AvgPool"
                ends.append(self._tower(path, names, self._pool(op, f"{path}/pool", source, 3, 1, "SAME")))
            else:
                ends.append(self._tower(path, names, source))
        if scope in ("mixed_3", "mixed_8"):
            ends.append(self._pool("MaxPool", f"{scope}/pool", source, 3, 2, "VALID"))
        return self._join(f"{scope}/join", ends)

    def _preprocessing(self) -> str:
        node = self.graph.node.add(op="Const", name="DecodeJpeg/contents")
        node.attr["dtype"].type = 7
        node.attr["value"].tensor.dtype = 7
        node.attr["value"].tensor.tensor_shape.SetInParent()
        node.attr["value"].tensor.string_val.append(b"")
        out = self._node("DecodeJpeg", "DecodeJpeg", node.name, channels=3)
        out = self._node("Cast", "Cast", out, SrcT=4, DstT=1)
        out = self._node("ExpandDims", "ExpandDims", out, self._integers("ExpandDims/dim", 0), T=1)
        size = self._integers("ResizeBilinear/size", [299, 299])
        out = self._node("ResizeBilinear", "ResizeBilinear", out, size, T=1, align_corners=False)
        out = self._node("Sub", "Sub", out, self._floats("Sub/y", 128.0), T=1)
        return self._node("Mul", "Mul", out, self._floats("Mul/y", 0.0078125), T=1)

    def _build(self) -> None:
        out = self._preprocessing()
        for number in range(5):
            out = self._convolution("conv" + (f"_{number}" if number else ""), out)
            if number in (2, 4):
                out = self._pool("MaxPool", "pool" if number == 2 else "pool_1", out, 3, 2, "VALID")
        for number in range(11):
            out = self._mixed("mixed" + (f"_{number}" if number else ""), out)
        pool = self._pool("AvgPool", "pool_3", out, 8, 1, "VALID")
        flat = self._node("Reshape", "pool_3/_reshape", pool, self._integers("pool_3/_reshape/shape", [1, 2048]), T=1)
        noise = self.random.standard_normal
        weights = self._floats("softmax/weights", noise((2048, 1008)) * 0.1)
        logits = self._node("MatMul", "softmax/logits/MatMul", flat, weights, T=1)
        biases = self._floats("softmax/biases", noise(1008))
        logits = self._node("Add", "softmax/logits", logits, biases, T=1)
        self._node("Softmax", "softmax", logits, T=1)
