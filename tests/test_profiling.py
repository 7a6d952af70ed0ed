"""The profiling command on tiny shapes: every arm does the same work, and every report is whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from proxyv.cli import run_command
from proxyv.model.flops import RowTokens
from proxyv.model.head import LanguageHead
from proxyv.profiling.__main__ import main
from proxyv.profiling.arms import build_arms, make_inputs
from proxyv.profiling.breakdown import PARTS, breakdown
from proxyv.profiling.commands import _scaling_plot
from proxyv.profiling.costs import decoder_flops
from proxyv.profiling.levers import LEVERS
from proxyv.profiling.loss import all_rows_loss, supervised_loss
from proxyv.profiling.measure import Timing, peak_memory, time_interleaved
from proxyv.profiling.shapes import from_shape

SHAPE = "layers=4,width=32,heads=4,key_heads=2,ffn=48,side=4,vocab=60,reduction=2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def arms():
    return build_arms(from_shape(SHAPE), [3, 1], "eager", torch.float32, "cpu")


def test_arms_share_weights_and_read_text_alike(arms):
    """Without an image every arm is the stock model, bit for bit."""
    assert [arm.name for arm in arms] == ["baseline", "ProxyV-L3", "ProxyV-L1"]
    assert type(arms[0].model).__name__ == "LlamaModel"
    assert type(arms[0].model).__module__.startswith("transformers.")
    shared = {weight.data_ptr() for weight in arms[0].model.parameters()}
    for arm in arms[1:]:
        assert shared <= {weight.data_ptr() for weight in arm.model.parameters()}
    inputs = make_inputs(arms[0].config, RowTokens(0, 9), 2, torch.zeros(1))
    caches = [arm.prefill(inputs) for arm in arms]
    for cache in caches[1:]:
        for ours, stock in zip(cache.layers, caches[0].layers, strict=True):
            torch.testing.assert_close(ours.keys, stock.keys, rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_timed_costs_what_the_formula_says(arms, place):
    """Prefill folded, training unfolded and with two more passes, and one decoding step."""
    arm, row = arms[place], RowTokens(2, 7)
    inputs = make_inputs(arm.config, row, 1, torch.zeros(1))
    arm.inference()
    with FlopCounterMode(display=False) as counter:
        cache = arm.prefill(inputs)
    assert counter.get_total_flops() == decoder_flops(arm.config, row, False, True)
    assert cache.get_seq_length() == 2 * 17 + 7
    with FlopCounterMode(display=False) as counter:
        arm.decode(inputs, cache)
    step = RowTokens(0, 1, past=2 * 17 + 7)
    assert counter.get_total_flops() == decoder_flops(arm.config, step, False, True)
    arm.training()
    with FlopCounterMode(display=False) as counter:
        arm.train_step(inputs)
    arm.forget_gradients()
    expected = decoder_flops(arm.config, row, False, False)
    assert counter.get_total_flops() == pytest.approx(3 * expected, rel=0.1)


def test_peak_memory_is_what_was_held_at_once():
    def work():
        first = torch.ones(1 << 18)  # 1 MiB
        second = torch.ones(1 << 19)
        del first
        third = torch.ones(1 << 18)
        del second
        return third

    assert peak_memory(work, CPU) == pytest.approx(3 << 20, abs=1000)


def test_interleaving_and_spread():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    found = time_interleaved(works, CPU, repeats=2, warmup=1, after=lambda n: order.append(n * 2))
    assert order == ["a", "aa", "b", "bb", "b", "bb", "a", "aa", "a", "aa", "b", "bb"]
    assert all(len(timing.seconds) == 2 for timing in found.values())
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert (timing.median, timing.spread) == (3.0, 2.0)
    assert Timing((1.0, 4.0)).spread == 3.0
    assert timing.over(Timing((10.0, 1.0, 1.0, 6.0, 8.0))) == 0.5


def test_every_layer_of_every_arm_is_compiled():
    """All layers share code, of which torch by default compiles eight versions and no more."""
    shape = "layers=12,width=16,heads=2,ffn=16,side=4,vocab=60,reduction=2"
    arms = build_arms(from_shape(shape), [6], "sdpa", torch.float32, "cpu")
    inputs = make_inputs(arms[0].config, RowTokens(1, 4), 1, torch.zeros(1))
    for arm in arms:
        arm.inference()
        arm.compile(backend="eager")
        torch._dynamo.utils.counters.clear()
        arm.prefill(inputs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 12
    torch._dynamo.reset()


def test_breakdown_leaves_no_trace(arms):
    arm = arms[2]
    inputs = make_inputs(arm.config, RowTokens(1, 7), 1, torch.zeros(1))
    arm.inference()
    parts = breakdown(arm, inputs, CPU)
    assert tuple(parts) == PARTS
    assert all(seconds > 0 for seconds in parts.values())
    for module in arm.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "_call_attention" not in vars(module)
    with pytest.raises(ValueError, match="start_layer=3"):
        breakdown(arms[1], inputs, CPU)


@pytest.mark.parametrize(
    ("command", "rows"),
    [("flops", 3), ("latency", 13), ("memory", 3), ("scaling", 12), ("breakdown", 3), ("loss", 2)],
)
def test_every_command_writes_table_json_and_plot(command, rows, tmp_path, capsys):
    options = {
        "latency": ["--crops", "1", "--text", "6", "--repeats", "2", "--tokens", "2"],
        "memory": ["--crops", "1", "--text", "6", "--checkpointing"],
        "scaling": ["--crops", "0,2", "--text-lengths", "3,5", "--repeats", "1"],
        "breakdown": ["--crops", "1", "--text", "6", "--repeats", "1"],
        "loss": ["--crops", "1", "--text", "6", "--repeats", "1"],
    }
    given = [command, "--shape", SHAPE, "--start-layers", "2,1", "--output", str(tmp_path)]
    if command != "flops":
        given += ["--device", "cpu"]
    assert main([*given, *options.get(command, []), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / f"{command}.json").read_text())
    for part in ("rows", "plot", "settings", "hardware", "versions"):
        assert found[part] == saved[part]
    assert len(found["rows"]) == rows
    assert (tmp_path / f"{command}.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / f"{command}.md").read_text()
    assert table.count("\n| ") == rows + 2 and found["versions"]["torch"] in table


@pytest.mark.parametrize("name", LEVERS)
def test_a_prefill_without_a_lever_computes_the_same(name):
    """Else the difference in time would not be the lever's."""
    _, arm = build_arms(from_shape(SHAPE), [1], "sdpa", torch.float32, "cpu")
    arm.inference()
    arm.model.requires_grad_(False)
    inputs = make_inputs(arm.config, RowTokens(2, 7), 2, torch.zeros(1))
    expected, found = arm.prefill(inputs), LEVERS[name](arm, inputs)
    for ours, theirs in zip(expected.layers, found.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-6)
    update = arm.model.layers[1].guided_update
    assert type(update).__name__ == "GuidedUpdate" and update.fused_input is not None


