"""Which weights a word means, and what they are, without loading them.

`KINDS` lists what every door takes. A name with weights comes first, then what is on the disk, then the Hub: a folder
called Diffit-Fashion is meant by ./Diffit-Fashion, and owner/name is looked for on the Hub only where there is no
folder owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from diffit.checkpoint.config import METADATA_KEY, RELEASED, CheckpointConfig, default_config
from diffit.models.config import ZOO, model_config
from diffit.system.files import first_line, quiet_hub, sha256

# In the folder of a checkpoint: the first EMA; weights without averaging and the optimizer, in one file (by earlier
# versions) or in shards; and the marker, written last: size and CRC-32 of every other file.
EMA_FILE, STATE_FILE, STATE_FOLDER, MARKER = "ema.safetensors", "state.pt", "state", "complete.json"
BUNDLED = {"Diffit-Fashion": Path(__file__).parents[1] / "bundled" / "diffit_fashion.safetensors"}
HUB_REPOSITORY = "nvidia/DiffiT"
PIPELINE_FILE = "model_index.json"
KINDS = (
    f"a name ({', '.join(BUNDLED)}: bundled; Diffit or {HUB_REPOSITORY}: the released weights)",
    "a .safetensors or .pt file",
    "a run's folder",
    f"one of its checkpoints ({STATE_FILE} or {STATE_FOLDER}/ in it: the weights without EMA)",
    "a folder that save_pretrained wrote",
    "a pipeline's id or a file owner/repository/name.safetensors on the Hub",
)
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Source:
    """Where weights are: in a file or folder, or on the Hub, from where they are downloaded when they are loaded.

    Args:
        path: a file; transformer/ of a saved pipeline; state/ of a checkpoint; None for a file on the Hub.
        name: what messages call it.
        door: the flag or function that takes weights, for messages to name.
        client: settings of the Hub's client, such as revision.
    """

    path: Path | None
    name: str
    door: str = "--model_path"
    client: Mapping[str, Any] = field(default_factory=dict)

    def fetch(self) -> Path:
        """The file, or the folder without any code in it; from the Hub it is downloaded once.

        Raises:
            ValueError: in one sentence, if it is not on the Hub, or out of reach and it was not downloaded before.
        """
        if self.path is not None:
            return self.path
        owner, repository, *file = self.name.split("/", 2)
        repo_id = f"{owner}/{repository}"
        try:
            with quiet_hub(self.name):
                if file:
                    return Path(hf_hub_download(repo_id, file[0], **self.client))
                return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"], **self.client))
        except Exception as error:  # the client's own, or those of requests or httpx, by its version
            if isinstance(error, LocalEntryNotFoundError):
                failed = f"cannot reach the Hub for {self}"
                check = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
            else:
                failed, check = f"the Hub did not give {self} ({first_line(error)})", "check the name"
            raise ValueError(
                f"{failed}: {check}, or download it elsewhere and name the copy with {self.door}"
            ) from error

    def sha256(self) -> str:
        """The SHA-256 of the file, or that of the hashes of all files in the folder. Raises ValueError as `fetch`."""
        path = self.fetch()
        if path.is_file():
            return sha256(path)
        return hashlib.sha256("".join(map(sha256, sorted(path.glob("*.*")))).encode()).hexdigest()

    def __str__(self) -> str:
        return self.name


def find_checkpoint(
    model: str | None = None,
    path: str | Path | None = None,
    image_size: int | None = None,
    door: str = Source.door,
    **client: Any,
) -> tuple[Source, CheckpointConfig]:
    """Where the weights are and what they are, without loading them.

    Args:
        model: a name of the zoo; required for a file without metadata, unless it is called diffit_256 or diffit_512.
        path: one of `KINDS`; the model's bundled or released weights by default.
        image_size: side of the images in pixels, by default the checkpoint's own; 256 or 512 for the released weights.
        door: the flag or function that takes the path, for messages to name.
        client: settings of the Hub's client, such as revision; of no effect on what is on this machine.

    Raises:
        ValueError: in one sentence, if anything does not exist, is damaged, or does not fit together.
    """
    if model is not None:
        model_config(model)  # refuses an unknown name
    word = str(path) if path is not None else model or next(iter(BUNDLED))
    source, config, local = Source(None, word, door, client), None, Path(word).expanduser()
    released = re.fullmatch(rf"Diffit|{HUB_REPOSITORY}(?:/diffit_(\d+)\.safetensors)?", word)
    if word in BUNDLED:
        source, config = replace(source, path=BUNDLED[word]), read_metadata(BUNDLED[word])
    elif released:
        size = int(released[1] or image_size or 256)
        if size not in RELEASED:
            raise ValueError(f"no weights were released for {size}x{size}: choose 256 or 512")
        source, config = replace(source, name=f"{HUB_REPOSITORY}/{RELEASED[size][0]}"), default_config("Diffit", size)
    elif path is not None and local.exists():
        taken, config = _on_disk(local)
        source = replace(source, path=taken, name=str(taken))
    elif path is not None and _may_be_on_hub(word):
        taken, config = _on_disk(source.fetch())
        source = replace(source, path=taken)
    elif word in ZOO:
        raise ValueError(f"no weights were released for {word}: give yours with {door}")
    else:
        what = "checkpoint file" if word.endswith(_FILE_SUFFIXES) else "checkpoint"
        raise ValueError(f"there is no {what} {word}: {door} takes {'; '.join(KINDS)}")
    config = config or _by_name(source, model, image_size)
    if model is not None and config.model != model:
        raise ValueError(f"{source} holds {config.model}, not {model}: drop --model, or give another file")
    if image_size is not None and config.image_size != image_size:
        raise ValueError(
            f"{source} makes images of {config.image_size}x{config.image_size}, not {image_size}x{image_size}: "
            "drop --image_size, or give weights trained at that size"
        )
    return source, config


def find_guide(config: CheckpointConfig) -> tuple[Source, CheckpointConfig] | None:
    """The network of autoguidance that a config names; None without one.

    Raises:
        ValueError: as `find_checkpoint`, or if it is of another process, image size or set of classes.
    """
    if config.guidance.guide is None:
        return None
    source, guide = find_checkpoint(path=config.guidance.guide, door="--guidance.guide")

    named = config.class_names and guide.class_names

    def nature(known: CheckpointConfig) -> dict[str, Any]:
        network = known.network
        sizes = {"channels": network.in_channels, "input size": network.input_size, "image size": known.image_size}
        classes = {"classes": network.num_classes, "class names": known.class_names if named else ()}
        return {"process": known.process_config} | sizes | classes

    own, other = nature(config), nature(guide)
    for what in own:
        if own[what] != other[what]:
            raise ValueError(
                f"--guidance.guide {source} does not fit {config.model} ({what}: {other[what]}, not {own[what]}): give "
                "weights that were trained for the same process and data"
            )
    return source, guide


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a marker, oldest first."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{MARKER}") if path.parent.name.isdigit())


def integrity_error(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if nothing is.

    only: a file whose checksum is computed; that of all by default. Sizes are compared in any case.
    """
    try:
        for name, (size, crc) in json.loads((folder / MARKER).read_text()).items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or (only in (None, name) and checksum(path) != crc):
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def checksum(path: Path) -> int:
    """The CRC-32 of a file, read piece by piece."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def _on_disk(path: Path) -> tuple[Path, CheckpointConfig | None]:
    """The file or folder that holds the weights of what exists, and its config if it has one."""
    if (path / PIPELINE_FILE).is_file():
        return path / "transformer", _pipeline_config(path)
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    if checkpoints.is_dir():  # a run
        newest_first = reversed(complete_checkpoints(checkpoints))
        whole = next((each for each in newest_first if integrity_error(each, only=EMA_FILE) is None), None)
        if whole is None:
            raise ValueError(f"{path} holds no whole checkpoint: train until its first one, or name a file")
        path = whole
    if (path / EMA_FILE).is_file():
        path = path / EMA_FILE
    averaged = path.parent / EMA_FILE
    if path.name in (STATE_FILE, STATE_FOLDER) and averaged.is_file():
        return path, read_metadata(averaged)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in _FILE_SUFFIXES)
        hint = f"name a file in it, such as {files[0]}" if files else "it has no weights"
        raise ValueError(f"{path} is neither a run nor a checkpoint nor a saved pipeline: {hint}")
    return path, read_metadata(path)


def _pipeline_config(folder: Path) -> CheckpointConfig:
    files = (folder / PIPELINE_FILE, folder / "transformer" / "config.json")
    try:
        index, network = (json.loads(file.read_text()) for file in files)
        network = {name: value for name, value in network.items() if not name.startswith("_")}
        config = CheckpointConfig.from_json(json.dumps(index["checkpoint"] | {"network": network}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged_pipeline(folder, error) from error
    if (folder / "vae").is_dir():
        config = replace(config, codec=replace(config.codec, vae=str(folder / "vae")))
    return config


def _may_be_on_hub(word: str) -> bool:
    """Whether it is owner/repository, or owner/repository/file, and not in a folder of this machine."""
    owner, *rest = word.split("/")
    fits = len(rest) >= 2 if word.endswith(_FILE_SUFFIXES) else len(rest) == 1
    return fits and bool(re.fullmatch(r"\w[\w.-]*", owner)) and "" not in rest and not Path(owner).is_dir()


def _by_name(source: Source, model: str | None, image_size: int | None) -> CheckpointConfig:
    """The config of a file without metadata: all that is known of the model that a user, or the file's name, names."""
    size = re.search(r"diffit_(256|512)", Path(source.name).name)
    if model is None and not size:
        raise ValueError(f"{source} does not say which model it holds: name it with --model, one of {', '.join(ZOO)}")
    if model in BUNDLED:
        return replace(read_metadata(BUNDLED[model]) or default_config(model), made_by="")
    named_size = int(size[1]) if size and model in (None, "Diffit") else None
    return default_config(model or "Diffit", image_size or named_size)


