"""Fixtures shared by all tests: real data if they are there, tiny models, a stand-in for a server, a browser."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, tiles and questions that are not part of the project: `data` in the folder $SPARSEWSI_SHARED."""
    shared = os.environ.get("SPARSEWSI_SHARED")
    if not shared:
        pytest.skip("SPARSEWSI_SHARED names no folder of real slides")
    folder = Path(shared) / "data"
    assert folder.is_dir(), f"SPARSEWSI_SHARED is {shared}, which holds no folder data"
    return folder


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-features=LocalNetworkAccessChecks",  # a page of one local address in a frame of another's
]


@pytest.fixture(scope="module")  # not longer: Playwright keeps an event loop running in this thread
def browser() -> Iterator:
    """Headless Chromium under Playwright; skips where either is missing."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield opened
        opened.close()


TINY_CORPUS = [
    "Which tissue is this? It is liver, colon mucosa, fat or a lymph node.",
    "The slide shows a carcinoma with necrosis and mucin beside normal glands.",
    "A. yes\nB. no\nC. there is no tumour in this slide\nD. cannot be said",
]


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama (2 layers, hidden 64, grouped-query attention) with a small ChatML tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TINY_CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                initializer_range=0.2,  # large, so that positions and context show in the logits
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    folder = tmp_path_factory.mktemp("tiny-llm")
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained artefact on the tiny LLM and the default patch encoder."""
    import torch

    from sparsewsi.model.config import SparseWSIConfig
    from sparsewsi.model.llm import load_llm
    from sparsewsi.model.sparse_wsi import SparseWSI

    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    llm, tokenizer = load_llm(str(tiny_llm))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SparseWSIConfig(llm=str(tiny_llm), dim=32, heads=4, num_tokens=6, demo=True, note="Untrained.")
        SparseWSI(config, llm, tokenizer).save_pretrained(folder)
    return folder


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


class StandInServer:
    """Stands in for an OpenAI-compatible server: answers in turn what the test says, and keeps what it was sent.

    replies: each is called with the handler of one request
    always: what answers a request's body once there are no replies left: text, and its tokens in and out
    received: (path, headers, body) of every request, as bytes on the wire
    """

    def __init__(self) -> None:
        self.replies: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.always: Callable[[dict[str, Any]], tuple[str, int, int]] | None = None
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        mine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                mine.received.append((self.path, dict(self.headers), body))
                if mine.replies or mine.always is None:
                    mine.replies.pop(0)(self)
                else:
                    text, tokens_in, tokens_out = mine.always(json.loads(body))
                    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
                    choice = {"message": {"content": text}, "finish_reason": "stop"}
                    answer = json.dumps({"choices": [choice], "usage": usage}).encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
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