def test_the_loss_is_the_same_either_way():
    torch.manual_seed(0)
    head, hidden = LanguageHead(8, 30), torch.randn(2, 9, 8, requires_grad=True)
    labels = torch.randint(30, (2, 9))
    labels[:, :5] = -100
    found = []
    for loss in (all_rows_loss, supervised_loss):
        head.weight.grad = hidden.grad = None
        value = loss(head, hidden, labels)
        value.backward()
        found.append((value.detach(), head.weight.grad, hidden.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_levers_are_a_table(capsys):
    stock = "stock model"
    given = ["levers", "--shape", SHAPE, "--crops", "1", "--text", "6", "--repeats", "1"]
    given += ["--device", "cpu", "--json", "--start-layers"]
    assert main([*given, "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["without"] for row in rows] == [
        stock,
        f"{stock}, with an S x S mask",
        "nothing",
        *LEVERS,
    ]
    assert rows[2]["time ratio"] == 1 and all(row["median ms"] > 0 for row in rows)
    with pytest.raises(ValueError, match="give one layer"):
        main([*given, "2,1"])


def written(folder, name, rows, **more):
    report = {"name": name, "plot": {}, "settings": {"device": "cpu"}, "rows": rows, **more}
    (folder / f"{name}.json").write_text(json.dumps(report))


def timed(arm, ratio, flops, operation="prefill", **more):
    saved = {"time saved %": 100 * (1 - ratio), "FLOPs saved %": 100 * (1 - flops)}
    return {"operation": operation, "arm": arm, "time ratio": ratio, **saved, **more}


def test_limits_beside_what_was_measured(tmp_path, capsys):
    """What holds, what does not, what a report lacks, and reports that are not there."""
    rows = [timed("baseline", 1.0, 1.0), timed("ProxyV-L8", 0.64, 0.615)]
    written(tmp_path, "cpu-prefill", rows)
    written(tmp_path, "cpu-decode", [timed("ProxyV-L8", 1.03, 1.0, "decode step")])
    large = timed("ProxyV-L6", 0.48, 0.43, crops=40, text=50)
    written(tmp_path, "cpu-large", [large], process_peak_mib=12000.0)
    written(tmp_path, "cpu-memory", [{"arm": "ProxyV-L8", "training ratio": 0.74}])
    scaling = [timed("ProxyV-L6", 0.9, 0.95, crops=1, text=50)]
    scaling += [
        timed("ProxyV-L6", ratio, 0.51, crops=5, text=n) for ratio, n in ((0.54, 50), (1, 9))
    ]
    written(tmp_path, "cpu-scaling", scaling)
    assert main(["limits", str(tmp_path), "--output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    verdicts = {
        (line["report"], line["arm"], line["column"], round(line["limit"], 3)): line["verdict"]
        for line in found["rows"]
    }
    assert verdicts == {
        ("cpu-prefill", "ProxyV-L8", "time ratio", 0.64): "holds",
        ("cpu-prefill", "ProxyV-L6", "time ratio", 0.53): "not measured",
        ("cpu-scaling", "ProxyV-L8", "time ratio", 0.64): "not measured",
        ("cpu-scaling", "ProxyV-L6", "time ratio", 0.53): "DOES NOT HOLD",  # of 5 crops, 50 tokens
        ("cpu-scaling", "ProxyV-L6", "time ratio", 0.55): "DOES NOT HOLD",  # of 9: half the FLOPs
        ("cpu-decode", "ProxyV-L8", "time ratio", 1.02): "DOES NOT HOLD",
        ("cpu-decode", "ProxyV-L6", "time ratio", 1.02): "not measured",
        ("cpu-large", "ProxyV-L8", "time ratio", 0.60): "not measured",
        ("cpu-large", "ProxyV-L6", "time ratio", 0.48): "holds",
        ("cpu-large", "ProxyV-L6", "time ratio", 0.47): "DOES NOT HOLD",  # 0.43 of the FLOPs
        ("cpu-large", "process", "process_peak_mib", 11444.092): "DOES NOT HOLD",
        ("cpu-memory", "ProxyV-L8", "prefill ratio", 1.0): "not measured",
        ("cpu-memory", "ProxyV-L6", "prefill ratio", 1.0): "not measured",
        ("cpu-memory", "ProxyV-L8", "training ratio", 0.75): "holds",
        ("cpu-memory", "ProxyV-L6", "training ratio", 0.75): "not measured",
    }
    [nine] = [line for line in found["rows"] if "9 text" in line["operation"]]
    assert nine["operation"] == "prefill, 5 crops, 9 text"
    assert "so it is in 2 of 4 rows" in found["notes"]
    drawn = found["plot"]["series"]["measured"]
    assert drawn == [0.64, 0.54, 1.03, 0.74, 0.48, 0.48, 1]
    assert len({*found["plot"]["x"]}) == len(drawn)
    assert "cpu-training" in found["notes"] and "cpu-prefill" not in found["notes"]
    assert "DOES NOT HOLD" in (tmp_path / "limits.md").read_text()
    assert main(["limits", str(tmp_path)]) == 0  # its own file is no measurement


def test_models_that_skip_are_rows_of_their_own(capsys):
    given = ["flops", "--preset", "vicuna-7b", "--start-layers", "12", "--skip", "atn,atn_ffn"]
    assert main([*given, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["arm"] for row in rows] == ["baseline", "ProxyV-L12", "ATN-L12", "ATN+FFN-L12"]
    assert [row["paper says %"] for row in rows[1:]] == [46, 11, 50]
    assert all(abs(row["saved %"] - row["paper says %"]) < 1 for row in rows[1:])
    given = ["latency", "--shape", SHAPE, "--start-layers", "1", "--skip", "atn,atn_ffn"]
    given += ["--crops", "1", "--text", "6", "--repeats", "1", "--tokens", "1", "--device", "cpu"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert len({row["arm"] for row in found}) == 5  # and the baseline with a stock cache
    assert all(row["median ms"] > 0 for row in found)


def test_token_reduction_is_rows_of_its_own(capsys):
    """Alone and under ProxyV, timed on the rows that a method leaves, with its own cache."""
    methods = [
        "method=visionzip,dominant=5,contextual=2",
        '{"method": "pyramiddrop", "layers": [1, 2, 3]}',
        "method=prumerge",
        "method=average_pool",
    ]
    given = ["--shape", SHAPE, "--start-layers", "1", "--proxy-kind", "learned", "--kept", "6"]
    given += ["--crops", "2", "--text", "6", "--device", "cpu", "--json"]
    for method in methods:
        given += ["--reduction", method]
    assert main(["latency", *given, "--operations", "prefill,decode", "--repeats", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    alone = ["visionzip", "pyramiddrop", "prumerge", "average_pool"]
    arms = ["baseline", "ProxyV-L1 learned"] + [
        name for method in alone for name in (method, f"ProxyV-L1 learned+{method}")
    ]
    assert [row["arm"] for row in rows if row["operation"] == "prefill"] == arms
    decoding = [row["arm"] for row in rows if row["operation"] == "decode step"]
    assert decoding == [*arms, "baseline, stock cache"]
    assert all(row["median ms"] > 0 for row in rows)
    saved = {r["arm"]: r["FLOPs saved %"] for r in rows if r["operation"] == "prefill"}
    assert all(saved[f"ProxyV-L1 learned+{name}"] > saved[name] > 0 for name in alone)
    assert main(["memory", *given, "--operations", "prefill"]) == 0
    cached = {r["arm"]: r["KV cache MiB"] for r in json.loads(capsys.readouterr().out)["rows"]}
    assert cached["baseline"] == cached["ProxyV-L1 learned"]
    rows_left = {"visionzip": 2 * 8 + 6, "prumerge": 2 * 7 + 6, "average_pool": 2 * 5 + 6}
    for name, left in rows_left.items():
        assert cached[name] / cached["baseline"] == pytest.approx(left / (2 * 17 + 6))
    assert cached["pyramiddrop"] < cached["baseline"]


def test_the_table_is_readable(capsys):
    assert main(["flops", "--preset", "vicuna-7b"]) == 0
    out = capsys.readouterr().out
    assert "ProxyV-L12" in out and "45.5" in out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["latency"], "needs --preset"),
        (["latency", "--shape", "layers=4,width=8"], "lacks heads, ffn"),
        (["flops", "--shape", "layer=4"], "did you mean 'layers'"),
        (["flops", "--preset", "vicuna-7"], "did you mean 'vicuna-7b'"),
        (["flops", "--shape", SHAPE, "--start-layers", "4"], "start_layer=4"),
        (["flops", "--shape", SHAPE, "--start-layers", "a"], "--start-layers 'a'"),
        (["flops", "--shape", SHAPE, "--skip", "atm"], "did you mean 'atn'"),
        (["memory", "--shape", SHAPE, "--batch", "0"], "--batch must be at least 1"),
        (["latency", "--preset", "tiny,smol"], "one preset at a time"),
        (["latency", "--shape", SHAPE, "--operations", "prefil"], "did you mean 'prefill'"),
        (
            [
                "flops",
                "--shape",
                SHAPE,
                "--proxy-kind",
                "learned",
                "--reduction",
                "method=prumerge",
            ],
            "--kept",
        ),
        (
            [
                *"flops --proxy-kind learned --reduction method=prumerge --kept 17 --shape".split(),
                SHAPE,
            ],
            "--kept must be from 1 to 16",
        ),
        (
            ["latency", "--shape", SHAPE, "--device", "cpu", "--reduction", "method=fastv,layer=1"],
            "proxy_kind='learned'",
        ),
        (["limits", "/dev"], "run bash scripts/benchmark.sh first"),
    ],
)
def test_mistakes_are_one_line(given, message, capsys):
    assert run_command(main, given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def scaled(arm, crops, text, ms):
    return {"arm": arm, "crops": crops, "text": text, "median ms": ms}


@pytest.mark.parametrize(
    ("sizes", "x", "series", "x_label"),
    [
        ([(1, 9), (2, 9)], [1, 2], {"a": [0.0, 1.0], "b": [0.5, 1.5]}, "crops"),
        ([(2, 9), (2, 7)], [9, 7], {"a": [0.0, 1.0], "b": [0.5, 1.5]}, "text tokens"),
        ([(2, 9)], ["a", "b"], {"prefill": [0.0, 0.5]}, ""),
        (
            [(1, 9), (2, 9), (1, 7), (2, 7)],
            [1, 2],
            {
                "a, 9 text tokens": [0.0, 1.0],
                "b, 9 text tokens": [0.5, 1.5],
                "a, 7 text tokens": [2.0, 3.0],
                "b, 7 text tokens": [2.5, 3.5],
            },
            "crops",
        ),
    ],
)
def test_scaling_is_drawn_over_what_varies(sizes, x, series, x_label):
    lines = [
        scaled(arm, crops, text, 1000.0 * place + 500 * (arm == "b"))
        for place, (crops, text) in enumerate(sizes)
        for arm in ("a", "b")
    ]
    plot = _scaling_plot(lines)
    assert (plot.x, plot.series, plot.x_label, plot.lines) == (x, series, x_label, len(sizes) > 1)
