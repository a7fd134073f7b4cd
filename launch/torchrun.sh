#!/usr/bin/env bash
# Two processes on this machine: run it from the checkout's root, or change it. Several nodes: see dist-train launch --help.
# Made by: dist-train launch torchrun --python python --nproc-per-node 2 --dry-run configs/quickstart.yaml
DIST_TRAIN_EXIT_FILE=runs/quickstart/logs/exit_78 DIST_TRAIN_NUM_PROCESSES=2 python -m torch.distributed.run --nproc-per-node 2 --max-restarts 0 --shutdown-timeout 45 --log-dir runs/quickstart/logs --tee 3 --local-ranks-filter 0 --standalone -m dist_train run configs/quickstart.yaml --run.dir runs/quickstart
