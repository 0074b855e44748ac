"""The settings of every start of a run: what changed since the last one is named, what cannot change is refused."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from diffit.files import as_tree, difference, write_atomically
from diffit.training.config import TrainConfig

# Settings without which a checkpoint means something else (a VAE may move: its weights are compared with those of the
# latents), and those that do not change what a run learns.
_FIXED = ("process", "diffusion", "edm", "flow")
_FREE = {
    *("run_dir", "dry_run", "log_every", "save_every", "keep", "keep_every", "preview_every", "evaluation"),
    *("sampling", "guidance", "max_skipped", "rank_timeout", "tracker", "data.workers", "data.path", "data.cache"),
}


def record_start(run_dir: Path, config: TrainConfig, step: int) -> str:
    """Write config.yaml, and add the settings to starts.jsonl; returns what changed since the last start, if anything.

    Raises:
        ValueError: if a run that has taken steps cannot go on with these settings.
    """
    path, settings = run_dir / "starts.jsonl", as_tree(config)
    starts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    before = starts[-1]["settings"] if starts and step else settings
    lost = difference({key: before[key] for key in _FIXED}, {key: settings[key] for key in _FIXED})
    if lost:
        raise ValueError(f"{run_dir} holds a run of other settings ({lost}): choose another --run_dir")
    changed = difference(before, settings, _FREE)
    lines = [json.dumps(line) for line in (*starts, {"step": step, "changed": changed, "settings": settings})]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
    return changed
