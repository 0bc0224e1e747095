#!/usr/bin/env bash
# Everything that can be said about the code without running it.
set -euo pipefail
cd "$(dirname "$0")/.."

unformatted=$(git ls-files '*.go' | xargs -r gofmt -l)
[[ -z $unformatted ]] || { echo "Not gofmt-ed: $unformatted" >&2; exit 1; }
go vet ./...
CGO_ENABLED=1 go vet ./cmd/mortise-pkcs11
GOARCH=arm64 go vet ./internal/xts ./internal/secret

# Versions are pinned: a new release must not turn the build red by itself.
tools=${XDG_CACHE_HOME:-$HOME/.cache}/mortise-tools
tool() { # name module version
	local bin="$tools/$1-$3"
	if [[ ! -x $bin ]]; then
		GOBIN="$tools/tmp" go install "$2@$3" >&2
		mv "$tools/tmp/$1" "$bin"
	fi
	echo "$bin"
}
"$(tool staticcheck honnef.co/go/tools/cmd/staticcheck v0.7.0)" ./...
# The vulnerability database is not reachable from every network; a machine that
# cannot ask must not fail, one that can must.
vulncheck=$(tool govulncheck golang.org/x/vuln/cmd/govulncheck v1.1.4)
if out=$(timeout 120 "$vulncheck" ./... 2>&1); then
	echo "govulncheck: none known"
elif grep -qiE 'no such host|dial tcp|403|timeout|Temporary failure|fetching vulnerabilities' <<<"$out"; then
	echo "govulncheck: the database cannot be reached from here; skipped"
else
	echo "$out" >&2
	exit 1
fi
