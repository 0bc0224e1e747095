#!/usr/bin/env bash
# Every test, once: under the race detector where goroutines share state.
set -euo pipefail
cd "$(dirname "$0")/.."

go build -trimpath -o bin/mortise ./cmd/mortise
# Many of these wait more than they compute.
go test -p 4 -timeout 10m $(go list ./... | grep -v '^mortise/test/' | grep -vxFf build/race-packages)
# What these skip or shorten under the race detector.
go test -p 4 -parallel 6 -timeout 8m -run 'TestIdle|Alloc|TestFio|PowerCut|Kill|ThreeMembers|Undone|Crashes' ./internal/center ./internal/kms ./internal/kms/kmipd ./internal/nbd ./internal/vdisk ./internal/vmx
# What runs the built program must not be taken from the test cache. Where limits of
# time are held, nothing else runs.
export MORTISE_BINARY=$PWD/bin/mortise
go test -count=1 -timeout 15m -p 2 $(go list ./test/... | grep -v -e '/ha$' -e '/robustness$')
go test -count=1 -timeout 15m -p 1 ./test/ha ./test/robustness
CGO_ENABLED=1 go test -race -short -p 3 -timeout 10m $(cat build/race-packages)
