"""Public files that an evaluation needs: fetched once, kept in a cache, and recognised by their SHA-256.

No list of hashes is published with these files. So the first download (or first use) writes the file's hash beside it,
as `NAME.sha256` in the format of the tool sha256sum, and every later use compares: what was changed since is refused.
Whoever knows the right hash can put it there first. torch-fidelity's file carries the start of its hash in its name.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.utils import CallbackIOWrapper

from diffit.system.console import progress
from diffit.system.files import cache_folder, exclusive, open_atomically, sha256, write_atomically

_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
INCEPTION_GRAPH = "classify_image_graph_def.pb"
INCEPTION_STATE = "weights-inception-2015-12-05-6726825d.pth"
REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
SELF_TEST_SAMPLES = "admnet_guided_upsampled_imagenet256.npz"
URLS = {INCEPTION_GRAPH: f"{_ADM}{INCEPTION_GRAPH}", SELF_TEST_SAMPLES: f"{_ADM}imagenet/256/{SELF_TEST_SAMPLES}"}
URLS |= {name: f"{_ADM}imagenet/{size}/{name}" for size, name in REFERENCES.items()}


def cached(name: str) -> Path:
    """A public file by name: from the cache, or downloaded to it; its hash is checked.

    Raises:
        FileNotFoundError: if it is not there and cannot be downloaded.
        ValueError: if it was altered.
    """
    path = cache_folder() / name
    if not path.is_file():
        url = URLS[name]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                exclusive(path.parent, name),
                urllib.request.urlopen(url, timeout=30) as answer,
                open_atomically(path) as file,
            ):
                with progress(title=name, total=answer.length, unit="B", unit_scale=True) as bar:
                    shutil.copyfileobj(CallbackIOWrapper(bar.update, answer, "read"), file)
                if answer.length:  # what was announced and did not come
                    raise urllib.error.URLError(f"the connection closed {answer.length} bytes before the end")
        except OSError as error:  # URLError is one
            reason = getattr(error, "reason", error)
            raise FileNotFoundError(
                f"{name} is needed and cannot be fetched ({reason}): download {url} elsewhere and put it at {path}"
            ) from error
    verify(path)
    return path


def verify(path: Path) -> None:
    """Compare a file with the hash in its name or beside it; without one, write it beside the file.

    Raises:
        ValueError: if the hash differs.
    """
    digest = sha256(path)
    note = path.with_name(f"{path.name}.sha256")
    in_name = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    expected = note.read_text().split()[0] if note.is_file() else in_name[1] if in_name else None
    if expected is None:
        with contextlib.suppress(OSError):  # in a folder that cannot be written, the next use is again the first
            write_atomically(note, f"{digest}  {path.name}\n".encode())
    elif not digest.startswith(expected):
        raise ValueError(
            f"{path} was altered or damaged: its SHA-256 starts with {digest[:8]}, expected {expected[:8]}; delete it "
            f"to have it fetched again (or {note.name} if the change was meant)"
        )
