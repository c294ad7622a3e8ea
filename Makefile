# The whole job is `make try`; the whole proof is `make test`. `make help` lists the rest.

PREFIX  ?= /usr/local
DESTDIR ?=
KATA_CACHE ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/kata-rs
export KATA_CACHE

CARGO   ?= cargo
TARGET  := x86_64-unknown-linux-gnu
ASSETS  := build/assets
STAGE   := build/stage
RUNTIME := target/$(TARGET)/release/kata-runtime
IMAGER  := target/$(TARGET)/release/kata-guest-image
AGENT   := target/guest/$(TARGET)/agent/kata-agent
# Cargo decides what is out of date; make only orders the steps.
LINKS   := kata-ctl kata-monitor containerd-shim-kata-v2

bindir    := $(PREFIX)/bin
assetdir  := $(PREFIX)/share/kata-containers
configdir := $(PREFIX)/share/defaults/kata-containers

.DEFAULT_GOAL := all
.PHONY: all help deps deps-check host agent guest kernel distro-guest tuned-guest install uninstall \
        try test unit e2e e2e-runc kvm-test bench fuzz fmt lint deny clean

all: deps-check host guest ## build the host binary, the agent and the guest images

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

deps: ## install what is missing from Debian (asks apt only when something is)
	@scripts/deps install

deps-check:
	@scripts/deps check

host: ## build the host binary
	@echo "build: host binary"
	$(CARGO) build --release -p kata-runtime -p kata-guest-image

# The agent is linked at a fixed address: it is smaller so, and the guest runs nothing else.
agent: ## build the guest's only program
	@echo "build: guest agent"
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
	  $(CARGO) build --profile agent -p kata-agent --bin kata-agent --target-dir target/guest

guest: distro-guest ## build the initramfs(es) for the kernels there are
	@if [ -e $(ASSETS)/vmlinux ]; then $(MAKE) --no-print-directory tuned-guest; fi

kernel: ## build the tuned guest kernels (some twenty minutes once, then cached)
	@mkdir -p $(ASSETS)
	guest/kernel/build.sh $(ASSETS)

distro-guest: agent host
	@mkdir -p $(ASSETS)
	$(IMAGER) distro --agent $(AGENT) --cache $(KATA_CACHE)/distro \
	  --kernel $(ASSETS)/vmlinux-distro --initrd $(ASSETS)/kata-initramfs-distro.cpio

tuned-guest: agent host
	@mkdir -p $(ASSETS)
	$(IMAGER) initramfs --agent $(AGENT) --out $(ASSETS)/kata-initramfs.cpio
	$(IMAGER) returns $(ASSETS)/vmlinux

install: ## install what was built (honours PREFIX and DESTDIR)
	@test -x $(RUNTIME) || { echo "install: $(RUNTIME) is missing: run 'make' first" >&2; exit 1; }
	@test -e $(ASSETS)/kata-initramfs-distro.cpio || { echo "install: $(ASSETS) holds no guest: run 'make' first" >&2; exit 1; }
	install -D -m 0755 $(RUNTIME) $(DESTDIR)$(bindir)/kata-runtime
	for name in $(LINKS); do ln -sfn kata-runtime $(DESTDIR)$(bindir)/$$name; done
	install -d -m 0755 $(DESTDIR)$(assetdir)
	for file in vmlinux vmlinux-up kata-initramfs.cpio vmlinux-distro kata-initramfs-distro.cpio; do \
	  if [ -e $(ASSETS)/$$file ]; then install -m 0644 $(ASSETS)/$$file $(DESTDIR)$(assetdir)/$$file; fi; done
	install -d -m 0755 $(DESTDIR)$(configdir)
	sed 's|/usr/share/kata-containers|$(assetdir)|g' deploy/configuration.toml > $(DESTDIR)$(configdir)/configuration.toml
	chmod 0644 $(DESTDIR)$(configdir)/configuration.toml

uninstall: ## remove what install put there
	rm -f $(DESTDIR)$(bindir)/kata-runtime $(addprefix $(DESTDIR)$(bindir)/,$(LINKS))
	rm -f $(addprefix $(DESTDIR)$(assetdir)/,vmlinux vmlinux-up kata-initramfs.cpio vmlinux-distro kata-initramfs-distro.cpio)
	rm -f $(DESTDIR)$(configdir)/configuration.toml
	for dir in $(assetdir) $(configdir); do rmdir $(DESTDIR)$$dir 2>/dev/null || true; done

try: ## from nothing to a container in a VM, without touching the system beyond apt packages
	@scripts/try

test: ## unit, property and end-to-end tests, with what they need
	@scripts/test all

unit: ## unit and property tests only
	@scripts/test unit

e2e: ## end-to-end tests only
	@scripts/test e2e

e2e-runc: ## prove the end-to-end tests themselves, on runc
	@KATA_E2E_RUNTIME=runc scripts/test e2e

kvm-test: kernel all ## the tests of what differs under KVM, on an emulated host that has it
	$(CARGO) build -q -p kata-e2e -p kata-bench
	@tests/kvm-host/kvm-host test fast

bench: ## measure what SPECIFICATION.md promises
	@scripts/bench

fuzz: ## run each fuzz target for a few seconds (SECONDS_EACH, 10)
	@scripts/fuzz $(or $(SECONDS_EACH),10)

fmt:
	$(CARGO) fmt --all

lint: ## formatting and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

deny: ## licences, sources and bans of the dependency tree
	@scripts/deny

clean: ## remove build/ and target/ (the kernel cache stays)
	rm -rf build target
