"""The data of a run: from its configuration to the rows of a split, their order, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.loader import Loader
from braid.data_pipeline.mixture import MixedOrder, MixedRows, Stage
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.remote import Fetching
from braid.kernels.random import fold_key
from braid.pretrain.config.schema import Config, DataConfig


def open_rows(data: DataConfig, split: str, run_dir: Path) -> Rows | MixedRows:
    """The rows of a split, of all sources where there are several. Where damaged shards are skipped, ledgers of the
    rows left out go into `run_dir`: damaged.jsonl, of a mixture damaged-SOURCE.jsonl."""

    fetching = Fetching(data.cache, data.cache_gb, data.retries, data.timeout_s)

    def rows(folder: str, ledger: str) -> Rows:
        corpus = TokenCorpus.open(folder, split, damaged=data.damaged, ledger=run_dir / ledger, fetching=fetching)
        what = {"oversized": data.oversized, "target_tokens": data.target_tokens}
        return Rows(corpus, data.sequence_length, data.packing, **what)

    if not data.sources:
        return rows(data.path, "damaged.jsonl")
    return MixedRows({name: rows(folder, f"damaged-{name}.jsonl") for name, folder in data.sources.items()})


def training_order(config: Config, rows: Rows | MixedRows) -> ShuffledOrder | MixedOrder:
    """The endless order of training rows. The order of a source follows from (seed, its name)."""
    seed, data = config.run.seed, config.data
    if not isinstance(rows, MixedRows):
        return ShuffledOrder(rows.rows_per_shard, seed, data.window)
    orders = {
        name: ShuffledOrder(part.rows_per_shard, fold_key(seed, "source", name), data.window)
        for name, part in rows.parts.items()
    }
    sizes = {name: len(part) for name, part in rows.parts.items()}
    planned = [(0, data.weights or sizes), *((stage.from_sample, stage.weights) for stage in data.stages)]
    stages = [Stage.weighted(first, weights, data.temperature) for first, weights in planned]
    return MixedOrder(orders, stages, seed)


def describe_data(loader: Loader, packing: str) -> Iterator[str]:
    """What a run says of its data when it starts, a line each."""
    rows = loader.rows
    if isinstance(loader.order, MixedOrder):
        for name, part in rows.parts.items():
            yield f"  source {name}: {len(part):,} rows of {part.corpus.source}"
        now = loader.order.stage(loader.consumed)
        for stage in loader.order.stages:
            if stage.first >= now.first:
                shares = ", ".join(f"{name} {100 * share:.4g} %" for name, share in stage.fractions.items())
                yield f"  from sample {stage.first:,}: {shares}"
    for name, part in rows.parts.items():
        if part.num_oversized:
            yield part.about_oversized + (f" ({name})" if len(rows.parts) > 1 else "")
    if any(part.corpus.manifest["pairs"] for part in rows.parts.values()) and packing != "pairs":
        yield (
            "the corpus consists of (source, target) pairs and is read as plain text; "
            "data.packing=pairs trains targets given their sources"
        )
