#!/usr/bin/env bash
# Makes .venv-bench: edgellm itself and the peers that it is measured against. llama.cpp has no wheel and is compiled here.
set -euo pipefail
cd "$(dirname "$0")/.."

has() { grep -qwE "^(flags|Features)[[:space:]]*:.*[[:space:]]$1" /proc/cpuinfo; }
on_if() { if has "$1"; then echo ON; else echo OFF; fi; }

# llama.cpp's own guess (GGML_NATIVE) makes code that crashes on machines with AMX, so each instruction set is named.
x86_flags() {
    local name all=ON
    for name in avx512f avx512cd avx512bw avx512dq avx512vl; do has "$name" || all=OFF; done
    echo "-DGGML_AVX=$(on_if avx) -DGGML_AVX2=$(on_if avx2) -DGGML_FMA=$(on_if fma)" \
        "-DGGML_F16C=$(on_if f16c) -DGGML_BMI2=$(on_if bmi2) -DGGML_AVX_VNNI=$(on_if avx_vnni)" \
        "-DGGML_AVX512=$all -DGGML_AVX512_VNNI=$(on_if avx512_vnni) -DGGML_AVX512_VBMI=$(on_if avx512vbmi)"
}

arm_flags() {
    local arch=armv8-a
    if has asimddp; then arch=armv8.2-a+dotprod; fi
    if has asimddp && has asimdhp; then arch+=+fp16; fi
    if has asimddp && has i8mm; then arch+=+i8mm; fi
    echo "-DGGML_CPU_ARM_ARCH=$arch"
}

case "$(uname -m)" in
    x86_64) flags=$(x86_flags) ;;
    aarch64) flags=$(arm_flags) ;;
    *) flags= ;;
esac
export CMAKE_ARGS="-DGGML_NATIVE=OFF $flags ${CMAKE_ARGS:-}"

# Locked versions of the peers are not constrained by dev.txt: the lock of bench.in was.
${PYTHON:-python3} -m venv .venv-bench
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-bench/bin/python -m pip install --quiet "$@"; }
pip --constraint requirements/dev.txt --editable '.[demo]'
if ! .venv-bench/bin/python -c 'import llama_cpp' 2>/dev/null; then
    command -v c++ >/dev/null || { echo "llama.cpp needs a C++ compiler: install g++" >&2; exit 1; }
    echo "compiling llama.cpp, about five minutes on two cores: $CMAKE_ARGS"
fi
pip --requirement requirements/bench.txt

# llama.cpp's own server batches as requests come, which the Python one does not; no package on PyPI has it.
# It is compiled from the same source, another ten minutes on two cores.
build_llama_server() {
    local folder source
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' RETURN
    pip cmake ninja
    (cd "$folder" && "$OLDPWD/.venv-bench/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
        "llama-cpp-python==$1" && tar xzf llama_cpp_python-*.tar.gz)
    source=$(echo "$folder"/llama_cpp_python-*/vendor/llama.cpp)
    # shellcheck disable=SC2086  # several arguments
    PATH="$PWD/.venv-bench/bin:$PATH" cmake -S "$source" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        $CMAKE_ARGS -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF >/dev/null
    PATH="$PWD/.venv-bench/bin:$PATH" cmake --build "$folder/build" --target llama-server >/dev/null
    cp "$folder/build/bin/llama-server" .venv-bench/bin/
}
if [ ! -x .venv-bench/bin/llama-server ]; then
    echo "compiling llama-server, about ten minutes on two cores"
    build_llama_server "$(.venv-bench/bin/python -c 'import llama_cpp; print(llama_cpp.__version__)')" ||
        echo "llama-server could not be compiled: its rows will be skipped" >&2
fi

# onnxruntime-genai builds its model once, and only for that needs torch: 0.2 GB for CPUs, many times that
# otherwise. BENCH_TORCH says what pip gets for it, for example a wheel; without it, genai's rows are skipped.
# ModelOpt needs it too, and accelerate and requests, which it does not ask for.
if [ -n "${BENCH_TORCH:-}" ]; then
    # shellcheck disable=SC2086
    pip $BENCH_TORCH transformers==5.18.0 nvidia-modelopt==0.47.0 accelerate requests
fi
