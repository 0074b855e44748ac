"""What the documents name exists: files, folders, the extras of pip install; constraints name all dependencies."""

import re
from importlib.metadata import metadata, requires

import pytest

from tests.conftest import ROOT

PAGES = sorted(str(path.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md") for path in ROOT.glob(pattern))
FOLDERS = ("diffit", "docs", "evaluations", "tests", "tools")
SOURCES = [
    path for folder in FOLDERS for kind in ("md", "py", "sh", "ipynb") for path in (ROOT / folder).rglob(f"*.{kind}")
]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\":]+)\"", text)
    missing = [a or b for a, b in links if not (ROOT / page).parent.joinpath(a or b).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    """Paths from the project's root, in code spans and commands; capitals stand for what a reader puts there."""
    folders = "|".join((*FOLDERS, "configs", "slurm"))
    named = re.findall(
        rf"(?<![\w/.])(?:{folders})/[a-z0-9_./]+\.(?:py|yaml|sh|md|png|safetensors|npz|ipynb)",
        (ROOT / page).read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_extras_that_are_named_exist():
    extras = set(metadata("diffit").get_all("Provides-Extra"))
    named = {}
    for path in (*ROOT.glob("*.*"), *SOURCES):
        for extra in re.findall(r"(?:diffit|\.)\[([a-z]+)\]", path.read_text()) if path.is_file() else ():
            named.setdefault(extra, path)
    assert {"test", "eval", "tensorflow"} <= named.keys()
    assert {extra: path for extra, path in named.items() if extra not in extras} == {}


def test_constraints_are_names_and_versions_of_all_that_the_tests_need():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    needed = [line for line in requires("diffit") if "extra ==" not in line or re.search("extra == .test.", line)]
    assert {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in needed} <= pinned
