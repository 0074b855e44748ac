"""Copying and writing finished batches while the next one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_WAITING = 2  # batches in host memory at most: one is being written, one waits


class BackgroundWriter:
    """Hands tensors to a function as arrays, in order, in a thread of its own; what is handed in gets written.

    Use it in a `with` block, whose end waits for all writing.

    Args:
        write: called with the arguments of `add`, tensors as arrays.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        self.write = write
        self.thread = ThreadPoolExecutor(1)
        self.pending: deque[Future[None]] = deque()

    def add(self, *values: Any) -> None:
        """Write these soon. Tensors on a GPU are copied once it has computed them, and nothing here waits for that.

        Raises:
            Whatever an earlier write raised.
        """
        while len(self.pending) >= _WAITING:
            self.pending.popleft().result()
        self.pending.append(self.thread.submit(self._write, [_start_copy(value) for value in values]))

    def _write(self, copies: list[Callable[[], Any]]) -> None:
        self.write(*(finish() for finish in copies))

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):  # type: ignore[no-untyped-def]
        self.thread.shutdown()  # also after an error: finished work is not lost
        if error is None:
            for future in self.pending:
                future.result()


def _start_copy(value: Any) -> Callable[[], Any]:
    """Begin to bring a value to the host; the result waits for it. What is not a tensor stays as it is."""
    import torch

    if not isinstance(value, torch.Tensor):
        return lambda: value
    if value.device.type != "cuda":
        return lambda: _array(value)
    copy = value.to("cpu", non_blocking=True)  # into pinned memory
    copied, device = torch.cuda.Event(), value.device
    copied.record()

    def finish() -> NDArray[Any]:
        with torch.cuda.device(device):  # a new thread begins with GPU 0
            copied.synchronize()
        return _array(copy)

    return finish


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()
