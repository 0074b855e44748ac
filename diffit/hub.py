"""The model card of a pipeline, with its scores where the Hub shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import BUNDLED, HUB_REPOSITORY, Source
from diffit.evaluation.scores import LABELS
from diffit.sampling.labels import class_names
from diffit.system.console import printable
from diffit.system.files import first_few, first_line

SCORES = "scores.json"  # beside the weights, as the evaluator writes it by --json
SAMPLES = "samples.png"  # beside the card, which shows it
DOWNLOAD_SETTINGS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_NVIDIA = "cc-by-nc-sa-4.0"
# Hub id of a licence -> what the card says of it.
LICENSES = {
    _NVIDIA: "The weights are NVIDIA's, or trained on from them: they were released as nvidia/DiffiT under "
    "CC-BY-NC-SA-4.0, which binds what is made with them too.",
    "unknown": "No licence has been chosen for these weights: say here, and in `license` above, who may use them how.",
}
# First class and number of classes -> the data's Hub id; ImageNet's are named by WordNet ids or in words.
_DATASETS = {
    ("T-shirt/top", 10): "zalando-datasets/fashion_mnist",
    ("airplane", 10): "uoft-cs/cifar10",
    ("n01440764", 1000): "ILSVRC/imagenet-1k",
    ("tench", 1000): "ILSVRC/imagenet-1k",
}
_CARD = """---
{metadata}
---

# {title}

{what} [DiffiT](https://arxiv.org/abs/2312.02139) of {parameters:.3g} M parameters, for the package `diffit`.
{picture}
    pip install diffit

```python
from diffit import DiffiTPipeline

pipeline = DiffiTPipeline.from_pretrained({repo_id})
images = pipeline({labels}).images
```

Plain diffusers loads it by `DiffusionPipeline.from_pretrained`, with `trust_remote_code=True` and `diffit` installed.

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
    config: CheckpointConfig, repo_id: str, num_parameters: int, license: str, scores: dict[str, Any], picture: bool
) -> str:
    """The README.md of a pipeline's folder.

    Args:
        config: the checkpoint's config.
        repo_id: the Hub id, or the folder's name.
        num_parameters: number of the network's parameters.
        license: the Hub's id of a licence.
        scores: what the evaluator writes by --json; {} if nothing was measured.
        picture: whether there is a SAMPLES beside it.
    """
    network, sampling, guidance = config.network, config.sampling, config.guidance
    title, task = repo_id.split("/")[-1], "unconditional-image-generation"
    measured = {name: scores[name] for name in LABELS if scores.get(name) is not None}
    files = [Path(str(scores[key])).name for key in ("samples", "reference") if scores.get(key)]
    reference = files[-1] if files else "unknown"
    released, count = license == _NVIDIA and not config.made_by, network.num_classes
    names = class_names(config) if released else config.class_names
    dataset = _DATASETS.get((names[0], count)) if names else None
    kind = dataset or reference
    results = [EvalResult(task, kind, reference, name, measured[name], metric_name=LABELS[name]) for name in measured]
    metadata = ModelCardData(
        library_name="diffusers",
        license=license,
        pipeline_tag=task,
        tags=["diffit", "diffusion", "vision-transformer"],
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        model_name=title if results else None,
    )
    texts = {
        "title": title,
        "data": (f"{dataset}, " if dataset else "")
        + (f"{count} classes" if count else "without classes")
        + (f": {first_few(names, 10)}" if names else ""),
        "recipe": config.made_by or (f"NVIDIA's, see {HUB_REPOSITORY}" if released else "not recorded"),
        "recommended": f"{sampling.num_sampling_steps} steps of {sampling.sampler}"
        + (f", guidance at {guidance.scale:g}" if count and guidance.enabled else ""),
        "vae": "none: the network sees pixels" if config.codec.factor == 1 else Path(config.codec.vae).name,
    }
    return _CARD.format(
        metadata=metadata.to_yaml(),
        what="A class-conditional" if count else "An unconditional",
        parameters=num_parameters / 1e6,
        picture=f"\n![Samples]({SAMPLES})\n" if picture else "",
        repo_id=json.dumps(repo_id),
        labels=[names[0], names[-1]] if names else [count - 1] if count else "",
        size=config.image_size,
        process=config.process,
        scores=_score_table(measured, files, str(scores.get("features", "Inception"))),
        license=LICENSES.get(license, f"The weights are under {_escaped(license)}."),
        **{name: _escaped(text) for name, text in texts.items()},
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
    license = "apache-2.0" if name in BUNDLED else _NVIDIA if from_nvidia else "unknown"
    try:
        scores = json.loads(path.read_text()) if path and path.is_file() else {}
        {name: float(scores[name]) for name in LABELS if scores.get(name) is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): score again with --json, or remove it") from error
    return {"license": license, "scores": scores}


def _score_table(measured: dict[str, float], files: list[str], features: str) -> str:
    if not measured:
        return ""
    rows = [LABELS[name] for name in measured], ["---"] * len(measured), [f"{score:.4g}" for score in measured.values()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    protocol = f"By ADM's protocol, on {' against '.join(files)}, features: {features}."
    return f"\n## Scores\n\n{_escaped(protocol)}\n\n{table}\n"


def _escaped(text: str) -> str:
    """A text from outside within a line of Markdown: nothing in it is markup, a link, HTML or the end of a cell."""
    return re.sub(r"[\\`*\[\]<|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))
