#!/usr/bin/env bash
# Build the tuned guest kernel: Debian's linux-source-6.12, guest.config, boot-hints.patch.
#
#   guest/kernel/build.sh OUT      OUT/vmlinux and OUT/kernel.config are made
#
# A result is cached by what went into it (source and compiler version, config,
# patch), in ${KATA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-rs}/kernel, so that
# a second call copies a file. The first takes some ten minutes on two cores.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUT}
cache=${KATA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-rs}/kernel
source=/usr/src/linux-source-6.12.tar.xz
steps=2700   # lines that make prints with this config

[ -r "$source" ] || { echo "build.sh: $source is missing: apt-get install linux-source-6.12" >&2; exit 1; }
for tool in flex bison bc gcc make; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is missing: apt-get install build-essential flex bison bc libelf-dev" >&2; exit 1; }
done

key=$({ dpkg-query -W -f '${Version}' linux-source-6.12; gcc -dumpfullversion
        cat "$here/guest.config" "$here/boot-hints.patch"; } | sha256sum | cut -c1-16)
done_dir=$cache/$key
mkdir -p "$out" "$cache"
out=$(cd "$out" && pwd)

# One build at a time: a second caller waits and then finds the result.
exec 9>"$cache/lock"
flock 9
if [ ! -e "$done_dir/vmlinux" ]; then
  work=$(mktemp -d "$cache/build.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  echo "kernel: unpacking $source"
  tar -C "$work" -xf "$source" --strip-components=1
  cd "$work"
  patch -s -p1 < "$here/boot-hints.patch"
  KCONFIG_ALLCONFIG="$here/guest.config" make -s allnoconfig
  # Kconfig drops what it cannot satisfy without a word; say it.
  grep -E '^CONFIG_[A-Z0-9_]+=' "$here/guest.config" | grep -v '=n$' | while IFS= read -r want; do
    grep -qxF "$want" .config || echo "kernel: warning: $want is not in effect" >&2
  done
  # The same input gives the same bytes.
  export KBUILD_BUILD_USER=kata KBUILD_BUILD_HOST=kata
  KBUILD_BUILD_TIMESTAMP=$(date -u -r "$source" +%Y-%m-%d)
  export KBUILD_BUILD_TIMESTAMP
  echo "kernel: building (some ten minutes on two cores, once)"
  count=0
  make -j"$(nproc)" vmlinux 2>"$work/errors" | while IFS= read -r _; do
    count=$((count + 1))
    if [ $((count % 200)) -eq 0 ]; then echo "kernel: step $count of about $steps"; fi
  done || { tail -n 30 "$work/errors" >&2; exit 1; }
  mkdir -p "$done_dir.new"
  strip -s -o "$done_dir.new/vmlinux" vmlinux
  cp .config "$done_dir.new/kernel.config"
  cp System.map "$done_dir.new/System.map"
  mv -T "$done_dir.new" "$done_dir"
fi
install -m 0644 "$done_dir/vmlinux" "$done_dir/kernel.config" "$out/"
echo "kernel: $out/vmlinux ($(stat -c %s "$out/vmlinux") bytes)"
