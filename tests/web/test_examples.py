"""Slides that the page offers: fetched once, kept only if they are what they should be."""

import hashlib
import http.server
import threading
from collections.abc import Iterator

import pytest

from sparsewsi.web.examples import fetch_sample, name_example


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server on this machine with one file, `sample`."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sample").write_bytes(b"pixels" * 100)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_sample_is_kept_only_when_its_digest_is_right(site, tmp_path):
    good = hashlib.sha256(b"pixels" * 100).hexdigest()
    with pytest.raises(ValueError, match="Another file"):
        fetch_sample(tmp_path / "cache", f"{site}/sample", "0" * 64)
    assert not (tmp_path / "cache").exists()
    path = fetch_sample(tmp_path / "cache", f"{site}/sample", good)
    assert path.read_bytes() == b"pixels" * 100
    assert fetch_sample(tmp_path / "cache", "http://127.0.0.1:9/gone", good) == path, "fetched once, then kept"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "SITE/missing"])
def test_no_network_is_one_sentence(address, site, tmp_path):
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        fetch_sample(tmp_path, address.replace("SITE", site), timeout=5)
    assert "\n" not in str(caught.value)


def test_only_what_lies_in_the_cache_folder_is_an_example(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPARSEWSI_CACHE", "~/cache")
    assert name_example(tmp_path / "cache" / "CMU-1-Small-Region.svs") == "cmu-1"
    assert name_example(tmp_path / "CMU-1-Small-Region.svs") == ""
