"""The peers' benchmark measures what it says: its rows, its order, its count of FLOPs, its tables. No timings here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peer_ceilings  # noqa: E402
import peer_data  # noqa: E402
import peer_environments  # noqa: E402
import peer_ours  # noqa: E402
import peer_table  # noqa: E402
import peer_trainer  # noqa: E402
import peers  # noqa: E402
from peer_works import BESIDE, SIDES, WORKS  # noqa: E402

WORK = "sft-lora-15m"


# ------------------------------------------------------------------------ rows
@pytest.mark.parametrize(("rows", "near"), [(512, 0.01), (64, 0.06), (24, 0.06)])
def test_rows_have_the_promised_lengths_and_share_of_response(rows, near):
    made = peer_data.conversations(rows)
    sizes = np.array([len(row["prompt"]) + len(row["completion"]) for row in made])
    assert len(made) == rows
    assert np.median(sizes) == pytest.approx(115, rel=near)
    assert sizes.mean() == pytest.approx(160, rel=near)
    assert sizes.max() == 1024 if rows == 512 else sizes.max() > 500
    assert sum(len(row["completion"]) for row in made) / sizes.sum() == pytest.approx(0.51, rel=near)
    assert all(row["prompt"] and row["completion"][-1] == peer_data.END for row in made)


def test_a_sample_keeps_rows_of_the_whole_and_is_the_same_every_time():
    whole = {json.dumps(row) for row in peer_data.conversations(512)}
    part = peer_data.conversations(24)
    assert part == peer_data.conversations(24)
    assert len({json.dumps(row) for row in part} & whole) == 24


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The 15M work on a Llama of two small layers: same vocabulary, same tokenizer."""
    monkeypatch.setitem(peer_data.SHAPES, "15m", (8, 1, 2, 8))
    return peer_data.write_model(tmp_path, "15m")


def test_the_product_sees_the_tokens_labels_and_order_that_the_peers_read(base, tmp_path):
    from tunewright.recipe import Recipe
    from tunewright.runs import checking

    folder = peer_data.write_rows(tmp_path, 24)
    inputs = {"model": str(base)} | {name: str(folder / f"{name}.jsonl") for name in peer_data.FILES}
    prepared = checking.prepare(Recipe.of(peer_ours.tree(WORKS[WORK], "", inputs))[0])
    steps = checking.planned_steps(prepared, *checking.load(prepared))
    read = peer_data.read(inputs["tokens"])
    assert len(steps) == 3
    for step in range(3):
        own = read[8 * step : 8 * step + 8]
        ids = np.concatenate([batch["input_ids"][batch["labels"] >= 0] for batch in steps[step]])
        theirs = np.concatenate([[i for i in row["labels"] if i >= 0] for row in own])
        assert sorted(ids.tolist()) == sorted(theirs.tolist())
    order = peer_data.order(24)
    assert [steps.examples[i]["input_ids"].tolist() for i in order] == [row["input_ids"] for row in read]


def test_the_trainers_adapters_are_drawn_from_the_products_seed():
    from tunewright.data.batches import derive_seed

    assert peer_data.adapter_seed() == derive_seed(0, "apply")


def test_the_trainer_is_given_what_our_recipe_says(base):
    for work in WORKS.values():
        ours = peer_ours.tree(work, "", {"model": "m", "train": "a", "test": "b"})["train"]
        theirs = peer_trainer.arguments(work, "")
        for key in ("num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps"):
            assert ours[key] == theirs[key], (work.name, key)
        assert theirs["learning_rate"] == ours["learning_rate"] == work.rate
        assert theirs["bf16"] == (ours["precision"] == "bf16")
        assert not theirs["gradient_checkpointing"]


def test_every_side_is_explained_and_every_peer_has_an_interpreter_or_an_environment():
    sides = {side for work in WORKS.values() for side in work.sides}
    assert len(sides) >= 15
    assert sides <= set(SIDES)
    assert {side.rpartition("-")[2] for side in WORKS["threads"].sides} == {"alone", *BESIDE}
    found = {side: peer_environments.interpreter(side, Path("nowhere")) for side in sides}
    assert {side.partition("-")[0] for side, python in found.items() if python is None} == {"trl", "llamafactory"}


