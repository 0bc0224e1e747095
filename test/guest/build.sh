#!/bin/bash
# build.sh OUT_DIR makes the small Linux guest that tests and the demo run:
#
#   OUT_DIR/guest.raw    the disk, 128 MiB, sparse
#   OUT_DIR/guest.vmdk   the same disk as a monolithicSparse VMDK
#
# The disk boots by itself under SeaBIOS (GRUB in a BIOS boot partition) and
# under OVMF (\EFI\BOOT\BOOTX64.EFI) in a few seconds, also without KVM: Debian's
# cloud kernel, a busybox initramfs, and rootfs/agent on the first serial port.
#
#   1  BIOS boot   1 MiB   GRUB core image
#   2  ESP        40 MiB   FAT16: kernel, initramfs, GRUB for EFI
#   3  data       48 MiB   ext4: plain.txt, 1 MiB of lines MORTISE-KNOWN-PLAINTEXT-000000…
#   4  raw        32 MiB   zeros: markers and the agent's writer
#
# Nothing is mounted and no loop device is needed. A second run with the same
# inputs keeps the files. Identifiers and times are fixed, so equal inputs give
# an equal guest.raw (a VMDK carries a random CID).
set -euo pipefail
export LC_ALL=C SOURCE_DATE_EPOCH=1700000000

