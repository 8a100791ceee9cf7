#!/usr/bin/env bash
# Renews requirements/*.txt: one set of versions for all supported Pythons, with markers where they must differ.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
    .venv/bin/uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-annotate \
        --custom-compile-command "make lock" "$@"
}
.venv/bin/python -m pip install --quiet uv
lock pyproject.toml --all-extras --output-file requirements/dev.txt
lock requirements/proto.in --output-file requirements/proto.txt
lock requirements/bench.in --constraint requirements/dev.txt --output-file requirements/bench.txt
