"""Tracks from URLs and stems to URLs: real sockets on loopback, and attacks that are refused."""

import datetime
import hashlib
import ipaddress
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import fsspec
import pytest
from fastapi.testclient import TestClient

from demucs_infer.errors import ConfigError
from demucs_infer.server import ServerSettings, http_client
from demucs_infer.server.admission import UploadPlace
from demucs_infer.server.errors import STATUS, ApiError
from demucs_infer.server.http_client import HttpClient, RemoteError, UrlRefusedError
from demucs_infer.server.urls import AllowedPrefixes, parse_url
from tests.helpers.oracles import require_module
from tests.helpers.server_process import client, song, wait_until
from tests.helpers.web_server import WebServer, run_web_server

STEMS = ["bass.wav", "drums.wav", "other.wav", "vocals.wav"]
SONG = song(0.5)
DIGEST = hashlib.sha256(SONG).hexdigest()


@pytest.fixture(scope="module")
def web(repo: Path, data: Path, site: WebServer) -> Iterator[TestClient]:
    inputs = (f"{site.url}/music", f"http://inner.example:{site.port}/")
    inputs += ("s3://songs/new", "gs://songs/new")
    outputs = (f"{site.url}/stems/", "s3://stems/out", "gs://stems/out")
    limits = {"max_bytes": 1 << 20, "allowed_inputs": inputs, "allowed_outputs": outputs}
    with client(repo, data, **limits) as opened:
        yield opened
        assert list((data / "uploads").iterdir()) == []


def create_job(web: TestClient, **fields: Any) -> Any:
    return web.post("/v1/jobs", json={"shifts": 0} | fields)


def wait_for_job(web: TestClient, response: Any) -> Any:
    assert response.status_code == 202, response.text
    address = response.headers["location"]
    unfinished = ("downloading", "queued", "running")
    wait_until(lambda: web.get(address).json()["status"] not in unfinished)
    return web.get(address).json()


def wait_for_error(web: TestClient, response: Any) -> tuple[int, str]:
    """Return the error of a request or of its job: the status of such errors, and the code."""
    if response.status_code != 202:
        return code_of(response)
    code = wait_for_job(web, response)["error"]["code"]
    return STATUS[code], code


def code_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# ── what works ──


def test_url_in_json_a_form_or_the_query_is_separated(web: TestClient, site: WebServer) -> None:
    url = f"{site.url}/music/song.wav"
    for response in (
        web.post("/v1/jobs", json={"url": url, "shifts": 0, "stems": ["vocals"]}),
        web.post("/v1/jobs", files={"url": (None, url), "stems": (None, "vocals")}),
        web.post("/v1/jobs", params={"url": url, "shifts": 0, "stems": "vocals"}),
    ):
        job = wait_for_job(web, response)
        assert (job["status"], job["name"], job["input_sha256"]) == ("done", "song.wav", DIGEST)
        assert [stem["name"] for stem in job["stems"]] == ["vocals"]
    response = web.post(
        "/v1/separate", json={"url": url, "stems": ["vocals"]}, headers={"Accept": "audio/wav"}
    )
    assert response.status_code == 200 and response.content[:4] == b"RIFF"


def test_redirect_within_the_prefixes_is_followed(web: TestClient, site: WebServer) -> None:
    site.redirect("/music/moved", "/music/song.wav?token=1#x")
    response = create_job(web, url=f"{site.url}/music/moved")
    assert wait_for_error(web, response) == (403, "url_not_allowed")
    site.redirect("/music/moved", "song.wav")
    job = wait_for_job(web, create_job(web, url=f"{site.url}/music/moved"))
    assert (job["status"], job["input_sha256"]) == ("done", DIGEST)


