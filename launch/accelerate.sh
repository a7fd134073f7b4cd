#!/usr/bin/env bash
# Two CPU processes by accelerate launch. The files in launch/accelerate are for other machines.
# Made by: dist-train launch accelerate --python python --nproc-per-node 2 --config-file launch/accelerate/cpu.yaml --dry-run configs/quickstart.yaml
DIST_TRAIN_EXIT_FILE=runs/quickstart/logs/exit_78 DIST_TRAIN_NUM_PROCESSES=2 PET_LOCAL_RANKS_FILTER=0 PET_SHUTDOWN_TIMEOUT=45 python -m accelerate.commands.launch --config_file launch/accelerate/cpu.yaml --max_restarts 0 --log_dir runs/quickstart/logs --tee 3 --main_process_port 0 --num_processes 2 -m dist_train run configs/quickstart.yaml --run.dir runs/quickstart
