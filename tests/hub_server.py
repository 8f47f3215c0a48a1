"""A server that speaks the Hub's protocol on loopback: git repositories by GitPython, large files by giftless.

    python -m tests.hub_server FOLDER PORT

Tokens are `token-USER`; `tests/test_hub.py` starts it. A request that has the text of the file `dies_at` in it ends
the server. It holds what the client of huggingface_hub needs to create repositories and branches, to commit, and to
load models and data sets by name.
"""

import base64
import contextlib
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import git
from flask import Flask, Response, jsonify, request, send_file
from giftless.app import init_app
from giftless.auth.identity import DefaultIdentity
from werkzeug.serving import run_simple

from .processes import ROOT


LARGE = (".safetensors", ".bin", ".png")  # to the LFS server, as the Hub's .gitattributes has it
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"


class Refusal(Exception):
    """An answer with the Hub's error code."""

    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.code = status, code


class Anybody(DefaultIdentity):
    """May do all with large files: who holds an object's address was sent there by the commit's route."""

    def is_authorized(self, *args, **kwargs) -> bool:
        return True


def anybody(request) -> Anybody:
    return Anybody(name="anybody")


def named(kind: str, owner: str, name: str) -> str:
    """How a repository of `models` or `datasets` goes by."""
    return f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"


