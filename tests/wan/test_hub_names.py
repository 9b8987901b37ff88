"""Names of huggingface.co, against a hub on this machine."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import sample
from config import BadInput
from wan.hub import local

downloads = pytest.importorskip("downloads")
from wan.networks import open_student  # noqa: E402
from wan.videoalign import load_videoalign  # noqa: E402

constants = pytest.importorskip("huggingface_hub.constants")
REPOS = {
    "o/wan": {"transformer/a.safetensors": b"weights", "vae/config.json": b"{}", "assets/film.mp4": b"large"}
}


class Hub(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        path, name = self.path.partition("?")[0], self.path.rpartition("/resolve/")[2].partition("/")[2]
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = REPOS.get(repo, {})
        sha, headers = "a" * 40, {}
        entries = [{"type": "file", "path": k, "size": len(v), "oid": sha} for k, v in files.items()]
        facts = {"id": repo, "sha": sha, "siblings": [{"rfilename": k} for k in files]}
        body = json.dumps(entries if "/tree/" in path else facts).encode()
        if "/resolve/" in path:
            body = files.get(name, b"")
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha}
            headers |= {} if name in files else {"X-Error-Code": "EntryNotFound"}
            self.asked.append(f"{self.command} {name}")
        elif repo not in REPOS:
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
    assert not (Path(local("o/wan", ("vae/*",))) / "transformer").exists()


@pytest.mark.parametrize("name", ["o/gone", "o/wan:gone.pt"])
def test_what_is_not_there(hub, name):
    with pytest.raises(BadInput, match="not here, and could not be fetched"):
        local(name)


def test_what_is_here_is_not_asked_for(hub, monkeypatch, tmp_path):
    (tmp_path / "o" / "wan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["o/wan", "/nowhere", "model.pt", "", "a/b/c"]
    assert [local(name) for name in names] == names and not Hub.asked


def test_the_reward_by_its_name(hub, monkeypatch, tmp_path_factory):
    """Two repositories, of which only what is read comes here, and a template that lies where one is."""
    folder, here = (tmp_path_factory.mktemp(name) for name in ("videoreward", "here"))
    downloads.videoreward(folder)
    held = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    qwen = {k.partition("/")[2]: x for k, x in held.items() if k.startswith("Qwen")}
    own = {k: x for k, x in held.items() if k == "model_config.json" or "/model.pth" in k}
    monkeypatch.setitem(REPOS, "KwaiVGI/VideoReward", own | {"optimizer.bin": b"large"})
    monkeypatch.setitem(REPOS, "Qwen/Qwen2-VL-2B-Instruct", qwen | {"model.safetensors": b"large"})
    monkeypatch.chdir(here)
    with pytest.raises(BadInput, match="prompt_template.py"):
        load_videoalign("KwaiVGI/VideoReward", 16)
    (here / "prompt_template.py").write_text((folder / "prompt_template.py").read_text())
    video01 = torch.rand(1, 9, 3, 60, 104)
    with torch.no_grad():
        one, two = (load_videoalign(x, 16)(video01, ["a cat"]) for x in (folder, "KwaiVGI/VideoReward"))
    assert torch.equal(one, two)
    assert not {"GET optimizer.bin", "GET model.safetensors"} & set(Hub.asked)


def test_a_student_by_its_name(hub, tmp_path):
    """Fetched, and then asked how it was trained; one that is nowhere is named."""
    with pytest.raises(BadInput, match="does not name the method"):
        open_student(Path("o/wan:transformer/a.safetensors"), "wan-1.3b", {}, sample.Flags(), None)
    with pytest.raises(BadInput, match="no student at /nowhere"):
        open_student(Path("/nowhere"), "wan-1.3b", {}, sample.Flags(), None)
