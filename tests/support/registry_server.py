"""A real OCI registry for tests: Debian's docker-registry on a free port, and engines pushed to it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from edgellm.bundle import Bundle
from edgellm.bundle.manifest import MANIFEST_MEDIA_TYPE

START_S = 20.0


@dataclass(frozen=True)
class RegistryServer:
    """A registry that runs; `url` is for HTTP, `source` is what a fleet would name."""

    authority: str
    url: str
    log: Path

    def source(self, repository: str) -> str:
        scheme = "oci" if self.url.startswith("https") else "oci+http"
        return f"{scheme}://{self.authority}/{repository}"


def need_registry() -> str:
    """The program; skips the test where it is not installed."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("needs docker-registry (apt-get install docker-registry)")
    return program


@contextlib.contextmanager
def registry_server(root: Path, **sections: object) -> Iterator[RegistryServer]:
    """A registry below `root`; `sections` join its settings, `http` its address."""
    program = need_registry()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    http = {"addr": f"127.0.0.1:{port}", **sections.pop("http", {})}
    settings = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root / "registry")}},
        "http": http,
        **sections,
    }
    root.mkdir(parents=True, exist_ok=True)
    # JSON is YAML, too.
    (root / "config.yml").write_text(json.dumps(settings))
    url = f"{'https' if 'tls' in http else 'http'}://localhost:{port}"
    with (root / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", str(root / "config.yml")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _wait(process, port, root / "registry.log")
        yield RegistryServer(f"localhost:{port}", url, root / "registry.log")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(f"the registry did not start:\n{log.read_text(errors='replace')}")


def push_with_http(client: httpx.Client, repository: str, bundle: Bundle, digest: str) -> None:
    """Pushes an engine as the distribution specification says: each blob in one PUT, then the manifest."""
    manifest = bundle.manifest(digest)
    for blob in manifest.blobs():
        begun = client.post(f"/v2/{repository}/blobs/uploads/").raise_for_status()
        data = bundle.blob_path(blob.digest).read_bytes()
        sent = client.put(
            begun.headers["Location"],
            params={**httpx.URL(begun.headers["Location"]).params, "digest": blob.digest},
            content=data,
        )
        sent.raise_for_status()
    put = client.put(
        f"/v2/{repository}/manifests/{digest}",
        content=manifest.to_json(),
        headers={"Content-Type": MANIFEST_MEDIA_TYPE},
    )
    put.raise_for_status()
    assert put.headers["Docker-Content-Digest"] == digest