def read_metadata(path: Path) -> CheckpointConfig | None:
    """The config in a file's metadata; None if it is not safetensors or carries none.

    Raises:
        ValueError: if the file is damaged or of another version.
    """
    try:
        if not is_safetensors(path):
            return None
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path) from error
    if METADATA_KEY not in metadata:
        return None
    try:
        return CheckpointConfig.from_json(metadata[METADATA_KEY])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).removeprefix("--")
        raise ValueError(
            f"{path} has damaged metadata, or those of another version of diffit ({reason}): update diffit, or give "
            "another file"
        ) from error


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, with 8 bytes and JSON, or is called so: names alone are often wrong."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix.lower() == ".safetensors" and not start.startswith((b"PK", b"\x80")))


def damaged(path: Path) -> ValueError:
    """The error to raise for a file of weights that cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            return ValueError(f"{path} is a git-LFS pointer, not the weights: run git lfs pull, or download the file")
    return ValueError(f"{path} is damaged or incomplete: copy or download it again")


def damaged_pipeline(folder: Path, error: Exception) -> ValueError:
    """The error to raise for a saved pipeline that cannot be read."""
    return ValueError(
        f"cannot load the pipeline in {folder} ({first_line(error)}): check that it was written by "
        "DiffiTPipeline.save_pretrained, and copy or download it again"
    )
