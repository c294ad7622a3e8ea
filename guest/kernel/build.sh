#!/usr/bin/env bash
# Build the tuned guest kernels: Debian's linux-source-6.12, guest.config, boot-hints.patch; and
# the same with up.config on top, for machines with one processor.
#
#   guest/kernel/build.sh OUT      OUT/vmlinux, OUT/vmlinux-up and their kernel*.config are made
#
# A result is cached by what went into it (source and compiler version, configs,
# patch), in ${KATA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-rs}/kernel, so that
# a second call copies files. The first takes some twenty minutes on two cores.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUT}
cache=${KATA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-rs}/kernel
source=/usr/src/linux-source-6.12.tar.xz
steps=2700   # lines that make prints with these configs, each

[ -r "$source" ] || { echo "build.sh: $source is missing: apt-get install linux-source-6.12" >&2; exit 1; }
for tool in flex bison bc gcc make; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is missing: apt-get install build-essential flex bison bc libelf-dev" >&2; exit 1; }
done

key=$({ dpkg-query -W -f '${Version}' linux-source-6.12; gcc -dumpfullversion
        cat "$here/guest.config" "$here/up.config" "$here/boot-hints.patch"; } | sha256sum | cut -c1-16)
done_dir=$cache/$key
mkdir -p "$out" "$cache"
out=$(cd "$out" && pwd)

# Builds the kernel of a name from these configurations, of which the last has the last word.
build() {
  local name=$1 count=0
  shift
  awk -F= '/^CONFIG_/ { wish[$1] = $0 } END { for (name in wish) print wish[name] }' "$@" > wishes
  KCONFIG_ALLCONFIG=wishes make -s allnoconfig
  # Kconfig drops what it cannot satisfy without a word; say it.
  grep -v '=n$' wishes | while IFS= read -r want; do
    grep -qxF "$want" .config || echo "kernel: warning: $want is not in effect in $name" >&2
  done
  echo "kernel: building $name (some ten minutes on two cores, once)"
  make -j"$(nproc)" vmlinux 2>errors | while IFS= read -r _; do
    count=$((count + 1))
    if [ $((count % 200)) -eq 0 ]; then echo "kernel: $name: step $count of about $steps"; fi
  done || { tail -n 30 errors >&2; exit 1; }
  strip -s -o "$done_dir.new/$name" vmlinux
  cp .config "$done_dir.new/${name/vmlinux/kernel}.config"
  cp System.map "$done_dir.new/System.map${name#vmlinux}"
}

# One build at a time: a second caller waits and then finds the result.
exec 9>"$cache/lock"
flock 9
if [ ! -e "$done_dir/vmlinux-up" ]; then
  work=$(mktemp -d "$cache/build.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  echo "kernel: unpacking $source"
  tar -C "$work" -xf "$source" --strip-components=1
  cd "$work"
  patch -s -p1 < "$here/boot-hints.patch"
  # The same input gives the same bytes.
  export KBUILD_BUILD_USER=kata KBUILD_BUILD_HOST=kata
  KBUILD_BUILD_TIMESTAMP=$(date -u -r "$source" +%Y-%m-%d)
  export KBUILD_BUILD_TIMESTAMP
  rm -rf "$done_dir.new"
  mkdir -p "$done_dir.new"
  build vmlinux "$here/guest.config"
  build vmlinux-up "$here/guest.config" "$here/up.config"
  rm -rf "$done_dir"
  mv -T "$done_dir.new" "$done_dir"
fi
for file in vmlinux kernel.config vmlinux-up kernel-up.config; do
  install -m 0644 "$done_dir/$file" "$out/"
done
echo "kernel: $out/vmlinux and vmlinux-up ($(stat -c %s "$out/vmlinux" "$out/vmlinux-up" | paste -sd' ') bytes)"
