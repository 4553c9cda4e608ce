"""A Hugging Face hub on 127.0.0.1 with one repository, "org/adapter"."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(file: Path) -> str:
    """The name that git gives to the file's content."""
    body = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def hub(directory: Path, revisions: tuple[str, ...] = ("main", COMMIT)) -> Iterator[tuple[str, list[str]]]:
    """Serves the files in ``directory``; yields the endpoint and the list of the files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and parts[2:4] == ["org", "adapter"]:
                if (parts[5] if len(parts) > 5 else "main") not in revisions:
                    self.answer(404, X_Error_Code="RevisionNotFound")
                    return
                files = {str(f.relative_to(directory)): f for f in sorted(directory.rglob("*")) if f.is_file()}
                tree = [
                    {"type": "file", "path": name, "size": f.stat().st_size, "oid": digest(f)}
                    for name, f in files.items()
                ]
                info = {"id": "org/adapter", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                body = json.dumps(tree if parts[4:5] == ["tree"] else info).encode()
                self.answer(200, body, Content_Type="application/json")
            elif parts[:3] == ["org", "adapter", "resolve"] and (file := directory.joinpath(*parts[4:])).is_file():
                body = file.read_bytes()
                if self.command == "GET":
                    fetched.append("/".join(parts[4:]))
                self.answer(200, body, ETag=f'"{digest(file)}"')
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
