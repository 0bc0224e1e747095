#!/usr/bin/env bash
# The main job on real parts: a policy turns on, and a real Linux guest runs from
# a disk that is encrypted with a key from a real KMIP server. Every step shows
# what it proves; the first that fails ends the demonstration with its reason.
#
#   make demo          about two minutes, then everything is gone again
#   make demo KEEP=1   leaves it running and says what to try next
set -euo pipefail
cd "$(dirname "$0")/../.."

KEEP=${KEEP:-}
work=$(mktemp -d /tmp/mortise-demo.XXXXXX)
state=$work/state
ds=$state/datastore1
export MORTISE_CONFIG=$work/client
mortise=$PWD/bin/mortise
began=$SECONDS steps=0 dev=0 console=0

bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' dim=$'\e[2m' plain=$'\e[0m'
[[ -t 1 ]] || bold='' green='' red='' dim='' plain=''
step() { steps=$((steps + 1)); printf '\n%s%2d. %s%s  %s[%3ds]%s\n' "$bold" "$steps" "$*" "$plain" "$dim" $((SECONDS - began)) "$plain"; }
ok() { printf '    %s✓%s %s\n' "$green" "$plain" "$*"; }
note() { printf '    %s\n' "$*"; }
fail() { printf '    %s✗ %s%s\n' "$red" "$*" "$plain" >&2; exit 1; }
run() { # shows a command and what it prints
	printf '    %s$ mortise %s%s\n' "$dim" "$*" "$plain"
	"$mortise" "$@" 2>&1 | sed 's/^/      /'
}

finish() {
	local code=$?
	[[ $console -ne 0 ]] && kill "$console" 2>/dev/null || true
	if [[ $code -ne 0 ]]; then
		printf '\n%sThe demonstration failed in step %d.%s Logs: %s\n' "$red" "$steps" "$plain" "$state/logs" >&2
		tail -n 5 "$state"/logs/*.log "$work/dev.log" 2>/dev/null >&2 || true
	fi
	if [[ $dev -ne 0 ]] && { [[ -z $KEEP ]] || [[ $code -ne 0 ]]; }; then
		kill -INT "$dev" 2>/dev/null || true
		wait "$dev" 2>/dev/null || true
		[[ $code -ne 0 ]] || rm -rf "$work"
	fi
	exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

[[ $(id -u) -eq 0 ]] || fail "the demonstration starts libvirt and QEMU: run it as root"

# The guest's agent answers commands on the serial console, one line each.
seq=0
open_console() {
	[[ $console -eq 0 ]] || { kill "$console" 2>/dev/null || true; wait "$console" 2>/dev/null || true; }
	rm -f "$work/in" "$work/out" && mkfifo "$work/in" "$work/out"
	exec 7<>"$work/in" 8<>"$work/out"
	"$mortise" vm console demo <"$work/in" >"$work/out" 2>"$work/console.err" 7>&- 8>&- &
	console=$!
}
guest() { # guest COMMAND…: the answer's words
	local line deadline=$((SECONDS + 120))
	seq=$((seq + 1))
	printf '@%d %s\n' "$seq" "$*" >&7
	while ((SECONDS < deadline)); do
		IFS= read -r -t 5 -u 8 line || continue
		line=${line%$'\r'} line=${line#mortise> }
		case $line in
		"MORTISE ok "*" id=$seq") line=${line#MORTISE ok }; echo "${line% id=$seq}"; return ;;
		"MORTISE fail "*" id=$seq") fail "guest: ${line#MORTISE fail }" ;;
		esac
	done
	fail "the guest does not answer to: $*"
}
boot() {
	local line deadline=$((SECONDS + 150))
	open_console
	while ((SECONDS < deadline)); do
		IFS= read -r -t 5 -u 8 line || continue
		[[ $line == *"MORTISE ok ready"* || $line == *"MORTISE ready"* ]] && return
	done
	fail "the guest did not boot"
}
leaks() { grep -rlaF -- "$1" "$ds" 2>/dev/null | grep -v vmware.log || true; }
must_not_leak() { # what, bytes
	local where
	where=$(leaks "$2")
	[[ -z $where ]] || fail "$1 is in clear in $where"
	ok "$1 is nowhere on the datastore"
}

printf '%sMortise: a policy turns on, a real guest runs encrypted%s\n' "$bold" "$plain"

step "Build the guest: Debian's kernel and busybox on a disk that boots by itself"
test/guest/build.sh "$work/guest" >"$work/guest.log" 2>&1 || { cat "$work/guest.log"; fail "the guest could not be built"; }
qemu-img info "$work/guest/guest.vmdk" | grep -E 'file format|virtual size' | sed 's/^/      /'

step "Start a key server, a center and two hosts, each with a libvirtd of its own"
"$mortise" dev --state-dir "$state" >"$work/dev.log" 2>&1 &
dev=$!
for _ in $(seq 900); do
	grep -q 'Mortise runs on this machine' "$work/dev.log" && break
	kill -0 "$dev" 2>/dev/null || { cat "$work/dev.log"; dev=0; fail "mortise dev ended"; }
	sleep 0.1
done
grep -q 'Ctrl-C stops everything' "$work/dev.log" || sleep 1
sed -n '/vSphere API/,/logs/p' "$work/dev.log" | sed 's/^/    /'
password=$(sed -n 's/^ *password *\([^ ]*\).*/\1/p' "$work/dev.log")
api=$(sed -n 's/^ *vSphere API *\(.*\)\/sdk/\1/p' "$work/dev.log")
thumbprint=$(sed -n 's/^ *its thumbprint *//p' "$work/dev.log")
kmip=$(sed -n 's/^ *KMIP *//p' "$work/dev.log")
kms_socket=$(sed -n 's/.*--kms-admin-socket \(.*\)/\1/p' "$work/dev.log")
[[ -n $password && -n $api ]] || fail "mortise dev did not say how to log in"
MORTISE_PASSWORD=$password "$mortise" login "$api" --thumbprint "$thumbprint" >/dev/null
ok "logged in to the vSphere API at $api"
run host ls

step "Connect the key server: certificates are confirmed on both sides"
run provider add kms1 "$kmip"
run provider trust kms1 --yes --kms-admin-socket "$kms_socket"
run provider default kms1
run provider ls

step "Import the guest's disk as VMDK, in clear"
run vm import "$work/guest/guest.vmdk" --name demo --memory 256
plaintext=MORTISE-KNOWN-PLAINTEXT-
[[ -n $(leaks "$plaintext") ]] || fail "the known plaintext is not on the datastore: the next steps would prove nothing"
ok "its plaintext can be read on the datastore by anybody"

step "Turn on the storage policy \"VM Encryption Policy\""
run vm encrypt demo --policy "VM Encryption Policy"
run vm info demo
kek() { sed -n 's/^encryption.keySafe = "\(.*\)"$/\1/p' "$ds/demo/demo.vmdk"; }
note "the descriptor names its KEK and holds the wrapped DEK:"
note "${dim}$(kek | cut -c1-150)…$plain"
first=$(kek)
[[ $first == *fqid/kms1/* ]] || fail "the descriptor does not name a KEK of kms1"
must_not_leak "the known plaintext" "$plaintext"
if why=$(qemu-img convert -O raw "$ds/demo/demo.vmdk" "$work/stolen.raw" 2>&1); then fail "qemu-img reads the disk"; fi
ok "qemu-img cannot read the disk: ${why##*: }"

step "Power on: the guest boots from its encrypted disk"
run vm power on demo
boot
about=$(guest info)
ok "$about"
marker=$(guest marker write) && marker=${marker##* }
guest marker read "$marker" >/dev/null
ok "the guest wrote a random marker and read it back: ${marker:0:24}…"
must_not_leak "the marker" "$marker"

step "Stop the key server; the guest must not notice"
guest io start >/dev/null
touch "$state/logs/kms.hold"
kill -9 "$(cat "$state/logs/kms.pid")"
sleep 1
a=$(guest io status) && sleep 3 && b=$(guest io status)
n() { sed 's/.*written=\([0-9]*\).*/\1/' <<<"$1"; }
(($(n "$b") > $(n "$a"))) || fail "the guest stopped writing: $a, then $b"
[[ $b == *errors=0* ]] || fail "the guest saw errors: $b"
ok "it keeps writing: $(n "$a") blocks, then $(n "$b"), no errors"
guest io stop >/dev/null
run vm power off demo
run vm power on demo
boot
guest marker read "$marker" >/dev/null
ok "power-cycled without the key server (the host holds the key), and the marker is there"
rm "$state/logs/kms.hold"
for _ in $(seq 150); do "$mortise" provider status kms1 >/dev/null 2>&1 && break; sleep 0.2; done
"$mortise" provider status kms1 >/dev/null || fail "the key server does not come back"
ok "the key server is back"

step "Shallow recrypt under the running guest: new KEK, same data"
run vm recrypt demo
second=$(kek)
[[ $second != "$first" && $second == *fqid/kms1/* ]] || fail "the descriptor still has its first key safe"
guest marker read "$marker" >/dev/null
ok "the key safe is another one, the guest reads its marker"
whole=$(guest hash disk) && whole=${whole##*=}
ok "the guest hashes its whole disk: ${whole:0:24}…"

step "Deep recrypt when off: new KEK, new DEK, every byte rewritten"
run vm power off demo
before=$(head -c 1048576 "$ds/demo/demo-flat.vmdk" | sha256sum)
run vm recrypt demo --deep
after=$(head -c 1048576 "$ds/demo/demo-flat.vmdk" | sha256sum)
[[ $before != "$after" ]] || fail "the ciphertext did not change"
ok "the ciphertext is another one"
must_not_leak "the marker" "$marker"

step "Decrypt: back to a disk that any tool opens"
run vm decrypt demo
qemu-img convert -O raw "$ds/demo/demo.vmdk" "$work/back.raw"
back=$(sha256sum <"$work/back.raw" | cut -d' ' -f1)
[[ $back == "$whole" ]] || fail "the content is another: $back, the guest saw $whole"
ok "qemu-img opens it, and every byte is what the guest saw: ${back:0:24}…"

printf '\n%sAll %d steps passed in %d s.%s\n' "$green$bold" "$steps" $((SECONDS - began)) "$plain"
if [[ -n $KEEP ]]; then
	cat <<-END

		It keeps running (process $dev, state $state). Try next:
		  export MORTISE_CONFIG=$MORTISE_CONFIG PATH=$PWD/bin:\$PATH
		  mortise vm encrypt demo && mortise vm power on demo && mortise vm console demo
		  mortise vm info demo --json
		  mortise task ls
		Stop it with: kill -INT $dev
	END
	disown "$dev"
fi
