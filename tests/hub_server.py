"""A local server with the part of the Hugging Face hub's interface that its client library uses.

It serves files below /resolve/ as the hub does (with the commit, and for large files a redirect
with their sha256), the list of files of a data set, and the requests of an upload.
Nothing leaves the machine.
"""
import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest

LARGE = (".safetensors", ".bin", ".pth", ".parquet")


@contextlib.contextmanager
def serving(patch, folder):
  """Yields a Hub that replaces the real one, with empty caches in a folder."""
  from huggingface_hub import constants

  from vitcompact.hub import download
  from vitcompact.train import start

  server = Hub()
  patch.setenv("HF_ENDPOINT", server.address)
  patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub_cache"))
  patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
  patch.setenv("VITCOMPACT_CACHE", str(folder / "cache"))
  patch.setenv("HF_TOKEN", "hf_none")
  patch.delenv(download.ASK_OFFLINE, raising=False)
  start.by_name.cache_clear()
  yield server
  start.by_name.cache_clear()
  server.close()


@pytest.fixture
def server(monkeypatch, tmp_path):
  """Yields a Hub that replaces the real one, with empty caches."""
  with serving(monkeypatch, tmp_path) as server:
    yield server


class Hub:
  """repos: {"org/name": [{file name: bytes}, ...]}, a dict for each commit, the newest last.

  asked: (method, path) of every request. lies: {sha256: bytes}, served instead of that file.
  """

  def __init__(self):
    self.repos, self.asked, self.lies, self.gated, self.files = {}, [], {}, set(), {}
    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
    port = self.server.server_address[1]
    # Large files are on another host, to which the client follows no redirect in a HEAD request.
    self.address, self.other = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def add(self, repo: str, **files) -> str:
    """Adds a commit with these files besides the earlier ones, and returns its name."""
    files = {name.replace("__", "."): value for name, value in files.items()}
    commits = self.repos.setdefault(repo, [])
    commits.append({**(commits[-1] if commits else {}), **files})
    return self.commit(repo, len(commits) - 1)

  def commit(self, repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

  def gets(self, words: str = "") -> int:
    """Returns the number of files sent whose path contains `words`."""
    return sum(method == "GET" and words in path for method, path in self.asked)

  def close(self):
    self.server.shutdown()
    self.server.server_close()


def _handler(hub: Hub):
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, code=200, body=b"", **headers):
      self.send_response(code)
      for name, value in {"Content-Length": len(body), **headers}.items():
        self.send_header(name.replace("_", "-"), str(value))
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(body)

    def send_file(self, body, **headers):
      """Sends the whole file, or the rest of it if a download resumes."""
      start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
      body, code = body[int(start):], 206 if "Range" in self.headers else 200
      self.answer(code, body, **headers)

    def handle_any(self):
      path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
      hub.asked.append((self.command, path))
      body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
      parts = path.strip("/").split("/")
      if parts[0] == "large":     # the target of a redirect
        known = {_sha256(data): data for commits in hub.repos.values() for files in commits
                 for data in files.values()}
        return self.send_file(hub.lies.get(parts[1], known[parts[1]]), ETag=f'"{parts[1]}"')
      if parts[0] == "files":     # an address outside the hub
        if parts[1] not in hub.files:
          return self.answer(404)
        return self.send_file(hub.files[parts[1]])
      if "resolve" in parts:
        at = parts.index("resolve")
        return self.resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2:]))
      if parts[:2] == ["api", "datasets"]:    # .../revision/NAME, .../tree/NAME
        return self.describe("/".join(parts[1:4]), parts[4], "/".join(parts[5:]))
      return self.upload(path, body)

    def found(self, repo, revision):
      """Returns (commit, its files), or answers that there is none and returns None."""
      commits = hub.repos.get(repo)
      if commits is None:
        return self.answer(404, X_Error_Code="RepoNotFound")
      if repo in hub.gated:
        return self.answer(403, X_Error_Code="GatedRepo")
      names = {hub.commit(repo, i): files for i, files in enumerate(commits)}
      commit = list(names)[-1] if revision == "main" else revision
      if commit not in names:
        return self.answer(404, X_Error_Code="RevisionNotFound")
      return commit, names[commit]

    def describe(self, repo, what, revision):
      if (found := self.found(repo, revision)) is None:
        return
      commit, files = found
      if what == "revision":
        self.reply(id=repo.partition("/")[2], sha=commit,
                   siblings=[{"rfilename": name} for name in files])
      else:
        rows = [{"type": "file", "path": name, "size": len(data), "oid": _blob(data),
                 **({"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 1}}
                    if name.endswith(LARGE) else {})} for name, data in files.items()]
        self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")

    def resolve(self, repo, revision, name):
      if (found := self.found(repo, revision)) is None:
        return
      commit, files = found
      if name not in files:
        return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
      data = files[name]
      if not name.endswith(LARGE):
        return self.send_file(data, ETag=f'"{_blob(data)}"', X_Repo_Commit=commit)
      return self.answer(302, X_Repo_Commit=commit, X_Linked_Etag=f'"{_sha256(data)}"',
                         X_Linked_Size=len(data), Location=f"{hub.other}/large/{_sha256(data)}")

    def upload(self, path, body):
      if path == "/api/repos/create":
        about = json.loads(body)
        repo = f"{about['organization']}/{about['name']}"
        hub.repos.setdefault(repo, [])
        return self.reply(url=f"{hub.address}/{repo}", name=repo)
      repo = "/".join(path.split("/")[3:5])
      if "/preupload/" in path:
        return self.reply(files=[{"path": file["path"], "uploadMode": "regular",
                                  "shouldIgnore": False} for file in json.loads(body)["files"]])
      if "/commit/" in path:
        rows = [json.loads(line) for line in body.splitlines()]
        commit = hub.add(repo, **{row["value"]["path"]: base64.b64decode(row["value"]["content"])
                                  for row in rows if row["key"] == "file"})
        return self.reply(commitUrl=f"{hub.address}/{repo}/commit/{commit}", commitOid=commit,
                          pullRequestUrl=None)
      if path == "/api/validate-yaml":
        return self.reply()
      return self.answer(404)

    def reply(self, **values):
      self.answer(200, json.dumps(values).encode(), Content_Type="application/json")

    do_GET = do_HEAD = do_POST = handle_any

    def log_message(self, *_):
      pass

  return Handler


def _blob(data: bytes) -> str:
  """Returns git's name for a file's content."""
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
