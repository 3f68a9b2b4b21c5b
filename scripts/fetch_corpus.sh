#!/usr/bin/env bash
# Fetch the public-domain text of Debian's package jargon-text, without root. Usage: fetch_corpus.sh FOLDER
# It is wanted for calibration and quality checks only, so that a failure is a note and not an error.
set -euo pipefail
folder=$1
text=usr/share/doc/jargon-text/jargon.txt.gz

[[ -s $folder/$text || -s /$text ]] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log

# Lists of the package manager's own where they are there; else lists of our own from the same sources.
download() {
    (cd "$work" && apt-get download jargon-text) >>"$log" 2>&1 && return
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
    local own=(-o "Dir::State::Lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache" -o APT::Sandbox::User=root)
    apt-get "${own[@]}" update >>"$log" 2>&1 || true # one source that fails is no reason to stop
    (cd "$work" && apt-get "${own[@]}" download jargon-text) >>"$log" 2>&1
}

if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && download &&
    dpkg-deb -x "$work"/jargon-text_*.deb "$work/root" >>"$log" 2>&1 && gzip -t "$work/root/$text"; then
    mkdir -p "$folder/$(dirname "$text")"
    mv "$work/root/$text" "$folder/$text.part"
    mv "$folder/$text.part" "$folder/$text"
    exit 0
fi
{
    echo "note: the English text of Debian's package jargon-text could not be fetched:"
    if [[ -s $log ]]; then tail -n 3 "$log" | sed 's/^/  /'; else echo "  there is no apt-get or dpkg-deb here"; fi
    echo "  quality checks and calibration need a text file given with --text; everything else works"
} >&2
