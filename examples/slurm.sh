#!/usr/bin/env bash
#SBATCH --job-name=stream-r1
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00 --requeue --open-mode=append
#SBATCH --signal=TERM@300
# Five minutes before its time is over the run saves and stops; submitted again it goes on.
out=${OUT:-out/train}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=$(ls -d "$out"/step_* >/dev/null 2>&1 && echo --resume)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" train.py wan-1.3b --accumulate=4 --out="$out" $resume \
    --wan=Wan2.1-T2V-1.3B-Diffusers --start=ode_init.pt --videoalign=videoreward --data=prompts.txt
