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
