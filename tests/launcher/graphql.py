"""A stand-in for W&B's server on this machine: wandb's own client asks it by GraphQL."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]

KEY = "0" * 40


@contextmanager
def server(answer: Answer) -> Iterator[dict[str, str]]:
    """Serve `answer(query, variables)`; yields the variables that lead wandb there."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            data = {}
            # The client also sends how it fares itself, elsewhere.
            if self.path == "/graphql":
                asked = json.loads(body)
                data = _who(asked["query"]) or answer(asked["query"], asked.get("variables") or {})
            said = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield {
            "WANDB_BASE_URL": f"http://127.0.0.1:{serving.server_port}",
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
        }
        serving.shutdown()


def _who(query: str) -> dict[str, Any] | None:
    if "viewer" not in query:
        return None
    viewer = {"id": "1", "entity": "us", "username": "us", "email": "us@example.org"}
    return {"viewer": viewer | {"flags": "{}", "teams": {"edges": []}}}
