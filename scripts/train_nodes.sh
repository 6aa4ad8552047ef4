#!/usr/bin/env bash
# Train on several nodes. Run the same command on each node within ten minutes, the time that torchrun waits:
#
#   NUM_NODES=2 GPUS_PER_NODE=8 RDZV_ENDPOINT=node0:29500 \
#       scripts/train_nodes.sh --job.config_file config/llama3_2_1b.toml [further overrides]
#
# RDZV_ENDPOINT is the name of one node, which all nodes can resolve, and a free port of that node.
set -euo pipefail
cd "$(dirname "$0")/.."

for name in NUM_NODES GPUS_PER_NODE RDZV_ENDPOINT; do
    if [ -z "${!name:-}" ]; then
        echo "error: $name is not set; see the first lines of scripts/train_nodes.sh" >&2
        exit 1
    fi
done
if [ $# -eq 0 ]; then
    echo "error: no options of training are set; pass --job.config_file and a file of config/" >&2
    exit 1
fi

# Nodes of a cluster often have no network, and ranks would wait for it. Set these variables yourself to use a network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" WANDB_MODE="${WANDB_MODE:-offline}"

# Install the environment before (`uv sync`): nodes that share it must not install into it at the same time.
exec uv run --no-sync torchrun --nnodes="$NUM_NODES" --nproc_per_node="$GPUS_PER_NODE" \
    --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${SLURM_JOB_ID:-none}" \
    --role rank --tee 3 -m llama_mimi.train "$@"
