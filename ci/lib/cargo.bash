# Programs from a registry of crates that a script needs. Sourced by those in the root.

# cargo_program PACKAGE[@VERSION]: into target/tools/bin. It is built in target too, as the folder for temporary
# files may be small, and what it was built of is not kept. They do little themselves, so they are not optimized.
cargo_program() {
    local tools=$PWD/target/tools status=0
    echo "building $1"
    CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$tools/build \
        cargo install --quiet --locked --debug --root "$tools" "$1" || status=$?
    rm -rf "$tools/build"
    return "$status"
}
