"""How the app is served: to this machine only, with no record; where state and flags live."""

import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsewsi.web import serve
from sparsewsi.web.desk import Desk
from sparsewsi.web.folder import make_folder
from sparsewsi.web.page import build_page
from sparsewsi.web.serve import launch_settings, main, read_flags

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("mcp") is not None, reason="what MCP needs is installed")
def test_tools_that_cannot_be_served_are_not_left_out_silently(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended_by = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main(["--mcp", "--model", str(tiny_model)]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == ended_by
    expected = "--mcp needs the packages of an extra of Gradio: pip install 'gradio[mcp]'."
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected
    assert not list(tmp_path.glob("sparsewsi-*")), "what was private is gone"


def test_it_is_served_to_this_machine_and_keeps_no_record(desk):
    settings = launch_settings(desk, "127.0.0.1")
    wanted = {
        "server_name": "127.0.0.1",
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "allowed_paths": [],
    }
    assert {key: settings[key] for key in wanted} == wanted
    assert all(font not in str(settings["theme"].font) for font in ("Google", "http"))


def test_the_first_click_does_not_wait_for_pyplot(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("MPLBACKEND", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_MAX_EVENTS"):
        monkeypatch.setenv(name, "")  # and as it was afterwards
    script = "import sys, gradio; gradio.utils.MatplotlibBackendMananger().__enter__(); print(*sys.modules)"
    loaded = []

    def click(*_) -> None:
        loaded.extend(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split())

    monkeypatch.setattr(serve, "serve", click)
    assert main(["--model", str(tiny_model)]) == 0
    assert "matplotlib" in loaded
    assert "matplotlib.pyplot" not in loaded


@pytest.mark.parametrize("allowed", [True, False])
def test_a_path_can_be_opened_only_where_that_is_allowed(allowed, tiny_model, tmp_path):
    demo = build_page(Desk(str(tiny_model), tmp_path, allow_paths=allowed))
    assert ("on_typed_path" in [getattr(fn.fn, "__name__", "") for fn in demo.fns.values()]) == allowed
    assert not demo.analytics_enabled
    public = {str(fn.api_name) for fn in demo.fns.values() if fn.fn is not None and fn.api_visibility != "private"}
    assert public == {"analyze", "ask", "evidence"}


def test_two_desks_share_nothing(tiny_model, tmp_path):
    one, other = (Desk(str(tiny_model), tmp_path / name) for name in ("one", "other"))
    token = one.slides.add(tmp_path / "slide.svs", "session")
    one.turns.begin("session", "question")
    assert not other.slides.holds(token)
    assert not other.turns.busy("session")
    assert one.folder_of("session") != other.folder_of("session")


def test_login_is_asked_for_where_names_are_given(desk):
    assert launch_settings(desk, "127.0.0.1")["auth"] is None
    assert launch_settings(desk, "127.0.0.1", None, "a:b:c,d:e")["auth"] == [("a", "b:c"), ("d", "e")]


def test_a_flag_goes_before_the_environment(monkeypatch):
    for name, value in (("MODEL", "owner/model"), ("LOG", "log.jsonl"), ("AUTH", "a:b")):
        monkeypatch.setenv(f"SPARSEWSI_{name}", value)
    flags = read_flags([], on_space=False)
    assert (flags.model, flags.log, flags.auth, flags.host) == ("owner/model", Path("log.jsonl"), "a:b", "127.0.0.1")
    flags = read_flags(["--model", "mine", "--log", "mine.jsonl"], on_space=True)
    assert (flags.model, flags.log, flags.host) == ("mine", Path("mine.jsonl"), "0.0.0.0")


def test_what_a_killed_server_left_is_gone_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "import time; from sparsewsi.web.folder import make_folder\n"
    code += "with make_folder() as folder: print(folder, flush=True); time.sleep(60)"
    servers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    killed, alive = (Path(str(server.stdout and server.stdout.readline()).strip()) for server in servers)
    (killed / "0123abcd").mkdir()
    (killed / "0123abcd" / "slide.svs").write_bytes(b"slide")
    servers[0].kill()
    servers[0].wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with make_folder() as mine:
        assert not killed.exists()
        assert alive.exists()
        assert mine.stat().st_mode & 0o777 == 0o700
    assert not mine.exists()
    servers[1].kill()
    servers[1].wait()


def test_a_server_that_starts_beside_another_keeps_its_folder(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "from sparsewsi.web.folder import make_folder\nwith make_folder(): pass"
    lock, swept = fcntl.flock, []

    def late(held, how):
        if how == fcntl.LOCK_EX and not swept:  # between the file's making and its lock: another server starts
            swept.append(Path(held.name).parent)
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "TMPDIR": str(tmp_path)}
            )
        lock(held, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with make_folder() as mine:
        assert [folder.exists() for folder in swept] == [False]
        assert (mine / "held").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_opened_or_owns_is_deleted_after_a_while(tiny_model, tmp_path, monkeypatch):
    desk = Desk(str(tiny_model), tmp_path)
    (tmp_path / "held").touch()
    for name in ("gradio/old/slide.svs", "gradio/new/slide.svs"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"slide")
    (desk.uploads / "broken-off").write_bytes(b"half")
    desk.arrive("here")
    desk.ask("asked")
    desk.ask("long ago")
    for session in ("here", "asked", "long ago", "nobody"):
        desk.folder_of(session).mkdir()
        (desk.folder_of(session) / "slide.svs").write_bytes(b"slide")
    for path in [*desk.folder.rglob("*")]:
        if path.parent.name != "new" and path.name != "new":
            os.utime(path, (1, 1))
    desk._asked["long ago"] -= 1e6
    desk.tidy()
    left = {"gradio", "held", desk.folder_of("here").name, desk.folder_of("asked").name}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert [path.name for path in desk.uploads.iterdir()] == ["new"]
    desk.forget("here")
    assert not desk.folder_of("here").exists()


@pytest.mark.parametrize("auth", ["", ":", "me:", "me:secret,you:"])
def test_the_server_does_not_start_with_an_empty_password(auth, capsys):
    assert main(["--auth", auth]) == 2
    assert "no part may be empty" in capsys.readouterr().err
