"""Servers of slides: in a hosted app nobody is led to this machine, its network, or a place that is not listed."""

import functools
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparsewsi.slides import remote
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.remote import ANY, NOT_PUBLIC, OPEN, Hosts, Remote, is_public, is_remote
from sparsewsi.slides.slide import open_slide

ATLAS = "images.patolojiatlasi.com"
PUBLIC_ADDRESS = "93.184.216.34"


def answer_with(*addresses: str):
    """A resolver that gives these addresses for every name."""
    return lambda _host, port, *_given, **_named: [
        (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses
    ]


@pytest.fixture
def connections(monkeypatch) -> list[tuple[str, int]]:
    """Where a connection was tried; none is made."""
    tried: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_given, **_named) -> socket.socket:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)
    return tried


@pytest.mark.parametrize(
    "address",
    [
        "https://127.0.0.1/HE.dzi",
        "https://localhost/HE.dzi",
        "https://2130706433/HE.dzi",
        "https://0177.0.0.1/HE.dzi",
        "https://0x7f.0.0.1/HE.dzi",
        "https://127.1/HE.dzi",
        "https://0/HE.dzi",
        "https://[::1]/HE.dzi",
        "https://[::ffff:127.0.0.1]/HE.dzi",
        "https://[::ffff:7f00:1]/HE.dzi",
        "https://[64:ff9b::7f00:1]/HE.dzi",
        "https://10.0.0.7/HE.dzi",
        "https://192.168.1.1/HE.dzi",
        "https://169.254.169.254/HE.dzi",
        "https://metadata.google.internal/HE.dzi",
        f"https://{ATLAS}@127.0.0.1/HE.dzi",
        f"https://user:word@{ATLAS}/HE.dzi",
        f"https://127.0.0.1\\@{ATLAS}/HE.dzi",
        f"https://{ATLAS}.evil.example/HE.dzi",
        f"https://evil{ATLAS}/HE.dzi",
        f"https://{ATLAS}:8443/HE.dzi",
        f"https://{ATLAS}:22/HE.dzi",
        f"https://{ATLAS}./HE.dzi",
        f"http://{ATLAS}/HE.dzi",
        "https://evil.example/HE.dzi#" + ATLAS,
        "https://ⓛocalhost/HE.dzi",
        "https://１２７.0.0.1/HE.dzi",
        "dicomweb:https://127.0.0.1/dicom-web?study=1.2&series=1.3",
        "dicomweb:http://localhost:8042/dicom-web?study=1.2&series=1.3",
        f"dicomweb:https://{ATLAS}@10.0.0.1/x?study=1.2&series=1.3",
    ],
)
def test_a_hosted_app_asks_no_place_that_is_not_listed(address, connections, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answer_with("127.0.0.1"))
    with pytest.raises(SlideError) as told:
        open_slide(address, slide_mpp=0.5, hosts=OPEN)
    assert connections == []
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["172.16.0.1"],
        ["192.168.0.1"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["255.255.255.255"],
        ["224.0.0.251"],
        ["::1"],
        ["::"],
        ["fe80::1%eth0"],
        ["fd00::1"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a00:1"],
        ["64:ff9b:1::a00:1"],
        ["2002:7f00:1::"],
        ["::127.0.0.1"],
        ["::ffff:0:127.0.0.1"],
        ["2001:0:7f00:1::"],
        [PUBLIC_ADDRESS, "127.0.0.1"],
        ["2606:2800:220:1::1", "::ffff:127.0.0.1"],
    ],
)
def test_a_listed_name_that_leads_into_a_network_is_refused(addresses, connections, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answer_with(*addresses))
    with pytest.raises(SlideError) as told:
        open_slide(f"https://{ATLAS}/HE.dzi", slide_mpp=0.5, hosts=OPEN)
    assert str(told.value) == NOT_PUBLIC
    assert connections == []


def test_public_addresses_are_public():
    assert all(map(is_public, [PUBLIC_ADDRESS, "1.1.1.1", "2606:2800:220:1::1", "::ffff:1.1.1.1", "64:ff9b::101:101"]))


def test_the_address_that_was_looked_at_is_the_one_that_is_connected_to(connections, monkeypatch):
    answers = iter([[PUBLIC_ADDRESS], *[["127.0.0.1"]] * 50])  # a name that is bound anew after the look
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_named: answer_with(*next(answers))(*given))
    with pytest.raises(SlideError) as told:
        open_slide(f"https://{ATLAS}/HE.dzi", slide_mpp=0.5, hosts=OPEN)
    assert connections == [(PUBLIC_ADDRESS, 443)]
    assert str(told.value) == NOT_PUBLIC, "the second try looks again"


