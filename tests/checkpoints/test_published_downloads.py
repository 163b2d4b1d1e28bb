"""Download networks of the community from a local server, under the paths of the catalog."""

import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demucs_infer import (
    CheckpointError,
    ConfigError,
    DownloadError,
    ModelLoadingError,
    Separator,
)
from demucs_infer.checkpoints import catalog as catalog_module
from demucs_infer.checkpoints import download
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.main import main
from demucs_infer.pretrained import pull
from demucs_infer.server import ServerSettings, create_app
from tests.helpers.cli_process import environment, load, tree, write_song
from tests.helpers.community import CONFIGS, write_files
from tests.helpers.oracles import require_module
from tests.helpers.web_server import WebRequest, WebServer, run_web_server

NAME = "bs_roformer_viperx_317"
FOLDER = Path("cache/models")


@dataclass
class Source:
    """A server with the two files of a network, and a catalog that has it in place of the hosts."""

    web: WebServer
    catalog: Path
    config: str
    """Path of the configuration on the server."""
    checkpoint: str
    config_bytes: bytes
    checkpoint_bytes: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.checkpoint_bytes).hexdigest()

    def state_sha256(self, digest: str) -> None:
        """State a sha256 of the weights in the catalog."""
        text = self.catalog.read_text("utf-8")
        entry = f'name = "{NAME}"\n'
        self.catalog.write_text(text.replace(entry, f'{entry}sha256 = "{digest}"\n'), "utf-8")
        load_catalog.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return the configuration and the weights of a small BS-RoFormer."""
    require_module("pymss_core")
    config = CONFIGS["bs_roformer, one target"]
    audio = {**config["audio"], "sample_rate": 8000}
    paths = write_files({**config, "audio": audio}, tmp_path_factory.mktemp("files"))
    return paths[0].read_bytes(), paths[1].read_bytes()


@pytest.fixture
def source(
    files: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Source]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)  # between attempts
    monkeypatch.chdir(tmp_path)
    network = load_catalog().networks[NAME]
    config, checkpoint = (
        re.sub("https://[^/]+", "", u) for u in (network.config, network.checkpoint)
    )
    with run_web_server() as web:
        web.send_file(config, files[0])
        web.send_file(checkpoint, files[1])
        text = catalog_module.CATALOG_FILE.read_text("utf-8")
        path = tmp_path / "catalog.toml"
        path.write_text(re.sub('"https://[^/"]+', f'"{web.url}', text), "utf-8")
        monkeypatch.setattr(catalog_module, "CATALOG_FILE", path)
        load_catalog.cache_clear()
        yield Source(web, path, config, checkpoint, *files)
    monkeypatch.undo()
    load_catalog.cache_clear()


def run_pull(*words: str) -> int:
    return main(["models", "pull", NAME, "--cache-dir", "cache", *words])


def names() -> list[str]:
    """Return the files in the cache, but for empty files of locks."""
    return [name for name in tree(FOLDER) if not name.endswith(".lock")]


COMPLETE = [f"{NAME}.{suffix}" for suffix in ("ckpt", "ckpt.stamp", "yaml", "yaml.stamp")]


def test_pull_prints_paths_and_the_sha256_that_it_keeps(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_pull() == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [str(FOLDER / f"{NAME}.{s}") for s in ("yaml", "ckpt")]
    assert output.err.count(source.sha256) == 1 and "kept and enforced" in output.err
    assert names() == COMPLETE
    assert (FOLDER / f"{NAME}.ckpt").read_bytes() == source.checkpoint_bytes
    assert source.web.paths == [source.config, source.checkpoint]
    assert run_pull() == 0
    assert capsys.readouterr().err == ""
    assert len(source.web.paths) == 2


def test_name_is_downloaded_run_and_run_again_offline(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    write_song(Path("song.wav"), 1)
    words = ["song.wav", "-n", NAME, "--cache-dir", "cache", "--float32"]
    assert main(words) == 0
    assert source.sha256 in capsys.readouterr().err
    folder = Path("separated", NAME, "song")
    assert {path.name for path in folder.glob("*.wav")} == {"vocals.wav", "other.wav"}
    assert main([*words, "--offline", "--force"]) == 0
    assert len(source.web.paths) == 2


def test_separator_by_name_gives_the_stems_of_the_command(source: Source) -> None:
    song = write_song(Path("song.wav"), 1)
    assert main(["song.wav", "-n", NAME, "--cache-dir", "cache", "--float32", "-q"]) == 0
    for name, repo in ((NAME, None), (NAME, "folder")):
        if repo:
            pull(NAME, to=repo, cache_dir="cache", offline=True)
        separator = Separator(name, repo, cache_dir="cache", offline=True)
        stems = separator.run(song).stems
        assert list(stems) == ["vocals", "other"]
        for stem, samples in stems.items():
            written = load(Path("separated", NAME, "song", f"{stem}.wav"))
            assert (samples.T.numpy() == written).all()
    assert Separator(NAME, cache_dir="cache", overlap=0).run(song).stems["vocals"].shape[1] == 8000


def test_server_downloads_when_it_starts_and_logs_the_sha256(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "demucs_infer")
    settings = ServerSettings(
        data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", models=(NAME,)
    )
    create_app(settings)
    assert source.web.paths == [source.config, source.checkpoint]
    assert f"downloading {NAME}" in caplog.messages
    assert source.sha256 in caplog.text
    caplog.clear()
    create_app(settings)
    assert len(source.web.paths) == 2 and not caplog.messages


def test_published_sha256_is_enforced(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.state_sha256("0" * 64)
    assert run_pull() == ExitCode.NO_MODEL
    error = capsys.readouterr().err
    assert f"sha256 mismatch: expected {'0' * 64}, got {source.sha256}" in error
    assert names() == [f"{NAME}.yaml", f"{NAME}.yaml.stamp"]


def test_published_sha256_that_matches_is_not_told(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source.state_sha256(source.sha256)
    assert run_pull() == 0
    assert capsys.readouterr().err == ""
    assert names() == COMPLETE


@pytest.mark.parametrize("removal", ["by hand", "models rm"])
@pytest.mark.parametrize("suffix", ["yaml", "ckpt"])
def test_second_download_of_other_bytes_is_refused(
    removal: str, suffix: str, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_pull() == 0
    path = source.config if suffix == "yaml" else source.checkpoint
    source.web.send_file(path, b"other bytes")
    if removal == "by hand":
        (FOLDER / f"{NAME}.{suffix}").unlink()
    else:
        assert main(["models", "rm", NAME, "--cache-dir", "cache"]) == 0
    capsys.readouterr()
    assert run_pull() == ExitCode.NO_MODEL
    error = capsys.readouterr().err
    stamp = FOLDER / f"{NAME}.{suffix}.stamp"
    assert "not the file of the first download" in error and f"delete {stamp}" in error
    assert not (FOLDER / f"{NAME}.{suffix}").exists()
    stamp.unlink()
    assert run_pull() == 0
    assert (FOLDER / f"{NAME}.{suffix}").read_bytes() == b"other bytes"


def test_changed_file_in_the_cache_is_refused(source: Source) -> None:
    assert run_pull() == 0
    (FOLDER / f"{NAME}.ckpt").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=f"expected sha256 {source.sha256}"):
        pull(NAME, cache_dir="cache")


def cut(source: Source, etag: str = "", length: bool = True) -> None:
    """Cut each response in its middle, and send ranges if there is an ETag."""
    body = source.checkpoint_bytes
    size = 2 * len(body) // 3

    def handle(connection: socket.socket, request: WebRequest) -> None:
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        status = f"206 Partial\nContent-Range: bytes {start}-{len(body) - 1}/{len(body)}"
        lines = [f"HTTP/1.1 {status if start else '200 OK'}"]
        lines += [f"Content-Length: {len(body) - start}"] if length else []
        lines += [f"ETag: {etag}"] if etag else []
        connection.sendall("\n".join([*lines, "", ""]).replace("\n", "\r\n").encode())
        connection.sendall(body[start : start + size])

    source.web.handlers[source.checkpoint] = handle


def test_cut_download_is_resumed(source: Source) -> None:
    cut(source, '"one"')
    assert run_pull() == 0
    assert names() == COMPLETE
    assert (FOLDER / f"{NAME}.ckpt").read_bytes() == source.checkpoint_bytes
    assert [request.headers.get("range") for request in source.web.requests[1:]] == [
        None,
        f"bytes={2 * len(source.checkpoint_bytes) // 3}-",
    ]


@pytest.mark.parametrize("length", [True, False], ids=["with length", "without length"])
def test_download_that_is_always_cut_gives_no_file(
    length: bool, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(source, length=length)
    assert run_pull() == ExitCode.NO_MODEL
    reason = "the connection was cut" if length else "the server does not state the size"
    assert reason in capsys.readouterr().err
    assert f"{NAME}.ckpt" not in names() and f"{NAME}.ckpt.stamp" not in names()
    source.web.send_file(source.checkpoint, source.checkpoint_bytes)
    assert run_pull() == 0
    assert names() == COMPLETE


PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("path", ["config", "checkpoint"])
def test_web_page_instead_of_a_file_is_refused_and_not_kept(
    path: str, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    address = getattr(source, path)
    source.web.redirect(address, f"{source.web.url}/login")
    source.web.send_file("/login", PAGE)
    assert run_pull() == ExitCode.NO_MODEL
    assert f"{address}: the server sent a web page" in capsys.readouterr().err
    source.web.send_file(address, getattr(source, f"{path}_bytes"))
    assert run_pull() == 0
    assert names() == COMPLETE


def test_missing_file_is_one_line(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    del source.web.handlers[source.checkpoint]
    assert run_pull() == ExitCode.NO_MODEL
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{source.checkpoint}: HTTP 404 Not Found" in line and ".;" not in line
    assert names() == [f"{NAME}.yaml", f"{NAME}.yaml.stamp"]


def test_redirections_are_followed(source: Source) -> None:
    source.web.redirect(source.checkpoint, f"{source.web.url}/cdn/1")
    source.web.redirect("/cdn/1", "/cdn/2")
    source.web.send_file("/cdn/2", source.checkpoint_bytes)
    assert run_pull() == 0
    assert (FOLDER / f"{NAME}.ckpt").read_bytes() == source.checkpoint_bytes


def test_endless_redirections_are_an_error(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source.web.redirect(source.config, source.web.url + source.config)
    assert run_pull() == ExitCode.NO_MODEL
    assert "redirect" in capsys.readouterr().err
    assert names() == []


def test_configuration_that_calls_python_is_not_run(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    text = source.config_bytes + b"x: !!python/object/apply:os.system ['touch RAN']\n"
    source.web.send_file(source.config, text)
    write_song(Path("song.wav"), 1)
    with pytest.raises(SystemExit):
        main(["song.wav", "-n", NAME, "--cache-dir", "cache"])
    assert "unsupported tag '!!python/object/apply:os.system'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unsupported tag"):
        Separator(NAME, cache_dir="cache")
    assert not Path("RAN").exists() and not Path("separated").exists()


def test_offline_without_the_files_is_one_error(source: Source) -> None:
    with pytest.raises(DownloadError, match="2 of 2 files are not in the cache"):
        Separator(NAME, cache_dir="cache", offline=True)
    assert source.web.paths == []


def test_nothing_is_downloaded_without_the_extra(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pymss_core", None)
    write_song(Path("song.wav"), 1)
    assert main(["song.wav", "-n", NAME, "--cache-dir", "cache"]) == ExitCode.NO_MODEL
    assert "pip install 'pymss-core>=" in capsys.readouterr().err
    with pytest.raises(ModelLoadingError, match="pip install 'pymss-core>="):
        Separator(NAME, cache_dir="cache")
    settings = ServerSettings(data_dir=tmp_path, cache_dir=tmp_path / "cache", models=(NAME,))
    with pytest.raises(ConfigError, match="pip install 'pymss-core>="):
        create_app(settings)
    assert source.web.paths == []


def test_dry_run_downloads_nothing(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    write_song(Path("song.wav"), 1)
    assert main(["song.wav", "-n", NAME, "--cache-dir", "cache", "--dry-run"]) == 0
    assert f"to download: {NAME}.ckpt" in capsys.readouterr().out
    assert source.web.paths == []


PULL = """
import sys
from pathlib import Path
from demucs_infer.checkpoints import catalog
catalog.CATALOG_FILE = Path(sys.argv[1])
from demucs_infer.cli.main import main
assert main(["models", "pull", sys.argv[2], "--cache-dir", "cache"]) == 0
assert "torch" not in sys.modules
"""


def test_two_processes_download_each_file_once(source: Source) -> None:
    command = [sys.executable, "-c", PULL, str(source.catalog), NAME]
    env = {**environment(), **{k: v for k, v in os.environ.items() if k == "HOME"}}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(source.web.paths) == sorted([source.config, source.checkpoint])
    assert names() == COMPLETE


def test_copy_in_a_folder_is_a_repo(source: Source) -> None:
    assert run_pull("--to", "folder") == 0
    assert tree(Path("folder")) == [f"{NAME}.ckpt", f"{NAME}.yaml"]
    write_song(Path("song.wav"), 1)
    words = ["song.wav", "--repo", "folder", "-n", NAME, "--cache-dir", "empty", "--offline", "-q"]
    assert main(words) == 0
    assert len(source.web.paths) == 2
    stems = Path("separated", NAME, "song").glob("*.wav")
    assert {path.stem for path in stems} == {"vocals", "other"}
