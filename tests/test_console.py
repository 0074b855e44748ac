"""What commands print: one line stays one line whatever names hold, and bars are lines where there is no terminal."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from diffit.cli.sample import parse_sample
from diffit.system.console import printable, say

NASTY = "a\x1b[2Jb\nc\rd\x07\u202e"


def test_nothing_from_outside_reaches_a_terminal_raw(capsys):
    assert printable(NASTY) == r"a\x1b[2Jb\nc\rd\x07\u202e"
    assert printable("Äpfel 苹果 🍎") == "Äpfel 苹果 🍎"
    say(NASTY, "next")
    assert capsys.readouterr().out == printable(NASTY) + "\nnext\n"


@pytest.mark.parametrize("flag", ["--model", "--model_path", "--class_labels"])
def test_a_name_in_an_error(flag, capsys):
    from diffit.sampling.generate import generate

    with pytest.raises((SystemExit, ValueError)) as caught:
        generate(parse_sample([flag, NASTY, "--device", "cpu"]))
    if isinstance(caught.value, SystemExit):
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert printable(NASTY) in error


BARS = """
import diffit.system.console as console, sys, time
console._MINUTE = 0.25
for _ in console.progress(range(60), "steps"): time.sleep(0.01)
for _ in console.progress(range(3), "hidden", show=False): pass
"""


def bars(**environment) -> str:
    command = [sys.executable, "-c", BARS]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stderr


def test_without_a_terminal_a_bar_is_a_line_now_and_then():
    """The first and the last state, and one for each minute (here 0.25 s) in between; none where it is switched off."""
    text = bars()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("steps:   0%")
    assert "60/60" in lines[-1]
    assert 3 <= len(lines) <= 12
    assert bars(TQDM_DISABLE="1") == ""


def test_on_a_terminal_a_bar_stays_on_its_line():
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # tqdm shows nothing in no columns
    subprocess.run([sys.executable, "-c", BARS], stderr=other, check=True)
    os.close(other)
    text = ""
    with contextlib.suppress(OSError):  # at its end, on Linux
        while piece := os.read(main, 1 << 16):
            text += piece.decode()
    assert text.count("\r") > 3
    assert text.count("\n") == 1
