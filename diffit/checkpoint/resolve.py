"""Where weights are, and what they say of themselves, without loading them.

A checkpoint is named by a bundled name ("Diffit-Fashion"), a file, or the released weights on the Hub ("Diffit").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from diffit.checkpoint.config import METADATA_KEY, RELEASED, CheckpointConfig, default_config
from diffit.models.config import ZOO, model_config
from diffit.system.files import quiet_hub

BUNDLED = {"Diffit-Fashion": Path(__file__).parents[1] / "bundled" / "diffit_fashion.safetensors"}
HUB_REPOSITORY = "nvidia/DiffiT"


@dataclass(frozen=True)
class Source:
    """Where weights come from: a file that exists, or one of the released files, to be downloaded when loaded.

    The flag is the one that takes another file, for errors to name.
    """

    path: Path | None
    hub_file: str | None = None
    flag: str = "--model_path"

    def fetch(self) -> Path:
        """The file, downloaded once if it is on the Hub.

        Raises:
            ValueError: if the Hub cannot be reached and the file was not downloaded before.
        """
        return self.path or _download(HUB_REPOSITORY, self.hub_file or "", self.flag)

    def __str__(self) -> str:
        return str(self.path or f"{HUB_REPOSITORY}/{self.hub_file}")


def find_checkpoint(
    model: str | None = None,
    path: str | Path | None = None,
    image_size: int | None = None,
    flag: str = Source.flag,
) -> tuple[Source, CheckpointConfig]:
    """Where the weights are and what they are, without loading them.

    Args:
        model: a name of the zoo; needed where a file says nothing of itself.
        path: a .safetensors or .pt file, or a Hub file "owner/repository/file"; without it the model's bundled or
            released weights are meant.
        image_size: side of the images, in pixels; by default the checkpoint's own.
        flag: with which a user names the path.

    Raises:
        ValueError: in one sentence, if anything does not exist or does not fit together.
    """
    if model is not None:
        model_config(model)  # refuses an unknown name
    if path is None:
        source, config = _named(model or "Diffit-Fashion", image_size, flag)
    else:
        source = _given(str(path), flag)
        found = read_metadata(source.path)
        if found is None and model is None:
            named = f"name it with --model, one of {', '.join(ZOO)}"
            hint = named if source.flag == Source.flag else f"{source.flag} takes files that do, as those of train.py"
            raise ValueError(f"{source} does not say which model it holds: {hint}")
        config = found or default_config(model or "", image_size)
    if model is not None and config.model != model:
        raise ValueError(f"{source} holds {config.model}, not {model}: drop --model, or give another file")
    if image_size is not None and config.image_size != image_size:
        raise ValueError(
            f"{source} makes images of {config.image_size}x{config.image_size}, not {image_size}x{image_size}: "
            "drop --image_size, or give weights trained at that size"
        )
    return source, config


def _named(model: str, image_size: int | None, flag: str) -> tuple[Source, CheckpointConfig]:
    if model in BUNDLED:
        source = Source(BUNDLED[model])
        config = read_metadata(source.path)
        if config is None:
            raise ValueError(f"{source} is missing or damaged: install diffit again")
        return source, config
    if model != "Diffit":
        raise ValueError(f"no weights were released for {model}: give yours with {flag}")
    if image_size not in (None, *RELEASED):
        raise ValueError(f"no weights were released for {image_size}x{image_size}: choose 256 or 512")
    size = image_size or 256
    return Source(None, RELEASED[size][0], flag), default_config(model, size)


def _given(path: str, flag: str) -> Source:
    file = Path(path).expanduser()
    if file.is_file():
        return Source(file, flag=flag)
    if path.count("/") == 2 and not file.parent.is_dir() and file.suffix == ".safetensors" and not file.is_absolute():
        owner, repository, name = path.split("/")
        return Source(_download(f"{owner}/{repository}", name, flag))
    hint = "it is a folder; name the file in it" if file.is_dir() else "check the path"
    raise ValueError(f"there is no checkpoint file {path}: {hint}, or leave {flag} out")


def find_named(
    path_or_name: str | Path, image_size: int | None = None, flag: str = Source.flag
) -> tuple[Source, CheckpointConfig]:
    """What `load_model` would load, without loading it.

    Args:
        path_or_name: see `load_model`, as for image_size.
        flag: with which a user names it.

    Raises:
        ValueError: in one sentence, if it cannot be found, or says nothing of itself.
    """
    name = str(path_or_name)
    if name == HUB_REPOSITORY:
        name = "Diffit"
    if name.startswith(f"{HUB_REPOSITORY}/"):
        size = next((size for size, (file, _) in RELEASED.items() if name.endswith(file)), None)
        return find_checkpoint("Diffit", image_size=size or image_size, flag=flag)
    if name in ZOO:
        return find_checkpoint(name, image_size=image_size, flag=flag)
    size_in_name = re.search(r"diffit_(256|512)", Path(name).name)
    unnamed = read_metadata(Path(name)) is None
    model = "Diffit" if unnamed and size_in_name else None
    size = int(size_in_name[1]) if model and size_in_name else image_size
    return find_checkpoint(model, name, size, flag)


def read_metadata(path: Path | None) -> CheckpointConfig | None:
    """The config in a file's metadata; None if it is not safetensors or carries none.

    Raises:
        ValueError: if the file is damaged, or of another version.
    """
    if path is None or path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): copy or download it again") from error
    if METADATA_KEY not in metadata:
        return None
    try:
        return CheckpointConfig.from_json(metadata[METADATA_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version of diffit ({error}): update diffit") from error


def _download(repository: str, name: str, flag: str) -> Path:
    try:
        with quiet_hub(f"{repository}/{name}"):
            return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"cannot reach the Hub for {repository}/{name}: check the network, or download the file elsewhere and "
            f"name it with {flag}"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"the Hub did not give {repository}/{name} ({str(error).strip().splitlines()[0]}): check the name, or "
            f"download the file elsewhere and name it with {flag}"
        ) from error
