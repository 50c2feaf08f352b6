"""Slides on servers: which may be asked, and how: whole answers or one sentence.

In a hosted app an address comes from a stranger, and this machine reaches what the stranger does not: itself, its
network, a cloud's metadata. There only the hosts of a list are asked, over https, at addresses that are public; the
address that was looked at is the one that is connected to, and every redirect is looked at as the first address was.
"""

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsewsi.slides.refusals import SlideError

if TYPE_CHECKING:
    import httpx

TRIES = 4
HOPS = 3  # redirects that are followed
LONGEST_WAIT = 10.0  # s between tries, whatever a server asks for
PATIENCE = 120.0  # s for one answer: a server that sends a byte now and then holds nobody up for ever
BUSY = (408, 425, 429, 500, 502, 503, 504)

UNREACHABLE = "The slide's server {}; check the network, the address and that the server runs."
TOO_LONG = "The slide's server sends more than was asked for; nothing of it was kept."
NOT_LISTED = "Slides are not read from that server here; this page reads from {} alone."
NOT_PUBLIC = "Slides are not read from that address here: it is not one of the open internet."
NO_ADDRESS = "The slide's address is not one that can be read; check how it is written."
CLOSED = "The slide has been closed."
NO_PASSWORDS = "The slide's address holds a name or password; take it out (~/.netrc is asked for it)."


@dataclass(frozen=True)
class Hosts:
    """Which servers may be asked for slides.

    names:  of hosts, as they stand in an address; None: any
    public: over https alone, and only at public addresses
    """

    names: frozenset[str] | None = None
    public: bool = False

    def find(self, url: "httpx.URL") -> list[str]:
        """The addresses to connect to; none where the host may be asked by its name. Raises SlideError."""
        if url.scheme not in ("http", "https") or not url.host:
            raise SlideError(NO_ADDRESS)
        if url.userinfo:
            raise SlideError(NO_PASSWORDS)
        if self.names is not None and url.host not in self.names:
            raise SlideError(NOT_LISTED.format(", ".join(sorted(self.names))))
        if not self.public:
            return []
        if url.scheme != "https" or url.port not in (None, 443):
            raise SlideError("Slides are read over https here, from the usual port; write the address so.")
        found = _look_up(url.host)
        if not all(map(is_public, found)):
            raise SlideError(NOT_PUBLIC)
        return found


ANY = Hosts()
# Where public slides can be read without a login: the Pathology Atlas, and the Imaging Data Commons.
OPEN = Hosts(frozenset({"images.patolojiatlasi.com", "proxy.imaging.datacommons.cancer.gov"}), public=True)


def find_address(path: str | Path, kind: str = "") -> str | None:
    """The http(s) address that a path is, after `kind` and a colon; a Path folds the two slashes into one."""
    match = re.match(rf"\s*['\"]?{kind}{':' if kind else ''}(https?):/+(.+?)['\"]?\s*$", str(path), re.IGNORECASE)
    return f"{match[1].lower()}://{match[2]}" if match else None


def is_remote(path: str | Path) -> bool:
    """Is a path the address of a slide on a server?"""
    return find_address(path) is not None or find_address(path, "dicomweb") is not None


