#!/usr/bin/env bash
# Generates sdk/edgellm/v1 from proto/; with --check, tells whether what is committed is what proto/ gives.
set -euo pipefail
cd "$(dirname "$0")/.."
committed=sdk/edgellm/v1
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

PATH="$PWD/.venv-proto/bin:$PATH" .venv-proto/bin/python -m grpc_tools.protoc -I proto \
    --python_out="$fresh" --grpc_python_out="$fresh" --mypy_out=quiet:"$fresh" --mypy_grpc_out=quiet:"$fresh" \
    proto/edgellm/v1/*.proto
# Files without a service have nothing to serve.
for name in fleet telemetry worker; do rm "$fresh/edgellm/v1/${name}_pb2_grpc.py" "$fresh/edgellm/v1/${name}_pb2_grpc.pyi"; done
echo '"""Messages and stubs generated from proto/edgellm/v1 by `make proto`."""' > "$fresh/edgellm/v1/__init__.py"

if [ "${1:-}" = --check ]; then
    if ! diff -r --exclude=__pycache__ "$fresh/edgellm/v1" "$committed"; then
        echo "sdk/edgellm/v1 is not what proto/ gives: run 'make proto' and commit the result" >&2
        exit 1
    fi
    echo "generated code is fresh"
else
    rm -rf "$committed"
    cp -r "$fresh/edgellm/v1" "$committed"
fi
