"""A tiny vision-language model, pictures to show it, and a stand-in for a server."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsewsi.readers.pictures import Pictures

LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}\n{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llava(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random LLaVA: CLIP's vision tower (2 layers, 28 px), the tiny Llama, a processor with a template."""
    import torch
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    text = AutoConfig.from_pretrained(tiny_llm)
    text.vocab_size = len(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        image = tokenizer.convert_tokens_to_ids("<image>")
        settings: Any = {"image_token_id": image, "vision_feature_layer": -1}
        config = LlavaConfig(vision_config=vision, text_config=text, **settings)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    folder = tmp_path_factory.mktemp("readers") / "tiny-llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """Three patches of noise, the best of them last, and an overview."""
    drawn = np.random.default_rng(0).integers(0, 255, (3, 56, 56, 3), np.uint8)
    overview = np.full((20, 30, 3), 200, np.uint8)
    return Pictures(tuple(drawn), (9, 5, 1), 0.5, overview)


class StandInServer:
    """Stands in for an OpenAI-compatible server: answers in turn what the test says, and keeps what it was sent.

    replies: each is called with the handler of one request
    received: (path, headers, body) of every request, as bytes on the wire
    """

    def __init__(self) -> None:
        self.replies: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        mine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                mine.received.append((self.path, dict(self.headers), body))
                mine.replies.pop(0)(self)
                self.close_connection = True

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def say(self, *pieces: str, end: str | None = "stop", refusal: str | None = None) -> None:
        """Stream these pieces; end None: the connection drops after them."""

        def reply(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.end_headers()
            events: list[Any] = [{"delta": {"content": piece}} for piece in pieces]
            if refusal is not None:
                events.append({"delta": {"refusal": refusal}})
            if end is not None:
                events.append({"delta": {}, "finish_reason": end})
            handler.wfile.write(b": a comment, as proxies send them\n\n")
            for event in events:
                handler.wfile.write(f"data: {json.dumps({'choices': [event]})}\n\n".encode())
            if end is not None:
                handler.wfile.write(b'data: {"choices": [], "usage": {"total_tokens": 9}}\n\ndata: [DONE]\n\n')

        self.replies.append(reply)

    def fail(self, status: int, message: str = "", **headers: str) -> None:
        """Answer with an HTTP status and a message as OpenAI words it."""

        def reply(handler: BaseHTTPRequestHandler) -> None:
            body = json.dumps({"error": {"message": message}}).encode()
            handler.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        self.replies.append(reply)


@pytest.fixture
def stand_in_server() -> Iterator[StandInServer]:
    server = StandInServer()
    yield server
    server.close()
