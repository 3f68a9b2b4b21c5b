#!/usr/bin/env bash
# Fetch ONNX Runtime's C headers (Debian's package libonnxruntime-dev), without root. Usage: fetch_headers.sh FOLDER
# Only the library of native kernels needs them, so that a failure is a note and not an error.
#
# The package is in Debian from trixie on. An older system asks its own mirrors for that suite, with package lists of its
# own in a temporary folder: nothing of the system is changed. 1.21's headers serve every later runtime: the C interface
# only grows.
set -euo pipefail
folder=$1
header=usr/include/onnxruntime/onnxruntime_c_api.h

[[ -s $folder/$header || -s /$header ]] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log
suite=trixie

# One line for each Debian mirror of this machine, the suite replaced.
sources() {
    local files=(/etc/apt/sources.list /etc/apt/sources.list.d/*.list)
    awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /^(https?|file|mirror)/ && $i ~ /debian\/?$/) { print $i; break } }' \
        "${files[@]}" 2>/dev/null || true
    awk '$1 == "URIs:" { for (i = 2; i <= NF; i++) if ($i ~ /debian\/?$/) print $i }' \
        /etc/apt/sources.list.d/*.sources 2>/dev/null || true
}

download() {
    (cd "$work" && apt-get download libonnxruntime-dev) >>"$log" 2>&1 && return
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg
    sources | sort -u | sed "s|.*|deb [signed-by=$keys] & $suite main|" >"$work/apt/sources.list"
    [[ -s $work/apt/sources.list ]] || { echo "this machine names no Debian mirror" >>"$log" && return 1; }
    local own=(-o "Dir::State::Lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache" -o APT::Sandbox::User=root
        -o "Dir::Etc::SourceList=$work/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null)
    apt-get "${own[@]}" update >>"$log" 2>&1 || true # one mirror that fails is no reason to stop
    (cd "$work" && apt-get "${own[@]}" download libonnxruntime-dev) >>"$log" 2>&1
}

if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && download &&
    dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/root" >>"$log" 2>&1 && [[ -s $work/root/$header ]]; then
    mkdir -p "$folder/$(dirname "$header")"
    cp "$work/root/$(dirname "$header")"/*.h "$folder/$(dirname "$header")/"
    exit 0
fi
{
    echo "note: ONNX Runtime's C headers (Debian's libonnxruntime-dev) could not be fetched:"
    if [[ -s $log ]]; then tail -n 3 "$log" | sed 's/^/  /'; else echo "  there is no apt-get or dpkg-deb here"; fi
    echo "  native kernels are not built, everything else works; with headers of your own: make native HEADERS=folder"
} >&2
