"""A server of this machine that speaks the part of Cloud Storage's JSON API that its clients use for a run.

https://cloud.google.com/storage/docs/json_api. The clients are the real ones: gcsfs (files), google-cloud-storage (what
Orbax asks of a bucket) and TensorStore (arrays). Objects are kept in memory, with generations, preconditions and
CRC-32C; every change is logged, so that a test can go back to what a bucket held at any moment, which is what a process
that is killed then leaves. It knows no users, no quotas, and no storage but that of one process.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email
import http.server
import itertools
import json
import re
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import fsspec
import google_crc32c
import pytest

# Of all buckets: clients keep what they have read, and ask whether its generation is still the newest.
_GENERATIONS = itertools.count(1)

# Objects and folders of one answer to a listing; small, so that clients have to ask for the next page.
PAGE = 7


@dataclasses.dataclass(frozen=True)
class Object:
    """What is kept of an object. generation: which write made it."""

    content: bytes
    generation: int


class Bucket:
    """Objects by name, the log of their changes, and what is refused.

    url: of the bucket. log: (name, Object) of a write and (name, None) of a removal, in order. refuse: a write of a
    name that holds one of these is answered with 403. lost: so is every request, as where access was taken away.
    """

    def __init__(self, name: str) -> None:
        self.name, self.url = name, f"gs://{name}"
        self.objects: dict[str, Object] = {}
        self.log: list[tuple[str, Object | None]] = []
        self.refuse: tuple[str, ...] = ()
        self.lost = False
        self.lock = threading.RLock()

    def write(self, name: str, content: bytes) -> Object:
        found = Object(content, next(_GENERATIONS))
        self.objects[name] = found
        self.log.append((name, found))
        return found

    def remove(self, name: str) -> None:
        del self.objects[name]
        self.log.append((name, None))

    def go_back(self, changes: int) -> None:
        """To what the bucket held after so many changes; what came after is forgotten."""
        with self.lock:
            self.log, self.objects = self.log[:changes], {}
            for name, found in self.log:
                if found is None:
                    del self.objects[name]
                else:
                    self.objects[name] = found

    def list(self, prefix: str, delimiter: str, start: str, end: str, after: str) -> tuple[list, list, str]:
        """Names of objects, folders, and where the next page begins ("": nowhere)."""
        entries = {}
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            folder = delimiter and delimiter in rest
            key = prefix + rest.partition(delimiter)[0] + delimiter if folder else name
            entries[key] = bool(folder)
        keys = [key for key in sorted(entries) if key > after]
        page, more = keys[:PAGE], keys[PAGE:]
        names, folders = [k for k in page if not entries[k]], [k for k in page if entries[k]]
        return names, folders, page[-1] if more else ""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer leaves in one piece and at once; in two, each would wait 40 ms for the acknowledgement of the first.
    wbufsize, disable_nagle_algorithm = -1, True

    def log_message(self, *_) -> None:  # a test's output is no access log
        return

    def do_GET(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def do_DELETE(self):
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, answer = self._answer(method, self.path, dict(self.headers), body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(
            ConnectionError
        ):  # gcsfs asks twice at once, and leaves when it has one answer
            self.wfile.write(answer)
            self.wfile.flush()

    def _answer(self, method: str, url: str, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        parsed = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in headers.items()}
        if parsed.path.startswith("/batch/"):
            return self._batch(headers, body)
        found = re.fullmatch(
            r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:/(rewriteTo/b/[^/]+|moveTo)/o/([^/]+))?)?)?/?",
            parsed.path,
        )
        if found is None:
            return _error(404, f"no such resource: {parsed.path}")
        kind, bucket, name, how, target = found.groups()
        name, target = (part and urllib.parse.unquote(part) for part in (name, target))
        if bucket != self.server.bucket.name:
            return _error(404, "The specified bucket does not exist.")
        if self.server.bucket.lost:
            return _error(403, f"the account may not use {bucket}")
        objects_ = re.search(r"/o(/|$)", parsed.path) is not None
        with self.server.bucket.lock:
            if kind == "upload":
                return self._upload(method, query, headers, body)
            if not objects_:
                return _json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "HERE"})
            if name is None:
                return self._list(query)
            if target is not None:
                return self._copy(name, target, move=how == "moveTo")
            return self._delete(name) if method == "DELETE" else self._get(name, query, headers)

    def _list(self, query: dict) -> tuple[int, dict, bytes]:
        names, folders, token = self.server.bucket.list(
            query.get("prefix", ""),
            query.get("delimiter", ""),
            query.get("startOffset", ""),
            query.get("endOffset", ""),
            query.get("pageToken", ""),
        )
        found = {"kind": "storage#objects", "items": [self._metadata(name) for name in names]}
        found |= {"prefixes": folders} if folders else {}
        return _json(found | ({"nextPageToken": token} if token else {}))

    def _get(self, name: str, query: dict, headers: dict) -> tuple[int, dict, bytes]:
        found = self.server.bucket.objects.get(name)
        if found is None:
            return _error(404, f"No such object: {name}")
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found.generation:
            return _error(412, "generation")
        if int(query.get("ifGenerationNotMatch", -1)) == found.generation:
            return 304, {}, b""
        if query.get("alt") != "media":
            return _json(self._metadata(name))
        kept = {"x-goog-generation": str(found.generation), "x-goog-hash": f"crc32c={_crc32c(found.content)}"}
        kept["Content-Type"] = "application/octet-stream"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
        if asked is None:
            return 200, kept, found.content
        size = len(found.content)
        if not asked[1]:
            first, last = max(size - int(asked[2]), 0), size - 1
        else:
            first, last = int(asked[1]), min(int(asked[2]) if asked[2] else size - 1, size - 1)
        if first >= size:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        return 206, kept | {"Content-Range": f"bytes {first}-{last}/{size}"}, found.content[first : last + 1]

    def _upload(self, method: str, query: dict, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        if "upload_id" in query:
            return self._continue_upload(query["upload_id"], headers, body)
        metadata, content = ({}, body)
        if query["uploadType"] == "multipart":
            metadata, content = _parts(headers["content-type"], body)
            metadata = json.loads(metadata)
        if query["uploadType"] == "resumable":
            metadata = json.loads(body or b"{}")
            name = query.get("name") or metadata["name"]
            number = str(len(self.server.uploads))
            self.server.uploads[number] = (name, query.get("ifGenerationMatch"), bytearray())
            host = f"http://{headers['host']}"
            place = f"{host}/upload/storage/v1/b/{self.server.bucket.name}/o?uploadType=resumable&upload_id={number}"
            return 200, {"Location": place}, b""
        return self._write(query.get("name") or metadata["name"], query.get("ifGenerationMatch"), content)

    def _continue_upload(self, number: str, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        name, generation, so_far = self.server.uploads[number]
        so_far += body
        whole = headers.get("content-range", "").rpartition("/")[2]
        if whole.isdecimal() and len(so_far) == int(whole):
            return self._write(name, generation, bytes(so_far))
        return 308, {"Range": f"bytes=0-{len(so_far) - 1}"} if so_far else {}, b""

    def _write(self, name: str, generation: str | None, content: bytes) -> tuple[int, dict, bytes]:
        bucket = self.server.bucket
        if any(part in name for part in bucket.refuse):
            return _error(403, f"the account may not write {name}")
        there = bucket.objects.get(name)
        if generation is not None and int(generation) != (there.generation if there else 0):
            return _error(412, "generation")
        bucket.write(name, content)
        return _json(self._metadata(name))

    def _copy(self, source: str, target: str, *, move: bool) -> tuple[int, dict, bytes]:
        found = self.server.bucket.objects.get(source)
        if found is None:
            return _error(404, f"No such object: {source}")
        self.server.bucket.write(target, found.content)
        if move:
            self.server.bucket.remove(source)
            return _json(self._metadata(target))
        size = str(len(found.content))
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size}
        return _json(done | {"totalBytesRewritten": size, "resource": self._metadata(target)})

    def _delete(self, name: str) -> tuple[int, dict, bytes]:
        if name not in self.server.bucket.objects:
            return _error(404, f"No such object: {name}")
        self.server.bucket.remove(name)
        return 204, {}, b""

    def _batch(self, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        """Requests in the parts of one; each answer carries the number of its question."""
        message = email.message_from_bytes(
            b"Content-Type: " + headers["content-type"].encode() + b"\r\n\r\n" + body
        )
        answers = []
        for part in message.get_payload():
            line = part.get_payload().lstrip().splitlines()[0]
            method, url, _ = line.split(" ")
            status, _, answer = self._answer(
                method, urllib.parse.urlsplit(url)._replace(scheme="", netloc="").geturl(), {}, b""
            )
            number = part.get("Content-ID", "<0>").strip("<>")
            answers.append(
                f"--answer\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
                + answer.decode()
                + "\r\n"
            )
        text = "".join(answers) + "--answer--\r\n"
        return 200, {"Content-Type": "multipart/mixed; boundary=answer"}, text.encode()

    def _metadata(self, name: str) -> dict:
        found = self.server.bucket.objects[name]
        return {
            "kind": "storage#object",
            "id": f"{self.server.bucket.name}/{name}/{found.generation}",
            "name": name,
            "bucket": self.server.bucket.name,
            "generation": str(found.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(found.content)),
            "crc32c": _crc32c(found.content),
            "etag": str(found.generation),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }


def _parts(content_type: str, body: bytes) -> tuple[bytes, bytes]:
    """The two parts of a multipart upload: metadata and content."""
    boundary = re.search(r"boundary=['\"]?([^'\";]+)", content_type)[1].strip().encode()
    parts = body.split(b"--" + boundary)[1:3]
    return tuple(
        part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1]
        .removesuffix(b"\r\n")
        .removesuffix(b"\n")
        for part in parts
    )


def _crc32c(content: bytes) -> str:
    return base64.b64encode(struct.pack(">I", google_crc32c.value(content))).decode()


def _json(value: dict) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, message: str) -> tuple[int, dict, bytes]:
    content = {"error": {"code": status, "message": message, "errors": [{"message": message}]}}
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


@contextlib.contextmanager
def served() -> Iterator[Callable[[str], Bucket]]:
    """``empty(name)``: an empty bucket of that name in place of the former one; clients of this process find it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.uploads = True, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def empty(name: str) -> Bucket:
        server.bucket = Bucket(name)
        return server.bucket

    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(server.server_address[1]).items():
            patch.setenv(key, value)
        patch.setitem(fsspec.config.conf, "gs", {**fsspec.config.conf.get("gs", {}), "token": "anon"})
        yield empty
    server.shutdown()
    server.server_close()


def environment(port: int) -> dict[str, str]:
    """What tells the three clients where the server is, and that nobody asks them who they are."""
    place = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": place,  # gcsfs and google-cloud-storage
        "FSSPEC_GS_TOKEN": "anon",  # gcsfs, of processes that start with this environment
        "TENSORSTORE_GCS_HTTP_URL": place,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",  # TensorStore
        "NO_GCE_CHECK": "true",
        # Whether a bucket has folders of its own is asked by gRPC, which is not spoken here.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "none",
    }
