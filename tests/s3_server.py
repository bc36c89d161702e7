"""A small S3 server for tests, in memory: what an object store must answer, and nothing else.

It takes single and multipart uploads, ranges, listings and deletes, of any bucket, from anyone. It
is a stand-in: it checks no signature, and is no proof for a real service.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["s3_server"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.numbers = itertools.count(1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def do_PUT(self) -> None:
        data = self._body()
        if "uploadId" in self._query:
            self.server.uploads[self._query["uploadId"][0]][int(self._query["partNumber"][0])] = (
                data
            )
        else:
            self.server.objects[self._key] = data
        self._answer(200, headers={"ETag": '"etag"'})

    def do_POST(self) -> None:
        self._body()
        if "uploads" in self._query:
            upload = str(next(self.server.numbers))
            self.server.uploads[upload] = {}
            self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        else:
            parts = self.server.uploads.pop(self._query["uploadId"][0])
            self.server.objects[self._key] = b"".join(parts[number] for number in sorted(parts))
            self._xml("CompleteMultipartUploadResult", '<ETag>"etag"</ETag>')

    def do_GET(self) -> None:
        if "list-type" in self._query:
            self._list()
            return
        data = self.server.objects.get(self._key)
        if data is None:
            self._xml("Error", "<Code>NoSuchKey</Code>", status=404)
        elif span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1]
            where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self._answer(206, part, {"Content-Range": where})
        else:
            self._answer(200, data)

    do_HEAD = do_GET  # noqa: N815

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._key, None)
        self._answer(204)

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    @property
    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _list(self) -> None:
        bucket, prefix = self._key, self._query.get("prefix", [""])[0]
        found = "".join(
            f"<Contents><Key>{escape(key.removeprefix(bucket + '/'))}</Key><Size>{len(data)}</Size>"
            '<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"etag"</ETag></Contents>'
            for key, data in sorted(self.server.objects.items())
            if key.startswith(f"{bucket}/{prefix}")
        )
        self._xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{found}")

    def _xml(self, name: str, inner: str, *, status: int = 200) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{inner}</{name}>'
        self._answer(status, text.encode(), {"Content-Type": "application/xml"})

    def _answer(
        self, status: int, data: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        shown = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"etag"'}
        for name, value in (shown | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the URL of a server that runs meanwhile."""
    server = _Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
