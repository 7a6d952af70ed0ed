"""Machines of a run, from the environment."""

from __future__ import annotations

import pytest

from proxyv.train.nodes import Nodes, find_nodes

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
