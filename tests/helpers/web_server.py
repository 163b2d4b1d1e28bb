"""A web server on loopback whose responses are written byte by byte, well-behaved or not."""

import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Handler = Callable[[socket.socket, "WebRequest"], object]


@dataclass
class WebRequest:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class WebServer:
    """What was requested of the server, and what it responds to each path."""

    port: int
    requests: list[WebRequest] = field(default_factory=list)
    handlers: dict[str, Handler] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def respond(self, path: str, head: str, body: bytes = b"") -> None:
        """Respond to a path with these lines and this body."""
        data = head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body
        self.handlers[path] = lambda connection, _: connection.sendall(data)

    def send_file(self, path: str, body: bytes) -> None:
        self.respond(path, f"HTTP/1.1 200 OK\nContent-Length: {len(body)}", body)

    def redirect(self, path: str, location: str) -> None:
        self.respond(path, f"HTTP/1.1 302 Found\nContent-Length: 0\nLocation: {location}")

    def repeat(self, path: str, head: str, piece: bytes, pause: float = 0.0) -> None:
        """Respond with a body that does not end before the client leaves."""

        def handle(connection: socket.socket, _: WebRequest) -> None:
            connection.sendall(head.replace("\n", "\r\n").encode())
            while True:
                connection.sendall(piece)
                time.sleep(pause)

        self.handlers[path] = handle

    def handle(self, connection: socket.socket) -> None:
        with suppress(OSError):
            request = _read_request(connection)
            self.requests.append(request)
            missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            if request.method == "PUT":
                connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
            elif request.path in self.handlers:
                self.handlers[request.path](connection, request)
            else:
                connection.sendall(missing)


def _read_request(connection: socket.socket) -> WebRequest:
    with connection.makefile("rb") as file:
        method, path, _ = file.readline().decode("latin-1").split(" ", 2)
        headers = {}
        while line := file.readline().strip().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers.get("content-length", 0)))
    return WebRequest(method, path, headers, body)


@contextmanager
def run_web_server(context: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            web.handle(self.request)

    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        allow_reuse_address = True

        def finish_request(self, request: socket.socket, address: object) -> None:
            if context is None:
                super().finish_request(request, address)
                return
            with suppress(OSError), context.wrap_socket(request, server_side=True) as encrypted:
                super().finish_request(encrypted, address)

        def handle_error(self, request: object, address: object) -> None:
            pass  # clients leave in the middle, on purpose

    with Listener(("127.0.0.1", 0), Connection) as listener:
        web = WebServer(listener.server_address[1])
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield web
        finally:
            listener.shutdown()
            thread.join()


class SlowFile:
    """A path of a web server that sends half of a file, and the rest once `gate` is open."""

    def __init__(self, site: WebServer, path: str, content: bytes) -> None:
        self.url = f"{site.url}{path}"
        self.gate = threading.Event()
        self.is_cut_off = threading.Event()
        self._content = content
        site.handlers[path] = self._send

    def _send(self, connection: socket.socket, _: WebRequest) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self._content)}\r\n\r\n"
        half = len(self._content) // 2
        connection.sendall(head.encode() + self._content[:half])
        connection.settimeout(0.01)
        while not self.gate.is_set():
            try:
                if not connection.recv(1):
                    self.is_cut_off.set()
                    return
            except TimeoutError:
                continue
            except OSError:
                self.is_cut_off.set()
                return
        connection.sendall(self._content[half:])
