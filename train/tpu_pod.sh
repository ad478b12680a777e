#!/bin/sh
# TPU=name ZONE=zone sh train/tpu_pod.sh: the same command on every host of a TPU pod slice; JAX
# finds the others. /shared is mounted on all of them (Filestore, or a bucket through gcsfuse).
# Starts again from the newest whole checkpoint until the result is there.
set -u
recipe=${RECIPE:-train/many_hosts.toml}
result=${RESULT:-/shared/runs/many_hosts/pipeline/model_index.json}

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

gcloud compute tpus tpu-vm scp --recurse . "$TPU:fluxjax" --zone "$ZONE" --worker=all || exit
on_all "python3 -m venv venv && venv/bin/pip install -q -e './fluxjax[tpu,train]'" || exit
tries=0
while [ $tries -lt 50 ]; do
    on_all "cd fluxjax && PATH=~/venv/bin:\$PATH sh train/until_done.sh $result \
        python -m fluxjax.train $recipe $*"
    code=$?
    case $code in
    0 | 2 | 3) exit $code ;; # done; a mistake; diverged
    esac
    tries=$((tries + 1))
    sleep 30
done
exit $code
