"""The model card of a pipeline, and the way of its folder to and from the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffit.files import first_line, quiet_hub
from diffit.sources import BUNDLED, CheckpointConfig

SCORES = "scores.json"  # beside the weights, as the evaluator writes it by --json
DOWNLOAD_SETTINGS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Hub id of a licence -> what the card says of it.
LICENSES = {
    "cc-by-nc-sa-4.0": "The weights are NVIDIA's, released as nvidia/DiffiT under CC-BY-NC-SA-4.0, which binds what is "
    "made with them too.",
    "unknown": "No licence has been chosen for these weights: say here, and in `license` above, who may use them how.",
}
_SCORES = {
    "fid": "FID",
    "inception_score": "Inception Score",
    "sfid": "sFID",
    "precision": "precision",
    "recall": "recall",
}
_CARD = """---
{metadata}
---

# {title}

{what} [DiffiT](https://arxiv.org/abs/2312.02139) of {parameters:.3g} M parameters, for the package `diffit`.

    pip install diffit

```python
from diffit import DiffiTPipeline

pipeline = DiffiTPipeline.from_pretrained("{repo_id}")
images = pipeline({labels}).images
```

In plain diffusers: `DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)`, with `diffit` installed.

| | |
| --- | --- |
| images | {size}x{size} |
| data | {data} |
| recipe | {recipe} |
| process | {process} |
| recommended | {recommended} |
| trained with the VAE | {vae} |
{scores}
## Licence

{license}
"""


def model_card(
    config: CheckpointConfig, repo_id: str, num_parameters: int, license: str, scores: dict[str, Any]
) -> str:
    """The README.md of a pipeline's folder.

    Args:
        config: of the checkpoint.
        repo_id: the Hub id, or the folder's name.
        num_parameters: of the network.
        license: the Hub's id of one.
        scores: what the evaluator writes by --json; {} if nothing was measured.
    """
    from huggingface_hub import ModelCardData

    network, sampling, guidance = config.network, config.sampling, config.guidance
    names = config.class_names
    tags = ["diffit", "diffusion", "vision-transformer", *(["class-conditional"] if network.num_classes else [])]
    metadata = ModelCardData(
        library_name="diffusers", pipeline_tag="unconditional-image-generation", license=license, tags=tags
    )
    released = license == "cc-by-nc-sa-4.0"
    guided = f", guidance at {guidance.scale:g}" if network.num_classes and guidance.enabled else ""
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    classes = f"{network.num_classes} classes" + (f": {shown}" if names else "")
    labels = [names[0], names[-1]] if names else [network.num_classes - 1] if network.num_classes else ""
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.split("/")[-1],
        what="A class-conditional" if network.num_classes else "An unconditional",
        parameters=num_parameters / 1e6,
        repo_id=repo_id,
        labels=labels,
        size=config.image_size,
        data=("ImageNet, " if released else "") + (classes if network.num_classes else "without classes"),
        recipe=config.made_by or ("NVIDIA's, see nvidia/DiffiT" if released else "not recorded"),
        process=config.process,
        recommended=f"{sampling.num_sampling_steps} steps of {sampling.sampler}{guided}",
        vae="none: the network sees pixels" if config.codec.factor == 1 else Path(config.codec.vae).name,
        scores=_score_table(scores),
        license=LICENSES.get(license, f"The weights are under {license}."),
    )


def card_facts(name: str, config: CheckpointConfig) -> dict[str, Any]:
    """What the card says of a checkpoint beside its config: `license`, and the `scores` in the SCORES beside it.

    name: of a bundled model, of released weights, or the path of a file or folder.

    Raises:
        ValueError: if that file is not what the evaluator writes.
    """
    where = BUNDLED.get(name, Path(name).expanduser())
    path = (where if where.is_dir() else where.parent) / SCORES
    released = config.model == "Diffit" and not config.made_by  # what is trained here says how
    license = "apache-2.0" if name in BUNDLED else "cc-by-nc-sa-4.0" if released else "unknown"
    try:
        scores = json.loads(path.read_text()) if where.exists() and path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): score again with --json, or remove it") from error
    return {"license": license, "scores": scores}


def _score_table(scores: dict[str, Any]) -> str:
    found = {label: scores[name] for name, label in _SCORES.items() if scores.get(name) is not None}
    if not found:
        return ""
    names = [Path(str(scores[key])).name for key in ("samples", "reference") if scores.get(key)]
    how = f"By ADM's protocol, on {' against '.join(names)}, features: {scores.get('features', 'Inception')}."
    header, line = " | ".join(found), " | ".join("---" for _ in found)
    values = " | ".join(f"{value:.4g}" for value in found.values())
    return f"\n## Scores\n\n{how}\n\n| {header} |\n| {line} |\n| {values} |\n"


def download(repo_id: str, **settings: Any) -> Path:
    """The folder of a pipeline on the Hub, downloaded once, without any code in it.

    settings: any of `DOWNLOAD_SETTINGS`.

    Raises:
        ValueError: in one sentence, if it is not there, or the Hub not in reach and it was not downloaded before.
    """
    from huggingface_hub import snapshot_download

    def ask() -> Path:
        return Path(str(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"], **settings)))

    return _ask_hub(ask, repo_id, f"the Hub did not give {repo_id}", "or give the folder of a copy")


def upload(folder: Path, repo_id: str, private: bool | None, token: str | None, commit_message: str) -> str:
    """Upload a folder to a repository, which is made if it is not there; returns the commit's address.

    Raises:
        ValueError: in one sentence, if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import create_repo, upload_folder

    def ask() -> str:
        name = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return str(upload_folder(repo_id=name, folder_path=folder, token=token, commit_message=commit_message))

    return _ask_hub(ask, None, f"{repo_id} was not uploaded", "and log in by `hf auth login`")


def _ask_hub(ask: Callable[[], Any], wanted: str | None, failed: str, hint: str) -> Any:
    """What the Hub's client gives. Its errors are its own, or those of requests or httpx, by its version."""
    try:
        with quiet_hub(wanted):
            return ask()
    except Exception as error:
        raise ValueError(f"{failed} ({first_line(error)}): check the name and the network, {hint}") from error
