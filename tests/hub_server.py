"""As much of the Hugging Face Hub as its client uses to push: accounts, repositories, large files, commits."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

import yaml

TOKEN = "hf_test"


class Hub:
    """What the server knows. `files` has the content of every repository's files."""

    def __init__(self):
        self.account = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
        self.repositories, self.files, self.large, self.requests = {}, {}, {}, []
        self.fails_at = None  # a part of an address, which then gets status 400

    def answer(self, method, path, body, token):
        """Returns the status and the values of the answer."""
        self.requests.append(f"{method} {path}")
        if self.fails_at and self.fails_at in path:
            return 400, {"error": "no room\nfor you"}
        if method == "PUT":
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "unknown token"}
        if path == "/api/whoami-v2":
            return 200, self.account
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/.*)?", path):
            name, rest = found[1], found[2] or ""
            if name not in self.repositories:
                return 404, {"error": "no such repository"}
            if rest.startswith("/preupload"):
                files = json.loads(body)["files"]
                return 200, {"files": [{**file, **self.upload_mode(file["path"])} for file in files]}
            if rest.startswith("/commit"):
                return self.commit(name, [json.loads(line) for line in body.splitlines()])
            return 200, {"id": name, "private": self.repositories[name], "sha": "0" * 40}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self.place(item) for item in json.loads(body)["objects"]]}
        return 404, {"error": "no such address"}

    def create(self, wish):
        name = f"{wish['organization'] or self.account['name']}/{wish['name']}"
        if not name.startswith(("me/", "lab/")):
            return 403, {"error": "not yours"}
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, wish.get("visibility") == "private" or wish.get("private", False))
        return status, {"url": f"{self.address}/{name}"}

    def upload_mode(self, path):
        return {"uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}

    def place(self, item):
        return {**item, "actions": {"upload": {"href": f"{self.address}/upload/{item['oid']}"}}}

    def commit(self, name, lines):
        there = self.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                there[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                there[value["path"]] = content
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextlib.contextmanager
def serve(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, values = hub.answer(self.command, path, body, self.headers.get("Authorization"))
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