die() { echo "test/guest/build.sh: $*" >&2; exit 1; }
[ $# -eq 1 ] || die "usage: build.sh OUT_DIR"
mkdir -p "$1"
out=$(realpath "$1")
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
PATH=$PATH:/usr/sbin:/sbin

missing=
need() { command -v "$1" >/dev/null || missing="$missing $2"; }
need busybox busybox-static
need sgdisk gdisk
need mformat mtools
need mke2fs e2fsprogs
need debugfs e2fsprogs
need cpio cpio
need modprobe kmod
need qemu-img qemu-utils
need grub-mkimage grub-common
[ -f /usr/lib/grub/i386-pc/boot.img ] || missing="$missing grub-pc-bin"
[ -d /usr/lib/grub/x86_64-efi ] || missing="$missing grub-efi-amd64-bin"
kernel=${KERNEL:-$(ls -v /boot/vmlinuz-*-cloud-amd64 2>/dev/null | tail -n 1 || true)}
[ -n "$kernel" ] && [ -f "$kernel" ] || missing="$missing linux-image-cloud-amd64"
[ -z "$missing" ] || die "missing programs; install them with: apt-get install --no-install-recommends$missing"
version=${kernel##*/vmlinuz-}
[ -d "/lib/modules/$version" ] || die "/lib/modules/$version: no modules for $kernel; reinstall linux-image-$version"
bb=$(command -v busybox)
if ldd "$bb" >/dev/null 2>&1; then die "$bb is not static; install it with: apt-get install busybox-static"; fi

# Only one build at a time writes into OUT_DIR.
exec 9>"$out/.lock"
flock 9

inputs=$(cat "$here/build.sh" "$here"/rootfs/* "$kernel" "$bb" /usr/lib/grub/i386-pc/boot.img /usr/lib/grub/i386-pc/kernel.img | sha256sum | cut -d' ' -f1)
if [ -f "$out/guest.raw" ] && [ -f "$out/guest.vmdk" ] && [ "$(cat "$out/.inputs" 2>/dev/null)" = "$inputs" ]; then
	exit 0
fi
rm -f "$out/.inputs"
work=$(mktemp -d "$out/.work-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

# ---- initramfs -------------------------------------------------------------

mkdir -p root/bin root/dev root/proc root/sys root/run root/data root/modules
cp "$bb" root/bin/busybox
cp "$here/rootfs/init" root/init
cp "$here/rootfs/agent" root/bin/agent
chmod 755 root/init root/bin/agent root/bin/busybox

# The cloud kernel has virtio and SCSI as modules and no AHCI at all.
n=100
for m in virtio_pci virtio_blk virtio_scsi vmw_pvscsi sd_mod virtio_net vmxnet3 virtio_rng button evdev efivarfs; do
	modprobe -S "$version" --show-depends "$m" >depends 2>/dev/null || continue
	while read -r verb file _; do
		[ "$verb" = insmod ] || continue
		name=$(basename "$file"); name=${name%%.ko*}
		ls root/modules/*-"$name".ko >/dev/null 2>&1 && continue
		case $file in
		*.xz) xz -dc "$file" >"root/modules/$n-$name.ko" ;;
		*.zst) zstd -qdc "$file" >"root/modules/$n-$name.ko" ;;
		*) cp "$file" "root/modules/$n-$name.ko" ;;
		esac
		n=$((n + 1))
	done <depends
done
ls root/modules/*-virtio_blk.ko >/dev/null || die "$kernel has no virtio_blk module"

find root -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
(cd root && find . -print0 | sort -z | cpio --null --create --format=newc --owner=0:0 --reproducible --quiet) | gzip -n -1 >initrd
cp "$kernel" vmlinuz
touch -d "@$SOURCE_DATE_EPOCH" initrd vmlinuz

# ---- boot loaders ----------------------------------------------------------

# $root is the partition GRUB was loaded from. No menu, no modules to read.
cat >grub.cfg <<'CFG'
linux /mortise/vmlinuz console=ttyS0,115200 quiet loglevel=3 panic=0
initrd /mortise/initrd
boot
CFG
grub-mkimage -O i386-pc -o core.img -p '(,gpt2)/mortise' -c grub.cfg biosdisk part_gpt fat linux boot
grub-mkimage -O x86_64-efi -o bootx64.efi -p /mortise -c grub.cfg part_gpt fat linux boot
touch -d "@$SOURCE_DATE_EPOCH" bootx64.efi

# ---- disk ------------------------------------------------------------------

mib=1048576
esp_at=2 esp=40
data_at=42 data=48
raw_at=90 raw=32

truncate -s $((128 * mib)) disk
sgdisk --clear --set-alignment=2048 \
	--new=1:2048:+1M --typecode=1:ef02 --change-name=1:bios --partition-guid=1:4d4f5254-4953-4500-0000-000000000001 \
	--new=2:$((esp_at * 2048)):+${esp}M --typecode=2:ef00 --change-name=2:esp --partition-guid=2:4d4f5254-4953-4500-0000-000000000002 \
	--new=3:$((data_at * 2048)):+${data}M --typecode=3:8300 --change-name=3:data --partition-guid=3:4d4f5254-4953-4500-0000-000000000003 \
	--new=4:$((raw_at * 2048)):+${raw}M --typecode=4:8300 --change-name=4:raw --partition-guid=4:4d4f5254-4953-4500-0000-000000000004 \
	--disk-guid=4d4f5254-4953-4500-0000-000000000000 disk >/dev/null

le64() { local v=$1 i; for i in 0 1 2 3 4 5 6 7; do printf "\\x$(printf %02x $((v >> (8 * i) & 255)))"; done; }
patch() { dd of="$1" bs=1 seek="$2" conv=notrunc status=none; } # FILE OFFSET < bytes

# GRUB's first sector loads sector 2048, where the core image begins; the core's
# own first sector lists where the rest of it follows. See GRUB's boot.S
# (kernel_sector at 0x5c, the floppy check at 0x66) and diskboot.S (0x1f4).
cp /usr/lib/grub/i386-pc/boot.img boot.img
le64 2048 | patch boot.img $((0x5c))
printf '\x90\x90' | patch boot.img $((0x66))
le64 2049 | patch core.img $((0x1f4))
[ "$(stat -c %s core.img)" -le "$mib" ] || die "GRUB's core image is larger than the BIOS boot partition"
dd if=boot.img of=disk bs=1 count=440 conv=notrunc status=none
dd if=core.img of=disk bs=512 seek=2048 conv=notrunc status=none

truncate -s $((esp * mib)) fat
export MTOOLS_SKIP_CHECK=1
mformat -i fat -T $((esp * 2048)) -h 64 -s 32 -N 4d4f5254 -v MORTISE ::
mmd -i fat ::/EFI ::/EFI/BOOT ::/mortise
mcopy -m -i fat bootx64.efi ::/EFI/BOOT/BOOTX64.EFI
mcopy -m -i fat vmlinuz initrd ::/mortise
dd if=fat of=disk bs=1M seek=$esp_at conv=notrunc,sparse status=none

mkdir tree
for ((i = 0; i < 32768; i++)); do printf 'MORTISE-KNOWN-PLAINTEXT-%06d.\n' $i; done >tree/plain.txt
touch -d "@$SOURCE_DATE_EPOCH" tree tree/plain.txt
truncate -s $((data * mib)) ext4
E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -t ext4 -b 4096 -L data -U 4d4f5254-4953-4500-0000-0000000000d1 \
	-E hash_seed=4d4f5254-4953-4500-0000-0000000000d2,root_owner=0:0,lazy_itable_init=0,nodiscard -m 0 -d tree ext4
# mke2fs copies a file's change time, which nothing else can set.
for f in / /plain.txt; do
	for k in ctime ctime_extra crtime crtime_extra atime_extra mtime_extra; do
		case $k in *_extra) v=0 ;; *) v="@$SOURCE_DATE_EPOCH" ;; esac
		echo "set_inode_field $f $k $v"
	done
done | E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH debugfs -w -f - ext4 >/dev/null 2>&1
dd if=ext4 of=disk bs=1M seek=$data_at conv=notrunc,sparse status=none

# ---- results ---------------------------------------------------------------

qemu-img convert -f raw -O vmdk -o subformat=monolithicSparse disk disk.vmdk
mv disk "$out/guest.raw"
mv disk.vmdk "$out/guest.vmdk"
echo "$inputs" >"$out/.inputs"
