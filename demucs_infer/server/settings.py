"""Read the settings of the server from flags, variables (`DEMUCS_INFER_*`) and a TOML file.

pydantic-settings is not used. It reads the same sources, but does not report from which variable or
file an invalid value comes. It also reads the environment in the constructor, while
`ServerSettings(...)` must depend on its arguments alone.
"""

import ipaddress
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import unquote, urlsplit

from demucs_infer.checkpoints.cache import cache_folder
from demucs_infer.errors import ConfigError
from demucs_infer.server.urls import AllowedPrefixes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "DEMUCS_INFER_"
_VERTEX_VARIABLES = {
    "AIP_HTTP_PORT": "port",
    "AIP_PREDICT_ROUTE": "predict_route",
    "AIP_HEALTH_ROUTE": "health_route",
    "AIP_STORAGE_URI": "repo",
}
"""Environment variables that Vertex AI sets in a container, and the settings they stand for."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})
_MIB = 1 << 20


def setting(
    help: str,
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    ge: int = 1,
    lt: float = inf,
    is_secret: bool = False,
) -> Any:
    """Return a dataclass field with its description and, for a number, its limits."""
    metadata = {"help": help, "ge": ge, "lt": lt}
    return field(default=default, default_factory=factory, repr=not is_secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of a server; raises `ConfigError` for invalid values."""

    host: str = setting("address to listen on (0.0.0.0: all)", "127.0.0.1")
    port: int = setting("port to listen on (0: any free one)", 8080, ge=0, lt=65536)
    base_path: str = setting("path of the server behind a proxy, such as /stems", "")
    predict_route: str = setting("path of the prediction endpoint", "/predict")
    health_route: str = setting("path that returns 200 once the first model is loaded", "/health")
    devices: tuple[str, ...] = setting(
        "devices with one worker each: auto, cpu, or a list such as cuda:0,cuda:1", ("auto",)
    )
    models: tuple[str, ...] = setting(
        "models to serve, the first by default (default: all of repo, or the standard models)", ()
    )
    repo: Path | None = setting("folder of models to use instead of the standard ones", None)
    cache_dir: Path | None = setting("folder for downloaded models", None)
    offline: bool | None = setting("do not download models (default: no)", None)
    data_dir: Path = setting(
        "folder for uploads, results and jobs; each server needs its own, unless redis_url is set",
        factory=lambda: cache_folder() / "server",
    )
    redis_url: str = setting(
        "address of a Redis, such as redis://host:6379/0, with the jobs of several servers, which "
        "must also share data_dir",
        "",
        is_secret=True,
    )
    lease_seconds: float = setting(
        "with redis_url: how long after the last sign of life of a server others take its jobs",
        15.0,
    )
    max_bytes: int = setting("maximum size of an upload", 512 * _MIB)
    max_json_bytes: int = setting(
        "maximum body size of a prediction, which is kept in memory", 64 * _MIB
    )
    max_duration_seconds: float = setting("maximum duration of a track", 3600.0)
    json_memory_bytes: int = setting(
        "maximum memory for the bodies of predictions, in all; more of them wait", 512 * _MIB
    )
    max_instances: int = setting("maximum number of tracks per prediction", 8)
    max_queue: int = setting("maximum number of waiting and running requests", 64)
    max_per_client: int = setting(
        "maximum number of these per API key, or per address without keys (0: no limit)", 0, ge=0
    )
    max_passes: float = setting(
        "maximum number of passes over a track: shifts / (1 - overlap)", 20.0
    )
    max_tracks: int = setting(
        "maximum number of tracks that are separated at a time on each device, in turn", 4
    )
    job_seconds: float = setting("maximum processing time of a track", 3600.0)
    upload_seconds: float = setting("maximum duration of an upload", 600.0)
    min_upload_rate: float = setting("minimum bytes per second of an upload", 1000.0)
    header_seconds: float = setting(
        "how long a connection may take to send the headers of a request", 10.0
    )
    stall_seconds: float = setting("how long a client may read nothing of a response", 60.0)
    keep_seconds: float = setting("how long results are kept", 3600.0)
    max_store_bytes: int = setting(
        "maximum total size of results; the oldest are deleted first", 20480 * _MIB
    )
    max_disk_bytes: int = setting(
        "maximum total size of uploads, running jobs and results; tracks that do not fit are "
        "refused, and results have half of it at most (0: no limit)",
        0,
        ge=0,
    )
    min_free_bytes: int = setting(
        "free space to leave on the disk of data_dir: tracks that do not fit are refused; running "
        "jobs fail when half of it is used up",
        1024 * _MIB,
        ge=0,
    )
    model_memory_bytes: int = setting(
        "maximum total size of the models loaded on each device; the least recently used is closed "
        "first",
        4096 * _MIB,
    )
    idle_unload: float = setting(
        "seconds without a request after which a model is unloaded (0: never)", 0.0, ge=0
    )
    warmup: bool = setting("load the first model at startup instead of on first use", True)
    api_keys: tuple[str, ...] = setting(
        "accepted API keys of at least 8 characters (default: no authentication)",
        (),
        is_secret=True,
    )
    api_keys_file: Path | None = setting(
        "file with more API keys, one a line; lines that begin with # are ignored", None
    )
    public: bool = setting("do not warn of a missing API key: a proxy authenticates clients", False)
    allowed_hosts: tuple[str, ...] = setting(
        "host names under which clients may address the server, * for all (default: addresses, "
        "localhost and the name of the machine; all with API keys or behind a proxy)",
        (),
    )
    trusted_proxies: tuple[str, ...] = setting(
        "addresses or networks of proxies whose X-Forwarded-For states the client's address", ()
    )
    cors_origins: tuple[str, ...] = setting(
        "sites whose pages may use this server, such as https://example.org", ()
    )
    allowed_inputs: tuple[str, ...] = setting(
        "prefixes of the URLs of tracks that clients may name, such as https://example.org/music "
        "or s3://bucket/songs (default: none)",
        (),
    )
    allowed_outputs: tuple[str, ...] = setting(
        "prefixes of the URLs to which clients may have stems copied (default: none)", ()
    )
    allowed_webhooks: tuple[str, ...] = setting(
        "prefixes of the URLs to which clients may have the end of a job announced (default: none)",
        (),
    )
    webhook_secret_file: Path | None = setting(
        "file with the secret that signs these announcements, 16 characters or more", None
    )
    page: bool = setting("serve the web page at /", True)
    share_links: bool = setting(
        "offer links to finished songs: who has one can listen, also without an API key", False
    )
    access_log: bool = setting("log each request as one line of JSON", True)
    log_format: str = setting("format of messages on standard error: text or json", "text")
    traces: bool = setting(
        "record OpenTelemetry traces; the variables OTEL_* state where they are sent", False
    )
    drain_seconds: float = setting(
        "how long the server says that it is not ready, and still accepts requests, before it "
        "shuts down: as long as a load balancer takes to notice",
        0.0,
        ge=0,
    )
    shutdown_seconds: float = setting(
        "how long running requests may continue at shutdown", 30.0, ge=0
    )

    def __post_init__(self) -> None:
        if self.api_keys_file is not None:
            keys = (*self.api_keys, *_read_keys(self.api_keys_file))
            object.__setattr__(self, "api_keys", tuple(dict.fromkeys(keys)))
        problems = [*self._check_numbers(), *self._check_routes(), *self._check_others()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _check_numbers(self) -> list[str]:
        problems = []
        for each in fields(self):
            if each.type not in (int, float):
                continue
            value = getattr(self, each.name)
            low, high = each.metadata["ge"], each.metadata["lt"]
            if isinstance(value, bool) or not low <= value < high:  # NaN fails too
                limits = f"{low} or more" if high == inf else f"{low} to {high - 1}"
                problems.append(f"{each.name} = {value!r} must be {limits}")
        return problems

    def _check_routes(self) -> list[str]:
        problems = [
            f"{name} = {route!r} must be a path that begins with / and has no braces"
            for name in ("predict_route", "health_route")
            if not (route := getattr(self, name)).startswith("/") or set(route) & set("{}?# ")
        ]
        if self.predict_route == self.health_route:
            problems.append(f"predict_route and health_route are both {self.health_route!r}")
        if self.base_path and not (self.base_path[0] == "/" and self.base_path[-1] != "/"):
            problems.append(
                f"base_path = {self.base_path!r} must begin with /, and not end with it"
            )
        return problems

    def _check_others(self) -> list[str]:
        problems = []
        if not self.devices:
            problems.append("devices is empty: expected at least one, such as cpu")
        if any(len(key) < 8 for key in self.api_keys):
            problems.append("api_keys contains a key of less than 8 characters")
        if any(not key.isascii() for key in self.api_keys):
            problems.append("api_keys contains a key that is not ASCII and fits no HTTP header")
        if self.log_format not in ("text", "json"):
            problems.append(f"log_format = {self.log_format!r} must be text or json")
        if "*" in self.cors_origins:
            problems.append("cors_origins = '*' would allow every site: list the sites")
        if self.repo is not None and not self.repo.is_dir():
            problems.append(f"repo = {str(self.repo)!r} is not a folder")
        if 0 < self.max_disk_bytes < 2 * self.max_bytes:
            problems.append(
                f"max_disk_bytes = {self.max_disk_bytes} must be 0, or twice max_bytes or more: "
                "results take half of it"
            )
        problems += self._check_urls()
        for name in ("data_dir", "cache_dir"):
            folder = getattr(self, name)
            parts = (folder, *folder.parents) if folder else ()
            if any(os.path.isfile(part) for part in parts):  # noqa: PTH113 (Path's raises more)
                problems.append(f"{name} = {str(folder)!r} is a file, or below one: give a folder")
        return problems

    def _check_urls(self) -> list[str]:
        problems = []
        for name in ("allowed_inputs", "allowed_outputs", "allowed_webhooks"):
            try:
                AllowedPrefixes.parse(getattr(self, name))
            except ValueError as error:
                problems.append(f"{name} = {error}")
        if self.allowed_webhooks and self.webhook_secret_file is None:
            problems.append("allowed_webhooks needs webhook_secret_file, which signs what is sent")
        return problems

    def read_webhook_secret(self) -> bytes:
        """Return the secret for signatures; raise `ConfigError` if the file has none."""
        if self.webhook_secret_file is None:
            return b""
        file = str(self.webhook_secret_file)
        try:
            secret = self.webhook_secret_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"webhook_secret_file = {file!r} cannot be read: {error}") from error
        if len(secret) < 16:
            raise ConfigError(f"webhook_secret_file = {file!r}: expected 16 characters or more")
        return secret

    @property
    def allowed_host_names(self) -> tuple[str, ...]:
        """The host names to accept; empty for those that the server listens on, `*` for all.

        With API keys or behind a proxy, all names are accepted: a page of another site that makes
        its own name resolve to this server still could not use it.
        """
        if self.allowed_hosts:
            return self.allowed_hosts
        return ("*",) if self.api_keys or self.public else ()

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach the server without authentication."""
        if self.api_keys or self.public:
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> ServerSettings:
    """Return the settings: flags override variables, and variables override the TOML file.

    On Vertex AI (if `AIP_HTTP_PORT` is set), the server listens on all addresses by default. Raises
    `ConfigError` for an invalid value, with its source.
    """
    names = {each.name for each in fields(ServerSettings)}
    values: dict[str, Any] = {}
    if file is not None:
        values |= _read_file(file, names)
    if environ.get("AIP_HTTP_PORT"):
        values |= {"host": "0.0.0.0", "public": True}
    for variable, name in _VERTEX_VARIABLES.items():
        is_overridden = flags.get(name) is not None or f"{PREFIX}{name.upper()}" in environ
        if environ.get(variable) and not is_overridden:
            values[name] = _convert_from(variable, name, environ[variable])
    for name in names:
        variable = f"{PREFIX}{name.upper()}"
        if variable in environ:
            values[name] = _convert_from(variable, name, environ[variable])
    if "DEMUCS_INFER_CACHE" in environ:
        if f"{PREFIX}CACHE_DIR" not in environ:
            values["cache_dir"] = Path(environ["DEMUCS_INFER_CACHE"])
        values.setdefault("data_dir", Path(environ["DEMUCS_INFER_CACHE"]) / "server")
    values |= {name: value for name, value in flags.items() if value is not None}
    return ServerSettings(**values)


def _read_keys(file: Path) -> list[str]:
    """Return the API keys in a file; raise `ConfigError` if it has none, as keys are required."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_keys_file = {str(file)!r} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"api_keys_file = {str(file)!r} has no keys: expected one a line")
    return keys


