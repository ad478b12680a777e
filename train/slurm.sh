#!/bin/bash
# sbatch train/slurm.sh, from the checkout, which all nodes must see. One process per GPU: JAX reads
# SLURM's variables, no address is given. Two minutes before the time limit the run saves, and the
# job goes back into the queue until the result is there.
#SBATCH --job-name=fluxjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
recipe=${RECIPE:-train/many_hosts.toml}
result=${RESULT:-/shared/runs/many_hosts/pipeline/model_index.json}

sh train/until_done.sh "$result" \
    srun --kill-on-bad-exit=1 python -m fluxjax.train "$recipe" "$@" &
run=$!
trap 'kill -TERM $run' TERM
wait $run
code=$?
while kill -0 $run 2>/dev/null; do
    wait $run
    code=$?
done
case $code in
0 | 2 | 3) exit $code ;; # done; a mistake; diverged
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
