#!/bin/sh
# Starts this machine's share of a run over several machines. The same command on each of them:
#
#   MODEL=./sft-model NODES=2 FIRST=10.0.0.1 PROCESSES=8 sh examples/many_processes/node.sh
#
# FIRST is an address of one of them that all can reach. Options of `penchant train` may follow. Where a machine's name
# means 127.0.0.1 to itself, say its own address, OWN=10.0.0.2, and name its network card: GLOO_SOCKET_IFNAME=eth0
# (NCCL_SOCKET_IFNAME for GPUs).
set -eu

WHERE=""
if [ -n "${OWN:-}" ]; then
    WHERE="--local-addr $OWN --rdzv-conf is_host=$([ "$OWN" = "$FIRST" ] && echo 1 || echo 0)"
fi
# shellcheck disable=SC2086
exec torchrun $WHERE \
    --nnodes "$NODES" --nproc-per-node "${PROCESSES:-1}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST:${PORT:-29400}" --rdzv-id "${RUN:-penchant}" \
    -m penchant train examples/many_processes/run.yaml --model "$MODEL" "$@"
