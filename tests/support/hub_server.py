"""A Hub on this machine: the HTTP API as huggingface_hub's client uses it, and its failures.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=hub.TOKEN).create_repo("org/name")
        hub.fail("commit", "lost")  # the next commit is made, and the answer never arrives

Repositories are git's in miniature: branches of commits of trees of files; a commit is all or
nothing. Large files lie apart, behind another host's name, as on the Hub. Offers no xet.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".bin", ".parquet")
ATTRIBUTES = b"".join(b"*%s filter=lfs\n" % name.encode() for name in LARGE)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


@dataclass(frozen=True)
class File:
    """Of a tree: its bytes, or the digest under which they lie apart."""

    data: bytes
    large: str | None = None

    @property
    def oid(self) -> str:
        """What git calls it."""
        data = self.data
        if self.large:
            data = POINTER.format(self.large, len(data)).encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Tree = dict[str, File]


@dataclass
class Repository:
    private: bool
    gated: bool = False  # whether its files are for those who accept a licence; nobody here has
    commits: dict[str, Tree] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # main, v1, refs/pr/1 -> commit
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, tree: Tree, message: str) -> str:
        oid = hashlib.sha1(secrets.token_bytes(20)).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = tree, message, oid
        return oid


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def reply(data: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(data).encode(), status, {"Content-Type": "application/json"} | headers)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = reply({"error": message}, status, **headers)


@dataclass
class Fault:
    kind: str | int | Callable[[], object]  # a status, one of KINDS, what happens meanwhile
    times: int
    skip: int


KINDS = ("reset", "lost", "cut", "garbage", "slow")
"""Connection broken off before anything is done, after it is done; the answer cut in the middle; an
answer that is not the Hub's; one that comes in drops."""


