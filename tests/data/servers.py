"""A real HTTP server on loopback that misbehaves as it is told, and a wire that counts."""

from __future__ import annotations

import contextlib
import functools
import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# What to do with a request: told the path and how often it was asked for before.
Mood = Callable[[str, int], str]


class FileServer:
    """Serves `folder`, with ranges; `mood` says what goes wrong with a request.

    Moods: "" (all is well), "drop" (closes after half of the rest), "stall" (sends half, then
    nothing), "busy" (503), "wrong" (other bytes of the same length), "no ranges".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mood: Mood = lambda path, before: ""
        self.requests: list[tuple[str, str]] = []
        self.stop = threading.Event()
        handler = functools.partial(_Handler, self)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def asked(self) -> Counter[str]:
        """How often each path was asked for."""
        return Counter(path for path, _ in self.requests)

    @contextlib.contextmanager
    def running(self) -> Iterator[FileServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


_HEADER = 2000


class Wire:
    """Passes TCP connections on to `port` of loopback; `received` counts what came from there.

    Moods, for what is longer than a header: "" (all is well), "drop" (the connection closes),
    "delay" (0.2 s each time), "lie" (its last byte is another).
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.mood = ""
        self.received = 0
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]

    @contextlib.contextmanager
    def running(self) -> Iterator[Wire]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            # A blocked accept returns only on a shutdown.
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(
                        target=self._pass_on, args=(source, sink, source is server), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                if counted:
                    with self._lock:
                        self.received += len(content)
                if len(content) > _HEADER and self.mood:
                    if self.mood == "drop":
                        break
                    if self.mood == "delay":
                        time.sleep(0.2)
                    if self.mood == "lie" and counted:
                        content = content[:-1] + bytes([content[-1] ^ 255])
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, owner: FileServer, *arguments) -> None:
        self.owner = owner
        super().__init__(*arguments)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range", "")
        before = self.owner.asked()[path]
        self.owner.requests.append((path, wanted))
        mood = self.owner.mood(path, before)
        file = self.owner.folder / path.lstrip("/")
        if mood == "busy" or not file.is_file():
            self.send_error(503 if mood == "busy" else 404)
            return
        content = file.read_bytes()
        if mood == "no ranges":
            wanted = ""
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        content = content[int(first or 0) : int(last) + 1 if last else None]
        if mood == "wrong":
            content = bytes(b ^ 255 for b in content)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = mood in {"drop", "stall"}
        self.wfile.write(content[: len(content) // 2] if half else content)
        if mood == "stall":
            self.wfile.flush()
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not self.owner.stop.wait(0.1):
                pass
