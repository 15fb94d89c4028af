"""Training on rows of documents: real tokens in every count, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import Trainers, assert_same_run

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.pretrain.telemetry.metrics_log import read_metrics

OPTIONS = {"training__log_every": 6, "training__validate_every": 6, "training__sample_every": 0}


def test_in_pieces_and_whole(trainers: Trainers, corpus: Path, tmp_path: Path) -> None:
    """Bit for bit, and the tokens seen are those of the rows."""
    for run, steps in (("pieces", 6), ("pieces", 12), ("whole", 12)):
        trainers.train("tiny_mdlm", run, **OPTIONS, data__packing="best_fit", training__steps=steps)
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")
    rows = Rows(TokenCorpus.open(corpus, "train"), 16, "best_fit")
    order = ShuffledOrder(rows.rows_per_shard, 0, 2)
    num_real = [rows.num_real(order.span(0, 8 * steps)) for steps in (6, 12)]
    records = list(read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    for split in ("train", "validation"):
        assert [record["tokens_seen"] for record in records if record["split"] == split] == num_real
    assert num_real[1] < 12 * 8 * 16


@pytest.mark.slow
def test_ranks_with_different_numbers_of_tokens(trainers: Trainers, tmp_path: Path) -> None:
    """The loss is that of one process: a sum over all tokens, divided by their number."""
    losses = []
    for ranks in (1, 2):
        run = f"ranks-{ranks}"
        trainers.train("tiny_ar", run, ranks=ranks, **OPTIONS, data__packing="document", training__steps=6)
        losses.append([record["loss"] for record in read_metrics(tmp_path / run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
