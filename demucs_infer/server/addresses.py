"""Decide which addresses the server may connect to on behalf of a client."""

import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import anyio

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host."""

_PUBLIC_IPV6 = ip_network("2000::/3")
_REFUSED = [
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # of providers; metadata of a cloud, too
        "127.0.0.0/8",
        "168.63.129.16/32",  # a public address that is the host of each machine in Azure
        "169.254.0.0/16",  # link-local: metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols; metadata of a cloud, too
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        # Of IPv6, everything outside of 2000::/3 is refused: loopback, link-local, unique local,
        # multicast, IPv4-mapped (::ffff:0:0/96), and NAT64 (64:ff9b::/96, 64:ff9b:1::/48).
        "2001::/23",  # protocols: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which contains an IPv4 address
        "3fff::/20",  # documentation
    )
]
"""Special addresses, of the registries; `is_global` differs between versions of Python."""


def is_public(address: str) -> bool:
    """Return whether an address belongs to the public internet, with no other address within."""
    try:
        ip = ip_address(address)  # one with a zone, `fe80::1%eth0`, is no public one
    except ValueError:
        return False
    if isinstance(ip, IPv6Address) and ip not in _PUBLIC_IPV6:
        return False
    if isinstance(ip, IPv4Address) and not ip.is_global:
        return False
    return not any(ip in network for network in _REFUSED if network.version == ip.version)


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host, in the order of the system's resolver."""
    entries = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))
