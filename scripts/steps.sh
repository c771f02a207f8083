# Steps of a long run that resumes; the train_*.sh source this in the repository's root, with the run's folder in $out.

# step NAME COMMAND…: runs a step that was not finished before, and notes how long it took. A command sees a caller's
# variables, so these have names of their own.
step() {
    local step_name=$1 step_start=$SECONDS
    shift
    [ -f "$out/.$step_name.done" ] && return
    echo "== $step_name"
    "$@"
    echo "$((SECONDS - step_start))" > "$out/.$step_name.done"
}
