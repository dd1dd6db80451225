# Breaking the production code on purpose, in a copy of the tree. Sourced by the scripts that do.
#
# A mutation is a file: what it breaks in one line, then
#   file: PATH
#   test: ARGUMENTS of cargo test, and behind -- the names of the tests to run
#   --- old
#   lines that stand exactly once in the file
#   --- new
#   lines in their place
# and further pairs of old and new, if it takes several.
#
# Whoever sources it stands in the root, and sets
#   mutations  the folder of the files
#   work       a folder of one's own under target
#   cargo      words between `cargo` and the arguments of the test, as an array
#   limit      seconds that a test may take
#
# Compiling may take longer: the first time also what all have in common is compiled, on a machine that may be busy.
compiling=900

die() {
    echo "$1" >&2
    exit 1
}

# A copy of the tree as it is, without what git ignores.
copy_tree() {
    rm -rf "$work/tree"
    mkdir -p "$work/tree"
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create --file=- | tar --extract --directory="$work/tree"
    if [[ -f Cargo.lock ]]; then
        cp Cargo.lock "$work/tree/"
    fi
}

# The text of a file, its last newlines included.
contents() {
    cat "$1"
    printf x
}

# replace_once NAME FILE OLD NEW
replace_once() {
    local text rest
    text=$(contents "$2")
    text=${text%x}
    rest=${text#*"$3"}
    [[ $rest != "$text" ]] || die "$1: the old lines are not in the file any more; they begin with: ${3%%$'\n'*}"
    [[ ${rest#*"$3"} == "$rest" ]] || die "$1: the old lines are in the file more than once"
    # What stands before `rest` ends with the old lines.
    text=${text%"$rest"}
    printf '%s' "${text%"$3"}$4$rest" >"$2"
}

# mutate NAME: sets `file` and `test`, changes the file in the copy
mutate() {
    local line part="" old="" new=""
    file="" test=""
    while IFS= read -r line || [[ -n $line ]]; do
        case $line in
            "--- old")
                [[ $part != new ]] || replace_once "$1" "$work/tree/$file" "$old" "$new"
                part=old old="" new=""
                ;;
            "--- new") part=new ;;
            *)
                case $part in
                    old) old+=$line$'\n' ;;
                    new) new+=$line$'\n' ;;
                    *)
                        if [[ $line == "file: "* ]]; then
                            file=${line#file: }
                            cp "$work/tree/$file" "$work/original"
                        fi
                        [[ $line != "test: "* ]] || test=${line#test: }
                        ;;
                esac
                ;;
        esac
    done <"$mutations/$1"
    [[ -n $file && -n $test && $part == new && -n $old ]] || die "$1: incomplete"
    replace_once "$1" "$work/tree/$file" "$old" "$new"
}

# Puts back what `mutate` has changed: the copy's own, as somebody may work on the tree meanwhile.
restore() {
    cp "$work/original" "$work/tree/$file"
}

# Whether every mutation fits the code: known at once, as that takes no time.
check_all() {
    local name
    for name in "$@"; do
        mutate "$name"
        restore
    done
}

# cargo_test SECONDS ARGUMENTS: runs `cargo test` with these arguments, which are the words of one.
cargo_test() {
    local args
    read -ra args <<<"$2"
    (cd "$work/tree" && timeout "$1" cargo "${cargo[@]}" "${args[@]}") >"$work/log" 2>&1
}

# compile NAME ARGUMENTS: whether it compiles is a question of its own, or what does not would seem to be noticed.
compile() {
    local status=0
    cargo_test "$compiling" "${2%% -- *} --no-run" || status=$?
    [[ $status != 0 ]] || return 0
    cat "$work/log" >&2
    [[ $status != 124 ]] || die "$1: not compiled in $compiling s"
    die "$1: does not compile"
}

# check_unbroken ARGUMENTS...: the tests pass before anything is broken, or it would say nothing that they
# fail.
check_unbroken() {
    local arguments
    for arguments in "$@"; do
        compile "before anything is broken" "$arguments"
        cargo_test "$compiling" "$arguments" || { cat "$work/log" >&2; die "a test fails before anything is broken"; }
    done
}

# break_each NAMES...: breaks each and says which tests fail; status 1 where one is not noticed.
break_each() {
    local name caught status missed=0
    for name in "$@"; do
        mutate "$name"
        compile "$name" "$test"
        caught="" status=0
        # One at a time: where the process is aborted (a panic while another unwinds), the test that was
        # running has no result.
        cargo_test "$limit" "$test --test-threads 1" || status=$?
        # timeout's own status is 124: nothing has failed then.
        if [[ $status -ne 0 && $status -ne 124 ]]; then
            caught=$(awk '/^test [^ ]+ .*\.\.\. / && !/ \.\.\. (ok|ignored)$/ { print $2 }' "$work/log" | paste -sd ' ')
        fi
        if [[ -n $caught ]]; then
            echo "$name: caught by $caught"
        else
            echo "$name: NOT caught"
            tail -n 20 "$work/log" >&2
            missed=1
        fi
        restore
    done
    return "$missed"
}
