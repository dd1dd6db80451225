# Debian's Rust of the oldest version that the manifests name: unpacked, not installed. Sourced, after debian.bash.

# debian_rust FOLDER [PACKAGE...]: rustc, cargo and further packages in the folder $rust_tools below FOLDER. Sets $rust_cargo,
# and RUSTC for it.
debian_rust() {
    local root=$1 suite=trixie version
    shift
    version=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    rust_tools=$root/rust-$version
    if [[ ! -d $rust_tools ]]; then
        debian_begin "$root/apt" "$suite"
        debian_apt apt-get install --yes --download-only rustc cargo "$@"
        debian_unpack "$rust_tools"
        rm -rf "$root/apt"
        debian_program "$rust_tools" usr/bin/rustc
        debian_program "$rust_tools" usr/bin/cargo
    fi
    # It is run by another program than its own, and would look for its libraries beside that.
    cat >"$rust_tools/run/rustc-here" <<END
#!/bin/sh
exec "$rust_tools/run/rustc" --sysroot "$rust_tools/usr" "\$@"
END
    chmod +x "$rust_tools/run/rustc-here"
    rust_cargo=$rust_tools/run/cargo
    export RUSTC=$rust_tools/run/rustc-here
    # What the toolchain of the machine would say of itself.
    unset RUSTUP_TOOLCHAIN CARGO
    "$RUSTC" --version | grep -q "^rustc $version\." || {
        "$RUSTC" --version >&2
        echo "$suite does not have Rust $version" >&2
        return 1
    }
}
