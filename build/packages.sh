#!/usr/bin/env bash
# Installs the Debian packages that Mortise needs and does not find.
#   build/packages.sh run    what a host needs, and the demonstration's guest
#   build/packages.sh test   that and the peers and tools of the tests
set -euo pipefail

run=(
	libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system
	qemu-system-x86 qemu-utils ovmf fuse3
	# the demonstration's guest: kernel, user space, boot loader
	linux-image-cloud-amd64 busybox-static grub-efi-amd64-bin grub-pc-bin grub-common
	mtools dosfstools e2fsprogs gdisk cpio kmod
	ca-certificates curl
)
test=(
	iproute2 iptables util-linux # members of a key server in network namespaces
	xfsprogs                    # file systems on loop devices
	dmsetup                     # dm-crypt reads our extent
	libvirt-clients openssl gcc libc6-dev binutils
	# root keys: a token, its tool, a TPM in software
	softhsm2 opensc swtpm
	python3 python3-pykmip python3-cryptography python3-pyvmomi libnbd-bin python3-libnbd fio nbdkit age
)

case "${1:-}" in
run) want=("${run[@]}") ;;
test) want=("${run[@]}" "${test[@]}") ;;
*)
	echo "usage: $0 run|test" >&2
	exit 2
	;;
esac

missing=()
for p in "${want[@]}"; do
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $(id -u) -ne 0 ]]; then
	echo "Missing Debian packages: ${missing[*]}" >&2
	echo "Install them as root: apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "Installing: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Services of the packages are not wanted on this machine: Mortise starts its own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
	trap 'rm -f "$log" "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
	tail -30 "$log" >&2
	exit 1
fi
