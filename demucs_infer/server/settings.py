"""Everything a server can be told: flag > environment (`DEMUCS_INFER_*`) > file > default."""

import ast
import inspect
import ipaddress
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import unquote, urlsplit

from demucs_infer.checkpoints.cache import cache_folder
from demucs_infer.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "DEMUCS_INFER_"
# What Vertex AI says to a container, in its own words.
_VERTEX = {
    "AIP_HTTP_PORT": "port",
    "AIP_PREDICT_ROUTE": "predict_route",
    "AIP_HEALTH_ROUTE": "health_route",
    "AIP_STORAGE_URI": "repo",
}
_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off", ""})
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One value that is valid if it exists; every field is a flag and a variable too."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is everywhere."""

    port: int = 8080
    """Port to listen on; 0 takes a free one."""

    base_path: str = ""
    """Where a proxy puts the server, such as /stems."""

    predict_route: str = "/predict"
    """Where predictions are asked for."""

    health_route: str = "/health"
    """What answers 200 once the first model is there."""

    devices: tuple[str, ...] = ("auto",)
    """Where networks run, one worker each: auto, cpu, cuda:0,cuda:1."""

    models: tuple[str, ...] = ()
    """Models that may be asked for, the first by default; none named: all of `repo`, or the usual
    ones."""

    repo: Path | None = None
    """Folder of models to use instead of the known ones."""

    cache_dir: Path | None = None
    """Folder for downloaded models."""

    offline: bool | None = None
    """Download nothing."""

    data_dir: Path = field(default_factory=lambda: cache_folder() / "server")
    """Folder for uploads, results and the list of jobs; one server each."""

    max_bytes: int = 512 * _MIB
    """Largest upload."""

    max_json_bytes: int = 64 * _MIB
    """Largest body of a prediction, which is held in memory."""

    max_duration_seconds: float = 3600.0
    """Longest track."""

    max_instances: int = 8
    """Most tracks of one prediction."""

    max_queue: int = 64
    """Most requests that wait or are at work; more are told to come back."""

    max_per_client: int = 0
    """Most of these from one key or address; 0 is no limit."""

    max_passes: float = 20.0
    """Most work for one track: shifts / (1 - overlap)."""

    job_seconds: float = 3600.0
    """Longest work on one track."""

    upload_seconds: float = 600.0
    """Longest time that an upload may take."""

    keep_seconds: float = 3600.0
    """How long results are kept."""

    max_store_bytes: int = 20480 * _MIB
    """Most bytes of results that are kept, the oldest leave first."""

    model_memory_bytes: int = 4096 * _MIB
    """Most bytes of networks in memory on each device; the least recently used leaves first."""

    warmup: bool = True
    """Load the first model at once, and not with the first request."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Whoever has none of these is refused; none named: everybody is let in."""

    public: bool = False
    """Do not warn of an open address without a key: something in front asks for one."""

    cors_origins: tuple[str, ...] = ()
    """Other sites whose pages may call this server, such as https://example.org."""

    page: bool = True
    """Serve the page for people at /."""

    access_log: bool = True
    """One line of JSON for every request."""

    shutdown_seconds: float = 30.0
    """How long requests at work may go on once the server is told to stop."""

    def __post_init__(self) -> None:
        problems = [*self._numbers(), *self._routes(), *self._lists()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _numbers(self) -> list[str]:
        low = {"port": 0, "max_per_client": 0, "shutdown_seconds": 0}
        problems = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type not in (int, float):
                continue
            least, high = low.get(one.name, 1), 65536 if one.name == "port" else inf
            if isinstance(value, bool) or not least <= value < high:  # NaN fails too
                limits = f"{least} or more" if high == inf else f"{least} to {high - 1}"
                problems.append(f"{one.name} = {value!r} must be {limits}")
        return problems

    def _routes(self) -> list[str]:
        problems = [
            f"{name} = {route!r} must be a path that begins with / and has no braces"
            for name in ("predict_route", "health_route")
            if not (route := getattr(self, name)).startswith("/") or set(route) & set("{}?# ")
        ]
        if self.predict_route == self.health_route:
            problems.append(f"predict_route and health_route are both {self.health_route!r}")
        if self.base_path and not (self.base_path[0] == "/" and self.base_path[-1] != "/"):
            problems.append(f"base_path = {self.base_path!r} must begin and not end with /")
        return problems

    def _lists(self) -> list[str]:
        problems = []
        if not self.devices:
            problems.append("devices must name one at least")
        if any(len(key) < 8 for key in self.api_keys):
            problems.append("api_keys holds a key of less than 8 characters")
        if any(not key.isascii() for key in self.api_keys):
            problems.append("api_keys holds a key with letters that a header cannot carry")
        if "*" in self.cors_origins:
            problems.append("cors_origins = '*' would let every site in: name them")
        if self.repo is not None and not self.repo.is_dir():
            problems.append(f"repo = {str(self.repo)!r} is not a folder")
        for name in ("data_dir", "cache_dir"):
            folder = getattr(self, name)
            parts = (folder, *folder.parents) if folder else ()
            if any(os.path.isfile(part) for part in parts):  # noqa: PTH113 (Path's raises more)
                problems.append(f"{name} = {str(folder)!r} is a file, or below one; name a folder")
        return problems

    @property
    def is_exposed(self) -> bool:
        """Whether other machines reach a server that asks nobody for a key."""
        if self.api_keys or self.public:
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> ServerSettings:
    """The settings that flags, environment and a TOML file make; a `ConfigError` names what is bad.

    On Vertex AI (`AIP_HTTP_PORT` is set) the server listens everywhere unless told otherwise.
    """
    known = {one.name for one in fields(ServerSettings)}
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(file, known)
    if environ.get("AIP_HTTP_PORT"):
        values |= {"host": "0.0.0.0", "public": True}
    for variable, name in _VERTEX.items():
        is_overruled = flags.get(name) is not None or f"{PREFIX}{name.upper()}" in environ
        if environ.get(variable) and not is_overruled:
            values[name] = _converted(variable, name, environ[variable])
    for name in known:
        variable = f"{PREFIX}{name.upper()}"
        if variable in environ:
            values[name] = _converted(variable, name, environ[variable])
    if "DEMUCS_INFER_CACHE" in environ:
        values.setdefault("cache_dir", Path(environ["DEMUCS_INFER_CACHE"]))
        values.setdefault("data_dir", Path(environ["DEMUCS_INFER_CACHE"]) / "server")
    values |= {name: value for name, value in flags.items() if value is not None}
    return ServerSettings(**values)


def convert(name: str, value: Any) -> Any:
    """`value`, text or what a file holds, as the type of the setting `name`; or a `ValueError`."""
    hint = get_type_hints(ServerSettings)[name]
    kinds = get_args(hint) or (hint,)
    if tuple[str, ...] == hint:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts if str(part).strip())
    if bool in kinds:
        return _truth(value)
    if Path in kinds:
        return _folder(str(value))
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    if hint is int and isinstance(value, float) and value != int(value):
        raise ValueError("a whole number is needed")
    return hint(value)


