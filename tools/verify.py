"""Do the released weights give the paper's scores on your GPUs? Fetch, compare hashes, load, sample, score, print.

    python tools/verify.py                                      # ImageNet-256, 10,000 samples
    python tools/verify.py --image_size 512 --num_samples 50000

The same command goes on where it was stopped. Flags that are not listed here go to sample.py, --batch_size 64 say.
docs/verify.md says what the numbers mean.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("verify:main")())

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download

from diffit import load_model
from diffit.checkpoint.config import RELEASED
from diffit.checkpoint.resolve import HUB_REPOSITORY
from diffit.cli.run import one_sentence
from diffit.evaluation.downloads import REFERENCES, cached
from diffit.evaluation.features import create_backend
from diffit.system.files import first_line, sha256, write_atomically

ROOT = Path(__file__).resolve().parents[1]
LABELS = {"fid": "FID", "inception_score": "IS", "sfid": "sFID", "precision": "precision", "recall": "recall"}
PAPER = {256: (1.73, 276.49, 4.54, 0.8024, 0.6205), 512: (2.67, 252.13, 4.99, 0.8277, 0.5500)}  # of 50,000 samples


def fetch(name: str) -> tuple[Path, str]:
    """A local file or a Hub file owner/repository/file, and what is known of its SHA-256.

    Raises:
        ValueError: if the hash is not the Hub's.
    """
    if Path(name).is_file():
        return Path(name), f"{sha256(Path(name))} (a local file, compared with nothing)"
    repository, _, file = name.rpartition("/")
    path = Path(hf_hub_download(repository, file))
    digest = sha256(path)
    try:
        entry = HfApi().get_paths_info(repository, file)[0]
    except Exception as error:  # of requests or httpx, as huggingface_hub is older or newer: a node without a network
        return path, f"{digest} (not compared, the Hub cannot be asked: {first_line(error)})"
    expected = entry.lfs.sha256 if entry.lfs else None  # the Hub has one of every large file
    if expected not in (None, digest):
        raise ValueError(f"{path} has the SHA-256 {digest}, the Hub's file {expected}: delete it and try again")
    return path, f"{digest} ({'as the Hub has it' if expected else 'the Hub has none to compare'})"


def run(script: str, *arguments: object) -> None:
    """Show a command of this project and run it on all GPUs.

    Raises:
        CalledProcessError: if it fails.
    """
    gpus = torch.cuda.device_count()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def verify(args: argparse.Namespace, sampling: list[str]) -> str:
    """The report, as Markdown. Raises ValueError, OSError or CalledProcessError at the first thing that fails."""
    weights = args.model_path or f"{HUB_REPOSITORY}/{RELEASED[args.image_size][0]}"
    model, config = load_model(weights)  # names and shapes of all tensors must be the network's
    path, digest = fetch(weights)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reference = args.reference or cached(REFERENCES[config.image_size])
    create_backend()  # Inception's weights, and the packages that read them, before hours are spent
    folder = args.log_dir or Path(f"logs/verify_{config.image_size}_{args.num_samples}")
    checkpoint = ("--model_path", path, "--model", config.model, "--image_size", config.image_size)
    exact = "tf32" if torch.cuda.is_available() else "fp32"  # as the published samples were made
    named = ("--num_samples", args.num_samples, "--log_dir", folder, "--precision", exact)
    run("sample.py", *checkpoint, *named, *sampling)
    run("evaluations/evaluator.py", reference, *folder.glob("samples_*.npz"), "--json", folder / "scores.json")

    scores, made = (json.loads((folder / name).read_text()) for name in ("scores.json", "manifest.json"))
    paper = ("-",) * len(LABELS) if args.model_path else PAPER[config.image_size]
    rows = [f"| {LABELS[field]} | {value} | {scores[field]:.4f} |" for field, value in zip(LABELS, paper, strict=True)]
    settings = {name: made["settings"][name] for name in ("sampling", "guidance", "precision", "seed")}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = (
        "| | paper, 50,000 samples | here |\n| --- | --- | --- |",
        f"| samples | 50000 | {scores['count']} |",
        *rows,
        f"\n- weights: {weights}, {parameters:,} parameters, loaded strictly\n- SHA-256: {digest}",
        f"- reference: {Path(reference).name}, SHA-256 {sha256(Path(reference))}",
        f"- settings: `{json.dumps(settings)}`",
        f"- {made['made_on']} x {made['processes']}, {made['seconds_per_image']} s per image, {made['versions']}",
        f"- commit {commit or 'unknown'}, warnings: {'; '.join(scores['warnings']) or 'none'}",
    )
    report = "\n".join(lines) + "\n"
    write_atomically(folder / "report.md", report.encode())
    return f"\n{report}\nalso in {folder / 'report.md'}; please share it, whatever it says: docs/verify.md"


@one_sentence("stopped: the same command goes on from here")
def main() -> int:
    """Verify and print; returns the exit code of a command of it that failed."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about, allow_abbrev=False)
    parser.add_argument("--image_size", type=int, choices=PAPER, default=256, help="of the released weights")
    parser.add_argument("--num_samples", type=int, default=10_000, help="50,000 compare with the paper's")
    parser.add_argument("--model_path", help="other weights: a file, or a Hub file owner/repository/name.safetensors")
    parser.add_argument("--reference", type=Path, help="other images to compare with (.npz); default: ADM's, fetched")
    parser.add_argument("--log_dir", type=Path, help="default: logs/verify_SIZE_SAMPLES")
    try:
        print(verify(*parser.parse_known_args()))
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode in (2, 130) else 1  # it has printed what is wrong
    return 0
