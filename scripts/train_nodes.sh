#!/usr/bin/env bash
# Training on several nodes. The same command on each of them, within torchrun's ten minutes of waiting:
#
#   NUM_NODES=2 GPUS_PER_NODE=8 RDZV_ENDPOINT=node0:29500 \
#       scripts/train_nodes.sh --job.config_file config/llama3_2_1b.toml [further overrides]
#
# RDZV_ENDPOINT is one of the nodes, under a name that all of them know, and a free port there.
set -euo pipefail
cd "$(dirname "$0")/.."

for name in NUM_NODES GPUS_PER_NODE RDZV_ENDPOINT; do
    if [ -z "${!name:-}" ]; then
        echo "error: $name is not set; see the first lines of scripts/train_nodes.sh" >&2
        exit 1
    fi
done
if [ $# -eq 0 ]; then
    echo "error: there is nothing to train; pass --job.config_file and a file of config/" >&2
    exit 1
fi

# Nodes of a cluster often have no network, and ranks that look for one wait. Set them to change it.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" WANDB_MODE="${WANDB_MODE:-offline}"

# The environment is there before (`uv sync`): nodes that share it must not all install into it.
exec uv run --no-sync torchrun --nnodes="$NUM_NODES" --nproc_per_node="$GPUS_PER_NODE" \
    --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${SLURM_JOB_ID:-none}" \
    --role rank --tee 3 -m llama_mimi.train "$@"