class HubServer:
    """Serves from `with` to its end; `repos`, `large` and `asked` may be looked into.

    `TOKEN` may write to `org`, `READER` may only read, and nobody else knows either.
    """

    TOKEN, READER = "hf_writes_to_org", "hf_only_reads"

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []  # (route, path)
        self.strangers: list[str] = []  # authorization that reached the host of the large files
        self.faults: dict[str, Fault] = {}
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), self._handler())
        self.server.errors = self.errors = []
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.large_url = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        assert not self.errors, self.errors

    def fail(self, route: str, kind: Any, *, times: int = 1, skip: int = 0) -> None:
        """Let requests of a route (or `any`) fail, `times` times after `skip` good ones."""
        assert route == "any" or route in {name for _, _, name in ROUTES}
        self.faults[route] = Fault(kind, times, skip)

    def routes(self) -> list[str]:
        """What has been asked for, in order."""
        return [route for route, _ in self.asked]

    def state(self) -> Any:
        """All that there is, to be compared."""
        return {
            name: (repo.private, {ref: (oid, repo.commits[oid]) for ref, oid in repo.refs.items()})
            for name, repo in self.repos.items()
        }

    def publish(self, name: str, files: dict[str, bytes], *, gated: bool = False) -> None:
        """Make a public repository of these files; the name of a data set begins with datasets/."""
        repo, tree = Repository(private=False, gated=gated), {}
        for path, data in files.items():
            digest = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else None
            if digest:
                self.large[digest] = data
            tree[path] = File(data, digest)
        repo.commit("main", tree, "initial commit")
        self.repos[name] = repo

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        tree = repo.commits[repo.refs[ref]]
        return {path: file.data for path, file in tree.items() if path != ".gitattributes"}

    # ---- one request

    def _fault(self, route: str) -> Any:
        for name in (route, "any"):
            fault = self.faults.get(name)
            if fault is None:
                continue
            if fault.skip:
                fault.skip -= 1
            elif fault.times:
                fault.times -= 1
                return fault.kind
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or an answer waits 40 ms for its own header

            def handle_request(self) -> None:
                url = urlsplit(self.path)
                if url.path == ASIDE:
                    return self.send(Answer(b"", 404))
                route, names = _route(self.command, unquote(url.path))
                with hub.lock:
                    hub.asked.append((route, self.path))
                    kind = hub._fault(route)
                if callable(kind):
                    kind()
                if kind == "reset":
                    return self.hang_up()
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if isinstance(kind, int):
                    return self.send(Answer(b"<html>trouble</html>", kind, HTML))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with hub.lock:
                    answer = Call(hub, body, parse_qs(url.query), headers).answer(route, names)
                if kind == "lost":
                    return self.hang_up()
                if kind == "garbage":
                    answer = Answer(b"<html>Welcome to the hotel's network</html>", 200, HTML)
                self.send(answer, cut=kind == "cut", slow=kind == "slow")

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

            def send(self, answer: Answer, cut: bool = False, slow: bool = False) -> None:
                self.send_response(answer.status)
                for name, value in (_length(answer) | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                body = b"" if self.command == "HEAD" else answer.body
                if cut:
                    self.wfile.write(body[: len(body) // 2])
                    return self.hang_up()
                size = max(1, len(body) // 5) if slow else max(1, len(body))
                for i in range(0, len(body), size):
                    self.wfile.write(body[i : i + size])
                    time.sleep(0.02 if slow else 0)

            def hang_up(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    errors: list[BaseException | None]

    def handle_error(self, *_: Any) -> None:
        """Keep what went wrong here; that clients hang up is part of the game."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.errors.append(error)


def _length(answer: Answer) -> dict[str, str]:
    return {"Content-Length": str(len(answer.body))}


def _route(method: str, path: str) -> tuple[str, dict[str, str]]:
    """Name of what is asked for, and the names in its path."""
    for known, pattern, route in ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method == known:
            return route, match.groupdict()
    raise AssertionError(f"the Hub has no {method} {path}")


REPO = r"(?P<repo>(?:spaces/)?[^/]+/[^/]+)"  # "spaces/" belongs to its name in `repos`
API = rf"/api/(?:models/|(?=spaces/)){REPO}"
DATASET = r"(?P<repo>datasets/[^/]+/[^/]+)"  # its name in `repos`, too
ROUTES = [  # method, path, name of the method of `Call`
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", rf"{API}(/revision/(?P<ref>.+))?", "model_info"),
    ("GET", rf"/api/{DATASET}(/revision/(?P<ref>.+))?", "model_info"),
    ("GET", rf"{API}/tree/(?P<ref>.+)", "tree"),
    ("GET", rf"{API}/refs", "refs"),
    ("POST", rf"{API}/branch/(?P<ref>.+)", "create_branch"),
    ("DELETE", rf"{API}/branch/(?P<ref>.+)", "delete_branch"),
    ("POST", rf"{API}/preupload/(?P<ref>.+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<ref>.+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "verify"),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET", r"/large/(?P<oid>[0-9a-f]{64})", "download"),
    ("HEAD", rf"/{DATASET}/resolve/(?P<ref>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{DATASET}/resolve/(?P<ref>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{REPO}/resolve/(?P<ref>[^/]+|refs/pr/\d+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{REPO}/resolve/(?P<ref>[^/]+|refs/pr/\d+)/(?P<path>.+)", "resolve"),
]
ASIDE = "/api/agent-harnesses"  # the client asks on its own account, once a day
HTML = {"Content-Type": "text/html"}


@dataclass
class Call:
    """One request; a method for each route."""

    hub: HubServer
    body: bytes
    query: dict[str, list[str]]
    headers: dict[str, str]  # by small letters

    def answer(self, route: str, names: dict[str, str]) -> Answer:
        try:
            return getattr(self, route)(**names)
        except Refusal as refusal:
            return refusal.answer

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    # ---- who may what

    def _check_token(self) -> None:
        if self.token not in ("", self.hub.TOKEN, self.hub.READER):
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _check_writer(self, name: str) -> None:
        self._check_token()
        if not self.token:
            raise Refusal(401, "Invalid username or password.")
        if self.token != self.hub.TOKEN or not name.removeprefix("spaces/").startswith("org/"):
            raise Refusal(403, "You don't have the rights to write there")

    def _repo(self, name: str) -> Repository:
        self._check_token()
        repo = self.hub.repos.get(name)
        hidden = repo is not None and repo.private and self.token != self.hub.TOKEN
        if repo is None or hidden:
            status = 404 if self.token else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        return repo

    def _oid(self, repo: Repository, ref: str) -> str:
        if ref in repo.commits:
            return ref
        if ref not in repo.refs:
            raise Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return repo.refs[ref]

    # ---- repositories

    def create(self) -> Answer:
        name = self._named()
        assert name.startswith("spaces/") == ("sdk" in self.json)  # a Space needs one
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo")
        self._check_writer(name)
        repo = Repository(private=self.json.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(ATTRIBUTES)}, "initial commit")
        self.hub.repos[name] = repo
        return reply({"url": f"{self.hub.url}/{name}", "name": name})

    def _named(self) -> str:
        """Name in `repos` of the repository that is created or deleted."""
        kind = "spaces/" if self.json.get("type") == "space" else ""
        return f"{kind}{self.json['organization']}/{self.json['name']}"

    def delete(self) -> Answer:
        name = self._named()
        self._repo(name)
        self._check_writer(name)
        del self.hub.repos[name]
        return Answer()

    def model_info(self, repo: str, ref: str | None) -> Answer:
        found = self._repo(repo)
        oid = self._oid(found, ref or "main")
        siblings = [{"rfilename": path} for path in found.commits[oid]]
        if "blobs" in self.query:
            for sibling, file in zip(siblings, found.commits[oid].values(), strict=True):
                sibling |= {"size": len(file.data), "blobId": file.oid} | _lfs(file, "sha256")
        info = {"id": repo, "sha": oid, "private": found.private, "siblings": siblings}
        card = found.commits[oid].get("README.md", File(b"")).data.decode()
        info["cardData"] = yaml.safe_load(card.split("---\n")[1]) if "---\n" in card else {}
        return reply(info | {"tags": [], "downloads": 0})

    def tree(self, repo: str, ref: str) -> Answer:
        found = self._repo(repo)
        files = found.commits[self._oid(found, ref)]
        return reply(
            [
                {"type": "file", "path": p, "size": len(f.data), "oid": f.oid} | _lfs(f, "oid")
                for p, f in files.items()
            ]
        )

    def refs(self, repo: str) -> Answer:
        found = self._repo(repo).refs
        pulls = [
            {"name": name.rpartition("/")[2], "ref": name, "targetCommit": oid}
            for name, oid in found.items()
            if name.startswith("refs/")
        ]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in found.items()
            if not name.startswith("refs/")
        ]
        return reply({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def create_branch(self, repo: str, ref: str) -> Answer:
        found = self._repo(repo)
        self._check_writer(repo)
        if ref in found.refs:
            raise Refusal(409, "Reference already exists")
        found.refs[ref] = self._oid(found, self.json.get("startingPoint", "main"))
        return reply({})

    def delete_branch(self, repo: str, ref: str) -> Answer:
        found = self._repo(repo)
        self._check_writer(repo)
        del found.refs[ref]
        return reply({})

    # ---- commits

    def validate_yaml(self) -> Answer:
        _, front, *_ = [*self.json["content"].split("---\n"), "", ""]
        try:
            meta = yaml.safe_load(front)
            problem = None if isinstance(meta, dict | None) else "it is no mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            return reply({"errors": [{"message": problem}], "warnings": []}, 400)
        return reply({"errors": [], "warnings": []})

    def preupload(self, repo: str, ref: str) -> Answer:
        found = self._repo(repo)
        if "create_pr" not in self.query:
            self._check_writer(repo)
        there = found.commits[self._oid(found, ref)]
        files = []
        for file in self.json["files"]:
            path, old = file["path"], there.get(file["path"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = (old.large or old.oid) if old else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return reply({"files": files})

    def batch(self, repo: str) -> Answer:
        self._repo(repo)
        assert "basic" in self.json["transfers"]
        objects = []
        for asked in self.json["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.large_url}/large/{asked['oid']}"},
                "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"},
            }
            there = asked["oid"] in self.hub.large
            objects.append(asked | ({} if there else {"actions": actions}))
        return reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> Answer:
        self._note_stranger()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced")
        self.hub.large[oid] = self.body
        return Answer()

    def verify(self, repo: str) -> Answer:
        self._check_writer(repo)
        if len(self.hub.large.get(self.json["oid"], b"")) != self.json["size"]:
            raise Refusal(422, "The file has not arrived")
        return reply({})

    def commit(self, repo: str, ref: str) -> Answer:
        found = self._repo(repo)
        asks = "create_pr" in self.query
        if not asks:
            self._check_writer(repo)
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        oid = self._oid(found, ref)
        if header["value"].get("parentCommit", oid) != oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(found.commits[oid])
        for change in changes:
            self._apply(tree, change["key"], change["value"])
        number = sum(name.startswith("refs/pr/") for name in found.refs) + 1
        target = f"refs/pr/{number}" if asks else ref
        new = found.commit(target, tree, header["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{new}", "commitOid": new}
        if asks:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        return reply(answer)

    def _apply(self, tree: Tree, key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            tree[path] = File(self.hub.large[value["oid"]], large=value["oid"])
        elif key == "deletedFile":
            if path not in tree:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            del tree[path]
        else:
            raise AssertionError(f"the Hub's commit knows no {key}")

    # ---- files

    def resolve(self, repo: str, ref: str, path: str) -> Answer:
        found = self._repo(repo)
        if found.gated:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        oid = self._oid(found, ref)
        if path not in found.commits[oid]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = found.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.large or file.oid}"'}
        if not file.large:
            return self._range(file.data, headers)
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": headers["ETag"]}
        return Answer(b"", 302, headers | {"Location": f"{self.hub.large_url}/large/{file.large}"})

    def download(self, oid: str) -> Answer:
        self._note_stranger()
        return self._range(self.hub.large[oid], {"ETag": f'"{oid}"'})

    def _note_stranger(self) -> None:
        if self.token:
            self.hub.strangers.append(self.token)

    def _range(self, data: bytes, headers: dict[str, str]) -> Answer:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        if asked is None:
            return Answer(data, 200, headers)
        start = int(asked[1])
        part = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return Answer(data[start:], 206, headers | {"Content-Range": part})


def _lfs(file: File, digest: str) -> dict[str, Any]:
    """What the API says of a file that lies apart."""
    if not file.large:
        return {}
    pointer = POINTER.format(file.large, len(file.data))
    size = {"size": len(file.data), "pointerSize": len(pointer)}
    return {"lfs": {digest: file.large} | size}