def is_public(address: str) -> bool:
    """Is an IP address one of the open internet, also once an IPv4 address in it is unwrapped?"""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a scope, as only addresses of this network have
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _look_up(host: str) -> list[str]:
    """The addresses of a host, as the system finds them. Raises SlideError."""
    try:
        found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SlideError(UNREACHABLE.format("is not found by its name")) from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Reply:
    """What a server answered: status, headers, and the whole of its content."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Remote:
    """What is asked of the servers that `hosts` allow. Threads may share it."""

    def __init__(self, hosts: Hosts = ANY):
        self._hosts = hosts
        self._clients: dict[tuple[str, bool], httpx.Client] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(self, address: str, most: int, headers: Mapping[str, str] | None = None) -> Reply:
        """The answer at an address, of at most so many bytes; busy and failing servers are asked again.

        Raises SlideError for an address that may not be asked, for a server that cannot be reached, breaks off or is
        busy for long, and for more bytes than `most`. Any other status is the caller's to judge.
        """
        import httpx

        try:
            url, rules = httpx.URL(address), self._hosts
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise SlideError(NO_ADDRESS) from None
        for _ in range(HOPS + 1):
            reply = self._get(url, rules, most, headers or {})
            if reply.status not in (301, 302, 303, 307, 308):
                return reply
            try:
                further = url.join(reply.headers.get("location", ""))
            except (httpx.InvalidURL, UnicodeError, ValueError):
                raise SlideError(NO_ADDRESS) from None
            if further.host != url.host or url.scheme > further.scheme:
                rules = replace(rules, public=True)  # nobody is led from where they asked into a network of ours
            url = further
        raise SlideError(UNREACHABLE.format("sends from place to place"))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for client in self._clients.values():
                client.close()

    def _get(self, url: "httpx.URL", rules: Hosts, most: int, headers: Mapping[str, str]) -> Reply:
        import httpx

        problem, wait = "", 0.2
        for number in range(TRIES):
            if number:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 4
            places = rules.find(url) or [""]
            try:
                reply = self._ask(url, places, most, headers)
            except (httpx.TransportError, httpx.DecodingError, httpx.InvalidURL) as error:
                problem = "broke off" if isinstance(error, httpx.RemoteProtocolError) else "cannot be reached"
                continue
            except (RuntimeError, httpx.StreamError):  # closed under its readers
                if self._closed:
                    raise SlideError(CLOSED) from None
                raise
            if reply.status not in BUSY:
                return reply
            problem = f"answered {reply.status}"
            asked = reply.headers.get("retry-after", "")
            wait = max(wait, float(asked)) if asked.isdigit() and len(asked) < 6 else wait
        raise SlideError(UNREACHABLE.format(problem))

    def _ask(self, url: "httpx.URL", places: Iterable[str], most: int, headers: Mapping[str, str]) -> Reply:
        """Ask the first of the places that can be connected to; "" is the host by its name."""
        import httpx

        failure: httpx.ConnectError | httpx.ConnectTimeout | None = None
        for place in places:
            client = self._client(url.host, pinned=bool(place))
            more = {"Host": url.netloc.decode("ascii")} if place else {}
            request = client.build_request(
                "GET",
                url.copy_with(host=place) if place else url,
                headers={**headers, **more},
                # The certificate is still that of the name.
                extensions={"sni_hostname": url.host} if place else None,
            )
            try:
                response = client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
                continue
            try:
                return Reply(response.status_code, response.headers, _take(response, most))
            finally:
                response.close()
        raise failure or httpx.ConnectError("no address")

    def _client(self, host: str, pinned: bool) -> "httpx.Client":
        """One of each host: a connection to an address is never used for another name."""
        import httpx

        with self._lock:
            if self._closed:
                raise SlideError(CLOSED)
            if (host, pinned) not in self._clients:
                # A proxy would look names up anew, and is for other machines than this.
                direct = pinned or host in ("localhost", "127.0.0.1", "::1")
                netrc = Path("~/.netrc").expanduser()
                self._clients[host, pinned] = httpx.Client(
                    timeout=httpx.Timeout(30, connect=10),
                    transport=httpx.HTTPTransport() if direct else None,  # None: a proxy, where one is set
                    auth=httpx.NetRCAuth(str(netrc)) if not pinned and netrc.is_file() else None,
                )
            return self._clients[host, pinned]


def _take(response: "httpx.Response", most: int) -> bytes:
    """The content of an answer. Raises SlideError if it is longer or too slow, httpx.TransportError if not whole."""
    data, end = bytearray(), time.monotonic() + PATIENCE
    for piece in response.iter_bytes():
        data += piece
        if len(data) > most:
            raise SlideError(TOO_LONG)
        if time.monotonic() > end:
            raise SlideError(UNREACHABLE.format("is too slow"))
    return bytes(data)
