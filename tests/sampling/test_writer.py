"""Writing in the background: in order, everything, and errors are not lost."""

import threading

import numpy as np
import pytest
import torch

from diffit.sampling.writer import BackgroundWriter


def test_arrays_come_in_order_from_another_thread():
    written = []
    with BackgroundWriter(lambda *values: written.append((threading.get_ident(), *values))) as writer:
        for number in range(5):
            writer.add(number, torch.full((2,), number))
    threads, numbers, arrays = zip(*written, strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    assert set(threads) != {threading.get_ident()}
    np.testing.assert_array_equal(np.stack(arrays), np.arange(5)[:, None].repeat(2, axis=1))


def test_only_so_many_wait():
    """The caller is held back while two batches are unwritten, so that memory does not grow."""
    free, started = threading.Event(), threading.Semaphore(0)

    def write(number):
        started.release()
        assert free.wait(10)

    with BackgroundWriter(write) as writer:
        writer.add(0)
        writer.add(1)
        assert started.acquire(timeout=10)
        third = threading.Thread(target=writer.add, args=(2,))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        free.set()
        third.join(10)
        assert not third.is_alive()


@pytest.mark.parametrize("count", [1, 5])
def test_an_error_reaches_the_caller(count):
    def write(number):
        raise ValueError(f"disk full at {number}")

    def run():
        with BackgroundWriter(write) as writer:
            for number in range(count):
                writer.add(number)

    with pytest.raises(ValueError, match="disk full at 0"):
        run()


def test_what_was_handed_in_is_written_when_the_caller_fails():
    written = []

    def run():
        with BackgroundWriter(written.append) as writer:
            writer.add(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [1]
