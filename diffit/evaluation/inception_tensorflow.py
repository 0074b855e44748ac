"""Inception features from the original frozen graph in TensorFlow: the arithmetic of the published numbers.

TensorFlow and PyTorch's compiler each bring an LLVM of their own, and a process that loads both can crash. So
TensorFlow lives in a process of its own, to which batches are sent.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the worker process imports this file, and must not load PyTorch
    from torch import Tensor, device

_SPATIAL_CHANNELS = 7
_session: Any = None  # of the worker process
_tensors: list[Any] = []


def load_features(path: Path, device: device) -> Callable[[Tensor], list[NDArray[np.float32]]]:
    """The original graph (.pb), on the GPUs that TensorFlow finds itself, else on the CPU.

    Returns a function of uint8 images [B, H, W, 3] that gives features [B, 2048], probabilities [B, 1008] and spatial
    features [B, 2023].

    Raises:
        ValueError: if the file is not the graph, or the worker process cannot start.
        ModuleNotFoundError: without TensorFlow.
    """
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    started = worker.submit(_start, path)
    try:
        started.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "the process that runs TensorFlow ended at its start. It imports the script that started it: do the work "
            'of the script under `if __name__ == "__main__":` (if it is there, see TensorFlow\'s own message above)'
        ) from error
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever TensorFlow raises for a graph that it cannot read
        raise ValueError(f"{path} is not the Inception graph of 2015 ({error}): fetch it again") from error
    return lambda images: worker.submit(_run, images.cpu().numpy()).result()


def _start(path: Path) -> None:
    """Load the graph, in the worker. Its input is cut off behind the JPEG decoder, at the batch of float images."""
    import tensorflow as tf

    global _session, _tensors
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
        pool, spatial = tf.import_graph_def(
            graph_def, {"ExpandDims:0": images}, ["pool_3:0", "mixed_6/conv:0"], name="inception"
        )
        weights = graph.get_operation_by_name("inception/softmax/logits/MatMul").inputs[1]
        pool = tf.reshape(pool, [-1, weights.shape[0]])
        probabilities = tf.nn.softmax(pool @ weights)  # the logits without bias, as ADM takes them
        spatial = tf.reshape(spatial[..., :_SPATIAL_CHANNELS], [tf.shape(pool)[0], -1])
    _session = tf.compat.v1.Session(graph=graph)
    _tensors = [images, (pool, probabilities, spatial)]


def _run(batch: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    images, outputs = _tensors
    return _session.run(outputs, {images: batch.astype(np.float32)})
