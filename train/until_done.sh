#!/bin/sh
# until_done.sh RESULT COMMAND...: run COMMAND once; 0 only if RESULT is there afterwards.
#
# A run that is sent SIGTERM saves and exits with 0, which job managers take for the end. Here that
# is 75 (try again). Other exit codes are passed on: 2 and 3 (a mistake, diverged) are not worth
# another try, 4 and above (hung, a process lost, killed) are. SIGTERM is handed on.
result=$1
shift
"$@" &
run=$!
trap 'kill -TERM $run 2>/dev/null' TERM INT
wait $run
code=$?
while kill -0 $run 2>/dev/null; do # wait also returns when a signal has come
    wait $run
    code=$?
done
if [ $code -eq 0 ] && [ ! -e "$result" ]; then
    code=75
fi
exit $code
