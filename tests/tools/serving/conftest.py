"""Models that know nothing, served: one that chats, and a client in this process."""

import contextlib
import json
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from safetensors.torch import save_file

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.chat import install_template, open_chat
from bigbatch.recipes.core.data.tokenizing import make_tokenizer
from bigbatch.recipes.core.generate import Sampling
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_config, hugging_face_state
from bigbatch.tools.serve import uvicorn_config
from bigbatch.tools.serving.app import build_server
from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.opening import Generating, Served


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def decoder(request):
    """Build a random model over bytes; its logits are far apart."""
    torch.manual_seed(5)
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "tie_embeddings": False}
    return Decoder(DecoderSection(family=request.param, initializer_range=0.5, **shape), 262).eval()


@pytest.fixture(scope="session")
def chatting(tmp_path_factory):
    """Serve a random model that chats."""
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(TokenizerSection(kind="bpe", vocabulary_size=260), ["a"], folder)
    install_template(folder, "chatml")
    chat = open_chat(folder)
    torch.manual_seed(3)
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 512, "tie_embeddings": False}
    model = Decoder(DecoderSection(**shape, initializer_range=0.5), chat.tokenizer.vocabulary_size).eval()
    generating = Generating(model, chat.tokenizer.tokenizer, chat, Sampling(stop_tokens=(chat.tokenizer.end_of_text,)))
    return Served("tiny", "dialogue", "torch", generating=generating)


@pytest.fixture(scope="session")
def folder(chatting, tmp_path_factory):
    """Save the model that chats as transformers does."""
    folder, generating = tmp_path_factory.mktemp("served") / "tiny", chatting.generating
    folder.mkdir()
    model = generating.model
    config = hugging_face_config(model.section, model.vocabulary_size)
    config["eos_token_id"] = generating.chat.tokenizer.end_of_text
    (folder / "config.json").write_text(json.dumps(config))
    save_file(hugging_face_state(model), folder / "model.safetensors")
    generating.tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Client:
    """A server that listens, and what asks it."""

    def __init__(self, server, port, token):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.server, self.url = server, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=token or "none", max_retries=0)


@contextlib.contextmanager
def listening(served, limits=None, token=None):
    """Serve on a free port, from a thread of this process; give a client."""
    server = build_server(served, limits or Limits(), token)
    running = uvicorn.Server(uvicorn_config(server.guard, "127.0.0.1", 0))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    client = Client(server, running.servers[0].sockets[0].getsockname()[1], token)
    yield client
    client.http.close()
    client.openai.close()
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def serve():
    """Give a function that serves for the time of a `with`."""
    return listening


@pytest.fixture(scope="session")
def talk(chatting):
    """Serve the model that chats."""
    with listening(chatting) as client:
        yield client
