"""An S3 server on this machine, moto's, and a way to it that can be cut."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from dist_train.run_dir.store import Store

BUCKET = "bucket"


class Way:
    """A TCP proxy to the server.

    Attributes:
        port: where it listens.
        silent: it takes all requests and passes none on, as a firewall that drops packets.
        requests: how many were passed on since `let`.
        refused: how many connections were refused since `let`.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._left: int | None = None
        self.requests = self.refused = 0
        self.silent = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def let(self, requests: int | None = None) -> None:
        """Lets as many requests through, then cuts all connections and refuses new ones; None: lets all through."""
        with self._lock:
            self._left, self.requests, self.refused, self.silent = requests, 0, 0, False

    def close(self) -> None:
        self._listener.close()
        self._cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._left == 0:
                    client.close()
                    self.refused += 1
                    continue
                server = socket.create_connection(self._server)
                self._open |= {client, server}
                threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.silent:
                    continue
                if asks and not self._may(data):
                    # The half of a request arrives: a connection is not cut between two requests only.
                    target.sendall(data[: len(data) // 2])
                    self._cut()
                    return
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            self._open.discard(each)

    def _may(self, data: bytes) -> bool:
        if data.split(b" ", 1)[0] not in (b"GET", b"PUT", b"POST", b"DELETE", b"HEAD"):
            return self._left != 0  # more of a request
        with self._lock:
            if self._left == 0:
                return False
            self.requests += 1
            if self._left is not None:
                self._left -= 1
            return True

    def _cut(self) -> None:
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class S3:
    """The server as the tests of a process see it.

    Attributes:
        environ: variables by which any process reaches it.
        way: the way to it.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.way = Way(server)
        self.environ = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.way.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def store(self, name: str) -> Store:
        return Store(self.address(name))

    def address(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"


def ask(url: str, method: str, data: bytes | None = None) -> None:
    """Sends a request past all libraries of stores."""
    # Not by urlopen, which keeps the proxies that were set at its first use, by whatever test.
    build_opener(ProxyHandler({})).open(Request(url, data=data, method=method), timeout=30).close()


@contextmanager
def s3_server() -> Iterator[S3]:
    """Starts a server without objects; skips the test where moto or s3fs is missing."""
    for library in ("moto", "s3fs"):
        pytest.importorskip(library, reason=f"only with {library}")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for path in ("moto-api/reset", BUCKET):
            method = "PUT" if path == BUCKET else "POST"
            ask(f"http://{host}:{port}/{path}", method)
        s3 = S3((host, port))
        try:
            yield s3
        finally:
            s3.way.close()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def _s3_of_module() -> Iterator[S3]:
    with s3_server() as s3:
        yield s3


@pytest.fixture
def s3(_s3_of_module: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """The server, with this process's variables set to reach it, and working copies in the test's folder."""
    _s3_of_module.way.let()
    for name, value in _s3_of_module.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return _s3_of_module


def another_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Gives this process another, empty folder of working copies."""
    shutil.rmtree(folder, ignore_errors=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
