"""Writing in the background: in order, everything, and errors are not lost."""

import threading

import pytest

from diffit.sampling.generate import _background


def test_writes_come_in_order_from_another_thread():
    written = []
    with _background() as write:
        for number in range(5):
            write(lambda number: written.append((threading.get_ident(), number)), number)
    threads, numbers = zip(*written, strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    assert set(threads) != {threading.get_ident()}


def test_only_one_waits():
    """The caller is held back while a batch is unwritten, so that memory does not grow."""
    free, started = threading.Event(), threading.Semaphore(0)

    def slow():
        started.release()
        assert free.wait(10)

    with _background() as write:
        write(slow)
        assert started.acquire(timeout=10)
        second = threading.Thread(target=write, args=(slow,))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        free.set()
        second.join(10)
        assert not second.is_alive()


@pytest.mark.parametrize("count", [1, 5])
def test_an_error_reaches_the_caller(count):
    def fail(number):
        raise ValueError(f"disk full at {number}")

    def run():
        with _background() as write:
            for number in range(count):
                write(fail, number)

    with pytest.raises(ValueError, match="disk full at 0"):
        run()


def test_what_was_handed_in_is_written_when_the_caller_fails():
    written = []

    def run():
        with _background() as write:
            write(written.append, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [1]