def test_on_ones_own_machine_any_server_is_asked(server):
    assert Remote(ANY).get(f"http://127.0.0.1:{server.server_port}/plain", 100).content == b"the slide"
    assert Remote(ANY).get(f"http://localhost:{server.server_port}/plain", 100).status == 200


@pytest.mark.parametrize("where", ["http://127.0.0.1:1/x", "http://169.254.169.254/x", "file:///etc/passwd", "//[::1/"])
def test_nobody_is_led_from_one_server_into_a_network(server, where, monkeypatch):
    server.moved = where
    here = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: here("127.0.0.1", *more, **named))
    with pytest.raises(SlideError):
        Remote(ANY).get(f"http://atlas.test:{server.server_port}/moved", 100)
    assert set(server.asked) == {"/moved"}


def test_a_slide_that_moved_on_its_own_server_is_found_and_a_circle_ends(server):
    server.moved = "/plain"
    assert Remote(ANY).get(f"http://127.0.0.1:{server.server_port}/moved", 100).content == b"the slide"
    server.moved, server.asked = "/moved", []
    with pytest.raises(SlideError, match="from place to place"):
        Remote(ANY).get(f"http://127.0.0.1:{server.server_port}/moved", 100)
    assert len(server.asked) == remote.HOPS + 1


def test_more_than_was_asked_for_is_never_kept(server):
    with pytest.raises(SlideError, match="more than was asked"):
        Remote(ANY).get(f"http://127.0.0.1:{server.server_port}/endless", 100_000)


def test_a_slide_that_is_closed_under_its_reader_is_a_sentence(server):
    asking, told = Remote(ANY), []

    def read() -> None:
        try:
            asking.get(f"http://127.0.0.1:{server.server_port}/slow", 10**9)
        except SlideError as error:
            told.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    assert server.began.wait(10)
    asking.close()
    reader.join(20)
    assert told == [remote.CLOSED]


def test_what_an_address_is_not():
    for path in ("/slides/a.svs", "a.svs", "C:\\slides\\a.svs", "ftp://host/a.dzi", "phantom"):
        assert not is_remote(path)
    with pytest.raises(SlideError, match="leads to no slide"):
        open_slide("https://example.org/slide.svs")


# ---- a listed server, with a certificate: every hop is looked at, and the certificate is the name's


def test_a_pinned_connection_asks_for_the_names_certificate(secure, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answer_with(PUBLIC_ADDRESS))
    reply = Remote(OPEN).get(f"https://{ATLAS}/plain", 100)
    assert reply.content == b"the slide"
    assert secure.hosts == [ATLAS]
    with pytest.raises(SlideError, match="cannot be reached"):  # another name than the certificate's
        Remote(Hosts(frozenset({"other.test"}), public=True)).get("https://other.test/plain", 100)


@pytest.mark.parametrize(
    "where", ["https://127.0.0.1/x", "https://evil.example/x", f"http://{ATLAS}/x", f"https://a:b@{ATLAS}/x"]
)
def test_a_listed_server_leads_nobody_elsewhere(secure, where, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answer_with(PUBLIC_ADDRESS))
    secure.moved = where
    with pytest.raises(SlideError):
        Remote(OPEN).get(f"https://{ATLAS}/moved", 100)
    assert secure.asked == ["/moved"]


class Server(ThreadingHTTPServer):
    asked: list[str]
    hosts: list[str]
    moved: str = ""
    began: threading.Event


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.hosts.append(self.headers["Host"])
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", self.server.moved)
        self.end_headers()
        try:
            for _ in range({"/endless": 1_000, "/slow": 100}.get(self.path, 1)):
                self.wfile.write(b"x" * 10_000 if self.path == "/endless" else b"the slide")
                if self.path == "/slow":
                    self.server.began.set()
                    time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    yield from _serve(None)


@pytest.fixture
def secure(tmp_path: Path, monkeypatch) -> Iterator[Server]:
    """A server with a certificate of ATLAS's name, which is reached at every address."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    how = f"-x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={ATLAS} -addext subjectAltName=DNS:{ATLAS}".split()
    made = subprocess.run(
        ["openssl", "req", *how, "-keyout", key, "-out", certificate], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)
    connect = socket.create_connection
    for serving in _serve(context):
        place = ("127.0.0.1", serving.server_port)
        monkeypatch.setattr(socket, "create_connection", functools.partial(_connect_to, connect, place))
        yield serving


def _connect_to(connect, place, _address, *given, **named) -> socket.socket:
    made = socket.socket()
    made.connect(place)
    return made


def _serve(context: ssl.SSLContext | None) -> Iterator[Server]:
    serving = Server(("127.0.0.1", 0), Handler)
    if context is not None:
        serving.socket = context.wrap_socket(serving.socket, server_side=True)
    serving.asked, serving.hosts, serving.began = [], [], threading.Event()
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()
