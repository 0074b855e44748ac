"""The model card of a pipeline, with its scores where the Hub shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import BUNDLED, HUB_REPOSITORY, Source
from diffit.evaluation.scores import LABELS
from diffit.system.files import first_line

SCORES = "scores.json"  # beside the weights, as the evaluator writes it by --json
DOWNLOAD_SETTINGS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Hub id of a licence -> what the card says of it.
LICENSES = {
    "cc-by-nc-sa-4.0": "The weights are NVIDIA's, or trained on from them: they were released as nvidia/DiffiT under "
    "CC-BY-NC-SA-4.0, which binds what is made with them too.",
    "unknown": "No licence has been chosen for these weights: say here, and in `license` above, who may use them how.",
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
        config: the checkpoint's config.
        repo_id: the Hub id, or the folder's name.
        num_parameters: number of the network's parameters.
        license: the Hub's id of a licence.
        scores: what the evaluator writes by --json; {} if nothing was measured.
    """
    network, sampling, guidance, names = config.network, config.sampling, config.guidance, config.class_names
    title, task = repo_id.split("/")[-1], "unconditional-image-generation"
    measured = {name: scores[name] for name in LABELS if scores.get(name) is not None}
    files = [Path(str(scores[key])).name for key in ("samples", "reference") if scores.get(key)]
    dataset = files[-1] if files else "unknown"
    results = [EvalResult(task, dataset, dataset, name, measured[name], metric_name=LABELS[name]) for name in measured]
    metadata = ModelCardData(
        library_name="diffusers",
        license=license,
        pipeline_tag=task,
        tags=["diffit", "diffusion", "vision-transformer"],
        eval_results=results or None,
        model_name=title if results else None,
    )
    released, count = license == "cc-by-nc-sa-4.0" and not config.made_by, network.num_classes
    shown = ": " + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else ""
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        what="A class-conditional" if count else "An unconditional",
        parameters=num_parameters / 1e6,
        repo_id=repo_id,
        labels=[names[0], names[-1]] if names else [count - 1] if count else "",
        size=config.image_size,
        data=("ImageNet, " if released else "") + (f"{count} classes{shown}" if count else "without classes"),
        recipe=config.made_by or ("NVIDIA's, see nvidia/DiffiT" if released else "not recorded"),
        process=config.process,
        recommended=f"{sampling.num_sampling_steps} steps of {sampling.sampler}"
        + (f", guidance at {guidance.scale:g}" if count and guidance.enabled else ""),
        vae="none: the network sees pixels" if config.codec.factor == 1 else Path(config.codec.vae).name,
        scores=_score_table(measured, files, scores.get("features", "Inception")),
        license=LICENSES.get(license, f"The weights are under {license}."),
    )


def card_facts(name: str, source: Source, config: CheckpointConfig) -> dict[str, Any]:
    """What the card says of a checkpoint beside its config: `license`, and the `scores` in the SCORES beside it.

    name: what a user calls it; source: what that means.

    Raises:
        ValueError: if that file is not what the evaluator writes.
    """
    named = Path(name).expanduser()  # a run's folder has scores of its own
    folder = named if named.is_dir() and name not in BUNDLED else source.path.parent if source.path else None
    path = folder / SCORES if folder else None
    # What is trained here says how, and what it started from, whose licence binds it too.
    from_nvidia = HUB_REPOSITORY in config.made_by if config.made_by else config.model == "Diffit"
    license = "apache-2.0" if name in BUNDLED else "cc-by-nc-sa-4.0" if from_nvidia else "unknown"
    try:
        scores = json.loads(path.read_text()) if path and path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): score again with --json, or remove it") from error
    return {"license": license, "scores": scores}


def _score_table(measured: dict[str, float], files: list[str], features: str) -> str:
    if not measured:
        return ""
    rows = [LABELS[name] for name in measured], ["---"] * len(measured), [f"{score:.4g}" for score in measured.values()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"\n## Scores\n\nBy ADM's protocol, on {' against '.join(files)}, features: {features}.\n\n{table}\n"
