# What the scripts that boot a guest of QEMU's have in common. Sourced, in the root of the repository.

# guest_fetch WHAT: QEMU and the kernel (ci/guest/fetch). Where they are not to be had and ALLOW_SKIP says
# why that is right, WHAT is skipped.
guest_fetch() {
    if ci/guest/fetch; then
        return
    fi
    if [ -n "${ALLOW_SKIP:-}" ]; then
        echo "$1 skipped: $ALLOW_SKIP" | tee -a "${SKIPPED:-/dev/null}"
        exit 0
    fi
    echo "no QEMU or kernel to be had; ALLOW_SKIP=REASON says why that is right" >&2
    exit 1
}

# guest_file NAME: the first file of that name among those of the kernel.
guest_file() {
    local found
    found=$(find target/guest/kernel -name "$1" -type f -print -quit)
    if [ -z "$found" ]; then
        echo "the kernel's packages have no $1" >&2
        return 1
    fi
    echo "$found"
}

# guest_initrd OUT PACKAGE [MODULE...]: what the guest boots into: the program of a package of the workspace
# as its first process, and modules that are loaded in the order given.
guest_initrd() {
    local out=$1 package=$2 target=x86_64-unknown-linux-gnu built=${CARGO_TARGET_DIR:-target} name module
    local modules=()
    shift 2
    for name in "$@"; do
        module=$(guest_file "$name.ko*")
        modules+=("$module")
    done
    RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
        cargo build --quiet --release --package "$package" --target $target
    cargo build --quiet --package guest-initramfs
    "$built/debug/guest-initramfs" "$out" "$built/$target/release/$package" "${modules[@]}"
}

# guest_qemu DEADLINE LOG ARGUMENTS...: runs QEMU, for so many seconds at most. What the guest says on its
# serial line goes to LOG.
guest_qemu() {
    local deadline=$1 log=$2 system=$PWD/target/guest/qemu/usr status=0
    shift 2
    local library=$system/lib/x86_64-linux-gnu
    QEMU_MODULE_DIR=$library/qemu timeout --kill-after=5 "$deadline" \
        "$library/ld-linux-x86-64.so.2" --library-path "$library" --argv0 qemu-system-x86_64 \
        "$system/bin/qemu-system-x86_64" -L "$system/share/qemu" -L "$system/share/seabios" \
        -accel tcg,thread=multi -nodefaults -display none -serial stdio -no-reboot "$@" \
        </dev/null >"$log.raw" || status=$?
    tr -d '\r' <"$log.raw" >"$log"
    rm "$log.raw"
    if [ $status -ne 0 ]; then
        echo "QEMU ended with $status (124: after $deadline s)" >&2
    fi
    return $status
}
