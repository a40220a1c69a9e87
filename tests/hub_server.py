"""A model hub in this process: the endpoints that the real `huggingface_hub` client calls to push and to load.

    with HubServer() as hub:
        ...  # a process with HF_ENDPOINT=hub.endpoint and HF_TOKEN=hub.token

It checks what the real one checks: a token for everything that writes, metadata that is YAML, large files uploaded
under the hash and size of their content before a commit names them. Commits are whole and kept for ever. Whatever it
does not know is answered 404 and noted in `refused`, so that a test sees a client that calls something new.
"""

import asyncio
import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field

import yaml
from aiohttp import web
from huggingface_hub.utils import validate_repo_id

USER = "tester"


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model repository with one branch."""

    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        """The commit of a revision: `main` or a hash."""
        return self.commits[-1] if revision == "main" else next(c for c in self.commits if c.sha == revision)

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the last commit."""
        return self.commits[-1].files


def is_large(content: bytes) -> bool:
    """Binary files are stored by their SHA-256, as the hub does for weights and pictures."""
    return b"\0" in content[:512]


def blob_id(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(content) else blob_id(content)


def failure(status: int, code: str, **details: str) -> web.Response:
    headers = {"X-Error-Code": code, "X-Error-Message": code}
    return web.json_response({"error": code, **details}, status=status, headers=headers)


class HubServer:
    """Runs in a thread of its own between `__enter__` and `__exit__`."""

    token = "hf_local_token"

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.refused: list[str] = []  # requests answered with anything but success or "no such file"
        self._loop = asyncio.new_event_loop()

    def __enter__(self):
        app = web.Application(client_max_size=1 << 30, middlewares=[self._guard])
        repo = "{repo:[^/]+/[^/]+}"
        app.add_routes(
            [
                web.get("/api/whoami-v2", self._whoami),
                web.post("/api/repos/create", self._create),
                web.post("/api/validate-yaml", self._validate_yaml),
                web.post(f"/api/models/{repo}/preupload/{{revision}}", self._preupload),
                web.post(f"/{repo}.git/info/lfs/objects/batch", self._lfs_batch),
                web.put("/objects/{oid}", self._lfs_upload),
                web.post("/objects/{oid}/verify", self._lfs_verify),
                web.post(f"/api/models/{repo}/commit/{{revision}}", self._commit),
                web.get(f"/api/models/{repo}", self._info),
                web.get(f"/api/models/{repo}/revision/{{revision}}", self._info),
                web.get(f"/api/models/{repo}/tree/{{revision}}", self._tree),
                web.get(f"/api/models/{repo}/tree/{{revision}}/{{folder:.+}}", self._tree),
                web.get(f"/{repo}/resolve/{{revision}}/{{path:.+}}", self._resolve),
            ]
        )
        self._runner = web.AppRunner(app, handle_signals=False)
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._run(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._run(site.start())
        self.endpoint = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    def __exit__(self, *exception):
        self._run(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    @web.middleware
    async def _guard(self, request: web.Request, handler) -> web.StreamResponse:
        writes = request.method in ("POST", "PUT") and not request.path.startswith("/objects/")
        if (writes or "whoami" in request.path) and request.headers.get("Authorization") != f"Bearer {self.token}":
            response = failure(401, "Unauthorized")
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = failure(error.status, error.reason)
            except (KeyError, StopIteration) as error:
                response = failure(404, "RepoNotFound" if isinstance(error, KeyError) else "RevisionNotFound")
        # A client asks for files that a repository may have, and creates repositories that exist.
        if response.status >= 400 and response.headers.get("X-Error-Code") not in ("EntryNotFound", "Exists"):
            self.refused.append(f"{response.status} {request.method} {request.path_qs}")
        return response

    def _repo(self, request: web.Request) -> Repository:
        return self.repos[request.match_info["repo"]]

    async def _whoami(self, request: web.Request) -> web.Response:
        return web.json_response({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            return failure(409, "Exists", url=url)
        self.repos[repo_id] = Repository()
        self.repos[repo_id].commit("initial commit", {".gitattributes": b""})
        return web.json_response({"url": url, "name": repo_id})

    async def _validate_yaml(self, request: web.Request) -> web.Response:
        content = (await request.json())["content"]
        try:
            _, metadata, _ = content.split("---\n", 2)
            metadata = yaml.safe_load(metadata)
            tags, datasets = metadata["tags"], metadata.get("datasets", [])
            for name in [datasets] if isinstance(datasets, str) else datasets:
                validate_repo_id(name)
            if not all(isinstance(tag, str) for tag in tags):
                raise ValueError(f"tags are {tags}")
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:  # also where a dataset is no id
            return web.json_response({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        return web.json_response({"errors": [], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.Response:
        self._repo(request)
        files = (await request.json())["files"]
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(base64.b64decode(file["sample"])) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        return web.json_response({"files": answer})

    async def _lfs_batch(self, request: web.Request) -> web.Response:
        self._repo(request)
        objects = []
        for wanted in (await request.json())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                href = f"{self.endpoint}/objects/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _lfs_upload(self, request: web.Request) -> web.Response:
        content = await request.read()
        if hashlib.sha256(content).hexdigest() != request.match_info["oid"]:
            return failure(400, "WrongHash")
        self.objects[request.match_info["oid"]] = content
        return web.Response()

    async def _lfs_verify(self, request: web.Request) -> web.Response:
        asked = await request.json()
        return web.Response() if len(self.objects[asked["oid"]]) == asked["size"] else failure(400, "WrongSize")

    async def _commit(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        files, message = dict(repo.at(request.match_info["revision"]).files), ""
        for line in (await request.text()).splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:  # deletions and copies: nothing here pushes any
                return failure(400, f"Unknown operation {key}")
        commit = repo.commit(message, files)
        url = f"{self.endpoint}/{request.match_info['repo']}/commit/{commit.sha}"
        return web.json_response({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    async def _info(self, request: web.Request) -> web.Response:
        commit = self._repo(request).at(request.match_info.get("revision", "main"))
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return web.json_response(
            {"id": request.match_info["repo"], "sha": commit.sha, "private": False, "tags": [], "siblings": siblings}
        )

    async def _tree(self, request: web.Request) -> web.Response:
        files = self._repo(request).at(request.match_info["revision"]).files
        folder = request.match_info.get("folder", "")
        prefix = f"{folder}/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(prefix)}
        if not below:
            return failure(404, "EntryNotFound")
        recursive = request.query.get("recursive", "").lower() in ("1", "true")
        entries = {}
        for path, content in sorted(below.items()):
            first, _, rest = path.removeprefix(prefix).partition("/")
            if rest:
                entries[prefix + first] = {"type": "directory", "path": prefix + first, "oid": blob_id(b""), "size": 0}
            if recursive or not rest:
                entry = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
                if is_large(content):
                    entry["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 130}
                entries[path] = entry
        return web.json_response(list(entries.values()))

    async def _resolve(self, request: web.Request) -> web.Response:
        commit = self._repo(request).at(request.match_info["revision"])
        content = commit.files.get(request.match_info["path"])
        if content is None:
            return failure(404, "EntryNotFound")
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit.sha}
        return web.Response(body=content, headers=headers, content_type="application/octet-stream")
