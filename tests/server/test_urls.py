"""URLs and addresses that clients may name, and attacks that hide others in them."""

import pytest

from demucs_infer.server.addresses import is_public
from demucs_infer.server.urls import AllowedPrefixes, parse_url

PREFIXES = AllowedPrefixes.parse(
    ["https://a.example/x", "https://b.example:8443", "http://127.0.0.1:9000/in/", "s3://songs/new"]
)


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example/x",
        "https://a.example/x/",
        "https://a.example/x/song.wav",
        "https://A.EXAMPLE:443/x/a%20song.wav?token=a/../b",
        "https://a.example/%78/song.wav",
        "HTTPS://b.example:8443/anything",
        "http://127.0.0.1:9000/in/song.wav",
        "s3://songs/new/a song, über alles.wav",
    ],
)
def test_url_below_a_prefix_is_allowed(url: str) -> None:
    assert PREFIXES.allow(parse_url(url))


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example.evil/x/song.wav",
        "https://evil-a.example/x/song.wav",
        "https://www.a.example/x/song.wav",
        "https://a.example/y",
        "https://a.example/xy",
        "https://a.example/X/song.wav",
        "https://a.example:8443/x/song.wav",
        "https://a.example:80/x/song.wav",
        "http://a.example/x/song.wav",
        "http://a.example:443/x/song.wav",
        "https://b.example/song.wav",
        "http://127.0.0.1/in/song.wav",
        "http://127.0.0.1:9000/in",
        "http://127.0.0.2:9000/in/song.wav",
        "http://[::ffff:127.0.0.1]:9000/in/song.wav",
        "http://[::1]:9000/in/song.wav",
        "http://localhost:9000/in/song.wav",
        "http://0.0.0.0:9000/in/song.wav",
        "s3://songs/newer/song.wav",
        "s3://songs-2/new/song.wav",
        "gs://songs/new/song.wav",
    ],
)
def test_url_beside_the_prefixes_is_not_allowed(url: str) -> None:
    assert not PREFIXES.allow(parse_url(url))


@pytest.mark.parametrize(
    "url",
    [
        # paths
        "https://a.example/x/../y",
        "https://a.example/x/./y",
        "https://a.example/x/..",
        "https://a.example/x/%2e%2e/y",
        "https://a.example/x/%2E./y",
        "https://a.example/x/.%2e/y",
        "https://a.example/x/%252e%252e/y",
        "https://a.example/x/%25252e%25252e/y",
        "https://a.example/x/..;/y",
        "https://a.example/x/..;a=b/y",
        "https://a.example/x/..%2fy",
        "https://a.example/x/%2f..%2fy",
        "https://a.example/x/..%5cy",
        "https://a.example/x\\..\\y",
        "https://a.example/x/%c0%ae%c0%ae/y",
        "https://a.example/x/%ef%bc%8e%ef%bc%8e/y",  # wide dots
        "https://a.example/x%ef%bc%8fy",  # a wide slash
        "https://a.example/x//y",
        "https://a.example//x/y",
        "https://a.example/x/%00",
        "https://a.example/x/%0d%0aHost:%20evil",
        "https://a.example/x/%zz",
        "https://a.example/x/%",
        "https://a.example/x/ y",
        "https://a.example/x/\r\nHost: evil",
        "https://a.example/x/\ty",
        "https://a.example/x?a=\r\nb",
        "https://a.example/x/y#z",
        "https://a.example/x/<y>",
        "https://a.example/x/é",
        # hosts
        "https://a.example@evil.example/x",
        "https://user:password@a.example/x",
        "https://a.example\\@evil.example/x",
        "https://evil.example\\.a.example/x",
        "https://a.example./x",
        "https://localhost./x",
        "https://a..example/x",
        "https://.a.example/x",
        "https:///x",
        "https://:443/x",
        "https://a.example:/x",
        "https://a.example:0/x",
        "https://a.example:65536/x",
        "https://a.example:４４３/x",
        "https://a.example:443:80/x",
        "https://а.example/x",  # Cyrillic
        "https://ａ.example/x",
        "https://ⓐ.example/x",
        "https://a。example/x",
        "https://a%2eexample/x",
        "https://-a.example/x",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://017700000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.01/",
        "http://127.0.0.0x1/",
        "http://256.0.0.1/",
        "http://①②⑦.0.0.1/",
        "http://[::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1/",
        "http://[::1]evil/",
        "http://[127.0.0.1]/",
        # schemes
        "file:///etc/passwd",
        "ftp://a.example/x",
        "gopher://a.example:70/x",
        "data:audio/wav;base64,AAAA",
        "memory://x",
        "github://a:b@main/x",
        "zip://x::https://a.example/x",
        "//a.example/x",
        "a.example/x",
        "/etc/passwd",
        "",
        "https:a.example/x",
        "https:/a.example/x",
        " https://a.example/x",
        "https://a.example/x ",
        # stores
        "s3://songs/new/../old/song.wav",
        "s3://songs/new/%2e%2e/old/song.wav",
        "s3://songs/new//song.wav",
        "s3://songs/new/song.wav?versionId=1",
        "s3://songs/new/*.wav",
        "s3://songs/new/song.wav#part",
        "s3://songs/new/a\\b",
        "s3://songs/new/a\nb",
        "s3://songs/new/song.zip::file://x",
        "s3://user:key@songs/new/song.wav",
        "s3://songs:9000/new/song.wav",
        "s3://SONGS/new/song.wav",
        "s3://../new/song.wav",
        f"https://a.example/x/{'a' * 5000}",
    ],
)
def test_ambiguous_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_url(url)


@pytest.mark.parametrize(
    "prefix", ["https://a.example/?x=1", "example.org", "file:///srv", "*", "https://*.example/"]
)
def test_invalid_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"expected|query|host|scheme"):
        AllowedPrefixes.parse([prefix])


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1"])
def test_public_address(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192",
        "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "203.0.113.1", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1",
        "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "100::1",
        "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1", "fc00::1",
        "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "name", "",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(address: str) -> None:
    assert not is_public(address)
