#!/usr/bin/env bash
# Create .venv-kvpress: NVIDIA's kvpress with the older transformers that it pins. Usage: make_kvpress.sh
# Tests and benchmarks compare with it; nothing else uses it.
#
# What both can share (torch, numpy and most others) comes from .venv, which a .pth file puts last on the path: pip then
# installs only what kvpress needs in another version, and leaves .venv alone as it is outside the new environment.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! -x .venv/bin/python ]]; then
    printf '%s.\n  Expected: %s.\n  To do: %s.\n' "there is no .venv" "the environment of trtpass, which lends torch" \
        "make setup, then make kvpress again" >&2
    exit 2
fi
.venv/bin/python -m venv --without-pip --clear .venv-kvpress # pip comes from .venv, too
packages=$(.venv-kvpress/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
name=$(basename "$(dirname "$packages")") # python3.11
printf '%s\n' "../../../../.venv/lib/$name/site-packages" ../../../.. >"$packages/zz_trtpass.pth" # relative to itself
echo "installing kvpress into .venv-kvpress (half a minute)"
# transformers and the two that it limits are pinned: its masks and caches differ between versions
.venv-kvpress/bin/python -m pip --disable-pip-version-check install --quiet \
    kvpress==0.5.5 transformers==5.2.0 tokenizers==0.22.2 'huggingface_hub<2'
.venv-kvpress/bin/python -c 'import kvpress'
