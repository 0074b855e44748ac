"""The tools are scripts: their folder is where they import each other from."""

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
