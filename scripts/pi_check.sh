#!/usr/bin/env bash
# Does the device runtime work on a Raspberry Pi?  `make pi-check`
#
# Builds the wheel, installs it with its real dependencies for 64-bit ARM into an emulated Raspberry Pi 3B+
# (Debian's programs for aarch64, run by QEMU's model of a Cortex-A53), and there runs doctor, four training
# steps that are stopped and taken up again, eval and predict.  The losses must be those of this machine, to 1e-3.
# It does so with the oldest supported and with the newest onnxruntime.  QEMU's speed says nothing about a Pi's.
#
#   PI_SUITES   Debian releases to try: bookworm (Python 3.11), trixie (Python 3.13)   [bookworm]
#   PI_RUNTIMES versions of onnxruntime; "newest" is what the index has                [the oldest, newest]
#   PI_CACHE    where root file systems are kept between runs                          [~/.cache/lance-edge/pi]
#   PI_MIRROR   Debian mirror                          [that of this machine, else deb.debian.org]
#   PYTHON      of an environment with lance-edge[dev]; make passes that of .venv
#
# Needs root (it mounts and changes its root directory), Linux with binfmt_misc, and from the distribution:
# qemu-user-static, debootstrap, util-linux.  Running it again reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."

project=$PWD
PYTHON=${PYTHON:-python3}
PI_SUITES=${PI_SUITES:-bookworm}
PI_CACHE=${PI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lance-edge/pi}
oldest=$(sed -n 's/^ *"onnxruntime>=\([0-9.]*\).*/\1/p' pyproject.toml)
PI_RUNTIMES=${PI_RUNTIMES:-"$oldest newest"}
work=$PI_CACHE/work
tolerance=1e-3
declare -A python_of=([bookworm]=3.11 [trixie]=3.13)

fail() { echo "pi-check: $*" >&2; exit 1; }
say() { echo "== $*"; }

need() {
    command -v "$1" >/dev/null || fail "$1 is not installed; on Debian and Ubuntu: apt-get install $2"
}

expect_tools() {
    [ "$(uname -s)" = Linux ] || fail "it needs Linux, found $(uname -s)"
    [ "$(id -u)" = 0 ] || fail "it mounts and changes its root directory: run it as root (sudo make pi-check)"
    need qemu-aarch64-static qemu-user-static
    need debootstrap debootstrap
    need unshare util-linux
    need dpkg-deb dpkg
    "$PYTHON" -c 'import lance_host, lance_device, pip' 2>/dev/null ||
        fail "$PYTHON has no lance-edge with its host extra; run make pi-check, or set PYTHON"
    [ -n "$oldest" ] || fail "pyproject.toml names no oldest onnxruntime"
}

register_emulator() {
    local binfmt=/proc/sys/fs/binfmt_misc
    [ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt ||
        fail "the kernel has no binfmt_misc: modprobe binfmt_misc"
    [ -e $binfmt/qemu-aarch64 ] && return
    # ELF, 64-bit, little-endian, machine 183 (AArch64); F: the emulator is opened now, from outside of any root.
    printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' \
        >$binfmt/register || fail "cannot register qemu-aarch64-static with binfmt_misc"
}

mirror() {
    local own
    own=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -1)
    echo "${PI_MIRROR:-${own:-http://deb.debian.org/debian}}"
}

# The root file system of a release: unpacked only, because setting it up under emulation takes ten minutes.
make_root() {
    local suite=$1 root=$PI_CACHE/$1
    [ -e "$root/.complete" ] && return
    say "unpacking Debian $suite for aarch64 into $root"
    rm -rf "$root" && mkdir -p "$root"
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libgomp1,libstdc++6 \
        "$suite" "$root" "$(mirror)" >"$PI_CACHE/$suite.log" 2>&1 ||
        fail "debootstrap failed, see $PI_CACHE/$suite.log (is the mirror right? PI_MIRROR=...)"
    local deb
    for deb in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$deb" "$root"; done
    mkdir -p "$root"/{proc,dev,tmp,mnt,opt} "$root/sys/devices/system/cpu"
    echo 0-3 | tee "$root/sys/devices/system/cpu/possible" >"$root/sys/devices/system/cpu/present"
    local core
    for core in 0 1 2 3; do
        printf 'processor\t: %d\nBogoMIPS\t: 38.40\nFeatures\t: fp asimd evtstrm crc32 cpuid\n' $core
        printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd03\nCPU revision\t: 4\n\n'
    done >"$root/opt/cpuinfo"
    touch "$root/.complete"
}

# Wheels as pip on the board would choose them.
install_wheels() {
    local suite=$1 runtime=$2 target=$PI_CACHE/$1/opt/site
    rm -rf "$target"
    local platform platforms=(--platform any)
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        platforms+=(--platform "${platform}_aarch64")
    done
    local wanted=("$wheel")
    [ "$runtime" = newest ] || wanted+=("onnxruntime==$runtime")
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --target "$target" --only-binary=:all: \
        --implementation cp --python-version "${python_of[$suite]}" "${platforms[@]}" "${wanted[@]}" ||
        fail "pip found no wheels for Python ${python_of[$suite]} on aarch64 with onnxruntime $runtime"
}

