"""A small local server that speaks the Hub's API over HTTP, for tests: what a push and a download need.

``with HubServer() as hub:`` serves on a free port of 127.0.0.1. ``hub.environment`` is what a process needs in its
environment to use it. Repos are dicts of bytes in memory, changed by whole commits only. ``hub.fail[route] = status``
makes a route answer with an error; ``hub.log`` is what was asked.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "x"


class HubServer:
    """See the module's text.

    Attributes:
        repos: ``{repo id: {path: bytes}}``.
        commits: ``{repo id: [header, ...]}``, one header for each commit.
        private: ``{repo id: visibility}`` as asked for.
        objects: LFS objects by sha256.
        fail: ``{route: status}``; routes are create, validate, preupload, lfs, commit, tree, resolve.
        log: ``[(route, method, path), ...]``.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[dict]] = {}
        self.private: dict[str, str | None] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        self.log: list[tuple[str, str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def oid(self, repo: str) -> str:
        """The id of the repo's last commit."""
        return hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", "create", r"/api/repos/create"),
        ("POST", "validate", r"/api/validate-yaml"),
        ("POST", "preupload", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main"),
        ("POST", "commit", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main"),
        ("POST", "lfs", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
        ("PUT", "put", r"/objects/(?P<oid>[0-9a-f]{64})"),
        ("GET", "tree", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+(?P<under>/.+)?"),
        ("GET", "info", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+)?"),
        ("GET", "resolve", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"),
    )

    def log_message(self, *args):
        pass

    def answer(self, value=None, status=200, headers=(), body=None):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, message, code=None):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer({"error": message}, status, headers)

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        matches = ((route, re.fullmatch(pattern, path)) for verb, route, pattern in self.ROUTES if verb == method)
        route, match = next((pair for pair in matches if pair[1]), (None, None))
        if match is None:
            return self.error(404, f"no such route: {self.command} {path}")
        self.hub.log.append((route, self.command, path))
        if route in self.hub.fail:
            status = self.hub.fail[route]
            message = {401: "Invalid credentials in Authorization header", 403: "no write permission"}
            return self.error(status, message.get(status, "something broke"))
        if route not in ("put", "validate") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "Invalid credentials in Authorization header")
        fields = match.groupdict()
        if fields.get("repo") and fields["repo"] not in self.hub.repos:
            return self.error(404, "Repository not found", "RepoNotFound")
        return getattr(self, f"do_{route}")(**fields)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def do_create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repos:
            return self.answer({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repos[repo], self.hub.commits[repo], self.hub.private[repo] = {}, [], asked.get("visibility")
        self.answer({"url": f"{self.hub.url}/{repo}"})

    def do_validate(self):
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no YAML block"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def do_preupload(self, repo):
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in files
        ]
        self.answer({"files": modes})

    def do_lfs(self, repo):
        objects = json.loads(self.body)["objects"]
        upload = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}}
            if o["oid"] not in self.hub.objects
            else o
            for o in objects
        ]
        self.answer({"transfer": "basic", "objects": upload})

    def do_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "the content has another hash")
        self.hub.objects[oid] = self.body
        self.answer({})

    def do_commit(self, repo):
        files, header = dict(self.hub.repos[repo]), None
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return self.error(400, f"unknown operation {key}")
        self.hub.repos[repo] = files
        self.hub.commits[repo].append(header)
        oid = self.hub.oid(repo)
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def do_info(self, repo):
        names = [{"rfilename": name} for name in self.hub.repos[repo]]
        self.answer({"id": repo, "modelId": repo, "sha": self.hub.oid(repo), "siblings": names, "tags": []})

    def do_tree(self, repo, under):
        if under is not None:
            return self.error(404, "no such folder", "EntryNotFound")
        self.answer(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in self.hub.repos[repo].items()
            ]
        )

    def do_resolve(self, repo, revision, file):
        data = self.hub.repos[repo].get(file)
        commit = {"X-Repo-Commit": self.hub.oid(repo)}
        if data is None:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({"error": "Entry not found"}, 404, {**commit, **message})
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Content-Type": "application/octet-stream"}
        self.answer(headers={**commit, **etag}, body=data)
