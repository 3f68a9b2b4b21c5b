#!/usr/bin/env bash
# Create .venv and install trtpass into it with everything a developer needs. Usage: make_venv.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

stop() { # found, expected, what to do
    printf '%s.\n  Expected: %s.\n  To do: %s.\n' "$@" >&2
    exit 2
}

supported="Python 3.11 or 3.12"
command -v "$python" >/dev/null ||
    stop "there is no '$python' on PATH" "$supported" "make setup PYTHON=/path/to/python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    stop "'$python' does not run" "$supported" "make setup PYTHON=/path/to/python3.12"
case $version in
    3.11 | 3.12) ;;
    *) stop "'$python' is Python $version" "$supported" "make setup PYTHON=python3.12" ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "'$python' cannot create virtual environments" "its modules venv and ensurepip" \
        "apt install python$version-venv, then make setup again"

[[ -x .venv/bin/python ]] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
echo "installing trtpass and its dependencies into .venv (a few minutes the first time)"
"${pip[@]}" install --quiet -e '.[dev,kernels]'
# NVIDIA's Python code of TensorRT's plugins, for the tests: source only, so without the library that it wraps
if ! "${pip[@]}" install --quiet --no-deps tensorrt-cu13-bindings==11.4.0.106; then
    echo "note: tensorrt-cu13-bindings does not install here; NVIDIA's validators of plugins are not run by the tests" >&2
fi
if ! "${pip[@]}" install --quiet -e '.[rtx]'; then
    echo "note: TensorRT-RTX does not install here; the target tensorrt-rtx is off, everything else works" >&2
fi
