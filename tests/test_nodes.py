"""Machines of a run, from the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_training import make_backbones, make_rows, overrides

from proxyv.train.nodes import Nodes, find_nodes

ROOT = Path(__file__).resolve().parents[1]
HAND = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
SLURM = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "123456",
}


def test_one_machine_needs_nothing():
    for environment in ({}, {"NNODES": "1"}, {"SLURM_NNODES": "4"}, {"MASTER_ADDR": "a"}):
        assert find_nodes(environment) == Nodes()
    assert Nodes().options() == ["--standalone"]


def test_variables_set_by_hand():
    nodes = find_nodes(HAND)
    assert nodes == Nodes(4, 2, "a", 7)
    assert nodes.options() == ["--nnodes=4", "--node-rank=2", "--master-addr=a", "--master-port=7"]


def test_slurm(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[03-04]" ] && printf "node03\\nnode04\\n"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_nodes(SLURM) == Nodes(2, 1, "node03", 20_000 + 123456 % 20_000)
    assert find_nodes({**SLURM, "MASTER_ADDR": "b", "MASTER_PORT": "9"}) == Nodes(2, 1, "b", 9)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2, but NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({**HAND, "NODE_RANK": "4"}, "NODE_RANK=4: with NNODES=4 it must be 0 to 3"),
        ({**HAND, "MASTER_PORT": "x"}, "MASTER_PORT=x: expected a number"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "16"}, "start one task a node"),
    ],
)
def test_what_is_wrong_is_said(environment, message):
    with pytest.raises(ValueError, match=message):
        find_nodes(environment)


@pytest.mark.slow
def test_two_machines_train_as_one(tmp_path):
    """Two launches on this machine, each with one rank, find each other and end alike."""
    make_backbones(tmp_path)
    make_rows(tmp_path, 8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = {"run.output_dir": tmp_path / "run", "optim.max_steps": 2, "model.dtype": "float32"}
    words = ["--config", "configs/tiny/pretrain.yaml", *overrides(tmp_path, **fixed)]
    launches = [
        subprocess.Popen(
            [sys.executable, "-m", "proxyv.train", *words],
            cwd=ROOT,
            env={
                **os.environ,
                "NNODES": "2",
                "NODE_RANK": str(node),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [launch.communicate(timeout=500)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], said
    assert "batch 4 = 2 ranks x 2 rows x 1 accumulated; 2 steps" in said[0]
    assert (tmp_path / "run" / "finished.json").is_file()
