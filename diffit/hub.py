"""The Hub, without its chatter: what goes wrong there is said once, in a sentence of ours."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Its library logs every retry and warns of its own deprecations; progress bars of downloads stay."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
