"""Parse URLs that clients send, and compare them with the prefixes that the operator allows.

Programs differ in how they read backslashes, dots, encoded letters and unusual hosts. A URL that
two of them could understand differently is refused, not repaired. `urllib.parse` accepts nearly
anything and drops line breaks silently, so it is used for nothing that decides.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from urllib.parse import unquote

_PORTS = {"https": 443, "http": 80, "s3": 0, "gs": 0}
"""The schemes that are possible, with their default ports; stores have none."""

_MAX_LETTERS = 4096
_MAX_ENCODINGS = 4
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(/[^?#]*|)(\?[^#]*)?")
_HTTP_LETTERS = re.compile(r"(?:[A-Za-z0-9._~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})*")
_KEY_LETTERS = re.compile(r"[^\\?#*]*")
_HOST = re.compile(r"([A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_IPV6_HOST = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """A URL that has one meaning only."""

    scheme: str
    host: str
    """In small letters; an address in its shortest form; of a store, the bucket."""

    port: int
    path: str
    """As in the URL, encoded."""

    query: str = ""
    """With the question mark."""

    def __str__(self) -> str:
        """Return the URL."""
        return f"{self.scheme}://{self.authority}{self.path}{self.query}"

    @property
    def is_store(self) -> bool:
        """Whether this is an object in a store, which is reached by fsspec."""
        return not self.port

    @property
    def is_address(self) -> bool:
        """Whether the host is an address and not a name."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return not self.is_store

    @property
    def authority(self) -> str:
        """The host with its port, as in the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """The path and the query, as in the first line of a request."""
        return f"{self.path or '/'}{self.query}"

    @property
    def plain_path(self) -> str:
        """The path without encoding, to compare and to name a file."""
        return self.path if self.is_store else unquote(self.path)

    @property
    def file_name(self) -> str:
        """The last part of the path."""
        return self.plain_path.rpartition("/")[2]

    def contains(self, url: "RemoteUrl") -> bool:
        """Return whether `url` is this one, or below it."""
        if (self.scheme, self.host, self.port) != (url.scheme, url.host, url.port):
            return False
        path, prefix = url.plain_path, self.plain_path
        return path == prefix or path.startswith(f"{prefix.rstrip('/')}/")


def parse_url(text: str) -> RemoteUrl:
    """Return a URL; raise `ValueError` if it is not one, or could be understood differently."""
    if len(text) > _MAX_LETTERS:
        raise ValueError(f"{len(text)} letters: expected at most {_MAX_LETTERS}")
    match = _URL.fullmatch(text) if text.isprintable() else None
    if match is None:
        raise ValueError("expected scheme, host and path in printable letters, without a fragment")
    scheme, authority, path, query = match[1].lower(), match[2], match[3], match[4] or ""
    if scheme not in _PORTS:
        raise ValueError(f"scheme {scheme}: expected one of {', '.join(_PORTS)}")
    if "@" in authority:
        raise ValueError("user names and passwords are not accepted in a URL")
    if _PORTS[scheme]:
        if not _HTTP_LETTERS.fullmatch(path + query):
            raise ValueError("letters that are not allowed in a URL: encode them as %XX")
        host, port = _parse_host(authority, _PORTS[scheme])
    else:
        if query or not _KEY_LETTERS.fullmatch(path) or "::" in text:
            raise ValueError("\\, ?, *, # and :: are not accepted in the URL of a store")
        if not _BUCKET.fullmatch(authority):
            raise ValueError("not the name of a bucket")
        host, port = authority, 0
    _check_path(path)
    return RemoteUrl(scheme, host, port, path, query)


def _parse_host(authority: str, default_port: int) -> tuple[str, int]:
    """Return host and port; raise `ValueError` if another program could read another host."""
    match = _IPV6_HOST.fullmatch(authority) or _HOST.fullmatch(authority)
    if match is None:
        raise ValueError("not a host: expected a name in ASCII (xn--...) or an address")
    port = int(match[2] or default_port)
    if not 0 < port < 65536:
        raise ValueError(f"port {port}: expected 1 to 65535")
    host = match[1].lower()
    try:
        if authority.startswith("["):
            return IPv6Address(host).compressed, port
        labels = host.split(".")
        if _NUMBER.fullmatch(labels[-1]):  # 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to some
            return str(IPv4Address(host)), port
    except AddressValueError as error:
        raise ValueError("not an address in its usual form") from error
    if not all(map(_LABEL.fullmatch, labels)) or len(host) > 253:
        raise ValueError("not a host name")
    return host, port


def _check_path(path: str) -> None:
    """Raise `ValueError` for a path that leads elsewhere once it is decoded or normalized."""
    for _ in range(_MAX_ENCODINGS):
        plain = unicodedata.normalize("NFKC", path)
        parts = [part.partition(";")[0].strip() for part in plain.split("/")[1:]]
        if {".", ".."} & set(parts) or "" in parts[:-1]:
            raise ValueError("a path with '.', '..' or empty parts is not accepted")
        decoded = unquote(path)
        if not decoded.isprintable() or "\\" in decoded or "\ufffd" in decoded:
            raise ValueError("a path with control characters, \\ or broken UTF-8 is not accepted")
        if not decoded.count("/") == plain.count("/") == path.count("/"):
            raise ValueError("a path with an encoded / is not accepted")
        if decoded == path:
            return
        path = decoded
    raise ValueError("the path is encoded several times")


@dataclass(frozen=True, slots=True)
class AllowedPrefixes:
    """The URLs that clients may use: those that are, or are below, one of the prefixes."""

    prefixes: tuple[RemoteUrl, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "AllowedPrefixes":
        """Return the prefixes; raise `ValueError` for one that is invalid."""
        prefixes = []
        for text in texts:
            try:
                prefix = parse_url(text)
            except ValueError as error:
                raise ValueError(f"{text!r}: {error}") from error
            if prefix.query:
                raise ValueError(f"{text!r}: a prefix has no query")
            prefixes.append(prefix)
        return cls(tuple(prefixes))

    def __bool__(self) -> bool:
        return bool(self.prefixes)

    def allow(self, url: RemoteUrl) -> bool:
        """Return whether a URL is, or is below, one of the prefixes."""
        return any(prefix.contains(url) for prefix in self.prefixes)