# ----------------------------------------------------------------------- FLOPs
def test_flops_of_a_toy_equal_a_count_by_hand():
    # D = 2, one layer, M = 3, V = 5, r = 1; one document of 3 tokens, 2 of them learnt
    weights = 4 * (2 * 2) + 3 * (2 * 3)  # q k v o; gate up down: 34 numbers
    adapters = 4 * (2 + 2) + 3 * (2 + 3)  # r (in + out) each: 31
    attention = 6 * (2 * 2 * (1 + 2 + 3))  # six products of D numbers with each of 1, 2, 3 visible tokens, 2 FLOPs each
    below = 3 * 2 * (2 * 2) + 3 * 2 * 2  # q k v: no gradient to the frozen embedding, through W nor through A
    lora = 3 * (2 * 2 * weights + 3 * 2 * adapters - below) + 2 * (2 * 2 * 5 * 2) + attention
    full = 3 * (3 * 2 * weights) + 2 * (3 * 2 * 5 * 2) + attention
    assert peer_ceilings.useful_flops((2, 1, 1, 3), [(3, 2)], "lora", 5, 1) == lora
    assert peer_ceilings.useful_flops((2, 1, 1, 3), [(3, 2)], "full", 5, 1) == full


def test_flops_of_lora_agree_with_what_torch_counts(base):
    """Of one document, in eager attention: torch counts whole squares, so they are taken as squares here too."""
    import torch
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_peft_model(model, peer_trainer.adapter(WORKS[WORK]))
    ids = torch.randint(4, 100, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    said = peer_ceilings.useful_flops((8, 1, 2, 8), [(32, 32)], "lora", peer_data.VOCABULARY, 16)
    half = 6 * 8 * 32 * 33
    assert counter.get_total_flops() == pytest.approx(said - half + 2 * 6 * 8 * 32 * 32, rel=0.01)


# ---------------------------------------------------------------------- tables
def line(side, number, cpu, **more):
    found = {"work": WORK, "side": side, "round": number, "rows": 8, "cpu": "a CPU", "versions": {}}
    found |= {"cpu_s": cpu, "whole_cpu_s": cpu + 5, "wall_s": cpu, "peak_mb": 100 * cpu}
    found |= {"losses": [10.4, 10.2], "steps": 2, "tokens": 1200}
    return found | more


LINES = [
    line("tunewright", 1, 1.0), line("tunewright", 2, 2.0), line("tunewright", 3, 1.5),
    line("trainer", 1, 9.0), line("trainer", 2, 9.0), line("trainer", 3, 9.0),
    line("trainer-flat", 1, 4.0, losses=[10.4, 10.25]), line("trainer-flat", 3, 6.0),
    line("trl-defaults", 1, 0.5),
]  # fmt: skip


def cells(text, first):
    return next([c.strip() for c in row.strip("|").split("|")] for row in text.splitlines() if row.startswith(first))


def test_the_table_takes_the_best_equal_peer_and_ratios_round_by_round():
    figures = cells(peer_table.tables(LINES), f"| {WORK} ")
    assert figures[1:3] == ["8", "2"]  # rounds that both sides have
    assert figures[3] == "tunewright: 1.50 [1.00 .. 2.00]"
    assert figures[4] == "trainer-flat: 5.00 [4.00 .. 6.00]"  # not trl-defaults, which does other arithmetic
    assert figures[5] == "4.00 [4.00 .. 4.00]"
    assert figures[6:] == ["3", "yes"]


def test_a_target_that_is_missed_is_said_and_losing_sides_are_shown():
    slow = [x | {"cpu_s": 3.0} if x["side"] == "tunewright" else x for x in LINES]
    text = peer_table.tables(slow)
    assert cells(text, f"| {WORK} ")[-1] == "**no**"
    for side in ("trainer ", "trainer-flat (the peer to beat)", "trl-defaults"):
        assert f"| {side}" in text


def test_the_detail_has_tokens_a_second_and_the_distance_of_the_curves():
    text = peer_table.tables(LINES).partition(f"**{WORK}**")[2]
    ours, flat = cells(text, "| tunewright |"), cells(text, "| trainer-flat")
    assert ours[3] == "800"  # 1,200 tokens in 1.5 s
    assert flat[-1] == "5.0e-02"
    assert "Initial losses on the same rows agree" in text


def test_initial_losses_that_differ_are_said_and_grouped_rows_are_not_compared():
    wrong = line("trainer", 1, 1.0, losses=[10.402, 10.2])
    grouped = line("trainer-grouped", 1, 1.0, losses=[11.0, 10.2])
    said = [peer_table.tables([LINES[0], other]) for other in (wrong, grouped)]
    assert "**do not agree**: at most 2.0e-03 apart (trainer" in said[0]
    assert "agree" not in said[1]


def test_the_share_of_the_ceiling_is_useful_flops_over_the_best_product(monkeypatch):
    monkeypatch.setattr(peer_table, "flops_of", lambda work, rows: 150e9)
    rates = {"float32 a": 100.0, "float32 b": 200.0, "bfloat16 a": 900.0}
    machine = {"work": WORK, "side": "machine", "round": 1, "rows": 8, "gflops": rates, "copy_gb_s": {"4 MB": 30.0}}
    text = peer_table.tables([*LINES, machine | {"cpu": "a CPU", "versions": {}}])
    assert cells(text, f"| {WORK} | tunewright")[2:] == ["100", "200", "50 %"]
    assert "Copying 4 MB: 30.00 GB/s" in text


def test_beside_a_rival_wall_time_counts_and_lower_is_better():
    lines = [
        line(side, 1, 1.0, work="threads", wall_s=wall)
        for side, wall in (("tunewright-alone", 2.0), ("tunewright-beside1", 2.4), ("tunewright-beside2", 4.0))
    ]
    rows = [r for r in peer_table.tables(lines).splitlines() if r.startswith("| threads")]
    assert [row.split("|")[6].strip() for row in rows] == ["1.20", "2.00"]
    assert [row.split("|")[8].strip() for row in rows] == ["yes", "**no**"]


def test_tables_go_between_the_markers_and_leave_the_page_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{peer_table.BEGIN}\nold\n{peer_table.END}\nafter\n")
    peer_table.write(LINES, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    peer_table.write(LINES, page)
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="no place"):
        peer_table.write(LINES, page)


def test_the_committed_page_has_a_place_for_the_tables():
    text = peer_table.PAGE.read_text(encoding="utf-8")
    assert text.index(peer_table.BEGIN) < text.index(peer_table.END)


# --------------------------------------------------------------------- running
def test_runs_that_are_kept_are_not_run_again_and_a_failed_one_is(tmp_path, monkeypatch):
    bench = peers.Bench(tmp_path, tmp_path, tmp_path / "kept.jsonl", rows=8)
    began = []

    def started(work, side, rows, bench, python):
        began.append(side)
        return {"error": "broke"} if side == "trainer" else {"cpu_s": 1.0, "wall_s": 1.0, "peak_mb": 1.0}

    monkeypatch.setattr(peers, "started", started)
    monkeypatch.setattr(peers, "inputs_of", lambda *args: {})
    for _ in range(2):
        peers.measure([WORK], 1, ["tunewright", "trainer", "trl"], bench)
    assert began == ["tunewright", "trainer", "trainer"]  # TRL has no environment here
    assert [x["side"] for x in peers.kept(bench.results)] == ["tunewright"]


def test_a_cold_run_finds_no_cache_and_a_warm_one_finds_the_cold_ones(tmp_path, monkeypatch):
    bench, work = peers.Bench(tmp_path, tmp_path, tmp_path), WORKS["warm"]
    place = Path(peers.surroundings(work, "tunewright-cold", bench)["TUNEWRIGHT_CACHE_DIR"])
    place.mkdir(parents=True)
    assert Path(peers.surroundings(work, "tunewright-warm-seed", bench)["TUNEWRIGHT_CACHE_DIR"]) == place
    assert place.exists()
    peers.surroundings(work, "tunewright-cold-layers", bench)
    assert not place.exists()


def test_rivals_work_for_as_long_as_they_are_wanted():
    with peers.rivals(1):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['peers.py', '--help']\ntry:\n    import peers; peers.main()\nexcept SystemExit: pass\n"
    )
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "benchmarks", capture_output=True)
