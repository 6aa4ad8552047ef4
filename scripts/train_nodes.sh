#!/usr/bin/env bash
# Train on several nodes. Run the same command on each node within ten minutes; torchrun does not wait longer:
#
#   NUM_NODES=2 GPUS_PER_NODE=8 RDZV_ENDPOINT=node0:29500 \
#       scripts/train_nodes.sh --job.config_file config/llama3_2_1b.toml [further overrides]
#
# RDZV_ENDPOINT is the host name of one node and a free port of this node. All nodes must resolve the host name.
set -euo pipefail
cd "$(dirname "$0")/.."

for name in NUM_NODES GPUS_PER_NODE RDZV_ENDPOINT; do
    if [ -z "${!name:-}" ]; then
        echo "error: $name is not set; see the first lines of scripts/train_nodes.sh" >&2
        exit 1
    fi
done
if [ $# -eq 0 ]; then
    echo "error: no options of training are set; pass --job.config_file with a file in config/" >&2
    exit 1
fi

# Nodes often have no internet, and ranks would wait for a connection. If your nodes have internet, set these variables.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" WANDB_MODE="${WANDB_MODE:-offline}"

# Install the environment first (`uv sync`): nodes that share a folder must not install packages at the same time.
exec uv run --no-sync torchrun --nnodes="$NUM_NODES" --nproc_per_node="$GPUS_PER_NODE" \
    --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${SLURM_JOB_ID:-none}" \
    --role rank --tee 3 -m llama_mimi.train "$@"