class Store:
    """Bare repositories in a folder, each with a file that says whether it is private.

    They go by `owner/name`, or `datasets/owner/name`, as in the addresses of their files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.large = folder / "large"

    def path(self, repo_id: str) -> Path:
        return self.folder / "repositories" / f"{repo_id}.git"

    def create(self, repo_id: str, private: bool) -> None:
        repo = git.Repo.init(self.path(repo_id), bare=True, initial_branch="main")
        (self.path(repo_id) / "private").write_text(json.dumps(private))
        self.commit(repo, "main", "initial commit", {".gitattributes": b""}, [])

    def open(self, repo_id: str, user: str | None) -> git.Repo:
        """As on the Hub, who may not see a repository is told that it does not exist."""
        path = self.path(repo_id)
        if not path.exists() or (self.is_private(repo_id) and user != repo_id.split("/")[-2]):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository Not Found")
        return git.Repo(path)

    def is_private(self, repo_id: str) -> bool:
        return json.loads((self.path(repo_id) / "private").read_text())

    def find(self, repo: git.Repo, revision: str) -> git.Commit:
        try:
            return repo.commit(revision)
        except (git.BadName, ValueError, git.GitCommandError) as error:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}") from error

    def commit(self, repo: git.Repo, branch: str, message: str, files: dict[str, bytes], deleted: list[str]) -> str:
        """One commit on a branch, through an index of its own."""
        with tempfile.TemporaryDirectory() as folder:
            environment = {
                "GIT_INDEX_FILE": str(Path(folder) / "index"),
                **{f"GIT_{who}_{what}": "hub" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            }
            parents = [repo.heads[branch].commit.hexsha] if branch in repo.heads else []
            with repo.git.custom_environment(**environment):
                if parents:
                    repo.git.read_tree(parents[0])
                for name, content in files.items():
                    path = Path(folder) / "content"
                    path.write_bytes(content)
                    oid = repo.git.hash_object("-w", str(path))
                    repo.git.update_index("--add", "--cacheinfo", f"100644,{oid},{name}")
                for name in deleted:
                    repo.git.update_index("--force-remove", name)
                arguments = [repo.git.write_tree(), "-m", message, *(x for p in parents for x in ("-p", p))]
                oid = repo.git.commit_tree(*arguments)
            repo.git.update_ref(f"refs/heads/{branch}", oid)
        return oid


def files_of(commit: git.Commit) -> list[dict]:
    found = []
    for blob in commit.tree.traverse():
        if blob.type == "blob":
            entry = {"type": "file", "path": blob.path, "rfilename": blob.path, "oid": blob.hexsha, "size": blob.size}
            content = blob.data_stream.read() if blob.size < 200 else b""
            if content.startswith(b"version https://git-lfs"):
                oid, size = (line.split(b" ")[1].decode() for line in content.splitlines()[1:3])
                oid = oid.removeprefix("sha256:")
                entry |= {"size": int(size), "lfs": {"oid": oid, "sha256": oid, "size": int(size), "pointerSize": 130}}
            found.append(entry)
    return found


def make_app(folder: Path, address: str):
    store, app = Store(folder), Flask("hub")

    def user() -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and not token.startswith("token-"):
            raise Refusal(401, "", "Invalid user token.")
        return token.removeprefix("token-") or None

    def writer(repo_id: str) -> git.Repo:
        repo = store.open(repo_id, user())
        if user() != repo_id.split("/")[-2]:
            raise Refusal(403 if user() else 401, "", "You don't have the rights to write there")
        return repo

    @app.errorhandler(Refusal)
    def refuse(error: Refusal):
        headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
        return jsonify(error=str(error)), error.status, headers

    @app.get("/api/whoami-v2")
    def whoami():
        if user() is None:
            raise Refusal(401, "", "Invalid username or password.")
        return jsonify(type="user", name=user(), orgs=[], auth={"accessToken": {"role": "write"}})

    @app.post("/api/repos/create")
    def create():
        name, owner = request.json["name"], request.json.get("organization") or user()
        if user() is None:
            raise Refusal(401, "", "Invalid username or password.")
        if owner != user():
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = named(f"{request.json.get('type', 'model')}s", owner, name)
        if store.path(repo_id).exists():
            return jsonify(error="You already created this repo", url=f"{address}/{repo_id}"), 409
        private = request.json.get("private") or request.json.get("visibility") == "private"
        store.create(repo_id, bool(private))
        return jsonify(url=f"{address}/{repo_id}", name=repo_id, id=repo_id)

    @app.post("/api/validate-yaml")
    def validate():
        return jsonify(errors=[], warnings=[])

    @app.get("/api/<kind>/<owner>/<name>")
    @app.get("/api/<kind>/<owner>/<name>/revision/<path:revision>")
    def info(kind, owner, name, revision="main"):
        repo_id = named(kind, owner, name)
        commit = store.find(store.open(repo_id, user()), revision)
        keys = {"id": f"{owner}/{name}", "sha": commit.hexsha, "private": store.is_private(repo_id)}
        return jsonify(**keys, tags=[], downloads=0, likes=0, siblings=files_of(commit))

    @app.get("/api/<kind>/<owner>/<name>/tree/<revision>")
    @app.get("/api/<kind>/<owner>/<name>/tree/<revision>/<path:below>")
    def tree(kind, owner, name, revision, below=""):
        commit = store.find(store.open(named(kind, owner, name), user()), revision)
        folders = [
            {"type": "directory", "path": folder.path, "oid": folder.hexsha, "size": 0}
            for folder in commit.tree.traverse()
            if folder.type == "tree"
        ]
        entries = [entry for entry in folders + files_of(commit) if Path(below) in Path(entry["path"]).parents]
        if request.args.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if Path(entry["path"]).parent == Path(below)]
        if not entries:
            raise Refusal(404, "EntryNotFound", f"{below} does not exist")
        return jsonify(entries)

    @app.post("/api/<kind>/<owner>/<name>/paths-info/<revision>")
    def paths_info(kind, owner, name, revision):
        wanted = request.form.getlist("paths") or (request.get_json(silent=True) or {}).get("paths", [])
        entries = files_of(store.find(store.open(named(kind, owner, name), user()), revision))
        return jsonify([entry for entry in entries if entry["path"] in wanted])

    @app.get("/api/<kind>/<owner>/<name>/refs")
    def refs(kind, owner, name):
        repo = store.open(named(kind, owner, name), user())
        rows = [
            [{"name": r.name, "ref": r.path, "targetCommit": r.commit.hexsha} for r in references]
            for references in (repo.heads, repo.tags)
        ]
        return jsonify(branches=rows[0], tags=rows[1], converts=[])

    @app.post("/api/<kind>/<owner>/<name>/branch/<path:branch>")
    def branch(kind, owner, name, branch):
        repo = writer(named(kind, owner, name))
        if branch in repo.heads:
            raise Refusal(409, "", "Reference already exists")
        repo.create_head(branch, store.find(repo, (request.get_json(silent=True) or {}).get("startingPoint", "main")))
        return jsonify({})

    @app.post("/api/<kind>/<owner>/<name>/tag/<path:revision>")
    def tag(kind, owner, name, revision):
        repo = writer(named(kind, owner, name))
        if request.json["tag"] in repo.tags:
            raise Refusal(409, "", "Tag already exists")
        repo.create_tag(request.json["tag"], store.find(repo, revision))
        return jsonify({})

    @app.post("/api/<kind>/<owner>/<name>/preupload/<path:revision>")
    def preupload(kind, owner, name, revision):
        writer(named(kind, owner, name))
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in request.json["files"]
        ]
        return jsonify(files=modes)

    @app.post("/api/<kind>/<owner>/<name>/commit/<path:revision>")
    def commit(kind, owner, name, revision):
        repo_id = named(kind, owner, name)
        repo, files, deleted, message = writer(repo_id), {}, [], ""
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if not (store.large / repo_id / value["oid"]).exists():
                    raise Refusal(400, "", f"The large file {value['path']} was not uploaded")
                files[value["path"]] = POINTER.format(oid=value["oid"], size=value["size"]).encode()
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        store.find(repo, revision)
        oid = store.commit(repo, revision, message, files, deleted)
        return jsonify(success=True, commitOid=oid, commitUrl=f"{address}/{repo_id}/commit/{oid}", hookOutput="")

    @app.route("/<owner>/<name>/resolve/<revision>/<path:path>", methods=["GET", "HEAD"])
    @app.route("/<kind>/<owner>/<name>/resolve/<revision>/<path:path>", methods=["GET", "HEAD"])
    def resolve(owner, name, revision, path, kind="models"):
        repo_id = named(kind, owner, name)
        commit = store.find(store.open(repo_id, user()), revision)
        entry = next((entry for entry in files_of(commit) if entry["path"] == path), None)
        if entry is None:
            answer = jsonify(error="Entry not found")
            answer.status_code, answer.headers["X-Error-Code"] = 404, "EntryNotFound"
        elif "lfs" in entry:
            answer = send_file(store.large / repo_id / entry["lfs"]["oid"], mimetype="application/octet-stream")
            answer.headers |= {"ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            answer.headers["X-Linked-Size"] = str(entry["size"])
        else:
            content = (commit.tree / path).data_stream.read()
            answer = Response(content, mimetype="application/octet-stream")
            answer.headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        answer.headers["X-Repo-Commit"] = commit.hexsha
        return answer

    return app


def serve(folder: Path, port: int) -> None:
    """Until the process is stopped."""
    address = f"http://127.0.0.1:{port}"
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    storage = {"storage_class": "giftless.storage.local_storage:LocalStorage"}
    storage["storage_options"] = {"path": str(folder / "large")}
    os.environ["GIFTLESS_CONFIG_STR"] = json.dumps(
        {
            "AUTH_PROVIDERS": ["tests.hub_server:anybody"],
            "TRANSFER_ADAPTERS": {
                "basic": {"factory": "giftless.transfer.basic_streaming:factory", "options": storage}
            },
        }
    )
    large = init_app()
    hub = make_app(folder, address)

    def route(environ, start_response):
        """The LFS server's paths have the repository first, so that no prefix tells them apart."""
        path, fatal = environ["PATH_INFO"], folder / "dies_at"
        if fatal.exists() and fatal.read_text() in f"{environ['REQUEST_METHOD']} {path}":
            os._exit(1)  # in the middle of a push
        to = large if ".git/info/lfs" in path or "/objects/" in path else hub
        return to(environ, start_response)

    run_simple("127.0.0.1", port, route, threaded=True)


class Hub:
    """The server in a process of its own, and what a client needs to speak with it."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        with open(self.folder / "server.log", "a") as log:
            command = [sys.executable, "-m", "tests.hub_server", str(self.folder), str(self.port)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text())
            time.sleep(0.05)
        raise RuntimeError("the server does not answer")

    def api(self, user="alice"):
        from huggingface_hub import HfApi  # which looks at the environment when it is imported

        return HfApi(endpoint=self.address, token=f"token-{user}" if user else False)

    def environment(self, home, user="alice"):
        """For a fresh process with empty caches."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        token = {"HF_TOKEN": f"token-{user}"} if user else {}
        hub = {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        return kept | hub | token | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
