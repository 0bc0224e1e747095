#!/usr/bin/env bash
# Every test, once: under the race detector where goroutines share state.
set -euo pipefail
cd "$(dirname "$0")/.."

go build -trimpath -o bin/mortise ./cmd/mortise
go test -timeout 10m $(go list ./... | grep -v '^mortise/test/' | grep -vxFf build/race-packages)
# These two skip a test under the race detector, each for a reason of its own.
go test -timeout 5m -run 'TestIdle|Alloc' ./internal/kms/kmipd ./internal/nbd
# What runs the built program must not be taken from the test cache.
MORTISE_BINARY=$PWD/bin/mortise go test -count=1 -timeout 15m -p 1 ./test/...
CGO_ENABLED=1 go test -race -timeout 10m $(cat build/race-packages)
