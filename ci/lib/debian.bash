# Programs from Debian's archive that the machine need not have. Sourced by the scripts that need some.
#
# Nothing is installed: apt works on a state of its own, with the mirror that the machine's own
# configuration names, and the packages are unpacked where they are used.

# debian_begin STATE SUITE [SUITE...]: an apt of its own in the folder STATE, which is removed first. Of
# several suites the last is preferred.
debian_begin() {
    debian_state=$1
    shift
    local tool suites=$* uri keys
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || {
            echo "$tool is missing: what is needed comes from Debian's archive" >&2
            return 1
        }
    done
    debian_suite=${suites##* }
    rm -rf "$debian_state"
    mkdir -p "$debian_state"/{lists,archives}/partial
    : >"$debian_state/status"
    uri=$(debian_mirror)
    keys=$(debian_keyring "${suites%% *}")
    cat >"$debian_state/debian.sources" <<END
Types: deb
URIs: $uri
Suites: $suites
Components: main
Signed-By: $keys
END
    # What the machine does after an update is for its own files.
    cat >"$debian_state/apt.conf" <<END
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "$debian_state";
Dir::State::lists "$debian_state/lists";
Dir::State::status "$debian_state/status";
Dir::Cache "$debian_state";
Dir::Cache::archives "$debian_state/archives";
Dir::Etc::sourcelist "$debian_state/debian.sources";
Dir::Etc::sourceparts "/dev/null";
END
    debian_apt apt-get update --error-on=any
}

# debian_apt TOOL ARGUMENTS...: an apt tool on that state.
debian_apt() {
    local tool=$1
    shift
    "$tool" -qq -c "$debian_state/apt.conf" -t "$debian_suite" "$@"
}

# debian_unpack FOLDER: all that was downloaded, into a folder that is whole or not there.
debian_unpack() {
    local package
    rm -rf "$1.part" "$1"
    mkdir -p "$1.part"
    for package in "$debian_state"/archives/*.deb; do
        dpkg-deb -x "$package" "$1.part"
    done
    rm "$debian_state"/archives/*.deb
    mv "$1.part" "$1"
}

# debian_program FOLDER PROGRAM: writes a script PROGRAM's name into FOLDER/run that runs it with the
# libraries of its folder, whatever those of the machine are.
debian_program() {
    local folder name
    folder=$(realpath "$1")
    name=${2##*/}
    mkdir -p "$folder/run"
    cat >"$folder/run/$name" <<END
#!/bin/sh
exec "$folder/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --argv0 "\$0" \\
    --library-path "$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu" "$folder/$2" "\$@"
END
    chmod +x "$folder/run/$name"
}

# The Debian mirror of this machine.
debian_mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/*$' || {
        echo "apt's configuration names no Debian mirror" >&2
        return 1
    }
}

# debian_keyring SUITE: a keyring with the key of the suite: the machine's, else that of the newest package
# which the machine's own apt trusts.
debian_keyring() {
    local shared=usr/share/keyrings extra=$debian_state/keyring release=$1
    # What is not released yet is signed with the keys of the newest release.
    [[ $release != sid ]] || release=trixie
    if ! compgen -G "/$shared/debian-archive-$release-stable.*" >/dev/null; then
        mkdir -p "$extra"
        (cd "$extra" && apt-get -qq download debian-archive-keyring && dpkg-deb -x ./*.deb .)
        compgen -G "$extra/$shared/debian-archive-$release-stable.*" >/dev/null || {
            echo "no keyring has the key of $release" >&2
            return 1
        }
        shared=${extra#/}/$shared
    fi
    echo "/$shared/debian-archive-keyring.gpg"
}
