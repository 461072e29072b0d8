"""Fetching from the hub, against a small hub of our own on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
FILES = {
    "config.json": json.dumps({"model_type": "llama", **SIZES}).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the weights once more",
    "original/params.json": b"{}",
    "README.md": b"# A model",
}
REPOS = {
    "someone/tiny": FILES,
    "someone/pickled": {name: FILES[name] for name in ("config.json", "pytorch_model.bin")},
    "someone/alien": FILES | {"config.json": json.dumps({"model_type": "lama"}).encode()},
    "someone/gptq": FILES
    | {
        "config.json": json.dumps(
            {**SIZES, "model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
        ).encode()
    },
    "someone/bare": {"README.md": b"nothing else"},
}
CLIENT = """
import json, sys
from jaxtune.config import ModelConfig
from jaxtune.errors import UserError
from jaxtune.loading import resolve_source
for arguments in json.loads(sys.argv[1]):
    try:
        weights = arguments.pop("weights", True)
        source = resolve_source(ModelConfig(**arguments), weights=weights)
        files = sorted(str(file.relative_to(source.path)) for file in source.path.rglob("*"))
        print(json.dumps({"files": files, "commit": source.commit, "name": source.name}))
    except (UserError, NotImplementedError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


class Hub(BaseHTTPRequestHandler):
    """The four requests that huggingface_hub makes: file metadata, file, revision, tree."""

    log: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.log.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            owner, name, kind, revision = path.removeprefix("api/models/").split("/")[:4]
            rest: list[str] = []
        else:
            owner, name, kind, revision, *rest = path.split("/")
        repo, file = f"{owner}/{name}", "/".join(rest)
        if repo == "someone/gated":
            self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif repo not in REPOS:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            siblings = [{"rfilename": file} for file in REPOS[repo]]
            self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif kind == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in REPOS[repo].items()
            ]
            self.reply(200, json.dumps(entries).encode())
        elif file not in REPOS[repo]:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            data = REPOS[repo][file]
            self.reply(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    handler = type("LoggingHub", (Hub,), {"log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(home: Path, port: int, *models: dict, **environment: str) -> list[dict]:
    """Resolve each model in a fresh process, since huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    process = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(models)],
        env=kept | settings | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def test_fetches_what_is_needed_then_works_offline(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    log = hub.RequestHandlerClass.log
    models = [{"name_or_path": "someone/tiny", "weights": weights} for weights in (False, True)]
    preview, first = resolve(tmp_path, hub.server_port, *models)
    expected = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert preview["files"] == [name for name in expected if name != "model.safetensors"]
    assert first == {"files": expected, "commit": COMMIT, "name": "someone/tiny"}
    assert "config.json" in next(line for line in log if line.startswith("GET"))
    assert not any(word in line for line in log for word in ("pytorch_model", "consolidated", "original/", "README"))
    log.clear()
    models = [{"name_or_path": "someone/tiny"}, {"name_or_path": "someone/tiny", "revision": COMMIT}]
    assert resolve(tmp_path, hub.server_port, *models, HF_HUB_OFFLINE="1") == [first, first]
    assert resolve(tmp_path, hub.server_port, *({**model, "local_files_only": True} for model in models)) == [
        first,
        first,
    ]
    assert log == []


def test_errors_name_the_remedy(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    cases = [
        ({"name_or_path": "someone/nothing"}, "UserError", "is not on the hub, or is private"),
        ({"name_or_path": "someone/gated"}, "UserError", "is gated: accept its licence"),
        (
            {"name_or_path": "someone/tiny", "revision": "v9"},
            "UserError",
            "has no revision 'v9'; correct model.revision",
        ),
        ({"name_or_path": "someone/bare"}, "UserError", "has no config.json on the hub"),
        ({"name_or_path": "someone/tiny", "local_files_only": True}, "UserError", "download it once with a connection"),
        ({"name_or_path": "someone/tiny/more"}, "UserError", "nor a hub id (owner/name)"),
        (
            {"name_or_path": "someone/alien"},
            "UserError",
            "'lama' is not supported; the nearest families that are: llama",
        ),
        ({"name_or_path": "someone/gptq"}, "NotImplementedError", "quantization_config is gptq"),
        ({"name_or_path": "someone/pickled"}, "UserError", "Pickled weights are not fetched"),
    ]
    answers = resolve(tmp_path, hub.server_port, *(arguments for arguments, _, _ in cases))
    for answer, (_, kind, text) in zip(answers, cases, strict=True):
        assert answer["error"].startswith(kind)
        assert text in answer["error"]
    # Models that cannot be loaded cost no download of weights.
    assert not any("safetensors" in line or ".bin" in line for line in hub.RequestHandlerClass.log)


REMEDY = "HF_HUB_OFFLINE unset, model.local_files_only false"


def test_offline_with_an_empty_cache(tmp_path: Path) -> None:
    (answer,) = resolve(tmp_path, 9, {"name_or_path": "someone/tiny"}, HF_HUB_OFFLINE="1")
    assert answer["error"].startswith("UserError")
    assert REMEDY in answer["error"]


@pytest.mark.slow
def test_unreachable_hub(tmp_path: Path) -> None:
    # Port 9 (discard) is closed on any machine that runs tests; huggingface_hub tries again for some 20 seconds.
    (answer,) = resolve(tmp_path, 9, {"name_or_path": "someone/tiny"})
    assert answer["error"].startswith("UserError")
    assert REMEDY in answer["error"]
