"""Uploads of strangers: each in a folder that only its uploader is told, within a quota, gone when it breaks off.

Gradio names an upload by its content and keeps its name; here it gets a folder that cannot be guessed, and a plain
name. So whoever can say where an upload lies is who uploaded it.
"""

import asyncio
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path

from gradio.route_utils import GradioMultiPartParser, GradioUploadFile
from gradio.routes import file_upload_statuses
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sparsewsi.web.folder import measure
from sparsewsi.web.limits import MOST_SLIDES

LARGEST = 8 << 30  # bytes of a file
FREE = 2 << 30  # bytes that stay free on the disk
AT_ONCE, AT_ONCE_OF_ADDRESS = 16, 4  # uploads that are coming in
PATIENCE = 30.0  # s until an upload's next bytes
SLOWEST = 10_000  # bytes/s over the whole of an upload, after PATIENCE


class Uploads:
    """Takes uploads in place of Gradio's route.

    folder: where they lie; it may be made anew at any time
    home:   the folder whose files, these among them, are held to the quota
    quota:  bytes in all; uploads that were not opened yet may take a quarter of it for each address
    """

    def __init__(self, folder: Path, home: Path, quota: int) -> None:
        self._folder, self._home, self._quota = folder, home, quota
        self._coming: Counter[str] = Counter()  # by address: uploads that are coming in
        self._promised: dict[str, tuple[str, int]] = {}  # by folder: address, bytes said to come or lying there

    def routes(self) -> list[Route]:
        """To stand before Gradio's own."""
        return [Route("/gradio_api/upload", self._take, methods=["POST"])]

    async def _take(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        length = request.headers.get("content-length", "")
        if not length.isdigit():
            return PlainTextResponse("An upload must say how long it is.", 411)
        if refused := await run_in_threadpool(self._refuse, address, int(length)):
            return PlainTextResponse(refused[1], refused[0])
        folder = self._folder / secrets.token_urlsafe(16)
        self._coming[address] += 1
        self._promised[folder.name] = address, int(length)
        kept: list[Path] = []
        try:
            folder.mkdir(mode=0o700, parents=True)
            kept = await self._write(request, folder, address)
            return JSONResponse([str(path) for path in kept])
        except (MultiPartException, KeyError, ValueError) as error:
            return PlainTextResponse(f"The upload could not be read ({' '.join(str(error).split())[:100]}).", 400)
        except TimeoutError:
            return PlainTextResponse("The upload came too slowly and was dropped.", 408)
        except ClientDisconnect:
            return PlainTextResponse("The upload broke off.", 400)
        except OSError:  # a full disk
            return PlainTextResponse("The server has no room for this file now; try again later.", 507)
        finally:
            self._coming[address] -= 1
            if not self._coming[address]:
                del self._coming[address]
            if not kept:
                self._promised.pop(folder.name, None)
                shutil.rmtree(folder, ignore_errors=True)
            if upload_id := request.query_params.get("upload_id"):
                file_upload_statuses.set_done(upload_id)
                asyncio.get_running_loop().call_later(PATIENCE, file_upload_statuses.stop_tracking, upload_id)

    def _refuse(self, address: str, length: int) -> tuple[int, str] | None:
        if length > LARGEST:
            return 413, f"The files of an upload may have {LARGEST >> 30} GB at most."
        if self._coming.total() >= AT_ONCE or self._coming[address] >= AT_ONCE_OF_ADDRESS:
            return 429, "Too many uploads are coming in; wait for them."
        for name in list(self._promised):
            if not (self._folder / name).is_dir():
                self._promised.pop(name, None)
        mine = sum(size for who, size in list(self._promised.values()) if who == address)
        if mine + length > self._quota // 4:
            return 507, "Your uploads that are not opened yet take too much room; open them or wait some minutes."
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        coming = sum(size for _, size in list(self._promised.values()))
        used = measure(self._home) - measure(self._folder) + coming
        if used + length > self._quota or shutil.disk_usage(self._folder).free - length < FREE:
            return 507, "The server has no room for this file now; try again later."
        return None

    async def _write(self, request: Request, folder: Path, address: str) -> list[Path]:
        """The upload's files, each in a folder of its own, under a plain name."""
        upload_id = request.query_params.get("upload_id")
        if upload_id:
            file_upload_statuses.track(upload_id)
        parser = GradioMultiPartParser(
            request.headers,
            _in_time(request.stream()),
            max_files=MOST_SLIDES,
            max_fields=0,  # they would be kept in memory
            upload_dir=folder,
            upload_id=upload_id,
            upload_progress=file_upload_statuses if upload_id else None,
            max_file_size=LARGEST,
        )
        form = await parser.parse()
        files = [file for file in form.getlist("files") if isinstance(file, GradioUploadFile)]
        if not files:
            raise ValueError("it holds no file")
        kept = []
        for number, file in enumerate(files):
            await file.close()
            home = folder if number == 0 else self._folder / secrets.token_urlsafe(16)
            home.mkdir(mode=0o700, exist_ok=True)
            suffix = Path(file.filename or "").suffix
            kept.append(home / f"slide{suffix if re.fullmatch(r'[.][A-Za-z0-9]{1,8}', suffix) else ''}")
            Path(str(file.file.name)).rename(kept[-1])
            self._promised[home.name] = address, kept[-1].stat().st_size
        return kept


async def _in_time(stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The pieces of an upload. Raises TimeoutError for one that stands still or trickles."""
    began, total = time.monotonic(), 0
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), PATIENCE)
        except StopAsyncIteration:
            return
        total += len(piece)
        if time.monotonic() - began - PATIENCE > total / SLOWEST:
            raise TimeoutError
        yield piece
