"""A tiny Hugging Face hub on this machine: one data set, over HTTP."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/texts"


class Hub(ThreadingHTTPServer):
    """files: path in the repository to content. card: its metadata. commit: of its main branch.
    break_at: where each file breaks off, once or, if it stays broken, always.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], **changes):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.card, self.status = files, None, 200
        self.commit, self.break_at, self.stays_broken = COMMIT, None, False
        vars(self).update(changes)
        self.asked: list[tuple[str, str]] = []  # (path in the repository, range) of each download
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        hub: Hub = self.server
        if path.startswith("/api/datasets/"):
            return self._answer_list(path.removeprefix("/api/datasets/"), hub)
        commit, name = [*re.split("/resolve/([0-9a-f]{40})/", path)[1:], "", ""][:2]
        if name not in hub.files:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = hub.files[name]
        first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if self.headers["Range"] else 200)
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:040x}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Accept-Ranges", "bytes")
        if self.headers["Range"]:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        hub.asked.append((name, self.headers["Range"] or ""))
        if hub.break_at is not None and (hub.stays_broken or first < hub.break_at):
            self.wfile.write(content[first : hub.break_at])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        self.wfile.write(content[first:])
        return None

    def _answer_list(self, path: str, hub: Hub) -> None:
        repository, _, revision = path.partition("/revision/")
        code = "RepoNotFound" if repository != REPOSITORY else "RevisionNotFound" if revision == "none" else ""
        code = {200: code, 403: "GatedRepo"}.get(hub.status, "")
        siblings = [_file(name, content) for name, content in hub.files.items()]
        commit = revision if len(revision) == len(COMMIT) else hub.commit
        body = json.dumps({"id": REPOSITORY, "sha": commit, "siblings": siblings, "cardData": hub.card}).encode()
        self.send_response(hub.status if hub.status != 200 else 404 if code else 200)
        if code:
            self.send_header("X-Error-Code", code)
            body = b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _file(name: str, content: bytes) -> dict:
    """A file of the list. A large one, for which .parquet stands, has a sha256 too."""
    file = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if name.endswith(".parquet"):
        file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return file
