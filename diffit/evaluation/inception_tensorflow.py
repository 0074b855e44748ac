"""Inception features from the original frozen graph in TensorFlow: the arithmetic of the published numbers.

TensorFlow and PyTorch's compiler each bring an LLVM of their own, and a process that loads both can crash. So
TensorFlow lives in a process of its own, to which batches are sent.
Letters: B images of a batch, H x W their size.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffit.evaluation.reader import Images, to_rgb

if TYPE_CHECKING:
    import torch

    from diffit.evaluation.backends import Features

_SPATIAL_CHANNELS = 7
_session: Any = None  # of the worker process
_tensors: list[Any] = []


def _start(path: str) -> None:
    """Load the graph, in the worker. Its input is cut off behind the JPEG decoder, at the batch of float images."""
    import tensorflow as tf

    global _session, _tensors
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    graph_def = tf.compat.v1.GraphDef.FromString(Path(path).read_bytes())
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
        pool, spatial = tf.import_graph_def(
            graph_def, {"ExpandDims:0": images}, ["pool_3:0", "mixed_6/conv:0"], name="inception"
        )
        weights = graph.get_operation_by_name("inception/softmax/logits/MatMul").inputs[1]
        pool = tf.reshape(pool, [-1, weights.shape[0]])
        probabilities = tf.nn.softmax(pool @ weights)
        spatial = tf.reshape(spatial[..., :_SPATIAL_CHANNELS], [tf.shape(pool)[0], -1])
    _session = tf.compat.v1.Session(graph=graph)
    _tensors = [images, (pool, probabilities, spatial)]


def _run(batch: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, outputs = _tensors
    return _session.run(outputs, {images: batch.astype(np.float32)})


class TensorFlowInception:
    """The original graph.

    Args:
        weights: the frozen graph (.pb).
        device: where distances are computed later; TensorFlow takes the GPUs it finds itself.

    Raises:
        ValueError: if the file is not the graph.
        ModuleNotFoundError: without TensorFlow.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        import importlib.util

        from diffit.evaluation.backends import INCEPTION

        if importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError("tensorflow is not installed", name="tensorflow")
        self.name, self.device = INCEPTION, device
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self._pool.submit(_start, str(weights)).result()
        except Exception as error:  # whatever TensorFlow raises for a graph that it cannot read
            self._pool.shutdown()
            raise ValueError(f"{weights} is not the Inception graph of 2015 ({error}): fetch it again") from error

    def __call__(self, images: Images) -> Features:
        from diffit.evaluation.backends import Features

        return Features(*self._pool.submit(_run, to_rgb(images)).result())
