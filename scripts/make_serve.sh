#!/usr/bin/env bash
# Create .venv-serve: a Triton Inference Server, and what its model processes need. Usage: make_serve.sh
#
# Everything but numpy comes from .venv, which a .pth file puts last on the path (a path of a .pth file is relative to the
# file, and .pth files of that folder are not read: the checkout itself is not there, models bring their own code).
# Where there is no server for this platform, this says so and ends well: all but serving works without.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! -x .venv/bin/python ]]; then
    printf '%s.\n  Expected: %s.\n  To do: %s.\n' "there is no .venv" "the environment of trtpass, which lends packages" \
        "make setup" >&2
    exit 2
fi
.venv/bin/python -m venv --without-pip --clear .venv-serve # pip comes from .venv, too
packages=$(.venv-serve/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
name=$(basename "$(dirname "$packages")") # python3.11
printf '%s\n' "../../../../.venv/lib/$name/site-packages" >"$packages/zz_trtpass.pth"

give_up() { # why
    rm -rf .venv-serve
    echo "note: $1; trtpass serve will not run here ($(uname -sm), $name)"
    exit 0
}

# numpy: with numpy 2 this server's python backend passes tensors of zeros, silently.
# nvidia-pytriton: the one package that has a tritonserver inside; its own dependencies are for another way to use it.
if ! .venv-serve/bin/python -m pip --disable-pip-version-check install --quiet --only-binary :all: --no-deps \
    numpy==1.26.4 nvidia-pytriton==0.7.0; then
    give_up "no Triton Inference Server installs"
fi
server=$packages/pytriton/tritonserver
cp -p "$server/python_backend_stubs/${name#python}/triton_python_backend_stub" "$server/backends/python/"
rm -rf "$server/python_backend_stubs" # those of other Pythons
# A model process is linked with its Python's library, which not every build of Python has
libraries=$(.venv-serve/bin/python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
if missing=$(LD_LIBRARY_PATH=$libraries ldd "$server"/bin/tritonserver "$server"/backends/python/* | grep 'not found'); then
    give_up "the Triton Inference Server lacks ${missing//$'\n'/, }"
fi
.venv-serve/bin/python -c 'import numpy, onnx, onnx_ir, onnxruntime, pydantic, tokenizers
assert numpy.__version__ == "1.26.4", numpy.__version__'
