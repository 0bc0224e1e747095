# make demo    the main job on this machine: an encrypted VM, start to end (KEEP=1 leaves it running)
# make test    installs what is missing and runs every check and test
# make bench   speed of ourselves, the peer and the limit, in one run (BENCH=xts|nbd|convert|kms|kms-million)
# make conformance   the OASIS test cases against a key server (V=1 shows differences, WRITE=1 updates the list)
# make torture disks in a model of storage that loses power, for TORTURE=10m
# make torture-ha  faults of three key servers under load, for TORTURE=10m
# make build   bin/mortise, one static binary; and bin/mortise-pkcs11, for hardware tokens,
#              where there is a C compiler

GO     ?= go
BENCH  ?= all
export CGO_ENABLED = 0

.PHONY: all build demo test check generate bench torture torture-ha conformance install-run install-test clean

all: build

build:
	$(GO) build -trimpath -o bin/mortise ./cmd/mortise
	@if command -v $${CC:-cc} >/dev/null; then CGO_ENABLED=1 $(GO) build -trimpath -o bin/mortise-pkcs11 ./cmd/mortise-pkcs11; fi

demo: install-run build
	@test/demo/run.sh

test: install-test check
	@build/test.sh

# Formatting, vetting, static analysis, known vulnerabilities, generated code.
check:
	@build/check.sh

generate:
	$(GO) generate ./...

bench: install-test build
	@cd test/bench && $(GO) run . $(BENCH)

conformance: build
	@$(GO) build -trimpath -o bin/conformance ./test/conformance
	@bin/conformance -mortise bin/mortise $(if $(V),-v) $(if $(WRITE),-write) $(if $(RUN),-run $(RUN))

TORTURE ?= 10m
torture:
	MORTISE_TORTURE=$(TORTURE) $(GO) test -count=1 -timeout 24h -v -run TestTorture ./internal/vdisk

torture-ha: install-test
	MORTISE_TORTURE_HA=$(TORTURE) $(GO) test -count=1 -timeout 24h -v -run TestFaults ./test/ha

install-run:
	@build/packages.sh run

install-test:
	@build/packages.sh test

clean:
	rm -rf bin test/guest/out