def described() -> dict[str, str]:
    """What each setting is for: the sentence below it in this file."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(inspect.getsource(ServerSettings))):
        if not isinstance(node, ast.ClassDef):
            continue
        for field_, words in zip(node.body, node.body[1:]):
            if isinstance(field_, ast.AnnAssign) and isinstance(words, ast.Expr):
                text = ast.literal_eval(words.value)
                found[ast.unparse(field_.target)] = " ".join(text.split()).replace("%", "%%")
    return found


def _converted(source: str, name: str, value: Any) -> Any:
    try:
        return convert(name, value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source} = {value!r} is not valid: {error}") from error


def _from_file(file: Path, known: set[str]) -> dict[str, Any]:
    try:
        found = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    unknown = sorted(found.keys() - known)
    if unknown:
        raise ConfigError(f"{file} has settings that do not exist: {', '.join(unknown)}")
    return {name: _converted(f"{file}: {name}", name, value) for name, value in found.items()}


def _truth(value: object) -> bool:
    word = str(value).strip().lower()
    if word not in _YES | _NO:
        raise ValueError("yes or no is needed")
    return word in _YES


def _folder(text: str) -> Path:
    address = urlsplit(text)
    if len(address.scheme) > 1 and address.scheme != "file":
        raise ValueError(
            "only folders can be read; mount the bucket, or put the models into the image"
        )
    return Path(unquote(address.path) if address.scheme == "file" else text).expanduser()
