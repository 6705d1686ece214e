#!/bin/sh
# Prometheus' own programs, which check its rules and stand behind the gateway in tests. Where they are not on PATH,
# Debian's packages are unpacked into the folder $1: without root, and nothing is installed. Where that cannot be, what
# needs them is left out, and says so.
set -eu

has_all() {
    for program in prometheus promtool amtool; do
        command -v "$program" >/dev/null || return 1
    done
}

if has_all; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "prometheus, promtool and amtool are not all on PATH, and without apt-get they are yours to install;" \
        "the tests that need them are skipped" >&2
    exit 0
fi

mkdir -p "$1/apt/lists/partial" "$1/apt/archives/partial"
folder=$(cd "$1" && pwd)
# Lists and locks of our own: those of the machine are root's.
unpack() {
    cd "$folder/apt"
    set -- -qq -o Dir::State::lists="$folder/apt/lists" -o Dir::Cache="$folder/apt" -o Debug::NoLocking=1 -o APT::Sandbox::User=
    apt-get "$@" update && apt-get "$@" download prometheus prometheus-alertmanager || return 1
    for package in ./*.deb; do dpkg-deb --extract "$package" "$folder" || return 1; done
}
if ! (unpack); then
    echo "Debian's packages prometheus and prometheus-alertmanager could not be had; the tests that need them are skipped" >&2
fi
# Debian's Alertmanager wants its templates under /usr: it runs only where it is installed.
rm -rf "$folder/apt" "$folder/usr/bin/prometheus-alertmanager"