def test_chunked_body_is_read(web: TestClient, site: WebServer) -> None:
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SONG), SONG)
    site.respond("/music/chunked", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked", body)
    job = wait_for_job(web, create_job(web, url=f"{site.url}/music/chunked"))
    assert job["input_sha256"] == DIGEST


def test_stems_are_copied_to_the_output_and_the_manifest_last(
    web: TestClient, site: WebServer
) -> None:
    fields = {"url": f"{site.url}/music/song.wav", "output": f"{site.url}/stems/a%20song"}
    for _ in range(2):  # also from the cache
        site.requests.clear()
        job = wait_for_job(web, create_job(web, **fields))
        assert (job["status"], job["stage"]) == ("done", "")
        assert job["output"] == f"{site.url}/stems/a%20song/"
        puts = [request for request in site.requests if request.method == "PUT"]
        names = [request.path.removeprefix("/stems/a%20song/") for request in puts]
        assert sorted(names[:-1]) == STEMS and names[-1] == "stems.json"
        files = {stem["file"]: web.get(stem["url"]).content for stem in job["stems"]}
        assert {name: put.body for name, put in zip(names, puts)} | files == {
            **files,
            "stems.json": puts[-1].body,
        }
        assert set(json.loads(puts[-1].body)["stems"]) == {name[:-4] for name in STEMS}


def test_output_that_refuses_fails_the_job(
    web: TestClient, site: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demucs_infer.server.remote_files._ATTEMPTS", 1)
    jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
    output = jobs.remote.clients["output"]
    monkeypatch.setattr(output, "allowed", AllowedPrefixes.parse([f"http://127.0.0.1:{closed()}/"]))
    url = f"{site.url}/music/song.wav"
    job = wait_for_job(web, create_job(web, url=url, output=str(output.allowed.prefixes[0])))
    assert (job["status"], job["error"]["code"]) == ("failed", "output_failed")


def test_job_that_is_cancelled_with_its_last_window_is_not_copied(
    web: TestClient, site: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
    complete = jobs._complete

    def cancel_and_complete(job: Any) -> None:
        jobs.abandon(job)
        complete(job)

    monkeypatch.setattr(jobs, "_complete", cancel_and_complete)
    url = f"{site.url}/music/song.wav"
    output = str(jobs.remote.clients["output"].allowed.prefixes[0])
    job = wait_for_job(web, create_job(web, url=url, output=output))
    assert job["status"] == "cancelled"


def closed() -> int:
    """Return a port that refuses connections, as it is bound and nothing listens."""
    sockets.append(socket.socket())
    sockets[-1].bind(("127.0.0.1", 0))
    port: int = sockets[-1].getsockname()[1]
    return port


sockets: list[socket.socket] = []


@pytest.fixture(scope="module", autouse=True)
def close_sockets() -> Iterator[None]:
    yield
    for one in sockets:
        one.close()


def test_copy_is_continued_after_a_restart(repo: Path, site: WebServer, tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never responds
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/out"
    settings = {"allowed_outputs": (url,), "allowed_inputs": (f"{site.url}/music",)}
    with listener:  # all the time: a refused connection would be a failed job, not a cancelled one
        with client(repo, tmp_path, **settings) as web:
            job = create_job(web, url=f"{site.url}/music/song.wav", output=url).json()
            wait_until(lambda: web.get(f"/v1/jobs/{job['id']}").json()["stage"] == "upload")
        site.requests.clear()
        with client(repo, tmp_path, **settings) as web:
            jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
            record = jobs.get_record(job["id"])
            assert record.status != "done" and record.output == f"{url}/"
            assert web.delete(f"/v1/jobs/{job['id']}").status_code == 202
            wait_until(lambda: web.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled")


# ── what is refused ──


def test_without_prefixes_every_url_is_refused(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path) as web:
        for field in ("url", "output", "webhook"):
            response = create_job(web, **{"url": "https://a.example/", field: "https://a.example/"})
            assert code_of(response) == (403, "url_not_allowed")
            assert "the operator of this server allows no URLs here" in response.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"url": "{site}/secret.wav"}, (403, "url_not_allowed")),
        ({"url": "{site}/music/../secret.wav"}, (422, "invalid_url")),
        ({"url": "http://localhost:{port}/music/song.wav"}, (403, "url_not_allowed")),
        ({"url": "http://2130706433:{port}/music/song.wav"}, (422, "invalid_url")),
        ({"url": "http://[::ffff:127.0.0.1]:{port}/music/song.wav"}, (403, "url_not_allowed")),
        ({"url": "file:///etc/passwd"}, (422, "invalid_url")),
        ({"url": 5}, (422, "invalid_url")),
        ({"url": ["{site}/music/song.wav"]}, (422, "invalid_url")),
        ({"url": "{site}/music/none.wav"}, (422, "remote_failed")),
        ({"url": "http://inner.example:{port}/x"}, (422, "remote_failed")),
        ({"url": "{site}/music/song.wav", "output": "{site}/music"}, (403, "url_not_allowed")),
        ({"url": "{site}/music/song.wav", "output": "{site}/stems/?a"}, (422, "invalid_url")),
        ({"url": "{site}/music/song.wav", "nonsense": 1}, (422, "invalid_parameters")),
        ({}, (422, "no_file")),
        ({"url": ""}, (422, "no_file")),
    ],
)
def test_invalid_request_is_refused(
    web: TestClient, site: WebServer, fields: dict[str, Any], expected: tuple[int, str]
) -> None:
    async def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror("no such host")

    jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
    jobs.remote.clients["url"].resolve = fail
    fields = json.loads(
        json.dumps(fields).replace("{site}", site.url).replace("{port}", str(site.port))
    )
    site.requests.clear()
    response = create_job(web, **fields)
    assert (response.status_code == 202) == ("none.wav" in str(fields))
    assert wait_for_error(web, response) == expected
    if "output" not in fields:
        assert code_of(web.post("/v1/separate", json=fields)) == expected
    assert not [path for path in site.paths if path not in ("/music/none.wav",)]


def test_file_and_url_together_are_refused(web: TestClient, site: WebServer) -> None:
    url = f"{site.url}/music/song.wav"
    response = web.post("/v1/jobs", files={"file": SONG}, data={"url": url})
    assert code_of(response) == (422, "several_files")
    response = web.post("/v1/separate", params={"output": url}, content=SONG)
    assert code_of(response) == (422, "invalid_parameters")
    for body, code in ((b"{", "not_json"), (b"[]", "invalid_request")):
        response = web.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert response.json()["error"]["code"] == code


HEAD = "HTTP/1.1 200 OK\n"


def fetch(
    site: WebServer, path: str, *, max_bytes: int = 1 << 20, resolve: Any = None, more: Any = ()
) -> bytes:
    """Download a path as the server does, with limits of half a second."""
    allowed = AllowedPrefixes.parse([f"{site.url}/music", *more])
    caller = HttpClient(allowed, resolve) if resolve else HttpClient(allowed)
    data = bytearray()

    async def run() -> None:
        place = UploadPlace("client", min_rate=1000.0, max_seconds=60.0)

        def receive(piece: bytes) -> None:
            place.receive(len(piece))
            data.extend(piece)
            if len(data) > max_bytes:
                raise ApiError("too_large", "too large")

        with place.limit_time():
            await caller.get(parse_url(f"{site.url}{path}"), receive)

    anyio.run(run)
    return bytes(data)


@pytest.mark.parametrize(
    "location",
    [
        "/secret.wav",
        "/music/../secret.wav",
        "/music/%2e%2e/secret.wav",
        "//127.0.0.1:{port}/secret.wav",
        "http://127.0.0.1:{port}/secret.wav",
        "http://localhost:{port}/music/song.wav",
        "http://2130706433:{port}/music/song.wav",
        "http://user@127.0.0.1:{port}/music/song.wav",
        "http://169.254.169.254/latest/meta-data/",
        "https://127.0.0.1:{port}/music/song.wav",
        "http://[::1]:{port}/music/song.wav",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://127.0.0.1/",
        "gopher://127.0.0.1:{port}/_GET",
        "data:audio/wav;base64,AAAA",
        "s3://songs/new/song.wav",
        "javascript:1",
        "http://inner.example:{port}/song.wav",
    ],
)
def test_redirect_elsewhere_is_refused(site: WebServer, location: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "127.0.0.1"]

    site.requests.clear()
    site.redirect("/music/away", location.replace("{port}", str(site.port)))
    more = [f"http://inner.example:{site.port}/", "s3://songs"]
    with pytest.raises(UrlRefusedError):
        fetch(site, "/music/away", resolve=resolve, more=more)
    assert site.paths == ["/music/away"]


def test_redirects_are_limited(site: WebServer) -> None:
    site.redirect("/music/loop", "/music/loop")
    site.requests.clear()
    with pytest.raises(RemoteError, match="more than 5 redirects"):
        fetch(site, "/music/loop")
    assert site.paths == ["/music/loop"] * 6


def test_checked_address_is_the_one_that_is_connected_to(
    site: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name resolves to a public address first, and to a private one ever after."""
    answers = [["93.184.216.34"], ["127.0.0.1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"], []]
    connected: list[Any] = []

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0)

    async def connect(address: str, port: int, **more: Any) -> Any:
        connected.append((address, port, more.get("tls_hostname")))
        raise OSError("no network here")

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    name = f"https://inner.example:{site.port}/"
    caller = HttpClient(AllowedPrefixes.parse([name]), resolve)
    errors = []
    for _ in range(5):
        with pytest.raises((RemoteError, UrlRefusedError)) as error:
            anyio.run(caller.get, parse_url(name), lambda _: None)
        errors.append(error.type)
    assert connected == [("93.184.216.34", site.port, "inner.example")]
    assert errors == [RemoteError, *[UrlRefusedError] * 3, RemoteError]


def test_connecting_resolves_no_name(site: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"resolved {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert fetch(site, "/music/song.wav") == SONG


def test_environment_of_proxies_is_ignored(
    site: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed()}")
    assert fetch(site, "/music/song.wav") == SONG


@pytest.mark.parametrize(
    ("head", "piece", "code"),
    [
        (f"{HEAD}\n", bytes(1 << 16), "too_large"),
        (f"{HEAD}Content-Length: 1000000000000\n\n", bytes(1 << 16), "too_large"),
        (f"{HEAD}Transfer-Encoding: chunked\n\n", b"400\r\n" + bytes(1024) + b"\r\n", "too_large"),
    ],
    ids=["until_close", "enormous_length", "chunked"],
)
def test_endless_body_is_cut_off(site: WebServer, head: str, piece: bytes, code: str) -> None:
    site.repeat("/music/endless", head, piece)
    with pytest.raises(ApiError) as error:
        fetch(site, "/music/endless")
    assert error.value.code == code


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (f"{HEAD}Content-Length: 100000\n\n", b"x"),
        (f"{HEAD}Transfer-Encoding: chunked\n\n", b"1\r\nx\r\n"),
        (f"{HEAD}Transfer-Encoding: chunked\n\n1;", b"x"),
        (f"{HEAD}X-Slow: ", b"x"),
        ("", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("", b""),
    ],
    ids=["body", "chunks", "chunk_extension", "headers", "continue", "silence"],
)
def test_slow_drip_is_cut_off(
    site: WebServer, head: str, piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demucs_infer.server.admission._GRACE_SECONDS", 0.2)
    site.repeat("/music/slow", head, piece, pause=0.01)
    began = time.monotonic()
    with pytest.raises((ApiError, RemoteError)) as error:
        fetch(site, "/music/slow")
    if isinstance(error.value, ApiError):
        assert error.value.code == "too_slow"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (f"{HEAD}Content-Length: 100", b"x", "not HTTP"),
        (f"{HEAD}Content-Encoding: gzip\nContent-Length: 1", b"x", "compressed"),
        (f"{HEAD}content-encoding: br\nContent-Length: 1", b"x", "compressed"),
        (f"{HEAD}X: {'x' * 1_000_000}", b"", "not HTTP"),
        (HEAD + "\n".join(f"X-{n}: x" for n in range(100_000)), b"", "not HTTP"),
        (f"{HEAD}Content-Length: -1", b"x", "not HTTP"),
        (f"{HEAD}Content-Length: 1\nContent-Length: 2", b"xx", "not HTTP"),
        (f"{HEAD}Transfer-Encoding: chunked", b"zz\r\n", "not HTTP"),
        (f"{HEAD}Transfer-Encoding: gzip, chunked", b"1\r\nx\r\n0\r\n\r\n", "not HTTP"),
        ("SSH-2.0-OpenSSH_9.9", b"", "not HTTP"),
        ("HTTP/1.1 206 Partial Content\nContent-Length: 1", b"x", "206"),
        ("HTTP/1.1 304 Not Modified", b"", "304"),
        ("HTTP/1.1 500 Oops\nContent-Length: 0", b"", "500"),
        ("HTTP/1.1 302 Found\nContent-Length: 0", b"", "redirects"),
    ],
    ids=[
        "truncated", "gzip_bomb", "brotli", "large_header", "many_headers", "negative_length",
        "two_lengths", "broken_chunks", "compressed_transfer", "no_http", "partial",
        "not_modified", "server_error", "redirect_to_nowhere",
    ],
)  # fmt: skip
def test_malformed_response_is_refused(
    site: WebServer, head: str, body: bytes, message: str
) -> None:
    site.respond("/music/odd", head, body)
    with pytest.raises(RemoteError, match=message):
        fetch(site, "/music/odd")


def test_request_has_no_credentials_and_asks_for_no_compression(site: WebServer) -> None:
    site.requests.clear()
    fetch(site, "/music/song.wav")
    assert site.requests[0].headers == {
        "host": f"127.0.0.1:{site.port}",
        "user-agent": "demucs-infer",
        "connection": "close",
        "accept-encoding": "identity",
    }


# ── encryption ──


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """Write a self-signed certificate for names and addresses, and its key."""
    require_module("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    entries: list[Any] = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        for name in names
    ]
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(entries), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize(
    ("name", "is_trusted", "problem"),
    [
        ("127.0.0.1", True, None),
        ("other.example", True, "IP address mismatch"),
        ("127.0.0.1", False, "self[- ]signed"),
    ],
    ids=["valid", "other_name", "unknown_issuer"],
)
def test_certificate_is_verified(
    tmp_path: Path,
    name: str,
    is_trusted: bool,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate, key = make_certificate(tmp_path, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate) if is_trusted else "")
    http_client._make_context.cache_clear()
    received = bytearray()
    with run_web_server(context) as web:
        web.send_file("/song.wav", SONG)
        url = f"https://127.0.0.1:{web.port}/song.wav"
        caller = HttpClient(AllowedPrefixes.parse([url]))

        def call() -> None:
            anyio.run(caller.get, parse_url(url), received.extend)

        if problem is None:
            call()
            assert bytes(received) == SONG
        else:
            with pytest.raises(RemoteError, match=f"certificate not valid.*{problem}"):
                call()
            assert not web.requests
    http_client._make_context.cache_clear()


# ── stores ──


@contextmanager
def run_s3(environment: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a server that speaks the protocol of S3, and yield its file system."""
    s3fs, moto = require_module("s3fs"), require_module("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        environment.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@contextmanager
def run_gs(environment: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a server that speaks the protocol of Google Cloud Storage, and yield its files."""
    # Read when gcsfs is imported: it asks for the kind of a bucket by gRPC, unknown to the server.
    environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs, emulator = require_module("gcsfs"), require_module("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    port = server._api._httpd.server_address[1]
    environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    environment.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield gcsfs.GCSFileSystem()
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Start a store with the buckets `songs` and `stems`; yield its scheme and a file system."""
    run = {"s3": run_s3, "gs": run_gs}[request.param]
    with pytest.MonkeyPatch.context() as environment, run(environment) as filesystem:
        for bucket in ("songs", "stems"):
            filesystem.mkdir(bucket)
        yield request.param, filesystem


def test_track_and_stems_in_a_store(web: TestClient, store: tuple[str, Any]) -> None:
    scheme, files = store
    files.pipe_file("songs/new/a song.wav", SONG)
    fields = {"url": f"{scheme}://songs/new/a song.wav", "output": f"{scheme}://stems/out/1"}
    job = wait_for_job(web, create_job(web, **fields))
    assert (job["status"], job["input_sha256"], job["name"]) == ("done", DIGEST, "a song.wav")
    files.invalidate_cache()
    assert sorted(files.ls("stems/out/1")) == [
        f"stems/out/1/{name}" for name in sorted([*STEMS, "stems.json"])
    ]
    for stem in job["stems"]:
        content = web.get(stem["url"]).content
        assert files.cat_file(f"stems/out/1/{stem['file']}") == content


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs of this test
def test_object_that_is_absent_or_too_large_is_refused(
    web: TestClient, store: tuple[str, Any]
) -> None:
    scheme, files = store
    files.pipe_file("songs/new/large.wav", bytes((1 << 20) + 1))
    files.pipe_file("songs/old.wav", SONG)
    for path, expected in {
        "songs/new/none.wav": (422, "remote_failed"),
        "songs/new/large.wav": (413, "too_large"),
        "songs/old.wav": (403, "url_not_allowed"),
        "songs/new/../old.wav": (422, "invalid_url"),
        "songs/new/large.wav#1": (422, "invalid_url"),
        "other/new/song.wav": (403, "url_not_allowed"),
    }.items():
        assert wait_for_error(web, create_job(web, url=f"{scheme}://{path}")) == expected


# ── settings ──


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allowed_inputs": ("example.org",)}, "allowed_inputs = 'example.org': expected scheme"),
        ({"allowed_outputs": ("file:///srv",)}, "scheme file: expected one of https"),
        ({"allowed_webhooks": ("https://a.example/",)}, "webhook_secret_file"),
    ],
)
def test_invalid_setting_is_reported(
    repo: Path, settings: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerSettings(repo=repo, data_dir=tmp_path, **settings)
