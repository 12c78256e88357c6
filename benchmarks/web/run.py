"""MiniLM in int8 in a browser: onnxruntime-web computes the embeddings that ONNX Runtime computes here.

    npm install --no-package-lock --prefix benchmarks/web && python benchmarks/web/run.py [--serve]

Compiles MiniLM, serves `index.html`, the model and the runtime from this machine to a headless Chromium, and compares
what the page sends back. `--serve` leaves the server up for a browser of one's own.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
INSTALL = "npm install --no-package-lock --prefix benchmarks/web"
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell today.")
#: smallest cosine to the embeddings of the runtime here: floats are summed in another order, and codes round otherwise
CLOSE = 0.999


def browser() -> str | None:
    """A Chromium, where one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def runtime() -> Path | None:
    """The files of onnxruntime-web, where npm has put them."""
    folder = HERE / "node_modules" / "onnxruntime-web" / "dist"
    return folder if folder.is_dir() else None


def write(folder: Path, scheme: str = "W8A8-dynamic") -> np.ndarray[Any, Any]:
    """model.onnx and example.json; returns the embeddings `[B, 384]` that the runtime here computes."""
    import paretoc as pc
    from _models import embed, minilm

    model, tokenizer = minilm()
    tokens = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    passes = [f"quantize:{scheme},embeddings=true"]
    compiled = pc.compile(model, passes, example_inputs=tokens, calibration=[tokens], verify=False)
    compiled.export_onnx(folder / "model.onnx")
    want = embed(compiled, tokenizer, list(SENTENCES)).numpy()
    example = {"sentences": SENTENCES, "inputs": {n: t.tolist() for n, t in tokens.items()}, "want": want.tolist()}
    (folder / "example.json").write_text(json.dumps(example))
    return want


class Server(http.server.ThreadingHTTPServer):
    """Serves the page and what it needs on a free port of this machine alone; keeps what the page sends back."""

    def __init__(self, folder: Path, dist: Path) -> None:
        self.folder, self.dist, self.result, self.done = folder, dist, dict[str, Any](), threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/index.html"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def translate_path(self, path: str) -> str:
        name = Path(path.partition("?")[0]).name
        folders = {True: self.server.dist, False: HERE if name == "index.html" else self.server.folder}
        return str(folders[path.startswith("/runtime/")] / name)

    def do_POST(self) -> None:
        self.server.result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def visit(server: Server, program: str, timeout: float = 120) -> dict[str, Any]:
    """What the page sends back when a headless browser opens it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        # nothing but this machine can be reached; Chromium's sandbox does not start for root
        options += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        call = [program, *options, server.address]
        with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            finished = server.done.wait(timeout)
            process.terminate()
    return server.result if finished else {"error": f"the page sent nothing in {timeout:g} s"}


def closeness(want: np.ndarray[Any, Any], got: list[list[float]]) -> np.ndarray[Any, Any]:
    """The cosine of each sentence's embedding to that computed elsewhere, `[B]`."""
    return np.asarray((np.array(got) * want).sum(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave the page up for another browser")
    parser.add_argument("--scheme", default="W8A8-dynamic")
    arguments = parser.parse_args()
    dist, program = runtime(), browser()
    if dist is None or not (program or arguments.serve):
        missing = f"onnxruntime-web: {INSTALL}" if dist is None else "chromium"
        raise SystemExit(f"not installed: {missing}")
    with tempfile.TemporaryDirectory() as folder:
        want = write(Path(folder), arguments.scheme)
        server = Server(Path(folder), dist)
        if arguments.serve:
            print(server.address)
            server.serve_forever()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = visit(server, str(program))
        server.shutdown()
    if "error" in result:
        raise SystemExit(result["error"])
    cosines = closeness(want, result["embeddings"])
    print(f"onnxruntime-web {result['version']}: {result['milliseconds']:.1f} ms, one thread, {len(want)} sentences")
    print("cosine to ONNX Runtime here:", ", ".join(f"{c:.6f}" for c in cosines))
    raise SystemExit(not bool((cosines > CLOSE).all()))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
