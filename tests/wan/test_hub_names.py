"""Names of huggingface.co, against a hub of one repository on this machine."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from config import BadInput
from wan.hub import local

constants = pytest.importorskip("huggingface_hub.constants")
FILES = {"transformer/a.safetensors": b"weights", "vae/config.json": b"{}", "assets/film.mp4": b"large"}


class Hub(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        path, name = self.path.partition("?")[0], self.path.rpartition("/resolve/")[2].partition("/")[2]
        sha, headers = "a" * 40, {}
        entries = [{"type": "file", "path": k, "size": len(v), "oid": sha} for k, v in FILES.items()]
        facts = {"id": "o/wan", "sha": sha, "siblings": [{"rfilename": k} for k in FILES]}
        body = json.dumps(entries if "/tree/" in path else facts).encode()
        if "/resolve/" in path:
            body = FILES.get(name, b"")
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha}
            headers |= {} if name in FILES else {"X-Error-Code": "EntryNotFound"}
            self.asked.append(f"{self.command} {name}")
        elif not path.startswith("/api/models/o/wan"):
            headers = {"X-Error-Code": "RepoNotFound"}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", at)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    Hub.asked.clear()
    yield server
    server.shutdown(), server.server_close()


def test_a_name_becomes_a_folder(hub):
    """Only what is needed; from the cache when it is asked for again, also without a network."""
    folder = Path(local("o/wan"))
    assert (folder / "transformer/a.safetensors").read_bytes() == b"weights"
    assert (folder / "vae").is_dir() and not (folder / "assets").exists()
    got = [word for word in Hub.asked if word.startswith("GET")]
    assert sorted(got) == ["GET transformer/a.safetensors", "GET vae/config.json"]
    assert local("o/wan") == str(folder) and len([w for w in Hub.asked if w.startswith("GET")]) == 2
    assert Path(local("o/wan:transformer/a.safetensors")).read_bytes() == b"weights"
    hub.shutdown(), hub.server_close()
    assert local("o/wan") == str(folder)


def test_part_of_a_repository(hub):
    assert not (Path(local("o/wan", ("vae",))) / "transformer").exists()


@pytest.mark.parametrize("name", ["o/gone", "o/wan:gone.pt"])
def test_what_is_not_there(hub, name):
    with pytest.raises(BadInput, match="not here, and could not be fetched"):
        local(name)


def test_what_is_here_is_not_asked_for(hub, monkeypatch, tmp_path):
    (tmp_path / "o" / "wan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["o/wan", "/nowhere", "model.pt", "", "a/b/c"]
    assert [local(name) for name in names] == names and not Hub.asked