def convert(name: str, value: Any) -> Any:
    """Convert text, or a value from TOML, to the type of the setting `name`.

    Raises `ValueError` if the value is not of that type.
    """
    hint = get_type_hints(ServerSettings)[name]
    types = get_args(hint) or (hint,)
    if tuple[str, ...] == hint:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts if str(part).strip())
    if bool in types:
        return _parse_bool(value)
    if Path in types:
        return _parse_folder(str(value))
    if isinstance(value, bool):
        raise ValueError("expected a number")
    if hint is int and isinstance(value, float) and value != int(value):
        raise ValueError("expected a whole number")
    try:
        return hint(value)
    except (TypeError, ValueError):
        kinds = {int: "a whole number", float: "a number", str: "text"}
        raise ValueError(f"expected {kinds[hint]}") from None


def _convert_from(source: str, name: str, value: Any) -> Any:
    try:
        return convert(name, value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source} = {value!r} is not valid: {error}") from error


def _read_file(file: Path, names: set[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    unknown = sorted(table.keys() - names)
    if unknown:
        raise ConfigError(f"{file}: unknown settings: {', '.join(unknown)}")
    return {name: _convert_from(f"{file}: {name}", name, value) for name, value in table.items()}


def _parse_bool(value: object) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("expected yes or no")
    return word in _TRUE


def _parse_folder(text: str) -> Path:
    url = urlsplit(text)
    if len(url.scheme) > 1 and url.scheme != "file":
        raise ValueError("expected a folder: mount the bucket, or copy the models into the image")
    return Path(unquote(url.path) if url.scheme == "file" else text).expanduser()
