"""Serve the app: flags, the desk, the page, until interrupted."""

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client import Client
from starlette.middleware import Middleware

from sparsewsi.model.config import DEFAULT_MODEL
from sparsewsi.readers.choice import add_reader_flags, choose_reader, open_reader
from sparsewsi.web import zero_gpu
from sparsewsi.web.desk import Desk
from sparsewsi.web.door import MOST_OF_ALL, Door, hang_up_for_ever, read_logins
from sparsewsi.web.folder import make_folder, tidy_for_ever
from sparsewsi.web.memory import give_back_for_ever, share_heaps
from sparsewsi.web.page import build_page
from sparsewsi.web.uploads import Uploads
from sparsewsi.web.viewer import HEAR, PAGE_CSS, theme

ENDED_BY = {signal.SIGTERM: 0, signal.SIGINT: 130}  # and the status then
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# s that a thread keeps Python for while others want it: an answer asks for it after each of a thousand operations, and
# would wait ten times as long for every one while a page or a request is made.
TURN = 0.0005


def read_flags(argv: Sequence[str] | None, on_space: bool) -> argparse.Namespace:
    """The command line, with what the environment says where it says nothing."""
    parser = argparse.ArgumentParser(
        prog="sparsewsi app", description="Ask a whole-slide image, from the patches that matter."
    )
    parser.add_argument("--host", default="0.0.0.0" if on_space else "127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--model",
        default=os.environ.get("SPARSEWSI_MODEL") or str(DEFAULT_MODEL),
        help="folder or hub repository; default $SPARSEWSI_MODEL, else assets/demo-model",
    )
    parser.add_argument("--auth", default=os.environ.get("SPARSEWSI_AUTH"), help="name:password[,name:password ...]")
    parser.add_argument(
        "--log",
        type=Path,
        default=os.environ.get("SPARSEWSI_LOG") or None,
        help="file that views and questions are added to, as JSON lines; default $SPARSEWSI_LOG",
    )
    parser.add_argument("--name", action="append", default=[], help="a name this machine is asked by, behind a proxy")
    parser.add_argument(
        "--embed",
        action="append",
        default=["https://huggingface.co", "https://*.hf.space"] if on_space else [],
        help="origin whose pages may show this one in a frame, e.g. https://example.org; * for any",
    )
    parser.add_argument(
        "--quota", type=float, help="GB that uploads may take in all, a quarter each; default: half of what is free"
    )
    parser.add_argument("--mcp", action="store_true", help="serve the API as MCP tools too (pip install 'gradio[mcp]')")
    add_reader_flags(parser)
    flags = parser.parse_args(argv)
    flags.reader = choose_reader(flags, os.environ)
    return flags


def launch_settings(
    desk: Desk,
    host: str,
    port: int | None = None,
    auth: str | None = None,
    mcp: bool = False,
    names: Sequence[str] = (),
    embed: Sequence[str] = (),
) -> dict[str, Any]:
    """How the page is served: to this machine only, without sharing, monitoring or a record of runs.

    auth:  name:password, or several of them with commas between
    names: further names that a server of this machine alone may be asked by
    embed: origins whose pages may show this one in a frame
    Raises ValueError for an empty name or password.
    """
    known = [*LOOPBACK, host, *names] if host in LOOPBACK else []
    door = Middleware(Door, sessions=desk, names=known, embed=embed, uploads=desk.uploads)
    uploads = Uploads(desk.uploads, desk.folder, desk.quota)
    return {
        "server_name": f"[{host}]" if ":" in host and not host.startswith("[") else host,  # an address of IPv6
        "server_port": port,
        "auth": read_logins(auth),
        "app_kwargs": {"routes": [*uploads.routes(), *desk.slides.routes()], "middleware": [door]},
        "max_threads": MOST_OF_ALL + 40,  # who waits for its turn waits in a thread
        "state_session_capacity": 1000,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": mcp,
        "run_history": False,
        "enable_monitoring": False,
        "show_error": False,
        "allowed_paths": [],
        "footer_links": [],
        "theme": theme(),
        "css": PAGE_CSS.read_text(encoding="utf-8"),
        "head": f"<script>{HEAR.read_text(encoding='utf-8')}</script>",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the app until it is interrupted; returns the exit status."""
    share_heaps()
    sys.setswitchinterval(TURN)
    on_space = bool(os.environ.get("SPACE_ID"))
    before = {number: signal.signal(number, _end) for number in ENDED_BY}  # nothing is left of a slide
    try:
        flags = read_flags(argv, on_space)
        read_logins(flags.auth)
        reader = None if flags.reader is None else open_reader(flags.reader)
        with make_folder() as folder:
            # Gradio takes these from its environment alone.
            os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
            os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # it sums them up after every event
            os.environ["MPLBACKEND"] = "agg"  # else it loads pyplot to find one, while the first click waits
            private = flags.host in LOOPBACK and not on_space and flags.auth is None
            quota = int(flags.quota * 1e9) if flags.quota else shutil.disk_usage(folder).free // 2
            desk = Desk(flags.model, folder, log=flags.log, allow_paths=private, quota=quota, reader=reader)
            serve(desk, flags)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except _Ended as ended:
        # Threads that are in C++, encoding or answering, would be ended there by a usual exit, which aborts.
        os._exit(ended.status)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    return 0


class _Ended(BaseException):
    """The server was told to end."""

    def __init__(self, status: int):
        self.status = status


def _end(number: int, _frame: object) -> None:
    """End, once: a second signal does not disturb the deleting. Work that fails for that is nobody's any more."""
    for one in ENDED_BY:
        signal.signal(one, signal.SIG_IGN)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    raise _Ended(ENDED_BY[signal.Signals(number)])


def serve(desk: Desk, flags: argparse.Namespace) -> None:
    """Launch the page of a desk, load its model beside that, and wait. Raises ValueError if MCP cannot be served."""
    # What goes to this machine itself never goes through a proxy: Gradio looks whether its page is there.
    direct = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK, flags.host)))
    os.environ["no_proxy"] = direct
    os.environ["NO_PROXY"] = direct
    if zero_gpu.is_lent():
        desk.load()  # what is loaded after the launch has to be copied to the GPU in every call
    demo = build_page(desk)
    settings = launch_settings(desk, flags.host, flags.port, flags.auth, flags.mcp, flags.name, flags.embed)
    _, address, _ = demo.launch(**settings, quiet=True, prevent_thread_lock=True)
    if demo.mcp_error:  # Gradio would serve the page without
        demo.close(verbose=False)
        raise ValueError("--mcp needs the packages of an extra of Gradio: pip install 'gradio[mcp]'.")
    log_in_tools(demo, address, flags.auth)
    threading.Thread(target=desk.warm_up, name="warm-up", daemon=True).start()
    connections = demo.server.server_state.connections
    for work, given in (
        (tidy_for_ever, desk.tidy),
        (give_back_for_ever, lambda: desk.jobs.steps),
        (hang_up_for_ever, connections),
    ):
        threading.Thread(target=work, args=(given,), name=work.__name__, daemon=True).start()
    print(f"SparseWSI is served at {address}", flush=True)
    demo.block_thread()


def log_in_tools(demo: gr.Blocks, address: str, auth: str | None) -> None:
    """Give MCP a client that is logged in: Gradio's own, through which all tools are called, cannot."""
    logins = read_logins(auth)
    if logins and demo.mcp_server_obj is not None:
        demo.mcp_server_obj._client_instance = Client(
            address,
            auth=logins[0],
            verbose=False,
            analytics_enabled=False,
            download_files=False,
            _skip_components=False,
        )
