"""As much of the Hub as uploads and downloads need, on this machine, to see what huggingface_hub's client does."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


def about(path: str, content: bytes) -> dict[str, Any]:
    """What the Hub says about a file in LFS."""
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": path, "oid": "0" * 40, "size": len(content), "lfs": lfs}


@contextlib.contextmanager
def local_hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a Hub, and the files of all its repositories, committed or put there: path -> content."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content = files[self.path.split("/resolve/main/")[1]]
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files[self.path.split("/resolve/main/")[1]])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                answer = {"url": f"{address}/{name}", "id": name, "name": name}
            elif self.path.startswith("/api/validate-yaml"):
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            elif "/paths-info/" in self.path:
                answer = [about(path, files[path]) for path in parse_qs(body.decode())["paths"]]
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                sent = [line["value"] for line in lines if line["key"] == "file"]
                files.update({file["path"]: base64.b64decode(file["content"]) for file in sent})
                name, oid = self.path.removeprefix("/api/models/").split("/commit/")[0], "0" * 40
                answer = {"commitUrl": f"{address}/{name}/commit/{oid}", "commitOid": oid}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, files
    finally:
        server.shutdown()
        server.server_close()
