#!/usr/bin/env bash
# The environment and this tree in two archives, and from them in the memory or on a disk of each node. A thousand ranks
# that import torch at once ask a shared file system for thousands of files each; so they ask it for two a node.
#
#   jobs/env/stage.sh pack ENV.tar TREE.tar           ENV.tar only where there is none of this environment yet
#   jobs/env/stage.sh unpack ENV.tar TREE.tar DIR     by one task of each node; then
#       PATH=DIR/venv/bin:$PATH PYTHONPATH=DIR/tree PYTHONSAFEPATH=1 python -m engine.pretrain …
#
# Of Python itself what lies outside /usr goes along (a module of the cluster lies on its shared file system too).
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

pack() {
    local archive=$1 tree=$2 venv part base version packages
    venv=$(realpath "${VENV:?the environment}")
    mkdir -p "$(dirname "$archive")" "$(dirname "$tree")"
    exec 9>"$archive.lock"
    flock 9
    # `make env` and pip leave their marks in these folders.
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if [[ ! -f $archive || $venv/.stages -nt $archive || $packages -nt $archive ]]; then
        part=$archive.part
        tar -C "$venv" -cf "$part" --exclude=./.lock --transform 'flags=rh;s,^\./,venv/,' .
        base=$("$venv/bin/python" -c 'import sys; print(sys.base_prefix)')
        version=$("$venv/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        if [[ $base != /usr ]]; then
            [[ -d $base/lib/$version ]] || fail "no lib/$version in $base, which Python names as its place"
            (cd "$base" && find "bin/$version" lib/libpython* "lib/$version" \
                \( -path "lib/$version/site-packages" -o -path "lib/$version/test" -o -path '*/config-*' \) -prune \
                -o \( -type f -o -type l \) -print0 2>/dev/null) |
                tar -C "$base" -rf "$part" --transform 'flags=rh;s,^,python/,' --null -T -
        fi
        mv "$part" "$archive"
    fi
    tar -cf "$tree.part" --transform 'flags=rh;s,^,tree/,' engine loaders bench jobs
    mv "$tree.part" "$tree"
}

# Unpacked as a whole: tar says nothing of an archive that ends early, between two files.
extract() {
    tar -C "$2" -xf "$1" && cmp -s <(tail -c 1024 "$1") <(head -c 1024 /dev/zero)
}

unpack() {
    local archive=$1 tree=$2 to=$3 version
    mkdir -p "$to"
    if ! extract "$archive" "$to" || ! extract "$tree" "$to"; then
        fail "$archive was not unpacked in $to on $(hostname): too little room, or a damaged archive; remove it, or take \
another --stage, or none"
    fi
    if [[ -d $to/python ]]; then # the environment's Python is the one that came along
        version=$(basename "$to"/python/bin/python3.*)
        sed -i "s,^home = .*,home = $to/python/bin," "$to/venv/pyvenv.cfg"
        for name in python python3 "$version"; do
            ln -sfn "$to/python/bin/$version" "$to/venv/bin/$name"
        done
    fi
}

case ${1:-} in
pack) shift; [[ $# == 2 ]] || fail 'pack ENV.tar TREE.tar'; pack "$@" ;;
unpack) shift; [[ $# == 3 ]] || fail 'unpack ENV.tar TREE.tar DIR'; unpack "$@" ;;
*) fail "${1:-nothing}: it takes pack or unpack; see its first lines" ;;
esac