# Runs a command on the emulated board; $work is its /mnt.
on_the_pi() {
    local suite=$1
    shift
    root=$PI_CACHE/$suite work=$work unshare --mount -- bash -euc '
        mount -t proc proc "$root/proc"
        mount --bind "$root/opt/cpuinfo" "$root/proc/cpuinfo"
        mount --rbind /dev "$root/dev"
        mount --bind "$work" "$root/mnt"
        exec env -i QEMU_CPU=cortex-a53 PATH=/opt/site/bin:/usr/bin:/bin HOME=/tmp LANG=C.UTF-8 \
            PYTHONPATH=/opt/site "$(command -v chroot)" "$root" "$@"' bash "$@"
}

device_on_the_pi() {
    local suite=$1
    shift
    on_the_pi "$suite" /usr/bin/python3 -m lance_device.cli "$@"
}

train_words=(train --data /mnt/digits --steps 4 --threads 2 --checkpoint-every 1 --quiet)

# Four steps; after the second a stop, as systemd or Ctrl-C would ask for it, then the rest.
train_in_two_parts() {
    local suite=$1 run=$2 watched=$work/$2/steps.csv child
    device_on_the_pi "$suite" "${train_words[@]}" --artifact /mnt/pkg.tar --out "/mnt/$run" &
    child=$!
    until [ -e "$watched" ] && [ "$(grep -c ',step,' "$watched")" -ge 2 ]; do
        kill -0 $child 2>/dev/null || break
        sleep 0.2
    done
    pkill -TERM -P $child || true
    wait $child && fail "the run ended before it was stopped" || [ $? = 130 ] || fail "the stopped run failed"
    device_on_the_pi "$suite" "${train_words[@]}" --artifact /mnt/pkg.tar --out "/mnt/$run" --resume
}

check_one() {
    local suite=$1 runtime=$2 run=run-$1-$2 version
    install_wheels "$suite" "$runtime"
    version=$(on_the_pi "$suite" /usr/bin/python3 -c 'from lance_device.session import runtime_version as v; print(v())')
    say "Debian $suite, Python ${python_of[$suite]}, onnxruntime $version"
    device_on_the_pi "$suite" doctor --out /mnt
    rm -rf "${work:?}/$run"
    train_in_two_parts "$suite" "$run"
    "$PYTHON" scripts/compare_runs.py "$work/reference" "$work/$run" --tolerance $tolerance
    local common=(--artifact /mnt/pkg.tar --checkpoint "/mnt/$run/last.npz" --threads 2 --json)
    device_on_the_pi "$suite" eval "${common[@]}" --data /mnt/digits >"$work/$run/eval.json"
    device_on_the_pi "$suite" predict "${common[@]}" /mnt/digits/0 >"$work/$run/predict.json"
    "$PYTHON" scripts/compare_runs.py "$work/reference" "$work/$run" --answers --tolerance $tolerance
    results+=("Debian $suite, Python ${python_of[$suite]}, onnxruntime $version: well")
}

# The same on this machine: package, images, and the run that the others are compared with.
make_reference() {
    say "building the wheel, a package and the run of this machine"
    rm -rf "$work" && mkdir -p "$work/wheel"
    "$PYTHON" -m pip wheel --quiet --no-deps --disable-pip-version-check --wheel-dir "$work/wheel" "$project"
    wheel=$(echo "$work"/wheel/lance_edge-*.whl)
    "$PYTHON" -c 'from lance_host.entry import main; main()' sample-data "$work/digits" --per-class 12
    "$PYTHON" -c 'from lance_host.entry import main; main()' calibrate --model mcunet --weights bundled \
        --resolution 96 --data "$work/digits" --layers 2 --methods lance --batch-size 16 --batches 2 \
        -o "$work/pkg.tar"
    local common=(--artifact "$work/pkg.tar" --checkpoint "$work/reference/last.npz" --threads 2 --json)
    "$PYTHON" -m lance_device.cli train --artifact "$work/pkg.tar" --data "$work/digits" --steps 4 --threads 2 \
        --checkpoint-every 1 --quiet --out "$work/reference"
    "$PYTHON" -m lance_device.cli eval "${common[@]}" --data "$work/digits" >"$work/reference/eval.json"
    "$PYTHON" -m lance_device.cli predict "${common[@]}" "$work/digits/0" >"$work/reference/predict.json"
}

expect_tools
for suite in $PI_SUITES; do
    [ -n "${python_of[$suite]:-}" ] || fail "unknown release $suite; PI_SUITES: ${!python_of[*]}"
done
mkdir -p "$PI_CACHE"
register_emulator
make_reference
results=()
for suite in $PI_SUITES; do
    make_root "$suite"
    for runtime in $PI_RUNTIMES; do check_one "$suite" "$runtime"; done
done
say "all well"
printf '%s\n' "${results[@]}"
