#!/bin/sh
# Run a stage of the pipeline: sh stage.sh NAME. With the Python that runs DVC, whether or not its environment is
# activated; and with the code of this checkout where it is one of ddops, so that an experiment runs what it records.
set -u
cd "$(dirname "$0")" || exit 1

# The words of a process's command line, one a line.
words() {
    if [ -r "/proc/$1/cmdline" ]; then tr '\0' '\n' < "/proc/$1/cmdline"; else ps -o args= -p "$1" | tr ' ' '\n'; fi
}

parent() {
    if [ -r "/proc/$1/status" ]; then sed -n 's/^PPid:[[:space:]]*//p' "/proc/$1/status"; else ps -o ppid= -p "$1"; fi
}

if [ -f src/ddops/__init__.py ]; then
    PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi

has_ddops='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("ddops", "hydra", "torch"))))'
chosen=
process=$PPID
while [ -z "$chosen" ] && [ "${process:-0}" -gt 1 ]; do
    first=$(words "$process" | head -n 1)
    case ${first##*/} in
        python*) if words "$process" | grep -qE "^(.*/)?dvc(/__main__.py)?$"; then chosen=$first; fi ;;
    esac
    process=$(parent "$process" | tr -d ' ')
done
for python in "$chosen" python python3; do
    if [ -n "$python" ] && "$python" -c "$has_ddops" 2> /dev/null; then
        exec "$python" -m "ddops.stages.$1"
    fi
done
echo "stage.sh: neither the Python that runs DVC (${chosen:-none found}) nor python has it: pip install 'ddops[train]'" >&2
exit 1
