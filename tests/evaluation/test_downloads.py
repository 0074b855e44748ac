"""Fetching from a real server on this machine, and what happens to files that changed."""

import http.server
import re
import threading
from functools import partial

import pytest

from diffit.evaluation import downloads
from diffit.evaluation.downloads import cached, verify


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/remote; its address stands in for the public one."""
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path / "remote"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(downloads.URLS, "file.npz", f"http://127.0.0.1:{server.server_port}/file.npz")
    yield tmp_path / "remote" / "file.npz"
    server.shutdown()
    server.server_close()


def test_fetched_once_and_remembered(server):
    server.write_bytes(b"reference" * 10_000)
    path = cached("file.npz")
    assert path.read_bytes() == server.read_bytes()
    server.unlink()
    assert cached("file.npz") == path
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"altered or damaged.*delete it to have it fetched again"):
        cached("file.npz")


def test_unreachable_files_say_what_to_put_where(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"download http://.*file.npz elsewhere and put it at {tmp_path}") as e:
        cached("file.npz")
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_connection_that_breaks_leaves_nothing(server, tmp_path, monkeypatch):
    server.write_bytes(b"reference" * 10_000)
    send = _Quiet.copyfile
    monkeypatch.setattr(_Quiet, "copyfile", lambda self, source, out: out.write(source.read(1000)) and None)
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        cached("file.npz")
    assert not list((tmp_path / "cache").glob("*"))
    monkeypatch.setattr(_Quiet, "copyfile", send)
    assert cached("file.npz").is_file()


def test_a_hash_in_the_name_counts(tmp_path):
    path = tmp_path / "weights-6726825d.pth"
    path.write_bytes(b"not these")
    with pytest.raises(ValueError, match="expected 6726825d"):
        verify(path)


def test_a_hash_put_beside_the_file_counts(tmp_path):
    path = tmp_path / "graph.pb"
    path.write_bytes(b"abc")
    note = tmp_path / "graph.pb.sha256"
    note.write_text("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  graph.pb\n")
    verify(path)
    note.unlink()
    verify(path)
    assert re.match("ba7816bf8f01cfea", note.read_text())
