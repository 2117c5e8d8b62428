#!/bin/sh
# train-or-resume.sh RUN BUDGET [FLAG OF train ...]
# Begins the run in the folder RUN, goes on with it where it exists, and does nothing where it is completed.
# TRGL_DEVICE names the command line where it is not on the PATH. Exit status: that of trgl-device.
set -eu

if [ "$#" -lt 2 ]; then
    echo "usage: $0 RUN BUDGET [FLAG OF train ...]" >&2
    exit 2
fi
run=$1
budget=$2
shift 2
command=${TRGL_DEVICE:-trgl-device}

if grep -qs '^ *"status": "completed"' "$run/report.json"; then
    echo "$run is completed"
    exit 0
fi
# exec: the service manager's signals reach the training, and its status is the exit status
if [ -f "$run/config.json" ]; then # written last: with it a run can be resumed
    exec "$command" resume "$run" --budget "$budget" --progress plain
fi
# --force replaces what a start that was killed left behind, and nothing that is not a run's
exec "$command" train --run-dir "$run" --budget "$budget" --force --progress plain "$@"
