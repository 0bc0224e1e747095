#!/bin/bash
# tools.sh OUT_DIR makes OUT_DIR/tools.raw: an ext4 file system labelled "tools",
# without partitions, with Debian's fio, mke2fs and e2fsck and the libraries that
# they need. A guest of build.sh that has it as a second disk mounts it and can
# run what is on it: see `tools` and `run` in rootfs/agent.
set -euo pipefail
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin

die() { echo "test/guest/tools.sh: $*" >&2; exit 1; }
[ $# -eq 1 ] || die "usage: tools.sh OUT_DIR"
mkdir -p "$1"
out=$(realpath "$1")
programs=()
for p in fio mke2fs e2fsck busybox; do
	programs+=("$(command -v "$p")") || die "$p is missing; install fio, e2fsprogs and busybox-static"
done

exec 9>"$out/.tools.lock"
flock 9
files=$(for p in "${programs[@]}"; do
	echo "$p"
	ldd "$p" 2>/dev/null | grep -o '/[^ ]*' || true
done | sort -u)
inputs=$( (cat "${BASH_SOURCE[0]}"; echo "$files" | xargs -d '\n' stat -L -c '%n %s %Y') | sha256sum)
if [ -f "$out/tools.raw" ] && [ "$(cat "$out/.tools.inputs" 2>/dev/null)" = "$inputs" ]; then
	exit 0
fi
rm -f "$out/.tools.inputs"
work=$(mktemp -d "$out/.work-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/tree/{dev,proc,run,tmp,data,bin}
while read -r f; do
	mkdir -p "$work/tree$(dirname "$f")"
	cp -L "$f" "$work/tree$f"
done <<<"$files"
[ -e "$work/tree/bin/sh" ] || ln -s busybox "$work/tree/bin/sh"
[ -e "$work/tree/bin/busybox" ] || cp -L "$(command -v busybox)" "$work/tree/bin/busybox"
size=$(($(du -sm "$work/tree" | cut -f1) * 5 / 4 + 16))
mke2fs -q -t ext4 -L tools -m 0 -O ^has_journal -d "$work/tree" "$work/tools.raw" "${size}M"
mv "$work/tools.raw" "$out/tools.raw"
echo "$inputs" >"$out/.tools.inputs"
